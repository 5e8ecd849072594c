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
from controller.stream.flight import Copy, Flight, other_history
from controller.stream.history import cut_back, reseed
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
        raise other_history(pump.region, head.seq)
    pump.head, pump.attached, pump.why = head, True, ""
    up.committed(pump)


async def _ship(pump: Pump, store: RegionStore, up: Upstream, depth: int) -> None:
    """Until the store has all that is closed. What is no longer in memory is copied from the home store."""
    head = pump.head
    assert head is not None
    if up.log.get(head.seq + 1) is None and await _seeded(pump, store, up, head):
        return
    flight = Flight(store, up.fence, depth, pump.wake)
    try:
        while not up.lost and pump.seq < up.seq:
            pump.wake.clear()
            flight.load(head, up.seq, up.log, _copy(pump, up))
            flight.commit(head, up.starts)
            if flight.empty():
                raise Unavailable(f"the home store does not have segment {head.seq + 1} yet", hint="wait")
            await pump.wake.wait()
            landed = flight.landed()
            if landed is not None:
                pump.head = head = landed
                up.committed(pump)
    finally:
        await flight.end()


def _copy(pump: Pump, up: Upstream) -> Copy | None:
    home, head = up.home_copy()
    return None if home.region == pump.region else Copy(home, up.fence.stream, up.starts, head.seq, up.chain_at)


async def _seeded(pump: Pump, store: RegionStore, up: Upstream, head: Head) -> bool:
    """Whether the store was behind everything that is still kept, and begins anew now. Raises Unavailable for the home store:
    nobody has what it lacks."""
    home, home_head = up.home_copy()
    if pump.region == home.region:
        raise Unavailable(
            f"segment {head.seq + 1} is neither in memory nor in the home store", hint=f"drctl verify {home.region}"
        )
    if not retention.is_behind(head, home_head.base):
        return False
    records, size = up.counts_after(home_head.base - 1)
    pump.head = await reseed(store, up.fence, head, home_head, up.starts, (records, size))
    up.committed(pump)
    return True
