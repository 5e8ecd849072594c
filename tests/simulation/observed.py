"""What the checkers need to know of a world: a simulated one (``world.World``) or a real one (``tests/faults/recorded.py``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from controller.adapters.memory.region_store import MemoryStore
from controller.adapters.memory.traffic import ZoneVersion
from controller.ports import Item
from controller.runtime.documents import Keys
from tests.simulation.events import AckSeen, History


class ObservedCluster(Protocol):
    """What etcd holds now."""

    _items: dict[str, Item]


class ObservedZone(Protocol):
    """Every version of the zone, the first with ``at`` = minus infinity."""

    @property
    def name(self) -> str: ...
    @property
    def history(self) -> Sequence[ZoneVersion]: ...


class WallClock(Protocol):
    def wall(self) -> float: ...


class Observed(Protocol):
    """A group and all that happened to it."""

    @property
    def cluster(self) -> ObservedCluster: ...
    @property
    def servers(self) -> Mapping[str, MemoryStore]: ...
    @property
    def zone(self) -> ObservedZone: ...
    @property
    def keys(self) -> Keys: ...
    @property
    def keys_dir(self) -> Path: ...
    @property
    def clock(self) -> WallClock: ...
    @property
    def streams(self) -> Sequence[str]: ...
    @property
    def history(self) -> History: ...
    @property
    def acks(self) -> Sequence[AckSeen]: ...
    @property
    def beliefs(self) -> Sequence[str]: ...
    @property
    def hops(self) -> Sequence[Sequence[str]]: ...
