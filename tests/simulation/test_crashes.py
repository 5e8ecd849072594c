"""Whoever carries a promotion dies, or loses an answer, at each single thing that it does: the end is always the same.

The points are not written down by hand: a run without a crash counts every call that changes etcd, a store or the zone, from
the first approval until the plan is done. Then each point is tried: death just before the call, death just after it (it is
applied, nobody hears of it), and an answer that is lost while the caller lives on. Pairs of deaths are sampled.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from controller.domain.model import Role
from controller.domain.plan import STEPS
from controller.domain.promotion import State
from controller.errors import DrError, OutcomeUnknown, Refused, Unavailable
from controller.lab.virtual_time import run_virtual
from controller.runtime.controller import Controller
from controller.runtime.documents import read_all
from controller.runtime.service import JournalEntry, PlanDocument
from tests.simulation.checkers import check_all, live_history, lost_acks
from tests.simulation.roads import Call
from tests.simulation.world import HOME, PEOPLE, TARGET, Instance, World

KINDS = ("failover", "switchover")
FAULTS = ("kill-before", "kill-after", "lose-answer")
PAIRS = int(os.environ.get("PAIRS", "20"))
"""How many pairs of deaths are sampled of each kind of plan."""


def counts(call: Call) -> bool:
    """Whether a call is part of the promotion: what members and reports say of themselves is not."""
    return not any("/members/" in key or "/reports/" in key for key in call.keys)


@dataclass
class Strike:
    """One thing that goes wrong, at the ``number``-th counted call (0 = never)."""

    number: int
    fault: str


@dataclass
class Fate:
    """Counts calls, and lets strikes happen."""

    world: World
    strikes: list[Strike]
    calls: list[str] = field(default_factory=list)
    victims: list[Instance] = field(default_factory=list)
    _now: dict[int, Strike] = field(default_factory=dict)

    async def before(self, call: Call) -> None:
        if not counts(call):
            return
        self.calls.append(str(call))
        strike = next((strike for strike in self.strikes if strike.number == len(self.calls)), None)
        if strike is None:
            return
        self._now[id(call)] = strike
        if strike.fault == "kill-before":
            self._kill(call)

    @property
    def failed(self) -> bool:
        """Whether a call that was to be struck after it had been applied failed by itself (the dead region's store)."""
        return bool(self._now)

    async def after(self, call: Call) -> None:
        strike = self._now.pop(id(call), None)
        if strike is None:
            return
        if strike.fault == "kill-after":
            self._kill(call)
        self.victims.append(call.instance)
        raise OutcomeUnknown(f"{call}: the answer was lost", hint="a test lost it")

    def _kill(self, call: Call) -> None:
        self.victims.append(call.instance)
        self.world.die(call.instance)
        raise asyncio.CancelledError


async def insist(world: World, document: PlanDocument) -> None:
    """People who ask again, elsewhere, until they were heard."""
    plan = document.record.plan

    async def execute(controller: Controller, _: str) -> None:
        await controller.execute(plan.id, plan.requester, plan.target)

    async def sign(controller: Controller, who: str) -> None:
        await world.approve(controller, document, who)

    for who in PEOPLE[:2]:
        await _until_heard(world, plan.target, sign, who, "has decided")
    await _until_heard(world, plan.target, execute, "", "")


async def _until_heard(
    world: World, region: str, ask: Callable[[Controller, str], Coroutine[None, None, None]], who: str, enough: str
) -> None:
    for _ in range(40):
        alive = [instance for instance in world.instances.values() if instance.region == region and instance.alive]
        try:
            if alive:
                await world.ask(alive[0], ask(alive[0].controller, who))
                return
            await world.clock.sleep(0.5)
        except Unavailable:
            await world.clock.sleep(0.5)
        except Refused as error:
            if enough and enough in error.message:
                return
            if "changed" not in error.message:
                raise
    raise AssertionError("nobody listened to the operator")


async def story(keys_dir: Path, kind: str, strikes: list[Strike]) -> list[str]:
    """A small group and one promotion to the second region. Returns the counted calls."""
    world = World(keys_dir)
    await world.found()
    for region, name in ((HOME, "a"), (TARGET, "a"), (TARGET, "b")):
        world.start(region, name)
    await world.until(lambda: world.active_in(HOME), 20, "home being active")
    world.fleet(2, pause_seconds=0.5)
    await world.wait(1.5)
    if kind == "failover":
        world.isolate_stores_of(HOME)
        await world.wait(1.0)
        await world.lose_region(HOME)

        async def silent() -> bool:
            return not await world.holders()

        await world.until(silent, 20, "the old lease running out")
    document = await world.propose(kind, TARGET)
    fate = Fate(world, strikes)
    world.spawn(_doctor(world, fate))
    with world.effects(fate.before, fate.after):
        await insist(world, document)
        plan = document.record.plan.id
        await world.until(lambda: _ended(world, plan), 120, f"the {kind}")
    record = await world.plan(plan)
    struck_before = len(strikes) > 1 and record.state is State.VOID and "epoch" in record.reason
    struck_draining = record.state is State.ABORTED and "did not drain" in record.reason
    if struck_before or struck_draining:
        assert any(victim.region == HOME for victim in fate.victims), record.reason
        # The old holder died before the barrier stood, and came back in time; or it died before it proved that it drained: the
        # move is called off, home serves again, and the order is given anew.
        await world.until(lambda: world.active_in(HOME), 60, "home serving again")
        document = await world.propose(kind, TARGET)
        await insist(world, document)
        plan = document.record.plan.id
        await world.until(lambda: _ended(world, plan), 120, f"the second {kind}")
    await world.reached(plan, State.DONE, 1)
    await _same_end(world, plan, kind, fate)
    return fate.calls


async def _ended(world: World, plan: str) -> bool:
    return (await world.plan(plan)).ended


async def _doctor(world: World, fate: Fate) -> None:
    """Starts whoever died anew, some seconds later: longer than a lease, so that the other one has to take over."""
    healed = 0
    while True:
        await world.clock.sleep(0.25)
        if len(fate.victims) > healed:
            victim = fate.victims[healed]
            if not victim.alive:
                await world.clock.sleep(6.5)
                world.start(victim.region, victim.name)
            healed += 1


async def _same_end(world: World, plan: str, kind: str, fate: Fate) -> None:
    struck = [strike for strike in fate.strikes if strike.number and strike.number <= len(fate.calls)]
    assert fate.victims or fate.failed or not struck, "the point was never reached"
    authority = await world.authority()
    assert (authority.region, authority.barrier, authority.plan) == (TARGET, None, plan)
    await world.until(lambda: world.active_in(TARGET), 30, "the target serving")
    journal = {e.value.step: e.value for e in await read_all(world.coordinator, world.keys.journals(plan), JournalEntry)}
    assert set(journal) == set(STEPS)
    assert all(entry.finished_at >= entry.started_at > 0 for entry in journal.values()), journal
    for victim in fate.victims:
        await world.until(partial(_alive, world, victim), 20, "the victim's next life")
    await world.wait(1.0)
    for instance in world.instances.values():
        if instance.alive and not instance.acts:
            assert instance.controller.role is Role.STANDBY
    before = len(world.acks)
    await world.wait(0.75)
    assert len(world.acks) > before, "the fleet is not served"
    if kind == "switchover":
        assert lost_acks(world, live_history(world)) == []
    check_all(world)


def _alive(world: World, victim: Instance) -> bool:
    return world.instances[victim.key].alive


@pytest.fixture(scope="module", params=KINDS)
def reference(request: pytest.FixtureRequest, keys_dir: Path) -> tuple[str, list[str]]:
    """A kind of plan, and what its promotion does without trouble, call by call."""
    calls = run_virtual(story(keys_dir, request.param, []), limit_seconds=600)
    assert any("authority" in call and "plans/" in call for call in calls)
    assert sum("zone.change" in call for call in calls) == 2
    return request.param, calls


def _try(keys_dir: Path, kind: str, strikes: list[Strike], calls: list[str]) -> Iterator[str]:
    try:
        run_virtual(story(keys_dir, kind, strikes), limit_seconds=900)
    except (AssertionError, DrError, TimeoutError) as error:
        where = "; ".join(f"{strike.fault} at call {strike.number} ({calls[strike.number - 1]})" for strike in strikes)
        yield f"{kind}, {where}: {error}"


@pytest.mark.parametrize("fault", FAULTS)
def test_at_every_single_call_a_crash_or_a_lost_answer_leads_to_the_same_end(
    reference: tuple[str, list[str]], fault: str, keys_dir: Path
) -> None:
    kind, calls = reference
    wrong = [text for k in range(1, len(calls) + 1) for text in _try(keys_dir, kind, [Strike(k, fault)], calls)]
    assert not wrong, f"{len(wrong)} of {len(calls)} points: " + "\n\n".join(wrong)


def test_pairs_of_crashes_lead_to_the_same_end(reference: tuple[str, list[str]], keys_dir: Path) -> None:
    kind, calls = reference
    rng = random.Random(f"pairs of {kind}")
    wrong: list[str] = []
    for _ in range(PAIRS):
        first = rng.randint(1, len(calls))
        strikes = [Strike(first, rng.choice(FAULTS)), Strike(first + rng.randint(1, 12), rng.choice(FAULTS))]
        wrong += _try(keys_dir, kind, strikes, [*calls, *["?"] * 12])
    assert not wrong, f"{len(wrong)} of {PAIRS} pairs: " + "\n\n".join(wrong)
