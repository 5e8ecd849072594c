"""Faults in which AWS answers, and says no for a long time: throttling for minutes, credentials that have expired."""

from __future__ import annotations

import asyncio
import random

from controller.domain.promotion import State
from tests.faults.faults import Struck, fault, home_and_others, injected
from tests.faults.network import WORLD
from tests.faults.people import GaveUp
from tests.faults.stage import Stage

THROTTLED_SECONDS = 130.0
EXPIRED_SECONDS = 20.0
"""Several TTLs, and far longer than any call waits."""


async def _refuse(stage: Stage, places: list[str], seconds: float, *, fault: str, chance: float = 1.0) -> int:
    """The epoch must not change by it. Returns how many requests were refused. Raises GaveUp."""
    epoch, before = (await stage.holder()).epoch, await injected(stage, *places)
    for place in places:
        await stage.proxy(place, "break", fault=fault, chance=chance)
    await asyncio.sleep(seconds)
    after = (await stage.holder()).epoch
    if after != epoch:
        raise GaveUp(f"epoch {epoch} became {after}: somebody lost authority because of refusals")
    return await injected(stage, *places) - before


@fault(
    "throttled-long-home",
    "9 of 10 requests to the active region's store are throttled for 130 s; nobody is fenced",
    hold_seconds=0.0,
)
async def _(stage: Stage, rng: random.Random) -> Struck:
    home, _ = await home_and_others(stage)
    return Struck(injected=await _refuse(stage, [home], THROTTLED_SECONDS, fault="throttled", chance=0.9))


@fault("throttled-long-all", "6 of 10 requests to every store are throttled for 130 s; nobody is fenced", hold_seconds=0.0)
async def _(stage: Stage, rng: random.Random) -> Struck:
    return Struck(injected=await _refuse(stage, list(stage.regions), THROTTLED_SECONDS, fault="throttled", chance=0.6))


@fault("expired-home", "credentials for the active region's store have expired for 20 s", hold_seconds=0.0)
async def _(stage: Stage, rng: random.Random) -> Struck:
    home, _ = await home_and_others(stage)
    return Struck(injected=await _refuse(stage, [home], EXPIRED_SECONDS, fault="expired"))


@fault("expired-everywhere", "credentials for all stores and Route 53 have expired for 20 s; all waits", hold_seconds=0.0)
async def _(stage: Stage, rng: random.Random) -> Struck:
    return Struck(injected=await _refuse(stage, [*stage.regions, WORLD], EXPIRED_SECONDS, fault="expired"))


@fault(
    "expired-during-switchover", "all credentials expire in the middle of a switchover, for 20 s; it goes on", hold_seconds=0.0
)
async def _(stage: Stage, rng: random.Random) -> Struck:
    _, others = await home_and_others(stage)
    places = [*stage.regions, WORLD]
    before = await injected(stage, *places)
    plan = await stage.people.order("switchover", rng.choice(others))
    await stage.people.reaches(plan, rng.choice([State.FENCING, State.CATCHING_UP, State.ROUTING]))
    for place in places:
        await stage.proxy(place, "break", fault="expired")
    await asyncio.sleep(EXPIRED_SECONDS)
    for place in places:
        await stage.proxy(place, "clear")
    record = await stage.people.ended(plan)
    if record.state is not State.DONE:
        raise GaveUp(f"plan {plan} ended {record.state.value}: {record.reason}")
    return Struck(injected=await injected(stage, *places) - before)
