"""Speaks to controllers: tries them in order until one answers, and never sends a change twice when its answer was lost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import httpx
from pydantic import TypeAdapter, ValidationError

from controller.agent.credentials import Bearer, Credentials
from controller.errors import (
    ApprovalRequired,
    Conflict,
    Corrupt,
    DrError,
    FenceLost,
    Forbidden,
    Misconfigured,
    NotActive,
    NotFound,
    OutcomeUnknown,
    Refused,
    Unauthenticated,
    Unavailable,
)

T = TypeVar("T")

MAX_ANSWER_BYTES = 64 * 1024 * 1024
CONNECT_SECONDS = 1.5
BUSY_SECONDS = 5.0
"""How long a controller that was too slow for ``CONNECT_SECONDS`` may take when nobody else answers: after a disaster those
that are left are busy."""
READ_SECONDS = 10.0
CHANGE_SECONDS = 30.0
"""Making a plan asks every store, and waits for those that do not answer."""

_CLASSES: dict[str, type[DrError]] = {
    kind.code: kind
    for kind in (
        Unavailable,
        OutcomeUnknown,
        NotActive,
        Refused,
        NotFound,
        Conflict,
        ApprovalRequired,
        Misconfigured,
        Corrupt,
        Forbidden,
        Unauthenticated,
    )
} | {FenceLost.code: FenceLost}


NAMED_MAX = 4
"""Addresses that are asked because a controller named them, in one command's request."""

Params = Mapping[str, str | int | float | Sequence[str]]


class Usage(DrError):
    """The command line is wrong."""

    code = "usage"
    exit_code = 2
    http_status = 422


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """A document as it was sent (``raw``, printed as JSON) and as a value, and who gave it."""

    raw: Any
    value: T
    endpoint: str


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def check_endpoint(text: str) -> str:
    """A controller's base URL. Raises Usage."""
    try:
        parts = urlsplit(text.strip())
    except ValueError as error:  # brackets that do not hold an IPv6 address
        raise Usage(f"endpoint {text!r} is not a URL: {error}", hint="write it like http://127.0.1.1:8080") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise Usage(f"endpoint {text!r} is not a URL of a controller", hint="write it like http://127.0.1.1:8080")
    try:
        _ = parts.port
    except ValueError as error:
        raise Usage(f"endpoint {text!r} has no valid port", hint="write it like http://127.0.1.1:8080") from error
    return text.strip().rstrip("/")


def error_from(status: int, body: bytes, endpoint: str) -> DrError:
    """The error that an answer carries, as the class that has its exit code."""
    try:
        found = dict(json.loads(body)["error"])
        code, message, hint = str(found["code"]), str(found["message"]), str(found.get("hint") or "")
        exit_code = found.get("exit_code")
    except (ValueError, TypeError, KeyError, RecursionError):
        return Unavailable(
            f"{endpoint} answered HTTP {status}, and not as a controller does",
            hint="check that the endpoint is a controller and not a proxy or something else",
        )
    error = _CLASSES.get(code, DrError)(message, hint=hint or "look at the controller's log")
    error.code = code
    if isinstance(error, NotActive) and isinstance(found.get("active"), str):
        error.active = found["active"]
    if isinstance(exit_code, int) and 1 <= exit_code <= 125:
        error.exit_code = exit_code
    return error


class Client:
    """One command's connection to whichever controller answers. ``transport``: for tests."""

    def __init__(
        self,
        endpoints: Sequence[str],
        transport: httpx.BaseTransport | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        self._endpoints = list(dict.fromkeys(check_endpoint(endpoint) for endpoint in endpoints))
        if not self._endpoints:
            raise Usage("no controller is named", hint="give --endpoint URL, --config FILE, or set DRCTL_ENDPOINTS")
        credentials = credentials or Credentials()
        credentials.check(self._endpoints)
        self._bearer = Bearer(credentials)
        secure = any(endpoint.startswith("https:") for endpoint in self._endpoints)
        # No proxies from the environment and no redirects: in a disaster the fewer parts the better.
        self._http = httpx.Client(
            trust_env=False, follow_redirects=False, transport=transport, verify=credentials.tls() if secure else True
        )
        self._good: str | None = None

    def close(self) -> None:
        self._http.close()

    def get(self, kind: Any, path: str, params: Params | None = None) -> Answer[Any]:
        """Reads a document. Raises Unavailable when nobody answers, Corrupt when it is not understood, what the server said."""
        return self._decode(kind, *self._ask("GET", path, params=params, seconds=READ_SECONDS))

    def body(self, path: str) -> bytes:
        """Bytes as they are. Raises as ``get``."""
        return self._ask("GET", path, seconds=READ_SECONDS)[0]

    def post(self, kind: Any, path: str, body: Mapping[str, object]) -> Answer[Any]:
        """Sends a change, to one controller. Raises OutcomeUnknown when its answer was lost, else as ``get``."""
        return self._decode(kind, *self._ask("POST", path, body=body, seconds=CHANGE_SECONDS))

    def _decode(self, kind: Any, content: bytes, endpoint: str) -> Answer[Any]:
        try:
            raw = json.loads(content)
            return Answer(raw, _adapter(kind).validate_python(raw), endpoint)
        except (ValidationError, ValueError, RecursionError) as error:
            raise Corrupt(
                f"the answer of {endpoint} is not understood by this drctl",
                hint="compare `drctl version` with the controllers' (drctl members)",
            ) from error

    def _ask(
        self,
        method: str,
        path: str,
        *,
        seconds: float,
        params: Params | None = None,
        body: Mapping[str, object] | None = None,
    ) -> tuple[bytes, str]:
        tried: list[str] = []
        asked: set[str] = set()
        said: DrError | None = None
        order = self._order()
        for endpoint in self._reachable(order, asked, tried):
            try:
                status, content = self._once(method, endpoint + path, seconds, params, body)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                tried.append(f"{endpoint} ({_why(error)})")
                continue
            except httpx.HTTPError as error:
                self._good = None
                if method != "GET":
                    raise OutcomeUnknown(
                        f"{endpoint} was asked and its answer was lost ({_why(error)}): it may or may not have been done",
                        hint="look before you repeat it: drctl plan list",
                    ) from error
                tried.append(f"{endpoint} ({_why(error)})")
                continue
            if 200 <= status < 300:
                self._good = endpoint
                return content, endpoint
            said = error_from(status, content, endpoint)
            if not isinstance(said, Unavailable) or isinstance(said, OutcomeUnknown):
                raise said
            tried.append(f"{endpoint} (answered: {said.message})")
            named = _named(said, endpoint)
            # The streams of a group may be held by different instances. Nobody leads us around without end.
            if named is not None and named not in asked and len(asked) < len(self._endpoints) + NAMED_MAX:
                order[:] = [named, *(one for one in order if one != named)]
        if said is not None:
            raise said
        raise Unavailable(
            f"no controller answered; tried {', '.join(tried)}",
            hint="check that `drctl serve` runs there, or name others: --endpoint URL, --config FILE or DRCTL_ENDPOINTS",
        )

    def _order(self) -> list[str]:
        """Whoever answered last comes first."""
        return sorted(self._endpoints, key=lambda endpoint: endpoint != self._good)

    def _reachable(self, order: list[str], asked: set[str], tried: list[str]) -> Iterator[str]:
        """Whom to ask next, until nobody is left in ``order``; why not the others goes to ``tried``.

        A frozen process accepts connections and never answers, so each is probed first, but for the only one and the one that
        answered last. A busy one looks frozen to an impatient probe: whoever did not answer in time is probed again at the end.
        """
        slow: list[str] = []
        while order or slow:
            first = bool(order)
            endpoint = (order or slow).pop(0)
            asked.add(endpoint)
            at_once = len(self._endpoints) == 1 or endpoint == self._good
            error = None if at_once else self._probe(endpoint, CONNECT_SECONDS if first else BUSY_SECONDS)
            if error is None:
                yield endpoint
            elif isinstance(error, httpx.TimeoutException) and first:
                slow.append(endpoint)
            else:
                tried.append(f"{endpoint} ({_why(error)})")

    def _probe(self, endpoint: str, seconds: float) -> httpx.HTTPError | None:
        """What a controller's sign of life failed with; None when it came."""
        try:
            self._once("GET", endpoint + "/livez", seconds)
        except httpx.HTTPError as error:
            return error
        return None

    def _once(
        self,
        method: str,
        url: str,
        seconds: float,
        params: Params | None = None,
        body: Mapping[str, object] | None = None,
    ) -> tuple[int, bytes]:
        timeout = httpx.Timeout(seconds, connect=CONNECT_SECONDS)
        headers = self._bearer.headers()
        with self._http.stream(method, url, params=params, json=body, timeout=timeout, headers=headers) as answer:
            parts, total = [], 0
            for part in answer.iter_bytes():
                total += len(part)
                if total > MAX_ANSWER_BYTES:
                    raise httpx.ReadError("the answer is too large")
                parts.append(part)
            return answer.status_code, b"".join(parts)


def _named(said: DrError, endpoint: str) -> str | None:
    """The active controller that a standby names, if it is one to ask: never by a less safe way than the one that was asked."""
    if not isinstance(said, NotActive) or said.active is None:
        return None
    try:
        named = check_endpoint(said.active)
    except Usage:
        return None
    return named if urlsplit(named).scheme == urlsplit(endpoint).scheme else None


def _why(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    if isinstance(error, httpx.ConnectError):
        told = str(error)
        return f"cannot connect: {told}" if "certificate" in told.lower() or "ssl" in told.lower() else "cannot connect"
    return "connection broke" if isinstance(error, httpx.TransportError) else type(error).__name__
