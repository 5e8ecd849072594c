"""Three regions on one machine: starts every part of the lab, kills and freezes regions, and leaves nothing behind.

The process that runs a ``Lab`` is the parent of all the others (``processes`` says how they are kept from outliving it)
and answers other terminals over a unix socket in the state directory (``lab.sock``). What a region's disaster means here:

- ``kill``: controllers and agent hosts get SIGKILL; the region's stores and its etcd member get SIGSTOP, so that whoever
  talks to them waits, as with a region that is gone; a late writer is stopped, to wake up when the region does;
- ``freeze``: SIGSTOP to all of it, the pause after which a process does not know that time has passed;
- ``thaw``: SIGCONT to what is stopped, and a fresh start of what was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from controller.adapters.clock import SystemClock
from controller.adapters.etcd import EtcdCoordinator
from controller.adapters.identity import generate_key
from controller.agent import AsyncCheckpoints
from controller.errors import Refused, Unavailable
from controller.lab import control, work
from controller.lab.aws import LAB_ENVIRONMENT, AwsStandIn
from controller.lab.ending import read_note
from controller.lab.etcd import EtcdAddress, EtcdCluster, EtcdMember, find_etcd
from controller.lab.hosts import AgentHostPlace, host_argv, places
from controller.lab.layout import Layout
from controller.lab.processes import IDENTITY, Children, PrefixOf, Roster, Spec, Started, here, start_ticks, sweep, tail
from controller.lab.secured import LAB, Secured
from controller.lab.stand_ins import start_region, start_route53
from controller.lab.topology import (
    ETCD_PEER_SHIFT,
    ControllerPlace,
    Topology,
    controller_document,
    merged,
    operator_document,
    to_toml,
    with_zone,
)
from controller.runtime.bootstrap import bootstrap_group

POLL_SECONDS = 0.1
READY_SECONDS = 90.0
"""Far above what a start takes (about 10 s on two cores): only a part that will never be ready runs into it."""

DIES = ("controller", "agents")
"""Kinds that a disaster kills."""
STOPS = ("store", "etcd", "late-writer")
"""Kinds that a disaster silences."""

APPROVERS = ("alice", "bob")
REQUESTER = "carol"

Say = Callable[[str], None]


class Lab:
    """Everything that runs. ``async with Lab(...)`` starts it, and ends it whatever happens."""

    def __init__(
        self,
        topology: Topology,
        *,
        say: Say,
        hosts_per_region: int = 2,
        agents: int = 50,
        corpus: Path | None = None,
        prefix_of: PrefixOf = here,
        stand_in_shift: int = 0,
        etcd_options: Sequence[str] = (),
    ):
        """``prefix_of``: how to start a process where its region is. ``stand_in_shift``: the AWS stand-ins listen so many ports
        further, behind proxies that the caller starts. ``etcd_options``: further ones for every member."""
        self.topology = topology
        self._prefix_of = prefix_of
        self._shift = stand_in_shift
        self._etcd_options = tuple(etcd_options)
        self.layout = Layout(topology.state_dir)
        self.secured = Secured(topology) if topology.secure else None
        self.identity = secrets.token_hex(16)
        self._say = say
        self._hosts = places(topology, self.layout, per_region=hosts_per_region, agents=agents)
        self._corpus = corpus
        self._agents = agents
        self._children: Children | None = None
        self._stand_ins: dict[str, AwsStandIn] = {}
        # Stand-ins are started from these threads, and a child dies with the thread that made it: they stay until down().
        self.killed_at: dict[str, float] = {}
        """When each region was killed, wall clock."""
        self._threads = ThreadPoolExecutor(max_workers=len(topology.regions) + 1, thread_name_prefix="lab")
        self._cluster: EtcdCluster | None = None
        self._control: asyncio.Server | None = None
        self._lock: int | None = None
        self.stopping = asyncio.Event()

    # ------------------------------------------------------------------------------------------------------------- up

    async def __aenter__(self) -> Lab:
        try:
            await self.up()
        except BaseException:
            await self.down()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.down()

    async def up(self) -> None:
        """Starts all parts in the order of their needs, in parallel where there is none. Raises Unavailable, Refused,
        Misconfigured, with the end of the log of the part that failed."""
        began = time.monotonic()
        await self.start_infrastructure()
        await self.start_fleet()
        self._say(f"{len(self._process().all())} processes are up in {time.monotonic() - began:.1f} s")

    async def start_infrastructure(self) -> None:
        """What the controllers need: etcd with the founded group, stores, Route 53, DNS, WAN, webhook receiver, files."""
        self._take_state_dir()
        os.environ[IDENTITY] = self.identity
        self._children = Children(self.topology.state_dir, self.identity)
        self._write_keys()
        if self.secured is not None:
            self.secured.make((*APPROVERS, REQUESTER), (host.host for host in self._hosts))
        self._control = await control.serve(self.layout.socket, self.handle)
        if self.topology.links:
            self._start_wan()
        self._start_webhook()
        self._start_etcd()
        founding = asyncio.create_task(self._found_group())
        try:
            zone_id = await self._start_stand_ins()
            await founding
        finally:
            founding.cancel()
            await asyncio.gather(founding, return_exceptions=True)
        self.topology = with_zone(self.topology, zone_id)
        self._write_settings()
        self._start_dns()

    async def start_fleet(self) -> None:
        """Controllers and agent hosts; returns when a controller of the home region is active."""
        for place in self.topology.controllers:
            self._start_controller(place)
        for host in self._hosts:
            self._start_host(host)
        await self._wait_for_controllers()

    async def give_tasks(self) -> dict[str, dict[str, object]]:
        """Puts every agent's task into the stream, through the client that agents use. Returns the specs by agent."""
        specs = work.fleet_specs(self._agents)
        urls = [place.api.url for place in self.topology.region(self.topology.home).controllers]
        secured = self.secured
        token, ca = (secured.token_file(LAB), secured.ca_file) if secured is not None else (None, None)
        async with AsyncCheckpoints(urls, timeout_seconds=30.0, token_file=token, ca_file=ca) as client:
            await asyncio.gather(*(client.create_task(agent, spec) for agent, spec in specs.items()))
        return specs

    def _take_state_dir(self) -> None:
        """Raises Refused while another lab uses the directory; clears away what a dead one left."""
        self.layout.root.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.layout.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            self._lock = None
            raise Refused(f"a lab is running in {self.layout.root}", hint="`drctl lab down`, or another --state-dir") from None
        if self.layout.note.exists():
            left = sweep(self.layout.root, str(read_note(self.layout).get("identity", "")))
            if left:
                self._say(f"ended {len(left)} processes that an earlier lab had left")
        for path in self.layout.disposable:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        for path in self.layout.directories:
            path.mkdir(parents=True, exist_ok=True)
        self._note_lab()
        Roster(self.layout.roster).add(Started("lab", "lab", "", os.getpid(), start_ticks(os.getpid()) or 0))

    def _note_lab(self) -> None:
        document = {"identity": self.identity, "pid": os.getpid(), "start_ticks": start_ticks(os.getpid()), "at": time.time()}
        partial = self.layout.note.with_suffix(".partial")
        partial.write_text(json.dumps(document))
        partial.replace(self.layout.note)

    def _write_keys(self) -> None:
        """Keys of the lab's people. They are made for this lab and are worth nothing outside of it."""
        lines = [
            f'{name} namespaces="dr-approval" {generate_key(self.layout.key(name), name).strip()}'
            for name in (*APPROVERS, REQUESTER)
        ]
        self.topology.allowed_signers.write_text("\n".join(lines) + "\n")
        self.topology.allowed_signers.chmod(0o644)  # whatever this user's umask is

    def _write_settings(self) -> None:
        secured = self.secured
        operators = merged(operator_document(self.topology), secured.settings_of_operators() if secured is not None else {})
        self.topology.operator_config.write_text(to_toml(operators))
        for place in self.topology.controllers:
            place.config.parent.mkdir(parents=True, exist_ok=True)
            place.state_dir.mkdir(parents=True, exist_ok=True)
            document = merged(
                controller_document(self.topology, place), secured.settings_of(place) if secured is not None else {}
            )
            place.config.write_text(to_toml(document))

    def _process(self) -> Children:
        if self._children is None:
            raise Unavailable("the lab does not run", hint="start it with `drctl lab up`")
        return self._children

    def _module(self, name: str, kind: str, region: str, *arguments: str, caller: str = "") -> Started:
        """``caller``: whose token the process shows, where callers are known."""
        argv = (*self._prefix_of(region), sys.executable, "-m", *arguments)
        shown = self.secured.environment(caller) if caller and self.secured is not None else {}
        return self._process().start(Spec(name, kind, region, argv, {**LAB_ENVIRONMENT, **shown}))

    def _start_wan(self) -> None:
        links = [
            {
                "source": link.source,
                "target": link.target,
                "listen_host": link.listen_host,
                "listen_port": link.listen_port,
                "to_host": link.to_host,
                "to_port": link.to_port,
            }
            for link in self.topology.links
        ]
        document = {"links": links, "delay_ms": 20.0, "control": str(self.layout.wan_socket)}
        self.layout.wan_config.write_text(json.dumps(document))
        self._module("wan", "wan", "", "controller.lab.wan", "--config", str(self.layout.wan_config))

    def _start_webhook(self) -> None:
        place = self.topology.webhook
        where = ("--host", place.host, "--port", str(place.port), "--file", str(self.layout.pages))
        self._module("webhook", "webhook", "", "controller.lab.webhook", *where)

    def _start_dns(self) -> None:
        place = self.topology.dns
        where = ("--host", place.host, "--port", str(place.port), "--zone-id", self.topology.zone_id)
        self._module("dns", "dns", "", "controller.lab.dns_server", "--endpoint", self.topology.route53.url, *where)

    def _start_etcd(self) -> None:
        binary = find_etcd()
        self._say(binary.warning or f"etcd {binary.version}")
        addresses = [
            EtcdAddress(region.name, region.etcd.host, region.etcd.port, region.etcd.port + ETCD_PEER_SHIFT, region.etcd.secure)
            for region in self.topology.regions
        ]
        self._cluster = EtcdCluster(
            binary,
            addresses,
            self.layout.etcd,
            extra=self._etcd_options,
            prefix_of=self._prefix_of,
            tls=self.secured.etcd() if self.secured is not None else None,
        )
        for member in self._cluster.members:
            self._start_member(member)

    def _start_member(self, member: EtcdMember) -> None:
        member.start()
        if member.pid is not None:
            self._process().adopt(f"etcd-{member.address.name}", "etcd", member.address.name, member.pid)

    def _start_controller(self, place: ControllerPlace) -> None:
        self._module(place.name, "controller", place.region, "controller", "serve", "--config", str(place.config))

    def _start_host(self, host: AgentHostPlace) -> None:
        self._module(host.name, "agents", host.region, *host_argv(host, self.topology, self._corpus), caller=host.host)

    async def _start_stand_ins(self) -> str:
        """S3 and DynamoDB of every region, and Route 53. Returns the id of the hosted zone."""
        loop, log = asyncio.get_running_loop(), self._process().log
        shift, prefix_of = self._shift, self._prefix_of
        route53 = partial(start_route53, self.topology, log("route53"), READY_SECONDS, port_shift=shift)
        global_part = loop.run_in_executor(self._threads, route53)
        store = partial(start_region, self.topology, prefix_of=prefix_of, port_shift=shift, timeout_seconds=READY_SECONDS)
        parts = {
            name: loop.run_in_executor(self._threads, partial(store, name, log(f"store-{name}")))
            for name in (region.name for region in self.topology.regions)
        }
        # All of them are waited for, so that none is forgotten when one fails.
        await asyncio.wait(parts.values())
        await asyncio.wait([global_part])
        for name, part in parts.items():
            if part.exception() is None:
                self._adopt(f"store-{name}", "store", name, part.result())
        errors = [*(part.exception() for part in parts.values()), global_part.exception()]
        for error in errors:
            if error is not None:
                raise error
        stand_in, zone_id = global_part.result()
        self._adopt("route53", "route53", "", stand_in)
        return zone_id

    def _adopt(self, name: str, kind: str, region: str, stand_in: AwsStandIn) -> None:
        self._stand_ins[name] = stand_in
        if stand_in.pid is not None:
            self._process().adopt(name, kind, region, stand_in.pid)

    async def _found_group(self) -> None:
        assert self._cluster is not None
        await asyncio.to_thread(self._cluster.wait_ready, READY_SECONDS)
        tls = self.secured.etcd() if self.secured is not None else None
        coordinator = EtcdCoordinator(
            self._cluster.endpoints,
            call_timeout_seconds=2.0,
            ca_file=str(tls.ca_file) if tls else None,
            cert_file=str(tls.cert_file) if tls else None,
            key_file=str(tls.key_file) if tls else None,
        )
        try:
            await bootstrap_group(
                coordinator,
                SystemClock(),
                prefix=str(self.topology.document["etcd"].get("prefix", "/dr")),
                group=self.topology.group,
                region=self.topology.home,
                stores=[region.name for region in self.topology.regions],
                actor="lab",
                streams=int(str(self.topology.document.get("stream", {}).get("streams", 1))),
            )
        finally:
            await coordinator.close()

    async def _wait_for_controllers(self) -> None:
        """Until every controller answers and one in the home region is active. Raises Unavailable with the log's end."""
        verify = self.secured.context() if self.secured is not None else True
        async with httpx.AsyncClient(timeout=2.0, verify=verify, trust_env=False) as client:

            async def answers(url: str) -> bool:
                with contextlib.suppress(httpx.HTTPError):
                    return (await client.get(url)).status_code == 200
                return False

            for place in self.topology.controllers:
                await self.wait(partial(answers, f"{place.api.url}/livez"), f"answer of {place.name}", logs=(place.name,))
            home = self.topology.region(self.topology.home).controllers

            async def active() -> bool:
                return any(await asyncio.gather(*(answers(f"{place.api.url}/active") for place in home)))

            await self.wait(active, f"an active controller in {self.topology.home}", logs=tuple(p.name for p in home))

    async def wait(
        self, condition: Callable[[], Awaitable[bool]], what: str, *, seconds: float = READY_SECONDS, logs: tuple[str, ...] = ()
    ) -> None:
        """Polls until ``condition`` holds. Raises Unavailable at the deadline, or as soon as one of ``logs``' processes ended,
        with the end of their logs."""
        until = time.monotonic() + seconds
        while not await condition():
            ended = [name for name in logs if self._process().exit_code(name) is not None]
            if ended or time.monotonic() > until:
                why = f"{', '.join(ended)} ended" if ended else f"waited {seconds:.0f} s"
                ends = "\n".join(f"--- {name}\n{tail(self._process().log(name))}" for name in logs)
                raise Unavailable(f"no {what}: {why}\n{ends}".rstrip(), hint=f"logs are in {self.layout.logs}")
            await asyncio.sleep(POLL_SECONDS)

    # ------------------------------------------------------------------------------------------------------ disasters

    def kill(self, region: str) -> dict[str, int]:
        """The region dies. Raises Refused for an unknown region."""
        self.topology.region(region)
        children = self._process()
        self.killed_at[region] = time.time()
        stopped = children.signal(children.select(region=region, kinds=STOPS), signal.SIGSTOP)
        return {"killed": children.kill(children.select(region=region, kinds=DIES)), "stopped": stopped}

    def freeze(self, region: str) -> dict[str, int]:
        """All of the region stands still."""
        self.topology.region(region)
        return {"stopped": self._process().signal(self._process().select(region=region), signal.SIGSTOP)}

    def thaw(self, region: str) -> dict[str, int]:
        """What is stopped goes on; what was killed starts anew, with the settings and the disk that it had."""
        self.topology.region(region)
        children = self._process()
        continued = children.signal(children.select(region=region), signal.SIGCONT)
        living = {process.name for process in children.select(region=region)}
        places = [place for place in self.topology.region(region).controllers if place.name not in living]
        hosts = [host for host in self._hosts if host.region == region and host.name not in living]
        for place in places:
            self._start_controller(place)
        for host in hosts:
            self._start_host(host)
        return {"continued": continued, "started": len(places) + len(hosts)}

    @property
    def etcd_endpoints(self) -> list[str]:
        """Client URLs of the etcd members, in the order of the regions."""
        return [region.etcd.url for region in self.topology.regions]

    def kill_controller(self, region: str, instance: str) -> int:
        """SIGKILL to one controller. Returns how many were killed: 0 when it did not run. Raises Refused for an unknown one."""
        name = self._place(region, instance).name
        return self._process().kill(process for process in self._process().select(region=region) if process.name == name)

    def start_controller(self, region: str, instance: str) -> None:
        """Starts one controller anew, with the disk that it had; nothing while it runs. Raises Refused for an unknown one."""
        place = self._place(region, instance)
        if place.name not in {process.name for process in self._process().select(region=region)}:
            self._start_controller(place)

    def kill_member(self, region: str) -> int:
        """SIGKILL to a region's etcd member. Returns how many were killed."""
        return self._process().kill(self._process().select(region=region, kinds=("etcd",)))

    def start_member(self, region: str) -> None:
        """Starts a region's etcd member anew, with the disk that it had; nothing while it runs."""
        assert self._cluster is not None
        for member in self._cluster.members:
            if member.address.name == region:
                self._start_member(member)

    def start_module(self, name: str, kind: str, region: str, *arguments: str) -> Started:
        """A process beside the lab's own: ``python -m`` with these arguments, ended with the lab like all others."""
        return self._module(name, kind, region, *arguments)

    def signal(self, number: signal.Signals, *, region: str | None = None, kinds: Iterable[str] | None = None) -> int:
        """Signals the living processes of a region and of some kinds (None = all). Returns how many there were."""
        return self._process().signal(self._process().select(region=region, kinds=kinds), number)

    def _place(self, region: str, instance: str) -> ControllerPlace:
        places = self.topology.region(region).controllers
        for place in places:
            if place.instance == instance:
                return place
        known = ", ".join(place.instance for place in places)
        raise Refused(f"unknown instance {instance!r} in {region}", hint=f"instances there: {known}")

    def start_late_writer(self, region: str, *arguments: str) -> Started:
        """A writer of this region that will not hear of the promotion. Its log has one JSON object a line."""
        place = self.topology.region(region).controllers[0]
        argv = ("controller.lab.late_writer", "--config", str(place.config), *arguments)
        return self._module("late-writer", "late-writer", region, *argv, caller=LAB)

    def processes(self) -> tuple[Started, ...]:
        """What was started last under each name."""
        return self._process().all()

    @property
    def hosts(self) -> tuple[AgentHostPlace, ...]:
        """The agent hosts of all regions."""
        return self._hosts

    def log(self, name: str) -> Path:
        """Log of a process."""
        return self._process().log(name)

    async def wan(self, command: str, **arguments: Any) -> Any:
        """Steers the links (see ``controller.lab.wan``)."""
        return await control.call(self.layout.wan_socket, command, **arguments)

    def status(self) -> dict[str, Any]:
        """What runs, by process."""
        children = self._process()
        return {
            "state_dir": str(self.layout.root),
            "group": self.topology.group,
            "name": self.topology.dns_name,
            "regions": [region.name for region in self.topology.regions],
            "processes": [
                {"name": p.name, "kind": p.kind, "region": p.region, "pid": p.pid, "state": children.state(p)}
                for p in children.all()
            ],
        }

    async def handle(self, command: str, arguments: Mapping[str, Any]) -> Any:
        """What other terminals may ask for."""
        region = str(arguments.get("region", ""))
        match command:
            case "status":
                return {**self.status(), "links": await self.wan("links")}
            case "kill":
                return self.kill(region)
            case "freeze":
                return self.freeze(region)
            case "thaw":
                return self.thaw(region)
            case "wan":
                return await self.wan(str(arguments.get("what")), **dict(arguments.get("arguments", {})))
            case "late-write":
                started = self.start_late_writer(region, *[str(a) for a in arguments.get("arguments", [])])
                return {"pid": started.pid, "log": str(self.log(started.name))}
            case "down":
                self.stopping.set()
                return {"pid": os.getpid()}
        raise Refused(f"unknown command {command!r}", hint="commands: status, kill, freeze, thaw, wan, late-write, down")

    # ----------------------------------------------------------------------------------------------------------- down

    async def down(self) -> None:
        """SIGKILL to everything, at once, also to what is stopped. Fine at any time, and twice."""
        self.stopping.set()
        if self._children is not None:
            self._children.kill(self._children.select())
            if self._cluster is not None:
                self._cluster.kill()
            for stand_in in self._stand_ins.values():
                stand_in.kill()
            self._threads.shutdown(wait=True, cancel_futures=True)
            sweep(self.layout.root, self.identity)
            self._children = None
            os.environ.pop(IDENTITY, None)
        if self._control is not None:
            self._control.close()
            self._control = None
            self.layout.socket.unlink(missing_ok=True)
        if self._lock is not None:
            self.layout.note.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None
