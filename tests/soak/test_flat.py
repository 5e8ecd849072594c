"""The verdict on growth, with the growths that it must notice."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest

from tests.soak.flat import LEAST_SECONDS, WARM_UP_SECONDS, Sample, judge, look, slope


def _life(rss: Callable[[float], float], fds: Callable[[float], int], seconds: float = 900.0) -> list[Sample]:
    rng = random.Random(1)
    times = [5.0 * n for n in range(int(seconds / 5))]
    return [Sample(at, rss(at) + rng.uniform(-1, 1) + (30 if rng.random() < 0.02 else 0), fds(at)) for at in times]


def test_a_process_that_warms_up_and_stays_is_flat() -> None:
    verdict = judge(_life(lambda at: 90 + min(at, WARM_UP_SECONDS) / 4, lambda at: 60 + int(at) % 7))
    assert verdict.judged
    assert verdict.problem == ""


def test_a_leak_of_two_megabytes_a_minute_is_noticed_under_noise_and_spikes() -> None:
    verdict = judge(_life(lambda at: 90 + at / 30, lambda at: 60))
    assert "memory grows by 120 MB an hour" in verdict.problem or 115 < verdict.mb_per_hour < 125
    assert "memory" in verdict.problem


def test_a_descriptor_lost_every_10_seconds_is_noticed() -> None:
    assert "descriptors went from" in judge(_life(lambda at: 90, lambda at: 60 + int(at / 10))).problem


def test_a_process_that_did_not_live_long_enough_is_not_judged() -> None:
    verdict = judge(_life(lambda at: 90 + at, lambda at: 60, WARM_UP_SECONDS + LEAST_SECONDS / 2))
    assert not verdict.judged
    assert verdict.problem == ""


def test_nothing_is_said_about_nothing() -> None:
    assert slope([]) == 0.0
    assert not judge([]).judged


def test_a_living_process_is_seen_and_a_dead_one_is_not() -> None:
    seen = look(os.getpid(), 1.0)
    assert seen is not None
    assert seen.rss_mb > 1
    assert seen.fds >= 3
    assert look(2**22 + 1, 1.0) is None


@pytest.mark.parametrize("rate", [-1.0, 0.0, 0.5])
def test_the_slope_is_in_megabytes_an_hour(rate: float) -> None:
    assert slope([Sample(float(n), 50 + rate * n, 1) for n in range(100)]) == pytest.approx(rate * 3600)
