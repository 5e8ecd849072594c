"""One controller instance: the parts it is made of, the loops that keep it going, and the role that follows from its streams.

Of a group's streams it holds its share (``duty``), each with a lease, an epoch and a writer of its own (``active``), and
follows the others. Nothing is decided here: a loop calls its part and says what came of it. What it answers is in ``desk``.

Every loop does one bounded thing per tick and says it in one sentence. An error that a port may raise is part of the tick (it
is said and the next tick looks again); anything else is a bug and ends the process, because a lease that expires is safer than
a controller that limps on.

    duty      steps down where a right is gone, looks at etcd (``sight``), considers to acquire more
    follow    reads, verifies and indexes its own region's store, for every stream that is not held here
    stores    reads every store's head, so that people see what is unknown and since when
    report    the holder publishes lag and exposure, and lets another store stand in for a silent home store
    canary    the holder writes canaries
    retention the holder carries live records forward, moves bases and deletes what lies before them
    tend      the holder re-assigns agents of failed hosts
    plans     runs approved plans of this region up to ``authorize``; sweeps expired ones (``planning``)
    watch     a standby notices that nobody holds the group, tells people and proposes a plan
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar

from controller import __version__
from controller.domain.model import Fence, Member, Position, Role
from controller.domain.promotion import PlanRecord
from controller.domain.sharing import stream_names
from controller.errors import Corrupt, DrError, WrongGroup
from controller.ports import Page
from controller.runtime.active import Active
from controller.runtime.archive import Archive
from controller.runtime.audit import Audit
from controller.runtime.desk import Desk
from controller.runtime.documents import Keys, Seen
from controller.runtime.duty import Duty
from controller.runtime.fleet import FleetManager
from controller.runtime.membership import Membership
from controller.runtime.mender import Mender
from controller.runtime.metrics import Metrics
from controller.runtime.planning import Planning
from controller.runtime.plans import PlanBook
from controller.runtime.policies import fleet_policy, plan_policy, takeover_policy, watch_policy
from controller.runtime.restorer import Restorer
from controller.runtime.routing import Router
from controller.runtime.salvager import Salvager
from controller.runtime.service import PlanRequest
from controller.runtime.shares import Sharing, overall
from controller.runtime.shell import Ports, Shell
from controller.runtime.sight import Sight
from controller.runtime.verifier import Verifier
from controller.runtime.watch import Watch
from controller.runtime.watch_streams import StreamWatch
from controller.runtime.wiring import outside_of
from controller.settings import Settings, fingerprint
from controller.stream.follower import Follower
from controller.stream.view import View

FOLLOW_BUDGET = 64
FOLLOWED_AT_ONCE = 8
"""Streams that are followed side by side. Also bounds memory: each holds a few segments."""

T = TypeVar("T")
R = TypeVar("R")


class Controller(Desk):
    """Implements ``ControllerService``. ``run`` lives until it is cancelled; ``stop`` gives back what it may give back."""

    def __init__(
        self, settings: Settings, ports: Ports, view_path: Path | None = None, say: Callable[..., None] | None = None
    ) -> None:
        self._settings = settings
        self._fingerprint = fingerprint(settings)
        self._ports = ports
        self._clock = ports.clock
        self._say_event = say
        self._started_at = ports.clock.wall()
        self._role = Role.STANDBY
        self._reason = "starting"
        self._said: dict[str, tuple[Role, str]] = {}
        self._followed: dict[str, Position] = {}
        self._followed_at = float("-inf")
        self._warnings: dict[str, str] = {}
        self._unheard: list[Page] = []
        self._actives: dict[str, Active] = {}
        self._current: frozenset[str] = frozenset()
        self._streams = stream_names(settings.stream.streams)
        self._keys = Keys(settings.etcd.prefix, settings.group)
        self._audit = Audit(ports.coordinator, self._keys)
        self._view = View(view_path, warm_max_bytes=settings.stream.warm_max_bytes)
        self._store = ports.stores[settings.region]
        self._outside = outside_of(settings, ports)
        self._sight = Sight(self._outside, self._streams, ports.clock, settings.etcd.tick_seconds)
        self._metrics = Metrics(settings.group, settings.region, settings.instance)
        self._followers = {
            stream: Follower(self._store, self._view, stream, ports.clock, settings.group) for stream in self._streams
        }
        self._membership = Membership(
            ports.coordinator, self._keys, settings.etcd.ttl_seconds, settings.region, settings.instance
        )
        self._make_plans()
        self._make_streams()
        self._make_past()

    def _make_plans(self) -> None:
        """What plans, and the watch that proposes them, are made of."""
        settings, ports = self._settings, self._ports
        self._book = PlanBook(
            ports.coordinator,
            self._keys,
            self._audit,
            ports.clock,
            ports.identity,
            plan_policy(settings),
            tuple(settings.regions),
            settings.instance,
            ports.new_id,
        )
        self._planning = Planning(
            coordinator=ports.coordinator,
            keys=self._keys,
            clock=ports.clock,
            book=self._book,
            membership=self._membership,
            outside=self._outside,
            sight=self._sight,
            view=self._view,
            streams=self._streams,
            region=settings.region,
            instance=settings.instance,
            policy=takeover_policy(settings),
            tell=self._tell,
        )
        self._watch = Watch(
            self._outside,
            self._audit,
            ports.pager,
            self._propose,
            self._book.all,
            watch_policy(settings),
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

    def _make_streams(self) -> None:
        """What holds streams, takes records for them and runs agents."""
        settings, ports = self._settings, self._ports
        self._fleet = FleetManager(
            self._view,
            self._submit_own,
            self._right_seconds,
            ports.clock,
            epoch=lambda: self._lead.tenure.fence.epoch if self._lead else 0,
            active_address=self._active_address,
            is_current=self._is_current,
            policy=fleet_policy(settings),
        )
        self._sharing = Sharing(
            self._streams,
            settings.region,
            settings.instance,
            ttl_seconds=settings.etcd.ttl_seconds,
            expected=len(settings.regions[settings.region].controllers),
            now=ports.clock.monotonic,
        )
        self._duty = Duty(self._shell, self._sight, self._sharing, self._outside, self._audit, self._say, self._actives)
        self._router = Router(
            self._streams,
            settings.region,
            settings.api.address,
            self._actives,
            lambda: self._sight.seen.holders if self._sight.seen else (),
            ports.peers,
            self._view,
            self._followers,
            ports.coordinator,
            self._keys,
            ports.clock,
        )

    def _make_past(self) -> None:
        """What people ask of the past: read it, verify and repair it, restore, look after what was cut off."""
        settings, ports = self._settings, self._ports
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

    def _shell(self, stream: str) -> Shell:
        """What the tenure of a stream gets of this instance."""
        return Shell(
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
            group.create_task(self._loop("duty", settings.etcd.tick_seconds, self._do_duty), name="duty")
            group.create_task(self._loop("follow", settings.stream.follow_seconds, self._follow), name="follow")
            group.create_task(self._loop("report", settings.rpo.report_seconds, self._report), name="report")
            group.create_task(self._loop("canary", settings.rpo.report_seconds, self._canary), name="canary")
            group.create_task(self._loop("retention", settings.rpo.report_seconds, self._keep_bounded), name="retention")
            group.create_task(self._loop("tend", settings.rpo.report_seconds, self._tend), name="tend")
            group.create_task(self._loop("view", settings.rpo.report_seconds, self._settle), name="view")
            group.create_task(self._loop("stores", settings.rpo.report_seconds, self._look_at_stores), name="stores")
            group.create_task(self._loop("plans", settings.etcd.tick_seconds, self._planning.move_on), name="plans")
            group.create_task(self._loop("watch", settings.etcd.tick_seconds, self._look_around), name="watch")

    async def stop(self) -> None:
        """An orderly end: steps down, keeps the lease until every right that was granted has passed (or lets it expire)."""
        await self.verifier.close()
        await asyncio.gather(*(active.retire() for active in self._actives.values()))
        for active in tuple(self._actives.values()):
            await self._duty.step_down(active, "this instance is stopping")
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

    async def _do_duty(self) -> str | None:
        ended = [sentence for sentence in await _each(self._duty.heed, self._actives.values()) if sentence]
        if ended:
            return "; ".join(ended)
        await self._observe()
        return await self._duty.consider() or await self._duty.even_out()

    async def _observe(self) -> None:
        """One look at etcd; says what this member sees."""
        self._sharing.note(await self._sight.look())
        await self._membership.announce(self._member(self._sight.seen_at))

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
            fingerprint=self._fingerprint,
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
        if self._sight.seen is None:
            return None
        members = self._sight.seen.members
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

    async def _look_at_stores(self) -> None:
        """A loop of its own: a store that does not answer must not delay the report, which is what a loss is estimated from."""
        await self._sight.look_at_stores()

    # ------------------------------------------------------------------------------------------------------- people

    async def _look_around(self) -> str | None:
        """A standby's watch; for single streams everybody's. Beside the plans: it asks stores and a pager, and they must not
        wait for that."""
        await self._shout()
        seen = self._sight.seen
        if seen is None:
            return None
        if self._actives:
            return await self._stream_watch.look(seen)
        return await self._stream_watch.look(seen) or await self._watch.look(seen)

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

    async def _propose(self, request: PlanRequest) -> Seen[PlanRecord]:
        return await self._planning.propose(request)


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
