"""The ways between an instance and the outside: they can be cut, slow, or watched; and the task wrapper that SIGSTOP needs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from controller.adapters.memory.coordinator import MemoryCluster, MemoryCoordinator
from controller.adapters.memory.gate import FaultGate
from controller.adapters.transactions import is_mutating
from controller.domain.model import (
    Baseline,
    CatalogueEntry,
    Commit,
    EpochStart,
    Fence,
    Head,
    Realignment,
    Salvage,
    SegmentRef,
    SnapshotRef,
)
from controller.errors import OutcomeUnknown, Unavailable
from controller.ports import (
    Compare,
    Coordinator,
    CoordinatorStatus,
    Item,
    Lease,
    Operation,
    Put,
    RegionStore,
    Renewal,
    Traffic,
    TrafficState,
    TxnResult,
)

if TYPE_CHECKING:
    from tests.simulation.world import Instance, World

T = TypeVar("T")

ETCD_TIMEOUT_SECONDS = 1.5
"""What the real adapter takes for a call with its retries."""


class HangingLeader(MemoryCoordinator):
    """An instance's etcd client. For those that the world says are ``behind_hanging_leader`` it is etcd 3.4 with a frozen disk:
    keep-alives are answered, and nothing else."""

    def __init__(self, cluster: MemoryCluster, road: Road) -> None:
        super().__init__(cluster, road)
        self._world, self._who = road._world, road._instance.key

    async def keep_alive(self, lease_id: int) -> Renewal:
        return Renewal(5, 2) if self._who in self._world.behind_hanging_leader else await super().keep_alive(lease_id)

    async def _before(self, op: str) -> None:
        if self._who in self._world.behind_hanging_leader:
            raise Unavailable(f"{op}: no answer", hint="the leader's disk hangs")
        await super()._before(op)


class Road(FaultGate):
    """One instance's way to one place. The world says whether it is cut and how long it takes."""

    def __init__(self, world: World, instance: Instance, what: str) -> None:
        self._world = world
        self._instance = instance
        self._what = what
        self._prompt = world.latency is None or 2 * world.latency[1] < ETCD_TIMEOUT_SECONDS
        super().__init__(asyncio.sleep)

    @property
    def cut(self) -> bool:
        return self._instance.dead or self._world.is_cut(self._instance, self._what)

    @cut.setter
    def cut(self, value: bool) -> None:
        """The base class sets it once; here the world decides."""

    @property
    def quick(self) -> bool:
        """Whether calls take no time now."""
        return not self._world.latency and not self._world.slow and not self.delay_seconds

    @property
    def prompt(self) -> bool:
        """Whether no call that is sent now can take as long as its sender waits for it, unless something happens meanwhile."""
        return self._prompt and not self._world.slow and not self.delay_seconds

    async def before(self, op: str) -> None:
        await super().before(op)
        if self._world.loses(self._instance, self._what, "requests"):
            raise Unavailable(f"{op}: not sent (road)", hint="a test cut this direction")

    async def after(self, op: str) -> None:
        await super().after(op)
        if self._world.loses(self._instance, self._what, "answers"):
            raise Unavailable(f"{op}: answer lost (road)", hint="a test cut this direction")

    async def _travel(self) -> None:
        if not self.quick:
            await asyncio.sleep(self.delay_seconds + self._world.delay(self._instance, self._what))


@dataclass(frozen=True)
class Call:
    """One call that changes something. ``target``: ``etcd``, ``zone`` or a store's region. ``what``: its arguments."""

    instance: Instance
    target: str
    op: str
    what: tuple[Any, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys that a transaction writes when its conditions hold."""
        then = self.what[1] if self.op == "txn" else ()
        return tuple(operation.key for operation in then if isinstance(operation, Put))

    def __str__(self) -> str:
        keys = ",".join(key.split("/", 3)[-1] for key in self.keys)
        return f"{self.instance.key} {self.target}.{self.op}({keys})"


class Through(Protocol):
    """How a watched call is sent."""

    def __call__(self, call: Call, send: Callable[[], Awaitable[T]], /) -> Awaitable[T]: ...


class WatchedCoordinator:
    """Gives up on calls that take too long, which may still arrive; shows calls that change something to the world."""

    def __init__(self, inner: Coordinator, through: Through, instance: Instance, road: Road) -> None:
        self._inner = inner
        self._through = through
        self._instance = instance
        self._road = road
        self._under_way: set[asyncio.Future[Any]] = set()

    async def txn(
        self, compare: Sequence[Compare], then: Sequence[Operation], otherwise: Sequence[Operation] = ()
    ) -> TxnResult:
        if not is_mutating(then, otherwise):
            return await self._timed("txn", self._inner.txn(compare, then, otherwise), mutating=False)
        call = Call(self._instance, "etcd", "txn", (tuple(compare), tuple(then), tuple(otherwise)))
        return await self._through(call, lambda: self._timed("txn", self._inner.txn(compare, then, otherwise), mutating=True))

    async def get(self, key: str) -> Item | None:
        return await self._timed("get", self._inner.get(key), mutating=False)

    async def list(self, prefix: str) -> tuple[Item, ...]:
        return await self._timed("list", self._inner.list(prefix), mutating=False)

    async def grant(self, ttl_seconds: int) -> Lease:
        call = Call(self._instance, "etcd", "grant", (ttl_seconds,))
        return await self._through(call, lambda: self._timed("grant", self._inner.grant(ttl_seconds), mutating=True))

    async def keep_alive(self, lease_id: int) -> Renewal:
        return await self._timed("keep_alive", self._inner.keep_alive(lease_id), mutating=False)

    async def revoke(self, lease_id: int) -> None:
        call = Call(self._instance, "etcd", "revoke", (lease_id,))
        await self._through(call, lambda: self._timed("revoke", self._inner.revoke(lease_id), mutating=True))

    async def status(self) -> CoordinatorStatus:
        return await self._timed("status", self._inner.status(), mutating=False)

    async def close(self) -> None:
        await self._inner.close()

    async def _timed(self, op: str, call: Coroutine[Any, Any, T], *, mutating: bool) -> T:
        if self._road.quick:
            return await call
        kind = OutcomeUnknown if mutating else Unavailable
        if self._road.prompt:  # a task and a timer would cost more than the call; only a frozen sender, or a road that becomes
            loop = asyncio.get_running_loop()  # slow at this moment, can be too late, and is told so when it looks
            began = loop.time()
            answer = await call
            if loop.time() - began >= ETCD_TIMEOUT_SECONDS:
                raise kind(f"etcd {op}: no answer in {ETCD_TIMEOUT_SECONDS} s", hint="re-read before deciding")
            return answer
        request = asyncio.ensure_future(call)
        self._under_way.add(request)
        request.add_done_callback(self._landed)
        try:
            async with asyncio.timeout(ETCD_TIMEOUT_SECONDS):
                return await asyncio.shield(request)
        except TimeoutError as error:
            raise kind(f"etcd {op}: no answer in {ETCD_TIMEOUT_SECONDS} s", hint="re-read before deciding") from error

    def _landed(self, request: asyncio.Future[Any]) -> None:
        self._under_way.discard(request)
        if not request.cancelled():
            request.exception()


class WatchedStore:
    """Shows calls that change something to the world."""

    def __init__(self, inner: RegionStore, through: Through, instance: Instance) -> None:
        self._inner = inner
        self._through = through
        self._instance = instance

    @property
    def region(self) -> str:
        return self._inner.region

    def _call(self, op: str, *what: object) -> Call:
        return Call(self._instance, self._inner.region, op, what)

    async def put_segment(self, fence: Fence, ref: SegmentRef, data: bytes) -> None:
        await self._through(self._call("put_segment", fence, ref, data), lambda: self._inner.put_segment(fence, ref, data))

    async def get_segment(self, ref: SegmentRef) -> bytes:
        return await self._inner.get_segment(ref)

    async def list_segments(self, stream: str, first_seq: int, limit: int = 1000) -> tuple[SegmentRef, ...]:
        return await self._inner.list_segments(stream, first_seq, limit)

    async def read_head(self, stream: str) -> Head:
        return await self._inner.read_head(stream)

    async def advance(self, fence: Fence, commit: Commit) -> Head:
        return await self._through(self._call("advance", fence, commit), lambda: self._inner.advance(fence, commit))

    async def fence(self, fence: Fence) -> Head:
        return await self._through(self._call("fence", fence), lambda: self._inner.fence(fence))

    async def realign(self, fence: Fence, expected: Head, to: Realignment) -> Head:
        return await self._through(self._call("realign", fence, expected, to), lambda: self._inner.realign(fence, expected, to))

    async def set_base(self, fence: Fence, expected: Head, to: Baseline) -> Head:
        call = self._call("set_base", fence, expected, to)
        return await self._through(call, lambda: self._inner.set_base(fence, expected, to))

    async def delete_segments(self, fence: Fence, refs: Sequence[SegmentRef]) -> None:
        call = self._call("delete_segments", fence, refs)
        await self._through(call, lambda: self._inner.delete_segments(fence, refs))

    async def put_snapshot(self, fence: Fence, ref: SnapshotRef, data: bytes) -> None:
        await self._through(self._call("put_snapshot", fence, ref, data), lambda: self._inner.put_snapshot(fence, ref, data))

    async def get_snapshot(self, ref: SnapshotRef) -> bytes:
        return await self._inner.get_snapshot(ref)

    async def list_snapshots(self, stream: str) -> tuple[SnapshotRef, ...]:
        return await self._inner.list_snapshots(stream)

    async def delete_snapshots(self, fence: Fence, refs: Sequence[SnapshotRef]) -> None:
        call = self._call("delete_snapshots", fence, refs)
        await self._through(call, lambda: self._inner.delete_snapshots(fence, refs))

    async def forget_epoch(self, fence: Fence, start: EpochStart) -> Head:
        return await self._through(self._call("forget_epoch", fence, start), lambda: self._inner.forget_epoch(fence, start))

    async def forget_salvage(self, fence: Fence, piece: Salvage) -> Head:
        call = self._call("forget_salvage", fence, piece)
        return await self._through(call, lambda: self._inner.forget_salvage(fence, piece))

    async def delete_diverged(self, fence: Fence, refs: Sequence[SegmentRef]) -> None:
        call = self._call("delete_diverged", fence, refs)
        await self._through(call, lambda: self._inner.delete_diverged(fence, refs))

    async def put_catalogue(self, fence: Fence, entries: Sequence[CatalogueEntry]) -> None:
        call = self._call("put_catalogue", fence, entries)
        await self._through(call, lambda: self._inner.put_catalogue(fence, entries))

    async def close(self) -> None:
        await self._inner.close()


class WatchedTraffic:
    """Shows changes of the zone to the world."""

    def __init__(self, inner: Traffic, through: Through, instance: Instance) -> None:
        self._inner = inner
        self._through = through
        self._instance = instance

    async def read(self) -> TrafficState:
        return await self._inner.read()

    async def change(self, fence: Fence, expected: TrafficState, weights: Mapping[str, int]) -> str:
        call = Call(self._instance, "zone", "change", (fence, expected, dict(weights)))
        return await self._through(call, lambda: self._inner.change(fence, expected, weights))

    async def in_sync(self, change_id: str) -> bool:
        return await self._inner.in_sync(change_id)


class Pausable(Coroutine[Any, Any, Any]):
    """A coroutine of an instance's task: makes no step while the instance is frozen. Cancellation waits, too.

    ``stepped`` is called after every step.
    """

    def __init__(self, inner: Coroutine[Any, Any, Any], owner: Instance, stepped: Callable[[Instance], None]) -> None:
        self._inner = inner
        self._owner = owner
        self._stepped = stepped
        self._wait: Generator[Any, None, Any] | None = None
        self._thrown: BaseException | None = None

    def send(self, value: Any) -> Any:
        return self._step(None)

    def throw(self, typ: Any, val: Any = None, tb: Any = None) -> Any:
        error: BaseException = typ if isinstance(typ, BaseException) else typ(val)
        return self._step(error)

    def _step(self, error: BaseException | None) -> Any:
        error = error or self._thrown
        if self._owner.stopped and not self._owner.dead:
            self._thrown = error
            return self._frozen()
        self._thrown = None
        try:
            return self._inner.send(None) if error is None else self._inner.throw(error)
        finally:
            self._stepped(self._owner)

    def _frozen(self) -> Any:
        """A future that is done when the instance may go on: what the task waits for instead."""
        loop = asyncio.get_running_loop()
        waiting: Any = loop.create_future()
        assert self._owner.frozen is not None
        thawing = self._owner.frozen

        async def thaw() -> None:
            await thawing.wait()
            if not waiting.done():
                waiting.set_result(None)

        # Outside of the instance, which is frozen itself.
        task: asyncio.Task[None] = asyncio.Task(thaw(), loop=loop)
        waiting.add_done_callback(lambda _: task.cancel())
        waiting._asyncio_future_blocking = True
        return waiting

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._inner.__await__()
