"""This instance's own lease in etcd: its member key, and the short-lived claims that must die with it."""

from __future__ import annotations

from controller.domain.model import Member
from controller.ports import Compare, Coordinator, Get, Put
from controller.runtime.documents import Keys, encode


class Membership:
    """Announces the instance. Nothing that needs fencing hangs on this lease: losing it costs visibility only."""

    def __init__(self, coordinator: Coordinator, keys: Keys, ttl_seconds: int, region: str, instance: str) -> None:
        self._coordinator = coordinator
        self._keys = keys
        self._ttl_seconds = ttl_seconds
        self._key = keys.member(region, instance)
        self._instance = instance
        self._lease = 0

    async def announce(self, member: Member) -> None:
        """Renews the lease (taking a new one when it is gone) and writes what the member says of itself. Raises Unavailable."""
        if self._lease and not (await self._coordinator.keep_alive(self._lease)).ttl_seconds:
            self._lease = 0
        if not self._lease:
            self._lease = (await self._coordinator.grant(self._ttl_seconds)).id
        await self._coordinator.txn([], [Put(self._key, encode(member), self._lease)])

    async def claim(self, key: str) -> bool:
        """Takes ``key`` for as long as this instance lives, or says that another one has it. Idempotent for the owner."""
        if not self._lease:
            return False
        mine = self._instance.encode()
        result = await self._coordinator.txn([Compare.absent(key)], [Put(key, mine, self._lease)], [Get(key)])
        if result.succeeded:
            return True
        item = result.items[0]
        return item is not None and item.value == mine and item.lease == self._lease

    async def leave(self) -> None:
        """Gives everything back at an orderly end."""
        if self._lease:
            await self._coordinator.revoke(self._lease)
            self._lease = 0
