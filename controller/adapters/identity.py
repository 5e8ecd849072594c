"""People's signatures, verified offline against an OpenSSH ``allowed_signers`` file (``ssh-keygen(1)``, ALLOWED SIGNERS).

    # principals              options                                      key
    alice@example.com         namespaces="dr-approval"                     ssh-ed25519 AAAA…
    bob@example.com           valid-before="20270101Z"                     sk-ssh-ed25519@openssh.com AAAA…

Keys are pinned: only the exact key bytes that are listed for a principal count. Certificate authorities are refused (whoever
holds one could make approvers), and so are dates without ``Z`` (controllers in other time zones would disagree). A line that
cannot be read makes the whole file invalid: guessing whom a broken list still allows would be worse than saying so.
"""

from __future__ import annotations

import base64
import functools
import os
import re
import shutil
import stat
import subprocess
import threading
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from controller.adapters import sshsig
from controller.domain.approval import NAMESPACE
from controller.errors import Misconfigured, Refused
from controller.ports import Signer

MAX_FILE_BYTES = 1024 * 1024
MAX_PRINCIPAL_CHARS = 200
SIGN_TIMEOUT_SECONDS = 120.0

KEY_TYPES = frozenset(
    {
        "ssh-ed25519",
        "ssh-rsa",
        "ecdsa-sha2-nistp256",
        "ecdsa-sha2-nistp384",
        "ecdsa-sha2-nistp521",
        "sk-ssh-ed25519@openssh.com",
        "sk-ecdsa-sha2-nistp256@openssh.com",
    }
)

_OPTION = re.compile(r'(?P<name>[A-Za-z-]+)(?:="(?P<value>[^"]*)")?(?:,|$)')
_STAMP = re.compile(r"(\d{8})(\d{4}(?:\d{2})?)?Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class AllowedSigner:
    """One line of the file. Times are wall clock seconds."""

    line: int
    principals: tuple[str, ...]
    namespaces: tuple[str, ...]
    valid_after: float
    valid_before: float
    key: bytes


class _BadLine(ValueError):
    """What is wrong with a line."""


def _matches(text: str, patterns: tuple[str, ...]) -> bool:
    """OpenSSH pattern lists: ``*`` and ``?``, and a leading ``!`` that excludes and wins."""
    found = False
    for pattern in patterns:
        # OpenSSH knows no character classes, so a bracket means itself.
        plain = pattern.removeprefix("!").replace("[", "[[]")
        if fnmatchcase(text, plain):
            if pattern.startswith("!"):
                return False
            found = True
    return found


def _stamp(name: str, value: str) -> float:
    match = _STAMP.fullmatch(value)
    if match is None:
        raise _BadLine(f'{name}="{value}" is not YYYYMMDD[HHMM[SS]]Z (UTC, with the Z)')
    digits = match[1] + (match[2] or "0000").ljust(6, "0")
    try:
        return datetime.strptime(digits, "%Y%m%d%H%M%S").replace(tzinfo=UTC).timestamp()
    except ValueError as error:
        raise _BadLine(f'{name}="{value}" is not a date') from error


def _options(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    at = 0
    while at < len(text):
        match = _OPTION.match(text, at)
        if match is None:
            raise _BadLine(f"options {text!r} cannot be read")
        name = match["name"].lower()
        if name == "cert-authority":
            raise _BadLine("cert-authority is not supported; list each approver's own key")
        if name not in ("namespaces", "valid-after", "valid-before"):
            raise _BadLine(f"option {name!r} is unknown")
        if match["value"] is None or name in found:
            raise _BadLine(f"option {name!r} needs one quoted value and may be given once")
        found[name] = match["value"]
        at = match.end()
    return found


def _split(line: str) -> list[str]:
    """White space separates, but not inside double quotes."""
    parts = re.findall(r'(?:[^\s"]|"[^"]*")+|"', line)
    if '"' in parts:
        raise _BadLine("a double quote is not closed")
    return parts


def _parse_line(number: int, line: str) -> AllowedSigner:
    if any(unicodedata.category(char) in ("Cc", "Cf") and char != "\t" for char in line):
        raise _BadLine("it contains control or direction characters")
    parts = _split(line)
    if len(parts) < 3:
        raise _BadLine("it needs principals, a key type and a key")
    principals = tuple(parts[0].strip('"').split(","))
    if not all(principal.removeprefix("!") for principal in principals):
        raise _BadLine("a principal is empty")
    options: dict[str, str] = {}
    rest = parts[1:]
    if rest[0] not in KEY_TYPES and ("=" in rest[0] or rest[0].lower().startswith("cert-authority")):
        options, rest = _options(rest[0]), rest[1:]
    if len(rest) < 2 or rest[0] not in KEY_TYPES:
        raise _BadLine(f"key type {rest[0] if rest else ''!r} is not one of {', '.join(sorted(KEY_TYPES))}")
    try:
        key = base64.b64decode(rest[1], validate=True)
    except ValueError as error:  # also what binascii raises, and what a letter outside of ASCII does
        raise _BadLine("the key is not base64") from error
    named = rest[0].encode()
    if key[:4] != len(named).to_bytes(4, "big") or key[4 : 4 + len(named)] != named:
        raise _BadLine(f"the key is not of type {rest[0]}")
    return AllowedSigner(
        number,
        principals,
        tuple(options["namespaces"].split(",")) if "namespaces" in options else (),
        _stamp("valid-after", options["valid-after"]) if "valid-after" in options else float("-inf"),
        _stamp("valid-before", options["valid-before"]) if "valid-before" in options else float("inf"),
        key,
    )


def parse_allowed_signers(text: str, source: str = "allowed_signers") -> tuple[AllowedSigner, ...]:
    """All lines. Raises Misconfigured naming the file, the line and the rule."""
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not (stripped := line.strip()) or stripped.startswith("#"):
            continue
        try:
            found.append(_parse_line(number, stripped))
        except _BadLine as error:
            raise Misconfigured(
                f"{source} line {number}: {error}", hint="correct the line; see ssh-keygen(1), ALLOWED SIGNERS"
            ) from error
    return tuple(found)


class SshIdentity:
    """``ports.Identity`` over an ``allowed_signers`` file, which is read again whenever it changes.

    ``wall``: seconds since 1970. Raises Misconfigured, also from the constructor, when the file is missing or invalid.
    """

    def __init__(self, allowed_signers: Path, namespace: str = NAMESPACE, wall: Callable[[], float] = time.time) -> None:
        self._path = allowed_signers
        self._namespace = namespace
        self._wall = wall
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._signers: tuple[AllowedSigner, ...] = ()
        self._current()

    def _current(self) -> tuple[AllowedSigner, ...]:
        with self._lock:
            try:
                with self._path.open("rb") as file:
                    about = os.fstat(file.fileno())
                    seen = (about.st_mtime_ns, about.st_size, about.st_ino)
                    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                        # Whoever writes it moves the fleet, so it is held to what OpenSSH asks of such files.
                        raise Misconfigured(
                            f"approvals.allowed_signers {self._path} may be written by others than its owner",
                            hint=f"look at what is in it, then: chmod go-w {self._path}",
                        )
                    if seen == self._seen:
                        return self._signers
                    data = file.read(MAX_FILE_BYTES + 1)
            except OSError as error:
                raise Misconfigured(
                    f"approvals.allowed_signers {self._path} cannot be read: {error.strerror}",
                    hint="set approvals.allowed_signers to the file that lists the approvers' keys",
                ) from error
            if len(data) > MAX_FILE_BYTES:
                raise Misconfigured(f"{self._path} is longer than {MAX_FILE_BYTES} bytes", hint="list fewer approvers")
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise Misconfigured(f"{self._path} is not UTF-8 text", hint="write the file again") from error
            self._signers = parse_allowed_signers(text, str(self._path))
            self._seen = seen
            return self._signers

    def principals(self) -> tuple[str, ...]:
        """The names and patterns that are listed, for a person to look at."""
        return tuple(dict.fromkeys(name for signer in self._current() for name in signer.principals))

    def verify(self, message: bytes, signature: str, principal: str) -> Signer:
        """See ``ports.Identity``. Raises Refused with the reason, Misconfigured when the file is invalid."""
        check_principal(principal)
        try:
            parsed = sshsig.parse(signature)
        except sshsig.Garbled as error:
            raise Refused(f"the signature is garbled: {error}", hint="sign again with drctl approve") from error
        listed = [signer for signer in self._current() if _matches(principal, signer.principals)]
        if not listed:
            raise Refused(
                f"{principal} is not listed in {self._path.name}",
                hint="check --principal, or have the key listed in approvals.allowed_signers of every controller",
            )
        fingerprint = sshsig.fingerprint(parsed.key)
        pinned = [signer for signer in listed if signer.key == parsed.key]
        if not pinned:
            raise Refused(f"{fingerprint} is not a listed key of {principal}", hint="sign with the key that is listed for you")
        if parsed.namespace != self._namespace:
            raise Refused(
                f"the signature is for namespace {parsed.namespace!r}, not {self._namespace!r}",
                hint="a signature made for something else is not an approval; use drctl approve",
            )
        self._check_validity(pinned, principal, fingerprint)
        try:
            _checked(parsed, message)
        except sshsig.InvalidSignature as error:
            raise Refused(
                f"the signature of {principal} does not match this statement",
                hint="read the plan again and sign what it says now: drctl approve",
            ) from error
        except sshsig.Garbled as error:
            raise Refused(f"the signature is not acceptable: {error}", hint="sign with a listed key") from error
        return Signer(principal, fingerprint)

    def _check_validity(self, pinned: list[AllowedSigner], principal: str, fingerprint: str) -> None:
        """Passes when any line lists the key for this namespace and for now."""
        now = self._wall()
        here = [signer for signer in pinned if not signer.namespaces or _matches(self._namespace, signer.namespaces)]
        if not here:
            raise Refused(
                f"{fingerprint} of {principal} is not listed for namespace {self._namespace!r}",
                hint=f"add {self._namespace} to its namespaces= option",
            )
        if not any(signer.valid_after <= now < signer.valid_before for signer in here):
            raise Refused(
                f"{fingerprint} of {principal} is outside its valid-after / valid-before dates",
                hint="sign with a current key, or have the dates corrected",
            )


@functools.lru_cache(maxsize=1024)
def _checked(signature: sshsig.Signature, message: bytes) -> None:
    """That the key in a signature signed the message. Approvals are judged again at every step of a plan; the mathematics of
    one never changes, unlike who is listed, for what and until when: that is looked up each time. Failures are not remembered.
    """
    sshsig.check(signature, message)


def check_principal(principal: str) -> None:
    """Raises Refused for a name that is empty, too long, or contains white space, control or direction characters."""
    if not 1 <= len(principal) <= MAX_PRINCIPAL_CHARS:
        raise Refused(f"a principal has 1 to {MAX_PRINCIPAL_CHARS} characters", hint="use the name that is listed")
    if any(char.isspace() or unicodedata.category(char)[0] == "C" for char in principal):
        raise Refused("the principal contains white space, control or direction characters", hint="use the name that is listed")


def load_private_key(path: Path, passphrase: bytes | None = None) -> sshsig.PrivateKey | None:
    """A key that this process can sign with, or None when only ``ssh-keygen`` can (hardware, agent, encrypted).

    Raises Refused when the file cannot be read or is no key.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES)
    except OSError as error:
        raise Refused(f"key {path} cannot be read: {error.strerror}", hint="give your private key with --key") from error
    if path.suffix == ".pub" or data.startswith((b"ssh-", b"ecdsa-", b"sk-")):
        return None
    try:
        key = serialization.load_ssh_private_key(data, passphrase)
    except UnsupportedAlgorithm:
        return None
    except TypeError as error:
        if passphrase is None:
            return None
        raise Refused(f"key {path} has no passphrase", hint="leave the passphrase out") from error
    except ValueError as error:
        raise Refused(
            f"{path} is not an OpenSSH private key, or the passphrase is wrong",
            hint="give a key made by ssh-keygen, for example ~/.ssh/id_ed25519",
        ) from error
    if not isinstance(key, (ed25519.Ed25519PrivateKey, ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey)):
        raise Refused(f"keys of type {type(key).__name__} cannot sign", hint="use an Ed25519, ECDSA or RSA key")
    return key


def sign(message: bytes, private_key: Path, namespace: str = NAMESPACE, passphrase: str | None = None) -> str:
    """An armored SSHSIG over ``message``.

    Hardware keys, keys in an ssh-agent (given by their ``.pub`` file) and keys with a passphrase that was not given are left to
    ``ssh-keygen -Y sign``, which asks for the touch or the passphrase itself. Raises Refused.
    """
    key = load_private_key(private_key, passphrase.encode() if passphrase is not None else None)
    if key is not None:
        return sshsig.make(key, message, namespace)
    program = shutil.which("ssh-keygen")
    if program is None:
        raise Refused(
            f"{private_key} needs ssh-keygen to sign, and it is not on PATH", hint="install OpenSSH, or use a plain key"
        )
    try:
        done = subprocess.run(  # noqa: S603 - a fixed program; the path is an argument of -f, and no shell is involved
            [program, "-q", "-Y", "sign", "-n", namespace, "-f", str(private_key)],
            input=message,
            stdout=subprocess.PIPE,
            timeout=SIGN_TIMEOUT_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise Refused("ssh-keygen did not sign in time", hint="touch the hardware key when it blinks") from error
    except subprocess.CalledProcessError as error:
        raise Refused(f"ssh-keygen could not sign with {private_key}", hint="its own message is above") from error
    return done.stdout.decode("ascii", "replace")


def generate_key(path: Path, comment: str = "") -> str:
    """Makes an Ed25519 key pair, ``path`` (mode 0600) and ``path.pub``. Returns the public line. Refuses to overwrite."""
    private = ed25519.Ed25519PrivateKey.generate()
    encoded = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    line = private.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    line = f"{line} {comment}".rstrip()
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise Refused(f"{path} exists already", hint="choose another path; keys are never overwritten") from error
    with os.fdopen(handle, "wb") as file:
        file.write(encoded)
    path.with_name(path.name + ".pub").write_text(line + "\n", encoding="ascii")
    return line
