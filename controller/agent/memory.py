"""Previous bodies, so that a checkpoint travels as a delta. Bounded in bytes; forgetting one costs a whole body, never data."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

CHAIN = 16
"""Deltas in a row before a whole body is sent: reading one state costs a bounded number of frames."""


@dataclass(frozen=True, slots=True)
class _Body:
    id: str
    body: bytes
    depth: int


class DeltaMemory:
    """The last acknowledged body per agent and kind, least recently used out first."""

    def __init__(self, max_bytes: int) -> None:
        self._max = max_bytes
        self._bytes = 0
        self._bodies: OrderedDict[tuple[str, str], _Body] = OrderedDict()

    def previous(self, agent: str, kind: str) -> tuple[str, bytes] | None:
        """Id and body to make a delta against; None when there is none or the chain is long enough."""
        known = self._bodies.get((agent, kind))
        return None if known is None or known.depth >= CHAIN else (known.id, known.body)

    def acknowledged(self, agent: str, kind: str, record_id: str, body: bytes, base: str | None) -> None:
        """``base``: the record that the accepted frame was a delta against, None for a whole body."""
        known = self.forget(agent, kind)
        depth = known.depth + 1 if base is not None and known is not None else 0
        if base is not None and known is None:
            depth = CHAIN  # the base was forgotten meanwhile: we cannot tell the depth, so the next one is whole
        if len(body) > self._max:
            return
        self._bodies[agent, kind] = _Body(record_id, body, depth)
        self._bytes += len(body)
        while self._bytes > self._max:
            _, old = self._bodies.popitem(last=False)
            self._bytes -= len(old.body)

    def forget(self, agent: str, kind: str) -> _Body | None:
        """Also when the controller says that it does not have it."""
        known = self._bodies.pop((agent, kind), None)
        if known is not None:
            self._bytes -= len(known.body)
        return known

    @property
    def bytes(self) -> int:
        """Bytes of the bodies kept now."""
        return self._bytes
