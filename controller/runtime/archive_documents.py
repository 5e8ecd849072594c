"""What a controller answers about the past: records with their places, and points in time. Frozen; fields are only added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from controller.stream.proof import Problem

MAX_RESTORE = 100
"""Agents in one request to give states back."""
MAX_AS_OF = 500
"""Agents in one page of a point in time: some milliseconds for the view."""


@dataclass(frozen=True, slots=True)
class CheckpointSeen:
    """A record without its body, and where it lies in the copy of the region that answers."""

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
    ordinal: int
    key: str
    """Object key below the group's prefix; "" when only a carried-forward copy is left."""
    encoding: str
    depth: int
    """Deltas that a reader goes through."""
    verified: bool
    """Its body was decoded and hashed in this region."""
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AgentThen:
    """One agent at a point in time. ``state``: ``found`` (something newer would be stepped over), ``unchanged`` (nothing is
    newer), ``restored`` (this very point was restored already), ``none`` (the agent had nothing then), ``gone`` (this copy does
    not reach back so far for it)."""

    agent: str
    state: str
    why: str
    found: CheckpointSeen | None
    upto: str
    """Last record of the agent's state at that time."""
    newest_id: str
    newest_at: float
    newer: int
    """Records of its state that came after."""
    earliest_at: float
    """The oldest point in time that can be given back for it."""
    host: str = ""
    running: bool = False
    """A host that beats has it: it would write over what is restored."""


@dataclass(frozen=True, slots=True)
class AsOf:
    """A page of agents at one point in time. ``after``: ask for the next page with it; "" = this was the last."""

    group: str
    region: str
    at: float
    kind: str
    begins_at: float
    """The time from which on this copy has everything; 0 = the whole history."""
    agents: tuple[AgentThen, ...]
    after: str = ""


@dataclass(frozen=True, slots=True)
class StreamWalk:
    """How far the verification of one stream is. ``seq`` of ``goal`` segments; counts are of what was walked."""

    stream: str
    base: int = 1
    seq: int = 0
    goal: int = 0
    segments: int = 0
    records: int = 0
    bytes: int = 0
    conflicts: int = 0
    """Frames whose id was taken by another body: only a holder that broke its rules writes one."""


@dataclass(frozen=True, slots=True)
class Verification:
    """A verification of one region's store. ``state``: ``running``, ``done``, ``interrupted`` (``drctl verify`` goes on),
    ``failed`` (a bug)."""

    region: str
    by: str
    """``region/instance`` of the controller that does it."""
    state: str
    reason: str
    started_at: float
    updated_at: float
    resumed: bool
    streams: tuple[StreamWalk, ...]
    problems: tuple[Problem, ...] = ()
    """The first ones."""
    count: int = 0
    """All of them."""


@dataclass(frozen=True, slots=True)
class RepairAction:
    """One problem and what was done about it. ``state``: ``would`` (dry run), ``done``, ``whole`` (nothing to do any more),
    ``cannot`` (``sentence`` says what to do instead), ``failed`` (try again)."""

    what: str
    stream: str
    seq: int
    key: str
    agent: str
    record: str
    records: int
    source: str
    state: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Repair:
    """One batch of a repair. ``left``: problems that remain; ``verified_at``: when what it acts on was found."""

    region: str
    execute: bool
    actions: tuple[RepairAction, ...]
    left: int
    verified_at: float
    next: str


@dataclass(frozen=True, slots=True)
class RestoreItem:
    """One agent as people saw it in the dry run: the record that it had then, and its newest one."""

    agent: str
    record: str
    newest: str


@dataclass(frozen=True, slots=True)
class RestoreOutcome:
    """``state``: ``restored`` (also when it was before), ``failed``, or why there is nothing to do, as in ``AgentThen``."""

    agent: str
    state: str
    record: str
    copies: int
    why: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Restored:
    """The answer to one request."""

    group: str
    at: float
    kind: str
    outcomes: tuple[RestoreOutcome, ...]


class RestoreService(Protocol):
    """Gives earlier states back; the active controller only."""

    async def restore(
        self, at: float, kind: str, items: Sequence[RestoreItem], *, requester: str, confirm: str, force: bool
    ) -> Restored: ...


class MendService(Protocol):
    """Repairs of regions' stores."""

    async def repair(self, region: str, *, execute: bool, requester: str = "", confirm: str = "") -> Repair: ...


class VerifyService(Protocol):
    """Verification of regions' stores, by the controller that is asked. It reads every region's store."""

    async def start(self, region: str, *, restart: bool) -> Verification: ...

    async def state(self, region: str) -> Verification:
        """Raises NotFound when there was none."""
        ...

    async def stop(self, region: str) -> Verification: ...


class ArchiveService(Protocol):
    """The past, as any controller knows it from its own region's copy. Needs no etcd and no active controller."""

    def newest(self, kind: str, after: str, limit: int) -> tuple[CheckpointSeen, ...]: ...

    def checkpoints(
        self, agent: str, *, kind: str | None, before: str | None, since: float | None, until: float | None, limit: int
    ) -> tuple[CheckpointSeen, ...]:
        """Newest first. Raises NotFound."""
        ...

    def checkpoint(self, agent: str, record_id: str) -> CheckpointSeen:
        """Raises NotFound."""
        ...

    def as_of(self, at: float, kind: str, agents: tuple[str, ...], after: str, limit: int) -> AsOf:
        """``agents`` empty: all, in pages. Raises NotFound, Refused for a time before what this copy has."""
        ...
