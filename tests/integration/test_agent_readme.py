"""What the page for agents' owners shows is what works: its code blocks are run, as they stand, against real controllers."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import pytest

import controller.agent
from controller.agent import Checkpoints, Letter, Spool, errors
from controller.agent.client import AsyncCheckpoints
from tests.support.echo import openai_agent, strands_model
from tests.support.served import ServedController

PAGE = (Path(controller.agent.__file__).parent / "README.md").read_text()
BLOCKS = dict(re.findall(r"^```python (\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
ADAPTERS = ["langgraph", "openai", "strands", "state"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedController]:
    with ServedController(tmp_path_factory.mktemp("served")) as running:
        yield running


async def run(block: str, **names: Any) -> dict[str, Any]:
    """A block of the page, with what its reader has already. Returns all names."""
    found: dict[str, Any] = dict(names)
    code = compile(BLOCKS[block], f"README.md: {block}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, found)
    if inspect.isawaitable(result):
        await result
    return found


def builder() -> Any:
    graph = pytest.importorskip("langgraph.graph", reason="langgraph is not installed")

    class Count(TypedDict):
        count: int

    made = graph.StateGraph(Count)
    made.add_node("add", lambda state: {"count": state["count"] + 1})
    made.add_edge(graph.START, "add")
    made.add_edge("add", graph.END)
    return made


async def test_three_lines_make_a_langgraph_graph_replicated(served: ServedController) -> None:
    found = await run("langgraph", builder=builder(), endpoints=served.urls)
    config = {"configurable": {"thread_id": "readme"}}
    assert found["graph"].invoke({"count": 41}, config) == {"count": 42}
    again = await run("langgraph", builder=builder(), endpoints=served.urls)
    assert again["graph"].get_state(config).values == {"count": 42}


async def test_three_lines_make_a_session_of_the_openai_sdk_replicated(served: ServedController) -> None:
    agents = pytest.importorskip("agents", reason="openai-agents is not installed")
    for number in (1, 2):
        found = await run("openai", Runner=agents.Runner, agent=openai_agent(), endpoints=served.urls)
        assert found["result"].final_output == f"{number} heard"


async def test_three_lines_make_a_strands_agent_replicated(served: ServedController) -> None:
    strands = pytest.importorskip("strands", reason="strands-agents is not installed")
    from strands.session.snapshot_session_manager import SnapshotSessionManager

    def quiet(**options: Any) -> Any:
        return strands.Agent(agent_id="echo", callback_handler=None, **options)

    for number in (1, 2):
        names = {"Agent": quiet, "SnapshotSessionManager": SnapshotSessionManager, "model": strands_model()}
        found = await run("strands", endpoints=served.urls, **names)
        assert str(await found["agent"].invoke_async("hello")).strip() == f"{number} heard"


async def test_two_lines_save_and_load_the_state_of_any_program(served: ServedController) -> None:
    found = await run("state", endpoints=served.urls)
    assert found["state"] == {"step": 7, "todo": ["invoice"]}
    found["client"].close()


@pytest.mark.parametrize("block", ADAPTERS)
def test_adopting_takes_no_more_than_three_statements_beside_imports(block: str) -> None:
    statements = [node for node in ast.parse(BLOCKS[block]).body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    assert len(statements) <= 3


async def test_the_blocks_about_the_client_run(
    served: ServedController, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = await run("client", endpoints=served.urls, Checkpoints=Checkpoints, Letter=Letter)
    assert (found["ack"].copies, found["body"]) == (2, b"state 99")
    assert [record.id for record in found["records"]] == [f"step-{n:04d}" for n in range(99, 89, -1)]
    assert "agent-42" in found["names"]
    assert "active" in found["states"].values()
    spooled = await run("spool", endpoints=served.urls, Checkpoints=Checkpoints, Spool=Spool)
    assert spooled["spool"].bytes == 0
    spooled["spool"].close()


async def test_a_graph_with_a_hold_runs(served: ServedController) -> None:
    pytest.importorskip("langgraph.graph", reason="langgraph is not installed")
    from controller.agent.langgraph import ReplicatedSaver

    names = {"Checkpoints": Checkpoints, "ReplicatedSaver": ReplicatedSaver, "builder": builder()}
    found = await run("hold", endpoints=served.urls, **names)
    assert found["graph"].invoke({"count": 1}, {"configurable": {"thread_id": "held"}}) == {"count": 2}


def test_every_block_is_run_and_every_error_is_in_the_table() -> None:
    assert set(BLOCKS) == {*ADAPTERS, "client", "hold", "spool", "credentials"}  # the last one: test_secured_api.py
    table = PAGE[PAGE.index("### Which error") : PAGE.index("### May this copy")]
    named = set(re.findall(r"`(\w+)`", table))
    own = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and kind.__module__ == errors.__name__}
    assert own - {"StaleEpoch"} <= named  # StaleEpoch is a FenceLost, of a controller that was deposed
    calls = {name for name in vars(AsyncCheckpoints) if not name.startswith("_")} - {"close"}
    assert calls <= {name for name in vars(Checkpoints) if not name.startswith("_")}
