"""The etcd adapter against a real cluster whose members are killed, frozen, isolated, full, foreign, or want to be convinced.

Member 0 is always the first endpoint. Deadlines of the tests are generous; deadlines of the calls are what is tested.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from controller.adapters.etcd import EtcdCoordinator, is_trustworthy, parse_version
from controller.adapters.etcd_endpoint import Credentials, Endpoint
from controller.adapters.etcdrpc import rpc_pb2, rpc_pb2_grpc
from controller.errors import DrError, Misconfigured, NotFound, OutcomeUnknown, Refused, Unavailable
from controller.lab.etcd import EtcdAddress, EtcdBinary, EtcdCluster, find_etcd
from controller.ports import Compare, Coordinator, CoordinatorStatus, Delete, Get, Put, TxnResult

pytestmark = pytest.mark.etcd

CALL_SECONDS = 0.5
READS_PASS_NOSPACE = (3, 5, 2)
"""Before, a full etcd refused every transaction, also one that only reads: it deposes a healthy holder (etcd pull 13435)."""
SLACK_SECONDS = 5.0
"""For a machine that does other things too."""


@pytest.fixture(scope="module")
def binary() -> EtcdBinary:
    try:
        return find_etcd()
    except Misconfigured as error:
        pytest.skip(f"needs etcd: {error}")


def addresses(count: int) -> list[EtcdAddress]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(2 * count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
    return [EtcdAddress(f"m{n}", "127.0.0.1", ports[2 * n], ports[2 * n + 1]) for n in range(count)]


@pytest.fixture(scope="module")
def three_members(binary: EtcdBinary, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with EtcdCluster(binary, addresses(3), tmp_path_factory.mktemp("three"), unsafe_no_fsync=True) as cluster:
        yield cluster


@pytest.fixture
def cluster(three_members: EtcdCluster) -> EtcdCluster:
    """All three members in service, whatever the test before did to them."""
    three_members.thaw()
    three_members.start()
    return three_members


@pytest.fixture
async def c(cluster: EtcdCluster) -> AsyncIterator[EtcdCoordinator]:
    coordinator = EtcdCoordinator(cluster.endpoints, call_timeout_seconds=CALL_SECONDS)
    await coordinator.get("/warm-up")
    yield coordinator
    await coordinator.close()


@contextlib.asynccontextmanager
async def connected(*args: object, **options: object) -> AsyncIterator[EtcdCoordinator]:
    coordinator = EtcdCoordinator(*args, **options)  # type: ignore[arg-type]
    try:
        yield coordinator
    finally:
        await coordinator.close()


async def until_works(call: Callable[[], Awaitable[TxnResult]], deadline_seconds: float = 30.0) -> TxnResult:
    async with asyncio.timeout(deadline_seconds):
        while True:
            try:
                return await call()
            except Unavailable:
                await asyncio.sleep(0.1)


async def until(c: Coordinator, holds: Callable[[CoordinatorStatus], bool]) -> CoordinatorStatus:
    async with asyncio.timeout(30):
        while True:
            status = await c.status()
            if holds(status):
                return status
            await asyncio.sleep(0.1)


async def fill(c: Coordinator) -> None:
    for n in range(100):
        await c.txn([], [Put(f"/fill/{n}", bytes(500_000))])


# ------------------------------------------------------------------------------------------------------------ one member down


async def test_reads_go_on_at_another_endpoint_when_the_first_is_killed(cluster: EtcdCluster, c: EtcdCoordinator) -> None:
    await c.txn([], [Put("/k", b"x")])
    cluster.members[0].kill()

    async def read() -> TxnResult:
        return await c.txn([], [Get("/k")])

    result = await until_works(read)
    assert result.items[0] is not None
    assert result.items[0].value == b"x"
    started = time.monotonic()
    for _ in range(20):
        await c.get("/k")
    assert time.monotonic() - started < 20 * 0.1 + SLACK_SECONDS


async def test_a_read_at_a_frozen_member_is_answered_by_another_within_its_budget(
    cluster: EtcdCluster, c: EtcdCoordinator
) -> None:
    await until_leader_is_not_first(cluster, c)
    cluster.members[0].freeze()
    started = time.monotonic()
    assert (await c.txn([], [Get("/k")])).succeeded
    assert time.monotonic() - started < 3 * CALL_SECONDS + SLACK_SECONDS
    started = time.monotonic()
    for _ in range(20):
        await c.get("/k")
    assert time.monotonic() - started < 20 * 0.1 + SLACK_SECONDS


async def test_a_write_whose_answer_a_frozen_member_owes_is_unknown_and_the_next_one_works(
    cluster: EtcdCluster, c: EtcdCoordinator
) -> None:
    await until_leader_is_not_first(cluster, c)
    cluster.members[0].freeze()
    started = time.monotonic()
    with pytest.raises(OutcomeUnknown) as caught:
        await c.txn([Compare.absent("/frozen")], [Put("/frozen", b"1")])
    assert time.monotonic() - started < CALL_SECONDS + SLACK_SECONDS
    assert cluster.members[0].address.client_url in caught.value.message
    assert (await c.txn([], [Put("/after", b"2")])).succeeded


async def test_a_write_that_was_never_sent_is_repeated_elsewhere(cluster: EtcdCluster) -> None:
    cluster.members[0].kill()
    async with connected(cluster.endpoints, call_timeout_seconds=CALL_SECONDS) as c:
        await until_works(lambda: c.txn([], [Get("/k")]))
    for _ in range(5):
        async with connected(cluster.endpoints, call_timeout_seconds=CALL_SECONDS) as fresh:
            assert (await fresh.txn([], [Put("/k", b"sent once")])).succeeded


async def test_a_frozen_member_is_known_not_to_have_got_what_was_never_sent(cluster: EtcdCluster, c: EtcdCoordinator) -> None:
    await until_leader_is_not_first(cluster, c)
    cluster.members[0].freeze()
    async with connected(cluster.endpoints, call_timeout_seconds=CALL_SECONDS) as fresh:
        assert (await fresh.txn([], [Put("/k", b"first call of this client")])).succeeded


async def test_the_first_endpoint_is_used_again_after_its_return(
    cluster: EtcdCluster, c: EtcdCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controller.adapters.etcd.HOME_AFTER_SECONDS", 0.0)
    cluster.members[0].kill()
    await until_works(lambda: c.txn([], [Get("/k")]))
    cluster.start()
    await until(c, lambda status: cluster.endpoints[0] in status.versions)
    await c.status()
    cluster.members[1].freeze()
    cluster.members[2].freeze()
    with pytest.raises(Unavailable) as caught:
        await c.get("/k")
    assert caught.value.message.index(cluster.endpoints[0]) < caught.value.message.index(cluster.endpoints[1])


# ------------------------------------------------------------------------------------------------------------- no quorum left


async def test_every_call_ends_within_its_budget_when_all_members_are_frozen(cluster: EtcdCluster, c: EtcdCoordinator) -> None:
    lease = await c.grant(30)
    for member in cluster.members:
        member.freeze()
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "txn that reads": lambda: c.txn([], [Get("/k")]),
        "txn that writes": lambda: c.txn([], [Put("/k", b"")]),
        "get": lambda: c.get("/k"),
        "list": lambda: c.list("/"),
        "grant": lambda: c.grant(5),
        "keep_alive": lambda: c.keep_alive(lease.id),
        "revoke": lambda: c.revoke(lease.id),
        "status": c.status,
    }
    for name, call in calls.items():
        started = time.monotonic()
        with pytest.raises(Unavailable):
            await call()
        assert time.monotonic() - started < 3 * CALL_SECONDS + SLACK_SECONDS, name


async def test_many_calls_at_once_keep_their_deadline_too(cluster: EtcdCluster, c: EtcdCoordinator) -> None:
    for member in cluster.members:
        member.freeze()
    started = time.monotonic()
    answers = await asyncio.gather(*(c.get(f"/{n}") for n in range(40)), return_exceptions=True)
    assert all(isinstance(answer, Unavailable) for answer in answers)
    assert time.monotonic() - started < 2 * 3 * CALL_SECONDS + SLACK_SECONDS


async def test_an_isolated_member_never_confirms_a_transaction(cluster: EtcdCluster) -> None:
    async with connected(cluster.endpoints[:1], call_timeout_seconds=CALL_SECONDS) as c:
        await c.txn([], [Put("/holder", b"old")])
        item = await c.get("/holder")
        assert item is not None
        guard = [Compare.created("/holder", item.create_revision)]
        cluster.members[1].freeze()
        cluster.members[2].freeze()
        until = time.monotonic() + 4
        attempts = 0
        while time.monotonic() < until:
            for then in ([Get("/holder")], [Put("/holder", b"new")], [Delete("/holder")]):
                with pytest.raises(Unavailable):
                    await c.txn(guard, then)
                attempts += 1
            with pytest.raises(Unavailable):
                await c.get("/holder")
            with pytest.raises(Refused):
                await c.txn(guard, [])
        assert attempts >= 6


async def test_status_tells_who_answers_and_whether_there_is_a_leader(cluster: EtcdCluster, c: EtcdCoordinator) -> None:
    assert set((await c.status()).versions) == set(cluster.endpoints)
    cluster.members[2].kill()
    status = await c.status()
    assert set(status.versions) == set(cluster.endpoints[:2])
    cluster.members[1].freeze()
    status = await until(c, lambda status: not status.leader)
    assert set(status.versions) == {cluster.endpoints[0]}


async def test_a_new_leader_brings_a_greater_term_and_the_lease_lives_on(cluster: EtcdCluster, c: EtcdCoordinator) -> None:
    lease = await c.grant(10)
    before = await c.txn([], [Put("/holder", b"me", lease.id), Get("/holder")])
    leader = leader_of(cluster)
    cluster.members[leader].kill()
    after = await until_works(lambda: c.txn([], [Get("/holder")]))
    assert after.term > before.term
    assert after.items == before.items
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(Unavailable):
                assert (await c.keep_alive(lease.id)).ttl_seconds == 10
                break


# --------------------------------------------------------------------------------------------------- full, foreign, protected


async def test_a_full_etcd_refuses_puts_and_grants_and_keeps_its_holder(binary: EtcdBinary, tmp_path: Path) -> None:
    small = ["--quota-backend-bytes=2097152"]
    with EtcdCluster(binary, addresses(1), tmp_path / "full", unsafe_no_fsync=True, extra=small) as full:
        async with connected(full.endpoints, call_timeout_seconds=5.0) as c:
            lease = await c.grant(60)
            await c.txn([], [Put("/holder", b"", lease.id)])
            with pytest.raises(Unavailable, match="space exceeded") as caught:
                await fill(c)
            assert not isinstance(caught.value, OutcomeUnknown)
            with pytest.raises(Unavailable, match="space exceeded"):
                await c.txn([Compare.absent("/holder")], [Put("/x", b"")], [Get("/holder")])
            with pytest.raises(Unavailable, match="space exceeded"):
                await c.grant(5)
            assert (await c.keep_alive(lease.id)).ttl_seconds == 60
            assert await c.get("/holder") is not None
            if parse_version(binary.version) >= READS_PASS_NOSPACE:
                assert (await c.txn([], [Get("/holder")])).items[0] is not None
                await c.txn([], [Delete("/fill/0")])
            else:
                with pytest.raises(Unavailable, match="space exceeded"):
                    await c.txn([], [Get("/holder")])
            assert (await c.status()).alarms == ("NOSPACE",)
            await c.revoke(lease.id)
            assert await c.get("/holder") is None


async def test_endpoints_of_two_clusters_are_refused(binary: EtcdBinary, cluster: EtcdCluster, tmp_path: Path) -> None:
    with EtcdCluster(binary, addresses(1), tmp_path / "other", unsafe_no_fsync=True) as other:
        async with connected([cluster.endpoints[0], other.endpoints[0]]) as c:
            await c.txn([], [Put("/ours", b"")])
            with pytest.raises(Misconfigured, match="cluster"):
                await c.status()
            cluster.members[0].kill()
            with pytest.raises(Misconfigured, match="cluster"):
                await until_works(lambda: c.txn([], [Put("/ours", b"in the wrong one")]))
        async with connected(other.endpoints) as c:
            assert await c.get("/ours") is None


async def test_sign_in_with_user_and_password(binary: EtcdBinary, tmp_path: Path) -> None:
    with EtcdCluster(binary, addresses(1), tmp_path / "auth", unsafe_no_fsync=True) as protected:
        enable_auth(protected.endpoints[0])
        url = protected.endpoints
        async with connected(url, call_timeout_seconds=5.0, username="root", password="secret") as c:
            lease = await c.grant(5)
            assert (await c.txn([], [Put("/k", b"x", lease.id)])).succeeded
            assert (await c.keep_alive(lease.id)).ttl_seconds == 5
            assert (await c.status()).leader
        async with connected(url, call_timeout_seconds=5.0, username="root", password="wrong") as c:
            with pytest.raises(Misconfigured, match="authentication failed"):
                await c.get("/k")
        async with connected(url, call_timeout_seconds=5.0) as c:
            with pytest.raises(Misconfigured, match="user name is empty"):
                await c.get("/k")


async def test_no_error_shows_the_password_whether_it_is_wrong_or_the_member_is_gone(
    binary: EtcdBinary, tmp_path: Path
) -> None:
    mark = "MARKetcdpassword3c51"
    shown: list[str] = []

    async def provoke(c: EtcdCoordinator) -> None:
        for call in (c.get("/k"), c.list("/"), c.grant(5), c.keep_alive(7), c.txn([], [Put("/k", b"x")])):
            with pytest.raises(DrError) as caught:
                await call
            shown.extend((caught.value.message, caught.value.hint, *traceback.format_exception(caught.value)))
        shown.append(f"{c!r} {c!s}")

    with EtcdCluster(binary, addresses(1), tmp_path / "marked", unsafe_no_fsync=True) as protected:
        enable_auth(protected.endpoints[0])
        async with connected(protected.endpoints, call_timeout_seconds=5.0, username="root", password=mark) as c:
            await provoke(c)
        endpoints = protected.endpoints
    async with connected(endpoints, call_timeout_seconds=1.0, username="root", password=mark) as c:
        await provoke(c)
    assert any("authentication failed" in text for text in shown)
    assert [text for text in shown if mark in text] == []


async def test_an_expired_token_is_replaced_without_anybody_noticing(binary: EtcdBinary, tmp_path: Path) -> None:
    short = ["--auth-token-ttl=1"]
    with EtcdCluster(binary, addresses(1), tmp_path / "tokens", unsafe_no_fsync=True, extra=short) as protected:
        enable_auth(protected.endpoints[0])
        async with connected(protected.endpoints, call_timeout_seconds=5.0, username="root", password="secret") as c:
            await c.get("/k")
            await asyncio.sleep(3.5)
            assert (await c.txn([], [Put("/k", b"x")])).succeeded


def enable_auth(url: str) -> None:
    endpoint = Endpoint(url, Credentials(), lambda *_: None)
    auth = rpc_pb2_grpc.AuthStub(endpoint.ready(time.monotonic() + 5).channel)
    auth.UserAdd(rpc_pb2.AuthUserAddRequest(name="root", password="secret"), 5)
    auth.UserGrantRole(rpc_pb2.AuthUserGrantRoleRequest(user="root", role="root"), 5)
    auth.AuthEnable(rpc_pb2.AuthEnableRequest(), 5)
    endpoint.close()


# ---------------------------------------------------------------------------------------------------------- the lab's own tools


def test_a_member_dies_with_its_parent(binary: EtcdBinary, tmp_path: Path) -> None:
    (address,) = addresses(1)
    program = f"""
import pathlib, os, signal
from controller.lab.etcd import EtcdAddress, EtcdCluster, find_etcd
cluster = EtcdCluster(find_etcd(), [{address!r}], pathlib.Path({str(tmp_path / "orphan")!r}), unsafe_no_fsync=True)
cluster.start()
print(cluster.members[0].pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    parent = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    pid = int(parent.stdout)
    deadline = time.monotonic() + 10
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(pid)


def running(pid: int) -> bool:
    """Whether a process exists and is no zombie (an orphan's new parent may be slow to bury it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_member_freezes_thaws_and_leaves_nothing_behind(binary: EtcdBinary, tmp_path: Path) -> None:
    (address,) = addresses(1)
    with EtcdCluster(binary, [address], tmp_path / "one", unsafe_no_fsync=True) as one:
        member = one.members[0]
        assert member.pid is not None
        assert member.healthy()
        member.freeze()
        assert any(not member.healthy(0.3) for _ in range(20))  # a signal takes its time; what was asked before may be answered
        member.thaw()
        one.wait_ready()
        pid = member.pid
    assert member.pid is None
    assert pid is not None
    assert not Path(f"/proc/{pid}").exists()


def test_a_port_that_is_taken_is_named_at_start(binary: EtcdBinary, tmp_path: Path) -> None:
    (address,) = addresses(1)
    with socket.socket() as taken:
        taken.bind((address.host, address.client_port))
        taken.listen()
        blocked = EtcdCluster(binary, [address], tmp_path / "blocked", unsafe_no_fsync=True)
        with pytest.raises(Unavailable, match="address already in use"):
            blocked.start(deadline_seconds=20)
    assert blocked.members[0].pid is None


def test_the_newest_trustworthy_etcd_is_chosen_and_launchers_are_passed_over(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="no etcd"):
        find_etcd([tmp_path])
    launcher = tmp_path / "etcd"
    launcher.write_text("#!/bin/sh\necho 'etcd Version: 9.9.9'\n")
    launcher.chmod(0o755)
    with pytest.raises(Misconfigured, match="no etcd"):
        find_etcd([tmp_path])
    old, new = EtcdBinary(tmp_path, "3.5.1"), EtcdBinary(tmp_path, "3.6.5")
    assert "never for production" in old.warning
    assert new.warning == ""


@pytest.mark.parametrize(
    ("version", "trusted"),
    [
        ("3.4.23", False), ("3.4.40", False), ("3.5.1", False), ("3.5.15", False), ("3.5.16", True), ("v3.5.30", True),
        ("3.6.0-rc.4", False), ("3.6.0", True), ("3.10.0", True), ("3.5.16+build", True), ("2.3.8", False),
    ],
)  # fmt: skip
def test_which_versions_are_trustworthy(version: str, trusted: bool) -> None:
    assert is_trustworthy(version) is trusted


def test_a_version_that_is_none_is_refused() -> None:
    assert parse_version("v3.5.16") == (3, 5, 16)
    for text in ("", "3.5", "latest", "3.5.x"):
        with pytest.raises(Misconfigured, match="version"):
            parse_version(text)


# ---------------------------------------------------------------------------------------------------------------- helpers


def leader_of(cluster: EtcdCluster) -> int:
    """Index of the member that leads."""
    for index, url in enumerate(cluster.endpoints):
        endpoint = Endpoint(url, Credentials(), lambda *_: None)
        try:
            status = endpoint.status(5.0)
        finally:
            endpoint.close()
        if status.leader == status.header.member_id:
            return index
    raise AssertionError("no leader")


async def until_leader_is_not_first(cluster: EtcdCluster, c: Coordinator) -> None:
    """Restarts member 0 while it leads, so that freezing it later causes no election."""
    while leader_of(cluster) == 0:
        cluster.members[0].kill()
        await until_works(lambda: c.txn([], [Get("/k")]))
        cluster.start()
    with contextlib.suppress(NotFound):
        await until_works(lambda: c.txn([], [Get("/k")]))
