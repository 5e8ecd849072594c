"""The client for programs without an event loop: the same calls, blocking, from any thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from controller.agent.client import AsyncCheckpoints
from controller.agent.endpoints import EndpointHealth
from controller.agent.rights import Hold
from controller.agent.spool import Letter
from controller.domain.model import Ack, AgentSeen, Beat, BeatAnswer, Kind, Record

T = TypeVar("T")


class Checkpoints:
    """Runs an ``AsyncCheckpoints`` in a thread of its own. Takes the same arguments. Call ``close`` or use ``with``."""

    def __init__(self, endpoints: Sequence[str], **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="checkpoints", daemon=True)
        self._thread.start()
        try:
            self._client = self._run(self._make(endpoints, options))
        except BaseException:
            self._stop()
            raise

    async def _make(self, endpoints: Sequence[str], options: dict[str, Any]) -> AsyncCheckpoints:
        return await AsyncCheckpoints(endpoints, **options).__aenter__()  # what an earlier process spooled is sent from now on

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if not self._loop.is_closed():
            self._run(self._client.close())
            self._stop()

    def put(
        self,
        agent: str,
        id: str,  # noqa: A002 - the word that Record uses
        body: bytes,
        *,
        kind: str = Kind.CHECKPOINT,
        parent: str | None = None,
        copies: int = 0,
        attempt: int = 0,
        meta: Mapping[str, str] | None = None,
        created_at: float | None = None,
        timeout_seconds: float | None = None,
    ) -> Ack:
        """See ``AsyncCheckpoints.put``."""
        return self._run(
            self._client.put(
                agent,
                id,
                body,
                kind=kind,
                parent=parent,
                copies=copies,
                attempt=attempt,
                meta=meta,
                created_at=created_at,
                timeout_seconds=timeout_seconds,
            )
        )

    def put_many(self, letters: Sequence[Letter], *, timeout_seconds: float | None = None) -> tuple[Ack, ...]:
        """See ``AsyncCheckpoints.put_many``."""
        return self._run(self._client.put_many(letters, timeout_seconds=timeout_seconds))

    def latest(
        self, agent: str, kind: str = Kind.CHECKPOINT, *, fresh: bool = True, timeout_seconds: float | None = None
    ) -> tuple[Record, bytes] | None:
        """See ``AsyncCheckpoints.latest``."""
        return self._run(self._client.latest(agent, kind, fresh=fresh, timeout_seconds=timeout_seconds))

    def get(
        self,
        agent: str,
        id: str,  # noqa: A002
        *,
        fresh: bool = True,
        timeout_seconds: float | None = None,
    ) -> tuple[Record, bytes]:
        """See ``AsyncCheckpoints.get``."""
        return self._run(self._client.get(agent, id, fresh=fresh, timeout_seconds=timeout_seconds))

    def list(
        self,
        agent: str,
        *,
        limit: int = 100,
        before: str | None = None,
        fresh: bool = True,
        timeout_seconds: float | None = None,
    ) -> tuple[Record, ...]:
        """See ``AsyncCheckpoints.list``."""
        return self._run(self._client.list(agent, limit=limit, before=before, fresh=fresh, timeout_seconds=timeout_seconds))

    def agents(
        self,
        *,
        limit: int = 1000,
        after: str = "",
        prefix: str = "",
        fresh: bool = True,
        timeout_seconds: float | None = None,
    ) -> tuple[AgentSeen, ...]:
        """See ``AsyncCheckpoints.agents``."""
        return self._run(
            self._client.agents(limit=limit, after=after, prefix=prefix, fresh=fresh, timeout_seconds=timeout_seconds)
        )

    @property
    def newest_epoch(self) -> int:
        """See ``AsyncCheckpoints.newest_epoch``."""
        return self._client.newest_epoch  # a number: read from any thread

    def health(self) -> tuple[EndpointHealth, ...]:
        """See ``AsyncCheckpoints.health``."""
        return self._run(self._health())

    async def _health(self) -> tuple[EndpointHealth, ...]:
        return self._client.health()

    def create_task(self, agent: str, spec: Mapping[str, object], *, timeout_seconds: float | None = None) -> Ack:
        """See ``AsyncCheckpoints.create_task``."""
        return self._run(self._client.create_task(agent, spec, timeout_seconds=timeout_seconds))

    def beat(self, beat: Beat, *, timeout_seconds: float | None = None) -> BeatAnswer:
        """See ``AsyncCheckpoints.beat``."""
        return self._run(self._client.beat(beat, timeout_seconds=timeout_seconds))

    def drain(self, *, timeout_seconds: float | None = None) -> int:
        """See ``AsyncCheckpoints.drain``."""
        return self._run(self._client.drain(timeout_seconds=timeout_seconds))

    def check(self) -> None:
        """Raises Fenced when the right to act has passed."""
        self._run(self._check())

    async def _check(self) -> None:
        self._client.right.check()

    def hold(self) -> SyncHold:
        """Binds work that begins now to the present right. Raises Fenced when there is none."""
        return SyncHold(self, self._run(self._hold()))

    async def _hold(self) -> Hold:
        return self._client.right.hold()


class SyncHold:
    """A ``Hold`` for other threads than the client's."""

    def __init__(self, owner: Checkpoints, hold: Hold) -> None:
        self._owner = owner
        self._hold = hold

    def check(self) -> None:
        """Raises Fenced once the right has passed or was revoked."""
        self._owner._run(self._check_hold())

    async def _check_hold(self) -> None:
        self._hold.check()

    def __enter__(self) -> None:
        self.check()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.check()
