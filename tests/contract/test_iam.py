"""Least privilege, measured: what the adapters really send is allowed by exactly the policies of ``terraform/modules/iam``, and
those allow nothing that nobody sends."""

from __future__ import annotations

import ast
import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import pytest
from botocore import xform_name

from controller.adapters import multipart
from controller.adapters.clock import SystemClock
from controller.adapters.keyring import Keyring
from controller.adapters.kms import AwsKeyService
from controller.adapters.region_store import MULTIPART_FROM_BYTES, AwsRegionStore
from controller.adapters.route53 import Route53Traffic
from controller.adapters.sealed_store import SealedStore, Sealer
from controller.domain.model import Baseline, CatalogueEntry, EpochStart, Fence, FramePlace, Salvage, SegmentRef, SnapshotRef
from controller.errors import Conflict
from controller.lab.aws import AwsStandIn, provision_zone
from tests.support.http_fault_proxy import HttpFaultProxy
from tests.support.iam import ACCOUNT, ACTION_OF, Call, allowed, call_of, documents, granted
from tests.support.stores import BUCKET, REGION, TABLE, AwsWorld, next_commit, stand_in, token

pytestmark = pytest.mark.aws

ADAPTERS = Path(__file__).resolve().parents[2] / "controller" / "adapters"
S = "s0"
NAME = "agents.iam.example."
READING = {"s3:GetObject", "s3:ListBucket", "dynamodb:GetItem", "dynamodb:Query"}
CLIENTS = ("_s3", "s3", "_dynamodb", "_wire", "wire", "_client")
"""Names under which adapters keep what speaks to AWS."""
NOT_CALLS = {"close", "generate_presigned_url", "meta"}
OTHERS = ("etcd.py", "etcd_endpoint.py", "notify.py")
"""Adapters to whom these names mean something else."""


@pytest.fixture(scope="module")
def aws() -> Iterator[AwsStandIn]:
    with stand_in() as server:
        yield server


@asynccontextmanager
async def recorded(endpoint: str) -> AsyncIterator[HttpFaultProxy]:
    """A proxy that breaks nothing and remembers every request."""
    parts = urlsplit(endpoint)
    async with HttpFaultProxy(parts.hostname or "", parts.port or 0) as proxy:
        yield proxy


def calls(proxy: HttpFaultProxy) -> list[Call]:
    return [call_of(seen.request.raw, REGION) for seen in proxy.seen]


async def everything_of_a_store(store: AwsRegionStore, large: bytes) -> None:
    """Each method of the ports that ``AwsRegionStore`` implements, and the roads on which it asks again."""
    fence = token(1)
    head = await store.fence(fence)
    for seq in (1, 2, 3):
        await store.put_segment(fence, SegmentRef(S, seq, 1), b"segment")
        head = await store.advance(fence, next_commit(head, fence))
    await store.put_segment(fence, SegmentRef(S, 1, 1), b"segment")  # there already: it is compared
    await store.put_segment(fence, SegmentRef(S, 4, 1), large)
    with pytest.raises(Conflict):
        await store.put_segment(fence, SegmentRef(S, 4, 1), large[::-1])  # the upload is aborted
    await asyncio.gather(*multipart._aborts)
    assert await store.get_segment(SegmentRef(S, 1, 1)) == b"segment"
    await store.list_segments(S, 1)
    await store.read_head(S)
    await store.put_snapshot(fence, SnapshotRef(S, 2, 1), b"snapshot")
    await store.get_snapshot(SnapshotRef(S, 2, 1))
    await store.list_snapshots(S)
    await store.delete_snapshots(fence, [SnapshotRef(S, 2, 1)])
    entry = CatalogueEntry("agent", "checkpoint", "r1", "ab" * 32, 7, "raw", 1.0, (FramePlace(1, 1, 0, 100, 50),))
    await store.put_catalogue(fence, [entry])
    (listed,) = await store.list_catalogue(S, "", 10)
    await store.mend_catalogue(fence, listed, replace(entry, id="r2"))
    await store.mend_catalogue(fence, await store.inspect_catalogue(S, "agent"), None)
    await store.mend_object(SegmentRef(S, 9, 1), await store.inspect_object(SegmentRef(S, 9, 1)), b"it was lost")
    await store.mend_object(SegmentRef(S, 9, 1), await store.inspect_object(SegmentRef(S, 9, 1)), b"it was damaged")
    found = await store.inspect_head(S)
    head = await store.mend_head(fence, found, replace(head, records=head.records + 1))
    head = await store.set_base(fence, head, Baseline(3, "a" * 64))
    await store.delete_segments(fence, [SegmentRef(S, 1, 1)])
    await store.forget_salvage(fence, Salvage(1, 1, (EpochStart(1, 1),), "a" * 64, 1))
    await store.delete_diverged(fence, [SegmentRef(S, 1, 1)])


async def stored(endpoint: str, world: AwsWorld) -> list[Call]:
    """Both ways of sending: the wire of our own, and the SDK."""
    async with recorded(endpoint) as proxy:
        for stream_wire in (True, False):
            one = AwsWorld(proxy.endpoint, group=world.group + ("w" if stream_wire else "s"), call_timeout_seconds=60.0)
            store = await one.client()
            if not stream_wire:
                store._wire = None
            await everything_of_a_store(store, bytes(MULTIPART_FROM_BYTES) + b"more than one part")
            await one.close()
        return calls(proxy)


async def test_what_the_store_sends_is_what_streaming_may_do(aws: AwsStandIn) -> None:
    world = AwsWorld(aws.endpoint)
    sent = await stored(aws.endpoint, world)
    table = f"arn:aws:dynamodb:{REGION}:{ACCOUNT}:table/{TABLE}"
    for suffix in ("w", "s"):
        policies = documents(group=world.group + suffix, buckets=[BUCKET], tables=[table], zone="Z0", name=NAME)
        own = [call for call in sent if _group_of(call) in (world.group + suffix, None)]
        assert [call for call in own if not allowed([policies["streaming"]], call)] == []
        assert [call for call in own if allowed([policies["promotion"]], call)] == []
        assert {call.action for call in own if allowed([policies["drills"]], call)} == READING
        foreign = [call for call in sent if _group_of(call) not in (world.group + suffix, None)]
        assert foreign
        assert [call for call in foreign if allowed([policies["streaming"]], call)] == []
        assert granted(policies["streaming"]) == {call.action for call in own}, "more is granted than is used"
        assert granted(policies["drills"]) == READING
    assert {call.operation for call in sent} == {
        name for name in sent_by_adapters() if ACTION_OF[name].startswith(("s3:", "dynamodb:"))
    }


def _group_of(call: Call) -> str | None:
    """The group that a call is about, by what it names."""
    keys = call.context.get("dynamodb:LeadingKeys")
    if keys:
        return keys[0].partition("#")[0]
    place = call.context.get("s3:prefix", call.resources)[0].removeprefix(f"arn:aws:s3:::{BUCKET}/")
    parts = place.split("/")
    return parts[1] if parts[0] == "dr" else None


async def test_what_route_53s_client_sends_is_what_promotion_may_do(aws: AwsStandIn) -> None:
    regions = ("eu-west-1", "us-east-1")
    zone = provision_zone(
        aws.endpoint, "iam.example.", NAME, {r: ["127.0.1.1"] for r in regions}, dict.fromkeys(regions, 1), 3, 5
    )
    async with recorded(aws.endpoint) as proxy:
        traffic = Route53Traffic(zone, NAME, regions=regions, ttl_seconds=5, endpoint=proxy.endpoint, call_timeout_seconds=20.0)
        fence = Fence(stream=S, epoch=4, region="us-east-1", instance="a")
        change = await traffic.change(fence, await traffic.read(), {"eu-west-1": 0, "us-east-1": 100})
        await traffic.in_sync(change)
        await traffic.close()
        sent = calls(proxy)
    policies = documents(group="g", buckets=[BUCKET], tables=["arn:t"], zone=zone, name=NAME)
    assert [call for call in sent if not allowed([policies["promotion"]], call)] == []
    assert [call for call in sent if allowed([policies["streaming"], policies["drills"]], call)] == []
    assert granted(policies["promotion"]) == {call.action for call in sent}, "more is granted than is used"
    assert {call.operation for call in sent} == {name for name in sent_by_adapters() if ACTION_OF[name].startswith("route53")}
    elsewhere = documents(group="g", buckets=[BUCKET], tables=["arn:t"], zone=zone, name="other.iam.example.")
    changes = [call for call in sent if call.operation == "ChangeResourceRecordSets"]
    assert [call for call in changes if allowed([elsewhere["promotion"]], call)] == []


async def test_what_sealing_sends_to_kms_is_what_sealing_may_do(aws: AwsStandIn) -> None:
    world = AwsWorld(aws.endpoint)
    async with recorded(aws.endpoint) as proxy:
        services, keys = {}, []
        for region in (REGION, "us-east-1"):
            kms = boto3.client("kms", endpoint_url=aws.endpoint, region_name=region)
            keys.append(kms.create_key()["KeyMetadata"]["Arn"])
            seconds = {"call_timeout_seconds": 30.0, "connect_timeout_seconds": 5.0}
            services[region] = AwsKeyService(region, key=keys[-1], aws_region=region, endpoint=proxy.endpoint, **seconds)
            await services[region].start()
        for home in services:  # the second opens what the first has sealed: nothing is in its memory
            keyring = Keyring(world.group, services, home=home, clock=SystemClock())
            store = SealedStore(await world.client(), Sealer(world.group, keyring))
            if home == REGION:
                await store.put_segment(token(1), SegmentRef(S, 1, 1), b"a sealed segment")
            assert await store.get_segment(SegmentRef(S, 1, 1)) == b"a sealed segment"
        await keyring.close()
        await world.close()
        sent = calls(proxy)
    policies = documents(group=world.group, buckets=[BUCKET], tables=["arn:t"], zone="Z0", name=NAME, keys=keys)
    assert [call for call in sent if not allowed([policies["sealing"]], call)] == []
    assert granted(policies["sealing"]) == {call.action for call in sent}, "more is granted than is used"
    assert {call.action for call in sent if allowed([policies["unsealing"]], call)} == granted(policies["unsealing"])
    others = documents(group="other", buckets=[BUCKET], tables=["arn:t"], zone="Z0", name=NAME, keys=keys)
    assert [call for call in sent if allowed([others["sealing"]], call)] == []
    text = (ADAPTERS / "kms.py").read_text(encoding="utf-8")
    assert set(re.findall(r'_ask\("(\w+)"', text)) == {call.operation for call in sent}


def sent_by_adapters() -> set[str]:
    """Operations that some line of the adapters calls, by the SDK's method names: so that none is missed because nothing here
    makes it happen. Raises AssertionError for one that the table of actions does not have."""
    methods = {xform_name(operation): operation for operation in ACTION_OF}
    found = set()
    for path in sorted(set(ADAPTERS.glob("*.py")) - {ADAPTERS / name for name in OTHERS}):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute) or ast.unparse(node.value).removeprefix("self.") not in CLIENTS:
                continue
            assert node.attr in methods or node.attr in NOT_CALLS, f"{path.name}:{node.lineno}: {node.attr} has no known action"
            found |= {methods[node.attr]} if node.attr in methods else set()
    return found
