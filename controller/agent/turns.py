"""One at a time per agent, first come first served: a later record must not overtake an earlier one that is being retried."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from controller.errors import Unavailable


class Turns:
    """Locks that exist while somebody holds or awaits them."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, list[None]]] = {}

    @asynccontextmanager
    async def of(self, agent: str, deadline: float) -> AsyncIterator[None]:
        """``deadline`` is loop time. Raises Unavailable when the turn does not come before it."""
        lock, users = self._locks.setdefault(agent, (asyncio.Lock(), []))
        users.append(None)
        try:
            try:
                if len(users) > 1:
                    async with asyncio.timeout_at(deadline):
                        await lock.acquire()
                else:
                    await lock.acquire()  # nobody else wants it: at once
            except TimeoutError:
                raise Unavailable(
                    f"an earlier record of agent {agent!a} is still being sent", hint="await one put before the next"
                ) from None
            try:
                yield
            finally:
                lock.release()
        finally:
            users.pop()
            if not users:
                self._locks.pop(agent, None)
