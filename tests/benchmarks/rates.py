"""Checkpoints per second: ours (acknowledged with one copy, replicated to three regions) beside the peer (two regions).

Rounds alternate peer and ours. The peer runs at the fastest of a few settings (threads × processes), tried first.
"""

from __future__ import annotations

import time
from typing import Any

from tests.benchmarks.measure import percentile, summary
from tests.benchmarks.peer_stand import peer_stand
from tests.benchmarks.run import Run, ours, split, theirs
from tests.benchmarks.stand import Stand, stand
from tests.benchmarks.states import SIZES

CASES = (("2 KB", 50), ("2 KB", 500), ("80 KB", 50), ("80 KB", 500), ("720 KB", 50), ("2 MB", 16))
LARGE_BYTES = 500_000
"""From this size on two rounds have to do, and the peer is tried with fewer settings: they take long to warm up."""
QUICK_CASES = (("2 KB", 500), ("80 KB", 50))
TUNINGS = ((1, 1), (8, 1), (32, 1), (8, 2))
"""Threads per process, processes."""
LOAD_PROCESSES = 2
MANY = 500
BATCH_RECORDS = {2_000: 30_000, 80_000: 6_000}


async def rates(run: Run) -> dict[str, Any]:
    tuned = dict[str, tuple[int, int]]()

    async def measure(case: tuple[str, int]) -> dict[str, Any]:
        size, agents = case
        if size not in tuned:
            tuned[size] = await _tune(run, size, agents)
        return await _case(run, size, agents, tuned[size])

    found = await run.each(QUICK_CASES if run.quick else CASES, measure)
    try:
        standbys = await _with_standbys(run)
    except Exception as error:  # noqa: BLE001 - the rates themselves are worth having
        found["failed"].append(f"with standbys: {error!r}"[:300])
        standbys = None
    return {**found, "tuned": {size: list(best) for size, best in tuned.items()}, "standbys": standbys}


async def _peer_round(
    run: Run, size: str, agents: int, tuning: tuple[int, int], *, seconds: float = 4.0, **more: Any
) -> dict[str, Any]:
    threads, processes = tuning
    assert run.peer_python is not None
    with peer_stand(run.peer_python) as peer:  # anew: stand-ins keep every body in memory
        jobs = split(agents, processes, size=SIZES[size], threads=threads, **more)
        return await theirs(peer, jobs, warm=1.0, seconds=run.seconds(seconds))


async def _tune(run: Run, size: str, agents: int) -> tuple[int, int]:
    found = {}
    for tuning in TUNINGS if SIZES[size] < LARGE_BYTES else TUNINGS[1::2]:
        found[tuning] = (await _peer_round(run, size, agents, tuning, seconds=2.5))["rate"]
    best = max(found, key=lambda tuning: found[tuning])
    tried = ", ".join(f"{threads}x{processes} {rate:.0f}/s" for (threads, processes), rate in found.items())
    run.say(f"peer, {size}: {tried}; best {best[0]}x{best[1]}")
    return best


async def _case(run: Run, size: str, agents: int, tuning: tuple[int, int]) -> dict[str, Any]:
    nominal = SIZES[size]
    warm = 2.0 if nominal < LARGE_BYTES else 4.0
    mine, peers = [], []
    async with stand(run.folder / "stand") as ours_stand:
        for number in range(run.rounds(3 if nominal < LARGE_BYTES else 2)):
            peers.append(await _peer_round(run, size, agents, tuning))
            jobs = split(agents, LOAD_PROCESSES, mode="put", size=nominal, run=f"r{number}")
            mine.append(await ours(ours_stand, jobs, warm=warm, seconds=run.seconds(6.0)))
            run.say(f"{size}, {agents} agents: peer {peers[-1]['rate']:.0f}/s, ours {mine[-1]['rate']:.0f}/s")
        batched = None
        if nominal in BATCH_RECORDS and (agents == MANY or run.quick):
            steps = BATCH_RECORDS[nominal] // agents // (3 if run.quick else 1)
            jobs = split(agents, LOAD_PROCESSES, mode="batch", size=nominal, run="b", steps=steps)
            batched = await _batched(ours_stand, jobs)
            run.say(f"{size}, {agents} agents, frames made beforehand: {batched['rate']:.0f}/s")
    zipped = None
    if size == "80 KB" and agents == 50:
        zipped = (await _peer_round(run, size, agents, tuning, compression=True))["rate"]
    ratio = [one["rate"] / other["rate"] for one, other in zip(mine, peers, strict=True)]
    middle = sorted(mine, key=lambda row: row["rate"])[len(mine) // 2]
    latencies = middle.pop("latencies")
    return {
        "size": size,
        "agents": agents,
        "ours": summary([row["rate"] for row in mine]),
        "peer": summary([row["rate"] for row in peers]),
        "ratio": summary(ratio),
        "detail": middle,
        "p50": percentile(latencies, 0.5),
        "p99": percentile(latencies, 0.99),
        "peer_detail": {name: peers[-1][name] for name in ("cpu_us", "failed")},
        "peer_p50": percentile(peers[-1]["latencies"], 0.5),
        "batched": batched,
        "peer_compressed": zipped,
        "foreign_shares": [row["foreign_share"] for row in (*mine, *peers)],
        "failed": [row["failed"] for row in mine if row["failed"]],
    }


async def _batched(ours_stand: Stand, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """Frames made beforehand, as fast as the holder takes them: from the first request until every store has all."""
    async with ours_stand.load(jobs) as loaders:
        cpu = ours_stand.cpu(load=[loader.pid for loader in loaders])
        before, began = await ours_stand.records(), time.monotonic()
        for loader in loaders:
            loader.tell("go")
        done = [await loader.answer() for loader in loaders]
        await ours_stand.drained()
        taken, spent = time.monotonic() - began, cpu.spent()
        after = await ours_stand.records()
    count = min(after[region] - before[region] for region in after)
    assert all(answer.get("done") for answer in done)
    return {
        "rate": count / taken, "records": count, "cpu_us": {name: 1e6 * used / count for name, used in spent.items()},
        "cpu_share": {name: used / taken for name, used in spent.items()},
    }  # fmt: skip


async def _with_standbys(run: Run) -> dict[str, Any]:
    """The same with a standby in each of the two other regions that reads back and verifies everything, on the same cores."""
    size, agents = "2 KB", 500
    async with stand(run.folder / "stand", standbys=True) as full:
        found = await ours(
            full, split(agents, LOAD_PROCESSES, mode="put", size=SIZES[size]), warm=2.0, seconds=run.seconds(6.0)
        )
        behind = await full.level(60)
    found.pop("latencies")
    run.say(
        f"{size}, {agents} agents, two standbys on the same cores: {found['rate']:.0f}/s, standbys level after {behind:.1f} s"
    )
    return {"size": size, "agents": agents, **found, "level_seconds": behind}
