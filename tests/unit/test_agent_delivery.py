"""Batches of one agent, requests to wait, breakers, what is sent, and the spool's policies; in virtual time."""

from __future__ import annotations

import asyncio
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import httpx
import pytest

from controller.agent import AsyncCheckpoints, Fenced, NotAllAcknowledged, Spool, SpoolFull
from controller.agent.caller import UPLOAD_BYTES_PER_SECOND
from controller.agent.delivery import SPOOLED
from controller.agent.endpoints import COOL_SECONDS, TRIP
from controller.agent.memory import CHAIN
from controller.agent.spool import DROPPED_KEPT, OVERHEAD, Letter
from controller.domain.model import Ack
from controller.errors import Conflict, Misconfigured, OutcomeUnknown, Refused, Unavailable
from controller.lab.virtual_time import run_virtual
from controller.stream.limits import MAX_CHAIN
from tests.support.agent_wire import STATE, A, B, WireController, World, hang


def letters(agent: str, count: int, **more: Any) -> list[Letter]:
    """A state that grows."""
    return [Letter(agent, f"{n:04d}", "checkpoint", STATE + b"step %d\n" % n * (n + 1), **more) for n in range(count)]


def busy(times: int, seconds: str, status: int = 503) -> Any:
    left = [times]
    error = b'{"error":{"code":"unavailable","message":"the queue is full","hint":"slow down","exit_code":3}}'

    def fault(_: WireController, moment: str) -> Any:
        if moment == "before" and left[0] > 0:
            left[0] -= 1
            return status, error, {"Retry-After": seconds}
        return None

    return fault


# ------------------------------------------------------------------------------------------------------- one agent's batch


def test_many_records_of_one_agent_travel_in_one_request_as_a_chain_of_deltas() -> None:
    async def story() -> None:
        world = World()
        async with world.client() as client:
            count = 2 * (CHAIN + 1) + 5
            acks = await client.put_many(letters("agent", count))
        assert [ack.status for ack in acks] == ["acknowledged"] * count
        assert world.a.batches == [count]
        assert world.store.ids("agent") == [f"{n:04d}" for n in range(count)]
        kinds = [kind for _, _, kind in world.store.encodings]
        assert kinds == (["zstd"] + ["delta"] * CHAIN) * 2 + ["zstd"] + ["delta"] * 4

    run_virtual(story())


def test_a_batch_that_is_too_large_for_one_request_is_sent_in_order_one_after_the_other() -> None:
    async def story() -> None:
        world = World()
        async with world.client(batch_records=7, batch_bytes=2**30) as client:
            await client.put_many([*letters("a", 20), *letters("b", 3)])
        assert max(world.a.batches) <= 7
        assert world.store.ids("a") == [f"{n:04d}" for n in range(20)]
        assert len(world.a.batches) <= 4

    run_virtual(story())


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_batch_whose_answer_is_lost_is_stored_once_and_in_order(moment: str) -> None:
    async def story() -> None:
        world = World()
        chance = random.Random(5)

        def flaky(_: WireController, now: str) -> None:
            if now == moment and chance.random() < 0.5:
                raise ConnectionResetError

        world.a.fault = flaky
        async with world.client(A, timeout_seconds=600.0, batch_records=5) as client:
            for begin in range(0, 60, 20):
                await client.put_many(letters("agent", 60)[begin : begin + 20])
        assert world.store.ids("agent") == [f"{n:04d}" for n in range(60)]

    run_virtual(story())


def test_one_record_that_is_refused_takes_only_itself_out_of_a_batch() -> None:
    """The third exists with another body; the deltas behind it stood on the body that was not taken."""

    async def story() -> None:
        world = World()
        async with world.client() as client:
            await client.put("agent", "0002", b"somebody else's")
            with pytest.raises(NotAllAcknowledged) as error:
                await client.put_many(letters("agent", 8))
            results = error.value.results
            assert isinstance(results[2], Conflict)
            assert [item.status for item in results if isinstance(item, Ack)] == ["acknowledged"] * 7
        assert world.store.ids("agent") == ["0002", "0000", "0001", "0003", "0004", "0005", "0006", "0007"]
        assert world.store.records["agent", "0007"][1] == letters("agent", 8)[7].body

    run_virtual(story())


def test_a_record_that_breaks_a_limit_takes_only_itself_out_of_a_batch() -> None:
    async def story() -> None:
        world = World()
        batch = letters("agent", 4)
        batch[1] = Letter("agent", "x" * 301, "checkpoint", b"body")
        async with world.client() as client:
            with pytest.raises(NotAllAcknowledged) as error:
                await client.put_many(batch)
        assert [type(item) for item in error.value.results] == [Ack, Refused, Ack, Ack]
        assert "301 characters" in str(error.value.results[1])
        assert world.store.ids("agent") == ["0000", "0002", "0003"]

    run_virtual(story())


def test_a_batch_that_stands_on_a_lost_base_keeps_its_order() -> None:
    """The controller refuses the first record's delta. None of those behind it may be taken before it."""

    async def story() -> None:
        world = World()
        async with world.client() as client:
            await client.put("agent", "base", STATE)
            world.store.records.clear()
            batch = letters("agent", 5)
            batch.insert(2, Letter("agent", "note", "note", b"small and whole"))
            await client.put_many(batch)
        assert world.store.ids("agent") == [letter.id for letter in batch]

    run_virtual(story())


def test_a_stale_attempt_ends_a_batch_of_its_agent_and_no_other() -> None:
    async def story() -> None:
        world = World()
        world.store.attempts["moved"] = 4
        async with world.client() as client:
            with pytest.raises(NotAllAcknowledged) as error:
                await client.put_many([*letters("moved", 3, attempt=3), *letters("mine", 3)])
        assert [type(item) for item in error.value.results] == [Fenced] * 3 + [Ack] * 3

    run_virtual(story())


def test_records_that_need_more_copies_do_not_travel_with_those_that_do_not() -> None:
    async def story() -> None:
        world = World()
        world.store.fail_copies = True
        batch = [*letters("agent", 2), Letter("agent", "safe", "checkpoint", b"x", copies=2)]
        async with world.client() as client:
            with pytest.raises(NotAllAcknowledged) as error:
                await client.put_many(batch, timeout_seconds=2.0)
        assert [type(item) for item in error.value.results] == [Ack, Ack, OutcomeUnknown]

    run_virtual(story())


# ------------------------------------------------------------------------------------------------------- what is sent


def test_a_growing_conversation_of_80_kb_costs_a_sixtieth_of_its_size() -> None:
    """Words of letters at random, 1.5 KB a turn, from 80 KB on: bytes that leave the agent's host per put, headers and all."""

    async def story() -> None:
        world = World()
        words = random.Random(11)
        vocabulary = ["".join(words.choices("etaoinshrdlucmfwypvbgk", k=words.randint(2, 9))) for _ in range(2000)]

        def turn() -> bytes:
            return json.dumps({"role": "user", "content": " ".join(words.choices(vocabulary, k=220))}).encode()

        state = b"".join(turn() for _ in range(60))
        assert 70_000 < len(state) < 100_000
        puts = 0
        total = 0
        async with world.client() as client:
            for n in range(2 * (MAX_CHAIN + 1)):
                state += turn()
                await client.put("agent", f"{n:04d}", state)
                puts += 1
                total += len(state)
        whole, deltas = [], []
        for _, record_id, kind in world.store.encodings:
            (deltas if kind == "delta" else whole).append(record_id)
        assert len(whole) == 2
        assert total / world.a.received_bytes > 60  # whole bodies, one in sixty-five, included
        assert len(deltas) == puts - 2

    run_virtual(story())


def test_the_largest_body_is_sent_and_one_byte_more_is_refused_before_it_is() -> None:
    async def story() -> None:
        world = World()
        world.a.right_seconds = 60.0
        body = bytes(64 * 2**20)
        async with world.client() as client:
            assert (await client.put("agent", "1", body)).status == "acknowledged"
            with pytest.raises(Refused, match=f"the body has {64 * 2**20 + 1} bytes, allowed are {64 * 2**20}") as error:
                await client.put("agent", "2", body + b"x")
            assert "object storage" in error.value.hint
        assert world.a.batches == [1]

    run_virtual(story())


def test_a_large_body_has_the_time_that_a_slow_way_takes() -> None:
    async def story() -> None:
        world = World()

        async def slow(_: WireController, moment: str) -> None:
            if moment == "before":
                await asyncio.sleep(5.0)

        world.a.right_seconds = 60.0
        world.a.fault = slow
        async with world.client(timeout_seconds=1.0, attempt_seconds=1.0) as client:
            with pytest.raises(OutcomeUnknown):
                await client.put("agent", "small", b"x")
            body = random.Random(1).randbytes(5 * UPLOAD_BYTES_PER_SECOND)
            assert (await client.put("agent", "large", body)).status == "acknowledged"

    run_virtual(story())


# ------------------------------------------------------------------------------------------------------ asked to wait


@pytest.mark.parametrize("status", [429, 503])
def test_a_controller_that_asks_for_a_pause_gets_it_and_counts_as_well(status: int) -> None:
    async def story() -> None:
        world = World()
        world.a.fault = busy(2, "3", status)
        async with world.client(A, timeout_seconds=30.0) as client:
            began = world.clock.monotonic()
            put = asyncio.create_task(client.put("agent", "1", b"body"))
            await world.clock.sleep(1.0)
            (health,) = client.health()
            assert (health.state, health.failures) == ("busy", 0)
            assert 1.9 < health.retry_seconds < 2.8
            await put
            assert 6.0 <= world.clock.monotonic() - began < 9.6
            assert len(world.a.calls) == 3
            assert client.health()[0].state == "active"

    run_virtual(story())


def test_while_one_pauses_another_is_asked_at_once() -> None:
    async def story() -> None:
        world = World()
        world.a.fault = busy(1, "30")
        world.b.active = True
        async with world.client() as client:
            began = world.clock.monotonic()
            await client.put("agent", "1", b"body")
            assert world.clock.monotonic() - began < 1.0
            assert world.b.batches == [1]

    run_virtual(story())


def test_a_record_that_is_asked_to_wait_waits() -> None:
    async def story() -> None:
        world = World()
        left = [1]

        def limited(_: WireController, moment: str) -> Any:
            if moment != "before" or not left[0]:
                return None
            left[0] -= 1
            error = {
                "code": "unavailable",
                "message": "this agent is over its rate",
                "exit_code": 3,
                "retry_after_seconds": 2.5,
            }
            ack = {"agent": "agent", "id": "1", "status": "failed", "error": error}
            return 200, json.dumps({"epoch": 5, "right_seconds": 5.0, "acks": [ack]}).encode()

        world.a.fault = limited
        async with world.client() as client:
            began = world.clock.monotonic()
            await client.put("agent", "1", b"body")
            assert 2.5 <= world.clock.monotonic() - began < 3.2

    run_virtual(story())


def test_the_error_at_the_deadline_says_who_asked_for_what() -> None:
    async def story() -> None:
        world = World()
        world.a.fault = busy(99, "20")
        async with world.client(A) as client:
            with pytest.raises(Unavailable, match=r"http://a:1 asked for a pause, next try in \d+\.\d s") as error:
                await client.put("agent", "1", b"body", timeout_seconds=3.0)
            assert error.value.hint

    run_virtual(story())


@pytest.mark.parametrize("nonsense", ["soon", "-5", "nan", "1e999", "Fri, 31 Dec 1999 23:59:59 GMT"])
def test_nonsense_in_the_header_makes_nobody_wait_for_long(nonsense: str) -> None:
    async def story() -> None:
        world = World()
        world.a.fault = busy(1, nonsense)
        async with world.client(A, timeout_seconds=100.0) as client:
            began = world.clock.monotonic()
            await client.put("agent", "1", b"body")
            assert world.clock.monotonic() - began < 76.0

    run_virtual(story())


# ---------------------------------------------------------------------------------------------------------- breakers


def test_a_breaker_opens_and_lets_one_call_through_to_see_whether_it_may_close() -> None:
    async def story() -> None:
        world = World()
        world.a.fault = hang
        async with world.client(A, attempt_seconds=0.5, timeout_seconds=60.0) as client:
            puts = [asyncio.create_task(client.put(f"agent-{n}", "1", b"body")) for n in range(3)]
            while client.health()[0].state != "open":
                await world.clock.sleep(0.05)
            opened = len(world.a.calls)
            assert opened >= TRIP
            while client.health()[0].state == "open":
                assert len(world.a.calls) == opened, "an open breaker lets nothing through"
                await world.clock.sleep(0.01)
            await world.clock.sleep(COOL_SECONDS + 1.2)
            assert len(world.a.calls) == opened + 1, "a half-open one lets one call through, many wait"
            world.a.fault = None
            for put in puts:
                assert (await put).status == "acknowledged"
            assert client.health()[0].state == "active"
            assert client.health()[0].failures == 0

    run_virtual(story())


def test_the_health_of_every_endpoint_is_told() -> None:
    async def story() -> None:
        world = World()
        async with world.client(B, A) as client:
            assert [(one.url, one.state) for one in client.health()] == [(B, "unknown"), (A, "unknown")]
            await client.put("agent", "1", b"body")
            assert [(one.url, one.state) for one in client.health()] == [(B, "standby"), (A, "active")]
            del world.transport.by_url[A]
            with pytest.raises(Unavailable):
                await client.put("agent", "2", b"body", timeout_seconds=0.01)
            assert client.health()[1].state == "failing"

    run_virtual(story())


# ------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", [".", "..", "...", "a/b", "../../status", "%2E%2E", "a b", "ü€😀", "?x=1#y", "a+b&c=d"])
def test_every_name_reaches_its_own_records(name: str) -> None:
    async def story() -> None:
        world = World()
        async with world.client() as client:
            await client.put(name, name, b"mine")
            assert (await client.get(name, name))[1] == b"mine"
            found = await client.latest(name)
            assert found is not None
            assert found[0].agent == name
            assert [record.id for record in await client.list(name)] == [name]
            assert [one.agent for one in await client.agents(prefix=name)] == [name]

    run_virtual(story())


def test_agents_are_listed_page_by_page() -> None:
    async def story() -> None:
        world = World()
        async with world.client() as client:
            await client.put_many([Letter(f"agent-{n:03d}", "1", "checkpoint", b"x") for n in range(25)])
            found: list[str] = []
            while page := await client.agents(limit=10, after=found[-1] if found else ""):
                found += [one.agent for one in page]
            assert found == [f"agent-{n:03d}" for n in range(25)]

    run_virtual(story())


# -------------------------------------------------------------------------------------------------------------- spool


def test_a_spool_that_drops_keeps_the_newest_of_every_agent_and_names_what_it_dropped(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", max_bytes=4 * (OVERHEAD + 4), when_full="drop-oldest")
    for agent, record_id in (("a", "1"), ("b", "1"), ("a", "2"), ("a", "3")):
        assert spool.add(Letter(agent, record_id, "checkpoint", b"body")) is None
    told = spool.add(Letter("c", "1", "checkpoint", b"body"))
    assert told is not None
    assert "1 older records made room for '1' of agent 'c': '1' of 'a'" in told.message
    spool.add(Letter("b", "2", "checkpoint", b"body"))
    assert [(one.agent, one.id) for one in spool.dropped()] == [("a", "1"), ("b", "1")]
    spool.add(Letter("a", "4", "checkpoint", b"body"))
    assert spool.dropped_count() == 3
    waiting = {agent: [letter.id for _, letter in spool.first(agent, 9, 9999)] for agent in "abc"}
    assert waiting == {"a": ["3", "4"], "b": ["2"], "c": ["1"]}
    assert spool.bytes == 4 * (OVERHEAD + 4)
    spool.add(Letter("d", "1", "checkpoint", b"body"))
    with pytest.raises(SpoolFull):  # what is left is the newest of its agent: not for any newer one of another
        spool.add(Letter("e", "1", "checkpoint", b"body"))
    with pytest.raises(SpoolFull):
        spool.add(Letter("a", "5", "checkpoint", b"x" * 9999))
    spool.close()
    again = Spool(tmp_path / "spool.db", max_bytes=4 * (OVERHEAD + 4), when_full="drop-oldest")
    assert again.dropped_count() == 4
    assert again.bytes == 4 * (OVERHEAD + 4)
    again.close()


def test_dropping_is_said_in_the_answer_to_the_put_and_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        world = World()
        world.transport.by_url.clear()
        spool = Spool(tmp_path / "spool.db", max_bytes=2 * (OVERHEAD + 4), when_full="drop-oldest")
        async with world.client(spool=spool, timeout_seconds=0.5) as client:
            first, second, third = [await client.put("agent", f"{n}", b"body") for n in range(3)]
            assert first.error is second.error is None
            assert third.status == SPOOLED
            assert third.error is not None
            assert third.error["code"] == "spool_dropped"
        assert "made room for '2' of agent 'agent': '0' of 'agent'" in caplog.text

    run_virtual(story())


def test_the_names_of_dropped_records_are_bounded_and_their_number_is_not(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", max_bytes=2 * OVERHEAD, when_full="drop-oldest")
    spool._db.execute("PRAGMA synchronous=OFF")
    for n in range(DROPPED_KEPT + 52):
        spool.add(Letter("agent", str(n), "checkpoint", b""))
    assert spool.dropped_count() == DROPPED_KEPT + 50
    assert len(spool.dropped()) == DROPPED_KEPT
    assert spool.dropped()[-1].id == str(DROPPED_KEPT + 49)
    spool.close()


def test_an_unknown_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="refuse, drop-oldest"):
        Spool(tmp_path / "spool.db", when_full="drop-newest")


def test_a_replay_that_dies_in_the_middle_goes_on_in_order_and_stores_nothing_twice(tmp_path: Path) -> None:
    """The controller took a batch and the process died before it heard of it: the next process sends the batch again."""

    async def story() -> None:
        world = World()
        controllers = dict(world.transport.by_url)
        world.transport.by_url.clear()
        spool = Spool(tmp_path / "spool.db")
        async with world.client(spool=spool, timeout_seconds=0.01) as client:
            for letter in letters("agent", 20):
                await client.put(letter.agent, letter.id, letter.body)
        spool.close()
        world.transport.by_url.update(controllers)
        deaths = 0
        while True:
            spool = Spool(tmp_path / "spool.db")
            if not spool.agents():
                break
            world.a.fault = hang_from_the_second_answer_on()
            client = world.client(spool=spool, batch_records=6, timeout_seconds=0.3)
            replay = asyncio.create_task(client.drain(timeout_seconds=100.0))
            await world.clock.sleep(0.2)
            replay.cancel()
            await asyncio.gather(replay, return_exceptions=True)
            await client.close()
            spool.close()
            deaths += 1
        assert deaths == 4
        assert world.store.ids("agent") == [f"{n:04d}" for n in range(20)]
        assert sum(world.a.batches) > 20, "something was sent twice"

    def hang_from_the_second_answer_on() -> Any:
        answers = iter([True])

        async def fault(_: WireController, moment: str) -> None:
            if moment == "after" and not next(answers, False):
                await asyncio.sleep(1e6)

        return fault

    run_virtual(story())


def test_a_put_behind_a_replay_that_hangs_is_spooled_and_not_lost(tmp_path: Path) -> None:
    async def story() -> None:
        world = World()
        world.a.fault = world.b.fault = hang
        spool = Spool(tmp_path / "spool.db")
        async with world.client(spool=spool, timeout_seconds=1.0) as client:
            for n in range(5):
                assert (await client.put("agent", f"{n}", b"body")).status == SPOOLED
            world.a.fault = world.b.fault = None
            for _ in range(100):
                if not spool.agents():
                    break
                await world.clock.sleep(0.5)
        assert world.store.ids("agent") == ["0", "1", "2", "3", "4"]

    run_virtual(story())


# ----------------------------------------------------------------------------------------------- errors that people read


@pytest.mark.parametrize(("status", "taken"), [(405, False), (404, False), (502, True), (200, True)])
def test_a_server_that_is_no_controller_is_named_and_others_are_asked(status: int, taken: bool) -> None:
    async def story() -> None:
        world = World()
        world.a.fault = lambda _, moment: (status, b"<html>hello</html>") if moment == "before" else None
        async with world.client(A) as client:
            with pytest.raises(Unavailable) as error:
                await client.put("agent", "1", b"body", timeout_seconds=0.04 if status == 200 else 3.0)
            assert isinstance(error.value, OutcomeUnknown) == taken
            if status != 200:
                assert f"http://a:1 answered HTTP {status}, and not as a controller does" in error.value.message
        world.b.active = True
        async with world.client() as client:
            assert (await client.put("agent", "1", b"body")).status == "acknowledged"

    run_virtual(story())


def test_a_proxy_that_takes_small_requests_only_gets_small_ones() -> None:
    async def story() -> None:
        world = World()

        def narrow(controller: WireController, moment: str) -> Any:
            too_many = moment == "after" and controller.batches[-1] > 1
            return (413, b"<html>Request Entity Too Large</html>") if too_many else None

        world.a.fault = narrow
        async with world.client(A) as client:
            acks = await client.put_many(letters("agent", 4))
            assert {ack.status for ack in acks} == {"duplicate"}  # this one had passed it on in spite of its answer
        assert world.a.batches == [4, 1, 1, 1, 1]

    run_virtual(story())


def test_a_record_behind_spooled_ones_says_what_it_waits_for(tmp_path: Path) -> None:
    async def story() -> None:
        world = World()
        world.transport.by_url.clear()
        spool = Spool(tmp_path / "spool.db")
        async with world.client(spool=spool, timeout_seconds=0.5) as client:
            for n in range(3):
                await client.put("agent", f"{n}", b"body")
            with pytest.raises(Unavailable, match="record 'safe' of agent 'agent'") as error:
                await client.put("agent", "safe", b"body", copies=2)
            assert not isinstance(error.value, OutcomeUnknown)
            assert error.value.hint

    run_virtual(story())


def test_when_only_standbys_answer_the_error_says_whom_to_name() -> None:
    async def story() -> None:
        world = World()
        async with world.client(B, follow_hints=False) as client:
            with pytest.raises(Unavailable) as error:
                await client.put("agent", "1", b"body", timeout_seconds=1.0)
            assert "controllers of every region" in error.value.hint

    run_virtual(story())


def test_a_right_that_was_never_granted_says_how_it_is_had() -> None:
    async def story() -> None:
        async with World().client() as client:
            with pytest.raises(Fenced, match="never granted") as error:
                client.right.check()
            assert error.value.hint == "put a record or beat first: answers bring the right"

    run_virtual(story())


@pytest.mark.parametrize("compressible", [False, True])
def test_a_large_body_is_held_at_most_three_times(compressible: bool) -> None:
    """By the caller, as what is sent, and, while it is tried, compressed. The far side is not counted: it is elsewhere."""

    class Sink(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            ack = {"agent": "agent", "id": "1", "status": "acknowledged", "seq": 1, "copies": 1, "error": None}
            return httpx.Response(200, json={"epoch": 5, "right_seconds": 60.0, "acks": [ack]}, request=request)

    async def story() -> int:
        size = 24 * 2**20
        body = bytes(size) if compressible else random.Random(3).randbytes(size)
        async with AsyncCheckpoints([A], transport=Sink()) as client:
            tracemalloc.start()
            await client.put("agent", "1", body)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        return peak * 100 // size

    assert asyncio.run(story()) < 210  # percent of the body, beside the caller's own


def test_a_spools_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.sqlite")
    modes = {found.name: oct(found.stat().st_mode & 0o777) for found in tmp_path.iterdir()}
    assert len(modes) >= 2, "the log beside it too"
    assert set(modes.values()) == {"0o600"}
    spool.close()
