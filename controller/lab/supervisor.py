"""Three regions on one machine: starts every part of the lab, kills and freezes regions, and leaves nothing behind.

How each part is started is in ``parts``. The process that runs a ``Lab`` is the parent of all the others (``processes`` says
how they are kept from outliving it) and answers other terminals over a unix socket in the state directory (``lab.sock``). What
a region's disaster means here:

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
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from controller.agent import AsyncCheckpoints
from controller.errors import Refused, Unavailable
from controller.lab import control, work
from controller.lab.ending import read_note
from controller.lab.hosts import AgentHostPlace
from controller.lab.parts import APPROVERS, READY_SECONDS, REQUESTER, Parts, Say
from controller.lab.processes import IDENTITY, Children, PrefixOf, Roster, Started, here, start_ticks, sweep, tail
from controller.lab.secured import LAB
from controller.lab.topology import ControllerPlace, Topology, with_zone

POLL_SECONDS = 0.1

DIES = ("controller", "agents")
"""Kinds that a disaster kills."""
STOPS = ("store", "etcd", "late-writer")
"""Kinds that a disaster silences."""


class Lab(Parts):
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
        journals: Path | None = None,
    ):
        """``prefix_of``: how to start a process where its region is. ``stand_in_shift``: the AWS stand-ins listen so many ports
        further, behind proxies that the caller starts. ``etcd_options``: further ones for every member.
        ``journals``: a folder; stores that are killed come back with all that they acknowledged."""
        super().__init__(
            topology,
            say=say,
            hosts_per_region=hosts_per_region,
            agents=agents,
            corpus=corpus,
            prefix_of=prefix_of,
            stand_in_shift=stand_in_shift,
            etcd_options=etcd_options,
            journals=journals,
        )
        self.identity = secrets.token_hex(16)
        self._agents = agents
        self.killed_at: dict[str, float] = {}
        """When each region was killed, wall clock."""
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

    async def kill_store(self, region: str) -> None:
        """SIGKILL to the region's stand-in. Without ``journals`` its state is gone."""
        await asyncio.get_running_loop().run_in_executor(self._threads, self._stand_ins[f"store-{region}"].kill)

    async def start_store(self, region: str) -> None:
        """Starts it again where it was. Running is fine. Raises Unavailable with the end of its log."""
        name, loop = f"store-{region}", asyncio.get_running_loop()
        stand_in = self._stand_ins[name]
        if not stand_in.running():
            await loop.run_in_executor(self._threads, stand_in.start, READY_SECONDS)
            self._adopt(name, "store", region, stand_in)

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
