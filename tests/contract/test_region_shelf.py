"""What retention needs of every region store: base, deletion, snapshots, catalogue. In memory and against ministack."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from controller.adapters.catalogue_item import catalogue_key
from controller.adapters.memory.gate import FaultGate
from controller.adapters.memory.region_store import MemoryRegionStore, MemoryStore
from controller.domain.model import (
    GENESIS,
    Baseline,
    CatalogueEntry,
    EpochStart,
    FramePlace,
    Head,
    NamedSnapshot,
    Realignment,
    Salvage,
    SegmentRef,
    SnapshotRef,
)
from controller.errors import Conflict, FenceLost, NotFound, OutcomeUnknown, Refused
from controller.ports import RegionStore
from tests.support.stores import REGION, TABLE, MemoryWorld, World, link, next_commit, token

S = "s0"


async def grown(store: RegionStore, epoch: int, segments: int) -> Head:
    """A stream of objects and commits, one by one."""
    fence = token(epoch)
    head = await store.fence(fence)
    for _ in range(segments):
        await store.put_segment(fence, SegmentRef(S, head.seq + 1, epoch), b"x")
        head = await store.advance(fence, next_commit(head, fence))
    return head


def chain(seq: int, epoch: int = 1) -> str:
    found = GENESIS
    for n in range(1, seq + 1):
        found = link(found, n, epoch)
    return found


def named(seq: int, epoch: int = 1) -> NamedSnapshot:
    return NamedSnapshot(seq, epoch, chain(seq, epoch), "ab" * 32)


# ------------------------------------------------------------------------------------------------------------------ base


async def test_the_base_moves_and_snapshots_are_named_in_one_step(store: RegionStore) -> None:
    head = await grown(store, 1, 5)
    to = Baseline(4, chain(3), (named(3), named(5)))
    after = await store.set_base(token(1), head, to)
    assert after == replace(head, base=4, base_chain=chain(3), snapshots=to.snapshots)
    assert await store.read_head(S) == after
    assert await store.set_base(token(1), head, to) == after  # already so


async def test_the_base_moves_although_the_head_has_grown_since_it_was_read(store: RegionStore) -> None:
    head = await grown(store, 1, 5)
    longer = await store.advance(token(1), next_commit(head, token(1)))
    after = await store.set_base(token(1), head, Baseline(4, chain(3)))
    assert after == replace(longer, base=4, base_chain=chain(3))
    assert (await store.advance(token(1), next_commit(after, token(1)))).base == 4


async def test_a_base_is_not_moved_by_a_stale_epoch_nor_over_somebodys_change(store: RegionStore) -> None:
    head = await grown(store, 1, 5)
    moved = await store.set_base(token(1), head, Baseline(3, chain(2), (named(4),)))
    with pytest.raises(Conflict):
        await store.set_base(token(1), head, Baseline(4, chain(3)))
    with pytest.raises(Conflict):  # the base is as read, the snapshots are not
        await store.set_base(token(1), replace(moved, snapshots=()), Baseline(4, chain(3)))
    fenced = await store.fence(token(2, instance="b"))
    with pytest.raises(FenceLost):
        await store.set_base(token(1), moved, Baseline(4, chain(3)))
    with pytest.raises(Conflict, match="not fenced"):
        await store.set_base(token(3), fenced, Baseline(4, chain(3)))
    assert await store.read_head(S) == fenced


async def test_a_base_that_the_store_does_not_reach_is_a_conflict(store: RegionStore) -> None:
    """The caller read a longer head; the store was realigned since."""
    head = await grown(store, 1, 5)
    fence = token(2)
    before = await store.fence(fence)
    salvage = Salvage(3, 5, before.epochs, before.chain, 2)
    await store.realign(fence, before, Realignment(2, chain(2), 1, GENESIS, (EpochStart(1, 1),), salvage))
    with pytest.raises(Conflict, match="expected"):
        await store.set_base(fence, replace(head, epoch=2), Baseline(5, chain(4)))
    assert (await store.read_head(S)).base == 1


@pytest.mark.parametrize(
    "to",
    [
        Baseline(2, chain(1)),
        Baseline(7, chain(6)),
        Baseline(3, "f" * 64),
        Baseline(4, "xyz"),
        Baseline(4, chain(3), (named(2),)),
        Baseline(4, chain(3), (named(6),)),
        Baseline(4, chain(3), (named(5), named(4))),
        Baseline(4, chain(3), (NamedSnapshot(5, 1, "?", "ab" * 32),)),
        Baseline(4, chain(3), (NamedSnapshot(5, 1, chain(5), "short"),)),
    ],
)
async def test_a_base_that_can_never_be_right_is_refused(store: RegionStore, to: Baseline) -> None:
    head = await grown(store, 1, 5)
    head = await store.set_base(token(1), head, Baseline(3, chain(2)))
    with pytest.raises(Refused) as caught:
        await store.set_base(token(1), head, to)
    assert caught.value.hint
    assert await store.read_head(S) == head


async def test_a_realignment_forgets_snapshots_of_what_it_cuts(store: RegionStore) -> None:
    head = await grown(store, 1, 5)
    await store.set_base(token(1), head, Baseline(1, GENESIS, (named(2), named(4))))
    fence = token(2)
    before = await store.fence(fence)
    salvage = Salvage(4, 5, before.epochs, before.chain, 2)
    to = Realignment(3, chain(3), 1, GENESIS, (EpochStart(1, 1),), salvage)
    after = await store.realign(fence, before, to)
    assert after.snapshots == (named(2),)
    assert await store.realign(fence, before, to) == after


@pytest.mark.parametrize("lost", ["answer", "request"])
async def test_a_change_of_base_whose_answer_is_lost_can_be_repeated(lost: str) -> None:
    gate = FaultGate(asyncio.sleep)
    store = MemoryRegionStore(MemoryStore(REGION), gate)
    head = await grown(store, 1, 5)
    to = Baseline(4, chain(3), (named(5),))
    if lost == "answer":
        gate.lose("set_base")
        with pytest.raises(OutcomeUnknown):
            await store.set_base(token(1), head, to)
        assert (await store.read_head(S)).base == 4
    else:
        gate.fail("set_base")
        with pytest.raises(Exception, match="not sent"):
            await store.set_base(token(1), head, to)
        assert (await store.read_head(S)).base == 1
    assert (await store.set_base(token(1), head, to)).base == 4


# -------------------------------------------------------------------------------------------------------------- deletion


async def test_only_what_lies_before_the_base_is_deleted(store: RegionStore) -> None:
    head = await grown(store, 1, 5)
    refs = [SegmentRef(S, seq, 1) for seq in range(1, 6)]
    with pytest.raises(Refused, match="is kept"):
        await store.delete_segments(token(1), refs[:1])
    await store.set_base(token(1), head, Baseline(4, chain(3)))
    with pytest.raises(Refused, match="is kept"):
        await store.delete_segments(token(1), refs)
    assert await store.list_segments(S, 1) == tuple(refs)
    await store.delete_segments(token(1), refs[:3])
    await store.delete_segments(token(1), refs[:3])  # absent is fine
    await store.delete_segments(token(1), [])
    assert await store.list_segments(S, 1) == tuple(refs[3:])
    with pytest.raises(NotFound):
        await store.get_segment(refs[0])


async def test_salvage_is_not_deleted_and_strays_beside_it_are(store: RegionStore) -> None:
    await grown(store, 1, 4)
    fence = token(2)
    await store.put_segment(fence, SegmentRef(S, 3, 2), b"never committed")
    before = await store.fence(fence)
    salvage = Salvage(3, 4, before.epochs, before.chain, 2)
    head = await store.realign(fence, before, Realignment(2, chain(2), 1, GENESIS, (EpochStart(1, 1),), salvage))
    for _ in range(4):
        head = await store.advance(fence, next_commit(head, fence))
    head = await store.set_base(fence, head, Baseline(6, "b" * 64))
    for seq in (3, 4):
        with pytest.raises(Refused, match="salvage"):
            await store.delete_segments(fence, [SegmentRef(S, 1, 1), SegmentRef(S, seq, 1)])
    await store.delete_segments(fence, [SegmentRef(S, 1, 1), SegmentRef(S, 2, 1), SegmentRef(S, 3, 2)])
    assert await store.list_segments(S, 1) == (SegmentRef(S, 3, 1), SegmentRef(S, 4, 1))


async def test_a_fenced_writer_deletes_nothing(store: RegionStore) -> None:
    head = await grown(store, 1, 5)
    head = await store.set_base(token(1), head, Baseline(4, chain(3), (named(5),)))
    await store.put_snapshot(token(1), SnapshotRef(S, 2, 1), b"old")
    await store.fence(token(2, instance="b"))
    with pytest.raises(FenceLost):
        await store.delete_segments(token(1), [SegmentRef(S, 1, 1)])
    with pytest.raises(FenceLost):
        await store.delete_snapshots(token(1), [SnapshotRef(S, 2, 1)])
    with pytest.raises(FenceLost):
        await store.put_catalogue(token(1), [entry("a")])
    assert len(await store.list_segments(S, 1)) == 5
    assert await store.list_snapshots(S) == (SnapshotRef(S, 2, 1),)


async def test_too_many_or_foreign_objects_are_refused(store: RegionStore) -> None:
    await grown(store, 1, 1)
    with pytest.raises(Refused, match="1001"):
        await store.delete_segments(token(1), [SegmentRef(S, n, 1) for n in range(1, 1002)])
    with pytest.raises(Refused, match="s1"):
        await store.delete_segments(token(1), [SegmentRef("s1", 1, 1)])
    with pytest.raises(Refused, match="s1"):
        await store.delete_snapshots(token(1), [SnapshotRef("s1", 1, 1)])


async def test_a_thousand_objects_go_in_one_call(store: RegionStore) -> None:
    fence = token(1)
    head = await store.fence(fence)
    head = await store.advance(fence, next_commit(head, fence, 1200))
    refs = [SegmentRef(S, seq, 1) for seq in range(1, 1001)]
    await asyncio.gather(*(store.put_segment(fence, ref, b"") for ref in [*refs, SegmentRef(S, 1100, 1)]))
    await store.set_base(fence, head, Baseline(1101, "c" * 64))
    await store.delete_segments(fence, refs)
    assert await store.list_segments(S, 1) == (SegmentRef(S, 1100, 1),)


# ------------------------------------------------------------------------------------------------------------- snapshots


async def test_a_snapshot_is_written_once_read_back_listed_and_deleted(store: RegionStore) -> None:
    await grown(store, 3, 2)
    refs = [SnapshotRef(S, 10, 3), SnapshotRef(S, 2, 3), SnapshotRef(S, 2, 1)]
    for number, ref in enumerate(refs):
        await store.put_snapshot(token(3), ref, b"index %d" % number)
    await store.put_snapshot(token(3), refs[0], b"index 0")  # the same again
    with pytest.raises(Conflict, match="other content"):
        await store.put_snapshot(token(3), refs[0], b"index 9")
    assert await store.get_snapshot(refs[1]) == b"index 1"
    assert await store.list_snapshots(S) == tuple(sorted(refs))
    assert len(await store.list_segments(S, 1)) == 2  # they do not lie in each other's way
    await store.delete_snapshots(token(3), refs[:1])
    await store.delete_snapshots(token(3), refs[:1])
    assert await store.list_snapshots(S) == tuple(sorted(refs[1:]))
    with pytest.raises(NotFound):
        await store.get_snapshot(refs[0])
    with pytest.raises(FenceLost):
        await store.put_snapshot(token(3), SnapshotRef(S, 2, 4), b"from the future")


async def test_a_snapshot_that_the_head_names_is_kept(store: RegionStore) -> None:
    head = await grown(store, 1, 3)
    for seq in (2, 3):
        await store.put_snapshot(token(1), SnapshotRef(S, seq, 1), b"index")
    await store.set_base(token(1), head, Baseline(1, GENESIS, (named(3),)))
    with pytest.raises(Refused, match="named by the head"):
        await store.delete_snapshots(token(1), [SnapshotRef(S, 2, 1), SnapshotRef(S, 3, 1)])
    assert len(await store.list_snapshots(S)) == 2
    await store.delete_snapshots(token(1), [SnapshotRef(S, 2, 1)])
    assert await store.list_snapshots(S) == (SnapshotRef(S, 3, 1),)


# ---------------------------------------------------------------------------------------------------------------- epochs


async def test_the_first_of_several_epochs_is_dropped_under_the_fence_and_nothing_else_is(store: RegionStore) -> None:
    for epoch in (1, 2, 5):
        await grown(store, epoch, 2)
    starts = (EpochStart(1, 1), EpochStart(2, 3), EpochStart(5, 5))
    before = await store.read_head(S)
    assert before.epochs == starts
    with pytest.raises(FenceLost):
        await store.forget_epoch(token(2), starts[0])
    with pytest.raises(Conflict):
        await store.forget_epoch(token(6), starts[0])
    with pytest.raises(Conflict):
        await store.forget_epoch(token(5), starts[1])  # not the first
    assert await store.forget_epoch(token(5), starts[0]) == replace(before, epochs=starts[1:])
    assert (await store.forget_epoch(token(5), starts[0])).epochs == starts[1:]  # it is so already
    head = await store.forget_epoch(token(5), starts[1])
    assert head.epochs == starts[2:]
    with pytest.raises(Conflict):
        await store.forget_epoch(token(5), starts[2])  # the last one says who owns what is there
    assert await store.read_head(S) == replace(before, epochs=starts[2:])
    await store.put_segment(token(5), SegmentRef(S, 7, 5), b"x")
    assert (await store.advance(token(5), next_commit(head, token(5)))).epochs == starts[2:]


async def test_an_epoch_that_begins_while_another_is_dropped_is_not_lost(store: RegionStore) -> None:
    await grown(store, 1, 1)
    head = await grown(store, 2, 1)
    fence = token(3)
    head = await store.fence(fence)
    await store.put_segment(fence, SegmentRef(S, 3, 3), b"x")
    await asyncio.gather(store.advance(fence, next_commit(head, fence)), store.forget_epoch(fence, EpochStart(1, 1)))
    assert (await store.read_head(S)).epochs == (EpochStart(2, 2), EpochStart(3, 3))


# --------------------------------------------------------------------------------------------------------------- salvage


async def cut(store: RegionStore) -> tuple[Salvage, Head]:
    """Segments 3 and 4 of epoch 1 were cut off by epoch 2, which goes on from segment 2."""
    await grown(store, 1, 4)
    before = await store.fence(token(2))
    piece = Salvage(3, 4, (EpochStart(1, 3),), before.chain, 2)
    return piece, await store.realign(token(2), before, Realignment(2, chain(2), 1, GENESIS, (EpochStart(1, 1),), piece))


async def test_one_salvage_is_let_go_of_under_the_fence_and_nothing_else_is(store: RegionStore) -> None:
    piece, head = await cut(store)
    for _ in range(3):
        await store.put_segment(token(2), SegmentRef(S, head.seq + 1, 2), b"x")
        head = await store.advance(token(2), next_commit(head, token(2)))
    fenced = await store.fence(token(3))
    other = Salvage(4, 5, (EpochStart(2, 4),), fenced.chain, 3)
    starts = (EpochStart(1, 1), EpochStart(2, 3))
    before = await store.realign(token(3), fenced, Realignment(3, "c" * 64, 1, GENESIS, starts, other))
    assert before.salvage == (piece, other)
    with pytest.raises(FenceLost):
        await store.forget_salvage(token(2), piece)
    with pytest.raises(Conflict):
        await store.forget_salvage(token(4), piece)
    changed = replace(piece, last_chain="d" * 64)
    assert await store.forget_salvage(token(3), changed) == before  # the head does not name such a one
    assert await store.forget_salvage(token(3), other) == replace(before, salvage=(piece,))
    assert await store.forget_salvage(token(3), other) == replace(before, salvage=(piece,))
    assert await store.forget_salvage(token(3), piece) == replace(before, salvage=())
    assert await store.read_head(S) == replace(before, salvage=())


async def test_what_a_discarded_salvage_leaves_is_deleted_and_what_a_history_may_need_is_not(store: RegionStore) -> None:
    piece, head = await cut(store)
    gone = [SegmentRef(S, 3, 1), SegmentRef(S, 4, 1)]
    with pytest.raises(Refused, match="is salvage"):
        await store.delete_diverged(token(2), gone)
    head = await store.forget_salvage(token(2), piece)
    with pytest.raises(Refused, match="may become so"):  # the store is too short to tell
        await store.delete_diverged(token(2), gone)
    await store.put_segment(token(2), SegmentRef(S, 3, 2), b"x")
    head = await store.advance(token(2), next_commit(head, token(2)))
    await store.put_segment(token(2), SegmentRef(S, 4, 2), b"on its way")
    for ref in (SegmentRef(S, 1, 1), SegmentRef(S, 3, 2), SegmentRef(S, 4, 2)):
        with pytest.raises(Refused, match="may become so"):
            await store.delete_diverged(token(2), [*gone, ref])
    with pytest.raises(Conflict):
        await store.delete_diverged(token(3), gone)
    await store.delete_diverged(token(2), gone)
    await store.delete_diverged(token(2), gone)  # absent is fine
    left = [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert [(ref.seq, ref.epoch) for ref in await store.list_segments(S, 1)] == left
    assert await store.read_head(S) == head
    await store.fence(token(3, instance="b"))
    with pytest.raises(FenceLost):
        await store.delete_diverged(token(2), gone)


# ------------------------------------------------------------------------------------------------------------- catalogue


def entry(agent: str, seq: int = 7) -> CatalogueEntry:
    places = (FramePlace(seq, 1, 3, 500, 90), FramePlace(2, 1, 0, 120, 4000))
    return CatalogueEntry(agent, "checkpoint", f"{agent}/7", "cd" * 32, 5000, "delta", 1_700_000_000.25, places)


def catalogue_of(world: World, agent: str) -> Any:
    if isinstance(world, MemoryWorld):
        return world.server.catalogue.get((S, agent))
    found: Any = world.dynamodb().get_item(TableName=TABLE, Key=catalogue_key(world.group, S, agent), ConsistentRead=True)
    return found.get("Item")


async def test_the_catalogue_has_one_item_for_each_agent_and_the_newest_stands(world: World) -> None:
    store = await world.client()
    await grown(store, 1, 1)
    names = [f"agent/{n}#ü" for n in range(60)]  # more than two batches
    await store.put_catalogue(token(1), [entry(name) for name in names])
    await store.put_catalogue(token(1), [entry(names[5], seq=9)])
    await store.put_catalogue(token(1), [])
    assert all(catalogue_of(world, name) for name in names)
    found = catalogue_of(world, names[5])
    if isinstance(world, MemoryWorld):
        assert found == replace(entry(names[5], seq=9), by_epoch=1)
    else:
        assert {name: found[name] for name in ("id", "seq", "offset", "length", "encoding", "by_epoch")} == {
            "id": {"S": "agent/5#ü/7"},
            "seq": {"N": "9"},
            "offset": {"N": "500"},
            "length": {"N": "90"},
            "encoding": {"S": "delta"},
            "by_epoch": {"N": "1"},
        }
        assert found["chain"]["L"][1] == {"L": [{"N": str(n)} for n in (2, 1, 0, 120, 4000)]}
    assert (await store.read_head(S)).seq == 1  # the head is another item
