"""Walks the tails that were cut off a store: every object is read again, from the last one backwards.

A head says of each salvage the chain hash at its end. Bytes that give this hash are proven, and with them the hash before them,
and so on to the first. So a damaged object is known exactly, and another region's copy of the same segment (its own salvage,
or an object that was never committed there) is proven by the same hash. What no region can prove is lost, and said so; before
it nothing proves what is sound by itself, and that is taken as it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from controller.domain.model import Head, Salvage, SegmentRef
from controller.domain.replication import owner
from controller.errors import Corrupt, DrError, NotFound, Unavailable
from controller.ports import Clock, RegionStore
from controller.stream.damage import Damage, compare, survey
from controller.stream.segment import Segment, decode_segment, next_chain

MAX_MISSING = 20
"""Segments of a salvage that are missing one after the other before the rest is not looked for."""


@dataclass(frozen=True, slots=True)
class Harm:
    """One object of a salvage that is not as it was written. ``after``: the chain hash that its right bytes give, "" when what
    follows is lost too; ``source``: the region whose copy gives it, "" = none does."""

    ref: SegmentRef
    why: str
    damage: Damage
    after: str
    source: str


async def salvage_harm(
    store: RegionStore, others: Mapping[str, RegionStore], head: Head, group: str, clock: Clock
) -> AsyncIterator[Harm]:
    """What is wrong with the salvage of one head. Raises Unavailable."""
    for piece in head.salvage:
        begins = piece.epochs[0].first_seq if piece.epochs else 0
        newest = max((start.epoch for start in piece.epochs), default=0)
        if begins != piece.first_seq or not newest < piece.by_epoch <= head.epoch or piece.first_seq > piece.last_seq:
            ref = SegmentRef(head.stream, piece.first_seq, piece.epochs[0].epoch if piece.epochs else 0)
            why = f"the head says of this salvage {piece!a}, which no writer of ours can have written"
            yield Harm(ref, why, Damage("head", (), ""), "", "")
            continue
        async for harm in _Piece(store, others, head.stream, group, clock).walk(piece):
            yield harm


@dataclass(frozen=True, slots=True)
class _Piece:
    store: RegionStore
    others: Mapping[str, RegionStore]
    stream: str
    group: str
    clock: Clock

    async def walk(self, piece: Salvage) -> AsyncIterator[Harm]:
        closing, missing = piece.last_chain, 0
        for seq in range(piece.last_seq, piece.first_seq - 1, -1):
            ref = SegmentRef(self.stream, seq, owner(tuple(sorted(piece.epochs)), seq))
            data, segment, why = await self._read(ref)
            gives = "" if segment is None or data is None else next_chain(segment.header.prev_chain, data)
            if segment is not None and closing in ("", gives):
                closing = segment.header.prev_chain
                continue
            source, right = await self._elsewhere(ref, closing)
            if segment is not None and right is None:  # what follows may be the wrong one: its word is taken
                said = "the head's salvage" if seq == piece.last_seq else "the segment after it"
                why = f"it gives chain {gives[:12]}…, {said} says {closing[:12]}…"
            why = why or "it is sound by itself and not what the chain says"
            damage = survey(data, (), why) if right is None else await asyncio.to_thread(compare, data, right)
            yield Harm(ref, why, damage, closing, source)
            missing = missing + 1 if data is None and right is None else 0
            if missing >= MAX_MISSING:
                return
            if right is not None:
                segment = decode_segment(right)
            closing = "" if segment is None else segment.header.prev_chain
            await self.clock.sleep(0)

    async def _read(self, ref: SegmentRef) -> tuple[bytes | None, Segment | None, str]:
        """What lies there, and what it is if it is sound by itself."""
        try:
            data = await self.store.get_segment(ref)
        except NotFound as error:
            return None, None, error.message
        except Corrupt as error:
            return (await self.store.inspect_object(ref)).data, None, error.message
        try:
            segment = await asyncio.to_thread(sound, data, ref, self.group)
        except Corrupt as error:
            return data, None, error.message
        return data, segment, ""

    async def _elsewhere(self, ref: SegmentRef, closing: str) -> tuple[str, bytes | None]:
        for region, other in self.others.items() if closing else ():
            data = await proven_copy(other, ref, closing, self.group)
            if data is not None:
                return region, data
        return "", None


def sound(data: bytes, ref: SegmentRef, group: str) -> Segment:
    """The segment, if it is one and the one that its name says. Raises Corrupt."""
    segment = decode_segment(data)
    header = segment.header
    said = (header.group, header.stream, header.seq, header.epoch)
    if said != (group, ref.stream, ref.seq, ref.epoch):
        raise Corrupt(f"it says that its group, stream, seq and epoch are {said!a}", hint="")
    return segment


async def proven_copy(store: RegionStore, ref: SegmentRef, after: str, group: str) -> bytes | None:
    """The object's bytes in this store, if they give the chain hash ``after``; None when they do not, or cannot be had."""
    try:
        data = await store.get_segment(ref)
        segment = await asyncio.to_thread(sound, data, ref, group)
    except (DrError, Unavailable):
        return None
    return data if next_chain(segment.header.prev_chain, data) == after else None
