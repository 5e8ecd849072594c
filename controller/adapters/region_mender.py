"""The part of ``AwsRegionStore`` that looks at damage and replaces it; rules: ``ports.RegionMender``."""

from __future__ import annotations

import asyncio
import hashlib
from base64 import b64encode
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from controller.adapters import catalogue_item, head_item, head_rules
from controller.domain.model import CatalogueEntry, Fence, Head, SegmentRef, SnapshotRef
from controller.errors import Corrupt, NotFound
from controller.ports import FoundEntry, FoundHead, FoundObject

if TYPE_CHECKING:
    from controller.adapters.aws_call import Call

_SLOWEST_BYTES_PER_SECOND = 2 * 1024**2


class AwsMender:
    """Mixed into ``AwsRegionStore``, whose clients and helpers it uses."""

    _s3: Any
    _dynamodb: Any
    _region: str
    _group: str
    _bucket: str
    _table: str

    if TYPE_CHECKING:

        def _key(self, ref: SegmentRef | SnapshotRef) -> str: ...
        def _call(self, operation: str, target: str, size: int = 0) -> Call: ...
        async def read_head(self, stream: str) -> Head: ...

    async def inspect_object(self, ref: SegmentRef | SnapshotRef) -> FoundObject:
        head_rules.check_ref(ref)
        call = self._call("GetObject", self._key(ref))
        async for attempt in call.retries():
            with attempt:
                try:
                    return await self._inspect_once(call, ref)
                except NotFound:
                    return FoundObject(None, "")
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _inspect_once(self, call: Call, ref: SegmentRef | SnapshotRef) -> FoundObject:
        answer = await call.attempt(self._s3.get_object(Bucket=self._bucket, Key=self._key(ref)))
        call.extend(int(answer["ContentLength"]) / _SLOWEST_BYTES_PER_SECOND)
        async with answer["Body"] as stream:
            data: bytes = await call.attempt(stream.read())
        return FoundObject(data, str(answer["ETag"]))

    async def mend_object(self, ref: SegmentRef | SnapshotRef, found: FoundObject, data: bytes) -> None:
        head_rules.check_ref(ref)
        digest = await asyncio.to_thread(hashlib.sha256, data)
        condition = {"IfMatch": found.tag} if found.tag else {"IfNoneMatch": "*"}
        call = self._call("PutObject", self._key(ref), len(data))
        with call.settled():
            async for attempt in call.retries():
                with attempt:
                    try:
                        request = self._s3.put_object(
                            Bucket=self._bucket,
                            Key=self._key(ref),
                            Body=data,
                            ContentLength=len(data),
                            ChecksumAlgorithm="SHA256",
                            ChecksumSHA256=b64encode(digest.digest()).decode(),
                            Metadata={"sha256": digest.hexdigest(), "writer": "repair"},
                            **condition,
                        )
                        await call.attempt(request, mutates=True)
                    except (ClientError, NotFound):
                        await self._check_mended(call, ref, data)
                    return
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _check_mended(self, call: Call, ref: SegmentRef | SnapshotRef, data: bytes) -> None:
        """A condition failed: an earlier attempt of ours was applied, or somebody changed the object. Raises Conflict."""
        try:
            there = (await self._inspect_once(call, ref)).data
        except NotFound:
            there = None
        if there != data:
            raise head_rules.not_as_found(self._key(ref), self._region)

    async def inspect_head(self, stream: str) -> FoundHead:
        head_rules.check_name("stream", stream)
        call = self._call("GetItem", f"{self._group}#{stream}")
        async for attempt in call.retries():
            with attempt:
                return await self._inspect_head_once(call, stream)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _inspect_head_once(self, call: Call, stream: str) -> FoundHead:
        request = self._dynamodb.get_item(
            TableName=self._table, Key=head_item.head_key(self._group, stream), ConsistentRead=True
        )
        item: dict[str, Any] = (await call.attempt(request)).get("Item") or {}
        try:
            return FoundHead(head_item.head_from_item(stream, item), "", item)
        except Corrupt as error:
            return FoundHead(None, error.message, item)

    async def mend_head(self, fence: Fence, found: FoundHead, head: Head) -> Head:
        head_rules.check_mend(fence, found, head)
        wanted = head_rules.mended(head, fence)
        exact = _attributes(found.exact)
        fresh = head_item.head_to_item(self._group, wanted)
        request: dict[str, Any] = {"Item": {**exact, **fresh}, **_as_found(exact, {**exact, **fresh})}
        call = self._call("PutItem", f"{self._group}#{fence.stream} by {fence.writer}")
        with call.settled():
            async for attempt in call.retries():
                with attempt:
                    try:
                        await call.attempt(self._dynamodb.put_item(TableName=self._table, **request), mutates=True)
                    except ClientError:
                        there = await self._inspect_head_once(call, fence.stream)
                        if there.head != wanted:
                            raise head_rules.not_as_found(f"head of {fence.stream}", self._region) from None
                    return wanted
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def list_catalogue(self, stream: str, after: str, limit: int) -> tuple[FoundEntry, ...]:
        head_rules.check_page(stream, limit)
        found: list[FoundEntry] = []
        start = catalogue_item.catalogue_key(self._group, stream, after) if after else None
        while len(found) < limit:
            items, start = await self._query(stream, start, limit - len(found))
            found += [catalogue_item.found_entry(catalogue_item.agent_of(item), item) for item in items]
            if start is None:
                break
        return tuple(found)

    async def _query(
        self, stream: str, start: dict[str, Any] | None, limit: int
    ) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """At most 1 MiB of items, and where the next ones begin."""
        request: dict[str, Any] = {
            "TableName": self._table,
            "KeyConditionExpression": "#pk = :pk AND begins_with(#sk, :agents)",
            "ExpressionAttributeNames": {"#pk": "pk", "#sk": "sk"},
            "ExpressionAttributeValues": {
                ":pk": {"S": f"{self._group}#{stream}"},
                ":agents": {"S": catalogue_item.SORT_PREFIX},
            },
            "ConsistentRead": True,
            "Limit": limit,
        }
        if start is not None:
            request["ExclusiveStartKey"] = start
        call = self._call("Query", f"the catalogue of {self._group}#{stream}")
        async for attempt in call.retries():
            with attempt:
                answer = await call.attempt(self._dynamodb.query(**request))
                return answer.get("Items", []), answer.get("LastEvaluatedKey")
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def inspect_catalogue(self, stream: str, agent: str) -> FoundEntry:
        head_rules.check_name("stream", stream)
        call = self._call("GetItem", f"the catalogue of {self._group}#{stream}")
        async for attempt in call.retries():
            with attempt:
                return await self._inspect_entry_once(call, stream, agent)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _inspect_entry_once(self, call: Call, stream: str, agent: str) -> FoundEntry:
        key = catalogue_item.catalogue_key(self._group, stream, agent)
        answer = await call.attempt(self._dynamodb.get_item(TableName=self._table, Key=key, ConsistentRead=True))
        return catalogue_item.found_entry(agent, answer.get("Item"))

    async def mend_catalogue(self, fence: Fence, found: FoundEntry, entry: CatalogueEntry | None) -> None:
        head_rules.check_fence(fence)
        head_rules.check_entry(found.agent, None if entry is None else entry.agent)
        head_rules.check_held(await self.read_head(fence.stream), fence)
        exact = _attributes(found.exact)
        fresh = {} if entry is None else catalogue_item.catalogue_to_item(self._group, fence, entry)
        condition = {"TableName": self._table, **_as_found(exact, {**exact, **fresh})}
        call = self._call("PutItem" if fresh else "DeleteItem", f"catalogue item of {found.agent!a}")
        with call.settled():
            async for attempt in call.retries():
                with attempt:
                    try:
                        if fresh:
                            sent = self._dynamodb.put_item(Item={**exact, **fresh}, **condition)
                        elif exact:
                            key = catalogue_item.catalogue_key(self._group, fence.stream, found.agent)
                            sent = self._dynamodb.delete_item(Key=key, **condition)
                        else:
                            return
                        await call.attempt(sent, mutates=True)
                    except ClientError:
                        there = await self._inspect_entry_once(call, fence.stream, found.agent)
                        if there.exact != {**exact, **fresh} if fresh else there.exact:
                            raise head_rules.not_as_found(f"catalogue item of {found.agent!a}", self._region) from None
                    return
        raise AssertionError("unreachable: the last attempt returns or raises")


def _attributes(exact: object) -> dict[str, Any]:
    return dict(exact) if isinstance(exact, dict) else {}


def _as_found(exact: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The condition that an item still is what was found: every attribute equal, and none that it did not have."""
    names = sorted(set(exact) | set(wanted))
    conditions = [f"#n{at} = :v{at}" if name in exact else f"attribute_not_exists(#n{at})" for at, name in enumerate(names)]
    values = {f":v{at}": exact[name] for at, name in enumerate(names) if name in exact}
    request: dict[str, Any] = {
        "ConditionExpression": " AND ".join(conditions),
        "ExpressionAttributeNames": {f"#n{at}": name for at, name in enumerate(names)},
    }
    if values:
        request["ExpressionAttributeValues"] = values
    return request
