"""Counting: CPU of processes, percentiles, medians."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far; 0 when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    fields = stat[stat.rindex(")") + 2 :].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def rss_bytes(pid: int) -> int:
    """Resident memory of a process; 0 when it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def machine_busy_seconds() -> float:
    """CPU time that all processes of this machine used since its start, system and stolen time included."""
    user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICK


class Cpu:
    """CPU seconds by name from its making on. Several processes may share a name."""

    def __init__(self, pids: Mapping[str, Sequence[int]]) -> None:
        self._pids = {**pids, "bench": [os.getpid()]}
        self._before = self._read()
        self._busy = machine_busy_seconds()

    def _read(self) -> dict[str, float]:
        return {name: sum(map(cpu_seconds, pids)) for name, pids in self._pids.items()}

    def spent(self) -> dict[str, float]:
        """Until now."""
        return {name: after - self._before[name] for name, after in self._read().items()}

    def foreign_seconds(self) -> float:
        """What everybody else on this machine used until now: the noise of a measurement."""
        return max(0.0, machine_busy_seconds() - self._busy - sum(self.spent().values()))


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile; NaN without values."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered)) - 1))]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest, highest, and the spread between them in percent of the median."""
    middle = statistics.median(values)
    spread = 100.0 * (max(values) - min(values)) / middle if middle else float("nan")
    return {"median": middle, "low": min(values), "high": max(values), "spread_percent": spread, "rounds": len(values)}
