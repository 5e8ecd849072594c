"""The reference region store: a dict behind the same rules, errors and read-backs as S3 and DynamoDB.

``MemoryStore`` is the far side: one per region, shared by all clients of it. It survives its clients and can be damaged by
tests. ``MemoryRegionStore`` is one client of it. Its gate decides how the network behaves: before a request arrives and
before its answer returns.
"""

from __future__ import annotations

import asyncio
import bisect
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from controller.adapters import head_rules
from controller.adapters.memory.gate import Gate
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
from controller.errors import Corrupt, NotFound, OutcomeUnknown, Unavailable
from controller.ports import FoundEntry, FoundHead, FoundObject

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """``sha256`` is what was written beside the bytes, so that later damage to the bytes shows."""

    data: bytes
    sha256: str


def _tag(there: StoredObject) -> str:
    return f"{hashlib.sha256(there.data).hexdigest()}/{there.sha256}"


class MemoryStore:
    """One region's bucket and table. All methods are atomic: nothing in them awaits."""

    def __init__(self, region: str) -> None:
        self.region = region
        self.objects: dict[SegmentRef, StoredObject] = {}
        self.heads: dict[str, Head] = {}
        self.snapshots: dict[SnapshotRef, StoredObject] = {}
        self.catalogue: dict[tuple[str, str], CatalogueEntry] = {}
        """(stream, agent) → the item."""
        self._order: dict[str, list[tuple[int, int]]] = {}

    def put(self, ref: SegmentRef, data: bytes) -> None:
        """``If-None-Match: *``; equal content is success. Raises Conflict."""
        digest = hashlib.sha256(data).hexdigest()
        there = self.objects.get(ref)
        if there is None:
            self.objects[ref] = StoredObject(bytes(data), digest)
            bisect.insort(self._order.setdefault(ref.stream, []), (ref.seq, ref.epoch))
        elif there.sha256 != digest:
            raise head_rules.other_content(ref.key, self.region, there.sha256, digest)

    def get(self, ref: SegmentRef) -> bytes:
        """Raises NotFound, Corrupt."""
        there = self.objects.get(ref)
        if there is None:
            raise NotFound(
                f"object {ref.key} in {self.region} does not exist", hint="list what exists: it may lie under another epoch"
            )
        if hashlib.sha256(there.data).hexdigest() != there.sha256:
            raise Corrupt(
                f"object {ref.key} in {self.region}: {len(there.data)} bytes that are not what was written",
                hint="do not use it; copy the segment from another region after comparing hashes",
            )
        return there.data

    def refs(self, stream: str, first_seq: int, limit: int) -> tuple[SegmentRef, ...]:
        order = self._order.get(stream, [])
        start = bisect.bisect_left(order, (first_seq, 0))
        return tuple(SegmentRef(stream, seq, epoch) for seq, epoch in order[start : start + max(0, limit)])

    def head(self, stream: str) -> Head:
        return self.heads.get(stream, Head(stream))

    def update(self, stream: str, settled: Callable[[Head], bool], after: Callable[[Head], Head]) -> Head:
        """One conditional update with its read-back. ``settled`` raises FenceLost and Conflict. Raises Refused when the
        head grows too long.
        """
        head = self.head(stream)
        if settled(head):
            return head
        changed = after(head)
        if _entries(changed) > _entries(head):  # a full head must still be fenced and advanced
            head_rules.check_size(changed, self.region)
        self.heads[stream] = changed
        return changed

    def delete(self, fence: Fence, refs: Sequence[SegmentRef]) -> None:
        """Raises FenceLost, Conflict, Refused."""
        head_rules.check_deletable(self.head(fence.stream), fence, refs)
        for ref in refs:
            if ref in self.objects:
                self.drop(ref)

    def delete_diverged(self, fence: Fence, refs: Sequence[SegmentRef]) -> None:
        """Raises FenceLost, Conflict, Refused."""
        head_rules.check_diverged(self.head(fence.stream), fence, refs)
        for ref in refs:
            if ref in self.objects:
                self.drop(ref)

    def put_snapshot(self, ref: SnapshotRef, data: bytes) -> None:
        """Raises Conflict."""
        digest = hashlib.sha256(data).hexdigest()
        there = self.snapshots.setdefault(ref, StoredObject(bytes(data), digest))
        if there.sha256 != digest:
            raise head_rules.other_content(ref.key, self.region, there.sha256, digest)

    def get_snapshot(self, ref: SnapshotRef) -> bytes:
        """Raises NotFound, Corrupt."""
        there = self.snapshots.get(ref)
        if there is None:
            raise NotFound(f"object {ref.key} in {self.region} does not exist", hint="use an older snapshot")
        if hashlib.sha256(there.data).hexdigest() != there.sha256:
            raise Corrupt(
                f"object {ref.key} in {self.region}: {len(there.data)} bytes that are not what was written",
                hint="do not use it; use an older snapshot",
            )
        return there.data

    def delete_snapshots(self, fence: Fence, refs: Sequence[SnapshotRef]) -> None:
        """Raises FenceLost, Conflict, Refused."""
        head_rules.check_unnamed(self.head(fence.stream), fence, refs)
        for ref in refs:
            self.snapshots.pop(ref, None)

    def put_catalogue(self, fence: Fence, entries: Sequence[CatalogueEntry]) -> None:
        """Raises FenceLost, Conflict."""
        head_rules.check_held(self.head(fence.stream), fence)
        for entry in entries:
            self.catalogue[fence.stream, entry.agent] = replace(entry, by_epoch=fence.epoch)

    def list_catalogue(self, stream: str, after: str, limit: int) -> tuple[FoundEntry, ...]:
        """Ascending by the names in UTF-8."""
        names = sorted((agent for name, agent in self.catalogue if name == stream), key=str.encode)
        later = [name for name in names if name.encode() > after.encode()]
        return tuple(self.inspect_catalogue(stream, name) for name in later[:limit])

    def inspect_catalogue(self, stream: str, agent: str) -> FoundEntry:
        there = self.catalogue.get((stream, agent))
        return FoundEntry(agent, there, "", there)

    def mend_catalogue(self, fence: Fence, found: FoundEntry, entry: CatalogueEntry | None) -> None:
        """Raises FenceLost, Conflict."""
        head_rules.check_held(self.head(fence.stream), fence)
        wanted = None if entry is None else replace(entry, by_epoch=fence.epoch)
        there = self.catalogue.get((fence.stream, found.agent))
        if there == wanted:
            return
        if there != found.exact:
            raise head_rules.not_as_found(f"catalogue item of {found.agent!a}", self.region)
        if wanted is None:
            del self.catalogue[fence.stream, found.agent]
        else:
            self.catalogue[fence.stream, found.agent] = wanted

    def inspect(self, ref: SegmentRef | SnapshotRef) -> FoundObject:
        there = self._shelf(ref).get(ref)
        return FoundObject(None, "") if there is None else FoundObject(there.data, _tag(there))

    def mend(self, ref: SegmentRef | SnapshotRef, found: FoundObject, data: bytes) -> None:
        """Raises Conflict."""
        there = self._shelf(ref).get(ref)
        digest = hashlib.sha256(data).hexdigest()
        if there is not None and there.data == data and there.sha256 == digest:
            return
        if ("" if there is None else _tag(there)) != found.tag:
            raise head_rules.not_as_found(ref.key, self.region)
        if there is None and isinstance(ref, SegmentRef):
            bisect.insort(self._order.setdefault(ref.stream, []), (ref.seq, ref.epoch))
        self._shelf(ref)[ref] = StoredObject(bytes(data), digest)

    def _shelf(self, ref: SegmentRef | SnapshotRef) -> dict[Any, StoredObject]:
        return self.objects if isinstance(ref, SegmentRef) else self.snapshots

    def mend_head(self, fence: Fence, found: FoundHead, head: Head) -> Head:
        """Raises FenceLost, Conflict."""
        wanted = head_rules.mended(head, fence)
        there = self.heads.get(fence.stream)
        if there == wanted:
            return wanted
        if there != found.exact:
            raise head_rules.not_as_found(f"head of {fence.stream}", self.region)
        self.heads[fence.stream] = wanted
        return wanted

    # ---------------------------------------------------------------------------------------------------- for tests

    def corrupt(self, ref: SegmentRef, bit: int = 0) -> None:
        """Flips one bit of the stored bytes. Raises KeyError when there is no such object."""
        there = self.objects[ref]
        data = bytearray(there.data)
        data[bit // 8] ^= 1 << (bit % 8)
        self.objects[ref] = StoredObject(bytes(data), there.sha256)

    def truncate(self, ref: SegmentRef, size: int) -> None:
        """Keeps the first ``size`` bytes."""
        there = self.objects[ref]
        self.objects[ref] = StoredObject(there.data[:size], there.sha256)

    def drop(self, ref: SegmentRef) -> None:
        """Deletes one object. Raises KeyError when there is none."""
        del self.objects[ref]
        self._order[ref.stream].remove((ref.seq, ref.epoch))

    def corrupt_snapshot(self, ref: SnapshotRef, data: bytes | None = None) -> None:
        """Flips a bit of a snapshot; ``data``: puts other bytes there that look as if they had been written so."""
        there = self.snapshots[ref]
        flipped = bytes([there.data[0] ^ 1]) + there.data[1:]
        digest = there.sha256 if data is None else hashlib.sha256(data).hexdigest()
        self.snapshots[ref] = StoredObject(flipped if data is None else data, digest)

    def copy(self, region: str | None = None) -> MemoryStore:
        """An independent store with the same content, for example to compare with later."""
        other = MemoryStore(region or self.region)
        other.objects = dict(self.objects)
        other.heads = dict(self.heads)
        other.snapshots = dict(self.snapshots)
        other.catalogue = dict(self.catalogue)
        other._order = {stream: list(order) for stream, order in self._order.items()}
        return other


def _entries(head: Head) -> int:
    """How many things a head lists: what makes its item longer and longer."""
    return len(head.epochs) + sum(1 + len(cut.epochs) for cut in head.salvage) + len(head.snapshots)


class MemoryRegionStore:
    """One client of a ``MemoryStore``.

    A request that the gate holds up past ``call_timeout_seconds`` is *not* withdrawn: the caller learns ``Unavailable``
    (for a mutating call ``OutcomeUnknown``) and the request may still arrive later, as it may on a real network. None: the
    gate alone decides how long calls take.
    """

    def __init__(self, server: MemoryStore, gate: Gate, *, call_timeout_seconds: float | None = 2.0) -> None:
        self._server = server
        self._gate = gate
        self._timeout = call_timeout_seconds
        self._in_flight: set[asyncio.Task[object]] = set()

    @property
    def region(self) -> str:
        return self._server.region

    async def put_segment(self, fence: Fence, ref: SegmentRef, data: bytes) -> None:
        head_rules.check_put(fence, ref)
        await self._call("put_segment", lambda: self._server.put(ref, data), mutates=True)

    async def get_segment(self, ref: SegmentRef) -> bytes:
        head_rules.check_ref(ref)
        return await self._call("get_segment", lambda: self._server.get(ref))

    async def list_segments(self, stream: str, first_seq: int, limit: int = 1000) -> tuple[SegmentRef, ...]:
        head_rules.check_name("stream", stream)
        return await self._call("list_segments", lambda: self._server.refs(stream, first_seq, limit))

    async def read_head(self, stream: str) -> Head:
        head_rules.check_name("stream", stream)
        return await self._call("read_head", lambda: self._server.head(stream))

    async def advance(self, fence: Fence, commit: Commit) -> Head:
        head_rules.check_commit(fence, commit)
        return await self._update(
            "advance",
            fence,
            lambda head: head_rules.settled_advance(head, fence, commit),
            lambda head: head_rules.after_advance(head, fence, commit),
        )

    async def fence(self, fence: Fence) -> Head:
        head_rules.check_fence(fence)
        return await self._update(
            "fence", fence, lambda head: head_rules.settled_fence(head, fence), lambda head: head_rules.after_fence(head, fence)
        )

    async def realign(self, fence: Fence, expected: Head, to: Realignment) -> Head:
        head_rules.check_realignment(fence, expected, to)
        return await self._update(
            "realign",
            fence,
            lambda head: head_rules.settled_realign(head, fence, expected, to),
            lambda head: head_rules.after_realign(head, fence, to),
        )

    async def set_base(self, fence: Fence, expected: Head, to: Baseline) -> Head:
        head_rules.check_baseline(fence, expected, to)
        return await self._update(
            "set_base",
            fence,
            lambda head: head_rules.settled_base(head, fence, expected, to),
            lambda head: head_rules.after_base(head, to),
        )

    async def delete_segments(self, fence: Fence, refs: Sequence[SegmentRef]) -> None:
        head_rules.check_deletion(fence, refs)
        await self._call("delete_segments", lambda: self._server.delete(fence, refs), mutates=True)

    async def put_snapshot(self, fence: Fence, ref: SnapshotRef, data: bytes) -> None:
        head_rules.check_put(fence, ref)
        await self._call("put_snapshot", lambda: self._server.put_snapshot(ref, data), mutates=True)

    async def get_snapshot(self, ref: SnapshotRef) -> bytes:
        head_rules.check_ref(ref)
        return await self._call("get_snapshot", lambda: self._server.get_snapshot(ref))

    async def list_snapshots(self, stream: str) -> tuple[SnapshotRef, ...]:
        head_rules.check_name("stream", stream)
        server = self._server
        return await self._call(
            "list_snapshots", lambda: tuple(sorted(ref for ref in server.snapshots if ref.stream == stream))[:1000]
        )

    async def delete_snapshots(self, fence: Fence, refs: Sequence[SnapshotRef]) -> None:
        head_rules.check_deletion(fence, refs)
        await self._call("delete_snapshots", lambda: self._server.delete_snapshots(fence, refs), mutates=True)

    async def put_catalogue(self, fence: Fence, entries: Sequence[CatalogueEntry]) -> None:
        head_rules.check_fence(fence)
        await self._call("put_catalogue", lambda: self._server.put_catalogue(fence, entries), mutates=True)

    async def forget_epoch(self, fence: Fence, start: EpochStart) -> Head:
        head_rules.check_fence(fence)
        return await self._update(
            "forget_epoch", fence, lambda head: head_rules.settled_forget(head, fence, start), head_rules.after_forget
        )

    async def forget_salvage(self, fence: Fence, piece: Salvage) -> Head:
        head_rules.check_fence(fence)
        return await self._update(
            "forget_salvage",
            fence,
            lambda head: head_rules.settled_salvage(head, fence, piece),
            lambda head: head_rules.after_salvage(head, piece),
        )

    async def delete_diverged(self, fence: Fence, refs: Sequence[SegmentRef]) -> None:
        head_rules.check_deletion(fence, refs)
        await self._call("delete_diverged", lambda: self._server.delete_diverged(fence, refs), mutates=True)

    async def inspect_object(self, ref: SegmentRef | SnapshotRef) -> FoundObject:
        head_rules.check_ref(ref)
        return await self._call("inspect_object", lambda: self._server.inspect(ref))

    async def mend_object(self, ref: SegmentRef | SnapshotRef, found: FoundObject, data: bytes) -> None:
        head_rules.check_ref(ref)
        await self._call("mend_object", lambda: self._server.mend(ref, found, data), mutates=True)

    async def inspect_head(self, stream: str) -> FoundHead:
        head_rules.check_name("stream", stream)
        head = await self._call("inspect_head", lambda: self._server.heads.get(stream))
        return FoundHead(head or Head(stream), "", head)

    async def mend_head(self, fence: Fence, found: FoundHead, head: Head) -> Head:
        head_rules.check_mend(fence, found, head)
        return await self._call("mend_head", lambda: self._server.mend_head(fence, found, head), mutates=True)

    async def list_catalogue(self, stream: str, after: str, limit: int) -> tuple[FoundEntry, ...]:
        head_rules.check_page(stream, limit)
        return await self._call("list_catalogue", lambda: self._server.list_catalogue(stream, after, limit))

    async def inspect_catalogue(self, stream: str, agent: str) -> FoundEntry:
        head_rules.check_name("stream", stream)
        return await self._call("inspect_catalogue", lambda: self._server.inspect_catalogue(stream, agent))

    async def mend_catalogue(self, fence: Fence, found: FoundEntry, entry: CatalogueEntry | None) -> None:
        head_rules.check_fence(fence)
        head_rules.check_entry(found.agent, None if entry is None else entry.agent)
        await self._call("mend_catalogue", lambda: self._server.mend_catalogue(fence, found, entry), mutates=True)

    async def close(self) -> None:
        """Nothing to release. Requests in flight stay so: closing a client does not call them back."""

    async def _update(self, op: str, fence: Fence, settled: Callable[[Head], bool], after: Callable[[Head], Head]) -> Head:
        return await self._call(op, lambda: self._server.update(fence.stream, settled, after), mutates=True)

    async def _call(self, op: str, effect: Callable[[], T], *, mutates: bool = False) -> T:
        if self._timeout is None:
            return await self._travel(op, effect, mutates)
        request = asyncio.ensure_future(self._travel(op, effect, mutates))
        self._in_flight.add(request)
        request.add_done_callback(self._landed)
        try:
            async with asyncio.timeout(self._timeout):
                return await asyncio.shield(request)
        except TimeoutError as error:
            message = f"{op} in {self.region}: no answer within {self._timeout} s"
            if mutates:
                raise OutcomeUnknown(message, hint="it may have been applied: read before repeating") from error
            raise Unavailable(message, hint="wait, or read from another region") from error

    def _landed(self, request: asyncio.Task[object]) -> None:
        self._in_flight.discard(request)
        if not request.cancelled():
            request.exception()  # somebody has seen it, or nobody waits any more: either way it is not "never retrieved"

    async def _travel(self, op: str, effect: Callable[[], T], mutates: bool) -> T:
        await self._gate.before(op)
        try:
            answer = effect()
        except Exception:
            await self._answer(op, mutates)
            raise
        await self._answer(op, mutates)
        return answer

    async def _answer(self, op: str, mutates: bool) -> None:
        try:
            await self._gate.after(op)
        except Unavailable as error:
            if mutates:
                raise OutcomeUnknown(
                    f"{op} in {self.region}: the answer was lost", hint="it may have been applied: read before repeating"
                ) from error
            raise
