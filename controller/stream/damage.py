"""Which part of a segment object is damaged, and which records that concerns. Pure; nothing is trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from controller.errors import Corrupt
from controller.stream.segment import Place, frame_offsets

_TRAILER_BYTES = 48
_INDEX = msgspec.msgpack.Decoder(tuple[Place, ...])


@dataclass(frozen=True, slots=True)
class Damage:
    """``what``: the part, in the words of ``Problem.what``; ``records``: (agent, id) of those concerned, in their order."""

    what: str
    records: tuple[tuple[str, str], ...]
    detail: str


def compare(bad: bytes | None, good: bytes) -> Damage:
    """What differs between a damaged object and the one that the chain proves."""
    places = frame_offsets(good)
    everyone = tuple((place.agent, place.id) for place in places)
    if bad is None:
        return Damage("missing", everyone, "the object is not there")
    if bad == good:
        return Damage("trailer", everyone, "its bytes are right, but not what was written beside them says")
    at = first_difference(bad, good)
    size = "" if len(bad) == len(good) else f"; it has {len(bad):,} bytes and not {len(good):,}"
    first = places[0].offset if places else len(good)
    end = places[-1].offset + places[-1].length if places else first
    if at < first:
        return Damage("header", everyone, f"its header differs from byte {at:,} on{size}")
    if at >= len(good) - _TRAILER_BYTES:
        return Damage("trailer", everyone, f"its trailer differs from byte {at:,} on{size}")
    if at >= end:
        return Damage("index", everyone, f"its index differs from byte {at:,} on{size}")
    hurt = tuple(
        (place.agent, place.id)
        for place in places
        if bad[place.offset : place.offset + place.length] != good[place.offset : place.offset + place.length]
    )
    return Damage("frame", hurt, f"it differs from byte {at:,} on{size}")


def survey(bad: bytes | None, known: Sequence[tuple[str, str]], why: str) -> Damage:
    """The same without a good copy to compare with: ``known`` are the records that a view has at this place."""
    what = "missing" if bad is None else "content"
    if known:
        return Damage(what, tuple(known), why)
    return Damage(what, () if bad is None else _listed(bad), why)


def first_difference(one: bytes, other: bytes) -> int:
    """The first byte at which they differ; the shorter one's length when it is a beginning of the other."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # the longest common beginning, by halving
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _listed(data: bytes) -> tuple[tuple[str, str], ...]:
    """What the object's own index says, checksum or not; nothing when that is not readable either."""
    try:
        return tuple((place.agent, place.id) for place in frame_offsets(data))
    except Corrupt:
        pass
    at = int.from_bytes(data[-_TRAILER_BYTES : -_TRAILER_BYTES + 8], "big") if len(data) >= _TRAILER_BYTES else len(data)
    length = int.from_bytes(data[-_TRAILER_BYTES + 8 : -_TRAILER_BYTES + 12], "big")
    try:
        return tuple((place.agent, place.id) for place in _INDEX.decode(data[at : at + length]))
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError):
        return ()
