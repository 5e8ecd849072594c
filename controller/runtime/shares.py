"""What one instance has seen of who holds which stream, and for how long: the memory that ``domain.sharing`` decides on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from controller.domain.model import Role
from controller.domain.sharing import Shares, quotas, to_acquire, to_give_up
from controller.runtime.evidence import Coordination

SETTLE_TTLS = 2
"""Members must have been the same for so many lease TTLs before a stream is given up."""
ORDER = (Role.STANDBY, Role.FENCED, Role.HOLDING, Role.OPENING, Role.DRAINING, Role.ACTIVE)
"""What an instance is, when its streams are in different roles: the last of these."""


class Sharing:
    """One per controller. ``note`` is called at every look, the rest is decided on it. Times are monotonic seconds."""

    def __init__(
        self, streams: Sequence[str], region: str, instance: str, *, ttl_seconds: float, expected: int, now: Callable[[], float]
    ) -> None:
        self._streams = tuple(streams)
        self._region = region
        self._me = f"{region}/{instance}"
        self._ttl = ttl_seconds
        self._expected = expected
        self._now = now
        self._began = now()
        self._live: frozenset[str] = frozenset()
        self._same_since = now()
        self._holders: dict[str, str] = {}
        self._free_since: dict[str, float] = {}
        self._given_up = ""
        self._futile: frozenset[str] = frozenset()
        """The members among whom nobody took what this instance gave up."""

    def note(self, seen: Coordination) -> None:
        """One look at etcd."""
        now, authority = self._now(), seen.authority.value
        live = frozenset(f"{member.region}/{member.instance}" for member in seen.members if member.region == self._region)
        if live | {self._me} != self._live:
            self._live, self._same_since = live | {self._me}, now
        self._holders = {holder.stream: f"{holder.region}/{holder.instance}" for holder in seen.holders}
        ours = authority.region == self._region and authority.barrier is None
        for stream in self._streams:
            if stream in self._holders or not ours:
                self._free_since.pop(stream, None)
            else:
                self._free_since.setdefault(stream, now)

    def _seen(self) -> Shares:
        now = self._now()
        overdue = [stream for stream, since in self._free_since.items() if now - since > self._ttl]
        starting = now - self._began < self._ttl
        return Shares(self._streams, self._holders, self._live, self._me, overdue, expected=self._expected if starting else 0)

    def wanted(self) -> tuple[str, ...]:
        """Streams to acquire now, in this order."""
        return to_acquire(self._seen())

    def acquired(self, stream: str) -> None:
        """This instance has it now. When it takes back what it gave up, giving up was futile among these members."""
        self._holders[stream] = self._me
        if stream == self._given_up:
            self._futile = self._live
        self._given_up = ""

    def too_much(self) -> str | None:
        """The stream that this instance should give up, or None. The caller knows that no plan is under way."""
        seen = self._seen()
        if self._now() - self._same_since < SETTLE_TTLS * self._ttl or self._live == self._futile:
            return None
        return to_give_up(seen)

    def gave_up(self, stream: str) -> None:
        """This instance begins to give the stream up."""
        self._given_up = stream

    @property
    def share(self) -> int:
        """How many streams this instance should hold."""
        return quotas(self._seen())[self._me]


def overall(said: Mapping[str, tuple[Role, str]], held: Collection[str]) -> tuple[Role, str]:
    """One role and one sentence for an instance, from those of its streams. ``held``: the streams that it holds."""
    if len(said) == 1:
        return next(iter(said.values()))
    role = max((role for role, _ in said.values()), key=ORDER.index)
    by_reason: dict[tuple[Role, str], list[str]] = {}
    for stream, found in sorted(said.items()):
        if stream in held or not held:
            by_reason.setdefault(found, []).append(stream)
    parts = sorted(by_reason.items(), key=lambda part: (-ORDER.index(part[0][0]), part[1]))
    return role, "; ".join(f"{', '.join(streams)}: {reason}" for (_, reason), streams in parts)
