"""The lease is kept beside everything else that a controller does: a slow look at etcd costs no healthy holder its right."""

from __future__ import annotations

from pathlib import Path

from controller.lab.virtual_time import run_virtual
from tests.simulation.checkers import check_all
from tests.simulation.world import ETCD, HOME, TARGET, World


def test_a_holder_keeps_its_lease_of_5_s_with_300_ms_to_everything_and_back(keys_dir: Path) -> None:
    async def story() -> None:
        world = World(keys_dir, latency=(0.3, 0.3))
        await world.found()
        world.start_all()
        await world.until(world.active_somewhere, 60, "one active region")
        world.fleet(2)
        await world.wait(5.0)
        active, epoch, count = world.actives()[0], (await world.authority()).epoch, len(world.acks)
        await world.wait(30.0)
        assert world.actives() == [active]
        assert (await world.authority()).epoch == epoch
        assert len(world.acks) > count + 10
        check_all(world)

    run_virtual(story(), limit_seconds=1000)


def test_a_look_at_etcd_that_hangs_delays_no_heartbeat(keys_dir: Path) -> None:
    """Lists are slow (a large audit, a compaction), single keys are not: the holder goes on."""

    async def story() -> None:
        world = World(keys_dir)
        active = await world.served(agents=2)
        road = active.roads[ETCD]
        before = road.before

        async def slow_lists(op: str) -> None:
            await before(op)
            if op == "list":
                await world.clock.sleep(4.4)

        road.before = slow_lists  # type: ignore[method-assign]
        count = len(world.acks)
        await world.wait(20.0)
        assert world.actives() == [active]
        assert len(world.acks) > count + 20
        check_all(world)

    run_virtual(story(), limit_seconds=1000)


def test_heartbeats_that_hang_end_by_themselves_and_the_next_ones_count(keys_dir: Path) -> None:
    """One keep-alive whose answer never comes must not be waited for until the right is over."""

    async def story() -> None:
        world = World(keys_dir)
        active = await world.served(agents=2)
        world.slow[HOME, ETCD] = 30.0
        await world.wait(1.6)
        world.slow.clear()
        await world.wait(20.0)
        assert world.actives() == [active]
        plan = await world.order("switchover", TARGET)
        await world.until(lambda: world.active_in(TARGET), 60, f"plan {plan} moving the fleet")
        check_all(world)

    run_virtual(story(), limit_seconds=1000)
