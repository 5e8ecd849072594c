"""One call to AWS as a caller of ours sees it: one deadline, a few attempts, and one answer about what is not known.

botocore's own retries are off. An SDK that repeats a conditional write turns "applied, answer lost" into "condition
failed"; here the adapter sees every failed attempt, and reads back before it repeats what may have been applied
(``Call.doubt``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import stamina
from botocore.exceptions import ClientError

from controller.adapters.aws_errors import CONDITION_FAILED, SDK_ERRORS, error_code, translate
from controller.errors import Conflict, DrError, FenceLost, OutcomeUnknown, Unavailable

ATTEMPTS = 4
ATTEMPT_SHARE = 0.6
"""Share of the time left that one attempt may use; the rest belongs to the read-back and the next attempt."""

T = TypeVar("T")


class _Attempts(AbstractContextManager[object]):
    """The first attempt by itself: nearly always it is the only one, and stamina's preparations cost more than the rest of the
    call. When it fails, the others are stamina's, which is given the failure to wait after, as its own first one."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._failure: Unavailable | None = None
        self._begun = False
        self._others: AsyncIterator[stamina.Attempt] | None = None

    def __aiter__(self) -> AsyncIterator[AbstractContextManager[object]]:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        self._failure = error if isinstance(error, Unavailable) else None
        return self._failure is not None

    async def __anext__(self) -> AbstractContextManager[object]:
        if not self._begun:
            self._begun = True
            return self
        if self._failure is None:
            raise StopAsyncIteration
        if self._others is None:
            if not self._call.remaining():
                raise self._failure
            self._others = stamina.retry_context(
                on=Unavailable,
                attempts=ATTEMPTS,
                timeout=self._call.remaining(),
                wait_initial=0.03,
                wait_max=0.4,
                wait_jitter=0.05,
            ).__aiter__()
            with await anext(self._others):
                raise self._failure
        return await anext(self._others)


class Call:
    """One public call: its deadline, its attempts, and whether one of them may have been applied (``doubt``)."""

    __slots__ = ("_deadline", "_loop", "_what", "doubt")

    def __init__(self, what: str, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + seconds
        self._what = what
        self.doubt = False

    def remaining(self) -> float:
        return max(0.0, self._deadline - self._loop.time())

    def extend(self, seconds: float) -> None:
        self._deadline += seconds

    def retries(self) -> AsyncIterator[AbstractContextManager[object]]:
        """Attempts on Unavailable and its kin, jittered, as long as the deadline has room."""
        return _Attempts(self)

    async def attempt(self, sent: Awaitable[T], *, share: float = ATTEMPT_SHARE, mutates: bool = False) -> T:
        """Awaits one request. Raises our errors, or the ClientError itself when a condition did not hold."""
        try:
            async with asyncio.timeout(self.remaining() * share):
                return await sent
        except SDK_ERRORS as error:
            if isinstance(error, ClientError) and error_code(error) in CONDITION_FAILED:
                raise
            failure = translate(error, doing=self._what)
            if isinstance(failure, OutcomeUnknown):
                if not mutates:
                    raise Unavailable(failure.message, hint="wait, or read from another region") from error
                self.doubt = True
            raise failure from error

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Around all of a mutating call: what may have been applied and is not known to be so or not so is OutcomeUnknown."""
        try:
            yield
        except (FenceLost, Conflict):
            raise
        except DrError as error:
            if self.doubt and not isinstance(error, OutcomeUnknown):
                raise OutcomeUnknown(
                    f"{self._what}: an earlier attempt may have been applied; then: {error.message}",
                    hint="read before repeating",
                ) from error
            raise
