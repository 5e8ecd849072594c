"""The second half of a promotion, under the new epoch: verify, resume, route, confirm, report.

Run by the instance that holds the new epoch, once the stream is open. Every step is idempotent, guarded by the holder key
and journaled before and after, so that the next holder goes on where a dead one stopped. The order matters: fence first,
route last.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from controller.domain.model import Head, Kind
from controller.domain.plan import canonical
from controller.domain.promotion import STEP_OF, Event, PlanRecord, State
from controller.errors import Conflict, DrError, FenceLost, Unavailable
from controller.ports import Answer, Clock, Coordinator, Page, Pager, Put, Resolver, Traffic
from controller.runtime.documents import Keys, Seen, encode, read
from controller.runtime.plans import PlanBook
from controller.runtime.service import JournalEntry
from controller.runtime.tenure import Tenure
from controller.stream.view import View

ROUTE_ATTEMPTS = 5
POLL_SECONDS = 0.25


class Fleet(Protocol):
    """The part of the fleet manager that a promotion needs."""

    async def resume_all(self, pace_per_second: float) -> Mapping[str, object]:
        """Gives every unfinished task of the group to a host of this region, at most ``pace_per_second`` at a time."""
        ...


@dataclass(frozen=True, slots=True)
class PromotionPolicy:
    """Settings of the second half."""

    resume_agents_per_second: float
    confirm_timeout_seconds: float
    name: str
    addresses: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Promotion:
    """Carries a plan that is past ``catch-up`` to its end, one step per call."""

    tenure: Tenure
    coordinator: Coordinator
    keys: Keys
    clock: Clock
    book: PlanBook
    traffic: Traffic
    resolver: Resolver
    pager: Pager
    view: View
    fleet: Fleet
    home_head: Callable[[], Awaitable[Head]]
    policy: PromotionPolicy
    instance: str
    close_incidents: Callable[[str], Awaitable[None]]
    changes: dict[str, str] = field(default_factory=dict)
    """plan → id of the DNS change that this instance made, to ask whether it is in sync."""

    async def step(self, seen: Seen[PlanRecord]) -> str:
        """Does the step that the plan's state asks for and moves it on. Raises Unavailable to be called again later,
        FenceLost when somebody newer exists."""
        act, event = {
            State.VERIFYING: (self._verify, Event.VERIFIED),
            State.RESUMING: (self._resume, Event.RESUMED),
            State.ROUTING: (self._route, Event.ROUTED),
            State.CONFIRMING: (self._confirm, Event.CONFIRMED),
            State.REPORTING: (self._report, Event.REPORTED),
        }[seen.value.state]
        name = STEP_OF[seen.value.state]
        started = await self._begin(seen.value, name)
        sentence, data = await act(seen.value)
        if not self.tenure.may_act():
            raise FenceLost(f"the right to act ended in step {name}")
        entry = replace(started, finished_at=self.clock.wall(), sentence=sentence, data=data)
        await self.book.transition(
            seen,
            event,
            sentence,
            compare=[self.tenure.guard],
            also=[Put(self.keys.journal(entry.plan, name), encode(entry))],
            change=lambda record: replace(record, epoch=self.tenure.fence.epoch),
        )
        return f"plan {seen.value.plan.id}: {name}: {sentence}"

    async def _begin(self, record: PlanRecord, step: str) -> JournalEntry:
        """The journal entry of a step that begins, or that a dead predecessor began: its start stays."""
        found = await read(self.coordinator, self.keys.journal(record.plan.id, step), JournalEntry)
        started_at = found.value.started_at if found is not None else self.clock.wall()
        entry = JournalEntry(record.plan.id, step, started_at, 0.0, self.instance, self.tenure.fence.epoch, "running")
        await self.book.note(record.plan.id, entry, [self.tenure.guard])
        return entry

    # ------------------------------------------------------------------------------------------------------- steps

    async def _verify(self, record: PlanRecord) -> tuple[str, Mapping[str, object]]:
        """The warm copy is the history that was opened, and every agent's newest checkpoint decodes from it."""
        head = await self.home_head()
        seq, chain = self.view.position(head.stream)
        if seq < head.seq or self.view.chain_at(head.stream, head.seq) != head.chain:
            raise Unavailable(f"the view is at segment {seq}, the store at {head.seq}", hint="it catches up by itself")
        agents = [agent for agent in self.view.agents() if agent.latest_kind not in (Kind.CANARY, Kind.OPENING)]
        missing = [agent.agent for agent in agents if agent.latest_id and self.view.restorable(agent.agent) is None]
        checked = len(agents) - len(missing)
        sentence = f"{checked} agents restorable up to segment {head.seq}"
        if missing:
            sentence += f"; {len(missing)} have no checkpoint yet"
        return sentence, {"agents": len(agents), "restorable": checked, "seq": head.seq, "chain": chain}

    async def _resume(self, record: PlanRecord) -> tuple[str, Mapping[str, object]]:
        summary = await self.fleet.resume_all(self.policy.resume_agents_per_second)
        return f"{summary.get('assigned', 0)} agents assigned, {summary.get('held', 0)} held", summary

    async def _route(self, record: PlanRecord) -> tuple[str, Mapping[str, object]]:
        """Compare-and-set. A smaller epoch in the zone: try again on what is there; a greater one: stop, we are stale."""
        fence, wanted = self.tenure.fence, record.plan.weights
        for _ in range(ROUTE_ATTEMPTS):
            zone = await self.traffic.read()
            if zone.epoch > fence.epoch:
                raise FenceLost(f"the zone knows epoch {zone.epoch}, ours is {fence.epoch}", epoch=zone.epoch)
            try:
                change = await self.traffic.change(fence, zone, wanted)
            except Conflict:
                continue
            self.changes[record.plan.id] = change
            return f"weights {_weights(wanted)}, zone epoch {fence.epoch}", {"before": dict(zone.weights), "change": change}
        raise Unavailable(
            f"the zone changed {ROUTE_ATTEMPTS} times between read and write", hint="find out who else changes these records"
        )

    async def _confirm(self, record: PlanRecord) -> tuple[str, Mapping[str, object]]:
        """Seen from outside: every configured server gives the target's addresses and our epoch. Never only the API."""
        if record.plan.id not in self.changes:
            # A predecessor routed, under an epoch below ours: bring the zone up to ours first, or it is never confirmed.
            await self._route(record)
        target = frozenset(self.policy.addresses[record.plan.target])
        deadline = self.clock.monotonic() + self.policy.confirm_timeout_seconds
        while True:
            change = self.changes.get(record.plan.id)
            synced = change is None or await self.traffic.in_sync(change)
            addresses = await self.resolver.ask(self.policy.name, "A")
            epochs = await self.resolver.ask(f"_dr-epoch.{self.policy.name}", "TXT")
            wrong = [_why(answer, target) for answer in addresses if not answer.values or not target.issuperset(answer.values)]
            wrong += [_why(answer, {str(self.tenure.fence.epoch)}) for answer in epochs if not self._raised(answer)]
            if synced and addresses and epochs and not wrong:
                return f"{len(addresses)} name servers answer with {record.plan.target}", {
                    "servers": [a.server for a in addresses]
                }
            if self.clock.monotonic() > deadline:
                raise Unavailable(
                    "not confirmed from outside yet: " + ("; ".join(wrong) or "the change is pending"),
                    hint="the promotion goes on asking; look at the name servers",
                )
            await self.clock.sleep(POLL_SECONDS)

    def _raised(self, answer: Answer) -> bool:
        return any(value.strip().isdigit() and int(value) >= self.tenure.fence.epoch for value in answer.values)

    async def _report(self, record: PlanRecord) -> tuple[str, Mapping[str, object]]:
        """RTO by phase and the loss, from the journal; people are told."""
        journal = {entry.step: entry for entry in await self.book.journal(record.plan.id)}
        phases = {step: round(entry.finished_at - entry.started_at, 3) for step, entry in journal.items() if entry.finished_at}
        begun = journal["check"].started_at if "check" in journal else record.authorized_at
        rto_seconds = self.clock.wall() - begun
        loss = record.final_loss
        data: dict[str, object] = {
            "rto_seconds": round(rto_seconds, 3),
            "phases_seconds": phases,
            "promised_loss": canonical(record.plan.evidence.loss),
            "final_loss": canonical(loss) if loss else None,
            "approvers": list(record.approvers),
            "epoch": self.tenure.fence.epoch,
        }
        sentence = f"{record.plan.target} is active in epoch {self.tenure.fence.epoch}, {rto_seconds:.1f} s after the start"
        await self.close_incidents(record.plan.id)
        try:
            await self.pager.page(
                Page(f"plan-{record.plan.id}", "info", f"{record.plan.kind.value} done", sentence, "region-failover")
            )
        except DrError as error:
            data["page"] = f"nobody was reached: {error.message}"
        return sentence, data


def _weights(weights: Mapping[str, int]) -> str:
    return ", ".join(f"{region} {weight}" for region, weight in sorted(weights.items()))


def _why(answer: Answer, wanted: frozenset[str] | set[str]) -> str:
    said = answer.error or ", ".join(answer.values) or "nothing"
    return f"{answer.server} says {said}, not {', '.join(sorted(wanted))}"
