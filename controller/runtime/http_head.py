"""Uvicorn's HTTP protocol with what it leaves open: how long a request's head may be, and how long it may take.

Uvicorn's httptools parser joins the request line as it comes, without a bound: one stranger's endless path would take all
memory, and most of the loop that keeps the lease. Bodies have bounds of their own (``api_door.Door``, ``api_records``).
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 20.0
"""From the connection, or from a head's first byte, to the head's end. Idle connections end by uvicorn's keep-alive time."""

_REFUSED = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n"
    b'{"error": {"code": "usage", "message": "the request line and headers are too long", '
    b'"hint": "names have at most 300 characters", "exit_code": 2}}\n'
)


class BoundedHttp(HttpToolsProtocol):
    """Give it to ``uvicorn.Config`` as ``http``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._in_head = False
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begins to count the time: who connects and says nothing is not waited for either."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._end, b"")

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the deadline."""
        self._head_done()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """The chunk in which a head begins is not counted: most of it may be the body before. It is one read, so bounded."""
        began_before = self._in_head
        super().data_received(data)
        if began_before and self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._end(_REFUSED)

    def on_message_begin(self) -> None:
        """The first byte of a head."""
        super().on_message_begin()
        self._head_done()
        self._in_head = True
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._end, b"")

    def on_headers_complete(self) -> None:
        """The head is here; what comes now is a body."""
        self._head_done()
        super().on_headers_complete()

    def _head_done(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _end(self, answer: bytes) -> None:
        self._head_done()
        if not self.transport.is_closing():
            if answer:
                self.transport.write(answer)
            self.transport.close()
