"""Secrets and agents' states stay where they belong, quickly: real controllers over HTTP on memory adapters, with marked
secrets and states, lose a region and make errors. ``tests/lab/test_secrets.py`` searches a whole lab, logs and processes."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from controller.adapters.notify import WebhookPager
from controller.agent.sync import Checkpoints
from controller.domain.outward import LOOPBACK
from controller.errors import Unavailable
from controller.ports import Page
from tests.support.drctl import Drctl
from tests.support.served import ServedController

SECRETS = {"webhook": "MARKwebhook55d0", "etcd password": "MARKpassword3c51", "AWS secret": "MARKsecret7f3a"}
BODY = "MARKbody4e6d"
MARKS = {**SECRETS, "an agent's state": BODY}
PATHS = (
    "/", "/v1/status", "/v1/lag", "/v1/members", "/v1/incidents", "/v1/plans", "/v1/audit", "/v1/agents", "/metrics", "/readyz",
    "/livez", "/active", "/openapi.json", "/v1/nothing", "/v1/agents/nobody/latest", "/v1/checkpoints?agent=agent-1",
)  # fmt: skip
COMMANDS = (
    ("status",), ("lag",), ("agents",), ("members",), ("incidents",), ("audit",), ("audit", "verify"), ("plan", "list"),
    ("checkpoints", "list", "agent-1"),
)  # fmt: skip
HOOK = f"http://127.0.0.1:1023/{SECRETS['webhook']}?token={SECRETS['webhook']}"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedController]:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRETS["AWS secret"])
    etcd = {"username": "root", "password": SECRETS["etcd password"]}
    made = ServedController(tmp_path, etcd=etcd, notify={"webhook_url": HOOK, "networks": ["127.0.0.0/8"]})
    made.pager = WebhookPager(HOOK, 1.0, allowed=LOOPBACK)  # type: ignore[assignment]
    with made as running:
        yield running


def found_in(texts: dict[str, str]) -> list[str]:
    return [f"{what} in {place}" for place, text in texts.items() for what, mark in MARKS.items() if mark in text]


def test_no_secret_and_no_state_is_in_pages_plans_audit_or_answers(served: ServedController, drctl: Drctl) -> None:
    with Checkpoints(served.urls) as client:
        for number in range(10):
            client.put("agent-1", f"r{number}", f"{BODY} {number}".encode(), copies=2)
        served.fail_over()
        client.put("agent-1", "after", f"{BODY} after".encode())
        assert client.latest("agent-1")[1] == f"{BODY} after".encode(), "the marked states are not what is replicated"
    texts = {"what controllers said": "\n".join(served._said)}
    with httpx.Client(timeout=10.0, trust_env=False) as http:
        for url in served.urls[1:]:
            for path in PATHS:
                answer = http.get(url + path)
                texts[f"GET {path}"] = f"{answer.headers}\n{answer.text}"
            for wrong in (b'{"target": 3}', b"not json"):
                texts[f"POST {wrong!r}"] = http.post(f"{url}/v1/plans", content=wrong).text
    for words in COMMANDS:
        for output in ("json", "table", "yaml"):
            ran = drctl(*words, "-o", output, *(option for url in served.urls[1:] for option in ("--endpoint", url)))
            assert ran.code == 0, ran.err
            texts[f"drctl {' '.join(words)} -o {output}"] = ran.out + ran.err
    etcd = {f"etcd {key}": value for key, value in served.documents().items()}
    assert "is active in epoch" in texts["GET /v1/status"]
    assert "agent-1" in texts["GET /v1/agents"]
    assert any("/plans/" in key for key in etcd)
    assert any("/audit/" in key for key in etcd)
    assert found_in({**texts, **etcd}) == []


async def test_a_page_that_fails_says_where_it_went_and_not_what_it_showed() -> None:
    with pytest.raises(Unavailable) as caught:
        await WebhookPager(HOOK, 5.0, allowed=LOOPBACK).page(Page("k", "critical", "t", "b"))
    said = "".join((caught.value.message, caught.value.hint, *traceback.format_exception(caught.value)))
    assert "http://127.0.0.1:1023" in said
    assert "ConnectError" in said
    assert found_in({"the error": said}) == []


def test_a_mark_would_be_found() -> None:
    assert found_in({"a page": f"… {BODY} …", "a log": "nothing"}) == ["an agent's state in a page"]
