"""Verification: what is whole is called whole, and every single flipped bit is found and named."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from controller.domain.model import EpochStart, Frame, Head, NamedSnapshot, Salvage, SnapshotRef
from controller.errors import Conflict, DrError, NotFound, Unavailable
from controller.stream.segment import Segment, encode_segment, frame_offsets
from controller.stream.verify import Walk
from controller.stream.view import View
from controller.stream.warmth import SETTLED_ROUNDS
from tests.support.damage import HOME, REGIONS, Copies, head_of, only, whole
from tests.support.segments import GROUP, History

FAR = REGIONS[2]


def history(segments: int = 8) -> History:
    return History().grow(segments // 2, agents=3, epoch=1).grow(segments - segments // 2, agents=3, epoch=4)


# -------------------------------------------------------------------------------------------------------------- whole


async def test_whole_copies_are_called_whole_with_their_counts(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    for region in REGIONS:
        found = await copies.verify(region)
        assert whole(found), found.problems
        (walk,) = found.streams
        assert (walk.seq, walk.goal, walk.segments, walk.records) == (8, 8, 8, 24)
        assert walk.bytes == sum(len(built.data) for built in copies.history.segments)


async def test_an_empty_stream_a_late_base_and_a_copy_that_is_behind_are_whole(tmp_path: Path) -> None:
    empty = Copies(History(), tmp_path / "empty")
    assert whole(await empty.verify())
    late = History()
    for seq in range(1, 7):
        late.add([late.step("a", f"r{seq}", seq, cut=0)])
    based = Copies(late, tmp_path / "late", base=4)
    assert whole(await based.verify())
    copies = Copies(history(), tmp_path / "behind")
    copies.stores[FAR].heads["0"] = head_of(copies.history, seq=5)
    found = await copies.verify(FAR)
    assert whole(found), found.problems
    assert found.streams[0].seq == 5
    assert whole(await copies.verify(HOME))


async def test_an_unknown_region_and_a_verification_that_never_was_are_told(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    with pytest.raises(NotFound):
        await copies.verifier.start("mars", restart=False)
    with pytest.raises(NotFound):
        await copies.verifier.state(HOME)


# -------------------------------------------------------------------------------------------------------- flipped bits


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_every_flipped_bit_of_an_object_is_found_and_its_segment_and_records_are_named(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    copies = Copies(history(4), tmp_path_factory.mktemp("flip"))
    seq = data.draw(st.integers(1, 4))
    built = copies.built(seq)
    byte = data.draw(st.integers(0, len(built.data) - 1))
    copies.flip(seq, byte, bit=data.draw(st.integers(0, 7)), hidden=data.draw(st.booleans()))
    problem = only(await copies.verify())
    assert (problem.region, problem.seq, problem.epoch, problem.key) == (HOME, seq, built.ref.epoch, built.ref.key)
    places = frame_offsets(built.data)
    hit = [place for place in places if place.offset <= byte < place.offset + place.length]
    if hit:
        assert (problem.what, problem.agent, problem.record, problem.records) == ("frame", hit[0].agent, hit[0].id, 1)
    else:
        assert problem.what in ("header", "index", "trailer")
        assert (problem.agent, problem.record, problem.records) == (places[0].agent, places[0].id, len(places))
    assert problem.source == REGIONS[1]
    assert "drctl repair" in problem.fix


HEAD_FIELDS = ["seq", "epoch", "chain", "base", "base_chain", "received_at", "records", "bytes", "writer", "epochs"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(HEAD_FIELDS), bit=st.integers(0, 44), where=st.integers(0, 63), seed=st.integers(0, 10**6))
@example(field="base", bit=3, where=0, seed=0)  # 1 -> 9 in a history of 8 segments: one after the last
async def test_every_flipped_bit_of_a_head_is_found(
    tmp_path_factory: pytest.TempPathFactory, field: str, bit: int, where: int, seed: int
) -> None:
    copies = Copies(history(), tmp_path_factory.mktemp("head"))
    head = copies.stores[HOME].heads["0"]
    value = getattr(head, field)
    if isinstance(value, str):
        at = where % len(value)
        changed: object = value[:at] + chr(ord(value[at]) ^ (1 << bit % 7)) + value[at + 1 :]
    elif isinstance(value, int):
        changed = value ^ (1 << bit)
    elif isinstance(value, float):
        changed = random.Random(seed).uniform(0, 2e9)
    else:
        start = head.epochs[where % 2]
        name = ("epoch", "first_seq")[bit % 2]
        flipped = replace(start, **{name: getattr(start, name) ^ (1 << bit % 20)})
        changed = tuple(flipped if one == start else one for one in head.epochs)
    copies.stores[HOME].heads["0"] = replace(head, **{field: changed})
    found = await copies.verify()
    assert found.state == "done", found
    assert found.count >= 1, (field, value, changed)
    assert {problem.what for problem in found.problems} <= {"head"}, found.problems


async def test_a_store_that_keeps_no_segment_is_whole_and_a_flipped_bit_in_either_of_its_chains_is_found(
    tmp_path: Path,
) -> None:
    for number, others in enumerate([1, 9]):  # what the other regions keep
        copies = Copies(history(), tmp_path / str(number))
        store = copies.stores[HOME]
        for region in REGIONS[1:]:
            copies.stores[region].heads["0"] = head_of(copies.history, base=others)
        head = head_of(copies.history, base=9)
        assert (head.seq, head.base_chain) == (8, head.chain)
        store.heads["0"] = head
        copies.view.forget("0", 9, head.chain)
        for seq in range(1, 9):
            copies.drop(seq)
        found = await copies.verify()
        assert whole(found), found.problems
        for name in ("chain", "base_chain"):
            value = getattr(head, name)
            store.heads["0"] = replace(head, **{name: ("0" if value[0] != "0" else "1") + value[1:]})
            found = await copies.verify()
            assert found.state == "done"
            assert "head" in {problem.what for problem in found.problems}


async def test_a_base_behind_the_last_segment_is_found_without_another_region(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    for region in REGIONS[1:]:
        copies.gates[region].cut = True
    store = copies.stores[HOME]
    store.heads["0"] = replace(store.heads["0"], base=9)
    found = await copies.verify()
    assert only(found).what == "head"
    assert found.streams[0].records == 24


async def test_a_head_that_moves_again_and_again_interrupts_the_walk(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    for region in REGIONS:
        copies.drop(1, region)
    heads = itertools.cycle([head_of(copies.history), head_of(copies.history, base=3)])

    async def ask() -> Head:
        return next(heads)

    proof = await copies.verifier.open(HOME)
    with pytest.raises(Unavailable, match="moved 21 times"):
        await Walk(copies.clients[HOME], {}, proof, "0", GROUP, copies.clock).run(ask)
    proof.close()


@pytest.mark.parametrize("part", ["first_seq", "last_seq", "last_chain", "object"])
async def test_damage_of_salvage_is_found(tmp_path: Path, part: str) -> None:
    copies = Copies(history(), tmp_path)
    tail = history().fork(6).grow(2, epoch=3)
    store = copies.stores[HOME]
    for built in tail.segments[6:]:
        store.put(built.ref, built.data)
    piece = Salvage(7, 8, (EpochStart(3, 7),), tail.chain, 4)
    store.heads["0"] = replace(store.heads["0"], salvage=(piece,))
    assert whole(await copies.verify())
    if part == "object":
        store.corrupt(tail.segments[6].ref, 900)
    else:
        changed = "f" * 64 if part == "last_chain" else getattr(piece, part) + 1
        store.heads["0"] = replace(store.heads["0"], salvage=(replace(piece, **{part: changed}),))
    found = await copies.verify()
    assert {problem.what for problem in found.problems} == {"salvage"}


async def test_a_damaged_or_missing_snapshot_is_found(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    store = copies.stores[HOME]
    ref = SnapshotRef("0", 4, 1)
    store.put_snapshot(ref, b"an index")
    named = NamedSnapshot(4, 1, copies.built(4).chain, hashlib.sha256(b"an index").hexdigest())
    store.heads["0"] = replace(store.heads["0"], snapshots=(named,))
    assert whole(await copies.verify())
    store.corrupt_snapshot(ref)
    assert only(await copies.verify()).what == "snapshot"
    store.corrupt_snapshot(ref, b"another index")
    assert only(await copies.verify()).what == "snapshot"
    del store.snapshots[ref]
    assert only(await copies.verify()).what == "snapshot"


async def test_snapshots_that_the_holder_replaces_while_a_verification_runs_are_no_damage(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    copies.settle()
    store = copies.stores[HOME]
    newest = store.heads["0"].snapshots[-1]
    get = store.get_snapshot

    def meanwhile(ref: SnapshotRef) -> bytes:
        store.heads["0"] = replace(store.heads["0"], snapshots=(newest,))
        for old in [one for one in store.snapshots if one.seq != newest.seq]:
            del store.snapshots[old]
        return get(ref)

    store.get_snapshot = meanwhile  # type: ignore[method-assign]
    found = await copies.verify()
    assert whole(found), found.problems


# ------------------------------------------------------------------------------------------------ other kinds of damage


async def test_missing_and_replaced_segments_anywhere_are_found_one_by_one_and_the_walk_goes_on(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    other = history().fork(4).grow(1, epoch=4)  # sound by itself, and not what the chain says
    copies.drop(1)
    copies.drop(3)
    copies.drop(4)
    copies.replace(5, rewritten(other.segments[4].segment))
    copies.flip(8)
    found = await copies.verify()
    assert [(one.seq, one.what) for one in found.problems] == [
        (1, "missing"), (3, "missing"), (4, "missing"), (5, "content"), (8, "frame"),
    ]  # fmt: skip
    assert all(one.source == REGIONS[1] and one.agent and one.record for one in found.problems)
    assert found.streams[0].records == 24


def rewritten(segment: Segment) -> bytes:
    frames = [Frame(replace(one.record, copies=2), one.encoding, one.payload, one.base) for one in segment.frames]
    return encode_segment(segment.header, frames)


@pytest.mark.parametrize("seq", [1, 4, 8])
async def test_a_segment_that_was_replaced_by_a_sound_one_is_told_apart_from_its_neighbours(tmp_path: Path, seq: int) -> None:
    copies = Copies(history(), tmp_path)
    copies.replace(seq, rewritten(copies.built(seq).segment))
    problem = only(await copies.verify())
    assert (problem.seq, problem.what, problem.source) == (seq, "content", REGIONS[1])


async def test_two_damaged_copies_prove_each_other_where_together_they_have_everything(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    for seq in (2, 3, 6):
        copies.flip(seq, region=HOME)
    for seq in (3, 6):
        copies.drop(seq, REGIONS[1])
    copies.drop(2, REGIONS[2])
    found = await copies.verify()
    assert [(one.seq, one.source) for one in found.problems] == [(2, REGIONS[1]), (3, REGIONS[2]), (6, REGIONS[2])]


async def test_what_nobody_can_prove_is_named_and_stepped_over(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    for region in REGIONS:
        copies.flip(3, region=region)
    copies.flip(6)
    found = await copies.verify()
    assert [(one.seq, one.source) for one in found.problems if one.what != "body"] == [(3, ""), (6, REGIONS[1])]
    assert found.problems[0].records == 3
    assert found.problems[0].agent == "agent-0"
    assert "backup" in found.problems[0].fix
    assert found.streams[0].seq == 8


async def test_a_copy_that_does_not_prove_itself_is_not_believed(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    copies.flip(3)
    for region in REGIONS[1:]:  # both others hold other, sound bytes there
        copies.replace(3, rewritten(copies.built(3).segment), region)
    found = await copies.verify()
    assert [(one.seq, one.source) for one in found.problems if one.seq] == [(3, "")]


async def test_regions_that_are_away_do_not_stop_a_verification_and_the_own_store_interrupts_it(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    copies.flip(3)
    copies.gates[REGIONS[1]].cut = True
    assert only(await copies.verify()).source == REGIONS[2]
    copies.gates[HOME].cut = True
    found = await copies.verify()
    assert found.state == "interrupted"
    assert f"drctl verify {HOME}" in found.reason
    copies.gates[HOME].cut = False
    found = await copies.verify()
    assert found.resumed
    assert only(found).source == REGIONS[2]


async def test_histories_that_differ_under_the_same_epochs_are_told(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    other = history().fork(5)
    for seq in (6, 7, 8):
        other.add([other.step("agent-9", f"x{seq}", seq)], 4)
    store = copies.stores[FAR]
    store.objects.clear()
    store._order.clear()
    other.install(store)
    store.heads["0"] = head_of(other)
    found = await copies.verify()
    assert {one.what for one in found.problems} == {"diverged"}
    assert FAR in found.problems[0].key


async def test_a_diverged_tail_that_awaits_its_holder_is_no_damage_of_objects(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    tail = history().fork(6).grow(2, epoch=5)
    store = copies.stores[FAR]
    head = head_of(tail)
    for built in tail.segments[6:]:
        if built.ref not in store.objects:
            store.put(built.ref, built.data)
    store.heads["0"] = head
    found = await copies.verify(FAR)
    assert {one.what for one in found.problems} == {"diverged"}


# ------------------------------------------------------------------------------------------------------------ the view


async def test_a_view_that_says_something_else_than_the_store_is_found(tmp_path: Path) -> None:
    changes = [
        "UPDATE records SET sha256=zeroblob(32) WHERE id='e1s2'",
        "UPDATE records SET received_at=received_at+1 WHERE id='e1s2'",
        "UPDATE records SET ordinal=ordinal+5 WHERE id='e1s2'",
        "DELETE FROM records WHERE id='e4s7'",
        "UPDATE records SET id='other' WHERE id='e4s7'",
        "UPDATE segments SET chain=replace(chain, substr(chain, 1, 1), 'g') WHERE seq=3",
        "UPDATE segments SET epoch=9 WHERE seq=3",
        "UPDATE warm SET body=zeroblob(length(body)) WHERE record=(SELECT max(record) FROM warm)",
    ]
    for number, change in enumerate(changes):
        copies = Copies(history(), tmp_path / str(number))
        for _ in range(SETTLED_ROUNDS):
            copies.view.settle()  # newest bodies lie in the file
        assert copies.view.tables.run(change) >= 1
        found = await copies.verify()
        assert {one.what for one in found.problems} == {"view"}, change
        assert whole(await copies.verify(FAR)), change


@settings(max_examples=25, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
async def test_a_flipped_bit_in_the_views_file_is_found_or_changes_nothing_that_the_view_says(
    tmp_path_factory: pytest.TempPathFactory, place: float, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("view")
    copies = Copies(history(), folder)
    path = folder / "view.sqlite"
    written = View(path)
    copies.history.apply_to(written)
    written.close()
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(bytes(data))
    try:
        copies.view = View(path)
    except DrError:  # found by whoever starts with it
        return
    copies.verifier = copies.controller()
    found = await copies.verify()
    if found.count == 0:
        position = copies.view.position("0")
        assert position[0] in (0, copies.history.seq)  # 0: it was set aside, and its follower builds it again
        for key, body in copies.history.bodies.items():
            record = copies.view.record(*key)
            assert record is None if position[0] == 0 else record is not None and record.size == len(body)
    copies.view.close()


# ------------------------------------------------------------------------------------------------------ interruptions


async def test_an_interrupted_verification_goes_on_where_it_was_also_after_a_restart(tmp_path: Path) -> None:
    copies = Copies(history(20), tmp_path)
    copies.flip(2)
    copies.flip(18)
    await copies.verifier.start(HOME, restart=False)
    await copies.until(lambda found: found.streams[0].seq >= 7)
    with pytest.raises(Conflict):
        await copies.verifier.start(HOME, restart=True)
    stopped = await copies.verifier.stop(HOME)
    assert stopped.state == "interrupted"
    reached = stopped.streams[0].seq
    assert 7 <= reached < 20
    copies.verifier = copies.controller()
    assert (await copies.verifier.state(HOME)).state == "interrupted"
    reads: list[int] = []
    get = copies.stores[HOME].get
    copies.stores[HOME].get = lambda ref: reads.append(ref.seq) or get(ref)  # type: ignore[method-assign,func-returns-value]
    found = await copies.verify()
    assert found.resumed
    assert min(reads) >= reached - 1
    assert [one.seq for one in found.problems] == [2, 18]
    again = await copies.verify()
    assert not again.resumed
    assert again.streams[0].records == 60


async def test_a_walk_that_is_cancelled_waits_for_the_thread_that_uses_its_file(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    proof = await copies.verifier.open(HOME)
    entered, go, apply = threading.Event(), threading.Event(), proof.apply

    def slow(*given: Any) -> None:
        entered.set()
        go.wait(30)
        apply(*given)

    async def ask() -> Head:
        return head_of(copies.history)

    proof.apply = slow  # type: ignore[method-assign]
    walk = asyncio.create_task(Walk(copies.clients[HOME], {}, proof, "0", GROUP, copies.clock).run(ask))
    await asyncio.to_thread(entered.wait, 30)
    for _ in range(2):  # a second Ctrl-C changes nothing
        walk.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not walk.done(), "its caller would close the file under the thread: SQLite ends the whole process then"
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await walk
    assert proof.counts("0")[0] == 1
    proof.close()


async def test_a_history_that_is_cut_back_between_two_parts_is_walked_anew_from_there(tmp_path: Path) -> None:
    copies = Copies(history(20), tmp_path)
    await copies.verifier.start(HOME, restart=False)
    await copies.until(lambda found: found.streams[0].seq >= 16)
    await copies.verifier.stop(HOME)
    turned = copies.history.fork(12).grow(4, epoch=9)
    for region in REGIONS:
        turned.install(copies.stores[region])
        copies.stores[region].heads["0"] = head_of(turned)
    copies.view = View(None)
    turned.apply_to(copies.view)
    copies.verifier = copies.controller()
    found = await copies.verify()
    assert found.resumed
    assert whole(found), found.problems
    assert found.streams[0].seq == 16


async def test_problems_beyond_the_bound_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controller.stream.proof.MAX_PROBLEMS", 3)
    copies = Copies(history(10), tmp_path)
    for seq in range(1, 11):
        copies.drop(seq)
    found = await copies.verify()
    assert len(found.problems) == 3
    assert found.count == 10
