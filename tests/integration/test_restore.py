"""``drctl restore`` against real controllers: a poisoned agent, thread and conversation get back what they had."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from controller.agent.sessions import ReplicatedSession
from controller.agent.state import load_state_blocking, save_state_blocking
from controller.agent.sync import Checkpoints
from controller.cli.render import exact_time
from controller.domain.model import Beat, Running
from tests.support.drctl import Drctl, Result
from tests.support.served import GROUP, REGIONS, ServedController


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedController]:
    with ServedController(tmp_path) as running:
        yield running


@pytest.fixture
def client(served: ServedController) -> Iterator[Checkpoints]:
    with Checkpoints(served.urls) as made:
        yield made


def everybody(served: ServedController) -> list[str]:
    return [option for url in served.urls for option in ("--endpoint", url)]


def now() -> str:
    """A time between what was written and what will be."""
    time.sleep(0.02)
    at = time.time()
    time.sleep(0.02)
    return exact_time(at)


def back(drctl: Drctl, served: ServedController, at: str, *more: str) -> Result:
    return drctl(
        "restore", "--as-of", at, *more, "--execute", "--confirm", GROUP, "--requester", "ada", "-o", "json", *everybody(served)
    )


# ------------------------------------------------------------------------------------------------------------- agents


def test_agents_get_back_what_they_had_in_two_regions_and_history_only_grows(
    served: ServedController, client: Checkpoints, drctl: Drctl
) -> None:
    for agent in ("a", "b"):
        client.put(agent, "good", f"{agent} good".encode(), meta={"step": "1"})
    at = now()
    client.put("a", "poisoned", b"a poisoned", parent="good")
    client.put("a", "worse", b"a worse", parent="poisoned")
    client.put("c", "new", b"c did not exist then")
    dry = drctl("restore", "--as-of", at, *everybody(served))
    assert dry.code == 0, dry.err
    assert "1 would go back" in dry.out
    assert "1 did not exist then" in dry.out
    assert "1 have nothing newer" in dry.out
    assert f"--execute --confirm {GROUP}" in dry.out
    assert client.latest("a")[0].id == "worse"
    done = back(drctl, served, at)
    assert done.code == 0, done.err
    (outcome,) = done.json["outcomes"]
    assert (outcome["agent"], outcome["state"], outcome["copies"] >= 2) == ("a", "restored", True)
    record, body = client.latest("a")
    assert body == b"a good"
    assert record.parent == "good"
    assert record.meta == {"step": "1", "dr.restored_from": "good", "dr.restored_upto": "good"}
    assert client.latest("b")[0].id == "good"
    assert client.latest("c")[1] == b"c did not exist then"
    assert client.get("a", "worse")[1] == b"a worse"
    again = back(drctl, served, at)
    assert again.code == 0
    assert again.json["outcomes"] == []
    assert [found["state"] for found in again.json["agents"] if found["agent"] == "a"] == ["restored"]
    entries = drctl("audit", "-o", "json", *everybody(served)).json
    assert [(one["actor"], one["subject"]) for one in entries if one["action"] == "restore"] == [("ada", GROUP)]
    client.put("a", "next", b"a goes on", parent=record.id)
    assert client.latest("a")[1] == b"a goes on"


def test_a_restore_can_be_undone_by_another_one(served: ServedController, client: Checkpoints, drctl: Drctl) -> None:
    client.put("a", "one", b"one")
    first = now()
    client.put("a", "two", b"two")
    second = now()
    assert back(drctl, served, first).code == 0
    assert client.latest("a")[1] == b"one"
    assert back(drctl, served, second).code == 0
    assert client.latest("a")[1] == b"two"


def test_a_repeated_request_is_a_repetition_and_one_that_was_overtaken_is_refused(
    served: ServedController, client: Checkpoints, drctl: Drctl
) -> None:
    from controller.cli.client import Client
    from controller.cli.session import parse_time
    from controller.errors import Refused
    from controller.runtime.archive_documents import Restored

    client.put("a", "good", b"good")
    at = parse_time(now(), time.time())
    client.put("a", "bad", b"bad")
    http = Client(served.urls)
    item = {"agent": "a", "record": "good", "newest": "bad"}
    body = {"at": at, "kind": "checkpoint", "items": [item], "confirm": GROUP, "requester": "ada"}
    try:
        first = http.post(Restored, "/v1/restores", body).value.outcomes[0]
        second = http.post(Restored, "/v1/restores", body).value.outcomes[0]
        assert (first.state, second.state, first.record) == ("restored", "restored", second.record)
        assert len(client.list("a")) == 3
        client.put("a", "later", b"later")
        overtaken = http.post(Restored, "/v1/restores", body).value.outcomes[0]
        assert overtaken.state == "failed"
        assert "wrote meanwhile" in overtaken.hint
        with pytest.raises(Refused):
            http.post(Restored, "/v1/restores", {**body, "confirm": "another"})
    finally:
        http.close()
    assert client.latest("a")[1] == b"later"


def test_an_agent_that_runs_now_is_refused_without_force(served: ServedController, client: Checkpoints, drctl: Drctl) -> None:
    client.create_task("a", {"goal": "x"})

    def beating() -> bool:
        answer = client.beat(Beat("host-1", 4, tuple(Running(one.agent, one.attempt) for one in running)))
        running[:] = answer.assignments
        return bool(running)

    running: list[Any] = []
    served.until(beating, "the agent to be assigned")
    attempt = running[0].attempt
    client.put("a", "good", b"good", attempt=attempt)
    at = now()
    client.put("a", "bad", b"bad", attempt=attempt)
    beating()
    refused = back(drctl, served, at)
    assert refused.code == 5
    assert "runs on 'host-1'" in refused.err
    assert "--force" in refused.err
    assert client.latest("a")[1] == b"bad"
    beating()
    assert back(drctl, served, at, "--force").code == 0
    assert client.latest("a")[1] == b"good"
    assert client.latest("a")[0].attempt == attempt


def test_without_an_active_controller_a_restore_is_held_back_and_says_how_to_take_states_out(
    served: ServedController, client: Checkpoints, drctl: Drctl
) -> None:
    client.put("a", "good", b"good", copies=3)
    at = now()
    client.put("a", "bad", b"bad", copies=3)
    standby = ["--endpoint", served.urls[1]]
    served.until(lambda: "bad" in drctl("checkpoints", "list", "a", "-o", "json", *standby).out, "the standby to have it")
    served.lose_region(REGIONS[0])
    dry = drctl("restore", "--as-of", at, *standby)
    assert dry.code == 0
    assert "1 would go back" in dry.out
    held = drctl("restore", "--as-of", at, "--execute", "--confirm", GROUP, *standby)
    assert held.code == 3
    assert "drctl checkpoints export --all --as-of TIME" in held.err


@pytest.mark.parametrize(
    "words", [[], ["--as-of", "soon"], ["--as-of", "now", "--execute"], ["--as-of", "1h", "--execute", "--confirm", "other"]]
)
def test_a_restore_that_is_not_clear_is_a_usage_error_and_nothing_is_sent(
    served: ServedController, client: Checkpoints, drctl: Drctl, words: list[str]
) -> None:
    client.put("a", "one", b"one")
    found = drctl("restore", *words, *everybody(served))
    if "--execute" in words:
        assert found.code == 0  # nothing to do: there is nothing to confirm
        assert "There was nothing to do" in found.out
    else:
        assert found.code == 2


def test_the_confirmation_is_the_groups_name(served: ServedController, client: Checkpoints, drctl: Drctl) -> None:
    client.put("a", "one", b"one")
    at = now()
    client.put("a", "two", b"two")
    for confirm in ([], ["--confirm", "other"]):
        assert drctl("restore", "--as-of", at, "--execute", *confirm, *everybody(served)).code == 2
    assert client.latest("a")[1] == b"two"
    assert drctl("restore", "--as-of", at, "--agent", "nobody", *everybody(served)).code == 5


# ----------------------------------------------------------------------------------------------------------- adapters


def test_a_langgraph_thread_goes_back_whole_and_runs_on_from_there(
    served: ServedController, client: Checkpoints, drctl: Drctl
) -> None:
    pytest.importorskip("langgraph.graph")
    from typing import TypedDict

    from langgraph.graph import END, START, StateGraph

    from controller.agent.langgraph import ReplicatedSaver

    class State(TypedDict):
        log: list[str]

    def graph(saver: ReplicatedSaver) -> Any:
        builder: Any = StateGraph(State)
        builder.add_node("first", lambda state: {"log": [*state["log"], "first"]})
        builder.add_node("second", lambda state: {"log": [*state["log"], "second"]})
        builder.add_edge(START, "first")
        builder.add_edge("first", "second")
        builder.add_edge("second", END)
        return builder.compile(checkpointer=saver)

    def config() -> dict[str, Any]:
        return {"configurable": {"thread_id": "t"}}

    running = graph(ReplicatedSaver(client))
    running.invoke({"log": ["good"]}, config())
    good = running.get_state(config())
    history = len(list(running.get_state_history(config())))
    at = now()
    running.update_state(config(), {"log": ["poisoned"]})
    running.invoke({"log": ["worse"]}, config())
    assert running.get_state(config()).values["log"][0] == "worse"
    dry = drctl("restore", "--as-of", at, "--agent", "t", "-o", "json", *everybody(served)).json
    assert dry["agents"][0]["state"] == "found"
    assert back(drctl, served, at, "--agent", "t").code == 0
    for saver in (running.checkpointer, ReplicatedSaver(client)):  # also one that knew the thread before
        seen = graph(saver)
        state = seen.get_state(config())
        assert state.values == good.values
        assert state.config == good.config
        assert len(list(seen.get_state_history(config()))) == history
    after = graph(ReplicatedSaver(client))
    assert after.invoke({"log": ["next"]}, config())["log"] == ["next", "first", "second"]
    assert graph(ReplicatedSaver(client)).get_state(config()).values["log"] == ["next", "first", "second"]
    copied = ReplicatedSaver(client)
    copied.copy_thread("t", "copy")
    shown = graph(copied).get_state({"configurable": {"thread_id": "copy"}})
    assert shown.values["log"] == ["next", "first", "second"]


async def test_a_conversation_and_a_saved_state_go_back(served: ServedController, client: Checkpoints, drctl: Drctl) -> None:
    session = ReplicatedSession(client, "chat")
    await session.add_items([{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}])
    save_state_blocking(client, "plain", {"step": 1})
    at = now()
    await session.add_items([{"role": "user", "content": "poison"}])
    await session.pop_item()
    await session.pop_item()
    save_state_blocking(client, "plain", {"step": 666})
    assert len(await session.get_items()) == 1
    assert back(drctl, served, at).code == 0
    for one in (session, ReplicatedSession(client, "chat")):
        assert [item["content"] for item in await one.get_items()] == ["hello", "good day"]
    assert load_state_blocking(client, "plain") == {"step": 1}
    await session.add_items([{"role": "user", "content": "next"}])
    assert [item["content"] for item in await session.get_items()] == ["hello", "good day", "next"]
