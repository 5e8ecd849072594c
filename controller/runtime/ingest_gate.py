"""What may come in from agents, and how fast: counts, sizes and rates of one stream's holder. Decided in ``domain/rates.py``.

A limit of the group refuses the request as a whole; one of an agent refuses that agent's records alone, the others go on.
Refusals name limit and wait, and are safe to repeat: nothing of what they refuse was taken.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from controller.domain import rates
from controller.domain.model import Frame
from controller.domain.rates import Bucket, Rate
from controller.errors import DrError, Refused, Throttled
from controller.ports import Clock

AGENTS_MAX = 100_000
"""Agents whose rates are remembered. Who falls out begins with a full bucket again: that errs on the generous side."""


@dataclass(frozen=True, slots=True)
class IngestLimits:
    """Rates are per second, 0 = no limit; ``burst_seconds`` of them may come at once."""

    request_max_records: int = 65_535
    body_max_bytes: int = 64 * 2**20
    burst_seconds: float = 2.0
    records_per_second: float = 0.0
    bytes_per_second: float = 0.0
    agent_records_per_second: float = 0.0
    agent_bytes_per_second: float = 0.0


class IngestGate:
    """One per writer. ``check`` before anything is taken."""

    def __init__(self, limits: IngestLimits, clock: Clock) -> None:
        self._limits = limits
        self._clock = clock
        burst = limits.burst_seconds
        self._group = tuple(
            (what, Rate(rate, rate * burst))
            for what, rate in (("records", limits.records_per_second), ("bytes", limits.bytes_per_second))
        )
        self._agent = tuple(
            (what, Rate(rate, rate * burst))
            for what, rate in (("records", limits.agent_records_per_second), ("bytes", limits.agent_bytes_per_second))
        )
        self._agents_limited = any(rate.limited for _, rate in self._agent)
        now = clock.monotonic()
        self._group_buckets = [rates.full(rate, now) for _, rate in self._group]
        self._agent_buckets: OrderedDict[str, list[Bucket]] = OrderedDict()

    def check(self, frames: Sequence[Frame]) -> Mapping[int, DrError]:
        """What is refused alone, by its number. Raises Refused (too many records), Throttled (a limit of the group)."""
        if len(frames) > self._limits.request_max_records:
            raise Refused(
                f"{len(frames)} records in one request, ingest.request_max_records is {self._limits.request_max_records}",
                hint="send fewer records at a time",
            )
        refused: dict[int, DrError] = {}
        for number, frame in enumerate(frames):
            if frame.record.size > self._limits.body_max_bytes:
                refused[number] = Refused(
                    f"the body has {frame.record.size} bytes, stream.body_max_bytes is {self._limits.body_max_bytes}",
                    hint="keep large artefacts in object storage and record their address",
                )
        self._check_group([frame for number, frame in enumerate(frames) if number not in refused])
        if self._agents_limited:
            refused |= self._check_agents(frames, refused)
        return refused

    def _check_group(self, frames: Sequence[Frame]) -> None:
        if not any(rate.limited for _, rate in self._group):
            return
        now = self._clock.monotonic()
        amounts = _amounts(frames)
        _raise_if_late("this stream", self._group, self._group_buckets, amounts, now)
        self._group_buckets = [
            rates.drawn(bucket, rate, amount, now) if rate.limited else bucket
            for bucket, (_, rate), amount in zip(self._group_buckets, self._group, amounts, strict=True)
        ]

    def _check_agents(self, frames: Sequence[Frame], refused: Mapping[int, DrError]) -> dict[int, DrError]:
        now = self._clock.monotonic()
        by_agent: dict[str, list[int]] = {}
        for number, frame in enumerate(frames):
            if number not in refused:
                by_agent.setdefault(frame.record.agent, []).append(number)
        found: dict[int, DrError] = {}
        for agent, numbers in by_agent.items():
            buckets = self._agent_buckets.pop(agent, None) or [rates.full(rate, now) for _, rate in self._agent]
            for at, number in enumerate(numbers):
                amounts = _amounts([frames[number]])
                try:
                    _raise_if_late(f"agent {agent!a}", self._agent, buckets, amounts, now)
                except Throttled as late:
                    found |= dict.fromkeys(numbers[at:], late)  # what comes after may stand on it
                    break
                buckets = [
                    rates.drawn(bucket, rate, amount, now) if rate.limited else bucket
                    for bucket, (_, rate), amount in zip(buckets, self._agent, amounts, strict=True)
                ]
            self._agent_buckets[agent] = buckets
        while len(self._agent_buckets) > AGENTS_MAX:
            self._agent_buckets.popitem(last=False)
        return found


def _amounts(frames: Sequence[Frame]) -> tuple[int, int]:
    return len(frames), sum(len(frame.payload) for frame in frames)


def _raise_if_late(
    who: str, limits: Sequence[tuple[str, Rate]], buckets: Sequence[Bucket], amounts: Sequence[float], now: float
) -> None:
    for (what, rate), bucket, amount in zip(limits, buckets, amounts, strict=True):
        wait = rates.wait_seconds(bucket, rate, amount, now) if rate.limited else 0.0
        if wait > 0:
            wait = math.ceil(wait * 1000) / 1000
            raise Throttled(
                f"{who} may send {rate.per_second:g} {what} a second (bursts of {rate.burst:g}): wait {wait:g} s",
                hint="send the same records again after that time; spread them, or let the operator raise [ingest]",
                retry_after_seconds=wait,
            )
