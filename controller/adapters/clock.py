"""Time of the machine that we run on."""

from __future__ import annotations

import asyncio
import time


class SystemClock:
    """Implements ``ports.Clock``.

    ``monotonic`` also counts the time during which the machine was suspended, where the platform can (Linux:
    ``CLOCK_BOOTTIME``): a lease runs on at the server while a holder sleeps, so the holder's own measure of its right has to.
    """

    def __init__(self) -> None:
        self._clock_id: int | None = getattr(time, "CLOCK_BOOTTIME", None)

    def monotonic(self) -> float:
        """Seconds since some fixed moment; only differences mean anything."""
        return time.monotonic() if self._clock_id is None else time.clock_gettime(self._clock_id)

    def wall(self) -> float:
        """Seconds since 1970."""
        return time.time()

    async def sleep(self, seconds: float) -> None:
        """Sleeps at least ``seconds`` of running time (a suspend does not count)."""
        await asyncio.sleep(seconds)
