"""What holds for all tests: what kind a test is and what its machine can do is said by markers, not by its folder."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

# Two noisy cores: a slow example says nothing about the code. In CI the same examples come every time, so that a red run
# is red because of its change; locally they are new each time. HYPOTHESIS_PROFILE=thorough looks further.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=5000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))


class Places(LoadScopeScheduling):
    """Which tests share a worker. (``--dist loadgroup`` of pytest-xdist 3.8 does nothing under pytest 9.)

    Whole labs never run two at a time: one is 22 processes. Tests over a stand-in or an etcd that their module starts stay
    together, so that it is started once. All others go to whoever is free.
    """

    def _split_scope(self, nodeid: str) -> str:
        kind = _kind(nodeid.split("::", maxsplit=1)[0])
        return nodeid if kind == "any" else kind

    def remove_node(self, node: Any) -> str | None:
        """Of a worker that died, only what it left is handed on. (pytest-xdist 3.8 hands on all of it; others are then given
        units with nothing to do, never report an end, and the run hangs with its last tests.)"""
        units = self.assigned_work[node]
        for scope in [scope for scope, unit in units.items() if all(unit.values())]:
            del units[scope]
        return super().remove_node(node)


@functools.cache
def _kind(path: str) -> str:
    text = (Path(__file__).parents[1] / path).read_text()
    if "pytest.mark.lab" in text:
        return "lab"
    return path if "pytest.mark.aws" in text or "pytest.mark.etcd" in text else "any"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return Places(config, log)
