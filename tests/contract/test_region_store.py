"""One suite for every RegionStore: what the port's docstrings and DESIGN section 4 promise, in memory and against ministack."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from controller.adapters import region_store
from controller.adapters.memory.region_store import MemoryStore
from controller.adapters.region_store import AwsRegionStore
from controller.domain.model import GENESIS, Commit, EpochStart, Fence, Head, Realignment, Salvage, SegmentRef
from controller.errors import Conflict, Corrupt, DrError, FenceLost, NotFound, Refused
from controller.ports import RegionStore
from tests.support.stores import AwsWorld, MemoryWorld, World, check_history, link, next_commit, token

S = "s0"


async def grown(store: RegionStore, epoch: int, segments: int) -> Head:
    """A stream fenced for the epoch and advanced one by one."""
    fence = token(epoch)
    head = await store.fence(fence)
    for _ in range(segments):
        head = await store.advance(fence, next_commit(head, fence))
    return head


# -------------------------------------------------------------------------------------------------------------- segments


async def test_what_was_put_can_be_read_back(store: RegionStore) -> None:
    ref = SegmentRef(S, 1, 3)
    await store.put_segment(token(3), ref, b"segment one")
    assert await store.get_segment(ref) == b"segment one"


async def test_an_empty_and_a_large_object_survive_the_way(store: RegionStore) -> None:
    large = random.Random(1).randbytes(3 * 1024 * 1024 + 7)
    await store.put_segment(token(1), SegmentRef(S, 1, 1), b"")
    await store.put_segment(token(1), SegmentRef(S, 2, 1), large)
    assert await store.get_segment(SegmentRef(S, 1, 1)) == b""
    assert await store.get_segment(SegmentRef(S, 2, 1)) == large


async def test_putting_the_same_content_again_is_success_for_any_writer(store: RegionStore) -> None:
    ref = SegmentRef(S, 1, 1)
    await store.put_segment(token(1), ref, b"same")
    await store.put_segment(token(1), ref, b"same")
    await store.put_segment(token(2, instance="b"), ref, b"same")
    assert await store.get_segment(ref) == b"same"


async def test_other_content_under_the_same_key_is_a_conflict_and_changes_nothing(store: RegionStore) -> None:
    ref = SegmentRef(S, 1, 1)
    await store.put_segment(token(1), ref, b"first")
    with pytest.raises(Conflict, match="other content"):
        await store.put_segment(token(1), ref, b"other")
    with pytest.raises(Conflict, match="other content"):  # also when it is as long
        await store.put_segment(token(1), ref, b"farst")
    assert await store.get_segment(ref) == b"first"


async def test_of_writers_that_race_for_one_key_exactly_one_content_wins(world: World) -> None:
    stores = [await world.client() for _ in range(5)]
    ref = SegmentRef(S, 1, 1)
    results = await asyncio.gather(
        *(s.put_segment(token(1), ref, f"content {n}".encode()) for n, s in enumerate(stores)), return_exceptions=True
    )
    winners = [n for n, result in enumerate(results) if result is None]
    assert len(winners) == 1
    assert all(isinstance(result, Conflict) for n, result in enumerate(results) if n not in winners)
    assert await stores[0].get_segment(ref) == f"content {winners[0]}".encode()


async def test_a_segment_that_does_not_exist_is_not_found(store: RegionStore) -> None:
    await store.put_segment(token(2), SegmentRef(S, 1, 2), b"of epoch 2")
    with pytest.raises(NotFound):
        await store.get_segment(SegmentRef(S, 1, 1))


async def test_a_flipped_bit_is_corrupt(world: World) -> None:
    store, ref = await world.client(), SegmentRef(S, 1, 1)
    await store.put_segment(token(1), ref, b"precious bytes")
    world.flip(ref)
    with pytest.raises(Corrupt) as caught:
        await store.get_segment(ref)
    assert ref.key in caught.value.message
    assert caught.value.hint


async def test_an_object_that_lost_its_end_is_corrupt(world: World) -> None:
    store, ref = await world.client(), SegmentRef(S, 1, 1)
    await store.put_segment(token(1), ref, b"precious bytes")
    world.truncate(ref, 5)
    with pytest.raises(Corrupt, match="5 bytes"):
        await store.get_segment(ref)


async def test_a_copy_of_an_older_epochs_segment_is_accepted_a_future_one_is_not(store: RegionStore) -> None:
    await store.put_segment(token(5), SegmentRef(S, 1, 3), b"copied from another region")
    with pytest.raises(FenceLost) as caught:
        await store.put_segment(token(5), SegmentRef(S, 1, 6), b"from the future")
    assert caught.value.epoch == 6


async def test_listing_is_ascending_by_sequence_and_epoch_and_begins_where_asked(store: RegionStore) -> None:
    names = [(2, 1), (1, 1), (10, 2), (3, 2), (3, 1), (11, 2)]
    for seq, epoch in names:
        await store.put_segment(token(9), SegmentRef(S, seq, epoch), b"x")
    await store.put_segment(token(9, stream="s01"), SegmentRef("s01", 1, 1), b"of a stream whose name begins alike")
    assert await store.list_segments(S, 1) == tuple(SegmentRef(S, *name) for name in sorted(names))
    assert await store.list_segments(S, 3, limit=2) == (SegmentRef(S, 3, 1), SegmentRef(S, 3, 2))
    assert await store.list_segments(S, 4) == (SegmentRef(S, 10, 2), SegmentRef(S, 11, 2))
    assert await store.list_segments(S, 12) == ()
    assert await store.list_segments(S, 0, limit=1) == (SegmentRef(S, 1, 1),)
    assert await store.list_segments(S, 1, limit=0) == ()


async def test_listing_goes_on_over_pages_and_passes_over_what_is_not_a_segment(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(region_store, "PAGE_KEYS", 4)
    store = await world.client()
    for seq in range(1, 12):
        await store.put_segment(token(1), SegmentRef(S, seq, 1), b"x")
    for name in (
        "readme.txt",
        "0000000000000003",
        "0000000000000003-x.seg",
        "0000000000000005-0000000000000001.seg.bak",
        "sub/1.seg",
    ):
        world.litter(f"{S}/{name}")
    assert [ref.seq for ref in await store.list_segments(S, 1)] == list(range(1, 12))
    assert [ref.seq for ref in await store.list_segments(S, 2, limit=7)] == list(range(2, 9))


# ----------------------------------------------------------------------------------------------------------------- fence


async def test_a_new_stream_has_an_empty_head(store: RegionStore) -> None:
    assert await store.read_head("never-seen") == Head("never-seen")


async def test_fencing_creates_the_head_and_repeating_it_changes_nothing(store: RegionStore) -> None:
    fence = token(4)
    wanted = Head(S, epoch=4, writer=fence.writer)
    assert await store.fence(fence) == wanted
    assert await store.fence(fence) == wanted
    assert await store.read_head(S) == wanted


async def test_fencing_returns_what_the_old_writer_had_committed_and_shuts_it_out(store: RegionStore) -> None:
    before = await grown(store, 1, 3)
    after = await store.fence(token(2, instance="b"))
    assert after == replace(before, epoch=2, writer=token(2, instance="b").writer)
    with pytest.raises(FenceLost) as caught:
        await store.advance(token(1), next_commit(before, token(1)))
    assert caught.value.epoch == 2
    assert await store.read_head(S) == after


async def test_a_stale_epoch_cannot_fence(store: RegionStore) -> None:
    await store.fence(token(7))
    with pytest.raises(FenceLost) as caught:
        await store.fence(token(6))
    assert caught.value.epoch == 7


async def test_an_epoch_that_somebody_else_holds_here_is_lost(store: RegionStore) -> None:
    head = await store.fence(token(7, instance="a"))
    twin = token(7, instance="b")
    with pytest.raises(FenceLost, match="belongs to"):
        await store.fence(twin)
    with pytest.raises(FenceLost, match="belongs to"):
        await store.advance(twin, next_commit(head, twin))
    assert await store.read_head(S) == head


async def test_streams_have_heads_of_their_own(store: RegionStore) -> None:
    await grown(store, 3, 2)
    other = token(1, stream="s1")
    head = await store.fence(other)
    assert (await store.advance(other, next_commit(head, other))).seq == 1
    assert (await store.read_head(S)).seq == 2


# --------------------------------------------------------------------------------------------------------------- advance


async def test_an_advance_moves_the_head_and_adds_to_its_counters(store: RegionStore) -> None:
    fence = token(3)
    head = await store.fence(fence)
    first = next_commit(head, fence)
    moved = await store.advance(fence, first)
    assert moved == Head(
        S, 1, 3, first.chain, (EpochStart(3, 1),), received_at=first.received_at, records=10, bytes=1000, writer=fence.writer
    )
    again = await store.advance(fence, next_commit(moved, fence))
    assert (again.seq, again.records, again.bytes, again.epochs) == (2, 20, 2000, (EpochStart(3, 1),))
    assert await store.read_head(S) == again


async def test_repeating_an_advance_is_success_and_counts_once(store: RegionStore) -> None:
    fence = token(3)
    commit = next_commit(await store.fence(fence), fence)
    once = await store.advance(fence, commit)
    assert await store.advance(fence, commit) == once
    assert await store.read_head(S) == once


async def test_one_commit_may_cover_several_segments_and_epochs(store: RegionStore) -> None:
    fence = token(9)
    await store.fence(fence)
    starts = (EpochStart(2, 1), EpochStart(5, 3), EpochStart(6, 4))
    chain = link(link(GENESIS, 1, 2), 2, 2)
    head = await store.advance(fence, Commit(0, GENESIS, 4, chain, starts))
    assert [head.owner(seq) for seq in range(1, 5)] == [2, 2, 5, 6]
    assert head.last_epoch == 6
    head = await store.advance(fence, next_commit(head, fence))
    assert head.epochs == (*starts, EpochStart(9, 5))


@pytest.mark.parametrize("fields", [{"prev_seq": 1}, {"prev_seq": 3}, {"prev_chain": "f" * 64}])
async def test_a_commit_that_does_not_start_at_the_head_is_a_conflict(store: RegionStore, fields: dict[str, Any]) -> None:
    head = await grown(store, 1, 2)
    good = next_commit(head, token(1))
    with pytest.raises(Conflict):
        await store.advance(token(1), replace(good, **(fields | {"seq": 4, "starts": ()})))
    assert await store.read_head(S) == head


async def test_two_different_commits_of_one_epoch_from_one_head_exclude_each_other(store: RegionStore) -> None:
    head = await grown(store, 1, 1)
    good = next_commit(head, token(1))
    results = await asyncio.gather(
        *(store.advance(token(1), replace(good, chain=link(good.chain, n, 1))) for n in range(4)), return_exceptions=True
    )
    assert sum(isinstance(result, Head) for result in results) == 1
    assert sum(isinstance(result, Conflict) for result in results) == 3


async def test_nobody_advances_a_store_that_they_have_not_fenced(store: RegionStore) -> None:
    with pytest.raises(Conflict, match="not fenced"):
        await store.advance(token(1), next_commit(Head(S), token(1)))
    assert await store.read_head(S) == Head(S)
    head = await grown(store, 1, 1)
    with pytest.raises(Conflict, match="not fenced"):
        await store.advance(token(2), next_commit(head, token(2)))


# --------------------------------------------------------------------------------------------------------------- realign


def cut(head: Head, seq: int, by_epoch: int) -> Realignment:
    """Back to ``seq`` of a history that epoch 1 wrote alone."""
    chain = GENESIS
    for n in range(1, seq + 1):
        chain = link(chain, n, 1)
    salvage = Salvage(seq + 1, head.seq, head.epochs, head.chain, by_epoch)
    return Realignment(
        seq, chain, head.base, head.base_chain, head.epochs if seq else (), salvage, 1e9 + seq, 10 * seq, 1000 * seq
    )


async def test_a_realignment_cuts_the_history_and_lists_what_was_cut(store: RegionStore) -> None:
    for seq in range(1, 6):
        await store.put_segment(token(1), SegmentRef(S, seq, 1), b"x")
    await grown(store, 1, 5)
    fence = token(2)
    before = await store.fence(fence)
    to = cut(before, 3, 2)
    assert to.salvage is not None
    after = await store.realign(fence, before, to)
    assert after == replace(before, seq=3, chain=to.chain, salvage=(to.salvage,), received_at=1e9 + 3, records=30, bytes=3000)
    assert await store.read_head(S) == after
    assert len(await store.list_segments(S, 1)) == 5  # objects stay where they are
    assert await store.realign(fence, before, to) == after  # already so
    head = await store.advance(fence, next_commit(after, fence))
    assert head.epochs == (EpochStart(1, 1), EpochStart(2, 4))
    assert head.salvage == (to.salvage,)
    with pytest.raises(Conflict):  # moved on since
        await store.realign(fence, before, to)


async def test_salvage_of_several_disasters_adds_up(store: RegionStore) -> None:
    await grown(store, 1, 4)
    second = token(2)
    head = await store.fence(second)
    head = await store.realign(second, head, cut(head, 2, 2))
    head = await store.advance(second, next_commit(head, second))
    third = token(3)
    head = await store.fence(third)
    tail = Salvage(3, 3, head.epochs, head.chain, 3)
    base = cut(head, 2, 3)
    head = await store.realign(third, head, replace(base, epochs=(EpochStart(1, 1),), salvage=tail))
    assert [(s.first_seq, s.last_seq, s.by_epoch, s.epochs) for s in head.salvage] == [
        (3, 4, 2, (EpochStart(1, 1),)),
        (3, 3, 3, (EpochStart(1, 1), EpochStart(2, 3))),
    ]
    assert head.epochs == (EpochStart(1, 1),)


async def test_a_realignment_is_refused_to_a_stale_epoch_and_on_a_head_that_moved(store: RegionStore) -> None:
    old = await grown(store, 1, 3)
    new = await store.fence(token(2))
    with pytest.raises(FenceLost):
        await store.realign(token(1), old, cut(old, 1, 1))
    with pytest.raises(Conflict, match="not fenced"):
        await store.realign(token(3), new, cut(new, 1, 3))
    with pytest.raises(Conflict, match="expects seq"):
        await store.realign(
            token(2), replace(new, seq=2), replace(cut(new, 1, 2), salvage=Salvage(2, 2, new.epochs, new.chain, 2))
        )
    with pytest.raises(Conflict, match="expects seq"):
        await store.realign(token(2), replace(new, chain="e" * 64), cut(new, 1, 2))
    assert await store.read_head(S) == new


async def test_a_store_behind_every_base_is_reseeded_and_goes_on_from_there(store: RegionStore) -> None:
    await grown(store, 1, 2)
    fence = token(6)
    before = await store.fence(fence)
    base_chain = link(GENESIS, 99, 5)
    salvage = Salvage(1, 2, before.epochs, before.chain, 6)
    to = Realignment(99, base_chain, 100, base_chain, (EpochStart(5, 80),), salvage)
    after = await store.realign(fence, before, to)
    assert (after.seq, after.chain, after.base, after.base_chain) == (99, base_chain, 100, base_chain)
    head = await store.advance(fence, next_commit(after, fence))
    assert (head.seq, head.base, head.owner(100), head.salvage) == (100, 100, 6, (salvage,))


async def test_an_empty_store_is_seeded_without_salvage(store: RegionStore) -> None:
    fence = token(6)
    before = await store.fence(fence)
    chain = link(GENESIS, 99, 5)
    after = await store.realign(fence, before, Realignment(99, chain, 100, chain, (EpochStart(5, 80),), None))
    assert (after.seq, after.base, after.salvage) == (99, 100, ())


async def test_retention_moves_the_base_alone(store: RegionStore) -> None:
    head = await grown(store, 1, 5)
    to = Realignment(
        head.seq, head.chain, 4, link(GENESIS, 3, 1), head.epochs, None, head.received_at, head.records, head.bytes
    )
    after = await store.realign(token(1), head, to)
    assert after == replace(head, base=4, base_chain=to.base_chain)
    assert await store.realign(token(1), head, to) == after


async def test_a_cut_that_names_no_salvage_is_refused(store: RegionStore) -> None:
    head = await grown(store, 1, 3)
    with pytest.raises(Refused, match="salvage"):
        await store.realign(token(1), head, replace(cut(head, 1, 1), salvage=None))
    with pytest.raises(Refused, match="salvage"):
        await store.realign(token(1), head, replace(cut(head, 3, 1), chain="a" * 64, salvage=None))
    assert await store.read_head(S) == head


async def test_a_head_that_would_outgrow_its_item_is_refused_with_a_hint(store: RegionStore) -> None:
    fence = token(20_000)
    head = await store.fence(fence)
    epochs = tuple(EpochStart(n, n) for n in range(1, 9_000))
    chain = link(GENESIS, 9_000, 1)
    with pytest.raises(Refused, match="bytes") as caught:
        await store.realign(fence, head, Realignment(9_000, chain, 1, GENESIS, epochs, None))
    assert "salvage" in caught.value.hint
    with pytest.raises(Refused, match="bytes"):
        await store.advance(fence, Commit(0, GENESIS, 9_000, chain, epochs))
    assert await store.read_head(S) == head


# ------------------------------------------------------------------------------------------------------------ bad inputs

GOOD = Commit(0, GENESIS, 1, "a" * 64)

BAD: dict[str, Callable[[RegionStore], Awaitable[object]]] = {
    "epoch 0": lambda s: s.fence(token(0)),
    "epoch past 16 digits": lambda s: s.fence(token(10**16)),
    "empty stream": lambda s: s.fence(token(1, stream="")),
    "stream with a slash": lambda s: s.read_head("a/b"),
    "stream ..": lambda s: s.list_segments("..", 1),
    "stream with a NUL": lambda s: s.read_head("a\0"),
    "stream with a hash": lambda s: s.read_head("a#b"),
    "stream of 10 MB": lambda s: s.read_head("a" * 10_000_000),
    "segment 0": lambda s: s.get_segment(SegmentRef(S, 0, 1)),
    "segment past 16 digits": lambda s: s.put_segment(token(1), SegmentRef(S, 10**16, 1), b""),
    "segment of another stream": lambda s: s.put_segment(token(1), SegmentRef("s1", 1, 1), b""),
    "commit that stands still": lambda s: s.advance(token(1), replace(GOOD, seq=0)),
    "commit that goes back": lambda s: s.advance(token(1), replace(GOOD, prev_seq=3)),
    "chain that is no hash": lambda s: s.advance(token(1), replace(GOOD, chain="abc")),
    "chain in capitals": lambda s: s.advance(token(1), replace(GOOD, chain="A" * 64)),
    "NaN as time": lambda s: s.advance(token(1), replace(GOOD, received_at=float("nan"))),
    "negative records": lambda s: s.advance(token(1), replace(GOOD, records=-1)),
    "start of a future epoch": lambda s: s.advance(token(1), replace(GOOD, starts=(EpochStart(2, 1),))),
    "start outside of the commit": lambda s: s.advance(token(1), replace(GOOD, starts=(EpochStart(1, 2),))),
    "starts that go back": lambda s: s.advance(token(3), replace(GOOD, seq=3, starts=(EpochStart(2, 1), EpochStart(1, 2)))),
    "base past the end": lambda s: s.realign(token(1), Head(S), Realignment(3, "a" * 64, 5, "a" * 64, (), None)),
    "realignment with negative bytes": lambda s: s.realign(
        token(1), Head(S), Realignment(0, GENESIS, 1, GENESIS, (), None, bytes=-1)
    ),
    "head of another stream": lambda s: s.realign(token(1), Head("s1"), Realignment(0, GENESIS, 1, GENESIS, (), None)),
    "salvage of nothing": lambda s: s.realign(
        token(1), Head(S), Realignment(0, GENESIS, 1, GENESIS, (), Salvage(1, 0, (), GENESIS, 1))
    ),
}


@pytest.mark.parametrize("what", sorted(BAD))
async def test_a_request_that_can_never_be_right_is_refused_and_says_why(store: RegionStore, what: str) -> None:
    with pytest.raises(Refused) as caught:
        await BAD[what](store)
    assert caught.value.hint
    assert len(caught.value.message) < 1000
    assert await store.read_head(S) == Head(S)


# ----------------------------------------------------------------------------------------------------------------- races


async def rival(
    store: RegionStore, fence: Fence, jitter: random.Random, log: list[tuple[int, Commit]], fenced: list[Head]
) -> None:
    """Fences, then commits until somebody with a greater epoch is there."""
    try:
        await asyncio.sleep(jitter.random() * 0.05)
        head = await store.fence(fence)
        fenced.append(head)
        for _ in range(12):
            commit = next_commit(head, fence)
            head = await store.advance(fence, commit)
            log.append((fence.epoch, commit))
            await asyncio.sleep(jitter.random() * 0.004)
    except FenceLost:
        return


@pytest.mark.parametrize("seed", range(5))
async def test_rivals_that_fence_and_commit_at_once_leave_exactly_one_history(world: World, seed: int) -> None:
    jitter = random.Random(seed)
    log: list[tuple[int, Commit]] = []
    fenced: list[Head] = []
    rivals = [rival(await world.client(), token(epoch, instance=f"i{epoch}"), jitter, log, fenced) for epoch in (1, 2, 3, 4)]
    await asyncio.gather(*rivals)
    final = await (await world.client()).read_head(S)
    check_history(log, fenced, final)
    assert final.epoch == 4
    assert sum(epoch == 4 for epoch, _ in log) == 12  # the greatest epoch is never stopped


class UnguardedAws(AwsRegionStore):
    """The same adapter with a condition that always holds: what a plain read-modify-write would do."""

    def _send_update(self, request: dict[str, Any]) -> Awaitable[dict[str, Any]]:
        always = f"({request['ConditionExpression']}) OR attribute_exists(#pk) OR attribute_not_exists(#pk)"
        names = request["ExpressionAttributeNames"] | {"#pk": "pk"}
        return super()._send_update(request | {"ConditionExpression": always, "ExpressionAttributeNames": names})


class UnguardedMemory(MemoryStore):
    def update(self, stream: str, settled: Callable[[Head], bool], after: Callable[[Head], Head]) -> Head:
        return super().update(stream, lambda head: False, after)


async def overtaken(world: World) -> tuple[list[tuple[int, Commit]], list[Head], list[Head | BaseException], Head]:
    """A writer that does not know yet that it was fenced commits at the same moment as its successor."""
    old, new, log = await world.client(), await world.client(), list[tuple[int, Commit]]()
    first, second = token(1, instance="old"), token(2, instance="new")
    stale = await old.fence(first)
    for _ in range(2):
        log.append((1, next_commit(stale, first)))
        stale = await old.advance(first, log[-1][1])
    head = await new.fence(second)
    log.append((2, next_commit(head, second)))
    fenced, head = [head], await new.advance(second, log[-1][1])
    racing = [(1, old, first, next_commit(stale, first)), (2, new, second, next_commit(head, second))]
    results = await asyncio.gather(
        *(store.advance(fence, commit) for _, store, fence, commit in racing), return_exceptions=True
    )
    log += [(entry[0], entry[3]) for entry, result in zip(racing, results, strict=True) if isinstance(result, Head)]
    return log, fenced, results, await new.read_head(S)


async def test_a_writer_that_was_overtaken_commits_nothing(world: World) -> None:
    log, fenced, results, final = await overtaken(world)
    assert isinstance(results[0], FenceLost)
    assert isinstance(results[1], Head)
    check_history(log, fenced, final)


async def test_without_the_condition_the_same_race_breaks_the_history_and_the_checker_says_so(world: World) -> None:
    unguarded: World = (
        AwsWorld(world.endpoint, variant=UnguardedAws)
        if isinstance(world, AwsWorld)
        else MemoryWorld(UnguardedMemory(world.server.region))
    )
    try:
        log, fenced, results, final = await overtaken(unguarded)
    finally:
        await unguarded.close()
    assert all(isinstance(result, Head) for result in results)
    with pytest.raises(AssertionError, match="two acknowledged commits"):
        check_history(log, fenced, final)


@pytest.mark.parametrize("seed", range(3))
async def test_a_realignment_racing_with_the_old_writers_commits_loses_nothing_unnoticed(world: World, seed: int) -> None:
    """Whatever the old epoch had acknowledged is in the new history or in the salvage."""
    jitter, old, new = random.Random(seed), await world.client(), await world.client()
    log: list[tuple[int, Commit]] = []
    writer = asyncio.create_task(rival(old, token(1, instance="old"), jitter, log, []))
    while len(log) < 4:  # noqa: ASYNC110 - the log is a list, and needs no event but this one
        await asyncio.sleep(0.002)
    fence = token(2, instance="new")
    head = await new.fence(fence)
    after = await new.realign(fence, head, cut(head, 2, 2))
    await writer
    acknowledged = {commit.seq for _, commit in log}
    salvaged = {seq for s in after.salvage for seq in range(s.first_seq, s.last_seq + 1)}
    assert acknowledged <= {1, 2} | salvaged
    assert await new.read_head(S) == after


async def test_every_error_says_what_to_do_next(store: RegionStore) -> None:
    await store.fence(token(5))
    attempts: list[Awaitable[object]] = [
        store.fence(token(4)),
        store.advance(token(5), replace(GOOD, prev_seq=1, seq=2)),
        store.get_segment(SegmentRef(S, 1, 1)),
        store.fence(token(0)),
    ]
    for attempt in attempts:
        with pytest.raises(DrError) as caught:
            await attempt
        assert caught.value.hint
