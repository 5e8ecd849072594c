"""One writer on memory stores that lie some way from it, in virtual time: what pumps and clients carry.

Nothing takes time but the way to another region, what a store takes for a call, and what protocol and bounds make of these. So
a rate that is found here is the same on every machine, and no core that is shared can be its reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field

import httpx

from controller.adapters.memory.gate import FaultGate
from controller.adapters.memory.region_store import MemoryRegionStore, MemoryStore
from controller.agent import AsyncCheckpoints
from controller.domain.model import Fence, Head
from controller.errors import DrError, Unavailable
from controller.lab.virtual_time import VirtualClock, run_virtual
from controller.stream.history import Tail
from controller.stream.segment import decode_frames, frame
from controller.stream.view import View
from controller.stream.writer import StreamWriter, WriterLimits

STREAM, HOME = "s00", "home"
BODY = b"state"


@dataclass(frozen=True, slots=True)
class Load:
    """What is offered. ``agents`` None: every record is of another agent, and goes to the writer at once; else they put through
    ``clients`` of ours with ``in_flight`` requests each, at random times, whatever the answers take."""

    rate: float
    """Records a second."""
    copies: int = 1
    seconds: float = 10.0
    """The second half is looked at."""
    agents: int | None = None
    clients: int = 2
    in_flight: int = 2


@dataclass(slots=True)
class Carried:
    """What happened in the second half of the load, by the second. ``lag_seconds``, ``behind``: at its end."""

    closed: float = 0.0
    """Segments that were closed."""
    segments: dict[str, float] = field(default_factory=dict)
    """Segments that a region's store committed."""
    records: dict[str, float] = field(default_factory=dict)
    lag_seconds: dict[str, float] = field(default_factory=dict)
    """Age of the oldest acknowledged record that a region lacks."""
    behind: dict[str, int] = field(default_factory=dict)
    """Segments that were closed and that a region lacks."""
    calls: dict[str, Counter[str]] = field(default_factory=dict)
    """Calls to each region's store, not by the second."""
    acknowledged: float = 0.0
    refused: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    """Seconds from the arrival to the acknowledgement of the records that came in that half."""

    def percentile(self, share: float) -> float:
        values = sorted(self.latencies)
        return values[int(share * (len(values) - 1))] if values else float("nan")


class Place:
    """Stores at their distances, and one writer."""

    def __init__(self, one_way_seconds: Mapping[str, float], store_seconds: float, limits: WriterLimits) -> None:
        self.clock = VirtualClock()
        self.ways = {HOME: 0.0, **one_way_seconds}
        self.servers = {region: MemoryStore(region) for region in self.ways}
        self.gates = {region: FaultGate(self.clock.sleep) for region in self.ways}
        self.stores = {region: MemoryRegionStore(self.servers[region], self.gates[region]) for region in self.ways}
        self._store_seconds = store_seconds
        self._limits = limits
        self.writer: StreamWriter

    async def open(self) -> None:
        fence = Fence(STREAM, 1, HOME, "a")
        head = await self.stores[HOME].fence(fence)
        self.writer = StreamWriter(
            group="g", fence=fence, stores=self.stores, home=HOME, home_head=head, tail=Tail(head.seq, head.chain, head.epochs),
            view=View(None), clock=self.clock, may_act=lambda: True, on_lost=lambda why: None, limits=self._limits,
        )  # fmt: skip
        for region, seconds in self.ways.items():
            self.gates[region].delay_seconds = seconds + self._store_seconds / 2
        self.writer.start()

    def heads(self) -> dict[str, Head]:
        return {region: server.head(STREAM) for region, server in self.servers.items()}

    def calls(self) -> dict[str, Counter[str]]:
        return {region: gate.calls.copy() for region, gate in self.gates.items()}


Put = Callable[[int], Awaitable[None]]


@contextlib.asynccontextmanager
async def _direct(place: Place, load: Load):  # type: ignore[no-untyped-def]
    async def put(number: int) -> None:
        made = frame(f"agent-{number}", "r", "checkpoint", BODY, copies=load.copies)
        (ack,) = await place.writer.submit([made])
        if ack.status == "failed":
            raise Unavailable(str(ack.error))

    yield put


class _Transport(httpx.AsyncBaseTransport):
    """A controller's answer to a batch, with nothing in between."""

    def __init__(self, place: Place) -> None:
        self._place = place

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        acks = await self._place.writer.submit(decode_frames(await request.aread()))
        answer = {"epoch": 1, "right_seconds": 1e6, "acks": [asdict(ack) for ack in acks]}
        return httpx.Response(200, content=json.dumps(answer), headers={"Content-Type": "application/json"}, request=request)


@contextlib.asynccontextmanager
async def _through_clients(place: Place, load: Load):  # type: ignore[no-untyped-def]
    dice, counts = random.Random("agents"), Counter[str]()
    assert load.agents is not None
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                AsyncCheckpoints(
                    [f"http://c{n}:1"], clock=place.clock, transport=_Transport(place), timeout_seconds=30.0,
                    attempt_seconds=15.0, rng=random.Random(n), in_flight=load.in_flight,
                )
            )
            for n in range(load.clients)
        ]  # fmt: skip

        async def put(number: int) -> None:
            del number
            who = dice.randrange(load.agents or 1)
            name = f"agent-{who}"
            counts[name] += 1
            await clients[who % load.clients].put(name, f"r{counts[name]}", BODY, copies=load.copies)

        yield put


async def _offer(place: Place, put: Put, load: Load, found: Carried) -> None:
    clock, dice = place.clock, random.Random("arrivals")
    began = due = clock.monotonic()
    running: set[asyncio.Task[None]] = set()

    async def one(number: int) -> None:
        at = clock.monotonic()
        try:
            await put(number)
        except DrError as error:
            found.refused[error.code] += 1
            return
        if at - began >= load.seconds / 2:
            found.latencies.append(clock.monotonic() - at)
        if load.seconds / 2 <= clock.monotonic() - began < load.seconds:
            found.acknowledged += 2 / load.seconds

    for number in itertools.count():
        due += 1 / load.rate if load.agents is None else dice.expovariate(load.rate)
        if due >= began + load.seconds:
            break
        if due > clock.monotonic():
            await clock.sleep(due - clock.monotonic())
        task = asyncio.create_task(one(number))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)


async def _carry(place: Place, load: Load) -> Carried:
    found = Carried()
    await place.open()
    try:
        async with (_direct if load.agents is None else _through_clients)(place, load) as put:
            offering = asyncio.create_task(_offer(place, put, load, found))
            half = load.seconds / 2
            await place.clock.sleep(half)
            before, calls, closed = place.heads(), place.calls(), place.writer.seq
            await place.clock.sleep(half - 1e-3)
            after, later = place.heads(), place.calls()
            found.closed = (place.writer.seq - closed) / half
            for region in place.ways:
                found.segments[region] = (after[region].seq - before[region].seq) / half
                found.records[region] = (after[region].records - before[region].records) / half
                found.behind[region] = place.writer.seq - after[region].seq
                found.lag_seconds[region] = place.writer.age_beyond(after[region].seq)
                found.calls[region] = later[region] - calls[region]
            await offering
    finally:
        await place.writer.stop("measured")
    return found


def carry(
    one_way_seconds: Mapping[str, float], load: Load, *, store_seconds: float = 0.0, limits: WriterLimits | None = None
) -> Carried:
    """``one_way_seconds``: to each further region; the home store is 0 away. ``store_seconds``: what every store takes for a
    call beside the way (S3 and DynamoDB in their own region: some 10 to 30 ms; the lab's stand-ins one or two)."""

    async def told() -> Carried:
        return await _carry(Place(one_way_seconds, store_seconds, limits or WriterLimits()), load)

    return run_virtual(told(), limit_seconds=3600.0)
