"""Region stores for tests: memory and ministack behind one handle, with ways to damage what lies in them."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import aioboto3
import boto3
import pytest

from controller.adapters.clock import SystemClock
from controller.adapters.keyring import Keyring
from controller.adapters.memory.gate import OpenGate
from controller.adapters.memory.key_service import MemoryKeyService, MemoryKms
from controller.adapters.memory.region_store import MemoryRegionStore, MemoryStore
from controller.adapters.region_store import AwsRegionStore
from controller.adapters.sealed_store import SealedStore, Sealer
from controller.domain.model import GENESIS, Commit, EpochStart, Fence, Head, SegmentRef
from controller.lab.aws import LAB_ENVIRONMENT, AwsStandIn, provision_region
from controller.ports import Clock, RegionStore

REGION = "eu-west-1"
BUCKET = "dr-contract"
TABLE = "dr-contract"


@contextmanager
def stand_in() -> Iterator[AwsStandIn]:
    """A ministack with bucket and table; made-up credentials are in the environment meanwhile."""
    pytest.importorskip("ministack", reason="the stand-in for AWS is not installed (extra: lab)")
    before = {name: os.environ.get(name) for name in LAB_ENVIRONMENT}
    os.environ.update(LAB_ENVIRONMENT)
    try:
        with AwsStandIn(aws_region=REGION) as server:
            provision_region(server.endpoint, aws_region=REGION, bucket=BUCKET, table=TABLE)
            yield server
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@cache
def sdk_session() -> aioboto3.Session:
    """One for all tests: each new one reads the descriptions of S3 and DynamoDB again, which takes longer than most tests."""
    return aioboto3.Session()


@cache
def sdk_client(service: str, endpoint: str) -> Any:
    """A blocking client without anything of ours; such clients may be shared by threads."""
    session: Any = boto3.session.Session()
    return session.client(service, endpoint_url=endpoint, region_name=REGION)


@dataclass
class MemoryWorld:
    """One region in memory."""

    server: MemoryStore = field(default_factory=lambda: MemoryStore(REGION))
    name = "memory"

    async def client(self) -> RegionStore:
        return MemoryRegionStore(self.server, OpenGate())

    def flip(self, ref: SegmentRef) -> None:
        self.server.corrupt(ref, bit=13)

    def truncate(self, ref: SegmentRef, size: int) -> None:
        self.server.truncate(ref, size)

    def litter(self, name: str) -> None:
        """Foreign objects cannot exist here: there are no names, only references."""

    async def close(self) -> None:
        """Nothing is open."""


@dataclass
class AwsWorld:
    """One region in ministack, or in anything else with endpoints. Each world has a group of its own in the same bucket and
    table.
    """

    endpoint: str
    variant: type[AwsRegionStore] = AwsRegionStore
    call_timeout_seconds: float = 10.0
    group: str = field(default_factory=lambda: f"g{uuid.uuid4().hex[:12]}")
    name = "ministack"
    _clients: list[AwsRegionStore] = field(default_factory=list)

    async def client(self, **changed: Any) -> AwsRegionStore:
        arguments: dict[str, Any] = {
            "group": self.group,
            "bucket": BUCKET,
            "table": TABLE,
            "aws_region": REGION,
            "s3_endpoint": self.endpoint,
            "dynamodb_endpoint": self.endpoint,
            "call_timeout_seconds": self.call_timeout_seconds,
            "connect_timeout_seconds": 1.0,
            "max_pool_connections": 32,
            "session": sdk_session(),
        }
        store = self.variant(REGION, **(arguments | changed))
        await store.start()
        self._clients.append(store)
        return store

    def s3(self) -> Any:
        return sdk_client("s3", self.endpoint)

    def dynamodb(self) -> Any:
        return sdk_client("dynamodb", self.endpoint)

    def key(self, name: str) -> str:
        return f"dr/{self.group}/{name}"

    def flip(self, ref: SegmentRef) -> None:
        """Other bytes under the metadata of the old ones."""
        s3 = self.s3()
        there = s3.get_object(Bucket=BUCKET, Key=self.key(ref.key))
        data = bytearray(there["Body"].read())
        data[1] ^= 32
        s3.put_object(Bucket=BUCKET, Key=self.key(ref.key), Body=bytes(data), Metadata=there["Metadata"])

    def truncate(self, ref: SegmentRef, size: int) -> None:
        s3 = self.s3()
        there = s3.get_object(Bucket=BUCKET, Key=self.key(ref.key))
        s3.put_object(Bucket=BUCKET, Key=self.key(ref.key), Body=there["Body"].read()[:size], Metadata=there["Metadata"])

    def litter(self, name: str) -> None:
        self.s3().put_object(Bucket=BUCKET, Key=self.key(name), Body=b"left here by somebody")

    async def close(self) -> None:
        for store in self._clients:
            await store.close()


@dataclass
class SealedMemoryWorld(MemoryWorld):
    """Everything that is put is sealed. Each client has a keyring of its own, as another process has, over the same KMS."""

    name = "sealed-memory"
    kms: dict[str, MemoryKms] = field(default_factory=lambda: {name: MemoryKms(name) for name in (REGION, "us-east-1")})

    async def client(self) -> RegionStore:
        return SealedStore(await super().client(), over(self.kms, "g"))


@dataclass
class SealedAwsWorld(AwsWorld):
    """The same around a store in ministack."""

    name = "sealed-ministack"
    kms: dict[str, MemoryKms] = field(default_factory=lambda: {name: MemoryKms(name) for name in (REGION, "us-east-1")})

    async def client(self, **changed: Any) -> Any:
        return SealedStore(await super().client(**changed), over(self.kms, self.group))


def over(kms: Mapping[str, MemoryKms], group: str, *, home: str = "", clock: Clock | None = None, **settings: Any) -> Sealer:
    """A process's sealer over these KMS, with a keyring of its own."""
    services = {region: MemoryKeyService(server, OpenGate()) for region, server in kms.items()}
    keyring = Keyring(group, services, home=home or next(iter(kms)), clock=clock or SystemClock(), **settings)
    return Sealer(group, keyring)


World = MemoryWorld | AwsWorld


def link(prev_chain: str, seq: int, epoch: int) -> str:
    """A chain hash that depends on all that came before and on who wrote."""
    return hashlib.sha256(f"{prev_chain}/{seq}/{epoch}".encode()).hexdigest()


def token(epoch: int, *, stream: str = "s0", instance: str = "a") -> Fence:
    return Fence(stream, epoch, REGION, instance)


def next_commit(head: Head, fence: Fence, count: int = 1) -> Commit:
    """The commit that extends ``head`` by ``count`` segments of the fence's epoch."""
    chain = head.chain
    for seq in range(head.seq + 1, head.seq + count + 1):
        chain = link(chain, seq, fence.epoch)
    starts = () if head.last_epoch == fence.epoch else (EpochStart(fence.epoch, head.seq + 1),)
    return Commit(
        head.seq, head.chain, head.seq + count, chain, starts, received_at=1_700_000_000.25 + head.seq, records=10, bytes=1000
    )


def check_history(acknowledged: list[tuple[int, Commit]], fenced: list[Head], final: Head) -> None:
    """Raises AssertionError unless all that was acknowledged is one history, and no epoch committed after a later one had
    fenced.

    ``acknowledged``: epoch and commit of each advance that returned; ``fenced``: the heads that ``fence`` returned. No
    realignment.
    """
    chain_at = {0: GENESIS}
    epoch_at: dict[int, int] = {}
    for epoch, commit in sorted(acknowledged, key=lambda entry: entry[1].seq):
        assert commit.seq not in chain_at, f"two acknowledged commits end at segment {commit.seq}"
        assert chain_at.get(commit.prev_seq) == commit.prev_chain, (
            f"segment {commit.seq} extends a history that nobody acknowledged"
        )
        chain_at[commit.seq] = commit.chain
        epoch_at[commit.seq] = epoch
    assert final.seq == max(chain_at), f"the head is at {final.seq}, acknowledged is {max(chain_at)}"
    assert final.chain == chain_at[final.seq], "the head is on another history than the acknowledged one"
    for seq, epoch in epoch_at.items():
        assert final.owner(seq) == epoch, f"segment {seq} of epoch {epoch} is said to belong to epoch {final.owner(seq)}"
        for head in fenced:
            assert seq <= head.seq or epoch >= head.epoch, (
                f"epoch {epoch} committed {seq} after epoch {head.epoch} fenced at {head.seq}"
            )
