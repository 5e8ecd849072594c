"""Documents as people read them. Everything that came from a server passes ``visible``: it cannot act on the terminal.

Reused by the lab's demo: ``print_plan``, ``print_status``, ``print_lag``, ``print_journal``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from datetime import UTC, datetime

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from controller.domain.model import AgentSeen, Member, RegionLag, Unknown
from controller.domain.plan import Loss, Plan
from controller.domain.promotion import PlanRecord, State
from controller.domain.sealing import KmsSeen
from controller.domain.text import visible
from controller.runtime import wording
from controller.runtime.api_documents import LagDocument
from controller.runtime.service import AuditEntry, Incident, JournalEntry, PlanDocument, RegionStatus, Status
from controller.runtime.wording import duration

MAX_WORST = 10
WIDE = 110
"""Columns from which on a terminal shows every number of a region."""

STEP_TEXT = {
    "check": "preconditions and evidence once more; refuse early",
    "quiesce": "raise the barrier: nobody of the old region acquires any more",
    "authorize": "one transaction: approvals consumed, authority moves to {target} (abort is possible until here)",
    "fence": "{target} takes a new epoch and shuts the old writer out of every reachable store and of Route 53",
    "catch-up": "the longest history is brought home; holds if more would be lost than approved",
    "verify": "hashes of the warm copy and region checks of {target}",
    "resume": "{agents} agents resume in {target} from their last replicated checkpoint",
    "route": "DNS moves to {target} by compare-and-set",
    "confirm": "the new answer is seen by every configured DNS server",
    "report": "RTO by phase, RPO in seconds and records, audit, page",
}
_STATE_STYLE = {State.DONE: "green", State.REFUSED: "red", State.VOID: "red", State.EXPIRED: "red", State.ABORTED: "red"}


def text(value: object, style: str = "", limit: int = 400) -> Text:
    """A table cell or line that contains foreign text."""
    return Text(visible(value, limit), style=style)


def stamp(at: float) -> str:
    """Wall clock seconds as UTC, or – when there is none."""
    try:
        return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%SZ") if at > 0 else "–"
    except (OverflowError, ValueError, OSError):
        return visible(at, 40)


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def exact_time(at: float) -> str:
    """ISO 8601 in UTC with microseconds: what ``--as-of`` takes."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """A table as every command prints it."""
    return _table(*columns, right=right)


def fact(console: Console, name: str, value: str | Text) -> None:
    """A line that begins with its name."""
    _fact(console, name, value)


def _measured(value: object, words: str) -> Text:
    return text(words, "yellow" if isinstance(value, Unknown) else "")


def _fact(console: Console, name: str, value: str | Text, style: str = "") -> None:
    line = Text().append(f"{name:<14}", style="bold")
    line.append_text(value if isinstance(value, Text) else Text(value, style=style))
    console.print(line, soft_wrap=True)


# ------------------------------------------------------------------------------------------------------------------ plans


def print_loss(console: Console, loss: Loss, title: str = "would be lost") -> None:
    """Records (with what is unknown), seconds (exact or at most), and the worst agents by name."""
    nothing = loss.exact and not loss.records and not loss.records_unknown
    _fact(console, title, wording.loss_sentence(loss), "green" if nothing else "bold yellow")
    for agent in loss.worst[:MAX_WORST]:
        noun = "record" if agent.records == 1 else "records"
        console.print(text(f"                {agent.agent}: {agent.records:,} {noun}, newest {agent.last_id}"), soft_wrap=True)
    if len(loss.worst) > MAX_WORST:
        console.print(f"                … and {len(loss.worst) - MAX_WORST} more agents", soft_wrap=True)


def print_plan(console: Console, document: PlanDocument, now: float | None = None) -> None:
    """A plan as it is approved: from, to, loss, evidence, approvals, steps, digest. ``now``: wall clock seconds."""
    at = time.time() if now is None else now
    record, plan = document.record, document.record.plan
    head = Text().append("Plan ", style="bold")
    head.append_text(text(plan.id, "bold cyan")).append(": ").append_text(text(plan.kind.value, "bold"))
    head.append(" from ").append_text(text(plan.source, "bold")).append(" to ").append_text(text(plan.target, "bold"))
    head.append("  ").append_text(text(record.state.value, _STATE_STYLE.get(record.state, "yellow")))
    console.print(head, soft_wrap=True)
    if plan.break_glass:
        console.print(Text("BREAK-GLASS: runs with fewer approvals than usual; everybody is told", style="bold red"))
    _fact(console, "group", text(plan.group))
    _fact(console, "why", text(plan.reason or "–", limit=2000))
    if record.reason:
        _fact(console, "now", text(record.reason, limit=2000))
    print_loss(console, plan.evidence.loss)
    if record.final_loss is not None:
        print_loss(console, record.final_loss, "was lost")
    _print_evidence(console, plan, at)
    _fact(console, "asked for by", text(f"{plan.requester} at {stamp(plan.created_at)} (does not count as an approver)"))
    left = plan.expires_at - at
    if not record.authorized_at and not record.ended:
        _fact(console, "expires", f"in {duration(left)}" if left > 0 else "EXPIRED", "" if left > 0 else "red")
    if record.epoch:
        _fact(console, "epoch", f"{record.epoch}")
    _print_approvals(console, document, at)
    if document.journal:
        print_journal(console, document.journal, at)
    elif not record.ended:
        print_steps(console, plan)
    _fact(console, "digest", text(record.digest, "cyan"))
    if document.next:
        _fact(console, "next", text(document.next, "bold"))


def _print_evidence(console: Console, plan: Plan, now: float) -> None:
    seen = plan.evidence
    _fact(console, "authority", text(f"{seen.authority_region}, epoch {seen.authority_epoch}"))
    holders = ", ".join(f"{h.region}/{h.instance} (stream {h.stream}, epoch {h.epoch})" for h in seen.holders)
    _fact(console, "lease", text(f"held by {holders}" if holders else "nobody holds it", "" if holders else "yellow"))
    for head in seen.heads:
        age = f", newest record {duration(seen.at - head.received_at)} old" if head.received_at > 0 else ""
        _fact(console, "store", text(f"{head.region} {head.stream}: segment {head.seq:,} of epoch {head.last_epoch}{age}"))
    for silent in seen.unreachable:
        since = wording.unknown(Unknown(silent.since, silent.why), now)
        _fact(console, "store", text(f"{silent.region} {silent.stream}: {since} ({silent.why})", "yellow"))
    for check in seen.checks:
        mark, style = ("ok", "green") if check.ok else ("FAILED", "bold red")
        _fact(console, "check", text(f"{mark}: {check.name}: {check.detail}", style))
    before = ", ".join(f"{region} {weight}" for region, weight in sorted(seen.weights.items()))
    after = ", ".join(f"{region} {weight}" for region, weight in sorted(plan.weights.items()))
    _fact(console, "DNS", text(f"{before}  →  {after} ({plan.engine}; epoch in DNS {wording.count(seen.traffic_epoch, now)})"))


def _print_approvals(console: Console, document: PlanDocument, now: float) -> None:
    plan = document.record.plan
    valid = sum(1 for approval in document.approvals if approval.valid and approval.decision == "approve")
    more = f", {document.missing_approvals} missing" if document.missing_approvals else ""
    _fact(console, "approvals", f"{valid} of {plan.approvals_required}{more}", "yellow" if more else "green")
    for approval in document.approvals:
        left = approval.expires_at - now
        when = f"for {duration(left)} more" if left > 0 else "expired"
        counts = approval.valid or approval.decision != "approve"
        why = "" if counts else f" DOES NOT COUNT: {'it ' + approval.why if approval.why else 'the plan cannot run'}"
        line = f"                {approval.principal} {approval.decision} {approval.fingerprint} {when}{why}"
        console.print(text(line, "" if counts else "yellow"), soft_wrap=True)


def print_steps(console: Console, plan: Plan) -> None:
    """What the plan will do, step by step."""
    console.print(Text("steps", style="bold"))
    for number, step in enumerate(plan.steps, start=1):
        words = STEP_TEXT.get(step, "").replace("{target}", plan.target).replace("{agents}", f"{plan.evidence.agents:,}")
        if step == "quiesce" and plan.kind.planned:
            words += "; the old holder drains everything first, or the plan aborts"
        console.print(text(f"  {number:>2} {step:<10} {words}"), soft_wrap=True)


def journal_line(entry: JournalEntry, now: float) -> Text:
    """One step, running or finished."""
    if entry.finished_at:
        words, style = f"✓ {entry.step:<10} {duration(entry.finished_at - entry.started_at):>9}  {entry.sentence}", "green"
    else:
        words, style = f"… {entry.step:<10} {duration(max(0.0, now - entry.started_at)):>9}  {entry.sentence}", "yellow"
    return text(f"{words}  [{entry.instance}, epoch {entry.epoch}]", style, 1000)


def print_journal(console: Console, journal: Sequence[JournalEntry], now: float | None = None) -> None:
    """The steps that happened, in order."""
    at = time.time() if now is None else now
    for entry in journal:
        console.print(Padding(journal_line(entry, at), (0, 0, 0, 2)), soft_wrap=True)


def print_plans(console: Console, records: Sequence[PlanRecord]) -> None:
    """All plans, newest last."""
    if not records:
        console.print("There are no plans.")
        return
    table = _table("plan", "kind", "from", "to", "state", "lost", "asked for by", "made at", "reason")
    for record in sorted(records, key=lambda record: record.plan.created_at):
        plan = record.plan
        loss = record.final_loss or plan.evidence.loss
        table.add_row(
            text(plan.id, "cyan"),
            text(plan.kind.value),
            text(plan.source),
            text(plan.target),
            text(record.state.value, _STATE_STYLE.get(record.state, "yellow")),
            text(f"{wording.loss_records(loss)}, {wording.loss_seconds(loss)}"),
            text(plan.requester, limit=60),
            stamp(plan.created_at),
            text(record.reason or plan.reason, limit=120),
        )
    console.print(table)


# --------------------------------------------------------------------------------------------------------- status and lag


def _short(value: int | Unknown, words: str) -> Text:
    """A cell beside the lag, which says for how long everything has been unknown."""
    return Text("unknown", style="yellow") if isinstance(value, Unknown) else Text(words)


def _behind(lag: RegionLag | None, now: float, wide: bool) -> list[Text]:
    if lag is None:
        return [Text("–", style="dim") for _ in range(5 if wide else 2)]
    cells = [_measured(lag.seconds, wording.seconds(lag.seconds, now)), _short(lag.records, wording.count(lag.records, now))]
    if wide:
        cells += [
            _short(lag.segments, wording.count(lag.segments, now)),
            _short(lag.bytes, "" if isinstance(lag.bytes, Unknown) else wording.size(lag.bytes)),
            _short(lag.verified_seq, wording.count(lag.verified_seq, now)),
        ]
    return cells


def _print_regions(console: Console, regions: Sequence[RegionStatus], now: float) -> None:
    """One line a region; a narrow terminal gets the columns that matter at 3 a.m."""
    wide = console.width >= WIDE
    numbers = ("lag", "records", "segments", "bytes", "verified") if wide else ("lag", "records")
    table = _table("region", "role", *numbers, "protected", "DNS", *(("controllers",) if wide else ()), right=numbers)
    for column in table.columns:
        column.no_wrap = True
    for region in regions:
        protected = region.protected
        style = "yellow" if isinstance(protected, Unknown) else "green" if protected else "red"
        table.add_row(
            text(region.region, "bold"),
            text(wording.role(region.active, region.members), "green" if region.active else "" if region.members else "red"),
            *_behind(region.lag, now, wide),
            text("unknown" if isinstance(protected, Unknown) else wording.yes_no(protected, now), style),
            _short(region.weight, wording.count(region.weight, now)),
            *([text(region.members, "" if region.members else "red")] if wide else []),
        )
    console.print(table)


def _print_exposure(console: Console, lag: LagDocument) -> None:
    value = lag.exposure_seconds
    over = not isinstance(value, Unknown) and value > lag.rpo_seconds
    style = "yellow" if isinstance(value, Unknown) else "red" if over else "green"
    records = wording.count(lag.exposure_records, lag.at)
    words = f"{wording.seconds(value, lag.at)}, records: {records}"
    _fact(console, "exposure", text(f"{words}  (RPO {duration(lag.rpo_seconds)}, policy {lag.rpo_policy})", style))


def print_lag(console: Console, lag: LagDocument | Status) -> None:
    """How far each region is behind, what would be lost now, and the agents that would lose most."""
    document = LagDocument.of(lag) if isinstance(lag, Status) else lag
    _print_regions(console, document.regions, document.at)
    _print_exposure(console, document)
    for report in document.reports:
        age = duration(max(0.0, document.at - report.at))
        words = f"{report.stream}: segment {report.seq:,} at home, {report.acknowledged_records:,} records acknowledged"
        words += f", reported {age} ago"
        _fact(console, "stream", text(words))
        for tail in report.unreplicated[:MAX_WORST]:
            console.print(
                text(f"                {tail.agent}: {tail.records:,} in one region only, newest {tail.last_id}"),
                soft_wrap=True,
            )


def print_status(console: Console, status: Status) -> None:
    """The answer to "what is going on, and what do I type next"."""
    bad = bool(status.incidents) or isinstance(status.authority, Unknown)
    console.print(text(status.sentence, "bold red" if bad else "bold", 2000), soft_wrap=True)
    if status.next:
        _fact(console, "next", text(status.next, "bold cyan", 2000))
    _print_regions(console, status.regions, status.at)
    _print_exposure(console, LagDocument.of(status))
    if isinstance(status.authority, Unknown):
        words = f"{wording.unknown(status.authority, status.at)} ({status.authority.why})"
        _fact(console, "authority", text(words, "yellow"))
    else:
        barrier = status.authority.barrier
        words = f"{status.authority.region}, epoch {status.authority.epoch}"
        words += f", barrier of plan {barrier.plan} to {barrier.target}" if barrier else ""
        _fact(console, "authority", text(f"{words}; epoch in DNS {wording.count(status.traffic_epoch, status.at)}"))
    if isinstance(status.holders, Unknown):
        _fact(console, "lease", text(wording.unknown(status.holders, status.at), "yellow"))
    else:
        held = ", ".join(f"{h.stream}: {h.region}/{h.instance} epoch {h.epoch}" for h in status.holders)
        if len(status.reports) > 1:
            _print_streams(console, status)
        else:
            _fact(console, "lease", text(held or "nobody holds it", "" if held else "red"))
    for region in status.regions:
        if region.salvage:
            count = sum(piece.last_seq - piece.first_seq + 1 for piece in region.salvage)
            _fact(console, "salvage", text(f"{region.region}: {count:,} segments set aside (drctl salvage list)", "yellow"))
    if status.kms:
        well = all(one.wraps is True for one in status.kms)
        _fact(console, "KMS", text("; ".join(_kms(one, status.at) for one in status.kms), "" if well else "yellow", 1000))
    _fact(console, "agents", f"{status.agents:,}")
    for record in status.plans:
        plan = record.plan
        _fact(
            console,
            "plan",
            text(f"{plan.id} {plan.kind.value} to {plan.target}: {record.state.value} {record.reason}", "yellow"),
        )
    for incident in status.incidents:
        age = duration(max(0.0, status.at - incident.opened_at))
        _fact(console, "incident", text(f"{incident.title} ({age}): {incident.detail}", "red", 1000))
    for warning in status.warnings:
        _fact(console, "warning", text(warning, "yellow", 1000))
    right = f", may act for {duration(status.right_seconds)}" if status.right_seconds > 0 else ""
    _fact(
        console, "seen by", text(f"{status.region}/{status.instance} ({status.role.value}{right}) at {stamp(status.at)}", "dim")
    )


def _kms(seen: KmsSeen, at: float) -> str:
    """Whether a region's KMS wraps, and for which streams that were sealed without it."""
    if isinstance(seen.wraps, Unknown):
        words = f"{seen.region} {wording.unknown(seen.wraps, at)} ({seen.wraps.why})"
    else:
        words = f"{seen.region} {'wraps' if seen.wraps else f'HAS NOT WRAPPED for {duration(max(0.0, at - seen.since))}'}"
    lacking = sorted(stream for stream, since in seen.streams.items() if since)
    return f"{words} (missing for {', '.join(lacking)})" if lacking else words


def _print_streams(console: Console, status: Status) -> None:
    """Each stream with its holder, what it is exposed to, and the region that is furthest behind."""
    holders = {} if isinstance(status.holders, Unknown) else {holder.stream: holder for holder in status.holders}
    shown = _table("stream", "holder", "epoch", "exposure", "furthest behind", right=("epoch", "exposure"))
    for report in sorted(status.reports, key=lambda report: report.stream):
        holder = holders.get(report.stream)
        who = text(f"{holder.region}/{holder.instance}") if holder else text("nobody holds it", "red")
        worst = max(
            report.regions, key=lambda found: math.inf if isinstance(found.seconds, Unknown) else found.seconds, default=None
        )
        behind = f"{worst.region} {wording.seconds(worst.seconds, status.at)}" if worst is not None else ""
        shown.add_row(
            text(report.stream),
            who,
            text(holder.epoch if holder else ""),
            text(wording.seconds(report.exposure_seconds, status.at)),
            text(behind),
        )
    console.print(shown)


# ------------------------------------------------------------------------------------------------------------ other lists


def print_agents(console: Console, agents: Sequence[AgentSeen], more: str, now: float) -> None:
    """A page of agents as they came. ``more``: what to type for the others, "" when there are none."""
    table = _table(
        "agent", "records", "latest record", "segment", "received", "attempt", "host", right=("records", "segment", "attempt")
    )
    for agent in agents:
        table.add_row(
            text(agent.agent, limit=100),
            f"{agent.records:,}",
            text(agent.latest_id, limit=100),
            f"{agent.latest_seq:,}",
            f"{duration(max(0.0, now - agent.received_at))} ago" if agent.received_at > 0 else "–",
            f"{agent.attempt}",
            text(agent.host or "–", limit=60),
        )
    console.print(table)
    console.print(text(f"{len(agents):,} agents" + (f"; there may be more: {more}" if more else ""), limit=400))


def print_incidents(console: Console, incidents: Sequence[Incident]) -> None:
    """Incidents, oldest first."""
    if not incidents:
        console.print("There are no open incidents.")
        return
    table = _table("incident", "kind", "opened", "closed", "what", "plan")
    for incident in incidents:
        table.add_row(
            text(incident.id, "cyan"),
            text(incident.kind),
            stamp(incident.opened_at),
            stamp(incident.closed_at),
            text(f"{incident.title}: {incident.detail}", "" if incident.closed_at else "red", 600),
            text(incident.plan or "–"),
        )
    console.print(table)


def print_audit(console: Console, entries: Sequence[AuditEntry]) -> None:
    """Decisions, oldest first."""
    table = _table("n", "at", "who", "did", "to", "detail", "hash", right=("n",))
    for entry in entries:
        detail = ", ".join(f"{key}={value}" for key, value in entry.detail.items())
        table.add_row(
            f"{entry.n}",
            stamp(entry.at),
            text(entry.actor, limit=60),
            text(entry.action, limit=60),
            text(entry.subject, limit=60),
            text(detail, limit=200),
            text(entry.hash[:12], "dim"),
        )
    console.print(table)


def print_members(console: Console, members: Sequence[Member], now: float) -> None:
    """Live controllers; versions and fingerprints that differ stand out."""
    same = len({(member.version, member.fingerprint) for member in members}) <= 1
    table = _table("region", "instance", "role", "address", "version", "settings", "heard", "doing")
    for member in members:
        table.add_row(
            text(member.region, "bold"),
            text(member.instance),
            text(member.role.value),
            text(member.address),
            text(member.version, "" if same else "yellow"),
            text(member.fingerprint[:12], "" if same else "yellow"),
            f"{duration(max(0.0, now - member.at))} ago",
            text(member.reason, limit=200),
        )
    console.print(table)
