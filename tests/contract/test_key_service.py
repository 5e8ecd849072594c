"""One suite for every KeyService: in memory and against the KMS of ministack (moto's is not asked: one stand-in is enough).

ministack checks the encryption context, unknown and disabled keys. It does not authenticate what it unwraps, nor compare the
key that is named: damaged wraps are found by the data key's name (``tests/unit/test_keyring.py``), as FORMAT.md asks of
every reader.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import boto3
import pytest

from controller.adapters.kms import AwsKeyService
from controller.adapters.memory.gate import OpenGate
from controller.adapters.memory.key_service import MemoryKeyService, MemoryKms
from controller.errors import Corrupt, Misconfigured, Unavailable
from controller.ports import KeyService
from tests.support.stores import REGION

CONTEXT = {"agent-dr:group": "fleet", "agent-dr:stream": "s00"}


class Memory:
    def __init__(self) -> None:
        self._kms = MemoryKms(REGION)
        self.service: KeyService = MemoryKeyService(self._kms, OpenGate())

    async def open(self) -> None: ...

    def disable(self) -> None:
        self._kms.disabled = True


class Aws:
    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        session: Any = boto3.session.Session()
        self.kms = session.client("kms", endpoint_url=endpoint, region_name=REGION)
        self.key: str = self.kms.create_key()["KeyMetadata"]["Arn"]
        self.service: KeyService = self.client(self.key)

    def client(self, key: str, **changed: Any) -> AwsKeyService:
        arguments: dict[str, Any] = {"endpoint": self.endpoint, "call_timeout_seconds": 5.0, "connect_timeout_seconds": 1.0}
        return AwsKeyService(REGION, key=key, aws_region=REGION, **(arguments | changed))

    async def open(self) -> None:
        assert isinstance(self.service, AwsKeyService)
        await self.service.start()

    def disable(self) -> None:
        self.kms.disable_key(KeyId=self.key)


@pytest.fixture(params=["memory", pytest.param("ministack", marks=pytest.mark.aws)])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Memory | Aws]:
    made = Memory() if request.param == "memory" else Aws(request.getfixturevalue("aws").endpoint)
    await made.open()
    yield made
    await made.service.close()


async def test_what_was_made_or_wrapped_is_unwrapped_under_its_context_only(place: Memory | Aws) -> None:
    made = await place.service.make_data_key(CONTEXT)
    assert len(made.plain) == 32
    assert made.plain not in made.wrapped
    assert await place.service.unwrap(made.wrapped, CONTEXT) == made.plain
    again = await place.service.wrap(made.plain, CONTEXT)
    assert await place.service.unwrap(again, dict(reversed(CONTEXT.items()))) == made.plain
    for other in ({}, CONTEXT | {"agent-dr:stream": "s01"}, CONTEXT | {"more": "1"}):
        with pytest.raises(Corrupt):
            await place.service.unwrap(made.wrapped, other)
    assert (await place.service.make_data_key(CONTEXT)).plain != made.plain


async def test_what_was_never_wrapped_is_corrupt(place: Memory | Aws) -> None:
    for garbage in (b"x", b"garbage" * 20):
        with pytest.raises(Corrupt):
            await place.service.unwrap(garbage, CONTEXT)


async def test_a_disabled_key_is_a_misconfiguration_for_every_call(place: Memory | Aws) -> None:
    made = await place.service.make_data_key(CONTEXT)
    place.disable()
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: place.service.make_data_key(CONTEXT),
        lambda: place.service.wrap(made.plain, CONTEXT),
        lambda: place.service.unwrap(made.wrapped, CONTEXT),
    ]
    for call in calls:
        with pytest.raises(Misconfigured, match=r"(?i)disabled") as error:
            await call()
        assert made.plain.hex() not in str(error.value)


@pytest.mark.aws
async def test_a_key_that_does_not_exist_and_an_endpoint_that_does_not_answer(aws: Any) -> None:
    place = Aws(aws.endpoint)
    missing = place.client(f"arn:aws:kms:{REGION}:000000000000:key/none")
    silent = place.client(place.key, endpoint="http://127.0.0.1:9", call_timeout_seconds=0.5)
    for service, error, says in ((missing, Misconfigured, "NotFoundException"), (silent, Unavailable, REGION)):
        await service.start()
        with pytest.raises(error, match=says):
            await service.make_data_key(CONTEXT)
        await service.close()


@pytest.mark.aws
async def test_an_alias_will_do_and_the_key_of_before_is_tried_too(aws: Any) -> None:
    place = Aws(aws.endpoint)
    place.kms.create_alias(AliasName="alias/agent-dr", TargetKeyId=place.key)
    named = place.client("alias/agent-dr", former=("alias/other", place.key))
    await named.start()
    made = await named.make_data_key(CONTEXT)
    assert await named.unwrap(made.wrapped, CONTEXT) == made.plain
    with pytest.raises(Corrupt):
        await named.unwrap(made.wrapped, {})
    await named.close()
