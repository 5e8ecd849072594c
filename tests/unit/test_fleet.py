"""Which host runs which agent: the pure decision, and the manager on a real view in virtual time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.domain.fleet import (
    FleetPolicy,
    Health,
    HostSeen,
    Placement,
    StaleAttempt,
    Task,
    assign,
    check_attempt,
    check_overtaken,
    health,
    open_intents,
)
from controller.domain.model import Ack, Beat, BeatAnswer, Frame, IngestAnswer, Kind, Record, Running, SegmentRef
from controller.errors import FenceLost, NotActive, OutcomeUnknown, Refused, Unavailable
from controller.lab.virtual_time import VirtualClock, run_virtual
from controller.runtime.fleet import FleetManager
from controller.stream.delta import frame
from controller.stream.segment import Segment, SegmentHeader, encode_segment, next_chain
from controller.stream.view import View

POLICY = FleetPolicy(beat_seconds=1.0, misses_degraded=2, misses_failed=4, pool=0, pace=100)


def hosts(*names: str, capacity: int = 10, heard_at: float = 0.0) -> list[HostSeen]:
    return [HostSeen(name, capacity, heard_at) for name in names]


def record(record_id: str, kind: str, parent: str | None = None, meta: Mapping[str, str] | None = None) -> Record:
    return Record("a", record_id, kind, "0" * 64, 0, parent=parent, meta=meta or {})


# --------------------------------------------------------------------------------------------------------------- decisions


@pytest.mark.parametrize(
    ("age", "expected"),
    [
        (0.0, Health.HEALTHY),
        (1.99, Health.HEALTHY),
        (2.0, Health.DEGRADED),
        (3.99, Health.DEGRADED),
        (4.0, Health.FAILED),
        (math.nan, Health.FAILED),
        (math.inf, Health.FAILED),
    ],
)
def test_a_host_degrades_and_fails_after_its_misses(age: float, expected: Health) -> None:
    assert health(age, POLICY) is expected


def test_agents_of_a_failed_host_go_to_the_least_loaded_healthy_host_with_the_next_attempt() -> None:
    seen = [HostSeen("dead", 10, -10.0), HostSeen("busy", 10, 0.0), HostSeen("idle", 10, 0.0)]
    current = [Placement("a", "dead", 3, right_until=-1.0), Placement("b", "busy", 1), Placement("c", "busy", 1)]
    decision = assign([Task("a", 3), Task("b", 1), Task("c", 1)], seen, current, POLICY, 0.0)
    assert [(move.agent, move.host, move.attempt, move.previous) for move in decision.moves] == [("a", "idle", 4, "dead")]
    assert "silent: dead" in decision.reason


def test_an_agent_waits_while_its_silent_host_may_still_act() -> None:
    seen = [HostSeen("dead", 10, -10.0), *hosts("h")]
    current = [Placement("a", "dead", 1, right_until=3.0)]
    before = assign([Task("a", 1)], seen, current, POLICY, 2.999)
    assert before.moves == ()
    assert "may act" in before.waiting[0].why
    assert before.page == ""
    after = assign([Task("a", 1)], [HostSeen("dead", 10, -10.0), *hosts("h", heard_at=3.0)], current, POLICY, 3.0)
    assert [move.host for move in after.moves] == ["h"]


def test_an_agent_that_its_host_gave_up_is_moved_at_once() -> None:
    current = [Placement("a", "h1", 1, right_until=100.0, released=True)]
    decision = assign([Task("a", 1)], [HostSeen("h1", 0, 0.0), *hosts("h2")], current, POLICY, 0.0)
    assert [(move.host, move.attempt) for move in decision.moves] == [("h2", 2)]


def test_a_degraded_host_keeps_its_agents_and_gets_no_new_ones() -> None:
    seen = [HostSeen("slow", 10, -2.5), *hosts("ok", capacity=1)]
    decision = assign([Task("a", 1), Task("b"), Task("c")], seen, [Placement("a", "slow", 1)], POLICY, 0.0)
    assert [(move.agent, move.host) for move in decision.moves] == [("b", "ok")]
    assert decision.waiting[0].why == "every healthy host is full"


def test_without_a_healthy_host_tasks_wait_and_people_are_paged() -> None:
    decision = assign([Task("a"), Task("b")], [HostSeen("dead", 10, -10.0)], [], POLICY, 0.0)
    assert decision.moves == ()
    assert decision.page == "2 agents wait: no host is healthy"


def test_new_tasks_leave_the_reserve_free_and_failed_over_agents_use_it() -> None:
    policy = replace(POLICY, pool=1)
    fresh = assign([Task(f"t{n}") for n in range(6)], hosts("h1", "h2", "h3"), [], policy, 0.0)
    assert {move.host for move in fresh.moves} == {"h1", "h2"}
    assert fresh.pool == ("h3",)
    current = [Placement(move.agent, move.host, 1) for move in fresh.moves]
    seen = [HostSeen("h1", 10, -10.0), *hosts("h2", "h3")]
    over = assign([Task(f"t{n}", 1) for n in range(6)], seen, current, policy, 0.0)
    assert {move.host for move in over.moves} == {"h3"}
    assert over.pool_missing == 1


def test_work_goes_before_reserve() -> None:
    decision = assign([Task("a")], hosts("only"), [], replace(POLICY, pool=1), 0.0)
    assert [move.host for move in decision.moves] == ["only"]
    assert decision.pool_missing == 1


def test_the_pace_is_kept_and_agents_that_had_work_come_first() -> None:
    tasks = [Task("new-1"), Task("new-2"), Task("old-9", 4)]
    decision = assign(tasks, hosts("h"), [], replace(POLICY, pace=2), 0.0)
    assert [move.agent for move in decision.moves] == ["old-9", "new-1"]
    assert [item.agent for item in decision.waiting] == ["new-2"]
    assert decision.page == ""


def test_open_intents_are_those_that_no_done_names() -> None:
    records = [
        record("i1", Kind.INTENDED),
        record("i2", Kind.INTENDED),
        record("i3", Kind.INTENDED),
        record("d1", Kind.DONE, parent="i1"),
        record("d2", Kind.DONE, parent="i2", meta={"intent": "i3"}),
    ]
    assert open_intents(records) == ("i2",)


def test_only_the_present_attempt_may_write() -> None:
    check_attempt("a", 0, 0)
    check_attempt("a", 5, 5)
    with pytest.raises(StaleAttempt) as stale:
        check_attempt("a", 4, 5)
    assert isinstance(stale.value, FenceLost)
    with pytest.raises(StaleAttempt):
        check_attempt("a", 0, 1)
    with pytest.raises(Refused, match="greatest given out is 5"):
        check_attempt("a", 6, 5)


HOST_NAMES = st.sampled_from(["h1", "h2", "h3", "h4", "h5"])
AGENT_NAMES = st.sampled_from([f"a{n}" for n in range(12)])
SEEN = st.builds(HostSeen, HOST_NAMES, st.integers(0, 6), st.floats(-6, 0))
PLACED = st.builds(Placement, AGENT_NAMES, HOST_NAMES, st.integers(1, 9), st.floats(-3, 3), st.booleans())
TASKS = st.builds(Task, AGENT_NAMES, st.integers(0, 9))
POLICIES = st.builds(FleetPolicy, pool=st.integers(0, 3), pace=st.integers(0, 12))


@settings(max_examples=400, deadline=None)
@given(
    st.lists(TASKS, max_size=12, unique_by=lambda task: task.agent),
    st.lists(SEEN, max_size=5, unique_by=lambda host: host.host),
    st.lists(PLACED, max_size=12, unique_by=lambda placed: placed.agent),
    POLICIES,
    st.randoms(use_true_random=False),
)
def test_whatever_was_seen_no_agent_may_run_twice_and_attempts_rise(tasks, seen, placed, policy, rng) -> None:
    decision = assign(tasks, seen, placed, policy, 0.0)
    current = {item.agent: item for item in placed}
    known = {host.host: host for host in seen}
    agents = [move.agent for move in decision.moves]
    assert len(agents) == len(set(agents)) <= policy.pace
    assert {*agents} | {item.agent for item in decision.waiting} <= {task.agent for task in tasks}
    for move in decision.moves:
        last = next(task.last_attempt for task in tasks if task.agent == move.agent)
        old = current.get(move.agent)
        assert move.attempt > max(last, old.attempt if old else 0)
        assert health(0.0 - known[move.host].heard_at, policy) is Health.HEALTHY
        if old is not None:  # nobody else may act: it was given up, or its host is silent and its right has passed
            silent = old.host not in known or health(0.0 - known[old.host].heard_at, policy) is Health.FAILED
            assert old.released or (silent and old.right_until <= 0.0)
    loads = dict.fromkeys(known, 0)
    moved = {move.agent for move in decision.moves}
    for item in placed:
        if (
            item.agent not in moved
            and item.agent in {task.agent for task in tasks}
            and item.host in loads
            and not item.released
        ):
            loads[item.host] += 1
    for move in decision.moves:
        loads[move.host] += 1
    for move in decision.moves:
        assert loads[move.host] <= known[move.host].capacity
    shuffled = [list(items) for items in (tasks, seen, placed)]
    for items in shuffled:
        rng.shuffle(items)
    assert assign(*shuffled, policy, 0.0) == decision


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 60), st.integers(1, 6))
def test_with_equal_capacities_loads_differ_by_one_at_most(agents: int, count: int) -> None:
    names = [f"h{n}" for n in range(count)]
    decision = assign([Task(f"a{n}") for n in range(agents)], hosts(*names, capacity=100), [], POLICY, 0.0)
    loads = [sum(1 for move in decision.moves if move.host == name) for name in names]
    assert sum(loads) == agents
    assert max(loads) - min(loads) <= 1


# ----------------------------------------------------------------------------------------------------------------- manager


class Stream:
    """A stream with its view, without stores: what is submitted is in the view when it is acknowledged."""

    def __init__(self) -> None:
        self.view = View(None)
        self.fail: Exception | None = None
        self.lose_answer = False

    async def submit(self, frames: Sequence[Frame]) -> IngestAnswer:
        if self.fail is not None:
            raise self.fail
        seq, chain = self.view.position("s")
        segment = Segment(SegmentHeader("g", "s", seq + 1, 1, chain, 0.0), tuple(frames))
        data = encode_segment(segment.header, segment.frames)
        self.view.apply(segment, next_chain(chain, data), SegmentRef("s", seq + 1, 1), len(data))
        if self.lose_answer:
            raise OutcomeUnknown("the answer was lost")
        return IngestAnswer(1, 5.0, tuple(Ack(f.record.agent, f.record.id, "acknowledged", seq + 1, 1) for f in frames))

    async def put(self, agent: str, record_id: str, kind: str, body: bytes = b"{}", *, parent: str | None = None) -> None:
        await self.submit([frame(agent, record_id, kind, body, parent=parent)])


class World:
    """One manager whose right is as long as the test says."""

    def __init__(self, stream: Stream | None = None, policy: FleetPolicy = POLICY) -> None:
        self.stream = stream or Stream()
        self.clock = VirtualClock()
        self.right = 3.0
        self.pages: list[str] = []
        self.manager = FleetManager(
            self.stream.view,
            self.stream.submit,
            lambda: self.right,
            self.clock,
            epoch=lambda: 7,
            active_address=lambda: "http://active",
            policy=policy,
        )

    async def beat(self, host: str, capacity: int = 10, **running: int) -> BeatAnswer:
        return await self.manager.beat(Beat(host, capacity, tuple(Running(name, n) for name, n in running.items())))


def attempts(answer: BeatAnswer) -> dict[str, int]:
    return {item.agent: item.attempt for item in answer.assignments}


def test_a_task_is_assigned_only_after_its_assignment_is_in_the_stream() -> None:
    async def story() -> None:
        world = World()
        world.manager.activate()
        await world.beat("h1")
        await world.manager.create_task("a", {"copies": 2})
        world.stream.fail = Unavailable("home store")
        with pytest.raises(Unavailable):
            await world.manager.tick()
        assert attempts(await world.beat("h1")) == {}
        world.stream.fail = None
        assert (await world.manager.tick()).moved == 1
        answer = await world.beat("h1")
        assert attempts(answer) == {"a": 2}  # 1 was used up by the write that failed
        assert answer.active
        assert answer.right_seconds == 3.0
        assert answer.assignments[0].spec == {"copies": 2}
        found = world.stream.view.latest("a", Kind.ASSIGNMENT)
        assert found is not None
        assert json.loads(found[1])["host"] == "h1"

    run_virtual(story())


def test_creating_the_same_task_twice_is_one_task_and_a_finished_one_can_be_given_again() -> None:
    async def story() -> None:
        world = World()
        world.manager.activate()
        first = await world.manager.create_task("a", {"goal": "x"})
        again = await world.manager.create_task("a", {"goal": "x"})
        assert first.acks[0].id == again.acks[0].id
        await world.stream.put("a", "done-1", Kind.TASK, b'{"done":true}')
        world.manager.observe([record("done-1", Kind.TASK)])
        await world.beat("h1")
        assert (await world.manager.tick()).moved == 0
        third = await world.manager.create_task("a", {"goal": "x"})
        assert third.acks[0].id != first.acks[0].id
        assert (await world.manager.tick()).moved == 1

    run_virtual(story())


def test_agents_of_a_silent_host_move_when_its_right_has_certainly_passed() -> None:
    async def story() -> None:
        world = World()
        world.right = 6.0
        world.manager.activate()
        await world.beat("h1")
        await world.manager.create_task("a", {})
        await world.manager.tick()
        await world.beat("h1")
        granted_at = world.clock.monotonic()
        moved_at = 0.0
        for _ in range(100):
            await world.clock.sleep(0.1)
            await world.beat("h2")
            if (await world.manager.tick()).moved:
                moved_at = world.clock.monotonic()
                break
        assert 6.25 <= moved_at - granted_at <= 6.5
        assert attempts(await world.beat("h1", a=1)) == {}  # the old host is told to stop when it comes back
        assert attempts(await world.beat("h2")) == {"a": 2}
        with pytest.raises(StaleAttempt):
            world.manager.check_attempt("a", 1)
        world.manager.check_attempt("a", 2)
        assert world.manager.rights_end() >= world.clock.monotonic() + 6.0

    run_virtual(story())


def test_puts_are_signs_of_life_and_extend_what_has_to_be_waited_for() -> None:
    async def story() -> None:
        world = World()
        world.manager.activate()
        await world.beat("h1")
        await world.manager.create_task("a", {})
        await world.manager.tick()
        await world.beat("h1")
        for _ in range(50):
            await world.clock.sleep(0.2)
            await world.beat("h2")
            world.manager.granted(["a"], 3.0)
            assert (await world.manager.tick()).moved == 0

    run_virtual(story())


def test_a_host_that_offers_no_room_gives_its_agents_up_at_once() -> None:
    async def story() -> None:
        world = World()
        world.right = 100.0
        world.manager.activate()
        await world.beat("h1")
        await world.manager.create_task("a", {})
        await world.manager.tick()
        assert attempts(await world.beat("h1")) == {"a": 1}
        assert attempts(await world.beat("h1", 10, a=1)) == {"a": 1}
        await world.beat("h2")
        assert attempts(await world.beat("h1", 0)) == {}
        assert (await world.manager.tick()).moved == 1
        assert attempts(await world.beat("h2")) == {"a": 2}

    run_virtual(story())


def test_an_assignment_with_a_lost_answer_is_never_given_to_two_hosts() -> None:
    async def story() -> None:
        world = World()
        world.manager.activate()
        await world.beat("h1")
        await world.beat("h2")
        await world.manager.create_task("a", {})
        world.stream.lose_answer = True
        with pytest.raises(OutcomeUnknown):
            await world.manager.tick()
        world.stream.lose_answer = False
        await world.manager.tick()
        given = [attempts(await world.beat("h1")), attempts(await world.beat("h2"))]
        assert sorted(map(len, given)) == [0, 1]
        assert next(iter(given[0].values() or given[1].values())) == 2

    run_virtual(story())


def test_a_restarted_controller_keeps_agents_where_they_are_and_attempts_rising() -> None:
    async def story() -> None:
        stream = Stream()
        first = World(stream)
        first.manager.activate()
        await first.beat("h1")
        await first.manager.create_task("a", {})
        await first.manager.tick()
        second = World(stream)
        second.manager.activate()
        assert (await second.manager.tick()).moved == 0  # h1 gets the time that a beat may take
        assert attempts(await second.beat("h1", 10, a=1)) == {"a": 1}
        await second.clock.sleep(10.0)
        await second.beat("h2")
        assert (await second.manager.tick()).moved == 1
        assert attempts(await second.beat("h2")) == {"a": 2}

    run_virtual(story())


def test_a_standby_remembers_hosts_and_hands_nothing_out() -> None:
    async def story() -> None:
        world = World()
        world.right = 0.0
        answer = await world.beat("h1")
        assert not answer.active
        assert answer.right_seconds == 0.0
        assert answer.active_address == "http://active"
        assert world.manager.rights_end() == -math.inf
        assert world.manager.hosts() == {"h1": Health.HEALTHY}
        with pytest.raises(NotActive):
            await world.manager.tick()
        with pytest.raises(NotActive):
            await world.manager.create_task("a", {})

    run_virtual(story())


def test_a_promotion_resumes_every_unfinished_task_from_its_last_checkpoint_at_a_pace() -> None:
    async def story() -> None:
        stream = Stream()
        old = World(stream)
        old.manager.activate()
        await old.beat("old-1", 1000)
        for n in range(40):
            await old.manager.create_task(f"a{n:02d}", {"n": n})
        await old.manager.tick()
        for n in range(40):
            await stream.put(f"a{n:02d}", "00000001", Kind.CHECKPOINT, b"one")
            await stream.put(f"a{n:02d}", "00000002", Kind.CHECKPOINT, b"two")
        await stream.put("a07", "effect-1", Kind.INTENDED)
        await stream.put("a08", "effect-1", Kind.INTENDED)
        await stream.put("a08", "effect-1-done", Kind.DONE, parent="effect-1")
        await stream.put("a09", "finished", Kind.TASK, b'{"done":true}')

        new = World(stream)
        await new.beat("new-1", 1000)
        await new.beat("new-2", 1000)
        new.manager.activate()
        began = new.clock.monotonic()
        summary = await new.manager.resume_all(20.0)
        assert (summary["assigned"], summary["held"], summary["waiting"], summary["page"]) == (39, 1, 0, "")
        assert 1.9 <= new.clock.monotonic() - began <= 2.5
        agents = summary["agents"]
        assert isinstance(agents, dict)
        assert agents["a00"] == {"host": agents["a00"]["host"], "attempt": 2, "resume_id": "00000002", "held": False}
        assert agents["a07"]["held"]
        assert not agents["a08"]["held"]
        assert "a09" not in agents
        given = [(await new.beat(host, 1000)).assignments for host in ("new-1", "new-2")]
        assert sorted(map(len, given)) == [19, 20]
        assert (await new.manager.resume_all(20.0))["assigned"] == 0  # idempotent
        assert new.manager.held() == ("a07",)
        await stream.put("a07", "effect-1-done", Kind.DONE, parent="effect-1")  # a person decided
        answers = [await new.beat(host, 1000) for host in ("new-1", "new-2")]
        assert not any(item.held for answer in answers for item in answer.assignments)

    run_virtual(story())


def test_nobody_is_moved_before_the_step_resume_of_a_promotion() -> None:
    async def story() -> None:
        stream = Stream()
        old = World(stream)
        old.manager.activate()
        await old.manager.create_task("a", {})
        new = World(stream)
        await new.beat("h1")
        new.manager.activate(paused=True)
        assert (await new.manager.tick()).moved == 0
        assert (await new.manager.resume_all(100.0))["assigned"] == 1

    run_virtual(story())


def test_a_drain_that_is_aborted_forgets_neither_rights_nor_used_numbers() -> None:
    async def story() -> None:
        world = World()
        world.manager.activate()
        await world.beat("h1")
        await world.manager.create_task("a", {})
        world.stream.fail = Unavailable("home store")
        with pytest.raises(Unavailable):
            await world.manager.tick()
        world.stream.fail = None
        end = world.manager.rights_end()
        world.manager.deactivate()
        assert not (await world.beat("h1")).active
        world.manager.activate()
        assert world.manager.rights_end() == end
        await world.manager.tick()
        assert attempts(await world.beat("h1")) == {"a": 2}

    run_virtual(story())


def test_a_promotion_without_hosts_lets_tasks_wait_and_says_so() -> None:
    async def story() -> None:
        stream = Stream()
        old = World(stream)
        old.manager.activate()
        await old.manager.create_task("a", {})
        new = World(stream)
        new.manager.activate()
        summary = await new.manager.resume_all(100.0)
        assert (summary["assigned"], summary["waiting"]) == (0, 1)
        assert "no host is healthy" in str(summary["page"])

    run_virtual(story())


def test_kinds_that_only_controllers_write_are_refused_from_agents() -> None:
    async def story() -> None:
        world = World()
        for kind in (Kind.ASSIGNMENT, Kind.OPENING, Kind.CANARY):
            with pytest.raises(Refused):
                world.manager.check_attempt("a", 0, kind)
        world.manager.check_attempt("a", 0, Kind.CHECKPOINT)

    run_virtual(story())


@pytest.mark.parametrize(
    ("by", "seen", "newest_by", "newest_epoch", "fenced"),
    [
        ("me", 3, "other", 4, True),  # somebody else went on while this one slept
        ("me", 3, "", 4, True),  # a person restored the agent, a controller wrote
        ("me", 3, "me", 4, False),  # its own: what it had in flight was taken in the new epoch
        ("me", 3, "other", 3, False),  # nobody went on since it wrote last
        ("me", 3, "other", 2, False),
        ("me", 3, "other", 0, False),  # from before what is kept
    ],
)
def test_a_writer_that_slept_is_overtaken_only_by_somebody_else_in_a_later_epoch(
    by: str, seen: int, newest_by: str, newest_epoch: int, fenced: bool
) -> None:
    if not fenced:
        check_overtaken("agent", by, seen, newest_by, newest_epoch)
        return
    with pytest.raises(StaleAttempt, match="went on without this process"):
        check_overtaken("agent", by, seen, newest_by, newest_epoch)
