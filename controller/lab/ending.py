"""Ends a lab from outside: politely where its process listens, by force where it does not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from typing import Any

from controller.errors import Refused, Unavailable
from controller.lab import control
from controller.lab.layout import Layout
from controller.lab.processes import Started, is_alive, send, sweep

POLL_SECONDS = 0.1


def read_note(layout: Layout) -> dict[str, Any]:
    """What the lab's process wrote about itself; empty when there is none or it is garbled."""
    with contextlib.suppress(OSError, ValueError):
        note = json.loads(layout.note.read_text())
        if isinstance(note, dict):
            return note
    return {}


async def bring_down(layout: Layout, *, deadline_seconds: float = 20.0) -> tuple[str, ...]:
    """Ends the lab of a state directory from another process: asks it first, then ends it and all of its processes by force.

    Returns the names of what had to be ended by force. Nothing there is fine.
    """
    note = read_note(layout)
    if not note:
        return ()
    lab = Started("lab", "lab", "", int(note["pid"]), int(note["start_ticks"]))
    with contextlib.suppress(Unavailable, Refused):
        await control.call(layout.socket, "down", timeout_seconds=3.0)
        until = time.monotonic() + deadline_seconds
        while is_alive(lab) and layout.note.exists() and time.monotonic() < until:  # noqa: ASYNC110 - another process
            await asyncio.sleep(POLL_SECONDS)
        if not layout.note.exists():
            return ()
    if is_alive(lab):
        send(lab, signal.SIGKILL)
    ended = await asyncio.to_thread(sweep, layout.root, str(note.get("identity", "")))
    layout.note.unlink(missing_ok=True)
    return ended
