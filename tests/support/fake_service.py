"""A whole controller in memory, for the API and the command line: real gate, real digests, plain dicts, no network."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from controller.adapters.memory.coordinator import MemoryCluster, MemoryCoordinator
from controller.adapters.memory.gate import OpenGate
from controller.adapters.memory.region_store import MemoryRegionStore, MemoryStore
from controller.domain.approval import Approval, Gate, gate, statement
from controller.domain.failsafe import Witness
from controller.domain.model import (
    Ack,
    AgentSeen,
    Assignment,
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
    StreamReport,
    Unknown,
)
from controller.domain.plan import (
    STEPS,
    AgentLoss,
    Check,
    Evidence,
    HeadSeen,
    Loss,
    Plan,
    PlanKind,
    StoreUnknown,
    digest,
)
from controller.domain.promotion import TRANSITIONS, Event, PlanRecord, State, move
from controller.errors import ApprovalRequired, FenceLost, NotActive, NotFound, Refused
from controller.ports import Identity
from controller.runtime.active import Active
from controller.runtime.archive import Archive
from controller.runtime.audit import GENESIS, Audit, entry_hash
from controller.runtime.documents import Keys
from controller.runtime.fleet import FleetManager
from controller.runtime.mender import Mender
from controller.runtime.restorer import Restorer
from controller.runtime.salvager import Salvager
from controller.runtime.service import (
    AgentPage,
    ApprovalRequest,
    ApprovalSeen,
    AuditEntry,
    Incident,
    JournalEntry,
    PlanDocument,
    PlanRequest,
    RegionStatus,
    Status,
)
from controller.runtime.verifier import Verifier
from controller.stream.view import View

GROUP = "lab"
REGIONS = ("eu-west-1", "eu-central-1", "us-east-1")
CHAIN = "a" * 64


@dataclass
class FakeClock:
    """A clock that stands still until it is told otherwise."""

    now: float = 1_800_000_000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def make_loss(exact: bool = False) -> Loss:
    return Loss(
        exact=exact,
        records=41,
        records_unknown=not exact,
        seconds=3.25,
        basis="last report of the holder, 0.6 s before its right ended",
        worst=(AgentLoss("agent-007", 3, "step-41"), AgentLoss("writer/α", 1, "step-9")),
    )


def make_plan(
    plan_id: str = "p-0001",
    *,
    kind: PlanKind = PlanKind.FAILOVER,
    created_at: float = 1_800_000_000.0,
    expires_at: float = 1_800_001_800.0,
    requester: str = "oncall",
    reason: str = "eu-west-1 is silent",
    target: str = "eu-central-1",
    break_glass: bool = False,
) -> Plan:
    evidence = Evidence(
        at=created_at,
        authority_region=REGIONS[0],
        authority_epoch=7,
        authority_revision=120,
        holders=(),
        heads=tuple(HeadSeen(region, "s0", 1042, 7, 7, CHAIN, created_at - 4.0) for region in REGIONS[1:]),
        unreachable=(StoreUnknown(REGIONS[0], "s0", created_at - 5.0, "no answer within 2.0 s"),),
        forks={"s0": ()},
        lag=(RegionLag(REGIONS[1], 1042, 1, 41, 90_000, Unknown(created_at - 4.0, "holder gone"), 1042),),
        loss=make_loss(),
        agents=50,
        weights={REGIONS[0]: 100, REGIONS[1]: 0, REGIONS[2]: 0},
        traffic_epoch=7,
        checks=(Check("target-store", True, "eu-central-1 answers"), Check("home-store", False, "eu-west-1 is silent")),
    )
    return Plan(
        id=plan_id,
        group=GROUP,
        kind=kind,
        source=REGIONS[0],
        target=target,
        requester=requester,
        reason=reason,
        created_at=created_at,
        expires_at=expires_at,
        approvals_required=1 if break_glass else 2,
        break_glass=break_glass,
        weights={region: 100 if region == target else 0 for region in REGIONS},
        tolerance_seconds=10.0,
        tolerance_records=1000,
        evidence=evidence,
    )


def make_record(plan: Plan) -> PlanRecord:
    return PlanRecord(plan, digest(plan), State.AWAITING_APPROVAL, plan.created_at)


@dataclass
class FakeService:
    """Implements ``ControllerService``. Everything that a test wants to change is a public attribute."""

    clock: FakeClock = field(default_factory=FakeClock)
    identity: Identity | None = None
    region: str = REGIONS[1]
    instance: str = "a"
    role: Role = Role.STANDBY
    right_seconds: float = 0.0
    is_ready: tuple[bool, str] = (True, "follower is at segment 1042")
    fail_with: Exception | None = None
    """Raised by every coroutine method: what a broken neighbour looks like."""
    steps_per_look: int = 0
    """How many steps of a running promotion happen each time somebody looks at its plan."""
    step_events: tuple[Event, ...] = ()

    def __post_init__(self) -> None:
        self.plan_records: dict[str, PlanRecord] = {}
        self.approvals: dict[str, list[Approval]] = {}
        self.journals: dict[str, list[JournalEntry]] = {}
        self.bodies: dict[tuple[str, str], tuple[Record, bytes]] = {}
        self.entries: list[AuditEntry] = []
        self.beats: list[Beat] = []
        self.tasks: dict[str, Mapping[str, object]] = {}
        self.open_incidents: list[Incident] = []
        self.seen_agents: tuple[AgentSeen, ...] = ()
        self.status_changes: dict[str, object] = {}
        self.calls: list[str] = []
        self.view = View(None)
        """What the past is read from; a history is put in with ``History.apply_to``."""
        fleet = FleetManager(self.view, self._never, lambda: self.right_seconds, self.clock, epoch=lambda: 7)
        self.archive = Archive(GROUP, self.region, self.view, lambda: ("0",), fleet)

        self.folder = tempfile.TemporaryDirectory(prefix="fake-service-")
        self.verifier = Verifier(
            group=GROUP,
            region=self.region,
            instance=self.instance,
            stores={region: MemoryRegionStore(MemoryStore(region), OpenGate()) for region in REGIONS},
            view=self.view,
            streams=lambda: ("0",),
            clock=self.clock,
            state_dir=Path(self.folder.name),
        )

        self.mender = Mender(
            self.verifier,
            Audit(MemoryCoordinator(MemoryCluster(self.clock)), Keys("/dr", GROUP)),
            self.clock,
            region=self.region,
            instance=self.instance,
            fence_of=lambda stream: None,
            held=lambda stream: False,
        )

        self.restorer = Restorer(
            group=GROUP,
            archive=self.archive,
            view=self.view,
            store=self.verifier.stores[self.region],
            stores=len(REGIONS),
            fleet=fleet,
            serving=self._not_serving,
            audit=Audit(MemoryCoordinator(MemoryCluster(self.clock)), Keys("/dr", GROUP)),
            clock=self.clock,
        )

        self.salvager = Salvager(
            group=GROUP,
            region=self.region,
            instance=self.instance,
            stores=self.verifier.stores,
            view=self.view,
            streams=lambda: ("0",),
            fence_of=lambda stream: None,
            holder=lambda stream: None,
            audit=Audit(MemoryCoordinator(MemoryCluster(self.clock)), Keys("/dr", GROUP)),
            clock=self.clock,
        )

    def _not_serving(self, stream: str) -> Active:
        raise NotActive(f"nobody writes stream {stream} here", hint="ask the active controller")

    async def _never(self, frames: Sequence[Frame]) -> IngestAnswer:
        raise AssertionError("nothing here writes for the fleet")

    # -- local facts

    def may_act(self) -> bool:
        return self.right_seconds > 0

    def ready(self) -> tuple[bool, str]:
        return self.is_ready

    def metrics(self) -> bytes:
        return b"# HELP dr_epoch Epoch.\n# TYPE dr_epoch gauge\ndr_epoch 7\n"

    def _enter(self, name: str) -> None:
        self.calls.append(name)
        if self.fail_with is not None:
            raise self.fail_with

    def _need_active(self) -> None:
        if self.role is not Role.ACTIVE or not self.may_act():
            raise NotActive(
                f"{self.region}/{self.instance} is {self.role.value}", hint="ask the active one", active="http://127.0.1.1:8080"
            )

    # -- agents

    async def ingest(self, frames: Sequence[Frame]) -> IngestAnswer:
        self._enter("ingest")
        self._need_active()
        acks = []
        for frame in frames:
            known = (frame.record.agent, frame.record.id) in self.bodies
            self.bodies[frame.record.agent, frame.record.id] = (frame.record, frame.payload)
            acks.append(Ack(frame.record.agent, frame.record.id, "duplicate" if known else "acknowledged", 1043, 1))
        return IngestAnswer(7, self.right_seconds, tuple(acks))

    async def peer_ingest(self, frames: Sequence[Frame]) -> IngestAnswer:
        return await self.ingest(frames)

    async def peer_write(self, region: str, instance: str, epoch: int, frames: Sequence[Frame]) -> tuple[Ack, ...]:
        if (region, instance, epoch) != (self.region, self.instance, 7):
            raise FenceLost(f"{region}/{instance} in epoch {epoch} does not lead", epoch=7)
        return (await self.ingest(frames)).acks

    def peer_positions(self) -> Mapping[str, int]:
        self._need_active()
        return {"s00": 1043}

    def witness(self) -> Witness:
        return Witness(self.region, self.instance, None, self.region, "", {"s00": 7})

    async def settle(self, agent: str | None = None) -> None:
        self._need_active()

    async def beat(self, beat: Beat) -> BeatAnswer:
        self._enter("beat")
        self.beats.append(beat)
        if self.role is not Role.ACTIVE:
            return BeatAnswer(False, 7, 0.0, (), "http://127.0.1.1:8080")
        given = tuple(Assignment(agent, 1, spec) for agent, spec in self.tasks.items())
        return BeatAnswer(True, 7, self.right_seconds, given)

    async def create_task(self, agent: str, spec: Mapping[str, object]) -> IngestAnswer:
        self._enter("create_task")
        self._need_active()
        self.tasks[agent] = spec
        return IngestAnswer(7, self.right_seconds, (Ack(agent, "task-1", "acknowledged", 1043, 1),))

    def agents(self, page: AgentPage) -> tuple[AgentSeen, ...]:
        self.calls.append(f"agents {page.limit} {page.after} {page.prefix} {page.newest}")
        found = [one for one in self.seen_agents if one.agent.startswith(page.prefix)]
        found = found if page.newest else [one for one in found if one.agent > page.after]
        order = sorted(found, key=lambda one: (-one.received_at, one.agent) if page.newest else (0.0, one.agent))
        return tuple(order[: page.limit])

    async def latest(self, agent: str, kind: str) -> tuple[Record, bytes]:
        self._enter("latest")
        found = [pair for (name, _), pair in self.bodies.items() if name == agent and pair[0].kind == kind]
        if not found:
            raise NotFound(f"agent {agent} has no {kind}", hint="list agents with: drctl agents")
        return found[-1]

    async def read(self, agent: str, record_id: str) -> tuple[Record, bytes]:
        self._enter("read")
        try:
            return self.bodies[agent, record_id]
        except KeyError:
            raise NotFound(f"agent {agent} has no record {record_id}", hint="list them first") from None

    def records(self, agent: str, limit: int, before: str | None) -> tuple[Record, ...]:
        return tuple(pair[0] for (name, _), pair in self.bodies.items() if name == agent)[:limit]

    # -- people

    async def status(self) -> Status:
        self._enter("status")
        now = self.clock.wall()
        plans = tuple(record for record in self.plan_records.values() if not record.ended)
        lag = RegionLag(REGIONS[1], 1042, 1, 41, 90_000, 0.4, 1042)
        gone = Unknown(now - 70, "store silent")
        silent = RegionLag(REGIONS[2], gone, gone, gone, gone, gone, Unknown(0.0, "never verified"))
        head = Head("s0", 1042, 7, CHAIN)
        status = Status(
            group=GROUP,
            sentence="eu-west-1 is active; us-east-1 does not answer",
            next="drctl plan failover --to eu-central-1 --reason …",
            region=self.region,
            instance=self.instance,
            role=self.role,
            at=now,
            authority=Authority(REGIONS[0], 7, REGIONS),
            holders=(Holder("s0", REGIONS[0], "a", 7, "http://127.0.1.1:8080", now - 600),),
            regions=(
                RegionStatus(REGIONS[0], True, 100, {"s0": head}, None, 2, True),
                RegionStatus(REGIONS[1], False, 0, {"s0": head}, lag, 2, True),
                RegionStatus(
                    REGIONS[2],
                    False,
                    Unknown(now - 70, "throttled"),
                    {"s0": Unknown(now - 70, "silent")},
                    silent,
                    0,
                    Unknown(now - 70, "no standby reports"),
                ),
            ),
            reports=(StreamReport("s0", REGIONS[0], "a", 7, now - 1, 1043, 1043, 9000, (lag, silent), 0.4, Unknown(now - 70)),),
            rpo_seconds=5.0,
            rpo_policy="alert",
            exposure_seconds=Unknown(now - 70, "us-east-1 is silent"),
            exposure_records=Unknown(now - 70, "us-east-1 is silent"),
            traffic_epoch=7,
            agents=len(self.seen_agents),
            right_seconds=self.right_seconds,
            plans=plans,
            incidents=tuple(self.open_incidents),
            positions={"s0": Position(1042, CHAIN, 7, now - 0.2)},
            warnings=("etcd 3.5.1 is older than 3.5.16: fine in a lab, not in production",),
        )
        return replace(status, **self.status_changes)  # type: ignore[arg-type]

    async def members(self) -> tuple[Member, ...]:
        self._enter("members")
        return (Member(self.region, self.instance, "http://127.0.2.1:8080", self.role, 1.8e9, 1.8e9, "0.1.0", "f" * 64),)

    async def incidents(self, include_closed: bool = False) -> tuple[Incident, ...]:
        self._enter("incidents")
        return tuple(i for i in self.open_incidents if include_closed or not i.closed_at)

    async def create_plan(self, request: PlanRequest) -> PlanDocument:
        self._enter("create_plan")
        if request.to not in REGIONS:
            raise Refused(f"region {request.to} is unknown", hint=f"use one of {', '.join(REGIONS)}")
        if request.to == REGIONS[0]:
            raise Refused(f"{request.to} is active already", hint="choose another region")
        if request.break_glass and not request.reason.strip():
            raise Refused("break-glass needs a stated reason", hint="add --reason")
        plan = make_plan(
            f"p-{len(self.plan_records) + 1:04d}",
            kind=PlanKind(request.kind),
            created_at=self.clock.wall(),
            expires_at=self.clock.wall() + 1800,
            requester=request.requester,
            reason=request.reason,
            target=request.to,
            break_glass=request.break_glass,
        )
        self.plan_records[plan.id] = make_record(plan)
        self.record("oncall", "plan.create", plan.id, {"target": plan.target})
        return await self.plan(plan.id)

    async def plans(self) -> tuple[PlanRecord, ...]:
        self._enter("plans")
        return tuple(self.plan_records.values())

    async def plan(self, plan_id: str) -> PlanDocument:
        self._enter("plan")
        if plan_id not in self.plan_records:
            raise NotFound(f"there is no plan {plan_id}", hint="list plans with: drctl plan list")
        for _ in range(self.steps_per_look):
            self._step(plan_id)
        seen = self._gate(plan_id)
        why = dict(seen.rejected)
        shown = tuple(
            ApprovalSeen(
                a.principal, a.fingerprint, a.decision, a.expires_at, a.at, a.principal not in why, why.get(a.principal, "")
            )
            for a in self.approvals.get(plan_id, [])
        )
        return PlanDocument(
            self.plan_records[plan_id],
            shown,
            tuple(self.journals.get(plan_id, [])),
            seen.missing,
            f"drctl promote {plan_id} --execute" if seen.open else f"drctl approve {plan_id} --key FILE",
        )

    def _gate(self, plan_id: str) -> Gate:
        return gate(self.plan_records[plan_id], self.approvals.get(plan_id, []), self.clock.wall())

    async def approve(self, plan_id: str, approval: ApprovalRequest) -> PlanDocument:
        self._enter("approve")
        record = (await self.plan(plan_id)).record
        if approval.digest and approval.digest != record.digest:
            raise Refused("the digest is not this plan's", hint="read the plan again")
        message = statement(GROUP, plan_id, record.digest, approval.decision, approval.principal, approval.expires_at)
        if self.identity is None:
            raise Refused("nobody may approve here", hint="set approvals.allowed_signers")
        signer = self.identity.verify(message, approval.signature, approval.principal)
        others = [known for known in self.approvals.get(plan_id, []) if known.principal != signer.principal]
        self.approvals[plan_id] = [
            *others,
            Approval(
                plan_id,
                record.digest,
                signer.principal,
                signer.fingerprint,
                approval.decision,
                approval.expires_at,
                self.clock.wall(),
                approval.signature,
            ),
        ]
        if refused_by := self._gate(plan_id).refused_by:
            self.plan_records[plan_id] = move(record, Event.REFUSED, at=self.clock.wall(), reason=f"refused by {refused_by}")
        return await self.plan(plan_id)

    async def execute(self, plan_id: str, requester: str, confirm: str) -> PlanDocument:
        self._enter("execute")
        record = (await self.plan(plan_id)).record
        if confirm != record.plan.target:
            raise Refused(f"confirm says {confirm}, the plan goes to {record.plan.target}", hint="name the target region")
        seen = self._gate(plan_id)
        if not seen.open:
            raise ApprovalRequired(seen.sentence, hint=f"drctl approve {plan_id} --key FILE --principal NAME")
        self.plan_records[plan_id] = replace(
            move(record, Event.STARTED, at=self.clock.wall(), reason="asked to run"), execute_requested_by=requester
        )
        return await self.plan(plan_id)

    def _step(self, plan_id: str) -> None:
        """One event further along the table, taking the way that leads to ``done``."""
        record = self.plan_records[plan_id]
        if record.state is State.AWAITING_APPROVAL or record.ended:
            return
        stop = {Event.REFUSED, Event.DRIFTED, Event.EXPIRED, Event.ABORTED, Event.LOSS_EXCEEDED}
        event = next((e for e in self.step_events if e in TRANSITIONS[record.state]), None)
        event = event or next(e for e in TRANSITIONS[record.state] if e not in stop)
        entries = self.journals.setdefault(plan_id, [])
        now = self.clock.wall()
        entries.append(
            JournalEntry(plan_id, STEPS[min(len(entries) + 1, 9)], now, now + 0.5, "eu-central-1/a", 8, f"{event.value} ok")
        )
        self.clock.now += 0.5
        self.plan_records[plan_id] = move(record, event, at=now, reason=event.value)

    async def abort(self, plan_id: str, requester: str, reason: str) -> PlanDocument:
        self._enter("abort")
        record = (await self.plan(plan_id)).record
        if Event.ABORTED not in TRANSITIONS[record.state]:
            raise Refused(
                f"plan {plan_id} is {record.state.value} and cannot be aborted", hint="the way is forward, or a new plan"
            )
        self.plan_records[plan_id] = move(record, Event.ABORTED, at=self.clock.wall(), reason=reason)
        return await self.plan(plan_id)

    async def audit(self, after: int, limit: int) -> tuple[AuditEntry, ...]:
        self._enter("audit")
        return tuple(entry for entry in self.entries if entry.n > after)[:limit]

    def record(self, actor: str, action: str, subject: str, detail: Mapping[str, object]) -> None:
        """Adds an audit entry to the chain."""
        previous = self.entries[-1].hash if self.entries else GENESIS
        entry = AuditEntry(len(self.entries) + 1, self.clock.wall(), actor, action, subject, detail, previous, "")
        self.entries.append(replace(entry, hash=entry_hash(entry)))


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
