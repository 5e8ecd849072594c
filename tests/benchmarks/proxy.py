"""A counting proxy between AWS clients and stand-ins: bytes on the wire, requests by operation, what DynamoDB would bill.

One listener per link, in the caller's event loop. It adds a hop: for counting only, never while rates are measured.
"""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httptools

DYNAMODB_UNIT_BYTES = 1024
"""One write unit per KB begun. Source: DynamoDB developer guide, "Read/write capacity"."""


@dataclass(slots=True)
class Count:
    """What passed one link. ``up``: from the client to the store."""

    up: int = 0
    down: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    write_units: int = 0
    item_bytes: int = 0
    """Sizes of the items that were put, by DynamoDB's rules."""
    object_bytes: int = 0

    def document(self) -> dict[str, Any]:
        return {
            "up": self.up, "down": self.down, "requests": dict(self.requests), "write_units": self.write_units,
            "item_bytes": self.item_bytes, "object_bytes": self.object_bytes,
        }  # fmt: skip


def value_bytes(value: dict[str, Any]) -> int:
    """One attribute value. Source: DynamoDB developer guide, "Item sizes and formats"."""
    ((kind, content),) = value.items()
    if kind == "S":
        return len(content.encode())
    if kind == "B":
        return len(base64.b64decode(content)) if isinstance(content, str) else len(content)
    if kind == "N":
        return (len(content.lstrip("-").replace(".", "")) + 1) // 2 + 1
    if kind == "L":
        return 3 + sum(1 + value_bytes(item) for item in content)
    if kind == "M":
        return 3 + sum(len(name.encode()) + 1 + value_bytes(item) for name, item in content.items())
    return 1


def item_bytes(item: dict[str, Any]) -> int:
    """One item, attribute names included."""
    return sum(len(name.encode()) + value_bytes(value) for name, value in item.items())


class _Requests:
    """Follows the requests of one connection."""

    def __init__(self, count: Count) -> None:
        self._count = count
        self._parser = httptools.HttpRequestParser(self)
        self._target = ""
        self._url = b""
        self._body = bytearray()
        self._size = 0

    def feed(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._target, self._url, self._size = "", b"", 0
        self._body.clear()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-amz-target":
            self._target = value.decode().rpartition(".")[2]

    def on_body(self, body: bytes) -> None:
        self._size += len(body)
        if self._target in {"PutItem", "BatchWriteItem"}:
            self._body += body

    def on_message_complete(self) -> None:
        method = self._parser.get_method().decode()
        listing = method == "GET" and b"list-type" in self._url
        self._count.requests[f"dynamodb {self._target}" if self._target else f"s3 {'LIST' if listing else method}"] += 1
        if self._target == "PutItem":
            self._put(json.loads(bytes(self._body))["Item"])
        elif self._target == "BatchWriteItem":
            for requests in json.loads(bytes(self._body))["RequestItems"].values():
                for request in requests:
                    self._put(request["PutRequest"]["Item"])
        elif self._target == "UpdateItem":
            self._count.write_units += 1  # a head is less than a KB; ``wire`` checks it
        elif method == "PUT":
            self._count.object_bytes += self._size

    def _put(self, item: dict[str, Any]) -> None:
        size = item_bytes(item)
        self._count.item_bytes += size
        self._count.write_units += -(-size // DYNAMODB_UNIT_BYTES)


class Proxy:
    """``async with Proxy(host, port, to_host, to_port) as proxy``: ``proxy.count`` grows. Port 0 = any."""

    def __init__(self, host: str, port: int, to_host: str, to_port: int) -> None:
        self.count = Count()
        self._listen, self._to = (host, port), (to_host, to_port)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()
        return f"http://{host}:{port}"

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, *self._listen, limit=2**20)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._to)
            for one in (writer, far_writer):
                one.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            requests = _Requests(self.count)
            back = asyncio.create_task(self._back(far_reader, writer))
            try:
                while data := await reader.read(2**18):
                    self.count.up += len(data)
                    requests.feed(data)
                    far_writer.write(data)
                    await far_writer.drain()
            finally:
                back.cancel()
                far_writer.close()
        except (OSError, asyncio.CancelledError):
            pass  # a connection that ends; its client sees it and says so
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**18):
            self.count.down += len(data)
            writer.write(data)
            await writer.drain()
        writer.close()
