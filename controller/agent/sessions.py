"""Conversations of the OpenAI Agents SDK on the stream.

    session = ReplicatedSession(client, "customer-42")
    await Runner.run(agent, "hello", session=session)

Implements the SDK's ``Session`` protocol and imports nothing of it. Every change of the conversation is one record: items
added, the last one taken back, all of them cleared. The conversation is what follows from the records in their order, so
nothing is ever erased by ``pop_item`` or ``clear_session``; bytes stay until retention takes them.
"""

from __future__ import annotations

import asyncio
import builtins
import uuid
from typing import Any

import msgspec

from controller.agent.bridge import Bridge
from controller.agent.client import AsyncCheckpoints
from controller.agent.journal import Draft, Journal, MayAct, Writing, agent_name, once
from controller.agent.state import encode_json
from controller.agent.sync import Checkpoints
from controller.domain.model import Kind, Record
from controller.errors import Corrupt
from controller.stream.live import CLEARS, STAYS, YES

ACT = "act"
ADD, POP, CLEAR = "add", "pop", "clear"


class ReplicatedSession:
    """One conversation. One process at a time writes it. ``copies``, ``attempt``, ``hold``: as for the LangGraph saver."""

    session_settings: Any = None
    """The SDK's ``SessionSettings``, or None. Its ``limit`` is the default of ``get_items``."""

    def __init__(
        self,
        client: AsyncCheckpoints | Checkpoints,
        session_id: str,
        *,
        copies: int = 1,
        attempt: int = 0,
        hold: MayAct | None = None,
        prefix: str = "",
    ) -> None:
        self.session_id = session_id
        self._bridge = Bridge(client)
        self._journal = Journal(self._bridge.client, agent_name(prefix, session_id))
        self._bodies: dict[str, bytes] = {}
        self._writing = Writing(copies, attempt)
        self._hold = hold

    async def get_items(self, limit: int | None = None) -> builtins.list[Any]:
        """The conversation, oldest first; with a limit its newest items. Raises Unavailable, Corrupt."""
        if limit is None and self.session_settings is not None:
            limit = self.session_settings.limit
        items = [msgspec.json.decode(item) for item in await self._bridge.wait(self._items())]
        return items if limit is None else items[max(0, len(items) - limit) :]

    async def add_items(self, items: builtins.list[Any]) -> None:
        """Safe when it returns. Raises like ``put``, and Refused for items that are no JSON."""
        if items:
            await self._write(ADD, encode_json(items))

    async def pop_item(self) -> Any | None:
        """Takes the newest item back; None when there is none."""
        items = await self._bridge.wait(self._items())
        if not items:
            return None
        await self._write(POP, b"")
        return msgspec.json.decode(items[-1])

    async def clear_session(self) -> None:
        """Begins anew."""
        await self._write(CLEAR, b"")

    async def _write(self, act: str, body: bytes) -> None:
        if self._hold is not None:
            self._hold.check()
        draft = Draft(
            f"{act}/{uuid.uuid4().hex}", Kind.CHECKPOINT, body, meta={ACT: act, (CLEARS if act == CLEAR else STAYS): YES}
        )
        await self._bridge.wait(self._journal.append(draft, self._writing, once))

    async def _items(self) -> builtins.list[msgspec.Raw]:
        """As JSON texts. Bodies that were read once are kept: they never change."""
        records = [record for record in await self._journal.refresh() if record.meta.get(ACT) in (ADD, POP, CLEAR)]
        begin = max((place for place, record in enumerate(records) if record.meta[ACT] == CLEAR), default=-1) + 1
        live = records[begin:]
        self._bodies = {record.id: self._bodies[record.id] for record in live if record.id in self._bodies}
        said = [record for record in live if record.meta[ACT] != POP]
        added = dict(zip((record.id for record in said), await asyncio.gather(*map(self._added, said)), strict=True))
        items: builtins.list[msgspec.Raw] = []
        for record in live:
            if record.meta[ACT] == POP:
                del items[-1:]
            else:
                items.extend(added[record.id])
        return items

    async def _added(self, record: Record) -> builtins.list[msgspec.Raw]:
        body = self._bodies.get(record.id)
        if body is None:
            body = self._bodies[record.id] = await self._journal.body(record)
        try:
            return msgspec.json.decode(body, type=builtins.list[msgspec.Raw])
        except msgspec.DecodeError as error:
            raise Corrupt(
                f"record {record.id!a} of session {self.session_id!a} is no list: {error}", hint="who else writes it?"
            ) from error
