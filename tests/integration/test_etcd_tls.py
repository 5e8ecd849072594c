"""A real etcd that wants a client certificate from everybody: who is refused, that a holder holds, and that renewal needs no
restart. The certificates are made here, by an authority that lives as long as the test."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from controller.adapters import etcd_endpoint
from controller.adapters.clock import SystemClock
from controller.adapters.etcd import EtcdCoordinator
from controller.domain.lease import Beat
from controller.domain.model import Authority
from controller.errors import Misconfigured, Unavailable
from controller.lab.certificates import Authority as Signer
from controller.lab.certificates import Pair
from controller.lab.etcd import EtcdAddress, EtcdCluster, EtcdTls, find_etcd
from controller.ports import Put
from controller.runtime.documents import Keys, encode
from controller.runtime.tenure import Tenure, acquire
from tests.support.ports import free_ports

pytestmark = pytest.mark.etcd

KEYS = Keys("/dr", "fleet")


@dataclass(frozen=True)
class Secured:
    """One member with TLS, and who signs for it."""

    cluster: EtcdCluster
    signer: Signer

    @property
    def url(self) -> str:
        return self.cluster.endpoints[0]


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    try:
        binary = find_etcd()
    except Misconfigured as error:
        pytest.skip(f"needs etcd: {error}")
    folder = tmp_path_factory.mktemp("etcd-tls")
    signer = Signer(folder / "tls")
    pair = signer.issue("server", hosts=["127.0.0.1"])
    client, peer = free_ports(2)
    address = EtcdAddress("m1", "127.0.0.1", client, peer, secure=True)
    tls = EtcdTls(signer.cert_file, pair.cert_file, pair.key_file)
    with EtcdCluster(binary, [address], folder / "data", unsafe_no_fsync=True, tls=tls) as cluster:
        yield Secured(cluster, signer)


@contextlib.asynccontextmanager
async def connected(
    etcd: Secured, pair: Pair | None, *, ca: Path | None = None, seconds: float = 5.0
) -> AsyncIterator[EtcdCoordinator]:
    coordinator = EtcdCoordinator(
        [etcd.url],
        call_timeout_seconds=seconds,
        ca_file=str(ca or etcd.signer.cert_file),
        cert_file=str(pair.cert_file) if pair else None,
        key_file=str(pair.key_file) if pair else None,
    )
    try:
        yield coordinator
    finally:
        await coordinator.close()


async def test_a_holder_with_a_certificate_keeps_its_right_by_heartbeats(etcd: Secured) -> None:
    assert etcd.url.startswith("https://")
    async with connected(etcd, etcd.signer.issue("controller")) as c:
        await c.txn([], [Put(KEYS.authority, encode(Authority("eu-west-1", 3, ("eu-west-1", "eu-central-1"))))])
        found = await acquire(
            c, KEYS, SystemClock(), stream="s00", region="eu-west-1", instance="a", address="https://127.0.0.1:1",
            ttl_seconds=5, margin_seconds=1.0, floor=0,
        )  # fmt: skip
        assert isinstance(found, Tenure)
        before = found.right.deadline
        verdict = await found.heartbeat()
        assert verdict.beat is Beat.EXTENDS, verdict
        assert found.right.deadline > before
        assert found.may_act()
        await found.release()


async def test_nobody_is_let_in_without_a_certificate_of_the_right_authority_that_is_valid_now(
    etcd: Secured, tmp_path: Path
) -> None:
    stranger = Signer(tmp_path)
    now = datetime.now(UTC)
    day = timedelta(days=1)
    refused = {
        "none": None,
        "another authority's": stranger.issue("client"),
        "expired": etcd.signer.issue("expired", begins=now - 2 * day, ends=now - day),
        "of tomorrow": etcd.signer.issue("tomorrow", begins=now + day, ends=now + 2 * day),
    }
    for what, pair in refused.items():
        async with connected(etcd, pair, seconds=1.0) as c:
            with pytest.raises(Unavailable) as caught:
                await c.get("/dr")
            assert "etcd.ca_file" in caught.value.hint or "quorum" in caught.value.hint, what


async def test_a_server_that_another_authority_vouches_for_is_not_believed(etcd: Secured, tmp_path: Path) -> None:
    async with connected(etcd, etcd.signer.issue("deceived"), ca=Signer(tmp_path).cert_file, seconds=1.0) as c:
        with pytest.raises(Unavailable) as caught:
            await c.get("/dr")
        assert "etcd.ca_file" in caught.value.hint


async def test_plain_text_to_a_server_with_tls_is_refused(etcd: Secured) -> None:
    c = EtcdCoordinator([etcd.url.replace("https", "http")], call_timeout_seconds=1.0)
    try:
        with pytest.raises(Unavailable):
            await c.get("/dr")
    finally:
        await c.close()


async def test_renewed_files_are_used_without_a_restart_and_half_renewed_ones_are_not(
    etcd: Secured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_endpoint, "LOOK_SECONDS", 0.0)
    stranger = Signer(tmp_path).issue("renewed")
    async with connected(etcd, stranger, seconds=2.0) as c:
        with pytest.raises(Unavailable):
            await c.get("/dr")
        fresh = etcd.signer.issue("fresh")
        fresh.cert_file.replace(stranger.cert_file)  # the key is still the old one: no pair, so the old connection stays
        with pytest.raises(Unavailable):
            await c.get("/dr")
        fresh.key_file.replace(stranger.key_file)
        assert await c.get("/nothing") is None


async def test_files_that_break_later_do_not_end_a_connection_that_works(
    etcd: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_endpoint, "LOOK_SECONDS", 0.0)
    pair = etcd.signer.issue("steady")
    async with connected(etcd, pair) as c:
        assert await c.get("/nothing") is None
        for damage in (b"", b"-----BEGIN CERTIFICATE-----\nrubbish\n", None):
            if damage is None:
                pair.cert_file.unlink()
            else:
                pair.cert_file.write_bytes(damage)
                with pytest.raises(ssl.SSLError):
                    ssl.create_default_context().load_cert_chain(pair.cert_file, pair.key_file)
            assert await c.get("/nothing") is None
