"""Brings records to the holders of their streams, and tells how current this instance's copy is.

Agents may ask any instance of the active region. It takes the records of the streams that it holds and hands the others to
their holders, in one hop: what was handed over is never handed on, it fails for the sender to try again. The answer's right is
the shortest of its parts, counted from when the agent sent its request, which is earlier than when any part was asked for.

What the lead's holder writes for agents of other streams (tasks, assignments) goes another way, where the receiver looks into
etcd whether the sender is the lead's holder. It returns when this instance's own copy has it, so that whatever is decided on
the view afterwards (where an agent resumes, which attempt comes next) counts on nothing older.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from controller.domain.model import Ack, Frame, Holder, IngestAnswer
from controller.domain.sharing import LEAD, stream_of
from controller.errors import DrError, FenceLost, NotActive, OutcomeUnknown, Unavailable
from controller.ports import Clock, Coordinator, Peers
from controller.runtime.active import Active
from controller.runtime.documents import Keys, read
from controller.stream.follower import Follower
from controller.stream.view import View

SETTLE_SECONDS = 5.0
"""How long a read, or a write of the lead, waits for this instance's copy to catch up."""
BEAT_SECONDS = 1.0
"""The same for a host's beat, which must not wait long: agents of streams that are not current wait for the next one."""
POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class _Part:
    """The frames that go one way, with their places in the batch."""

    numbers: tuple[int, ...]
    send: Callable[[], Awaitable[IngestAnswer]]


class Router:
    """One per controller. ``holders``: as last seen in etcd. ``peers`` None: there is no way to other instances."""

    def __init__(
        self,
        streams: Sequence[str],
        region: str,
        address: str,
        actives: Mapping[str, Active],
        holders: Callable[[], Iterable[Holder]],
        peers: Peers | None,
        view: View,
        followers: Mapping[str, Follower],
        coordinator: Coordinator,
        keys: Keys,
        clock: Clock,
    ) -> None:
        self._streams = tuple(streams)
        self._region = region
        self._address = address
        self._actives = actives
        self._holders = holders
        self._peers = peers
        self._view = view
        self._followers = followers
        self._coordinator = coordinator
        self._keys = keys
        self._clock = clock

    # ----------------------------------------------------------------------------------------------------- looking

    def stream(self, agent: str) -> str:
        """The stream that an agent belongs to."""
        return stream_of(agent, len(self._streams))

    def here(self, stream: str) -> Active | None:
        """The stream's tenure, when this instance serves it."""
        active = self._actives.get(stream)
        return active if active is not None and active.acts() else None

    def elsewhere(self, stream: str) -> str | None:
        """Where the stream's holder listens, as last seen; None when it is nobody else of this region."""
        found = next((holder for holder in self._holders() if holder.stream == stream), None)
        return None if found is None or found.region != self._region or found.address == self._address else found.address

    def not_active(self, stream: str) -> NotActive:
        """Says that this instance does not serve the stream, and who does."""
        found = next((holder for holder in self._holders() if holder.stream == stream), None)
        named = found.address if found is not None and found.address != self._address else None
        return NotActive(f"stream {stream} is not served by this instance", hint="ask its holder, or try again", active=named)

    # ------------------------------------------------------------------------------------------------------ agents

    async def ingest(self, frames: Sequence[Frame], *, forwarded: bool = False) -> IngestAnswer:
        """See ``ControllerService``. ``forwarded``: another instance sent them, so only what is held here is taken."""
        ways: dict[tuple[str, str], list[int]] = {}
        for number, one in enumerate(frames):
            stream = self.stream(one.record.agent)
            address = None if self.here(stream) is not None or forwarded else self.elsewhere(stream)
            ways.setdefault(("", stream) if address is None else (address, ""), []).append(number)
        parts = [self._part(address, stream, tuple(numbers), frames) for (address, stream), numbers in ways.items()]
        if len(parts) == 1:
            return await parts[0].send()
        answers = await asyncio.gather(*(part.send() for part in parts), return_exceptions=True)
        return _merged(parts, answers, frames)

    def _part(self, address: str, stream: str, numbers: tuple[int, ...], frames: Sequence[Frame]) -> _Part:
        mine = [frames[number] for number in numbers]

        async def send() -> IngestAnswer:
            if address and self._peers is not None:
                return await self._peers.ingest(address, mine)
            active = self.here(stream)
            if active is None:
                raise self.not_active(stream or self.stream(mine[0].record.agent))
            return await active.intake.ingest(mine)

        return _Part(numbers, send)

    # -------------------------------------------------------------------------------------------- the lead's records

    async def write(self, lead: Active, frames: Sequence[Frame]) -> tuple[Ack, ...]:
        """Tasks and assignments, from this instance as the lead's holder. One that fails does not stop the others."""
        acks: dict[int, Ack] = {}
        ways: dict[str, list[int]] = {}
        for number, one in enumerate(frames):
            ways.setdefault(self.stream(one.record.agent), []).append(number)

        async def one_way(stream: str, numbers: list[int]) -> None:
            mine = [frames[number] for number in numbers]
            try:
                answered = await self._write(lead, stream, mine)
            except DrError as error:
                answered = tuple(_failed(frame, error) for frame in mine)
            acks.update(zip(numbers, answered, strict=True))

        await asyncio.gather(*(one_way(stream, numbers) for stream, numbers in ways.items()))
        return tuple(acks[number] for number in range(len(frames)))

    async def _write(self, lead: Active, stream: str, frames: Sequence[Frame]) -> Sequence[Ack]:
        active, address = self.here(stream), self.elsewhere(stream)
        if active is not None:
            return await active.intake.take_for_the_lead(frames)
        if address is None or self._peers is None:
            raise self.not_active(stream)
        acks = await self._peers.write(address, lead.tenure.fence, frames)
        if len(acks) != len(frames):
            raise OutcomeUnknown(f"{address}: {len(acks)} answers for {len(frames)} records", hint="a retry is safe")
        await self._reach(stream, max((ack.seq for ack in acks), default=0), SETTLE_SECONDS)
        return acks

    async def take(self, region: str, instance: str, epoch: int, frames: Sequence[Frame]) -> tuple[Ack, ...]:
        """The other end of ``write``. Raises FenceLost when the sender is not the lead's holder, NotActive for a stream that is
        not held here."""
        lead = await read(self._coordinator, self._keys.holder(LEAD), Holder)
        if lead is None or (lead.value.region, lead.value.instance, lead.value.epoch) != (region, instance, epoch):
            raise FenceLost(f"{region}/{instance} does not hold the lead stream in epoch {epoch}", hint="step down")
        acks: dict[int, Ack] = {}
        ways: dict[str, list[int]] = {}
        for number, one in enumerate(frames):
            ways.setdefault(self.stream(one.record.agent), []).append(number)
        for stream, numbers in ways.items():
            active = self.here(stream)
            if active is None:
                raise self.not_active(stream)
            answered = await active.intake.take_for_the_lead([frames[number] for number in numbers])
            acks.update(zip(numbers, answered, strict=True))
        return tuple(acks[number] for number in range(len(frames)))

    # ----------------------------------------------------------------------------------------------------- currency

    def positions(self) -> dict[str, int]:
        """Streams that are served here, with the last segment that the view has: all that was acknowledged so far."""
        return {stream: self._view.position(stream)[0] for stream in self._actives if self.here(stream) is not None}

    async def settle(self, streams: Collection[str], seconds: float = SETTLE_SECONDS) -> None:
        """Returns when this copy has everything of these streams that was acknowledged before the call.

        Raises NotActive when a stream has no holder here that could say so, Unavailable when the copy does not catch up."""
        addresses: dict[str, list[str]] = {}
        for stream in streams:
            if self.here(stream) is None:
                address = self.elsewhere(stream)
                if address is None:
                    raise self.not_active(stream)
                addresses.setdefault(address, []).append(stream)
        if not addresses:
            return
        if self._peers is None:
            raise Unavailable("there is no way to other instances", hint="ask the stream's holder")
        for address, wanted in addresses.items():
            known = await self._peers.positions(address)
            for stream in wanted:
                if stream not in known:
                    raise self.not_active(stream)
                await self._reach(stream, known[stream], seconds)

    async def current(self, seconds: float = BEAT_SECONDS) -> frozenset[str]:
        """The streams that could be settled within this time."""

        async def one(stream: str) -> str:
            try:
                async with asyncio.timeout(seconds):
                    await self.settle([stream], seconds)
            except (DrError, TimeoutError):
                return ""
            return stream

        return frozenset(await asyncio.gather(*(one(stream) for stream in self._streams))) - {""}

    async def _reach(self, stream: str, seq: int, seconds: float) -> None:
        """Waits until the view has segment ``seq`` of a stream that is followed here."""
        end = self._clock.monotonic() + seconds
        while self._view.position(stream)[0] < seq:
            if self._clock.monotonic() >= end:
                raise OutcomeUnknown(
                    f"this copy of {stream} does not have segment {seq} yet", hint="the home store answers slowly; try again"
                )
            await self._followers[stream].step()
            await self._clock.sleep(POLL_SECONDS)


def _failed(frame: Frame, error: DrError) -> Ack:
    return Ack(frame.record.agent, frame.record.id, "failed", error=error.to_dict())


def _merged(parts: Sequence[_Part], answers: Sequence[IngestAnswer | BaseException], frames: Sequence[Frame]) -> IngestAnswer:
    """One answer to the whole batch. Raises when no part was answered: with an outcome that is unknown, if there is one."""
    errors = [answer for answer in answers if isinstance(answer, BaseException)]
    for error in errors:
        if not isinstance(error, DrError):
            raise error
    given = [answer for answer in answers if isinstance(answer, IngestAnswer)]
    if not given:
        raise min(errors, key=lambda error: not isinstance(error, OutcomeUnknown))
    acks: dict[int, Ack] = {}
    for part, answer in zip(parts, answers, strict=True):
        if isinstance(answer, IngestAnswer):
            acks.update(zip(part.numbers, answer.acks, strict=True))
        elif isinstance(answer, DrError):
            acks.update((number, _failed(frames[number], answer)) for number in part.numbers)
    return IngestAnswer(
        max(answer.epoch for answer in given),
        min(answer.right_seconds for answer in given),
        tuple(acks[number] for number in range(len(frames))),
        {stream: epoch for answer in given for stream, epoch in answer.epochs.items()},
        min(answer.right_seconds if answer.holder_seconds is None else answer.holder_seconds for answer in given),
    )
