"""Carries packets between namespaces by hand, and holds, loses, doubles or overtakes them on the way.

What ``tc netem`` does elsewhere, for kernels that have none: a TUN device at each end of a link, and this process between
them. It knows nothing of what it carries. One process serves all links; ``network.py`` starts it when a link is first shaped,
and links that are not shaped never pass through here.

``python -m tests.faults.relay``: one JSON command a line on standard input, one answer a line on standard output; it ends with
its input, so with whoever started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TUN = "/dev/net/tun"
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
CLONE_NEWNET = 0x40000000
PACKET_MAX_BYTES = 65_536
BATCH = 64
"""Packets read from one device before the others have their turn."""
HELD_MAX = 20_000
"""Packets under way at most; further ones are lost, as in any router."""


def why_no_relay() -> str:
    """Why no packet can be held here; "" when it can."""
    return "" if Path(TUN).exists() else f"this machine has no {TUN}"


@dataclass(frozen=True, slots=True)
class Shape:
    """One direction of a link. Times in seconds, the rest are chances of each packet."""

    delay: float = 0.0
    jitter: float = 0.0
    """Up to so much more, drawn for each packet; it delays those behind it, too, and changes no order."""
    loss: float = 0.0
    twice: float = 0.0
    late: float = 0.0
    """Held ``late_by`` longer than the others, which overtake it."""
    late_by: float = 0.02


@dataclass(slots=True)
class Counts:
    """Since the start. ``seconds``: processor time of the relay."""

    packets: int = 0
    lost: int = 0
    twice: int = 0
    late: int = 0
    overflowed: int = 0
    seconds: float = 0.0


class Relay:
    """Devices in pairs: what comes out of one goes into its partner, when its time has come."""

    def __init__(self) -> None:
        self.counts = Counts()
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY)
        self._fds: dict[str, int] = {}
        self._partner: dict[int, int] = {}
        self._shapes: dict[int, Shape] = {}
        self._newest: dict[int, float] = {}
        self._held: list[tuple[float, int, int, bytes]] = []
        self._poll = select.epoll()
        self._rng = random.Random()

    def open(self, ends: Sequence[tuple[str, str]]) -> None:
        """Makes two devices (name, path of its namespace; "" = ours) and joins them. Raises OSError."""
        one, other = (self._device(name, namespace) for name, namespace in ends)
        self._partner[one], self._partner[other] = other, one

    def _device(self, name: str, namespace: str) -> int:
        """A device stays in the namespace in which it was made; its descriptor works from everywhere."""
        libc = ctypes.CDLL(None, use_errno=True)
        target = os.open(namespace, os.O_RDONLY) if namespace else self._home
        try:
            if libc.setns(target, CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
            fd = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
        finally:
            libc.setns(self._home, CLONE_NEWNET)
            if target != self._home:
                os.close(target)
        self._fds[name] = fd
        self._poll.register(fd, select.EPOLLIN)
        return fd

    def shape(self, source: str, shape: Shape) -> None:
        """How packets fare that leave by this device."""
        self._shapes[self._fds[source]] = shape

    def run(self) -> None:
        """Until standard input ends."""
        commands = sys.stdin.fileno()
        self._poll.register(commands, select.EPOLLIN)
        while True:
            wait = max(0.0, self._held[0][0] - time.monotonic()) if self._held else -1
            for fd, _ in self._poll.poll(wait):
                if fd != commands:
                    self._take(fd)
                elif not self._obey():
                    return
            self._send_due()

    def _take(self, fd: int) -> None:
        shape, counts = self._shapes.get(fd, Shape()), self.counts
        for _ in range(BATCH):
            try:
                packet = os.read(fd, PACKET_MAX_BYTES)
            except OSError:  # none left, or the device is down
                return
            counts.packets += 1
            if self._rng.random() < shape.loss:
                counts.lost += 1
                continue
            at = self._newest[fd] = max(
                time.monotonic() + shape.delay + self._rng.uniform(0.0, shape.jitter), self._newest.get(fd, 0.0)
            )
            if self._rng.random() < shape.late:
                counts.late += 1
                at += shape.late_by
            self._hold(at, fd, packet)
            if self._rng.random() < shape.twice:
                counts.twice += 1
                self._hold(at, fd, packet)

    def _hold(self, at: float, fd: int, packet: bytes) -> None:
        if len(self._held) >= HELD_MAX:
            self.counts.overflowed += 1
            return
        # The number keeps the order of packets whose time is the same.
        heapq.heappush(self._held, (at, self.counts.packets, self._partner[fd], packet))

    def _send_due(self) -> None:
        now = time.monotonic()
        while self._held and self._held[0][0] <= now:
            _, _, to, packet = heapq.heappop(self._held)
            with contextlib.suppress(OSError):  # the far end is unplugged
                os.write(to, packet)

    def _obey(self) -> bool:
        line = sys.stdin.readline()
        if not line:
            return False
        try:
            answer: object = self._do(json.loads(line))
        except (OSError, KeyError, TypeError, ValueError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
        return True

    def _do(self, command: Mapping[str, Any]) -> object:
        if "open" in command:
            self.open([(str(name), str(namespace)) for name, namespace in command["open"]])
        elif "shape" in command:
            self.shape(command["shape"], Shape(**command["as"]))
        self.counts.seconds = time.process_time()
        return asdict(self.counts)


class RelayProcess:
    """The relay as a child of this process."""

    def __init__(self) -> None:
        argv = [sys.executable, "-m", "tests.faults.relay"]
        self._child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, command: Mapping[str, Any]) -> Counts:
        """Raises OSError with what it said."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps(command) + "\n")
        self._child.stdin.flush()
        answer = json.loads(self._child.stdout.readline() or '{"error": "the relay has ended"}')
        if "error" in answer:
            raise OSError(answer["error"])
        return Counts(**answer)

    def close(self) -> None:
        """Ends it, and its devices with it."""
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout):
            if stream is not None:
                stream.close()


def main() -> None:
    """Command line."""
    Relay().run()


if __name__ == "__main__":
    main()
