"""Faults of roads between regions that are long, lossy, or out of order (``relay.py``)."""

from __future__ import annotations

import asyncio
import random

from controller.domain.promotion import State
from tests.faults.faults import HOLD_SECONDS, Struck, fault, home_and_others
from tests.faults.people import GaveUp
from tests.faults.relay import Shape
from tests.faults.stage import Stage

FAR = Shape(delay=0.04)
"""There and back 80 ms, as between two continents' near ends."""


async def _works(stage: Stage) -> int:
    """The group is whole while the fault lasts, and stays at work for a while. Returns how many packets the relay carried.
    Raises GaveUp."""
    before = stage.network.carried().packets
    took = await stage.settled(60.0)
    await asyncio.sleep(HOLD_SECONDS)
    counts = stage.network.carried()
    stage.say(f"  whole after {took:.1f} s while it lasted; {counts}")
    return counts.packets - before


@fault("delay-80ms", "80 ms between all regions, there and back; the group must serve", relay=True, hold_seconds=0.0)
async def _(stage: Stage, rng: random.Random) -> Struck:
    stage.network.shape_all(FAR)
    return Struck(injected=await _works(stage))


@fault(
    "delay-one-way",
    "what the active region sends to another one takes 150 ms; what comes back, nothing",
    relay=True,
    hold_seconds=0.0,
)
async def _(stage: Stage, rng: random.Random) -> Struck:
    home, others = await home_and_others(stage)
    stage.network.shape(home, rng.choice(others), Shape(delay=0.15))
    return Struck(injected=await _works(stage))


@fault(
    "loss-2-percent", "two of a hundred packets between regions are lost, the rest takes 10 ms", relay=True, hold_seconds=0.0
)
async def _(stage: Stage, rng: random.Random) -> Struck:
    lost = stage.network.carried().lost
    stage.network.shape_all(Shape(delay=0.01, loss=0.02))
    await _works(stage)
    return Struck(injected=stage.network.carried().lost - lost)


@fault(
    "jitter-and-reordering",
    "10 to 60 ms between regions; one packet in ten arrives after later ones, one in fifty twice",
    relay=True,
    hold_seconds=0.0,
)
async def _(stage: Stage, rng: random.Random) -> Struck:
    before = stage.network.carried()
    stage.network.shape_all(Shape(delay=0.01, jitter=0.05, late=0.1, late_by=0.03, twice=0.02))
    await _works(stage)
    after = stage.network.carried()
    return Struck(injected=after.late - before.late + after.twice - before.twice)


@fault("delay-isolate-home", "80 ms between all regions, and then the active one is cut off; people move the group", relay=True)
async def _(stage: Stage, rng: random.Random) -> Struck:
    stage.network.shape_all(FAR)
    await stage.settled(60.0)
    home, _ = await home_and_others(stage)
    stage.network.isolate(home)
    return Struck([home], move=True)


@fault("delay-switchover", "a switchover with 80 ms between all regions", relay=True, hold_seconds=0.0)
async def _(stage: Stage, rng: random.Random) -> Struck:
    stage.network.shape_all(FAR)
    await stage.settled(60.0)
    _, others = await home_and_others(stage)
    record = await stage.people.ended(await stage.people.order("switchover", rng.choice(others)))
    if record.state is not State.DONE:
        raise GaveUp(f"the switchover ended {record.state.value}: {record.reason}")
    return Struck()
