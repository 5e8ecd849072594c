"""One client for callers of every kind: other threads, other event loops, the client's own loop.

A client belongs to one event loop. Frameworks call their storage from wherever they run (LangGraph from a thread pool, Strands
from a loop that lives for one call), so adapters write their work once, as coroutines, and pass it through here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from controller.agent.client import AsyncCheckpoints
from controller.agent.sync import Checkpoints
from controller.errors import Misconfigured

T = TypeVar("T")


class Bridge:
    """Takes either client. An ``AsyncCheckpoints`` is used in the loop that is running now, else in the first that awaits."""

    def __init__(self, client: AsyncCheckpoints | Checkpoints) -> None:
        self._loop: asyncio.AbstractEventLoop | None
        if isinstance(client, Checkpoints):
            self.client, self._loop = client._client, client._loop
        else:
            self.client, self._loop = client, _running()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Blocks. Raises what the work raises; Misconfigured where blocking would wait for ever."""
        try:
            loop = self._require_loop()
            if _running() is loop:
                raise Misconfigured(
                    "a blocking call from the client's own event loop would wait for itself",
                    hint="await the async method, or give the adapter a `Checkpoints`",
                )
        except Misconfigured:
            work.close()
            raise
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    async def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The same for coroutines, from any loop. A cancelled caller cancels the work."""
        here = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = here
        if self._loop is here:
            return await work
        try:
            loop = self._require_loop()
        except Misconfigured:
            work.close()
            raise
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))

    def _require_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None or self._loop.is_closed():
            raise Misconfigured(
                "the client has no running event loop for this call",
                hint="use `Checkpoints` for blocking calls, or create the adapter inside the loop that runs the client",
            )
        return self._loop


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
