"""etcd is unreachable for everybody, and the group wants to go on: with two copies, never with two active regions.

Safety rests on what the stores prove and on the wait of every successor; that other regions are asked, too, is for
availability. So the mutants leave the asking out: the proof alone must hold, and each half of it must be missed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from controller.domain import failsafe
from controller.domain.failsafe import Proof
from controller.domain.lease import Right
from controller.domain.model import Head, Role
from controller.domain.promotion import State
from controller.lab.virtual_time import run_virtual
from controller.runtime.opening import Opening
from tests.simulation.checkers import live_history, lost_acks, settle, violations
from tests.simulation.world import ETCD, HOME, STREAM, TARGET, THIRD, Instance, World

Story = Callable[[World, Instance], Awaitable[None]]


def run(keys_dir: Path, story: Story, *, failsafe: bool = True, checking: bool = True, **changes: object) -> World:
    """A group that serves, and then ``story``."""
    worlds = []

    async def whole() -> None:
        world = World(keys_dir, checking=checking, **{"etcd": {"failsafe": failsafe}, **changes})  # type: ignore[arg-type]
        worlds.append(world)
        await story(world, await world.served(agents=2, seconds=1.0))

    run_virtual(whole(), limit_seconds=4000)
    return worlds[0]


def pages(world: World) -> list[str]:
    return [page.title for page in world.pager.pages if page.runbook == "failsafe"]


# --------------------------------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize("how", ["no-leader", "cut", "slow"])
def test_while_etcd_is_unreachable_for_everybody_the_holder_goes_on_with_two_copies_and_says_so(
    keys_dir: Path, how: str
) -> None:
    async def story(world: World, active: Instance) -> None:
        if how == "no-leader":
            world.cluster.lose_leader()
        elif how == "cut":
            world.cut(ETCD)
        else:
            world.slow["*", ETCD] = 30.0
        epoch = active.controller._actives[STREAM].tenure.fence.epoch
        await world.wait(8.0)
        count = len(world.acks)
        await world.wait(20.0)
        assert world.actives() == [active]
        later = world.acks[count:]
        assert len(later) > 20
        assert all(ack.beyond_lease and ack.in_stores >= 2 for ack in later)
        assert {ack.copies for ack in later} == {1, 2}
        status = await active.controller.status()
        assert status.sentence.startswith("FAILSAFE since")
        assert 20 < world.clock.wall() - status.failsafe_since < 30
        assert any(warning.startswith("failsafe: s00") for warning in status.warnings)
        assert b'stream="s00"} 2' in active.controller.metrics().split(b"dr_failsafe_seconds{")[1]
        assert len(pages(world)) == 1
        if how == "no-leader":
            world.cluster.elect_leader()
        world.heal_all()
        await world.wait(6.0)
        if how == "no-leader":  # every lease is armed anew by the election: the same epoch goes on
            assert world.actives() == [active]
            assert active.controller._actives[STREAM].tenure.fence.epoch == epoch
        status = await active.controller.status()
        assert status.failsafe_since == 0
        assert not any("failsafe" in warning for warning in status.warnings)
        await settle(world)
        assert lost_acks(world, live_history(world)) == []

    run(keys_dir, story)


def test_a_holder_that_alone_cannot_reach_etcd_does_not_go_on_and_its_neighbour_waits_one_ttl_longer(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        world.cut(ETCD, active.key)
        await world.until(lambda: not active.acts, 8.0, "the right running out")
        assert not pages(world)
        assert "failsafe would not go on" in world.story()
        await world.until(lambda: world.active_in(HOME), 30, "the neighbour serving")
        assert world.actives()[0] is not active
        await settle(world)
        assert lost_acks(world, live_history(world)) == []

    run(keys_dir, story)


@pytest.mark.parametrize("region", [TARGET, THIRD])
def test_a_region_that_does_not_answer_ends_it(keys_dir: Path, region: str) -> None:
    async def story(world: World, active: Instance) -> None:
        world.cut(ETCD)
        await world.wait(10.0)
        assert world.actives() == [active]
        await world.kill(region, "a")
        await world.wait(6.0)
        assert world.actives() == [active], "the region's other controller answers"
        await world.kill(region, "b")
        await world.wait(6.0)
        assert world.actives() == []
        assert f"no controller of {region} answers" in world.story()
        await settle(world)
        assert lost_acks(world, live_history(world)) == []

    run(keys_dir, story)


def test_with_a_store_that_is_dead_it_goes_on_and_with_two_it_ends(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        world.cut_store(THIRD)
        world.cut(ETCD)
        await world.wait(12.0)
        assert world.actives() == [active]
        count = len(world.acks)
        await world.wait(3.0)
        assert len(world.acks) > count
        world.cut_store(TARGET)
        await world.wait(6.0)
        assert world.actives() == []
        await settle(world)
        assert lost_acks(world, live_history(world)) == []

    run(keys_dir, story)


def test_etcd_that_comes_back_for_another_region_first_ends_it_and_a_failover_waits_for_what_was_lent(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        world.cut(ETCD)
        await world.wait(12.0)
        assert world.actives() == [active]
        world.cuts.discard(("*", ETCD))
        world.cut(ETCD, HOME)
        await world.until(lambda: not active.acts, 8.0, "the right running out")
        plan = await world.order("failover", TARGET)
        await world.reached(plan, State.DONE, 90)
        assert world.active_in(TARGET)
        await settle(world)
        assert lost_acks(world, live_history(world)) == []

    run(keys_dir, story)


def test_an_orderly_restart_and_a_planned_move_wait_for_nothing(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        assert active.main is not None
        active.main.cancel()
        stopping = world.spawn(active.controller.stop())
        began = world.clock.monotonic()
        await world.until(lambda: world.active_in(HOME) and world.actives()[0] is not active, 20, "the neighbour serving")
        await stopping
        world.die(active)
        plan = await world.order("switchover", TARGET)
        await world.reached(plan, State.DONE)
        assert "has certainly run out" not in world.story()
        assert world.clock.monotonic() - began < 40
        await settle(world)

    run(keys_dir, story)


def test_without_the_setting_the_right_runs_out_as_ever(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        world.cut(ETCD)
        await world.wait(8.0)
        assert world.actives() == []
        await settle(world)
        assert "failsafe" not in world.story()

    run(keys_dir, story, failsafe=False)


def test_a_holder_that_was_frozen_over_its_whole_right_does_not_go_on(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        world.cut(ETCD)
        await world.wait(10.0)
        frozen = world.freeze(active.region, active.name)
        await world.wait(10.0)
        world.thaw(frozen)
        count = len(world.acks)
        await world.wait(4.0)
        assert not active.acts
        assert len(world.acks) == count
        assert active.controller.role is Role.STANDBY
        await settle(world)
        assert lost_acks(world, live_history(world)) == []

    run(keys_dir, story)


# ------------------------------------------------------------------------------------------------------------- mutants


async def another_region_takes_over(world: World, active: Instance) -> None:
    """The home region loses etcd and one other store, and what it has is slow to answer; the others promote."""
    for region in (HOME, TARGET):
        world.slow[active.key, region] = 0.4
    world.cut(ETCD, HOME)
    world.cut(THIRD, HOME)
    await world.wait(9.0)
    plan = await world.order("failover", TARGET)
    await world.until(lambda: world.active_in(TARGET) or bool(world.beliefs), 90, f"plan {plan} moving the fleet")
    await world.wait(6.0)


async def the_neighbour_takes_over(world: World, active: Instance) -> None:
    """Only the holder is cut off from etcd. Its stores are slow to answer: questions are long under way."""
    for region in (HOME, TARGET, THIRD):
        world.slow[active.key, region] = 0.4
    world.cut(ETCD, active.key)
    await world.until(
        lambda: any(found is not active for found in world.actives()) or bool(world.beliefs), 60, "the neighbour serving"
    )
    await world.wait(6.0)


async def only_the_home_store_answers(world: World, active: Instance) -> None:
    """The holder has its own store and nothing else, while the others promote without that store."""
    world.cut(ETCD, HOME)
    world.isolate_stores_of(HOME)
    for region in (TARGET, THIRD):
        world.cut(HOME, region)
    await world.wait(9.0)
    plan = await world.order("failover", TARGET)
    await world.until(lambda: world.active_in(TARGET) or bool(world.beliefs), 90, f"plan {plan} moving the fleet")
    await world.wait(3.0)


async def everybody_is_cut_off_and_stores_are_far(world: World, active: Instance) -> None:
    """etcd is gone for all; the two other stores take seconds, so that one store has what the others do not."""
    world.cut(ETCD)
    for region in (TARGET, THIRD):
        world.slow[active.key, region] = 0.4
    await world.wait(20.0)


def _nobody_objects(*_args: object, **_more: object) -> None:
    return None


def _one_store_is_enough(heads: dict[str, Head | None], epoch: int, writer: str) -> Proof:
    ours = [head for head in heads.values() if head is not None and (head.epoch, head.writer) == (epoch, writer)]
    return Proof(None if ours else "none")


async def _no_wait(self: Opening, seconds: float) -> None:
    del self, seconds


Patches = tuple[tuple[object, str, object], ...]
ASKED_NOBODY: Patches = ((failsafe, "objection", _nobody_objects),)
STORIES = (
    another_region_takes_over,
    the_neighbour_takes_over,
    only_the_home_store_answers,
    everybody_is_cut_off_and_stores_are_far,
)


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_the_stores_alone_keep_two_regions_from_being_active_whoever_is_asked_or_not(
    keys_dir: Path, monkeypatch: pytest.MonkeyPatch, story: Story
) -> None:
    for target, name, mutant in ASKED_NOBODY:
        monkeypatch.setattr(target, name, mutant)
    world = run(keys_dir, story)
    assert violations(world) == {}
    assert any(ack.beyond_lease for ack in world.acks) or story is only_the_home_store_answers


@pytest.mark.parametrize(
    ("story", "mutant", "caught_by"),
    [
        (another_region_takes_over, (Opening, "_outwait", _no_wait), "one-active"),
        (the_neighbour_takes_over, (Opening, "_outwait", _no_wait), "one-active"),
        (only_the_home_store_answers, (failsafe, "proof", _one_store_is_enough), "one-active"),
        (everybody_is_cut_off_and_stores_are_far, (Right, "leased", Right.allows), "two-past-the-lease"),
    ],
    ids=["no-wait", "no-wait-neighbour", "one-store-proves", "one-copy-past-the-lease"],
)
def test_each_half_of_the_proof_is_missed_when_it_is_taken_away(
    keys_dir: Path, monkeypatch: pytest.MonkeyPatch, story: Story, mutant: tuple[object, str, object], caught_by: str
) -> None:
    for target, name, replacement in (*ASKED_NOBODY, mutant):
        monkeypatch.setattr(target, name, replacement)
    world = run(keys_dir, story, checking=False)
    assert caught_by in violations(world), world.story()


# ------------------------------------------------------------------------------------------------------- several streams


def test_with_several_streams_nobody_of_the_target_serves_before_all_that_was_lent_for_any_of_them_is_over(
    keys_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both of the home region's instances hold a stream past their leases and reach two stores; the target takes over."""
    for target, name, mutant in ASKED_NOBODY:
        monkeypatch.setattr(target, name, mutant)

    async def story(world: World, active: Instance) -> None:
        world.cut(ETCD, HOME)
        world.cut(THIRD, HOME)
        await world.wait(9.0)
        assert {found.region for found in world.actives()} == {HOME}
        plan = await world.order("failover", TARGET)
        await world.reached(plan, State.DONE, 120)
        assert world.active_in(TARGET)
        world.heal_all()
        await settle(world)

    world = run(keys_dir, story, stream={"streams": 2})
    assert violations(world) == {}
    assert {ack.stream for ack in world.acks if ack.beyond_lease} == {"s00", "s01"}
