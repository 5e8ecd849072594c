"""What the HTTP API takes in (pydantic, strict), and its own documents. No web framework here: ``drctl`` reads it too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

from controller.domain.model import StreamReport, Unknown
from controller.runtime.archive_documents import MAX_RESTORE
from controller.runtime.service import RegionStatus, Status
from controller.stream.limits import DEFAULT_LIMITS, name_problem

MAX_REASON_CHARS = 2000
MAX_SIGNATURE_CHARS = 16 * 1024
MAX_REGION_CHARS = 64
MAX_SALVAGE_CHARS = 300
MAX_HOST_AGENTS = 100_000
MAX_SPEC_DEPTH = 64


def check_name(value: str, what: str = "name", limit: int = DEFAULT_LIMITS.agent_chars) -> str:
    """The name itself. Raises ValueError when it is empty, too long or contains control or direction characters."""
    problem = name_problem(what, value, limit)
    if problem:
        raise ValueError(problem)
    return value


def _check_reason(value: str) -> str:
    return check_name(value, "reason", MAX_REASON_CHARS) if value else value


def _check_time(value: float) -> float:
    if not math.isfinite(value) or value < 0:
        raise ValueError("must be a time in seconds since 1970")
    return value


def _check_spec(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    level: list[JsonValue] = [value]
    for _ in range(MAX_SPEC_DEPTH):
        level = [
            inner
            for item in level
            if isinstance(item, (dict, list))
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return value
        if any(isinstance(item, float) and not math.isfinite(item) for item in level):
            raise ValueError("must not contain NaN or infinity")
    raise ValueError(f"must not be nested deeper than {MAX_SPEC_DEPTH}")


Name = Annotated[str, AfterValidator(check_name)]
Region = Annotated[str, Field(max_length=MAX_REGION_CHARS), AfterValidator(check_name)]
Reason = Annotated[str, AfterValidator(_check_reason)]
WallTime = Annotated[float, AfterValidator(_check_time)]


class Input(BaseModel):
    """Base of all request bodies: unknown fields and look-alike types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class PlanIn(Input):
    """``POST /v1/plans``. ``requester``: by the name under which they would approve; they do not count as an approver."""

    kind: Literal["failover", "switchover", "failback", "drill"]
    to: Region
    requester: Name
    reason: Reason = ""
    break_glass: bool = False


class ApprovalIn(Input):
    """``POST /v1/plans/{plan}/approvals``. ``digest``: the one that was signed; without it the plan's own is taken
    (the signature covers it in either case)."""

    principal: Name
    decision: Literal["approve", "refuse"]
    expires_at: WallTime
    signature: Annotated[str, Field(min_length=1, max_length=MAX_SIGNATURE_CHARS)]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None


class ExecuteIn(Input):
    """``POST /v1/plans/{plan}/execute``. ``confirm``: the target region's name, typed again."""

    requester: Name
    confirm: Region


class AbortIn(Input):
    """``POST /v1/plans/{plan}/abort``."""

    requester: Name
    reason: Reason = ""


class VerifyIn(Input):
    """``POST /v1/verifications/{region}``. ``restart``: from the beginning, also when one was interrupted."""

    restart: bool = False


class RepairIn(Input):
    """``POST /v1/repairs/{region}``. ``execute``: do it; needs ``confirm``, the region's name typed again."""

    execute: bool = False
    requester: Reason = ""
    confirm: Reason = ""


class DiscardIn(Input):
    """``POST /v1/salvage/{region}/{salvage}/discard``. ``execute``: do it; needs ``confirm``, the region's name typed again.
    ``digest``: of the export that was made; ``even_unexported``: why there is none."""

    execute: bool = False
    requester: Reason = ""
    confirm: Reason = ""
    digest: Annotated[str, Field(max_length=64)] = ""
    even_unexported: Reason = ""


class RestoreOne(Input):
    """One agent as the dry run showed it."""

    agent: Name
    record: Annotated[str, Field(min_length=1, max_length=DEFAULT_LIMITS.id_chars)]
    newest: Annotated[str, Field(min_length=1, max_length=DEFAULT_LIMITS.id_chars)]


class RestoreIn(Input):
    """``POST /v1/restores``. ``confirm``: the group's name, typed again."""

    at: WallTime
    kind: Annotated[str, Field(min_length=1, max_length=DEFAULT_LIMITS.kind_chars)]
    items: Annotated[tuple[RestoreOne, ...], Field(min_length=1, max_length=MAX_RESTORE, strict=False)]
    requester: Reason = ""
    confirm: Reason = ""
    force: bool = False


class TaskIn(Input):
    """``POST /v1/tasks``."""

    agent: Name
    spec: Annotated[dict[str, JsonValue], AfterValidator(_check_spec)]


class RunningIn(Input):
    """One agent that a host runs."""

    agent: Name
    attempt: Annotated[int, Field(ge=0, lt=2**63)]


class BeatIn(Input):
    """``POST /v1/hosts/{host}/beat``."""

    capacity: Annotated[int, Field(ge=0, le=MAX_HOST_AGENTS)]
    agents: Annotated[tuple[RunningIn, ...], Field(max_length=MAX_HOST_AGENTS, strict=False)] = ()


class ErrorBody(BaseModel):
    """What went wrong, and the one thing to do or to type next."""

    code: str
    message: str
    hint: str
    exit_code: int
    active: str | None = None


class ErrorDocument(BaseModel):
    """Every answer that is not a success."""

    error: ErrorBody


@dataclass(frozen=True, slots=True)
class LagDocument:
    """``GET /v1/lag``: the part of the status that is asked for often."""

    group: str
    at: float
    rpo_seconds: float
    rpo_policy: str
    exposure_seconds: float | Unknown
    exposure_records: int | Unknown
    regions: tuple[RegionStatus, ...]
    reports: tuple[StreamReport, ...]

    @classmethod
    def of(cls, status: Status) -> LagDocument:
        return cls(
            status.group,
            status.at,
            status.rpo_seconds,
            status.rpo_policy,
            status.exposure_seconds,
            status.exposure_records,
            status.regions,
            status.reports,
        )


@dataclass(frozen=True, slots=True)
class Probe:
    """Answer of ``/livez``, ``/readyz``, ``/active``."""

    ok: bool
    region: str
    instance: str
    role: str
    reason: str
