"""What sealing adds to a region store, in memory and around ministack. The store's own suites run over a sealed one too."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from controller.adapters.memory.gate import OpenGate
from controller.adapters.memory.key_service import MemoryKms
from controller.adapters.memory.region_store import MemoryRegionStore, MemoryStore, StoredObject
from controller.adapters.sealed_store import SealedStore, Sealer
from controller.domain.model import SegmentRef, SnapshotRef
from controller.errors import Conflict, Corrupt, Misconfigured, Unavailable
from controller.ports import RegionStore
from tests.support.stores import REGION, SealedAwsWorld, SealedMemoryWorld, over, token

REF = SegmentRef("s0", 1, 1)
SNAPSHOT = SnapshotRef("s0", 1, 1)
LARGE = random.Random(1).randbytes(3 * 1024 * 1024 + 7)
PARTS = random.Random(2).randbytes(17 * 1024 * 1024)
FAR, THIRD = "us-east-1", "eu-central-1"

SealedWorld = SealedMemoryWorld | SealedAwsWorld


@pytest.fixture(params=[SealedMemoryWorld, pytest.param(SealedAwsWorld, marks=pytest.mark.aws)], ids=["memory", "ministack"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[SealedWorld]:
    kind = request.param
    made = kind(request.getfixturevalue("aws").endpoint) if kind is SealedAwsWorld else kind()
    yield made
    await made.close()


async def test_what_lies_there_shows_nothing_and_comes_back_as_it_was(world: SealedWorld) -> None:
    store = await world.client()
    plain = store._inner
    for seq, data in enumerate((b"", b"a secret of an agent", LARGE, PARTS), start=1):
        ref = SegmentRef("s0", seq, 1)
        await store.put_segment(token(1), ref, data)
        await store.put_segment(token(1), ref, data)
        there = await plain.get_segment(ref)
        assert there.startswith(b"DRENC\0")
        assert not data or data[:20] not in there
        assert await store.get_segment(ref) == data
        assert (await store.inspect_object(ref)).data == data
    await store.put_snapshot(token(1), SNAPSHOT, b"names and meta of all agents")
    assert b"names" not in await plain.get_snapshot(SNAPSHOT)
    assert await store.get_snapshot(SNAPSHOT) == b"names and meta of all agents"


async def test_the_same_content_under_another_holders_key_is_mine_and_other_content_is_not(world: SealedWorld) -> None:
    first, second = await world.client(), await world.client()
    await first.put_segment(token(1), REF, LARGE)
    there = await first._inner.get_segment(REF)
    await second.put_segment(token(2, instance="b"), REF, LARGE)
    assert await first._inner.get_segment(REF) == there, "never written over"
    with pytest.raises(Conflict):
        await second.put_segment(token(2, instance="b"), REF, LARGE[:-1] + b"!")
    found = await second.inspect_object(REF)
    await second.mend_object(REF, replace(found, tag="something else"), LARGE)
    with pytest.raises(Conflict):
        await second.mend_object(REF, replace(found, tag="something else"), b"other")
    await first.put_snapshot(token(1), SNAPSHOT, b"index")
    await second.put_snapshot(token(2), SNAPSHOT, b"index")


async def test_of_several_holders_that_put_at_once_one_content_wins_and_the_others_hear_so(world: SealedWorld) -> None:
    stores = [await world.client() for _ in range(4)]
    answers = await asyncio.gather(
        *(store.put_segment(token(n + 1), REF, b"one" if n % 2 else b"other") for n, store in enumerate(stores)),
        return_exceptions=True,
    )
    winner = await stores[0].get_segment(REF)
    for n, answer in enumerate(answers):
        assert (answer is None) == (winner == (b"one" if n % 2 else b"other")), answers


async def test_an_object_that_was_damaged_or_moved_is_corrupt_and_named(world: SealedWorld) -> None:
    store = await world.client()
    for seq in (1, 2):
        await store.put_segment(token(1), SegmentRef("s0", seq, 1), b"%d" % seq * 50)
    inner, other = store._inner, SegmentRef("s0", 2, 1)
    await inner.mend_object(REF, await inner.inspect_object(REF), await inner.get_segment(other))
    with pytest.raises(Corrupt, match=r"object s0/0+1-0+1\.seg in eu-west-1: .*sealed as segment 2 of epoch 1"):
        await store.get_segment(REF)
    bad = bytearray(await inner.get_segment(other))
    bad[-1] ^= 1
    await inner.mend_object(other, await inner.inspect_object(other), bytes(bad))
    with pytest.raises(Corrupt, match=r"object s0/0+2-0+1\.seg in eu-west-1: .*1 of 1 chunks"):
        await store.get_segment(other)
    with pytest.raises(Conflict):
        await store.put_segment(token(1), other, b"2" * 50)
    await store.mend_object(other, await store.inspect_object(other), b"2" * 50)
    assert await store.get_segment(other) == b"2" * 50


async def test_what_lay_there_before_encryption_stays_readable_and_what_is_sealed_is_not_taken_for_damage_without_keys(
    world: SealedWorld,
) -> None:
    store = await world.client()
    plain, keyless = store._inner, SealedStore(store._inner, Sealer("g", None))
    await plain.put_segment(token(1), REF, b"from before")
    assert await store.get_segment(REF) == b"from before"
    await store.put_segment(token(2), REF, b"from before")
    with pytest.raises(Conflict):
        await store.put_segment(token(2), REF, b"other")
    sealed = SegmentRef("s0", 2, 1)
    await store.put_segment(token(1), sealed, b"from after")
    if isinstance(world, SealedMemoryWorld):  # the group of a keyless reader is the group's
        with pytest.raises(
            Misconfigured, match="sealed for the KMS of 'eu-west-1', 'us-east-1', and these settings have no keys"
        ):
            await keyless.get_segment(sealed)
        with pytest.raises(Misconfigured):
            await keyless.put_segment(token(1), sealed, b"from after")
    assert await keyless.get_segment(REF) == b"from before"


# ------------------------------------------------------------------------------------------------- several regions, memory


class Regions:
    """Three regions' stores, and processes that seal with one keyring for all of them."""

    def __init__(self) -> None:
        self.kms = {region: MemoryKms(region) for region in (REGION, FAR, THIRD)}
        self.servers = {region: MemoryStore(region) for region in self.kms}

    def process(self, home: str = REGION, **settings: bool) -> dict[str, RegionStore]:
        sealer = over(self.kms, "g", home=home, **settings)
        return {name: SealedStore(MemoryRegionStore(one, OpenGate()), sealer) for name, one in self.servers.items()}

    def lying(self, ref: SegmentRef = REF) -> list[bytes]:
        return [server.objects[ref].data for server in self.servers.values() if ref in server.objects]


async def test_a_segment_is_byte_equal_in_every_region_also_when_another_holder_copied_it() -> None:
    regions = Regions()
    writer, taker = regions.process(), regions.process(FAR)
    await asyncio.gather(*(writer[region].put_segment(token(1), REF, LARGE) for region in (REGION, FAR)))
    data = await taker[FAR].get_segment(REF)
    await taker[THIRD].put_segment(token(2), REF, data)
    assert len(regions.lying()) == 3
    assert len(set(regions.lying())) == 1


async def test_a_repair_puts_the_other_regions_bytes_as_they_are_sealed_there() -> None:
    regions = Regions()
    writer, mender = regions.process(), regions.process(THIRD)
    for region in regions.servers:
        await writer[region].put_segment(token(1), REF, LARGE)
    whole = regions.lying()[0]
    there = regions.servers[FAR].objects[REF]
    regions.servers[FAR].objects[REF] = StoredObject(there.data[:-9], there.sha256)
    found = await mender[FAR].inspect_object(REF)
    assert found.data is not None
    assert found.data[:1000] == LARGE[:1000]
    assert found.data != LARGE
    await mender[FAR].mend_object(REF, found, await mender[THIRD].get_segment(REF))
    assert set(regions.lying()) == {whole}


async def test_what_lies_in_plain_is_copied_sealed_and_what_is_sealed_is_never_copied_in_plain() -> None:
    regions = Regions()
    on, off = regions.process(), regions.process(enabled=False)
    await off[REGION].put_segment(token(1), REF, b"plain")
    assert regions.lying() == [b"plain"]
    await on[FAR].put_segment(token(2), REF, await on[REGION].get_segment(REF))
    assert regions.lying()[1].startswith(b"DRENC\0")
    await off[THIRD].put_segment(token(3), REF, await off[FAR].get_segment(REF))
    assert regions.lying()[2].startswith(b"DRENC\0"), "switched off, what was sealed still is"


async def test_a_copy_goes_where_it_can_be_opened_without_the_region_that_it_came_from() -> None:
    regions = Regions()
    del regions.kms[THIRD], regions.servers[THIRD]
    regions.kms[FAR].disabled = True
    alone = regions.process()
    await alone[REGION].put_segment(token(1), REF, b"while the other KMS was away")
    with pytest.raises(Unavailable, match=r"not put into us-east-1: .*KMS of eu-west-1 only"):
        await alone[FAR].put_segment(token(1), REF, b"while the other KMS was away")
    regions.kms[FAR].disabled = False
    later = regions.process()
    await later[FAR].put_segment(token(2), REF, await later[REGION].get_segment(REF))
    regions.kms[REGION].disabled = True
    assert await regions.process(FAR)[FAR].get_segment(REF) == b"while the other KMS was away"
