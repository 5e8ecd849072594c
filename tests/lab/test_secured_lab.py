"""The lab with everything on (`drctl lab up --tls`): real etcd over TLS with client certificates, six controllers in processes
of their own with certificates and an access file. A region dies, people move the fleet by drctl with tokens and signatures."""

from __future__ import annotations

import os
import random
import ssl
from pathlib import Path

import httpx
import pytest

from controller.agent import Checkpoints
from controller.errors import Unauthenticated
from tests.support.running_lab import RunningLab

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(400)]

OFFSET = 10000 + random.Random(os.getpid() + 2).randrange(0, 9000)
HOME, OTHER = "eu-west-1", "eu-central-1"


def test_a_fleet_is_moved_with_tls_tokens_and_certificates_everywhere(tmp_path: Path) -> None:
    with RunningLab(tmp_path, offset=OFFSET, tls=True) as running:
        secured = running.lab.secured
        assert secured is not None
        assert all(url.startswith("https://") for url in (*running.urls(), *running.lab.etcd_endpoints))
        plain = ssl.create_default_context(cafile=secured.ca_file)
        with httpx.Client(verify=plain, trust_env=False, timeout=10) as stranger:
            assert stranger.get(f"{running.urls()[0]}/livez").status_code == 200
            assert stranger.get(f"{running.urls()[0]}/v1/status").status_code == 401
            with pytest.raises(httpx.HTTPError):  # etcd wants a certificate
                stranger.get(f"{running.lab.etcd_endpoints[0]}/health")
        running.call(secured.make_host, "worker-1")
        token, ca = secured.token_file("worker-1"), secured.ca_file
        with Checkpoints(running.urls(), ca_file=ca) as client, pytest.raises(Unauthenticated):
            client.put("agent-1", "step-1", b"state")

        def put(record: str) -> bool:
            with Checkpoints(running.urls(), token_file=token, ca_file=ca, timeout_seconds=60.0) as client:
                return client.put("agent-1", record, b"state", copies=2).copies >= 2

        running.until(lambda: _lets_in(running, token, ca), "the controllers to have read the access file")
        assert put("step-1")
        running.call(running.lab.kill, HOME)
        running.fail_over(HOME, OTHER)
        with Checkpoints(running.urls(OTHER), token_file=token, ca_file=ca, timeout_seconds=60.0) as client:
            assert client.get("agent-1", "step-1")[1] == b"state"
        assert put("step-2")
        audit = running.drctl("audit")
        # Controllers propose plans too, by themselves.
        assert "carol" in {entry["actor"] for entry in audit if entry["action"] in {"plan", "execute"}}


def _lets_in(running: RunningLab, token: Path, ca: Path) -> bool:
    """Whether every controller knows a token that was made a moment ago."""
    with httpx.Client(verify=ssl.create_default_context(cafile=ca), trust_env=False, timeout=10) as http:
        headers = {"Authorization": f"Bearer {token.read_text().strip()}"}
        return all(http.get(f"{url}/v1/status", headers=headers).status_code == 403 for url in running.urls())
