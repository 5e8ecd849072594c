"""Verification and repair of the catalogue: an item that says anything but what the chain proves is named and put right."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controller.domain.model import CatalogueEntry, EpochStart, FramePlace, Salvage
from controller.runtime.archive_documents import Repair
from controller.stream.keeping import Keeping
from controller.stream.view import View
from tests.support.damage import HOME, REGIONS, Copies, head_of, only, whole
from tests.support.segments import History

FAR = REGIONS[2]
S = "0"


def history(segments: int = 8) -> History:
    return History().grow(segments // 2, agents=3, epoch=1).grow(segments - segments // 2, agents=3, epoch=4)


def settled(folder: Path, region: str = HOME) -> Copies:
    copies = Copies(history(), folder)
    copies.settle(region)
    return copies


def change(copies: Copies, agent: str, region: str = HOME, **changed: object) -> None:
    catalogue = copies.stores[region].catalogue
    catalogue[S, agent] = replace(catalogue[S, agent], **changed)  # type: ignore[arg-type]


async def mend(copies: Copies, region: str = HOME, *, epoch: int = 4) -> Repair:
    return await copies.mender(epoch=epoch).repair(region, execute=True, requester="ada", confirm=region)


async def test_a_catalogue_as_the_holder_writes_it_is_whole_in_every_region(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    for region in REGIONS:
        copies.catalogue(region)
        found = await copies.verify(region)
        assert whole(found), found.problems
    copies.settle()
    assert len(copies.stores[HOME].catalogue[S, "agent-1"].chain) > 1
    found = await copies.verify(restart=True)
    assert whole(found), found.problems


def flipped(entry: CatalogueEntry, dice: random.Random) -> CatalogueEntry:
    """Another value in one field, or in one field of one place."""
    name = dice.choice(["kind", "id", "sha256", "size", "encoding", "received_at", "by_epoch", "chain", "chain", "chain"])
    value = getattr(entry, name)
    if isinstance(value, str):
        at = dice.randrange(len(value))
        return replace(entry, **{name: value[:at] + chr(ord(value[at]) ^ 1) + value[at + 1 :]})  # type: ignore[arg-type]
    if isinstance(value, float):
        return replace(entry, received_at=value + dice.choice([-1.0, 0.25, 1e9]))
    if isinstance(value, int):
        return replace(entry, **{name: value ^ (1 << dice.randrange(40))})  # type: ignore[arg-type]
    chain, at = list(entry.chain), dice.randrange(len(entry.chain))
    match dice.randrange(4):
        case 0:
            del chain[at]
        case 1:
            chain.insert(at, chain[dice.randrange(len(chain))])
        case _:
            field = dice.choice(["seq", "epoch", "ordinal", "offset", "length"])
            chain[at] = replace(chain[at], **{field: getattr(chain[at], field) ^ (1 << dice.randrange(20))})
    return replace(entry, chain=tuple(chain))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**9))
async def test_every_flipped_field_of_an_item_is_found_named_and_put_right(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    dice = random.Random(seed)
    copies = settled(tmp_path_factory.mktemp("item"))
    agent = f"agent-{dice.randrange(3)}"
    before = dict(copies.stores[HOME].catalogue)
    damaged = flipped(before[S, agent], dice)
    copies.stores[HOME].catalogue[S, agent] = damaged
    problem = only(await copies.verify())
    assert (problem.what, problem.agent, problem.record) == ("catalogue", agent, before[S, agent].id), damaged
    assert problem.key == f"agent#{agent}"
    found = await mend(copies)
    assert [action.state for action in found.actions] == ["done"], found.actions
    assert copies.stores[HOME].catalogue == before
    assert whole(await copies.verify())


async def test_an_item_of_another_agents_record_is_found_also_before_anything_is_settled(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    copies.catalogue()
    there = copies.stores[HOME].catalogue
    there[S, "agent-1"] = replace(there[S, "agent-2"], agent="agent-1")
    problem = only(await copies.verify())
    assert (problem.what, problem.agent) == ("catalogue", "agent-1")
    assert "on which" in problem.detail or "no frame of record" in problem.detail or "it says" in problem.detail


async def test_an_item_that_is_late_or_absent_is_told_only_when_it_certainly_should_be_there(tmp_path: Path) -> None:
    early = View(None)
    history(8).apply_to(early, 6)
    late = replace(Keeping(early, S).entry("agent-0") or pytest.fail("no entry"), by_epoch=4)
    grown = history(8)
    for seq in range(9, 12):
        grown.add([grown.step("agent-2", f"more{seq}", seq * 100)], 4)
    copies = Copies(grown, tmp_path)
    copies.catalogue()
    there = copies.stores[HOME].catalogue
    for settle in (False, True):
        if settle:
            copies.settle()
        there[S, "agent-0"] = late
        del there[S, "agent-1"]
        del there[S, "agent-2"]  # has written since: its item may be on its way
        found = await copies.verify(restart=True)
        told = sorted((problem.agent, problem.record) for problem in found.problems)
        assert told == ([("agent-0", "e4s8"), ("agent-1", "e4s8")] if settle else [])


async def test_an_agent_without_an_item_is_found_and_gets_one(tmp_path: Path) -> None:
    many = History()
    for seq in range(1, 5):
        many.add([many.step(f"a{n:03d}ü", f"r{seq}", seq * 1000 + n) for n in range(120)])
    for seq in range(5, 8):
        many.add([many.step("zz", f"r{seq}", seq * 1000)])
    copies = Copies(many, tmp_path)
    copies.settle()
    before = dict(copies.stores[HOME].catalogue)
    assert len(before) == 121  # more than a page
    assert whole(await copies.verify())
    gone = ["a000ü", "a055ü", "a099ü", "a100ü", "a119ü"]
    for agent in gone:
        del copies.stores[HOME].catalogue[S, agent]
    found = await copies.verify()
    assert sorted(problem.agent for problem in found.problems) == gone
    assert {problem.record for problem in found.problems} == {"r4"}
    assert [action.state for action in (await mend(copies, epoch=1)).actions] == ["done"] * 5
    assert copies.stores[HOME].catalogue == before


async def test_an_item_of_nobody_is_found_and_deleted(tmp_path: Path) -> None:
    copies = settled(tmp_path)
    there = copies.stores[HOME].catalogue
    before = dict(there)
    there[S, "nobody"] = replace(there[S, "agent-1"], agent="nobody")
    problem = only(await copies.verify())
    assert (problem.agent, problem.record) == ("nobody", "")
    assert [action.state for action in (await mend(copies)).actions] == ["done"]
    assert there == before


async def test_a_dry_run_changes_nothing_and_only_the_holder_writes(tmp_path: Path) -> None:
    copies = settled(tmp_path, FAR)
    change(copies, "agent-1", FAR, size=1)
    damaged = dict(copies.stores[FAR].catalogue)
    await copies.verify(FAR)
    dry = await copies.mender().repair(FAR, execute=False)
    assert [action.state for action in dry.actions] == ["would"]
    assert "only the active controller" in dry.actions[0].sentence
    refused = await copies.mender().repair(FAR, execute=True, confirm=FAR)
    assert [action.state for action in refused.actions] == ["cannot"]
    stale = await mend(copies, FAR, epoch=3)
    assert [action.state for action in stale.actions] == ["failed"]
    assert copies.stores[FAR].catalogue == damaged


async def test_an_item_that_was_written_anew_meanwhile_is_left_alone(tmp_path: Path) -> None:
    copies = settled(tmp_path)
    right = copies.stores[HOME].catalogue[S, "agent-1"]
    change(copies, "agent-1", size=1)
    await copies.verify()
    copies.stores[HOME].catalogue[S, "agent-1"] = right
    assert [action.state for action in (await mend(copies)).actions] == ["whole"]
    change(copies, "agent-1", size=1)
    await copies.verify()
    inspect = copies.stores[HOME].inspect_catalogue

    def meanwhile(stream: str, agent: str) -> object:
        found = inspect(stream, agent)
        change(copies, "agent-1", size=2)
        return found

    copies.stores[HOME].inspect_catalogue = meanwhile  # type: ignore[method-assign,assignment]
    assert [action.state for action in (await mend(copies)).actions] == ["failed"]
    assert copies.stores[HOME].catalogue[S, "agent-1"].size == 2


async def test_items_that_are_newer_than_the_walk_are_judged_by_walking_on(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    copies.catalogue()
    listed = copies.stores[HOME].list_catalogue

    def grows(stream: str, after: str, limit: int) -> object:
        if copies.history.seq == 8:
            copies.history.grow(2, epoch=4)
            copies.history.install(copies.stores[HOME])
            copies.stores[HOME].heads[S] = head_of(copies.history)
            copies.history.apply_to(copies.view)
            copies.catalogue()
        return listed(stream, after, limit)

    copies.stores[HOME].list_catalogue = grows  # type: ignore[method-assign,assignment]
    found = await copies.verify()
    assert whole(found), found.problems
    place = copies.stores[HOME].catalogue[S, "agent-1"].chain[0]
    assert place.seq == 10
    change(copies, "agent-1", chain=(replace(place, seq=11), *copies.stores[HOME].catalogue[S, "agent-1"].chain[1:]))
    assert only(await copies.verify()).agent == "agent-1"


async def test_what_was_let_go_of_a_moment_ago_is_no_damage_and_what_should_be_written_by_now_is(tmp_path: Path) -> None:
    late = History()
    for seq in range(1, 9):
        late.add([late.step("a", f"r{seq}", seq, cut=0)], 4)
    copies = Copies(late, tmp_path, base=4)
    copies.catalogue()
    gone = replace(copies.stores[HOME].catalogue[S, "a"], id="r1", chain=(FramePlace(1, 4, 0, 100, 50),))
    copies.stores[HOME].catalogue[S, "a"] = gone
    assert whole(await copies.verify())
    copies.settle()
    copies.stores[HOME].catalogue[S, "a"] = gone
    found = await copies.verify(restart=True)
    assert [problem.agent for problem in found.problems] == ["a"]


async def test_an_item_that_points_into_a_tail_that_was_cut_off_waits_for_the_new_holder(tmp_path: Path) -> None:
    copies = Copies(history(), tmp_path)
    tail = history().fork(6).grow(2, epoch=3)
    for built in tail.segments[6:]:
        copies.stores[HOME].put(built.ref, built.data)
    piece = Salvage(7, 8, (EpochStart(3, 7),), tail.chain, 4)
    copies.stores[HOME].heads[S] = replace(copies.stores[HOME].heads[S], salvage=(piece,))
    copies.catalogue()
    place = FramePlace(8, 3, 1, 10, 10)
    change(copies, "agent-1", id="e3s8", chain=(place,), by_epoch=3)
    assert whole(await copies.verify())
    change(copies, "agent-1", by_epoch=4)
    assert only(await copies.verify()).agent == "agent-1"


async def test_damaged_segments_are_told_once_and_not_again_by_the_catalogue(tmp_path: Path) -> None:
    copies = settled(tmp_path)
    for region in REGIONS:
        copies.flip(8, region=region)
    found = await copies.verify()
    assert "catalogue" not in {problem.what for problem in found.problems}
    assert Keeping(copies.view, S).entry("agent-1") is not None
