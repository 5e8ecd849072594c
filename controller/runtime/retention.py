"""Keeps a held stream bounded: carries live records forward, moves the base of each store, deletes what lies before it.

One bounded step per tick. Nothing of it has to be remembered: a round that was interrupted (a crash, a promotion) is begun
anew by whoever holds the stream then, from what the stores and the view say. In this order, each only after the one before:

1. *carry*: live records that lie before the new base only (``stream/live.py``), and the bases of deltas that stay, are written
   again, whole, through the writer. Meanwhile no delta is taken that stands on what lies before the new base.
2. *move*: in each store that has committed all of that, one conditional update under the fence moves the base.
3. *forget*: the view lets go of what lies before the home store's base.
4. *delete*: objects before a store's base, salvage excepted, in batches. They are found by listing, so that what a crash
   left behind is found again.

Beside that it makes an index snapshot every so often and puts it into every store that has its segment; the head names it,
with its hash. The newest few stay. With each snapshot every store's *catalogue* is brought up to date: one item for each agent
that changed, which says where its latest restorable checkpoint lies.

A live record that cannot be read stops the round before anything moves: it is named, and nothing is deleted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from controller.domain import retention
from controller.domain.model import Baseline, Frame, NamedSnapshot, Record, SnapshotRef
from controller.errors import Corrupt, DrError, FenceLost, NotFound, Unavailable
from controller.ports import Clock, RegionStore
from controller.stream.batcher import Entry
from controller.stream.keeping import Keeping, Old
from controller.stream.limits import ORIGIN
from controller.stream.reader import read_many
from controller.stream.segment import frame
from controller.stream.snapshot import make_snapshot
from controller.stream.view import View
from controller.stream.writer import StreamWriter

AGENTS = 200
"""Agents that one step looks at."""
AGENTS_LISTED = 50
"""Agents that one step puts into a catalogue."""
SEGMENTS = 5000
"""Segments whose deltas one step looks at."""
CARRY_RECORDS = 200
CARRY_BYTES = 4 * 2**20
"""What one step carries forward: about as much as one segment holds."""
LOOK_SECONDS = 10.0
"""Pause before it is asked again whether a round is due, when none was."""
LISTED = 1000
SNAPSHOTS_KEPT = 3
FORGET_RECORDS = 5000
ROUNDS = 8
"""Rounds in one retention time: so much longer than asked for is kept, at most an eighth."""


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """``retention_seconds``: how far back any point in time can be restored. ``snapshot_seconds``: time between two index
    snapshots."""

    retention_seconds: float
    snapshot_seconds: float = 300.0

    @property
    def round_seconds(self) -> float:
        """Time between the beginnings of two rounds."""
        return self.retention_seconds / ROUNDS


@dataclass(slots=True)
class _Round:
    """A new base under way. ``closed`` and ``taken``: the last segment and the records on their way when it was announced;
    later deltas do not stand on what lies before it."""

    base: int
    chain: str
    taken: tuple[Entry, ...]
    closed: int
    agent: int = 0
    """The last agent that was looked at."""
    agents_done: bool = False
    segment: int = 0
    todo: list[Old] = field(default_factory=list)
    carried: int = 0


@dataclass(slots=True)
class _Listing:
    """How far one store's catalogue is. A new epoch begins at 0: items carry no condition, so each epoch writes all of them."""

    done: int = 0
    """Changes up to this segment are in it."""
    upto: int = 0
    """Changes up to this one are being written; 0: none are."""
    agent: int = 0
    """The last agent that was looked at."""


@dataclass(frozen=True, slots=True)
class _Goal:
    """A base that stores may take over once they have committed everything up to ``sealed``."""

    base: int
    chain: str
    sealed: int


class Retention:
    """One held stream's. ``step`` is called at the holder's pace and raises what its ports raise; the next one goes on."""

    def __init__(
        self,
        *,
        writer: StreamWriter,
        view: View,
        stores: Mapping[str, RegionStore],
        home: str,
        clock: Clock,
        policy: RetentionPolicy,
    ) -> None:
        self._writer = writer
        self._fence = writer.fence
        self._stream = writer.fence.stream
        self._view = view
        self._keeping = Keeping(view, self._stream)
        self._stores = stores
        self._home = home
        self._clock = clock
        self._policy = policy
        self._round: _Round | None = None
        self._next_round = float("-inf")
        _, head = writer.home_copy()
        self._goal = _Goal(head.base, head.base_chain, writer.starts[-1].first_seq)
        self._carried = head.base
        """The base for which everything was carried forward: by whoever moved the home store's, or by us since."""
        self._snapshot: tuple[NamedSnapshot, bytes, set[str]] | None = None
        """The one that is being handed out, with the stores that have it."""
        self._snapshot_at = clock.monotonic()
        self._snapshot_seq = 0
        self.kept_bytes: int | None = None
        """Of the segments from the view's floor on, as of the last snapshot; None before the first."""
        self._tidied: set[str] = set()
        self._listed: dict[str, _Listing] = {region: _Listing() for region in stores}
        self._swept: dict[str, int] = {}
        """Store → the base before which nothing is left."""
        self._cursor: dict[str, int] = {}
        self.lost: tuple[str, ...] = ()
        """Live records that this copy could not carry because what they stand on was gone before."""

    async def step(self) -> str | None:
        """One bounded piece of work. Returns a sentence, "" when there is nothing to tell of it, None when there was nothing to
        do. Raises DrError."""
        failed: DrError | None = None
        for work in (
            self._picture, self._hand_out, self._list, self._move, self._forget, self._delete, self._tidy, self._carry_on,
            self._begin,
        ):  # fmt: skip
            try:
                said = await work()
            except FenceLost:
                raise
            except DrError as error:  # a store that does not answer must not keep the others waiting
                failed = failed or error
                continue
            if said is not None:
                return self._unless(failed, said)
        return self._unless(failed, None)

    @staticmethod
    def _unless(failed: DrError | None, said: str | None) -> str | None:
        if failed is not None:
            raise failed
        return said

    # ------------------------------------------------------------------------------------------------------ a round

    async def _begin(self) -> str | None:
        now = self._clock.monotonic()
        if self._round is not None or self._writer.frozen:
            return None
        base = self._ahead()
        if base is None and now >= self._next_round:
            base = self._due()
            self._next_round = now + (self._policy.round_seconds if base is not None else LOOK_SECONDS)
        chain = None if base is None else self._view.chain_at(self._stream, base - 1)
        if base is None or chain is None:
            return None
        self._round = _Round(base, chain, self._writer.keep_from(base), self._writer.seq, segment=base - 1)
        return f"carrying live records forward, out of the segments before {base}"

    def _ahead(self) -> int | None:
        """A store's base that an earlier holder moved further than the home store's: deltas that we took since may stand on
        what that store let go of, so the round is made good at once."""
        base = max(place.base for place in self._writer.places() if place.attached or place.region == self._home)
        return base if base > self._carried and base <= self._view.position(self._stream)[0] + 1 else None

    def _due(self) -> int | None:
        young = self._keeping.first_after(self._writer.now() - self._policy.retention_seconds)
        end = self._view.position(self._stream)[0] + 1
        base = retention.next_base(end if young is None else young, self._writer.places())
        return base if base is not None and base > self._carried else None

    async def _carry_on(self) -> str | None:
        """Looks at one page, or carries one batch. "" = busy, nothing to tell."""
        round_ = self._round
        if round_ is None:
            return None
        if round_.todo:
            await self._carry(round_)
            return ""
        if not round_.agents_done:
            page = self._keeping.agents(round_.agent, AGENTS)
            for number, name in page:
                round_.todo += self._keeping.live_before(number, name, round_.base)
                round_.agent = number
            round_.agents_done = not page
            return ""
        if not all(entry.seq for entry in round_.taken):
            return ""
        if round_.segment < max([round_.closed, *(entry.seq for entry in round_.taken)]):
            round_.todo, round_.segment = self._keeping.bases_before(round_.base, round_.segment, SEGMENTS)
            return ""
        self._goal = _Goal(round_.base, round_.chain, self._writer.seq)
        self._carried = round_.base
        self._round = None
        self._snapshot_at = float("-inf")  # the next one replaces those that the move makes useless
        return f"{round_.carried} live records were carried forward; the base may move to {round_.base}"

    async def _carry(self, round_: _Round) -> None:
        """The next batch. What is done leaves the list only when it is acknowledged."""
        batch = list(_batch(round_.todo))
        store = self._stores[self._home]
        answers = await read_many(self._view, store, [(old.record.agent, old.record.id) for old in batch])
        frames: list[Frame] = []
        for old in batch:
            answer = answers[old.record.agent, old.record.id]
            if isinstance(answer, DrError):
                self._cannot_carry(old.record, answer)
                continue
            frames.append(_again(old, answer[1]))
        if frames:
            await self._writer.carry(frames)
        del round_.todo[: len(batch)]
        round_.carried += len(frames)

    def _cannot_carry(self, record: Record, error: DrError) -> None:
        """What stands on something that an earlier base let go of is lost already, and said so. Anything else stops here."""
        if isinstance(error, NotFound) and self._view.link(record.agent, record.id) is not None and self._is_lost(record):
            self.lost = (*self.lost, f"{record.agent}/{record.id}")[-20:]
            return
        if isinstance(error, Unavailable):
            raise error
        raise Corrupt(
            f"live record {record.id!a} of agent {record.agent!a} cannot be carried forward: {error.message}",
            hint=f"nothing is deleted until it can be read: drctl verify {self._home}",
        ) from error

    def _is_lost(self, record: Record) -> bool:
        """Whether the chain of deltas leads out of this copy."""
        wanted: str | None = record.id
        for _ in range(100):
            if wanted is None:
                return False
            link = self._view.link(record.agent, wanted)
            if link is None:
                return self._view.begins_late(record.agent, record.id)
            wanted = link.base
        return False

    # ------------------------------------------------------------------------------------------------ base, deletion

    async def _move(self) -> str | None:
        goal = self._goal
        for region in retention.may_move(goal.base, goal.sealed, self._writer.places()):
            await self._set_base(region, goal)
            return f"the base of {region} is {goal.base} now"
        return None

    async def _set_base(self, region: str, goal: _Goal) -> None:
        store = self._stores[region]
        head = await store.read_head(self._stream)
        ours = self._writer.chain_at(head.seq)
        if ours is not None and ours != head.chain:
            raise Corrupt(
                f"the store of {region} holds another history than ours at segment {head.seq}", hint=f"drctl verify {region}"
            )
        # An older snapshot does not know the carried-forward frames that stand for what is deleted now.
        kept = tuple(found for found in head.snapshots if found.seq >= goal.sealed)
        self._writer.moved_base(region, await store.set_base(self._fence, head, Baseline(goal.base, goal.chain, kept)))

    # ---------------------------------------------------------------------------------------------------- snapshots

    async def _picture(self) -> str | None:
        """Makes the next snapshot. Steps come one after the other, so nothing is forgotten while rows are read."""
        now = self._clock.monotonic()
        position, _ = self._view.position(self._stream)
        if now - self._snapshot_at < self._policy.snapshot_seconds or position <= self._snapshot_seq:
            return None
        self._snapshot_at = now
        header, data = await make_snapshot(self._view, self._writer.group, self._stream, self._writer.now())
        self.kept_bytes = self._keeping.counts(header.base - 1, header.seq)[1]
        named = NamedSnapshot(header.seq, self._fence.epoch, header.chain, hashlib.sha256(data).hexdigest())
        self._snapshot, self._snapshot_seq = (named, data, set()), header.seq
        for listing in self._listed.values():
            if not listing.upto:
                listing.upto, listing.agent = header.seq, 0
        return f"made a snapshot of {sum(header.rows)} rows at segment {header.seq}: {len(data)} bytes"

    async def _hand_out(self) -> str | None:
        """Puts the snapshot into one store that has its segment, and lets the head name it. A store that does not get there
        before the next one is made gets that one."""
        if self._snapshot is None:
            return None
        named, data, having = self._snapshot
        for place in self._writer.places():
            if place.region in having or not place.attached or place.seq < named.seq:
                continue
            having.add(place.region)
            self._tidied.discard(place.region)
            store = self._stores[place.region]
            await store.put_snapshot(self._fence, SnapshotRef(self._stream, named.seq, named.epoch), data)
            head = await store.read_head(self._stream)
            if head.base - 1 <= named.seq:
                to = retention.named_snapshots(head.snapshots, named, head.base, SNAPSHOTS_KEPT)
                moved = await store.set_base(self._fence, head, Baseline(head.base, head.base_chain, to))
                self._writer.moved_base(place.region, moved)
            return f"the snapshot at segment {named.seq} is in {place.region}"
        if len(having) == len(self._stores):
            self._snapshot = None
        return None

    async def _list(self) -> str | None:
        """One page of one store's catalogue, for the agents that changed since it was written last."""
        for place in self._writer.places():
            listing = self._listed[place.region]
            if not place.attached or not listing.upto or place.seq < listing.upto:
                continue
            page = self._keeping.changed(listing.done, listing.agent, AGENTS_LISTED)
            entries = [entry for _, name in page if (entry := self._keeping.entry(name)) is not None]
            there = [entry for entry in entries if all(found.seq <= place.seq for found in entry.chain)]
            if there:
                await self._stores[place.region].put_catalogue(self._fence, there)
            if page:
                # One that is newer than the store is written with the next snapshot: it lies above ``upto``.
                listing.agent = page[-1][0]
            else:
                listing.done, listing.upto, listing.agent = listing.upto, 0, 0
            return ""
        return None

    async def _tidy(self) -> str | None:
        """Deletes snapshots that a head does not name any more."""
        for place in self._writer.places():
            if not place.attached or place.region in self._tidied:
                continue
            self._tidied.add(place.region)
            store = self._stores[place.region]
            head = await store.read_head(self._stream)
            named = {(found.seq, found.epoch) for found in head.snapshots}
            old = [
                ref
                for ref in await store.list_snapshots(self._stream)
                if (ref.seq, ref.epoch) not in named and ref.epoch <= self._fence.epoch
            ]
            if old:
                await store.delete_snapshots(self._fence, old)
            return ""
        return None

    async def _forget(self) -> str | None:
        _, head = self._writer.home_copy()
        position, _ = self._view.position(self._stream)
        if head.base - 1 <= self._view.floor(self._stream)[0] or position < self._goal.sealed or head.base > self._carried:
            return None
        self._view.forget(self._stream, head.base, head.base_chain, FORGET_RECORDS)
        return ""

    async def _delete(self) -> str | None:
        """One listing and one deletion in the first store that has something to look at."""
        for place in self._writer.places():
            if not place.attached or place.base <= self._swept.get(place.region, 1):
                continue
            return await self._sweep(place)
        return None

    async def _sweep(self, place: retention.StorePlace) -> str:
        store = self._stores[place.region]
        begin = self._cursor.get(place.region, 1)
        refs = await store.list_segments(self._stream, begin, LISTED)
        head = await store.read_head(self._stream)
        gone = retention.deletable(head, refs)
        if gone:
            await store.delete_segments(self._fence, gone)
        if len(refs) < LISTED or refs[-1].seq >= head.base:
            self._swept[place.region] = place.base
            self._cursor.pop(place.region, None)
        else:
            self._cursor[place.region] = refs[-1].seq
        return f"{len(gone)} segments before {head.base} were deleted in {place.region}" if gone else ""


def _batch(todo: Sequence[Old]) -> Iterator[Old]:
    """What one step carries: never nothing."""
    size = 0
    for number, old in enumerate(todo):
        size += old.record.size
        if number and (number >= CARRY_RECORDS or size > CARRY_BYTES):
            return
        yield old


def _again(old: Old, body: bytes) -> Frame:
    """The record as it was, whole, with its place of origin."""
    record = old.record
    made = frame(record.agent, record.id, record.kind, body)
    if made.record.sha256 != record.sha256:
        raise Corrupt(
            f"record {record.id!a} of agent {record.agent!a}: the body does not have its hash", hint="drctl verify REGION"
        )
    return replace(made, record=replace(record, meta={**record.meta, ORIGIN: old.origin}))
