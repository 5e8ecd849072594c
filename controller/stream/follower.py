"""A standby's loop body: read, verify and index what is new in its own region's store.

One ``step`` is one bounded round: read the head, make sure that what is indexed is still part of the store's history (rewind
where a realignment cut it), read the next segments, verify each (checksum, place, chain, every body) and index it. Nothing
is ever skipped: a segment that does not verify stops the copy there, with an error that names it, until it is repaired.

How a diverged copy finds the last segment that it shares with the store: equal epochs at a seq mean an equal history up to
it (log matching), so whole runs are compared from the head's ``epochs`` without a read; where that is not enough (a chain
that differs under equal epochs) the chain hash, which covers everything before it, allows a binary search. A store whose own
segments contradict each other is told apart from a copy that diverged: it is Corrupt, and the copy stays as it is.
"""

from __future__ import annotations

import asyncio
from collections import deque

from controller.domain.model import Frame, Head, NamedSnapshot, Position, SegmentRef, SnapshotRef
from controller.errors import Conflict, Corrupt, NotFound
from controller.ports import Clock, RegionStore
from controller.stream.indexing import ColdBase
from controller.stream.proving import INLINE_BYTES, prove
from controller.stream.reader import CONCURRENCY, warm, warm_bases
from controller.stream.segment import Segment, decode_segment, next_chain
from controller.stream.snapshot import load_snapshot, open_snapshot
from controller.stream.view import View

SNAPSHOT_SEGMENTS = 256
"""A snapshot is worth its load when it saves an empty view reading at least so many segments."""
FAR_SEGMENTS = 20_000
"""The same for a view that has something: it would have to prove again what it has proven."""
FORGET_RECORDS = 5000
"""Records that one step forgets at most when the base has moved: about 50 ms."""
_REPAIR = "repair this region's copy of it from another region's store; the standby stays at the segment before"


class Follower:
    """Follows one stream of one region's store into a view."""

    def __init__(self, store: RegionStore, view: View, stream: str, clock: Clock, group: str) -> None:
        self._store = store
        self._view = view
        self._stream = stream
        self._clock = clock
        self._group = group
        self._cold = True
        self._unproven = view.awaits_proof(stream)
        self._refused: set[NamedSnapshot] = set()
        self._one = asyncio.Lock()
        self.said = ""
        """Which snapshots were refused, and why: for people."""
        self.suspended = False
        """Set while this instance writes the stream itself."""

    async def step(self, budget: int = 64, *, forced: bool = False) -> Position:
        """Indexes at most ``budget`` segments. Returns where the copy stands then. Raises Unavailable (the store does not
        answer; what was indexed stays indexed) and Corrupt naming the segment (the position stays before it).

        One step at a time. While ``suspended`` only a ``forced`` step does anything: the view belongs to a writer, or to who
        is about to become one, and a step that was under way must not index what it read before."""
        async with self._one:
            if self.suspended and not forced:
                return self.position()
            head = await self._store.read_head(self._stream)
            try:
                await self._align(head)
                await self._read(head, budget)
                if self._view.position(self._stream)[0] == head.seq:
                    self._view.forget(self._stream, head.base, head.base_chain, FORGET_RECORDS)
            except Conflict:
                pass  # somebody else moved the view meanwhile (this instance became active): the next round reads it anew
            if self._view.awakened:
                self._view.awakened = False
                self._cold = self._unproven = True
            if self._cold:
                self._cold = await warm(self._view, self._store, budget)
                self._unproven = self._unproven and (self._cold or self._view.awaits_proof(self._stream))
            return self.position()

    def position(self) -> Position:
        """Up to where the copy is proven now. One that came from a snapshot is not, until the newest bodies were read back."""
        seq, chain = self._view.floor(self._stream) if self._unproven else self._view.position(self._stream)
        return Position(seq, chain, self._view.epoch_at(self._stream, seq) or 0, self._clock.wall())

    # ------------------------------------------------------------------------------------------ is it still one history

    async def _align(self, head: Head) -> None:
        """Rewinds or resets the copy so that it is a prefix of the head's history, as far as the head alone tells."""
        seq, _ = self._view.position(self._stream)
        last_epoch = self._view.epoch_at(self._stream, seq) or 0
        if head.epoch < last_epoch:
            raise Corrupt(
                f"the head of stream {self._stream} in {self._store.region} is at epoch {head.epoch}, this copy has read epoch "
                f"{last_epoch} there: the table was lost, restored or replaced",
                hint="run `drctl recover`; if the group was created anew on purpose, delete this instance's view",
            )
        lowest = max(head.base - 1, self._view.floor(self._stream)[0])
        anew = not lowest <= seq or lowest > head.seq or self._base_differs(head)
        empty = anew or seq == self._view.floor(self._stream)[0]
        if await self._from_snapshot(head, (head.base - 1 if anew else seq) + (SNAPSHOT_SEGMENTS if empty else FAR_SEGMENTS)):
            return
        if anew:
            self._reset(head)
            return
        agreed = self._by_epochs(head, lowest, min(seq, head.seq))
        if agreed == head.seq and self._view.chain_at(self._stream, agreed) != head.chain:
            agreed = await self._by_chain(head, agreed)
        self._rewind(agreed)

    def _base_differs(self, head: Head) -> bool:
        """Whether the chain where the store's history begins is another than ours there. What we lack proves nothing."""
        ours = self._view.chain_at(self._stream, head.base - 1)
        return ours is not None and ours != head.base_chain

    def _by_epochs(self, head: Head, lowest: int, highest: int) -> int:
        """The last seq in ``lowest … highest`` at which copy and head name the same epoch."""
        for seq, epoch in self._view.epochs_down(self._stream, highest):
            if seq <= lowest:
                break
            if _owner(head, seq) in {epoch, None}:
                return seq
        return lowest

    async def _by_chain(self, head: Head, differs: int) -> int:
        """The last seq at which the chain hashes agree, given one at which they differ. Raises Corrupt when the store
        contradicts itself. Resets (and returns where it begins then) when nothing is left in common."""
        low = max(head.base - 1, self._view.floor(self._stream)[0])
        if low != head.base - 1 and (low >= differs or not await self._agrees(head, low)):
            self._reset(head)
            return head.base - 1
        if low >= differs:
            raise Corrupt(
                f"{_ref(head, low + 1).key} in {self._store.region} does not follow chain {head.base_chain}, with which "
                f"the head says that its history begins",
                hint=_REPAIR,
            )
        high = differs
        while high - low > 1:
            middle = (low + high) // 2
            if await self._agrees(head, middle):
                low = middle
            else:
                high = middle
        await self._check_contradiction(head, low + 1)
        return low

    async def _agrees(self, head: Head, seq: int) -> bool:
        theirs = head.chain if seq == head.seq else (await self._fetch(head, seq + 1))[0].header.prev_chain
        return theirs == self._view.chain_at(self._stream, seq)

    async def _check_contradiction(self, head: Head, seq: int) -> None:
        """``seq`` is the first at which our chain is not what the store says. If the store's own segment gives our chain, then
        what follows it in the store (the next segment, or the head) does not fit: rewinding would never end."""
        segment, data = await self._fetch(head, seq)
        if next_chain(segment.header.prev_chain, data) == self._view.chain_at(self._stream, seq):
            what = f"the head at {head.seq}" if seq == head.seq else _ref(head, seq + 1).key
            raise Corrupt(f"{what} in {self._store.region} does not follow {_ref(head, seq).key}", hint=_REPAIR)

    async def _from_snapshot(self, head: Head, least: int) -> bool:
        """Begins anew from the newest good snapshot that the head names, unless it was made before segment ``least``. One that
        is damaged, foreign or of another history is refused for good, and an older one is tried."""
        for named in reversed(head.snapshots):
            if named.seq < least:
                return False
            if named in self._refused or named.seq > head.seq:
                continue
            try:
                data = await self._store.get_snapshot(SnapshotRef(self._stream, named.seq, named.epoch))
                snapshot = await asyncio.to_thread(open_snapshot, data, named, self._group, self._stream)
                theirs = head.chain if named.seq == head.seq else (await self._fetch(head, named.seq + 1))[0].header.prev_chain
                if theirs != named.chain:
                    raise Corrupt("it is of another history than the segments", hint=_REPAIR)
                await load_snapshot(self._view, snapshot)
            except (Corrupt, NotFound) as error:
                self._refused.add(named)
                self.said = f"the snapshot at segment {named.seq} in {self._store.region} is not used: {error.message}"
                continue
            self._cold = self._unproven = True
            return True
        return False

    def _rewind(self, seq: int) -> None:
        if seq < self._view.position(self._stream)[0]:
            self._view.rewind(self._stream, seq)
            self._cold = True

    def _reset(self, head: Head) -> None:
        self._view.reset(self._stream, head.base - 1, head.base_chain)
        self._cold, self._unproven = True, False

    # ------------------------------------------------------------------------------------------------- new segments

    async def _read(self, head: Head, budget: int) -> None:
        seq, chain = self._view.position(self._stream)
        wanted = deque(range(seq + 1, min(head.seq, seq + budget) + 1))
        fetches: deque[asyncio.Task[tuple[Segment, bytes]]] = deque()
        try:
            while wanted or fetches:
                while wanted and len(fetches) < CONCURRENCY:
                    fetches.append(asyncio.ensure_future(self._fetch(head, wanted.popleft())))
                try:
                    segment, data = await fetches[0]
                except NotFound as error:
                    await self._explain_absence(head, seq + 1, error)
                    return
                fetches.popleft()
                if segment.header.prev_chain != chain:
                    self._rewind(await self._by_chain(head, seq))
                    return
                seq, chain = seq + 1, next_chain(chain, data)
                if seq == head.seq and chain != head.chain:
                    raise Corrupt(
                        f"{_ref(head, seq).key} in {self._store.region} gives chain {chain}, the head says {head.chain}",
                        hint=_REPAIR,
                    )
                await self._index(_ref(head, seq), segment, chain, len(data))
        finally:
            for fetch in fetches:
                fetch.cancel()
            await asyncio.gather(*fetches, return_exceptions=True)

    async def _fetch(self, head: Head, seq: int) -> tuple[Segment, bytes]:
        """A segment of the head's history, checksum and place verified. Raises NotFound, Unavailable, Corrupt naming it."""
        ref = _ref(head, seq)
        try:
            data = await self._store.get_segment(ref)
            segment = decode_segment(data) if len(data) <= INLINE_BYTES else await asyncio.to_thread(decode_segment, data)
        except Corrupt as error:
            raise Corrupt(f"{ref.key} in {self._store.region}: {error.message}", hint=_REPAIR) from error
        header = segment.header
        said = (header.group, header.stream, header.seq, header.epoch)
        if said != (self._group, self._stream, seq, ref.epoch):
            raise Corrupt(
                f"{ref.key} in {self._store.region} says that its group, stream, seq and epoch are {said!a}, the group is "
                f"{self._group!a}",
                hint=_REPAIR,
            )
        return segment, data

    async def _explain_absence(self, head: Head, seq: int, error: NotFound) -> None:
        """The head may have moved since it was read (retention, realignment). If it has not, a committed segment is gone."""
        now = await self._store.read_head(self._stream)
        if now.base <= seq <= now.seq and _owner(now, seq) == _owner(head, seq):
            raise Corrupt(
                f"{_ref(head, seq).key} is committed in {self._store.region} and is not there", hint=_REPAIR
            ) from error

    async def _index(self, ref: SegmentRef, segment: Segment, chain: str, size: int) -> None:
        try:
            known = await prove(segment.frames, self._base)
            proven = [known.get(number) for number in range(len(segment.frames))] if known else None
            try:
                self._view.apply(segment, chain, ref, size, proven)
            except ColdBase:
                await warm_bases(self._view, self._store, segment)
                self._view.apply(segment, chain, ref, size, proven)
        except Corrupt as error:
            raise Corrupt(f"{ref.key} in {self._store.region}: {error.message}", hint=error.hint) from error
        await asyncio.sleep(0)  # a long tail of segments must not keep the lease keeper waiting

    def _base(self, frame: Frame) -> bytes | None:
        """The base of a delta, as far as it is warm."""
        found = None if frame.base is None else self._view.read(frame.record.agent, frame.base)
        return None if found is None else found[1]


def _owner(head: Head, seq: int) -> int | None:
    """Epoch of segment ``seq`` by this head; None when the head does not say."""
    try:
        return head.owner(seq)
    except LookupError:
        return None


def _ref(head: Head, seq: int) -> SegmentRef:
    epoch = _owner(head, seq)
    if epoch is None:
        raise Corrupt(f"the head of stream {head.stream} names no epoch for its segment {seq}", hint="run `drctl verify`")
    return SegmentRef(head.stream, seq, epoch)
