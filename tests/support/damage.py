"""Three regions' copies of one history in memory, with ways to damage them, and the verifier and mender of one controller."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from controller.adapters.memory.coordinator import MemoryCluster, MemoryCoordinator
from controller.adapters.memory.gate import FaultGate
from controller.adapters.memory.region_store import MemoryRegionStore, MemoryStore, StoredObject
from controller.domain.model import Fence, Head, NamedSnapshot, SnapshotRef
from controller.runtime.archive_documents import Verification
from controller.runtime.audit import Audit
from controller.runtime.documents import Keys
from controller.runtime.mender import Mender
from controller.runtime.verifier import Verifier
from controller.stream.keeping import Keeping
from controller.stream.proof import Problem
from controller.stream.segment import frame_offsets
from controller.stream.view import View
from tests.support.segments import GROUP, Built, History

REGIONS = ("eu-west-1", "eu-central-1", "us-east-1")
HOME = REGIONS[0]


class Clock:
    """Stands still but for what it is told to sleep."""

    def __init__(self) -> None:
        self.now = 1_790_000_000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


def head_of(history: History, seq: int | None = None, base: int = 1) -> Head:
    """As a writer would have left it: with counts, the last receipt and a writer's name."""
    upto = history.seq if seq is None else seq
    segments = [built.segment for built in history.segments[:upto]]
    last = max((frame.record.received_at for frame in segments[-1].frames), default=0.0) if segments else 0.0
    head = history.head(seq=upto, base=base)
    return replace(
        head,
        received_at=last,
        records=sum(len(segment.frames) for segment in segments),
        bytes=sum(len(built.data) for built in history.segments[:upto]),
        writer=f"{HOME}/a/{head.epoch}",
    )


@dataclass
class Copies:
    """``history`` in all three regions; the controller is one of the first region."""

    history: History
    folder: Path
    stores: dict[str, MemoryStore] = field(default_factory=dict)
    gates: dict[str, FaultGate] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)
    base: int = 1

    def __post_init__(self) -> None:
        self.view = View(None)
        self.etcd = FaultGate(self.clock.sleep)
        for region in REGIONS:
            self.stores[region] = store = MemoryStore(region)
            self.history.install(store, base=self.base)
            store.heads[self.history.stream] = head_of(self.history, base=self.base)
            self.gates[region] = FaultGate(self.clock.sleep)
        if self.base > 1:
            self.view.reset(self.history.stream, self.base - 1, self.history.segments[self.base - 2].chain)
        self.history.apply_to(self.view)
        self.clients = {
            region: MemoryRegionStore(self.stores[region], self.gates[region], call_timeout_seconds=None) for region in REGIONS
        }
        self.verifier = self.controller()

    def controller(self) -> Verifier:
        """Another life of the same instance."""
        return Verifier(
            group=GROUP,
            region=HOME,
            instance="a",
            stores=self.clients,
            view=self.view,
            streams=lambda: (self.history.stream,),
            clock=self.clock,
            state_dir=self.folder,
        )

    def settle(self, region: str = HOME) -> None:
        """Three snapshots of the head's epoch, after which the catalogue is certainly written, and the catalogue."""
        store, stream = self.stores[region], self.history.stream
        head = store.heads[stream]
        named = []
        for seq in range(head.seq - 2, head.seq + 1):
            store.put_snapshot(SnapshotRef(stream, seq, head.epoch), b"index %d" % seq)
            digest = hashlib.sha256(b"index %d" % seq).hexdigest()
            named.append(NamedSnapshot(seq, head.epoch, self.built(seq).chain, digest))
        store.heads[stream] = replace(head, snapshots=tuple(named))
        self.catalogue(region)

    def catalogue(self, region: str = HOME) -> None:
        """One item for each agent, as the holder writes it."""
        store, stream = self.stores[region], self.history.stream
        keeping = Keeping(self.view, stream)
        for _, agent in keeping.agents(0, 1000):
            entry = keeping.entry(agent)
            if entry is not None:
                store.catalogue[stream, agent] = replace(entry, by_epoch=store.heads[stream].epoch)

    async def verify(self, region: str = HOME, *, restart: bool = False) -> Verification:
        await self.verifier.start(region, restart=restart)
        return await self.until(lambda found: found.state != "running", region)

    async def until(self, condition: Callable[[Verification], bool], region: str = HOME) -> Verification:
        """Lets the verification run until then."""
        while True:
            found = await self.verifier.state(region)
            if condition(found) and (found.state == "running" or not self.verifier.running(region)):
                return found
            await asyncio.sleep(0)

    def mender(self, *, epoch: int = 0, instance: str = "a") -> Mender:
        """``epoch``: this instance holds the stream under it; 0 = it is a standby."""
        fence = Fence(self.history.stream, epoch, HOME, instance) if epoch else None
        coordinator = MemoryCoordinator(MemoryCluster(self.clock), self.etcd)
        self.audit = Audit(coordinator, Keys("/dr", GROUP))
        return Mender(
            self.verifier,
            self.audit,
            self.clock,
            region=HOME,
            instance="a",
            fence_of=lambda stream: fence if stream == self.history.stream else None,
            held=lambda stream: fence is not None,
        )

    def built(self, seq: int) -> Built:
        return self.history.segments[seq - 1]

    def flip(self, seq: int, byte: int | None = None, region: str = HOME, *, bit: int = 0, hidden: bool = False) -> None:
        """Flips one bit of an object, by default in its second frame. ``hidden``: what was written beside it is flipped along,
        so that it looks intact."""
        ref = self.built(seq).ref
        byte = frame_offsets(self.built(seq).data)[1].offset + 60 if byte is None else byte
        self.stores[region].corrupt(ref, 8 * byte + bit)
        if hidden:
            data = self.stores[region].objects[ref].data
            self.stores[region].objects[ref] = StoredObject(data, hashlib.sha256(data).hexdigest())

    def replace(self, seq: int, data: bytes, region: str = HOME) -> None:
        """Other bytes that look as if they had been written so."""
        self.stores[region].objects[self.built(seq).ref] = StoredObject(data, hashlib.sha256(data).hexdigest())

    def drop(self, seq: int, region: str = HOME) -> None:
        self.stores[region].drop(self.built(seq).ref)


def whole(found: Verification) -> bool:
    return found.state == "done" and found.count == 0


def only(found: Verification) -> Problem:
    assert found.state == "done", found
    assert found.count == 1, found.problems
    return found.problems[0]
