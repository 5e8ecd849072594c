"""A store that is away for long: memory stays bounded, what does not fit is refused explicitly, nothing taken is dropped."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from controller.errors import Unavailable
from controller.stream import log as log_module
from controller.stream.batcher import LARGE_BYTES, Entry, Queue
from controller.stream.segment import decode_segment, frame
from tests.unit.test_writer import FAR, HOME, LIMITS, NEAR, REGIONS, Rig, story

AWAY_SECONDS = 1200.0
BOUND = 2**18


@pytest.mark.parametrize("away", [(HOME,), (FAR,), (NEAR, FAR), REGIONS])
def test_memory_is_bounded_however_much_is_sent_while_stores_are_away(
    away: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records of every size come, far more than fit. Bytes and segments in memory have bounds whichever store is away."""
    monkeypatch.setattr(log_module, "LOG_SEGMENTS", 64)

    async def steps(rig: Rig) -> None:
        dice = random.Random(7)
        await rig.open()
        await rig.one("before", copies=3)
        for region in away:
            rig.gates[region].cut = True
        refused = taken = 0
        for number in range(400):
            body = dice.randbytes(dice.choice([10, 2_000, 20_000]))
            try:
                await rig.put(frame(f"agent-{number % 9}", f"r{number}", "checkpoint", body))
                taken += 1
            except Unavailable as full:
                refused += 1
                seconds = full.retry_after_seconds
                if not seconds or "the bound is" not in full.message:
                    raise
            await rig.wait(AWAY_SECONDS / 400)
            writer = rig.writer
            held = writer.log.bytes + writer._queue.bytes + writer._admission.bytes
            if held > 8 * BOUND or len(writer.log) > 3 * 64:
                raise AssertionError(f"{held} bytes in {len(writer.log)} segments")
        if HOME in away:
            assert refused > 0  # nothing that the home store lacks may be dropped
        else:
            assert refused == 0  # the rest is read back from the home store
        for region in away:
            rig.gates[region].cut = False
        await rig.everywhere()
        segments = [decode_segment(stored.data) for stored in rig.servers[FAR].objects.values()]
        there = {one.record.id for segment in segments for one in segment.frames}
        assert len(there) == taken + 1
        assert (await rig.one("after", copies=3)).status == "acknowledged"
        assert rig.writer.log.bytes == 0

    limits = replace(LIMITS, queue_max_bytes=BOUND, ack_timeout_seconds=20.0)
    story(steps, limits=limits, limit_seconds=30 * AWAY_SECONDS)


def test_bodies_of_small_deltas_count_too() -> None:
    """A delta of a few bytes holds its whole decoded body until its segment is committed."""

    async def steps(rig: Rig) -> None:
        await rig.open()
        body = random.Random(1).randbytes(30_000)
        await rig.put(frame("x", "r0", "checkpoint", body))
        for gate in rig.gates.values():
            gate.cut = True
        previous = ("r0", body)
        said = ""
        for number in range(1, 60):
            body = previous[1] + b"a step more"
            try:
                await rig.writer.submit([frame("x", f"r{number}", "checkpoint", body, previous=previous)])
            except Unavailable as full:
                said = full.message
                break
            previous = (f"r{number}", body)
        assert "bytes of decoded bodies wait" in said
        assert rig.writer._admission.bytes < 6 * BOUND

    story(steps, limits=replace(LIMITS, queue_max_bytes=BOUND, ack_timeout_seconds=0.1))


def entry(agent: str, record_id: str, weight: int, at: float) -> Entry:
    return Entry(frame(agent, record_id, "checkpoint", b"x", received_at=at), weight, None)


def test_small_records_overtake_large_ones_of_others_and_never_their_own_agents() -> None:
    queue = Queue(segment_max_bytes=1000, segment_max_records=10)
    for number, (agent, weight) in enumerate(
        [("a", 10), ("big", LARGE_BYTES), ("big", 20), ("b", 10), ("big", LARGE_BYTES), ("c", 10)]
    ):
        queue.add(entry(agent, f"r{number}", weight, float(number)))
    taken = []
    while found := queue.take(large=True):
        taken.append([one.frame.record.id for one in found])
    assert taken == [["r0", "r3", "r5"], ["r1"], ["r2"], ["r4"]]
    assert (len(queue), queue.bytes, queue.oldest()) == (0, 0, None)


def test_one_large_record_is_on_its_way_at_a_time_and_small_ones_go_on() -> None:
    queue = Queue(segment_max_bytes=1000, segment_max_records=10)
    queue.add(entry("big", "r1", LARGE_BYTES, 1.0))
    assert queue.take(large=False) == []
    queue.add(entry("a", "r2", 10, 2.0))
    assert [one.frame.record.id for one in queue.take(large=False)] == ["r2"]
    assert queue.take(large=False) == []
    assert [one.frame.record.id for one in queue.take(large=True)] == ["r1"]


def test_a_large_record_that_waits_does_not_make_small_ones_hurry() -> None:
    """Else every small record would get a segment of its own for as long as the large one waits."""
    queue = Queue(segment_max_bytes=1000, segment_max_records=10)
    queue.add(entry("big", "r1", LARGE_BYTES, 1.0))
    queue.add(entry("a", "r2", 10, 2.0))
    assert not queue.full()
    queue.add(entry("a", "r3", 990, 3.0))
    assert queue.full()
    queue.take(large=False)
    assert not queue.full()


def test_a_large_record_whose_segment_is_being_made_when_the_writer_stops_is_told() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        began = rig.clock.monotonic()
        sent = asyncio.create_task(rig.one("large", body=random.Random(1).randbytes(LARGE_BYTES + 10)))
        while not rig.writer._queue and not sent.done():  # noqa: ASYNC110 - the writer's own state, no event of ours
            await asyncio.sleep(0)
        await asyncio.sleep(0)  # the batcher has it and waits for the thread
        await rig.writer.stop("stepping down")
        ack = await sent
        assert ack.error is not None
        assert (ack.status, ack.error["code"]) == ("failed", "outcome_unknown")
        assert rig.clock.monotonic() - began < 5.0  # and not when its time has run out

    story(steps, limits=replace(LIMITS, queue_max_bytes=64 * 2**20, ack_timeout_seconds=30.0))


def test_small_records_and_large_ones_do_not_keep_each_other_out() -> None:
    bound = LARGE_BYTES
    queue = Queue(segment_max_bytes=1000, segment_max_records=10)
    queue.add(entry("a", "r1", 10, 1.0))
    assert queue.lacks_room([LARGE_BYTES], bound) is None
    queue.add(entry("big", "r2", LARGE_BYTES, 2.0))
    assert "the bound is" in str(queue.lacks_room([LARGE_BYTES], bound))
    assert queue.lacks_room([10], bound) is None
    queue.add(entry("b", "r3", bound - 20, 3.0))
    assert queue.lacks_room([5, 5], bound) is None
    assert "the bound is" in str(queue.lacks_room([5, 6], bound))


def test_small_records_behind_a_large_one_of_their_agent_are_bounded_like_other_small_ones() -> None:
    bound = LARGE_BYTES
    queue = Queue(segment_max_bytes=1000, segment_max_records=10)
    queue.add(entry("big", "r1", LARGE_BYTES, 1.0))
    queue.add(entry("big", "r2", bound - 10, 2.0))
    assert queue.lacks_room([10], bound) is None
    assert "the bound is" in str(queue.lacks_room([11], bound))
    assert [one.frame.record.id for one in queue.take(large=True)] == ["r1"]
    assert queue.lacks_room([LARGE_BYTES], bound) is None
