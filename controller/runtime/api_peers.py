"""The routes that only controllers use, of the same region but for ``/witness``. What was handed over has a route of its own,
so that nothing is handed on a second time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Path, Request, Response

from controller.domain.access import Permit
from controller.domain.failsafe import Witness
from controller.domain.model import Ack, Frame, IngestAnswer
from controller.errors import Forbidden
from controller.runtime.api_access import Calling, Entrance, permit
from controller.runtime.api_door import answer, named
from controller.runtime.api_records import frames_in

if TYPE_CHECKING:
    from controller.runtime.service import ControllerService


async def frames_of(request: Request) -> Sequence[Frame]:
    """What another instance sends. Raises BadRequest, Corrupt."""
    return await frames_in(request.headers.get("content-type", ""), await request.body())


Epoch = Annotated[int, Path(ge=1, lt=2**63)]


def peer_routes(service: ControllerService, entrance: Entrance | None = None) -> APIRouter:
    """All of them."""
    router = APIRouter(prefix="/v1/peers", tags=["instances"], dependencies=[permit(Permit.PEER)])

    @router.post(
        "/records", response_model=IngestAnswer, summary="Records that another instance received for streams held here"
    )
    async def hand_over(request: Request) -> Response:
        return answer(IngestAnswer, await service.peer_ingest(await frames_of(request)))

    @router.post(
        "/{region}/{instance}/{epoch}/records",
        response_model=tuple[Ack, ...],
        summary="Tasks and assignments of the lead's holder",
    )
    async def write(region: str, instance: str, epoch: Epoch, request: Request, caller: Calling) -> Response:
        who = named(region, "region", 64), named(instance, "instance", 200)
        if (
            entrance is not None
            and caller.name.startswith("drctl://")
            and caller.name != f"drctl://{entrance.group}/{'/'.join(who)}"
        ):
            raise Forbidden(f"{caller.name} speaks for {'/'.join(who)}", hint="each controller speaks for itself")
        return answer(tuple[Ack, ...], await service.peer_write(*who, epoch, await frames_of(request)))

    @router.get(
        "/positions", response_model=dict[str, int], summary="Streams that are served here, and the last segment of each"
    )
    async def positions() -> Response:
        return answer(dict[str, int], service.peer_positions())

    @router.get("/witness", response_model=Witness, summary="What this instance sees of etcd, for a holder of another region")
    async def witness() -> Response:
        return answer(Witness, service.witness())

    return router
