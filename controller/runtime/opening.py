"""Opens an epoch on one stream: fence, hold if acknowledgements may be out of reach, choose the history, bring it home, fork.

The same code runs after a restart in the same region and inside a promotion (steps ``fence`` and ``catch-up``). It never
bypasses a hold: while a store that may hold acknowledgements which no other has is not fenced, only a loss that people
approved lets the epoch open, and the transaction that records the fork compares that approval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from controller.domain import failsafe, lease, replication
from controller.domain.model import Authority, EpochStart, Forks, Head, Role, StreamReport
from controller.domain.plan import Loss, canonical
from controller.domain.promotion import Event, PlanRecord, Progress, State
from controller.errors import Conflict, DrError, FenceLost, Unavailable
from controller.ports import Clock, Compare, Coordinator, Operation, Page, Pager, Put, RegionStore, Seals
from controller.runtime.documents import Keys, Seen, encode, read
from controller.runtime.evidence import expected_loss
from controller.runtime.plans import PlanBook, approvable, loss_is_approved
from controller.runtime.tenure import Tenure
from controller.runtime.together import BEFORE_OPEN, POLL_SECONDS, Together
from controller.stream.follower import Follower
from controller.stream.history import Tail, bring_home, fence_stores
from controller.stream.reader import warm
from controller.stream.view import View

RETRY_SECONDS = 0.5
WARM_BATCH = 500
"""Bodies that are loaded between two looks at the right to act, after a rewind left them cold."""


@dataclass(frozen=True, slots=True)
class Opened:
    """An epoch that is open: where the writer goes on."""

    home_head: Head
    tail: Tail
    fenced: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Parts:
    """What opening needs of one controller."""

    coordinator: Coordinator
    keys: Keys
    clock: Clock
    stores: Mapping[str, RegionStore]
    pager: Pager
    book: PlanBook
    view: View
    followers: Mapping[str, Follower]
    region: str
    instance: str
    store_timeout_seconds: float
    ttl_seconds: float
    failsafe_seconds: float
    """How long this holder may go on past what its stores proved, once etcd is unreachable for everybody; 0: never."""
    lent_seconds: float
    """How long rights under this holder may outlive its key: the TTL less the margin."""
    say: Callable[[Role, str], None]
    seals: Seals | None = None


class Opening:
    """One attempt to open one stream under one tenure. ``run`` returns when the epoch is open, or raises."""

    def __init__(self, parts: Parts, tenure: Tenure, together: Together) -> None:
        self._parts = parts
        self._tenure = tenure
        self._together = together
        self._paged = False
        self._fenced_at: float | None = None
        """When nobody older could prove any more that it may act: every store of a quorum was fenced, of every stream that
        moves together with this one."""

    async def run(self) -> Opened:
        """Raises FenceLost when the right is gone, Conflict when a barrier or a newer authority stands in the way."""
        while True:
            self._still_ours()
            pause_seconds = RETRY_SECONDS
            try:
                opened = await self._attempt()
            except FenceLost:
                raise
            except Conflict as error:  # somebody acquired another stream, say, which moves the authority's revision
                self._parts.say(Role.OPENING, error.message)
                opened, pause_seconds = None, POLL_SECONDS
            except DrError as error:
                # Not open yet, and nobody is told otherwise. Stepping down would only bring the next one here.
                self._parts.say(Role.HOLDING, error.message)
                await self._tell_people(error)
                opened = None
            if opened is not None:
                return opened
            await self._parts.clock.sleep(pause_seconds)

    async def _tell_people(self, error: DrError) -> None:
        """Waiting mends what is unavailable; anything else needs somebody to look."""
        if not isinstance(error, (Unavailable, Conflict)):
            where = f"{self._parts.region} cannot open epoch {self._tenure.fence.epoch}"
            await self._page(where, f"{error.message}. {error.hint}")

    async def _attempt(self) -> Opened | None:
        parts, fence = self._parts, self._tenure.fence
        authority = await self._authority()
        plan = await self._plan(authority.value)
        progress = None if plan is None else await self._together.mine(plan.value.plan.id)
        # Opened before within this plan: from then on nothing may be lost any more, as after a restart.
        moving = plan if progress is None or not progress.value.open else None
        forks = await read(parts.coordinator, parts.keys.forks(fence.stream), Forks)
        essential = set(forks.value.sole_ackers if forks else ())
        if moving is not None:  # the people who approved the plan knew that these do not answer
            unreachable = moving.value.plan.evidence.unreachable
            essential -= {store.region for store in unreachable if store.stream == fence.stream}
        heads, unfenced = await fence_stores(parts.stores, fence, parts.store_timeout_seconds, essential)
        lacks = replication.quorum_lacks(authority.value.stores, heads)
        if lacks is not None:
            parts.say(Role.HOLDING, f"{lacks} ({'; '.join(f'{region}: {why}' for region, why in unfenced.items())})")
            return None
        starts = forks.value.starts if forks else ()
        forgotten = etcd_forgot(heads, starts)
        if forgotten is not None:
            # Step down, not hold: a holder would stand in the way of `drctl recover`.
            raise FenceLost(forgotten, hint="compare the stores with `drctl status`, then confirm with `drctl recover`")
        choice = replication.choose(heads, starts, home=parts.region, epoch=fence.epoch)
        loss = await self._loss(moving, forks.value if forks else Forks(), heads)
        if moving is not None:
            now = Progress(moving.value.plan.id, fence.stream, fence.epoch, loss, tuple(sorted(heads)), tuple(sorted(unfenced)))
            await self._together.note(progress, now)
            progress, plan = await self._all_fenced(moving.value.plan.id)
            self._note_fenced()
            plan = await self._may_lose(plan, await self._together.loss(plan.value.plan.id))
        elif loss.records_unknown:
            await self._hold(loss)
            return None
        self._note_fenced()
        if parts.seals is not None:  # before the fork: an epoch that cannot write safely must not begin
            await parts.seals.prepare(fence)
        parts.say(Role.OPENING, f"bringing {choice.length} segments of history home")
        head, tail = await bring_home(parts.stores, heads, fence, parts.region, starts, choice)
        await self._catch_up_view(tail)
        if forks is not None:
            await self._outwait(forks.value)
        await self._fork(authority, forks, plan, progress, tail)
        return Opened(head, tail, tuple(heads))

    def _note_fenced(self) -> None:
        if self._fenced_at is None:
            self._fenced_at = self._parts.clock.monotonic()

    async def _outwait(self, last: Forks) -> None:
        """Waits until the last holder, and every agent that it lent its right to, can certainly not act any more.

        A right ends at most a TTL less the margin after its holder's key vanished: every heartbeat that extended it saw the key
        there. It may end so late, because etcd sometimes takes a lease away that was renewed a moment ago. And under failsafe a
        right may run for what stores proved before we fenced them (``domain.failsafe``). Raises FenceLost, Conflict.
        """
        assert self._fenced_at is not None
        ttl_seconds = self._parts.ttl_seconds
        lent_until = self._tenure.gone_by + lease.outlives_seconds(last.lent_seconds, ttl_seconds)
        proved_until = self._fenced_at + failsafe.wait_seconds(last.failsafe_seconds, ttl_seconds)
        while (left := max(lent_until, proved_until) - self._parts.clock.monotonic()) > 0:
            self._still_ours()
            self._parts.say(Role.OPENING, "waiting until every right of the last holder has certainly run out")
            await self._parts.clock.sleep(min(left, RETRY_SECONDS))
        self._still_ours()

    async def _all_fenced(self, plan_id: str) -> tuple[Seen[Progress], Seen[PlanRecord]]:
        """Waits until the plan is past ``fence``. Returns what this stream wrote down, and the plan.

        Raises FenceLost, Conflict when this tenure is over meanwhile."""
        while True:
            self._still_ours()
            authority = await self._authority()
            plan, mine = await self._plan(authority.value), await self._together.mine(plan_id)
            if plan is None or plan.value.plan.id != plan_id or mine is None:
                raise Conflict(f"plan {plan_id} moved on without this stream", hint="looking again")
            if plan.value.state is not State.FENCING:
                return mine, plan
            try:
                return mine, await self._together.fenced(plan)
            except Unavailable as waiting:
                self._parts.say(Role.OPENING, waiting.message)
            await self._parts.clock.sleep(POLL_SECONDS)

    def _still_ours(self) -> None:
        """Raises FenceLost, Conflict."""
        if not self._tenure.may_act():
            raise FenceLost(f"the right to act ended while opening: {self._tenure.right.lost or 'it ran out'}")
        if self._tenure.barrier is not None:
            raise Conflict(f"plan {self._tenure.barrier.plan} is taking over before this epoch opened", hint="step down")

    async def _authority(self) -> Seen[Authority]:
        authority = await read(self._parts.coordinator, self._parts.keys.authority, Authority)
        if authority is None or authority.value.region != self._parts.region:
            raise FenceLost("the authority is not with this region any more")
        return authority

    async def _plan(self, authority: Authority) -> Seen[PlanRecord] | None:
        """The plan that put this region in authority, while it has not opened its epoch."""
        if authority.plan is None:
            return None
        plan = await read(self._parts.coordinator, self._parts.keys.plan(authority.plan), PlanRecord)
        return plan if plan is not None and plan.value.state in BEFORE_OPEN else None

    # ------------------------------------------------------------------------------------------------- promotion

    async def _loss(self, plan: Seen[PlanRecord] | None, forks: Forks, heads: Mapping[str, Head]) -> Loss:
        parts, stream = self._parts, self._tenure.fence.stream
        report = await read(parts.coordinator, parts.keys.report(stream), StreamReport)
        ended_by = parts.clock.wall()
        if plan is not None:
            ended_by = plan.value.right_ended_by or plan.value.authorized_at
        known = report.value if report else None
        return expected_loss(heads, forks, known, home=parts.region, right_ended_by=ended_by, kept=self._kept(known))

    def _kept(self, report: StreamReport | None) -> set[str]:
        tails = report.unreplicated if report else ()
        return {tail.agent for tail in tails if self._parts.view.has(tail.agent, tail.last_id) is not None}

    async def _hold(self, loss: Loss) -> None:
        """Without a plan nothing may be lost: waits for the store, or for people who plan a failover."""
        parts = self._parts
        parts.say(Role.HOLDING, f"holding: {loss.basis}; bring that store back, or plan a failover and approve the loss")
        await self._page(f"{parts.region} holds: acknowledged records may be out of reach", loss.basis)

    async def _may_lose(self, plan: Seen[PlanRecord], loss: Loss) -> Seen[PlanRecord]:
        """The plan whose approvals cover ``loss``, which is the whole group's. The lead's holder asks people; the others wait
        for what it writes. Raises Unavailable while the loss is not approved."""
        parts = self._parts
        record = plan.value
        problem = loss_is_approved(record, loss)
        if problem is None:
            return plan
        if not self._together.leads:
            raise Unavailable(f"holding: {problem}", hint=f"drctl plan show {record.plan.id}")
        amended = approvable(record, parts.book.plan_ttl_seconds)
        approvals = await parts.book.approvals(record.plan.id)
        judged = parts.book.judge(amended, [found.value for found in approvals], minimum_left_seconds=2 * parts.ttl_seconds)
        if record.state is State.CATCHING_UP or self._outdated(amended, loss) or judged.refused_by:
            # Asked anew, under another digest: with the loss as it is now, and with time left to sign.
            await parts.book.transition(
                plan,
                Event.LOSS_EXCEEDED,
                f"holding: {problem}",
                compare=[self._tenure.guard],
                change=lambda after: replace(after, final_loss=loss),
            )
            self._paged = False
            await self._page(f"plan {record.plan.id} holds: the loss is worse than approved", problem)
            raise Unavailable(f"holding: {problem}", hint=f"drctl plan show {record.plan.id}, or bring the store back")
        if not judged.open:
            raise Unavailable(
                f"holding: {problem}; {judged.sentence}", hint=f"drctl approve {record.plan.id}, or bring the store back"
            )
        return await parts.book.transition(
            plan,
            Event.LOSS_APPROVED,
            f"the greater loss was approved by {', '.join(judged.valid)}",
            compare=[self._tenure.guard, *(Compare.modified(found.item.key, found.revision) for found in approvals)],
            change=lambda after: replace(after, plan=amended.plan, digest=amended.digest),
        )

    def _outdated(self, amended: PlanRecord, loss: Loss) -> bool:
        """Whether what people are asked to accept is over: the loss grew past it since, or its time is."""
        plan = amended.plan
        return plan.expires_at <= self._parts.clock.wall() or loss_is_approved(amended, loss) is not None

    async def _page(self, title: str, body: str) -> None:
        if self._paged:
            return
        self._paged = True
        try:
            await self._parts.pager.page(Page(f"hold-{self._tenure.fence.epoch}", "critical", title, body, "region-failover"))
        except DrError:
            self._paged = False  # nobody was reached: try again with the next attempt

    # ------------------------------------------------------------------------------------------------------ opening

    async def _catch_up_view(self, tail: Tail) -> None:
        """The view must know everything that was acknowledged before it answers for it."""
        follower = self._parts.followers[self._tenure.fence.stream]
        store = self._parts.stores[self._parts.region]
        follower.suspended = True  # from now on the view is ours: the standby's loop leaves it alone
        while True:
            position = await follower.step(forced=True)
            if position.seq >= tail.seq and not await warm(self._parts.view, store, WARM_BATCH):
                return
            if not self._tenure.may_act():
                raise FenceLost("the right to act ended while the view caught up")

    async def _fork(
        self,
        authority: Seen[Authority],
        forks: Seen[Forks] | None,
        plan: Seen[PlanRecord] | None,
        progress: Seen[Progress] | None,
        tail: Tail,
    ) -> None:
        """Records where the epoch begins: from now on everything older at or above that place is not history.

        One transaction, guarded by the holder key. Inside a promotion it compares the plan under which the loss was approved,
        and writes the loss down together with the fork that makes it final.
        """
        parts, fence = self._parts, self._tenure.fence
        key = parts.keys.forks(fence.stream)
        recorded = forks.value.starts if forks else ()
        if recorded and recorded[-1].epoch == fence.epoch:
            return  # an earlier attempt of ours was applied although its answer was lost
        starts = replication.with_fork(recorded, EpochStart(fence.epoch, tail.seq + 1))
        opened = Forks(starts, (parts.region,), parts.failsafe_seconds, parts.lent_seconds)
        compare = [
            self._tenure.guard,
            Compare.modified(key, forks.revision) if forks else Compare.absent(key),
            Compare.modified(parts.keys.authority, authority.revision),
        ]
        then: list[Operation] = [Put(key, encode(opened))]
        detail: dict[str, object] = {"epoch": fence.epoch, "first_seq": tail.seq + 1}
        if plan is not None and progress is not None:
            compare += [
                Compare.modified(plan.item.key, plan.revision),
                Compare.modified(progress.item.key, progress.revision),
            ]
            now = replace(progress.value, epoch=fence.epoch, open=True, first_seq=tail.seq + 1)
            then.append(Put(progress.item.key, encode(now)))
            detail |= {"plan": now.plan, "loss": canonical(now.loss)}
        result = await parts.book.audit.commit(
            compare,
            then,
            at=parts.clock.wall(),
            actor=f"{parts.region}/{parts.instance}",
            action="epoch-opened",
            subject=fence.stream,
            detail=detail,
        )
        if not result.succeeded:
            raise Conflict("something changed while the epoch was opening", hint="trying again")


def etcd_forgot(heads: Mapping[str, Head], forks: tuple[EpochStart, ...]) -> str | None:
    """Why etcd does not know the newest history (it was lost, or restored from an older snapshot), or None.

    An epoch writes only after its fork was recorded. So a store whose last segment is of an epoch above every recorded fork
    knows a history that etcd forgot; choosing by the recorded forks would cut it off. The epoch floor alone does not tell:
    an instance that saw no such store may have been given the forgotten epochs anew.
    """
    newest = max((start.epoch for start in forks), default=0)
    for region, head in sorted(heads.items()):
        if head.last_epoch > newest:
            return (
                f"the store of {region} knows epoch {head.last_epoch}, the newest fork in etcd is of epoch {newest}: etcd was "
                f"lost or restored from an old snapshot"
            )
    return None
