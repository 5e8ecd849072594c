"""How far a stream's base may move, in which stores, and what may be deleted then.

The base is the first segment that a store keeps. Three rules hold for every move:

- *Old*: every segment before the base was closed longer ago than the retention time.
- *Nobody is left behind who still can come along*: no attached store lacks a segment before the base. A store that is away
  and lacks one has been behind for longer than the retention time; it is re-seeded when it comes back.
- *Two have it*: at least two stores (all of them, where there are fewer) have committed everything up to the base and every
  frame that was carried forward for it. A fence quorum of n − 1 meets every set of two, so each later epoch is opened on a
  history that reaches the base, and no realignment ever has to cut one below it.

What lies before the base and is still needed was written again before (carried forward). *Sealed* is the segment up to which
that was done: a store may take the base over once it has committed everything up to there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from controller.domain.model import Head, NamedSnapshot, SegmentRef
from controller.domain.replication import owner


@dataclass(frozen=True, slots=True)
class StorePlace:
    """One store as its pump knows it. ``attached``: fenced under our epoch, and a prefix of our history."""

    region: str
    attached: bool
    seq: int
    base: int


def enough(stores: Sequence[StorePlace]) -> int:
    """How many stores must have a segment before it may be deleted anywhere."""
    return min(2, len(stores))


def next_base(first_young: int, stores: Sequence[StorePlace]) -> int | None:
    """The base to work towards, or None while none may move. ``first_young``: the first segment within retention."""
    attached = [store.seq for store in stores if store.attached]
    if len(attached) < enough(stores):
        return None
    base = min(first_young, min(attached) + 1)
    return base if base > min(store.base for store in stores if store.attached) else None


def may_move(base: int, sealed: int, stores: Sequence[StorePlace]) -> tuple[str, ...]:
    """The stores whose base may move to ``base`` now: they have committed everything up to ``sealed``, and so have enough."""
    ready = [store for store in stores if store.attached and store.seq >= sealed]
    if len(ready) < enough(stores):
        return ()
    return tuple(store.region for store in ready if store.base < base)


def is_salvage(head: Head, ref: SegmentRef) -> bool:
    """Whether the object belongs to a tail that a realignment cut off."""
    return any(s.first_seq <= ref.seq <= s.last_seq and owner(s.epochs, ref.seq) == ref.epoch for s in head.salvage)


def is_diverged(head: Head, ref: SegmentRef) -> bool:
    """Whether the object is certainly in no history that this store has or will get, and is nobody's salvage: another epoch
    owns its number, or the history has passed its epoch. Epochs only rise along a history, so what comes after ``head.seq``
    belongs to the last one or a later one. False while the store is too short to tell."""
    if is_salvage(head, ref):
        return False
    if ref.seq < head.base:
        return True
    if ref.seq <= head.seq:
        return owner(head.epochs, ref.seq) != ref.epoch
    return ref.epoch < head.last_epoch


def deletable(head: Head, refs: Iterable[SegmentRef]) -> tuple[SegmentRef, ...]:
    """Of the objects that exist, those before the base that are nobody's salvage; also what was never committed."""
    return tuple(ref for ref in refs if ref.seq < head.base and not is_salvage(head, ref))


def is_behind(head: Head, base: int) -> bool:
    """Whether a store cannot be continued by copying from one that begins at ``base``: it has to be re-seeded."""
    return head.seq + 1 < base


def named_snapshots(
    known: Sequence[NamedSnapshot], new: NamedSnapshot | None, base: int, keep: int
) -> tuple[NamedSnapshot, ...]:
    """What a head names after ``new`` was written: the newest ``keep`` that are of the history from ``base`` on."""
    found = {snapshot.seq: snapshot for snapshot in known if snapshot.seq >= base - 1}
    if new is not None:
        found[new.seq] = new
    return tuple(found[seq] for seq in sorted(found)[-keep:])
