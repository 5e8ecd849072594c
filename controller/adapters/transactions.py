"""What every Coordinator refuses before it sends anything: the limits and rules of etcd, in one place."""

from __future__ import annotations

from collections.abc import Sequence

from controller.errors import Refused
from controller.ports import Compare, Delete, Get, Operation, Put

MAX_OPERATIONS = 128
"""Comparisons, and operations of each branch (etcd's ``--max-txn-ops``)."""

MAX_REQUEST_BYTES = 1_572_864
"""1.5 MiB, etcd's ``--max-request-bytes``. Callers stay below the 1 MiB that the port promises."""

OVERHEAD_BYTES = 32
"""At most what protobuf adds to a key and a value; so what passes here is never too large for etcd."""

ENVELOPE_BYTES = 256
"""At most what etcd adds to a request in its log: ids, and the name of the user."""


def check_transaction(compare: Sequence[Compare], then: Sequence[Operation], otherwise: Sequence[Operation]) -> None:
    """Raises Refused when etcd would, or when the transaction has no operation.

    A transaction of comparisons alone is answered by any member from its own, possibly stale, copy.
    """
    if not then and not otherwise:
        raise Refused(
            f"empty transaction: {len(compare)} comparisons and no operation",
            hint="add a Get of the key that you compare; without one the answer may be stale",
        )
    for name, part in (("compare", compare), ("then", then), ("otherwise", otherwise)):
        if len(part) > MAX_OPERATIONS:
            raise Refused(f"transaction: {name} has {len(part)} entries, the limit is {MAX_OPERATIONS}", hint="split it")
    for condition in compare:
        check_key(condition.key)
        if condition.field not in {"create", "mod"}:
            message = f"compare {condition.key!r}: field is {condition.field!r}"
            raise Refused(message, hint="use Compare.created or Compare.modified")
    for branch in (then, otherwise):
        check_branch(branch)
    size = transaction_bytes(compare, then, otherwise)
    if size > MAX_REQUEST_BYTES:
        message = f"transaction of {size} bytes, the limit is {MAX_REQUEST_BYTES}"
        raise Refused(message, hint="split it, or store the value elsewhere")


def transaction_bytes(compare: Sequence[Compare], then: Sequence[Operation], otherwise: Sequence[Operation]) -> int:
    """Upper bound of the bytes on the wire, with the range that is added to each branch and the envelope of etcd's log."""
    operations = (*then, *otherwise)
    keys = [condition.key for condition in compare] + [operation.key for operation in operations]
    values = (operation.value for operation in operations if isinstance(operation, Put))
    added = 2 * (len(keys[0].encode()) + OVERHEAD_BYTES)
    named = sum(len(key.encode()) + OVERHEAD_BYTES for key in keys)
    return ENVELOPE_BYTES + added + named + sum(len(value) for value in values)


def check_branch(branch: Sequence[Operation]) -> None:
    """Raises Refused for an empty key, and for a key that one branch puts twice or both puts and deletes."""
    written: set[str] = set()
    deleted = {operation.key for operation in branch if isinstance(operation, Delete)}
    for operation in branch:
        check_key(operation.key)
        if isinstance(operation, Put):
            if operation.key in written or operation.key in deleted:
                raise Refused(f"transaction: key {operation.key!r} is written twice in one branch", hint="write it once")
            written.add(operation.key)


def check_key(key: str) -> None:
    """Raises Refused for the empty key, which etcd does not have."""
    if not key:
        raise Refused("the key is empty", hint="give the full name of a key, such as /dr/group/authority")


def check_ttl(ttl_seconds: float) -> None:
    """Raises Refused unless the TTL is a whole number of seconds that etcd can grant."""
    if not isinstance(ttl_seconds, int) or isinstance(ttl_seconds, bool) or not 1 <= ttl_seconds <= 9_000_000_000:
        raise Refused(f"lease TTL is {ttl_seconds!r}", hint="give whole seconds from 1 on")


def is_mutating(then: Sequence[Operation], otherwise: Sequence[Operation]) -> bool:
    """Whether a lost answer leaves it open if something was changed."""
    return any(not isinstance(operation, Get) for branch in (then, otherwise) for operation in branch)
