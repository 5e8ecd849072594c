"""Notices that a region has gone silent, tells people, and proposes what to do. It never does it.

An incident is created by one transaction, so that of all controllers that notice, one pages and proposes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from controller.domain.model import Head, Unknown
from controller.domain.promotion import PlanRecord
from controller.errors import DrError, Refused
from controller.ports import Clock, Compare, Page, Pager, Put
from controller.runtime.audit import Audit
from controller.runtime.documents import Keys, Seen, encode, read_all
from controller.runtime.evidence import Coordination, Outside, read_heads
from controller.runtime.service import Incident, PlanRequest

SILENT = "region-silent"
Propose = Callable[[PlanRequest], Awaitable[Seen[PlanRecord]]]


@dataclass(frozen=True, slots=True)
class WatchPolicy:
    """``notice_seconds``: how long nobody may hold the group before people are told. ``priorities``: lower is preferred."""

    notice_seconds: float
    auto_propose: bool
    priorities: dict[str, int]


class Watch:
    """Incidents of one group."""

    def __init__(
        self, outside: Outside, audit: Audit, pager: Pager, propose: Propose, policy: WatchPolicy, region: str, instance: str
    ) -> None:
        self._outside = outside
        self._audit = audit
        self._pager = pager
        self._propose = propose
        self._policy = policy
        self._region = region
        self._instance = instance
        self._silent_since: float | None = None

    @property
    def _clock(self) -> Clock:
        return self._outside.clock

    @property
    def _keys(self) -> Keys:
        return self._outside.keys

    async def look(self, seen: Coordination) -> str | None:
        """Called at every tick of a standby. Returns a sentence when it did something."""
        if seen.holders or seen.authority.value.barrier is not None or seen.authority.value.region == self._region:
            self._silent_since = None
            return None
        now = self._clock.monotonic()
        if self._silent_since is None:
            self._silent_since = now
        if now - self._silent_since < self._policy.notice_seconds:
            return None
        return await self._open(seen)

    async def _open(self, seen: Coordination) -> str | None:
        authority = seen.authority.value
        incident = Incident(
            id=f"{SILENT}-{authority.epoch}",
            kind=SILENT,
            title=f"{authority.region} is silent: nobody holds the group {self._keys.group}",
            detail=f"epoch {authority.epoch} ended and no controller of {authority.region} took over",
            opened_at=self._clock.wall(),
            by=f"{self._region}/{self._instance}",
        )
        key = self._keys.incident(incident.id)
        opened = await self._audit.commit(
            [Compare.absent(key)],
            [Put(key, encode(incident))],
            at=incident.opened_at,
            actor=incident.by,
            action="incident",
            subject=incident.id,
            detail={"title": incident.title},
        )
        if not opened.succeeded:
            return None
        proposal = await self._proposal(authority.region, seen)
        if isinstance(proposal, Seen):
            plan = proposal.value.plan
            incident = replace(incident, plan=plan.id)
            await self._outside.coordinator.txn([], [Put(key, encode(incident))])
            loss = plan.evidence.loss
            unknown = " plus unknown" if loss.records_unknown else ""
            advice = (
                f"Proposed plan {plan.id}: failover to {plan.target}; "
                f"at most {loss.seconds:.1f} s and {loss.records} reported records{unknown} would be lost. "
                f"Look: drctl plan show {plan.id}"
            )
        else:
            advice = f"No plan is proposed: {proposal}. Look: drctl status"
        await self._page(incident, advice)
        return f"incident {incident.id} opened; {advice}"

    async def _proposal(self, silent: str, seen: Coordination) -> Seen[PlanRecord] | str:
        """The plan for the region that would lose least, or why there is none."""
        if not self._policy.auto_propose:
            return "automatic proposals are switched off"
        alive = {member.region for member in seen.members} - {silent}
        heads = await read_heads(self._outside, self._outside.streams[0])
        order = self._preferred(alive, heads)
        if not order:
            return "no other region has both a live controller and a store that answers"
        request = PlanRequest("failover", order[0], f"controller/{self._instance}", f"{silent} is silent")
        try:
            return await self._propose(request)
        except Refused as error:
            return error.message

    def _preferred(self, alive: set[str], heads: dict[str, Head | Unknown]) -> Sequence[str]:
        reach = {region: head.seq for region, head in heads.items() if isinstance(head, Head) and region in alive}
        return sorted(reach, key=lambda region: (-reach[region], self._policy.priorities.get(region, 0), region))

    async def _page(self, incident: Incident, advice: str) -> None:
        try:
            await self._pager.page(Page(incident.id, "critical", incident.title, advice, "region-failover"))
        except DrError as error:
            await self._audit.append(
                at=self._clock.wall(),
                actor=incident.by,
                action="page-failed",
                subject=incident.id,
                detail={"why": error.message},
            )

    async def incidents(self, include_closed: bool) -> tuple[Incident, ...]:
        """Newest first."""
        found = [seen.value for seen in await read_all(self._outside.coordinator, self._keys.incidents, Incident)]
        shown = [incident for incident in found if include_closed or not incident.closed_at]
        return tuple(sorted(shown, key=lambda incident: -incident.opened_at))

    async def close_silent(self, plan: str = "") -> None:
        """Closes what a holder that serves again makes untrue."""
        for seen in await read_all(self._outside.coordinator, self._keys.incidents, Incident):
            incident = seen.value
            if incident.kind == SILENT and not incident.closed_at:
                closed = replace(incident, closed_at=self._clock.wall(), plan=plan or incident.plan)
                await self._outside.coordinator.txn(
                    [Compare.modified(seen.item.key, seen.revision)], [Put(seen.item.key, encode(closed))]
                )
