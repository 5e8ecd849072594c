"""``drctl`` in this process, without a person at it and without settings from the environment."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from controller.cli import main
from tests.support.drctl import Drctl, Result


@pytest.fixture
def drctl(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Drctl:
    for name in ("DRCTL_PRINCIPAL", "DR_CONFIG", "DRCTL_DEBUG", "DRCTL_ENDPOINTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))

    def call(*argv: str | Path) -> Result:
        capsys.readouterr()
        code = main.run([str(arg) for arg in argv])
        seen = capsys.readouterr()
        return Result(code, seen.out, seen.err)

    return call
