"""What one stream's holder takes: records, the checks before them, and the right that goes out with the answer.

It takes nothing before ``Opening`` is through (``writer`` is None until then), and never lends a right that is longer than the
holder's own. Whether this instance holds the stream at all, and where records go that it does not hold, is ``routing``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from controller.domain.fleet import check_attempt, check_overtaken
from controller.domain.model import Ack, Frame, IngestAnswer, Kind, Record
from controller.domain.sharing import LEAD
from controller.errors import DrError, OutcomeUnknown, Refused, Unavailable
from controller.runtime.fleet import RIGHT_MARGIN_SECONDS, check_kind
from controller.runtime.ingest_gate import IngestGate
from controller.runtime.policies import ingest_limits
from controller.runtime.shell import Shell
from controller.runtime.tenure import Tenure
from controller.stream.live import BY, SEEN
from controller.stream.writer import StreamWriter


class Intake:
    """Of one tenure. ``writer``: set when the stream was opened."""

    def __init__(self, shell: Shell, tenure: Tenure) -> None:
        self._shell = shell
        self._tenure = tenure
        self._stream = tenure.fence.stream
        self._lead = self._stream == LEAD
        self.writer: StreamWriter | None = None
        self._gate = IngestGate(ingest_limits(shell.settings), shell.ports.clock)
        self._rights_end = -math.inf
        self._attempts: dict[str, int] = {}

    def rights_end(self) -> float:
        """Monotonic time at which the last right that was lent under this tenure has certainly run out (-inf: none was)."""
        return max(self._rights_end, self._shell.fleet.rights_end()) if self._lead else self._rights_end

    async def submit(self, frames: Sequence[Frame]) -> list[Ack]:
        """Records of the controller itself, and agents' records that passed their checks."""
        if self.writer is None:
            raise Unavailable("the epoch is not open yet", hint="try again in a moment")
        acks = await self.writer.submit(frames)
        written = {(ack.agent, ack.id) for ack in acks if ack.status == "acknowledged"}
        self._shell.fleet.observe(f.record for f in frames if (f.record.agent, f.record.id) in written)
        return acks

    async def ingest(self, frames: Sequence[Frame]) -> IngestAnswer:
        """Agents' records. One with a stale attempt or a reserved kind fails alone, the others go on."""
        refused: dict[int, Ack] = {}
        late = self._gate.check(frames)
        for number, one in enumerate(frames):
            problem = late.get(number) or self._problem(one.record)
            if problem is not None:
                refused[number] = Ack(one.record.agent, one.record.id, "failed", error=problem.to_dict())
        accepted = [one for number, one in enumerate(frames) if number not in refused] if refused else frames
        answered = iter(await self.submit(accepted) if accepted else ())
        acks = tuple(refused[number] if number in refused else next(answered) for number in range(len(frames)))
        remaining = self._tenure.remaining_seconds()
        if remaining <= 0:
            raise OutcomeUnknown(
                "the right to act ended before this could be acknowledged", hint="send the same records to another controller"
            )
        return IngestAnswer(
            self._tenure.fence.epoch,
            self._lend(accepted, remaining),
            acks,
            epochs={self._stream: self._tenure.fence.epoch},
            holder_seconds=remaining,
        )

    def _lend(self, accepted: Sequence[Frame], remaining: float) -> float:
        """The right that goes out with an answer: never longer than ours, and so over before another region may act.

        A host that runs agents by assignment is lent its right by the lead's holder only: that one decides when an agent goes
        to another host, and must know until when the host may act. Every other holder lends such a host nothing (0).
        """
        fleet, agents = self._shell.fleet, {one.record.agent for one in accepted}
        if self._lead and fleet.active:
            # Only records that passed their checks are a sign of life of the agent's host; a stale one is not.
            fleet.granted(agents, remaining)
            return remaining
        if any(one.record.attempt > 0 for one in accepted):
            return 0.0
        until = self._shell.ports.clock.monotonic() + remaining + RIGHT_MARGIN_SECONDS
        self._rights_end = max(self._rights_end, until)
        return remaining

    def _problem(self, record: Record) -> DrError | None:
        try:
            if self._lead and len(self._shell.followers) == 1:
                self._shell.fleet.check_attempt(record.agent, record.attempt, record.kind)
            else:
                check_kind(record.kind)
                check_attempt(record.agent, record.attempt, self._attempt(record.agent))
            if SEEN in record.meta:
                self._check_overtaken(record)
        except DrError as error:
            return error
        return None

    def _check_overtaken(self, record: Record) -> None:
        """A repetition is none: it was taken before somebody else went on. Raises StaleAttempt."""
        said, view = record.meta[SEEN][:20], self._shell.view
        seen_epoch = int(said) if said.isascii() and said.isdecimal() else 0
        if seen_epoch >= self._tenure.fence.epoch or view.has(record.agent, record.id) is not None:
            return
        newest = view.newest(record.agent)
        if newest is not None:
            epoch = view.epoch_at(self._stream, newest[1]) or 0  # 0: carried forward from before what is kept: old
            check_overtaken(record.agent, record.meta.get(BY, ""), seen_epoch, newest[0].meta.get(BY, ""), epoch)

    def _attempt(self, agent: str) -> int:
        """The newest attempt of an agent of this stream. The view has all that was acknowledged before this epoch; what came
        since went through ``take_for_the_lead``."""
        if agent not in self._attempts:
            given = self._shell.view.latest_record(agent, Kind.ASSIGNMENT)
            self._attempts[agent] = given.attempt if given is not None else 0
        return self._attempts[agent]

    async def take_for_the_lead(self, frames: Sequence[Frame]) -> list[Ack]:
        """Tasks and assignments from the lead's holder, for agents of this stream. An assignment counts from the moment at
        which it is taken: records under an older attempt are refused while it is being written. Raises Unavailable."""
        refused: dict[int, Ack] = {}
        for number, one in enumerate(frames):
            record = one.record
            if record.kind != Kind.ASSIGNMENT:
                continue
            known = self._attempt(record.agent)
            if record.attempt <= known:
                error = Refused(
                    f"agent {record.agent!a}: attempt {record.attempt} is not greater than {known}, which was given out before",
                    hint="read the assignments anew, then give out a greater one",
                )
                refused[number] = Ack(record.agent, record.id, "failed", error=error.to_dict())
            else:
                self._attempts[record.agent] = record.attempt
        taken = [one for number, one in enumerate(frames) if number not in refused]
        acks = iter(await self.submit(taken) if taken else ())
        return [refused[number] if number in refused else next(acks) for number in range(len(frames))]
