"""What must go on, or be told to people, although a part of it went wrong: nobody waits for ever in silence."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from controller.adapters.memory.coordinator import MemoryCluster
from controller.adapters.record_sets import Change
from controller.domain.model import Unknown
from controller.domain.promotion import PlanRecord, State
from controller.errors import DrError, OutcomeUnknown, Unavailable
from controller.lab.virtual_time import run_virtual
from controller.ports import Answer, Page, Put
from controller.runtime import watch
from controller.runtime.audit import Audit
from controller.runtime.documents import read_all
from controller.runtime.service import Incident, PlanRequest
from tests.simulation.roads import Call
from tests.simulation.world import ETCD, HOME, NAME, PEOPLE, TARGET, THIRD, Instance, World

Story = Callable[[World, Instance], Awaitable[None]]


def run(keys_dir: Path, story: Story, **changes: Any) -> None:
    """A group that serves, and then ``story``."""

    async def whole() -> None:
        world = World(keys_dir, **changes)
        await story(world, await world.served(agents=4, seconds=3.0))

    run_virtual(whole(), limit_seconds=4000)


async def incidents(world: World) -> list[Incident]:
    return [seen.value for seen in await read_all(world.coordinator, world.keys.incidents, Incident)]


async def plans(world: World) -> list[PlanRecord]:
    found = [seen.value for seen in await read_all(world.coordinator, world.keys.plans, PlanRecord)]
    return sorted(found, key=lambda record: record.plan.created_at)


def silent_pages(world: World) -> list[Page]:
    return [page for page in world.pager.pages if page.key.startswith(watch.SILENT)]


async def home_dies(world: World) -> None:
    await world.lose_region(HOME)
    await world.until(lambda: not world.actives(), 20, "nobody acting")


# ---------------------------------------------------------------------------------------------------------- incidents


def test_an_incident_whose_creation_was_not_answered_is_told_and_has_a_plan(
    keys_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = Audit.commit
    lost: list[str] = []

    async def loses_one_answer(self: Audit, *conditions: Any, **entry: Any) -> Any:
        result = await commit(self, *conditions, **entry)
        if entry["action"] == "incident" and result.succeeded and not lost:
            lost.append(entry["subject"])
            raise OutcomeUnknown("the answer was lost")
        return result

    async def story(world: World, active: Instance) -> None:
        monkeypatch.setattr(Audit, "commit", loses_one_answer)
        await home_dies(world)
        await world.until(lambda: bool(silent_pages(world)), 20, "a page")
        assert lost
        (incident,) = await incidents(world)
        (plan,) = await plans(world)
        assert incident.plan == plan.plan.id == incident.paged_plan
        await world.wait(60)
        assert len(silent_pages(world)) == 1
        assert len(await plans(world)) == 1

    run(keys_dir, story)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("number", range(5))
def test_whoever_dies_while_telling_people_others_tell_them(keys_dir: Path, number: int, moment: str) -> None:
    """The instance dies at its n-th transaction that has to do with the incident, before it arrives or after."""
    seen: list[str] = []

    async def story(world: World, active: Instance) -> None:
        async def dies(call: Call) -> None:
            mine = [key for key in call.keys if "/incidents/" in key or "/callers/" in key or "/plans/" in key]
            if not mine or call.instance.dead:
                return
            seen.extend(mine)
            if len(seen) == number + 1:
                world.die(call.instance)

        with world.effects(**{moment: dies}):
            await home_dies(world)
            await world.until(lambda: bool(silent_pages(world)), 60, "a page")

        async def settled() -> bool:
            (incident,) = await incidents(world)
            live = [record for record in await plans(world) if not record.ended]
            return bool(incident.paged_at) and [record.plan.id for record in live] == [incident.plan] == [incident.paged_plan]

        await world.until(settled, 60, "one plan that people know of")
        assert len(silent_pages(world)) <= 2

    run(keys_dir, story)


def test_a_page_that_reached_nobody_is_sent_again_and_written_down_once(
    keys_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(world: World, active: Instance) -> None:
        page, tries = world.pager.page, []

        async def fails(one: Page) -> None:
            tries.append(one)
            raise Unavailable("the webhook answers 503")

        monkeypatch.setattr(world.pager, "page", fails)
        await home_dies(world)
        await world.wait(30)
        (incident,) = await incidents(world)
        assert not incident.paged_at
        assert 4 <= len(tries) <= 40
        warnings = [(await world.standby(region).status()).warnings for region in (TARGET, THIRD)]
        assert any("503" in line for lines in warnings for line in lines)
        monkeypatch.setattr(world.pager, "page", page)
        await world.until(lambda: bool(silent_pages(world)), 20, "a page")
        actions = [entry.action for entry in await world.standby(TARGET).audit(0, 1000)]
        assert actions.count("page-failed") <= 4  # once for each standby that tried

    run(keys_dir, story)


def test_a_proposal_that_cannot_be_made_is_told_and_made_later(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        world.cut_store(THIRD)
        await home_dies(world)  # one store of three is left: no fence quorum, so every check says no
        await world.until(lambda: bool(silent_pages(world)), 30, "a page")
        assert "No plan is proposed" in silent_pages(world)[0].body
        await world.wait(90)
        assert len(silent_pages(world)) == 1
        world.cut_store(THIRD, cut=False)
        await world.until(lambda: len(silent_pages(world)) == 2, 60, "a page with a plan")
        (plan,) = await plans(world)
        assert plan.plan.id in silent_pages(world)[1].body

    run(keys_dir, story)


def test_a_plan_that_expired_is_proposed_again_and_one_that_people_refused_is_not(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        await home_dies(world)
        await world.wait(500)
        made = await plans(world)
        assert [record.state for record in made[:2]] == [State.EXPIRED, State.EXPIRED]
        assert not made[-1].ended
        assert len(silent_pages(world)) == 1, "people who know are not told of every replacement"
        controller = world.standby(TARGET)
        document = await controller.plan(made[-1].plan.id)
        await world.approve(controller, document, PEOPLE[0], "refuse", 60.0)
        await world.wait(300)
        assert len(await plans(world)) == len(made)

    run(keys_dir, story, promotion={"plan_ttl_seconds": 120, "approval_ttl_seconds": 100, "notice_seconds": 1.0})


def test_a_region_that_flaps_is_one_incident_until_it_has_served_again(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        await home_dies(world)
        await world.until(lambda: bool(silent_pages(world)), 20, "a page")
        for _ in range(4):  # it acquires, cannot open its epoch, and is gone again
            before = (await world.authority()).epoch
            world.start(HOME, "a")

            async def acquired(before: int = before) -> bool:
                return (await world.authority()).epoch > before

            await world.until(acquired, 30, "a new epoch")
            await world.kill(HOME, "a")
            await world.wait(20)
        (incident,) = await incidents(world)
        assert not incident.closed_at
        assert len(silent_pages(world)) == 1

        world.bring_back(HOME)
        await world.until(lambda: world.active_in(HOME), 40, "the region serving again")

        async def closed() -> bool:
            return all(found.closed_at for found in await incidents(world))

        await world.until(closed, 20, "the incident being closed")
        await home_dies(world)
        await world.until(lambda: len(silent_pages(world)) == 2, 30, "a page about the second silence")
        assert len({found.id for found in await incidents(world)}) == 2

    run(keys_dir, story)


# ------------------------------------------------------------------------------------------------ unreadable documents


@pytest.mark.parametrize("what", ["member", "report", "plan", "incident"])
def test_a_document_that_nobody_can_read_stops_nothing_and_is_shown(keys_dir: Path, what: str) -> None:
    async def story(world: World, active: Instance) -> None:
        keys = world.keys
        key = {
            "member": keys.member(THIRD, "new"),
            "report": keys.report("s99"),
            "plan": keys.plan("2024-old"),
            "incident": keys.incident(f"{watch.SILENT}.{HOME}.{watch.FOUNDING}.1"),
        }[what]
        MemoryCluster.txn(world.cluster, [], [Put(key, b'{"id": "x"}')], [])
        await world.kill(HOME, active.name)
        await world.until(lambda: world.active_in(HOME), 30, "the other instance")
        for seen_by in (world.actives()[0].controller, world.standby(TARGET)):
            await world.wait(1)
            assert any(key in warning for warning in (await seen_by.status()).warnings)
        await home_dies(world)
        await world.until(lambda: bool(silent_pages(world)), 30, "a page")
        plan = await world.order("failover", TARGET)
        await world.reached(plan, State.DONE)

    run(keys_dir, story)


def test_a_plan_whose_approvals_nobody_can_read_does_not_stop_another_one(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        """Both wait to be started by the same instance; the older one is spoiled before it can look."""
        await world.kill(TARGET, "b")
        world.cut(ETCD, TARGET)
        documents = [await world.propose("switchover", TARGET, via=THIRD) for _ in range(2)]
        spoiled, plan = [await world.let_run(document, via=THIRD) for document in documents]
        MemoryCluster.txn(world.cluster, [], [Put(world.keys.approval(spoiled, "x"), b"?")], [])
        world.heal(ETCD, TARGET)
        await world.reached(plan, State.DONE)
        assert await world.plan_state(spoiled) is State.VOID

    run(keys_dir, story)


# ---------------------------------------------------------------------------------------------------------- promotion


def test_a_record_in_the_zone_that_is_not_ours_is_told_once_and_the_region_serves_on(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        plan = await world.order("switchover", TARGET)
        foreign = {
            "Name": NAME,
            "Type": "AAAA",
            "TTL": 5,
            "SetIdentifier": HOME,
            "Weight": 0,
            "ResourceRecords": [{"Value": "::1"}],
        }

        async def past_authorize() -> bool:
            return await world.plan_state(plan) in (State.FENCING, State.CATCHING_UP, State.VERIFYING, State.RESUMING)

        await world.until(past_authorize, 60, "the authority moving")
        world.zone.apply([Change("CREATE", foreign)])
        await world.until(lambda: world.active_in(TARGET), 30, "the target serving")
        epoch = (await world.authority()).epoch
        await world.wait(60)
        assert (await world.authority()).epoch == epoch
        assert world.active_in(TARGET)
        assert await world.plan_state(plan) is State.ROUTING
        told = [page for page in world.pager.pages if page.key.startswith("promotion-")]
        assert len(told) == 1
        assert "route" in told[0].body
        world.zone.apply([Change("DELETE", foreign)])
        await world.reached(plan, State.DONE)
        assert (await world.authority()).epoch == epoch

    run(keys_dir, story)


class OddResolver:
    """The zone's own answers, but for servers that were given another one."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.odd: dict[tuple[str, str], Answer] = {}
        """(server, type) → its answer."""

    async def ask(self, name: str, rdtype: str) -> tuple[Answer, ...]:
        answers = await self.inner.ask(name, rdtype)
        return tuple(self.odd.get((answer.server, rdtype), answer) for answer in answers)


def oddly(world: World) -> dict[tuple[str, str], Answer]:
    """Gives every instance name servers that answer as the test says."""
    odd: dict[tuple[str, str], Answer] = {}
    for instance in world.instances.values():
        controller = instance.controller
        resolver = OddResolver(controller._ports.resolver)
        resolver.odd = odd
        controller._ports = replace(controller._ports, resolver=resolver)
    return odd


DEAD, LIVE = "memory-1:53", "memory-2:53"


def test_a_name_server_that_is_dead_is_named_and_does_not_hold_the_promotion_up(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        odd = oddly(world)
        odd[DEAD, "A"] = odd[DEAD, "TXT"] = Answer(DEAD, (), 0, "timeout")
        plan = await world.order("switchover", TARGET)
        await world.reached(plan, State.CONFIRMING)
        began = world.clock.monotonic()
        await world.reached(plan, State.DONE, 120)
        assert 20 <= world.clock.monotonic() - began <= 25
        journal = {entry.step: entry for entry in (await world.standby(TARGET).plan(plan)).journal}
        assert f"unconfirmed: {DEAD} (timeout)" in journal["confirm"].sentence
        assert any(f"unconfirmed: {DEAD}" in page.body for page in world.pager.pages)

    run(keys_dir, story, promotion={"confirm_timeout_seconds": 20.0})


@pytest.mark.parametrize(
    "wrong",
    [
        {(DEAD, "A"): Answer(DEAD, ("127.0.1.1",), 12)},
        {(DEAD, "TXT"): Answer(DEAD, ("1",), 12)},
        {(DEAD, "TXT"): Answer(DEAD, ("²", "9" * 5000), 12)},
        {(DEAD, "A"): Answer(DEAD, (), 0, "NXDOMAIN")},
    ],
    ids=["address", "epoch", "no epoch", "no name"],
)
def test_a_name_server_with_a_wrong_answer_is_never_taken_for_a_confirmation(
    keys_dir: Path, wrong: dict[tuple[str, str], Answer]
) -> None:
    async def story(world: World, active: Instance) -> None:
        odd = oddly(world)
        odd.update(wrong)
        plan = await world.order("switchover", TARGET)
        await world.reached(plan, State.CONFIRMING)
        ttl = next(iter(wrong.values())).ttl_seconds
        await world.wait(19 + ttl)
        assert not [page for page in world.pager.pages if page.key.startswith("promotion-")]
        await world.wait(60)
        assert await world.plan_state(plan) is State.CONFIRMING
        assert len([page for page in world.pager.pages if page.key.startswith("promotion-")]) == 1
        assert world.active_in(TARGET)
        odd.clear()
        await world.reached(plan, State.DONE)

    run(keys_dir, story, promotion={"confirm_timeout_seconds": 20.0})


def test_nobody_who_confirms_is_no_confirmation(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        odd = oddly(world)
        for server in (DEAD, LIVE):
            odd[server, "A"] = Answer(server, (), 0, "timeout")
        plan = await world.order("switchover", TARGET)
        await world.reached(plan, State.CONFIRMING)
        await world.wait(60)
        assert await world.plan_state(plan) is State.CONFIRMING
        odd.clear()
        await world.reached(plan, State.DONE)

    run(keys_dir, story, promotion={"confirm_timeout_seconds": 20.0})


# ------------------------------------------------------------------------------------------------------------ reports


def test_reports_come_in_time_although_the_home_store_is_silent(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        world.cut_store(HOME)
        world.cut_store(THIRD)  # no two stores either: a canary waits until its time is up
        latest = world.clock.wall()
        for _ in range(200):
            await world.wait(0.1)
            report = active.controller._lead.last_report if active.controller._lead else None
            assert report is not None
            assert world.clock.wall() - report.at < 1.5
            latest = max(latest, report.at)
        assert latest > world.clock.wall() - 1.5

    run(keys_dir, story, stream={"follow_seconds": 0.25, "canary_seconds": 2.0, "brownout_seconds": 600.0})


def test_a_copy_that_stands_on_another_history_is_not_counted_as_verified(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        world.isolate_stores_of(HOME)
        await world.wait(30)
        await home_dies(world)
        plan = await world.order("failover", TARGET)
        await world.reached(plan, State.DONE)
        world.isolate_stores_of(HOME, cut=False)
        world.heal(HOME)
        world.cut(HOME, TARGET)
        world.start(HOME, "a")  # it reads its old history,
        await world.wait(2)
        world.cut(HOME, HOME)  # then it cannot read its store any more, while the holder writes to it
        world.heal(HOME, TARGET)
        home = None
        for _ in range(150):
            await world.wait(0.1)
            holder = world.actives()[0].controller._lead
            assert holder is not None
            report = holder.last_report
            assert report is not None
            home = next(region for region in report.regions if region.region == HOME)
            assert holder.writer is not None
            fork = holder.writer.starts[-1].first_seq
            assert isinstance(home.verified_seq, Unknown) or home.verified_seq < fork
            assert HOME not in report.protected
        assert home is not None
        assert isinstance(home.verified_seq, Unknown)
        world.heal(HOME, HOME)

        async def protected() -> bool:
            active = world.actives()[0].controller._lead
            return active is not None and active.last_report is not None and HOME in active.last_report.protected

        await world.until(protected, 60, "the old region being protected again")

    run(keys_dir, story)


def test_a_follower_that_stopped_reading_protects_nobody(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        def protected() -> tuple[str, ...]:
            holder = active.controller._lead
            return holder.last_report.protected if holder is not None and holder.last_report is not None else ()

        await world.until(lambda: TARGET in protected(), 30, "protection")
        world.cut(TARGET, TARGET)  # its own controllers cannot read it; the holder goes on writing it
        await world.until(lambda: TARGET not in protected(), 12, "the loss of protection")
        world.heal(TARGET, TARGET)
        await world.until(lambda: TARGET in protected(), 30, "protection")

    run(keys_dir, story, rpo={"seconds": 600.0, "settle_seconds": 2.0, "report_seconds": 0.5})


def test_a_holder_whose_store_does_not_commit_is_not_ready(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        assert active.controller.ready()[0]
        for region in (HOME, TARGET, THIRD):
            world.cut_store(region)
        await world.wait(5)
        ready, why = active.controller.ready()
        assert not ready
        assert "waited" in why
        assert active.acts
        for region in (HOME, TARGET, THIRD):
            world.cut_store(region, cut=False)
        await world.until(lambda: active.controller.ready()[0], 20, "readiness")

    run(keys_dir, story)


# -------------------------------------------------------------------------------------------------------- break-glass


def test_break_glass_is_shouted_about_when_it_is_made_and_when_it_is_ordered(
    keys_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(world: World, active: Instance) -> None:
        def loud() -> list[Page]:
            return [page for page in world.pager.pages if page.key.startswith("break-glass")]

        page = world.pager.page

        async def fails(one: Page) -> None:
            raise Unavailable("the webhook answers 503")

        monkeypatch.setattr(world.pager, "page", fails)
        document = await world.propose("switchover", TARGET, via=TARGET, break_glass=True)
        plan = document.record.plan.id
        warnings = (await world.someone(TARGET).controller.status()).warnings
        assert any("people were not told" in line for line in warnings)
        assert any(plan in line and "break-glass" in line for line in warnings)
        monkeypatch.setattr(world.pager, "page", page)
        await world.until(lambda: len(loud()) == 1, 10, "the first page")
        assert plan in loud()[0].body
        assert loud()[0].severity == "critical"
        await world.let_run(document, PEOPLE[:1])
        instance = world.someone(TARGET)
        await world.ask(instance, instance.controller.execute(plan, "oncall", TARGET))  # again: nothing new
        assert len(loud()) == 2
        assert "ordered" in loud()[1].body
        await world.reached(plan, State.DONE)

    run(keys_dir, story)


def test_an_ordinary_plan_is_not_shouted_about(keys_dir: Path) -> None:
    async def story(world: World, active: Instance) -> None:
        await world.order("switchover", TARGET)
        with pytest.raises(DrError):
            await world.standby(TARGET).create_plan(PlanRequest("switchover", TARGET, "oncall", "", True))
        assert not [page for page in world.pager.pages if page.key.startswith("break-glass")]

    run(keys_dir, story)
