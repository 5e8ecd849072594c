"""Segments and batches: round trips, damage, hostile lengths."""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import replace

import msgspec
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.domain.model import GENESIS, Encoding, Frame, Record
from controller.errors import Corrupt, Refused
from controller.stream import segment as codec
from controller.stream.limits import ORIGIN, Limits
from controller.stream.segment import (
    SegmentHeader,
    decode_frames,
    decode_header,
    decode_segment,
    encode_frames,
    encode_segment,
    frame,
    frame_at,
    frame_offsets,
    next_chain,
)

HEADER = SegmentHeader("fleet", "0", 7, 3, GENESIS, 1_790_000_000.5)
names = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1, max_size=30).filter(
    lambda name: codec.name_problem("name", name, 200) is None
)
floats = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    payload = draw(st.binary(max_size=200))
    encoding = draw(st.sampled_from(list(Encoding)))
    record = Record(
        agent=draw(names),
        id=draw(names),
        kind=draw(names),
        sha256=draw(st.binary(min_size=32, max_size=32)).hex(),
        size=len(payload) if encoding is Encoding.RAW else draw(st.integers(0, 64 * 2**20)),
        parent=draw(st.none() | names),
        created_at=draw(floats),
        received_at=draw(floats),
        copies=draw(st.integers(1, 16)),
        attempt=draw(st.integers(0, 2**63 - 1)),
        meta=draw(
            st.dictionaries(
                names.filter(lambda key: not key.startswith("dr.")),
                st.text(st.characters(codec="utf-8"), max_size=20),
                max_size=3,
            )
        ),
    )
    base = draw(names.filter(lambda name: name != record.id)) if encoding is Encoding.DELTA else None
    return Frame(record, encoding, payload, base)


some_frames = st.lists(frames(), max_size=6)
headers = st.builds(
    SegmentHeader,
    names,
    names,
    st.integers(1, 2**46),
    st.integers(0, 2**63 - 1),
    st.binary(min_size=32, max_size=32).map(bytes.hex),
    floats,
)


def segment_bytes() -> bytes:
    return encode_segment(HEADER, [frame(f"agent-{i % 3}", f"r{i}", "checkpoint", b"state %d " % i * 30) for i in range(9)])


def sealed(data: bytes) -> bytes:
    """The same bytes with a right checksum, as somebody who means harm would send them."""
    return data[:-32] + hashlib.sha256(data[:-32]).digest()


# ------------------------------------------------------------------------------------------------------------ round trips


@given(headers, some_frames)
def test_a_segment_comes_back_as_it_was(header: SegmentHeader, content: list[Frame]) -> None:
    data = encode_segment(header, content)
    decoded = decode_segment(data)
    assert decoded.header == header == decode_header(data)
    assert decoded.frames == tuple(content)
    assert encode_segment(header, list(decoded.frames)) == data
    for number, (place, item) in enumerate(zip(frame_offsets(data), content, strict=True)):
        assert (place.agent, place.id) == (item.record.agent, item.record.id)
        assert frame_at(data, number) == item


@given(some_frames)
def test_a_batch_comes_back_as_it_was(content: list[Frame]) -> None:
    assert decode_frames(encode_frames(content)) == tuple(content)


def test_equal_frames_give_equal_bytes_whatever_the_order_of_their_meta() -> None:
    one = frame("a", "r", "k", b"", meta={"x": "1", "y": "2"})
    two = frame("a", "r", "k", b"", meta={"y": "2", "x": "1"})
    assert encode_segment(HEADER, [one]) == encode_segment(HEADER, [two])


def test_the_header_is_readable_from_the_first_bytes_alone() -> None:
    assert decode_header(segment_bytes()[:400]) == HEADER


def test_the_chain_hash_is_the_documented_one() -> None:
    data = segment_bytes()
    expected = hashlib.sha256(bytes(32) + hashlib.sha256(data).digest()).hexdigest()
    assert next_chain(GENESIS, data) == expected
    assert next_chain(expected, data) != expected


def test_the_bytes_of_version_1_never_change() -> None:
    data = encode_segment(HEADER, [frame("agent", "r1", "checkpoint", b"tiny", parent="r0", created_at=1.5, meta={"k": "v"})])
    assert hashlib.sha256(data).hexdigest() == "f708d0ef9561e8d0e31076b72cd3d6ad0002ed385e0a1d12152fbbe8dd651ee2"


def test_another_program_restores_an_agent_from_the_format_page_alone() -> None:
    """Follows FORMAT.md with struct, hashlib, msgpack and zstd only."""
    first = bytes(range(256)) * 8
    second = first + b"one more step"
    data = encode_segment(
        HEADER,
        [frame("a", "r1", "checkpoint", first), frame("a", "r2", "checkpoint", second, parent="r1", previous=("r1", first))],
    )
    assert data[:8] == bytes.fromhex("445253454700 0001")
    assert hashlib.sha256(data[:-32]).digest() == data[-32:]
    index_at, index_length, count = struct.unpack(">QII", data[-48:-32])
    index = msgspec.msgpack.decode(data[index_at : index_at + index_length])
    assert len(index) == count == 2
    bodies: dict[str, bytes] = {}
    for agent, record_id, offset, length in index:
        header_length, payload_length = struct.unpack(">II", data[offset : offset + 8])
        assert length == 8 + header_length + payload_length
        fields = msgspec.msgpack.decode(data[offset + 8 : offset + 8 + header_length])
        payload = data[offset + 8 + header_length : offset + length]
        assert fields[:2] == [agent, record_id]
        if fields[11] == 0:
            body = payload
        elif fields[11] == 1:
            body = zstd.decompress(payload)
        else:
            body = zstd.decompress(payload, zstd_dict=zstd.ZstdDict(bodies[fields[12]], is_raw=True).as_prefix)
        assert (len(body), hashlib.sha256(body).digest()) == (fields[4], fields[3])
        bodies[record_id] = body
    assert bodies == {"r1": first, "r2": second}


# ----------------------------------------------------------------------------------------------------------------- damage


@settings(max_examples=400)
@given(st.data())
def test_any_flipped_bit_is_corrupt(data: st.DataObject) -> None:
    good = segment_bytes()
    bit = data.draw(st.integers(0, len(good) * 8 - 1))
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Corrupt):
        decode_segment(bytes(bad))
    with pytest.raises(Corrupt):
        frame_at(bytes(bad), 0)


@settings(max_examples=600)
@given(st.data())
def test_a_flipped_bit_under_a_right_checksum_is_corrupt_or_harmless_and_never_another_error(data: st.DataObject) -> None:
    good = segment_bytes()
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        bit = data.draw(st.integers(0, (len(good) - 32) * 8 - 1))
        bad[bit // 8] ^= 1 << bit % 8
    for decode in (decode_segment, decode_header, frame_offsets, lambda raw: frame_at(raw, 1)):
        try:
            decode(sealed(bytes(bad)))
        except Corrupt as error:
            assert "byte" in error.message  # noqa: PT017 - both outcomes are right


@given(st.integers(0, 2_000))
def test_truncated_segments_are_corrupt(length: int) -> None:
    good = segment_bytes()
    cut = good[: min(length, len(good) - 1)]
    with pytest.raises(Corrupt):
        decode_segment(cut)


@given(st.binary(max_size=300))
def test_random_bytes_are_corrupt(data: bytes) -> None:
    for magic in (b"", codec.SEGMENT_MAGIC, codec.BATCH_MAGIC):
        for decode in (decode_segment, decode_frames, decode_header):
            with pytest.raises(Corrupt):
                decode(magic + data)


def test_appended_bytes_are_corrupt() -> None:
    with pytest.raises(Corrupt):
        decode_segment(segment_bytes() + b"\0")


def test_a_later_format_version_is_refused_by_its_number() -> None:
    with pytest.raises(Corrupt, match="version 2 of DRSEG"):
        decode_segment(b"DRSEG\0\0\2" + segment_bytes()[8:])


def test_a_batch_is_not_a_segment() -> None:
    with pytest.raises(Corrupt, match="not a DRSEG"):
        decode_segment(encode_frames([]))


# ---------------------------------------------------------------------------------------------------------------- hostile


def hand_made(frame_bytes: bytes, count: int = 1, index: bytes = b"\x90", header: bytes | None = None) -> bytes:
    raw = msgspec.msgpack.encode(HEADER) if header is None else header
    head = codec.SEGMENT_MAGIC + struct.pack(">I", len(raw)) + raw + struct.pack(">I", zlib.crc32(raw))
    body = head + frame_bytes + index + struct.pack(">QII", len(head) + len(frame_bytes), len(index), count)
    return body + hashlib.sha256(body).digest()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (hand_made(struct.pack(">II", 2**32 - 1, 10)), "does not fit"),
        (hand_made(struct.pack(">II", 0, 2**32 - 1)), "does not fit"),
        (hand_made(struct.pack(">II", 0, 0), 2**32 - 1), "do not fit"),
        (hand_made(struct.pack(">II", 0, 0)), "not readable"),
        (hand_made(struct.pack(">II", 1, 0) + b"\xc1"), "not readable"),
        (hand_made(struct.pack(">II", 100_000, 0) + b"\x91" * 100_000), "does not fit"),
        (hand_made(struct.pack(">II", 60_000, 0) + b"\x91" * 60_000), "not readable"),
        (hand_made(struct.pack(">II", 5, 0) + b"\xdd\xff\xff\xff\xff"), "not readable"),
        (hand_made(struct.pack(">II", 5, 0) + b"\xdf\xff\xff\xff\xff"), "not readable"),
        (hand_made(b"", 0, b"\xdd\xff\xff\xff\xff"), "index is not readable"),
        (hand_made(b"", 0, b"\x91" * 50_000), "index is not readable"),
        (hand_made(b"", 0, b"\x91\x94\xa1a\xa1b\x00\x00"), "index has 1 entries for 0"),
        (hand_made(b"", 0, header=b"\x81\xa1x" + b"\x91" * 60_000), "header is not readable"),
        (hand_made(b"", 0, header=b"\x80"), "header is not readable"),
        (hand_made(b"", 0, header=b""), "header is not readable"),
        (hand_made(b"12345678"), "not readable|does not fit"),
        (hand_made(b"1234567", 0), "belong to none"),
    ],
)
def test_hostile_lengths_and_nesting_are_corrupt_at_once(data: bytes, says: str) -> None:
    with pytest.raises(Corrupt, match=says):
        decode_segment(data)


@pytest.mark.parametrize(
    "change",
    [
        {"seq": 0},
        {"seq": 2**63},
        {"seq": -1},
        {"epoch": -1},
        {"group": ""},
        {"stream": "a\nb"},
        {"prev_chain": "00"},
        {"prev_chain": "G" * 64},
        {"created_at": float("nan")},
    ],
)
def test_a_header_with_an_impossible_field_is_refused_and_corrupt(change: dict[str, object]) -> None:
    bad = replace(HEADER, **change)  # type: ignore[arg-type]
    with pytest.raises(Refused, match=next(iter(change))):
        encode_segment(bad, [])
    raw = msgspec.msgpack.encode(bad)
    with pytest.raises(Corrupt):
        decode_segment(hand_made(b"", 0, header=raw))


def test_limits_hold_for_writers_and_readers() -> None:
    item = frame("a", "r", "k", b"x" * 500)
    data = encode_segment(HEADER, [item] * 3)
    with pytest.raises(Corrupt, match="3 frames"):
        decode_segment(data, Limits(frames=2))
    with pytest.raises(Refused, match="3 frames"):
        encode_segment(HEADER, [item] * 3, Limits(frames=2))
    with pytest.raises(Corrupt, match="allowed"):
        decode_segment(data, Limits(segment_bytes=100))
    with pytest.raises(Refused, match="allowed"):
        encode_segment(HEADER, [item], Limits(segment_bytes=100))
    with pytest.raises(Corrupt, match="size 500"):
        decode_segment(data, Limits(body_bytes=499))
    with pytest.raises(Refused, match="header has"):
        encode_segment(HEADER, [frame("a", "r", "k", b"", meta={f"k{i}": "ä" * 4_000 for i in range(10)})])


def test_a_meta_value_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(Refused, match="cannot be written"):
        encode_frames([frame("a", "r", "k", b"", meta={"k": "\ud800"})])


def test_agents_may_not_claim_a_place_in_the_stream() -> None:
    with pytest.raises(Corrupt, match=ORIGIN):
        decode_frames(encode_frames([frame("a", "r", "k", b"", meta={ORIGIN: "1.0"})]))
