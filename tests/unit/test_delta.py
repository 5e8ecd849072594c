"""Bodies to frames and back."""

from __future__ import annotations

import hashlib
import random
import tracemalloc
from dataclasses import replace

import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.domain.model import Encoding, Frame, Record
from controller.errors import Corrupt, Refused
from controller.stream.delta import frame, open_frame
from controller.stream.limits import Limits

NOISE = random.Random(7).randbytes(200_000)


def raw_frame(payload: bytes, encoding: Encoding, body: bytes, *, size: int | None = None, base: str | None = None) -> Frame:
    digest = hashlib.sha256(body).hexdigest()
    return Frame(Record("a", "r", "checkpoint", digest, len(body) if size is None else size), encoding, payload, base)


@given(st.binary(max_size=5_000), st.one_of(st.none(), st.binary(max_size=5_000)))
def test_every_body_comes_back_from_its_frame(body: bytes, previous: bytes | None) -> None:
    made = frame("agent", "r2", "checkpoint", body, previous=None if previous is None else ("r1", previous))
    assert open_frame(made, previous) == body


@given(st.binary(min_size=100, max_size=3_000), st.binary(max_size=40), st.integers(0, 3_000))
def test_an_edited_state_comes_back_from_its_delta(previous: bytes, edit: bytes, at: int) -> None:
    body = previous[:at] + edit + previous[at:]
    made = frame("agent", "r2", "checkpoint", body, previous=("r1", previous))
    assert open_frame(made, previous) == body
    assert len(made.payload) <= len(body)


def test_the_encoding_is_the_one_that_saves() -> None:
    text = b"the agent called a tool and the tool answered; " * 100
    assert frame("a", "r", "k", b"tiny").encoding is Encoding.RAW
    assert frame("a", "r", "k", NOISE).encoding is Encoding.RAW
    assert frame("a", "r", "k", text).encoding is Encoding.ZSTD
    grown = frame("a", "r2", "k", NOISE + b"one more step", previous=("r1", NOISE))
    assert (grown.encoding, grown.base) == (Encoding.DELTA, "r1")
    assert len(grown.payload) < 1_000
    assert frame("a", "r2", "k", NOISE[:100_000], previous=("r1", NOISE[100_000:])).encoding is Encoding.RAW


def test_large_states_still_find_all_of_their_predecessor() -> None:
    previous = random.Random(3).randbytes(6_000_000)
    made = frame("a", "r2", "k", previous[:3_000_000] + b"edit" + previous[3_000_000:], previous=("r1", previous))
    assert made.encoding is Encoding.DELTA
    assert len(made.payload) < 10_000
    assert len(open_frame(made, previous)) == 6_000_004


def test_frames_are_deterministic() -> None:
    assert frame("a", "r", "k", NOISE[:999] * 3, meta={"b": "1", "a": "2"}) == frame(
        "a", "r", "k", NOISE[:999] * 3, meta={"a": "2", "b": "1"}
    )


def test_a_zip_bomb_is_refused_without_being_inflated() -> None:
    bomb = zstd.compress(b"\0" * 200_000_000)
    tracemalloc.start()
    with pytest.raises(Corrupt, match="more than the 100 bytes"):
        open_frame(raw_frame(bomb, Encoding.ZSTD, b"\0" * 100))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_a_declared_size_beyond_the_limit_is_refused_before_anything_is_inflated() -> None:
    with pytest.raises(Corrupt, match="size 1000 is outside"):
        open_frame(raw_frame(zstd.compress(b"x" * 1000), Encoding.ZSTD, b"x" * 1000), None, Limits(body_bytes=999))


def test_a_frame_that_wants_a_huge_window_is_refused() -> None:
    options = {zstd.CompressionParameter.window_log: 30, zstd.CompressionParameter.content_size_flag: 0}
    compressor = zstd.ZstdCompressor(options=options)
    payload = compressor.compress(b"x" * 1000) + compressor.flush()
    with pytest.raises(Corrupt):
        open_frame(raw_frame(payload, Encoding.ZSTD, b"x" * 1000))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: replace(f, payload=f.payload[:-1]), "ends early|zstd|decompress"),
        (lambda f: replace(f, payload=f.payload + b"!"), "after the compressed data"),
        (lambda f: replace(f, payload=f.payload + f.payload), "after the compressed data"),
        (lambda f: replace(f, payload=b""), "ends early"),
        (lambda f: replace(f, record=replace(f.record, size=f.record.size + 1)), "the body has"),
        (lambda f: replace(f, record=replace(f.record, size=f.record.size - 1)), "more than"),
        (lambda f: replace(f, record=replace(f.record, sha256="0" * 64)), "sha256"),
        (lambda f: replace(f, encoding=Encoding.RAW), "raw payload"),
        (lambda f: replace(f, encoding=Encoding.DELTA), "belongs to a delta"),
        (lambda f: replace(f, base="r0"), "belongs to a delta"),
        (lambda f: replace(f, encoding=Encoding.DELTA, base="r0"), "not given"),
        (lambda f: replace(f, encoding=Encoding.DELTA, base="r"), "own base"),
    ],
)
def test_a_frame_that_is_not_what_it_says_is_corrupt(change, says) -> None:  # type: ignore[no-untyped-def]
    good = frame("a", "r", "k", b"state " * 100)
    with pytest.raises(Corrupt, match=says) as caught:
        open_frame(change(good))
    assert "'r'" in caught.value.message
    assert "'a'" in caught.value.message


def test_a_delta_opened_with_another_base_is_corrupt() -> None:
    made = frame("a", "r2", "k", NOISE + b"x", previous=("r1", NOISE))
    for base in (NOISE[1:], NOISE[:-1] + b"?", b"short", b""):
        with pytest.raises(Corrupt):
            open_frame(made, base)


@settings(max_examples=300)
@given(st.binary(max_size=400), st.sampled_from([Encoding.ZSTD, Encoding.DELTA]))
def test_random_payloads_are_corrupt_and_nothing_else(payload: bytes, encoding: Encoding) -> None:
    base = "r0" if encoding is Encoding.DELTA else None
    with pytest.raises(Corrupt):
        open_frame(raw_frame(payload, encoding, b"x" * 300, base=base), b"y" * 300 if base else None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("agent", ""),
        ("agent", "x" * 201),
        ("agent", "a\x00b"),
        ("agent", "a\u202eb"),
        ("agent", "a\nb"),
        ("agent", "a\ud800b"),
        ("id", "x" * 301),
        ("kind", ""),
        ("parent", "p\x1b[2J"),
        ("copies", 0),
        ("attempt", -1),
        ("attempt", 2**63),
        ("created_at", float("nan")),
        ("created_at", float("inf")),
        ("meta", {"k": "v" * 9_000}),
        ("meta", {"": "v"}),
        ("meta", {"k": 1}),
        ("meta", {f"k{i}": "v" for i in range(65)}),
    ],
)
def test_a_record_beyond_the_limits_is_refused_with_the_field_named(field: str, value: object) -> None:
    with pytest.raises(Refused, match=field):
        frame(**{"agent": "a", "id": "r", "kind": "k", "body": b"", field: value})  # type: ignore[arg-type]


def test_odd_but_honest_names_are_accepted() -> None:
    for agent in ("../../etc/passwd", "агент", "エージェント", "a b/c%2F", "🤖", "x" * 200):
        assert frame(agent, "r", "k", b"").record.agent == agent


def test_a_body_beyond_the_limit_is_refused() -> None:
    with pytest.raises(Refused, match="allowed are 10"):
        frame("a", "r", "k", b"x" * 11, limits=Limits(body_bytes=10))
