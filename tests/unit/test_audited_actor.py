"""Who stands in the audit: the caller that was shown, never a field of the request. For every route that changes something, by
the API's own document: a new one fails here until somebody has said what is audited of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from controller.domain.access import ANYBODY, Caller, CallerRole
from controller.errors import Refused
from controller.runtime.api import create_app
from controller.runtime.api_access import CALLER
from tests.support.fake_service import FakeClock, FakeService

SHOWN = Caller("ada-laptop", CallerRole.OPERATOR, "ada@example.org")
SAID = "mallory@example.org"
"""What every request says of itself, wherever it can."""
PLACES = {"plan": "p-0001", "region": "eu-west-1", "salvage": "0.5-8.0123456789abcdef"}
DIGEST = "ab" * 32

AUDITED: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("POST", "/v1/plans"): ("create_plan", {"kind": "failover", "to": "eu-central-1", "requester": SAID, "reason": SAID}),
    ("POST", "/v1/plans/{plan}/approvals"): (
        "approve",
        {"principal": SAID, "decision": "approve", "expires_at": 2e9, "signature": "x", "digest": DIGEST},
    ),
    ("POST", "/v1/plans/{plan}/execute"): ("execute", {"requester": SAID, "confirm": "eu-central-1"}),
    ("POST", "/v1/plans/{plan}/abort"): ("abort", {"requester": SAID, "reason": "no"}),
    ("POST", "/v1/repairs/{region}"): ("mender.repair", {"execute": True, "requester": SAID, "confirm": "eu-west-1"}),
    ("POST", "/v1/restores"): (
        "restorer.restore",
        {
            "at": 1.0, "kind": "checkpoint", "requester": SAID, "confirm": "fleet",
            "items": [{"agent": "agent-1", "record": "r1", "newest": "r2"}],
        },
    ),
    ("POST", "/v1/salvage/{region}/{salvage}/discard"): (
        "salvager.discard",
        {"execute": True, "requester": SAID, "confirm": "eu-west-1", "even_unexported": "a test"},
    ),
}  # fmt: skip
"""Route → what is asked to do it, and a request that names somebody else."""
NOT_AUDITED = {
    ("POST", "/v1/records"): "agents' records: each names its agent, and an entry names the agents that it may write for",
    ("POST", "/v1/peers/records"): "the same, handed over by another instance",
    ("POST", "/v1/peers/{region}/{instance}/{epoch}/records"): "tasks and assignments of the lead's holder",
    ("POST", "/v1/tasks"): "a record in the stream",
    ("POST", "/v1/hosts/{host}/beat"): "several a second from each host",
    ("POST", "/v1/verifications/{region}"): "it reads",
    ("POST", "/v1/verifications/{region}/stop"): "it reads",
}
SAYING = {"requester", "actor", "by", "principal", "person", "who", "author", "user"}
"""Fields in which a request says who it is from."""


Asked = tuple[str, tuple[Any, ...], dict[str, Any]]
"""What of a controller was called, and with what."""


class Recording(FakeService):
    """A controller that notes what it is asked, and says no."""

    def __init__(self, asked: list[Asked]) -> None:
        super().__init__()
        for name, _ in AUDITED.values():
            target, _, method = name.rpartition(".")
            setattr(getattr(self, target) if target else self, method, self._noting(name, asked))

    def _noting(self, name: str, asked: list[Asked]) -> Any:
        async def note(*arguments: Any, **more: Any) -> None:
            asked.append((name, arguments, more))
            raise Refused("noted", hint="a test did it")

        return note


def described() -> dict[tuple[str, str], Mapping[str, Any]]:
    """Every route that changes something, with its description."""
    document = create_app(FakeService(), clock=FakeClock()).openapi()
    return {
        (method.upper(), path): {**found, "components": document["components"]}
        for path, methods in document["paths"].items()
        for method, found in methods.items()
        if method.upper() not in {"GET", "HEAD", "OPTIONS"}
    }


def fields_of(route: Mapping[str, Any]) -> set[str]:
    """Of the request's JSON body."""
    content = route.get("requestBody", {}).get("content", {}).get("application/json", {})
    name = content.get("schema", {}).get("$ref", "").rsplit("/", maxsplit=1)[-1]
    return set(route["components"]["schemas"][name]["properties"]) if name else set()


def test_every_route_that_changes_something_has_its_actor_tested_or_says_why_none_is_audited() -> None:
    routes = described()
    assert set(routes) == set(AUDITED) | set(NOT_AUDITED)
    assert not set(AUDITED) & set(NOT_AUDITED)
    for route in NOT_AUDITED:
        assert not fields_of(routes[route]) & SAYING, f"{route}: who says so in the request stands somewhere"
    for route, (_, body) in AUDITED.items():
        unsaid = (fields_of(routes[route]) & SAYING) - set(body)
        assert not unsaid, f"{route}: {unsaid} of the request is not tried"


async def asked_by(
    caller: Caller, method: str, path: str, body: Mapping[str, Any]
) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    asked: list[Asked] = []
    app = create_app(Recording(asked), clock=FakeClock())

    async def behind_the_door(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, CALLER: caller}, receive, send)

    headers = {"X-Requester": SAID, "X-Forwarded-User": SAID, "From": SAID, "X-DR-Requester": SAID}
    transport = httpx.ASGITransport(app=behind_the_door)
    async with httpx.AsyncClient(transport=transport, base_url="http://controller", headers=headers) as http:
        answer = await http.request(method, path.format(**PLACES), json=body, params={"requester": SAID, "actor": SAID})
    assert answer.json()["error"]["message"] == "noted", answer.text
    assert len(asked) == 1
    return asked[0]


@pytest.mark.parametrize(("method", "path"), list(AUDITED), ids=str)
async def test_who_was_shown_is_who_acts_whatever_the_request_says(method: str, path: str) -> None:
    name, body = AUDITED[method, path]
    called, arguments, more = await asked_by(SHOWN, method, path, body)
    assert called == name
    if name == "approve":
        # Whose decision it is the signature says, which is verified; who brought it stands beside it.
        assert (arguments[1].principal, arguments[1].by) == (SAID, "ada-laptop")
    elif name == "create_plan":
        assert arguments[0].requester == "ada@example.org"
    else:
        assert "ada@example.org" in [*arguments, *more.values()]
        assert SAID not in repr(arguments) + repr(more)


@pytest.mark.parametrize(("method", "path"), list(AUDITED), ids=str)
async def test_where_nobody_is_asked_who_they_are_the_request_is_all_there_is(method: str, path: str) -> None:
    _, arguments, more = await asked_by(ANYBODY, method, path, AUDITED[method, path][1])
    assert SAID in repr(arguments) + repr(more), "or the test above shows nothing"
