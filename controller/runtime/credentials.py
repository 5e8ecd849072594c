"""Looks after what the settings name beside values: certificates that end, files that are replaced or damaged.

Started beside the controller. What people should know stands among the status's warnings until it is put right.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from controller.ports import Clock
from controller.settings import Settings, tls_files
from controller.settings.tls import endings, problems

LOOK_SECONDS = 5.0
CERTIFICATES_EVERY = 12
"""Looks between two at the certificates: days pass before anything about them changes."""
SOON = timedelta(days=14)
"""A certificate that ends sooner is told about."""

Warn = Callable[[str, str], None]
"""(what it is about, sentence): stands in the status until the sentence is empty."""


class CredentialWatch:
    """One per process. ``warn`` as in ``Controller.warn``."""

    def __init__(self, settings: Settings, clock: Clock, warn: Warn) -> None:
        self._settings = settings
        self._clock = clock
        self._warn = warn
        self._looks = 0

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self.look()
            await self._clock.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Once. Never raises for what is wrong with a file: see the warnings."""
        if self._looks % CERTIFICATES_EVERY == 0:
            api = self._settings.api
            open_door = self._settings.environment == "production" and api.insecure_private_network
            self._warn("network", OPEN_DOOR if open_door else "")
            self._warn("certificates", await asyncio.to_thread(self._certificates))
        self._looks += 1

    def _certificates(self) -> str:
        now = datetime.fromtimestamp(self._clock.wall(), UTC)
        found = [problem.line() for files in tls_files(self._settings) for problem in problems(files, now)]
        found += [line for files in tls_files(self._settings) for line in endings(files, now + SOON) if not _told(line, found)]
        return "; ".join(found)


OPEN_DOOR = (
    "api.insecure_private_network: whoever reaches this network may call this controller, and read what others send to it"
)


def _told(line: str, found: list[str]) -> bool:
    """Whether a file that ends is one that has ended, which is among the problems already."""
    return any(one.split(" ", 1)[0] == line.split(":", 1)[0] for one in found)
