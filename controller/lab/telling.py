"""How the demo talks: colours on a terminal, plain lines elsewhere; and how it runs the commands that a person would type."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from controller.domain.text import visible

COMMAND_SECONDS = 180.0
PIPE_WIDTH = 140


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that ended."""

    code: int
    output: str


class Teller:
    """Prints the story. ``shown_dir``: the state directory as the person typed it."""

    def __init__(self) -> None:
        plain = not sys.stdout.isatty()
        self.console = Console(markup=False, highlight=False, emoji=False, width=PIPE_WIDTH if plain else None)
        self._began = time.monotonic()
        self._act = 0
        self.seconds: dict[str, float] = {}
        self._open: tuple[str, float] | None = None

    def act(self, title: str) -> None:
        """A new part of the story."""
        self._close()
        self._act += 1
        self._open = (title, time.monotonic())
        self.console.print(f"\n{self._clock()} {self._act}. {visible(title)}", style="bold cyan")

    def _close(self) -> None:
        if self._open is not None:
            title, began = self._open
            self.seconds[title] = round(time.monotonic() - began, 2)
            self._open = None

    def finish(self) -> dict[str, float]:
        """Seconds of every act."""
        self._close()
        return self.seconds

    def _clock(self) -> str:
        return f"[{time.monotonic() - self._began:6.1f} s]"

    def say(self, text: str, style: str = "") -> None:
        """One thing that happened."""
        self.console.print(f"{self._clock()}    {visible(text, keep=chr(10))}", style=style or None, soft_wrap=True)

    def command(self, line: str) -> None:
        """A command as a person would type it."""
        self.console.print(f"{self._clock()}  $ {visible(line)}", style="bold", soft_wrap=True)

    def output(self, text: str, last: int = 0) -> None:
        """What a command printed. ``last`` > 0: the plan has been shown before, only that many lines are."""
        lines = text.rstrip("\n").splitlines()
        if 0 < last < len(lines):
            lines = ["… (the plan, as above)", *lines[-last:]]
        for line in lines:
            self.console.print(f"            | {visible(line)}", style="dim", soft_wrap=True)

    def table(self, table: Table) -> None:
        """A table."""
        self.console.print(table)


async def run_drctl(arguments: Sequence[str], environment: Mapping[str, str], *, seconds: float = COMMAND_SECONDS) -> Ran:
    """Runs the real command line in a process of its own, as a shell would. One that hangs is killed: code 124."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "controller",
        *arguments,
        env={**os.environ, **environment},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(seconds):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        output, _ = await process.communicate()
        return Ran(124, output.decode(errors="replace") + f"\n(killed after {seconds:.0f} s)")
    except BaseException:
        if process.returncode is None:
            process.kill()
        raise
    return Ran(process.returncode or 0, output.decode(errors="replace"))


def typed(arguments: Sequence[str]) -> str:
    """The command line as typed."""
    return shlex.join(("drctl", *arguments))
