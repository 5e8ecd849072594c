"""The road between a memory client and its server: calls pass it on the way there and answers on the way back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Protocol

from controller.errors import Unavailable

EVERY = "*"
"""In a FaultGate: any operation."""


class Gate(Protocol):
    """``op`` is the name of the port's method. Both may wait, and may raise ``Unavailable``."""

    async def before(self, op: str) -> None:
        """Raising here: the call was never sent, nothing happened."""
        ...

    async def after(self, op: str) -> None:
        """Raising here: it happened, the answer is lost. The adapter raises ``OutcomeUnknown`` for a mutating call."""
        ...


class OpenGate:
    """Lets everything pass at once."""

    async def before(self, op: str) -> None:
        del op

    async def after(self, op: str) -> None:
        del op


class FaultGate:
    """A gate that a test shuts, slows and makes lose answers. ``sleep`` is the clock's."""

    def __init__(self, sleep: Callable[[float], Awaitable[None]]) -> None:
        self._sleep = sleep
        self._failing: Counter[str] = Counter()
        self._losing: Counter[str] = Counter()
        self.delay_seconds = 0.0
        """Each way."""
        self.cut = False
        """While true nothing passes: calls are not sent, and answers under way are lost."""
        self.calls: Counter[str] = Counter()

    def fail(self, op: str = EVERY, times: int = 1) -> None:
        """The next ``times`` calls of ``op`` are never sent."""
        self._failing[op] += times

    def lose(self, op: str = EVERY, times: int = 1) -> None:
        """The next ``times`` answers to ``op`` are lost."""
        self._losing[op] += times

    async def before(self, op: str) -> None:
        self.calls[op] += 1
        await self._travel()
        if self.cut or (self._failing and _take(self._failing, op)):
            raise Unavailable(f"{op}: not sent (gate)", hint="a test or drill has shut this gate")

    async def after(self, op: str) -> None:
        await self._travel()
        if self.cut or (self._losing and _take(self._losing, op)):
            raise Unavailable(f"{op}: answer lost (gate)", hint="a test or drill has shut this gate")

    async def _travel(self) -> None:
        if self.delay_seconds > 0:
            await self._sleep(self.delay_seconds)


def _take(planned: Counter[str], op: str) -> bool:
    for name in (op, EVERY):
        if planned[name] > 0:
            planned[name] -= 1
            return True
    return False
