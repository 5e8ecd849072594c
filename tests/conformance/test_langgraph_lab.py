"""LangGraph against a running lab: the public conformance suite, and graphs that are killed with their region.

Everything is real: etcd, the stores' stand-ins, controllers and graphs in processes of their own, people's ``drctl``. Where a
graph stands when its region dies is chosen by the test (``tests/support/voyage.py``); who stands where is parametrised, and all
of them die in one disaster, so that one failover serves every case.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langgraph.graph", reason="langgraph is not installed")
pytest.importorskip("langgraph.checkpoint.conformance", reason="langgraph-checkpoint-conformance is not installed")

from langgraph.checkpoint.conformance import checkpointer_test, validate

from controller.agent import AsyncCheckpoints, Checkpoints
from controller.agent.langgraph import ReplicatedSaver
from tests.conformance.test_langgraph import assert_complete
from tests.support.running_lab import ROOT, RunningLab
from tests.support.voyage import ANSWER, PLACES, STANDING, STOPPED, WAITING, Diary, build, config_of, undisturbed

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(300)]


async def test_the_saver_passes_every_check_of_the_public_conformance_suite_in_a_running_lab(lab: RunningLab) -> None:
    """Two copies of every record: each check is acknowledged by two regions' stores."""

    @checkpointer_test(name="ReplicatedSaver")
    async def saver() -> AsyncGenerator[Any, None]:
        async with AsyncCheckpoints(lab.urls(), timeout_seconds=30.0) as client:
            yield ReplicatedSaver(client, copies=2)

    assert_complete(await validate(saver))


# --------------------------------------------------------------------------------------------------------------- disasters


class Crew:
    """A process that runs threads of the graph and knows some controllers only."""

    def __init__(self, urls: list[str], voyages: dict[str, tuple[Diary, str]]) -> None:
        """``voyages``: by thread, its diary and the place to stand still at, "" for none."""
        words = [word for thread, (diary, at) in voyages.items() for word in ("--voyage", thread, str(diary.path), at)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.voyage", "--controllers", ",".join(urls), *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def end(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()


@dataclass
class Aftermath:
    """What every thread did before the disaster (by the place where it stood) and after it."""

    before: dict[str, Diary]
    after: dict[str, Diary]
    plan: dict[str, Any]


@pytest.fixture(scope="module")
def aftermath(lab: RunningLab, tmp_path_factory: pytest.TempPathFactory) -> Aftermath:
    """One thread stands at each place when the region that its process knows dies: SIGKILL to controllers and graphs, SIGSTOP
    to stores and etcd. A new process that knows the next region only takes the threads over. At last the region thaws."""
    folder = tmp_path_factory.mktemp("voyages")
    lost, target = "eu-west-1", "eu-central-1"
    lab.until(lambda: lab.active() == lost, f"{lost} to serve")
    before = {place: Diary(folder / f"{number}-before.jsonl") for number, place in enumerate(PLACES)}
    after = {place: Diary(folder / f"{number}-after.jsonl") for number, place in enumerate(PLACES)}
    crew = Crew(lab.urls(lost), {f"voyage/{place}": (diary, place) for place, diary in before.items()})
    try:
        lab.until(lambda: all(diary.find(STANDING) for diary in before.values()), "every graph to stand at its place")
        lab.call(lab.lab.kill, lost)
    finally:
        crew.end()
    plan = lab.fail_over(lost, target)
    crew = Crew(lab.urls(target), {f"voyage/{place}": (diary, "") for place, diary in after.items()})
    try:
        lab.until(lambda: all(diary.ended() for diary in after.values()), "every thread to end")
    finally:
        crew.end()
    lab.call(lab.lab.thaw, lost)
    return Aftermath(before, after, lab.drctl("plan", "show", plan))


UNDISTURBED = ["assistant", "count_ships", "assistant", "weigh", "assistant", "draft", WAITING, "after the human", "finish"]


@pytest.mark.parametrize("place", PLACES)
def test_a_graph_that_is_killed_with_its_region_gives_the_same_answer_in_the_other(aftermath: Aftermath, place: str) -> None:
    """Only the step in which it died is done twice; a wait for a human is no step, and nobody is asked for what is known."""
    before, after = aftermath.before[place], aftermath.after[place]
    assert before.find(ANSWER) is None
    found = after.find(ANSWER)
    assert found is not None, after.read()
    assert [tuple(line) for line in found["talk"]] == undisturbed()
    died_at = UNDISTURBED.index(place)
    assert before.steps() == UNDISTURBED[: died_at + 1]
    assert after.steps() == UNDISTURBED[died_at:]


def test_the_failover_was_planned_approved_by_two_and_lost_nothing(aftermath: Aftermath) -> None:
    record = aftermath.plan["record"]
    assert record["state"] == "done"
    assert {one["principal"] for one in aftermath.plan["approvals"] if one["valid"]} == {"alice", "bob"}
    assert record["plan"]["requester"] not in {"alice", "bob"}


def test_a_graph_that_sleeps_through_the_failover_stops_when_it_wakes(
    lab: RunningLab, aftermath: Aftermath, tmp_path: Path
) -> None:
    """The region is frozen with it inside a tool, another process finishes its thread elsewhere, and everything thaws: what it
    would still write is refused, and the history is that of its successor."""
    lab.reprotected()
    lost, target = "eu-central-1", "eu-west-1"
    assert lab.active() == lost
    thread, zombie, heir = "voyage/zombie", Diary(tmp_path / "zombie.jsonl"), Diary(tmp_path / "heir.jsonl")
    crew = Crew(lab.urls(), {thread: (zombie, "weigh")})
    try:
        lab.until(lambda: zombie.find(STANDING), "the graph to be inside its tool")
        lab.call(lab.lab.freeze, lost)
        crew.process.send_signal(signal.SIGSTOP)
        lab.fail_over(lost, target)
        successor = Crew(lab.urls(target), {thread: (heir, "")})
        answer = lab.until(heir.ended, "the heir to end")
        successor.end()
        assert [tuple(line) for line in answer["talk"]] == undisturbed()
        with Checkpoints(lab.urls(target)) as client:
            known = [record.id for record in client.list(thread)]
        lab.call(lab.lab.thaw, lost)
        zombie.path.with_suffix(".go").touch()
        crew.process.send_signal(signal.SIGCONT)
        stopped = lab.until(zombie.ended, "the sleeper to stop")
    finally:
        crew.end()
        lab.call(lab.lab.thaw, lost)
    assert (stopped["event"], stopped["code"]) == (STOPPED, "fenced")
    assert "stop this agent" in stopped["hint"]
    assert zombie.steps() == UNDISTURBED[: UNDISTURBED.index("weigh") + 1]
    with Checkpoints(lab.urls(target)) as client:
        assert [record.id for record in client.list(thread)] == known
        state = build(ReplicatedSaver(client)).get_state(config_of(thread))
    assert state.values["messages"][-1].id == "final"
