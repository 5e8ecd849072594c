"""Secrets and agents' states stay where they belong, quickly: real controllers over HTTP on memory adapters, with marked
secrets and states, lose a region and make errors. ``tests/lab/test_secrets.py`` searches a whole lab, logs and processes.

What is looked for besides: every token that somebody was given, the access file's hashes, every private TLS key, and every
key that a KMS made, in plain. All of them are in use: TLS everywhere, objects sealed, callers known by tokens.
"""

from __future__ import annotations

import json
import logging
import ssl
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from controller.adapters.notify import WebhookPager
from controller.agent.sync import Checkpoints
from controller.domain.outward import LOOPBACK
from controller.errors import DrError, Misconfigured, Unauthenticated, Unavailable
from controller.lab.certificates import Authority
from controller.ports import Page
from controller.runtime.credentials import read_token
from tests.support.drctl import Drctl
from tests.support.secrets import Marks, key_marks, spellings
from tests.support.served import REGIONS, ServedController

SECRETS = {"webhook": "MARKwebhook55d0", "etcd password": "MARKpassword3c51", "AWS secret": "MARKsecret7f3a"}
BODY = "MARKbody4e6d"
PATHS = (
    "/", "/v1/status", "/v1/lag", "/v1/members", "/v1/incidents", "/v1/plans", "/v1/audit", "/v1/agents", "/metrics", "/readyz",
    "/livez", "/active", "/openapi.json", "/v1/nothing", "/v1/agents/nobody/latest", "/v1/checkpoints?agent=agent-1",
    "/v1/salvage",
)  # fmt: skip
COMMANDS: tuple[tuple[tuple[str, ...], int], ...] = (
    (("status",), 0), (("lag",), 0), (("agents",), 0), (("members",), 0), (("incidents",), 0), (("audit",), 0),
    (("audit", "verify"), 0), (("plan", "list"), 0), (("plan", "show", "PLAN"), 0), (("journal", "PLAN"), 0),
    (("checkpoints", "list", "agent-1"), 0), (("plan", "show", "nothing"), 5), (("plan", "failover", "--to", "mars"), 5),
)  # fmt: skip
"""What people type, and the exit code that each must have: a command that fails early shows nothing and proves nothing."""
HOOK = f"http://127.0.0.1:1023/{SECRETS['webhook']}?token={SECRETS['webhook']}"


@dataclass
class Story:
    """A group that has lost a region, and who was given what."""

    served: ServedController
    tokens: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    def marks(self) -> Marks:
        """Everything that must be nowhere, by what it is."""
        folder = self.served.access_file.parent
        keys = [line for path in sorted((folder / "tls").glob("*-key.pem")) for line in key_marks(path)]
        hashes = [entry["sha256"] for entry in json.loads(self.served.access_file.read_text())["entries"]]
        tokens = [secret for token in self.tokens.values() for secret in (token, token.rsplit(".", 1)[1])]
        return Marks(
            {what: [mark] for what, mark in SECRETS.items()}
            | {"an agent's state": [BODY], "a token": tokens, "a hash of the access file": hashes}
            | {"a private key": keys, "a key of KMS": self.served.plain_keys}
        )


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Story]:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRETS["AWS secret"])
    caplog.set_level(logging.INFO)  # at DEBUG the HTTP client of this test writes down what it sends itself
    etcd = {"username": "root", "password": SECRETS["etcd password"]}
    made = ServedController(
        tmp_path, secured=True, sealed=True, etcd=etcd, notify={"webhook_url": HOOK, "networks": ["127.0.0.0/8"]}
    )
    made.pager = WebhookPager(HOOK, 1.0, allowed=LOOPBACK)  # type: ignore[assignment]
    with made as running:
        story = Story(running)
        for name, role, entry in (
            ("host", "agent", {"agents": ("agent-*",), "hosts": ("worker-1",)}),
            ("oncall", "operator", {"person": "oncall@example.org"}),
            ("wall", "viewer", {}),
        ):
            story.tokens[name] = running.token(name, role, **entry)
            story.files[name] = tmp_path / f"{name}.token"
            story.files[name].write_text(story.tokens[name])
        yield story


def said_by(act: Callable[[], object], error: type[DrError]) -> str:
    """All that an error could show anywhere: message, hint, the whole traceback with what it came from."""
    with pytest.raises(error) as caught:
        act()
    found = caught.value
    return "".join((found.message, found.hint, repr(found), *traceback.format_exception(found)))


@pytest.mark.timeout(600)
def test_no_secret_and_no_state_is_in_pages_plans_audit_or_answers(
    story: Story, drctl: Drctl, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served, texts = story.served, dict[str, str]()
    with Checkpoints(served.urls, token_file=story.files["host"], ca_file=served.ca_file, timeout_seconds=30.0) as client:
        for number in range(10):
            client.put("agent-1", f"r{number}", f"{BODY} {number}".encode(), copies=2)
        served.fail_over()  # with its store and its KMS
        client.put("agent-1", "after", f"{BODY} after".encode())
        assert client.latest("agent-1")[1] == f"{BODY} after".encode(), "the marked states are not what is replicated"
    context = ssl.create_default_context(cafile=served.ca_file)
    with httpx.Client(timeout=60.0, trust_env=False, verify=context) as http:
        for url in served.urls[1:2]:
            for name, token in story.tokens.items():
                headers = {"Authorization": f"Bearer {token}"}
                for path in PATHS:
                    answer = http.get(url + path, headers=headers)
                    texts[f"GET {path} as {name}"] = f"{answer.headers}\n{answer.text}"
                for wrong in (b'{"target": 3}', b"not json"):
                    texts[f"POST {wrong!r} as {name}"] = http.post(f"{url}/v1/plans", content=wrong, headers=headers).text
                texts[f"a cut token of {name}"] = http.get(url, headers={"Authorization": f"Bearer {token[:-1]}"}).text
                texts[f"a token of {name} in the URL"] = http.get(f"{url}/v1/nothing?token={token[-9:]}").text
    texts |= typed(story, drctl, monkeypatch)
    texts |= errors_of(story)
    texts |= {f"etcd {key}": value for key, value in served.documents().items()}
    texts["what controllers said"] = "\n".join(served._said)
    texts["Python's own log"] = caplog.text

    stored = {
        f"object {number} in {region}": one.data.decode("latin-1")
        for region in REGIONS
        for number, one in enumerate(served.places[region].store.objects.values())
    }
    assert story.marks().found_in({**texts, **stored}) == []

    # What was searched is what was meant.
    assert "is active in epoch" in texts["GET /v1/status as oncall"]
    assert "is sealed for the KMS of" in texts["GET /v1/status as oncall"], "the KMS that is gone left no trace"
    assert "agent-1" in texts["GET /v1/agents as oncall"]
    assert "dr_role" in texts["GET /metrics as wall"]
    assert any("/plans/" in place for place in texts)
    assert any("/audit/" in place for place in texts)
    assert len(served.plain_keys) > len(REGIONS), "no data key was made"
    assert all(text.startswith("DRENC") for text in stored.values())
    assert stored


def typed(story: Story, drctl: Drctl, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the commands print, each with the code that it must end with."""
    served, texts = story.served, dict[str, str]()
    plan = next(json.loads(value)["plan"]["id"] for key, value in served.documents().items() if "/plans/" in key)
    ends = [option for url in served.urls[1:] for option in ("--endpoint", url)]
    monkeypatch.setenv("DR_CA_FILE", str(served.ca_file))
    monkeypatch.setenv("DR_TOKEN_FILE", str(story.files["oncall"]))
    monkeypatch.setenv("DRCTL_DEBUG", "1")

    def run(code: int, *words: str) -> None:
        ran = drctl(*words)
        assert ran.code == code, (words, ran.out, ran.err)
        texts[f"drctl {' '.join(words)}"] = ran.out + ran.err

    for words, code in COMMANDS:
        for output in ("json", "table", "yaml") if code == 0 else ("json",):
            run(code, *(plan if word == "PLAN" else word for word in words), "-o", output, *ends)
    run(0, "token", "list", "--file", str(served.access_file))
    monkeypatch.setenv("DR_TOKEN_FILE", str(story.files["wall"]))
    run(5, "plan", "failover", "--to", REGIONS[2], "--requester", "x", *ends)
    # A file that holds something else; a token that nobody should have sent in the clear; an authority that knows nobody here.
    key = next((served.access_file.parent / "tls").glob("*-key.pem"))
    for code, name, value in (
        (7, "DR_TOKEN_FILE", str(key)),
        (7, "DR_CA_FILE", str(key)),
        (3, "DR_CA_FILE", str(Authority(served.access_file.parent / "strange").cert_file)),
    ):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            run(code, "status", *ends)
    run(7, "status", "--endpoint", "http://10.0.0.1:8080")
    return texts


def errors_of(story: Story) -> dict[str, str]:
    """What programs that hold secrets say when they fail."""
    served, host = story.served, story.files["host"]
    strange = Authority(served.access_file.parent / "stranger").cert_file
    gone = served.access_file.parent / "gone.token"
    gone.write_text("dr1.served." + "A" * 43)
    key = next((served.access_file.parent / "tls").glob("*-key.pem"))

    def put(**options: object) -> None:
        options = {"token_file": host, "ca_file": served.ca_file, "timeout_seconds": 1.0, **options}
        with Checkpoints(served.urls[1:], **options) as client:  # type: ignore[arg-type]
            client.put("agent-1", "never", BODY.encode())

    return {
        "an unknown authority": said_by(lambda: put(ca_file=strange), Unavailable),
        "an unknown token": said_by(lambda: put(token_file=gone), Unauthenticated),
        "a key for a token": said_by(lambda: read_token(key), Misconfigured),
        "a key for an authority": said_by(lambda: put(ca_file=key), Misconfigured),
    }


async def test_a_page_that_fails_says_where_it_went_and_not_what_it_showed() -> None:
    with pytest.raises(Unavailable) as caught:
        await WebhookPager(HOOK, 5.0, allowed=LOOPBACK).page(Page("k", "critical", "t", "b"))
    said = "".join((caught.value.message, caught.value.hint, *traceback.format_exception(caught.value)))
    assert "http://127.0.0.1:1023" in said
    assert "ConnectError" in said
    assert Marks({what: [mark] for what, mark in SECRETS.items()}).found_in({"the error": said}) == []


def test_a_mark_would_be_found_in_every_spelling() -> None:
    secret = bytes(range(200, 232))
    marks = Marks({"an agent's state": [BODY], "a key": [secret]})
    assert marks.found_in({"a page": f"… {BODY} …", "a log": "nothing"}) == ["an agent's state in a page"]
    for text in spellings(secret):
        assert marks.found_in({"a log": f"key={text}!"}) == ["a key in a log"], text
    for text in (repr(secret), json.dumps({"key": list(secret)}), f"{secret.hex()}"):
        assert marks.found_in({"a log": text}) == ["a key in a log"], text
    with pytest.raises(AssertionError, match="nothing would be searched for"):
        Marks({"a token": []})
