"""Segments, batches and bodies that are wrong *inside a right envelope*: whoever made them knew the format.

Flipped bits and plain garbage are in ``tests/unit/test_segment.py`` and ``test_delta.py``. Here every field is replaced by
something that it must not be, lengths lie, bodies inflate, and the checksum is right.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import msgspec
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from controller.adapters.memory.gate import OpenGate
from controller.adapters.memory.region_store import MemoryRegionStore, MemoryStore
from controller.domain.model import GENESIS, Encoding, Fence, Frame, Record, SegmentRef
from controller.errors import Corrupt, Refused
from controller.lab.virtual_time import VirtualClock, run_virtual
from controller.stream.follower import Follower
from controller.stream.history import Tail
from controller.stream.proving import PROVEN_MAX_BYTES
from controller.stream.segment import (
    BATCH_MAGIC,
    SEGMENT_MAGIC,
    decode_frames,
    decode_header,
    decode_segment,
    frame_at,
    frame_offsets,
    next_chain,
    open_frame,
)
from controller.stream.view import View
from controller.stream.writer import StreamWriter, WriterLimits
from tests.support.segments import GROUP, Built, History

MIB = 2**20

# Whatever MessagePack can say, small and hostile.
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=40),
    st.sampled_from(["", "\x00", "../../etc/passwd", "a\u202eb", "x" * 400, "0" * 64, "é" * 300]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(0, 9), inner, max_size=4),
    max_leaves=8,
)


def nested(depth: int) -> bytes:
    """MessagePack: an array in an array in an array …"""
    return b"\x91" * depth + b"\xc0"


def header_of(**changes: object) -> dict[str, object]:
    return {"group": GROUP, "stream": "0", "seq": 1, "epoch": 1, "prev_chain": GENESIS, "created_at": 1.0, **changes}


def frame_header(body: bytes, **changes: object) -> list[object]:
    fields: dict[str, object] = {
        "agent": "a",
        "id": "1",
        "kind": "checkpoint",
        "sha256": hashlib.sha256(body).digest(),
        "size": len(body),
        "parent": None,
        "created_at": 1.0,
        "received_at": 1.0,
        "copies": 1,
        "attempt": 0,
        "meta": {},
        "encoding": 0,
        "base": None,
    }
    assert set(changes) <= set(fields)
    return list({**fields, **changes}.values())


def seal(
    header: bytes,
    frames: list[tuple[bytes, bytes]],
    *,
    magic: bytes = SEGMENT_MAGIC,
    index: bytes | None = None,
    count: int = -1,
) -> bytes:
    """Frames (header bytes, payload) in a right envelope: lengths, index, CRC and SHA-256 are what they must be."""
    data = magic + struct.pack(">I", len(header)) + header + struct.pack(">I", zlib.crc32(header))
    places = []
    for head, payload in frames:
        one = struct.pack(">II", len(head), len(payload)) + head + payload
        try:
            fields = msgspec.msgpack.decode(head)
        except (msgspec.MsgspecError, RecursionError, ValueError):
            fields = None
        agent, record = [*fields, "", ""][:2] if isinstance(fields, list) else ("", "")
        places.append([agent, record, len(data), len(one)])
        data += one
    end = len(data)
    footer = b"" if magic == BATCH_MAGIC else msgspec.msgpack.encode(places) if index is None else index
    data += footer + struct.pack(">QII", end, len(footer), len(frames) if count < 0 else count)
    return data + hashlib.sha256(data).digest()


def packed(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


READERS: tuple[Callable[[bytes], object], ...] = (
    decode_header,
    decode_segment,
    decode_frames,
    frame_offsets,
    lambda data: frame_at(data, 0),
    lambda data: frame_at(data, 2**40),
    lambda data: [open_frame(one) for one in decode_segment(data).frames],
)


def only_corrupt(data: bytes) -> None:
    """Every reader says Corrupt, or takes it: never another error."""
    for read in READERS:
        try:
            read(data)
        except Corrupt as corrupt:
            short = len(corrupt.message) < 2000
            assert short, "an error must not repeat what was sent"


@given(st.sampled_from(list(header_of())), VALUES)
def test_a_segment_header_with_any_value_in_any_field_is_read_or_corrupt(field: str, value: object) -> None:
    only_corrupt(seal(packed(header_of(**{field: value})), [(packed(frame_header(b"x")), b"x")]))


@given(st.integers(0, 12), VALUES, st.binary(max_size=30))
def test_a_frame_with_any_value_in_any_field_is_read_or_corrupt(number: int, value: object, body: bytes) -> None:
    fields = frame_header(body)
    fields[number] = value
    frames = [(packed(fields), body)]
    only_corrupt(seal(packed(header_of()), frames))
    only_corrupt(seal(b"", frames, magic=BATCH_MAGIC))


@given(VALUES)
def test_an_index_that_is_anything_is_corrupt(value: object) -> None:
    only_corrupt(seal(packed(header_of()), [(packed(frame_header(b"x")), b"x")], index=packed(value)))


@given(VALUES, st.integers(0, 2**32 - 1))
def test_a_frame_header_that_is_anything_and_a_count_that_lies_are_corrupt(value: object, count: int) -> None:
    only_corrupt(seal(packed(header_of()), [(packed(value), b"x")], count=count))


@pytest.mark.parametrize("depth", [100, 5_000, 60_000])
def test_nesting_to_any_depth_is_corrupt(depth: int) -> None:
    deep = nested(depth)
    only_corrupt(seal(deep, []))
    only_corrupt(seal(packed(header_of()), [(deep, b"")]))
    only_corrupt(seal(packed(header_of()), [(packed(frame_header(b"x")), b"x")], index=deep))
    fields = frame_header(b"x")
    broken = packed(fields[:10])
    only_corrupt(seal(packed(header_of()), [(b"\x9d" + broken[1:] + deep, b"x")]))


@given(st.binary(max_size=60), st.sampled_from(Encoding), st.integers(0, 2**26), st.binary(max_size=30))
def test_a_payload_that_is_anything_opens_as_its_hash_says_or_is_corrupt(
    payload: bytes, encoding: Encoding, size: int, base: bytes
) -> None:
    record = Record("a", "2", "checkpoint", hashlib.sha256(payload).hexdigest(), size)
    right = encoding is Encoding.RAW and size == len(payload)
    with contextlib.nullcontext() if right else pytest.raises(Corrupt):
        open_frame(Frame(record, encoding, payload, "1" if encoding is Encoding.DELTA else None), base)


# -------------------------------------------------------------------------------------------------------- poisoned history


def follow(data: bytes, history: History) -> tuple[list[str], int, int]:
    """A follower on a store whose newest segment, committed under its own hash, is ``data``. What it said, where it stood, and
    where it came to once that segment had been replaced by a right one."""
    poison = Built(SegmentRef("0", history.seq + 1, 1), data, next_chain(history.chain, data))
    poisoned = History("0", [*history.segments, poison])
    repaired = History("0", list(history.segments), dict(history.states), dict(history.bodies), dict(history.depth))
    repaired.add([repaired.step("a", "right", 7)])
    said: list[str] = []

    async def story() -> tuple[int, int]:
        server = MemoryStore("eu-west-1")
        view = View(None)
        follower = Follower(MemoryRegionStore(server, OpenGate()), view, "0", VirtualClock(), GROUP)
        poisoned.install(server)
        for _ in range(3):
            try:
                await follower.step()
            except Corrupt as error:
                said.append(error.message)
        stood = follower.position().seq
        for agent in history.states:  # what was indexed before is still served
            view.latest(agent)
        server.drop(poison.ref)
        repaired.install(server)
        for _ in range(4):
            await follower.step()
        return stood, follower.position().seq

    stood, came_to = run_virtual(story(), limit_seconds=60)
    return said, stood, came_to


def placed(history: History, frames: list[tuple[bytes, bytes]]) -> bytes:
    return seal(packed(header_of(seq=history.seq + 1, prev_chain=history.chain)), frames)


@given(st.integers(0, 12), VALUES, st.binary(max_size=30))
def test_a_committed_segment_with_any_value_in_a_frame_never_ends_a_follower(number: int, value: object, body: bytes) -> None:
    history = History().grow(2)
    fields = frame_header(body)
    fields[number] = value
    said, stood, came_to = follow(placed(history, [(packed(fields), body)]), history)
    assert (len(said), stood) in {(3, history.seq), (0, history.seq + 1)}
    assert came_to == history.seq + 1


@given(
    st.lists(
        st.tuples(st.sampled_from(["1", "2", "e1s2", "nobody"]), st.sampled_from([None, "1", "2", "3", "e1s2"])), max_size=6
    )
)
def test_deltas_that_stand_on_each_other_in_any_way_never_end_a_follower(links: list[tuple[str, str | None]]) -> None:
    """Cycles, bases that come later, bases of other agents, the same id twice."""
    history = History().grow(2)
    frames = []
    for number, (record, base) in enumerate(links):
        body = f"body {number}".encode() * 20
        payload = zstd.compress(body)
        fields = frame_header(body, agent="agent-0", id=record, encoding=1 if base is None else 2, base=base)
        frames.append((packed(fields), payload))
    _, _, came_to = follow(placed(history, frames), history)
    assert came_to == history.seq + 1


@pytest.mark.parametrize("why", ["inflates to more than it says", "inflates to 64 MiB, as it says, and has another hash"])
def test_a_body_that_inflates_stops_the_copy_and_takes_bounded_memory(why: str) -> None:
    history = History().grow(2)
    bomb = zstd.compress(bytes(64 * MIB))
    assert len(bomb) < 64 * 1024
    size = 64 * MIB if "as it says" in why else 1000
    fields = frame_header(b"", id="bomb", encoding=1, size=size)
    data = placed(history, [(packed(fields), bomb)] * 6)
    tracemalloc.start()
    try:
        said, stood, _ = follow(data, history)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(said) == 3
    assert stood == history.seq
    assert peak < 3 * 64 * MIB, f"{peak / MIB:.0f} MiB at the peak"


def test_bodies_that_are_right_and_inflate_to_more_than_the_memory_are_indexed_one_after_the_other() -> None:
    """20 KiB of segment, 640 MiB of bodies: whoever reads it holds what it proves beforehand, and no more."""
    history = History().grow(2)
    body = bytes(64 * MIB)
    bomb, digest = zstd.compress(body), hashlib.sha256(body).digest()
    del body
    frames = [
        (packed(frame_header(b"", agent=f"b{n}", id="1", encoding=1, size=64 * MIB, sha256=digest)), bomb) for n in range(10)
    ]
    tracemalloc.start()
    try:
        said, stood, _ = follow(placed(history, frames), history)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert said == []
    assert stood == history.seq + 1
    assert peak < PROVEN_MAX_BYTES + 4 * 64 * MIB, f"{peak / MIB:.0f} MiB at the peak"


# ------------------------------------------------------------------------------------------------------- a holder's intake


def test_a_small_batch_whose_bodies_inflate_to_gigabytes_is_refused_before_they_do() -> None:
    """An agent may send 64 MiB of batch; what it declares to be inside is bounded, too."""
    body = bytes(64 * MIB)
    bomb, digest = zstd.compress(body), hashlib.sha256(body).hexdigest()
    del body
    frames = [Frame(Record("a", str(n), "checkpoint", digest, 64 * MIB), Encoding.ZSTD, bomb) for n in range(100)]
    assert sum(len(one.payload) for one in frames) < MIB

    tracemalloc.start()
    try:
        with pytest.raises(Refused, match="bodies of 6710886400 bytes"):
            run_virtual(_submit(frames), limit_seconds=60)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * MIB, f"{peak / MIB:.0f} MiB at the peak"


async def _submit(frames: list[Frame]) -> object:
    clock = VirtualClock()
    fence = Fence("0", 1, "eu-west-1", "a")
    store = MemoryRegionStore(MemoryStore("eu-west-1"), OpenGate())
    head = await store.fence(fence)
    writer = StreamWriter(
        group=GROUP,
        fence=fence,
        stores={"eu-west-1": store},
        home="eu-west-1",
        home_head=head,
        tail=Tail(0, GENESIS, ()),
        view=View(None),
        clock=clock,
        may_act=lambda: True,
        on_lost=lambda why: None,
        limits=WriterLimits(),
    )
    writer.start()
    try:
        return await writer.submit(frames)
    finally:
        await writer.stop("the test is over")
