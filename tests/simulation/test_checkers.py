"""Checkers are tested, too: each of these stories has a mutant that only one kind of checker can notice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from controller.adapters import head_rules
from controller.adapters.memory.region_store import MemoryRegionStore
from controller.adapters.memory.traffic import MemoryTraffic
from controller.adapters.record_sets import Change
from controller.domain import lease, replication
from controller.domain.lease import Heartbeat, Verdict
from controller.domain.model import Authority, Commit, Fence, Head, Holder, Realignment, SegmentRef
from controller.domain.promotion import PlanRecord, State
from controller.errors import DrError
from controller.ports import RegionStore, TrafficState
from controller.runtime import tenure
from controller.runtime.documents import Seen
from controller.runtime.takeover import Takeover
from controller.stream import pump as pumping
from controller.stream.batcher import Queue
from controller.stream.log import Log
from controller.stream.pump import Pump, Upstream
from tests.simulation import bounds
from tests.simulation.chaos import recover_etcd
from tests.simulation.test_guards import (
    ADA,
    GRACE,
    NO_WAIT,
    Case,
    Patch,
    a_region_is_lost_behind_cut_links,
    a_switchover,
    judge,
    patched,
    silent,
    store,
)
from tests.simulation.world import ETCD, HOME, TARGET, THIRD, World

# -------------------------------------------------------------------------------------------------------------- stories


async def the_holder_dies_while_it_writes(world: World) -> None:
    """Its stores answer slowly; it dies between two calls, again and again."""
    await world.served(agents=6)
    for number in range(6):
        active = (world.actives() or [await world_serves(world)])[0]
        for region in (HOME, TARGET, THIRD):
            world.slow[active.key, region] = 0.3
        await world.wait(2.0 + 0.17 * number)
        await world.kill(active.region, active.name)
        world.slow.clear()
        world.start(active.region, active.name)
        await world_serves(world)


async def world_serves(world: World) -> Any:
    await world.until(lambda: bool(world.actives()), 30, "somebody serving")
    return world.actives()[0]


async def etcd_is_restored_and_a_person_confirms(world: World) -> None:
    """After the recovery the group must serve again, with epochs above all that the stores know."""
    await world.found()
    snapshot = world.cluster.snapshot()
    world.start_all()
    await world.until(lambda: len(world.actives()) == 1, 20, "one active controller")
    world.fleet(2)
    await world.wait(50.0)
    await world.kill(HOME, world.actives()[0].name)
    await world.until(lambda: bool(world.actives()), 30, "the neighbour serving")
    await world.wait(1.0)
    for instance in list(world.instances.values()):
        await world.kill(instance.region, instance.name)
    world.cluster.restore(snapshot)
    world.history.restored = True
    world.start_all()
    await world.wait(3.0)
    await recover_etcd(world, lambda what: None)
    await bounds.progress(world, 15.0)


async def a_signature_expires_before_the_plan_starts(world: World) -> None:
    """Both signatures were good when the plan was ordered; nobody of the target ran then."""
    await world.served()
    document = await world.propose("failover", TARGET)
    for name in ("a", "b"):
        await world.kill(TARGET, name)
    controller = world.standby(THIRD)
    await world.approve(controller, document, ADA)
    await world.approve(controller, document, GRACE, seconds=15.0)
    await controller.execute(document.record.plan.id, "oncall", TARGET)
    await world.wait(20.0)
    world.start(TARGET, "a")
    await world.wait(12.0)


async def the_region_in_authority_is_silent(world: World) -> None:
    await world.served()
    for name in ("a", "b"):
        await world.kill(HOME, name)
    await silent(world)
    await world.wait(6.0)


async def a_lost_region_comes_back_with_a_tail(world: World) -> None:
    """What only its store had is cut off, and listed as salvage."""
    await a_region_is_lost_behind_cut_links(world)
    world.bring_back(HOME)
    await bounds.progress(world, 60.0)


async def agents_write_faster_than_any_store(world: World) -> None:
    world.changes["stream"] = {"queue_max_bytes": 64 * 1024, "segment_max_bytes": 16 * 1024}
    bounds.gauge_queues(world)
    await world.served()
    for region in (HOME, TARGET, THIRD):
        world.cut(region)
    for number in range(400):
        world.spawn(world.put(f"eager-{number}", "1", world.rng.randbytes(2048)))
    await world.wait(3.0)


async def agents_keep_writing_while_no_store_answers(world: World) -> None:
    """Each wave fits into the queue, and nothing leaves the log."""
    world.changes["stream"] = {"queue_max_bytes": 64 * 1024, "segment_max_bytes": 16 * 1024}
    bounds.gauge_queues(world)
    await world.served()
    for region in (HOME, TARGET, THIRD):
        world.cut(region)
    for wave in range(30):
        for number in range(10):
            world.spawn(world.put(f"steady-{wave}-{number}", "1", world.rng.randbytes(2048)))
        await world.wait(0.2)


async def a_move_is_called_off_and_the_holder_dies(world: World) -> None:
    """The old holder cannot drain; the plan is aborted; the next instance of the region must be able to acquire."""
    await world.served()
    document = await world.propose("switchover", TARGET)
    world.isolate_stores_of(HOME)
    await world.wait(1.0)
    plan = await world.let_run(document)
    await world.reached(plan, State.ABORTED)
    world.isolate_stores_of(HOME, cut=False)
    await world.wait(2.0)
    for active in world.actives():
        await world.kill(active.region, active.name)
    await bounds.progress(world, 60.0)


async def the_home_store_is_the_slowest(world: World) -> None:
    """One other store is quicker, and nobody recorded that it may acknowledge alone."""
    active = await world.served()
    world.cut(THIRD)
    world.slow[active.key, HOME] = 0.8
    await world.wait(2.5)


async def only_the_home_store_answers(world: World) -> None:
    """No store dies: only whoever asks what a loss *would* cost can notice that copies were promised that are not there."""
    await world.served()
    world.isolate_stores_of(HOME)
    await world.wait(2.5)


async def agents_write_for_a_while(world: World) -> None:
    await world.served(agents=8)
    await world.wait(20.0)
    await bounds.progress(world, 30.0)


async def the_holder_s_etcd_is_slow_and_then_gone(world: World) -> None:
    """Keep-alives arrive long before their answers. A heartbeat takes 3.6 s of the 4 s that it may take."""
    active = await world.served()
    world.slow[active.key, ETCD] = 0.6
    await world.wait(11.3)
    world.cut(ETCD, active.key)
    await world.wait(12.0)


# -------------------------------------------------------------------------------------------------------------- mutants


class PointerFirst(MemoryRegionStore):
    """Commits the head and writes the object afterwards."""

    _held: tuple[tuple[Fence, SegmentRef, bytes], ...] = ()

    async def put_segment(self, fence: Fence, ref: SegmentRef, data: bytes) -> None:
        self._held = (*self._held, (fence, ref, data))

    async def advance(self, fence: Fence, commit: Commit) -> Head:
        held, self._held = self._held, ()
        head = await super().advance(fence, commit)
        for put in held:
            await super().put_segment(*put)
        return head


class ForgetfulRealign(MemoryRegionStore):
    """Cuts a diverged tail off and does not write down that it did."""

    async def realign(self, fence: Fence, expected: Head, to: Realignment) -> Head:
        cut = replace(to, salvage=None)
        return await self._update(
            "realign",
            fence,
            lambda head: head_rules.settled_realign(head, fence, expected, cut),
            lambda head: head_rules.after_realign(head, fence, cut),
        )


class EmptyFirst(MemoryTraffic):
    """Takes the old region out of the name in one batch, and puts the new one in with the next."""

    async def change(self, fence: Fence, expected: TrafficState, weights: Mapping[str, int]) -> str:
        change = await super().change(fence, expected, expected.weights)
        if dict(weights) != dict(expected.weights):
            for values in (dict.fromkeys(weights, 0), weights):
                records = [record for record in self._zone.records(self.name) if record["Type"] == "A"]
                change = self._zone.apply(
                    [Change("UPSERT", {**record, "Weight": values[record["SetIdentifier"]]}) for record in records]
                )
        return change


def empty_first(patch: Patch, world: World) -> None:
    world.traffic_class = EmptyFirst


def epoch_from_the_revision(patch: Patch, world: World) -> None:
    """The fencing token is etcd's revision, as in many lock recipes."""
    original = tenure.document

    def document(item: Any, kind: type[Any]) -> Any:
        found = original(item, kind)
        return None if found is None else Seen(replace(found.value, epoch=world.cluster.revision), found.item)

    patch.setattr(tenure, "document", document)


def barrier_without_approvals(patch: Patch, world: World) -> None:
    original = Takeover._approved

    async def approved(self: Takeover, record: PlanRecord) -> Any:
        return ([], (), "") if record.state is State.AWAITING_APPROVAL else await original(self, record)

    patch.setattr(Takeover, "_approved", approved)


def anybody_acquires(authority: Seen[Authority] | None, holder: Holder | None, region: str, floor: int) -> str | None:
    return None if authority is not None and holder is None else "somebody holds it"


def always_room(queue: Queue, weights: Sequence[int], bound: int) -> str | None:
    """``lacks_room`` without its bounds."""
    return None


def never_full(log: Log) -> str | None:
    """``full`` without its bounds."""
    return None


async def skip_the_third(pump: Pump, store: RegionStore, up: Upstream, depth: int) -> None:
    """Believes that a store has what it was never sent."""
    if pump.region != THIRD:
        await SHIP(pump, store, up, depth)
        return
    assert pump.head is not None
    pump.head = replace(pump.head, seq=up.seq, chain=up.chain_at(up.seq) or pump.head.chain)
    up.committed(pump)


SHIP = pumping._ship


def counted_from_the_answer(patch: Patch, world: World) -> None:
    """The right runs from when the keep-alive's answer came, and without a margin; and a successor, who otherwise waits for
    what a key that vanished early leaves behind, does not. The two back each other."""
    patch.setattr(*NO_WAIT)
    original = lease.judge

    def judged(seen: Heartbeat, *, granted_ttl_seconds: float, margin_seconds: float, drained: bool) -> Verdict:
        answered = replace(seen, sent_at=world.clock.monotonic())
        return original(answered, granted_ttl_seconds=granted_ttl_seconds, margin_seconds=0.0, drained=drained)

    patch.setattr(lease, "judge", judged)


async def keep_the_tail(store: Any, fence: Fence, head: Head, *rest: object) -> Head:
    return head


CASES = (
    Case("pointer-before-payload", the_holder_dies_while_it_writes, store(PointerFirst), "stores-whole"),
    Case("cut-without-salvage", a_lost_region_comes_back_with_a_tail, store(ForgetfulRealign), "stores-whole"),
    Case("epoch-from-the-revision", etcd_is_restored_and_a_person_confirms, epoch_from_the_revision, "progress"),
    Case(
        "barrier-without-approvals", a_signature_expires_before_the_plan_starts, barrier_without_approvals, "barrier-approved"
    ),
    Case(
        "acquire-without-authority",
        the_region_in_authority_is_silent,
        patched(
            ("controller.runtime.tenure", "may_acquire", anybody_acquires),
            ("controller.runtime.duty", "may_acquire", anybody_acquires),
        ),
        "epochs-unique",
    ),
    Case(
        "queues-without-bound",
        agents_write_faster_than_any_store,
        patched((Queue, "lacks_room", always_room)),
        "queues-bounded",
    ),
    Case("log-without-bound", agents_keep_writing_while_no_store_answers, patched((Log, "full", never_full)), "queues-bounded"),
    Case(
        "barrier-stays-after-an-abort",
        a_move_is_called_off_and_the_holder_dies,
        patched(("controller.runtime.planning.sweep_barrier", "", lambda *_: no_sweep())),
        "progress",
    ),
    Case(
        "any-store-acknowledges-alone",
        the_home_store_is_the_slowest,
        patched((replication, "acknowledged", lambda copies, committed, sole: len(set(committed)) >= copies)),
        "copies-committed",
    ),
    Case(
        "copies-not-counted",
        only_the_home_store_answers,
        patched((replication, "acknowledged", lambda copies, committed, sole: bool(committed))),
        "survives-one-region",
    ),
    Case("a-store-is-skipped", agents_write_for_a_while, patched((pumping, "_ship", skip_the_third)), "stores-are-prefixes"),
    Case("name-emptied-first", a_switchover, empty_first, "dns-safe"),
    Case("right-counted-from-the-answer", the_holder_s_etcd_is_slow_and_then_gone, counted_from_the_answer, "one-active"),
    Case(
        "diverged-store-not-cut-back",
        a_lost_region_comes_back_with_a_tail,
        patched((pumping, "cut_back", keep_the_tail)),
        "progress",
    ),
)


async def no_sweep() -> None:
    return None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_checker_notices_what_only_it_can_see(case: Case, keys_dir: Path, monkeypatch: Patch) -> None:
    found, ended = judge(keys_dir, case, None)
    assert ended is None or isinstance(ended, DrError), f"the correct build does not play this story: {ended!r}"
    assert found == {}, "the correct build breaks a promise"
    found, ended = judge(keys_dir, case, monkeypatch)
    assert case.checker in found, f"{case.name} was not caught: {found or ended!r}"


def test_the_table_in_the_readme_lists_every_checker_and_every_mutant_of_this_file() -> None:
    text = (Path(__file__).parent / "README.md").read_text()
    for name in [*(case.name for case in CASES), *(case.checker for case in CASES)]:
        assert f"`{name}`" in text, name
