"""Numbers and tables as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

EXACT_BELOW_SECONDS = 0.01


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """First column to the left, the others to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines) + "\n"


def number(value: float | None, digits: int = 0) -> str:
    """With thousands separated; a dash for what there is not."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.{digits}f}"


def ms(seconds: float | None) -> str:
    """Milliseconds, with a decimal when there are few."""
    return number(None if seconds is None else 1e3 * seconds, 0 if (seconds or 0) >= EXACT_BELOW_SECONDS else 1)


def spread(one: dict[str, float], digits: int = 0) -> str:
    """Median (lowest to highest)."""
    if one["rounds"] == 1:
        return number(one["median"], digits)
    return f"{number(one['median'], digits)} ({number(one['low'], digits)} to {number(one['high'], digits)})"
