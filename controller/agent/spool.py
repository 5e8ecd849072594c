"""Store and forward for the time in which no controller answers. A local SQLite file, bounded in bytes, explicit when full.

A spooled record is *not* acknowledged: it is safe against a crash of the process, not against the loss of the machine. Order is
kept per agent: while an agent has spooled records, newer ones go behind them. Records that a controller refuses when they are
drained (the agent was given to another host meanwhile) are set aside, kept and counted, never dropped silently.

When it is full, ``when_full`` decides:

- ``refuse``: the new record raises SpoolFull; nothing that was kept is touched. The agent should pause.
- ``drop-oldest``: the oldest records that a newer one of the same agent and kind stands behind make room, so that the newest
  state of every agent stays. Each is said in the answer to the put, in the log, and in ``dropped()``. Whoever needs every
  record (LangGraph with channels that store only changes) must refuse.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from controller.agent.errors import SpoolFull
from controller.errors import Conflict, DrError, Misconfigured, Unavailable

_SCHEMA = """
CREATE TABLE IF NOT EXISTS letters (
    n INTEGER PRIMARY KEY AUTOINCREMENT, agent TEXT NOT NULL, id TEXT NOT NULL, kind TEXT NOT NULL, parent TEXT,
    created_at REAL NOT NULL, copies INTEGER NOT NULL, attempt INTEGER NOT NULL, meta BLOB NOT NULL, body BLOB NOT NULL,
    rejected TEXT, UNIQUE (agent, id)
) STRICT;
CREATE TABLE IF NOT EXISTS dropped (
    n INTEGER PRIMARY KEY AUTOINCREMENT, agent TEXT NOT NULL, id TEXT NOT NULL, kind TEXT NOT NULL, bytes INTEGER NOT NULL,
    created_at REAL NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS waiting ON letters (agent, n) WHERE rejected IS NULL;
"""
_ROW = "agent, id, kind, body, parent, created_at, copies, attempt, meta"
_FIRST = f"SELECT n, {_ROW} FROM letters WHERE agent=? AND rejected IS NULL ORDER BY n LIMIT ?"  # noqa: S608 - constants only
_REJECTED = f"SELECT n, rejected, {_ROW} FROM letters WHERE rejected NOTNULL ORDER BY n"  # noqa: S608 - constants only
_INSERT = f"INSERT INTO letters ({_ROW}) VALUES (?,?,?,?,?,?,?,?,?)"  # noqa: S608 - constants only
_SUPERSEDED = (
    "SELECT n, agent, id, kind, length(body), created_at FROM letters l WHERE rejected IS NULL AND (agent=? AND kind=? "
    "OR EXISTS (SELECT 1 FROM letters m WHERE m.agent=l.agent AND m.kind=l.kind AND m.rejected IS NULL AND m.n>l.n)) ORDER BY n"
)
"""What a newer record stands behind; the one that is about to be added counts."""
DROPPED_KEPT = 10_000
"""Names of dropped records that are kept; their number is exact whatever it is."""
POLICIES = ("refuse", "drop-oldest")

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True, slots=True)
class Dropped:
    """A record that made room for a newer one of its agent."""

    agent: str
    id: str
    kind: str
    bytes: int
    created_at: float


class SpoolDropped(DrError):
    """Records were dropped to make room. Not raised: it stands in the ``error`` of the Ack of the record that was kept."""

    code = "spool_dropped"


class Spool:
    """Thread-safe; every call is short but syncs the disk, so async callers use a thread. ``max_bytes``: of bodies, and 512 for
    each record. ``when_full``: see the module. Raises Misconfigured, Unavailable."""

    def __init__(self, path: Path | str, *, max_bytes: int = 256 * 2**20, when_full: str = "refuse") -> None:
        if when_full not in POLICIES:
            raise Misconfigured(f"when_full {when_full!r} is none of {', '.join(POLICIES)}", hint="choose one of them")
        self._lock = threading.Lock()
        self._max = max_bytes
        self._drops = when_full == "drop-oldest"
        try:
            if str(path) not in ("", ":memory:"):
                _for_us_alone(Path(path))
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise Unavailable(
                f"spool {path}: {error}", hint="check the disk and the file's owner; one process per file"
            ) from error
        self._bytes = 0
        self._waiting: dict[str, int] = {}
        self._count()

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

    def add(self, letter: Letter) -> SpoolDropped | None:
        """On disk when it returns; the same record again is fine. Returns what was dropped for it, if anything.
        Raises SpoolFull, Conflict (same id, another body)."""
        with self._lock:
            known = self._one("SELECT body FROM letters WHERE agent=? AND id=?", (letter.agent, letter.id))
            if known is not None:
                if known[0] != letter.body:
                    raise Conflict(
                        f"record {letter.id!a} of agent {letter.agent!a} is spooled with another body", hint="use a new id"
                    )
                return None
            size = len(letter.body) + OVERHEAD
            victims = self._victims(letter, self._bytes + size - self._max)
            values = (letter.agent, letter.id, letter.kind, letter.body, letter.parent, letter.created_at)
            more = (letter.copies, letter.attempt, msgspec.json.encode(dict(letter.meta)))
            with self._transaction():
                for n, *names in victims:
                    self._run("INSERT INTO dropped (agent, id, kind, bytes, created_at) VALUES (?,?,?,?,?)", tuple(names))
                    self._run("DELETE FROM letters WHERE n=?", (n,))
                if victims:
                    self._run("DELETE FROM dropped WHERE n <= (SELECT max(n) FROM dropped) - ?", (DROPPED_KEPT,))
                self._run(_INSERT, values + more)
            for victim in victims:
                self._bytes -= victim[4] + OVERHEAD
                self._less(victim[1])
            self._bytes += size
            self._waiting[letter.agent] = self._waiting.get(letter.agent, 0) + 1
        return _told(letter, victims) if victims else None

    def _victims(self, letter: Letter, needed: int) -> list[tuple[Any, ...]]:
        """What makes room for so many bytes more. Raises SpoolFull."""
        victims: list[tuple[Any, ...]] = []
        free = 0
        if needed > 0 and self._drops and needed <= self._bytes:
            for row in self._all(_SUPERSEDED, (letter.agent, letter.kind)):
                if free >= needed:
                    break
                victims.append(row)
                free += row[4] + OVERHEAD
        if free < needed:
            raise SpoolFull(
                f"{len(letter.body) + OVERHEAD} bytes more, for agent {letter.agent!a}, pass the bound: "
                f"{self._bytes} of {self._max} are used by {sum(self._waiting.values())} records that wait",
                hint="pause this agent until a controller answers; look at rejected() records, or allow more max_bytes",
            )
        return victims

    def first(self, agent: str, max_records: int = 1, max_bytes: int = 0) -> list[tuple[int, Letter]]:
        """The oldest records of the agent that wait, with their numbers: so many and so large, but one in any case."""
        found: list[tuple[int, Letter]] = []
        size = 0
        with self._lock:
            try:
                rows = self._db.execute(_FIRST, (agent, max_records))
                for row in rows:
                    size += len(row[4]) + OVERHEAD
                    if found and size > max_bytes:
                        break
                    found.append((row[0], _letter(row[1:])))
            except sqlite3.Error as error:
                raise _failed(error) from error
        return found

    def settle(self, taken: Sequence[int], refused: Sequence[tuple[int, str]] = ()) -> None:
        """Numbers of records that were acknowledged, and of those that a controller refused, with why: these are set aside."""
        with self._lock, self._transaction():
            for n in taken:
                self._remove(n)
            for n, why in refused:
                row = self._one("SELECT agent FROM letters WHERE n=? AND rejected IS NULL", (n,))
                if row is not None:
                    self._run("UPDATE letters SET rejected=? WHERE n=?", (why, n))
                    self._less(row[0])

    def remove(self, n: int) -> None:
        """A person looked at the rejected one."""
        self.settle([n])

    def _remove(self, n: int) -> None:
        row = self._one("SELECT agent, length(body), rejected FROM letters WHERE n=?", (n,))
        if row is not None:
            self._run("DELETE FROM letters WHERE n=?", (n,))
            self._bytes -= row[1] + OVERHEAD
            if row[2] is None:
                self._less(row[0])

    def dropped(self) -> tuple[Dropped, ...]:
        """Records that made room for newer ones, oldest first; the names of the last 10,000."""
        with self._lock:
            rows = self._all("SELECT agent, id, kind, bytes, created_at FROM dropped ORDER BY n", ())
        return tuple(Dropped(*row) for row in rows)

    def dropped_count(self) -> int:
        """How many were dropped since the file was made."""
        with self._lock:
            row = self._one("SELECT max(n) FROM dropped", ())
        return int(row[0] or 0) if row is not None else 0

    def rejected(self) -> tuple[Rejected, ...]:
        """Refused records, oldest first."""
        with self._lock:
            rows = self._all(_REJECTED, ())
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

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing on the disk. What is counted in memory is right after a failure too: it is read anew."""
        self._run("BEGIN IMMEDIATE", ())
        try:
            yield
            self._run("COMMIT", ())
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            self._count()
            raise

    def _count(self) -> None:
        rows = self._all("SELECT agent, length(body), rejected FROM letters", ())
        self._bytes = sum(size + OVERHEAD for _, size, _ in rows)
        self._waiting = {}
        for agent, _, rejected in rows:
            if rejected is None:
                self._waiting[agent] = self._waiting.get(agent, 0) + 1

    def _all(self, sql: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise _failed(error) from error

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


def _told(letter: Letter, victims: Sequence[tuple[Any, ...]]) -> SpoolDropped:
    names = ", ".join(f"{victim[2]!a} of {victim[1]!a}" for victim in victims[:3])
    told = SpoolDropped(
        f"the spool is full: {len(victims)} older records made room for {letter.id!a} of agent {letter.agent!a}: {names}"
        + (f" and {len(victims) - 3} more" if len(victims) > 3 else ""),
        hint="they will never be in the history: bring a controller back, or allow more max_bytes; Spool.dropped() lists them",
    )
    logger.warning("%s", told.message)
    return told


def _for_us_alone(path: Path) -> None:
    """It holds bodies in the clear: mode 0600, before anything is in it; SQLite gives its further files the same."""
    with contextlib.suppress(OSError):  # SQLite says better what is wrong with a path
        path.touch(mode=0o600)
        path.chmod(0o600)


def _failed(error: sqlite3.Error) -> Unavailable:
    return Unavailable(f"the local spool failed: {error}", hint="check the disk; the record is not kept anywhere")


def _letter(row: tuple[Any, ...]) -> Letter:
    agent, record_id, kind, body, parent, created_at, copies, attempt, meta = row
    return Letter(
        agent, record_id, kind, body, parent, created_at, copies, attempt, msgspec.json.decode(meta, type=dict[str, str])
    )
