"""Whether the TLS files that the settings name can be used: readable, unexpired, key and certificate of one pair."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from controller.settings.values import Problem, shown


def problems(ca_file: Path | None, cert_file: Path | None, key_file: Path | None, now: datetime) -> Iterable[Problem]:
    """Reads the files that are named and says what is wrong with them. ``now`` (aware): when they must be valid."""
    ca = _read(ca_file, "etcd.ca_file")
    cert = _read(cert_file, "etcd.cert_file")
    key = _read(key_file, "etcd.key_file")
    for loaded in (ca, cert, key):
        if isinstance(loaded, Problem):
            yield loaded
    if isinstance(ca, bytes):
        # A bundle may carry an old authority beside its successor: one that is valid is enough.
        yield from _certificate_problems("etcd.ca_file", ca_file, ca, now, first_only=False)
    if isinstance(cert, bytes):
        yield from _certificate_problems("etcd.cert_file", cert_file, cert, now, first_only=True)
    if isinstance(key, bytes):
        yield from _key_problems(key_file, key, cert if isinstance(cert, bytes) else None)


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


def _key_problems(path: Path | None, pem: bytes, cert: bytes | None) -> Iterable[Problem]:
    field = "etcd.key_file"
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
        yield Problem((field, "etcd.cert_file"), shown(path), "does not belong to the certificate in etcd.cert_file", "")
