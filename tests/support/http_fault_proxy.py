"""An HTTP proxy in front of a stand-in that breaks chosen requests in the ways in which networks and services break them.

It reads whole requests (HTTP/1.1, ``Content-Length`` or chunked), asks its rules in order what to do with each, and notes
what it did. The first rule that matches and has uses left decides; without one the request passes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

HEAD_MAX_BYTES = 64 * 1024
BODY_MAX_BYTES = 64 * 1024 * 1024


class Fault(StrEnum):
    """What happens to a request."""

    PASS = "pass"
    DELAY = "delay"
    """Forwarded after ``seconds``, also when the client has given up by then: the late arrival."""
    ANSWER = "answer"
    """Answered by the proxy with ``status`` and ``code``; never forwarded."""
    EXPIRED = "expired"
    """Answered as each service answers a caller whose credentials have expired; never forwarded."""
    THROTTLED = "throttled"
    """Answered as each service answers a caller who asks too often; never forwarded."""
    RESET_BEFORE = "reset before"
    """The connection is reset; never forwarded."""
    RESET_AFTER = "reset after"
    """Forwarded and answered, but the client gets a reset: applied, answer lost."""
    FAIL_AFTER = "fail after"
    """Forwarded and answered, but the client gets ``status`` and ``code``: applied, and told that it failed."""
    TWICE = "twice"
    """Forwarded two times, the client gets the second answer: what an SDK's own retry makes of a lost answer."""
    TRUNCATE = "truncate"
    """Forwarded; half of the answer's body, then the connection ends."""
    BLACKHOLE = "blackhole"
    """Never answered, never forwarded."""
    BLACKHOLE_AFTER = "blackhole after"
    """Forwarded, never answered: applied, and silence."""


@dataclass(frozen=True, slots=True)
class Request:
    """``target``: the ``X-Amz-Target`` header (DynamoDB's operation), "" for S3."""

    method: str
    path: str
    target: str
    raw: bytes


class Service(StrEnum):
    """Whom a request is for."""

    S3 = "s3"
    JSON = "json"
    """DynamoDB and KMS."""
    ROUTE53 = "route53"
    STS = "sts"


def service(request: Request) -> Service:
    """By its target, its path, its method."""
    if request.target:
        return Service.JSON
    if request.path.startswith("/2013-04-01/"):
        return Service.ROUTE53
    return Service.STS if request.method == "POST" and request.path == "/" else Service.S3


NOT_FORWARDED = frozenset({Fault.ANSWER, Fault.EXPIRED, Fault.THROTTLED, Fault.RESET_BEFORE, Fault.BLACKHOLE})
SAID = {
    Fault.EXPIRED: {
        Service.S3: (400, "ExpiredToken"),
        Service.JSON: (400, "ExpiredTokenException"),
        Service.ROUTE53: (403, "ExpiredToken"),
        Service.STS: (403, "ExpiredToken"),
    },
    Fault.THROTTLED: {
        Service.S3: (503, "SlowDown"),
        Service.JSON: (400, "ProvisionedThroughputExceededException"),
        Service.ROUTE53: (400, "Throttling"),
        Service.STS: (400, "Throttling"),
    },
}
"""Status and code. Sources: "Error responses" of S3, "Error handling" of DynamoDB, "Common errors" of Route 53 and STS."""


@dataclass(slots=True)
class Rule:
    """``times`` None = always."""

    fault: Fault
    matches: Callable[[Request], bool]
    times: int | None = None
    seconds: float = 0.0
    status: int = 503
    code: str = "ServiceUnavailable"


@dataclass(frozen=True, slots=True)
class Seen:
    """One request and what the proxy did with it. ``forwarded``: how often the stand-in got it."""

    request: Request
    fault: Fault
    forwarded: int


def operation(name: str) -> Callable[[Request], bool]:
    """Matches by AWS operation: ``UpdateItem``, ``GetItem`` by target; ``PutObject``, ``GetObject``, ``HeadObject`` by
    method.
    """
    methods = {"PutObject": "PUT", "GetObject": "GET", "HeadObject": "HEAD"}
    if name in methods:
        return lambda request: request.method == methods[name] and not request.target
    return lambda request: request.target.endswith(f".{name}")


@dataclass
class HttpFaultProxy:
    """``async with HttpFaultProxy(host, port) as proxy:`` then point clients at ``proxy.endpoint``."""

    upstream_host: str
    upstream_port: int
    rules: list[Rule] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    port: int = 0
    host: str = "127.0.0.1"
    _server: asyncio.Server | None = None
    _connections: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    async def __aenter__(self) -> HttpFaultProxy:
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.refuse()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def listen(self) -> None:
        """Accepts connections; again on the same port after ``refuse``."""
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, self.host, self.port, limit=HEAD_MAX_BYTES)
            self.port = self._server.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        """New connections are refused by the kernel; open ones live on until ``drop``."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def drop(self) -> None:
        """Ends all open connections."""
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def add(self, fault: Fault, name: str, times: int | None = None, **fields: float | int | str) -> None:
        """A rule for an AWS operation (see ``operation``)."""
        self.rules.append(Rule(fault, operation(name), times, **fields))  # type: ignore[arg-type]

    def forwarded(self, name: str) -> int:
        """How often the stand-in got a request for an operation."""
        return sum(entry.forwarded for entry in self.seen if operation(name)(entry.request))

    def count(self, name: str) -> int:
        """How often clients sent a request for an operation."""
        return sum(operation(name)(entry.request) for entry in self.seen)

    # -------------------------------------------------------------------------------------------------------- connections

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while await self._serve(reader, writer):
                    pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request. False: the connection is at its end."""
        raw = await _read_message(reader, is_request=True, go_on=lambda: writer.write(b"HTTP/1.1 100 Continue\r\n\r\n"))
        if raw is None:
            return False
        request = _parse(raw)
        rule = self._decide(request)
        fault = rule.fault if rule else Fault.PASS
        if rule and fault is Fault.DELAY:
            await asyncio.sleep(rule.seconds)
        answer = b""
        times = 0 if fault in NOT_FORWARDED else 2 if fault is Fault.TWICE else 1
        for _ in range(times):
            answer = await self._forward(request)
        self.seen.append(Seen(request, fault, times))
        if fault in (Fault.BLACKHOLE, Fault.BLACKHOLE_AFTER):
            await reader.read()  # until the client gives up
            return False
        if fault in (Fault.RESET_BEFORE, Fault.RESET_AFTER):
            _reset(writer)
            return False
        if rule and fault in (Fault.ANSWER, Fault.FAIL_AFTER):
            answer = _error_answer(request, rule.status, rule.code)
        if fault in SAID:
            answer = _error_answer(request, *SAID[fault][service(request)])
        if fault is Fault.TRUNCATE:
            head, _, body = answer.partition(b"\r\n\r\n")
            writer.write(head + b"\r\n\r\n" + body[: len(body) // 2])
            await writer.drain()
            return False
        writer.write(answer)
        await writer.drain()
        return True

    def _decide(self, request: Request) -> Rule | None:
        for rule in self.rules:
            if rule.times != 0 and rule.matches(request):
                if rule.times is not None:
                    rule.times -= 1
                return rule
        return None

    async def _forward(self, request: Request) -> bytes:
        """A connection of its own for each request: slower, and free of everybody else's state."""
        reader, writer = await asyncio.open_connection(self.upstream_host, self.upstream_port, limit=HEAD_MAX_BYTES)
        try:
            writer.write(request.raw)
            await writer.drain()
            answer = await _read_message(reader, is_request=False, without_body=request.method == "HEAD")
            if answer is None:
                raise ConnectionResetError("the stand-in closed the connection")
            return answer
        finally:
            writer.close()


# ------------------------------------------------------------------------------------------------------------------ HTTP


async def _read_message(
    reader: asyncio.StreamReader, *, is_request: bool, without_body: bool = False, go_on: Callable[[], None] | None = None
) -> bytes | None:
    """The bytes of one whole message; None when the other side is done. ``go_on``: how to ask for the body of a request
    that waits.
    """
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    if go_on is not None and _header(head, "expect").lower() == "100-continue":
        go_on()
    status = b"" if is_request else head.split(b" ", 2)[1]
    if status == b"100":
        return await _read_message(reader, is_request=False, without_body=without_body)
    if without_body or status in (b"204", b"304"):
        return head
    if "chunked" in _header(head, "transfer-encoding").lower():
        body = bytearray()
        while not body.endswith(b"0\r\n\r\n"):
            size_line = await reader.readuntil(b"\r\n")
            body += size_line + await reader.readexactly(int(size_line.split(b";")[0], 16) + 2)
            assert len(body) < BODY_MAX_BYTES
        return head + bytes(body)
    length = _header(head, "content-length")
    if not length:
        return head if is_request else head + await reader.read()
    assert int(length) < BODY_MAX_BYTES
    return head + await reader.readexactly(int(length))


def _header(head: bytes, name: str) -> str:
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.strip().lower() == name.encode():
            return value.strip().decode("latin-1")
    return ""


def _parse(raw: bytes) -> Request:
    head = raw.partition(b"\r\n\r\n")[0]
    method, path, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
    return Request(method, path, _header(head, "x-amz-target"), raw)


def _error_answer(request: Request, status: int, code: str) -> bytes:
    """An error in the form of the service: JSON for DynamoDB and KMS, XML for the others (without a body for HEAD, as S3
    does).
    """
    if service(request) is Service.JSON:
        kind = "application/x-amz-json-1.0"
        body = f'{{"__type":"com.amazonaws.dynamodb.v20120810#{code}","message":"made by the fault proxy"}}'.encode()
    else:
        kind = "application/xml"
        error = f"<Code>{code}</Code><Message>made by the fault proxy</Message>"
        if service(request) is Service.S3:
            text = f"<?xml version='1.0'?><Error>{error}</Error>"
        else:
            text = f"<?xml version='1.0'?><ErrorResponse><Error><Type>Sender</Type>{error}</Error></ErrorResponse>"
        body = text.encode()
    lines = [f"HTTP/1.1 {status} Fault", f"Content-Type: {kind}", f"Content-Length: {len(body)}", "x-amzn-RequestId: fault"]
    head = ("\r\n".join(lines) + "\r\n\r\n").encode()
    return head if request.method == "HEAD" else head + body


def _reset(writer: asyncio.StreamWriter) -> None:
    """RST instead of FIN, so that the client sees "connection reset by peer"."""
    raw: socket.socket = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
