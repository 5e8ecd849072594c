"""A whole group in memory: the real controllers on memory adapters, in virtual time. Nothing here decides anything.

A controller can be killed at any moment: its tasks are cancelled and its roads (gates) are cut, so that not even a ``finally``
reaches the outside. Regions' stores can be cut off and come back. Agents are plain coroutines that put records and remember
what was acknowledged.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controller.adapters.identity import SshIdentity, generate_key, sign
from controller.adapters.memory.coordinator import MemoryCluster, MemoryCoordinator
from controller.adapters.memory.gate import FaultGate
from controller.adapters.memory.pager import MemoryPager
from controller.adapters.memory.region_store import MemoryRegionStore, MemoryStore
from controller.adapters.memory.traffic import MemoryResolver, MemoryTraffic, MemoryZone
from controller.domain.approval import NAMESPACE, statement
from controller.domain.model import Ack, Authority, Holder, Role
from controller.domain.promotion import PlanRecord, State
from controller.errors import DrError, NotActive, Unavailable
from controller.lab.virtual_time import VirtualClock
from controller.ports import RegionStore, Traffic
from controller.runtime.bootstrap import bootstrap_group
from controller.runtime.controller import Controller, Ports
from controller.runtime.documents import Keys, decode, read_all
from controller.runtime.service import ApprovalRequest, PlanDocument, PlanRequest
from controller.settings import Settings
from controller.stream.segment import frame

REGIONS = ("eu-west-1", "eu-central-1", "us-east-1")
HOME = REGIONS[0]
PEOPLE = ("ada@example.org", "grace@example.org", "linus@example.org")
NAME = "agents.dr.example."

_OWNER: contextvars.ContextVar[str] = contextvars.ContextVar("owner", default="")


def settings_for(region: str, instance: str, keys_dir: Path, **changes: Any) -> Settings:
    """Settings of one controller; ``changes`` are whole sections."""
    base: dict[str, Any] = {
        "group": "sim",
        "environment": "lab",
        "region": region,
        "instance": instance,
        "state_dir": keys_dir,
        "etcd": {"endpoints": ["http://127.0.0.1:2379"], "ttl_seconds": 5, "margin_seconds": 1.0, "tick_seconds": 0.5},
        "regions": {
            name: {
                "bucket": f"dr-{name}",
                "table": f"dr-{name}",
                "addresses": [f"127.0.{number}.1"],
                "controllers": [f"http://127.0.{number}.1:8080"],
                "priority": number,
            }
            for number, name in enumerate(REGIONS, start=1)
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


def make_keys(directory: Path) -> Path:
    """One ed25519 key per person, and the file that lists them."""
    lines = []
    for who in PEOPLE:
        key = directory / who.split("@", maxsplit=1)[0]
        if not key.exists():
            generate_key(key, who)
        public = key.with_suffix(".pub").read_text().split()
        lines.append(f"{who} {public[0]} {public[1]}")
    (directory / "allowed_signers").write_text("\n".join(lines) + "\n")
    return directory


@dataclass
class Instance:
    """One controller process."""

    region: str
    name: str
    controller: Controller
    gate: FaultGate
    store_gates: dict[str, FaultGate]
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    log: list[str] = field(default_factory=list)
    main: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        return self.main is not None and not self.main.done()


class World:
    """Three regions, two controllers each. Create it inside a running (virtual) loop."""

    def __init__(self, keys_dir: Path, **changes: Any) -> None:
        self.loop = asyncio.get_running_loop()
        self.clock = VirtualClock(self.loop)
        self.keys_dir = keys_dir
        self.changes = changes
        self.cluster = MemoryCluster(self.clock)
        self.servers = {region: MemoryStore(region) for region in REGIONS}
        self.region_cut = dict.fromkeys(REGIONS, False)
        self.zone = MemoryZone(NAME, clock=self.clock)
        self.zone.provision(
            {region: [f"127.0.{number}.1"] for number, region in enumerate(REGIONS, start=1)},
            {region: 100 if region == HOME else 0 for region in REGIONS},
        )
        self.pager = MemoryPager()
        self.instances: dict[str, Instance] = {}
        self.acks: list[tuple[float, str, str, int, bytes]] = []
        """(when, agent, id, copies asked for, body) of everything that was acknowledged to an agent."""
        self.beliefs: list[str] = []
        self.keys = Keys("/dr", "sim")
        self._ids = itertools.count(1)
        self._lives = itertools.count(1)
        self.wrap_store: Callable[[RegionStore], RegionStore] = lambda store: store
        self.wrap_traffic: Callable[[Traffic], Traffic] = lambda traffic: traffic
        self.controller_class: type[Controller] = Controller
        self.loop.set_task_factory(self._task)

    def _task(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **options)
        owner = self.instances.get(_OWNER.get())
        if owner is not None:
            owner.tasks.add(task)
            task.add_done_callback(owner.tasks.discard)
        return task

    async def found(self) -> None:
        """Founds the group with the first region in authority."""
        await bootstrap_group(
            self.coordinator, self.clock, prefix="/dr", group="sim", region=HOME, stores=REGIONS, actor="test"
        )

    @property
    def coordinator(self) -> MemoryCoordinator:
        """The test's own view of etcd."""
        return MemoryCoordinator(self.cluster)

    # ------------------------------------------------------------------------------------------------ processes

    def start(self, region: str, name: str) -> Instance:
        """Starts a controller process, with an empty view."""
        key = f"{region}/{name}"
        gate = FaultGate(self.clock.sleep)
        store_gates = {other: FaultGate(self.clock.sleep) for other in REGIONS}
        for other, store_gate in store_gates.items():
            store_gate.cut = self.region_cut[other]
        ports = Ports(
            coordinator=MemoryCoordinator(self.cluster, gate),
            stores={other: self.wrap_store(MemoryRegionStore(self.servers[other], store_gates[other])) for other in REGIONS},
            traffic=self.wrap_traffic(MemoryTraffic(self.zone, REGIONS, gate)),
            resolver=MemoryResolver(self.zone),
            identity=SshIdentity(self.keys_dir / "allowed_signers", NAMESPACE, self.clock.wall),
            pager=self.pager,
            clock=self.clock,
            new_id=lambda: f"plan-{next(self._ids)}",
        )
        log: list[str] = []

        def say(event: str, **more: object) -> None:
            log.append(f"{self.clock.monotonic():8.2f} {key} {event} {more.get('role')} {more.get('reason')}")

        settings = settings_for(region, name, self.keys_dir, **self.changes)
        instance = Instance(region, name, self.controller_class(settings, ports, None, say), gate, store_gates, log=log)
        self.instances[key] = instance

        def run() -> asyncio.Task[None]:
            _OWNER.set(key)
            return self.loop.create_task(instance.controller.run(), name=f"{key}#{next(self._lives)}")

        instance.main = contextvars.copy_context().run(run)
        return instance

    def start_all(self) -> None:
        """Two controllers in each region."""
        for region in REGIONS:
            for name in ("a", "b"):
                self.start(region, name)

    async def kill(self, region: str, name: str) -> None:
        """SIGKILL: nothing of it runs any more and nothing that it sent later arrives."""
        instance = self.instances[f"{region}/{name}"]
        for gate in (instance.gate, *instance.store_gates.values()):
            gate.cut = True
        for _ in range(3):
            for task in list(instance.tasks):
                if task is not asyncio.current_task():
                    task.cancel()
            await asyncio.sleep(0)

    def cut_store(self, region: str, cut: bool = True) -> None:
        """The region's S3 and DynamoDB do not answer anybody (a frozen store), or do again."""
        self.region_cut[region] = cut
        for instance in self.instances.values():
            if instance.alive:
                instance.store_gates[region].cut = cut

    def isolate_stores_of(self, region: str, cut: bool = True) -> None:
        """Controllers of ``region`` reach only their own region's store."""
        for instance in self.instances.values():
            if instance.region == region and instance.alive:
                for other, gate in instance.store_gates.items():
                    if other != region:
                        gate.cut = cut

    async def lose_region(self, region: str) -> None:
        """Kills its controllers and freezes its store."""
        for instance in list(self.instances.values()):
            if instance.region == region and instance.alive:
                await self.kill(region, instance.name)
        self.cut_store(region)

    def bring_back(self, region: str) -> None:
        """The store answers again and its controllers start anew."""
        self.cut_store(region, cut=False)
        for name in ("a", "b"):
            self.start(region, name)

    # --------------------------------------------------------------------------------------------------- looking

    def actives(self) -> list[Instance]:
        """Instances that would serve an agent now."""
        return [found for found in self.instances.values() if found.alive and found.controller.may_act()]

    async def until(self, condition: Callable[[], bool | Awaitable[bool]], seconds: float, what: str) -> None:
        """Waits (virtually) until the condition holds. Fails with the logs of all controllers."""
        end = self.clock.monotonic() + seconds
        while True:
            self.check()
            result = condition()
            if await result if isinstance(result, Awaitable) else result:
                return
            for instance in self.instances.values():
                main = instance.main
                if main is not None and main.done() and not main.cancelled() and main.exception() is not None:
                    raise AssertionError(f"{instance.region}/{instance.name} crashed") from main.exception()
            if self.clock.monotonic() >= end:
                raise AssertionError(f"{what} did not happen within {seconds} s\n{self.story()}")
            await self.clock.sleep(0.05)

    async def wait(self, seconds: float) -> None:
        """Lets time pass, checking at every step."""
        end = self.clock.monotonic() + seconds
        await self.until(lambda: self.clock.monotonic() >= end, seconds + 1, "waiting")

    def check(self) -> None:
        """Never two active instances at the same time."""
        active = self.actives()
        if len(active) > 1:
            self.beliefs.append(", ".join(f"{found.region}/{found.name}" for found in active))

    def story(self) -> str:
        """All logs by time."""
        return "\n".join(sorted(line for instance in self.instances.values() for line in instance.log)[-120:])

    async def authority(self) -> Authority:
        item = await self.coordinator.get(self.keys.authority)
        assert item is not None
        return decode(Authority, item.value)

    async def holders(self) -> list[Holder]:
        return [seen.value for seen in await read_all(self.coordinator, self.keys.holders, Holder)]

    async def plan_state(self, plan: str) -> State:
        item = await self.coordinator.get(self.keys.plan(plan))
        assert item is not None
        return decode(PlanRecord, item.value).state

    def standby(self, region: str) -> Controller:
        """A live controller of a region."""
        for found in self.instances.values():
            if found.region == region and found.alive and found.controller.role in (Role.STANDBY, Role.ACTIVE):
                return found.controller
        raise AssertionError(f"nobody alive in {region}")

    # ---------------------------------------------------------------------------------------------------- agents

    async def put(self, agent: str, record_id: str, body: bytes, copies: int = 1) -> Ack | None:
        """One put to whoever is active; None when nobody took it. Remembers what was acknowledged."""
        for instance in self.actives():
            try:
                answer = await instance.controller.ingest([frame(agent, record_id, "checkpoint", body, copies=copies)])
            except (NotActive, Unavailable, DrError):
                return None
            ack = answer.acks[0]
            if ack.status in ("acknowledged", "duplicate"):
                self.acks.append((self.clock.wall(), agent, record_id, copies, body))
            return ack
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

    # ---------------------------------------------------------------------------------------------------- people

    async def approve(
        self, controller: Controller, document: PlanDocument, who: str, decision: str = "approve", seconds: float = 600.0
    ) -> PlanDocument:
        """Signs with the person's real key."""
        record = document.record
        expires_at = self.clock.wall() + seconds
        message = statement(record.plan.group, record.plan.id, record.digest, decision, who, expires_at)
        signature = sign(message, self.keys_dir / who.split("@", maxsplit=1)[0], NAMESPACE)
        request = ApprovalRequest(who, decision, expires_at, signature, record.digest)
        return await controller.approve(record.plan.id, request)

    async def order(self, kind: str, target: str, requester: str = "oncall") -> str:
        """Plans, gets it approved by two people and asks for it to run. Returns the plan's id."""
        controller = self.standby(target)
        document = await controller.create_plan(PlanRequest(kind, target, requester, "because"))
        for who in PEOPLE[:2]:
            document = await self.approve(controller, document, who)
        await controller.execute(document.record.plan.id, requester, target)
        return document.record.plan.id

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return self.loop.create_task(coroutine)
