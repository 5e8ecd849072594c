"""The holder's side of a stream: batches records into segments, ships them to every region's store, acknowledges.

One *batcher* closes segments (at once when idle, otherwise after a short timer or when full); one *pump* per region ships
them in order: objects first, then one conditional head update for all that are put. Pumps never wait for each other, so a
slow or dead region delays nobody. A record is acknowledged when its segment is committed in the copies it asked for and
the right to act, checked *again after* the commit, still holds.

A pump that sees a greater epoch anywhere ends the writer: somebody newer exists. A pump whose store does not answer, or
whose answer was lost, attaches anew (fence, cut back, compare) and goes on from what the store says.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from controller.domain import replication
from controller.domain.lag import Backlog
from controller.domain.model import Ack, AgentTail, Commit, Encoding, EpochStart, Fence, Frame, Head, Kind, SegmentRef
from controller.errors import Conflict, Corrupt, DrError, FenceLost, OutcomeUnknown, Refused, Unavailable
from controller.ports import Clock, RegionStore
from controller.stream.history import Tail, copy_missing, cut_back
from controller.stream.limits import MAX_CHAIN
from controller.stream.segment import Segment, SegmentHeader, encode_segment, next_chain, open_frame
from controller.stream.view import ColdBase, View

RETRY_SECONDS = 0.5
"""Pause of a pump between attempts at a store that does not answer."""
BACKLOG_MARKS = 4096
"""Segments whose receipt times are kept one by one for the lag; beyond it neighbours are merged, keeping the older time."""
LOG_SEGMENTS = 4096
"""Segments that are kept in memory for slow regions; older ones are read back from the home store."""
RECORD_BYTES = 256
"""More than a record's hash, numbers and lengths take in a segment and its index, names and meta not counted."""


@dataclass(frozen=True, slots=True)
class WriterLimits:
    """Bounds of one stream's writer."""

    flush_seconds: float = 0.02
    segment_max_bytes: int = 4 * 2**20
    segment_max_records: int = 2000
    queue_max_bytes: int = 64 * 2**20
    pipeline_depth: int = 8
    ack_timeout_seconds: float = 10.0


@dataclass(slots=True)
class Built:
    """A closed segment that some store does not have yet. Dropped under memory pressure once the home store has it."""

    ref: SegmentRef
    prev_chain: str
    chain: str
    size: int
    records: int
    first_received_at: float
    last_received_at: float
    segment: Segment
    data: bytes


@dataclass(slots=True)
class Waiter:
    """One record that waits for its copies. ``result`` resolves with the number of stores, or with the reason of failure."""

    copies: int
    result: asyncio.Future[int]


@dataclass(slots=True)
class Pending:
    """A record that is accepted and not yet applied to the view, so that a retry of it is recognised."""

    sha256: str
    body: bytes
    depth: int
    """Deltas that stand on each other below this record, itself included."""
    base: bytes | None
    """The body that the delta stands on: the view may have let go of it by the time the segment is committed."""
    seq: asyncio.Future[int]


@dataclass(slots=True)
class Mark:
    """Cumulative counts at the end of a segment, and when its first record came."""

    seq: int
    received_at: float
    records: int
    bytes: int


@dataclass(slots=True)
class Pump:
    """One region's position. ``attached``: its head is known, fenced under our epoch and a prefix of our history."""

    region: str
    attached: bool = False
    head: Head | None = None
    why: str = "not attached yet"
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def seq(self) -> int:
        """Last segment committed there, as far as known: 0 when it was never reached."""
        return self.head.seq if self.head else 0


class StreamWriter:
    """Writes one stream under one fence. ``may_act`` is asked before work is taken and again before it is acknowledged."""

    def __init__(
        self,
        *,
        group: str,
        fence: Fence,
        stores: Mapping[str, RegionStore],
        home: str,
        home_head: Head,
        tail: Tail,
        view: View,
        clock: Clock,
        may_act: Callable[[], bool],
        on_lost: Callable[[str], None],
        limits: WriterLimits,
    ) -> None:
        self._group = group
        self.fence = fence
        self._stores = stores
        self._home = home
        self._view = view
        self._clock = clock
        self._may_act = may_act
        self._on_lost = on_lost
        self._limits = limits
        self._wall_zero = clock.wall() - clock.monotonic()
        self._seq, self._chain = tail.seq, tail.chain
        self.starts: tuple[EpochStart, ...] = (*tail.starts, EpochStart(fence.epoch, tail.seq + 1))
        self.sole_ackers: tuple[str, ...] = (home,)
        self._records, self._bytes = home_head.records, home_head.bytes
        self._log: OrderedDict[int, Built] = OrderedDict()
        self._log_bytes = 0
        self._marks: list[Mark] = []
        self._waiting: dict[int, list[Waiter]] = {}
        self._queue: list[tuple[Frame, Pending, Waiter]] = []
        self._queue_bytes = 0
        self._pending: dict[tuple[str, str], Pending] = {}
        self._have_work = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._applied = tail.seq
        self._acknowledged = Mark(tail.seq, home_head.received_at, home_head.records, home_head.bytes)
        self._home_silent_since: float | None = None
        self.frozen = ""
        self.lost = ""
        self.pumps = {region: Pump(region) for region in stores}
        self.pumps[home] = Pump(home, attached=True, head=home_head, why="")

    # ------------------------------------------------------------------------------------------------------- life

    def start(self) -> None:
        """Begins to batch and to ship."""
        self._tasks = [asyncio.create_task(self._batch(), name=f"batch-{self.fence.stream}")]
        self._tasks += [asyncio.create_task(self._pump(pump), name=f"pump-{pump.region}") for pump in self.pumps.values()]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A batcher or pump that failed must not leave a writer that looks alive and acknowledges nothing."""
        if not task.cancelled() and task.exception() is not None:
            self._lose(f"{task.get_name()} failed: {task.exception()!r}")

    async def stop(self, why: str) -> None:
        """Ends at once. Everything that waits fails with an unknown outcome; nothing is acknowledged any more."""
        self._end(why)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    def _end(self, why: str) -> None:
        if self.lost:
            return
        self.lost = why
        failure = _not_acknowledged(why)
        for waiters in self._waiting.values():
            for waiter in waiters:
                _fail(waiter.result, failure)
        for _, pending, waiter in self._queue:
            _fail(waiter.result, failure)
            _fail(pending.seq, failure)
        self._waiting.clear()
        self._queue.clear()
        self._queue_bytes = 0

    def _lose(self, why: str) -> None:
        if not self.lost:
            self._end(why)
            self._on_lost(why)

    def freeze(self, why: str) -> None:
        """Takes no new records (a switchover drains); what is in flight goes on."""
        self.frozen = why

    def unfreeze(self) -> None:
        """Takes records again: the switchover was aborted."""
        self.frozen = ""

    def drained(self) -> bool:
        """Whether all that was taken is committed in every store that answers, and those are at least the fence quorum."""
        done = [pump.region for pump in self.pumps.values() if pump.attached and pump.seq == self._seq]
        behind = [pump.region for pump in self.pumps.values() if pump.attached and pump.seq < self._seq]
        return not self._queue and not behind and replication.quorum_lacks(tuple(self._stores), done) is None

    # ----------------------------------------------------------------------------------------------------- taking

    def now(self) -> float:
        """Wall time on the holder's monotonic clock: stamps within an epoch never go back."""
        return self._wall_zero + self._clock.monotonic()

    async def submit(self, frames: Sequence[Frame]) -> list[Ack]:
        """One acknowledgement per frame, in order. Frames are independent: one may fail while others are acknowledged.

        Raises Unavailable when nothing of it was taken (no right, draining, full): the whole batch may be sent again.
        """
        self._check_open(sum(_weight(frame) for frame in frames))
        admitted = [self._admit(frame) for frame in frames]
        self._have_work.set()
        return list(await asyncio.gather(*(self._answer(frame, it) for frame, it in zip(frames, admitted, strict=True))))

    def _check_open(self, size: int) -> None:
        if self.lost or not self._may_act():
            raise Unavailable(
                f"not accepting records: {self.lost or 'the right to act has run out'}", hint="try another controller"
            )
        if self.frozen:
            raise Unavailable(
                f"not accepting records: {self.frozen}", hint="try again in a few seconds; a planned move is under way"
            )
        bound = self._limits.queue_max_bytes
        if size > bound:
            raise Refused(f"a batch of {size} bytes, and {bound} may wait at most", hint="send fewer records at a time")
        if self._queue_bytes + size > bound or self._log_bytes > 2 * bound:  # the log sheds only what the home store has
            raise Unavailable(
                f"{self._queue_bytes + self._log_bytes} bytes wait to be written and the bound is {bound}",
                hint="slow down and send the same records again",
            )

    def _admit(self, frame: Frame) -> tuple[Pending | int, Waiter, bool] | DrError:
        """Queues a new record, or finds the one that it repeats: (where it is, its waiter, whether it is a repetition)."""
        record = frame.record
        if record.copies > len(self._stores):
            return Refused(
                f"copies = {record.copies} and there are {len(self._stores)} region stores", hint="ask for fewer copies"
            )
        waiter = Waiter(record.copies, asyncio.get_running_loop().create_future())
        key = (record.agent, record.id)
        pending = self._pending.get(key)
        if pending is not None:
            return (pending, waiter, True) if pending.sha256 == record.sha256 else _other_body(record.agent, record.id)
        known = self._view.find(record.agent, record.id)
        if known is not None:
            sha256, seq = known
            return (seq, waiter, True) if sha256 == record.sha256 else _other_body(record.agent, record.id)
        try:
            base, depth = self._base_of(frame)
            body = open_frame(frame, base)
        except DrError as error:
            return error
        stamped = replace(frame, record=replace(record, received_at=self.now()))
        pending = Pending(record.sha256, body, depth, base, asyncio.get_running_loop().create_future())
        self._pending[key] = pending
        self._queue.append((stamped, pending, waiter))
        self._queue_bytes += _weight(frame)
        return pending, waiter, False

    def _base_of(self, frame: Frame) -> tuple[bytes | None, int]:
        """Body of the delta's base and the depth of the chain with this record. Raises Refused: send the whole body."""
        if frame.encoding is not Encoding.DELTA or frame.base is None:
            return None, 0
        agent = frame.record.agent
        pending = self._pending.get((agent, frame.base))
        if pending is not None:
            body, depth = pending.body, pending.depth + 1
        else:
            found = self._view.read(agent, frame.base)
            if found is None:
                raise _unknown_base(f"the base {frame.base!r} of the delta is not at hand")
            body, depth = found[1], (self._view.chain_depth(agent, frame.base) or 0) + 1
        if depth > MAX_CHAIN:
            raise _unknown_base(f"{depth} deltas would stand on each other, {MAX_CHAIN} are allowed")
        return body, depth

    async def _answer(self, frame: Frame, admitted: tuple[Pending | int, Waiter, bool] | DrError) -> Ack:
        agent, record_id = frame.record.agent, frame.record.id
        if isinstance(admitted, DrError):
            return Ack(agent, record_id, "failed", error=admitted.to_dict())
        where, waiter, repeated = admitted
        try:
            async with asyncio.timeout(self._limits.ack_timeout_seconds):
                seq = where if isinstance(where, int) else await asyncio.shield(where.seq)
                if repeated:
                    self._wait_for(seq, waiter)
                copies = await waiter.result
            if self.lost or not self._may_act():  # looked at again on the way out: we may have been paused since the commit
                raise _not_acknowledged(self.lost or "the right to act ran out")
        except TimeoutError:
            error = OutcomeUnknown(
                f"not committed in {waiter.copies} region stores within {self._limits.ack_timeout_seconds:g} s",
                hint="it may still become so; send the same record again to learn it",
            )
            return Ack(agent, record_id, "failed", error=error.to_dict())
        except DrError as error:
            return Ack(agent, record_id, "failed", error=error.to_dict())
        return Ack(agent, record_id, "duplicate" if repeated else "acknowledged", seq, copies)

    # --------------------------------------------------------------------------------------------------- batching

    async def _batch(self) -> None:
        last_closed = float("-inf")
        while True:
            await self._have_work.wait()
            self._have_work.clear()
            pause = last_closed + self._limits.flush_seconds - self._clock.monotonic()
            if pause > 0 and self._queue_bytes < self._limits.segment_max_bytes:
                await self._clock.sleep(pause)
            while self._queue and not self.lost:
                self._close(self._take())
            last_closed = self._clock.monotonic()

    def _take(self) -> list[tuple[Frame, Pending, Waiter]]:
        size, count = 0, 0
        for frame, _, _ in self._queue:
            size += _weight(frame)
            if count and (size > self._limits.segment_max_bytes or count >= self._limits.segment_max_records):
                break
            count += 1
        taken, self._queue = self._queue[:count], self._queue[count:]
        self._queue_bytes -= sum(_weight(frame) for frame, _, _ in taken)
        return taken

    def _close(self, taken: list[tuple[Frame, Pending, Waiter]]) -> None:
        frames = tuple(frame for frame, _, _ in taken)
        seq = self._seq + 1
        header = SegmentHeader(self._group, self.fence.stream, seq, self.fence.epoch, self._chain, self.now())
        data = encode_segment(header, frames)
        chain = next_chain(self._chain, data)
        received = [frame.record.received_at for frame in frames]
        self._log[seq] = Built(
            SegmentRef(self.fence.stream, seq, self.fence.epoch), self._chain, chain, len(data), len(frames),
            min(received), max(received), Segment(header, frames), data,
        )  # fmt: skip
        self._seq, self._chain = seq, chain
        self._log_bytes += len(data)
        self._records += len(frames)
        self._bytes += len(data)
        self._remember(Mark(seq, min(received), self._records, self._bytes))
        self._waiting.setdefault(seq, []).extend(waiter for _, _, waiter in taken)
        for _, pending, _ in taken:
            if not pending.seq.done():
                pending.seq.set_result(seq)
        self._shed()
        for pump in self.pumps.values():
            pump.wake.set()

    def _remember(self, mark: Mark) -> None:
        self._marks.append(mark)
        if len(self._marks) > 2 * BACKLOG_MARKS:
            head, tail = self._marks[:BACKLOG_MARKS], self._marks[BACKLOG_MARKS:]
            merged = [
                replace(second, received_at=first.received_at) for first, second in zip(head[::2], head[1::2], strict=True)
            ]
            self._marks = merged + tail

    def _shed(self) -> None:
        """Drops bodies that the home store has, oldest first, while too many bytes are kept for slow regions."""
        safe = min(self.pumps[self._home].seq, self._applied)
        while self._log and (self._log_bytes > self._limits.queue_max_bytes or len(self._log) > LOG_SEGMENTS):
            seq, built = next(iter(self._log.items()))
            if seq > safe:
                return
            self._log_bytes -= built.size
            del self._log[seq]

    # --------------------------------------------------------------------------------------------------- shipping

    async def _pump(self, pump: Pump) -> None:
        while not self.lost:
            try:
                if not pump.attached:
                    await self._attach(pump)
                elif pump.seq >= self._seq:
                    pump.wake.clear()
                    if pump.seq >= self._seq:
                        await pump.wake.wait()
                else:
                    await self._ship(pump)
            except FenceLost as error:
                self._lose(f"store {pump.region}: {error.message}")
                return
            except DrError as error:
                # Whatever the store did with our last call, attaching anew reads it back. Corrupt and Misconfigured stay
                # visible in `why`; the other regions go on.
                pump.attached = False
                pump.why = error.message
                await self._clock.sleep(RETRY_SECONDS)

    async def _attach(self, pump: Pump) -> None:
        """Fences the store, cuts back what diverged, and checks that what is left is a prefix of our history."""
        store = self._stores[pump.region]
        head = await store.fence(self.fence)
        problem = replication.head_problem(head)
        if problem is not None:
            raise Corrupt(f"the head in {pump.region} is damaged: {problem}", hint=f"drctl verify {pump.region}")
        head = await cut_back(store, self.fence, head, self._seq, self.starts)
        ours = self._chain_at(head.seq)
        if ours is not None and ours != head.chain:
            raise _other_history(pump.region, head.seq)
        pump.head, pump.attached, pump.why = head, True, ""
        self._committed(pump)

    def _chain_at(self, seq: int) -> str | None:
        """Our chain hash after segment ``seq``; None where neither the log nor the view reaches back so far."""
        built = self._log.get(seq)
        return self._view.chain_at(self.fence.stream, seq) if built is None else built.chain

    async def _ship(self, pump: Pump) -> None:
        head = pump.head
        assert head is not None
        first = self._log.get(head.seq + 1)
        if first is None:
            pump.head = await self._copy_from_home(pump, head)
        else:
            batch = self._next_batch(head.seq + 1)
            if batch[0].prev_chain != head.chain:
                raise _other_history(pump.region, head.seq)
            store = self._stores[pump.region]
            await asyncio.gather(*(store.put_segment(self.fence, built.ref, built.data) for built in batch))
            last = batch[-1]
            commit = Commit(
                prev_seq=head.seq,
                prev_chain=head.chain,
                seq=last.ref.seq,
                chain=last.chain,
                starts=tuple(s for s in self.starts if head.seq < s.first_seq <= last.ref.seq),
                received_at=last.last_received_at,
                records=sum(built.records for built in batch),
                bytes=sum(built.size for built in batch),
            )
            pump.head = await store.advance(self.fence, commit)
        self._committed(pump)

    async def _copy_from_home(self, pump: Pump, head: Head) -> Head:
        if pump.region == self._home:
            raise Unavailable(
                f"segment {head.seq + 1} is neither in memory nor in the home store", hint=f"drctl verify {self._home}"
            )
        home = self.pumps[self._home].head
        assert home is not None
        if home.seq <= head.seq:
            raise Unavailable(f"the home store does not have segment {head.seq + 1} yet", hint="wait")
        tail = Tail(home.seq, home.chain, self.starts)
        return await copy_missing(self._stores[self._home], self._stores[pump.region], self.fence, head, tail)

    def _next_batch(self, first: int) -> list[Built]:
        batch: list[Built] = []
        for seq in range(first, min(self._seq, first + self._limits.pipeline_depth - 1) + 1):
            built = self._log.get(seq)
            if built is None:
                break
            batch.append(built)
        return batch

    # ---------------------------------------------------------------------------------------------- acknowledging

    def committed_in(self, seq: int) -> tuple[str, ...]:
        """Stores that certainly have committed segment ``seq`` of our history."""
        return tuple(pump.region for pump in self.pumps.values() if pump.attached and pump.seq >= seq)

    def _may_acknowledge(self) -> bool:
        """Asked before anything that waits is resolved, whatever woke us: a commit, a repetition, a change of sole ackers."""
        if not self.lost and not self._may_act():
            self._lose("the right to act ran out between commit and acknowledgement")
        return not self.lost

    def _committed(self, pump: Pump) -> None:
        """A store moved: apply to the view, acknowledge, forget what every store has."""
        if not self._may_acknowledge():
            return
        self._apply_until(pump.seq)
        for seq in [seq for seq in self._waiting if seq <= pump.seq]:
            self._settle(seq)
        self._advance_acknowledged()
        self._forget()
        for other in self.pumps.values():
            if other is not pump and other.attached and other.seq < pump.seq:
                other.wake.set()

    def _apply_until(self, seq: int) -> None:
        while self._applied < min(seq, self._seq):
            built = self._log[self._applied + 1]
            try:
                self._apply(built)
            except DrError as error:
                # Ours, not the store's (a full disk, say): whoever cannot index what it acknowledges must not go on holding.
                self._lose(f"the view cannot be written: {error.message}")
                raise _not_acknowledged(self.lost) from error
            self._applied += 1
            for frame in built.segment.frames:
                self._pending.pop((frame.record.agent, frame.record.id), None)

    def _apply(self, built: Built) -> None:
        try:
            self._view.apply(built.segment, built.chain, built.ref, built.size)
        except ColdBase:
            for agent, base in self._view.missing(built.segment):
                self._lend(built.segment, agent, base)
            self._view.apply(built.segment, built.chain, built.ref, built.size)

    def _lend(self, segment: Segment, agent: str, base: str) -> None:
        """Gives the view a base that newer records pushed out of its warm window since the delta was admitted."""
        for frame in segment.frames:
            pending = self._pending.get((agent, frame.record.id))
            if frame.record.agent == agent and frame.base == base and pending is not None and pending.base is not None:
                self._view.admit(agent, base, pending.base)
                return

    def _wait_for(self, seq: int, waiter: Waiter) -> None:
        if not self._may_acknowledge():
            _fail(waiter.result, _not_acknowledged(self.lost))
            return
        self._waiting.setdefault(seq, []).append(waiter)
        self._settle(seq)

    def _settle(self, seq: int) -> None:
        committed = self.committed_in(seq)
        left: list[Waiter] = []
        for waiter in self._waiting.get(seq, ()):
            if replication.acknowledged(waiter.copies, committed, self.sole_ackers):
                if not waiter.result.done():
                    waiter.result.set_result(len(committed))
            elif not waiter.result.done():
                left.append(waiter)
        if left:
            self._waiting[seq] = left
        else:
            self._waiting.pop(seq, None)

    def _advance_acknowledged(self) -> None:
        first = bisect.bisect_right(self._marks, self._acknowledged.seq, key=lambda mark: mark.seq)
        for mark in self._marks[first:]:
            if not replication.acknowledged(1, self.committed_in(mark.seq), self.sole_ackers):
                return
            self._acknowledged = mark

    def _forget(self) -> None:
        everywhere = min(pump.seq for pump in self.pumps.values())
        for seq in [seq for seq in self._log if seq <= min(everywhere, self._applied)]:
            self._log_bytes -= self._log.pop(seq).size

    # ------------------------------------------------------------------------------------------------- what is seen

    @property
    def seq(self) -> int:
        """Last segment that was closed."""
        return self._seq

    @property
    def acknowledged(self) -> Mark:
        """Last segment of which records may have been acknowledged, with cumulative counts."""
        return self._acknowledged

    def backlog(self, region: str) -> Backlog | None:
        """What a region's store does not have of what was acknowledged; None when its head was never read in this epoch."""
        pump = self.pumps[region]
        acknowledged = self._acknowledged
        if pump.head is None:
            return None
        if pump.seq >= acknowledged.seq:
            return Backlog(region, pump.seq, 0, 0, 0, None)
        oldest = self._received_after(pump.seq)
        if pump.seq < self.starts[-1].first_seq - 1:  # missing segments are older than this epoch: ask the view
            older = next(iter(self._view.tail(self.fence.stream, pump.seq)), None)
            oldest = min(oldest, older[1].received_at) if older is not None else oldest
        return Backlog(
            region,
            pump.seq,
            acknowledged.seq - pump.seq,
            max(0, acknowledged.records - pump.head.records),
            max(0, acknowledged.bytes - pump.head.bytes),
            oldest,
        )

    def _received_after(self, seq: int) -> float:
        """When the oldest record above segment ``seq`` was received, never later than it was."""
        first = bisect.bisect_right(self._marks, seq, key=lambda mark: mark.seq)
        return self._marks[first].received_at if first < len(self._marks) else self._acknowledged.received_at

    def age_beyond(self, seq: int) -> float:
        """Seconds since the oldest acknowledged record above segment ``seq`` was received; 0 when there is none."""
        return 0.0 if seq >= self._acknowledged.seq else max(0.0, self.now() - self._received_after(seq))

    def unreplicated(self, limit: int = 20) -> tuple[AgentTail, ...]:
        """Agents with acknowledged records that only one store has, worst first."""
        best = sorted((pump.seq for pump in self.pumps.values()), reverse=True)[1] if len(self.pumps) > 1 else 0
        tails: dict[str, AgentTail] = {}
        for seq in range(best + 1, self._acknowledged.seq + 1):
            built = self._log.get(seq)
            for frame in built.segment.frames if built is not None else ():
                record = frame.record
                if record.kind in (Kind.CANARY, Kind.OPENING):
                    continue
                known = tails.get(record.agent)
                tails[record.agent] = AgentTail(record.agent, known.records + 1 if known else 1, record.id, record.received_at)
        return tuple(sorted(tails.values(), key=lambda tail: (-tail.records, tail.agent))[:limit])

    def oldest_waiting_seconds(self) -> float:
        """How long the oldest record has waited for its copies; 0 when none waits."""
        oldest = [self._received_after(min(self._waiting) - 1)] if self._waiting else []
        oldest += [frame.record.received_at for frame, _, _ in self._queue[:1]]
        return max(0.0, self.now() - min(oldest)) if oldest else 0.0

    def home_silent_seconds(self) -> float:
        """How long the home store has been behind without an answer; 0 while it answers."""
        pump = self.pumps[self._home]
        if pump.attached:
            self._home_silent_since = None
            return 0.0
        if self._home_silent_since is None:
            self._home_silent_since = self._clock.monotonic()
        return self._clock.monotonic() - self._home_silent_since

    def wait_settled(self) -> None:
        """Re-evaluates everything that waits: the set of stores that may acknowledge alone changed."""
        if not self._may_acknowledge():
            return
        for seq in list(self._waiting):
            self._settle(seq)
        self._advance_acknowledged()


def _weight(frame: Frame) -> int:
    """Bytes that a frame takes in a segment, never too few: a record may be all header (``meta``) and no payload."""
    record = frame.record
    characters = 2 * (len(record.agent) + len(record.id)) + len(record.kind) + len(record.parent or "") + len(frame.base or "")
    characters += sum(len(key) + len(value) + 3 for key, value in record.meta.items())  # 3 stand for two lengths
    return len(frame.payload) + 4 * characters + RECORD_BYTES


def _fail(future: asyncio.Future[int], error: DrError) -> None:
    if not future.done():
        future.set_exception(error)
        with contextlib.suppress(BaseException):
            future.exception()  # mark as retrieved: nobody may be waiting any more


def _not_acknowledged(why: str) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"not acknowledged: {why}", hint="ask the active controller again with the same record id; a retry is idempotent"
    )


def _unknown_base(message: str) -> Refused:
    error = Refused(message, hint="send the whole body")
    error.code = "unknown_base"
    return error


def _other_history(region: str, seq: int) -> Corrupt:
    return Corrupt(f"the store of {region} holds another history than ours at segment {seq}", hint=f"drctl verify {region}")


def _other_body(agent: str, record_id: str) -> Refused:
    return Conflict(
        f"record {record_id!r} of agent {agent!r} exists with another body",
        hint="record ids name one body for ever; use a new id",
    )
