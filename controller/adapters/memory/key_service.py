"""The reference for a region's KMS: AES-GCM under a key that never leaves it, with the encryption context as associated data.

``MemoryKms`` is the far side, one per region, and survives its clients; ``MemoryKeyService`` is one client of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TypeVar

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from controller.adapters.memory.gate import Gate
from controller.errors import Corrupt, Misconfigured
from controller.ports import NewDataKey

T = TypeVar("T")

_NONCE_BYTES = 12


class MemoryKms:
    """One region's KMS with one key. ``disabled``: it refuses to use it. ``random``: ``os.urandom``, or one with a seed."""

    def __init__(self, region: str, random: Callable[[int], bytes] = os.urandom) -> None:
        self.region = region
        self.disabled = False
        self._random = random
        self._keys = [AESGCM(random(32))]

    def rotate(self) -> None:
        """As AWS does once a year: new material under the same key. What the old one wrapped is still unwrapped."""
        self._keys.append(AESGCM(self._random(32)))

    def wrap(self, plain: bytes, context: Mapping[str, str]) -> bytes:
        self._usable()
        nonce = self._random(_NONCE_BYTES)
        return nonce + self._keys[-1].encrypt(nonce, plain, _bound_to(context))

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        self._usable()
        for key in self._keys:
            try:
                return key.decrypt(wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:], _bound_to(context))
            except (InvalidTag, ValueError):
                continue
        raise Corrupt(f"the KMS key of {self.region} did not wrap these bytes under this context", hint="look at the object")

    def make(self, context: Mapping[str, str]) -> NewDataKey:
        plain = self._random(32)
        return NewDataKey(plain, self.wrap(plain, context))

    def _usable(self) -> None:
        if self.disabled:
            raise Misconfigured(f"the KMS key of {self.region} is disabled", hint="enable it")


class MemoryKeyService:
    """Implements ``ports.KeyService``."""

    def __init__(self, server: MemoryKms, gate: Gate) -> None:
        self._server = server
        self._gate = gate

    @property
    def region(self) -> str:
        return self._server.region

    async def make_data_key(self, context: Mapping[str, str]) -> NewDataKey:
        return await self._call("make_data_key", lambda: self._server.make(context))

    async def wrap(self, plain: bytes, context: Mapping[str, str]) -> bytes:
        return await self._call("wrap", lambda: self._server.wrap(plain, context))

    async def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        return await self._call("unwrap", lambda: self._server.unwrap(wrapped, context))

    async def close(self) -> None:
        """Nothing is open."""

    async def _call(self, op: str, effect: Callable[[], T]) -> T:
        await self._gate.before(op)
        answer = effect()
        await self._gate.after(op)
        return answer


def _bound_to(context: Mapping[str, str]) -> bytes:
    return msgspec.msgpack.encode(sorted(context.items()))
