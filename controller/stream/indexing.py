"""One segment into the view's tables: every body decoded and hashed, the newest two of each agent and kind kept warm.

``index`` runs inside the caller's transaction. New rows are collected and written in bulk at the end; bodies wait in a
window of bounded size, so that a segment of many small deltas of large states does not fill the memory.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from controller.domain.model import Encoding, Frame, Kind, Record
from controller.errors import Corrupt, Unavailable
from controller.stream.delta import open_frame
from controller.stream.limits import MAX_CHAIN, ORIGIN, Limits
from controller.stream.live import is_ruled
from controller.stream.proving import Proven
from controller.stream.segment import Segment
from controller.stream.tables import WARM_MAX_BYTES, Tables, pack, unpack
from controller.stream.warmth import Warmth

ALWAYS_WARM = frozenset({Kind.CHECKPOINT, Kind.TASK, Kind.ASSIGNMENT})
WARM_KINDS = 32
"""Kinds of one agent whose bodies are kept warm; further ones are read from the store: odd agents do not fill the disk."""
_DEPTH, _VERIFIED = 17, 18
"""Columns of ``records``, counted from 0."""
_WINDOW_BYTES = 64 * 2**20
_ORDINAL_BITS = 16
_ORIGIN = re.compile(r"([0-9]{1,15})\.([0-9]{1,5})\Z")


class ColdBase(Unavailable):
    """A delta stands on a record that is known but whose body is not warm: load it (``reader.warm_bases``) and apply again."""

    code = "cold_base"


@dataclass(slots=True)
class Known:
    """What the round has to know of a record that others may stand on. ``verified`` None: its body could not be decoded;
    0: nobody has tried yet."""

    no: int
    sha256: bytes
    depth: int
    verified: int | None
    seq: int
    ordinal: int | None = None
    """Its frame in this very segment."""


@dataclass(slots=True)
class _Head:
    """Newest records of one agent and kind, ascending by ord, as (ord, record number)."""

    agent: int
    kind: str
    newest: list[tuple[int, int]]
    before: tuple[int, ...]
    warm: bool


@dataclass(slots=True)
class _Agent:
    no: int
    records: int
    latest: int | None
    latest_ord: int
    ruled: int
    warm_kinds: int | None = None


def order(record: Record, seq: int, ordinal: int) -> int:
    """Where a record stands among its agent's: its place in the stream, or the one it had before it was carried forward."""
    origin = _ORIGIN.match(record.meta[ORIGIN]) if ORIGIN in record.meta else None
    if origin is not None and int(origin[1]) < seq and int(origin[2]) < 1 << _ORDINAL_BITS:
        seq, ordinal = int(origin[1]), int(origin[2])
    return seq << _ORDINAL_BITS | ordinal


class Round:
    """The state of indexing one segment."""

    def __init__(
        self,
        tables: Tables,
        warmth: Warmth,
        stream: int,
        floor_seq: int,
        segment: Segment,
        limits: Limits,
        proven: Sequence[Proven | None] | None = None,
    ) -> None:
        self._tables = tables
        self._warmth = warmth
        self._stream = stream
        self._floor = floor_seq
        self._segment = segment
        self._seq = self.reach = segment.header.seq
        self._limits = limits
        self.awakened = False
        """Whether records can be read now that could not before."""
        self._proven: Sequence[Proven | None] = proven or [None] * len(segment.frames)
        self.held: list[tuple[int, bytes]] = []
        """Bodies of newest records for ``Warmth.keep``, with the records that are the second newest now, and those that are
        neither any more."""
        self.older: list[int] = []
        self.gone: set[int] = set()
        self._first = self._next = int(tables.one("SELECT coalesce(max(no), 0) FROM records")[0]) + 1
        self._agents: dict[str, _Agent] = {}
        self._new: dict[tuple[int, str], Known] = {}
        self._heads: dict[tuple[int, str], _Head] = {}
        self._rows: list[list[object]] = []
        self._duplicates: list[tuple[object, ...]] = []
        self._conflicts: list[tuple[object, ...]] = []
        self._window: OrderedDict[int, bytes] = OrderedDict()
        self._window_bytes = 0
        self._spilled: set[int] = set()
        self._stored: set[int] = set()

    def index(self) -> int:
        """Everything. Returns how many records are new. Raises Corrupt naming agent and record, ColdBase."""
        for ordinal, frame in enumerate(self._segment.frames):
            self._frame(ordinal, frame)
        self._write()
        return len(self._rows)

    # -- one frame

    def _frame(self, ordinal: int, frame: Frame) -> None:
        record = frame.record
        agent = self._agent(record.agent)
        proven = self._proven[ordinal]
        known = None if proven is not None and proven.new else self._known(agent.no, record.id)
        body, depth = self._decode(agent.no, frame, proven)
        sha256 = bytes.fromhex(record.sha256)
        if known is None:
            known = Known(self._next, sha256, depth, self._seq if body is not None else None, self._seq, ordinal)
            self._next += 1
            self._new[agent.no, record.id] = known
            self._add(agent, ordinal, frame, known)
            if self._floor and ORIGIN in record.meta:
                self._found_again(agent.no, record.id)
        elif known.sha256 != sha256:  # the first one stands; a holder refuses these before they get in
            self._conflicts.append((self._stream, self._seq, ordinal, record.agent, record.id))
            return
        else:
            self._duplicates.append((self._stream, self._seq, ordinal, known.no, frame.base, depth, *self._place(ordinal)))
            if not known.verified and body is not None:
                self._prove(known, depth)
                self._head(agent, record.kind)  # its body may be missing there
                if self._floor and ORIGIN in record.meta:
                    self._found_again(agent.no, record.id)
        if body is not None:
            self._keep(known.no, body)

    def _prove(self, known: Known, depth: int) -> None:
        """A record whose first frame could not be decoded here came again and could."""
        known.verified, known.depth = self._seq, depth
        if known.no >= self._first:
            self._rows[known.no - self._first][_DEPTH : _VERIFIED + 1] = depth, self._seq
        else:
            self._tables.run("UPDATE records SET depth=?, verified=? WHERE no=?", (depth, self._seq, known.no))

    def _found_again(self, agent: int, record_id: str) -> None:
        """In a copy that begins late, a carried-forward base comes after the deltas that stand on it: those can be read now."""
        lost = self._tables.all("SELECT no, id, base FROM records WHERE agent=? AND verified IS NULL", (agent,))
        depth = {record_id: 0}
        while found := [row for row in lost if row[2] in depth and row[1] not in depth]:
            for no, lost_id, base in found:
                depth[lost_id] = depth[base] + 1
                if depth[lost_id] <= MAX_CHAIN:
                    self.awakened = True
                    self._tables.run("UPDATE records SET verified=0, depth=? WHERE no=?", (depth[lost_id], no))

    def _place(self, ordinal: int) -> tuple[int, int]:
        """First byte and length of a frame in its object."""
        offsets = self._segment.offsets
        return (offsets[ordinal], offsets[ordinal + 1] - offsets[ordinal]) if offsets else (0, 0)

    def _add(self, agent: _Agent, ordinal: int, frame: Frame, known: Known) -> None:
        record = frame.record
        ord_ = order(record, self._seq, ordinal)
        self._rows.append(
            [
                known.no,
                agent.no,
                record.id,
                record.kind,
                record.parent,
                self._stream,
                self._seq,
                ordinal,
                ord_,
                known.sha256,
                record.size,
                record.received_at,
                record.created_at,
                record.attempt,
                record.copies,
                frame.encoding.value,
                frame.base,
                known.depth,
                known.verified,
                _meta(record),
                *self._place(ordinal),
            ]
        )
        agent.records += 1
        if not agent.ruled and is_ruled(record.kind, record.meta):
            agent.ruled = 1
        if ord_ > agent.latest_ord:
            agent.latest, agent.latest_ord = known.no, ord_
        head = self._head(agent, record.kind)
        head.newest = sorted([*head.newest, (ord_, known.no)])[-2:]

    # -- what is there already

    def _agent(self, name: str) -> _Agent:
        agent = self._agents.get(name)
        if agent is None:
            row = self._tables.one("SELECT no, records, latest, latest_ord, ruled FROM agents WHERE name=?", (name,))
            if row is None:
                self._tables.run("INSERT INTO agents (name, records, latest_ord) VALUES (?, 0, -1)", (name,))
                row = (self._tables.one("SELECT last_insert_rowid()")[0], 0, None, -1, 0)
            agent = self._agents[name] = _Agent(*row)
        return agent

    def _known(self, agent: int, record_id: str) -> Known | None:
        known = self._new.get((agent, record_id))
        if known is None:
            row = self._tables.one(
                "SELECT no, sha256, depth, verified, seq FROM records WHERE agent=? AND id=?", (agent, record_id)
            )
            known = None if row is None else Known(*row)
        return known

    def _head(self, agent: _Agent, kind: str) -> _Head:
        head = self._heads.get((agent.no, kind))
        if head is None:
            row = self._tables.one(
                "SELECT ord, record, ord2, record2, warm FROM heads WHERE agent=? AND kind=?", (agent.no, kind)
            )
            if row is None:
                head = _Head(agent.no, kind, [], (), self._may_be_warm(agent, kind))
            else:
                newest = [(row[0], row[1])] if row[3] is None else [(row[2], row[3]), (row[0], row[1])]
                head = _Head(agent.no, kind, newest, tuple(no for _, no in newest), bool(row[4]))
            self._heads[agent.no, kind] = head
        return head

    def _may_be_warm(self, agent: _Agent, kind: str) -> bool:
        if kind in ALWAYS_WARM:
            return True
        if agent.warm_kinds is None:
            agent.warm_kinds = int(self._tables.one("SELECT count(*) FROM heads WHERE agent=? AND warm=1", (agent.no,))[0])
        agent.warm_kinds += 1
        return agent.warm_kinds <= WARM_KINDS

    # -- bodies

    def _decode(self, agent: int, frame: Frame, proven: Proven | None) -> tuple[bytes | None, int]:
        """Body and depth of its chain of deltas. Body None: it stands on a record from before this copy's part of history."""
        if frame.encoding is not Encoding.DELTA:
            return open_frame(frame, None, self._limits) if proven is None else proven.body, 0
        assert frame.base is not None
        base = self._known(agent, frame.base)
        if base is None:
            if self._floor > 0:
                return None, MAX_CHAIN
            raise _corrupt(frame.record, f"it is a delta against {frame.base!a}, which this stream does not have")
        self.reach = min(self.reach, base.seq)
        if base.verified is None:
            return None, MAX_CHAIN
        if base.depth >= MAX_CHAIN:
            raise _corrupt(frame.record, f"its chain of deltas is longer than {MAX_CHAIN}")
        body = open_frame(frame, self._body(agent, base, frame), self._limits) if proven is None else proven.body
        return body, base.depth + 1

    def _body(self, agent: int, known: Known, wanted_by: Frame) -> bytes:
        body = self._window.get(known.no)
        if body is not None:
            self._window.move_to_end(known.no)
            return body
        body = self._warmth.get(known.no)
        if body is not None:
            return body
        row = self._tables.one("SELECT w.packed, w.body FROM warm w WHERE w.record=?", (known.no,))
        if row is not None:
            body = unpack(row[0], row[1], self._limits.body_bytes)
            self._stored.add(known.no)
        elif known.ordinal is not None:  # older than the window, but in this segment: decode it again
            body, _ = self._decode(agent, self._segment.frames[known.ordinal], self._proven[known.ordinal])
        if body is None:
            record = wanted_by.record
            raise ColdBase(
                f"record {record.id!a} of agent {record.agent!a} is a delta against {wanted_by.base!a}, whose body is not warm",
                hint="load the body from the store and apply the segment again",
            )
        self._keep(known.no, body)
        return body

    def _keep(self, no: int, body: bytes) -> None:
        """Into the window; what falls out of it waits in the file."""
        if no not in self._window:
            self._window_bytes += len(body)
        self._window[no] = body
        while self._window_bytes > _WINDOW_BYTES and len(self._window) > 1:
            old, spilled = self._window.popitem(last=False)
            self._window_bytes -= len(spilled)
            if old not in self._stored and len(spilled) <= WARM_MAX_BYTES:
                self._tables.run("INSERT OR REPLACE INTO warm VALUES (?, ?, ?)", (old, *pack(spilled)))
                self._spilled.add(old)
                self._stored.add(old)

    # -- the end

    def _write(self) -> None:
        tables = self._tables
        if self._rows:
            tables.many(f"INSERT INTO records VALUES ({','.join('?' * 22)})", self._rows)  # noqa: S608 - question marks only
        if self._duplicates:
            tables.many("INSERT INTO duplicates VALUES (?, ?, ?, ?, ?, ?, ?, ?)", self._duplicates)
        if self._conflicts:
            tables.many("INSERT INTO conflicts VALUES (?, ?, ?, ?, ?)", self._conflicts)
        tables.many(
            "UPDATE agents SET records=?, latest=?, latest_ord=?, ruled=? WHERE no=?",
            [(agent.records, agent.latest, agent.latest_ord, agent.ruled, agent.no) for agent in self._agents.values()],
        )
        tables.many(
            "INSERT OR REPLACE INTO heads VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (head.agent, head.kind, *reversed(head.newest[-1]), *_second(head.newest), head.warm)
                for head in self._heads.values()
                if head.newest
            ],
        )
        self._write_bodies()

    def _write_bodies(self) -> None:
        """Newest ones are held and written late, if there is a place to hold them."""
        newest: set[int] = set()
        older: set[int] = set()
        for head in self._heads.values():
            if head.warm and head.newest:
                newest.add(head.newest[-1][1])
                older.update(no for _, no in head.newest[:-1])
        kept = newest | older
        self.gone = ({no for head in self._heads.values() for no in head.before} | self._spilled) - kept
        rows = [(no,) for no in sorted(self.gone) if no in self._spilled or self._warmth.may_be_in_table(no)]
        self._tables.many("DELETE FROM warm WHERE record=?", rows)
        self.gone |= self._spilled  # those that are kept have their row
        fresh = [
            (no, body)
            for no, body in self._window.items()
            if no in kept and no not in self._stored and len(body) <= WARM_MAX_BYTES and no not in self._warmth
        ]
        if self._warmth.max_bytes:
            self.held, self.older = [one for one in fresh if one[0] >= self._first], sorted(older)
            fresh = [one for one in fresh if one[0] < self._first]  # a record that came again: it may have a row
        self._tables.many("INSERT OR REPLACE INTO warm VALUES (?, ?, ?)", ((no, *pack(body)) for no, body in fresh))


def _meta(record: Record) -> bytes | None:
    """As its agent gave it: where a carried-forward record stood first is in its order, and no reader's business."""
    meta = {key: value for key, value in record.meta.items() if key != ORIGIN} if ORIGIN in record.meta else record.meta
    return msgspec.msgpack.encode(meta) if meta else None


def _second(newest: list[tuple[int, int]]) -> tuple[int | None, int | None]:
    return (newest[-2][1], newest[-2][0]) if len(newest) > 1 else (None, None)


def _corrupt(record: Record, problem: str) -> Corrupt:
    return Corrupt(
        f"record {record.id!a} of agent {record.agent!a}: {problem}",
        hint="repair this region's copy from another region's store",
    )
