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
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar
from urllib.parse import quote

import httpx
import msgspec

from controller.agent import wire
from controller.agent.caller import Caller
from controller.agent.credentials import Credentials, Secret
from controller.agent.delivery import ACKNOWLEDGED, SPOOLED, Delivery, settled
from controller.agent.endpoints import EndpointHealth, Endpoints
from controller.agent.errors import NotAllAcknowledged, StaleEpoch
from controller.agent.rights import BootClock, Clock, Right
from controller.agent.spool import Letter, Spool
from controller.domain.model import Ack, AgentSeen, Beat, BeatAnswer, Kind, Record
from controller.domain.sharing import LEAD
from controller.errors import DrError, NotFound, OutcomeUnknown, Refused, Unavailable

__all__ = ["ACKNOWLEDGED", "SPOOLED", "AsyncCheckpoints"]

T = TypeVar("T")


class AsyncCheckpoints:
    """One per process and event loop. Use as ``async with``, or call ``close``.

    ``endpoints``: base URLs of controllers. ``timeout_seconds``: default deadline of a call, retries included;
    ``attempt_seconds``: longest wait for one answer. ``spool``: None = a put that nobody acknowledges raises.
    ``delta_bytes``: memory for previous bodies, 0 = no deltas. ``batch_*``, ``in_flight``: bounds of requests.
    ``token`` or ``token_file``, ``ca_file``, ``cert_file``, ``key_file``: see ``credentials``; left out, the environment's.
    ``right`` is what answers extend and agents check.
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
        token: str | Secret | None = None,
        token_file: str | Path | None = None,
        ca_file: str | Path | None = None,
        cert_file: str | Path | None = None,
        key_file: str | Path | None = None,
    ) -> None:
        credentials = Credentials.of(
            token=token, token_file=token_file, ca_file=ca_file, cert_file=cert_file, key_file=key_file
        )
        credentials.check(endpoints)
        self._clock: Clock = clock or BootClock()
        rng = rng or random.Random()
        self._endpoints = Endpoints(endpoints, self._clock, rng, follow_hints=follow_hints, trusted=credentials.may_be_sent_to)
        self._is_host = bool(agent_host)
        self._caller = Caller(
            self._endpoints,
            self._clock,
            rng,
            host=agent_host,
            timeout_seconds=timeout_seconds,
            attempt_seconds=attempt_seconds,
            transport=transport,
            credentials=credentials,
        )
        self._delivery = Delivery(
            self._caller,
            self._accept,
            self._clock,
            rng,
            delta_bytes=delta_bytes,
            spool=spool,
            in_flight=in_flight,
            batch_records=batch_records,
            batch_bytes=batch_bytes,
        )
        self.right = Right(self._clock)
        self.epoch = 0
        """Greatest epoch of the lead stream that any answer carried."""
        self._epochs: dict[str, int] = {}
        """The same of the other streams: epochs of different streams are not comparable."""

    @property
    def newest_epoch(self) -> int:
        """Greatest epoch that any answer carried. A group has one counter: every epoch that opens later is greater."""
        return max(self.epoch, *self._epochs.values(), 0)

    async def __aenter__(self) -> AsyncCheckpoints:
        if self._delivery.spool is not None and self._delivery.spool.agents():
            self._delivery.start_draining()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what is in flight. The spool stays open: it belongs to the caller."""
        await self._delivery.close()
        await self._caller.close()

    def health(self) -> tuple[EndpointHealth, ...]:
        """How every controller has been doing, as this client sees it. Local, no I/O."""
        return self._endpoints.health()

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
        (result,) = await self._delivery.put([letter], self._caller.deadline(timeout_seconds, len(body)))
        if isinstance(result, DrError):
            raise result
        return result

    async def put_many(self, letters: Sequence[Letter], *, timeout_seconds: float | None = None) -> tuple[Ack, ...]:
        """Puts all, each agent's in their order and as few requests as they fit into, different agents' together.
        Raises NotAllAcknowledged (with every result)."""
        deadline = self._caller.deadline(timeout_seconds, sum(len(letter.body) for letter in letters))
        results = await self._delivery.put(letters, deadline)
        acks = tuple(item for item in results if isinstance(item, Ack))
        if len(acks) < len(results):
            raise NotAllAcknowledged(results)
        return acks

    async def create_task(self, agent: str, spec: Mapping[str, object], *, timeout_seconds: float | None = None) -> Ack:
        """Records that this agent shall run. The same spec again is a duplicate. Raises like ``put``."""
        content = msgspec.json.encode({"agent": agent, "spec": spec})

        async def once(deadline: float) -> Ack:
            sent_at = self._clock.monotonic()

            def read(answer: httpx.Response) -> Sequence[Ack]:
                return self._accept(answer.content, (0,), sent_at)

            acks = await self._caller.call("POST", "/v1/tasks", deadline, read, content, "application/json")
            return settled(acks[0], 1)

        return await self._caller.retry(once, self._caller.deadline(timeout_seconds), f"task of agent {agent!a}")

    def _accept(self, content: bytes, attempts: Sequence[int], sent_at: float) -> Sequence[Ack]:
        """Raises StaleEpoch when the answer is of a controller that was deposed: it promises nothing and extends nothing.

        An acknowledgement is a promise of a holder that had the right to give it. One that comes when that right has passed,
        by our clock since the request was sent, may have been given after it: another epoch may have opened without the record.
        Such a record is of unknown outcome, and is put again: who holds now says whether it is history.

        A host's right is extended only by records that were acknowledged under an assignment: by those the controller knows
        which host it gave the right to, and does not move that host's agents before it has passed. A right of 0 extends
        nothing: it is what another stream's holder than the lead's answers to a host, which the lead alone may lend one."""
        answer = wire.ingest_answer(content, len(attempts))
        self._see_epochs(answer.epochs or {LEAD: answer.epoch})
        holder_seconds = answer.right_seconds if answer.holder_seconds is None else answer.holder_seconds
        late = self._clock.monotonic() - sent_at - holder_seconds
        if not late < 0:  # not a number counts as late
            return [_too_late(ack, late) if ack.status in ACKNOWLEDGED else ack for ack in answer.acks]
        settled = [n for ack, n in zip(answer.acks, attempts, strict=True) if ack.status in ACKNOWLEDGED]
        if any(n > 0 or not self._is_host for n in settled):
            self.right.extend(sent_at, answer.right_seconds)
        return answer.acks

    def _see_epochs(self, epochs: Mapping[str, int]) -> None:
        for stream, epoch in epochs.items():
            known = self.epoch if stream == LEAD else self._epochs.get(stream, 0)
            if epoch < known:
                raise StaleEpoch(
                    f"an answer came under epoch {epoch}, and epoch {known} was seen before",
                    hint="ask the active controller",
                    epoch=epoch,
                )
        self.epoch = epochs.get(LEAD, self.epoch)
        self._epochs.update((stream, epoch) for stream, epoch in epochs.items() if stream != LEAD)

    # -------------------------------------------------------------------------------------------------------- reading

    async def latest(
        self, agent: str, kind: str = Kind.CHECKPOINT, *, fresh: bool = True, timeout_seconds: float | None = None
    ) -> tuple[Record, bytes] | None:
        """The newest record of a kind with its verified body; None when the agent has none. Raises Unavailable, Corrupt.

        ``fresh``: only the active controller answers. A standby's copy may be behind, and an agent that resumed from it would
        silently do its work again; say False to look at a copy when nobody is active."""
        try:
            path = f"{wire.agent_path(agent, 'latest')}?kind={quote(kind, safe='')}&fresh={str(fresh).lower()}"
            return await self._read(path, f"newest record of agent {agent!a}", timeout_seconds)
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
        found = await self._read(path, f"record {id!a} of agent {agent!a}", timeout_seconds)
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

        path = f"{wire.agent_path(agent, 'records')}?limit={limit}&fresh={str(fresh).lower()}"
        if before is not None:
            path += f"&before={quote(before, safe='')}"

        async def once(deadline: float) -> tuple[Record, ...]:
            return await self._caller.call("GET", path, deadline, lambda answer: wire.records(answer.content))

        deadline = self._caller.deadline(timeout_seconds)
        return await self._caller.retry(once, deadline, f"records of agent {agent!a}", mutating=False)

    async def agents(
        self,
        *,
        limit: int = 1000,
        after: str = "",
        prefix: str = "",
        fresh: bool = True,
        timeout_seconds: float | None = None,
    ) -> tuple[AgentSeen, ...]:
        """A page of agents, by name: at most ``limit`` (1000 at most) of those ``after`` a name, whose names begin with
        ``prefix``. Fewer than ``limit`` are the last page. ``fresh`` as in ``latest``. Raises Unavailable, Corrupt."""
        path = (
            f"/v1/agents?limit={limit}&after={quote(after, safe='')}&prefix={quote(prefix, safe='')}&fresh={str(fresh).lower()}"
        )

        async def once(deadline: float) -> tuple[AgentSeen, ...]:
            return await self._caller.call("GET", path, deadline, lambda answer: wire.agents(answer.content))

        return await self._caller.retry(once, self._caller.deadline(timeout_seconds), "the list of agents", mutating=False)

    async def _read(self, path: str, what: str, timeout_seconds: float | None) -> tuple[Record, bytes]:
        async def once(deadline: float) -> tuple[Record, bytes]:
            return await self._caller.call("GET", path, deadline, _record_answer)

        return await self._caller.retry(once, self._caller.deadline(timeout_seconds), what, mutating=False)

    # ---------------------------------------------------------------------------------------------------------- hosts

    async def beat(self, beat: Beat, *, timeout_seconds: float | None = None) -> BeatAnswer:
        """Tells *every* configured controller (a standby keeps a warm pool of the hosts that it knows) and returns the answer
        of the active one with the greatest epoch; when none is active, one that says so. Beats of one host must not overlap:
        wait for one before the next. Raises Unavailable when no controller answered."""
        self._is_host = True
        limit = self._caller.attempt_seconds if timeout_seconds is None else timeout_seconds
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
            self._see_epochs({LEAD: best.epoch})
            self.right.extend(sent_at, best.right_seconds)
        return best

    async def _beat(self, url: str, beat: Beat, limit: float) -> BeatAnswer:
        try:
            async with asyncio.timeout(limit):
                path = f"{url}/v1/hosts/{wire.segment(beat.host)}/beat"
                answer = await self._caller.request("POST", path, wire.beat_body(beat), "application/json")
        except TimeoutError:
            raise OutcomeUnknown(f"{url} did not answer within {limit:g} s", hint="keep beating") from None
        if answer.status_code != 200:
            raise wire.error_answer(answer.status_code, answer.content)
        return wire.beat_answer(answer.content)

    # ---------------------------------------------------------------------------------------------------------- spool

    async def drain(self, *, timeout_seconds: float | None = None) -> int:
        """Sends what is spooled, in order per agent. Returns how many records were settled (sent, or refused and set aside).
        Raises Unavailable or OutcomeUnknown when a controller stops answering."""
        return await self._delivery.drain(self._caller.deadline(timeout_seconds))


def _record_answer(answer: httpx.Response) -> tuple[Record, bytes]:
    return wire.record_and_body(answer.headers.get("X-DR-Record", ""), answer.content)


def _too_late(ack: Ack, late_seconds: float) -> Ack:
    """What is left of an acknowledgement that came when the right of its holder had passed."""
    error = OutcomeUnknown(
        f"record {ack.id!a} of agent {ack.agent!a}: it was acknowledged {late_seconds:.1f} s after that holder's right ended",
        hint="put it again; the controller that holds now says whether it is history",
    )
    return Ack(ack.agent, ack.id, "failed", error=error.to_dict())
