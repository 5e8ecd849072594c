"""What a run of many failovers writes down after each of them, and the table that is made of it, at any time, by anybody.

One JSON object a line. ``failover``: somebody else took over and an agent was acknowledged by it. ``verdict``: what the
checkers said of the whole history of one group so far; the last one of a group counts. ``mutants``: their own test on it.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from tests.faults.partitions import BETWEEN, INSIDE

PHASES = ("ready", "strike", "lease", "acquire", "serve", "finish", "heal")
"""Of one cycle, in seconds: until somebody could take over; the cut is made; until the key was gone; until there was a new one;
until an agent was acknowledged; until a plan had ended, if there was one; the cut is mended."""


class Journal:
    """A file of lines; each is written out before the next fault begins. ``run`` tells runs side by side apart."""

    def __init__(self, file: TextIO, run: str) -> None:
        self._file = file
        self._run = run
        self._began = time.monotonic()
        self.lines: list[dict[str, Any]] = []
        """All of this run: a few hundred bytes for each failover."""

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self._began

    def note(self, what: str, **fields: Any) -> None:
        """One line."""
        line = {"what": what, "run": self._run, "at": round(self.seconds, 2), **fields}
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def lines_of(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Of all journals; a line that was cut off is left out."""
    found = []
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of all does not exceed; 0 without any."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


@dataclass
class Row:
    """One partition, or all of a kind."""

    took: list[float] = field(default_factory=list)
    """Seconds from the cut to the first acknowledgement of the successor, of each failover."""

    @property
    def cells(self) -> list[str]:
        seconds = (percentile(self.took, 0.5), percentile(self.took, 0.99), max(self.took, default=0.0))
        return [str(len(self.took)), *(f"{s:.1f}" if self.took else "" for s in seconds)]


class Tally:
    """Everything that journals say."""

    def __init__(self, lines: Sequence[dict[str, Any]]) -> None:
        self.rows: dict[tuple[str, str], Row] = {}
        """(kind, partition)"""
        self.kinds = {INSIDE: Row(), BETWEEN: Row()}
        self.all = Row()
        self.unstarted = [line["text"] for line in lines if line["what"] == "unstarted"]
        self.problems = [line["text"] for line in lines if line["what"] == "problem"]
        self.seconds = sum(_spans(lines).values())
        """Of all runs together, starts and judgements included, whether they were side by side or not."""
        verdicts = {line["group"]: line for line in lines if line["what"] == "verdict"}
        self.violations = [text for line in lines if line["what"] == "verdict" for text in line["violations"]]
        self.judged = sum(line["failovers"] for line in verdicts.values())
        self.groups = len({line["group"] for line in lines if line["what"] in ("failover", "verdict")})
        self.counts = Counter[str]()
        for line in verdicts.values():
            self.counts.update({name: line[name] for name in ("operations", "acknowledgements", "transactions", "segments")})
        self.holes = [hole for line in verdicts.values() for hole in line["holes"]]
        tried = [line for line in lines if line["what"] == "mutants"]
        self.mutants = sum(line["tried"] for line in tried)
        self.unnoticed = [text for line in tried for text in line["unnoticed"]]
        self.rss_mb = max((line["rss_mb"] for line in verdicts.values()), default=0.0)
        self.phases: dict[str, dict[str, list[float]]] = {INSIDE: {}, BETWEEN: {}}
        for line in lines:
            if line["what"] == "failover":
                self._count(line)

    def _count(self, line: dict[str, Any]) -> None:
        row = self.rows.setdefault((line["kind"], line["partition"]), Row())
        for one in (row, self.kinds[line["kind"]], self.all):
            one.took.append(line["took"])
        for phase, seconds in line["phases"].items():
            self.phases[line["kind"]].setdefault(phase, []).append(seconds)

    @property
    def good(self) -> bool:
        """Nothing was violated, every failover was judged, and every mutant was noticed."""
        return not (self.violations or self.problems or self.unnoticed) and self.judged == len(self.all.took) > 0

    def document(self) -> dict[str, Any]:
        """For ``--output json``."""
        return {
            "failovers": {kind: len(row.took) for kind, row in self.kinds.items()},
            "judged": self.judged,
            "seconds": self.seconds,
            "groups": self.groups,
            "took": {kind: _spread(row.took) for kind, row in (*self.kinds.items(), ("all", self.all))},
            "phases": {kind: {name: _spread(found) for name, found in each.items()} for kind, each in self.phases.items()},
            "rows": [
                {"kind": kind, "partition": name, "failovers": len(row.took), **_spread(row.took)}
                for (kind, name), row in sorted(self.rows.items())
            ],
            **self.counts,
            "violations": self.violations,
            "problems": self.problems,
            "unstarted": self.unstarted,
            "mutants": self.mutants,
            "unnoticed": self.unnoticed,
            "holes": self.holes,
            "rss_mb": self.rss_mb,
        }

    def show(self) -> None:
        """The table, and what the checkers said."""
        table = Table(title=None)
        columns = ("kind", "partition", "failovers", "median s", "p99 s", "longest s")
        for column in columns:
            table.add_column(column, justify="left" if column in columns[:2] else "right")
        for (kind, name), row in sorted(self.rows.items(), reverse=True):
            table.add_row(kind, name, *row.cells)
        for kind, row in self.kinds.items():
            table.add_row(kind, "all", *row.cells, style="bold")
        table.add_row("", "all", *self.all.cells, style="bold")
        console = Console(width=120)
        console.print(table)
        done = len(self.all.took)
        hourly = done / self.seconds * 3600 if self.seconds else 0.0
        console.print(
            f"{done} failovers, {hourly:.0f} an hour for each run at a time; {self.groups} groups; judged: {self.judged} "
            f"failovers, {self.counts['operations']} operations for linearizability, {self.counts['acknowledgements']} "
            f"acknowledgements, {self.counts['transactions']} transactions, {self.counts['segments']} segment objects; "
            f"violations: {len(self.violations) + len(self.problems)}; {self.mutants} mutants of the histories, "
            f"unnoticed: {', '.join(self.unnoticed) or 'none'}; at most {self.rss_mb:.0f} MB of memory for one group's history",
            highlight=False,
        )
        for kind, found in self.phases.items():
            parts = [f"{name} {percentile(found[name], 0.5):.1f}" for name in PHASES if name in found]
            if parts:
                console.print(f"median seconds of a cycle, {kind}: {', '.join(parts)}", highlight=False)
        for text in (*self.violations, *self.problems):
            console.print(f"[red]violation[/red]: {text}", highlight=False)
        for text in self.unstarted:
            console.print(f"a group did not come up: {text}", highlight=False)
        for hole in self.holes:
            console.print(f"revisions that no watcher had in time: {hole}")


def _spans(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Run -> seconds that it has taken so far."""
    spans: dict[str, float] = {}
    for line in lines:
        spans[line["run"]] = max(spans.get(line["run"], 0.0), line["at"])
    return spans


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile, longest; rounded."""
    found = {"median": percentile(seconds, 0.5), "p99": percentile(seconds, 0.99), "longest": max(seconds, default=0.0)}
    return {name: round(value, 2) for name, value in found.items()}
