"""Bodies into a folder, with a manifest that proves them: what each file is, its hash, and its place in the stream.

An existing file is never overwritten unless that is asked for; one that already holds the very same bytes is kept, so an
export that was interrupted can be repeated. Every file is read back after it was written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from controller.agent.journal import escape
from controller.cli.bodies import open_body
from controller.errors import Corrupt, Refused, Unavailable
from controller.runtime.archive_documents import CheckpointSeen
from controller.runtime.salvage_documents import SalvageRecord

FORMAT = 1
MANIFEST = "manifest.json"
NAME_CHARS = 120
_SUFFIX = {"json": ".json", "msgpack": ".msgpack", "text": ".txt", "empty": ".bin", "binary": ".bin"}


def safe_path(agent: str, record_id: str, suffix: str) -> Path:
    """A relative path for a body. Agents and ids may contain ``/`` and ``..``: those are written as ``%2F`` and ``%2E%2E``."""
    return Path("bodies") / _safe(agent) / f"{_safe(record_id)}{suffix}"


def _safe(name: str) -> str:
    found = escape(name, NAME_CHARS)
    return f"%2E{found[1:]}" if found.startswith(".") else found


class Folder:
    """The folder that an export goes to. ``force``: what is there may be overwritten. Raises Refused."""

    def __init__(self, path: Path, *, force: bool) -> None:
        self.path = path
        self._force = force
        self._entries: list[dict[str, Any]] = []
        self.bytes = 0
        with _told(path):
            if path.exists() and not path.is_dir():
                raise Refused(f"{path} is no folder", hint="name a new or empty folder with --to")
            if (path / MANIFEST).exists() and not force:
                raise Refused(f"{path} holds an export already", hint="choose another folder, or overwrite it with --force")
            path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def add(self, record: CheckpointSeen | SalvageRecord, body: bytes) -> Path:
        """Writes one body. Raises Corrupt when it is not the record's, Refused when another file is in the way."""
        digest = hashlib.sha256(body).hexdigest()
        if digest != record.sha256 or len(body) != record.size:
            raise Corrupt(
                f"record {record.id!a} of agent {record.agent!a}: {len(body)} bytes came with sha256 {digest[:12]}…, "
                f"the record says {record.sha256[:12]}…",
                hint="ask a controller of another region: --endpoint URL",
            )
        form = open_body(body).form
        relative = safe_path(record.agent, record.id, _SUFFIX[form])
        target = self.path / relative
        with _told(target):
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.path.resolve() not in target.resolve().parents:
                raise Refused(f"{target} leads out of {self.path}", hint="somebody put a link there; choose an empty folder")
            if not (target.exists() and hashlib.sha256(target.read_bytes()).hexdigest() == digest):
                self._write(target, body)
            if hashlib.sha256(target.read_bytes()).hexdigest() != digest:
                raise Corrupt(f"{target} does not hold what was written to it", hint="check the disk")
        self._entries.append({"file": relative.as_posix(), "form": form, **asdict(record)})
        self.bytes += len(body)
        return target

    def _write(self, target: Path, data: bytes) -> None:
        if target.exists() and not self._force:
            raise Refused(f"{target} exists with other content", hint="choose another folder, or overwrite it with --force")
        part = target.with_name(f".{hashlib.sha256(target.name.encode()).hexdigest()[:16]}.part")
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)

    def finish(self, about: dict[str, Any], missing: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Writes the manifest last: a folder without one is an export that did not end. Returns it."""
        manifest = {"format": FORMAT, **about, "records": self._entries, "missing": list(missing)}
        with _told(self.path):
            self._write(self.path / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=True).encode() + b"\n")
        return manifest


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(
            f"{error.filename or path}: {error.strerror or error}", hint="check space, permissions and the name"
        ) from error
