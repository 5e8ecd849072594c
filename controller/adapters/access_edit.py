"""Changes of the access file: read, changed and written as one step, one at a time, whoever else is at it.

``drctl token`` holds a lock for that, on the folder, so that no file is left behind and nobody removes one that somebody waits
for. Who edits the file by other means takes no lock: a file that is not any more what was read is left as it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509 import load_pem_x509_certificate
from pydantic import ValidationError

from controller.adapters.access import AccessDocument, Revoked, read_document, write_document
from controller.errors import Misconfigured, Refused

LOCK_SECONDS = 60.0
"""How long a change waits for another one. One takes milliseconds."""
LOCK_PAUSE_SECONDS = 0.02
MAX_CERTIFICATE_BYTES = 256 * 1024
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")

Change = Callable[[AccessDocument | None], AccessDocument]
"""What is to stand there, made of what stands there now; None: there is no file yet."""


def change_document(path: Path, change: Change, *, patience_seconds: float = LOCK_SECONDS) -> AccessDocument:
    """Writes what ``change`` makes of the file. Returns it. Raises Misconfigured, Refused; then nothing was changed."""
    with _locked(path.parent, patience_seconds):
        before = _stamp(path)
        changed = change(None if before is None else read_document(path))
        if _stamp(path) != before:
            raise Refused(f"{path} was changed by somebody else meanwhile; nothing was written", hint="repeat the command")
        write_document(path, changed)
    return changed


def with_revoked(document: AccessDocument, revoked: Revoked) -> AccessDocument:
    """One more. Raises Refused when it is there already."""
    try:
        return AccessDocument.model_validate(dict(document) | {"revoked": (*document.revoked, revoked)})
    except ValidationError:
        raise Refused(f"{told(revoked)} is revoked already", hint="see drctl token list") from None


def without_revoked(document: AccessDocument, fingerprint: str | None, name: str | None) -> AccessDocument:
    """All but one. Raises Refused when it is not there."""
    left = tuple(one for one in document.revoked if (one.fingerprint, one.certificate) != (fingerprint, name))
    if len(left) == len(document.revoked):
        raise Refused("this certificate is not revoked", hint="see drctl token list")
    return document.model_copy(update={"revoked": left})


def told(revoked: Revoked) -> str:
    """For people."""
    return f"the name {revoked.certificate}" if revoked.certificate is not None else f"certificate {revoked.fingerprint}"


def fingerprint_of(given: str) -> str:
    """The fingerprint that is meant: in hex, with colons or without, or of the certificate in a PEM file. Raises Refused."""
    plain = given.replace(":", "").lower()
    if _FINGERPRINT.fullmatch(plain):
        return plain
    try:
        with Path(given).open("rb") as file:
            found = load_pem_x509_certificate(file.read(MAX_CERTIFICATE_BYTES))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "there is no certificate in it"
        raise Refused(
            f"{given!a} is neither a SHA-256 fingerprint nor a certificate's file: {reason}",
            hint="openssl x509 -in FILE -noout -fingerprint -sha256 shows it",
        ) from None
    return found.fingerprint(SHA256()).hex()


@contextlib.contextmanager
def _locked(folder: Path, patience_seconds: float) -> Iterator[None]:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _unlocked(folder, error) from error
    try:
        end = time.monotonic() + patience_seconds
        while not _taken(descriptor, folder):
            if time.monotonic() >= end:
                raise Refused(f"another command has been changing a file in {folder} all the time", hint="repeat the command")
            time.sleep(LOCK_PAUSE_SECONDS)
        yield
    finally:
        os.close(descriptor)  # and with it the lock


def _taken(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise _unlocked(folder, error) from error
    return True


def _unlocked(folder: Path, error: OSError) -> Misconfigured:
    return Misconfigured(f"folder {str(folder)!r} cannot be locked: {error.strerror}", hint="keep the file on a local disk")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        about = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Misconfigured(f"{str(path)!r} cannot be read: {error.strerror}", hint="look at its folder") from error
    return about.st_mtime_ns, about.st_size, about.st_ino
