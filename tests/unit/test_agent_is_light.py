"""What an agent's process gets by importing us: the base dependencies and nothing of the daemon's or of a framework's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {
    "aioboto3", "aiobotocore", "boto3", "botocore", "cryptography", "dns", "etcd3", "fastapi", "grpc", "jinja2",
    "prometheus_client", "pydantic", "pydantic_settings", "sshsig", "stamina", "starlette", "structlog", "typer", "uvicorn",
    "uvloop", "yaml",
}  # fmt: skip
"""Not ``rich``: httpx imports it by itself, for its own command line, where it happens to be installed."""
FRAMEWORKS = {"agents", "langchain_core", "langgraph", "langsmith", "openai", "strands"}
OURS = {
    "controller.adapters",
    "controller.cli",
    "controller.lab",
    "controller.ports",
    "controller.runtime",
    "controller.settings",
}


def loaded_by(module: str) -> set[str]:
    program = f"import sys, {module}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=240, check=True)
    names = done.stdout.split()
    return {name.split(".")[0] for name in names} | {name for name in names if name.startswith("controller.")}


@pytest.mark.parametrize("module", ["controller.agent", "controller.agent.state", "controller.agent.sessions"])
def test_importing_the_agents_side_loads_nothing_heavy_and_no_framework(module: str) -> None:
    loaded = loaded_by(module)
    assert loaded & (HEAVY | FRAMEWORKS | OURS) == set()
    assert {"httpx", "msgspec"} <= loaded


def test_the_langgraph_saver_adds_langgraph_and_nothing_of_the_daemon() -> None:
    pytest.importorskip("langgraph.checkpoint.base", reason="langgraph-checkpoint is not installed")
    loaded = loaded_by("controller.agent.langgraph")
    assert "langgraph" in loaded
    # langchain-core brings pydantic and yaml itself.
    assert loaded & ((HEAVY | OURS) - {"pydantic", "yaml"}) == set()
