"""The two calls that every segment makes in every region, PutObject and UpdateItem, written to the wire directly.

botocore takes about 1.5 ms of CPU for a call (endpoint rules, models, hooks), six of them for each segment: it was by far the
largest part of what a record cost the holder. Here the request is put together as the service documents it, signed by
``aws_sign`` (parts of large objects by botocore's own signer) and sent by aiohttp, in a fourth of the time. Errors leave as
botocore's ``ClientError``, so that everything above knows one kind. All other calls stay with the SDK, and so do these two
where a proxy is configured (``Wire.open`` returns None then).

Sources: S3 API reference, "PutObject"; DynamoDB API reference, "UpdateItem" and "DynamoDB low-level API"; both of API version
2006-03-01 and 2012-08-10.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import ssl
import urllib.request
import zlib
from base64 import b64encode
from binascii import unhexlify
from collections.abc import AsyncIterator, Mapping
from html import unescape
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.exceptions import ClientError
from botocore.httpsession import get_cert_path
from yarl import URL

from controller.adapters.aws_sign import Signer

_TARGET = "DynamoDB_20120810.UpdateItem"
_PIECE_BYTES = 256 * 1024
"""Larger bodies are written piece by piece."""
_ERROR_MAX_BYTES = 64 * 1024
"""An error document is small; of anything longer (a proxy's page) no more than this is looked at."""


class _KnownDigest(S3SigV4Auth):
    """Signs the body by the sha256 that the caller computed already."""

    def payload(self, request: Any) -> str:
        return str(request.context["payload_sha256"])


class Wire:
    """One region's connections. ``close`` it."""

    def __init__(
        self,
        objects: aiohttp.ClientSession,
        heads: aiohttp.ClientSession,
        credentials: Any,
        aws_region: str,
        bucket_url: str,
        dynamodb_url: str,
    ) -> None:
        self._objects = objects
        self._heads = heads
        """Connections of their own: a head update never waits for one behind objects, however many those are."""
        self._credentials = credentials
        self._region = aws_region
        self._s3_signer = Signer("s3", aws_region)
        self._dynamodb_signer = Signer("dynamodb", aws_region)
        self._bucket_url = bucket_url
        self._dynamodb = URL(dynamodb_url)

    @classmethod
    async def open(
        cls,
        credentials: Any,
        s3: Any,
        dynamodb: Any,
        *,
        bucket: str,
        aws_region: str,
        connect_seconds: float,
        connections: int,
    ) -> Wire | None:
        """None when a proxy stands between. Sends nothing. The SDK's own rules say where the bucket is (a presigned URL)."""
        url = (await s3.generate_presigned_url("put_object", Params={"Bucket": bucket, "Key": "k"})).split("?", 1)[0]
        for address in (url, dynamodb.meta.endpoint_url):
            parts = urlsplit(address)
            if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname or ""):
                return None
        tls = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE") or get_cert_path(True))
        objects, heads = (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=connections, ssl=tls, keepalive_timeout=12.0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_seconds),  # each call has a deadline of its own
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
            )
            for _ in range(2)
        )
        return cls(objects, heads, credentials, aws_region, url.removesuffix("k"), dynamodb.meta.endpoint_url.rstrip("/") + "/")

    async def close(self) -> None:
        await self._objects.close()
        await self._heads.close()

    async def put_object(self, key: str, data: bytes, digest: str, metadata: Mapping[str, str]) -> None:
        """``If-None-Match: *``; S3 refuses bytes whose sha256 is not ``digest`` (64 hex digits). Raises ClientError, what
        aiohttp raises."""
        headers = {
            "If-None-Match": "*",
            "x-amz-sdk-checksum-algorithm": "SHA256",
            "x-amz-checksum-sha256": b64encode(unhexlify(digest)).decode(),
            **{f"x-amz-meta-{name}": value for name, value in metadata.items()},
        }
        url = self._bucket_url + quote(key, safe="/~")
        signed = self._s3_signer.sign(await self._frozen(), "PUT", url, headers, digest)
        await self._put(url, memoryview(data), signed, "PutObject")

    async def upload_part(self, key: str, upload: str, number: int, data: memoryview, digest: str) -> str:
        """One part of a multipart upload. Returns its ETag. Raises ClientError, what aiohttp raises."""
        url = f"{self._bucket_url}{quote(key, safe='/~')}?partNumber={number}&uploadId={quote(upload, safe='')}"
        headers = {"x-amz-sdk-checksum-algorithm": "SHA256", "x-amz-checksum-sha256": b64encode(unhexlify(digest)).decode()}
        request = AWSRequest(method="PUT", url=url, headers={**headers, "X-Amz-Content-SHA256": digest})
        request.context["payload_sha256"] = digest
        _KnownDigest(await self._frozen(), "s3", self._region).add_auth(request)
        return await self._put(url, data, dict(request.headers.items()), "UploadPart")

    async def _put(self, url: str, data: memoryview, signed: dict[str, str], operation: str) -> str:
        body: Any = bytes(data) if len(data) <= _PIECE_BYTES else _pieces(data)
        signed["Content-Length"] = str(len(data))
        async with self._objects.put(URL(url, encoded=True), data=body, headers=signed, allow_redirects=False) as answer:
            if answer.status != 200:
                raise _s3_error(answer.status, await answer.content.read(_ERROR_MAX_BYTES), operation)
            await answer.read()
            return answer.headers.get("ETag", "")

    async def update_item(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer's document, values in DynamoDB's own form. Raises ClientError (with ``Item``, where it was asked for and a
        condition did not hold), what aiohttp raises."""
        body = json.dumps(request, separators=(",", ":")).encode()
        headers = {"Content-Type": "application/x-amz-json-1.0", "X-Amz-Target": _TARGET}
        digest = hashlib.sha256(body).hexdigest()
        signed = self._dynamodb_signer.sign(await self._frozen(), "POST", str(self._dynamodb), headers, digest)
        async with self._heads.post(self._dynamodb, data=body, headers=signed, allow_redirects=False) as answer:
            content = await answer.read()
            told = answer.headers.get("x-amz-crc32", "")
            if told.isdigit() and int(told) != zlib.crc32(content):
                raise aiohttp.ClientPayloadError("the answer does not match its x-amz-crc32")
            if answer.status != 200:
                raise _dynamodb_error(answer.status, content)
        document: dict[str, Any] = _document(content)
        if "Attributes" not in document:
            raise aiohttp.ClientPayloadError("the answer to UpdateItem holds no attributes")
        return document

    async def _frozen(self) -> Any:
        """Credentials are asked for each time: their provider renews them."""
        return None if self._credentials is None else await self._credentials.get_frozen_credentials()


def _document(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


async def _pieces(data: memoryview) -> AsyncIterator[bytes]:
    """So that a large body is written as fast as it is taken, and the event loop comes round in between."""
    for start in range(0, len(data), _PIECE_BYTES):
        yield bytes(data[start : start + _PIECE_BYTES])


def _s3_error(status: int, content: bytes, operation: str) -> ClientError:
    text = content.decode("utf-8", "replace")
    code = re.search(r"<Code>([^<]{1,200})</Code>", text)
    message = re.search(r"<Message>([^<]{1,2000})</Message>", text)
    return _error(status, code[1] if code else str(status), unescape(message[1]) if message else "", operation, {})


def _dynamodb_error(status: int, content: bytes) -> ClientError:
    document = _document(content)
    code = str(document.get("__type", "")).rsplit("#", 1)[-1] or str(status)
    message = str(document.get("message") or document.get("Message") or "")
    item = document.get("Item")
    return _error(status, code, message, "UpdateItem", {"Item": item} if isinstance(item, dict) else {})


def _error(status: int, code: str, message: str, operation: str, more: Mapping[str, Any]) -> ClientError:
    told: Any = {
        "Error": {"Code": code, "Message": message},
        "ResponseMetadata": {"HTTPStatusCode": status},
        **more,
    }
    return ClientError(told, operation)
