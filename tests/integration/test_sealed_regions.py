"""Two regions over real HTTP, each with its own S3, DynamoDB and KMS: one dies with all three, and comes back."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aioboto3
import boto3
import pytest

from controller.adapters.clock import SystemClock
from controller.adapters.keyring import Keyring
from controller.adapters.kms import AwsKeyService
from controller.adapters.region_store import AwsRegionStore
from controller.adapters.sealed_store import SealedStore, Sealer
from controller.domain import replication
from controller.domain.model import EpochStart, Fence, SegmentRef
from controller.lab.aws import LAB_ENVIRONMENT, AwsStandIn, provision_region
from controller.ports import KeyService, RegionStore
from controller.stream.follower import Follower
from controller.stream.history import bring_home, fence_stores
from controller.stream.segment import frame
from controller.stream.view import View
from controller.stream.writer import StreamWriter, WriterLimits

pytestmark = pytest.mark.aws

GROUP, STREAM = "fleet", "s00"
A, B = "eu-west-1", "us-east-1"


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, AwsStandIn]]:
    pytest.importorskip("ministack", reason="the stand-in for AWS is not installed (extra: lab)")
    for name, value in LAB_ENVIRONMENT.items():
        monkeypatch.setitem(os.environ, name, value)
    with AwsStandIn(aws_region=A) as one, AwsStandIn(aws_region=B) as other:
        yield {A: one, B: other}
        one.thaw()
        other.thaw()


class Rig:
    def __init__(self, places: dict[str, AwsStandIn]) -> None:
        self.places = places
        self.keys: dict[str, str] = {}
        session: Any = boto3.session.Session()
        for region, place in places.items():
            provision_region(place.endpoint, aws_region=region, bucket="dr-sealed", table="dr-heads")
            kms = session.client("kms", endpoint_url=place.endpoint, region_name=region)
            self.keys[region] = kms.create_key()["KeyMetadata"]["Arn"]
        self._session = aioboto3.Session()

    @asynccontextmanager
    async def process(self, home: str) -> AsyncIterator[tuple[dict[str, RegionStore], Keyring]]:
        """What one controller opens: stores and KMS of both regions, with nothing remembered."""
        common: dict[str, Any] = {"call_timeout_seconds": 2.0, "connect_timeout_seconds": 0.5, "session": self._session}
        services: dict[str, KeyService] = {}
        inner: dict[str, AwsRegionStore] = {}
        for region, place in self.places.items():
            services[region] = service = AwsKeyService(
                region, key=self.keys[region], aws_region=region, endpoint=place.endpoint, **common
            )
            inner[region] = store = AwsRegionStore(
                region, group=GROUP, bucket="dr-sealed", table="dr-heads", aws_region=region, s3_endpoint=place.endpoint,
                dynamodb_endpoint=place.endpoint, max_pool_connections=8, **common,
            )  # fmt: skip
            await service.start()
            await store.start()
        keyring = Keyring(GROUP, services, home=home, clock=SystemClock())
        sealer = Sealer(GROUP, keyring)
        try:
            yield {region: SealedStore(store, sealer) for region, store in inner.items()}, keyring
        finally:
            await keyring.close()
            for store in inner.values():
                await store.close()


async def opened(
    stores: dict[str, RegionStore], keyring: Keyring, home: str, epoch: int, forks: tuple[EpochStart, ...], view: View
) -> StreamWriter:
    """As ``runtime/opening`` does it."""
    fence = Fence(STREAM, epoch, home, "a")
    heads, _ = await fence_stores(stores, fence, 5.0)
    assert home in heads
    choice = replication.choose(heads, forks, home=home, epoch=epoch)
    await keyring.prepare(fence)
    head, tail = await bring_home(stores, heads, fence, home, forks, choice)
    await followed(stores[home], view)
    writer = StreamWriter(
        group=GROUP, fence=fence, stores=stores, home=home, home_head=head, tail=tail, view=view, clock=SystemClock(),
        may_act=lambda: True, on_lost=lambda why: None, limits=WriterLimits(ack_timeout_seconds=4.0),
    )  # fmt: skip
    writer.start()
    return writer


async def followed(store: RegionStore, view: View) -> None:
    follower = Follower(store, view, STREAM, SystemClock(), GROUP)
    head = await store.read_head(STREAM)
    while view.position(STREAM)[0] < head.seq:
        await follower.step(100)


async def write(writer: StreamWriter, bodies: dict[str, bytes], count: int, copies: int) -> list[str]:
    before = dict(bodies)
    said = []
    for number in range(count):
        agent = f"agent-{number}"
        body = before.get(agent, random.Random(number).randbytes(40_000)) + b"step %d" % len(bodies)
        (ack,) = await writer.submit([frame(agent, f"{writer.fence.epoch}-{number}", "checkpoint", body, copies=copies)])
        said.append(ack.status)
        if ack.status == "acknowledged":
            bodies[agent] = body
    return said


def check(view: View, bodies: dict[str, bytes]) -> None:
    for agent, body in bodies.items():
        found = view.latest(agent)
        assert found is not None
        assert found[1] == body


async def test_a_region_dies_with_store_and_kms_the_other_takes_over_and_later_the_first_alone_has_everything(
    places: dict[str, AwsStandIn],
) -> None:
    rig, bodies = Rig(places), dict[str, bytes]()
    async with rig.process(A) as (stores, keyring):
        writer = await opened(stores, keyring, A, 1, (), View(None))
        assert await write(writer, bodies, 8, copies=2) == ["acknowledged"] * 8
        async with rig.process(B) as (standby, _):
            view = View(None)
            await followed(standby[B], view)
            check(view, bodies)
        await writer.stop("the region dies")
    places[A].freeze()
    async with rig.process(B) as (stores, keyring):
        view = View(None)  # a cold start: nothing is warm, no key is known
        forks = (EpochStart(1, 1),)
        writer = await opened(stores, keyring, B, 2, forks, view)
        check(view, bodies)
        assert any(f"sealed for the KMS of {B} only ({A}:" in warning for warning in keyring.warnings())
        assert await write(writer, bodies, 4, copies=1) == ["acknowledged"] * 4
        assert await write(writer, bodies, 1, copies=2) == ["failed"]
        places[A].thaw()
        last = writer.seq
        while (await stores[A].read_head(STREAM)).seq < last:  # its pump attaches and copies by itself
            await SystemClock().sleep(0.2)
        await writer.stop("enough")
    places[B].freeze()
    async with rig.process(A) as (stores, _):
        view = View(None)
        await followed(stores[A], view)
        check(view, bodies)
    session: Any = boto3.session.Session()
    s3 = session.client("s3", endpoint_url=places[A].endpoint, region_name=A)
    listed = s3.list_objects_v2(Bucket="dr-sealed", Prefix=f"dr/{GROUP}/")["Contents"]
    assert len(listed) > 8
    for one in listed:
        assert s3.get_object(Bucket="dr-sealed", Key=one["Key"])["Body"].read(6) == b"DRENC\0", one["Key"]
    assert SegmentRef(STREAM, 1, 1).key in listed[0]["Key"]
