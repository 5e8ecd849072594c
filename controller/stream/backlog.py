"""How much each store lacks: when segments were received, counted so that lag and exposure can be told at any time.

Kept one by one for the newest segments; older neighbours are merged and keep the *older* time, so that a lag is never told
smaller than it is and the memory is bounded however long a region is away.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace

BACKLOG_MARKS = 4096
"""Segments whose receipt times are kept one by one; beyond it neighbours are merged, keeping the older time."""


@dataclass(slots=True)
class Mark:
    """Cumulative counts at the end of a segment, and when its first record came."""

    seq: int
    received_at: float
    records: int
    bytes: int


class Marks:
    """The marks of the segments that this writer closed, ascending, and how far records may have been acknowledged."""

    def __init__(self, start: Mark) -> None:
        self.acknowledged = start
        """Last segment of which records may have been acknowledged, with cumulative counts."""
        self._marks: list[Mark] = []

    def __len__(self) -> int:
        return len(self._marks)

    def add(self, mark: Mark) -> None:
        """Remembers the segment that was just closed."""
        self._marks.append(mark)
        if len(self._marks) > 2 * BACKLOG_MARKS:
            head, tail = self._marks[:BACKLOG_MARKS], self._marks[BACKLOG_MARKS:]
            merged = [
                replace(second, received_at=first.received_at) for first, second in zip(head[::2], head[1::2], strict=True)
            ]
            self._marks = merged + tail

    def advance(self, acknowledged: Callable[[int], bool]) -> None:
        """Moves ``acknowledged`` over the segments of which it says that they may be."""
        first = bisect.bisect_right(self._marks, self.acknowledged.seq, key=lambda mark: mark.seq)
        for mark in self._marks[first:]:
            if not acknowledged(mark.seq):
                return
            self.acknowledged = mark

    def received_after(self, seq: int) -> float:
        """When the oldest record above segment ``seq`` was received, never later than it was."""
        first = bisect.bisect_right(self._marks, seq, key=lambda mark: mark.seq)
        return self._marks[first].received_at if first < len(self._marks) else self.acknowledged.received_at
