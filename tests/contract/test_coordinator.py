"""What every Coordinator has to do, run against the memory reference (in virtual time) and against a real etcd.

Each story gets a ``World``: clients of one server, a prefix of its own, and a way to let time pass.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from controller.adapters.etcd import EtcdCoordinator
from controller.adapters.memory.coordinator import CORRUPT, NOSPACE, MemoryCluster, MemoryCoordinator
from controller.adapters.memory.gate import FaultGate
from controller.errors import Corrupt, Misconfigured, NotFound, OutcomeUnknown, Refused, Unavailable
from controller.lab.etcd import EtcdAddress, EtcdCluster, find_etcd
from controller.lab.virtual_time import VirtualClock, run_virtual
from controller.ports import Compare, Coordinator, Delete, Get, Item, Operation, Put


@dataclass
class World:
    """``connect`` gives a further client of the same server; ``elapse`` lets seconds pass, really or virtually."""

    connect: Callable[[], Coordinator]
    elapse: Callable[[float], Awaitable[None]]
    prefix: str

    def key(self, name: str) -> str:
        return f"{self.prefix}{name}"


Story = Callable[[World], Awaitable[None]]
Backend = Callable[[Story], None]


def in_memory(story: Story) -> None:
    async def main() -> None:
        clock = VirtualClock()
        cluster = MemoryCluster(clock)
        await story(World(lambda: MemoryCoordinator(cluster), clock.sleep, "/t/"))

    run_virtual(main(), limit_seconds=3600)


@pytest.fixture(scope="session")
def etcd_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    try:
        binary = find_etcd()
    except Misconfigured as error:
        pytest.skip(f"needs etcd: {error}")
    ports = free_ports(2)
    address = EtcdAddress("m1", "127.0.0.1", ports[0], ports[1])
    with EtcdCluster(binary, [address], tmp_path_factory.mktemp("etcd"), unsafe_no_fsync=True) as cluster:
        yield cluster.endpoints[0]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def on_etcd(url: str) -> Backend:
    def run(story: Story) -> None:
        async def main() -> None:
            clients: list[EtcdCoordinator] = []

            def connect() -> Coordinator:
                clients.append(EtcdCoordinator([url], call_timeout_seconds=5.0))
                return clients[-1]

            try:
                await story(World(connect, asyncio.sleep, f"/t/{uuid.uuid4().hex}/"))
            finally:
                for client in clients:
                    await client.close()

        asyncio.run(main())

    return run


@pytest.fixture(params=["memory", pytest.param("etcd", marks=pytest.mark.etcd)])
def backend(request: pytest.FixtureRequest) -> Backend:
    return in_memory if request.param == "memory" else on_etcd(request.getfixturevalue("etcd_url"))


def for_every_backend(story: Story) -> Callable[[Backend], None]:
    """Makes a plain test function of a story."""

    def test(backend: Backend) -> None:
        backend(story)

    test.__name__ = story.__name__  # type: ignore[attr-defined]
    test.__doc__ = story.__doc__
    return test


async def put(c: Coordinator, key: str, value: bytes = b"v", lease: int = 0) -> Item:
    await c.txn([], [Put(key, value, lease)])
    item = await c.get(key)
    assert item is not None
    return item


# ----------------------------------------------------------------------------------------------------------- transactions


@for_every_backend
async def test_a_key_is_created_only_where_it_is_absent(w: World) -> None:
    c, key = w.connect(), w.key("authority")
    first = await c.txn([Compare.absent(key)], [Put(key, b"one")], [Get(key)])
    second = await c.txn([Compare.absent(key)], [Put(key, b"two")], [Get(key)])
    assert first.succeeded
    assert first.items == ()
    assert not second.succeeded
    assert second.items[0] is not None
    assert second.items[0].value == b"one"
    assert second.items[0].create_revision == second.items[0].mod_revision == first.revision


@for_every_backend
async def test_create_revision_stays_and_mod_revision_moves_with_each_put(w: World) -> None:
    c, key = w.connect(), w.key("k")
    created = await put(c, key, b"1")
    changed = await put(c, key, b"2")
    assert changed.create_revision == created.create_revision == created.mod_revision
    assert changed.mod_revision > created.mod_revision
    await c.txn([], [Delete(key)])
    again = await put(c, key, b"3")
    assert again.create_revision == again.mod_revision > changed.mod_revision


@for_every_backend
async def test_compare_and_set_on_a_mod_revision_lets_one_of_two_writers_through(w: World) -> None:
    a, b, key = w.connect(), w.connect(), w.key("plan")
    read = await put(a, key)
    won = await a.txn([Compare.modified(key, read.mod_revision)], [Put(key, b"a")])
    lost = await b.txn([Compare.modified(key, read.mod_revision)], [Put(key, b"b")], [Get(key)])
    assert won.succeeded
    assert not lost.succeeded
    assert lost.items[0] is not None
    assert lost.items[0].value == b"a"
    assert lost.items[0].mod_revision == won.revision


@for_every_backend
async def test_every_comparison_must_hold(w: World) -> None:
    c = w.connect()
    here = await put(c, w.key("here"))
    both = [Compare.created(here.key, here.create_revision), Compare.absent(w.key("gone"))]
    assert (await c.txn(both, [Get(here.key)])).succeeded
    await put(c, w.key("gone"))
    assert not (await c.txn(both, [Get(here.key)])).succeeded


@for_every_backend
async def test_mod_revision_zero_means_absent_too(w: World) -> None:
    c, key = w.connect(), w.key("k")
    assert (await c.txn([Compare.modified(key, 0)], [Get(key)])).succeeded
    item = await put(c, key)
    assert not (await c.txn([Compare.modified(key, 0)], [Get(key)])).succeeded
    assert not (await c.txn([Compare.created(key, item.create_revision + 1)], [Get(key)])).succeeded


@for_every_backend
async def test_items_are_the_gets_of_the_branch_that_ran_in_order_and_none_for_absent_keys(w: World) -> None:
    c = w.connect()
    await put(c, w.key("a"), b"A")
    await put(c, w.key("b"), b"B")
    then: list[Operation] = [Get(w.key("b")), Put(w.key("c"), b"C"), Get(w.key("none")), Get(w.key("a"))]
    done = await c.txn([], then, [Get(w.key("a"))])
    assert [item and item.value for item in done.items] == [b"B", None, b"A"]
    other = await c.txn([Compare.absent(w.key("a"))], then, [Get(w.key("a"))])
    assert [item and item.value for item in other.items] == [b"A"]


@for_every_backend
async def test_a_get_sees_the_puts_and_deletes_before_it_in_its_transaction(w: World) -> None:
    c, key, other = w.connect(), w.key("k"), w.key("other")
    await put(c, other)
    result = await c.txn([], [Get(key), Put(key, b"new"), Get(key), Delete(other), Get(other)])
    before, after, deleted = result.items
    assert before is None
    assert deleted is None
    assert after is not None
    assert (after.value, after.mod_revision) == (b"new", result.revision)


@for_every_backend
async def test_all_writes_of_a_transaction_share_one_revision(w: World) -> None:
    c = w.connect()
    result = await c.txn([], [Put(w.key("a"), b""), Put(w.key("b"), b"")])
    items = await c.list(w.prefix)
    assert [item.mod_revision for item in items] == [result.revision, result.revision]


@for_every_backend
async def test_a_failed_comparison_without_an_otherwise_branch_changes_nothing_and_answers(w: World) -> None:
    c, key = w.connect(), w.key("k")
    item = await put(c, key)
    result = await c.txn([Compare.absent(key)], [Put(key, b"x")])
    assert (result.succeeded, result.items, result.revision) == (False, (), item.mod_revision)
    assert await c.get(key) == item


@for_every_backend
async def test_reads_and_deletes_of_nothing_do_not_move_the_revision(w: World) -> None:
    c, key = w.connect(), w.key("k")
    start = (await c.txn([], [Put(key, b"")])).revision
    assert (await c.txn([], [Get(key)])).revision == start
    assert (await c.txn([], [Delete(w.key("absent"))])).revision == start
    assert (await c.txn([], [Delete(key)])).revision == start + 1


@for_every_backend
async def test_term_and_revision_never_go_back_while_the_cluster_lives(w: World) -> None:
    c = w.connect()
    seen = [await c.txn([], [Put(w.key(str(n % 3)), b"x")]) for n in range(10)]
    assert [r.revision for r in seen] == list(range(seen[0].revision, seen[0].revision + 10))
    assert all(r.term >= 1 for r in seen)
    assert [r.term for r in seen] == sorted(r.term for r in seen)


@for_every_backend
async def test_a_transaction_without_operations_is_refused(w: World) -> None:
    c = w.connect()
    with pytest.raises(Refused, match="empty transaction"):
        await c.txn([Compare.absent(w.key("k"))], [])
    with pytest.raises(Refused, match="empty transaction"):
        await c.txn([], [], [])


@for_every_backend
async def test_a_full_transaction_of_128_writes_works_and_129_are_refused(w: World) -> None:
    c = w.connect()
    operations = [Put(w.key(f"{n:03}"), b"x") for n in range(129)]
    with pytest.raises(Refused, match="129"):
        await c.txn([], operations)
    assert (await c.txn([], operations[:128])).succeeded
    assert len(await c.list(w.prefix)) == 128
    comparisons = [Compare.created(w.key("000"), 0)] * 129
    with pytest.raises(Refused, match="compare has 129"):
        await c.txn(comparisons, [Get(w.key("000"))])


@for_every_backend
async def test_a_value_of_1_mib_is_kept_and_more_than_the_limit_is_refused(w: World) -> None:
    c, key = w.connect(), w.key("k")
    body = bytes(range(256)) * 4096
    assert (await put(c, key, body)).value == body
    almost = bytes(1_572_864 - 4 * len(key) - 400)
    assert (await put(c, key, almost)).value == almost
    with pytest.raises(Refused, match="bytes"):
        await c.txn([], [Put(key, bytes(1_572_864))])


@for_every_backend
async def test_a_branch_may_not_write_a_key_twice(w: World) -> None:
    c, key = w.connect(), w.key("k")
    for branch in ([Put(key, b"1"), Put(key, b"2")], [Put(key, b"1"), Delete(key)], [Delete(key), Put(key, b"1")]):
        with pytest.raises(Refused, match="twice"):
            await c.txn([], branch)
    assert (await c.txn([Compare.absent(key)], [Put(key, b"1")], [Put(key, b"2")])).succeeded


@for_every_backend
async def test_keys_may_not_be_empty_and_fields_must_be_known(w: World) -> None:
    c = w.connect()
    with pytest.raises(Refused, match="empty"):
        await c.get("")
    with pytest.raises(Refused, match="empty"):
        await c.txn([], [Put("", b"")])
    with pytest.raises(Refused, match="field"):
        await c.txn([Compare(w.key("k"), "version", 1)], [Get(w.key("k"))])


# ------------------------------------------------------------------------------------------------------------------ reads


@for_every_backend
async def test_list_is_ascending_by_key_and_stays_below_the_prefix(w: World) -> None:
    c = w.connect()
    for name in ("m/b", "m/a", "m/é", "m0", "m/a/x", "l/z"):
        await put(c, w.key(name), name.encode())
    items = await c.list(w.key("m/"))
    assert [item.key for item in items] == [w.key(name) for name in ("m/a", "m/a/x", "m/b", "m/é")]
    assert [item.value for item in items] == [b"m/a", b"m/a/x", b"m/b", "m/é".encode()]
    assert await c.list(w.key("nothing/")) == ()


@for_every_backend
async def test_list_returns_more_keys_than_one_page_holds(w: World) -> None:
    c = w.connect()
    for start in range(0, 2100, 100):
        await c.txn([], [Put(w.key(f"{n:05}"), b"x") for n in range(start, start + 100)])
    assert [item.key for item in await c.list(w.prefix)] == [w.key(f"{n:05}") for n in range(2100)]


@for_every_backend
async def test_get_tells_an_empty_value_from_an_absent_key(w: World) -> None:
    c, key = w.connect(), w.key("k")
    assert await c.get(key) is None
    item = await put(c, key, b"")
    assert item == Item(key, b"", item.create_revision, item.mod_revision, 0)


@for_every_backend
async def test_what_one_client_wrote_another_reads_at_once(w: World) -> None:
    a, b = w.connect(), w.connect()
    for n in range(20):
        await a.txn([], [Put(w.key("k"), str(n).encode())])
        item = await b.get(w.key("k"))
        assert item is not None
        assert item.value == str(n).encode()


# ----------------------------------------------------------------------------------------------------------------- leases


@for_every_backend
async def test_a_key_vanishes_with_its_expired_lease_and_not_before(w: World) -> None:
    c, key = w.connect(), w.key("holder")
    lease = await c.grant(3)
    item = await put(c, key, b"me", lease.id)
    assert item.lease == lease.id
    assert lease.ttl_seconds == 3
    await w.elapse(2.0)
    assert await c.get(key) is not None
    await w.elapse(3.0)
    assert await c.get(key) is None
    assert (await c.keep_alive(lease.id)).ttl_seconds == 0
    assert (await c.txn([Compare.created(key, item.create_revision)], [Get(key)], [Get(key)])).succeeded is False


@for_every_backend
async def test_keep_alive_gives_the_full_ttl_again(w: World) -> None:
    c, key = w.connect(), w.key("holder")
    lease = await c.grant(3)
    await put(c, key, b"me", lease.id)
    for _ in range(4):
        await w.elapse(1.5)
        assert (await c.keep_alive(lease.id)).ttl_seconds == 3
    assert await c.get(key) is not None


@for_every_backend
async def test_a_lease_shorter_than_the_server_allows_comes_back_with_the_ttl_that_was_granted(w: World) -> None:
    c = w.connect()
    assert (await c.grant(1)).ttl_seconds == 2


@for_every_backend
async def test_leases_have_whole_seconds(w: World) -> None:
    c = w.connect()
    for wrong in (0, -1, 2.5, True, 10**10):
        with pytest.raises(Refused, match="TTL"):
            await c.grant(wrong)  # type: ignore[arg-type]


@for_every_backend
async def test_answers_say_which_cluster_gave_them_and_in_which_term(w: World) -> None:
    c = w.connect()
    lease = await c.grant(3)
    read = await c.txn([], [Get("/k")])
    assert (await c.keep_alive(lease.id)).term == read.term > 0
    assert read.cluster == (await c.status()).cluster_id


@for_every_backend
async def test_keep_alive_of_a_lease_that_never_was_is_zero(w: World) -> None:
    assert (await w.connect().keep_alive(123_456_789)).ttl_seconds == 0


@for_every_backend
async def test_revoke_deletes_the_keys_of_the_lease_and_is_repeatable(w: World) -> None:
    c = w.connect()
    lease = await c.grant(60)
    await put(c, w.key("mine"), lease=lease.id)
    other = await put(c, w.key("other"))
    await c.revoke(lease.id)
    await c.revoke(lease.id)
    assert await c.list(w.prefix) == (other,)
    assert (await c.keep_alive(lease.id)).ttl_seconds == 0


@for_every_backend
async def test_a_key_that_is_put_without_its_lease_outlives_it(w: World) -> None:
    c, key = w.connect(), w.key("k")
    lease = await c.grant(60)
    await put(c, key, lease=lease.id)
    detached = await put(c, key)
    await c.revoke(lease.id)
    assert detached.lease == 0
    assert await c.get(key) == detached


@for_every_backend
async def test_a_put_under_a_lease_that_is_gone_changes_nothing(w: World) -> None:
    c = w.connect()
    lease = await c.grant(60)
    await c.revoke(lease.id)
    with pytest.raises(NotFound, match="lease"):
        await c.txn([], [Put(w.key("a"), b""), Put(w.key("b"), b"", lease.id)])
    assert await c.list(w.prefix) == ()
    here = await put(c, w.key("here"))
    not_taken = await c.txn([Compare.absent(here.key)], [Put(w.key("b"), b"", lease.id)], [Get(here.key)])
    assert not_taken.items == (here,)


@for_every_backend
async def test_a_heartbeat_proves_the_holder_and_a_successor_ends_it(w: World) -> None:
    """The lease keeper's three calls: the same guarded read before and after the keep-alive, in one term."""
    keeper, successor, key = w.connect(), w.connect(), w.key("holder")
    lease = await keeper.grant(5)
    holder = await put(keeper, key, b"keeper", lease.id)
    guard, reads = [Compare.created(key, holder.create_revision)], [Get(key), Get(w.key("authority"))]
    before = await keeper.txn(guard, reads, reads)
    assert (await keeper.keep_alive(lease.id)).ttl_seconds == 5
    after = await keeper.txn(guard, reads, reads)
    assert before.succeeded
    assert after.succeeded
    assert before.term == after.term
    assert after.items == (holder, None)
    await successor.revoke(lease.id)
    taken = await put(successor, key, b"successor")
    late = await keeper.txn(guard, reads, reads)
    assert not late.succeeded
    assert late.items == (taken, None)


# ---------------------------------------------------------------------------------------------------------------- members


@for_every_backend
async def test_status_names_versions_leader_term_and_no_alarm(w: World) -> None:
    c = w.connect()
    term = (await c.txn([], [Get(w.key("k"))])).term
    status = await c.status()
    assert status.leader
    assert status.term == term
    assert status.alarms == ()
    assert len(status.versions) == 1
    assert all(version.count(".") == 2 for version in status.versions.values())
    assert status.cluster_id == (await w.connect().status()).cluster_id


@for_every_backend
async def test_a_closed_coordinator_says_so(w: World) -> None:
    c = w.connect()
    await c.get(w.key("k"))
    await c.close()
    await c.close()
    for call in (lambda: c.get(w.key("k")), c.status, lambda: c.grant(5)):
        with pytest.raises(Unavailable, match="close"):
            await call()


# ------------------------------------------------------------------------------ what only the reference can be made to do


def on_cluster(story: Callable[[MemoryCluster, MemoryCoordinator, FaultGate], Awaitable[None]]) -> Callable[[], None]:
    """A test of the reference: its server, one client, and the gate between them."""

    def test() -> None:
        async def main() -> None:
            clock = VirtualClock()
            cluster, gate = MemoryCluster(clock), FaultGate(clock.sleep)
            await story(cluster, MemoryCoordinator(cluster, gate), gate)

        run_virtual(main(), limit_seconds=3600)

    test.__name__ = story.__name__  # type: ignore[attr-defined]
    return test


@on_cluster
async def test_a_lost_answer_to_a_write_is_an_unknown_outcome_and_the_write_is_there(
    cluster: MemoryCluster, c: MemoryCoordinator, gate: FaultGate
) -> None:
    gate.lose("txn")
    with pytest.raises(OutcomeUnknown):
        await c.txn([], [Put("/k", b"x")])
    item = await c.get("/k")
    assert item is not None
    assert item.value == b"x"


@on_cluster
async def test_a_lost_answer_to_a_read_is_only_unavailable(
    cluster: MemoryCluster, c: MemoryCoordinator, gate: FaultGate
) -> None:
    gate.lose(times=4)
    for call in (lambda: c.txn([], [Get("/k")]), lambda: c.get("/k"), lambda: c.keep_alive(1), lambda: c.list("/")):
        with pytest.raises(Unavailable) as caught:
            await call()
        assert not isinstance(caught.value, OutcomeUnknown)


@on_cluster
async def test_a_call_that_was_not_sent_changes_nothing(
    cluster: MemoryCluster, c: MemoryCoordinator, gate: FaultGate
) -> None:
    gate.fail("txn")
    with pytest.raises(Unavailable) as caught:
        await c.txn([], [Put("/k", b"x")])
    assert not isinstance(caught.value, OutcomeUnknown)
    assert await c.get("/k") is None
    assert gate.calls == {"txn": 1, "get": 1}


@on_cluster
async def test_a_cut_that_falls_while_the_answer_travels_loses_the_answer(
    cluster: MemoryCluster, c: MemoryCoordinator, gate: FaultGate
) -> None:
    gate.delay_seconds = 1.0
    call = asyncio.create_task(c.txn([], [Put("/k", b"x")]))
    await asyncio.sleep(1.5)
    gate.cut = True
    with pytest.raises(OutcomeUnknown):
        await call
    gate.cut = False
    assert await c.get("/k") is not None


@on_cluster
async def test_a_new_leader_gives_every_lease_its_full_ttl_and_the_election_timeout(
    cluster: MemoryCluster, c: MemoryCoordinator, gate: FaultGate
) -> None:
    lease = await c.grant(5)
    await c.txn([], [Put("/holder", b"", lease.id)])
    term = (await c.txn([], [Get("/holder")])).term
    await asyncio.sleep(4.9)
    cluster.change_leader()
    await asyncio.sleep(5.9)
    assert await c.get("/holder") is not None
    await asyncio.sleep(0.2)
    assert await c.get("/holder") is None
    assert (await c.txn([], [Get("/holder")])).term == term + 1


@on_cluster
async def test_without_a_leader_nothing_is_answered_and_no_lease_ends(
    cluster: MemoryCluster, c: MemoryCoordinator, gate: FaultGate
) -> None:
    lease = await c.grant(5)
    await c.txn([], [Put("/holder", b"", lease.id)])
    cluster.lose_leader()
    for call in (lambda: c.get("/holder"), lambda: c.keep_alive(lease.id), lambda: c.txn([], [Get("/k")])):
        with pytest.raises(Unavailable, match="no leader"):
            await call()
    assert (await c.status()).leader is False
    await asyncio.sleep(60)
    cluster.elect_leader()
    assert await c.get("/holder") is not None


@on_cluster
async def test_a_full_store_refuses_puts_and_grants_and_keeps_its_holder(
    cluster: MemoryCluster, c: MemoryCoordinator, gate: FaultGate
) -> None:
    lease = await c.grant(5)
    await c.txn([], [Put("/holder", b"", lease.id), Put("/other", b"")])
    cluster.alarms.add(NOSPACE)
    with pytest.raises(Unavailable, match="NOSPACE"):
        await c.txn([Compare.absent("/holder")], [Put("/x", b"")], [Get("/holder")])
    with pytest.raises(Unavailable, match="NOSPACE"):
        await c.grant(5)
    assert (await c.keep_alive(lease.id)).ttl_seconds == 5
    assert (await c.txn([], [Get("/holder")])).items[0] is not None
    await c.txn([], [Delete("/other")])
    await c.revoke(lease.id)
    assert await c.list("/") == ()
    assert (await c.status()).alarms == (NOSPACE,)


@on_cluster
async def test_a_corrupt_cluster_serves_nothing_but_renewals(
    cluster: MemoryCluster, c: MemoryCoordinator, gate: FaultGate
) -> None:
    lease = await c.grant(5)
    cluster.alarms.add(CORRUPT)
    with pytest.raises(Corrupt):
        await c.get("/k")
    assert (await c.keep_alive(lease.id)).ttl_seconds == 5


@on_cluster
async def test_a_restored_snapshot_takes_revisions_back_and_starts_leases_anew(
    cluster: MemoryCluster, c: MemoryCoordinator, gate: FaultGate
) -> None:
    lease = await c.grant(5)
    await c.txn([], [Put("/holder", b"", lease.id)])
    backup = cluster.snapshot()
    cluster.change_leader()
    later = await c.txn([], [Put("/later", b"")])
    await asyncio.sleep(3)
    cluster.restore(backup)
    now = await c.txn([], [Get("/later")])
    assert now.items == (None,)
    assert now.revision < later.revision
    assert now.term < later.term
    await asyncio.sleep(4.9)
    assert await c.get("/holder") is not None
    await asyncio.sleep(0.2)
    assert await c.get("/holder") is None


# --------------------------------------------------------------------------------------- what only the real one can get wrong


@pytest.mark.parametrize(
    ("endpoints", "options", "named"),
    [
        ([], {}, "etcd.endpoints"),
        (["http://a:1", "http://a:1"], {}, "twice"),
        (["http://a:1", "https://b:1"], {}, "mixes"),
        (["a:1"], {}, "http"),
        (["http://a"], {}, "host:port"),
        (["http://a:99999"], {}, "host:port"),
        (["http://u:p@a:1"], {}, "host:port"),
        (["http://a:1/v3"], {}, "host:port"),
        (["https://a:1"], {}, "etcd.ca_file"),
        (["https://a:1"], {"ca_file": "ca", "cert_file": "c"}, "etcd.key_file"),
        (["http://a:1"], {"username": "u"}, "etcd.password"),
        (["http://a:1"], {"call_timeout_seconds": 0.0}, "call_timeout_seconds"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(
    endpoints: list[str], options: dict[str, str], named: str
) -> None:
    with pytest.raises(Misconfigured, match=named) as caught:
        EtcdCoordinator(endpoints, **options)  # type: ignore[arg-type]
    assert caught.value.hint


async def test_a_missing_ca_file_is_named(tmp_path: Path) -> None:
    c = EtcdCoordinator(["https://127.0.0.1:1"], ca_file=str(tmp_path / "ca.pem"))
    with pytest.raises(Misconfigured, match=r"ca\.pem"):
        await c.get("/k")
    await c.close()
