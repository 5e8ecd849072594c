"""Plain calls of the region store against moto in this process: a second opinion on requests and answers, and fast."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from moto.server import ThreadedMotoServer

from controller.domain.model import GENESIS, EpochStart, Head, Realignment, Salvage, SegmentRef
from controller.errors import Conflict, FenceLost, NotFound
from controller.lab.aws import LAB_ENVIRONMENT, provision_region
from tests.support.stores import BUCKET, REGION, TABLE, AwsWorld, link, next_commit, token

S = "s0"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LAB_ENVIRONMENT.items():
            patch.setenv(name, value)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        try:
            host, port = server.get_host_and_port()
            provision_region(f"http://{host}:{port}", aws_region=REGION, bucket=BUCKET, table=TABLE)
            yield f"http://{host}:{port}"
        finally:
            server.stop()


@pytest.fixture
async def world(endpoint: str) -> AsyncIterator[AwsWorld]:
    made = AwsWorld(endpoint)
    yield made
    await made.close()


async def test_segments_are_put_once_listed_and_read_back(world: AwsWorld) -> None:
    store = await world.client()
    for seq in (2, 1, 10):
        await store.put_segment(token(1), SegmentRef(S, seq, 1), f"segment {seq}".encode())
    await store.put_segment(token(1), SegmentRef(S, 1, 1), b"segment 1")
    with pytest.raises(Conflict):
        await store.put_segment(token(1), SegmentRef(S, 1, 1), b"other")
    assert [ref.seq for ref in await store.list_segments(S, 2)] == [2, 10]
    assert await store.get_segment(SegmentRef(S, 10, 1)) == b"segment 10"
    with pytest.raises(NotFound):
        await store.get_segment(SegmentRef(S, 3, 1))


async def test_the_object_key_and_the_head_item_are_as_documented(world: AwsWorld) -> None:
    """People read these with plain AWS calls when no controller runs."""
    store = await world.client()
    await store.put_segment(token(3, instance="ä"), SegmentRef(S, 1, 3), b"x")
    about = world.s3().head_object(Bucket=BUCKET, Key=f"dr/{world.group}/{S}/0000000000000001-0000000000000003.seg")
    assert about["Metadata"] == {
        "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881",
        "writer": "eu-west-1/%C3%A4/3",
    }
    fence = token(3)
    commit = next_commit(await store.fence(fence), fence)
    await store.advance(fence, commit)
    key = {"pk": {"S": f"{world.group}#{S}"}, "sk": {"S": "head"}}
    item = world.dynamodb().get_item(TableName=TABLE, Key=key)["Item"]
    assert item == key | {
        "seq": {"N": "1"},
        "epoch": {"N": "3"},
        "chain": {"S": commit.chain},
        "epochs": {"L": [{"L": [{"N": "3"}, {"N": "1"}]}]},
        "base": {"N": "1"},
        "base_chain": {"S": GENESIS},
        "salvage": {"L": []},
        "received_at": {"N": "1700000000.25"},
        "records": {"N": "10"},
        "bytes": {"N": "1000"},
        "writer": {"S": "eu-west-1/a/3"},
        "snapshots": {"S": "[]"},
    }


async def test_a_head_lives_through_fence_advance_fence_and_realign(world: AwsWorld) -> None:
    store = await world.client()
    assert await store.read_head(S) == Head(S)
    old, new = token(1), token(2, instance="b")
    head = await store.fence(old)
    for _ in range(3):
        head = await store.advance(old, next_commit(head, old))
    fenced = await store.fence(new)
    assert fenced.seq == 3
    with pytest.raises(FenceLost):
        await store.advance(old, next_commit(head, old))
    salvage = Salvage(2, 3, fenced.epochs, fenced.chain, 2)
    to = Realignment(1, link(GENESIS, 1, 1), 1, GENESIS, (EpochStart(1, 1),), salvage)
    after = await store.realign(new, fenced, to)
    assert (after.seq, after.salvage) == (1, (salvage,))
    assert await store.realign(new, fenced, to) == after
    assert await store.read_head(S) == after
