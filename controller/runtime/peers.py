"""The way from one instance to another of the same region, over HTTP: one hop, never handed on again.

A request that could not be sent took nothing (``Unavailable``); one whose answer is missing or not understood may have been
carried out (``OutcomeUnknown``). Nothing is retried here: whoever sent the records does that. With TLS the other end is
verified, shown this controller's certificate, and never spoken to in plain text, whatever address it gave.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError

from controller.adapters.outward import GuardedTransport
from controller.domain.failsafe import Witness
from controller.domain.model import Ack, Fence, Frame, IngestAnswer
from controller.domain.outward import INSIDE, LOOPBACK
from controller.errors import DrError, FenceLost, Forbidden, NotActive, OutcomeUnknown, Refused, Unauthenticated, Unavailable
from controller.stream.segment import encode_frames

T = TypeVar("T")

CONNECT_SECONDS = 1.0
PEER_CONNECTIONS = 100
OCTETS = {"Content-Type": "application/octet-stream"}
_INGEST = TypeAdapter(IngestAnswer)
_ACKS = TypeAdapter(tuple[Ack, ...])
_POSITIONS = TypeAdapter(dict[str, int])
_WITNESS = TypeAdapter(Witness)
_KINDS: dict[str, type[DrError]] = {
    kind.code: kind for kind in (Unavailable, OutcomeUnknown, FenceLost, Refused, Forbidden, Unauthenticated)
}


class HttpPeers:
    """``timeout_seconds``: how long an answer may take; longer than a record may wait for its copies. ``tls``: a client's;
    ``token``: says the token to show, where certificates are not used."""

    def __init__(
        self, timeout_seconds: float, *, tls: ssl.SSLContext | None = None, token: Callable[[], str] = lambda: ""
    ) -> None:
        self._secure = tls is not None
        self._token = token
        # Addresses come from etcd: whoever writes there must not be able to send us to a metadata service.
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(timeout_seconds, connect=CONNECT_SECONDS),
            transport=GuardedTransport((*INSIDE, *LOOPBACK), tls=tls, connections=PEER_CONNECTIONS),
            trust_env=False,
            follow_redirects=False,
        )

    async def ingest(self, address: str, frames: Sequence[Frame]) -> IngestAnswer:
        """See ``controller.ports.Peers``."""
        return await self._ask(address, "POST", "/v1/peers/records", _INGEST, encode_frames(frames))

    async def write(self, address: str, lead: Fence, frames: Sequence[Frame]) -> tuple[Ack, ...]:
        """See ``controller.ports.Peers``."""
        path = f"/v1/peers/{lead.region}/{lead.instance}/{lead.epoch}/records"
        return await self._ask(address, "POST", path, _ACKS, encode_frames(frames))

    async def positions(self, address: str) -> Mapping[str, int]:
        """See ``controller.ports.Peers``."""
        return await self._ask(address, "GET", "/v1/peers/positions", _POSITIONS)

    async def witness(self, address: str) -> Witness:
        """See ``controller.ports.Peers``."""
        return await self._ask(address, "GET", "/v1/peers/witness", _WITNESS)

    async def close(self) -> None:
        """Closes its connections."""
        await self._http.aclose()

    async def _ask(self, address: str, method: str, path: str, kind: TypeAdapter[T], content: bytes | None = None) -> T:
        if self._secure and not address.startswith("https://"):
            raise Unavailable(f"{address} is not https, and this controller speaks TLS only", hint="give it api.cert_file too")
        headers = dict(OCTETS) if content is not None else {}
        token = self._token()
        if token:
            headers["Authorization"] = f"Bearer {token}"
        try:
            response = await self._http.request(method, address.rstrip("/") + path, content=content, headers=headers)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.InvalidURL) as error:
            raise Unavailable(f"{address} cannot be reached: {error}", hint="its streams move when it is dead") from error
        except httpx.HTTPError as error:
            raise OutcomeUnknown(f"{address}: the answer was lost: {error!r}", hint="a retry is safe") from error
        if response.status_code != 200:
            raise _error(address, response)
        try:
            return kind.validate_json(response.content)
        except ValidationError as error:
            raise OutcomeUnknown(f"{address}: the answer is not readable", hint="compare versions; a retry is safe") from error


def _error(address: str, response: httpx.Response) -> DrError:
    try:
        document = response.json()["error"]
        code, message, hint = document["code"], str(document["message"]), str(document.get("hint", ""))
        active = document.get("active")
    except (ValueError, KeyError, TypeError):
        return OutcomeUnknown(f"{address} answered {response.status_code}", hint="look at its log; a retry is safe")
    if code == NotActive.code:
        return NotActive(message, hint=hint, active=active if isinstance(active, str) else None)
    return _KINDS.get(code, Refused if response.status_code < 500 else OutcomeUnknown)(message, hint=hint)
