"""One stream's lease in an instance's hands, on a memory coordinator in virtual time: races, lost answers, proofs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from controller.adapters.memory.coordinator import NOSPACE, MemoryCluster, MemoryCoordinator
from controller.adapters.memory.gate import FaultGate
from controller.domain.lease import Beat
from controller.domain.model import Authority, Barrier, Holder
from controller.errors import OutcomeUnknown, Refused, Unavailable
from controller.lab.virtual_time import VirtualClock, run_virtual
from controller.ports import Delete, Put
from controller.runtime.documents import Keys, encode, read
from controller.runtime.tenure import Tenure, acquire

KEYS = Keys("/dr", "fleet")
STREAM = "0"
HOME = "eu-west-1"
TTL, MARGIN = 5, 1.0
FOUNDED = Authority(HOME, 3, ("eu-west-1", "eu-central-1", "us-east-1"))


class Rig:
    """A founded group; instances reach it through gates of their own."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.cluster = MemoryCluster(self.clock)
        self.plain = MemoryCoordinator(self.cluster)
        self.gates: dict[str, FaultGate] = {}

    async def found(self, authority: Authority = FOUNDED) -> None:
        await self.plain.txn([], [Put(KEYS.authority, encode(authority))])

    async def acquire(
        self, instance: str = "a", *, region: str = HOME, floor: int = 0, gate: FaultGate | None = None
    ) -> Tenure | str:
        self.gates.setdefault(instance, gate or FaultGate(self.clock.sleep))
        return await acquire(
            MemoryCoordinator(self.cluster, self.gates[instance]),
            KEYS,
            self.clock,
            stream=STREAM,
            region=region,
            instance=instance,
            address=f"http://{instance}",
            ttl_seconds=TTL,
            margin_seconds=MARGIN,
            floor=floor,
        )

    async def tenure(self, instance: str = "a", **arguments: Any) -> Tenure:
        got = await self.acquire(instance, **arguments)
        assert isinstance(got, Tenure), got
        return got

    async def authority(self) -> Authority:
        seen = await read(self.plain, KEYS.authority, Authority)
        assert seen is not None
        return seen.value

    async def holder(self) -> Holder | None:
        seen = await read(self.plain, KEYS.holder(STREAM), Holder)
        return seen.value if seen else None

    async def set_barrier(self, barrier: Barrier | None) -> None:
        await self.plain.txn([], [Put(KEYS.authority, encode(replace(await self.authority(), barrier=barrier)))])

    def leases(self) -> int:
        return len(self.cluster._leases)


def story(steps: Callable[[Rig], Awaitable[None]], *, founded: Authority | None = FOUNDED) -> None:
    async def told() -> None:
        rig = Rig()
        if founded is not None:
            await rig.found(founded)
        await steps(rig)

    run_virtual(told(), limit_seconds=3600.0)


# --------------------------------------------------------------------------------------------------------------- acquiring


def test_nobody_acquires_in_another_etcd_cluster_than_the_one_that_the_group_was_recorded_in() -> None:
    async def steps(rig: Rig) -> None:
        with pytest.raises(Refused, match="it was restored from a snapshot"):
            await rig.acquire()
        assert rig.leases() == 0
        assert (await rig.authority()).epoch == FOUNDED.epoch

    story(steps, founded=replace(FOUNDED, cluster="another"))


def test_acquiring_gives_a_new_epoch_a_leased_holder_key_and_a_right_counted_from_the_question() -> None:
    async def steps(rig: Rig) -> None:
        rig.gates["a"] = FaultGate(rig.clock.sleep)
        rig.gates["a"].delay_seconds = 0.1
        tenure = await rig.tenure()
        assert tenure.fence.epoch == 4
        assert (await rig.authority()).epoch == 4
        holder = await rig.holder()
        assert holder is not None
        assert (holder.region, holder.instance, holder.epoch, holder.address) == (HOME, "a", 4, "http://a")
        assert tenure.right.deadline == pytest.approx(0.4 + TTL - MARGIN)  # two reads went before the grant was asked for
        assert tenure.remaining_seconds() == pytest.approx(0.4 + TTL - MARGIN - rig.clock.monotonic())
        await asyncio.sleep(TTL)
        assert await rig.holder() is None
        assert not tenure.may_act()

    story(steps)


@pytest.mark.parametrize("instances", [2, 6])
def test_of_instances_that_race_exactly_one_gets_the_stream(instances: int) -> None:
    async def steps(rig: Rig) -> None:
        for number in range(instances):
            rig.gates[f"i{number}"] = FaultGate(rig.clock.sleep)
            rig.gates[f"i{number}"].delay_seconds = 0.1 + 0.001 * number
        got = await asyncio.gather(*(rig.acquire(f"i{number}") for number in range(instances)))
        won = [one for one in got if isinstance(one, Tenure)]
        assert len(won) == 1
        holder = await rig.holder()
        assert holder is not None
        assert holder.instance == won[0].fence.instance
        assert (await rig.authority()).epoch == 4
        assert {one for one in got if isinstance(one, str)} <= {
            "somebody else was faster", f"{HOME}/{holder.instance} holds the stream in epoch 4",
        }  # fmt: skip
        assert rig.leases() == 1  # the losers gave theirs back

    story(steps)


def test_every_acquisition_is_a_new_epoch_also_by_the_same_instance() -> None:
    async def steps(rig: Rig) -> None:
        epochs = []
        for _ in range(3):
            tenure = await rig.tenure()
            epochs.append(tenure.fence.epoch)
            await tenure.release()
        assert epochs == [4, 5, 6]

    story(steps)


@pytest.mark.parametrize(
    ("authority", "region", "reason"),
    [
        (None, HOME, "the group has no authority yet"),
        (FOUNDED, "us-east-1", f"the authority is with {HOME}"),
        (replace(FOUNDED, barrier=Barrier("p1", "failover", "us-east-1")), HOME, "plan p1 is taking over"),
        (replace(FOUNDED, barrier=Barrier("p1", "switchover", "us-east-1")), "us-east-1", f"the authority is with {HOME}"),
    ],
)
def test_who_may_not_acquire_is_told_why_and_leaves_nothing_behind(
    authority: Authority | None, region: str, reason: str
) -> None:
    async def steps(rig: Rig) -> None:
        got = await rig.acquire(region=region)
        assert isinstance(got, str)
        assert got.startswith(reason)
        assert rig.leases() == 0
        assert await rig.holder() is None

    story(steps, founded=authority)


def test_a_stream_that_is_held_is_not_taken() -> None:
    async def steps(rig: Rig) -> None:
        await rig.tenure("a")
        assert await rig.acquire("b") == f"{HOME}/a holds the stream in epoch 4"
        assert (await rig.authority()).epoch == 4

    story(steps)


@pytest.mark.parametrize(("floor", "allowed"), [(0, True), (3, True), (4, False), (99, False)])
def test_an_etcd_that_knows_less_than_a_store_is_refused_until_people_confirm(floor: int, allowed: bool) -> None:
    async def steps(rig: Rig) -> None:
        if allowed:
            assert (await rig.tenure(floor=floor)).fence.epoch == 4
            return
        with pytest.raises(Refused, match=f"a region store knows epoch {floor}, etcd only 3") as caught:
            await rig.acquire(floor=floor)
        assert "drctl recover" in caught.value.hint
        assert rig.leases() == 0
        assert (await rig.authority()).epoch == 3

    story(steps)


def test_a_barrier_that_comes_up_between_the_look_and_the_transaction_wins() -> None:
    async def steps(rig: Rig) -> None:
        rig.gates["a"] = FaultGate(rig.clock.sleep)
        rig.gates["a"].delay_seconds = 0.1
        racing = asyncio.create_task(rig.acquire())
        await asyncio.sleep(0.45)  # authority and holder are read
        await rig.set_barrier(Barrier("p1", "failover", "us-east-1"))
        assert await racing == "somebody else was faster"
        assert await rig.holder() is None

    story(steps)


# ----------------------------------------------------------------------------------------------------------- unknown outcomes


ACQUIRING = 2
"""Which of an acquisition's transactions takes the stream; the first one reads the authority."""


class LosesTheAnswer(FaultGate):
    """The transaction arrives, and its answer does not."""

    async def after(self, op: str) -> None:
        if op == "txn" and self.calls[op] == ACQUIRING:
            raise Unavailable("txn: answer lost (gate)", hint="")
        await super().after(op)


def test_an_acquisition_whose_answer_was_lost_is_found_by_reading_back() -> None:
    async def steps(rig: Rig) -> None:
        rig.gates["a"] = LosesTheAnswer(rig.clock.sleep)
        tenure = await rig.tenure()
        assert tenure.fence.epoch == 4
        assert (await tenure.heartbeat()).beat is Beat.EXTENDS  # its guard is the right one
        assert (await rig.authority()).epoch == 4

    story(steps)


class LosesTheRequest(FaultGate):
    """The transaction never arrives, and the caller cannot know that."""

    async def before(self, op: str) -> None:
        await super().before(op)
        if op == "txn" and self.calls[op] == ACQUIRING:
            raise OutcomeUnknown("txn: no answer in time")


def test_an_acquisition_that_never_arrived_is_not_taken_for_one() -> None:
    async def steps(rig: Rig) -> None:
        got = await rig.acquire(gate=LosesTheRequest(rig.clock.sleep))
        assert got == "somebody else was faster"
        assert await rig.holder() is None
        assert rig.leases() == 0  # given back, so that the request cannot take effect when it arrives after all
        assert (await rig.tenure("b")).fence.epoch == 4

    story(steps)


def test_an_acquisition_that_arrives_after_it_was_given_up_makes_nobody_a_holder() -> None:
    """Its put hangs on a lease that was given back, so the server refuses the whole transaction."""

    async def steps(rig: Rig) -> None:
        sent: list[tuple[Any, ...]] = []

        class HeldBack(MemoryCoordinator):
            async def txn(self, *arguments: Any) -> Any:
                if not arguments[0]:  # it reads
                    return await super().txn(*arguments)
                sent.append(arguments)
                raise OutcomeUnknown("txn: no answer in time")

        got = await acquire(
            HeldBack(rig.cluster), KEYS, rig.clock, stream=STREAM, region=HOME, instance="a", address="http://a",
            ttl_seconds=TTL, margin_seconds=MARGIN, floor=0,
        )  # fmt: skip
        assert isinstance(got, str)
        with pytest.raises(Refused, match="lease"):
            await rig.plain.txn(*sent[0])
        assert await rig.holder() is None
        assert (await rig.authority()).epoch == 3

    story(steps)


def test_an_unknown_outcome_while_somebody_else_acquired_is_not_taken_for_ours() -> None:
    async def steps(rig: Rig) -> None:
        rig.gates["a"] = LosesTheAnswer(rig.clock.sleep)
        rig.gates["a"].delay_seconds = 0.1
        racing = asyncio.create_task(rig.acquire("a"))
        await asyncio.sleep(0.45)
        await rig.tenure("b")
        assert await racing == "somebody else was faster"
        holder = await rig.holder()
        assert holder is not None
        assert holder.instance == "b"

    story(steps)


def test_an_unknown_outcome_that_cannot_be_read_back_is_no_tenure() -> None:
    async def steps(rig: Rig) -> None:
        rig.gates["a"] = FaultGate(rig.clock.sleep)
        rig.gates["a"].delay_seconds = 0.1
        acquiring = asyncio.create_task(rig.acquire())
        await asyncio.sleep(0.75)  # two reads and the grant are answered; the transaction has arrived at 0.7
        rig.gates["a"].cut = True
        with pytest.raises(Unavailable):
            await acquiring
        assert await rig.holder() is not None  # it was applied, and nobody knows
        await asyncio.sleep(TTL)
        assert await rig.holder() is None  # it ends by itself
        assert (await rig.tenure("b")).fence.epoch == 5

    story(steps)


# ---------------------------------------------------------------------------------------------------------------- heartbeats


def test_heartbeats_keep_the_right_for_as_long_as_they_complete() -> None:
    async def steps(rig: Rig) -> None:
        tenure = await rig.tenure()
        for _ in range(30):
            await asyncio.sleep(1.0)
            sent_at = rig.clock.monotonic()
            assert (await tenure.heartbeat()).beat is Beat.EXTENDS
            assert tenure.right.deadline == sent_at + TTL - MARGIN
        assert await rig.holder() is not None
        assert tenure.may_act()

    story(steps)


@pytest.mark.parametrize("op", ["txn", "keep_alive"])
@pytest.mark.parametrize("lost", [True, False])
def test_a_heartbeat_without_an_answer_neither_extends_nor_ends_the_right(op: str, lost: bool) -> None:
    async def steps(rig: Rig) -> None:
        tenure = await rig.tenure()
        await asyncio.sleep(1.0)
        before = tenure.right
        (rig.gates["a"].lose if lost else rig.gates["a"].fail)(op)
        with pytest.raises(Unavailable):
            await tenure.heartbeat()
        assert tenure.right == before
        assert tenure.may_act()
        assert (await tenure.heartbeat()).beat is Beat.EXTENDS
        assert tenure.right.deadline > before.deadline

    story(steps)


def test_without_complete_heartbeats_the_right_ends_before_the_lease() -> None:
    async def steps(rig: Rig) -> None:
        tenure = await rig.tenure()
        while tenure.may_act():
            rig.gates["a"].lose("txn")  # keep-alives would be answered: they prove nothing
            with pytest.raises(Unavailable):
                await tenure.heartbeat()
            await asyncio.sleep(0.1)
        assert await rig.holder() is not None
        assert rig.clock.monotonic() == pytest.approx(TTL - MARGIN, abs=0.11)

    story(steps)


@pytest.mark.parametrize("how", ["deleted", "replaced by another", "expired"])
def test_a_holder_key_that_is_not_ours_any_more_ends_the_right_at_once(how: str) -> None:
    async def steps(rig: Rig) -> None:
        tenure = await rig.tenure()
        key = KEYS.holder(STREAM)
        if how == "expired":
            await asyncio.sleep(TTL + 0.1)
        else:
            item = await rig.plain.get(key)
            assert item is not None
            await rig.plain.txn([], [Delete(key)])
            if how == "replaced by another":  # the very same content: only the create revision tells
                await rig.plain.txn([], [Put(key, item.value, item.lease)])
        verdict = await tenure.heartbeat()
        assert verdict.beat is Beat.LOST
        assert not tenure.may_act()
        assert tenure.remaining_seconds() == 0.0
        await rig.plain.txn([], [Delete(key)])
        assert (await tenure.heartbeat()).beat is Beat.LOST
        assert tenure.right.lost  # and it stays lost

    story(steps)


def test_a_heartbeat_counts_from_when_its_keep_alive_was_sent_and_not_from_its_answer() -> None:
    async def steps(rig: Rig) -> None:
        tenure = await rig.tenure()
        rig.gates["a"].delay_seconds = 0.3
        began = rig.clock.monotonic()
        verdict = await tenure.heartbeat()
        assert rig.clock.monotonic() - began == pytest.approx(1.8)
        assert verdict.deadline == pytest.approx(began + 0.6 + TTL - MARGIN)  # the first guarded read took 0.6 s

    story(steps)


def test_a_change_of_leader_inside_a_heartbeat_proves_nothing() -> None:
    async def steps(rig: Rig) -> None:
        tenure = await rig.tenure()
        deadline = tenure.right.deadline
        rig.gates["a"].delay_seconds = 0.2
        beating = asyncio.create_task(tenure.heartbeat())
        await asyncio.sleep(0.5)  # the first guarded read is answered
        rig.cluster.change_leader()
        verdict = await beating
        assert verdict.beat is Beat.PROVES_NOTHING
        assert "raft term" in verdict.reason
        assert tenure.right.deadline == deadline
        assert (await tenure.heartbeat()).beat is Beat.EXTENDS

    story(steps)


@pytest.mark.parametrize(
    ("kind", "drained", "beat"),
    [
        ("failover", False, Beat.PROVES_NOTHING),
        ("switchover", False, Beat.EXTENDS),
        ("switchover", True, Beat.PROVES_NOTHING),
    ],
)
def test_a_heartbeat_that_reads_a_barrier_heeds_it(kind: str, drained: bool, beat: Beat) -> None:
    async def steps(rig: Rig) -> None:
        tenure = await rig.tenure()
        tenure.drained = drained
        barrier = Barrier("p1", kind, "us-east-1")
        await rig.set_barrier(barrier)
        await asyncio.sleep(1.0)
        deadline = tenure.right.deadline
        assert (await tenure.heartbeat()).beat is beat
        assert tenure.barrier == barrier
        assert (tenure.right.deadline > deadline) is (beat is Beat.EXTENDS)
        await rig.set_barrier(None)
        assert (await tenure.heartbeat()).beat is Beat.EXTENDS
        assert tenure.barrier is None

    story(steps)


def test_a_full_etcd_does_not_depose_a_healthy_holder() -> None:
    async def steps(rig: Rig) -> None:
        tenure = await rig.tenure()
        rig.cluster.alarms.add(NOSPACE)
        for _ in range(10):
            await asyncio.sleep(2.0)
            assert (await tenure.heartbeat()).beat is Beat.EXTENDS
        assert isinstance(await rig.acquire("b"), str)

    story(steps)


def test_a_right_is_never_counted_with_more_than_was_asked_for() -> None:
    """etcd grants at least 1.5 election timeouts; what everybody else waits for is in the holder key."""

    async def steps(rig: Rig) -> None:
        rig.cluster.election_seconds = 10.0
        tenure = await rig.tenure()
        assert tenure.right.deadline <= TTL - MARGIN
        await asyncio.sleep(3.0)
        assert (await tenure.heartbeat()).deadline == pytest.approx(3.0 + TTL - MARGIN)

    story(steps)


# ------------------------------------------------------------------------------------------------------------------ the end


def test_a_release_ends_the_right_before_the_lease_goes_back() -> None:
    async def steps(rig: Rig) -> None:
        tenure = await rig.tenure()
        rig.gates["a"].delay_seconds = 1.0
        releasing = asyncio.create_task(tenure.release())
        await asyncio.sleep(0.1)
        assert not tenure.may_act()
        assert await rig.holder() is not None
        await releasing
        assert await rig.holder() is None
        assert isinstance(await rig.acquire("b"), Tenure)

    story(steps)


def test_the_first_reason_for_the_end_of_a_right_stands() -> None:
    async def steps(rig: Rig) -> None:
        tenure = await rig.tenure()
        tenure.lose("a store knows epoch 9")
        tenure.lose("released")
        assert tenure.right.lost == "a store knows epoch 9"
        assert (await tenure.heartbeat()).beat is Beat.EXTENDS
        assert not tenure.may_act()  # no heartbeat brings it back

    story(steps)


def test_the_guard_holds_exactly_while_the_key_is_ours() -> None:
    async def steps(rig: Rig) -> None:
        tenure = await rig.tenure("a")
        assert (await rig.plain.txn([tenure.guard], [Put("/x", b"1")])).succeeded
        await tenure.release()
        assert not (await rig.plain.txn([tenure.guard], [Put("/x", b"2")])).succeeded
        other = await rig.tenure("b")
        assert not (await rig.plain.txn([tenure.guard], [Put("/x", b"3")])).succeeded
        assert (await rig.plain.txn([other.guard], [Put("/x", b"4")])).succeeded

    story(steps)
