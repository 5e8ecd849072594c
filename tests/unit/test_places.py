"""The suite's scheduler: a run goes on to its end when a worker dies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = """
import os
import pytest

@pytest.mark.parametrize("n", range(60))
def test_one(n: int) -> None:
    if n == 30 and not os.path.exists("died"):
        open("died", "w").close()
        os._exit(1)
"""


def test_a_run_in_which_a_worker_dies_ends_with_every_test_played(tmp_path: Path) -> None:
    (tmp_path / "tests" / "unit").mkdir(parents=True)
    (tmp_path / "tests" / "unit" / "test_many.py").write_text(TESTS)
    (tmp_path / "tests" / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    argv = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--max-worker-restart", "2", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert "1 failed, 60 passed" in done.stdout, done.stdout + done.stderr
