"""The frozen document that people approve: its parts, its canonical form, its digest, and how far evidence may drift.

A plan is a value. It names the authority that it was made under (region, epoch), so it cannot run under another. What is
approved is the digest, SHA-256 of the canonical JSON form; everything that a person is shown is inside it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from typing import Any

from controller.domain.model import EpochStart, Holder, RegionLag, Unknown

PLAN_FORMAT = 1


class PlanKind(StrEnum):
    """Why the fleet moves. A failback is a switchover home; a drill runs the same steps against a shadow group."""

    FAILOVER = "failover"
    SWITCHOVER = "switchover"
    FAILBACK = "failback"
    DRILL = "drill"

    @property
    def planned(self) -> bool:
        """Whether the old holder is asked to drain first, so that nothing is lost."""
        return self is not PlanKind.FAILOVER


STEPS = ("check", "quiesce", "authorize", "fence", "catch-up", "verify", "resume", "route", "confirm", "report")


@dataclass(frozen=True, slots=True)
class HeadSeen:
    """What one region store said of one stream when the evidence was taken."""

    region: str
    stream: str
    seq: int
    epoch: int
    last_epoch: int
    chain: str
    received_at: float


@dataclass(frozen=True, slots=True)
class StoreUnknown:
    """A region store that did not answer when the evidence was taken."""

    region: str
    stream: str
    since: float
    why: str


@dataclass(frozen=True, slots=True)
class AgentLoss:
    """One agent's part of the loss: ``records`` acknowledged that the target would not have, the newest first lost id."""

    agent: str
    records: int
    last_id: str


@dataclass(frozen=True, slots=True)
class Loss:
    """What would be lost. ``exact`` only when every store that may have acknowledged alone was read (and fenced, at catch-up).

    Not exact: ``seconds`` is an upper bound, from the receipt of the last recovered record to the last moment at which the
    old holder could have acknowledged; ``records`` is the last reported count, and ``records_unknown`` says that there may
    be more (DESIGN section 5).
    """

    exact: bool
    records: int
    records_unknown: bool
    seconds: float
    basis: str
    worst: tuple[AgentLoss, ...] = ()

    def exceeds(self, approved: Loss, *, tolerance_seconds: float, tolerance_records: int) -> str | None:
        """Why this loss is worse than the approved one by more than the tolerance, or None."""
        if math.isnan(self.seconds) or self.seconds > approved.seconds + tolerance_seconds:
            return (
                f"loss of {self.seconds:.1f} s against {approved.seconds:.1f} s approved (tolerance {tolerance_seconds:.1f} s)"
            )
        if self.records > approved.records + tolerance_records:
            return f"loss of {self.records} records against {approved.records} approved (tolerance {tolerance_records})"
        if approved.exact and not self.exact:
            return "a loss that is only known as a bound, against an exact one that was approved"
        return None


NO_LOSS = Loss(exact=True, records=0, records_unknown=False, seconds=0.0, basis="nothing is lost: the old holder drains first")


@dataclass(frozen=True, slots=True)
class Check:
    """One precondition with its outcome."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was seen when the plan was made. Re-computed before anything moves."""

    at: float
    authority_region: str
    authority_epoch: int
    authority_revision: int
    holders: tuple[Holder, ...]
    heads: tuple[HeadSeen, ...]
    unreachable: tuple[StoreUnknown, ...]
    forks: Mapping[str, tuple[EpochStart, ...]]
    lag: tuple[RegionLag, ...]
    loss: Loss
    agents: int
    weights: Mapping[str, int]
    traffic_epoch: int | Unknown
    checks: tuple[Check, ...]
    right_ended_by: float = 0.0
    """Wall time by which the old holder's right had certainly ended; 0 while somebody holds."""

    @property
    def failing(self) -> tuple[Check, ...]:
        """The checks that said no."""
        return tuple(check for check in self.checks if not check.ok)


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be done, why, and what was seen. Immutable; its digest is what people approve."""

    id: str
    group: str
    kind: PlanKind
    source: str
    target: str
    requester: str
    reason: str
    created_at: float
    expires_at: float
    approvals_required: int
    break_glass: bool
    weights: Mapping[str, int]
    """Weights after the plan."""
    tolerance_seconds: float
    tolerance_records: int
    evidence: Evidence
    steps: tuple[str, ...] = STEPS
    engine: str = "route53-weights"
    format: int = PLAN_FORMAT


_PLAIN = frozenset({str, int, bool, type(None)})
"""What is its own JSON form. (Not their subclasses: a ``StrEnum`` is a ``str``.)"""


def canonical(value: Any) -> Any:
    """The JSON form of a frozen value: dataclasses as objects tagged with nothing but their fields, keys sorted by the encoder.

    Raises ValueError for a number that JSON does not have (NaN, infinity): a document with one cannot be approved.
    """
    if type(value) in _PLAIN:
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: canonical(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): canonical(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [canonical(item) for item in value]
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} has no canonical form")
        # 3.0 and 3 are one number: JSON does not keep the difference, so a digest must not depend on it.
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    return value


def canonical_bytes(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no white space, UTF-8 with ASCII escapes, no NaN."""
    return json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def digest(plan: Plan) -> str:
    """Hex SHA-256 of the plan's canonical form: what approvals are bound to."""
    return hashlib.sha256(canonical_bytes(plan)).hexdigest()


def opened_since(seen: Evidence, now: Evidence) -> int:
    """The greatest epoch that opened (has a recorded fork) after ``seen``, 0 when none did.

    A region that only *flaps*, acquiring epoch after epoch without ever opening one, or that restarts while people sign, must
    not make every failover away from it void; the loss is compared in any case.
    """
    return max(
        (starts[-1].epoch for starts in now.forks.values() if starts and starts[-1].epoch > seen.authority_epoch), default=0
    )


def drift(plan: Plan, now: Evidence) -> str | None:
    """Why ``plan`` may not run any more on what is seen now, in one sentence, or None.

    Whatever decides *who* was active must be unchanged; what would be *lost* may differ within the plan's tolerances.
    """
    seen = plan.evidence
    if now.authority_region != seen.authority_region:
        return f"the authority moved from {seen.authority_region} to {now.authority_region}"
    if plan.kind.planned and now.authority_epoch != seen.authority_epoch:
        return f"the epoch moved from {seen.authority_epoch} to {now.authority_epoch}: somebody else was active since"
    served = opened_since(seen, now)
    if served and not seen.holders:
        return f"epoch {served} opened after the plan was made: {seen.authority_region}, which was silent, serves again"
    worse = now.loss.exceeds(seen.loss, tolerance_seconds=plan.tolerance_seconds, tolerance_records=plan.tolerance_records)
    if worse:
        return worse
    failing = [check.name for check in now.failing if check.name not in {c.name for c in seen.failing}]
    if failing:
        return f"checks that passed when the plan was made fail now: {', '.join(failing)}"
    return None
