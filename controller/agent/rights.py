"""May this copy of the agent still act? Decided locally, from what controllers answered, without asking anyone.

A *right* ends at ``time the request was SENT + right_seconds of its answer``, on a clock that also counts suspend. Answers only
ever extend it. Once it has passed, an agent may be running elsewhere; an answer that arrives later lets *new* work begin, it
does not bring old work back: every stretch without a gap is a *term*, and a ``Hold`` taken in one term is over with it.
(Without this a process that was paused for a minute could be revived by the answer to its own heartbeat, in the middle of a
step, while its successor runs.)
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from controller.agent.errors import Fenced


class Clock(Protocol):
    """Time is an argument. Structurally equal to ``controller.ports.Clock``."""

    def monotonic(self) -> float: ...

    def wall(self) -> float: ...

    async def sleep(self, seconds: float) -> None: ...


class BootClock:
    """The machine's own time. ``monotonic`` counts suspend where the platform can (Linux: ``CLOCK_BOOTTIME``)."""

    def __init__(self) -> None:
        self._clock_id: int | None = getattr(time, "CLOCK_BOOTTIME", None)

    def monotonic(self) -> float:
        return time.monotonic() if self._clock_id is None else time.clock_gettime(self._clock_id)

    def wall(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Right:
    """The right of one host's agents to act. Not thread-safe: one event loop owns it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._deadline = -math.inf
        self._term = 0

    @property
    def term(self) -> int:
        """Number of the present stretch without a gap; 0 = none was ever granted."""
        return self._term

    def remaining(self) -> float:
        """Seconds that are left, at least 0."""
        return max(0.0, self._deadline - self._clock.monotonic())

    def extend(self, sent_at: float, right_seconds: float) -> None:
        """From an answer: ``sent_at`` is this clock when the *request* was sent. Never shortens; nonsense is ignored."""
        now = self._clock.monotonic()
        deadline = sent_at + right_seconds
        if not (math.isfinite(deadline) and sent_at <= now < deadline and right_seconds > 0):
            return
        if now >= self._deadline:
            self._term += 1
        self._deadline = max(self._deadline, deadline)

    def check(self) -> None:
        """Raises Fenced when the right has passed (or was never granted)."""
        late = self._clock.monotonic() - self._deadline
        if late >= 0:
            if not math.isfinite(late):
                raise Fenced("the right to act was never granted", hint="put a record or beat first: answers bring the right")
            raise Fenced(f"the right to act ended {late:.1f} s ago", hint="stop this agent; it may be running in another place")

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Checks before and after the block. What leaves the machine inside it may leave just past the end: keep it short."""
        self.check()
        yield
        self.check()

    def hold(self) -> Hold:
        """Binds work that begins now to the present term. Raises Fenced when there is no right."""
        self.check()
        return Hold(self)


class Hold:
    """The right of one piece of work (one run of one agent). Once over it stays over."""

    def __init__(self, right: Right) -> None:
        self._right = right
        self._term = right.term
        self._why = ""

    def revoke(self, why: str) -> None:
        """Ends it, whatever the clock says: another host has the agent, or the assignment was withdrawn."""
        self._why = self._why or why

    def over(self) -> bool:
        """Whether it has ended. Like ``check`` without the exception."""
        try:
            self.check()
        except Fenced:
            return True
        return False

    def check(self) -> None:
        """Raises Fenced once the right has passed, has passed in between, or was revoked."""
        if not self._why:
            try:
                self._right.check()
            except Fenced as error:
                self._why = error.message
            else:
                if self._right.term != self._term:
                    self._why = "the right to act had passed before it was granted anew"
        if self._why:
            raise Fenced(self._why, hint="stop this agent; begin again from the record that the next assignment names")

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Checks before and after the block."""
        self.check()
        yield
        self.check()
