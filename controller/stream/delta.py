"""Bodies to frames and back: raw, zstd, or zstd with the agent's previous body as prefix (a delta).

Successive states of an agent repeat most of their bytes, in long runs, and zstd finds them in a prefix at more than 1 GB/s,
when it searches for nothing else: its fastest strategy, with a window that covers prefix and body and a hash table that grows
with them. Measured against level 3 (with long-distance matching from 1 MiB on): half the time at 80 KB for 3 % more bytes, a
third to a fourth of the time at 720 KB and 2 MB for as many.

Opening a frame is bounded by what its record declares: never more than ``size + 1`` bytes are produced, whatever the payload
says, and the window is capped. Pure; safe to import by agents.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from controller.domain.model import Encoding, Frame, Record
from controller.errors import Corrupt, Refused
from controller.stream.limits import DEFAULT_LIMITS, Limits, frame_problem

if TYPE_CHECKING or sys.version_info < (3, 14):
    from backports import zstd
else:
    from compression import zstd

LEVEL = 3
SMALL = 64
"""Bytes below which compression is not tried: zstd's own frame costs about a dozen."""
_WINDOW_LOG_MAX = 27
"""Window of 128 MiB: twice the largest body, so that a prefix of the greatest size is reachable in full."""
_WINDOW_LOG_MIN = 10
_HASH_LOG_MIN = 13
_HASH_LOG_LESS = 4
"""The hash table has an entry for every 16 bytes of the window; with fewer, states of 720 KB and more lose matches."""
_FAST = 1
"""``ZSTD_fast``."""
_MIN_MATCH = 6
_MIN_PREFIX = 8
"""zstd's own minimum for raw dictionary content."""

_PLAIN: dict[int, int] = {zstd.CompressionParameter.compression_level: LEVEL}
_BOUNDED: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG_MAX}


def _compress_against(prefix: bytes, body: bytes) -> bytes:
    window_log = min(_WINDOW_LOG_MAX, max(_WINDOW_LOG_MIN, (len(prefix) + len(body)).bit_length()))
    options: dict[int, int] = {
        zstd.CompressionParameter.compression_level: 1,
        zstd.CompressionParameter.strategy: _FAST,
        zstd.CompressionParameter.min_match: _MIN_MATCH,
        zstd.CompressionParameter.window_log: window_log,
        zstd.CompressionParameter.hash_log: max(_HASH_LOG_MIN, window_log - _HASH_LOG_LESS),
    }
    return zstd.compress(body, options=options, zstd_dict=zstd.ZstdDict(prefix, is_raw=True).as_prefix)


def _smallest(body: bytes, previous: tuple[str, bytes] | None) -> tuple[Encoding, bytes, str | None]:
    """The encoding to use. A delta has to earn its dependence: it must save at least half against the body or against zstd."""
    if len(body) < SMALL:
        return Encoding.RAW, body, None
    delta: bytes | None = None
    if previous is not None and len(previous[1]) >= _MIN_PREFIX:
        delta = _compress_against(previous[1], body)
        if len(delta) * 8 <= len(body):
            return Encoding.DELTA, delta, previous[0]
    plain = zstd.compress(body, options=_PLAIN)
    if previous is not None and delta is not None and len(delta) * 2 <= min(len(plain), len(body)):
        return Encoding.DELTA, delta, previous[0]
    if len(plain) * 20 <= len(body) * 19:
        return Encoding.ZSTD, plain, None
    return Encoding.RAW, body, None


def frame(
    agent: str,
    id: str,  # noqa: A002 - the word that Record uses
    kind: str,
    body: bytes,
    *,
    parent: str | None = None,
    created_at: float = 0.0,
    received_at: float = 0.0,
    copies: int = 1,
    attempt: int = 0,
    meta: Mapping[str, str] | None = None,
    previous: tuple[str, bytes] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Frame:
    """One record with its body, encoded the smallest way. ``previous``: id and body of an earlier record of the same agent
    that the reader will have warm (its latest of this kind); None cuts the chain of deltas. Deterministic.
    Raises Refused naming the field and the value when a limit is broken."""
    if len(body) > limits.body_bytes:
        raise Refused(
            f"record {ascii(id)[:120]} of agent {ascii(agent)[:120]}: "
            f"the body has {len(body)} bytes, allowed are {limits.body_bytes}",
            hint="keep large artefacts in object storage and record their address",
        )
    encoding, payload, base = _smallest(body, previous if previous is None or previous[0] != id else None)
    made = Frame(
        Record(
            agent=agent,
            id=id,
            kind=kind,
            sha256=hashlib.sha256(body).hexdigest(),
            size=len(body),
            parent=parent,
            created_at=float(created_at),
            received_at=float(received_at),
            copies=copies,
            attempt=attempt,
            meta=dict(meta) if meta else {},
        ),
        encoding,
        payload,
        base,
    )
    problem = frame_problem(made, limits)
    if problem is not None:
        raise Refused(f"record {ascii(id)[:120]} of agent {ascii(agent)[:120]}: {problem}", hint="correct the named field")
    return made


def _inflate(payload: bytes, size: int, prefix: bytes | None) -> bytes:
    """Exactly one zstd frame of exactly ``size`` bytes. Raises ValueError saying what is wrong; ZstdError from zstd itself."""
    if prefix is None:
        decompressor = zstd.ZstdDecompressor(options=_BOUNDED)
    else:
        decompressor = zstd.ZstdDecompressor(zstd_dict=zstd.ZstdDict(prefix, is_raw=True).as_prefix, options=_BOUNDED)
    body = decompressor.decompress(payload, max_length=size + 1)
    if len(body) > size:
        raise ValueError(f"it decompresses to more than the {size} bytes that its record says")
    if not decompressor.eof:
        raise ValueError(f"the compressed data ends early, after {len(body)} of {size} bytes")
    if decompressor.unused_data:
        raise ValueError("there are bytes after the compressed data")
    return body


def open_frame(frame: Frame, base_body: bytes | None = None, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The full body, its size and hash verified. ``base_body``: the body of ``frame.base``, needed for a delta only.
    Memory is bounded by the declared size, which must itself be within the limits. Raises Corrupt naming agent and record."""
    record = frame.record
    problem = frame_problem(frame, limits)
    body = b""
    if problem is None:
        try:
            body = _open(frame, base_body)
        except (zstd.ZstdError, ValueError) as error:
            problem = str(error)
    if problem is None and len(body) != record.size:
        problem = f"the body has {len(body)} bytes, its record says {record.size}"
    if problem is None and hashlib.sha256(body).hexdigest() != record.sha256:
        problem = "the body's sha256 is not the one that its record says"
    if problem is not None:
        raise Corrupt(
            f"record {ascii(record.id)[:320]} of agent {ascii(record.agent)[:220]}: {problem}",
            hint="do not use this body; read the record from another region's store",
        )
    return body


def _open(frame: Frame, base_body: bytes | None) -> bytes:
    if frame.encoding is Encoding.RAW:
        return frame.payload
    if frame.encoding is Encoding.ZSTD:
        return _inflate(frame.payload, frame.record.size, None)
    if base_body is None:
        raise ValueError(f"it is a delta against {frame.base!a}, whose body was not given")
    if len(base_body) < _MIN_PREFIX:
        raise ValueError(f"it is a delta against {frame.base!a}, which has only {len(base_body)} bytes")
    return _inflate(frame.payload, frame.record.size, base_body)
