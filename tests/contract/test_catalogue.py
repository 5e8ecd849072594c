"""The catalogue: an agent is restored with plain AWS calls, boto3 and FORMAT.md, when no controller runs."""

from __future__ import annotations

import asyncio
import hashlib
import random
import struct
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from controller.adapters.clock import SystemClock
from controller.domain.model import Fence
from controller.lab.aws import AwsStandIn
from controller.lab.virtual_time import run_virtual
from controller.runtime.retention import Retention, RetentionPolicy
from controller.stream.history import Tail
from controller.stream.segment import frame
from controller.stream.view import View
from controller.stream.writer import StreamWriter, WriterLimits
from tests.support.keeping import HOME, REGIONS, STREAM, World
from tests.support.stores import BUCKET, REGION, TABLE, AwsWorld, stand_in

if TYPE_CHECKING or sys.version_info < (3, 14):
    from backports import zstd
else:
    from compression import zstd


@pytest.fixture(scope="session")
def aws() -> Iterator[AwsStandIn]:
    with stand_in() as server:
        yield server


def restore(dynamodb: Any, s3: Any, group: str, stream: str, agent: str) -> tuple[str, bytes]:
    """Another program: follows FORMAT.md with boto3, struct, hashlib, msgpack and zstd only."""
    item = dynamodb.get_item(TableName=TABLE, Key={"pk": {"S": f"{group}#{stream}"}, "sk": {"S": f"agent#{agent}"}})["Item"]
    body = b""
    for place in reversed(item["chain"]["L"]):
        seq, epoch, _, offset, length = (int(number["N"]) for number in place["L"])
        key = f"dr/{group}/{stream}/{seq:016d}-{epoch:016d}.seg"
        data = s3.get_object(Bucket=BUCKET, Key=key, Range=f"bytes={offset}-{offset + length - 1}")["Body"].read()
        header_length, payload_length = struct.unpack(">II", data[:8])
        assert length == 8 + header_length + payload_length
        fields, payload = msgspec.msgpack.decode(data[8 : 8 + header_length]), data[8 + header_length :]
        if fields[11] == 0:
            body = payload
        elif fields[11] == 1:
            body = zstd.decompress(payload)
        else:
            body = zstd.decompress(payload, zstd_dict=zstd.ZstdDict(body, is_raw=True).as_prefix)
        assert (fields[0], len(body), hashlib.sha256(body).digest()) == (agent, fields[4], fields[3])
    assert (fields[1], hashlib.sha256(body).hexdigest()) == (item["id"]["S"], item["sha256"]["S"])
    return fields[1], body


@pytest.mark.aws
async def test_an_agent_is_restored_from_the_catalogue_with_boto3_alone(aws: AwsStandIn) -> None:
    world = AwsWorld(aws.endpoint)
    store, clock, view = await world.client(), SystemClock(), View(None)
    fence = Fence(STREAM, 1, REGION, "a")
    head = await store.fence(fence)
    writer = StreamWriter(
        group=world.group, fence=fence, stores={REGION: store}, home=REGION, home_head=head, tail=Tail(0, head.chain, ()),
        view=view, clock=clock, may_act=lambda: True, on_lost=lambda why: None, limits=WriterLimits(),
    )  # fmt: skip
    writer.start()
    policy = RetentionPolicy(1000.0, snapshot_seconds=0.001)
    retention = Retention(writer=writer, view=view, stores={REGION: store}, home=REGION, clock=clock, policy=policy)
    states: dict[str, tuple[str, bytes]] = {}
    for step in range(8):
        for n in range(30):  # more than one batch of the catalogue
            agent, before = f"agent/{n}", states.get(f"agent/{n}")
            body = (before[1] if before else random.Random(n).randbytes(3000)) + f"step {step}".encode()
            (ack,) = await writer.submit([frame(agent, f"s{step}", "checkpoint", body, previous=before)])
            assert ack.status == "acknowledged"
            states[agent] = f"s{step}", body
    for _ in range(20):
        await retention.step()
        await asyncio.sleep(0.01)
    await writer.stop("nobody runs any more")
    await world.close()
    for agent, state in states.items():
        assert restore(world.dynamodb(), world.s3(), world.group, STREAM, agent) == state


def test_the_catalogue_of_every_region_follows_the_agents_and_points_at_what_is_kept() -> None:
    async def story() -> None:
        world = World(snapshot_seconds=5.0)
        holder = await world.open()
        assert await world.put(holder, "once", "only", b"x" * 3000)
        for step in range(60):
            for name in ("one", "two"):
                assert await world.put(holder, name, f"{step:04d}", random.Random(name).randbytes(500) + b"%d" % step)
            await world.wait(6.0)
            await world.steps(holder, 20, pause=0.01)
        await world.settled(holder)
        await world.wait(6.0)
        await world.steps(holder, 40, pause=0.01)
        assert world.head(HOME).base > 30
        for region in REGIONS:
            server = world.servers[region]
            for agent, (record_id, body) in world.expected.items():
                entry = server.catalogue[STREAM, agent]
                assert (entry.id, entry.sha256) == (record_id, hashlib.sha256(body).hexdigest())
                for place in entry.chain:
                    assert world.head(region).base <= place.seq <= world.head(region).seq
                    data = next(
                        one.data for ref, one in server.objects.items() if (ref.seq, ref.epoch) == (place.seq, place.epoch)
                    )
                    lengths = struct.unpack(">II", data[place.offset : place.offset + 8])
                    assert place.length == 8 + sum(lengths)

    run_virtual(story(), limit_seconds=100_000)
