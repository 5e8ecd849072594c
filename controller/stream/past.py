"""What the view knows of the past: an agent's records with their places, and what was newest at a point in time.

Read-only, in short queries: a page is a few milliseconds, so the loop that keeps the lease may ask. A point in time is
judged by ``received_at`` (the holder's clock), the order among an agent's records by their place in the stream, as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from controller.domain.model import Kind, Record, SegmentRef
from controller.errors import NotFound
from controller.stream.records import record_of
from controller.stream.view import View

NOT_STATE = (Kind.TASK, Kind.ASSIGNMENT, Kind.CANARY, Kind.OPENING, Kind.INTENDED, Kind.DONE)
"""Kinds that say what happened or what is to be done. They are no state of an agent: going back in time leaves them alone."""

_NO_STATE = "({})".format(",".join(f"'{kind}'" for kind in NOT_STATE))
_COLUMNS = (
    "a.name, r.id, r.kind, r.sha256, r.size, r.parent, r.created_at, r.received_at, r.copies, r.attempt, r.meta, "
    "s.name, r.seq, g.epoch, r.ordinal, r.encoding, r.depth, r.verified, r.base"
)
_FROM = (
    "FROM records r JOIN agents a ON a.no = r.agent JOIN streams s ON s.no = r.stream "
    "LEFT JOIN segments g ON g.stream = r.stream AND g.seq = r.seq"
)


@dataclass(frozen=True, slots=True)
class Placed:
    """A record and where it lies. ``ref`` None: only a carried-forward copy of it is left."""

    record: Record
    stream: str
    seq: int
    ref: SegmentRef | None
    ordinal: int
    encoding: str
    depth: int
    """Deltas that a reader goes through."""
    verified: bool
    """Its body was decoded and hashed here."""
    lost: bool
    """It stands on records that this copy no longer has."""
    base: str | None


@dataclass(frozen=True, slots=True)
class Then:
    """One agent at a point in time. ``found`` None: no record of the kind is held from before it."""

    agent: str
    found: Placed | None
    upto: str
    """The last record of its state at that time; "" when there is none."""
    newest: Placed
    """The newest record of its state now."""
    newer: int
    """Records of its state after ``upto``."""
    stream: str
    first_at: float
    """``received_at`` of the oldest record of the kind that is held."""


class Past:
    """Questions about the past to one view. Not for two threads at once, like the view itself."""

    def __init__(self, view: View) -> None:
        self._tables = view.tables

    def begins_at(self, stream: str) -> float:
        """The time from which on this copy has everything of the stream: 0 for the whole history, else when the first record
        after its beginning was received (infinity when there is none)."""
        row = self._tables.one("SELECT no, floor_seq FROM streams WHERE name=?", (stream,))
        if row is None or row[1] == 0:
            return 0.0
        first = self._tables.one(
            "SELECT received_at FROM records WHERE stream=? AND seq>? AND ord>>16 = seq ORDER BY seq, ordinal LIMIT 1", row
        )
        return float("inf") if first is None else float(first[0])

    def placed(self, agent: str, record_id: str) -> Placed | None:
        """One record; None when it is not known here."""
        row = self._tables.one(f"SELECT {_COLUMNS} {_FROM} WHERE a.name=? AND r.id=?", (agent, record_id))
        return None if row is None else _placed(row)

    def newest(self, kind: str, after: str, limit: int) -> tuple[Placed, ...]:
        """The newest record of the kind of each agent whose name is greater than ``after``, by name."""
        rows = self._tables.all(
            f"SELECT {_COLUMNS} FROM heads h JOIN agents a ON a.no = h.agent JOIN records r ON r.no = h.record "  # noqa: S608
            "JOIN streams s ON s.no = r.stream LEFT JOIN segments g ON g.stream = r.stream AND g.seq = r.seq "
            "WHERE h.kind=? AND a.name>? ORDER BY a.name LIMIT ?",
            (kind, after, limit),
        )
        return tuple(_placed(row) for row in rows)

    def records(
        self,
        agent: str,
        *,
        kind: str | None = None,
        before: str | None = None,
        since: float | None = None,
        until: float | None = None,
        limit: int = 100,
    ) -> tuple[Placed, ...]:
        """An agent's records, newest first; ``since`` and ``until`` are inclusive. Raises NotFound for an unknown agent or
        ``before``."""
        self._number(agent)
        where, values = ["a.name=?"], [agent]  # type: tuple[list[str], list[Any]]
        if before is not None:
            mark = self._tables.one(
                "SELECT r.ord, r.no FROM records r JOIN agents a ON a.no = r.agent WHERE a.name=? AND r.id=?", (agent, before)
            )
            if mark is None:
                raise NotFound(f"agent {agent!a} has no record {before!a}", hint="list its records without --before")
            where.append("(r.ord, r.no) < (?, ?)")
            values += mark
        for condition, value in (("r.kind=?", kind), ("r.received_at>=?", since), ("r.received_at<=?", until)):
            if value is not None:
                where.append(condition)
                values.append(value)
        rows = self._tables.all(
            f"SELECT {_COLUMNS} {_FROM} WHERE {' AND '.join(where)} ORDER BY r.ord DESC, r.no DESC LIMIT ?", (*values, limit)
        )
        return tuple(_placed(row) for row in rows)

    def named(self, kind: str, after: str, limit: int) -> tuple[str, ...]:
        """Agents that have a record of the kind, by name, after ``after``."""
        rows = self._tables.all(
            "SELECT a.name FROM heads h JOIN agents a ON a.no = h.agent WHERE h.kind=? AND a.name>? ORDER BY a.name LIMIT ?",
            (kind, after, limit),
        )
        return tuple(row[0] for row in rows)

    def then(self, agent: str, kind: str, at: float) -> Then:
        """What was newest at ``at``, and what came after it. Raises NotFound for an agent without a record of the kind."""
        no = self._number(agent)
        first = self._tables.one(
            "SELECT received_at FROM records WHERE agent=? AND kind=? ORDER BY ord, no LIMIT 1", (no, kind)
        )
        if first is None:
            raise NotFound(f"agent {agent!a} has no record of kind {kind!a}", hint=f"drctl checkpoints list {agent!a}")
        state = f"r.agent=? AND r.kind NOT IN {_NO_STATE}"
        newest = self._tables.one(
            f"SELECT {_COLUMNS} {_FROM} WHERE {state} OR r.agent=? AND r.kind=? ORDER BY r.ord DESC, r.no DESC LIMIT 1",
            (no, no, kind),
        )
        found = self._tables.one(
            f"SELECT {_COLUMNS} {_FROM} WHERE r.agent=? AND r.kind=? AND r.received_at<=? "
            "ORDER BY r.ord DESC, r.no DESC LIMIT 1",
            (no, kind, at),
        )
        upto, mark = "", (-1, -1)
        if found is not None:
            row = self._tables.one(
                f"SELECT r.id, r.ord, r.no FROM records r WHERE ({state} OR r.agent=? AND r.kind=?) AND r.received_at<=? "  # noqa: S608
                "ORDER BY r.ord DESC, r.no DESC LIMIT 1",
                (no, no, kind, at),
            )
            upto, mark = row[0], (row[1], row[2])
        newer = self._tables.one(f"SELECT count(*) FROM records r WHERE {state} AND (r.ord, r.no) > (?, ?)", (no, *mark))  # noqa: S608
        placed = _placed(newest)
        return Then(
            agent, None if found is None else _placed(found), upto, placed, int(newer[0]), placed.stream, float(first[0])
        )

    def _number(self, agent: str) -> int:
        row = self._tables.one("SELECT no FROM agents WHERE name=?", (agent,))
        if row is None:
            raise NotFound(f"this region's copy has no agent {agent!a}", hint="drctl checkpoints list shows all agents")
        return int(row[0])


def _placed(row: Any) -> Placed:
    stream, seq, epoch, ordinal, encoding, depth, verified, base = row[11:]
    record = record_of(row)
    ref = None if epoch is None else SegmentRef(stream, seq, epoch)
    return Placed(record, stream, seq, ref, ordinal, encoding, depth, bool(verified), verified is None, base)
