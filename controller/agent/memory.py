"""Previous bodies, so that a checkpoint travels as a delta. Bounded in bytes; forgetting one costs a whole body, never data."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from controller.agent.spool import Letter
from controller.domain.model import Frame
from controller.stream.delta import frame
from controller.stream.limits import MAX_CHAIN

CHAIN = 32
"""Deltas in a row before a whole body is sent: reading one state from the store costs a bounded number of frames."""
LONG_CHAIN_BYTES = 16 * 1024
"""For larger bodies the chain is as long as readers allow (``MAX_CHAIN``): a whole one weighs as much as a dozen of its deltas
or more. An 80 KB conversation costs 1/40 of its size a put with chains of 32, 1/46 with 64; for 2 KB it hardly matters."""


def chain_limit(size: int) -> int:
    """Deltas that may stand on each other below the next body, when the last one had ``size`` bytes."""
    return CHAIN if size < LONG_CHAIN_BYTES else MAX_CHAIN


@dataclass(frozen=True, slots=True)
class Previous:
    """A body to make a delta against. ``depth``: deltas that stand on each other below it, itself included."""

    id: str
    body: bytes
    depth: int


class DeltaMemory:
    """The last acknowledged body per agent and kind, least recently used out first."""

    def __init__(self, max_bytes: int) -> None:
        self._max = max_bytes
        self._bytes = 0
        self._bodies: OrderedDict[tuple[str, str], Previous] = OrderedDict()

    def previous(self, agent: str, kind: str) -> Previous | None:
        """The last acknowledged body; None when there is none or the chain is long enough."""
        known = self._bodies.get((agent, kind))
        return None if known is None or known.depth >= chain_limit(len(known.body)) else known

    def acknowledged(self, agent: str, kind: str, record_id: str, body: bytes, base: str | None) -> None:
        """``base``: the record that the accepted frame was a delta against, None for a whole body."""
        known = self.forget(agent, kind)
        depth = known.depth + 1 if base is not None and known is not None else 0
        if base is not None and known is None:
            depth = MAX_CHAIN  # the base was forgotten meanwhile: we cannot tell the depth, so the next one is whole
        if len(body) > self._max:
            return
        self._bodies[agent, kind] = Previous(record_id, body, depth)
        self._bytes += len(body)
        while self._bytes > self._max:
            _, old = self._bodies.popitem(last=False)
            self._bytes -= len(old.body)

    def forget(self, agent: str, kind: str) -> Previous | None:
        """Also when the controller says that it does not have it."""
        known = self._bodies.pop((agent, kind), None)
        if known is not None:
            self._bytes -= len(known.body)
        return known

    @property
    def bytes(self) -> int:
        """Bytes of the bodies kept now."""
        return self._bytes


def chained(letters: Sequence[Letter], known: Mapping[str, Previous]) -> list[Frame]:
    """One agent's letters as frames, each a delta against the one before it of its kind; ``known``: what the first of a kind
    may stand on. Pure.

    A controller may have lost a base that lies outside of the batch. It refuses that frame then and would still take later ones
    that do not stand on it, in front of it: so a batch leans on such a base only when all that follows leans on it, too.
    """
    made = _chain(letters, known)
    inside = {letter.id for letter in letters}
    leaning: set[str] = set()
    for item in made:
        outside = item.base is not None and item.base not in inside
        if leaning and (outside or item.base not in leaning):
            return _chain(letters, {})
        if leaning or outside:
            leaning.add(item.record.id)
    return made


def _chain(letters: Sequence[Letter], known: Mapping[str, Previous]) -> list[Frame]:
    last = dict(known)
    frames = []
    for letter in letters:
        before = last.get(letter.kind)
        if before is not None and before.depth >= chain_limit(len(before.body)):
            before = None
        made = frame(
            letter.agent,
            letter.id,
            letter.kind,
            letter.body,
            parent=letter.parent,
            created_at=letter.created_at,
            copies=letter.copies,
            attempt=letter.attempt,
            meta=letter.meta,
            previous=None if before is None else (before.id, before.body),
        )
        depth = before.depth + 1 if before is not None and made.base is not None else 0
        last[letter.kind] = Previous(letter.id, letter.body, depth)
        frames.append(made)
    return frames
