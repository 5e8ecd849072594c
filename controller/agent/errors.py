"""Errors that only agents see. They derive from ``controller.errors``, so code and exit code mean the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence

from controller.domain.model import Ack
from controller.errors import DrError, FenceLost, Unavailable


class Fenced(FenceLost):
    """This copy of the agent must not act any more: its right has passed, or another host has the agent. Stop at once."""

    code = "fenced"


class StaleEpoch(FenceLost):
    """A controller answered under a smaller epoch than one seen before: it was deposed, its answer promises nothing."""

    code = "stale_epoch"


class SpoolFull(Unavailable):
    """No controller answers and the local spool has reached its bound: the record is *not* kept anywhere."""

    code = "spool_full"


class NotAllAcknowledged(Unavailable):
    """At least one record of a ``put_many`` is not acknowledged. ``results``: an Ack or an error per record, in order."""

    code = "not_all_acknowledged"

    def __init__(self, results: Sequence[Ack | DrError]) -> None:
        failed = [item for item in results if isinstance(item, DrError)]
        super().__init__(
            f"{len(failed)} of {len(results)} records are not acknowledged; the first: {failed[0].message}",
            hint="look at .results; sending the same records again is safe",
        )
        self.results = tuple(results)
