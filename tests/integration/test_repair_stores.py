"""Verify and repair over real HTTP: three regions' buckets and tables in ministack, damaged in S3 and DynamoDB themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aioboto3
import boto3
import pytest

from controller.adapters.memory.coordinator import MemoryCluster, MemoryCoordinator
from controller.adapters.region_store import AwsRegionStore
from controller.domain.model import Commit, Fence
from controller.lab.aws import AwsStandIn, provision_region
from controller.runtime.archive_documents import Verification
from controller.runtime.audit import Audit
from controller.runtime.documents import Keys
from controller.runtime.mender import Mender
from controller.runtime.verifier import Verifier
from controller.stream.segment import frame_offsets
from controller.stream.view import View
from tests.support.damage import HOME, REGIONS, Clock, whole
from tests.support.segments import GROUP, History
from tests.support.stores import stand_in

pytestmark = pytest.mark.aws


@pytest.fixture(scope="module")
def aws() -> Iterator[AwsStandIn]:
    with stand_in() as server:
        for region in REGIONS:
            provision_region(server.endpoint, aws_region="eu-west-1", bucket=f"dr-{region}", table=f"dr-{region}")
        yield server


@dataclass
class Place:
    """Three stores with one history, and the controller of the first that verifies and mends."""

    stores: dict[str, AwsRegionStore]
    verifier: Verifier
    mender: Mender
    history: History
    endpoint: str

    def client(self, service: str) -> Any:
        session: Any = boto3.session.Session()
        return session.client(service, endpoint_url=self.endpoint, region_name="eu-west-1")

    async def verify(self, region: str) -> Verification:
        await self.verifier.start(region, restart=False)
        while True:
            found = await self.verifier.state(region)
            if found.state != "running" and not self.verifier.running(region):
                return found
            await asyncio.sleep(0.01)


async def place(aws: AwsStandIn, folder: Path) -> Place:
    session = aioboto3.Session()
    history = History("s00").grow(4, agents=3, epoch=1).grow(3, agents=3, epoch=2)
    stores: dict[str, AwsRegionStore] = {}
    fence = Fence("s00", 2, HOME, "a")
    for region in REGIONS:
        store = AwsRegionStore(
            region,
            group=GROUP,
            bucket=f"dr-{region}",
            table=f"dr-{region}",
            prefix=f"run/{folder.name}",
            aws_region="eu-west-1",
            s3_endpoint=aws.endpoint,
            dynamodb_endpoint=aws.endpoint,
            call_timeout_seconds=10.0,
            connect_timeout_seconds=1.0,
            max_pool_connections=16,
            session=session,
        )
        await store.start()
        stores[region] = store
        head = await store.fence(fence)
        for built in history.segments:
            await store.put_segment(fence, built.ref, built.data)
            frames = built.segment.frames
            starts = tuple(start for start in history.head().epochs if start.first_seq == built.ref.seq)
            received = max(frame.record.received_at for frame in frames)
            commit = Commit(head.seq, head.chain, built.ref.seq, built.chain, starts, received, len(frames), len(built.data))
            head = await store.advance(fence, commit)
    view = View(None)
    history.apply_to(view)
    clock = Clock()
    verifier = Verifier(
        group=GROUP,
        region=HOME,
        instance="a",
        stores=stores,
        view=view,
        streams=lambda: ("s00",),
        clock=clock,
        state_dir=folder,
    )
    mender = Mender(
        verifier,
        Audit(MemoryCoordinator(MemoryCluster(clock)), Keys("/dr", GROUP)),
        clock,
        region=HOME,
        instance="a",
        fence_of=lambda stream: fence,
        held=lambda stream: True,
    )
    return Place(stores, verifier, mender, history, aws.endpoint)


async def test_objects_and_a_head_that_were_damaged_in_the_services_are_found_and_put_right(
    aws: AwsStandIn, tmp_path: Path
) -> None:
    here = await place(aws, tmp_path)
    try:
        region = REGIONS[2]
        assert whole(await here.verify(region))
        s3, bucket = here.client("s3"), f"dr-{region}"
        keys = [f"run/{tmp_path.name}/{GROUP}/{built.ref.key}" for built in here.history.segments]
        flipped = bytearray(here.history.segments[2].data)
        flipped[frame_offsets(bytes(flipped))[1].offset + 60] ^= 4
        s3.put_object(Bucket=bucket, Key=keys[2], Body=bytes(flipped))
        s3.delete_object(Bucket=bucket, Key=keys[4])
        s3.put_object(Bucket=bucket, Key=keys[6], Body=here.history.segments[6].data[:-100])
        dynamodb = here.client("dynamodb")
        dynamodb.update_item(
            TableName=f"dr-{region}",
            Key={"pk": {"S": f"{GROUP}#s00"}, "sk": {"S": "head"}},
            UpdateExpression="SET epochs = :odd",
            ExpressionAttributeValues={":odd": {"S": "?"}},
        )
        found = await here.verify(region)
        assert [one.seq for one in found.problems] == [0, 3, 5, 7]
        assert [one.what for one in found.problems][:3] == ["head", "frame", "missing"]
        assert all(one.agent and one.record for one in found.problems[1:])
        mended = await here.mender.repair(region, execute=True, requester="ada", confirm=region)
        assert [action.state for action in mended.actions] == ["done"] * 4, mended
        for built in here.history.segments:
            assert await here.stores[region].get_segment(built.ref) == built.data
        head = await here.stores[region].read_head("s00")
        assert (head.seq, head.chain, head.epochs) == (7, here.history.chain, here.history.head().epochs)
        assert whole(await here.verify(region))
    finally:
        for store in here.stores.values():
            await store.close()
