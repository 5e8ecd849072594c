"""Lag, exposure, loss and protection: what would be lost, and how well that is known (DESIGN section 5).

``seconds`` of a region's lag is *now − received_at of the oldest acknowledged record that is not yet committed there*.
The group's exposure is what would be lost if any one region vanished now. What cannot be measured is ``Unknown``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from controller.domain.model import AgentTail, Head, RegionLag, StreamReport, Unknown
from controller.domain.plan import AgentLoss, Loss


@dataclass(frozen=True, slots=True)
class Backlog:
    """What one store does not have yet, as its writer counts it. ``oldest_received_at`` None: nothing is missing."""

    region: str
    committed_seq: int
    segments: int
    records: int
    bytes: int
    oldest_received_at: float | None


def region_lag(backlog: Backlog, verified_seq: int | Unknown, now: float) -> RegionLag:
    """Lag of one region as its writer knows it. ``now`` is the holder's own wall clock, which also stamped the records."""
    seconds = 0.0 if backlog.oldest_received_at is None else max(0.0, now - backlog.oldest_received_at)
    return RegionLag(
        region=backlog.region,
        seq=backlog.committed_seq,
        segments=backlog.segments,
        records=backlog.records,
        bytes=backlog.bytes,
        seconds=seconds,
        verified_seq=verified_seq,
    )


def aged(report: StreamReport, now: float, *, fresh_seconds: float) -> StreamReport | Unknown:
    """A report is knowledge only while it is fresh; an old one says since when nothing is known."""
    if now - report.at > fresh_seconds:
        return Unknown(report.at, f"the holder {report.region}/{report.instance} last reported then")
    return report


def exposure(backlogs: Sequence[Backlog], now: float) -> tuple[float | Unknown, int | Unknown]:
    """Seconds and records that would be lost if any one region vanished: what lies beyond the *best* store besides it.

    ``backlogs`` covers every store, the home store included. With fewer than two stores nothing is known to survive.
    """
    if len(backlogs) < 2:
        return Unknown(0.0, "fewer than two stores"), Unknown(0.0, "fewer than two stores")
    second = sorted(backlogs, key=lambda backlog: -backlog.committed_seq)[1]
    seconds = 0.0 if second.oldest_received_at is None else max(0.0, now - second.oldest_received_at)
    return seconds, second.records


def beyond_objective(exposed_since: float | Unknown | None, now: float, rpo_seconds: float) -> str | None:
    """Why nothing more may be acknowledged that only one store has, under the policy ``enforce``; None: it may.

    ``exposed_since``: receipt of the oldest record that only one store has, by the clock of ``now``; None: there is none. An
    acknowledgement given now of a record that only one store has would, if that store vanished, make the lost work reach from
    ``exposed_since`` to now: that span is what the objective bounds. Unknown counts as exceeded.
    """
    if isinstance(exposed_since, Unknown):
        return f"how much only one store has is unknown: {exposed_since.why}"
    if exposed_since is None or now - exposed_since <= rpo_seconds:
        return None
    return f"only one store has what was received in the last {now - exposed_since:.1f} s, and the RPO is {rpo_seconds:g} s"


def worst(a: float | Unknown, b: float | Unknown) -> float | Unknown:
    """The worse of two; unknown is worse than any number, and the one unknown for longer is the worst."""
    if isinstance(a, Unknown):
        return b if isinstance(b, Unknown) and b.since < a.since else a
    return b if isinstance(b, Unknown) else max(a, b)


def protected(
    lag: RegionLag, *, rpo_seconds: float, within_since: float | None, now: float, settle_seconds: float
) -> bool | Unknown:
    """Whether a region's lag has been within the RPO, and its copy verified, for ``settle_seconds``.

    ``within_since``: since when both hold without interruption (None: they do not). Unknown counts as not protected, but is
    shown as unknown.
    """
    if isinstance(lag.seconds, Unknown):
        return lag.seconds
    if isinstance(lag.verified_seq, Unknown):
        return lag.verified_seq
    if lag.seconds > rpo_seconds or within_since is None:
        return False
    return now - within_since >= settle_seconds


@dataclass(frozen=True, slots=True)
class LossBasis:
    """What is known when a loss is estimated.

    ``recovered``: head of the longest valid history among the stores that were read. ``unread_sole_ackers``: stores that may
    have acknowledged alone and were not read. ``right_ended_by``: wall time at which the old holder's right had certainly
    ended. ``kept``: of the agents in the report, those whose newest reported record is in the recovered history.
    """

    report: StreamReport | None
    recovered: Head
    unread_sole_ackers: Collection[str]
    right_ended_by: float
    kept: Collection[str] = ()


def estimate(basis: LossBasis) -> Loss:
    """What would be lost by going on from ``basis.recovered``.

    Exact (and nothing: an acknowledged record is in one of the stores that were read) when every store that may have
    acknowledged alone was read. Otherwise an upper bound in seconds, and the last reported count of records plus unknown.
    """
    if not basis.unread_sole_ackers:
        return Loss(True, 0, False, 0.0, "every store that may have acknowledged alone was read; nothing acknowledged is lost")
    unread = ", ".join(sorted(basis.unread_sole_ackers))
    if basis.recovered.seq == 0 and basis.report is None:
        return Loss(False, 0, True, basis.right_ended_by, f"store {unread} was not read and no report exists")
    seconds = max(0.0, basis.right_ended_by - basis.recovered.received_at)
    report = basis.report
    records = 0 if report is None else max(0, report.acknowledged_records - basis.recovered.records)
    tails: tuple[AgentTail, ...] = () if report is None or records == 0 else report.unreplicated
    worst_agents = tuple(AgentLoss(t.agent, t.records, t.last_id) for t in tails if t.agent not in basis.kept)
    return Loss(
        exact=False,
        records=records,
        records_unknown=True,
        seconds=seconds,
        basis=(
            f"store {unread} was not read: "
            "from the receipt of the last recovered record to the end of the old holder's right"
        ),
        worst=worst_agents,
    )


def combine(losses: Sequence[Loss]) -> Loss:
    """The loss of a group from the losses of its streams: records add up, seconds are the worst."""
    if not losses:
        raise ValueError("a group has at least one stream")
    tails = sorted((agent for loss in losses for agent in loss.worst), key=lambda agent: (-agent.records, agent.agent))
    inexact = [loss for loss in losses if not loss.exact]
    return Loss(
        exact=not inexact,
        records=sum(loss.records for loss in losses),
        records_unknown=any(loss.records_unknown for loss in losses),
        seconds=max(loss.seconds for loss in losses),
        basis=(inexact or list(losses))[0].basis,
        worst=tuple(tails[:20]),
    )


def verified_by_region(positions: Mapping[str, int], region: str, since: float) -> int | Unknown:
    """The follower position of a region, or since when none was seen."""
    return positions[region] if region in positions else Unknown(since, f"no live controller in {region} reports a position")
