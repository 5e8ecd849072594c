"""``make faults ARGS="--failovers N"``: the command's part of ``failovers.py``, and several groups side by side."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.faults import network
from tests.faults.failovers import Wanted, play_many
from tests.faults.partitions import chosen
from tests.faults.stale import clear_stale
from tests.faults.tally import Journal, Tally, lines_of
from tests.faults.unguarded import CONTROLS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this mode."""
    many = parser.add_argument_group("very many failovers")
    many.add_argument("--failovers", type=int, default=0, help="make so many; --only: partitions' names")
    many.add_argument("--groups", type=int, default=1, help="so many groups side by side, each with namespaces of its own")
    many.add_argument("--per-group", type=int, default=100, help="a group ends after so many, and a new one begins")
    many.add_argument("--judge-every", type=int, default=25, help="failovers between two verdicts on a group's whole history")
    many.add_argument("--journal", type=Path, default=None, help="a line after each failover; --groups: a folder")
    many.add_argument("--merge", type=Path, nargs="+", default=[], help="only print the table of these journals")
    many.add_argument("--control", choices=sorted(CONTROLS), default=None, help="controllers lack this guard: it must show")


def main(options: argparse.Namespace) -> int:
    """0: nothing violated (a control: something was); 1: violated (a control: nothing); 2: wrong words; 130: ended early."""
    if options.merge:
        return _report(Tally(lines_of(options.merge)), options, whole=True)
    try:
        partitions = chosen(options.only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if why := network.why_not():
        print(json.dumps({"skipped": why}) if options.output == "json" else f"skipped: {why}")
        return 0
    seed = options.seed if options.seed is not None else int(time.time())
    if options.groups > 1:
        return _side_by_side(options, seed)
    clear_stale(lambda text: print(text, file=sys.stderr))
    network.enter()
    wanted = Wanted(
        options.failovers,
        partitions,
        options.per_group,
        options.judge_every,
        program=("tests.faults.unguarded", "--without", options.control) if options.control else ("controller",),
        keep=options.keep,
        stop_at_violation=bool(options.control),
    )
    whole = False
    with _journal(options.journal or Path(os.devnull), str(seed)) as journal:

        def say(text: str) -> None:
            print(f"{journal.seconds:6.0f} s  {seed}: {text}", file=sys.stderr, flush=True)

        with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
            asyncio.run(_run(wanted, journal, seed, say))
            whole = True
        return _report(Tally(journal.lines), options, whole=whole)


@contextlib.contextmanager
def _journal(path: Path, run: str) -> Iterator[Journal]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        yield Journal(file, run)


async def _run(wanted: Wanted, journal: Journal, seed: int, say: Callable[[str], None]) -> None:
    """Until it is done; SIGTERM ends it as Ctrl-C does: once politely."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    await play_many(wanted, journal, seed, say)


def _side_by_side(options: argparse.Namespace, seed: int) -> int:
    """One process for each group; the report is made of what all of them wrote down."""
    folder = options.journal or Path(tempfile.mkdtemp(prefix="dr-failovers-"))
    folder.mkdir(parents=True, exist_ok=True)
    journals = [folder / f"group-{seed + number}.jsonl" for number in range(options.groups)]
    runs = []
    for number, journal in enumerate(journals):
        share = options.failovers // options.groups + (number < options.failovers % options.groups)
        words = _words(options, share, seed + number, journal)
        argv = [sys.executable, "-m", "tests.faults", *words]
        # In sessions of their own: Ctrl-C reaches us alone, and each of them is asked to end once.
        runs.append(subprocess.Popen(argv, stdout=subprocess.DEVNULL, start_new_session=True))

    def end(number: int, frame: object) -> None:
        for run in runs:
            if run.poll() is None:
                run.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    began = time.monotonic()
    codes = [run.wait() for run in runs]
    print(f"{options.groups} groups side by side for {time.monotonic() - began:.0f} s", file=sys.stderr)
    return _report(Tally(lines_of(journals)), options, whole=all(code in (0, 1) for code in codes))


def _words(options: argparse.Namespace, share: int, seed: int, journal: Path) -> Sequence[str]:
    words = ["--failovers", str(share), "--seed", str(seed), "--journal", str(journal), "--only", options.only]
    words += ["--per-group", str(options.per_group), "--judge-every", str(options.judge_every)]
    words += ["--keep", str(options.keep)] if options.keep else []
    return words + (["--control", options.control] if options.control else [])


def _report(tally: Tally, options: argparse.Namespace, *, whole: bool) -> int:
    print(json.dumps(tally.document(), indent=2)) if options.output == "json" else tally.show()
    if not whole:
        print("ended early; everything that was started is gone", file=sys.stderr)
        return 130
    if options.control:
        checker = CONTROLS[options.control].checker
        found = any(text.startswith(checker) for text in tally.violations)
        print(f"control without {options.control}: {checker} noticed {'it' if found else 'NOTHING'}", file=sys.stderr)
        return 0 if found else 1
    return 0 if tally.good else 1
