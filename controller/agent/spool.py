"""Store and forward for the time in which no controller answers. A local SQLite file, bounded in bytes, explicit when full.

A spooled record is *not* acknowledged: it is safe against a crash of the process, not against the loss of the machine. Order is
kept per agent: while an agent has spooled records, newer ones go behind them. Records that a controller refuses when they are
drained (the agent was given to another host meanwhile) are set aside, kept and counted, never dropped silently.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from controller.agent.errors import SpoolFull
from controller.errors import Conflict, Unavailable

_SCHEMA = """
CREATE TABLE IF NOT EXISTS letters (
    n INTEGER PRIMARY KEY AUTOINCREMENT, agent TEXT NOT NULL, id TEXT NOT NULL, kind TEXT NOT NULL, parent TEXT,
    created_at REAL NOT NULL, copies INTEGER NOT NULL, attempt INTEGER NOT NULL, meta BLOB NOT NULL, body BLOB NOT NULL,
    rejected TEXT, UNIQUE (agent, id)
) STRICT;
CREATE INDEX IF NOT EXISTS waiting ON letters (agent, n) WHERE rejected IS NULL;
"""
_ROW = "agent, id, kind, body, parent, created_at, copies, attempt, meta"
_FIRST = f"SELECT n, {_ROW} FROM letters WHERE agent=? AND rejected IS NULL ORDER BY n LIMIT 1"  # noqa: S608 - constants only
_REJECTED = f"SELECT n, rejected, {_ROW} FROM letters WHERE rejected NOTNULL ORDER BY n"  # noqa: S608 - constants only
OVERHEAD = 512
"""Bytes that a record is counted with beside its body."""


@dataclass(frozen=True, slots=True)
class Letter:
    """A record on its way, as its agent gave it."""

    agent: str
    id: str
    kind: str
    body: bytes
    parent: str | None = None
    created_at: float = 0.0
    copies: int = 1
    attempt: int = 0
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A letter that a controller refused, and its reason."""

    n: int
    letter: Letter
    why: str


class Spool:
    """Thread-safe; every call is short but syncs the disk, so async callers use a thread."""

    def __init__(self, path: Path, *, max_bytes: int = 256 * 2**20) -> None:
        self._lock = threading.Lock()
        self._max = max_bytes
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
            rows = self._db.execute("SELECT agent, length(body), rejected FROM letters").fetchall()
        except sqlite3.Error as error:
            raise Unavailable(
                f"spool {path}: {error}", hint="check the disk and the file's owner; one process per file"
            ) from error
        self._bytes: int = sum(size + OVERHEAD for _, size, _ in rows)
        self._waiting: dict[str, int] = {}
        for agent, _, rejected in rows:
            if rejected is None:
                self._waiting[agent] = self._waiting.get(agent, 0) + 1

    @property
    def bytes(self) -> int:
        """Bytes used, rejected records included."""
        return self._bytes

    def waiting(self, agent: str) -> int:
        """Records of this agent that wait to be sent. In memory, at once."""
        return self._waiting.get(agent, 0)

    def agents(self) -> tuple[str, ...]:
        """Agents with records that wait."""
        return tuple(sorted(self._waiting))

    def add(self, letter: Letter) -> None:
        """On disk when it returns; the same record again is fine. Raises SpoolFull, Conflict (same id, another body)."""
        with self._lock:
            known = self._one("SELECT body FROM letters WHERE agent=? AND id=?", (letter.agent, letter.id))
            if known is not None:
                if known[0] != letter.body:
                    raise Conflict(
                        f"record {letter.id!a} of agent {letter.agent!a} is spooled with another body", hint="use a new id"
                    )
                return
            size = len(letter.body) + OVERHEAD
            if self._bytes + size > self._max:
                raise SpoolFull(
                    f"{size} bytes more, for agent {letter.agent!a}, pass the bound: {self._bytes} of {self._max} are used",
                    hint="pause this agent until a controller answers; look at rejected records, or allow more bytes",
                )
            meta = msgspec.json.encode(dict(letter.meta))
            self._run(
                f"INSERT INTO letters ({_ROW}) VALUES (?,?,?,?,?,?,?,?,?)",  # noqa: S608 - constants only
                (
                    letter.agent,
                    letter.id,
                    letter.kind,
                    letter.body,
                    letter.parent,
                    letter.created_at,
                    letter.copies,
                    letter.attempt,
                    meta,
                ),
            )
            self._bytes += size
            self._waiting[letter.agent] = self._waiting.get(letter.agent, 0) + 1

    def first(self, agent: str) -> tuple[int, Letter] | None:
        """The oldest record of the agent that waits."""
        with self._lock:
            row = self._one(_FIRST, (agent,))
        return None if row is None else (row[0], _letter(row[1:]))

    def remove(self, n: int) -> None:
        """It was acknowledged, or a person looked at the rejected one."""
        with self._lock:
            row = self._one("SELECT agent, length(body), rejected FROM letters WHERE n=?", (n,))
            if row is not None:
                self._run("DELETE FROM letters WHERE n=?", (n,))
                self._bytes -= row[1] + OVERHEAD
                if row[2] is None:
                    self._less(row[0])

    def reject(self, n: int, why: str) -> None:
        """A controller refused it: set it aside."""
        with self._lock:
            row = self._one("SELECT agent FROM letters WHERE n=? AND rejected IS NULL", (n,))
            if row is not None:
                self._run("UPDATE letters SET rejected=? WHERE n=?", (why, n))
                self._less(row[0])

    def rejected(self) -> tuple[Rejected, ...]:
        """Refused records, oldest first."""
        with self._lock:
            try:
                rows = self._db.execute(_REJECTED).fetchall()
            except sqlite3.Error as error:
                raise _failed(error) from error
        return tuple(Rejected(row[0], _letter(row[2:]), row[1]) for row in rows)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _less(self, agent: str) -> None:
        left = self._waiting.get(agent, 0) - 1
        if left > 0:
            self._waiting[agent] = left
        else:
            self._waiting.pop(agent, None)

    def _one(self, sql: str, values: tuple[object, ...]) -> tuple[Any, ...] | None:
        try:
            row: tuple[Any, ...] | None = self._db.execute(sql, values).fetchone()
        except sqlite3.Error as error:
            raise _failed(error) from error
        return row

    def _run(self, sql: str, values: tuple[object, ...]) -> None:
        try:
            self._db.execute(sql, values)
        except sqlite3.Error as error:
            raise _failed(error) from error


def _failed(error: sqlite3.Error) -> Unavailable:
    return Unavailable(f"the local spool failed: {error}", hint="check the disk; the record is not kept anywhere")


def _letter(row: tuple[Any, ...]) -> Letter:
    agent, record_id, kind, body, parent, created_at, copies, attempt, meta = row
    return Letter(
        agent, record_id, kind, body, parent, created_at, copies, attempt, msgspec.json.decode(meta, type=dict[str, str])
    )
