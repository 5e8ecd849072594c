"""Does a process grow? Samples go in, a verdict comes out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WARM_UP_SECONDS = 180.0
"""Caches fill, the interpreter's heap takes its size, every path has been taken once."""
LEAST_SECONDS = 120.0
"""A process that was looked at for less, after its warm-up, is not judged."""
RSS_MB_PER_HOUR = 60.0
"""Bound of the slope of resident memory. A leak of one record of 400 bytes per write, at ten writes a second, is 14 MB an hour
in each of six controllers; what ten minutes tell of the slope of a process that only allocates and frees is worth less."""
FDS = 24
"""Descriptors by which the last third of the samples may exceed the first. A standby that becomes the holder opens 13 more."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at one process. ``at``: seconds since it was first seen."""

    at: float
    rss_mb: float
    fds: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """``problem`` "" = flat; ``judged`` False: it did not live long enough to tell."""

    samples: int
    seconds: float
    rss_mb: tuple[float, float]
    """First and last, medians of a third of the samples."""
    mb_per_hour: float
    fds: tuple[int, int]
    judged: bool
    problem: str


def look(pid: int, at: float) -> Sample | None:
    """From /proc; None when it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        fds = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except (OSError, IndexError):
        return None
    return Sample(at, pages * 4096 / 2**20, fds)


def slope(samples: Sequence[Sample]) -> float:
    """MB an hour after Theil and Sen: the median of the slopes of all pairs, which a few spikes do not move."""
    thinned = samples[:: max(1, len(samples) // 120)]
    slopes = [(b.rss_mb - a.rss_mb) / (b.at - a.at) for n, a in enumerate(thinned) for b in thinned[n + 1 :] if b.at > a.at]
    return statistics.median(slopes) * 3600 if slopes else 0.0


def judge(samples: Sequence[Sample], *, warm_up_seconds: float = WARM_UP_SECONDS) -> Verdict:
    """What is known of one life of one process."""
    kept = [sample for sample in samples if sample.at >= warm_up_seconds]
    seconds = kept[-1].at - kept[0].at if kept else 0.0
    third = max(1, len(kept) // 3)
    first, last = kept[:third], kept[-third:]
    rss = (_median([s.rss_mb for s in first]), _median([s.rss_mb for s in last]))
    fds = (int(_median([s.fds for s in first])), int(_median([s.fds for s in last])))
    judged, per_hour = seconds >= LEAST_SECONDS, slope(kept)
    problems = []
    if judged and per_hour > RSS_MB_PER_HOUR:
        problems.append(f"memory grows by {per_hour:.0f} MB an hour, bound {RSS_MB_PER_HOUR:.0f}")
    if judged and fds[1] > fds[0] + FDS:
        problems.append(f"descriptors went from {fds[0]} to {fds[1]}")
    return Verdict(len(kept), seconds, rss, per_hour, fds, judged, "; ".join(problems))


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0
