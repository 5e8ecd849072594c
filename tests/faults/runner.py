"""Plays faults one after the other on one stage, and judges what happened after each."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from controller.errors import DrError
from controller.lab.etcd import find_etcd
from tests.faults import catalogue
from tests.faults import recorded as seen
from tests.faults.controls import unnoticed
from tests.faults.faults import Fault, Struck, playable
from tests.faults.linear import linearizable
from tests.faults.network import why_no_disks
from tests.faults.people import GaveUp
from tests.faults.stage import Stage
from tests.faults.worker import now
from tests.simulation.checkers import Violation, _region_moved, stores_are_prefixes, violations

RECOVERY_SECONDS = 120.0
"""Bound: after a fault is over the group is whole again (one active, level stores, every agent acknowledged)."""
NOBODY_SECONDS = 30.0
"""For the lease of a lost region to end. 1.4 to 1.8 TTL are usual; when the leader went with it, 2."""


@dataclass
class Row:
    """One line of the table. Times in seconds."""

    fault: str
    what: str
    runs: int = 0
    injected: int = 0
    promotions: int = 0
    violations: list[str] = field(default_factory=list)
    longest_outage: float = 0.0
    """Longest time, from the fault on, in which no agent of any region was acknowledged."""
    longest_recovery: float = 0.0
    """From the end of the fault until the group served again: one active, stores level, every agent acknowledged."""


class Judge:
    """All checkers on everything so far, again after each fault; what was said once is not said again."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._said: set[str] = set()
        self._beliefs: set[str] = set()
        self._judged: dict[str, int] = {}
        self.operations = 0

    def judge(self) -> list[str]:
        """Blocking. New violations, one sentence each."""
        record = self._stage.recorded
        record.collect()
        found = dict(violations(record))
        if found.pop("one-active", ""):  # each moment counts, not only the first one of the run
            new_beliefs = [belief for belief in record.beliefs if belief not in self._beliefs]
            self._beliefs.update(new_beliefs)
            if new_beliefs:
                self._said.discard("one-active")
                found["one-active"] = f"{new_beliefs[0]} ({len(new_beliefs)} moments)"
        extra: list[tuple[str, Callable[[], None]]] = [
            ("stores-are-prefixes", lambda: stores_are_prefixes(record)),
            ("dns-answers", lambda: seen.dns_answers_safe(record.observed)),
            ("reads-whole", lambda: seen.reads_whole(record.observed)),
            ("linearizable", self._linearizable),
        ]
        for name, check in extra:
            try:
                check()
            except Violation as violation:
                found[name] = str(violation)
        new = {name: text for name, text in found.items() if name not in self._said}
        self._said.update(new)
        return [f"{name}: {text}" for name, text in new.items()]

    def _linearizable(self) -> None:
        histories = seen.registers(self._stage.recorded.observed)
        still_open = seen.still_open(self._stage.recorded.observed, histories)
        for key, history in histories.items():
            if key in still_open or self._judged.get(key) == len(history):
                continue
            self._judged[key] = len(history)
            self.operations = sum(self._judged.values())
            if not linearizable(history):
                raise Violation("linearizable", f"no order of the {len(history)} operations on {key} explains their answers")


@dataclass
class Report:
    """What a run found."""

    rows: dict[str, Row] = field(default_factory=dict)
    etcd: str = ""
    """Its version."""
    seconds: float = 0.0
    acknowledgements: int = 0
    operations: int = 0
    transactions: int = 0
    segments: int = 0
    mutants: int = 0
    """Mutants of the recorded histories on which the checkers were tried in the end."""
    unnoticed: list[str] = field(default_factory=list)
    """Mutants that their checker passed over: what the run says is then worth nothing."""
    delay_ms: float = 0.0
    """Of every packet between two regions, each way, during the whole run."""
    skipped: list[str] = field(default_factory=list)
    holes: list[str] = field(default_factory=list)

    @property
    def violations(self) -> int:
        return sum(len(row.violations) for row in self.rows.values())

    def document(self) -> dict[str, Any]:
        """For ``--output json``."""
        return {**asdict(self), "rows": [asdict(row) for row in self.rows.values()], "violations": self.violations}


class Runner:
    """``seed`` decides which region, process or pair a fault takes; what the machine makes of it is its own."""

    def __init__(
        self,
        stage: Stage,
        report: Report,
        say: Callable[[str], None],
        seed: int,
        keep: Path | None = None,
        *,
        judge_seconds: float = 0.0,
    ) -> None:
        """``judge_seconds``: at least so long between two judgements; they take longer the longer the history is."""
        self._stage = stage
        self._report = report
        self._say = say
        self._rng = random.Random(seed)
        self._judge = Judge(stage)
        self._keep = keep
        self._judge_seconds = judge_seconds
        self._judged_at = time.monotonic()

    async def play(self, fault: Fault) -> bool:
        """One fault from strike to verdict. False: the group did not come back, and the stage is of no more use."""
        row = self._report.rows.setdefault(fault.name, Row(fault.name, fault.what))
        began, before = now(), self._promotions()
        struck, problem = Struck(), ""
        try:
            struck = await fault.strike(self._stage, self._rng)
            await self._hold(fault, struck)
        except (GaveUp, DrError, OSError) as error:
            problem = f"while it lasted: {error}"
        usable, recovery = await self._heal(struck)
        if fault.wakes_etcd:
            self._stage.recorded.paused.append((began, now()))
        if recovery is None:
            problem = f"{problem} recovery: {usable}".strip()
        if time.monotonic() - self._judged_at >= self._judge_seconds:
            row.violations += await self.verdict()
        if problem:
            row.violations.append(problem)
        row.runs += 1
        row.injected += struck.injected
        row.promotions += self._promotions() - before
        row.longest_outage = max(row.longest_outage, self._stage.outage(began))
        row.longest_recovery = max(row.longest_recovery, recovery or RECOVERY_SECONDS)
        verdict = "; ".join(row.violations) or "ok"
        self._say(f"{fault.name}: recovered in {recovery or -1:.1f} s, {verdict}")
        if row.violations and self._keep is not None:
            self._stage.keep_records(self._keep / f"{fault.name}-{int(time.time())}")
        return recovery is not None

    async def verdict(self) -> list[str]:
        """New violations in all that happened until now."""
        found = await asyncio.to_thread(self._judge.judge)
        self._judged_at = time.monotonic()
        self._count()
        return found

    async def finish(self, *, controls: bool = True) -> None:
        """The checkers' own test on what this stage has recorded. Only a good history can be spoiled."""
        self._report.holes += self._stage.recorded._watched.holes
        if controls and not self._report.violations:
            self._report.mutants, self._report.unnoticed = await asyncio.to_thread(unnoticed, self._stage.recorded)
            self._say(
                f"{self._report.mutants} mutants of this history were tried, unnoticed: {self._report.unnoticed or 'none'}"
            )

    async def _hold(self, fault: Fault, struck: Struck) -> None:
        until = time.monotonic() + fault.hold_seconds
        if struck.move:
            if await self._stage.nobody(NOBODY_SECONDS):
                await self._stage.fail_over(struck.lost)
            else:
                self._say(f"  {fault.name}: the lease did not end, so nobody moved the group")
        await asyncio.sleep(max(0.0, until - time.monotonic()))

    async def _heal(self, struck: Struck) -> tuple[str, float | None]:
        stage = self._stage
        stage.network.heal()
        try:
            if struck.undo is not None:
                await struck.undo(stage)
            stage.start_all()
            began = now()
            for place in stage.network.places:
                await self._clear(place)
            await stage.settled(RECOVERY_SECONDS, everybody=False)
            recovered = now() - began
            await stage.settled(
                RECOVERY_SECONDS
            )  # before the next fault; how long a process takes to start is not the question
        except (GaveUp, DrError, OSError) as error:
            return str(error), None
        return "", recovered

    async def _clear(self, place: str) -> None:
        for _ in range(50):  # a proxy that was killed is just starting
            try:
                await self._stage.proxy(place, "clear")
                return
            except DrError:
                await asyncio.sleep(0.2)
        raise GaveUp(f"the proxy of {place} does not answer")

    def _promotions(self) -> int:
        moved = [entry for entry in self._stage.recorded.history.transactions if entry.authority is not None]
        return sum(_region_moved(entry) for entry in moved if entry.authority and entry.authority[0] is not None)

    def _count(self) -> None:
        record, report = self._stage.recorded, self._report
        report.acknowledgements = self._base[0] + len(record.acks)
        report.operations = self._base[1] + self._judge.operations
        report.transactions = self._base[2] + len(record.history.transactions)
        report.segments = self._base[3] + sum(len(server.objects) for server in record.servers.values())

    _base: tuple[int, int, int, int] = (0, 0, 0, 0)

    def begin(self) -> None:
        """Counts of earlier stages stay."""
        report = self._report
        self._base = (report.acknowledgements, report.operations, report.transactions, report.segments)


async def play(
    report: Report,
    chosen: Sequence[Fault],
    *,
    runs: int,
    minutes: float,
    seed: int,
    say: Callable[[str], None],
    keep: Path | None = None,
    delay_seconds: float = 0.0,
) -> None:
    """Plays the chosen faults ``runs`` times each, or round and round for ``minutes``; on a new stage when one is of no
    more use. What is found is in ``report`` at any time."""
    began, rng = time.monotonic(), random.Random(seed)
    binary = find_etcd()
    report.etcd = binary.version
    report.delay_ms = delay_seconds * 1000
    chosen, report.skipped = playable(chosen, binary)
    queue: list[Fault] = []
    left = runs
    while True:
        async with Stage(say, disks=not why_no_disks(), delay_seconds=delay_seconds) as stage:
            say(f"group is up after {time.monotonic() - began:.0f} s")
            runner = Runner(stage, report, say, rng.randrange(2**31), keep)
            runner.begin()
            usable = True
            while usable:
                over = time.monotonic() - began > minutes * 60 if minutes else left == 0
                if not queue and not (over and not minutes):
                    queue = rng.sample(list(chosen), len(chosen)) if minutes else list(chosen)
                    left -= 1
                if (minutes and over) or not queue:
                    await runner.finish()
                    return
                usable = await runner.play(queue.pop(0))
                report.seconds = time.monotonic() - began
            await runner.finish(controls=False)


def named(names: Sequence[str]) -> list[Fault]:
    """Faults whose names begin with one of these; all without any. Raises ValueError."""
    chosen = [f for f in catalogue.FAULTS if not names or any(f.name.startswith(name) for name in names)]
    if not chosen:
        raise ValueError(f"no fault is called {', '.join(names)}; there are: {', '.join(f.name for f in catalogue.FAULTS)}")
    return chosen
