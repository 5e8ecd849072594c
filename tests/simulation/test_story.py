"""The main job on memory adapters in virtual time: the real controllers, one seed, no sleeping."""

from __future__ import annotations

from pathlib import Path

import pytest

from controller.domain.model import Unknown
from controller.domain.promotion import State
from controller.lab.virtual_time import run_virtual
from tests.simulation.world import HOME, REGIONS, World, make_keys

TARGET = REGIONS[1]


@pytest.fixture(scope="session")
def keys_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_keys(tmp_path_factory.mktemp("keys"))


def test_a_group_comes_up_and_every_region_is_protected(keys_dir: Path) -> None:
    async def story() -> None:
        world = World(keys_dir)
        await world.found()
        world.start_all()
        await world.until(lambda: len(world.actives()) == 1, 20, "one active controller")
        world.fleet(5)

        async def protected() -> bool:
            status = await world.actives()[0].controller.status()
            return all(region.protected is True for region in status.regions)

        await world.until(protected, 30, "protection")
        status = await world.actives()[0].controller.status()
        assert not isinstance(status.exposure_seconds, Unknown)
        assert status.exposure_seconds < 5
        assert world.beliefs == []

    run_virtual(story(), limit_seconds=300)


def test_a_region_dies_people_approve_and_the_fleet_moves(keys_dir: Path) -> None:
    async def story() -> None:
        world = World(keys_dir)
        await world.found()
        world.start_all()
        await world.until(lambda: len(world.actives()) == 1, 20, "one active controller")
        world.fleet(6)
        await world.wait(10)
        world.isolate_stores_of(HOME)
        await world.wait(1.5)
        await world.lose_region(HOME)
        lost_at = len(world.acks)
        await world.until(lambda: bool(world.pager.pages), 30, "a page")
        plan = await world.order("failover", TARGET)

        async def done() -> bool:
            return await world.plan_state(plan) is State.DONE

        await world.until(done, 60, "the promotion")
        authority = await world.authority()
        assert authority.region == TARGET
        active = world.actives()
        assert [found.region for found in active] == [TARGET]
        document = await active[0].controller.plan(plan)
        loss = document.record.final_loss
        assert loss is not None
        assert not loss.exact
        kept, lost = 0, []
        for at, agent, record_id, copies, body in world.acks[:lost_at]:
            try:
                _, found = await active[0].controller.read(agent, record_id)
            except Exception:
                assert copies == 1, f"{agent} {record_id} was acknowledged with {copies} copies and is lost"
                lost.append(at)
                continue
            assert found == body
            kept += 1
        assert kept > 0
        assert lost, "the links were cut before the region died, so something must be lost"
        promised = document.record.plan.evidence.loss
        assert promised.records >= len(lost) or promised.records_unknown
        await world.wait(5)
        assert len(world.acks) > lost_at

        world.bring_back(HOME)

        async def home_is_back() -> bool:
            status = await world.actives()[0].controller.status()
            (home,) = (region for region in status.regions if region.region == HOME)
            return home.protected is True and bool(home.salvage)

        await world.until(home_is_back, 60, "the old region as a standby with its salvage")
        assert world.beliefs == []

    run_virtual(story(), limit_seconds=600)


def test_a_switchover_loses_nothing_and_a_failback_brings_the_fleet_home(keys_dir: Path) -> None:
    async def story() -> None:
        world = World(keys_dir)
        await world.found()
        world.start_all()
        await world.until(lambda: len(world.actives()) == 1, 20, "one active controller")
        world.fleet(6)
        await world.wait(5)
        for kind, target in (("switchover", TARGET), ("failback", HOME)):
            plan = await world.order(kind, target)

            async def done(plan: str = plan) -> bool:
                return await world.plan_state(plan) is State.DONE

            await world.until(done, 60, f"the {kind}")
            assert [found.region for found in world.actives()] == [target]
            await world.wait(3)
        controller = world.actives()[0].controller
        for _, agent, record_id, _, body in world.acks:
            assert (await controller.read(agent, record_id))[1] == body
        assert world.beliefs == []

    run_virtual(story(), limit_seconds=600)
