"""What ``controller.stream.live`` keeps of an agent's log is enough: adapters read from it what the whole log says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("langgraph.graph", reason="langgraph is not installed")

from langgraph.types import Command

from controller.agent import Checkpoints
from controller.agent.langgraph import IncompleteHistory, ReplicatedSaver
from controller.agent.sessions import ReplicatedSession
from controller.stream.live import NEEDS, live
from tests.integration.test_langgraph_saver import diary, keep
from tests.support.served import ServedController
from tests.support.voyage import APPROVAL, QUESTION, build, config_of, talk, undisturbed


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedController]:
    with ServedController(tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: ServedController) -> Iterator[Checkpoints]:
    with Checkpoints(served.urls) as one:
        yield one


def restorable(served: ServedController, thread: str) -> str | None:
    """What the active controller would let the agent resume from."""
    active = served.active()
    assert active is not None
    controller = served.places[active].controller
    assert controller is not None

    async def look() -> str | None:
        found = controller._view.restorable(thread)
        return None if found is None else found.id

    return served._run(look())


def carry(client: Checkpoints, source: str, target: str, *, without_needs: bool = False) -> tuple[int, int]:
    """What a copy has after retention took all that is not live: ``target`` is ``source`` without it. Returns (kept, all)."""
    log = list(reversed(client.list(source, limit=1000)))
    kept = live(log)
    if without_needs:
        kept -= {record.parent for record in log if record.meta.get(NEEDS)}
    for record in log:
        if record.id in kept:
            _, body = client.get(source, record.id)
            client.put(target, record.id, body, kind=record.kind, parent=record.parent, meta=record.meta)
    return len(kept), len(log)


@pytest.mark.parametrize("turns", [1, 2, 5, 9])
def test_state_that_is_stored_as_changes_is_rebuilt_from_what_is_kept(
    served: ServedController, client: Checkpoints, turns: int
) -> None:
    thread, rest = f"diary-{turns}", f"diary-{turns}-rest"
    entries = keep(client, thread, turns)
    newest = next(record for record in client.list(thread) if record.kind == "checkpoint")
    assert restorable(served, thread) == newest.id, "assignments resume from it"
    kept, total = carry(client, thread, rest)
    graph = diary(ReplicatedSaver(client))
    assert graph.get_state(config_of(rest)).values == {"entries": entries, "count": turns}
    assert graph.invoke({"entries": ["more"]}, config_of(rest))["entries"] == [*entries, "more", f"written {len(entries) + 1}"]
    assert restorable(served, rest) is not None
    assert kept < total or turns == 1
    assert kept < 25, "a full value is stored every few turns: what is kept must not grow with the thread"


def test_the_newest_checkpoint_alone_is_not_enough_and_that_is_an_error_and_no_empty_state(
    served: ServedController, client: Checkpoints
) -> None:
    keep(client, "cut", 3)
    carry(client, "cut", "cut-rest", without_needs=True)
    with pytest.raises(IncompleteHistory, match="entries"):
        diary(ReplicatedSaver(client)).get_state(config_of("cut-rest"))
    newest = next(record for record in client.list("cut-rest") if record.kind == "checkpoint")
    assert restorable(served, "cut-rest") != newest.id


def test_a_graph_that_waits_for_a_human_goes_on_from_what_is_kept(client: Checkpoints) -> None:
    graph = build(ReplicatedSaver(client))
    graph.invoke(QUESTION, config_of("voyage"))
    kept, total = carry(client, "voyage", "voyage-rest")
    assert kept < total / 2
    again = build(ReplicatedSaver(client))
    assert again.get_state(config_of("voyage-rest"), subgraphs=True).tasks[0].state.values["draft"].startswith("Draft: Seen")
    assert talk(again.invoke(Command(resume=APPROVAL), config_of("voyage-rest"))) == undisturbed()


def test_what_is_kept_does_not_grow_with_the_subgraphs_that_a_thread_went_through(client: Checkpoints) -> None:
    graph = build(ReplicatedSaver(client))
    counts = []
    for _ in range(3):
        graph.invoke(QUESTION, config_of("many"))
        graph.invoke(Command(resume=APPROVAL), config_of("many"))
        counts.append(len(live(list(reversed(client.list("many", limit=1000))))))
    assert counts[0] == counts[1] == counts[2]


def test_a_thread_that_was_deleted_leaves_the_word_that_it_was(client: Checkpoints) -> None:
    keep(client, "gone", 2)
    ReplicatedSaver(client).delete_thread("gone")
    assert carry(client, "gone", "gone-rest")[0] == 1
    assert ReplicatedSaver(client).get_tuple(config_of("gone-rest")) is None


async def test_a_conversation_is_kept_from_where_it_began(client: Checkpoints) -> None:
    session = ReplicatedSession(client, "talk")
    await session.add_items([{"role": "user", "content": "forgotten"}])
    await session.clear_session()
    for number in range(4):
        await session.add_items([{"role": "user", "content": str(number)}])
    await session.pop_item()
    assert carry(client, "talk", "talk-rest") == (6, 7)
    assert await ReplicatedSession(client, "talk-rest").get_items() == await session.get_items()
