"""One controller instance: which role it has, and the loops that keep it so.

Of a group's streams it holds its share (``domain.sharing``), each with a lease, an epoch and a writer of its own, and follows
the others. Losing one stream takes no other one down. Heartbeats have a task of their own for each stream that is held
(``Active.start``): a slow look at etcd must not delay them, so the duty loop only reads what they found.

Every loop does one bounded thing per tick and says it in one sentence. An error that a port may raise is part of the tick (it
is said and the next tick looks again); anything else is a bug and ends the process, because a lease that expires is safer than
a controller that limps on.

    duty      steps down where a right is gone, looks around, considers to acquire more
    follow    reads, verifies and indexes its own region's store, for every stream that is not held here
    stores    reads every store's head, so that people see what is unknown and since when
    report    the holder publishes lag and exposure, and lets another store stand in for a silent home store
    canary    the holder writes canaries
    retention the holder carries live records forward, moves bases and deletes what lies before them
    tend      the holder re-assigns agents of failed hosts
    plans     runs approved plans of this region up to ``authorize``; sweeps expired ones
    watch     a standby notices that nobody holds the group, tells people and proposes a plan
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from controller import __version__
from controller.domain.fleet import FleetPolicy
from controller.domain.model import (
    Fence,
    Forks,
    Head,
    Member,
    Position,
    Role,
    StreamReport,
    Unknown,
)
from controller.domain.plan import Evidence
from controller.domain.promotion import AFTER_AUTHORIZE, PlanRecord, State
from controller.domain.sharing import LEAD, stream_names
from controller.errors import Corrupt, DrError, Refused, Unavailable, WrongGroup
from controller.ports import Compare, Page
from controller.runtime.active import Active
from controller.runtime.archive import Archive
from controller.runtime.audit import Audit
from controller.runtime.desk import Desk
from controller.runtime.documents import Keys, Seen, read, read_readable
from controller.runtime.evidence import Coordination, LocalKnowledge, gather, look, read_heads
from controller.runtime.fleet import FleetManager
from controller.runtime.membership import Membership
from controller.runtime.mender import Mender
from controller.runtime.metrics import Metrics
from controller.runtime.opening import etcd_forgot
from controller.runtime.plans import PlanBook, PlanPolicy
from controller.runtime.restorer import Restorer
from controller.runtime.routing import Router
from controller.runtime.salvager import Salvager
from controller.runtime.service import (
    PlanRequest,
)
from controller.runtime.shares import Sharing, overall
from controller.runtime.shell import Ports, Shell
from controller.runtime.takeover import Takeover, TakeoverPolicy, is_overtaken, overtaken, sweep_barrier
from controller.runtime.tenure import Tenure, acquire, may_acquire
from controller.runtime.verifier import Verifier
from controller.runtime.watch import Watch, WatchPolicy
from controller.runtime.watch_streams import StreamWatch
from controller.runtime.wiring import outside_of
from controller.settings import Settings, fingerprint
from controller.stream.follower import Follower
from controller.stream.view import View

FOLLOW_BUDGET = 64
FOLLOWED_AT_ONCE = 8
"""Streams that are followed side by side. Also bounds memory: each holds a few segments."""

FLOOR_GRACE_SECONDS = 0.25
"""How long an acquisition waits for the last store's head. What it reads refuses early and decides nothing: stores that the new
epoch fences say the same once more, and a dead one gets its last chance there (``fence_stores``)."""

GIVEN_UP = "stream-given-up"
VIEW_LOST = "the view cannot be written"

T = TypeVar("T")
R = TypeVar("R")


class Controller(Desk):
    """Implements ``ControllerService``. ``run`` lives until it is cancelled; ``stop`` gives back what it may give back."""

    def __init__(
        self, settings: Settings, ports: Ports, view_path: Path | None = None, say: Callable[..., None] | None = None
    ) -> None:
        self._settings = settings
        self._ports = ports
        self._clock = ports.clock
        self._say_event = say
        self._streams = stream_names(settings.stream.streams)
        self._keys = Keys(settings.etcd.prefix, settings.group)
        self._audit = Audit(ports.coordinator, self._keys)
        self._view = View(view_path, warm_max_bytes=settings.stream.warm_max_bytes)
        self._store = ports.stores[settings.region]
        self._outside = outside_of(settings, ports)
        self._followers = {
            stream: Follower(self._store, self._view, stream, ports.clock, settings.group) for stream in self._streams
        }
        self._membership = Membership(
            ports.coordinator, self._keys, settings.etcd.ttl_seconds, settings.region, settings.instance
        )
        promotion = settings.promotion
        self._book = PlanBook(
            ports.coordinator,
            self._keys,
            self._audit,
            ports.clock,
            ports.identity,
            PlanPolicy(
                approvals_required=promotion.approvals_required,
                break_glass_approvals=promotion.break_glass_approvals,
                plan_ttl_seconds=promotion.plan_ttl_seconds,
                approval_ttl_seconds=promotion.approval_ttl_seconds,
                tolerance_seconds=promotion.tolerance_seconds,
                tolerance_records=promotion.tolerance_records,
                active_weight=settings.traffic.active_weight,
            ),
            tuple(settings.regions),
            settings.instance,
            ports.new_id,
        )
        self._takeover = Takeover(
            ports.coordinator,
            self._keys,
            ports.clock,
            self._book,
            self._gather,
            TakeoverPolicy(settings.etcd.ttl_seconds, promotion.drain_timeout_seconds),
            settings.instance,
            self._streams,
        )
        self._watch = Watch(
            self._outside,
            self._audit,
            ports.pager,
            self._propose,
            self._book.all,
            WatchPolicy(
                promotion.notice_seconds,
                promotion.auto_propose,
                {region: found.priority for region, found in settings.regions.items()},
            ),
            settings.region,
            settings.instance,
        )
        self._stream_watch = StreamWatch(
            self._outside,
            self._audit,
            ports.pager,
            f"{settings.region}/{settings.instance}",
            settings.etcd.ttl_seconds,
        )
        self._fleet = FleetManager(
            self._view,
            self._submit_own,
            self._right_seconds,
            ports.clock,
            epoch=lambda: self._lead.tenure.fence.epoch if self._lead else 0,
            active_address=self._active_address,
            is_current=self._is_current,
            policy=FleetPolicy(
                settings.fleet.beat_seconds, settings.fleet.misses_degraded, settings.fleet.misses_failed, settings.fleet.pool
            ),
        )
        self.archive = Archive(settings.group, settings.region, self._view, lambda: self._streams, self._fleet)
        self.verifier = Verifier(
            group=settings.group,
            region=settings.region,
            instance=settings.instance,
            stores=ports.stores,
            view=self._view,
            streams=lambda: self._streams,
            clock=ports.clock,
            state_dir=settings.state_dir,
        )
        self.mender = Mender(
            self.verifier,
            self._audit,
            ports.clock,
            region=settings.region,
            instance=settings.instance,
            fence_of=self._fence_of,
            held=lambda stream: stream in self._actives,
            holder=self._active_address,
        )
        self.restorer = Restorer(
            group=settings.group,
            archive=self.archive,
            view=self._view,
            store=self._store,
            stores=len(ports.stores),
            fleet=self._fleet,
            serving=self._serving,
            audit=self._audit,
            clock=ports.clock,
        )
        self.salvager = Salvager(
            group=settings.group,
            region=settings.region,
            instance=settings.instance,
            stores=ports.stores,
            view=self._view,
            streams=lambda: self._streams,
            fence_of=self._fence_of,
            holder=self._active_address,
            audit=self._audit,
            clock=ports.clock,
        )
        self._metrics = Metrics(settings.group, settings.region, settings.instance)
        self._started_at = ports.clock.wall()
        self._role = Role.STANDBY
        self._reason = "starting"
        self._seen: Coordination | None = None
        self._seen_at = 0.0
        self._etcd_silent = False
        """Whether the last look at etcd failed."""
        self._looked_at = ports.clock.monotonic()
        """Monotonic time of the last one that did not."""
        self._heads: dict[str, dict[str, Head | Unknown]] = {}
        self._holder_gone_at: dict[str, tuple[int, float, float]] = {}
        """Stream → (the authority's epoch, wall time, monotonic time) of the first look at which nobody held it any more."""
        """Stream → (epoch of the authority, our wall time) when we first saw that nobody held it."""
        self._not_before: dict[str, float] = {}
        """Stream → no acquisition before this (monotonic): the last one ended before it served."""
        self._sharing = Sharing(
            self._streams,
            settings.region,
            settings.instance,
            ttl_seconds=settings.etcd.ttl_seconds,
            expected=len(settings.regions[settings.region].controllers),
            now=ports.clock.monotonic,
        )
        self._said: dict[str, tuple[Role, str]] = {}
        self._clock_ahead: dict[str, tuple[float, float]] = {}
        self._followed: dict[str, Position] = {}
        self._followed_at = float("-inf")
        self._warnings: dict[str, str] = {}
        self._unheard: list[Page] = []
        self._actives: dict[str, Active] = {}
        self._current: frozenset[str] = frozenset()
        self._router = Router(
            self._streams,
            settings.region,
            settings.api.address,
            self._actives,
            lambda: self._seen.holders if self._seen else (),
            ports.peers,
            self._view,
            self._followers,
            ports.coordinator,
            self._keys,
            ports.clock,
        )

    # -------------------------------------------------------------------------------------------------------- life

    async def run(self) -> None:
        """Runs all loops until cancelled. Raises what is a bug or a misconfiguration."""
        try:
            await self._run_loops()
        except BaseExceptionGroup as group:
            told = next((error for error in group.exceptions if isinstance(error, DrError)), None)
            if told is None:
                raise
            raise told from group  # the one that says what to do; the other loops were cancelled because of it

    async def _run_loops(self) -> None:
        settings = self._settings
        async with asyncio.TaskGroup() as group:
            group.create_task(self._loop("duty", settings.etcd.tick_seconds, self._duty), name="duty")
            group.create_task(self._loop("follow", settings.stream.follow_seconds, self._follow), name="follow")
            group.create_task(self._loop("report", settings.rpo.report_seconds, self._report), name="report")
            group.create_task(self._loop("canary", settings.rpo.report_seconds, self._canary), name="canary")
            group.create_task(self._loop("retention", settings.rpo.report_seconds, self._keep_bounded), name="retention")
            group.create_task(self._loop("tend", settings.rpo.report_seconds, self._tend), name="tend")
            group.create_task(self._loop("view", settings.rpo.report_seconds, self._settle), name="view")
            group.create_task(self._loop("stores", settings.rpo.report_seconds, self._look_at_stores), name="stores")
            group.create_task(self._loop("plans", settings.etcd.tick_seconds, self._plans), name="plans")
            group.create_task(self._loop("watch", settings.etcd.tick_seconds, self._look_around), name="watch")

    async def stop(self) -> None:
        """An orderly end: steps down, keeps the lease until every right that was granted has passed (or lets it expire)."""
        await self.verifier.close()
        await asyncio.gather(*(active.retire() for active in self._actives.values()))
        for active in tuple(self._actives.values()):
            await self._step_down(active, "this instance is stopping")
        try:
            await self._membership.leave()
        except DrError:
            pass  # the member key expires by itself
        self._view.close()

    async def _loop(self, name: str, pause_seconds: float, act: Callable[[], Awaitable[str | None]]) -> None:
        while True:
            try:
                sentence = await act()
                self._warnings.pop(name, None)
                if sentence:
                    self._tell(name, sentence)
            except WrongGroup:
                raise
            except DrError as error:
                if self._warnings.get(name) != error.message:
                    self._tell(name, error.message, error=error.code)
                self._warnings[name] = error.message
            await self._clock.sleep(pause_seconds)

    def warn(self, about: str, sentence: str) -> None:
        """A warning of something outside of the loops, such as a certificate: in the status until ``sentence`` is empty."""
        if not sentence:
            self._warnings.pop(about, None)
        elif self._warnings.get(about) != sentence:
            self._warnings[about] = sentence
            self._tell(about, sentence)

    def _tell(self, event: str, sentence: str, **more: object) -> None:
        if self._say_event is not None:
            epoch = max((active.tenure.fence.epoch for active in self._actives.values()), default=0)
            self._say_event(event, reason=sentence, role=self._role.value, epoch=epoch, **more)

    def _say(self, stream: str, role: Role, reason: str) -> None:
        self._said[stream] = (role, reason)
        found = overall(self._said, self._actives)
        if found != (self._role, self._reason):
            self._role, self._reason = found
            self._tell("role", self._reason)

    # -------------------------------------------------------------------------------------------------------- duty

    async def _duty(self) -> str | None:
        ended = [sentence for sentence in await _each(self._heed, self._actives.values()) if sentence]
        if ended:
            return "; ".join(ended)
        await self._observe()
        return await self._consider() or await self._even_out()

    async def _heed(self, active: Active) -> str | None:
        """Whatever the last heartbeat asks for. Needs nobody's answer. Raises what is a bug."""
        tenure = active.tenure
        if active.crashed is not None:
            raise active.crashed
        if active.over:
            return await self._step_down(active, active.over)
        if tenure.right.lost:
            return await self._step_down(active, tenure.right.lost)
        if not tenure.may_act():
            return await self._step_down(active, f"the right to act ran out ({tenure.reason})")
        return None

    async def _consider(self) -> str | None:
        """Which streams to acquire. The floor is read from the stores only when nothing else is in the way. Streams that are
        held already must not miss their heartbeat for it: after one tick's time the rest waits for the next tick."""
        assert self._seen is not None
        began = self._clock.monotonic()
        wanted = self._sharing.wanted()
        taken = []
        for stream in (*wanted, *(stream for stream in self._streams if stream not in wanted)):
            now = self._clock.monotonic()
            late = bool(self._actives) and now - began > self._settings.etcd.tick_seconds
            if stream in self._actives or now < self._not_before.get(stream, now) or late:
                continue
            holder = next((found for found in self._seen.holders if found.stream == stream), None)
            reason = may_acquire(self._seen.authority, holder, self._settings.region, 0)
            if reason is None and stream not in wanted:
                reason = f"it is left to another instance of {self._settings.region}: the share of this one is taken"
            found = await self._acquire(stream) if reason is None else reason
            if isinstance(found, str):
                self._say(stream, Role.STANDBY, found)
                continue
            self._begin(found)
            taken.append(f"{stream} in epoch {found.fence.epoch}")
        return f"acquired {', '.join(taken)}" if taken else None

    async def _acquire(self, stream: str) -> Tenure | str:
        """One attempt. Returns the tenure, or why not. Raises Refused when etcd has forgotten, or may have, what the stores
        know: also a snapshot that knows every epoch may be older than the record of who acknowledged alone."""
        heads = await read_heads(self._outside, stream, grace_seconds=FLOOR_GRACE_SECONDS)
        known = {region: head for region, head in heads.items() if isinstance(head, Head)}
        forks = await read(self._ports.coordinator, self._keys.forks(stream), Forks)
        forgotten = etcd_forgot(known, forks.value.starts if forks else ())
        if forgotten is not None:
            raise Refused(forgotten, hint="compare the stores with `drctl status`, then confirm with `drctl recover`")
        return await acquire(
            self._ports.coordinator,
            self._keys,
            self._clock,
            stream=stream,
            region=self._settings.region,
            instance=self._settings.instance,
            address=self._settings.api.address,
            ttl_seconds=self._settings.etcd.ttl_seconds,
            margin_seconds=self._settings.etcd.margin_seconds,
            floor=max((head.epoch for head in known.values()), default=0),
            seen_gone=self._seen_gone(stream),
        )

    def _seen_gone(self, stream: str) -> tuple[int, float] | None:
        """(epoch, monotonic time) of a look at which nobody held the stream any more, nor any other that is without a holder:
        a region's agents may be lent the right of any of them."""
        if stream not in self._holder_gone_at:
            return None
        return self._holder_gone_at[stream][0], max(moment for _, _, moment in self._holder_gone_at.values())

    def _begin(self, tenure: Tenure) -> None:
        stream = tenure.fence.stream
        self._sharing.acquired(stream)
        active = self._actives[stream] = Active(
            Shell(
                settings=self._settings,
                ports=self._ports,
                keys=self._keys,
                book=self._book,
                view=self._view,
                followers=self._followers,
                fleet=self._fleet,
                watch=self._watch,
                say=partial(self._say, stream),
                tell=self._tell,
            ),
            tenure,
        )
        self._say(stream, Role.OPENING, f"epoch {tenure.fence.epoch} acquired")
        active.start()

    async def _even_out(self) -> str | None:
        """Gives one stream up when another instance has too few: never while a plan is under way, and one at a time."""
        assert self._seen is not None
        settled = all(active.serving for active in self._actives.values())
        if len(self._actives) < 2 or not settled:
            return None
        stream = self._sharing.too_much()
        if stream is None or stream not in self._actives or await self._plan_under_way():
            return None
        who, epoch = f"{self._settings.region}/{self._settings.instance}", self._actives[stream].tenure.fence.epoch
        written = await self._audit.commit(
            [self._actives[stream].tenure.guard, Compare.modified(self._keys.authority, self._seen.authority.revision)],
            [],
            at=self._clock.wall(),
            actor=who,
            action=GIVEN_UP,
            subject=stream,
            detail={"epoch": epoch, "held": sorted(self._actives), "share": self._sharing.share},
        )
        if not written.succeeded or stream not in self._actives:
            return None
        self._sharing.gave_up(stream)
        self._actives[stream].give_up("another instance of this region has fewer streams")
        return f"giving up {stream}: this instance should hold {self._sharing.share} streams"

    async def _plan_under_way(self) -> bool:
        """Whether a plan may move the fleet: it was made under the present epochs, and is made void by new ones."""
        assert self._seen is not None
        barrier = self._seen.authority.value.barrier
        return barrier is not None or any(not plan.value.ended for plan in await self._book.all())

    async def _step_down(self, active: Active, reason: str) -> str:
        """Ends acting: nothing is acknowledged after this, agents are given no more time, and the lease goes back if it may."""
        stream = active.tenure.fence.stream
        del self._actives[stream]
        if active.writer is None:  # it never served: give the cause of that, and the others, some time
            self._not_before[stream] = self._clock.monotonic() + self._settings.etcd.ttl_seconds
        elif active.writer.lost.startswith(VIEW_LOST):  # a full disk, say: it would only hold, in the way of the others
            self._not_before[stream] = self._clock.monotonic() + 3 * self._settings.etcd.ttl_seconds
        if stream == LEAD:
            self._fleet.deactivate()
        self._say(stream, Role.FENCED, reason)
        await active.stop(reason)
        self._say(stream, Role.STANDBY, reason)
        return f"stepped down: {reason}"

    async def _observe(self) -> None:
        """One look at etcd and at every store's head; says what this member sees."""
        try:
            seen = await look(self._outside)
        except Unavailable:
            self._etcd_silent = True
            raise
        self._etcd_silent, self._looked_at = False, self._clock.monotonic()
        founded = seen.authority.value.streams
        if founded != len(self._streams):
            raise WrongGroup(
                f"stream.streams = {len(self._streams)}, and the group was founded with {founded}: agents would change streams",
                hint=f"set stream.streams = {founded}, as in the group's other controllers",
            )
        now, moment = self._clock.wall(), self._clock.monotonic()
        self._seen, self._seen_at = seen, now
        self._sharing.note(seen)
        held = {holder.stream for holder in seen.holders}
        epoch = seen.authority.value.epoch
        for stream in self._streams:
            gone_in = self._holder_gone_at[stream][0] if stream in self._holder_gone_at else None
            if stream in held:
                self._holder_gone_at.pop(stream, None)
            elif gone_in != epoch:  # another holder came and went since, also when nobody of us saw it
                self._holder_gone_at[stream] = (epoch, now, moment)
        for report in seen.reports.values():
            self._note_clock(report, now)
        await self._membership.announce(self._member(now))

    def _note_clock(self, report: StreamReport, now: float) -> None:
        """How far our wall clock is ahead of the reporter's, at most: the smallest (first seen − written) of its reports."""
        writer = f"{report.region}/{report.instance}"
        known = self._clock_ahead.get(writer)
        if known is None or report.at != known[1]:
            ahead = now - report.at
            self._clock_ahead[writer] = (ahead if known is None else min(ahead, known[0]), report.at)

    def _gone_at(self) -> dict[str, float]:
        """When each stream's last holder had vanished, on that holder's own wall clock, rather too late than too early."""
        reports = self._seen.reports if self._seen else {}
        allowance = 2 * self._settings.etcd.tick_seconds
        result = {}
        for stream, (_, at, _) in self._holder_gone_at.items():
            report = reports.get(stream)
            ahead = self._clock_ahead.get(f"{report.region}/{report.instance}") if report else None
            result[stream] = at if ahead is None else at - ahead[0] + allowance
        return result

    def _member(self, now: float) -> Member:
        settings = self._settings
        return Member(
            region=settings.region,
            instance=settings.instance,
            address=settings.api.address,
            role=self._role,
            started_at=self._started_at,
            at=now,
            version=__version__,
            fingerprint=fingerprint(settings),
            positions=self._positions(),
            reason=self._reason,
        )

    def _fence_of(self, stream: str) -> Fence | None:
        """Our fence of a stream while we hold it and may act."""
        active = self._actives.get(stream)
        return active.tenure.fence if active is not None and active.acts() else None

    def _positions(self) -> dict[str, Position]:
        return {**self._followed, **{stream: self._followers[stream].position() for stream in self._actives}}

    # ------------------------------------------------------------------------------------------------------ follow

    async def _follow(self) -> str | None:
        """Every stream that this instance does not hold. One that is damaged does not stop the others."""
        if len(self._actives) == len(self._streams):
            return None
        await _each(self._follow_one, [stream for stream in self._streams if stream not in self._actives], FOLLOWED_AT_ONCE)
        self._followed_at = self._clock.monotonic()
        return None

    async def _follow_one(self, stream: str) -> None:
        follower = self._followers[stream]
        while stream not in self._actives:
            before = self._followed.get(stream)
            try:
                position = await follower.step(FOLLOW_BUDGET)
            except Corrupt:
                self._followed[stream] = follower.position()  # verified up to the segment before the damaged one
                raise
            self._followed[stream] = position
            if follower.said:
                self._tell("follow", follower.said)
                follower.said = ""
            if before is None or position.seq - before.seq < FOLLOW_BUDGET:
                break

    # ------------------------------------------------------------------------------------------------------ report

    def _in_service(self) -> list[Active]:
        return [active for active in self._actives.values() if active.serving]

    async def _report(self) -> str | None:
        if self._seen is None:
            return None
        members = self._seen.members
        said = await _each(lambda active: active.report(members), self._in_service())
        return "; ".join(sentence for sentence in said if sentence) or None

    async def _canary(self) -> str | None:
        await _each(lambda active: active.canary(), self._in_service())
        return None

    async def _keep_bounded(self) -> str | None:
        said = await _each(lambda active: active.keep(), self._in_service())
        return "; ".join(sentence for sentence in said if sentence) or None

    async def _settle(self) -> None:
        self._view.settle()

    async def _tend(self) -> str | None:
        lead = self._lead
        return None if lead is None or not lead.serving else await lead.tend()

    async def _look_at_stores(self) -> str | None:
        """Heads of all stores, for people. An unknown keeps the time at which the head was last known. A loop of its own: a
        store that does not answer must not delay the report, which is what a loss is estimated from."""
        for stream in self._streams:
            before = self._heads.get(stream, {})
            found = await read_heads(self._outside, stream)
            for region, head in found.items():
                known = before.get(region)
                if isinstance(head, Unknown) and isinstance(known, Unknown):
                    found[region] = Unknown(known.since, head.why)
            self._heads[stream] = found
        return None

    # ------------------------------------------------------------------------------------------------------- plans

    async def _plans(self) -> str | None:
        """Moves plans on. One that cannot go on (an unreadable document, a gate that closed again) does not keep the others
        waiting; but while one has begun nothing else begins."""
        problem: DrError | None = None
        try:
            swept = await sweep_barrier(self._ports.coordinator, self._keys, self._book, self._clock.wall())
            if swept:
                return swept
        except Corrupt as error:
            problem = error
        for seen in sorted(await self._book.all(), key=lambda seen: seen.value.state is State.AWAITING_APPROVAL):
            try:
                sentence = await self._move_on(seen)
                if sentence is not None:
                    self._tell("plans", sentence)
                    if (await self._book.get(seen.value.plan.id)).value.state is not State.AWAITING_APPROVAL:
                        break
            except DrError as error:
                problem = problem or error
                if seen.value.state is not State.AWAITING_APPROVAL:
                    break
        if problem is not None:
            raise problem
        return None

    async def _move_on(self, seen: Seen[PlanRecord]) -> str | None:
        """One bounded thing for one plan that has not moved the authority yet, if it is ours to do."""
        record = seen.value
        if record.ended or record.state in AFTER_AUTHORIZE:
            return None
        swept = await self._takeover.sweep_guard(record.plan.id) if record.state is State.AUTHORIZING else None
        if swept is not None:
            return swept
        if self._seen is not None and is_overtaken(record, self._seen.authority.value):
            await overtaken(self._ports.coordinator, self._keys, self._book, seen)
            return None
        expired = record.plan.expires_at <= self._clock.wall()
        wanted = record.plan.target == self._settings.region and bool(record.execute_requested_by)
        if (wanted or expired) and await self._membership.claim(self._keys.executor(record.plan.id)):
            return await self._takeover.step(seen)
        return None

    async def _look_around(self) -> str | None:
        """A standby's watch; for single streams everybody's. Beside the plans: it asks stores and a pager, and they must not
        wait for that."""
        await self._shout()
        if self._seen is None:
            return None
        if self._actives:
            return await self._stream_watch.look(self._seen)
        return await self._stream_watch.look(self._seen) or await self._watch.look(self._seen)

    async def _shout(self, *pages: Page) -> None:
        """Break-glass is never quiet: what nobody could be told is told again and again. Never raises: see the warnings."""
        self._unheard.extend(pages)
        for _ in range(len(self._unheard)):
            page = self._unheard.pop(0)
            try:
                await self._ports.pager.page(page)
            except DrError as error:
                self._unheard.append(page)
                self._warnings["break-glass"] = f"people were not told: {page.title} ({error.message})"
        if not self._unheard:
            self._warnings.pop("break-glass", None)

    async def _gather(self, record: PlanRecord) -> tuple[Evidence, Coordination]:
        knowledge, ended_by = await self._knowledge(), record.plan.evidence.right_ended_by
        if ended_by:
            # Nobody held when the plan was made, and it is void once somebody has (the epoch moves). An instance that started
            # later must not count the time until it looked as time in which the old holder could acknowledge.
            gone = {stream: min(ended_by, knowledge.holder_gone_at.get(stream, ended_by)) for stream in self._streams}
            knowledge = replace(knowledge, holder_gone_at=gone)
        return await gather(self._outside, record.plan.kind, record.plan.target, knowledge, plan=record.plan.id)

    async def _knowledge(self) -> LocalKnowledge:
        reports = await read_readable(self._ports.coordinator, self._keys.reports, StreamReport)
        kept = {
            tail.agent: tail.last_id
            for report in reports.documents
            for tail in report.value.unreplicated
            if self._view.has(tail.agent, tail.last_id) is not None
        }
        return LocalKnowledge(self._view.agent_count(), self._gone_at(), kept)

    async def _propose(self, request: PlanRequest) -> Seen[PlanRecord]:
        kind = self._book.kind_of(request)
        evidence, _ = await gather(self._outside, kind, request.to, await self._knowledge())
        return await self._book.create(request, evidence)


async def _each(act: Callable[[T], Awaitable[R]], things: Iterable[T], at_once: int = 0) -> list[R]:
    """``act`` on every one of ``things``, side by side (``at_once`` of them; 0: all). All are done when this returns; then the
    first error is raised, one that is no DrError (a bug) before the others."""
    slots = asyncio.Semaphore(at_once) if at_once else None

    async def one(thing: T) -> R:
        async with slots or contextlib.nullcontext():
            return await act(thing)

    wanted = list(things)
    if len(wanted) == 1:
        return [await act(wanted[0])]
    found = await asyncio.gather(*(one(thing) for thing in wanted), return_exceptions=True)
    errors = [error for error in found if isinstance(error, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, DrError)):
        raise error
    return [result for result in found if not isinstance(result, BaseException)]


__all__ = ["Controller", "Ports"]
