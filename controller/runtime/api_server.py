"""The HTTP server around the application: TLS, and what a client's certificate says, handed to the API with each request.

A renewed certificate is shown to new connections without a restart. An authority that is taken out of a CA file is believed
until the restart (OpenSSL adds authorities to a running context and takes none away); one that is added counts at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import uvicorn

from controller.errors import Misconfigured
from controller.runtime.api_access import CERTIFICATE, Certificate
from controller.runtime.http_head import BoundedHttp

API_STOP_SECONDS = 2


@dataclass(frozen=True, slots=True)
class TlsPaths:
    """PEM files of one end of connections: what it shows, and whom it believes."""

    cert_file: Path | None
    key_file: Path | None
    ca_file: Path | None


class TlsContext:
    """An ``ssl.SSLContext`` whose files may be replaced while it is used."""

    def __init__(self, paths: TlsPaths, *, server: bool) -> None:
        """``server``: clients' certificates are asked for where there is an authority for them, and a bad one is refused; none
        is fine, as tokens say who calls too. Raises Misconfigured."""
        self._paths = paths
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        if server and paths.ca_file is not None:
            self.context.verify_mode = ssl.CERT_OPTIONAL
        self._seen: tuple[Any, ...] = ()
        problem = self.look()
        if problem:
            raise Misconfigured(f"TLS: {problem}", hint="check the files of [api]")

    def look(self) -> str:
        """Reads the files again when they changed. Returns what is wrong with them (the old ones stay), "" when all is well."""
        paths = self._paths
        try:
            seen = tuple(_stamp(path) for path in (paths.cert_file, paths.key_file, paths.ca_file))
            if seen == self._seen:
                return ""
            if paths.cert_file is not None:
                # Into a context of its own first: a pair that does not fit must not half-replace the one in use.
                for context in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self.context):
                    context.load_cert_chain(paths.cert_file, paths.key_file, password=lambda: "")
            if paths.ca_file is not None:
                self.context.load_verify_locations(paths.ca_file)
            elif self.context.verify_mode is not ssl.CERT_NONE:
                self.context.load_default_certs()
        except (OSError, ValueError) as error:  # of which SSLError is one
            return f"{paths.cert_file}, {paths.key_file}, {paths.ca_file}: {error}"
        self._seen = seen
        return ""


def _stamp(path: Path | None) -> tuple[int, ...]:
    if path is None:
        return ()
    about = path.stat()
    return about.st_mtime_ns, about.st_size, about.st_ino


def shown_certificate(transport: asyncio.BaseTransport) -> Certificate | None:
    """The client's, verified in the handshake; None when it showed none or the connection is plain."""
    secured = transport.get_extra_info("ssl_object")
    found = secured.getpeercert() if secured is not None else None
    if not found:
        return None
    names = frozenset(str(value) for kind, value in found.get("subjectAltName", ()) if kind in {"DNS", "URI", "email"})
    fingerprint = hashlib.sha256(secured.getpeercert(binary_form=True)).hexdigest()
    return Certificate(names, float(ssl.cert_time_to_seconds(found["notAfter"])), fingerprint)


class ApiProtocol(BoundedHttp):
    """Hands on what a connection's client showed."""

    _certificate: Certificate | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._certificate = shown_certificate(transport)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        cast("dict[str, Any]", self.scope)[CERTIFICATE] = self._certificate


def server_config(app: Any, tls: TlsContext | None, **options: Any) -> uvicorn.Config:
    """How every API of ours is served. ``options``: where to listen, and what else ``uvicorn.Config`` takes."""
    config = uvicorn.Config(
        app,
        log_config=None,  # uvicorn's own format would let a request's path write lines of its own
        access_log=False,
        loop="none",
        http=ApiProtocol,
        ws="none",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=API_STOP_SECONDS,
        **options,
    )
    config.load()
    if tls is not None:
        config.ssl = tls.context
    return config
