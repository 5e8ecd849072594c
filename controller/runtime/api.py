"""The HTTP API of one controller: routes for agents, people and probes. It knows ``ControllerService`` and nothing below.

Errors have one form, ``{"error": {"code", "message", "hint", "exit_code"}}``, and the status codes of ``controller.errors``.
Answers are serialised by cached pydantic adapters straight to bytes; the OpenAPI document is made from the same types.
Names in paths (agents, hosts, plans, ids) are percent-encoded, ``/`` too: routing happens before they are decoded.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from controller import __version__
from controller.domain.access import Permit
from controller.domain.model import AgentSeen, Beat, BeatAnswer, IngestAnswer, Kind, Member, Record, Role, Running
from controller.domain.promotion import PlanRecord
from controller.domain.text import visible
from controller.errors import DrError, Refused, Unavailable
from controller.ports import Clock
from controller.runtime.api_access import (
    Calling,
    Entrance,
    Guard,
    OwnHost,
    ReadableAgent,
    caller_of,
    permit,
    require,
    require_agent,
    require_agents,
    require_list,
)
from controller.runtime.api_archive import archive_routes
from controller.runtime.api_documents import (
    AbortIn,
    ApprovalIn,
    BeatIn,
    ErrorDocument,
    ExecuteIn,
    LagDocument,
    PlanIn,
    Probe,
    TaskIn,
)
from controller.runtime.api_door import (
    JSON,
    NO_STORE,
    BadRequest,
    Door,
    TooLarge,
    error_response,
    named,
    plan_id,
    record_id,
)
from controller.runtime.api_door import adapter as _adapter
from controller.runtime.api_door import answer as _answer
from controller.runtime.api_peers import peer_routes
from controller.runtime.api_records import IN_FLIGHT_MAX_BYTES, OCTETS, RecordsFront, answer_records
from controller.runtime.api_salvage import salvage_routes
from controller.runtime.service import (
    AgentPage,
    ApprovalRequest,
    AuditEntry,
    ControllerService,
    Incident,
    JournalEntry,
    PlanDocument,
    PlanRequest,
    Status,
)
from controller.runtime.status_page import render_status_page
from controller.stream.limits import DEFAULT_LIMITS

MAX_HEADER_BYTES = 32 * 1024
"""HTTP clients refuse answers with more than about 64 KiB of headers; a record's meta may be larger."""


AgentName = ReadableAgent
HostName = OwnHost
PlanId = Annotated[str, Depends(plan_id)]
RecordId = Annotated[str, Depends(record_id)]
Limit = Annotated[int, Query(ge=1, le=1000)]


# ----------------------------------------------------------------------------------------------------------- agents' routes


def _record_answer(found: tuple[Record, bytes]) -> Response:
    record, body = found
    document = _adapter(Record).dump_python(record, mode="json")
    header = json.dumps(document, ensure_ascii=True, separators=(",", ":"))
    headers = {**NO_STORE, "X-DR-Record": header}
    if len(header) > MAX_HEADER_BYTES:
        headers["X-DR-Record"] = json.dumps({**document, "meta": {}}, ensure_ascii=True, separators=(",", ":"))
        headers["X-DR-Meta"] = "omitted"
    return Response(body, 200, headers, OCTETS)


_RECORD_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the whole body",
        "content": {OCTETS: {"schema": {"type": "string", "format": "binary"}}},
        "headers": {
            "X-DR-Record": {"description": "the record without its body, as ASCII JSON", "schema": {"type": "string"}},
            "X-DR-Meta": {"description": "`omitted` when `meta` was too large for a header", "schema": {"type": "string"}},
        },
    }
}
_INGEST_BODY = {
    "requestBody": {
        "required": True,
        "content": {OCTETS: {"schema": {"type": "string", "format": "binary", "description": "frames, see stream/segment.py"}}},
    }
}


Fresh = Annotated[bool, Query(description="all that was acknowledged so far: a standby's copy may be behind")]


def _agent_routes(service: ControllerService) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["agents"])

    @router.post("/records", response_model=IngestAnswer, openapi_extra=_INGEST_BODY, summary="Put records")
    async def put_records(request: Request) -> Response:
        """Answered in front of the framework (``api_records``); here for the API document, and the same."""
        content_type = request.headers.get("content-type", "")
        document = await answer_records(service, content_type, await request.body(), caller_of(request.scope))
        return Response(document, 200, NO_STORE, JSON)

    @router.get("/agents", response_model=tuple[AgentSeen, ...], summary="Agents in this region's copy")
    async def agents(
        caller: Calling,
        limit: Limit = 1000,
        after: Annotated[str, Query(max_length=200, description="by name: only those after this one")] = "",
        prefix: Annotated[str, Query(max_length=200, description="only names that begin so")] = "",
        sort: Annotated[Literal["name", "newest"], Query(description="`newest`: who wrote last, one page")] = "name",
        fresh: Fresh = False,
    ) -> Response:
        require_list(caller, prefix)
        if fresh:
            await service.settle()
        return _answer(tuple[AgentSeen, ...], service.agents(AgentPage(limit, after, prefix, sort == "newest")))

    @router.get("/agents/{agent}/latest", responses=_RECORD_ANSWER, response_class=Response, summary="Newest record")
    async def latest(
        agent: AgentName, kind: Annotated[str, Query(max_length=64)] = Kind.CHECKPOINT, fresh: Fresh = False
    ) -> Response:
        if fresh:
            await service.settle(agent)
        return _record_answer(await service.latest(agent, named(kind, "kind", DEFAULT_LIMITS.kind_chars)))

    @router.get("/agents/{agent}/records", response_model=tuple[Record, ...], summary="Records, newest first")
    async def records(
        agent: AgentName,
        limit: Limit = 100,
        before: Annotated[str | None, Query(max_length=300)] = None,
        fresh: Fresh = False,
    ) -> Response:
        if fresh:
            await service.settle(agent)
        older = None if before is None else named(before, "before", DEFAULT_LIMITS.id_chars)
        return _answer(tuple[Record, ...], service.records(agent, limit, older))

    @router.get("/agents/{agent}/records/{record}", responses=_RECORD_ANSWER, response_class=Response, summary="One record")
    async def read(agent: AgentName, record: RecordId, fresh: Fresh = False) -> Response:
        if fresh:
            await service.settle(agent)
        return _record_answer(await service.read(agent, record))

    @router.post("/tasks", response_model=IngestAnswer, summary="Give an agent a task")
    async def create_task(task: TaskIn, caller: Calling) -> Response:
        require(caller, Permit.TASK)
        require_agent(caller, task.agent)
        return _answer(IngestAnswer, await service.create_task(task.agent, task.spec))

    @router.post("/hosts/{host}/beat", response_model=BeatAnswer, summary="A host's heartbeat; answers with its assignments")
    async def beat(host: HostName, given: BeatIn, caller: Calling) -> Response:
        require_agents(caller, (one.agent for one in given.agents))
        running = tuple(Running(agent.agent, agent.attempt) for agent in given.agents)
        return _answer(BeatAnswer, await service.beat(Beat(host, given.capacity, running)))

    return router


# ---------------------------------------------------------------------------------------------------------- people's routes


def _reading_routes(service: ControllerService) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["people"], dependencies=[permit(Permit.STATUS)])

    @router.get("/status", response_model=Status, summary="What is going on, and what to type next")
    async def status() -> Response:
        return _answer(Status, await service.status())

    @router.get("/lag", response_model=LagDocument, summary="How far each region is behind")
    async def lag() -> Response:
        return _answer(LagDocument, LagDocument.of(await service.status()))

    @router.get("/members", response_model=tuple[Member, ...], summary="Live controllers")
    async def members() -> Response:
        return _answer(tuple[Member, ...], await service.members())

    @router.get("/incidents", response_model=tuple[Incident, ...], summary="Open incidents")
    async def incidents(include_closed: bool = False) -> Response:
        return _answer(tuple[Incident, ...], await service.incidents(include_closed))

    @router.get("/audit", response_model=tuple[AuditEntry, ...], summary="The hash-chained record of decisions")
    async def audit(after: Annotated[int, Query(ge=0, lt=2**63)] = 0, limit: Limit = 200) -> Response:
        return _answer(tuple[AuditEntry, ...], await service.audit(after, limit))

    return router


def _plan_routes(service: ControllerService) -> APIRouter:
    router = APIRouter(prefix="/v1/plans", tags=["people"])
    looking, changing = [permit(Permit.STATUS)], [permit(Permit.OPERATE)]

    @router.get("", dependencies=looking, response_model=tuple[PlanRecord, ...], summary="All plans")
    async def plans() -> Response:
        return _answer(tuple[PlanRecord, ...], await service.plans())

    @router.post("", dependencies=changing, response_model=PlanDocument, status_code=201, summary="Make a plan; nothing moves")
    async def create(given: PlanIn, caller: Calling) -> Response:
        if given.break_glass and not given.reason.strip():
            raise Refused("a break-glass plan needs a stated reason", hint="say why in `reason` (--reason)")
        request = PlanRequest(given.kind, given.to, caller.acts_as(given.requester), given.reason, given.break_glass)
        return _answer(PlanDocument, await service.create_plan(request), 201)

    @router.get("/{plan}", dependencies=looking, response_model=PlanDocument, summary="A plan with its approvals and journal")
    async def show(plan: PlanId) -> Response:
        return _answer(PlanDocument, await service.plan(plan))

    @router.get(
        "/{plan}/journal", dependencies=looking, response_model=tuple[JournalEntry, ...], summary="The steps of a promotion"
    )
    async def journal(plan: PlanId) -> Response:
        return _answer(tuple[JournalEntry, ...], (await service.plan(plan)).journal)

    @router.post(
        "/{plan}/approvals", dependencies=changing, response_model=PlanDocument, summary="A signed decision about a plan"
    )
    async def approve(plan: PlanId, given: ApprovalIn, caller: Calling) -> Response:
        digest = given.digest or (await service.plan(plan)).record.digest
        request = ApprovalRequest(given.principal, given.decision, given.expires_at, given.signature, digest, caller.name)
        return _answer(PlanDocument, await service.approve(plan, request))

    @router.post("/{plan}/execute", dependencies=changing, response_model=PlanDocument, summary="Run an approved plan")
    async def execute(plan: PlanId, given: ExecuteIn, caller: Calling) -> Response:
        return _answer(PlanDocument, await service.execute(plan, caller.acts_as(given.requester), given.confirm))

    @router.post(
        "/{plan}/abort", dependencies=changing, response_model=PlanDocument, summary="End a plan that has not been authorized"
    )
    async def abort(plan: PlanId, given: AbortIn, caller: Calling) -> Response:
        return _answer(PlanDocument, await service.abort(plan, caller.acts_as(given.requester), given.reason))

    return router


# --------------------------------------------------------------------------------------------------------- probes and the page


def _probe_routes(service: ControllerService, clock: Clock, *, open_metrics: bool) -> APIRouter:
    router = APIRouter(tags=["probes"])
    watched = [] if open_metrics else [permit(Permit.STATUS)]

    def probe(ok: bool, reason: str) -> Response:
        answer = Probe(ok, service.region, service.instance, service.role.value, reason)
        return _answer(Probe, answer, 200 if ok else 503)

    @router.get("/livez", response_model=Probe, summary="The process answers")
    async def livez() -> Response:
        return probe(True, "the process answers")

    @router.get("/readyz", response_model=Probe, summary="This instance does its part")
    async def readyz() -> Response:
        return probe(*service.ready())

    @router.get("/active", response_model=Probe, summary="200 only on the holder, while it may act")
    async def active() -> Response:
        if service.role is not Role.ACTIVE:
            return probe(False, f"this instance is {service.role.value}")
        if not service.may_act():
            return probe(False, "the right of this instance to act has run out")
        return probe(True, "this instance is the holder and may act")

    @router.get(
        "/metrics",
        dependencies=watched,
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}},
        summary="Prometheus",
    )
    async def metrics() -> Response:
        return Response(service.metrics(), 200, NO_STORE, "text/plain; version=0.0.4; charset=utf-8")

    @router.get(
        "/",
        dependencies=[permit(Permit.STATUS)],
        response_class=Response,
        responses={200: {"content": {"text/html": {}}}},
        summary="Status page",
    )
    async def page() -> Response:
        text = await render_status_page(service, clock.wall())
        headers = {
            **NO_STORE,
            "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        return Response(text, 200, headers, "text/html; charset=utf-8")

    return router


# ------------------------------------------------------------------------------------------------------------------- errors


def _where(parts: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in parts if part != "body") or "body"


async def _on_dr_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, DrError)
    return error_response(error)


async def _on_invalid(_request: Request, error: Exception) -> Response:
    """Names each field and its rule, never what was sent."""
    assert isinstance(error, RequestValidationError)
    found = [f"{visible(_where(item['loc']), 200)}: {visible(item['msg'], 400)}" for item in error.errors()[:10]]
    return error_response(BadRequest("; ".join(found), hint="see /openapi.json for what this request takes"))


async def _on_http(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 413:
        return error_response(TooLarge("the request body is too large", hint="send less in one request"))
    if error.status_code == 503:
        busy = "too many large requests are under way"
        return error_response(Unavailable(busy, hint="slow down and send the same again", retry_after_seconds=0.5))
    words = {404: "there is nothing at this path", 405: "this path does not take this method"}
    message = words.get(error.status_code, "the request cannot be read")
    return error_response(BadRequest(message, hint="see /openapi.json"), error.status_code)


async def _on_bug(_request: Request, _error_seen: Exception) -> Response:
    """Nothing of the exception is shown; the server's log has it (the framework raises it again after this answer)."""
    return error_response(
        DrError("the controller met an error that it did not foresee", hint="look at the controller's log and report it")
    )


def create_app(
    service: ControllerService,
    *,
    clock: Clock,
    in_flight_max_bytes: int = IN_FLIGHT_MAX_BYTES,
    entrance: Entrance | None = None,
) -> FastAPI:
    """The application for one controller. ``clock`` tells the status page the time; ``entrance`` who calls (None: nobody is
    asked)."""
    app = FastAPI(
        title="agent-dr controller",
        version=__version__,
        docs_url=None,  # it would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        responses={"default": {"model": ErrorDocument, "description": "an error with a hint"}},
    )
    app.add_middleware(Door)
    app.add_middleware(RecordsFront, service=service, in_flight_max_bytes=in_flight_max_bytes)
    if entrance is not None:
        app.add_middleware(Guard, entrance=entrance)  # the last one added is the first one asked
    app.add_exception_handler(DrError, _on_dr_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_bug)
    for router in (
        _agent_routes(service),
        peer_routes(service, entrance),
        archive_routes(service),
        salvage_routes(service),
        _reading_routes(service),
        _plan_routes(service),
        _probe_routes(service, clock, open_metrics=entrance is None or entrance.open_metrics),
    ):
        app.include_router(router)
    return app
