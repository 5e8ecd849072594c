"""Region stores behind one handle: each test of a store runs over memory, sealed and plain, and over ministack. A module may
have its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from controller.lab.aws import AwsStandIn
from controller.ports import RegionStore
from tests.support.stores import AwsWorld, MemoryWorld, SealedMemoryWorld, World, stand_in


@pytest.fixture(scope="session")
def aws() -> Iterator[AwsStandIn]:
    with stand_in() as server:
        yield server


@pytest.fixture(
    params=[
        MemoryWorld,
        SealedMemoryWorld,
        pytest.param(AwsWorld, marks=pytest.mark.aws),  # sealed over ministack: what may differ is in test_sealed_store
    ],
    ids=lambda kind: str(kind.name),
)
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    kind = request.param
    made: World = kind(request.getfixturevalue("aws").endpoint) if issubclass(kind, AwsWorld) else kind()
    yield made
    await made.close()


@pytest.fixture
async def store(world: World) -> RegionStore:
    return await world.client()
