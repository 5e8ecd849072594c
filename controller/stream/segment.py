"""Frames to bytes and back: segment objects and ingest batches. ``FORMAT.md`` describes every byte; change both together.

A segment is ``magic, header, frames, index, trailer``; the trailer ends with a SHA-256 over everything before it. Decoding
checks that hash first and trusts no length even so, because a hash proves integrity and not good will. Equal frames give
equal bytes. Everything that is wrong is a ``Corrupt`` that says what and at which byte. Pure; safe to import by agents.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import msgspec

from controller.domain.model import Encoding, Frame, Record
from controller.errors import Corrupt, Refused
from controller.stream.delta import frame, open_frame
from controller.stream.limits import (
    DEFAULT_LIMITS,
    ORIGIN,
    ORIGIN_BYTES,
    RESERVED,
    Limits,
    frame_problem,
    is_hash,
    name_problem,
)

__all__ = [
    "DEFAULT_LIMITS",
    "Limits",
    "Place",
    "Segment",
    "SegmentHeader",
    "build_segment",
    "decode_frames",
    "decode_header",
    "decode_segment",
    "encode_frames",
    "encode_segment",
    "frame",
    "frame_at",
    "frame_offsets",
    "next_chain",
    "open_frame",
]

VERSION = 1
SEGMENT_MAGIC = b"DRSEG\x00" + VERSION.to_bytes(2, "big")
SEALED_MAGIC = b"DRENC\x00"
"""Of a sealed object (``FORMAT.md``), which is opened before it comes here."""
BATCH_MAGIC = b"DRBAT\x00" + VERSION.to_bytes(2, "big")

_LENGTH = struct.Struct(">I")
_FRAME = struct.Struct(">II")  # header length, payload length
_TRAILER = struct.Struct(">QII")  # index offset, index length, number of frames; a SHA-256 follows
_HASH_BYTES = 32
_TRAILER_BYTES = _TRAILER.size + _HASH_BYTES
_ENCODINGS = (Encoding.RAW, Encoding.ZSTD, Encoding.DELTA)
_ENCODING_NUMBER = {encoding: number for number, encoding in enumerate(_ENCODINGS)}
_BAD_BYTES = (msgspec.MsgspecError, ValueError, RecursionError, OverflowError)
"""What msgspec raises on bytes that are not what the type says (UnicodeDecodeError is a ValueError)."""


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """Where a segment belongs: enough to place it without its key."""

    group: str
    stream: str
    seq: int
    epoch: int
    prev_chain: str
    created_at: float
    """Wall clock of the holder that closed the segment."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A decoded segment. Bodies are still as they travel; ``open_frame`` opens them."""

    header: SegmentHeader
    frames: tuple[Frame, ...]
    offsets: tuple[int, ...] = field(default=(), compare=False)
    """Where each frame begins in the object, and where the last one ends; empty when nobody looked."""


class Place(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One line of the index: the frame of a record is at ``offset`` (its two lengths included) and ``length`` bytes long."""

    agent: str
    id: str
    offset: int
    length: int


class _FrameHeader(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A record as it lies in a frame: an array in this order, the hash as bytes and the encoding as a number."""

    agent: str
    id: str
    kind: str
    sha256: bytes
    size: int
    parent: str | None
    created_at: float
    received_at: float
    copies: int
    attempt: int
    meta: Mapping[str, str]
    encoding: int
    base: str | None


_ENCODER = msgspec.msgpack.Encoder(order="deterministic")
_HEADER_DECODER = msgspec.msgpack.Decoder(SegmentHeader)
_FRAME_DECODER = msgspec.msgpack.Decoder(_FrameHeader)
_INDEX_DECODER = msgspec.msgpack.Decoder(tuple[Place, ...])


def _bad(what: str, at: int) -> NoReturn:
    raise Corrupt(f"{what} (at byte {at})", hint="do not trust these bytes; read the copy of another region")


# --------------------------------------------------------------------------------------------------------------- encoding


def _encode_frame(frame: Frame, limits: Limits) -> tuple[bytes, bytes]:
    """Lengths with header, and payload. Raises Refused when the frame breaks a limit."""
    record = frame.record
    problem = frame_problem(frame, limits)
    header = b""
    if problem is None:
        try:
            header = _ENCODER.encode(
                _FrameHeader(
                    record.agent,
                    record.id,
                    record.kind,
                    bytes.fromhex(record.sha256),
                    record.size,
                    record.parent,
                    float(record.created_at),
                    float(record.received_at),
                    record.copies,
                    record.attempt,
                    record.meta,
                    _ENCODING_NUMBER[frame.encoding],
                    frame.base,
                )
            )
        except _BAD_BYTES as error:  # a lone surrogate in a meta value, for one
            problem = f"the record cannot be written: {error}"
    room = limits.header_bytes - (0 if ORIGIN in record.meta else ORIGIN_BYTES)
    if problem is None and len(header) > room:
        problem = f"the record's header has {len(header)} bytes, allowed are {room}"
    if problem is not None:
        raise Refused(
            f"record {ascii(record.id)[:120]} of agent {ascii(record.agent)[:120]}: {problem}", hint="correct the named field"
        )
    return _FRAME.pack(len(header), len(frame.payload)) + header, frame.payload


def _seal(
    magic: bytes, header: bytes, frames: Iterable[Frame], *, indexed: bool, limits: Limits
) -> tuple[bytes, tuple[int, ...]]:
    """The bytes, and where each frame begins, with the end as the last entry."""
    parts = [magic, _LENGTH.pack(len(header)), header, _LENGTH.pack(zlib.crc32(header))]
    offset = sum(map(len, parts))
    offsets = [offset]
    index: list[Place] = []
    for item in frames:
        head, payload = _encode_frame(item, limits)
        parts.append(head)
        parts.append(payload)
        length = len(head) + len(payload)
        if indexed:
            index.append(Place(item.record.agent, item.record.id, offset, length))
        offset += length
        offsets.append(offset)
    count = len(offsets) - 1
    footer = _ENCODER.encode(index) if indexed else b""
    size = offset + len(footer) + _TRAILER_BYTES
    if count > limits.frames or size > limits.segment_bytes:
        raise Refused(
            f"{count} frames in {size} bytes are more than the {limits.frames} frames or {limits.segment_bytes} bytes allowed",
            hint="send fewer records at a time",
        )
    parts.append(footer)
    parts.append(_TRAILER.pack(offset, len(footer), count))
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    parts.append(digest.digest())
    return b"".join(parts), tuple(offsets)  # joined once: a second copy of a large body would hold up every other thread


def encode_segment(header: SegmentHeader, frames: Sequence[Frame], limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The bytes of a segment object. Equal arguments give equal bytes. Raises Refused when a limit is broken."""
    return build_segment(header, frames, limits)[1]


def build_segment(header: SegmentHeader, frames: Sequence[Frame], limits: Limits = DEFAULT_LIMITS) -> tuple[Segment, bytes]:
    """Like ``encode_segment``, with the segment as ``decode_segment`` would give it."""
    problem = _header_problem(header, limits)
    if problem is not None:
        raise Refused(f"segment header: {problem}", hint="correct the named field")
    data, offsets = _seal(SEGMENT_MAGIC, _ENCODER.encode(header), frames, indexed=True, limits=limits)
    return Segment(header, tuple(frames), offsets), data


def encode_frames(frames: Sequence[Frame], limits: Limits = DEFAULT_LIMITS) -> bytes:
    """An ingest batch: the body of ``POST /v1/records``. Raises Refused when a limit is broken."""
    return _seal(BATCH_MAGIC, b"", frames, indexed=False, limits=limits)[0]


def next_chain(prev_chain: str, data: bytes) -> str:
    """Chain hash after a segment: SHA-256 over the 32 bytes of the previous chain hash and the 32 bytes of SHA-256(data)."""
    return hashlib.sha256(bytes.fromhex(prev_chain) + hashlib.sha256(data).digest()).hexdigest()


# --------------------------------------------------------------------------------------------------------------- decoding


def _header_problem(header: SegmentHeader, limits: Limits) -> str | None:
    problem = name_problem("group", header.group, limits.agent_chars)
    problem = problem or name_problem("stream", header.stream, limits.agent_chars)
    if problem is not None:
        return problem
    if not 1 <= header.seq <= limits.seq:
        return f"seq {header.seq} is outside 1..{limits.seq}"
    if not 0 <= header.epoch < 2**63:
        return f"epoch {header.epoch} is outside 0..2^63-1"
    if not is_hash(header.prev_chain):
        return f"prev_chain {header.prev_chain[:80]!a} is not 64 lower-case hex digits"
    if not math.isfinite(header.created_at):
        return f"created_at {header.created_at} is not a finite number"
    return None


def _header_bytes(data: bytes, magic: bytes, limits: Limits) -> tuple[bytes, int]:
    """The header's bytes, their CRC verified, and where the first frame begins. Works on the first bytes of an object alone."""
    name = magic[:5].decode()
    if data[:6] == SEALED_MAGIC:
        _bad("the object is sealed; only what has the group's KMS keys can open it", 0)
    if data[:6] != magic[:6]:
        _bad(f"this is not a {name} file: it begins with {bytes(data[:8])!a}", 0)
    if data[:8] != magic:
        _bad(f"format version {int.from_bytes(data[6:8], 'big')} of {name} is not known; this program reads {VERSION}", 6)
    if len(data) < 12:
        _bad(f"the {name} file ends after {len(data)} bytes, inside the header", len(data))
    (length,) = _LENGTH.unpack_from(data, 8)
    if length > limits.header_bytes or 12 + length + 4 > len(data):
        _bad(f"a header of {length} bytes does not fit into {len(data)} bytes or the limit of {limits.header_bytes}", 8)
    header = bytes(data[12 : 12 + length])
    if _LENGTH.unpack_from(data, 12 + length)[0] != zlib.crc32(header):
        _bad("the header's CRC does not match", 12 + length)
    return header, 12 + length + 4


def decode_header(data: bytes, limits: Limits = DEFAULT_LIMITS) -> SegmentHeader:
    """The header alone, from a whole segment or its first bytes. Proves nothing about the rest. Raises Corrupt."""
    raw, _ = _header_bytes(data, SEGMENT_MAGIC, limits)
    try:
        header = _HEADER_DECODER.decode(raw)
    except _BAD_BYTES as error:
        _bad(f"the segment header is not readable: {error}", 12)
    problem = _header_problem(header, limits)
    if problem is not None:
        _bad(f"segment header: {problem}", 12)
    return header


def _envelope(data: bytes, magic: bytes, limits: Limits) -> tuple[int, int, bytes, int]:
    """Checks sizes, magic and the SHA-256. Returns where frames begin and end, the index's bytes, the number of frames."""
    if len(data) > limits.segment_bytes:
        _bad(f"{len(data)} bytes are more than the {limits.segment_bytes} allowed", 0)
    _, first = _header_bytes(data, magic, limits)
    body = len(data) - _HASH_BYTES
    at = body - _TRAILER.size
    if at < first:
        _bad(f"the file ends after {len(data)} bytes, before its trailer", len(data))
    if hashlib.sha256(memoryview(data)[:body]).digest() != data[body:]:
        _bad("the SHA-256 at the end does not match the content", body)
    end, length, count = _TRAILER.unpack_from(data, at)
    if not first <= end <= at or end + length != at:
        _bad(f"the index at {end} with {length} bytes does not lie between the frames and the trailer", at)
    if count > limits.frames or count * _FRAME.size > end - first:
        _bad(f"{count} frames do not fit into {end - first} bytes or the limit of {limits.frames}", at)
    return first, end, data[end:at], count


def _decode_frame(data: bytes, at: int, end: int, limits: Limits) -> tuple[Frame, int]:
    """The frame at byte ``at`` and where the next begins."""
    if end - at < _FRAME.size:
        _bad(f"a frame needs {_FRAME.size} bytes for its lengths, {end - at} are left", at)
    header_length, payload_length = _FRAME.unpack_from(data, at)
    start = at + _FRAME.size
    split = start + header_length
    stop = split + payload_length
    if header_length > limits.header_bytes or stop > end:
        _bad(f"a frame with a header of {header_length} and a payload of {payload_length} bytes does not fit", at)
    try:
        head = _FRAME_DECODER.decode(data[start:split])
    except _BAD_BYTES as error:
        _bad(f"a frame's header is not readable: {error}", start)
    if len(head.sha256) != _HASH_BYTES or not 0 <= head.encoding < len(_ENCODINGS):
        _bad(f"a frame's header has a hash of {len(head.sha256)} bytes and encoding {head.encoding}", start)
    record = Record(
        head.agent,
        head.id,
        head.kind,
        head.sha256.hex(),
        head.size,
        head.parent,
        head.created_at,
        head.received_at,
        head.copies,
        head.attempt,
        head.meta,
    )
    decoded = Frame(record, _ENCODINGS[head.encoding], data[split:stop], head.base)
    problem = frame_problem(decoded, limits)
    if problem is not None:
        _bad(f"record {ascii(record.id)[:320]} of agent {ascii(record.agent)[:220]}: {problem}", start)
    return decoded, stop


def _decode_all(data: bytes, first: int, end: int, count: int, limits: Limits) -> tuple[list[Frame], list[int]]:
    """All frames, and where each begins, with the end as the last entry."""
    frames: list[Frame] = []
    offsets = [first]
    for _ in range(count):
        decoded, stop = _decode_frame(data, offsets[-1], end, limits)
        frames.append(decoded)
        offsets.append(stop)
    if offsets[-1] != end:
        _bad(f"{end - offsets[-1]} bytes after the last frame belong to none", offsets[-1])
    return frames, offsets


def _decode_index(raw: bytes, first: int, end: int, count: int) -> tuple[Place, ...]:
    try:
        index = _INDEX_DECODER.decode(raw)
    except _BAD_BYTES as error:
        _bad(f"the index is not readable: {error}", end)
    if len(index) != count:
        _bad(f"the index has {len(index)} entries for {count} frames", end)
    at = first
    for place in index:
        if place.offset != at or place.length < _FRAME.size or at + place.length > end:
            _bad(f"the index says offset {place.offset} and length {place.length} where a frame begins at {at}", end)
        at += place.length
    if at != end:
        _bad(f"the index covers the frames up to {at} of {end}", end)
    return index


def decode_segment(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Segment:
    """Everything but the bodies' content, verified: checksum, lengths, limits, index. Raises Corrupt."""
    first, end, raw_index, count = _envelope(data, SEGMENT_MAGIC, limits)
    header = decode_header(data, limits)
    frames, offsets = _decode_all(data, first, end, count, limits)
    index = _decode_index(raw_index, first, end, count)
    for place, item, offset in zip(index, frames, offsets, strict=False):
        if place.offset != offset or place.id != item.record.id or place.agent != item.record.agent:
            _bad(f"the index disagrees with the frame at {offset}", end)
    return Segment(header, tuple(frames), tuple(offsets))


def frame_offsets(data: bytes, limits: Limits = DEFAULT_LIMITS) -> tuple[Place, ...]:
    """The index of a segment, after its checksum: where each frame lies, in order. Raises Corrupt."""
    first, end, raw_index, count = _envelope(data, SEGMENT_MAGIC, limits)
    return _decode_index(raw_index, first, end, count)


def frame_at(data: bytes, ordinal: int, limits: Limits = DEFAULT_LIMITS) -> Frame:
    """The frame with this number (0 = first), without decoding the others. Raises Corrupt."""
    index = frame_offsets(data, limits)
    if not 0 <= ordinal < len(index):
        _bad(f"frame {ordinal} is asked for, the segment has {len(index)}", 0)
    place = index[ordinal]
    decoded, stop = _decode_frame(data, place.offset, place.offset + place.length, limits)
    if stop != place.offset + place.length or (decoded.record.agent, decoded.record.id) != (place.agent, place.id):
        _bad(f"the index disagrees with the frame at {place.offset}", place.offset)
    return decoded


def decode_frames(data: bytes, limits: Limits = DEFAULT_LIMITS) -> tuple[Frame, ...]:
    """An ingest batch. Refuses what only controllers may write. Raises Corrupt on anything wrong."""
    first, end, raw_index, count = _envelope(data, BATCH_MAGIC, limits)
    if raw_index or first != 16:
        _bad("a batch has neither header nor index", first)
    frames, _ = _decode_all(data, first, end, count, limits)
    for item in frames:
        own = next((key for key in item.record.meta if key.startswith(RESERVED)), None)
        if own is not None:
            _bad(f"record {ascii(item.record.id)[:320]} sets meta {own!a}, which belongs to controllers", first)
    return tuple(frames)
