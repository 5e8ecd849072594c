"""What callers wait for: one receipt for each ``submit``, however many records it has, and who waits for which segment.

A record waits in the group of its segment and its number of copies. One future and one deadline for all records of a call:
futures, tasks and timers of their own would cost several times what the record itself does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from controller.domain.model import Ack, Frame
from controller.errors import DrError


class Receipt:
    """The answers to the frames of one call, in their order. ``done`` when none is missing."""

    __slots__ = ("_answers", "_frames", "_left", "done")

    def __init__(self, frames: Sequence[Frame]) -> None:
        self._frames = frames
        self._answers: list[tuple[str, int, int] | DrError | None] = [None] * len(frames)
        self._left = len(frames)
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not frames:
            self.done.set_result(None)

    @property
    def over(self) -> bool:
        """Whether nobody waits any more: all answered, or the caller went away."""
        return self.done.done()

    def acknowledge(self, number: int, status: str, seq: int, copies: int) -> None:
        """The record is safe in ``copies`` stores. A later answer to the same record changes nothing."""
        self._set(number, (status, seq, copies))

    def fail(self, number: int, error: DrError) -> None:
        """No promise is made about this record."""
        self._set(number, error)

    def fail_rest(self, error_for: Callable[[Frame], DrError]) -> None:
        """No promise about whatever has no answer yet."""
        for number, answer in enumerate(self._answers):
            if answer is None:
                self._set(number, error_for(self._frames[number]))

    def _set(self, number: int, answer: tuple[str, int, int] | DrError) -> None:
        if self._answers[number] is not None:
            return
        self._answers[number] = answer
        self._left -= 1
        if not self._left and not self.done.done():
            self.done.set_result(None)

    def acks(self, instead: DrError | None = None) -> list[Ack]:
        """One per frame. ``instead``: what every promise turns into, when it turned out that none may be made."""
        return [self._ack(frame, answer, instead) for frame, answer in zip(self._frames, self._answers, strict=True)]

    @staticmethod
    def _ack(frame: Frame, answer: tuple[str, int, int] | DrError | None, instead: DrError | None) -> Ack:
        agent, record_id = frame.record.agent, frame.record.id
        assert answer is not None
        if isinstance(answer, DrError):
            return Ack(agent, record_id, "failed", error=answer.to_dict())
        if instead is not None:
            return Ack(agent, record_id, "failed", error=instead.to_dict())
        return Ack(agent, record_id, *answer)


@dataclass(slots=True)
class Waiter:
    """One record of a receipt that waits for its copies."""

    receipt: Receipt
    number: int
    copies: int
    own: bool = False
    """A controller's record with which no work is lost."""
    repeated: bool = False
    """It was here already: its answer is ``duplicate``."""


class Waiting:
    """Who waits for which segment."""

    def __init__(self) -> None:
        self._by_seq: dict[int, list[Waiter]] = {}

    def __len__(self) -> int:
        return len(self._by_seq)

    def add(self, seq: int, waiters: Iterable[Waiter]) -> None:
        """Records that were closed into segment ``seq``, or repetitions of some in it."""
        self._by_seq.setdefault(seq, []).extend(waiters)

    def oldest(self) -> int | None:
        """First segment that somebody waits for."""
        return min(self._by_seq, default=None)

    def upto(self, seq: int) -> list[int]:
        """Segments not above ``seq`` that somebody waits for, ascending."""
        return sorted(waited for waited in self._by_seq if waited <= seq)

    def settle(self, seq: int, copies_have: int, may: Callable[[Waiter], bool]) -> None:
        """Acknowledges those of segment ``seq`` of whom ``may`` says yes, and drops those that nobody waits for any more."""
        left: list[Waiter] = []
        for waiter in self._by_seq.get(seq, ()):
            if waiter.receipt.over:
                continue
            if may(waiter):
                waiter.receipt.acknowledge(waiter.number, "duplicate" if waiter.repeated else "acknowledged", seq, copies_have)
            else:
                left.append(waiter)
        if left:
            self._by_seq[seq] = left
        else:
            self._by_seq.pop(seq, None)

    def fail_all(self, error: DrError) -> None:
        """Nobody is acknowledged any more."""
        for waiters in self._by_seq.values():
            for waiter in waiters:
                waiter.receipt.fail(waiter.number, error)
        self._by_seq.clear()
