"""What is on its way to one store: objects, many at a time, and at most one head update behind them.

Payload first, pointer second, and both without a pause: an object is put as soon as its segment is closed, and each head update
takes all that have arrived without a gap since the one before. So the way to a region costs a segment's time and not the rate:
with an answer after r seconds, ``depth`` / r segments a second, however long a head update takes. (It was ``depth`` in two
answers, because the next objects waited for the head: 80 ms away that is less than a stream closes, and the region fell behind
for as long as the load lasted.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from controller.domain import replication
from controller.domain.model import Commit, EpochStart, Fence, Head, SegmentRef
from controller.errors import Corrupt
from controller.ports import RegionStore
from controller.stream.history import read_segment, received
from controller.stream.log import Built, Log
from controller.stream.segment import next_chain

BYTES = 32 * 2**20
"""Bodies that are being put in one region, in bytes; one that is larger goes alone. More at a time would only share the line,
and each would come closer to its deadline."""
ARRIVED_FACTOR = 4
"""Objects that are put or being put and that no head names yet: this many times the depth at most."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Segments that are no longer in memory, from the home store, which has them up to ``last``."""

    source: RegionStore
    stream: str
    starts: tuple[EpochStart, ...]
    last: int
    chain_at: Callable[[int], str | None]
    """Our chain hash after a segment, where it is known."""

    async def read(self, seq: int) -> Built:
        """Raises NotFound, Unavailable, Corrupt (also when it is no segment of our history: that is put nowhere)."""
        ref = SegmentRef(self.stream, seq, replication.owner(self.starts, seq))
        segment, data = await read_segment(self.source, ref)
        before, stamps = segment.header.prev_chain, received([segment])
        chain = next_chain(before, data)
        if (self.chain_at(seq) or chain) != chain:
            raise Corrupt(f"{ref.key} in {self.source.region} is not of our history", hint=f"drctl verify {self.source.region}")
        return Built(
            ref,
            before,
            chain,
            len(data),
            len(segment.frames),
            min(stamps, default=0.0),
            max(stamps, default=0.0),
            None,
            data,
            (),
        )


class Flight:
    """Of one pump, while its store is attached. ``wake`` is set whenever something of it has come to an end."""

    def __init__(self, store: RegionStore, fence: Fence, depth: int, wake: asyncio.Event) -> None:
        self._store = store
        self._fence = fence
        self._depth = depth
        self._wake = wake
        self._puts: dict[int, asyncio.Task[Built]] = {}
        """By seq, ascending without gaps: what the head update under way does not cover."""
        self._sizes: dict[int, int] = {}
        """Of what is being put. Of a copy, whose size is not known before it was read: the size of the last one."""
        self._copied_size = 0
        self._commit: asyncio.Task[Head] | None = None
        self._committing = 0

    def load(self, head: Head, last: int, log: Log, copy: Copy | None) -> None:
        """Begins to put what follows, up to ``last``, while there is room: from ``log``, or else by ``copy``."""
        count, size = len(self._sizes), sum(self._sizes.values())
        seq = head.seq + self._committing + len(self._puts) + 1
        while seq <= last and count < self._depth and seq - head.seq <= ARRIVED_FACTOR * self._depth and not self._failed():
            built = log.get(seq)
            if built is None and (copy is None or seq > copy.last):
                return
            more = self._copied_size if built is None else built.size
            if count and size + more > BYTES:
                return
            task = asyncio.create_task(self._put(built) if built is not None else self._copy(copy, seq))
            task.add_done_callback(lambda _, seq=seq: self._ended(seq))  # type: ignore[misc]
            self._puts[seq], self._sizes[seq] = task, more
            count, size, seq = count + 1, size + more, seq + 1

    async def _put(self, built: Built) -> Built:
        await self._store.put_segment(self._fence, built.ref, built.data)
        return built

    async def _copy(self, copy: Copy | None, seq: int) -> Built:
        assert copy is not None
        built = await copy.read(seq)
        self._copied_size = self._sizes[seq] = built.size
        await self._put(built)
        return replace(built, data=b"")  # nobody else keeps it in memory

    def commit(self, head: Head, starts: Sequence[EpochStart]) -> None:
        """Begins the head update for what has arrived, unless one is under way. Raises what came of the next one; Corrupt when
        it does not follow."""
        if self._commit is not None:
            return
        arrived: list[Built] = []
        for task in self._puts.values():
            if not task.done() or (arrived and task.exception() is not None):
                break
            built = task.result()
            if built.prev_chain != (arrived[-1].chain if arrived else head.chain):
                raise other_history(self._store.region, built.ref.seq - 1)
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
            received_at=max((built.last_received_at for built in arrived if built.last_received_at), default=head.received_at),
            records=sum(built.records for built in arrived),
            bytes=sum(built.size for built in arrived),
        )
        for built in arrived:
            del self._puts[built.ref.seq]
        self._committing = len(arrived)
        self._commit = asyncio.create_task(self._store.advance(self._fence, commit))
        self._commit.add_done_callback(lambda _: self._wake.set())

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
        tasks: list[asyncio.Task[Built] | asyncio.Task[Head]] = [*self._puts.values()]
        if self._commit is not None:
            tasks.append(self._commit)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _failed(self) -> bool:
        """Nothing more is begun behind one that failed."""
        return any(task.done() and task.exception() is not None for task in self._puts.values())

    def _ended(self, seq: int) -> None:
        self._sizes.pop(seq, None)
        self._wake.set()


def other_history(region: str, seq: int) -> Corrupt:
    """The store's chain is not ours."""
    return Corrupt(f"the store of {region} holds another history than ours at segment {seq}", hint=f"drctl verify {region}")
