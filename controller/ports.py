"""What the shell needs from outside, as Protocols. One adapter file per outside system; ``adapters/memory`` is the reference.

One page on purpose, although a long one: no code is in it, and whoever writes an adapter or a test reads it from top to bottom.

Rules for every adapter:

- Every call has a deadline of its own and raises ``Unavailable`` when it passes; a mutating call whose answer was lost and
  that could not be settled by a read-back raises ``OutcomeUnknown``.
- Every mutating call on a region store or on traffic takes a ``Fence``; the far side refuses a stale one (``FenceLost``).
- Retries live inside the adapters: few, jittered, on named errors. A compare-and-set is re-read, never repeated blindly.
- Every failed condition is followed by a read-back ("is it mine?"), because an SDK's own retry turns success into failure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from controller.domain.failsafe import Witness
from controller.domain.model import (
    Ack,
    Baseline,
    CatalogueEntry,
    Commit,
    EpochStart,
    Fence,
    Frame,
    Head,
    IngestAnswer,
    Realignment,
    Salvage,
    SegmentRef,
    SnapshotRef,
)
from controller.domain.sealing import KmsSeen

# ---------------------------------------------------------------------------------------------------------- coordination


@dataclass(frozen=True, slots=True)
class Item:
    """One key of the coordinator with its revisions."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Compare:
    """A condition of a transaction. ``created`` / ``modified`` compare revisions; revision 0 means "the key is absent"."""

    key: str
    field: str
    revision: int

    @classmethod
    def created(cls, key: str, revision: int) -> Compare:
        return cls(key, "create", revision)

    @classmethod
    def modified(cls, key: str, revision: int) -> Compare:
        return cls(key, "mod", revision)

    @classmethod
    def absent(cls, key: str) -> Compare:
        return cls(key, "create", 0)


@dataclass(frozen=True, slots=True)
class Get:
    """Reads one key, linearizable."""

    key: str


@dataclass(frozen=True, slots=True)
class Put:
    """Writes one key; ``lease`` 0 = none."""

    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Deletes one key; absent is fine."""

    key: str


Operation = Get | Put | Delete


@dataclass(frozen=True, slots=True)
class TxnResult:
    """``items``: the answers of the ``Get`` operations of the branch that ran, in order; None = absent."""

    succeeded: bool
    items: tuple[Item | None, ...]
    revision: int
    term: int
    cluster: str = ""
    """Id of the cluster that answered. One that is restored from a snapshot has another id than the one it was taken from."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A granted lease. ``ttl_seconds`` is what the server granted, which may be more than was asked for."""

    id: int
    ttl_seconds: int


@dataclass(frozen=True, slots=True)
class Renewal:
    """Answer to a keep-alive: the lease's TTL now (0 = it is gone), and the raft term of the member that answered, as that
    member knows it. A deposed leader that hangs goes on answering, in its own, older term."""

    ttl_seconds: int
    term: int


@dataclass(frozen=True, slots=True)
class CoordinatorStatus:
    """Versions of the members that answered, whether there is a leader, and raised alarms (``NOSPACE``, ``CORRUPT``)."""

    cluster_id: str
    versions: Mapping[str, str]
    leader: bool
    term: int
    alarms: tuple[str, ...] = ()


class Coordinator(Protocol):
    """A linearizable key-value store with leases and transactions (etcd)."""

    async def txn(
        self, compare: Sequence[Compare], then: Sequence[Operation], otherwise: Sequence[Operation] = ()
    ) -> TxnResult:
        """Atomic. At most 128 operations, 1 MiB. Each branch that contains no ``Get`` has one added by the adapter (a
        transaction without a linearizable range may be answered locally and stale), which is not reported in ``items``.
        Raises OutcomeUnknown when it may have been applied."""
        ...

    async def get(self, key: str) -> Item | None:
        """Linearizable read of one key."""
        ...

    async def list(self, prefix: str) -> tuple[Item, ...]:
        """Linearizable read of all keys below a prefix, ascending by key."""
        ...

    async def grant(self, ttl_seconds: int) -> Lease: ...

    async def keep_alive(self, lease_id: int) -> Renewal:
        """Renews once. Proves nothing by itself."""
        ...

    async def revoke(self, lease_id: int) -> None:
        """Deletes the lease and its keys. A lease that is gone already is fine."""
        ...

    async def status(self) -> CoordinatorStatus: ...

    async def close(self) -> None: ...


# --------------------------------------------------------------------------------------------------------- region stores


class RegionShelf(Protocol):
    """What keeps a region's copy bounded: its base, its snapshots, its catalogue. Part of every ``RegionStore``."""

    async def set_base(self, fence: Fence, expected: Head, to: Baseline) -> Head:
        """Moves the base and names the snapshots, IF epoch = fence.epoch, base and snapshots are as in ``expected`` and the
        head reaches what ``to`` names. The head's seq may have grown meanwhile: under one epoch its history only grows.
        Idempotent. Raises FenceLost, Conflict, Refused (the base would go back), Unavailable, OutcomeUnknown."""
        ...

    async def delete_segments(self, fence: Fence, refs: Sequence[SegmentRef]) -> None:
        """Deletes at most 1,000 objects; absent ones are fine. Reads the head first: raises FenceLost, and Refused unless
        all of them lie before the head's base and outside of its salvage."""
        ...

    async def put_snapshot(self, fence: Fence, ref: SnapshotRef, data: bytes) -> None:
        """Like ``put_segment``: written once; equal content that is there is success. Raises Conflict for other content."""
        ...

    async def get_snapshot(self, ref: SnapshotRef) -> bytes:
        """Raises NotFound, Unavailable, Corrupt."""
        ...

    async def list_snapshots(self, stream: str) -> tuple[SnapshotRef, ...]:
        """At most 1,000 that exist, named by the head or not, ascending by (seq, epoch)."""
        ...

    async def delete_snapshots(self, fence: Fence, refs: Sequence[SnapshotRef]) -> None:
        """Like ``delete_segments``; Refused for one that the head names."""
        ...

    async def put_catalogue(self, fence: Fence, entries: Sequence[CatalogueEntry]) -> None:
        """Writes one item for each agent, over what is there. Reads the head first and raises FenceLost; the items themselves
        carry no condition, so each new epoch writes all of them again."""
        ...

    async def forget_epoch(self, fence: Fence, start: EpochStart) -> Head:
        """Drops the first entry of the head's epochs, IF epoch = fence.epoch, it still is ``start`` and another one follows.
        Idempotent. Raises FenceLost, Conflict, Unavailable, OutcomeUnknown."""
        ...

    async def forget_salvage(self, fence: Fence, piece: Salvage) -> Head:
        """Drops one entry of the head's salvage, IF epoch = fence.epoch and it still is ``piece``; nothing else changes.
        Idempotent. Its objects stay: see ``delete_diverged``. Raises FenceLost, Conflict, Unavailable, OutcomeUnknown."""
        ...

    async def delete_diverged(self, fence: Fence, refs: Sequence[SegmentRef]) -> None:
        """Like ``delete_segments``, for what a salvage that was let go of leaves behind: Refused unless all of them are
        certainly in no history of this store and nobody's salvage (``domain.retention.is_diverged``)."""
        ...


@dataclass(frozen=True, slots=True)
class FoundObject:
    """What lies under a key; nothing is verified. ``data`` None: nothing. ``tag`` names exactly this content."""

    data: bytes | None
    tag: str


@dataclass(frozen=True, slots=True)
class FoundHead:
    """A head item as it lies there. ``head`` None: it cannot be read, ``problem`` says why. ``exact`` is the adapter's own
    copy, which a replacement must match attribute by attribute."""

    head: Head | None
    problem: str
    exact: object


@dataclass(frozen=True, slots=True)
class FoundEntry:
    """A catalogue item as it lies there. ``entry`` None: there is none (``problem`` is ""), or it cannot be read and
    ``problem`` says why. ``exact`` is the adapter's own copy, which a replacement must match attribute by attribute."""

    agent: str
    entry: CatalogueEntry | None
    problem: str
    exact: object


class RegionMender(Protocol):
    """Looks at damage and replaces it: used by people's commands only (``drctl verify``, ``drctl repair``). Part of every
    ``RegionStore``.

    Objects are immutable and named by what they are, so putting the *proven* bytes where damaged ones lie needs no fence: it
    is the same in every epoch. The head is mutable, so its replacement needs one."""

    async def inspect_object(self, ref: SegmentRef | SnapshotRef) -> FoundObject:
        """Raises Unavailable."""
        ...

    async def mend_object(self, ref: SegmentRef | SnapshotRef, found: FoundObject, data: bytes) -> None:
        """Replaces the object IF it still is what was ``found`` (``If-Match``, or ``If-None-Match`` where there was nothing).
        Equal content that is there already is success. Raises Conflict, Unavailable, OutcomeUnknown."""
        ...

    async def inspect_head(self, stream: str) -> FoundHead:
        """Strongly consistent. Raises Unavailable."""
        ...

    async def mend_head(self, fence: Fence, found: FoundHead, head: Head) -> Head:
        """Replaces the head IF every attribute still is as ``found``; the new one carries the fence's epoch and writer. A head
        that is already so is success. Raises FenceLost (a readable epoch there is greater), Conflict, Unavailable,
        OutcomeUnknown."""
        ...

    async def list_catalogue(self, stream: str, after: str, limit: int) -> tuple[FoundEntry, ...]:
        """The next items after the agent ``after`` ("" = from the first), ascending by the agents' names in UTF-8, strongly
        consistent. At most ``limit`` (1 to 1,000); fewer only at the end. Raises Unavailable, Refused."""
        ...

    async def inspect_catalogue(self, stream: str, agent: str) -> FoundEntry:
        """One item, strongly consistent. Raises Unavailable."""
        ...

    async def mend_catalogue(self, fence: Fence, found: FoundEntry, entry: CatalogueEntry | None) -> None:
        """Replaces one item, or deletes it (``entry`` None), IF it still is as ``found``. Reads the head first. One that is
        already so is success. Raises FenceLost, Conflict, Refused, Unavailable, OutcomeUnknown."""
        ...


class RegionStore(RegionShelf, RegionMender, Protocol):
    """One region's passive replica: immutable segments and one conditional head per stream (S3 + DynamoDB)."""

    @property
    def region(self) -> str: ...

    async def put_segment(self, fence: Fence, ref: SegmentRef, data: bytes) -> None:
        """Writes with ``If-None-Match: *``. An object that is there with equal content is "mine": success.
        Raises Conflict when other content is there, Unavailable when the store does not answer."""
        ...

    async def get_segment(self, ref: SegmentRef) -> bytes:
        """Raises NotFound, Unavailable, Corrupt (shorter than the store said)."""
        ...

    async def list_segments(self, stream: str, first_seq: int, limit: int = 1000) -> tuple[SegmentRef, ...]:
        """Objects that exist, committed or not, ascending by (seq, epoch), beginning with ``first_seq``."""
        ...

    async def read_head(self, stream: str) -> Head:
        """Strongly consistent. ``Head(stream)`` when there is none yet."""
        ...

    async def advance(self, fence: Fence, commit: Commit) -> Head:
        """The commit point: SET seq, chain, … IF epoch = fence.epoch AND seq = prev_seq AND chain = prev_chain.
        Returns the head after it, also when the read-back shows that the commit was already ours.
        Raises FenceLost (the head's epoch is greater), Conflict (anything else does not match), Unavailable, OutcomeUnknown."""
        ...

    async def fence(self, fence: Fence) -> Head:
        """SET epoch IF epoch < fence.epoch (creating the head), or it is ours already. Returns the head: nothing with an older
        epoch commits here after it. Raises FenceLost when the head's epoch is greater."""
        ...

    async def realign(self, fence: Fence, expected: Head, to: Realignment) -> Head:
        """Cuts the history to ``to`` and adds ``to.salvage``, IF epoch = fence.epoch and seq and chain are as in ``expected``.
        Idempotent: a head that is already so is success. Raises FenceLost, Conflict, Unavailable, OutcomeUnknown."""
        ...

    async def close(self) -> None: ...


# --------------------------------------------------------------------------------------------------------------- sealing


@dataclass(frozen=True, slots=True, repr=False)
class NewDataKey:
    """A fresh data key (32 bytes) and the same as its KMS key wrapped it. Its repr shows neither."""

    plain: bytes
    wrapped: bytes

    def __repr__(self) -> str:
        return "NewDataKey(…)"


class KeyService(Protocol):
    """One region's KMS key. ``context``: encryption context; what was wrapped under one is unwrapped under the same only.

    Every method raises Unavailable, Misconfigured (denied, disabled, no such key); ``unwrap`` also Corrupt (these bytes were
    not wrapped by this key under this context, as far as the service can tell)."""

    @property
    def region(self) -> str: ...

    async def make_data_key(self, context: Mapping[str, str]) -> NewDataKey: ...

    async def wrap(self, plain: bytes, context: Mapping[str, str]) -> bytes: ...

    async def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes: ...

    async def close(self) -> None: ...


class Seals(Protocol):
    """What the runtime needs to know about sealing; the stores seal and open by themselves."""

    async def prepare(self, fence: Fence) -> None:
        """Has a data key for this tenure ready. Raises Unavailable when none can be had that may be used in the fence's
        region (``domain.sealing``)."""
        ...

    async def reach(self) -> Mapping[str, str]:
        """Region → "" (its KMS wraps now) or why not; empty while nothing new is sealed. Asked anew at most twice a minute."""
        ...

    def seen(self) -> tuple[KmsSeen, ...]:
        """Each region's KMS as it was last seen; none while nothing new is sealed. No I/O."""
        ...

    def warnings(self) -> tuple[str, ...]:
        """What people should know: wraps that are missing, a rotation that is overdue. No I/O."""
        ...


# --------------------------------------------------------------------------------------------------------------- traffic


@dataclass(frozen=True, slots=True)
class TrafficState:
    """What the zone says now. ``exact`` is the adapter's own copy of the record sets that the next DELETE must match."""

    weights: Mapping[str, int]
    epoch: int
    """From the TXT record; 0 when there is none."""
    exact: tuple[str, ...] = ()
    """Canonical JSON of each record set involved: opaque to everybody else, printable, comparable."""


class Traffic(Protocol):
    """Weighted DNS records of the group, changed by compare-and-set only (Route 53)."""

    async def read(self) -> TrafficState:
        """Raises Refused when the zone holds records under our names that we do not understand (an alias, another type)."""
        ...

    async def change(self, fence: Fence, expected: TrafficState, weights: Mapping[str, int]) -> str:
        """One atomic batch: DELETE exactly what ``expected`` holds, CREATE the same with ``weights`` and the TXT raised to
        ``fence.epoch``. Equal weights raise the TXT alone. Returns a change id; already so = success (id ``"none"``).
        Raises FenceLost (the zone's epoch is greater than the fence's), Conflict (changed meanwhile: re-read),
        Refused (weights outside 0..255, all zero, unknown region), Unavailable, OutcomeUnknown."""
        ...

    async def in_sync(self, change_id: str) -> bool:
        """Whether all of the provider's name servers have the change."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """What one DNS server said. ``error`` is "" or the reason: ``NXDOMAIN``, ``SERVFAIL``, ``timeout``, …"""

    server: str
    values: tuple[str, ...]
    ttl_seconds: int
    error: str = ""


class Resolver(Protocol):
    """DNS as seen from outside. Failures of a server are values in its answer, never exceptions."""

    async def ask(self, name: str, rdtype: str) -> tuple[Answer, ...]:
        """Asks every configured server directly, in parallel.

        ``values`` are sorted texts (TXT strings joined, without quotes).
        """
        ...


# ---------------------------------------------------------------------------------------------------------------- people


@dataclass(frozen=True, slots=True)
class Signer:
    """Who a signature belongs to, as listed in ``allowed_signers``."""

    principal: str
    fingerprint: str


class Identity(Protocol):
    """Verifies signatures offline."""

    def verify(self, message: bytes, signature: str, principal: str) -> Signer:
        """Raises Refused with the reason: not listed, wrong key, wrong namespace, expired key, wrong or garbled signature."""
        ...


@dataclass(frozen=True, slots=True)
class Page:
    """A message to people. ``key`` makes repeated pages of one matter recognisable."""

    key: str
    severity: str
    title: str
    body: str
    runbook: str = ""


class Pager(Protocol):
    """Best effort, bounded, never blocks a decision. Raises Unavailable when nobody could be reached."""

    async def page(self, page: Page) -> None: ...


# ----------------------------------------------------------------------------------------------------------------- peers


class Peers(Protocol):
    """Other controllers, by their addresses; all but ``witness`` are for those of the same region. Raises Unavailable when
    nothing was sent, OutcomeUnknown when no answer came, and what the other one says."""

    async def ingest(self, address: str, frames: Sequence[Frame]) -> IngestAnswer:
        """Agents' records of streams that the other one holds. It never hands them on."""
        ...

    async def write(self, address: str, lead: Fence, frames: Sequence[Frame]) -> tuple[Ack, ...]:
        """Tasks and assignments from the lead's holder, whose fence this is. Raises FenceLost when it is that no more."""
        ...

    async def positions(self, address: str) -> Mapping[str, int]:
        """The streams that the other one serves, with the last segment of each."""
        ...

    async def witness(self, address: str) -> Witness:
        """What the controller there, of any region, says of etcd."""
        ...

    async def close(self) -> None: ...


class Clock(Protocol):
    """All time comes through here."""

    def monotonic(self) -> float:
        """Seconds that also count suspend (``CLOCK_BOOTTIME``). For ages and leases."""
        ...

    def wall(self) -> float:
        """Seconds since 1970. For people and for stamps that cross processes."""
        ...

    async def sleep(self, seconds: float) -> None: ...
