"""Commands that move the fleet, in their order: ``plan``, ``approve``, ``promote``. Nothing here decides; controllers do."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console

from controller.adapters.identity import check_principal, sign
from controller.cli import render
from controller.cli.client import Answer, Client, Usage
from controller.cli.session import (
    ConfigOption,
    EndpointOption,
    Output,
    OutputOption,
    Session,
    default_person,
    parse_duration,
    session,
)
from controller.domain.approval import APPROVE, NAMESPACE, REFUSE, statement
from controller.domain.plan import PLAN_FORMAT, canonical_bytes
from controller.domain.promotion import PlanRecord, State
from controller.domain.text import visible
from controller.errors import Corrupt, OutcomeUnknown, Refused, Unavailable
from controller.runtime.service import PlanDocument
from controller.runtime.wording import duration, loss_sentence

POLL_SECONDS = 0.5
CLOCK_SLACK_SECONDS = 5.0
"""Taken off the expiry that is signed: a controller whose clock is a little behind must not see it as too far away."""

plan_app = typer.Typer(
    help="Make, show and end plans. A plan moves nothing: people approve it, then `drctl promote` runs it.",
    no_args_is_help=True,
)

PlanArgument = Annotated[str, typer.Argument(metavar="PLAN", help="Id of the plan.")]
ToOption = Annotated[str, typer.Option("--to", metavar="REGION", help="The region that becomes active.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why, in one sentence; people read it before they approve.")]
RequesterOption = Annotated[
    str | None,
    typer.Option(
        "--requester", metavar="NAME", help="Who asks; does not count as an approver. Default: DRCTL_PRINCIPAL or the login."
    ),
]
GlassOption = Annotated[bool, typer.Option("--break-glass", help="Fewer approvals; needs --reason, and everybody is told.")]
ConfirmOption = Annotated[
    str | None,
    typer.Option("--confirm", metavar="REGION", help="The target region's name, instead of typing it at the prompt."),
]


def _path(plan: str, rest: str = "") -> str:
    if not plan:
        raise Usage("the plan's id is empty", hint="drctl plan list shows the plans")
    return f"/v1/plans/{quote(plan, safe='')}{rest}"


def read_plan(client: Client, plan: str) -> Answer[PlanDocument]:
    """A plan whose digest was recomputed here, from the very document that is shown. Raises Corrupt, Usage."""
    return _checked(client.get(PlanDocument, _path(plan)), plan)


def _checked(answer: Answer[PlanDocument], plan: str | None = None) -> Answer[PlanDocument]:
    record = answer.value.record
    if plan is not None and record.plan.id != plan:
        raise Corrupt(
            f"{answer.endpoint} was asked for another plan than it gave", hint="ask another controller: --endpoint URL"
        )
    if record.plan.format != PLAN_FORMAT:
        raise Usage(
            f"plan format {record.plan.format} is not known to this drctl", hint="install the drctl of the controllers' version"
        )
    # From the JSON as it came and not from the decoded value: what is hashed is what was sent, whatever decoding made of it.
    try:
        found = hashlib.sha256(canonical_bytes(answer.raw["record"]["plan"])).hexdigest()
    except ValueError as error:
        raise Corrupt("the plan has no canonical form", hint="make a new plan") from error
    if found != record.digest:
        raise Corrupt(
            f"the digest that {answer.endpoint} reports is not the digest of the plan that it shows ({found[:16]}…)",
            hint="do not approve it; ask another controller (--endpoint URL) and compare",
        )
    return answer


def _print(here: Session, answer: Answer[PlanDocument]) -> None:
    if not here.emit(answer.raw):
        render.print_plan(here.console, answer.value)


# ------------------------------------------------------------------------------------------------------------------- plan


def _make(here: Session, kind: str, to: str, reason: str, requester: str | None, break_glass: bool) -> None:
    if break_glass and not reason.strip():
        raise Usage("--break-glass needs --reason", hint="say why fewer people than usual may decide")
    body = {
        "kind": kind,
        "to": to,
        "requester": requester or default_person(),
        "reason": reason,
        "break_glass": break_glass,
    }
    _print(here, _checked(here.client.post(PlanDocument, "/v1/plans", body)))


@plan_app.command(epilog="Example: drctl plan failover --to eu-central-1 --reason 'eu-west-1 is silent since 03:02'")
def failover(
    ctx: typer.Context,
    to: ToOption,
    reason: ReasonOption = "",
    break_glass: GlassOption = False,
    requester: RequesterOption = None,
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """Plan to move away from a region that failed. Says what would be lost."""
    _make(session(ctx).use(endpoint, config, output), "failover", to, reason, requester, break_glass)


@plan_app.command(epilog="Example: drctl plan switchover --to us-east-1 --reason 'maintenance in eu-west-1'")
def switchover(
    ctx: typer.Context,
    to: ToOption,
    reason: ReasonOption = "",
    break_glass: GlassOption = False,
    requester: RequesterOption = None,
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """Plan to move a healthy fleet. The old region drains first; nothing is lost."""
    _make(session(ctx).use(endpoint, config, output), "switchover", to, reason, requester, break_glass)


@plan_app.command(epilog="Example: drctl plan failback --to eu-west-1 --reason 'eu-west-1 is protected again'")
def failback(
    ctx: typer.Context,
    to: ToOption,
    reason: ReasonOption = "",
    break_glass: GlassOption = False,
    requester: RequesterOption = None,
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """Plan a switchover home."""
    _make(session(ctx).use(endpoint, config, output), "failback", to, reason, requester, break_glass)


@plan_app.command("list")
def list_plans(
    ctx: typer.Context, endpoint: EndpointOption = None, config: ConfigOption = None, output: OutputOption = None
) -> None:
    """All plans and where they stand."""
    here = session(ctx).use(endpoint, config, output)
    answer = here.client.get(tuple[PlanRecord, ...], "/v1/plans")
    if not here.emit(answer.raw):
        render.print_plans(here.console, answer.value)


@plan_app.command()
def show(
    ctx: typer.Context,
    plan: PlanArgument,
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """One plan: loss, evidence, steps, approvals, journal, digest."""
    here = session(ctx).use(endpoint, config, output)
    _print(here, read_plan(here.client, plan))


@plan_app.command()
def abort(
    ctx: typer.Context,
    plan: PlanArgument,
    reason: ReasonOption = "",
    requester: RequesterOption = None,
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """End a plan. Possible until its step `authorize` is done."""
    here = session(ctx).use(endpoint, config, output)
    body = {"requester": requester or default_person(), "reason": reason}
    _print(here, _checked(here.client.post(PlanDocument, _path(plan, "/abort"), body), plan))


# ---------------------------------------------------------------------------------------------------------------- approve


def principal_of(key: Path) -> str:
    """The comment of ``KEY.pub``, where ssh-keygen puts its owner; else the key file's name."""
    public = key if key.suffix == ".pub" else key.with_name(key.name + ".pub")
    try:
        parts = public.read_text(encoding="utf-8")[:20_000].split(maxsplit=2)
    except (OSError, UnicodeDecodeError):
        parts = []
    return parts[2].strip() if len(parts) == 3 else key.name.removesuffix(".pub")


def _summary(console: Console, record: PlanRecord, decision: str, principal: str) -> None:
    """The lines right above the prompt: what is being agreed to."""
    plan = record.plan
    console.print(
        render.text(
            f"{decision.upper()} as {principal}: {plan.kind.value} of group {plan.group} from {plan.source} to {plan.target}, "
            f"epoch {plan.evidence.authority_epoch}; lost: {loss_sentence(plan.evidence.loss)}; digest {record.digest}".lstrip(
                "\n"
            ),
            "bold",
            4000,
        ),
        soft_wrap=True,
    )


def approve(
    ctx: typer.Context,
    plan: PlanArgument,
    key: Annotated[
        Path, typer.Option("--key", metavar="FILE", help="Your OpenSSH private key (or the .pub of one in an agent or token).")
    ],
    principal: Annotated[
        str | None,
        typer.Option(
            "--principal", envvar="DRCTL_PRINCIPAL", metavar="NAME", help="You, as listed; default: the key's comment."
        ),
    ] = None,
    refuse: Annotated[bool, typer.Option("--refuse", help="Refuse instead: ends the plan.")] = False,
    expires: Annotated[str, typer.Option("--expires", metavar="TIME", help="How long the approval is good for.")] = "15m",
    confirm: ConfirmOption = None,
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """Sign a decision about a plan, on this machine, with your SSH key.

    Shows what the plan does and would lose, recomputes its digest from what is shown, and asks for the target region's name.
    """
    here = session(ctx).use(endpoint, config, output)
    seconds = parse_duration(expires)
    who = principal or principal_of(key)
    check_principal(who)
    document = read_plan(here.client, plan).value
    record = document.record
    if record.ended:
        raise Refused(f"plan {plan} has ended ({record.state.value})", hint="drctl plan list shows the plans that are open")
    decision = REFUSE if refuse else APPROVE
    render.print_plan(here.notes if here.output is not Output.TABLE else here.console, document)
    _summary(here.notes, record, decision, who)
    if not refuse:
        here.confirm_region(record.plan.target, confirm, "approve this plan")
    elif confirm is not None:
        here.confirm_region(record.plan.target, confirm, "refuse this plan")
    expires_at = time.time() + max(1.0, seconds - CLOCK_SLACK_SECONDS)
    message = statement(record.plan.group, record.plan.id, record.digest, decision, who, expires_at)
    body = {
        "principal": who,
        "decision": decision,
        "expires_at": expires_at,
        "signature": sign(message, key, NAMESPACE),
        "digest": record.digest,
    }
    answer = here.client.post(PlanDocument, _path(plan, "/approvals"), body)
    if here.emit(answer.raw):
        return
    after: PlanDocument = answer.value
    words = "refused: the plan has ended" if refuse else f"approved; {after.missing_approvals} more needed"
    here.console.print(render.text(f"{plan} {words}.", "green"))
    if after.next:
        here.console.print(render.text(f"next: {after.next}", "bold"), soft_wrap=True)


# ---------------------------------------------------------------------------------------------------------------- promote


def promote(
    ctx: typer.Context,
    plan: PlanArgument,
    execute: Annotated[bool, typer.Option("--execute", help="Run it. Without this only what will happen is shown.")] = False,
    confirm: ConfirmOption = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Show the steps until the end; the exit code says how it ended.")
    ] = False,
    timeout: Annotated[
        str, typer.Option("--timeout", metavar="TIME", help="How long --wait waits. The promotion goes on.")
    ] = "15m",
    requester: RequesterOption = None,
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """Run an approved plan. Dry run unless --execute is given."""
    here = session(ctx).use(endpoint, config, output)
    patience = parse_duration(timeout)
    answer = read_plan(here.client, plan)
    record = answer.value.record
    if not execute and not wait:
        if not here.emit(answer.raw):
            _dry_run(here.console, answer.value)
        return
    if execute:
        if record.ended:
            raise Refused(
                f"plan {plan} has ended ({record.state.value})", hint="make a new plan: drctl plan failover --to REGION"
            )
        _summary(here.notes, record, "run", requester or default_person())
        here.confirm_region(record.plan.target, confirm, "run this plan")
        body = {"requester": requester or default_person(), "confirm": record.plan.target}
        answer = here.client.post(PlanDocument, _path(plan, "/execute"), body)
    if wait:
        answer = _wait(here, plan, patience)
        ended = answer.value.record
        here.emit(answer.raw)
        if ended.state is not State.DONE:
            raise Refused(f"plan {plan} ended as {ended.state.value}: {visible(ended.reason)}", hint=f"drctl plan show {plan}")
        if here.output is Output.TABLE:
            lost = loss_sentence(ended.final_loss or ended.plan.evidence.loss)
            here.console.print(
                render.text(f"{ended.plan.target} is active under epoch {ended.epoch}. Lost: {lost}", "bold green", 2000)
            )
    elif not here.emit(answer.raw):
        here.console.print(render.text(f"{plan} is asked to run. Watch it: drctl promote {plan} --wait", "green"))


def _dry_run(console: Console, document: PlanDocument) -> None:
    record = document.record
    render.print_plan(console, document)
    if record.ended:
        console.print(render.text(f"\nNothing will happen: the plan has ended ({record.state.value}).", "yellow"))
        return
    if record.state is State.AWAITING_APPROVAL and document.missing_approvals:
        people = "person" if document.missing_approvals == 1 else "people"
        console.print(
            render.text(f"Dry run. It cannot run yet: {document.missing_approvals} more {people} must approve.", "yellow")
        )
    else:
        command = f"drctl promote {record.plan.id} --execute --confirm {record.plan.target} --wait"
        console.print(render.text(f"Dry run: nothing was done. To run it: {command}", "bold"), soft_wrap=True)


def _wait(here: Session, plan: str, patience: float) -> Answer[PlanDocument]:
    """Follows a plan until it ends, whoever of the controllers answers. Raises Unavailable when the time is up."""
    console = here.console if here.output is Output.TABLE else here.notes
    until = time.monotonic() + patience
    told: set[Any] = set()
    silent = False
    while True:
        try:
            answer = read_plan(here.client, plan)
            _tell(console, answer.value, told)
            silent = False
            if answer.value.record.ended:
                return answer
        except OutcomeUnknown:
            raise
        except Unavailable as error:
            # Controllers of the failed region do not answer, and others may be busy for a moment: that is no end.
            if not silent:
                here.notes.print(render.text(f"waiting: {error.message}", "yellow", 1000), soft_wrap=True)
            silent = True
        if time.monotonic() >= until:
            raise Unavailable(
                f"plan {plan} has not ended after {duration(patience)}; it goes on without this command",
                hint=f"watch on: drctl promote {plan} --wait",
            )
        time.sleep(POLL_SECONDS)


def _tell(console: Console, document: PlanDocument, told: set[Any]) -> None:
    """Prints what has not been printed: states with their reason, steps when they begin and when they end."""
    record = document.record
    now = time.time()
    for entry in document.journal:
        seen = (entry.step, entry.instance, bool(entry.finished_at))
        if seen not in told:
            told.add(seen)
            told.add((entry.step, entry.instance, False))
            console.print(render.journal_line(entry, now), soft_wrap=True)
    state = (record.state, record.reason)
    if state not in told and record.state in (State.AWAITING_APPROVAL, State.HOLDING):
        told.add(state)
        console.print(
            render.text(f"{record.state.value}: {record.reason or document.next}", "bold yellow", 1000), soft_wrap=True
        )
