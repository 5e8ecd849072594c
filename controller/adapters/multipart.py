"""One large object in parts, written once: ``If-None-Match: *`` is asked when the parts are put together.

S3 decides then, atomically, whether the object comes into being; until then the parts are nothing. An upload that does not get
so far is aborted, because parts of abandoned uploads are stored, and paid for, for ever. (A process that is killed cannot
abort: let the bucket's lifecycle abort incomplete uploads after a day; that rule touches no object.)

Sources: S3 user guide, "Multipart upload limits" (parts of 5 MiB to 5 GiB, all but the last), "Conditional writes".
"""

from __future__ import annotations

import asyncio
import hashlib
from base64 import b64encode
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from controller.adapters.aws_errors import SDK_ERRORS
from controller.adapters.aws_wire import Wire

PART_BYTES = 8 * 1024**2
AT_A_TIME = 4
"""Parts on their way at once: their connections are taken from those that small segments use."""
ABORT_SECONDS = 5.0

_aborts: set[asyncio.Task[None]] = set()
"""Aborts under way: a task that nobody holds may be collected before it ends."""


async def put_object(s3: Any, wire: Wire | None, bucket: str, key: str, data: bytes, metadata: Mapping[str, str]) -> None:
    """Raises what the SDK raises; ``PreconditionFailed`` when an object is there already."""
    created = await s3.create_multipart_upload(
        Bucket=bucket, Key=key, Metadata=dict(metadata), ChecksumAlgorithm="SHA256", ContentType="application/octet-stream"
    )
    upload: str = created["UploadId"]
    try:
        parts = await _upload(s3, wire, bucket, key, upload, memoryview(data))
        await s3.complete_multipart_upload(
            Bucket=bucket, Key=key, UploadId=upload, IfNoneMatch="*", MultipartUpload={"Parts": parts}
        )
    except BaseException:
        abort = asyncio.get_running_loop().create_task(_abort(s3, bucket, key, upload))
        _aborts.add(abort)
        abort.add_done_callback(_aborts.discard)
        raise


async def _upload(s3: Any, wire: Wire | None, bucket: str, key: str, upload: str, data: memoryview) -> list[dict[str, Any]]:
    slots = asyncio.Semaphore(AT_A_TIME)

    async def one(number: int, part: memoryview) -> dict[str, Any]:
        async with slots:
            digest = await asyncio.to_thread(lambda: hashlib.sha256(part).digest())
            checksum = b64encode(digest).decode()
            if wire is not None:
                etag = await wire.upload_part(key, upload, number, part, digest.hex())
            else:
                answer = await s3.upload_part(
                    Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=bytes(part), ContentLength=len(part),
                    ChecksumAlgorithm="SHA256", ChecksumSHA256=checksum,
                )  # fmt: skip
                etag = answer["ETag"]
            return {"PartNumber": number, "ETag": etag, "ChecksumSHA256": checksum}

    starts = range(0, len(data), PART_BYTES)
    tasks = [asyncio.ensure_future(one(n, data[at : at + PART_BYTES])) for n, at in enumerate(starts, start=1)]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _abort(s3: Any, bucket: str, key: str, upload: str) -> None:
    """Gone already (it was completed after all, or aborted) is fine; unreachable is for the lifecycle rule."""
    with suppress(*SDK_ERRORS, RuntimeError):
        async with asyncio.timeout(ABORT_SECONDS):
            await s3.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload)
