"""Parts of the outside fail while the rest goes on: what must hold, what must wait, what must come back by itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from controller.domain.model import Forks, Role, SegmentRef
from controller.domain.promotion import State
from controller.errors import Corrupt, OutcomeUnknown, Refused, Unavailable
from controller.lab.virtual_time import run_virtual
from controller.ports import Put
from controller.runtime.documents import decode
from controller.runtime.leaving import Leaving
from controller.runtime.service import ApprovalRequest
from tests.simulation.checkers import check_all, live_history, lost_acks, settle
from tests.simulation.roads import Call
from tests.simulation.world import ETCD, HOME, PEOPLE, STREAM, TARGET, THIRD, ZONE, Instance, World


def run(keys_dir: Path, story: Callable[[World, Instance], Awaitable[None]], **changes: object) -> None:
    """A group that serves, and then ``story``."""

    async def whole() -> None:
        world = World(keys_dir, **changes)  # type: ignore[arg-type]
        await story(world, await world.served(agents=4, seconds=2.0))

    run_virtual(whole(), limit_seconds=4000)


async def forks(world: World) -> Forks:
    item = await world.coordinator.get(world.keys.forks(STREAM))
    assert item is not None
    return decode(Forks, item.value)


async def served_again(world: World, seconds: float = 15.0) -> None:
    """Agents of both kinds are acknowledged again."""
    count = len(world.acks)

    def both() -> bool:
        return {ack.copies for ack in world.acks[count:]} >= {1, 2}

    await world.until(both, seconds, "records being acknowledged")


# --------------------------------------------------------------------------------------------- the home store is gone


def test_a_store_stands_in_for_the_home_store_only_after_that_is_recorded_and_the_home_store_comes_back(
    keys_dir: Path,
) -> None:
    async def story(world: World, active: Instance) -> None:
        world.cut_store(HOME)
        count = len(world.acks)
        await world.wait(4.0)
        # With the home store silent two other stores hold every segment: that alone is a safe acknowledgement.
        world.cut(THIRD)
        await world.wait(0.5)
        alone = len(world.acks)

        async def stands_in() -> bool:
            return TARGET in (await forks(world)).sole_ackers

        assert set((await forks(world)).sole_ackers) == {HOME}
        await world.until(stands_in, 20, "a stand-in being recorded")
        recorded = max(entry.n for entry in world.history.transactions if entry.forks is not None)
        assert all(ack.n > recorded for ack in world.acks[alone:]), "one store acknowledged alone before that was recorded"
        await world.until(lambda: len(world.acks) > alone, 10, "the stand-in acknowledging")
        assert all(ack.copies == 1 for ack in world.acks[alone:])
        assert world.active_in(HOME)
        assert len(world.acks) > count
        world.heal(THIRD)
        await served_again(world)
        world.cut_store(HOME, cut=False)

        async def back() -> bool:
            return set((await forks(world)).sole_ackers) == {HOME}

        await world.until(back, 20, "the home store counting again")
        await served_again(world)
        await settle(world)
        assert lost_acks(world, live_history(world)) == []

    run(keys_dir, story)


def test_a_stand_in_that_dies_holds_what_it_acknowledged_alone_and_so_nobody_opens_without_it(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        world.cut_store(HOME)
        world.cut(THIRD)

        async def stands_in() -> bool:
            return TARGET in (await forks(world)).sole_ackers

        await world.until(stands_in, 20, "a stand-in being recorded")
        count = len(world.acks)
        await world.until(lambda: len(world.acks) > count + 5, 10, "the stand-in acknowledging")
        world.cut(TARGET)
        for name in ("a", "b"):
            await world.kill(HOME, name)
        world.heal(THIRD)
        world.cut_store(HOME, cut=False)
        world.start(HOME, "a")
        await world.until(lambda: world.role(HOME, "a") is Role.HOLDING, 30, "the holder holding")
        await world.wait(10.0)
        assert world.actives() == []
        assert any("holds" in page.title for page in world.pager.pages)
        world.heal(TARGET)
        await world.until(lambda: world.active_in(HOME), 30, "the holder opening once the stand-in is back")
        await settle(world)
        assert lost_acks(world, live_history(world)) == []

    run(keys_dir, story)


def test_a_holder_that_restarts_without_its_store_holds_and_pages_and_a_failover_takes_over(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        world.cut_store(HOME)
        for name in ("a", "b"):
            await world.kill(HOME, name)
        count = len(world.acks)
        await world.wait(6.0)
        world.start(HOME, "a")
        world.start(HOME, "b")

        def holding() -> bool:
            return Role.HOLDING in (world.role(HOME, "a"), world.role(HOME, "b"))

        await world.until(holding, 30, "a holder that holds")
        await world.wait(10.0)
        assert world.actives() == []
        assert len(world.acks) == count
        assert any(page.severity == "critical" and "holds" in page.title for page in world.pager.pages)
        plan = await world.order("failover", TARGET)
        await world.reached(plan, State.DONE, 90)
        assert world.active_in(TARGET)
        record = await world.plan(plan)
        assert record.final_loss is not None
        assert not record.final_loss.exact
        await served_again(world)
        world.cut_store(HOME, cut=False)
        await settle(world)

    run(keys_dir, story)


# --------------------------------------------------------------------------------------- the loss at catch-up is worse


async def lost_between(world: World) -> str:
    """The home store goes silent after the authority moved, with records that nobody else has. Returns the plan's id."""
    world.isolate_stores_of(HOME)
    await world.wait(14.0)
    for name in ("a", "b"):
        await world.kill(HOME, name)
    await world.wait(7.0)
    document = await world.propose("failover", TARGET)
    assert document.record.plan.evidence.loss.exact

    async def after(call: Call) -> None:
        if call.op == "txn" and any("journal" in key and "authorize" in key for key in call.keys):
            item = await world.coordinator.get(world.keys.authority)
            assert item is not None
            if b'"region":"eu-central-1"' in item.value:
                world.cut_store(HOME)

    with world.effects(None, after):
        plan = await world.let_run(document)
        await world.reached(plan, State.HOLDING, 60)
    return plan


def test_a_promotion_holds_while_the_loss_is_worse_than_approved_and_goes_on_when_the_store_is_back(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        plan = await lost_between(world)
        await world.wait(8.0)
        assert await world.plan_state(plan) is State.HOLDING
        assert world.actives() == []
        assert any(plan in page.title for page in world.pager.pages)
        world.cut_store(HOME, cut=False)
        await world.reached(plan, State.DONE, 60)
        assert world.active_in(TARGET)
        await settle(world)
        assert lost_acks(world, live_history(world)) == []

    run(keys_dir, story)


def test_a_promotion_that_holds_goes_on_when_people_approve_the_greater_loss_and_old_signatures_do_not_count(
    keys_dir: Path,
) -> None:
    async def story(world: World, active: Instance) -> None:
        plan = await lost_between(world)
        controller = world.standby(TARGET)
        document = await controller.plan(plan)
        assert document.missing_approvals == 2
        assert not document.record.plan.evidence.loss.exact
        old = (await world.plan(plan)).digest
        assert document.record.digest != old
        stale = world.signed(replace(document.record, digest=old), PEOPLE[2])
        with pytest.raises(Refused):
            await controller.approve(plan, stale)
        forged = ApprovalRequest(stale.principal, stale.decision, stale.expires_at, stale.signature, document.record.digest)
        with pytest.raises(Refused):
            await controller.approve(plan, forged)
        await world.approve(controller, document, PEOPLE[0])
        await world.wait(5.0)
        assert await world.plan_state(plan) is State.HOLDING
        await world.approve(controller, document, PEOPLE[1])
        await world.reached(plan, State.DONE, 60)
        record = await world.plan(plan)
        assert record.digest == document.record.digest
        assert lost_acks(world, live_history(world))
        await served_again(world)
        world.cut_store(HOME, cut=False)
        await settle(world)

    run(keys_dir, story)


def test_a_plan_that_promised_that_nothing_is_lost_does_not_lose_anything(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        world.isolate_stores_of(HOME)
        await world.wait(3.0)
        for name in ("a", "b"):
            await world.kill(HOME, name)
        await world.wait(7.0)
        document = await world.propose("failover", TARGET)
        assert document.record.plan.evidence.loss.exact, "the home store answers: nothing would be lost"
        world.cut_store(HOME)
        plan = await world.let_run(document)
        await world.wait(20.0)
        assert (await world.plan(plan)).state in (State.VOID, State.HOLDING)
        check_all(world)

    run(keys_dir, story)


def test_both_controllers_of_the_target_die_after_authorize_and_go_on_when_they_are_back(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        await world.lose_region(HOME)
        await world.wait(7.0)
        plan = await world.order("failover", TARGET)

        async def moved() -> bool:
            return (await world.authority()).region == TARGET

        await world.until(moved, 30, "the authority moving")
        for name in ("a", "b"):
            await world.kill(TARGET, name)
        await world.wait(60.0)
        assert world.actives() == []
        world.start(TARGET, "b")
        await world.reached(plan, State.DONE, 60)
        assert world.active_in(TARGET)
        world.bring_back(HOME)
        await settle(world)

    run(keys_dir, story)


def test_a_target_that_dies_for_good_is_left_behind_by_another_plan(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        await world.lose_region(HOME)
        await world.wait(7.0)
        plan = await world.order("failover", TARGET)

        async def moved() -> bool:
            return (await world.authority()).region == TARGET

        await world.until(moved, 30, "the authority moving")
        for name in ("a", "b"):
            await world.kill(TARGET, name)
        await world.wait(10.0)
        second = await world.order("failover", THIRD)
        await world.reached(second, State.DONE, 60)
        assert world.active_in(THIRD)
        assert (await world.plan(plan)).state is not State.DONE
        world.bring_back(HOME)
        await settle(world)
        assert world.active_in(THIRD)

    run(keys_dir, story)


# -------------------------------------------------------------------------------------------------------------- drain


def test_a_switchover_whose_drain_cannot_finish_aborts_and_the_old_holder_serves_on(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        document = await world.propose("switchover", TARGET)
        world.cut(TARGET, HOME)
        world.cut(THIRD, HOME)
        await world.wait(1.0)
        plan = await world.let_run(document)
        await world.reached(plan, State.ABORTED, 60)
        assert "did not drain" in (await world.plan(plan)).reason
        await world.until(lambda: active.controller.role is Role.ACTIVE, 20, "home serving on")
        world.heal(TARGET, HOME)
        world.heal(THIRD, HOME)
        await served_again(world)
        authority = await world.authority()
        assert (authority.region, authority.epoch, authority.barrier) == (HOME, 1, None)
        await settle(world)
        assert lost_acks(world, live_history(world)) == []

    run(keys_dir, story)


@pytest.mark.parametrize("answer_lost", [False, True])
def test_a_move_that_is_called_off_after_the_drain_records_who_acknowledges_alone_before_anybody_does(
    keys_dir: Path, monkeypatch: pytest.MonkeyPatch, answer_lost: bool
) -> None:
    """The proof of a drain says that nobody may have acknowledged alone. Left in place, a later opening without the home store
    would take single copies for safe."""
    proofs: list[str] = []
    prove = Leaving._prove_drained

    async def proving(self: Leaving, plan: str) -> bool:
        applied = await prove(self, plan)
        if applied:
            proofs.append(plan)
        return applied and not answer_lost  # lost: it was applied, and the holder does not know

    monkeypatch.setattr(Leaving, "_prove_drained", proving)

    async def story(world: World, active: Instance) -> None:
        key = world.keys.forks("s00")
        plan = await world.let_run(await world.propose("switchover", TARGET))
        await world.until(lambda: bool(proofs), 20, "the proof")
        item = await world.coordinator.get(key)
        assert item is not None
        assert decode(Forks, item.value).sole_ackers == ()
        await world.someone(TARGET).controller.abort(plan, "carol", "changed our minds")
        await world.until(lambda: active.controller.role is Role.ACTIVE, 20, "home serving on")
        item = await world.coordinator.get(key)
        assert item is not None
        assert decode(Forks, item.value).sole_ackers == (HOME,)
        await served_again(world)

    run(keys_dir, story)


def test_a_switchover_drains_past_a_store_that_is_down(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        document = await world.propose("switchover", TARGET)
        world.cut(THIRD)
        await world.wait(1.0)
        plan = await world.let_run(document)

        async def ended() -> bool:
            return (await world.plan(plan)).ended

        await world.until(ended, 60, "the plan being over")
        assert await world.plan_state(plan) in (State.DONE, State.VOID, State.ABORTED)
        await served_again(world)
        world.heal(THIRD)
        await settle(world)
        assert lost_acks(world, live_history(world)) == []

    run(keys_dir, story)


# --------------------------------------------------------------------------------------------------------------- etcd


def test_a_holder_without_etcd_loses_its_right_and_its_neighbour_takes_over(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        world.cut(ETCD, active.key)
        await world.until(lambda: not active.acts, 6.0, "the right running out")
        await world.until(lambda: world.active_in(HOME), 20, "the neighbour serving")
        assert world.actives()[0] is not active
        await served_again(world)
        world.heal(ETCD, active.key)
        await world.wait(5.0)
        assert active.controller.role is Role.STANDBY
        await settle(world)
        assert lost_acks(world, live_history(world)) == []

    run(keys_dir, story)


@pytest.mark.parametrize("how", ["no-leader", "cut", "slow"])
def test_without_etcd_nobody_acts_and_everything_comes_back_by_itself(keys_dir: Path, how: str) -> None:
    async def story(world: World, active: Instance) -> None:
        if how == "no-leader":
            world.cluster.lose_leader()
        elif how == "cut":
            world.cut(ETCD)
        else:
            world.slow["*", ETCD] = 30.0
        await world.wait(8.0)
        assert world.actives() == []
        count = len(world.acks)
        await world.wait(20.0)
        assert len(world.acks) == count
        if how == "no-leader":
            world.cluster.elect_leader()
        world.heal_all()
        await world.until(lambda: world.active_in(HOME), 30, "home serving again")
        await served_again(world)
        await settle(world)
        assert lost_acks(world, live_history(world)) == []

    run(keys_dir, story)


def test_a_full_etcd_deposes_nobody(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        world.cluster.alarms.add("NOSPACE")
        count = len(world.acks)
        await world.wait(20.0)
        assert world.actives() == [active]
        assert len(world.acks) > count
        world.cluster.alarms.clear()
        await world.wait(2.0)
        await settle(world)

    run(keys_dir, story)


def test_after_a_restore_of_etcd_from_an_older_snapshot_the_epoch_floor_stops_everybody_with_a_hint(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        snapshot = world.cluster.snapshot()
        plan = await world.order("switchover", TARGET)
        await world.reached(plan, State.DONE)
        await world.wait(2.0)
        world.cluster.restore(snapshot)
        world.history.restored = True
        await world.wait(30.0)
        assert world.actives() == []
        assert "drctl recover" in world.story() or "knows epoch" in world.story()
        status = await world.standby(HOME).status()
        assert any("epoch" in warning for warning in status.warnings)

    run(keys_dir, story)


def test_after_a_restore_a_region_that_cannot_see_the_newer_stores_does_not_act_either(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        await world.lose_region(HOME)
        await world.wait(7.0)
        snapshot = world.cluster.snapshot()
        plan = await world.order("failover", TARGET)
        await world.reached(plan, State.DONE)
        await world.wait(2.0)
        for name in ("a", "b"):
            await world.kill(TARGET, name)
        world.cluster.restore(snapshot)
        world.history.restored = True
        world.isolate_stores_of(HOME)
        world.cut_store(HOME, cut=False)
        for name in ("a", "b"):
            world.start(HOME, name)
        await world.wait(30.0)
        assert world.actives() == []
        world.isolate_stores_of(HOME, cut=False)
        await world.wait(30.0)
        assert world.actives() == []

    run(keys_dir, story)


# -------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("damage", ["flip", "truncate", "drop"])
def test_a_damaged_segment_stops_the_copy_there_and_the_active_region_goes_on(keys_dir: Path, damage: str) -> None:
    async def story(world: World, active: Instance) -> None:
        server = world.servers[THIRD]
        await world.kill(THIRD, "a")
        await world.wait(1.0)
        bad = server.head(STREAM).seq - 2
        ref = SegmentRef(STREAM, bad, 1)
        data = server.objects[ref].data
        if damage == "flip":
            server.corrupt(ref, bit=999)
        elif damage == "truncate":
            server.truncate(ref, 40)
        else:
            server.drop(ref)
        world.start(THIRD, "a")  # with an empty view: it reads everything anew
        count = len(world.acks)
        await world.wait(6.0)
        third = world.instances[f"{THIRD}/a"].controller
        assert third._positions()[STREAM].seq == bad - 1
        status = await third.status()
        assert any(ref.key in warning for warning in status.warnings), status.warnings
        assert not third.ready()[0]
        assert world.actives() == [active]
        assert len(world.acks) > count + 5
        if damage == "drop":
            server.put(ref, data)
        else:
            server.objects[ref] = replace(server.objects[ref], data=data)
        await world.until(lambda: third._positions()[STREAM].seq > bad, 10, "the copy going on after the repair")
        await settle(world)

    run(keys_dir, story)


def test_a_damaged_segment_in_the_home_store_does_not_lose_what_another_store_has(keys_dir: Path) -> None:
    """Both controllers of the home region restart cold on a home store with a broken segment: they must not serve less."""

    async def story(world: World, active: Instance) -> None:
        server = world.servers[HOME]
        ref = SegmentRef(STREAM, server.head(STREAM).seq - 3, 1)
        data = server.objects[ref].data
        server.corrupt(ref, bit=1234)
        for name in ("a", "b"):
            await world.kill(HOME, name)
        await world.wait(6.0)
        world.start(HOME, "a")
        await world.wait(15.0)
        assert world.actives() == [], "it serves although its copy cannot be read"
        server.objects[ref] = replace(server.objects[ref], data=data)
        await world.until(lambda: world.active_in(HOME), 30, "home serving after the repair")
        await settle(world)
        assert lost_acks(world, live_history(world)) == []

    run(keys_dir, story)


def test_a_half_written_object_under_the_next_key_is_never_taken_for_a_segment(keys_dir: Path) -> None:
    """A predecessor died after the object and before the head: the head decides, the object is nothing."""

    async def story(world: World, active: Instance) -> None:
        async def die_before_commit(call: Call) -> None:
            if call.op == "advance" and call.instance is active:
                raise Unavailable("cut between the object and the head", hint="a test did it")

        with world.effects(die_before_commit):
            await world.wait(1.0)
            await world.kill(active.region, active.name)
        orphan = {region: server.head(STREAM).seq + 1 for region, server in world.servers.items()}
        assert any(SegmentRef(STREAM, seq, 1) in world.servers[region].objects for region, seq in orphan.items())
        world.servers[HOME].truncate(SegmentRef(STREAM, orphan[HOME], 1), 10)
        await world.until(lambda: world.active_in(HOME), 30, "the neighbour serving")
        await served_again(world)
        await settle(world)
        assert lost_acks(world, live_history(world)) == []

    run(keys_dir, story)


@pytest.mark.parametrize("region", [HOME, TARGET])
def test_a_store_that_answers_every_other_call_with_an_error_delays_nobody_for_good(keys_dir: Path, region: str) -> None:
    async def story(world: World, active: Instance) -> None:
        calls = 0

        async def sometimes(call: Call) -> None:
            nonlocal calls
            if call.target == region:
                calls += 1
                if calls % 2:
                    raise Unavailable("503 Slow Down", hint="a test did it")

        async def lost(call: Call) -> None:
            if call.target == region and world.rng.random() < 0.3:
                raise OutcomeUnknown("500 Internal Error", hint="a test did it")

        with world.effects(sometimes, lost):
            count = len(world.acks)
            await world.wait(15.0)
            assert world.actives() == [active]
            assert len(world.acks) > count
        await settle(world)
        assert lost_acks(world, live_history(world)) == []

    run(keys_dir, story)


def test_a_zone_that_does_not_answer_delays_the_route_step_and_nothing_else(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        world.cut(ZONE)
        plan = await world.order("switchover", TARGET)
        await world.reached(plan, State.ROUTING, 60)
        await served_again(world)
        await world.wait(30.0)
        assert await world.plan_state(plan) is State.ROUTING
        world.heal(ZONE)
        await world.reached(plan, State.DONE, 30)
        await settle(world)

    run(keys_dir, story)


def test_a_frozen_holder_that_wakes_up_acknowledges_nothing_and_steps_down(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        frozen = world.freeze(active.region, active.name)
        await world.until(lambda: world.active_in(HOME) and world.actives()[0] is not active, 20, "the neighbour serving")
        count = len(world.acks)
        await world.wait(2.0)
        world.thaw(frozen)
        await world.wait(3.0)
        assert all(ack.instance != active.key for ack in world.acks[count:])
        assert active.controller.role is Role.STANDBY
        await settle(world)
        assert lost_acks(world, live_history(world)) == []

    run(keys_dir, story)


def test_a_plan_in_etcd_that_cannot_be_read_is_named_and_stops_nothing_else(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        await world.coordinator.txn([], [Put(world.keys.plan("plan-9"), b'{"garbage": 1}')])
        await world.wait(3.0)
        assert world.actives() == [active]
        with pytest.raises(Corrupt, match="plan-9"):
            await world.standby(TARGET).plan("plan-9")
        plan = await world.order("switchover", TARGET)  # the others still run
        await world.reached(plan, State.DONE)

    run(keys_dir, story)
