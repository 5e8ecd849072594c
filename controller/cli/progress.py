"""Progress of long work on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from controller.cli.session import Session
from controller.domain.text import visible

LINE_SECONDS = 5.0


class Meter:
    """``with Meter(session, "exporting") as meter: meter.at(done, total, "agent-7")``."""

    def __init__(self, here: Session, doing: str) -> None:
        self._here = here
        self._doing = doing
        self._bar: Progress | None = None
        self._told_at = time.monotonic()
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=here.notes,
                transient=True,
            )
            self._task = self._bar.add_task(doing, total=None)

    def __enter__(self) -> Meter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def at(self, done: int, total: int | None, what: str = "") -> None:
        """So much is done. ``what``: a word about now; may come from a server."""
        words = f"{self._doing} {visible(what, 60)}".rstrip()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, description=words)
        elif time.monotonic() - self._told_at >= LINE_SECONDS:
            self._told_at = time.monotonic()
            self._here.notes.print(f"{words}: {done:,}" + ("" if total is None else f" of {total:,}"), soft_wrap=True)
