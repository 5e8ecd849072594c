"""What retention has to keep: everything that an agent's newest state stands on, judged without looking into bodies."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.domain.model import Kind, Record
from controller.stream.limits import RESTORED, UPTO
from controller.stream.live import CLEARS, YES, in_force, is_ruled, live, whole


def record(name: str, kind: str = Kind.CHECKPOINT, parent: str | None = None, **meta: str) -> Record:
    return Record("agent", name, kind, "0" * 64, 0, parent, meta=meta)


def test_the_newest_of_each_kind_is_live_and_nothing_else() -> None:
    log = [record("1"), record("t", Kind.TASK), record("2"), record("n", "note"), record("3")]
    assert live(log) == {"t", "n", "3"}
    assert live([]) == frozenset()


def test_the_newest_of_each_subject_is_live() -> None:
    log = [record("a1", subject="a"), record("b1", subject="b"), record("a2", subject="a")]
    assert live(log) == {"a2", "b1"}


def test_the_greatest_rank_counts_and_not_who_came_last() -> None:
    log = [record("7", subject="", rank="7"), record("5", subject="", rank="5"), record("7~1", subject="", rank="7")]
    assert live(log[:2]) == {"7"}
    assert live(log) == {"7~1"}


def test_a_chain_of_changes_is_kept_down_to_the_full_value_and_what_belongs_to_it_too() -> None:
    log = [
        record("0"),
        record("w0", "writes", "0", attached="1"),
        record("1", parent="0"),
        record("w1", "writes", "1", attached="1"),
        record("w1b", "writes", "1", attached="1"),
        record("2", parent="1", needs="parent"),
        record("3", parent="2", needs="parent"),
        record("w3", "writes", "3", attached="1"),
    ]
    assert live(log) == {"1", "w1", "w1b", "2", "3", "w3"}
    assert live([*log, record("4", parent="3")]) == {"4"}


def test_a_parent_that_was_said_again_is_kept_under_both_names() -> None:
    log = [record("1"), record("1~1"), record("2", parent="1", needs="parent"), record("w", "writes", "2", attached="1")]
    assert live(log) == {"1", "1~1", "2", "w"}


def test_a_subgraphs_step_is_live_as_long_as_the_step_around_it() -> None:
    inside = record("s1", "checkpoint:sub", subject="sub:task", within="1")
    log = [
        record("1", subject=""),
        record("s0", "checkpoint:sub", subject="sub:task", within="1"),
        inside,
        record("w", "writes", "s1", attached="1"),
    ]
    assert live(log) == {"1", "s1", "w"}
    assert live([*log, record("2", parent="1", subject="")]) == {"2"}
    stateful = replace(inside, meta={"subject": "sub"})
    assert live([log[0], stateful, record("2", parent="1", subject="")]) == {"s1", "2"}


def test_what_stays_is_kept_until_the_log_begins_anew() -> None:
    log = [record("t", Kind.TASK), record("a", stays="1"), record("b", stays="1")]
    assert live(log) == {"t", "a", "b"}
    assert live([*log, record("c", clears="1"), record("d", stays="1")]) == {"t", "c", "d"}


@pytest.mark.parametrize("clear", [[], [record("c", clears="1")]])
def test_an_intent_of_unknown_outcome_is_never_forgotten(clear: list[Record]) -> None:
    log = [record("pay", Kind.INTENDED), record("mail", Kind.INTENDED), record("x", Kind.DONE, "mail"), *clear, record("1")]
    assert live(log) - {"c"} == {"pay", "x", "1"}


CHAIN = [
    record("1"),
    record("w1", "writes", "1", attached="1"),
    record("w1b", "writes", "1", attached="1"),
    record("2", parent="1", needs="parent", parent_writes="2"),
    record("w2", "writes", "2", attached="1"),
    record("3", parent="2", needs="parent", parent_writes="1"),
]


@pytest.mark.parametrize("missing", ["", "1", "w1", "w1b", "2", "w2"])
def test_a_state_is_whole_only_with_every_parent_and_all_that_was_attached_to_it(missing: str) -> None:
    log = [one for one in CHAIN if one.id != missing]
    for older in (log[:-1], log[-2::-1], sorted(log[:-1], key=lambda one: one.kind, reverse=True)):
        assert whole(log[-1], older) == (not missing), "writes may lie before what they are attached to"
    assert whole(CHAIN[0], [])


# ------------------------------------------------------------------------------------------------- states given back


def back(record_id: str, source: str, upto: str) -> Record:
    return Record("a", record_id, "checkpoint", "0" * 64, 1, parent=source, meta={RESTORED: source, UPTO: upto})


def plain_log(*ids: str) -> list[Record]:
    return [Record("a", one, "writes" if one.startswith("w") else "checkpoint", "0" * 64, 1) for one in ids]


def counted(records: list[Record]) -> list[str]:
    return [record.id for _, record in in_force(records)]


def test_what_came_after_the_point_that_was_given_back_does_not_count() -> None:
    log = [*plain_log("c1", "w1", "c2", "w2"), back("b1", "c1", "w1")]
    assert counted(log) == ["c1", "w1"]
    assert counted([*log, *plain_log("c3")]) == ["c1", "w1", "c3"]
    assert [place for place, _ in in_force([*log, *plain_log("c3")])] == [0, 1, 5]


def test_giving_back_can_be_given_back() -> None:
    log = [*plain_log("c1", "c2", "c3"), back("b1", "c1", "c1"), *plain_log("c4")]
    assert counted([*log, back("b2", "c3", "c3")]) == ["c1", "c2", "c3"]
    assert counted([*log, back("b2", "c4", "c4")]) == ["c1", "c4"]
    assert counted([*log, back("b2", "b1", "b1")]) == ["c1"]


def test_tasks_and_effects_count_wherever_they_stand() -> None:
    done = Record("a", "d1", "done", "0" * 64, 1, parent="i1")
    log = [*plain_log("c1", "c2"), Record("a", "i1", "intended", "0" * 64, 1), done, back("b1", "c1", "c1")]
    assert counted(log) == ["c1", "i1", "d1"]


def test_where_the_end_of_that_time_is_not_known_the_repetition_stands_for_the_past() -> None:
    assert counted([*plain_log("c5", "c6"), back("b1", "c1", "w1")]) == ["b1"]


def test_retention_keeps_what_a_given_back_state_stands_on_and_lets_go_of_what_was_stepped_over() -> None:
    log = [*plain_log("c1", "w1", "c2", "c3", "w3"), back("b1", "c1", "w1")]
    assert live(log) == {"c1", "w1", "b1"}
    assert is_ruled(log[-1].kind, log[-1].meta)
    held = [record for record in log if record.id in live(log) or record.id in ("c3", "w3")]  # c3 is not gone yet
    assert counted(held) == ["c1", "w1"]
    assert live([*log, *plain_log("c4")]) == {"c4", "w1", "b1", "c1"}
    cleared = Record("a", "x", "deleted", "0" * 64, 1, meta={CLEARS: YES})
    assert live([*log, cleared, *plain_log("c9")]) == {"c9", "x"}
