"""The wide-area network of the lab: every store call from one region to another passes this proxy, which can slow or cut it.

One process, one TCP listener per link (from region, to region). Each direction of a connection is a queue of chunks that
are passed on ``delay_ms`` after they came. A *cut* link behaves as a black hole: connections are taken and kept, bytes go
nowhere, nothing is refused, as when a router drops packets. When the cut ends, what waited goes on its way, as TCP's
retransmission would bring about. ``reset`` breaks the link's connections at once, as a firewall that restarts does.

Run as ``python -m controller.lab.wan --config FILE``; steered over a unix socket (``controller.lab.control``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import struct
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from controller.errors import Refused
from controller.lab import control

QUEUE_BYTES = 4 * 1024 * 1024
"""A direction that holds more than this stops reading, as a full router queue and TCP's window would make the sender."""

DEFAULT_DELAY_MS = 20.0
"""One way. Between regions of one continent it is 5 to 40 ms."""


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """One link: who uses it, where it listens and what it leads to."""

    source: str
    target: str
    listen_host: str
    listen_port: int
    to_host: str
    to_port: int


@dataclass(slots=True)
class Link:
    """A link's present state and what has passed it."""

    spec: LinkSpec
    delay_ms: float = DEFAULT_DELAY_MS
    cut: bool = False
    connections: set[Pipe] = field(default_factory=set)
    bytes_passed: int = 0

    def document(self) -> dict[str, Any]:
        """What ``links`` shows of it."""
        return {
            "from": self.spec.source,
            "to": self.spec.target,
            "listen": f"{self.spec.listen_host}:{self.spec.listen_port}",
            "delay_ms": self.delay_ms,
            "cut": self.cut,
            "connections": len(self.connections) // 2,
            "bytes_passed": self.bytes_passed,
        }


class Pipe(asyncio.Protocol):
    """One side of a connection. What it reads is written to ``peer`` after the link's delay, in order."""

    def __init__(self, link: Link, loop: asyncio.AbstractEventLoop) -> None:
        self._link = link
        self._loop = loop
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._waiting_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._paused = False
        self._peer_full = False
        self._connecting: asyncio.Task[None] | None = None
        self.transport: asyncio.Transport | None = None
        self.peer: Pipe | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from asyncio's
        self._link.connections.add(self)
        if self.peer is None:
            self._connecting = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        """Opens the far side of a connection that a client opened. Bytes that come meanwhile wait in the queue."""
        far = Pipe(self._link, self._loop)
        far.peer = self
        try:
            await self._loop.create_connection(lambda: far, self._link.spec.to_host, self._link.spec.to_port)
        except OSError:
            self.abort()
            return
        if self.transport is None or self.transport.is_closing():
            far.abort()
            return
        self.peer = far
        self.schedule()

    def data_received(self, data: bytes) -> None:
        self._waiting.append((self._loop.time() + self._link.delay_ms / 1000.0, data))
        self._waiting_bytes += len(data)
        if self._waiting_bytes > QUEUE_BYTES and not self._paused and self.transport is not None:
            self.transport.pause_reading()
            self._paused = True
        self.schedule()

    def eof_received(self) -> bool:
        self.data_received(b"")
        return True

    def schedule(self) -> None:
        """Arms the timer for the oldest waiting chunk, unless the link is cut or the far side takes nothing."""
        if self._timer is None and self._waiting and self.peer is not None and not self._link.cut and not self._peer_full:
            self._timer = self._loop.call_at(self._waiting[0][0], self._deliver)

    def _deliver(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._waiting and not self._link.cut and not self._peer_full and self._waiting[0][0] <= now:
            _, data = self._waiting.popleft()
            self._waiting_bytes -= len(data)
            self._link.bytes_passed += len(data)
            self._write(data)
        if self._paused and self._waiting_bytes < QUEUE_BYTES // 2 and self.transport is not None:
            self.transport.resume_reading()
            self._paused = False
        self.schedule()

    def _write(self, data: bytes) -> None:
        far = self.peer.transport if self.peer is not None else None
        if far is None or far.is_closing():
            return
        if data:
            far.write(data)
        elif far.can_write_eof():
            far.write_eof()

    def pause_writing(self) -> None:
        if self.peer is not None:
            self.peer._peer_full = True

    def resume_writing(self) -> None:
        if self.peer is not None:
            self.peer._peer_full = False
            self.peer.schedule()

    def connection_lost(self, exc: Exception | None) -> None:
        """The other side learns of it after the delay, and not at all while the link is cut."""
        self._link.connections.discard(self)
        if self._connecting is not None:
            self._connecting.cancel()
        if self.peer is not None:
            self._loop.call_later(self._link.delay_ms / 1000.0, self._close_peer)

    def _close_peer(self) -> None:
        far = self.peer.transport if self.peer is not None else None
        if far is None or far.is_closing():
            return
        if self._link.cut or self._waiting:
            self._loop.call_later(0.05, self._close_peer)
        else:
            far.close()

    def abort(self) -> None:
        """Breaks this side with a TCP reset."""
        if self.transport is None:
            return
        sock = self.transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


class Wan:
    """All links of the lab."""

    def __init__(self, specs: Sequence[LinkSpec], delay_ms: float = DEFAULT_DELAY_MS) -> None:
        self._links = {(spec.source, spec.target): Link(spec, delay_ms) for spec in specs}
        self._servers: list[asyncio.Server] = []

    async def start(self) -> None:
        """Opens every listener. Raises OSError when an address is taken."""
        loop = asyncio.get_running_loop()
        for link in self._links.values():

            def factory(link: Link = link) -> Pipe:
                return Pipe(link, loop)

            self._servers.append(await loop.create_server(factory, link.spec.listen_host, link.spec.listen_port, backlog=256))

    async def close(self) -> None:
        """Closes listeners and connections."""
        for server in self._servers:
            server.close()
        for link in self._links.values():
            self._reset(link)

    def select(self, source: str | None, target: str | None) -> list[Link]:
        """Links that match; None or "*" matches every region. Raises Refused when there is none."""
        found = [
            link for (start, end), link in self._links.items() if source in (None, "*", start) and target in (None, "*", end)
        ]
        if not found:
            names = ", ".join(f"{start}→{end}" for start, end in self._links)
            raise Refused(f"no link from {source} to {target}", hint=f"links: {names}")
        return found

    async def handle(self, command: str, arguments: Mapping[str, Any]) -> Any:
        """``links`` | ``set`` (delay_ms, cut) | ``reset``, each with optional ``source`` and ``target``. Raises Refused."""
        links = self.select(arguments.get("source"), arguments.get("target"))
        if command == "set":
            for link in links:
                self._set(link, arguments)
        elif command == "reset":
            for link in links:
                self._reset(link)
        elif command != "links":
            raise Refused(f"unknown command {command!r}", hint="commands: links, set, reset")
        return [link.document() for link in links]

    def _set(self, link: Link, arguments: Mapping[str, Any]) -> None:
        if (delay := arguments.get("delay_ms")) is not None:
            if not 0 <= float(delay) <= 60_000:
                raise Refused(f"delay_ms {delay} is outside 0..60000", hint="give milliseconds for one way")
            link.delay_ms = float(delay)
        if (cut := arguments.get("cut")) is not None:
            link.cut = bool(cut)
        if not link.cut:
            for pipe in list(link.connections):
                pipe.schedule()

    def _reset(self, link: Link) -> None:
        for pipe in list(link.connections):
            pipe.abort()


async def run(config: Path) -> None:
    """Serves until SIGTERM or SIGINT. ``config``: JSON with ``links``, ``delay_ms``, ``control``."""
    document = json.loads(config.read_text())  # noqa: ASYNC240 - once, before anything is served
    wan = Wan([LinkSpec(**link) for link in document["links"]], float(document["delay_ms"]))
    await wan.start()
    server = await control.serve(Path(document["control"]), wan.handle)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    server.close()
    await wan.close()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--config", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        import uvloop
    except ImportError:
        asyncio.run(run(arguments.config))
    else:
        uvloop.run(run(arguments.config))


if __name__ == "__main__":
    main()
