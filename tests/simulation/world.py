"""A whole group in memory: the real controllers on memory adapters, in virtual time. Nothing here decides anything.

What may happen to an instance: it is killed (its tasks are cancelled and its roads are shut, so that not even a ``finally``
reaches the outside), it is frozen (nothing of it runs, its clock goes on, as under SIGSTOP), its clock stops or is wrong.
What may happen to a road between an instance and a store, etcd or the zone: it is cut, it is slow, it loses requests or
answers, or a request arrives after its sender has given up. All calls that change something pass ``before_effect`` and
``after_effect``, where a test may do any of this at exactly one point.

What happened is recorded at the servers, where no mutant of a client can hide it: see ``events.py``; ``checkers.py`` judges it.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import itertools
import os
import random
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from controller.adapters import sshsig
from controller.adapters.identity import SshIdentity, generate_key, load_private_key
from controller.adapters.memory.coordinator import MemoryCluster, MemoryCoordinator
from controller.adapters.memory.gate import OpenGate
from controller.adapters.memory.pager import MemoryPager
from controller.adapters.memory.region_store import MemoryRegionStore
from controller.adapters.memory.traffic import MemoryResolver, MemoryTraffic, MemoryZone
from controller.domain.approval import NAMESPACE, statement
from controller.domain.failsafe import Witness
from controller.domain.model import Ack, Authority, Fence, Frame, Head, Holder, IngestAnswer, Role
from controller.domain.promotion import PlanRecord, State
from controller.domain.sharing import stream_names, stream_of
from controller.errors import DrError, Unavailable
from controller.lab.virtual_time import VirtualClock
from controller.ports import Clock, Compare, RegionStore
from controller.runtime.bootstrap import bootstrap_group
from controller.runtime.controller import Controller, Ports
from controller.runtime.documents import Keys, decode, read_all
from controller.runtime.service import ApprovalRequest, PlanDocument, PlanRequest
from controller.settings import Settings
from controller.stream.segment import frame
from tests.simulation.events import AckSeen, History, RecordingCluster, RecordingStore
from tests.simulation.roads import Call, HangingLeader, Pausable, Road, WatchedCoordinator, WatchedStore, WatchedTraffic

T = TypeVar("T")

REGIONS = ("eu-west-1", "eu-central-1", "us-east-1")
HOME, TARGET, THIRD = REGIONS
ALL_REGIONS = (*REGIONS, "us-west-2", "ap-southeast-2")
"""What greater groups are made of."""
PEOPLE = ("ada@example.org", "grace@example.org", "linus@example.org")
OTHER_NAME = "lovelace@example.org"
"""Ada's key is listed under this name, too."""
NAME = "agents.dr.example."
STREAM = "s00"
ETCD, ZONE = "etcd", "zone"
EVERYBODY = "*"

_OWNER: contextvars.ContextVar[Instance | None] = contextvars.ContextVar("owner", default=None)
_WAY: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("way", default=())
"""The instances that the records at hand were handed to."""


def settings_for(region: str, instance: str, keys_dir: Path, **changes: Any) -> Settings:
    """Settings of one controller; ``changes`` are whole sections, and ``regions`` the names of the group's regions."""
    known = region, instance, keys_dir, repr(changes)
    if known not in _SETTINGS:
        if len(_SETTINGS) > 1000:
            _SETTINGS.clear()
        _SETTINGS[known] = _settings(region, instance, keys_dir, changes)
    return _SETTINGS[known]


_SETTINGS: dict[tuple[str, str, Path, str], Settings] = {}
"""They are frozen, and controllers of a simulation start again and again with the same."""


def _settings(region: str, instance: str, keys_dir: Path, given: Mapping[str, Any]) -> Settings:
    changes = dict(given)
    base: dict[str, Any] = {
        "group": "sim",
        "environment": "lab",
        "region": region,
        "instance": instance,
        "state_dir": _state_of(region, instance, keys_dir),
        "etcd": {"endpoints": ["http://127.0.0.1:2379"], "ttl_seconds": 5, "margin_seconds": 1.0, "tick_seconds": 0.5},
        "regions": {
            name: {
                "bucket": f"dr-{name}",
                "table": f"dr-{name}",
                "addresses": [f"127.0.{number}.1"],
                "controllers": [f"http://{letter}.{name}.invalid:8080" for letter in "ab"],
                "priority": number,
            }
            for number, name in enumerate(changes.pop("regions", REGIONS), start=1)
        },
        "stream": {"follow_seconds": 0.25, "canary_seconds": 2.0, "ack_timeout_seconds": 3.0},
        "rpo": {"seconds": 5.0, "settle_seconds": 2.0, "report_seconds": 0.5},
        "promotion": {"notice_seconds": 1.0, "tolerance_seconds": 10.0, "tolerance_records": 100, "drain_timeout_seconds": 15},
        "traffic": {"zone_id": "Z1SIM", "name": NAME},
        "dns": {"servers": ["127.0.0.31:5353"]},
        "approvals": {"allowed_signers": keys_dir / "allowed_signers"},
        "api": {"address": f"http://{instance}.{region}.invalid:8080"},
    }
    for section, values in changes.items():
        base[section] = {**base.get(section, {}), **values} if isinstance(values, dict) else values
    return Settings.model_validate(base)


def _states(keys_dir: Path) -> Path:
    """Files of controllers. Of this process alone, and one world after the other."""
    return keys_dir / f"state-{os.getpid()}"


def _state_of(region: str, instance: str, keys_dir: Path) -> Path:
    """A controller's own disk, which outlives its processes."""
    directory = _states(keys_dir) / f"{region}-{instance}"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def make_keys(directory: Path) -> Path:
    """One ed25519 key per person, the file that lists them, and one key that nobody listed (``mallory``)."""
    lines = []
    for who in PEOPLE:
        key = directory / who.split("@", maxsplit=1)[0]
        if not key.exists():
            generate_key(key, who)
        public = key.with_suffix(".pub").read_text().split()
        lines.append(f"{who} {public[0]} {public[1]}")
        if who == PEOPLE[0]:
            lines.append(f"{OTHER_NAME} {public[0]} {public[1]}")
    if not (directory / "mallory").exists():
        generate_key(directory / "mallory", "mallory@example.org")
    (directory / "allowed_signers").write_text("\n".join(lines) + "\n")
    return directory


@functools.lru_cache(maxsize=64)
def _private_key(path: Path) -> sshsig.PrivateKey:
    """People have their keys loaded."""
    key = load_private_key(path)
    assert key is not None
    return key


class InstanceClock(VirtualClock):
    """One machine's clock: it may stop while the machine goes on, or be wrong from the start."""

    stopped_at: float | None = None
    rate: float = 1.0
    """Seconds of this clock per true second. Set it before anybody reads the clock."""

    def monotonic(self) -> float:
        return super().monotonic() * self.rate if self.stopped_at is None else self.stopped_at

    def wall(self) -> float:
        return self.offset_wall + self.monotonic()

    def jump(self, seconds: float) -> None:
        """Somebody sets the wall clock, or NTP steps it. The monotonic clock does not notice."""
        self.offset_wall += seconds


@dataclass(eq=False)
class Instance:
    """One life of one controller process."""

    region: str
    name: str
    clock: InstanceClock
    controller: Controller = field(init=False)
    roads: dict[str, Road] = field(default_factory=dict)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    log: list[str] = field(default_factory=list)
    main: asyncio.Task[None] | None = None
    frozen: asyncio.Event | None = None
    """Set when it may go on; None: it was never frozen."""
    dead: bool = False

    @property
    def key(self) -> str:
        return f"{self.region}/{self.name}"

    @property
    def alive(self) -> bool:
        return not self.dead and self.main is not None and not self.main.done()

    @property
    def stopped(self) -> bool:
        """Whether nothing of it runs now."""
        return self.frozen is not None and not self.frozen.is_set()

    @property
    def honest(self) -> bool:
        """Whether its clock tells the time, which the lease's half of mutual exclusion relies on."""
        return self.clock.stopped_at is None

    @property
    def acts(self) -> bool:
        return bool(self.controller._actives) and self.alive and self.controller.may_act()

    def serves(self) -> frozenset[str]:
        """Streams that it would take records for now."""
        actives = self.controller._actives if self.alive else {}
        return frozenset(stream for stream, active in actives.items() if active.acts())


class WorldPeers:
    """The way to other instances: a call that dies and freezes with the one that is asked, and takes as long as roads take."""

    def __init__(self, world: World, me: Instance) -> None:
        self._world = world
        self._me = me

    async def _ask(self, address: str, ask: Callable[[Controller], Coroutine[Any, Any, T]]) -> T:
        world = self._world
        other = next((i for i in world.instances.values() if address == f"http://{i.name}.{i.region}.invalid:8080"), None)
        if other is None or not other.alive or self._me.dead or world.is_cut(self._me, other.key):
            raise Unavailable(f"{address} cannot be reached", hint="a test did it")
        await asyncio.sleep(world.delay(self._me, other.key))
        answer = await world.ask(other, ask(other.controller), 5.0)
        await asyncio.sleep(world.delay(self._me, other.key))
        return answer

    async def ingest(self, address: str, frames: Sequence[Frame]) -> IngestAnswer:
        _WAY.set((*_WAY.get(), address))
        self._world.hops.append(_WAY.get())
        return await self._ask(address, lambda controller: controller.peer_ingest(frames))

    async def write(self, address: str, lead: Fence, frames: Sequence[Frame]) -> tuple[Ack, ...]:
        who = lead.region, lead.instance, lead.epoch
        return await self._ask(address, lambda controller: controller.peer_write(*who, frames))

    async def positions(self, address: str) -> Mapping[str, int]:
        async def look(controller: Controller) -> Mapping[str, int]:
            return controller.peer_positions()

        return await self._ask(address, look)

    async def witness(self, address: str) -> Witness:
        async def look(controller: Controller) -> Witness:
            return controller.witness()

        return await self._ask(address, look)

    async def close(self) -> None:
        """Nothing is open."""


Hook = Callable[[Call], Awaitable[None]]


class World:
    """Three regions, two controllers each, unless it is said otherwise. Create it inside a running (virtual) loop."""

    def __init__(
        self,
        keys_dir: Path,
        *,
        seed: int = 0,
        latency: tuple[float, float] | None = None,
        checking: bool = True,
        regions: Sequence[str] = REGIONS,
        single: Sequence[str] = (),
        **changes: Any,
    ) -> None:
        """``single``: regions with one controller; the others have two. ``latency``: bounds of what each way of each call takes
        (seconds, uniform); None = nothing. ``checking`` False: rivals that act at the same time are only written down (for
        mutants)."""
        self.loop = asyncio.get_running_loop()
        self.clock = VirtualClock(self.loop)
        self.regions = tuple(regions)
        self.single = frozenset(single)
        self.rng = random.Random(seed)
        self.latency = latency
        self.keys_dir = keys_dir
        shutil.rmtree(_states(keys_dir), ignore_errors=True)
        self.changes = changes
        self.keys = Keys("/dr", "sim")
        self.streams = stream_names(changes.get("stream", {}).get("streams", 1))
        self.hops: list[tuple[str, ...]] = []
        """Ways that records took from one instance to the next."""
        self.history = History(self.clock, self.keys, streams=len(self.streams))
        self.cluster: MemoryCluster = RecordingCluster(self.clock, self.history)
        self.servers = {region: RecordingStore(region, self.history) for region in self.regions}
        self.zone = MemoryZone(NAME, clock=self.clock)
        self.zone.provision(
            {region: [f"127.0.{number}.1"] for number, region in enumerate(self.regions, start=1)},
            {region: 100 if region == HOME else 0 for region in self.regions},
        )
        self.cuts: set[tuple[str, str]] = set()
        """(who, what) that do not reach each other; ``who``: an instance's key, a region or everybody."""
        self.slow: dict[tuple[str, str], float] = {}
        """(who, what) → seconds that each way takes besides the latency."""
        self.one_way: set[tuple[str, str, str]] = set()
        """(who, what, ``requests`` or ``answers``) that get lost while the other direction works."""
        self.crash_after_steps: dict[str, int] = {}
        """An instance's key → how many more steps its tasks make before it dies, wherever that is."""
        self.watchers: list[Callable[[], None]] = []
        """Called whenever the story looks at the world: gauges of what must stay bounded."""
        self.overruns: list[str] = []
        """What such a gauge saw beyond its bound."""
        self.look_seconds = 0.05
        """How often a story looks whether what it waits for has happened. (Rivals are looked for after every step.)"""
        self.pager = MemoryPager()
        self.instances: dict[str, Instance] = {}
        self.former: list[Instance] = []
        self.beliefs: list[str] = []
        self.before_effect: Hook | None = None
        self.after_effect: Hook | None = None
        self.wrap_store: Callable[[RegionStore], RegionStore] = lambda store: store
        self.traffic_class: type[MemoryTraffic] = MemoryTraffic
        self.store_class: type[MemoryRegionStore] = MemoryRegionStore
        self.behind_hanging_leader: set[str] = set()
        """Instances whose etcd member is a leader that hangs (see ``roads.HangingLeader``)."""
        self.late_conditions: Callable[[Compare], bool] = lambda compare: True
        """Which comparisons a transaction still has when it arrives late; a mutant drops some."""
        self.coordinator_class: type[HangingLeader] = HangingLeader
        self.controller_class: type[Controller] = Controller
        self._checking = checking
        self._ids = itertools.count(1)
        self._lives = itertools.count(1)
        self._turns = itertools.count(0)
        self.loop.set_task_factory(self._task)

    def _task(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        context = options.get("context")
        owner = context.get(_OWNER) if context is not None else _OWNER.get()
        if owner is None:
            return asyncio.Task(coroutine, loop=loop, **options)
        task: asyncio.Task[Any] = asyncio.Task(Pausable(coroutine, owner, self._stepped), loop=loop, **options)
        owner.tasks.add(task)
        task.add_done_callback(owner.tasks.discard)
        if owner.dead:
            task.cancel()
        return task

    def _stepped(self, owner: Instance) -> None:
        """After every step of every task: never two that would serve an agent, at no instant."""
        if self.crash_after_steps and owner.key in self.crash_after_steps and not owner.dead:
            self.crash_after_steps[owner.key] -= 1
            if self.crash_after_steps[owner.key] <= 0:
                del self.crash_after_steps[owner.key]
                self.loop.call_soon(self.die, owner)
        if not owner.honest or not owner.acts:
            return
        for other in self.instances.values():
            if other is owner or not other.honest or not other.acts:
                continue
            if other.region != owner.region or len(self.streams) == 1 or other.serves() & owner.serves():
                self.beliefs.append(f"{self.clock.monotonic():.3f}: {owner.key} and {other.key}")

    @property
    def acks(self) -> list[AckSeen]:
        """Everything that was acknowledged to an agent, in order."""
        return self.history.acks

    async def found(self) -> None:
        """Founds the group with the first region in authority."""
        await bootstrap_group(
            self.coordinator,
            self.clock,
            prefix="/dr",
            group="sim",
            region=HOME,
            stores=self.regions,
            actor="test",
            streams=len(self.streams),
        )

    @property
    def coordinator(self) -> MemoryCoordinator:
        """The test's own view of etcd."""
        return MemoryCoordinator(self.cluster)

    # ------------------------------------------------------------------------------------------------ processes

    def start(self, region: str, name: str, *, wall_error: float = 0.0, rate: float = 1.0, **changes: Any) -> Instance:
        """Starts a controller process, with an empty view. ``wall_error``: seconds that its wall clock is ahead; ``rate``:
        how fast its clocks run."""
        clock = InstanceClock(self.loop, self.clock.offset_wall + wall_error)
        clock.rate = rate
        instance = Instance(region, name, clock)
        before = self.instances.get(instance.key)
        if before is not None:
            assert not before.alive, f"{instance.key} runs already"
            self.former.append(before)
        self.instances[instance.key] = instance
        instance.roads = {what: Road(self, instance, what) for what in (*self.regions, ETCD, ZONE)}
        settings = settings_for(region, name, self.keys_dir, **{"regions": self.regions, **self.changes, **changes})

        _state_of(region, name, self.keys_dir)

        def say(event: str, **more: object) -> None:
            at = self.clock.monotonic()
            instance.log.append(f"{at:8.2f} {instance.key} {event} {more.get('role')} {more.get('reason')}")

        instance.controller = self.controller_class(settings, self._ports(instance, clock), None, say)
        name_of_life = f"{instance.key}#{next(self._lives)}"
        instance.main = self._as(instance, instance.controller.run(), name_of_life)
        return instance

    def _ports(self, instance: Instance, clock: Clock) -> Ports:
        roads = instance.roads
        return Ports(
            coordinator=WatchedCoordinator(
                self.coordinator_class(self.cluster, roads[ETCD]), self._through, instance, roads[ETCD]
            ),
            stores={
                region: WatchedStore(self.wrap_store(self.store_class(server, roads[region])), self._through, instance)
                for region, server in self.servers.items()
            },
            traffic=WatchedTraffic(self.traffic_class(self.zone, self.regions, roads[ZONE]), self._through, instance),
            resolver=MemoryResolver(self.zone),
            identity=SshIdentity(self.keys_dir / "allowed_signers", NAMESPACE, clock.wall),
            pager=self.pager,
            clock=clock,
            new_id=lambda: f"plan-{next(self._ids)}",
            peers=WorldPeers(self, instance),
        )

    def _as(self, instance: Instance, coroutine: Coroutine[Any, Any, T], name: str | None = None) -> asyncio.Task[T]:
        """A task that dies, freezes and is counted with the instance."""

        def create() -> asyncio.Task[T]:
            _OWNER.set(instance)
            return self.loop.create_task(coroutine, name=name)

        return contextvars.copy_context().run(create)

    async def _through(self, call: Call, send: Callable[[], Awaitable[T]]) -> T:
        """The way of every call that changes something."""
        if self.before_effect is not None:
            await self.before_effect(call)
        answer = await send()
        if self.after_effect is not None:
            await self.after_effect(call)
        return answer

    def start_all(self) -> None:
        """Two controllers in each region, but for those that have one."""
        for region in self.regions:
            for name in ("a",) if region in self.single else ("a", "b"):
                if f"{region}/{name}" not in self.instances or not self.instances[f"{region}/{name}"].alive:
                    self.start(region, name)

    def die(self, instance: Instance) -> None:
        """SIGKILL, at once: nothing of it runs any more and nothing that it sends later arrives. Inside one of its own tasks
        the caller raises ``CancelledError`` right after this."""
        instance.dead = True
        if instance.frozen is not None:
            instance.frozen.set()
        for task in list(instance.tasks):
            if task is not asyncio.current_task():
                task.cancel()

    async def kill(self, region: str, name: str) -> None:
        """SIGKILL, and waits until nothing is left of it."""
        instance = self.instances[f"{region}/{name}"]
        for _ in range(20):
            self.die(instance)
            await asyncio.sleep(0)
            if not instance.tasks - {asyncio.current_task()}:
                return
        raise AssertionError(f"{instance.key} does not die: {instance.tasks}")

    def freeze(self, region: str, name: str) -> Instance:
        """SIGSTOP: nothing of it runs; what it has sent goes on its way; its clock goes on."""
        instance = self.instances[f"{region}/{name}"]
        instance.frozen = asyncio.Event()
        return instance

    def thaw(self, instance: Instance) -> None:
        """SIGCONT."""
        if instance.frozen is not None:
            instance.frozen.set()

    # ---------------------------------------------------------------------------------------------------- roads

    def cut(self, what: str, who: str = EVERYBODY) -> None:
        """``who`` and ``what`` (a region's store, etcd, the zone) do not reach each other any more."""
        self.cuts.add((who, what))

    def heal(self, what: str, who: str = EVERYBODY) -> None:
        """They do again."""
        self.cuts.discard((who, what))

    def heal_all(self) -> None:
        """Every road is open and fast, everybody who was frozen goes on."""
        self.cuts.clear()
        self.slow.clear()
        self.one_way.clear()
        self.behind_hanging_leader.clear()
        self.crash_after_steps.clear()
        for instance in self.instances.values():
            self.thaw(instance)

    def is_cut(self, instance: Instance, what: str) -> bool:
        return bool(self.cuts) and any((who, what) in self.cuts for who in (EVERYBODY, instance.region, instance.key))

    def loses(self, instance: Instance, what: str, way: str) -> bool:
        """Whether this direction of a road is interrupted (``is_cut`` knows the roads that are cut both ways)."""
        return bool(self.one_way) and any(
            (who, what, way) in self.one_way for who in (EVERYBODY, instance.region, instance.key)
        )

    def delay(self, instance: Instance, what: str) -> float:
        """Seconds that one way takes now."""
        seconds = self.rng.uniform(*self.latency) if self.latency else 0.0
        if self.slow:
            seconds += max((self.slow.get((who, what), 0.0) for who in (EVERYBODY, instance.region, instance.key)), default=0.0)
        return seconds

    def cut_store(self, region: str, cut: bool = True) -> None:
        """The region's S3 and DynamoDB do not answer anybody (a frozen store), or do again."""
        (self.cut if cut else self.heal)(region)

    def isolate_stores_of(self, region: str, cut: bool = True) -> None:
        """Controllers of ``region`` reach only their own region's store."""
        for other in self.regions:
            if other != region:
                (self.cut if cut else self.heal)(other, region)

    async def lose_region(self, region: str) -> None:
        """Kills its controllers and freezes its store."""
        for instance in list(self.instances.values()):
            if instance.region == region and instance.alive:
                await self.kill(region, instance.name)
        self.cut_store(region)

    def bring_back(self, region: str) -> None:
        """The store answers again and its controllers start anew."""
        self.cut_store(region, cut=False)
        self.isolate_stores_of(region, cut=False)
        for name in ("a", "b"):
            self.start(region, name)

    # --------------------------------------------------------------------------------------------------- looking

    def actives(self) -> list[Instance]:
        """Instances that would serve an agent now."""
        return [found for found in self.instances.values() if found.acts and not found.stopped]

    def serving(self) -> dict[str, Instance]:
        """Which instance would take records for which stream now. Two for one are not told apart here: ``check`` does."""
        return {stream: found for found in self.actives() for stream in found.serves()}

    def active_in(self, region: str) -> bool:
        """Whether all streams are served, by instances of ``region`` (one stream: by exactly one)."""
        regions = [found.region for found in self.actives()]
        if len(self.streams) == 1:
            return regions == [region]
        return set(regions) == {region} and set(self.serving()) == set(self.streams)

    def active_somewhere(self) -> bool:
        """Whether all streams are served, in one region."""
        return any(self.active_in(region) for region in self.regions)

    async def until(self, condition: Callable[[], bool | Awaitable[bool]], seconds: float, what: str) -> None:
        """Waits (virtually) until the condition holds. Fails with the logs of all controllers."""
        end = self.clock.monotonic() + seconds
        while True:
            self.check()
            result = condition()
            if await result if isinstance(result, Awaitable) else result:
                return
            if self.clock.monotonic() >= end:
                raise AssertionError(f"{what} did not happen within {seconds} s\n{self.story()}")
            await self.clock.sleep(self.look_seconds)

    async def wait(self, seconds: float) -> None:
        """Lets time pass, checking at every step."""
        end = self.clock.monotonic() + seconds
        await self.until(lambda: self.clock.monotonic() >= end, seconds + 1, "waiting")

    def check(self) -> None:
        """Nobody crashed, and there were never two active instances at the same time."""
        for watch in self.watchers:
            watch()
        for instance in self.instances.values():
            main = instance.main
            if main is not None and main.done() and not main.cancelled() and main.exception() is not None:
                raise AssertionError(f"{instance.key} crashed: {main.exception()!r}\n{self.story()}") from main.exception()
        if self._checking and self.beliefs:
            raise AssertionError(f"two active instances: {self.beliefs[0]}\n{self.story()}")

    def story(self) -> str:
        """All logs by time."""
        return "\n".join(sorted(line for instance in (*self.former, *self.instances.values()) for line in instance.log)[-150:])

    async def authority(self) -> Authority:
        item = await self.coordinator.get(self.keys.authority)
        assert item is not None
        return decode(Authority, item.value)

    async def holders(self) -> list[Holder]:
        return [seen.value for seen in await read_all(self.coordinator, self.keys.holders, Holder)]

    async def plan(self, plan: str) -> PlanRecord:
        item = await self.coordinator.get(self.keys.plan(plan))
        assert item is not None
        return decode(PlanRecord, item.value)

    async def plan_state(self, plan: str) -> State:
        return (await self.plan(plan)).state

    async def reached(self, plan: str, state: State, seconds: float = 60.0) -> None:
        """Waits until the plan is in this state."""

        async def there() -> bool:
            return await self.plan_state(plan) is state

        await self.until(there, seconds, f"plan {plan} being {state.value}")

    def standby(self, region: str) -> Controller:
        """A live controller of a region."""
        return self.someone(region).controller

    def someone(self, region: str) -> Instance:
        """A live instance of a region that can be asked."""
        for found in self.instances.values():
            if found.region == region and found.alive and not found.stopped:
                return found
        raise AssertionError(f"nobody alive in {region}")

    def role(self, region: str, name: str) -> Role:
        return self.instances[f"{region}/{name}"].controller.role

    # ---------------------------------------------------------------------------------------------------- agents

    async def ask(self, instance: Instance, coroutine: Coroutine[Any, Any, T], seconds: float = 8.0) -> T:
        """A request to an instance: what it does dies and freezes with it. Raises Unavailable when no answer comes."""
        task = self._as(instance, coroutine)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may wait for it any more
        await asyncio.wait({task}, timeout=seconds)
        if not task.done() or task.cancelled():
            raise Unavailable(f"{instance.key} did not answer", hint="ask another one")
        return task.result()

    async def put_to(self, instance: Instance, frames: Sequence[Frame], bodies: Sequence[bytes]) -> list[Ack]:
        """Sends records to one instance and remembers what it acknowledged, under which right."""
        return list(await self.ask(instance, self._ingest(instance, frames, bodies)))

    def _tenures(self) -> dict[tuple[str, int], tuple[Instance, Any]]:
        """Who holds what, by stream and epoch."""
        return {
            (stream, active.tenure.fence.epoch): (instance, active.tenure)
            for instance in self.instances.values()
            for stream, active in instance.controller._actives.items()
        }

    async def _ingest(self, instance: Instance, frames: Sequence[Frame], bodies: Sequence[bytes]) -> Sequence[Ack]:
        sent_at, began, tenures = self.clock.wall(), instance.clock.monotonic(), self._tenures()
        answer = await instance.controller.ingest(frames)
        tenures |= self._tenures()
        if len(self.streams) > 1 and instance.clock.monotonic() - began >= (answer.holder_seconds or 0.0):
            return [replace(ack, status="failed") for ack in answer.acks]  # too late, as an agent counts
        for one, body, ack in zip(frames, bodies, answer.acks, strict=True):
            if ack.status in ("acknowledged", "duplicate"):
                stream = stream_of(one.record.agent, len(self.streams))
                epoch = answer.epochs.get(stream, answer.epoch)
                holder, tenure = tenures.get((stream, epoch), (instance, None))
                writer = holder.controller._actives[stream].writer if stream in holder.controller._actives else None
                stamp_error = writer.now() - self.clock.wall() if writer is not None else 0.0
                self.history.acknowledged(
                    instance=instance.key,
                    honest=instance.honest,
                    epoch=epoch,
                    late_by=holder.clock.monotonic() - tenure.right.ends_at if tenure is not None else 0.0,
                    beyond_lease=tenure is not None and holder.clock.monotonic() >= tenure.right.deadline,
                    in_stores=sum(self._has(server.head(stream), ack.seq, epoch) for server in self.servers.values()),
                    agent=one.record.agent,
                    record_id=one.record.id,
                    copies=one.record.copies,
                    seq=ack.seq,
                    body=body,
                    sent_at=sent_at,
                    new=ack.status == "acknowledged",
                    stamp_error=stamp_error,
                )
        return answer.acks

    @staticmethod
    def _has(head: Head, seq: int, epoch: int) -> bool:
        """Whether a store has that segment, of that epoch's history or of what it was made of."""
        return head.seq >= seq > 0 and head.owner(seq) <= epoch

    async def put(self, agent: str, record_id: str, body: bytes, copies: int = 1) -> Ack | None:
        """One put to whoever is active; None when nobody took it."""
        actives = self.actives()
        first = next(self._turns) % len(actives) if actives else 0
        for instance in (*actives[first:], *actives[:first]):
            try:
                return (await self.put_to(instance, [frame(agent, record_id, "checkpoint", body, copies=copies)], [body]))[0]
            except DrError:
                return None
        return None

    def fleet(
        self, agents: int, pause_seconds: float = 0.3, copies: Callable[[int], int] = lambda n: 1 + n % 2
    ) -> list[asyncio.Task[None]]:
        """Agents that checkpoint for ever; an id is retried until it is acknowledged."""

        async def one(number: int) -> None:
            step = 0
            while True:
                body = (f"agent {number} " * 20 + f"step {step}").encode()
                ack = await self.put(f"agent-{number:03d}", f"{step:08d}", body, copies(number))
                if ack is not None and ack.status != "failed":
                    step += 1
                await self.clock.sleep(pause_seconds)

        return [self.loop.create_task(one(number)) for number in range(agents)]

    async def served(
        self, agents: int = 4, seconds: float = 3.0, copies: Callable[[int], int] = lambda n: 1 + n % 2
    ) -> Instance:
        """Founds the group, starts everybody, waits until agents have been served for a while. Returns the active instance."""
        await self.found()
        self.start_all()
        await self.until(self.active_somewhere, 20, "one active region")
        self.fleet(agents, copies=copies)
        await self.wait(seconds)
        await self.until(self.active_somewhere, 20, "one active region")
        return self.serving()[STREAM]

    # ---------------------------------------------------------------------------------------------------- people

    def signed(
        self,
        record: PlanRecord,
        who: str,
        decision: str = "approve",
        seconds: float = 600.0,
        *,
        key: str = "",
        plan: str = "",
    ) -> ApprovalRequest:
        """A decision signed with a real key: the person's own, or another one's (``key``), or for another plan."""
        expires_at = self.clock.wall() + seconds
        message = statement(record.plan.group, plan or record.plan.id, record.digest, decision, who, expires_at)
        signature = sshsig.make(_private_key(self.keys_dir / (key or who.split("@", maxsplit=1)[0])), message, NAMESPACE)
        return ApprovalRequest(who, decision, expires_at, signature, record.digest)

    async def approve(
        self, controller: Controller, document: PlanDocument, who: str, decision: str = "approve", seconds: float = 600.0
    ) -> PlanDocument:
        """Signs with the person's real key."""
        record = document.record
        return await controller.approve(record.plan.id, self.signed(record, who, decision, seconds))

    async def propose(
        self, kind: str, target: str, requester: str = "oncall", *, via: str = "", break_glass: bool = False
    ) -> PlanDocument:
        """Makes a plan at a controller of ``via`` (the target, if nothing is said)."""
        request = PlanRequest(kind, target, requester, "because", break_glass)
        instance = self.someone(via or target)
        return await self.ask(instance, instance.controller.create_plan(request))

    async def let_run(self, document: PlanDocument, people: Sequence[str] = PEOPLE[:2], via: str = "") -> str:
        """Gets a plan approved and asks for it to run. Returns its id."""
        plan = document.record.plan
        instance = self.someone(via or plan.target)
        for who in people:
            await self.ask(instance, self.approve(instance.controller, document, who))
        await self.ask(instance, instance.controller.execute(plan.id, plan.requester, plan.target))
        return plan.id

    async def order(self, kind: str, target: str, requester: str = "oncall") -> str:
        """Plans, gets it approved by two people and asks for it to run. Returns the plan's id."""
        return await self.let_run(await self.propose(kind, target, requester))

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return self.loop.create_task(coroutine)

    # ------------------------------------------------------------------------------------------------------ effects

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """The stores as checkers can read them (``sealed.py`` opens sealed objects)."""
        yield

    def client(self, region: str) -> MemoryRegionStore:
        """A road to a store that is always open: for what a network delivers late."""
        return MemoryRegionStore(self.servers[region], OpenGate())

    @contextmanager
    def effects(self, before: Hook | None = None, after: Hook | None = None) -> Iterator[None]:
        """Lets ``before`` and ``after`` see every call that changes something."""
        self.before_effect, self.after_effect = before, after
        try:
            yield
        finally:
            self.before_effect = self.after_effect = None
