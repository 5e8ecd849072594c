"""Four streams over real HTTP: two controllers of one region share them, hand records to each other, and one dies."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from controller.agent import AsyncCheckpoints
from controller.agent.spool import Letter
from controller.domain.sharing import stream_of
from tests.support.served import REGIONS, TWIN, ServedController

STREAMS = 4
AGENTS = [f"agent-{number:03d}" for number in range(24)]


def held(served: ServedController, name: str) -> set[str]:
    """Streams that one controller serves, by its own word."""
    answer = httpx.get(f"{served.places[name].url}/v1/peers/positions", timeout=15)
    return set(answer.json())


async def write(urls: list[str], step: str) -> None:
    async with AsyncCheckpoints(urls, follow_hints=False) as client:
        letters = [Letter(agent, step, "checkpoint", f"{agent} {step}".encode(), None, 0.0, 1, 0, {}) for agent in AGENTS]
        acks = await client.put_many(letters, timeout_seconds=30)
        assert {ack.status for ack in acks} <= {"acknowledged", "duplicate"}


async def check(urls: list[str], step: str) -> None:
    async with AsyncCheckpoints(urls, follow_hints=False) as client:
        for agent in AGENTS:
            found = await client.latest(agent, timeout_seconds=30)
            assert found is not None
            assert (found[0].id, found[1]) == (step, f"{agent} {step}".encode())


@pytest.mark.timeout(180)
def test_records_go_through_either_controller_and_what_one_held_moves_to_the_other_when_it_dies(tmp_path: Path) -> None:
    with ServedController(tmp_path, twin=True, stream={"streams": STREAMS}) as served:
        first, second = served.places[REGIONS[0]], served.places[TWIN]
        served.until(lambda: len(held(served, REGIONS[0])) == len(held(served, TWIN)) == 2, "two streams on each controller")
        assert {stream_of(agent, STREAMS) for agent in AGENTS} == held(served, REGIONS[0]) | held(served, TWIN)
        asyncio.run(write([first.url], "1"))
        asyncio.run(check([second.url], "1"))
        asyncio.run(write([second.url], "2"))
        asyncio.run(check([first.url], "2"))

        stranger = httpx.post(
            f"{second.url}/v1/peers/{REGIONS[0]}/nobody/1/records", content=b"DRBAT", timeout=10,
            headers={"Content-Type": "application/octet-stream"},
        )  # fmt: skip
        assert stranger.status_code == 400, "what cannot be read is refused before anything else"

        served.kill(REGIONS[0])
        served.until(lambda: len(held(served, TWIN)) == STREAMS, "the other controller holding everything")
        asyncio.run(check([second.url], "2"))
        asyncio.run(write([second.url], "3"))
        asyncio.run(check([second.url], "3"))
