"""Lines of README.md's table "what happens when" that have no story elsewhere: disks, throttling, clocks, credentials."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from controller.domain.model import Forks, RegionLag, Role
from controller.domain.promotion import State
from controller.errors import Unavailable
from controller.lab.virtual_time import run_virtual
from controller.runtime.documents import decode
from tests.simulation.bounds import gauge_queues
from tests.simulation.checkers import live_history, lost_acks, settle
from tests.simulation.roads import Call
from tests.simulation.world import HOME, STREAM, TARGET, THIRD, Instance, World

Story = Callable[[World, Instance], Awaitable[None]]


def run(keys_dir: Path, story: Story, **changes: object) -> None:
    """A group that serves, and then ``story``; at the end all is level and nothing is lost."""

    async def whole() -> None:
        world = World(keys_dir, **changes)  # type: ignore[arg-type]
        await story(world, await world.served(agents=2, seconds=1.0))
        await settle(world)
        assert lost_acks(world, live_history(world)) == []

    run_virtual(whole(), limit_seconds=4000)


async def acknowledged(world: World, seconds: float) -> int:
    """How many records are acknowledged in that time."""
    count = len(world.acks)
    await world.wait(seconds)
    return len(world.acks) - count


async def lag_of(instance: Instance, region: str) -> RegionLag:
    status = await instance.controller.status()
    found = next(one.lag for one in status.regions if one.region == region)
    assert found is not None
    return found


# ---------------------------------------------------------------------------------------------------------- full disks


def fill_disk(instance: Instance) -> None:
    """The view's file cannot grow any more: SQLite says that the disk is full."""
    tables = instance.controller._view._tables
    tables.one(f"PRAGMA max_page_count = {tables.one('PRAGMA page_count')[0]}")


def test_a_holder_whose_disk_is_full_steps_down_with_that_sentence_and_its_neighbour_goes_on(keys_dir: Path) -> None:
    """A view is a cache, but whoever cannot index what it acknowledges would answer for agents that it does not know."""

    async def story(world: World, active: Instance) -> None:
        fill_disk(active)
        await world.until(lambda: world.active_in(HOME) and world.actives()[0] is not active, 60, "the neighbour serving")
        assert await acknowledged(world, 5.0) > 10
        assert "database or disk is full" in world.story()
        ready, why = active.controller.ready()
        assert not ready
        assert "disk is full" in why
        assert world.actives()[0] is not active
        active.controller._view._tables.one("PRAGMA max_page_count = 1073741823")
        await world.wait(3.0)
        assert active.controller.ready()[0], "it goes on by itself once there is room"

    run(keys_dir, story)


def test_a_standby_whose_disk_is_full_is_not_ready_and_says_so_and_nobody_waits_for_it(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        standby = world.instances[f"{TARGET}/a"]
        fill_disk(standby)
        await world.until(lambda: not standby.controller.ready()[0], 120, "the view having no room")
        assert await acknowledged(world, 5.0) > 10
        assert world.actives() == [active]
        status = await standby.controller.status()
        assert any("disk is full" in warning for warning in status.warnings), status.warnings
        assert not standby.controller.ready()[0]
        standby.controller._view._tables.one("PRAGMA max_page_count = 1073741823")

    run(keys_dir, story)


# ---------------------------------------------------------------------------------------------------------- throttling


@pytest.mark.parametrize("region", [HOME, TARGET])
def test_a_table_that_is_throttled_for_minutes_fences_nobody_and_its_lag_is_shown(keys_dir: Path, region: str) -> None:
    async def story(world: World, active: Instance) -> None:
        async def throttled(call: Call) -> None:
            if call.target == region and call.op in ("advance", "fence") and world.rng.random() < 0.9:
                raise Unavailable("ProvisionedThroughputExceededException", hint="a test did it")

        with world.effects(throttled):
            await world.wait(10.0)
            epoch = (await world.authority()).epoch
            assert await acknowledged(world, 30.0) > 30
            assert world.actives() == [active]
            assert (await world.authority()).epoch == epoch
            if region == TARGET:
                behind = [await _seconds_behind(world, active) for _ in range(10)]
                assert max(behind) > 0.5

    run(keys_dir, story)


async def _seconds_behind(world: World, active: Instance) -> float:
    await world.wait(0.5)
    seconds = (await lag_of(active, TARGET)).seconds
    return seconds if isinstance(seconds, float | int) else float("inf")


def test_a_home_table_that_answers_while_its_bucket_does_not_is_a_home_store_that_is_down(keys_dir: Path) -> None:
    """S3 only: heads can be read and fenced, segments cannot be put."""

    async def story(world: World, active: Instance) -> None:
        async def no_bucket(call: Call) -> None:
            if call.target == HOME and call.op.startswith("put"):
                raise Unavailable("503 Service Unavailable", hint="a test did it")

        with world.effects(no_bucket):
            await world.wait(10.0)
            assert await acknowledged(world, 10.0) > 20
            assert world.actives() == [active]
            assert world.servers[HOME].head(STREAM).seq < world.servers[TARGET].head(STREAM).seq
            item = await world.coordinator.get(world.keys.forks(STREAM))
            assert item is not None
            assert HOME in decode(Forks, item.value).sole_ackers

    run(keys_dir, story)


# -------------------------------------------------------------------------------------------------- clocks and pauses


@pytest.mark.parametrize("seconds", [3600.0, -3600.0, 2.0, -2.0])
def test_a_wall_clock_that_is_stepped_deposes_nobody_and_lets_nobody_act_twice(keys_dir: Path, seconds: float) -> None:
    async def story(world: World, active: Instance) -> None:
        active.clock.jump(seconds)
        assert await acknowledged(world, 10.0) > 20
        assert world.actives() == [active]
        active.clock.jump(-seconds)
        assert await acknowledged(world, 5.0) > 10
        assert world.actives() == [active]

    run(keys_dir, story)


@pytest.mark.parametrize("seconds", [3.0, 7.0, 30.0])
def test_a_loop_that_is_blocked_or_a_process_that_is_stopped_acknowledges_nothing_late(keys_dir: Path, seconds: float) -> None:
    """Synchronous code that does not come back looks like SIGSTOP: no task of the process makes a step."""

    async def story(world: World, active: Instance) -> None:
        stopped = world.freeze(active.region, active.name)
        await world.wait(seconds)
        count = len(world.acks)
        world.thaw(stopped)
        await world.wait(2.0)
        late = [ack for ack in world.acks[count:] if ack.instance == active.key]
        if seconds < 4.0:  # shorter than the right: it goes on
            assert late
            assert world.actives() == [active]
        elif seconds > 10.0:
            assert late == []
            assert active.controller.role is Role.STANDBY
            await world.until(lambda: world.active_in(HOME), 20, "the neighbour serving")

    run(keys_dir, story)


# ----------------------------------------------------------------------------------------------- promotion, standby


def test_credentials_that_expire_in_the_middle_of_a_promotion_delay_it_and_nothing_else(keys_dir: Path) -> None:
    """As the adapters say it: expired credentials are waited for, because whoever lends them renews them by itself."""

    async def story(world: World, active: Instance) -> None:
        expired = False

        async def refuse(call: Call) -> None:
            nonlocal expired
            if call.op == "fence" and call.instance.region == TARGET:
                expired = True
            if expired and call.instance.region == TARGET and call.target != "etcd":
                raise Unavailable("ExpiredTokenException: the security token is expired", hint="a test did it")

        plan = await world.order("switchover", TARGET)
        with world.effects(refuse):
            await world.until(lambda: expired, 60, "the target fencing")
            await world.wait(20.0)
            assert world.actives() == []
            assert await world.plan_state(plan) is State.FENCING
        await world.reached(plan, State.DONE, 60)
        assert world.active_in(TARGET)

    run(keys_dir, story)


@pytest.mark.parametrize("store_too", [False, True])
def test_a_standby_region_that_was_dead_for_long_holds_nobody_up_and_catches_up_by_itself(
    keys_dir: Path, store_too: bool
) -> None:
    async def story(world: World, active: Instance) -> None:
        for name in ("a", "b"):
            await world.kill(THIRD, name)
        if store_too:
            world.cut_store(THIRD)
        assert await acknowledged(world, 40.0) > 100
        assert world.actives() == [active]
        status = await active.controller.status()
        third = next(one for one in status.regions if one.region == THIRD)
        assert third.members == 0
        assert third.protected is not True
        head = world.servers[THIRD].head(STREAM).seq
        ahead = world.servers[HOME].head(STREAM).seq - head
        assert (ahead > 50) is store_too, "a store that answers is kept level, whether anybody follows it or not"

    run(keys_dir, story)


LONG_SECONDS = 200.0
"""For which a region is dead in the next story, under load: a 432nd part of a day."""
LOGGED_SEGMENTS = 32
"""Kept in memory for slow stores; as much smaller as the time is shorter would be ten."""
SHORTENED = {
    "retention_seconds": 7 * LONG_SECONDS,
    "snapshot_seconds": LONG_SECONDS / 24,
    "canary_seconds": 10.0,
    "follow_seconds": 2.0,
}
"""What counts days and hours, smaller in the same proportion: a week of past, a snapshot every hour."""


def test_a_region_dead_for_a_day_in_proportion_is_shown_costs_no_memory_and_comes_back_level_and_verified(
    keys_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole day of heartbeats is minutes of processor time, so time is shorter; so are retention and what memory may hold."""
    monkeypatch.setattr("controller.stream.log.LOG_SEGMENTS", LOGGED_SEGMENTS)

    async def story(world: World, active: Instance) -> None:
        gauge_queues(world)
        for name in ("a", "b"):
            await world.kill(THIRD, name)
        world.cut_store(THIRD)
        before = world.servers[THIRD].head(STREAM).seq
        lags, logs = [], []
        for _ in range(10):
            assert await acknowledged(world, LONG_SECONDS / 10) > LONG_SECONDS / 10
            assert world.actives() == [active]
            lags.append((await lag_of(active, THIRD)).seconds)
            logs.append(len(active.controller._actives[STREAM].writer.log))
        known = [seconds for seconds in lags if isinstance(seconds, float | int)]
        assert known == sorted(known), "it grows, or it is unknown; it never looks better than it is"
        assert all(seconds > LONG_SECONDS / 20 for seconds in known)
        assert max(logs) <= 2 * LOGGED_SEGMENTS, "what waits for a dead store is not kept in memory"
        ahead = world.servers[HOME].head(STREAM).seq
        assert ahead - before > 5 * LOGGED_SEGMENTS
        world.cut_store(THIRD, False)
        world.start_all()
        await world.until(lambda: world.servers[THIRD].head(STREAM).seq >= ahead, 300, "the store catching up by itself")
        assert world.actives() == [active], "nobody waited, nobody moved"
        await settle(world)
        assert (await lag_of(active, THIRD)).seconds < 10.0
        # Verified: what that store alone holds is the whole of what anybody was ever promised.
        assert lost_acks(world, live_history(world, without=HOME)) == []

    run(keys_dir, story, stream=SHORTENED)


def test_a_store_that_is_dead_and_approved_to_be_missing_is_waited_for_once_and_not_twice(keys_dir: Path) -> None:
    """A takeover gives a dead store one grace, when it fences; the look at the floor before it does not wait for it, too."""

    async def story(world: World, active: Instance) -> None:
        for name in ("a", "b"):
            await world.kill(HOME, name)
        world.slow["*", HOME] = 30.0  # frozen: no answer, no error
        await world.wait(8.0)
        plan = await world.order("failover", TARGET)
        await world.reached(plan, State.DONE, 60)
        journal = {entry.step: entry for entry in (await world.standby(TARGET).plan(plan)).journal}
        assert journal["fence"].finished_at - journal["authorize"].finished_at < 2.0

    run(keys_dir, story)
