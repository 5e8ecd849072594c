"""The values that every layer speaks in: regions, epochs, heads, records, authority, lag.

All are frozen. Times called ``*_at`` are wall-clock seconds since 1970 (for people and for stamps that cross processes);
ages and leases are measured elsewhere, on a monotonic clock. ``Unknown`` is a value of its own and is never replaced by
0, False or None. One page on purpose: they are the glossary, and decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

GENESIS = "0" * 64
"""Chain hash before the first segment of a stream."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """Something that could not be measured. ``since``: when it was last known (wall clock seconds, 0 = never)."""

    since: float
    why: str = ""

    def __bool__(self) -> bool:
        raise TypeError("Unknown is neither true nor false; ask isinstance(x, Unknown)")


class Role(StrEnum):
    """What one controller instance is doing now."""

    STANDBY = "standby"
    OPENING = "opening"
    HOLDING = "holding"
    ACTIVE = "active"
    DRAINING = "draining"
    FENCED = "fenced"


@dataclass(frozen=True, slots=True)
class Fence:
    """The token that goes with every mutating call. The far side refuses an epoch older than the greatest it has seen."""

    stream: str
    epoch: int
    region: str
    instance: str

    @property
    def writer(self) -> str:
        """Identity that is written beside every conditional write, for the read-back "is it mine?"."""
        return f"{self.region}/{self.instance}/{self.epoch}"


# ---------------------------------------------------------------------------------------------------------------- stream


@dataclass(frozen=True, slots=True, order=True)
class EpochStart:
    """Epoch ``epoch`` owns the sequence numbers from ``first_seq`` on, up to the next start. Also called a fork."""

    epoch: int
    first_seq: int


@dataclass(frozen=True, slots=True)
class Salvage:
    """A diverged tail that a realignment cut off a store: ``first_seq … last_seq`` as owned by ``epochs``.

    Its objects are still there.
    """

    first_seq: int
    last_seq: int
    epochs: tuple[EpochStart, ...]
    last_chain: str
    by_epoch: int


@dataclass(frozen=True, slots=True)
class NamedSnapshot:
    """An index snapshot that a head names: where in the history it was made, and the hash that its object must have."""

    seq: int
    epoch: int
    """Of the holder that wrote it: part of its object's key."""
    chain: str
    """Chain hash after segment ``seq``."""
    sha256: str


@dataclass(frozen=True, slots=True)
class Head:
    """The one mutable item of a stream in a region store: how far the gap-free chained prefix goes, and who may extend it."""

    stream: str
    seq: int = 0
    epoch: int = 0
    chain: str = GENESIS
    epochs: tuple[EpochStart, ...] = ()
    base: int = 1
    base_chain: str = GENESIS
    salvage: tuple[Salvage, ...] = ()
    received_at: float = 0.0
    records: int = 0
    bytes: int = 0
    writer: str = ""
    snapshots: tuple[NamedSnapshot, ...] = ()
    """Index snapshots of this history that lie in this store, oldest first."""

    @property
    def last_epoch(self) -> int:
        """Epoch of the last segment, 0 when the stream is empty."""
        return self.epochs[-1].epoch if self.epochs else 0

    def owner(self, seq: int) -> int:
        """Epoch of segment ``seq`` in this store's history. Raises LookupError outside ``1 … self.seq``."""
        if not 1 <= seq <= self.seq:
            raise LookupError(f"segment {seq} is not in 1..{self.seq}")
        for start in reversed(self.epochs):
            if start.first_seq <= seq:
                return start.epoch
        raise LookupError(f"no epoch owns segment {seq}")


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """Names one immutable segment object."""

    stream: str
    seq: int
    epoch: int

    @property
    def key(self) -> str:
        """Object key below the group's prefix."""
        return f"{self.stream}/{self.seq:016d}-{self.epoch:016d}.seg"


@dataclass(frozen=True, slots=True, order=True)
class SnapshotRef:
    """Names one immutable index snapshot: the segment after which it was made, and the epoch of its writer."""

    stream: str
    seq: int
    epoch: int

    @property
    def key(self) -> str:
        """Object key below the group's prefix."""
        return f"{self.stream}/snapshots/{self.seq:016d}-{self.epoch:016d}.snap"


@dataclass(frozen=True, slots=True)
class Commit:
    """Moves a head from ``prev_seq`` to ``seq``. One commit may cover several segments that are already put."""

    prev_seq: int
    prev_chain: str
    seq: int
    chain: str
    starts: tuple[EpochStart, ...] = ()
    """Epochs that begin inside ``prev_seq + 1 … seq``, ascending; appended to the head's ``epochs``."""
    received_at: float = 0.0
    records: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Realignment:
    """Cuts a store back to ``seq`` (or re-seeds it: ``base`` moves too). What is cut becomes salvage."""

    seq: int
    chain: str
    base: int
    base_chain: str
    epochs: tuple[EpochStart, ...]
    salvage: Salvage | None
    received_at: float = 0.0
    """Of the last segment that stays; the head's counters are set with it."""
    records: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Baseline:
    """Where a store's kept history begins, and the snapshots of it that the head names, oldest first."""

    base: int
    base_chain: str
    snapshots: tuple[NamedSnapshot, ...] = ()


@dataclass(frozen=True, slots=True)
class FramePlace:
    """Where one frame lies: the segment, its number in it, and its bytes in the segment's object."""

    seq: int
    epoch: int
    ordinal: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """An agent's latest restorable checkpoint and where it lies: enough to restore it by plain AWS calls."""

    agent: str
    kind: str
    id: str
    sha256: str
    size: int
    encoding: str
    """Of the first place of ``chain``."""
    received_at: float
    chain: tuple[FramePlace, ...]
    """The record's own frame, then the frame that it is a delta against, and so on down to a whole one."""
    by_epoch: int = 0
    """Epoch of the holder that wrote the item; 0 before it is written: the store sets it."""


class Kind:
    """Kinds of record that the controller itself understands. Agents may use others; unknown kinds are kept and replicated."""

    CHECKPOINT = "checkpoint"
    TASK = "task"
    ASSIGNMENT = "assignment"
    CANARY = "canary"
    OPENING = "opening"
    INTENDED = "intended"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Record:
    """Everything about one record but its body."""

    agent: str
    id: str
    kind: str
    sha256: str
    """Hex hash of the full (decoded) body."""
    size: int
    """Bytes of the full body."""
    parent: str | None = None
    created_at: float = 0.0
    """The agent's own clock."""
    received_at: float = 0.0
    """The holder's clock: the one that lag is measured with."""
    copies: int = 1
    attempt: int = 0
    """Fencing number of the assignment under which the agent wrote."""
    meta: Mapping[str, str] = field(default_factory=dict)


class Encoding(StrEnum):
    """How a frame's payload gives its body."""

    RAW = "raw"
    ZSTD = "zstd"
    DELTA = "delta"


@dataclass(frozen=True, slots=True)
class Frame:
    """One record with its payload, as it travels and as it lies in a segment."""

    record: Record
    encoding: Encoding
    payload: bytes
    base: str | None = None
    """For DELTA: id of the record of the same agent whose body is the prefix."""


# ------------------------------------------------------------------------------------------------------------- authority


@dataclass(frozen=True, slots=True)
class Barrier:
    """A plan that is taking over: while it stands nobody acquires, but the target of a plan past ``authorize``."""

    plan: str
    kind: str
    target: str


@dataclass(frozen=True, slots=True)
class Authority:
    """Which region may be active, and the greatest epoch that was ever given out in this group."""

    region: str
    epoch: int
    stores: tuple[str, ...]
    plan: str | None = None
    barrier: Barrier | None = None
    streams: int = 1
    """How many streams the group has, for its whole life: with another number agents would belong to other streams."""
    cluster: str = ""
    """Id of the etcd cluster in which the group was founded or recovered; "" = it was not recorded. A cluster that is restored
    from a snapshot has another id, and may have forgotten who acknowledged alone."""


@dataclass(frozen=True, slots=True)
class Holder:
    """The instance that holds a stream's lease. The etcd key that contains it vanishes with the lease."""

    stream: str
    region: str
    instance: str
    epoch: int
    address: str
    acquired_at: float
    ttl_seconds: float = 0.0
    """What the holder counts its right with: whoever revokes its lease must have waited at least so long."""


@dataclass(frozen=True, slots=True)
class Forks:
    """Which epoch owns which sequence numbers of one stream, as recorded in etcd. Ascending by epoch and by first_seq.

    ``sole_ackers``: the stores that may hold acknowledgements which no other store has: the home store of the epoch that
    opened last, and every stand-in that it recorded. It lies here and not in ``authority``, because each stream opens, and
    so resets it, on its own.
    """

    starts: tuple[EpochStart, ...] = ()
    sole_ackers: tuple[str, ...] = ()
    failsafe_seconds: float = 0.0
    """How long the holder that opened last may act past the moment at which its stores proved it (``domain.failsafe``): its
    successor waits so long after fencing them. 0: it never goes on past its lease; negative: not known."""
    lent_seconds: float = 0.0
    """How long rights under the holder that opened last may outlive its key: its TTL less the margin, because etcd may take a
    lease away right after it was renewed (``domain.lease``). 0: it ended with every right over; negative: not known."""


# ------------------------------------------------------------------------------------------------------------------- lag


@dataclass(frozen=True, slots=True)
class RegionLag:
    """How far one region's copy is behind what was acknowledged. ``seconds`` is defined in DESIGN section 5."""

    region: str
    seq: int | Unknown
    segments: int | Unknown
    records: int | Unknown
    bytes: int | Unknown
    seconds: float | Unknown
    verified_seq: int | Unknown
    """Last segment that the region's standby read back, decoded and hashed."""


@dataclass(frozen=True, slots=True)
class AgentTail:
    """The newest acknowledged record of an agent that some region does not have yet."""

    agent: str
    records: int
    last_id: str
    received_at: float


@dataclass(frozen=True, slots=True)
class StreamReport:
    """What the holder knows of its stream. Written to etcd without a lease, so that it outlives the holder."""

    stream: str
    region: str
    instance: str
    epoch: int
    at: float
    seq: int
    """Last segment that is committed in the home store."""
    acknowledged_seq: int
    acknowledged_records: int
    regions: tuple[RegionLag, ...]
    exposure_seconds: float | Unknown
    exposure_records: int | Unknown
    unreplicated: tuple[AgentTail, ...] = ()
    """Worst agents first, at most 20: acknowledged records that are in one region only."""
    protected: tuple[str, ...] = ()
    """Regions whose lag has been within the RPO, and whose copy was verified end to end, for the settling time."""
    enforcing_since: float = 0.0
    """Wall time since which the holder holds acknowledgements back, because the exposure reached the RPO; 0: it does not."""
    enforcing: str = ""
    """Why."""


@dataclass(frozen=True, slots=True)
class Position:
    """How far a follower has read, verified and indexed its own region's store."""

    seq: int
    chain: str
    epoch: int
    at: float


@dataclass(frozen=True, slots=True)
class Member:
    """A live controller, what it is doing and what it sees. Leased."""

    region: str
    instance: str
    address: str
    role: Role
    started_at: float
    at: float
    version: str
    fingerprint: str
    """Hash of the settings that must be equal in all controllers of a group."""
    positions: Mapping[str, Position] = field(default_factory=dict)
    reason: str = ""
    """The last tick's one sentence."""


# -------------------------------------------------------------------------------------------------- what agents are told


@dataclass(frozen=True, slots=True)
class Ack:
    """The answer to one record.

    ``acknowledged`` and ``duplicate`` (equal body, already safe) are promises; ``failed`` is not.
    """

    agent: str
    id: str
    status: str
    seq: int = 0
    copies: int = 0
    error: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True)
class AgentSeen:
    """One agent in a region's view."""

    agent: str
    records: int
    latest_id: str
    latest_seq: int
    received_at: float
    attempt: int
    host: str = ""


@dataclass(frozen=True, slots=True)
class IngestAnswer:
    """Answer to a batch. ``right_seconds``: how long the agents may act, counted from when *they sent* the request; 0 = no
    longer than they may already (a host's right comes from the lead stream's holder only)."""

    epoch: int
    """The greatest of the epochs that took part."""
    right_seconds: float
    acks: tuple[Ack, ...]
    epochs: Mapping[str, int] = field(default_factory=dict)
    """Stream → epoch in which its records were taken. Epochs of different streams are not comparable."""
    holder_seconds: float | None = None
    """How long the acknowledgements count, from when the request was sent: the shortest right of the holders that gave them.
    None: as long as ``right_seconds``."""


@dataclass(frozen=True, slots=True)
class Running:
    """An agent that a host says it runs, with the attempt number that it was assigned under."""

    agent: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Beat:
    """A host's heartbeat."""

    host: str
    capacity: int
    agents: tuple[Running, ...] = ()


@dataclass(frozen=True, slots=True)
class Assignment:
    """A host shall run this agent, from this record, under this fencing number. ``held``: wait for a person or a policy."""

    agent: str
    attempt: int
    spec: Mapping[str, object]
    resume_id: str | None = None
    held: bool = False


@dataclass(frozen=True, slots=True)
class BeatAnswer:
    """The answer to a heartbeat.

    ``active`` False: this controller does not serve agents now; stop what runs when its right has passed, ask
    ``active_address``.
    """

    active: bool
    epoch: int
    right_seconds: float
    assignments: tuple[Assignment, ...] = ()
    active_address: str | None = None
