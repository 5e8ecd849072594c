"""Region stores behind one handle: each test of a store runs over memory and over ministack. A module may have its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from controller.lab.aws import AwsStandIn
from controller.ports import RegionStore
from tests.support.stores import AwsWorld, MemoryWorld, World, stand_in


@pytest.fixture(scope="session")
def aws() -> Iterator[AwsStandIn]:
    with stand_in() as server:
        yield server


@pytest.fixture(params=["memory", pytest.param("ministack", marks=pytest.mark.aws)])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    made: World = MemoryWorld() if request.param == "memory" else AwsWorld(request.getfixturevalue("aws").endpoint)
    yield made
    await made.close()


@pytest.fixture
async def store(world: World) -> RegionStore:
    return await world.client()
