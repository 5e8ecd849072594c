"""The right to act: counted from when the request was sent, only ever extended, and never revived for old work."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.agent import Fenced, Right
from controller.errors import FenceLost


class HandClock:
    """Time stands still until the test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_without_an_answer_there_is_no_right() -> None:
    right = Right(HandClock())
    with pytest.raises(Fenced, match="never granted") as fenced:
        right.check()
    assert isinstance(fenced.value, FenceLost)
    with pytest.raises(Fenced):
        right.hold()


def test_a_right_counts_from_when_the_request_was_sent_not_from_its_answer() -> None:
    clock = HandClock()
    right = Right(clock)
    sent_at = clock.now
    clock.now += 2.0  # the answer took two seconds
    right.extend(sent_at, 3.0)
    assert right.remaining() == pytest.approx(1.0)
    clock.now += 1.0
    with pytest.raises(Fenced):
        right.check()


def test_an_answer_that_arrives_after_its_right_gives_none() -> None:
    clock = HandClock()
    right = Right(clock)
    sent_at = clock.now
    clock.now += 5.0
    right.extend(sent_at, 3.0)
    with pytest.raises(Fenced):
        right.check()


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_nonsense_never_extends(seconds: float) -> None:
    right = Right(HandClock())
    right.extend(100.0, seconds)
    assert right.remaining() == 0.0


def test_a_request_from_the_future_never_extends() -> None:
    right = Right(HandClock())
    right.extend(200.0, 5.0)
    assert right.remaining() == 0.0


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(-1, 10), st.floats(0, 3)), max_size=30))
def test_answers_only_ever_extend(answers: list[tuple[float, float, float]]) -> None:
    clock = HandClock()
    right = Right(clock)
    for age, seconds, pause in answers:
        before = clock.now + right.remaining()
        right.extend(clock.now - age, seconds)
        assert clock.now + right.remaining() >= before or right.remaining() == 0.0
        clock.now += pause


def test_work_that_began_before_a_gap_is_over_even_when_the_right_comes_back() -> None:
    clock = HandClock()
    right = Right(clock)
    right.extend(clock.now, 5.0)
    old = right.hold()
    old.check()
    clock.now += 60.0  # the process was paused; nobody checked anything meanwhile
    right.extend(clock.now, 5.0)  # the answer to its own heartbeat
    right.check()
    with pytest.raises(Fenced, match="granted anew"):
        old.check()
    right.hold().check()
    assert old.over()


def test_work_goes_on_while_answers_come_in_time() -> None:
    clock = HandClock()
    right = Right(clock)
    right.extend(clock.now, 5.0)
    hold = right.hold()
    for _ in range(20):
        clock.now += 4.0
        right.extend(clock.now - 0.5, 5.0)
        hold.check()
    assert right.term == 1


def test_a_revoked_hold_is_over_though_the_right_stands() -> None:
    clock = HandClock()
    right = Right(clock)
    right.extend(clock.now, 5.0)
    hold = right.hold()
    hold.revoke("another host has the agent")
    with pytest.raises(Fenced, match="another host"):
        hold.check()
    right.check()


def test_the_guard_checks_before_and_after() -> None:
    clock = HandClock()
    right = Right(clock)
    right.extend(clock.now, 5.0)
    entered = []

    def work() -> None:
        with right.guard():
            entered.append(clock.now)
            clock.now += 6.0

    with pytest.raises(Fenced):
        work()
    with pytest.raises(Fenced):
        work()
    assert entered == [100.0]


def test_an_error_inside_the_guard_is_not_hidden_by_it() -> None:
    clock = HandClock()
    right = Right(clock)
    right.extend(clock.now, 5.0)
    hold = right.hold()

    def work() -> None:
        with hold.guard():
            clock.now += 6.0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
