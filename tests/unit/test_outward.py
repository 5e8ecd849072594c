"""Where this process connects to when a URL comes from settings or data: real servers, names that change, odd spellings."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from controller.adapters.notify import WebhookPager
from controller.adapters.outward import GuardedTransport
from controller.domain.outward import BAD_PORTS, INSIDE, LOOPBACK, Network, address_problem, host_problem, port_problem
from controller.errors import Misconfigured, Unavailable
from controller.ports import Page
from controller.runtime.peers import HttpPeers

PAGE = Page("k", "critical", "t", "b")
ALL = (*INSIDE, *LOOPBACK)


class Server:
    """Says the same to everybody, and remembers what it was told and who connected."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.connections = 0
        self.heads: list[str] = []
        self.url = ""
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.heads.append(head.decode())
                length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")), 0)
                await reader.readexactly(length)
                writer.write(self.answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


OK = b"HTTP/1.1 204 No Content\r\n\r\n"


@asynccontextmanager
async def server(answer: bytes = OK, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    found = Server(answer)
    listening = await asyncio.start_server(found.serve, host, 0, ssl=tls)
    found.port = listening.sockets[0].getsockname()[1]
    found.url = f"{'https' if tls else 'http'}://{host}:{found.port}"
    try:
        yield found
    finally:
        listening.close()


def names(**table: Sequence[Sequence[str]]) -> GuardedTransport:
    """A transport whose DNS gives each name's answers one after the other; the last one stays."""
    left = {name.replace("_", "."): list(answers) for name, answers in table.items()}

    async def resolve(host: str, port: int) -> Sequence[str]:
        answers = left[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]

    return GuardedTransport(LOOPBACK, resolve=resolve)


def pager(url: str, transport: httpx.AsyncBaseTransport | None = None, allowed: Sequence[Network] = LOOPBACK) -> WebhookPager:
    return WebhookPager(url, 5.0, allowed=allowed, transport=transport)


# ------------------------------------------------------------------------------------------------------------- the pure rule


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254", "169.254.170.2", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "fd00:ec2::254", "fe80::1",
        "100.100.100.200", "168.63.129.16", "0.0.0.0", "::", "::ffff:0.0.0.0", "224.0.0.1", "ff02::1", "255.255.255.255",
        "240.0.0.1", "2002:a9fe:a9fe::1", "2001::1", "::a9fe:a9fe", "fec0::1", "::ffff:100.100.100.200",
    ],
)  # fmt: skip
def test_some_addresses_are_never_connected_to_whatever_is_allowed(address: str) -> None:
    assert address_problem(ipaddress.ip_address(address), ALL) is not None


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.8.9.1", "::1", "10.0.0.1", "172.16.3.4", "192.168.1.1", "100.64.0.1", "fd12::1", "::ffff:10.0.0.1"],
)
def test_addresses_inside_need_their_network_allowed(address: str) -> None:
    assert address_problem(ipaddress.ip_address(address)) is not None
    assert address_problem(ipaddress.ip_address(address), ALL) is None
    assert address_problem(ipaddress.ip_address(address), [ipaddress.ip_network("10.1.0.0/16")]) is not None


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1", "64:ff9b::5db8:d822"])
def test_public_addresses_are_connected_to(address: str) -> None:
    assert address_problem(ipaddress.ip_address(address)) is None


@given(st.ip_addresses())
def test_what_may_be_connected_to_is_global_and_nothing_else(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    if address_problem(address) is None and address not in ipaddress.ip_network("64:ff9b::/96"):
        plain = getattr(address, "ipv4_mapped", None) or address
        kinds = (plain.is_private, plain.is_loopback, plain.is_link_local, plain.is_multicast, plain.is_reserved)
        assert not any(kinds)


@pytest.mark.parametrize(
    "host",
    ["2852039166", "0x7f.1", "0177.0.0.1", "127.1", "127.0.0.0x1", "1.2.3.4.", "0x7f000001", "evil.0x1", "１２７.0.0.1",
     "ⓔxample.com", "a b", "a\tb", "", ".", "a..b", "-a.example",
     "a" * 64, "a." * 130, "exa%6dple.com", "fe80::1%eth0", "::g", "a@b", "a\\b"],
)  # fmt: skip
def test_a_host_has_one_spelling(host: str) -> None:
    assert host_problem(host) is not None


@pytest.mark.parametrize(
    "host", ["hooks.example.com", "hooks.example.com.", "localhost", "10.0.0.1", "::1", "xn--mnchen-3ya.example", "a_b"]
)
def test_ordinary_hosts_are_fine(host: str) -> None:
    assert host_problem(host) is None


def test_ports_of_other_protocols_are_not_spoken_to() -> None:
    assert all(port_problem(port) for port in (0, 22, 25, 6379, 11211, 65_536, -1))
    assert all(port_problem(port) is None for port in (80, 443, 8080, 8443, 9093))
    assert all(0 <= port < 65_536 for port in BAD_PORTS)


# ---------------------------------------------------------------------------------------------------------- real connections


async def test_a_page_goes_to_the_address_that_was_judged_under_the_name_that_was_meant() -> None:
    async with server() as hook:
        await pager(f"http://hooks.example:{hook.port}/secret", names(hooks_example=[["127.0.0.1"]])).page(PAGE)
        (head,) = hook.heads
    assert head.startswith("POST /secret HTTP/1.1\r\n")
    assert f"host: hooks.example:{hook.port}" in head.lower()


async def test_a_name_that_changes_between_the_look_and_the_connection_changes_nothing() -> None:
    """DNS rebinding: good at the first question, the metadata service at the next. Each connection asks once."""
    async with server() as hook:
        one = pager(f"http://rebinding.example:{hook.port}/", names(rebinding_example=[["127.0.0.1"], ["169.254.169.254"]]))
        await one.page(PAGE)
        with pytest.raises(Misconfigured, match="link-local"):
            await one.page(PAGE)
        assert (len(hook.heads), hook.connections) == (1, 1)


@pytest.mark.parametrize("answers", [["127.0.0.1", "169.254.169.254"], ["::ffff:169.254.169.254"], ["10.0.0.1"], ["0.0.0.0"]])
async def test_a_name_with_one_bad_address_is_not_connected_to_at_all(answers: Sequence[str]) -> None:
    async with server() as hook:
        with pytest.raises(Misconfigured):
            await pager(f"http://mixed.example:{hook.port}/", names(mixed_example=[answers])).page(PAGE)
        assert hook.connections == 0


async def test_loopback_is_connected_to_only_where_it_is_allowed() -> None:
    async with server() as hook:
        with pytest.raises(Misconfigured, match="loopback"):
            pager(hook.url, allowed=())
        with pytest.raises(Misconfigured, match="loopback"):  # a name that the system's own resolver knows
            await pager(f"http://localhost:{hook.port}/", allowed=()).page(PAGE)
        assert hook.connections == 0
        await pager(hook.url).page(PAGE)
        assert hook.connections == 1


@pytest.mark.parametrize(
    "status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary Redirect", "308 Permanent Redirect"]
)
async def test_a_redirect_is_not_followed(status: str) -> None:
    async with server() as inside:
        away = f"HTTP/1.1 {status}\r\nLocation: {inside.url}/latest/meta-data/\r\nContent-Length: 0\r\n\r\n"
        async with server(away.encode()) as hook:
            with pytest.raises(Unavailable, match="redirect, which is not followed"):
                await pager(hook.url).page(PAGE)
        assert inside.connections == 0


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with server() as hook, server() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        await pager(hook.url).page(PAGE)
        assert (hook.connections, proxy.connections) == (1, 0)


async def test_an_endless_answer_is_not_read() -> None:
    """Ten megabytes of a body, and a head that never ends."""
    async with server(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000\r\n\r\n" + b"x" * 10_000_000) as hook:
        await pager(hook.url).page(PAGE)
    async with server(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000_000) as hook:
        with pytest.raises(Unavailable):
            await pager(hook.url).page(PAGE)


async def test_an_address_that_does_not_answer_is_followed_by_the_next_one_of_the_name() -> None:
    async with server(host="127.0.0.3") as hook:
        await pager(f"http://two.example:{hook.port}/", names(two_example=[["127.0.0.2", "127.0.0.3"]])).page(PAGE)
        assert hook.connections == 1


async def test_a_name_without_an_address_and_a_dead_one_are_unavailable() -> None:
    async def nothing(host: str, port: int) -> Sequence[str]:
        raise OSError("no such name")

    with pytest.raises(Unavailable, match="no address"):
        await pager("http://gone.example/", GuardedTransport(LOOPBACK, resolve=nothing)).page(PAGE)
    with pytest.raises(Unavailable):
        await pager("http://empty.example/", names(empty_example=[[]])).page(PAGE)


def make_tls(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's and a client's context for a certificate that says ``name``."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = folder / f"{name}.pem"
    pem.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + made.public_bytes(serialization.Encoding.PEM)
    )
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(pem)
    return ours, ssl.create_default_context(cadata=made.public_bytes(serialization.Encoding.PEM).decode())


async def test_over_tls_the_certificate_is_checked_for_the_name_and_not_for_the_address(tmp_path: Path) -> None:
    ours, client = make_tls(tmp_path, "hooks.example")
    asked: list[str | None] = []
    ours.sni_callback = lambda _socket, name, _context: asked.append(name)

    async def resolve(host: str, port: int) -> Sequence[str]:
        return ["127.0.0.1"]

    async with server(tls=ours) as hook:
        await pager(f"https://hooks.example:{hook.port}/", GuardedTransport(LOOPBACK, tls=client, resolve=resolve)).page(PAGE)
        with pytest.raises(Unavailable):
            await pager(f"https://other.example:{hook.port}/", GuardedTransport(LOOPBACK, tls=client, resolve=resolve)).page(
                PAGE
            )
    assert asked == ["hooks.example", "other.example"]
    assert len(hook.heads) == 1


@given(st.text(max_size=40))
def test_no_url_does_anything_but_become_a_pager_or_be_refused(text: str) -> None:
    for url in (text, f"http://{text}/", f"https://a{text}", f"https://hooks.example:{text}"):
        with contextlib.suppress(Misconfigured):
            WebhookPager(url, 1.0)


@pytest.mark.parametrize(
    "address", ["http://169.254.169.254", "http://[fd00:ec2::254]:80", "http://0.0.0.0:80", "http://2852039166"]
)
async def test_a_members_address_in_etcd_does_not_lead_to_a_metadata_service(address: str) -> None:
    peers = HttpPeers(2.0)
    try:
        with pytest.raises(Misconfigured):
            await peers.positions(address)
    finally:
        await peers.close()


async def test_an_instance_in_a_private_network_is_spoken_to() -> None:
    async with server(b'HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{"s00": 7}') as other:
        peers = HttpPeers(5.0)
        assert await peers.positions(other.url) == {"s00": 7}
        await peers.close()


async def test_a_socket_of_this_machine_is_not_connected_to() -> None:
    transport = GuardedTransport(ALL)
    with pytest.raises(Misconfigured):
        await transport._pool._network_backend.connect_unix_socket("/run/docker.sock")  # type: ignore[attr-defined]
