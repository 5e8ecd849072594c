"""A group of several streams: shared out over a region's instances, moved when one dies, promoted together.

``CRASHES`` and ``STREAM_SEEDS``: how many crash points and how many random runs are tried with two streams.
"""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest

from controller.agent.rights import Right
from controller.domain.fleet import FleetPolicy
from controller.domain.model import Beat, Kind, Role, Running
from controller.domain.promotion import Progress, State
from controller.domain.sharing import stream_of
from controller.errors import DrError, FenceLost, NotActive, WrongGroup
from controller.lab.virtual_time import run_virtual
from controller.runtime.documents import read
from controller.runtime.intake import Intake
from controller.runtime.service import JournalEntry
from controller.stream.segment import frame
from tests.simulation import runs, test_crashes
from tests.simulation.checkers import check_all, live_histories, lost_acks, settle
from tests.simulation.test_guards import is_authorization
from tests.simulation.world import ETCD, HOME, PEOPLE, STREAM, TARGET, Instance, World

CRASHES = int(os.environ.get("CRASHES", "24"))
STREAM_SEEDS = int(os.environ.get("STREAM_SEEDS", "4"))


def run(keys_dir: Path, story: Callable[[World], Awaitable[None]], streams: int = 3) -> World:
    """A group that serves, and then ``story``; everything that must hold holds at the end."""
    worlds: list[World] = []

    async def whole() -> None:
        world = World(keys_dir, stream={"streams": streams})
        worlds.append(world)
        await world.served(agents=8, seconds=2.0)
        await story(world)
        check_all(world)

    run_virtual(whole(), limit_seconds=3000)
    return worlds[0]


def shares(world: World) -> list[int]:
    held = [instance.key for instance in world.serving().values()]
    return sorted(held.count(key) for key in set(held))


def agent_in(world: World, stream: str, but: str = "") -> str:
    """The name of an agent that belongs to this stream."""
    names = (f"host-agent-{number}" for number in range(1000))
    return next(name for name in names if name != but and stream_of(name, len(world.streams)) == stream)


async def silent(world: World) -> None:
    async def nobody() -> bool:
        return not await world.holders()

    await world.until(nobody, 30, "the leases running out")
    await world.wait(0.6)


# ------------------------------------------------------------------------------------------------------------ sharing out


def test_streams_are_shared_out_and_stay_where_they_are(keys_dir: Path) -> None:
    async def story(world: World) -> None:
        assert shares(world) == [1, 2]
        before = world.serving()
        acked = {ack.stream for ack in world.acks}
        assert acked == set(world.streams)
        assert len({ack.instance for ack in world.acks}) == 2, "both instances take records, of whichever stream"
        assert any(len(way) == 1 for way in world.hops), "some of them had to be handed over"
        await world.wait(40.0)
        assert world.serving() == before
        assert world.history.given_up == []
        await settle(world)
        assert [lost_acks(world, live) for live in live_histories(world)] == [[], [], []]

    run(keys_dir, story)


def test_an_instance_that_dies_leaves_its_streams_to_its_neighbour_and_gets_some_back(keys_dir: Path) -> None:
    async def story(world: World) -> None:
        lead = world.serving()[STREAM]
        count = len(world.acks)
        await world.kill(HOME, lead.name)
        await world.wait(0.5)
        left = set(world.serving())
        assert left
        assert STREAM not in left
        await world.until(world.active_somewhere, 30, "the neighbour serving everything")
        assert {ack.stream for ack in world.acks[count:]} >= left, "the other streams were not stopped"
        assert shares(world) == [3]
        world.start(HOME, lead.name)
        await world.until(lambda: shares(world) == [1, 2], 60, "the streams being shared out again")
        assert len(world.history.given_up) == 1
        await world.wait(30.0)
        assert len(world.history.given_up) == 1, "and then nothing moves"
        await settle(world)
        assert [lost_acks(world, live) for live in live_histories(world)] == [[], [], []]

    run(keys_dir, story)


def test_a_stream_is_not_left_alone_because_a_member_lives_that_cannot_acquire(keys_dir: Path) -> None:
    async def story(world: World) -> None:
        last = world.serving()[world.streams[1]]
        await world.kill(HOME, last.name)
        await world.until(world.active_somewhere, 30, "the neighbour serving everything")
        world.start(HOME, last.name)

        async def before(call: test_crashes.Call) -> None:
            if call.instance.key == last.key and any("/holder/" in key for key in call.keys):
                raise test_crashes.Unavailable("it may not write holders", hint="a test did it")

        with world.effects(before):
            await world.until(lambda: len(world.history.given_up) == 1, 60, "a stream being given up")
            await world.wait(5.0)
            await world.until(world.active_somewhere, 40, "everything being served all the same")
            await world.wait(60.0)
            assert len(world.history.given_up) == 1, "what nobody took is kept"
            assert shares(world) == [3]

    run(keys_dir, story)


def test_people_are_told_once_of_a_stream_that_nobody_holds_for_long(keys_dir: Path) -> None:
    async def story(world: World) -> None:
        stream = world.streams[1]
        victim = world.serving()[stream]

        async def before(call: test_crashes.Call) -> None:
            if any(key.endswith(f"/holder/{stream}") for key in call.keys):
                raise test_crashes.Unavailable("nobody may hold it", hint="a test did it")

        with world.effects(before):
            await world.kill(HOME, victim.name)
            await world.until(lambda: any(stream in page.title for page in world.pager.pages), 60, "people being told")
            await world.wait(10.0)
        assert sum(stream in page.title for page in world.pager.pages) == 1
        assert stream in (await world.standby(TARGET).status()).sentence
        await world.until(world.active_somewhere, 30, "the stream being held again")
        await world.wait(2.0)
        assert [i.kind for i in await world.standby(TARGET).incidents()] == []

    run(keys_dir, story)


def test_a_number_of_streams_that_is_not_the_groups_own_is_refused(keys_dir: Path) -> None:
    async def whole() -> None:
        world = World(keys_dir, stream={"streams": 2})
        await world.found()
        instance = world.start(HOME, "a", stream={"streams": 3})
        assert instance.main is not None
        with pytest.raises(WrongGroup, match="founded with 2"):
            await instance.main
        assert await world.holders() == []

    run_virtual(whole(), limit_seconds=100)


# ------------------------------------------------------------------------------------------------------------- promotions


@pytest.mark.parametrize("kind", ["failover", "switchover"])
def test_a_promotion_moves_all_streams_together(kind: str, keys_dir: Path) -> None:
    async def story(world: World) -> None:
        if kind == "failover":
            await world.lose_region(HOME)
            await silent(world)
        plan = await world.order(kind, TARGET)
        await world.reached(plan, State.DONE)
        assert world.active_in(TARGET)
        assert shares(world) == [1, 2]
        for stream in world.streams:
            progress = await read(world.coordinator, world.keys.progress(plan, stream), Progress)
            assert progress is not None
            assert progress.value.open
        entry = await read(world.coordinator, world.keys.journal(plan, "catch-up"), JournalEntry)
        assert entry is not None
        assert set(entry.value.data["streams"]) == set(world.streams)  # type: ignore[call-overload]
        if kind == "failover":
            world.bring_back(HOME)
        await settle(world)
        if kind == "switchover":
            assert [lost_acks(world, live) for live in live_histories(world)] == [[], [], []]
        await world.reached(await world.order("failback", HOME), State.DONE)
        await settle(world)

    run(keys_dir, story)


def test_a_loss_of_one_stream_alone_holds_all_until_people_approve_it_for_the_group(keys_dir: Path) -> None:
    """One of the target's instances does not reach the store that has the tail; its neighbour does."""

    async def story(world: World) -> None:
        world.isolate_stores_of(HOME)
        await world.wait(14.0)
        for name in ("a", "b"):
            await world.kill(HOME, name)
        await silent(world)
        document = await world.propose("failover", TARGET)
        assert document.record.plan.evidence.loss.exact

        async def after(call: test_crashes.Call) -> None:
            if is_authorization(call):
                world.cut(HOME, f"{TARGET}/b")

        with world.effects(None, after):
            plan = await world.let_run(document)
            await world.reached(plan, State.HOLDING)
        await world.wait(5.0)
        record = await world.plan(plan)
        assert record.state is State.HOLDING
        assert record.final_loss is not None
        assert not record.final_loss.exact
        assert world.actives() == [], "the stream that would lose nothing waits, too"
        known = [(await read(world.coordinator, world.keys.progress(plan, stream), Progress)) for stream in world.streams]
        assert {seen.value.loss.exact for seen in known if seen is not None} == {True, False}
        assert sum("the loss is worse" in page.title for page in world.pager.pages) == 1
        asked = await world.standby(TARGET).plan(plan)
        for who in PEOPLE[:2]:
            await world.approve(world.standby(TARGET), asked, who)
        await world.reached(plan, State.DONE)
        assert world.active_in(TARGET)
        done = await world.plan(plan)
        assert done.final_loss is not None
        assert not done.final_loss.exact
        lost = [len(lost_acks(world, live)) for live in live_histories(world)]
        assert sum(count > 0 for count in lost) >= 1
        assert 0 in lost, "the other instance's streams lost nothing"

    run(keys_dir, story)


def test_a_stream_that_opened_keeps_its_loss_when_its_holder_dies_before_the_plan_goes_on(keys_dir: Path) -> None:
    async def story(world: World) -> None:
        world.isolate_stores_of(HOME)
        await world.wait(4.0)
        await world.lose_region(HOME)
        await silent(world)
        document = await world.propose("failover", TARGET)
        assert not document.record.plan.evidence.loss.exact
        killed: list[Instance] = []

        async def after(call: test_crashes.Call) -> None:
            opens = any("/progress/" in key for key in call.keys) and any("/forks/" in key for key in call.keys)
            if opens and not killed:
                killed.append(call.instance)
                world.die(call.instance)
                raise test_crashes.asyncio.CancelledError

        with world.effects(None, after):
            plan = await world.let_run(document)
            await world.until(lambda: bool(killed), 60, "a stream opening")
            await world.reached(plan, State.DONE)
        record = await world.plan(plan)
        assert record.final_loss is not None
        assert not record.final_loss.exact, "the loss of the first opening, not the nothing of the second"
        world.start(TARGET, killed[0].name)
        world.bring_back(HOME)
        await settle(world)

    run(keys_dir, story)


def test_a_planned_move_is_called_off_when_one_stream_has_nobody_to_drain_it(keys_dir: Path) -> None:
    async def story(world: World) -> None:
        document = await world.propose("switchover", TARGET)
        victim = world.serving()[world.streams[1]]

        async def after(call: test_crashes.Call) -> None:
            moves = any(key.endswith("/authority") for key in call.keys) and any("/plans/" in key for key in call.keys)
            if moves and victim.alive:
                world.die(victim)

        with world.effects(None, after):
            plan = await world.let_run(document)
            await world.until(partial(_ended, world, plan), 90, "the plan ending")
        assert await world.plan_state(plan) is State.ABORTED
        await world.until(lambda: world.active_in(HOME), 40, "home serving everything again")
        await settle(world)
        assert [lost_acks(world, live) for live in live_histories(world)] == [[], [], []]

    run(keys_dir, story)


async def _ended(world: World, plan: str) -> bool:
    return (await world.plan(plan)).ended


# ------------------------------------------------------------------------------------------------------ crashes and chaos


@pytest.fixture
def two_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stories of the other file, with two streams."""
    monkeypatch.setattr(test_crashes, "World", partial(World, stream={"streams": 2}))


@pytest.mark.parametrize("kind", test_crashes.KINDS)
@pytest.mark.usefixtures("two_streams")
def test_crashes_of_either_holder_lead_to_the_same_end(kind: str, keys_dir: Path) -> None:
    calls = run_virtual(test_crashes.story(keys_dir, kind, []), limit_seconds=600)
    points = [(number, fault) for number in range(1, len(calls) + 1) for fault in test_crashes.FAULTS]
    chosen = random.Random(f"two streams {kind}").sample(points, min(CRASHES, len(points)))
    strikes = [[test_crashes.Strike(number, fault)] for number, fault in chosen]
    wrong = [text for strike in strikes for text in test_crashes._try(keys_dir, kind, strike, calls)]
    assert not wrong, f"{len(wrong)} of {len(chosen)} points: " + "\n\n".join(wrong)


def test_whatever_happens_every_promise_holds_for_every_stream(keys_dir: Path) -> None:
    outcomes = [runs.run(keys_dir, seed, streams=2) for seed in range(STREAM_SEEDS)]
    assert [outcome.violation for outcome in outcomes if outcome.violation] == []
    assert sum(outcome.promotions for outcome in outcomes) > 0 or len(outcomes) < 5, "the faults left nothing to look at"


# ------------------------------------------------------------------------------------------------- agents, hosts, rights


def test_any_instance_takes_any_record_and_a_fresh_read_has_it(keys_dir: Path) -> None:
    async def story(world: World) -> None:
        instances = sorted({instance.key: instance for instance in world.serving().values()}.items())
        for number in range(20):
            (_, writes), (_, reads) = instances if number % 2 else reversed(instances)
            agent, body = f"walker-{number}", f"body {number}".encode()
            acks = await world.put_to(writes, [frame(agent, "1", Kind.CHECKPOINT, body)], [body])
            assert acks[0].status == "acknowledged"
            await world.ask(reads, reads.controller.settle(agent))
            assert (await reads.controller.read(agent, "1"))[1] == body
        standby = world.someone(TARGET)
        with pytest.raises(NotActive):
            await standby.controller.settle("walker-1")
        with pytest.raises(NotActive) as told:
            await standby.controller.ingest([frame("walker-1", "2", Kind.CHECKPOINT, b"")])
        assert told.value.active is not None

    run(keys_dir, story)


def test_a_batch_is_answered_record_by_record_when_one_holder_is_gone(keys_dir: Path) -> None:
    async def story(world: World) -> None:
        serving = world.serving()
        gone = next(instance for instance in serving.values() if instance is not serving[STREAM])
        agents = [agent_in(world, stream) for stream in world.streams]
        await world.kill(HOME, gone.name)
        answer = await world.ask(
            serving[STREAM], serving[STREAM].controller.ingest([frame(agent, "1", Kind.CHECKPOINT, b"x") for agent in agents])
        )
        statuses = {stream: ack.status for stream, ack in zip(world.streams, answer.acks, strict=True)}
        assert statuses == {stream: "failed" if serving[stream] is gone else "acknowledged" for stream in world.streams}
        failed = next(ack for ack in answer.acks if ack.status == "failed")
        assert failed.error is not None
        assert failed.error["code"] in ("unavailable", "not_active")
        assert set(answer.epochs) == {stream for stream in world.streams if serving[stream] is not gone}

    run(keys_dir, story)


class _Host:
    """A host that counts its right as the agents' client does."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.right = Right(world.clock)
        self.runs: dict[str, int] = {}

    async def beat(self, lead: Instance) -> None:
        sent_at = self.world.clock.monotonic()
        running = tuple(Running(agent, attempt) for agent, attempt in self.runs.items())
        answer = await self.world.ask(lead, lead.controller.beat(Beat(self.name, 4, running)))
        if answer.active:
            self.right.extend(sent_at, answer.right_seconds)
            self.runs = {given.agent: given.attempt for given in answer.assignments if not given.held}

    async def write(self, holder: Instance, agent: str, record_id: str) -> str:
        sent_at = self.world.clock.monotonic()
        one = frame(agent, record_id, Kind.CHECKPOINT, b"state", attempt=self.runs[agent])
        answer = await self.world.ask(holder, holder.controller.ingest([one]))
        if answer.acks[0].status == "acknowledged":
            self.right.extend(sent_at, answer.right_seconds)
        return str((answer.acks[0].error or {}).get("code", answer.acks[0].status))


@pytest.mark.parametrize("careless", [False, True], ids=["as it is", "every holder lends hosts a right"])
def test_a_host_that_is_silent_to_the_lead_stops_before_its_agent_runs_elsewhere(
    careless: bool, keys_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on writing to another stream's holder, which must not keep it alive: without that rule it would act still."""
    if careless:
        monkeypatch.setattr(Intake, "_lend", lambda self, accepted, remaining: remaining)
    overlaps: list[float] = []

    async def story(world: World) -> None:
        other = next(stream for stream in world.streams if world.serving()[stream] is not world.serving()[STREAM])
        lead, holder = world.serving()[STREAM], world.serving()[other]
        agent = agent_in(world, other)
        first, second = _Host(world, "first"), _Host(world, "second")
        await first.beat(lead)
        await world.ask(lead, lead.controller.create_task(agent, {"do": "something"}))

        async def assigned(host: _Host) -> bool:
            await host.beat(lead)
            return agent in host.runs

        await world.until(partial(assigned, first), 20, "the first host being given the agent")
        policy: FleetPolicy = lead.controller._fleet._policy
        for step in range(400):
            outcome = await first.write(holder, agent, f"{step}")
            await second.beat(lead)
            if agent in second.runs:
                overlaps.append(first.right.remaining())
                assert await first.write(holder, agent, "late") == "stale_attempt"
                break
            assert outcome in ("acknowledged", "stale_attempt")
            await world.wait(0.1)
        else:
            raise AssertionError(f"the agent was never moved ({policy})")
        assert second.runs[agent] > first.runs[agent]

    run(keys_dir, story)
    assert (overlaps[0] > 0) is careless, overlaps


def test_only_the_leads_holder_writes_assignments_and_only_greater_ones(keys_dir: Path) -> None:
    async def story(world: World) -> None:
        other = next(stream for stream in world.streams if world.serving()[stream] is not world.serving()[STREAM])
        lead, holder = world.serving()[STREAM], world.serving()[other]
        agent = agent_in(world, other)

        def assignment(attempt: int) -> object:
            return frame(agent, f"assignment-{attempt:012d}", Kind.ASSIGNMENT, b'{"host":"h"}', attempt=attempt)

        tenure = lead.controller._actives[STREAM].tenure.fence
        who = HOME, lead.name, tenure.epoch
        acks = await world.ask(holder, holder.controller.peer_write(*who, [assignment(3)]))  # type: ignore[list-item]
        assert [ack.status for ack in acks] == ["acknowledged"]
        for attempt in (2, 3):
            acks = await world.ask(holder, holder.controller.peer_write(*who, [assignment(attempt)]))  # type: ignore[list-item]
            assert [(ack.error or {}).get("code") for ack in acks] == ["refused"], attempt
        for stranger in ((HOME, lead.name, tenure.epoch - 1), (HOME, holder.name, tenure.epoch), (TARGET, "a", tenure.epoch)):
            with pytest.raises(FenceLost):
                await world.ask(holder, holder.controller.peer_write(*stranger, [assignment(9)]))  # type: ignore[list-item]
        with pytest.raises(DrError):
            await world.ask(lead, lead.controller.peer_write(*who, [assignment(9)]))  # type: ignore[list-item]

    run(keys_dir, story)


def test_an_instance_says_which_streams_it_serves_and_a_status_shows_each(keys_dir: Path) -> None:
    async def story(world: World) -> None:
        lead = world.serving()[STREAM]
        assert lead.controller.role is Role.ACTIVE
        ok, reason = lead.controller.ready()
        assert ok
        assert STREAM in reason
        status = await lead.controller.status()
        assert not isinstance(status.holders, str)
        assert {holder.stream for holder in status.holders} == set(world.streams)  # type: ignore[union-attr]
        assert {report.stream for report in status.reports} == set(world.streams)
        assert status.exposure_seconds is not None
        text = lead.controller.metrics().decode()
        mine = [stream for stream, instance in world.serving().items() if instance is lead]
        labels = [f'group="sim",instance="{lead.name}",region="{HOME}",stream="{stream}"' for stream in mine]
        assert all(f"dr_stream_epoch{{{label}}}" in text for label in labels)
        world.cut(ETCD, lead.key)
        await world.until(lambda: not lead.acts, 20, "its rights running out")
        await world.until(world.active_somewhere, 40, "the neighbour serving everything")

    run(keys_dir, story)
