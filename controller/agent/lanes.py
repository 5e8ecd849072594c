"""Many agents' records in one request, without a timer: what is waiting when a request can be sent goes into it.

One lane per number of copies, because a request is answered when its slowest record is: records that wait for a second region
must not delay those that do not. Frames that are submitted together stay together: a chain of deltas travels in one request.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from controller.domain.model import Ack, Frame
from controller.errors import OutcomeUnknown, Unavailable

OVERHEAD = 512
"""Bytes that a record is counted with beside its payload."""

Send = Callable[[Sequence[Frame], float], Awaitable[Sequence[Ack]]]
"""Sends one batch, once, before a loop time. One Ack per frame in order. Raises a DrError that holds for all of them."""


@dataclass(slots=True, eq=False)
class _Waiting:
    frames: Sequence[Frame]
    deadline: float
    result: asyncio.Future[Sequence[Ack]]
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

    async def submit(self, frames: Sequence[Frame], deadline: float) -> Sequence[Ack]:
        """One try, one request. Raises what sending raised; OutcomeUnknown when the deadline passes after the records were
        sent, Unavailable when it passes before."""
        item = _Waiting(frames, deadline, asyncio.get_running_loop().create_future())
        self._queue.append(item)
        self._start()
        try:
            async with asyncio.timeout_at(deadline):
                return await item.result
        except TimeoutError:
            if item.sent:
                raise OutcomeUnknown(
                    f"{_named(frames)} sent and not answered in time", hint="send it again; a retry is safe"
                ) from None
            raise Unavailable(f"{_named(frames)} not sent: no time was left", hint="allow more time") from None
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
        size = count = 0
        while self._queue:
            frames = self._queue[0].frames
            size += weight(frames)
            count += len(frames)
            if batch and (size > self._max_bytes or count > self._max_records):
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
            acks = await self._send([frame for item in batch for frame in item.frames], max(item.deadline for item in batch))
        except asyncio.CancelledError:
            for item in batch:
                item.result.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait must learn it; nothing is swallowed
            for item in batch:
                if not item.result.done():
                    item.result.set_exception(error)
            return
        at = 0
        for item in batch:
            if not item.result.done():
                item.result.set_result(acks[at : at + len(item.frames)])
            at += len(item.frames)

    async def close(self) -> None:
        """Cancels what is in flight; those who wait are cancelled."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        for item in self._queue:
            item.result.cancel()
        self._queue.clear()
        await asyncio.gather(*tasks, return_exceptions=True)


def weight(frames: Sequence[Frame]) -> int:
    """Bytes that frames are counted with in a batch."""
    return sum(len(frame.payload) + OVERHEAD for frame in frames)


def _named(frames: Sequence[Frame]) -> str:
    first = f"record {frames[0].record.id!a} was"
    return first if len(frames) == 1 else f"{len(frames)} records, from {frames[0].record.id!a} on, were"
