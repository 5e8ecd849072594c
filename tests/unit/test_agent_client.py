"""The agents' client against controllers that misbehave, in virtual time."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from pathlib import Path

import pytest

from controller.agent import Fenced, NotAllAcknowledged, Spool, SpoolFull, StaleEpoch
from controller.agent.client import SPOOLED
from controller.agent.endpoints import LEARNED_MAX, TRIP, Endpoints
from controller.agent.memory import CHAIN, DeltaMemory, Previous
from controller.agent.spool import OVERHEAD, Letter
from controller.domain.model import Beat, Running
from controller.errors import Conflict, Corrupt, Misconfigured, NotFound, OutcomeUnknown, Refused, Throttled, Unavailable
from controller.lab.virtual_time import VirtualClock, run_virtual
from tests.support.agent_wire import STATE, A, B, C, WireController, World, hang, lose_answer


def test_a_put_is_acknowledged_and_extends_the_right_from_when_it_was_sent() -> None:
    async def story() -> None:
        world = World()

        async def slow(_: WireController, moment: str) -> None:
            if moment == "after":
                await asyncio.sleep(1.5)

        world.a.fault = slow
        async with world.client() as client:
            ack = await client.put("agent", "1", b"body")
            assert (ack.status, ack.copies) == ("acknowledged", 1)
            assert client.right.remaining() == pytest.approx(3.5)
            assert client.epoch == 5

    run_virtual(story())


def test_a_hosts_right_is_extended_only_by_records_under_an_assignment() -> None:
    async def story() -> None:
        world = World()
        world.store.attempts["moved"] = 2
        async with world.client(agent_host="h1") as client:
            await client.put("unassigned", "1", b"body")
            with pytest.raises(Fenced):
                await client.put("moved", "1", b"body", attempt=1)
            assert client.right.remaining() == 0.0
            await client.put("mine", "1", b"body", attempt=1)
            assert client.right.remaining() == pytest.approx(5.0)

    run_virtual(story())


def test_a_client_that_is_told_when_to_come_again_waits_that_long_and_leaves_the_controller_in_favour() -> None:
    async def story() -> None:
        world = World()
        calls: list[float] = []

        def busy(_: WireController, moment: str) -> tuple[int, bytes] | None:
            if moment == "before":
                calls.append(world.clock.monotonic())
                if len(calls) <= 4:  # more often than it takes to be left alone as broken
                    told = Throttled("too fast", hint="wait", retry_after_seconds=1.25).to_dict()
                    return 429, json.dumps({"error": told}).encode()
            return None

        world.a.fault = busy
        async with world.client(A) as client:
            assert (await client.put("agent", "1", b"body")).status == "acknowledged"
        pauses = [after - before for before, after in itertools.pairwise(calls)]
        assert len(pauses) == 4
        assert all(1.25 <= pause <= 2.25 for pause in pauses)

    run_virtual(story())


def test_a_lost_answer_is_retried_and_comes_back_as_a_duplicate() -> None:
    async def story() -> None:
        world = World()
        world.a.fault = lose_answer(2)
        async with world.client(A) as client:
            assert (await client.put("agent", "1", b"body")).status == "duplicate"
        assert world.store.ids("agent") == ["1"]

    run_virtual(story())


def test_a_hint_to_the_active_controller_is_followed_at_once_also_to_an_unknown_address() -> None:
    async def story() -> None:
        world = World()
        world.a.active, world.a.active_address = False, C
        world.b.active_address = C
        world.transport.by_url[C] = WireController(C, world.store)
        async with world.client() as client:
            began = world.clock.monotonic()
            await client.put("agent", "1", b"body")
            assert world.clock.monotonic() == began
            await client.put("agent", "2", b"body")
            assert world.transport.by_url[C].batches == [1, 1]
            assert client._endpoints.urls() == (A, B)

    run_virtual(story())


def test_hints_are_not_followed_when_they_are_not_wanted() -> None:
    async def story() -> None:
        world = World()
        world.a.active, world.a.active_address = False, C
        world.b.active_address = C
        world.transport.by_url[C] = WireController(C, world.store)
        async with world.client(follow_hints=False) as client:
            with pytest.raises(Unavailable) as error:
                await client.put("agent", "1", b"body", timeout_seconds=3.0)
            assert not isinstance(error.value, OutcomeUnknown)
        assert world.transport.by_url[C].calls == []

    run_virtual(story())


def test_when_nobody_could_be_reached_the_error_says_that_nothing_was_taken() -> None:
    async def story() -> None:
        world = World()
        world.transport.by_url.clear()
        async with world.client() as client:
            began = world.clock.monotonic()
            with pytest.raises(Unavailable) as error:
                await client.put("agent", "1", b"body", timeout_seconds=4.0)
            assert not isinstance(error.value, OutcomeUnknown)
            assert 4.0 <= world.clock.monotonic() - began < 4.5

    run_virtual(story())


def test_when_an_answer_was_lost_the_error_says_that_nobody_knows() -> None:
    async def story() -> None:
        world = World()
        world.a.fault = hang
        async with world.client() as client:
            began = world.clock.monotonic()
            with pytest.raises(OutcomeUnknown):
                await client.put("agent", "1", b"body", timeout_seconds=5.0)
            assert world.clock.monotonic() - began == pytest.approx(5.0, abs=0.2)
            assert client.right.remaining() == 0.0

    run_virtual(story())


def test_two_copies_that_cannot_be_had_fail_explicitly_even_with_a_spool(tmp_path: Path) -> None:
    async def story() -> None:
        world = World()
        world.store.fail_copies = True
        async with world.client(spool=Spool(tmp_path / "spool.db")) as client:
            with pytest.raises(OutcomeUnknown):
                await client.put("agent", "1", b"body", copies=2, timeout_seconds=3.0)
            assert (await client.put("other", "1", b"body")).status == "acknowledged"
        assert world.store.ids("agent") == []

    run_virtual(story())


def test_an_acknowledgement_with_fewer_copies_than_asked_for_is_none() -> None:
    async def story() -> None:
        world = World()

        def downgrade(controller: WireController, moment: str) -> tuple[int, bytes] | None:
            if moment == "before":
                return 200, (
                    b'{"epoch":5,"right_seconds":5,"acks":[{"agent":"agent","id":"1","status":"acknowledged","seq":1,"copies":1}]}'
                )
            return None

        world.a.fault = downgrade
        async with world.client() as client:
            with pytest.raises(OutcomeUnknown, match="2 were asked for"):
                await client.put("agent", "1", b"body", copies=2, timeout_seconds=1.0)

    run_virtual(story())


def test_a_stale_attempt_fences_the_agent_and_only_it() -> None:
    async def story() -> None:
        world = World()
        world.store.attempts["moved"] = 4
        async with world.client() as client:
            with pytest.raises(Fenced):
                await client.put("moved", "1", b"body", attempt=3)
            with pytest.raises(NotAllAcknowledged) as error:
                await client.put_many(
                    [Letter("moved", "1", "checkpoint", b"x", attempt=3), Letter("ok", "1", "checkpoint", b"x")]
                )
            assert isinstance(error.value.results[0], Fenced)
            assert error.value.results[1].status == "acknowledged"  # type: ignore[union-attr]

    run_virtual(story())


def test_a_no_to_a_whole_batch_is_asked_again_for_each_record() -> None:
    async def story() -> None:
        world = World()

        def refuse_batches(controller: WireController, moment: str) -> tuple[int, bytes] | None:
            if moment == "after" and controller.batches[-1] > 1:
                return 409, b'{"error":{"code":"stale_attempt","message":"one of them is stale","hint":"","exit_code":4}}'
            return None

        world.a.fault = refuse_batches
        async with world.client() as client:
            acks = await client.put_many([Letter(f"agent-{n}", "1", "checkpoint", b"x") for n in range(3)])
            assert {ack.status for ack in acks} == {"duplicate"}  # the batch had been taken in spite of its answer

    run_virtual(story())


def test_an_epoch_that_goes_backwards_is_an_error_and_extends_nothing() -> None:
    async def story() -> None:
        world = World()
        async with world.client(A) as client:
            await client.put("agent", "1", b"body")
            before = client.right.remaining()
            world.a.epoch, world.a.right_seconds = 4, 1000.0
            with pytest.raises(StaleEpoch):
                await client.put("agent", "2", b"body", timeout_seconds=1.0)
            assert client.right.remaining() <= before
            assert client.epoch == 5

    run_virtual(story())


def test_a_deposed_controller_is_passed_over_for_the_present_one() -> None:
    async def story() -> None:
        world = World()
        world.b.active, world.b.epoch = True, 6
        async with world.client() as client:
            client.epoch = 6
            assert (await client.put("agent", "1", b"body")).status == "duplicate"
            assert world.b.batches == [1]

    run_virtual(story())


def test_the_same_id_with_another_body_is_a_conflict_without_retries() -> None:
    async def story() -> None:
        world = World()
        async with world.client() as client:
            await client.put("agent", "1", b"body")
            with pytest.raises(Conflict):
                await client.put("agent", "1", b"other")
        assert len(world.a.batches) == 2

    run_virtual(story())


def test_states_travel_as_deltas_whose_chains_are_cut() -> None:
    async def story() -> None:
        world = World()
        async with world.client() as client:
            state = STATE
            for n in range(2 * CHAIN + 3):
                state += b"one more line %d\n" % n
                await client.put("agent", f"{n:08d}", state)
        kinds = [kind for _, _, kind in world.store.encodings]
        assert kinds[0] == "zstd"
        assert kinds[1 : CHAIN + 1] == ["delta"] * CHAIN
        assert kinds[CHAIN + 1] == "zstd"
        assert world.store.records["agent", f"{2 * CHAIN + 2:08d}"][1] == state

    run_virtual(story())


def test_a_controller_that_lacks_the_base_gets_the_whole_body() -> None:
    async def story() -> None:
        world = World()
        async with world.client() as client:
            await client.put("agent", "1", STATE)
            world.store.records.clear()
            await client.put("agent", "2", STATE + b"more")
        assert [kind for _, _, kind in world.store.encodings] == ["zstd", "zstd"]

    run_virtual(story())


def test_the_memory_for_deltas_is_bounded() -> None:
    memory = DeltaMemory(1000)
    for n in range(10):
        memory.acknowledged(f"agent-{n}", "checkpoint", "1", b"x" * 300, None)
    assert memory.bytes == 900
    assert memory.previous("agent-0", "checkpoint") is None
    assert memory.previous("agent-9", "checkpoint") == Previous("1", b"x" * 300, 0)
    memory.acknowledged("huge", "checkpoint", "1", b"x" * 1001, None)
    assert memory.bytes == 900
    memory.acknowledged("agent-0", "checkpoint", "2", b"y", "1")  # its base was forgotten: the depth is not known
    assert memory.previous("agent-0", "checkpoint") is None


def test_many_agents_share_requests() -> None:
    async def story() -> None:
        world = World()

        async def slow(_: WireController, moment: str) -> None:
            if moment == "before":
                await asyncio.sleep(0.1)

        world.a.fault = slow
        async with world.client() as client:
            await asyncio.gather(*(client.put(f"agent-{n}", "1", b"body") for n in range(200)))
        assert sum(world.a.batches) == 200
        assert len(world.a.batches) <= 4

    run_virtual(story())


def test_records_of_one_agent_keep_their_order_through_failures() -> None:
    async def story() -> None:
        world = World()
        chance = random.Random(3)

        async def flaky(_: WireController, moment: str) -> tuple[int, bytes] | None:
            await asyncio.sleep(chance.uniform(0, 0.05))
            if chance.random() < 0.3:
                if moment == "after":
                    raise ConnectionResetError
                return 503, b'{"error":{"code":"unavailable","message":"busy","hint":"","exit_code":3}}'
            return None

        world.a.fault = world.b.fault = flaky
        world.b.active = True
        async with world.client(timeout_seconds=600.0) as client:
            letters = [Letter(f"agent-{n % 3}", f"{n:04d}", "checkpoint", b"body %d" % n) for n in range(60)]
            await client.put_many(letters)
        for n in range(3):
            assert world.store.ids(f"agent-{n}") == sorted(world.store.ids(f"agent-{n}"))
        assert len(world.store.records) == 60

    run_virtual(story())


def test_a_dead_endpoint_is_left_alone_and_tried_again_later() -> None:
    async def story() -> None:
        world = World()
        del world.transport.by_url[A]
        world.b.active = True
        endpoints = Endpoints([A, B], world.clock, random.Random(1))
        for _ in range(TRIP):
            endpoints.failed(endpoints._all[0])
        assert {endpoints.pick().url for _ in range(5)} == {B}  # type: ignore[union-attr]
        for _ in range(TRIP):
            endpoints.failed(endpoints._all[1])
        assert endpoints.pick() is None
        await world.clock.sleep(0.6)
        assert endpoints.pick() is not None  # half open: one call
        assert endpoints.pick() is not None
        assert endpoints.pick() is None
        async with world.client() as client:
            for n in range(10):
                await client.put("agent", str(n), b"body")

    run_virtual(story())


def test_learned_endpoints_are_bounded_and_never_weaker() -> None:
    async def story() -> None:
        endpoints = Endpoints(["https://a"], VirtualClock(), random.Random(1))
        first = endpoints._all[0]
        assert not endpoints.not_active(first, "http://evil:1")
        assert not endpoints.not_active(first, "file:///etc/passwd")
        assert not endpoints.not_active(first, "https://user@evil")
        for n in range(30):
            assert endpoints.not_active(first, f"https://c{n}:1")
        assert len(endpoints._all) == 1 + LEARNED_MAX

    run_virtual(story())


@pytest.mark.parametrize("urls", [[], ["ftp://a"], ["a:1"], ["http://a:99999"], [""]])
def test_addresses_that_are_none_are_named(urls: list[str]) -> None:
    with pytest.raises(Misconfigured):
        Endpoints(urls, VirtualClock(asyncio.new_event_loop()), random.Random(1))


def test_reads_verify_the_hash_and_say_when_there_is_nothing() -> None:
    async def story() -> None:
        world = World()
        async with world.client() as client:
            assert await client.latest("agent/with slash") is None
            with pytest.raises(NotFound):
                await client.get("agent/with slash", "1")
            await client.put("agent/with slash", "a/1", b"one", meta={"k": "v"})
            await client.put("agent/with slash", "2", b"two")
            record, body = await client.get("agent/with slash", "a/1")
            assert (record.id, body, record.meta) == ("a/1", b"one", {"k": "v"})
            found = await client.latest("agent/with slash")
            assert found is not None
            assert found[1] == b"two"
            assert [item.id for item in await client.list("agent/with slash")] == ["2", "a/1"]
            record, _ = world.store.records["agent/with slash", "2"]
            world.store.records["agent/with slash", "2"] = (record, b"tw0")
            with pytest.raises(Corrupt):
                await client.latest("agent/with slash")

    run_virtual(story())


def test_a_beat_reaches_every_controller_and_the_active_answer_counts() -> None:
    async def story() -> None:
        world = World()
        world.a.assignments = [{"agent": "x", "attempt": 3, "spec": {"copies": 2}, "resume_id": "00000007", "held": False}]
        async with world.client() as client:
            answer = await client.beat(Beat("h 1", 10, (Running("x", 3),)))
            assert answer.active
            assert answer.assignments[0].spec == {"copies": 2}
            assert client.right.remaining() == pytest.approx(5.0)
            expected = {"host": "h 1", "capacity": 10, "agents": [{"agent": "x", "attempt": 3}]}
            assert world.a.beats == world.b.beats == [expected]
            world.a.active = False
            assert not (await client.beat(Beat("h 1", 10))).active
            world.transport.by_url.clear()
            with pytest.raises(Unavailable):
                await client.beat(Beat("h 1", 10))

    run_virtual(story())


def test_a_beat_of_a_deposed_controller_extends_nothing() -> None:
    async def story() -> None:
        world = World()
        async with world.client() as client:
            client.epoch = 9
            with pytest.raises(StaleEpoch):
                await client.beat(Beat("h", 1))
            assert client.right.remaining() == 0.0

    run_virtual(story())


def test_a_task_is_created() -> None:
    async def story() -> None:
        world = World()
        async with world.client() as client:
            assert (await client.create_task("agent", {"goal": "x"})).status == "acknowledged"
        assert world.a.calls == ["POST /v1/tasks"]

    run_virtual(story())


# ------------------------------------------------------------------------------------------------------------------- spool


def test_what_nobody_took_is_spooled_and_sent_in_order_when_a_controller_answers(tmp_path: Path) -> None:
    async def story() -> None:
        world = World()
        controllers = dict(world.transport.by_url)
        world.transport.by_url.clear()
        spool = Spool(tmp_path / "spool.db")
        async with world.client(spool=spool, timeout_seconds=1.0) as client:
            for n in range(5):
                assert (await client.put("agent", f"{n}", STATE + b"%d" % n)).status == SPOOLED
            assert spool.waiting("agent") == 5
            world.transport.by_url.update(controllers)
            assert (await client.put("agent", "5", b"newest", timeout_seconds=30.0)).status == "acknowledged"
        assert world.store.ids("agent") == ["0", "1", "2", "3", "4", "5"]
        assert (spool.bytes, spool.agents()) == (0, ())

    run_virtual(story())


def test_the_spool_drains_by_itself_and_survives_a_restart(tmp_path: Path) -> None:
    async def story() -> None:
        world = World()
        controllers = dict(world.transport.by_url)
        world.transport.by_url.clear()
        spool = Spool(tmp_path / "spool.db")
        async with world.client(spool=spool, timeout_seconds=1.0) as client:
            await client.put("agent", "1", b"body", meta={"k": "v"})
        spool.close()
        world.transport.by_url.update(controllers)
        spool = Spool(tmp_path / "spool.db")
        assert spool.agents() == ("agent",)
        async with world.client(spool=spool):
            for _ in range(100):
                if not spool.agents():
                    break
                await world.clock.sleep(0.1)
        assert world.store.records["agent", "1"][0].meta == {"k": "v"}

    run_virtual(story())


def test_a_full_spool_is_an_error_and_not_a_silent_loss(tmp_path: Path) -> None:
    async def story() -> None:
        world = World()
        world.transport.by_url.clear()
        spool = Spool(tmp_path / "spool.db", max_bytes=2 * (OVERHEAD + 4))
        async with world.client(spool=spool, timeout_seconds=0.5) as client:
            await client.put("agent", "1", b"body")
            await client.put("agent", "1", b"body")
            await client.put("agent", "2", b"body")
            with pytest.raises(SpoolFull):
                await client.put("agent", "3", b"body")
            with pytest.raises(Conflict):
                await client.put("agent", "1", b"other")

    run_virtual(story())


def test_what_a_controller_refuses_later_is_set_aside_and_kept(tmp_path: Path) -> None:
    async def story() -> None:
        world = World()
        controllers = dict(world.transport.by_url)
        world.transport.by_url.clear()
        spool = Spool(tmp_path / "spool.db")
        async with world.client(spool=spool, timeout_seconds=0.5) as client:
            await client.put("moved", "1", b"late", attempt=1)
            world.store.attempts["moved"] = 2
            world.transport.by_url.update(controllers)
            await world.clock.sleep(5.0)
            assert await client.drain(timeout_seconds=5.0) in (0, 1)
        assert spool.agents() == ()
        (rejected,) = spool.rejected()
        assert (rejected.letter.body, rejected.letter.attempt) == (b"late", 1)
        assert rejected.why.startswith("fenced")
        assert spool.bytes == OVERHEAD + 4
        spool.remove(rejected.n)
        assert spool.bytes == 0

    run_virtual(story())


def test_a_record_that_breaks_a_limit_is_refused_before_it_is_sent() -> None:
    async def story() -> None:
        world = World()
        async with world.client() as client:
            for agent in ("", "a" * 201, "a\x00b", "a\u202eb"):
                with pytest.raises(Refused):
                    await client.put(agent, "1", b"body")
        assert world.a.calls == []

    run_virtual(story())
