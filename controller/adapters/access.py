"""The access file: who may call this group's controllers. Tokens stand in it by their SHA-256 only.

    {"version": 1, "group": "fleet", "entries": [
      {"name": "worker-1", "role": "agent", "sha256": "…", "agents": ["team-a/*"], "hosts": ["worker-1"], "expires_at": 1.79e9},
      {"name": "ada-laptop", "role": "operator", "person": "ada@example.com", "certificate": "ada@example.com"}],
     "revoked": [{"fingerprint": "…", "reason": "laptop lost", "revoked_at": 1.78e9}]}

``revoked`` is for client certificates that an authority signed and nobody believes any more, those of controllers too. It is
asked for each request, not for each connection.

A token is ``dr1.GROUP.SECRET``: the group is part of what is hashed, and is compared before anything is looked up, so that a
token of another group is refused also where somebody copied that group's entries. The secret has 256 random bits: nothing is
won by trying, and a plain hash is enough.

The file is read again when it changes. One that is damaged changes nothing at first: the last good one stays in force, with a
warning, for ``stale_seconds``; a half-written file shall not stop a fleet. After that nobody is let in, because whoever was
struck off would stay in for ever.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from controller.domain.access import Caller, CallerRole, Names
from controller.errors import Misconfigured, Refused, Unauthenticated, Unavailable

MAX_FILE_BYTES = 16 * 2**20
MAX_HEADER_BYTES = 512
"""A longer Authorization header is none of ours."""
_TOKEN = re.compile(rb"dr1\.([a-z0-9-]{1,63})\.([A-Za-z0-9_-]{43})")
_HINT = "send `Authorization: Bearer TOKEN`; an operator makes tokens: drctl token create"

Pattern = Annotated[str, Field(min_length=1, max_length=201)]


class Entry(BaseModel):
    """One principal, by a token or by a name in a client certificate."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9@._+/-]{0,127}$")]
    role: Annotated[CallerRole, Field(strict=False)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    certificate: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    person: Annotated[str, Field(max_length=200)] = ""
    agents: Annotated[tuple[Pattern, ...], Field(max_length=10_000, strict=False)] = ()
    hosts: Annotated[tuple[Pattern, ...], Field(max_length=10_000, strict=False)] = ()
    created_at: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    expires_at: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _belongs_together(self) -> Entry:
        if (self.sha256 is None) == (self.certificate is None):
            raise ValueError("needs either sha256 or certificate")
        if self.role is CallerRole.AGENT and not self.agents:
            raise ValueError("an agent's entry names its agents")
        if self.role is not CallerRole.AGENT and (self.agents or self.hosts):
            raise ValueError("agents and hosts are for the role agent")
        return self

    def caller(self) -> Caller:
        """What it stands for."""
        return Caller(self.name, self.role, self.person or self.name, Names.of(self.agents), Names.of(self.hosts))


class Revoked(BaseModel):
    """A client certificate that is refused, whatever else speaks for it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)

    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """SHA-256 of the certificate itself: one that is renewed is another one."""
    certificate: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    """A name in it: every certificate with this name, renewed ones too."""
    reason: Annotated[str, Field(max_length=200)] = ""
    revoked_at: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    @model_validator(mode="after")
    def _one_of_two(self) -> Revoked:
        if (self.fingerprint is None) == (self.certificate is None):
            raise ValueError("needs either fingerprint or certificate")
        return self


class AccessDocument(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)

    version: Literal[1] = 1
    group: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,63}$")]
    entries: Annotated[tuple[Entry, ...], Field(max_length=100_000, strict=False)] = ()
    revoked: Annotated[tuple[Revoked, ...], Field(max_length=100_000, strict=False)] = ()

    @model_validator(mode="after")
    def _each_once(self) -> AccessDocument:
        for what in ("name", "sha256", "certificate"):
            given = [value for entry in self.entries if (value := getattr(entry, what)) is not None]
            if len(set(given)) != len(given):
                raise ValueError(f"a {what} stands in it twice")
        if len({(one.fingerprint, one.certificate) for one in self.revoked}) != len(self.revoked):
            raise ValueError("a revoked certificate stands in it twice")
        return self


@dataclass(frozen=True, slots=True)
class _Known:
    digest: bytes
    caller: Caller
    expires_at: float


class AccessList:
    """A file's entries, ready for look-ups. Immutable."""

    def __init__(self, document: AccessDocument) -> None:
        self._group = document.group.encode()
        self._tokens: dict[bytes, _Known] = {}
        self._certificates: dict[str, _Known] = {}
        self._revoked_prints = frozenset(one.fingerprint for one in document.revoked if one.fingerprint is not None)
        self._revoked_names = frozenset(one.certificate for one in document.revoked if one.certificate is not None)
        for entry in document.entries:
            ends = float("inf") if entry.expires_at is None else entry.expires_at
            if entry.sha256 is not None:
                digest = bytes.fromhex(entry.sha256)
                self._tokens[digest] = _Known(digest, entry.caller(), ends)
            elif entry.certificate is not None:
                self._certificates[entry.certificate] = _Known(b"", entry.caller(), ends)

    def by_header(self, header: bytes, now: float) -> Caller:
        """The caller that an Authorization header stands for. Raises Unauthenticated, which never repeats what was sent."""
        scheme, _, token = header.partition(b" ")
        if len(header) > MAX_HEADER_BYTES or scheme.lower() != b"bearer":
            raise Unauthenticated("the Authorization header is not a bearer token of this group", hint=_HINT)
        match = _TOKEN.fullmatch(token)
        if match is None:
            raise Unauthenticated("the bearer token does not have the form of a token", hint=_HINT)
        if match[1] != self._group:
            raise Unauthenticated(
                f"the token is of group {match[1].decode()}, this is group {self._group.decode()}",
                hint="use the token that was made for this group",
            )
        digest = hashlib.sha256(token).digest()
        known = self._tokens.get(digest)
        # Looked up by a hash that nobody can choose, so its time tells nothing; what it found is compared in constant time.
        if known is None or not hmac.compare_digest(known.digest, digest):
            raise Unauthenticated("the token is unknown here, or was revoked", hint=_HINT)
        return _valid(known, now, "token")

    def by_certificate(self, names: Iterable[str], now: float) -> Caller | None:
        """The caller that one of a verified certificate's names stands for, None when none does. Raises Unauthenticated when it
        has expired here."""
        known = next((found for name in sorted(names) if (found := self._certificates.get(name)) is not None), None)
        return None if known is None else _valid(known, now, "entry")

    def is_revoked(self, fingerprint: str, names: Iterable[str]) -> bool:
        """Whether a verified certificate was revoked: by itself, or by one of its names."""
        return fingerprint in self._revoked_prints or not self._revoked_names.isdisjoint(names)


def _valid(known: _Known, now: float, what: str) -> Caller:
    if now >= known.expires_at:
        raise Unauthenticated(f"the {what} {known.caller.name} has expired", hint="have it renewed: drctl token create")
    return known.caller


class AccessFile:
    """The list in force. ``look`` is called again and again, off the event loop; look-ups never touch the disk."""

    def __init__(self, path: Path, group: str, stale_seconds: float) -> None:
        """Reads it. Raises Misconfigured: at the start a damaged file is an error like every other wrong setting."""
        self._path = path
        self._group = group
        self._stale_seconds = stale_seconds
        self._seen: tuple[int, ...] = ()
        self._broken_since: float | None = None
        self._closed = ""
        self._list = self._read()

    def look(self, now: float) -> str:
        """Reads the file again when it changed. Returns what people must know, "" when all is well. ``now``: monotonic."""
        try:
            if self._stamp() != self._seen:
                self._list = self._read()
            self._broken_since, self._closed = None, ""
        except Misconfigured as error:
            self._broken_since = now if self._broken_since is None else self._broken_since
            left = self._stale_seconds - (now - self._broken_since)
            if left > 0:
                return f"{error.message}; the last good one is in force for {left:.0f} s more, then nobody is let in"
            self._closed = error.message
            return f"{error.message}; nobody is let in before it is put right"
        return ""

    def list(self) -> AccessList:
        """Raises Unavailable when the file has been unreadable for too long."""
        if self._closed:
            raise Unavailable("this controller cannot tell who may call it", hint="put api.access_file right; see its status")
        return self._list

    def is_revoked(self, fingerprint: str, names: Iterable[str]) -> bool:
        """By the last good list, also when the file has been unreadable for too long: what was revoked stays revoked."""
        return self._list.is_revoked(fingerprint, names)

    def _stamp(self) -> tuple[int, ...]:
        try:
            about = self._path.stat()
        except OSError as error:
            raise _unusable(self._path, f"cannot be read: {error.strerror}") from error
        return about.st_mtime_ns, about.st_size, about.st_ino, about.st_mode

    def _read(self) -> AccessList:
        seen = self._stamp()
        document = read_document(self._path)
        if document.group != self._group:
            raise _unusable(self._path, f"is that of group {document.group}, this is group {self._group}")
        self._seen = seen
        return AccessList(document)


def read_document(path: Path) -> AccessDocument:
    """The file as it is. Raises Misconfigured, which names the entry and never shows a value."""
    try:
        about = path.stat()
        if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _unusable(path, "may be written by others than its owner", f"chmod go-w {path}")
        if about.st_size > MAX_FILE_BYTES:
            raise _unusable(path, f"is larger than {MAX_FILE_BYTES} bytes")
        return AccessDocument.model_validate_json(path.read_bytes())
    except OSError as error:
        raise _unusable(path, f"cannot be read: {error.strerror}", "make one: drctl token create") from error
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _unusable(path, f"{where + ': ' if where else ''}{first['msg']}") from None


def _unusable(path: Path, why: str, hint: str = "put it back, or make it anew: drctl token create") -> Misconfigured:
    return Misconfigured(f"api.access_file {str(path)!r} {why}", hint=hint)


def new_token(group: str) -> tuple[str, str]:
    """A secret to hand out once, and the hash to keep."""
    token = f"dr1.{group}.{secrets.token_urlsafe(32)}"
    return token, hashlib.sha256(token.encode()).hexdigest()


def with_entry(document: AccessDocument, entry: Mapping[str, object]) -> AccessDocument:
    """One more. Raises Refused with what is wrong."""
    try:
        added = Entry.model_validate(entry)
        return AccessDocument.model_validate(dict(document) | {"entries": (*document.entries, added)})
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"] if part != "entries")
        raise Refused(f"{where or 'entry'}: {first['msg']}", hint="see drctl token create --help") from None


def without_entry(document: AccessDocument, name: str) -> AccessDocument:
    """All but one. Raises Refused when it is not there."""
    left = tuple(entry for entry in document.entries if entry.name != name)
    if len(left) == len(document.entries):
        known = ", ".join(sorted(entry.name for entry in document.entries)[:20])
        raise Refused(f"there is no entry {name!r}", hint=f"entries: {known or 'none'}")
    return document.model_copy(update={"entries": left})


def write_document(path: Path, document: AccessDocument) -> None:
    """Whole or not at all; readable for this user and its group. A file that is there keeps its owner and group, where this
    user may give them: controllers run as somebody else. Raises Misconfigured."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    content = document.model_dump(mode="json", exclude_defaults=True)
    text = json.dumps({"version": document.version, "group": document.group, "entries": []} | content, indent=1)
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o640)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            _keep_owner(path, file.fileno())
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise Misconfigured(
            f"{str(path)!r} cannot be written: {error.strerror}", hint="name a file in a folder that is yours"
        ) from error


def _keep_owner(path: Path, descriptor: int) -> None:
    with contextlib.suppress(FileNotFoundError, PermissionError):
        about = path.stat()
        os.fchown(descriptor, about.st_uid, about.st_gid)


def _sync_folder(folder: Path) -> None:
    """So that the new name outlives a power cut: a revocation that comes undone is none."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
