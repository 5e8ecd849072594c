"""How far a follower certainly has the holder's history, judged from where it says that it stands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.domain import replication
from controller.domain.model import EpochStart, Position
from controller.runtime.reporter import ReportPolicy, common_seq

STARTS = (EpochStart(1, 1), EpochStart(2, 26), EpochStart(5, 40))


@pytest.mark.parametrize(
    ("epoch", "seq", "common"),
    [
        (0, 0, 0),
        (1, 1, 1),
        (1, 25, 25),
        (1, 26, 25),
        (1, 139, 25),
        (2, 39, 39),
        (2, 90, 39),
        (5, 40, 40),
        (5, 50, 50),
        (5, 51, None),
        (3, 30, None),
        (5, 30, None),
        (7, 50, None),
        (0, 12, None),
    ],
)
def test_only_what_is_certainly_our_history_counts_as_verified(epoch: int, seq: int, common: int | None) -> None:
    assert common_seq(STARTS, 50, Position(seq, "", epoch, 0.0)) == common


@given(st.data())
def test_what_counts_as_verified_is_never_more_than_what_the_copy_shares(data: st.DataObject) -> None:
    """Two histories that part at one seq and go on in epochs of their own, as a fork makes them."""
    shared = data.draw(st.integers(0, 6), label="segments in common")
    firsts = sorted(data.draw(st.sets(st.integers(1, max(1, shared)), max_size=3), label="starts in common")) if shared else []
    common = tuple(EpochStart(number, first) for number, first in enumerate(sorted({1, *firsts}), start=1)) if shared else ()
    theirs = common if data.draw(st.booleans(), label="their epoch goes on") else (*common, EpochStart(10, shared + 1))
    ours = (*common, EpochStart(20, shared + 1))
    last = shared + data.draw(st.integers(1, 4), label="ours beyond")
    seq = data.draw(st.integers(0, shared + 4), label="their position")
    position = Position(seq, "", replication.owner(theirs, seq), 0.0)
    found = common_seq(ours, last, position)
    assert found is None or found <= min(seq, shared)
    if seq <= shared:
        assert found == seq


def test_a_follower_has_several_of_its_rounds_to_read() -> None:
    policy = ReportPolicy(5.0, 10.0, 1.0, 5.0, 5.0, 0.2)
    assert policy.verified_seconds == 5.0
    assert ReportPolicy(5.0, 10.0, 1.0, 5.0, 5.0, 2.0).verified_seconds == 20.0
