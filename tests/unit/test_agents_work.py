"""The lab's agents do deterministic work, whatever happens to them, and never under a stale attempt."""

from __future__ import annotations

import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from controller.agent import AsyncCheckpoints
from controller.errors import Misconfigured
from controller.lab import work
from controller.lab.agents import AgentHost, Ledger, arguments
from controller.lab.virtual_time import VirtualClock, run_virtual
from tests.support.agent_wire import Store, WireController, WireTransport

CORPUS = work.load_corpus()
URL = "http://a:1"


def undisturbed(agent: str, steps: int) -> list[bytes]:
    state = work.begin(agent, {})
    bodies = []
    for _ in range(steps):
        state = work.step(state, CORPUS)
        bodies.append(work.encode(state))
    return bodies


def test_every_python_brings_a_corpus_along() -> None:
    assert len(CORPUS.passages) > 50
    assert work.load_corpus() == CORPUS


def test_a_directory_can_be_the_corpus_and_an_empty_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="no text files"):
        work.load_corpus(tmp_path)
    (tmp_path / "b.md").write_text("# Heading\n\nSome words about replication of checkpoints.\n")
    (tmp_path / "a.bin").write_bytes(b"\x00\x01")
    corpus = work.load_corpus(tmp_path)
    assert [where for where, _ in corpus.passages] == ["b.md:0"]
    assert work.step(work.begin("x", {}), corpus)["step"] == 1


def test_a_step_depends_on_the_state_and_the_corpus_alone() -> None:
    state = work.begin("agent-1", {"goal": "x"})
    before = work.encode(state)
    first, second = work.step(state, CORPUS), work.step(state, CORPUS)
    assert work.encode(first) == work.encode(second)
    assert work.encode(state) == before
    assert work.encode(work.step(work.begin("agent-2", {"goal": "x"}), CORPUS)) != work.encode(first)


def test_every_tool_gives_an_answer_for_every_passage() -> None:
    for _, text in CORPUS.passages[:: max(1, len(CORPUS.passages) // 40)]:
        for tool in work.TOOLS.values():
            assert tool(text, 3) == tool(text, 3) != ""
    for tool in work.TOOLS.values():
        assert tool("", 0)


def test_a_resumed_agent_has_the_same_states_as_one_that_was_never_moved() -> None:
    bodies = undisturbed("agent-1", 60)
    for at in (0, 7, 31):
        state = work.decode(bodies[at], "agent-1")
        for expected in bodies[at + 1 :]:
            state = work.step(state, CORPUS)
            assert work.encode(state) == expected


def test_states_grow_and_stay_below_their_bound() -> None:
    state = work.begin("agent-1", {})
    sizes = []
    for _ in range(400):
        state = work.step(state, CORPUS)
        sizes.append(len(work.encode(state)))
    assert max(sizes) <= work.STATE_MAX_BYTES
    assert max(sizes) > work.STATE_MAX_BYTES // 2
    assert state["notes"]
    assert state["step"] == 400


def test_a_foreign_state_is_not_taken() -> None:
    body = undisturbed("agent-1", 1)[0]
    with pytest.raises(Misconfigured, match="agent-1"):
        work.decode(body, "agent-2")
    for bad in (b"", b"[]", b'{"agent":"x"}', b"\xff"):
        with pytest.raises(Misconfigured):
            work.decode(bad, "x")


def test_a_step_is_cheap() -> None:
    state = work.begin("agent-1", {})
    began = time.process_time()
    for _ in range(200):
        state = work.step(state, CORPUS)
    assert (time.process_time() - began) / 200 < 0.05  # loose: two noisy cores


def test_one_in_so_many_is_a_payment_agent() -> None:
    specs = work.fleet_specs(20, payment_every=5)
    assert [name for name, spec in specs.items() if spec["copies"] == 2] == [f"payment-{n:04d}" for n in (5, 10, 15, 20)]


# -------------------------------------------------------------------------------------------------------------------- host


class World:
    """One controller and hosts in virtual time."""

    def __init__(self, directory: Path) -> None:
        self.store = Store()
        self.controller = WireController(URL, self.store, right_seconds=3.0)
        self.transport = WireTransport(self.controller)
        self.clock = VirtualClock()
        self.directory = directory

    def host(self, name: str, **options: Any) -> AgentHost:
        client = AsyncCheckpoints(
            [URL], clock=self.clock, transport=self.transport, rng=random.Random(1), follow_hints=False, attempt_seconds=2.0
        )
        ledger = Ledger(self.directory / f"{name}.jsonl", name, self.clock)
        self.client = client
        return AgentHost(
            name,
            client,
            CORPUS,
            ledger,
            clock=self.clock,
            rng=random.Random(2),
            state_file=self.directory / f"{name}.state",
            put_seconds=2.0,
            **options,
        )

    def assign(self, agent: str, attempt: int, resume_id: str | None = None, *, held: bool = False, **spec: object) -> None:
        self.controller.assignments = [{"agent": agent, "attempt": attempt, "spec": spec, "resume_id": resume_id, "held": held}]
        self.store.attempts[agent] = attempt

    def events(self, host: str, *kinds: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.directory / f"{host}.jsonl").read_text().splitlines()]
        return [line for line in lines if not kinds or line["event"] in kinds]

    async def run(self, host: AgentHost, seconds: float) -> None:
        task = asyncio.get_running_loop().create_task(host.serve())
        await self.clock.sleep(seconds)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_a_host_runs_what_it_is_assigned_and_its_ledger_holds_what_was_acknowledged(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.assign("agent-1", 1, copies=2)
        await world.run(world.host("h1"), 10.0)
        acks = world.events("h1", "ack")
        assert 8 <= len(acks) <= 14
        expected = undisturbed("agent-1", len(acks))
        for n, (ack, body) in enumerate(zip(acks, expected, strict=True), 1):
            record, stored = world.store.records["agent-1", f"{n:08d}"]
            assert stored == body
            assert (ack["id"], ack["step"], ack["sha256"], ack["copies"]) == (record.id, n, record.sha256, 2)
            assert (record.attempt, record.copies, ack["attempt"]) == (1, 2, 1)
            assert record.parent == (f"{n - 1:08d}" if n > 1 else None)
        assert world.controller.beats[-1] == {"host": "h1", "capacity": 0, "agents": []}
        assert json.loads((tmp_path / "h1.state").read_text())["epoch"] == 5

    run_virtual(story())


def test_a_moved_agent_goes_on_from_exactly_the_named_record_with_the_same_states(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.assign("agent-1", 1)
        await world.run(world.host("h1"), 6.0)
        last = world.store.ids("agent-1")[-1]
        world.assign("agent-1", 2, last)
        await world.run(world.host("h2"), 6.0)
        (resume,) = world.events("h2", "resume")
        assert (resume["id"], resume["sha256"]) == (last, world.store.records["agent-1", last][0].sha256)
        ids = world.store.ids("agent-1")
        assert ids == [f"{n + 1:08d}" for n in range(len(ids))]
        assert len(ids) > int(last) + 3
        assert [world.store.records["agent-1", name][1] for name in ids] == undisturbed("agent-1", len(ids))

    run_virtual(story())


def test_a_host_that_nobody_answers_stops_when_its_right_has_passed(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.assign("agent-1", 1)
        host = world.host("h1")
        task = asyncio.get_running_loop().create_task(host.serve())
        await world.clock.sleep(5.0)
        steps = len(world.store.ids("agent-1"))
        cut_at = world.clock.wall()
        world.transport.by_url.clear()
        await world.clock.sleep(10.0)
        (stopped,) = world.events("h1", "stopped")
        assert stopped["at"] - cut_at <= 3.01
        assert len(world.store.ids("agent-1")) == steps
        world.transport.by_url[URL] = world.controller
        world.assign("agent-1", 1, world.store.ids("agent-1")[-1])
        await world.clock.sleep(5.0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        ids = world.store.ids("agent-1")
        assert len(ids) > steps + 2
        assert [world.store.records["agent-1", name][1] for name in ids] == undisturbed("agent-1", len(ids))

    run_virtual(story())


def test_an_agent_whose_attempt_went_stale_stops_at_its_next_write(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.assign("agent-1", 1)
        host = world.host("h1")
        task = asyncio.get_running_loop().create_task(host.serve())
        await world.clock.sleep(4.0)
        steps = len(world.store.ids("agent-1"))
        world.store.attempts["agent-1"] = 2  # given to another host
        world.controller.assignments = []
        await world.clock.sleep(4.0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert len(world.store.ids("agent-1")) <= steps + 1
        assert world.events("h1", "fenced", "stopped")

    run_virtual(story())


def test_a_held_agent_does_not_start(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.assign("agent-1", 1, held=True)
        await world.run(world.host("h1"), 5.0)
        assert world.store.ids("agent-1") == []
        assert [event["attempt"] for event in world.events("h1", "held")] == [1]

    run_virtual(story())


def test_a_task_with_a_last_step_is_finished_by_its_agent(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.assign("agent-1", 1, steps=3)
        host = world.host("h1", step_seconds=0.5)

        def unassign(controller: WireController, moment: str) -> None:
            if any(record.kind == "task" for record, _ in controller.store.records.values()):
                controller.assignments = []

        world.controller.fault = unassign
        await world.run(host, 8.0)
        record, body = next(item for item in world.store.records.values() if item[0].kind == "task")
        assert json.loads(body) == {"done": True, "steps": 3}
        assert record.attempt == 1
        assert len(world.events("h1", "finished")) == 1

    run_virtual(story())


def test_the_command_line_has_the_documented_options() -> None:
    options = arguments(["--host", "h", "--controllers", "http://a:1,http://b:1", "--capacity", "7", "--ledger", "x.jsonl"])
    assert (options.host, options.capacity, options.ledger, options.corpus) == ("h", 7, Path("x.jsonl"), None)
