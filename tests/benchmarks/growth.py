"""How rate, memory, the view and the recovery time grow with the number of agents; promotion (warm) and the cold start.

For each number of agents: every agent's first state, then a window in which all of them put their next ones, then one warm
standby is killed, loses its view and reads everything back (cold start), then the home region is killed and the group moves.
Frames are made beforehand (the agents' own work would hide the controller's on the same cores); states are of 2 KB.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import msgspec

from controller.agent import AsyncCheckpoints
from tests.benchmarks.measure import rss_bytes
from tests.benchmarks.people import fail_over, get
from tests.benchmarks.run import Run, split
from tests.benchmarks.stand import Stand, settings, stand
from tests.benchmarks.states import SIZES

SIZE = "2 KB"
COUNTS = (100, 1_000, 10_000, 100_000)
QUICK_COUNTS = (100, 1_000)
SECOND_ROUND_RECORDS = 12_000
SAMPLE = 100
"""States that are read from the target after its promotion, and decoded."""
BATCH_AGENTS = 500
"""Agents whose records share a request."""


async def growth(run: Run) -> dict[str, Any]:
    async def measure(agents: int) -> dict[str, Any]:
        row = await _count(run, agents)
        run.say(
            f"{agents} agents: {row['rate']:.0f}/s, holder {row['rss'] / 2**20:.0f} MiB, "
            f"view {row['view_bytes'] / 2**20:.1f} MiB, "
            f"fence to verified {row['move']['fence_to_verified_seconds']:.2f} s, cold start {row['cold_seconds']:.1f} s"
        )
        return row

    return {"size": SIZE, **await run.each(QUICK_COUNTS if run.quick else COUNTS, measure)}


async def _count(run: Run, agents: int) -> dict[str, Any]:
    document = settings(promotion={"resume_agents_per_second": 100_000})
    async with stand(run.folder / "stand", standbys=True, document=document) as full:
        first = await _write(full, agents, steps=1, prefix="g")
        steps = max(1, min(40, SECOND_ROUND_RECORDS // agents))
        second = await _write(full, min(agents, SECOND_ROUND_RECORDS), steps=steps + 1, prefix="g", again=True)
        await full.level(300)
        place = full.topology.region(full.topology.home).controllers[0]
        target = full.topology.regions[1].name
        row = {
            "agents": agents, "first_rate": first["rate"], "rate": second["rate"], "cpu_us": second["cpu_us"],
            "rss": rss_bytes(full.pid(place.name)), "standby_rss": rss_bytes(full.pid(f"controller-{target}-a")),
            "view_bytes": view_bytes(place.state_dir), "records": (await full.records())[full.topology.home],
        }  # fmt: skip
        row["cold_seconds"], row["cold_records"] = await _cold_start(full, full.topology.regions[2].name)
        row["move"] = await fail_over(full, full.topology.home, target)
        row["sample"] = await _sample(full.topology.region(target).controllers[0].api.url, agents)
        return row


async def _sample(url: str, agents: int) -> int:
    """Reads some agents' states from the region that serves now. Raises when one is missing or not a whole state."""
    status = await get(f"{url}/v1/status")
    if status["agents"] != agents:
        raise RuntimeError(f"{status['agents']} of {agents} agents are in the target region")
    numbers = range(0, agents, max(1, agents // SAMPLE))
    async with AsyncCheckpoints([url], timeout_seconds=30.0) as client:
        for number in numbers:
            found = await client.latest(f"g-{number:06d}")
            if found is None or msgspec.msgpack.decode(found[1])["channel_values"]["messages"][0]["type"] != "human":
                raise RuntimeError(f"agent g-{number:06d} has no whole state in the target region")
    return len(numbers)


def view_bytes(folder: Path) -> int:
    """Size of a controller's view on disk."""
    return sum(path.stat().st_size for path in folder.glob("view-*"))


async def _write(full: Stand, agents: int, *, steps: int, prefix: str, again: bool = False) -> dict[str, float]:
    """Records per second from the first request until every store has all."""
    jobs = split(
        agents, 2, mode="batch", size=SIZES[SIZE], steps=steps, prefix=prefix, batch=BATCH_AGENTS, skip=1 if again else 0
    )
    async with full.load(jobs) as loaders:
        cpu = full.cpu(load=[loader.pid for loader in loaders])
        before, began = await full.records(), time.monotonic()
        for loader in loaders:
            loader.tell("go")
        done = [await loader.answer() for loader in loaders]
        await full.drained()
        taken, spent = time.monotonic() - began, cpu.spent()
        after = await full.records()
        final = [await loader.ask("stop") for loader in loaders]
    failed = [answer["failed"] for answer in final if answer["failed"]]
    if failed or not all(answer.get("done") for answer in done):
        raise RuntimeError(f"not everything was acknowledged: {failed}")
    count = min(after[region] - before[region] for region in after)
    return {"rate": count / taken, "cpu_us": {name: 1e6 * used / max(1, count) for name, used in spent.items()}}


async def _cold_start(full: Stand, region: str) -> tuple[float, int]:
    """A standby without its view: seconds from the start of its process until it has verified all that its store has."""
    place = full.topology.region(region).controllers[0]
    full.lab.kill_controller(region, place.instance)
    for path in place.state_dir.glob("view-*"):
        path.unlink()
    began = time.monotonic()
    full.lab.start_controller(region, place.instance)
    async with asyncio.timeout(300):
        while True:
            status = await get(f"{place.api.url}/v1/status")
            heads = {head.stream: head.seq for head in await full.heads(region)}
            if status and all(status["positions"].get(stream, {"seq": 0})["seq"] >= seq for stream, seq in heads.items()):
                return time.monotonic() - began, sum(head.records for head in await full.heads(region))
            await asyncio.sleep(0.1)
