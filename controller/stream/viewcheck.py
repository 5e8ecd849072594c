"""Compares a controller's view with what a verification read from the store, a slice at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from controller.errors import Corrupt, Unavailable
from controller.ports import Clock
from controller.stream.limits import ORIGIN
from controller.stream.proof import ProofView
from controller.stream.view import View

SLICE = 200
"""Records that are compared in one go: some milliseconds, then the controller's loops have their turn."""

_COLUMNS = (
    "a.name, r.id, r.kind, r.sha256, r.size, r.parent, r.created_at, r.received_at, r.copies, r.attempt, r.meta, "
    "r.seq, r.ordinal"
)
_FROM = "FROM records r JOIN agents a ON a.no = r.agent JOIN streams s ON s.no = r.stream"


async def view_differences(view: View, proof: ProofView, stream: str, clock: Clock) -> AsyncIterator[tuple[str, str, str]]:
    """(agent, record, what is wrong) for everything in which the view is not what the store says, where both have it."""
    try:
        async for found in _differences(view, proof, stream, clock):
            yield found
    except (Corrupt, Unavailable) as error:  # SQLite says it: the file itself is damaged
        yield "", "", error.message


async def _differences(view: View, proof: ProofView, stream: str, clock: Clock) -> AsyncIterator[tuple[str, str, str]]:
    low = max(view.floor(stream)[0], proof.floor(stream)[0])
    high = min(view.position(stream)[0], proof.position(stream)[0])
    whole = view.floor(stream)[0] == proof.floor(stream)[0] == 0 and not proof.has_gaps()
    async for found in _chains(view, proof, stream, low, high, clock):
        yield found
    at = (low, 1 << 30)
    while True:
        rows = proof.tables.all(
            f"SELECT {_COLUMNS} {_FROM} WHERE s.name=? AND (r.seq, r.ordinal) > (?, ?) AND r.seq<=? "
            f"ORDER BY r.seq, r.ordinal LIMIT {SLICE}",
            (stream, *at, high),
        )
        for row in rows:
            theirs = view.tables.one(f"SELECT {_COLUMNS} {_FROM} WHERE a.name=? AND r.id=?", row[:2])
            carried = row[10] is not None and ORIGIN.encode() in row[10]  # the view may know it from where it stood first
            columns = 5 if carried else len(row) if whole else 11
            if theirs is None or row[:columns] != theirs[:columns]:
                yield (
                    row[0],
                    row[1],
                    "the view lacks it" if theirs is None else f"the view has it otherwise: {_which(row, theirs)}",
                )
        if whole and rows:
            last = high if len(rows) < SLICE else rows[-1][11] - 1
            for table in ("records", "duplicates"):
                if _count(view, stream, table, at[0], last) != _count(proof, stream, table, at[0], last):
                    yield "", "", f"between segments {at[0]:,} and {last:,} the view has another number of {table}"
        if len(rows) < SLICE:
            break
        at = rows[-1][11], rows[-1][12]
        await clock.sleep(0)
    async for found in _warm(view, clock):
        yield found


def _which(ours: Any, theirs: Any) -> str:
    names = _COLUMNS.replace("a.name", "agent").replace("r.", "").split(", ")
    return ", ".join(name for name, one, other in zip(names, ours, theirs, strict=True) if one != other)


def _count(view: View, stream: str, table: str, after: int, upto: int) -> int:
    row = view.tables.one(
        f"SELECT count(*) FROM {table} t JOIN streams s ON s.no = t.stream WHERE s.name=? AND t.seq>? AND t.seq<=?",  # noqa: S608
        (stream, after, upto),
    )
    return int(row[0])


async def _chains(
    view: View, proof: ProofView, stream: str, low: int, high: int, clock: Clock
) -> AsyncIterator[tuple[str, str, str]]:
    for seq in range(low + 1, high + 1):
        ours, theirs = proof.chain_at(stream, seq), view.chain_at(stream, seq)
        if ours and (ours != theirs or proof.epoch_at(stream, seq) != view.epoch_at(stream, seq)):
            yield "", "", f"segment {seq:,} has another chain hash or epoch in the view"
        if seq % SLICE == 0:
            await clock.sleep(0)


async def _warm(view: View, clock: Clock) -> AsyncIterator[tuple[str, str, str]]:
    """Every warm body is read and hashed."""
    after = -1
    while True:
        rows = view.tables.all(
            "SELECT w.record, a.name, r.id FROM warm w JOIN records r ON r.no = w.record JOIN agents a ON a.no = r.agent "
            "WHERE w.record>? ORDER BY w.record LIMIT 20",
            (after,),
        )
        for number, agent, record in rows:
            after = number
            try:
                view.check_warm(agent, record)
            except Corrupt as error:
                yield agent, record, error.message
        if len(rows) < 20:
            break
        await clock.sleep(0)
    held = view.held()
    for begin in range(0, len(held), 20):
        numbers = ",".join(map(str, held[begin : begin + 20]))
        for agent, record in view.tables.all(
            f"SELECT a.name, r.id FROM records r JOIN agents a ON a.no = r.agent WHERE r.no IN ({numbers})"  # noqa: S608
        ):
            try:
                view.check_warm(agent, record)
            except Corrupt as error:
                yield agent, record, error.message
        await clock.sleep(0)
