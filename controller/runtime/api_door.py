"""The door of the HTTP API: the form of its errors, bounds on bodies, and names in paths.

Routing happens on the path as it was sent, before it is decoded, so that ``%2F`` in an agent's name stays inside its segment.
"""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any
from urllib.parse import unquote_to_bytes

from fastapi import Path, Response
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controller.errors import DrError, Refused, Unauthenticated, Unavailable
from controller.runtime.api_documents import MAX_REGION_CHARS, MAX_SALVAGE_CHARS, check_name
from controller.stream.limits import DEFAULT_LIMITS

MAX_JSON_BYTES = 1024 * 1024
MAX_BEAT_BYTES = 32 * 1024 * 1024
MAX_INGEST_BYTES = DEFAULT_LIMITS.segment_bytes
MAX_IN_FLIGHT_BYTES = 256 * 2**20
"""Of all bodies together that are in memory here: heartbeats of many hosts, and what other instances hand over."""

JSON = "application/json"
NO_STORE = {"Cache-Control": "no-store"}


class TooLarge(Refused):
    """A request body over its limit."""

    http_status = 413


class BadRequest(DrError):
    """A request that is not what the API document says."""

    code = "usage"
    exit_code = 2
    http_status = 422


@cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    """Building an adapter costs milliseconds, so each is built once."""
    return TypeAdapter(kind)


def answer(kind: Any, value: object, status: int = 200) -> Response:
    """A document as JSON, in ASCII: nothing in it can act on the terminal of who asks with curl."""
    return Response(adapter(kind).dump_json(value, ensure_ascii=True), status, NO_STORE, JSON)


def error_response(error: DrError, status: int | None = None) -> Response:
    body = json.dumps({"error": error.to_dict()}).encode()
    headers = dict(NO_STORE)
    if isinstance(error, Unavailable):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_seconds)))
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return Response(body, status or error.http_status, headers, JSON)


class Room:
    """Bytes of bodies that may be in memory at a time."""

    def __init__(self, max_bytes: int) -> None:
        self._max = max_bytes
        self._taken = 0

    @contextmanager
    def place(self) -> Iterator[Place]:
        """For one request. What it took is given back at the end."""
        mine = Place(self)
        try:
            yield mine
        finally:
            self._taken -= mine.taken

    def take(self, size: int) -> bool:
        """Whether there was room. One alone always has it."""
        if self._taken and self._taken + size > self._max:
            return False
        self._taken += size
        return True


@dataclass(slots=True)
class Place:
    """What one request takes of a ``Room``."""

    room: Room
    taken: int = 0

    def take(self, size: int) -> bool:
        """Whether there was room for so much more."""
        if size and not self.room.take(size):
            return False
        self.taken += size
        return True


class Door:
    """ASGI middleware: bounds the body, and routes by the still-encoded path, so that ``%2F`` stays inside its segment."""

    def __init__(self, app: ASGIApp, in_flight_max_bytes: int = MAX_IN_FLIGHT_BYTES) -> None:
        self._app = app
        self._room = Room(in_flight_max_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        raw = scope.get("raw_path")
        if raw:
            scope = {**scope, "path": raw.split(b"?", 1)[0].decode("latin-1")}
        limit = self._limit(scope["path"])
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not declared.isdigit() or int(declared) > limit:
            await error_response(too_large(limit))(scope, receive, send)
            return
        with self._room.place() as place:
            await self._app(scope, self._counting(receive, limit, place), send)

    @staticmethod
    def _limit(path: str) -> int:
        if path == "/v1/records" or (path.startswith("/v1/peers/") and path.endswith("/records")):
            return MAX_INGEST_BYTES
        return MAX_BEAT_BYTES if path.endswith("/beat") else MAX_JSON_BYTES

    @staticmethod
    def _counting(receive: Receive, limit: int, place: Place) -> Callable[[], Awaitable[MutableMapping[str, Any]]]:
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > limit:
                # The one exception that the framework hands on unchanged while it reads a body.
                raise HTTPException(413)
            if not place.take(len(message.get("body", b""))):
                raise HTTPException(503)
            return message

        return counted


def too_large(limit: int) -> TooLarge:
    """A request body that is refused before it is read whole."""
    return TooLarge(f"the request body is larger than {limit:,} bytes", hint="send less in one request")


def named(value: str, what: str, limit: int) -> str:
    try:
        return check_name(value, what, limit)
    except ValueError as error:
        raise BadRequest(str(error), hint="names are short and contain only visible characters") from error


def _decoded(value: str, what: str, limit: int = DEFAULT_LIMITS.agent_chars) -> str:
    """The name in one path segment. Raises BadRequest."""
    try:
        text = unquote_to_bytes(value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"{what} in the path is not UTF-8", hint="percent-encode the name as UTF-8") from error
    return named(text, what, limit)


def agent_name(agent: Annotated[str, Path(description="percent-encoded, `/` as `%2F`; 1 to 200 characters")]) -> str:
    return _decoded(agent, "agent")


def host_name(host: Annotated[str, Path(description="percent-encoded")]) -> str:
    return _decoded(host, "host")


def region_name(region: Annotated[str, Path(description="percent-encoded")]) -> str:
    return _decoded(region, "region", MAX_REGION_CHARS)


def salvage_name(salvage: Annotated[str, Path(description="percent-encoded; as the list says")]) -> str:
    return _decoded(salvage, "salvage", MAX_SALVAGE_CHARS)


def plan_id(plan: Annotated[str, Path(description="percent-encoded")]) -> str:
    return _decoded(plan, "plan")


def record_id(record: Annotated[str, Path(description="percent-encoded; 1 to 300 characters")]) -> str:
    return _decoded(record, "record id", DEFAULT_LIMITS.id_chars)
