"""Commands that only read: status, lag, agents, members, incidents, journal, audit."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from controller.cli import render
from controller.cli.client import Usage
from controller.cli.session import ConfigOption, EndpointOption, Output, OutputOption, Session, session
from controller.domain.model import AgentSeen, Member
from controller.errors import Corrupt, Unavailable
from controller.runtime.api_documents import LagDocument
from controller.runtime.audit import GENESIS, broken_at
from controller.runtime.service import AuditEntry, Incident, JournalEntry, Status

WatchOption = Annotated[bool, typer.Option("--watch", "-w", help="Repeat until Ctrl-C; with JSON one document a line.")]
IntervalOption = Annotated[float, typer.Option("--interval", min=0.1, max=3600, help="Seconds between looks with --watch.")]
TimesOption = Annotated[int, typer.Option("--times", min=0, hidden=True, help="End --watch after so many looks; 0 = never.")]

AUDIT_PAGE = 500
AGENTS_PAGE = 1000


def _show(here: Session, kind: Any, path: str, paint: Callable[[Any], None]) -> None:
    answer = here.client.get(kind, path)
    if not here.emit(answer.raw):
        paint(answer.value)


def _watch(here: Session, kind: Any, path: str, paint: Callable[[Any, Any], None], interval: float, times: int) -> None:
    """Looks again and again. An answer that cannot be had is shown and does not end it: that is when people watch."""
    looks = 0
    live = Live(console=here.console, auto_refresh=False) if here.output is Output.TABLE and sys.stdout.isatty() else None
    try:
        with live or _Nothing():
            while True:
                _look(here, kind, path, paint, live)
                looks += 1
                if looks == times:
                    return
                time.sleep(interval)
    except KeyboardInterrupt:
        return


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def _look(here: Session, kind: Any, path: str, paint: Callable[[Any, Any], None], live: Live | None) -> None:
    try:
        answer = here.client.get(kind, path)
    except Unavailable as error:
        if here.output is not Output.TABLE:
            sys.stdout.write(json.dumps({"error": error.to_dict()}) + "\n")
        elif live is not None:
            lines: list[RenderableType] = [render.text(error.message, "red", 2000), render.text(error.hint, "", 2000)]
            live.update(Group(*lines), refresh=True)
        else:
            here.console.print(render.text(f"{error.message} ({error.hint})", "red", 2000))
        sys.stdout.flush()
        return
    if here.output is Output.JSON:
        sys.stdout.write(json.dumps(answer.raw, ensure_ascii=True) + "\n")
        sys.stdout.flush()
    elif here.output is Output.YAML:
        sys.stdout.write("---\n")
        here.emit(answer.raw)
    elif live is not None:
        page = here.console
        with page.capture() as shown:
            paint(page, answer.value)
        live.update(Text.from_ansi(shown.get()), refresh=True)
    else:
        paint(here.console, answer.value)
        here.console.print()


def status(
    ctx: typer.Context,
    watch: WatchOption = False,
    interval: IntervalOption = 1.0,
    times: TimesOption = 0,
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """What is going on, and what to type next."""
    here = session(ctx).use(endpoint, config, output)
    if watch:
        _watch(here, Status, "/v1/status", render.print_status, interval, times)
    else:
        _show(here, Status, "/v1/status", lambda value: render.print_status(here.console, value))


def lag(
    ctx: typer.Context,
    watch: WatchOption = False,
    interval: IntervalOption = 1.0,
    times: TimesOption = 0,
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """How far each region is behind, and what would be lost if any one vanished now."""
    here = session(ctx).use(endpoint, config, output)
    if watch:
        _watch(here, LagDocument, "/v1/lag", render.print_lag, interval, times)
    else:
        _show(here, LagDocument, "/v1/lag", lambda value: render.print_lag(here.console, value))


class Order(StrEnum):
    """How agents are listed."""

    NEWEST = "newest"
    NAME = "name"


def agents(
    ctx: typer.Context,
    limit: Annotated[int, typer.Option("--limit", min=1, max=AGENTS_PAGE, help="At most so many, in JSON too.")] = 50,
    sort: Annotated[Order, typer.Option("--sort", help="Who wrote last first, or by name.")] = Order.NEWEST,
    after: Annotated[str, typer.Option("--after", metavar="NAME", help="By name, only those after this one.")] = "",
    prefix: Annotated[str, typer.Option("--prefix", metavar="TEXT", help="Only names that begin so.")] = "",
    everything: Annotated[bool, typer.Option("--all", help="All of them, by name, asked for page by page.")] = False,
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """Agents in the copy of the region that answers, newest first."""
    here = session(ctx).use(endpoint, config, output)
    by_name = everything or bool(after) or sort is Order.NAME
    asked: dict[str, str | int] = {"limit": AGENTS_PAGE if everything else limit, "prefix": prefix, "after": after}
    asked["sort"] = (Order.NAME if by_name else Order.NEWEST).value
    raw: list[Any] = []
    found: list[AgentSeen] = []
    while True:
        page = here.client.get(tuple[AgentSeen, ...], "/v1/agents", asked)
        raw.extend(page.raw)
        found.extend(page.value)
        full = len(page.value) >= int(asked["limit"])
        if not (everything and full):
            break
        asked["after"] = page.value[-1].agent
    if here.emit(raw):
        return
    more = "" if not full else f"--after {shlex.quote(found[-1].agent)}, or --all" if by_name else "--limit, --prefix, or --all"
    render.print_agents(here.console, found, more, time.time())


def members(
    ctx: typer.Context, endpoint: EndpointOption = None, config: ConfigOption = None, output: OutputOption = None
) -> None:
    """Live controllers, with their versions and the fingerprint of their settings."""
    here = session(ctx).use(endpoint, config, output)
    _show(here, tuple[Member, ...], "/v1/members", lambda value: render.print_members(here.console, value, time.time()))


def incidents(
    ctx: typer.Context,
    closed: Annotated[bool, typer.Option("--all", help="Closed ones too.")] = False,
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """Open incidents."""
    here = session(ctx).use(endpoint, config, output)
    path = "/v1/incidents?include_closed=true" if closed else "/v1/incidents"
    _show(here, tuple[Incident, ...], path, lambda value: render.print_incidents(here.console, value))


def journal(
    ctx: typer.Context,
    plan: Annotated[str, typer.Argument(help="Id of the plan.")],
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """The steps of a promotion that were taken so far."""
    here = session(ctx).use(endpoint, config, output)

    def paint(entries: tuple[JournalEntry, ...]) -> None:
        if entries:
            render.print_journal(here.console, entries)
        else:
            here.console.print("No step has been taken.")

    _show(here, tuple[JournalEntry, ...], f"/v1/plans/{quote(plan, safe='')}/journal", paint)


audit_app = typer.Typer(help="The hash-chained record of every decision.", invoke_without_command=True)


@audit_app.callback()
def audit(
    ctx: typer.Context,
    after: Annotated[int, typer.Option("--after", min=0, help="Begin behind this entry.")] = 0,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="At most so many entries.")] = 200,
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """The hash-chained record of every decision. `drctl audit verify` recomputes the chain."""
    here = session(ctx).use(endpoint, config, output)
    if ctx.invoked_subcommand is None:
        answer = here.client.get(tuple[AuditEntry, ...], "/v1/audit", {"after": after, "limit": limit})
        if not here.emit(answer.raw):
            render.print_audit(here.console, answer.value)


@audit_app.command()
def verify(
    ctx: typer.Context,
    expect: Annotated[
        str | None,
        typer.Option("--expect", metavar="N:HASH", help="An entry noted earlier: it must still be there, unchanged."),
    ] = None,
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """Recompute the hash chain on this machine, from the first entry to the last.

    A chain proves that nothing inside it was changed. That its end was not cut off is shown by --expect with a head noted
    before.
    """
    here = session(ctx).use(endpoint, config, output)
    n, previous, expected = 0, GENESIS, _expected(expect)
    while True:
        page: tuple[AuditEntry, ...] = here.client.get(
            tuple[AuditEntry, ...], "/v1/audit", {"after": n, "limit": AUDIT_PAGE}
        ).value
        if not page:
            break
        try:
            broken = broken_at(page, previous, n + 1)
        except ValueError as error:
            raise Corrupt(
                f"the audit record after entry {n} has no canonical form: {error}", hint="keep it as evidence"
            ) from error
        if broken:
            raise Corrupt(
                f"the audit record is broken: {broken}", hint="treat it as tampering: keep etcd's data and compare the logs"
            )
        for entry in page:
            if expected and entry.n == expected[0] and entry.hash != expected[1]:
                raise Corrupt(
                    f"entry {entry.n} is not the one that was noted: the record was rewritten", hint="keep it as evidence"
                )
        n, previous = page[-1].n, page[-1].hash
    if expected and n < expected[0]:
        raise Corrupt(
            f"the record ends at entry {n}, before the noted entry {expected[0]}: its end was cut off",
            hint="keep it as evidence",
        )
    if not here.emit({"ok": True, "entries": n, "head": previous}):
        here.console.print(render.text(f"{n:,} entries, unbroken. Head: {n}:{previous}", "green"), soft_wrap=True)


def _expected(given: str | None) -> tuple[int, str] | None:
    if given is None:
        return None
    number, _, digest = given.partition(":")
    if not (number.isascii() and number.isdigit() and digest):
        raise Usage(f"--expect {given!a} is not N:HASH", hint="use what `drctl audit verify` printed as head")
    return int(number), digest
