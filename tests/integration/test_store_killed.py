"""A stand-in with a journal: killed at any moment, it comes back with all that it acknowledged, and nothing seen is gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.adapters.region_store import AwsRegionStore
from controller.domain.model import Head, SegmentRef
from controller.errors import DrError, Unavailable
from controller.lab.aws import LAB_ENVIRONMENT, AwsStandIn, provision_region
from tests.support.stores import BUCKET, REGION, TABLE, AwsWorld, next_commit, token

pytestmark = [pytest.mark.aws, pytest.mark.slow]

S = "s0"


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up ones."""
    for name, value in LAB_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[AwsStandIn]:
    with AwsStandIn(aws_region=REGION, journal=tmp_path / "journal") as server:
        provision_region(server.endpoint, aws_region=REGION, bucket=BUCKET, table=TABLE)
        yield server


class Writer:
    """Writes one segment and moves the head over it, again and again, and remembers what was promised."""

    def __init__(self, store: AwsRegionStore) -> None:
        self._store = store
        self.promised: dict[SegmentRef, bytes] = {}
        self.head = Head(S)

    async def work(self) -> None:
        """Until the store is gone."""
        self.head = await self._store.fence(token(1))
        with contextlib.suppress(Unavailable):
            while True:
                ref, data = SegmentRef(S, self.head.seq + 1, 1), b"payload %d" % self.head.seq * 1000
                await self._store.put_segment(token(1), ref, data)
                self.promised[ref] = data
                self.head = await self._store.advance(token(1), next_commit(self.head, token(1)))


async def test_whatever_was_acknowledged_or_seen_is_there_after_the_store_was_killed(stand_in: AwsStandIn) -> None:
    world = AwsWorld(stand_in.endpoint)
    try:
        store = await world.client()
        writer, seen = Writer(store), Head(S)
        working = asyncio.create_task(writer.work())
        while len(writer.promised) < 10:
            assert not working.done(), "the writer ended before the store did"
            with contextlib.suppress(DrError):
                seen = await store.read_head(S)
        stand_in._signal(9)  # in the middle of whatever is under way
        await working
        await asyncio.to_thread(stand_in.kill)
        await asyncio.to_thread(stand_in.start)
        after = await (await world.client()).read_head(S)
        assert writer.head.seq <= after.seq <= writer.head.seq + 1, "an answer under way may have been lost, no more"
        assert after.seq >= seen.seq
        assert (after.chain == writer.head.chain) is (after.seq == writer.head.seq)
        for ref, data in writer.promised.items():
            assert await store.get_segment(ref) == data
    finally:
        await world.close()


async def test_versions_and_uploads_are_the_same_after_it_was_killed_and_a_torn_end_is_cut_off(
    stand_in: AwsStandIn, tmp_path: Path
) -> None:
    world = AwsWorld(stand_in.endpoint)
    s3 = world.s3()
    for number in range(3):
        s3.put_object(Bucket=BUCKET, Key="twice", Body=b"body %d" % number)
    upload = s3.create_multipart_upload(Bucket=BUCKET, Key="large")["UploadId"]
    part = s3.upload_part(Bucket=BUCKET, Key="large", UploadId=upload, PartNumber=1, Body=b"x" * 5_000_000)["ETag"]
    before = [(one["VersionId"], one["Size"]) for one in s3.list_object_versions(Bucket=BUCKET, Prefix="twice")["Versions"]]
    stand_in.kill()
    with (tmp_path / "journal").open("ab") as journal:
        journal.write(b"\0\0\0\x10\0\0\0\x10{")  # killed in the middle of a record
    stand_in.start()
    after = [(one["VersionId"], one["Size"]) for one in s3.list_object_versions(Bucket=BUCKET, Prefix="twice")["Versions"]]
    assert after == before
    whole = {"Parts": [{"ETag": part, "PartNumber": 1}]}
    s3.complete_multipart_upload(Bucket=BUCKET, Key="large", UploadId=upload, MultipartUpload=whole)
    stand_in.kill()
    stand_in.start()
    assert s3.head_object(Bucket=BUCKET, Key="large")["ContentLength"] == 5_000_000


async def test_a_stand_in_without_a_journal_comes_back_empty() -> None:
    """The control: it is the journal that keeps it."""
    with AwsStandIn(aws_region=REGION) as server:
        provision_region(server.endpoint, aws_region=REGION, bucket=BUCKET, table=TABLE)
        server.kill()
        server.start()
        assert AwsWorld(server.endpoint).s3().list_buckets()["Buckets"] == []
