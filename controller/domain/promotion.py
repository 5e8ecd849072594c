"""A plan's life as one table: states, events, and what may follow what. Read this file first to know what a promotion does.

    awaiting-approval ─▶ quiescing ─▶ authorizing ─▶ fencing ─▶ …
            │                │             │
            └────────────────┼─────────────┘
                             ▼
             refused / void / expired / aborted

    … fencing ─▶ catching-up ───────────────▶ verifying ─▶ resuming ─▶ routing ─▶ confirming ─▶ reporting ─▶ done
                   │     ▲                        ▲
     loss-exceeded │     │ loss-approved          │ caught-up
                   ▼     │                        │
                   holding ───────────────────────┘

    any of the second row ─▶ superseded: another plan moved the authority on

Everything before ``authorizing`` ends can be aborted: the authority has not moved. After it the way is forward, or a new
plan. ``holding``: the loss turned out worse than what people approved, so the epoch is not opened until the missing
store is back or the greater loss is approved. A cell that is not in the table is a bug and raises ``IllegalTransition``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from controller.domain.plan import STEPS, Loss, Plan


class State(StrEnum):
    """Where a plan stands."""

    AWAITING_APPROVAL = "awaiting-approval"
    QUIESCING = "quiescing"
    AUTHORIZING = "authorizing"
    FENCING = "fencing"
    CATCHING_UP = "catching-up"
    HOLDING = "holding"
    VERIFYING = "verifying"
    RESUMING = "resuming"
    ROUTING = "routing"
    CONFIRMING = "confirming"
    REPORTING = "reporting"
    DONE = "done"
    REFUSED = "refused"
    VOID = "void"
    EXPIRED = "expired"
    ABORTED = "aborted"
    SUPERSEDED = "superseded"


class Event(StrEnum):
    """What happened to a plan."""

    STARTED = "started"
    QUIESCED = "quiesced"
    AUTHORIZED = "authorized"
    FENCED = "fenced"
    LOSS_EXCEEDED = "loss-exceeded"
    LOSS_APPROVED = "loss-approved"
    CAUGHT_UP = "caught-up"
    VERIFIED = "verified"
    RESUMED = "resumed"
    ROUTED = "routed"
    CONFIRMED = "confirmed"
    REPORTED = "reported"
    SUPERSEDED = "superseded"
    REFUSED = "refused"
    DRIFTED = "drifted"
    EXPIRED = "expired"
    ABORTED = "aborted"


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.AWAITING_APPROVAL: {
        Event.STARTED: State.QUIESCING,
        Event.REFUSED: State.REFUSED,
        Event.DRIFTED: State.VOID,
        Event.EXPIRED: State.EXPIRED,
        Event.ABORTED: State.ABORTED,
    },
    State.QUIESCING: {
        Event.QUIESCED: State.AUTHORIZING,
        Event.REFUSED: State.REFUSED,
        Event.DRIFTED: State.VOID,
        Event.EXPIRED: State.EXPIRED,
        Event.ABORTED: State.ABORTED,
    },
    State.AUTHORIZING: {
        Event.AUTHORIZED: State.FENCING,
        Event.REFUSED: State.REFUSED,
        Event.DRIFTED: State.VOID,
        Event.EXPIRED: State.EXPIRED,
        Event.ABORTED: State.ABORTED,
    },
    State.FENCING: {Event.FENCED: State.CATCHING_UP, Event.SUPERSEDED: State.SUPERSEDED},
    State.CATCHING_UP: {
        Event.CAUGHT_UP: State.VERIFYING,
        Event.LOSS_EXCEEDED: State.HOLDING,
        Event.SUPERSEDED: State.SUPERSEDED,
    },
    State.HOLDING: {
        Event.LOSS_APPROVED: State.CATCHING_UP,
        Event.LOSS_EXCEEDED: State.HOLDING,
        Event.CAUGHT_UP: State.VERIFYING,
        Event.SUPERSEDED: State.SUPERSEDED,
    },
    State.VERIFYING: {Event.VERIFIED: State.RESUMING, Event.SUPERSEDED: State.SUPERSEDED},
    State.RESUMING: {Event.RESUMED: State.ROUTING, Event.SUPERSEDED: State.SUPERSEDED},
    State.ROUTING: {Event.ROUTED: State.CONFIRMING, Event.SUPERSEDED: State.SUPERSEDED},
    State.CONFIRMING: {Event.CONFIRMED: State.REPORTING, Event.SUPERSEDED: State.SUPERSEDED},
    State.REPORTING: {Event.REPORTED: State.DONE, Event.SUPERSEDED: State.SUPERSEDED},
    State.DONE: {},
    State.REFUSED: {},
    State.VOID: {},
    State.EXPIRED: {},
    State.ABORTED: {},
    State.SUPERSEDED: {},
}

STEP_OF: dict[State, str] = {
    State.QUIESCING: "quiesce",
    State.AUTHORIZING: "authorize",
    State.FENCING: "fence",
    State.CATCHING_UP: "catch-up",
    State.HOLDING: "catch-up",
    State.VERIFYING: "verify",
    State.RESUMING: "resume",
    State.ROUTING: "route",
    State.CONFIRMING: "confirm",
    State.REPORTING: "report",
}
"""The step of DESIGN section 6 that a state is working on. ``check`` runs when the plan is made and again at its start."""

ENDED = frozenset({State.DONE, State.REFUSED, State.VOID, State.EXPIRED, State.ABORTED, State.SUPERSEDED})
BEFORE_AUTHORIZE = frozenset({State.AWAITING_APPROVAL, State.QUIESCING, State.AUTHORIZING})
AFTER_AUTHORIZE = frozenset(State) - BEFORE_AUTHORIZE - ENDED


class IllegalTransition(Exception):
    """An event that the table does not know in this state: a bug in the shell, never an operator's mistake."""


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """A plan and where it stands; what lies under ``plans/{id}``."""

    plan: Plan
    digest: str
    state: State
    updated_at: float
    reason: str = ""
    """One sentence: why it is in this state."""
    execute_requested_by: str = ""
    """Who asked for it to run, once approved; "" = nobody yet."""
    executor: str = ""
    """Instance that moved it last."""
    approvers: tuple[str, ...] = ()
    """Whose approvals were consumed by ``authorize``."""
    authorized_at: float = 0.0
    epoch: int = 0
    """Epoch under which the target opened, 0 before."""
    final_loss: Loss | None = None
    """Known at catch-up."""
    right_ended_by: float = 0.0
    """Wall time, on the old holder's clock, by which its right had certainly ended; taken when the authority moved."""

    @property
    def ended(self) -> bool:
        """Whether nothing will happen to it any more."""
        return self.state in ENDED


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one stream is with a plan that moved the authority; what lies under ``progress/{plan}/{stream}``.

    Written by the stream's holder, under its guard: once its stores are fenced, again when the loss turns out another one, and
    with ``open`` in the transaction that records the fork. From then on ``loss`` is final: whoever holds the stream next
    opens it without losing more, and it is what the plan reports.
    """

    plan: str
    stream: str
    epoch: int
    loss: Loss
    fenced: tuple[str, ...] = ()
    """Regions whose stores are fenced."""
    unfenced: tuple[str, ...] = ()
    open: bool = False
    first_seq: int = 0
    """First segment of the epoch that opened; 0 before."""


def move(record: PlanRecord, event: Event, *, at: float, reason: str = "") -> PlanRecord:
    """The record after ``event``. Raises IllegalTransition for a cell that is not in the table."""
    try:
        state = TRANSITIONS[record.state][event]
    except KeyError:
        raise IllegalTransition(f"plan {record.plan.id}: {event} in state {record.state}") from None
    return replace(record, state=state, updated_at=at, reason=reason)


def diagram() -> str:
    """The table as a Mermaid state diagram, for the runbook and the architecture page."""
    lines = ["stateDiagram-v2"]
    for state, row in TRANSITIONS.items():
        lines.extend(f"    {state.name} --> {target.name}: {event.value}" for event, target in row.items())
    return "\n".join(lines)


assert set(STEP_OF.values()) | {"check"} == set(STEPS)
