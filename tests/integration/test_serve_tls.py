"""`drctl serve` as a process, with a real etcd, everything over TLS: what its settings say is what its doors do."""

from __future__ import annotations

import contextlib
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from controller.adapters.access import AccessDocument, new_token, with_entry, write_document
from controller.errors import Misconfigured
from controller.lab.certificates import Authority
from controller.lab.etcd import EtcdAddress, EtcdCluster, EtcdTls, find_etcd
from tests.support.ports import free_ports

pytestmark = [pytest.mark.etcd, pytest.mark.timeout(900)]
PATIENT_SECONDS = 240.0


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EtcdCluster, Authority, Path]]:
    try:
        binary = find_etcd()
    except Misconfigured as error:
        pytest.skip(f"needs etcd: {error}")
    folder = tmp_path_factory.mktemp("serve-tls")
    signer = Authority(folder)
    pair = signer.issue("etcd", hosts=["127.0.0.1"])
    client, peer = free_ports(2)
    address = EtcdAddress("m1", "127.0.0.1", client, peer, secure=True)
    tls = EtcdTls(signer.cert_file, pair.cert_file, pair.key_file)
    with EtcdCluster(binary, [address], folder / "data", unsafe_no_fsync=True, tls=tls) as cluster:
        yield cluster, signer, folder


def settings(etcd_url: str, signer: Authority, folder: Path, port: int) -> str:
    """Of one controller; its stores do not answer, and need not."""
    pair = signer.issue("controller", hosts=["127.0.0.1"], uris=["drctl://fleet/one/a"])
    regions = "\n".join(
        f"""[regions.{name}]
bucket = "bucket-{name}"
table = "table-{name}"
addresses = ["127.0.{number}.1"]
controllers = ["https://127.0.0.1:{port if name == "one" else 1}"]
s3_endpoint = "http://127.0.0.1:9"
dynamodb_endpoint = "http://127.0.0.1:9"
"""
        for number, name in enumerate(("one", "two"), start=1)
    )
    files = f'cert_file = "{pair.cert_file}"\nkey_file = "{pair.key_file}"\nca_file = "{signer.cert_file}"\n'
    return f"""group = "fleet"
environment = "lab"
region = "one"
instance = "a"
state_dir = "{folder / "state"}"
[etcd]
endpoints = ["{etcd_url}"]
ttl_seconds = 5
{files}
[api]
port = {port}
client_ca_file = "{signer.cert_file}"
access_file = "{folder / "access.json"}"
{files}
{regions}
[traffic]
zone_id = "Z1"
name = "agents.dr.example."
endpoint = "http://127.0.0.1:9"
[dns]
servers = ["127.0.0.1:9"]
[approvals]
allowed_signers = "{folder / "allowed_signers"}"
"""


def environment() -> dict[str, str]:
    """Without settings of whoever runs the tests; the stores' keys are asked for, and never used."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DR_")}
    return clean | {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_EC2_METADATA_DISABLED": "true"}


@contextlib.contextmanager
def serving(config: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "controller", "serve", "--config", str(config)], env=environment(), stdout=file, stderr=file
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_controller_speaks_tls_to_etcd_and_to_callers_and_lets_in_whom_its_file_names(
    etcd: tuple[EtcdCluster, Authority, Path],
) -> None:
    cluster, signer, folder = etcd
    token, digest = new_token("fleet")
    access = with_entry(AccessDocument(group="fleet"), {"name": "wall", "role": "viewer", "sha256": digest})
    access = with_entry(access, {"name": "grafana", "role": "viewer", "certificate": "grafana.example.com"})
    shown = signer.issue("grafana", hosts=["grafana.example.com"])
    write_document(folder / "access.json", access)
    (folder / "allowed_signers").write_text("")
    (port,) = free_ports(1)
    config = folder / "controller.toml"
    config.write_text(settings(cluster.endpoints[0], signer, folder, port))
    context = ssl.create_default_context(cafile=signer.cert_file)
    founding = [sys.executable, "-m", "controller", "bootstrap", "--config", str(config), "--region", "one"]
    founded = subprocess.run(founding, env=environment(), capture_output=True, text=True, timeout=PATIENT_SECONDS, check=False)
    assert founded.returncode == 0, founded.stderr
    with serving(config, folder / "log") as process, httpx.Client(verify=context, trust_env=False, timeout=15) as http:
        url, end = f"https://127.0.0.1:{port}", time.monotonic() + PATIENT_SECONDS
        while True:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end, (folder / "log").read_text()
            with contextlib.suppress(httpx.ConnectError):
                assert http.get(f"{url}/livez").status_code == 200
                break
            time.sleep(0.2)
        assert http.get(f"{url}/v1/status").status_code == 401
        answer = http.get(f"{url}/v1/status", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["authority"]["region"] == "one", "etcd was asked, over TLS with the controller's certificate"
        with pytest.raises(httpx.HTTPError):
            http.get(f"http://127.0.0.1:{port}/livez")
        with_certificate = ssl.create_default_context(cafile=signer.cert_file)
        with_certificate.load_cert_chain(shown.cert_file, shown.key_file)
        with httpx.Client(verify=with_certificate, trust_env=False, timeout=15) as standing:
            assert standing.get(f"{url}/v1/status").status_code == 200
            revoke = [sys.executable, "-m", "controller", "token", "revoke-certificate", str(shown.cert_file)]
            done = subprocess.run([*revoke, "--config", str(config)], env=environment(), capture_output=True, check=False)
            assert done.returncode == 0, done.stderr
            while standing.get(f"{url}/v1/status").status_code != 401:
                assert time.monotonic() < end, "the certificate was revoked, and is still let in"
                time.sleep(0.5)
        assert http.get(f"{url}/v1/status", headers={"Authorization": f"Bearer {token}"}).status_code == 200
        write_document(folder / "access.json", AccessDocument(group="fleet"))
        while http.get(f"{url}/v1/status", headers={"Authorization": f"Bearer {token}"}).status_code != 401:
            assert time.monotonic() < end, "revoked, and still let in"
            time.sleep(0.5)
    assert token.split(".")[2] not in (folder / "log").read_text()
