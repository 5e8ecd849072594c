"""One stream's lease in this instance's hands: acquire it with a new epoch, prove it again and again, give it back.

A ``Tenure`` is a guard, not a question: its ``guard`` goes into every etcd transaction that the holder makes, its
``fence`` into every call on a store or on traffic, and ``may_act`` is asked again after every commit.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from controller.domain import lease
from controller.domain.lease import GuardedRead, Heartbeat, Right, Verdict
from controller.domain.model import Authority, Barrier, Fence, Holder
from controller.errors import DrError, OutcomeUnknown, Refused, Unavailable
from controller.ports import Clock, Compare, Coordinator, Get, Item, Lease, Put
from controller.runtime.documents import Keys, Seen, decode, encode, read
from controller.runtime.documents import seen as document
from controller.runtime.recovery import other_cluster


class Tenure:
    """What an instance holds between acquiring a stream and losing it."""

    def __init__(
        self,
        coordinator: Coordinator,
        keys: Keys,
        clock: Clock,
        fence: Fence,
        held: Lease,
        create_revision: int,
        right: Right,
        margin: float,
        gone_by: float,
    ) -> None:
        self._coordinator = coordinator
        self._keys = keys
        self._clock = clock
        self.fence = fence
        self._lease = held
        self._create_revision = create_revision
        self.right = right
        self._margin = margin
        self.gone_by = gone_by
        """Monotonic time by which the key of whoever held the stream before had vanished."""
        self.barrier: Barrier | None = None
        self.drained = False
        """Set by the holder when a planned move has drained its stream: heartbeats stop extending the right."""
        self.draining = False
        """Set by the holder from when it sees a planned move until it serves again: its right is not carried past the lease."""
        self.reason = "acquired"
        """What the last heartbeat said, or why it was not completed."""

    @property
    def guard(self) -> Compare:
        """True in a transaction exactly while the holder key is still the one that this tenure created."""
        return Compare.created(self._keys.holder(self.fence.stream), self._create_revision)

    def may_act(self) -> bool:
        """Whether the right still holds, by our own monotonic clock. No I/O."""
        return self.right.allows(self._clock.monotonic())

    def is_leased(self) -> bool:
        """Whether the right still holds by the lease itself: only then may one store's copy be acknowledged. No I/O."""
        return self.right.leased(self._clock.monotonic())

    def go_beyond(self, until: float) -> None:
        """Carries the right past the lease, up to ``until`` (monotonic). See ``domain.failsafe`` for when that is safe."""
        self.right = self.right.carried(until, self._clock.monotonic())

    def remaining_seconds(self) -> float:
        """Seconds left of the right, never negative."""
        return self.right.remaining_seconds(self._clock.monotonic())

    def lose(self, reason: str) -> None:
        """Ends the right at once: proof was seen that somebody newer exists."""
        if not self.right.lost:
            self.right = replace(self.right, lost=reason)

    async def keep(self) -> None:
        """One heartbeat, with a deadline of its own: after the time in which a keep-alive extends anything it is of no use any
        more. What stopped it is in ``reason``; whether the right was lost, in ``right``."""
        try:
            async with asyncio.timeout(max(self._margin, self._lease.ttl_seconds - self._margin)):
                await self.heartbeat()
        except TimeoutError:
            self.reason = f"no complete heartbeat in {self._lease.ttl_seconds - self._margin:g} s"
        except DrError as error:
            self.reason = error.message

    async def heartbeat(self) -> Verdict:
        """One complete heartbeat; see ``domain.lease``.

        Raises Unavailable when it could not be completed, which proves nothing.
        """
        before = await self._guarded_read()
        sent_at = self._clock.monotonic()
        renewal = await self._coordinator.keep_alive(self._lease.id)
        after = await self._guarded_read()
        self.barrier = after.barrier
        verdict = lease.judge(
            Heartbeat(before, sent_at, renewal.ttl_seconds, renewal.term, after),
            granted_ttl_seconds=self._lease.ttl_seconds,
            margin_seconds=self._margin,
            drained=self.drained,
        )
        self.right = self.right.after(verdict)
        self.reason = verdict.reason
        return verdict

    async def _guarded_read(self) -> GuardedRead:
        reads = [Get(self._keys.holder(self.fence.stream)), Get(self._keys.authority)]
        result = await self._coordinator.txn([self.guard], reads, reads)
        item = result.items[1]
        authority = decode(Authority, item.value, where=item.key) if item is not None else None
        return GuardedRead(result.succeeded, result.term, authority.barrier if authority else None)

    async def release(self) -> None:
        """Gives the lease back early. Only when every right that was granted under it has run out: the caller knows that."""
        self.lose("released")
        await self._coordinator.revoke(self._lease.id)


def may_acquire(authority: Seen[Authority] | None, holder: Holder | None, region: str, floor: int) -> str | None:
    """Why ``region`` may not acquire a stream now, or None. ``floor``: the greatest epoch found in any reachable store."""
    if authority is None:
        return "the group has no authority yet: found it with `drctl bootstrap`"
    value = authority.value
    if value.region != region:
        return f"the authority is with {value.region}"
    if value.barrier is not None:
        return f"plan {value.barrier.plan} is taking over"
    if holder is not None:
        return f"{holder.region}/{holder.instance} holds the stream in epoch {holder.epoch}"
    if floor > value.epoch:
        raise Refused(
            f"a region store knows epoch {floor}, etcd only {value.epoch}: etcd was lost or restored from an old snapshot",
            hint="compare the stores with `drctl status`, then confirm with `drctl recover`",
        )
    return None


async def acquire(
    coordinator: Coordinator,
    keys: Keys,
    clock: Clock,
    *,
    stream: str,
    region: str,
    instance: str,
    address: str,
    ttl_seconds: int,
    margin_seconds: float,
    floor: int,
    seen_gone: tuple[int, float] | None = None,
) -> Tenure | str:
    """Takes the stream with a new epoch, if that is allowed. Returns the tenure, or why not.

    The epoch is incremented in the authority and written into the leased holder key by one transaction, which compares the
    authority as read and that nobody holds the stream. ``seen_gone``: (the authority's epoch, monotonic time) of an earlier
    look at which nobody held it; it counts while that epoch is still the last one. Raises Unavailable, and Refused: see
    ``may_acquire``, or etcd is not the cluster that the authority was recorded in.
    """
    here = await coordinator.txn([], [Get(keys.authority)])
    authority = document(here.items[0], Authority)
    restored = other_cluster(authority.value, here.cluster) if authority else None
    if restored is not None:
        raise Refused(restored, hint="compare the stores with `drctl status`, then confirm with `drctl recover`")
    found = await read(coordinator, keys.holder(stream), Holder)
    reason = may_acquire(authority, found.value if found else None, region, floor)
    if reason is not None:
        return reason
    assert authority is not None
    gone_by = clock.monotonic()
    if seen_gone is not None and seen_gone[0] == authority.value.epoch:
        gone_by = seen_gone[1]
    asked_at = clock.monotonic()
    granted = await coordinator.grant(ttl_seconds)
    # etcd may grant more than was asked for. The right is counted with the smaller of the two, because everybody else waits
    # for what the holder key says.
    held = replace(granted, ttl_seconds=min(granted.ttl_seconds, ttl_seconds))
    epoch = authority.value.epoch + 1
    holder = Holder(stream, region, instance, epoch, address, clock.wall(), held.ttl_seconds)
    item = await _take(coordinator, keys, authority, holder, held)
    if item is None:
        try:
            await coordinator.revoke(held.id)
        except Unavailable:
            pass  # it expires by itself, and nothing hangs on it
        return "somebody else was faster"
    right = Right(epoch, lease.first_deadline(asked_at, held.ttl_seconds, margin_seconds))
    fence = Fence(stream, epoch, region, instance)
    return Tenure(coordinator, keys, clock, fence, held, item.create_revision, right, margin_seconds, gone_by)


async def _take(coordinator: Coordinator, keys: Keys, authority: Seen[Authority], holder: Holder, held: Lease) -> Item | None:
    """Raises the epoch in the authority and writes the leased holder key, in one transaction; None when that was not done.
    Raises Unavailable."""
    key = keys.holder(holder.stream)
    try:
        result = await coordinator.txn(
            [Compare.modified(keys.authority, authority.revision), Compare.absent(key)],
            [
                Put(keys.authority, encode(replace(authority.value, epoch=holder.epoch))),
                Put(key, encode(holder), held.id),
                Get(key),
            ],
            [Get(key)],
        )
    except OutcomeUnknown:
        mine = await read(coordinator, key, Holder)
        return mine.item if mine is not None and mine.value == holder and mine.item.lease == held.id else None
    return result.items[0] if result.succeeded else None
