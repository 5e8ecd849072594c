"""Uvicorn's HTTP protocol with what it leaves open: how long a request's head may be, how long it may take, and how long a body
may stand still.

Uvicorn's httptools parser joins the request line as it comes, without a bound: one stranger's endless path would take all
memory, and most of the loop that keeps the lease. Bodies have bounds of their own (``api_door.Door``, ``api_records``); what a
half-sent one holds of them must not be held for ever by a client that is gone.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 20.0
"""From the connection, or from a head's first byte, to the head's end. Idle connections end by uvicorn's keep-alive time."""
BODY_SECONDS = 20.0
"""A body that does not go on for so long has no end."""
SLOW_SECONDS = 60.0
SLOW_BYTES_PER_SECOND = 16 * 1024
"""A body that has taken longer than SLOW_SECONDS and comes slower than this is kept slow on purpose."""

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
        self._in_body = False
        self._body_began = 0.0
        self._body_bytes = 0

    def connection_made(self, transport: Any) -> None:
        """Begins to count the time: who connects and says nothing is not waited for either."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._end, b"")

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the deadline."""
        self._in_body = False
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
        if self._in_body:  # not of a body that came whole with its head: most do
            self._body_goes_on(len(data))

    def on_message_begin(self) -> None:
        """The first byte of a head."""
        super().on_message_begin()
        self._head_done()
        self._in_head = True
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._end, b"")

    def on_headers_complete(self) -> None:
        """The head is here; what comes now is a body."""
        self._head_done()
        self._in_body, self._body_began, self._body_bytes = True, self.loop.time(), 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Nothing more is waited for."""
        self._in_body = False
        self._head_done()
        super().on_message_complete()

    def _body_goes_on(self, size: int) -> None:
        self._body_bytes += size
        took = self.loop.time() - self._body_began
        if took > SLOW_SECONDS and self._body_bytes < took * SLOW_BYTES_PER_SECOND:
            self._end(b"")
            return
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(BODY_SECONDS, self._body_stands)

    def _body_stands(self) -> None:
        if self.flow.read_paused:  # it is us who do not read
            self._deadline = self.loop.call_later(BODY_SECONDS, self._body_stands)
        else:
            self._end(b"")

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
