"""Time that costs nothing: an asyncio loop that never waits, but jumps to the next timer.

Hours of leases, elections and promotions run in milliseconds, and the same program always runs in the same order. What runs in
it must wait with ``asyncio`` or the injected ``Clock`` only; real sockets are refused and work for executors is done at once,
because both would bring the machine's own timing back in.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import math
import selectors
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

WALL_AT_START = 1_767_225_600.0
"""2026-01-01 00:00:00 UTC: the usual ``offset_wall``, so that simulated stamps look like stamps."""

RESOLUTION_SECONDS = 1e-6
"""Timers less than this ahead are due. The base class takes the system clock's 1 ns, which is lost in rounding once the loop's
time passes some 10**7 s; then a due timer would never be due, and time would stand still."""


class DeadlockError(RuntimeError):
    """Every task waits for something that nobody will do: no callback is ready and no timer is set."""


LONGEST_STEP_SECONDS = 24 * 3600.0
"""Time advances in steps that are no longer, as the base class waits no longer at a time."""


class _VirtualSelector(selectors.SelectSelector):
    """What the loop believes to be the operating system: nothing ever becomes readable. The loop never asks it."""

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        if self.get_map():  # the first one is the loop's own wake-up pipe
            raise RuntimeError("a loop in virtual time cannot wait for real sockets; use the memory adapters")
        return super().register(fileobj, events, data)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose ``time()`` starts at ``start`` and advances only when all tasks wait.

    ``_run_once`` and ``call_soon`` do what the base class's do (CPython 3.11 to 3.13), in the same order, without asking an
    operating system and without its debug mode: they are half of what a simulation costs.
    """

    _ready: Any
    _scheduled: list[Any]
    _timer_cancelled_count: int
    _stopping: bool
    _closed: bool

    def __init__(self, start: float = 0.0) -> None:
        self._virtual_now = start
        super().__init__(_VirtualSelector())
        self._clock_resolution = RESOLUTION_SECONDS

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """Without the base class's checks for debug mode."""
        if self._closed:
            raise RuntimeError("Event loop is closed")
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def _run_once(self) -> None:
        """One round: time jumps to the next timer if nothing is ready; then runs what is ready now."""
        ready, timers = self._ready, self._scheduled
        self._sweep(timers)
        if not ready and not self._stopping:
            if not timers:
                raise DeadlockError("nothing is ready, and no timer is set")
            ahead = timers[0]._when - self._virtual_now
            if ahead > 0:
                self._advance(min(ahead, LONGEST_STEP_SECONDS))
        due = self._virtual_now + RESOLUTION_SECONDS
        while timers and timers[0]._when < due:
            timer = heapq.heappop(timers)
            timer._scheduled = False
            ready.append(timer)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()

    def _sweep(self, timers: list[Any]) -> None:
        """Lets go of cancelled timers, at once where they are next and all of them where they are many."""
        if self._timer_cancelled_count > 100 and 2 * self._timer_cancelled_count > len(timers):
            for timer in timers:
                if timer.cancelled():
                    timer._scheduled = False
            timers[:] = [timer for timer in timers if not timer.cancelled()]
            heapq.heapify(timers)
            self._timer_cancelled_count = 0
        while timers and timers[0].cancelled():
            self._timer_cancelled_count -= 1
            heapq.heappop(timers)._scheduled = False

    def time(self) -> float:
        """Virtual seconds."""
        return self._virtual_now

    def _advance(self, seconds: float) -> None:
        # A step that is lost in rounding would stop time for ever.
        self._virtual_now = max(self._virtual_now + seconds, math.nextafter(self._virtual_now, math.inf))

    def run_in_executor(self, executor: object, func: Callable[..., T], *args: object) -> asyncio.Future[T]:
        """Runs ``func`` at once, in this thread: threads would make the order of events depend on the machine."""
        del executor
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001  (as an executor does: whatever it is belongs to the waiting caller)
            future.set_exception(error)
        return future


class VirtualClock:
    """Implements ``ports.Clock`` on a loop, usually a ``VirtualTimeLoop``.

    ``offset_wall`` is the wall time at loop time 0; clocks with different offsets are machines whose clocks disagree.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None, offset_wall: float = WALL_AT_START) -> None:
        self._loop = loop or asyncio.get_running_loop()
        self.offset_wall = offset_wall

    def monotonic(self) -> float:
        return self._loop.time()

    def wall(self) -> float:
        return self.offset_wall + self._loop.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def run_virtual(coroutine: Coroutine[Any, Any, T], *, start: float = 0.0, limit_seconds: float | None = None) -> T:
    """Runs ``coroutine`` to its end in a fresh ``VirtualTimeLoop`` and cancels the tasks that it left behind.

    Raises DeadlockError, naming each waiting task and its line, when it can never end; TimeoutError when it has not
    ended after ``limit_seconds`` of virtual time. Must not be called while another loop runs in this thread.
    """
    loop = VirtualTimeLoop(start)
    runner = asyncio.Runner(loop_factory=lambda: loop)
    try:
        return runner.run(_limited(coroutine, limit_seconds))
    except DeadlockError as error:
        waiting = "; ".join(sorted(_describe(task) for task in asyncio.all_tasks(loop)))
        raise DeadlockError(f"deadlock at {loop.time():g} virtual seconds: {error}. Waiting: {waiting}") from None
    finally:
        with suppress(DeadlockError):  # a task that waits again while it is being cancelled; the first error says more
            runner.close()
        if not loop.is_closed():
            loop.close()


async def _limited(coroutine: Coroutine[Any, Any, T], limit_seconds: float | None) -> T:
    async with asyncio.timeout(limit_seconds):
        return await coroutine


def _describe(task: asyncio.Task[Any]) -> str:
    frames = task.get_stack(limit=None)
    where = f"{frames[-1].f_code.co_name} line {frames[-1].f_lineno}" if frames else "not started"
    return f"{task.get_name()} in {where}"
