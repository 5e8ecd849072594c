"""One answer for the on-call engineer, composed from what a controller has seen. Pure: everything comes in as arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import gmtime, strftime

from controller.domain import lag
from controller.domain.model import Authority, Head, Holder, Member, Position, RegionLag, Role, StreamReport, Unknown
from controller.domain.promotion import PlanRecord, State
from controller.domain.sealing import KmsSeen
from controller.ports import TrafficState
from controller.runtime.service import Incident, RegionStatus, Status


@dataclass(frozen=True, slots=True)
class Observation:
    """Everything that a status is made of."""

    group: str
    region: str
    instance: str
    role: Role
    now: float
    authority: Authority | Unknown
    holders: tuple[Holder, ...] | Unknown
    members: tuple[Member, ...]
    reports: Mapping[str, StreamReport]
    heads: Mapping[str, Mapping[str, Head | Unknown]]
    """stream → region → head."""
    traffic: TrafficState | Unknown
    plans: tuple[PlanRecord, ...]
    incidents: tuple[Incident, ...]
    agents: int
    right_seconds: float
    rpo_seconds: float
    rpo_policy: str
    fresh_seconds: float
    positions: Mapping[str, Position]
    warnings: tuple[str, ...]
    regions: Sequence[str]
    failsafe_since: float = 0.0
    kms: tuple[KmsSeen, ...] = ()


def compose(seen: Observation) -> Status:
    """The status document."""
    fresh = _fresh(seen)
    seconds: float | Unknown = 0.0 if fresh else Unknown(0.0, "no holder has reported yet")
    records: int | Unknown = 0 if fresh else Unknown(0.0, "no holder has reported yet")
    for report in fresh:
        seconds = lag.worst(seconds, report if isinstance(report, Unknown) else report.exposure_seconds)
        part = report if isinstance(report, Unknown) else report.exposure_records
        records = part if isinstance(part, Unknown) else records if isinstance(records, Unknown) else records + part
    sentence, command = _sentence(seen, seconds)
    return Status(
        group=seen.group,
        sentence=sentence,
        next=command,
        region=seen.region,
        instance=seen.instance,
        role=seen.role,
        at=seen.now,
        authority=seen.authority,
        holders=seen.holders,
        regions=tuple(_region(seen, region) for region in seen.regions),
        reports=tuple(seen.reports.values()),
        rpo_seconds=seen.rpo_seconds,
        rpo_policy=seen.rpo_policy,
        exposure_seconds=seconds,
        exposure_records=records,
        traffic_epoch=seen.traffic.epoch if isinstance(seen.traffic, TrafficState) else seen.traffic,
        agents=seen.agents,
        right_seconds=seen.right_seconds,
        plans=seen.plans,
        incidents=seen.incidents,
        positions=seen.positions,
        warnings=seen.warnings,
        failsafe_since=seen.failsafe_since,
        kms=seen.kms,
    )


def _fresh(seen: Observation) -> list[StreamReport | Unknown]:
    """What is known of each stream *now*: a report while it is fresh. A stream without one is unknown, never nothing."""
    missing = [
        Unknown(0.0, f"nobody has reported stream {stream}") for stream in sorted(seen.heads) if stream not in seen.reports
    ]
    aged = [lag.aged(report, seen.now, fresh_seconds=seen.fresh_seconds) for report in seen.reports.values()]
    return [*missing, *aged] if seen.reports else []


def _region(seen: Observation, region: str) -> RegionStatus:
    heads = {stream: by_region[region] for stream, by_region in seen.heads.items() if region in by_region}
    active = isinstance(seen.authority, Authority) and seen.authority.region == region and _holds(seen, region)
    return RegionStatus(
        region=region,
        active=active,
        weight=seen.traffic.weights.get(region, 0) if isinstance(seen.traffic, TrafficState) else seen.traffic,
        heads=heads,
        lag=None if active else _lag(seen, region),
        members=sum(1 for member in seen.members if member.region == region),
        protected=_protected(seen, region, active),
        salvage=tuple(salvage for head in heads.values() if isinstance(head, Head) for salvage in head.salvage),
    )


def _holds(seen: Observation, region: str) -> bool:
    return not isinstance(seen.holders, Unknown) and any(holder.region == region for holder in seen.holders)


def _lag(seen: Observation, region: str) -> RegionLag | None:
    """The worst stream's lag. A report that is too old says nothing but since when nothing is known."""
    worst: RegionLag | None = None
    for aged in _fresh(seen):
        if isinstance(aged, Unknown):
            return RegionLag(region, aged, aged, aged, aged, aged, aged)
        for candidate in aged.regions:
            if candidate.region == region and (
                worst is None or lag.worst(worst.seconds, candidate.seconds) is candidate.seconds
            ):
                worst = candidate
    return worst


def _protected(seen: Observation, region: str, active: bool) -> bool | Unknown:
    if active:
        return True
    for aged in _fresh(seen):
        if isinstance(aged, Unknown):
            return aged
        if region not in aged.protected:
            return False
    return True if seen.reports else Unknown(0.0, "no holder has reported yet")


def _sentence(seen: Observation, exposure: float | Unknown) -> tuple[str, str]:
    """What is going on, and what to type next."""
    if seen.failsafe_since:
        at = strftime("%H:%M:%S", gmtime(seen.failsafe_since))
        return (
            f"FAILSAFE since {at} UTC: etcd is unreachable for all; two stores must have what {seen.region} acknowledges",
            "bring etcd back; `drctl status` at a controller of another region",
        )
    if isinstance(seen.authority, Unknown):
        return f"etcd does not answer {seen.region}: {seen.authority.why}", "wait, or ask a controller of another region"
    moving = [record for record in seen.plans if record.state is not State.AWAITING_APPROVAL]
    if moving:
        record = moving[-1]
        return (
            f"plan {record.plan.id} moves the fleet to {record.plan.target}: {record.state.value} ({record.reason})",
            f"drctl plan show {record.plan.id}",
        )
    if isinstance(seen.holders, Unknown) or not seen.holders:
        waiting = [record for record in seen.plans if record.state is State.AWAITING_APPROVAL]
        if waiting:
            plan = waiting[-1].plan
            return (
                f"{seen.authority.region} is silent; plan {plan.id} to {plan.target} waits for approval",
                f"drctl plan show {plan.id}",
            )
        return f"{seen.authority.region} has the authority and nobody holds it", "drctl plan failover --to REGION"
    holder = min(seen.holders, key=lambda holder: holder.stream)
    instances = ", ".join(sorted({found.instance for found in seen.holders}))
    text = f"{holder.region} is active in epoch {holder.epoch} ({instances})"
    unheld = sorted(set(seen.heads) - {found.stream for found in seen.holders})
    if unheld:
        return f"{text}; nobody holds {', '.join(unheld)}, whose agents are not served", "drctl members"
    held = [report for report in _fresh(seen) if not isinstance(report, Unknown) and report.enforcing_since]
    if held:
        since = min(report.enforcing_since for report in held)
        at = strftime("%H:%M:%S", gmtime(since))
        return f"{text}; enforcing: not acknowledging since {at} UTC ({held[0].enforcing})", "drctl lag --watch"
    if isinstance(exposure, Unknown):
        return f"{text}; exposure is unknown: {exposure.why}", "drctl lag --watch"
    if exposure > seen.rpo_seconds:
        return f"{text}; exposure {exposure:.1f} s is over the RPO of {seen.rpo_seconds:g} s", "drctl lag --watch"
    if seen.incidents:
        return f"{text}; {len(seen.incidents)} open incidents", "drctl incidents"
    return f"{text}; exposure {exposure:.1f} s within the RPO of {seen.rpo_seconds:g} s", "nothing to do"
