"""What holds for all tests: what kind a test is and what its machine can do is said by markers, not by its folder."""

from __future__ import annotations

import os

import hypothesis
import pytest

# Two noisy cores: a slow example says nothing about the code. In CI the same examples come every time, so that a red run
# is red because of its change; locally they are new each time. HYPOTHESIS_PROFILE=thorough looks further.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=5000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Which tests share a worker (`make test` has two, pytest-xdist's `--dist loadgroup`); all others go to whoever is free.

    Whole labs never run two at a time: one is 22 processes. Tests over a stand-in or an etcd that their module starts stay
    together, so that it is started once. A module whose tests take minutes says otherwise with an ``xdist_group`` of its own.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            if item.get_closest_marker("lab"):
                item.add_marker(pytest.mark.xdist_group("lab"))
            elif item.get_closest_marker("aws") or item.get_closest_marker("etcd"):
                item.add_marker(pytest.mark.xdist_group(item.path.stem))
