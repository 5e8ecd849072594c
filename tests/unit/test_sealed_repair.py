"""Verification and repair of copies whose objects are sealed: what is damaged is named as in plain ones and put back as it was
sealed; a KMS that does not answer is no damage."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from controller.adapters import sealing
from controller.adapters.memory.key_service import MemoryKms
from controller.adapters.memory.region_store import StoredObject
from controller.adapters.sealed_store import SealedStore, Sealer
from controller.stream.segment import frame_offsets
from tests.support.damage import HOME, REGIONS, Copies, only, whole
from tests.support.segments import GROUP, History
from tests.support.stores import over
from tests.unit.test_repair import mend, states


async def sealed_copies(folder: Path) -> tuple[Copies, dict[str, MemoryKms]]:
    """The same history in three regions, sealed by a holder that is gone; the controller has a keyring of its own."""
    copies = Copies(History().grow(4, agents=3).grow(4, agents=3, epoch=4), folder)
    kms = {region: MemoryKms(region) for region in REGIONS}
    holder = over(kms, GROUP)
    for region, store in copies.stores.items():
        for ref, there in list(store.objects.items()):
            data = await holder.seal(ref, there.data, region, 1)
            store.objects[ref] = StoredObject(data, hashlib.sha256(data).hexdigest())
    look_with(copies, over(kms, GROUP))
    return copies, kms


def look_with(copies: Copies, sealer: Sealer) -> None:
    """Another life of the controller, with that sealer."""
    for region, client in copies.clients.items():
        inner = client._inner if isinstance(client, SealedStore) else client
        copies.clients[region] = SealedStore(inner, sealer)  # type: ignore[assignment]
    copies.verifier = copies.controller()


def objects(copies: Copies, region: str = HOME) -> dict[object, bytes]:
    return {ref: there.data for ref, there in copies.stores[region].objects.items()}


async def test_sound_sealed_copies_verify_clean(tmp_path: Path) -> None:
    copies, _ = await sealed_copies(tmp_path)
    for region in REGIONS:
        assert whole(await copies.verify(region))


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_is_damaged_is_byte_for_byte_as_before_after_a_repair(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    copies, _ = await sealed_copies(tmp_path)
    before = objects(copies)
    damaged = dice.sample(range(1, 9), dice.randint(1, 4))
    for seq in damaged:
        ref = copies.built(seq).ref
        size = len(copies.stores[HOME].objects[ref].data)
        match dice.randrange(3):
            case 0:
                copies.flip(seq, dice.randrange(size), hidden=dice.random() < 0.5)
            case 1:
                copies.drop(seq)
            case 2:
                copies.stores[HOME].truncate(ref, dice.randrange(size))
    assert (await copies.verify()).count == len(damaged)
    assert states(await mend(copies)) == ["done"] * len(damaged)
    assert objects(copies) == before
    assert whole(await copies.verify())


async def test_a_flipped_bit_names_the_segment_and_the_records_of_its_chunk(tmp_path: Path) -> None:
    copies, _ = await sealed_copies(tmp_path)
    ref = copies.built(3).ref
    found = sealing.read_envelope(copies.stores[HOME].objects[ref].data)
    assert found is not None
    copies.flip(3, found[1] + frame_offsets(copies.built(3).data)[1].offset, hidden=True)
    problem = only(await copies.verify())
    assert (problem.seq, problem.key, problem.source) == (3, ref.key, REGIONS[1])
    assert "does not open: 1 of 1 chunks" in problem.detail
    assert problem.records == len(copies.built(3).segment.frames)


async def test_two_objects_that_changed_places_are_both_found_and_put_back(tmp_path: Path) -> None:
    copies, _ = await sealed_copies(tmp_path)
    before = objects(copies)
    here = copies.stores[HOME].objects
    one, other = copies.built(2).ref, copies.built(3).ref
    here[one], here[other] = here[other], here[one]
    found = await copies.verify()
    assert [(problem.seq, "sealed as segment" in problem.detail) for problem in found.problems] == [(2, True), (3, True)]
    assert states(await mend(copies)) == ["done", "done"]
    assert objects(copies) == before


async def test_a_kms_that_does_not_open_is_not_taken_for_damage(tmp_path: Path) -> None:
    copies, kms = await sealed_copies(tmp_path)
    for region in REGIONS[1:]:
        kms[region].disabled = True
    assert whole(await copies.verify()), "one region's KMS is enough"
    kms[HOME].disabled = True
    look_with(copies, over(kms, GROUP))
    found = await copies.verify(restart=True)
    assert found.count == 0
    assert found.state != "done"
    assert "is disabled" in found.reason
    look_with(copies, Sealer(GROUP, None))
    found = await copies.verify(restart=True)
    assert (found.count, found.state == "done") == (0, False)
    assert "these settings have no keys" in found.reason


async def test_copies_that_a_lost_kms_key_alone_opened_come_back_from_another_region_sealed_for_the_new_key(
    tmp_path: Path,
) -> None:
    """What `kms-unusable` says to do when a key is gone for good."""
    copies, kms = await sealed_copies(tmp_path)
    alone = over({HOME: kms[HOME]}, GROUP)
    here = copies.stores[HOME].objects
    for ref, there in list(here.items()):
        plain = await over(kms, GROUP).open(ref, there.data, HOME)
        data = await alone.seal(ref, plain, HOME, 1)
        here[ref] = StoredObject(data, hashlib.sha256(data).hexdigest())
    reader = over(kms, GROUP)
    look_with(copies, reader)
    assert whole(await copies.verify())
    assert reader.keyring is not None
    assert {one.region: one.alone for one in reader.keyring.seen()} == dict.fromkeys(REGIONS, 0) | {HOME: len(here)}
    kms[HOME] = MemoryKms(HOME)  # the old key is deleted, and kms_key names another one
    reader = over(kms, GROUP)
    look_with(copies, reader)
    assert (await copies.verify(restart=True)).count == len(here)
    assert states(await mend(copies)) == ["done"] * len(here)
    assert whole(await copies.verify(restart=True))
    for ref, there in here.items():
        found = sealing.read_envelope(there.data)
        assert found is not None
        assert set(found[0].wrapped_for) == set(REGIONS), ref
    only_home = over({HOME: kms[HOME]}, GROUP)
    for ref, there in here.items():
        assert await only_home.open(ref, there.data, HOME), "the new key opens them without any other region's KMS"
