"""What the view knows of agents and their records: who has which, where they lie, and the bodies that are warm.

Questions only, synchronous and short: the loop that keeps the lease may ask between two heartbeats. Nothing here changes the
tables or reads a store; ``view`` does the one, ``reader`` the other. What the words mean is told in ``view``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import msgspec

from controller.domain.model import GENESIS, Encoding, Kind, Record, SegmentRef
from controller.errors import Corrupt, NotFound, Unavailable
from controller.stream.live import NEEDS, whole
from controller.stream.segment import Segment
from controller.stream.tables import BAD_BODY, WARM_MAX_BYTES, Tables, unpack
from controller.stream.warmth import Warmth

_RECORD = (
    "a.name, r.id, r.kind, r.sha256, r.size, r.parent, r.created_at, r.received_at, r.copies, r.attempt, r.meta, "
    "r.seq, r.ordinal, r.no, r.verified"
)
_FROM = "FROM records r JOIN agents a ON a.no = r.agent"
_PAGE = 500


@dataclass(frozen=True, slots=True)
class AgentSummary:
    """One agent as this copy has it. ``latest_*``, ``received_at`` and ``attempt`` are of its newest record of any kind."""

    agent: str
    records: int
    latest_id: str
    latest_kind: str
    latest_seq: int
    received_at: float
    attempt: int


@dataclass(frozen=True, slots=True)
class Link:
    """One step of a chain of deltas: a record, a frame that holds it, and the record that this frame stands on."""

    record: Record
    ref: SegmentRef
    ordinal: int
    base: str | None


class Records:
    """The half of ``View`` that only reads."""

    def __init__(self, tables: Tables, warmth: Warmth) -> None:
        self._tables = tables
        self._warmth = warmth

    @property
    def tables(self) -> Tables:
        """For the questions of ``stream/past.py`` and ``stream/verify.py``, which only read."""
        return self._tables

    # --------------------------------------------------------------------------------------------------------- reading

    def agents(self, stream: str | None = None) -> tuple[AgentSummary, ...]:
        """All agents by name; only those whose newest record is in ``stream`` when it is given."""
        sql = (
            "SELECT a.name, a.records, r.id, r.kind, r.seq, r.received_at, r.attempt "
            "FROM agents a JOIN records r ON r.no = a.latest"
        )
        values: tuple[Any, ...] = ()
        if stream is not None:
            sql, values = f"{sql} WHERE r.stream=?", (self._stream(stream)[0],)
        return tuple(AgentSummary(*row) for row in self._tables.all(f"{sql} ORDER BY a.name", values))

    def agent_page(
        self, *, after: str = "", prefix: str = "", newest: bool = False, limit: int = 1000
    ) -> tuple[AgentSummary, ...]:
        """So many agents at most, without the controllers' own: by name, those ``after`` one; or those with the newest records
        first. ``prefix``: of the name. Names are compared by code point."""
        values: list[Any] = [Kind.CANARY, Kind.OPENING, prefix]
        where = "no NOT IN (SELECT agent FROM heads WHERE kind IN (?, ?)) AND name >= ?"
        if prefix:
            where, values = f"{where} AND name < ?", [*values, prefix + chr(0x10FFFF)]
        if after and not newest:
            where, values = f"{where} AND name > ?", [*values, after]
        order = "latest_ord DESC, name" if newest else "name"
        page = f"SELECT * FROM agents WHERE {where} ORDER BY {order} LIMIT ?"  # noqa: S608 - own texts
        columns = "a.name, a.records, r.id, r.kind, r.seq, r.received_at, r.attempt"
        sql = f"SELECT {columns} FROM ({page}) a JOIN records r ON r.no = a.latest ORDER BY {order}"  # noqa: S608 - own texts
        rows = self._tables.all(sql, (*values, limit))
        return tuple(AgentSummary(*row) for row in rows)

    def agent_count(self) -> int:
        """Number of agents, without the controllers' own."""
        own = "SELECT count(DISTINCT agent) FROM heads WHERE kind IN (?, ?)"
        sql = f"SELECT (SELECT count(*) FROM agents) - ({own})"  # noqa: S608 - own texts
        return int(self._tables.one(sql, (Kind.CANARY, Kind.OPENING))[0])

    def find(self, agent: str, id: str) -> tuple[str, int] | None:  # noqa: A002 - the word that Record uses
        """SHA-256 of a record's body and the segment in which it first stood; None for an unknown record."""
        row = self._tables.one(
            "SELECT r.sha256, r.seq FROM records r JOIN agents a ON a.no = r.agent WHERE a.name=? AND r.id=?", (agent, id)
        )
        return None if row is None else (row[0].hex(), int(row[1]))

    def has(self, agent: str, id: str) -> str | None:  # noqa: A002
        """SHA-256 of a record's body; None for an unknown record."""
        found = self.find(agent, id)
        return None if found is None else found[0]

    def record(self, agent: str, id: str) -> Record | None:  # noqa: A002
        """The record without its body."""
        row = self._row(agent, id)
        return None if row is None else record_of(row)

    def read(self, agent: str, id: str) -> tuple[Record, bytes] | None:  # noqa: A002
        """Record and body when the body is warm. None when the record is not known *or its body is not warm*: ``record`` or
        ``has`` tells the two apart, ``reader.read_record`` serves both. Raises Corrupt when the warm body is damaged."""
        row = self._row(agent, id)
        body = None if row is None else self._warm(row)
        return None if body is None else (record_of(row), body)

    def latest_record(self, agent: str, kind: str = Kind.CHECKPOINT) -> Record | None:
        """The newest record of a kind without its body; None when the agent has none."""
        row = self._newest(agent, kind)
        return None if row is None else record_of(row)

    def newest(self, agent: str) -> tuple[Record, int] | None:
        """The newest record of any kind, and the segment in which it stood first; None when the agent has none."""
        row = self._tables.one(
            f"SELECT {_RECORD}, r.ord FROM agents a JOIN records r ON r.no = a.latest WHERE a.name=?",  # noqa: S608 - own texts
            (agent,),
        )
        return None if row is None else (record_of(row), row[-1] >> 16)

    def latest(self, agent: str, kind: str = Kind.CHECKPOINT) -> tuple[Record, bytes] | None:
        """The newest record of a kind; None when the agent has none. Raises Unavailable when there is one whose body is not
        warm or could not be verified: never mistaken for an agent without state."""
        row = self._newest(agent, kind)
        return None if row is None else (record_of(row), self._warm_or_raise(row))

    def restorable(self, agent: str) -> Record | None:
        """The newest checkpoint that was decoded and hashed here with all that it stands on (``live.whole``: a state that is
        stored as changes needs its parents); None when there is none."""
        rows = self._tables.all(
            f"SELECT {_RECORD} {_FROM} WHERE a.name=? AND r.kind=? AND r.verified > 0 ORDER BY r.ord DESC, r.no DESC LIMIT 1",
            (agent, Kind.CHECKPOINT),
        )
        newest = record_of(rows[0]) if rows else None
        if newest is None or NEEDS not in newest.meta:
            return newest
        every = [
            record_of(row)
            for row in self._tables.all(
                f"SELECT {_RECORD} {_FROM} WHERE a.name=? AND r.verified > 0 ORDER BY r.ord DESC, r.no DESC", (agent,)
            )
        ]
        checkpoints = ((place, one) for place, one in enumerate(every) if one.kind == Kind.CHECKPOINT)
        return next((one for place, one in checkpoints if whole(one, islice(every, place + 1, None))), None)

    def kinds(self, kind: str) -> Iterator[tuple[Record, bytes]]:
        """The newest record of this kind for every agent that has one, by agent's name. Raises Unavailable like ``latest``."""
        for (no,) in self._tables.all(
            "SELECT h.record FROM heads h JOIN agents a ON a.no = h.agent WHERE h.kind=? ORDER BY a.name", (kind,)
        ):
            row = self._tables.one(f"SELECT {_RECORD} {_FROM} WHERE r.no=?", (no,))
            if row is not None:
                yield record_of(row), self._warm_or_raise(row)

    def records(self, agent: str, limit: int = 100, before: str | None = None) -> tuple[Record, ...]:
        """An agent's records, newest first; only those older than the record ``before``. Raises NotFound for an unknown
        ``before``."""
        older = "", ()
        if before is not None:
            mark = self._tables.one(
                "SELECT r.ord, r.no FROM records r JOIN agents a ON a.no = r.agent WHERE a.name=? AND r.id=?", (agent, before)
            )
            if mark is None:
                raise NotFound(f"agent {agent!a} has no record {before!a}", hint="list its records without `before`")
            older = " AND (r.ord, r.no) < (?, ?)", mark
        rows = self._tables.all(
            f"SELECT {_RECORD} {_FROM} WHERE a.name=?{older[0]} ORDER BY r.ord DESC, r.no DESC LIMIT ?",
            (agent, *older[1], limit),
        )
        return tuple(record_of(row) for row in rows)

    def tail(self, stream: str, after_seq: int) -> Iterator[tuple[int, Record]]:
        """(seq, record) of everything that first appeared in segments after ``after_seq``, in stream order, in pages."""
        no = self._stream(stream)[0]
        at = (after_seq, 1 << 30)
        while True:
            rows = self._tables.all(
                f"SELECT {_RECORD} {_FROM} WHERE r.stream=? AND (r.seq, r.ordinal) > (?, ?) "
                f"ORDER BY r.seq, r.ordinal LIMIT {_PAGE}",
                (no, *at),
            )
            for row in rows:
                yield int(row[11]), record_of(row)
            if len(rows) < _PAGE:
                return
            at = rows[-1][11], rows[-1][12]

    def reaches(self, agent: str, id: str, base: int) -> bool:  # noqa: A002
        """Whether the record can still be read once everything before segment ``base`` is deleted: it stands at or after it, or
        a whole frame of it does."""
        row = self._tables.one(
            "SELECT r.seq>=?1 OR EXISTS (SELECT 1 FROM duplicates d WHERE d.record=r.no AND d.stream=r.stream AND d.seq>=?1 "
            "AND d.base IS NULL) FROM records r JOIN agents a ON a.no = r.agent WHERE a.name=?2 AND r.id=?3",
            (base, agent, id),
        )
        return row is not None and bool(row[0])

    def chain_depth(self, agent: str, id: str) -> int | None:  # noqa: A002
        """How many deltas a reader of this record goes through: 0 for a whole body, None for an unknown record, ``MAX_CHAIN``
        when its own base is out of reach (do not build on it)."""
        row = self._tables.one(
            "SELECT r.depth FROM records r JOIN agents a ON a.no = r.agent WHERE a.name=? AND r.id=?", (agent, id)
        )
        return None if row is None else int(row[0])

    # -------------------------------------------------------------------------------------------- bodies, for the reader

    def link(self, agent: str, id: str) -> Link | None:  # noqa: A002
        """Where a frame of the record lies (a whole one if there is one, else the newest) and what it stands on; None when this
        copy has none."""
        row = self._row(agent, id)
        if row is None:
            return None
        places = self._tables.all(
            "SELECT d.base NOTNULL, s.name, d.seq, g.epoch, d.ordinal, d.base FROM duplicates d "
            "JOIN streams s ON s.no = d.stream JOIN segments g ON g.stream = d.stream AND g.seq = d.seq WHERE d.record=?1 "
            "UNION ALL "
            "SELECT r.base NOTNULL, s.name, r.seq, g.epoch, r.ordinal, r.base FROM records r "
            "JOIN streams s ON s.no = r.stream JOIN segments g ON g.stream = r.stream AND g.seq = r.seq WHERE r.no=?1 "
            "ORDER BY 1, 3 DESC, 5 DESC LIMIT 1",
            (row[13],),
        )
        if not places:
            return None
        _, name, seq, epoch, ordinal, base = places[0]
        return Link(record_of(row), SegmentRef(name, seq, epoch), ordinal, base)

    def check_warm(self, agent: str, id: str) -> None:  # noqa: A002
        """Reads and hashes a warm body, in memory and in the file. Raises Corrupt."""
        row = self._row(agent, id)
        if row is not None:
            self._warm(row)
            self._in_file(row)

    def begins_late(self, agent: str, id: str) -> bool:  # noqa: A002
        """Whether the record's stream begins after sequence 1 in this copy, so that what it stands on may rightly be absent."""
        row = self._tables.one(
            "SELECT s.floor_seq FROM streams s JOIN records r ON r.stream = s.no JOIN agents a ON a.no = r.agent "
            "WHERE a.name=? AND r.id=?",
            (agent, id),
        )
        return row is not None and row[0] > 0

    def cold(self, limit: int = 10_000) -> tuple[tuple[str, str, int], ...]:
        """(agent, id, size) of newest records that can be read and should be warm but are not (after a rewind or a snapshot),
        by the segment that they lie in."""
        return tuple(
            self._tables.all(
                "SELECT a.name, r.id, r.size FROM heads h JOIN records r ON r.no = h.record JOIN agents a ON a.no = h.agent "
                "LEFT JOIN warm w ON w.record = h.record "
                "WHERE h.warm=1 AND r.verified NOTNULL AND r.size <= ? AND w.record IS NULL AND NOT held(h.record) "
                "ORDER BY r.seq, r.ordinal LIMIT ?",
                (WARM_MAX_BYTES, limit),
            )
        )

    def awaits_proof(self, stream: str) -> bool:
        """Whether newest bodies came with a snapshot and were not read back from the store yet."""
        row = self._tables.one(
            "SELECT 1 FROM heads h JOIN records r ON r.no = h.record JOIN streams s ON s.no = r.stream "
            "LEFT JOIN warm w ON w.record = h.record WHERE h.warm=1 AND r.verified=0 AND w.record IS NULL "
            "AND NOT held(h.record) AND s.name=? LIMIT 1",
            (stream,),
        )
        return row is not None

    def missing(self, segment: Segment) -> tuple[tuple[str, str], ...]:
        """(agent, id) of the bodies that ``apply`` needs for this segment's deltas and does not have."""
        wanted: dict[tuple[str, str], None] = {}
        inside: set[tuple[str, str]] = set()
        for frame in segment.frames:
            agent = frame.record.agent
            if frame.encoding is Encoding.DELTA and frame.base is not None and (agent, frame.base) not in inside:
                wanted[agent, frame.base] = None
            inside.add((agent, frame.record.id))
        return tuple(key for key in wanted if self._is_cold(*key))

    def held(self) -> Sequence[int]:
        """Numbers of the records whose bodies are in memory."""
        return self._warmth.numbers()

    def _is_cold(self, agent: str, record_id: str) -> bool:
        row = self._row(agent, record_id)
        if row is None or row[14] is None or row[13] in self._warmth:
            return False
        return self._tables.one("SELECT 1 FROM warm WHERE record=?", (row[13],)) is None

    # -------------------------------------------------------------------------------------------------------- internal

    def _stream(self, name: str) -> tuple[int, int, str, int, str]:
        """no, seq, chain, floor_seq, floor_chain; no 0 when the stream is not known yet."""
        row = self._tables.one("SELECT no, seq, chain, floor_seq, floor_chain FROM streams WHERE name=?", (name,))
        return row or (0, 0, GENESIS, 0, GENESIS)

    def _row(self, agent: str, record_id: str) -> Any:
        return self._tables.one(f"SELECT {_RECORD} {_FROM} WHERE a.name=? AND r.id=?", (agent, record_id))

    def _newest(self, agent: str, kind: str) -> Any:
        return self._tables.one(
            f"SELECT {_RECORD} FROM agents a JOIN heads h ON h.agent = a.no JOIN records r ON r.no = h.record "  # noqa: S608
            "WHERE a.name=? AND h.kind=?",
            (agent, kind),
        )

    def _warm(self, row: Any) -> bytes | None:
        body = self._warmth.get(row[13])
        return self._in_file(row) if body is None else _proven(row, body)

    def _in_file(self, row: Any) -> bytes | None:
        stored = self._tables.one("SELECT packed, body FROM warm WHERE record=?", (row[13],))
        if stored is None:
            return None
        try:
            return _proven(row, unpack(stored[0], stored[1], row[4]))
        except BAD_BODY:
            return _proven(row, b"")

    def _warm_or_raise(self, row: Any) -> bytes:
        body = self._warm(row)
        if body is None:
            why = "is not loaded yet" if row[14] is not None else "stands on a record that this copy no longer has"
            raise Unavailable(
                f"the body of record {row[1]!a} of agent {row[0]!a} {why}", hint="read it from the store, or try another region"
            )
        return body


def _proven(row: Any, body: bytes) -> bytes:
    """The body of this row. Raises Corrupt when it is not."""
    if hashlib.sha256(body).digest() != row[3]:
        raise Corrupt(
            f"the view's body of record {row[1]!a} of agent {row[0]!a} is damaged",
            hint="stop this instance, delete its view and start it: the view is rebuilt from the store",
        )
    return body


def record_of(row: Any) -> Record:
    """A row that begins with the agent's name and the record's columns, in the order of ``_RECORD``."""
    agent, record_id, kind, sha256, size, parent, created_at, received_at, copies, attempt, meta = row[:11]
    return Record(
        agent=agent,
        id=record_id,
        kind=kind,
        sha256=sha256.hex(),
        size=size,
        parent=parent,
        created_at=created_at,
        received_at=received_at,
        copies=copies,
        attempt=attempt,
        meta={} if meta is None else msgspec.msgpack.decode(meta, type=dict[str, str]),
    )
