"""One region's S3 bucket and DynamoDB table as a ``RegionStore``: objects first, then one conditional update of the head
(DESIGN section 4).

How a call behaves:

- Every call has one deadline (``call_timeout_seconds``, plus an allowance for the bytes that it moves). Inside it there are
  a few attempts, and each gets only a share of what is left, so that an attempt that hangs leaves time to read back.
- botocore's own retries are off. An SDK that repeats a conditional write turns "applied, answer lost" into "condition
  failed"; here every repetition is preceded by a read-back, which can tell the two apart.
- A failed condition is never an answer by itself: the head that it returns (or a consistent read) is asked "is it mine?"
  (``head_rules``).
- A mutating call that may have been applied and could not be settled ends as ``OutcomeUnknown``, whatever its last error was.

Objects need no read-back before a repetition: a key names stream, sequence number and epoch, is written once, and what is
there is compared by content. Nor does S3 check the fence: an object under a stale epoch's key is outside of every history
until a head says otherwise.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import re
from base64 import b64encode
from binascii import unhexlify
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import quote

import aioboto3
from aiobotocore.config import AioConfig
from botocore.exceptions import ClientError
from botocore.handlers import add_expect_header

from controller.adapters import head_item, head_rules, multipart
from controller.adapters.aws_call import Call
from controller.adapters.aws_errors import SDK_ERRORS, translate
from controller.adapters.aws_wire import Wire
from controller.adapters.region_mender import AwsMender
from controller.adapters.region_shelf import AwsShelf
from controller.domain.model import Commit, Fence, Head, Realignment, SegmentRef, SnapshotRef
from controller.errors import Corrupt, NotFound, Refused, Unavailable

OBJECT_MAX_BYTES = 5 * 1024**3
"""Most that one PutObject takes. Source: S3 user guide, "Uploading objects"."""
SLOWEST_BYTES_PER_SECOND = 2 * 1024**2
"""A transfer slower than this counts as no answer. It turns an object's size into an allowance on top of the call's
deadline.
"""
MULTIPART_FROM_BYTES = 16 * 1024**2
"""Larger objects go up in parts: several at a time, each with its own checksum, and one that fails costs one part's time."""
HASH_IN_THREAD_BYTES = 1024**2
"""sha256 of 1 MiB takes about 0.6 ms; longer ones leave the event loop, which also keeps the lease."""
PAGE_KEYS = 1000
DIGEST_METADATA = "sha256"

_SEGMENT_NAME = re.compile(r"(\d{16})-(\d{16})\.seg")


class AwsRegionStore(AwsShelf, AwsMender):
    """S3 and DynamoDB of one region. ``start()`` before use, ``close()`` after it (or ``async with``).

    Object key: ``{prefix}/{group}/{stream}/{seq}-{epoch}.seg``; head item: see ``head_item``. ``session`` may be shared
    between the regions of one process, which saves each of them the loading of the SDK's service descriptions.
    """

    def __init__(
        self,
        region: str,
        *,
        group: str,
        bucket: str,
        table: str,
        prefix: str = "dr",
        aws_region: str,
        s3_endpoint: str | None = None,
        dynamodb_endpoint: str | None = None,
        call_timeout_seconds: float,
        connect_timeout_seconds: float,
        max_pool_connections: int,
        object_max_bytes: int = OBJECT_MAX_BYTES,
        session: aioboto3.Session | None = None,
    ) -> None:
        head_rules.check_name("group", group)
        self._region = region
        self._group = group
        self._bucket = bucket
        self._table = table
        self._prefix = f"{prefix}/{group}"
        self._aws_region = aws_region
        self._s3_endpoint = s3_endpoint
        self._dynamodb_endpoint = dynamodb_endpoint
        self._call_seconds = call_timeout_seconds
        self._object_max_bytes = object_max_bytes
        self._session = session
        self._config = AioConfig(
            connect_timeout=min(connect_timeout_seconds, call_timeout_seconds),
            read_timeout=call_timeout_seconds,
            max_pool_connections=max_pool_connections,
            tcp_keepalive=True,
            retries={"mode": "standard", "total_max_attempts": 1},  # ours instead: each with a read-back, inside one deadline
            request_checksum_calculation="when_required",  # we send our own sha256; a crc32 on top would hash each body again
            response_checksum_validation="when_required",  # likewise: get_segment compares the sha256 in the metadata
            s3={"addressing_style": "path"} if s3_endpoint else {"addressing_style": "auto"},
        )
        self._open = AsyncExitStack()
        self._s3: Any = None
        self._dynamodb: Any = None
        self._wire: Wire | None = None
        """For the two calls that every segment makes; None: the SDK makes them, too."""

    @property
    def region(self) -> str:
        return self._region

    async def start(self) -> None:
        """Opens the two clients. Sends nothing: a region that is down now must not keep a controller from starting."""
        if self._s3 is not None:
            return
        session = self._session or aioboto3.Session()
        try:
            self._s3 = await self._open.enter_async_context(self._opening(session, "s3", self._s3_endpoint))
            self._dynamodb = await self._open.enter_async_context(self._opening(session, "dynamodb", self._dynamodb_endpoint))
            # botocore asks "100-continue?" before each body, which costs every put one more round trip, and saves nothing: our
            # bodies are small and nearly always accepted.
            self._s3.meta.events.unregister("before-call.s3", add_expect_header)
            credentials = session.get_credentials()
            self._wire = await Wire.open(
                await credentials if inspect.isawaitable(credentials) else credentials,
                self._s3,
                self._dynamodb,
                bucket=self._bucket,
                aws_region=self._aws_region,
                connect_seconds=self._config.connect_timeout,
                connections=self._config.max_pool_connections,
            )
            if self._wire is not None:
                self._open.push_async_callback(self._wire.close)
        except SDK_ERRORS as error:
            raise translate(error, doing=f"opening the clients of {self._region}") from error

    def _opening(self, session: aioboto3.Session, service: str, endpoint: str | None) -> Any:
        return session.client(service, region_name=self._aws_region, endpoint_url=endpoint, config=self._config)

    async def close(self) -> None:
        self._s3 = self._dynamodb = self._wire = None
        await self._open.aclose()

    async def __aenter__(self) -> AwsRegionStore:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ---------------------------------------------------------------------------------------------------------- segments

    async def put_segment(self, fence: Fence, ref: SegmentRef, data: bytes) -> None:
        await self._put_object(fence, ref, data)

    async def _put_object(self, fence: Fence, ref: SegmentRef | SnapshotRef, data: bytes) -> None:
        head_rules.check_put(fence, ref)
        if len(data) > self._object_max_bytes:
            raise Refused(
                f"object {ref.key} has {len(data)} bytes, one PutObject takes at most {self._object_max_bytes}",
                hint="lower stream.segment_max_bytes and stream.body_max_bytes",
            )
        digest = await _sha256(data)
        call = self._call("PutObject", self._key(ref), len(data))
        with call.settled():
            async for attempt in call.retries():
                with attempt:
                    await self._put_once(call, fence, ref, data, digest)

    async def _put_once(self, call: Call, fence: Fence, ref: SegmentRef | SnapshotRef, data: bytes, digest: str) -> None:
        if call.doubt and len(data) >= MULTIPART_FROM_BYTES and await self._digest_of(call, ref) == digest:
            return  # an attempt whose answer was lost: no need to send it all again
        try:
            metadata = {DIGEST_METADATA: digest, "writer": quote(fence.writer)}  # metadata travels in headers: ASCII
            await call.attempt(self._send_object(self._key(ref), data, digest, metadata), mutates=True)
        except ClientError:
            # Something is there: perhaps ours, of an attempt whose answer was lost (aiohttp, too, repeats a PUT on a connection
            # that broke), and nobody knows until it was looked at.
            call.doubt = True
            there = await self._digest_of(call, ref)
            if there is not None and there != digest:
                raise head_rules.other_content(self._key(ref), self._region, there, digest) from None
            if there is None:
                raise Unavailable(
                    f"object {self._key(ref)} in {self._region} was there and is gone", hint="repeat the call"
                ) from None

    async def _send_object(self, key: str, data: bytes, digest: str, metadata: dict[str, str]) -> None:
        if len(data) >= MULTIPART_FROM_BYTES:
            await multipart.put_object(self._s3, self._wire, self._bucket, key, data, metadata)
            return
        if self._wire is not None:
            await self._wire.put_object(key, data, digest, metadata)
            return
        await self._s3.put_object(
            Bucket=self._bucket,
            Key=key,
            Body=data,
            IfNoneMatch="*",
            ContentLength=len(data),
            ChecksumAlgorithm="SHA256",
            ChecksumSHA256=b64encode(unhexlify(digest)).decode(),
            Metadata=metadata,
        )

    async def _digest_of(self, call: Call, ref: SegmentRef | SnapshotRef) -> str | None:
        """Hash of the object that is there: from its metadata, or (written by something else) from its content. None: not
        there.
        """
        try:
            about = await call.attempt(self._s3.head_object(Bucket=self._bucket, Key=self._key(ref)))
            known: str | None = about["Metadata"].get(DIGEST_METADATA)
            if known is not None:
                return known
            data, _ = await self._read_once(call, ref)
        except NotFound:
            return None
        return await _sha256(data)

    async def get_segment(self, ref: SegmentRef) -> bytes:
        return await self._get_object(ref)

    async def _get_object(self, ref: SegmentRef | SnapshotRef) -> bytes:
        head_rules.check_ref(ref)
        call = self._call("GetObject", self._key(ref))
        damaged: list[Corrupt] = []
        async for attempt in call.retries():
            with attempt:
                data, digest = await self._read_once(call, ref)
                found = await _sha256(data)
                if digest is None or digest == found:
                    return data
                damaged.append(
                    Corrupt(
                        f"object {self._key(ref)} in {self._region}: {len(data)} bytes with sha256 {found[:12]}…, "
                        f"written as {digest[:12]}…",
                        hint="do not use it; copy the segment from another region after comparing hashes",
                    )
                )
                if len(damaged) > 1:  # once more, in case that it happened on the way here
                    raise damaged[-1]
                raise Unavailable(damaged[0].message, hint="repeat the call")
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _read_once(self, call: Call, ref: SegmentRef | SnapshotRef) -> tuple[bytes, str | None]:
        answer = await call.attempt(self._s3.get_object(Bucket=self._bucket, Key=self._key(ref)))
        length = int(answer["ContentLength"])
        call.extend(length / SLOWEST_BYTES_PER_SECOND)
        async with answer["Body"] as stream:
            data: bytes = await call.attempt(stream.read())
        if len(data) != length:
            raise Unavailable(
                f"object {self._key(ref)} in {self._region}: {len(data)} bytes came of {length}", hint="repeat the call"
            )
        return data, answer["Metadata"].get(DIGEST_METADATA)

    async def list_segments(self, stream: str, first_seq: int, limit: int = 1000) -> tuple[SegmentRef, ...]:
        head_rules.check_name("stream", stream)
        folder = f"{self._prefix}/{stream}/"
        # Without the dash: below every object of first_seq and above every one of first_seq - 1.
        after = f"{folder}{max(0, min(first_seq, head_rules.SEQ_MAX)):016d}"
        found: list[SegmentRef] = []
        while len(found) < limit:
            keys, more = await self._list_page(folder, after, min(PAGE_KEYS, limit - len(found)))
            found.extend(ref for key in keys if (ref := _parse(stream, key.removeprefix(folder))) is not None)
            if not more or not keys:
                break
            after = keys[-1]
        return tuple(found)

    async def _list_page(self, folder: str, after: str, size: int) -> tuple[list[str], bool]:
        """One page, with a deadline of its own: a long list is not a slow store."""
        call = self._call("ListObjectsV2", f"{folder}… after {after}")
        async for attempt in call.retries():
            with attempt:
                page = await call.attempt(
                    self._s3.list_objects_v2(Bucket=self._bucket, Prefix=folder, StartAfter=after, MaxKeys=size)
                )
                return [item["Key"] for item in page.get("Contents", ())], bool(page["IsTruncated"])
        raise AssertionError("unreachable: the last attempt returns or raises")

    # -------------------------------------------------------------------------------------------------------------- head

    async def read_head(self, stream: str) -> Head:
        head_rules.check_name("stream", stream)
        call = self._call("GetItem", f"{self._group}#{stream}")
        async for attempt in call.retries():
            with attempt:
                return await self._read_head(call, stream)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _read_head(self, call: Call, stream: str) -> Head:
        request = self._dynamodb.get_item(
            TableName=self._table, Key=head_item.head_key(self._group, stream), ConsistentRead=True
        )
        answer = await call.attempt(request)
        return head_item.head_from_item(stream, answer.get("Item"))

    async def fence(self, fence: Fence) -> Head:
        head_rules.check_fence(fence)
        return await self._update_head(
            fence, head_item.fence_update(self._group, fence), lambda head: head_rules.settled_fence(head, fence)
        )

    async def advance(self, fence: Fence, commit: Commit) -> Head:
        head_rules.check_commit(fence, commit)
        return await self._update_head(
            fence,
            head_item.advance_update(self._group, fence, commit),
            lambda head: head_rules.settled_advance(head, fence, commit),
            # Once per epoch: the only advance that makes the item grow, so the only one that pays for a look at its size.
            grown=(lambda head: head_rules.after_advance(head, fence, commit)) if commit.starts else None,
        )

    async def realign(self, fence: Fence, expected: Head, to: Realignment) -> Head:
        head_rules.check_realignment(fence, expected, to)
        head_rules.check_size(head_rules.after_realign(expected, fence, to), self._region)
        return await self._update_head(
            fence,
            head_item.realign_update(self._group, fence, expected, to),
            lambda head: head_rules.settled_realign(head, fence, expected, to),
        )

    async def _update_head(
        self,
        fence: Fence,
        request: dict[str, Any],
        settled: Callable[[Head], bool],
        grown: Callable[[Head], Head] | None = None,
    ) -> Head:
        """Sends a conditional update until it is known to hold: sent again only after a read-back that says "not yet".

        ``grown``: what the head will be; given when its size has to be looked at first.
        """
        call = self._call("UpdateItem", f"{self._group}#{fence.stream} by {fence.writer}")
        with call.settled():
            async for attempt in call.retries():
                with attempt:
                    if call.doubt or grown is not None:
                        head = await self._read_head(call, fence.stream)
                        if settled(head):
                            return head
                        if grown is not None:
                            head_rules.check_size(grown(head), self._region)
                            grown = None
                    return await self._update_once(call, fence, request, settled)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _update_once(self, call: Call, fence: Fence, request: dict[str, Any], settled: Callable[[Head], bool]) -> Head:
        try:
            answer = await call.attempt(self._send_update(request), mutates=True)
        except ClientError as failed:
            details: dict[str, Any] = dict(failed.response)
            item = details.get("Item")
            head = head_item.head_from_item(fence.stream, item) if item else await self._read_head(call, fence.stream)
            if settled(head):
                return head
            raise Unavailable(f"head of {fence.stream} in {self._region} changes too fast", hint="repeat the call") from failed
        return head_item.head_from_item(fence.stream, answer["Attributes"])

    def _send_update(self, request: dict[str, Any]) -> Awaitable[dict[str, Any]]:
        if self._wire is not None:
            return self._wire.update_item({"TableName": self._table, **request})
        sent: Awaitable[dict[str, Any]] = self._dynamodb.update_item(TableName=self._table, **request)
        return sent

    # ------------------------------------------------------------------------------------------------------------ helpers

    def _key(self, ref: SegmentRef | SnapshotRef) -> str:
        return f"{self._prefix}/{ref.key}"

    def _call(self, operation: str, target: str, size: int = 0) -> Call:
        if self._s3 is None or self._dynamodb is None:
            raise RuntimeError(f"AwsRegionStore({self._region!r}) is not started or already closed: await start() first")
        return Call(f"{operation} {target} in {self._region}", self._call_seconds + size / SLOWEST_BYTES_PER_SECOND)


async def _sha256(data: bytes) -> str:
    if len(data) < HASH_IN_THREAD_BYTES:
        return hashlib.sha256(data).hexdigest()
    return await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())


def _parse(stream: str, name: str) -> SegmentRef | None:
    """None for a name that is not a segment's: people and tools leave things in buckets."""
    match = _SEGMENT_NAME.fullmatch(name)
    if match is None or int(match[1]) < 1 or int(match[2]) < 1:
        return None
    return SegmentRef(stream, int(match[1]), int(match[2]))
