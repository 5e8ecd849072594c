"""Each guard is taken away once, and a checker must notice: a promise whose guard nobody would miss is not tested.

A case is a story, a mutant (an adapter or a function without its condition) and the name of the checker that catches it. The
correct build passes the same story. What is removed is listed in ``README.md`` beside the promise that it belongs to.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from controller.adapters import head_rules
from controller.adapters.memory.region_store import MemoryRegionStore
from controller.adapters.memory.traffic import MemoryTraffic
from controller.adapters.record_sets import Change
from controller.domain import approval, lag, lease, replication
from controller.domain.lease import Beat, Verdict
from controller.domain.model import Commit, EpochStart, Fence, Head, SegmentRef
from controller.domain.plan import NO_LOSS
from controller.domain.promotion import PlanRecord, State
from controller.domain.sharing import stream_of
from controller.errors import Conflict, DrError, FenceLost, OutcomeUnknown, Refused, Unavailable
from controller.lab.virtual_time import run_virtual
from controller.ports import Compare, Operation, TrafficState, TxnResult
from controller.runtime.audit import Audit
from controller.runtime.controller import Controller
from controller.runtime.duty import Duty
from controller.runtime.opening import Opening
from controller.runtime.takeover import Takeover
from controller.runtime.tenure import Tenure
from controller.runtime.together import Together
from controller.stream.segment import frame
from controller.stream.writer import StreamWriter
from tests.simulation.chaos import is_authorization
from tests.simulation.checkers import Violation, violations
from tests.simulation.roads import Call
from tests.simulation.world import ETCD, HOME, OTHER_NAME, PEOPLE, STREAM, TARGET, THIRD, World

ADA, GRACE, LINUS = PEOPLE
Story = Callable[[World], Awaitable[None]]
Patch = pytest.MonkeyPatch


async def delivered(late: Awaitable[object]) -> None:
    """A call that comes too late: refused by the correct build, accepted by a mutant."""
    try:
        await late
    except (FenceLost, Conflict):
        return


async def silent(world: World) -> None:
    """Waits until nobody holds."""

    async def nobody() -> bool:
        return not await world.holders()

    await world.until(nobody, 30, "the lease running out")
    await world.wait(0.6)


# -------------------------------------------------------------------------------------------------------------- stories


async def a_commit_arrives_after_the_fence(world: World) -> None:
    """A commit of the old holder is under way to a store while the next epoch fences it."""
    active = await world.served()
    late: list[tuple[Fence, Commit]] = []

    async def before(call: Call) -> None:
        if call.instance is active and call.target == THIRD and call.op == "advance" and not late:
            late.append((call.what[0], call.what[1]))
            for name in ("a", "b"):
                world.die(world.instances[f"{HOME}/{name}"])
            raise asyncio.CancelledError

    async def after(call: Call) -> None:
        if call.op == "fence" and call.target == THIRD and call.instance is not active and len(late) == 1:
            late.append(late[0])
            client = world.store_class(world.servers[THIRD], world.client(THIRD)._gate)
            await delivered(client.advance(*late[0]))

    with world.effects(before, after):
        await world.until(lambda: bool(late), 10, "a commit under way")
        await silent(world)
        plan = await world.order("failover", TARGET)
        await world.reached(plan, State.DONE)
    assert len(late) == 2


async def a_holder_whose_clock_stopped_comes_back(world: World) -> None:
    """It believes in its right for ever, and attaches its stores anew after the next epoch has fenced them."""
    active = await world.served()
    believer = world.instances[active.key]

    async def before(call: Call) -> None:
        if call.instance is believer and call.op == "advance":
            raise Unavailable("cut", hint="a test did it")

    with world.effects(before):
        believer.clock.stopped_at = believer.clock.monotonic()
        world.cut(ETCD, believer.key)
        await world.until(
            lambda: any(i.acts for i in world.instances.values() if i is not believer), 30, "the neighbour serving"
        )
        await world.wait(3.0)


async def two_processes_with_one_epoch(world: World) -> None:
    """A cloned machine offers another content for a segment that exists."""
    active = await world.served()
    tenure: Any = active.controller._lead
    ref = SegmentRef(STREAM, world.servers[HOME].head(STREAM).seq, tenure.tenure.fence.epoch)
    client = world.store_class(world.servers[HOME], world.client(HOME)._gate)
    await delivered(client.put_segment(tenure.tenure.fence, ref, b"another content"))


async def the_right_ends_while_commits_are_under_way(world: World) -> None:
    """etcd hangs for the holder, its stores answer slowly: commits come back after the deadline, before the next tick."""
    active = await world.served(agents=8)
    world.slow[active.key, ETCD] = 30.0
    for region in (HOME, TARGET, THIRD):
        world.slow[active.key, region] = 0.1
    await world.wait(12.0)


async def a_failover_that_reaches_one_store(world: World) -> None:
    """The target has its own store, which is behind, and no other."""
    await world.served()
    world.cut(TARGET, HOME)
    await world.wait(3.0)
    await world.lose_region(HOME)
    world.cut(THIRD)
    await silent(world)
    try:
        plan = await world.order("failover", TARGET)
        await world.wait(20.0)
        assert await world.plan_state(plan) is not State.DONE
    except Refused:
        pass


async def the_longest_history_is_a_dead_one(world: World) -> None:
    """A long tail that only the first region had; the region that went on without it dies at once; the first comes back."""
    await world.served()
    world.isolate_stores_of(HOME)
    await world.wait(6.0)
    await world.lose_region(HOME)
    await silent(world)
    plan = await world.order("failover", TARGET)
    await world.reached(plan, State.DONE)
    await world.wait(1.0)
    await world.lose_region(TARGET)
    world.cut_store(HOME, cut=False)
    await silent(world)
    assert world.servers[HOME].head(STREAM).seq > world.servers[THIRD].head(STREAM).seq
    plan = await world.order("failover", THIRD)
    await world.wait(15.0)
    await world.wait(3.0)


async def a_dns_change_arrives_a_promotion_too_late(world: World) -> None:
    """The batch of one promotion reaches the zone after the next one is done."""
    await world.served()
    late: list[Call] = []

    async def before(call: Call) -> None:
        if call.op == "change" and call.what[2][TARGET] and not late:
            late.append(call)
            raise OutcomeUnknown("the batch is under way", hint="a test did it")

    with world.effects(before):
        await world.reached(await world.order("switchover", TARGET), State.DONE)
    await world.wait(2.0)
    await world.reached(await world.order("failback", HOME), State.DONE)
    traffic = world.traffic_class(world.zone, (HOME, TARGET, THIRD))
    await delivered(traffic.change(*late[0].what))


async def a_leader_that_hangs_goes_on_answering_keep_alives(world: World) -> None:
    """The old holder's etcd member answers its keep-alives and nothing else; the majority gives the key away."""
    active = await world.served()
    world.behind_hanging_leader.add(active.key)
    await world.wait(15.0)


async def the_loss_grows_after_the_approval(world: World) -> None:
    """The plan was approved with nothing to lose; the store that has the rest dies after the authority moved."""
    await world.served()
    world.isolate_stores_of(HOME)
    await world.wait(14.0)
    for name in ("a", "b"):
        await world.kill(HOME, name)
    await silent(world)

    async def after(call: Call) -> None:
        if is_authorization(call):
            world.cut_store(HOME)

    document = await world.propose("failover", TARGET)
    with world.effects(None, after):
        plan = await world.let_run(document)
        await world.wait(15.0)
    assert await world.plan_state(plan) in (State.HOLDING, State.DONE)


async def the_requester_approves(world: World) -> None:
    """Somebody plans, signs, and finds only one other person."""
    await world.served()
    document = await world.propose("switchover", TARGET, requester=ADA)
    controller = world.standby(TARGET)
    for who in (ADA, GRACE):
        try:
            await world.approve(controller, document, who)
        except Refused:
            continue
    try:
        await controller.execute(document.record.plan.id, ADA, TARGET)
    except DrError:
        return
    await world.wait(20.0)


async def an_approver_refuses(world: World) -> None:
    """Two people approve, a third refuses, somebody executes nevertheless."""
    await world.served()
    document = await world.propose("switchover", TARGET)
    controller = world.standby(TARGET)
    for who, decision in ((LINUS, "refuse"), (ADA, "approve"), (GRACE, "approve")):
        try:
            await world.approve(controller, document, who, decision)
        except Refused:
            continue
    try:
        await controller.execute(document.record.plan.id, "oncall", TARGET)
    except DrError:
        return
    await world.wait(20.0)


async def one_person_signs_under_two_names(world: World) -> None:
    """The same key is listed under two names; both sign."""
    await world.served()
    document = await world.propose("switchover", TARGET)
    controller = world.standby(TARGET)
    try:
        await world.approve(controller, document, ADA)
        await controller.approve(document.record.plan.id, world.signed(document.record, OTHER_NAME, key="ada"))
        await controller.execute(document.record.plan.id, "oncall", TARGET)
    except DrError:
        return
    await world.wait(20.0)


async def an_authorization_arrives_a_promotion_too_late(world: World) -> None:
    """The authorising transaction of one promotion reaches etcd after that plan was done and the fleet was moved home."""
    await world.served()
    late: list[Call] = []

    async def before(call: Call) -> None:
        if is_authorization(call) and not late:
            late.append(call)
            raise OutcomeUnknown("the transaction is under way", hint="a test did it")

    with world.effects(before):
        await world.reached(await world.order("switchover", TARGET), State.DONE)
    await world.wait(2.0)
    await world.reached(await world.order("failback", HOME), State.DONE)
    await silent_etcd_txn(world, late[0])


async def silent_etcd_txn(world: World, call: Call) -> None:
    """Delivers a transaction that was under way, once the holder's key is out of its way."""
    for name in ("a", "b"):
        await world.kill(HOME, name)
    await silent(world)
    compare, then, otherwise = call.what
    world.cluster.txn([c for c in compare if world.late_conditions(c)], then, otherwise)


async def the_executor_is_paused_before_it_authorizes(world: World) -> None:
    """It has checked every expiry; when it goes on, the signatures have expired."""
    await world.served()
    await world.kill(TARGET, "b")
    document = await world.propose("switchover", TARGET)
    controller = world.standby(TARGET)
    for who in (ADA, GRACE):
        await world.approve(controller, document, who, seconds=45.0)
    paused: list[float] = []

    async def before(call: Call) -> None:
        if is_authorization(call) and not paused:
            paused.append(world.clock.monotonic())
            await world.clock.sleep(60.0)

    with world.effects(before):
        await controller.execute(document.record.plan.id, "oncall", TARGET)
        await world.wait(80.0)
    assert paused


async def the_old_region_serves_again_before_the_plan_runs(world: World) -> None:
    """A failover was planned from a dead region. It came back by itself; then somebody executes."""
    await world.served()
    for name in ("a", "b"):
        await world.kill(HOME, name)
    await silent(world)
    document = await world.propose("failover", TARGET)
    for who in (ADA, GRACE):
        await world.approve(world.standby(TARGET), document, who)
    world.start(HOME, "a")
    await world.until(lambda: world.active_in(HOME), 30, "home serving again")
    try:
        await world.standby(TARGET).execute(document.record.plan.id, "oncall", TARGET)
    except DrError:
        return
    await world.wait(25.0)


async def a_switchover(world: World) -> None:
    await world.served()
    await world.reached(await world.order("switchover", TARGET), State.DONE)
    await world.wait(2.0)


async def a_region_is_lost_behind_cut_links(world: World) -> None:
    """What only the lost region had is lost, and the plan must have said so."""
    await world.served()
    world.isolate_stores_of(HOME)
    await world.wait(2.0)
    await world.lose_region(HOME)
    await silent(world)
    plan = await world.order("failover", TARGET)
    await world.reached(plan, State.DONE)
    await world.wait(2.0)


async def etcd_comes_back_from_before_the_promotion(world: World) -> None:
    """Restored, it gives the old region the epochs of the new one anew, while the newer stores cannot be seen."""
    await world.served()
    await world.lose_region(HOME)
    await silent(world)
    snapshot = world.cluster.snapshot()
    await world.reached(await world.order("failover", TARGET), State.DONE)
    await world.wait(3.0)
    for name in ("a", "b"):
        await world.kill(TARGET, name)
    world.cluster.restore(snapshot)
    world.history.restored = True
    world.isolate_stores_of(HOME)
    world.cut_store(HOME, cut=False)
    world.start(HOME, "a")
    await world.wait(10.0)
    world.isolate_stores_of(HOME, cut=False)
    await world.wait(20.0)


async def a_stand_in_dies_with_what_it_alone_acknowledged(world: World) -> None:
    """The home region restarts, and the store that stood in for its own is gone."""
    await world.served()
    world.cut_store(HOME)
    world.cut(THIRD)
    await world.wait(12.0)
    world.cut(TARGET)
    for name in ("a", "b"):
        await world.kill(HOME, name)
    world.heal(THIRD)
    world.cut_store(HOME, cut=False)
    world.start(HOME, "a")
    await world.wait(20.0)


async def one_stream_is_fenced_late(world: World) -> None:
    """A failover whose target has two instances, one of which hangs when the authority moves."""
    await world.served()
    await world.lose_region(HOME)
    await silent(world)

    async def after(call: Call) -> None:
        if is_authorization(call):
            world.freeze(TARGET, "b")

    with world.effects(None, after):
        plan = await world.order("failover", TARGET)
        await world.until(lambda: world.instances[f"{TARGET}/b"].stopped, 20, "the authority moving")
        await world.wait(3.0)
        world.thaw(world.instances[f"{TARGET}/b"])
        await world.reached(plan, State.DONE)


async def a_neighbour_is_new_while_a_plan_waits(world: World) -> None:
    """One instance holds everything; another one starts while a plan waits for its approvals."""
    await world.served()
    lead = world.serving()[STREAM].name
    other = "b" if lead == "a" else "a"
    await world.kill(HOME, other)
    await world.until(world.active_somewhere, 30, "the neighbour taking over")
    await world.propose("switchover", TARGET)
    world.start(HOME, other)
    await world.wait(25.0)


async def an_instance_knows_an_old_holder(world: World) -> None:
    """Three instances. One cannot see etcd and hands records to a holder that has lost its stream to the third."""
    world.start(HOME, "c")
    await world.served()
    last = world.streams[-1]
    loser = world.serving()[last]
    stale = next(i for i in world.instances.values() if i.region == HOME and not i.serves())
    world.cut(ETCD, stale.key)
    world.cut(ETCD, loser.key)
    await world.until(lambda: world.serving().get(last) not in (None, loser), 30, "somebody else holding it")
    world.heal(ETCD, loser.key)
    await world.wait(1.5)
    agent = next(name for name in map(str, range(100)) if stream_of(name, len(world.streams)) == last)
    try:
        await world.put_to(stale, [frame(agent, "1", "checkpoint", b"x")], [b"x"])
    except DrError:
        return


# -------------------------------------------------------------------------------------------------------------- mutants


class UnguardedCommit(MemoryRegionStore):
    """``advance`` compares where the head is, and not whose it is."""

    async def advance(self, fence: Fence, commit: Commit) -> Head:
        def settled(head: Head) -> bool:
            if (head.seq, head.chain) != (commit.prev_seq, commit.prev_chain):
                raise Conflict("not at this place", hint="read the head")
            return False

        return await self._update("advance", fence, settled, lambda head: head_rules.after_advance(head, fence, commit))


class UnguardedFence(MemoryRegionStore):
    """``fence`` sets the epoch whatever is there."""

    async def fence(self, fence: Fence) -> Head:
        return await self._update("fence", fence, lambda head: False, lambda head: head_rules.after_fence(head, fence))


class OverwritingPut(MemoryRegionStore):
    """``put_segment`` without ``If-None-Match``."""

    async def put_segment(self, fence: Fence, ref: SegmentRef, data: bytes) -> None:
        server: Any = self._server
        server.objects.pop(ref, None)
        server._order.get(ref.stream, []).count((ref.seq, ref.epoch))
        await super().put_segment(fence, ref, data)


class UpsertTraffic(MemoryTraffic):
    """Writes what it wants, whatever the zone holds."""

    async def change(self, fence: Fence, expected: TrafficState, weights: Mapping[str, int]) -> str:
        batch = [
            Change("UPSERT", {**record, "Weight": weights[record["SetIdentifier"]]})
            for record in self._zone.records(self.name)
            if record["Type"] == "A"
        ]
        text: dict[str, Any] = {
            "Name": f"_dr-epoch.{self.name}",
            "Type": "TXT",
            "TTL": 5,
            "ResourceRecords": [{"Value": f'"{fence.epoch}"'}],
        }
        return self._zone.apply([*batch, Change("UPSERT", text)])


class CarelessWriter(StreamWriter):
    """Asks for its right before it takes work, and not again between the commit and the acknowledgement."""

    def _check_open(self, size: int) -> None:
        self._may_act, truth = self._truth(), self._may_act
        try:
            super()._check_open(size)
        finally:
            self._may_act = truth

    def _truth(self) -> Callable[[], bool]:
        if not hasattr(self, "_asked"):
            self._asked, self._may_act = self._may_act, lambda: True
        return self._asked


def longest_wins(patch: Patch, world: World) -> None:
    """The longest history is the history, whatever was recorded."""
    choose, valid_length = replication.choose, replication.valid_length
    truth: list[tuple[EpochStart, ...]] = []

    def choose_longest(
        heads: Mapping[str, Head], forks: tuple[EpochStart, ...], *, home: str, epoch: int
    ) -> replication.Choice:
        truth[:] = [max(heads.values(), key=lambda head: head.seq).epochs]
        return choose(heads, truth[0], home=home, epoch=epoch)

    patch.setattr(replication, "choose", choose_longest)
    patch.setattr(replication, "valid_length", lambda head, forks: valid_length(head, truth[0] if truth else forks))


async def keep_alive_alone(self: Tenure) -> Verdict:
    """A heartbeat without its two guarded reads."""
    sent_at = self._clock.monotonic()
    ttl_seconds = (await self._coordinator.keep_alive(self._lease.id)).ttl_seconds
    deadline = lease.first_deadline(sent_at, ttl_seconds, self._margin)
    verdict = Verdict(Beat.EXTENDS, "kept alive", deadline) if ttl_seconds else Verdict(Beat.LOST, "the lease is gone")
    self.right = self.right.after(verdict)
    return verdict


def gate_without(*guards: str) -> Callable[[Patch, World], None]:
    def mutate(patch: Patch, world: World) -> None:
        def blind(
            record: PlanRecord, approvals: Sequence[approval.Approval], now: float, *, minimum_left_seconds: float = 0.0
        ) -> approval.Gate:
            return approval._judge(record, approvals, now, minimum_left_seconds, guards)

        patch.setattr("controller.runtime.plans.gate", blind)

    return mutate


def store(kind: type[MemoryRegionStore]) -> Callable[[Patch, World], None]:
    def mutate(patch: Patch, world: World) -> None:
        world.store_class = kind

    return mutate


def patched(*changes: tuple[str | object, str, object]) -> Callable[[Patch, World], None]:
    def mutate(patch: Patch, world: World) -> None:
        for owner, name, value in changes:
            if name:
                patch.setattr(importlib.import_module(owner) if isinstance(owner, str) else owner, name, value)
            else:
                patch.setattr(str(owner), value)

    return mutate


def upsert(patch: Patch, world: World) -> None:
    world.traffic_class = UpsertTraffic


async def not_waiting(self: Opening, last: object) -> None:
    """Takes over without waiting for what the predecessor may have lent."""


NO_WAIT = (Opening, "_outwait", not_waiting)
"""Backs every guard of the lease, so it is removed together with each of them; alone: ``test_early_revocation.py``."""


def pins_dropped(patch: Patch, world: World) -> None:
    """Of what arrives late nothing is compared but the approvals."""
    world.late_conditions = lambda compare: "/approvals/" in compare.key


def without_guard_key(patch: Patch, world: World) -> None:
    original = Takeover._move_authority

    async def unguarded(self: Takeover, seen: Any, guard: Compare, began: float) -> str:
        return await original(self, seen, Compare.absent("/dr/sim/guards/nobody"), began)

    patch.setattr(Takeover, "_move_authority", unguarded)


def refusals_forgotten(patch: Patch, world: World) -> None:
    gate_without("refusal")(patch, world)
    patch.setattr("controller.runtime.plans.BEFORE_AUTHORIZE", frozenset())
    patch.setattr("controller.runtime.plans.PlanBook._admissible", lambda *_: None)


async def unaudited(self: Audit, compare: Sequence[Compare], then: Sequence[Operation], **_: object) -> TxnResult:
    return await self._coordinator.txn(compare, then)


def evidence_ignored(patch: Patch, world: World) -> None:
    """Neither when the plan starts, nor before by the sweep of plans whose authority is over."""
    patch.setattr("controller.runtime.takeover.drift", lambda *_: None)
    patch.setattr("controller.runtime.planning.is_overtaken", lambda *_: False)


def opens_alone(patch: Patch, world: World) -> None:
    """A stream opens as soon as its own stores are fenced."""

    async def at_once(self: Opening, plan_id: str) -> Any:
        authority = await self._authority()
        return await self._together.mine(plan_id), await self._plan(authority.value)

    async def own_loss(self: Together, plan: str) -> Any:
        mine = await self.mine(plan)
        assert mine is not None
        return mine.value.loss

    patch.setattr(Opening, "_all_fenced", at_once)
    patch.setattr(Together, "loss", own_loss)


async def no_plan(self: Duty) -> bool:
    return False


async def handed_on(self: Controller, frames: Any) -> Any:
    return await self._router.ingest(frames)


@dataclass(frozen=True)
class Case:
    """``streams``: how many the group has."""

    name: str
    story: Story
    mutate: Callable[[Patch, World], None]
    checker: str
    streams: int = 1


CASES = (
    Case("commit-without-epoch-condition", a_commit_arrives_after_the_fence, store(UnguardedCommit), "stores-fenced"),
    Case("fence-without-condition", a_holder_whose_clock_stopped_comes_back, store(UnguardedFence), "stores-fenced"),
    Case("put-without-if-none-match", two_processes_with_one_epoch, store(OverwritingPut), "objects-immutable"),
    Case(
        "no-check-between-commit-and-acknowledgement",
        the_right_ends_while_commits_are_under_way,
        patched(
            ("controller.runtime.active.StreamWriter", "", CarelessWriter),
            (Tenure, "remaining_seconds", lambda self: 1.0),  # what ingest looks at last
        ),
        "acks-within-right",
    ),
    Case(
        "no-fence-quorum",
        a_failover_that_reaches_one_store,
        patched((replication, "quorum_lacks", lambda *_: None)),
        "nothing-lost",
    ),
    Case(
        "forks-ignored",
        the_longest_history_is_a_dead_one,
        longest_wins,
        "nothing-lost",
    ),
    Case("traffic-by-upsert", a_dns_change_arrives_a_promotion_too_late, upsert, "dns-safe"),
    Case(
        "keep-alive-as-heartbeat",
        a_leader_that_hangs_goes_on_answering_keep_alives,
        patched((Tenure, "heartbeat", keep_alive_alone), NO_WAIT),
        "one-active",
    ),
    Case("approval-of-another-digest", the_loss_grows_after_the_approval, gate_without("digest"), "people-approved"),
    Case("requester-counts", the_requester_approves, gate_without("requester"), "people-approved"),
    Case("one-key-counts-twice", one_person_signs_under_two_names, gate_without("one-key"), "people-approved"),
    Case("refusal-does-not-end-the-plan", an_approver_refuses, refusals_forgotten, "people-approved"),
    Case(
        "approvals-not-consumed",
        an_authorization_arrives_a_promotion_too_late,
        pins_dropped,
        "people-approved",
    ),
    Case("no-guard-key", the_executor_is_paused_before_it_authorizes, without_guard_key, "people-approved"),
    Case("evidence-ignored", the_old_region_serves_again_before_the_plan_runs, evidence_ignored, "people-approved"),
    Case("decisions-not-audited", a_switchover, patched((Audit, "commit", unaudited)), "audit-whole"),
    Case(
        "one-copy-is-enough",
        a_region_is_lost_behind_cut_links,
        patched((replication, "acknowledged", lambda copies, committed, sole: bool(committed))),
        "nothing-lost",
    ),
    Case(
        "loss-not-told",
        a_region_is_lost_behind_cut_links,
        patched((lag, "estimate", lambda basis: NO_LOSS)),
        "promised-loss",
    ),
    Case(
        "forgetful-etcd-believed",
        etcd_comes_back_from_before_the_promotion,
        patched(
            ("controller.runtime.opening.etcd_forgot", "", lambda *_: None),
            ("controller.runtime.duty.etcd_forgot", "", lambda *_: None),
        ),
        "nothing-lost",
    ),
    Case(
        "hold-bypassed",
        a_stand_in_dies_with_what_it_alone_acknowledged,
        patched((replication, "unfenced_sole_ackers", lambda *_: ())),
        "promised-loss",
    ),
    Case("stream-opens-alone", one_stream_is_fenced_late, opens_alone, "together", 2),
    Case(
        "shared-out-during-a-plan",
        a_neighbour_is_new_while_a_plan_waits,
        patched((Duty, "_plan_under_way", no_plan)),
        "left-alone",
        2,
    ),
    Case("handed-on-twice", an_instance_knows_an_old_holder, patched((Controller, "peer_ingest", handed_on)), "one-hop", 2),
)


def judge(keys_dir: Path, case: Case, patch: Patch | None) -> tuple[dict[str, str], BaseException | None]:
    """Plays a case's story, mutated if there is a ``patch``. What the checkers say, and how the story ended."""
    found: dict[str, str] = {}
    ended: list[BaseException] = []

    async def play() -> None:
        world = World(keys_dir, checking=False, stream={"streams": case.streams})
        if patch is not None:
            case.mutate(patch, world)
        try:
            await case.story(world)
        except Violation as violation:
            ended.append(violation)
            found[violation.checker] = str(violation)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  (a mutant may end in any way)
            ended.append(error)
        found.update(violations(world))

    run_virtual(play(), limit_seconds=3000)
    return found, ended[0] if ended else None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_missing_guard_is_missed(case: Case, keys_dir: Path, monkeypatch: Patch) -> None:
    found, ended = judge(keys_dir, case, None)
    assert ended is None, f"the correct build does not play this story: {ended!r}"
    assert found == {}, "the correct build breaks a promise"
    found, ended = judge(keys_dir, case, monkeypatch)
    assert case.checker in found, f"{case.name} was not caught: {found or ended!r}"


def test_the_table_in_the_readme_lists_every_guard() -> None:
    text = (Path(__file__).parent / "README.md").read_text()
    for case in CASES:
        assert f"`{case.name}`" in text, case.name
        assert f"`{case.checker}`" in text, case.checker
