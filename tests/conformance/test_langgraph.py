"""LangGraph's public conformance suite for checkpoint savers, over real HTTP against a real controller."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest

pytest.importorskip("langgraph.checkpoint.conformance", reason="langgraph-checkpoint-conformance is not installed")

from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.conformance.capabilities import ALL_CAPABILITIES, Capability
from langgraph.checkpoint.conformance.report import CapabilityReport

from controller.agent import AsyncCheckpoints, Checkpoints
from controller.agent.langgraph import ReplicatedSaver
from tests.support.served import ServedController

CHECKS = {
    Capability.PUT: 17,
    Capability.PUT_WRITES: 10,
    Capability.GET_TUPLE: 10,
    Capability.LIST: 16,
    Capability.DELETE_THREAD: 5,
    Capability.DELETE_FOR_RUNS: 7,
    Capability.COPY_THREAD: 8,
    Capability.PRUNE: 8,
}
"""Checks per capability in version 0.0.2: 58 base, 23 extended. A smaller number would mean that some did not run."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedController]:
    with ServedController(tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.mark.timeout(300)
@pytest.mark.parametrize("client", ["asynchronous", "blocking"])
async def test_the_saver_passes_every_check_of_the_public_conformance_suite(served: ServedController, client: str) -> None:
    @checkpointer_test(name="ReplicatedSaver")
    async def saver() -> AsyncGenerator[Any, None]:
        if client == "asynchronous":
            async with AsyncCheckpoints(served.urls) as one:
                yield ReplicatedSaver(one)
        else:
            with Checkpoints(served.urls) as other:
                yield ReplicatedSaver(other)

    assert_complete(await validate(saver))


def assert_complete(report: CapabilityReport) -> None:
    """Every check of every capability ran and passed."""
    assert {name: result.failures for name, result in report.results.items() if result.failures} == {}
    assert report.passed_all()
    assert {name for name, result in report.results.items() if result.detected} == {item.value for item in ALL_CAPABILITIES}
    assert {Capability(name): result.tests_passed >= CHECKS[Capability(name)] for name, result in report.results.items()} == (
        dict.fromkeys(CHECKS, True)
    )
