"""What the settings name beside values: certificates, the access file, a token for other controllers. Opened at the start, and
looked after from then on: files that are replaced are used without a restart, damaged ones change nothing at first.

What people should know stands among the status's warnings until it is put right.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from controller.adapters.access import AccessFile
from controller.errors import DrError, Misconfigured
from controller.ports import Clock, Page, Pager
from controller.runtime.api_access import Entrance
from controller.runtime.api_server import TlsContext, TlsPaths
from controller.settings import Settings, tls_files
from controller.settings.tls import endings, problems

LOOK_SECONDS = 5.0
CERTIFICATES_EVERY = 12
"""Looks between two at the certificates' dates: days pass before anything about them changes."""
SOON = timedelta(days=14)
"""A certificate that ends sooner is told about."""
TOKEN_MAX_BYTES = 512
OPEN_DOOR = (
    "api.insecure_private_network: whoever reaches this network may call this controller, or read what others send to it"
)

Warn = Callable[[str, str], None]
"""(what it is about, sentence): stands in the status until the sentence is empty."""


class Credentials:
    """Everything of one process. Raises Misconfigured for files that cannot be used."""

    def __init__(self, settings: Settings) -> None:
        api = settings.api
        self.server = (
            None
            if api.cert_file is None
            else TlsContext(TlsPaths(api.cert_file, api.key_file, api.client_ca_file), server=True)
        )
        self.client = (
            None if api.ca_file is None else TlsContext(TlsPaths(api.cert_file, api.key_file, api.ca_file), server=False)
        )
        self.access = (
            None
            if api.access_file is None
            else AccessFile(api.access_file, settings.group, stale_seconds=api.access_stale_seconds)
        )
        self._token_file = api.peer_token_file
        self._token = "" if api.peer_token_file is None else read_token(api.peer_token_file)

    def peer_token(self) -> str:
        """What other controllers are shown; "" where certificates do that."""
        return self._token

    def look(self, now: float) -> dict[str, str]:
        """Reads what changed. Returns a sentence for each part, "" when all is well. Blocks shortly. ``now``: monotonic."""
        said = {
            "tls": "; ".join(
                sorted({problem for one in (self.server, self.client) if one is not None and (problem := one.look())})
            ),
            "access": self.access.look(now) if self.access is not None else "",
            "peer-token": "",
        }
        if self._token_file is not None:
            try:
                self._token = read_token(self._token_file)
            except Misconfigured as error:
                said["peer-token"] = error.message
        return said


def read_token(path: Path) -> str:
    """The one line of a token file. Raises Misconfigured, which never shows what is in it."""
    try:
        with path.open("rb") as file:
            text = file.read(TOKEN_MAX_BYTES + 1).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not ASCII"
        hint = "it holds one token and nothing else"
        raise Misconfigured(f"token file {str(path)!r} cannot be read: {reason}", hint=hint) from None
    if not text or len(text) > TOKEN_MAX_BYTES or not text.isprintable() or " " in text:
        raise Misconfigured(f"token file {str(path)!r} does not hold one token", hint="it holds one token and nothing else")
    return text


def entrance(settings: Settings, clock: Clock, access: AccessFile | None) -> Entrance | None:
    """Who may call this controller's API; None: everybody, because the settings ask nobody."""
    api = settings.api
    if access is None and api.client_ca_file is None:
        return None
    return Entrance(
        settings.group,
        frozenset(settings.regions),
        clock,
        access,
        frozenset(api.peer_names),
        peers_by_certificate=api.client_ca_file is not None,
        open_metrics=api.open_metrics or access is None,
    )


class CredentialWatch:
    """One per process. ``warn`` as in ``Controller.warn``. A damaged access file is paged too: people may believe that somebody
    is struck off who is not, and the time after which nobody is let in runs."""

    def __init__(self, settings: Settings, credentials: Credentials, clock: Clock, warn: Warn, pager: Pager) -> None:
        self._settings = settings
        self._credentials = credentials
        self._clock = clock
        self._warn = warn
        self._pager = pager
        self._looks = 0
        self._paged = False

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
        said = await asyncio.to_thread(self._credentials.look, self._clock.monotonic())
        for about, sentence in said.items():
            self._warn(about, sentence)
        await self._page(said["access"])
        self._looks += 1

    async def _page(self, sentence: str) -> None:
        if not sentence:
            self._paged = False
        elif not self._paged:
            where = f"{self._settings.region}/{self._settings.instance}"
            title = f"{where} cannot read who may call it"
            try:
                await self._pager.page(Page(f"access-{where}", "warning", title, sentence))
                self._paged = True
            except DrError:
                pass  # tried again at the next look

    def _certificates(self) -> str:
        now = datetime.fromtimestamp(self._clock.wall(), UTC)
        found = [problem.line() for files in tls_files(self._settings) for problem in problems(files, now)]
        found += [line for files in tls_files(self._settings) for line in endings(files, now + SOON) if not _told(line, found)]
        return "; ".join(found)


def _told(line: str, found: list[str]) -> bool:
    """Whether a file that ends is one that has ended, which is among the problems already."""
    return any(one.split(" ", 1)[0] == line.split(":", 1)[0] for one in found)
