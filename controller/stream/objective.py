"""The policy ``enforce``: a holder that stops acknowledging before more could be lost than the recovery point objective allows.

What is lost with a store is what was acknowledged and only that store has. Its span, from the receipt of the oldest such record
to the acknowledgement of the last, never passes the objective, because no acknowledgement is given that would make it longer
(``domain.lag.beyond_objective``). Time alone cannot lengthen it: while nothing is acknowledged nothing more is lost. Records
that two stores have are acknowledged as always, and the state ends by itself when another store catches up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from controller.domain import lag
from controller.domain.model import Unknown
from controller.stream.backlog import Marks
from controller.stream.pump import Pump


class Objective:
    """Of one stream. ``rpo_seconds`` None: the policy is ``alert`` and nothing is ever held back."""

    def __init__(
        self, rpo_seconds: float | None, pumps: Mapping[str, Pump], marks: Marks, first_seq: int, now: Callable[[], float]
    ) -> None:
        self._rpo_seconds = rpo_seconds
        self._pumps = pumps
        self._marks = marks
        self._first_seq = first_seq
        self._now = now
        self._known_at = now()
        self.since: float | None = None
        """Since when acknowledgements are held back (the holder's time); None: they are not."""

    @property
    def enforced(self) -> bool:
        """Whether the policy is ``enforce``."""
        return self._rpo_seconds is not None

    def problem(self, last_seq: int) -> str | None:
        """Why nothing more may be acknowledged that only one store has, of segments up to ``last_seq``; None: it may."""
        if self._rpo_seconds is None:
            return None
        now = self._now()
        why = lag.beyond_objective(self._exposed_since(last_seq), now, self._rpo_seconds)
        if why is None:
            self.since = None
            return None
        if self.since is None:
            self.since = now
        return f"not acknowledging for {now - self.since:.1f} s: {why}"

    def second_seq(self) -> int | None:
        """Last segment that two stores have for certain; None when it is not known (what is known was checked to be a prefix of
        our history, and a store loses nothing of it when it falls silent)."""
        known = sorted((pump.seq for pump in self._pumps.values() if pump.head is not None), reverse=True)
        if len(known) < 2 or known[1] < self._first_seq - 1:
            return None
        return known[1]

    def _exposed_since(self, last_seq: int) -> float | Unknown | None:
        second = self.second_seq()
        if second is None:
            return Unknown(self._known_at, "no second store is known to have the history up to this epoch")
        self._known_at = self._now()
        return None if second >= last_seq else self._marks.received_after(second)
