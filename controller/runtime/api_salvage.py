"""Routes about salvage. Every controller lists and reads; the holder of the stream alone discards. Operators only: what was cut
off is agents' work of many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Response

from controller.domain.access import Permit
from controller.runtime.api_access import Calling, permit
from controller.runtime.api_documents import DiscardIn
from controller.runtime.api_door import NO_STORE, answer, named, region_name, salvage_name
from controller.runtime.api_records import OCTETS
from controller.runtime.salvage_documents import Discarded, RegionSalvage, SalvagePage
from controller.stream.limits import DEFAULT_LIMITS

if TYPE_CHECKING:
    from controller.runtime.service import ControllerService

RegionName = Annotated[str, Depends(region_name)]
SalvageName = Annotated[str, Depends(salvage_name)]
MAX_SEQ = 10**16

_BODY_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the whole body",
        "content": {OCTETS: {"schema": {"type": "string", "format": "binary"}}},
    }
}


def salvage_routes(service: ControllerService) -> APIRouter:
    """All of them."""
    router = APIRouter(prefix="/v1/salvage", tags=["salvage"], dependencies=[permit(Permit.OPERATE)])

    @router.get("", response_model=tuple[RegionSalvage, ...], summary="Tails that were cut off, of every region")
    async def everywhere() -> Response:
        return answer(tuple[RegionSalvage, ...], await service.salvager.list(None))

    @router.get("/{region}", response_model=RegionSalvage, summary="Tails that were cut off one region's store")
    async def of_region(region: RegionName) -> Response:
        (found,) = await service.salvager.list(region)
        return answer(RegionSalvage, found)

    @router.get("/{region}/{salvage}", response_model=SalvagePage, summary="The records of one, in pages")
    async def page(
        region: RegionName,
        salvage: SalvageName,
        after: Annotated[int, Query(ge=0, le=MAX_SEQ, description="go on after this segment")] = 0,
        agent: Annotated[str | None, Query(max_length=300, description="only its records")] = None,
    ) -> Response:
        one = None if agent is None else named(agent, "agent", DEFAULT_LIMITS.agent_chars)
        return answer(SalvagePage, await service.salvager.page(region, salvage, after, one))

    @router.get(
        "/{region}/{salvage}/bodies/{seq}/{ordinal}",
        responses=_BODY_ANSWER,
        response_class=Response,
        summary="The body of one record",
    )
    async def body(
        region: RegionName,
        salvage: SalvageName,
        seq: Annotated[int, Path(ge=1, le=MAX_SEQ)],
        ordinal: Annotated[int, Path(ge=0, lt=2**32)],
    ) -> Response:
        return Response(await service.salvager.body(region, salvage, seq, ordinal), 200, NO_STORE, OCTETS)

    @router.post(
        "/{region}/{salvage}/discard", response_model=Discarded, summary="What would be lost, or let go of it; the holder only"
    )
    async def discard(region: RegionName, salvage: SalvageName, given: DiscardIn, caller: Calling) -> Response:
        found = await service.salvager.discard(
            region,
            salvage,
            execute=given.execute,
            confirm=given.confirm,
            requester=caller.acts_as(given.requester),
            digest=given.digest,
            even_unexported=given.even_unexported,
        )
        return answer(Discarded, found)

    return router
