"""Each guard of retention removed once: the build with it plays the story without a violation, the one without it is caught."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from controller.adapters import head_rules
from controller.adapters.memory.gate import FaultGate
from controller.adapters.memory.region_store import MemoryRegionStore
from controller.domain import retention as rules
from controller.domain.model import Head, SnapshotRef
from controller.errors import DrError
from controller.lab.virtual_time import run_virtual
from controller.runtime.retention import Retention
from controller.stream import follower as follower_module
from controller.stream import snapshot as snapshot_module
from controller.stream.admission import Admission
from controller.stream.follower import Follower
from controller.stream.keeping import Keeping
from controller.stream.snapshot import SnapshotHeader
from controller.stream.view import View
from tests.support.keeping import FAR, GROUP, HOME, NEAR, REGIONS, STREAM, World
from tests.unit.test_retention import body, busy, rounds

Story = Callable[[type[Retention]], Coroutine[Any, Any, None]]


class MovesEarly(Retention):
    """Guard removed: a store's base moves only when the carried-forward frames are committed in that store."""

    async def _move(self) -> str | None:
        self._goal = replace(self._goal, sealed=self._goal.base - 1)
        return await super()._move()


class DeletesFirst(Retention):
    """Guard removed: the head's base moves before anything is deleted."""

    async def _set_base(self, region: str, goal: Any) -> None:
        head = await self._stores[region].read_head(self._stream)
        self._writer.moved_base(region, replace(head, base=goal.base, base_chain=goal.chain))

    async def _sweep(self, place: Any) -> str:
        store = self._stores[place.region]
        refs = [ref for ref in await store.list_segments(self._stream, 1, 1000) if ref.seq < place.base]
        await store.delete_segments(self._fence, refs)
        self._swept[place.region] = place.base
        return ""


async def behind(kind: type[Retention]) -> None:
    """One store stops taking segments just before live records are carried forward."""
    world = World(kind=kind)
    holder = await world.open()
    assert await world.put(holder, "once", "only", body("once", 1))
    await busy(world, holder, 2, 12, pause=world.policy.round_seconds)
    await world.settled(holder)
    world.held.add(f"{FAR}.put_segment")
    for _ in range(80):
        await holder.step()
        await world.wait(0.1)
    assert world.head(NEAR).base > 1
    await world.check_whole(FAR)
    assert (await world.cold(FAR)).latest("once") is not None, "the store that was behind lost an agent"


async def ordinary(kind: type[Retention]) -> None:
    world = World(kind=kind)
    holder = await world.open()
    assert await world.put(holder, "once", "only", body("once", 1))
    await rounds(world, holder, 14)
    await world.settled(holder)
    for region in REGIONS:
        await world.check_restorable(region)


async def diverged(kind: type[Retention]) -> None:
    """A tail that was cut off is older than retention."""
    world = World(kind=kind)
    holder = await world.open()
    await busy(world, holder, 2, 3)
    await world.settled(holder)
    world.gates[FAR].cut = world.gates[NEAR].cut = True
    await world.put(holder, "cut-off", "1", b"lost")
    await holder.kill()
    world.gates[FAR].cut = world.gates[NEAR].cut = False
    world.gates[HOME].cut = True
    second = await world.open(NEAR)
    world.gates[HOME].cut = False
    await rounds(world, second, 20, first=3)
    await world.settled(second)
    assert world.head(HOME).salvage
    assert world.head(HOME).base > 20
    await world.check_whole(HOME)


async def late_delta(kind: type[Retention]) -> None:
    """A delta on an old record arrives after the last look for such deltas and before the base moves."""
    world = World(kind=kind)
    holder = await world.open()
    old = b"an old state " * 100
    assert await world.put(holder, "sleepy", "1", old)
    assert await world.put(holder, "sleepy", "2", b"a newer state", delta=False)
    await busy(world, holder, 2, 12, pause=world.policy.round_seconds)
    await world.settled(holder)
    while True:
        said = await holder.step()
        await asyncio.sleep(0.01)
        if said and "may move" in said:
            break
    world.expected["sleepy"] = ("1", old)  # the agent goes back to its old state
    assert await world.put(holder, "sleepy", "3", old + b"and on")
    await world.settled(holder)
    await world.steps(holder, 60)
    await busy(world, holder, 1, 3, first=100)
    await world.settled(holder)
    assert world.head(FAR).base > 3
    for region in REGIONS:
        await world.check_restorable(region)


def no_check(head: Head, fence: Any, refs: Any) -> None:
    """The far side's own check, which backs the client's."""


def without_far_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_rules, "check_deletable", no_check)


def without_salvage(monkeypatch: pytest.MonkeyPatch) -> None:
    without_far_check(monkeypatch)
    monkeypatch.setattr(rules, "deletable", lambda head, refs: tuple(ref for ref in refs if ref.seq < head.base))


def without_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keeping, "bases_before", lambda self, base, after, limit: ([], after + limit))


def without_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keeping, "live_before", lambda self, agent, name, base: [])


def without_admission_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Admission, "_check_base", lambda self, agent, base, seq: None)


def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """For mutants that are a class."""


MUTANTS: dict[str, tuple[Story, type[Retention], Callable[[pytest.MonkeyPatch], None]]] = {
    "base-moves-before-carried-frames-are-there": (behind, MovesEarly, nothing),
    "objects-go-before-the-base-moved": (ordinary, DeletesFirst, without_far_check),
    "salvage-is-deleted": (diverged, Retention, without_salvage),
    "bases-of-deltas-are-not-carried": (ordinary, Retention, without_bases),
    "live-records-are-not-carried": (ordinary, Retention, without_live),
    "deltas-on-old-records-are-taken": (late_delta, Retention, without_admission_guard),
}


@pytest.mark.parametrize("story", [behind, ordinary, diverged, late_delta])
def test_the_build_with_its_guards_plays_every_story(story: Story) -> None:
    run_virtual(story(Retention), limit_seconds=100_000)


@pytest.mark.parametrize("name", sorted(MUTANTS))
def test_a_build_without_the_guard_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    story, kind, remove = MUTANTS[name]
    remove(monkeypatch)
    with pytest.raises((AssertionError, DrError)):
        run_virtual(story(kind), limit_seconds=100_000)


def test_the_far_side_refuses_what_a_client_without_its_guard_would_delete() -> None:
    async def story() -> None:
        world = World(kind=DeletesFirst)
        holder = await world.open()
        await busy(world, holder, 2, 12, pause=world.policy.round_seconds)
        said = await world.steps(holder, 60)
        assert any("is kept" in text for text in said), said
        for region in REGIONS:
            await world.check_restorable(region)

    run_virtual(story(), limit_seconds=100_000)


# ------------------------------------------------------------------------------------------------------ snapshot's hash


def forged(data: bytes) -> bytes:
    """The same snapshot with an agent by another name, and a right checksum of its own."""
    body = len(data) - 32
    (length,) = snapshot_module._LENGTH.unpack_from(data, 8)
    header = msgspec.msgpack.decode(data[12 : 12 + length], type=SnapshotHeader)
    pages = []
    at = 12 + length
    while at < body:
        (size,) = snapshot_module._LENGTH.unpack_from(data, at)
        table, rows = msgspec.msgpack.decode(snapshot_module.zstd.decompress(data[at + 4 : at + 4 + size]))
        if table == snapshot_module.RECORDS:
            rows = [["nobody", *row[1:]] if row[0] == "once" else row for row in rows]
        pages.append(snapshot_module.zstd.compress(msgspec.msgpack.encode((table, rows))))
        at += 4 + size
    return snapshot_module._seal(header, pages)


@pytest.mark.parametrize("guarded", [True, False])
def test_a_snapshot_whose_hash_is_not_compared_with_the_heads_is_believed_and_so_it_is_compared(
    guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower_module, "SNAPSHOT_SEGMENTS", 3)
    if not guarded:
        opened = follower_module.open_snapshot

        def unguarded(data: bytes, named: Any, group: str, stream: str) -> Any:
            return opened(data, replace(named, sha256=hashlib.sha256(data).hexdigest()), group, stream)

        monkeypatch.setattr(follower_module, "open_snapshot", unguarded)

    async def story() -> None:
        world = World(snapshot_seconds=10.0)
        holder = await world.open()
        assert await world.put(holder, "once", "only", body("once", 1))
        await busy(world, holder, 2, 12, pause=2.0)
        await world.settled(holder)
        await world.steps(holder, 40, pause=0.01)
        server = world.servers[FAR]
        named = world.head(FAR).snapshots[-1]
        ref = SnapshotRef(STREAM, named.seq, named.epoch)
        server.corrupt_snapshot(ref, forged(server.snapshots[ref].data))
        view = View(None)
        follower = Follower(MemoryRegionStore(server, FaultGate(world.clock.sleep)), view, STREAM, world.clock, GROUP)
        for _ in range(50):
            try:
                await follower.step(200)
            except Exception:  # noqa: BLE001 - whatever a believed forgery leads to
                break
        right = view.record("once", "only") is not None and view.record("nobody", "only") is None
        assert right is guarded

    run_virtual(story(), limit_seconds=100_000)
