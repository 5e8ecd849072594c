"""People's real keys, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

import tests.simulation.bounds  # noqa: F401  (adds its checkers to the list)
from tests.simulation.world import make_keys


@pytest.fixture(scope="session")
def keys_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_keys(tmp_path_factory.mktemp("keys"))
