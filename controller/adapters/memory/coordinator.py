"""A coordinator in memory with etcd's semantics, as measured: the reference that the etcd adapter is compared with.

Revisions, leases and terms behave as etcd's do, including what surprises: a lease gets its full TTL again when the leader
changes; revisions, and even terms, go back when a snapshot is restored; a full store still renews leases and deletes keys.
A lease ends exactly at its TTL, which is earlier than etcd does it (up to 0.5 s later): the strictest case for its holder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from controller.adapters.memory.gate import Gate, OpenGate
from controller.adapters.transactions import check_key, check_transaction, check_ttl, is_mutating
from controller.errors import Corrupt, NotFound, OutcomeUnknown, Unavailable
from controller.ports import Clock, Compare, CoordinatorStatus, Get, Item, Lease, Operation, Put, Renewal, TxnResult

NOSPACE = "NOSPACE"
CORRUPT = "CORRUPT"


@dataclass(frozen=True, slots=True)
class _LeaseState:
    id: int
    ttl_seconds: int
    expires_at: float
    """On the cluster's monotonic clock."""


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """What a backup of the cluster holds. Leases are in it with their TTL, not with the time that was left."""

    revision: int
    items: Mapping[str, Item]
    leases: Mapping[int, int]


class MemoryCluster:
    """The server side: one linearizable store, shared by any number of ``MemoryCoordinator``. Not thread-safe."""

    def __init__(self, clock: Clock, *, name: str = "memory", version: str = "3.6.0", election_seconds: float = 1.0) -> None:
        self.name = name
        self.version = version
        self.election_seconds = election_seconds
        self.term = 2
        self.revision = 1
        self.leader = True
        """False while no leader is elected (or no quorum is left): nothing is answered and no lease ends."""
        self.alarms: set[str] = set()
        self._clock = clock
        self._items: dict[str, Item] = {}
        self._leases: dict[int, _LeaseState] = {}
        self._last_lease = 7_587_000_000_000

    # ------------------------------------------------------------------------------------------------------- operations

    def txn(self, compare: Sequence[Compare], then: Sequence[Operation], otherwise: Sequence[Operation]) -> TxnResult:
        """Applies one transaction. Raises Unavailable, Corrupt, and NotFound (a put under a lease that is gone)."""
        self._require_service()
        if any(isinstance(operation, Put) for branch in (then, otherwise) for operation in branch):
            self._require_space()
        succeeded = all(self._holds(condition) for condition in compare)
        branch = then if succeeded else otherwise
        self._require_leases(branch)
        items = self._apply(branch)
        return TxnResult(succeeded, items, self.revision, self.term, self.name)

    def read(self, key: str) -> Item | None:
        """Reads one key."""
        self._require_service()
        return self._items.get(key)

    def scan(self, prefix: str) -> tuple[Item, ...]:
        """Reads all keys below a prefix, ascending."""
        self._require_service()
        items = self._items
        return tuple(items[key] for key in sorted([key for key in items if key.startswith(prefix)]))

    def grant(self, ttl_seconds: int) -> Lease:
        """Grants a lease of ``ttl_seconds``, or of 1.5 election timeouts if that is longer."""
        self._require_service()
        self._require_space()
        granted = max(ttl_seconds, math.ceil(1.5 * self.election_seconds))
        self._last_lease += 1
        self._leases[self._last_lease] = _LeaseState(self._last_lease, granted, self._clock.monotonic() + granted)
        return Lease(self._last_lease, granted)

    def renew(self, lease_id: int) -> int:
        """Gives a lease its full TTL again. Returns it, or 0 when the lease is gone. Works under every alarm."""
        self._settle()
        self._require_leader()
        lease = self._leases.get(lease_id)
        if lease is None:
            return 0
        self._leases[lease_id] = replace(lease, expires_at=self._clock.monotonic() + lease.ttl_seconds)
        return lease.ttl_seconds

    def revoke(self, lease_id: int) -> None:
        """Deletes a lease and its keys."""
        self._require_service()
        if lease_id in self._leases:
            self._drop_lease(lease_id)

    def status(self) -> CoordinatorStatus:
        """Answered by any member, also without a leader."""
        self._settle()
        return CoordinatorStatus(self.name, {self.name: self.version}, self.leader, self.term, tuple(sorted(self.alarms)))

    # ----------------------------------------------------------------------------------------------- what may happen to it

    def lose_leader(self) -> None:
        """No quorum, or an election: every call fails, and leases stop ending."""
        self._settle()
        self.leader = False

    def elect_leader(self) -> None:
        """A new term begins. Every lease gets its full TTL again, plus the election timeout."""
        self._settle()
        self.leader = True
        self.term += 1
        now = self._clock.monotonic() + self.election_seconds
        self._leases = {key: replace(lease, expires_at=now + lease.ttl_seconds) for key, lease in self._leases.items()}

    def change_leader(self) -> None:
        """``lose_leader`` and ``elect_leader`` in one moment."""
        self.lose_leader()
        self.elect_leader()

    def snapshot(self) -> ClusterSnapshot:
        """A backup of everything."""
        self._settle()
        leases = {key: lease.ttl_seconds for key, lease in self._leases.items()}
        return ClusterSnapshot(self.revision, dict(self._items), leases)

    def restore(self, snapshot: ClusterSnapshot, *, name: str | None = None) -> None:
        """A new cluster made from a backup: revisions and term go back, leases start anew, alarms are gone. ``name``: its new
        id, as `etcdutl snapshot restore` gives one; None keeps the old id (disks that were rolled back)."""
        now = self._clock.monotonic()
        self.name = name or self.name
        self.revision = snapshot.revision
        self._items = dict(snapshot.items)
        self._leases = {key: _LeaseState(key, ttl, now + ttl) for key, ttl in snapshot.leases.items()}
        self.term = 2
        self.leader = True
        self.alarms = set()

    # ---------------------------------------------------------------------------------------------------------- internals

    def _settle(self) -> None:
        """Lets leases end whose time has passed, the oldest first. Without a leader none does."""
        if not self.leader:
            return
        now = self._clock.monotonic()
        ended = [lease for lease in self._leases.values() if lease.expires_at <= now]
        for lease in sorted(ended, key=_order) if ended else ():
            self._drop_lease(lease.id)

    def _drop_lease(self, lease_id: int) -> None:
        del self._leases[lease_id]
        keys = [key for key, item in self._items.items() if item.lease == lease_id]
        if keys:
            self.revision += 1
        for key in keys:
            del self._items[key]

    def _require_leader(self) -> None:
        if not self.leader:
            raise Unavailable(f"coordinator {self.name}: no leader", hint="wait for the election, or restore a quorum")

    def _require_service(self) -> None:
        self._settle()
        self._require_leader()
        if CORRUPT in self.alarms:
            hint = "restore the damaged member, then `etcdctl alarm disarm`"
            raise Corrupt(f"coordinator {self.name}: alarm CORRUPT", hint=hint)

    def _require_space(self) -> None:
        if NOSPACE in self.alarms:
            raise Unavailable(
                f"coordinator {self.name}: alarm NOSPACE: no put and no grant is accepted",
                hint="compact and defragment etcd or raise its quota, then `etcdctl alarm disarm`",
            )

    def _require_leases(self, branch: Sequence[Operation]) -> None:
        for operation in branch:
            if isinstance(operation, Put) and operation.lease and operation.lease not in self._leases:
                raise NotFound(f"put {operation.key!r}: lease {operation.lease} does not exist", hint="grant a new lease")

    def _holds(self, condition: Compare) -> bool:
        item = self._items.get(condition.key)
        if item is None:
            return condition.revision == 0
        return condition.revision == (item.create_revision if condition.field == "create" else item.mod_revision)

    def _apply(self, branch: Sequence[Operation]) -> tuple[Item | None, ...]:
        answers: list[Item | None] = []
        following = self.revision + 1
        for operation in branch:
            if isinstance(operation, Get):
                answers.append(self._items.get(operation.key))
            elif isinstance(operation, Put):
                old = self._items.get(operation.key)
                created = old.create_revision if old else following
                self._items[operation.key] = Item(operation.key, operation.value, created, following, operation.lease)
                self.revision = following
            elif self._items.pop(operation.key, None) is not None:
                self.revision = following
        return tuple(answers)


def _order(lease: _LeaseState) -> tuple[float, int]:
    return lease.expires_at, lease.id


class MemoryCoordinator:
    """One client of a ``MemoryCluster``. Implements ``ports.Coordinator``; its gate is its network."""

    def __init__(self, cluster: MemoryCluster, gate: Gate | None = None) -> None:
        self._cluster = cluster
        self._gate: Gate = gate or OpenGate()
        self._closed = False

    async def txn(
        self, compare: Sequence[Compare], then: Sequence[Operation], otherwise: Sequence[Operation] = ()
    ) -> TxnResult:
        """See ``ports.Coordinator``. Raises Refused for what etcd refuses."""
        check_transaction(compare, then, otherwise)
        await self._before("txn")
        result = self._cluster.txn(compare, then, otherwise)
        await self._after("txn", mutating=is_mutating(then, otherwise))
        return result

    async def get(self, key: str) -> Item | None:
        """See ``ports.Coordinator``."""
        check_key(key)
        await self._before("get")
        item = self._cluster.read(key)
        await self._after("get")
        return item

    async def list(self, prefix: str) -> tuple[Item, ...]:
        """See ``ports.Coordinator``."""
        await self._before("list")
        items = self._cluster.scan(prefix)
        await self._after("list")
        return items

    async def grant(self, ttl_seconds: int) -> Lease:
        """See ``ports.Coordinator``. A lease whose answer was lost has no keys and ends by itself."""
        check_ttl(ttl_seconds)
        await self._before("grant")
        lease = self._cluster.grant(ttl_seconds)
        await self._after("grant", mutating=True)
        return lease

    async def keep_alive(self, lease_id: int) -> Renewal:
        """See ``ports.Coordinator``."""
        await self._before("keep_alive")
        renewal = Renewal(self._cluster.renew(lease_id), self._cluster.term)
        await self._after("keep_alive")
        return renewal

    async def revoke(self, lease_id: int) -> None:
        """See ``ports.Coordinator``."""
        await self._before("revoke")
        self._cluster.revoke(lease_id)
        await self._after("revoke", mutating=True)

    async def status(self) -> CoordinatorStatus:
        """See ``ports.Coordinator``."""
        await self._before("status")
        status = self._cluster.status()
        await self._after("status")
        return status

    async def close(self) -> None:
        """Every later call raises Unavailable."""
        self._closed = True

    async def _before(self, op: str) -> None:
        if self._closed:
            raise Unavailable(f"coordinator {self._cluster.name}: {op} after close", hint="create a new coordinator")
        await self._gate.before(op)

    async def _after(self, op: str, *, mutating: bool = False) -> None:
        try:
            await self._gate.after(op)
        except Unavailable as error:
            if not mutating:
                raise
            message = f"coordinator {self._cluster.name}: {error.message}"
            raise OutcomeUnknown(message, hint="re-read before deciding") from error
