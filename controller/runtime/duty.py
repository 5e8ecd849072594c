"""Which streams this instance holds: it acquires, shares out evenly, and steps down where a right is gone.

The rules are in ``domain.sharing`` and ``tenure``; here they are carried out, one bounded thing at a time, on what ``sight``
saw. Losing one stream takes no other one down. Nothing here waits for a heartbeat: a slow look at etcd must not delay those,
so they have tasks of their own (``Active.start``), and this only reads what they found.
"""

from __future__ import annotations

from collections.abc import Callable

from controller.domain.model import Forks, Head, Role
from controller.domain.sharing import LEAD
from controller.errors import Refused
from controller.ports import Compare
from controller.runtime.active import Active
from controller.runtime.audit import Audit
from controller.runtime.documents import read
from controller.runtime.evidence import Outside, read_heads
from controller.runtime.opening import etcd_forgot
from controller.runtime.shares import Sharing
from controller.runtime.shell import Shell
from controller.runtime.sight import Sight
from controller.runtime.tenure import Tenure, acquire, may_acquire

FLOOR_GRACE_SECONDS = 0.25
"""How long an acquisition waits for the last store's head. What it reads refuses early and decides nothing: stores that the new
epoch fences say the same once more, and a dead one gets its last chance there (``fence_stores``)."""

GIVEN_UP = "stream-given-up"
VIEW_LOST = "the view cannot be written"


class Duty:
    """One per controller. ``shell_of``: what a tenure of this stream gets. ``actives``: stream → what is held, kept by this."""

    def __init__(
        self,
        shell_of: Callable[[str], Shell],
        sight: Sight,
        sharing: Sharing,
        outside: Outside,
        audit: Audit,
        say: Callable[[str, Role, str], None],
        actives: dict[str, Active],
    ) -> None:
        self._shell_of = shell_of
        shell = shell_of(LEAD)
        self._settings, self._ports, self._keys = shell.settings, shell.ports, shell.keys
        self._clock, self._book, self._fleet = shell.ports.clock, shell.book, shell.fleet
        self._streams = tuple(shell.followers)
        self._sight = sight
        self._sharing = sharing
        self._outside = outside
        self._audit = audit
        self._say = say
        self._actives = actives
        self._not_before: dict[str, float] = {}
        """Stream → no acquisition before this (monotonic): the last one ended before it served."""

    async def heed(self, active: Active) -> str | None:
        """Whatever the last heartbeat asks for. Needs nobody's answer. Raises what is a bug."""
        tenure = active.tenure
        if active.crashed is not None:
            raise active.crashed
        if active.over:
            return await self.step_down(active, active.over)
        if tenure.right.lost:
            return await self.step_down(active, tenure.right.lost)
        if not tenure.may_act():
            return await self.step_down(active, f"the right to act ran out ({tenure.reason})")
        return None

    async def consider(self) -> str | None:
        """Which streams to acquire. The floor is read from the stores only when nothing else is in the way. Streams that are
        held already must not miss their heartbeat for it: after one tick's time the rest waits for the next tick."""
        seen = self._sight.seen
        assert seen is not None
        began = self._clock.monotonic()
        wanted = self._sharing.wanted()
        taken = []
        for stream in (*wanted, *(stream for stream in self._streams if stream not in wanted)):
            now = self._clock.monotonic()
            late = bool(self._actives) and now - began > self._settings.etcd.tick_seconds
            if stream in self._actives or now < self._not_before.get(stream, now) or late:
                continue
            holder = next((found for found in seen.holders if found.stream == stream), None)
            reason = may_acquire(seen.authority, holder, self._settings.region, 0)
            if reason is None and stream not in wanted:
                reason = f"it is left to another instance of {self._settings.region}: the share of this one is taken"
            found = await self._acquire(stream) if reason is None else reason
            if isinstance(found, str):
                self._say(stream, Role.STANDBY, found)
                continue
            self._begin(found)
            taken.append(f"{stream} in epoch {found.fence.epoch}")
        return f"acquired {', '.join(taken)}" if taken else None

    async def _acquire(self, stream: str) -> Tenure | str:
        """One attempt. Returns the tenure, or why not. Raises Refused when etcd has forgotten, or may have, what the stores
        know: also a snapshot that knows every epoch may be older than the record of who acknowledged alone."""
        heads = await read_heads(self._outside, stream, grace_seconds=FLOOR_GRACE_SECONDS)
        known = {region: head for region, head in heads.items() if isinstance(head, Head)}
        forks = await read(self._ports.coordinator, self._keys.forks(stream), Forks)
        forgotten = etcd_forgot(known, forks.value.starts if forks else ())
        if forgotten is not None:
            raise Refused(forgotten, hint="compare the stores with `drctl status`, then confirm with `drctl recover`")
        return await acquire(
            self._ports.coordinator,
            self._keys,
            self._clock,
            stream=stream,
            region=self._settings.region,
            instance=self._settings.instance,
            address=self._settings.api.address,
            ttl_seconds=self._settings.etcd.ttl_seconds,
            margin_seconds=self._settings.etcd.margin_seconds,
            floor=max((head.epoch for head in known.values()), default=0),
            seen_gone=self._sight.seen_gone(stream),
        )

    def _begin(self, tenure: Tenure) -> None:
        stream = tenure.fence.stream
        self._sharing.acquired(stream)
        active = self._actives[stream] = Active(self._shell_of(stream), tenure)
        self._say(stream, Role.OPENING, f"epoch {tenure.fence.epoch} acquired")
        active.start()

    async def even_out(self) -> str | None:
        """Gives one stream up when another instance has too few: never while a plan is under way, and one at a time."""
        assert self._sight.seen is not None
        settled = all(active.serving for active in self._actives.values())
        if len(self._actives) < 2 or not settled:
            return None
        stream = self._sharing.too_much()
        if stream is None or stream not in self._actives or await self._plan_under_way():
            return None
        who, epoch = f"{self._settings.region}/{self._settings.instance}", self._actives[stream].tenure.fence.epoch
        written = await self._audit.commit(
            [self._actives[stream].tenure.guard, Compare.modified(self._keys.authority, self._sight.seen.authority.revision)],
            [],
            at=self._clock.wall(),
            actor=who,
            action=GIVEN_UP,
            subject=stream,
            detail={"epoch": epoch, "held": sorted(self._actives), "share": self._sharing.share},
        )
        if not written.succeeded or stream not in self._actives:
            return None
        self._sharing.gave_up(stream)
        self._actives[stream].give_up("another instance of this region has fewer streams")
        return f"giving up {stream}: this instance should hold {self._sharing.share} streams"

    async def _plan_under_way(self) -> bool:
        """Whether a plan may move the fleet: it was made under the present epochs, and is made void by new ones."""
        assert self._sight.seen is not None
        barrier = self._sight.seen.authority.value.barrier
        return barrier is not None or any(not plan.value.ended for plan in await self._book.all())

    async def step_down(self, active: Active, reason: str) -> str:
        """Ends acting: nothing is acknowledged after this, agents are given no more time, and the lease goes back if it may."""
        stream = active.tenure.fence.stream
        del self._actives[stream]
        if active.writer is None:  # it never served: give the cause of that, and the others, some time
            self._not_before[stream] = self._clock.monotonic() + self._settings.etcd.ttl_seconds
        elif active.writer.lost.startswith(VIEW_LOST):  # a full disk, say: it would only hold, in the way of the others
            self._not_before[stream] = self._clock.monotonic() + 3 * self._settings.etcd.ttl_seconds
        if stream == LEAD:
            self._fleet.deactivate()
        self._say(stream, Role.FENCED, reason)
        await active.stop(reason)
        self._say(stream, Role.STANDBY, reason)
        return f"stepped down: {reason}"
