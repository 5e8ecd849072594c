"""When a sealed object may lie in a region's store: the rule that keeps one region's KMS from being the only way to it. Pure.

A sealed object carries its data key *wrapped* by the KMS of several regions. It must stay readable when any one region is
lost with its store and its KMS. Two wraps are enough for that, whichever they are. With fewer, the object may lie only where
the store and the KMS that opens it are lost together, or neither is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from controller.domain.model import Unknown

ENOUGH_WRAPS = 2
"""Any one of them may be lost."""


@dataclass(frozen=True, slots=True)
class KmsSeen:
    """One region's KMS, as one controller sees it."""

    region: str
    wraps: bool | Unknown
    """Whether it wrapped a data key when it was last asked."""
    since: float
    """Wall time since which it has not; 0: it does, or nobody knows."""
    why: str
    """What it said instead."""
    streams: Mapping[str, float]
    """Stream that this controller seals → wall time since which its data key lacks this region's wrap; 0: it has it."""
    alone: int = 0
    """Objects that this KMS alone opens, of those that this controller has read: at least so many."""
    dead: int = 0
    """Data keys that this KMS once wrapped and does not open any more, of those that this controller has tried there."""


def store_lacks(region: str, wrapped_for: Collection[str]) -> str | None:
    """Why an object whose data key is wrapped by the KMS of ``wrapped_for`` may not be put into the store of ``region``;
    None: it may."""
    if region in wrapped_for or len(wrapped_for) >= ENOUGH_WRAPS:
        return None
    if not wrapped_for:
        return "its data key is wrapped by no region's KMS"
    (only,) = wrapped_for
    return f"its data key is wrapped by the KMS of {only} only: without {only} the copy in {region} could not be opened"


def tenure_lacks(home: str, wrapped_for: Collection[str], missing: Mapping[str, str]) -> str | None:
    """Why no epoch may open in ``home`` with such a data key; None: it may. ``missing``: why each other wrap is not there."""
    lacks = store_lacks(home, wrapped_for)
    if lacks is None:
        return None
    told = "; ".join(f"{region}: {why}" for region, why in sorted(missing.items()))
    return f"nothing can be sealed safely in {home}: {lacks} ({told})"
