"""One-line JSON requests over a unix socket: how the lab's processes are steered from other terminals.

A request is one line ``{"command": NAME, …arguments}``; the answer is one line ``{"ok": …}`` or ``{"error": {"code",
"message", "hint"}}``. Sockets lie in the lab's state directory, readable by their owner only. A unix socket's path may
have 107 bytes at most, which a deep directory exceeds; so paths are opened through ``/proc/self/fd`` of the directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from controller.errors import DrError, Refused, Unavailable

LINE_LIMIT = 4 * 1024 * 1024
"""Bytes of the longest request or answer."""

Handler = Callable[[str, Mapping[str, Any]], Awaitable[Any]]


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A path of a few bytes to the same socket, valid inside the ``with`` block. Raises FileNotFoundError."""
    descriptor = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)


async def serve(path: Path, handler: Handler) -> asyncio.Server:
    """Answers requests with what ``handler(command, arguments)`` returns. Replaces a socket that a dead process left behind."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ValueError):
            while line := await reader.readline():
                writer.write(json.dumps(await _answer(line, handler)).encode() + b"\n")
                await writer.drain()
        writer.close()

    path.unlink(missing_ok=True)  # noqa: ASYNC240 - a local directory, once
    with short_path(path) as short:
        server = await asyncio.start_unix_server(connected, short, limit=LINE_LIMIT)
        Path(short).chmod(0o600)  # noqa: ASYNC240
    return server


async def _answer(line: bytes, handler: Handler) -> dict[str, Any]:
    try:
        request = json.loads(line)
        command = request.pop("command")
    except (ValueError, KeyError, AttributeError, TypeError):
        return {"error": Refused("no JSON object with a command", hint='send {"command": "status"}').to_dict()}
    try:
        return {"ok": await handler(str(command), request)}
    except DrError as error:
        return {"error": error.to_dict()}
    except Exception as error:  # noqa: BLE001 - the far side gets the reason, whatever it was; the server must go on
        return {"error": {"code": "bug", "message": f"{type(error).__name__}: {error}", "hint": "see the lab's logs"}}


async def call(path: Path, command: str, *, timeout_seconds: float = 5.0, **arguments: Any) -> Any:
    """Sends one request and returns its answer. Raises Unavailable when nobody listens or answers in time, Refused on a no."""
    try:
        async with asyncio.timeout(timeout_seconds):
            with short_path(path) as short:
                reader, writer = await asyncio.open_unix_connection(short, limit=LINE_LIMIT)
            try:
                writer.write(json.dumps({"command": command, **arguments}).encode() + b"\n")
                line = await reader.readline()
            finally:
                writer.close()
    except TimeoutError:
        raise Unavailable(f"{path} did not answer {command!r} in {timeout_seconds:.0f} s", hint="see the lab's logs") from None
    except OSError as error:
        raise Unavailable(f"nobody listens at {path}: {error}", hint="start the lab with `drctl lab up`") from None
    if not line:
        raise Unavailable(f"{path} hung up on {command!r}", hint="see the lab's logs")
    answer = json.loads(line)
    if "error" in answer:
        raise _raised(answer["error"])
    return answer["ok"]


def _raised(document: Mapping[str, Any]) -> DrError:
    message, hint = str(document.get("message", "")), str(document.get("hint", ""))
    if document.get("code") in ("unavailable", "outcome_unknown", "not_active"):
        return Unavailable(message, hint=hint)
    if document.get("code") == "bug":
        return DrError(message, hint=hint)
    return Refused(message, hint=hint)
