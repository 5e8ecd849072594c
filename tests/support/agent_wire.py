"""A controller as agents see it: the wire contract over plain dicts, with faults. Serves an httpx transport and, over real
HTTP, the Starlette application of the integration tests. Bodies are really decoded, deltas really applied."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import unquote

import httpx

from controller.agent import AsyncCheckpoints
from controller.domain.model import Encoding, Frame, Record
from controller.errors import DrError
from controller.lab.virtual_time import VirtualClock
from controller.stream.delta import open_frame
from controller.stream.segment import decode_frames

FaultResult = tuple[int, bytes] | None
Fault = Callable[["WireController", str], Any]
"""Called with (controller, moment): moment "before" or "after" the work. May raise, sleep, or return (status, body) or
(status, body, headers)."""


@dataclass
class Store:
    """What all controllers of a group share: records in order, by (agent, id)."""

    records: dict[tuple[str, str], tuple[Record, bytes]] = field(default_factory=dict)
    encodings: list[tuple[str, str, str]] = field(default_factory=list)
    sent_bytes: int = 0
    """Of payloads, as they came over the wire."""
    stores: int = 3
    fail_copies: bool = False
    attempts: dict[str, int] = field(default_factory=dict)

    def ids(self, agent: str) -> list[str]:
        return [key[1] for key in self.records if key[0] == agent]

    def put(self, frame: Frame) -> dict[str, Any]:
        record = frame.record
        answer: dict[str, Any] = {
            "agent": record.agent,
            "id": record.id,
            "status": "failed",
            "seq": 0,
            "copies": 0,
            "error": None,
        }

        def failed(code: str, message: str = "no") -> dict[str, Any]:
            return {**answer, "error": {"code": code, "message": message, "hint": "", "exit_code": 3}}

        if record.attempt < self.attempts.get(record.agent, 0):
            return failed("stale_attempt", f"attempt {record.attempt} is not the present one")
        known = self.records.get((record.agent, record.id))
        if known is not None and known[0].sha256 != record.sha256:
            return failed("conflict", "another body")
        if self.fail_copies and record.copies > 1:
            return failed("outcome_unknown", "not committed in 2 region stores")
        if known is None:
            base = None
            if frame.encoding is Encoding.DELTA:
                base = self.records.get((record.agent, frame.base or ""))
                if base is None:
                    return failed("unknown_base")
            try:
                body = open_frame(frame, base[1] if base else None)
            except DrError as error:
                return failed(error.code, error.message)
            self.encodings.append((record.agent, record.id, frame.encoding.value))
            self.sent_bytes += len(frame.payload)
            self.records[record.agent, record.id] = (record, body)
        status = "acknowledged" if known is None else "duplicate"
        return {**answer, "status": status, "seq": len(self.records), "copies": max(record.copies, 1)}


@dataclass
class WireController:
    """One controller instance."""

    url: str
    store: Store
    active: bool = True
    epoch: int = 5
    right_seconds: float = 5.0
    active_address: str | None = None
    fault: Fault | None = None
    calls: list[str] = field(default_factory=list)
    received_bytes: int = 0
    """Of bodies of requests."""
    batches: list[int] = field(default_factory=list)
    beats: list[dict[str, Any]] = field(default_factory=list)
    assignments: list[dict[str, Any]] = field(default_factory=list)

    async def handle(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        self.calls.append(f"{method} {path}")
        for moment in ("before", "work", "after"):
            if moment == "work":
                try:
                    status, headers, answer = self._work(method, path, body)
                except DrError as error:
                    status, headers, answer = error.http_status, {}, json.dumps({"error": error.to_dict()}).encode()
            elif self.fault is not None:
                result = self.fault(self, moment)
                if asyncio.iscoroutine(result):
                    result = await result
                if result is not None:
                    return result[0], dict(*result[2:]), result[1]
        return status, headers, answer

    def _work(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        path, _, query = path.partition("?")
        parts = [unquote(part) for part in path.split("/")[2:]]
        if parts[0] == "hosts":
            self.beats.append({"host": parts[1], **json.loads(body)})
            right, given = (self.right_seconds, self.assignments) if self.active else (0.0, [])
            return self._json(
                {
                    "active": self.active,
                    "epoch": self.epoch,
                    "right_seconds": right,
                    "assignments": given,
                    "active_address": self.active_address,
                }
            )
        if not self.active:
            error = {"code": "not_active", "message": "standby", "hint": "", "exit_code": 3, "active": self.active_address}
            return 503, {}, json.dumps({"error": error}).encode()
        if parts[0] == "records":
            frames = decode_frames(body)
            self.batches.append(len(frames))
            self.received_bytes += len(body)
            acks = [self.store.put(item) for item in frames]
            return self._json({"epoch": self.epoch, "right_seconds": self.right_seconds, "acks": acks})
        if parts[0] == "tasks":
            ack = {
                "agent": json.loads(body)["agent"],
                "id": "task-1",
                "status": "acknowledged",
                "seq": 1,
                "copies": 1,
                "error": None,
            }
            return self._json({"epoch": self.epoch, "right_seconds": self.right_seconds, "acks": [ack]})
        if parts == ["agents"]:
            return self._agents(dict(item.split("=", 1) for item in query.split("&")))
        return self._read(parts[1], parts[2:], query)

    def _agents(self, asked: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        names = sorted({agent for agent, _ in self.store.records})
        wanted = [n for n in names if n > unquote(asked["after"]) and n.startswith(unquote(asked["prefix"]))]
        seen = {"records": 1, "latest_id": "1", "latest_seq": 1, "received_at": 1.0, "attempt": 0, "host": ""}
        return self._json([{"agent": name, **seen} for name in wanted[: int(asked["limit"])]])

    def _read(self, agent: str, rest: list[str], query: str) -> tuple[int, dict[str, str], bytes]:
        mine = [item for key, item in self.store.records.items() if key[0] == agent]
        if rest == ["records"]:
            return self._json([asdict(record) for record, _ in reversed(mine)])
        if rest[0] == "latest":
            mine = [item for item in mine if f"kind={item[0].kind}" in query.split("&")]
        else:
            mine = [item for item in mine if item[0].id == rest[1]]
        if not mine:
            return 404, {}, b'{"error":{"code":"not_found","message":"no such record","hint":"","exit_code":5}}'
        record, body = mine[-1]
        return 200, {"X-DR-Record": json.dumps(asdict(record))}, body

    @staticmethod
    def _json(document: Any) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(document).encode()


class WireTransport(httpx.AsyncBaseTransport):
    """Several controllers by their URL; an URL that is not there refuses connections."""

    def __init__(self, *controllers: WireController) -> None:
        self.by_url = {controller.url: controller for controller in controllers}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = f"{request.url.scheme}://{request.url.netloc.decode()}"
        controller = self.by_url.get(url)
        if controller is None:
            raise httpx.ConnectError("refused", request=request)
        body = await request.aread()
        try:
            status, headers, answer = await controller.handle(request.method, request.url.raw_path.decode(), body)
        except ConnectionResetError as error:
            raise httpx.ReadError("reset", request=request) from error
        return httpx.Response(status, headers=headers, content=answer, request=request)


A, B, C = "http://a:1", "http://b:1", "http://c:1"
STATE = b"".join(b"line %d of a state that repeats most of itself\n" % n for n in range(200))


class World:
    """Controllers a and b of one group, and a client of both."""

    def __init__(self, **options: Any) -> None:
        self.store = Store()
        self.a = WireController(A, self.store)
        self.b = WireController(B, self.store, active=False, active_address=A)
        self.transport = WireTransport(self.a, self.b)
        self.clock = VirtualClock()
        self.options = {"rng": random.Random(7), "timeout_seconds": 10.0, "attempt_seconds": 2.0, **options}

    def client(self, *urls: str, **options: Any) -> AsyncCheckpoints:
        return AsyncCheckpoints(urls or (A, B), clock=self.clock, transport=self.transport, **{**self.options, **options})


async def hang(_: WireController, moment: str) -> None:
    await asyncio.sleep(1e6)


def lose_answer(times: int) -> Any:
    left = [times]

    def fault(_: WireController, moment: str) -> None:
        if moment == "after" and left[0] > 0:
            left[0] -= 1
            raise ConnectionResetError

    return fault
