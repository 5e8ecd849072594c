"""Reads a tail that was cut off a store: what records lie in it, and their bodies.

A record of a tail may be a delta against one before it in the same tail, or against one of the history that the tail grew on.
That one is read from this region's copy of the live history. Either way the body's hash decides: bytes that do not give it are
not handed out.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from controller.domain.model import Frame, Record, Salvage, SegmentRef
from controller.domain.replication import owner
from controller.domain.retention import is_diverged
from controller.errors import Corrupt, NotFound
from controller.ports import RegionStore
from controller.stream.limits import MAX_CHAIN
from controller.stream.reader import read_record
from controller.stream.salvage import sound
from controller.stream.segment import frame_at, next_chain, open_frame
from controller.stream.view import View

SIDE_BY_SIDE = 8
"""Segments that are read at a time."""
KEPT_RECORDS = 200_000
"""Records without their bodies that are remembered of tails that were read. Objects never change."""
NAME_CHAIN_CHARS = 16
"""Of the chain hash at the end of a tail, in its name."""
PAGE = 1000


@dataclass(frozen=True, slots=True)
class Lying:
    """One record of a tail, and where it lies."""

    record: Record
    ref: SegmentRef
    ordinal: int
    encoding: str
    base: str | None


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A segment of a tail that is gone or damaged in this store."""

    ref: SegmentRef
    why: str


@dataclass(frozen=True, slots=True)
class Tail:
    """One tail in one store."""

    store: RegionStore
    stream: str
    piece: Salvage
    group: str

    @property
    def name(self) -> str:
        """Names exactly this tail: stream, first and last segment, and the beginning of its last chain hash."""
        return name_of(self.stream, self.piece)

    def checked(self) -> Tail:
        """Itself. Raises Corrupt when the head says of it what no writer of ours can have written."""
        piece = self.piece
        begins = piece.epochs[0].first_seq if piece.epochs else 0
        if begins != piece.first_seq or piece.last_seq < piece.first_seq or list(piece.epochs) != sorted(piece.epochs):
            raise Corrupt(
                f"the head of {self.stream} in {self.store.region} says of salvage {self.name} what cannot be",
                hint=f"drctl verify {self.store.region}",
            )
        return self

    def ref(self, seq: int) -> SegmentRef:
        return SegmentRef(self.stream, seq, owner(self.piece.epochs, seq))

    def holds(self, ref: SegmentRef) -> bool:
        """Whether the object is of this tail."""
        first, last = self.piece.first_seq, self.piece.last_seq
        return ref.stream == self.stream and first <= ref.seq <= last and self.ref(ref.seq) == ref

    def refs(self) -> tuple[SegmentRef, ...]:
        """All of them, ascending."""
        return tuple(self.ref(seq) for seq in range(self.piece.first_seq, self.piece.last_seq + 1))

    async def look(self, seqs: Sequence[int]) -> list[tuple[Lying, ...] | Unreadable]:
        """The records of these segments. Raises Unavailable: then nothing is known of them."""
        return list(await asyncio.gather(*(self._look(self.ref(seq)) for seq in seqs)))

    async def _look(self, ref: SegmentRef) -> tuple[Lying, ...] | Unreadable:
        try:
            segment = await asyncio.to_thread(sound, await self.store.get_segment(ref), ref, self.group)
        except (NotFound, Corrupt) as error:
            return Unreadable(ref, error.message)
        return tuple(
            Lying(frame.record, ref, ordinal, frame.encoding.value, frame.base) for ordinal, frame in enumerate(segment.frames)
        )


def name_of(stream: str, piece: Salvage) -> str:
    return f"{stream}.{piece.first_seq}-{piece.last_seq}.{piece.last_chain[:NAME_CHAIN_CHARS]}"


@dataclass
class Tails:
    """Remembers what was read of tails, so that a page or a body does not read all of them again. ``view``: this region's live
    history, ``home`` its store."""

    view: View
    home: RegionStore
    _known: OrderedDict[tuple[str, str], dict[int, tuple[Lying, ...]]] = field(default_factory=OrderedDict)

    async def look(self, tail: Tail, seqs: Sequence[int]) -> list[tuple[Lying, ...] | Unreadable]:
        """As ``Tail.look``."""
        known = self._of(tail)
        wanted = [seq for seq in seqs if seq not in known]
        found: dict[int, tuple[Lying, ...] | Unreadable] = {}
        for at in range(0, len(wanted), SIDE_BY_SIDE):
            some = wanted[at : at + SIDE_BY_SIDE]
            found.update(zip(some, await tail.look(some), strict=True))
        known.update({seq: one for seq, one in found.items() if isinstance(one, tuple)})
        answer = [found[seq] if seq in found else known[seq] for seq in seqs]
        if wanted:
            self._shrink()
        return answer

    async def body(self, tail: Tail, seq: int, ordinal: int) -> tuple[Record, bytes]:
        """One record and its body, whose hash was compared. Raises NotFound, Unavailable, Corrupt."""
        frames: list[Frame] = [await self._frame(tail, seq, ordinal)]
        body: bytes | None = None
        while frames[-1].base is not None:
            record = frames[-1].record
            place = await self._before(tail, record.agent, frames[-1].base, seq, ordinal)
            if place is None:
                _, body = await read_record(self.view, self.home, record.agent, frames[-1].base)
                break
            seq, ordinal = place
            frames.append(await self._frame(tail, seq, ordinal))
            if len(frames) > MAX_CHAIN + 1:
                raise Corrupt(
                    f"record {record.id!a} of agent {record.agent!a}: its chain of deltas is longer than {MAX_CHAIN}", hint=""
                )
        for frame in reversed(frames):
            body = await asyncio.to_thread(open_frame, frame, body)
        assert body is not None
        return frames[0].record, body

    async def _frame(self, tail: Tail, seq: int, ordinal: int) -> Frame:
        (found,) = await self.look(tail, [seq])
        if isinstance(found, Unreadable):
            raise Corrupt(
                f"segment {found.ref.key} of salvage in {tail.store.region}: {found.why}",
                hint=f"drctl verify {tail.store.region}, then drctl repair: another region may have it",
            )
        if ordinal >= len(found):
            raise NotFound(
                f"segment {seq} of salvage {tail.name} has {len(found)} records", hint="drctl salvage show lists them"
            )
        return frame_at(await tail.store.get_segment(found[ordinal].ref), ordinal)

    async def _before(self, tail: Tail, agent: str, record_id: str, seq: int, ordinal: int) -> tuple[int, int] | None:
        """Where the newest record of this id lies before a place of the tail; None when it is not in it."""
        for at in range(seq, tail.piece.first_seq - 1, -1):
            (found,) = await self.look(tail, [at])
            for one in reversed(() if isinstance(found, Unreadable) else found):
                if (one.record.agent, one.record.id) == (agent, record_id) and (at, one.ordinal) < (seq, ordinal):
                    return at, one.ordinal
        return None

    def _of(self, tail: Tail) -> dict[int, tuple[Lying, ...]]:
        key = (tail.store.region, f"{tail.name} {tail.piece.last_chain}")
        known = self._known.setdefault(key, {})
        self._known.move_to_end(key)
        return known

    def _shrink(self) -> None:
        while self._known and sum(len(one) for known in self._known.values() for one in known.values()) > KEPT_RECORDS:
            self._known.popitem(last=False)


async def leftovers(store: RegionStore, stream: str, name: tuple[int, int, str], group: str) -> list[SegmentRef]:
    """Objects of a tail that the head does not name any more, ascending: ``name`` is its first and last segment and the
    beginning of its last chain hash. From the last one backwards each is proven by the hash that the one after it names, so
    nothing else is taken for it; they are deleted from the first on, so what is left can be proven. Raises Unavailable."""
    first, last, closing = name
    head = await store.read_head(stream)
    there: dict[int, list[SegmentRef]] = {}
    at = first
    while at <= last:
        page = await store.list_segments(stream, at, PAGE)
        for ref in page:
            if at <= ref.seq <= last and is_diverged(head, ref):
                there.setdefault(ref.seq, []).append(ref)
        if len(page) < PAGE or page[-1].seq >= last:
            break
        at = page[-1].seq + (page[0].seq == page[-1].seq)
        there.pop(at, None)  # the next page lists it again, and whole
    found: list[SegmentRef] = []
    for seq in range(last, first - 1, -1):
        for ref in there.get(seq, ()):
            try:
                data = await store.get_segment(ref)
                segment = await asyncio.to_thread(sound, data, ref, group)
            except (NotFound, Corrupt):
                continue
            if next_chain(segment.header.prev_chain, data).startswith(closing):
                found.append(ref)
                closing = segment.header.prev_chain
                break
        else:
            break
    return found[::-1]
