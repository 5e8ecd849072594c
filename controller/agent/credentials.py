"""What a client shows to controllers, and how it knows that they are controllers: a token, an authority, a certificate.

Nothing of it is needed for a lab. Values that are not given come from the environment: ``DR_TOKEN_FILE``, ``DR_CA_FILE``,
``DR_CERT_FILE``, ``DR_KEY_FILE``. A token is sent over TLS, or within this machine, and nowhere else. It is in no ``repr``,
error or log.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from controller.errors import Misconfigured

LOOK_SECONDS = 1.0
"""Time between two looks at a token file: a renewed token is used without a restart."""
TOKEN_MAX_CHARS = 256


class Secret:
    """A text that shows itself only when asked to."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text."""
        return self._text

    def __bool__(self) -> bool:
        return bool(self._text)

    def __repr__(self) -> str:
        return "Secret('…')" if self._text else "Secret('')"

    __str__ = __repr__

    def __reduce__(self) -> str:
        raise TypeError("a secret is not written anywhere")


@dataclass(frozen=True)
class Credentials:
    """``token`` or ``token_file`` (read again when it changes); ``ca_file``: who signed the controllers' certificates (default:
    the system's authorities); ``cert_file`` and ``key_file``: a client certificate."""

    token: Secret = field(default_factory=lambda: Secret(""))
    token_file: Path | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    @classmethod
    def of(
        cls,
        *,
        token: str | Secret | None = None,
        token_file: str | Path | None = None,
        ca_file: str | Path | None = None,
        cert_file: str | Path | None = None,
        key_file: str | Path | None = None,
    ) -> Credentials:
        """As given, else from the environment. Raises Misconfigured for what cannot belong together."""
        if token is not None and token_file is not None:
            raise Misconfigured("a token and a token file were given", hint="give one of them")
        known = token if isinstance(token, Secret) else Secret(_checked(token, "the token") if token else "")
        named = None if token is not None else _path(token_file, "DR_TOKEN_FILE")
        pair = _path(cert_file, "DR_CERT_FILE"), _path(key_file, "DR_KEY_FILE")
        if (pair[0] is None) != (pair[1] is None):
            raise Misconfigured(
                "a client certificate needs its key and the other way round", hint="give cert_file and key_file"
            )
        return cls(known, named, _path(ca_file, "DR_CA_FILE"), *pair)

    @property
    def shown(self) -> bool:
        """Whether there is a token to send."""
        return bool(self.token) or self.token_file is not None

    def check(self, urls: Iterable[str]) -> None:
        """Raises Misconfigured when a token would travel in the clear."""
        for url in urls:
            if not self.may_be_sent_to(url):
                raise Misconfigured(
                    f"a token would be sent in plain text to {url}",
                    hint="write https://…; plain http is for addresses of this machine (127.0.0.0/8)",
                )

    def may_be_sent_to(self, url: str) -> bool:
        """Over TLS, or within this machine; anywhere when there is no token."""
        parts = urlsplit(url)
        return not self.shown or parts.scheme == "https" or _is_loopback(parts.hostname)

    def tls(self) -> ssl.SSLContext:
        """Verifies controllers by name and authority, and shows the client certificate. Raises Misconfigured."""
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if self.cert_file is not None:
                context.load_cert_chain(self.cert_file, self.key_file, password=lambda: "")
        except (OSError, ValueError) as error:  # of which SSLError is one
            files = ", ".join(str(path) for path in (self.ca_file, self.cert_file, self.key_file) if path is not None)
            raise Misconfigured(f"TLS files {files}: {error}", hint="PEM files; the key belongs to the certificate") from error
        return context


class Bearer:
    """Makes the header. Safe in several threads."""

    def __init__(self, credentials: Credentials) -> None:
        """Reads the token file. Raises Misconfigured."""
        self._path = credentials.token_file
        self._header = _header(credentials.token.reveal()) if credentials.token else {}
        self._stamp: tuple[int, ...] = ()
        self._looked_at = 0.0
        self._lock = threading.Lock()
        if self._path is not None:
            self._read(self._path)

    def headers(self) -> dict[str, str]:
        """Of one request. A file that cannot be read any more leaves the last token in use: controllers say when it is over."""
        if self._path is not None and time.monotonic() - self._looked_at >= LOOK_SECONDS:
            with self._lock:
                try:
                    self._read(self._path)
                except Misconfigured:
                    self._looked_at = time.monotonic()
        return self._header

    def _read(self, path: Path) -> None:
        self._looked_at = time.monotonic()
        try:
            about = path.stat()
            stamp = about.st_mtime_ns, about.st_size, about.st_ino
            if stamp == self._stamp:
                return
            text = path.read_text("ascii") if about.st_size <= 4096 else ""
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not ASCII"
            raise Misconfigured(f"token file {str(path)!r}: {why}", hint="it holds one token: drctl token create") from None
        self._header = _header(_checked(text.strip(), f"token file {str(path)!r}"))
        self._stamp = stamp


def _header(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def _checked(text: str, what: str) -> str:
    """Raises Misconfigured, which never shows the text: a token goes into a header and must be one plain word."""
    if not text or len(text) > TOKEN_MAX_CHARS or not text.isascii() or not text.isprintable() or " " in text:
        raise Misconfigured(f"{what} is not one plain word", hint="it looks like dr1.GROUP.…: drctl token create")
    return text


def _path(given: str | Path | None, variable: str) -> Path | None:
    text = given if given is not None else os.environ.get(variable) or None
    return None if text is None else Path(text)


def _is_loopback(host: str | None) -> bool:
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return host == "localhost"
