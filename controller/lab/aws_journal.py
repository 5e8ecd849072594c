"""A stand-in that survives SIGKILL: every request that may change something is written to a file before it is done.

What AWS promises is that an acknowledged write is durable, and that nobody ever saw a state which is gone again. ministack
keeps its state in memory and can write it down only when it ends in order. So requests that may change something pass one at
a time, are appended to a file, and are then done; a new process does all of them again, in the same order, before it answers
anybody. A request that was written and not done when the process died is done by the next one: its caller had no answer, so
both is right. A record that is not whole was never done. Doing it again gives the same state because nothing but the order
decides: identifiers are drawn from the record's number (times of creation do change; nothing here reads them).

This is durable against the death of the process, not of the machine: nothing is forced to disk.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
import uuid
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

READS = ("GetItem", "BatchGetItem", "TransactGetItems", "Query", "Scan", "Describe", "List")
"""DynamoDB's operations that change nothing, by their beginning. All others count as changes."""
_HEAD = struct.Struct(">II")

_drawn: ContextVar[list[int] | None] = ContextVar("drawn", default=None)
"""Number of the record that is being done, and how many identifiers it has drawn."""


def drawn_id() -> str:
    """In place of ministack's random ones: the same when a record is done again."""
    drawn = _drawn.get()
    if drawn is None:
        return str(uuid.uuid4())
    drawn[1] += 1
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{drawn[0]}-{drawn[1]}"))


def may_change(scope: Message) -> bool:
    """Whether a request may change something. Everything that is not known to change nothing may."""
    if scope["type"] != "http" or scope["path"].startswith("/_ministack"):
        return False
    if scope["method"] in ("GET", "HEAD", "OPTIONS"):
        return False
    target = dict(scope["headers"]).get(b"x-amz-target", b"").decode("latin-1")
    return not target.startswith("DynamoDB") or not target.rpartition(".")[2].startswith(READS)


class Journaled:
    """An ASGI application around another one. ``again`` before the first request."""

    def __init__(self, app: App, path: Path) -> None:
        self._app = app
        self._path = path
        self._number = 0
        self._turn = asyncio.Lock()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, self._begun(send))
        elif not may_change(scope):
            await self._app(scope, receive, send)
        else:
            body = await _body(receive)
            async with self._turn:
                os.write(self._fd, _record(scope, body))
                answer = await self._do(scope, body)
            for message in answer:
                await send(message)

    def _begun(self, send: Send) -> Send:
        """All that was written is done once the application has started, and before the server takes requests."""

        async def then(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                await self.again()
            await send(message)

        return then

    async def again(self) -> int:
        """Does everything that is written, in its order, and cuts off what is not whole. Returns how many."""
        whole = 0
        for scope, body, end in _records(self._path):
            await self._do(scope, body)
            whole = end
        os.ftruncate(self._fd, whole)
        os.lseek(self._fd, whole, os.SEEK_SET)
        return self._number

    async def _do(self, scope: Message, body: bytes) -> list[Message]:
        """What it answers."""
        self._number += 1
        answer: list[Message] = []
        sent = False

        async def receive() -> Message:
            nonlocal sent
            if sent:
                return {"type": "http.disconnect"}
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            answer.append(message)

        token = _drawn.set([self._number, 0])
        try:
            await self._app(dict(scope), receive, send)
        finally:
            _drawn.reset(token)
        return answer


async def _body(receive: Receive) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _record(scope: Message, body: bytes) -> bytes:
    head = json.dumps({
        "type": "http",
        "method": scope["method"],
        "path": scope["path"],
        "raw_path": scope.get("raw_path", b"").decode("latin-1"),
        "query_string": scope["query_string"].decode("latin-1"),
        "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in scope["headers"]],
    }).encode()  # fmt: skip
    return _HEAD.pack(len(head), len(body)) + head + body


def _records(path: Path) -> Iterator[tuple[Message, bytes, int]]:
    """Each whole record: request, body, and where it ends in the file."""
    with path.open("rb") as file:
        while len(sizes := file.read(_HEAD.size)) == _HEAD.size:
            head_bytes, body_bytes = _HEAD.unpack(sizes)
            data = file.read(head_bytes + body_bytes)
            if len(data) < head_bytes + body_bytes:
                return
            scope = json.loads(data[:head_bytes])
            scope["raw_path"] = scope["raw_path"].encode("latin-1")
            scope["query_string"] = scope["query_string"].encode("latin-1")
            scope["headers"] = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in scope["headers"]]
            yield {"scheme": "http", "http_version": "1.1", **scope}, data[head_bytes:], file.tell()
