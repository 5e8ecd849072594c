"""``drctl restore``: agents back to what they had at a point in time. A dry run first; history is never deleted."""

from __future__ import annotations

import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console

from controller.cli import render
from controller.cli.client import Usage
from controller.cli.history import AsOfOption, KindOption, pages_as_of
from controller.cli.progress import Meter
from controller.cli.session import (
    ConfigOption,
    EndpointOption,
    OutputOption,
    RequesterOption,
    Session,
    default_person,
    parse_time,
    session,
)
from controller.domain.model import Kind
from controller.domain.text import visible
from controller.errors import NotActive, Refused, Unavailable
from controller.runtime.archive_documents import AgentThen, Restored, RestoreOutcome

CHUNK = 50
CHUNK_BYTES = 32 * 2**20
SHOWN = 50


def restore(
    ctx: typer.Context,
    as_of: AsOfOption = None,
    agent: Annotated[list[str] | None, typer.Option("--agent", metavar="AGENT", help="Only this one; repeat for more.")] = None,
    kind: KindOption = Kind.CHECKPOINT,
    execute: Annotated[bool, typer.Option("--execute", help="Do it. Without this only what would be done is shown.")] = False,
    confirm: Annotated[
        str | None, typer.Option("--confirm", metavar="GROUP", help="The group's name, instead of typing it at the prompt.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Also agents that run now: they may write over it.")] = False,
    requester: RequesterOption = None,
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """Give agents the state back that they had at a time. Dry run unless --execute is given.

    For each agent a new record is written that repeats the one of that time; what came after it is stepped over and stays in
    the history, so a restore can itself be undone by another one. LangGraph threads, sessions and storages go back as a whole.
    Tasks, assignments and recorded effects stay as they are. Stop the agents first: one that runs now is refused without
    --force. Needs an active controller; without one take the states out: `drctl checkpoints export --all --as-of TIME`.
    """
    here = session(ctx).use(endpoint, config, output)
    if as_of is None:
        raise Usage("--as-of is missing", hint="drctl restore --as-of 2h, or --as-of 2026-11-21T14:05:00Z")
    at = parse_time(as_of, time.time())
    pages = pages_as_of(here, at, kind, tuple(dict.fromkeys(agent or ())))
    thens = [then for page in pages for then in page.agents]
    group = pages[0].group
    wanted = [then for then in thens if then.state == "found" and then.found is not None]
    outcomes: list[RestoreOutcome] = []
    if execute and wanted:
        _confirm(here, group, len(wanted), confirm)
        outcomes = _send(here, at, kind, group, wanted, requester or default_person(), force)
    document: dict[str, Any] = {
        "group": group,
        "region": pages[0].region,
        "at": at,
        "kind": kind,
        "executed": execute,
        "agents": [asdict(then) for then in thens],
        "outcomes": [asdict(one) for one in outcomes],
    }
    if not here.emit(document):
        _print(here.console, at, thens, outcomes, execute)
        if not execute and wanted:
            names = "".join(f" --agent {shlex.quote(name)}" for name in agent or ())
            command = f"drctl restore --as-of {render.exact_time(at)}{names} --execute --confirm {group}"
            here.console.print(render.text(f"Dry run: nothing was done. To do it: {command}", "bold", 2000), soft_wrap=True)
    failed = [one for one in outcomes if one.state == "failed"]
    if failed:
        raise Refused(
            f"{len(failed):,} of {len(outcomes):,} agents were not restored: {visible(failed[0].agent, 100)}: {failed[0].why}",
            hint=failed[0].hint or "repeat the command: what was done already is recognised",
        )


def _confirm(here: Session, group: str, count: int, given: str | None) -> None:
    if given is None:
        if not sys.stdin.isatty():
            raise Usage("a restore needs a confirmation, and there is no terminal to ask on", hint=f"add --confirm {group}")
        given = here.ask(f"{count:,} agents get an earlier state. Type the name of the group to do it:")
    if given != group:
        raise Usage(f"{visible(given, 64)!r} is not the group {visible(group, 64)}; nothing was sent", hint="look again first")


def _send(
    here: Session, at: float, kind: str, group: str, wanted: Sequence[AgentThen], requester: str, force: bool
) -> list[RestoreOutcome]:
    outcomes: list[RestoreOutcome] = []
    with Meter(here, "restoring") as meter:
        for chunk in _chunks(wanted):
            items = [{"agent": one.agent, "record": one.found.id, "newest": one.newest_id} for one in chunk if one.found]
            body = {"at": at, "kind": kind, "items": items, "requester": requester, "confirm": group, "force": force}
            try:
                answer: Restored = here.client.post(Restored, "/v1/restores", body).value
            except NotActive as error:
                raise Unavailable(
                    f"no controller is active, and only the active one can write: {error.message}",
                    hint="take the states out instead: drctl checkpoints export --all --as-of TIME --to DIR; or move the fleet "
                    "first: drctl plan failover --to REGION",
                ) from error
            outcomes += answer.outcomes
            meter.at(len(outcomes), len(wanted))
    return outcomes


def _stream(then: AgentThen) -> str:
    return then.found.stream if then.found is not None else ""


def _chunks(wanted: Sequence[AgentThen]) -> list[list[AgentThen]]:
    chunks: list[list[AgentThen]] = [[]]
    size = 0
    before = ""
    for then in sorted(wanted, key=_stream):  # the streams of a group may be held by different controllers
        added = then.found.size if then.found is not None else 0
        full = len(chunks[-1]) >= CHUNK or size + added > CHUNK_BYTES or _stream(then) != before
        before = _stream(then)
        if chunks[-1] and full:
            chunks.append([])
            size = 0
        chunks[-1].append(then)
        size += added
    return chunks


_WORDS = {
    "found": "would go back",
    "unchanged": "have nothing newer",
    "restored": "are there already",
    "none": "did not exist then",
    "gone": "had a state then that this copy does not hold any more",
}


def _print(console: Console, at: float, thens: Sequence[AgentThen], outcomes: Sequence[RestoreOutcome], executed: bool) -> None:
    counts = Counter(then.state for then in thens)
    words = ", ".join(f"{count:,} {_WORDS.get(state, state)}" for state, count in sorted(counts.items()))
    console.print(
        render.text(f"As of {render.stamp(at)}: {words or 'there are no such agents'}.", "bold", 1000), soft_wrap=True
    )
    done = {one.agent: one for one in outcomes}
    table = render.table("agent", "had then", "received", "has now", "newer", "runs on", "", right=("newer",))
    listed = [then for then in thens if then.state in ("found", "gone")]
    for then in listed[:SHOWN]:
        one = done.get(then.agent)
        word = "" if one is None else f"{one.state}: {one.why}" if one.why else f"{one.state} in {one.copies} regions"
        table.add_row(
            render.text(then.agent, limit=100),
            render.text(then.found.id if then.found else then.why, "" if then.found else "red", 200),
            render.stamp(then.found.received_at if then.found else 0.0),
            render.text(then.newest_id, limit=100),
            f"{then.newer:,}",
            render.text(then.host if then.running else "–", "yellow" if then.running else "", 60),
            render.text(word, "red" if one is not None and one.state == "failed" else "green", 300),
        )
    if listed:
        console.print(table)
    if len(listed) > SHOWN:
        console.print(f"… and {len(listed) - SHOWN:,} more; --output json has all")
    if executed and not outcomes:
        console.print("There was nothing to do.")
