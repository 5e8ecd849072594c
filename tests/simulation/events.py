"""What happened, recorded where it happened: in the stores, in etcd, and where an agent got its answer.

Clients, also mutated ones, cannot avoid it. Entries carry one common number ``n``, so that what came first is never in doubt,
also when it happened in the same instant of virtual time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from controller.adapters.memory.coordinator import MemoryCluster
from controller.adapters.memory.region_store import MemoryStore
from controller.domain.approval import Approval
from controller.domain.model import Authority, Forks, Head, Holder, SegmentRef
from controller.domain.promotion import PlanRecord, Progress
from controller.domain.sharing import stream_of
from controller.errors import Corrupt
from controller.lab.virtual_time import VirtualClock
from controller.ports import Compare, Item, Operation, Put, TxnResult
from controller.runtime.documents import Keys, decode
from controller.runtime.duty import GIVEN_UP
from controller.runtime.salvager import DISCARD
from controller.runtime.service import AuditEntry

T = TypeVar("T")


@dataclass(frozen=True)
class HeadMoved:
    """One store's head changed."""

    n: int
    at: float
    region: str
    before: Head
    after: Head


@dataclass(frozen=True)
class ObjectPut:
    """An object was written, or offered again. ``sha256``: of what lies there afterwards."""

    n: int
    at: float
    region: str
    ref: SegmentRef
    sha256: str


@dataclass(frozen=True)
class Transaction:
    """One applied transaction that wrote an authority, a fork, a plan or a holder key. ``at``: wall time of its application."""

    n: int
    at: float
    authority: tuple[Authority | None, Authority] | None = None
    forks: tuple[Forks | None, Forks] | None = None
    stream: str = ""
    """Whose forks they are."""
    plan: tuple[PlanRecord | None, PlanRecord] | None = None
    """The plan that it was about: the one that the authority goes by, if it moved."""
    also: tuple[tuple[PlanRecord | None, PlanRecord], ...] = ()
    """Other plans that it changed."""
    holder: Holder | None = None
    audits: int = 0
    """Audit entries that it wrote."""
    approvals: tuple[Approval, ...] = ()
    """Everything that was signed for ``plan`` at that moment."""
    progress: tuple[Progress | None, Progress] | None = None
    """What it says of its stream's part in a plan."""
    under: PlanRecord | None = None
    """The plan of ``progress`` as it was before this."""
    everyone: Mapping[str, Progress] = field(default_factory=dict)
    """What the holders of all streams had written down for that plan before this."""


@dataclass(frozen=True)
class AckSeen:
    """An acknowledgement that an agent got. Times are wall times of the world."""

    n: int
    at: float
    instance: str
    honest: bool
    epoch: int
    late_by: float
    """Seconds after the end of the holder's right, by its own clock; negative: before it."""
    agent: str
    id: str
    copies: int
    seq: int
    body: bytes
    sent_at: float
    new: bool
    stamp_error: float = 0.0
    """Seconds that the holder's stamps are ahead of the world's clock."""
    stream: str = "s00"
    beyond_lease: bool = False
    """The lease had not been proven for so long that only failsafe carried the right."""
    in_stores: int = 0
    """How many stores had it when the answer came."""

    def __iter__(self) -> Iterator[Any]:
        """(when, agent, id, copies asked for, body): what most tests need."""
        return iter((self.at, self.agent, self.id, self.copies, self.body))


@dataclass
class History:
    """Everything of one world."""

    clock: VirtualClock
    keys: Keys
    heads: list[HeadMoved] = field(default_factory=list)
    puts: list[ObjectPut] = field(default_factory=list)
    transactions: list[Transaction] = field(default_factory=list)
    acks: list[AckSeen] = field(default_factory=list)
    rewritten_audits: list[str] = field(default_factory=list)
    restored: bool = False
    """etcd was restored from a backup: the audit before it may be shorter than what was recorded here."""
    given_up: list[tuple[float, str, str, tuple[str, ...]]] = field(default_factory=list)
    """(when, who, stream, plans under way) of everything that was given up to share it out anew."""
    discards: set[tuple[str, str]] = field(default_factory=set)
    """(region, name) of salvage of which the audit says that people let go of it."""
    count: int = 0
    streams: int = 1

    def next(self) -> int:
        self.count += 1
        return self.count

    def acknowledged(
        self,
        *,
        instance: str,
        honest: bool,
        epoch: int,
        late_by: float,
        agent: str,
        record_id: str,
        copies: int,
        seq: int,
        body: bytes,
        sent_at: float,
        new: bool,
        stamp_error: float = 0.0,
        beyond_lease: bool = False,
        in_stores: int = 0,
    ) -> None:
        """An agent got its answer."""
        at = self.clock.wall()
        self.acks.append(
            AckSeen(
                self.next(),
                at,
                instance,
                honest,
                epoch,
                late_by,
                agent,
                record_id,
                copies,
                seq,
                body,
                sent_at,
                new,
                stamp_error,
                stream_of(agent, self.streams),
                beyond_lease,
                in_stores,
            )
        )

    def openings(self, stream: str = "") -> list[tuple[Transaction, int, int]]:
        """(transaction, epoch, first seq) of every epoch that was opened, in order; of one stream, if it is named."""
        found = []
        for entry in self.transactions:
            if entry.forks is None or stream not in ("", entry.stream):
                continue
            before, after = entry.forks
            known = {start.epoch for start in before.starts} if before else set()
            found += [(entry, start.epoch, start.first_seq) for start in after.starts if start.epoch not in known]
        return found


class RecordingStore(MemoryStore):
    """A region store that remembers every change."""

    def __init__(self, region: str, history: History) -> None:
        super().__init__(region)
        self._history = history

    def put(self, ref: SegmentRef, data: bytes) -> None:
        super().put(ref, data)
        self.remember(ref)

    def remember(self, ref: SegmentRef) -> None:
        history = self._history
        written = self.objects[ref].sha256  # of what was written: bytes that a test damaged since are no overwriting
        history.puts.append(ObjectPut(history.next(), history.clock.wall(), self.region, ref, written))

    def update(self, stream: str, settled: Callable[[Head], bool], after: Callable[[Head], Head]) -> Head:
        before = self.head(stream)
        result = super().update(stream, settled, after)
        now = self.head(stream)
        if now != before:
            history = self._history
            history.heads.append(HeadMoved(history.next(), history.clock.wall(), self.region, before, now))
        return result


class RecordingCluster(MemoryCluster):
    """An etcd that remembers every transaction that decided something."""

    def __init__(self, clock: VirtualClock, history: History) -> None:
        super().__init__(clock)
        self._history = history

    def txn(self, compare: Sequence[Compare], then: Sequence[Operation], otherwise: Sequence[Operation]) -> TxnResult:
        before = dict(self._items)
        result = super().txn(compare, then, otherwise)
        branch = then if result.succeeded else otherwise
        puts = {operation.key: operation.value for operation in branch if isinstance(operation, Put)}
        if puts:
            self._remember(before, puts)
        return result

    def _remember_audits(self, before: Mapping[str, Item], puts: Mapping[str, bytes]) -> list[str]:
        """Their keys."""
        history, keys = self._history, self._history.keys
        audits = [key for key in puts if key.startswith(keys.audits)]
        history.rewritten_audits += [key for key in audits if key in before]
        for key in audits:
            entry = decode(AuditEntry, puts[key])
            if entry.action == DISCARD:
                history.discards.add((entry.subject, str(entry.detail["salvage"])))
            if entry.action == GIVEN_UP:
                plans_now = (decode(PlanRecord, i.value) for k, i in self._items.items() if k.startswith(keys.plans))
                waiting = tuple(record.plan.id for record in plans_now if not record.ended)
                history.given_up.append((entry.at, entry.actor, entry.subject, waiting))
        return audits

    def _remember(self, before: Mapping[str, Item], puts: Mapping[str, bytes]) -> None:
        history, keys = self._history, self._history.keys
        audits = self._remember_audits(before, puts)
        authority = forks = holder = progress = None
        stream = ""
        plans: list[tuple[PlanRecord | None, PlanRecord]] = []
        for key, value in puts.items():
            old = before.get(key)
            if not value.startswith(b'{"') or b"garbage" in value:  # put there by a test, to be refused by its readers
                continue
            if key == keys.authority:
                authority = (_decoded(Authority, old), decode(Authority, value))
            elif key.startswith(keys.forks("")):
                forks = (_decoded(Forks, old), decode(Forks, value))
                stream = key.rsplit("/", 1)[1]
            elif key.startswith(keys.progress("", "").rstrip("/")):
                progress = (_decoded(Progress, old), decode(Progress, value))
            elif key.startswith(keys.plans):
                plans.append((_decoded(PlanRecord, old), decode(PlanRecord, value)))
            elif key.startswith(keys.holders):
                holder = decode(Holder, value)
        if not (authority or forks or plans or holder):
            return
        plans.sort(key=lambda change: authority is None or change[1].plan.id != authority[1].plan)
        approvals: tuple[Approval, ...] = ()
        if plans:
            prefix = keys.approvals(plans[0][1].plan.id)
            found = [_decoded(Approval, item) for key, item in self._items.items() if key.startswith(prefix)]
            approvals = tuple(approval for approval in found if approval is not None)
        under, everyone = self._plan_of(before, progress[1].plan) if progress else (None, {})
        history.transactions.append(
            Transaction(
                history.next(),
                history.clock.wall(),
                authority,
                forks,
                stream,
                plans[0] if plans else None,
                tuple(plans[1:]),
                holder,
                len(audits),
                approvals,
                progress,
                under,
                everyone,
            )
        )

    def _plan_of(self, before: Mapping[str, Item], plan: str) -> tuple[PlanRecord | None, dict[str, Progress]]:
        keys = self._history.keys
        prefix = keys.progress(plan, "")
        documents = [_decoded(Progress, item) for key, item in before.items() if key.startswith(prefix)]
        return _decoded(PlanRecord, before.get(keys.plan(plan))), {found.stream: found for found in documents if found}


def _decoded(kind: type[T], item: Item | None) -> T | None:
    """None also for what a test has edited so that nobody can read it."""
    try:
        return decode(kind, item.value) if item is not None else None
    except Corrupt:
        return None
