"""All faults, in the order in which they are played."""

from __future__ import annotations

from tests.faults import distance, refusals
from tests.faults.faults import FAULTS

__all__ = ["FAULTS", "distance", "refusals"]
