"""One call to whichever controller is to be asked: a try, and tries until a deadline.

What an answer proves is decided in ``wire``; here is decided whom to ask, how long to wait for it, and whether to ask again.
A controller that asks us to wait (``Retry-After``) is left alone for so long, others are asked meanwhile.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import httpx

from controller.agent import wire
from controller.agent.credentials import Bearer, Credentials
from controller.agent.endpoints import Endpoints
from controller.agent.errors import Fenced, StaleEpoch
from controller.agent.rights import Clock
from controller.errors import Corrupt, DrError, FenceLost, NotActive, OutcomeUnknown, Unavailable

T = TypeVar("T")

BACKOFF_SECONDS = 0.05
BACKOFF_MAX_SECONDS = 1.0
UPLOAD_BYTES_PER_SECOND = 4 * 2**20
"""Slowest way to a controller that a default timeout allows for: what is sent gets this much time on top."""


class Caller:
    """``timeout_seconds``: default deadline of a call, retries included; ``attempt_seconds``: longest wait for one answer."""

    def __init__(
        self,
        endpoints: Endpoints,
        clock: Clock,
        rng: random.Random,
        *,
        host: str = "",
        timeout_seconds: float = 10.0,
        attempt_seconds: float = 5.0,
        transport: httpx.AsyncBaseTransport | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        credentials = credentials or Credentials()
        self._bearer = Bearer(credentials)
        self.endpoints = endpoints
        self.attempt_seconds = attempt_seconds
        self._clock = clock
        self._random = rng
        self._host = host
        self._timeout = timeout_seconds
        self._http = httpx.AsyncClient(
            transport=transport,
            verify=credentials.tls() if any(url.startswith("https:") for url in endpoints.urls()) else True,
            timeout=httpx.Timeout(None),  # every call stands under asyncio.timeout: one clock for all of it
            follow_redirects=False,
            trust_env=False,
            limits=httpx.Limits(max_connections=64, max_keepalive_connections=16),
        )

    async def close(self) -> None:
        await self._http.aclose()

    def deadline(self, timeout_seconds: float | None, upload_bytes: int = 0) -> float:
        """Loop time. A timeout that the caller chose is taken as it is."""
        seconds = self._timeout + upload_bytes / UPLOAD_BYTES_PER_SECOND if timeout_seconds is None else timeout_seconds
        return asyncio.get_running_loop().time() + seconds

    async def retry(self, once: Callable[[float], Awaitable[T]], deadline: float, what: str, *, mutating: bool = True) -> T:
        """Full jitter between tries. What is raised at the deadline says whether any try may have been taken."""
        loop = asyncio.get_running_loop()
        doubt = False
        tries = 0
        last: DrError = Unavailable("no time was left to try")
        while loop.time() < deadline:
            try:
                return await once(deadline)
            except Fenced:
                raise
            except (OutcomeUnknown, FenceLost) as error:
                doubt, last = True, error
            except NotActive as error:
                last = error
                if error.hint == _ASK_AGAIN and tries < 3:
                    tries += 1
                    continue
            except Unavailable as error:
                last = error
            pause = self._random.uniform(0.0, min(BACKOFF_MAX_SECONDS, BACKOFF_SECONDS * 2.0 ** min(tries, 10)))
            tries += 1
            await self._clock.sleep(min(max(pause, _asked_wait(last, self._random)), max(0.0, deadline - loop.time())))
        if isinstance(last, StaleEpoch):
            raise last
        if doubt and mutating:
            raise OutcomeUnknown(
                f"{what}: not acknowledged in time, and it may have been taken; last: {last.message}",
                hint="put the same record (equal id and body) again to learn it",
            ) from last
        hint = _NOBODY_ACTIVE if isinstance(last, NotActive) else last.hint or "wait, then try again"
        raise Unavailable(f"{what}: no controller took it in time; last: {last.message}", hint=hint) from last

    async def call(
        self,
        method: str,
        path: str,
        deadline: float,
        read: Callable[[httpx.Response], T],
        content: bytes = b"",
        content_type: str = "",
    ) -> T:
        """One try at the endpoint whose turn it is. ``read`` makes the value of a 200; raises what the answer proves, or its
        absence."""
        endpoint = self.endpoints.pick()
        if endpoint is None:
            raise Unavailable(
                f"no controller is asked now: {self.endpoints.why()}", hint="wait; see whether controllers run: drctl members"
            )
        limit = self.attempt_seconds + len(content) / UPLOAD_BYTES_PER_SECOND
        try:
            async with asyncio.timeout_at(min(deadline, asyncio.get_running_loop().time() + limit)):
                answer = await self.request(method, endpoint.url + path, content, content_type)
        except TimeoutError:
            self.endpoints.failed(endpoint, "it did not answer in time")
            raise OutcomeUnknown(f"{endpoint.url} did not answer in time", hint="a retry is safe") from None
        except Unavailable as problem:
            self.endpoints.failed(endpoint, problem.message)
            raise
        if answer.status_code == 200:
            try:
                value = read(answer)
            except StaleEpoch:
                self.endpoints.not_active(endpoint, None)
                raise
            except (OutcomeUnknown, Corrupt) as problem:
                self.endpoints.failed(endpoint, problem.message)
                raise
            self.endpoints.succeeded(endpoint)
            return value
        error = wire.error_answer(answer.status_code, answer.content, answer.headers.get("Retry-After", ""), endpoint.url)
        if isinstance(error, NotActive):
            if self.endpoints.not_active(endpoint, error.active):
                error.hint = _ASK_AGAIN
            error.retry_after_seconds = 0.0  # another one is active: nothing to wait for
        elif isinstance(error, Unavailable) and error.retry_after_seconds > 0:
            self.endpoints.busy(endpoint, error.retry_after_seconds)
            error.retry_after_seconds = 0.0  # this one is left alone; others may be asked at once
        elif isinstance(error, (Unavailable, FenceLost)) and not isinstance(error, Fenced):
            self.endpoints.failed(endpoint, error.message)
        raise error

    async def request(self, method: str, url: str, content: bytes, content_type: str) -> httpx.Response:
        """Raises Unavailable when the request did not leave, OutcomeUnknown when it may have arrived."""
        headers = dict(self._bearer.headers())
        if self._host:
            headers["X-DR-Host"] = self._host
        if content_type:
            headers["Content-Type"] = content_type
        try:
            return await self._http.request(method, url, content=content or None, headers=headers)
        except (httpx.ConnectError, httpx.PoolTimeout) as error:
            raise Unavailable(
                f"{_base_of(url)} cannot be reached: {error}", hint="see that a controller runs at this address: drctl members"
            ) from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise OutcomeUnknown(f"{_base_of(url)}: the answer was lost: {error!r}", hint="a retry is safe") from error


_NOBODY_ACTIVE = "wait; give the client the controllers of every region (drctl status says which one is active)"
_ASK_AGAIN = "another controller was named: ask it at once"


def _base_of(url: str) -> str:
    return "/".join(url.split("/", 3)[:3])


def _asked_wait(error: DrError, rng: random.Random) -> float:
    """What the answer to a *record* asked for: the request was answered, so its controller is well."""
    return getattr(error, "retry_after_seconds", 0.0) * rng.uniform(1.0, 1.25)
