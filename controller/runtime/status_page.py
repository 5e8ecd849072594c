"""The page at ``/``: one answer for somebody who was just woken up. Self-contained, refreshes by itself, loads nothing."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from controller.domain.model import Unknown
from controller.domain.text import visible
from controller.errors import DrError
from controller.runtime import wording
from controller.runtime.service import ControllerService, PlanDocument, Status

REFRESH_SECONDS = 3
MAX_PLANS = 5
MAX_INCIDENTS = 20


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Everything that is printed passes through here, also what nobody thought of; markup is escaped after it.
        finalize=lambda value: visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value,
    )
    environment.globals.update(w=wording)
    environment.tests["unknown"] = lambda value: isinstance(value, Unknown)
    return environment.get_template("status.html")


async def render_status_page(service: ControllerService, now: float) -> str:
    """The page. When the whole picture cannot be had, it says so and shows what this instance knows of itself."""
    status: Status | None = None
    plans: list[PlanDocument] = []
    problem: DrError | None = None
    try:
        status = await service.status()
        plans = [await service.plan(record.plan.id) for record in status.plans[:MAX_PLANS]]
    except DrError as error:
        problem = error
    ready, why_ready = service.ready()
    return _template().render(
        status=status,
        plans=plans,
        problem=problem,
        now=now,
        region=service.region,
        instance=service.instance,
        role=service.role.value,
        ready=ready,
        why_ready=why_ready,
        refresh=REFRESH_SECONDS,
        max_incidents=MAX_INCIDENTS,
        bad=_bad(status),
    )


def _bad(status: Status | None) -> str:
    """``bad``, ``warn`` or ``good``: the colour of the sentence. Unknown is never good."""
    if status is None or status.incidents or status.failsafe_since:
        return "bad"
    if isinstance(status.exposure_seconds, Unknown) or isinstance(status.authority, Unknown) or status.plans:
        return "warn"
    return "warn" if status.warnings or status.exposure_seconds > status.rpo_seconds else "good"
