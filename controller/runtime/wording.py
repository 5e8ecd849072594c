"""How values are put into words for people: durations, unknowns, losses.

Shared by the status page and ``drctl``. Pure. *Unknown* is always written as such, with the time since it was last known.
"""

from __future__ import annotations

import math

from controller.domain.model import Unknown
from controller.domain.plan import Loss
from controller.domain.text import visible


def duration(seconds: float) -> str:
    """Two units at most: ``0.4 s``, ``42 s``, ``3 min 05 s``, ``2 h 10 min``, ``3 d 4 h``."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 0:
        return f"-{duration(-seconds)}"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def size(count: int) -> str:
    """Bytes for people: ``512 B``, ``87.9 KiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def unknown(value: Unknown, now: float) -> str:
    """``unknown for 1 min 10 s``, or ``never known``."""
    return "never known" if value.since <= 0 else f"unknown for {duration(max(0.0, now - value.since))}"


def count(value: int | Unknown, now: float) -> str:
    """A number with thin groups, or how long it has been unknown."""
    return unknown(value, now) if isinstance(value, Unknown) else f"{value:,}"


def seconds(value: float | Unknown, now: float) -> str:
    """A duration, or how long it has been unknown."""
    return unknown(value, now) if isinstance(value, Unknown) else duration(value)


def role(active: bool, members: int) -> str:
    """What a region does now. One without a live controller is no standby: it is silent."""
    return "active" if active else "standby" if members else "silent"


def yes_no(value: bool | Unknown, now: float) -> str:
    """``yes``, ``no`` or how long it has been unknown."""
    if isinstance(value, Unknown):
        return unknown(value, now)
    return "yes" if value else "no"


def loss_records(loss: Loss) -> str:
    """``41 records``, ``41 records + unknown``."""
    noun = "record" if loss.records == 1 and not loss.records_unknown else "records"
    return f"{loss.records:,} {noun}{' + unknown' if loss.records_unknown else ''}"


def loss_seconds(loss: Loss) -> str:
    """``3.2 s`` when exact, ``at most 3.2 s`` when it is a bound."""
    if loss.exact:
        return duration(loss.seconds)
    # A bound is rounded up, or it would promise too much.
    bound = loss.seconds if not math.isfinite(loss.seconds) else math.ceil(loss.seconds * 10) / 10
    return f"at most {duration(bound if bound < 9.95 or not math.isfinite(bound) else math.ceil(bound))}"


def loss_sentence(loss: Loss) -> str:
    """What would be lost, in one line."""
    if loss.exact and not loss.records and not loss.records_unknown and loss.seconds == 0:
        return f"nothing ({visible(loss.basis)})"
    exact = "exact" if loss.exact else "an upper bound"
    return f"{loss_records(loss)}, {loss_seconds(loss)} ({exact}: {visible(loss.basis)})"
