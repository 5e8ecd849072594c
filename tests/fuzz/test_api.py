"""The HTTP API against requests made from its own OpenAPI document, right and wrong ones, and sequences of them (schemathesis).

What is checked for every answer: no status that the document does not name and no 5xx, always the documented form and media
type, headers as documented, nothing accepted that the document forbids. (That everything is accepted which its schema allows is
not: rules such as "no direction marks in a name" are said in words.)
"""

from __future__ import annotations

import contextlib
import importlib
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

from controller.domain.model import Role
from controller.runtime.api import create_app
from tests.support.fake_service import FakeService

if "CI" in os.environ:
    import schemathesis
else:
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: make setup")

GenerationMode = schemathesis.GenerationMode
positive_data_acceptance = importlib.import_module("schemathesis.specs.openapi.checks").positive_data_acceptance

EXAMPLES = 5000 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else 8
"""For each of some 30 operations, right and wrong requests each."""


def _schema() -> Any:
    service = FakeService()
    service.role, service.right_seconds = Role.ACTIVE, 8.0
    app = create_app(service, clock=service.clock)
    return schemathesis.openapi.from_asgi("/openapi.json", app)


OPERATIONS = {found.ok().label: found.ok() for found in _schema().get_all_operations()}


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", OPERATIONS)
def test_every_request_gets_an_answer_that_the_document_foresees(label: str, mode: Any) -> None:
    strategy = OPERATIONS[label].as_strategy(generation_mode=mode)

    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), deadline=None, database=None)
    @given(case=strategy)
    def holds(case: Any) -> None:
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    with contextlib.suppress(Unsatisfiable):  # nothing that this operation takes can be wrong
        holds()
