"""etcd is lost, or comes back from an old snapshot: the stores know better, and nothing runs until a person confirms."""

from __future__ import annotations

from pathlib import Path

import pytest

from controller.errors import Refused
from controller.lab.virtual_time import run_virtual
from controller.runtime.audit import Audit
from controller.runtime.recovery import examine, recover
from controller.runtime.wiring import outside_of
from tests.simulation.world import HOME, REGIONS, World, make_keys, settings_for


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
