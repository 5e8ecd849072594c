"""Secrets and agents' states stay where they belong: a whole lab with marked ones loses a region, makes errors, and everything
that people and programs can read of it is searched for the marks. TLS is on everywhere: what is looked for besides is every
token of people and hosts and every private key of the lab. Data keys: ``tests/integration/test_secrets.py``."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from controller.adapters.etcd import EtcdCoordinator
from controller.agent.sync import Checkpoints
from controller.cli.lab import read_settings
from controller.lab.aws import LAB_ENVIRONMENT
from controller.lab.parts import APPROVERS, REQUESTER
from controller.lab.secured import Secured
from tests.support.running_lab import ROOT, RunningLab
from tests.support.secrets import Marks, key_marks

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(900)]

OFFSET = 10000 + random.Random(os.getpid() + 2).randrange(0, 9000)
HOME, NEXT, THIRD = "eu-west-1", "eu-central-1", "us-east-1"

SECRETS = {
    "AWS secret key": "MARKsecretkey7f3a",
    "AWS session token": "MARKsessiontoken91c2",
    "webhook path": "MARKwebhookpath55d0",
    "webhook query": "MARKwebhookquery08be",
}
BODY = "MARKcheckpointbody4e6d"
HOST = "worker-1"

COMMANDS: tuple[tuple[tuple[str, ...], int], ...] = (
    (("status",), 0), (("lag",), 0), (("agents",), 0), (("members",), 0), (("incidents",), 0), (("audit",), 0),
    (("audit", "verify"), 0), (("plan", "list"), 0), (("checkpoints", "list", "agent-1"), 0), (("plan", "show", "PLAN"), 0),
    (("journal", "PLAN"), 0), (("status", "--endpoint", "SILENT"), 3), (("plan", "failover", "--to", "mars"), 5),
)  # fmt: skip
"""What people type, and the exit code that each must have: a command that fails early shows nothing and proves nothing."""
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
    with RunningLab(tmp_path / "lab", offset=OFFSET, settings=settings, tls=True) as running:
        yield running


def marks_of(lab: RunningLab) -> Marks:
    """Everything that must be nowhere, by what it is."""
    secured = secured_of(lab)
    folder = lab.lab.topology.state_dir
    keys = [line for path in sorted((folder / "tls").glob("*-key.pem")) for line in key_marks(path)]
    tokens = [path.read_text().strip() for path in sorted((folder / "tokens").iterdir())]
    assert len(tokens) > len(APPROVERS), "nobody was given a token"
    hashes = [entry["sha256"] for entry in json.loads(secured.access_file.read_text())["entries"]]
    return Marks(
        {what: [mark] for what, mark in SECRETS.items()}
        | {"an agent's state": [BODY], "a token": tokens, "the secret of a token": [one.rsplit(".", 1)[1] for one in tokens]}
        | {"a private key": keys, "a hash of the access file": hashes}
    )


def secured_of(lab: RunningLab) -> Secured:
    assert lab.lab.secured is not None
    return lab.lab.secured


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
    texts, secured = {}, secured_of(lab)
    with httpx.Client(timeout=10.0, trust_env=False, verify=secured.context()) as client:
        for url in lab.urls(NEXT) + lab.urls(THIRD):
            for who in (REQUESTER, HOST):
                headers = {"Authorization": f"Bearer {secured.token_file(who).read_text().strip()}"}
                for path in PATHS:
                    answer = client.get(url + path, headers=headers)
                    assert answer.status_code != 401, (who, path, answer.text)
                    texts[f"{url}{path} as {who}"] = f"{answer.headers}\n{answer.text}"
                texts[f"POST {url} as {who}"] = client.post(f"{url}/v1/plans", content=b'{"target": 3}', headers=headers).text
                cut = {"Authorization": headers["Authorization"][:-1]}
                texts[f"{url} with a cut token of {who}"] = client.get(f"{url}/v1/status", headers=cut).text
    return texts


def typed(lab: RunningLab, plan: str) -> dict[str, str]:
    texts, words_for = {}, {"PLAN": plan, "SILENT": SILENT}
    for typed_words, code in COMMANDS:
        words = [words_for.get(word, word) for word in typed_words]
        # Each command is a process; that tables and YAML show nothing more is in tests/integration/test_secrets.py.
        for output in ("json", "table") if words[0] in ("status", "plan") else ("json",):
            ran = subprocess.run(
                [sys.executable, "-m", "controller", "--output", output, *words],
                cwd=ROOT,
                env={
                    **os.environ,
                    "DR_CONFIG": str(lab.lab.topology.operator_config),
                    "DRCTL_DEBUG": "1",
                    **secured_of(lab).environment(REQUESTER),
                },
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert ran.returncode == code, f"drctl {' '.join(words)}: {ran.returncode}\n{ran.stdout}\n{ran.stderr}"
            texts[f"drctl {' '.join(words)} ({output})"] = ran.stdout + ran.stderr
    return texts


async def kept_in_etcd(lab: RunningLab) -> dict[str, str]:
    tls = secured_of(lab).etcd()
    files = {"ca_file": str(tls.ca_file), "cert_file": str(tls.cert_file), "key_file": str(tls.key_file)}
    coordinator = EtcdCoordinator(lab.lab.etcd_endpoints, call_timeout_seconds=5.0, **files)
    try:
        return {item.key: item.value.decode(errors="replace") for item in await coordinator.list("/")}
    finally:
        await coordinator.close()


def test_no_secret_and_no_state_is_in_logs_pages_plans_audit_or_arguments(lab: RunningLab) -> None:
    secured = secured_of(lab)
    lab.call(secured.make_host, HOST)
    lab.until(lambda: lets_in(lab), "the controllers to have read the access file")
    token, ca = secured.token_file(HOST), secured.ca_file
    with Checkpoints(lab.urls(), token_file=token, ca_file=ca, timeout_seconds=60.0) as client:
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
    assert marks_of(lab).found_in(everything) == []

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


def lets_in(lab: RunningLab) -> bool:
    """Whether every controller knows the host's token, which was made a moment ago."""
    headers = {"Authorization": f"Bearer {secured_of(lab).token_file(HOST).read_text().strip()}"}
    with httpx.Client(verify=secured_of(lab).context(), trust_env=False, timeout=10) as http:
        return all(http.get(f"{url}/v1/status", headers=headers).status_code == 403 for url in lab.urls())
