"""What a head accepts: the rules of DESIGN section 4 for ``fence``, ``advance``, ``realign`` and ``set_base``, pure.

Two kinds of function, shared by every implementation of the region store:

- ``check_*`` looks at the arguments alone, before anything is sent, and raises ``Refused`` for a request that no store could
  ever accept (a segment of another stream, a cut that would forget what it cuts).
- ``settled_*`` is the read-back "is it mine?". It looks at the head as it is now and answers True (it is already as wanted:
  success), False (it is still as it was before the call: the call may be sent again), or raises ``FenceLost`` or
  ``Conflict``.

An epoch is given out once, so an equal epoch under another writer's name means that the rule was broken elsewhere (for
example an etcd that came back from an old snapshot). Whoever fenced first keeps the store; the other one has lost the
fence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from controller.adapters.head_item import ITEM_GUARD_BYTES, ITEM_MAX_BYTES, head_to_item, item_bytes, reach, within
from controller.domain.model import Baseline, Commit, EpochStart, Fence, Head, Realignment, Salvage, SegmentRef, SnapshotRef
from controller.domain.retention import is_diverged, is_salvage
from controller.errors import Conflict, FenceLost, Refused
from controller.ports import FoundHead

SEQ_MAX = 10**16 - 1
"""Greatest sequence number and epoch: keys are padded to 16 digits, and their order is the order of the numbers only up to
here.
"""

CHAIN_CHARACTERS = 64

ENTRIES_SURELY_SMALL = 500
"""An entry takes at most about 250 bytes, so fewer of them need no measuring."""

DELETE_MAX = 1000
"""Objects that one DeleteObjects takes. Source: S3 API reference."""
PAGE_MAX = 1000
"""Catalogue items in one page."""
SNAPSHOTS_NAMED = 8
"""Most snapshots that a head may name; a few are enough."""

_FENCE_FIRST = "call fence() on this store under the epoch, then repeat"
_READ_AGAIN = "read the head again and decide anew"


# ------------------------------------------------------------------------------------------------------------ arguments


def check_name(field: str, value: str) -> None:
    """Refuses what would make keys ambiguous: nothing, path separators, ``#`` (it separates group and stream), control
    characters.
    """
    if not value or len(value) > 200 or any(c in "/#" or not c.isprintable() for c in value) or value in (".", ".."):
        raise Refused(
            f"{field} is {value[:200]!r}: 1 to 200 printable characters without '/' and '#' are needed",
            hint=f"choose a plain {field}, for example letters, digits and dashes",
        )


def check_fence(fence: Fence) -> None:
    """Raises Refused when the fence itself is impossible."""
    check_name("stream", fence.stream)
    if not 1 <= fence.epoch <= SEQ_MAX:
        raise Refused(
            f"fence.epoch is {fence.epoch}: it must be in 1..{SEQ_MAX}", hint="acquire the lease first: it gives the epoch"
        )


def check_ref(ref: SegmentRef | SnapshotRef) -> None:
    """Raises Refused when no key can be made of the reference."""
    check_name("stream", ref.stream)
    for field, value in (("seq", ref.seq), ("epoch", ref.epoch)):
        if not 1 <= value <= SEQ_MAX:
            raise Refused(f"segment {field} is {value}: it must be in 1..{SEQ_MAX}", hint="name an existing segment")


def check_put(fence: Fence, ref: SegmentRef | SnapshotRef) -> None:
    """A writer puts segments of its own epoch, and copies those of older ones. Raises Refused, or FenceLost for a future
    epoch.
    """
    check_fence(fence)
    check_ref(ref)
    _same_stream("ref.stream", ref.stream, fence)
    if ref.epoch > fence.epoch:
        raise FenceLost(f"segment {ref.key} belongs to epoch {ref.epoch}, the fence to {fence.epoch}", epoch=ref.epoch)


def check_commit(fence: Fence, commit: Commit) -> None:
    """Raises Refused for a commit that does not move forward, or that announces epochs it does not cover."""
    check_fence(fence)
    hint = "this is an error of the caller: build the commit from the head that it extends"
    if not 0 <= commit.prev_seq < commit.seq <= SEQ_MAX:
        raise Refused(
            f"commit goes from seq {commit.prev_seq} to {commit.seq}: it must move forward within 0..{SEQ_MAX}", hint=hint
        )
    _check_chain("commit.prev_chain", commit.prev_chain)
    _check_chain("commit.chain", commit.chain)
    _check_starts("commit.starts", commit.starts, fence)
    for start in commit.starts:
        if not commit.prev_seq < start.first_seq <= commit.seq:
            raise Refused(
                f"commit.starts has epoch {start.epoch} at {start.first_seq}, outside of {commit.prev_seq + 1}..{commit.seq}",
                hint=hint,
            )
    _check_counters("commit", commit.received_at, commit.records, commit.bytes)


def check_realignment(fence: Fence, expected: Head, to: Realignment) -> None:
    """Raises Refused when the cut would lose sight of segments: what is cut must be named by ``to.salvage``."""
    check_fence(fence)
    _same_stream("expected.stream", expected.stream, fence)
    _check_chain("to.chain", to.chain)
    _check_chain("to.base_chain", to.base_chain)
    _check_starts("to.epochs", to.epochs, fence)
    _check_counters("realignment", to.received_at, to.records, to.bytes)
    if not 1 <= to.base <= to.seq + 1 <= SEQ_MAX:
        raise Refused(
            f"realignment has base {to.base} and seq {to.seq}: 1 <= base <= seq + 1 is needed",
            hint="base is the first segment kept",
        )
    cuts = to.seq < expected.seq or (to.seq == expected.seq and to.chain != expected.chain)
    if cuts and to.salvage is None:
        raise Refused(
            f"realignment of {fence.stream} from seq {expected.seq} to {to.seq} names no salvage: segments would be forgotten",
            hint="set to.salvage to the range that is cut off",
        )
    if to.salvage is not None:
        changed = (to.seq, to.chain) != (expected.seq, expected.chain)
        if not changed or to.salvage.last_seq != expected.seq or not 1 <= to.salvage.first_seq <= to.salvage.last_seq:
            raise Refused(
                f"salvage {to.salvage.first_seq}..{to.salvage.last_seq} is not the tail "
                f"of a head at seq {expected.seq} that moves to {to.seq}",
                hint="salvage is what is cut off: first_seq .. the old head's seq",
            )


def check_baseline(fence: Fence, expected: Head, to: Baseline) -> None:
    """Raises Refused for a base that goes back or past the end, and for snapshots that are not of the kept history."""
    check_fence(fence)
    _same_stream("expected.stream", expected.stream, fence)
    _check_chain("to.base_chain", to.base_chain)
    if not expected.base <= to.base <= expected.seq + 1:
        raise Refused(
            f"the base of {fence.stream} cannot move from {expected.base} to {to.base} in a store at seq {expected.seq}",
            hint="a base only rises, and never past what the store has committed",
        )
    if to.base == expected.base and to.base_chain != expected.base_chain:
        raise Refused(
            f"the base {to.base} of {fence.stream} has chain {expected.base_chain[:12]}…, not {to.base_chain[:12]}…",
            hint=_READ_AGAIN,
        )
    seqs = [found.seq for found in to.snapshots]
    if seqs != sorted(set(seqs)) or len(seqs) > SNAPSHOTS_NAMED or not all(to.base - 1 <= seq <= expected.seq for seq in seqs):
        raise Refused(
            f"snapshots at {seqs[:10]} of {fence.stream}: at most {SNAPSHOTS_NAMED}, ascending, "
            f"within {to.base - 1}..{expected.seq} are allowed",
            hint="name only snapshots of the history that this store keeps",
        )
    for found in to.snapshots:
        check_put(fence, SnapshotRef(fence.stream, found.seq, found.epoch))
        _check_chain("snapshot.chain", found.chain)
        _check_chain("snapshot.sha256", found.sha256)


def check_deletion(fence: Fence, refs: Sequence[SegmentRef] | Sequence[SnapshotRef]) -> None:
    """Raises Refused for references of other streams, impossible ones, and too many."""
    check_fence(fence)
    if len(refs) > DELETE_MAX:
        raise Refused(f"{len(refs)} objects to delete, at most {DELETE_MAX} go at a time", hint="send fewer at a time")
    for ref in refs:
        check_ref(ref)
        _same_stream("ref.stream", ref.stream, fence)


def check_deletable(head: Head, fence: Fence, refs: Sequence[SegmentRef]) -> None:
    """Only what lies before the head's base and is nobody's salvage. Raises FenceLost, Conflict, Refused naming the first."""
    _fenced(head, fence)
    for ref in refs:
        if ref.seq >= head.base:
            raise Refused(
                f"segment {ref.key} is kept: the base of {ref.stream} is {head.base}",
                hint="move the base first, once everything live before it was carried forward",
            )
        if is_salvage(head, ref):
            raise Refused(f"segment {ref.key} is salvage", hint="export or drop the salvage first")


def check_diverged(head: Head, fence: Fence, refs: Sequence[SegmentRef]) -> None:
    """Only what is in no history of this store and nobody's salvage. Raises FenceLost, Conflict, Refused naming the first."""
    _fenced(head, fence)
    for ref in refs:
        if is_salvage(head, ref):
            raise Refused(f"segment {ref.key} is salvage", hint="export or drop the salvage first")
        if not is_diverged(head, ref):
            raise Refused(
                f"segment {ref.key} is of the history of {ref.stream}, or may become so: the head is at {head.seq}",
                hint="wait until the store has caught up (drctl lag), then repeat",
            )


def check_unnamed(head: Head, fence: Fence, refs: Sequence[SnapshotRef]) -> None:
    """Raises FenceLost, Conflict, and Refused for a snapshot that the head names."""
    _fenced(head, fence)
    named = {(found.seq, found.epoch) for found in head.snapshots}
    for ref in refs:
        if (ref.seq, ref.epoch) in named:
            raise Refused(f"snapshot {ref.key} is named by the head", hint="name newer ones first")


def check_held(head: Head, fence: Fence) -> None:
    """Raises FenceLost or Conflict unless the head carries our fence."""
    _fenced(head, fence)


def check_size(head: Head, region: str) -> None:
    """Raises Refused when the head would come near DynamoDB's limit. Grows with epochs and salvage only."""
    size = head_bytes(head)
    if size > ITEM_GUARD_BYTES:
        raise Refused(
            f"head of {head.stream} in {region} would have {size} bytes ("
            f"{len(head.epochs)} epochs, {len(head.salvage)} salvages), "
            f"we stop at {ITEM_GUARD_BYTES} of DynamoDB's {ITEM_MAX_BYTES}",
            hint="resolve old salvage (drctl salvage list) and let retention move the base, so that old epochs are dropped",
        )


def other_content(key: str, region: str, there: str, ours: str) -> Conflict:
    """For a key that exists and holds something else than what was to be written. ``there``, ``ours``: sha256."""
    return Conflict(
        f"object {key} in {region} exists with other content: sha256 {there[:12]}…, ours is {ours[:12]}…",
        hint="two writers share an epoch, or the object was replaced: stop, and compare both with the other regions",
    )


def not_as_found(what: str, region: str) -> Conflict:
    """For something that is to be mended and changed since it was looked at."""
    return Conflict(f"{what} in {region} is not what was found there: it was changed meanwhile", hint=f"drctl verify {region}")


def check_page(stream: str, limit: int) -> None:
    """Raises Refused for a page of the catalogue that nobody should ask for."""
    check_name("stream", stream)
    if not 1 <= limit <= PAGE_MAX:
        raise Refused(f"limit is {limit}: 1 to {PAGE_MAX} items go into a page", hint="ask for the next page with after=")


def check_entry(found: str, entry: str | None) -> None:
    """Raises Refused when an agent's item would be replaced by that of another one."""
    if entry is not None and entry != found:
        raise Refused(f"the item of agent {found!a} cannot become that of {entry!a}", hint="each agent has one of its own")


def check_mend(fence: Fence, found: FoundHead, head: Head) -> None:
    """Raises Refused for a head of another stream, FenceLost when the one that is there belongs to a newer epoch."""
    check_fence(fence)
    _same_stream("head.stream", head.stream, fence)
    _check_chain("head.chain", head.chain)
    _check_chain("head.base_chain", head.base_chain)
    _check_starts("head.epochs", head.epochs, fence)
    if not 1 <= head.base <= head.seq + 1 <= SEQ_MAX:
        raise Refused(f"head has base {head.base} and seq {head.seq}", hint="1 <= base <= seq + 1 is needed")
    if found.head is not None and found.head.epoch > fence.epoch:
        raise FenceLost(f"head of {fence.stream} is at epoch {found.head.epoch}, ours is {fence.epoch}", epoch=found.head.epoch)


def mended(head: Head, fence: Fence) -> Head:
    """The head once it has been mended."""
    return replace(head, epoch=fence.epoch, writer=fence.writer)


def _same_stream(field: str, stream: str, fence: Fence) -> None:
    if stream != fence.stream:
        raise Refused(f"{field} is {stream!r}, the fence is for {fence.stream!r}", hint="each stream has a fence of its own")


def _check_chain(field: str, chain: str) -> None:
    if len(chain) != CHAIN_CHARACTERS or not set(chain) <= set("0123456789abcdef"):
        raise Refused(
            f"{field} is {chain[:80]!r}: 64 lower-case hex digits are needed", hint="take it from next_chain() or from a head"
        )


def _check_counters(what: str, received_at: float, records: int, size: int) -> None:
    if not math.isfinite(received_at) or records < 0 or size < 0:
        raise Refused(
            f"{what} has received_at={received_at}, records={records}, bytes={size}: finite and not negative is needed",
            hint="this is an error of the caller: count what the segments hold",
        )


def _check_starts(field: str, starts: tuple[EpochStart, ...], fence: Fence) -> None:
    if any(b.epoch <= a.epoch or b.first_seq < a.first_seq for a, b in pairwise(starts)):
        raise Refused(
            f"{field} is not ascending: {starts!r}", hint="a later epoch starts at the same or a greater sequence number"
        )
    if starts and not 1 <= starts[0].epoch <= starts[-1].epoch <= fence.epoch:
        raise Refused(f"{field} names epochs outside of 1..{fence.epoch}: {starts!r}", hint="fence with the newest epoch first")


# ------------------------------------------------------------------------------------------------------------ read-back


def settled_fence(head: Head, fence: Fence) -> bool:
    """True: the head carries our epoch in our name. Raises FenceLost when somebody else's epoch is equal or greater."""
    if head.epoch < fence.epoch:
        return False
    _ours(head, fence)
    return True


def settled_advance(head: Head, fence: Fence, commit: Commit) -> bool:
    """True: the head is where the commit leads. Raises FenceLost, Conflict."""
    _fenced(head, fence)
    if head.seq == commit.seq and head.chain == commit.chain:
        return True
    if head.seq == commit.prev_seq and head.chain == commit.prev_chain:
        return False
    raise Conflict(
        f"head of {fence.stream} is at seq {head.seq} chain {head.chain[:12]}…, "
        f"the commit extends seq {commit.prev_seq} chain {commit.prev_chain[:12]}… to {commit.seq}",
        hint=_READ_AGAIN,
    )


def settled_realign(head: Head, fence: Fence, expected: Head, to: Realignment) -> bool:
    """True: the head is already cut as wanted. Raises FenceLost, Conflict."""
    _fenced(head, fence)
    if head == replace(after_realign(head, fence, to), salvage=head.salvage) and (
        to.salvage is None or to.salvage in head.salvage
    ):
        return True
    if head.seq == expected.seq and head.chain == expected.chain:
        return False
    raise Conflict(
        f"head of {fence.stream} is at seq {head.seq} chain {head.chain[:12]}…, "
        f"the realignment expects seq {expected.seq} chain {expected.chain[:12]}…",
        hint=_READ_AGAIN,
    )


def settled_base(head: Head, fence: Fence, expected: Head, to: Baseline) -> bool:
    """True: base and snapshots are already as wanted. Raises FenceLost, Conflict."""
    _fenced(head, fence)
    if (head.base, head.base_chain, head.snapshots) == (to.base, to.base_chain, to.snapshots):
        return True
    if (head.base, head.snapshots) == (expected.base, expected.snapshots) and head.seq >= reach(to):
        return False
    raise Conflict(
        f"head of {fence.stream} has base {head.base} and {len(head.snapshots)} snapshots at seq {head.seq}, "
        f"expected were base {expected.base} and {len(expected.snapshots)} at {reach(to)} or later",
        hint=_READ_AGAIN,
    )


def settled_forget(head: Head, fence: Fence, start: EpochStart) -> bool:
    """True: the head does not name this epoch any more. Raises FenceLost, Conflict."""
    _fenced(head, fence)
    if start not in head.epochs:
        return True
    if head.epochs[0] == start and len(head.epochs) > 1:
        return False
    raise Conflict(f"epoch {start.epoch} is not the first that the head of {fence.stream} names", hint=_READ_AGAIN)


def settled_salvage(head: Head, fence: Fence, piece: Salvage) -> bool:
    """True: the head does not name this salvage any more. Raises FenceLost, Conflict."""
    _fenced(head, fence)
    return piece not in head.salvage


def _fenced(head: Head, fence: Fence) -> None:
    if head.epoch < fence.epoch:
        raise Conflict(
            f"head of {fence.stream} is at epoch {head.epoch}, not fenced for epoch {fence.epoch}", hint=_FENCE_FIRST
        )
    _ours(head, fence)


def _ours(head: Head, fence: Fence) -> None:
    if head.epoch > fence.epoch:
        raise FenceLost(f"head of {fence.stream} is at epoch {head.epoch}, ours is {fence.epoch}", epoch=head.epoch)
    if head.writer != fence.writer:
        raise FenceLost(
            f"epoch {head.epoch} of {fence.stream} belongs to {head.writer!r}, we are {fence.writer!r}",
            hint="stop; an epoch was given out twice: look at etcd (restored from a snapshot?) before anything else",
            epoch=head.epoch,
        )


# --------------------------------------------------------------------------------------------------------------- effects


def after_fence(head: Head, fence: Fence) -> Head:
    """The head once the fence has been applied."""
    return replace(head, epoch=fence.epoch, writer=fence.writer)


def after_advance(head: Head, fence: Fence, commit: Commit) -> Head:
    """The head once the commit has been applied."""
    return replace(
        head,
        seq=commit.seq,
        chain=commit.chain,
        epochs=head.epochs + commit.starts,
        received_at=commit.received_at,
        records=head.records + commit.records,
        bytes=head.bytes + commit.bytes,
        writer=fence.writer,
    )


def after_realign(head: Head, fence: Fence, to: Realignment) -> Head:
    """The head once the realignment has been applied. Its counters are those of what stays."""
    return replace(
        head,
        seq=to.seq,
        chain=to.chain,
        epochs=to.epochs,
        base=to.base,
        base_chain=to.base_chain,
        salvage=head.salvage if to.salvage is None else (*head.salvage, to.salvage),
        received_at=to.received_at,
        records=to.records,
        bytes=to.bytes,
        writer=fence.writer,
        snapshots=within(head.snapshots, to),
    )


def after_forget(head: Head) -> Head:
    """The head once its first epoch has been dropped."""
    return replace(head, epochs=head.epochs[1:])


def after_salvage(head: Head, piece: Salvage) -> Head:
    """The head once it does not name ``piece`` any more."""
    return replace(head, salvage=tuple(cut for cut in head.salvage if cut != piece))


def head_bytes(head: Head) -> int:
    """Size of the head's item, at most; 0 while it is surely small."""
    entries = len(head.epochs) + sum(1 + len(cut.epochs) for cut in head.salvage)
    return item_bytes(head_to_item(" " * 200, head)) if entries >= ENTRIES_SURELY_SMALL else 0


def after_base(head: Head, to: Baseline) -> Head:
    """The head once the base has moved."""
    return replace(head, base=to.base, base_chain=to.base_chain, snapshots=to.snapshots)
