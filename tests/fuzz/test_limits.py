"""Sizes at and over the limits of AWS and etcd: how far documents can grow, and that what must still work there does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import pytest

from controller.adapters import head_rules
from controller.adapters.head_item import ITEM_GUARD_BYTES, ITEM_MAX_BYTES, head_from_item, head_to_item, item_bytes
from controller.adapters.memory.gate import OpenGate
from controller.adapters.memory.region_store import MemoryRegionStore, MemoryStore
from controller.adapters.memory.traffic import MemoryTraffic, MemoryZone
from controller.adapters.transactions import MAX_REQUEST_BYTES, transaction_bytes
from controller.domain.lag import combine
from controller.domain.model import AgentTail, Commit, EpochStart, Fence, Head, Realignment, Salvage
from controller.domain.plan import AgentLoss, HeadSeen, Loss
from controller.domain.promotion import PlanRecord, State
from controller.errors import Refused
from controller.lab.virtual_time import run_virtual
from controller.ports import Put
from controller.runtime.documents import encode
from controller.stream.limits import DEFAULT_LIMITS
from tests.support.fake_service import make_plan

CHAIN = "ab" * 32
LARGE = 10**15
REGION = "eu-west-1"


def size_of(head: Head) -> int:
    return item_bytes(head_to_item(" " * 200, head))


def with_salvage(count: int, epochs: int) -> Head:
    """A head after ``count`` diverged tails, each written by ``epochs`` epochs. Numbers as long as they can be."""
    starts = tuple(EpochStart(LARGE + n, LARGE + n) for n in range(epochs))
    cut = Salvage(LARGE, LARGE + 1, starts, CHAIN, LARGE)
    return Head("s00", LARGE, LARGE, CHAIN, salvage=(cut,) * count, base_chain=CHAIN, writer=f"{REGION}/a/{LARGE}")


def with_epochs(count: int) -> Head:
    return Head("s00", LARGE, LARGE, CHAIN, tuple(EpochStart(LARGE + n, LARGE + n) for n in range(count)), base_chain=CHAIN)


def many_salvages(count: int) -> Head:
    return with_salvage(count, 1)


@cache
def greatest(make: Callable[[int], Head]) -> int:
    """The greatest number for which ``make(number)`` is not refused."""
    low, high = 1, 10_000
    while high - low > 1:
        middle = (low + high) // 2
        try:
            head_rules.check_size(make(middle), REGION)
            low = middle
        except Refused:
            high = middle
    return low


def test_a_head_carries_more_than_a_thousand_salvages_and_six_thousand_epochs() -> None:
    """A tail is cut off by a failover at most, an epoch begins with a restart: with a failover a week and ten restarts a day
    the first bound is reached after 20 years, the second after two (if retention never moved the base)."""
    assert greatest(many_salvages) > 1_000
    assert greatest(with_epochs) > 6_000


def test_a_head_that_is_as_large_as_it_may_become_comes_back_from_its_item() -> None:
    head = with_epochs(greatest(with_epochs))
    item = head_to_item("g", head)
    assert ITEM_GUARD_BYTES - 200 < size_of(head) <= ITEM_GUARD_BYTES < ITEM_MAX_BYTES
    assert head_from_item("s00", item) == head


def full_store(head: Head) -> tuple[MemoryStore, MemoryRegionStore]:
    server = MemoryStore(REGION)
    server.heads["s00"] = head
    return server, MemoryRegionStore(server, OpenGate())


@pytest.mark.parametrize("kind", ["salvage", "epochs"])
def test_a_full_head_is_still_fenced_and_advanced_and_only_what_makes_it_longer_is_refused(kind: str) -> None:
    full = many_salvages(greatest(many_salvages)) if kind == "salvage" else with_epochs(greatest(with_epochs))
    full = replace(full, seq=100, epoch=7, writer=f"{REGION}/a/7")
    server, store = full_store(full)
    assert size_of(full) > ITEM_GUARD_BYTES - 400

    async def story() -> None:
        fence = Fence("s00", LARGE * 9, REGION, "an-instance-with-a-much-longer-name-than-before")
        head = await store.fence(fence)  # the old writer is shut out, however full the head is
        assert head.epoch == fence.epoch
        commit = Commit(100, CHAIN, 101, "cd" * 32, (), 1.0, 10**9, 10**15)
        assert (await store.advance(fence, commit)).seq == 101
        if kind == "epochs":
            start = EpochStart(fence.epoch, 102)
            with pytest.raises(Refused, match="we stop at"):
                await store.advance(fence, Commit(101, "cd" * 32, 102, CHAIN, (start,), 1.0, 1, 1))
        else:
            cut = Salvage(101, 101, (EpochStart(7, 101),), CHAIN, fence.epoch)
            now = server.head("s00")
            with pytest.raises(Refused, match="we stop at"):
                await store.realign(fence, now, Realignment(100, CHAIN, now.base, now.base_chain, now.epochs, cut))
        assert server.head("s00").seq == 101

    run_virtual(story())


# -------------------------------------------------------------------------------------------------------------------- etcd


def worst_name(characters: int) -> str:
    """As many bytes as a name of this length can have in JSON."""
    return "\U0010ffff" * characters


def test_a_plan_that_would_lose_a_hundred_thousand_agents_fits_into_etcd_many_times() -> None:
    """The evidence names the twenty worst agents of all streams, however many there are and whatever they are called."""
    streams, regions = 64, 5
    tails = [
        AgentTail(worst_name(DEFAULT_LIMITS.agent_chars - 6) + f"{n:06d}", 2**40, worst_name(DEFAULT_LIMITS.id_chars), 1.0)
        for n in range(100_000 // streams)
    ]
    losses = [
        Loss(False, 10**9, True, 1e9, "b" * 300, tuple(AgentLoss(tail.agent, tail.records, tail.last_id) for tail in tails))
        for _ in range(streams)
    ]
    plan = make_plan()
    heads = tuple(
        HeadSeen(f"region-{r}", f"s{n:02d}", LARGE, LARGE, LARGE, CHAIN, 1e9) for r in range(regions) for n in range(streams)
    )
    forks: Mapping[str, tuple[EpochStart, ...]] = {
        f"s{n:02d}": tuple(EpochStart(LARGE + e, LARGE + e) for e in range(50)) for n in range(streams)
    }
    evidence = replace(plan.evidence, loss=combine(losses), heads=heads, forks=forks, agents=100_000)
    record = PlanRecord(
        replace(plan, evidence=evidence), "d" * 64, State.AWAITING_APPROVAL, 1.0, "waiting", final_loss=combine(losses)
    )
    size = transaction_bytes([], [Put("/dr/group/plans/" + "x" * 80, encode(record))], [])
    assert size * 2 < MAX_REQUEST_BYTES, size


# ---------------------------------------------------------------------------------------------------------------- Route 53


@pytest.mark.parametrize(("weight", "allowed"), [(1, True), (255, True), (0, False), (256, False), (-1, False), (2**63, False)])
def test_weights_at_and_over_their_bounds(weight: int, allowed: bool) -> None:
    async def story() -> None:
        zone = MemoryZone("agents.dr.example.")
        zone.provision({"one": ["127.0.1.1"], "two": ["127.0.2.1"]}, {"one": 255, "two": 0})
        traffic = MemoryTraffic(zone, ["one", "two"])
        seen = await traffic.read()
        fence = Fence("s00", 1, "two", "a")
        if allowed:
            await traffic.change(fence, seen, {"one": 0, "two": weight})
            return
        with pytest.raises(Refused):
            await traffic.change(fence, seen, {"one": 0, "two": weight})
        assert (await traffic.read()) == seen

    run_virtual(story())


@pytest.mark.parametrize(("addresses", "allowed"), [(100, True), (400, False)])
def test_a_region_with_more_addresses_than_a_batch_may_hold_is_refused_and_nothing_moves(addresses: int, allowed: bool) -> None:
    """Every address is deleted and created anew, in two regions."""

    async def story() -> None:
        zone = MemoryZone("agents.dr.example.")
        many = [f"10.0.{n // 250}.{n % 250 + 1}" for n in range(addresses)]
        zone.provision({"one": many, "two": many}, {"one": 100, "two": 0})
        traffic = MemoryTraffic(zone, ["one", "two"])
        seen = await traffic.read()
        if allowed:
            await traffic.change(Fence("s00", 1, "two", "a"), seen, {"one": 0, "two": 100})
            assert (await traffic.read()).weights == {"one": 0, "two": 100}
            return
        with pytest.raises(Refused, match="records"):
            await traffic.change(Fence("s00", 1, "two", "a"), seen, {"one": 0, "two": 100})
        assert (await traffic.read()) == seen

    run_virtual(story())
