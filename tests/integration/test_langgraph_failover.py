"""A real LangGraph graph loses its region in the middle and gives the answer that an undisturbed run gives.

The graph is that of ``tests/support/voyage.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("langgraph.graph", reason="langgraph is not installed")

from langgraph.types import Command

from controller.agent import AsyncCheckpoints, Checkpoints, Fenced
from controller.agent.langgraph import ReplicatedSaver
from controller.errors import FenceLost, Unavailable
from tests.support.served import ServedController
from tests.support.voyage import APPROVAL, QUESTION, build, config_of, talk, undisturbed


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedController]:
    with ServedController(tmp_path) as running:
        yield running


DEAD_SECONDS = 4.0
"""How long a client goes on that can reach a dead region only. Before, it is a bound for each put on a busy machine."""
PLACES = ["assistant", "count_ships", "weigh", "draft", "after the human", "finish"]


@pytest.mark.parametrize("place", PLACES)
def test_a_graph_that_dies_with_its_region_goes_on_in_another_with_the_same_answer(
    served: ServedController, place: str
) -> None:
    """Its process can reach only its own region, and dies with it at ``place``. A new process in the next region resumes."""
    config = config_of(f"voyage/{place}")
    lost = threading.Event()

    def at(here: str) -> None:
        if here == place and not lost.is_set():
            lost.set()
            served.lose_region("eu-west-1")

    def live() -> None:
        with Checkpoints(served.urls[:1], timeout_seconds=DEAD_SECONDS) as client:
            graph = build(ReplicatedSaver(client, copies=2), at)
            graph.invoke(QUESTION, config, durability="sync")  # no step begins before the one before it is safe
            graph.invoke(Command(resume=APPROVAL), config, durability="sync")

    with pytest.raises(Unavailable):
        live()
    assert lost.is_set()

    assert served.fail_over(lost="eu-west-1") == "eu-central-1"
    with Checkpoints(served.urls[1:]) as client:
        graph = build(ReplicatedSaver(client, copies=2))
        answer = graph.invoke(None, config)
        if "__interrupt__" in answer:
            answer = graph.invoke(Command(resume=APPROVAL), config)
        assert talk(answer) == undisturbed()
        steps = [found.metadata["step"] for found in graph.get_state_history(config)]
        assert steps == sorted(steps, reverse=True)
        assert len(set(steps)) == len(steps), "a step was done twice in the history"


async def test_a_graph_that_waits_for_a_human_is_answered_in_another_region(served: ServedController) -> None:
    config = config_of("waiting")
    async with AsyncCheckpoints(served.urls) as client:
        waiting = await build(ReplicatedSaver(client, copies=2)).ainvoke(QUESTION, config)
        assert waiting["__interrupt__"][0].value == {"please read": "Draft: Seen: 7 ships in Rotterdam; 8400 tons."}
    served.fail_over()
    async with AsyncCheckpoints(served.urls) as client:
        graph = build(ReplicatedSaver(client, copies=2))
        state = await graph.aget_state(config, subgraphs=True)
        assert state.next == ("review",)
        assert state.tasks[0].state.values["draft"].startswith("Draft: Seen: 7 ships")
        answer = await graph.ainvoke(Command(resume=APPROVAL), config)
        assert talk(answer) == undisturbed()


def test_a_process_that_outlives_its_region_goes_on_by_itself(served: ServedController) -> None:
    """It knows every controller; people move the fleet while it is inside a tool."""
    lost = threading.Event()

    def at(here: str) -> None:
        if here == "weigh" and not lost.is_set():
            lost.set()
            served.fail_over()

    config = config_of("survivor")
    with Checkpoints(served.urls, timeout_seconds=20.0) as client:
        graph = build(ReplicatedSaver(client), at)
        graph.invoke(QUESTION, config)
        assert talk(graph.invoke(Command(resume=APPROVAL), config)) == undisturbed()
    assert served.active() == "eu-central-1"


def test_steps_that_were_lost_with_a_region_are_done_again(served: ServedController, caplog: pytest.LogCaptureFixture) -> None:
    """With one copy an acknowledged step may be lost. The same saver, which has seen it, must not believe in it any more."""
    config = config_of("unlucky")
    slow = threading.Event()

    def at(here: str) -> None:
        if here == "weigh" and not slow.is_set():
            slow.set()
            served.delay_replication(30.0)

    with Checkpoints(served.urls, timeout_seconds=20.0) as client:
        graph = build(ReplicatedSaver(client), at)
        graph.invoke(QUESTION, config, durability="sync")
        before = {found.config["configurable"]["checkpoint_id"] for found in graph.get_state_history(config)}
        served.fail_over()
        after = {found.config["configurable"]["checkpoint_id"] for found in graph.get_state_history(config)}
        assert set() < after < before, "some steps must have been lost, and not all of them"
        assert "were lost with their region" in caplog.text
        graph.invoke(None, config)
        assert talk(graph.invoke(Command(resume=APPROVAL), config)) == undisturbed()


def test_a_fenced_agent_stops_in_the_middle_of_its_graph(served: ServedController) -> None:
    """Its right to act runs out while a tool runs; the step that follows is refused before it begins."""
    seen: list[str] = []
    with Checkpoints(served.urls[:1], timeout_seconds=DEAD_SECONDS) as client:
        client.put("host", "hello", b"")
        hold = client.hold()

        def over() -> bool:
            try:
                hold.check()
            except Fenced:
                return True
            return False

        def at(here: str) -> None:
            seen.append(here)
            if here == "count_ships":
                served.lose_region("eu-west-1")
                served.until(over, "the right to act to run out")

        graph = build(ReplicatedSaver(client, hold=hold), at)
        with pytest.raises(FenceLost):
            graph.invoke(QUESTION, config_of("fenced"), durability="sync")
    assert seen == ["assistant", "count_ships"]
