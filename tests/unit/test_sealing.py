"""The bytes of a sealed object: opened as FORMAT.md says by another program, and by nobody who changed or moved them."""

from __future__ import annotations

import hashlib
import hmac
import random
import zlib

import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.adapters import sealing
from controller.adapters.sealing import CHUNK_BYTES, DataKey, Envelope, Place, Wrap
from controller.domain.model import SegmentRef, SnapshotRef
from controller.errors import Corrupt
from controller.stream.segment import decode_segment

KEY = DataKey.of(bytes(range(32)))
WRAPS = (Wrap("eu-west-1", b"w" * 184), Wrap("us-east-1", b"v" * 184))
PLACE = Place.of("fleet", SegmentRef("s00", 7, 3))
LARGE = random.Random(1).randbytes(3 * CHUNK_BYTES + 1)


def sealed(data: bytes, *, key: DataKey = KEY, place: Place = PLACE, wraps: tuple[Wrap, ...] = WRAPS) -> bytes:
    return sealing.seal(key, sealing.envelope_for(key, wraps, place, data), data)


def opened(data: bytes, *, key: DataKey = KEY) -> bytes:
    found = sealing.read_envelope(data)
    assert found is not None
    return sealing.open_sealed(key, found[0], data, found[1])


def another_program(data: bytes, plain_key: bytes, first: int = 0, length: int | None = None) -> bytes:
    """Reads ``length`` plain bytes from ``first`` on: written from FORMAT.md alone."""
    header_length = int.from_bytes(data[8:12], "big")
    packed = data[12 : 12 + header_length]
    begin = 12 + header_length + 4
    assert data[:8] == b"DRENC\x00\x00\x01"
    assert data[begin - 4 : begin] == zlib.crc32(packed).to_bytes(4, "big")
    head = msgspec.msgpack.decode(packed)
    assert hmac.digest(plain_key, b"agent-dr data key", "sha256")[:16] == head["key"]
    context = msgspec.msgpack.encode([head[name] for name in ("kind", "group", "stream", "seq", "epoch")])
    context += msgspec.msgpack.encode([head[name] for name in ("size", "chunk", "key", "salt")])
    cipher = AESGCM(hmac.digest(plain_key, b"agent-dr object key" + context, "sha256"))
    last = max(0, -(-head["size"] // head["chunk"]) - 1)
    end = head["size"] if length is None else first + length
    plain = b""
    for number in range(first // head["chunk"], min(last, max(0, end - 1) // head["chunk"]) + 1):
        at = begin + number * (head["chunk"] + 16)
        nonce = number.to_bytes(11, "big") + bytes([number == last])
        plain += cipher.decrypt(nonce, data[at : at + head["chunk"] + 16], context)
    skip = first - first // head["chunk"] * head["chunk"]
    return plain[skip : skip + end - first]


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES])
def test_what_is_sealed_opens_again_here_and_in_another_program(size: int) -> None:
    data = random.Random(size).randbytes(size)
    there = sealed(data)
    assert opened(there) == data
    assert another_program(there, KEY.plain) == data
    if size > 16:
        assert data[:16] not in there


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(LARGE) - 1), st.integers(1, 2 * CHUNK_BYTES))
def test_a_part_is_read_from_its_chunks_alone(first: int, length: int) -> None:
    there = bytearray(sealed(LARGE))
    found = sealing.read_envelope(bytes(there))
    assert found is not None
    for number in range(4):  # no other chunk is needed: they are wiped
        if not first // CHUNK_BYTES <= number <= (first + length - 1) // CHUNK_BYTES:
            at = found[1] + number * (CHUNK_BYTES + 16)
            there[at : at + CHUNK_BYTES + 16] = bytes(min(CHUNK_BYTES + 16, len(there) - at))
    assert another_program(bytes(there), KEY.plain, first, min(length, len(LARGE) - first)) == LARGE[first : first + length]


def test_sealing_again_gives_the_same_bytes_and_other_content_shares_nothing() -> None:
    assert sealed(LARGE) == sealed(LARGE)
    one, other = sealed(LARGE), sealed(LARGE[:-1] + b"!")
    begin = len(one) - 4 * 16 - len(LARGE)
    assert one[begin : begin + 64] != other[begin : begin + 64], "one key and nonce for two contents"
    same_bytes_elsewhere = sealed(LARGE, place=Place.of("fleet", SegmentRef("s00", 8, 3)))
    assert one[begin : begin + 64] != same_bytes_elsewhere[begin : begin + 64]
    more = sealed(LARGE, wraps=WRAPS[:1])
    assert more[-1000:] == one[-1000:], "wraps are not part of what is sealed: a copy may have more of them"
    assert opened(more) == LARGE


def test_every_flipped_bit_is_found() -> None:
    data = b"a checkpoint that took hours"
    there = sealed(data)
    for at in range(len(there)):
        for bit in range(8):
            bad = bytearray(there)
            bad[at] ^= 1 << bit
            try:
                found = sealing.read_envelope(bytes(bad))
                if found is None:
                    assert at < 6, "only a damaged magic makes it another kind of object"
                    continue
                with pytest.raises(Corrupt):
                    sealing.open_sealed(KEY, found[0], bytes(bad), found[1])
            except Corrupt:
                continue


@pytest.mark.parametrize("cut", [1, 16, 17, CHUNK_BYTES, CHUNK_BYTES + 16, CHUNK_BYTES + 17])
def test_a_cut_or_longer_object_does_not_open(cut: int) -> None:
    there = sealed(LARGE)
    with pytest.raises(Corrupt):
        opened(there[:-cut])
    with pytest.raises(Corrupt, match="behind its last chunk"):
        opened(there + b"x" * cut)


def test_chunks_do_not_change_places_and_a_shorter_object_is_not_made_of_a_longer_one() -> None:
    there = sealed(LARGE)
    found = sealing.read_envelope(there)
    assert found is not None
    begin, step = found[1], CHUNK_BYTES + 16
    swapped = there[:begin] + there[begin + step : begin + 2 * step] + there[begin : begin + step] + there[begin + 2 * step :]
    with pytest.raises(Corrupt, match="2 of 4 chunks"):
        opened(swapped)
    shorter = msgspec.structs.replace(found[0], size=2 * CHUNK_BYTES)
    with pytest.raises(Corrupt):
        sealing.open_sealed(KEY, shorter, there[begin : begin + 2 * step], 0)


def test_an_object_opens_under_its_own_name_only() -> None:
    found = sealing.read_envelope(sealed(LARGE))
    assert found is not None
    there, (envelope, begin) = sealed(LARGE), found
    claims: list[Envelope] = [
        msgspec.structs.replace(envelope, **{name: value})
        for name, value in {
            "group": "other",
            "stream": "s01",
            "seq": 8,
            "epoch": 4,
            "kind": "snapshot",
            "salt": bytes(32),
        }.items()
    ]
    for claim in claims:
        with pytest.raises(Corrupt, match="4 of 4 chunks"):
            sealing.open_sealed(KEY, claim, there, begin)
    with pytest.raises(Corrupt):
        sealing.open_sealed(DataKey.of(bytes(32)), envelope, there, begin)
    assert Place.of("fleet", SnapshotRef("s00", 7, 3)) != PLACE


def test_damage_costs_one_chunk_of_what_can_still_be_looked_at() -> None:
    there = bytearray(sealed(LARGE))
    found = sealing.read_envelope(bytes(there))
    assert found is not None
    there[found[1] + CHUNK_BYTES + 16 + 5] ^= 1
    looked = sealing.open_damaged(KEY, found[0], bytes(there), found[1])
    assert looked[:CHUNK_BYTES] == LARGE[:CHUNK_BYTES]
    assert looked[CHUNK_BYTES : 2 * CHUNK_BYTES] == bytes(CHUNK_BYTES)
    assert looked[2 * CHUNK_BYTES :] == LARGE[2 * CHUNK_BYTES :]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"size": 2**50}, "ends before"),
        ({"chunk": 1}, "says chunk 1"),
        ({"size": -1}, "size -1"),
        ({"wraps": ()}, "0 wraps"),
        ({"wraps": WRAPS * 9}, "18 wraps"),
    ],
)
def test_a_header_that_promises_too_much_is_refused_before_memory_is_spent(change: dict[str, object], says: str) -> None:
    envelope = msgspec.structs.replace(sealing.envelope_for(KEY, WRAPS, PLACE, b"x"), **change)
    header = msgspec.msgpack.encode(envelope)
    made = b"DRENC\x00\x00\x01" + len(header).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big") + b"x" * 17
    with pytest.raises(Corrupt, match=says):
        opened(made)


def test_a_newer_version_says_what_to_do() -> None:
    newer = bytearray(sealed(b"x"))
    newer[7] = 2
    with pytest.raises(Corrupt, match="format version 2, this program reads 1") as error:
        opened(bytes(newer))
    assert "upgrade" in error.value.hint


def test_what_does_not_begin_so_is_not_sealed() -> None:
    assert sealing.read_envelope(b"DRSEG\x00\x00\x01whatever") is None
    assert sealing.read_envelope(b"") is None
    with pytest.raises(Corrupt):
        sealing.read_envelope(b"DRENC\x00")


def test_who_reads_segments_without_opening_them_first_is_told_that_this_one_is_sealed() -> None:
    with pytest.raises(Corrupt, match="the object is sealed"):
        decode_segment(sealed(b"x"))


def test_a_plain_key_is_never_shown() -> None:
    shown = f"{KEY!r} {KEY} {[KEY]} {sealing.envelope_for(KEY, WRAPS, PLACE, b'x')}"
    for secret in (KEY.plain.hex(), repr(KEY.plain)[2:-1], str(list(KEY.plain))):
        assert secret not in shown
    assert KEY.name != hashlib.sha256(KEY.plain).digest()[:16]
