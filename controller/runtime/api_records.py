"""``POST /v1/records``, in front of the web framework: the one route that every record takes.

Same errors and documents as everywhere else in the API; only the framework's routing, dependencies and serialisation are left
out, which cost more than all that the holder itself does for a small record. What is read is bounded while it is read: a body
that is too large is refused by its declared length, or by the length of its first record, before it is in memory; and all
requests together hold no more than ``in_flight_max_bytes``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controller.domain.access import ANYBODY, Caller, Permit
from controller.domain.model import Frame
from controller.errors import Corrupt, DrError, Unavailable
from controller.runtime.api_access import caller_of, merged_acks, refused_frames, require
from controller.runtime.api_door import MAX_INGEST_BYTES, NO_STORE, BadRequest, TooLarge, error_response, too_large
from controller.runtime.service import ControllerService
from controller.stream.limits import DEFAULT_LIMITS
from controller.stream.segment import decode_frames

PATH = "/v1/records"
OCTETS = "application/octet-stream"
INLINE_DECODE_BYTES = 512 * 1024
"""Larger batches are decoded in a thread: nothing may block the loop that renews the lease."""
IN_FLIGHT_MAX_BYTES = 256 * 2**20
_JOINED_TWICE_BYTES = 1024 * 1024
"""Bodies from this size on arrive in many pieces and are twice in memory while they are put together."""
_FIRST_FRAME = 24
"""Bytes of a batch up to and with the lengths of its first frame (FORMAT.md, "Batch")."""
_HEADERS = [(b"content-type", b"application/json"), *((k.lower().encode(), v.encode()) for k, v in NO_STORE.items())]


async def frames_in(content_type: str, data: bytes) -> Sequence[Frame]:
    """The frames in a request's body. Raises BadRequest, and Corrupt with status 400."""
    if content_type.split(";", maxsplit=1)[0].strip().lower() != OCTETS:
        raise BadRequest(f"the body must be {OCTETS}", hint="send what encode_frames made")
    try:
        if len(data) <= INLINE_DECODE_BYTES:
            frames = decode_frames(data)
        else:
            frames = await asyncio.to_thread(decode_frames, data)
    except Corrupt as error:
        error.http_status = 400  # the sender's bytes are wrong, not ours: nobody shall retry them elsewhere
        raise
    if not frames:
        raise BadRequest("the batch holds no record", hint="send at least one record")
    return frames


async def answer_records(service: ControllerService, content_type: str, data: bytes, caller: Caller = ANYBODY) -> bytes:
    """The answer's document. Records of agents that are not the caller's fail alone. Raises DrError."""
    frames = await frames_in(content_type, data)
    refused = refused_frames(caller, frames)
    if not refused:
        return msgspec.json.encode(await service.ingest(frames))
    answer = await service.ingest([frame for number, frame in enumerate(frames) if number not in refused])
    return msgspec.json.encode(replace(answer, acks=merged_acks(caller, frames, refused, answer.acks)))


class RecordsFront:
    """ASGI middleware: answers this one route, hands everything else on."""

    def __init__(self, app: ASGIApp, *, service: ControllerService, in_flight_max_bytes: int = IN_FLIGHT_MAX_BYTES) -> None:
        self._app = app
        self._service = service
        self._in_flight_max = in_flight_max_bytes
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] != "http"
            or scope["method"] != "POST"
            or scope.get("raw_path", b"").split(b"?", 1)[0] != PATH.encode()
        ):
            await self._app(scope, receive, send)
            return
        held = 0
        caller = caller_of(scope)
        try:
            require(caller, Permit.WRITE)  # before anything is read
            headers = dict(scope["headers"])
            length = _declared(headers)
            held = self._hold(2 * length if length >= _JOINED_TWICE_BYTES else length)
            body = _Body(length)
            while not body.whole:
                if not body.take(await receive()):
                    return  # the client went away
                held += self._hold(body.undeclared())  # as it comes: nobody sends more than there is room for
            data = body.data()
            content_type = headers.get(b"content-type", b"").decode("latin-1")
            document = await answer_records(self._service, content_type, data, caller)
        except DrError as error:
            await error_response(error)(scope, receive, send)
            return
        finally:
            self._in_flight -= held
        size = (b"content-length", str(len(document)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS, size]})
        await send({"type": "http.response.body", "body": document})

    def _hold(self, size: int) -> int:
        """Counts what is about to be in memory. Raises Unavailable."""
        if size and self._in_flight and self._in_flight + size > self._in_flight_max:
            raise Unavailable(
                f"{self._in_flight} bytes of requests are under way and {size} more would pass {self._in_flight_max}",
                hint="slow down and send the same records again",
                retry_after_seconds=0.5,
            )
        self._in_flight += size
        return size


def _path(scope: Scope) -> str:
    """As it was sent, still encoded: see ``Door``."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    return raw.split(b"?", 1)[0].decode("latin-1")


def _declared(headers: dict[bytes, bytes]) -> int:
    declared = headers.get(b"content-length", b"0")
    if not declared.isdigit() or int(declared) > MAX_INGEST_BYTES:
        raise too_large(MAX_INGEST_BYTES)
    return int(declared)


class _Body:
    """A request's body while it comes. ``declared``: bytes that its head promised, which count already."""

    def __init__(self, declared: int) -> None:
        self._parts: list[bytes] = []
        self._total = 0
        self._counted = declared
        self._looked = False
        self.whole = False

    def take(self, message: Message) -> bool:
        """One part; False when the client went away. Raises TooLarge as soon as it is known."""
        if message["type"] == "http.disconnect":
            return False
        part = message.get("body", b"")
        self._total += len(part)
        if self._total > MAX_INGEST_BYTES:
            raise too_large(MAX_INGEST_BYTES)
        self._parts.append(part)
        if not self._looked and self._total >= _FIRST_FRAME:
            self._looked = True
            _look_at_first(b"".join(self._parts)[:_FIRST_FRAME])
        self.whole = not message.get("more_body", False)
        return True

    def undeclared(self) -> int:
        """Bytes that have come since the last look and that nothing had promised."""
        more = max(0, self._total - self._counted)
        self._counted += more
        return more

    def data(self) -> bytes:
        """All of it."""
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)


def _look_at_first(start: bytes) -> None:
    payload = int.from_bytes(start[20:24], "big")
    if start.startswith(b"DRBAT") and payload > DEFAULT_LIMITS.body_bytes:
        raise TooLarge(
            f"the first record has {payload:,} bytes, {DEFAULT_LIMITS.body_bytes:,} are allowed",
            hint="keep large artefacts in object storage and record their address",
        )
