"""Where this process may connect to when a URL comes from settings or data: one rule for all of them. Pure.

A URL is an order to this machine, which stands inside the network and has a role in the cloud (server-side request forgery).
So a host has one spelling, and the address that it leads to is judged, not its name: by whoever connects, on the very address
that is connected to (``adapters/outward.py``). A name that is judged and resolved again later may have changed in between.

Sources: the IANA registries of special-purpose addresses (RFC 6890, as Python's ``ipaddress`` has them); clouds' own pages on
their metadata services; the bad ports of the Fetch standard (https://fetch.spec.whatwg.org/#port-blocking).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_METADATA = ("fd00:ec2::/32", "fd20:ce::254/128", "100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32")
"""Those of EC2, Google, Alibaba, Azure and Oracle that are not link-local."""

NEVER: tuple[tuple[str, tuple[Network, ...]], ...] = tuple(
    (name, tuple(ipaddress.ip_network(text) for text in networks))
    for name, networks in (
        ("a metadata service", _METADATA),
        ("link-local, where metadata services live", ("169.254.0.0/16", "fe80::/10", "fec0::/10")),
        ("unspecified", ("0.0.0.0/8", "::/128")),
        ("multicast, broadcast or reserved", ("224.0.0.0/4", "ff00::/8", "240.0.0.0/4")),
        ("a tunnel to another address", ("2002::/16", "2001::/32", "64:ff9b:1::/48", "::/96")),
    )
)
"""Whatever networks are allowed. ``::1`` is in the last one too: it is judged as a loopback address before that."""

INSIDE: tuple[Network, ...] = tuple(
    ipaddress.ip_network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
)
"""Private networks, a cloud's carrier-grade range included: where a group's own controllers may stand."""
LOOPBACK: tuple[Network, ...] = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))

_NAT64 = ipaddress.ip_network("64:ff9b::/96")

BAD_PORTS = frozenset({
    0, 1, 7, 9, 11, 13, 15, 17, 19, 20, 21, 22, 23, 25, 37, 42, 43, 53, 69, 77, 79, 87, 95, 101, 102, 103, 104, 109, 110, 111,
    113, 115, 117, 119, 123, 135, 137, 139, 143, 161, 179, 389, 427, 465, 512, 513, 514, 515, 526, 530, 531, 532, 540, 548, 554,
    556, 563, 587, 601, 636, 989, 990, 993, 995, 1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060, 5061, 6000, 6379, 6566, 6665,
    6666, 6667, 6668, 6669, 6679, 6697, 10080, 11211,
})  # fmt: skip
"""Ports of line protocols, in which a request's body could be commands (and Redis and memcached, which the standard lacks)."""

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_LABELS = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")
_NUMBER = re.compile(r"(?:[0-9]+|0[xX][0-9A-Fa-f]*)\.?")


def host_problem(host: str) -> str | None:
    """What is wrong with a URL's host (without brackets) as it is spelled, or None.

    Libraries disagree about ``2852039166``, ``0x7f.1``, ``0177.0.0.1`` and full-width digits; so none of them is a host.
    """
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            return "is not an IPv6 address"
        return "names a zone of an address" if "%" in host else None
    if len(host) > 253 or not host.isascii() or not _LABELS.fullmatch(host):
        return "is not a host name in ASCII (write names of other scripts in their xn-- form)"
    last = host.removesuffix(".").rpartition(".")[2]
    if _NUMBER.fullmatch(last):
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            return "is an IP address in an odd form: write four decimal numbers"
    return None


def port_problem(port: int) -> str | None:
    """What is wrong with a port to which HTTP is going to be spoken, or None."""
    return f"port {port} belongs to another protocol" if port in BAD_PORTS or not 0 < port < 65_536 else None


def address_problem(address: Address, allowed: Sequence[Network] = ()) -> str | None:
    """Why nobody may connect there, or None. Public addresses are fine; private and loopback ones if ``allowed`` has them;
    those of ``NEVER`` never."""
    plain = _plain(address)
    if not plain.is_loopback:
        for name, networks in NEVER:
            if _in(plain, networks):
                return f"{address} is {name}"
    # ``is_global`` is also true of IPv6 ranges that nobody has been given yet: those are reserved.
    if _in(plain, allowed) or (plain.is_global and not plain.is_loopback and not plain.is_reserved):
        return None
    return f"{address} is a {'loopback' if plain.is_loopback else 'private'} address, and in no network that is allowed"


def _plain(address: Address) -> Address:
    """The IPv4 address in an IPv6 one that stands for it (mapped, or translated by NAT64)."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else address


def _in(address: Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks if network.version == address.version)
