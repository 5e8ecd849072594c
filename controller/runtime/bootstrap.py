"""Founds a group: writes its authority, once. Never changes one that exists."""

from __future__ import annotations

from collections.abc import Sequence

from controller.domain.model import Authority
from controller.errors import Refused
from controller.ports import Clock, Compare, Coordinator, Put
from controller.runtime.audit import Audit
from controller.runtime.documents import Keys, encode, read


async def bootstrap_group(
    coordinator: Coordinator,
    clock: Clock,
    *,
    prefix: str,
    group: str,
    region: str,
    stores: Sequence[str],
    actor: str = "bootstrap",
    streams: int = 1,
) -> Authority:
    """Gives ``region`` the authority of a new group over ``stores``, with so many streams for its whole life. Idempotent for
    equal arguments.

    Raises Refused when the group exists with other stores (a change of the set of stores is an operation of its own) or another
    number of streams (agents would belong to other streams), or when ``region`` is not one of ``stores``.
    """
    if region not in stores:
        raise Refused(f"region {region} is not one of the stores {', '.join(stores)}", hint="name a configured region")
    keys = Keys(prefix, group)
    cluster = (await coordinator.status()).cluster_id
    wanted = Authority(region=region, epoch=0, stores=tuple(stores), streams=streams, cluster=cluster)
    result = await Audit(coordinator, keys).commit(
        [Compare.absent(keys.authority)],
        [Put(keys.authority, encode(wanted))],
        at=clock.wall(),
        actor=actor,
        action="bootstrap",
        subject=group,
        detail={"region": region, "stores": list(stores), "streams": streams},
    )
    if result.succeeded:
        return wanted
    found = await read(coordinator, keys.authority, Authority)
    if found is not None and set(found.value.stores) == set(stores) and found.value.streams == streams:
        return found.value
    raise Refused(
        f"group {group} exists already with stores {found.value.stores if found else ()} and "
        f"{found.value.streams if found else 0} streams",
        hint="look at it with `drctl status`; a group is founded once",
    )
