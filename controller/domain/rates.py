"""Token buckets: how much may come in per second, and how long to wait otherwise. Time comes in as an argument.

A bucket fills at ``per_second`` up to ``burst``. Something is let in when there is as much in the bucket as it takes, or when
the bucket is full (else what is larger than a bucket could never come in); the bucket may so go below zero, and what comes
after waits for that debt. So the long-run rate holds for every size.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rate:
    """``per_second`` 0: no limit. ``burst``: what may come at once after a quiet time, in the same unit."""

    per_second: float
    burst: float

    @property
    def limited(self) -> bool:
        return self.per_second > 0


@dataclass(frozen=True, slots=True)
class Bucket:
    """``level`` at the time ``at``."""

    level: float
    at: float


def full(rate: Rate, now: float) -> Bucket:
    """The bucket of who was not seen before."""
    return Bucket(rate.burst, now)


def filled(bucket: Bucket, rate: Rate, now: float) -> Bucket:
    """What time has added. A clock that goes back adds nothing."""
    return Bucket(min(rate.burst, bucket.level + rate.per_second * max(0.0, now - bucket.at)), now)


def wait_seconds(bucket: Bucket, rate: Rate, amount: float, now: float) -> float:
    """How long until ``amount`` may come in; 0: now."""
    lacks = min(amount, rate.burst) - filled(bucket, rate, now).level
    return lacks / rate.per_second if lacks > 0 else 0.0


def drawn(bucket: Bucket, rate: Rate, amount: float, now: float) -> Bucket:
    """The bucket after ``amount`` came in."""
    return Bucket(filled(bucket, rate, now).level - amount, now)
