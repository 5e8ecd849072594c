"""How large and how odd anything that arrives may be. Checked when encoding (``Refused``) and when decoding (``Corrupt``).

The limits are part of the format: all controllers and agents of a group use the same ones, because what one accepts every
other has to be able to read back. Names of agents, ids and kinds are shown to people, so they carry no control characters,
no line separators and no bidirectional overrides; the set is fixed here (not by ``str.isprintable``, which differs between
Unicode versions and so between Python versions).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from controller.domain.model import Encoding, Frame, Record

ORIGIN = "dr.origin"
"""Reserved ``meta`` key: ``"{seq}.{ordinal}"`` of the place where a carried-forward record stood first. It keeps the order of
an agent's records right in copies that begin after that place. Agents may not set it."""

RESERVED = "dr."
"""Keys of ``meta`` that begin so belong to controllers: a batch that sets one is refused."""

RESTORED = "dr.restored_from"
UPTO = "dr.restored_upto"
"""``meta`` of a record that gives an earlier state back: the id of the record whose body it repeats, and of the last record of
the agent at that time. Everything between that one and this record is stepped over: still there, and no state any more."""

ORIGIN_BYTES = 64
"""More than that entry takes. New records leave so much room in their header."""

MAX_CHAIN = 64
"""Deltas that may stand on each other before a whole body: reading one record costs at most one GET more than this."""

_FORBIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_HASH = re.compile(r"[0-9a-f]{64}\Z")
_INT64 = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds, inclusive. Bytes unless the name says otherwise."""

    segment_bytes: int = 96 * 2**20
    frames: int = 65_535
    header_bytes: int = 64 * 2**10
    body_bytes: int = 64 * 2**20
    agent_chars: int = 200
    id_chars: int = 300
    kind_chars: int = 64
    meta_entries: int = 64
    meta_key_chars: int = 200
    meta_value_chars: int = 8192
    copies: int = 16
    seq: int = 2**46
    """Larger sequence numbers are damage, not age: at 50 segments a second this lasts 40,000 years."""


DEFAULT_LIMITS = Limits()


def is_hash(value: str) -> bool:
    """Whether this is a SHA-256 in the one form that is accepted: 64 lower-case hex digits."""
    return _HASH.match(value) is not None


def name_problem(what: str, value: str, max_chars: int) -> str | None:
    """What is wrong with a name that people will see, or None."""
    if not 1 <= len(value) <= max_chars:
        return f"{what} has {len(value)} characters, allowed are 1..{max_chars}"
    if _FORBIDDEN.search(value):
        return f"{what} {value!a} contains a control, line-separating or bidirectional character"
    return None


def _well_formed(record: Record, limits: Limits) -> bool:
    """The same rules as ``record_problem``, meta aside, in one look: nearly every record passes, and every one is asked thrice
    (when it comes, when it is opened, when it is written)."""
    agent, name, kind, parent = record.agent, record.id, record.kind, record.parent
    return (
        0 < len(agent) <= limits.agent_chars
        and 0 < len(name) <= limits.id_chars
        and 0 < len(kind) <= limits.kind_chars
        and (parent is None or 0 < len(parent) <= limits.id_chars)
        and _FORBIDDEN.search(f"{agent}{name}{kind}{parent}") is None
        and _HASH.match(record.sha256) is not None
        and 0 <= record.size <= limits.body_bytes
        and math.isfinite(record.created_at)
        and math.isfinite(record.received_at)
        and 1 <= record.copies <= limits.copies
        and 0 <= record.attempt <= _INT64
    )


def record_problem(record: Record, limits: Limits) -> str | None:
    """The first rule that a record breaks, as a sentence that names field and value, or None."""
    if _well_formed(record, limits):
        return _meta_problem(record, limits) if record.meta else None
    problem = name_problem("agent", record.agent, limits.agent_chars)
    problem = problem or name_problem("id", record.id, limits.id_chars)
    problem = problem or name_problem("kind", record.kind, limits.kind_chars)
    if problem is None and record.parent is not None:
        problem = name_problem("parent", record.parent, limits.id_chars)
    if problem is not None:
        return problem
    if not is_hash(record.sha256):
        return f"sha256 {record.sha256[:80]!a} is not 64 lower-case hex digits"
    if not 0 <= record.size <= limits.body_bytes:
        return f"size {record.size} is outside 0..{limits.body_bytes}"
    if not (math.isfinite(record.created_at) and math.isfinite(record.received_at)):
        return f"created_at {record.created_at} or received_at {record.received_at} is not a finite number"
    if not 1 <= record.copies <= limits.copies:
        return f"copies {record.copies} is outside 1..{limits.copies}"
    if not 0 <= record.attempt <= _INT64:
        return f"attempt {record.attempt} is outside 0..2^63-1"
    return _meta_problem(record, limits) if record.meta else None


def _meta_problem(record: Record, limits: Limits) -> str | None:
    if len(record.meta) - (ORIGIN in record.meta) > limits.meta_entries:
        return f"meta has {len(record.meta)} entries, allowed are {limits.meta_entries}"
    entries: Iterable[tuple[object, object]] = record.meta.items()  # whoever built it may have ignored the types
    for key, value in entries:
        if not isinstance(key, str) or not isinstance(value, str):
            return f"meta {str(key)[:80]!a} is not text to text"
        problem = name_problem("meta key", key, limits.meta_key_chars)
        if problem is not None:
            return problem
        if len(value) > limits.meta_value_chars:
            return f"meta {key!r} has {len(value)} characters, allowed are {limits.meta_value_chars}"
    return None


def frame_problem(frame: Frame, limits: Limits) -> str | None:
    """Like ``record_problem``, and whether payload and base suit the encoding. Does not look into the payload."""
    problem = record_problem(frame.record, limits)
    if problem is not None:
        return problem
    size, stored = frame.record.size, len(frame.payload)
    if frame.encoding is Encoding.RAW and stored != size:
        return f"a raw payload has {stored} bytes, its record says {size}"
    if stored > limits.body_bytes:
        return f"the payload has {stored} bytes, allowed are {limits.body_bytes}"
    if (frame.encoding is Encoding.DELTA) != (frame.base is not None):
        return f"encoding {frame.encoding.value} with base {frame.base!a}: a base belongs to a delta and only to a delta"
    if frame.base is not None:
        if frame.base == frame.record.id:
            return "a delta is its own base"
        return name_problem("base", frame.base, limits.id_chars)
    return None
