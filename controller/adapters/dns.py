"""DNS as seen from outside: asks each configured server directly (dnspython), and never raises for what a server does.

A datagram that is not an answer to our question (wrong id, wrong question, garbage, another sender) may be a forgery, so it
is not believed and does not end the wait (RFC 5452); when nothing better comes before the deadline, the answer's ``error``
says what did come. A truncated answer is asked for again over TCP, within the same deadline.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dns.asyncbackend
import dns.asyncquery
import dns.exception
import dns.flags
import dns.inet
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdatatype
from dns.rdtypes.ANY.TXT import TXT

from controller.errors import Misconfigured, Refused
from controller.ports import Answer

EDNS_PAYLOAD = 1232
"""Bytes of a UDP answer that every path carries unfragmented (DNS flag day 2020)."""


@dataclass(frozen=True, slots=True)
class Server:
    """One DNS server. ``label`` is how the settings spell it."""

    label: str
    host: str
    port: int


class DnsResolver:
    """``Resolver`` over UDP with a fall-back to TCP."""

    def __init__(self, servers: Sequence[str], timeout_seconds: float) -> None:
        """``servers``: ``"ip:port"`` or ``"[ipv6]:port"``. Raises Misconfigured for an empty list or another form."""
        if not servers:
            raise Misconfigured("no DNS servers are given", hint='set dns.servers, for example ["192.0.2.53:53"]')
        if timeout_seconds <= 0:
            raise Misconfigured(f"dns.timeout_seconds is {timeout_seconds}", hint="give a number of seconds above 0")
        self._servers = tuple(parse_server(text) for text in servers)
        self._timeout = timeout_seconds

    async def ask(self, name: str, rdtype: str) -> tuple[Answer, ...]:
        """See ``ports.Resolver.ask``; answers are in the order of the settings. Raises Refused when the question itself cannot
        be asked (not a DNS name, not a record type)."""
        try:
            owner, kind = dns.name.from_text(name), dns.rdatatype.from_text(rdtype)
        except (dns.exception.DNSException, ValueError, UnicodeError) as error:
            what = f"{name[:80]!r} {rdtype[:20]!r}"
            raise Refused(f"cannot ask DNS for {what}: {error}", hint="correct the name or the type") from error
        return tuple(await asyncio.gather(*(self._ask(server, owner, kind) for server in self._servers)))

    async def _ask(self, server: Server, owner: dns.name.Name, kind: dns.rdatatype.RdataType) -> Answer:
        ignored: list[str] = []
        try:
            async with asyncio.timeout(self._timeout):
                response = await _exchange(server, owner, kind, ignored)
            return _read(server, response)
        except TimeoutError:
            return _failed(server, ignored[-1] if ignored else "timeout")
        except dns.message.ChainTooLong:
            return _failed(server, "CNAME loop")
        except (dns.exception.DNSException, ValueError) as error:
            return _failed(server, f"malformed: {type(error).__name__}")
        except EOFError:
            return _failed(server, "connection closed")
        except OSError as error:
            return _failed(server, f"unreachable: {error.strerror or type(error).__name__}")


def parse_server(text: str) -> Server:
    """``"192.0.2.1:53"``, ``"[2001:db8::1]:53"``. Raises Misconfigured."""
    host, separator, port = text.rpartition(":")
    try:
        address = ipaddress.ip_address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)
        if not separator or (address.version == 6) != host.startswith("[") or not port.isascii() or not 0 < int(port) < 65536:
            raise ValueError(text)
    except ValueError:
        raise Misconfigured(
            f"DNS server {text[:80]!r} is not an address with a port",
            hint='write "192.0.2.1:53" or "[2001:db8::1]:53"; a name would need the DNS that is being checked',
        ) from None
    return Server(text, str(address), int(port))


async def _exchange(
    server: Server, owner: dns.name.Name, kind: dns.rdatatype.RdataType, ignored: list[str]
) -> dns.message.Message:
    """One question, one believable answer. What came and was not believed is noted in ``ignored``."""
    query = dns.message.make_query(owner, kind, use_edns=0, payload=EDNS_PAYLOAD)
    family = dns.inet.af_for_address(server.host)
    destination = dns.inet.low_level_address_tuple((server.host, server.port), family)
    backend: Any = dns.asyncbackend.get_backend("asyncio")  # dnspython does not type this part
    # Not connected, bound by the kernel to a random port: an answer is taken from the address that was asked only.
    async with await backend.make_socket(family, socket.SOCK_DGRAM, 0, None, None) as sock:
        await dns.asyncquery.send_udp(sock, query, destination)
        response: dns.message.Message
        while True:
            try:
                response, _, _ = await dns.asyncquery.receive_udp(sock, destination, ignore_unexpected=True)
            except (dns.exception.DNSException, ValueError) as error:
                ignored.append(f"malformed: {type(error).__name__}")
                continue
            reason = _unbelievable(query, response)
            if not reason:
                break
            ignored.append(reason)
    if not response.flags & dns.flags.TC:
        return response
    ignored.append("truncated")
    over_tcp: dns.message.Message = await dns.asyncquery.tcp(query, server.host, port=server.port)
    return over_tcp


def _unbelievable(query: dns.message.Message, response: dns.message.Message) -> str:
    """Why this message is no answer to that query; "" when it is one."""
    if response.id != query.id:
        return "wrong id"
    if not response.flags & dns.flags.QR:
        return "not a response"
    if not query.is_response(response):
        return "wrong question"
    return ""


def _read(server: Server, response: dns.message.Message) -> Answer:
    code = response.rcode()
    if code != dns.rcode.NOERROR:
        return _failed(server, dns.rcode.to_text(code))
    if not isinstance(response, dns.message.QueryMessage):
        return _failed(server, "malformed: not an answer to a query")
    if response.flags & dns.flags.TC:
        return _failed(server, "truncated")
    found = response.resolve_chaining()
    if found.answer is None:
        if found.cnames:
            return _failed(server, f"the CNAME chain ends at {found.canonical_name}, which the answer does not contain")
        return _failed(server, "NODATA")
    # dnspython reads a TTL beyond 31 bits as 0, as RFC 2181 says; it merges records of one set to the smallest TTL.
    ttl = min(rrset.ttl for rrset in (*found.cnames, found.answer))
    return Answer(server.label, tuple(sorted(_text(rdata) for rdata in found.answer)), ttl)


def _text(rdata: dns.rdata.Rdata) -> str:
    if isinstance(rdata, TXT):
        return b"".join(rdata.strings).decode("utf-8", "backslashreplace")
    return rdata.to_text()


def _failed(server: Server, reason: str) -> Answer:
    return Answer(server.label, (), 0, reason)
