"""Closed segments that some store does not have yet: what pumps ship, in memory, bounded.

Under pressure the log drops what the home store has: a region that was away for long gets it from there. What the home store
lacks cannot be dropped; then the log is *full* and the writer takes nothing more until it shrinks.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from controller.domain.model import AgentTail, Kind, SegmentRef
from controller.stream.limits import ORIGIN
from controller.stream.segment import Segment

LOG_SEGMENTS = 4096
"""Segments that are kept in memory for slow regions; older ones are read back from the home store."""


@dataclass(slots=True)
class Built:
    """A closed segment. ``segment`` is let go of once the view has it; ``tails`` stay: (agent, id, received_at) of agents'
    records, for the list of those that one store has."""

    ref: SegmentRef
    prev_chain: str
    chain: str
    size: int
    records: int
    first_received_at: float
    last_received_at: float
    segment: Segment | None
    data: bytes
    tails: tuple[tuple[str, str, float], ...]


class Log:
    """Segments by sequence number, ascending and without gaps. ``max_bytes`` counts their bytes as shipped."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._built: OrderedDict[int, Built] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._built)

    def add(self, built: Built) -> None:
        self._built[built.ref.seq] = built
        self.bytes += built.size

    def get(self, seq: int) -> Built | None:
        """None when it was dropped or never here."""
        return self._built.get(seq)

    def full(self) -> str | None:
        """Why nothing more can be taken, or None."""
        if self.bytes > 2 * self._max_bytes:
            return f"{self.bytes} bytes wait to be written and the bound is {2 * self._max_bytes}"
        if len(self._built) > 2 * LOG_SEGMENTS:
            return f"{len(self._built)} segments wait to be written and the bound is {2 * LOG_SEGMENTS}"
        return None

    def shed(self, safe: int) -> None:
        """Drops segments up to ``safe`` (the home store and the view have them), oldest first, while there are too many."""
        while self._built and (self.bytes > self._max_bytes or len(self._built) > LOG_SEGMENTS):
            seq = next(iter(self._built))
            if seq > safe:
                return
            self.bytes -= self._built.pop(seq).size

    def forget(self, upto: int) -> None:
        """Drops what every store and the view have."""
        while self._built:
            seq = next(iter(self._built))
            if seq > upto:
                return
            self.bytes -= self._built.pop(seq).size

    def batch(self, first: int, last: int, depth: int) -> list[Built]:
        """At most ``depth`` segments ``first … last`` for one commit, as far as they are here."""
        found: list[Built] = []
        for seq in range(first, min(last, first + depth - 1) + 1):
            built = self._built.get(seq)
            if built is None:
                break
            found.append(built)
        return found

    def unreplicated(self, first: int, last: int, limit: int) -> tuple[AgentTail, ...]:
        """Agents with records in ``first … last``, worst first."""
        tails: dict[str, AgentTail] = {}
        for seq in range(first, last + 1):
            built = self._built.get(seq)
            for agent, record_id, received_at in built.tails if built is not None else ():
                known = tails.get(agent)
                tails[agent] = AgentTail(agent, known.records + 1 if known else 1, record_id, received_at)
        return tuple(sorted(tails.values(), key=lambda tail: (-tail.records, tail.agent))[:limit])


def tails_of(segment: Segment) -> tuple[tuple[str, str, float], ...]:
    """What ``unreplicated`` names: agents' new records, not the controllers' own and not what retention wrote again."""
    return tuple(
        (frame.record.agent, frame.record.id, frame.record.received_at)
        for frame in segment.frames
        if frame.record.kind not in (Kind.CANARY, Kind.OPENING) and ORIGIN not in frame.record.meta
    )
