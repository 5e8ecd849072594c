"""The second half of a promotion, under the new epoch: verify, resume, route, confirm, report.

Run by the instance that holds the new epoch, once the stream is open. Every step is idempotent, guarded by the holder key
and journaled before and after, so that the next holder goes on where a dead one stopped. The order matters: fence first,
route last.

What stops a step (a record in the zone that is not ours, a name server that does not answer) never ends the tenure: the region
serves all the while. People are told, once for each reason, and the step is tried again. Only ``FenceLost`` is passed on to
end it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from controller.domain.model import Head, Kind
from controller.domain.plan import Plan, canonical
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
PATIENCE_SECONDS = 30.0
"""How long a step may be kept from going on by what usually passes (a store or a zone that does not answer), unpaged."""
PAGES_AT_MOST = 50
"""Different reasons that people are told about in one tenure: a reason with a number in it must not page for ever."""
TTL_AT_MOST_SECONDS = 3600
"""Longest time that a stale answer of a name server is waited for, whatever TTL it claims."""
EPOCH_DIGITS = 20
DENIALS = ("NXDOMAIN", "NODATA")
"""Errors by which a server does answer: that the name, or the record, does not exist. All others say nothing."""


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
    home_head: Callable[[str], Awaitable[Head]]
    streams: tuple[str, ...]
    policy: PromotionPolicy
    instance: str
    close_incidents: Callable[[str], Awaitable[None]]
    changes: dict[str, str] = field(default_factory=dict)
    """plan → id of the DNS change that this instance made, to ask whether it is in sync."""
    since: dict[str, float] = field(default_factory=dict)
    """plan and step → our monotonic time at which this instance first tried it."""
    heads: dict[str, Head] = field(default_factory=dict)
    """Plan and stream → the home store's head when this instance first verified it: other streams' holders go on writing."""
    told: set[str] = field(default_factory=set)
    """What people were told of."""

    async def step(self, seen: Seen[PlanRecord]) -> str:
        """Does the step that the plan's state asks for and moves it on.

        Raises FenceLost when somebody newer exists. Any other DrError: call again later; people were told of it, if it is none
        that passes by itself or if it has lasted.
        """
        plan, name = seen.value.plan.id, STEP_OF[seen.value.state]
        since = self.since.setdefault(f"{plan}/{name}", self.clock.monotonic())
        try:
            return await self._step(seen)
        except FenceLost:
            raise
        except DrError as error:
            lasting = self.clock.monotonic() - since > PATIENCE_SECONDS
            if not isinstance(error, (Unavailable, Conflict)):
                await self.page_once(f"plan {plan}, step {name}: {error.message}. {error.hint}")
            elif lasting and seen.value.state is not State.CONFIRMING:  # that step has a patience of its own
                long = f"plan {plan}: step {name} has not gone on for {PATIENCE_SECONDS:.0f} s"
                await self.page_once(long, f"{error.message}. {error.hint}")
            raise

    async def page_once(self, text: str, more: str = "") -> None:
        """Tells people, once per ``text`` (``more`` is added to it), unless something that they were told contains it. When
        nobody is reached, the next call tries again."""
        if len(self.told) >= PAGES_AT_MOST or any(text in known for known in self.told):
            return
        title = f"the promotion of {self.tenure.fence.region} waits"
        body = f"{text}: {more}" if more else text
        try:
            await self.pager.page(Page(f"promotion-{self.tenure.fence.epoch}", "critical", title, body, "region-failover"))
        except DrError:
            return
        self.told.add(text)

    async def _step(self, seen: Seen[PlanRecord]) -> str:
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
        heads = [await self._verified_head(record.plan.id, stream) for stream in self.streams]
        agents = [agent for agent in self.view.agents() if agent.latest_kind not in (Kind.CANARY, Kind.OPENING)]
        missing = [agent.agent for agent in agents if agent.latest_id and self.view.restorable(agent.agent) is None]
        checked = len(agents) - len(missing)
        reached = f"{heads[0].seq}" if len(heads) == 1 else ", ".join(f"{head.seq} ({head.stream})" for head in heads)
        sentence = f"{checked} agents restorable up to segment {reached}"
        if missing:
            sentence += f"; {len(missing)} have no checkpoint yet"
        data: dict[str, object] = {"agents": len(agents), "restorable": checked, "seq": heads[0].seq, "chain": heads[0].chain}
        if len(heads) > 1:
            data["streams"] = {head.stream: {"seq": head.seq, "chain": head.chain} for head in heads}
        return sentence, data

    async def _verified_head(self, plan: str, stream: str) -> Head:
        """The home store's head of one stream, once the view has it. Raises Unavailable until then."""
        head = self.heads.get(f"{plan}/{stream}")
        if head is None:
            head = self.heads[f"{plan}/{stream}"] = await self.home_head(stream)
        seq, _ = self.view.position(stream)
        if seq < head.seq or self.view.chain_at(stream, head.seq) != head.chain:
            if seq >= head.seq:
                del self.heads[f"{plan}/{stream}"]  # another history: look at the store anew
            raise Unavailable(
                f"the view of {stream} is at segment {seq}, the store at {head.seq}", hint="it catches up by itself"
            )
        return head

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
        """Seen from outside: the configured servers give the target's addresses and our epoch. Never only the API.

        - All do, and the provider says that its own servers have the change: confirmed.
        - A server gives a *wrong* answer (another address, a smaller epoch, "no such name"): never confirmed. Old answers may
          live in caches for a TTL, so people are told after ``confirm_timeout_seconds`` and the TTL of those answers, and the
          asking goes on.
        - A server says *nothing* (no answer in time, a failure of its own): it may be as dead as the region that was left.
          After ``confirm_timeout_seconds`` the step ends without it, when at least one server confirms, none is wrong, and the
          provider has the change or cannot be asked; the sentence and a page name what is unconfirmed.

        The time counts from this instance's first look. Raises Unavailable while there is something to wait for.
        """
        plan = record.plan
        began = self.since.setdefault(f"{plan.id}/confirm", self.clock.monotonic())
        while True:
            if plan.id not in self.changes:
                # A predecessor routed, under an epoch below ours: bring the zone up to ours first, or it is never confirmed.
                try:
                    await self._route(record)
                except (Unavailable, Conflict) as error:
                    if self.clock.monotonic() - began > self.policy.confirm_timeout_seconds:
                        await self.page_once(f"plan {plan.id} is not confirmed from outside", error.message)
                    raise
            seen = await self._look(plan.id, frozenset(self.policy.addresses[plan.target]))
            if seen.confirmed and not seen.wrong and not seen.silent and seen.synced is True:
                return f"{len(seen.confirmed)} name servers answer with {plan.target}", {"servers": list(seen.confirmed)}
            waited = self.clock.monotonic() - began - self.policy.confirm_timeout_seconds
            if waited > 0:
                if seen.confirmed and not seen.wrong and seen.synced is not False:
                    return await self._without_the_silent(plan, seen)
                if waited > seen.wrong_ttl_seconds:
                    await self.page_once(f"plan {plan.id} is not confirmed from outside", seen.sentence)
                raise Unavailable(
                    f"not confirmed from outside yet: {seen.sentence}",
                    hint="the promotion goes on asking; look at the name servers",
                )
            await self.clock.sleep(POLL_SECONDS)

    async def _look(self, plan: str, target: frozenset[str]) -> _SeenOutside:
        """One question to everybody. The provider's word is None when it cannot be had."""
        synced: bool | None
        try:
            synced = await self.traffic.in_sync(self.changes[plan])
        except FenceLost:
            raise
        except DrError:
            synced = None
        addresses = await self.resolver.ask(self.policy.name, "A")
        epochs = await self.resolver.ask(f"_dr-epoch.{self.policy.name}", "TXT")
        good: dict[str, bool] = {}
        wrong: list[str] = []
        silent: dict[str, str] = {}
        ttl_seconds = 0
        right = [(answer, target.issuperset(answer.values), target) for answer in addresses]
        right += [(answer, self._raised(answer), frozenset({str(self.tenure.fence.epoch)})) for answer in epochs]
        for answer, as_wanted, wanted in right:
            if answer.values and as_wanted:
                good.setdefault(answer.server, True)
                continue
            good[answer.server] = False
            if answer.values or answer.error in DENIALS:
                wrong.append(_why(answer, wanted))
                ttl_seconds = max(ttl_seconds, min(answer.ttl_seconds, TTL_AT_MOST_SECONDS))
            else:
                silent[answer.server] = answer.error or "nothing"
        asked_both = {answer.server for answer in addresses} & {answer.server for answer in epochs}
        confirmed = tuple(sorted(server for server, fine in good.items() if fine and server in asked_both))
        return _SeenOutside(confirmed, tuple(wrong), silent, synced, ttl_seconds)

    async def _without_the_silent(self, plan: Plan, seen: _SeenOutside) -> tuple[str, Mapping[str, object]]:
        """The step's end without the servers that say nothing, or without the provider's word."""
        sentence = f"{len(seen.confirmed)} name servers answer with {plan.target}; {seen.sentence}"
        await self.page_once(f"plan {plan.id}: {sentence}")
        return sentence, {"servers": list(seen.confirmed), "unconfirmed": dict(seen.silent), "synced": seen.synced is True}

    def _raised(self, answer: Answer) -> bool:
        return any(_epoch(value) >= self.tenure.fence.epoch for value in answer.values)

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


@dataclass(frozen=True, slots=True)
class _SeenOutside:
    """What the name servers said. ``confirmed``: those that give what we want in both answers."""

    confirmed: tuple[str, ...]
    wrong: tuple[str, ...]
    silent: Mapping[str, str]
    """Server → what came instead of an answer."""
    synced: bool | None
    """Whether the provider's own servers have the change; None: it could not be asked."""
    wrong_ttl_seconds: int

    @property
    def sentence(self) -> str:
        """What is missing."""
        parts = list(self.wrong)
        if self.silent:
            parts.append("unconfirmed: " + ", ".join(f"{server} ({why})" for server, why in sorted(self.silent.items())))
        if self.synced is None:
            parts.append("whether the provider's own servers have the change is unknown: it could not be asked")
        elif not self.synced:
            parts.append("the change is pending at the provider")
        return "; ".join(parts) or "no name server was asked"


def _epoch(text: str) -> int:
    """The epoch in a TXT record; -1 for what is none. Bounded: anybody may have written it."""
    digits = text.strip()
    good = digits.isascii() and digits.isdecimal() and len(digits) <= EPOCH_DIGITS
    return int(digits) if good else -1


def _weights(weights: Mapping[str, int]) -> str:
    return ", ".join(f"{region} {weight}" for region, weight in sorted(weights.items()))


def _why(answer: Answer, wanted: frozenset[str] | set[str]) -> str:
    said = answer.error or ", ".join(answer.values) or "nothing"
    return f"{answer.server} says {said}, not {', '.join(sorted(wanted))}"
