"""Holders with retention on memory stores in virtual time: opened as the controller opens them, killed, promoted elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from controller.adapters.memory.gate import FaultGate
from controller.adapters.memory.region_store import MemoryRegionStore, MemoryStore
from controller.domain import replication
from controller.domain.model import EpochStart, Fence, Head, SegmentRef
from controller.errors import DrError, Unavailable
from controller.lab.virtual_time import VirtualClock
from controller.runtime.retention import Retention, RetentionPolicy
from controller.stream.follower import Follower
from controller.stream.history import bring_home, fence_stores
from controller.stream.reader import read_record, warm
from controller.stream.segment import decode_segment, frame, next_chain
from controller.stream.view import View
from controller.stream.writer import StreamWriter, WriterLimits

STREAM, GROUP = "s00", "fleet"
REGIONS = ("eu-west-1", "eu-central-1", "us-east-1")
HOME, NEAR, FAR = REGIONS
MUTATING = {
    "put_segment", "advance", "fence", "realign", "set_base", "delete_segments", "put_snapshot", "delete_snapshots",
    "put_catalogue", "forget_epoch", "forget_salvage", "delete_diverged",
}  # fmt: skip


class Killed(Exception):
    """The holder died at this call."""


class Watched:
    """A store whose mutating calls a test counts and strikes."""

    def __init__(self, inner: MemoryRegionStore, world: World) -> None:
        self._inner = inner
        self._world = world

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._inner, name)
        if name not in MUTATING:
            return attribute

        async def call(*arguments: Any) -> Any:
            return await self._world.through(self._inner.region, name, lambda: attribute(*arguments))

        return call

    @property
    def region(self) -> str:
        return self._inner.region


@dataclass
class Holder:
    """One life of one instance that holds the stream."""

    region: str
    epoch: int
    view: View
    writer: StreamWriter
    retention: Retention
    lost: list[str] = field(default_factory=list)

    async def step(self) -> str | None:
        try:
            return await self.retention.step()
        except DrError as error:
            return f"! {error.message}"

    async def kill(self) -> None:
        await self.writer.stop("killed")


class World:
    """Create it inside a running (virtual) loop."""

    def __init__(
        self,
        *,
        retention_seconds: float = 100.0,
        regions: tuple[str, ...] = REGIONS,
        kind: type[Retention] = Retention,
        store: Callable[[MemoryStore], MemoryStore] = lambda server: server,
        **policy: Any,
    ) -> None:
        self.clock = VirtualClock()
        self.servers = {region: store(MemoryStore(region)) for region in regions}
        self.gates = {region: FaultGate(self.clock.sleep) for region in regions}
        self.policy = RetentionPolicy(retention_seconds=retention_seconds, **policy)
        self.kind = kind
        self.forks: tuple[EpochStart, ...] = ()
        self.epoch = 0
        self.expected: dict[str, tuple[str, bytes]] = {}
        """Agent → id and body of its newest acknowledged record."""
        self.bodies: dict[tuple[str, str], bytes] = {}
        self.calls: list[str] = []
        self.strike: Callable[[int, str], str] = lambda _number, _what: ""
        self.dead = False
        self.held: set[str] = set()
        """Calls ("region.method") that get no answer for as long as they are in here."""

    async def through(self, region: str, name: str, send: Callable[[], Awaitable[Any]]) -> Any:
        if self.dead:
            raise Unavailable("this instance is dead", hint="")
        while f"{region}.{name}" in self.held:
            await self.wait(0.05)
        self.calls.append(f"{region}.{name}")
        fault = self.strike(len(self.calls), self.calls[-1])
        if fault == "kill-before":
            self.dead = True
            raise Unavailable("killed before", hint="")
        answer = await send()
        if fault:
            self.dead = fault == "kill-after"
            raise Unavailable(f"{fault}: the answer was lost", hint="")
        return answer

    def stores(self) -> dict[str, Any]:
        return {region: Watched(MemoryRegionStore(self.servers[region], self.gates[region]), self) for region in self.servers}

    async def open(self, region: str = HOME, view: View | None = None) -> Holder:
        """Fences, chooses, brings home, catches up, opens: a promotion if somebody else held before."""
        self.epoch += 1
        self.dead = False
        fence = Fence(STREAM, self.epoch, region, f"i{self.epoch}")
        stores = self.stores()
        heads, _ = await fence_stores(stores, fence, 5.0)
        assert replication.quorum_lacks(tuple(self.servers), heads) is None
        choice = replication.choose(heads, self.forks, home=region, epoch=fence.epoch)
        head, tail = await bring_home(stores, heads, fence, region, self.forks, choice)
        view = view or View(None)
        follower = Follower(stores[region], view, STREAM, self.clock, GROUP)
        while view.position(STREAM)[0] < tail.seq or await warm(view, stores[region], 500):
            await follower.step(500, forced=True)
        self.forks = replication.with_fork(self.forks, EpochStart(fence.epoch, tail.seq + 1))
        lost: list[str] = []
        writer = StreamWriter(
            group=GROUP,
            fence=fence,
            stores=stores,
            home=region,
            home_head=head,
            tail=tail,
            view=view,
            clock=self.clock,
            may_act=lambda: True,
            on_lost=lost.append,
            limits=WriterLimits(ack_timeout_seconds=5.0),
        )
        writer.start()
        retention = self.kind(
            writer=writer, view=view, stores=stores, home=region, clock=self.clock, policy=self.policy, **self.more()
        )
        holder = Holder(region, self.epoch, view, writer, retention, lost)
        await self.put(holder, "opening", f"{fence.epoch}", b"opened", kind="opening")
        return holder

    def more(self) -> dict[str, Any]:
        return {}

    async def put(self, holder: Holder, agent: str, record_id: str, body: bytes, *, delta: bool = True, **more: Any) -> bool:
        """One record, as a delta against the newest when that is known. Returns whether it was acknowledged."""
        kind = more.setdefault("kind", "checkpoint")
        known = self.expected.get(agent) if delta and kind == "checkpoint" else None
        made = [frame(agent, record_id, body=body, previous=known, **more), frame(agent, record_id, body=body, **more)]
        for one in made:
            try:
                (ack,) = await holder.writer.submit([one])
            except DrError:
                return False
            if ack.status != "failed":
                self.bodies[agent, record_id] = body
                if kind == "checkpoint":
                    self.expected[agent] = (record_id, body)
                return True
            if (ack.error or {}).get("code") != "unknown_base":
                return False
        return False

    async def wait(self, seconds: float) -> None:
        await self.clock.sleep(seconds)

    async def steps(self, holder: Holder, count: int = 60, pause: float = 0.1) -> list[str]:
        """Retention's work, told."""
        said = []
        for _ in range(count):
            if (sentence := await holder.step()) is not None:
                said.append(sentence)
            await self.wait(pause)
        return said

    async def settled(self, holder: Holder, regions: tuple[str, ...] | None = None) -> None:
        """Until these stores have everything."""
        async with asyncio.timeout(60):
            while any(self.head(region).seq < holder.writer.seq for region in regions or self.servers):
                await self.wait(0.1)

    def head(self, region: str) -> Head:
        return self.servers[region].head(STREAM)

    def objects(self, region: str) -> list[SegmentRef]:
        return sorted(self.servers[region].objects, key=lambda ref: (ref.seq, ref.epoch))

    # ----------------------------------------------------------------------------------------------------- judging

    async def cold(self, region: str, gate: FaultGate | None = None) -> View:
        """A view made anew from one region's store alone."""
        view = View(None)
        store = MemoryRegionStore(self.servers[region], gate or FaultGate(self.clock.sleep))
        follower = Follower(store, view, STREAM, self.clock, GROUP)
        head = self.head(region)
        for _ in range(1000):
            await follower.step(200)
            if view.position(STREAM)[0] == head.seq and not await warm(view, store, 1000):
                return view
        raise AssertionError(f"the copy of {region} is not followed: {view.position(STREAM)} of {head.seq}")

    async def check_whole(self, region: str) -> None:
        """The store is a gap-free chained prefix from its base on, and no object that its head needs is missing."""
        head, server = self.head(region), self.servers[region]
        chain = head.base_chain
        for seq in range(head.base, head.seq + 1):
            data = server.get(SegmentRef(STREAM, seq, head.owner(seq)))
            assert decode_segment(data).header.prev_chain == chain
            chain = next_chain(chain, data)
        assert chain == head.chain
        for salvage in head.salvage:
            for seq in range(salvage.first_seq, salvage.last_seq + 1):
                assert SegmentRef(STREAM, seq, replication.owner(salvage.epochs, seq)) in server.objects

    async def check_restorable(self, region: str) -> View:
        """Every agent's newest state, and every record that the copy lists, comes back bit for bit from this store alone."""
        await self.check_whole(region)
        view = await self.cold(region)
        store = MemoryRegionStore(self.servers[region], FaultGate(self.clock.sleep))
        for agent, (record_id, body) in self.expected.items():
            found = view.latest(agent)
            assert found is not None, f"{region} lost agent {agent}"
            assert (found[0].id, found[1]) == (record_id, body), f"{region} has {found[0].id} of {agent}, not {record_id}"
        for summary in view.agents():
            for record in view.records(summary.agent, 10_000):
                if (summary.agent, record.id) in self.bodies:
                    _, body = await read_record(view, store, summary.agent, record.id)
                    assert body == self.bodies[summary.agent, record.id]
        return view
