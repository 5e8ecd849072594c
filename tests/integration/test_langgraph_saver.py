"""What the public conformance suite does not ask of a saver: changes-only channels, repetition, names, loops, options."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Iterator
from typing import Annotated, Any, TypedDict

import pytest

pytest.importorskip("langgraph.graph", reason="langgraph is not installed")

from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.serde.types import INTERRUPT, RESUME
from langgraph.graph import END, START, StateGraph

from controller.agent import AsyncCheckpoints, Checkpoints
from controller.agent.langgraph import ATTEMPT, COPIES, IncompleteHistory, ReplicatedSaver
from controller.errors import Misconfigured, Refused
from tests.support.served import ServedController


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedController]:
    with ServedController(tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: ServedController) -> Iterator[Checkpoints]:
    with Checkpoints(served.urls) as one:
        yield one


def config_of(thread: str, **more: Any) -> dict[str, Any]:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": "", **more}}


def fold(state: list[str], writes: Any) -> list[str]:
    return [*state, *(word for words in writes for word in words)]


class Diary(TypedDict):
    entries: Annotated[list[str], DeltaChannel(fold, list, snapshot_frequency=4)]
    count: Annotated[int, operator.add]


def diary(saver: ReplicatedSaver) -> Any:
    def write(state: Diary) -> dict[str, Any]:
        return {"entries": [f"written {len(state['entries'])}"], "count": 1}

    graph = StateGraph(Diary)
    graph.add_node("write", write)
    graph.add_edge(START, "write")
    graph.add_edge("write", END)
    return graph.compile(checkpointer=saver)


def keep(client: Checkpoints, thread: str, turns: int) -> list[str]:
    """A diary of so many turns. Returns its entries."""
    graph = diary(ReplicatedSaver(client))
    entries: list[str] = []
    for turn in range(turns):
        entries = graph.invoke({"entries": [f"turn {turn}"]}, config_of(thread))["entries"]
    return entries


def copy_without(client: Checkpoints, source: str, target: str, skip: str) -> None:
    """What a region has in which one record never arrived, or was carried away."""
    for record in reversed(client.list(source)):
        if record.id != skip:
            _, body = client.get(source, record.id)
            client.put(target, record.id, body, kind=record.kind, parent=record.parent, meta=record.meta)


# ------------------------------------------------------------------------------------------------------------ changes only


@pytest.mark.parametrize("turns", [1, 3, 6])
def test_a_channel_that_stores_only_changes_is_rebuilt_by_another_process(client: Checkpoints, turns: int) -> None:
    entries = keep(client, f"diary-{turns}", turns)
    assert len(entries) == 2 * turns
    again = diary(ReplicatedSaver(client))
    assert again.get_state(config_of(f"diary-{turns}")).values == {"entries": entries, "count": turns}
    history = list(again.get_state_history(config_of(f"diary-{turns}")))
    lengths = [len(found.values.get("entries", [])) for found in history]
    assert lengths == sorted(lengths, reverse=True)


async def test_it_is_rebuilt_without_blocking_too(served: ServedController, client: Checkpoints) -> None:
    entries = await asyncio.to_thread(keep, client, "diary-async", 3)
    async with AsyncCheckpoints(served.urls) as other:
        state = await diary(ReplicatedSaver(other)).aget_state(config_of("diary-async"))
        assert state.values["entries"] == entries


def test_state_is_never_read_as_empty_when_a_parent_or_its_writes_are_missing(client: Checkpoints) -> None:
    entries = keep(client, "whole", 3)
    records = client.list("whole")
    newest = next(record for record in records if record.kind == "checkpoint")
    parent = newest.parent
    assert parent is not None
    writes = [record for record in records if record.kind == "writes" and record.parent == parent]
    for number, missing in enumerate([parent, *(record.id for record in writes)]):
        copy_without(client, "whole", f"broken-{number}", missing)
        graph = diary(ReplicatedSaver(client))
        with pytest.raises(IncompleteHistory, match="entries"):
            graph.get_state(config_of(f"broken-{number}"))
        with pytest.raises(IncompleteHistory):
            graph.invoke({"entries": ["more"]}, config_of(f"broken-{number}"))
        back = ReplicatedSaver(client).newest_whole(config_of(f"broken-{number}"))
        assert back is not None
        assert back["configurable"]["checkpoint_id"] < newest.id
        rest = graph.get_state(back).values["entries"]
        assert rest == entries[: len(rest)]
        assert graph.invoke({"entries": ["more"]}, back)["entries"][: len(rest) + 1] == [*rest, "more"]
    copy_without(client, "whole", "unbroken", "no such record")
    found = ReplicatedSaver(client).newest_whole(config_of("unbroken"))
    assert found is not None
    assert found["configurable"]["checkpoint_id"] == newest.id
    assert ReplicatedSaver(client).newest_whole(config_of("nobody")) is None
    assert diary(ReplicatedSaver(client)).get_state(config_of("unbroken")).values["entries"] == entries


@pytest.mark.parametrize("turns", [3, 5])
def test_pruning_and_copying_keep_what_state_is_rebuilt_from(client: Checkpoints, turns: int) -> None:
    thread, copy = f"pruned-{turns}", f"pruned-copy-{turns}"
    entries = keep(client, thread, turns)
    saver = ReplicatedSaver(client)
    saver.prune([thread])
    assert len(list(saver.list(config_of(thread)))) == 1
    saver.copy_thread(thread, copy)
    for name in (thread, copy):
        other = ReplicatedSaver(client)
        assert len(list(other.list(config_of(name)))) == 1
        assert diary(other).get_state(config_of(name)).values["entries"] == entries
        after = diary(other).invoke({"entries": ["more"]}, config_of(name))
        assert after["entries"] == [*entries, "more", f"written {len(entries) + 1}"]


def test_an_unknown_strategy_of_pruning_is_refused(client: Checkpoints) -> None:
    with pytest.raises(Refused, match="keep_latest, delete"):
        ReplicatedSaver(client).prune(["any"], strategy="everything")


# -------------------------------------------------------------------------------------------------------------- repetition


def test_a_thread_that_was_deleted_can_be_copied_again(client: Checkpoints) -> None:
    keep(client, "origin", 2)
    saver = ReplicatedSaver(client)
    whole = [found.checkpoint["id"] for found in saver.list(config_of("origin"))]
    for _ in range(2):
        saver.copy_thread("origin", "copy")
        saver.copy_thread("origin", "copy")
        assert [found.checkpoint["id"] for found in saver.list(config_of("copy"))] == whole
        assert diary(ReplicatedSaver(client)).get_state(config_of("copy")).values["count"] == 2
        saver.delete_thread("copy")
        assert list(saver.list(config_of("copy"))) == []
        assert ReplicatedSaver(client).get_tuple(config_of("copy")) is None


def test_the_same_checkpoint_put_again_stands_once_and_the_last_of_two_that_differ(client: Checkpoints) -> None:
    saver = ReplicatedSaver(client)
    checkpoint = empty_checkpoint()
    for step in (1, 1, 2, 1):
        saver.put(config_of("twice"), checkpoint, {"source": "loop", "step": step}, {})
        found = ReplicatedSaver(client).get_tuple(config_of("twice"))
        assert found is not None
        assert found.metadata["step"] == step
    assert len(list(saver.list(config_of("twice")))) == 1
    assert len(client.list("twice")) == 3


def test_a_value_to_resume_with_replaces_the_one_before_and_a_plain_write_does_not(client: Checkpoints) -> None:
    saver = ReplicatedSaver(client)
    at = saver.put(config_of("writes"), empty_checkpoint(), {"source": "loop", "step": 0}, {})
    for value in ("a", "b", "a"):
        saver.put_writes(at, [(RESUME, [value])], "task")
        saver.put_writes(at, [("plain", value)], "task")
    saver.put_writes(at, [(INTERRUPT, "stop")], "task")
    found = ReplicatedSaver(client).get_tuple(at)
    assert found is not None
    assert found.pending_writes == [("task", RESUME, ["a"]), ("task", INTERRUPT, "stop"), ("task", "plain", "a")]


def test_writes_come_in_the_order_of_their_tasks_paths(client: Checkpoints) -> None:
    saver = ReplicatedSaver(client)
    at = saver.put(config_of("paths"), empty_checkpoint(), {"source": "loop", "step": 0}, {})
    for task, path in (("t1", "~z"), ("t2", "~a"), ("t3", "")):
        saver.put_writes(at, [("c", task), ("d", task)], task, path)
    found = saver.get_tuple(at)
    assert found is not None
    assert [write[0] for write in found.pending_writes or []] == ["t3", "t3", "t2", "t2", "t1", "t1"]


# ------------------------------------------------------------------------------------------------------- names and options


NAMES = [
    "a/b",
    "ü€😀",
    "x" * 500,
    "x" * 499 + "y",
    "",
    "..",
    "%2F",
    "a%2Fb",
    "tab\there",
    "\u202eevil",
    "%runs-deleted",
    "a~1",
    "1 2",
]


def test_every_text_is_a_thread_of_its_own(client: Checkpoints) -> None:
    saver = ReplicatedSaver(client)
    for number, name in enumerate(NAMES):
        for ns in ("", f"sub:{'n' * 300}|{name}"):
            config = {"configurable": {"thread_id": name, "checkpoint_ns": ns}}
            saver.put(config, empty_checkpoint(), {"source": "loop", "step": number}, {})
    other = ReplicatedSaver(client)
    for number, name in enumerate(NAMES):
        for ns in ("", f"sub:{'n' * 300}|{name}"):
            found = list(other.list({"configurable": {"thread_id": name, "checkpoint_ns": ns}}))
            assert [one.metadata["step"] for one in found] == [number], name
            assert found[0].config["configurable"]["checkpoint_ns"] == ns
    assert len({saver.agent(name) for name in NAMES}) == len(NAMES)
    assert saver.agent("customer-42.eu") == "customer-42.eu"


def test_copies_and_attempt_may_be_given_for_one_run_and_are_no_metadata(client: Checkpoints) -> None:
    graph = diary(ReplicatedSaver(client))
    graph.invoke({"entries": ["x"]}, config_of("options", **{COPIES: 2, ATTEMPT: 0, "tenant": "t1"}))
    assert {record.copies for record in client.list("options")} == {2}
    found = ReplicatedSaver(client).get_tuple(config_of("options"))
    assert found is not None
    assert found.metadata["tenant"] == "t1"  # type: ignore[typeddict-item]
    assert {COPIES, ATTEMPT} & set(found.metadata) == set()


def test_a_long_thread_is_listed_beyond_one_page(client: Checkpoints) -> None:
    saver = ReplicatedSaver(client)
    at = config_of("long")
    for step in range(60):
        at = saver.put(at, empty_checkpoint(), {"source": "loop", "step": step}, {})
    other = ReplicatedSaver(client)
    assert [found.metadata["step"] for found in other.list(config_of("long"))] == list(reversed(range(60)))
    assert [found.metadata["step"] for found in other.list(config_of("long"), limit=3, filter={"source": "loop"})] == [
        59,
        58,
        57,
    ]


# -------------------------------------------------------------------------------------------------------------------- loops


async def test_a_blocking_call_in_the_clients_own_loop_says_so_instead_of_hanging(served: ServedController) -> None:
    async with AsyncCheckpoints(served.urls) as client:
        saver = ReplicatedSaver(client)
        with pytest.raises(Misconfigured, match="wait for itself"):
            saver.get_tuple(config_of("loop"))
        assert await asyncio.to_thread(saver.get_tuple, config_of("loop")) is None


def test_one_client_serves_callers_in_other_event_loops(client: Checkpoints) -> None:
    saver = ReplicatedSaver(client)

    async def put_and_get(thread: str) -> Any:
        await saver.aput(config_of(thread), empty_checkpoint(), {"source": "loop", "step": 1}, {})
        return await saver.aget_tuple(config_of(thread))

    for number in range(2):  # each time a new loop
        assert asyncio.run(put_and_get(f"loop-{number}")) is not None


def test_a_client_without_a_loop_says_what_to_do(served: ServedController) -> None:
    saver = ReplicatedSaver(AsyncCheckpoints(served.urls))
    with pytest.raises(Misconfigured, match="no running event loop"):
        saver.get_tuple(config_of("none"))


# ----------------------------------------------------------------------------------------------------------------- staleness


def test_a_controller_that_is_behind_is_not_believed(served: ServedController) -> None:
    """The second region's copy stands still. A saver that is answered by its controller asks on until the truth is known."""
    behind, active = served.places["eu-central-1"], served.places["eu-west-1"]
    with Checkpoints([behind.url, active.url]) as client:
        saver = ReplicatedSaver(client)
        at = saver.put(config_of("stale"), empty_checkpoint(), {"source": "loop", "step": 0}, {})
        served.hold_back("eu-central-1")
        try:
            for step in range(1, 4):
                at = saver.put(at, empty_checkpoint(), {"source": "loop", "step": step}, {})
                client._client._endpoints._active = None  # the next question goes to whoever was asked least
                client._client._endpoints._all[0].standby_until = 0.0
                found = saver.get_tuple(config_of("stale"))
                assert found is not None
                assert found.metadata["step"] == step
        finally:
            served.hold_back("eu-central-1", False)


def test_a_new_process_never_begins_from_a_copy_that_is_behind(served: ServedController) -> None:
    """It has seen nothing yet that would tell it so: the controller that is behind has to send it on."""
    with Checkpoints(served.urls) as writer:
        saver = ReplicatedSaver(writer)
        served.hold_back("eu-central-1")
        try:
            at = saver.put(config_of("cold"), empty_checkpoint(), {"source": "loop", "step": 7}, {})
            with Checkpoints([served.places["eu-central-1"].url, *served.urls]) as cold:
                found = ReplicatedSaver(cold).get_tuple(at)
        finally:
            served.hold_back("eu-central-1", False)
        assert found is not None
        assert found.metadata["step"] == 7
