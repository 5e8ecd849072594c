"""Index snapshots: the rows that a view needs to go on from a segment, as one object. ``FORMAT.md`` describes every byte.

A snapshot is a shortcut, never a proof. The head of the store names it with its hash and with the chain at its segment, and
the follower compares that chain with the history; bodies that no one of this instance has read back count as not proven.
Made and loaded in pages, with a breath in between: the loop that does it also keeps a lease.
"""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from controller.domain.model import NamedSnapshot
from controller.errors import Corrupt, DrError
from controller.stream.indexing import ALWAYS_WARM, WARM_KINDS
from controller.stream.limits import is_hash
from controller.stream.live import is_ruled
from controller.stream.tables import Tables
from controller.stream.view import View

if TYPE_CHECKING or sys.version_info < (3, 14):
    from backports import zstd
else:
    from compression import zstd

MAGIC = b"DRSNP\x00" + (1).to_bytes(2, "big")
PAGE_ROWS = 2000
PAGE_MAX_BYTES = 64 * 2**20
"""Of a page once it is decompressed: a page that says more is damage, or worse."""
_LENGTH = struct.Struct(">I")
_HASH_BYTES = 32
_BAD_BYTES = (
    msgspec.MsgspecError, ValueError, TypeError, LookupError, RecursionError, OverflowError, struct.error, sqlite3.Error,
    zstd.ZstdError,
)  # fmt: skip
SEGMENTS, RECORDS, COPIES, CONFLICTS = range(4)

_RECORD_COLUMNS = (
    "a.name, r.id, r.kind, r.parent, r.seq, r.ordinal, r.ord, r.sha256, r.size, r.received_at, r.created_at, r.attempt, "
    "r.copies, r.encoding, r.base, r.depth, r.verified ISNULL, r.meta, r.place, r.length"
)


class SnapshotHeader(msgspec.Struct, frozen=True):
    """What a snapshot is of. The rows are those of ``base … seq``; ``rows``: how many of each table."""

    group: str
    stream: str
    seq: int
    chain: str
    base: int
    base_chain: str
    created_at: float
    rows: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot whose hash was checked; its pages are looked at when they are loaded."""

    header: SnapshotHeader
    data: bytes
    first: int
    """Where the first page begins."""


# ---------------------------------------------------------------------------------------------------------------- making


async def make_snapshot(view: View, group: str, stream: str, created_at: float) -> tuple[SnapshotHeader, bytes]:
    """The snapshot of a view at its present position. The view may grow meanwhile; it must not be rewound or forget."""
    seq, chain = view.position(stream)
    floor, floor_chain = view.floor(stream)
    no = int(view.tables.one("SELECT no FROM streams WHERE name=?", (stream,))[0])
    pages: list[bytes] = []
    counts = [0, 0, 0, 0]
    for table, rows in _pages(view.tables, no, seq):
        page = msgspec.msgpack.encode((table, rows))
        pages.append(zstd.compress(page))
        counts[table] += len(rows)
        await asyncio.sleep(0)
    header = SnapshotHeader(group, stream, seq, chain, floor + 1, floor_chain, created_at, (*counts,))  # type: ignore[arg-type]
    return header, await asyncio.to_thread(_seal, header, pages)


def _seal(header: SnapshotHeader, pages: Sequence[bytes]) -> bytes:
    encoded = msgspec.msgpack.encode(header)
    parts = [MAGIC, _LENGTH.pack(len(encoded)), encoded]
    for page in pages:
        parts += [_LENGTH.pack(len(page)), page]
    data = b"".join(parts)
    return data + hashlib.sha256(data).digest()


@dataclass(frozen=True, slots=True)
class _Query:
    """How one table is read, page by page: after the key of the last row, which are columns of it."""

    table: int
    sql: str
    key: tuple[int, ...]
    """Columns of the key in a row."""
    columns: int
    """Columns that are written; the others are the key's alone."""


_QUERIES = (
    _Query(
        SEGMENTS,
        "SELECT seq, chain, epoch, records, bytes, at, reach FROM segments WHERE stream=:no AND seq<=:upto AND seq>:k0 "
        "ORDER BY seq LIMIT :limit",
        (0,),
        7,
    ),
    _Query(
        RECORDS,
        f"SELECT {_RECORD_COLUMNS}, r.agent, r.no FROM records r JOIN agents a ON a.no=r.agent "  # noqa: S608 - fixed names
        "WHERE r.stream=:no AND r.seq<=:upto AND (r.agent, r.ord, r.no)>(:k0, :k1, :k2) "
        "ORDER BY r.agent, r.ord, r.no LIMIT :limit",
        (20, 6, 21),
        20,
    ),
    _Query(
        COPIES,
        "SELECT d.seq, d.ordinal, a.name, r.id, d.base, d.depth, d.place, d.length FROM duplicates d "
        "JOIN records r ON r.no=d.record JOIN agents a ON a.no=r.agent WHERE d.stream=:no AND d.seq<=:upto "
        "AND (d.seq, d.ordinal)>(:k0, :k1) ORDER BY d.seq, d.ordinal LIMIT :limit",
        (0, 1),
        8,
    ),
    _Query(
        CONFLICTS,
        "SELECT seq, ordinal, agent, id FROM conflicts WHERE stream=:no AND seq<=:upto AND (seq, ordinal)>(:k0, :k1) "
        "ORDER BY seq, ordinal LIMIT :limit",
        (0, 1),
        4,
    ),
)


def _pages(tables: Tables, no: int, upto: int) -> Iterator[tuple[int, list[Any]]]:
    """Every page of rows as of segment ``upto``: segments, records (by agent, in their order), copies of records, conflicts."""
    for query in _QUERIES:
        key = (-1,) * len(query.key)
        while True:
            after = {f"k{number}": part for number, part in enumerate(key)}
            rows = tables.all(query.sql, {"no": no, "upto": upto, "limit": PAGE_ROWS, **after})
            if rows:
                yield query.table, [row[: query.columns] for row in rows]
                key = tuple(rows[-1][column] for column in query.key)
            if len(rows) < PAGE_ROWS:
                break


# --------------------------------------------------------------------------------------------------------------- opening


def open_snapshot(data: bytes, named: NamedSnapshot, group: str, stream: str) -> Snapshot:
    """Checks the hash that the head names, and that this is the snapshot that it means. Raises Corrupt."""
    if hashlib.sha256(data).hexdigest() != named.sha256:
        _bad("its SHA-256 is not the one that the head names")
    body = len(data) - _HASH_BYTES
    if data[: len(MAGIC)] != MAGIC:
        _bad(f"it begins with {bytes(data[:8])!a}; this program reads version 1")
    if body < len(MAGIC) + _LENGTH.size or hashlib.sha256(memoryview(data)[:body]).digest() != data[body:]:
        _bad("the SHA-256 at its end does not match")
    (length,) = _LENGTH.unpack_from(data, len(MAGIC))
    first = len(MAGIC) + _LENGTH.size + length
    if first > body:
        _bad("its header does not fit")
    try:
        header = msgspec.msgpack.decode(data[len(MAGIC) + _LENGTH.size : first], type=SnapshotHeader)
    except _BAD_BYTES as error:
        _bad(f"its header is not readable: {error}")
    said = (header.group, header.stream, header.seq, header.chain)
    if said != (group, stream, named.seq, named.chain):
        _bad(f"it says that its group, stream, segment and chain are {said!a}")
    if not 1 <= header.base <= header.seq + 1 or not is_hash(header.base_chain):
        _bad(f"it begins at {header.base} with chain {header.base_chain[:80]!a}")
    return Snapshot(header, data, first)


def _pages_of(snapshot: Snapshot) -> Iterator[tuple[int, list[list[Any]]]]:
    """Raises Corrupt."""
    at, end = snapshot.first, len(snapshot.data) - _HASH_BYTES
    while at < end:
        try:
            (length,) = _LENGTH.unpack_from(snapshot.data, at)
            at += _LENGTH.size
            if at + length > end:
                _bad(f"a page of {length} bytes at {at} does not fit")
            raw = zstd.ZstdDecompressor().decompress(snapshot.data[at : at + length], max_length=PAGE_MAX_BYTES)
            at += length
            table, rows = msgspec.msgpack.decode(raw, type=tuple[int, list[list[Any]]])
        except _BAD_BYTES as error:
            _bad(f"the page at {at} is not readable: {error}")
        yield table, rows


async def load_snapshot(view: View, snapshot: Snapshot) -> None:
    """Replaces what the view has of the stream. Raises Corrupt (the stream is empty then and begins at the snapshot's base)."""
    header = snapshot.header
    view.reset(header.stream, header.base - 1, header.base_chain)
    loader = _Loader(view.tables, header)
    try:
        for table, rows in _pages_of(snapshot):
            with view.tables.transaction():
                loader.page(table, rows)
            await asyncio.sleep(0)
        with view.tables.transaction():
            loader.finish()
    except _BAD_BYTES as error:
        view.reset(header.stream, header.base - 1, header.base_chain)
        raise Corrupt(
            f"the snapshot at segment {header.seq}: {error}", hint="an older one, or the segments, will do"
        ) from error
    except DrError:
        view.reset(header.stream, header.base - 1, header.base_chain)
        raise


class _Loader:
    """Puts rows in, agent by agent. Half of it is never seen: the stream's row says that it is loading."""

    def __init__(self, tables: Tables, header: SnapshotHeader) -> None:
        self._tables = tables
        self._header = header
        self._no = int(tables.one("SELECT no FROM streams WHERE name=?", (header.stream,))[0])
        self._counts = [0, 0, 0, 0]
        self._agent = ""
        self._agent_no = 0
        self._agent_rows = 0
        self._ruled = False
        self._latest = (-1, 0)
        self._newest: dict[str, list[tuple[int, int]]] = {}
        tables.run("UPDATE streams SET loading=1 WHERE no=?", (self._no,))

    def page(self, table: int, rows: list[list[Any]]) -> None:
        """One page, inside of the caller's transaction."""
        self._counts[table] += len(rows)
        if table == SEGMENTS:
            self._tables.many("INSERT INTO segments VALUES (?, ?, ?, ?, ?, ?, ?, ?)", [(self._no, *row) for row in rows])
        elif table == RECORDS:
            self._records(rows)
        elif table == COPIES:
            for seq, ordinal, agent, record_id, base, depth, place, length in rows:
                added = self._tables.run(
                    "INSERT INTO duplicates SELECT ?, ?, ?, r.no, ?, ?, ?, ? FROM records r JOIN agents a ON a.no=r.agent "
                    "WHERE a.name=? AND r.id=?",
                    (self._no, seq, ordinal, base, depth, place, length, agent, record_id),
                )
                if added != 1:
                    raise ValueError(f"a copy of record {record_id!a} of agent {agent!a} is named, and not the record")
        else:
            self._tables.many("INSERT INTO conflicts VALUES (?, ?, ?, ?, ?)", [(self._no, *row) for row in rows])

    def _records(self, rows: list[list[Any]]) -> None:
        no = int(self._tables.one("SELECT coalesce(max(no), 0) FROM records")[0])
        added: list[tuple[Any, ...]] = []
        for row in rows:
            no += 1
            agent, record_id, kind, parent, seq, ordinal, order, sha256, size = row[:9]
            received_at, created_at, attempt, copies, encoding, base, depth, lost, meta, place, length = row[9:]
            if agent != self._agent:
                self._close_agent()
                self._open_agent(agent)
            if not self._ruled:
                self._ruled = is_ruled(kind, msgspec.msgpack.decode(meta, type=dict[str, str]) if meta else {})
            self._agent_rows += 1
            self._latest = max(self._latest, (order, no))
            newest = self._newest.setdefault(kind, [])
            newest.append((order, no))
            del newest[:-2]
            added.append(
                (
                    no, self._agent_no, record_id, kind, parent, self._no, seq, ordinal, order, sha256, size, received_at,
                    created_at, attempt, copies, encoding, base, depth, None if lost else 0, meta, place, length,
                )
            )  # fmt: skip
        self._tables.many(f"INSERT INTO records VALUES ({','.join('?' * 22)})", added)  # noqa: S608 - question marks only

    def _open_agent(self, name: str) -> None:
        self._tables.run("INSERT OR IGNORE INTO agents (name, records, latest_ord) VALUES (?, 0, -1)", (name,))
        self._agent, self._agent_rows, self._ruled, self._latest, self._newest = name, 0, False, (-1, 0), {}
        self._agent_no = int(self._tables.one("SELECT no FROM agents WHERE name=?", (name,))[0])

    def _close_agent(self) -> None:
        if not self._agent:
            return
        self._tables.run(
            "UPDATE agents SET records=records+?, latest=?, latest_ord=?, ruled=? WHERE no=?",
            (self._agent_rows, self._latest[1], self._latest[0], int(self._ruled), self._agent_no),
        )
        others = 0
        for kind, newest in self._newest.items():
            others += kind not in ALWAYS_WARM
            warm = kind in ALWAYS_WARM or others <= WARM_KINDS
            (order, no), second = newest[-1], newest[-2] if len(newest) > 1 else (None, None)
            self._tables.run(
                "INSERT INTO heads VALUES (?, ?, ?, ?, ?, ?, ?)", (self._agent_no, kind, no, order, second[1], second[0], warm)
            )

    def finish(self) -> None:
        """Raises ValueError when rows are missing."""
        self._close_agent()
        header = self._header
        if tuple(self._counts) != header.rows:
            raise ValueError(f"it has {self._counts} rows and says {header.rows}")
        last = self._tables.one("SELECT chain FROM segments WHERE stream=? AND seq=?", (self._no, header.seq))
        if header.seq >= header.base and (last is None or last[0] != header.chain):
            raise ValueError("its last segment does not have its chain")
        self._tables.run(
            "UPDATE streams SET seq=?, chain=?, records=?, loading=0 WHERE no=?",
            (header.seq, header.chain, self._counts[RECORDS], self._no),
        )


def _bad(what: str) -> NoReturn:
    raise Corrupt(f"the snapshot is refused: {what}", hint="an older one, or the segments, will do")
