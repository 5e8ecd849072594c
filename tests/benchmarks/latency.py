"""How long an acknowledgement takes with one copy and with two, and how long until every region has a record, at half load.

Arrivals are random and do not wait for answers (open loop); a latency counts from the arrival. Half load is half of the rate
that this run measured, for as many agents. "In every region" is the acknowledgement of records that were put with three
copies: from the put to the commit in all three stores, and the answer.
"""

from __future__ import annotations

from typing import Any

from tests.benchmarks.measure import percentile
from tests.benchmarks.run import Run, ours, split
from tests.benchmarks.stand import Stand, settings, stand
from tests.benchmarks.states import SIZES

Setting = tuple[float, float | None, int]
"""One way between regions in ms (0: loopback alone; 20: about what lies between Ireland and Frankfurt, with a margin; 80: an
ocean), ``stream.flush_seconds`` (None: the default), agents."""
SIZE, AGENTS = "2 KB", 500
SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
FALLBACK_RATE = 1000.0
MANY_AGENTS = 5_000
SETTINGS: tuple[Setting, ...] = (
    (0.0, None, AGENTS),
    (20.0, None, AGENTS),
    (20.0, None, MANY_AGENTS),
    (80.0, None, MANY_AGENTS),
    (20.0, 0.2, MANY_AGENTS),
)
"""The rate is the same in all of them. 500 agents put so often then (each every 0.15 s) that an agent's next record comes
before the one before it is acknowledged in another region, and waits for it: records of an agent go in their order."""


def half_load(run: Run) -> float:
    """Records per second."""
    for case in run.results.get("rates", {}).get("cases", []):
        if (case["size"], case["agents"]) == (SIZE, AGENTS):
            return float(case["ours"]["median"]) / 2
    return FALLBACK_RATE


async def latency(run: Run) -> dict[str, Any]:
    rate = half_load(run)

    async def measure(setting: Setting) -> dict[str, Any]:
        delay, flush, _ = setting
        document = settings(stream={"flush_seconds": flush}) if flush else None
        async with stand(run.folder / "stand", delay_ms=delay or None, document=document) as one:
            return {"rows": [await _copies(run, one, setting, copies, rate) for copies in (1, 2, 3)]}

    found = await run.each(SETTINGS[:1] if run.quick else SETTINGS, measure)
    cases = [row for group in found["cases"] for row in group["rows"]]
    return {"size": SIZE, "cases": cases, "failed": found["failed"]}


async def _copies(run: Run, one: Stand, setting: Setting, copies: int, rate: float) -> dict[str, Any]:
    delay, flush, agents = setting
    jobs = split(agents, 2, mode="offer", size=SIZES[SIZE], copies=copies, rate=rate / 2, run=f"c{copies}")
    found = await ours(one, jobs, warm=2.0, seconds=run.seconds(7.0))
    values = found["latencies"]
    row = {
        "delay_ms": delay,
        "flush": flush,
        "agents": agents,
        "copies": copies,
        "offered": rate,
        "rate": found["acknowledged_rate"],
    }
    row |= {"values": len(values), **{name: percentile(values, share) for name, share in SHARES.items()}}
    told = f"p50 {1e3 * row['p50']:.0f} ms, p99 {1e3 * row['p99']:.0f} ms"
    run.say(f"{agents} agents, {delay:.0f} ms, flush {flush or 'default'}, copies {copies}, {rate:.0f}/s: {told}")
    return row | {"refused": found["failed"], "cpu_share": found["cpu_share"]}
