"""What is wrong with a head, and what it should say: by the objects of its own store, and by the other regions' heads.

``examine`` comes before the walk: a head that names impossible things is put right on paper first, or the walk would follow it
into nothing. ``judge`` comes after the walk, when the chain and the counts are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from controller.domain.model import GENESIS, Head, SegmentRef
from controller.domain.replication import cut, head_problem, owner
from controller.errors import Corrupt, DrError, NotFound
from controller.ports import FoundHead, RegionStore
from controller.stream.limits import is_hash
from controller.stream.proof import ProofView
from controller.stream.segment import SegmentHeader, decode_header, next_chain


@dataclass(slots=True)
class Examined:
    """``sane``: the head to walk along, None when there is none to be had. ``faults``: what is wrong with the real one."""

    found: FoundHead
    sane: Head | None
    faults: list[str] = field(default_factory=list)
    diverged: str = ""
    """Where its history turns away from the others', and that it is no damage."""


def reference(others: Mapping[str, Head]) -> Head | None:
    """The longest other head that is sound."""
    sound = [head for head in others.values() if head_problem(head) is None and head.seq]
    return max(sound, key=lambda head: (head.epoch, head.seq), default=None)


async def examine(store: RegionStore, stream: str, others: Mapping[str, Head]) -> Examined:
    """Before the walk. Raises Unavailable."""
    found = await store.inspect_head(stream)
    known = reference(others)
    if found.head is None:
        return Examined(found, known, [found.problem])
    seen = Examined(found, found.head)
    _form(seen, others)
    if seen.faults and known is not None and head_problem(found.head) is not None:
        seen.sane = replace(found.head, epochs=cut(known.epochs, found.head.seq))
    await _reach(seen, store, others)
    if known is not None:
        await _turns(seen, store, known)
    await _begins(seen, store, known)
    return seen


def _form(seen: Examined, others: Mapping[str, Head]) -> None:
    head = seen.found.head
    assert head is not None
    problem = head_problem(head)
    if problem is not None:
        seen.faults.append(problem)
    for name, value in (("chain", head.chain), ("base_chain", head.base_chain)):
        if not is_hash(value):
            seen.faults.append(f"its {name} {value[:80]!a} is no hash")
    if head.epoch and head.writer.rpartition("/")[2] != str(head.epoch):
        seen.faults.append(f"its writer {head.writer[:200]!a} is not of its epoch {head.epoch}")
    for region, other in others.items():
        if other.epoch == head.epoch and other.writer != head.writer:
            seen.faults.append(
                f"its writer is {head.writer[:200]!a}, that of {region} in the same epoch {other.writer[:200]!a}"
            )
            break
    if not 1 <= head.base <= head.seq + 1:
        seen.faults.append(f"its base is {head.base} and it has {head.seq} segments")


async def _reach(seen: Examined, store: RegionStore, others: Mapping[str, Head]) -> None:
    """A head that names segments which exist nowhere is not followed there."""
    head = seen.sane
    assert head is not None
    known = max((other.seq for other in others.values()), default=0)
    if head.seq <= known or _keeps_nothing(head):
        return
    last = await _last_object(store, head)
    if head.seq > max(last, known):
        seen.faults.append(f"it names segment {head.seq:,} as its last, and none exists after {max(last, known):,}")
        seq = max(last, known)
        seen.sane = replace(head, seq=seq, epochs=cut(head.epochs, seq), base=min(head.base, seq + 1))


async def _last_object(store: RegionStore, head: Head) -> int:
    """The greatest seq of any object, at most the head's."""
    low, high = 0, head.seq
    while low < high:
        middle = (low + high + 1) // 2
        if await store.list_segments(head.stream, middle, 1):
            low = middle
        else:
            high = middle - 1
    return low


async def _turns(seen: Examined, store: RegionStore, known: Head) -> None:
    """Where its epochs differ from the others': a store that has objects of its own there diverged, else it is damage."""
    head = seen.sane
    assert head is not None
    common = min(head.seq, known.seq)
    # Either may have dropped entries that every base has passed: they are compared from where both begin.
    begin = max((starts[0].first_seq for starts in (head.epochs, known.epochs) if starts), default=1)
    bounds = sorted({start.first_seq for start in (*head.epochs, *known.epochs) if begin <= start.first_seq <= common})
    theirs = {start.epoch: start for start in known.epochs}
    same = all(theirs.get(start.epoch, start) == start for start in cut(head.epochs, common))
    same = same and all(owner(head.epochs, seq) == owner(known.epochs, seq) for seq in bounds)
    if same and begin <= max(head.base, known.base):
        return
    at = next((seq for seq in bounds if owner(head.epochs, seq) != owner(known.epochs, seq)), None)
    if at is not None and owner(head.epochs, at):
        ours = await store.inspect_object(SegmentRef(head.stream, at, owner(head.epochs, at)))
        if ours.data is not None:
            seen.diverged = (
                f"its history turns away from the others' at segment {at:,}: epoch {owner(head.epochs, at)} and not "
                f"{owner(known.epochs, at)}; the holder cuts it back when it reaches this store"
            )
            return
    seen.faults.append("its epochs are not those of the other regions, and their objects are not there")
    seen.sane = replace(head, epochs=cut(known.epochs, head.seq))


def _keeps_nothing(head: Head) -> bool:
    """Its base is the segment after its last one, as retention or a re-seed leaves it: both chains are that of its last one."""
    return head.base == head.seq + 1 and head.base_chain == head.chain


async def _begins(seen: Examined, store: RegionStore, known: Head | None) -> None:
    """Its base: the segment is there and follows the chain that the head says."""
    head = seen.sane
    assert head is not None
    if _keeps_nothing(head):
        return
    if head.base == head.seq + 1:
        seen.faults.append(
            f"its base is {head.base:,}, after its last segment, and its base_chain is {head.base_chain[:12]}… and its chain "
            f"{head.chain[:12]}…; they would be the same"
        )
        if head.seq == 0 or (known is None and head.base_chain == GENESIS):
            seen.sane = replace(head, base=1, base_chain=GENESIS)
        elif known is not None and known.base <= head.base:
            seen.sane = replace(head, base=known.base, base_chain=known.base_chain)
        return
    if head.seq == 0 or not 1 <= head.base <= head.seq:
        if head.seq and known is not None:
            seen.sane = replace(head, base=known.base, base_chain=known.base_chain)
        elif head.base < 1:
            seen.sane = replace(head, base=1, base_chain=GENESIS)
        return
    first = await _header(store, head, head.base)
    if first is None and known is not None and known.base > head.base:
        seen.faults.append(f"its base is {head.base:,}, of which nothing is there; that of another region is {known.base:,}")
        seen.sane = replace(head, base=known.base, base_chain=known.base_chain)
        return
    right = GENESIS if head.base == 1 else first.prev_chain if first is not None else head.base_chain
    if known is not None and known.base == head.base:
        right = known.base_chain
    if right != head.base_chain and known is not None and known.base_chain == head.base_chain and known.base < head.base:
        seen.faults.append(f"its base is {head.base:,}, and its base_chain is that of base {known.base:,} of another region")
        seen.sane = replace(head, base=known.base)
        return
    if right != head.base_chain:
        seen.faults.append(f"its base_chain is {head.base_chain[:12]}…, segment {head.base:,} follows {right[:12]}…")
        seen.sane = replace(head, base_chain=right)


async def _header(store: RegionStore, head: Head, seq: int) -> SegmentHeader | None:
    epoch = owner(head.epochs, seq)
    data = (await store.inspect_object(SegmentRef(head.stream, seq, epoch))).data if epoch else None
    if data is None:
        return None
    try:
        return decode_header(data)
    except Corrupt:
        return None


async def real_end(store: RegionStore, seen: Examined, proof: ProofView, others: Mapping[str, Head]) -> Head | None:
    """After the walk, when the chain at its end is not the head's: a later segment may be the real end, by the head's own chain
    or by another region's head. Returns the head that ends there; None when there is none."""
    head = seen.sane
    if head is None or seen.found.head is None:
        return None
    seq, chain = proof.position(head.stream)
    if seq != head.seq or chain == head.chain or not is_hash(chain):
        return None
    known = reference(others)
    ends = {(other.seq, other.chain) for other in others.values()}
    epochs = known.epochs if known is not None and known.seq > seq else head.epochs
    found: Head | None = None
    while (epoch := owner(epochs, seq + 1)) != 0:
        try:
            data = await store.get_segment(SegmentRef(head.stream, seq + 1, epoch))
            header = decode_header(data)
        except (Corrupt, NotFound):
            break
        if header.prev_chain != chain:
            break
        seq, chain = seq + 1, next_chain(chain, data)
        if chain == head.chain or (seq, chain) in ends:
            found = replace(head, seq=seq, chain=chain, epochs=cut(epochs, seq))
    return found


def judge(seen: Examined, proof: ProofView) -> list[str]:
    """After the walk along ``seen.sane``. Returns what else is wrong with the real head."""
    head, stream = seen.sane, seen.sane.stream if seen.sane else ""
    if head is None or seen.found.head is None:
        return []
    faults: list[str] = []
    for named in head.snapshots:
        there = proof.chain_at(stream, named.seq)
        if there and named.chain != there:
            faults.append(f"its snapshot at segment {named.seq:,} names chain {named.chain[:12]}…, there it is {there[:12]}…")
    seq, chain = proof.position(stream)
    if seq == head.seq and chain and chain != head.chain:
        faults.append(f"its chain is {head.chain[:12]}…, its {seq:,} segments give {chain[:12]}…")
    segments, records, size = proof.counts(stream)
    whole = not proof.has_gaps()
    if head.base == 1 and whole and segments == head.seq and (records, size) != (head.records, head.bytes):
        faults.append(f"it counts {head.records:,} records in {head.bytes:,} bytes, its segments have {records:,} in {size:,}")
    if whole and head.base == 1 and records and not proof.received(stream, head.received_at):
        faults.append(f"no record was received at {head.received_at!r}, as it says of the last one")
    return faults


def right_head(seen: Examined, proof: ProofView, others: Mapping[str, Head]) -> Head | None:
    """What the head should say, as far as the objects prove it; None when they do not. Epoch and writer are the mender's."""
    sane = seen.sane
    if sane is None:
        return None
    stream = sane.stream
    seq, chain = proof.position(stream)
    if not chain or not is_hash(chain):
        return None
    known = reference(others)
    floor, _ = proof.floor(stream)
    base = max(floor + 1, min(sane.base, seq + 1))
    base_chain = proof.chain_at(stream, base - 1)
    if base_chain is None or not is_hash(base_chain):
        return None
    old = seen.found.head
    _, records, size = proof.counts(stream)
    if base > 1:
        told = known if known is not None and known.seq >= seq else sane
        records, size = told.records, told.bytes
    received = proof.last_received(stream, seq)
    return replace(
        sane,
        seq=seq,
        chain=chain,
        epochs=cut(sane.epochs, seq),
        base=base,
        base_chain=base_chain,
        salvage=old.salvage if old is not None else (),
        snapshots=tuple(
            replace(one, chain=proof.chain_at(stream, one.seq) or one.chain)
            for one in (old.snapshots if old is not None else ())
            if base - 1 <= one.seq <= seq
        ),
        received_at=received if received is not None else sane.received_at,
        records=records,
        bytes=size,
    )


async def differing(store: RegionStore, other: Head, proof: ProofView, stream: str) -> str:
    """Why ``other``, the head of ``store``, and the walked history are not one; "" when they are, as far as both reach."""
    seq, chain = proof.position(stream)
    common = min(seq, other.seq)
    floor = max(proof.floor(stream)[0], other.base - 1)
    if common <= floor:
        return ""
    ours = chain if common == seq else proof.chain_at(stream, common)
    theirs = other.chain
    if common != other.seq:
        try:
            following = SegmentRef(stream, common + 1, other.owner(common + 1))
            theirs = decode_header(await store.get_segment(following)).prev_chain
        except (DrError, LookupError):
            return ""  # what is damaged there is found when that region is verified
    if not ours or ours == theirs:
        return ""
    return f"at segment {common:,} its chain is {ours[:12]}…, that of {store.region} is {theirs[:12]}…"
