"""Is there an order of all operations that explains every answer? After Wing and Gong (1993), with Lowe's memory of states.

One register at a time: linearizability is local, so a history of many registers is linearizable when each one's is.
An operation without an answer may have taken effect at any time after it began, or never.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MAX_STATES = 500_000


@dataclass(frozen=True, slots=True)
class Operation:
    """``kind``: ``read`` gave ``value``; ``write`` set it; ``cas`` found ``was`` and set
    ``value``; ``refused`` did not find it.

    Times are of one clock. ``ended`` infinite: nobody knows whether it took effect."""

    kind: str
    value: str
    began: float
    ended: float = math.inf
    was: str = ""


def _apply(operation: Operation, state: str) -> str | None:
    """The register afterwards; None when the answer does not fit."""
    match operation.kind:
        case "read":
            return state if state == operation.value else None
        case "write":
            return operation.value
        case "cas":
            return operation.value if state == operation.was else None
        case "refused":
            return state if state != operation.was else None
    raise ValueError(operation.kind)


def linearizable(history: Sequence[Operation], initial: str = "") -> bool:
    """Searches for an order. Raises RuntimeError when the history is too tangled to tell."""
    operations = sorted(history, key=lambda operation: operation.began)
    answered = sum(1 << n for n, operation in enumerate(operations) if operation.ended < math.inf)
    visited: set[tuple[int, str]] = set()
    stack = [(0, 0, initial)]  # what has been put into the order, the first that has not, the register
    while stack:
        done, first, state = stack.pop()
        if done & answered == answered:
            return True
        while done >> first & 1:
            first += 1
        deadline, n = math.inf, first
        while n < len(operations) and operations[n].began <= deadline:
            # Whatever began before the first answer of those that are left may be next.
            operation = operations[n]
            if not done >> n & 1:
                deadline = min(deadline, operation.ended)
                after = _apply(operation, state)
                key = (done | 1 << n, after or "")
                if after is not None and key not in visited:
                    visited.add(key)
                    stack.append((key[0], first, after))
            n += 1
        if len(visited) > MAX_STATES:
            raise RuntimeError(f"{len(operations)} operations: gave up after {MAX_STATES} states")
    return False
