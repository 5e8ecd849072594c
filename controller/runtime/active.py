"""What an instance does between acquiring a stream and losing it: open, serve, carry a promotion on, drain, end."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from controller.domain.fleet import check_attempt, check_overtaken
from controller.domain.model import Ack, Authority, Forks, Frame, Head, IngestAnswer, Kind, Member, Record, Role, StreamReport
from controller.domain.promotion import PlanRecord
from controller.domain.sharing import LEAD
from controller.errors import Conflict, DrError, FenceLost, OutcomeUnknown, Refused, Unavailable
from controller.ports import (
    Clock,
    Compare,
    Coordinator,
    Identity,
    Page,
    Pager,
    Peers,
    Put,
    RegionStore,
    Resolver,
    Seals,
    Traffic,
)
from controller.runtime.documents import Keys, Seen, encode, read
from controller.runtime.failsafe import Failsafe, FailsafePolicy
from controller.runtime.fleet import RIGHT_MARGIN_SECONDS, FleetManager, check_kind
from controller.runtime.ingest_gate import IngestGate, IngestLimits
from controller.runtime.opening import Opened, Opening, Parts
from controller.runtime.plans import PlanBook
from controller.runtime.promotion import Promotion, PromotionPolicy
from controller.runtime.reporter import Reporter, ReportPolicy, own_agent
from controller.runtime.retention import Retention, RetentionPolicy
from controller.runtime.shortening import Shortener
from controller.runtime.tenure import Tenure
from controller.runtime.together import BEFORE_OPEN, POLL_SECONDS, Together
from controller.runtime.watch import Watch
from controller.settings import Settings
from controller.stream.follower import Follower
from controller.stream.live import BY, SEEN
from controller.stream.segment import frame
from controller.stream.view import View
from controller.stream.writer import StreamWriter, WriterLimits

DRAIN_POLL_SECONDS = 0.1
RETRY_SECONDS = 0.5
LASTING_RETRY_SECONDS = 5.0
"""Pause after an error that waiting alone does not mend: somebody has to do something first."""
RETENTION_STEPS = 10
"""Steps of retention in one tick, as long as they have nothing to tell."""
OPENING_AGENT = "opening"


@dataclass(frozen=True, slots=True)
class Ports:
    """Everything outside of one controller."""

    coordinator: Coordinator
    stores: Mapping[str, RegionStore]
    traffic: Traffic
    resolver: Resolver
    identity: Identity
    pager: Pager
    clock: Clock
    new_id: Callable[[], str]
    peers: Peers | None = None
    """The way to other instances of this region; a group of one stream needs none."""
    seals: Seals | None = None
    """None: no KMS keys are set, nothing is sealed."""


@dataclass(frozen=True, slots=True)
class Shell:
    """What an ``Active`` needs of its controller."""

    settings: Settings
    ports: Ports
    keys: Keys
    book: PlanBook
    view: View
    followers: Mapping[str, Follower]
    fleet: FleetManager
    watch: Watch
    say: Callable[[Role, str], None]
    tell: Callable[..., None]


class Active:
    """One tenure's life. ``over`` becomes the reason as soon as it must end; the duty loop then steps down."""

    def __init__(self, shell: Shell, tenure: Tenure) -> None:
        self._shell = shell
        self.tenure = tenure
        self.stream = tenure.fence.stream
        self.lead = self.stream == LEAD
        """Whether this is the stream whose holder moves the zone, carries promotions on and runs the fleet."""
        self.over = ""
        self.crashed: BaseException | None = None
        self.serving = False
        self.writer: StreamWriter | None = None
        self._gate = IngestGate(_ingest_limits(shell.settings), shell.ports.clock)
        self._reporter: Reporter | None = None
        self.retention: Retention | None = None
        self.failsafe: Failsafe | None = None
        enabled = shell.settings.etcd.failsafe and shell.ports.peers is not None
        self._failsafe_seconds = float(shell.settings.etcd.ttl_seconds) if enabled else 0.0
        self._lent_seconds = shell.settings.etcd.ttl_seconds - shell.settings.etcd.margin_seconds
        self.shortener: Shortener | None = None
        self.last_report: StreamReport | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._draining = False
        self._retired = False
        self._paged = ""
        self._rights_end = -math.inf
        self._beat_seconds = 0.0
        """How long the last heartbeat took."""
        self._attempts: dict[str, int] = {}
        self._together = Together(
            shell.ports.coordinator,
            shell.keys,
            shell.ports.clock,
            shell.ports.traffic,
            shell.book,
            tenure,
            tuple(shell.followers),
            shell.settings.instance,
        )

    def acts(self) -> bool:
        """Whether this stream is served here now. No I/O."""
        return self.serving and self.tenure.may_act()

    def rights_end(self) -> float:
        """Monotonic time at which the last right that was lent under this tenure has certainly run out (-inf: none was)."""
        return max(self._rights_end, self._shell.fleet.rights_end()) if self.lead else self._rights_end

    def start(self) -> None:
        """Begins to prove the lease again and again, and beside it to open the epoch."""
        self._spawn(self._beat(), f"beat-{self.tenure.fence.epoch}")
        self._spawn(self._serve(), f"serve-{self.tenure.fence.epoch}")

    async def _beat(self) -> None:
        """Heartbeats, until stopped: one at a time, at the pace of the duty loop. One that takes longer is followed at once by
        the next, because the right goes on running out meanwhile."""
        clock, tick_seconds = self._shell.ports.clock, self._shell.settings.etcd.tick_seconds
        while True:
            await clock.sleep(tick_seconds - self._beat_seconds if self._beat_seconds < tick_seconds else 0.0)
            began = clock.monotonic()
            leased = self.tenure.is_leased()
            await self.tenure.keep()
            self._beat_seconds = clock.monotonic() - began
            if not leased and self.tenure.is_leased() and self.writer is not None:
                self.writer.wait_settled()  # what waited for a second copy past the lease
            self.heed_barrier()

    async def _go_on(self, failsafe: Failsafe) -> None:
        """Past the lease while etcd is unreachable for everybody, where the group wants that."""
        while True:
            await self._shell.ports.clock.sleep(self._shell.settings.etcd.tick_seconds)
            said = await failsafe.step()
            if said is None:
                continue
            self._shell.tell("failsafe", said)
            if self.serving and not self._draining:
                at = f"epoch {self.tenure.fence.epoch} is open"
                self._shell.say(Role.ACTIVE, f"{at}; {said}" if failsafe.since else at)
            if failsafe.since:
                self._spawn(self._page_failsafe(failsafe, said), f"page-failsafe-{self.tenure.fence.epoch}")

    async def _page_failsafe(self, failsafe: Failsafe, said: str) -> None:
        """Tells people, again and again until somebody heard it. Beside the questions: a pager must not delay those."""
        title = f"{self._shell.settings.group}: {self.stream} goes on without etcd"
        while failsafe.since:
            try:
                await self._shell.ports.pager.page(
                    Page(f"failsafe-{self.tenure.fence.epoch}", "critical", title, said, "failsafe")
                )
                return
            except DrError as error:
                self._shell.tell("page", error.message)
            await self._shell.ports.clock.sleep(LASTING_RETRY_SECONDS)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A bug must not leave a holder that looks alive: the duty loop raises it, and the process ends."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.crashed = error
            self.over = self.over or f"{task.get_name()} failed: {error!r}"
            self.serving = False

    async def stop(self, reason: str) -> None:
        """Ends everything at once. The lease goes back early only when every right that hung on it has run out."""
        self.serving = False
        # By the clock, never by may_act(): a right that was *lost* still binds those whom we lent parts of it, until its time.
        rights_end = min(self.tenure.right.ends_at, self.rights_end())
        rights_over = self._retired or self.writer is None or self._shell.ports.clock.monotonic() >= rights_end
        self.tenure.lose(reason)
        self.over = self.over or reason
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.writer is not None:
            await self.writer.stop(reason)
        if rights_over:
            try:
                if self.writer is not None:
                    await self._lent_nothing()
                await self.tenure.release()
            except DrError:
                pass  # it expires by itself
        self._shell.followers[self.stream].suspended = False
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, DrError):
                raise result

    async def _lent_nothing(self) -> None:
        """Before the lease goes back, with every right that hung on it over: a successor need not wait. Raises Unavailable."""
        coordinator, key = self._shell.ports.coordinator, self._shell.keys.forks(self.stream)
        forks = await read(coordinator, key, Forks)
        if forks is not None:
            over = Put(key, encode(replace(forks.value, failsafe_seconds=0.0, lent_seconds=0.0)))
            await coordinator.txn([self.tenure.guard, Compare.modified(key, forks.revision)], [over])

    async def retire(self) -> None:
        """Before an orderly end: takes nothing new and waits until every right that agents were granted has passed (at most
        our own), so that the lease may go back at once and the next instance need not wait for it to expire."""
        clock = self._shell.ports.clock
        self.serving = False
        if self.lead:
            self._shell.fleet.deactivate()
        if self.writer is not None:
            self.writer.freeze("this instance is stopping")
        while self.tenure.may_act() and clock.monotonic() < self.rights_end():
            await clock.sleep(DRAIN_POLL_SECONDS)
        self._retired = True

    def give_up(self, why: str) -> None:
        """Ends in the orderly way while the instance goes on: the duty loop steps down once ``retire`` is through."""

        async def retire() -> None:
            await self.retire()
            self.over = self.over or why

        self._spawn(retire(), f"give-up-{self.tenure.fence.epoch}")

    # ----------------------------------------------------------------------------------------------------- opening

    async def _serve(self) -> None:
        try:
            opened = await Opening(self._parts(), self.tenure, self._together).run()
            await self._begin(opened)
            if self.lead:
                await self._promote()
        except DrError as error:
            self.over = error.message

    def _parts(self) -> Parts:
        shell, ports = self._shell, self._shell.ports
        return Parts(
            coordinator=ports.coordinator,
            keys=shell.keys,
            clock=ports.clock,
            stores=ports.stores,
            pager=ports.pager,
            book=shell.book,
            view=shell.view,
            followers=shell.followers,
            region=shell.settings.region,
            instance=shell.settings.instance,
            store_timeout_seconds=shell.settings.aws.call_timeout_seconds,
            ttl_seconds=shell.settings.etcd.ttl_seconds,
            failsafe_seconds=self._failsafe_seconds,
            lent_seconds=self._lent_seconds,
            say=shell.say,
            seals=ports.seals,
        )

    async def _begin(self, opened: Opened) -> None:
        """Starts to write. The epoch serves once its opening record is in as many stores as a safe write can be in."""
        shell, settings, ports = self._shell, self._shell.settings, self._shell.ports
        stream = settings.stream
        writer = StreamWriter(
            group=settings.group,
            fence=self.tenure.fence,
            stores=ports.stores,
            home=settings.region,
            home_head=opened.home_head,
            tail=opened.tail,
            view=shell.view,
            clock=ports.clock,
            may_act=self.tenure.may_act,
            is_leased=self.tenure.is_leased,
            on_lost=self._lost,
            limits=WriterLimits(
                flush_seconds=stream.flush_seconds,
                segment_max_bytes=stream.segment_max_bytes,
                segment_max_records=stream.segment_max_records,
                queue_max_bytes=stream.queue_max_bytes,
                pipeline_depth=stream.pipeline_depth,
                ack_timeout_seconds=stream.ack_timeout_seconds,
                enforced_rpo_seconds=settings.rpo.seconds if settings.rpo.policy == "enforce" else None,
            ),
        )
        self.writer = writer
        writer.start()
        epoch = self.tenure.fence.epoch
        body = f"epoch {epoch} opened by {settings.region}/{settings.instance} after segment {opened.tail.seq}".encode()
        copies = min(max(2, stream.copies), len(opened.fenced))
        first = frame(
            own_agent(OPENING_AGENT, self.stream), f"{epoch}", Kind.OPENING, body, created_at=ports.clock.wall(), copies=copies
        )
        while True:
            (ack,) = await writer.submit([first], own=True)
            if ack.status != "failed":
                break
            shell.say(Role.OPENING, f"the opening record is not in {copies} stores yet: {(ack.error or {}).get('message')}")
            await ports.clock.sleep(RETRY_SECONDS)
        rpo = settings.rpo
        self._reporter = Reporter(
            ports.coordinator,
            shell.keys,
            ports.clock,
            self.tenure,
            writer,
            ReportPolicy(
                rpo.seconds,
                rpo.settle_seconds,
                rpo.report_seconds,
                stream.canary_seconds,
                stream.brownout_seconds,
                stream.follow_seconds,
            ),
            settings.region,
        )
        self.retention = Retention(
            writer=writer,
            view=shell.view,
            stores=ports.stores,
            home=settings.region,
            clock=ports.clock,
            policy=RetentionPolicy(stream.retention_seconds, stream.snapshot_seconds),
        )
        self.shortener = Shortener(writer, ports.stores, ports.coordinator, shell.keys, self.tenure, ports.clock)
        # While a plan is unfinished nothing is handed out before its step `resume`, at the plan's pace.
        if self.lead:
            await self._start_fleet()
        if self._failsafe_seconds and ports.peers is not None:
            self.failsafe = Failsafe(self.tenure, ports.stores, ports.peers, ports.clock, _failsafe_policy(settings))
            self._spawn(self._go_on(self.failsafe), f"failsafe-{epoch}")
        self.serving = True
        shell.say(Role.ACTIVE, f"epoch {epoch} is open from segment {opened.tail.seq + 1}")

    async def _start_fleet(self) -> None:
        """The lead's holder hands agents out, on what the view says. With several streams the view must first have what was
        acknowledged in the others before this tenure: their assignments, and where their agents resume."""
        others = [stream for stream in self._shell.followers if stream != self.stream]
        if not others:
            self._shell.fleet.activate(paused=await self._unfinished() is not None)
        else:
            self._spawn(self._start_fleet_behind(others), f"fleet-{self.tenure.fence.epoch}")

    async def _start_fleet_behind(self, others: Sequence[str]) -> None:
        shell, wanted = self._shell, dict[str, int]()
        while not self.over:
            try:
                for stream in others:
                    if stream not in wanted:
                        wanted[stream] = (await self._home_head(stream)).seq
                if all(shell.view.position(stream)[0] >= seq for stream, seq in wanted.items()):
                    paused = await self._unfinished() is not None
                    if not self._draining and not self.over:
                        shell.fleet.activate(paused=paused)
                    return
            except FenceLost as error:
                self.over = error.message
                return
            except DrError as error:
                shell.tell("fleet", error.message, error=error.code)
            await shell.ports.clock.sleep(POLL_SECONDS)

    def _lost(self, why: str) -> None:
        self.tenure.lose(why)
        self.serving = False
        self.over = why

    # --------------------------------------------------------------------------------------------------- promotion

    async def _promote(self) -> None:
        """Carries the plan that put this region in authority to its end, if it has not ended."""
        shell, settings, ports = self._shell, self._shell.settings, self._shell.ports
        promotion = Promotion(
            tenure=self.tenure,
            coordinator=ports.coordinator,
            keys=shell.keys,
            clock=ports.clock,
            book=shell.book,
            traffic=ports.traffic,
            resolver=ports.resolver,
            pager=ports.pager,
            view=shell.view,
            fleet=shell.fleet,
            home_head=self._home_head,
            streams=tuple(shell.followers),
            policy=PromotionPolicy(
                settings.promotion.resume_agents_per_second,
                settings.promotion.confirm_timeout_seconds,
                settings.traffic.name,
                {region: tuple(found.addresses) for region, found in settings.regions.items()},
            ),
            instance=settings.instance,
            close_incidents=shell.watch.close_silent,
        )
        said = ""
        while True:
            try:
                plan = await self._unfinished()
                if plan is None:
                    break
                if plan.value.state not in BEFORE_OPEN:
                    shell.tell("promotion", await promotion.step(plan))
                elif not await self._together.caught_up(plan):
                    await ports.clock.sleep(POLL_SECONDS)
            except FenceLost:
                raise
            except DrError as error:
                # The region serves; what stops a later step (a foreign DNS record, say) is told and waited for.
                if error.message != said:
                    said = error.message
                    shell.tell("promotion", said, error=error.code)
                lasting = not isinstance(error, (Unavailable, Conflict))
                if lasting:
                    await promotion.page_once(said)
                await ports.clock.sleep(LASTING_RETRY_SECONDS if lasting else RETRY_SECONDS)
        await self._tidy()

    async def _unfinished(self) -> Seen[PlanRecord] | None:
        coordinator, keys = self._shell.ports.coordinator, self._shell.keys
        authority = await read(coordinator, keys.authority, Authority)
        if authority is None or authority.value.region != self._shell.settings.region:
            raise FenceLost("the authority is not with this region any more")
        if authority.value.plan is None:
            return None
        plan = await read(coordinator, keys.plan(authority.value.plan), PlanRecord)
        return None if plan is None or plan.value.ended else plan

    async def _tidy(self) -> None:
        """A holder that serves again makes an incident of silence untrue."""
        try:
            await self._shell.watch.close_silent()
        except DrError:
            pass  # closing it is for people's eyes only; the next holder tries again

    async def _home_head(self, stream: str) -> Head:
        return await self._shell.ports.stores[self._shell.settings.region].read_head(stream)

    # ----------------------------------------------------------------------------------------------------- serving

    async def submit(self, frames: Sequence[Frame]) -> list[Ack]:
        """Records of the controller itself, and agents' records that passed their checks."""
        if self.writer is None:
            raise Unavailable("the epoch is not open yet", hint="try again in a moment")
        acks = await self.writer.submit(frames)
        written = {(ack.agent, ack.id) for ack in acks if ack.status == "acknowledged"}
        self._shell.fleet.observe(f.record for f in frames if (f.record.agent, f.record.id) in written)
        return acks

    async def ingest(self, frames: Sequence[Frame]) -> IngestAnswer:
        """Agents' records. One with a stale attempt or a reserved kind fails alone, the others go on."""
        refused: dict[int, Ack] = {}
        late = self._gate.check(frames)
        for number, one in enumerate(frames):
            problem = late.get(number) or self._problem(one.record)
            if problem is not None:
                refused[number] = Ack(one.record.agent, one.record.id, "failed", error=problem.to_dict())
        accepted = [one for number, one in enumerate(frames) if number not in refused] if refused else frames
        answered = iter(await self.submit(accepted) if accepted else ())
        acks = tuple(refused[number] if number in refused else next(answered) for number in range(len(frames)))
        remaining = self.tenure.remaining_seconds()
        if remaining <= 0:
            raise OutcomeUnknown(
                "the right to act ended before this could be acknowledged", hint="send the same records to another controller"
            )
        return IngestAnswer(
            self.tenure.fence.epoch,
            self._lend(accepted, remaining),
            acks,
            epochs={self.stream: self.tenure.fence.epoch},
            holder_seconds=remaining,
        )

    def _lend(self, accepted: Sequence[Frame], remaining: float) -> float:
        """The right that goes out with an answer: never longer than ours, and so over before another region may act.

        A host that runs agents by assignment is lent its right by the lead's holder only: that one decides when an agent goes
        to another host, and must know until when the host may act. Every other holder lends such a host nothing (0).
        """
        fleet, agents = self._shell.fleet, {one.record.agent for one in accepted}
        if self.lead and fleet.active:
            # Only records that passed their checks are a sign of life of the agent's host; a stale one is not.
            fleet.granted(agents, remaining)
            return remaining
        if any(one.record.attempt > 0 for one in accepted):
            return 0.0
        until = self._shell.ports.clock.monotonic() + remaining + RIGHT_MARGIN_SECONDS
        self._rights_end = max(self._rights_end, until)
        return remaining

    def _problem(self, record: Record) -> DrError | None:
        try:
            if self.lead and len(self._shell.followers) == 1:
                self._shell.fleet.check_attempt(record.agent, record.attempt, record.kind)
            else:
                check_kind(record.kind)
                check_attempt(record.agent, record.attempt, self._attempt(record.agent))
            if SEEN in record.meta:
                self._check_overtaken(record)
        except DrError as error:
            return error
        return None

    def _check_overtaken(self, record: Record) -> None:
        """A repetition is none: it was taken before somebody else went on. Raises StaleAttempt."""
        said, view = record.meta[SEEN][:20], self._shell.view
        seen_epoch = int(said) if said.isascii() and said.isdecimal() else 0
        if seen_epoch >= self.tenure.fence.epoch or view.has(record.agent, record.id) is not None:
            return
        newest = view.newest(record.agent)
        if newest is not None:
            epoch = view.epoch_at(self.stream, newest[1]) or 0  # 0: carried forward from before what is kept: old
            check_overtaken(record.agent, record.meta.get(BY, ""), seen_epoch, newest[0].meta.get(BY, ""), epoch)

    def _attempt(self, agent: str) -> int:
        """The newest attempt of an agent of this stream. The view has all that was acknowledged before this epoch; what came
        since went through ``take_for_the_lead``."""
        if agent not in self._attempts:
            given = self._shell.view.latest_record(agent, Kind.ASSIGNMENT)
            self._attempts[agent] = given.attempt if given is not None else 0
        return self._attempts[agent]

    async def take_for_the_lead(self, frames: Sequence[Frame]) -> list[Ack]:
        """Tasks and assignments from the lead's holder, for agents of this stream. An assignment counts from the moment at
        which it is taken: records under an older attempt are refused while it is being written. Raises Unavailable."""
        refused: dict[int, Ack] = {}
        for number, one in enumerate(frames):
            record = one.record
            if record.kind != Kind.ASSIGNMENT:
                continue
            known = self._attempt(record.agent)
            if record.attempt <= known:
                error = Refused(
                    f"agent {record.agent!a}: attempt {record.attempt} is not greater than {known}, which was given out before",
                    hint="read the assignments anew, then give out a greater one",
                )
                refused[number] = Ack(record.agent, record.id, "failed", error=error.to_dict())
            else:
                self._attempts[record.agent] = record.attempt
        taken = [one for number, one in enumerate(frames) if number not in refused]
        acks = iter(await self.submit(taken) if taken else ())
        return [refused[number] if number in refused else next(acks) for number in range(len(frames))]

    async def report(self, members: Sequence[Member]) -> str | None:
        """One round of reporting. Raises Unavailable, Conflict."""
        assert self._reporter is not None
        report = self._reporter.build(members)
        self.last_report = report
        await self._reporter.publish(report)
        return await self._reporter.stand_in()

    async def canary(self) -> None:
        """Measures the whole path, at its own pace. Waits for its acknowledgement, so it has a loop of its own: reports say
        most when the home store is silent. Raises Unavailable."""
        if self._reporter is not None and not self._draining:
            await self._reporter.canary()

    async def keep(self) -> str | None:
        """Some bounded steps of retention. Raises what stopped one of them."""
        if self.retention is None or self._draining:
            return None
        for _ in range(RETENTION_STEPS):
            said = await self.retention.step()
            if said is None:
                return await self.shortener.step() if self.shortener is not None else None
            if said:
                return said
        return None

    async def tend(self) -> str | None:
        """One round of looking after the fleet. It writes assignments and waits for them, and for the pager: a loop of its
        own, too. Raises Unavailable."""
        if self._draining or not self._shell.fleet.active:
            return None
        ticked = await self._shell.fleet.tick()
        await self._page(ticked.page)
        return ticked.reason if ticked.moved or ticked.page else None

    async def _page(self, text: str) -> None:
        """Tells people about the fleet, once per text; nobody reached means that the next round tries again."""
        if not text or text == self._paged:
            self._paged = text
            return
        title = f"agents of {self._shell.settings.group} need people"
        try:
            await self._shell.ports.pager.page(
                Page(f"fleet-{self.tenure.fence.epoch}", "critical", title, text, "region-failover")
            )
            self._paged = text
        except Unavailable as error:
            self._shell.tell("page", error.message)

    # ---------------------------------------------------------------------------------------------------- draining

    def heed_barrier(self) -> None:
        """A planned move asks us to drain; a failover just lets the right run out; before the epoch is open, step down."""
        barrier = self.tenure.barrier
        if barrier is None:
            return
        if self.writer is None:
            self.over = f"plan {barrier.plan} is taking over before this epoch opened"
        elif barrier.kind != "failover" and not self._draining:
            self._draining = self.tenure.draining = True
            self._spawn(self._drain(barrier.plan), f"drain-{barrier.plan}")

    async def _drain(self, plan: str) -> None:
        """Takes nothing new, waits until every store has everything and every agent's right has passed, then ends."""
        writer, clock, fleet = self.writer, self._shell.ports.clock, self._shell.fleet
        assert writer is not None
        writer.freeze(f"plan {plan} moves the fleet")
        self._shell.say(Role.DRAINING, f"draining for plan {plan}")
        if self.lead:
            fleet.deactivate()
        proved = False
        while self.tenure.barrier is not None:
            if writer.drained() and not proved:
                proved = await self._prove_drained(plan)
            if proved:
                self.tenure.drained = True
                if clock.monotonic() >= min(self.rights_end(), self.tenure.right.ends_at):
                    self.over = f"drained for plan {plan}"
                    self.tenure.lose(self.over)
                    return
            await clock.sleep(DRAIN_POLL_SECONDS)
        await self._count_on_home_again()  # also when no proof is known: one may have been applied whose answer was lost
        self.tenure.drained = False
        self._draining = self.tenure.draining = False
        writer.unfreeze()
        if self.lead:
            fleet.activate()
        self._shell.say(Role.ACTIVE, f"plan {plan} was aborted; serving again in epoch {self.tenure.fence.epoch}")

    async def _prove_drained(self, plan: str) -> bool:
        """Records, under our guard, that every store of a fence quorum has everything: so nobody may have acknowledged alone
        any more, and the target may open without our store. Without this proof a planned move is called off."""
        assert self.writer is not None
        coordinator, keys, stream = self._shell.ports.coordinator, self._shell.keys, self.tenure.fence.stream
        key = keys.forks(stream)
        try:
            forks = await read(coordinator, key, Forks)
            if forks is None or not self.writer.drained():
                return False
            proof = [
                Put(keys.drained(plan, stream), str(self.writer.seq).encode()),
                Put(key, encode(replace(forks.value, sole_ackers=(), failsafe_seconds=self._still_lent(forks.value)))),
            ]
            result = await coordinator.txn([self.tenure.guard, Compare.modified(key, forks.revision)], proof)
        except Unavailable as error:
            self._shell.tell("drain", error.message, error=error.code)
            return False
        return result.succeeded

    def _still_lent(self, forks: Forks) -> float:
        """What a successor must wait for after a drain: nothing, unless a right past the lease is still running."""
        right = self.tenure.right
        return 0.0 if right.beyond <= right.deadline else forks.failsafe_seconds

    async def _count_on_home_again(self) -> None:
        """The move was called off, maybe after the proof: the record must say who may acknowledge alone before anybody does."""
        assert self.writer is not None
        coordinator, keys, stream = self._shell.ports.coordinator, self._shell.keys, self.tenure.fence.stream
        key = keys.forks(stream)
        while not self.over:
            try:
                forks = await read(coordinator, key, Forks)
                if forks is not None:
                    again = replace(
                        forks.value,
                        sole_ackers=self.writer.sole_ackers,
                        failsafe_seconds=self._failsafe_seconds,
                        lent_seconds=self._lent_seconds,
                    )
                    home = Put(key, encode(again))
                    result = await coordinator.txn([self.tenure.guard, Compare.modified(key, forks.revision)], [home])
                    if result.succeeded:
                        return
            except Unavailable as error:
                self._shell.tell("drain", error.message, error=error.code)
            await self._shell.ports.clock.sleep(RETRY_SECONDS)


def _failsafe_policy(settings: Settings) -> FailsafePolicy:
    """Everybody who is configured is asked: a list in etcd would be the one that cannot be read any more."""
    etcd = settings.etcd
    return FailsafePolicy(
        settings.region,
        {
            region: [address for address in found.controllers if address != settings.api.address]
            for region, found in settings.regions.items()
        },
        etcd.ttl_seconds,
        etcd.margin_seconds,
        min(settings.aws.call_timeout_seconds, (etcd.ttl_seconds - etcd.margin_seconds) / 4),
    )


def _ingest_limits(settings: Settings) -> IngestLimits:
    ingest = settings.ingest
    return IngestLimits(
        ingest.request_max_records,
        settings.stream.body_max_bytes,
        ingest.burst_seconds,
        ingest.records_per_second,
        ingest.bytes_per_second,
        ingest.agent_records_per_second,
        ingest.agent_bytes_per_second,
    )
