"""An agent's records as the ordered log that they are: indexed here, read incrementally, appended to without surprises.

What the adapters (LangGraph, sessions) have in common:

- **Index**: the records without their bodies, oldest first. A refresh asks for the newest page and stops at the first record
  that is known. What this index holds beyond that record is not history any more (a region was lost with it) and is dropped.
- **Never backwards**: a list that lacks records which were acknowledged or listed here before was answered by a controller that
  is behind, and is asked for again. Only when a newer record is there and the old ones are not, they are given up as lost.
- **Saying it again**: an (agent, id) is written once. Something that was said, then withdrawn or said differently, then said
  again, gets a new id of its own; see ``append``.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from controller.agent.client import ACKNOWLEDGED, AsyncCheckpoints
from controller.domain.model import Record
from controller.errors import Conflict, NotFound, Unavailable
from controller.stream.limits import DEFAULT_LIMITS
from controller.stream.live import BY, REPEAT, SEEN, in_force

logger = logging.getLogger(__name__)

FIRST_PAGE = 50
PAGE = 1000
"""The API's own limit."""
MARK = "mark"
"""Kind of a record that says nothing: whoever sees it has everything that came before it."""
STALE_TRIES = 5
"""Times that a list without our own records is asked for again before a mark is written to learn the truth."""
PAUSE_SECONDS = 0.05
CONCURRENT_READS = 8

_UNSAFE = re.compile(r"[%~/@\x00-\x20\x7f-\U0010ffff]")


def escape(text: str, limit: int) -> str:
    """A visible ASCII name for any text: unsafe characters percent-encoded, ``/``, ``@`` and ``~`` too. What would be longer
    than ``limit`` keeps its beginning and ends in ``%~`` and a hash. Different texts give different names."""
    name = _UNSAFE.sub(lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode("utf-8", "surrogatepass")), text)
    if not name.strip("."):  # "." and ".." mean something in the path of a URL
        name = name.replace(".", "%2E")
    if len(name) <= limit:
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return f"{name[: limit - 34]}%~{digest}"


def agent_name(prefix: str, text: str) -> str:
    """Agent for a thread or session: what is safe stays readable. An empty text is ``%~empty``."""
    return prefix + (escape(text, DEFAULT_LIMITS.agent_chars - len(prefix)) or "%~empty")


class MayAct(Protocol):
    """A ``Hold``, a ``SyncHold`` or a ``Right``: ``check`` raises Fenced once the agent must not act any more."""

    def check(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Writing:
    """Under what an adapter writes. ``copies``: regions before an acknowledgement; ``attempt``: of the assignment, 0 = none;
    ``by``: name of this writer's life, with which it is fenced if another one went on while it slept; "" = it is not."""

    copies: int = 1
    attempt: int = 0
    by: str = ""


@dataclass(frozen=True, slots=True)
class Draft:
    """A record to be appended."""

    id: str
    kind: str
    body: bytes
    parent: str | None = None
    meta: Mapping[str, str] = field(default_factory=dict)


def once(_place: int) -> bool:
    """For ``append``: what was said stays said."""
    return True


class Journal:
    """One agent's records. One event loop, the client's, owns it."""

    def __init__(self, client: AsyncCheckpoints, agent: str) -> None:
        self.agent = agent
        self.version = 0
        """Grows whenever ``records`` changes."""
        self.records: list[Record] = []
        """As of the last refresh, oldest first."""
        self.parsed: tuple[int, Any] | None = None
        """What the adapter made of ``records``, with the ``version`` that it was made from."""
        self.notes: dict[tuple[str, ...], set[str]] = {}
        """The adapter's own."""
        self._log: tuple[int, list[tuple[int, Record]]] | None = None
        self._client = client
        self._places: dict[str, int] = {}
        self._expected: set[str] = set()
        """Acknowledged to us and not listed yet, or listed once and not in the last list."""
        self._attempt = 0
        self._seen_epoch = 0
        """The newest epoch that was known when we wrote last; 0 = not written since the log was opened."""
        self._lock = asyncio.Lock()
        self._reads = asyncio.Semaphore(CONCURRENT_READS)

    # -------------------------------------------------------------------------------------------------------- reading

    @property
    def log(self) -> list[tuple[int, Record]]:
        """The records that count, with their places: without what people stepped over when they gave an earlier state back."""
        if self._log is None or self._log[0] != self.version:
            self._log = self.version, in_force(self.records)
        return self._log[1]

    def place(self, record_id: str) -> int | None:
        """Where a record stands in ``records``."""
        return self._places.get(record_id)

    def opened(self) -> None:
        """Work begins anew from what the log says now: whoever wrote before, we go on from there."""
        self._seen_epoch = 0

    async def refresh(self) -> Sequence[Record]:
        """Brings the index up to date. Returns the records that count (``log``), oldest first.
        Raises Unavailable, also when only controllers that are behind answer."""
        async with self._lock:
            await self._client.drain()  # what is spooled comes before what we are about to read
            for attempt in range(STALE_TRIES):
                await self._pull()
                if not self._expected:
                    return [record for _, record in self.log]
                await asyncio.sleep(PAUSE_SECONDS * 2**attempt)
            await self._pull_past_a_mark()
            if self._expected:
                logger.warning("agent %a: %d records were lost with their region", self.agent, len(self._expected))
                self._expected.clear()
            return [record for _, record in self.log]

    async def _pull_past_a_mark(self) -> None:
        """A record that is written now stands behind everything that is still history."""
        mark = f"mark/{uuid.uuid4().hex}"
        await self._client.put(self.agent, mark, b"", kind=MARK, attempt=self._attempt)
        for attempt in range(2 * STALE_TRIES):
            await self._pull()
            if mark in self._places:
                return
            await asyncio.sleep(PAUSE_SECONDS * 2 ** min(attempt, STALE_TRIES))
        raise Unavailable(
            f"the controllers that answer have not seen agent {self.agent!a}'s newest record", hint="wait, then try again"
        )

    async def _pull(self) -> None:
        news: list[Record] = []
        before: str | None = None
        limit = FIRST_PAGE
        while True:
            page = await self._page(limit, before)
            for record in page:
                at = self._places.get(record.id)
                if at is not None and self.records[at].sha256 == record.sha256:
                    self._adopt(at + 1, news)
                    return
                news.append(record)
            if len(page) < limit:
                self._adopt(0, news)
                return
            before, limit = page[-1].id, PAGE

    def _adopt(self, keep: int, news: list[Record]) -> None:
        if keep == len(self.records) and not news:
            return
        for record in self.records[keep:]:
            del self._places[record.id]
            self._expected.add(record.id)
        del self.records[keep:]
        for record in reversed(news):
            self._places[record.id] = len(self.records)
            self.records.append(record)
            self._expected.discard(record.id)
        self.version += 1

    async def _page(self, limit: int, before: str | None) -> tuple[Record, ...]:
        try:
            return await self._client.list(self.agent, limit=limit, before=before)
        except NotFound:  # `before` was lost between two pages: begin again
            if before is None:
                return ()
            raise Unavailable(f"the records of agent {self.agent!a} changed while they were read", hint="try again") from None

    async def body(self, record: Record) -> bytes:
        """The verified body. Raises NotFound when no copy has it any more, Unavailable, Corrupt."""
        async with self._reads:
            for attempt in range(STALE_TRIES):
                try:
                    return (await self._client.get(self.agent, record.id))[1]
                except NotFound:  # listed by one controller, not yet known to the one that was asked now
                    await asyncio.sleep(PAUSE_SECONDS * 2**attempt)
            return (await self._client.get(self.agent, record.id))[1]

    # ------------------------------------------------------------------------------------------------------ appending

    async def append(self, draft: Draft, writing: Writing, stands: Callable[[int], bool]) -> None:
        """Acknowledged (or spooled) when it returns. Raises like ``put``, but not Conflict; Fenced, with ``writing.by``, when
        another writer went on in an epoch that began after ours wrote last.

        ``stands(place)``: does the record at that place of ``records`` still say what it said? It is asked when the very same
        was written before; when it does not (it was withdrawn, or said differently since) it is said again under a new id.
        So is another body under an id that is taken.
        """
        self._attempt = writing.attempt
        meta = draft.meta
        if writing.by:
            meta = {**meta, BY: writing.by, **({SEEN: str(self._seen_epoch)} if self._seen_epoch else {})}
        repeat = 0
        while True:
            name = draft.id if repeat == 0 else f"{draft.id}{REPEAT}{repeat}"
            try:
                ack = await self._client.put(
                    self.agent,
                    name,
                    draft.body,
                    kind=draft.kind,
                    parent=draft.parent,
                    copies=writing.copies,
                    attempt=writing.attempt,
                    meta=meta,
                )
            except Conflict:
                repeat += 1
                continue
            if ack.status not in ACKNOWLEDGED:
                return
            self._seen_epoch = self._client.newest_epoch
            if name not in self._places:
                self._expected.add(name)
            if ack.status == "acknowledged":
                return
            await self.refresh()
            place = self.place(name)
            if place is None or stands(place):
                return
            repeat += 1


class Journals:
    """The journals of one client, by agent. Forgets the least recently used beyond ``limit``: a cold one costs a list."""

    def __init__(self, client: AsyncCheckpoints, limit: int = 1024) -> None:
        self._client = client
        self._limit = limit
        self._known: dict[str, Journal] = {}

    def of(self, agent: str) -> Journal:
        journal = self._known.pop(agent, None) or Journal(self._client, agent)
        self._known[agent] = journal
        while len(self._known) > self._limit:
            del self._known[next(iter(self._known))]
        return journal
