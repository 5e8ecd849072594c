"""The follower: follows, rewinds where the store's history turned, and stops at damage."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.adapters.memory.gate import FaultGate, OpenGate
from controller.adapters.memory.region_store import MemoryRegionStore, MemoryStore
from controller.domain.model import GENESIS, EpochStart, Head, Position
from controller.errors import Corrupt, NotFound, Unavailable
from controller.stream.follower import Follower
from controller.stream.limits import ORIGIN
from controller.stream.reader import read_record
from controller.stream.segment import SegmentHeader, encode_segment, frame, next_chain
from controller.stream.view import View
from tests.support.segments import GROUP, Built, History


class StoppedClock:
    """A clock that stands still."""

    def monotonic(self) -> float:
        return 5.0

    def wall(self) -> float:
        return 1_790_000_000.0

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


class Region:
    """A memory store, its follower and the gate between them."""

    def __init__(self, view: View | None = None) -> None:
        self.server = MemoryStore("eu-west-1")
        self.gate = FaultGate(StoppedClock().sleep)
        self.store = MemoryRegionStore(self.server, self.gate, call_timeout_seconds=None)
        self.view = view or View(None)
        self.follower = Follower(self.store, self.view, "0", StoppedClock(), GROUP)

    async def catch_up(self, steps: int = 50, budget: int = 64) -> Position:
        position = self.follower.position()
        for _ in range(steps):
            last, position = position, await self.follower.step(budget)
            head = self.server.head("0")
            if position == last and (position.seq, position.chain) == (head.seq, head.chain):
                return position
        raise AssertionError(f"not caught up after {steps} steps: {position}")

    def assert_copy_of(self, history: History) -> None:
        assert self.view.position("0") == (history.seq, history.chain)
        fresh = View(None)
        history.apply_to(fresh)
        assert self.view.agents() == fresh.agents()
        assert list(self.view.tail("0", 0)) == list(fresh.tail("0", 0))
        for summary in fresh.agents():
            assert self.view.latest(summary.agent) == fresh.latest(summary.agent)


def rebuilt(built: Built, **change: object) -> bytes:
    """The same frames under another header, with a right checksum."""
    segment = built.segment
    return encode_segment(replace(segment.header, **change), segment.frames)  # type: ignore[arg-type]


def overwrite(server: MemoryStore, built: Built, data: bytes) -> None:
    server.drop(built.ref)
    server.put(built.ref, data)


# -------------------------------------------------------------------------------------------------------------- following


async def test_an_empty_store_is_followed_without_complaint() -> None:
    region = Region()
    assert await region.follower.step() == Position(0, GENESIS, 0, 1_790_000_000.0)


async def test_new_segments_are_indexed_in_bounded_rounds() -> None:
    region, history = Region(), History().grow(10)
    history.install(region.server)
    assert (await region.follower.step(budget=4)).seq == 4
    assert (await region.follower.step(budget=4)).seq == 8
    assert await region.follower.step(budget=4) == Position(10, history.chain, 1, 1_790_000_000.0)
    region.assert_copy_of(history)
    history.grow(3, epoch=2).install(region.server)
    assert (await region.follower.step()).epoch == 2
    region.assert_copy_of(history)


async def test_a_segment_that_is_put_and_not_committed_is_not_followed() -> None:
    region, history = Region(), History().grow(5)
    history.install(region.server, seq=3)
    assert (await region.catch_up()).seq == 3


async def test_an_idle_round_costs_one_read() -> None:
    region = Region()
    History().grow(5).install(region.server)
    await region.catch_up()
    region.gate.calls.clear()
    await region.follower.step()
    assert region.gate.calls == {"read_head": 1}


async def test_an_unreachable_store_loses_nothing_that_was_indexed() -> None:
    region, history = Region(), History().grow(10)
    history.install(region.server)
    await region.follower.step(budget=3)
    region.gate.cut = True
    with pytest.raises(Unavailable):
        await region.follower.step()
    region.gate.cut = False
    region.gate.fail("get_segment")
    with pytest.raises(Unavailable):
        await region.follower.step()
    assert region.view.position("0")[0] == 3
    await region.catch_up()
    region.assert_copy_of(history)


async def test_a_cancelled_step_leaves_no_fetch_behind_and_can_be_repeated() -> None:
    region, history = Region(), History().grow(10)
    history.install(region.server)
    before = asyncio.all_tasks()
    step = asyncio.ensure_future(region.follower.step())
    for _ in range(4):
        await asyncio.sleep(0)
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    assert asyncio.all_tasks() == before
    await region.catch_up()
    region.assert_copy_of(history)


# ------------------------------------------------------------------------------------------------------------- rewinding


@pytest.mark.parametrize(("common", "old", "new"), [(5, 3, 6), (5, 6, 3), (0, 4, 2), (7, 1, 1), (5, 4, 0), (1, 1, 90)])
async def test_a_realigned_store_is_followed_from_the_last_common_segment(common: int, old: int, new: int) -> None:
    region = Region()
    shared = History().grow(common)
    lost = shared.fork(common).grow(old, epoch=2)
    lost.install(region.server)
    await region.catch_up()
    chosen = shared.fork(common).grow(new, epoch=3)
    chosen.install(region.server, epoch=3)
    await region.catch_up()
    region.assert_copy_of(chosen)


async def test_a_second_promotion_over_a_diverged_tail_is_followed_too() -> None:
    region = Region()
    shared = History().grow(6)
    shared.fork(6).grow(4, epoch=2).install(region.server)
    await region.catch_up()
    third = shared.fork(6).grow(2, epoch=3)
    third.fork(7).grow(5, epoch=4).install(region.server)
    await region.catch_up()
    third.fork(7).grow(1, epoch=5).install(region.server)
    position = await region.catch_up()
    assert (position.seq, position.epoch) == (8, 5)


async def test_the_state_that_is_the_newest_again_after_a_rewind_is_loaded_from_the_store() -> None:
    region = Region()
    history = History().grow(9, agents=2)
    history.install(region.server)
    await region.catch_up()
    kept = history.fork(4)
    kept.install(region.server, epoch=2)
    await region.catch_up()
    assert region.view.cold() == ()
    for agent in ("agent-0", "agent-1"):
        assert region.view.latest(agent)[1] == history.bodies[agent, "e1s4"]  # type: ignore[index]


async def test_a_delta_against_a_state_that_is_no_longer_warm_is_followed() -> None:
    region = Region()
    history = History().grow(9, agents=1)
    body = history.bodies["agent-0", "e1s3"]
    history.add([frame("agent-0", "branch", "checkpoint", body + b"other way", previous=("e1s3", body))])
    history.install(region.server)
    await region.catch_up()
    assert region.view.latest("agent-0")[1] == body + b"other way"  # type: ignore[index]


async def test_equal_epochs_with_another_chain_are_told_apart_by_the_chain() -> None:
    region = Region()
    shared = History().grow(20)
    shared.fork(13).grow(7, epoch=1).install(region.server)
    await region.catch_up()
    for built in list(region.server.objects):
        region.server.drop(built)
    other = History("0", shared.segments[:13], {}, dict(shared.bodies), {})
    for seq in range(14, 23):
        other.add([other.step("agent-0", f"other{seq}", seq)])
    other.install(region.server, seq=20)
    await region.catch_up()
    assert region.view.position("0") == (20, other.segments[19].chain)
    other.install(region.server)
    await region.catch_up()
    region.assert_copy_of(other)


async def test_a_view_of_another_history_altogether_is_replaced() -> None:
    mine = History()
    mine.add([frame("ghost", "r", "checkpoint", b"x")])
    view = View(None)
    mine.apply_to(view)
    region, history = Region(view), History().grow(4)
    history.install(region.server)
    await region.catch_up()
    region.assert_copy_of(history)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
async def test_any_sequence_of_growth_and_realignment_is_followed(seed: int) -> None:
    rng = random.Random(seed)
    region, history, epoch = Region(), History(), 1
    for _ in range(8):
        if rng.random() < 0.4:
            epoch += 1
            history = history.fork(rng.randint(0, history.seq))
        history.grow(rng.randint(0, 5), agents=2, epoch=epoch)
        history.install(region.server, epoch=epoch)
        if rng.random() < 0.7:
            await region.follower.step(rng.choice([1, 3, 64]))
    await region.catch_up()
    region.assert_copy_of(history)


# --------------------------------------------------------------------------------------------------------------- retention


async def test_a_copy_behind_the_base_begins_again_at_the_base() -> None:
    region, history = Region(), History().grow(4)
    history.install(region.server)
    await region.catch_up()
    history.grow(8)
    history.add(
        [frame(f"agent-{n}", history.states[f"agent-{n}"][0], "checkpoint", history.states[f"agent-{n}"][1]) for n in range(3)]
    )
    history.install(region.server, base=9)
    await region.catch_up()
    assert region.view.floor("0")[0] == 8
    for agent, (record_id, body) in history.states.items():
        assert region.view.latest(agent) == (region.view.record(agent, record_id), body)
    history.grow(2).install(region.server, base=9)
    await region.catch_up()


async def test_a_copy_past_the_base_forgets_what_retention_dropped() -> None:
    region, history = Region(), History().grow(12)
    history.add([frame("idle", "r1", "checkpoint", b"state", meta={ORIGIN: "1.9"})])
    history.install(region.server)
    await region.catch_up()
    history.install(region.server, base=10)
    await region.catch_up()
    assert region.view.floor("0") == (9, history.segments[8].chain)
    assert region.view.record("agent-0", "e1s9") is None
    assert region.view.latest("agent-0") is not None


async def test_a_segment_that_retention_takes_away_while_reading_ends_the_round_only() -> None:
    region, history = Region(), History().grow(10)
    history.install(region.server)

    class Racing(MemoryRegionStore):
        async def get_segment(self, ref):  # type: ignore[no-untyped-def]
            if ref.seq == 3 and region.server.head("0").base == 1:
                history.install(region.server, base=6)
            return await super().get_segment(ref)

    region.follower._store = Racing(region.server, OpenGate(), call_timeout_seconds=None)
    await region.follower.step()
    await region.catch_up()
    assert region.view.floor("0")[0] == 5


# ----------------------------------------------------------------------------------------------------------------- damage


async def stuck(region: Region, seq: int, says: str) -> None:
    """Two rounds raise Corrupt that says ``says``; the copy stays at ``seq``."""
    for _ in range(2):
        with pytest.raises(Corrupt, match=says):
            await region.follower.step()
        assert region.view.position("0")[0] == seq


async def test_a_damaged_segment_stops_the_copy_before_it_until_it_is_repaired() -> None:
    region, history = Region(), History().grow(8)
    history.install(region.server)
    damaged = history.segments[4]
    for bit in (3, 700, 4_001):
        region.server.corrupt(damaged.ref, bit)
        await stuck(region, 4, "0000000000000005-0000000000000001.seg")
        region.server.corrupt(damaged.ref, bit)
        unnoticed = bytearray(damaged.data)  # by the store: its own checksum is of the damaged bytes
        unnoticed[bit // 8] ^= 1
        overwrite(region.server, damaged, bytes(unnoticed))
        await stuck(region, 4, "0000000000000005-0000000000000001.seg")
        overwrite(region.server, damaged, damaged.data)
    await region.catch_up()
    region.assert_copy_of(history)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"group": "other"}, "its group, stream, seq and epoch are"),
        ({"stream": "1"}, "its group, stream, seq and epoch are"),
        ({"seq": 6}, "its group, stream, seq and epoch are"),
        ({"epoch": 2}, "its group, stream, seq and epoch are"),
        ({"prev_chain": "ab" * 32}, "does not follow"),
        ({"created_at": 1.0}, "does not follow"),
    ],
)
async def test_a_segment_with_a_right_checksum_in_the_wrong_place_is_corrupt(change: dict[str, object], says: str) -> None:
    region, history = Region(), History().grow(8)
    history.install(region.server)
    overwrite(region.server, history.segments[4], rebuilt(history.segments[4], **change))
    await stuck(region, 5 if "created_at" in change else 4, says)


async def test_a_last_segment_that_does_not_give_the_heads_chain_is_not_indexed() -> None:
    region, history = Region(), History().grow(3)
    history.install(region.server)
    overwrite(region.server, history.segments[2], rebuilt(history.segments[2], created_at=1.0))
    await stuck(region, 2, "the head says")


async def test_a_committed_segment_that_is_gone_is_corrupt() -> None:
    region, history = Region(), History().grow(5)
    history.install(region.server)
    region.server.drop(history.segments[3].ref)
    await stuck(region, 3, "is committed in eu-west-1 and is not there")


async def test_a_body_that_does_not_verify_stops_the_copy() -> None:
    region, history = Region(), History().grow(2)
    good = frame("agent-9", "bad", "checkpoint", b"text " * 99)
    history.add([replace(good, record=replace(good.record, sha256="0" * 64))])
    history.install(region.server)
    await stuck(region, 2, r"0000000000000003.*'bad' of agent 'agent-9'")


async def test_a_head_that_went_back_does_not_empty_the_copy() -> None:
    region, history = Region(), History().grow(5, epoch=4)
    history.install(region.server)
    await region.catch_up()
    region.server.heads["0"] = Head("0")
    await stuck(region, 5, "the table was lost, restored or replaced")


async def test_a_head_without_an_epoch_for_its_segments_is_corrupt() -> None:
    region, history = Region(), History().grow(5)
    history.install(region.server)
    region.server.heads["0"] = replace(region.server.heads["0"], epochs=(EpochStart(1, 3),))
    await stuck(region, 0, "names no epoch")


async def test_a_base_chain_that_the_first_segment_does_not_follow_is_corrupt() -> None:
    region, history = Region(), History().grow(5)
    history.install(region.server)
    region.server.heads["0"] = replace(region.server.heads["0"], base=3, base_chain="cd" * 32)
    await stuck(region, 2, "does not follow chain cdcd")


# ------------------------------------------------------------------------------------------------------------------ reader


async def test_every_record_of_every_agent_comes_back_from_the_store() -> None:
    region, history = Region(), History().grow(40, agents=2)
    history.install(region.server)
    await region.catch_up()
    for (agent, record_id), body in history.bodies.items():
        region.gate.calls.clear()
        record, found = await read_record(region.view, region.store, agent, record_id)
        assert (record.agent, record.id, found) == (agent, record_id, body)
        assert region.gate.calls["get_segment"] <= 17


async def test_reading_says_which_segment_is_damaged_and_what_is_not_there() -> None:
    region, history = Region(), History().grow(10, agents=1)
    history.install(region.server)
    await region.catch_up()
    with pytest.raises(NotFound, match="no record 'nothing'"):
        await read_record(region.view, region.store, "agent-0", "nothing")
    other = History().grow(1, agents=1, epoch=9)
    chain = next_chain(GENESIS, other.segments[0].data)
    assert chain == other.chain
    header = SegmentHeader(GROUP, "0", 2, 1, history.segments[0].chain, 0.0)
    overwrite(region.server, history.segments[1], encode_segment(header, other.segments[0].segment.frames))
    with pytest.raises(Corrupt, match=r"0000000000000002.*indexed as 'e1s2'"):
        await read_record(region.view, region.store, "agent-0", "e1s4")
    region.server.corrupt(history.segments[0].ref, 99)
    with pytest.raises(Corrupt, match="0000000000000001"):
        await read_record(region.view, region.store, "agent-0", "e1s1")


async def test_a_record_that_stands_on_what_retention_dropped_is_not_found_and_says_why() -> None:
    region, history = Region(), History().grow(9, agents=1)
    history.install(region.server, base=5)
    await region.catch_up()
    with pytest.raises(NotFound, match="stands on 'e1s4', which this region's copy no longer has"):
        await read_record(region.view, region.store, "agent-0", "e1s7")
