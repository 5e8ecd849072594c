"""Many agents' records in one request, without a timer: what is waiting when a request can be sent goes into it.

One lane per number of copies, because a request is answered when its slowest record is: records that wait for a second region
must not delay those that do not.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from controller.domain.model import Ack, Frame
from controller.errors import OutcomeUnknown, Unavailable

Send = Callable[[Sequence[Frame], float], Awaitable[Sequence[Ack]]]
"""Sends one batch, once, before a loop time. One Ack per frame in order. Raises a DrError that holds for all of them."""


@dataclass(slots=True, eq=False)
class _Waiting:
    frame: Frame
    deadline: float
    result: asyncio.Future[Ack]
    sent: bool = False


class Lane:
    """Group commit on the agents' side: at most ``in_flight`` requests at once, each with all that waits, within limits."""

    def __init__(self, send: Send, *, in_flight: int, max_records: int, max_bytes: int) -> None:
        self._send = send
        self._in_flight = in_flight
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._queue: deque[_Waiting] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    async def submit(self, frame: Frame, deadline: float) -> Ack:
        """One try. Raises what sending raised; OutcomeUnknown when the deadline passes after the record was sent, Unavailable
        when it passes before."""
        item = _Waiting(frame, deadline, asyncio.get_running_loop().create_future())
        self._queue.append(item)
        self._start()
        try:
            async with asyncio.timeout_at(deadline):
                return await item.result
        except TimeoutError:
            if item.sent:
                raise OutcomeUnknown(
                    f"record {frame.record.id!a} was sent and not answered in time", hint="send it again; a retry is safe"
                ) from None
            raise Unavailable(f"record {frame.record.id!a} could not be sent in time", hint="allow more time") from None
        finally:
            if not item.sent and item in self._queue:
                self._queue.remove(item)

    def _start(self) -> None:
        if self._queue and len(self._tasks) < self._in_flight:
            task = asyncio.get_running_loop().create_task(self._run())
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            self._start()

    def _take(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        size = 0
        while self._queue and len(batch) < self._max_records:
            size += len(self._queue[0].frame.payload) + 512
            if batch and size > self._max_bytes:
                break
            item = self._queue.popleft()
            if not item.result.done():
                item.sent = True
                batch.append(item)
        return batch

    async def _run(self) -> None:
        batch = self._take()
        if not batch:
            return
        try:
            acks = await self._send([item.frame for item in batch], max(item.deadline for item in batch))
        except asyncio.CancelledError:
            for item in batch:
                item.result.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait must learn it; nothing is swallowed
            for item in batch:
                if not item.result.done():
                    item.result.set_exception(error)
            return
        for item, ack in zip(batch, acks, strict=True):
            if not item.result.done():
                item.result.set_result(ack)

    async def close(self) -> None:
        """Cancels what is in flight; those who wait are cancelled."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        for item in self._queue:
            item.result.cancel()
        self._queue.clear()
        await asyncio.gather(*tasks, return_exceptions=True)
