"""Whether the TLS files that the settings name can be used: readable, unexpired, key and certificate of one pair.

Also when they end, so that people hear of it before connections break, and which names a certificate carries.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from controller.settings.values import Problem, shown


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The PEM files of one section; ``fields`` are their settings. Files that are not named are None."""

    section: str
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    client_ca_file: Path | None = None

    def authorities(self) -> tuple[tuple[str, Path | None], ...]:
        """The files that say whom to believe, with their settings."""
        return (f"{self.section}.ca_file", self.ca_file), (f"{self.section}.client_ca_file", self.client_ca_file)


def problems(files: TlsFiles, now: datetime) -> Iterable[Problem]:
    """Reads the files that are named and says what is wrong with them. ``now`` (aware): when they must be valid."""
    for field, path in files.authorities():
        pem = _read(path, field)
        if isinstance(pem, Problem):
            yield pem
        elif pem is not None:
            # A bundle may carry an old authority beside its successor: one that is valid is enough.
            yield from _certificate_problems(field, path, pem, now, first_only=False)
    cert_field, key_field = f"{files.section}.cert_file", f"{files.section}.key_file"
    cert, key = _read(files.cert_file, cert_field), _read(files.key_file, key_field)
    if isinstance(cert, bytes):
        yield from _certificate_problems(cert_field, files.cert_file, cert, now, first_only=True)
    if isinstance(key, bytes):
        yield from _key_problems(files, key, cert if isinstance(cert, bytes) else None)
    yield from (loaded for loaded in (cert, key) if isinstance(loaded, Problem))


def endings(files: TlsFiles, before: datetime) -> Iterable[str]:
    """One sentence for each named file whose last certificate ends before ``before`` (aware). What cannot be read is left out:
    ``problems`` tells that."""
    named = (*files.authorities(), (f"{files.section}.cert_file", files.cert_file))
    for field, path in named:
        pem = _read(path, field)
        if not isinstance(pem, bytes):
            continue
        try:
            found = x509.load_pem_x509_certificates(pem)
        except ValueError:
            continue
        ends = found[0].not_valid_after_utc if path == files.cert_file else max(one.not_valid_after_utc for one in found)
        if ends < before:
            yield f"{field}: {shown(path)} ends at {ends:%Y-%m-%d %H:%M} UTC: renew it"


def names_in(path: Path) -> frozenset[str] | None:
    """The alternative names of the first certificate in a file: DNS names in lower case, URIs, and addresses as text. None when
    it cannot be read."""
    try:
        first = x509.load_pem_x509_certificates(path.read_bytes())[0]
        san = first.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return frozenset()
    except (OSError, ValueError):
        return None
    return frozenset(
        [
            *(name.lower() for name in san.get_values_for_type(x509.DNSName)),
            *san.get_values_for_type(x509.UniformResourceIdentifier),
            *(str(address) for address in san.get_values_for_type(x509.IPAddress)),
        ]
    )


def covers(names: frozenset[str], host: str) -> bool:
    """Whether one of a certificate's names is this host's, as clients judge it: a wildcard stands for one whole label."""
    try:
        return str(ipaddress.ip_address(host)) in names
    except ValueError:
        host = host.lower()
    return host in names or f"*.{host.partition('.')[2]}" in names


def _read(path: Path | None, field: str) -> bytes | Problem | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as why:
        return Problem((field,), shown(path), f"cannot be read: {why.strerror}", "name a PEM file that this user may read")


def _certificate_problems(field: str, path: Path | None, pem: bytes, now: datetime, *, first_only: bool) -> Iterable[Problem]:
    try:
        certificates = x509.load_pem_x509_certificates(pem)
    except ValueError:
        yield Problem((field,), shown(path), "holds no PEM certificate", "it begins with -----BEGIN CERTIFICATE-----")
        return
    looked_at = certificates[:1] if first_only else certificates
    if all(found.not_valid_after_utc <= now for found in looked_at):
        last = max(found.not_valid_after_utc for found in looked_at)
        yield Problem((field,), shown(path), f"expired at {last:%Y-%m-%d %H:%M} UTC", "renew the certificate")
    elif all(found.not_valid_before_utc > now for found in looked_at):
        first = min(found.not_valid_before_utc for found in looked_at)
        yield Problem((field,), shown(path), f"is not valid before {first:%Y-%m-%d %H:%M} UTC", "check this machine's clock")


def _key_problems(files: TlsFiles, pem: bytes, cert: bytes | None) -> Iterable[Problem]:
    field, path = f"{files.section}.key_file", files.key_file
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError:
        yield Problem((field,), shown(path), "is encrypted with a password", "a daemon has nobody to ask: store it decrypted")
        return
    except (ValueError, UnsupportedAlgorithm):
        yield Problem((field,), shown(path), "holds no PEM private key", "it begins with -----BEGIN … PRIVATE KEY-----")
        return
    try:
        certificate = x509.load_pem_x509_certificates(cert)[0] if cert is not None else None
    except ValueError:
        return  # told about the certificate already
    if certificate is not None and certificate.public_key() != key.public_key():
        other = f"{files.section}.cert_file"
        yield Problem((field, other), shown(path), f"does not belong to the certificate in {other}", "")
