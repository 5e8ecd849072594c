"""The holder's side of a stream: batches records into segments, ships them to every region's store, acknowledges.

``admission`` says whether a record may be taken, ``batcher`` which records share a segment, ``pump`` (one per region) ships
segments, ``log`` keeps them until every store has them, ``backlog`` counts what stores lack, ``receipt`` is what callers wait
for. Here they are put together. A record is acknowledged when its segment is committed in the copies that it asked for and
the right to act, checked *again after* the commit, still holds.

A pump that sees a greater epoch anywhere ends the writer: somebody newer exists.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from controller.domain import replication
from controller.domain.lag import Backlog
from controller.domain.model import Ack, AgentTail, EpochStart, Fence, Frame, Head, SegmentRef
from controller.domain.retention import StorePlace
from controller.errors import DrError, OutcomeUnknown, Refused, Unavailable
from controller.ports import Clock, RegionStore
from controller.stream import pump as pumping
from controller.stream.admission import Admission
from controller.stream.backlog import Mark, Marks
from controller.stream.batcher import BUSY_FLUSHES, BUSY_SECONDS, LARGE_BYTES, Entry, Queue, weight
from controller.stream.history import Tail
from controller.stream.keeping import Keeping
from controller.stream.log import Built, Log, tails_of
from controller.stream.objective import Objective
from controller.stream.proving import Proven
from controller.stream.pump import Pump
from controller.stream.receipt import Receipt, Waiter, Waiting
from controller.stream.segment import Segment, SegmentHeader, build_segment, next_chain
from controller.stream.view import View

DECODED_FACTOR = 4
"""Decoded bodies may take this many times what their records may take as they travel (``queue_max_bytes``)."""


ONE_RECORD_MORE_BYTES = 256 * 2**10
"""What a batch may weigh beyond the queue's bound: the header of a record whose body alone is as large as that."""


@dataclass(frozen=True, slots=True)
class WriterLimits:
    """Bounds of one stream's writer."""

    flush_seconds: float = 0.02
    segment_max_bytes: int = 4 * 2**20
    segment_max_records: int = 2000
    queue_max_bytes: int = 64 * 2**20
    pipeline_depth: int = 32
    ack_timeout_seconds: float = 10.0
    enforced_rpo_seconds: float | None = None
    """The recovery point objective, under the policy ``enforce``; None: the policy is ``alert``."""


class StreamWriter:
    """Writes one stream under one fence. ``may_act`` is asked before work is taken and again before it is acknowledged.
    ``is_leased``: whether what one store alone has may be acknowledged now."""

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
        is_leased: Callable[[], bool] = lambda: True,
        on_lost: Callable[[str], None],
        limits: WriterLimits,
    ) -> None:
        self.group = group
        self.fence = fence
        self._stores = stores
        self._home = home
        self._view = view
        self._clock = clock
        self._may_act = may_act
        self._is_leased = is_leased
        self._on_lost = on_lost
        self._limits = limits
        self._wall_zero = clock.wall() - clock.monotonic()
        self._seq, self._chain = tail.seq, tail.chain
        self.starts: tuple[EpochStart, ...] = (*tail.starts, EpochStart(fence.epoch, tail.seq + 1))
        self.sole_ackers: tuple[str, ...] = (home,)
        self._records, self._bytes = home_head.records, home_head.bytes
        self.log = Log(limits.queue_max_bytes)
        self._marks = Marks(Mark(tail.seq, home_head.received_at, home_head.records, home_head.bytes))
        self._waiting = Waiting()
        self._queue = Queue(limits.segment_max_bytes, limits.segment_max_records)
        self._admission = Admission(view, len(stores), self.now)
        self._unapplied: dict[int, list[Entry]] = {}
        """Entries of the segments that the view does not have yet."""
        self._have_work = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._applied = tail.seq
        self._home_silent_since: float | None = None
        self.frozen = ""
        self.lost = ""
        self.pumps = {region: Pump(region) for region in stores}
        self.pumps[home] = Pump(home, attached=True, head=home_head, why="")
        self.objective = Objective(limits.enforced_rpo_seconds, self.pumps, self._marks, tail.seq + 1, self.now)

    # ------------------------------------------------------------------------------------------------------- life

    def start(self) -> None:
        """Begins to batch and to ship."""
        self._tasks = [asyncio.create_task(self._batch(), name=f"batch-{self.fence.stream}")]
        for pump in self.pumps.values():
            shipping = pumping.run(pump, self._stores[pump.region], self, self._clock, self._limits.pipeline_depth)
            self._tasks.append(asyncio.create_task(shipping, name=f"pump-{pump.region}"))
        for task in self._tasks:
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A batcher or pump that failed must not leave a writer that looks alive and acknowledges nothing."""
        if not task.cancelled() and task.exception() is not None:
            self.lose(f"{task.get_name()} failed: {task.exception()!r}")

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
        self._waiting.fail_all(failure)
        for entry in self._queue.clear():
            for waiter in entry.waiters:
                waiter.receipt.fail(waiter.number, failure)

    def lose(self, why: str) -> None:
        """Ends because somebody newer exists, or because going on would be wrong; tells whoever runs this."""
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
        """Whether all that was taken is committed in every store that answers, and those are a fence quorum and meet every
        other one: then nobody may have acknowledged alone."""
        done = [pump.region for pump in self.pumps.values() if pump.attached and pump.seq == self._seq]
        behind = [pump.region for pump in self.pumps.values() if pump.attached and pump.seq < self._seq]
        enough = replication.quorum_lacks(tuple(self._stores), done) is None
        return not self._queue and not behind and enough and replication.every_quorum_meets(tuple(self._stores), done)

    # ----------------------------------------------------------------------------------------------------- taking

    def now(self) -> float:
        """Wall time on the holder's monotonic clock: stamps within an epoch never go back."""
        return self._wall_zero + self._clock.monotonic()

    async def submit(self, frames: Sequence[Frame], *, own: bool = False) -> list[Ack]:
        """One acknowledgement per frame, in order. Frames are independent: one may fail while others are acknowledged.
        ``own``: records of the controller with which no work is lost; the RPO policy does not hold them back.

        Raises Unavailable when nothing of it was taken (no right, draining, full): the whole batch may be sent again.
        """
        weights = [weight(frame) for frame in frames]
        size = sum(weights)
        self._check_open(size)
        self._check_room(weights)
        if not own:
            self._check_objective()
        self._check_bodies(sum(frame.record.size for frame in frames))
        opened = await self._admission.open_ahead(frames)
        self._check_open(size)  # a large call was opened in a thread meanwhile
        self._check_room(weights)
        receipt = Receipt(frames)
        for number, frame in enumerate(frames):
            try:
                self._admit(frame, weights[number], opened.get(number), Waiter(receipt, number, frame.record.copies, own))
            except DrError as error:
                receipt.fail(number, error)
        self._have_work.set()
        try:
            async with asyncio.timeout(self._limits.ack_timeout_seconds):
                await receipt.done
        except TimeoutError:
            receipt.fail_rest(self._too_late)
        finally:
            receipt.done.cancel()  # whoever went away is not waited for
        if self.lost or not self._may_act():  # looked at again on the way out: we may have been paused since the commit
            return receipt.acks(instead=_not_acknowledged(self.lost or "the right to act ran out"))
        if not self._is_leased() and any(ack.status != "failed" and ack.copies < 2 for ack in receipt.acks()):
            return receipt.acks(instead=_not_acknowledged("the lease ran out, and only one store has it"))
        return receipt.acks()

    async def carry(self, frames: Sequence[Frame]) -> None:
        """Writes records of this history again, whole and with their place of origin, so that they outlive their first segment.
        Returns when the segment is acknowledged like any other. Safe to repeat: the view notes one more place of the record.
        Raises Unavailable (agents' records go first: try later), OutcomeUnknown."""
        weights = [weight(frame) for frame in frames]
        self._check_open(sum(weights))
        self._check_room(weights)
        if self._queue.bytes + self.log.bytes > self._limits.queue_max_bytes // 2:
            raise Unavailable("records of agents wait; nothing is carried forward meanwhile", hint="it is tried again")
        receipt = Receipt(frames)
        for number, frame in enumerate(frames):
            waiter = Waiter(receipt, number, 1, repeated=False, own=True)
            self._queue.add(Entry(frame, weights[number], None, waiters=[waiter], carried_at=self.now()))
        self._have_work.set()
        try:
            async with asyncio.timeout(self._limits.ack_timeout_seconds):
                await receipt.done
        except TimeoutError:
            receipt.fail_rest(self._too_late)
        finally:
            receipt.done.cancel()
        failed = next((ack for ack in receipt.acks() if ack.status == "failed"), None)
        if failed is not None or self.lost:
            raise OutcomeUnknown(f"not carried forward: {self.lost or failed}", hint="it is tried again")

    def keep_from(self, base: int) -> tuple[Entry, ...]:
        """See ``Admission.keep_from``."""
        return self._admission.keep_from(base)

    def places(self) -> tuple[StorePlace, ...]:
        """Where every store stands, for retention."""
        return tuple(
            StorePlace(pump.region, pump.attached, pump.seq, pump.head.base if pump.head else 1) for pump in self.pumps.values()
        )

    def moved_base(self, region: str, head: Head) -> None:
        """Retention moved a store's base. The pump learns it at once; its seq it knows better itself."""
        pump = self.pumps[region]
        if pump.head is not None:
            pump.head = replace(pump.head, base=head.base, base_chain=head.base_chain, snapshots=head.snapshots)

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
        if size > bound + ONE_RECORD_MORE_BYTES:
            raise Refused(f"a batch of {size} bytes, and {bound} may wait at most", hint="send fewer records at a time")
        full = self.log.full()
        if full:
            raise Unavailable(full, hint="slow down and send the same records again", retry_after_seconds=0.5)

    def _check_room(self, weights: Sequence[int]) -> None:
        full = self._queue.lacks_room(weights, self._limits.queue_max_bytes)
        if full:
            raise Unavailable(full, hint="slow down and send the same records again", retry_after_seconds=0.5)

    def _check_objective(self) -> None:
        why = self.objective.problem(self._seq)
        if why is not None:
            raise Unavailable(
                f"not accepting records: {why}",
                hint="send the same records again; it goes on when another region catches up",
                retry_after_seconds=1.0,
            )

    def _check_bodies(self, size: int) -> None:
        """``size``: what the bodies of a call say that they have, decoded. A few KiB of zstd may hold 64 MiB, so it is
        bounded before anything is decoded. Raises Refused, Unavailable."""
        bound = DECODED_FACTOR * self._limits.queue_max_bytes
        if size > bound + ONE_RECORD_MORE_BYTES:
            raise Refused(
                f"a batch with bodies of {size} bytes, decoded, and {bound} may wait at most",
                hint="send fewer records at a time",
            )
        if self._admission.bytes + size > bound:
            raise Unavailable(
                f"{self._admission.bytes} bytes of decoded bodies wait and the bound is {bound}",
                hint="slow down and send the same records again",
                retry_after_seconds=0.5,
            )

    def _admit(self, frame: Frame, size: int, proven: Proven | None, waiter: Waiter) -> None:
        """Queues a new record, or waits with the one that it repeats. Raises DrError."""
        record = frame.record
        self._admission.check_copies(record)
        known = self._admission.repeats(record)
        waiter.repeated = known is not None
        if known is None:
            entry = self._admission.take(frame, size, proven)
            entry.waiters.append(waiter)
            self._queue.add(entry)
        elif isinstance(known, Entry) and not known.seq:
            known.waiters.append(waiter)
        else:
            self._wait_for(known.seq if isinstance(known, Entry) else known, waiter)

    def _too_late(self, frame: Frame) -> DrError:
        held = self.objective.problem(self._seq) if frame.record.copies == 1 else None
        return OutcomeUnknown(
            held or f"not committed in {frame.record.copies} region stores within {self._limits.ack_timeout_seconds:g} s",
            hint="it may still become so; send the same record again to learn it",
        )

    # --------------------------------------------------------------------------------------------------- batching

    async def _batch(self) -> None:
        last_closed = float("-inf")
        while True:
            await self._have_work.wait()
            self._have_work.clear()
            await self._pause(last_closed)
            while not self.lost and (taken := self._queue.take(large=not self._large_on_its_way())):
                await self._close(taken)
                last_closed = self._clock.monotonic()

    async def _pause(self, last_closed: float) -> None:
        """Lets records gather: not when idle, else a flush interval, up to ``BUSY_FLUSHES`` while the home store is busy."""
        flush, home = self._limits.flush_seconds, self.pumps[self._home]
        for flushes in range(1, BUSY_FLUSHES + 1):
            if flushes > 1 and flushes * flush > BUSY_SECONDS:
                return
            pause = last_closed + flushes * flush - self._clock.monotonic()
            if self._queue.full():
                return
            if pause > 0:
                await self._clock.sleep(pause)
            if not home.attached or home.seq >= self._seq:
                return

    def _large_on_its_way(self) -> bool:
        home = self.pumps[self._home].seq
        return any(
            len(entries) == 1 and entries[0].weight >= LARGE_BYTES for seq, entries in self._unapplied.items() if seq > home
        )

    async def _close(self, taken: list[Entry]) -> None:
        """Makes the next segment of these records. One at a time: only the batcher calls it."""
        frames = tuple(entry.frame for entry in taken)
        seq = self._seq + 1
        header = SegmentHeader(self.group, self.fence.stream, seq, self.fence.epoch, self._chain, self.now())
        size = sum(entry.weight for entry in taken)
        if size < LARGE_BYTES:
            segment, data, chain = _encode(header, frames)
        else:
            try:
                segment, data, chain = await asyncio.to_thread(_encode, header, frames)
            except asyncio.CancelledError:
                self._queue_failed(taken)  # they are in no queue now: nobody else would tell them
                raise
            if self.lost:
                self._queue_failed(taken)
                return
        received = [entry.since for entry in taken]
        self.log.add(
            Built(
                SegmentRef(self.fence.stream, seq, self.fence.epoch), self._chain, chain, len(data), len(frames),
                min(received), max(received), segment, data, tails_of(segment),
            )
        )  # fmt: skip
        self._seq, self._chain = seq, chain
        self._records += len(frames)
        self._bytes += len(data)
        self._marks.add(Mark(seq, min(received), self._records, self._bytes))
        self._unapplied[seq] = taken
        for entry in taken:
            entry.seq = seq
            self._waiting.add(seq, entry.waiters)
            entry.waiters = []
        self.log.shed(self._safe())
        for pump in self.pumps.values():
            pump.wake.set()

    def _queue_failed(self, taken: list[Entry]) -> None:
        for entry in taken:
            for waiter in entry.waiters:
                waiter.receipt.fail(waiter.number, _not_acknowledged(self.lost))

    def _safe(self) -> int:
        """Last segment that may leave the memory: the home store and the view have it."""
        return min(self.pumps[self._home].seq, self._applied)

    # ----------------------------------------------------------------------------------------------- for the pumps

    def chain_at(self, seq: int) -> str | None:
        """Our chain hash after segment ``seq``; None where neither the log nor the view reaches back so far."""
        built = self.log.get(seq)
        return self._view.chain_at(self.fence.stream, seq) if built is None else built.chain

    def counts_after(self, seq: int) -> tuple[int, int]:
        """Frames and bytes of our history above segment ``seq``, as far as the home store has it."""
        home = self.pumps[self._home].head
        assert home is not None
        return Keeping(self._view, self.fence.stream).counts(seq, home.seq)

    def home_copy(self) -> tuple[RegionStore, Head]:
        """The home store and its head, for what has left the memory."""
        head = self.pumps[self._home].head
        assert head is not None
        return self._stores[self._home], head

    def committed(self, pump: Pump) -> None:
        """A store moved: apply to the view, acknowledge, forget what every store has."""
        if not self._may_acknowledge():
            return
        self._apply_until(pump.seq)
        for seq in self._waiting.upto(self._seq if self.objective.enforced else pump.seq):  # another's copies may free ours
            self._settle(seq)
        self._marks.advance(self._is_acknowledged)
        self.log.forget(min(self._applied, *(other.seq for other in self.pumps.values())))
        for other in self.pumps.values():
            if other is not pump and other.attached and other.seq < pump.seq:
                other.wake.set()
        if self._queue:
            self._have_work.set()  # a large record may have waited for this

    # ---------------------------------------------------------------------------------------------- acknowledging

    def committed_in(self, seq: int) -> tuple[str, ...]:
        """Stores that certainly have committed segment ``seq`` of our history."""
        return tuple(pump.region for pump in self.pumps.values() if pump.attached and pump.seq >= seq)

    def _alone(self) -> tuple[str, ...]:
        """Stores whose copy may be acknowledged alone now. Past the lease there is none (``domain.failsafe``)."""
        return self.sole_ackers if self._is_leased() else ()

    def _is_acknowledged(self, seq: int) -> bool:
        return replication.acknowledged(1, self.committed_in(seq), self._alone())

    def _may_acknowledge(self) -> bool:
        """Asked before anything that waits is resolved, whatever woke us: a commit, a repetition, a change of sole ackers."""
        if not self.lost and not self._may_act():
            self.lose("the right to act ran out between commit and acknowledgement")
        return not self.lost

    def _apply_until(self, seq: int) -> None:
        while self._applied < min(seq, self._seq):
            built = self.log.get(self._applied + 1)
            assert built is not None
            assert built.segment is not None
            entries = self._unapplied[built.ref.seq]
            try:
                self._view.apply(built.segment, built.chain, built.ref, built.size, [entry.proven for entry in entries])
            except DrError as error:
                # Ours, not the store's (a full disk, say): whoever cannot index what it acknowledges must not go on holding.
                self.lose(f"the view cannot be written: {error.message}")
                raise _not_acknowledged(self.lost) from error
            self._applied += 1
            built.segment = None
            for entry in self._unapplied.pop(built.ref.seq):
                self._admission.applied(entry)

    def _wait_for(self, seq: int, waiter: Waiter) -> None:
        if not self._may_acknowledge():
            raise _not_acknowledged(self.lost)
        self._waiting.add(seq, [waiter])
        self._settle(seq)

    def _settle(self, seq: int) -> None:
        committed = self.committed_in(seq)
        held = len(committed) < 2 and (self.objective.second_seq() or 0) < seq and self.objective.problem(seq) is not None

        alone = self._alone()

        def may(waiter: Waiter) -> bool:
            return replication.acknowledged(waiter.copies, committed, alone) and (waiter.own or not held)

        self._waiting.settle(seq, len(committed), may)

    def wait_settled(self) -> None:
        """Re-evaluates everything that waits: the set of stores that may acknowledge alone changed."""
        if not self._may_acknowledge():
            return
        for seq in self._waiting.upto(self._seq):
            self._settle(seq)
        self._marks.advance(self._is_acknowledged)

    # ------------------------------------------------------------------------------------------------- what is seen

    @property
    def seq(self) -> int:
        """Last segment that was closed."""
        return self._seq

    @property
    def acknowledged(self) -> Mark:
        """Last segment of which records may have been acknowledged, with cumulative counts."""
        return self._marks.acknowledged

    def backlog(self, region: str) -> Backlog | None:
        """What a region's store does not have of what was acknowledged; None when its head was never read in this epoch."""
        pump = self.pumps[region]
        acknowledged = self.acknowledged
        if pump.head is None:
            return None
        if pump.seq >= acknowledged.seq:
            return Backlog(region, pump.seq, 0, 0, 0, None)
        oldest = self._marks.received_after(pump.seq)
        if pump.seq < self.starts[-1].first_seq - 1:  # missing segments are older than this epoch: ask the view
            oldest = min(oldest, Keeping(self._view, self.fence.stream).received_after(pump.seq, oldest))
        return Backlog(
            region,
            pump.seq,
            acknowledged.seq - pump.seq,
            max(0, acknowledged.records - pump.head.records),
            max(0, acknowledged.bytes - pump.head.bytes),
            oldest,
        )

    def age_beyond(self, seq: int) -> float:
        """Seconds since the oldest acknowledged record above segment ``seq`` was received; 0 when there is none."""
        return 0.0 if seq >= self.acknowledged.seq else max(0.0, self.now() - self._marks.received_after(seq))

    def unreplicated(self, limit: int = 20) -> tuple[AgentTail, ...]:
        """Agents with acknowledged records that only one store has, worst first."""
        best = sorted((pump.seq for pump in self.pumps.values()), reverse=True)[1] if len(self.pumps) > 1 else 0
        return self.log.unreplicated(best + 1, self.acknowledged.seq, limit)

    def oldest_waiting_seconds(self) -> float:
        """How long the oldest record has waited for its copies; 0 when none waits."""
        first, queued = self._waiting.oldest(), self._queue.oldest()
        oldest = [self._marks.received_after(first - 1)] if first is not None else []
        oldest += [queued.since] if queued is not None else []
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


def _encode(header: SegmentHeader, frames: tuple[Frame, ...]) -> tuple[Segment, bytes, str]:
    """The segment, its bytes and the chain hash after it."""
    segment, data = build_segment(header, frames)
    return segment, data, next_chain(header.prev_chain, data)


def _not_acknowledged(why: str) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"not acknowledged: {why}", hint="ask the active controller again with the same record id; a retry is idempotent"
    )
