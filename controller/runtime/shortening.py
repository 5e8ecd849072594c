"""Keeps what grows with every epoch bounded: the forks in etcd, and the epochs that each store's head names.

Every restart of a holder adds one entry to both. Those that no store can need any more are dropped (``replication.passed``),
and only while every store of the group is attached: fenced under our epoch, and a prefix of our history. Nothing of it has to
be remembered; an interrupted pass is begun anew, by this holder or the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from controller.adapters.head_item import ITEM_GUARD_BYTES
from controller.adapters.head_rules import head_bytes
from controller.domain import replication
from controller.domain.model import Authority, Forks, Head, Unknown
from controller.errors import Conflict
from controller.ports import Clock, Compare, Coordinator, Put, RegionStore
from controller.runtime.documents import Keys, encode, read
from controller.runtime.tenure import Tenure
from controller.stream.writer import StreamWriter

PAUSE_SECONDS = 10.0
"""Between two passes. Bases move a few times a day."""
DROPPED = 20
"""Entries that one pass drops from one head, one conditional update each."""


class Shortener:
    """For one held stream."""

    def __init__(
        self,
        writer: StreamWriter,
        stores: Mapping[str, RegionStore],
        coordinator: Coordinator,
        keys: Keys,
        tenure: Tenure,
        clock: Clock,
    ) -> None:
        self._writer = writer
        self._stores = stores
        self._coordinator = coordinator
        self._keys = keys
        self._tenure = tenure
        self._clock = clock
        self._next = clock.monotonic() + PAUSE_SECONDS
        self.forks = 0
        """Recorded forks, as of the last pass."""

    async def step(self) -> str | None:
        """One pass, if it is time for one. Returns what was dropped. Raises FenceLost, Conflict, Unavailable, Corrupt."""
        if self._clock.monotonic() < self._next:
            return None
        self._next = self._clock.monotonic() + PAUSE_SECONDS
        fence = self._tenure.fence
        key = self._keys.forks(fence.stream)
        forks = await read(self._coordinator, key, Forks)
        authority = await read(self._coordinator, self._keys.authority, Authority)
        if forks is None or authority is None:
            return None
        self.forks = len(forks.value.starts)
        attached = {place.region for place in self._writer.places() if place.attached}
        if not set(authority.value.stores) <= attached or self._writer.frozen:
            return None
        heads = {region: await self._stores[region].read_head(fence.stream) for region in attached}
        for head in heads.values():
            if (head.epoch, head.writer) != (fence.epoch, fence.writer) or replication.head_problem(head) is not None:
                return None
        bases = [head.base for head in heads.values()]
        said = []
        gone = replication.passed(forks.value.starts, bases)
        if gone:
            after = replace(forks.value, starts=forks.value.starts[len(gone) :])
            result = await self._coordinator.txn(
                [self._tenure.guard, Compare.modified(key, forks.revision)], [Put(key, encode(after))]
            )
            if not result.succeeded:
                raise Conflict("the forks changed, or the holder key is not ours any more", hint="trying again")
            self.forks = len(after.starts)
            said.append(f"{len(gone)} forks")
        for region, head in heads.items():
            passed = replication.passed(head.epochs, bases)[:DROPPED]
            for start in passed:
                await self._stores[region].forget_epoch(fence, start)
            if passed:
                said.append(f"{len(passed)} epochs of the head in {region}")
        return f"every base is past them: dropped {', '.join(said)}" if said else None


def crowding(stream: str, heads: Mapping[str, Head | Unknown], forks: int) -> list[str]:
    """Warnings about what has grown to half of its bound or more. ``forks``: how many are recorded, 0 = not known here."""
    found = []
    for region, head in sorted(heads.items()):
        size = head_bytes(head) if isinstance(head, Head) else 0
        if isinstance(head, Head) and 2 * size >= ITEM_GUARD_BYTES:
            found.append(
                f"the head of {stream} in {region} has {size:,} of {ITEM_GUARD_BYTES:,} bytes ({len(head.epochs):,} epochs, "
                f"{len(head.salvage):,} salvages): export and discard salvage (drctl salvage list), let retention move the "
                "bases"
            )
    if replication.crowded(forks):
        found.append(
            f"{forks:,} of {replication.FORKS_MAX:,} forks of {stream} are recorded, and none can be dropped: bring every "
            f"store back, let retention move the bases"
        )
    return found
