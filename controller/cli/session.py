"""What every command shares: which controllers, which output, the terminal. Options may stand before or after the command."""

from __future__ import annotations

import getpass
import json
import os
import re
import sys
import tomllib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from controller.agent.credentials import Credentials
from controller.cli.client import Client, Usage
from controller.domain.text import visible

DEFAULT_ENDPOINT = "http://127.0.0.1:8080"
PIPE_WIDTH = 140
"""Columns when the output is not a terminal: wide enough that tables in a log are not folded."""

_AGO = re.compile(r"(\d{1,7}(?:\.\d{1,3})?)(s|m|h|d)", re.ASCII)
_DURATION = re.compile(r"(\d{1,7}(?:\.\d{1,3})?)(s|m|h)?", re.ASCII)


class Output(StrEnum):
    """How answers are printed."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


EndpointOption = Annotated[
    list[str] | None,
    typer.Option(
        "--endpoint",
        metavar="URL",
        help="A controller; repeat for more. They are tried in order.",
        rich_help_panel="Connection",
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="Settings file whose regions name the controllers.", rich_help_panel="Connection"
    ),
]
OutputOption = Annotated[Output | None, typer.Option("--output", "-o", help="How to print.", rich_help_panel="Connection")]
ConfirmRegionOption = Annotated[
    str | None, typer.Option("--confirm", metavar="REGION", help="The region's name, instead of typing it at the prompt.")
]
RequesterOption = Annotated[str | None, typer.Option("--requester", metavar="NAME", help="Who asks; stands in the audit.")]


TokenFileOption = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        envvar="DR_TOKEN_FILE",
        help="File with the token to show.",
        rich_help_panel="Connection",
        metavar="FILE",
    ),
]
CaFileOption = Annotated[
    Path | None,
    typer.Option(
        "--ca-file",
        envvar="DR_CA_FILE",
        help="Who signed the controllers' certificates; default: that of the settings file, else the system's.",
        rich_help_panel="Connection",
        metavar="FILE",
    ),
]
CertFileOption = Annotated[
    Path | None,
    typer.Option(
        "--cert-file", envvar="DR_CERT_FILE", help="Client certificate.", rich_help_panel="Connection", metavar="FILE"
    ),
]
KeyFileOption = Annotated[
    Path | None, typer.Option("--key-file", envvar="DR_KEY_FILE", help="Its key.", rich_help_panel="Connection", metavar="FILE")
]


class Interrupted(Exception):
    """The person ended a prompt (Ctrl-C, Ctrl-D): nothing was sent."""


@dataclass
class Session:
    """One run of ``drctl``."""

    endpoints: list[str] = field(default_factory=list)
    config: Path | None = None
    output: Output = Output.TABLE
    token_file: Path | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    _client: Client | None = None

    def use(self, endpoint: list[str] | None, config: Path | None, output: Output | None) -> Session:
        """Takes over the options of the command itself; they win over those before it."""
        if endpoint:
            self.endpoints = list(endpoint)
            self.config = None
        elif config:
            self.config = config
            self.endpoints = []
        self.output = output or self.output
        return self

    @property
    def console(self) -> Console:
        """Standard output for people. No markup: text that came from elsewhere cannot style itself."""
        width = None if sys.stdout.isatty() else PIPE_WIDTH
        return Console(file=sys.stdout, markup=False, highlight=False, emoji=False, width=width)

    @property
    def notes(self) -> Console:
        """Standard error: prompts, hints, what is not the answer itself."""
        return Console(
            file=sys.stderr, markup=False, highlight=False, emoji=False, width=None if sys.stderr.isatty() else PIPE_WIDTH
        )

    @property
    def client(self) -> Client:
        """Made at the first use, so that a wrong endpoint is not an error of ``drctl version``."""
        if self._client is None:
            self._client = Client(self.named_endpoints() or [DEFAULT_ENDPOINT], credentials=self.credentials())
        return self._client

    def close(self) -> None:
        """Closes the connection, where one was made."""
        if self._client is not None:
            self._client.close()

    def credentials(self) -> Credentials:
        """What is shown to controllers, and whom it is shown to. Raises Misconfigured, Usage."""
        return Credentials.of(
            token_file=self.token_file,
            ca_file=self.ca_file or self._settings_ca(),
            cert_file=self.cert_file,
            key_file=self.key_file,
        )

    def _settings_ca(self) -> Path | None:
        """``api.ca_file`` of the settings file that names the controllers."""
        found = self.settings_document().get("api")
        named = found.get("ca_file") if isinstance(found, dict) else None
        return self.settings_folder() / named if isinstance(named, str) else None

    def settings_document(self) -> dict[str, Any]:
        """The settings file as it is, empty when none is named. Raises Usage."""
        path = self._settings_file()
        return _toml(path) if path is not None else {}

    def settings_folder(self) -> Path:
        """Relative paths of the settings file start here."""
        path = self._settings_file()
        return path.parent if path is not None else Path()

    def _settings_file(self) -> Path | None:
        """The file that the endpoints come from, None when they come from elsewhere."""
        if self.endpoints:
            return None
        if self.config is not None:
            return self.config
        path = os.environ.get("DR_CONFIG")
        return Path(path) if path and not os.environ.get("DRCTL_ENDPOINTS", "").strip() else None

    def named_endpoints(self) -> list[str]:
        """Endpoints from ``--endpoint``, else ``--config``, else ``DRCTL_ENDPOINTS``, else ``DR_CONFIG``. Raises Usage."""
        if self.endpoints:
            return self.endpoints
        if self.config is not None:
            return endpoints_of(self.config)
        if listed := os.environ.get("DRCTL_ENDPOINTS", "").replace(",", " ").split():
            return listed
        return endpoints_of(Path(path)) if (path := os.environ.get("DR_CONFIG")) else []

    def emit(self, raw: Any) -> bool:
        """Prints ``raw`` when JSON or YAML was asked for (ASCII only, so nothing in it can act on a terminal)."""
        if self.output is Output.JSON:
            sys.stdout.write(json.dumps(raw, indent=2, ensure_ascii=True) + "\n")
        elif self.output is Output.YAML:
            sys.stdout.write(yaml.safe_dump(raw, sort_keys=False, allow_unicode=False, width=PIPE_WIDTH))
        else:
            return False
        sys.stdout.flush()
        return True

    def ask(self, prompt: str) -> str:
        """One line from the terminal. Raises Interrupted."""
        self.notes.print(prompt, end=" ", soft_wrap=True)
        sys.stderr.flush()
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            raise Interrupted from None
        if not line:
            raise Interrupted
        return line.strip()

    def confirm_region(self, target: str, given: str | None, doing: str) -> None:
        """Raises Usage unless the person names the target region: by ``--confirm``, or typed on a terminal."""
        if given is None:
            if not sys.stdin.isatty():
                raise Usage(
                    f"{doing} needs a confirmation, and there is no terminal to ask on",
                    hint=f"add --confirm {visible(target, 64)} once you have read the plan",
                )
            given = self.ask(f"Type the name of the region that becomes active, to {doing}:")
        if given != target:
            raise Usage(
                f"{visible(given, 64)!r} is not the target region of this plan; nothing was sent",
                hint=f"the plan goes to {visible(target, 64)}; read it again: drctl plan show",
            )


def endpoints_of(path: Path) -> list[str]:
    """The controllers of all regions in a settings file. Only those lines are read: an operator's copy need not be complete.

    Raises Usage.
    """
    regions = _toml(path).get("regions")
    found = [
        str(url)
        for region in (regions.values() if isinstance(regions, dict) else ())
        if isinstance(region, dict) and isinstance(region.get("controllers"), list)
        for url in region["controllers"]
    ]
    if not found:
        raise Usage(f"{path} names no controllers", hint='add controllers = ["http://…"] to its [regions.…] tables')
    return found


def _toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise Usage(f"{path} cannot be read: {error.strerror}", hint="give the settings file with --config FILE") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Usage(f"{path} is not TOML: {visible(error, 200)}", hint="drctl config check FILE says more") from error


def parse_duration(text: str) -> float:
    """``90``, ``90s``, ``15m``, ``1h`` in seconds. Raises Usage."""
    match = _DURATION.fullmatch(text.strip())
    seconds = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2] or "s"] if match else 0.0
    if seconds <= 0:
        raise Usage(f"{visible(text, 40)!r} is not a duration", hint="write it like 90s, 15m or 1h")
    return seconds


def parse_time(text: str, now: float) -> float:
    """A point in time as seconds since 1970: ISO 8601 (UTC when it names no offset), ``now``, or so long ago: ``15m``, ``2h``,
    ``3d``. Raises Usage."""
    words = text.strip().removesuffix("ago").strip()
    if words == "now":
        return now
    match = _AGO.fullmatch(words)
    if match:
        found = now - float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
    else:
        try:
            parsed = datetime.fromisoformat(words)
            found = (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError) as error:
            raise Usage(
                f"{visible(text, 60)!r} is not a time",
                hint="write it like 2026-11-21T14:05:00Z, or 15m, 2h, 3d (ago)",
            ) from error
    if found < 0:
        raise Usage(f"{visible(text, 60)!r} is before 1970", hint="write it like 2026-11-21T14:05:00Z, or 15m, 2h, 3d")
    return found


def default_person() -> str:
    """Who is typing: ``DRCTL_PRINCIPAL``, else the login name."""
    if name := os.environ.get("DRCTL_PRINCIPAL"):
        return name
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def session(ctx: typer.Context) -> Session:
    """The session of this run."""
    if not isinstance(ctx.obj, Session):
        ctx.obj = Session()
    found: Session = ctx.obj
    return found
