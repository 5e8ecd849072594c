"""The view's SQLite file: its tables, how it is opened, how its errors are told, how bodies lie in it.

The file is a cache of what the region's store holds, so durability is not asked of it (``synchronous=NORMAL`` may lose the
last transactions at a power cut and never a part of one): whatever is missing or damaged is read again from the store.
One connection in exclusive mode: no second process can see half of anything, and SQLite's WAL needs no shared memory.
"""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controller.errors import Corrupt, Misconfigured, Unavailable

if TYPE_CHECKING or sys.version_info < (3, 14):
    from backports import zstd
else:
    from compression import zstd

SCHEMA_VERSION = 3
"""Raise it with every change of the tables: older files are dropped and rebuilt from the store."""
_APPLICATION_ID = 0x44525657  # "DRVW"

_TABLES = """
-- loading: rows of a snapshot are being put in; until that is over the copy begins and ends at its floor.
CREATE TABLE streams (
    no INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, seq INTEGER NOT NULL, chain TEXT NOT NULL,
    floor_seq INTEGER NOT NULL, floor_chain TEXT NOT NULL, records INTEGER NOT NULL, loading INTEGER NOT NULL DEFAULT 0);
-- at: when the holder closed the segment; reach: the earliest segment that a delta in it stands on (its own seq: none).
CREATE TABLE segments (
    stream INTEGER NOT NULL, seq INTEGER NOT NULL, chain TEXT NOT NULL, epoch INTEGER NOT NULL,
    records INTEGER NOT NULL, bytes INTEGER NOT NULL, at REAL NOT NULL, reach INTEGER NOT NULL,
    PRIMARY KEY (stream, seq)) WITHOUT ROWID;
-- ruled: whether records of it say how they stand to others (live.py).
CREATE TABLE agents (
    no INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, records INTEGER NOT NULL, latest INTEGER, latest_ord INTEGER NOT NULL,
    ruled INTEGER NOT NULL DEFAULT 0);
-- ord: order among the records of an agent (place of first appearance in the history); verified: seq at which the body was
-- decoded and hashed; 0: it lies in the store and was not read back here yet (the row came from a snapshot); NULL while its
-- base lies before the part of history that this copy has. place, length: bytes of the frame in its segment's object.
CREATE TABLE records (
    no INTEGER PRIMARY KEY, agent INTEGER NOT NULL, id TEXT NOT NULL, kind TEXT NOT NULL, parent TEXT,
    stream INTEGER NOT NULL, seq INTEGER NOT NULL, ordinal INTEGER NOT NULL, ord INTEGER NOT NULL,
    sha256 BLOB NOT NULL, size INTEGER NOT NULL, received_at REAL NOT NULL, created_at REAL NOT NULL,
    attempt INTEGER NOT NULL, copies INTEGER NOT NULL, encoding TEXT NOT NULL, base TEXT, depth INTEGER NOT NULL,
    verified INTEGER, meta BLOB, place INTEGER NOT NULL, length INTEGER NOT NULL);
CREATE UNIQUE INDEX records_id ON records (agent, id);
CREATE INDEX records_place ON records (stream, seq, ordinal);
CREATE INDEX records_order ON records (agent, ord);
CREATE INDEX records_lost ON records (agent) WHERE verified IS NULL;
-- Later frames of records that are known already: carried forward by retention, or sent twice.
CREATE TABLE duplicates (
    stream INTEGER NOT NULL, seq INTEGER NOT NULL, ordinal INTEGER NOT NULL, record INTEGER NOT NULL,
    base TEXT, depth INTEGER NOT NULL, place INTEGER NOT NULL, length INTEGER NOT NULL,
    PRIMARY KEY (stream, seq, ordinal)) WITHOUT ROWID;
CREATE INDEX duplicates_record ON duplicates (record);
CREATE TABLE conflicts (
    stream INTEGER NOT NULL, seq INTEGER NOT NULL, ordinal INTEGER NOT NULL, agent TEXT NOT NULL, id TEXT NOT NULL,
    PRIMARY KEY (stream, seq, ordinal)) WITHOUT ROWID;
-- The newest two records of an agent and kind; warm: whether their bodies are kept.
CREATE TABLE heads (
    agent INTEGER NOT NULL, kind TEXT NOT NULL, record INTEGER NOT NULL, ord INTEGER NOT NULL,
    record2 INTEGER, ord2 INTEGER, warm INTEGER NOT NULL, PRIMARY KEY (agent, kind)) WITHOUT ROWID;
CREATE INDEX heads_kind ON heads (kind, agent);
CREATE TABLE warm (record INTEGER PRIMARY KEY, packed INTEGER NOT NULL, body BLOB NOT NULL);
"""

_PACK_FROM_BYTES = 4096
"""Smaller bodies lie raw: compressing 2 KB costs as much as everything else that is done with it."""
WARM_MAX_BYTES = 8 * 2**20
"""Larger bodies are not kept warm: writing them would stop the event loop for longer than a heartbeat can wait. They are proven
all the same, and read from the store with one GET."""
_PACK_OPTIONS: dict[int, int] = {zstd.CompressionParameter.compression_level: 1}


@contextmanager
def told(path: Path | None) -> Iterator[None]:
    """SQLite's errors as ours: Unavailable for what waiting or an operator helps against, Corrupt for a damaged file."""
    where = "the view in memory" if path is None else f"the view {path}"
    try:
        yield
    except sqlite3.OperationalError as error:
        raise Unavailable(
            f"{where}: {error}", hint="check disk space, permissions and that no other process uses it"
        ) from error
    except sqlite3.DatabaseError as error:
        raise Corrupt(f"{where}: {error}", hint="restart; a damaged view is set aside and rebuilt from the store") from error


class Tables:
    """The connection and the three ways in which it is used. Not for two threads at once."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        with told(path):
            self._connection = _open(path)

    def all(self, sql: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        """Every row."""
        with told(self.path):
            return self._connection.execute(sql, values).fetchall()

    def one(self, sql: str, values: Sequence[Any] = ()) -> Any:
        """The first row or None. Row shapes are checked by the tests, not by the type checker."""
        try:  # not ``told``: this runs several times for each record of a segment
            return self._connection.execute(sql, values).fetchone()
        except sqlite3.DatabaseError:
            with told(self.path):
                raise

    def many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """One statement for each row."""
        with told(self.path):
            self._connection.executemany(sql, rows)

    def run(self, sql: str, values: Sequence[Any] = ()) -> int:
        """Returns the number of rows that it changed."""
        with told(self.path):
            return self._connection.execute(sql, values).rowcount

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing."""
        self.run("BEGIN IMMEDIATE")
        try:
            yield
            self.run("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.rollback()
            raise

    def function(self, name: str, arguments: int, answer: Callable[..., Any]) -> None:
        """A function of ours for use in SQL."""
        self._connection.create_function(name, arguments, answer)

    def close(self) -> None:
        self._connection.close()


_INSPECTING = ("locking_mode=EXCLUSIVE",)
"""Nothing that would change a file of another program."""
_WORKING = (
    "page_size=16384",  # of a new file; bodies of 80 KB cost half of what they do with pages of 4 KB
    "locking_mode=EXCLUSIVE",
    "journal_mode=WAL",
    "synchronous=NORMAL",
    "wal_autocheckpoint=4000",
    "journal_size_limit=67108864",
    "cache_size=-32768",
    "temp_store=MEMORY",
)


def _connect(path: Path | None, pragmas: Sequence[str]) -> sqlite3.Connection:
    connection = sqlite3.connect(
        ":memory:" if path is None else path,
        isolation_level=None,
        check_same_thread=False,
        timeout=0.0,  # exclusive: whoever has it keeps it, waiting would only stop the loop
        cached_statements=256,
    )
    try:
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")
    except BaseException:
        connection.close()
        raise
    return connection


def _open(path: Path | None) -> sqlite3.Connection:
    """An open view of this schema, new where the old one is damaged (set aside as ``….damaged``) or of another version."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = _inspect(path)
        if state == "damaged":
            path.replace(path.with_name(path.name + ".damaged"))
        if state in {"damaged", "old"}:
            for suffix in ("", "-wal", "-shm", "-journal"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
        _for_us_alone(path)
    connection = _connect(path, _WORKING)
    if connection.execute("PRAGMA user_version").fetchone()[0] != SCHEMA_VERSION:
        connection.executescript(
            f"BEGIN; {_TABLES} PRAGMA application_id={_APPLICATION_ID}; PRAGMA user_version={SCHEMA_VERSION}; COMMIT;"
        )
    return connection


def _for_us_alone(path: Path) -> None:
    """It holds bodies in the clear: mode 0600, before anything is in it; SQLite gives its further files the same."""
    with contextlib.suppress(OSError):  # SQLite says better what is wrong with a path
        path.touch(mode=0o600)
        path.chmod(0o600)


def _inspect(path: Path) -> str:
    """``new``, ``good``, ``old`` (another version of ours) or ``damaged``. Raises Misconfigured for somebody else's file."""
    if not path.exists() or path.stat().st_size == 0:
        return "new"
    connection: sqlite3.Connection | None = None
    try:
        connection = _connect(path, _INSPECTING)
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        sound = connection.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok"
    except sqlite3.OperationalError:
        raise  # locked, not readable: nothing is known about the content
    except (sqlite3.DatabaseError, UnicodeDecodeError):  # the latter: inside of the schema's own text
        return "damaged"
    finally:
        if connection is not None:
            connection.close()
    if not sound:
        return "damaged"
    if application not in {0, _APPLICATION_ID} or (application == 0 and tables):
        raise Misconfigured(f"{path} is an SQLite file of another program", hint="let state_dir name a directory of its own")
    if version == SCHEMA_VERSION:
        return "good"
    return "old" if tables else "new"


def pack(body: bytes) -> tuple[int, bytes]:
    """How a warm body lies in the file: (1, zstd) or (0, raw)."""
    if len(body) >= _PACK_FROM_BYTES:
        packed = zstd.compress(body, options=_PACK_OPTIONS)
        if len(packed) * 10 <= len(body) * 9:
            return 1, packed
    return 0, body


def unpack(packed: int, stored: bytes, size: int) -> bytes:
    """The body again. Raises ValueError or ZstdError when the stored bytes are not what ``pack`` made; the caller hashes."""
    return zstd.ZstdDecompressor().decompress(stored, max_length=size + 1) if packed else stored


BAD_BODY = (ValueError, zstd.ZstdError)
