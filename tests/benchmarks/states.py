"""Agents' states: conversations that grow by tool results from real text. Deterministic, standard library only.

The text is the documentation and the sources that come with every CPython, so both sides of a comparison see equal bytes. A
state keeps its first message and, like an agent with a context window, drops its oldest messages when it has grown to 1.25
times its nominal size, down to 0.75 times: over time its mean is the nominal size.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

STEP_BYTES = (1500, 7000)
"""What one step adds to a state; small states grow by a twelfth to a fourth of themselves instead."""
SIZES = {"2 KB": 2_000, "6 KB": 6_000, "80 KB": 80_000, "720 KB": 720_000, "2 MB": 2_000_000}
ENVELOPE_BYTES = 420
"""A checkpoint without its messages."""
MESSAGE_BYTES = 130
"""A call and its answer without their texts."""

_FILES = (
    "pydoc_data/topics.py", "LICENSE.txt", "argparse.py", "asyncio/base_events.py", "typing.py", "inspect.py", "tarfile.py",
    "decimal.py", "_pydecimal.py", "doctest.py", "pickle.py", "ssl.py", "subprocess.py", "turtle.py", "statistics.py",
    "smtplib.py", "difflib.py", "zipfile.py", "datetime.py", "mailbox.py", "optparse.py", "unittest/mock.py",
)  # fmt: skip


@cache
def corpus() -> str:
    """About 2 MB of English and code."""
    root = Path(os.__file__).parent
    texts = [(root / name).read_text(encoding="utf-8", errors="replace") for name in _FILES if (root / name).is_file()]
    text = "\n".join(texts).encode("ascii", "replace").decode()
    if len(text) < 500_000:
        raise SystemExit(f"only {len(text)} characters of text in {root}: this Python came without its sources")
    return text


@dataclass(frozen=True, slots=True)
class Step:
    """What one step adds, and its size in the serialized state, about."""

    messages: tuple[dict[str, Any], ...]
    size: int


def _step(rng: random.Random, number: int, size: int) -> Step:
    text = corpus()
    length = max(40, size - MESSAGE_BYTES)
    at = rng.randrange(len(text) - length)
    call = {
        "type": "ai",
        "content": "",
        "id": f"run-{number:05d}",
        "tool_calls": [{"name": "read", "args": {"at": at}, "id": f"c{number}"}],
    }
    answer = {"type": "tool", "content": text[at : at + length], "tool_call_id": f"c{number}", "id": f"t{number:05d}"}
    return Step((call, answer), length + MESSAGE_BYTES)


class Conversation:
    """One agent's state, step by step, for ever. ``size``: nominal bytes. Equal seeds give equal states."""

    def __init__(self, agent: str, size: int) -> None:
        self.agent = agent
        self._size = size - ENVELOPE_BYTES
        self._rng = random.Random(f"{agent}/{size}")
        self._ids = random.Random(f"ids/{agent}/{size}")
        self._number = 0
        self._first = {"type": "human", "content": f"You are {agent}. Read and keep what matters.", "id": "t00000"}
        self._steps: list[Step] = []
        self._held = 100
        grown = self._size * self._rng.uniform(0.75, 1.2)  # agents are at different points of their lives
        while self._held < grown:
            self._append()

    def _append(self) -> None:
        low, high = STEP_BYTES
        if self._size < 4 * high:
            low, high = self._size // 12, self._size // 4
        self._number += 1
        step = _step(self._rng, self._number, self._rng.randrange(low, high))
        self._steps.append(step)
        self._held += step.size
        if self._held > 1.25 * self._size:
            while self._held > 0.75 * self._size and len(self._steps) > 1:
                self._held -= self._steps.pop(0).size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Checkpoints as LangGraph makes them, one per step. Texts are shared between them: a state costs little memory."""
        while True:
            self._append()
            yield self.checkpoint()

    def checkpoint(self) -> dict[str, Any]:
        number = self._number
        version = f"{number:032d}.0"
        return {
            "v": 4,
            "ts": f"2026-11-21T10:{number // 60 % 60:02d}:{number % 60:02d}.123456+00:00",
            "id": f"1f0c6b7e-{number:04x}-6{self._ids.getrandbits(12):03x}-8000-{self._ids.getrandbits(48):012x}",
            "channel_values": {"messages": [self._first, *(m for step in self._steps for m in step.messages)]},
            "channel_versions": {"__start__": version, "messages": version, "branch:to:agent": version},
            "versions_seen": {"__input__": {}, "__start__": {"__start__": version}, "agent": {"branch:to:agent": version}},
            "updated_channels": ["messages"],
        }
