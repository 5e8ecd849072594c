"""An authoritative name server for the lab: answers with what the hosted zone holds now, as Route 53's own servers would.

No stand-in for Route 53 serves DNS, and a failover that is confirmed by the API alone is not confirmed. This server reads
the zone from the Route 53 endpoint every fraction of a second, keeps the last good copy while Route 53 is down (its data
plane outlives its control plane), and answers over UDP and TCP with weighted routing.

Run as ``python -m controller.lab.dns_server --endpoint http://127.0.0.30:4566 --zone-id Z… --host 127.0.0.31 --port 5300``.
When it listens it prints one JSON line, ``{"event": "ready", "host": …, "port": …}``. It ends with its parent.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import random
import signal
import struct
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from controller.adapters.record_sets import Found, Lookup, RecordSet, Status, ZoneCopy
from controller.adapters.route53 import checked_zone_id, route53_client
from controller.errors import DrError, Unavailable

if TYPE_CHECKING:
    from mypy_boto3_route53.client import Route53Client

Source = Callable[[], Awaitable[ZoneCopy]]

PLAIN_UDP_BYTES = 512
"""Answer size for a client without EDNS (RFC 1035)."""
MAX_UDP_BYTES = 1232
MAX_ZONE_RECORD_SETS = 10_000
TCP_IDLE_SECONDS = 5.0
MAX_TCP_CONNECTIONS = 64
PR_SET_PDEATHSIG = 1

_RCODES = {
    Status.ANSWER: dns.rcode.NOERROR,
    Status.NODATA: dns.rcode.NOERROR,
    Status.NXDOMAIN: dns.rcode.NXDOMAIN,
    Status.REFUSED: dns.rcode.REFUSED,
    Status.SERVFAIL: dns.rcode.SERVFAIL,
}


# --------------------------------------------------------------------------------------------------- one question, pure


def respond(wire: bytes, zone: ZoneCopy | None, rng: random.Random, *, udp: bool) -> bytes | None:
    """The answer to one message, or None for what deserves none (no header, or a response, which could start a loop).

    ``zone`` None: no copy of the zone yet, SERVFAIL. ``udp``: cut to the client's size, with the TC bit.
    """
    if len(wire) < 12 or wire[2] & 0x80:
        return None
    try:
        query = dns.message.from_wire(wire, ignore_trailing=False)
    except (dns.exception.DNSException, ValueError):
        return _bare(wire, dns.rcode.FORMERR)
    if query.opcode() != dns.opcode.QUERY or not isinstance(query, dns.message.QueryMessage):
        return _bare(wire, dns.rcode.NOTIMP)
    if len(query.question) != 1:
        return _bare(wire, dns.rcode.FORMERR)
    response = dns.message.make_response(query, our_payload=MAX_UDP_BYTES)
    _fill(response, query, zone, rng)
    size = min(max(query.payload, PLAIN_UDP_BYTES), MAX_UDP_BYTES) if query.edns >= 0 else PLAIN_UDP_BYTES
    return response.to_wire(max_size=size if udp else 65535, prefer_truncation=True)


def _fill(response: dns.message.Message, query: dns.message.Message, zone: ZoneCopy | None, rng: random.Random) -> None:
    question = query.question[0]
    if query.edns > 0:
        response.set_rcode(dns.rcode.BADVERS)
    elif question.rdclass != dns.rdataclass.IN or dns.rdatatype.is_metatype(question.rdtype):
        response.set_rcode(dns.rcode.REFUSED)
    elif zone is None:
        response.set_rcode(dns.rcode.SERVFAIL)
    else:
        rtype = dns.rdatatype.to_text(question.rdtype)
        _write(response, question.name, zone.lookup(question.name.to_text(), rtype, rng.randrange))


def _write(response: dns.message.Message, asked: dns.name.Name, found: Lookup) -> None:
    response.set_rcode(_RCODES[found.status])
    if found.status in (Status.REFUSED, Status.SERVFAIL):
        return
    response.flags |= dns.flags.AA
    owner = asked  # The case of the question is kept (0x20): some resolvers compare it.
    for step in found.chain:
        rrset = _rrset(owner, step)
        response.answer.append(rrset)
        if step.rtype == "CNAME":
            owner = dns.name.from_text(step.values[0])
    if found.authority is not None:
        response.authority.append(_rrset(dns.name.from_text(found.authority.name), found.authority))


def _rrset(owner: dns.name.Name, found: Found) -> dns.rrset.RRset:
    return dns.rrset.from_text_list(owner, found.ttl_seconds, "IN", found.rtype, list(found.values))


def _bare(wire: bytes, rcode: dns.rcode.Rcode) -> bytes:
    """A header and nothing else: same id and opcode, QR set."""
    opcode_and_rd = wire[2] & 0x79
    return wire[:2] + bytes((0x80 | opcode_and_rd, int(rcode) & 0x0F)) + bytes(8)


# ------------------------------------------------------------------------------------------------------------ the server


class DnsServer:
    """Serves one zone over UDP and TCP, with a copy that it refreshes by itself."""

    def __init__(self, source: Source, *, rng: random.Random | None = None, refresh_seconds: float = 0.3) -> None:
        """``source``: reads the zone; DrError from it leaves the last good copy in place."""
        self._source = source
        self._rng = rng or random.Random()
        self._refresh_seconds = refresh_seconds
        self._zone: ZoneCopy | None = None
        self._error = ""
        self._udp: asyncio.DatagramTransport | None = None
        self._tcp: asyncio.Server | None = None
        self._refresher: asyncio.Task[None] | None = None
        self._connections: set[asyncio.StreamWriter] = set()

    async def start(self, host: str, port: int) -> int:
        """Binds both protocols to one port (0: any free one) and returns it. Raises OSError when the port is taken."""
        for _ in range(16):
            try:
                bound = await self._bind(host, port)
                break
            except OSError:
                if port != 0:
                    raise
        else:  # A free UDP port was a taken TCP port, sixteen times.
            raise OSError(f"no port of {host} is free for both UDP and TCP")
        self._refresher = asyncio.create_task(self._keep_fresh())
        return bound

    async def _bind(self, host: str, port: int) -> int:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: _Udp(self._answer_udp), local_addr=(host, port))
        bound = int(transport.get_extra_info("sockname")[1])
        try:
            self._tcp = await asyncio.start_server(self._serve_tcp, host, bound)
        except OSError:
            transport.close()
            raise
        self._udp = transport
        return bound

    async def close(self) -> None:
        """Stops serving; open connections are cut."""
        if self._refresher is not None:
            self._refresher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._refresher
        if self._udp is not None:
            self._udp.close()
        if self._tcp is not None:
            self._tcp.close()
        for writer in tuple(self._connections):
            writer.close()

    async def refresh(self) -> None:
        """Reads the zone once."""
        try:
            self._zone = await self._source()
        except DrError as error:
            self._say("zone_not_read", str(error))
        else:
            self._say("zone_read", "")

    async def _keep_fresh(self) -> None:
        while True:
            await self.refresh()
            await asyncio.sleep(self._refresh_seconds)

    def _say(self, event: str, error: str) -> None:
        if error != self._error:  # Changes only: three lines a second would hide everything else.
            print(json.dumps({"event": event, "error": error}), file=sys.stderr, flush=True)
        self._error = error

    def _answer_udp(self, wire: bytes) -> bytes | None:
        return respond(wire, self._zone, self._rng, udp=True)

    async def _serve_tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MAX_TCP_CONNECTIONS:
            writer.close()
            return
        self._connections.add(writer)
        try:
            with contextlib.suppress(TimeoutError, ConnectionError, asyncio.IncompleteReadError):
                while True:
                    async with asyncio.timeout(TCP_IDLE_SECONDS):
                        (length,) = struct.unpack("!H", await reader.readexactly(2))
                        answer = respond(await reader.readexactly(length), self._zone, self._rng, udp=False)
                        if answer is None:
                            break
                        writer.write(struct.pack("!H", len(answer)) + answer)
                        await writer.drain()
        finally:
            self._connections.discard(writer)
            writer.close()


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, answer: Callable[[bytes], bytes | None]) -> None:
        self._answer = answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        answer = self._answer(data)
        if answer is not None:
            self._transport.sendto(answer, addr)


# ------------------------------------------------------------------------------------------------- the zone on Route 53


def route53_source(endpoint: str | None, zone_id: str, *, call_timeout_seconds: float = 1.0) -> Source:
    """Reads the whole zone over the Route 53 API, all pages. The source raises Unavailable."""
    client = route53_client(endpoint, aws_region="us-east-1", call_timeout_seconds=call_timeout_seconds)
    return partial(asyncio.to_thread, _read_zone, client, checked_zone_id(zone_id))


def _read_zone(client: Route53Client, zone_id: str) -> ZoneCopy:
    records: list[RecordSet] = []
    start: dict[str, str] = {}
    try:
        while len(records) < MAX_ZONE_RECORD_SETS:
            page = client.list_resource_record_sets(HostedZoneId=zone_id, **cast(Any, start))
            records.extend(cast("Sequence[RecordSet]", page["ResourceRecordSets"]))
            if not page["IsTruncated"]:
                break
            start = {"StartRecordName": page["NextRecordName"], "StartRecordType": page["NextRecordType"]}
            if page.get("NextRecordIdentifier"):
                start["StartRecordIdentifier"] = page["NextRecordIdentifier"]
    except Exception as error:  # raises many kinds; all of them mean: keep the last good copy
        raise Unavailable(f"the zone cannot be read: {error}", hint="is the Route 53 endpoint up?") from error
    return ZoneCopy.of(records)


# -------------------------------------------------------------------------------------------------------------- process


def end_with_parent() -> None:
    """Linux: SIGTERM to this process when its parent (the thread that started it) ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def until_stopped() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set. Call inside a running loop."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    return stopped


async def serve(arguments: argparse.Namespace) -> None:
    """Serves until a signal comes."""
    stopped = until_stopped()
    rng = random.Random(arguments.seed) if arguments.seed is not None else random.Random()
    source = route53_source(arguments.endpoint, arguments.zone_id)
    server = DnsServer(source, rng=rng, refresh_seconds=arguments.refresh_seconds)
    port = await server.start(arguments.host, arguments.port)
    print(json.dumps({"event": "ready", "host": arguments.host, "port": port}), flush=True)
    await stopped.wait()
    await server.close()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser("python -m controller.lab.dns_server", description="The lab's authoritative name server.")
    parser.add_argument("--endpoint", help="URL of the Route 53 endpoint; without it, AWS")
    parser.add_argument("--zone-id", required=True, help="hosted zone id, without /hostedzone/")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5300, help="UDP and TCP; 0 takes a free one")
    parser.add_argument("--refresh-seconds", type=float, default=0.3)
    parser.add_argument("--seed", type=int, help="for repeatable choices among weighted records")
    end_with_parent()
    try:
        asyncio.run(serve(parser.parse_args()))
    except DrError as error:
        print(json.dumps({"event": "failed", **error.to_dict()}), file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
