"""Commands that prove a region's copy and put it right: ``verify``, ``repair``. The controller that answers does the work."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from controller.cli import render
from controller.cli.client import Answer, Usage
from controller.cli.history import part
from controller.cli.progress import Meter
from controller.cli.session import (
    ConfigOption,
    ConfirmRegionOption,
    EndpointOption,
    Interrupted,
    OutputOption,
    RequesterOption,
    Session,
    default_person,
    session,
)
from controller.domain.text import visible
from controller.errors import Corrupt, DrError, NotFound, Unavailable
from controller.runtime.archive_documents import Repair, RepairAction, Verification
from controller.runtime.service import Status
from controller.runtime.wording import duration, size

POLL_SECONDS = 0.3
SHOWN = 50

RegionArgument = Annotated[
    str | None, typer.Argument(metavar="[REGION]", help="Whose store; default: that of the controller that answers.")
]


def _path(region: str, rest: str = "") -> str:
    return f"/v1/verifications/{part(region)}{rest}"


def region_of(here: Session, region: str | None) -> str:
    """The region that was named, or that of whoever answers."""
    if region is not None:
        return region
    found: Status = here.client.get(Status, "/v1/status").value
    return found.region


def verify(
    ctx: typer.Context,
    region: RegionArgument = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew, also when one was interrupted.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Only show how the last one stands; begin nothing.")] = False,
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """Read a region's whole store again: every object, the chain, every body's hash, indexes, head, salvage, catalogue, view.
    Changes nothing.

    Done by the controller that answers, beside its other work; any controller can verify any region that it reaches. Ctrl-C
    interrupts it; the same command goes on from there. Exit code 0: whole. 8: something is wrong; each problem says where,
    whose record it is, and what to type.
    """
    here = session(ctx).use(endpoint, config, output)
    name = region_of(here, region)
    if show:
        found: Answer[Verification] = here.client.get(Verification, _path(name))
    else:
        found = here.client.post(Verification, _path(name), {"restart": restart})
        found = _follow(here, name, found)
    if not here.emit(found.raw):
        print_verification(here.console, found.value)
    seen = found.value
    if seen.count:
        noun = "problem" if seen.count == 1 else "problems"
        raise Corrupt(
            f"{seen.count:,} {noun} in the store of {name}",
            hint=f"drctl repair {name} shows what can be put right, and from where",
        )
    if seen.state == "interrupted" and not show:
        raise Unavailable(f"the verification of {name} was interrupted: {seen.reason}", hint=f"drctl verify {name} goes on")
    if seen.state == "failed":
        raise DrError(f"the verification of {name} failed: {seen.reason}", hint="look at the controller's log and report it")


def repair(
    ctx: typer.Context,
    region: Annotated[str, typer.Argument(metavar="REGION", help="Whose store.")],
    execute: Annotated[bool, typer.Option("--execute", help="Do it. Without this only what would be done is shown.")] = False,
    confirm: ConfirmRegionOption = None,
    requester: RequesterOption = None,
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """Put right what the last `drctl verify` of this region found. Dry run unless --execute is given.

    A damaged object is replaced by another region's copy only where the chain of hashes proves its bytes, and only while it
    still is what was found. A damaged head is set to what its objects prove; only the active controller can do that. A damaged
    view is built again. Ask the controller that verified: what it found lies there. Exit code 8: something is left that cannot
    be put right.
    """
    here = session(ctx).use(endpoint, config, output)
    if execute:
        _confirm(here, region, confirm)
    body = {"execute": execute, "requester": requester or default_person(), "confirm": region if execute else ""}
    path = f"/v1/repairs/{part(region)}"
    actions: list[RepairAction] = []
    raw: list[object] = []
    with Meter(here, f"repairing {region}") as meter:
        while True:
            answer: Answer[Repair] = here.client.post(Repair, path, body)
            found = answer.value
            done = [one for one in found.actions if one.state in ("done", "whole")]
            last = not execute or not done or found.left == 0
            actions += found.actions if last else done
            raw += (
                answer.raw["actions"] if last else [one for one in answer.raw["actions"] if one["state"] in ("done", "whole")]
            )
            meter.at(len(actions), len(actions) + (0 if last else found.left))
            if last:
                break
    if not here.emit({**answer.raw, "actions": raw}):
        print_repair(here.console, found, actions)
    stuck = [one for one in actions if one.state in ("cannot", "failed")]
    if stuck:
        noun = "problem" if len(stuck) == 1 else "problems"
        raise Corrupt(f"{len(stuck):,} {noun} in {region} cannot be put right from here: {stuck[0].sentence}", hint=found.next)


def _confirm(here: Session, region: str, given: str | None) -> None:
    if given is None:
        if not sys.stdin.isatty():
            raise Usage("a repair needs a confirmation, and there is no terminal to ask on", hint=f"add --confirm {region}")
        given = here.ask("Type the name of the region whose store is repaired:")
    if given != region:
        raise Usage(f"{visible(given, 64)!r} is not {visible(region, 64)}; nothing was sent", hint=f"drctl repair {region}")


def print_repair(console: Console, found: Repair, actions: Sequence[RepairAction]) -> None:
    """What was or would be done, problem by problem."""
    if not actions:
        console.print(render.text(f"{found.region}: the last verification found nothing that is left.", "green"))
    styles = {"done": "green", "whole": "green", "would": "cyan", "cannot": "red", "failed": "red"}
    for one in actions:
        whose = (
            f" ({one.agent}/{one.record}{f' and {one.records - 1:,} more' if one.records > 1 else ''})" if one.record else ""
        )
        line = f"{one.state}: {one.what} {one.key}{whose}: {one.sentence}"
        console.print(render.text(line, styles.get(one.state, ""), 1000), soft_wrap=True)
    if not found.execute and any(one.state == "would" for one in actions):
        console.print(
            render.text(
                f"Dry run: nothing was done. To do it: drctl repair {found.region} --execute --confirm {found.region}", "bold"
            ),
            soft_wrap=True,
        )
    elif found.execute:
        console.print(render.text(f"next: {found.next}", "bold"), soft_wrap=True)


def _follow(here: Session, region: str, found: Answer[Verification]) -> Answer[Verification]:
    """Polls until it ends. Ctrl-C interrupts it there, too."""
    try:
        with Meter(here, f"verifying {region}") as meter:
            while found.value.state == "running":
                walks = found.value.streams
                what = f"{found.value.count:,} problems" if found.value.count else ""
                meter.at(sum(walk.seq for walk in walks), sum(max(walk.goal, walk.seq) for walk in walks) or None, what)
                time.sleep(POLL_SECONDS)
                found = _look(here, region, found)
    except KeyboardInterrupt:
        here.client.post(Verification, _path(region, "/stop"), {})
        here.notes.print(f"interrupted; go on: drctl verify {region}", soft_wrap=True)
        raise Interrupted from None
    return found


def _look(here: Session, region: str, found: Answer[Verification]) -> Answer[Verification]:
    """At the controller that does it. Another one that answers meanwhile does not know of it."""
    try:
        answer = here.client.get(Verification, _path(region))
    except NotFound as error:
        raise Unavailable(
            f"the controller that verifies {region} ({found.value.by}) does not answer any more",
            hint=f"drctl verify {region} goes on there once it is back, or begins anew elsewhere",
        ) from error
    return answer if answer.value.by == found.value.by else found


def print_verification(console: Console, seen: Verification) -> None:
    """What was walked, and what is wrong, problem by problem."""
    style = "red" if seen.count else "green" if seen.state == "done" else "yellow"
    took = duration(max(0.0, seen.updated_at - seen.started_at))
    console.print(render.text(f"{seen.region}: {seen.state}: {seen.reason}", f"bold {style}", 1000), soft_wrap=True)
    for walk in seen.streams:
        words = f"{walk.stream}: segments {walk.base:,} to {walk.seq:,} of {walk.goal:,}"
        words += f", {walk.records:,} records, {size(walk.bytes)}"
        words += f", {walk.conflicts:,} conflicting ids" if walk.conflicts else ""
        render.fact(console, "stream", render.text(words))
    render.fact(console, "by", render.text(f"{seen.by} in {took}"))
    for problem in seen.problems[:SHOWN]:
        console.print()
        where = f"{problem.region} {problem.key}"
        whose = f", record {problem.record} of agent {problem.agent}" if problem.record else ""
        more = f" and {problem.records - 1:,} more" if problem.records > 1 else ""
        console.print(render.text(f"{problem.what}: {where}{whose}{more}", "bold red", 1000), soft_wrap=True)
        console.print(render.text(f"  {problem.detail}", limit=2000), soft_wrap=True)
        if problem.source:
            console.print(render.text(f"  the copy of {problem.source} proves itself", limit=400), soft_wrap=True)
        console.print(render.text(f"  → {problem.fix}", "cyan", 600), soft_wrap=True)
    if seen.count > SHOWN:
        console.print(f"\n{seen.count - SHOWN:,} more problems; --output json has the first 1,000")
