"""One region's pump: ships closed segments to one store, in order: objects first, then one conditional head update for those
that have arrived (``flight``).

Pumps never wait for each other, so a slow or dead region delays nobody. A store that does not answer, or whose answer was
lost, is *attached* anew (fence, cut back, compare), and the pump goes on from what the store says.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from controller.domain import replication, retention
from controller.domain.model import EpochStart, Fence, Head
from controller.errors import Corrupt, DrError, FenceLost, Unavailable
from controller.ports import Clock, RegionStore
from controller.stream.flight import Flight
from controller.stream.history import Tail, copy_missing, cut_back, reseed
from controller.stream.log import Log

RETRY_SECONDS = 0.5
"""Pause of a pump between attempts at a store that does not answer."""


class Upstream(Protocol):
    """What a pump needs of its writer."""

    fence: Fence
    starts: tuple[EpochStart, ...]
    lost: str
    log: Log

    @property
    def seq(self) -> int: ...

    def chain_at(self, seq: int) -> str | None: ...

    def committed(self, pump: Pump) -> None: ...

    def lose(self, why: str) -> None: ...

    def counts_after(self, seq: int) -> tuple[int, int]: ...

    def home_copy(self) -> tuple[RegionStore, Head]: ...


@dataclass(slots=True)
class Pump:
    """One region's position. ``attached``: its head is known, fenced under our epoch and a prefix of our history."""

    region: str
    attached: bool = False
    head: Head | None = None
    why: str = "not attached yet"
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def seq(self) -> int:
        """Last segment committed there, as far as known: 0 when it was never reached."""
        return self.head.seq if self.head else 0


async def run(pump: Pump, store: RegionStore, up: Upstream, clock: Clock, depth: int) -> None:
    """Until the writer is lost. ``depth``: objects on their way at a time."""
    while not up.lost:
        try:
            if not pump.attached:
                await _attach(pump, store, up)
            elif pump.seq >= up.seq:
                pump.wake.clear()
                if pump.seq >= up.seq:
                    await pump.wake.wait()
            else:
                await _ship(pump, store, up, depth)
        except FenceLost as error:
            up.lose(f"store {pump.region}: {error.message}")
            return
        except DrError as error:
            # Whatever the store did with our last call, attaching anew reads it back. Corrupt and Misconfigured stay
            # visible in `why`; the other regions go on.
            pump.attached = False
            pump.why = error.message
            await clock.sleep(RETRY_SECONDS)


async def _attach(pump: Pump, store: RegionStore, up: Upstream) -> None:
    """Fences the store, cuts back what diverged, and checks that what is left is a prefix of our history."""
    head = await store.fence(up.fence)
    problem = replication.head_problem(head)
    if problem is not None:
        raise Corrupt(f"the head in {pump.region} is damaged: {problem}", hint=f"drctl verify {pump.region}")
    head = await cut_back(store, up.fence, head, up.seq, up.starts)
    ours = up.chain_at(head.seq)
    if ours is not None and ours != head.chain:
        raise _other_history(pump.region, head.seq)
    pump.head, pump.attached, pump.why = head, True, ""
    up.committed(pump)


async def _ship(pump: Pump, store: RegionStore, up: Upstream, depth: int) -> None:
    """Until the store has all that is closed, or what it lacks is not in memory: then one step of copying."""
    head = pump.head
    assert head is not None
    built = up.log.get(head.seq + 1)
    if built is None:
        pump.head = await _copy_from_home(pump, store, up, head)
        up.committed(pump)
        return
    if built.prev_chain != head.chain:
        raise _other_history(pump.region, head.seq)
    flight = Flight(store, up.fence, depth, pump.wake)
    try:
        while not up.lost and pump.seq < up.seq:
            pump.wake.clear()
            flight.load(up.log, head, up.seq)
            flight.commit(head, up.starts)
            if flight.empty():
                return  # the next one is no longer in memory
            await pump.wake.wait()
            landed = flight.landed()
            if landed is not None:
                pump.head = head = landed
                up.committed(pump)
    finally:
        await flight.end()


async def _copy_from_home(pump: Pump, store: RegionStore, up: Upstream, head: Head) -> Head:
    home, home_head = up.home_copy()
    if pump.region == home.region:
        raise Unavailable(
            f"segment {head.seq + 1} is neither in memory nor in the home store", hint=f"drctl verify {home.region}"
        )
    if home_head.seq <= head.seq:
        raise Unavailable(f"the home store does not have segment {head.seq + 1} yet", hint="wait")
    if retention.is_behind(head, home_head.base):
        records, size = up.counts_after(home_head.base - 1)
        return await reseed(store, up.fence, head, home_head, up.starts, (records, size))
    return await copy_missing(home, store, up.fence, head, Tail(home_head.seq, home_head.chain, up.starts))


def _other_history(region: str, seq: int) -> Corrupt:
    return Corrupt(f"the store of {region} holds another history than ours at segment {seq}", hint=f"drctl verify {region}")
