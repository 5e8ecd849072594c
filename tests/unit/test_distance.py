"""What a stream carries to regions that are far away, in virtual time: no core, no socket, no machine has a part in it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from controller.domain.model import Commit, Fence, Head, SegmentRef
from controller.errors import Unavailable
from controller.lab.virtual_time import run_virtual
from controller.stream import flight as flight_module
from controller.stream import log as log_module
from controller.stream.segment import frame
from controller.stream.writer import WriterLimits
from tests.support.distance import HOME, STREAM, Load, Place, carry

NEAR, FAR = "near", "far"
FLUSH_SECONDS = WriterLimits().flush_seconds
QUICK_STORE_SECONDS = 0.004
"""The home store answers at once, so the stream closes a segment every flush interval: as many as it ever closes for time."""


@pytest.mark.parametrize("one_way_seconds", [0.01, 0.02, 0.04, 0.08, 0.15])
def test_a_region_keeps_up_however_far_it_is(one_way_seconds: float) -> None:
    """Its lag is the time that the way takes, and does not grow with the time that the load lasts."""
    found = carry({FAR: one_way_seconds}, Load(rate=150, seconds=8.0), store_seconds=QUICK_STORE_SECONDS)
    answer = 2 * one_way_seconds + QUICK_STORE_SECONDS
    assert found.closed == pytest.approx(1 / FLUSH_SECONDS, rel=0.05)
    assert found.segments[FAR] == pytest.approx(found.closed, rel=0.15)
    # An answer for the object, at most one for the head update that is under way then, one for its own.
    assert found.lag_seconds[FAR] <= 3 * answer + 2 * FLUSH_SECONDS
    assert found.behind[FAR] <= (3 * answer + 2 * FLUSH_SECONDS) * found.closed


@pytest.mark.parametrize("one_way_seconds", [0.02, 0.08])
def test_a_second_copy_takes_no_more_than_three_answers(one_way_seconds: float) -> None:
    load = Load(rate=150, copies=2, seconds=6.0)
    found = carry({NEAR: one_way_seconds, FAR: 0.15}, load, store_seconds=QUICK_STORE_SECONDS)
    answer = 2 * one_way_seconds + QUICK_STORE_SECONDS
    assert not found.refused
    assert 2 * answer <= found.percentile(0.0)
    assert found.percentile(1.0) <= 3 * answer + 2 * FLUSH_SECONDS


def test_a_far_region_that_was_away_catches_up_while_the_load_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "LOG_SEGMENTS", 32)
    way = 0.15

    async def steps(place: Place) -> None:
        load, gate = asyncio.create_task(busy(place, 30.0)), place.gates[FAR]
        gate.cut = True
        await place.clock.sleep(6.0)
        gate.cut = False
        place.gates[HOME].calls.clear()
        await place.clock.sleep(15.0)
        behind = place.writer.seq - place.servers[FAR].head(STREAM).seq
        assert place.gates[HOME].calls["get_segment"] > 200
        assert place.writer.seq > 900
        assert behind <= 3 * (2 * way + QUICK_STORE_SECONDS) / FLUSH_SECONDS + 2
        load.cancel()

    told(steps, way=way, records=1000)


async def busy(place: Place, seconds: float) -> None:
    """A record in each flush interval and one more, so that the stream closes as many segments as it can."""
    waiting = []
    for number in range(int(100 * seconds)):
        waiting.append(asyncio.create_task(place.writer.submit([frame(f"agent-{number}", "r", "note", b"")])))
        await place.clock.sleep(0.01)
    await asyncio.gather(*waiting)


@pytest.mark.parametrize("depth", [2, 5])
def test_a_pump_carries_its_depth_in_each_answer(depth: int) -> None:
    """The formula, at its limit: head updates are under way beside the objects and cost no rate."""
    found = carry({FAR: 0.1}, Load(rate=150, seconds=8.0), limits=WriterLimits(pipeline_depth=depth))
    assert found.closed > 1.5 * depth / 0.2
    assert found.segments[FAR] == pytest.approx(depth / 0.2, rel=0.1)


def told(steps: Callable[[Place], Awaitable[None]], *, way: float = 0.05, depth: int = 32, records: int = 1) -> None:
    async def all_of_it() -> None:
        limits = WriterLimits(segment_max_records=records, pipeline_depth=depth)
        place = Place({FAR: way}, QUICK_STORE_SECONDS, limits)
        await place.open()
        try:
            await place.clock.sleep(1.0)
            await steps(place)
        finally:
            await place.writer.stop("told")

    run_virtual(all_of_it(), limit_seconds=3600.0)


def test_a_head_names_only_objects_that_are_there_whatever_order_they_arrive_in() -> None:
    async def steps(place: Place) -> None:
        store, server, dice = place.stores[FAR], place.servers[FAR], random.Random("order")
        put, advance, arrived, commits = store.put_segment, store.advance, list[int](), list[Commit]()

        async def slow_put(fence: Fence, ref: SegmentRef, data: bytes) -> None:
            await place.clock.sleep(dice.uniform(0.0, 0.5))
            await put(fence, ref, data)
            arrived.append(ref.seq)

        async def looked_at(fence: Fence, commit: Commit) -> Head:
            for seq in range(1, commit.seq + 1):
                assert SegmentRef(STREAM, seq, fence.epoch) in server.objects
            commits.append(commit)
            return await advance(fence, commit)

        store.put_segment, store.advance = slow_put, looked_at  # type: ignore[method-assign]
        frames = [frame(f"agent-{number}", "r", "note", b"", copies=2) for number in range(200)]
        acks = await place.writer.submit(frames)
        assert {ack.status for ack in acks} == {"acknowledged"}
        assert arrived != sorted(arrived)
        assert server.head(STREAM).seq == 200 == len(arrived)
        assert [commit.prev_seq for commit in commits] == [0, *(commit.seq for commit in commits[:-1])]
        assert len(commits) < 100

    told(steps)


def test_what_arrived_before_an_object_that_failed_is_committed_and_the_rest_is_put_again() -> None:
    async def steps(place: Place) -> None:
        store, server = place.stores[FAR], place.servers[FAR]
        put, advance, failing, seqs = store.put_segment, store.advance, {5}, list[int]()

        async def failing_put(fence: Fence, ref: SegmentRef, data: bytes) -> None:
            if ref.seq in failing:
                failing.remove(ref.seq)
                raise Unavailable("slow down")
            await put(fence, ref, data)

        async def noted(fence: Fence, commit: Commit) -> Head:
            seqs.append(commit.seq)
            return await advance(fence, commit)

        store.put_segment, store.advance = failing_put, noted  # type: ignore[method-assign]
        frames = [frame(f"agent-{number}", "r", "note", b"", copies=2) for number in range(12)]
        acks = await place.writer.submit(frames)
        assert {ack.status for ack in acks} == {"acknowledged"}
        assert seqs == [4, 12]
        assert server.head(STREAM).chain == place.servers[HOME].head(STREAM).chain

    told(steps)


def test_bodies_on_their_way_to_a_region_are_bounded_and_a_larger_one_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight_module, "BYTES", 5_000)

    async def steps(place: Place) -> None:
        store, put, under_way, most = place.stores[FAR], place.stores[FAR].put_segment, list[int](), list[list[int]]()

        async def counted(fence: Fence, ref: SegmentRef, data: bytes) -> None:
            under_way.append(len(data))
            most.append(list(under_way))
            try:
                await put(fence, ref, data)
            finally:
                under_way.remove(len(data))

        store.put_segment = counted  # type: ignore[method-assign]
        dice = random.Random("bodies")
        sizes = [dice.choice([500, 1_500, 9_000]) for _ in range(60)]
        frames = [frame(f"a{n}", "r", "note", dice.randbytes(size), copies=2) for n, size in enumerate(sizes)]
        acks = await place.writer.submit(frames)
        assert {ack.status for ack in acks} == {"acknowledged"}
        assert any(len(sizes) > 2 for sizes in most)
        assert all(len(sizes) == 1 or sum(sizes) <= 5_000 for sizes in most)

    told(steps)


def test_a_writer_that_is_stopped_leaves_nothing_running() -> None:
    async def steps(place: Place) -> None:
        frames = [frame(f"agent-{number}", "r", "note", b"") for number in range(50)]
        await place.writer.submit(frames)
        await place.writer.stop("the test ends it")
        left = {getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks() - {asyncio.current_task()}}
        assert left <= {"MemoryRegionStore._travel"}, "only requests that are on the wire already"
        assert 0 < place.servers[FAR].head(STREAM).seq + 1 <= place.servers[HOME].head(STREAM).seq

    told(steps, way=10.0)
