"""Salvage: every damaged object is found with whose records were in it, mended from another region, or called lost."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controller.domain.model import EpochStart, Salvage
from controller.runtime.archive_documents import Repair
from controller.stream.segment import frame_offsets
from tests.support.damage import HOME, REGIONS, Copies, only, whole
from tests.support.segments import Built, History

NEAR, FAR = REGIONS[1:]
S = "0"


def history() -> History:
    return History().grow(4, agents=3, epoch=1).grow(4, agents=3, epoch=6)


def diverged(folder: Path, *having: str) -> tuple[Copies, list[Built]]:
    """Segments 5 to 8 of epochs 3 and 4 were cut off the home store; the regions in ``having`` have their objects, too."""
    copies = Copies(history(), folder)
    tail = history().fork(4).grow(2, epoch=3).grow(2, epoch=4).segments[4:]
    piece = Salvage(5, 8, (EpochStart(3, 5), EpochStart(4, 7)), tail[-1].chain, 6)
    for region in (HOME, *having):
        for built in tail:
            copies.stores[region].put(built.ref, built.data)
    copies.stores[HOME].heads[S] = replace(copies.stores[HOME].heads[S], salvage=(piece,))
    return copies, tail


async def mend(copies: Copies) -> Repair:
    return await copies.mender().repair(HOME, execute=True, requester="ada", confirm=HOME)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**9))
async def test_whatever_is_damaged_in_a_salvage_is_named_and_mended_from_a_region_that_has_it(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    dice = random.Random(seed)
    copies, tail = diverged(tmp_path_factory.mktemp("tail"), FAR)
    store = copies.stores[HOME]
    before = {ref: stored.data for ref, stored in store.objects.items()}
    damaged = dice.sample(tail, dice.randint(1, 4))
    for built in damaged:
        match dice.randrange(3):
            case 0:
                store.corrupt(built.ref, dice.randrange(8 * len(built.data)))
            case 1:
                store.drop(built.ref)
            case 2:
                store.truncate(built.ref, dice.randrange(len(built.data)))
    found = await copies.verify()
    assert {problem.what for problem in found.problems} == {"salvage"}
    assert {problem.key: problem.source for problem in found.problems} == {built.ref.key: FAR for built in damaged}
    for problem in found.problems:
        assert problem.agent.startswith("agent-")
        assert problem.record in problem.detail
    dry = await copies.mender().repair(HOME, execute=False)
    assert {action.state for action in dry.actions} == {"would"}
    assert [action.state for action in (await mend(copies)).actions] == ["done"] * len(damaged)
    assert {ref: stored.data for ref, stored in store.objects.items()} == before
    assert whole(await copies.verify())


async def test_every_byte_of_an_object_of_a_salvage_counts(tmp_path: Path) -> None:
    copies, tail = diverged(tmp_path, NEAR)
    built = tail[1]
    places = frame_offsets(built.data)
    for byte in [*range(40), *range(40, len(built.data), 397), *range(len(built.data) - 48, len(built.data), 5)]:
        copies.stores[HOME].corrupt(built.ref, 8 * byte)
        problem = only(await copies.verify(restart=True))
        assert (problem.what, problem.key, problem.source) == ("salvage", built.ref.key, NEAR)
        hit = [place for place in places if place.offset <= byte < place.offset + place.length]
        assert (problem.record, problem.records) == ((hit[0].id, 1) if hit else (places[0].id, len(places)))
        copies.stores[HOME].corrupt(built.ref, 8 * byte)


async def test_what_no_region_has_is_called_lost_with_its_agents_and_records(tmp_path: Path) -> None:
    copies, tail = diverged(tmp_path)
    store = copies.stores[HOME]
    store.corrupt(tail[2].ref, 8 * (frame_offsets(tail[2].data)[1].offset + 60))
    problem = only(await copies.verify())
    assert (problem.seq, problem.epoch, problem.source, problem.agent, problem.records) == (7, 4, "", "agent-0", 3)
    assert "agent-2/e4s7" in problem.detail
    assert "it is lost" in problem.fix
    done = await mend(copies)
    assert [(action.state, action.agent) for action in done.actions] == [("cannot", "agent-0")]
    assert "lost" in done.actions[0].sentence
    store.drop(tail[2].ref)
    problem = only(await copies.verify())
    assert (problem.agent, problem.records) == ("", 0)
    assert "not known" in problem.detail


async def test_before_a_lost_object_what_is_sound_is_taken_as_it_is_and_nothing_else_is_believed(tmp_path: Path) -> None:
    copies, tail = diverged(tmp_path)
    copies.stores[HOME].drop(tail[2].ref)
    copies.stores[HOME].corrupt(tail[1].ref, 900)
    copies.stores[NEAR].put(tail[1].ref, tail[1].data)  # right, but nothing says so
    found = await copies.verify()
    assert {(problem.seq, problem.source) for problem in found.problems} == {(6, ""), (7, "")}


async def test_a_copy_elsewhere_that_is_damaged_too_is_not_used(tmp_path: Path) -> None:
    copies, tail = diverged(tmp_path, NEAR, FAR)
    for region in (HOME, NEAR):
        copies.stores[region].corrupt(tail[3].ref, 900)
    assert only(await copies.verify()).source == FAR
    copies.stores[FAR].corrupt(tail[3].ref, 900)
    copies.stores[NEAR].corrupt(tail[3].ref, 900)  # back again
    assert [(action.state, action.source) for action in (await mend(copies)).actions] == [("done", NEAR)]


async def test_salvage_that_was_let_go_of_since_the_verification_is_not_mended(tmp_path: Path) -> None:
    copies, tail = diverged(tmp_path, NEAR)
    store = copies.stores[HOME]
    store.drop(tail[3].ref)
    assert only(await copies.verify()).source == NEAR
    store.heads[S] = replace(store.heads[S], salvage=())
    assert [action.state for action in (await mend(copies)).actions] == ["whole"]
    assert tail[3].ref not in store.objects


@pytest.mark.parametrize(
    "name", ["first_seq", "last_seq", "last_chain", "by_epoch", "epoch-0", "epoch-1", "start-0", "start-1"]
)
async def test_every_field_of_a_salvage_in_a_head_counts(tmp_path: Path, name: str) -> None:
    copies, _ = diverged(tmp_path)
    head = copies.stores[HOME].heads[S]
    (piece,) = head.salvage
    for number in range(1, 40, 5):
        bit = 1 << number
        if name == "last_chain":
            changed = replace(piece, last_chain=piece.last_chain[:number] + "x" + piece.last_chain[number + 1 :])
        elif "-" in name:
            what, at = name.split("-")
            field = "epoch" if what == "epoch" else "first_seq"
            start = piece.epochs[int(at)]
            other = replace(start, **{field: getattr(start, field) ^ bit})
            changed = replace(piece, epochs=tuple(other if one == start else one for one in piece.epochs))
        else:
            changed = replace(piece, **{name: getattr(piece, name) ^ bit})
        copies.stores[HOME].heads[S] = replace(head, salvage=(changed,))
        found = await copies.verify(restart=True)
        assert {problem.what for problem in found.problems} == {"salvage"}, changed


@pytest.mark.parametrize("name", ["seq", "epoch", "chain", "sha256"])
async def test_every_field_of_a_snapshot_in_a_head_counts_and_its_chain_is_put_right(tmp_path: Path, name: str) -> None:
    copies = Copies(history(), tmp_path)
    copies.settle()
    before = copies.stores[HOME].heads[S]
    last = before.snapshots[-1]
    value = getattr(last, name)
    for number in range(0, 40, 5):
        wrong = value ^ (1 << number) if isinstance(value, int) else value[:number] + "x" + value[number + 1 :]
        changed = (*before.snapshots[:-1], replace(last, **{name: wrong}))
        copies.stores[HOME].heads[S] = replace(before, snapshots=changed)
        found = await copies.verify(restart=True)
        assert found.count, changed
        assert {problem.what for problem in found.problems} <= {"head", "snapshot"}
    if name == "chain":
        repaired = await copies.mender(epoch=6).repair(HOME, execute=True, confirm=HOME)
        assert [action.state for action in repaired.actions] == ["done"]
        assert copies.stores[HOME].heads[S] == before
