"""Secrets and agents' states stay where they belong: a whole lab with marked ones loses a region, makes errors, and everything
that people and programs can read of it is searched for the marks."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest

from controller.adapters.etcd import EtcdCoordinator
from controller.agent.sync import Checkpoints
from controller.cli.lab import read_settings
from controller.lab.aws import LAB_ENVIRONMENT
from tests.support.running_lab import ROOT, RunningLab

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(400)]

OFFSET = 10000 + random.Random(os.getpid() + 2).randrange(0, 9000)
HOME, NEXT, THIRD = "eu-west-1", "eu-central-1", "us-east-1"

SECRETS = {
    "AWS secret key": "MARKsecretkey7f3a",
    "AWS session token": "MARKsessiontoken91c2",
    "webhook path": "MARKwebhookpath55d0",
    "webhook query": "MARKwebhookquery08be",
}
BODY = "MARKcheckpointbody4e6d"
MARKS = {**SECRETS, "an agent's state": BODY}

READING = (
    ("status",), ("lag",), ("agents",), ("members",), ("incidents",), ("audit",), ("audit", "verify"), ("plan", "list"),
    ("checkpoints", "list", "agent-1"),
)  # fmt: skip
SILENT = "http://127.0.0.1:1"
PATHS = (
    "/", "/v1/status", "/v1/lag", "/v1/members", "/v1/incidents", "/v1/plans", "/v1/audit", "/v1/agents", "/metrics", "/readyz",
    "/livez", "/active", "/openapi.json", "/v1/nothing", "/v1/agents/nobody/latest",
)  # fmt: skip


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningLab]:
    monkeypatch.setitem(LAB_ENVIRONMENT, "AWS_SECRET_ACCESS_KEY", SECRETS["AWS secret key"])
    monkeypatch.setitem(LAB_ENVIRONMENT, "AWS_SESSION_TOKEN", SECRETS["AWS session token"])
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, LAB_ENVIRONMENT[name])
    settings = read_settings(None)
    settings["notify"]["webhook_url"] += f"/{SECRETS['webhook path']}?token={SECRETS['webhook query']}"
    with RunningLab(tmp_path / "lab", offset=OFFSET, settings=settings) as running:
        yield running


def found_in(texts: Mapping[str, str]) -> list[str]:
    return [f"{what} in {place}" for place, text in texts.items() for what, mark in MARKS.items() if mark in text]


def logs_of(lab: RunningLab) -> dict[str, str]:
    return {path.name: path.read_text(errors="replace") for path in lab.lab.layout.logs.rglob("*") if path.is_file()}


def arguments_of(lab: RunningLab) -> dict[str, str]:
    found = {}
    for process in lab.lab.processes():
        try:
            found[f"arguments of {process.name}"] = Path(f"/proc/{process.pid}/cmdline").read_text(errors="replace")
        except OSError:
            continue  # it was killed
    return found


def pages_of(lab: RunningLab) -> dict[str, str]:
    texts = {}
    with httpx.Client(timeout=10.0, trust_env=False) as client:
        for url in lab.urls(NEXT) + lab.urls(THIRD):
            for path in PATHS:
                answer = client.get(url + path)
                texts[url + path] = f"{answer.headers}\n{answer.text}"
            texts[f"POST {url}"] = client.post(f"{url}/v1/plans", content=b'{"target": 3}').text
    return texts


def typed(lab: RunningLab, plan: str) -> dict[str, str]:
    texts = {}
    commands = [*READING, ("plan", "show", plan), ("journal", plan), ("status", "--endpoint", SILENT)]
    for words in commands:
        # Each command is a process; that tables and YAML show nothing more is in tests/integration/test_secrets.py.
        for output in ("json", "table") if words[0] in ("status", "plan") else ("json",):
            ran = subprocess.run(
                [sys.executable, "-m", "controller", "--output", output, *words],
                cwd=ROOT,
                env={**os.environ, "DR_CONFIG": str(lab.lab.topology.operator_config), "DRCTL_DEBUG": "1"},
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            texts[f"drctl {' '.join(words)} ({output})"] = ran.stdout + ran.stderr
    return texts


async def kept_in_etcd(lab: RunningLab) -> dict[str, str]:
    coordinator = EtcdCoordinator(lab.lab.etcd_endpoints, call_timeout_seconds=5.0)
    try:
        return {item.key: item.value.decode(errors="replace") for item in await coordinator.list("/")}
    finally:
        await coordinator.close()


def test_no_secret_and_no_state_is_in_logs_pages_plans_audit_or_arguments(lab: RunningLab) -> None:
    with Checkpoints(lab.urls()) as client:
        for number in range(20):
            client.put("agent-1", f"r{number}", f"{BODY} {number}".encode(), copies=2)
        # Errors on every road: a receiver that is gone, a region that is gone, requests that make no sense.
        lab.call(lab.lab.kill, HOME)
        webhook = next(process for process in lab.lab.processes() if process.name == "webhook")
        os.kill(webhook.pid, 9)
        plan = lab.fail_over(HOME, NEXT)
        client.put("agent-1", "after", f"{BODY} after".encode())
        record, body = client.latest("agent-1")
    assert (record.id, body) == ("after", f"{BODY} after".encode()), "the marked states are not what is replicated"

    logs, etcd = logs_of(lab), asyncio.run(kept_in_etcd(lab))
    everything = {**logs, **arguments_of(lab), **pages_of(lab), **typed(lab, plan), **etcd}
    assert found_in(everything) == []

    # What was searched is what was meant: the secrets were in use, and the errors were written down.
    controllers = [one for one in lab.lab.processes() if one.kind == "controller" and Path(f"/proc/{one.pid}").exists()]
    environment = Path(f"/proc/{controllers[0].pid}/environ").read_bytes()
    assert SECRETS["AWS secret key"].encode() in environment
    config = lab.lab.topology.operator_config.parent
    assert any(SECRETS["webhook query"] in path.read_text(errors="replace") for path in config.rglob("*.toml"))
    assert any("/plans/" in key for key in etcd)
    assert any("/audit/" in key for key in etcd)
    said = "".join(logs.values())
    assert "did not take a page" in said or "nobody was paged" in said, "the failing webhook left no trace"
    assert plan in said


def test_a_mark_would_be_found() -> None:
    assert found_in({"a page": f"… {BODY} …", "a log": "nothing"}) == ["an agent's state in a page"]
