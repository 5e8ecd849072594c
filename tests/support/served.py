"""Real controllers behind their real HTTP API, in this process and in real time: no etcd, no AWS, no waiting for a lab.

Three regions stand on the memory adapters, one controller each, on free ports of 127.0.0.1, in one thread with its own loop.
So code that runs on the agents' side is tested over the wire that it will use, with a failover that two people sign::

    with ServedController(tmp_path) as served:
        client = Checkpoints(served.urls)
        ...
        served.fail_over()          # the active region is lost, a plan is made, approved twice and carried out
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import uvicorn

from controller.adapters.access import AccessDocument, new_token, read_document, with_entry, write_document
from controller.adapters.clock import SystemClock
from controller.adapters.identity import SshIdentity, generate_key, sign
from controller.adapters.keyring import Keyring
from controller.adapters.memory.coordinator import MemoryCluster, MemoryCoordinator
from controller.adapters.memory.gate import FaultGate
from controller.adapters.memory.key_service import MemoryKeyService, MemoryKms
from controller.adapters.memory.pager import MemoryPager
from controller.adapters.memory.region_store import MemoryRegionStore, MemoryStore
from controller.adapters.memory.traffic import MemoryResolver, MemoryTraffic, MemoryZone
from controller.adapters.sealed_store import SealedStore, Sealer
from controller.adapters.sealing import KEY_BYTES
from controller.domain.approval import NAMESPACE, statement
from controller.domain.promotion import State
from controller.lab.certificates import Authority
from controller.runtime.api import create_app
from controller.runtime.api_server import server_config
from controller.runtime.bootstrap import bootstrap_group
from controller.runtime.controller import Controller, Ports
from controller.runtime.credentials import Credentials, entrance
from controller.runtime.peers import HttpPeers
from controller.runtime.service import ApprovalRequest, PlanRequest
from controller.settings import Settings

T = TypeVar("T")

REGIONS = ("eu-west-1", "eu-central-1", "us-east-1")
TWIN = f"{REGIONS[0]}/b"
"""A second controller in the first region, if it is asked for."""
PEOPLE = ("ada@example.org", "grace@example.org")
NAME = "agents.dr.example."
GROUP = "served"
CALL_SECONDS = 60.0
"""Longest wait for anything here: a machine that is busy with other tests is slow, not wrong."""

_OWNER: contextvars.ContextVar[_Place | None] = contextvars.ContextVar("owner", default=None)
"""Whose task is running: all tasks of a region are ended with it, as the end of a process ends them."""


@dataclass(eq=False)
class _Place:
    """One controller with its API, and its region's store."""

    name: str
    region: str
    socket: socket.socket
    url: str
    store: MemoryStore
    gates: dict[str, FaultGate] = field(default_factory=dict)
    etcd_gate: FaultGate | None = None
    controller: Controller | None = None
    server: uvicorn.Server | None = None
    peers: HttpPeers | None = None
    credentials: Credentials | None = None
    main: list[asyncio.Task[Any]] = field(default_factory=list)
    """The controller and its API."""
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    """Every task that one of the two began, and they themselves."""

    @property
    def alive(self) -> bool:
        return bool(self.main) and not any(task.done() for task in self.main)


class ServedController:
    """A group of three regions. A context manager; every method may be called from any thread but its own.

    ``folder`` receives the approvers' keys. ``changes`` are sections of the settings, such as ``stream={"copies": 2}``.
    ``secured``: APIs over TLS, callers known by tokens (``token``), controllers by certificates; ``ca_file`` vouches for them.
    ``sealed``: objects are sealed by each region's own KMS, which is lost with its region.
    """

    def __init__(
        self,
        folder: Path,
        *,
        ttl_seconds: int = 2,
        twin: bool = False,
        secured: bool = False,
        sealed: bool = False,
        **changes: Any,
    ) -> None:
        self._folder = folder
        self.signer = Authority(folder / "tls") if secured else None
        self.access_file = folder / "access.json"
        self.plain_keys: list[bytes] = []
        """Every key that a KMS ever made or has: nobody may show them."""
        self.kms = {region: MemoryKms(region, self._remembered) for region in REGIONS} if sealed else {}
        self._ttl = ttl_seconds
        self._changes = changes
        self._loop = asyncio.new_event_loop()
        self._loop.set_task_factory(_owned)
        self._thread = threading.Thread(target=self._loop.run_forever, name="served", daemon=True)
        self._clock = SystemClock()
        self._cluster = MemoryCluster(self._clock)
        self._zone = MemoryZone(NAME, clock=self._clock)
        self.pager = MemoryPager()
        self._ids = itertools.count(1)
        self._said: list[str] = []
        self.places: dict[str, _Place] = {}
        stores = {region: MemoryStore(region) for region in REGIONS}
        for name in (*REGIONS, TWIN) if twin else REGIONS:
            region = name.split("/", maxsplit=1)[0]
            listening = socket.create_server(("127.0.0.1", 0))
            # asyncio does this for sockets that it makes itself; without it every answer waits 40 ms for a delayed ACK.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            url = f"http{'s' if secured else ''}://127.0.0.1:{listening.getsockname()[1]}"
            self.places[name] = _Place(name, region, listening, url, stores[region])

    def _remembered(self, count: int) -> bytes:
        made = os.urandom(count)
        self.plain_keys += [made] if count == KEY_BYTES else []
        return made

    # -------------------------------------------------------------------------------------------------------- life

    def start(self) -> ServedController:
        """Returns when the first region serves."""
        _make_keys(self._folder)
        self._thread.start()
        try:
            self._run(self._start())
            self.wait_until_active(REGIONS[0])
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Ends everything at once; nothing is left running."""
        if self._thread.is_alive():
            self._run(self._stop())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CALL_SECONDS)
            self._loop.close()
        for place in self.places.values():
            place.socket.close()

    def __enter__(self) -> ServedController:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(CALL_SECONDS)

    async def _start(self) -> None:
        self._zone.provision(
            {region: [f"127.0.{number}.1"] for number, region in enumerate(REGIONS, start=1)},
            {region: 100 if region == REGIONS[0] else 0 for region in REGIONS},
        )
        await bootstrap_group(
            MemoryCoordinator(self._cluster),
            self._clock,
            prefix="/dr",
            group=GROUP,
            region=REGIONS[0],
            stores=REGIONS,
            actor="test",
            streams=self._changes.get("stream", {}).get("streams", 1),
        )
        for place in self.places.values():
            contextvars.copy_context().run(self._start_place, place)

    def _start_place(self, place: _Place) -> None:
        region = place.name
        _OWNER.set(place)
        place.etcd_gate = gate = FaultGate(self._clock.sleep)
        place.gates = {other: FaultGate(self._clock.sleep) for other in REGIONS}
        settings = self._settings(place)
        credentials = Credentials(settings)
        place.credentials = credentials
        tls = credentials.client.context if credentials.client is not None else None
        place.peers = HttpPeers(10.0, tls=tls, token=credentials.peer_token)
        services = {other: MemoryKeyService(kms, place.gates[other]) for other, kms in self.kms.items()}
        seals = Keyring(GROUP, services, home=place.region, clock=self._clock) if services else None
        sealer = Sealer(GROUP, seals)
        stores = {other: MemoryRegionStore(self.places[other].store, place.gates[other]) for other in REGIONS}
        ports = Ports(
            coordinator=MemoryCoordinator(self._cluster, gate),
            stores={other: SealedStore(store, sealer) for other, store in stores.items()},
            traffic=MemoryTraffic(self._zone, REGIONS, gate),
            resolver=MemoryResolver(self._zone),
            identity=SshIdentity(self._folder / "allowed_signers", NAMESPACE, self._clock.wall),
            pager=self.pager,
            clock=self._clock,
            new_id=lambda: f"plan-{next(self._ids)}",
            peers=place.peers,
            seals=seals,
        )

        def say(event: str, **more: object) -> None:
            self._said.append(f"{self._clock.monotonic():.2f} {region} {event} {more.get('role')} {more.get('reason')}")

        place.controller = Controller(settings, ports, None, say)
        app = create_app(place.controller, clock=self._clock, entrance=entrance(settings, self._clock, credentials.access))
        place.server = uvicorn.Server(server_config(app, credentials.server, log_level="critical"))
        place.main = [
            self._loop.create_task(place.controller.run(), name=f"controller-{region}"),
            self._loop.create_task(place.server.serve(sockets=[place.socket]), name=f"api-{region}"),
        ]

    def _settings(self, place: _Place) -> Settings:
        base: dict[str, Any] = {
            "group": GROUP,
            "environment": "lab",
            "region": place.region,
            "instance": f"{place.region}-{'b' if place.name == TWIN else 'a'}",
            "state_dir": self._folder,
            "etcd": {
                "endpoints": ["http://127.0.0.1:2379"],
                "ttl_seconds": self._ttl,
                "margin_seconds": 0.4,
                "tick_seconds": 0.2,
            },
            "regions": {
                name: {
                    "bucket": f"dr-{name}",
                    "table": f"dr-{name}",
                    "addresses": [f"127.0.{number}.1"],
                    "controllers": [known.url for known in self.places.values() if known.region == name],
                    "priority": number,
                }
                for number, name in enumerate(REGIONS, start=1)
            },
            "stream": {"flush_seconds": 0.005, "follow_seconds": 0.05, "canary_seconds": 1.0, "ack_timeout_seconds": 5.0},
            "rpo": {"seconds": 5.0, "settle_seconds": 0.5, "report_seconds": 0.2},
            "promotion": {"notice_seconds": 0.2, "auto_propose": False},
            "traffic": {"zone_id": "Z1SERVED", "name": NAME},
            "dns": {"servers": ["127.0.0.31:5353"]},
            "approvals": {"allowed_signers": self._folder / "allowed_signers"},
            "api": {"address": place.url, **self._api_files(place)},
        }
        for section, values in self._changes.items():
            base[section] = {**base.get(section, {}), **values}
        return Settings.model_validate(base)

    def _api_files(self, place: _Place) -> dict[str, Any]:
        if self.signer is None:
            return {}
        instance = f"{place.region}-{'b' if place.name == TWIN else 'a'}"
        pair = self.signer.issue(instance, hosts=["127.0.0.1"], uris=[f"drctl://{GROUP}/{place.region}/{instance}"])
        if not self.access_file.exists():
            write_document(self.access_file, AccessDocument(group=GROUP))
        ours = self.signer.cert_file
        return {
            "cert_file": pair.cert_file,
            "key_file": pair.key_file,
            "ca_file": ours,
            "client_ca_file": ours,
            "access_file": self.access_file,
        }

    @property
    def ca_file(self) -> Path:
        """Who signed the controllers' certificates."""
        assert self.signer is not None
        return self.signer.cert_file

    def token(self, name: str, role: str, **entry: Any) -> str:
        """A new token, known to every controller."""
        token, digest = new_token(GROUP)
        document = with_entry(read_document(self.access_file), {"name": name, "role": role, "sha256": digest, **entry})
        write_document(self.access_file, document)
        for place in self.places.values():
            assert place.credentials is not None
            place.credentials.look(time.monotonic())
        return token

    async def _stop(self) -> None:
        for place in self.places.values():
            await self._kill(place)

    # ----------------------------------------------------------------------------------------------------- looking

    @property
    def urls(self) -> tuple[str, ...]:
        """Base URLs of all controllers, the first region's first: what agents are configured with."""
        return tuple(place.url for place in self.places.values())

    def documents(self) -> dict[str, str]:
        """All that lies in etcd, by key."""

        async def look() -> dict[str, str]:
            return {item.key: item.value.decode(errors="replace") for item in self._cluster.scan("")}

        return self._run(look())

    def active(self) -> str | None:
        """The region that serves agents now."""

        async def look() -> str | None:
            return next((place.region for place in self.places.values() if _serves(place)), None)

        return self._run(look())

    def wait_until_active(self, region: str) -> None:
        self.until(lambda: self.active() == region, f"{region} to be active")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Polls. Raises what a controller died of, or AssertionError when it takes longer than anything should."""
        end = time.monotonic() + CALL_SECONDS
        while not condition():
            self._raise_bugs()
            assert time.monotonic() < end, f"waited {CALL_SECONDS:g} s for {what}\n" + "\n".join(self._said[-60:])
            time.sleep(0.03)

    def _raise_bugs(self) -> None:
        for place in self.places.values():
            for task in place.main:
                if task.done() and not task.cancelled() and task.exception() is not None:
                    raise AssertionError(f"{place.region} died") from task.exception()

    # ------------------------------------------------------------------------------------------------------ faults

    def lose_region(self, region: str) -> None:
        """Kills its controller, resets its connections and freezes its store."""
        for place in self.places.values():
            if place.region == region:
                self._run(self._lose(place))

    def kill(self, name: str) -> None:
        """Kills one controller, as SIGKILL does: a region's name, or ``TWIN``."""
        self._run(self._kill(self.places[name]))

    def bring_store_back(self, region: str) -> None:
        """The store of a lost region answers the others again; its controller stays dead."""

        async def back() -> None:
            for other in self.places.values():
                if other.gates and other.alive:
                    other.gates[region].cut = False

        self._run(back())

    async def _lose(self, place: _Place) -> None:
        for other in self.places.values():
            if other.gates:
                other.gates[place.region].cut = True
        await self._kill(place)

    async def _kill(self, place: _Place) -> None:
        for gate in (place.etcd_gate, *place.gates.values()):
            if gate is not None:
                gate.cut = True
        if place.socket.fileno() >= 0:
            # The loop lives on and would take the next connection of another place for this socket, if it gets its number.
            self._loop.remove_reader(place.socket.fileno())
        place.socket.close()
        if place.server is not None:
            place.server.should_exit = place.server.force_exit = True
            for connection in list(place.server.server_state.connections):
                connection.transport.abort()
        place.main = []
        if place.peers is not None:
            await place.peers.close()
        while place.tasks:
            tasks = list(place.tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def delay_replication(self, seconds: float) -> None:
        """From now on the active region's writes take this long to each *other* region's store; 0 = at once."""
        region = self.active()
        assert region is not None
        for other, gate in self.places[region].gates.items():
            gate.delay_seconds = 0.0 if other == region else seconds

    def hold_back(self, region: str, held: bool = True) -> None:
        """Its controller does not see what is new in its own region's store: it falls behind, and answers all the same."""
        self.places[region].gates[region].cut = held

    def fail_over(self, target: str | None = None, *, lost: str | None = None) -> str:
        """Loses the active region (or ``lost``, which is lost already), then people move the fleet. Returns the target, which
        serves when this returns: the next region when left out."""
        if lost is None:
            lost = self.active()
            assert lost is not None, "no region is active"
            self.lose_region(lost)
        return self._move("failover", target or _after(lost))

    def switch_over(self, target: str | None = None) -> str:
        """People move the fleet out of a healthy region."""
        active = self.active()
        assert active is not None, "no region is active"
        return self._move("switchover", target or _after(active))

    def _move(self, kind: str, target: str) -> str:
        plan = self._run(self._order(kind, target))
        self.until(lambda: self._run(self._done(target, plan)), f"{plan} to be done")
        self.wait_until_active(target)
        return target

    async def _order(self, kind: str, target: str) -> str:
        """What people do: make a plan, read it, sign it twice, run it."""
        controller = self.places[target].controller
        assert controller is not None
        document = await controller.create_plan(PlanRequest(kind, target, "oncall", "because"))
        record = document.record
        for who in PEOPLE:
            expires_at = self._clock.wall() + 600.0
            message = statement(record.plan.group, record.plan.id, record.digest, "approve", who, expires_at)
            signature = sign(message, self._folder / who.split("@", maxsplit=1)[0], NAMESPACE)
            request = ApprovalRequest(who, "approve", expires_at, signature, record.digest)
            await controller.approve(record.plan.id, request)
        await controller.execute(record.plan.id, "oncall", target)
        return record.plan.id

    async def _done(self, target: str, plan: str) -> bool:
        controller = self.places[target].controller
        assert controller is not None
        state = (await controller.plan(plan)).record.state
        assert state not in (State.REFUSED, State.VOID, State.EXPIRED, State.ABORTED), f"{plan} is {state.value}"
        return state is State.DONE


def _after(region: str) -> str:
    return REGIONS[(REGIONS.index(region) + 1) % len(REGIONS)]


def _serves(place: _Place) -> bool:
    return place.alive and place.controller is not None and place.controller.may_act()


def _owned(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **options)
    owner = _OWNER.get()
    if owner is not None:
        owner.tasks.add(task)
        task.add_done_callback(owner.tasks.discard)
    return task


def _make_keys(folder: Path) -> None:
    """One ed25519 key per person, and the file that lists them."""
    lines = []
    for who in PEOPLE:
        key = folder / who.split("@", maxsplit=1)[0]
        if not key.exists():
            generate_key(key, who)
        kind, public = key.with_suffix(".pub").read_text().split()[:2]
        lines.append(f"{who} {kind} {public}")
    (folder / "allowed_signers").write_text("\n".join(lines) + "\n")
