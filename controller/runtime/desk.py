"""What a controller answers: to agents, to people, to probes. The other half of ``Controller``, which has the loops.

A ``Desk`` changes nothing by itself but what it is asked to: records through the active epoch, plans through the plan book. It
reads what the loops have seen; the annotations below say what it needs of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from time import gmtime, strftime

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
    Role,
    Unknown,
)
from controller.domain.promotion import PlanRecord
from controller.domain.sharing import LEAD
from controller.errors import NotActive, NotFound, OutcomeUnknown, Unavailable
from controller.ports import Clock, Page, RegionStore
from controller.runtime.active import Active
from controller.runtime.archive import Archive
from controller.runtime.documents import Keys, Seen, read
from controller.runtime.evidence import Coordination, Outside, look, read_traffic
from controller.runtime.fleet import FleetManager
from controller.runtime.mender import Mender
from controller.runtime.metrics import Kept, Metrics
from controller.runtime.plans import PlanBook
from controller.runtime.restorer import Restorer
from controller.runtime.routing import Router
from controller.runtime.service import (
    AgentPage,
    ApprovalRequest,
    AuditEntry,
    Incident,
    PlanDocument,
    PlanRequest,
    Status,
)
from controller.runtime.shell import Ports
from controller.runtime.shortening import crowding
from controller.runtime.sight import Sight
from controller.runtime.status import Observation, compose
from controller.runtime.verifier import Verifier
from controller.runtime.watch import Watch
from controller.settings import Settings
from controller.stream.keeping import Keeping
from controller.stream.reader import read_record
from controller.stream.view import View

FOLLOW_BUDGET = 64


class Desk(ABC):
    """Implements ``ControllerService`` on what the loops of ``Controller`` keep."""

    _settings: Settings
    _ports: Ports
    _clock: Clock
    _keys: Keys
    _view: View
    _store: RegionStore
    _outside: Outside
    _book: PlanBook
    _watch: Watch
    _fleet: FleetManager
    _metrics: Metrics
    _actives: dict[str, Active]
    _role: Role
    _reason: str
    _sight: Sight
    _followed_at: float
    _warnings: dict[str, str]
    _unheard: list[Page]
    archive: Archive
    verifier: Verifier
    mender: Mender
    restorer: Restorer

    _router: Router
    _current: frozenset[str]
    """Streams of which this copy had everything at the last beat."""

    @property
    def _alone(self) -> bool:
        """Whether the group has one stream, whose holder does everything itself."""
        return len(self._outside.streams) == 1

    @abstractmethod
    def _positions(self) -> dict[str, Position]:
        """Where the followers are."""

    @abstractmethod
    async def _propose(self, request: PlanRequest) -> Seen[PlanRecord]:
        """Gathers the evidence and stores the plan."""

    @abstractmethod
    async def _shout(self, *pages: Page) -> None:
        """Pages people; what nobody heard is tried again."""

    # ------------------------------------------------------------------------------------------------------- agents

    @property
    def region(self) -> str:
        return self._settings.region

    @property
    def instance(self) -> str:
        return self._settings.instance

    @property
    def role(self) -> Role:
        return self._role

    @property
    def _lead(self) -> Active | None:
        """The lead stream's, when this instance holds it."""
        return self._actives.get(LEAD)

    def may_act(self) -> bool:
        """Whether this instance serves any stream now."""
        return any(active.acts() for active in self._actives.values())

    def ready(self) -> tuple[bool, str]:
        """A holder is ready while it may act and what it takes is committed in time, a standby while it follows."""
        if self._actives:
            writers = [active.writer for active in self._actives.values() if active.writer is not None]
            waiting = max((writer.oldest_waiting_seconds() for writer in writers), default=0.0)
            if waiting > self._settings.stream.ack_timeout_seconds:
                return False, f"a record has waited for its copies for {waiting:.0f} s"
            return self.may_act(), self._reason
        age = self._clock.monotonic() - self._followed_at
        if age > max(5.0, 10 * self._settings.stream.follow_seconds):
            return False, self._warnings.get("follow", "the copy of this region's store is not being followed")
        return True, self._reason

    def _right_seconds(self) -> float:
        """How long the lead may still act, if this instance holds it and serves: what hosts are lent."""
        lead = self._lead
        return lead.tenure.remaining_seconds() if lead is not None and lead.acts() else 0.0

    def _act_seconds(self) -> float:
        """How long this instance may still act: the shortest right of the streams that it serves; 0 when it serves none."""
        return min((active.tenure.remaining_seconds() for active in self._actives.values() if active.acts()), default=0.0)

    def _active_address(self, stream: str = LEAD) -> str | None:
        """Where the stream's holder listens, as of the last look."""
        holders = self._sight.seen.holders if self._sight.seen else ()
        others = [holder for holder in holders if holder.address != self._settings.api.address]
        return next((holder.address for holder in others if holder.stream == stream), None)

    def _serving(self, stream: str = LEAD) -> Active:
        active = self._actives.get(stream)
        if active is None or not active.acts():
            raise NotActive(
                f"{self._settings.region}/{self._settings.instance} is {self._role.value}: {self._reason}",
                hint="ask the active controller",
                active=self._active_address(stream),
            )
        return active

    async def _submit_own(self, frames: Sequence[Frame]) -> IngestAnswer:
        """Records of the controller itself. Raises NotActive unless this instance holds the lead."""
        active = self._serving()
        acks = await active.intake.submit(frames) if self._alone else await self._router.write(active, frames)
        return IngestAnswer(active.tenure.fence.epoch, active.tenure.remaining_seconds(), tuple(acks))

    async def ingest(self, frames: Sequence[Frame]) -> IngestAnswer:
        """See ``ControllerService``. A record under a stale attempt number fails alone."""
        return await (self._serving().intake.ingest(frames) if self._alone else self._router.ingest(frames))

    async def peer_ingest(self, frames: Sequence[Frame]) -> IngestAnswer:
        """See ``ControllerService``."""
        return await self._router.ingest(frames, forwarded=True)

    async def peer_write(self, region: str, instance: str, epoch: int, frames: Sequence[Frame]) -> tuple[Ack, ...]:
        """See ``ControllerService``."""
        return await self._router.take(region, instance, epoch, frames)

    def peer_positions(self) -> dict[str, int]:
        """See ``ControllerService``."""
        return self._router.positions()

    def witness(self) -> Witness:
        """See ``ControllerService``. Nothing is asked for it: what the loops saw last counts."""
        epochs = {
            stream: max((head.epoch for head in heads.values() if isinstance(head, Head)), default=0)
            for stream, heads in self._sight.heads.items()
        }
        authority = self._sight.seen.authority.value if self._sight.seen else None
        for holder in self._sight.seen.holders if self._sight.seen else ():
            epochs[holder.stream] = max(holder.epoch, epochs.get(holder.stream, 0))
        return Witness(
            self.region,
            self.instance,
            self._clock.monotonic() - self._sight.looked_at if self._sight.etcd_silent else None,
            authority.region if authority else "",
            authority.barrier.plan if authority and authority.barrier else "",
            epochs,
        )

    async def settle(self, agent: str | None = None) -> None:
        """See ``ControllerService``."""
        if not self._alone:
            await self._router.settle(self._outside.streams if agent is None else [self._router.stream(agent)])
        elif not self.may_act():
            raise NotActive(
                f"{self.region}/{self.instance} is {self.role.value}: its copy may be behind",
                hint="ask the active controller, or read without `fresh`",
            )

    async def beat(self, beat: Beat) -> BeatAnswer:
        if not self._alone and self._fleet.active:
            self._current = await self._router.current()
        return await self._fleet.beat(beat)

    def _is_current(self, agent: str) -> bool:
        """Whether this copy has all of an agent's stream, as of the present beat."""
        return self._alone or self._router.stream(agent) in self._current

    async def create_task(self, agent: str, spec: Mapping[str, object]) -> IngestAnswer:
        self._serving()
        answer = await self._fleet.create_task(agent, spec)
        self._fleet.granted((), answer.right_seconds)  # whoever asked may act on the right in the answer
        return answer

    def agents(self, page: AgentPage) -> tuple[AgentSeen, ...]:
        """Agents in this region's view, without the controllers' own: so many at most, however many there are."""
        found = self._view.agent_page(after=page.after, prefix=page.prefix, newest=page.newest, limit=page.limit)
        return tuple(
            AgentSeen(
                one.agent,
                one.records,
                one.latest_id,
                one.latest_seq,
                one.received_at,
                one.attempt,
                self._fleet.host_of(one.agent)[0],
            )
            for one in found
        )

    async def latest(self, agent: str, kind: str) -> tuple[Record, bytes]:
        record = self._view.latest_record(agent, kind)
        if record is None:
            raise NotFound(f"agent {agent!r} has no record of kind {kind!r}", hint="`drctl agents` lists them")
        return await read_record(self._view, self._store, agent, record.id)

    async def read(self, agent: str, record_id: str) -> tuple[Record, bytes]:
        return await read_record(self._view, self._store, agent, record_id)

    def records(self, agent: str, limit: int, before: str | None) -> tuple[Record, ...]:
        return self._view.records(agent, limit, before)

    # ---------------------------------------------------------------------------------------------------- operators

    async def status(self) -> Status:
        try:
            seen: Coordination | None = await look(self._outside)
            plans = tuple(found.value for found in await self._book.all() if not found.value.ended)
            incidents = await self._watch.incidents(include_closed=False)
            gone: Unknown | None = None
        except Unavailable as error:
            seen, plans, incidents, gone = self._sight.seen, (), (), Unknown(self._sight.seen_at, error.message)
        traffic = await read_traffic(self._outside)
        unknown = gone if gone is not None else Unknown(0.0, "never seen")
        authority: Authority | Unknown = unknown if gone is not None or seen is None else seen.authority.value
        holders: tuple[Holder, ...] | Unknown = unknown if gone is not None or seen is None else seen.holders
        return compose(
            Observation(
                group=self._settings.group,
                region=self.region,
                instance=self.instance,
                role=self._role,
                now=self._clock.wall(),
                authority=authority,
                holders=holders,
                members=seen.members if seen else (),
                reports=seen.reports if seen else {},
                heads=self._sight.heads,
                traffic=traffic,
                plans=plans,
                incidents=incidents,
                agents=self._view.agent_count(),
                right_seconds=self._act_seconds(),
                rpo_seconds=self._settings.rpo.seconds,
                rpo_policy=self._settings.rpo.policy,
                fresh_seconds=3 * self._settings.rpo.report_seconds + 1,
                positions=self._positions(),
                warnings=self._all_warnings(plans),
                failsafe_since=min(self._failsafe().values(), default=0.0),
                kms=() if self._ports.seals is None else self._ports.seals.seen(),
                regions=tuple(self._settings.regions),
            )
        )

    def _all_warnings(self, plans: Sequence[PlanRecord]) -> tuple[str, ...]:
        """What the loops complain about, documents in etcd that are skipped, and plans that go around the rule of two."""
        loops = [f"{name}: {text}" for name, text in sorted(self._warnings.items())]
        seen = self._sight.seen.unreadable if self._sight.seen else {}
        skipped = {**seen, **self._book.unreadable, **self._watch.unreadable}
        loud = [f"break-glass: plan {record.plan.id} by {record.plan.requester}" for record in plans if record.plan.break_glass]
        sealing = () if self._ports.seals is None else self._ports.seals.warnings()
        for stream, since in self._failsafe().items():
            loops.append(f"failsafe: {stream} goes on without etcd since {strftime('%H:%M:%S', gmtime(since))} UTC")
        for stream, heads in sorted(self._sight.heads.items()):
            loops += crowding(stream, heads, self._forks(stream))
        return (*loops, *sealing, *(f"skipped {key}: {why}" for key, why in sorted(skipped.items())), *loud)

    def _failsafe(self) -> dict[str, float]:
        """Streams that are held past their lease, with the wall time since when."""
        found = {stream: active.failsafe for stream, active in self._actives.items() if active.failsafe is not None}
        return {stream: failsafe.since for stream, failsafe in found.items() if failsafe.since}

    def _forks(self, stream: str) -> int:
        """Recorded forks of a stream that is held here; 0 = not known."""
        active = self._actives.get(stream)
        return active.shortener.forks if active is not None and active.shortener is not None else 0

    async def members(self) -> tuple[Member, ...]:
        return (await look(self._outside)).members

    async def incidents(self, include_closed: bool = False) -> tuple[Incident, ...]:
        return await self._watch.incidents(include_closed)

    async def create_plan(self, request: PlanRequest) -> PlanDocument:
        try:
            plan = (await self._propose(request)).value.plan
        except OutcomeUnknown:
            if request.break_glass:
                await self._shout(_glass(request.to, f"{request.requester} asks for it ({request.reason}); it may be stored"))
            raise
        if plan.break_glass:
            await self._shout(_glass(plan.target, f"plan {plan.id} was made by {plan.requester}: {plan.reason}"))
        return await self._book.document(plan.id)

    async def plans(self) -> tuple[PlanRecord, ...]:
        return tuple(found.value for found in await self._book.all())

    async def plan(self, plan_id: str) -> PlanDocument:
        return await self._book.document(plan_id)

    async def approve(self, plan_id: str, approval: ApprovalRequest) -> PlanDocument:
        await self._book.approve(plan_id, approval)
        return await self._book.document(plan_id)

    async def execute(self, plan_id: str, requester: str, confirm: str) -> PlanDocument:
        before = (await self._book.get(plan_id)).value
        said = f"plan {plan_id} was ordered to run by {requester or 'unknown'}"
        loud = before.plan.break_glass and not before.execute_requested_by
        try:
            await self._book.request_execution(plan_id, requester, confirm)
        except Unavailable:
            if loud:
                await self._shout(_glass(before.plan.target, f"{said}, or an attempt was made: the outcome is unknown"))
            raise
        if loud:
            await self._shout(_glass(before.plan.target, said))
        return await self._book.document(plan_id)

    async def abort(self, plan_id: str, requester: str, reason: str) -> PlanDocument:
        await self._book.abort(plan_id, requester, reason)
        return await self._book.document(plan_id)

    async def audit(self, after: int, limit: int) -> tuple[AuditEntry, ...]:
        entries = []
        for n in range(after + 1, after + 1 + limit):
            found = await read(self._ports.coordinator, self._keys.audit(n), AuditEntry)
            if found is None:
                break
            entries.append(found.value)
        return tuple(entries)

    def metrics(self) -> bytes:
        positions = {stream: position.seq for stream, position in self._positions().items()}
        epochs = {stream: active.tenure.fence.epoch for stream, active in self._actives.items()}
        reports = [active.last_report for active in self._actives.values() if active.last_report is not None]
        return self._metrics.render(
            self._role,
            self._act_seconds(),
            epochs,
            self._view.agent_count(),
            positions,
            reports,
            self._kept(),
            {stream: self._clock.wall() - since for stream, since in self._failsafe().items()},
            () if self._ports.seals is None else self._ports.seals.seen(),
            now=self._clock.wall(),
        )

    def _kept(self) -> dict[str, Kept]:
        """What our own store keeps of each stream whose head was read."""
        found: dict[str, Kept] = {}
        for stream, heads in self._sight.heads.items():
            head = heads.get(self._settings.region)
            if not isinstance(head, Head):
                continue
            at = Keeping(self._view, stream).closed_at(head.snapshots[-1].seq) if head.snapshots else None
            active = self._actives.get(stream)
            size = None if active is None or active.retention is None else active.retention.kept_bytes
            age = None if at is None else max(0.0, self._clock.wall() - at)
            found[stream] = Kept(head.base, age, size, len(head.epochs), len(head.salvage), self._forks(stream) or None)
        return found


def _glass(target: str, text: str) -> Page:
    """What people are told about a break-glass plan."""
    title = f"break-glass: the fleet may move to {target} on fewer approvals than usual"
    return Page(f"break-glass-{target}", "critical", title, text, "region-failover")
