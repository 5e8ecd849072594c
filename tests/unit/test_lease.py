"""How long a holder may act: the arithmetic, every outcome of a heartbeat, and a model in which answers are late.

What must hold: the right ends, by the holder's own clock, before the lease can be somebody else's.
"""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.domain import lease
from controller.domain.lease import Beat, GuardedRead, Heartbeat, Right, Verdict
from controller.domain.model import Barrier

TTL, MARGIN = 10.0, 1.0
FAILOVER = Barrier("p1", "failover", "eu-central-1")
SWITCHOVER = Barrier("p2", "switchover", "eu-central-1")
FAILBACK = Barrier("p3", "failback", "eu-central-1")


def judge(
    *,
    before: GuardedRead | None = None,
    after: GuardedRead | None = None,
    sent_at: float = 100.0,
    ttl_seconds: float = TTL,
    renewed_in_term: int | None = None,
    granted: float = TTL,
    drained: bool = False,
) -> Verdict:
    fine = GuardedRead(True, 7, None)
    return lease.judge(
        Heartbeat(
            before or fine,
            sent_at,
            ttl_seconds,
            (before or fine).term if renewed_in_term is None else renewed_in_term,
            after or fine,
        ),
        granted_ttl_seconds=granted,
        margin_seconds=MARGIN,
        drained=drained,
    )


# ------------------------------------------------------------------------------------------------------------ arithmetic


def test_a_right_begins_when_the_lease_was_asked_for_and_not_when_it_was_granted() -> None:
    assert lease.first_deadline(100.0, TTL, MARGIN) == 109.0


def test_a_complete_heartbeat_extends_the_right_from_when_its_keep_alive_was_sent() -> None:
    assert judge(sent_at=200.0) == Verdict(Beat.EXTENDS, "heartbeat complete", 209.0)


@pytest.mark.parametrize("slow", [0.0, 0.0005, 0.009])
def test_a_successor_waits_longer_than_a_right_lasts_on_a_clock_that_is_slow(slow: float) -> None:
    assert lease.outlives_seconds(TTL - MARGIN, TTL) >= (TTL - MARGIN) / (1 - slow)


def test_a_successor_waits_for_nothing_after_an_orderly_end_and_for_a_whole_lease_when_nothing_is_known() -> None:
    assert lease.outlives_seconds(0.0, TTL) == 0.0
    assert lease.outlives_seconds(-1.0, TTL) >= TTL


@pytest.mark.parametrize(("renewed", "deadline"), [(10, 109.0), (6, 105.0), (30, 109.0), (1, 100.0)])
def test_the_smaller_of_granted_and_renewed_ttl_counts(renewed: float, deadline: float) -> None:
    assert judge(ttl_seconds=renewed).deadline == deadline


@pytest.mark.parametrize("gone", [0, -1])
def test_a_lease_that_is_gone_ends_the_right(gone: float) -> None:
    assert judge(ttl_seconds=gone) == Verdict(Beat.LOST, "the lease is gone")


@pytest.mark.parametrize("term", [6, 8])
def test_a_keep_alive_that_was_answered_under_another_term_proves_nothing(term: int) -> None:
    verdict = judge(renewed_in_term=term)
    assert verdict.beat is Beat.PROVES_NOTHING
    assert str(term) in verdict.reason


# ------------------------------------------------------------------------------------------------------- every heartbeat

READS = [
    GuardedRead(ours, term, barrier) for ours in (True, False) for term in (7, 8) for barrier in (None, FAILOVER, SWITCHOVER)
]


@pytest.mark.parametrize("ttl_seconds", [0.0, TTL])
@pytest.mark.parametrize("drained", [False, True])
def test_every_combination_of_what_a_heartbeat_can_see(ttl_seconds: float, drained: bool) -> None:
    for before, after in product(READS, READS):
        verdict = judge(before=before, after=after, ttl_seconds=ttl_seconds, drained=drained)
        barriers = {read.barrier for read in (before, after)} - {None}
        if not (before.ours and after.ours) or ttl_seconds == 0:
            assert verdict.beat is Beat.LOST  # a clear no, whatever else was seen
        else:
            stopped = after.barrier == FAILOVER or barriers == {FAILOVER} or (bool(barriers) and drained)
            proves = before.term == after.term and not stopped
            assert verdict.beat is (Beat.EXTENDS if proves else Beat.PROVES_NOTHING)
        assert (verdict.deadline is not None) is (verdict.beat is Beat.EXTENDS)
        assert verdict.reason


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize(
    ("barrier", "drained", "beat"),
    [
        (FAILOVER, False, Beat.PROVES_NOTHING),
        (FAILOVER, True, Beat.PROVES_NOTHING),
        (SWITCHOVER, False, Beat.EXTENDS),  # it needs its right to drain
        (SWITCHOVER, True, Beat.PROVES_NOTHING),
        (FAILBACK, False, Beat.EXTENDS),
        (FAILBACK, True, Beat.PROVES_NOTHING),
    ],
)
def test_a_barrier_stops_the_extension_at_once_or_once_drained(where: str, barrier: Barrier, drained: bool, beat: Beat) -> None:
    seen = GuardedRead(True, 7, barrier)
    verdict = judge(before=seen, drained=drained) if where == "before" else judge(after=seen, drained=drained)
    assert verdict.beat is beat
    if beat is Beat.PROVES_NOTHING:
        assert barrier.plan in verdict.reason


def test_a_drained_holder_without_a_barrier_keeps_its_right() -> None:
    """The plan was aborted: its barrier is gone before the holder knows that it need not be drained any more."""
    assert judge(drained=True).beat is Beat.EXTENDS


# ------------------------------------------------------------------------------------------------------------- the right


def test_a_right_ends_exactly_at_its_deadline() -> None:
    right = Right(3, 50.0)
    assert right.allows(49.999)
    assert not right.allows(50.0)
    assert right.remaining_seconds(48.0) == 2.0
    assert right.remaining_seconds(51.0) == 0.0


VERDICTS = st.one_of(
    st.builds(Verdict, st.just(Beat.EXTENDS), st.just("x"), st.floats(0, 1000)),
    st.just(Verdict(Beat.PROVES_NOTHING, "nothing")),
    st.just(Verdict(Beat.LOST, "gone")),
)


@given(st.floats(0, 1000), st.lists(VERDICTS, max_size=12), st.floats(0, 1000))
def test_a_right_never_moves_back_never_grows_by_itself_and_once_lost_stays_lost(
    first: float, verdicts: list[Verdict], now: float
) -> None:
    right = Right(1, first)
    proven = [first]
    lost = False
    for verdict in verdicts:
        following = right.after(verdict)
        lost = lost or verdict.beat is Beat.LOST
        if verdict.beat is Beat.EXTENDS and not lost:
            assert verdict.deadline is not None
            proven.append(verdict.deadline)
        assert following.deadline >= right.deadline
        assert following.deadline == max(proven)
        assert bool(following.lost) is lost
        assert following.allows(now) is (not lost and now < max(proven))
        assert following.epoch == 1
        right = following
    assert right.remaining_seconds(now) == (0.0 if lost else max(0.0, max(proven) - now))


# ------------------------------------------------------------------------------------------- against a server with delays


def overlap_seconds(delays: list[tuple[float, float, float]], *, from_the_answer: bool) -> float:
    """Longest time for which a holder believed in its right after its lease had ended on the server; negative is good.

    ``delays``: pause before each heartbeat, its way there and its way back. The lease ends on the server one TTL after the
    keep-alive *arrived*, and the holder cannot know when that was.
    """
    now, worst = 100.0, float("-inf")
    right = Right(1, lease.first_deadline(now, TTL, MARGIN))
    ends_on_server = now + TTL
    for pause, there, back in delays:
        sent_at = now + pause
        arrived_at, answered_at = sent_at + there, sent_at + there + back
        worst = max(worst, right.deadline - ends_on_server)
        if arrived_at >= ends_on_server:
            break  # the lease is gone: the answer is a clear no
        ends_on_server = arrived_at + TTL
        right = right.after(judge(sent_at=answered_at if from_the_answer else sent_at))
        now = answered_at
    return max(worst, right.deadline - ends_on_server)


DELAYS = st.lists(st.tuples(st.floats(0, 5), st.floats(0, 4), st.floats(0, 4)), min_size=1, max_size=10)


@given(DELAYS)
def test_the_right_ends_a_margin_before_the_lease_however_late_answers_are(delays: list[tuple[float, float, float]]) -> None:
    assert overlap_seconds(delays, from_the_answer=False) <= -MARGIN + 1e-6


def test_the_model_catches_a_deadline_that_is_counted_from_the_answer() -> None:
    late = [(1.0, 0.1, 0.1), (1.0, 0.1, 3.0)]
    assert overlap_seconds(late, from_the_answer=False) < 0
    assert overlap_seconds(late, from_the_answer=True) > 1.5
