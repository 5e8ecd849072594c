"""Which stream an agent belongs to, and which instance of the active region holds which stream. Pure.

Every instance decides for itself, on what it sees of etcd: the transaction that acquires is what makes it exclusive. Shares
differ by at most one. Whoever holds most already gets the larger share, so that a division that is even is never changed:

- A free stream is taken at once by an instance that is below its share, or that holds nothing.
- One that stayed free for a grace is taken by anybody: a member may be alive and unable to acquire.
- An instance above its share gives up one stream, when nothing is free and another one is below its share. It does so once
  for each set of members: when nobody takes what it gave up, it takes it back and keeps it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

MAX_STREAMS = 64
"""One transaction names every stream's holder key, and etcd takes 128 operations in one."""
LEAD = "s00"
"""Its holder also moves the zone, carries the second half of a promotion and runs the fleet."""


def stream_names(count: int) -> tuple[str, ...]:
    """The names of a group's streams, the lead first."""
    return tuple(f"s{number:02d}" for number in range(count))


def stream_of(agent: str, count: int) -> str:
    """The stream that an agent belongs to for the group's life: the first 8 bytes of SHA-256 of its name, modulo ``count``."""
    if count == 1:
        return LEAD
    prefix = hashlib.sha256(agent.encode("utf-8", "surrogatepass")).digest()[:8]
    return f"s{int.from_bytes(prefix, 'big') % count:02d}"


@dataclass(frozen=True, slots=True)
class Shares:
    """What one instance sees. Instances are named by region and instance, since names repeat between regions."""

    streams: Sequence[str]
    holders: Mapping[str, str]
    """Stream → who holds it; one that is missing is free."""
    live: Collection[str]
    """Live instances of the active region."""
    me: str
    overdue: Collection[str] = ()
    """Free streams whose grace is over."""
    expected: int = 0
    """How many instances the region should have, while they are still starting; 0: those that are live."""


def quotas(seen: Shares) -> dict[str, int]:
    """How many streams each instance should hold. Instances that are only expected have names that no instance can have."""
    held = _held(seen)
    absent = [f"~{number}" for number in range(seen.expected - len(held))]
    ranked = [*sorted(held, key=lambda name: (-held[name], name)), *absent]
    each, more = divmod(len(seen.streams), len(ranked))
    return {name: each + (rank < more) for rank, name in enumerate(ranked)}


def to_acquire(seen: Shares) -> tuple[str, ...]:
    """Free streams that this instance should try to take now, in the order in which it should.

    Instances begin at different places, so that they seldom want the same one."""
    held, names = _held(seen), sorted({*seen.live, seen.me})
    mine = names.index(seen.me)
    place = {stream: number for number, stream in enumerate(seen.streams)}
    free = [stream for stream in seen.streams if stream not in seen.holders]
    free.sort(key=lambda stream: (place[stream] % len(names) != mine, place[stream]))
    room = max(0, max(quotas(seen)[seen.me], 1) - held[seen.me])
    return (*free[:room], *(stream for stream in free[room:] if stream in seen.overdue))


def to_give_up(seen: Shares) -> str | None:
    """The stream that this instance should give up, or None. Never the lead while it holds another one."""
    if any(stream not in seen.holders for stream in seen.streams):
        return None
    held, quota = _held(seen), quotas(seen)
    if held[seen.me] <= quota[seen.me] or not any(held[name] < quota[name] for name in held):
        return None
    return max(stream for stream, holder in seen.holders.items() if holder == seen.me)


def _held(seen: Shares) -> dict[str, int]:
    held = dict.fromkeys({*seen.live, seen.me}, 0)
    for holder in seen.holders.values():
        if holder in held:
            held[holder] += 1
    return held
