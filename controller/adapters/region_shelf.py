"""The half of ``AwsRegionStore`` that keeps a region's copy bounded: base, deletion, snapshots, catalogue.

Deleting is the one thing that cannot be taken back, and S3 knows no fence. So every deletion is preceded by a consistent read
of the head: what lies before the base that it records, under our epoch, is not read by anybody any more. A base only rises,
so a deletion that arrives late deletes nothing else. So it is with salvage that was let go of: no history takes up what was cut
off, whatever becomes of the head afterwards.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from controller.adapters import catalogue_item, head_item, head_rules
from controller.adapters.aws_errors import translate
from controller.domain.model import Baseline, CatalogueEntry, EpochStart, Fence, Head, Salvage, SegmentRef, SnapshotRef
from controller.errors import Unavailable

if TYPE_CHECKING:
    from controller.adapters.aws_call import Call

_SNAPSHOT_NAME = re.compile(r"(\d{16})-(\d{16})\.snap")
_UNPROCESSED_PAUSE_SECONDS = 0.1


class AwsShelf:
    """Mixed into ``AwsRegionStore``, whose clients and helpers it uses."""

    _s3: Any
    _dynamodb: Any
    _region: str
    _group: str
    _bucket: str
    _table: str
    _prefix: str

    if TYPE_CHECKING:

        async def _put_object(self, fence: Fence, ref: SegmentRef | SnapshotRef, data: bytes) -> None: ...
        async def _get_object(self, ref: SegmentRef | SnapshotRef) -> bytes: ...
        async def _list_page(self, folder: str, after: str, size: int) -> tuple[list[str], bool]: ...
        async def _read_head(self, call: Call, stream: str) -> Head: ...
        async def read_head(self, stream: str) -> Head: ...
        async def _update_head(
            self,
            fence: Fence,
            request: dict[str, Any],
            settled: Callable[[Head], bool],
            grown: Callable[[Head], Head] | None = None,
        ) -> Head: ...
        def _key(self, ref: SegmentRef | SnapshotRef) -> str: ...
        def _call(self, operation: str, target: str, size: int = 0) -> Call: ...

    async def set_base(self, fence: Fence, expected: Head, to: Baseline) -> Head:
        head_rules.check_baseline(fence, expected, to)
        return await self._update_head(
            fence,
            head_item.base_update(self._group, fence, expected, to),
            lambda head: head_rules.settled_base(head, fence, expected, to),
        )

    async def delete_segments(self, fence: Fence, refs: Sequence[SegmentRef]) -> None:
        head_rules.check_deletion(fence, refs)
        head_rules.check_deletable(await self.read_head(fence.stream), fence, refs)
        await self._delete(refs)

    async def put_snapshot(self, fence: Fence, ref: SnapshotRef, data: bytes) -> None:
        await self._put_object(fence, ref, data)

    async def get_snapshot(self, ref: SnapshotRef) -> bytes:
        return await self._get_object(ref)

    async def list_snapshots(self, stream: str) -> tuple[SnapshotRef, ...]:
        head_rules.check_name("stream", stream)
        folder = f"{self._prefix}/{stream}/snapshots/"
        keys, _ = await self._list_page(folder, folder, head_rules.DELETE_MAX)
        found = (_SNAPSHOT_NAME.fullmatch(key.removeprefix(folder)) for key in keys)
        refs = [SnapshotRef(stream, int(match[1]), int(match[2])) for match in found if match is not None]
        return tuple(ref for ref in refs if ref.seq and ref.epoch)

    async def delete_snapshots(self, fence: Fence, refs: Sequence[SnapshotRef]) -> None:
        head_rules.check_deletion(fence, refs)
        head_rules.check_unnamed(await self.read_head(fence.stream), fence, refs)
        await self._delete(refs)

    async def _delete(self, refs: Sequence[SegmentRef] | Sequence[SnapshotRef]) -> None:
        """Absent objects count as deleted, so a repetition is harmless."""
        if not refs:
            return
        request = {"Objects": [{"Key": self._key(ref)} for ref in refs], "Quiet": True}
        call = self._call("DeleteObjects", f"{len(refs)} objects from {refs[0].key}")
        with call.settled():
            async for attempt in call.retries():
                with attempt:
                    answer = await call.attempt(self._s3.delete_objects(Bucket=self._bucket, Delete=request), mutates=True)
                    failed = answer.get("Errors", ())
                    if failed:
                        raise Unavailable(
                            f"{len(failed)} of {len(refs)} objects were not deleted in {self._region}: "
                            f"{failed[0].get('Key')}: {failed[0].get('Code')}",
                            hint="check that the controller may delete objects; it is tried again",
                        )

    async def forget_epoch(self, fence: Fence, start: EpochStart) -> Head:
        head_rules.check_fence(fence)
        return await self._update_head(
            fence,
            head_item.forget_update(self._group, fence, start),
            lambda head: head_rules.settled_forget(head, fence, start),
        )

    async def forget_salvage(self, fence: Fence, piece: Salvage) -> Head:
        head_rules.check_fence(fence)
        head = await self.read_head(fence.stream)
        if head_rules.settled_salvage(head, fence, piece):
            return head
        return await self._update_head(
            fence,
            head_item.forget_salvage_update(self._group, fence, head.salvage.index(piece), piece),
            lambda head: head_rules.settled_salvage(head, fence, piece),
        )

    async def delete_diverged(self, fence: Fence, refs: Sequence[SegmentRef]) -> None:
        head_rules.check_deletion(fence, refs)
        head_rules.check_diverged(await self.read_head(fence.stream), fence, refs)
        await self._delete(refs)

    async def put_catalogue(self, fence: Fence, entries: Sequence[CatalogueEntry]) -> None:
        head_rules.check_fence(fence)
        head_rules.check_held(await self.read_head(fence.stream), fence)
        items = [catalogue_item.catalogue_to_item(self._group, fence, entry) for entry in entries]
        for at in range(0, len(items), catalogue_item.BATCH_ITEMS):
            await self._write_batch(items[at : at + catalogue_item.BATCH_ITEMS])

    async def _write_batch(self, items: list[dict[str, Any]]) -> None:
        left: list[dict[str, Any]] = [{"PutRequest": {"Item": item}} for item in items]
        call = self._call("BatchWriteItem", f"{len(items)} catalogue items")
        async for attempt in call.retries():
            with attempt:
                while left:
                    try:
                        answer = await call.attempt(
                            self._dynamodb.batch_write_item(RequestItems={self._table: left}), mutates=False
                        )
                    except ClientError as error:
                        raise translate(error, doing="BatchWriteItem") from error
                    left = answer.get("UnprocessedItems", {}).get(self._table, [])
                    if left:
                        await asyncio.sleep(_UNPROCESSED_PAUSE_SECONDS)
