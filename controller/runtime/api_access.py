"""Who calls the API: in front of every route, before a body is read. What a caller may do, each route says (``permit``).

Open to everybody are the probes and the API's own document. Where there is no access file nobody is asked who they are; routes
of other controllers still want a certificate where there is an authority for them (``api.client_ca_file``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from controller.domain.access import ANYBODY, Caller, CallerRole, Permit
from controller.domain.model import Ack, Frame
from controller.errors import DrError, Forbidden, Unauthenticated
from controller.ports import Clock
from controller.runtime.api_door import agent_name, error_response, host_name

if TYPE_CHECKING:
    from controller.adapters.access import AccessFile

CALLER, CERTIFICATE = "dr.caller", "dr.certificate"
"""Keys of the ASGI scope. Only the server and this module write them; nothing that a client sends does."""
OPEN = frozenset({"/livez", "/readyz", "/active", "/openapi.json"})
PEERS = "/v1/peers/"


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a client showed, verified by the TLS layer. ``names``: its alternative names; ``fingerprint``: SHA-256, in hex."""

    names: frozenset[str]
    ends_at: float
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Entrance:
    """What decides who a caller is. ``access`` None: nobody is asked. ``peer_names``: of controllers' certificates beside
    ``drctl://GROUP/REGION/INSTANCE``; ``peers_by_certificate``: their routes take nothing else."""

    group: str
    regions: Collection[str]
    clock: Clock
    access: AccessFile | None = None
    peer_names: frozenset[str] = frozenset()
    peers_by_certificate: bool = False
    open_metrics: bool = False

    def is_open(self, path: str) -> bool:
        """Whether the path answers everybody."""
        return path in OPEN or (self.open_metrics and path == "/metrics")

    def caller(self, headers: Sequence[tuple[bytes, bytes]], certificate: Certificate | None, path: str) -> Caller:
        """Who calls. What is in an Authorization header alone counts, also beside a certificate: one answer for one request.
        Raises Unauthenticated, Unavailable."""
        given = [value for name, value in headers if name == b"authorization"]
        if len(given) > 1:
            raise Unauthenticated("more than one Authorization header", hint="send one")
        now = self.clock.wall()
        if certificate is not None and now >= certificate.ends_at:
            raise Unauthenticated("the client certificate has expired", hint="renew it and connect again")
        # For each request: a connection that stood when it was revoked is no way in either.
        if certificate is not None and self._is_revoked(certificate):
            raise Unauthenticated("the client certificate was revoked", hint="`drctl token list` shows why; get a new one")
        if path.startswith(PEERS) and self.peers_by_certificate:
            peer = self.peer(certificate)
            if peer is None or given:
                raise Unauthenticated(
                    "this route is for controllers of the group, by their certificates",
                    hint=f"its names hold drctl://{self.group}/REGION/INSTANCE or one of api.peer_names",
                )
            return Caller(peer, CallerRole.PEER)
        if self.access is None:
            return ANYBODY
        if given:
            return self.access.list().by_header(given[0], now)
        if certificate is None:
            raise Unauthenticated("nobody said who calls", hint="send a token (drctl: --token-file), or show a certificate")
        known = self.access.list().by_certificate(certificate.names, now)
        if known is None:
            raise Unauthenticated(
                "no name in the client certificate is in the access file", hint="drctl token create NAME --certificate SAN"
            )
        return known

    def _is_revoked(self, certificate: Certificate) -> bool:
        return self.access is not None and self.access.is_revoked(certificate.fingerprint, certificate.names)

    def peer(self, certificate: Certificate | None) -> str | None:
        """Which controller of the group showed the certificate; None when it is none of them."""
        for name in sorted(certificate.names) if certificate is not None else ():
            scheme, _, rest = name.partition("://")
            parts = rest.split("/")
            ours = scheme == "drctl" and len(parts) == 3 and parts[0] == self.group and parts[1] in self.regions and parts[2]
            if ours or name in self.peer_names:
                return name
        return None


class Guard:
    """ASGI middleware, in front of all others: puts the caller into the scope, or answers 401 before anything is read."""

    def __init__(self, app: ASGIApp, *, entrance: Entrance) -> None:
        self._app = app
        self._entrance = entrance

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            raw: bytes = scope.get("raw_path") or scope["path"].encode()
            path = raw.split(b"?", 1)[0].decode("latin-1")
            if not self._entrance.is_open(path):
                try:
                    scope[CALLER] = self._entrance.caller(scope["headers"], scope.get(CERTIFICATE), path)
                except DrError as error:
                    await error_response(error)(scope, receive, send)
                    return
        await self._app(scope, receive, send)


def caller_of(scope: Scope) -> Caller:
    """Who calls. Behind ``Guard`` there is always one; without it nobody is asked."""
    found: Caller = scope.get(CALLER, ANYBODY)
    return found


def require(caller: Caller, permit: Permit) -> None:
    """Raises Forbidden."""
    if not caller.may(permit):
        raise Forbidden(
            f"{caller.name} is {'an' if caller.role in {'agent', 'operator'} else 'a'} {caller.role} here and may not "
            f"{permit.value}",
            hint="use another token, or ask an operator for one",
        )


def require_agent(caller: Caller, agent: str) -> None:
    """Raises Forbidden."""
    if not caller.may_touch(agent):
        raise Forbidden(
            f"agent {agent!a} is not one of {caller.name}'s", hint="`drctl token list` shows whose agents a token is for"
        )


def require_agents(caller: Caller, agents: Iterable[str]) -> None:
    """Raises Forbidden, naming the first that is not the caller's."""
    for agent in agents:
        require_agent(caller, agent)


def permit(wanted: Permit) -> Any:
    """A route's dependency: who may call it."""

    async def check(request: Request) -> None:
        require(caller_of(request.scope), wanted)

    return Depends(check)


async def _caller(request: Request) -> Caller:
    return caller_of(request.scope)


Calling = Annotated[Caller, Depends(_caller)]


async def _readable(request: Request, agent: Annotated[str, Depends(agent_name)]) -> str:
    caller = caller_of(request.scope)
    require(caller, Permit.READ)
    require_agent(caller, agent)
    return agent


ReadableAgent = Annotated[str, Depends(_readable)]
"""An agent in the path whose records the caller may read."""


async def _own_host(request: Request, host: Annotated[str, Depends(host_name)]) -> str:
    caller = caller_of(request.scope)
    require(caller, Permit.BEAT)
    if caller.role is not None and not caller.hosts.holds(host):
        raise Forbidden(f"host {host!a} is not one of {caller.name}'s", hint="name it in the entry: drctl token create --hosts")
    return host


OwnHost = Annotated[str, Depends(_own_host)]
"""A host in the path that the caller may report for."""


def refused_frames(caller: Caller, frames: Sequence[Frame]) -> frozenset[int]:
    """The numbers of the records that are not the caller's to write. Raises Forbidden when none is, naming the first."""
    require(caller, Permit.WRITE)
    if caller.role is not CallerRole.AGENT:
        return frozenset()
    strange = {agent for agent in {frame.record.agent for frame in frames} if not caller.agents.holds(agent)}
    if not strange:
        return frozenset()
    numbers = frozenset(number for number, frame in enumerate(frames) if frame.record.agent in strange)
    if len(numbers) == len(frames):
        require_agent(caller, frames[0].record.agent)
    return numbers


def merged_acks(caller: Caller, frames: Sequence[Frame], refused: frozenset[int], given: Sequence[Ack]) -> tuple[Ack, ...]:
    """An answer for each record of the batch: those of others' agents fail alone, as every record that a rule refuses does."""
    left = iter(given)
    answers = []
    for number, frame in enumerate(frames):
        if number not in refused:
            answers.append(next(left))
            continue
        try:
            require_agent(caller, frame.record.agent)
        except Forbidden as error:
            answers.append(Ack(frame.record.agent, frame.record.id, "failed", error=error.to_dict()))
    return tuple(answers)


def require_list(caller: Caller, prefix: str) -> None:
    """A page of agents: an agent's entry sees those below a beginning that is all its own. Raises Forbidden."""
    require(caller, Permit.READ)
    if caller.role is CallerRole.AGENT and not caller.agents.holds_all(prefix):
        raise Forbidden(
            f"not every agent whose name begins with {prefix!a} is one of {caller.name}'s",
            hint="ask with a prefix that lies within the entry's agents",
        )
