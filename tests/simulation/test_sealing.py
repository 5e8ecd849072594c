"""Whole groups whose objects are sealed: a region dies with its store and its KMS, or the KMS alone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from controller.adapters.keyring import ASK_AGAIN_SECONDS, REACH_SECONDS
from controller.domain.model import Role
from controller.domain.promotion import State
from controller.errors import Refused
from controller.lab.virtual_time import run_virtual
from tests.simulation.checkers import check_all, level, live_history, lost_acks, stores_are_prefixes
from tests.simulation.sealed import SealedWorld
from tests.simulation.world import HOME, REGIONS, TARGET, THIRD, Instance


def run(keys_dir: Path, story: Callable[[SealedWorld, Instance], Awaitable[None]], **changes: Any) -> None:
    """A group that serves, and then ``story``."""

    async def whole() -> None:
        world = SealedWorld(keys_dir, **changes)
        await story(world, await world.served(agents=4, seconds=4.0))

    run_virtual(whole(), limit_seconds=4000)


async def protected(world: SealedWorld) -> None:
    async def everywhere() -> bool:
        status = await world.actives()[0].controller.status()
        return all(region.protected is True for region in status.regions)

    await world.until(everywhere, 60, "protection")


def test_a_region_dies_with_its_store_and_its_kms_and_the_fleet_goes_on_from_sealed_copies(keys_dir: Path) -> None:
    async def story(world: SealedWorld, active: Instance) -> None:
        await protected(world)
        for region in REGIONS:
            sealed, objects = world.sealed_objects(region)
            assert sealed == objects > 0
        assert len({one.data for server in world.servers.values() for one in server.objects.values()}) == max(
            len(server.objects) for server in world.servers.values()
        ), "a segment is the same bytes in every region"
        before = [ack for ack in world.acks if ack.copies >= 2]
        await world.lose_region(HOME)
        plan = await world.order("failover", TARGET)
        await world.reached(plan, State.DONE)
        record = await world.plan(plan)
        assert any(check.name == "target-keys" and check.ok for check in record.plan.evidence.checks)
        async with world.opened(without=HOME):  # nothing that is left needs the dead region's KMS
            assert lost_acks(world, live_history(world)) == [
                ack for ack in lost_acks(world, live_history(world)) if ack.copies < 2
            ]
        now = world.actives()[0].controller
        for ack in before:
            assert (await now.read(ack.agent, ack.id))[1] == ack.body
        assert any(HOME in warning for warning in (await now.status()).warnings), "that a wrap is missing is shown"
        count = len(world.acks)
        await world.wait(3)
        assert len(world.acks) > count

        world.bring_back(HOME)
        await world.wait(ASK_AGAIN_SECONDS)
        await protected(world)
        await level(world)
        assert (await now.status()).warnings == ()
        async with world.opened(without=TARGET):  # and the other way round: what was written meanwhile came home with a wrap
            check_all(world)
            stores_are_prefixes(world)

    run(keys_dir, story)


@pytest.mark.parametrize("region", REGIONS)
def test_when_a_kms_alone_is_away_a_holder_goes_on_and_another_one_can_follow_it(keys_dir: Path, region: str) -> None:
    async def story(world: SealedWorld, active: Instance) -> None:
        await protected(world)
        world.kms_down = {region}
        count = len(world.acks)
        await world.wait(5)
        assert len(world.acks) > count
        await world.kill(active.region, active.name)
        await world.until(lambda: world.active_in(HOME), 60, "another instance of the region")
        count = len(world.acks)
        await world.wait(5)
        assert len(world.acks) > count
        await protected(world)
        status = await world.actives()[0].controller.status()
        assert any(region in warning for warning in status.warnings)
        await level(world)
        async with world.opened(without=region):
            check_all(world)
            stores_are_prefixes(world)

    run(keys_dir, story)


def test_no_epoch_opens_that_one_regions_kms_alone_could_read_and_a_plan_says_so_before(keys_dir: Path) -> None:
    async def story(world: SealedWorld, active: Instance) -> None:
        await protected(world)
        world.kms_down = {TARGET, THIRD}
        await world.wait(REACH_SECONDS)
        with pytest.raises(Refused, match=r"target-keys: nothing can be sealed safely in eu-central-1.*does not answer"):
            await world.order("switchover", TARGET)
        world.kms_down = {HOME, THIRD}
        count = len(world.acks)
        await world.wait(5)
        assert len(world.acks) > count, "the holder has its key"
        await world.kill(active.region, active.name)
        await world.until(
            lambda: any(one.controller.role is Role.HOLDING for one in world.instances.values() if one.alive), 60, "a hold"
        )
        count = len(world.acks)
        await world.wait(10)
        assert len(world.acks) == count, "nothing is acknowledged that one region alone could open"
        held = next(one for one in world.instances.values() if one.alive and one.controller.role is Role.HOLDING)
        assert "nothing can be sealed safely" in (await held.controller.status()).sentence or any(
            "nothing can be sealed safely" in line for line in held.log
        )
        world.kms_down = {THIRD}
        await world.until(lambda: len(world.acks) > count, 60, "records being acknowledged again")
        await level(world)
        async with world.opened():
            check_all(world)
            stores_are_prefixes(world)

    run(keys_dir, story)


def test_a_group_with_a_history_is_switched_on_one_controller_after_the_other_and_off_again(keys_dir: Path) -> None:
    async def story(world: SealedWorld, active: Instance) -> None:
        async def restart_all() -> None:
            for instance in list(world.instances.values()):
                await world.kill(instance.region, instance.name)
                world.start(instance.region, instance.name)
                await world.wait(3)
            await world.until(lambda: world.active_in(HOME), 60, "the region active")
            await protected(world)

        await protected(world)
        assert world.sealed_objects(HOME)[0] == 0
        world.enabled = True
        await restart_all()
        sealed, objects = world.sealed_objects(HOME)
        assert 0 < sealed < objects
        world.enabled = False
        await restart_all()
        after, all_of_it = world.sealed_objects(HOME)
        assert after >= sealed
        assert all_of_it - after > objects - sealed, "new ones are plain again"
        await level(world)
        async with world.opened():
            check_all(world)
            stores_are_prefixes(world)
        for ack in world.acks:
            assert (await world.actives()[0].controller.read(ack.agent, ack.id))[1] == ack.body

    run(keys_dir, story, enabled=False)
