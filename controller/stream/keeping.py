"""What retention asks the view, in short queries: what is old, what an agent's newest state stands on, where a copy lies.

Like ``stream/past.py`` it only reads. Every question is about one page (of agents, of segments), so the loop that keeps the
lease may ask between two heartbeats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from controller.domain.model import CatalogueEntry, FramePlace, Kind, Record
from controller.stream.limits import MAX_CHAIN
from controller.stream.live import live
from controller.stream.records import record_of
from controller.stream.view import View

_COLUMNS = (
    "r.no, r.id, r.kind, r.sha256, r.size, r.parent, r.created_at, r.received_at, r.copies, r.attempt, r.meta, r.ord, "
    "r.seq>=:base OR EXISTS (SELECT 1 FROM duplicates d WHERE d.record=r.no AND d.stream=r.stream AND d.seq>=:base "
    "AND d.base IS NULL)"
)
_ORDINAL_BITS = 16
WHOLE = "whole"
"""Encoding of a carried-forward frame in the catalogue: raw or zstd, its header says which."""


@dataclass(frozen=True, slots=True)
class Old:
    """A record that lies before a base only. ``origin``: where it stood first, as ``meta["dr.origin"]`` says it."""

    record: Record
    origin: str


class Keeping:
    """Questions about one stream of a view."""

    def __init__(self, view: View, stream: str) -> None:
        self._view = view
        self._tables = view.tables
        self._name = stream

    def _no(self) -> int:
        row = self._tables.one("SELECT no FROM streams WHERE name=?", (self._name,))
        return 0 if row is None else int(row[0])

    def first_after(self, at: float) -> int | None:
        """The first segment that was closed after the wall time ``at``; None when there is none."""
        row = self._tables.one("SELECT seq FROM segments WHERE stream=? AND at>? ORDER BY seq LIMIT 1", (self._no(), at))
        return None if row is None else int(row[0])

    def closed_at(self, seq: int) -> float | None:
        """When segment ``seq`` was closed, by its holder's wall clock; None when this copy does not have it."""
        row = self._tables.one("SELECT at FROM segments WHERE stream=? AND seq=?", (self._no(), seq))
        return None if row is None else float(row[0])

    def counts(self, after_seq: int, upto_seq: int) -> tuple[int, int]:
        """Frames and bytes in the segments after ``after_seq`` up to ``upto_seq``."""
        row = self._tables.one(
            "SELECT coalesce(sum(records), 0), coalesce(sum(bytes), 0) FROM segments WHERE stream=? AND seq>? AND seq<=?",
            (self._no(), after_seq, upto_seq),
        )
        return int(row[0]), int(row[1])

    def received_after(self, seq: int, otherwise: float) -> float:
        """When the first new record above segment ``seq`` came; ``otherwise`` when there is none. What was carried forward came
        long before."""
        row = self._tables.one(
            f"SELECT received_at FROM records WHERE stream=? AND seq>? AND ord>>{_ORDINAL_BITS}=seq "  # noqa: S608 - a number
            "ORDER BY seq, ordinal LIMIT 1",
            (self._no(), seq),
        )
        return otherwise if row is None else float(row[0])

    def agents(self, after: int, limit: int) -> Sequence[tuple[int, str]]:
        """The next agents (number, name) after the number ``after``."""
        return self._tables.all("SELECT no, name FROM agents WHERE no>? ORDER BY no LIMIT ?", (after, limit))

    def live_before(self, agent: int, name: str, base: int) -> list[Old]:
        """An agent's live records of which no whole frame lies at or after ``base``, oldest first."""
        oldest = self._tables.one(
            "SELECT min(seq), ruled FROM records r JOIN agents a ON a.no = r.agent WHERE a.no=?", (agent,)
        )
        if oldest is None or oldest[0] is None or oldest[0] >= base:
            return []
        rows = self._all(agent, base) if oldest[1] else self._newest(agent, base)
        records = {row[1]: (record_of((name, *row[1:])), row) for row in rows}
        kept = set(live([record for record, _ in records.values()]))
        kept |= {
            record.id
            for record, _ in records.values()
            if record.kind == Kind.DONE and self._intent_stays(record, kept, records)
        }
        return [Old(record, _origin(row[11])) for record, row in records.values() if record.id in kept and not row[12]]

    @staticmethod
    def _intent_stays(done: Record, kept: set[str], records: dict[str, tuple[Record, Any]]) -> bool:
        """An outcome goes no sooner than its intent: without it the intent would count as open again."""
        intent = records.get(done.meta.get("intent") or done.parent or "")
        return intent is not None and (intent[0].id in kept or bool(intent[1][12]))

    def _all(self, agent: int, base: int) -> list[Any]:
        return self._tables.all(
            f"SELECT {_COLUMNS} FROM records r JOIN streams s ON s.no=r.stream "  # noqa: S608 - fixed names
            "WHERE s.name=:stream AND r.agent=:agent ORDER BY r.ord, r.no",
            {"base": base, "stream": self._name, "agent": agent},
        )

    def _newest(self, agent: int, base: int) -> list[Any]:
        return self._tables.all(
            f"SELECT {_COLUMNS} FROM heads h JOIN records r ON r.no=h.record JOIN streams s ON s.no=r.stream "  # noqa: S608
            "WHERE s.name=:stream AND h.agent=:agent ORDER BY r.ord, r.no",
            {"base": base, "stream": self._name, "agent": agent},
        )

    def changed(self, after_seq: int, after_agent: int, limit: int) -> Sequence[tuple[int, str]]:
        """The next agents (number, name) after the number ``after_agent`` of which a frame lies above segment ``after_seq``."""
        return self._tables.all(
            "SELECT a.no, a.name FROM agents a JOIN records l ON l.no=a.latest JOIN streams s ON s.no=l.stream "
            "WHERE s.name=?1 AND a.no>?2 AND (l.seq>?3 OR a.no IN (SELECT r.agent FROM duplicates d JOIN records r ON "
            "r.no=d.record WHERE d.stream=s.no AND d.seq>?3)) ORDER BY a.no LIMIT ?4",
            (self._name, after_agent, after_seq, limit),
        )

    def entry(self, agent: str) -> CatalogueEntry | None:
        """Where an agent's latest restorable checkpoint lies, with all that it stands on; None when there is none."""
        record = self._view.restorable(agent)
        if record is None:
            return None
        chain: list[FramePlace] = []
        encoding, wanted = "", record.id
        while len(chain) <= MAX_CHAIN:
            found = self._place(agent, wanted)
            if found is None:
                return None
            place, how, base = found
            encoding = encoding or how
            chain.append(place)
            if base is None:
                return CatalogueEntry(
                    agent, record.kind, record.id, record.sha256, record.size, encoding, record.received_at, tuple(chain)
                )
            wanted = base
        return None

    def _place(self, agent: str, record_id: str) -> tuple[FramePlace, str, str | None] | None:
        """A frame of a record (a whole one if there is one), how its body is written, and what it stands on."""
        row = self._tables.one(
            "SELECT d.base NOTNULL, d.seq, g.epoch, d.ordinal, d.place, d.length, d.base, '' FROM agents a "
            "JOIN records r ON r.agent=a.no JOIN duplicates d ON d.record=r.no "
            "JOIN segments g ON g.stream=d.stream AND g.seq=d.seq WHERE a.name=?1 AND r.id=?2 "
            "UNION ALL SELECT r.base NOTNULL, r.seq, g.epoch, r.ordinal, r.place, r.length, r.base, r.encoding FROM agents a "
            "JOIN records r ON r.agent=a.no JOIN segments g ON g.stream=r.stream AND g.seq=r.seq WHERE a.name=?1 AND r.id=?2 "
            "ORDER BY 1, 2 DESC, 4 DESC LIMIT 1",
            (agent, record_id),
        )
        if row is None or not row[5]:
            return None
        return FramePlace(row[1], row[2], row[3], row[4], row[5]), row[7] or (WHOLE if row[6] is None else "delta"), row[6]

    def bases_before(self, base: int, after_seq: int, limit: int) -> tuple[list[Old], int]:
        """Records that deltas at or after ``base`` stand on and of which no whole frame lies there, from the next ``limit``
        segments after ``after_seq``. Returns them and the last segment that was looked at."""
        no = self._no()
        seqs = self._tables.all(
            "SELECT seq, reach FROM segments WHERE stream=? AND seq>? AND seq>=? ORDER BY seq LIMIT ?",
            (no, after_seq, base, limit),
        )
        found: dict[int, Old] = {}
        for seq, reach in seqs:
            if reach >= base:
                continue
            rows = self._tables.all(
                f"SELECT {_COLUMNS}, a.name FROM records d JOIN records r ON r.agent=d.agent AND r.id=d.base "  # noqa: S608
                "JOIN agents a ON a.no=r.agent WHERE d.stream=:stream AND d.seq=:seq AND d.base NOTNULL AND r.seq<:base",
                {"base": base, "stream": no, "seq": seq},
            )
            found.update({row[0]: Old(record_of((row[13], *row[1:])), _origin(row[11])) for row in rows if not row[12]})
        return list(found.values()), seqs[-1][0] if seqs else after_seq


def _origin(order: int) -> str:
    return f"{order >> _ORDINAL_BITS}.{order & ((1 << _ORDINAL_BITS) - 1)}"
