"""``make soak MINUTES=N``. ``python -m tests.soak --help``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # else gRPC says at every start of a process that it skipped something

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from controller.lab.etcd import find_etcd
from tests.faults import network
from tests.faults.faults import FAULTS, Fault, playable
from tests.faults.runner import Report, Runner
from tests.faults.stage import Stage
from tests.faults.stale import clear_stale
from tests.soak.flat import FDS, LEAST_SECONDS, RSS_MB_PER_HOUR, WARM_UP_SECONDS, Sample, Verdict, judge, look

SAMPLE_SECONDS = 5.0
TELL_SECONDS = 15.0
JUDGE_SECONDS = 60.0
QUIET_SECONDS = 5.0
"""Between two faults."""
QUEUED_RECORDS = 20_000
"""Bound of the records that wait for a store. What admission lets in is bounded by bytes; these agents' fit many times over."""
JUDGED = ("controller", "proxy", "dns")
"""Kinds whose growth is judged. Others grow by design: stand-ins keep every object in memory, etcd every revision until it is
compacted, agents fill their caches of deltas."""
LEFT_OUT = ("kill-", "etcd-disk-full", "etcd-nospace")
"""A process that is killed says nothing about growth: kills are in ``make faults``."""


@dataclass
class Result:
    """What a soak found."""

    minutes: float
    etcd: str = ""
    faults: dict[str, int] = field(default_factory=dict)
    processes: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    acknowledgements: int = 0
    operations: int = 0
    promotions: int = 0
    longest_outage: float = 0.0
    longest_recovery: float = 0.0
    most_queued_records: int = 0
    queued_records_at_the_end: int = 0
    mutants: int = 0
    unnoticed: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not (self.problems or self.violations or self.unnoticed)


class Sampler:
    """Looks at every process and at the holder's queues, every few seconds."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._first: dict[tuple[str, int], float] = {}
        self.lives: dict[tuple[str, int], list[Sample]] = {}
        self.most_queued = 0
        self.queued = 0

    async def run(self) -> None:
        async with httpx.AsyncClient(timeout=1.0, trust_env=False) as http:
            while True:
                for process in self._stage.lab.processes():
                    if process.kind in JUDGED:
                        began = self._first.setdefault((process.name, process.pid), time.monotonic())
                        seen = look(process.pid, time.monotonic() - began)
                        if seen is not None:
                            self.lives.setdefault((process.name, process.pid), []).append(seen)
                answers = await asyncio.gather(*(self._waiting(http, url) for url in self._stage.people.urls()))
                self.queued = max(answers, default=0)
                self.most_queued = max(self.most_queued, self.queued)
                await asyncio.sleep(SAMPLE_SECONDS)

    async def _waiting(self, http: httpx.AsyncClient, url: str) -> int:
        """Records that this controller has acknowledged and some store lacks; 0 for one that is not active."""
        try:
            text = (await http.get(f"{url}/metrics")).text
        except httpx.HTTPError:
            return 0
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples if s.name == "dr_lag_records"]
        return max((int(s.value) for s in samples if s.value == s.value), default=0)

    def verdicts(self) -> dict[str, Verdict]:
        """By process; of the longest of its lives."""
        longest: dict[str, list[Sample]] = {}
        for (name, _), samples in self.lives.items():
            if len(samples) > len(longest.get(name, ())):
                longest[name] = samples
        return {name: judge(samples) for name, samples in sorted(longest.items())}


def pool() -> list[Fault]:
    """What a soak plays."""
    return playable([fault for fault in FAULTS if not fault.name.startswith(LEFT_OUT)], find_etcd())[0]


async def soak(options: argparse.Namespace, result: Result) -> None:
    """Raises CancelledError at Ctrl-C; what runs ends with it, and what was found until then is in ``result``."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    began, report = time.monotonic(), Report()
    rng = random.Random(options.seed)

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    played: Counter[str] = Counter()
    faults = pool()
    async with Stage(say, agents=options.agents, disks=not network.why_no_disks()) as stage:
        say(f"group is up; seed {options.seed}")
        runner = Runner(stage, report, say, rng.randrange(2**31), options.keep, judge_seconds=JUDGE_SECONDS)
        runner.begin()
        sampler = Sampler(stage)
        background = [
            asyncio.create_task(sampler.run()),
            asyncio.create_task(_tell(say, began, sampler, stage, played, report)),
        ]
        try:
            started = time.monotonic()
            while time.monotonic() - started < options.minutes * 60:
                fault = rng.choice(faults)
                played[fault.name] += 1
                if not await runner.play(fault):
                    break
                await asyncio.sleep(QUIET_SECONDS)
            result.violations = await runner.verdict()
            await runner.finish()
        finally:
            for one in background:
                one.cancel()
            _fill(result, report, sampler, played)


async def _tell(say: Any, began: float, sampler: Sampler, stage: Stage, played: Counter[str], report: Report) -> None:
    """The progress line."""
    while True:
        await asyncio.sleep(TELL_SECONDS)
        growth = [verdict.mb_per_hour for verdict in sampler.verdicts().values() if verdict.judged]
        steepest = f"{max(growth):+.0f} MB/h" if growth else "warming up"
        say(
            f"{played.total()} faults, {len(stage.recorded.acks)} acknowledgements, {report.violations} violations, "
            f"{sampler.queued} records waiting, steepest {steepest}"
        )


def _fill(result: Result, report: Report, sampler: Sampler, played: Counter[str]) -> None:
    rows = report.rows.values()
    result.faults = dict(sorted(played.items()))
    result.violations += [f"{row.fault}: {text}" for row in rows for text in row.violations]
    result.acknowledgements, result.operations = report.acknowledgements, report.operations
    result.promotions = sum(row.promotions for row in rows)
    result.longest_outage = max((row.longest_outage for row in rows), default=0.0)
    result.longest_recovery = max((row.longest_recovery for row in rows), default=0.0)
    result.most_queued_records, result.queued_records_at_the_end = sampler.most_queued, sampler.queued
    result.mutants, result.unnoticed = report.mutants, report.unnoticed
    for name, verdict in sampler.verdicts().items():
        result.processes[name] = asdict(verdict)
        if verdict.problem:
            result.problems.append(f"{name}: {verdict.problem}")
    if not any(verdict["judged"] for verdict in result.processes.values()):
        result.problems.append(
            f"no process lived for {WARM_UP_SECONDS + LEAST_SECONDS:.0f} s, so nothing is known about growth: soak longer"
        )
    if result.most_queued_records > QUEUED_RECORDS:
        result.problems.append(f"{result.most_queued_records} records waited for a store, bound {QUEUED_RECORDS}")


def show(result: Result) -> None:
    """The report for people."""
    console = Console(width=120)
    table = Table()
    for column in ("process", "samples", "s", "RSS MB", "MB/hour", "descriptors", "verdict"):
        table.add_column(column, justify="left" if column in ("process", "verdict") else "right")
    for name, verdict in result.processes.items():
        memory, fds = verdict["rss_mb"], verdict["fds"]
        words = verdict["problem"] or ("flat" if verdict["judged"] else "lived too short")
        table.add_row(
            name,
            str(verdict["samples"]),
            f"{verdict['seconds']:.0f}",
            f"{memory[0]:.0f} to {memory[1]:.0f}",
            f"{verdict['mb_per_hour']:+.0f}",
            f"{fds[0]} to {fds[1]}",
            words,
        )
    console.print(table)
    console.print(
        f"{sum(result.faults.values())} faults of {len(result.faults)} kinds, {result.promotions} promotions, "
        f"{result.acknowledgements} acknowledgements, {result.operations} operations checked for linearizability; longest "
        f"outage {result.longest_outage:.1f} s, longest recovery {result.longest_recovery:.1f} s; at most "
        f"{result.most_queued_records} records waited for a store; bounds: {RSS_MB_PER_HOUR:.0f} MB an hour, {FDS} descriptors"
        f"; {result.mutants} mutants of the history, unnoticed: {', '.join(result.unnoticed) or 'none'}"
    )
    for line in (*result.violations, *result.problems):
        console.print(line, style="red", highlight=False)


def main() -> int:
    """0: flat and quiet; 1: not; 130: ended early."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description="Random faults on one group at work, for a while."
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--agents", type=int, default=2, help="in each region")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--keep", type=Path, default=None, help="folder for logs and records of faults with violations")
    parser.add_argument("--output", choices=("table", "json"), default="table")
    options = parser.parse_args()
    if why := network.why_not():
        print(json.dumps({"skipped": why}) if options.output == "json" else f"skipped: {why}")
        return 0
    clear_stale(lambda text: print(text, file=sys.stderr))
    network.enter()
    result, whole = Result(options.minutes, find_etcd().version), False
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        asyncio.run(soak(options, result))
        whole = True
    print(json.dumps({**asdict(result), "good": result.good}, indent=2)) if options.output == "json" else show(result)
    if not whole:
        print("ended early; everything that was started is gone", file=sys.stderr)
        return 130
    return 0 if result.good else 1


if __name__ == "__main__":
    sys.exit(main())
