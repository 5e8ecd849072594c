"""After etcd was lost or restored from an old snapshot: brings the group's records back in line with what the stores know.

Region stores outlive etcd. Each head carries the greatest epoch that fenced it and the list of epochs that wrote its
history, so the *floor* of epochs and the forks can be read back from them: greatest ``(epoch of the last segment, seq)``
wins (DESIGN sections 4 and 9). What cannot be read back is who may have acknowledged alone; so every store is recorded as
one that may, and the next epoch holds until all of them are fenced, or until people approve the loss.

A snapshot may also be too old by nothing but that: a store stood in for the home store after it was taken, under an epoch and
forks that it knows. Nothing in the stores tells. So the group remembers the id of its etcd cluster, which a restore changes,
and whoever put disks back in another way says so (``restored``).

Never automatic: a person compares the stores first and confirms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from controller.domain.failsafe import NOT_KNOWN
from controller.domain.model import Authority, EpochStart, Forks, Head, Unknown
from controller.domain.replication import every_quorum_meets, quorum_lacks
from controller.errors import Conflict, Refused, Unavailable
from controller.ports import Compare, Operation, Put
from controller.runtime.audit import Audit
from controller.runtime.documents import encode, read
from controller.runtime.evidence import Outside, read_heads


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a recovery would write, for people to compare before they confirm. ``changes`` empty: nothing is wrong."""

    authority: Authority
    floor: int
    forks: Mapping[str, Forks]
    heads: Mapping[str, Mapping[str, Head | Unknown]]
    changes: tuple[str, ...]


def other_cluster(authority: Authority, cluster: str) -> str | None:
    """Why etcd is not the cluster that this group's records were made in, or None."""
    if authority.cluster in ("", cluster):
        return None
    return f"etcd is cluster {cluster}, the group was recorded in cluster {authority.cluster}: it was restored from a snapshot"


async def examine(outside: Outside, stores: tuple[str, ...], region: str | None = None, *, restored: bool = False) -> Recovery:
    """Compares etcd with the stores. ``region``: who shall be active, needed only when etcd has no authority at all.
    ``restored``: a person knows that etcd's data was put back from a copy, also where its cluster id does not tell.

    Raises Unavailable when too few stores answer to know the floor (of two stores both must), Refused when ``region`` is
    missing or unknown.
    """
    keys, coordinator = outside.keys, outside.coordinator
    found = await read(coordinator, keys.authority, Authority)
    if found is None and region not in stores:
        raise Refused(
            f"etcd has no authority for group {keys.group}, and region = {region!r} is not one of {', '.join(stores)}",
            hint="say which region shall be active: drctl recover --region REGION",
        )
    heads = {stream: await read_heads(outside, stream) for stream in outside.streams}
    for by_region in heads.values():
        answered = [name for name, head in by_region.items() if isinstance(head, Head)]
        lacks = quorum_lacks(stores, answered)
        if lacks is None and not every_quorum_meets(stores, answered):
            # With two stores an epoch may have been opened by fencing the other one alone.
            lacks = f"only {', '.join(answered)} answered, and an epoch may be known to another store alone"
        if lacks is not None:
            raise Unavailable(f"the floor of epochs cannot be known: {lacks}", hint="bring the stores back first")
    known = [head for by_region in heads.values() for head in by_region.values() if isinstance(head, Head)]
    floor = max((head.epoch for head in known), default=0)
    cluster = (await coordinator.status()).cluster_id
    before = found.value if found else Authority(region or "", 0, stores, streams=len(outside.streams))
    changes = [] if found else [f"authority: {before.region} (etcd had none)"]
    moved = other_cluster(before, cluster)
    if moved is not None:
        changes.append(moved)
    if before.epoch < floor:
        changes.append(f"epoch: {before.epoch} -> {floor}")
    forks: dict[str, Forks] = {}
    for stream, by_region in heads.items():
        recorded = await read(coordinator, keys.forks(stream), Forks)
        starts = _longest([head for head in by_region.values() if isinstance(head, Head)])
        old = recorded.value if recorded else Forks()
        unknown = Forks(old.starts, stores, NOT_KNOWN, NOT_KNOWN)
        if _newer(starts, old.starts):
            forks[stream] = replace(unknown, starts=starts)
            changes.append(
                f"forks of {stream}: {_shown(old.starts)} -> {_shown(starts)}; every store may have acknowledged alone"
            )
        elif (moved is not None or restored) and old != unknown:
            # Also where it lists every store: the holder that it knows may have ended in order, a later one not.
            forks[stream] = unknown
            changes.append(f"forks of {stream} stay; every store may have acknowledged alone since the snapshot")
    after = replace(before, epoch=max(before.epoch, floor), cluster=cluster)
    return Recovery(after, floor, forks, heads, tuple(changes))


async def recover(outside: Outside, audit: Audit, found: Recovery, *, actor: str, confirm: str) -> None:
    """Writes what ``examine`` found, in one transaction that requires that nobody holds the group.

    ``confirm``: the group's name. Raises Refused for a wrong confirmation or a living holder, Conflict when the
    authority changed since.
    """
    keys = outside.keys
    if confirm != keys.group:
        raise Refused(f"confirm = {confirm!r}: it must be the group's name, {keys.group!r}", hint="compare the stores first")
    authority = await read(outside.coordinator, keys.authority, Authority)
    compare = [Compare.modified(keys.authority, authority.revision) if authority else Compare.absent(keys.authority)]
    compare += [Compare.absent(keys.holder(stream)) for stream in outside.streams]
    then: list[Operation] = [Put(keys.authority, encode(found.authority))]
    then += [Put(keys.forks(stream), encode(forks)) for stream, forks in found.forks.items()]
    result = await audit.commit(
        compare,
        then,
        at=outside.clock.wall(),
        actor=actor,
        action="recover",
        subject=keys.group,
        detail={"changes": list(found.changes), "floor": found.floor},
    )
    if not result.succeeded:
        raise Conflict(
            "somebody holds the group, or the authority changed meanwhile",
            hint="drctl status; a holder that lives needs no recovery, wait for its lease to end",
        )


def _longest(heads: list[Head]) -> tuple[EpochStart, ...]:
    best = max(heads, key=lambda head: (head.last_epoch, head.seq), default=None)
    return best.epochs if best else ()


def _newer(found: tuple[EpochStart, ...], recorded: tuple[EpochStart, ...]) -> bool:
    return bool(found) and (not recorded or found[-1].epoch > recorded[-1].epoch)


def _shown(starts: tuple[EpochStart, ...]) -> str:
    return ", ".join(f"{start.epoch}@{start.first_seq}" for start in starts) or "none"
