"""The two calls that bypass the SDK: what arrives is what was signed. Stand-ins do not look at signatures, this server does.

The verifier is written from AWS's description ("Create a signed AWS API request") and shares nothing with botocore's signer.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aioboto3
import aiohttp
import pytest
from botocore.exceptions import ClientError

from controller.adapters.region_store import AwsRegionStore
from controller.domain.model import Fence, SegmentRef
from controller.errors import OutcomeUnknown

SECRET = "made-up-secret"
FENCE = Fence("s0", 3, "eu-west-1", "a b/ü")


def verify(method: str, path: str, headers: dict[str, str], body: bytes) -> str:
    """The service that the request was signed for. Raises AssertionError when it is not signed by our secret."""
    scheme, rest = headers["authorization"].split(" ", 1)
    fields = dict(part.strip().split("=", 1) for part in rest.split(","))
    assert scheme == "AWS4-HMAC-SHA256"
    key_id, day, region, service, end = fields["Credential"].split("/")
    assert (key_id, region, end) == ("made-up", "eu-west-1", "aws4_request")
    signed = fields["SignedHeaders"].split(";")
    assert {"host", "x-amz-date", "x-amz-security-token"} <= set(signed)
    assert {name for name in headers if name.startswith("x-amz-")} <= set(signed)
    digest = hashlib.sha256(body).hexdigest()
    assert headers.get("x-amz-content-sha256", digest) == digest
    canonical = "\n".join(
        [method, path, "", *(f"{name}:{' '.join(headers[name].split())}" for name in signed), "", ";".join(signed), digest]
    )
    scope = f"{day}/{region}/{service}/aws4_request"
    text = "\n".join(["AWS4-HMAC-SHA256", headers["x-amz-date"], scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = f"AWS4{SECRET}".encode()
    for part in (day, region, service, "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    assert hmac.new(key, text.encode(), "sha256").hexdigest() == fields["Signature"]
    return service


class Far:
    """An endpoint that verifies every request and answers what it was told to."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        self.problem: AssertionError | None = None
        self.answer: tuple[int, dict[str, str], bytes] = (200, {}, b"")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            method, path, _ = line.decode().split(" ")
            headers = {}
            while (line := await reader.readline()) != b"\r\n":
                name, value = line.decode().rstrip("\r\n").split(":", 1)
                headers[name.lower()] = value.strip()
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            try:
                service = verify(method, path, headers, body)
                self.seen.append((service, path, headers, body))
            except AssertionError as problem:
                self.problem = problem
            status, more, content = self.answer
            told = "".join(f"{name}: {value}\r\n" for name, value in more.items())
            writer.write(f"HTTP/1.1 {status} x\r\nContent-Length: {len(content)}\r\n{told}\r\n".encode() + content)
        writer.close()


@asynccontextmanager
async def wired(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[AwsRegionStore, Far]]:
    for name, value in {"ACCESS_KEY_ID": "made-up", "SECRET_ACCESS_KEY": SECRET, "SESSION_TOKEN": "tok/en+=="}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    far = Far()
    server = await asyncio.start_server(far.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    store = AwsRegionStore(
        "eu-west-1", group="g", bucket="bucket-1", table="table-1", aws_region="eu-west-1", s3_endpoint=url,
        dynamodb_endpoint=url, call_timeout_seconds=2.0, connect_timeout_seconds=1.0, max_pool_connections=4,
        session=aioboto3.Session(),
    )  # fmt: skip
    async with store:
        yield store, far
    server.close()
    assert far.problem is None, far.problem


async def test_a_put_is_signed_as_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    async with wired(monkeypatch) as (store, far):
        assert store._wire is not None
        for data in (b"payload", b"", b"x" * 100_000):
            await store.put_segment(FENCE, SegmentRef("s0", 7, 3), data)
        (service, path, headers, body), *_ = far.seen
    assert (service, path) == ("s3", "/bucket-1/dr/g/s0/0000000000000007-0000000000000003.seg")
    assert (headers["if-none-match"], body) == ("*", b"payload")
    assert headers["x-amz-meta-sha256"] == hashlib.sha256(b"payload").hexdigest()
    assert headers["x-amz-meta-writer"].isascii()


async def test_an_update_is_signed_as_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    async with wired(monkeypatch) as (store, far):
        assert store._wire is not None
        content = json.dumps({"Attributes": {"seq": {"N": "1"}}}).encode()
        far.answer = 200, {"x-amz-crc32": str(zlib.crc32(content))}, content
        assert await store._wire.update_item({"TableName": "table-1", "Key": {"pk": {"S": "ü"}}}) == {
            "Attributes": {"seq": {"N": "1"}}
        }
        ((service, path, headers, body),) = far.seen
    assert (service, path, headers["x-amz-target"]) == ("dynamodb", "/", "DynamoDB_20120810.UpdateItem")
    assert json.loads(body)["TableName"] == "table-1"


@pytest.mark.parametrize(
    ("status", "content", "code"),
    [
        (412, b"<Error><Code>PreconditionFailed</Code><Message>a &amp; b</Message></Error>", "PreconditionFailed"),
        (503, b"<html>a proxy's page</html>", "503"),
        (307, b"", "307"),
    ],
)
async def test_errors_of_s3_arrive_as_the_sdk_would_tell_them(
    monkeypatch: pytest.MonkeyPatch, status: int, content: bytes, code: str
) -> None:
    async with wired(monkeypatch) as (store, far):
        far.answer = status, {}, content
        assert store._wire is not None
        with pytest.raises(ClientError) as caught:
            await store._wire.put_object("k", b"x", hashlib.sha256(b"x").hexdigest(), {})
    told: Any = caught.value.response
    assert (told["Error"]["Code"], told["ResponseMetadata"]["HTTPStatusCode"]) == (code, status)


async def test_a_failed_condition_brings_the_item(monkeypatch: pytest.MonkeyPatch) -> None:
    async with wired(monkeypatch) as (store, far):
        kind = "com.amazonaws.dynamodb.v20120810#ConditionalCheckFailedException"
        far.answer = 400, {}, json.dumps({"__type": kind, "message": "no", "Item": {"seq": {"N": "9"}}}).encode()
        assert store._wire is not None
        with pytest.raises(ClientError) as caught:
            await store._wire.update_item({})
    told: Any = caught.value.response
    assert (told["Error"]["Code"], told["Item"]) == ("ConditionalCheckFailedException", {"seq": {"N": "9"}})


async def test_an_answer_that_does_not_match_its_checksum_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with wired(monkeypatch) as (store, far):
        far.answer = 200, {"x-amz-crc32": "1"}, b'{"Attributes": {}}'
        assert store._wire is not None
        with pytest.raises(aiohttp.ClientPayloadError):
            await store._wire.update_item({})
        with pytest.raises(OutcomeUnknown):
            await store.fence(FENCE)


async def test_behind_a_proxy_the_sdk_makes_these_calls_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    async with wired(monkeypatch) as (store, _):
        assert store._wire is None
