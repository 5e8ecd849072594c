"""Worlds whose objects are sealed: a KMS in each region, and a keyring of its own in every instance."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from controller.adapters.keyring import Keyring
from controller.adapters.memory.gate import Gate, OpenGate
from controller.adapters.memory.key_service import MemoryKeyService, MemoryKms
from controller.adapters.memory.region_store import StoredObject
from controller.adapters.sealed_store import SealedStore, Sealer
from controller.domain.model import SegmentRef
from controller.errors import DrError, Unavailable
from controller.ports import Clock, RegionStore
from controller.runtime.shell import Ports
from tests.simulation.world import HOME, TARGET, Instance, World


class KmsGate:
    """The road to a region's KMS is the one to its store, and it may be shut alone."""

    def __init__(self, road: Gate, region: str, world: SealedWorld) -> None:
        self._road, self._region, self._world = road, region, world

    async def before(self, op: str) -> None:
        if self._region in self._world.kms_down:
            raise Unavailable(f"the KMS of {self._region} does not answer", hint="a test did it")
        await self._road.before(op)

    async def after(self, op: str) -> None:
        await self._road.after(op)


class SealedWorld(World):
    """Every instance has a keyring of its own, as processes have."""

    def __init__(self, keys_dir: Path, *, enabled: bool = True, **changes: Any) -> None:
        super().__init__(keys_dir, **changes)
        dice = random.Random(1)
        self.enabled = enabled
        self.kms = {region: MemoryKms(region, dice.randbytes) for region in self.regions}
        self.kms_down: set[str] = set()
        self._known: dict[tuple[str, SegmentRef], tuple[StoredObject, StoredObject]] = {}
        """(region, object) → as it lies there, and opened."""

    def _ports(self, instance: Instance, clock: Clock) -> Ports:
        services = {
            region: MemoryKeyService(kms, KmsGate(instance.roads[region], region, self)) for region, kms in self.kms.items()
        }
        keyring = Keyring("sim", services, home=instance.region, clock=clock, enabled=self.enabled)
        sealer = Sealer("sim", keyring)

        def wrap(store: RegionStore) -> RegionStore:
            return SealedStore(store, sealer)

        self.wrap_store = wrap
        return replace(super()._ports(instance, clock), seals=keyring)

    @asynccontextmanager
    async def opened(self, without: str = "") -> AsyncIterator[None]:
        """The stores with everything in them opened, for the checkers: nothing may be awaited inside. ``without``: a region
        whose KMS is not used for it. What nobody can open (damaged bytes) stays as it is."""
        if without:
            self._known.clear()
        services = {r: MemoryKeyService(kms, OpenGate()) for r, kms in self.kms.items() if r != without}
        home = next(region for region in (TARGET, HOME, *services) if region in services)
        sealer = Sealer("sim", Keyring("sim", services, home=home, clock=self.clock))
        while missing := [
            (region, ref, there)
            for region, server in self.servers.items()
            for ref, there in server.objects.items()
            if (region, ref) not in self._known or self._known[region, ref][0] is not there
        ]:
            for region, ref, there in missing:
                try:
                    plain = await sealer.open(ref, there.data, region)
                except DrError:
                    plain = there.data
                self._known[region, ref] = there, StoredObject(plain, hashlib.sha256(plain).hexdigest())
        sealed = {region: server.objects for region, server in self.servers.items()}
        for region, server in self.servers.items():
            server.objects = {ref: self._known[region, ref][1] for ref, there in sealed[region].items()}
        try:
            yield
        finally:
            for region, server in self.servers.items():
                server.objects = sealed[region]

    def sealed_objects(self, region: str) -> tuple[int, int]:
        """Sealed, all."""
        objects = self.servers[region].objects.values()
        return sum(one.data.startswith(b"DRENC\0") for one in objects), len(objects)
