"""When a holder may go on past its lease, because etcd is unreachable for everybody. A group switches this on; else never.

Two things are asked for, and both must hold, again and again:

1. *The stores prove it.* A store that carries the holder's own epoch, in its own name, was not fenced by anybody newer when
   it answered. Whoever comes after this holder fences a quorum of stores before it serves, and every such quorum meets
   every set of stores that ``proof`` asks for. So at the moment at which the holder *sent* its questions no successor had its
   quorum; and a successor waits for one whole TTL after it had, before it serves. That keeps the two apart, whatever etcd, a
   network or a paused process does: it is the only thing that safety rests on. ``tests/model/Failsafe.tla`` is the proof.
2. *The other regions agree.* A controller of every other region answers that etcd is unreachable for it, too, and none knows
   of a newer epoch, another region in authority or a barrier. This keeps a holder that is merely cut off itself from standing
   in the way of those who can reach etcd. A region that does not answer ends it: it may be the one that takes over. What
   it costs is availability when etcd *and* a whole region are gone at once; then the right runs out, as without failsafe.

Past its lease a holder acknowledges nothing that fewer than two stores have: such a record is in the history that any
successor chooses. What one store alone has could be lost without being in any loss that people approved.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from controller.domain.model import Head
from controller.domain.replication import every_quorum_meets

NOT_KNOWN = -1.0
"""In a record of forks: whether an earlier holder may have gone on past its lease is not known (etcd was restored)."""


@dataclass(frozen=True, slots=True)
class Witness:
    """What one controller says of etcd, as of its last look."""

    region: str
    instance: str
    unreachable_seconds: float | None
    """Since its last complete look, while looks fail; None: etcd answers it."""
    authority: str
    """Region that has the authority; "" when it has never seen one."""
    barrier: str
    """Plan that is taking over, "" for none."""
    epochs: Mapping[str, int] = field(default_factory=dict)
    """Stream → greatest epoch that it knows of, from etcd and from the stores."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What the stores say. ``problem`` None: no successor had its fence quorum when they were asked. ``newer``: the greater
    epoch that one of them knows, 0 for none: somebody newer exists."""

    problem: str | None
    newer: int = 0


def proof(heads: Mapping[str, Head | None], epoch: int, writer: str) -> Proof:
    """``heads``: of all stores of the group, None for one that did not answer. ``writer``: the holder's identity."""
    newer = max((head.epoch for head in heads.values() if head is not None), default=0)
    if newer > epoch:
        return Proof(f"a store knows epoch {newer}", newer)
    ours = [region for region, head in heads.items() if head is not None and (head.epoch, head.writer) == (epoch, writer)]
    if len(ours) >= 2 and every_quorum_meets(tuple(heads), ours):
        return Proof(None)
    return Proof(f"{len(ours)} of {len(heads)} stores carry epoch {epoch} in our name, 2 are needed")


def objection(
    answers: Mapping[str, Sequence[Witness]],
    regions: Collection[str],
    *,
    home: str,
    stream: str,
    epoch: int,
    silent_seconds: float,
) -> str | None:
    """Why the holder of ``stream`` in ``home`` may not go on past its lease, by what the others say; None: nobody objects.

    ``answers``: region → what its controllers answered. ``silent_seconds``: for how long etcd must have been unreachable for
    each of them; less may be one call that was lost.
    """
    for region, found in sorted(answers.items()):
        for witness in found:
            why = _against(witness, home, stream, epoch, silent_seconds)
            if why is not None:
                return f"{region}/{witness.instance} {why}"
    missing = sorted(region for region in regions if region != home and not answers.get(region))
    return f"no controller of {', '.join(missing)} answers: it may reach etcd" if missing else None


def _against(witness: Witness, home: str, stream: str, epoch: int, silent_seconds: float) -> str | None:
    if witness.unreachable_seconds is None:
        return "reaches etcd"
    if witness.unreachable_seconds < silent_seconds:
        return f"reached etcd {witness.unreachable_seconds:.1f} s ago"
    if witness.authority not in ("", home):
        return f"knows that the authority is with {witness.authority}"
    if witness.barrier:
        return f"knows that plan {witness.barrier} is taking over"
    if witness.epochs.get(stream, 0) > epoch:
        return f"knows epoch {witness.epochs[stream]} of {stream}"
    return None


def wait_seconds(recorded: float, ttl_seconds: float) -> float:
    """How long a successor waits after it has its fence quorum. ``recorded``: what the last holder wrote down beside its fork;
    0: it never goes on past its lease, or all that it had lent was over. ``ttl_seconds``: ours, for when that is unknown."""
    return ttl_seconds if recorded < 0 else recorded
