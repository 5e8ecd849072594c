"""Retention in whole controllers: a region is lost in the middle of it, and comes back longer than retention afterwards.

The checkers of the other stories read whole histories from segment 1; here the copies are judged from their bases on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from controller.adapters.memory.gate import OpenGate
from controller.adapters.memory.region_store import MemoryRegionStore
from controller.domain.model import Forks, SegmentRef
from controller.lab.virtual_time import VirtualClock, run_virtual
from controller.runtime.documents import read
from controller.stream.follower import Follower
from controller.stream.reader import warm
from controller.stream.segment import decode_segment, next_chain
from controller.stream.view import View
from tests.simulation.world import HOME, REGIONS, STREAM, TARGET, THIRD, World

SHORT = {"stream": {"retention_seconds": 300.0, "snapshot_seconds": 60.0, "canary_seconds": 10.0, "follow_seconds": 2.0}}


async def copy_of(world: World, region: str) -> View:
    """A view made from one store alone; also that the store is a chained prefix from its base on."""
    server = world.servers[region]
    head = server.head(STREAM)
    chain = head.base_chain
    for seq in range(head.base, head.seq + 1):
        data = server.get(SegmentRef(STREAM, seq, head.owner(seq)))
        assert decode_segment(data).header.prev_chain == chain
        chain = next_chain(chain, data)
    assert chain == head.chain
    view = View(None)
    store = MemoryRegionStore(server, OpenGate())
    follower = Follower(store, view, STREAM, VirtualClock(world.loop), "sim")
    for _ in range(500):
        await follower.step(500)
        if view.position(STREAM)[0] == server.head(STREAM).seq and not await warm(view, store, 1000):
            return view
    raise AssertionError(f"{region} is not followed")


async def check(world: World, acked: dict[str, tuple[str, bytes]], regions: tuple[str, ...]) -> None:
    for region in regions:
        view = await copy_of(world, region)
        for agent, (record_id, body) in acked.items():
            found = view.latest(agent)
            assert found is not None, f"{region} lost {agent}"
            assert (found[0].id, found[1]) == (record_id, body)


def story(keys_dir: Path) -> Any:
    async def play() -> None:
        world = World(keys_dir, **SHORT)
        await world.found()
        for region in REGIONS:
            world.start(region, "a")
        await world.until(lambda: world.active_in(HOME), 20, "home being active")
        acked: dict[str, tuple[str, bytes]] = {}

        async def put(agent: str, step: int, copies: int = 2) -> None:
            body = f"{agent} {step} ".encode() * 40
            ack = await world.put(agent, f"{step:06d}", body, copies)
            assert ack is not None
            assert ack.status != "failed", ack
            acked[agent] = f"{step:06d}", body

        for number in range(3):
            await put(f"idle-{number}", 0)
        step = 0

        async def work(seconds: float) -> None:
            nonlocal step
            for _ in range(int(seconds / 5)):
                step += 1
                await put("busy", step)
                await world.wait(5.0)

        await work(450)
        before = world.servers[HOME].head(STREAM)
        assert before.base > 1
        assert before.snapshots
        await check(world, acked, REGIONS)
        await world.lose_region(HOME)

        async def silent() -> bool:
            return not await world.holders()

        await world.until(silent, 20, "the old lease running out")
        await world.order("failover", TARGET)
        await world.until(lambda: world.active_in(TARGET), 60, "the target serving")
        await work(700)
        assert world.servers[TARGET].head(STREAM).base > before.seq
        await check(world, acked, (TARGET, THIRD))
        metrics = world.instances[f"{TARGET}/a"].controller.metrics().decode()
        assert f'stream="{STREAM}"}} {float(world.servers[TARGET].head(STREAM).base)}' in metrics
        assert "dr_snapshot_age_seconds{" in metrics
        assert "dr_kept_bytes{" in metrics
        await world.kill(TARGET, "a")  # with it goes what it kept in memory for the lost region
        world.start(TARGET, "a")
        await world.until(lambda: world.active_in(TARGET), 60, "the target's next life serving")
        world.bring_back(HOME)
        await work(120)
        back = world.servers[HOME].head(STREAM)
        assert back.base > before.seq
        assert any(cut.last_seq >= before.seq for cut in back.salvage)  # what it held until then
        await check(world, acked, REGIONS)

    return play()


def test_a_failover_between_rounds_loses_nothing_and_the_lost_region_is_seeded_anew(keys_dir: Path) -> None:
    run_virtual(story(keys_dir), limit_seconds=5_000)


def restarts(keys_dir: Path) -> Any:
    """Every restart adds a fork and an entry to each head. They are dropped once every base is past them, and not before."""

    async def play() -> None:
        world = World(keys_dir, stream={**SHORT["stream"], "retention_seconds": 60.0, "snapshot_seconds": 20.0})
        await world.found()
        for region in REGIONS:
            world.start(region, "a")
        await world.until(lambda: world.active_in(HOME), 20, "home being active")
        acked: dict[str, tuple[str, bytes]] = {}
        step = 0

        async def work(seconds: float) -> None:
            nonlocal step
            for _ in range(int(seconds / 5)):
                step += 1
                ack = await world.put("busy", f"{step:06d}", b"%d" % step * 300, 2)
                assert ack is not None
                assert ack.status != "failed", ack
                acked["busy"] = f"{step:06d}", b"%d" % step * 300
                await world.wait(5.0)

        async def again(region: str) -> None:
            await world.kill(region, "a")
            world.start(region, "a")
            await world.until(lambda: world.active_in(region), 60, "the next life serving")

        async def counted() -> dict[str, int]:
            forks = await read(world.coordinator, world.keys.forks(STREAM), Forks)
            assert forks is not None
            return {"etcd": len(forks.value.starts)} | {r: len(world.servers[r].head(STREAM).epochs) for r in REGIONS}

        for _ in range(3):
            await work(10)
            await again(HOME)
        await work(10)
        assert await counted() == dict.fromkeys(["etcd", *REGIONS], 4)
        await work(120)
        assert await counted() == dict.fromkeys(["etcd", *REGIONS], 1)
        await again(HOME)  # opens on what was shortened

        await world.lose_region(THIRD)  # it may come back with an old history: all is kept to judge it by
        await work(120)
        assert (await counted())["etcd"] == 2
        head = world.servers[HOME].head(STREAM)
        assert head.base > head.epochs[-1].first_seq
        world.bring_back(THIRD)
        await work(60)
        assert await counted() == dict.fromkeys(["etcd", *REGIONS], 1)
        await check(world, acked, REGIONS)

        await world.lose_region(HOME)
        await world.wait(20)
        await world.order("failover", TARGET)
        await world.until(lambda: world.active_in(TARGET), 60, "the target serving")
        await work(10)
        await check(world, acked, (TARGET, THIRD))

    return play()


def test_forks_and_epochs_that_every_base_is_past_are_dropped_and_none_while_a_store_is_away(keys_dir: Path) -> None:
    run_virtual(restarts(keys_dir), limit_seconds=5_000)
