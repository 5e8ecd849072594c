"""Opens an epoch on one stream: fence, hold if acknowledgements may be out of reach, choose the history, bring it home, fork.

The same code runs after a restart in the same region and inside a promotion (steps ``fence`` and ``catch-up``). It never
bypasses a hold: while a store that may hold acknowledgements which no other has is not fenced, only a loss that people
approved lets the epoch open, and the transaction that records the fork compares that approval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from controller.domain import replication
from controller.domain.model import Authority, EpochStart, Forks, Head, Role, StreamReport
from controller.domain.plan import Loss, PlanKind, canonical
from controller.domain.promotion import Event, PlanRecord, State
from controller.errors import Conflict, DrError, FenceLost, Refused, Unavailable
from controller.ports import Clock, Compare, Coordinator, Page, Pager, Put, RegionStore, Traffic
from controller.runtime.documents import Keys, Seen, encode, read
from controller.runtime.evidence import expected_loss
from controller.runtime.plans import PlanBook, approvable, loss_is_approved
from controller.runtime.service import JournalEntry
from controller.runtime.tenure import Tenure
from controller.stream.follower import Follower
from controller.stream.history import Tail, bring_home, fence_stores
from controller.stream.reader import warm
from controller.stream.view import View

RETRY_SECONDS = 0.5
WARM_BATCH = 500
"""Bodies that are loaded between two looks at the right to act, after a rewind left them cold."""
BEFORE_OPEN = frozenset({State.FENCING, State.CATCHING_UP, State.HOLDING})


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
    traffic: Traffic
    pager: Pager
    book: PlanBook
    view: View
    followers: Mapping[str, Follower]
    region: str
    instance: str
    store_timeout_seconds: float
    ttl_seconds: float
    say: Callable[[Role, str], None]


class Opening:
    """One attempt to open one stream under one tenure. ``run`` returns when the epoch is open, or raises."""

    def __init__(self, parts: Parts, tenure: Tenure) -> None:
        self._parts = parts
        self._tenure = tenure
        self._paged = False

    async def run(self) -> Opened:
        """Raises FenceLost when the right is gone, Conflict when a barrier or a newer authority stands in the way."""
        while True:
            if not self._tenure.may_act():
                raise FenceLost(f"the right to act ended while opening: {self._tenure.right.lost or 'it ran out'}")
            if self._tenure.barrier is not None:
                raise Conflict(f"plan {self._tenure.barrier.plan} is taking over before this epoch opened", hint="step down")
            try:
                opened = await self._attempt()
            except FenceLost:
                raise
            except DrError as error:
                # Not open yet, and nobody is told otherwise. Stepping down would only bring the next one here.
                self._parts.say(Role.HOLDING, error.message)
                await self._tell_people(error)
                opened = None
            if opened is not None:
                return opened
            await self._parts.clock.sleep(RETRY_SECONDS)

    async def _tell_people(self, error: DrError) -> None:
        """Waiting mends what is unavailable; anything else needs somebody to look."""
        if not isinstance(error, (Unavailable, Conflict)):
            where = f"{self._parts.region} cannot open epoch {self._tenure.fence.epoch}"
            await self._page(where, f"{error.message}. {error.hint}")

    async def _attempt(self) -> Opened | None:
        parts, fence = self._parts, self._tenure.fence
        authority = await self._authority()
        plan = await self._plan(authority.value)
        forks = await read(parts.coordinator, parts.keys.forks(fence.stream), Forks)
        essential = set(forks.value.sole_ackers if forks else ())
        if plan is not None:  # the people who approved the plan knew that these do not answer
            essential -= {store.region for store in plan.value.plan.evidence.unreachable}
        heads, unfenced = await fence_stores(parts.stores, fence, parts.store_timeout_seconds, essential)
        lacks = replication.quorum_lacks(authority.value.stores, heads)
        if lacks is not None:
            parts.say(Role.HOLDING, f"{lacks} ({'; '.join(f'{region}: {why}' for region, why in unfenced.items())})")
            return None
        if plan is not None and plan.value.state is State.FENCING:
            plan = await self._fenced(plan, heads, unfenced)
        starts = forks.value.starts if forks else ()
        forgotten = etcd_forgot(heads, starts)
        if forgotten is not None:
            # Step down, not hold: a holder would stand in the way of `drctl recover`.
            raise FenceLost(forgotten, hint="compare the stores with `drctl status`, then confirm with `drctl recover`")
        choice = replication.choose(heads, starts, home=parts.region, epoch=fence.epoch)
        loss = await self._loss(plan, forks.value if forks else Forks(), heads)
        plan = await self._may_lose(plan, loss)
        if loss.records_unknown and plan is None:
            return None
        parts.say(Role.OPENING, f"bringing {choice.length} segments of history home")
        head, tail = await bring_home(parts.stores, heads, fence, parts.region, starts, choice)
        await self._catch_up_view(tail)
        await self._fork(authority, forks, plan, loss, tail)
        return Opened(head, tail, tuple(heads))

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

    async def _fenced(self, plan: Seen[PlanRecord], heads: Mapping[str, Head], unfenced: Mapping[str, str]) -> Seen[PlanRecord]:
        """Step ``fence`` is complete: the stores are, and the TXT record is raised so that a predecessor's batch fails."""
        parts, fence = self._parts, self._tenure.fence
        started = plan.value.authorized_at
        zone = await self._raise_zone()
        now = parts.clock.wall()
        names = ", ".join(sorted(heads))
        sentence = f"epoch {fence.epoch} fences {names}" + (f"; not {', '.join(unfenced)}" if unfenced else "") + f"; {zone}"
        entry = JournalEntry(plan.value.plan.id, "fence", started, now, parts.instance, fence.epoch, sentence)
        catch_up = JournalEntry(
            plan.value.plan.id, "catch-up", now, 0.0, parts.instance, fence.epoch, "choosing the longest history"
        )
        return await parts.book.transition(
            plan,
            Event.FENCED,
            sentence,
            compare=[self._tenure.guard],
            also=[
                Put(parts.keys.journal(entry.plan, "fence"), encode(entry)),
                Put(parts.keys.journal(entry.plan, "catch-up"), encode(catch_up)),
            ],
            change=lambda record: replace(record, epoch=fence.epoch),
        )

    async def _raise_zone(self) -> str:
        """Raises the TXT alone. A zone that does not answer delays nothing here: step ``route`` needs it and will wait."""
        traffic, fence = self._parts.traffic, self._tenure.fence
        try:
            seen = await traffic.read()
            if seen.epoch > fence.epoch:
                raise FenceLost(f"the zone knows epoch {seen.epoch}, ours is {fence.epoch}", epoch=seen.epoch)
            await traffic.change(fence, seen, seen.weights)
        except (Unavailable, Conflict, Refused) as error:
            return f"the zone is not raised yet ({error.message})"
        return f"the zone is raised to {fence.epoch}"

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

    async def _may_lose(self, plan: Seen[PlanRecord] | None, loss: Loss) -> Seen[PlanRecord] | None:
        """The plan whose approvals cover ``loss``. Without a plan nothing may be lost; None when it must be waited for."""
        parts = self._parts
        if plan is None:
            if loss.records_unknown:
                parts.say(
                    Role.HOLDING, f"holding: {loss.basis}; bring that store back, or plan a failover and approve the loss"
                )
                await self._page(f"{parts.region} holds: acknowledged records may be out of reach", loss.basis)
            return None
        record = plan.value
        problem = loss_is_approved(record, loss)
        if problem is None:
            return plan
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
        self, authority: Seen[Authority], forks: Seen[Forks] | None, plan: Seen[PlanRecord] | None, loss: Loss, tail: Tail
    ) -> None:
        """Records where the epoch begins: from now on everything older at or above that place is not history.

        One transaction, guarded by the holder key; inside a promotion it is the one that ends ``catch-up``, so that the loss
        is recorded together with the fork that makes it final.
        """
        parts, fence = self._parts, self._tenure.fence
        key = parts.keys.forks(fence.stream)
        recorded = forks.value.starts if forks else ()
        if recorded and recorded[-1].epoch == fence.epoch:
            return  # an earlier attempt of ours was applied although its answer was lost
        opened = Forks(replication.with_fork(recorded, EpochStart(fence.epoch, tail.seq + 1)), sole_ackers=(parts.region,))
        compare = [
            self._tenure.guard,
            Compare.modified(key, forks.revision) if forks else Compare.absent(key),
            Compare.modified(parts.keys.authority, authority.revision),
        ]
        if plan is None:
            result = await parts.book.audit.commit(
                compare,
                [Put(key, encode(opened))],
                at=parts.clock.wall(),
                actor=f"{parts.region}/{parts.instance}",
                action="epoch-opened",
                subject=fence.stream,
                detail={"epoch": fence.epoch, "first_seq": tail.seq + 1},
            )
            if not result.succeeded:
                raise Conflict("something changed while the epoch was opening", hint="trying again")
            return
        planned = plan.value.plan.kind is not PlanKind.FAILOVER
        now = parts.clock.wall()
        started = await read(parts.coordinator, parts.keys.journal(plan.value.plan.id, "catch-up"), JournalEntry)
        sentence = f"history of {tail.seq} segments; {_said(loss, planned)}"
        entry = JournalEntry(
            plan.value.plan.id,
            "catch-up",
            started.value.started_at if started else now,
            now,
            parts.instance,
            fence.epoch,
            sentence,
            {"seq": tail.seq, "loss": canonical(loss)},
        )
        await parts.book.transition(
            plan,
            Event.CAUGHT_UP,
            sentence,
            compare=compare,
            also=[Put(key, encode(opened)), Put(parts.keys.journal(entry.plan, "catch-up"), encode(entry))],
            change=lambda record: replace(record, final_loss=loss, epoch=fence.epoch),
        )


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


def _said(loss: Loss, planned: bool) -> str:
    if loss.exact:
        return "nothing acknowledged is lost" + (" (the old holder drained)" if planned else "")
    return f"at most {loss.seconds:.1f} s and {loss.records} reported records (plus unknown) are lost"
