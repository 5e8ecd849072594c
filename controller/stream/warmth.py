"""The newest bodies in memory, in front of the view's table ``warm``.

An agent that writes every second replaces its newest body every second: packing and writing each of them took a third of what
an 80-KB record cost the holder, and none was ever read again. So bodies are kept here and written late:

- when they no longer fit (``max_bytes``, least recently used first);
- when they have been the newest for ``SETTLED_ROUNDS`` rounds of ``settle`` (the controller calls it every second);
- when the view is closed.

What a killed process had not written is cold at its next start and is read from the store, along a bounded chain, like any
other cold body: only agents that wrote in the last seconds are concerned. Bodies that are no longer the newest stay as long as
there is room and are never written: a rewind may want them, and can do without.

Nothing here proves anything: who puts a body in has decoded and hashed it.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable

from controller.stream.tables import Tables, pack

DEFAULT_MAX_BYTES = 128 * 2**20
SETTLED_ROUNDS = 3
SETTLE_BYTES = 4 * 2**20
"""Written in one round at most: packing them takes about 10 ms of the loop that also keeps the lease."""

_INSERT = "INSERT OR REPLACE INTO warm VALUES (?, ?, ?)"


class Warmth:
    """Bodies by record number. Numbers are used again after a rewind, so whatever removes a record must ``drop`` it here.
    With ``max_bytes`` 0 nothing is held: every body is written with its segment."""

    def __init__(self, tables: Tables, max_bytes: int) -> None:
        self._tables = tables
        self.max_bytes = max_bytes
        self.bytes = 0
        self._newest: OrderedDict[int, bytes] = OrderedDict()
        self._older: OrderedDict[int, bytes] = OrderedDict()
        self._unwritten: dict[int, int] = {}
        """Newest bodies that only this memory has, in the order in which they came; the round in which they did."""
        self._round = 0
        # Weakly: SQLite would hold on to this object, which holds the connection: a circle that Python's collector cannot see.
        me = weakref.ref(self)
        tables.function("held", 1, lambda no: (warmth := me()) is not None and no in warmth)

    def __contains__(self, no: object) -> bool:
        return no in self._newest or no in self._older

    def __len__(self) -> int:
        return len(self._newest) + len(self._older)

    def numbers(self) -> list[int]:
        return [*self._newest, *self._older]

    def get(self, no: int) -> bytes | None:
        """None: look into the table."""
        body = self._newest.get(no)
        if body is None:
            return self._older.get(no)
        self._newest.move_to_end(no)
        return body

    def may_be_in_table(self, no: int) -> bool:
        """False when the table certainly has no row of it."""
        return no not in self._unwritten and no not in self._older

    def keep(self, newest: Iterable[tuple[int, bytes]], older: Iterable[int], gone: Iterable[int]) -> None:
        """After a segment was committed: bodies of new newest records, records that are the second newest now, records that are
        neither any more or whose bodies have rows now."""
        for no in gone:
            self._forget(no)
        for no, body in newest:
            self._forget(no)
            self._newest[no] = body
            self._unwritten[no] = self._round
            self.bytes += len(body)
        for no in older:
            body_before = self._newest.pop(no, None)
            if body_before is None:
                continue
            if self._unwritten.pop(no, None) is None:  # its row stays: it is as good as this
                self.bytes -= len(body_before)
            else:
                self._older[no] = body_before

    def is_newest(self, no: int) -> None:
        """What came after this record was forgotten: from now on its body must not get lost."""
        body = self._older.pop(no, None)
        if body is not None:
            self._newest[no] = body
            self._unwritten[no] = self._round

    def drop(self, numbers: Iterable[int]) -> None:
        """These records are no longer there."""
        for no in numbers:
            self._forget(no)

    def _forget(self, no: int) -> None:
        body = self._newest.pop(no, None)
        if body is None:
            body = self._older.pop(no, None)
        if body is not None:
            self.bytes -= len(body)
        self._unwritten.pop(no, None)

    def make_room(self) -> None:
        """Back to ``max_bytes``. Outside of a transaction. Raises Unavailable, Corrupt (the file)."""
        while self.bytes > self.max_bytes and self._older:
            self.bytes -= len(self._older.popitem(last=False)[1])
        over, leaving = self.bytes - self.max_bytes, list[int]()
        for no, body in self._newest.items():
            if over <= 0:
                break
            over -= len(body)
            leaving.append(no)
        if leaving:
            self._write([no for no in leaving if no in self._unwritten])
            self.drop(leaving)

    def settle(self) -> None:
        """One round: writes what has been the newest for a while. Outside of a transaction. Raises like ``make_room``."""
        self._round += 1
        chosen, size = list[int](), 0
        for no, since in self._unwritten.items():
            if since + SETTLED_ROUNDS > self._round or size >= SETTLE_BYTES:
                break
            chosen.append(no)
            size += len(self._newest[no])
        self._write(chosen)
        self.make_room()

    def write_all(self) -> None:
        """Before the file is closed. Raises like ``make_room``."""
        self._write(list(self._unwritten))

    def _write(self, numbers: list[int]) -> None:
        if not numbers:
            return
        with self._tables.transaction():
            self._tables.many(_INSERT, ((no, *pack(self._newest[no])) for no in numbers))
        for no in numbers:
            del self._unwritten[no]
