"""HTTP to addresses that settings or data name: the rule of ``domain/outward.py``, applied where the connection is made.

A name is resolved once for each connection, every address that comes back is judged, and the connection goes to one of
*those*: the certificate and the ``Host`` header stay those of the name. Redirects are for the caller to refuse
(``follow_redirects=False``); proxies from the environment are never used.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence

import httpcore
import httpx

from controller.domain.outward import Address, Network, address_problem, host_problem, port_problem
from controller.domain.text import visible
from controller.errors import Misconfigured, Unavailable

MAX_TRIED = 3
"""Addresses of one name that are tried before it counts as unreachable."""

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


async def system_resolve(host: str, port: int) -> Sequence[str]:
    """Addresses by the system's resolver, in its order. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class _Backend(httpcore.AnyIOBackend):
    """Connects where the rule allows it and nowhere else."""

    def __init__(self, allowed: Sequence[Network], resolve: Resolve) -> None:
        self._allowed = tuple(allowed)
        self._resolve = resolve

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Raises Misconfigured for a place that is not allowed, Unavailable for an unknown name, httpcore's errors."""
        failed: Exception | None = None
        for address in (await self._addresses(host, port))[:MAX_TRIED]:
            try:
                return await super().connect_tcp(str(address), port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failed = error
        raise failed or httpcore.ConnectError("no address")

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None
    ) -> httpcore.AsyncNetworkStream:
        """Never."""
        raise Misconfigured("a URL led to a socket of this machine", hint="give an http or https URL")

    async def _addresses(self, host: str, port: int) -> list[Address]:
        hint = "name another host, or allow its network in the settings"
        problem = host_problem(host) or port_problem(port)
        if problem:
            raise Misconfigured(f"{visible(host, 100)}:{port} is not connected to: {problem}", hint=hint)
        try:
            found = [ipaddress.ip_address(text) for text in await self._resolve(host, port)]
        except OSError as error:
            raise Unavailable(f"{host} has no address", hint="check the name in the settings, and DNS") from error
        # One bad address among good ones is how a name is turned against us: then none of them is used.
        problems = [problem for address in found if (problem := address_problem(address, self._allowed))]
        if problems:
            raise Misconfigured(f"{host} is not connected to: {problems[0]}", hint=hint)
        return found


class GuardedTransport(httpx.AsyncHTTPTransport):
    """For ``httpx.AsyncClient(transport=…)``. ``allowed``: networks inside that may be connected to. ``tls``: a client's
    context; the system's authorities when left out."""

    def __init__(
        self,
        allowed: Sequence[Network] = (),
        *,
        tls: ssl.SSLContext | None = None,
        connections: int = 10,
        resolve: Resolve = system_resolve,
    ) -> None:
        super().__init__(trust_env=False)
        # httpx has no argument for it. Should its attribute ever change, this must not go on unguarded.
        if not isinstance(self._pool, httpcore.AsyncConnectionPool):
            raise TypeError("this httpx keeps its connections elsewhere: GuardedTransport has to be adapted")
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=tls or httpx.create_ssl_context(trust_env=False),
            max_connections=connections,
            max_keepalive_connections=connections,
            keepalive_expiry=5.0,
            network_backend=_Backend(allowed, resolve),
        )
