"""What each region's KMS last answered when it was asked to wrap, and since when it has not done so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from controller.domain.model import Unknown
from controller.domain.sealing import KmsSeen
from controller.ports import Clock

KNOWN_SECONDS = 300.0
"""An answer that is older says nothing about now."""


MAX_ALONE = 4096
"""Objects that are remembered as opened by one KMS only."""


@dataclass(slots=True)
class _Answer:
    at: float
    """Monotonic; ``wall`` is the same moment for people."""
    wall: float
    why: str
    since: float
    """Wall time of the first refusal in a row, 0: it wraps."""


class KmsAnswers:
    """One process's own. No region is assumed to be well that was not asked."""

    def __init__(self, regions: Iterable[str], clock: Clock) -> None:
        self._regions = tuple(sorted(regions))
        self._clock = clock
        self._answers: dict[str, _Answer] = {}
        self._alone: dict[tuple[str, str], str] = {}
        """(store, object) → the one region whose KMS opens it."""
        self._dead: dict[str, set[bytes]] = {region: set() for region in self._regions}
        """Region → names of data keys."""

    def note(self, region: str, why: str) -> None:
        """It wrapped (``why`` empty), or did not."""
        before, wall = self._answers.get(region), self._clock.wall()
        since = 0.0 if not why else before.since if before is not None and before.since else wall
        self._answers[region] = _Answer(self._clock.monotonic(), wall, why, since)

    def note_object(self, store: str, key: str, wrapped_for: tuple[str, ...]) -> None:
        """An object that was read. By ``domain.sealing`` one with a single wrap lies in that very region only."""
        if len(wrapped_for) != 1:
            self._alone.pop((store, key), None)
        elif len(self._alone) < MAX_ALONE:
            self._alone[store, key] = wrapped_for[0]

    def note_dead(self, region: str, key: bytes) -> None:
        """Its wrap of this data key does not open, and another region's does."""
        if len(self._dead[region]) < MAX_ALONE:
            self._dead[region].add(key)

    def seen(self, lacking: Mapping[str, Mapping[str, float]]) -> tuple[KmsSeen, ...]:
        """For people. ``lacking``: region → see ``KmsSeen.streams``."""
        alone = Counter(self._alone.values())
        found = (self._one(region, lacking.get(region, {})) for region in self._regions)
        return tuple(replace(one, alone=alone[one.region], dead=len(self._dead[one.region])) for one in found)

    def _one(self, region: str, streams: Mapping[str, float]) -> KmsSeen:
        answer = self._answers.get(region)
        if answer is None:
            return KmsSeen(region, Unknown(0.0, "it was not asked yet"), 0.0, "", streams)
        if self._clock.monotonic() - answer.at > KNOWN_SECONDS:
            return KmsSeen(region, Unknown(answer.wall, "it was not asked since"), answer.since, answer.why, streams)
        return KmsSeen(region, not answer.why, answer.since, answer.why, streams)
