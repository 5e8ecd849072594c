"""Seals what goes into a region's store and opens what comes out: a ``RegionStore`` around another one.

Stream, chain, hashes and offsets are over plain bytes, everywhere. Only this edge and what lies behind it see sealed ones.

- What is put is sealed under the tenure's data key, or, when it was read from another region before (catch-up, repair), as it
  is sealed there: same data key, same salt, so byte for byte equal.
- Objects that lie there in plain are read as they are: encryption may be switched on for a group that has a history. What is
  *written* while it is on is sealed, copies of plain objects too.
- "Is it mine?" is asked about the plain bytes: an object of other bytes that opens to the same content is ours.
- Without a keyring plain objects pass, and a sealed one is ``Misconfigured``: never taken for a damaged one.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from controller.adapters import sealing
from controller.adapters.keyring import Keyring
from controller.adapters.sealing import DataKey, Envelope, Place, Wrap
from controller.domain.model import (
    Baseline,
    CatalogueEntry,
    Commit,
    EpochStart,
    Fence,
    Head,
    Realignment,
    Salvage,
    SegmentRef,
    SnapshotRef,
)
from controller.domain.sealing import store_lacks
from controller.errors import Conflict, Corrupt, DrError, Misconfigured, Unavailable
from controller.ports import FoundEntry, FoundHead, FoundObject, RegionStore

IN_THREAD_BYTES = 1024**2
"""Longer ones leave the event loop, which also keeps the lease."""
MAX_ORIGINS = 4096
"""Objects whose envelope is remembered between reading and writing a copy; about 1 KiB each."""
RECENT_BYTES = 16 * 1024**2
"""Objects whose sealed bytes are kept for the pumps of the other regions."""

Ref = SegmentRef | SnapshotRef
_T = TypeVar("_T")


class Sealer:
    """Seals and opens for all stores of one group in one process. ``keyring`` None: there are no keys."""

    def __init__(self, group: str, keyring: Keyring | None) -> None:
        self._group = group
        self.keyring = keyring
        self._origins: OrderedDict[Ref, Envelope] = OrderedDict()
        self._recent: OrderedDict[tuple[Ref, bytes, tuple[Wrap, ...]], tuple[bytes, asyncio.Future[bytes]]] = OrderedDict()
        self._recent_bytes = 0

    async def seal(self, ref: Ref, data: bytes, region: str, epoch: int | None) -> bytes:
        """What is to be put into the store of ``region``. Raises Unavailable when it may not be put there as it can be sealed
        now, or cannot be sealed."""
        keyring = self.keyring
        if keyring is None:
            return data
        known = await self._as_read(ref, data)
        if known is None and not keyring.enabled:
            return data
        if known is not None:
            key, origin = known
            wraps = await keyring.with_wrap(ref.stream, key, origin, region)
            _check(ref, region, wraps)
            copied = sealing.with_wraps(origin, wraps)
            return await _work(len(data), lambda: sealing.seal(key, copied, data))
        try:
            writer = await keyring.writer(ref.stream, epoch)
        except Misconfigured as error:  # of KMS, not of the store: waiting for somebody to mend it is all that a pump can do
            raise Unavailable(error.message, hint=error.hint) from error
        _check(ref, region, writer.wraps)
        return await self._sealed(ref, writer.key, writer.wraps, data)

    async def _as_read(self, ref: Ref, data: bytes) -> tuple[DataKey, Envelope] | None:
        """How these very bytes are sealed elsewhere, if they were read from there a short while ago."""
        origin = self._origins.get(ref)
        if origin is None or self.keyring is None or origin.size != len(data):
            return None
        try:
            key = await self.keyring.unwrap(ref.stream, origin)
        except DrError:
            return None  # its key is out of reach by now: sealed anew
        place = Place.of(self._group, ref)
        salt = await _work(len(data), lambda: sealing.salt_of(key, place, data))
        return (key, origin) if salt == origin.salt else None

    async def _sealed(self, ref: Ref, key: DataKey, wraps: tuple[Wrap, ...], data: bytes) -> bytes:
        """Sealed once for all pumps: they put the same ``data``, the same object in memory, at about the same time."""
        name = (ref, key.name, wraps)
        recent = self._recent.get(name)
        if recent is not None and recent[0] is data:
            return await asyncio.shield(recent[1])
        place = Place.of(self._group, ref)
        sealing_it = asyncio.ensure_future(_work(len(data), lambda: _seal(key, wraps, place, data)))
        self._forget(name)
        self._recent[name] = data, sealing_it
        self._recent_bytes += len(data)
        while self._recent_bytes > RECENT_BYTES:
            self._forget(next(iter(self._recent)))
        return await asyncio.shield(sealing_it)  # whoever waits may be cancelled; the other pumps still want it

    def _forget(self, name: tuple[Ref, bytes, tuple[Wrap, ...]]) -> None:
        found = self._recent.pop(name, None)
        self._recent_bytes -= 0 if found is None else len(found[0])

    async def open(self, ref: Ref, data: bytes, region: str) -> bytes:
        """The plain object. Raises Corrupt naming it, Misconfigured, Unavailable (see ``Keyring.unwrap``)."""
        try:
            found = sealing.read_envelope(data)
            if found is None:
                return data
            self._note(ref, found[0], region)
            key, envelope, begin = await self._opening(ref, *found)
            plain = await _work(len(data), lambda: sealing.open_sealed(key, envelope, data, begin))
        except DrError as error:
            raise _named(error, ref, region) from error
        self._remember(ref, envelope)
        return plain

    async def open_damaged(self, ref: Ref, data: bytes, region: str) -> bytes:
        """As much of it as opens, at its place; the bytes as they lie there when it cannot be told what they are. Proves
        nothing. Raises Misconfigured, Unavailable: then nobody knows whether it is damaged."""
        try:
            found = sealing.read_envelope(data)
            if found is None:
                return data
            self._note(ref, found[0], region)
            key, envelope, begin = await self._opening(ref, *found)
            plain = await _work(len(data), lambda: sealing.open_damaged(key, envelope, data, begin))
        except Corrupt:
            return data
        except DrError as error:
            raise _named(error, ref, region) from error
        self._remember(ref, envelope)
        return plain

    async def _opening(self, ref: Ref, envelope: Envelope, begin: int) -> tuple[DataKey, Envelope, int]:
        said, asked = sealing.place_of(envelope), Place.of(self._group, ref)
        if said != asked:
            raise Corrupt(f"what lies there is sealed as {said}", hint="repair it: drctl verify, then drctl repair")
        if self.keyring is None:
            raise Misconfigured(
                f"it is sealed for the KMS of {', '.join(map(ascii, envelope.wrapped_for))}, and these settings have no keys",
                hint="set regions.NAME.kms_key as the other controllers of the group have it",
            )
        return await self.keyring.unwrap(ref.stream, envelope), envelope, begin

    def _note(self, ref: Ref, envelope: Envelope, region: str) -> None:
        if self.keyring is not None:
            self.keyring.note_object(region, ref.key, envelope.wrapped_for)

    def _remember(self, ref: Ref, envelope: Envelope) -> None:
        self._origins[ref] = envelope
        self._origins.move_to_end(ref)
        if len(self._origins) > MAX_ORIGINS:
            self._origins.popitem(last=False)


class SealedStore:
    """Implements ``ports.RegionStore`` around ``inner``. All stores of a process share one ``sealer``."""

    def __init__(self, inner: RegionStore, sealer: Sealer) -> None:
        self._inner = inner
        self._sealer = sealer

    @property
    def region(self) -> str:
        return self._inner.region

    async def put_segment(self, fence: Fence, ref: SegmentRef, data: bytes) -> None:
        sealed = await self._sealer.seal(ref, data, self.region, fence.epoch)
        await self._mine(ref, data, sealed, lambda: self._inner.put_segment(fence, ref, sealed))

    async def put_snapshot(self, fence: Fence, ref: SnapshotRef, data: bytes) -> None:
        sealed = await self._sealer.seal(ref, data, self.region, fence.epoch)
        await self._mine(ref, data, sealed, lambda: self._inner.put_snapshot(fence, ref, sealed))

    async def mend_object(self, ref: SegmentRef | SnapshotRef, found: FoundObject, data: bytes) -> None:
        sealed = await self._sealer.seal(ref, data, self.region, None)
        await self._mine(ref, data, sealed, lambda: self._inner.mend_object(ref, found, sealed))

    async def _mine(self, ref: Ref, data: bytes, sealed: bytes, put: Callable[[], Awaitable[None]]) -> None:
        """Puts, and when other bytes are there looks what they seal. Raises what ``put`` raises."""
        try:
            await put()
        except Conflict as conflict:
            there = (await self._inner.inspect_object(ref)).data
            if there is None:
                raise Unavailable(f"object {ref.key} in {self.region} was there and is gone", hint="repeat the call") from None
            if there == sealed:
                return
            try:
                plain = await self._sealer.open(ref, there, self.region)
            except Corrupt:
                raise conflict from None
            if plain != data:
                raise

    async def get_segment(self, ref: SegmentRef) -> bytes:
        return await self._sealer.open(ref, await self._inner.get_segment(ref), self.region)

    async def get_snapshot(self, ref: SnapshotRef) -> bytes:
        return await self._sealer.open(ref, await self._inner.get_snapshot(ref), self.region)

    async def inspect_object(self, ref: SegmentRef | SnapshotRef) -> FoundObject:
        found = await self._inner.inspect_object(ref)
        if found.data is None:
            return found
        return FoundObject(await self._sealer.open_damaged(ref, found.data, self.region), found.tag)

    # ------------------------------------------------------------------------------------- what holds no agent's content

    async def list_segments(self, stream: str, first_seq: int, limit: int = 1000) -> tuple[SegmentRef, ...]:
        return await self._inner.list_segments(stream, first_seq, limit)

    async def read_head(self, stream: str) -> Head:
        return await self._inner.read_head(stream)

    async def advance(self, fence: Fence, commit: Commit) -> Head:
        return await self._inner.advance(fence, commit)

    async def fence(self, fence: Fence) -> Head:
        return await self._inner.fence(fence)

    async def realign(self, fence: Fence, expected: Head, to: Realignment) -> Head:
        return await self._inner.realign(fence, expected, to)

    async def set_base(self, fence: Fence, expected: Head, to: Baseline) -> Head:
        return await self._inner.set_base(fence, expected, to)

    async def delete_segments(self, fence: Fence, refs: Sequence[SegmentRef]) -> None:
        await self._inner.delete_segments(fence, refs)

    async def list_snapshots(self, stream: str) -> tuple[SnapshotRef, ...]:
        return await self._inner.list_snapshots(stream)

    async def delete_snapshots(self, fence: Fence, refs: Sequence[SnapshotRef]) -> None:
        await self._inner.delete_snapshots(fence, refs)

    async def put_catalogue(self, fence: Fence, entries: Sequence[CatalogueEntry]) -> None:
        await self._inner.put_catalogue(fence, entries)

    async def forget_epoch(self, fence: Fence, start: EpochStart) -> Head:
        return await self._inner.forget_epoch(fence, start)

    async def forget_salvage(self, fence: Fence, piece: Salvage) -> Head:
        return await self._inner.forget_salvage(fence, piece)

    async def delete_diverged(self, fence: Fence, refs: Sequence[SegmentRef]) -> None:
        await self._inner.delete_diverged(fence, refs)

    async def inspect_head(self, stream: str) -> FoundHead:
        return await self._inner.inspect_head(stream)

    async def mend_head(self, fence: Fence, found: FoundHead, head: Head) -> Head:
        return await self._inner.mend_head(fence, found, head)

    async def list_catalogue(self, stream: str, after: str, limit: int) -> tuple[FoundEntry, ...]:
        return await self._inner.list_catalogue(stream, after, limit)

    async def inspect_catalogue(self, stream: str, agent: str) -> FoundEntry:
        return await self._inner.inspect_catalogue(stream, agent)

    async def mend_catalogue(self, fence: Fence, found: FoundEntry, entry: CatalogueEntry | None) -> None:
        await self._inner.mend_catalogue(fence, found, entry)

    async def close(self) -> None:
        await self._inner.close()


def _check(ref: Ref, region: str, wraps: tuple[Wrap, ...]) -> None:
    """Raises Unavailable: a copy that cannot be opened when it is needed is no copy."""
    lacks = store_lacks(region, tuple(wrap.region for wrap in wraps))
    if lacks is not None:
        raise Unavailable(f"{ref.key} is not put into {region}: {lacks}", hint=f"bring the KMS of {region} back")


def _named(error: DrError, ref: Ref, region: str) -> DrError:
    return type(error)(f"object {ref.key} in {region}: {error.message}", hint=error.hint)


async def _work(size: int, act: Callable[[], _T]) -> _T:
    return act() if size < IN_THREAD_BYTES else await asyncio.to_thread(act)


def _seal(key: DataKey, wraps: tuple[Wrap, ...], place: Place, data: bytes) -> bytes:
    return sealing.seal(key, sealing.envelope_for(key, wraps, place, data), data)
