"""``drctl`` goes where a controller says that the active one is: at most a few steps, and never by a less safe way."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from controller.cli.client import NAMED_MAX, Client
from controller.errors import NotActive


def not_active(named: str | None) -> httpx.Response:
    document = {"code": "not_active", "message": "a standby", "hint": "", "exit_code": 3, "active": named}
    return httpx.Response(503, json={"error": document})


def client(answers: dict[str, Any], asked: list[str], *endpoints: str) -> Client:
    def answer(request: httpx.Request) -> httpx.Response:
        base = f"{request.url.scheme}://{request.url.netloc.decode()}"
        if request.url.path != "/livez":
            asked.append(base)
        found = answers.get(base, answers.get("*"))
        return found(base) if callable(found) else httpx.Response(200, json={"done": base})

    return Client(endpoints, transport=httpx.MockTransport(answer))


def test_a_standby_that_names_the_active_controller_is_followed_also_when_it_was_not_configured() -> None:
    asked: list[str] = []
    found = client({"http://a:1": lambda _: not_active("http://c:1/")}, asked, "http://a:1", "http://b:1")
    assert found.post(dict[str, str], "/v1/restores", {}).value == {"done": "http://c:1"}
    assert asked == ["http://a:1", "http://c:1"]


@pytest.mark.parametrize("named", [None, "http://a:1", "https://c:1", "ftp://c:1", "c", "http://x@c:1", "http://[", ""])
def test_what_is_no_other_controller_by_the_same_way_is_not_followed(named: str | None) -> None:
    asked: list[str] = []
    found = client({"http://a:1": lambda _: not_active(named)}, asked, "http://a:1")
    with pytest.raises(NotActive, match="a standby"):
        found.post(dict[str, str], "/v1/restores", {})
    assert asked == ["http://a:1"]


def test_nobody_leads_it_around_without_end() -> None:
    asked: list[str] = []
    found = client({"*": lambda base: not_active(f"http://n:{int(base.rpartition(':')[2]) + 1}")}, asked, "http://n:1")
    with pytest.raises(NotActive):
        found.post(dict[str, str], "/v1/restores", {})
    assert len(asked) == 1 + NAMED_MAX
