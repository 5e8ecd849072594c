"""What every figure gets: the options of the run, a voice, and the two sides."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tests.benchmarks.peer_stand import PeerStand
from tests.benchmarks.stand import Loader, Stand

C = TypeVar("C")
LEAST_SECONDS = 20.0
"""Nothing is worth beginning with less."""


@dataclass(slots=True)
class Run:
    """``results`` holds what earlier figures of this run found: later ones may need it (half load of what?)."""

    folder: Path
    quick: bool
    peer_python: Path | None = None
    began: float = field(default_factory=time.monotonic)
    ends: float = float("inf")
    """Monotonic time at which whatever runs is cut off, and after which nothing more begins."""
    results: dict[str, Any] = field(default_factory=dict)

    def say(self, text: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - self.began:6.1f} s] {text}\n")
        sys.stderr.flush()

    async def each(self, cases: Iterable[C], measure: Callable[[C], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        """``cases``: what each gave; ``failed``: what became of the others. Raises RuntimeError when none gave anything."""
        found, failed = list[dict[str, Any]](), list[str]()
        for case in cases:
            left = self.ends - time.monotonic()
            if left < LEAST_SECONDS:
                failed.append(f"{case}: no time was left (--minutes)")
                self.say(failed[-1])
                continue
            try:
                async with asyncio.timeout(left):
                    found.append(await measure(case))
            except Exception as error:  # noqa: BLE001 - one case that fails must not cost the others
                traceback.print_exc()
                failed.append(f"{case}: {error!r}"[:300])
                self.say(f"failed: {failed[-1]}")
        if not found:
            raise RuntimeError("; ".join(failed))
        return {"cases": found, "failed": failed}

    def rounds(self, full: int) -> int:
        return 1 if self.quick else full

    def seconds(self, full: float) -> float:
        return full / 2 if self.quick else full


async def window(loaders: list[Loader], warm_seconds: float, seconds: float) -> tuple[float, float, list[dict[str, Any]]]:
    """Lets the load run; returns (acknowledged, seconds, final answers), counted in the window only."""
    await asyncio.sleep(warm_seconds)
    before = [await loader.ask("report") for loader in loaders]
    began = time.monotonic()
    await asyncio.sleep(seconds)
    after = [await loader.ask("report") for loader in loaders]
    taken = time.monotonic() - began
    final = [await loader.ask("stop") for loader in loaders]
    count = sum(b["acknowledged"] - a["acknowledged"] for a, b in zip(before, after, strict=True))
    return count, taken, final


async def ours(stand: Stand, jobs: list[dict[str, Any]], *, warm: float, seconds: float) -> dict[str, Any]:
    """One round: records per second that every region's store committed in the window, and what it cost."""
    async with stand.load(jobs) as loaders:
        for loader in loaders:
            loader.tell("go")
        await asyncio.sleep(warm)
        for loader in loaders:
            loader.tell("clear")
        first, began = await stand.records(), time.monotonic()
        cpu = stand.cpu(load=[loader.pid for loader in loaders])
        reports = [await loader.ask("report") for loader in loaders]
        await asyncio.sleep(seconds)
        spent, foreign, last = cpu.spent(), cpu.foreign_seconds(), await stand.records()
        taken = time.monotonic() - began
        after = [await loader.ask("report") for loader in loaders]
        final = [await loader.ask("stop") for loader in loaders]
        drain = await stand.drained()
    rates = {region: (last[region] - first[region]) / taken for region in last}
    acknowledged = sum(b["acknowledged"] - a["acknowledged"] for a, b in zip(reports, after, strict=True))
    replicated = min(last[region] - first[region] for region in last)
    failures: dict[str, int] = {}
    for answer in final:
        for text, number in answer["failed"].items():
            failures[text] = failures.get(text, 0) + number
    return {
        "rate": min(rates.values()),
        "rates": rates,
        "acknowledged_rate": acknowledged / taken,
        "cpu_share": {name: seconds_used / taken for name, seconds_used in spent.items()},
        "cpu_us": {name: 1e6 * seconds_used / max(1, replicated) for name, seconds_used in spent.items()},
        "foreign_share": foreign / taken,
        "drain_seconds": drain,
        "latencies": [value for answer in final for value in answer["latencies"]],
        "failed": failures,
        "state_bytes": sum(a["bytes"] for a in after) / max(1, sum(a["acknowledged"] for a in after)),
        "load_rss": max(answer["rss"] for answer in final),
    }


async def theirs(stand: PeerStand, jobs: list[dict[str, Any]], *, warm: float, seconds: float) -> dict[str, Any]:
    """One round of the peer: checkpoints per second that both regions have."""
    from tests.benchmarks.measure import Cpu

    async with stand.load(jobs) as loaders:
        for loader in loaders:
            loader.tell("go")
        await asyncio.sleep(warm)
        for loader in loaders:
            loader.tell("clear")
        cpu = Cpu({**stand.pids(), "peer": [loader.pid for loader in loaders]})
        count, taken, final = await window(loaders, 0.0, seconds)
        spent, foreign = cpu.spent(), cpu.foreign_seconds()
    failures: dict[str, int] = {}
    for answer in final:
        for text, number in answer["failed"].items():
            failures[text] = failures.get(text, 0) + number
    return {
        "rate": count / taken,
        "foreign_share": foreign / taken,
        "cpu_us": {name: 1e6 * used / max(1, count) for name, used in spent.items() if name != "bench"},
        "latencies": [value for answer in final for value in answer["latencies"]],
        "failed": failures,
    }


def split(agents: int, processes: int, **job: Any) -> list[dict[str, Any]]:
    """Jobs of several load processes that share the agents evenly."""
    processes = max(1, min(processes, agents))
    bounds = [agents * number // processes for number in range(processes + 1)]
    return [{**job, "first": low, "agents": high - low} for low, high in itertools.pairwise(bounds)]
