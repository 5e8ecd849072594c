"""Rates at ingest: buckets, what is refused alone and what as a whole, and what the refusal says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.domain import rates
from controller.domain.model import Frame
from controller.domain.rates import Bucket, Rate
from controller.errors import Refused, Throttled
from controller.runtime.ingest_gate import IngestGate, IngestLimits
from controller.stream.segment import frame


class Hand:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.at = 100.0

    def monotonic(self) -> float:
        return self.at

    def wall(self) -> float:
        return self.at

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("a gate never sleeps")


def records(*names: str, size: int = 100) -> list[Frame]:
    return [frame(name, f"r{number}", "checkpoint", bytes(range(64)) * size) for number, name in enumerate(names)]


def test_a_bucket_that_is_full_lets_anything_in_and_then_asks_for_the_debt() -> None:
    rate = Rate(10.0, 20.0)
    bucket = rates.full(rate, 0.0)
    assert rates.wait_seconds(bucket, rate, 500.0, 0.0) == 0.0
    bucket = rates.drawn(bucket, rate, 500.0, 0.0)
    assert rates.wait_seconds(bucket, rate, 1.0, 0.0) == pytest.approx(48.1)
    assert rates.wait_seconds(bucket, rate, 1.0, 48.1) == pytest.approx(0.0, abs=1e-9)


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0.1, 50)), max_size=60), st.floats(0.5, 20), st.floats(1, 40))
def test_over_any_time_no_more_comes_in_than_burst_and_rate_allow(
    arrivals: list[tuple[float, float]], per_second: float, burst: float
) -> None:
    rate, now, bucket = Rate(per_second, burst), 0.0, Bucket(burst, 0.0)
    taken: list[tuple[float, float]] = []
    for pause, amount in arrivals:
        now += pause
        wait = rates.wait_seconds(bucket, rate, amount, now)
        assert wait >= 0
        if wait == 0:
            bucket = rates.drawn(bucket, rate, amount, now)
            taken.append((now, amount))
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            came = sum(amount for _, amount in taken[first : last + 1])
            largest = taken[last][1]
            assert came <= burst + per_second * (taken[last][0] - taken[first][0]) + largest + 1e-6


def test_a_clock_that_goes_back_fills_no_bucket() -> None:
    rate = Rate(10.0, 20.0)
    assert rates.filled(Bucket(3.0, 100.0), rate, 50.0).level == 3.0


def test_without_limits_everything_comes_in() -> None:
    gate = IngestGate(IngestLimits(), Hand())
    for _ in range(50):
        assert gate.check(records(*(["a"] * 200))) == {}


def test_a_limit_of_the_group_refuses_the_request_with_limit_and_wait_and_lets_it_in_after_that() -> None:
    clock = Hand()
    gate = IngestGate(IngestLimits(records_per_second=10.0), clock)
    assert gate.check(records(*(["a"] * 20))) == {}
    with pytest.raises(Throttled, match=r"may send 10 records a second \(bursts of 20\): wait 0.5 s") as caught:
        gate.check(records(*"abcde"))
    assert caught.value.http_status == 429
    assert caught.value.to_dict()["retry_after_seconds"] == 0.5
    clock.at += caught.value.retry_after_seconds
    assert gate.check(records(*"abcde")) == {}


def test_bytes_are_limited_as_they_travel() -> None:
    clock = Hand()
    made = records("a", size=2000)
    size = len(made[0].payload)
    gate = IngestGate(IngestLimits(bytes_per_second=float(size), burst_seconds=1.0), clock)
    assert gate.check(made) == {}
    with pytest.raises(Throttled, match="bytes a second"):
        gate.check(made)


def test_a_limit_of_an_agent_refuses_that_agent_alone_from_the_first_record_that_is_too_much() -> None:
    clock = Hand()
    gate = IngestGate(IngestLimits(agent_records_per_second=1.0), clock)
    refused = gate.check(records("loud", "quiet", "loud", "loud", "loud", "quiet"))
    assert sorted(refused) == [3, 4]
    assert "agent 'loud' may send 1 records a second" in str(refused[3])
    clock.at += 1.0
    assert sorted(gate.check(records("loud", "loud"))) == [1]


def test_bodies_and_numbers_of_records_have_bounds_of_their_own() -> None:
    gate = IngestGate(IngestLimits(request_max_records=3, body_max_bytes=5000), Hand())
    refused = gate.check([*records("a"), *records("b", size=10)])
    assert list(refused) == [0]
    assert "stream.body_max_bytes is 5000" in str(refused[0])
    with pytest.raises(Refused, match="request_max_records is 3"):
        gate.check(records(*"abcd"))
