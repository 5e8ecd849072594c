"""RPO policy ``enforce`` in whole groups: stores that stall, crawl, come back; clocks that are wrong; holders that die."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from controller.lab.virtual_time import run_virtual
from controller.runtime.service import Status
from controller.stream.objective import Objective
from tests.simulation.checkers import check_all, settle
from tests.simulation.objective import rpo_enforced
from tests.simulation.test_guards import Case, Patch, judge, patched
from tests.simulation.world import HOME, REGIONS, World

ENFORCE = {"policy": "enforce", "seconds": 3.0, "settle_seconds": 1.0, "report_seconds": 0.5}


async def the_other_stores_are_away_for_long(world: World) -> None:
    world.changes["rpo"] = dict(ENFORCE)
    await world.served()
    world.isolate_stores_of(HOME)
    await world.wait(15.0)


CASE = Case(
    "objective-not-enforced",
    the_other_stores_are_away_for_long,
    patched((Objective, "problem", lambda self, last_seq: None)),
    "rpo-enforced",
)


def test_a_holder_that_does_not_stop_at_the_objective_is_caught(keys_dir: Path, monkeypatch: Patch) -> None:
    found, ended = judge(keys_dir, CASE, None)
    assert ended is None
    assert found == {}
    found, ended = judge(keys_dir, CASE, monkeypatch)
    assert CASE.checker in found, found or ended


def test_the_status_says_since_when_nothing_is_acknowledged_and_it_ends_by_itself(keys_dir: Path) -> None:
    async def play() -> None:
        world = World(keys_dir, rpo=dict(ENFORCE))
        active = await world.served()
        assert len(world.acks) > 0
        world.isolate_stores_of(HOME)
        await world.wait(8.0)
        told = await _status(world, active.controller.status())
        assert "enforcing: not acknowledging since" in told.sentence
        silent_from = len(world.acks)
        await world.wait(3.0)
        assert len(world.acks) == silent_from
        world.isolate_stores_of(HOME, cut=False)
        await world.wait(4.0)
        assert len(world.acks) > silent_from
        told = await _status(world, active.controller.status())
        assert "enforcing" not in told.sentence
        await settle(world)

    run_virtual(play(), limit_seconds=3000)


async def _status(world: World, asked: object) -> Status:
    return await asked  # type: ignore[misc]


@pytest.mark.parametrize("seed", range(6))
def test_the_objective_is_kept_at_every_step_whatever_stores_and_clocks_do(seed: int, keys_dir: Path) -> None:
    async def play() -> None:
        dice = random.Random(seed)
        world = World(keys_dir, seed=seed, latency=dice.choice([None, (0.001, 0.05)]), rpo=dict(ENFORCE))
        await world.found()
        for region in REGIONS:
            for name in ("a", "b"):
                world.start(region, name, wall_error=dice.choice([0.0, -3600.0, 2.0, 500.0]))
        await world.until(lambda: len(world.actives()) == 1, 20, "one active controller")
        world.fleet(5)
        for _ in range(25):
            act = dice.random()
            if act < 0.3:
                world.isolate_stores_of(HOME, cut=dice.random() < 0.5)
            elif act < 0.5:
                world.cut_store(dice.choice(REGIONS), cut=dice.random() < 0.5)
            elif act < 0.8:
                world.slow["*", dice.choice(REGIONS)] = dice.choice([0.0, 0.2, 0.7])
            elif act < 0.85 and world.actives():
                holder = world.actives()[0]
                await world.kill(holder.region, holder.name)
                world.start(holder.region, holder.name)
            await world.wait(dice.choice([0.1, 0.5, 2.0, 4.0]))
            rpo_enforced(world)
        check_all(world)
        world.slow.clear()
        await settle(world, seconds=150.0)

    run_virtual(play(), limit_seconds=3000)
