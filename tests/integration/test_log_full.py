"""`drctl serve` as a process whose log cannot be written: a full disk, a reader that has stopped, one that has gone.

It neither dies nor waits nor loses its lease by it, and says it where people look. Real etcd, a real stand-in for the stores.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from controller.agent import Checkpoints
from controller.errors import Misconfigured
from controller.lab.aws import LAB_ENVIRONMENT, AwsStandIn, provision_region
from controller.lab.etcd import EtcdAddress, EtcdCluster, find_etcd
from tests.support.ports import free_ports

pytestmark = [pytest.mark.etcd, pytest.mark.aws, pytest.mark.slow]
PATIENT_SECONDS = 90.0
TTL_SECONDS = 5
REGIONS = {"one": "eu-west-1", "two": "eu-central-1"}


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    try:
        binary = find_etcd()
    except Misconfigured as error:
        pytest.skip(f"needs etcd: {error}")
    address = EtcdAddress("m1", "127.0.0.1", *free_ports(2))
    with EtcdCluster(binary, [address], tmp_path_factory.mktemp("etcd"), unsafe_no_fsync=True) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def stores() -> Iterator[AwsStandIn]:
    with AwsStandIn() as server:
        for name, aws_region in REGIONS.items():
            provision_region(server.endpoint, aws_region=aws_region, bucket=f"bucket-{name}", table=f"table-{name}")
        yield server


def settings(etcd: EtcdCluster, stores: AwsStandIn, folder: Path, instance: str, ports: dict[str, int]) -> Path:
    """Settings of an instance of region "one"; nobody serves region "two"."""
    doors = ", ".join(f'"http://127.0.0.1:{port}"' for port in ports.values())
    regions = "\n".join(
        f"""[regions.{name}]
bucket = "bucket-{name}"
table = "table-{name}"
aws_region = "{aws_region}"
addresses = ["127.0.{number}.1"]
controllers = [{doors if name == "one" else '"http://127.0.0.1:9"'}]
s3_endpoint = "{stores.endpoint}"
dynamodb_endpoint = "{stores.endpoint}"
"""
        for number, (name, aws_region) in enumerate(REGIONS.items(), start=1)
    )
    path = folder / f"{instance}.toml"
    path.write_text(f"""group = "fleet"
environment = "lab"
region = "one"
instance = "{instance}"
state_dir = "{folder / instance}"
[etcd]
endpoints = ["{etcd.endpoints[0]}"]
ttl_seconds = {TTL_SECONDS}
[api]
port = {ports[instance]}
{regions}
[traffic]
zone_id = "Z1"
name = "agents.dr.example."
endpoint = "http://127.0.0.1:9"
[dns]
servers = ["127.0.0.1:9"]
[approvals]
allowed_signers = "{folder / "allowed_signers"}"
""")
    return path


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("DR_")} | LAB_ENVIRONMENT


@contextlib.contextmanager
def serving(config: Path, log: int) -> Iterator[subprocess.Popen[bytes]]:
    argv = [sys.executable, "-m", "controller", "serve", "--config", str(config)]
    process = subprocess.Popen(argv, env=environment(), stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


class Asker:
    """Looks at one controller. Whatever it is asked for must become true while the process lives."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self._process = process
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=15.0)

    def get(self, path: str) -> Any:
        answer = self._http.get(path)
        return answer.json() if answer.status_code == 200 else None

    def until(self, true: Callable[[], Any], what: str) -> Any:
        end = time.monotonic() + PATIENT_SECONDS
        while time.monotonic() < end:
            assert self._process.poll() is None, f"it died of its log: exit code {self._process.returncode}"
            with contextlib.suppress(httpx.TransportError):
                if found := true():
                    return found
            time.sleep(0.1)
        raise AssertionError(f"never: {what}")

    def active(self) -> None:
        self.until(lambda: self.get("/active"), "active")

    def warned(self, words: str) -> None:
        self.until(lambda: any(words in warning for warning in (self.get("/v1/status") or {}).get("warnings", ())), words)

    def keeps_its_lease(self) -> int:
        """For longer than the lease lives, and acknowledges meanwhile. Returns its epoch."""
        began, number, first = time.monotonic(), 0, 0
        with Checkpoints([str(self._http.base_url)], timeout_seconds=30.0) as agent:
            while time.monotonic() < began + TTL_SECONDS + 2.0:
                number += 1
                agent.put("agent", f"{began}-{number}", b"it works on")
                first = agent.newest_epoch if number == 1 else first
                assert self.get("/active") is not None
                time.sleep(0.5)
            assert agent.newest_epoch == first
            return first


def stuffed(reader: int) -> None:
    """Fills a pipe by a description of our own, so that the child's writes go on to block."""
    own = os.open(f"/proc/self/fd/{reader}", os.O_WRONLY | os.O_NONBLOCK)
    try:
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(own, b"\n")
    finally:
        os.close(own)


def test_a_controller_whose_log_cannot_be_written_goes_on_and_says_so(
    etcd: EtcdCluster, stores: AwsStandIn, tmp_path: Path
) -> None:
    (tmp_path / "allowed_signers").write_text("")
    ports = dict(zip("ab", free_ports(2), strict=True))
    configs = {instance: settings(etcd, stores, tmp_path, instance, ports) for instance in ports}
    founding = [sys.executable, "-m", "controller", "bootstrap", "--config", str(configs["a"]), "--region", "one"]
    founded = subprocess.run(founding, env=environment(), capture_output=True, text=True, timeout=PATIENT_SECONDS, check=False)
    assert founded.returncode == 0, founded.stderr

    full = os.open("/dev/full", os.O_WRONLY)
    with serving(configs["a"], full) as process:
        os.close(full)
        a = Asker(process, ports["a"])
        a.active()
        a.warned("the log cannot be written: No space left on device")
        assert a.keeps_its_lease() > 0
        process.terminate()
        assert process.wait(PATIENT_SECONDS) == 0, "it ends in order, too"

    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    with serving(configs["b"], writer) as process:
        os.close(writer)
        b = Asker(process, ports["b"])
        b.until(lambda: b.get("/livez"), "up")
        stuffed(reader)  # whoever read the log has stopped; taking over is said in the log
        b.active()
        b.warned("nobody reads the other end")
        epoch = b.keeps_its_lease()
        os.close(reader)  # and now it is gone
        b.warned("Broken pipe")
        assert b.keeps_its_lease() == epoch
