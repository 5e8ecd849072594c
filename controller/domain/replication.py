"""Which history is the history: fence quorum, recorded forks, choice, realignment, acknowledgement.

Segments carry ``(epoch, seq)`` as Raft entries carry ``(term, index)``. etcd decides epochs, and records as a *fork* where
each one began; region stores are passive and keep the entries. Two stores that hold the same epoch at a seq hold the
same history up to it (log matching): an epoch has one writer, and it begins by fencing and by choosing one history.

A store's history is **valid** as far as it contradicts no recorded fork: once epoch 7 opened at 1,042, a segment 1,042 of
epoch 6 is not history any more, however long the store that holds it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from controller.domain.model import EpochStart, Head, Salvage
from controller.errors import Refused

FORKS_MAX = 5_000
"""Forks of one stream that may be recorded: about 200 KB of etcd's 1.5 MB for a request, and fewer than a head item holds."""


def fence_quorum(stores: Collection[str]) -> int:
    """How many of ``stores`` must be fenced before an epoch opens: n − 1, so that it meets every set of two."""
    return max(1, len(stores) - 1)


def quorum_lacks(stores: Collection[str], fenced: Collection[str]) -> str | None:
    """Why the fence quorum is not reached, or None."""
    have = set(stores) & set(fenced)
    need = fence_quorum(stores)
    if len(have) >= need:
        return None
    return (
        f"{len(have)} of {len(stores)} stores are fenced, {need} are needed; missing: {', '.join(sorted(set(stores) - have))}"
    )


def every_quorum_meets(stores: Collection[str], having: Collection[str]) -> bool:
    """Whether each set of stores that may be a fence quorum has one of ``having``: what lies in all of those is found whichever
    stores answer. With two stores a quorum is one, so both are needed."""
    return len(set(stores) & set(having)) > len(set(stores)) - fence_quorum(stores)


def unfenced_sole_ackers(sole_ackers: Collection[str], fenced: Collection[str]) -> tuple[str, ...]:
    """Stores that may hold acknowledgements which no other store has, and that were not fenced and read."""
    return tuple(sorted(set(sole_ackers) - set(fenced)))


def owner(starts: Iterable[EpochStart], seq: int) -> int:
    """Epoch that owns ``seq`` by ``starts``; 0 when none does."""
    epoch = 0
    for start in starts:
        if start.first_seq <= seq:
            epoch = start.epoch
        else:
            break
    return epoch


def with_fork(starts: tuple[EpochStart, ...], new: EpochStart) -> tuple[EpochStart, ...]:
    """``starts`` after epoch ``new.epoch`` opened at ``new.first_seq``: what begins there or later is no history any more.

    Raises ValueError when the epoch is not greater than every recorded one, Refused when they are too many.
    """
    if len(starts) >= FORKS_MAX:
        raise Refused(
            f"{len(starts):,} forks are recorded, and no more than {FORKS_MAX:,} can be: epoch {new.epoch} does not open",
            hint="bring every store back: once retention has moved their bases, old forks are dropped",
        )
    if starts and new.epoch <= max(start.epoch for start in starts):
        raise ValueError(f"epoch {new.epoch} is not greater than the recorded {max(s.epoch for s in starts)}")
    return (*(start for start in starts if start.first_seq < new.first_seq), new)


def cut(starts: tuple[EpochStart, ...], seq: int) -> tuple[EpochStart, ...]:
    """The part of ``starts`` that matters for ``1 … seq``."""
    return tuple(start for start in starts if start.first_seq <= seq)


def passed(starts: tuple[EpochStart, ...], bases: Collection[int]) -> tuple[EpochStart, ...]:
    """The leading entries that are not needed any more: of stores with these ``bases`` none keeps a segment of theirs, nor
    begins right after one. Only to be dropped while every store of the group is among them and none is unaligned: a store that
    comes back with an older history is judged by what is recorded."""
    floor = min(bases, default=1)
    return tuple(start for start, following in pairwise(starts) if following.first_seq < floor)


def crowded(forks: int) -> bool:
    """Whether so many recorded forks are half of what may be recorded."""
    return 2 * forks >= FORKS_MAX


def head_problem(head: Head) -> str | None:
    """What is wrong with a head that no writer of ours can have written, or None."""
    firsts = [start.first_seq for start in head.epochs]
    epochs = [start.epoch for start in head.epochs]
    if head.seq and not head.epochs:
        return f"it has {head.seq} segments and names no epoch that wrote them"
    if firsts != sorted(set(firsts)) or epochs != sorted(set(epochs)):
        return "its epochs do not ascend"
    if head.epochs and (firsts[0] < 1 or firsts[-1] > head.seq):
        return f"its epochs begin at {firsts[0]}..{firsts[-1]} and it has {head.seq} segments"
    if head.epochs and firsts[0] > head.base:
        return f"its base is {head.base} and its epochs begin at {firsts[0]}"
    if epochs and epochs[-1] > head.epoch:
        return f"epoch {epochs[-1]} wrote to it and it is fenced at {head.epoch}"
    return None


def valid_length(head: Head, forks: tuple[EpochStart, ...]) -> int:
    """Greatest seq up to which ``head``'s history contradicts no recorded fork. Both lists ascend by first_seq.

    Either list may have lost what was ``passed``: they are compared from where both begin. That is never after a store's base;
    of a store that nevertheless keeps older segments nothing can be judged, so nothing of it is valid."""
    known = max((starts[0].first_seq for starts in (head.epochs, forks) if starts), default=1)
    if known > head.base:
        return head.base - 1
    bounds = sorted({start.first_seq for start in (*head.epochs, *forks) if start.first_seq >= known})
    for first in bounds:
        if first > head.seq:
            break
        if owner(head.epochs, first) != owner(forks, first):
            return first - 1
    return head.seq


@dataclass(frozen=True, slots=True)
class Alignment:
    """What must happen to one fenced store: keep ``1 … keep``; ``salvage`` is the diverged tail, None when there is none."""

    region: str
    keep: int
    salvage: Salvage | None


@dataclass(frozen=True, slots=True)
class Choice:
    """The longest valid history among the fenced stores, where it lies, and what the others need."""

    source: str
    length: int
    starts: tuple[EpochStart, ...]
    alignments: tuple[Alignment, ...]

    def alignment(self, region: str) -> Alignment:
        """The alignment of one fenced store. Raises LookupError when it was not fenced."""
        for alignment in self.alignments:
            if alignment.region == region:
                return alignment
        raise LookupError(f"store {region} was not fenced")


def align(region: str, head: Head, forks: tuple[EpochStart, ...], length: int, epoch: int) -> Alignment:
    """What ``region``'s store needs so that its history is a prefix of the chosen one, which has ``length`` segments."""
    keep = min(valid_length(head, forks), length)
    return Alignment(region, keep, tail_of(head, keep, epoch))


def tail_of(head: Head, keep: int, epoch: int) -> Salvage | None:
    """What holder ``epoch`` cuts off a head of which ``keep`` segments stay; None when that is nothing."""
    if keep == head.seq:
        return None
    tail = tuple(
        EpochStart(start.epoch, max(start.first_seq, keep + 1))
        for start, following in zip(head.epochs, (*head.epochs[1:], None), strict=True)
        if following is None or following.first_seq > keep + 1
    )
    return Salvage(keep + 1, head.seq, tail, head.chain, epoch)


def choose(heads: Mapping[str, Head], forks: tuple[EpochStart, ...], *, home: str, epoch: int) -> Choice:
    """The longest valid history among the fenced ``heads``; on a tie the home store's, then by name, so that less is copied.

    Raises ValueError without heads.
    """
    if not heads:
        raise ValueError("no store is fenced")
    lengths = {region: valid_length(head, forks) for region, head in heads.items()}
    source = min(lengths, key=lambda region: (-lengths[region], region != home, region))
    length = lengths[source]
    alignments = tuple(align(region, head, forks, length, epoch) for region, head in sorted(heads.items()))
    return Choice(source, length, cut(heads[source].epochs, length), alignments)


def recovered(heads: Mapping[str, Head], choice: Choice, forks: tuple[EpochStart, ...]) -> Head:
    """The head to read the recovered history's counters from: one that ends exactly there. A head with a diverged tail counts
    that tail too; when there is no other, nothing is known of when the last recovered record came."""
    exact = [head for head in heads.values() if head.seq == choice.length and valid_length(head, forks) == choice.length]
    if exact:
        return min(exact, key=lambda head: (head.received_at, head.records))
    return replace(heads[choice.source], seq=choice.length, received_at=0.0, records=0)


def acknowledged(copies: int, committed: Collection[str], sole_ackers: Collection[str]) -> bool:
    """Whether a write that asked for ``copies`` may be acknowledged, committed as it is in the stores ``committed``.

    One copy counts only in a store that is recorded as one that may acknowledge alone; two or more count anywhere, since
    a fence quorum of n − 1 meets every set of two.
    """
    if copies <= 1:
        return len(set(committed) & set(sole_ackers)) >= 1 or len(set(committed)) >= 2
    return len(set(committed)) >= copies
