"""The steps ``fence`` and ``catch-up`` of a promotion, which all streams of a group take together.

Every stream's holder writes down how far it is (``progress/{plan}/{stream}``), under its own guard. The lead's holder moves the
plan on when the documents of all streams say so, and compares them in the same transaction:

    fence       every stream's stores are fenced, and the loss of each is known
    catch-up    the losses added up are within what people approved; only then does any stream open. Every stream is open

The loss that people are asked about is that of the group: records add up, seconds are the worst, exact only if all are. A
stream that is open keeps its loss, also when its holder dies and another one opens it anew before the plan has gone on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from controller.domain import lag
from controller.domain.plan import Loss, canonical
from controller.domain.promotion import Event, PlanRecord, Progress, State
from controller.errors import Conflict, FenceLost, Refused, Unavailable
from controller.ports import Clock, Compare, Coordinator, Put, Traffic
from controller.runtime.documents import Keys, Seen, encode, read
from controller.runtime.plans import PlanBook
from controller.runtime.service import JournalEntry
from controller.runtime.tenure import Tenure

BEFORE_OPEN = frozenset({State.FENCING, State.CATCHING_UP, State.HOLDING})
POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Together:
    """One stream's holder among the others."""

    coordinator: Coordinator
    keys: Keys
    clock: Clock
    traffic: Traffic
    book: PlanBook
    tenure: Tenure
    streams: Sequence[str]
    instance: str

    @property
    def leads(self) -> bool:
        """Whether this stream's holder moves the plan on."""
        return self.tenure.fence.stream == self.streams[0]

    async def mine(self, plan: str) -> Seen[Progress] | None:
        """What this stream's present or earlier holders wrote down."""
        return await read(self.coordinator, self.keys.progress(plan, self.tenure.fence.stream), Progress)

    async def all(self, plan: str) -> dict[str, Seen[Progress]]:
        """What is known of each stream."""
        found = {stream: await read(self.coordinator, self.keys.progress(plan, stream), Progress) for stream in self.streams}
        return {stream: seen for stream, seen in found.items() if seen is not None}

    async def note(self, known: Seen[Progress] | None, now: Progress) -> None:
        """Writes down how far this stream is. Raises Conflict when we hold it no more."""
        if known is not None and known.value == now:
            return
        key = self.keys.progress(now.plan, now.stream)
        compare = Compare.absent(key) if known is None else Compare.modified(key, known.revision)
        result = await self.coordinator.txn([self.tenure.guard, compare], [Put(key, encode(now))])
        if not result.succeeded:
            raise Conflict(f"the progress of {now.stream} is not ours to write any more", hint="step down")

    async def fenced(self, plan: Seen[PlanRecord]) -> Seen[PlanRecord]:
        """Step ``fence``. Returns the plan once it is past it; raises Unavailable while other streams are not fenced."""
        known = await self.all(plan.value.plan.id)
        missing = [stream for stream in self.streams if stream not in known]
        if missing:
            raise Unavailable(
                f"this stream is fenced; {', '.join(missing)} not yet", hint="every stream is fenced before any opens"
            )
        if not self.leads:
            raise Unavailable("this stream is fenced; the lead's holder moves the plan on", hint="it is doing so")
        record, epoch = plan.value, self.tenure.fence.epoch
        zone = await self._raise_zone()
        now = self.clock.wall()
        entry = JournalEntry(
            record.plan.id, "fence", record.authorized_at, now, self.instance, epoch, f"{_fences(known)}; {zone}"
        )
        catch_up = JournalEntry(record.plan.id, "catch-up", now, 0.0, self.instance, epoch, "choosing the longest history")
        return await self.book.transition(
            plan,
            Event.FENCED,
            entry.sentence,
            compare=[self.tenure.guard, *_unchanged(known)],
            also=[
                Put(self.keys.journal(entry.plan, "fence"), encode(entry)),
                Put(self.keys.journal(entry.plan, "catch-up"), encode(catch_up)),
            ],
            change=lambda after: replace(after, epoch=epoch),
        )

    async def _raise_zone(self) -> str:
        """Raises the TXT alone. A zone that does not answer delays nothing here: step ``route`` needs it and will wait."""
        fence = self.tenure.fence
        try:
            seen = await self.traffic.read()
            if seen.epoch > fence.epoch:
                raise FenceLost(f"the zone knows epoch {seen.epoch}, ours is {fence.epoch}", epoch=seen.epoch)
            await self.traffic.change(fence, seen, seen.weights)
        except (Unavailable, Conflict, Refused) as error:
            return f"the zone is not raised yet ({error.message})"
        return f"the zone is raised to {fence.epoch}"

    async def loss(self, plan: str) -> Loss:
        """The group's loss as it is known now. Raises Unavailable when a stream's is not known."""
        known = await self.all(plan)
        missing = [stream for stream in self.streams if stream not in known]
        if missing:
            raise Unavailable(f"the loss of {', '.join(missing)} is not known yet", hint="their holders write it down")
        return lag.combine([known[stream].value.loss for stream in self.streams])

    async def caught_up(self, plan: Seen[PlanRecord]) -> bool:
        """Ends step ``catch-up`` when every stream is open. The lead's holder calls this once its own is."""
        known = await self.all(plan.value.plan.id)
        progress = [known[stream].value for stream in self.streams if stream in known and known[stream].value.open]
        if len(progress) < len(self.streams):
            return False
        plan_id, epoch, now = plan.value.plan.id, self.tenure.fence.epoch, self.clock.wall()
        loss = lag.combine([found.loss for found in progress])
        started = await read(self.coordinator, self.keys.journal(plan_id, "catch-up"), JournalEntry)
        seqs = {found.stream: found.first_seq - 1 for found in progress}
        lengths = (
            f"{seqs[self.streams[0]]}" if len(seqs) == 1 else ", ".join(f"{seq} ({stream})" for stream, seq in seqs.items())
        )
        sentence = f"history of {lengths} segments; {_said(loss, plan.value.plan.kind.planned)}"
        data: dict[str, object] = {"seq": seqs[self.streams[0]], "loss": canonical(loss)}
        if len(seqs) > 1:
            data["streams"] = {found.stream: {"seq": seqs[found.stream], "loss": canonical(found.loss)} for found in progress}
        began = started.value.started_at if started else now
        entry = JournalEntry(plan_id, "catch-up", began, now, self.instance, epoch, sentence, data)
        await self.book.transition(
            plan,
            Event.CAUGHT_UP,
            sentence,
            compare=[self.tenure.guard, *_unchanged(known)],
            also=[Put(self.keys.journal(plan_id, "catch-up"), encode(entry))],
            change=lambda record: replace(record, final_loss=loss, epoch=epoch),
        )
        return True


def _unchanged(known: Mapping[str, Seen[Progress]]) -> list[Compare]:
    return [Compare.modified(seen.item.key, seen.revision) for seen in known.values()]


def _fences(known: Mapping[str, Seen[Progress]]) -> str:
    """Which epochs fence which stores; equal answers are said once."""
    parts: dict[str, list[str]] = {}
    for stream, seen in known.items():
        progress = seen.value
        text = f"fences {', '.join(progress.fenced)}" + (f"; not {', '.join(progress.unfenced)}" if progress.unfenced else "")
        parts.setdefault(text, []).append(f"{progress.epoch}" if len(known) == 1 else f"{progress.epoch} ({stream})")
    return "; ".join(f"epoch {', '.join(epochs)} {text}" for text, epochs in parts.items())


def _said(loss: Loss, planned: bool) -> str:
    if loss.exact:
        return "nothing acknowledged is lost" + (" (the old holder drained)" if planned else "")
    return f"at most {loss.seconds:.1f} s and {loss.records} reported records (plus unknown) are lost"
