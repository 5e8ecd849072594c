"""Notices that a region has gone silent, tells people, and proposes what to do. It never does it.

An incident is a document, opened by compare-and-set, and what must follow from it is read from the document: at every tick
every standby looks whether the open incident of the present authority still has to be told, or still has no plan. One of
them takes the incident's *caller* key, under a short lease of its own, and does it. So an answer that was lost, a caller that
died, a pager or a proposal that failed delay people by seconds and never for ever; at worst they are told twice.

There is one incident per authority (its region and the plan that put it there), not per epoch: it stays open, however often
the region acquires and loses, until a holder has *served* again. When it falls silent after that, the next one is opened.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from controller.domain.model import Authority, Head, Role, Unknown
from controller.domain.plan import PlanKind
from controller.domain.promotion import PlanRecord, State
from controller.errors import DrError, Unavailable
from controller.ports import Clock, Compare, Page, Pager, Put
from controller.runtime.audit import Audit
from controller.runtime.documents import Keys, Seen, encode, read, read_readable
from controller.runtime.evidence import Coordination, Outside, read_heads
from controller.runtime.service import Incident, PlanRequest
from controller.runtime.takeover import is_overtaken

SILENT = "region-silent"
FOUNDING = "founding"
"""Stands for the plan in the incidents of an authority that no plan has moved yet."""
CALL_SECONDS = 15
"""Lease of the caller key, and the time that one attempt to propose and to page may take."""
RETRY_SECONDS = 5.0
"""Pause before this instance tries again after people could not be told."""
PROPOSE_SECONDS = 30.0
"""Pause before it tries again to propose, while there is no live plan."""
REPEAT_SECONDS = 600.0
"""People who know of an incident are told of a replacement of its plan no more often than this."""
WRITE_ATTEMPTS = 5

Propose = Callable[[PlanRequest], Awaitable[Seen[PlanRecord]]]
Plans = Callable[[], Awaitable[Sequence[Seen[PlanRecord]]]]


@dataclass(frozen=True, slots=True)
class WatchPolicy:
    """``notice_seconds``: how long nobody may hold the group before people are told. ``priorities``: lower is preferred."""

    notice_seconds: float
    auto_propose: bool
    priorities: dict[str, int]


class Watch:
    """Incidents of one group."""

    def __init__(
        self,
        outside: Outside,
        audit: Audit,
        pager: Pager,
        propose: Propose,
        plans: Plans,
        policy: WatchPolicy,
        region: str,
        instance: str,
    ) -> None:
        self._outside = outside
        self._audit = audit
        self._pager = pager
        self._propose = propose
        self._plans = plans
        self._policy = policy
        self._region = region
        self._instance = instance
        self._silent_seconds = 0.0
        self._looked_at: float | None = None
        self._call_after = 0.0
        self._propose_after = 0.0
        self._why_no_plan = ""
        self._unheard = ""
        self._failed: set[tuple[str, str]] = set()
        self.unreadable: dict[str, str] = {}
        """Keys of incidents that could not be decoded at the last look, with the reasons."""

    @property
    def _clock(self) -> Clock:
        return self._outside.clock

    @property
    def _keys(self) -> Keys:
        return self._outside.keys

    @property
    def _who(self) -> str:
        return f"{self._region}/{self._instance}"

    # ----------------------------------------------------------------------------------------------------- noticing

    async def look(self, seen: Coordination) -> str | None:
        """Called at every tick of a standby. Returns a sentence when it did something. Raises Unavailable."""
        authority = seen.authority.value
        if authority.barrier is not None or authority.region == self._region or _serves(seen):
            self._silent_seconds, self._looked_at = 0.0, None
            return None
        current, number = await self._current(authority)
        if self._silence(seen) >= self._policy.notice_seconds and current is None:
            await self._open(seen, number + 1)
            current, _ = await self._current(authority)
        return None if current is None else await self._attend(current, seen)

    def _silence(self, seen: Coordination) -> float:
        """Seconds in which nobody held, since somebody last served: acquiring and losing again is not being back."""
        now = self._clock.monotonic()
        before, self._looked_at = self._looked_at, None if seen.holders else now
        if before is not None and not seen.holders:
            self._silent_seconds += now - before
        return self._silent_seconds

    async def _current(self, authority: Authority) -> tuple[Seen[Incident] | None, int]:
        """The open incident of this authority, if there is one, and the greatest number that any of its incidents has."""
        found = await read_readable(self._outside.coordinator, self._keys.incident(_series(authority)), Incident)
        number = max(map(_number, (*(seen.item.key for seen in found.documents), *found.unreadable)), default=0)
        still = [seen for seen in found.documents if not seen.value.closed_at]
        return max(still, key=lambda seen: _number(seen.item.key), default=None), number

    async def _open(self, seen: Coordination, number: int) -> None:
        """Whoever is first. Compares what it is based on, which may be some time ago. Whether its answer is lost does not
        matter: the document is what counts, and it is looked for at every tick."""
        authority = seen.authority.value
        incident = Incident(
            id=f"{_series(authority)}{number}",
            kind=SILENT,
            title=f"{authority.region} is silent: nobody holds the group {self._keys.group}",
            detail=f"epoch {authority.epoch} ended and no controller of {authority.region} serves",
            opened_at=self._clock.wall(),
            by=self._who,
            region=authority.region,
        )
        key = self._keys.incident(incident.id)
        await self._audit.commit(
            [
                Compare.absent(key),
                Compare.modified(self._keys.authority, seen.authority.revision),
                *(Compare.absent(self._keys.holder(stream)) for stream in self._outside.streams),
            ],
            [Put(key, encode(incident))],
            at=incident.opened_at,
            actor=incident.by,
            action="incident",
            subject=incident.id,
            detail={"title": incident.title},
        )

    # ---------------------------------------------------------------------------------------------------- attending

    async def _attend(self, seen: Seen[Incident], coordination: Coordination) -> str | None:
        """Does what this incident still asks for, if it is this instance's turn and nobody else is at it."""
        if self._clock.monotonic() < self._call_after:
            if seen.value.paged_at:
                return None
            raise Unavailable(self._unheard, hint="call them by hand")  # for the warnings, until somebody was reached
        live, vetoed = self._of(seen.value, await self._plans(), coordination.authority.value)
        if not self._wants_plan(live, vetoed) and not self._wants_page(seen.value, live):
            return None
        coordinator, key = self._outside.coordinator, self._keys.caller(seen.value.id)
        lease = await coordinator.grant(CALL_SECONDS)
        try:
            taken = await coordinator.txn([Compare.absent(key)], [Put(key, self._who.encode(), lease.id)])
            if not taken.succeeded:
                return None
            async with asyncio.timeout(CALL_SECONDS):
                return await self._call(seen.item.key, coordination)
        except TimeoutError:
            self._call_after = self._clock.monotonic() + RETRY_SECONDS
            self._unheard = f"people could not be told of {seen.value.id} within {CALL_SECONDS} s"
            raise Unavailable(self._unheard, hint="call them by hand") from None
        finally:
            try:
                await coordinator.revoke(lease.id)
            except Unavailable:
                pass  # it expires by itself, and then another one may try

    async def _call(self, key: str, coordination: Coordination) -> str | None:
        """With the caller key in hand: looks again, proposes, pages, writes down what was done."""
        seen = await read(self._outside.coordinator, key, Incident)
        if seen is None or seen.value.closed_at:
            return None
        incident = seen.value
        live, vetoed = self._of(incident, await self._plans(), coordination.authority.value)
        if self._wants_plan(live, vetoed):
            self._propose_after = self._clock.monotonic() + PROPOSE_SECONDS
            live = await self._proposal(incident.region, coordination)
        told = live.plan.id if live is not None else ""
        if told and incident.plan != told:
            incident = await self._note(key, lambda now: replace(now, plan=told)) or incident
        if not self._wants_page(incident, live):
            return None
        advice = self._advice(live, vetoed)
        await self._page(incident, advice)
        at = self._clock.wall()
        await self._note(key, lambda now: replace(now, paged_at=at, paged_plan=told, paged_by=self._who))
        return f"people were told of incident {incident.id}: {advice}"

    def _of(
        self, incident: Incident, plans: Sequence[Seen[PlanRecord]], authority: Authority
    ) -> tuple[PlanRecord | None, PlanRecord | None]:
        """The plan away from the silent region that may still run (the newest), and one that people said no to."""
        about = [
            seen.value
            for seen in plans
            if seen.value.plan.kind is PlanKind.FAILOVER and seen.value.plan.source == incident.region
        ]
        live = [record for record in about if not record.ended and not is_overtaken(record, authority)]
        vetoed = [
            record
            for record in about
            if record.state in (State.REFUSED, State.ABORTED) and record.plan.created_at >= incident.opened_at
        ]
        return (live[-1] if live else None), (vetoed[-1] if vetoed else None)

    def _wants_plan(self, live: PlanRecord | None, vetoed: PlanRecord | None) -> bool:
        """People who refused or aborted a plan are at work; a plan that expired or became void is replaced."""
        due = self._clock.monotonic() >= self._propose_after
        return self._policy.auto_propose and live is None and vetoed is None and due

    def _wants_page(self, incident: Incident, live: PlanRecord | None) -> bool:
        if not incident.paged_at:
            return True
        if live is None or live.plan.id == incident.paged_plan:
            return False
        return not incident.paged_plan or self._clock.wall() - incident.paged_at >= REPEAT_SECONDS

    async def _note(self, key: str, change: Callable[[Incident], Incident]) -> Incident | None:
        """Writes a change of the incident on what it is now; None when it is gone. Raises Unavailable."""
        for _ in range(WRITE_ATTEMPTS):
            seen = await read(self._outside.coordinator, key, Incident)
            if seen is None:
                return None
            changed = change(seen.value)
            written = await self._outside.coordinator.txn([Compare.modified(key, seen.revision)], [Put(key, encode(changed))])
            if written.succeeded:
                return changed
        raise Unavailable(f"{key} changed {WRITE_ATTEMPTS} times while it was written", hint="trying again")

    # ---------------------------------------------------------------------------------------------------- proposing

    async def _proposal(self, silent: str, seen: Coordination) -> PlanRecord | None:
        """A plan for the region that would lose least. None: there is none now, for the reason in ``_why_no_plan``."""
        alive = {member.region for member in seen.members} - {silent}
        self._why_no_plan = "no other region has both a live controller and a store that answers"
        try:
            heads = await read_heads(self._outside, self._outside.streams[0])
        except DrError as error:
            self._why_no_plan = error.message
            return None
        for target in self._preferred(alive, heads):
            request = PlanRequest("failover", target, f"controller/{self._instance}", f"{silent} is silent")
            try:
                return (await self._propose(request)).value
            except DrError as error:
                self._why_no_plan = f"to {target}: {error.message}"
        return None

    def _preferred(self, alive: set[str], heads: dict[str, Head | Unknown]) -> Sequence[str]:
        reach = {region: head.seq for region, head in heads.items() if isinstance(head, Head) and region in alive}
        return sorted(reach, key=lambda region: (-reach[region], self._policy.priorities.get(region, 0), region))

    def _advice(self, live: PlanRecord | None, vetoed: PlanRecord | None) -> str:
        if live is not None:
            plan, loss = live.plan, live.plan.evidence.loss
            unknown = " plus unknown" if loss.records_unknown else ""
            return (
                f"Proposed plan {plan.id}: failover to {plan.target}; "
                f"at most {loss.seconds:.1f} s and {loss.records} reported records{unknown} would be lost. "
                f"Look: drctl plan show {plan.id}"
            )
        why = self._why_no_plan or "it is being looked for"
        if not self._policy.auto_propose:
            why = "automatic proposals are switched off"
        elif vetoed is not None:
            why = f"plan {vetoed.plan.id} is {vetoed.state.value}: {vetoed.reason}"
        return f"No plan is proposed: {why}. Look: drctl status"

    async def _page(self, incident: Incident, advice: str) -> None:
        """Raises Unavailable when nobody was reached, after writing that down once: the next attempt comes after a pause."""
        try:
            await self._pager.page(Page(incident.id, "critical", incident.title, advice, "region-failover"))
        except DrError as error:
            self._call_after = self._clock.monotonic() + RETRY_SECONDS
            self._unheard = f"people were not told of {incident.id}: {error.message}"
            if (incident.id, error.message) not in self._failed:
                self._failed.add((incident.id, error.message))
                await self._audit.append(
                    at=self._clock.wall(),
                    actor=self._who,
                    action="page-failed",
                    subject=incident.id,
                    detail={"why": error.message},
                )
            raise Unavailable(self._unheard, hint="call them by hand") from error

    # ------------------------------------------------------------------------------------------------------ looking

    async def incidents(self, include_closed: bool) -> tuple[Incident, ...]:
        """Newest first. Those that cannot be decoded are named in ``unreadable``. Raises Unavailable."""
        found = await read_readable(self._outside.coordinator, self._keys.incidents, Incident)
        self.unreadable = dict(found.unreadable)
        shown = [seen.value for seen in found.documents if include_closed or not seen.value.closed_at]
        return tuple(sorted(shown, key=lambda incident: -incident.opened_at))

    async def close_silent(self, plan: str = "") -> None:
        """Closes what a holder that serves again makes untrue. Raises Unavailable."""
        found = await read_readable(self._outside.coordinator, self._keys.incidents, Incident)
        at = self._clock.wall()
        for seen in found.documents:
            if seen.value.kind == SILENT and not seen.value.closed_at:
                await self._note(seen.item.key, lambda now: replace(now, closed_at=at, plan=plan or now.plan))


def _series(authority: Authority) -> str:
    """What the ids of all incidents of one authority begin with. Names of regions and plans contain no dot."""
    return f"{SILENT}.{authority.region}.{authority.plan or FOUNDING}."


def _number(key: str) -> int:
    """The last part of an incident's id: 1 for the first of an authority, 2 for the one after that was closed."""
    last = key.rsplit(".", 1)[-1]
    return int(last) if last.isascii() and last.isdecimal() and len(last) <= 9 else 0


def _serves(seen: Coordination) -> bool:
    """Whether somebody holds the group and, by what its members say, serves it (or drains it for a plan)."""
    serving = {(member.region, member.instance) for member in seen.members if member.role in (Role.ACTIVE, Role.DRAINING)}
    return any((holder.region, holder.instance) in serving for holder in seen.holders)
