"""Attempts of one call to AWS: as many as its deadline has room for, and never a retry without time."""

from __future__ import annotations

import pytest

from controller.adapters.aws_call import ATTEMPTS, Call
from controller.errors import Unavailable


async def attempts_of(call: Call) -> int:
    """How often a call is tried that fails each time."""
    count = 0

    async def read() -> None:
        nonlocal count
        async for attempt in call.retries():
            with attempt:
                count += 1
                raise Unavailable("throttled", hint="wait")

    with pytest.raises(Unavailable, match="throttled"):
        await read()
    return count


async def test_a_failing_call_is_tried_a_few_times() -> None:
    assert await attempts_of(Call("read head", 60.0)) == ATTEMPTS


async def test_a_first_attempt_that_used_up_all_of_the_time_is_the_only_one() -> None:
    assert await attempts_of(Call("read head", 0.0)) == 1


async def test_a_call_that_succeeds_is_made_once() -> None:
    made = 0
    async for attempt in Call("read head", 60.0).retries():
        with attempt:
            made += 1
    assert made == 1
