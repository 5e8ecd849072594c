"""Where log lines go: a bounded queue, and a thread that writes them. Whoever logs never waits and never fails.

A log that cannot be written must not cost a region its lease. A full disk raises ``ENOSPC`` in the middle of whatever wanted
to say something; a pipe whose reader has stopped holds the whole event loop. Here lines wait, and are counted instead of kept
when too many do; the count is a line of the log once it can be written again, and until then the status says so.
"""

from __future__ import annotations

import io
import json
import os
import select
import threading
import time
from collections import deque
from datetime import UTC, datetime
from types import TracebackType

WAITING_MAX_BYTES = 1024 * 1024
"""Lines that wait to be written; further ones are lost and counted."""
AGAIN_SECONDS = 1.0
"""Between attempts to write while the log cannot be written."""
SLOW_SECONDS = 5.0
"""A write that takes longer is told of: nobody reads the other end."""


class LogSink(io.TextIOBase):
    """``with LogSink(fd) as stream``: a text stream that takes everything at once. ``fd`` is not closed."""

    def __init__(self, fd: int, *, waiting_max_bytes: int = WAITING_MAX_BYTES, again_seconds: float = AGAIN_SECONDS) -> None:
        self._fd = fd
        self._max = waiting_max_bytes
        self._again_seconds = again_seconds
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._lost = 0
        self._error = ""
        self._began: float | None = None
        self._ending = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="log", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------- for those who log

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        """Never raises, never waits for the outside world."""
        line = text.encode("utf-8", "backslashreplace")
        with self._changed:
            if self._bytes + len(line) > self._max:
                self._lost += 1
            else:
                if self._lost:
                    self._keep(self._told())
                self._keep(line)
                self._changed.notify_all()
        return len(text)

    def _keep(self, line: bytes) -> None:
        self._lines.append(line)
        self._bytes += len(line)

    def _told(self) -> bytes:
        lost, self._lost = self._lost, 0
        at = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        fields = {"event": "log lines were lost", "lines": lost, "level": "warning", "timestamp": at}
        return json.dumps(fields).encode() + b"\n"

    def flush(self) -> None:
        """Nothing: the thread writes at once."""

    def trouble(self) -> str:
        """Why the log is not written now, in one sentence; "" when it is. For the status: people do not see it in the log."""
        with self._changed:
            if self._error:
                return f"the log cannot be written: {self._error}; newer lines wait, and are lost when too many do"
            if self._began is not None and time.monotonic() - self._began > SLOW_SECONDS:
                return "the log cannot be written: nobody reads the other end; newer lines wait, and are lost when too many do"
            return ""

    def drain(self, seconds: float) -> bool:
        """Whether all that was said is written by then."""
        until = time.monotonic() + seconds
        with self._changed:
            return self._changed.wait_for(lambda: self._bytes == 0, max(0.0, until - time.monotonic()))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Gives the last lines a second."""
        self.drain(1.0)
        with self._changed:
            self._ending = True
            self._changed.notify_all()

    # ----------------------------------------------------------------------------------------------------- the thread

    def _work(self) -> None:
        while line := self._next():
            self._put(line)

    def _next(self) -> bytes:
        """The oldest line; waits for one. Nothing: it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._ending)
            self._began = time.monotonic()
            return self._lines.popleft() if self._lines else b""

    def _put(self, line: bytes) -> None:
        """Goes on until it is written, or nobody waits for it any more. What was begun is continued, so no line is torn."""
        left = line
        while left:
            try:
                left = left[self._write(left) :]
            except OSError as error:
                if not self._failed(error):
                    break
        with self._changed:
            self._bytes -= len(line)
            self._error = self._error if left else ""
            self._began = None
            if self._lost and not self._lines and not left:
                self._keep(self._told())
            self._changed.notify_all()

    def _write(self, data: bytes) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            select.select([], [self._fd], [], self._again_seconds)
            return 0

    def _failed(self, error: OSError) -> bool:
        """Whether to try again, after a pause."""
        with self._changed:
            self._error = error.strerror or str(error)
            self._changed.wait_for(lambda: self._ending, self._again_seconds)
            return not self._ending
