"""What a stream carries to regions by their distance, in virtual time: the writer, its pumps and the client on memory stores.

The machine has no part in it: it tells what protocol and bounds make of a distance, and what in ``latency`` is the machine's.
"""

from __future__ import annotations

import asyncio
from typing import Any

from controller.stream.writer import WriterLimits
from tests.benchmarks.run import Run
from tests.support.distance import Load, carry

WAYS_MS = (10.0, 20.0, 40.0, 80.0, 150.0)
STORE_SECONDS = 0.004
"""What each store takes for a call: little, so that the stream closes a segment in every flush interval."""
RATE = 150.0
"""Records a second of ever new agents. How many share a segment does not matter here."""
AGENTS = ((50, 326.0), (500, 326.0))
"""A tenth of what ``latency`` offers: agents, and records of all of them a second."""
AGENT_WAYS_MS = (20.0, 80.0)


async def distance(run: Run) -> dict[str, Any]:
    depth = WriterLimits().pipeline_depth
    cases, agents = [], []
    for ms in WAYS_MS:
        found = await asyncio.to_thread(carry, _ways(ms), Load(RATE, copies=2, seconds=10.0), store_seconds=STORE_SECONDS)
        answer = 2 * ms / 1e3 + STORE_SECONDS
        cases.append({
            "delay_ms": ms, "closed": found.closed, "carried": found.segments["far"], "lag": found.lag_seconds["far"],
            "p50": found.percentile(0.5), "p99": found.percentile(0.99), "most": depth / answer,
        })  # fmt: skip
        run.say(f"{ms:.0f} ms: {found.closed:.0f} segments/s closed, {found.segments['far']:.0f} carried")
    for number, rate in AGENTS:
        for ms in AGENT_WAYS_MS:
            load = Load(rate, copies=2, seconds=8.0, agents=number)
            found = await asyncio.to_thread(carry, _ways(ms), load, store_seconds=STORE_SECONDS)
            agents.append({
                "agents": number, "delay_ms": ms, "offered": rate, "rate": found.acknowledged,
                "p50": found.percentile(0.5), "p99": found.percentile(0.99),
            })  # fmt: skip
            run.say(f"{number} agents, {ms:.0f} ms: {found.acknowledged:.0f} of {rate:.0f}/s")
    return {"cases": cases, "agents": agents, "depth": depth, "store_ms": 1e3 * STORE_SECONDS}


def _ways(ms: float) -> dict[str, float]:
    return {"near": ms / 1e3, "far": ms / 1e3}
