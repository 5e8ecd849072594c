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

Here are the streams' positions and every change; what agents have is asked in ``records``. Synchronous and short. One caller
at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from controller.domain.model import GENESIS, SegmentRef
from controller.errors import Conflict, Corrupt, NotFound, Refused, Unavailable
from controller.stream import warmth
from controller.stream.indexing import Round
from controller.stream.limits import DEFAULT_LIMITS, MAX_CHAIN, Limits
from controller.stream.proving import Proven
from controller.stream.records import Records
from controller.stream.segment import Segment
from controller.stream.tables import Tables, pack

_NOT_NEWEST = (
    "NOT EXISTS (SELECT 1 FROM records r JOIN heads h ON h.agent = r.agent AND h.kind = r.kind "
    "WHERE r.no = warm.record AND h.warm AND warm.record IN (h.record, h.record2))"
)
_PAGE = 500
_SLICE = 512
"""Segments that one call of ``forget`` goes through at most."""


class View(Records):
    """See the module. ``path`` None keeps all in memory. ``warm_max_bytes``: see ``Warmth``. Raises Misconfigured when the
    path is another program's file, Unavailable when the file is locked or not accessible."""

    def __init__(self, path: Path | None, limits: Limits = DEFAULT_LIMITS, warm_max_bytes: int | None = None) -> None:
        tables = Tables(path)
        super().__init__(tables, warmth.Warmth(tables, warmth.DEFAULT_MAX_BYTES if warm_max_bytes is None else warm_max_bytes))
        self._limits = limits
        self._lent: set[int] = set()
        self.awakened = False
        """Set when what deltas stand on came after them: their bodies can be loaded now. Whoever does so clears it."""
        self._tables.run(f"DELETE FROM warm WHERE {_NOT_NEWEST}")  # noqa: S608 - what a stop left behind
        for (half_loaded,) in self._tables.all("SELECT name FROM streams WHERE loading"):
            self.reset(half_loaded, *self.floor(half_loaded))

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

    # ------------------------------------------------------------------------------------------------- for the reader

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

    def _stream_of(self, record: int) -> int | None:
        row = self._tables.one("SELECT stream FROM records WHERE no=?", (record,))
        return None if row is None else int(row[0])
