"""A real LangGraph graph loses its region in the middle and gives the answer that an undisturbed run gives.

The graph has a (deterministic) chat model, two tools, and a subgraph that drafts a text and waits for a human.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest

pytest.importorskip("langgraph.graph", reason="langgraph is not installed")

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AnyMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, interrupt

from controller.agent import AsyncCheckpoints, Checkpoints, Fenced
from controller.agent.langgraph import ReplicatedSaver
from controller.errors import FenceLost, Unavailable
from tests.support.served import ServedController

QUESTION = {"messages": [HumanMessage("How many ships are in port, and what do they weigh?", id="question")]}
APPROVAL = "approved by the harbour master"


class ScriptedModel(BaseChatModel):
    """Answers by what it has seen so far, always the same."""

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def _generate(self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **_: Any) -> ChatResult:
        results = [message.content for message in messages if isinstance(message, ToolMessage)]
        script = [("count_ships", {"port": "Rotterdam"}), ("weigh", {"ships": 7})]
        if len(results) < len(script):
            name, arguments = script[len(results)]
            answer = AIMessage(
                "let me look",
                id=f"ask-{len(results)}",
                tool_calls=[{"name": name, "args": arguments, "id": f"call-{len(results)}"}],
            )
        else:
            answer = AIMessage(f"Seen: {'; '.join(map(str, results))}.", id="answer")
        return ChatResult(generations=[ChatGeneration(message=answer)])


class State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]
    review: str


class Review(TypedDict):
    messages: list[AnyMessage]
    draft: str
    review: str


Hook = Callable[[str], None]


def build(saver: Any, at: Hook = lambda place: None) -> Any:
    """``at`` is called inside nodes and tools with their name: where a test makes the world end."""

    @tool
    def count_ships(port: str) -> str:
        """Counts ships."""
        at("count_ships")
        return f"7 ships in {port}"

    @tool
    def weigh(ships: int) -> str:
        """Weighs ships."""
        at("weigh")
        return f"{ships * 1200} tons"

    model = ScriptedModel()

    def assistant(state: State) -> dict[str, Any]:
        at("assistant")
        return {"messages": [model.invoke(state["messages"])]}

    def route(state: State) -> str:
        last = state["messages"][-1]
        return "tools" if isinstance(last, AIMessage) and last.tool_calls else "review"

    def draft(state: Review) -> dict[str, Any]:
        at("draft")
        return {"draft": f"Draft: {state['messages'][-1].content}"}

    def ask_human(state: Review) -> dict[str, Any]:
        word = interrupt({"please read": state["draft"]})
        at("after the human")
        return {"review": f"{state['draft']} ({word})"}

    def finish(state: State) -> dict[str, Any]:
        at("finish")
        return {"messages": [AIMessage(f"FINAL {state['review']}", id="final")]}

    review = StateGraph(Review)
    review.add_node("draft", draft)
    review.add_node("ask_human", ask_human)
    review.add_edge(START, "draft")
    review.add_edge("draft", "ask_human")
    review.add_edge("ask_human", END)

    graph = StateGraph(State)
    graph.add_node("assistant", assistant)
    graph.add_node("tools", ToolNode([count_ships, weigh]))
    graph.add_node("review", review.compile())
    graph.add_node("finish", finish)
    graph.add_edge(START, "assistant")
    graph.add_conditional_edges("assistant", route, ["tools", "review"])
    graph.add_edge("tools", "assistant")
    graph.add_edge("review", "finish")
    graph.add_edge("finish", END)
    return graph.compile(checkpointer=saver)


def config_of(thread: str, **more: Any) -> dict[str, Any]:
    return {"configurable": {"thread_id": thread, **more}}


def talk(answer: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message.type, str(message.content)) for message in answer["messages"]]


def undisturbed() -> list[tuple[str, str]]:
    graph, config = build(InMemorySaver()), config_of("calm")
    waiting = graph.invoke(QUESTION, config)
    assert "__interrupt__" in waiting
    return talk(graph.invoke(Command(resume=APPROVAL), config))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedController]:
    with ServedController(tmp_path) as running:
        yield running


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
        with Checkpoints(served.urls[:1], timeout_seconds=1.5) as client:
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
    with Checkpoints(served.urls[:1], timeout_seconds=1.5) as client:
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
