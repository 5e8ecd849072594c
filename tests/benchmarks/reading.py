"""Reading one agent's state: the latest from the warm view, of the holder and of a standby, and an older one from S3 (cold).

The cold read is of a record that the view no longer keeps a body of: its chain of deltas is fetched from the region's store.
A counting proxy gives the number of GETs. Beside it the peer's own ``get_tuple`` of the latest checkpoint in the same region.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from controller.agent import AsyncCheckpoints
from controller.agent.memory import chain_limit
from controller.stream.limits import MAX_CHAIN
from tests.benchmarks.measure import percentile
from tests.benchmarks.peer_stand import peer_stand
from tests.benchmarks.run import Run, split
from tests.benchmarks.stand import Stand, stand
from tests.benchmarks.states import SIZES

CASES = ("2 KB", "80 KB")
AGENTS = 20
MORE_STEPS = 8
"""After the last of a chain, so that it is no longer warm."""
READS = 200


async def reading(run: Run) -> dict[str, Any]:
    async def measure(size: str) -> dict[str, Any]:
        row = await _case(run, size)
        cold = ", ".join(f"{1e3 * one['p50']:.0f} ms in {one['gets']:.1f} GETs" for one in row["cold"])
        warm, standby, peer = (1e3 * row[name]["p50"] for name in ("warm", "standby", "peer"))
        run.say(f"{size}: from the holder {warm:.1f} ms, a standby {standby:.1f} ms, S3 {cold}; peer {peer:.1f} ms")
        return row

    return {**await run.each(CASES[:1] if run.quick else CASES, measure), "max_gets": MAX_CHAIN + 1}


async def _case(run: Run, size: str) -> dict[str, Any]:
    chain = chain_limit(SIZES[size])
    async with stand(run.folder / "stand", standbys=True, counted=True) as full:
        async with full.load(split(AGENTS, 1, mode="put", size=SIZES[size], steps=chain + MORE_STEPS, run="r")) as loaders:
            loaders[0].tell("go")
            await loaders[0].answer()
            final = await loaders[0].ask("stop")
            if final["failed"]:
                raise RuntimeError(str(final["failed"]))
        await full.level(60)
        standby = [full.topology.regions[1].controllers[0].api.url]
        names = [f"agent-{number:06d}" for number in range(AGENTS)]
        return {
            "size": size,
            "warm": await _latest(full.endpoints, names, fresh=True),
            "standby": await _latest(standby, names, fresh=False),
            "cold": [await _cold(full, names, step) for step in (0, chain // 2, chain)],
            "peer": await _peer(run, size),
        }


def _summary(values: list[float]) -> dict[str, float]:
    return {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99), "reads": len(values)}


async def _latest(endpoints: list[str], names: list[str], *, fresh: bool) -> dict[str, float]:
    values = []
    async with AsyncCheckpoints(endpoints) as client:
        for number in range(READS):
            began = time.monotonic()
            found = await client.latest(names[number % len(names)], fresh=fresh)
            values.append(time.monotonic() - began)
            assert found is not None
            assert msgspec.msgpack.decode(found[1])["v"] == 4  # it is the state, whole
    return _summary(values)


async def _cold(full: Stand, names: list[str], step: int) -> dict[str, Any]:
    count = full.counts[full.topology.home]
    values, before = [], count.requests["s3 GET"]
    async with AsyncCheckpoints(full.endpoints) as client:
        for name in names:
            began = time.monotonic()
            _, body = await client.get(name, f"r-{step}", fresh=True)
            values.append(time.monotonic() - began)
            assert msgspec.msgpack.decode(body)["v"] == 4
    return {
        "step": step,
        "deltas": step,
        **_summary(values),
        "gets": (count.requests["s3 GET"] - before) / len(names),
    }


async def _peer(run: Run, size: str) -> dict[str, float]:
    assert run.peer_python is not None
    with peer_stand(run.peer_python) as peer:
        job = {"size": SIZES[size], "agents": AGENTS, "first": 0, "threads": 1, "read": READS}
        async with peer.load([job]) as loaders:
            answer = await loaders[0].ask("go")
    return _summary(answer["latencies"])
