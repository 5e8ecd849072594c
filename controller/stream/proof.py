"""The file of a verification: a view of its own, built from the store again, and what was found wrong on the way.

It is where the walk stands, so a verification that was interrupted goes on from there; and at the end it is what the store
says, to compare a controller's view with. Unlike a view it collects damage: a body that does not verify is noted with its
agent and record and the walk goes on; segments that cannot be proven at all are stepped over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from controller.domain.model import Frame, Record, SegmentRef
from controller.errors import Corrupt
from controller.stream.indexing import Round
from controller.stream.limits import DEFAULT_LIMITS, MAX_CHAIN, Limits
from controller.stream.proving import Proven
from controller.stream.segment import Segment
from controller.stream.view import View
from controller.stream.warmth import Warmth

MAX_PROBLEMS = 10_000
"""Problems that are kept one by one; further ones are only counted."""

_TABLES = """
CREATE TABLE IF NOT EXISTS verification (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS problems (
    no INTEGER PRIMARY KEY, stream TEXT NOT NULL, seq INTEGER NOT NULL, what TEXT NOT NULL, agent TEXT NOT NULL,
    record TEXT NOT NULL, document TEXT NOT NULL, UNIQUE (stream, seq, what, agent, record));
"""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in one region's copy."""

    region: str
    stream: str
    seq: int
    """The segment; 0 when it is not about one."""
    epoch: int
    key: str
    """Object key below the group's prefix, or what else is damaged: ``head``, ``view``, ``agent#…`` (a catalogue item)."""
    what: str
    """``missing``, ``header``, ``frame``, ``index``, ``trailer``, ``content`` (valid by itself, not what the chain says),
    ``body``, ``salvage``, ``snapshot``, ``catalogue``, ``head``, ``diverged``, ``view``."""
    agent: str
    record: str
    """The first record that is concerned; "" when none is, or none is known."""
    records: int
    """How many are concerned."""
    detail: str
    source: str
    """Region whose copy proves itself; "" = none does."""
    fix: str
    """What to type."""


class ProofView(View):
    """See the module. One walk at a time owns it; ``apply`` may run in a thread."""

    def __init__(self, path: Path | None, limits: Limits = DEFAULT_LIMITS) -> None:
        super().__init__(path, limits, warm_max_bytes=0)  # a walk that is cut off goes on from its file
        for statement in _TABLES.split(";"):
            self._tables.run(statement)
        self._gaps: bool | None = None
        self._counted: dict[str, tuple[int, int, int, int]] = {}
        """Stream → the segment up to which was counted, and segments, records and bytes."""
        self.bad: list[tuple[Record, str]] = []
        """Bodies of the last ``apply`` that do not verify."""
        self.unproven: list[Record] = []
        """Records of the last ``apply`` whose body cannot be judged: what they stand on is not there."""

    def _round(self, stream: int, floor_seq: int, segment: Segment, proven: Sequence[Proven | None] | None) -> Round:
        self.bad, self.unproven = [], []
        # What stands on a record from before the copy, or from a gap in it, cannot be judged; that is no damage of its own.
        return _Lenient(self, self._warmth, stream, floor_seq or int(self.has_gaps()), segment, self._limits)

    def has_gaps(self) -> bool:
        """Whether segments were stepped over."""
        if self._gaps is None:
            self._gaps = self._tables.one("SELECT 1 FROM segments WHERE records=0 AND bytes=0 LIMIT 1") is not None
        return self._gaps

    def is_gap(self, stream: str, seq: int) -> bool:
        """Whether this segment was stepped over."""
        row = self._tables.one(
            "SELECT 1 FROM segments WHERE stream=? AND seq=? AND records=0 AND bytes=0", (self._stream(stream)[0], seq)
        )
        return row is not None

    def agents_between(self, stream: str, after: str, upto: str | None) -> Iterator[str]:
        """Names of the stream's agents after ``after`` up to ``upto`` (None: to the last one), ascending in UTF-8."""
        while True:
            rows = self._tables.all(
                "SELECT a.name FROM agents a JOIN records l ON l.no=a.latest JOIN streams s ON s.no=l.stream "
                "WHERE s.name=?1 AND a.name>?2 AND (?3 IS NULL OR a.name<=?3) ORDER BY a.name LIMIT 100",
                (stream, after, upto),
            )
            yield from (row[0] for row in rows)
            if len(rows) < 100:
                return
            after = rows[-1][0]

    def reset(self, stream: str, seq: int, chain: str) -> None:
        super().reset(stream, seq, chain)
        self._gaps = None
        self._counted.pop(stream, None)

    def skip(self, ref: SegmentRef, chain: str) -> None:
        """Steps over a segment whose content nobody can prove."""
        with self._tables.transaction():
            no = self._stream(ref.stream)[0]
            if no == 0:
                raise Corrupt(f"stream {ref.stream} is not begun", hint="reset it first")
            self._tables.run("INSERT INTO segments VALUES (?, ?, ?, ?, 0, 0, 0, ?)", (no, ref.seq, chain, ref.epoch, ref.seq))
            self._tables.run("UPDATE streams SET seq=?, chain=? WHERE no=?", (ref.seq, chain, no))
        self._gaps = True

    def counts(self, stream: str) -> tuple[int, int, int]:
        """Segments, frames and bytes that were walked."""
        no, at = self._stream(stream)[:2]
        upto, segments, records, size = self._counted.get(stream, (0, 0, 0, 0))
        row = self._tables.one(
            "SELECT count(*), coalesce(sum(records), 0), coalesce(sum(bytes), 0) FROM segments WHERE stream=? AND seq>?",
            (no, upto),
        )
        found = segments + int(row[0]), records + int(row[1]), size + int(row[2])
        self._counted[stream] = (at, *found)  # asked for after each segment: only what is new is counted
        return found

    def rewind(self, stream: str, seq: int) -> None:
        self._counted.pop(stream, None)
        super().rewind(stream, seq)

    def counts_above(self, stream: str, seq: int) -> tuple[int, int]:
        """Frames and bytes in the segments after ``seq``."""
        row = self._tables.one(
            "SELECT coalesce(sum(records), 0), coalesce(sum(bytes), 0) FROM segments WHERE stream=? AND seq>?",
            (self._stream(stream)[0], seq),
        )
        return int(row[0]), int(row[1])

    def received(self, stream: str, at: float) -> bool:
        """Whether a record of the stream came at exactly this time."""
        return (
            self._tables.one("SELECT 1 FROM records WHERE stream=? AND received_at=?", (self._stream(stream)[0], at))
            is not None
        )

    def last_received(self, stream: str, seq: int) -> float | None:
        """When the last record of the last segment with any, up to ``seq``, was received; None when there is none."""
        row = self._tables.one(
            "SELECT max(received_at) FROM records WHERE stream=?1 AND seq="
            "(SELECT max(seq) FROM records WHERE stream=?1 AND seq<=?2)",
            (self._stream(stream)[0], seq),
        )
        return None if row is None or row[0] is None else float(row[0])

    # ------------------------------------------------------------------------------------------------------ what is wrong

    def note(self, problem: Problem) -> None:
        """Once, however often the walk comes by."""
        key = (problem.stream, problem.seq, problem.what, problem.agent, problem.record)
        if self.count_problems() >= MAX_PROBLEMS:
            self.put("more", int(self.value("more") or 0) + 1)
            return
        self._tables.run("INSERT OR REPLACE INTO problems VALUES (NULL, ?, ?, ?, ?, ?, ?)", (*key, json.dumps(asdict(problem))))

    def problems(self, stream: str | None = None) -> tuple[Problem, ...]:
        """What was found so far, in the order of the streams."""
        rows = self._tables.all("SELECT document FROM problems ORDER BY stream, seq, no")
        found = tuple(Problem(**json.loads(row[0])) for row in rows)
        return found if stream is None else tuple(one for one in found if one.stream == stream)

    def count_problems(self) -> int:
        """Those that are kept, and those that were only counted."""
        return int(self._tables.one("SELECT count(*) FROM problems")[0]) + int(self.value("more") or 0)

    def forget_problems(self, stream: str, first_seq: int, *, also_seq_0: bool = True) -> None:
        """Those of segments from ``first_seq`` on will be found again, and those that are not about a segment."""
        self._tables.run("DELETE FROM problems WHERE stream=? AND (seq>=? OR (seq=0 AND ?))", (stream, first_seq, also_seq_0))

    def resolve(self, problem: Problem) -> None:
        """It was repaired, or is none any more."""
        self._tables.run(
            "DELETE FROM problems WHERE stream=? AND seq=? AND what=? AND agent=? AND record=?",
            (problem.stream, problem.seq, problem.what, problem.agent, problem.record),
        )

    def value(self, name: str) -> Any:
        """Something that was kept with ``put``; None when it was not."""
        row = self._tables.one("SELECT value FROM verification WHERE name=?", (name,))
        return None if row is None else json.loads(row[0])

    def put(self, name: str, value: object) -> None:
        self._tables.run("INSERT OR REPLACE INTO verification VALUES (?, ?)", (name, json.dumps(value)))


class _Lenient(Round):
    """Notes a body that does not verify and goes on."""

    def __init__(self, proof: ProofView, held: Warmth, stream: int, floor_seq: int, segment: Segment, limits: Limits) -> None:
        super().__init__(proof.tables, held, stream, floor_seq, segment, limits)
        self._proof = proof
        self._noted: set[int] = set()

    def _decode(self, agent: int, frame: Frame, proven: Proven | None) -> tuple[bytes | None, int]:
        body: bytes | None = None
        depth = MAX_CHAIN
        try:
            body, depth = super()._decode(agent, frame, None)
        except Corrupt as error:
            if id(frame) not in self._noted:
                self._proof.bad.append((frame.record, error.message))
        else:
            if body is None and id(frame) not in self._noted:
                self._proof.unproven.append(frame.record)
        self._noted.add(id(frame))
        return body, depth
