"""A process that slept through a failover is fenced where somebody else went on; a live one goes on in every region."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.base import empty_checkpoint

from controller.agent import Checkpoints, Fenced
from controller.agent.langgraph import ReplicatedSaver
from tests.support.served import ServedController


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedController]:
    with ServedController(tmp_path) as running:
        yield running


class Process:
    """One life of a program with a saver."""

    def __init__(self, served: ServedController, **options: Any) -> None:
        self.client = Checkpoints(served.urls, timeout_seconds=30.0)
        self.saver = ReplicatedSaver(self.client, copies=2, **options)
        self._at: dict[str, Any] = {}

    def open(self, thread: str) -> str | None:
        """As a run begins. Returns the checkpoint that it begins from."""
        found = self.saver.get_tuple({"configurable": {"thread_id": thread, "checkpoint_ns": ""}})
        start: Any = {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}
        self._at[thread] = start if found is None else found.config
        return None if found is None else found.config["configurable"]["checkpoint_id"]

    def step(self, thread: str) -> str:
        self._at[thread] = self.saver.put(self._at[thread], empty_checkpoint(), {"step": 1}, {})
        found: str = self._at[thread]["configurable"]["checkpoint_id"]
        return found

    def write(self, thread: str, task: str) -> None:
        self.saver.put_writes(self._at[thread], [("channel", task)], task)

    def close(self) -> None:
        self.client.close()


@pytest.mark.timeout(300)
def test_a_run_that_slept_through_a_failover_is_fenced_until_it_opens_its_thread_again(served: ServedController) -> None:
    sleeper, careless, successor = Process(served), Process(served, fence_sleepers=False), Process(served)
    for process, threads in ((sleeper, ("a", "untouched")), (careless, ("b",))):
        for thread in threads:
            process.open(thread)
            process.step(thread)
    served.fail_over()
    newest = {}
    for thread in ("a", "b"):
        assert successor.open(thread) is not None
        successor.step(thread)
        newest[thread] = successor.step(thread)
    for act in (lambda: sleeper.step("a"), lambda: sleeper.write("a", "task"), lambda: sleeper.step("a")):
        with pytest.raises(Fenced, match="went on without this process"):
            act()
    assert Process(served).open("a") == newest["a"], "nothing of the sleeper is in the thread"
    sleeper.step("untouched")  # nobody else went on with this one
    assert sleeper.open("a") == newest["a"]
    sleeper.step("a")
    sleeper.write("a", "task")
    assert careless.step("b") != newest["b"]
    for process in (sleeper, careless, successor):
        process.close()


@pytest.mark.timeout(300)
def test_a_live_process_goes_on_through_failovers_with_what_it_has_in_flight(served: ServedController) -> None:
    alone = Process(served)
    alone.open("thread")
    alone.step("thread")
    served.lose_region("eu-west-1")
    done: list[str] = []

    def go_on() -> None:
        alone.step("thread")  # nobody answers for a while: it is tried again until the target serves
        for task in ("one", "two", "three"):
            alone.write("thread", task)
        done.append(alone.step("thread"))

    working = threading.Thread(target=go_on)
    working.start()
    served.fail_over(lost="eu-west-1")
    working.join(60)
    assert done, "it was fenced, or nobody took it"
    assert Process(served).open("thread") == done[-1]
    alone.open("thread")
    newest = alone.step("thread")
    assert Process(served).open("thread") == newest
    alone.close()
