"""One etcd endpoint: its connection, its sign-in, and what an error of it proves.

The ``etcd3`` package gives the channel and the stubs. Its calls are not used: they hide the response header (revision, term).
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
from google.protobuf.unknown_fields import UnknownFieldSet

from controller.adapters import etcdrpc
from controller.errors import Corrupt, DrError, Misconfigured, NotFound, Refused, Unavailable

etcdrpc.install()
import etcd3  # noqa: E402  (its own stubs do not import; ours have to be in place first)

REQUIRE_LEADER = ("hasleader", "true")
"""Makes a member that sees no leader refuse at once, before it does anything (etcd's ``WithRequireLeader``)."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # More often than every 5 s, or without a call under way, earns a GOAWAY from etcd.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # Also TCP_USER_TIMEOUT: a connection whose bytes nobody confirms is given up after this.
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    # Retries are decided here; a proxy taken from the environment would carry authority through somebody else's machine.
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)

LOOK_SECONDS = 5.0
"""Time between two looks at the TLS files. gRPC reads them once for a connection, so a renewed pair means a new one."""

STATUS_ERRORS_FIELD = 8
"""``StatusResponse.errors`` came with etcd 3.4; etcd3's protocol files are older, so it arrives as an unknown field."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """How to connect. ``ca_file`` is needed for https; ``cert_file`` and ``key_file`` go together; so do user and password."""

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)

    def stamp(self) -> tuple[tuple[int, int, int], ...] | None:
        """Tells whether the files are still the ones that were read; None when one of them cannot be found."""
        try:
            found = [Path(name).stat() for name in (self.ca_file, self.cert_file, self.key_file) if name is not None]
        except OSError:
            return None
        return tuple((one.st_mtime_ns, one.st_size, one.st_ino) for one in found)

    def fit(self) -> bool:
        """Whether certificate and key are a pair and the authority can be read: not so while they are being replaced."""
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
            if self.cert_file is not None:
                # A key with a password would be asked for on the terminal.
                context.load_cert_chain(self.cert_file, self.key_file, password=lambda: "")
        except (OSError, ValueError):  # of which SSLError is one
            return False
        return True


class Verdict(Enum):
    """What a failed call says about its effect."""

    NOT_APPLIED = "it changed nothing; another attempt may help"
    UNKNOWN = "it may have been applied"
    FINAL = "the server answered: it changed nothing, and repeating it gives the same answer"


NOT_APPLIED_DETAILS = (
    # gRPC: no connection, so nothing was sent.
    "failed to connect to all addresses",
    "DNS resolution failed",
    # etcd: raised before the request is proposed (server/etcdserver/api/v3rpc/interceptor.go, v3_server.go) …
    "etcdserver: no leader",
    "etcdserver: too many requests",
    "etcdserver: rpc not supported for learner",
    "etcdserver: invalid auth token",
    # … or instead of applying it (apply_auth.go).
    "auth: revision in header is old",
)
SIGN_IN_AGAIN_DETAILS = ("etcdserver: invalid auth token", "auth: revision in header is old")

FINAL_ERRORS: tuple[tuple[grpc.StatusCode, str, type[DrError], str], ...] = (
    (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "database space exceeded",
        Unavailable,
        "compact and defragment etcd or raise its quota, then `etcdctl alarm disarm`",
    ),
    (grpc.StatusCode.DATA_LOSS, "corrupt cluster", Corrupt, "restore the damaged member, then `etcdctl alarm disarm`"),
    (grpc.StatusCode.NOT_FOUND, "lease not found", NotFound, "grant a new lease"),
    (grpc.StatusCode.OUT_OF_RANGE, "compacted", Unavailable, "read again"),
    (grpc.StatusCode.INVALID_ARGUMENT, "authentication failed", Misconfigured, "check etcd.username and etcd.password"),
    (grpc.StatusCode.INVALID_ARGUMENT, "user name is empty", Misconfigured, "set etcd.username and etcd.password"),
    (
        grpc.StatusCode.FAILED_PRECONDITION,
        "authentication is not enabled",
        Misconfigured,
        "etcd has no users: remove etcd.username, or `etcdctl auth enable`",
    ),
    (grpc.StatusCode.PERMISSION_DENIED, "", Misconfigured, "grant the etcd user read and write below the configured prefix"),
    (grpc.StatusCode.UNIMPLEMENTED, "", Misconfigured, "check that etcd.endpoints are client URLs of etcd 3 servers"),
    (grpc.StatusCode.INVALID_ARGUMENT, "", Refused, "correct the request"),
)


def judge(error: grpc.RpcError) -> Verdict:
    """What ``error`` proves. Anything that is not known to prove something is UNKNOWN."""
    details = details_of(error)
    if any(text in details for text in NOT_APPLIED_DETAILS):
        return Verdict.NOT_APPLIED
    if final_error(error, "") is not None:
        return Verdict.FINAL
    return Verdict.UNKNOWN


def final_error(error: grpc.RpcError, what: str) -> DrError | None:
    """The error to raise when the server's answer is final, else None."""
    code, details = error.code(), details_of(error)
    for known_code, text, kind, hint in FINAL_ERRORS:
        if code is known_code and text in details:
            return kind(f"{what}: {details}", hint=hint)
    return None


def details_of(error: grpc.RpcError) -> str:
    """The error's text; empty when it has none."""
    return str(error.details() or "")


class Endpoint:
    """One member's client URL. Used by several threads; ``check_cluster`` is called with every cluster id that it names."""

    def __init__(self, url: str, credentials: Credentials, check_cluster: Callable[[int, str], None]) -> None:
        self.url = url
        self._host, self._port, self._secure = parse_endpoint(url)
        self._credentials = credentials
        self._check_cluster = check_cluster
        self._lock = threading.Lock()
        self._client: Any = None
        self._retired: Any = None
        """The client before the last renewal of the files: calls under way end on it."""
        self._stamp: tuple[tuple[int, int, int], ...] | None = None
        self._looked_at = 0.0
        self._token: str | None = None
        self._verified = False

    def ready(self, deadline: float) -> Any:
        """The ``etcd3`` client, connected, signed in, and of the right cluster. ``deadline`` is a ``time.monotonic()``.

        After an error the endpoint is asked for its status first. So a request that changes something is sent only over a
        connection that has just worked, and a member that cannot be reached is known not to have received it.
        Raises grpc.RpcError, Misconfigured.
        """
        client = self._open(_left(deadline))
        if not self._verified:
            status = self.status(_left(deadline))
            if status is not None:
                self._check_cluster(status.header.cluster_id, self.url)
            self._verified = True
        return client

    def status(self, timeout_seconds: float) -> Any:
        """The member's own ``StatusResponse``, answered without the other members. None when we may not ask.
        Raises grpc.RpcError, Misconfigured."""
        client = self._open(timeout_seconds)
        try:
            return client.maintenancestub.Status(etcdrpc.StatusRequest(), timeout_seconds, metadata=self.metadata(leader=False))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.PERMISSION_DENIED:
                return None
            self.failed(error)
            raise

    def metadata(self, *, leader: bool = True) -> tuple[tuple[str, str], ...]:
        """Headers of every call: demand a leader, and the sign-in token."""
        token = self._token
        return ((REQUIRE_LEADER,) if leader else ()) + ((("token", token),) if token else ())

    def failed(self, error: grpc.RpcError) -> None:
        """Notes that a call failed: the next one verifies the connection first, and signs in again if that was the reason."""
        self._verified = False
        if any(text in details_of(error) for text in SIGN_IN_AGAIN_DETAILS):
            self._token = None

    def close(self) -> None:
        """Ends calls under way and the connection."""
        with self._lock:
            clients = (self._client, self._retired)
            self._client = self._retired = None
        for client in clients:
            if client is not None:
                client.close()

    def _open(self, timeout_seconds: float) -> Any:
        with self._lock:
            if self._client is None:
                self._stamp = self._credentials.stamp() if self._secure else None
                self._client = self._connect()
            elif self._secure:
                self._renew()
            if self._credentials.username is not None and self._token is None:
                request = etcdrpc.AuthenticateRequest(name=self._credentials.username, password=self._credentials.password)
                sign_in: Any = etcdrpc.AuthStub(self._client.channel)  # type: ignore[no-untyped-call]  # generated
                self._token = sign_in.Authenticate(request, timeout_seconds).token
            return self._client

    def _renew(self) -> None:
        """Connects anew when the files were replaced by others that fit together; until then the old connection stays."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        stamp = self._credentials.stamp()
        if stamp is None or stamp == self._stamp or not self._credentials.fit():
            return
        renewed = self._connect()
        if self._retired is not None:
            self._retired.close()
        self._client, self._retired, self._stamp = renewed, self._client, stamp
        self._verified = False

    def _connect(self) -> Any:
        files = self._credentials if self._secure else Credentials()
        try:
            return etcd3.client(
                host=self._host,
                port=self._port,
                ca_cert=files.ca_file,
                cert_cert=files.cert_file,
                cert_key=files.key_file,
                grpc_options=CHANNEL_OPTIONS,
            )
        except OSError as error:
            message = f"etcd TLS file {error.filename}: {error.strerror}"
            raise Misconfigured(message, hint="check etcd.ca_file, cert_file, key_file") from error


def _left(deadline: float) -> float:
    """Seconds until ``deadline``, at least one millisecond: gRPC takes 0 for "already over" and negative values for a bug."""
    return max(0.001, deadline - time.monotonic())


def parse_endpoint(url: str) -> tuple[str, int, bool]:
    """Host, port and whether TLS is used. Raises Misconfigured."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme not in {"http", "https"} or not host or not port or parts.path.strip("/") or parts.query or parts.username:
        raise Misconfigured(f"etcd endpoint {url!r}: not http(s)://host:port", hint="for example https://etcd-1.example:2379")
    return f"[{host}]" if ":" in host else host, port, parts.scheme == "https"


def alarms_of(status: Any) -> set[str]:
    """Alarms and complaints that a member reports about itself in a ``StatusResponse``."""
    unknown = UnknownFieldSet(status)
    fields = (unknown[index] for index in range(len(unknown)))
    texts = (field.data for field in fields if field.field_number == STATUS_ERRORS_FIELD)
    words = [word for text in texts if isinstance(text, bytes) for word in text.decode(errors="replace").split()]
    return {word.removeprefix("alarm:") for word in words if word.startswith("alarm:")}
