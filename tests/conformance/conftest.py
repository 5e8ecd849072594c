"""One running lab for all tests here that need one."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from tests.support.running_lab import RunningLab

OFFSET = 20000 + random.Random(os.getpid()).randrange(0, 9000)
"""Beside a lab that a person may have up, and beside other runs of these tests."""


@pytest.fixture(scope="package")  # not session: an idle lab takes a good part of a core from everybody else
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningLab]:
    with RunningLab(tmp_path_factory.mktemp("lab"), offset=OFFSET) as running:
        yield running
