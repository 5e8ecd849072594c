"""etcd is lost, or comes back from an old snapshot: the stores know better, and nothing runs until a person confirms.

The last story was found by the model (tests/model): the snapshot knows every epoch and fork and misses only who stood in for
the home store, which no store can tell.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from controller.domain.failsafe import NOT_KNOWN
from controller.domain.model import Forks, Role
from controller.errors import Refused, Unavailable
from controller.lab.virtual_time import run_virtual
from controller.ports import Put
from controller.runtime.audit import Audit
from controller.runtime.documents import encode, read
from controller.runtime.recovery import examine, recover
from controller.runtime.wiring import outside_of
from tests.simulation.checkers import live_history, lost_acks, settle
from tests.simulation.world import HOME, REGIONS, STREAM, TARGET, THIRD, World, make_keys, settings_for


@pytest.fixture(scope="session")
def keys_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_keys(tmp_path_factory.mktemp("keys"))


def test_after_a_restore_from_an_old_snapshot_nobody_acts_until_somebody_confirms_the_recovery(keys_dir: Path) -> None:
    async def story() -> None:
        world = World(keys_dir)
        await world.found()
        snapshot = world.cluster.snapshot()
        world.start_all()
        await world.until(lambda: len(world.actives()) == 1, 20, "one active controller")
        world.fleet(4)
        await world.wait(5)
        first = list(world.instances.values())
        for instance in first:
            await world.kill(instance.region, instance.name)
        world.cluster.restore(snapshot)
        world.start_all()
        await world.wait(15)
        assert world.actives() == []
        assert any("drctl recover" in line or "knows epoch" in line for line in world.story().splitlines())

        controller = world.instances[f"{HOME}/a"].controller
        outside = outside_of(settings_for(HOME, "a", keys_dir), controller._ports)
        found = await examine(outside, REGIONS, None)
        assert found.floor >= 1
        assert found.authority.epoch == found.floor
        with pytest.raises(Refused, match="confirm"):
            await recover(outside, Audit(outside.coordinator, outside.keys), found, actor="ada", confirm="another")
        assert world.actives() == []
        await recover(outside, Audit(outside.coordinator, outside.keys), found, actor="ada", confirm="sim")
        await world.until(lambda: len(world.actives()) == 1, 20, "an active controller after the recovery")
        assert (await world.authority()).epoch > found.floor
        active = world.actives()[0].controller
        for _, agent, record_id, _, body in world.acks:
            assert (await active.read(agent, record_id))[1] == body
        assert (await examine(outside, REGIONS, None)).changes == ()

    run_virtual(story(), limit_seconds=300)


def test_etcd_that_lost_everything_is_founded_anew_with_the_epochs_and_forks_that_the_stores_know(keys_dir: Path) -> None:
    async def story() -> None:
        world = World(keys_dir)
        empty = world.cluster.snapshot()
        await world.found()
        world.start_all()
        await world.until(lambda: len(world.actives()) == 1, 20, "one active controller")
        world.fleet(4)
        await world.wait(5)
        for instance in list(world.instances.values()):
            await world.kill(instance.region, instance.name)
        world.cluster.restore(empty)
        probe = world.start(HOME, "a")
        outside = outside_of(settings_for(HOME, "a", keys_dir), probe.controller._ports)
        with pytest.raises(Refused, match="region"):
            await examine(outside, REGIONS, None)
        found = await examine(outside, REGIONS, HOME)
        await recover(outside, Audit(outside.coordinator, outside.keys), found, actor="ada", confirm="sim")
        await world.until(lambda: len(world.actives()) == 1, 20, "an active controller")
        for _, agent, record_id, _, body in world.acks:
            assert (await world.actives()[0].controller.read(agent, record_id))[1] == body

    run_virtual(story(), limit_seconds=300)


@pytest.mark.parametrize("known_by", ["the cluster's new id", "whoever put the disks back"])
def test_a_snapshot_that_misses_only_a_stand_in_lets_nobody_open_without_that_store(keys_dir: Path, known_by: str) -> None:
    async def story() -> None:
        world = World(keys_dir)
        await world.found()
        world.start_all()
        await world.until(lambda: len(world.actives()) == 1, 20, "one active controller")
        world.fleet(4)
        await world.wait(5)
        snapshot = world.cluster.snapshot()
        world.cut_store(HOME)
        world.cut(THIRD)
        count = len(world.acks)
        await world.until(lambda: len(world.acks) > count + 5, 40, "the stand-in acknowledging alone")
        world.cut(TARGET)
        for instance in list(world.instances.values()):
            await world.kill(instance.region, instance.name)
        new = known_by == "the cluster's new id"
        world.cluster.restore(snapshot, name="restored" if new else None)
        await world.wait(10.0)
        world.heal(THIRD)
        world.cut_store(HOME, cut=False)

        # Who restores etcd recovers the group before its controllers start; the new id sees to it that this is not forgotten.
        if new:
            world.start(HOME, "a")
            await world.wait(10.0)
            assert world.actives() == []
            assert "restored from a snapshot" in world.story()
        somewhere = world.start(THIRD, "a").controller
        outside = outside_of(settings_for(THIRD, "a", keys_dir), somewhere._ports)
        found = await examine(outside, REGIONS, restored=not new)
        assert any("may have acknowledged alone since the snapshot" in change for change in found.changes)
        await recover(outside, Audit(outside.coordinator, outside.keys), found, actor="ada", confirm="sim")
        if not new:
            world.start(HOME, "a")
        await world.until(lambda: world.role(HOME, "a") is Role.HOLDING, 40, "the holder holding")
        await world.wait(10.0)
        assert world.actives() == []
        world.heal(TARGET)
        await world.until(lambda: world.active_in(HOME), 40, "the holder opening once the stand-in is back")
        await settle(world)
        assert lost_acks(world, live_history(world)) == []

    run_virtual(story(), limit_seconds=400)


def test_of_two_stores_both_must_answer_before_the_epochs_are_known(keys_dir: Path) -> None:
    """With two stores an epoch opens by fencing one of them: the other one alone cannot know it, and it would be given out
    again."""

    async def story() -> None:
        world = World(keys_dir)
        await world.found()
        probe = world.start(HOME, "a")
        await world.until(lambda: world.active_in(HOME), 20, "one active controller")
        outside = outside_of(settings_for(HOME, "a", keys_dir), probe.controller._ports)
        world.cut(TARGET)
        with pytest.raises(Unavailable, match="known to another store alone"):
            await examine(outside, (HOME, TARGET), restored=True)
        assert (await examine(outside, REGIONS, restored=True)).floor == 1
        world.heal(TARGET)
        assert (await examine(outside, (HOME, TARGET), restored=True)).floor == 1

    run_virtual(story(), limit_seconds=100)


def test_a_restored_snapshot_that_lists_every_store_already_does_not_tell_what_was_lent_after_it(keys_dir: Path) -> None:
    """It was taken after an orderly end, with nothing lent. A later holder may have gone on past its lease."""

    async def story() -> None:
        world = World(keys_dir)
        await world.found()
        world.start(HOME, "a")
        await world.until(lambda: world.active_in(HOME), 20, "one active controller")
        somewhere = world.start(THIRD, "a").controller
        outside = outside_of(settings_for(THIRD, "a", keys_dir), somewhere._ports)
        await world.kill(HOME, "a")
        await world.wait(10.0)
        key = world.keys.forks(STREAM)
        known = await read(outside.coordinator, key, Forks)
        assert known is not None
        ended = replace(known.value, sole_ackers=REGIONS, failsafe_seconds=0.0, lent_seconds=0.0)
        await outside.coordinator.txn([], [Put(key, encode(ended))])
        found = await examine(outside, REGIONS, restored=True)
        assert (found.forks[STREAM].failsafe_seconds, found.forks[STREAM].lent_seconds) == (NOT_KNOWN, NOT_KNOWN)
        await recover(outside, Audit(outside.coordinator, outside.keys), found, actor="ada", confirm="sim")
        assert (await examine(outside, REGIONS, restored=True)).changes == ()

    run_virtual(story(), limit_seconds=100)
