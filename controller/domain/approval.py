"""Who may let a plan run: the statement that people sign, and the gate that counts their signatures. Pure.

An approval is bound to one group, one plan, one digest, one decision and one expiry (DESIGN section 6); the signature over
that statement was verified by the identity adapter before an ``Approval`` exists. The gate then asks whether enough
*people* agree. Approvals that share a name or a key belong to one person, however many names and keys are listed, and the
person who asked for the plan never counts. A refusal ends the plan and does not expire: stopping is always safe.

Each rule below is a guard with a name, so that the tests can leave out one at a time and show that it is missed.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from controller.domain.plan import canonical_bytes
from controller.domain.plan import digest as digest_of
from controller.domain.promotion import AFTER_AUTHORIZE, PlanRecord

NAMESPACE = "dr-approval"
"""SSHSIG namespace: a signature that was made for anything else (a git commit, a file) is not an approval."""

STATEMENT_FORMAT = 1
APPROVE = "approve"
REFUSE = "refuse"
DECISIONS = (APPROVE, REFUSE)


def statement(group: str, plan: str, digest: str, decision: str, principal: str, expires_at: float) -> bytes:
    """The exact bytes that a person signs. ``expires_at``: wall clock seconds.

    Raises ValueError for an unknown decision or an expiry that is not finite.
    """
    if decision not in DECISIONS:
        raise ValueError(f"decision {decision!r} is neither {APPROVE!r} nor {REFUSE!r}")
    return canonical_bytes(
        {
            "v": STATEMENT_FORMAT,
            "group": group,
            "plan": plan,
            "digest": digest,
            "decision": decision,
            "principal": principal,
            # One form for 900 and 900.0: the signer and the verifier must build equal bytes.
            "expires_at": float(expires_at),
        }
    )


@dataclass(frozen=True, slots=True)
class Approval:
    """One signed decision whose signature was verified. ``at``: when a controller received it (wall clock seconds)."""

    plan: str
    digest: str
    principal: str
    fingerprint: str
    decision: str
    expires_at: float
    at: float
    signature: str


@dataclass(frozen=True, slots=True)
class Gate:
    """Whether a plan may run, and why. ``valid``: the people who count, by the name under which each came first."""

    open: bool
    valid: tuple[str, ...]
    missing: int
    """How many more people must approve; 0 also when something other than people keeps the gate closed."""
    refused_by: str | None
    rejected: tuple[tuple[str, str], ...]
    """(principal, why) of every approval that does not count."""
    sentence: str


PlanGuard = Callable[[PlanRecord, float], str | None]
ApprovalGuard = Callable[[PlanRecord, Approval, float, float], str | None]


def _digest_is_of_this_plan(record: PlanRecord, now: float) -> str | None:
    try:
        content = digest_of(record.plan)
    except ValueError:
        return "it holds a number that has no canonical form, so nobody can approve it"
    if record.digest != content:
        return "its recorded digest is not the digest of its content: somebody changed the document"
    return None


def _not_ended(record: PlanRecord, now: float) -> str | None:
    return f"it has ended ({record.state.value})" if record.ended else None


def _not_used(record: PlanRecord, now: float) -> str | None:
    if record.state in AFTER_AUTHORIZE:
        return "its approvals were used when it was authorized"
    return None


def _not_expired(record: PlanRecord, now: float) -> str | None:
    # Written so that NaN counts as expired.
    return None if record.plan.expires_at > now else "it has expired"


def _somebody_required(record: PlanRecord, now: float) -> str | None:
    return None if record.plan.approvals_required >= 1 else "it asks for no approval at all"


def _break_glass_has_reason(record: PlanRecord, now: float) -> str | None:
    if record.plan.break_glass and not record.plan.reason.strip():
        return "it is break-glass and states no reason"
    return None


PLAN_GUARDS: Mapping[str, PlanGuard] = {
    "plan-digest": _digest_is_of_this_plan,
    "plan-ended": _not_ended,
    "plan-used": _not_used,
    "plan-expired": _not_expired,
    "plan-required": _somebody_required,
    "plan-reason": _break_glass_has_reason,
}
"""Any of these keeps the gate closed, whoever approved."""


def _for_this_plan(record: PlanRecord, approval: Approval, now: float, minimum: float) -> str | None:
    return None if approval.plan == record.plan.id else f"is for plan {approval.plan}"


def _for_this_digest(record: PlanRecord, approval: Approval, now: float, minimum: float) -> str | None:
    return None if approval.digest == record.digest else "is for another version of this plan (the digest differs)"


def _decision_known(record: PlanRecord, approval: Approval, now: float, minimum: float) -> str | None:
    return None if approval.decision in DECISIONS else f"has the unknown decision {approval.decision!r}"


def _fresh(record: PlanRecord, approval: Approval, now: float, minimum: float) -> str | None:
    if approval.decision == REFUSE:
        return None if approval.at < approval.expires_at else "arrived after its own expiry"
    return _left(approval.expires_at - now, minimum)


def _plan_lasts(record: PlanRecord, approval: Approval, now: float, minimum: float) -> str | None:
    """An approval dies with its plan, so the plan's expiry bounds it just as its own does."""
    return None if approval.decision == REFUSE else _left(record.plan.expires_at - now, minimum)


def _left(seconds: float, minimum: float) -> str | None:
    # Comparisons are written so that NaN counts as expired.
    if not seconds > 0:
        return "has expired"
    if not seconds >= minimum:
        return f"expires in {seconds:.0f} s, and at least {minimum:.0f} s must be left: sign again"
    return None


APPROVAL_GUARDS: Mapping[str, ApprovalGuard] = {
    "plan": _for_this_plan,
    "digest": _for_this_digest,
    "decision": _decision_known,
    "fresh": _fresh,
    "plan-lasts": _plan_lasts,
}
"""Any of these rejects one approval."""

PEOPLE_GUARDS = ("requester", "one-name", "one-key", "refusal")
"""Rules about who people are; see ``_persons`` and ``_judge``."""

GUARDS = (*PLAN_GUARDS, *APPROVAL_GUARDS, *PEOPLE_GUARDS)


def same_name(name: str) -> str:
    """Form in which two spellings of a principal are equal: Unicode compatibility form, case folded, trimmed."""
    return unicodedata.normalize("NFKC", name).casefold().strip()


def _persons(approvals: Sequence[Approval], requester: str, without: Collection[str]) -> tuple[list[int], int]:
    """A number per approval, and the requester's. Equal numbers: one person, by a shared name or key, also through others."""
    links: dict[str, int] = {f"name:{same_name(requester)}": 0}
    person = [0] * (len(approvals) + 1)
    for index, approval in enumerate(approvals, start=1):
        person[index] = index
        keys = [] if "one-name" in without else [f"name:{same_name(approval.principal)}"]
        keys += [] if "one-key" in without else [f"key:{approval.fingerprint}"]
        for key in keys:
            known = links.setdefault(key, index)
            old, new = person[index], person[known]
            if old != new:
                person = [new if number == old else number for number in person]
    return person[1:], person[0]


def _judge(
    record: PlanRecord, approvals: Sequence[Approval], now: float, minimum: float, without: Collection[str] = ()
) -> Gate:
    """The gate, optionally blind for the guards named in ``without`` (tests only: a missing guard must be caught)."""
    plan = record.plan
    numbers, requester = _persons(approvals, plan.requester, without)
    rejected: list[tuple[str, str]] = []
    valid: dict[int, str] = {}
    refused_by: str | None = None
    for approval, person in zip(approvals, numbers, strict=True):
        reasons = (guard(record, approval, now, minimum) for name, guard in APPROVAL_GUARDS.items() if name not in without)
        why = next((reason for reason in reasons if reason), None)
        if why is None and approval.decision == REFUSE and "refusal" not in without:
            refused_by = refused_by or approval.principal
        elif why is None and person == requester and "requester" not in without:
            why = "is by the person who asked for the plan (same name or same key), and who asks cannot approve"
        elif why is None and person in valid:
            why = f"is the same person as {valid[person]} (same name or same key) and counts once"
        elif why is None:
            valid[person] = approval.principal
        if why is not None:
            rejected.append((approval.principal, why))
    return _conclude(record, now, tuple(valid.values()), refused_by, tuple(rejected), without)


def _conclude(
    record: PlanRecord,
    now: float,
    valid: tuple[str, ...],
    refused_by: str | None,
    rejected: tuple[tuple[str, str], ...],
    without: Collection[str],
) -> Gate:
    plan = record.plan
    missing = max(0, plan.approvals_required - len(valid))
    reasons = (guard(record, now) for name, guard in PLAN_GUARDS.items() if name not in without)
    closed = next((reason for reason in reasons if reason), None)
    if closed is not None:
        return Gate(False, valid, 0, refused_by, rejected, f"Plan {plan.id} cannot run: {closed}.")
    if refused_by is not None:
        return Gate(False, valid, 0, refused_by, rejected, f"Plan {plan.id} was refused by {refused_by}.")
    names = ", ".join(valid) or "nobody"
    count = f"{len(valid)} of {plan.approvals_required} approvals ({names})"
    if missing:
        more = "one more person" if missing == 1 else f"{missing} more people"
        return Gate(False, valid, missing, None, rejected, f"Plan {plan.id} has {count}; {more} must approve.")
    return Gate(True, valid, 0, None, rejected, f"Plan {plan.id} has {count} and may run.")


def gate(record: PlanRecord, approvals: Sequence[Approval], now: float, *, minimum_left_seconds: float = 0.0) -> Gate:
    """Whether ``record`` may run on these approvals at wall clock ``now``.

    ``minimum_left_seconds``: how long each signed expiry (and the plan's) must still be away. The executor asks for two
    TTLs before it authorizes, because it may be paused between this check and the transaction (DESIGN section 6).
    """
    return _judge(record, approvals, now, minimum_left_seconds)
