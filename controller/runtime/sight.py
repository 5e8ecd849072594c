"""What one instance has seen of etcd and of the stores, when, and since when it does not see them: the memory of its looks.

It looks and remembers; what follows from it others decide. An unknown keeps the time at which the thing was last known. Times
are our own monotonic ones, but for those that are compared with other processes' documents (wall, said so).
"""

from __future__ import annotations

from collections.abc import Sequence

from controller.domain.model import Head, StreamReport, Unknown
from controller.errors import Unavailable, WrongGroup
from controller.ports import Clock
from controller.runtime.evidence import Coordination, Outside, look, read_heads


class Sight:
    """One per controller. ``tick_seconds``: the pace of ``look``."""

    def __init__(self, outside: Outside, streams: Sequence[str], clock: Clock, tick_seconds: float) -> None:
        self._outside = outside
        self._streams = tuple(streams)
        self._clock = clock
        self._tick_seconds = tick_seconds
        self.seen: Coordination | None = None
        self.seen_at = 0.0
        """Wall time of ``seen``."""
        self.etcd_silent = False
        """Whether the last look at etcd failed."""
        self.looked_at = clock.monotonic()
        """Monotonic time of the last one that did not."""
        self.heads: dict[str, dict[str, Head | Unknown]] = {}
        """Stream → region → what its store's head was at the last look."""
        self._holder_gone_at: dict[str, tuple[int, float, float]] = {}
        """Stream → (the authority's epoch, wall time, monotonic time) of the first look at which nobody held it any more."""
        self._clock_ahead: dict[str, tuple[float, float]] = {}
        """Who reports → (how far our wall clock is ahead of its, at most; the stamp of its newest report)."""
        self._last_holder: dict[str, str] = {}
        """Stream → who was seen to hold it last: not always who reported last."""

    async def look(self) -> Coordination:
        """One look at etcd. Raises Unavailable, WrongGroup (the group was founded with another number of streams)."""
        try:
            seen = await look(self._outside)
        except Unavailable:
            self.etcd_silent = True
            raise
        before, looked_at = self.seen, self.looked_at
        self.etcd_silent, self.looked_at = False, self._clock.monotonic()
        founded = seen.authority.value.streams
        if founded != len(self._streams):
            raise WrongGroup(
                f"stream.streams = {len(self._streams)}, and the group was founded with {founded}: agents would change streams",
                hint=f"set stream.streams = {founded}, as in the group's other controllers",
            )
        now, moment = self._clock.wall(), self._clock.monotonic()
        self.seen, self.seen_at = seen, now
        held = {holder.stream for holder in seen.holders}
        epoch = seen.authority.value.epoch
        for stream in self._streams:
            gone_in = self._holder_gone_at[stream][0] if stream in self._holder_gone_at else None
            if stream in held:
                self._holder_gone_at.pop(stream, None)
            elif gone_in != epoch:  # another holder came and went since, also when nobody of us saw it
                self._holder_gone_at[stream] = (epoch, now, moment)
        for holder in seen.holders:
            self._last_holder[holder.stream] = f"{holder.region}/{holder.instance}"
        timely = before is not None and moment - looked_at <= 2 * self._tick_seconds
        for stream, report in seen.reports.items():
            fresh = timely and before is not None and before.reports.get(stream) != report
            self._note_clock(report, now, fresh)
        return seen

    def _note_clock(self, report: StreamReport, now: float, fresh: bool) -> None:
        """How far our wall clock is ahead of the reporter's, at most: the smallest (first seen − written) of its reports.

        ``fresh``: it was written since our last look, a moment ago. Of any other one it is not known how old it is: its age
        would pass for a difference of clocks, and a loss for smaller than it is (``make simulate MARATHON=1 SEED=40``). It
        still tells when our clock is behind.
        """
        writer = f"{report.region}/{report.instance}"
        known = self._clock_ahead.get(writer)
        ahead = now - report.at
        if (fresh or ahead < 0) and (known is None or report.at != known[1]):
            self._clock_ahead[writer] = (ahead if known is None else min(ahead, known[0]), report.at)

    def gone_at(self) -> dict[str, float]:
        """When each stream's last holder had vanished, on that holder's own wall clock, rather too late than too early."""
        reports = self.seen.reports if self.seen else {}
        allowance = 2 * self._tick_seconds
        result = {}
        for stream, (_, at, _) in self._holder_gone_at.items():
            report = reports.get(stream)
            reporter = f"{report.region}/{report.instance}" if report else ""
            ahead = self._clock_ahead.get(self._last_holder.get(stream, reporter))
            result[stream] = at if ahead is None else at - ahead[0] + allowance
        return result

    def seen_gone(self, stream: str) -> tuple[int, float] | None:
        """(epoch, monotonic time) of a look at which nobody held the stream any more, nor any other that is without a holder:
        a region's agents may be lent the right of any of them."""
        if stream not in self._holder_gone_at:
            return None
        return self._holder_gone_at[stream][0], max(moment for _, _, moment in self._holder_gone_at.values())

    async def look_at_stores(self) -> None:
        """Heads of all stores, for people. An unknown keeps the time at which the head was last known."""
        for stream in self._streams:
            before = self.heads.get(stream, {})
            found = await read_heads(self._outside, stream)
            for region, head in found.items():
                known = before.get(region)
                if isinstance(head, Unknown) and isinstance(known, Unknown):
                    found[region] = Unknown(known.since, head.why)
            self.heads[stream] = found
