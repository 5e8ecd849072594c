"""Histories of a stream for tests: segments with real agents' states, forks, and their copy in a memory store."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from controller.adapters.memory.region_store import MemoryStore
from controller.domain.model import GENESIS, EpochStart, Frame, Head, SegmentRef
from controller.stream.segment import Segment, SegmentHeader, decode_segment, encode_segment, frame, next_chain
from controller.stream.view import View

GROUP = "fleet"


@dataclass(frozen=True)
class Built:
    ref: SegmentRef
    data: bytes
    chain: str

    @property
    def segment(self) -> Segment:
        return decode_segment(self.data)


@dataclass
class History:
    """Grows segment by segment. ``states`` are the agents' newest bodies, ``bodies`` every body that was ever in it."""

    stream: str = "0"
    segments: list[Built] = field(default_factory=list)
    states: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    bodies: dict[tuple[str, str], bytes] = field(default_factory=dict)
    depth: dict[str, int] = field(default_factory=dict)

    @property
    def chain(self) -> str:
        return self.segments[-1].chain if self.segments else GENESIS

    @property
    def seq(self) -> int:
        return len(self.segments)

    def add(self, frames: Sequence[Frame], epoch: int = 1) -> Built:
        header = SegmentHeader(GROUP, self.stream, self.seq + 1, epoch, self.chain, 1_000.0 + self.seq)
        data = encode_segment(header, frames)
        built = Built(SegmentRef(self.stream, header.seq, epoch), data, next_chain(self.chain, data))
        self.segments.append(built)
        return built

    def step(self, agent: str, record_id: str, seed: int, *, kind: str = "checkpoint", cut: int = 16) -> Frame:
        """The agent's next state: the last one with a little more, as a delta until the chain is ``cut`` long."""
        known = self.states.get(agent)
        body = (known[1] if known else random.Random(agent).randbytes(1_500)) + random.Random(seed).randbytes(20)
        depth = self.depth.get(agent, 0)
        made = frame(
            agent,
            record_id,
            kind,
            body,
            parent=known[0] if known else None,
            previous=known if depth < cut else None,
            received_at=1_000.0 + seed,
            created_at=500.0,
            meta={"step": str(seed)},
        )
        self.depth[agent] = depth + 1 if made.base else 0
        self.states[agent] = (record_id, body)
        self.bodies[agent, record_id] = body
        return made

    def grow(self, segments: int, agents: int = 3, epoch: int = 1) -> History:
        """Appends segments in which every agent takes one step."""
        for _ in range(segments):
            seq = self.seq + 1
            self.add([self.step(f"agent-{n}", f"e{epoch}s{seq}", seq * 100 + epoch) for n in range(agents)], epoch)
        return self

    def fork(self, seq: int) -> History:
        """Another history with the same first ``seq`` segments. Agents in it begin new chains of deltas."""
        return History(self.stream, self.segments[:seq], {}, dict(self.bodies), {})

    def head(self, *, epoch: int | None = None, base: int = 1, seq: int | None = None) -> Head:
        seq = self.seq if seq is None else seq
        starts: list[EpochStart] = []
        for built in self.segments[:seq]:
            if not starts or starts[-1].epoch != built.ref.epoch:
                starts.append(EpochStart(built.ref.epoch, built.ref.seq))
        last = starts[-1].epoch if starts else 0
        return Head(
            self.stream,
            seq=seq,
            epoch=last if epoch is None else epoch,
            chain=self.segments[seq - 1].chain if seq else GENESIS,
            epochs=tuple(starts),
            base=base,
            base_chain=self.segments[base - 2].chain if base > 1 else GENESIS,
        )

    def install(self, store: MemoryStore, *, epoch: int | None = None, base: int = 1, seq: int | None = None) -> None:
        """Makes this history the committed one of the store. Objects of other histories stay where they are."""
        for built in self.segments[base - 1 :]:
            if built.ref not in store.objects:
                store.put(built.ref, built.data)
        for built in self.segments[: base - 1]:
            if built.ref in store.objects:
                store.drop(built.ref)
        store.heads[self.stream] = self.head(epoch=epoch, base=base, seq=seq)

    def apply_to(self, view: View, upto: int | None = None) -> None:
        """Everything after the view's position, without a store."""
        for built in self.segments[view.position(self.stream)[0] : upto]:
            view.apply(built.segment, built.chain, built.ref, len(built.data))
