"""Looking at damage and replacing it: what ``ports.RegionMender`` promises, in memory and against ministack."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from controller.adapters.catalogue_item import catalogue_key
from controller.domain.model import CatalogueEntry, EpochStart, Fence, FramePlace, Head, SegmentRef, SnapshotRef
from controller.errors import Conflict, Corrupt, FenceLost, NotFound, Refused
from controller.lab.aws import AwsStandIn
from controller.ports import FoundEntry, RegionStore
from tests.support.stores import TABLE, AwsWorld, World, link, next_commit, token

S = "s0"
REF = SegmentRef(S, 1, 1)


# ------------------------------------------------------------------------------------------------------------- objects


async def test_what_lies_there_is_shown_as_it_is_damaged_or_not(world: World) -> None:
    store = await world.client()
    assert (await store.inspect_object(REF)).data is None
    await store.put_segment(token(1), REF, b"precious bytes")
    sound = await store.inspect_object(REF)
    assert sound.data == b"precious bytes"
    world.flip(REF)
    damaged = await store.inspect_object(REF)
    assert damaged.data is not None
    assert damaged.data != b"precious bytes"
    assert damaged.tag not in (sound.tag, "")


async def test_a_damaged_an_absent_and_a_cut_object_are_replaced_and_are_whole_then(world: World) -> None:
    store = await world.client()
    await store.put_segment(token(1), REF, b"precious bytes")
    world.flip(REF)
    await store.mend_object(REF, await store.inspect_object(REF), b"precious bytes")
    assert await store.get_segment(REF) == b"precious bytes"
    world.truncate(REF, 3)
    await store.mend_object(REF, await store.inspect_object(REF), b"precious bytes")
    assert await store.get_segment(REF) == b"precious bytes"
    absent = SegmentRef(S, 2, 1)
    await store.mend_object(absent, await store.inspect_object(absent), b"it was lost")
    assert await store.get_segment(absent) == b"it was lost"
    assert await store.list_segments(S, 1) == (REF, absent)
    await store.put_segment(token(1), absent, b"it was lost")  # as if the writer had written it
    snapshot = SnapshotRef(S, 2, 1)
    await store.mend_object(snapshot, await store.inspect_object(snapshot), b"an index")
    assert await store.get_snapshot(snapshot) == b"an index"


async def test_what_changed_since_it_was_looked_at_is_left_alone(world: World) -> None:
    store = await world.client()
    absent = await store.inspect_object(REF)
    await store.put_segment(token(1), REF, b"precious bytes")
    with pytest.raises(Conflict):
        await store.mend_object(REF, absent, b"other bytes")
    sound = await store.inspect_object(REF)
    world.flip(REF)
    with pytest.raises(Conflict):
        await store.mend_object(REF, sound, b"other bytes")
    with pytest.raises(Corrupt):
        await store.get_segment(REF)


async def test_of_two_that_mend_at_once_both_succeed_with_the_same_bytes_and_one_with_different_ones(world: World) -> None:
    store = await world.client()
    await store.put_segment(token(1), REF, b"precious bytes")
    world.flip(REF)
    found = await store.inspect_object(REF)
    await asyncio.gather(*(store.mend_object(REF, found, b"precious bytes") for _ in range(3)))
    assert await store.get_segment(REF) == b"precious bytes"
    world.flip(REF)
    found = await store.inspect_object(REF)
    results = await asyncio.gather(
        *(store.mend_object(REF, found, f"bytes {n}".encode()) for n in range(3)), return_exceptions=True
    )
    assert sorted(type(result).__name__ for result in results) == ["Conflict", "Conflict", "NoneType"]


# ---------------------------------------------------------------------------------------------------------------- head


async def grown(store: RegionStore, fence: Fence) -> Head:
    head = await store.fence(fence)
    for _ in range(3):
        head = await store.advance(fence, next_commit(head, fence))
    return head


async def test_a_head_is_replaced_under_the_fence_and_only_as_it_was_found(store: RegionStore) -> None:
    fence = token(2)
    head = await grown(store, fence)
    found = await store.inspect_head(S)
    assert found.head == head
    right = replace(head, records=7, chain=link("0" * 64, 9, 9))
    mended = await store.mend_head(fence, found, right)
    assert mended == replace(right, epoch=2, writer=fence.writer)
    assert await store.read_head(S) == mended
    assert await store.mend_head(fence, found, right) == mended  # already so: an answer that was lost
    with pytest.raises(Conflict):
        await store.mend_head(fence, found, replace(right, records=8))
    assert (await store.advance(fence, next_commit(mended, fence))).seq == 4


async def test_a_head_that_a_newer_epoch_fenced_is_not_replaced_by_an_older_one(store: RegionStore) -> None:
    head = await grown(store, token(2))
    before = await store.inspect_head(S)
    await store.fence(token(5))
    with pytest.raises(FenceLost):
        await store.mend_head(token(2), await store.inspect_head(S), head)
    with pytest.raises(Conflict):
        await store.mend_head(token(2), before, head)
    assert (await store.read_head(S)).epoch == 5


async def test_a_head_that_no_store_could_have_is_refused(store: RegionStore) -> None:
    fence = token(2)
    head = await grown(store, fence)
    found = await store.inspect_head(S)
    for wrong in (
        replace(head, chain="x"),
        replace(head, base=9),
        replace(head, stream="s1"),
        replace(head, epochs=(EpochStart(3, 1),)),
    ):
        with pytest.raises(Refused):
            await store.mend_head(fence, found, wrong)
    assert await store.read_head(S) == head


@pytest.mark.aws
@pytest.mark.parametrize(
    "damage", ["REMOVE seq", "REMOVE epochs", "SET seq = :odd", "SET epochs = :odd", "REMOVE writer", None]
)
async def test_a_head_item_that_cannot_be_read_is_shown_and_replaced(aws: AwsStandIn, damage: str | None) -> None:
    world = AwsWorld(aws.endpoint)
    try:
        store = await world.client()
        fence = token(2)
        head = await grown(store, fence)
        key = {"pk": {"S": f"{world.group}#{S}"}, "sk": {"S": "head"}}
        if damage is None:
            world.dynamodb().delete_item(TableName=TABLE, Key=key)
        else:
            values = {"ExpressionAttributeValues": {":odd": {"S": "?"}}} if ":odd" in damage else {}
            world.dynamodb().update_item(TableName=TABLE, Key=key, UpdateExpression=damage, **values)
            with pytest.raises(Corrupt):
                await store.read_head(S)
        found = await store.inspect_head(S)
        assert damage is None or (found.head is None and found.problem)
        mended = await store.mend_head(fence, found, head)
        assert mended == await store.read_head(S) == head
        with pytest.raises(NotFound):
            await store.get_segment(REF)
    finally:
        await world.close()


# ----------------------------------------------------------------------------------------------------------- catalogue


def entry(agent: str, seq: int = 1) -> CatalogueEntry:
    places = (FramePlace(seq, 1, 3, 500, 90), FramePlace(1, 1, 0, 120, 4000))
    return CatalogueEntry(agent, "checkpoint", f"{agent}/7", "cd" * 32, 5000, "delta", 1_700_000_000.25, places)


async def test_the_catalogue_is_read_in_pages_by_name_and_every_item_says_what_was_written(store: RegionStore) -> None:
    await store.fence(token(3))
    await store.fence(token(3, stream="s1"))
    names = [*(f"a{n}" for n in range(7)), "z", "ü", "\U0001f600"]
    await store.put_catalogue(token(3), [entry(name) for name in reversed(names)])
    await store.put_catalogue(token(3, stream="s1"), [entry("another stream's")])
    found: list[FoundEntry] = []
    while True:
        page = await store.list_catalogue(S, found[-1].agent if found else "", 4)
        found += page
        if len(page) < 4:
            break
    assert [one.agent for one in found] == names
    assert [one.entry for one in found] == [replace(entry(name), by_epoch=3) for name in names]
    assert all(one.problem == "" for one in found)
    one = await store.inspect_catalogue(S, "ü")
    assert one == found[names.index("ü")]
    nobody = await store.inspect_catalogue(S, "nobody")
    assert (nobody.entry, nobody.problem) == (None, "")
    assert await store.list_catalogue(S, "\U0001f600", 4) == ()
    assert await store.list_catalogue("s2", "", 1000) == ()
    for limit in (0, 1001):
        with pytest.raises(Refused, match=str(limit)):
            await store.list_catalogue(S, "", limit)


async def test_an_item_is_replaced_made_or_deleted_only_as_it_was_found_and_under_the_fence(store: RegionStore) -> None:
    fence = token(3)
    await store.fence(fence)
    await store.put_catalogue(fence, [entry("a"), entry("b")])
    found = await store.inspect_catalogue(S, "a")
    await store.mend_catalogue(fence, found, entry("a", seq=9))
    assert (await store.inspect_catalogue(S, "a")).entry == replace(entry("a", seq=9), by_epoch=3)
    await store.mend_catalogue(fence, found, entry("a", seq=9))  # it is so already
    with pytest.raises(Conflict, match="changed meanwhile"):
        await store.mend_catalogue(fence, found, entry("a", seq=8))
    with pytest.raises(Conflict, match="changed meanwhile"):
        await store.mend_catalogue(fence, found, None)
    absent = await store.inspect_catalogue(S, "c")
    await store.mend_catalogue(fence, absent, None)
    await store.mend_catalogue(fence, absent, entry("c"))
    with pytest.raises(Conflict, match="changed meanwhile"):
        await store.mend_catalogue(fence, absent, entry("c", seq=5))
    await store.mend_catalogue(fence, await store.inspect_catalogue(S, "b"), None)
    assert [one.agent for one in await store.list_catalogue(S, "", 10)] == ["a", "c"]
    with pytest.raises(Refused, match="'b'"):
        await store.mend_catalogue(fence, found, entry("b"))
    with pytest.raises(Conflict):
        await store.mend_catalogue(token(4), await store.inspect_catalogue(S, "a"), entry("a"))
    await store.fence(token(4))
    with pytest.raises(FenceLost):
        await store.mend_catalogue(fence, await store.inspect_catalogue(S, "a"), entry("a"))


@pytest.mark.aws
async def test_an_item_that_cannot_be_read_is_shown_with_what_is_wrong_and_can_be_replaced(aws: AwsStandIn) -> None:
    world = AwsWorld(aws.endpoint)
    store = await world.client()
    await store.fence(token(3))
    damages: dict[str, dict[str, object]] = {
        "size": {"size": {"S": "many"}},
        "chain": {"chain": {"L": [{"N": "1"}]}},
        "seq": {"seq": {"N": "7"}},
        "received_at": {"received_at": {"NULL": True}},
    }
    for name, changed in damages.items():
        await store.put_catalogue(token(3), [entry("a")])
        item = world.dynamodb().get_item(TableName=TABLE, Key=catalogue_key(world.group, S, "a"))["Item"]
        world.dynamodb().put_item(TableName=TABLE, Item={**item, **changed, "somebodys": {"S": "note"}})
        (found,) = await store.list_catalogue(S, "", 10)
        assert found.entry is None
        assert name in found.problem
        await store.mend_catalogue(token(3), found, entry("a"))
        assert (await store.inspect_catalogue(S, "a")).entry == replace(entry("a"), by_epoch=3)
        if name != "chain":  # ministack takes any two lists for equal; DynamoDB compares them
            with pytest.raises(Conflict):
                await store.mend_catalogue(token(3), found, entry("a", seq=5))
    await world.close()
