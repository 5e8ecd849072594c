"""The past of a region's copy: what was there, and what was newest at a point in time. Answered by every controller, alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from controller.domain.fleet import Health
from controller.errors import NotFound, Refused
from controller.runtime.archive_documents import AgentThen, AsOf, CheckpointSeen
from controller.runtime.fleet import FleetManager
from controller.stream.limits import RESTORED, UPTO
from controller.stream.past import Past, Placed, Then
from controller.stream.view import View


class Archive:
    """Implements ``ArchiveService`` on the view of the instance's own region."""

    def __init__(self, group: str, region: str, view: View, streams: Callable[[], Sequence[str]], fleet: FleetManager) -> None:
        self._group = group
        self._region = region
        self._past = Past(view)
        self._streams = streams
        self._fleet = fleet

    def newest(self, kind: str, after: str, limit: int) -> tuple[CheckpointSeen, ...]:
        return tuple(seen(found) for found in self._past.newest(kind, after, limit))

    def checkpoints(
        self, agent: str, *, kind: str | None, before: str | None, since: float | None, until: float | None, limit: int
    ) -> tuple[CheckpointSeen, ...]:
        found = self._past.records(agent, kind=kind, before=before, since=since, until=until, limit=limit)
        return tuple(seen(placed) for placed in found)

    def checkpoint(self, agent: str, record_id: str) -> CheckpointSeen:
        found = self._past.placed(agent, record_id)
        if found is None:
            raise NotFound(
                f"agent {agent!a} has no record {record_id!a} in the copy of {self._region}",
                hint=f"drctl checkpoints list {agent!a} shows what there is",
            )
        return seen(found)

    def as_of(self, at: float, kind: str, agents: tuple[str, ...], after: str, limit: int) -> AsOf:
        begins_at = max((self._past.begins_at(stream) for stream in self._streams()), default=0.0)
        names = agents or self._past.named(kind, after, limit)
        if not agents and at < begins_at:
            raise Refused(
                f"the copy of {self._region} begins at {_utc(begins_at)}, and {_utc(at)} is before that",
                hint=f"the earliest time for the whole group is {_utc(begins_at)}; name single agents to reach further back",
            )
        seen_then = tuple(self._agent(self._past.then(name, kind, at), at) for name in names)
        more = names[-1] if not agents and len(names) == limit else ""
        return AsOf(self._group, self._region, at, kind, begins_at, seen_then, more)

    def _agent(self, then: Then, at: float) -> AgentThen:
        begins_at = self._past.begins_at(then.stream)
        earliest = then.first_at if begins_at else 0.0
        host, _ = self._fleet.host_of(then.agent)
        running = bool(host) and self._fleet.hosts().get(host, Health.FAILED) is not Health.FAILED
        state, why = _judge(then, at, begins_at)
        return AgentThen(
            agent=then.agent,
            state=state,
            why=why,
            found=None if then.found is None else seen(then.found),
            upto=then.upto,
            newest_id=then.newest.record.id,
            newest_at=then.newest.record.received_at,
            newer=then.newer,
            earliest_at=earliest,
            host=host,
            running=running,
        )


def _judge(then: Then, at: float, begins_at: float) -> tuple[str, str]:
    if then.found is None:
        if begins_at:
            return "gone", f"the oldest record that this copy holds of it came at {_utc(then.first_at)}"
        return "none", f"its first record came at {_utc(then.first_at)}"
    meta = then.newest.record.meta
    if then.newer and (meta.get(RESTORED), meta.get(UPTO)) == (then.found.record.id, then.upto):
        return "restored", "this point was restored already, and nothing came after it"
    if then.newer == 0:
        return "unchanged", f"nothing came after {_utc(at)}"
    if then.found.lost:
        return "gone", "its body stands on records that this copy no longer has"
    return "found", ""


def seen(placed: Placed) -> CheckpointSeen:
    """The document of one placed record."""
    record = placed.record
    return CheckpointSeen(
        agent=record.agent,
        id=record.id,
        kind=record.kind,
        sha256=record.sha256,
        size=record.size,
        parent=record.parent,
        created_at=record.created_at,
        received_at=record.received_at,
        copies=record.copies,
        attempt=record.attempt,
        stream=placed.stream,
        seq=placed.seq,
        ordinal=placed.ordinal,
        key="" if placed.ref is None else placed.ref.key,
        encoding=placed.encoding,
        depth=placed.depth,
        verified=placed.verified,
        meta=record.meta,
    )


def _utc(at: float) -> str:
    try:
        return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OverflowError, ValueError, OSError):
        return f"{at} s since 1970"
