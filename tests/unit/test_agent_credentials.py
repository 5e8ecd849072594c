"""What agents show to controllers: from arguments or the environment, over TLS or within this machine, and never in words."""

from __future__ import annotations

import copy
import logging
import pickle
import random
from pathlib import Path

import httpx
import pytest

from controller.agent import AsyncCheckpoints
from controller.agent.credentials import Bearer, Credentials, Secret
from controller.agent.endpoints import Endpoints
from controller.agent.rights import BootClock
from controller.errors import Misconfigured, Unauthenticated
from controller.lab.certificates import Authority

TOKEN = "dr1.fleet." + "s" * 43


@pytest.fixture(autouse=True)
def no_credentials_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DR_TOKEN_FILE", "DR_CA_FILE", "DR_CERT_FILE", "DR_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)


def test_without_anything_nothing_is_shown_and_nothing_is_asked_for() -> None:
    plain = Credentials.of()
    assert Bearer(plain).headers() == {}
    plain.check(["http://10.0.0.1:8080"])


def test_the_environment_fills_in_what_is_not_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n")
    monkeypatch.setenv("DR_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("DR_CA_FILE", str(tmp_path / "ca.pem"))
    found = Credentials.of()
    assert found.ca_file == tmp_path / "ca.pem"
    assert Bearer(found).headers() == {"Authorization": f"Bearer {TOKEN}"}
    assert Credentials.of(token="dr1.fleet.other").token_file is None, "what is given wins"


def test_a_token_is_sent_over_tls_or_within_this_machine_and_to_no_learned_address_in_the_clear() -> None:
    given = Credentials.of(token=TOKEN)
    given.check(["https://10.0.0.1:8080", "http://127.0.1.1:8080", "http://localhost:1", "http://[::1]:8080"])
    for url in ("http://10.0.0.1:8080", "http://127.0.0.1.example.com", "http://controller"):
        with pytest.raises(Misconfigured, match="plain text"):
            given.check([url])
    known = Endpoints(["http://127.0.1.1:8080"], BootClock(), random.Random(1), trusted=given.may_be_sent_to)
    first = known.pick()
    assert first is not None
    assert not known.not_active(first, "http://10.0.0.1:8080")
    assert known.not_active(first, "http://127.0.1.2:8080")


def test_a_secret_shows_itself_in_no_words_and_is_not_copied_to_a_file() -> None:
    given = Credentials.of(token=TOKEN)
    assert "sss" not in f"{given!r} {given} {given.token} {given.token!r} {[given]}"
    with pytest.raises(TypeError):
        pickle.dumps(given)
    with pytest.raises(TypeError):
        copy.deepcopy(given.token)
    assert not Secret("")


@pytest.mark.parametrize("text", ["", " ", "two words", "line\nline", "ümlaut", "x" * 300, "\x1b[31m"])
def test_what_is_no_token_is_refused_without_being_repeated(text: str, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(text)
    with pytest.raises(Misconfigured) as caught:
        Bearer(Credentials.of(token_file=path))
    assert text.strip() == "" or text not in caught.value.message + caught.value.hint
    with pytest.raises(Misconfigured, match="absent"):
        Bearer(Credentials.of(token_file=tmp_path / "absent"))


def test_half_a_certificate_and_two_tokens_are_refused(tmp_path: Path) -> None:
    pair = Authority(tmp_path).issue("client")
    with pytest.raises(Misconfigured, match="key"):
        Credentials.of(cert_file=pair.cert_file)
    with pytest.raises(Misconfigured, match="token file"):
        Credentials.of(token=TOKEN, token_file=tmp_path / "token")
    assert Credentials.of(cert_file=pair.cert_file, key_file=pair.key_file, ca_file=tmp_path / "ca.pem").tls()
    for wrong in ({"ca_file": tmp_path / "absent.pem"}, {"cert_file": pair.key_file, "key_file": pair.cert_file}):
        with pytest.raises(Misconfigured, match="TLS files"):
            Credentials.of(**wrong).tls()


def test_a_file_that_was_renewed_is_read_again_and_one_that_vanished_leaves_the_last_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controller.agent.credentials.LOOK_SECONDS", 0.0)
    path = tmp_path / "token"
    path.write_text(TOKEN)
    bearer = Bearer(Credentials.of(token_file=path))
    path.write_text("dr1.fleet.renewed")
    assert bearer.headers() == {"Authorization": "Bearer dr1.fleet.renewed"}
    path.unlink()
    assert bearer.headers() == {"Authorization": "Bearer dr1.fleet.renewed"}


async def test_no_error_and_no_log_of_a_client_holds_its_token(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["Authorization"])
        error = {"code": "unauthenticated", "message": "the token is unknown here", "hint": "make one", "exit_code": 9}
        return httpx.Response(401, json={"error": error})

    client = AsyncCheckpoints(["https://10.0.0.1:8080"], token=TOKEN, transport=httpx.MockTransport(answer))
    async with client:
        with pytest.raises(Unauthenticated) as caught:
            await client.put("agent-1", "r1", b"state")
    assert seen == [f"Bearer {TOKEN}"], "said once, and not tried again and again"
    assert caught.value.exit_code == 9
    assert "sss" not in f"{caught.value!r} {caught.value} {client!r} {vars(client)!r} {caplog.text}"
