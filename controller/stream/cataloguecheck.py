"""Compares a store's catalogue with what a verification read from the same store: one item after the other, a page at a time.

An item may be older than its agent's newest record: the holder brings the catalogue up to date with each snapshot. So an item
is judged by what it says (the record, its hash, the bytes where its frames lie), and by its age only once that is certain:
a head that names three snapshots of its own epoch had its catalogue written with the first of them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from controller.domain.model import CatalogueEntry, FramePlace, Head, SegmentRef
from controller.domain.retention import is_salvage
from controller.ports import Clock, FoundEntry, RegionStore
from controller.stream.keeping import WHOLE, Keeping
from controller.stream.proof import ProofView

PAGE = 100
"""Items that are judged in one go: some milliseconds, then the controller's loops have their turn."""
SNAPSHOTS_SETTLED = 3


@dataclass(frozen=True, slots=True)
class Doubt:
    """One item that is wrong, absent, or of nobody. ``record``: what the agent's item should name; "" = nothing is proven."""

    agent: str
    record: str
    why: str


@dataclass(frozen=True, slots=True)
class Judge:
    """``head``: of the store, as sane as it could be made. ``trusted``: nothing is wrong with it."""

    proof: ProofView
    head: Head
    trusted: bool

    @property
    def settled(self) -> int:
        """The segment up to which every agent's item is certainly written; 0 = none."""
        mine = [one.seq for one in self.head.snapshots if one.epoch == self.head.epoch]
        return mine[0] if self.trusted and len(mine) >= SNAPSHOTS_SETTLED else 0

    @property
    def _keeping(self) -> Keeping:
        return Keeping(self.proof, self.head.stream)

    def right(self, agent: str) -> CatalogueEntry | None:
        """What the agent's item should say, as the chain proves it."""
        return self._keeping.entry(agent)

    def wrong(self, found: FoundEntry) -> str:
        """Why an item is not what it should be; "" when it is."""
        entry = found.entry
        if entry is None:
            return found.problem or self._absent(found.agent)
        return self._writer(entry) or self._record(entry) or self._places(entry) or self._late(entry)

    def _writer(self, entry: CatalogueEntry) -> str:
        oldest = max((place.epoch for place in entry.chain), default=0)
        if entry.by_epoch < max(1, oldest) or (self.trusted and entry.by_epoch > self.head.epoch):
            return f"it says that epoch {entry.by_epoch} wrote it, of frames of epoch {oldest}, in a store at {self.head.epoch}"
        if self.settled and entry.by_epoch != self.head.epoch:
            return f"epoch {entry.by_epoch} wrote it, and epoch {self.head.epoch} has written all items anew since"
        return ""

    def _record(self, entry: CatalogueEntry) -> str:
        row = self.proof.tables.one(
            "SELECT r.kind, r.sha256, r.size, r.received_at FROM records r JOIN agents a ON a.no=r.agent "
            "JOIN streams s ON s.no=r.stream WHERE s.name=? AND a.name=? AND r.id=?",
            (self.head.stream, entry.agent, entry.id),
        )
        if row is None:
            if entry.chain and all(self._excused(entry, place) for place in entry.chain[:1]):
                return ""
            return f"it names record {entry.id!a}, which the agent does not have"
        said = (entry.kind, entry.sha256, entry.size, entry.received_at)
        right = (row[0], row[1].hex(), row[2], row[3])
        names = ("kind", "sha256", "size", "received_at")
        other = [f"{name} {one!a} and not {two!a}" for name, one, two in zip(names, said, right, strict=True) if one != two]
        return f"of record {entry.id!a} it says {', '.join(other)}" if other else ""

    def _places(self, entry: CatalogueEntry) -> str:
        wanted: str | None = entry.id
        for number, place in enumerate(entry.chain):
            if wanted is None:
                return f"it names {len(entry.chain)} frames, and number {number} is whole"
            if self._excused(entry, place):
                return ""
            frame = self._frame(entry.agent, place)
            if frame is None or frame[0] != wanted:
                return f"at frame {place.ordinal} of segment {place.seq:,} there is no frame of record {wanted!a}"
            _, base, how, offset, length = frame
            right = FramePlace(place.seq, self.proof.epoch_at(self.head.stream, place.seq) or 0, place.ordinal, offset, length)
            if place != right:
                return f"it says that record {wanted!a} lies at {place!a}, it lies at {right!a}"
            encoding = "delta" if base is not None else how or WHOLE
            if number == 0 and entry.encoding != encoding:
                return f"it says that the frame of record {wanted!a} is {entry.encoding!a}, it is {encoding!a}"
            wanted = base
        return "" if wanted is None else f"it does not say where record {wanted!a} lies, on which the last of its frames stands"

    def _frame(self, agent: str, place: FramePlace) -> tuple[str, str | None, str, int, int] | None:
        row = self.proof.tables.one(
            "SELECT r.id, r.base, r.encoding, r.place, r.length FROM records r JOIN agents a ON a.no=r.agent "
            "JOIN streams s ON s.no=r.stream WHERE s.name=?1 AND r.seq=?2 AND r.ordinal=?3 AND a.name=?4 "
            "UNION ALL SELECT r.id, d.base, '', d.place, d.length FROM duplicates d JOIN records r ON r.no=d.record "
            "JOIN agents a ON a.no=r.agent JOIN streams s ON s.no=d.stream "
            "WHERE s.name=?1 AND d.seq=?2 AND d.ordinal=?3 AND a.name=?4",
            (self.head.stream, place.seq, place.ordinal, agent),
        )
        return None if row is None else (row[0], row[1], row[2], row[3], row[4])

    def _excused(self, entry: CatalogueEntry, place: FramePlace) -> bool:
        """Whether a place may rightly point at nothing: damage that is told already, or what was let go of a moment ago."""
        if self.proof.is_gap(self.head.stream, place.seq):
            return True
        if self.settled:
            return False
        if place.seq < self.head.base:
            return True
        cut = entry.by_epoch < self.head.epoch and place.seq >= 1 and place.epoch >= 1
        return cut and is_salvage(self.head, SegmentRef(self.head.stream, place.seq, place.epoch))

    def _late(self, entry: CatalogueEntry) -> str:
        now = self.right(entry.agent) if self.settled else None
        if now is None or now.id == entry.id or self._changed(entry.agent) or not self._older(entry.agent, entry.id, now.id):
            return ""
        return f"it names record {entry.id!a}; its newest was {now.id!a} before segment {self.settled:,} already"

    def _absent(self, agent: str) -> str:
        if not self.settled or self._changed(agent) or self.right(agent) is None:
            return ""
        return f"it has no item, and has not written since segment {self.settled:,}"

    def _older(self, agent: str, one: str, other: str) -> bool:
        rows = self.proof.tables.all(
            "SELECT r.id FROM records r JOIN agents a ON a.no=r.agent WHERE a.name=? AND r.id IN (?, ?) ORDER BY r.ord, r.no",
            (agent, one, other),
        )
        return [row[0] for row in rows] == [one, other]

    def _changed(self, agent: str) -> bool:
        """Whether a frame of the agent lies above ``settled``: its item may be on its way."""
        row = self.proof.tables.one(
            "SELECT 1 FROM agents a JOIN records r ON r.agent=a.no WHERE a.name=?1 AND (r.seq>?2 OR EXISTS "
            "(SELECT 1 FROM duplicates d WHERE d.record=r.no AND d.seq>?2)) LIMIT 1",
            (agent, self.settled),
        )
        return row is not None


async def catalogue_doubts(
    store: RegionStore,
    proof: ProofView,
    head: Callable[[], tuple[Head, bool]],
    catch_up: Callable[[], Awaitable[object]],
    clock: Clock,
) -> AsyncIterator[Doubt]:
    """Everything that is wrong with the catalogue of one stream in one store. ``head``: the newest that is known, and whether
    it is sound; ``catch_up`` walks on to what was written meanwhile. Raises Unavailable."""
    after = ""
    stream = head()[0].stream
    while True:
        page = await store.list_catalogue(stream, after, PAGE)
        reach = max((place.seq for found in page if found.entry for place in found.entry.chain), default=0)
        if reach > proof.position(stream)[0]:
            await catch_up()
        judge = Judge(proof, *head())
        end = page[-1].agent if len(page) == PAGE else None
        for doubt in _absent(judge, {found.agent for found in page}, after, end):
            yield doubt
        for found in page:
            why = judge.wrong(found)
            if why:
                right = judge.right(found.agent)
                yield Doubt(found.agent, "" if right is None else right.id, why)
        if end is None:
            return
        after = end
        await clock.sleep(0)


def _absent(judge: Judge, there: set[str], after: str, end: str | None) -> list[Doubt]:
    """Agents without an item, among the names after ``after`` up to ``end`` (None: to the last one)."""
    if not judge.settled:
        return []
    found: list[Doubt] = []
    for name in judge.proof.agents_between(judge.head.stream, after, end):
        if name not in there:
            why = judge.wrong(FoundEntry(name, None, "", None))
            right = judge.right(name) if why else None
            if right is not None:
                found.append(Doubt(name, right.id, why))
    return found
