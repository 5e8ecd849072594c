"""Cuts are cuts, and nothing stays behind: on this machine's kernel, without a group. Needs root."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.network import why_no_disks, why_not
from tests.faults.relay import why_no_relay

ROOT = Path(__file__).parents[2]
WHY_NOT = why_not()

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "possible")

CUTS = """
import json
from tests.faults.network import Network, enter
enter()
network = Network(["a", "b"])
network.build()
seen = {}
def look(when):
    seen[when] = [network.reaches(*pair) for pair in (("a", "b"), ("b", "a"), ("world", "a"), ("world", "b"))]
look("whole")
network.cut("a", "b"); look("cut"); network.heal()
network.link_down("a", "b"); look("unplugged"); network.heal()
look("healed")
network.isolate("a"); look("isolated"); network.heal()
# one way: what b sends arrives, what comes back does not, and that is all that is lost
network.drop("a", "b")
import subprocess, sys, time
code = "import socket; s = socket.socket(type=2); s.bind(('127.0.%d.1', 5000)); s.settimeout(1.5); print(s.recv(9))"
send = "import socket; socket.socket(type=2).sendto(b'x', ('127.0.%d.1', 5000))"
def arrives(source, target):
    number = network.places.index(target)
    run = [*network.prefix(target), sys.executable, "-S", "-c", code % number]
    waits = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for _ in range(10):
        time.sleep(0.15)
        subprocess.run([*network.prefix(source), sys.executable, "-S", "-c", send % number], check=True)
        if waits.poll() is not None:
            break
    return b"x" in waits.communicate()[0]
seen["one way"] = [arrives("a", "b"), arrives("b", "a")]
print(json.dumps(seen))
"""

HELD = (
    """
import json, subprocess, sys
from tests.faults.network import Network, enter
from tests.faults.relay import Shape
enter()
network = Network(["a", "b"])
network.build()
seen = {}
there_and_back = """
    + repr("""
import socket, time
def once():
    began = time.monotonic()
    try:
        socket.create_connection(("127.0.2.1", 9), timeout=5)
    except ConnectionRefusedError:
        return time.monotonic() - began
print(min(once() for _ in range(3)))
""")
    + """
listen = """
    + repr("""
import socket, sys
s = socket.socket(type=2); s.bind(("127.0.2.1", 5000)); s.settimeout(2.0); print("ready", flush=True)
try:
    while True: print(s.recv(9).decode(), flush=True)
except TimeoutError: pass
""")
    + """
send = "import socket; s = socket.socket(type=2); [s.sendto(b'%d' % n, ('127.0.2.1', 5000)) for n in range(60)]"
def run(place, code, **more):
    return subprocess.Popen([*network.prefix(place), sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True)
def seconds():
    return float(run("a", there_and_back).communicate()[0])
def arrived():
    waits = run("b", listen)
    waits.stdout.readline()
    run("a", send).wait()
    return [int(line) for line in waits.communicate()[0].split()]
seen["plain"] = arrived()
network.shape_all(Shape(delay=0.04))
seen["far"] = seconds()
network.shape_all(Shape())
network.shape("a", "b", Shape(delay=0.2))
seen["one way"] = seconds()
network.cut("a", "b"); seen["cut"] = network.reaches("a", "b")
network.heal(); seen["healed"] = network.reaches("a", "b")
before = network.carried().packets
seconds(); seen["carried after that"] = network.carried().packets - before
network.shape("a", "b", Shape(late=0.5)); seen["late"] = arrived()
network.shape("a", "b", Shape(twice=1.0)); seen["twice"] = arrived()
network.shape("a", "b", Shape(loss=1.0)); seen["lost"] = arrived()
network.heal(); network.link_down("a", "b"); network.shape("a", "b", Shape(delay=0.01))
seen["unplugged"] = network.reaches("a", "b")
network.heal(); network.standing = Shape(delay=0.04); network.heal(); seen["standing"] = seconds()
print(json.dumps(seen))
"""
)

FROZEN = """
import subprocess, time
from tests.faults import network, stale
folder = stale.new_folder()
network.enter()
with (folder / "x.img").open("wb") as image:
    image.truncate(32 * 2**20)
(folder / "x").mkdir()
subprocess.run(["mkfs.ext4", "-q", str(folder / "x.img")], check=True)
subprocess.run(["mount", "-o", "loop", str(folder / "x.img"), str(folder / "x")], check=True)
subprocess.run(["fsfreeze", "-f", str(folder / "x")], check=True)
print("frozen", flush=True)
time.sleep(60)
"""

CLEAR = "from tests.faults.stale import clear_stale; clear_stale(print)"


def _python(code: str, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    argv = [sys.executable, "-c", code]
    return subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_links_and_rules_cut_what_they_say_and_nothing_else(tmp_path: Path) -> None:
    out, err = _python(CUTS, tmp_path).communicate(timeout=100)
    assert out, err
    assert json.loads(out) == {
        "whole": [True, True, True, True],
        "cut": [False, False, True, True],
        "unplugged": [False, False, True, True],
        "healed": [True, True, True, True],
        "isolated": [False, False, False, True],
        "one way": [False, True],
    }
    own = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    assert "dr0to1" not in own


@pytest.mark.skipif(bool(why_no_relay()), reason=why_no_relay() or "possible")
def test_packets_are_held_lost_doubled_and_overtaken_as_told_and_links_that_are_not_shaped_are_plain(tmp_path: Path) -> None:
    out, err = _python(HELD, tmp_path).communicate(timeout=100)
    assert out, err
    seen = json.loads(out)
    every = list(range(60))
    assert seen["plain"] == every
    assert seen["far"] >= 0.08
    assert seen["one way"] >= 0.2
    assert (seen["cut"], seen["healed"], seen["carried after that"]) == (False, True, 0)
    assert sorted(seen["late"]) == every
    assert seen["late"] != every
    assert seen["twice"] == sorted(every * 2)
    assert seen["lost"] == []
    assert seen["unplugged"] is False
    assert seen["standing"] >= 0.08


@pytest.mark.skipif(bool(why_no_disks()), reason=why_no_disks() or "possible")
def test_a_frozen_disk_that_a_killed_run_has_left_is_found_and_removed(tmp_path: Path) -> None:
    run = _python(FROZEN, tmp_path)
    assert run.stdout is not None
    assert run.stdout.readline() == "frozen\n"
    run.kill()
    run.communicate()
    out, err = _python(CLEAR, tmp_path).communicate(timeout=60)
    assert "removed what an earlier run had left" in out, err
    assert list(tmp_path.iterdir()) == []
    devices = subprocess.run(["losetup", "-l", "-n", "-O", "BACK-FILE"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in devices


def test_a_run_that_still_lives_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "dr-faults-alive"
    folder.mkdir()
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    (folder / "owner.json").write_text(json.dumps([os.getpid(), ticks]))
    _python(CLEAR, tmp_path).communicate(timeout=60)
    assert folder.exists()
