"""Nothing that the lab started outlives it, and nothing else is ever hit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from controller.errors import Misconfigured
from controller.lab.processes import Children, Roster, Spec, Started, is_alive, is_stopped, marked, start_ticks, sweep, tail

pytestmark = pytest.mark.lab

SLEEP = (sys.executable, "-c", "import time; time.sleep(600)")


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "the condition did not come true in time"
        time.sleep(0.02)


def test_a_child_is_stopped_continued_and_killed_by_region_and_kind(tmp_path: Path) -> None:
    children = Children(tmp_path, "test-identity-1")
    controller = children.start(Spec("c", "controller", "eu", SLEEP))
    store = children.start(Spec("s", "store", "eu", SLEEP))
    other = children.start(Spec("o", "controller", "us", SLEEP))
    assert children.select(region="eu", kinds=["controller"]) == (controller,)
    assert children.signal(children.select(region="eu", kinds=["store"]), signal.SIGSTOP) == 1
    wait_for(lambda: is_stopped(store.pid))
    assert [children.state(p) for p in (controller, store, other)] == ["running", "stopped", "running"]
    assert children.kill(children.select(region="eu")) == 2, "a stopped process is killed, too"
    assert children.select() == (other,)
    assert children.state(store) == "exited -9"
    children.kill(children.select())


def test_a_process_that_took_over_the_number_of_a_dead_one_is_never_hit(tmp_path: Path) -> None:
    bystander = subprocess.Popen(SLEEP)
    try:
        ticks = start_ticks(bystander.pid)
        assert ticks is not None
        Roster(tmp_path / "processes.jsonl").add(Started("mine", "store", "eu", bystander.pid, ticks - 1))
        assert sweep(tmp_path, "test-identity-2") == ()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


PARENT = """
import os, sys, time
from pathlib import Path
from controller.lab.processes import Children, Spec
sleep = (sys.executable, "-c", "import time; time.sleep(600)")
fork = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)"
double = (sys.executable, "-c", fork)
children = Children(Path(sys.argv[1]), sys.argv[2])
children.start(Spec("one", "store", "eu", sleep))
children.start(Spec("two", "store", "eu", double))
print("ready", flush=True)
time.sleep(600)
"""


def test_children_die_with_a_killed_lab_and_a_sweep_finds_grandchildren(tmp_path: Path) -> None:
    identity = f"test-identity-3-{os.getpid()}"
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), identity], stdout=subprocess.PIPE, text=True) as lab:
        assert lab.stdout is not None
        assert lab.stdout.readline() == "ready\n"
        wait_for(lambda: len(marked(identity)) == 3)
        lab.kill()
        lab.wait()
    children = Roster(tmp_path / "processes.jsonl").read()
    assert [child.name for child in children] == ["one", "two"]
    wait_for(lambda: not any(is_alive(child) for child in children))
    wait_for(lambda: len(marked(identity)) == 1)
    names = sweep(tmp_path, identity)
    assert len(names) == 1
    assert names[0].startswith("pid ")
    wait_for(lambda: marked(identity) == ())


def test_a_line_that_a_crash_cut_off_does_not_hide_the_others(tmp_path: Path) -> None:
    roster = Roster(tmp_path / "processes.jsonl")
    roster.add(Started("a", "store", "eu", 1, 2))
    with (tmp_path / "processes.jsonl").open("a") as file:
        file.write('{"name": "b", "ki')
    assert [process.name for process in roster.read()] == ["a"]


def test_a_program_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="cannot start etcd-eu"):
        Children(tmp_path, "x").start(Spec("etcd-eu", "etcd", "eu", ("/no/such/program",)))


def test_output_goes_to_the_log_of_the_process(tmp_path: Path) -> None:
    children = Children(tmp_path, "x")
    children.start(Spec("talker", "x", "", (sys.executable, "-c", "print('a\\nb\\nc')")))
    wait_for(lambda: children.exit_code("talker") == 0)
    assert tail(children.log("talker"), 2) == "b\nc"
    assert tail(tmp_path / "none.log") == ""
