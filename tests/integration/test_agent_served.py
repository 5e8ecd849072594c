"""The client against real controllers over real HTTP: names, batches of one agent, pages of agents."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from controller.agent import Checkpoints, Letter, NotAllAcknowledged
from controller.domain.model import Ack
from controller.errors import Conflict, NotFound, Refused
from tests.support.served import ServedController

NAMES = [".", "..", "...", "a/b", "/", "../../status", "%2E%2E", "a b", "ü€😀", "?x=1#y", "a+b&c=d", "x" * 200]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedController]:
    with ServedController(tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: ServedController) -> Iterator[Checkpoints]:
    with Checkpoints(served.urls, timeout_seconds=30.0) as one:
        yield one


def test_every_visible_name_is_an_agent_and_a_record_of_its_own(client: Checkpoints) -> None:
    for number, name in enumerate(NAMES):
        client.put(name, name, f"body {number}".encode())
    for number, name in enumerate(NAMES):
        record, body = client.get(name, name)
        assert (record.agent, record.id, body) == (name, name, f"body {number}".encode())
        found = client.latest(name)
        assert found is not None
        assert found[1] == body
        assert [one.id for one in client.list(name)] == [name]
        assert client.list(name, before=name) == ()
        assert client.create_task(name, {"number": number}).status == "acknowledged"
        with pytest.raises(NotFound):
            client.get(name, "nothing")
    assert {one.agent for one in client.agents()} >= set(NAMES)


def test_a_batch_of_one_agent_is_stored_in_order_and_every_body_is_read_back(client: Checkpoints) -> None:
    """Deltas in it stand on records of the same batch, which no controller has seen before."""
    state = b"".join(b"a line %d of a state that repeats itself\n" % n for n in range(500))
    letters = [Letter("batch", f"{n:04d}", "checkpoint", state + b"step %d\n" % n * n) for n in range(150)]
    acks = client.put_many(letters)
    assert {ack.status for ack in acks} == {"acknowledged"}
    assert [ack.seq for ack in acks] == sorted(ack.seq for ack in acks)
    assert [one.id for one in reversed(client.list("batch", limit=1000))] == [letter.id for letter in letters]
    for letter in letters[::10]:
        assert client.get("batch", letter.id)[1] == letter.body
    assert {ack.status for ack in client.put_many(letters)} == {"duplicate"}


def test_a_conflict_in_a_batch_leaves_the_rest_of_it_in_order(client: Checkpoints) -> None:
    client.put("torn", "0003", b"somebody else's")
    letters = [Letter("torn", f"{n:04d}", "checkpoint", b"a growing state, " * (20 + n)) for n in range(8)]
    with pytest.raises(NotAllAcknowledged) as error:
        client.put_many(letters)
    assert [type(one) for one in error.value.results] == [Ack, Ack, Ack, Conflict, Ack, Ack, Ack, Ack]
    assert [one.id for one in reversed(client.list("torn"))] == ["0003", "0000", "0001", "0002", "0004", "0005", "0006", "0007"]
    assert client.get("torn", "0007")[1] == letters[7].body


def test_agents_are_listed_page_by_page_and_no_answer_is_unbounded(client: Checkpoints) -> None:
    names = [f"page/{n:03d}" for n in range(25)]
    client.put_many([Letter(name, "1", "checkpoint", b"x") for name in names])
    found: list[str] = []
    while page := client.agents(prefix="page/", limit=10, after=found[-1] if found else ""):
        assert len(page) <= 10
        found += [one.agent for one in page]
    assert found == names
    with pytest.raises(Refused, match="limit"):
        client.agents(limit=1001)
