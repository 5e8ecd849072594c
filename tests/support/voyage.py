"""A graph to be killed: a (deterministic) chat model, two tools, and a subgraph that drafts a text and waits for a human.

As a program it runs threads of that graph against real controllers, writes down every step that it takes, and stands still in
each at a place that the test names, for as long as the test wants: ``python -m tests.support.voyage --help``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AnyMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, interrupt

from controller.agent import Checkpoints
from controller.agent.langgraph import ReplicatedSaver
from controller.errors import DrError

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


# ----------------------------------------------------------------------------------------------------------- as a program

WAITING = "waiting for a human"
"""Place between the two halves: the graph has stopped at its interrupt."""
PLACES = ["assistant", "count_ships", "weigh", "draft", WAITING, "after the human", "finish"]
STANDING, ANSWER, STOPPED = "standing", "answer", "stopped"


class Diary:
    """What a process did, one JSON object a line, on the disk before anything else happens."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, event: str, **more: object) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, "pid": os.getpid(), **more}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [json.loads(line) for line in lines]

    def steps(self) -> list[str]:
        """Nodes, tools and waits, in order."""
        return [line["event"] for line in self.read() if line["event"] in PLACES]

    def find(self, event: str) -> dict[str, Any] | None:
        return next((line for line in self.read() if line["event"] == event), None)

    def ended(self) -> dict[str, Any] | None:
        """Its answer, or the error that stopped it."""
        return self.find(ANSWER) or self.find(STOPPED)


def sail(graph: Any, config: dict[str, Any], at: Hook) -> dict[str, Any]:
    """From wherever the thread stands to its end. ``durability="sync"``: no step begins before the one before it is safe."""
    known = graph.get_state(config)
    answer = graph.invoke(None if known.values else QUESTION, config, durability="sync")
    while "__interrupt__" in answer:
        at(WAITING)
        answer = graph.invoke(Command(resume=APPROVAL), config, durability="sync")
    return dict(answer)


def take(client: Checkpoints, thread: str, diary: Diary, stand_at: str) -> None:
    """One thread to its end, or to the error that stops it."""
    go_on = diary.path.with_suffix(".go")

    def at(place: str) -> None:
        diary.note(place)
        if place == stand_at:
            diary.note(STANDING)
            while not go_on.exists():
                time.sleep(0.05)

    client.put(thread, f"run/{os.getpid()}/{time.time_ns()}", b"", kind="run")
    graph = build(ReplicatedSaver(client, copies=2, hold=client.hold()), at)
    try:
        answer = sail(graph, config_of(thread), at)
    except DrError as error:
        diary.note(STOPPED, **error.to_dict())
    else:
        diary.note(ANSWER, talk=talk(answer))


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs threads of the graph, each in a thread of its own.")
    parser.add_argument("--controllers", required=True, metavar="URL,URL")
    parser.add_argument("--voyage", nargs=3, action="append", required=True, metavar=("THREAD", "DIARY", "STAND_AT"))
    given = parser.parse_args()
    with Checkpoints(given.controllers.split(","), timeout_seconds=30.0) as client, ThreadPoolExecutor(32) as pool:
        for done in [pool.submit(take, client, thread, Diary(Path(diary)), at) for thread, diary, at in given.voyage]:
            done.result()


if __name__ == "__main__":
    main()
