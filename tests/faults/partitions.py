"""Partitions that make somebody else take over: of the holder's machine inside its region, and of the whole active region.

Each returns when the cut stands as it will stay until it is healed. Packets vanish, or nobody runs who could answer them.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from controller.domain.model import Holder
from controller.lab.supervisor import Lab
from tests.faults.machines import MachineNetwork, machine
from tests.faults.network import WORLD

INSIDE, BETWEEN = "inside", "between"
"""The neighbour in the same region takes over by itself; people move the group to another region."""
FLAPS = 3


class Cut(Protocol):
    """What a partition works on."""

    network: MachineNetwork
    lab: Lab


Strike = Callable[[Cut, Holder, random.Random], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Partition:
    """One line of the table."""

    name: str
    kind: str
    what: str
    strike: Strike


PARTITIONS: list[Partition] = []


def partition(name: str, kind: str, what: str) -> Callable[[Strike], None]:
    """Puts a function on the list."""

    def add(strike: Strike) -> None:
        PARTITIONS.append(Partition(name, kind, what, strike))

    return add


def _name(holder: Holder) -> str:
    return machine(holder.region, holder.instance)


# ------------------------------------------------------------------------------------------------------- inside a region


@partition("machine-unplugged", INSIDE, "the holder's cable is out")
async def _(stage: Cut, holder: Holder, rng: random.Random) -> None:
    stage.network.unplug(_name(holder))


@partition("machine-rules", INSIDE, "all packets to and from the holder vanish")
async def _(stage: Cut, holder: Holder, rng: random.Random) -> None:
    stage.network.deafen(_name(holder))
    stage.network.silence(_name(holder))


@partition("machine-deaf", INSIDE, "what the holder sends arrives, nothing reaches it")
async def _(stage: Cut, holder: Holder, rng: random.Random) -> None:
    stage.network.deafen(_name(holder))


@partition("machine-mute", INSIDE, "what others send reaches the holder, nothing that it sends arrives")
async def _(stage: Cut, holder: Holder, rng: random.Random) -> None:
    stage.network.silence(_name(holder))


@partition("machine-from-etcd", INSIDE, "the holder reaches agents and stores, but etcd no more")
async def _(stage: Cut, holder: Holder, rng: random.Random) -> None:
    stage.network.part_from_etcd(_name(holder), stage.lab.topology.regions[0].etcd.port)


@partition("machine-flaps", INSIDE, "the holder's cable is out and in a few times, then out")
async def _(stage: Cut, holder: Holder, rng: random.Random) -> None:
    for _ in range(FLAPS):
        stage.network.unplug(_name(holder))
        await asyncio.sleep(rng.uniform(0.2, 1.0))
        stage.network.plug(_name(holder))
        await asyncio.sleep(rng.uniform(0.1, 0.5))
    stage.network.unplug(_name(holder))


@partition("holder-stopped", INSIDE, "SIGSTOP to the holder until another one serves, then SIGCONT")
async def _(stage: Cut, holder: Holder, rng: random.Random) -> None:
    name = f"controller-{_name(holder)}"
    chosen = [process for process in stage.lab.processes() if process.name == name]
    stage.lab._process().signal(chosen, signal.SIGSTOP)


# ------------------------------------------------------------------------------------------------------- between regions


@partition("region-unplugged", BETWEEN, "all links of the active region are down")
async def _(stage: Cut, holder: Holder, rng: random.Random) -> None:
    for place in _others(stage, holder.region, world=True):
        stage.network.link_down(holder.region, place)


@partition("region-rules", BETWEEN, "all packets to and from the active region vanish")
async def _(stage: Cut, holder: Holder, rng: random.Random) -> None:
    stage.network.isolate(holder.region)


@partition("region-from-regions", BETWEEN, "the active region reaches DNS, Route 53 and people, but no other region")
async def _(stage: Cut, holder: Holder, rng: random.Random) -> None:
    for place in _others(stage, holder.region):
        stage.network.cut(holder.region, place)


@partition("region-deaf", BETWEEN, "what the active region sends to the others arrives, nothing of theirs reaches it")
async def _(stage: Cut, holder: Holder, rng: random.Random) -> None:
    for place in _others(stage, holder.region):
        stage.network.drop(place, holder.region)


@partition("region-mute", BETWEEN, "what the others send reaches the active region, nothing that it sends arrives")
async def _(stage: Cut, holder: Holder, rng: random.Random) -> None:
    for place in _others(stage, holder.region):
        stage.network.drop(holder.region, place)


@partition("region-flaps", BETWEEN, "the active region's links to the others go down and up a few times, then down")
async def _(stage: Cut, holder: Holder, rng: random.Random) -> None:
    others = _others(stage, holder.region)
    for _ in range(FLAPS):
        for place in others:
            stage.network.link_down(holder.region, place)
        await asyncio.sleep(rng.uniform(0.2, 1.0))
        for place in others:
            stage.network.link_up(holder.region, place)
        await asyncio.sleep(rng.uniform(0.1, 0.5))
    for place in others:
        stage.network.link_down(holder.region, place)


@partition("region-stopped", BETWEEN, "SIGSTOP to every process of the active region until another one serves, then SIGCONT")
async def _(stage: Cut, holder: Holder, rng: random.Random) -> None:
    stage.lab.signal(signal.SIGSTOP, region=holder.region)


def _others(stage: Cut, home: str, *, world: bool = False) -> list[str]:
    return [place for place in stage.network.places if place != home and (world or place != WORLD)]


def chosen(names: str) -> list[Partition]:
    """Partitions of these kinds, or whose names begin so (separated by commas); all without any. Raises ValueError."""
    wanted = [name for name in names.split(",") if name]
    found = [one for one in PARTITIONS if not wanted or any(one.name.startswith(w) or one.kind == w for w in wanted)]
    if not found:
        raise ValueError(f"no partition is called {names}; there are: {', '.join(one.name for one in PARTITIONS)}")
    return found
