"""Bodies up to 64 MiB through real controllers over real HTTP: acknowledged, followed, read back, in the other region too."""

from __future__ import annotations

import asyncio
import hashlib
import random
from pathlib import Path

import httpx
import pytest

from controller.agent import AsyncCheckpoints
from controller.domain.model import Encoding, Frame, Record
from controller.errors import Refused
from controller.stream.limits import DEFAULT_LIMITS
from controller.stream.segment import decode_segment, encode_frames
from tests.support.served import REGIONS, ServedController

LARGEST = DEFAULT_LIMITS.body_bytes
STREAM = {"ack_timeout_seconds": 60.0, "canary_seconds": 30.0}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def client_of(group: ServedController) -> AsyncCheckpoints:
    return AsyncCheckpoints(group.urls, timeout_seconds=120.0, attempt_seconds=60.0, delta_bytes=0)


def test_the_largest_body_is_acknowledged_followed_and_restored_in_another_region(tmp_path: Path) -> None:
    body = random.Random(1).randbytes(LARGEST)

    async def write(urls: ServedController) -> None:
        async with client_of(urls) as client:
            large = asyncio.create_task(client.put("large", "r1", body, copies=3))
            number = 0
            while not large.done():  # small ones go on meanwhile
                ack = await client.put(f"small-{number % 7}", f"r{number}", b"state %d" % number)
                assert ack.status in {"acknowledged", "duplicate"}  # memory stores hash on our loop: an answer may be late
                number += 1
            assert (await large).copies == 3
            assert number > 0

    async def read(urls: ServedController) -> None:
        async with client_of(urls) as client:
            found = await client.latest("large")
            assert found is not None
            assert hashlib.sha256(found[1]).digest() == hashlib.sha256(body).digest()

    with ServedController(tmp_path, ttl_seconds=5, stream=STREAM) as group:
        asyncio.run(write(group))
        segments = [decode_segment(stored.data) for stored in group.places[REGIONS[2]].store.objects.values()]
        (alone,) = [found for found in segments if any(frame.record.agent == "large" for frame in found.frames)]
        assert len(alone.frames) == 1
        asyncio.run(read(group))
        group.fail_over()
        asyncio.run(read(group))


def test_one_byte_more_is_refused_by_the_client_and_by_the_controller(tmp_path: Path) -> None:
    body = b"x" * (LARGEST + 1)

    async def ask(urls: ServedController) -> None:
        async with client_of(urls) as client:
            with pytest.raises(Refused, match=f"{LARGEST + 1} bytes"):
                await client.put("large", "r1", body)
        small = encode_frames([Frame(Record("large", "r1", "checkpoint", "0" * 64, 0), Encoding.RAW, b"")])
        batch = small[:20] + len(body).to_bytes(4, "big") + small[24:-48] + body + bytes(48)
        async with httpx.AsyncClient(timeout=60) as http:
            answer = await http.post(
                f"{urls.urls[0]}/v1/records", content=batch, headers={"content-type": "application/octet-stream"}
            )
            assert answer.status_code == 413
            assert f"{LARGEST + 1:,}" in answer.json()["error"]["message"]

    with ServedController(tmp_path, ttl_seconds=5, stream=STREAM) as group:
        asyncio.run(ask(group))
        assert group.active() == REGIONS[0]
