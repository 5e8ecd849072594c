"""What every ``Traffic`` promises, asked of the one in memory and of Route 53's client in front of a stand-in.

The last parts are for one of them: lost and late messages (memory, in virtual time) and odd answers of the provider (a
proxy in front of the stand-in). An unguarded variant shows that the checker notices what the compare-and-set prevents.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import boto3
import httpx
import pytest
import stamina
from botocore.exceptions import CredentialRetrievalError

from controller.adapters.memory.gate import FaultGate, OpenGate
from controller.adapters.memory.traffic import MemoryTraffic, MemoryZone
from controller.adapters.record_sets import Change, RecordSet, check_quotas, epoch_name, plan_batch, values_of
from controller.adapters.route53 import Route53Traffic
from controller.adapters.traffic import CompareAndSetTraffic
from controller.domain.model import Fence
from controller.errors import Conflict, DrError, FenceLost, Misconfigured, NotFound, OutcomeUnknown, Refused, Unavailable
from controller.lab.aws import AwsStandIn, provision_zone
from controller.lab.virtual_time import run_virtual
from controller.ports import TrafficState

NAME = "agents.dr.example."
APEX = "dr.example."
EU, DE, US = REGIONS = ("eu-west-1", "eu-central-1", "us-east-1")
ADDRESSES = {EU: ["127.0.1.2", "127.0.1.1"], DE: ["127.0.2.1"], US: ["127.0.3.1"]}
HOME = {EU: 100, DE: 0, US: 0}
TO_DE = {EU: 0, DE: 100, US: 0}
TO_US = {EU: 0, DE: 0, US: 100}


def fence(epoch: int, region: str = DE, instance: str = "a") -> Fence:
    return Fence(stream="s0", epoch=epoch, region=region, instance=instance)


def txt(value: str, **rest: Any) -> RecordSet:
    return {"Name": epoch_name(NAME), "Type": "TXT", "TTL": 5, "ResourceRecords": [{"Value": value}], **rest}


def address(**fields: Any) -> RecordSet:
    values = [{"Value": "127.0.9.9"}]
    record = {"Name": NAME, "Type": "A", "SetIdentifier": EU, "Weight": 1, "TTL": 5, "ResourceRecords": values}
    return {key: value for key, value in (record | fields).items() if value is not None}


# ----------------------------------------------------------------------------------------------------------- two worlds


class World(ABC):
    """One zone at one provider, with the fence TXT at epoch 3 and all traffic in the home region."""

    @abstractmethod
    def traffic(self, **options: Any) -> CompareAndSetTraffic: ...

    @abstractmethod
    def unguarded(self) -> CompareAndSetTraffic: ...

    @abstractmethod
    def apply(self, *changes: tuple[str, RecordSet]) -> None:
        """What somebody else does to the zone."""

    @abstractmethod
    def records(self) -> list[RecordSet]: ...

    def record(self, rtype: str, region: str = "") -> RecordSet:
        found = [r for r in self.records() if r["Type"] == rtype and r.get("SetIdentifier", "") == region]
        assert len(found) == 1, found
        return found[0]


class Unguarded(CompareAndSetTraffic):
    """What many tools do: write without comparing. Here to show that the checker sees the difference."""

    def _batch(self, fence: Fence, expected: TrafficState, weights: Mapping[str, int]) -> tuple[Change, ...]:
        batch = plan_batch(self.name, expected, weights, fence.epoch, 5)
        return tuple(Change("UPSERT", change.record) for change in batch if change.action == "CREATE")


class UnguardedMemory(Unguarded, MemoryTraffic):
    pass


class UnguardedRoute53(Unguarded, Route53Traffic):
    pass


class MemoryWorld(World):
    def __init__(self) -> None:
        self.zone = MemoryZone(NAME, apex=APEX)
        self.zone.provision(ADDRESSES, HOME)
        self.zone.apply([Change("CREATE", txt('"3"'))], at=float("-inf"))

    def traffic(self, **options: Any) -> MemoryTraffic:
        options.pop("page_size", None)
        return MemoryTraffic(self.zone, REGIONS, OpenGate(), **options)

    def unguarded(self) -> UnguardedMemory:
        return UnguardedMemory(self.zone, REGIONS, OpenGate())

    def apply(self, *changes: tuple[str, RecordSet]) -> None:
        self.zone.apply([Change(action, record) for action, record in changes])

    def records(self) -> list[RecordSet]:
        return [*self.zone.records(NAME), *self.zone.records(epoch_name(NAME))]


class Route53World(World):
    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.zone_id = provision_zone(endpoint, APEX, NAME, ADDRESSES, HOME, 3, 5)
        self.made: list[Route53Traffic] = []
        session = boto3.session.Session(aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1")
        self.client: Any = session.client("route53", endpoint_url=endpoint)

    def traffic(self, **options: Any) -> Route53Traffic:
        return self._make(Route53Traffic, **options)

    def unguarded(self) -> Route53Traffic:
        return self._make(UnguardedRoute53)

    def _make(self, kind: type[Route53Traffic], **options: Any) -> Route53Traffic:
        # Generous: several test runs may share two slow cores; deadlines have tests of their own.
        settings: dict[str, Any] = {"name": NAME, "endpoint": self.endpoint, "call_timeout_seconds": 20.0} | options
        made = kind(self.zone_id, regions=REGIONS, ttl_seconds=5, **settings)
        self.made.append(made)
        return made

    def apply(self, *changes: tuple[str, RecordSet]) -> None:
        batch = [{"Action": action, "ResourceRecordSet": record} for action, record in changes]
        self.client.change_resource_record_sets(HostedZoneId=self.zone_id, ChangeBatch={"Changes": batch})

    def records(self) -> list[RecordSet]:
        found = self.client.list_resource_record_sets(HostedZoneId=self.zone_id)["ResourceRecordSets"]
        return [record for record in found if record["Name"] in (NAME, epoch_name(NAME))]


@pytest.fixture(scope="module")
def stand_in() -> Iterator[AwsStandIn]:
    with AwsStandIn() as running:
        yield running


@pytest.fixture(params=["memory", pytest.param("ministack", marks=pytest.mark.aws)])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    if request.param == "memory":
        yield MemoryWorld()
        return
    real = Route53World(request.getfixturevalue("stand_in").endpoint)
    yield real
    for traffic in real.made:
        await traffic.close()


# ------------------------------------------------------------------------------------------------------- reading, moving


async def test_a_read_gives_weights_epoch_and_an_exact_copy_of_each_record_set(world: World) -> None:
    state = await world.traffic().read()
    assert state.weights == HOME
    assert state.epoch == 3
    assert len(state.exact) == 4
    assert state == await world.traffic().read()


async def test_a_change_moves_weights_and_epoch_and_keeps_everything_else(world: World) -> None:
    old = world.record("A", EU)
    checked = {**old, "HealthCheckId": "hc-eu", "TTL": 17}
    world.apply(("DELETE", old), ("CREATE", checked))
    traffic = world.traffic()
    change_id = await traffic.change(fence(7), await traffic.read(), TO_DE)
    assert change_id not in ("", "none")
    state = await traffic.read()
    assert (state.weights, state.epoch) == (TO_DE, 7)
    assert world.record("A", EU) == {**checked, "Weight": 0}
    assert values_of(world.record("A", EU)) == ("127.0.1.2", "127.0.1.1"), "the order of the values was not kept"


async def test_equal_weights_raise_the_txt_alone(world: World) -> None:
    traffic = world.traffic()
    before = [record for record in world.records() if record["Type"] == "A"]
    await traffic.change(fence(7), await traffic.read(), HOME)
    assert [record for record in world.records() if record["Type"] == "A"] == before
    assert (await traffic.read()).epoch == 7


async def test_the_weights_move_later_under_the_txt_that_was_raised_before(world: World) -> None:
    traffic = world.traffic()
    await traffic.change(fence(7), await traffic.read(), HOME)
    await traffic.change(fence(7), await traffic.read(), TO_DE)
    state = await traffic.read()
    assert (state.weights, state.epoch) == (TO_DE, 7)


async def test_once_the_txt_is_raised_the_predecessors_change_fails_whole(world: World) -> None:
    old, new = world.traffic(), world.traffic()
    expected = await old.read()
    await new.change(fence(7), await new.read(), HOME)
    with pytest.raises(FenceLost) as caught:
        await old.change(fence(4, EU), expected, TO_US)
    assert caught.value.epoch == 7
    state = await new.read()
    assert (state.weights, state.epoch) == (HOME, 7)


async def test_what_is_so_already_is_a_success_without_a_change(world: World) -> None:
    traffic = world.traffic()
    await traffic.change(fence(7), await traffic.read(), TO_DE)
    before = world.records()
    assert await traffic.change(fence(7), await traffic.read(), TO_DE) == "none"
    assert world.records() == before


async def test_already_so_is_checked_now_and_not_believed_from_an_old_read(world: World) -> None:
    traffic, other = world.traffic(), world.traffic()
    await traffic.change(fence(7), await traffic.read(), TO_DE)
    old = await traffic.read()
    await other.change(fence(8), old, TO_US)
    with pytest.raises(FenceLost):
        await traffic.change(fence(7), old, TO_DE)


async def test_the_same_change_sent_twice_succeeds_twice_and_applies_once(world: World) -> None:
    traffic = world.traffic()
    expected = await traffic.read()
    assert await traffic.change(fence(7), expected, TO_DE) != "none"
    assert await traffic.change(fence(7), expected, TO_DE) == "none"


async def test_a_zone_without_a_fence_record_gets_one_and_only_once(world: World) -> None:
    world.apply(("DELETE", world.record("TXT")))
    one, two = world.traffic(), world.traffic()
    expected = await one.read()
    assert expected.epoch == 0
    await one.change(fence(5), expected, HOME)
    with pytest.raises(FenceLost):
        await two.change(fence(4), expected, TO_US)
    with pytest.raises(Conflict):
        await two.change(fence(6), expected, TO_US)
    assert values_of(world.record("TXT")) == ('"5"',)


async def test_a_change_is_in_sync_after_a_while_and_an_unknown_one_is_not_found(world: World) -> None:
    traffic = world.traffic()
    change_id = await traffic.change(fence(7), await traffic.read(), TO_DE)
    for _ in range(100):
        if await traffic.in_sync(change_id):
            break
    else:
        raise AssertionError("never in sync")
    assert await traffic.in_sync("none")
    with pytest.raises(NotFound):
        await traffic.in_sync("C0000000000000")


@pytest.mark.parametrize("page_size", [1, 2, 3])
async def test_records_in_many_pages_with_neighbours_are_all_read_and_no_others(world: World, page_size: int) -> None:
    for label in ("-.agents", "a.agents", "agent", "agents2", "zz"):
        neighbour = f"{label}.{APEX}"
        world.apply(("CREATE", {"Name": neighbour, "Type": "A", "TTL": 5, "ResourceRecords": [{"Value": "127.0.9.9"}]}))
    traffic = world.traffic(page_size=page_size)
    state = await traffic.read()
    assert (state.weights, state.epoch, len(state.exact)) == (HOME, 3, 4)
    await traffic.change(fence(7), state, TO_US)
    assert (await traffic.read()).weights == TO_US


async def test_the_name_may_be_spelled_in_any_case_and_without_its_dot(world: World) -> None:
    assert (await world.traffic(name="Agents.DR.example").read()).weights == HOME


# --------------------------------------------------------------------------------------------------------------- refusals


async def test_an_epoch_older_than_the_one_seen_is_refused_before_any_call(world: World) -> None:
    traffic = world.traffic()
    expected = await traffic.read()
    before = world.records()
    with pytest.raises(FenceLost) as caught:
        await traffic.change(fence(2), expected, TO_DE)
    assert caught.value.epoch == 3
    with pytest.raises(Refused):
        await traffic.change(fence(0), TrafficState(HOME, 0), TO_DE)
    assert world.records() == before


@pytest.mark.parametrize(
    "weights",
    [
        {EU: 0, DE: 0, US: 0},
        {},
        {EU: -1, DE: 100, US: 0},
        {EU: 0, DE: 256, US: 0},
        {EU: 0, DE: True, US: 0},
        {EU: 0, DE: 1.0, US: 0},
        {EU: 0, DE: "100", US: 0},
        {EU: 0, DE: 100},
        {EU: 0, DE: 100, US: 0, "ap-south-1": 0},
    ],
)
async def test_weights_that_are_empty_out_of_range_or_not_of_these_regions_are_refused(world: World, weights: Any) -> None:
    traffic = world.traffic()
    before = world.records()
    with pytest.raises(Refused) as caught:
        await traffic.change(fence(7), await traffic.read(), weights)
    assert not isinstance(caught.value, Conflict)
    assert caught.value.hint
    assert world.records() == before


async def test_a_name_without_any_record_cannot_be_changed(world: World) -> None:
    for record in world.records():
        world.apply(("DELETE", record))
    traffic = world.traffic()
    state = await traffic.read()
    assert state == TrafficState({}, 0, ())
    with pytest.raises(Refused):
        await traffic.change(fence(7), state, {})
    with pytest.raises(Refused):
        await traffic.change(fence(7), state, HOME)


FOREIGN: dict[str, tuple[RecordSet, str]] = {
    "unknown region": (address(SetIdentifier="eu-west-1-old"), "eu-west-1-old"),
    "ipv6": (address(Type="AAAA", ResourceRecords=[{"Value": "::1"}]), "AAAA"),
    "text at the name": (address(Type="TXT", SetIdentifier=None, Weight=None, ResourceRecords=[{"Value": '"x"'}]), "TXT"),
    "alias": (
        address(
            SetIdentifier="x",
            TTL=None,
            ResourceRecords=None,
            AliasTarget={"HostedZoneId": "Z1", "DNSName": "lb.example.", "EvaluateTargetHealth": False},
        ),
        "alias",
    ),
    "latency": (address(SetIdentifier="x", Weight=None, Region="eu-west-1"), "Region"),
    "failover": (address(SetIdentifier="x", Weight=None, Failover="PRIMARY"), "Failover"),
    "multivalue": (address(SetIdentifier="x", Weight=None, MultiValueAnswer=True), "MultiValueAnswer"),
    "simple": (address(SetIdentifier=None, Weight=None), "not weighted"),
}


@pytest.mark.parametrize("kind", FOREIGN)
async def test_a_record_under_our_name_that_we_do_not_understand_is_refused_by_name(world: World, kind: str) -> None:
    record, says = FOREIGN[kind]
    world.apply(("CREATE", record))
    with pytest.raises(Refused, match=says) as caught:
        await world.traffic().read()
    assert NAME in caught.value.message


@pytest.mark.parametrize(
    "values", [['"3"', '"4"'], ['"v=spf1"'], ['"-1"'], ['"007"'], ['""'], ['"3" "4"'], ['"99999999999999999999"'], ['"٣"']]
)
async def test_a_fence_record_that_is_not_one_epoch_is_refused(world: World, values: list[str]) -> None:
    record = {**txt(""), "ResourceRecords": [{"Value": value} for value in values]}
    world.apply(("DELETE", world.record("TXT")), ("CREATE", record))
    with pytest.raises(Refused, match="TXT"):
        await world.traffic().read()


async def test_a_weighted_fence_record_is_refused(world: World) -> None:
    world.apply(("DELETE", world.record("TXT")), ("CREATE", txt('"3"', SetIdentifier="x", Weight=1)))
    with pytest.raises(Refused, match="not the plain TXT"):
        await world.traffic().read()


async def test_a_state_made_by_hand_is_not_an_expectation(world: World) -> None:
    traffic = world.traffic()
    state = await traffic.read()
    for forged in (
        TrafficState(HOME, 3, ()),
        TrafficState(TO_US, 3, state.exact),
        TrafficState(HOME, 2, state.exact),
        TrafficState(HOME, 3, ("not json",)),
        TrafficState(HOME, 3, ("{}",)),
    ):
        with pytest.raises(Conflict):
            await traffic.change(fence(7), forged, TO_DE)
    assert await traffic.read() == state


# ------------------------------------------------------------------------------------------------- compare-and-set, races


async def test_any_change_by_somebody_else_is_a_conflict_and_works_after_reading_again(world: World) -> None:
    traffic = world.traffic()
    stale = await traffic.read()
    old = world.record("A", US)
    world.apply(("DELETE", old), ("CREATE", {**old, "TTL": 60}))
    with pytest.raises(Conflict, match="changed meanwhile"):
        await traffic.change(fence(7), stale, TO_DE)
    assert (await traffic.read()).weights == HOME
    await traffic.change(fence(7), await traffic.read(), TO_DE)
    assert world.record("A", US)["TTL"] == 60


async def test_two_controllers_that_flip_at_once_cannot_both_win(world: World) -> None:
    one, two = world.traffic(), world.traffic()
    epochs = itertools.count(4)
    seen = [3]
    for _ in range(8):
        expected = await one.read()
        low, high = next(epochs), next(epochs)
        results = await asyncio.gather(
            one.change(fence(low, DE), expected, TO_DE if expected.weights != TO_DE else HOME),
            two.change(fence(high, US), expected, TO_US if expected.weights != TO_US else HOME),
            return_exceptions=True,
        )
        lost = [result for result in results if isinstance(result, BaseException)]
        assert len(lost) == 1, results
        assert isinstance(lost[0], Conflict | FenceLost), lost
        state = await one.read()
        assert state.epoch == (low if results[1] is lost[0] else high)
        seen.append(state.epoch)
        # The greater epoch gets its way after reading again; the smaller one never does after that.
        await two.change(fence(high, US), state, TO_US)
        with pytest.raises(FenceLost):
            await one.change(fence(low, DE), await one.read(), TO_DE)
        seen.append((await two.read()).epoch)
    assert_never_back(seen)


def assert_never_back(epochs: Iterable[int]) -> None:
    """The checker: DNS never goes back to the decision of an older epoch."""
    greatest = 0
    for epoch in epochs:
        assert epoch >= greatest, f"DNS went back from epoch {greatest} to epoch {epoch}"
        greatest = epoch


async def test_the_checker_catches_a_writer_that_does_not_compare(world: World) -> None:
    delayed, other = world.unguarded(), world.traffic()
    expected = await delayed.read()
    seen = [expected.epoch]
    await other.change(fence(7), await other.read(), TO_DE)
    seen.append((await other.read()).epoch)
    await delayed.change(fence(4, EU), expected, TO_US)  # a stale decision that arrives late, and is applied
    seen.append((await other.read()).epoch)
    assert seen == [3, 7, 4]
    with pytest.raises(AssertionError, match="went back from epoch 7 to epoch 4"):
        assert_never_back(seen)


# ---------------------------------------------------------------------------------- lost and late messages (virtual time)


class SlowGate(FaultGate):
    """Each message takes a random time, from a seed."""

    def __init__(self, rng: random.Random, most_seconds: float) -> None:
        super().__init__(asyncio.sleep)
        self._rng = rng
        self._most = most_seconds

    async def before(self, op: str) -> None:
        await asyncio.sleep(self._rng.uniform(0, self._most))
        await super().before(op)

    async def after(self, op: str) -> None:
        await asyncio.sleep(self._rng.uniform(0, self._most))
        await super().after(op)


async def move(traffic: CompareAndSetTraffic, epoch: int, weights: Mapping[str, int], rng: random.Random) -> None:
    """A controller that wants its weights and obeys every error as its class says."""
    for _ in range(12):
        try:
            expected = await traffic.read()
            await asyncio.sleep(rng.uniform(0, 3))
            await traffic.change(fence(epoch), expected, weights)
            return
        except FenceLost:
            return
        except (Conflict, Unavailable):
            await asyncio.sleep(rng.uniform(0, 1))


def epochs_of(zone: MemoryZone) -> list[int]:
    texts = ([values_of(r)[0] for r in version.records if r["Type"] == "TXT"] for version in zone.history)
    return [int(found[0].strip('"')) for found in texts if found]


async def race(kind: type[MemoryTraffic], seed: int) -> tuple[list[int], TrafficState]:
    rng = random.Random(seed)
    world = MemoryWorld()
    movers = []
    for epoch, weights in ((4, TO_US), (5, TO_DE), (6, HOME), (7, TO_US)):
        gate = SlowGate(rng, most_seconds=rng.choice((0.1, 1.0, 4.0)))
        gate.lose("change", times=rng.randrange(3))
        gate.fail("change", times=rng.randrange(2))
        movers.append(move(kind(world.zone, REGIONS, gate, call_timeout_seconds=2.0), epoch, weights, rng))
    await asyncio.gather(*movers)
    await asyncio.sleep(60)  # whatever is still under way arrives
    assert not world.zone.in_flight
    return epochs_of(world.zone), await world.traffic().read()


def test_no_interleaving_of_late_and_lost_messages_takes_dns_back_to_an_older_epoch() -> None:
    arrived = 0
    for seed in range(300):
        epochs, final = run_virtual(race(MemoryTraffic, seed))
        assert_never_back(epochs)
        assert sum(final.weights.values()) == 100, seed
        arrived += final.epoch == 7 and final.weights == TO_US
    assert arrived > 200, "the newest controller hardly ever got through: this test tests nothing"


def test_without_the_compare_the_same_interleavings_do_take_it_back() -> None:
    gone_back = 0
    for seed in range(300):
        epochs, _ = run_virtual(race(UnguardedMemory, seed))
        try:
            assert_never_back(epochs)
        except AssertionError:
            gone_back += 1
    assert gone_back > 30


def gated(timeout: float = 2.0) -> tuple[MemoryWorld, FaultGate, MemoryTraffic]:
    world = MemoryWorld()
    gate = FaultGate(asyncio.sleep)
    return world, gate, MemoryTraffic(world.zone, REGIONS, gate, call_timeout_seconds=timeout)


async def test_a_change_whose_answer_was_lost_is_found_by_reading_back() -> None:
    world, gate, traffic = gated()
    expected = await traffic.read()
    gate.lose("change")
    assert await traffic.change(fence(7), expected, TO_DE) == "none"
    assert (await world.traffic().read()).weights == TO_DE


async def test_a_lost_answer_that_was_a_no_is_a_conflict() -> None:
    _, gate, traffic = gated()
    expected = await traffic.read()
    await traffic.change(fence(5), expected, TO_US)
    gate.lose("change")
    with pytest.raises(Conflict):
        await traffic.change(fence(6), expected, TO_DE)


async def test_a_change_that_was_never_sent_is_unavailable_and_changes_nothing() -> None:
    world, gate, traffic = gated()
    expected = await traffic.read()
    gate.fail("change")
    with pytest.raises(Unavailable) as caught:
        await traffic.change(fence(7), expected, TO_DE)
    assert not isinstance(caught.value, OutcomeUnknown)
    assert await world.traffic().read() == expected


async def test_a_raise_of_the_txt_is_no_success_only_because_the_weights_are_as_wanted() -> None:
    world, _, traffic = gated()
    expected = await traffic.read()
    other = world.traffic()
    await other.change(fence(5), await other.read(), HOME)
    with pytest.raises(Conflict):
        await traffic.change(fence(7), expected, HOME)
    assert (await other.read()).epoch == 5


def test_a_raise_of_the_txt_that_has_not_arrived_is_unknown() -> None:
    async def story() -> None:
        world, gate, traffic = gated(timeout=2.0)
        expected = await traffic.read()
        gate.delay_seconds = 5.0
        late = asyncio.create_task(traffic.change(fence(7), expected, HOME))
        await asyncio.sleep(1.0)
        gate.delay_seconds = 0.0
        with pytest.raises(OutcomeUnknown):
            await late
        assert (await world.traffic().read()).epoch == 3
        await asyncio.sleep(10)
        assert (await world.traffic().read()).epoch == 7

    run_virtual(story())


async def test_a_lost_answer_that_cannot_be_read_back_stays_unknown() -> None:
    world, gate, traffic = gated()
    expected = await traffic.read()
    gate.lose("change")
    gate.fail("read")
    with pytest.raises(OutcomeUnknown, match="cannot be read back"):
        await traffic.change(fence(7), expected, TO_DE)
    assert (await world.traffic().read()).weights == TO_DE, "it had been applied"


def test_a_request_that_is_still_under_way_is_unknown_and_may_arrive_late() -> None:
    async def story() -> None:
        world, gate, traffic = gated(timeout=2.0)
        expected = await traffic.read()
        gate.delay_seconds = 1.5
        slow = asyncio.create_task(traffic.change(fence(7), expected, TO_DE))
        await asyncio.sleep(1.0)
        gate.delay_seconds = 1.9
        await asyncio.sleep(0.9)
        gate.delay_seconds = 0.0
        assert await slow == "none", "it arrived at 1.5 s, its answer did not within 2 s, the zone said so"

        gate.delay_seconds = 5.0
        late = asyncio.create_task(traffic.change(fence(7), await world.traffic().read(), TO_US))
        await asyncio.sleep(1.0)
        gate.delay_seconds = 0.0
        with pytest.raises(OutcomeUnknown, match="not in the zone yet"):
            await late
        assert (await world.traffic().read()).weights == TO_DE
        await asyncio.sleep(10)
        assert (await world.traffic().read()).weights == TO_US, "the request was not withdrawn"

    run_virtual(story())


def test_a_late_request_cannot_undo_what_a_newer_epoch_decided_meanwhile() -> None:
    async def story() -> None:
        world, gate, old = gated(timeout=2.0)
        expected = await old.read()
        gate.delay_seconds = 5.0
        late = asyncio.create_task(old.change(fence(4, EU), expected, TO_US))
        await asyncio.sleep(1.0)
        gate.delay_seconds = 0.0
        newer = world.traffic()
        await newer.change(fence(7), await newer.read(), TO_DE)
        with pytest.raises(FenceLost):
            await late
        await asyncio.sleep(10)
        state = await newer.read()
        assert (state.weights, state.epoch) == (TO_DE, 7)
        assert_never_back(epochs_of(world.zone))

    run_virtual(story())


def test_a_read_that_takes_too_long_is_unavailable() -> None:
    async def story() -> None:
        _, gate, traffic = gated(timeout=2.0)
        gate.delay_seconds = 3.0
        with pytest.raises(Unavailable, match="within 2 s"):
            await traffic.read()

    run_virtual(story())


def test_batches_over_route_53s_limits_are_refused() -> None:
    def changes(count: int, length: int) -> list[Change]:
        return [Change("CREATE", {"ResourceRecords": [{"Value": "x" * length}]})] * count

    check_quotas(changes(1000, 32))
    with pytest.raises(Refused, match="1001 records"):
        check_quotas(changes(1001, 1))
    with pytest.raises(Refused, match="33000 characters"):
        check_quotas(changes(1000, 33))


# ------------------------------------------------------------------------------------------------ Route 53's own behaviour


@pytest.mark.parametrize("zone_id", ["/hostedzone/Z1", "hostedzone/Z1", "", "Z 1", "Z1\n", "Z" * 33, "../Z1"])
def test_a_zone_id_with_a_prefix_or_of_another_form_is_a_misconfiguration(zone_id: str) -> None:
    with pytest.raises(Misconfigured) as caught:
        Route53Traffic(zone_id, NAME, regions=REGIONS, ttl_seconds=5, endpoint="http://127.0.0.1:9")
    assert caught.value.hint


def xml_error(status: int, code: str, message: str = "as the provider says it") -> httpx.Response:
    kind = "InvalidChangeBatch" if code == "InvalidChangeBatch" else "ErrorResponse"
    inner = f"<Error><Type>Sender</Type><Code>{code}</Code><Message>{message}</Message></Error>"
    text = f'<{kind} xmlns="https://route53.amazonaws.com/doc/2013-04-01/">{inner}<RequestId>r</RequestId></{kind}>'
    return httpx.Response(status, content=text.encode(), headers={"content-type": "text/xml"})


class Proxy:
    """HTTP in front of the stand-in: gives scripted answers instead, or passes a request on and drops its answer."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.endpoint = ""
        self.instead: dict[str, list[httpx.Response]] = {"GET": [], "POST": []}
        self.drop = {"GET": 0, "POST": 0}
        self.stall = self.drip = False
        self.seen: list[str] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Proxy]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            (method, path, _), *lines = (line.split(" ", 2) for line in head.split("\r\n") if line)
            headers = {line[0].rstrip(":").lower(): " ".join(line[1:]) for line in lines}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            self.seen.append(method)
            if self.drip:  # a byte now and then keeps every socket timeout from firing
                writer.write(b"HTTP/1.1 200 OK\r\nx: ")
                for _ in range(60):
                    writer.write(b"y")
                    await asyncio.sleep(0.05)
                return
            answer = await self._answer(method, path, headers, body)
            if answer is not None:
                start = f"HTTP/1.1 {answer.status_code} x\r\ncontent-type: text/xml\r\nconnection: close\r\n"
                writer.write(f"{start}content-length: {len(answer.content)}\r\n\r\n".encode() + answer.content)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> httpx.Response | None:
        if self.stall:
            await asyncio.sleep(2)
            return None
        if self.instead[method]:
            return self.instead[method].pop(0)
        async with httpx.AsyncClient(timeout=20) as client:
            answer = await client.request(method, self.upstream + path, content=body, headers=headers)
        if self.drop[method]:
            self.drop[method] -= 1
            return None
        return answer


@pytest.fixture
async def odd(stand_in: AwsStandIn) -> AsyncIterator[tuple[Proxy, Route53World, Route53Traffic]]:
    world = Route53World(stand_in.endpoint)
    async with Proxy(stand_in.endpoint).running() as proxy:
        with stamina.set_testing(True, attempts=5):  # retries without their pauses
            yield proxy, world, world.traffic(endpoint=proxy.endpoint)
    for traffic in world.made:
        await traffic.close()


Odd = tuple[Proxy, Route53World, Route53Traffic]


@pytest.mark.aws
@pytest.mark.parametrize(("status", "code"), [(400, "Throttling"), (400, "PriorRequestNotComplete"), (429, "Whatever")])
async def test_a_busy_provider_is_asked_again_a_few_times(odd: Odd, status: int, code: str) -> None:
    proxy, world, traffic = odd
    expected = await traffic.read()
    proxy.seen.clear()
    proxy.instead["POST"] = [xml_error(status, code)] * 3
    assert await traffic.change(fence(7), expected, TO_DE) != "none"
    assert proxy.seen == ["POST"] * 4
    assert (await world.traffic().read()).weights == TO_DE


@pytest.mark.aws
async def test_a_provider_that_stays_busy_is_unavailable_and_nothing_was_changed(odd: Odd) -> None:
    proxy, world, traffic = odd
    expected = await traffic.read()
    proxy.instead["POST"] = [xml_error(400, "PriorRequestNotComplete")] * 9
    with pytest.raises(Unavailable, match="PriorRequestNotComplete") as caught:
        await traffic.change(fence(7), expected, TO_DE)
    assert not isinstance(caught.value, OutcomeUnknown)
    assert proxy.seen.count("POST") == 5
    assert await world.traffic().read() == expected


@pytest.mark.aws
async def test_an_answer_that_the_network_lost_is_found_by_reading_back_and_the_change_is_not_repeated(odd: Odd) -> None:
    proxy, world, traffic = odd
    expected = await traffic.read()
    proxy.drop["POST"] = 1
    assert await traffic.change(fence(7), expected, TO_DE) == "none"
    assert proxy.seen.count("POST") == 1
    assert (await world.traffic().read()).weights == TO_DE


@pytest.mark.aws
async def test_a_rejection_that_echoes_our_own_first_request_is_a_success(odd: Odd) -> None:
    proxy, world, traffic = odd
    expected = await traffic.read()
    await world.traffic().change(fence(7), expected, TO_DE)
    proxy.instead["POST"] = [xml_error(400, "InvalidChangeBatch", "but it was not found")]
    assert await traffic.change(fence(7), expected, TO_DE) == "none"


@pytest.mark.aws
async def test_a_server_error_to_a_change_is_neither_yes_nor_no(odd: Odd) -> None:
    proxy, world, traffic = odd
    expected = await traffic.read()
    proxy.instead["POST"] = [xml_error(500, "InternalFailure")]
    with pytest.raises(OutcomeUnknown):
        await traffic.change(fence(7), expected, TO_DE)
    assert proxy.seen.count("POST") == 1
    assert await world.traffic().read() == expected


@pytest.mark.aws
async def test_a_rejection_of_an_unchanged_zone_is_refused_in_the_providers_words(odd: Odd) -> None:
    proxy, _, traffic = odd
    expected = await traffic.read()
    proxy.instead["POST"] = [xml_error(400, "InvalidChangeBatch", "InvalidIPAddress")]
    with pytest.raises(Refused, match="InvalidIPAddress") as caught:
        await traffic.change(fence(7), expected, TO_DE)
    assert not isinstance(caught.value, Conflict)


@pytest.mark.aws
async def test_reads_are_repeated_over_lost_answers_and_server_errors(odd: Odd) -> None:
    proxy, _, traffic = odd
    proxy.drop["GET"] = 1
    proxy.instead["GET"] = [xml_error(503, "ServiceUnavailable"), xml_error(400, "Throttling")]
    assert (await traffic.read()).weights == HOME
    proxy.instead["GET"] = [xml_error(500, "InternalFailure")] * 5
    with pytest.raises(Unavailable):
        await traffic.read()


@pytest.mark.aws
@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("NoSuchHostedZone", Misconfigured),
        ("AccessDenied", Misconfigured),
        ("SignatureDoesNotMatch", Misconfigured),
        ("InvalidInput", Refused),
    ],
)
async def test_errors_are_sorted_by_what_the_reader_does_next(odd: Odd, code: str, error: type[DrError]) -> None:
    proxy, _, traffic = odd
    expected = await traffic.read()
    proxy.instead["GET"] = [xml_error(403, code)]
    with pytest.raises(error):
        await traffic.read()
    proxy.instead["POST"] = [xml_error(403, code)]
    with pytest.raises(error) as caught:
        await traffic.change(fence(7), expected, TO_DE)
    assert caught.value.hint


@pytest.mark.aws
@pytest.mark.parametrize("code", ["ExpiredToken", "ExpiredTokenException"])
async def test_credentials_that_have_expired_are_waited_for_and_nothing_was_changed(odd: Odd, code: str) -> None:
    """The rule of the stores: whoever lends them renews them by itself."""
    proxy, world, traffic = odd
    expected = await traffic.read()
    proxy.instead["GET"] = [xml_error(403, code)] * 2
    assert (await traffic.read()).weights == HOME
    proxy.instead["POST"] = [xml_error(403, code)] * 9
    with pytest.raises(Unavailable, match=code) as caught:
        await traffic.change(fence(7), expected, TO_DE)
    assert not isinstance(caught.value, OutcomeUnknown)
    assert "renewed by their provider" in caught.value.hint
    assert (await world.traffic().read()).weights == HOME
    proxy.instead["POST"] = [xml_error(403, code)] * 2
    await traffic.change(fence(7), expected, TO_DE)
    assert (await world.traffic().read()).weights == TO_DE


@pytest.mark.aws
async def test_credentials_that_cannot_be_renewed_now_send_nothing_and_are_waited_for(
    odd: Odd, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, _, traffic = odd
    expected = await traffic.read()
    proxy.seen.clear()
    asked = []

    def no_provider(*_: Any, **__: Any) -> None:
        asked.append(1)
        raise CredentialRetrievalError(provider="iam-role", error_msg="timed out")

    monkeypatch.setattr(traffic._client._request_signer, "sign", no_provider)
    with pytest.raises(Unavailable, match="could not be renewed") as caught:
        await traffic.change(fence(7), expected, TO_DE)
    assert not isinstance(caught.value, OutcomeUnknown)
    assert len(asked) > 1
    assert proxy.seen == []


@pytest.mark.aws
async def test_a_provider_that_does_not_answer_costs_the_deadline_and_no_more(odd: Odd) -> None:
    proxy, world, _ = odd
    traffic = world.traffic(endpoint=proxy.endpoint, call_timeout_seconds=0.1)
    expected = await world.traffic().read()
    proxy.stall = True
    with stamina.set_testing(True, attempts=2):
        async with asyncio.timeout(10):
            with pytest.raises(Unavailable):
                await traffic.read()
            with pytest.raises(OutcomeUnknown, match="cannot be read back"):
                await traffic.change(fence(7), expected, TO_DE)


@pytest.mark.aws
async def test_a_provider_that_answers_a_byte_at_a_time_costs_the_deadline_too(odd: Odd) -> None:
    proxy, world, _ = odd
    traffic = world.traffic(endpoint=proxy.endpoint, call_timeout_seconds=0.2)
    proxy.drip = True
    with stamina.set_testing(True, attempts=1), pytest.raises(Unavailable, match=r"within 0\.2 s"):
        await traffic.read()


@pytest.mark.aws
async def test_a_provider_that_cannot_be_reached_is_unavailable_and_not_unknown(odd: Odd) -> None:
    _, world, _ = odd
    expected = await world.traffic().read()
    traffic = world.traffic(endpoint="http://127.0.0.1:1")
    for call in (traffic.read(), traffic.change(fence(7), expected, TO_DE)):
        with pytest.raises(Unavailable, match="cannot be reached") as caught:
            await call
        assert not isinstance(caught.value, OutcomeUnknown)


@pytest.mark.aws
async def test_a_zone_that_does_not_exist_is_a_misconfiguration(stand_in: AwsStandIn) -> None:
    traffic = Route53Traffic("Z0NOSUCHZONE", NAME, regions=REGIONS, ttl_seconds=5, endpoint=stand_in.endpoint)
    with pytest.raises(Misconfigured, match="Z0NOSUCHZONE"):
        await traffic.read()
    await traffic.close()
