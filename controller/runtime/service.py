"""What a controller offers to the HTTP API, as a Protocol, and the documents that it answers with.

The API (``runtime/api.py``) knows only this. Tests and the simulation call the same methods without HTTP.
All methods raise ``controller.errors``; documents are frozen and are additive only, since people script against them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from controller.domain.failsafe import Witness
from controller.domain.model import (
    Ack,
    AgentSeen,
    Authority,
    Beat,
    BeatAnswer,
    Frame,
    Head,
    Holder,
    IngestAnswer,
    Member,
    Position,
    Record,
    RegionLag,
    Role,
    Salvage,
    StreamReport,
    Unknown,
)
from controller.domain.promotion import PlanRecord
from controller.domain.sealing import KmsSeen
from controller.runtime.archive_documents import ArchiveService, MendService, RestoreService, VerifyService
from controller.runtime.salvage_documents import SalvageService


@dataclass(frozen=True, slots=True)
class RegionStatus:
    """One region as this controller sees it."""

    region: str
    active: bool
    weight: int | Unknown
    heads: Mapping[str, Head | Unknown]
    lag: RegionLag | None
    """Worst stream of the region; None for the active region itself."""
    members: int
    protected: bool | Unknown
    """Lag within the RPO and the copy verified end to end for the settling time."""
    salvage: tuple[Salvage, ...] = ()


@dataclass(frozen=True, slots=True)
class Incident:
    """Something that people must know about, opened and closed by controllers."""

    id: str
    kind: str
    """``region-silent``, ``store-corrupt``, ``etcd-behind-stores``, …"""
    title: str
    detail: str
    opened_at: float
    by: str
    plan: str = ""
    """The plan that was proposed for it."""
    closed_at: float = 0.0
    region: str = ""
    """The region that it is about."""
    paged_at: float = 0.0
    """When people were told last; 0 = nobody was reached yet."""
    paged_plan: str = ""
    """The plan that they were told of then."""
    paged_by: str = ""


@dataclass(frozen=True, slots=True)
class Status:
    """One answer for the on-call engineer. ``sentence`` says what is going on; ``next`` says what to type."""

    group: str
    sentence: str
    next: str
    region: str
    instance: str
    role: Role
    at: float
    authority: Authority | Unknown
    holders: tuple[Holder, ...] | Unknown
    regions: tuple[RegionStatus, ...]
    reports: tuple[StreamReport, ...]
    rpo_seconds: float
    rpo_policy: str
    exposure_seconds: float | Unknown
    exposure_records: int | Unknown
    traffic_epoch: int | Unknown
    agents: int
    right_seconds: float
    """How long this instance may still act; 0 when it is not the holder."""
    plans: tuple[PlanRecord, ...]
    """Plans that have not ended."""
    incidents: tuple[Incident, ...]
    """Open ones."""
    positions: Mapping[str, Position] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    failsafe_since: float = 0.0
    """Wall time since which this instance goes on past its lease, etcd being unreachable for every region; 0: it does not."""
    kms: tuple[KmsSeen, ...] = ()
    """Each region's KMS; none while nothing is sealed."""


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One step of a promotion, before and after."""

    plan: str
    step: str
    started_at: float
    finished_at: float
    """0 while it runs."""
    instance: str
    epoch: int
    sentence: str
    data: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One decision. ``hash`` = SHA-256 over ``previous`` and the canonical form of all else."""

    n: int
    at: float
    actor: str
    action: str
    subject: str
    detail: Mapping[str, object]
    previous: str
    hash: str


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What somebody asks for."""

    kind: str
    to: str
    requester: str
    reason: str = ""
    break_glass: bool = False


@dataclass(frozen=True, slots=True)
class ApprovalRequest:
    """A signed decision about one plan."""

    principal: str
    decision: str
    expires_at: float
    signature: str
    digest: str
    by: str = ""
    """Who sent it, where callers are known; the signature says who decided."""


@dataclass(frozen=True, slots=True)
class ApprovalSeen:
    """An approval as it is shown."""

    principal: str
    fingerprint: str
    decision: str
    expires_at: float
    at: float
    valid: bool
    why: str = ""


@dataclass(frozen=True, slots=True)
class PlanDocument:
    """A plan with its approvals and journal, as ``drctl plan show`` prints it."""

    record: PlanRecord
    approvals: tuple[ApprovalSeen, ...]
    journal: tuple[JournalEntry, ...]
    missing_approvals: int
    next: str


@dataclass(frozen=True, slots=True)
class AgentPage:
    """Which agents to list. By name, those ``after`` one; or, ``newest``, those that wrote last."""

    limit: int = 1000
    after: str = ""
    prefix: str = ""
    newest: bool = False


class ControllerService(Protocol):
    """One controller instance."""

    @property
    def region(self) -> str: ...

    @property
    def instance(self) -> str: ...

    @property
    def role(self) -> Role: ...

    @property
    def archive(self) -> ArchiveService:
        """The past of this region's copy."""
        ...

    @property
    def verifier(self) -> VerifyService:
        """Verifications that this instance runs."""
        ...

    @property
    def mender(self) -> MendService: ...

    @property
    def restorer(self) -> RestoreService: ...

    @property
    def salvager(self) -> SalvageService:
        """Tails that were cut off stores."""
        ...

    def may_act(self) -> bool:
        """Whether the right of this instance to act has not run out. Local, no I/O."""
        ...

    def ready(self) -> tuple[bool, str]:
        """Readiness with its reason: a standby is ready when its follower is current, the holder while it may act."""
        ...

    async def ingest(self, frames: Sequence[Frame]) -> IngestAnswer:
        """Acknowledges each frame when it is committed in the copies it asked for. Raises NotActive, FenceLost, Unavailable."""
        ...

    async def peer_ingest(self, frames: Sequence[Frame]) -> IngestAnswer:
        """Agents' records that another instance of the region received. Takes those of streams that are held here; never hands
        any on. Raises NotActive when none is."""
        ...

    async def peer_write(self, region: str, instance: str, epoch: int, frames: Sequence[Frame]) -> tuple[Ack, ...]:
        """Tasks and assignments from the lead's holder. Raises FenceLost unless etcd says that this is who sends them."""
        ...

    def peer_positions(self) -> Mapping[str, int]:
        """The streams that are served here, with the last segment of each."""
        ...

    def witness(self) -> Witness:
        """What this instance saw of etcd last, for a holder of another region that reaches it no more."""
        ...

    async def settle(self, agent: str | None = None) -> None:
        """Returns when this copy has all that was acknowledged of the agent (None: of all) before the call. Raises NotActive,
        Unavailable."""
        ...

    async def beat(self, beat: Beat) -> BeatAnswer: ...

    async def create_task(self, agent: str, spec: Mapping[str, object]) -> IngestAnswer: ...

    def agents(self, page: AgentPage) -> tuple[AgentSeen, ...]: ...

    async def latest(self, agent: str, kind: str) -> tuple[Record, bytes]: ...

    async def read(self, agent: str, record_id: str) -> tuple[Record, bytes]: ...

    def records(self, agent: str, limit: int, before: str | None) -> tuple[Record, ...]: ...

    async def status(self) -> Status: ...

    async def members(self) -> tuple[Member, ...]: ...

    async def incidents(self, include_closed: bool = False) -> tuple[Incident, ...]: ...

    async def create_plan(self, request: PlanRequest) -> PlanDocument: ...

    async def plans(self) -> tuple[PlanRecord, ...]: ...

    async def plan(self, plan_id: str) -> PlanDocument: ...

    async def approve(self, plan_id: str, approval: ApprovalRequest) -> PlanDocument: ...

    async def execute(self, plan_id: str, requester: str, confirm: str) -> PlanDocument:
        """Asks for an approved plan to run; ``confirm`` must be the target region's name."""
        ...

    async def abort(self, plan_id: str, requester: str, reason: str) -> PlanDocument: ...

    async def audit(self, after: int, limit: int) -> tuple[AuditEntry, ...]: ...

    def metrics(self) -> bytes:
        """Prometheus text format."""
        ...
