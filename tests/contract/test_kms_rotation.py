"""A KMS key that another one came after, and keys that may not be used any more, as AWS documents its answers.

Neither stand-in compares the key that ``Decrypt`` names with the one that wrapped, and that is what all of this turns on. So a
small server of our own speaks KMS's protocol here (JSON 1.1 over HTTP), with the error codes of its API reference.
"""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from controller.adapters.clock import SystemClock
from controller.adapters.keyring import Keyring
from controller.adapters.kms import AwsKeyService
from controller.adapters.memory.key_service import MemoryKms
from controller.adapters.sealing import Envelope, Place, envelope_for
from controller.domain.model import SegmentRef
from controller.errors import Corrupt, DrError, Misconfigured
from controller.lab.aws import LAB_ENVIRONMENT

REGION = "eu-west-1"
OLD, NEW, OTHER = (f"arn:aws:kms:{REGION}:111122223333:key/{name}" for name in ("old", "new", "other"))
CONTEXT = {"agent-dr:group": "fleet", "agent-dr:stream": "s00"}
REFUSALS = {"disabled": "DisabledException", "pending deletion": "KMSInvalidStateException"}


class Kms:
    """Some keys of one region, each in a state of its own."""

    def __init__(self) -> None:
        self.keys = {arn: MemoryKms(arn) for arn in (OLD, NEW, OTHER)}
        self.states: dict[str, str] = {}
        self.asked: list[tuple[str, str]] = []

    def answer(self, operation: str, given: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """HTTP status and document."""
        arn, context = given["KeyId"], given.get("EncryptionContext", {})
        self.asked.append((operation, arn))
        if (refusal := REFUSALS.get(self.states.get(arn, ""))) is not None:
            return 400, {"__type": refusal, "message": f"{arn} is {self.states[arn]}"}
        if operation == "Decrypt":
            name, _, wrapped = base64.b64decode(given["CiphertextBlob"]).partition(b"|")
            if name.decode() != arn:
                return 400, {"__type": "IncorrectKeyException", "message": "the key ID in the request is not that of the data"}
            try:
                return 200, {"KeyId": arn, "Plaintext": _text(self.keys[arn].unwrap(wrapped, context))}
            except Corrupt:
                return 400, {"__type": "InvalidCiphertextException"}
        plain = os.urandom(32) if operation == "GenerateDataKey" else base64.b64decode(given["Plaintext"])
        blob = arn.encode() + b"|" + self.keys[arn].wrap(plain, context)
        found = {"KeyId": arn, "CiphertextBlob": _text(blob)}
        return 200, found | ({"Plaintext": _text(plain)} if operation == "GenerateDataKey" else {})


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture
def kms(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Kms, str]]:
    for name, value in LAB_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    far = Kms()

    class Speaking(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, document = far.answer(self.headers["X-Amz-Target"].rsplit(".", 1)[1], given)
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/x-amz-json-1.1")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Speaking) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield far, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@asynccontextmanager
async def ring(endpoint: str, key: str, *former: str) -> AsyncIterator[Keyring]:
    """What a controller with these settings has."""
    service = AwsKeyService(
        REGION, key=key, former=former, aws_region=REGION, endpoint=endpoint, call_timeout_seconds=20.0,
        connect_timeout_seconds=10.0,
    )  # fmt: skip
    await service.start()
    keyring = Keyring("fleet", {REGION: service}, home=REGION, clock=SystemClock())
    try:
        yield keyring
    finally:
        await keyring.close()


async def sealed(keyring: Keyring) -> tuple[bytes, Envelope]:
    """A data key in plain, and the header of an object under it."""
    writer = await keyring.writer("s00", 1)
    return writer.key.plain, envelope_for(writer.key, writer.wraps, Place.of("fleet", SegmentRef("s00", 1, 1)), b"x")


async def opens(endpoint: str, envelope: Envelope, *keys: str) -> bytes | type[DrError]:
    """The data key, as a controller that starts with these keys reads it, or with what it fails."""
    async with ring(endpoint, *keys) as keyring:
        try:
            return (await keyring.unwrap("s00", envelope)).plain
        except DrError as error:
            return type(error)


async def test_a_key_came_after_another_one_and_what_that_one_wrapped_still_opens(kms: tuple[Kms, str]) -> None:
    far, endpoint = kms
    async with ring(endpoint, OLD) as before:
        old_key, old = await sealed(before)
    async with ring(endpoint, NEW, OLD) as after:
        new_key, new = await sealed(after)
        assert ("GenerateDataKey", NEW) in far.asked
        assert (await after.unwrap("s00", old)).plain == old_key
    assert await opens(endpoint, new, NEW, OLD) == new_key
    assert await opens(endpoint, old, NEW) is Corrupt, "without former_kms_keys nobody knows which key it was"
    assert await opens(endpoint, new, OLD) is Corrupt, "a controller with the settings of before"
    assert await opens(endpoint, old, NEW, OTHER, OLD) == old_key


@pytest.mark.parametrize("state", list(REFUSALS))
async def test_a_key_that_may_not_be_used_is_no_damage_and_does_not_hide_the_others(kms: tuple[Kms, str], state: str) -> None:
    far, endpoint = kms
    async with ring(endpoint, OLD) as before:
        old_key, old = await sealed(before)
    async with ring(endpoint, NEW, OLD) as after:
        new_key, new = await sealed(after)
    far.states[OLD] = state
    assert await opens(endpoint, new, NEW, OLD) == new_key
    assert await opens(endpoint, old, NEW, OLD) is Misconfigured, "never Corrupt: nothing is to be repaired"
    far.states = {NEW: state}
    assert await opens(endpoint, old, NEW, OLD) == old_key
    async with ring(endpoint, NEW, OLD) as refused:
        with pytest.raises(Misconfigured, match="no region's KMS makes a data key"):
            await sealed(refused)
        (seen,) = refused.seen()
        assert seen.wraps is False
        assert REFUSALS[state] in seen.why
