"""Retention on memory stores in virtual time: what is old goes, what is needed stays, whatever dies in between."""

from __future__ import annotations

import random
from typing import Any

import pytest

from controller.domain.model import Salvage, SegmentRef
from controller.lab.virtual_time import run_virtual
from controller.stream.limits import ORIGIN
from controller.stream.segment import decode_segment
from tests.support.keeping import FAR, HOME, NEAR, REGIONS, STREAM, Holder, World


def body(agent: str, step: int, size: int = 900) -> bytes:
    """Most of a state repeats from step to step."""
    return random.Random(agent).randbytes(size) + f"{agent} step {step}".encode()


async def busy(world: World, holder: Holder, agents: int, steps: int, first: int = 0, pause: float = 1.0) -> None:
    for step in range(first, first + steps):
        for n in range(agents):
            name = f"busy-{n}"
            assert await world.put(holder, name, f"{step:06d}", body(name, step))
        await world.wait(pause)


async def rounds(world: World, holder: Holder, count: int, agents: int = 2, first: int = 0) -> None:
    """``count`` retention rounds in which busy agents go on."""
    for number in range(count):
        await busy(world, holder, agents, 4, first + 4 * number, pause=world.policy.round_seconds / 4)
        await world.steps(holder, 25, pause=0.01)


def test_an_agent_that_wrote_once_survives_many_rounds_bit_for_bit_and_old_records_of_a_busy_one_go() -> None:
    async def story() -> None:
        world = World()
        holder = await world.open()
        assert await world.put(holder, "once", "only", body("once", 1, 5000), created_at=7.0, meta={"colour": "red"})
        before = holder.view.latest("once")
        await rounds(world, holder, 40)
        await world.settled(holder)
        for region in REGIONS:
            view = await world.check_restorable(region)
            assert view.latest("once") == before
            assert view.record("busy-0", "000000") is None
            assert view.records("once") == (before[0],) if before else False
        assert holder.view.record("busy-0", "000000") is None
        assert holder.view.latest("once") == before

    run_virtual(story(), limit_seconds=100_000)


def test_objects_rows_and_bytes_stay_bounded_over_two_hundred_rounds() -> None:
    async def story() -> None:
        world = World()
        holder = await world.open()
        for n in range(10):
            assert await world.put(holder, f"idle-{n}", "only", body(f"idle-{n}", 0))
        await rounds(world, holder, 30)
        sizes = []
        for number in range(170):
            await rounds(world, holder, 1, first=4 * (30 + number))
            if number % 10 == 0:
                await world.settled(holder)
                await world.steps(holder, 60, pause=0.01)
                sizes.append(
                    (
                        max(len(world.objects(region)) for region in REGIONS),
                        holder.view.count(STREAM),
                        len(holder.view.agents()),
                    )
                )
        objects, records, agents = (max(column) for column in zip(*sizes, strict=True))
        assert objects <= 2 * min(size[0] for size in sizes), sizes
        assert records <= 2 * min(size[1] for size in sizes), sizes
        assert agents == sizes[0][2]
        for region in REGIONS:
            await world.check_restorable(region)

    run_virtual(story(), limit_seconds=1_000_000)


def test_any_point_within_retention_can_be_restored_from_every_store() -> None:
    async def story() -> None:
        world = World()
        holder = await world.open()
        await rounds(world, holder, 30, agents=3)
        await world.settled(holder)
        now = holder.writer.now()
        for region in REGIONS:
            view = await world.check_restorable(region)  # reads back every record that it lists
            oldest = min(record.received_at for record in view.records("busy-0", 10_000))
            assert now - oldest >= world.policy.retention_seconds
            # A base of deltas is carried at the end of its time and goes when the base passes that copy, some rounds apart.
            assert now - oldest <= 2 * world.policy.retention_seconds + 3 * world.policy.round_seconds

    run_virtual(story(), limit_seconds=100_000)


def test_what_a_newest_state_needs_is_kept_with_it() -> None:
    async def story() -> None:
        world = World()
        holder = await world.open()
        needs = {"needs": "parent"}
        assert await world.put(holder, "graph", "1", b"root")
        assert await world.put(holder, "graph", "2", b"change 2", parent="1", meta=needs)
        assert await world.put(holder, "graph", "3", b"change 3", parent="2", meta=needs)
        assert await world.put(holder, "graph", "w", b"pending", kind="writes", parent="3", meta={"attached": "1"})
        assert await world.put(holder, "graph", "i1", b"pay", kind="intended")
        assert await world.put(holder, "graph", "i2", b"mail", kind="intended")
        assert await world.put(holder, "graph", "d1", b"", kind="done", parent="i1")
        await rounds(world, holder, 30)
        await world.settled(holder)
        for region in REGIONS:
            view = await world.check_restorable(region)
            kept = [record.id for record in view.records("graph")]
            assert kept == ["d1", "i2", "w", "3", "2", "1"], kept  # newest first: their order is as it was

    run_virtual(story(), limit_seconds=100_000)


def test_a_store_that_was_away_longer_than_retention_is_seeded_anew_and_becomes_whole_again() -> None:
    async def story() -> None:
        world = World()
        holder = await world.open()
        assert await world.put(holder, "once", "only", body("once", 1))
        await rounds(world, holder, 3)
        await world.settled(holder)
        world.gates[FAR].cut = True
        behind = world.head(FAR)
        await rounds(world, holder, 30, first=12)
        assert world.head(HOME).base > behind.seq + 1
        assert world.head(FAR) == behind
        await holder.kill()
        holder = await world.open(view=holder.view)  # nobody has the old segments in memory now
        world.gates[FAR].cut = False
        await world.settled(holder)
        await rounds(world, holder, 2, first=400)
        await world.settled(holder)
        assert world.head(FAR).chain == world.head(HOME).chain
        assert world.head(FAR).records == world.head(HOME).records
        (salvage,) = world.head(FAR).salvage
        assert (salvage.first_seq, salvage.last_seq) == (behind.base, behind.seq)
        for region in REGIONS:
            await world.check_restorable(region)  # also that the salvage is still there

    run_virtual(story(), limit_seconds=100_000)


def test_nothing_is_deleted_while_only_one_store_has_it() -> None:
    async def story() -> None:
        world = World()
        holder = await world.open()
        await busy(world, holder, 2, 3)
        await world.settled(holder)
        world.gates[FAR].cut = world.gates[NEAR].cut = True
        await rounds(world, holder, 20, first=3)
        assert world.head(HOME).base == 1
        assert len(world.objects(HOME)) == world.head(HOME).seq

    run_virtual(story(), limit_seconds=100_000)


def test_a_store_that_is_slow_and_attached_is_waited_for() -> None:
    async def story() -> None:
        world = World()
        holder = await world.open()
        await busy(world, holder, 2, 3)
        await world.settled(holder)
        far = holder.writer.pumps[FAR]
        world.gates[FAR].fail("put_segment", 10_000)
        await rounds(world, holder, 20, first=3)
        stuck = world.head(FAR).seq
        assert not far.attached or world.head(HOME).base <= stuck + 1

    run_virtual(story(), limit_seconds=100_000)


def test_salvage_outlives_retention() -> None:
    async def story() -> None:
        world = World()
        holder = await world.open()
        await busy(world, holder, 2, 3)
        await world.settled(holder)
        world.gates[FAR].cut = world.gates[NEAR].cut = True
        for step in range(3):
            await world.put(holder, "cut-off", f"{step}", body("cut-off", step), delta=False)
        await holder.kill()
        tail = world.head(HOME).seq
        world.gates[FAR].cut = world.gates[NEAR].cut = False
        world.gates[HOME].cut = True
        world.expected.pop("cut-off", None)
        world.bodies = {key: value for key, value in world.bodies.items() if key[0] != "cut-off"}
        second = await world.open(NEAR)
        world.gates[HOME].cut = False
        await rounds(world, second, 30, first=3)
        await world.settled(second)
        (salvage,) = world.head(HOME).salvage
        assert isinstance(salvage, Salvage)
        assert salvage.last_seq == tail
        assert world.head(HOME).base > tail
        assert [ref for ref in world.objects(HOME) if ref.seq < world.head(HOME).base] == [
            SegmentRef(STREAM, seq, 1) for seq in range(salvage.first_seq, tail + 1)
        ]
        for region in REGIONS:
            await world.check_restorable(region)

    run_virtual(story(), limit_seconds=100_000)


def test_a_live_record_that_cannot_be_read_stops_retention_and_is_named() -> None:
    async def story() -> None:
        world = World()
        holder = await world.open()
        assert await world.put(holder, "once", "only", b"x" * 5000, delta=False)
        for n in range(3):  # pushes its body out of the warm ones
            assert await world.put(holder, "once", f"stays-{n}", b"y", delta=False, meta={"stays": "1"})
        seq = holder.view.find("once", "stays-0")
        assert seq is not None
        await world.settled(holder)
        world.servers[HOME].corrupt(SegmentRef(STREAM, seq[1], 1))
        world.expected["once"] = ("stays-2", b"y")
        await busy(world, holder, 2, 12, pause=world.policy.round_seconds)
        said = await world.steps(holder, 60)
        assert any("once" in text and "cannot be carried forward" in text for text in said), said
        assert {world.head(region).base for region in REGIONS} == {1}
        assert len(world.objects(HOME)) == world.head(HOME).seq

    run_virtual(story(), limit_seconds=100_000)


def test_carried_records_do_not_look_late_or_unreplicated() -> None:
    async def story() -> None:
        world = World()
        holder = await world.open()
        for n in range(5):
            assert await world.put(holder, f"idle-{n}", "only", body(f"idle-{n}", 0))
        await busy(world, holder, 1, 12, pause=world.policy.round_seconds)
        world.gates[FAR].cut = world.gates[NEAR].cut = True
        worst = 0.0
        for _ in range(60):
            await holder.step()
            await world.wait(0.01)
            backlog = holder.writer.backlog(NEAR)
            if backlog is not None and backlog.oldest_received_at is not None:
                worst = max(worst, holder.writer.now() - backlog.oldest_received_at)
            assert not [tail for tail in holder.writer.unreplicated() if tail.agent.startswith("idle")]
            assert holder.writer.oldest_waiting_seconds() < 5
        assert worst < 5

    run_virtual(story(), limit_seconds=100_000)


# --------------------------------------------------------------------------------------------------------------- crashes


async def crash_story(strike: int = 0, fault: str = "", then: str = NEAR, **more: Any) -> World:
    """A round of retention in which the holder dies at one call; another region goes on, and finishes it."""
    world = World(**more)
    holder = await world.open()
    assert await world.put(holder, "once", "only", body("once", 1))
    await busy(world, holder, 2, 12, pause=world.policy.round_seconds)
    await world.settled(holder)
    world.calls.clear()
    world.strike = lambda number, _: fault if number == strike else ""
    for step in range(40):
        await holder.step()
        await world.put(holder, "busy-0", f"1{step:05d}", body("busy-0", 1000 + step))
        await world.wait(0.02)
        if world.dead:
            break
    counted = list(world.calls)
    world.strike = lambda _number, _what: ""
    await holder.kill()
    await world.wait(1.0)
    second = await world.open(then)
    for step in range(12):
        await world.put(second, "busy-0", f"2{step:05d}", body("busy-0", 2000 + step))
        await world.wait(world.policy.round_seconds)
        await world.steps(second, 12, pause=0.01)
    await world.settled(second)
    await world.steps(second, 80, pause=0.05)
    world.calls = counted
    bases = {region: world.head(region).base for region in REGIONS}
    assert min(bases.values()) > 1, bases
    for region in REGIONS:
        await world.check_restorable(region)
        stale = [ref for ref in world.objects(region) if ref.seq < bases[region]]
        assert stale == [], f"{region} keeps {stale} before {bases[region]}"
    assert not second.lost
    return world


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize(
    ("fault", "then"), [("kill-before", NEAR), ("kill-after", NEAR), ("kill-after", HOME), ("lose-answer", NEAR)]
)
def test_a_holder_that_dies_at_any_call_of_a_round_loses_nothing_and_the_next_one_finishes_it(
    fault: str, then: str, part: int
) -> None:
    calls = run_virtual(crash_story(then=then), limit_seconds=100_000).calls
    for kind in ("set_base", "delete_segments", "put_snapshot", "put_catalogue"):
        assert sum(kind in call for call in calls) >= 3, "the round did not happen"
    wrong = []
    for number in range(1, len(calls) + 1):
        own = calls[number - 1].split(".")[1] not in {"put_segment", "advance"}
        if number % 3 != part or (not own and number % 13):
            continue  # every call that retention makes, and some of the pumps'
        try:
            run_virtual(crash_story(number, fault, then), limit_seconds=100_000)
        except AssertionError as error:
            wrong.append(f"{fault} at {number} ({calls[number - 1]}): {error}")
    assert not wrong, "\n".join(wrong)


def test_frames_are_carried_whole_and_say_where_they_stood() -> None:
    async def story() -> None:
        world = World()
        holder = await world.open()
        assert await world.put(holder, "once", "only", body("once", 1))
        place = holder.view.find("once", "only")
        assert place is not None
        await busy(world, holder, 2, 12, pause=world.policy.round_seconds)
        await world.steps(holder, 60)
        segments = [decode_segment(world.servers[HOME].get(ref)) for ref in world.objects(HOME)]
        carried = [made for segment in segments for made in segment.frames if ORIGIN in made.record.meta]
        assert carried
        assert all(made.base is None for made in carried)
        (once,) = [made for made in carried if made.record.agent == "once"]
        assert once.record.meta[ORIGIN] == f"{place[1]}.0"

    run_virtual(story(), limit_seconds=100_000)
