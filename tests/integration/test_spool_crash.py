"""A process that replays its spool is killed in the middle, again and again; what arrives is in order and there once."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.agent import Checkpoints, Spool
from controller.agent.spool import Letter
from tests.support.served import ServedController

ROOT = Path(__file__).parents[2]
RECORDS = 60
REPLAY = """
import os, signal, sys, time
from controller.agent import Checkpoints, Spool

class Doomed(Spool):
    calls = 0

    def settle(self, *answers):
        self.calls += 1
        if self.calls == 3:  # five records are acknowledged, and still in the spool
            os.kill(os.getpid(), signal.SIGKILL)
        super().settle(*answers)

spool = Doomed(sys.argv[1])
with Checkpoints(sys.argv[2].split(","), spool=spool, batch_records=5):
    while spool.agents():
        time.sleep(0.01)
"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedController]:
    with ServedController(tmp_path) as running:
        yield running


def test_a_replay_that_is_killed_again_and_again_stores_every_record_once_and_in_order(
    served: ServedController, tmp_path: Path
) -> None:
    path = tmp_path / "spool.db"
    spool = Spool(path)
    wanted = [f"{number:04d}" for number in range(RECORDS)]
    for record_id in wanted:
        spool.add(Letter("agent", record_id, "checkpoint", f"state {record_id}".encode() * 50))
    spool.close()
    kills = 0
    while (code := subprocess.run([sys.executable, "-c", REPLAY, str(path), ",".join(served.urls)], cwd=ROOT).returncode) != 0:  # noqa: PLW1510
        assert code == -signal.SIGKILL
        kills += 1
    assert kills == 5, "each life settles two batches of twelve"
    with Checkpoints(served.urls) as client:
        assert [record.id for record in reversed(client.list("agent", limit=1000))] == wanted
    left = Spool(path)
    assert (left.agents(), left.rejected(), left.bytes) == ((), (), 0)
    left.close()
