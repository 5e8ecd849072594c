"""``make faults``: real processes, real partitions. ``python -m tests.faults --help``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # else gRPC says at every start of a process that it skipped something

from rich.console import Console
from rich.table import Table

from tests.faults import failover_command, network
from tests.faults.catalogue import FAULTS
from tests.faults.runner import Report, named, play
from tests.faults.stale import clear_stale


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description="Breaks a real group (etcd, controllers, stores, DNS; each region in a network namespace) in every way on "
        "the list, and checks what happened with the checkers of the simulation. Needs root on Linux.",
    )
    parser.add_argument("--only", default="", help="faults to play, by the beginning of their names, separated by commas")
    parser.add_argument("--runs", type=int, default=1, help="how often each is played")
    parser.add_argument("--minutes", type=float, default=0.0, help="instead of --runs: round and round, in random order")
    parser.add_argument("--seed", type=int, default=None, help="decides which region or process a fault takes")
    parser.add_argument("--keep", type=Path, default=None, help="folder for logs and records of faults with violations")
    parser.add_argument(
        "--delay-ms",
        type=float,
        default=0.0,
        help="each way between two regions during the whole run; 40 = 80 ms there and back",
    )
    parser.add_argument("--output", choices=("table", "json"), default="table")
    parser.add_argument("--list", action="store_true", help="print the faults and end")
    failover_command.add_arguments(parser)
    return parser.parse_args()


def show(report: Report) -> None:
    """The table."""
    table = Table(title=None)
    for column in ("fault", "runs", "injected", "promotions", "violations", "longest outage s", "longest recovery s"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    for row in report.rows.values():
        numbers = (row.runs, row.injected, row.promotions, len(row.violations))
        table.add_row(row.fault, *map(str, numbers), f"{row.longest_outage:.1f}", f"{row.longest_recovery:.1f}")
    rows = report.rows.values()
    total = (sum(r.runs for r in rows), sum(r.injected for r in rows), sum(r.promotions for r in rows), report.violations)
    longest = (max((r.longest_outage for r in rows), default=0), max((r.longest_recovery for r in rows), default=0))
    table.add_row("all", *map(str, total), *(f"{seconds:.1f}" for seconds in longest), style="bold")
    console = Console(width=120)
    console.print(table)
    console.print(
        f"{report.seconds:.0f} s, etcd {report.etcd}, {report.delay_ms:g} ms each way between regions; "
        f"checked: {report.acknowledgements} acknowledgements, {report.operations} operations for "
        f"linearizability, {report.transactions} transactions, {report.segments} segment objects; {report.mutants} mutants of "
        f"the history, unnoticed: {', '.join(report.unnoticed) or 'none'}"
    )
    for row in rows:
        for violation in row.violations:
            console.print(f"[red]{row.fault}[/red]: {violation}", highlight=False)
    for line in (*report.skipped, *(f"revisions that no watcher had in time: {hole}" for hole in report.holes)):
        console.print(line)


async def run(options: argparse.Namespace, report: Report) -> None:
    """Until it is done; SIGTERM ends it as Ctrl-C does."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    seed = options.seed if options.seed is not None else int(time.time())
    say(f"seed {seed}")
    chosen = named([name for name in options.only.split(",") if name])
    await play(
        report,
        chosen,
        runs=options.runs,
        minutes=options.minutes,
        seed=seed,
        say=say,
        keep=options.keep,
        delay_seconds=options.delay_ms / 1000,
    )


def main() -> int:
    """0: no violation; 1: there was one; 2: wrong words; 130: ended early."""
    options = arguments()
    if options.list:
        for fault in FAULTS:
            print(f"{fault.name:28} {fault.what}")
        return 0
    if options.failovers or options.merge:
        return failover_command.main(options)
    try:
        named([name for name in options.only.split(",") if name])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if why := network.why_not():
        print(json.dumps({"skipped": why}) if options.output == "json" else f"skipped: {why}")
        return 0
    clear_stale(lambda text: print(text, file=sys.stderr))
    network.enter()
    report, whole = Report(), False
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        asyncio.run(run(options, report))
        whole = True
    print(json.dumps(report.document(), indent=2)) if options.output == "json" else show(report)
    if not whole:
        print("ended early; everything that was started is gone", file=sys.stderr)
        return 130
    return 1 if report.violations or report.unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
