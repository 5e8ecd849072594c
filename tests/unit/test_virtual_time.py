"""The loop on which simulations run: no waiting, the same order every time, and a clear word when all tasks wait for ever."""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import time

import pytest

from controller.adapters.clock import SystemClock
from controller.lab.virtual_time import DeadlockError, VirtualClock, VirtualTimeLoop, run_virtual


def test_a_year_passes_at_once_and_the_clock_says_so() -> None:
    async def main() -> tuple[float, float]:
        clock = VirtualClock(offset_wall=1000.0)
        await clock.sleep(365 * 86400)
        return clock.monotonic(), clock.wall()

    started = time.perf_counter()
    monotonic, wall = run_virtual(main())
    assert time.perf_counter() - started < 5
    assert monotonic == pytest.approx(365 * 86400)
    assert wall == pytest.approx(1000.0 + 365 * 86400)


def test_timers_run_in_order_of_time_and_equal_seeds_give_equal_histories() -> None:
    async def main(seed: int) -> list[tuple[float, int]]:
        dice, loop, history = random.Random(seed), asyncio.get_running_loop(), []

        async def worker(number: int) -> None:
            for _ in range(20):
                await asyncio.sleep(dice.choice((0, 0.1, 0.1, 1.7)))
                history.append((loop.time(), number))

        async with asyncio.TaskGroup() as group:
            for number in range(5):
                group.create_task(worker(number))
        return history

    first, second = run_virtual(main(7)), run_virtual(main(7))
    assert first == second
    assert [at for at, _ in first] == sorted(at for at, _ in first)
    assert run_virtual(main(8)) != first


def test_a_timeout_fires_at_its_virtual_moment() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.5):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) == pytest.approx(2.5)


def test_time_does_not_stand_still_when_a_step_is_smaller_than_a_float_can_show() -> None:
    async def main() -> None:
        for _ in range(100):
            await asyncio.sleep(1e-9)

    run_virtual(main(), start=1e9, limit_seconds=10)


def test_a_deadlock_names_the_tasks_that_wait() -> None:
    async def stuck() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        task = asyncio.create_task(stuck(), name="the-stuck-one")
        await asyncio.sleep(3)
        await task

    with pytest.raises(DeadlockError, match=r"at 3 virtual seconds.*the-stuck-one in stuck line"):
        run_virtual(main())


def test_a_program_that_never_ends_meets_its_limit() -> None:
    async def main() -> None:
        for _ in itertools.count():
            await asyncio.sleep(1)

    with pytest.raises(TimeoutError):
        run_virtual(main(), limit_seconds=100)


def test_tasks_that_are_left_behind_are_cancelled() -> None:
    ended = []

    async def background() -> None:
        try:
            await asyncio.sleep(1e6)
        finally:
            ended.append(True)

    async def main() -> asyncio.Task[None]:
        task = asyncio.create_task(background())
        await asyncio.sleep(1)
        return task

    assert run_virtual(main()).cancelled()
    assert ended == [True]


def test_work_for_a_thread_is_done_at_once_and_its_error_arrives() -> None:
    async def main() -> int:
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 / 0)
        return await asyncio.to_thread(lambda: 42)

    assert run_virtual(main()) == 42


def test_real_sockets_are_refused() -> None:
    async def main() -> None:
        ours, _ = socket.socketpair()
        asyncio.get_running_loop().add_reader(ours, lambda: None)

    with pytest.raises(RuntimeError, match="virtual time cannot wait"):
        run_virtual(main())


def test_two_clocks_on_one_loop_may_disagree_about_the_wall() -> None:
    loop = VirtualTimeLoop(start=5.0)
    try:
        early, late = VirtualClock(loop, offset_wall=100.0), VirtualClock(loop, offset_wall=160.0)
        assert early.monotonic() == late.monotonic() == 5.0
        assert late.wall() - early.wall() == 60.0
    finally:
        loop.close()


async def test_the_system_clock_counts_suspended_time_where_the_platform_can() -> None:
    clock = SystemClock()
    before = clock.monotonic()
    await clock.sleep(0)
    assert clock.monotonic() >= before
    if hasattr(time, "CLOCK_BOOTTIME"):
        assert clock.monotonic() == pytest.approx(time.clock_gettime(time.CLOCK_BOOTTIME), abs=5)
    assert clock.wall() == pytest.approx(time.time(), abs=5)
