"""What a controller answers about salvage: tails that were cut off a store. Frozen; fields are only added."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from controller.domain.model import EpochStart

Line = tuple[int, int, str, str, str, int]
"""One record in a receipt: segment, number in it, agent, id, sha256, size."""
LOST_STATES = frozenset({"only", "other"})
"""States of records whose bodies nobody has any more once the salvage is gone."""


@dataclass(frozen=True, slots=True)
class SalvagePiece:
    """One tail that lies in a region's store: what its head says."""

    region: str
    name: str
    stream: str
    first_seq: int
    last_seq: int
    epochs: tuple[EpochStart, ...]
    chain: str
    """Chain hash at its end."""
    by_epoch: int
    """Epoch of the holder that cut it off. When that was stands nowhere; ``received_at`` of its last record is before it."""


@dataclass(frozen=True, slots=True)
class RegionSalvage:
    """The salvage of one region's store. ``unknown``: why nothing is known of it, "" = ``pieces`` are all."""

    region: str
    pieces: tuple[SalvagePiece, ...]
    unknown: str = ""


@dataclass(frozen=True, slots=True)
class SalvageRecord:
    """A record of a tail without its body. ``state``: ``live`` (the live history has the same id with the same body), ``other``
    (it has the id with another body), ``only`` (it lies nowhere else), ``own`` (a note of the controllers themselves, no
    agent's work)."""

    agent: str
    id: str
    kind: str
    sha256: str
    size: int
    parent: str | None
    created_at: float
    received_at: float
    copies: int
    attempt: int
    stream: str
    seq: int
    epoch: int
    ordinal: int
    key: str
    encoding: str
    state: str
    latest: str
    """The agent's newest record of the kind in the live history, as this region's copy knows it; "" = none."""
    latest_at: float
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SalvageDamage:
    """A segment of a tail that cannot be read: nobody knows here what was in it."""

    seq: int
    epoch: int
    key: str
    why: str


@dataclass(frozen=True, slots=True)
class SalvagePage:
    """Some segments of one tail. ``after``: ask for the next page with it, 0 = this was the last."""

    piece: SalvagePiece
    segments: int
    records: tuple[SalvageRecord, ...]
    damaged: tuple[SalvageDamage, ...]
    after: int


@dataclass(frozen=True, slots=True)
class Discarded:
    """What a discard did or would do. ``state``: ``would`` (dry run), ``left`` (objects are left: ask again), ``done``,
    ``gone`` (the head does not name it, and none of its objects is left)."""

    region: str
    name: str
    state: str
    sentence: str
    records: int = 0
    lost: int = 0
    """Records whose bodies are nowhere else."""
    agents: int = 0
    """Agents that these are of."""
    damaged: int = 0
    """Segments that nobody can read here."""
    digest: str = ""
    """What the receipt of an export must give."""
    deleted: int = 0
    """Objects that this request deleted."""


class SalvageService(Protocol):
    """Tails that were cut off stores. Any controller reads them; the stream's holder alone discards."""

    async def list(self, region: str | None) -> tuple[RegionSalvage, ...]: ...

    async def page(self, region: str, name: str, after: int, agent: str | None) -> SalvagePage:
        """Raises NotFound, Unavailable, Corrupt."""
        ...

    async def body(self, region: str, name: str, seq: int, ordinal: int) -> bytes:
        """The whole body, whose hash was compared. Raises NotFound, Unavailable, Corrupt."""
        ...

    async def discard(
        self, region: str, name: str, *, execute: bool, confirm: str, requester: str, digest: str, even_unexported: str
    ) -> Discarded:
        """Raises NotActive, Refused, Conflict, FenceLost, Unavailable."""
        ...


def receipt_line(seq: int, ordinal: int, agent: str, record_id: str, sha256: str, size: int) -> Line:
    """What a receipt says of one record."""
    return seq, ordinal, agent, record_id, sha256, size


def receipt(name: str, chain: str, lines: Iterable[Line]) -> str:
    """SHA-256 over a tail's name, its last chain hash and every record of it, in their order: what an export had and what a
    discard takes away are compared by it."""
    found = [name, chain, *sorted(lines)]
    return hashlib.sha256(json.dumps(found, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()
