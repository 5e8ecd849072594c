"""The region's part in plans until the authority moves: it gathers evidence, proposes, and runs what people approved.

From ``authorize`` on a plan is carried by the holders that it brings about (``opening``, ``leading``). Nothing here approves:
a plan goes on by its gate, which is asked anew at every step (``plans``, ``takeover``). Of several instances one claims it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from controller.domain.model import StreamReport
from controller.domain.plan import Evidence
from controller.domain.promotion import AFTER_AUTHORIZE, PlanRecord, State
from controller.errors import Corrupt, DrError
from controller.ports import Clock, Coordinator
from controller.runtime.documents import Keys, Seen, read_readable
from controller.runtime.evidence import Coordination, LocalKnowledge, Outside, gather
from controller.runtime.membership import Membership
from controller.runtime.plans import PlanBook
from controller.runtime.service import PlanRequest
from controller.runtime.sight import Sight
from controller.runtime.takeover import Takeover, TakeoverPolicy, is_overtaken, overtaken, sweep_barrier
from controller.stream.view import View


class Planning:
    """One per controller."""

    def __init__(
        self,
        *,
        coordinator: Coordinator,
        keys: Keys,
        clock: Clock,
        book: PlanBook,
        membership: Membership,
        outside: Outside,
        sight: Sight,
        view: View,
        streams: Sequence[str],
        region: str,
        instance: str,
        policy: TakeoverPolicy,
        tell: Callable[..., None],
    ) -> None:
        self._coordinator = coordinator
        self._keys = keys
        self._clock = clock
        self._book = book
        self._membership = membership
        self._outside = outside
        self._sight = sight
        self._view = view
        self._streams = tuple(streams)
        self._region = region
        self._tell = tell
        self._takeover = Takeover(coordinator, keys, clock, book, self._gather, policy, instance, self._streams)

    async def move_on(self) -> str | None:
        """Moves plans on. One that cannot go on (an unreadable document, a gate that closed again) does not keep the others
        waiting; but while one has begun nothing else begins."""
        problem: DrError | None = None
        try:
            swept = await sweep_barrier(self._coordinator, self._keys, self._book, self._clock.wall())
            if swept:
                return swept
        except Corrupt as error:
            problem = error
        for seen in sorted(await self._book.all(), key=lambda seen: seen.value.state is State.AWAITING_APPROVAL):
            try:
                sentence = await self._step(seen)
                if sentence is not None:
                    self._tell("plans", sentence)
                    if (await self._book.get(seen.value.plan.id)).value.state is not State.AWAITING_APPROVAL:
                        break
            except DrError as error:
                problem = problem or error
                if seen.value.state is not State.AWAITING_APPROVAL:
                    break
        if problem is not None:
            raise problem
        return None

    async def _step(self, seen: Seen[PlanRecord]) -> str | None:
        """One bounded thing for one plan that has not moved the authority yet, if it is ours to do."""
        record = seen.value
        if record.ended or record.state in AFTER_AUTHORIZE:
            return None
        swept = await self._takeover.sweep_guard(record.plan.id) if record.state is State.AUTHORIZING else None
        if swept is not None:
            return swept
        if self._sight.seen is not None and is_overtaken(record, self._sight.seen.authority.value):
            await overtaken(self._coordinator, self._keys, self._book, seen)
            return None
        expired = record.plan.expires_at <= self._clock.wall()
        wanted = record.plan.target == self._region and bool(record.execute_requested_by)
        if (wanted or expired) and await self._membership.claim(self._keys.executor(record.plan.id)):
            return await self._takeover.step(seen)
        return None

    async def _gather(self, record: PlanRecord) -> tuple[Evidence, Coordination]:
        knowledge, ended_by = await self._knowledge(), record.plan.evidence.right_ended_by
        if ended_by:
            # Nobody held when the plan was made, and it is void once somebody has (the epoch moves). An instance that started
            # later must not count the time until it looked as time in which the old holder could acknowledge.
            gone = {stream: min(ended_by, knowledge.holder_gone_at.get(stream, ended_by)) for stream in self._streams}
            knowledge = replace(knowledge, holder_gone_at=gone)
        return await gather(self._outside, record.plan.kind, record.plan.target, knowledge, plan=record.plan.id)

    async def _knowledge(self) -> LocalKnowledge:
        reports = await read_readable(self._coordinator, self._keys.reports, StreamReport)
        kept = {
            tail.agent: tail.last_id
            for report in reports.documents
            for tail in report.value.unreplicated
            if self._view.has(tail.agent, tail.last_id) is not None
        }
        return LocalKnowledge(self._view.agent_count(), self._sight.gone_at(), kept)

    async def propose(self, request: PlanRequest) -> Seen[PlanRecord]:
        kind = self._book.kind_of(request)
        evidence, _ = await gather(self._outside, kind, request.to, await self._knowledge())
        return await self._book.create(request, evidence)
