"""A group to break: the lab's processes, each region's in its own namespace, proxies in front of the stand-ins, agents at work.

Use after ``network.enter``. Everything that it starts ends with it: processes with their parent, the rest with the namespaces.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from controller.cli.lab import read_settings
from controller.domain.model import Holder
from controller.errors import DrError
from controller.lab import control
from controller.lab.etcd import find_etcd
from controller.lab.layout import Layout
from controller.lab.supervisor import Lab
from controller.lab.topology import Topology, build
from tests.faults.network import WORLD, Network
from tests.faults.people import GaveUp, People
from tests.faults.recorded import EtcdHistory, Lines, Recorded
from tests.faults.relay import Shape
from tests.faults.stale import new_folder
from tests.faults.worker import now

SHIFT = 100
"""A stand-in listens so many ports above its proxy."""
DISK_MB = 512
"""etcd's log alone takes 64 MB pieces."""
QUOTA_MB = 64
MOST_FROZEN_SECONDS = 30
LEVEL_SEGMENTS = 15
"""What may be under way to a store of a group that is whole, or be new since a report."""


@dataclass
class Stage:
    """``async with Stage(...) as stage``. ``disks``: each etcd member on a file system of its own.
    ``delay_seconds``: what every packet from one region to another one takes, on top of what this machine needs."""

    say: Callable[[str], None]
    agents: int = 2
    pause_seconds: float = 0.8
    attempt_seconds: float = 3.0
    """How long an agent waits for one answer."""
    register_pause_seconds: float = 0.25
    """Between two operations on a register."""
    start_seconds: float = 90.0
    """Until agents are acknowledged for the first time, once everything runs."""
    disks: bool = True
    delay_seconds: float = 0.0
    worker_lives: dict[str, int] = field(default_factory=dict)

    async def __aenter__(self) -> Stage:
        self.folder = new_folder()
        self.records = self.folder / "records"
        self.records.mkdir()
        self.network = Network([])
        self._stack = contextlib.AsyncExitStack()
        self._tails = Lines()
        self._last_acks: dict[str, float] = {}
        self._ack_times: list[float] = []
        self.first_acks: dict[int, float] = {}
        """Epoch -> when an agent was first acknowledged in it (boot time), as far as ``last_acks`` has read."""
        try:
            await self._up()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
        self.network.close()
        self._unmount()
        self.network.remove()
        shutil.rmtree(self.folder, ignore_errors=True)

    async def _up(self) -> None:
        topology = build(self._settings(), self.folder / "lab", wan=False)
        self.regions = [region.name for region in topology.regions]
        self.network = self._network()
        self.network.build()
        if self.disks:
            self._mount_disks(Layout(topology.state_dir))
        self.lab = self._lab(topology)
        self._stack.push_async_callback(self.lab.down)
        await self.lab.start_infrastructure()
        for place in self.network.places:
            self.start_proxy(place)
        await self.lab.start_fleet()
        self.people = People(self.lab)
        self._stack.push_async_callback(self.people.close)
        history = EtcdHistory(self.lab.etcd_endpoints, self.people.keys.authority.removesuffix("authority"))
        self._stack.callback(history.close)
        self.recorded = Recorded(self.lab.topology, self.records, SHIFT, history)
        for place in self.network.places:
            self.start_worker(place)
        await self.settled(self.start_seconds)

    def _settings(self) -> Mapping[str, Any]:
        return read_settings(None)

    def _network(self) -> Network:
        return Network(self.regions, standing=Shape(delay=self.delay_seconds))

    def _lab(self, topology: Topology) -> Lab:
        return Lab(topology, **self._lab_options())

    def _lab_options(self) -> dict[str, Any]:
        return {
            "say": lambda _: None,
            "hosts_per_region": 0,
            "agents": 0,
            "prefix_of": self.network.prefix,
            "stand_in_shift": SHIFT,
            "journals": self.records,
            "etcd_options": [f"--quota-backend-bytes={QUOTA_MB * 2**20}"],
        }

    def _mount_disks(self, layout: Layout) -> None:
        for region in self.regions:
            image, point = self.folder / f"{region}.img", layout.etcd / region
            point.mkdir(parents=True)
            with image.open("wb") as file:
                file.truncate(DISK_MB * 2**20)
            subprocess.run(["mkfs.ext4", "-q", "-E", "nodiscard", str(image)], check=True)
            subprocess.run(["mount", "-o", "loop", str(image), str(point)], check=True)

    def _unmount(self) -> None:
        for point in map(self.disk, self.network.regions):
            if point.is_mount():
                subprocess.run(["umount", "--lazy", str(point)], capture_output=True, check=False)

    def disk(self, region: str) -> Path:
        """Where the region's etcd member keeps its data."""
        return Layout(self.folder / "lab").etcd / region

    # -------------------------------------------------------------------------------------------------------- processes

    def start_proxy(self, place: str) -> None:
        """The proxy of a region's store; the world's is Route 53's."""
        world = place == WORLD
        listen = self.lab.topology.route53 if world else self.lab.topology.region(place).store
        self.lab.start_module(
            f"proxy-{place}",
            "proxy",
            "" if world else place,
            "tests.faults.proxy",
            *("--listen", str(listen), "--upstream", f"{listen.host}:{listen.port + SHIFT}"),
            *("--control", str(self._socket(place)), "--record", str(self.records / f"proxy-{place}.jsonl")),
            *(("--zone", self.lab.topology.zone_id) if world else ()),
        )

    def _socket(self, place: str) -> Path:
        return self.folder / f"proxy-{place}.sock"

    async def proxy(self, place: str, command: str, **arguments: Any) -> dict[str, int]:
        """Steers a proxy. Raises Unavailable, Refused."""
        return dict(await control.call(self._socket(place), command, **arguments))

    def start_worker(self, place: str) -> None:
        """Agents of a region, and onlookers; in the world it is the one who asks DNS. Their records are new in each life."""
        life = self.worker_lives[place] = self.worker_lives.get(place, 0) + 1
        own = [] if place == WORLD else self.people.urls(place)
        others = [url for url in self.people.urls() if url not in own]
        etcd = [url for url in self.lab.etcd_endpoints if place != WORLD]
        mine = "" if place == WORLD else self.lab.topology.region(place).etcd.url
        dns = str(self.lab.topology.dns) if place == WORLD else ""
        self.lab.start_module(
            f"worker-{place}",
            "worker",
            "" if place == WORLD else place,
            "tests.faults.worker",
            *("--name", place, "--life", str(life), "--controllers", ",".join([*own, *others]), "--watch", ",".join(own)),
            *("--etcd", ",".join(sorted(etcd, key=lambda url: url != mine))),
            *("--dns", dns, "--dns-name", self.lab.topology.dns_name),
            *("--agents", str(0 if place == WORLD else self.agents), "--pause-seconds", str(self.pause_seconds)),
            *("--attempt-seconds", str(self.attempt_seconds), "--register-pause-seconds", str(self.register_pause_seconds)),
            *("--record", str(self.records / f"worker-{place}.jsonl")),
        )

    def running(self, kind: str) -> set[str]:
        """Names of living processes of a kind."""
        return {p["name"] for p in self.lab.status()["processes"] if p["kind"] == kind and not p["state"].startswith("exited")}

    def kill(self, name: str) -> int:
        """SIGKILL to one process by its name."""
        victims = [process for process in self.lab.processes() if process.name == name]
        return sum(_kill(process.pid) for process in victims if name in self.running(process.kind))

    def start_all(self) -> None:
        """Starts whatever does not run, and continues what is stopped."""
        self.lab.signal(signal.SIGCONT)
        for place in self.lab.topology.controllers:
            self.lab.start_controller(place.region, place.instance)
        for region in self.regions:
            self.lab.start_member(region)
        for place in self.network.places:
            if f"proxy-{place}" not in self.running("proxy"):
                self.start_proxy(place)
            if f"worker-{place}" not in self.running("worker"):
                self.start_worker(place)
        if "dns" not in self.running("dns"):
            self.lab._start_dns()

    def mend(self) -> None:
        """No cut any more, and what is stopped goes on."""
        self.network.heal()
        self.lab.signal(signal.SIGCONT)

    def etcdctl(self, region: str, *words: str, text: str = "") -> str:
        """Raises OSError with what it said."""
        binary = find_etcd().path.with_name("etcdctl")
        argv = [str(binary), f"--endpoints={self.lab.topology.region(region).etcd.url}", "--command-timeout=10s", *words]
        done = subprocess.run(
            argv, input=text, capture_output=True, text=True, check=False, env={**os.environ, "ETCDCTL_API": "3"}
        )
        if done.returncode != 0:
            raise OSError(f"etcdctl {' '.join(words)}: {done.stderr[-300:]}")
        return done.stdout

    def etcd_leader(self) -> str:
        """Region whose member leads now."""
        for region in self.regions:
            with contextlib.suppress(OSError):
                status = json.loads(self.etcdctl(region, "endpoint", "status", "-w", "json"))[0]["Status"]
                if status["leader"] == status["header"]["member_id"]:
                    return region
        return self.regions[0]

    def freeze_disk(self, region: str, seconds: float) -> None:
        """Whatever writes to it waits. It thaws by itself, whatever becomes of us."""
        point = self.disk(region)
        script = f"fsfreeze -f {point} && sleep {min(seconds, MOST_FROZEN_SECONDS)}; fsfreeze -u {point}"
        subprocess.Popen(["sh", "-c", script], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    # ----------------------------------------------------------------------------------------------------------- waiting

    async def home(self) -> str:
        """The region in authority."""
        while True:
            with contextlib.suppress(DrError):
                return await self.people.home()
            await asyncio.sleep(0.3)

    async def holder(self) -> Holder:
        """Who holds the lease; waits for somebody. Raises GaveUp."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with contextlib.suppress(DrError):
                found = await self.people.holder()
                if found is not None:
                    return found
            await asyncio.sleep(0.2)
        raise GaveUp("nobody holds the lease")

    async def nobody(self, seconds: float) -> bool:
        """Whether the lease ends, and stays free for a second, within that time."""
        until, free_since = time.monotonic() + seconds, None
        while time.monotonic() < until:
            with contextlib.suppress(DrError):
                if await self.people.holder() is not None:
                    free_since = None
                elif free_since is None:
                    free_since = time.monotonic()
                elif time.monotonic() - free_since > 1.0:
                    return True
            await asyncio.sleep(0.2)
        return False

    def last_acks(self) -> dict[str, float]:
        """When each agent was last acknowledged (boot time)."""
        for place in self.regions:
            for line in self._tails.new(self.records / f"worker-{place}.jsonl"):
                if line["what"] == "ack":
                    self._last_acks[line["agent"]] = line["at"]
                    self._ack_times.append(line["at"])
                    self.first_acks.setdefault(line["epoch"], line["at"])
        return self._last_acks

    def outage(self, since: float) -> float:
        """Longest time since then in which no agent of any region was acknowledged."""
        self.last_acks()
        times = [since, *sorted(at for at in self._ack_times if at >= since)]
        return max((after - before for before, after in pairwise(times)), default=0.0)

    async def settled(self, seconds: float, *, everybody: bool = True) -> float:
        """Waits until the group is as it should be: one active, every standby within the RPO and level, every agent
        acknowledged; ``everybody``: and every instance there. Returns how long it took. Raises GaveUp with what was missing."""
        began, missing, told = now(), "everything", now()
        while now() - began < seconds:
            missing = await self._missing(began, everybody=everybody)
            if not missing:
                return now() - began
            if now() - told > 5.0:
                self.say(f"  after {now() - began:.0f} s: {missing}")
                told = now()
            await asyncio.sleep(0.3)
        raise GaveUp(f"not whole again after {seconds:.0f} s: {missing}")

    async def _missing(self, since: float, *, everybody: bool) -> str:
        active = await self.people.active()
        if len(active) != 1:
            return f"{len(active)} active controllers"
        try:
            status = await self.people.ask("GET", "/v1/status", active[0][0], 1.0)
            members = await self.people.ask("GET", "/v1/members", active[0][0], 1.0)
        except GaveUp as error:
            return str(error)
        if everybody and len(members) < len(self.lab.topology.controllers):
            return f"{len(members)} members"
        for region in status["regions"]:
            lag = region["lag"].get("seconds") if isinstance(region["lag"], dict) else None
            if not region["active"] and not (isinstance(lag, (int, float)) and lag <= status["rpo_seconds"]):
                return f"the lag of {region['region']} is {region['lag']}"
        seqs = {region["region"]: region["heads"].get("s00", {}).get("seq", -1) for region in status["regions"]}
        if max(seqs.values()) - min(seqs.values()) > LEVEL_SEGMENTS:
            return f"stores are at segments {seqs}"
        late = sorted(
            name
            for place in self.regions
            for n in range(self.agents)
            if self.last_acks().get(name := f"{place}-{n}", 0) < since
        )
        return f"no acknowledgement for {late}" if late else ""

    async def fail_over(self, lost: Sequence[str]) -> str:
        """People move the group to a region that is not lost, once the lease has ended. Returns where to. Raises GaveUp."""
        target = next(region for region in self.regions if region not in lost)
        for _ in range(3):
            plan = await self.people.order("failover", target)
            record = await self.people.ended(plan)
            if record.state.value == "done":
                return target
            self.say(f"  plan {plan} ended {record.state.value}: {record.reason}")
        raise GaveUp(f"no failover to {target} was done: {record.state.value} {record.reason}")

    def keep_records(self, where: Path) -> None:
        """Copies logs and records of a stage in which something went wrong, for people to look at."""
        shutil.copytree(self.records, where / "records", dirs_exist_ok=True)
        shutil.copytree(self.lab.layout.logs, where / "logs", dirs_exist_ok=True)


def _kill(pid: int) -> int:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return 0
    return 1
