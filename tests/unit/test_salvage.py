"""Salvage for people: what is in it, what of it lies nowhere else, its bodies, and how it is let go of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from controller.adapters.memory.coordinator import MemoryCluster, MemoryCoordinator
from controller.adapters.memory.gate import OpenGate
from controller.adapters.memory.region_store import MemoryRegionStore
from controller.domain.model import EpochStart, Fence, Salvage, SegmentRef
from controller.errors import Conflict, Corrupt, DrError, NotActive, NotFound, Refused, Unavailable
from controller.runtime import salvager as salvaging
from controller.runtime.audit import Audit
from controller.runtime.documents import Keys
from controller.runtime.salvage_documents import Discarded, SalvageRecord, receipt, receipt_line
from controller.runtime.salvager import Salvager
from controller.stream.segment import frame
from tests.support.damage import HOME, REGIONS, Copies, whole
from tests.support.segments import GROUP, Built, History

S = "0"
RESENT = b"written to both" * 50


@dataclass
class Stage:
    """The home store had segments 5 to 8 of epochs 3 and 4, which epoch 6 cut off and went on from segment 4."""

    folder: Path
    epoch: int = 6
    gate: Callable[[str], None] = lambda op: None
    tail: list[Built] = field(default_factory=list)
    bodies: dict[tuple[str, str], bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        base = History().grow(4, agents=3, epoch=1)
        lost, live = base.fork(4), base.fork(4)
        lost.states, lost.depth = dict(base.states), dict(base.depth)  # deltas against what both have
        lost.grow(2, epoch=3).grow(1, epoch=4)
        lost.add([frame("both", "r1", "checkpoint", RESENT), frame("both", "r2", "checkpoint", b"here")], 4)
        live.grow(2, agents=3, epoch=6)
        live.add([frame("both", "r1", "checkpoint", RESENT), frame("both", "r2", "checkpoint", b"there")], 6)
        live.grow(1, agents=3, epoch=6)
        self.copies = Copies(live, self.folder)
        self.store = self.copies.stores[HOME]
        self.tail, self.bodies = lost.segments[4:], {**lost.bodies, ("both", "r1"): RESENT, ("both", "r2"): b"here"}
        for built in self.tail:
            self.store.put(built.ref, built.data)
        self.piece = Salvage(5, 8, (EpochStart(3, 5), EpochStart(4, 7)), self.tail[-1].chain, 6)
        self.store.heads[S] = replace(self.store.heads[S], salvage=(self.piece,))
        self.name = f"0.5-8.{self.tail[-1].chain[:16]}"
        self.cluster = MemoryCluster(self.copies.clock)
        self.audit = Audit(MemoryCoordinator(self.cluster), Keys("/dr", GROUP))

    def salvager(self, *, epoch: int | None = None) -> Salvager:
        """A controller's, after its start. ``epoch`` 0: of one that holds nothing."""
        held = self.epoch if epoch is None else epoch
        fence = Fence(S, held, HOME, "a") if held else None
        clients = {
            region: MemoryRegionStore(self.copies.stores[region], Struck(self), call_timeout_seconds=None) for region in REGIONS
        }
        return Salvager(
            group=GROUP,
            region=HOME,
            instance="a",
            stores=clients,
            view=self.copies.view,
            streams=lambda: (S,),
            fence_of=lambda stream: fence,
            holder=lambda stream: "http://127.0.1.1:8080",
            audit=self.audit,
            clock=self.copies.clock,
        )

    async def records(self, salvager: Salvager | None = None, agent: str | None = None) -> list[SalvageRecord]:
        page = await (salvager or self.salvager()).page(HOME, self.name, 0, agent)
        assert (page.after, page.segments) == (0, 4)
        return list(page.records)

    async def discard(self, salvager: Salvager | None = None, **how: object) -> Discarded:
        given = {"execute": True, "confirm": HOME, "requester": "ada", "digest": "", "even_unexported": "", **how}
        return await (salvager or self.salvager()).discard(HOME, self.name, **given)  # type: ignore[arg-type]

    async def digest(self) -> str:
        lines = [receipt_line(r.seq, r.ordinal, r.agent, r.id, r.sha256, r.size) for r in await self.records()]
        return receipt(self.name, self.piece.last_chain, lines)

    def left(self) -> list[SegmentRef]:
        return [built.ref for built in self.tail if built.ref in self.store.objects]


@dataclass
class Struck(OpenGate):
    """Tells the stage of every call, before and after."""

    stage: Stage

    async def before(self, op: str) -> None:
        self.stage.gate(f"before {op}")

    async def after(self, op: str) -> None:
        self.stage.gate(f"after {op}")


async def test_each_record_says_whether_it_lies_elsewhere_and_what_is_newest_there(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    (home, near, far) = [one for region in REGIONS for one in await stage.salvager().list(region)]
    (piece,) = home.pieces
    assert piece.name == stage.name
    assert (piece.chain, piece.epochs, piece.by_epoch) == (stage.tail[-1].chain, stage.piece.epochs, 6)
    assert near.pieces == far.pieces == ()
    found = {(one.agent, one.id): one for one in await stage.records()}
    assert found.keys() == {(f"agent-{n}", name) for n in range(3) for name in ("e3s5", "e3s6", "e4s7")} | {
        ("both", "r1"),
        ("both", "r2"),
    }
    assert {one.state for one in found.values() if one.agent != "both"} == {"only"}
    assert (found["both", "r1"].state, found["both", "r2"].state) == ("live", "other")
    assert {one.latest for one in found.values()} == {"e6s8", "r2"}
    assert {one.agent for one in await stage.records(agent="agent-1")} == {"agent-1"}


async def test_bodies_are_whole_although_they_stand_on_the_live_history(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    salvager = stage.salvager()
    records = await stage.records(salvager)
    assert "delta" in {one.encoding for one in records if one.seq == 5}, "the first of the tail is against segment 4"
    for one in records:
        assert await salvager.body(HOME, stage.name, one.seq, one.ordinal) == stage.bodies[one.agent, one.id]
    for seq, ordinal in ((4, 0), (9, 0), (8, 2)):
        with pytest.raises(NotFound):
            await salvager.body(HOME, stage.name, seq, ordinal)


async def test_what_cannot_be_read_is_said_and_nothing_is_made_up(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.store.corrupt(stage.tail[1].ref, 900)
    page = await stage.salvager().page(HOME, stage.name, 0, None)
    assert [one.seq for one in page.damaged] == [6]
    assert 6 not in {one.seq for one in page.records}
    with pytest.raises(Corrupt):
        await stage.salvager().body(HOME, stage.name, 6, 0)
    with pytest.raises(DrError):  # segment 7 stands on segment 6
        await stage.salvager().body(HOME, stage.name, 7, 0)
    with pytest.raises(Refused, match="cannot be read"):
        await stage.discard(digest="ab" * 32)
    assert (await stage.discard(even_unexported="nobody wants it")).state == "done"


async def test_nothing_that_lies_only_there_goes_without_a_receipt_or_a_reason(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    digest = await stage.digest()
    dry = await stage.discard(execute=False, confirm="")
    assert (dry.state, dry.records, dry.lost, dry.agents, dry.digest) == ("would", 11, 10, 4, digest)
    for how, why in (
        ({}, "no export was shown"),
        ({"digest": "ab" * 32}, "is not what salvage"),
        ({"confirm": "eu"}, "confirm says"),
    ):
        with pytest.raises(Refused, match=why):
            await stage.discard(**how)
    with pytest.raises(NotActive) as told:
        await stage.discard(stage.salvager(epoch=0), digest=digest)
    assert told.value.active == "http://127.0.1.1:8080"
    with pytest.raises(Conflict, match="does not follow epoch 7"):
        await stage.discard(stage.salvager(epoch=7), digest=digest)
    assert stage.store.heads[S].salvage == (stage.piece,)
    assert len(stage.left()) == 4
    assert await stage.audit._newest() is None


async def test_a_store_that_has_not_caught_up_keeps_its_salvage(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    head = stage.store.heads[S]
    stage.store.heads[S] = replace(head, seq=4, chain=stage.copies.built(4).chain, epochs=head.epochs[:1])
    with pytest.raises(Conflict, match="too early"):
        await stage.discard(digest=await stage.digest())
    assert len(stage.left()) == 4
    assert stage.store.heads[S].salvage == (stage.piece,)


async def test_what_is_discarded_is_gone_audited_and_the_rest_is_whole(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    before = stage.store.heads[S]
    done = await stage.discard(digest=await stage.digest())
    assert (done.state, done.lost, done.deleted) == ("done", 10, 4)
    assert stage.left() == []
    assert stage.store.heads[S] == replace(before, salvage=())
    assert (await stage.discard()).state == "gone"
    entry = await stage.audit._newest()
    assert entry is not None
    assert (entry.n, entry.actor, entry.action, entry.subject) == (1, "ada", "discard salvage", HOME)
    assert entry.detail["lost"] == 10
    assert entry.detail["digest"] == done.digest
    assert whole(await stage.copies.verify())
    with pytest.raises(NotFound):
        await stage.records()


class Died(BaseException):
    """The controller ends at this call."""


async def test_a_discard_that_dies_at_any_call_is_finished_by_repeating_it(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(salvaging, "DELETED_AT_ONCE", 1)
    at, said = 0, set()
    while True:
        stage = Stage(tmp_path_factory.mktemp("crash"))
        digest = await stage.digest()
        calls: list[str] = []

        def strike(op: str, calls: list[str] = calls, at: int = at) -> None:
            calls.append(op)
            if len(calls) == at + 1:
                raise Died(op)

        stage.gate = strike
        try:
            await stage.discard(digest=digest)
        except Died as died:
            said.add(str(died))
        else:
            break
        stage.gate = lambda op: None
        if stage.piece in stage.store.heads[S].salvage:
            assert len(stage.left()) == 4, "objects go only after the head"
        again = await stage.discard(digest=digest)  # another life of the controller: nothing is remembered
        assert again.state in ("done", "gone")
        assert stage.left() == []
        assert stage.store.heads[S].salvage == ()
        assert whole(await stage.copies.verify())
        at += 1
    assert {f"{when} {op}" for when in ("before", "after") for op in ("forget_salvage", "delete_diverged", "read_head")} <= said
    assert at > 20


async def test_leftovers_are_proven_by_the_chain_and_a_strangers_objects_stay(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stranger = SegmentRef(S, 6, 2)
    stage.store.put(stranger, b"put by somebody, never committed")
    stage.store.heads[S] = replace(stage.store.heads[S], salvage=())
    assert (await stage.discard(stage.salvager(epoch=0), execute=False)).state == "would"
    stage.store.drop(stage.tail[0].ref)
    assert (await stage.discard()).deleted == 3
    assert stage.left() == []
    assert stranger in stage.store.objects


async def test_a_name_that_no_salvage_has_is_not_found_and_a_silent_store_is_unknown(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    for name in ("nonsense", f"9{stage.name}", "0.5-8", stage.name.upper(), "x" * 300):
        with pytest.raises(NotFound):
            await stage.salvager().page(HOME, name, 0, None)
    with pytest.raises(NotFound, match="there is no region"):
        await stage.salvager().list("mars")

    def silent(op: str) -> None:
        raise Unavailable("no answer")

    stage.gate = silent
    (found,) = await stage.salvager().list(HOME)
    assert (found.pieces, found.unknown) == ((), "no answer")
