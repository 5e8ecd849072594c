"""What every ``Resolver`` promises, asked of the one in memory and of real DNS packets to the lab's name server; then what
the real one makes of servers that lie, stutter or stay silent."""

from __future__ import annotations

import asyncio
import json
import random
import struct
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import cast

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rrset
import pytest

from controller.adapters.dns import DnsResolver, parse_server
from controller.adapters.memory.gate import FaultGate
from controller.adapters.memory.traffic import MemoryResolver, MemoryTraffic, MemoryZone
from controller.adapters.record_sets import Change, ZoneCopy
from controller.adapters.route53 import Route53Traffic
from controller.adapters.traffic import CompareAndSetTraffic
from controller.domain.model import Fence
from controller.errors import Misconfigured, Refused, Unavailable
from controller.lab.aws import AwsStandIn, provision_zone
from controller.lab.dns_server import DnsServer
from controller.lab.virtual_time import run_virtual
from controller.ports import Answer, Resolver

NAME = "agents.dr.example."
FENCE = f"_dr-epoch.{NAME}"
EU, DE, US = REGIONS = ("eu-west-1", "eu-central-1", "us-east-1")
ADDRESSES = {EU: ["127.0.1.2", "127.0.1.1"], DE: ["127.0.2.1"], US: ["127.0.3.1"]}
HOME = {EU: 100, DE: 0, US: 0}


# ----------------------------------------------------------------------------------------------------------- the worlds


Check = Callable[[], Awaitable[bool]]


async def until(check: Check) -> None:
    async with asyncio.timeout(30):
        while True:
            if await check():
                return
            await asyncio.sleep(0.05)


class World(ABC):
    """Name servers that answer from one zone, and the way to change that zone."""

    resolver: Resolver
    traffic: CompareAndSetTraffic

    async def weights(self, epoch: int, weights: Mapping[str, int]) -> None:
        await self.traffic.change(Fence("s0", epoch, DE, "a"), await self.traffic.read(), weights)

    @abstractmethod
    async def settle(self, check: Check) -> None:
        """Waits until the name servers have the last change."""

    async def ask(self, name: str = NAME, rdtype: str = "A") -> Answer:
        answers = await self.resolver.ask(name, rdtype)
        return answers[0]


class MemoryWorld(World):
    def __init__(self) -> None:
        self.zone = MemoryZone(NAME)
        self.zone.provision(ADDRESSES, HOME)
        self.traffic = MemoryTraffic(self.zone, REGIONS)
        self.resolver = MemoryResolver(self.zone, "one:53")

    async def settle(self, check: Check) -> None:
        """Memory is immediate unless asked otherwise."""


class WireWorld(World):
    async def settle(self, check: Check) -> None:
        await until(check)


@asynccontextmanager
async def memory_world() -> AsyncIterator[World]:
    world = MemoryWorld()
    await world.weights(3, HOME)
    yield world


@asynccontextmanager
async def wire_over_memory() -> AsyncIterator[World]:
    inner = MemoryWorld()
    await inner.weights(3, HOME)

    async def read() -> ZoneCopy:
        return inner.zone.seen_by_servers()

    server = DnsServer(read, rng=random.Random(1), refresh_seconds=0.05)
    port = await server.start("127.0.0.1", 0)
    await server.refresh()
    world = WireWorld()
    world.traffic, world.resolver = inner.traffic, DnsResolver([f"127.0.0.1:{port}"], 10.0)
    yield world
    await server.close()


@asynccontextmanager
async def dns_process(endpoint: str, zone_id: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "controller.lab.dns_server", "--endpoint", endpoint, "--zone-id", zone_id, "--port", "0", "--seed", "1"),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            ready = json.loads(await process.stdout.readline())
        assert ready["event"] == "ready"
        yield process, ready["port"]
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def wire_over_route53(endpoint: str) -> AsyncIterator[World]:
    zone_id = provision_zone(endpoint, "dr.example.", NAME, ADDRESSES, HOME, 3, 5)
    async with dns_process(endpoint, zone_id) as (_, port):
        world = WireWorld()
        traffic = Route53Traffic(
            zone_id, NAME, regions=REGIONS, ttl_seconds=5, endpoint=endpoint, call_timeout_seconds=20.0
        )
        world.traffic, world.resolver = traffic, DnsResolver([f"127.0.0.1:{port}"], 10.0)

        async def serving() -> bool:
            return (await world.ask()).error == ""

        await world.settle(serving)
        yield world
        await traffic.close()


@pytest.fixture(scope="module")
def stand_in() -> Iterator[AwsStandIn]:
    with AwsStandIn() as running:
        yield running


@pytest.fixture(params=["memory", "wire", pytest.param("wire over Route 53", marks=pytest.mark.aws)])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    if request.param == "memory":
        made = memory_world()
    elif request.param == "wire":
        made = wire_over_memory()
    else:
        made = wire_over_route53(request.getfixturevalue("stand_in").endpoint)
    async with made as ready:
        yield ready


# ------------------------------------------------------------------------------------------------------------- contract


async def test_the_active_regions_addresses_are_the_answer_sorted_with_their_ttl(world: World) -> None:
    answer = await world.ask()
    assert answer == Answer(answer.server, ("127.0.1.1", "127.0.1.2"), 5)


async def test_the_fence_record_is_read_without_its_quotes(world: World) -> None:
    assert (await world.ask(FENCE, "TXT")).values == ("3",)


async def test_case_and_the_final_dot_do_not_matter(world: World) -> None:
    assert (await world.ask("AGENTS.dr.example", "a")).values == ("127.0.1.1", "127.0.1.2")


@pytest.mark.parametrize(
    ("name", "rdtype", "error"),
    [("nobody.dr.example.", "A", "NXDOMAIN"), (NAME, "AAAA", "NODATA"), ("agents.example.org.", "A", "REFUSED")],
)
async def test_a_no_is_a_value_with_its_reason(world: World, name: str, rdtype: str, error: str) -> None:
    answer = await world.ask(name, rdtype)
    assert answer == Answer(answer.server, (), 0, error)


async def test_a_move_of_traffic_is_seen_in_dns(world: World) -> None:
    await world.weights(7, {EU: 0, DE: 100, US: 0})

    async def moved() -> bool:
        return (await world.ask()).values == ("127.0.2.1",) and (await world.ask(FENCE, "TXT")).values == ("7",)

    await world.settle(moved)
    assert await moved()


async def test_answers_are_spread_by_weight_one_region_in_each(world: World) -> None:
    await world.weights(7, {EU: 30, DE: 10, US: 0})

    async def both() -> bool:
        return (await world.ask(FENCE, "TXT")).values == ("7",)

    await world.settle(both)
    counts = Counter([(await world.ask()).values for _ in range(400)])
    assert set(counts) == {("127.0.1.1", "127.0.1.2"), ("127.0.2.1",)}
    assert counts["127.0.2.1",] / 400 == pytest.approx(0.25, abs=0.08)


# --------------------------------------------------------------------------------------------- memory: late and lost


def test_a_change_reaches_the_name_servers_after_the_propagation_and_a_late_server_later() -> None:
    async def story() -> None:
        zone = MemoryZone(NAME, propagation_seconds=10)
        zone.provision(ADDRESSES, HOME)
        traffic = MemoryTraffic(zone, REGIONS)
        resolver = MemoryResolver(zone, "prompt:53", "late:53", staleness_seconds={"late:53": 20})
        change_id = await traffic.change(Fence("s0", 7, DE, "a"), await traffic.read(), {EU: 0, DE: 100, US: 0})
        old, new = ("127.0.1.1", "127.0.1.2"), ("127.0.2.1",)
        seen = []
        for _ in range(4):
            seen.append((await traffic.in_sync(change_id), *(answer.values for answer in await resolver.ask(NAME, "A"))))
            await asyncio.sleep(10)
        assert seen == [(False, old, old), (True, new, old), (True, new, old), (True, new, new)]

    run_virtual(story())


def test_a_name_server_that_is_cut_off_is_a_timeout_and_not_an_exception() -> None:
    async def story() -> None:
        zone = MemoryZone(NAME)
        zone.provision(ADDRESSES, HOME)
        gate = FaultGate(asyncio.sleep)
        resolver = MemoryResolver(zone, "a:53", gate=gate)
        gate.cut = True
        assert await resolver.ask(NAME, "A") == (Answer("a:53", (), 0, "timeout"),)
        gate.cut, gate.delay_seconds = False, 5.0
        assert await resolver.ask(NAME, "A") == (Answer("a:53", (), 0, "timeout"),)

    run_virtual(story())


async def test_zero_weight_records_answer_when_the_active_regions_check_fails() -> None:
    zone = MemoryZone(NAME)
    zone.provision(ADDRESSES, HOME, health_checks={EU: "hc-eu", DE: "hc-de", US: "hc-us"})
    zone.unhealthy |= {"hc-eu", "hc-us"}
    assert {answer.values for answer in await MemoryResolver(zone).ask(NAME, "A")} == {("127.0.2.1",)}


async def test_a_cname_is_followed_in_memory_as_it_is_on_the_wire() -> None:
    zone = MemoryZone(NAME)
    zone.provision(ADDRESSES, HOME)
    alias = {"Name": "www.dr.example.", "Type": "CNAME", "TTL": 2, "ResourceRecords": [{"Value": NAME}]}
    away = {"Name": "away.dr.example.", "Type": "CNAME", "TTL": 2, "ResourceRecords": [{"Value": "x.example.org."}]}
    zone.apply([Change("CREATE", alias), Change("CREATE", away)])

    async def read() -> ZoneCopy:
        return zone.seen_by_servers()

    server = DnsServer(read)
    port = await server.start("127.0.0.1", 0)
    await server.refresh()
    try:
        for resolver in (MemoryResolver(zone, "s"), DnsResolver([f"127.0.0.1:{port}"], 10.0)):
            (answer,) = await resolver.ask("www.dr.example.", "A")
            assert (answer.values, answer.ttl_seconds) == (("127.0.1.1", "127.0.1.2"), 2)
            (answer,) = await resolver.ask("away.dr.example.", "A")
            assert answer.values == ()
            assert answer.error.startswith("the CNAME chain ends at x.example.org., ")
    finally:
        await server.close()


# --------------------------------------------------------------------------------------- the lab's server and process


@pytest.mark.aws
async def test_the_name_server_goes_on_with_its_last_copy_while_route_53_is_down_and_ends_cleanly() -> None:
    with AwsStandIn() as provider:
        zone_id = provision_zone(provider.endpoint, "dr.example.", NAME, ADDRESSES, HOME, 3, 5)
        async with dns_process(provider.endpoint, zone_id) as (process, port):
            resolver = DnsResolver([f"127.0.0.1:{port}"], 10.0)

            async def serving() -> bool:
                return (await resolver.ask(NAME, "A"))[0].error == ""

            await until(serving)
            provider.freeze()
            await asyncio.sleep(0.5)
            assert (await resolver.ask(NAME, "A"))[0].values == ("127.0.1.1", "127.0.1.2")
            provider.kill()
            await asyncio.sleep(0.5)
            assert (await resolver.ask(NAME, "A"))[0].values == ("127.0.1.1", "127.0.1.2")
            process.terminate()
            async with asyncio.timeout(20):
                assert await process.wait() == 0


async def test_before_the_zone_was_read_the_name_server_says_servfail() -> None:
    async def down() -> ZoneCopy:
        raise Unavailable("Route 53 is down")

    server = DnsServer(down)
    port = await server.start("127.0.0.1", 0)
    try:
        assert (await DnsResolver([f"127.0.0.1:{port}"], 10.0).ask(NAME, "A"))[0].error == "SERVFAIL"
    finally:
        await server.close()


async def test_an_answer_too_long_for_a_datagram_comes_over_tcp() -> None:
    zone = MemoryZone(NAME)
    zone.provision({EU: [f"127.1.{i // 200}.{i % 200}" for i in range(300)]}, {EU: 1})

    async def read() -> ZoneCopy:
        return zone.seen_by_servers()

    server = DnsServer(read)
    port = await server.start("127.0.0.1", 0)
    await server.refresh()
    try:
        assert len((await DnsResolver([f"127.0.0.1:{port}"], 10.0).ask(NAME, "A"))[0].values) == 300
    finally:
        await server.close()


# ------------------------------------------------------------------------------------------------------ lying servers

Reply = Callable[[dns.message.Message], list[bytes]]


class _Liar(asyncio.DatagramProtocol):
    def __init__(self, reply: Reply) -> None:
        self.reply = reply

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        for datagram in self.reply(dns.message.from_wire(data)):
            self.transport.sendto(datagram, addr)


@asynccontextmanager
async def liar(reply: Reply) -> AsyncIterator[str]:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: _Liar(reply), local_addr=("127.0.0.1", 0))
    yield f"127.0.0.1:{transport.get_extra_info('sockname')[1]}"
    transport.close()


def truth(query: dns.message.Message, *rrsets: tuple[str, int, str, str], rcode: int = 0) -> dns.message.Message:
    response = dns.message.make_response(query)
    response.set_rcode(dns.rcode.Rcode(rcode))
    for owner, ttl, rdtype, value in rrsets or ((NAME, 5, "A", "127.0.1.1"),):
        response.answer.append(dns.rrset.from_text(owner, ttl, "IN", rdtype, value))
    return response


def wrong_id(query: dns.message.Message) -> list[bytes]:
    forged = truth(query)
    forged.id ^= 1
    return [forged.to_wire()]


def wrong_question(query: dns.message.Message) -> list[bytes]:
    other = dns.message.make_query("other.example.", "A")
    other.id = query.id
    return [truth(other, ("other.example.", 5, "A", "6.6.6.6")).to_wire()]


def truncated(query: dns.message.Message) -> list[bytes]:
    cut = truth(query)
    cut.flags |= dns.flags.TC
    return [cut.to_wire()]


def echo(query: dns.message.Message) -> list[bytes]:
    return [query.to_wire()]


def cut_short(query: dns.message.Message) -> list[bytes]:
    return [truth(query).to_wire()[:-3]]


def no_question(query: dns.message.Message) -> list[bytes]:
    return [query.to_wire()[:2] + b"\x80\x00" + bytes(8)]


def cname_loop(query: dns.message.Message) -> list[bytes]:
    return [truth(query, (NAME, 5, "CNAME", "b.example."), ("b.example.", 5, "CNAME", NAME)).to_wire()]


def code(number: int) -> Reply:
    def reply(query: dns.message.Message) -> list[bytes]:
        response = dns.message.make_response(query)
        response.set_rcode(dns.rcode.Rcode(number))
        return [response.to_wire()]

    return reply


LIES: dict[str, tuple[Reply, str]] = {
    "no answer": (lambda _: [], "timeout"),
    "wrong id": (wrong_id, "wrong id"),
    "wrong question": (wrong_question, "wrong question"),
    "the question itself": (echo, "not a response"),
    "garbage": (lambda _: [b"\xff" * 40], "malformed"),
    "one byte": (lambda _: [b"\x00"], "malformed"),
    "cut short": (cut_short, "malformed"),
    "a header alone": (no_question, "wrong question"),
    "truncated, and no TCP": (truncated, "unreachable"),
    "CNAME loop": (cname_loop, "CNAME loop"),
    "CNAME to nowhere": (lambda q: [truth(q, (NAME, 5, "CNAME", "b.example.")).to_wire()], "the CNAME chain ends at b.exa"),
    "an answer with NXDOMAIN": (lambda q: [truth(q, rcode=3).to_wire()], "NXDOMAIN"),
    "FORMERR": (code(1), "FORMERR"),
    "SERVFAIL": (code(2), "SERVFAIL"),
    "NOTIMP": (code(4), "NOTIMP"),
    "REFUSED": (code(5), "REFUSED"),
    "a code that does not exist": (code(14), "14"),
}


@pytest.mark.parametrize("lie", LIES)
async def test_whatever_a_server_does_is_a_value_and_never_believed(lie: str) -> None:
    reply, says = LIES[lie]
    async with liar(reply) as server:
        (answer,) = await DnsResolver([server], 0.3).ask(NAME, "A")
    assert answer.server == server
    assert answer.values == ()
    assert says in answer.error


async def test_forgeries_that_arrive_first_do_not_hide_the_true_answer() -> None:
    def reply(query: dns.message.Message) -> list[bytes]:
        return [*wrong_id(query), b"\xff" * 40, *wrong_question(query), truth(query).to_wire()]

    async with liar(reply) as server:
        (answer,) = await DnsResolver([server], 10.0).ask(NAME, "A")
    assert answer == Answer(server, ("127.0.1.1",), 5)


async def test_an_answer_from_another_address_is_not_believed() -> None:
    loop = asyncio.get_running_loop()
    other, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, local_addr=("127.0.0.1", 0))

    class Spoof(_Liar):
        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            other.sendto(truth(dns.message.from_wire(data)).to_wire(), addr)

    transport, _ = await loop.create_datagram_endpoint(lambda: Spoof(echo), local_addr=("127.0.0.1", 0))
    (answer,) = await DnsResolver([f"127.0.0.1:{transport.get_extra_info('sockname')[1]}"], 0.3).ask(NAME, "A")
    assert answer.error == "timeout"
    other.close()
    transport.close()


async def test_a_slow_server_does_not_delay_or_spoil_the_answers_of_the_others() -> None:
    async with liar(lambda _: []) as silent, liar(lambda q: [truth(q).to_wire()]) as honest:
        async with asyncio.timeout(10):
            answers = await DnsResolver([silent, honest, "127.0.0.1:1"], 0.5).ask(NAME, "A")
    assert [answer.server for answer in answers] == [silent, honest, "127.0.0.1:1"]
    assert answers[0].error == "timeout"
    assert answers[1].values == ("127.0.1.1",)
    assert answers[2].error != ""


@pytest.mark.parametrize(("raw", "seconds"), [(0, 0), (1, 1), (2**31 - 1, 2**31 - 1), (2**31, 0), (2**32 - 1, 0)])
async def test_a_ttl_beyond_31_bits_counts_as_zero(raw: int, seconds: int) -> None:
    def reply(query: dns.message.Message) -> list[bytes]:
        query.use_edns(False)
        wire = truth(query).to_wire()
        assert wire.count(struct.pack("!I", 5)) == 1
        return [wire.replace(struct.pack("!I", 5), struct.pack("!I", raw))]

    async with liar(reply) as server:
        (answer,) = await DnsResolver([server], 10.0).ask(NAME, "A")
    assert answer == Answer(server, ("127.0.1.1",), seconds)


async def test_the_strings_of_a_txt_value_are_joined_and_several_values_are_all_shown() -> None:
    def reply(query: dns.message.Message) -> list[bytes]:
        response = dns.message.make_response(query)
        response.answer.append(dns.rrset.from_text(FENCE, 5, "IN", "TXT", '"4" "2"', '"\\255 7"'))
        return [response.to_wire()]

    async with liar(reply) as server:
        (answer,) = await DnsResolver([server], 10.0).ask(FENCE, "TXT")
    assert answer.values == ("42", "\\xff 7")


async def test_a_truncated_answer_is_asked_for_again_over_tcp_and_a_truncated_tcp_answer_is_none() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (length,) = struct.unpack("!H", await reader.readexactly(2))
        (cut,) = truncated(dns.message.from_wire(await reader.readexactly(length)))
        writer.write(struct.pack("!H", len(cut)) + cut)
        await writer.drain()
        writer.close()

    async with liar(truncated) as server:
        tcp = await asyncio.start_server(serve, "127.0.0.1", int(server.rpartition(":")[2]))
        (answer,) = await DnsResolver([server], 10.0).ask(NAME, "A")
        tcp.close()
    assert answer == Answer(server, (), 0, "truncated")


async def test_a_tcp_connection_that_closes_or_hangs_is_a_value() -> None:
    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    for serve, says in ((close, ("connection closed", "unreachable")), (hang, ("truncated",))):
        async with liar(truncated) as server:
            tcp = await asyncio.start_server(serve, "127.0.0.1", int(server.rpartition(":")[2]))
            (answer,) = await DnsResolver([server], 0.5).ask(NAME, "A")
            tcp.close()
        assert answer.values == ()
        assert answer.error.startswith(says)


@pytest.mark.parametrize(
    "server", ["", "127.0.0.1", "localhost:53", "127.0.0.1:0", "127.0.0.1:65536", "::1:53", "[127.0.0.1]:53", "1.2.3:53"]
)
def test_a_server_that_is_not_an_address_with_a_port_is_a_misconfiguration(server: str) -> None:
    with pytest.raises(Misconfigured):
        DnsResolver([server], 1.0)


def test_servers_may_be_ipv6_and_there_must_be_one_and_a_deadline() -> None:
    assert (parse_server("[2001:db8::1]:53").host, parse_server("[2001:db8::1]:53").port) == ("2001:db8::1", 53)
    with pytest.raises(Misconfigured):
        DnsResolver([], 1.0)
    with pytest.raises(Misconfigured):
        DnsResolver(["127.0.0.1:53"], 0)


@pytest.mark.parametrize(
    ("name", "rdtype"), [("a..b", "A"), ("x" * 64 + ".example", "A"), (NAME, "NOTATYPE"), ("é" * 300, "A")]
)
async def test_a_question_that_cannot_be_asked_is_refused(name: str, rdtype: str) -> None:
    with pytest.raises(Refused):
        await DnsResolver(["127.0.0.1:53"], 1.0).ask(name, rdtype)
