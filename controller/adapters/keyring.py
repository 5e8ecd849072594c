"""Data keys of one group: made once for each tenure, wrapped by every region's KMS, unwrapped by whichever answers.

The writer's key of a stream lives as long as its tenure, or until it is due for rotation: no KMS outage stops a holder that
has one. A rotation that cannot be wrapped for every region is put off, because the key in use may be wrapped for more. Wraps
that are missing when a tenure begins are asked for again, beside the writing.

Keys of what others wrote are unwrapped once and kept for a bounded time; the own region's KMS is asked first, one that did
not answer lately last.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from time import gmtime, strftime
from typing import Any

from controller.adapters.kms_seen import KmsAnswers
from controller.adapters.sealing import DataKey, Envelope, Wrap
from controller.domain.model import Fence
from controller.domain.sealing import KmsSeen, tenure_lacks
from controller.errors import Corrupt, DrError, Misconfigured, Unavailable
from controller.ports import Clock, KeyService

ASK_AGAIN_SECONDS = 15.0
"""Pause between two attempts at a wrap that is missing or at a rotation; a third of it at a key that nobody could unwrap."""
REACH_SECONDS = 30.0
MAX_KEYS = 1024
"""Unwrapped keys that are kept: a year's tenures and daily rotations."""


@dataclass(slots=True)
class WriterKey:
    """The data key under which a stream's tenure seals now."""

    key: DataKey
    epoch: int
    made_at: float
    """Monotonic; ``made_wall`` is the same moment for people."""
    made_wall: float
    wraps: tuple[Wrap, ...]
    missing: dict[str, str] = field(default_factory=dict)
    """Region → why its KMS has not wrapped it."""
    asked_at: float = 0.0
    overdue: str = ""
    """Why it was not rotated although it is time."""

    @property
    def wrapped_for(self) -> tuple[str, ...]:
        return tuple(wrap.region for wrap in self.wraps)


class Keyring:
    """Implements ``ports.Seals``. ``services``: region → its KMS, in the order in which they are asked; ``home``: our own."""

    def __init__(
        self,
        group: str,
        services: Mapping[str, KeyService],
        *,
        home: str,
        clock: Clock,
        enabled: bool = True,
        rotate_seconds: float = 86_400.0,
        cache_seconds: float = 21_600.0,
    ) -> None:
        self._group = group
        self._services = services
        self._order = sorted(services, key=lambda region: region != home)
        self._clock = clock
        self.enabled = enabled
        """Whether new objects are sealed. Sealed ones are opened either way."""
        self._rotate_seconds = rotate_seconds
        self._cache_seconds = cache_seconds
        self._writers: dict[str, WriterKey] = {}
        self._making: dict[str, asyncio.Lock] = {}
        self._known: OrderedDict[tuple[str, bytes], tuple[DataKey, float]] = OrderedDict()
        self._failed: OrderedDict[tuple[str, bytes, tuple[str, ...]], tuple[DrError, float]] = OrderedDict()
        self._unwrapping: dict[tuple[str, bytes, tuple[str, ...]], asyncio.Task[DataKey]] = {}
        self._added: OrderedDict[tuple[bytes, str], tuple[Wrap | DrError, float]] = OrderedDict()
        self._tried: OrderedDict[tuple[str, bytes], tuple[bool, float]] = OrderedDict()
        """A region's wrap → whether its KMS opens it, and until when (monotonic) that counts."""
        self._silent: dict[str, float] = {}
        """Region → monotonic time at which its KMS last did not answer."""
        self._reached: tuple[dict[str, str], float] | None = None
        self._answers = KmsAnswers(services, clock)
        self._tasks: dict[str, asyncio.Task[None]] = {}

    # ----------------------------------------------------------------------------------------------------------- writing

    async def prepare(self, fence: Fence) -> None:
        """See ``ports.Seals``."""
        if not self.enabled:
            return
        try:
            writer = await self.writer(fence.stream, fence.epoch)
        except Misconfigured as error:
            raise Unavailable(error.message, hint=error.hint) from error
        lacks = tenure_lacks(fence.region, writer.wrapped_for, writer.missing)
        if lacks is not None:
            await self._complete(writer, fence.stream)
            lacks = tenure_lacks(fence.region, writer.wrapped_for, writer.missing)
        if lacks is not None:
            raise Unavailable(lacks, hint="bring the KMS of one more region back, or correct regions.NAME.kms_key")

    async def writer(self, stream: str, epoch: int | None = None) -> WriterKey:
        """The key of this stream's tenure; made now when there is none yet. ``epoch`` None: whichever there is.

        Raises Unavailable, Misconfigured when no region's KMS makes one."""
        found = self._writers.get(stream)
        if found is None or epoch not in (None, found.epoch):
            async with self._making.setdefault(stream, asyncio.Lock()):
                found = self._writers.get(stream)
                if found is None or epoch not in (None, found.epoch):
                    found = self._writers[stream] = await self._make(stream, epoch or 0)
        now = self._clock.monotonic()
        if now - found.asked_at >= ASK_AGAIN_SECONDS:
            if found.missing:
                self._beside(stream, self._complete(found, stream))
            elif now - found.made_at >= self._rotate_seconds:
                self._beside(stream, self._rotate(found, stream))
        return found

    async def _make(self, stream: str, epoch: int) -> WriterKey:
        missing: dict[str, str] = {}
        failures: list[DrError] = []
        for maker in self._by_trust(self._order):
            try:
                made = await self._services[maker].make_data_key(self._context(stream))
                key = DataKey.of(made.plain)
            except DrError as error:
                self._note(maker, error)
                self._answers.note(maker, error.message)
                missing[maker] = error.message
                failures.append(error)
                continue
            now = self._clock.monotonic()
            self._answers.note(maker, "")
            writer = WriterKey(key, epoch, now, self._clock.wall(), (Wrap(maker, made.wrapped),), missing, now)
            await self._wrap_for(writer, stream, [other for other in self._order if other != maker and other not in missing])
            return writer
        raise _all_failed(f"no region's KMS makes a data key for stream {stream}", missing, failures)

    async def _wrap_for(self, writer: WriterKey, stream: str, regions: list[str]) -> None:
        """Asks for wraps, all at a time; what is refused is noted."""

        async def one(region: str) -> Wrap | DrError:
            try:
                return Wrap(region, await self._services[region].wrap(writer.key.plain, self._context(stream)))
            except DrError as error:
                self._note(region, error)
                return error

        answers = await asyncio.gather(*(one(region) for region in regions))
        for region, answer in zip(regions, answers, strict=True):
            self._answers.note(region, "" if isinstance(answer, Wrap) else answer.message)
            if isinstance(answer, Wrap):
                writer.wraps = self._sorted((*writer.wraps, answer))
                writer.missing.pop(region, None)
            else:
                writer.missing[region] = answer.message
        writer.asked_at = self._clock.monotonic()

    async def _complete(self, writer: WriterKey, stream: str) -> None:
        writer.asked_at = self._clock.monotonic()
        await self._wrap_for(writer, stream, list(writer.missing))

    async def _rotate(self, writer: WriterKey, stream: str) -> None:
        """The old key stays until the new one is wrapped for every region."""
        writer.asked_at = self._clock.monotonic()
        try:
            fresh = await self._make(stream, writer.epoch)
        except DrError as error:
            writer.overdue = error.message
            return
        if fresh.missing:
            writer.overdue = "; ".join(f"{region}: {why}" for region, why in sorted(fresh.missing.items()))
        elif self._writers.get(stream) is writer:
            self._writers[stream] = fresh
            self._keep(stream, writer.key)

    def _beside(self, stream: str, work: Coroutine[Any, Any, None]) -> None:
        """One at a time for each stream; the writing does not wait for it."""
        running = self._tasks.get(stream)
        if running is not None and not running.done():
            work.close()
            return
        self._tasks[stream] = asyncio.create_task(work, name=f"data-key-{stream}")

    async def with_wrap(self, stream: str, key: DataKey, envelope: Envelope, region: str) -> tuple[Wrap, ...]:
        """The envelope's wraps and one for ``region``, where its KMS gives one. A wrap of a key that it does not have any more
        does not count, and is replaced. What it refuses is not asked again for a while. Never raises for that: whether they
        suffice is judged where the object is put."""
        if region not in self._services:
            return envelope.wraps
        mine = next((wrap for wrap in envelope.wraps if wrap.region == region), None)
        if mine is not None and await self._opens(stream, mine):
            return envelope.wraps
        others = tuple(wrap for wrap in envelope.wraps if wrap.region != region)
        now = self._clock.monotonic()
        known = self._added.get((key.name, region))
        if known is None or (isinstance(known[0], DrError) and now - known[1] >= ASK_AGAIN_SECONDS):
            answer: Wrap | DrError
            try:
                answer = Wrap(region, await self._services[region].wrap(key.plain, self._context(stream)))
            except DrError as error:
                self._note(region, error)
                answer = error
            known = self._added[key.name, region] = answer, now
            _bound(self._added, MAX_KEYS)
        return others if isinstance(known[0], DrError) else self._sorted((*others, known[0]))

    async def _opens(self, stream: str, wrap: Wrap) -> bool:
        """Whether the wrap's own KMS opens it. One that cannot be asked now is not taken for one that does not."""
        name, now = (wrap.region, wrap.data), self._clock.monotonic()
        known = self._tried.get(name)
        if known is None or now >= known[1]:
            opens, until = True, float("inf")
            try:
                await self._services[wrap.region].unwrap(wrap.data, self._context(stream))
            except Corrupt:
                opens = False
            except DrError as error:
                self._note(wrap.region, error)
                until = now + ASK_AGAIN_SECONDS
            known = self._tried[name] = opens, until
            _bound(self._tried, MAX_KEYS)
        return known[0]

    # ----------------------------------------------------------------------------------------------------------- reading

    async def unwrap(self, stream: str, envelope: Envelope) -> DataKey:
        """The data key of a sealed object. Raises Unavailable (a KMS that may open it does not answer), Misconfigured (denied,
        or no key of these settings opens it), Corrupt (none of its wraps is what it says)."""
        writer = self._writers.get(stream)
        if writer is not None and writer.key.name == envelope.key:
            return writer.key
        now = self._clock.monotonic()
        name = (stream, envelope.key)
        found = self._known.get(name)
        if found is not None and now < found[1]:
            self._known.move_to_end(name)
            return found[0]
        # With the wraps: a damaged header must not stand in the way of a good one that names the same key.
        asked = (*name, tuple(f"{wrap.region}:{hash(wrap.data)}" for wrap in envelope.wraps))
        failed = self._failed.get(asked)
        if failed is not None and now - failed[1] < ASK_AGAIN_SECONDS / 3:
            raise type(failed[0])(failed[0].message, hint=failed[0].hint)
        task = self._unwrapping.get(asked)
        if task is None:
            task = self._unwrapping[asked] = asyncio.create_task(self._ask(stream, envelope))
            task.add_done_callback(lambda done: self._asked(asked, done))
        return await asyncio.shield(task)  # whoever waits may be cancelled; the answer serves the others

    def _asked(self, asked: tuple[str, bytes, tuple[str, ...]], done: asyncio.Task[DataKey]) -> None:
        self._unwrapping.pop(asked, None)
        if done.cancelled():
            return
        error = done.exception()
        if isinstance(error, DrError):
            self._failed[asked] = error, self._clock.monotonic()
            _bound(self._failed, MAX_KEYS)
        elif error is None:
            self._keep(asked[0], done.result())

    def _keep(self, stream: str, key: DataKey) -> None:
        self._known[stream, key.name] = key, self._clock.monotonic() + self._cache_seconds
        self._known.move_to_end((stream, key.name))
        _bound(self._known, MAX_KEYS)

    async def _ask(self, stream: str, envelope: Envelope) -> DataKey:
        failures: dict[str, str] = {}
        errors: list[DrError] = []
        wrong: list[str] = []
        wraps = {wrap.region: wrap for wrap in envelope.wraps}
        for region in self._by_trust([one for one in self._order if one in wraps]):
            try:
                key = DataKey.of(await self._services[region].unwrap(wraps[region].data, self._context(stream)))
                if key.name != envelope.key:
                    raise Corrupt(f"the KMS of {region} gives back another key than the object names", hint="")
            except DrError as error:
                self._note(region, error)
                failures[region] = error.message
                errors.append(error)
                wrong += [region] if isinstance(error, Corrupt) else []
                continue
            for one in wrong:
                self._answers.note_dead(one, key.name)
            return key
        for region in wraps:
            failures.setdefault(region, "the settings have no key there")
        if not errors:
            raise Misconfigured(
                f"the object is sealed for the KMS of {', '.join(wraps)}, and the settings have a key in none of them",
                hint="give every controller of the group the same regions.NAME.kms_key",
            )
        raise _all_failed(f"data key {envelope.key.hex()[:8]}… of stream {stream} cannot be unwrapped", failures, errors)

    # ------------------------------------------------------------------------------------------------------------- people

    async def reach(self) -> Mapping[str, str]:
        """See ``ports.Seals``. Wraps a key that seals nothing."""
        if not self.enabled:
            return {}
        now = self._clock.monotonic()
        if self._reached is None or now - self._reached[1] >= REACH_SECONDS:

            async def one(service: KeyService) -> str:
                try:
                    await service.wrap(bytes(32), self._context("reach"))
                except DrError as error:
                    self._note(service.region, error)
                    return error.message
                return ""

            answers = await asyncio.gather(*(one(self._services[region]) for region in self._order))
            self._reached = dict(zip(self._order, answers, strict=True)), now
            for region, why in self._reached[0].items():
                self._answers.note(region, why)
        return self._reached[0]

    def note_object(self, store: str, key: str, wrapped_for: tuple[str, ...]) -> None:
        """An object that was read from a store, and whose KMS opens it."""
        self._answers.note_object(store, key, wrapped_for)

    def seen(self) -> tuple[KmsSeen, ...]:
        """See ``ports.Seals``."""
        if not self.enabled:
            return ()
        lacking = {
            region: {name: writer.made_wall if region in writer.missing else 0.0 for name, writer in self._writers.items()}
            for region in self._order
        }
        return self._answers.seen(lacking)

    def warnings(self) -> tuple[str, ...]:
        """See ``ports.Seals``."""
        told = []
        for stream, writer in sorted(self._writers.items()):
            if writer.missing:
                missing = "; ".join(f"{region}: {why}" for region, why in sorted(writer.missing.items()))
                told.append(
                    f"stream {stream} is sealed for the KMS of {', '.join(writer.wrapped_for)} only ({missing}), "
                    f"since {_utc(writer.made_wall)}"
                )
            if writer.overdue:
                told.append(f"the data key of stream {stream} is due for rotation ({writer.overdue})")
        told += [
            f"the KMS of {one.region} has not wrapped data keys since {_utc(one.since)} ({one.why})"
            for one in self.seen()
            if one.wraps is False
        ]
        told += [
            f"{one.alone:,} objects are sealed for the KMS of {one.region} alone; other regions' copies of them are not"
            for one in self.seen()
            if one.alone
        ]
        told += [
            f"the KMS of {one.region} does not open {one.dead:,} data keys that it once wrapped: what they seal leans on others"
            for one in self.seen()
            if one.dead
        ]
        return tuple(told)

    async def close(self) -> None:
        """Forgets the keys and closes the services."""
        tasks = [*self._tasks.values(), *self._unwrapping.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._writers.clear()
        self._known.clear()
        for service in self._services.values():
            await service.close()

    # ------------------------------------------------------------------------------------------------------------ helpers

    def _context(self, stream: str) -> dict[str, str]:
        return {"agent-dr:group": self._group, "agent-dr:stream": stream}

    def _note(self, region: str, error: DrError) -> None:
        if isinstance(error, Unavailable):
            self._silent[region] = self._clock.monotonic()

    def _by_trust(self, regions: list[str]) -> list[str]:
        """Those that did not answer lately come last."""
        now = self._clock.monotonic()
        return sorted(regions, key=lambda region: now - self._silent.get(region, -REACH_SECONDS) < REACH_SECONDS)

    def _sorted(self, wraps: tuple[Wrap, ...]) -> tuple[Wrap, ...]:
        """By region's name, so that all who seal with the same wraps write the same bytes."""
        return tuple(sorted(wraps, key=lambda wrap: wrap.region))


def _all_failed(what: str, why: Mapping[str, str], errors: list[DrError]) -> DrError:
    """One that waiting may mend counts most: what is not known to be damaged or denied is neither."""
    message = f"{what} ({'; '.join(f'{region}: {text}' for region, text in sorted(why.items()))})"
    if any(isinstance(error, Unavailable) for error in errors):
        return Unavailable(message, hint="bring the KMS of one of these regions back")
    if any(isinstance(error, Misconfigured) for error in errors):
        return Misconfigured(message, hint="let this role use the keys of regions.NAME.kms_key, and keep them enabled")
    return Corrupt(message, hint="repair the object from another region: drctl verify, then drctl repair")


def _utc(wall: float) -> str:
    return strftime("%Y-%m-%d %H:%M:%S UTC", gmtime(wall))


def _bound(cache: OrderedDict[Any, Any], most: int) -> None:
    while len(cache) > most:
        cache.popitem(last=False)
