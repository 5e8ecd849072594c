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

SIZE, AGENTS = "2 KB", 500
SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
FALLBACK_RATE = 1000.0
SETTINGS = ((0.0, None), (20.0, None), (20.0, 0.2))
"""One way between regions (loopback alone, and about what lies between Ireland and Frankfurt with a margin), and
``stream.flush_seconds`` (None: the default)."""


def half_load(run: Run) -> float:
    """Records per second."""
    for case in run.results.get("rates", {}).get("cases", []):
        if (case["size"], case["agents"]) == (SIZE, AGENTS):
            return float(case["ours"]["median"]) / 2
    return FALLBACK_RATE


async def latency(run: Run) -> dict[str, Any]:
    rate = half_load(run)

    async def measure(setting: tuple[float, float | None]) -> dict[str, Any]:
        delay, flush = setting
        document = settings(stream={"flush_seconds": flush}) if flush else None
        async with stand(run.folder / "stand", delay_ms=delay or None, document=document) as one:
            return {"rows": [await _copies(run, one, setting, copies, rate) for copies in (1, 2, 3)]}

    found = await run.each(SETTINGS[:1] if run.quick else SETTINGS, measure)
    cases = [row for group in found["cases"] for row in group["rows"]]
    return {"size": SIZE, "agents": AGENTS, "cases": cases, "failed": found["failed"]}


async def _copies(run: Run, one: Stand, setting: tuple[float, float | None], copies: int, rate: float) -> dict[str, Any]:
    delay, flush = setting
    jobs = split(AGENTS, 2, mode="offer", size=SIZES[SIZE], copies=copies, rate=rate / 2, run=f"c{copies}")
    found = await ours(one, jobs, warm=2.0, seconds=run.seconds(7.0))
    values = found["latencies"]
    row = {"delay_ms": delay, "flush": flush, "copies": copies, "offered": rate, "rate": found["acknowledged_rate"]}
    row |= {"values": len(values), **{name: percentile(values, share) for name, share in SHARES.items()}}
    told = f"p50 {1e3 * row['p50']:.0f} ms, p99 {1e3 * row['p99']:.0f} ms"
    run.say(f"{delay:.0f} ms, flush {flush or 'default'}, copies {copies}, {rate:.0f}/s: {told}")
    return row | {"refused": found["failed"], "cpu_share": found["cpu_share"]}
