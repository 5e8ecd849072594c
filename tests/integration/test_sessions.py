"""Conversations of other frameworks, with their real packages, over real HTTP, across the loss of a region."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from controller.agent import AsyncCheckpoints, Checkpoints, Fenced
from controller.agent.sessions import ReplicatedSession
from controller.agent.state import load_state, load_state_blocking, save_state, save_state_blocking
from controller.agent.sync import SyncHold
from controller.errors import Refused
from tests.support.echo import openai_agent, strands_model
from tests.support.served import ServedController


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedController]:
    with ServedController(tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture
def doomed(tmp_path: Path) -> Iterator[ServedController]:
    """A group that a test may destroy."""
    with ServedController(tmp_path) as running:
        yield running


@pytest.fixture
async def client(served: ServedController) -> AsyncIterator[AsyncCheckpoints]:
    async with AsyncCheckpoints(served.urls) as one:
        yield one


class NoRight:
    def check(self) -> None:
        raise Fenced("the right to act has passed")


# ------------------------------------------------------------------------------------------------------------- plain state


@pytest.mark.parametrize("state", [{"step": 7, "todo": ["a", None, 1.5]}, [], "text", 0, None, b"", b"\x00\xff" * 1000])
async def test_a_state_comes_back_as_it_was_saved(client: AsyncCheckpoints, state: object) -> None:
    name = f"state/{state!r}"[:60]
    ack = await save_state(client, name, state)
    assert ack.status == "acknowledged"
    assert await load_state(client, name) == state


async def test_the_newest_state_counts_and_an_unknown_agent_has_none(client: AsyncCheckpoints) -> None:
    assert await load_state(client, "nobody") is None
    for state in ("first", "second", "first"):
        await save_state(client, "newest", state)
    assert await load_state(client, "newest") == "first"


@pytest.mark.parametrize("state", [float("nan"), {"x": float("inf")}, object(), {"s": {1}}])
async def test_a_state_that_would_come_back_changed_is_refused(client: AsyncCheckpoints, state: object) -> None:
    with pytest.raises(Refused):
        await save_state(client, "refused", state)


async def test_nothing_is_saved_without_the_right_to_act(client: AsyncCheckpoints) -> None:
    with pytest.raises(Fenced):
        await save_state(client, "fenced", 1, hold=NoRight())
    with pytest.raises(Fenced):
        await ReplicatedSession(client, "fenced", hold=NoRight()).add_items([{"role": "user", "content": "x"}])
    assert await load_state(client, "fenced") is None


def test_a_program_without_an_event_loop_saves_and_loads(served: ServedController) -> None:
    with Checkpoints(served.urls) as client:
        save_state_blocking(client, "blocking", {"n": 1}, copies=2)
        assert load_state_blocking(client, "blocking") == {"n": 1}


# ------------------------------------------------------------------------------------------------------------ OpenAI Agents


def item(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


async def test_a_session_keeps_order_pops_and_clears(client: AsyncCheckpoints) -> None:
    session = ReplicatedSession(client, "session with / and ü")
    assert await session.get_items() == []
    assert await session.pop_item() is None
    await session.add_items([item("a"), item("b")])
    await session.add_items([])
    await session.add_items([item("c")])
    assert [one["content"] for one in await session.get_items()] == ["a", "b", "c"]
    assert [one["content"] for one in await session.get_items(limit=2)] == ["b", "c"]
    assert await session.get_items(limit=0) == []
    assert await session.pop_item() == item("c")
    assert await session.pop_item() == item("b")
    await session.add_items([item("d")])
    again = ReplicatedSession(client, "session with / and ü")
    assert [one["content"] for one in await again.get_items()] == ["a", "d"]
    await again.clear_session()
    assert await session.get_items() == []
    assert await session.pop_item() is None
    await session.add_items([item("e")])
    assert [one["content"] for one in await again.get_items()] == ["e"]


async def test_the_openai_runner_remembers_a_conversation_that_moved_to_another_region(doomed: ServedController) -> None:
    agents = pytest.importorskip("agents", reason="openai-agents is not installed")
    agent = openai_agent()
    async with AsyncCheckpoints(doomed.urls) as client:
        session = ReplicatedSession(client, "talk", copies=2)
        assert isinstance(session, agents.Session)
        assert (await agents.Runner.run(agent, "one", session=session)).final_output == "1 heard"
        assert (await agents.Runner.run(agent, "two", session=session)).final_output == "2 heard"
    await asyncio.to_thread(doomed.fail_over)
    async with AsyncCheckpoints(doomed.urls[1:]) as client:
        session = ReplicatedSession(client, "talk", copies=2)
        assert (await agents.Runner.run(agent, "three", session=session)).final_output == "3 heard"
        session.session_settings = agents.SessionSettings(limit=2)
        assert len(await session.get_items()) == 2


# ------------------------------------------------------------------------------------------------------------------ Strands


async def test_a_storage_of_strands_writes_reads_lists_and_deletes(client: AsyncCheckpoints) -> None:
    pytest.importorskip("strands.storage", reason="strands-agents is not installed")
    from strands.storage import Storage
    from strands.types.exceptions import StorageError

    from controller.agent.strands import ReplicatedStorage

    storage = ReplicatedStorage(client, "strands/one")
    assert isinstance(storage, Storage)
    assert await storage.read("a/b") is None
    await storage.delete("a/b")
    await storage.write("a/b", b"1")
    await storage.write("a/c", b"2")
    await storage.write("ü~%", b"")
    await storage.write("a/b", b"3")
    assert await storage.list("a/") == ["a/b", "a/c"]
    assert await storage.list("") == ["a/b", "a/c", "ü~%"]
    assert await storage.read("a/b") == b"3"
    await storage.delete("a/b")
    other = ReplicatedStorage(client, "strands/one")
    assert await other.read("a/b") is None
    assert await other.list("a/") == ["a/c"]
    assert await other.read("ü~%") == b""
    await storage.write("a/b", b"1")
    assert await other.read("a/b") == b"1"
    with pytest.raises(StorageError):
        await storage.write("", b"")
    with pytest.raises(Fenced):
        await ReplicatedStorage(client, "strands/one", hold=NoRight()).write("k", b"")
    assert [found.key for found in await storage.search("c")] != []


def test_a_strands_agent_remembers_a_conversation_that_moved_to_another_region(doomed: ServedController) -> None:
    strands = pytest.importorskip("strands", reason="strands-agents is not installed")
    from strands.session.snapshot_session_manager import SnapshotSessionManager

    from controller.agent.strands import ReplicatedStorage

    def ask(client: Checkpoints, text: str) -> str:
        storage = ReplicatedStorage(client, "strands/talk", copies=2)
        manager = SnapshotSessionManager(session_id="talk", storage=storage)
        agent = strands.Agent(model=strands_model(), session_manager=manager, agent_id="echo", callback_handler=None)
        return str(agent(text)).strip()

    with Checkpoints(doomed.urls) as client:
        assert ask(client, "one") == "1 heard"
        assert ask(client, "two") == "2 heard"
    doomed.fail_over()
    with Checkpoints(doomed.urls[1:]) as client:
        assert ask(client, "three") == "3 heard"


# ------------------------------------------------------------------------------------------------------- without the right


def test_every_adapter_says_that_it_must_stop_once_its_region_may_not_act(doomed: ServedController) -> None:
    """The region is lost under them. Nothing is written, not even where a controller of another region would answer."""
    strands = importlib.util.find_spec("strands") is not None
    with Checkpoints(doomed.urls, timeout_seconds=20.0) as client:

        def write_all(hold: SyncHold | None) -> dict[str, Callable[[], Coroutine[Any, Any, object]]]:
            session = ReplicatedSession(client, "talk", hold=hold)
            writes: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
                "session": lambda: session.add_items([item("said")]),
                "state": lambda: save_state(client, "worker", {"step": 1}, hold=hold),
            }
            if strands:
                from controller.agent.strands import ReplicatedStorage

                writes["strands"] = lambda: ReplicatedStorage(client, "storage", hold=hold).write("key", b"data")
            return writes

        for write in write_all(None).values():
            asyncio.run(write())
        late = write_all(client.hold())
        known = {agent: [one.id for one in client.list(agent)] for agent in ("talk", "worker", "storage")}
        doomed.fail_over()
        for name, write in late.items():
            with pytest.raises(Fenced, match="the right to act") as error:
                asyncio.run(write())
            assert "stop this agent" in error.value.hint, name
        assert {agent: [one.id for one in client.list(agent)] for agent in known} == known
