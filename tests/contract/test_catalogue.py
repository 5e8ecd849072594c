"""The catalogue: an agent is restored with plain AWS calls, boto3 and FORMAT.md, when no controller runs."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import random
import struct
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import boto3
import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from controller.adapters.clock import SystemClock
from controller.adapters.keyring import Keyring
from controller.adapters.kms import AwsKeyService
from controller.adapters.sealed_store import SealedStore, Sealer
from controller.domain.model import Fence
from controller.lab.aws import AwsStandIn
from controller.lab.virtual_time import run_virtual
from controller.ports import RegionStore
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


def plain_range(s3: Any, key: str, offset: int, length: int) -> bytes:
    """Bytes of an object that is not sealed."""
    return bytes(s3.get_object(Bucket=BUCKET, Key=key, Range=f"bytes={offset}-{offset + length - 1}")["Body"].read())


def sealed_range(s3: Any, kms: dict[str, Any], key: str, offset: int, length: int) -> bytes:
    """The same of a sealed object, with whichever region's KMS still answers: FORMAT.md, section *Sealed object*."""
    start = plain_range(s3, key, 0, 4096)
    assert start[:8] == b"DRENC\x00\x00\x01"
    begin = 12 + int.from_bytes(start[8:12], "big") + 4
    head = msgspec.msgpack.decode(start[12 : begin - 4])
    context = {"agent-dr:group": head["group"], "agent-dr:stream": head["stream"]}
    blob = next(blob for region, blob in head["wraps"] if region in kms)
    region = next(region for region, _ in head["wraps"] if region in kms)
    data_key = kms[region].decrypt(CiphertextBlob=blob, EncryptionContext=context)["Plaintext"]
    assert hmac.digest(data_key, b"agent-dr data key", "sha256")[:16] == head["key"]
    bound = msgspec.msgpack.encode([head[name] for name in ("kind", "group", "stream", "seq", "epoch")])
    bound += msgspec.msgpack.encode([head[name] for name in ("size", "chunk", "key", "salt")])
    cipher = AESGCM(hmac.digest(data_key, b"agent-dr object key" + bound, "sha256"))
    first, last, step = offset // head["chunk"], (offset + length - 1) // head["chunk"], head["chunk"] + 16
    sealed = plain_range(s3, key, begin + first * step, (last - first + 1) * step)
    plain = b""
    for number in range(first, last + 1):
        nonce = number.to_bytes(11, "big") + bytes([(number + 1) * head["chunk"] >= head["size"]])
        plain += cipher.decrypt(nonce, sealed[(number - first) * step :][:step], bound)
    return plain[offset - first * head["chunk"] :][:length]


def restore(
    dynamodb: Any, s3: Any, group: str, stream: str, agent: str, read: Callable[..., bytes] = plain_range
) -> tuple[str, bytes]:
    """Another program: follows FORMAT.md with boto3, struct, hashlib, msgpack and zstd only (and hmac and AES-GCM)."""
    item = dynamodb.get_item(TableName=TABLE, Key={"pk": {"S": f"{group}#{stream}"}, "sk": {"S": f"agent#{agent}"}})["Item"]
    body = b""
    for place in reversed(item["chain"]["L"]):
        seq, epoch, _, offset, length = (int(number["N"]) for number in place["L"])
        key = f"dr/{group}/{stream}/{seq:016d}-{epoch:016d}.seg"
        data = read(s3, key, offset, length)
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
    states = await written(world, await world.client())
    s3, dynamodb = world.s3(), world.dynamodb()
    for agent, state in states.items():
        assert restore(dynamodb, s3, world.group, STREAM, agent) == state


@pytest.mark.aws
async def test_an_agent_whose_objects_are_sealed_is_restored_with_boto3_alone_while_one_regions_kms_is_gone(
    aws: AwsStandIn,
) -> None:
    world = AwsWorld(aws.endpoint)
    regions = {REGION: "eu-west-1", "us-east-1": "us-east-1"}
    session: Any = boto3.session.Session()
    kms = {name: session.client("kms", endpoint_url=aws.endpoint, region_name=at) for name, at in regions.items()}
    keys = {name: client.create_key()["KeyMetadata"]["Arn"] for name, client in kms.items()}
    services = {
        name: AwsKeyService(
            name, key=keys[name], aws_region=at, endpoint=aws.endpoint, call_timeout_seconds=10.0, connect_timeout_seconds=1.0
        )
        for name, at in regions.items()
    }
    for service in services.values():
        await service.start()
    keyring = Keyring(world.group, services, home=REGION, clock=SystemClock())
    states = await written(world, SealedStore(await world.client(), Sealer(world.group, keyring)))
    await keyring.close()
    s3, dynamodb = world.s3(), world.dynamodb()
    objects = s3.list_objects_v2(Bucket=BUCKET, Prefix=world.key(""))["Contents"]
    assert any("/snapshots/" in one["Key"] for one in objects)
    assert all(plain_range(s3, one["Key"], 0, 6) == b"DRENC\0" for one in objects)
    for lost in regions:
        left = {name: client for name, client in kms.items() if name != lost}
        for agent, state in list(states.items())[:5]:
            read = partial(_sealed_with, left)
            assert restore(dynamodb, s3, world.group, STREAM, agent, read) == state


def _sealed_with(kms: dict[str, Any], s3: Any, key: str, offset: int, length: int) -> bytes:
    return sealed_range(s3, kms, key, offset, length)


async def written(world: AwsWorld, store: RegionStore) -> dict[str, tuple[str, bytes]]:
    """Some agents' states, written, with a catalogue of them. Returns what each agent's newest is."""
    clock, view = SystemClock(), View(None)
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
    return states


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
