"""How long a holder may act. A lease alone is no mutual exclusion; this is the half of it that the holder enforces on itself.

The right to act ends, by the holder's own monotonic clock, at

    deadline = time the last successful keep-alive was SENT + TTL − margin

A *heartbeat* is a guarded read, the keep-alive, and the same guarded read again, all under one raft term. Only a complete
heartbeat moves the deadline: a keep-alive answer by itself proves nothing (a leader whose disk hangs goes on answering). The
term of the keep-alive's own answer counts, too: a client that changes members between the three calls may read from the
new leader, be answered by the deposed one, and read from the new one again.
The guarded read compares the create revision of the ``holder`` key and reads it. An answer that is neither yes nor no
never extends the right and never ends it early; a clear no ends it at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from controller.domain.model import Barrier

DRIFT = 0.01
"""By which part a holder's clock may be slower than its waiting successor's: far more than sound machines differ by (a crystal
by less than 0.0002, and NTP slews by no more than 0.0005)."""


class Beat(StrEnum):
    """What a heartbeat proved."""

    EXTENDS = "extends"
    PROVES_NOTHING = "proves-nothing"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class GuardedRead:
    """One guarded read: did the holder key still have our create revision, in which raft term, and which barrier stood."""

    ours: bool
    term: int
    barrier: Barrier | None


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Everything that one heartbeat saw. ``sent_at``: monotonic time just before the keep-alive was sent."""

    before: GuardedRead
    sent_at: float
    ttl_seconds: float
    renewed_in_term: int
    """The raft term of the member that answered the keep-alive: three calls may be answered by three members."""
    after: GuardedRead


@dataclass(frozen=True, slots=True)
class Verdict:
    """``deadline`` is set only when the heartbeat extends the right."""

    beat: Beat
    reason: str
    deadline: float | None = None


def first_deadline(granted_sent_at: float, ttl_seconds: float, margin_seconds: float) -> float:
    """Deadline of a right that begins with an acquisition, counted from when the lease was asked for."""
    return granted_sent_at + ttl_seconds - margin_seconds


def outlives_seconds(lent_seconds: float, ttl_seconds: float) -> float:
    """How long after a holder's key was seen gone its rights may run on, on the waiting successor's clock.

    ``lent_seconds``: what that holder recorded beside its fork; 0: it ended with every right over; negative: not known, then it
    is our own ``ttl_seconds``. The margin does not cover the clocks here: nothing that ends a lease is waited for."""
    return (ttl_seconds if lent_seconds < 0 else lent_seconds) / (1 - DRIFT)


def judge(seen: Heartbeat, *, granted_ttl_seconds: float, margin_seconds: float, drained: bool) -> Verdict:
    """What ``seen`` proves.

    A barrier of a failover stops the extension at once; a barrier of a planned move only once the drain is complete
    (``drained``), because the holder needs its right to drain.
    """
    if not seen.before.ours or not seen.after.ours:
        return Verdict(Beat.LOST, "the holder key is not ours any more")
    if seen.ttl_seconds <= 0:
        return Verdict(Beat.LOST, "the lease is gone")
    terms = (seen.before.term, seen.renewed_in_term, seen.after.term)
    if len(set(terms)) > 1:
        return Verdict(Beat.PROVES_NOTHING, f"three answers under raft terms {', '.join(map(str, terms))}")
    barrier = seen.after.barrier or seen.before.barrier
    if barrier is not None and (barrier.kind == "failover" or drained):
        return Verdict(Beat.PROVES_NOTHING, f"plan {barrier.plan} is taking over")
    ttl = min(seen.ttl_seconds, granted_ttl_seconds)
    return Verdict(Beat.EXTENDS, "heartbeat complete", seen.sent_at + ttl - margin_seconds)


@dataclass(frozen=True, slots=True)
class Right:
    """A right to act. ``deadline`` is monotonic; a right never grows by itself, and once lost it stays lost."""

    epoch: int
    deadline: float
    """Until when the lease was proven to be ours."""
    lost: str = ""
    beyond: float = -math.inf
    """Until when the stores proved that nobody newer serves (``domain.failsafe``): the right goes on so long past the lease."""

    @property
    def ends_at(self) -> float:
        """Monotonic time at which the right, and all that was lent of it, is over."""
        return max(self.deadline, self.beyond)

    def allows(self, now: float) -> bool:
        """Whether acting at ``now`` is allowed."""
        return not self.lost and now < self.ends_at

    def leased(self, now: float) -> bool:
        """Whether it is allowed by the lease itself. Past it nothing may be acknowledged that fewer than two stores have."""
        return not self.lost and now < self.deadline

    def remaining_seconds(self, now: float) -> float:
        """Seconds left, never negative."""
        return 0.0 if self.lost else max(0.0, self.ends_at - now)

    def carried(self, until: float, now: float) -> Right:
        """The right after the stores proved that it may go on ``until`` then. One that is over is not given back."""
        return replace(self, beyond=max(self.beyond, until)) if self.allows(now) else self

    def after(self, verdict: Verdict) -> Right:
        """The right after a heartbeat. A deadline never moves back."""
        if self.lost or verdict.beat is Beat.PROVES_NOTHING:
            return self
        if verdict.beat is Beat.LOST:
            return replace(self, lost=verdict.reason)
        assert verdict.deadline is not None
        return replace(self, deadline=max(self.deadline, verdict.deadline))
