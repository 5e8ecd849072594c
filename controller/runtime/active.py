"""One tenure's life, between acquiring a stream and losing it: open the epoch, serve, heed what heartbeats bring, end.

``Active`` owns the tasks of a tenure and says why it is over; the duty loop (``controller``) then steps down. What its parts
do: ``opening`` opens the epoch, ``intake`` takes records and lends rights, ``leading`` is for the lead's holder alone,
``leaving`` drains and writes down what a successor waits for. Nothing here writes to etcd or a store by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from controller.domain.model import Kind, Member, Role, StreamReport
from controller.domain.sharing import LEAD
from controller.errors import DrError, FenceLost
from controller.ports import Page
from controller.runtime.failsafe import Failsafe
from controller.runtime.intake import Intake
from controller.runtime.leading import LASTING_RETRY_SECONDS, RETRY_SECONDS, Leading
from controller.runtime.leaving import Leaving
from controller.runtime.opening import Opened, Opening, Parts
from controller.runtime.policies import failsafe_policy, report_policy, retention_policy, writer_limits
from controller.runtime.reporter import Reporter, own_agent
from controller.runtime.retention import Retention
from controller.runtime.shell import Shell
from controller.runtime.shortening import Shortener
from controller.runtime.tenure import Tenure
from controller.runtime.together import Together
from controller.stream.segment import frame
from controller.stream.writer import StreamWriter

RETENTION_STEPS = 10
"""Steps of retention in one tick, as long as they have nothing to tell."""
OPENING_AGENT = "opening"


class Active:
    """One tenure's life. ``over`` becomes the reason as soon as it must end; the duty loop then steps down."""

    def __init__(self, shell: Shell, tenure: Tenure) -> None:
        self._shell = shell
        self.tenure = tenure
        self.stream = tenure.fence.stream
        self.over = ""
        self.crashed: BaseException | None = None
        self.serving = False
        self.intake = Intake(shell, tenure)
        self._leaving = Leaving(shell, tenure, self.intake, lambda: self.over)
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
        lead = self.stream == LEAD
        self._leading = Leading(shell, tenure, self._together, lambda: self.over) if lead else None
        """None: another stream's holder moves the zone, carries promotions on and runs the fleet."""
        self._reporter: Reporter | None = None
        self.retention: Retention | None = None
        self.failsafe: Failsafe | None = None
        self.shortener: Shortener | None = None
        self.last_report: StreamReport | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._beat_seconds = 0.0
        """How long the last heartbeat took."""

    @property
    def writer(self) -> StreamWriter | None:
        """None before ``Opening`` is through."""
        return self.intake.writer

    def acts(self) -> bool:
        """Whether this stream is served here now. No I/O."""
        return self.serving and self.tenure.may_act()

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
            if self.serving and not self.tenure.draining:
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
        rights_end = min(self.tenure.right.ends_at, self.intake.rights_end())
        rights_over = self._leaving.retired or self.writer is None or self._shell.ports.clock.monotonic() >= rights_end
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
                    await self._leaving.nothing_lent()
                await self.tenure.release()
            except DrError:
                pass  # it expires by itself
        self._shell.followers[self.stream].suspended = False
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, DrError):
                raise result

    async def retire(self) -> None:
        """See ``Leaving.retire``."""
        self.serving = False
        await self._leaving.retire()

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
            if self._leading is not None:
                await self._leading.promote()
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
            failsafe_seconds=shell.failsafe_seconds,
            lent_seconds=shell.lent_seconds,
            say=shell.say,
            seals=ports.seals,
        )

    async def _begin(self, opened: Opened) -> None:
        """Starts to write. The epoch serves once its opening record is in as many stores as a safe write can be in."""
        shell, settings, ports = self._shell, self._shell.settings, self._shell.ports
        writer = self.intake.writer = StreamWriter(
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
            limits=writer_limits(settings),
        )
        writer.start()
        await self._write_opening_record(writer, opened)
        self._reporter = Reporter(
            ports.coordinator, shell.keys, ports.clock, self.tenure, writer, report_policy(settings), settings.region
        )
        self.retention = Retention(
            writer=writer,
            view=shell.view,
            stores=ports.stores,
            home=settings.region,
            clock=ports.clock,
            policy=retention_policy(settings),
        )
        self.shortener = Shortener(writer, ports.stores, ports.coordinator, shell.keys, self.tenure, ports.clock)
        epoch = self.tenure.fence.epoch
        if self._leading is not None:
            await self._start_fleet(self._leading)
        if shell.failsafe_seconds and ports.peers is not None:
            self.failsafe = Failsafe(self.tenure, ports.stores, ports.peers, ports.clock, failsafe_policy(settings))
            self._spawn(self._go_on(self.failsafe), f"failsafe-{epoch}")
        self.serving = True
        shell.say(Role.ACTIVE, f"epoch {epoch} is open from segment {opened.tail.seq + 1}")

    async def _write_opening_record(self, writer: StreamWriter, opened: Opened) -> None:
        """Returns when it is in as many stores as a safe write can be in."""
        settings, clock, epoch = self._shell.settings, self._shell.ports.clock, self.tenure.fence.epoch
        body = f"epoch {epoch} opened by {settings.region}/{settings.instance} after segment {opened.tail.seq}".encode()
        copies = min(max(2, settings.stream.copies), len(opened.fenced))
        agent = own_agent(OPENING_AGENT, self.stream)
        first = frame(agent, f"{epoch}", Kind.OPENING, body, created_at=clock.wall(), copies=copies)
        while True:
            (ack,) = await writer.submit([first], own=True)
            if ack.status != "failed":
                return
            why = (ack.error or {}).get("message")
            self._shell.say(Role.OPENING, f"the opening record is not in {copies} stores yet: {why}")
            await clock.sleep(RETRY_SECONDS)

    async def _start_fleet(self, leading: Leading) -> None:
        """The lead's holder hands agents out; with several streams only when its copy of the others is far enough."""
        others = [stream for stream in self._shell.followers if stream != self.stream]
        if not others:
            await leading.start_fleet()
            return

        async def behind() -> None:
            try:
                await leading.start_fleet_behind(others)
            except FenceLost as error:
                self.over = error.message

        self._spawn(behind(), f"fleet-{self.tenure.fence.epoch}")

    def _lost(self, why: str) -> None:
        self.tenure.lose(why)
        self.serving = False
        self.over = why

    # ----------------------------------------------------------------------------------------------------- serving

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
        if self._reporter is not None and not self.tenure.draining:
            await self._reporter.canary()

    async def keep(self) -> str | None:
        """Some bounded steps of retention. Raises what stopped one of them."""
        if self.retention is None or self.tenure.draining:
            return None
        for _ in range(RETENTION_STEPS):
            said = await self.retention.step()
            if said is None:
                return await self.shortener.step() if self.shortener is not None else None
            if said:
                return said
        return None

    async def tend(self) -> str | None:
        """One round of looking after the fleet, when this is the lead. A loop of its own, too. Raises Unavailable."""
        return None if self._leading is None else await self._leading.tend()

    # ---------------------------------------------------------------------------------------------------- draining

    def heed_barrier(self) -> None:
        """A planned move asks us to drain; a failover just lets the right run out; before the epoch is open, step down."""
        barrier = self.tenure.barrier
        if barrier is None:
            return
        if self.writer is None:
            self.over = f"plan {barrier.plan} is taking over before this epoch opened"
        elif barrier.kind != "failover" and not self.tenure.draining:
            self.tenure.draining = True
            self._spawn(self._drain(barrier.plan), f"drain-{barrier.plan}")

    async def _drain(self, plan: str) -> None:
        self.over = await self._leaving.drain(plan) or self.over
