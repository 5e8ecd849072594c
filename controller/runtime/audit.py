"""The hash-chained record of every decision. An entry is written in the same transaction as the decision that it records."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from controller.domain.plan import canonical_bytes
from controller.errors import Unavailable
from controller.ports import Compare, Coordinator, Get, Operation, Put, TxnResult
from controller.runtime.documents import Keys, decode, encode
from controller.runtime.service import AuditEntry

GENESIS = "0" * 64
ATTEMPTS = 20


def entry_hash(entry: AuditEntry) -> str:
    """SHA-256 over the canonical form of the entry without its own hash (``previous`` is inside, so entries chain)."""
    return hashlib.sha256(canonical_bytes(replace(entry, hash=""))).hexdigest()


def broken_at(entries: Sequence[AuditEntry], previous: str = GENESIS, first: int = 1) -> str | None:
    """Why the chain does not hold, naming the first bad entry, or None."""
    for expected, entry in enumerate(entries, start=first):
        if entry.n != expected:
            return f"entry {expected} is missing (found {entry.n})"
        if entry.previous != previous:
            return f"entry {entry.n} does not follow entry {entry.n - 1}"
        if entry.hash != entry_hash(entry):
            return f"entry {entry.n} was changed"
        previous = entry.hash
    return None


class Audit:
    """Appends entries. Contention on the next number is retried; contention on the caller's own conditions is the caller's."""

    def __init__(self, coordinator: Coordinator, keys: Keys) -> None:
        self._coordinator = coordinator
        self._keys = keys
        self._last: AuditEntry | None = None

    async def _newest(self) -> AuditEntry | None:
        """The newest entry. Found by doubling and bisection at first (numbers have no gaps), then by walking on."""
        if self._last is None:
            self._last = await self._find_last()
        while self._last is not None:
            following = await self._entry(self._last.n + 1)
            if following is None:
                break
            self._last = following
        return self._last

    async def _find_last(self) -> AuditEntry | None:
        known, missing = 0, 1
        last: AuditEntry | None = None
        while (entry := await self._entry(missing)) is not None:
            last, known, missing = entry, missing, 2 * missing
        while missing - known > 1:
            middle = (known + missing) // 2
            entry = await self._entry(middle)
            if entry is None:
                missing = middle
            else:
                last, known = entry, middle
        return last

    async def _entry(self, n: int) -> AuditEntry | None:
        item = await self._coordinator.get(self._keys.audit(n))
        return None if item is None else decode(AuditEntry, item.value, where=item.key)

    async def commit(
        self,
        compare: Sequence[Compare],
        then: Sequence[Operation],
        *,
        at: float,
        actor: str,
        action: str,
        subject: str,
        detail: Mapping[str, Any] | None = None,
    ) -> TxnResult:
        """One transaction: the caller's conditions and operations, and the audit entry of it.

        ``succeeded`` False means that one of the *caller's* conditions did not hold. Raises OutcomeUnknown, Unavailable.
        """
        for _ in range(ATTEMPTS):
            newest = await self._newest()
            n, previous = (newest.n + 1, newest.hash) if newest else (1, GENESIS)
            unsealed = AuditEntry(n, at, actor, action, subject, dict(detail or {}), previous, "")
            entry = replace(unsealed, hash=entry_hash(unsealed))
            key = self._keys.audit(n)
            result = await self._coordinator.txn(
                [*compare, Compare.absent(key)], [*then, Put(key, encode(entry)), Get(key)], [Get(key)]
            )
            if result.succeeded:
                self._last = entry
                return replace(result, items=result.items[:-1])
            if result.items[-1] is None:  # the number was free, so it was one of the caller's conditions that failed
                return replace(result, items=())
            await asyncio.sleep(0)
        raise Unavailable(
            f"the audit record was contended {ATTEMPTS} times in a row", hint="try again; check for a controller that loops"
        )

    async def append(
        self, *, at: float, actor: str, action: str, subject: str, detail: Mapping[str, Any] | None = None
    ) -> None:
        """An entry by itself."""
        await self.commit([], [], at=at, actor=actor, action=action, subject=subject, detail=detail)
