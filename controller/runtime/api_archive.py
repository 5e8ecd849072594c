"""Routes about the past: records with their places, points in time. Every controller answers them from its own copy, alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Query, Response

from controller.domain.access import Permit
from controller.domain.model import Kind
from controller.runtime.api_access import Calling, ReadableAgent, permit
from controller.runtime.api_documents import RepairIn, RestoreIn, VerifyIn
from controller.runtime.api_door import answer, named, record_id, region_name
from controller.runtime.archive_documents import MAX_AS_OF, AsOf, CheckpointSeen, Repair, Restored, RestoreItem, Verification
from controller.stream.limits import DEFAULT_LIMITS

if TYPE_CHECKING:
    from controller.runtime.service import ControllerService

AgentName = ReadableAgent
RecordId = Annotated[str, Depends(record_id)]
KindQuery = Annotated[str, Query(max_length=64, description="kind of record")]
Time = Annotated[float, Query(ge=0, lt=1e12, allow_inf_nan=False, description="seconds since 1970")]
RegionName = Annotated[str, Depends(region_name)]
Limit = Annotated[int, Query(ge=1, le=1000)]
Name = Annotated[str, Query(max_length=300)]


def _kind(value: str) -> str:
    return named(value, "kind", DEFAULT_LIMITS.kind_chars)


def archive_routes(service: ControllerService) -> APIRouter:
    """All of them."""
    router = APIRouter(prefix="/v1", tags=["the past"])
    operating = [permit(Permit.OPERATE)]
    _reading(router, service, operating)
    _verifying(router, service, operating)

    @router.post(
        "/restores",
        dependencies=operating,
        response_model=Restored,
        summary="Give agents an earlier state back; the active controller only",
    )
    async def restore(given: RestoreIn, caller: Calling) -> Response:
        items = [RestoreItem(one.agent, one.record, one.newest) for one in given.items]
        found = await service.restorer.restore(
            given.at, given.kind, items, requester=caller.acts_as(given.requester), confirm=given.confirm, force=given.force
        )
        return answer(Restored, found)

    return router


def _reading(router: APIRouter, service: ControllerService, operating: list[Any]) -> None:
    @router.get(
        "/checkpoints",
        dependencies=operating,
        response_model=tuple[CheckpointSeen, ...],
        summary="The newest record of each agent, by name",
    )
    async def newest(kind: KindQuery = Kind.CHECKPOINT, after: Name = "", limit: Limit = 100) -> Response:
        return answer(tuple[CheckpointSeen, ...], service.archive.newest(_kind(kind), after, limit))

    @router.get("/agents/{agent}/checkpoints", response_model=tuple[CheckpointSeen, ...], summary="Records with their places")
    async def checkpoints(
        agent: AgentName,
        kind: Annotated[str | None, Query(max_length=64)] = None,
        before: Annotated[str | None, Query(max_length=300)] = None,
        since: Time | None = None,
        until: Time | None = None,
        limit: Limit = 100,
    ) -> Response:
        found = service.archive.checkpoints(
            agent,
            kind=None if kind is None else _kind(kind),
            before=None if before is None else named(before, "before", DEFAULT_LIMITS.id_chars),
            since=since,
            until=until,
            limit=limit,
        )
        return answer(tuple[CheckpointSeen, ...], found)

    @router.get("/agents/{agent}/checkpoints/{record}", response_model=CheckpointSeen, summary="One record and where it lies")
    async def checkpoint(agent: AgentName, record: RecordId) -> Response:
        return answer(CheckpointSeen, service.archive.checkpoint(agent, record))

    @router.get("/as-of", dependencies=operating, response_model=AsOf, summary="What was newest at a point in time")
    async def as_of(
        at: Time,
        kind: KindQuery = Kind.CHECKPOINT,
        agent: Annotated[tuple[str, ...], Query(max_length=MAX_AS_OF, description="only these agents")] = (),
        after: Name = "",
        limit: Annotated[int, Query(ge=1, le=MAX_AS_OF)] = MAX_AS_OF,
    ) -> Response:
        names = tuple(named(name, "agent", DEFAULT_LIMITS.agent_chars) for name in agent)
        return answer(AsOf, service.archive.as_of(at, _kind(kind), names, after, limit))


def _verifying(router: APIRouter, service: ControllerService, operating: list[Any]) -> None:
    @router.post(
        "/verifications/{region}",
        dependencies=operating,
        response_model=Verification,
        summary="Verify a region's store, or go on with it",
    )
    async def verify(region: RegionName, given: VerifyIn) -> Response:
        return answer(Verification, await service.verifier.start(region, restart=given.restart))

    @router.get(
        "/verifications/{region}",
        dependencies=operating,
        response_model=Verification,
        summary="How far it is, and what was found",
    )
    async def verification(region: RegionName) -> Response:
        return answer(Verification, await service.verifier.state(region))

    @router.post(
        "/verifications/{region}/stop",
        dependencies=operating,
        response_model=Verification,
        summary="Interrupt it; it can go on later",
    )
    async def stop(region: RegionName) -> Response:
        return answer(Verification, await service.verifier.stop(region))

    @router.post(
        "/repairs/{region}",
        dependencies=operating,
        response_model=Repair,
        summary="What can be put right in a region's store, or do it",
    )
    async def repair(region: RegionName, given: RepairIn, caller: Calling) -> Response:
        found = await service.mender.repair(
            region, execute=given.execute, requester=caller.acts_as(given.requester), confirm=given.confirm
        )
        return answer(Repair, found)
