"""A short part of ``make faults``: real namespaces, real cuts, real kills, judged by the checkers of the simulation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.network import why_not

ROOT = Path(__file__).parents[2]
WHY_NOT = why_not()

pytestmark = [
    pytest.mark.lab,
    pytest.mark.slow,
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "possible"),
    pytest.mark.timeout(600),
]


def test_the_active_region_is_cut_off_moved_away_from_and_comes_back_and_nothing_is_violated() -> None:
    """In a process of its own, because it moves itself into other namespaces."""
    words = ("--only", "isolate-home-rules,http-lost-answer-home", "--seed", "7", "--output", "json")
    ran = subprocess.run(
        [sys.executable, "-m", "tests.faults", *words], cwd=ROOT, capture_output=True, text=True, timeout=580, check=False
    )
    assert ran.stdout, ran.stderr
    report = json.loads(ran.stdout)
    assert [row["violations"] for row in report["rows"]] == [[], []], ran.stderr
    assert report["rows"][0]["promotions"] == 1, ran.stderr
    assert report["rows"][1]["injected"] > 0
    assert report["mutants"] >= 20
    assert report["unnoticed"] == []
