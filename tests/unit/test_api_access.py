"""Who may call which route: every one of them, by every role, with everything that a stranger may try."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from controller.adapters.access import AccessDocument, AccessFile, Revoked, new_token, with_entry, without_entry, write_document
from controller.adapters.access_edit import with_revoked
from controller.domain.access import CallerRole
from controller.domain.model import Encoding, Frame, IngestAnswer, Record, Role
from controller.runtime.api import create_app
from controller.runtime.api_access import CERTIFICATE, Certificate, Entrance
from controller.stream.segment import encode_frames
from tests.support.fake_service import GROUP, REGIONS, FakeService, sha256

OCTETS = "application/octet-stream"
DAY = 86_400.0
OPEN = {"/livez", "/readyz", "/active", "/openapi.json"}
AGENT, OPERATOR, VIEWER, PEER = CallerRole.AGENT, CallerRole.OPERATOR, CallerRole.VIEWER, CallerRole.PEER

MATRIX: dict[tuple[str, str], set[CallerRole]] = {
    ("POST", "/v1/records"): {AGENT},
    ("GET", "/v1/agents"): {AGENT, OPERATOR},
    ("GET", "/v1/agents/{agent}/latest"): {AGENT, OPERATOR},
    ("GET", "/v1/agents/{agent}/records"): {AGENT, OPERATOR},
    ("GET", "/v1/agents/{agent}/records/{record}"): {AGENT, OPERATOR},
    ("GET", "/v1/agents/{agent}/checkpoints"): {AGENT, OPERATOR},
    ("GET", "/v1/agents/{agent}/checkpoints/{record}"): {AGENT, OPERATOR},
    ("POST", "/v1/tasks"): {AGENT, OPERATOR},
    ("POST", "/v1/hosts/{host}/beat"): {AGENT},
    ("POST", "/v1/peers/records"): {PEER},
    ("POST", "/v1/peers/{region}/{instance}/{epoch}/records"): {PEER},
    ("GET", "/v1/peers/positions"): {PEER},
    ("GET", "/v1/peers/witness"): {PEER},
    ("GET", "/v1/checkpoints"): {OPERATOR},
    ("GET", "/v1/as-of"): {OPERATOR},
    ("POST", "/v1/verifications/{region}"): {OPERATOR},
    ("GET", "/v1/verifications/{region}"): {OPERATOR},
    ("POST", "/v1/verifications/{region}/stop"): {OPERATOR},
    ("POST", "/v1/repairs/{region}"): {OPERATOR},
    ("POST", "/v1/restores"): {OPERATOR},
    ("GET", "/v1/salvage"): {OPERATOR},
    ("GET", "/v1/salvage/{region}"): {OPERATOR},
    ("GET", "/v1/salvage/{region}/{salvage}"): {OPERATOR},
    ("GET", "/v1/salvage/{region}/{salvage}/bodies/{seq}/{ordinal}"): {OPERATOR},
    ("POST", "/v1/salvage/{region}/{salvage}/discard"): {OPERATOR},
    ("GET", "/v1/status"): {OPERATOR, VIEWER},
    ("GET", "/v1/lag"): {OPERATOR, VIEWER},
    ("GET", "/v1/members"): {OPERATOR, VIEWER},
    ("GET", "/v1/incidents"): {OPERATOR, VIEWER},
    ("GET", "/v1/audit"): {OPERATOR, VIEWER},
    ("GET", "/v1/plans"): {OPERATOR, VIEWER},
    ("POST", "/v1/plans"): {OPERATOR},
    ("GET", "/v1/plans/{plan}"): {OPERATOR, VIEWER},
    ("GET", "/v1/plans/{plan}/journal"): {OPERATOR, VIEWER},
    ("POST", "/v1/plans/{plan}/approvals"): {OPERATOR},
    ("POST", "/v1/plans/{plan}/execute"): {OPERATOR},
    ("POST", "/v1/plans/{plan}/abort"): {OPERATOR},
    ("GET", "/metrics"): {OPERATOR, VIEWER},
    ("GET", "/"): {OPERATOR, VIEWER},
}
BODIES: dict[str, Any] = {
    "/v1/tasks": {"agent": "agent-1", "spec": {}},
    "/v1/hosts/{host}/beat": {"capacity": 1, "agents": []},
    "/v1/plans": {"kind": "failover", "to": "eu-central-1", "requester": "mallory"},
}
PLACES = {
    "agent": "agent-1",
    "record": "r1",
    "host": "worker-1",
    "region": "eu-west-1",
    "instance": "a",
    "epoch": "7",
    "plan": "p",
    "salvage": "0.5-8.0123456789abcdef",
    "seq": "5",
    "ordinal": "0",
}


@dataclass
class Place:
    """A controller behind its door, and a token of each role."""

    service: FakeService
    path: Path
    access: AccessFile
    tokens: dict[str, str]
    certificate: Certificate | None = None
    peers_by_certificate: bool = False
    open_metrics: bool = False
    app: Any = field(init=False)

    def __post_init__(self) -> None:
        entrance = Entrance(
            GROUP, frozenset(REGIONS), self.service.clock, self.access, frozenset({"peer.example.com"}),
            self.peers_by_certificate, self.open_metrics,
        )  # fmt: skip
        made = create_app(self.service, clock=self.service.clock, entrance=entrance)

        async def shown(scope: Any, receive: Any, send: Any) -> None:
            await made({**scope, CERTIFICATE: self.certificate}, receive, send)

        self.app = shown
        self.openapi = made.openapi

    def http(self, role: str = "") -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        headers = {"Authorization": f"Bearer {self.tokens[role]}"} if role else {}
        return httpx.AsyncClient(transport=transport, base_url="http://controller", headers=headers)


def stand(tmp_path: Path, **more: Any) -> Place:
    service = FakeService()
    service.role, service.right_seconds = Role.ACTIVE, 8.0
    document, tokens = AccessDocument(group=GROUP), {}
    for name, entry in {
        "agent": {"role": "agent", "agents": ("agent-*",), "hosts": ("worker-1",)},
        "other": {"role": "agent", "agents": ("billing/42",)},
        "operator": {"role": "operator", "person": "ada@example.org"},
        "viewer": {"role": "viewer"},
        "peer": {"role": "peer"},
        "expired": {"role": "operator", "expires_at": service.clock.wall() - 1},
        "foreign": {"role": "operator"},
    }.items():
        tokens[name], digest = new_token("another-group" if name == "foreign" else GROUP)
        document = with_entry(document, {"name": name, "sha256": digest, **entry})
    document = with_entry(document, {"name": "grafana", "role": "viewer", "certificate": "grafana.example.com"})
    path = tmp_path / "access.json"
    write_document(path, document)
    return Place(service, path, AccessFile(path, GROUP, 60), tokens, **more)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return stand(tmp_path)


@pytest.fixture
async def http(place: Place) -> AsyncIterator[httpx.AsyncClient]:
    async with place.http() as client:
        yield client


def frame(agent: str, record_id: str = "r1", body: bytes = b"state") -> Frame:
    return Frame(Record(agent, record_id, "checkpoint", sha256(body), len(body)), Encoding.RAW, body)


def code(answer: httpx.Response) -> str:
    found = answer.json()["error"]
    assert found["hint"]
    return str(found["code"])


async def call(client: httpx.AsyncClient, method: str, path: str) -> httpx.Response:
    if path.endswith("/records") and method == "POST":
        return await client.post(
            path.format(**PLACES), content=encode_frames([frame("agent-1")]), headers={"content-type": OCTETS}
        )
    params = {"prefix": "agent-"} if path == "/v1/agents" else {}
    body = BODIES.get(path, {}) if method == "POST" else None
    return await client.request(method, path.format(**PLACES), json=body, params=params)


# ----------------------------------------------------------------------------------------------------------- every route


async def test_every_route_is_in_the_table_and_asks_who_calls(place: Place, http: httpx.AsyncClient) -> None:
    described = {
        (method.upper(), path) for path, methods in place.openapi()["paths"].items() for method in methods
    }  # what the API says of itself: a new route must be put into the table
    assert described == set(MATRIX) | {("GET", path) for path in OPEN - {"/openapi.json"}}
    for method, path in MATRIX:
        answer = await call(http, method, path)
        assert (answer.status_code, code(answer)) == (401, "unauthenticated"), (method, path)
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in OPEN:
        assert (await http.get(path)).status_code in {200, 503}, path


@pytest.mark.parametrize("role", list(CallerRole))
async def test_each_role_is_let_through_where_the_table_says_so_and_nowhere_else(place: Place, role: CallerRole) -> None:
    async with place.http(role.value) as client:
        for (method, path), roles in MATRIX.items():
            answer = await call(client, method, path)
            if role in roles:
                assert answer.status_code not in {401, 403}, (method, path, answer.text)
            else:
                assert (answer.status_code, code(answer)) == (403, "forbidden"), (method, path)
                assert role.value in answer.text


SPELLINGS = (
    "//v1/status", "/v1/status/", "/V1/STATUS", "/v1/%73tatus", "/v1/peers/../status", "/livez/../v1/status", "/v1/nothing",
    "/livez/", "/docs", "/metrics/", "/v1/peers", "/.", "/v1/records?x=/livez", "/v1/records%3F/livez",
)  # fmt: skip


async def test_no_spelling_of_a_path_gets_past_the_door(http: httpx.AsyncClient) -> None:
    for method in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
        for path in SPELLINGS:
            request = httpx.Request(method, httpx.URL("http://controller", raw_path=path.encode()))
            assert (await http.send(request)).status_code == 401, (method, path)


async def test_probes_say_nothing_that_is_secret_and_ask_nobody(place: Place, http: httpx.AsyncClient) -> None:
    for path in ("/livez", "/readyz", "/active"):
        answer = await http.get(path, headers={"Authorization": "Bearer rubbish"})
        assert set(answer.json()) == {"ok", "region", "instance", "role", "reason"}
    assert (await http.get("/metrics")).status_code == 401


async def test_metrics_are_open_where_the_settings_say_so(tmp_path: Path) -> None:
    async with stand(tmp_path, open_metrics=True).http() as client:
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.get("/v1/status")).status_code == 401


# --------------------------------------------------------------------------------------------------------------- headers


async def test_tokens_that_are_forged_expired_of_another_group_or_revoked_are_refused(place: Place) -> None:
    for role, says in (("expired", "expired"), ("foreign", "another-group")):
        async with place.http(role) as client:
            answer = await client.get("/v1/status")
            assert (answer.status_code, code(answer)) == (401, "unauthenticated")
            assert says in answer.text
    place.tokens["forged"], _ = new_token(GROUP)
    async with place.http("forged") as client:
        assert "unknown" in (await client.get("/v1/status")).text
    async with place.http("viewer") as client:
        assert (await client.get("/v1/status")).status_code == 200
        write_document(place.path, without_entry(AccessDocument.model_validate_json(place.path.read_bytes()), "viewer"))
        assert place.access.look(1.0) == ""
        assert (await client.get("/v1/status")).status_code == 401


async def test_no_answer_repeats_a_token(place: Place) -> None:
    for role in place.tokens:
        async with place.http(role) as client:
            for method, path in (("GET", "/v1/status"), ("POST", "/v1/plans"), ("POST", "/v1/records")):
                answer = await call(client, method, path)
                assert place.tokens[role].split(".")[2] not in answer.text + str(answer.headers)


async def test_headers_that_want_to_be_two_things_at_once_are_refused(place: Place, http: httpx.AsyncClient) -> None:
    viewer, operator = (f"Bearer {place.tokens[role]}" for role in ("viewer", "operator"))

    async def status(*headers: tuple[str, str]) -> int:
        return (await http.get("/v1/status", headers=list(headers))).status_code

    assert await status(("Authorization", viewer)) == 200
    assert await status(("aUTHORIZATION", viewer.replace("Bearer", "bEARER"))) == 200
    assert await status(("Authorization", viewer), ("Authorization", operator)) == 401
    assert await status(("Authorization", "Bearer x"), ("authorization", operator)) == 401
    assert await status(("Authorization", f"{viewer}, {operator}")) == 401
    assert await status(("Authorization", "Bearer " + "A" * 10_240)) == 401
    assert await status(("X-Forwarded-Authorization", operator), ("Proxy-Authorization", operator)) == 401
    assert await status(("Cookie", f"authorization={operator}"), ("X-DR-Host", "worker-1")) == 401
    assert (await http.get(f"/v1/status?access_token={place.tokens['operator']}")).status_code == 401


async def test_a_broken_access_file_lets_nobody_in_after_its_time_and_says_wait(place: Place) -> None:
    place.path.write_text("{")
    place.access.look(0.0)
    async with place.http("viewer") as client:
        assert (await client.get("/v1/status")).status_code == 200
        place.access.look(61.0)
        answer = await client.get("/v1/status")
        assert (answer.status_code, code(answer)) == (503, "unavailable")
        assert "retry-after" in answer.headers
        assert (await client.get("/livez")).status_code == 200


# ---------------------------------------------------------------------------------------------------------------- agents


async def test_an_agents_token_reaches_its_own_agents_only(place: Place) -> None:
    for agent in ("billing/42", "agent-1"):
        place.service.bodies[agent, "r1"] = (frame(agent).record, b"state")
    async with place.http("agent") as client:
        for path in ("latest", "records", "records/r1"):
            assert (await client.get(f"/v1/agents/agent-1/{path}")).status_code == 200
            for name in ("billing%2F42", "agent", "Agent-1", "%61gent"):
                answer = await client.get(f"/v1/agents/{name}/{path}")
                assert answer.status_code in {403, 404}, name
                assert answer.content != b"state"
            assert code(await client.get(f"/v1/agents/billing%2F42/{path}")) == "forbidden"
        assert (await client.get("/v1/agents/%61gent-1/latest")).status_code == 200
        for prefix, expected in (("", 403), ("agent", 403), ("agent-", 200), ("agent-7", 200), ("billing", 403)):
            assert (await client.get("/v1/agents", params={"prefix": prefix})).status_code == expected, prefix
        assert (await client.post("/v1/tasks", json={"agent": "billing/42", "spec": {}})).status_code == 403
        running = {"capacity": 1, "agents": [{"agent": "agent-1", "attempt": 1}, {"agent": "billing/42", "attempt": 1}]}
        assert (await client.post("/v1/hosts/worker-1/beat", json=running)).status_code == 403
        assert (await client.post("/v1/hosts/worker-2/beat", json={"capacity": 1, "agents": []})).status_code == 403
    assert place.service.beats == []
    async with place.http("other") as client:  # an entry that names no host reports for none
        assert (await client.post("/v1/hosts/worker-1/beat", json={"capacity": 1, "agents": []})).status_code == 403


async def test_in_a_mixed_batch_the_records_of_others_fail_alone_and_are_not_written(place: Place) -> None:
    batch = [frame("agent-1", "a"), frame("billing/42", "b"), frame("agent-2", "c"), frame("billing/42", "d")]
    async with place.http("agent") as client:
        answer = await client.post("/v1/records", content=encode_frames(batch), headers={"content-type": OCTETS})
        assert answer.status_code == 200
        acks = answer.json()["acks"]
        assert [(ack["agent"], ack["id"], ack["status"]) for ack in acks] == [
            ("agent-1", "a", "acknowledged"),
            ("billing/42", "b", "failed"),
            ("agent-2", "c", "acknowledged"),
            ("billing/42", "d", "failed"),
        ]
        assert {ack["error"]["code"] for ack in acks if ack["status"] == "failed"} == {"forbidden"}
        assert set(place.service.bodies) == {("agent-1", "a"), ("agent-2", "c")}
        alone = await client.post("/v1/records", content=encode_frames(batch[1:2]), headers={"content-type": OCTETS})
        assert (alone.status_code, code(alone)) == (403, "forbidden")
        assert "billing/42" in alone.text


async def test_who_may_not_write_is_told_so_before_the_body_is_read(place: Place) -> None:
    read = 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": b"x", "more_body": False}

    statuses: list[int] = []

    async def send(message: Any) -> None:
        statuses.extend([message["status"]] if "status" in message else [])

    for token in (None, place.tokens["operator"], place.tokens["viewer"]):
        headers = [(b"content-type", OCTETS.encode()), (b"content-length", b"100000000")]
        headers += [(b"authorization", f"Bearer {token}".encode())] if token else []
        scope = {
            "type": "http", "method": "POST", "path": "/v1/records", "raw_path": b"/v1/records", "query_string": b"",
            "headers": headers, "http_version": "1.1", "scheme": "http", "root_path": "", "client": None, "server": None,
            "asgi": {"version": "3.0"},
        }  # fmt: skip
        await place.app(scope, receive, send)
    assert (statuses, read) == ([401, 403, 403], 0)


# ---------------------------------------------------------------------------------------------------------------- people


async def test_the_requester_is_who_was_shown_whatever_the_request_says(place: Place) -> None:
    async with place.http("operator") as client:
        given = {"kind": "failover", "to": "eu-central-1", "requester": "somebody-else", "reason": "silent"}
        made = (await client.post("/v1/plans", json=given)).json()
        assert made["record"]["plan"]["requester"] == "ada@example.org"


# ---------------------------------------------------------------------------------------------------------- certificates


async def test_a_verified_certificate_stands_for_its_entry_and_an_unknown_one_for_nobody(tmp_path: Path) -> None:
    place = stand(tmp_path, certificate=Certificate(frozenset({"grafana.example.com"}), 2e9))
    async with place.http() as client:
        assert (await client.get("/v1/status")).status_code == 200
        assert code(await client.post("/v1/plans", json=BODIES["/v1/plans"])) == "forbidden"
        place.certificate = Certificate(frozenset({"grafana.example.com"}), place.service.clock.wall())
        assert "expired" in (await client.get("/v1/status")).text
        place.certificate = Certificate(frozenset({"stranger.example.com"}), 2e9)
        assert code(await client.get("/v1/status")) == "unauthenticated"
    place.certificate = Certificate(frozenset({"grafana.example.com"}), 2e9)
    async with place.http("foreign") as client:  # what is in the header counts, and it is no good
        assert (await client.get("/v1/status")).status_code == 401


async def test_peer_routes_take_certificates_of_the_groups_controllers_and_nothing_else(tmp_path: Path) -> None:
    place = stand(tmp_path, peers_by_certificate=True)
    ours = f"drctl://{GROUP}/eu-west-1/a"
    async with place.http() as client, place.http("peer") as with_token:
        for name in (ours, "peer.example.com"):
            place.certificate = Certificate(frozenset({name}), 2e9)
            assert (await client.get("/v1/peers/positions")).status_code == 200, name
            assert (await with_token.get("/v1/peers/positions")).status_code == 401, "one answer for one request"
        for name in (
            "drctl://other/eu-west-1/a",
            f"drctl://{GROUP}/mars/a",
            f"drctl://{GROUP}/eu-west-1/",
            f"{ours}/b",
            f"https://{GROUP}/eu-west-1/a",
            "grafana.example.com",
            "",
        ):
            place.certificate = Certificate(frozenset({name}), 2e9)
            assert (await client.get("/v1/peers/positions")).status_code == 401, name
        place.certificate = Certificate(frozenset({ours}), place.service.clock.wall())
        assert (await client.get("/v1/peers/positions")).status_code == 401, "it has ended"
        place.certificate = None
        assert (await with_token.get("/v1/peers/positions")).status_code == 401, "a token is not enough"


async def test_a_revoked_certificate_is_refused_whatever_else_speaks_for_it_and_whoever_it_is_of(tmp_path: Path) -> None:
    place = stand(tmp_path, peers_by_certificate=True)
    ours, known = f"drctl://{GROUP}/eu-west-1/a", "grafana.example.com"
    document = AccessDocument.model_validate_json(place.path.read_bytes())
    gone = with_revoked(document, Revoked(fingerprint="ab" * 32))
    write_document(place.path, with_revoked(gone, Revoked(certificate=f"drctl://{GROUP}/eu-west-1/b")))
    async with place.http() as client, place.http("operator") as with_token:
        for names, path in (({ours}, "/v1/peers/positions"), ({known}, "/v1/status")):
            place.certificate = Certificate(frozenset(names), 2e9, "ab" * 32)
            assert (await client.get(path)).status_code == 200, "before the file was read again"
        assert place.access.look(1.0) == ""
        for names, path in (({ours}, "/v1/peers/positions"), ({known}, "/v1/status"), ({known, ours}, "/v1/status")):
            place.certificate = Certificate(frozenset(names), 2e9, "ab" * 32)
            for caller in (client, with_token):
                answer = await caller.get(path)
                assert (answer.status_code, code(answer)) == (401, "unauthenticated"), path
                assert "revoked" in answer.text
            place.certificate = Certificate(frozenset(names), 2e9, "cd" * 32)  # the renewed one
            assert (await client.get(path)).status_code == 200
        place.certificate = Certificate(frozenset({f"drctl://{GROUP}/eu-west-1/b"}), 2e9, "cd" * 32)
        assert "revoked" in (await client.get("/v1/peers/positions")).text, "by its name: renewed ones too"


async def test_a_controller_speaks_for_itself_only(tmp_path: Path) -> None:
    place = stand(
        tmp_path, peers_by_certificate=True, certificate=Certificate(frozenset({f"drctl://{GROUP}/eu-west-1/b"}), 2e9)
    )
    body, headers = encode_frames([frame("agent-1")]), {"content-type": OCTETS}
    async with place.http() as client:
        answer = await client.post("/v1/peers/eu-west-1/a/7/records", content=body, headers=headers)
        assert (answer.status_code, code(answer)) == (403, "forbidden")
        assert place.service.bodies == {}
        place.certificate = Certificate(frozenset({f"drctl://{GROUP}/eu-central-1/a"}), 2e9)
        assert (await client.post("/v1/peers/eu-central-1/a/7/records", content=body, headers=headers)).status_code == 200


async def test_without_an_access_file_peer_routes_still_want_a_certificate(tmp_path: Path) -> None:
    service = FakeService()
    service.role, service.right_seconds = Role.ACTIVE, 8.0
    entrance = Entrance(GROUP, frozenset(REGIONS), service.clock, peers_by_certificate=True)
    app = create_app(service, clock=service.clock, entrance=entrance)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://controller") as client:
        assert (await client.get("/v1/peers/positions")).status_code == 401
        assert (await client.get("/v1/status")).status_code == 200
        answer = await client.post("/v1/records", content=encode_frames([frame("x")]), headers={"content-type": OCTETS})
        assert IngestAnswer(**answer.json()).epoch == 7
