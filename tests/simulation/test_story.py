"""The main job on memory adapters in virtual time: the real controllers, one seed, no sleeping."""

from __future__ import annotations

from pathlib import Path

from controller.domain.model import Unknown
from controller.domain.promotion import State
from controller.lab.virtual_time import run_virtual
from tests.simulation.checkers import check_all, live_history, lost_acks, settle
from tests.simulation.world import HOME, TARGET, World


def test_a_group_comes_up_and_every_region_is_protected(keys_dir: Path) -> None:
    async def story() -> None:
        world = World(keys_dir)
        await world.served(agents=5, seconds=0.0)

        async def protected() -> bool:
            status = await world.actives()[0].controller.status()
            return all(region.protected is True for region in status.regions)

        await world.until(protected, 30, "protection")
        status = await world.actives()[0].controller.status()
        assert not isinstance(status.exposure_seconds, Unknown)
        assert status.exposure_seconds < 5
        check_all(world)

    run_virtual(story(), limit_seconds=300)


def test_a_region_dies_people_approve_and_the_fleet_moves(keys_dir: Path) -> None:
    async def story() -> None:
        world = World(keys_dir)
        await world.served(agents=6, seconds=10.0)
        world.isolate_stores_of(HOME)
        await world.wait(1.5)
        await world.lose_region(HOME)
        before = list(world.acks)
        await world.until(lambda: bool(world.pager.pages), 30, "a page")
        plan = await world.order("failover", TARGET)
        await world.reached(plan, State.DONE)
        assert (await world.authority()).region == TARGET
        assert world.active_in(TARGET)
        record = await world.plan(plan)
        assert record.final_loss is not None
        assert not record.final_loss.exact

        lost = lost_acks(world, live_history(world))
        assert 0 < len(lost) < len(before), "the links were cut before the region died, so something must be lost"
        active = world.actives()[0].controller
        for ack in before:
            if ack not in lost:
                assert (await active.read(ack.agent, ack.id))[1] == ack.body
        promised = record.plan.evidence.loss
        assert promised.records >= len(lost) or promised.records_unknown
        await world.wait(5)
        assert len(world.acks) > len(before)
        check_all(world)

        world.bring_back(HOME)

        async def home_is_back() -> bool:
            status = await world.actives()[0].controller.status()
            (home,) = (region for region in status.regions if region.region == HOME)
            return home.protected is True and bool(home.salvage)

        await world.until(home_is_back, 60, "the old region as a standby with its salvage")
        await settle(world)

    run_virtual(story(), limit_seconds=600)


def test_a_switchover_loses_nothing_and_a_failback_brings_the_fleet_home(keys_dir: Path) -> None:
    async def story() -> None:
        world = World(keys_dir)
        await world.served(agents=6, seconds=5.0)
        for kind, target in (("switchover", TARGET), ("failback", HOME)):
            plan = await world.order(kind, target)
            await world.reached(plan, State.DONE)
            assert world.active_in(target)
            await world.wait(3)
        controller = world.actives()[0].controller
        for ack in world.acks:
            assert (await controller.read(ack.agent, ack.id))[1] == ack.body
        assert lost_acks(world, live_history(world)) == []
        await settle(world)

    run_virtual(story(), limit_seconds=600)


def test_the_same_seed_gives_the_same_run(keys_dir: Path) -> None:
    async def story() -> list[tuple[float, str]]:
        world = World(keys_dir, seed=7, latency=(0.001, 0.05))
        await world.served(agents=3, seconds=5.0)
        return [(ack.at, ack.id) for ack in world.acks]

    first = run_virtual(story(), limit_seconds=300)
    assert first
    assert run_virtual(story(), limit_seconds=300) == first
