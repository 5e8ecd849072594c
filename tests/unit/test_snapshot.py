"""Index snapshots: a copy that begins with one equals one that read all; a bad one is refused; nothing is overclaimed."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from typing import Any

import pytest

from controller.adapters.memory.gate import FaultGate
from controller.adapters.memory.region_store import MemoryRegionStore
from controller.domain.model import NamedSnapshot, SnapshotRef
from controller.errors import Corrupt, Unavailable
from controller.lab.virtual_time import run_virtual
from controller.stream import follower as follower_module
from controller.stream import snapshot as snapshot_module
from controller.stream.follower import Follower
from controller.stream.reader import read_record, warm
from controller.stream.snapshot import load_snapshot, make_snapshot, open_snapshot
from controller.stream.view import View
from tests.support.keeping import FAR, GROUP, HOME, NEAR, REGIONS, STREAM, Holder, World
from tests.unit.test_retention import body, busy, rounds


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pages, and snapshots that are worth it early."""
    monkeypatch.setattr(snapshot_module, "PAGE_ROWS", 7)
    monkeypatch.setattr(follower_module, "SNAPSHOT_SEGMENTS", 5)


def rows(view: View, *, proven: bool = False) -> dict[str, list[Any]]:
    """Everything that a view knows, without its own numbers."""
    all_ = view.tables.all
    verified = ", r.verified" if proven else ", r.verified ISNULL"
    return {
        "streams": all_("SELECT name, seq, chain, floor_seq, floor_chain, records, loading FROM streams ORDER BY name"),
        "segments": all_("SELECT seq, chain, epoch, records, bytes, at, reach FROM segments ORDER BY seq"),
        "agents": all_(
            "SELECT a.name, a.records, r.id, a.latest_ord, a.ruled FROM agents a JOIN records r ON r.no=a.latest ORDER BY 1"
        ),
        "records": all_(
            "SELECT a.name, r.id, r.kind, r.parent, r.seq, r.ordinal, r.ord, r.sha256, r.size, r.received_at, r.created_at, "
            "r.attempt, r.copies, r.encoding, r.base, r.meta, r.place, r.length, "
            "CASE WHEN EXISTS (SELECT 1 FROM duplicates d WHERE d.record=r.no AND d.base IS NULL) THEN 0 "
            f"ELSE r.depth END{verified} "
            "FROM records r JOIN agents a ON a.no=r.agent ORDER BY a.name, r.ord"
        ),
        "duplicates": all_(
            "SELECT d.seq, d.ordinal, r.id, d.base, d.depth, d.place, d.length FROM duplicates d "
            "JOIN records r ON r.no=d.record ORDER BY 1, 2"
        ),
        "heads": all_(
            "SELECT a.name, h.kind, r.id, h.ord, q.id, h.ord2, h.warm FROM heads h JOIN agents a ON a.no=h.agent "
            "JOIN records r ON r.no=h.record LEFT JOIN records q ON q.no=h.record2 ORDER BY 1, 2"
        ),
    }


def known(view: View) -> list[Any]:
    """Records in their order, wherever a copy first saw them: one that begins late knows them from where they were carried."""
    return view.tables.all(
        "SELECT a.name, r.id, r.ord, r.sha256, r.meta FROM records r JOIN agents a ON a.no=r.agent ORDER BY 1, 3"
    )


async def grown(world: World) -> Holder:
    """A history with idle and busy agents, carried records and a snapshot, and a tail after it."""
    holder = await world.open()
    for n in range(12):
        assert await world.put(holder, f"idle-{n}", "only", body(f"idle-{n}", 0), meta={"stays": "1"} if n % 3 else {})
    await rounds(world, holder, 20, agents=3)
    await world.settled(holder)
    while holder.retention._snapshot_seq < holder.writer.seq - 4:
        await world.wait(world.policy.snapshot_seconds)
        await world.steps(holder, 30, pause=0.01)
    await world.settled(holder)
    await world.steps(holder, 30, pause=0.01)
    await busy(world, holder, 3, 2, first=1000)
    await world.settled(holder)
    assert all(world.head(region).snapshots for region in REGIONS)
    return holder


def small_world(**more: Any) -> World:
    return World(snapshot_seconds=20.0, **more)


def test_a_cold_copy_from_a_snapshot_equals_one_that_read_everything_and_needs_few_reads() -> None:
    async def story() -> None:
        world = small_world()
        holder = await grown(world)
        head = world.head(FAR)
        gate = FaultGate(world.clock.sleep)
        quick = await world.cold(FAR, gate)
        assert gate.calls["get_snapshot"] == 1
        chains = [(quick.chain_depth(agent, record_id) or 0) + 1 for agent, (record_id, _) in world.expected.items()]
        assert gate.calls["get_segment"] <= (head.seq - head.snapshots[-1].seq) + sum(chains) + 5  # each chain once, at most
        world.servers[NEAR].heads[STREAM] = replace(world.head(NEAR), snapshots=())
        slow = await world.cold(NEAR)
        assert quick.position(STREAM) == slow.position(STREAM) == holder.view.position(STREAM)
        assert rows(quick) == rows(holder.view)
        assert known(quick) == known(slow)
        for name, (record_id, expected) in world.expected.items():
            found = quick.latest(name)
            assert found is not None
            assert (found[0].id, found[1]) == (record_id, expected)
        await world.check_restorable(FAR)

    run_virtual(story(), limit_seconds=100_000)


def test_a_copy_that_was_not_read_back_does_not_say_that_it_is_proven() -> None:
    async def story() -> None:
        world = small_world()
        await grown(world)
        view = View(None)
        store = MemoryRegionStore(world.servers[FAR], FaultGate(world.clock.sleep))
        follower = Follower(store, view, STREAM, world.clock, GROUP)
        position = await follower.step(1)
        assert view.position(STREAM)[0] >= world.head(FAR).snapshots[-1].seq
        assert position.seq == view.floor(STREAM)[0]
        assert view.restorable("idle-3") is None
        with pytest.raises(Unavailable, match="not loaded yet"):
            view.latest("idle-3")
        again = Follower(store, view, STREAM, world.clock, GROUP)  # a restart with the same view
        assert again.position().seq == view.floor(STREAM)[0]
        for _ in range(200):
            position = await again.step(2)
        assert (position.seq, position.chain) == view.position(STREAM) == (world.head(FAR).seq, world.head(FAR).chain)
        assert view.restorable("idle-3") is not None
        assert not await warm(view, store, 10)

    run_virtual(story(), limit_seconds=100_000)


@pytest.mark.parametrize("damage", ["flipped", "gone", "foreign", "of another history", "half"])
def test_a_bad_snapshot_is_refused_and_an_older_one_or_the_segments_serve(damage: str) -> None:
    async def story() -> None:
        world = small_world()
        holder = await grown(world)
        server, head = world.servers[FAR], world.head(FAR)
        newest = head.snapshots[-1]
        ref = SnapshotRef(STREAM, newest.seq, newest.epoch)
        if damage == "flipped":
            server.corrupt_snapshot(ref)
        elif damage == "gone":
            del server.snapshots[ref]
        elif damage == "foreign":  # a whole snapshot, of another group
            _, other = await make_snapshot(holder.view, "another", STREAM, 1.0)
            server.corrupt_snapshot(ref, other)
            named = replace(newest, sha256=hashlib.sha256(other).hexdigest())
            server.heads[STREAM] = replace(head, snapshots=(*head.snapshots[:-1], named))
        elif damage == "half":
            cut = server.snapshots[ref].data[:-1000]
            cut += hashlib.sha256(cut).digest()
            server.corrupt_snapshot(ref, cut)
            named = replace(newest, sha256=hashlib.sha256(cut).hexdigest())
            server.heads[STREAM] = replace(head, snapshots=(*head.snapshots[:-1], named))
        else:  # the head names another chain than its segments have
            server.heads[STREAM] = replace(head, snapshots=(*head.snapshots[:-1], replace(newest, chain="e" * 64)))
        store = MemoryRegionStore(server, FaultGate(world.clock.sleep))
        view = View(None)
        follower = Follower(store, view, STREAM, world.clock, GROUP)
        for _ in range(200):
            await follower.step(500)
        assert follower.position().seq == head.seq
        assert f"segment {newest.seq}" in follower.said
        server.heads[STREAM] = replace(head, snapshots=())
        assert known(view) == known(await world.cold(FAR))

    run_virtual(story(), limit_seconds=100_000)


def test_a_snapshot_that_the_base_overtook_while_it_was_loaded_still_leads_to_a_whole_copy() -> None:
    """What its rows point at is deleted, and the frames that were carried for it come only later in the tail."""

    async def story() -> None:
        world = small_world()
        holder = await grown(world)
        named = world.head(FAR).snapshots[-1]
        ref = SnapshotRef(STREAM, named.seq, named.epoch)
        data = world.servers[FAR].snapshots[ref]
        while world.head(FAR).base <= named.seq - 60:
            await rounds(world, holder, 1, agents=3, first=2000 + world.head(FAR).seq)
        await world.settled(holder)
        assert world.head(FAR).base <= named.seq
        world.servers[FAR].snapshots[ref] = data
        world.servers[FAR].heads[STREAM] = replace(world.head(FAR), snapshots=(named,))
        gate = FaultGate(world.clock.sleep)
        view = await world.cold(FAR, gate)
        assert gate.calls["get_snapshot"] == 1
        for name, (record_id, expected) in world.expected.items():
            found = view.latest(name)
            assert found is not None
            assert (found[0].id, found[1]) == (record_id, expected)

    run_virtual(story(), limit_seconds=100_000)


def test_loading_that_is_cut_short_leaves_nothing_behind(tmp_path: Any) -> None:
    async def story() -> None:
        world = small_world()
        holder = await grown(world)
        _, data = await make_snapshot(holder.view, GROUP, STREAM, 1.0)
        seq, chain = holder.view.position(STREAM)
        named = NamedSnapshot(seq, 1, chain, hashlib.sha256(data).hexdigest())
        view = View(tmp_path / "view.db")
        snapshot = open_snapshot(data, named, GROUP, STREAM)
        loading = load_snapshot(view, snapshot).__await__()
        for _ in range(4):
            next(loading)
        assert view.agents() or view.tables.all("SELECT 1 FROM segments")
        assert view.position(STREAM) == view.floor(STREAM)
        del loading
        view.close()
        view = View(tmp_path / "view.db")
        assert view.agents() == ()
        assert view.position(STREAM) == view.floor(STREAM) == holder.view.floor(STREAM)
        await load_snapshot(view, snapshot)
        assert rows(view) == rows(holder.view)
        view.close()

    run_virtual(story(), limit_seconds=100_000)


def test_bytes_of_any_kind_are_refused_and_never_crash() -> None:
    async def story() -> None:
        world = small_world()
        holder = await grown(world)
        _, data = await make_snapshot(holder.view, GROUP, STREAM, 1.0)
        seq, chain = holder.view.position(STREAM)
        rng = random.Random(7)
        for _ in range(300):
            bad = bytearray(data[:-32])
            for _ in range(rng.randint(1, 4)):
                bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            bad = bad[: rng.choice([len(bad), rng.randrange(len(bad))])]
            whole = bytes(bad) + hashlib.sha256(bad).digest()
            named = NamedSnapshot(seq, 1, chain, hashlib.sha256(whole).hexdigest())
            view = View(None)
            try:
                await load_snapshot(view, open_snapshot(whole, named, GROUP, STREAM))
            except Corrupt:
                assert view.agents() == ()
                assert view.position(STREAM) == view.floor(STREAM)

    run_virtual(story(), limit_seconds=100_000)


def test_a_standby_that_fell_behind_a_little_keeps_what_it_has_proven() -> None:
    async def story() -> None:
        world = small_world()
        holder = await grown(world)
        server, head = world.servers[FAR], world.head(FAR)
        gate = FaultGate(world.clock.sleep)
        view = View(None)
        follower = Follower(MemoryRegionStore(server, gate), view, STREAM, world.clock, GROUP)
        server.heads[STREAM] = replace(head, snapshots=())
        for _ in range(3):
            position = await follower.step(20)
        server.heads[STREAM] = head
        assert head.base <= position.seq < head.snapshots[-1].seq - 20
        for _ in range(100):
            before, position = position, await follower.step(20)
            assert position.seq >= before.seq
        assert position.seq == holder.view.position(STREAM)[0]
        assert gate.calls["get_snapshot"] == 0

    run_virtual(story(), limit_seconds=100_000)


def test_old_snapshots_go_and_the_named_ones_are_there() -> None:
    async def story() -> None:
        world = small_world()
        holder = await grown(world)
        await rounds(world, holder, 30, first=2000)
        await world.settled(holder)
        await world.steps(holder, 60, pause=0.01)
        for region in REGIONS:
            named = {SnapshotRef(STREAM, found.seq, found.epoch) for found in world.head(region).snapshots}
            assert 1 <= len(named) <= 3
            assert named == set(world.servers[region].snapshots)

    run_virtual(story(), limit_seconds=100_000)


def test_a_region_that_starts_from_a_snapshot_can_be_promoted_at_once_and_loses_nothing() -> None:
    async def story() -> None:
        world = small_world()
        holder = await grown(world)
        await holder.kill()
        world.gates[HOME].cut = True
        second = await world.open(NEAR)  # with an empty view
        for n in range(12):
            found = second.view.latest(f"idle-{n}")
            assert found is not None
            assert found[1] == body(f"idle-{n}", 0)
        await rounds(world, second, 20, first=3000)
        world.gates[HOME].cut = False
        await world.settled(second)
        await rounds(world, second, 3, first=4000)
        await world.settled(second)
        for region in REGIONS:
            view = await world.check_restorable(region)
            store = MemoryRegionStore(world.servers[region], FaultGate(world.clock.sleep))
            assert (await read_record(view, store, "idle-4", "only"))[1] == body("idle-4", 0)

    run_virtual(story(), limit_seconds=100_000)
