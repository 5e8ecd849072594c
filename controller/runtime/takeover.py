"""The first half of a promotion, up to the transaction that moves the authority: check, quiesce, authorize.

Run by one controller of the target region, which holds ``executors/{plan}`` under its own lease. Every step may be repeated
by another one: what was done is read from etcd, never remembered. The second half needs a fence and is in ``promotion.py``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from controller.domain.model import Authority, Barrier, Holder
from controller.domain.plan import Evidence, drift
from controller.domain.promotion import Event, PlanRecord, State, move
from controller.errors import Conflict, OutcomeUnknown, Unavailable
from controller.ports import Clock, Compare, Coordinator, Delete, Put
from controller.runtime.documents import Keys, Seen, encode, read, read_all
from controller.runtime.evidence import Coordination
from controller.runtime.plans import PlanBook
from controller.runtime.service import JournalEntry

GatherEvidence = Callable[[PlanRecord], Awaitable[tuple[Evidence, Coordination]]]


@dataclass(frozen=True, slots=True)
class TakeoverPolicy:
    """``ttl_seconds``: the group's lease TTL, which all waits here are made of."""

    ttl_seconds: int
    drain_timeout_seconds: float


class Takeover:
    """Moves plans of one target region from approved to authorized.

    ``step`` does one bounded thing and says it in a sentence.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        keys: Keys,
        clock: Clock,
        book: PlanBook,
        gather: GatherEvidence,
        policy: TakeoverPolicy,
        instance: str,
        streams: Sequence[str],
    ) -> None:
        self._coordinator = coordinator
        self._keys = keys
        self._clock = clock
        self._book = book
        self._gather = gather
        self._policy = policy
        self._instance = instance
        self._streams = tuple(streams)
        self._barrier_seen: dict[str, float] = {}
        self._guards_seen: dict[str, tuple[int, float]] = {}
        """Plan → (create revision of its guard, our monotonic time when we first saw it)."""

    async def step(self, seen: Seen[PlanRecord]) -> str:
        """Raises Unavailable, OutcomeUnknown, Conflict: all of them mean "look again at the next tick"."""
        record = seen.value
        if record.plan.expires_at <= self._clock.wall():
            await self._book.transition(seen, Event.EXPIRED, "it expired before the authority moved")
            return f"plan {record.plan.id} expired"
        if record.state is State.AWAITING_APPROVAL:
            # Nothing starts that nobody asked for, whoever calls this and why.
            return await self._start(seen) if record.execute_requested_by else f"plan {record.plan.id} waits to be ordered"
        if record.state is State.QUIESCING:
            return await self._quiesce(seen)
        return await self._authorize(seen)

    # ------------------------------------------------------------------------------------------------------- check

    async def _start(self, seen: Seen[PlanRecord]) -> str:
        """Step ``check``, and the barrier, in one transaction with the valid approvals that a failover needs for it."""
        record, plan = seen.value, seen.value.plan
        started = self._clock.wall()
        evidence, coordination = await self._gather(record)
        changed = drift(plan, evidence)
        if changed is not None:
            await self._book.transition(seen, Event.DRIFTED, f"the evidence drifted: {changed}")
            return f"plan {plan.id} is void: {changed}"
        compares, _, problem = await self._approved(record)
        if problem:
            return problem
        authority = coordination.authority
        barrier = Barrier(plan.id, plan.kind.value, plan.target)
        check = self._entry(plan.id, "check", started, self._clock.wall(), f"{len(evidence.checks)} checks hold")
        quiesce = self._entry(plan.id, "quiesce", self._clock.wall(), 0.0, "the barrier stands")
        await self._book.transition(
            seen,
            Event.STARTED,
            "the barrier stands: nobody acquires, the old holder's right runs out",
            compare=[Compare.modified(self._keys.authority, authority.revision), *compares],
            also=[
                Put(self._keys.authority, encode(replace(authority.value, barrier=barrier))),
                Put(self._keys.journal(plan.id, "check"), encode(check)),
                Put(self._keys.journal(plan.id, "quiesce"), encode(quiesce)),
            ],
            detail={"digest": record.digest, "requested_by": record.execute_requested_by},
        )
        return f"plan {plan.id}: the barrier stands"

    async def _approved(self, record: PlanRecord) -> tuple[list[Compare], tuple[str, ...], str]:
        """Conditions that pin the approvals that were judged and whose they are, or why the gate is closed. Two TTLs must be
        left of each."""
        approvals = await self._book.approvals(record.plan.id)
        judged = self._book.judge(record, [seen.value for seen in approvals], minimum_left_seconds=2 * self._policy.ttl_seconds)
        if not judged.open:
            return [], (), judged.sentence
        return [Compare.modified(seen.item.key, seen.revision) for seen in approvals], judged.valid, ""

    # ----------------------------------------------------------------------------------------------------- quiesce

    async def _quiesce(self, seen: Seen[PlanRecord]) -> str:
        """Waits until nobody holds any stream. One TTL after the barrier a failover may revoke what is left."""
        record, plan = seen.value, seen.value.plan
        await self._barrier(plan.id)
        holders = await read_all(self._coordinator, self._keys.holders, Holder)
        # Our own monotonic clock, from when we first saw the barrier: a wall clock that jumps must not shorten the wait.
        waited = self._clock.monotonic() - self._barrier_seen.setdefault(plan.id, self._clock.monotonic())
        if not holders and plan.kind.planned and not await self._drained(plan.id):
            reason = "the old holder is gone and did not drain: nothing says that every region has everything; plan a failover"
            await self._book.transition(seen, Event.ABORTED, reason)
            return f"plan {plan.id} aborted: {reason}"
        if not holders:
            entry = self._entry(plan.id, "quiesce", record.updated_at, self._clock.wall(), "nobody holds a stream")
            authorize = self._entry(plan.id, "authorize", self._clock.wall(), 0.0, "about to move the authority")
            await self._book.transition(
                seen,
                Event.QUIESCED,
                "nobody holds a stream",
                also=[
                    Put(self._keys.journal(plan.id, "quiesce"), encode(entry)),
                    Put(self._keys.journal(plan.id, "authorize"), encode(authorize)),
                ],
            )
            return f"plan {plan.id}: quiesced"
        if plan.kind.planned:
            if waited > self._policy.drain_timeout_seconds:
                reason = f"the old holder did not drain in {self._policy.drain_timeout_seconds:g} s"
                await self._book.transition(seen, Event.ABORTED, reason)
                return f"plan {plan.id} aborted: {reason}"
            return f"plan {plan.id}: waiting for {holders[0].value.instance} to drain ({waited:.0f} s)"
        if waited > max(self._policy.ttl_seconds, *(holder.value.ttl_seconds for holder in holders)):
            # The barrier was set more than one TTL ago, and no heartbeat that began after it extended the right: it has run
            # out by the holder's own clock, so revoking takes nothing from anybody.
            for holder in holders:
                await self._coordinator.revoke(holder.item.lease)
            return f"plan {plan.id}: revoked the lease of {holders[0].value.instance}"
        return f"plan {plan.id}: the right of {holders[0].value.instance} runs out ({waited:.0f} s)"

    async def _drained(self, plan_id: str) -> bool:
        """Whether the holder of every stream proved, under its own fence, that it drained for this plan."""
        for stream in self._streams:
            if await self._coordinator.get(self._keys.drained(plan_id, stream)) is None:
                return False
        return True

    async def _barrier(self, plan_id: str) -> Seen[Authority]:
        """The authority, whose barrier must be this plan's. Raises Conflict otherwise: somebody cleared it."""
        authority = await read(self._coordinator, self._keys.authority, Authority)
        if authority is None or authority.value.barrier is None or authority.value.barrier.plan != plan_id:
            raise Conflict(f"the barrier of plan {plan_id} is gone", hint=f"drctl plan abort {plan_id}, then plan again")
        return authority

    # --------------------------------------------------------------------------------------------------- authorize

    async def _authorize(self, seen: Seen[PlanRecord]) -> str:
        """One transaction: authority as planned, nobody holds, approvals as judged, guard alive → the authority moves.

        The guard is a key under a lease of one TTL, created *before* the expiries are read. Whoever is paused between the
        check and the transaction longer than a TTL finds the guard gone; and two TTLs had to be left of every approval. An
        election arms leases anew, so a guard may outlive its TTL: others delete it then (``sweep_guard``).
        """
        plan, began = seen.value.plan, self._clock.monotonic()
        guard_key = self._keys.guard(plan.id)
        lease = await self._coordinator.grant(self._policy.ttl_seconds)
        try:
            guard = await self._coordinator.txn(
                [Compare.absent(guard_key)], [Put(guard_key, self._instance.encode(), lease.id)]
            )
            if not guard.succeeded:
                return f"plan {plan.id}: another attempt to authorise is under way"
            return await self._move_authority(seen, Compare.created(guard_key, guard.revision), began)
        finally:
            try:
                await self._coordinator.revoke(lease.id)
            except Unavailable:
                pass  # it ends by itself, one TTL later

    async def sweep_guard(self, plan_id: str) -> str | None:
        """Deletes a guard that has stood for longer than its TTL, by our own clock. Any controller does this for every plan
        that is being authorized: a guard that elections keep alive would let approvals be used that expired meanwhile."""
        key, now = self._keys.guard(plan_id), self._clock.monotonic()
        item = await self._coordinator.get(key)
        if item is None:
            self._guards_seen.pop(plan_id, None)
            return None
        known, since = self._guards_seen.get(plan_id, (0, now))
        if known != item.create_revision:
            self._guards_seen[plan_id] = (item.create_revision, now)
        elif now - since > self._policy.ttl_seconds:
            swept = await self._coordinator.txn([Compare.created(key, known)], [Delete(key)])
            return f"plan {plan_id}: deleted a guard that outlived its lease" if swept.succeeded else None
        return None

    async def _move_authority(self, seen: Seen[PlanRecord], guard: Compare, began: float) -> str:
        record, plan = seen.value, seen.value.plan
        evidence, coordination = await self._gather(record)
        changed = drift(plan, evidence)
        if changed is not None:
            await self._book.transition(seen, Event.DRIFTED, f"the evidence drifted: {changed}")
            return f"plan {plan.id} is void: {changed}"
        if coordination.holders:
            raise Conflict(
                f"{coordination.holders[0].instance} holds a stream again", hint="this must not happen; see the audit"
            )
        compares, valid, problem = await self._approved(record)
        if problem:
            await self._book.transition(seen, Event.ABORTED, f"approvals no longer suffice: {problem}")
            return f"plan {plan.id} aborted: {problem}"
        authority = await self._barrier(plan.id)
        now = self._clock.wall()
        moved = replace(authority.value, region=plan.target, plan=plan.id, barrier=None)
        entry = await self._entry_of(plan.id, "authorize")
        done = replace(entry, finished_at=now, instance=self._instance, sentence=f"authority moved to {plan.target}")
        older, superseding = await self._superseded(authority.value.plan, plan.id, now)
        if self._clock.monotonic() - began >= self._policy.ttl_seconds:
            raise Conflict("authorizing took longer than a TTL since the approvals were looked at", hint="looking again")
        try:
            await self._book.transition(
                seen,
                Event.AUTHORIZED,
                f"the authority is with {plan.target}",
                compare=[
                    guard,
                    Compare.modified(self._keys.authority, authority.revision),
                    *(Compare.absent(self._keys.holder(stream)) for stream in self._streams),
                    *compares,
                    *older,
                ],
                also=[
                    Put(self._keys.authority, encode(moved)),
                    Put(self._keys.journal(plan.id, "authorize"), encode(done)),
                    *superseding,
                ],
                detail={
                    "approvers": list(valid),
                    "from": plan.source,
                    "to": plan.target,
                    "loss": plan.evidence.loss.records,
                },
                change=lambda after: replace(after, approvers=valid, authorized_at=now, right_ended_by=evidence.right_ended_by),
            )
        except OutcomeUnknown:
            return f"plan {plan.id}: the outcome of the authorising transaction is unknown; looking again"
        return f"plan {plan.id}: the authority is with {plan.target}"

    async def _superseded(self, older: str | None, newer: str, now: float) -> tuple[list[Compare], list[Put]]:
        """Ends the plan that moved the authority before, if it is still on its way: nobody will carry it on."""
        found = await read(self._coordinator, self._keys.plan(older), PlanRecord) if older and older != newer else None
        if found is None or found.value.ended:
            return [], []
        ended = move(found.value, Event.SUPERSEDED, at=now, reason=f"plan {newer} moved the authority on")
        return [Compare.modified(found.item.key, found.revision)], [Put(found.item.key, encode(ended))]

    # ----------------------------------------------------------------------------------------------------- journal

    def _entry(self, plan: str, step: str, started: float, finished: float, sentence: str) -> JournalEntry:
        return JournalEntry(plan, step, started, finished, self._instance, 0, sentence)

    async def _entry_of(self, plan: str, step: str) -> JournalEntry:
        found = await read(self._coordinator, self._keys.journal(plan, step), JournalEntry)
        now = self._clock.wall()
        return found.value if found is not None else self._entry(plan, step, now, 0.0, "")


async def overtaken(coordinator: Coordinator, keys: Keys, book: PlanBook, seen: Seen[PlanRecord]) -> bool:
    """Makes a waiting plan void whose authority is over: it can never run, and should not wait to be approved. Any controller
    may do this; the transaction compares the authority that it was judged by. Returns whether it did."""
    authority = await read(coordinator, keys.authority, Authority)
    if authority is None or not is_overtaken(seen.value, authority.value):
        return False
    then = seen.value.plan.evidence
    reason = f"it was made under epoch {then.authority_epoch} of {then.authority_region}, which is over"
    await book.transition(seen, Event.DRIFTED, reason, compare=[Compare.modified(keys.authority, authority.revision)])
    return True


def is_overtaken(record: PlanRecord, authority: Authority) -> bool:
    """Whether a waiting plan was made under an authority that is over. A failover survives new epochs of the same region: a
    region that flaps must not make every plan to leave it void (``domain.plan.drift`` looks closer when it starts)."""
    then = record.plan.evidence
    if record.state is not State.AWAITING_APPROVAL:
        return False
    if authority.region != then.authority_region:
        return True
    return record.plan.kind.planned and authority.epoch != then.authority_epoch


async def sweep_barrier(coordinator: Coordinator, keys: Keys, book: PlanBook, now: float) -> str | None:
    """Clears a barrier whose plan has ended, is gone, or expired before it was authorized. Any controller may do this."""
    authority = await read(coordinator, keys.authority, Authority)
    if authority is None or authority.value.barrier is None:
        return None
    plan = await read(coordinator, keys.plan(authority.value.barrier.plan), PlanRecord)
    if plan is not None and not plan.value.ended:
        if plan.value.plan.expires_at > now or plan.value.state not in (State.QUIESCING, State.AUTHORIZING):
            return None
        plan = await book.transition(plan, Event.EXPIRED, "it expired before the authority moved")
    cleared = Put(keys.authority, encode(replace(authority.value, barrier=None)))
    pinned = [Compare.modified(keys.authority, authority.revision)]
    if plan is not None:
        pinned.append(Compare.modified(plan.item.key, plan.revision))
    result = await book.audit.commit(
        pinned, [cleared], at=now, actor="sweep", action="barrier-cleared", subject=authority.value.barrier.plan
    )
    return f"cleared the barrier of plan {authority.value.barrier.plan}" if result.succeeded else None
