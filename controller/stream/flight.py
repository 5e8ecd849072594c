"""What is on its way to one store: objects, many at a time, and at most one head update behind them.

Payload first, pointer second, and both without a pause: an object is put as soon as its segment is closed, and each head update
takes all that have arrived without a gap since the one before. So the way to a region costs a segment's time and not the rate:
with an answer after r seconds, ``depth`` / r segments a second, however long a head update takes. (It was ``depth`` in two
answers, because the next objects waited for the head: 80 ms away that is less than a stream closes, and the region fell behind
for as long as the load lasted.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from controller.domain.model import Commit, EpochStart, Fence, Head
from controller.errors import DrError
from controller.ports import RegionStore
from controller.stream.log import Built, Log

BYTES = 32 * 2**20
"""Bodies that are being put in one region, in bytes; one that is larger goes alone. More at a time would only share the line, and
each would come closer to its deadline."""
ARRIVED_FACTOR = 4
"""Objects that are put or being put and that no head names yet: this many times the depth at most."""


class Flight:
    """Of one pump, while its store is attached. ``wake`` is set whenever something of it has come to an end."""

    def __init__(self, store: RegionStore, fence: Fence, depth: int, wake: asyncio.Event) -> None:
        self._store = store
        self._fence = fence
        self._depth = depth
        self._wake = wake
        self._puts: dict[int, tuple[Built, asyncio.Task[None]]] = {}
        """By seq, ascending without gaps: what the head update under way does not cover."""
        self._commit: asyncio.Task[Head] | None = None
        self._committing = 0

    def load(self, log: Log, head: Head, last: int) -> None:
        """Begins to put what follows, while there is room and ``log`` has it."""
        putting = [built.size for built, task in self._puts.values() if not task.done()]
        count, size = len(putting), sum(putting)
        seq = head.seq + self._committing + len(self._puts) + 1
        while seq <= last and count < self._depth and seq - head.seq <= ARRIVED_FACTOR * self._depth and not self._failed():
            built = log.get(seq)
            if built is None or (count and size + built.size > BYTES):
                return
            task = asyncio.create_task(self._store.put_segment(self._fence, built.ref, built.data))
            task.add_done_callback(self._ended)
            self._puts[seq] = built, task
            count, size, seq = count + 1, size + built.size, seq + 1

    def commit(self, head: Head, starts: Sequence[EpochStart]) -> None:
        """Begins the head update for what has arrived, unless one is under way. Raises what the put of the next one raised."""
        if self._commit is not None:
            return
        arrived: list[Built] = []
        for built, task in self._puts.values():
            if not task.done() or (arrived and task.exception() is not None):
                break
            task.result()
            arrived.append(built)
        if not arrived:
            return
        last = arrived[-1]
        commit = Commit(
            prev_seq=head.seq,
            prev_chain=head.chain,
            seq=last.ref.seq,
            chain=last.chain,
            starts=tuple(start for start in starts if head.seq < start.first_seq <= last.ref.seq),
            received_at=last.last_received_at,
            records=sum(built.records for built in arrived),
            bytes=sum(built.size for built in arrived),
        )
        for built in arrived:
            del self._puts[built.ref.seq]
        self._committing = len(arrived)
        self._commit = asyncio.create_task(self._store.advance(self._fence, commit))
        self._commit.add_done_callback(self._ended)

    def landed(self) -> Head | None:
        """The head after an update that has come to an end; None when none has. Raises what it raised."""
        if self._commit is None or not self._commit.done():
            return None
        head = self._commit.result()
        self._commit, self._committing = None, 0
        return head

    def empty(self) -> bool:
        """Whether nothing is on its way."""
        return not self._puts and self._commit is None

    async def end(self) -> None:
        """Gives up what is on its way. Objects that arrive nevertheless are what would be put again."""
        tasks: list[asyncio.Task[None] | asyncio.Task[Head]] = [task for _, task in self._puts.values()]
        if self._commit is not None:
            tasks.append(self._commit)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _failed(self) -> bool:
        """Nothing more is begun behind one that failed."""
        return any(task.done() and task.exception() is not None for _, task in self._puts.values())

    def _ended(self, task: asyncio.Task[None] | asyncio.Task[Head]) -> None:
        del task
        self._wake.set()
