"""Orders that must not be carried out: each is refused with a reason and a hint, and nothing is half-applied by it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from controller.domain.model import Authority, Head
from controller.domain.plan import PlanKind
from controller.domain.promotion import State
from controller.errors import ApprovalRequired, DrError, NotFound, Refused
from controller.lab.virtual_time import run_virtual
from controller.runtime.service import PlanDocument, PlanRequest
from controller.runtime.takeover import Takeover
from tests.simulation.checkers import check_all, settle, violations
from tests.simulation.roads import Call
from tests.simulation.test_guards import is_authorization
from tests.simulation.world import HOME, PEOPLE, STREAM, TARGET, THIRD, Instance, World

ADA, GRACE, LINUS = PEOPLE


@dataclass(frozen=True)
class Before:
    """What must not change by an order that is refused."""

    authority: Authority
    zone: object
    heads: tuple[Head, ...]
    acks: int


async def before(world: World) -> Before:
    zone = world.zone.history[-1]
    return Before(await world.authority(), zone, tuple(s.head(STREAM) for s in world.servers.values()), len(world.acks))


async def untouched(world: World, then: Before, seconds: float = 3.0) -> None:
    """Authority and zone are as they were, stores have only grown under the same epoch, and the group goes on serving."""
    await world.wait(seconds)
    now = await before(world)
    assert now.authority == then.authority
    assert now.zone == then.zone
    for old, new in zip(then.heads, now.heads, strict=True):
        assert (new.epoch, new.epochs, new.salvage) == (old.epoch, old.epochs, old.salvage)
        assert new.seq >= old.seq
    assert now.acks > then.acks
    check_all(world)


async def refused(kind: type[DrError], asked: Awaitable[object], *words: str) -> DrError:
    """The request is refused, with these words, and with a hint."""
    with pytest.raises(kind) as caught:
        await asked
    error = caught.value
    for word in words:
        assert word in error.message, error.message
    assert error.hint, f"no hint: {error.message}"
    return error


def run(keys_dir: Path, story: Callable[[World, Instance], Awaitable[None]], **changes: object) -> None:
    """A group that serves, and then ``story``."""

    async def whole() -> None:
        world = World(keys_dir, **changes)  # type: ignore[arg-type]
        await story(world, await world.served(agents=3, seconds=2.0))

    run_virtual(whole(), limit_seconds=4000)


# ------------------------------------------------------------------------------------------------------ at planning


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"to": "mars-1"}, ("to = 'mars-1'", "unknown region")),
        ({"to": HOME}, (HOME, "has the authority already")),
        ({"kind": "teleport"}, ("kind = 'teleport'",)),
        ({"kind": "drill"}, ("drill",)),
        ({"requester": "  "}, ("requester",)),
        ({"reason": "x" * 501}, ("501",)),
        ({"break_glass": True, "reason": " "}, ("break-glass", "reason")),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_by_name_and_not_stored(
    keys_dir: Path, changes: dict[str, object], words: tuple[str, ...]
) -> None:
    async def story(world: World, active: Instance) -> None:
        then = await before(world)
        request = replace(PlanRequest("switchover", TARGET, "oncall", "because"), **changes)  # type: ignore[arg-type]
        for region in (TARGET, HOME):
            await refused(Refused, world.standby(region).create_plan(request), *words)
        assert await world.standby(THIRD).plans() == ()
        await untouched(world, then)

    run(keys_dir, story)


def test_a_plan_to_a_region_without_controllers_or_store_is_refused_with_every_failing_check(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        await world.lose_region(TARGET)
        await world.wait(8.0)
        then = await before(world)
        plan = world.standby(THIRD).create_plan(PlanRequest("switchover", TARGET, "oncall", "because"))
        await refused(Refused, plan, "target-controllers", "target-store", "all-stores")
        await untouched(world, then)
        await settle(world)

    run(keys_dir, story)


def test_a_switchover_without_a_holder_is_refused_and_says_to_plan_a_failover(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        for name in ("a", "b"):
            await world.kill(HOME, name)
        await world.wait(8.0)
        plan = world.standby(TARGET).create_plan(PlanRequest("switchover", TARGET, "oncall", "because"))
        await refused(Refused, plan, "holder-alive", "plan a failover")
        await settle(world)

    run(keys_dir, story)


# ----------------------------------------------------------------------------------------------------- at approving


@pytest.mark.parametrize(
    ("who", "how", "words"),
    [
        ("oncall@example.org", {"key": "mallory"}, ("oncall@example.org",)),
        (ADA, {"key": "mallory"}, (ADA,)),
        (ADA, {"key": "grace"}, (ADA,)),
        (ADA, {"plan": "plan-77"}, ("signature",)),
        (ADA, {"seconds": -1.0}, ("expires_at",)),
        (ADA, {"seconds": 901.0}, ("expires_at",)),
        (ADA, {"seconds": float("nan")}, ()),
    ],
    ids=["not-listed", "forged", "somebody-elses-key", "signed-another-plan", "expired", "too-long", "nan"],
)
def test_an_approval_that_is_not_valid_is_refused_and_does_not_count(
    keys_dir: Path, who: str, how: dict[str, object], words: tuple[str, ...]
) -> None:
    async def story(world: World, active: Instance) -> None:
        document = await world.propose("switchover", TARGET)
        then = await before(world)
        controller = world.standby(TARGET)
        if how.get("seconds") != how.get("seconds"):  # NaN: nobody can even sign it; sent as it is
            request = replace(world.signed(document.record, who), expires_at=float("nan"))
        else:
            request = world.signed(document.record, who, **how)  # type: ignore[arg-type]
        await refused(Refused, controller.approve(document.record.plan.id, request), *words)
        shown = await controller.plan(document.record.plan.id)
        assert shown.approvals == ()
        assert shown.missing_approvals == 2
        await untouched(world, then)

    run(keys_dir, story)


def test_the_requester_does_not_count_and_nobody_counts_twice(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        document = await world.propose("switchover", TARGET, requester=ADA)
        plan = document.record.plan.id
        controller = world.standby(TARGET)
        then = await before(world)
        await refused(Refused, world.approve(controller, document, ADA), "asked for the plan")
        await world.approve(controller, document, GRACE)
        await refused(Refused, world.approve(controller, document, GRACE), "has decided approve already")
        await refused(Refused, world.approve(world.standby(THIRD), document, GRACE, seconds=300), "has decided")
        assert (await controller.plan(plan)).missing_approvals == 1
        await refused(ApprovalRequired, controller.execute(plan, "oncall", TARGET), "1 of 2", "one more person")
        await untouched(world, then)

    run(keys_dir, story)


def test_a_signature_is_good_for_one_plan_and_one_digest_only(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        controller = world.standby(TARGET)
        first, second = await world.propose("switchover", TARGET), await world.propose("switchover", TARGET)
        then = await before(world)
        replayed = world.signed(first.record, ADA)
        await controller.approve(first.record.plan.id, replayed)
        await refused(Refused, controller.approve(second.record.plan.id, replayed), "digest")
        forged = replace(replayed, digest=second.record.digest)
        await refused(Refused, controller.approve(second.record.plan.id, forged), "signature")
        turned = replace(replayed, decision="refuse", principal=ADA)
        await refused(Refused, controller.approve(first.record.plan.id, turned), "signature")
        longer = replace(replayed, expires_at=replayed.expires_at + 60)
        await refused(Refused, controller.approve(first.record.plan.id, longer), "signature")
        assert (await controller.plan(second.record.plan.id)).missing_approvals == 2
        await untouched(world, then)

    run(keys_dir, story)


def test_a_refusal_by_any_approver_ends_the_plan_for_good(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        document = await world.propose("switchover", TARGET)
        plan, controller = document.record.plan.id, world.standby(TARGET)
        then = await before(world)
        for who in (ADA, GRACE):
            await world.approve(controller, document, who)
        await world.approve(controller, document, LINUS, decision="refuse")
        assert await world.plan_state(plan) is State.REFUSED
        await refused(Refused, controller.execute(plan, "oncall", TARGET), "refused")
        await refused(Refused, world.approve(controller, document, ADA), "refused")
        await untouched(world, then)

    run(keys_dir, story)


def test_a_refusal_while_the_old_holder_drains_ends_the_plan_and_the_group_serves_on(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        document = await world.propose("switchover", TARGET)
        then = await before(world)
        plan = await world.let_run(document)
        await world.reached(plan, State.QUIESCING)
        await world.approve(world.standby(TARGET), document, LINUS, decision="refuse")
        assert await world.plan_state(plan) is State.REFUSED
        await world.until(lambda: world.active_in(HOME), 30, "home serving on")
        await world.wait(3.0)
        authority = await world.authority()
        assert (authority.region, authority.barrier) == (HOME, None)
        assert world.zone.history[-1] == then.zone
        await settle(world)

    run(keys_dir, story)


# ----------------------------------------------------------------------------------------------------- at executing


def test_nothing_runs_without_approvals_or_with_the_wrong_confirmation(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        document = await world.propose("switchover", TARGET)
        plan, controller = document.record.plan.id, world.standby(TARGET)
        then = await before(world)
        error = await refused(ApprovalRequired, controller.execute(plan, "oncall", TARGET), "0 of 2 approvals")
        assert error.exit_code == 6
        for who in (ADA, GRACE):
            await world.approve(controller, document, who)
        for wrong in ("", HOME, THIRD, "yes", TARGET.upper()):
            await refused(Refused, controller.execute(plan, "oncall", wrong), TARGET)
        await refused(NotFound, controller.execute("plan-99", "oncall", TARGET), "plan-99")
        for name in ("../authority", "", "a" * 100, "plan\x00", "\u202eplan"):
            await refused(NotFound, controller.execute(name, "oncall", TARGET))
        await untouched(world, then, seconds=5.0)
        assert await world.plan_state(plan) is State.AWAITING_APPROVAL

    run(keys_dir, story)


def test_approvals_that_expired_since_do_not_run_a_plan(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        document = await world.propose("switchover", TARGET)
        plan, controller = document.record.plan.id, world.standby(TARGET)
        then = await before(world)
        await world.approve(controller, document, ADA, seconds=20)
        await world.approve(controller, document, GRACE, seconds=600)
        await world.wait(21.0)
        await refused(ApprovalRequired, controller.execute(plan, "oncall", TARGET), "1 of 2")
        await world.approve(controller, document, ADA, seconds=600)  # the same person may sign again after expiry
        await untouched(world, then)
        await controller.execute(plan, "oncall", TARGET)
        await world.reached(plan, State.DONE)
        await settle(world)

    run(keys_dir, story)


def test_approvals_that_are_about_to_expire_do_not_run_a_plan(keys_dir: Path) -> None:
    """Two TTLs must be left of each, because the executor may be paused between the check and the transaction."""

    async def story(world: World, active: Instance) -> None:
        document = await world.propose("switchover", TARGET)
        plan, controller = document.record.plan.id, world.standby(TARGET)
        then = await before(world)
        for who in (ADA, GRACE):
            await world.approve(controller, document, who, seconds=9.0)
        await controller.execute(plan, "oncall", TARGET)
        await untouched(world, then, seconds=12.0)
        assert await world.plan_state(plan) is State.AWAITING_APPROVAL

    run(keys_dir, story)


def test_an_expired_plan_is_swept_whether_it_was_approved_or_not(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        document = await world.propose("switchover", TARGET)
        plan, controller = document.record.plan.id, world.standby(TARGET)
        then = await before(world)
        await world.wait(50.0)
        assert await world.plan_state(plan) is State.EXPIRED
        await refused(Refused, world.approve(controller, document, ADA, seconds=30), "expired")
        await refused(Refused, controller.execute(plan, "oncall", TARGET), "expired")
        await untouched(world, then)

    run(keys_dir, story, promotion={"plan_ttl_seconds": 45.0, "approval_ttl_seconds": 45.0})


def test_a_planned_move_is_void_when_another_epoch_began_since(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        document = await world.propose("switchover", TARGET)
        plan = document.record.plan.id
        for who in (ADA, GRACE):
            await world.approve(world.standby(TARGET), document, who)
        await world.kill(active.region, active.name)  # its neighbour takes over, in another epoch
        await world.until(lambda: world.active_in(HOME), 30, "the neighbour serving")
        then = await before(world)
        await world.reached(plan, State.VOID)
        assert "epoch" in (await world.plan(plan)).reason
        await refused(Refused, world.standby(TARGET).execute(plan, "oncall", TARGET), "void")
        await untouched(world, then)

    run(keys_dir, story)


def test_a_failover_from_a_silent_region_is_void_once_that_region_serves_again(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        for name in ("a", "b"):
            await world.kill(HOME, name)
        await world.wait(8.0)
        document = await world.propose("failover", TARGET)
        for who in (ADA, GRACE):
            await world.approve(world.standby(TARGET), document, who)
        world.start(HOME, "b")
        await world.until(lambda: world.active_in(HOME), 30, "home serving again")
        then = await before(world)
        with contextlib.suppress(Refused):  # it may be void already
            await world.standby(TARGET).execute(document.record.plan.id, "oncall", TARGET)
        await world.reached(document.record.plan.id, State.VOID)
        await untouched(world, then)

    run(keys_dir, story)


def test_a_plan_seen_with_a_small_loss_does_not_run_with_a_great_one(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        document = await world.propose("failover", TARGET)
        assert document.record.plan.evidence.loss.exact
        world.isolate_stores_of(HOME)
        await world.wait(20.0)
        world.cut_store(HOME)
        await world.kill(HOME, "b")
        await world.kill(HOME, "a")
        await world.wait(8.0)
        authority, zone = await world.authority(), world.zone.history[-1]
        plan = await world.let_run(document)
        await world.reached(plan, State.VOID)
        assert "loss of" in (await world.plan(plan)).reason
        assert (await world.authority(), world.zone.history[-1]) == (authority, zone)
        await settle(world)

    run(keys_dir, story)


def test_two_plans_at_once_raise_one_barrier_and_the_other_is_void(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        documents: list[PlanDocument] = [await world.propose("switchover", TARGET), await world.propose("switchover", THIRD)]
        for document in documents:
            await world.let_run(document)
        ids = [document.record.plan.id for document in documents]

        async def both_ended() -> bool:
            return all([(await world.plan(plan)).ended for plan in ids])

        await world.until(both_ended, 90, "both plans being over")
        records = [await world.plan(plan) for plan in ids]
        done = [record for record in records if record.state is State.DONE]
        assert len(done) == 1
        assert {record.state for record in records} == {State.DONE, State.VOID}
        assert world.active_in(done[0].plan.target)
        await settle(world)

    run(keys_dir, story)


def test_signing_while_a_plan_runs_does_no_harm(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        document = await world.propose("switchover", TARGET)
        plan = await world.let_run(document)
        await world.reached(plan, State.QUIESCING)
        await world.approve(world.standby(TARGET), document, LINUS)
        await world.reached(plan, State.DONE)
        record = await world.plan(plan)
        assert set(record.approvers) >= {ADA, GRACE}
        await refused(Refused, world.approve(world.standby(TARGET), document, LINUS), "done")
        await refused(Refused, world.standby(TARGET).execute(plan, "oncall", TARGET), "done")
        await settle(world)

    run(keys_dir, story)


# ------------------------------------------------------------------------------------------------- abort, break-glass


@pytest.mark.parametrize("state", [State.AWAITING_APPROVAL, State.QUIESCING])
def test_a_plan_can_be_aborted_before_the_authority_moves_and_the_group_serves_on(keys_dir: Path, state: State) -> None:
    async def story(world: World, active: Instance) -> None:
        document = await world.propose("switchover", TARGET)
        plan = document.record.plan.id
        zone = world.zone.history[-1]
        if state is State.QUIESCING:
            await world.let_run(document)
            await world.reached(plan, State.QUIESCING)
        await world.standby(THIRD).abort(plan, "oncall", "changed our minds")
        assert await world.plan_state(plan) is State.ABORTED
        await world.until(lambda: world.active_in(HOME), 30, "home serving on")
        await world.wait(2.0)
        authority = await world.authority()
        assert (authority.region, authority.barrier) == (HOME, None)
        assert world.zone.history[-1] == zone
        await refused(Refused, world.standby(THIRD).abort(plan, "oncall", "again"), "aborted")
        await settle(world)

    run(keys_dir, story)


def test_after_the_authority_moved_there_is_no_abort(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        plan = await world.order("switchover", TARGET)

        async def moved() -> bool:
            return (await world.authority()).region == TARGET

        await world.until(moved, 60, "the authority moving")
        await refused(Refused, world.standby(THIRD).abort(plan, "oncall", "too late"), "only before the authority moves")
        await world.reached(plan, State.DONE)
        await settle(world)

    run(keys_dir, story)


def test_break_glass_needs_one_other_person_and_is_shouted_about(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        await world.lose_region(HOME)
        await world.wait(8.0)
        controller = world.standby(TARGET)
        document = await world.propose("failover", TARGET, requester=ADA, break_glass=True)
        plan = document.record.plan.id
        assert document.record.plan.kind is PlanKind.FAILOVER
        await refused(ApprovalRequired, controller.execute(plan, ADA, TARGET), "0 of 1")
        await refused(Refused, world.approve(controller, document, ADA), "asked for the plan")
        await world.let_run(document, people=[GRACE])
        await world.reached(plan, State.DONE)
        assert any(entry.action == "plan-break-glass" for entry in await controller.audit(0, 1000))
        await settle(world)

    run(keys_dir, story)


@pytest.mark.parametrize("via", [HOME, THIRD])
def test_any_controller_takes_orders_and_the_target_carries_them_out(keys_dir: Path, via: str) -> None:
    async def story(world: World, active: Instance) -> None:
        plan = await world.let_run(await world.propose("switchover", TARGET, via=via), via=via)
        await world.reached(plan, State.DONE)
        assert world.active_in(TARGET)
        await settle(world)

    run(keys_dir, story)


@pytest.mark.parametrize("swept", [True, False])
def test_approvals_that_expire_while_elections_keep_the_guard_alive_do_not_move_the_authority(
    keys_dir: Path, monkeypatch: pytest.MonkeyPatch, swept: bool
) -> None:
    """The executor is paused on the last step; every election arms the guard's lease anew. Others delete such a guard; a build
    in which nobody does is caught."""

    async def nobody(self: Takeover, plan_id: str) -> None:
        del self, plan_id

    if not swept:
        monkeypatch.setattr(Takeover, "sweep_guard", nobody)

    async def story() -> None:
        world = World(keys_dir)
        await world.served()
        await world.lose_region(HOME)
        await world.wait(7.0)
        document = await world.propose("failover", TARGET)
        instance, paused = world.someone(TARGET), asyncio.Event()
        for who in PEOPLE[:2]:
            await world.approve(instance.controller, document, who, seconds=18.0)

        async def pause(call: Call) -> None:
            if is_authorization(call) and not paused.is_set():
                paused.set()
                await world.clock.sleep(20.0)

        with world.effects(pause):
            await instance.controller.execute(document.record.plan.id, "oncall", TARGET)
            await world.until(paused.is_set, 6.0, "the executor being about to move the authority")
            for _ in range(7):
                await world.wait(3.0)
                world.cluster.change_leader()
            await world.wait(3.0)
        assert (await world.authority()).region == (HOME if swept else TARGET)
        assert set(violations(world)) == (set() if swept else {"people-approved"})

    run_virtual(story(), limit_seconds=400)
