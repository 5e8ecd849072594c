"""Strands Agents' unified storage on the stream: snapshots of agents, and whatever else the SDK keeps under a key.

    storage = ReplicatedStorage(client, "fleet/strands")
    agent = Agent(session_manager=SnapshotSessionManager(session_id="customer-42", storage=storage))

A storage is one agent of the stream, so take one per agent that shall be assigned by itself. Writing a key is one record,
deleting one is a record that says so (bytes stay until retention takes them). Values are bytes and are not looked into.
Needs the extra ``strands``.
"""

from __future__ import annotations

import builtins
import uuid
from typing import Any

from strands.storage.search.keyword import KeywordSearchStrategy
from strands.types.exceptions import StorageError

from controller.agent.bridge import Bridge
from controller.agent.client import AsyncCheckpoints
from controller.agent.journal import Draft, Journal, MayAct, Writing, agent_name, escape, once
from controller.agent.sync import Checkpoints
from controller.domain.model import Kind, Record
from controller.errors import DrError, FenceLost, NotFound
from controller.stream.live import SUBJECT

ACT = "act"
WRITE, DELETE = "write", "delete"
KEY_CHARS = 8192
"""What fits into a record's ``meta``."""


class ReplicatedStorage:
    """Implements the SDK's ``Storage`` protocol; keys are any text. Its errors are the SDK's ``StorageError`` with ours as the
    cause, but Fenced and FenceLost are raised as they are: they mean stop, and are no trouble of a storage."""

    def __init__(
        self,
        client: AsyncCheckpoints | Checkpoints,
        name: str,
        *,
        copies: int = 1,
        attempt: int = 0,
        hold: MayAct | None = None,
    ) -> None:
        self._bridge = Bridge(client)
        self._journal = Journal(self._bridge.client, agent_name("", name))
        self._writing = Writing(copies, attempt)
        self._hold = hold

    async def write(self, key: str, data: bytes) -> None:
        """Safe in ``copies`` regions when it returns."""
        await self._append(WRITE, key, bytes(data))

    async def read(self, key: str) -> bytes | None:
        """The newest value, None when there is none or it was deleted."""
        try:
            return await self._bridge.wait(self._read(key))
        except DrError as error:
            raise _storage_error(error, f"cannot read {key!r}") from error

    async def delete(self, key: str) -> None:
        """A key that does not exist is fine."""
        try:
            known = key in await self._bridge.wait(self._keys())
        except DrError as error:
            raise _storage_error(error, f"cannot delete {key!r}") from error
        if known:
            await self._append(DELETE, key, b"")

    async def list(self, query: str = "") -> builtins.list[str]:
        """Keys that begin so, sorted."""
        try:
            return sorted(key for key in await self._bridge.wait(self._keys()) if key.startswith(query))
        except DrError as error:
            raise _storage_error(error, "cannot list") from error

    async def search(self, query: str) -> builtins.list[Any]:
        """The SDK's own default: words of the query in keys and values, best first."""
        found: builtins.list[Any] = await KeywordSearchStrategy().search(self, query)
        return found

    async def _append(self, act: str, key: str, data: bytes) -> None:
        if not key or len(key) > KEY_CHARS:
            raise StorageError(f"a key has 1 to {KEY_CHARS} characters, this one has {len(key)}")
        if self._hold is not None:
            self._hold.check()
        draft = Draft(f"{act}/{escape(key, 200)}/{uuid.uuid4().hex}", Kind.CHECKPOINT, data, meta={ACT: act, SUBJECT: key})
        try:
            await self._bridge.wait(self._journal.append(draft, self._writing, once))
        except DrError as error:
            raise _storage_error(error, f"cannot {act} {key!r}") from error

    async def _keys(self) -> dict[str, Record]:
        found: dict[str, Record] = {}
        for record in await self._journal.refresh():
            act, key = record.meta.get(ACT), record.meta.get(SUBJECT, "")
            if act == WRITE:
                found[key] = record
            elif act == DELETE:
                found.pop(key, None)
        return found

    async def _read(self, key: str) -> bytes | None:
        record = (await self._keys()).get(key)
        if record is None:
            return None
        try:
            return await self._journal.body(record)
        except NotFound:  # lost or carried away between the list and this: look again, once
            record = (await self._keys()).get(key)
            return None if record is None else await self._journal.body(record)


def _storage_error(error: DrError, what: str) -> Exception:
    if isinstance(error, FenceLost):
        return error
    wrapped: Exception = StorageError(f"{what}: {error.message}" + (f" ({error.hint})" if error.hint else ""))
    return wrapped
