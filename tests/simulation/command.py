"""``make simulate``: random faults from seeds on every core, with all checkers; and how soon they notice each mutant.

    python -m tests.simulation --seeds 2000            # the correct build
    python -m tests.simulation --seed 17               # one of them, with its whole story on a violation
    python -m tests.simulation --failovers 10000       # worlds that move their group ten times each
    python -m tests.simulation --mutants --seeds 300   # every build without one guard, until it is caught

``--marathon`` with ``--seed``, ``--mutants`` or ``--seeds``: worlds of ``marathon.py`` instead of ``runs.py``.

The exit code is 0 when nothing was violated (with ``--mutants``: when every mutant was caught), else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

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


def main(arguments: list[str] | None = None) -> int:
    """Runs what was asked for and returns the exit code."""
    asked = _parser().parse_args(arguments)
    if asked.failovers:
        asked.marathon, asked.seeds = True, -(-asked.failovers // marathon.MOVES)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # loops end with tasks under way: that is the crash, not news
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
    keys, seed, mutant, marathons = what
    run = marathon.run if marathons else runs.run
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    if mutant is None:
        return run(Path(keys), seed)
    case: Case = CASES[mutant]
    patch = pytest.MonkeyPatch()

    def prepare(world: World) -> None:
        case.mutate(patch, world)

    try:
        return run(Path(keys), seed, prepare)
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  (a mutant may end in any way)
        return Outcome(seed, "crash", f"seed {seed}: {error!r}")
    finally:
        patch.undo()


# --------------------------------------------------------------------------------------------------------------- many seeds


def _many(console: Console, keys: Path, asked: argparse.Namespace) -> int:
    began, bad, promotions, acknowledged = time.monotonic(), list[Outcome](), 0, 0
    work: list[Work] = [(str(keys), seed, None, asked.marathon) for seed in range(asked.first, asked.first + asked.seeds)]
    repeat = f"make simulate{' MARATHON=1' if asked.marathon else ''} SEED="
    with _progress(console) as progress:
        task = progress.add_task("seeds", total=len(work), note="")
        for count, outcome in enumerate(_outcomes(work, asked.jobs), start=1):
            promotions += outcome.promotions
            acknowledged += outcome.acknowledged
            if outcome.violation:
                bad.append(outcome)
                progress.console.print(_shortened(outcome.violation), highlight=False, markup=False)
                progress.console.print(f"repeat it: {repeat}{outcome.seed}", highlight=False)
            core_minutes = (time.monotonic() - began) / 60 * asked.jobs
            note = (
                f"{count / core_minutes:.0f} seeds, {promotions / core_minutes:.0f} promotions/min/core, {len(bad)} violations"
            )
            progress.update(task, completed=count, note=note)
    minutes = (time.monotonic() - began) / 60
    print(  # noqa: T201
        f"{len(work)} seeds, {promotions} promotions, {acknowledged} acknowledgements: {len(bad)} violations; "
        f"{minutes:.1f} min, {len(work) / minutes / asked.jobs:.0f} seeds, {promotions / minutes / asked.jobs:.0f} promotions "
        "a minute and core"
    )
    for outcome in bad:
        print(f"[{outcome.checker}] {repeat}{outcome.seed}")  # noqa: T201
    return 1 if bad else 0


def _outcomes(work: list[Work], jobs: int) -> Iterator[Outcome]:
    if jobs == 1:
        yield from map(_play, work)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(_play, work)


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
    with _progress(console) as progress, multiprocessing.get_context("spawn").Pool(asked.jobs) as pool:
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
