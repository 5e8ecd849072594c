"""``POST /v1/records`` in front of the framework: the same answers, and nothing too large in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter

from controller.domain.model import Encoding, Frame, IngestAnswer, Record, Role
from controller.errors import Throttled, Unavailable
from controller.runtime.api import create_app
from controller.runtime.api_door import MAX_INGEST_BYTES, Door
from controller.runtime.api_records import answer_records
from controller.stream.limits import DEFAULT_LIMITS
from controller.stream.segment import encode_frames
from tests.support.fake_service import FakeService, sha256

OCTETS = {"content-type": "application/octet-stream"}


def frame(record_id: str, body: bytes = b"state") -> Frame:
    return Frame(Record("agent-1", record_id, "checkpoint", sha256(body), len(body)), Encoding.RAW, body)


@pytest.fixture
def service() -> FakeService:
    made = FakeService()
    made.role, made.right_seconds = Role.ACTIVE, 8.0
    return made


@pytest.fixture
async def http(service: FakeService) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(service, clock=service.clock, in_flight_max_bytes=100_000)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://controller") as client:
        yield client


async def test_the_answer_is_the_document_that_the_api_describes(http: httpx.AsyncClient, service: FakeService) -> None:
    data = encode_frames([frame("r1"), frame("r2")])
    answer = await http.post("/v1/records", content=data, headers=OCTETS)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    parsed = TypeAdapter(IngestAnswer).validate_json(answer.content)
    assert [ack.id for ack in parsed.acks] == ["r1", "r2"]
    again = TypeAdapter(IngestAnswer).validate_json(await answer_records(service, OCTETS["content-type"], data))
    assert answer.json() == TypeAdapter(IngestAnswer).dump_python(
        IngestAnswer(parsed.epoch, parsed.right_seconds, parsed.acks), mode="json"
    )
    assert [ack.status for ack in again.acks] == ["duplicate", "duplicate"]


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (Throttled("agent 'a' may send 1 records a second", hint="wait", retry_after_seconds=2.3), 429, "3"),
        (Unavailable("full", hint="slow down", retry_after_seconds=0.5), 503, "1"),
        (Unavailable("not the holder", hint="ask another"), 503, "1"),
    ],
)
async def test_back_pressure_says_when_to_come_again(
    http: httpx.AsyncClient, service: FakeService, error: Unavailable, status: int, retry_after: str
) -> None:
    async def refuse(frames: Any) -> IngestAnswer:
        raise error

    service.ingest = refuse  # type: ignore[method-assign]
    answer = await http.post("/v1/records", content=encode_frames([frame("r1")]), headers=OCTETS)
    assert (answer.status_code, answer.headers["retry-after"]) == (status, retry_after)
    told = answer.json()["error"]
    assert (told["code"], told["hint"]) == (error.code, error.hint)
    assert told.get("retry_after_seconds", 0) == error.retry_after_seconds


async def _read_by(app: Any, headers: list[tuple[bytes, bytes]], parts: list[bytes]) -> tuple[int, int]:
    """What the application answers, and how many parts of the body it read before that."""
    read = 0
    status = 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": parts[read - 1], "more_body": read < len(parts)}

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/records", "raw_path": b"/v1/records", "query_string": b"",
        "headers": [(b"content-type", b"application/octet-stream"), *headers], "http_version": "1.1", "scheme": "http",
        "root_path": "", "client": None, "server": None, "asgi": {"version": "3.0"},
    }  # fmt: skip
    await app(scope, receive, send)
    return status, read


async def test_one_byte_too_much_is_refused_before_it_is_read(service: FakeService) -> None:
    app = create_app(service, clock=service.clock)
    declared = [(b"content-length", str(MAX_INGEST_BYTES + 1).encode())]
    assert await _read_by(app, declared, [b"x"]) == (413, 0)
    largest = DEFAULT_LIMITS.body_bytes
    start = encode_frames([])[:16] + (100).to_bytes(4, "big") + (largest + 1).to_bytes(4, "big")
    assert await _read_by(app, [], [start[:10], start[10:], b"never read", b""]) == (413, 2)
    whole = encode_frames([])[:16] + (100).to_bytes(4, "big") + largest.to_bytes(4, "big")
    assert await _read_by(app, [], [whole, b"and no more"]) == (400, 2)  # not too large, only not a batch
    endless = [b"x" * 2**20] * 200
    status, read = await _read_by(app, [], endless)
    assert (status, read) == (413, MAX_INGEST_BYTES // 2**20 + 1)


async def test_requests_together_hold_a_bounded_number_of_bytes(http: httpx.AsyncClient, service: FakeService) -> None:
    gate, ingest = asyncio.Event(), service.ingest

    async def slow(frames: Any) -> IngestAnswer:
        await gate.wait()
        return await ingest(frames)

    service.ingest = slow  # type: ignore[method-assign]
    data = encode_frames([frame("r1", b"x" * 60_000)])
    first = asyncio.create_task(http.post("/v1/records", content=data, headers=OCTETS))
    await asyncio.sleep(0.05)
    second = await http.post("/v1/records", content=data, headers=OCTETS)
    assert (second.status_code, second.json()["error"]["code"]) == (503, "unavailable")
    assert "requests are under way" in second.json()["error"]["message"]
    gate.set()
    assert (await first).status_code == 200
    assert (await http.post("/v1/records", content=data, headers=OCTETS)).status_code == 200  # what was held is given back


async def test_bodies_of_undeclared_length_take_room_as_they_come_and_give_it_back(service: FakeService) -> None:
    """Without it any number of them, each below the limit of one, would be in memory at once."""
    app = create_app(service, clock=service.clock, in_flight_max_bytes=100_000)
    batch = encode_frames([frame("r1", b"x" * 60_000)])
    standing, go_on = asyncio.Event(), asyncio.Event()

    async def half_and_then(message: int) -> bytes:
        if message:
            standing.set()
            await go_on.wait()
        return batch[:60_000] if not message else batch[60_000:]

    async def send_half() -> int:
        return await _said(app, half_and_then, parts=2)

    async def at_once(message: int) -> bytes:
        return batch[:50_000] if not message else batch[50_000:]

    first = asyncio.create_task(send_half())
    await standing.wait()
    assert await _said(app, at_once, parts=2) == 503
    go_on.set()
    assert await first == 200
    assert await _said(app, at_once, parts=2) == 200, "the room was given back"


async def test_large_documents_share_a_room_too(service: FakeService) -> None:
    inner = create_app(service, clock=service.clock)
    app = Door(inner, in_flight_max_bytes=100_000)
    standing, go_on = asyncio.Event(), asyncio.Event()

    async def half_and_then(message: int) -> bytes:
        if message:
            standing.set()
            await go_on.wait()
        return b" " * 60_000 if not message else b"{}"

    async def at_once(message: int) -> bytes:
        return b" " * 60_000 if not message else b"{}"

    path = "/v1/hosts/h/beat"
    first = asyncio.create_task(_said(app, half_and_then, parts=2, path=path))
    await standing.wait()
    assert await _said(app, at_once, parts=2, path=path) == 503
    go_on.set()
    assert await first == 422
    assert await _said(app, at_once, parts=2, path=path) == 422, "the room was given back"


async def _said(app: Any, part: Callable[[int], Awaitable[bytes]], *, parts: int, path: str = "/v1/records") -> int:
    """The status of a request whose body comes in parts, without a declared length."""
    read = status = 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": await part(read - 1), "more_body": read < parts}

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    kind = b"application/octet-stream" if path == "/v1/records" else b"application/json"
    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(b"content-type", kind)], "http_version": "1.1", "scheme": "http", "root_path": "", "client": None,
        "server": None, "asgi": {"version": "3.0"},
    }  # fmt: skip
    await app(scope, receive, send)
    return status
