"""Judges of what happened in a world: each says in one sentence what must hold, and raises ``Violation`` when it does not.

They look at the servers' own records (``events.py``) and at what agents were told, and compute everything anew: which history
is the live one, which signatures count, what was lost. They share the formats with the product, not its decisions.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from controller.adapters.identity import SshIdentity
from controller.domain.approval import NAMESPACE, Approval, statement
from controller.domain.model import GENESIS, EpochStart, Forks, Head, SegmentRef
from controller.domain.plan import PlanKind
from controller.domain.promotion import BEFORE_AUTHORIZE, PlanRecord, State
from controller.errors import DrError, Refused
from controller.runtime.audit import broken_at
from controller.runtime.documents import decode
from controller.runtime.service import AuditEntry
from controller.stream.segment import Segment, decode_segment, next_chain, open_frame
from controller.stream.tail import name_of
from tests.simulation.events import AckSeen, Transaction
from tests.simulation.observed import Observed
from tests.simulation.world import STREAM, World

EPSILON = 1e-6
_decoded = functools.lru_cache(maxsize=8192)(decode_segment)
"""Every judgement walks whole histories, in every store, and the same bytes are the same segment."""
UNDER_WAY_SEGMENTS = 30
"""More than agents of a simulation write while one segment travels to a store."""


class Violation(AssertionError):
    """A promise that was broken. ``checker``: the judge's name."""

    def __init__(self, checker: str, what: str) -> None:
        super().__init__(f"[{checker}] {what}")
        self.checker = checker


# ---------------------------------------------------------------------------------------------------------- live history


@dataclass(frozen=True)
class Live:
    """The live history of the stream: what the recorded forks and the stores say together."""

    stream: str
    starts: tuple[EpochStart, ...]
    length: int
    bodies: dict[tuple[str, str], bytes]
    chains: tuple[str, ...]
    """Chain hash after each segment; index 0 is the genesis."""


def _owner(starts: tuple[EpochStart, ...], seq: int) -> int:
    return max((start.epoch for start in starts if start.first_seq <= seq), default=0)


def recorded_forks(world: Observed, stream: str) -> tuple[EpochStart, ...]:
    item = world.cluster._items.get(world.keys.forks(stream))
    recorded = decode(Forks, item.value).starts if item is not None else ()
    if world.history.restored:  # etcd may have forgotten: the greatest (epoch of the last segment, seq) in the stores wins
        heads = [server.head(stream) for server in world.servers.values()]
        best = max(heads, key=lambda head: (head.last_epoch, head.seq))
        if best.last_epoch > max((start.epoch for start in recorded), default=0):
            return best.epochs
    return recorded


def live_histories(world: Observed) -> list[Live]:
    return [live_history(world, stream=stream) for stream in world.streams]


def live_history(world: Observed, without: str = "", stream: str = STREAM) -> Live:
    """Walks from segment 1 on: the segment of the recorded owner that follows the chain, as far as some store committed it.

    ``without``: a region whose store is not looked at, as if it had been lost this moment."""
    starts = recorded_forks(world, stream)
    regions = [region for region in world.servers if region != without]
    heads = [world.servers[region].head(stream) for region in regions]
    chain, chains = GENESIS, [GENESIS]
    bodies: dict[tuple[str, str], bytes] = {}
    seq = 0
    while True:
        ref = SegmentRef(stream, seq + 1, _owner(starts, seq + 1))
        committed = [
            region
            for region, head in zip(regions, heads, strict=True)
            if head.seq > seq and head.owner(seq + 1) == ref.epoch and ref in world.servers[region].objects
        ]
        found = next((f for f in (_readable(world, region, ref, chain) for region in committed) if f is not None), None)
        if found is None:
            return Live(stream, starts, seq, bodies, tuple(chains))
        segment, data = found
        chain = next_chain(chain, data)
        chains.append(chain)
        seq += 1
        for one in segment.frames:
            base = bodies.get((one.record.agent, one.base)) if one.base is not None else None
            bodies[one.record.agent, one.record.id] = open_frame(one, base)


def _readable(world: Observed, region: str, ref: SegmentRef, chain: str) -> tuple[Segment, bytes] | None:
    """The segment in that store, when it is whole and follows ``chain``."""
    try:
        data = world.servers[region].get(ref)
        segment = _decoded(data)
    except Exception:  # noqa: BLE001  (whatever is wrong with these bytes: they are no history)
        return None
    return (segment, data) if segment.header.prev_chain == chain else None


def _kept(live: Live, ack: AckSeen) -> bool:
    return live.bodies.get((ack.agent, ack.id)) == ack.body


def lost_acks(world: Observed, live: Live) -> list[AckSeen]:
    """Of the agents of that stream."""
    return [ack for ack in world.acks if ack.stream == live.stream and not _kept(live, ack)]


# ------------------------------------------------------------------------------------------------------------- checkers


def one_active(world: Observed) -> None:
    """Never two instances that may act, at no instant (clocks that lie are left out)."""
    if world.beliefs:
        raise Violation("one-active", world.beliefs[0])


def nothing_lost(world: Observed) -> None:
    """Nothing that was acknowledged with two copies or more is missing or different in the live history."""
    for live in live_histories(world):
        for ack in lost_acks(world, live):
            if ack.copies >= 2:
                there = (ack.agent, ack.id) in live.bodies
                raise Violation(
                    "nothing-lost",
                    f"{ack.agent} {ack.id}, acknowledged with {ack.copies} copies in segment {ack.seq} of epoch {ack.epoch} of "
                    f"{live.stream}, is {'different' if there else 'missing'}; forks {live.starts}, length {live.length}",
                )


def promised_loss(world: Observed) -> None:
    """What was lost is covered by an approved plan: its kind, its seconds, its number of records."""
    by_plan: dict[str, list[AckSeen]] = {}
    for live in live_histories(world):
        for plan, lost in _promised(world, live).items():
            by_plan.setdefault(plan, []).extend(lost)
    for plan, lost in by_plan.items():
        records = [entry.under or (entry.plan[1] if entry.plan else None) for entry in world.history.transactions]
        approved = next(r.plan.evidence.loss for r in reversed(records) if r is not None and r.plan.id == plan)
        if len(lost) > approved.records and not approved.records_unknown:
            raise Violation("promised-loss", f"plan {plan} lost {len(lost)} records in all, approved were {approved.records}")


def _promised(world: Observed, live: Live) -> dict[str, list[AckSeen]]:
    """One stream's part of it. Returns what was lost under which plan."""
    by_opening: dict[int, list[AckSeen]] = {}
    openings = world.history.openings(live.stream)
    for ack in lost_acks(world, live):
        cutting = next((e for _, e, first in openings if e > ack.epoch and first <= ack.seq), None)
        if cutting is None:
            raise Violation(
                "promised-loss", f"{ack.agent} {ack.id} (segment {ack.seq}, epoch {ack.epoch}) is gone; nobody cut it"
            )
        by_opening.setdefault(cutting, []).append(ack)
    for entry, epoch, _ in openings:
        _covered(world, entry, epoch, by_opening.get(epoch, []))
    return {
        entry.under.plan.id: by_opening[epoch]
        for entry, epoch, _ in openings
        if epoch in by_opening and entry.under is not None
    }


def _covered(world: Observed, entry: Transaction, epoch: int, lost: list[AckSeen]) -> None:
    before, progress = entry.progress or (None, None)
    record = entry.under if before is None or not before.open else None  # opened again: nothing more may be lost
    if record is None:
        if lost:
            raise Violation("promised-loss", f"epoch {epoch} opened without a plan and lost {len(lost)} acknowledged records")
        return
    assert progress is not None
    approved, final = record.plan.evidence.loss, progress.loss
    bound = approved.seconds + record.plan.tolerance_seconds
    if final.seconds > bound + EPSILON:
        raise Violation(
            "promised-loss", f"plan {record.plan.id} says {final.seconds:.2f} s are lost, approved were {bound:.2f}"
        )
    if not lost:
        return
    what = f"plan {record.plan.id} lost {len(lost)} acknowledged records ({lost[0].agent} {lost[0].id}, …)"
    if record.plan.kind is not PlanKind.FAILOVER:
        raise Violation("promised-loss", f"{what} in a {record.plan.kind.value}")
    for name, loss in (("approved", approved), ("reported", final)):
        if loss.exact:
            raise Violation("promised-loss", f"{what}; the {name} loss said that nothing is lost")
        if len(lost) > loss.records and not loss.records_unknown:
            raise Violation("promised-loss", f"{what}; the {name} loss said {loss.records}")
    span = max(ack.at for ack in lost) - min(received_at(world, ack) for ack in lost)
    if span > final.seconds + EPSILON:
        raise Violation("promised-loss", f"{what} of {span:.2f} s; it said at most {final.seconds:.2f}")


def received_at(world: Observed, ack: AckSeen) -> float:
    for server in world.servers.values():
        ref = SegmentRef(ack.stream, ack.seq, ack.epoch)
        if ref in server.objects:
            for one in _decoded(server.objects[ref].data).frames:
                if (one.record.agent, one.record.id) == (ack.agent, ack.id):
                    return one.record.received_at - ack.stamp_error
    return ack.sent_at


def stores_whole(world: Observed) -> None:
    """Every store holds a gap-free, chained prefix of its history; all that was ever committed in it is history or salvage.

    A store that the newest epoch has fenced and that nobody is bringing along any more is a prefix of the live history.
    """
    for live in live_histories(world):
        newest = live.starts[-1].epoch if live.starts else 0
        for region, server in world.servers.items():
            head = server.head(live.stream)
            _chained(region, world, head)
            _accounted(region, world, head)
            if head.epoch >= newest > 0 and head.last_epoch == newest and live.chains[head.seq : head.seq + 1] != (head.chain,):
                raise Violation(
                    "stores-whole",
                    f"{region} is at segment {head.seq} of {live.stream} with another chain than the live history",
                )


def stores_are_prefixes(world: Observed) -> None:
    """For a world that has settled: every store is a prefix of the live history, as long as it but for what is under way."""
    for live in live_histories(world):
        for region, server in world.servers.items():
            head = server.head(live.stream)
            where = f"{region} at segment {head.seq} of {live.stream}"
            if live.chains[head.seq : head.seq + 1] != (head.chain,):
                raise Violation("stores-are-prefixes", f"{where} is no prefix of the live history")
            if head.seq + UNDER_WAY_SEGMENTS < live.length:
                raise Violation("stores-are-prefixes", f"{where} stays there; the live history has {live.length}")


def _chained(region: str, world: Observed, head: Head) -> None:
    server, chain = world.servers[region], GENESIS
    for seq in range(1, head.seq + 1):
        ref = SegmentRef(head.stream, seq, head.owner(seq))
        if ref not in server.objects:
            raise Violation("stores-whole", f"{region}: segment {ref.key} is committed and not there")
        data = server.objects[ref].data
        segment = _decoded(server.get(ref))
        if segment.header.prev_chain != chain:
            raise Violation("stores-whole", f"{region}: segment {ref.key} does not follow the one before")
        chain = next_chain(chain, data)
    if chain != head.chain:
        raise Violation("stores-whole", f"{region}: the head's chain at {head.seq} is not that of its segments")


def _discarded(region: str, world: Observed, stream: str) -> set[SegmentRef]:
    """Objects of salvage that people let go of: the audit says of each piece that it was."""
    found = set()
    for moved in world.history.heads:
        if (moved.region, moved.after.stream) != (region, stream):
            continue
        for cut in moved.before.salvage:
            if cut in moved.after.salvage:
                continue
            if (region, name_of(stream, cut)) not in world.history.discards:
                raise Violation("stores-whole", f"{region}: salvage {name_of(stream, cut)} was dropped and nobody said so")
            found |= {SegmentRef(stream, seq, _owner(cut.epochs, seq)) for seq in range(cut.first_seq, cut.last_seq + 1)}
    return found


def _accounted(region: str, world: Observed, head: Head) -> None:
    discarded = _discarded(region, world, head.stream)
    salvaged = {
        SegmentRef(head.stream, seq, _owner(cut.epochs, seq))
        for cut in head.salvage
        for seq in range(cut.first_seq, cut.last_seq + 1)
    }
    for moved in world.history.heads:
        if (moved.region, moved.after.stream) != (region, head.stream) or moved.after.seq <= moved.before.seq:
            continue
        for seq in range(moved.before.seq + 1, moved.after.seq + 1):
            ref = SegmentRef(head.stream, seq, moved.after.owner(seq))
            if ref in discarded or (seq <= head.seq and head.owner(seq) == ref.epoch):
                continue
            if ref not in salvaged:
                raise Violation("stores-whole", f"{region}: {ref.key} was committed, is not history and is in no salvage")
            if ref not in world.servers[region].objects:
                raise Violation("stores-whole", f"{region}: {ref.key} is listed as salvage and is not there")


def stores_fenced(world: Observed) -> None:
    """No store's epoch ever goes back; nobody commits under another epoch than the store's."""
    for moved in world.history.heads:
        if moved.after.epoch < moved.before.epoch:
            raise Violation("stores-fenced", f"{moved.region}: the epoch went from {moved.before.epoch} to {moved.after.epoch}")
        writer = int(moved.after.writer.rsplit("/", 1)[1]) if moved.after.writer else moved.after.epoch
        if writer != moved.after.epoch:
            raise Violation(
                "stores-fenced",
                f"{moved.region}: {moved.after.writer} changed a head that epoch {moved.after.epoch} had fenced",
            )


def objects_immutable(world: Observed) -> None:
    """A segment object is never overwritten with something else."""
    known: dict[tuple[str, SegmentRef], str] = {}
    for put in world.history.puts:
        if known.setdefault((put.region, put.ref), put.sha256) != put.sha256:
            raise Violation("objects-immutable", f"{put.region}: {put.ref.key} was overwritten")


def dns_safe(world: Observed) -> None:
    """The zone's epoch never goes back, the name always has a record of non-zero weight, and weights point to the region whose
    epoch changed them."""
    regions: dict[int, set[str]] = {}
    for entry in world.history.transactions:
        if entry.holder is not None and entry.holder.stream == STREAM:  # nobody but the lead's holder touches the zone
            regions.setdefault(entry.holder.epoch, set()).add(entry.holder.region)
    epoch, before = 0, dict[str, int]()
    for version in world.zone.history:
        weights = {
            r["SetIdentifier"]: r["Weight"] for r in version.records if r["Name"] == world.zone.name and r["Type"] == "A"
        }
        texts = [r for r in version.records if r["Type"] == "TXT"]
        seen = int(texts[0]["ResourceRecords"][0]["Value"].strip('"')) if texts else 0
        if version.at == float("-inf"):  # what was there before the story began, record by record
            before = weights
            continue
        if seen < epoch:
            raise Violation("dns-safe", f"the zone's epoch went from {epoch} to {seen}")
        if not any(weights.values()):
            raise Violation("dns-safe", f"the name has no record of non-zero weight: {weights}")
        if weights != before and seen in regions and not any(weights.get(region) for region in regions[seen]):
            raise Violation("dns-safe", f"epoch {seen} of {sorted(regions[seen])} moved the weights to {weights}")
        if weights != before and seen not in regions:
            raise Violation("dns-safe", f"the weights changed to {weights} under epoch {seen}, which nobody was given")
        epoch, before = seen, weights


def people_approved(world: Observed) -> None:
    """Authority moved only by plans that enough others had signed, for that digest, unexpired, once, on that evidence."""
    identity = SshIdentity(world.keys_dir / "allowed_signers", NAMESPACE, world.clock.wall)
    used: set[str] = set()
    for entry in world.history.transactions:
        moved = entry.authority is not None and entry.authority[0] is not None and _region_moved(entry)
        if moved:
            record = _plan_of(entry)
            if record.plan.id in used:
                raise Violation("people-approved", f"plan {record.plan.id} moved the authority a second time")
            used.add(record.plan.id)
            _signed(identity, record, entry)
            _on_this_evidence(world, record, entry)
        elif entry.plan is not None and entry.plan[0] is not None and _amended(entry.plan[0], entry.plan[1]):
            _signed(identity, entry.plan[1], entry)


def _region_moved(entry: Transaction) -> bool:
    assert entry.authority is not None
    before, after = entry.authority
    return before is not None and before.region != after.region


def _plan_of(entry: Transaction) -> PlanRecord:
    if entry.plan is None:
        raise Violation("people-approved", f"the authority moved without a plan: {entry.authority}")
    return entry.plan[1]


def _amended(before: PlanRecord, after: PlanRecord) -> bool:
    return before.digest != after.digest


def _signed(identity: SshIdentity, record: PlanRecord, entry: Transaction) -> None:
    plan = record.plan
    people: set[str] = set()  # fingerprints of keys: a person with two names is one person
    for approval in entry.approvals:
        signer = _signer(identity, record, approval, entry.at)
        if signer is not None and approval.decision != "approve":
            raise Violation("people-approved", f"plan {plan.id} ran although {approval.principal} refused it")
        if signer is not None and approval.principal.casefold() != plan.requester.casefold():
            people.add(signer)
    required = 1 if plan.break_glass and plan.reason else 2
    if len(people) < required or plan.approvals_required < required:
        raise Violation(
            "people-approved", f"plan {plan.id} ran with {len(people)} valid approvals of this digest, {required} are needed"
        )


def _signer(identity: SshIdentity, record: PlanRecord, approval: Approval, at: float) -> str | None:
    """Whose signature it is, if it is real, of this very plan, and had not expired when the transaction was applied."""
    plan = record.plan
    message = statement(plan.group, plan.id, record.digest, approval.decision, approval.principal, approval.expires_at)
    try:
        signer = identity.verify(message, approval.signature, approval.principal)
    except Refused:
        return None
    return signer.fingerprint if approval.decision != "approve" or approval.expires_at > at else None


def _on_this_evidence(world: Observed, record: PlanRecord, entry: Transaction) -> None:
    """The region that was to be left is the one that was seen. A planned move: in the same epoch. A failover from a region
    that was silent: it has not served since. (From one that was serving badly: also in newer epochs, its loss is compared.)"""
    assert entry.authority is not None
    assert entry.authority[0] is not None
    before, evidence = entry.authority[0], record.plan.evidence
    served = [e for opening, e, _ in world.history.openings() if opening.n < entry.n and e > evidence.authority_epoch]
    moved = record.plan.kind is not PlanKind.FAILOVER and before.epoch != evidence.authority_epoch
    if before.region != evidence.authority_region or (served and not evidence.holders) or moved:
        raise Violation(
            "people-approved",
            f"plan {record.plan.id} was approved on {evidence.authority_region} in epoch {evidence.authority_epoch} and ran on "
            f"{before.region} in epoch {before.epoch}; epochs that served since: {served}",
        )


def audit_whole(world: Observed) -> None:
    """The audit chain is whole, entries are never rewritten, and every decision wrote its entry in its own transaction."""
    items = sorted((key, item) for key, item in world.cluster._items.items() if key.startswith(world.keys.audits))
    problem = broken_at([decode(AuditEntry, item.value) for _, item in items])
    if problem and not world.history.restored:  # a backup has lost entries, and the gap shows it
        raise Violation("audit-whole", problem)
    if world.history.rewritten_audits:
        raise Violation("audit-whole", f"{world.history.rewritten_audits[0]} was rewritten")
    written = sum(entry.audits for entry in world.history.transactions)
    if not world.history.restored and written > len(items):
        raise Violation("audit-whole", f"{written} entries were written and {len(items)} are there")
    for entry in world.history.transactions:
        decides = _decides(entry)
        if decides and not entry.audits:
            raise Violation("audit-whole", f"nothing in the audit says that {decides}")


def _decides(entry: Transaction) -> str:
    if entry.authority is not None and (entry.authority[0] is None or _region_moved(entry)):
        return f"the authority went to {entry.authority[1].region}"
    if entry.authority is not None and entry.authority[0] is not None:
        before, after = entry.authority[0].barrier, entry.authority[1].barrier
        if after is not None and after != before:
            return f"the barrier of {after.plan} was set"
    if entry.plan is not None and (entry.plan[0] is None or entry.plan[0].state is not entry.plan[1].state):
        return f"plan {entry.plan[1].plan.id} is {entry.plan[1].state.value}"
    return ""


def acks_within_right(world: Observed) -> None:
    """Nobody acknowledges after its right ended by its own clock, nor after a newer epoch of the stream acknowledged."""
    newest: dict[str, int] = {}
    for ack in world.acks:
        if ack.late_by >= 0:
            raise Violation("acks-within-right", f"{ack.instance} acknowledged {ack.late_by:.3f} s after its right had ended")
        before = newest.get(ack.stream, 0)
        if ack.epoch < before and ack.new:
            raise Violation("acks-within-right", f"{ack.instance} acknowledged in epoch {ack.epoch} after epoch {before} did")
        newest[ack.stream] = max(before, ack.epoch)


def two_past_the_lease(world: Observed) -> None:
    """Past its lease a holder acknowledges nothing that fewer than two stores have."""
    for ack in world.acks:
        if ack.beyond_lease and ack.in_stores < 2:
            raise Violation(
                "two-past-the-lease",
                f"{ack.instance} acknowledged {ack.agent} {ack.id} past its lease, in {ack.in_stores} stores",
            )


def epochs_unique(world: Observed) -> None:
    """An epoch is given out once, epochs and forks rise, and only a region in authority gets one.

    Not judged when etcd was restored from a backup: it forgets what it gave out, which is what the stores' epochs are for.
    """
    if world.history.restored:
        return
    owners: dict[int, str] = {}
    for entry in world.history.transactions:
        if entry.holder is None:
            continue
        who = f"{entry.holder.region}/{entry.holder.instance}@{entry.n}"
        if entry.holder.epoch in owners:
            raise Violation("epochs-unique", f"epoch {entry.holder.epoch} went to {owners[entry.holder.epoch]} and {who}")
        owners[entry.holder.epoch] = who
        if entry.authority is None or entry.authority[1].region != entry.holder.region:
            raise Violation("epochs-unique", f"{who} acquired without the authority")
    for stream in world.streams:
        epochs = [epoch for _, epoch, _ in world.history.openings(stream)]
        if epochs != sorted(set(epochs)):
            raise Violation("epochs-unique", f"epochs of {stream} were opened in the order {epochs}")


def authority_before_people(world: Observed) -> None:
    """A failover's barrier needs its approvals, too: it already stops the old region."""
    identity = SshIdentity(world.keys_dir / "allowed_signers", NAMESPACE, world.clock.wall)
    for entry in world.history.transactions:
        if entry.plan is None or entry.plan[0] is None or entry.plan[1].state is not State.QUIESCING:
            continue
        if entry.plan[0].state in BEFORE_AUTHORIZE - {State.QUIESCING}:
            try:
                _signed(identity, entry.plan[1], entry)
            except Violation as violation:
                raise Violation("barrier-approved", f"its barrier: {violation}") from violation


def together(world: Observed) -> None:
    """In a promotion no stream opens before all are fenced, nor while the losses added up exceed what people approved."""
    for entry, epoch, _ in world.history.openings():
        if entry.progress is None or entry.under is None or (entry.progress[0] is not None and entry.progress[0].open):
            continue
        plan, stream = entry.under.plan, entry.progress[1].stream
        missing = set(world.streams) - set(entry.everyone)
        if missing or entry.under.state not in (State.CATCHING_UP, State.HOLDING):
            raise Violation(
                "together", f"{stream} opened epoch {epoch} in state {entry.under.state.value}; not fenced: {sorted(missing)}"
            )
        losses = [found.loss for found in entry.everyone.values()]
        seconds, records = max(loss.seconds for loss in losses), sum(loss.records for loss in losses)
        approved = plan.evidence.loss
        if seconds > approved.seconds + plan.tolerance_seconds or records > approved.records + plan.tolerance_records:
            raise Violation("together", f"{stream} opened epoch {epoch}: {seconds:.1f} s and {records} records are lost in all")


def left_alone(world: Observed) -> None:
    """While a plan is under way nobody gives a stream up to share it out anew."""
    for at, who, stream, plans in world.history.given_up:
        if plans:
            raise Violation("left-alone", f"{at:.2f}: {who} gave {stream} up while {plans} were under way")


def one_hop(world: Observed) -> None:
    """What one instance handed to another is never handed on."""
    for way in world.hops:
        if len(way) > 1:
            raise Violation("one-hop", f"records went {' -> '.join(way)}")


CHECKERS: dict[str, Callable[[Observed], None]] = {
    "one-active": one_active,
    "nothing-lost": nothing_lost,
    "promised-loss": promised_loss,
    "stores-whole": stores_whole,
    "stores-fenced": stores_fenced,
    "objects-immutable": objects_immutable,
    "dns-safe": dns_safe,
    "people-approved": people_approved,
    "barrier-approved": authority_before_people,
    "audit-whole": audit_whole,
    "acks-within-right": acks_within_right,
    "two-past-the-lease": two_past_the_lease,
    "epochs-unique": epochs_unique,
    "together": together,
    "left-alone": left_alone,
    "one-hop": one_hop,
}


def violations(world: Observed) -> dict[str, str]:
    """What every checker found: its name → what it says."""
    found = {}
    for name, checker in CHECKERS.items():
        try:
            checker(world)
        except Violation as violation:
            found[violation.checker] = str(violation)
        except DrError as error:  # what it looked at is damaged
            found[name] = str(error)
    return found


def check_all(world: World) -> None:
    """Raises the first violation, with the story."""
    for checker in CHECKERS.values():
        try:
            checker(world)
        except Violation as violation:
            raise Violation(violation.checker, f"{violation}\n{world.story()}") from None


async def settle(world: World, seconds: float = 90.0) -> None:
    """``level``; then all checkers, and the store checker for a settled world."""
    await level(world, seconds)
    async with world.opened():
        check_all(world)
        stores_are_prefixes(world)


async def level(world: World, seconds: float = 90.0) -> None:
    """Heals everything, starts who is dead, and waits until one instance serves and every store has everything."""
    world.heal_all()
    world.before_effect = world.after_effect = None
    world.start_all()
    await asyncio.sleep(0)

    def settled() -> bool:
        serving = world.serving()
        if set(serving) != set(world.streams):
            return False
        writers: list[Any] = [instance.controller._actives[stream].writer for stream, instance in serving.items()]
        return all(pump.attached and pump.seq >= writer.seq - 2 for writer in writers for pump in writer.pumps.values())

    await world.until(settled, seconds, "one active instance and level stores")
    await world.wait(3.0)
