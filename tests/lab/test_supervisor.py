"""The lab's parts come up, regions are killed, frozen and thawed, and nothing survives the lab, however it ends."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from controller.cli.lab import read_settings
from controller.errors import Refused, Unavailable
from controller.lab import control
from controller.lab.ending import bring_down, read_note
from controller.lab.layout import Layout
from controller.lab.processes import is_stopped, marked
from controller.lab.supervisor import Lab
from controller.lab.topology import Topology, build

pytestmark = [pytest.mark.lab, pytest.mark.slow]

OFFSET = 10000 + random.Random(os.getpid()).randrange(0, 9000)
"""Beside a lab that a person may have up, and beside other runs of these tests."""
PATIENT_SECONDS = 30.0
"""For an answer that has to come: a machine that is busy with other tests is slow, not wrong."""
SILENT_SECONDS = 2.0
"""For one that must not come."""


def topology(state_dir: Path) -> Topology:
    return build(read_settings(None), state_dir, offset=OFFSET)


@contextlib.asynccontextmanager
async def infrastructure(state_dir: Path) -> AsyncIterator[Lab]:
    lab = Lab(topology(state_dir), say=lambda _: None)
    try:
        await lab.start_infrastructure()
        yield lab
    finally:
        await lab.down()


async def test_a_region_is_frozen_and_thawed_while_the_others_go_on_and_nothing_is_left(tmp_path: Path) -> None:
    async with infrastructure(tmp_path) as lab:
        identity = lab.identity
        names = {process.name for process in lab.processes()}
        assert {"wan", "dns", "webhook", "route53", "store-eu-west-1", "etcd-us-east-1"} <= names
        by_name = {process.name: process.pid for process in lab.processes()}
        assert lab.freeze("eu-west-1") == {"stopped": 2}
        await lab.wait(lambda: stopped(by_name["store-eu-west-1"]), "a stopped store", seconds=60)
        states = {p["name"]: p["state"] for p in lab.status()["processes"]}
        assert states["etcd-eu-west-1"] == "stopped"
        assert states["store-eu-central-1"] == "running"
        await lab.wait(lambda: etcd_serves(lab, "us-east-1"), "etcd without the frozen member", seconds=90)
        assert await store_answers(lab, "eu-central-1")
        assert not await store_answers(lab, "eu-west-1", SILENT_SECONDS)
        with pytest.raises(Refused, match="unknown region 'mars'"):
            lab.kill("mars")
        with pytest.raises(Refused, match="a lab is running"):
            await Lab(topology(tmp_path), say=lambda _: None).start_infrastructure()
        answer = await control.call(lab.layout.socket, "status")
        assert len(answer["links"]) == 6
        for link in lab.topology.links:
            frozen = link.target == "eu-west-1"
            patience = SILENT_SECONDS if frozen else PATIENT_SECONDS
            assert await answers(f"http://{link.listen_host}:{link.listen_port}", patience) != frozen
        assert lab.topology.zone_id != "ZLAB"
        assert lab.topology.zone_id in lab.topology.operator_config.read_text()
        assert lab.topology.allowed_signers.read_text().count("ssh-ed25519") == 3
        lab.freeze("us-east-1")  # down must not be stopped by what is stopped
    assert marked(identity) == ()
    assert not lab.layout.note.exists()


async def stopped(pid: int) -> bool:
    return is_stopped(pid)


async def store_answers(lab: Lab, region: str, seconds: float = PATIENT_SECONDS) -> bool:
    return await answers(lab.topology.region(region).store.url, seconds)


async def answers(url: str, seconds: float = PATIENT_SECONDS) -> bool:
    async with httpx.AsyncClient(timeout=seconds, trust_env=False) as client:
        with contextlib.suppress(httpx.HTTPError):
            return (await client.get(f"{url}/_ministack/health")).status_code == 200
    return False


async def etcd_serves(lab: Lab, region: str) -> bool:
    async with httpx.AsyncClient(timeout=5.0, trust_env=False) as client:
        with contextlib.suppress(httpx.HTTPError):
            return (await client.get(f"{lab.topology.region(region).etcd.url}/health")).json()["health"] == "true"
    return False


async def test_a_start_that_fails_leaves_nothing_and_shows_the_log(tmp_path: Path) -> None:
    identity = ""
    async with infrastructure(tmp_path / "first"):
        second = Lab(topology(tmp_path / "second"), say=lambda _: None)
        identity = second.identity
        with pytest.raises(Unavailable, match="already in use"):  # every address is taken by the first
            async with second:
                pytest.fail("a second lab on the same addresses cannot come up")
        assert marked(identity) == ()
        assert not second.layout.note.exists()


OWNER = """
import asyncio, sys
from pathlib import Path
from controller.cli.lab import finish, read_settings
from controller.lab.supervisor import Lab
from controller.lab.topology import build

async def main():
    lab = Lab(build(read_settings(None), Path(sys.argv[1]), offset=int(sys.argv[2])), say=lambda _: None)
    try:
        await lab.start_infrastructure()
        print("ready", flush=True)
        await lab.stopping.wait()
    finally:
        await lab.down()

try:
    finish(main())
except BaseException as end:
    print(type(end).__name__, flush=True)
"""


@contextlib.contextmanager
def owner(state_dir: Path):  # type: ignore[no-untyped-def]
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(state_dir), str(OFFSET)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_no_process_outlives_a_lab_that_is_ended_by_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    with owner(tmp_path) as process:
        identity = str(read_note(Layout(tmp_path))["identity"])
        assert len(marked(identity)) >= 10
        process.send_signal(number)
        process.wait(timeout=90)
        until = time.monotonic() + 20
        while left := marked(identity):
            assert time.monotonic() < until, f"still there: {left}"
            time.sleep(0.05)


async def test_down_from_another_process_ends_a_lab_that_listens_and_one_that_hangs(tmp_path: Path) -> None:
    assert await bring_down(Layout(tmp_path / "nothing")) == ()
    with owner(tmp_path):
        identity = str(read_note(Layout(tmp_path))["identity"])
        assert await bring_down(Layout(tmp_path)) == ()
        assert marked(identity) == ()
    with owner(tmp_path) as process:
        identity = str(read_note(Layout(tmp_path))["identity"])
        process.send_signal(signal.SIGSTOP)
        await bring_down(Layout(tmp_path), deadline_seconds=1.0)
        assert process.wait(timeout=60) == -signal.SIGKILL
        assert marked(identity) == ()
