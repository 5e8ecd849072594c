"""From a letter to its acknowledgement: turns, deltas, batches, and the spool behind them.

Letters of one agent go in order: the next run of them is sent when the one before is settled. A run is one request, its records
deltas against each other, so a thousand records of one agent do not cost a thousand round trips. Retries are safe because a
record is named by (agent, id): what is retried is what has no answer yet, in its order.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from controller.agent import wire
from controller.agent.caller import Caller
from controller.agent.errors import Fenced, StaleEpoch
from controller.agent.lanes import OVERHEAD, Lane
from controller.agent.memory import DeltaMemory, Previous, chained
from controller.agent.rights import Clock
from controller.agent.spool import Letter, Spool
from controller.agent.turns import Turns
from controller.domain.model import Ack, Frame, Record
from controller.errors import DrError, FenceLost, OutcomeUnknown, Refused, Unauthenticated, Unavailable
from controller.stream.limits import DEFAULT_LIMITS, record_problem
from controller.stream.segment import encode_frames

ACKNOWLEDGED = ("acknowledged", "duplicate")
SPOOLED = "spooled"
"""Status of an Ack that is none: the record is on this machine's disk only."""
NOT_JUDGED = (Unavailable, StaleEpoch, Unauthenticated)
"""Says nothing about the record: it stays where it is (an expired token is renewed, and then everything is sent)."""
THREAD_BYTES = 2**20
"""More than this is compressed in a thread: a large body must not stop the loop that beats."""

_SOME_HASH = "0" * 64

Result = Ack | DrError
Read = Callable[[bytes, Sequence[int], float], Sequence[Ack]]
"""Makes acknowledgements of an answer: its content, the attempts of its records, when the request was sent."""


class Delivery:
    """See the module. One event loop owns it."""

    def __init__(
        self,
        caller: Caller,
        accept: Read,
        clock: Clock,
        rng: random.Random,
        *,
        delta_bytes: int,
        spool: Spool | None,
        in_flight: int,
        batch_records: int,
        batch_bytes: int,
    ) -> None:
        self.spool = spool
        self._caller = caller
        self._accept = accept
        self._clock = clock
        self._random = rng
        self._memory = DeltaMemory(delta_bytes)
        self._turns = Turns()
        self._lanes: dict[int, Lane] = {}
        self._in_flight = in_flight
        self._batch_records = batch_records
        self._batch_bytes = batch_bytes
        self._putting: Counter[str] = Counter()
        """Puts that hold or await their agent's turn."""
        self._drainer: asyncio.Task[None] | None = None
        self._closed = False

    async def close(self) -> None:
        """Cancels what is in flight."""
        self._closed = True
        await self._stop_draining()
        for lane in self._lanes.values():
            await lane.close()

    # -------------------------------------------------------------------------------------------------------- putting

    async def put(self, letters: Sequence[Letter], deadline: float) -> list[Result]:
        """An answer for each, in order. Agents do not wait for each other. Raises nothing."""
        by_agent: dict[str, list[int]] = {}
        for number, letter in enumerate(letters):
            by_agent.setdefault(letter.agent, []).append(number)
        if len(by_agent) == 1:
            return await self._put(letters, deadline)
        results: dict[int, Result] = {}

        async def one(numbers: Sequence[int]) -> None:
            mine = [letters[number] for number in numbers]
            results.update(zip(numbers, await self._put(mine, deadline), strict=True))

        await asyncio.gather(*(one(numbers) for numbers in by_agent.values()))
        return [results[number] for number in range(len(letters))]

    async def _put(self, letters: Sequence[Letter], deadline: float) -> list[Result]:
        """One agent's. Behind what is spooled already, so that order is kept."""
        agent = letters[0].agent
        self._putting[agent] += 1
        try:
            async with self._turns.of(agent, deadline):
                try:
                    if self.spool is not None and self.spool.waiting(agent):
                        await self._drain_agent(self.spool, agent, deadline)
                    results = await self._deliver(letters, deadline)
                except Unavailable as error:  # of draining: what is behind it was not sent
                    results = [_behind(letter, error, self.spool) for letter in letters]
                except DrError as error:
                    results = [error] * len(letters)
                if self.spool is not None:
                    results = await self._spooled(self.spool, letters, results)
                return results
        except DrError as error:  # the turn did not come
            late: list[Result] = [error] * len(letters)
            # With no other put under way the turn was the spool's own: behind what it sends is in order.
            return await self._spooled(self.spool, letters, late) if self.spool and self._putting[agent] == 1 else late
        finally:
            self._putting[agent] -= 1
            if not self._putting[agent]:
                del self._putting[agent]

    async def _spooled(self, spool: Spool, letters: Sequence[Letter], results: Sequence[Result]) -> list[Result]:
        """What no controller took goes to the disk, but for what needs a second region: this disk is none."""
        kept: list[Result] = []
        for letter, result in zip(letters, results, strict=True):
            if not isinstance(result, Unavailable) or letter.copies > 1:
                kept.append(result)
                continue
            try:
                dropped = await asyncio.to_thread(spool.add, letter)
            except DrError as error:
                kept.append(error)
                continue
            kept.append(Ack(letter.agent, letter.id, SPOOLED, error=dropped.to_dict() if dropped is not None else None))
            self.start_draining()
        return kept

    async def _deliver(self, letters: Sequence[Letter], deadline: float) -> list[Result]:
        results: list[Result] = []
        for run in self._runs(letters):
            results.extend(await self._deliver_run(run, deadline))
        return results

    def _runs(self, letters: Sequence[Letter]) -> Iterator[Sequence[Letter]]:
        """Neighbours that fit into one request, asking for equal copies."""
        begin = size = 0
        for number, letter in enumerate(letters):
            size += len(letter.body) + OVERHEAD
            full = size > self._batch_bytes or number - begin >= self._batch_records
            if number > begin and (full or letter.copies != letters[begin].copies):
                yield letters[begin:number]
                begin, size = number, len(letter.body) + OVERHEAD
        yield letters[begin:]

    async def _deliver_run(self, letters: Sequence[Letter], deadline: float) -> list[Result]:
        """Until each is acknowledged, refused, or late."""
        agent, copies = letters[0].agent, letters[0].copies
        answers: dict[int, Result] = {}
        for number, letter in enumerate(letters):
            problem = _problem(letter)
            if problem is not None:
                answers[number] = problem
        whole = False

        async def once(until: float) -> None:
            nonlocal whole
            while len(answers) < len(letters):
                left = [number for number in range(len(letters)) if number not in answers]
                frames = await self._frames([letters[number] for number in left], whole=whole)
                acks = await self._lane(copies).submit(frames, until)
                late = self._settle(letters, left, frames, acks, answers)
                if late is not None and late.code == wire.UNKNOWN_BASE and not whole:
                    whole = True
                    for kind in {letter.kind for letter in letters}:
                        self._memory.forget(agent, kind)
                elif late is not None:
                    raise late

        first = f"record {letters[0].id!a} of agent {agent!a}"
        what = first if len(letters) == 1 else f"{len(letters)} records of agent {agent!a}, from {letters[0].id!a} on"
        try:
            await self._caller.retry(once, deadline, what)
        except DrError as error:
            for number in range(len(letters)):
                answers.setdefault(number, error)
        return [answers[number] for number in range(len(letters))]

    def _settle(
        self,
        letters: Sequence[Letter],
        left: Sequence[int],
        frames: Sequence[Frame],
        acks: Sequence[Ack],
        answers: dict[int, Result],
    ) -> DrError | None:
        """Takes over what is final. Returns what has to be tried again with the rest, None when all can go on at once."""
        failed: set[str] = set()
        again: DrError | None = None
        for number, item, ack in zip(left, frames, acks, strict=True):
            letter = letters[number]
            try:
                good = settled(ack, letter.copies)
            except DrError as error:
                hangs_on_a_failed_one = item.base is not None and item.base in failed
                failed.add(letter.id)
                if hangs_on_a_failed_one:
                    continue  # its delta could not be opened: that says nothing about itself
                if error.code == wire.UNKNOWN_BASE and item.base is not None:
                    again = again or error
                elif isinstance(error, (Unavailable, FenceLost)) and not isinstance(error, Fenced):
                    again = again if again is not None and again.code != wire.UNKNOWN_BASE else error
                else:
                    answers[number] = error
            else:
                answers[number] = good
                self._memory.acknowledged(letter.agent, letter.kind, letter.id, letter.body, item.base)
        return again

    async def _frames(self, letters: Sequence[Letter], *, whole: bool) -> list[Frame]:
        known: dict[str, Previous] = {}
        if not whole:
            for letter in letters:
                previous = self._memory.previous(letter.agent, letter.kind)
                if previous is not None:
                    known[letter.kind] = previous
        if sum(len(letter.body) for letter in letters) <= THREAD_BYTES:
            return chained(letters, known)
        return await asyncio.to_thread(chained, letters, known)

    def _lane(self, copies: int) -> Lane:
        lane = self._lanes.get(copies)
        if lane is None:
            lane = self._lanes[copies] = Lane(
                self._send, in_flight=self._in_flight, max_records=self._batch_records, max_bytes=self._batch_bytes
            )
        return lane

    async def _send(self, frames: Sequence[Frame], deadline: float) -> Sequence[Ack]:
        """One batch, one endpoint, one try. A "no" to the batch as a whole is never taken as one to each of its agents."""
        sent_at = self._clock.monotonic()
        attempts = [item.record.attempt for item in frames]
        try:
            return await self._caller.call(
                "POST",
                "/v1/records",
                deadline,
                lambda answer: self._accept(answer.content, attempts, sent_at),
                encode_frames(frames),
                "application/octet-stream",
            )
        except (Fenced, Refused) as error:
            if len(frames) == 1:
                raise
            return [await self._send_alone(item, deadline, error) for item in frames]

    async def _send_alone(self, item: Frame, deadline: float, batch_error: DrError) -> Ack:
        try:
            return (await self._send([item], deadline))[0]
        except DrError as error:
            error.__cause__ = batch_error
            return Ack(item.record.agent, item.record.id, "failed", error=error.to_dict())

    # ---------------------------------------------------------------------------------------------------------- spool

    async def drain(self, deadline: float) -> int:
        """Sends what is spooled, in order per agent. Returns how many records were settled (sent, or refused and set aside).
        Raises Unavailable or OutcomeUnknown when a controller stops answering."""
        in_background = self._drainer is not None and not self._drainer.done()
        try:
            # Ours goes first: behind the one in the background, which may hold a turn for longer than our caller waits, nothing
            # would be tried, and the caller would be told of a turn where an outcome is unknown.
            await self._stop_draining()
            return await self._drain(deadline)
        finally:
            if in_background:
                self.start_draining()

    async def _drain(self, deadline: float) -> int:
        settled = 0
        for agent in self.spool.agents() if self.spool is not None else ():
            assert self.spool is not None
            async with self._turns.of(agent, deadline):
                settled += await self._drain_agent(self.spool, agent, deadline)
        return settled

    async def _drain_agent(self, spool: Spool, agent: str, deadline: float) -> int:
        """A crash between an acknowledgement and its removal here costs a repetition, which is answered as a duplicate."""
        settled = 0
        while spool.waiting(agent):
            items = await asyncio.to_thread(spool.first, agent, self._batch_records, self._batch_bytes)
            if not items:
                break
            results = await self._deliver([letter for _, letter in items], deadline)
            taken = [n for (n, _), result in zip(items, results, strict=True) if isinstance(result, Ack)]
            stop = next((result for result in results if isinstance(result, NOT_JUDGED)), None)
            refused = [
                (n, f"{result.code}: {result.message}")
                for (n, _), result in zip(items, results, strict=True)
                if isinstance(result, DrError) and not isinstance(result, NOT_JUDGED)
            ]
            await asyncio.to_thread(spool.settle, taken, refused)
            settled += len(taken) + len(refused)
            if stop is not None:
                raise stop
        return settled

    def start_draining(self) -> None:
        """In the background, for as long as anything waits."""
        if not self._closed and (self._drainer is None or self._drainer.done()):
            self._drainer = asyncio.get_running_loop().create_task(self._drain_for_ever())

    async def _stop_draining(self) -> None:
        """What it has sent may still be taken: put again, it is answered as a duplicate."""
        drainer, self._drainer = self._drainer, None
        if drainer is not None:
            drainer.cancel()
            await asyncio.gather(drainer, return_exceptions=True)

    async def _drain_for_ever(self) -> None:
        while self.spool is not None and self.spool.agents():
            try:
                await self._drain(self._caller.deadline(None))
            except NOT_JUDGED:
                await self._clock.sleep(self._random.uniform(0.5, 1.0))


def _behind(letter: Letter, error: Unavailable, spool: Spool | None) -> Unavailable:
    waiting = spool.waiting(letter.agent) if spool is not None else 0
    return Unavailable(
        f"record {letter.id!a} of agent {letter.agent!a} was not sent: {waiting} spooled records of the agent go before it; "
        f"{error.message}",
        hint=error.hint,
    )


def _problem(letter: Letter) -> Refused | None:
    """What every controller would refuse, found before anything is sent."""
    record = Record(
        letter.agent,
        letter.id,
        letter.kind,
        _SOME_HASH,
        len(letter.body),
        letter.parent,
        letter.created_at,
        copies=letter.copies,
        attempt=letter.attempt,
        meta=letter.meta,
    )
    found = record_problem(record, DEFAULT_LIMITS)
    if found is None:
        return None
    hint = "correct the named field"
    if len(letter.body) > DEFAULT_LIMITS.body_bytes:
        found = f"the body has {len(letter.body)} bytes, allowed are {DEFAULT_LIMITS.body_bytes}"
        hint = "keep large artefacts in object storage and record their address"
    return Refused(f"record {ascii(letter.id)[:120]} of agent {ascii(letter.agent)[:120]}: {found}", hint=hint)


def settled(ack: Ack, copies: int) -> Ack:
    """The acknowledgement itself. Raises what it says instead, or OutcomeUnknown when it stands for fewer copies than asked."""
    if ack.status not in ACKNOWLEDGED:
        raise wire.error_from(ack.error)
    if ack.copies < copies:
        raise OutcomeUnknown(
            f"record {ack.id!a} of agent {ack.agent!a} is in {ack.copies} stores, {copies} were asked for",
            hint="put it again; it is acknowledged when it has its copies",
        )
    return ack
