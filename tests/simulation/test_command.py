"""``python -m tests.simulation``: a long run that is stopped says what it has played."""

from __future__ import annotations

import re
import signal
import threading
import time

import pytest

from tests.simulation.command import STOPPED, main


def test_a_run_that_is_stopped_says_what_it_played_and_with_which_seed_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def end_it() -> None:
        while signal.getsignal(signal.SIGTERM) is before:  # it is not listening yet
            time.sleep(0.05)
        signal.raise_signal(signal.SIGTERM)

    stop = threading.Thread(target=end_it)
    stop.start()
    assert main(["--failovers", "100000", "--first", "3", "--jobs", "1"]) == STOPPED
    stop.join()
    told = capsys.readouterr().out
    played = re.search(r"^(\d+) seeds, (\d+) promotions, (\d+) acknowledgements: 0 violations", told)
    assert played is not None, told
    assert f"it goes on with --first {3 + int(played[1])} --seeds {10000 - int(played[1])}" in told
    assert int(played[2]) >= 10 * int(played[1])
    assert signal.getsignal(signal.SIGTERM) is before
