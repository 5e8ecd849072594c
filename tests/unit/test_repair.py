"""Repair: what the chain proves is put back, what it does not is left alone, and afterwards the copy verifies clean."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controller.domain.model import Frame, NamedSnapshot, SnapshotRef
from controller.errors import Conflict, Corrupt, NotFound, Refused, Unavailable
from controller.runtime.archive_documents import Repair
from controller.stream.follower import Follower
from controller.stream.segment import encode_segment
from controller.stream.view import View
from tests.support.damage import HOME, REGIONS, Copies, whole
from tests.support.segments import GROUP, History

FAR = REGIONS[2]


def history(segments: int = 8) -> History:
    return History().grow(segments // 2, agents=3, epoch=1).grow(segments - segments // 2, agents=3, epoch=4)


async def mend(copies: Copies, region: str = HOME, *, epoch: int = 0) -> Repair:
    return await copies.mender(epoch=epoch).repair(region, execute=True, requester="ada", confirm=region)


def states(found: Repair) -> list[str]:
    return [action.state for action in found.actions]


# ------------------------------------------------------------------------------------------------------------- objects


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**9), region=st.sampled_from(REGIONS))
async def test_whatever_is_damaged_in_one_copy_is_byte_for_byte_as_before_after_a_repair(
    tmp_path_factory: pytest.TempPathFactory, seed: int, region: str
) -> None:
    dice = random.Random(seed)
    copies = Copies(history(), tmp_path_factory.mktemp("mend"))
    before = {ref: stored.data for ref, stored in copies.stores[region].objects.items()}
    damaged = dice.sample(range(1, 9), dice.randint(1, 8))
    for seq in damaged:
        match dice.randrange(3):
            case 0:
                copies.flip(seq, dice.randrange(len(copies.built(seq).data)), region, hidden=dice.random() < 0.5)
            case 1:
                copies.drop(seq, region)
            case 2:
                copies.stores[region].truncate(copies.built(seq).ref, dice.randrange(len(copies.built(seq).data)))
    assert (await copies.verify(region)).count == len(damaged)
    found = await mend(copies, region)
    assert states(found) == ["done"] * len(damaged)
    assert found.left == 0
    assert {ref: stored.data for ref, stored in copies.stores[region].objects.items()} == before
    assert whole(await copies.verify(region))


async def test_a_dry_run_says_what_would_be_done_and_changes_nothing(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    copies.flip(3)
    copies.drop(5)
    await copies.verify()
    before = copies.stores[HOME].copy()
    found = await copies.mender().repair(HOME, execute=False)
    assert states(found) == ["would", "would"]
    assert all(action.source == REGIONS[1] and action.agent for action in found.actions)
    assert found.left == 2
    assert copies.stores[HOME].objects == before.objects
    assert await copies.audit._newest() is None


async def test_a_repair_needs_a_verification_a_confirmation_and_the_audit(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    copies.flip(3)
    with pytest.raises(NotFound):
        await mend(copies)
    await copies.verify()
    for confirm in ("", FAR):
        with pytest.raises(Refused):
            await copies.mender().repair(HOME, execute=True, confirm=confirm)
    copies.etcd.cut = True
    with pytest.raises(Unavailable):
        await mend(copies)
    with pytest.raises(Corrupt):
        await copies.clients[HOME].get_segment(copies.built(3).ref)
    copies.etcd.cut = False
    assert states(await mend(copies)) == ["done"]
    entry = await copies.audit._newest()
    assert entry is not None
    assert (entry.actor, entry.action, entry.subject) == ("ada", "repair", HOME)
    assert copies.built(3).ref.key in str(entry.detail)


async def test_a_copy_that_turned_bad_since_the_verification_is_not_used_and_another_one_is(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    copies.flip(3)
    await copies.verify()
    segment = copies.built(3).segment
    frames = [Frame(replace(one.record, copies=2), one.encoding, one.payload, one.base) for one in segment.frames]
    copies.replace(3, encode_segment(segment.header, frames), REGIONS[1])
    found = await mend(copies)
    assert (found.actions[0].state, found.actions[0].source) == ("done", FAR)
    assert whole(await copies.verify())


async def test_what_nobody_proves_is_left_alone_and_said(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    for region in REGIONS:
        copies.flip(3, region=region)
    await copies.verify()
    before = copies.stores[HOME].copy()
    found = await mend(copies)
    assert set(states(found)) == {"cannot"}
    assert copies.stores[HOME].objects == before.objects
    assert found.left >= 1


async def test_what_is_whole_again_is_not_written_over(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    copies.flip(3)
    await copies.verify()
    copies.flip(3)  # back again
    writes = copies.stores[HOME].mend
    copies.stores[HOME].mend = lambda *_: pytest.fail("a good object was written over")  # type: ignore[method-assign]
    found = await mend(copies)
    assert states(found) == ["whole"]
    copies.stores[HOME].mend = writes  # type: ignore[method-assign]
    assert whole(await copies.verify())


async def test_an_object_that_changes_while_it_is_mended_is_left_to_whoever_changed_it(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    copies.flip(3)
    await copies.verify()
    inspect = copies.stores[HOME].inspect

    def meanwhile(ref: object) -> object:
        found = inspect(ref)  # type: ignore[arg-type]
        copies.flip(3, 500)
        return found

    copies.stores[HOME].inspect = meanwhile  # type: ignore[method-assign,assignment]
    found = await mend(copies)
    assert states(found) == ["failed"]
    assert "changed meanwhile" in found.actions[0].sentence


async def test_two_repairs_at_once_and_a_repair_during_a_verification_are_conflicts(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    copies.flip(3)
    await copies.verify()
    await copies.verifier.start(HOME, restart=True)
    with pytest.raises(Conflict):
        await mend(copies)
    await copies.verifier.stop(HOME)
    copies.verifier.busy.add(HOME)
    with pytest.raises(Conflict):
        await mend(copies)
    with pytest.raises(Conflict):
        await copies.verifier.start(HOME, restart=False)


async def test_more_problems_than_one_batch_are_done_in_several_those_that_can_be_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controller.runtime.mender.BATCH", 3)
    copies = Copies(history(10), tmp_path)
    for seq in range(1, 11):
        copies.drop(seq)
    for region in REGIONS[1:]:
        copies.drop(4, region)
    await copies.verify()
    rounds = 0
    while True:
        found = await mend(copies)
        rounds += 1
        if "done" not in states(found):
            break
    assert rounds == 3
    assert {action.seq for action in found.actions} <= {1, 2, 3, 4}  # what is before a gap in everybody's copy proves nothing
    assert sorted(ref.seq for ref in copies.stores[HOME].objects) == [5, 6, 7, 8, 9, 10]


async def test_a_snapshot_is_replaced_by_the_one_whose_hash_the_head_names(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    ref = SnapshotRef("0", 4, 1)
    named = NamedSnapshot(4, 1, copies.built(4).chain, hashlib.sha256(b"an index").hexdigest())
    for region in REGIONS:
        copies.stores[region].put_snapshot(ref, b"an index")
        copies.stores[region].heads["0"] = replace(copies.stores[region].heads["0"], snapshots=(named,))
    copies.stores[HOME].corrupt_snapshot(ref)
    copies.stores[REGIONS[1]].corrupt_snapshot(ref, b"another index")
    await copies.verify()
    found = await mend(copies)
    assert [(action.state, action.source) for action in found.actions] == [("done", FAR)]
    assert whole(await copies.verify())


# ---------------------------------------------------------------------------------------------------------------- head

DAMAGES = {
    "seq up": {"seq": 8 + 2**20},
    "seq down": {"seq": 6},
    "chain": {"chain": "f" * 64},
    "base": {"base": 3},
    "base_chain": {"base_chain": "e" * 64},
    "epochs": {"epochs": ()},
    "records": {"records": 5},
    "bytes": {"bytes": 1},
    "received_at": {"received_at": 3.5},
    "writer": {"writer": "eu-west-1/a/6"},
    "epoch": {"epoch": 2},
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
@pytest.mark.parametrize("region", [HOME, FAR])
async def test_a_damaged_head_is_put_right_by_the_holder_and_by_nobody_else(tmp_path: Path, damage: str, region: str) -> None:
    copies = Copies(history(), tmp_path)
    right = copies.stores[region].heads["0"]
    copies.stores[region].heads["0"] = wrong = replace(right, **DAMAGES[damage])  # type: ignore[arg-type]
    assert (await copies.verify(region)).count >= 1
    standby = await mend(copies, region)
    assert states(standby) == ["cannot"]
    assert "active controller" in standby.actions[0].sentence
    assert copies.stores[region].heads["0"] == wrong
    found = await mend(copies, region, epoch=4)
    assert states(found) == ["done"], found
    assert copies.stores[region].heads["0"] == right
    assert whole(await copies.verify(region))


async def test_damaged_objects_and_a_damaged_head_are_put_right_in_one_go(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    right = copies.stores[HOME].heads["0"]
    copies.stores[HOME].heads["0"] = replace(right, chain="f" * 64, records=1)
    copies.drop(8)
    copies.flip(1)
    await copies.verify()
    found = await mend(copies, epoch=4)
    assert states(found) == ["done"] * 3
    assert copies.stores[HOME].heads["0"] == right
    assert whole(await copies.verify())


async def test_a_head_is_never_set_back_behind_segments_that_were_committed_meanwhile(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    copies.stores[HOME].heads["0"] = replace(copies.stores[HOME].heads["0"], records=1)
    await copies.verify()
    grown = copies.history.grow(2, epoch=4)
    for region in REGIONS:
        before = copies.stores[region].heads["0"]
        grown.install(copies.stores[region])
        head = grown.head()
        added = [built.segment for built in grown.segments[8:]]
        copies.stores[region].heads["0"] = replace(
            head,
            writer=before.writer,
            records=before.records + sum(len(segment.frames) for segment in added),
            bytes=before.bytes + sum(len(built.data) for built in grown.segments[8:]),
            received_at=max(frame.record.received_at for frame in added[-1].frames),
        )
    found = await mend(copies, epoch=4)
    assert states(found) == ["done"]
    head = copies.stores[HOME].heads["0"]
    assert (head.seq, head.chain, head.records) == (10, grown.chain, 30)


async def test_a_newer_epochs_head_is_not_touched_by_an_older_holder(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    right = copies.stores[HOME].heads["0"]
    copies.stores[HOME].heads["0"] = wrong = replace(right, epoch=9, writer="eu-west-1/b/9", records=1)
    await copies.verify()
    found = await mend(copies, epoch=4)
    assert states(found) == ["failed"]
    assert copies.stores[HOME].heads["0"] == wrong


# ------------------------------------------------------------------------------------------------- the view, followers


async def test_a_damaged_view_is_emptied_and_followed_anew_but_not_under_a_writer(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    copies.view.tables.run("UPDATE records SET received_at=1 WHERE id='e1s2'")
    await copies.verify()
    assert states(await copies.mender(epoch=4).repair(HOME, execute=True, confirm=HOME)) == ["cannot"] * 3
    found = await mend(copies)
    assert set(states(found)) == {"done"}
    follower = Follower(copies.clients[HOME], copies.view, "0", copies.clock, GROUP)
    assert (await follower.step()).seq == 8
    assert whole(await copies.verify())


async def test_a_standby_that_stopped_at_damage_goes_on_by_itself_after_the_repair(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    follower = Follower(copies.clients[FAR], View(None), "0", copies.clock, GROUP)
    copies.flip(4, region=FAR)
    copies.drop(6, FAR)
    for _ in range(3):
        with pytest.raises(Corrupt) as caught:
            await follower.step()
        assert copies.built(4).ref.key in caught.value.message
        assert follower.position().seq == 3
    await copies.verify(FAR)
    assert states(await mend(copies, FAR)) == ["done", "done"]
    assert (await follower.step()).seq == 8
    assert follower.position().chain == copies.history.chain
