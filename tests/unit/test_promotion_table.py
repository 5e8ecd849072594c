"""A plan's life: every cell of the table, and what no path through it can do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import pytest

from controller.domain.plan import STEPS
from controller.domain.promotion import (
    AFTER_AUTHORIZE,
    BEFORE_AUTHORIZE,
    ENDED,
    STEP_OF,
    TRANSITIONS,
    Event,
    IllegalTransition,
    PlanRecord,
    State,
    diagram,
    move,
)
from tests.unit.test_plan import a_plan

RECORD = PlanRecord(a_plan(), "d", State.AWAITING_APPROVAL, 1.0, "waiting", approvers=("ada",), epoch=7)


def reachable(first: Iterable[State], without: Event | None = None) -> set[State]:
    """Every state that some sequence of events leads to."""
    found, fresh = set(first), list(first)
    while fresh:
        for event, target in TRANSITIONS[fresh.pop()].items():
            if event is not without and target not in found:
                found.add(target)
                fresh.append(target)
    return found


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)))
def test_every_cell_either_moves_the_plan_or_is_a_bug(state: State, event: Event) -> None:
    record = replace(RECORD, state=state)
    if event in TRANSITIONS[state]:
        moved = move(record, event, at=9.0, reason="because")
        assert moved == replace(record, state=TRANSITIONS[state][event], updated_at=9.0, reason="because")
    else:
        with pytest.raises(IllegalTransition, match=f"{event} in state {state}"):
            move(record, event, at=9.0)


def test_the_table_has_a_row_for_every_state() -> None:
    assert set(TRANSITIONS) == set(State)


def test_every_state_is_reached_and_every_event_happens_somewhere() -> None:
    assert reachable([State.AWAITING_APPROVAL]) == set(State)
    assert {event for row in TRANSITIONS.values() for event in row} == set(Event)


@pytest.mark.parametrize("state", State)
def test_every_state_can_reach_an_end(state: State) -> None:
    assert reachable([state]) & ENDED


def test_what_has_ended_stays_so_and_nothing_else_is_a_dead_end() -> None:
    assert {state for state in State if not TRANSITIONS[state]} == ENDED
    assert {state for state in State if replace(RECORD, state=state).ended} == ENDED


def test_nothing_leads_past_authorize_but_the_authorising_transaction() -> None:
    assert reachable(BEFORE_AUTHORIZE, without=Event.AUTHORIZED) == BEFORE_AUTHORIZE | (ENDED - {State.DONE, State.SUPERSEDED})
    crossing = {
        (state, event)
        for state in BEFORE_AUTHORIZE
        for event, target in TRANSITIONS[state].items()
        if target in AFTER_AUTHORIZE
    }
    assert crossing == {(State.AUTHORIZING, Event.AUTHORIZED)}


def test_after_authorize_the_way_is_forward_to_done_or_another_plan_took_over() -> None:
    assert reachable(AFTER_AUTHORIZE) == AFTER_AUTHORIZE | {State.DONE, State.SUPERSEDED}
    for state in AFTER_AUTHORIZE:
        assert not {Event.ABORTED, Event.REFUSED, Event.DRIFTED, Event.EXPIRED} & set(TRANSITIONS[state])
        assert TRANSITIONS[state][Event.SUPERSEDED] is State.SUPERSEDED
    assert State.DONE in reachable([State.FENCING], without=Event.SUPERSEDED)


def test_people_can_end_a_plan_in_every_state_before_authorize() -> None:
    for state in BEFORE_AUTHORIZE:
        ends = {event: target for event, target in TRANSITIONS[state].items() if target in ENDED}
        assert ends == {
            Event.REFUSED: State.REFUSED,
            Event.DRIFTED: State.VOID,
            Event.EXPIRED: State.EXPIRED,
            Event.ABORTED: State.ABORTED,
        }


def test_before_after_and_ended_are_all_states_and_do_not_overlap() -> None:
    assert set(State) == BEFORE_AUTHORIZE | AFTER_AUTHORIZE | ENDED
    assert len(BEFORE_AUTHORIZE) + len(AFTER_AUTHORIZE) + len(ENDED) == len(State)


def test_a_promotion_that_meets_no_trouble_takes_the_steps_of_the_plan_in_their_order() -> None:
    happy = [
        Event.STARTED, Event.QUIESCED, Event.AUTHORIZED, Event.FENCED, Event.CAUGHT_UP, Event.VERIFIED, Event.RESUMED,
        Event.ROUTED, Event.CONFIRMED, Event.REPORTED,
    ]  # fmt: skip
    record, steps = RECORD, ["check"]
    for number, event in enumerate(happy):
        record = move(record, event, at=float(number))
        if record.state in STEP_OF:
            steps.append(STEP_OF[record.state])
    assert record.state is State.DONE
    assert tuple(steps) == STEPS


def test_agents_resume_only_after_the_fence_and_traffic_moves_only_after_agents_can_resume() -> None:
    """Fence first, route last: with any of these events taken away the later states are out of reach."""
    order = [
        (Event.AUTHORIZED, State.FENCING),
        (Event.FENCED, State.CATCHING_UP),
        (Event.CAUGHT_UP, State.VERIFYING),
        (Event.VERIFIED, State.RESUMING),
        (Event.RESUMED, State.ROUTING),
        (Event.ROUTED, State.CONFIRMING),
    ]
    for event, state in order:
        assert state not in reachable([State.AWAITING_APPROVAL], without=event)


def test_a_hold_ends_with_the_store_back_or_with_the_loss_approved() -> None:
    leaves = {event for event, target in TRANSITIONS[State.HOLDING].items() if target is not State.HOLDING}
    assert leaves == {Event.LOSS_APPROVED, Event.CAUGHT_UP, Event.SUPERSEDED}
    assert State.VERIFYING in reachable([State.HOLDING], without=Event.LOSS_APPROVED)
    assert State.VERIFYING in reachable([State.CATCHING_UP])


def test_the_diagram_shows_every_cell_once() -> None:
    lines = diagram().splitlines()
    assert lines[0] == "stateDiagram-v2"
    expected = {
        f"    {state.name} --> {target.name}: {event.value}"
        for state, row in TRANSITIONS.items()
        for event, target in row.items()
    }
    assert len(lines) - 1 == len(expected)
    assert set(lines[1:]) == expected


def test_moving_a_plan_forgets_nothing_of_it() -> None:
    moved = move(RECORD, Event.STARTED, at=2.0)
    assert (moved.plan, moved.digest, moved.approvers, moved.epoch) == (RECORD.plan, "d", ("ada",), 7)
    assert moved.reason == ""
