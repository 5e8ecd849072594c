"""Segments so large that they go up in parts: written once, whole or not at all, and nothing is left behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from controller.adapters import multipart
from controller.adapters.region_store import MULTIPART_FROM_BYTES, AwsRegionStore
from controller.domain.model import SegmentRef
from controller.errors import Conflict, DrError
from controller.lab.aws import AwsStandIn
from tests.support.stores import BUCKET, AwsWorld, stand_in, token

pytestmark = pytest.mark.aws

REF = SegmentRef("s0", 1, 3)
LARGE = random.Random(5).randbytes(MULTIPART_FROM_BYTES + 3 * 2**20 + 17)


@pytest.fixture(scope="module")
def aws() -> Iterator[AwsStandIn]:
    with stand_in() as server:
        yield server


@pytest.fixture
async def world(aws: AwsStandIn) -> AsyncIterator[AwsWorld]:
    made = AwsWorld(aws.endpoint)
    yield made
    await made.close()


async def unfinished(world: AwsWorld) -> list[str]:
    """Uploads that nobody completed or aborted, once aborts under way have ended."""
    await asyncio.gather(*multipart._aborts, return_exceptions=True)
    listed = await asyncio.to_thread(world.s3().list_multipart_uploads, Bucket=BUCKET)
    return [entry["Key"] for entry in listed.get("Uploads", ()) if entry["Key"].startswith(world.key(""))]


@pytest.fixture(params=["wire", "sdk"])
async def store(world: AwsWorld, request: pytest.FixtureRequest) -> AwsRegionStore:
    made = await world.client()
    assert made._wire is not None
    if request.param == "sdk":
        made._wire = None
    return made


async def test_a_large_segment_comes_back_as_it_was_and_may_be_put_again(store: AwsRegionStore, world: AwsWorld) -> None:
    await store.put_segment(token(3), REF, LARGE)
    assert await store.get_segment(REF) == LARGE
    await store.put_segment(token(3), REF, LARGE)
    assert await store.list_segments("s0", 1) == (REF,)
    assert await unfinished(world) == []


async def test_other_content_is_not_written_over_a_large_segment(store: AwsRegionStore, world: AwsWorld) -> None:
    await store.put_segment(token(3), REF, LARGE)
    with pytest.raises(Conflict):
        await store.put_segment(token(4), REF, b"x" + LARGE[1:])
    assert await store.get_segment(REF) == LARGE
    assert await unfinished(world) == []


async def test_two_writers_race_and_one_object_comes_into_being(world: AwsWorld) -> None:
    first, second = await world.client(), await world.client()
    other = b"y" + LARGE[1:]
    results = await asyncio.gather(
        first.put_segment(token(3), REF, LARGE), second.put_segment(token(3), REF, other), return_exceptions=True
    )
    assert [type(result) for result in results if result is not None] == [Conflict]
    assert await first.get_segment(REF) == (LARGE if results[0] is None else other)
    assert await unfinished(world) == []


async def test_an_upload_that_fails_is_aborted_and_nothing_is_there(world: AwsWorld) -> None:
    store = await world.client(call_timeout_seconds=0.5)
    assert store._wire is not None
    send = store._wire.upload_part

    async def broken(key: str, upload: str, number: int, data: Any, digest: str) -> str:
        if number == 2:
            raise ConnectionResetError("the line is cut")
        return await send(key, upload, number, data, digest)

    store._wire.upload_part = broken  # type: ignore[method-assign]
    with pytest.raises(DrError):
        await store.put_segment(token(3), REF, LARGE)
    assert await store.list_segments("s0", 1) == ()
    assert await unfinished(world) == []


async def test_a_damaged_part_is_not_stored(world: AwsWorld) -> None:
    store = await world.client(call_timeout_seconds=0.5)
    assert store._wire is not None
    send = store._wire.upload_part

    async def damaged(key: str, upload: str, number: int, data: Any, digest: str) -> str:
        return await send(key, upload, number, memoryview(b"!" + bytes(data)[1:]) if number == 1 else data, digest)

    store._wire.upload_part = damaged  # type: ignore[method-assign]
    with pytest.raises(DrError):
        await store.put_segment(token(3), REF, LARGE)
    assert await store.list_segments("s0", 1) == ()


async def test_a_completion_whose_answer_was_lost_is_found_by_reading_back(world: AwsWorld) -> None:
    store = await world.client()
    complete, uploads = store._s3.complete_multipart_upload, 0

    async def lost(**request: Any) -> Any:
        nonlocal uploads
        uploads += 1
        await complete(**request)
        raise ConnectionResetError("the answer is lost")

    store._s3.complete_multipart_upload = lost
    await store.put_segment(token(3), REF, LARGE)
    assert uploads == 1  # nothing is sent a second time
    assert await store.get_segment(REF) == LARGE


async def test_an_upload_that_is_cancelled_is_aborted(world: AwsWorld) -> None:
    store = await world.client()
    assert store._wire is not None
    began = asyncio.Event()

    async def hangs(*_: Any) -> str:
        began.set()
        await asyncio.sleep(3600)
        return ""

    store._wire.upload_part = hangs  # type: ignore[method-assign, assignment]
    put = asyncio.create_task(store.put_segment(token(3), REF, LARGE))
    await began.wait()
    put.cancel()
    await asyncio.gather(put, return_exceptions=True)
    assert await unfinished(world) == []
