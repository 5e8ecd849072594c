"""Random faults from seeds: whatever happens, every promise holds, and once the faults are over the group serves again.

``make simulate SEEDS=2000`` runs more of them on every core; ``SEED=17`` runs exactly this one here.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.simulation import marathon
from tests.simulation.runs import run

SEEDS = int(os.environ.get("SEEDS", "12"))
GROUPS = 4
"""Into how many tests the seeds are divided."""


@pytest.mark.parametrize("group", range(GROUPS))
def test_whatever_happens_every_promise_holds_and_the_group_comes_back(group: int, keys_dir: Path) -> None:
    seeds = [int(os.environ["SEED"])] if "SEED" in os.environ else range(group, SEEDS, GROUPS)
    outcomes = [run(keys_dir, seed) for seed in seeds]
    for outcome in outcomes:
        assert not outcome.violation, f"make simulate SEED={outcome.seed}\n{outcome.violation}"
    assert sum(outcome.promotions for outcome in outcomes) > 0 or len(outcomes) < 5, "the faults left nothing to look at"


def test_a_loss_is_not_taken_for_smaller_because_an_old_report_is_taken_for_a_wrong_clock(keys_dir: Path) -> None:
    """A holder dies before its first report, with work that it alone had. Who estimates the loss started after the report
    before that was written, and had counted its age as a difference of clocks."""
    outcome = marathon.run(keys_dir, 40, moves=4)
    assert not outcome.violation, outcome.violation
    assert outcome.promotions >= 4


@pytest.mark.parametrize("seed", range(int(os.environ.get("MARATHONS", "6"))))
def test_a_group_moves_ten_times_whatever_strikes_each_move(seed: int, keys_dir: Path) -> None:
    outcome = marathon.run(keys_dir, seed)
    assert not outcome.violation, f"make simulate MARATHON=1 SEED={outcome.seed}\n{outcome.violation}"
    assert outcome.promotions >= marathon.MOVES
