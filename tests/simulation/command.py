"""``make simulate``: random faults from seeds on every core, with all checkers; and how soon they notice each mutant.

    python -m tests.simulation --seeds 2000            # the correct build
    python -m tests.simulation --seed 17               # one of them, with its whole story on a violation
    python -m tests.simulation --failovers 10000       # worlds that move their group ten times each
    python -m tests.simulation --mutants --seeds 300   # every build without one guard, until it is caught

``--marathon`` with ``--seed``, ``--mutants`` or ``--seeds``: worlds of ``marathon.py`` instead of ``runs.py``.

SIGINT and SIGTERM end a long run, with one process after the world that is being played, with several at once: it says what
was played until then, and with which ``--first`` it goes on. Violations are written at once, and where nobody watches a
progress bar so is a line every minute.

The exit code is 0 when nothing was violated (with ``--mutants``: when every mutant was caught), 1 when something was, and 130
when nothing was violated in a run that was stopped early.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.simulation import marathon, runs
from tests.simulation.runs import Outcome
from tests.simulation.test_checkers import CASES as CHECKER_CASES
from tests.simulation.test_guards import CASES as GUARD_CASES
from tests.simulation.test_guards import Case
from tests.simulation.world import World, make_keys

CASES = {case.name: case for case in (*GUARD_CASES, *CHECKER_CASES)}
Work = tuple[str, int, str | None, bool]
"""Folder of keys, seed, mutant (None: the correct build), whether it is a marathon."""
SHOWN_LINES = 40
"""Of a story, when many seeds run; ``--seed`` shows all of it."""
REPORT_SECONDS = 60.0
"""Between two lines of a run without a terminal."""
LOOK_SECONDS = 0.5
"""How often a run looks whether it was told to stop."""
COLLECTED_AT = (100_000, 50, 100)
"""Thresholds of the garbage collector: a world is one big heap of things that live as long as it does, and looking through it
again and again is a fifth of what it costs."""
STOPPED = 130
"""Exit code of a run that was stopped early."""


def main(arguments: list[str] | None = None) -> int:
    """Runs what was asked for and returns the exit code."""
    asked = _parser().parse_args(arguments)
    if asked.failovers:
        asked.marathon, asked.seeds = True, -(-asked.failovers // marathon.MOVES)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # loops end with tasks under way: that is the crash, not news
    gc.set_threshold(*COLLECTED_AT)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as directory:
        keys = make_keys(Path(directory))
        if asked.seed is not None:
            return _one(console, keys, asked)
        if asked.mutants or asked.mutant:
            return _mutants(console, keys, [asked.mutant] if asked.mutant else list(CASES), asked)
        return _many(console, keys, asked)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--seeds", type=_positive, default=200, help="how many (default 200)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default 0)")
    parser.add_argument("--seed", type=int, help="exactly this one, in this process, with its whole story")
    parser.add_argument("--failovers", type=_positive, default=0, help="so many moves, ten in a world (implies --marathon)")
    parser.add_argument("--marathon", action="store_true", help="worlds that move their group again and again")
    parser.add_argument("--jobs", type=_positive, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--mutants", action="store_true", help="run each mutant until a checker notices, or --seeds are over")
    parser.add_argument("--mutant", choices=sorted(CASES), help="the same for one of them; with --seed: that seed, mutated")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


# ---------------------------------------------------------------------------------------------------------------- one seed


def _one(console: Console, keys: Path, asked: argparse.Namespace) -> int:
    outcome = _play((str(keys), asked.seed, asked.mutant, asked.marathon))
    if not outcome.violation:
        console.print(
            f"seed {asked.seed}: every promise held; {outcome.acknowledged} acknowledgements, {outcome.promotions} promotions "
            f"in {outcome.virtual_seconds:.0f} virtual seconds",
            highlight=False,
            soft_wrap=True,
        )
        return 0
    print(outcome.violation)  # noqa: T201
    return 1


def _play(what: Work) -> Outcome:
    """One seed of the correct build, or of a mutant. Runs in a worker."""
    began = time.process_time()
    outcome = _played(what)
    gc.collect()  # the world that ended: a long run would hold thousands of them
    return replace(outcome, core_seconds=time.process_time() - began)


def _played(what: Work) -> Outcome:
    keys, seed, mutant, marathons = what
    run = marathon.run if marathons else runs.run
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    patch = pytest.MonkeyPatch()

    def prepare(world: World) -> None:
        if mutant is not None:
            case: Case = CASES[mutant]
            case.mutate(patch, world)

    try:
        return run(Path(keys), seed, prepare)
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  (one seed must not end the others, whatever it was)
        return Outcome(seed, "crash", f"seed {seed}: {error!r}\n{traceback.format_exc()}")
    finally:
        patch.undo()


# --------------------------------------------------------------------------------------------------------------- many seeds


@dataclass
class _Tally:
    """What was played until now."""

    first: int
    asked: int
    began: float = field(default_factory=time.monotonic)
    seeds: int = 0
    next: int = 0
    """Every seed below it was played."""
    promotions: int = 0
    acknowledged: int = 0
    virtual_seconds: float = 0.0
    core_seconds: float = 0.0
    bad: list[Outcome] = field(default_factory=list)
    _ahead: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.next = self.first

    def add(self, outcome: Outcome) -> None:
        self.seeds += 1
        self.promotions += outcome.promotions
        self.acknowledged += outcome.acknowledged
        self.virtual_seconds += outcome.virtual_seconds
        self.core_seconds += outcome.core_seconds
        if outcome.violation:
            self.bad.append(outcome)
        self._ahead.add(outcome.seed)
        while self.next in self._ahead:
            self._ahead.discard(self.next)
            self.next += 1

    @property
    def complete(self) -> bool:
        return self.seeds >= self.asked

    def rate(self) -> str:
        core = max(self.core_seconds, 1e-9)
        return f"{self.promotions / core:.2f} promotions a second of a core"

    def __str__(self) -> str:
        return (
            f"{self.seeds} seeds, {self.promotions} promotions, {self.acknowledged} acknowledgements: {len(self.bad)} "
            f"violations; {(time.monotonic() - self.began) / 60:.1f} min, {self.core_seconds / 60:.1f} min of a core, "
            f"{self.virtual_seconds / 3600:.1f} virtual hours; {self.rate()}, "
            f"{self.core_seconds / max(self.seeds, 1):.2f} s a seed"
        )


class _Stopped:
    """Whether somebody asked to stop (SIGINT, SIGTERM). Handlers are put back when the block ends."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stopped:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        del number, frame
        self.asked = True


def _many(console: Console, keys: Path, asked: argparse.Namespace) -> int:
    repeat = f"make simulate{' MARATHON=1' if asked.marathon else ''} SEED="
    tally = _Tally(asked.first, asked.seeds)
    reported = time.monotonic()
    with _Stopped() as stopped, _progress(console) as progress:
        task = progress.add_task("seeds", total=asked.seeds, note="")
        for outcome in _outcomes(str(keys), asked, stopped):
            if outcome is not None:
                tally.add(outcome)
                if outcome.violation:
                    progress.console.print(_shortened(outcome.violation), highlight=False, markup=False, soft_wrap=True)
                    progress.console.print(f"repeat it: {repeat}{outcome.seed}", highlight=False, soft_wrap=True)
            progress.update(task, completed=tally.seeds, note=f"{tally.rate()}, {len(tally.bad)} violations")
            if not console.is_terminal and time.monotonic() - reported >= REPORT_SECONDS:
                reported = time.monotonic()
                print(f"until now, all below seed {tally.next}: {tally}", flush=True)  # noqa: T201
    print(tally)  # noqa: T201
    for outcome in tally.bad:
        print(f"[{outcome.checker}] {repeat}{outcome.seed}")  # noqa: T201
    if not tally.complete:
        left = asked.first + asked.seeds - tally.next
        print(f"stopped early; it goes on with --first {tally.next} --seeds {left}")  # noqa: T201
    return 1 if tally.bad else 0 if tally.complete else STOPPED


def _outcomes(keys: str, asked: argparse.Namespace, stopped: _Stopped) -> Iterator[Outcome | None]:
    """Each seed's outcome as soon as it is there, and None now and then. Ends early when somebody asks to stop."""
    work = ((keys, seed, None, asked.marathon) for seed in range(asked.first, asked.first + asked.seeds))
    if asked.jobs == 1:
        for what in work:
            if stopped.asked:
                return
            yield _play(what)
        return
    with multiprocessing.get_context("spawn").Pool(asked.jobs, _begin) as pool:
        outcomes = pool.imap_unordered(_play, work)
        while not stopped.asked:
            try:
                yield outcomes.next(LOOK_SECONDS)
            except multiprocessing.TimeoutError:
                yield None
            except StopIteration:
                return


def _begin() -> None:
    """Ctrl-C reaches every process of the terminal; who started this one decides when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.set_threshold(*COLLECTED_AT)


def _progress(console: Console) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    return Progress(*columns, console=console, transient=True)


def _shortened(violation: str) -> str:
    lines = violation.splitlines()
    return "\n".join(lines if len(lines) <= SHOWN_LINES else [*lines[:3], "…", *lines[-SHOWN_LINES:]])


# ----------------------------------------------------------------------------------------------------------------- mutants


def _mutants(console: Console, keys: Path, names: list[str], asked: argparse.Namespace) -> int:
    """A line per mutant: who noticed, after how many seeds. Chance is blind in places: its stories catch every one of them."""
    missed = 0
    work = [(str(keys), name, asked.first, asked.seeds, asked.marathon) for name in names]
    with _progress(console) as progress, multiprocessing.get_context("spawn").Pool(asked.jobs, _begin) as pool:
        task = progress.add_task("mutants", total=len(work), note="")
        for name, outcome, runs in pool.imap(_until_caught, work):
            missed += not outcome.violation
            by = (
                f"`{outcome.checker}` after {runs} seeds (SEED={outcome.seed})" if outcome.violation else f"not in {runs} seeds"
            )
            print(f"| `{name}` | {by} |", flush=True)  # noqa: T201
            progress.advance(task)
    print(f"{len(names) - missed} of {len(names)} mutants caught by random seeds")  # noqa: T201
    return 1 if missed else 0


def _until_caught(what: tuple[str, str, int, int, bool]) -> tuple[str, Outcome, int]:
    keys, name, first, seeds, marathons = what
    outcome = Outcome(first)
    for seed in range(first, first + seeds):
        outcome = _play((keys, seed, name, marathons))
        if outcome.violation:
            return name, outcome, seed - first + 1
    return name, outcome, seeds
