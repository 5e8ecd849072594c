"""One region's AWS KMS key as a ``KeyService``.

``Decrypt`` names the key that must have wrapped the bytes, so that nobody can slip in a key of another account. A key of
the settings may have followed others (``former``); they are tried when KMS says that it was not this one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

import aioboto3
from aiobotocore.config import AioConfig
from botocore.exceptions import ClientError

from controller.adapters.aws_call import Call
from controller.adapters.aws_errors import SDK_ERRORS, error_code, translate
from controller.errors import Corrupt, DrError, Misconfigured, Unavailable
from controller.ports import NewDataKey

_DAMAGED = frozenset({"InvalidCiphertextException", "IncorrectKeyException"})
_MISCONFIGURED = {
    "AccessDeniedException": "let this role call kms:GenerateDataKey, kms:Encrypt and kms:Decrypt with this key",
    "DisabledException": "enable the key",
    "KMSInvalidStateException": "look at the key: it is being deleted or cannot be used",
    "NotFoundException": "correct regions.NAME.kms_key: there is no such key",
    "InvalidKeyUsageException": "name a symmetric key for encryption in regions.NAME.kms_key",
    "InvalidArnException": "correct regions.NAME.kms_key",
}
_WAIT = frozenset({"KeyUnavailableException", "DependencyTimeoutException"})


class AwsKeyService:
    """``start()`` before use, ``close()`` after it. ``key``: id, ARN or alias of a symmetric key in ``aws_region``."""

    def __init__(
        self,
        region: str,
        *,
        key: str,
        former: Sequence[str] = (),
        aws_region: str,
        endpoint: str | None = None,
        call_timeout_seconds: float,
        connect_timeout_seconds: float,
        session: aioboto3.Session | None = None,
    ) -> None:
        self._region = region
        self._key = key
        self._former = tuple(former)
        self._aws_region = aws_region
        self._endpoint = endpoint
        self._call_seconds = call_timeout_seconds
        self._session = session
        self._config = AioConfig(
            connect_timeout=min(connect_timeout_seconds, call_timeout_seconds),
            read_timeout=call_timeout_seconds,
            retries={"mode": "standard", "total_max_attempts": 1},  # ours instead, inside one deadline
        )
        self._open = AsyncExitStack()
        self._kms: Any = None

    @property
    def region(self) -> str:
        return self._region

    async def start(self) -> None:
        """Opens the client. Sends nothing."""
        session = self._session or aioboto3.Session()
        try:
            self._kms = await self._open.enter_async_context(
                session.client("kms", region_name=self._aws_region, endpoint_url=self._endpoint, config=self._config)
            )
        except SDK_ERRORS as error:
            raise translate(error, doing=f"opening the KMS client of {self._region}") from error

    async def close(self) -> None:
        self._kms = None
        await self._open.aclose()

    async def make_data_key(self, context: Mapping[str, str]) -> NewDataKey:
        answer = await self._ask("GenerateDataKey", KeyId=self._key, KeySpec="AES_256", EncryptionContext=dict(context))
        return NewDataKey(answer["Plaintext"], answer["CiphertextBlob"])

    async def wrap(self, plain: bytes, context: Mapping[str, str]) -> bytes:
        answer = await self._ask("Encrypt", KeyId=self._key, Plaintext=plain, EncryptionContext=dict(context))
        wrapped: bytes = answer["CiphertextBlob"]
        return wrapped

    async def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        failed: DrError | None = None
        for key in (self._key, *self._former):
            try:
                return await self._unwrap_with(key, wrapped, context)
            except (Corrupt, Misconfigured) as error:
                # Perhaps another one wrapped it. What a disabled or denied key may have wrapped is not known to be damaged.
                failed = error if failed is None or isinstance(failed, Corrupt) else failed
        assert failed is not None
        raise failed

    async def _unwrap_with(self, key: str, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        answer = await self._ask("Decrypt", KeyId=key, CiphertextBlob=wrapped, EncryptionContext=dict(context))
        plain: bytes = answer["Plaintext"]
        return plain

    async def _ask(self, operation: str, **request: Any) -> dict[str, Any]:
        if self._kms is None:
            raise RuntimeError(f"AwsKeyService({self._region!r}) is not started or already closed: await start() first")
        call = Call(f"{operation} with the KMS key of {self._region}", self._call_seconds)
        method = {"GenerateDataKey": "generate_data_key", "Encrypt": "encrypt", "Decrypt": "decrypt"}[operation]
        async for attempt in call.retries():
            with attempt:
                sent: Awaitable[dict[str, Any]] = getattr(self._kms, method)(**request)
                try:
                    return await call.attempt(sent)
                except DrError as error:
                    raise _sorted_out(error) from error
        raise AssertionError("unreachable: the last attempt returns or raises")


def _sorted_out(error: DrError) -> DrError:
    """KMS's own codes, which mean other things than those of S3 and DynamoDB. Never shows a key: messages have none."""
    cause = error.__cause__
    code = error_code(cause) if isinstance(cause, ClientError) else ""
    if code in _DAMAGED:
        return Corrupt(error.message, hint="these bytes were not wrapped by this key under this context")
    if code in _MISCONFIGURED:
        return Misconfigured(error.message, hint=_MISCONFIGURED[code])
    if code in _WAIT:
        return Unavailable(error.message, hint="wait, or let another region's KMS open it")
    return error
