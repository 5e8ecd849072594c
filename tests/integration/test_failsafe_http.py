"""Failsafe over real HTTP: two regions' controllers are asked through their APIs while etcd answers nobody."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from controller.agent import AsyncCheckpoints
from controller.agent.spool import Letter
from tests.support.served import REGIONS, ServedController


async def put(urls: tuple[str, ...], step: str) -> int:
    """Copies in which one record with ``copies = 1`` was safe when it was acknowledged."""
    async with AsyncCheckpoints(list(urls)) as client:
        letter = Letter("agent-1", step, "checkpoint", step.encode(), None, 0.0, 1, 0, {})
        (ack,) = await client.put_many([letter], timeout_seconds=30)
        assert ack.status in ("acknowledged", "duplicate")
        return ack.copies


@pytest.mark.timeout(120)
def test_a_holder_asks_the_other_regions_over_http_and_goes_on_with_two_copies(tmp_path: Path) -> None:
    with ServedController(tmp_path, ttl_seconds=5, etcd={"failsafe": True}) as served:
        served.wait_until_active(REGIONS[0])
        asyncio.run(put(served.urls, "before"))

        def sentence() -> str:
            return str(httpx.get(f"{served.urls[0]}/v1/status", timeout=15).json()["sentence"])

        async def lose() -> None:
            served._cluster.lose_leader()

        async def elect() -> None:
            served._cluster.elect_leader()

        served._run(lose())
        served.until(lambda: sentence().startswith("FAILSAFE since"), "the holder going on past its lease")
        witness = httpx.get(f"{served.places[REGIONS[1]].url}/v1/peers/witness", timeout=15).json()
        assert witness["unreachable_seconds"] > 0
        assert asyncio.run(put(served.urls, "without etcd")) >= 2
        served._run(elect())
        served.until(lambda: "is active in epoch" in sentence(), "the lease being proven again")
