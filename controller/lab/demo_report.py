"""What the demo concludes: promised loss beside real loss, from what agents wrote down and what the stores hold. Pure.

Nothing here comes from the controllers' own opinion but the promise: what was acknowledged is what the *agents* noted when
they got the answer; what survived is what the *target's store* holds, read segment by segment; what was salvaged is what
the *old store* holds past the point at which it was cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Written:
    """One checkpoint as its agent saw it. ``at``: wall clock when the answer came. ``copies``: as asked for."""

    agent: str
    id: str
    sha256: str
    copies: int
    at: float


@dataclass(frozen=True, slots=True)
class Resumed:
    """An agent that started from a checkpoint (``id`` None: from nothing) in a region."""

    agent: str
    region: str
    id: str | None
    sha256: str
    at: float


@dataclass(frozen=True, slots=True)
class Stored:
    """One record in a store's history."""

    agent: str
    id: str
    sha256: str
    seq: int


@dataclass(frozen=True, slots=True)
class AgentOutcome:
    """One agent's last acknowledged against its resumed checkpoint."""

    agent: str
    last_acknowledged: str
    resumed: str
    lost_records: int
    lost_seconds: float
    exact: bool
    """It resumed from the very last checkpoint that the target holds, hash for hash."""


@dataclass(frozen=True, slots=True)
class RealLoss:
    """What was acknowledged and is not in the history that went on. ``seconds``: from the first lost acknowledgement to the
    last acknowledgement that the fleet got before the disaster; 0 when nothing was lost."""

    records: int
    seconds: float
    lost: tuple[Written, ...]
    durable_lost: int
    """Of those, acknowledged with two copies or more. A single one breaks the first promise."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold at the end."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Promise:
    """The loss that people saw and approved."""

    records: int
    records_unknown: bool
    seconds: float
    exact: bool


@dataclass(slots=True)
class Report:
    """Everything that one run measured. Times in seconds; ``rto`` counts from the kill."""

    agents: int
    source: str
    target: str
    rto: dict[str, float] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    """Steps of the promotion, from its journal."""
    promised: dict[str, Any] = field(default_factory=dict)
    recorded: dict[str, Any] = field(default_factory=dict)
    """The loss that catch-up recorded in the plan."""
    real: dict[str, Any] = field(default_factory=dict)
    salvage: dict[str, Any] = field(default_factory=dict)
    refusals: list[dict[str, Any]] = field(default_factory=list)
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    """About the run itself: checkpoints, refused writes, seconds of each act."""

    @property
    def held(self) -> bool:
        """Whether every check holds; a report without checks proves nothing."""
        return bool(self.checks) and all(check["ok"] for check in self.checks)

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {"held": self.held, **asdict(self)}


def real_loss(acknowledged: Iterable[Written], survived: Iterable[Stored]) -> RealLoss:
    """Compares what agents hold a promise for with what the continued history holds."""
    written = sorted(acknowledged, key=lambda w: w.at)
    alive = {(record.agent, record.id): record.sha256 for record in survived}
    lost = tuple(w for w in written if alive.get((w.agent, w.id)) != w.sha256)
    seconds = written[-1].at - lost[0].at if lost else 0.0
    return RealLoss(len(lost), seconds, lost, sum(1 for w in lost if w.copies >= 2))


def outcomes(
    agents: Sequence[str],
    acknowledged: Iterable[Written],
    resumptions: Iterable[Resumed],
    survived: Iterable[Stored],
    target: str,
) -> tuple[AgentOutcome, ...]:
    """Every agent's end of the old life against the start of the new one. ``resumptions``: those after the disaster."""
    by_agent: dict[str, list[Written]] = {}
    for written in sorted(acknowledged, key=lambda w: w.at):
        by_agent.setdefault(written.agent, []).append(written)
    alive = {(record.agent, record.id) for record in survived}
    latest: dict[str, Stored] = {}
    for record in survived:
        if record.agent not in latest or record.seq >= latest[record.agent].seq:
            latest[record.agent] = record
    first: dict[str, Resumed] = {}
    for resumed in sorted(resumptions, key=lambda r: r.at):
        if resumed.region == target:
            first.setdefault(resumed.agent, resumed)
    return tuple(_outcome(agent, by_agent.get(agent, []), alive, latest.get(agent), first.get(agent)) for agent in agents)


def _outcome(
    agent: str, written: Sequence[Written], alive: set[tuple[str, str]], latest: Stored | None, resumed: Resumed | None
) -> AgentOutcome:
    lost = [w for w in written if (w.agent, w.id) not in alive]
    exact = resumed is not None and (
        (resumed.id is None and latest is None)
        or (latest is not None and (resumed.id, resumed.sha256) == (latest.id, latest.sha256))
    )
    return AgentOutcome(
        agent=agent,
        last_acknowledged=written[-1].id if written else "",
        resumed="" if resumed is None else resumed.id or "(from the beginning)",
        lost_records=len(lost),
        lost_seconds=round(written[-1].at - lost[0].at, 3) if lost else 0.0,
        exact=exact,
    )


def unsalvaged(lost: Iterable[Written], salvaged: Iterable[Stored]) -> tuple[Written, ...]:
    """Lost records that the old store's salvage does not hold, hash for hash. Must be none."""
    found = {(record.agent, record.id): record.sha256 for record in salvaged}
    return tuple(w for w in lost if found.get((w.agent, w.id)) != w.sha256)


def phases(journal: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of every step, from the first start to the last end (a step that was resumed by another instance counts once)."""
    starts: dict[str, float] = {}
    ends: dict[str, float] = {}
    for entry in journal:
        step = str(entry["step"])
        starts[step] = min(starts.get(step, float("inf")), float(entry["started_at"]))
        ends[step] = max(ends.get(step, 0.0), float(entry["finished_at"]))
    return {step: round(ends[step] - start, 3) for step, start in starts.items() if ends[step] > 0}


def checks(
    *,
    promised: Promise,
    real: RealLoss,
    agents: Sequence[AgentOutcome],
    missing_salvage: Sequence[Written],
    salvaged_records: int,
    refusals: Sequence[Mapping[str, Any]],
    stores: Sequence[str],
    active: Sequence[str],
    target: str,
    most_active: int,
    lag_seconds: Mapping[str, float | None],
    rpo_seconds: float,
    resolved_region: str,
) -> tuple[Check, ...]:
    """All that must hold. Exit code 0 of the demo means: every one of these does."""
    enough = promised.records_unknown or promised.records >= real.records
    inexact = [a.agent for a in agents if not a.exact]
    second = {r["target"]: r["outcome"] for r in refusals if r.get("attempt") == "re-read"}
    accepted = [r["target"] for r in refusals if r.get("outcome") == "ACCEPTED"]
    wanted = {*(f"store:{name}" for name in stores), "traffic"}
    late = {name: seconds for name, seconds in lag_seconds.items() if seconds is None or seconds > rpo_seconds}
    promised_text = f"{promised.records}{' plus unknown' if promised.records_unknown else ''}"
    return (
        Check("promised records >= real", enough, f"{promised_text} >= {real.records}"),
        Check(
            "promised seconds >= real", promised.seconds >= real.seconds, f"{promised.seconds:.2f} s >= {real.seconds:.2f} s"
        ),
        Check("no checkpoint with copies >= 2 lost", real.durable_lost == 0, f"{real.durable_lost} lost"),
        Check(
            "every agent resumed from the last checkpoint in the target",
            bool(agents) and not inexact,
            f"{len(agents) - len(inexact)} of {len(agents)}" + (f"; not: {', '.join(inexact[:5])}" if inexact else ""),
        ),
        Check(
            "late writers refused at every store and at Route 53",
            all(second.get(name) == "refused" for name in wanted) and not accepted,
            f"{sum(1 for name in wanted if second.get(name) == 'refused')} of {len(wanted)} refused"
            + (f"; accepted: {', '.join(accepted)}" if accepted else ""),
        ),
        Check(
            "exactly one active controller",
            len(active) == 1 and active[0].startswith(f"{target}/"),
            ", ".join(active) or "none",
        ),
        Check("never two active at once", most_active <= 1, f"at most {most_active} seen"),
        Check("the name leads to the target", resolved_region == target, resolved_region or "nowhere"),
        Check(
            "lag of every other region within the RPO",
            bool(lag_seconds) and not late,
            ", ".join(f"{name} {'unknown' if s is None else f'{s:.2f} s'}" for name, s in lag_seconds.items())
            or "not measured",
        ),
        Check(
            "everything lost is in the salvage",
            not missing_salvage,
            f"{real.records - len(missing_salvage)} of {real.records} lost found among {salvaged_records} salvaged",
        ),
    )


def assemble(
    *,
    agents: Sequence[AgentOutcome],
    source: str,
    target: str,
    marks: Mapping[str, float],
    journal: Sequence[Mapping[str, Any]],
    promised: Promise,
    recorded: Any,
    real: RealLoss,
    salvaged: int,
    missing: Sequence[Written],
    tries: Sequence[Mapping[str, Any]],
    checks: Sequence[Check],
    run: dict[str, Any],
) -> Report:
    """The report of a run. ``marks``: wall clock of ``kill, incident, page, plan, approved, execute, served, resumed, working,
    thaw, reprotected``; every duration of ``rto`` counts from the kill but those with ``_after_`` in their names."""
    from_kill = {name: round(marks[name] - marks["kill"], 3) for name in MARKS if name in marks}
    execute, thaw = marks["execute"], marks["thaw"]
    return Report(
        agents=len(agents),
        source=source,
        target=target,
        rto={
            **from_kill,
            "served_after_execute": round(marks["served"] - execute, 3),
            "working_after_execute": round(marks["working"] - execute, 3),
            "reprotected_after_thaw": round(marks["reprotected"] - thaw, 3),
        },
        phases=phases(journal),
        promised=asdict(promised),
        recorded=dict(recorded) if isinstance(recorded, Mapping) else {},
        real={
            "records": real.records,
            "seconds": round(real.seconds, 3),
            "durable_lost": real.durable_lost,
            "agents": sum(1 for agent in agents if agent.lost_records),
        },
        salvage={"records": salvaged, "lost_not_salvaged": [asdict(written) for written in missing]},
        refusals=[dict(line) for line in tries],
        outcomes=[asdict(outcome) for outcome in agents],
        checks=[asdict(check) for check in checks],
        run=run,
    )


MARKS = ("incident", "page", "plan", "approved", "execute", "served", "resumed", "working")
