"""The agents' way to the controllers: put, get, list, tasks, beats.

A ``put`` returns when the record is acknowledged in the copies that it asked for, or raises within its deadline:

- ``Unavailable``: not acknowledged, and no controller took it;
- ``OutcomeUnknown``: not acknowledged, but it may have been taken: put it again (equal id and body) to learn it;
- ``Fenced``: this copy of the agent must stop; ``Refused``, ``Conflict``: repeating it gives the same answer.

Retries are safe because a record is named by (agent, id). Records of one agent go in order: the next is sent when the one
before is settled. Nothing is ever downgraded: an acknowledgement with fewer copies than asked for is none.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import TypeVar
from urllib.parse import quote

import httpx
import msgspec

from controller.agent import wire
from controller.agent.endpoints import Endpoints
from controller.agent.errors import Fenced, NotAllAcknowledged, StaleEpoch
from controller.agent.lanes import Lane
from controller.agent.memory import DeltaMemory
from controller.agent.rights import BootClock, Clock, Right
from controller.agent.spool import Letter, Spool
from controller.agent.turns import Turns
from controller.domain.model import Ack, Beat, BeatAnswer, Frame, Kind, Record
from controller.errors import Corrupt, DrError, FenceLost, NotActive, NotFound, OutcomeUnknown, Refused, Throttled, Unavailable
from controller.stream.delta import frame
from controller.stream.segment import encode_frames

T = TypeVar("T")

ACKNOWLEDGED = ("acknowledged", "duplicate")
SPOOLED = "spooled"
"""Status of an Ack that is none: the record is on this machine's disk only."""
BACKOFF_SECONDS = 0.05
BACKOFF_MAX_SECONDS = 1.0


class AsyncCheckpoints:
    """One per process and event loop. Use as ``async with``, or call ``close``.

    ``endpoints``: base URLs of controllers. ``timeout_seconds``: default deadline of a call, retries included;
    ``attempt_seconds``: longest wait for one answer. ``spool``: None = a put that nobody acknowledges raises.
    ``delta_bytes``: memory for previous bodies, 0 = no deltas. ``right`` is what answers extend and agents check.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        agent_host: str = "",
        clock: Clock | None = None,
        rng: random.Random | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        timeout_seconds: float = 10.0,
        attempt_seconds: float = 5.0,
        follow_hints: bool = True,
        delta_bytes: int = 64 * 2**20,
        spool: Spool | None = None,
        in_flight: int = 2,
        batch_records: int = 500,
        batch_bytes: int = 4 * 2**20,
    ) -> None:
        self._clock: Clock = clock or BootClock()
        self._random = rng or random.Random()
        self._endpoints = Endpoints(endpoints, self._clock, self._random, follow_hints=follow_hints)
        self._host = agent_host
        self._is_host = bool(agent_host)
        self._timeout = timeout_seconds
        self._attempt = attempt_seconds
        self._memory = DeltaMemory(delta_bytes)
        self._spool = spool
        self._turns = Turns()
        self._lanes: dict[int, Lane] = {}
        self._lane_options = {"in_flight": in_flight, "max_records": batch_records, "max_bytes": batch_bytes}
        self._drainer: asyncio.Task[None] | None = None
        self._http = httpx.AsyncClient(
            transport=transport,
            timeout=httpx.Timeout(None),  # every call stands under asyncio.timeout: one clock for all of it
            follow_redirects=False,
            trust_env=False,
            limits=httpx.Limits(max_connections=64, max_keepalive_connections=16),
        )
        self.right = Right(self._clock)
        self.epoch = 0
        """Greatest epoch that any answer carried."""

    async def __aenter__(self) -> AsyncCheckpoints:
        if self._spool is not None and self._spool.agents():
            self._start_draining()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what is in flight. The spool stays open: it belongs to the caller."""
        if self._drainer is not None:
            self._drainer.cancel()
            await asyncio.gather(self._drainer, return_exceptions=True)
        for lane in self._lanes.values():
            await lane.close()
        await self._http.aclose()

    # -------------------------------------------------------------------------------------------------------- writing

    async def put(
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
        """Acknowledged when it returns (with a spool: look at ``status``, ``"spooled"`` is no acknowledgement).
        ``copies`` 0 = 1, the default. Raises Unavailable, OutcomeUnknown, Fenced, StaleEpoch, Refused, Conflict, SpoolFull."""
        stamp = self._clock.wall() if created_at is None else created_at
        letter = Letter(agent, id, kind, body, parent, stamp, copies or 1, attempt, dict(meta or {}))
        deadline = self._deadline(timeout_seconds)
        async with self._turns.of(agent, deadline):
            return await self._put(letter, deadline)

    async def put_many(self, letters: Sequence[Letter], *, timeout_seconds: float | None = None) -> tuple[Ack, ...]:
        """Puts all, each agent's in their order, different agents' together. Raises NotAllAcknowledged (with every result)."""
        deadline = self._deadline(timeout_seconds)

        async def one(letter: Letter) -> Ack | DrError:
            try:
                async with self._turns.of(letter.agent, deadline):
                    return await self._put(letter, deadline)
            except DrError as error:
                return error

        results = await asyncio.gather(*(one(letter) for letter in letters))
        acks = tuple(item for item in results if isinstance(item, Ack))
        if len(acks) < len(results):
            raise NotAllAcknowledged(results)
        return acks

    async def create_task(self, agent: str, spec: Mapping[str, object], *, timeout_seconds: float | None = None) -> Ack:
        """Records that this agent shall run. The same spec again is a duplicate. Raises like ``put``."""
        content = msgspec.json.encode({"agent": agent, "spec": spec})

        async def once(deadline: float) -> Ack:
            sent_at = self._clock.monotonic()
            acks = await self._call(
                "POST", "/v1/tasks", deadline, lambda answer: self._accept(answer, (0,), sent_at), content, "application/json"
            )
            return _settled(acks[0], 1)

        return await self._retry(once, self._deadline(timeout_seconds), f"task of agent {agent!a}")

    async def _put(self, letter: Letter, deadline: float) -> Ack:
        """Holds the agent's turn. Behind what is spooled already, so that order is kept."""
        try:
            if self._spool is not None and self._spool.waiting(letter.agent):
                await self._drain_agent(self._spool, letter.agent, deadline)
            return await self._deliver(letter, deadline)
        except Unavailable:
            if self._spool is None or letter.copies > 1:  # a copy on this disk is not a copy in another region
                raise
            await asyncio.to_thread(self._spool.add, letter)
        self._start_draining()
        return Ack(letter.agent, letter.id, SPOOLED)

    async def _deliver(self, letter: Letter, deadline: float) -> Ack:
        """Until it is acknowledged, refused, or late."""
        whole = False

        async def once(until: float) -> Ack:
            nonlocal whole
            made = self._frame(letter, whole=whole)
            try:
                ack = _settled(await self._lane(letter.copies).submit(made, until), letter.copies)
            except Refused as error:
                if error.code != wire.UNKNOWN_BASE or made.base is None:
                    raise
                whole = True
                self._memory.forget(letter.agent, letter.kind)
                return await once(until)
            self._memory.acknowledged(letter.agent, letter.kind, letter.id, letter.body, made.base)
            return ack

        return await self._retry(once, deadline, f"record {letter.id!a} of agent {letter.agent!a}")

    def _frame(self, letter: Letter, *, whole: bool) -> Frame:
        return frame(
            letter.agent,
            letter.id,
            letter.kind,
            letter.body,
            parent=letter.parent,
            created_at=letter.created_at,
            copies=letter.copies,
            attempt=letter.attempt,
            meta=letter.meta,
            previous=None if whole else self._memory.previous(letter.agent, letter.kind),
        )

    def _lane(self, copies: int) -> Lane:
        lane = self._lanes.get(copies)
        if lane is None:
            lane = self._lanes[copies] = Lane(self._send, **self._lane_options)
        return lane

    async def _send(self, frames: Sequence[Frame], deadline: float) -> Sequence[Ack]:
        """One batch, one endpoint, one try. A "no" to the batch as a whole is never taken as one to each of its agents."""
        content = encode_frames(frames)
        sent_at = self._clock.monotonic()
        attempts = [item.record.attempt for item in frames]
        try:
            return await self._call(
                "POST",
                "/v1/records",
                deadline,
                lambda answer: self._accept(answer, attempts, sent_at),
                content,
                "application/octet-stream",
            )
        except (Fenced, Refused) as error:
            if len(frames) == 1:
                raise
            return [await self._send_alone(item, deadline, error) for item in frames]

    async def _send_alone(self, item: Frame, deadline: float, batch_error: DrError) -> Ack:
        try:
            return (await self._send([item], deadline))[0]
        except DrError as error:
            error.__cause__ = batch_error
            return Ack(item.record.agent, item.record.id, "failed", error=error.to_dict())

    def _accept(self, response: httpx.Response, attempts: Sequence[int], sent_at: float) -> Sequence[Ack]:
        """Raises StaleEpoch when the answer is of a controller that was deposed: it promises nothing and extends nothing.

        An acknowledgement is a promise of a holder that had the right to give it. One that comes when that right has passed,
        by our clock since the request was sent, may have been given after it: another epoch may have opened without the record.
        Such a record is of unknown outcome, and is put again: who holds now says whether it is history.

        A host's right is extended only by records that were acknowledged under an assignment: by those the controller knows
        which host it gave the right to, and does not move that host's agents before it has passed."""
        answer = wire.ingest_answer(response.content, len(attempts))
        self._see_epoch(answer.epoch)
        late = self._clock.monotonic() - sent_at - answer.right_seconds
        if not late < 0:  # not a number counts as late
            return [_too_late(ack, late) if ack.status in ACKNOWLEDGED else ack for ack in answer.acks]
        settled = [n for ack, n in zip(answer.acks, attempts, strict=True) if ack.status in ACKNOWLEDGED]
        if any(n > 0 or not self._is_host for n in settled):
            self.right.extend(sent_at, answer.right_seconds)
        return answer.acks

    def _see_epoch(self, epoch: int) -> None:
        if epoch < self.epoch:
            raise StaleEpoch(
                f"an answer came under epoch {epoch}, and epoch {self.epoch} was seen before",
                hint="ask the active controller",
                epoch=epoch,
            )
        self.epoch = epoch

    # -------------------------------------------------------------------------------------------------------- reading

    async def latest(
        self, agent: str, kind: str = Kind.CHECKPOINT, *, fresh: bool = True, timeout_seconds: float | None = None
    ) -> tuple[Record, bytes] | None:
        """The newest record of a kind with its verified body; None when the agent has none. Raises Unavailable, Corrupt.

        ``fresh``: only the active controller answers. A standby's copy may be behind, and an agent that resumed from it would
        silently do its work again; say False to look at a copy when nobody is active."""
        try:
            path = f"{wire.agent_path(agent, 'latest')}?kind={quote(kind, safe='')}&fresh={str(fresh).lower()}"
            return await self._read(path, timeout_seconds)
        except NotFound:
            return None

    async def get(
        self,
        agent: str,
        id: str,  # noqa: A002
        *,
        fresh: bool = True,
        timeout_seconds: float | None = None,
    ) -> tuple[Record, bytes]:
        """One record with its verified body; ``fresh`` as in ``latest``. Raises NotFound, Unavailable, Corrupt."""
        path = f"{wire.agent_path(agent, 'records', id)}?fresh={str(fresh).lower()}"
        found = await self._read(path, timeout_seconds)
        if (found[0].agent, found[0].id) != (agent, id):
            raise Refused(f"asked for record {id!a} of agent {agent!a}, got {found[0].id!a} of {found[0].agent!a}")
        return found

    async def list(
        self,
        agent: str,
        *,
        limit: int = 100,
        before: str | None = None,
        fresh: bool = True,
        timeout_seconds: float | None = None,
    ) -> tuple[Record, ...]:
        """An agent's records without bodies, newest first; ``before``: only older ones than that record; ``fresh`` as in
        ``latest``. Raises NotFound, Unavailable, Corrupt."""

        async def once(deadline: float) -> tuple[Record, ...]:
            path = f"{wire.agent_path(agent, 'records')}?limit={limit}&fresh={str(fresh).lower()}"
            if before is not None:
                path += f"&before={quote(before, safe='')}"
            return await self._call("GET", path, deadline, lambda answer: wire.records(answer.content))

        return await self._retry(once, self._deadline(timeout_seconds), f"records of agent {agent!a}", mutating=False)

    async def _read(self, path: str, timeout_seconds: float | None) -> tuple[Record, bytes]:
        async def once(deadline: float) -> tuple[Record, bytes]:
            return await self._call("GET", path, deadline, _record_answer)

        return await self._retry(once, self._deadline(timeout_seconds), path, mutating=False)

    # ---------------------------------------------------------------------------------------------------------- hosts

    async def beat(self, beat: Beat, *, timeout_seconds: float | None = None) -> BeatAnswer:
        """Tells *every* configured controller (a standby keeps a warm pool of the hosts that it knows) and returns the answer
        of the active one with the greatest epoch; when none is active, one that says so. Beats of one host must not overlap:
        wait for one before the next. Raises Unavailable when no controller answered."""
        self._is_host = True
        limit = self._attempt if timeout_seconds is None else timeout_seconds
        sent_at = self._clock.monotonic()
        results = await asyncio.gather(
            *(self._beat(url, beat, limit) for url in self._endpoints.urls()), return_exceptions=True
        )
        answers = [item for item in results if isinstance(item, BeatAnswer)]
        for item in results:
            if isinstance(item, BaseException) and not isinstance(item, DrError):
                raise item
        if not answers:
            failures = "; ".join(str(item) for item in results)[:1000]
            raise Unavailable(f"no controller answered the beat of host {beat.host!a}: {failures}", hint="keep beating")
        best = max(answers, key=lambda answer: (answer.active, answer.epoch))
        if best.active:
            self._see_epoch(best.epoch)
            self.right.extend(sent_at, best.right_seconds)
        return best

    async def _beat(self, url: str, beat: Beat, limit: float) -> BeatAnswer:
        try:
            async with asyncio.timeout(limit):
                answer = await self._request(
                    "POST", f"{url}/v1/hosts/{quote(beat.host, safe='')}/beat", wire.beat_body(beat), "application/json"
                )
        except TimeoutError:
            raise OutcomeUnknown(f"{url} did not answer within {limit:g} s", hint="keep beating") from None
        if answer.status_code != 200:
            raise wire.error_answer(answer.status_code, answer.content)
        return wire.beat_answer(answer.content)

    # ---------------------------------------------------------------------------------------------------------- spool

    async def drain(self, *, timeout_seconds: float | None = None) -> int:
        """Sends what is spooled, in order per agent. Returns how many records were settled (sent, or refused and set aside).
        Raises Unavailable or OutcomeUnknown when a controller stops answering."""
        if self._spool is None:
            return 0
        deadline = self._deadline(timeout_seconds)
        settled = 0
        for agent in self._spool.agents():
            async with self._turns.of(agent, deadline):
                settled += await self._drain_agent(self._spool, agent, deadline)
        return settled

    async def _drain_agent(self, spool: Spool, agent: str, deadline: float) -> int:
        settled = 0
        while spool.waiting(agent):
            item = await asyncio.to_thread(spool.first, agent)
            if item is None:
                break
            n, letter = item
            try:
                await self._deliver(letter, deadline)
            except (Unavailable, StaleEpoch):
                raise
            except DrError as error:
                await asyncio.to_thread(spool.reject, n, f"{error.code}: {error.message}")
            else:
                await asyncio.to_thread(spool.remove, n)
            settled += 1
        return settled

    def _start_draining(self) -> None:
        if self._drainer is None or self._drainer.done():
            self._drainer = asyncio.get_running_loop().create_task(self._drain_for_ever())

    async def _drain_for_ever(self) -> None:
        while self._spool is not None and self._spool.agents():
            try:
                await self.drain()
            except (Unavailable, StaleEpoch):
                await self._clock.sleep(self._random.uniform(0.5, 1.0))

    # ------------------------------------------------------------------------------------------------------- one call

    def _deadline(self, timeout_seconds: float | None) -> float:
        return asyncio.get_running_loop().time() + (self._timeout if timeout_seconds is None else timeout_seconds)

    async def _retry(self, once: Callable[[float], Awaitable[T]], deadline: float, what: str, *, mutating: bool = True) -> T:
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
            if isinstance(last, Unavailable) and last.retry_after_seconds:  # told how long: that, and not all at once
                pause += last.retry_after_seconds
            await self._clock.sleep(min(pause, max(0.0, deadline - loop.time())))
        if isinstance(last, StaleEpoch):
            raise last
        if doubt and mutating:
            raise OutcomeUnknown(
                f"{what}: not acknowledged in time, and it may have been taken; last: {last.message}",
                hint="put the same record (equal id and body) again to learn it",
            ) from last
        raise Unavailable(f"{what}: no controller took it in time; last: {last.message}", hint="wait, then try again") from last

    async def _call(
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
        endpoint = self._endpoints.pick()
        if endpoint is None:
            raise Unavailable("every controller failed several times in a row and is left alone for a moment", hint="wait")
        try:
            async with asyncio.timeout_at(min(deadline, asyncio.get_running_loop().time() + self._attempt)):
                answer = await self._request(method, endpoint.url + path, content, content_type)
        except TimeoutError:
            self._endpoints.failed(endpoint)
            raise OutcomeUnknown(f"{endpoint.url} did not answer in time", hint="a retry is safe") from None
        except Unavailable:
            self._endpoints.failed(endpoint)
            raise
        if answer.status_code == 200:
            try:
                value = read(answer)
            except StaleEpoch:
                self._endpoints.not_active(endpoint, None)
                raise
            except (OutcomeUnknown, Corrupt):
                self._endpoints.failed(endpoint)
                raise
            self._endpoints.succeeded(endpoint)
            return value
        error = wire.error_answer(answer.status_code, answer.content)
        if isinstance(error, NotActive):
            if self._endpoints.not_active(endpoint, error.active):
                error.hint = _ASK_AGAIN
        elif isinstance(error, Throttled) or (isinstance(error, Unavailable) and error.retry_after_seconds):
            pass  # the controller is well, and says when it will take more
        elif isinstance(error, (Unavailable, FenceLost)) and not isinstance(error, Fenced):
            self._endpoints.failed(endpoint)
        raise error

    async def _request(self, method: str, url: str, content: bytes, content_type: str) -> httpx.Response:
        """Raises Unavailable when the request did not leave, OutcomeUnknown when it may have arrived."""
        headers = {"X-DR-Host": self._host} if self._host else {}
        if content_type:
            headers["Content-Type"] = content_type
        try:
            return await self._http.request(method, url, content=content or None, headers=headers)
        except (httpx.ConnectError, httpx.PoolTimeout) as error:
            raise Unavailable(f"{url} cannot be reached: {error}", hint="wait, or try another controller") from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise OutcomeUnknown(f"{url}: the answer was lost: {error!r}", hint="a retry is safe") from error


def _record_answer(answer: httpx.Response) -> tuple[Record, bytes]:
    return wire.record_and_body(answer.headers.get("X-DR-Record", ""), answer.content)


_ASK_AGAIN = "another controller was named: ask it at once"


def _too_late(ack: Ack, late_seconds: float) -> Ack:
    """What is left of an acknowledgement that came when the right of its holder had passed."""
    error = OutcomeUnknown(
        f"record {ack.id!a} of agent {ack.agent!a}: it was acknowledged {late_seconds:.1f} s after that holder's right ended",
        hint="put it again; the controller that holds now says whether it is history",
    )
    return Ack(ack.agent, ack.id, "failed", error=error.to_dict())


def _settled(ack: Ack, copies: int) -> Ack:
    """The acknowledgement itself. Raises what it says instead, or OutcomeUnknown when it stands for fewer copies than asked."""
    if ack.status not in ACKNOWLEDGED:
        raise wire.error_from(ack.error)
    if ack.copies < copies:
        raise OutcomeUnknown(
            f"record {ack.id!a} of agent {ack.agent!a} is in {ack.copies} stores, {copies} were asked for",
            hint="put it again; it is acknowledged when it has its copies",
        )
    return ack
