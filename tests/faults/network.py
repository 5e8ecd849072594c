"""Regions as network namespaces of this machine, with a link of its own between every two of them.

All of it lives in a network and a mount namespace that ``enter`` makes for the calling process: namespaces, links, rules, and
what is mounted vanish with the last process in them, also after SIGKILL. Nothing of the machine's own network is touched.

The lab's addresses stay what they are: region number i has 127.0.i.0/24, what is global has 127.0.0.0/24. Inside, these are
routed over the links like any others (``route_localnet``), so that the lab's settings and its rule "clear text on loopback
addresses only" hold unchanged. The namespace of the caller is the world outside: Route 53, DNS, the people.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations, permutations
from pathlib import Path

from tests.faults.relay import Counts, RelayProcess, Shape

CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
WORLD = "world"
TABLE = "inet dr_faults"
CHAIN = f"add table {TABLE}\nadd chain {TABLE} cuts {{ type filter hook prerouting priority -300; }}\n"
TOOLS = ("ip", "nft", "nsenter", "mount")


def why_not() -> str:
    """Why this machine cannot do it, in one sentence; "" when it can."""
    if os.uname().sysname != "Linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} missing: apt-get install iproute2 nftables util-linux mount"
    probe = subprocess.run(["unshare", "--net", "--mount", "ip", "link"], capture_output=True, text=True, check=False)
    return "" if probe.returncode == 0 else f"this machine makes no network namespace: {probe.stderr.strip()}"


def why_no_disks() -> str:
    """Why no file system can be frozen or filled here; "" when it can."""
    missing = [tool for tool in ("mkfs.ext4", "fsfreeze", "losetup") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} missing"
    return "" if Path("/dev/loop-control").exists() else "this machine has no loop devices"


def _run(*argv: str, text: str | None = None, check: bool = True) -> str:
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise OSError(f"{' '.join(argv)}: {done.returncode} {done.stderr.strip()}")
    return done.stdout


def enter() -> None:
    """Moves this process into new network and mount namespaces. Once, before any thread or child exists. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET | CLONE_NEWNS) != 0 or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) != 0:
        raise OSError(ctypes.get_errno(), "cannot make namespaces: is this root?")
    Path("/run/netns").mkdir(exist_ok=True)
    _run("mount", "-t", "tmpfs", "tmpfs", "/run/netns")  # names of ours only, seen by nobody else


@dataclass
class Network:
    """``build`` once, after ``enter``. Places are regions' names and ``world``."""

    regions: Sequence[str]
    cuts: set[tuple[str, str]] = field(default_factory=set)
    """Directions (from, to) that rules drop now."""
    down: set[tuple[str, str]] = field(default_factory=set)
    """Pairs whose link is down."""
    shapes: dict[tuple[str, str], Shape] = field(default_factory=dict)
    """Directions (from, to) whose packets are held, lost, doubled or overtaken now."""
    standing: Shape = field(default_factory=Shape)
    """What every direction between two regions has, also after ``heal``. Set before ``build``."""
    _relay: RelayProcess | None = None
    _tunnels: set[tuple[str, str]] = field(default_factory=set)

    @property
    def places(self) -> list[str]:
        return [WORLD, *self.regions]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return list(combinations(self.places, 2))

    def prefix(self, place: str) -> tuple[str, ...]:
        """What to put before a command so that it runs there. The process keeps its number: nsenter becomes the command."""
        return () if place in (WORLD, "") else ("nsenter", f"--net=/run/netns/{place}", "--")

    def subnet(self, place: str) -> str:
        """Addresses of a place."""
        return f"127.0.{self.places.index(place)}.0/24"

    def build(self) -> None:
        """Raises OSError."""
        for region in self.regions:
            _run("ip", "netns", "add", region)
        for place in self.places:
            self._in(place, "sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1", "net.ipv4.conf.default.route_localnet=1")
            self._in(place, "ip", "link", "set", "lo", "up")
            self._in(place, "ip", "-4", "address", "flush", "dev", "lo")
            self._in(place, "ip", "address", "add", f"127.0.{self.places.index(place)}.1/24", "dev", "lo")
            self._in(place, "nft", "-f", "-", text=CHAIN)
        for one, other in self.pairs:
            ends = [self._end(one, other), self._end(other, one)]
            _run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for place, end in ((one, ends[0]), (other, ends[1])):
                if place != WORLD:
                    _run("ip", "link", "set", end, "netns", place)
            for place, far in ((one, other), (other, one)):
                self._in(place, "ip", "address", "add", f"{self._hop(place, far)}/30", "dev", self._end(place, far))
            self._up(one, other)
        self._stand()

    def close(self) -> None:
        """Ends the relay; namespaces and links end with the processes in them."""
        if self._relay is not None:
            self._relay.close()
            self._relay = None

    def remove(self) -> None:
        """Before another network is built in the same process. Links end with their namespaces. Fine when nothing was built."""
        for region in self.regions:
            _run("ip", "netns", "del", region, check=False)
        for region in self.regions:  # the kernel takes a namespace apart some time after its last process has gone
            _run("ip", "link", "del", self._end(WORLD, region), check=False)

    def _in(self, place: str, *argv: str, text: str | None = None) -> str:
        return _run(*self.prefix(place), *argv, text=text)

    def _end(self, place: str, far: str) -> str:
        return f"dr{self.places.index(place)}to{self.places.index(far)}"

    def _hop(self, place: str, far: str) -> str:
        low, high = sorted((self.places.index(place), self.places.index(far)))
        return f"10.77.{low * 16 + high}.{1 if self.places.index(place) == low else 2}"

    def _up(self, one: str, other: str) -> None:
        for place, far in ((one, other), (other, one)):
            for end in self._doors(place, far):
                self._in(place, "ip", "link", "set", end, "up")
        for place, far in ((one, other), (other, one)):  # the kernel forgot the routes when the link went down
            self._in(place, "ip", "neighbour", "flush", "dev", self._end(place, far))
            self._in(place, "ip", "route", "replace", self.subnet(far), *self._way(place, far))

    def _way(self, place: str, far: str) -> tuple[str, ...]:
        """The route there: by the cable, or through the relay while either direction is shaped."""
        way: tuple[str, ...] = ("via", self._hop(far, place), "dev", self._end(place, far))
        if (place, far) in self.shapes or (far, place) in self.shapes:
            way = ("dev", self._tunnel(place, far))
        return (*way, "src", f"127.0.{self.places.index(place)}.1")

    def _tunnel(self, place: str, far: str) -> str:
        """The device whose packets the relay carries."""
        return f"dt{self.places.index(place)}to{self.places.index(far)}"

    def _doors(self, place: str, far: str) -> list[str]:
        """Whatever leads from a place to another one."""
        return [self._end(place, far), *([self._tunnel(place, far)] if self._pair(place, far) in self._tunnels else [])]

    def _pair(self, one: str, other: str) -> tuple[str, str]:
        low, high = sorted((one, other), key=self.places.index)
        return low, high

    # ------------------------------------------------------------------------------------------------------------ faults

    def link_down(self, one: str, other: str) -> None:
        """Unplugs the cable: the one side has no route any more, the other sends into nothing."""
        one, other = sorted((one, other), key=self.places.index)
        self.down.add((one, other))
        for end in self._doors(other, one):
            self._in(other, "ip", "link", "set", end, "down")

    def link_up(self, one: str, other: str) -> None:
        """Plugs it in again."""
        one, other = sorted((one, other), key=self.places.index)
        self.down.discard((one, other))
        self._up(one, other)

    def drop(self, source: str, target: str) -> None:
        """Packets from ``source`` to ``target`` vanish; those of the other direction arrive."""
        self.cuts.add((source, target))
        self._rules(target)

    def cut(self, one: str, other: str) -> None:
        """Both directions."""
        self.drop(one, other)
        self.drop(other, one)

    def isolate(self, region: str) -> None:
        """A region that nobody reaches and that reaches nobody, by firewall rules."""
        for other in self.places:
            if other != region:
                self.cut(region, other)

    def shape(self, source: str, target: str, shape: Shape) -> None:
        """Packets of one direction are held, lost, doubled or overtaken from now on. Raises OSError."""
        if shape == Shape():
            self.shapes.pop((source, target), None)
        else:
            self._open(source, target)
            self.shapes[source, target] = shape
        if self._pair(source, target) in self._tunnels:
            self._carry({"shape": self._tunnel(source, target), "as": asdict(shape)})
            if self._pair(source, target) not in self.down:  # else that is done when the cable is plugged in again
                self._up(source, target)

    def shape_all(self, shape: Shape) -> None:
        """Every direction between two regions; the world outside stays where it is."""
        for source, target in permutations(self.regions, 2):
            self.shape(source, target, shape)

    def carried(self) -> Counts:
        """What the relay has done so far."""
        return self._carry({}) if self._relay is not None else Counts()

    def _open(self, one: str, other: str) -> None:
        pair = self._pair(one, other)
        if pair in self._tunnels:
            return
        ends = [(place, self._tunnel(place, far)) for place, far in (pair, pair[::-1])]
        self._carry({"open": [(end, "" if place == WORLD else f"/run/netns/{place}") for place, end in ends]})
        self._tunnels.add(pair)
        for place, end in ends:
            # Without an IPv6 address it is silent when nobody uses it.
            self._in(place, "ip", "link", "set", end, "mtu", "1500", "txqueuelen", "5000", "addrgenmode", "none")
            if pair not in self.down or place == pair[0]:
                self._in(place, "ip", "link", "set", end, "up")

    def _carry(self, command: dict[str, object]) -> Counts:
        if self._relay is None:
            self._relay = RelayProcess()
        return self._relay.ask(command)

    def _stand(self) -> None:
        for source, target in set(self.shapes) | (set(permutations(self.regions, 2)) if self.standing != Shape() else set()):
            wanted = Shape() if WORLD in (source, target) else self.standing
            if self.shapes.get((source, target), Shape()) != wanted:
                self.shape(source, target, wanted)

    def heal(self) -> None:
        """All links up, no rules, no packet held but for what stands."""
        targets = {target for _, target in self.cuts}
        self.cuts.clear()
        for target in targets:
            self._rules(target)
        for one, other in list(self.down):
            self.link_up(one, other)
        self._stand()

    def _rules(self, target: str) -> None:
        sources = sorted(source for source, to in self.cuts if to == target)
        # By the link that they come in on: requests and answers alike, whatever address they carry.
        ends = [end for source in sources for end in (self._end(target, source), self._tunnel(target, source))]
        lines = [f"add rule {TABLE} cuts iifname {end} drop" for end in ends]
        self._in(target, "nft", "-f", "-", text="\n".join([f"flush chain {TABLE} cuts", *lines, ""]))

    def reaches(self, source: str, target: str) -> bool:
        """Whether a packet goes there and back now (one ping)."""
        to = self.subnet(target).replace(".0/24", ".1")
        argv = (*self.prefix(source), "timeout", "1", "bash", "-c", f"exec 3<>/dev/tcp/{to}/9")
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        return "refused" in done.stderr  # the far side's kernel answered: nobody listens on that port
