"""Walks one stream of one region's store from its base to its head and finds everything that is wrong with it.

Each segment is read again: checksum, place, chain, index, every body's hash. The walk never stops at damage. Where a segment
is missing, unreadable or not what the chain says, the *chain* tells what belongs there: the next sound segment (or the head)
names the hash of everything before it. Another region's copy whose bytes lead from the hash before to the hash after is
proven to be the right one, is used to go on, and is named as the source of a repair. Where nobody has such bytes the gap is
stepped over.

Memory: two segments at a time. Pace: after each segment everything else has its turn; while the loop is busy, the pause is half
of the time that the segment took. All in ``proof.ProofView``, so an
interrupted walk goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from controller.domain.model import Head, SegmentRef
from controller.errors import Corrupt, DrError, NotFound, Unavailable
from controller.ports import Clock, RegionStore
from controller.stream.damage import Damage, compare, survey
from controller.stream.indexing import ColdBase
from controller.stream.proof import Problem, ProofView
from controller.stream.reader import read_record
from controller.stream.salvage import sound
from controller.stream.segment import Segment, decode_segment, next_chain

PAUSE_SHARE = 0.5
"""Pause after a segment while the controller has other things to do, as a share of the time that the segment took."""
BUSY_SECONDS = 0.002
"""An event loop with nothing else to do comes back sooner."""
HELD = 3
"""Objects of a damaged run that are held in memory; longer runs are read again."""
MAX_DOUBTED = 3
"""Sound segments behind a damaged run whose own word is doubted, one after the other."""
MAX_MOVED = 20
"""Times that the head may move under the walk before it gets any further: the verification is interrupted then."""
LISTED = 5
"""Records that a problem names in its detail."""

Names = Callable[[SegmentRef], Sequence[tuple[str, str]]]
"""(agent, id) of the records that a view has in a segment."""


class Moved(Exception):
    """The head changed under the walk (retention, a realignment): look at it again."""


@dataclass(frozen=True, slots=True)
class Look:
    """One segment of the store under verification. ``segment`` None: ``why`` says what is wrong with it."""

    ref: SegmentRef
    data: bytes | None
    segment: Segment | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Copy:
    """A sound segment of some region; nothing says yet that it belongs here."""

    data: bytes
    prev_chain: str


@dataclass(frozen=True, slots=True)
class Proven:
    """Bytes that the chain proves, and whose they are ("" = of the store itself)."""

    data: bytes
    source: str


class Walk:
    """One stream of one store. ``others``: the other regions' stores. ``names``: what the local view knows of a segment."""

    def __init__(
        self,
        store: RegionStore,
        others: Mapping[str, RegionStore],
        proof: ProofView,
        stream: str,
        group: str,
        clock: Clock,
        names: Names = lambda _ref: (),
    ) -> None:
        self._store = store
        self._others = others
        self._proof = proof
        self._stream = stream
        self._group = group
        self._clock = clock
        self._names = names
        self._next: Look | None = None
        self._ask: Callable[[], Awaitable[Head]] = lambda: store.read_head(stream)

    async def run(
        self,
        ask: Callable[[], Awaitable[Head]],
        tell: Callable[[int, int], None] = lambda _seq, _goal: None,
        *,
        further: bool = False,
    ) -> Head:
        """To the end of the head that ``ask`` gives, which is asked for again when it moved meanwhile. Returns it. ``further``:
        goes on from where this verification was, and keeps what it noted of other things than segments. Raises Unavailable
        (go on later; also when the head moves again and again), Corrupt when it cannot be walked along."""
        self._ask = ask
        furthest, moved = -1, 0
        while moved <= MAX_MOVED:
            head = await ask()
            self._next = None
            try:
                self._align(head, further)
                seq, _ = self._proof.position(self._stream)
                while seq < head.seq:
                    began = self._clock.monotonic()
                    seq = await self._step(head, seq + 1)
                    if seq > furthest:
                        furthest, moved = seq, 0
                    tell(seq, head.seq)
                    await self._give_way(self._clock.monotonic() - began)
                return head
            except Moved:
                moved += 1
        raise Unavailable(
            f"the head of stream {self._stream} in {self._store.region} moved {moved} times and the walk got no further than "
            f"segment {max(furthest, 0):,}"
        )

    async def _give_way(self, took_seconds: float) -> None:
        """Lets everything else that is ready run once. When that takes a moment, others have work to do: then a pause, too."""
        before = self._clock.monotonic()
        await self._clock.sleep(0)
        if self._clock.monotonic() - before > BUSY_SECONDS:
            await self._clock.sleep(PAUSE_SHARE * took_seconds)

    def _align(self, head: Head, further: bool) -> None:
        """Goes on where the last walk stood, as far as that still is this history."""
        seq, _ = self._proof.position(self._stream)
        floor, floor_chain = self._proof.floor(self._stream)
        fresh = seq < head.base - 1 or floor > head.base - 1
        if floor == head.base - 1 and floor_chain != head.base_chain:
            fresh = True
        if fresh or (seq == 0 and self._proof.count(self._stream) == 0):
            self._proof.reset(self._stream, head.base - 1, head.base_chain)
            self._proof.forget_problems(self._stream, 0)
            return
        keep = min(seq, head.seq)
        while keep > max(floor, head.base - 1) and self._proof.epoch_at(self._stream, keep) != _owner(head, keep):
            keep -= 1
        if keep < seq:
            self._proof.rewind(self._stream, keep)
        self._proof.forget_problems(self._stream, keep + 1, also_seq_0=not further)

    # ---------------------------------------------------------------------------------------------------- one segment

    async def _step(self, head: Head, seq: int) -> int:
        """Walks over segment ``seq``, or over a run of damaged ones. Returns the last one."""
        _, chain = self._proof.position(self._stream)
        look = await self._look(head, seq)
        if look.segment is None or look.segment.header.prev_chain != chain:
            return await self._damaged(head, look, chain)
        assert look.data is not None
        after = next_chain(chain, look.data)
        wanted = await self._said_after(head, seq)
        if wanted is not None and wanted != after:
            # This segment or what names its hash is wrong. Bytes of another region that fit both sides say that it is this one.
            right = await self._others_copy(head, seq, chain, wanted)
            if right is not None:
                await self._report(look, right, "it is sound by itself and not what the chain says")
                await self._apply(look.ref, right.data, chain, right.source)
                return seq
        await self._apply(look.ref, look.data, chain, "", look.segment)
        return seq

    async def _look(self, head: Head, seq: int) -> Look:
        if self._next is not None and self._next.ref.seq == seq:
            found, self._next = self._next, None
            return found
        epoch = _owner(head, seq)
        if epoch is None:
            raise Corrupt(
                f"the head of stream {self._stream} in {self._store.region} names no epoch for its segment {seq}",
                hint=f"drctl repair {self._store.region}",
            )
        ref = SegmentRef(self._stream, seq, epoch)
        why = ""
        try:
            data: bytes | None = await self._store.get_segment(ref)
        except NotFound as error:
            await self._still(head, seq)
            data, why = None, error.message
        except Corrupt as error:
            data, why = (await self._store.inspect_object(ref)).data, error.message
        segment = None
        if data is not None and not why:
            segment, why = await asyncio.to_thread(self._decode, ref, data)
        return Look(ref, data, segment, why)

    def _decode(self, ref: SegmentRef, data: bytes) -> tuple[Segment | None, str]:
        try:
            return sound(data, ref, self._group), ""
        except Corrupt as error:
            return None, error.message

    async def _still(self, head: Head, seq: int) -> None:
        """A segment is absent. Raises Moved when the head does not ask for it any more."""
        now = await self._ask()
        if seq < now.base or seq > now.seq or _owner(now, seq) != _owner(head, seq):
            raise Moved

    async def _said_after(self, head: Head, seq: int) -> str | None:
        """The chain hash after ``seq`` by what follows it; None when that is damaged."""
        if seq == head.seq:
            return head.chain
        self._next = await self._look(head, seq + 1)
        return None if self._next.segment is None else self._next.segment.header.prev_chain

    # ----------------------------------------------------------------------------------------------------- a damaged run

    async def _damaged(self, head: Head, first: Look, chain: str) -> int:
        """``first`` and what follows it up to the next segment whose own word can be taken. Returns the last of the run."""
        looks = [first]
        trusted: tuple[int, str] | None = None
        """Length of the run by the first sound segment behind it, and what that says of the chain there."""
        while True:
            seq = looks[-1].ref.seq
            closing = await self._said_after(head, seq)
            if closing is not None:
                trusted = trusted or (len(looks), closing)
                sources, begins = await self._prove(head, [look.ref for look in looks], closing)
                if sources and (len(sources) < len(looks) or begins == chain):
                    gap = len(looks) - len(sources)
                    if gap:
                        await self._give_up(looks[:gap], begins)
                    await self._walk_over(looks[gap:], sources, begins)
                    return seq
                # Others have bytes that follow, and the sound segment behind the run contradicts them: it may be the wrong one.
                doubtful = await self._follows(looks[-1].ref, chain if len(looks) == 1 else None)
                if not doubtful or seq == head.seq or len(looks) >= trusted[0] + MAX_DOUBTED:
                    break
            following = await self._look(head, seq + 1)
            looks.append(following if len(looks) < HELD else replace(following, data=None))
        length, closing = trusted
        self._next = None
        await self._give_up(looks[:length], closing)
        return looks[length - 1].ref.seq

    async def _walk_over(self, looks: Sequence[Look], sources: Sequence[str], chain: str) -> None:
        for look, source in zip(looks, sources, strict=True):
            data = await (self._others[source] if source else self._store).get_segment(look.ref)
            if source and not (look.segment is not None and look.data == data):
                why = look.why or "it is sound by itself and not what the chain says"
                await self._report(look, Proven(data, source), why)
            await self._apply(look.ref, data, chain, source)
            chain = next_chain(chain, data)

    async def _prove(self, head: Head, refs: Sequence[SegmentRef], closing: str) -> tuple[list[str], str]:
        """From the end backwards: bytes that give ``closing`` are proven, and with them the hash before them, and so on.
        Returns whose bytes are proven for the last segments of the run, and the chain hash before these."""
        sources: list[str] = []
        after = closing
        for ref in reversed(refs):
            for source in ("", *self._others):
                found = await self._copy(ref, source)
                if found is None:
                    continue
                gives = next_chain(found.prev_chain, found.data)
                ends = ref.seq == head.seq and gives != after and await self._goes_on(source, ref, gives)
                if gives == after or ends:
                    sources.insert(0, source)
                    after = found.prev_chain
                    break
            else:
                break
        return sources, after

    async def _follows(self, ref: SegmentRef, chain: str | None) -> bool:
        """Whether some region has a sound copy of the segment, one that follows ``chain`` where that is given."""
        for source in self._others:
            found = await self._copy(ref, source)
            if found is not None and chain in (None, found.prev_chain):
                return True
        return False

    async def _copy(self, ref: SegmentRef, source: str) -> Copy | None:
        """The copy of one region ("" = the store itself), if it is sound by itself."""
        try:
            data = await (self._others[source] if source else self._store).get_segment(ref)
        except (NotFound, Corrupt):
            return None
        except Unavailable:
            if not source:
                raise
            return None  # a region that is away cannot help; what it could prove is found another time
        segment, _ = await asyncio.to_thread(self._decode, ref, data)
        return None if segment is None else Copy(data, segment.header.prev_chain)

    async def _goes_on(self, source: str, ref: SegmentRef, after: str) -> bool:
        """Whether the copy of ``source`` goes on from this hash, so that our head and not the segment is damaged."""
        if not source:
            return False
        try:
            theirs = await self._others[source].read_head(self._stream)
            if theirs.seq == ref.seq:
                return theirs.chain == after
            following = SegmentRef(self._stream, ref.seq + 1, theirs.owner(ref.seq + 1))
            segment = decode_segment(await self._others[source].get_segment(following))
        except (DrError, LookupError):
            return False
        return segment.header.prev_chain == after

    async def _others_copy(self, head: Head, seq: int, chain: str, wanted: str) -> Proven | None:
        ref = SegmentRef(self._stream, seq, head.owner(seq))
        for source in self._others:
            found = await self._copy(ref, source)
            if found is not None and found.prev_chain == chain and next_chain(chain, found.data) == wanted:
                return Proven(found.data, source)
        return None

    async def _give_up(self, looks: Sequence[Look], closing: str) -> None:
        """Nobody's bytes fit: says so for each, and steps over them. What is sound in them proves nothing."""
        for look in looks:
            await self._report(look, None, look.why or "it does not follow the segment before it")
            self._proof.skip(look.ref, closing if look is looks[-1] else "")

    async def _report(self, look: Look, right: Proven | None, why: str) -> None:
        known = tuple(self._names(look.ref))
        data = look.data
        if data is None:  # absent, or let go of because the run is long
            data = (await self._store.inspect_object(look.ref)).data
        found: Damage
        if right is None:
            found = survey(data, known, why)
        else:
            found = await asyncio.to_thread(compare, data, right.data)
            if look.segment is not None:
                found = replace(found, what="content")
        agent, record = found.records[0] if found.records else ("", "")
        names = ", ".join(f"{name}/{one}" for name, one in found.records[:LISTED])
        more = f" and {len(found.records) - LISTED:,} more" if len(found.records) > LISTED else ""
        region = self._store.region
        self._proof.note(
            Problem(
                region=region,
                stream=self._stream,
                seq=look.ref.seq,
                epoch=look.ref.epoch,
                key=look.ref.key,
                what=found.what,
                agent=agent,
                record=record,
                records=len(found.records),
                detail=f"{why}; {found.detail}" + (f"; records: {names}{more}" if names else ""),
                source="" if right is None else right.source,
                fix=f"drctl repair {region} --execute"
                if right is not None
                else "no region has bytes that the chain proves; look for a backup of the bucket, and export what is whole",
            )
        )

    # ------------------------------------------------------------------------------------------------------------ bodies

    async def _apply(self, ref: SegmentRef, data: bytes, chain: str, source: str, segment: Segment | None = None) -> None:
        """``segment``: what ``data`` was found to be, if it was decoded already."""
        why = ""
        if segment is None:
            segment, why = await asyncio.to_thread(self._decode, ref, data)
        assert segment is not None, why
        after = next_chain(chain, data)
        store = self._others[source] if source else self._store
        try:
            await _to_its_end(self._proof.apply, segment, after, ref, len(data))
        except ColdBase:
            await self._warm(segment, store)
            await _to_its_end(self._proof.apply, segment, after, ref, len(data))
        for record, problem in self._proof.bad:
            region = self._store.region
            self._proof.note(
                Problem(
                    region=region,
                    stream=self._stream,
                    seq=ref.seq,
                    epoch=ref.epoch,
                    key=ref.key,
                    what="body",
                    agent=record.agent,
                    record=record.id,
                    records=1,
                    detail=f"the segment is as it was written, and in it {problem}",
                    source="",
                    fix=f"give the agent an earlier state: drctl restore --agent {record.agent!a} --as-of TIME",
                )
            )

    async def _warm(self, segment: Segment, store: RegionStore) -> None:
        """Loads bases of deltas that are not warm, from this store or else another. One that cannot be had is marked."""
        for agent, record_id in self._proof.missing(segment):
            for one in (store, *self._others.values()):
                try:
                    _, body = await read_record(self._proof, one, agent, record_id)
                    self._proof.admit(agent, record_id, body)
                    break
                except (Corrupt, NotFound, Unavailable):
                    continue
            else:
                self._proof.doubt(agent, record_id)


async def _to_its_end(work: Callable[..., None], *given: object) -> None:
    """In a thread that is waited for also when the walk is cancelled: the proof is closed then, and SQLite does not survive a
    connection that is closed while another thread uses it."""
    working = asyncio.ensure_future(asyncio.to_thread(work, *given))
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        while not working.done():
            with contextlib.suppress(asyncio.CancelledError):  # once more: there is nothing else to do
                await asyncio.wait([working])
        if not working.cancelled():
            working.exception()  # it was heard
        raise


def _owner(head: Head, seq: int) -> int | None:
    try:
        return head.owner(seq)
    except LookupError:
        return None
