"""Controllers as machines of their own: each instance in a namespace that one cable joins to its region's.

A single instance can so be cut off from everything, its neighbour in the same region included, or from etcd alone, by packets
that vanish. What an instance sends to other regions is forwarded by its region's namespace, over the region's own links.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from controller.lab.aws import LAB_ENVIRONMENT
from controller.lab.processes import Spec
from controller.lab.supervisor import Lab
from controller.lab.topology import INSTANCES, ControllerPlace
from tests.faults.network import Network, _run

FIRST_SUBNET = 100
"""Machine number n (from 0) has 127.0.(100 + n).0/24; its process listens on .1."""
API_PORT = 8080
START_SECONDS = 240.0
"""Of each part of a group, when several of them start on a busy machine."""
MACHINE_TABLE = "inet dr_machines"
MACHINE_CHAIN = f"add table {MACHINE_TABLE}\nadd chain {MACHINE_TABLE} cuts {{ type filter hook prerouting priority -299; }}\n"


def machine(region: str, instance: str) -> str:
    """Its name, which is also its namespace's."""
    return f"{region}-{instance}"


def machines_of(regions: Sequence[str], instances: int) -> dict[str, str]:
    """Machine → region, in the order of their numbers."""
    return {machine(region, instance): region for region in regions for instance in INSTANCES[:instances]}


def on_machines(settings: Mapping[str, Any], machines: Mapping[str, str], etcd: Mapping[str, Any]) -> dict[str, Any]:
    """The lab's settings with every controller on a machine of its own, and these settings of etcd."""
    document: dict[str, Any] = copy.deepcopy(dict(settings))
    document["etcd"].update(etcd)
    for region, found in document["regions"].items():
        numbers = [number for number, home in enumerate(machines.values()) if home == region]
        found["controllers"] = [f"http://127.0.{FIRST_SUBNET + number}.1:{API_PORT}" for number in numbers]
    return document


@dataclass
class MachineNetwork(Network):
    """``machines``: machine → region. The places of ``Network`` stay what they are: regions and the world."""

    machines: Mapping[str, str] = field(default_factory=dict)
    unplugged: set[str] = field(default_factory=set)
    """Machines whose cable is out."""
    rules: dict[str, list[str]] = field(default_factory=dict)
    """Namespace → what is dropped there now, beside the cuts between places."""

    def build(self) -> None:
        """Raises OSError."""
        super().build()
        for region in self.regions:
            self._in(region, "sysctl", "-qw", "net.ipv4.ip_forward=1")
            self._in(region, "nft", "-f", "-", text=MACHINE_CHAIN)
        for name, region in self.machines.items():
            _run("ip", "netns", "add", name)
            self._in(name, "sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1", "net.ipv4.conf.default.route_localnet=1")
            self._in(name, "ip", "link", "set", "lo", "up")
            self._in(name, "ip", "address", "del", "127.0.0.1/8", "dev", "lo")
            self._in(name, "ip", "address", "add", f"{self._address(name)}/24", "dev", "lo")
            self._in(name, "nft", "-f", "-", text=MACHINE_CHAIN)
            ends = self._ends(name)
            _run("ip", "link", "add", ends[0], "netns", region, "type", "veth", "peer", "name", ends[1], "netns", name)
            for place, end, hop in zip((region, name), ends, self._hops(name), strict=True):
                self._in(place, "ip", "address", "add", f"{hop}/30", "dev", end)
            self.plug(name)
        for one, other in self.pairs:
            self._route_machines(one, other)

    def remove(self) -> None:
        """Processes that are still in a namespace keep it, without a name."""
        super().remove()
        for name in self.machines:
            _run("ip", "netns", "del", name, check=False)

    def _number(self, name: str) -> int:
        return list(self.machines).index(name)

    def _address(self, name: str) -> str:
        return f"127.0.{FIRST_SUBNET + self._number(name)}.1"

    def _ends(self, name: str) -> tuple[str, str]:
        """Its cable: the region's end, the machine's end."""
        return f"drm{self._number(name)}r", f"drm{self._number(name)}m"

    def _hops(self, name: str) -> tuple[str, str]:
        return f"10.78.{self._number(name)}.1", f"10.78.{self._number(name)}.2"

    def _up(self, one: str, other: str) -> None:
        super()._up(one, other)
        self._route_machines(one, other)

    def _route_machines(self, one: str, other: str) -> None:
        """Machines of a region are reached by the way to their region."""
        for place, far in ((one, other), (other, one)):
            for name, region in self.machines.items():
                if region == far and self._pair(one, other) not in self.down:
                    self._in(place, "ip", "route", "replace", self._subnet(name), *self._way(place, far))

    # ------------------------------------------------------------------------------------------------------------ faults

    def unplug(self, name: str) -> None:
        """Pulls the machine's cable."""
        self.unplugged.add(name)
        self._in(self.machines[name], "ip", "link", "set", self._ends(name)[0], "down")

    def plug(self, name: str) -> None:
        """Puts it in (again). The kernel forgot the routes when the link went down."""
        self.unplugged.discard(name)
        region, ends, hops = self.machines[name], self._ends(name), self._hops(name)
        for place, end in zip((region, name), ends, strict=True):
            self._in(place, "ip", "link", "set", end, "up")
        for place, end in zip((region, name), ends, strict=True):
            self._in(place, "ip", "neighbour", "flush", "dev", end)
        own = f"127.0.{self.places.index(region)}.1"
        self._in(region, "ip", "route", "replace", self._subnet(name), "via", hops[1], "dev", ends[0], "src", own)
        self._in(name, "ip", "route", "replace", "127.0.0.0/8", "via", hops[0], "dev", ends[1], "src", self._address(name))

    def _subnet(self, name: str) -> str:
        return f"127.0.{FIRST_SUBNET + self._number(name)}.0/24"

    def deafen(self, name: str) -> None:
        """What others send to the machine vanishes; what it sends arrives."""
        self._drop(name, f"iifname {self._ends(name)[1]}")

    def silence(self, name: str) -> None:
        """What the machine sends vanishes; what others send arrives."""
        self._drop(self.machines[name], f"iifname {self._ends(name)[0]}")

    def part_from_etcd(self, name: str, port: int) -> None:
        """The machine and etcd (all members) do not hear each other any more; everybody else does."""
        self._drop(name, f"iifname {self._ends(name)[1]} tcp sport {port}")
        self._drop(self.machines[name], f"iifname {self._ends(name)[0]} tcp dport {port}")

    def _drop(self, where: str, what: str) -> None:
        self.rules.setdefault(where, []).append(what)
        self._machine_rules(where)

    def _machine_rules(self, where: str) -> None:
        lines = [f"add rule {MACHINE_TABLE} cuts {what} drop" for what in self.rules.get(where, ())]
        self._in(where, "nft", "-f", "-", text="\n".join([f"flush chain {MACHINE_TABLE} cuts", *lines, ""]))

    def heal(self) -> None:
        """All links up, all cables in, no rules."""
        super().heal()
        places = list(self.rules)
        self.rules.clear()
        for where in places:
            self._machine_rules(where)
        for name in list(self.unplugged):
            self.plug(name)


class MachineLab(Lab):
    """Starts every controller on its machine. ``program``: what is run there instead of ``controller``, for controls."""

    network: MachineNetwork
    program: Sequence[str] = ("controller",)

    async def wait(
        self, condition: Callable[[], Awaitable[bool]], what: str, *, seconds: float = 0.0, logs: tuple[str, ...] = ()
    ) -> None:
        """As every lab does, but longer: several groups may be starting at once."""
        await super().wait(condition, what, seconds=max(seconds, START_SECONDS), logs=logs)

    def _start_controller(self, place: ControllerPlace) -> None:
        prefix = self.network.prefix(machine(place.region, place.instance))
        argv = (*prefix, sys.executable, "-m", *self.program, "serve", "--config", str(place.config))
        self._process().start(Spec(place.name, "controller", place.region, argv, LAB_ENVIRONMENT))
