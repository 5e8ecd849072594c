"""Which records share a segment, and when it is closed.

*When*: at once when the stream is idle; otherwise ``flush_seconds`` after the one before, or as soon as the segment is full.
While the home store is still busy with earlier segments there is no hurry: a segment may then wait up to ``BUSY_FLUSHES``
times as long (``BUSY_SECONDS`` at most), so that under load segments grow instead of becoming many (each costs every region a
PUT and a head update).

*Which*: in the order in which they came, but for *large* records. Those go alone into a segment of their own, after the small
ones that wait, and only one at a time is on its way to the home store: a small record never waits for more than one of them.
Records of an agent stay in their order: what comes after a large one of the same agent waits behind it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from controller.domain.model import Frame
from controller.stream.proving import Proven
from controller.stream.receipt import Waiter

RECORD_BYTES = 256
"""More than a record's hash, numbers and lengths take in a segment and its index, names and meta not counted."""
BUSY_FLUSHES = 4
"""How many flush intervals a segment may wait while the home store has not committed the ones before."""
BUSY_SECONDS = 0.1
"""Such a wait goes no further than this: a long ``flush_seconds`` was chosen for its requests, not for four times its delay."""
LARGE_BYTES = 4 * 2**20
"""A record from this size on travels alone."""


def weight(frame: Frame) -> int:
    """Bytes that a frame takes in a segment, never too few: a record may be all header (``meta``) and no payload."""
    record = frame.record
    characters = 2 * (len(record.agent) + len(record.id)) + len(record.kind) + len(record.parent or "") + len(frame.base or "")
    if record.meta:
        characters += sum(len(key) + len(value) + 3 for key, value in record.meta.items())  # 3 stand for two lengths
    return len(frame.payload) + 4 * characters + RECORD_BYTES


@dataclass(slots=True, eq=False)
class Entry:
    """A record that was taken and is not in the view yet, so that a retry of it is recognised."""

    frame: Frame
    weight: int
    proven: Proven | None
    """Its body, decoded from this very frame. None: the view decodes it itself."""
    depth: int = 0
    """Deltas that stand on each other below this record, itself included."""
    waiters: list[Waiter] = field(default_factory=list)
    """Who waits for it, while it has no segment."""
    seq: int = 0
    """Its segment; 0 while it waits for one."""
    carried_at: float = 0.0
    """When retention wrote this old record again; 0 for a new one."""

    @property
    def since(self) -> float:
        """Since when it waits, by the holder's clock."""
        return self.carried_at or self.frame.record.received_at


@dataclass(slots=True)
class Queue:
    """Records that wait for a segment. ``bytes``: what they weigh together."""

    segment_max_bytes: int
    segment_max_records: int
    bytes: int = 0
    _small: deque[Entry] = field(default_factory=deque)
    _small_bytes: int = 0
    _behind: deque[Entry] = field(default_factory=deque)
    """Large records, and what came after them of the same agents."""
    _large_bytes: int = 0
    _agents_behind: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._small) + len(self._behind)

    def add(self, entry: Entry) -> None:
        """At the end."""
        self.bytes += entry.weight
        if entry.weight >= LARGE_BYTES:
            self._large_bytes += entry.weight
        agent = entry.frame.record.agent
        if entry.weight >= LARGE_BYTES or agent in self._agents_behind:
            self._behind.append(entry)
            self._agents_behind[agent] = self._agents_behind.get(agent, 0) + 1
        else:
            self._small.append(entry)
            self._small_bytes += entry.weight

    def lacks_room(self, weights: Sequence[int], bound: int) -> str | None:
        """Why records of these weights may not wait here, or None. Large records and small ones have a bound each, so that
        neither keeps the other out; one large record may always wait. Small ones behind a large one count as small."""
        large = sum(weight for weight in weights if weight >= LARGE_BYTES)
        small = sum(weights) - large
        for waiting, size in ((self.bytes - self._large_bytes, small), (self._large_bytes, large)):
            if waiting and size and waiting + size > bound:
                return f"{waiting} bytes wait for a segment and the bound is {bound}"
        return None

    def oldest(self) -> Entry | None:
        """Who has waited longest, or None."""
        first = [lane[0] for lane in (self._small, self._behind) if lane]
        return min(first, key=lambda entry: entry.since, default=None)

    def small_waits(self) -> bool:
        """Whether a segment of small records can be closed."""
        return bool(self._small)

    def full(self) -> bool:
        """Whether the next segment could not take more: nothing is gained by waiting. A large record that waits fills none."""
        return self._small_bytes >= self.segment_max_bytes or len(self._small) >= self.segment_max_records

    def take(self, *, large: bool) -> list[Entry]:
        """The records of the next segment. ``large``: one large record may go now. Empty when nothing may."""
        if self._small:
            return self._fill()
        if not self._behind or not large:
            return []
        first = self._next_behind()
        if first.weight < LARGE_BYTES:  # it only had to keep its agent's order
            self._small.appendleft(first)
            self._small_bytes += first.weight
            return self._fill()
        self.bytes -= first.weight
        self._large_bytes -= first.weight
        return [first]

    def _next_behind(self) -> Entry:
        entry = self._behind.popleft()
        agent = entry.frame.record.agent
        if self._agents_behind[agent] == 1:
            del self._agents_behind[agent]
        else:
            self._agents_behind[agent] -= 1
        return entry

    def _fill(self) -> list[Entry]:
        taken: list[Entry] = []
        size = 0
        while self._small and len(taken) < self.segment_max_records:
            size += self._small[0].weight
            if taken and size > self.segment_max_bytes:
                break
            taken.append(self._small.popleft())
        left = sum(entry.weight for entry in taken)
        self._small_bytes -= left
        self.bytes -= left
        return taken

    def clear(self) -> list[Entry]:
        """Everything that waited."""
        left = [*self._small, *self._behind]
        self._small.clear()
        self._behind.clear()
        self._agents_behind.clear()
        self.bytes = self._small_bytes = self._large_bytes = 0
        return left
