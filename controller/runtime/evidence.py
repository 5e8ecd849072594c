"""Looks at everything that a plan depends on, and says it as one frozen ``Evidence``. Reads only.

The same code makes the evidence of a new plan and the evidence that an approved plan is compared with before it runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from controller.domain import lag, replication
from controller.domain.model import Authority, Forks, Head, Holder, Member, StreamReport, Unknown
from controller.domain.plan import NO_LOSS, Check, Evidence, HeadSeen, Loss, PlanKind, StoreUnknown
from controller.domain.sealing import tenure_lacks
from controller.errors import DrError, Misconfigured, Refused
from controller.ports import Clock, Coordinator, RegionStore, Resolver, Seals, Traffic, TrafficState
from controller.runtime.documents import Keys, Seen, read, read_all, read_readable
from controller.stream.patience import GRACE_SECONDS, ask_all


@dataclass(frozen=True, slots=True)
class Outside:
    """Everything that the shell reads from: the ports of one controller, and where its keys are."""

    coordinator: Coordinator
    keys: Keys
    stores: Mapping[str, RegionStore]
    traffic: Traffic
    resolver: Resolver
    clock: Clock
    streams: tuple[str, ...]
    store_timeout_seconds: float
    seals: Seals | None = None


@dataclass(frozen=True, slots=True)
class Coordination:
    """What etcd said, in one look."""

    authority: Seen[Authority]
    holders: tuple[Holder, ...]
    members: tuple[Member, ...]
    reports: Mapping[str, StreamReport]
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Keys of members and reports that could not be decoded, with the reasons."""


async def look(outside: Outside) -> Coordination:
    """Raises Unavailable, and Misconfigured when the group was never founded."""
    keys, coordinator = outside.keys, outside.coordinator
    authority = await read(coordinator, keys.authority, Authority)
    if authority is None:
        raise Misconfigured(f"group {keys.group} has no authority in etcd", hint="found it once with `drctl bootstrap`")
    holders = await read_all(coordinator, keys.holders, Holder)
    members = await read_readable(coordinator, keys.members, Member)
    reports = await read_readable(coordinator, keys.reports, StreamReport)
    return Coordination(
        authority,
        tuple(seen.value for seen in holders),
        tuple(seen.value for seen in members.documents),
        {seen.value.stream: seen.value for seen in reports.documents},
        {**members.unreadable, **reports.unreadable},
    )


async def read_heads(outside: Outside, stream: str, *, grace_seconds: float = GRACE_SECONDS) -> dict[str, Head | Unknown]:
    """Every region store's head, or since when (now) it is unknown. ``grace_seconds``: for the last ones, see ``ask_all``."""

    async def one(store: RegionStore) -> Head | Unknown:
        try:
            async with asyncio.timeout(outside.store_timeout_seconds):
                return await store.read_head(stream)
        except TimeoutError:
            return Unknown(outside.clock.wall(), f"no answer in {outside.store_timeout_seconds:g} s")
        except DrError as error:
            return Unknown(outside.clock.wall(), error.message)

    questions = {region: one(store) for region, store in outside.stores.items()}
    answers = await ask_all(
        questions,
        enough=replication.fence_quorum(outside.stores),
        good=lambda found: isinstance(found, Head),
        grace_seconds=grace_seconds,
    )
    for region, found in answers.items():
        problem = replication.head_problem(found) if isinstance(found, Head) else None
        if problem is not None:
            answers[region] = Unknown(outside.clock.wall(), f"the head is damaged: {problem}")
    slow = Unknown(outside.clock.wall(), f"no answer within {grace_seconds:g} s after the others")
    return {region: slow if found is None else found for region, found in answers.items()}


async def read_traffic(outside: Outside) -> TrafficState | Unknown:
    """What the zone says, or why that is unknown."""
    try:
        async with asyncio.timeout(outside.store_timeout_seconds):
            return await outside.traffic.read()
    except TimeoutError:
        return Unknown(outside.clock.wall(), f"no answer in {outside.store_timeout_seconds:g} s")
    except DrError as error:
        return Unknown(outside.clock.wall(), error.message)


@dataclass(frozen=True, slots=True)
class LocalKnowledge:
    """What this controller knows by itself.

    ``holder_gone_at``: stream → time by which the last holder had vanished, on *that holder's* wall clock (it stamped the
    records that the time is compared with, and clocks of machines differ).
    """

    agents: int
    holder_gone_at: Mapping[str, float]
    has_record: Mapping[str, str]
    """agent → newest record id in this region's view, to tell which reported tails arrived after all."""


async def gather(
    outside: Outside, kind: PlanKind, target: str, local: LocalKnowledge, *, plan: str = ""
) -> tuple[Evidence, Coordination]:
    """Evidence for moving to ``target``. ``plan``: id of the plan that it is for, whose own barrier is no obstacle.

    Raises Unavailable when etcd does not answer: without it nothing can be decided.
    """
    seen, traffic, forks, all_heads, keys = await asyncio.gather(
        look(outside),
        read_traffic(outside),
        read_all(outside.coordinator, outside.keys.forks(""), Forks),
        asyncio.gather(*(read_heads(outside, stream) for stream in outside.streams)),
        _keys(outside, target),
    )
    heads = dict(zip(outside.streams, all_heads, strict=True))
    recorded = {found.item.key.rsplit("/", 1)[1]: found.value for found in forks}
    now = outside.clock.wall()
    losses = [
        _loss(kind, heads[stream], recorded.get(stream, Forks()), seen.reports.get(stream), local, stream, target, now)
        for stream in outside.streams
    ]
    loss = lag.combine(losses)
    authority = seen.authority.value
    evidence = Evidence(
        at=now,
        authority_region=authority.region,
        authority_epoch=authority.epoch,
        authority_revision=seen.authority.revision,
        holders=seen.holders,
        heads=tuple(
            HeadSeen(region, stream, head.seq, head.epoch, head.last_epoch, head.chain, head.received_at)
            for stream, by_region in heads.items()
            for region, head in sorted(by_region.items())
            if isinstance(head, Head)
        ),
        unreachable=tuple(
            StoreUnknown(region, stream, head.since, head.why)
            for stream, by_region in heads.items()
            for region, head in sorted(by_region.items())
            if isinstance(head, Unknown)
        ),
        forks={stream: found.starts for stream, found in recorded.items()},
        lag=tuple(region for report in seen.reports.values() for region in report.regions),
        loss=loss,
        agents=local.agents,
        weights=dict(traffic.weights) if isinstance(traffic, TrafficState) else {},
        traffic_epoch=traffic.epoch if isinstance(traffic, TrafficState) else traffic,
        checks=(*_checks(seen, heads, traffic, kind, target, plan), *keys),
        right_ended_by=0.0 if seen.holders else max((local.holder_gone_at.get(s, now) for s in outside.streams), default=now),
    )
    return evidence, seen


async def _keys(outside: Outside, target: str) -> tuple[Check, ...]:
    """Whether an epoch of ``target`` could seal what it writes now; nothing where nothing is sealed."""
    reached = {} if outside.seals is None else await outside.seals.reach()
    if not reached:
        return ()
    answering = [region for region, why in reached.items() if not why]
    lacks = tenure_lacks(target, answering, {region: why for region, why in reached.items() if why})
    told = f"the KMS of {len(answering)} of {len(reached)} regions wraps data keys"
    return (Check("target-keys", lacks is None, lacks or told),)


def _loss(
    kind: PlanKind,
    heads: Mapping[str, Head | Unknown],
    forks: Forks,
    report: StreamReport | None,
    local: LocalKnowledge,
    stream: str,
    target: str,
    now: float,
) -> Loss:
    if kind.planned:
        return NO_LOSS
    known = {region: head for region, head in heads.items() if isinstance(head, Head)}
    kept = {tail.agent for tail in (report.unreplicated if report else ()) if local.has_record.get(tail.agent) == tail.last_id}
    return expected_loss(known, forks, report, home=target, right_ended_by=local.holder_gone_at.get(stream, now), kept=kept)


def expected_loss(
    heads: Mapping[str, Head],
    forks: Forks,
    report: StreamReport | None,
    *,
    home: str,
    right_ended_by: float,
    kept: Collection[str],
) -> Loss:
    """What going on from the stores in ``heads`` would lose: the same estimate when a plan is made, compared, and carried out.

    ``right_ended_by``: when the old holder's key had vanished, on that holder's wall clock, which also stamped the records. A
    report that is younger than that contradicts it: the holder was alive then, so the report's own time counts. Its right may
    have run on after its key (``Forks.lent_seconds``), so that is added.
    """
    right_ended_by = max(right_ended_by, report.at if report else 0.0) + max(0.0, forks.lent_seconds)
    if not heads:
        return Loss(False, 0, True, right_ended_by, "no region store answers")
    choice = replication.choose(heads, forks.starts, home=home, epoch=0)
    return lag.estimate(
        lag.LossBasis(
            report=report,
            recovered=replication.recovered(heads, choice, forks.starts),
            unread_sole_ackers=replication.unfenced_sole_ackers(forks.sole_ackers, heads),
            right_ended_by=right_ended_by,
            kept=kept,
        )
    )


def _checks(
    seen: Coordination,
    heads: Mapping[str, Mapping[str, Head | Unknown]],
    traffic: TrafficState | Unknown,
    kind: PlanKind,
    target: str,
    plan: str,
) -> Sequence[Check]:
    authority = seen.authority.value
    answering = {
        region for region in authority.stores if all(isinstance(by_region.get(region), Head) for by_region in heads.values())
    }
    lacks = replication.quorum_lacks(authority.stores, answering)
    alive = [member for member in seen.members if member.region == target]
    prints = {member.fingerprint for member in seen.members}
    barrier = authority.barrier
    epochs = [head.epoch for by_region in heads.values() for head in by_region.values() if isinstance(head, Head)]
    floor = max(epochs, default=0)
    source_alive = bool(seen.holders)
    unheld = sorted(set(heads) - {holder.stream for holder in seen.holders})
    draining = barrier is not None and barrier.plan == plan
    checks = [
        Check("target-is-a-store", target in authority.stores, f"{target}; stores are {', '.join(authority.stores)}"),
        Check("target-is-not-active", target != authority.region or bool(plan), f"the authority is with {authority.region}"),
        Check("target-controllers", bool(alive), f"{len(alive)} live controllers in {target}"),
        Check(
            "target-store",
            target in answering,
            f"the store of {target} {'answers' if target in answering else 'does not answer'}",
        ),
        Check("fence-quorum", lacks is None, lacks or f"{len(answering)} of {len(authority.stores)} stores answer"),
        Check("epoch-floor", floor <= authority.epoch, f"greatest epoch in a store {floor}, in etcd {authority.epoch}"),
        Check("settings-equal", len(prints) <= 1, f"{len(seen.members)} live controllers with {len(prints)} sets of settings"),
        Check(
            "no-other-plan",
            barrier is None or barrier.plan == plan,
            "no barrier stands" if barrier is None else f"plan {barrier.plan} stands before it",
        ),
        Check(
            "traffic-readable",
            True,
            f"zone epoch {traffic.epoch}"
            if isinstance(traffic, TrafficState)
            else f"unknown: {traffic.why}; step route will wait",
        ),
    ]
    if kind.planned:
        drain = f"nobody holds {', '.join(unheld)}: plan a failover" if unheld else "the old holder must drain"
        checks.append(Check("holder-alive", not unheld or draining, "draining for this plan" if draining else drain))
        every = len(answering) == len(authority.stores)
        checks.append(Check("all-stores", every, f"{len(answering)} of {len(authority.stores)} stores answer"))
    else:
        detail = "the old holder is alive: a switchover would lose nothing" if source_alive else "no holder"
        checks.append(Check("holder", True, detail))
    return checks


def require(evidence: Evidence) -> None:
    """Raises Refused naming every failing check."""
    if evidence.failing:
        listed = "; ".join(f"{check.name}: {check.detail}" for check in evidence.failing)
        raise Refused(f"{len(evidence.failing)} checks fail: {listed}", hint="mend these first; `drctl status` shows them")
