"""The view: a local SQLite index of one region's copy (agent → records → where), with the newest bodies warm and proven.

The holder adds what it commits, a standby what it reads back; both through ``apply``, which decodes and hashes every body
(the holder hands over those that it decoded and hashed when it took them), so whatever the view lists as verified has been
restored once already. It is a cache of the region's store: a file that is damaged or of another schema is set aside and
rebuilt by following from the start.

- *Warm*: the bodies of the newest two records of each agent and kind (at most 32 kinds of an agent besides checkpoint, task
  and assignment), up to 8 MiB each. That is also what the next delta needs. They are held in memory and written to the file
  late (``warmth``); without room there only the newest is sure to be kept. Others come from the store (``reader``).
- *Order* of an agent's records is their place in the stream; records carried forward by retention keep the place that they
  had first. Places of different streams are not comparable; an agent belongs to one stream.
- *Duplicates*: the first record of an (agent, id) stands. The same again (equal hash) is noted as another place to read it
  from; another body under the same id is a *conflict*, counted and otherwise ignored. A holder refuses those before they
  get in, so one in a stream means that a holder broke its rules; it is not a reason to stop replicating.
- *Not read back yet*: rows that came from a snapshot. Their bodies lie in the store; they count as verified once somebody
  loaded them (``reader.warm`` does so for the newest).
- *Unverified*: in a copy that begins after sequence 1, a delta may stand on a record from before the beginning. It is listed,
  but is not restorable until it is seen again whole.

Synchronous and short. One caller at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from controller.domain.model import GENESIS, Encoding, Kind, Record, SegmentRef
from controller.errors import Conflict, Corrupt, NotFound, Refused, Unavailable
from controller.stream import warmth
from controller.stream.indexing import ColdBase, Round
from controller.stream.limits import DEFAULT_LIMITS, MAX_CHAIN, Limits
from controller.stream.live import NEEDS, whole
from controller.stream.proving import Proven
from controller.stream.segment import Segment
from controller.stream.tables import BAD_BODY, WARM_MAX_BYTES, Tables, pack, unpack

__all__ = ["MAX_CHAIN", "AgentSummary", "ColdBase", "Link", "View"]

_RECORD = (
    "a.name, r.id, r.kind, r.sha256, r.size, r.parent, r.created_at, r.received_at, r.copies, r.attempt, r.meta, "
    "r.seq, r.ordinal, r.no, r.verified"
)
_FROM = "FROM records r JOIN agents a ON a.no = r.agent"
_NOT_NEWEST = (
    "NOT EXISTS (SELECT 1 FROM records r JOIN heads h ON h.agent = r.agent AND h.kind = r.kind "
    "WHERE r.no = warm.record AND h.warm AND warm.record IN (h.record, h.record2))"
)
_PAGE = 500
_SLICE = 512
"""Segments that one call of ``forget`` goes through at most."""


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


class View:
    """See the module. ``path`` None keeps all in memory. ``warm_max_bytes``: see ``Warmth``. Raises Misconfigured when the
    path is another program's file, Unavailable when the file is locked or not accessible."""

    def __init__(self, path: Path | None, limits: Limits = DEFAULT_LIMITS, warm_max_bytes: int | None = None) -> None:
        self._tables = Tables(path)
        self._warmth = warmth.Warmth(self._tables, warmth.DEFAULT_MAX_BYTES if warm_max_bytes is None else warm_max_bytes)
        self._limits = limits
        self._lent: set[int] = set()
        self.awakened = False
        """Set when what deltas stand on came after them: their bodies can be loaded now. Whoever does so clears it."""
        self._tables.run(f"DELETE FROM warm WHERE {_NOT_NEWEST}")  # noqa: S608 - what a stop left behind
        for (half_loaded,) in self._tables.all("SELECT name FROM streams WHERE loading"):
            self.reset(half_loaded, *self.floor(half_loaded))

    @property
    def tables(self) -> Tables:
        """For the questions of ``stream/past.py`` and ``stream/verify.py``, which only read."""
        return self._tables

    def close(self) -> None:
        """Closes the file. Newest bodies are written first; those that cannot be are cold at the next start. The view is not
        usable afterwards."""
        with suppress(Unavailable, Corrupt):
            self._warmth.write_all()
        self._tables.close()

    def settle(self) -> None:
        """Call it every second: writes newest bodies that have not changed for a while to the file, a few MiB at most.
        Raises Unavailable, Corrupt."""
        self._warmth.settle()

    # ------------------------------------------------------------------------------------------------------- positions

    def _stream(self, name: str) -> tuple[int, int, str, int, str]:
        """no, seq, chain, floor_seq, floor_chain; no 0 when the stream is not known yet."""
        row = self._tables.one("SELECT no, seq, chain, floor_seq, floor_chain FROM streams WHERE name=?", (name,))
        return row or (0, 0, GENESIS, 0, GENESIS)

    def position(self, stream: str) -> tuple[int, str]:
        """Last segment that was applied and the chain hash after it; (0, GENESIS) when there is none."""
        return self._stream(stream)[1:3]

    def floor(self, stream: str) -> tuple[int, str]:
        """The segment after which this copy begins and the chain hash there; (0, GENESIS) for the whole history."""
        return self._stream(stream)[3:5]

    def chain_at(self, stream: str, seq: int) -> str | None:
        """Chain hash after segment ``seq``; None outside what this copy has."""
        no, _, _, floor_seq, floor_chain = self._stream(stream)
        if seq == floor_seq:
            return floor_chain
        row = self._tables.one("SELECT chain FROM segments WHERE stream=? AND seq=?", (no, seq))
        return None if row is None else str(row[0])

    def epoch_at(self, stream: str, seq: int) -> int | None:
        """Epoch of segment ``seq``; None when this copy does not have it."""
        row = self._tables.one(
            "SELECT g.epoch FROM segments g JOIN streams s ON s.no = g.stream WHERE s.name=? AND g.seq=?", (stream, seq)
        )
        return None if row is None else int(row[0])

    def epochs_down(self, stream: str, seq: int) -> Iterator[tuple[int, int]]:
        """(seq, epoch) of the segments from ``seq`` downwards."""
        no = self._stream(stream)[0]
        while True:
            rows = self._tables.all(
                "SELECT seq, epoch FROM segments WHERE stream=? AND seq<=? ORDER BY seq DESC LIMIT ?", (no, seq, _PAGE)
            )
            yield from rows
            if len(rows) < _PAGE:
                return
            seq = rows[-1][0] - 1

    def count(self, stream: str) -> int:
        """Number of different records of the stream."""
        row = self._tables.one("SELECT records FROM streams WHERE name=?", (stream,))
        return 0 if row is None else int(row[0])

    def conflicts(self, stream: str) -> int:
        """Number of frames whose id was taken by another body (see the module)."""
        return int(self._tables.one("SELECT count(*) FROM conflicts WHERE stream=?", (self._stream(stream)[0],))[0])

    # --------------------------------------------------------------------------------------------------------- changes

    def apply(
        self,
        segment: Segment,
        chain: str,
        ref: SegmentRef,
        data_len: int,
        proven: Sequence[Proven | None] | None = None,
    ) -> None:
        """Adds the segment after the position; ``chain`` is the chain hash after it. Every body is decoded and hashed, in one
        transaction: all or nothing. Raises Conflict when it is not the next one, Corrupt (naming agent and record) when it
        does not fit or a body does not verify, ColdBase when a delta's base has to be loaded first.

        ``proven``: for each frame the body that *this process* decoded from these very bytes and hashed already (None: not
        yet). Whoever read the segment from a store has none."""
        header = segment.header
        no, seq, last_chain, floor_seq, _ = self._stream(ref.stream)
        if (header.stream, header.seq, header.epoch) != (ref.stream, ref.seq, ref.epoch):
            raise Corrupt(
                f"segment {ref.key} says that it is {header.stream} {header.seq} of epoch {header.epoch}",
                hint="do not use this object; read the segment from another region's store",
            )
        if ref.seq != seq + 1:
            raise Conflict(f"segment {ref.key} does not follow position {seq}", hint="read the position again")
        if header.prev_chain != last_chain:
            raise Corrupt(
                f"segment {ref.key} follows chain {header.prev_chain}, the copy is at {last_chain}",
                hint="the histories differ: find the last common segment and rewind to it",
            )
        self._warmth.make_room()
        with self._tables.transaction():
            if no == 0:
                self._tables.run("INSERT INTO streams VALUES (NULL, ?, 0, ?, 0, ?, 0, 0)", (ref.stream, GENESIS, GENESIS))
                no = self._stream(ref.stream)[0]
            round_ = self._round(no, floor_seq, segment, proven)
            added = round_.index()
            self.awakened = self.awakened or round_.awakened
            self._tables.run(
                "INSERT INTO segments VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (no, ref.seq, chain, ref.epoch, len(segment.frames), data_len, header.created_at, round_.reach),
            )
            self._tables.run("UPDATE streams SET seq=?, chain=?, records=records+? WHERE no=?", (ref.seq, chain, added, no))
            # Only what was lent for this stream: another one may be between its loading and its own ``apply``.
            mine = {lent for lent in self._lent if self._stream_of(lent) in (None, no)}
            for lent in mine:
                self._tables.run(f"DELETE FROM warm WHERE record=? AND {_NOT_NEWEST}", (lent,))  # noqa: S608 - fixed texts
        self._lent -= mine
        self._warmth.keep(round_.held, round_.older, round_.gone)

    def _round(self, stream: int, floor_seq: int, segment: Segment, proven: Sequence[Proven | None] | None) -> Round:
        """Replaced where damage is collected and not raised (``stream/proof.py``)."""
        return Round(self._tables, self._warmth, stream, floor_seq, segment, self._limits, proven)

    def rewind(self, stream: str, seq: int) -> None:
        """Forgets everything above ``seq``. Bodies that become the newest again are cold until ``reader.warm`` loads them.
        Raises Refused outside floor … position."""
        no, at, _, floor_seq, _ = self._stream(stream)
        chain = self.chain_at(stream, seq)
        if chain is None or not floor_seq <= seq <= at:
            raise Refused(
                f"cannot rewind stream {stream} to {seq}: the copy has {floor_seq}..{at}", hint="reset it at the head's base"
            )
        if seq == at:
            return
        with self._tables.transaction():
            self._tables.run(
                "UPDATE records SET verified=NULL, depth=? WHERE verified>? AND seq<=? AND no IN "
                "(SELECT record FROM duplicates WHERE stream=? AND seq>?)",
                (MAX_CHAIN, seq, seq, no, seq),
            )
            for table in ("duplicates", "conflicts", "segments"):
                self._tables.run(f"DELETE FROM {table} WHERE stream=? AND seq>?", (no, seq))  # noqa: S608 - fixed names
            self._remove(
                "stream=? AND (seq>? OR (seq<=? AND no NOT IN (SELECT record FROM duplicates)))",
                (no, seq, floor_seq),
            )
            self._tables.run("UPDATE streams SET seq=?, chain=? WHERE no=?", (seq, chain, no))

    def reset(self, stream: str, seq: int, chain: str) -> None:
        """Forgets the stream and lets it begin after segment ``seq`` with this chain hash (the head's base)."""
        no = self._stream(stream)[0]
        with self._tables.transaction():
            for table in ("duplicates", "conflicts", "segments"):
                self._tables.run(f"DELETE FROM {table} WHERE stream=?", (no,))  # noqa: S608 - fixed names
            self._remove("stream=?", (no,))
            self._tables.run("DELETE FROM streams WHERE no=?", (no,))
            self._tables.run("INSERT INTO streams VALUES (NULL, ?, ?, ?, ?, ?, 0, 0)", (stream, seq, chain, seq, chain))

    def forget(self, stream: str, base: int, base_chain: str, budget: int = 1 << 62) -> bool:
        """Retention moved the base: forgets segments before ``base`` and the records that lie in no later one, at most about
        ``budget`` records at a time. Returns whether more is left: call it again. Call it at the head only, when the
        carried-forward frames have been applied. Raises Refused past the position."""
        no, at, _, floor_seq, _ = self._stream(stream)
        if base - 1 <= floor_seq:
            return False
        if base - 1 > at:
            raise Refused(f"the base {base} of stream {stream} is past position {at}", hint="reset the stream at its base")
        last, count, chain = floor_seq, 0, base_chain
        for seq, found, records in self._tables.all(
            "SELECT seq, chain, records FROM segments WHERE stream=? AND seq<? ORDER BY seq LIMIT ?", (no, base, _SLICE)
        ):
            last, chain, count = seq, found, count + records
            if count >= budget:
                break
        if last == base - 1:
            chain = base_chain
        with self._tables.transaction():
            self._tables.run("CREATE TEMP TABLE IF NOT EXISTS dropped (record INTEGER)")
            self._tables.run("DELETE FROM dropped")
            self._tables.run("INSERT INTO dropped SELECT record FROM duplicates WHERE stream=? AND seq<=?", (no, last))
            for table in ("duplicates", "conflicts", "segments"):
                self._tables.run(f"DELETE FROM {table} WHERE stream=? AND seq<=?", (no, last))  # noqa: S608 - fixed names
            self._remove(
                "(no IN (SELECT no FROM records WHERE stream=? AND seq>? AND seq<=?) OR no IN (SELECT record FROM dropped)) "
                "AND NOT EXISTS (SELECT 1 FROM duplicates d WHERE d.record=records.no) AND seq<=?",
                (no, floor_seq, last, last),
            )
            self._tables.run("UPDATE streams SET floor_seq=?, floor_chain=? WHERE no=?", (last, chain, no))
        return last < base - 1

    def _remove(self, where: str, values: tuple[Any, ...]) -> None:
        """Deletes records and brings counters, newest records and warm bodies of their agents in line."""
        run = self._tables.run
        run("CREATE TEMP TABLE IF NOT EXISTS gone (no INTEGER PRIMARY KEY, agent INTEGER, kind TEXT, stream INTEGER)")
        run("DELETE FROM gone")
        run(f"INSERT INTO gone SELECT no, agent, kind, stream FROM records WHERE {where}", values)  # noqa: S608 - own texts
        self._warmth.drop([no for (no,) in self._tables.all("SELECT no FROM gone WHERE held(no)")])
        run("DELETE FROM records WHERE no IN (SELECT no FROM gone)")
        run("DELETE FROM warm WHERE record IN (SELECT no FROM gone)")
        run("DELETE FROM duplicates WHERE record IN (SELECT no FROM gone)")
        run("UPDATE streams SET records = records - (SELECT count(*) FROM gone WHERE stream = streams.no)")
        for agent, kind, was_warm in self._tables.all(
            "SELECT h.agent, h.kind, h.warm FROM heads h WHERE (h.agent, h.kind) IN (SELECT agent, kind FROM gone) "
            "AND (h.record IN (SELECT no FROM gone) OR h.record2 IN (SELECT no FROM gone))"
        ):
            newest = self._tables.all(
                "SELECT no, ord FROM records WHERE agent=? AND kind=? ORDER BY ord DESC, no DESC LIMIT 2", (agent, kind)
            )
            run("DELETE FROM heads WHERE agent=? AND kind=?", (agent, kind))
            if newest:
                second = newest[1] if len(newest) > 1 else (None, None)
                run("INSERT INTO heads VALUES (?, ?, ?, ?, ?, ?, ?)", (agent, kind, *newest[0], *second, was_warm))
                self._warmth.is_newest(newest[0][0])
        for agent, count in self._tables.all("SELECT agent, count(*) FROM gone GROUP BY agent"):
            run("UPDATE agents SET records=records-? WHERE no=?", (count, agent))
        for (agent,) in self._tables.all(
            "SELECT no FROM agents WHERE no IN (SELECT agent FROM gone) AND latest IN (SELECT no FROM gone)"
        ):
            latest = self._tables.one("SELECT no, ord FROM records WHERE agent=? ORDER BY ord DESC, no DESC LIMIT 1", (agent,))
            if latest is None:
                run("DELETE FROM agents WHERE no=?", (agent,))
            else:
                run("UPDATE agents SET latest=?, latest_ord=? WHERE no=?", (*latest, agent))
        run("DELETE FROM gone")

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

    # ------------------------------------------------------------------------------------------------- for the reader

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

    def admit(self, agent: str, id: str, body: bytes) -> None:  # noqa: A002
        """Gives a body back: it stays warm when the record is among the newest, else until the next ``apply``.
        Raises Corrupt when it is not the record's body, NotFound for an unknown record."""
        row = self._row(agent, id)
        if row is None:
            raise NotFound(f"agent {agent!a} has no record {id!a}", hint="list its records")
        if hashlib.sha256(body).digest() != row[3]:
            raise Corrupt(f"record {id!a} of agent {agent!a}: these {len(body)} bytes are not its body", hint="read it again")
        self._warmth.drop((row[13],))  # it has a row from now on
        self._tables.run("INSERT OR REPLACE INTO warm VALUES (?, ?, ?)", (row[13], *pack(body)))
        if row[14] == 0:
            self._tables.run("UPDATE records SET verified=max(seq, 1) WHERE no=?", (row[13],))
        self._lent.add(row[13])

    def doubt(self, agent: str, id: str) -> None:  # noqa: A002
        """Marks a record whose body can no longer be had from this copy: deltas that stand on it stay unverified too."""
        self._tables.run(
            "UPDATE records SET verified=NULL, depth=? WHERE id=? AND agent=(SELECT no FROM agents WHERE name=?)",
            (MAX_CHAIN, id, agent),
        )

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

    def _stream_of(self, record: int) -> int | None:
        row = self._tables.one("SELECT stream FROM records WHERE no=?", (record,))
        return None if row is None else int(row[0])

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
