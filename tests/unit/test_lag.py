"""What would be lost and how well that is known: every rule by itself, and both promises against a model that knows the truth.

The model writes records at random times into stores that lag at random; it knows which records were acknowledged and where
they are, so it can say what a disaster really takes. What people are shown must never be less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.domain import lag
from controller.domain.lag import Backlog, LossBasis
from controller.domain.model import AgentTail, EpochStart, Forks, Head, RegionLag, StreamReport, Unknown
from controller.domain.plan import AgentLoss, Loss
from controller.runtime.evidence import expected_loss

NOW = 1_000.0
NEVER = Unknown(0.0, "never")


def backlog(region: str, seq: int, records: int = 0, oldest: float | None = None) -> Backlog:
    return Backlog(region, seq, records, records, records * 100, oldest)


def a_lag(seconds: float | Unknown = 0.5, verified: int | Unknown = 10) -> RegionLag:
    return RegionLag("b", 10, 0, 0, 0, seconds, verified)


def a_report(**changes: object) -> StreamReport:
    base = StreamReport("0", "a", "a1", 3, 990.0, 12, 12, 40, (a_lag(),), 0.5, 2)
    return replace(base, **changes)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- one region


def test_lag_counts_from_the_receipt_of_the_oldest_record_that_is_missing() -> None:
    found = lag.region_lag(Backlog("b", 7, 3, 12, 900, 996.5), 6, NOW)
    assert found == RegionLag("b", 7, 3, 12, 900, 3.5, 6)


def test_a_region_that_misses_nothing_has_no_lag_and_a_stamp_of_the_future_makes_none_negative() -> None:
    assert lag.region_lag(backlog("b", 7), 7, NOW).seconds == 0.0
    assert lag.region_lag(backlog("b", 7, 1, NOW + 5), 7, NOW).seconds == 0.0


def test_what_nobody_verified_is_unknown_since_when_nobody_looked() -> None:
    assert lag.verified_by_region({"b": 9}, "b", 5.0) == 9
    missing = lag.verified_by_region({"b": 9}, "c", 5.0)
    assert isinstance(missing, Unknown)
    assert (missing.since, "no live controller in c" in missing.why) == (5.0, True)
    assert lag.region_lag(backlog("c", 7), missing, NOW).verified_seq is missing


def test_unknown_is_neither_true_nor_false() -> None:
    with pytest.raises(TypeError, match="neither true nor false"):
        bool(NEVER)


# ----------------------------------------------------------------------------------------------------------- knowledge


@pytest.mark.parametrize(("now", "known"), [(980.0, True), (990.0, True), (993.0, True), (993.01, False), (5_000.0, False)])
def test_a_report_is_knowledge_only_while_it_is_fresh(now: float, known: bool) -> None:
    found = lag.aged(a_report(), now, fresh_seconds=3.0)
    if known:
        assert found == a_report()
    else:
        assert isinstance(found, Unknown)
        assert (found.since, "a/a1" in found.why) == (990.0, True)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (1.0, 2.0, 2.0),
        (3.0, 2.0, 3.0),
        (9e9, Unknown(50.0), Unknown(50.0)),
        (Unknown(50.0), 9e9, Unknown(50.0)),
        (Unknown(50.0), Unknown(20.0), Unknown(20.0)),
        (Unknown(20.0), Unknown(50.0), Unknown(20.0)),
        (0.0, 0.0, 0.0),
    ],
)
def test_unknown_is_worse_than_any_number_and_the_longer_unknown_is_the_worst(
    a: float | Unknown, b: float | Unknown, expected: float | Unknown
) -> None:
    assert lag.worst(a, b) == expected


@pytest.mark.parametrize(
    ("seconds", "verified", "within_since", "expected"),
    [
        (0.5, 10, 980.0, True),
        (0.5, 10, 990.0, True),  # exactly the settling time
        (0.5, 10, 990.1, False),
        (5.0, 10, 900.0, True),  # exactly the RPO
        (5.1, 10, 900.0, False),
        (0.5, 10, None, False),
        (Unknown(70.0), 10, 900.0, Unknown(70.0)),
        (0.5, Unknown(60.0), 900.0, Unknown(60.0)),
        (Unknown(70.0), Unknown(60.0), None, Unknown(70.0)),
    ],
)
def test_a_region_is_protected_when_lag_and_verification_have_settled(
    seconds: float | Unknown, verified: int | Unknown, within_since: float | None, expected: bool | Unknown
) -> None:
    found = lag.protected(a_lag(seconds, verified), rpo_seconds=5.0, within_since=within_since, now=NOW, settle_seconds=10.0)
    assert found == expected


# ------------------------------------------------------------------------------------------------------------- exposure


def test_exposure_is_what_only_the_best_store_has() -> None:
    stores = [backlog("a", 12), backlog("b", 9, 30, 997.0), backlog("c", 11, 4, 999.0)]
    assert lag.exposure(stores, NOW) == (1.0, 4)
    assert lag.exposure([*stores, backlog("d", 12)], NOW) == (0.0, 0)


@pytest.mark.parametrize("stores", [[], [backlog("a", 3)]])
def test_exposure_is_unknown_when_nothing_is_known_to_survive(stores: list[Backlog]) -> None:
    seconds, records = lag.exposure(stores, NOW)
    assert isinstance(seconds, Unknown)
    assert isinstance(records, Unknown)


@dataclass(frozen=True)
class History:
    """Receipt times of the records of each segment, and how many segments each store has; the first is the home store."""

    segments: tuple[tuple[float, ...], ...]
    positions: tuple[int, ...]

    @property
    def acknowledged(self) -> int:
        """Segments that the home store has: what was acknowledged by it alone."""
        return self.positions[0]

    def beyond(self, seq: int) -> list[float]:
        """Receipt times of the acknowledged records that a store with ``seq`` segments lacks."""
        return [at for segment in self.segments[seq : self.acknowledged] for at in segment]

    def count(self, seq: int) -> int:
        return sum(len(segment) for segment in self.segments[:seq])

    def head(self, seq: int) -> Head:
        received = [at for segment in self.segments[:seq] for at in segment]
        return Head(
            "0",
            seq=seq,
            epochs=(EpochStart(1, 1),) if seq else (),
            received_at=max(received, default=0.0),
            records=len(received),
        )

    def report(self, seq: int, at: float) -> StreamReport:
        return a_report(at=at, seq=seq, acknowledged_seq=seq, acknowledged_records=self.count(seq))


@st.composite
def histories(draw: st.DrawFn) -> History:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=12))
    gaps = draw(st.lists(st.floats(0, 20), min_size=sum(sizes), max_size=sum(sizes)))
    at, segments = 100.0, []
    remaining = iter(gaps)
    for size in sizes:
        stamps = []
        for _ in range(size):
            at += next(remaining)
            stamps.append(at)
        segments.append(tuple(stamps))
    stores = draw(st.integers(2, 5))
    positions = draw(st.lists(st.integers(0, len(segments)), min_size=stores, max_size=stores))
    return History(tuple(segments), tuple(positions))


@given(histories())
def test_exposure_is_what_the_loss_of_the_worst_region_really_takes(history: History) -> None:
    now = 600.0
    backlogs = []
    for number, seq in enumerate(history.positions):
        missing = history.beyond(seq)
        behind = max(0, history.acknowledged - seq)
        backlogs.append(Backlog(str(number), seq, behind, len(missing), 0, min(missing, default=None)))
    worst_seconds, worst_records = 0.0, 0
    for lost in range(len(history.positions)):
        best = max(seq for number, seq in enumerate(history.positions) if number != lost)
        missing = history.beyond(best)
        worst_records = max(worst_records, len(missing))
        worst_seconds = max(worst_seconds, now - min(missing, default=now))
    seconds, records = lag.exposure(backlogs, now)
    assert not isinstance(seconds, Unknown)
    assert seconds == pytest.approx(worst_seconds)
    assert records == worst_records


# ----------------------------------------------------------------------------------------------------------------- loss


@given(histories(), st.data())
def test_the_promised_loss_is_never_below_the_real_one(history: History, data: st.DataObject) -> None:
    """The home store dies. Some others are read; the last report is of some moment before; the right ended some time after
    the last acknowledgement."""
    end = max(history.segments[-1]) + data.draw(st.floats(0, 10), label="right ended after")
    home_read = data.draw(st.booleans(), label="the home store was read")
    others = data.draw(st.sets(st.integers(1, len(history.positions) - 1), min_size=1), label="others that were read")
    recovered = max(history.positions[number] for number in ({0, *others} if home_read else others))
    reported = data.draw(st.integers(0, history.acknowledged), label="last report")
    report = history.report(reported, at=end) if data.draw(st.booleans(), label="there is a report") else None
    loss = lag.estimate(LossBasis(report, history.head(recovered), () if home_read else ("0",), end))
    lost = history.beyond(recovered)
    if loss.exact:
        assert lost == []
        assert (loss.records, loss.records_unknown, loss.seconds) == (0, False, 0.0)
    else:
        assert loss.records_unknown
        last_recovered = history.head(recovered).received_at
        assert loss.seconds >= max(lost, default=last_recovered) - last_recovered
        assert loss.records <= len(lost)  # what the report proves lost really is; beyond it is *unknown*, never zero


@pytest.mark.parametrize("third", [Unknown(999.0, "dead"), Head("0", seq=10, epochs=(EpochStart(1, 1),), records=100)])
def test_records_of_a_diverged_tail_do_not_count_as_recovered(third: Head | Unknown) -> None:
    """Epoch 2 opened at 11 and lived in store a alone; b still has the tail of epoch 1, which is no history any more."""
    stale = Head("0", seq=20, epochs=(EpochStart(1, 1),), received_at=995.0, records=140)
    heads = {"b": stale} if isinstance(third, Unknown) else {"b": stale, "c": replace(third, received_at=950.0)}
    forks = Forks((EpochStart(1, 1), EpochStart(2, 11)), sole_ackers=("a",))
    report = a_report(epoch=2, seq=15, acknowledged_seq=15, acknowledged_records=150)
    loss = expected_loss(heads, forks, report, home="b", right_ended_by=999.0, kept=())
    if isinstance(third, Unknown):  # nobody can say what the first ten segments held: never less than it is
        assert loss.records >= 50
        assert loss.seconds >= 49.0
    else:
        assert (loss.records, loss.seconds) == (50, 49.0)


def test_a_report_that_is_younger_than_the_end_of_the_right_moves_it() -> None:
    head = Head("0", seq=10, epochs=(EpochStart(1, 1),), received_at=950.0, records=36)
    forks = Forks((EpochStart(1, 1),), sole_ackers=("a",))
    loss = expected_loss({"b": head}, forks, a_report(at=990.0), home="b", right_ended_by=970.0, kept=())
    assert (loss.records, loss.seconds) == (4, 40.0)
    assert expected_loss({}, forks, None, home="b", right_ended_by=970.0, kept=()).records_unknown


BASIS = LossBasis(
    report=a_report(
        acknowledged_records=40, unreplicated=(AgentTail("x", 3, "x9", 995.0), AgentTail("y", 1, "y4", 996.0))
    ),
    recovered=Head("0", seq=10, epochs=(EpochStart(1, 1),), received_at=991.0, records=36),
    unread_sole_ackers=("a",),
    right_ended_by=999.5,
)  # fmt: skip


def test_nothing_is_lost_when_every_store_that_may_have_acknowledged_alone_was_read() -> None:
    loss = lag.estimate(replace(BASIS, unread_sole_ackers=()))
    assert (loss.exact, loss.records, loss.records_unknown, loss.seconds, loss.worst) == (True, 0, False, 0.0, ())


def test_an_unread_store_makes_the_loss_a_bound_with_the_agents_that_are_known_to_lose() -> None:
    loss = lag.estimate(BASIS)
    assert (loss.exact, loss.records, loss.records_unknown, loss.seconds) == (False, 4, True, 8.5)
    assert loss.worst == (AgentLoss("x", 3, "x9"), AgentLoss("y", 1, "y4"))
    assert "store a was not read" in loss.basis


def test_agents_whose_newest_record_arrived_after_all_lose_nothing() -> None:
    assert lag.estimate(replace(BASIS, kept={"x"})).worst == (AgentLoss("y", 1, "y4"),)


def test_a_recovered_history_that_has_more_than_was_reported_still_may_lack_something() -> None:
    loss = lag.estimate(replace(BASIS, recovered=replace(BASIS.recovered, records=90)))
    assert (loss.records, loss.records_unknown, loss.seconds, loss.worst) == (0, True, 8.5, ())


def test_without_a_report_the_number_is_unknown_and_without_anything_the_bound_is_all_of_time() -> None:
    without = lag.estimate(replace(BASIS, report=None))
    assert (without.records, without.records_unknown, without.seconds) == (0, True, 8.5)
    nothing = lag.estimate(replace(BASIS, report=None, recovered=Head("0")))
    assert (nothing.records_unknown, nothing.seconds) == (True, 999.5)
    assert "no report exists" in nothing.basis


def test_a_right_that_ended_before_the_last_recovered_record_makes_no_negative_loss() -> None:
    assert lag.estimate(replace(BASIS, right_ended_by=900.0)).seconds == 0.0


# -------------------------------------------------------------------------------------------------------- several streams

EXACT = Loss(True, 0, False, 0.0, "read")
BOUND = Loss(False, 4, True, 8.5, "a was not read", (AgentLoss("x", 3, "x9"),))


def test_losses_of_streams_add_up_in_records_and_the_worst_counts_in_seconds() -> None:
    other = Loss(False, 2, False, 30.0, "c was not read", (AgentLoss("z", 9, "z1"),))
    found = lag.combine([EXACT, BOUND, other])
    assert (found.exact, found.records, found.records_unknown, found.seconds) == (False, 6, True, 30.0)
    assert [agent.agent for agent in found.worst] == ["z", "x"]
    assert found.basis == "a was not read"  # the first that is not exact


def test_a_group_is_exact_only_when_every_stream_is() -> None:
    assert lag.combine([EXACT, EXACT]) == EXACT
    assert not lag.combine([EXACT, BOUND]).exact
    with pytest.raises(ValueError, match="at least one stream"):
        lag.combine([])


def test_a_loss_that_is_not_a_number_is_not_hidden_among_others() -> None:
    broken = replace(BOUND, seconds=math.nan)
    assert broken.exceeds(BOUND, tolerance_seconds=1e9, tolerance_records=10**9)


def test_of_many_agents_the_worst_twenty_are_listed() -> None:
    many = replace(BOUND, worst=tuple(AgentLoss(f"agent-{n}", n, "r") for n in range(30)))
    assert [agent.records for agent in lag.combine([many]).worst] == list(range(29, 9, -1))
