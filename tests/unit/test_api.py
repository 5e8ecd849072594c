"""The HTTP API in front of an in-memory controller: every route, and every kind of input that must not get through."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from urllib.parse import quote

import httpx
import pytest
from pydantic import TypeAdapter

from controller.domain.model import AgentSeen, Encoding, Frame, Record, Role, Unknown
from controller.errors import Corrupt, FenceLost, NotActive, OutcomeUnknown, Unavailable
from controller.runtime.api import create_app
from controller.runtime.api_documents import LagDocument
from controller.runtime.api_door import MAX_JSON_BYTES
from controller.runtime.service import Incident, JournalEntry, PlanDocument, PlanRequest, Status
from controller.stream.segment import encode_frames
from tests.support.fake_service import FakeService, sha256

OCTETS = {"content-type": "application/octet-stream"}


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
async def http(service: FakeService) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(service, clock=service.clock)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://controller") as client:
        yield client


def frame(agent: str = "agent-1", record_id: str = "r1", body: bytes = b"state", **meta: str) -> Frame:
    return Frame(Record(agent, record_id, "checkpoint", sha256(body), len(body), meta=meta), Encoding.RAW, body)


def make_active(service: FakeService) -> None:
    service.role, service.right_seconds = Role.ACTIVE, 8.0


def error_of(answer: httpx.Response) -> dict[str, object]:
    error: dict[str, object] = answer.json()["error"]
    assert {"code", "message", "hint", "exit_code"} <= set(error)
    assert error["hint"]
    return error


# ---------------------------------------------------------------------------------------------------------------- agents


async def test_an_agents_record_goes_in_as_frames_and_comes_back_as_bytes(
    http: httpx.AsyncClient, service: FakeService
) -> None:
    make_active(service)
    sent = frame("team/α b", "r/1", note="ü")
    answer = await http.post("/v1/records", content=encode_frames([sent]), headers=OCTETS)
    assert answer.status_code == 200
    assert answer.json()["right_seconds"] == 8.0
    assert answer.json()["acks"][0]["status"] == "acknowledged"
    name = quote("team/α b", safe="")
    for path in (f"/v1/agents/{name}/latest", f"/v1/agents/{name}/latest?kind=checkpoint", f"/v1/agents/{name}/records/r%2F1"):
        found = await http.get(path)
        assert found.status_code == 200, found.text
        assert found.content == b"state"
        assert found.headers["content-type"] == "application/octet-stream"
        assert found.headers["x-dr-record"].isascii()
        assert TypeAdapter(Record).validate_json(found.headers["x-dr-record"]) == sent.record
    listed = await http.get(f"/v1/agents/{name}/records?limit=5")
    assert TypeAdapter(tuple[Record, ...]).validate_json(listed.content) == (sent.record,)


async def test_a_record_with_huge_meta_still_has_a_header_that_clients_accept(
    http: httpx.AsyncClient, service: FakeService
) -> None:
    service.bodies["a", "r"] = (replace(frame("a", "r").record, meta={"k": "v" * 60_000}), b"state")
    found = await http.get("/v1/agents/a/latest")
    assert found.headers["x-dr-meta"] == "omitted"
    assert json.loads(found.headers["x-dr-record"])["id"] == "r"


async def test_a_standby_says_who_is_active(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/records", content=encode_frames([frame()]), headers=OCTETS)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    error = error_of(answer)
    assert error["code"] == "not_active"
    assert error["active"] == "http://127.0.1.1:8080"
    assert error["exit_code"] == 3


async def test_damaged_batches_are_the_senders_fault(http: httpx.AsyncClient, service: FakeService) -> None:
    make_active(service)
    good = bytearray(encode_frames([frame()]))
    good[len(good) // 2] ^= 1
    for body in (b"", b"x", bytes(good), b"\x00" * 2_000_000):
        answer = await http.post("/v1/records", content=body, headers=OCTETS)
        assert answer.status_code == 400, body[:10]
        assert error_of(answer)["code"] == "corrupt"
    assert (await http.post("/v1/records", json={})).status_code == 422
    assert error_of(await http.post("/v1/records", content=encode_frames([]), headers=OCTETS))["code"] in ("usage", "corrupt")
    assert "ingest" not in service.calls


async def test_a_beat_carries_attempts_in_and_assignments_out(http: httpx.AsyncClient, service: FakeService) -> None:
    make_active(service)
    assert (await http.post("/v1/tasks", json={"agent": "a1", "spec": {"goal": [1, {"x": None}]}})).status_code == 200
    answer = await http.post("/v1/hosts/host%2F1/beat", json={"capacity": 4, "agents": [{"agent": "a1", "attempt": 3}]})
    assert answer.status_code == 200, answer.text
    assert answer.json()["assignments"][0]["spec"] == {"goal": [1, {"x": None}]}
    assert service.beats[0].host == "host/1"
    assert service.beats[0].agents[0].attempt == 3


@pytest.mark.parametrize(
    "name",
    ["%00", "a%1Bb", "a%E2%80%AEb", "%C2%85", "%E2%80%8B", "%ff", "a" * 201, quote("é" * 201)],
)
async def test_names_with_control_or_direction_characters_are_refused(
    http: httpx.AsyncClient, service: FakeService, name: str
) -> None:
    for path in (f"/v1/agents/{name}/latest", f"/v1/agents/{name}/records", f"/v1/plans/{name}"):
        answer = await http.get(path)
        assert answer.status_code == 422
        assert error_of(answer)["code"] == "usage"
        assert answer.content.isascii()
    assert (await http.post(f"/v1/hosts/{name}/beat", json={"capacity": 1})).status_code == 422
    assert service.calls == []


# ---------------------------------------------------------------------------------------------------------------- people


async def test_documents_decode_into_what_the_service_gave(http: httpx.AsyncClient, service: FakeService) -> None:
    service.seen_agents = (AgentSeen("a", 3, "r3", 9, 1.8e9, 1),)
    status = TypeAdapter(Status).validate_json((await http.get("/v1/status")).content)
    assert status == await service.status()
    assert isinstance(status.exposure_seconds, Unknown)
    lag = TypeAdapter(LagDocument).validate_json((await http.get("/v1/lag")).content)
    assert lag == LagDocument.of(status)
    assert (await http.get("/v1/members")).json()[0]["instance"] == "a"
    assert (await http.get("/v1/agents")).json()[0]["latest_id"] == "r3"
    assert (await http.get("/v1/incidents?include_closed=true")).json() == []


async def test_a_plan_is_made_shown_and_aborted(http: httpx.AsyncClient, service: FakeService) -> None:
    made = await http.post("/v1/plans", json={"kind": "failover", "to": "eu-central-1", "requester": "oncall", "reason": "x"})
    assert made.status_code == 201
    document = TypeAdapter(PlanDocument).validate_json(made.content)
    assert document.missing_approvals == 2
    assert (await http.get("/v1/plans")).json()[0]["digest"] == document.record.digest
    assert (await http.get("/v1/plans/p-0001/journal")).json() == []
    refused = await http.post("/v1/plans/p-0001/execute", json={"requester": "oncall", "confirm": "eu-central-1"})
    assert refused.status_code == 403
    assert error_of(refused)["exit_code"] == 6
    aborted = await http.post("/v1/plans/p-0001/abort", json={"requester": "oncall"})
    assert aborted.json()["record"]["state"] == "aborted"
    again = await http.post("/v1/plans/p-0001/abort", json={"requester": "oncall"})
    assert error_of(again)["exit_code"] == 5
    assert (await http.get("/v1/audit?after=0")).json()[0]["action"] == "plan.create"
    assert (await http.get("/v1/audit?after=1")).json() == []


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"kind": "failover", "to": "eu-central-1"}, "requester"),
        ({"kind": "promote", "to": "eu-central-1", "requester": "a"}, "kind"),
        ({"kind": "failover", "to": "", "requester": "a"}, "to"),
        ({"kind": "failover", "to": "x" * 65, "requester": "a"}, "to"),
        ({"kind": "failover", "to": "eu-central-1", "requester": "a\u202eb"}, "requester"),
        ({"kind": "failover", "to": "eu-central-1", "requester": "a", "reason": "\x1b[2J"}, "reason"),
        ({"kind": "failover", "to": "eu-central-1", "requester": "a", "reason": "r" * 2001}, "reason"),
        ({"kind": "failover", "to": "eu-central-1", "requester": "a", "break_glass": "yes"}, "break_glass"),
        ({"kind": "failover", "to": "eu-central-1", "requester": "a", "force": True}, "force"),
        (["failover"], "body"),
        ("failover", "body"),
    ],
)
async def test_a_plan_request_with_a_bad_field_names_it(
    http: httpx.AsyncClient, service: FakeService, body: object, field: str
) -> None:
    answer = await http.post("/v1/plans", json=body)
    assert answer.status_code == 422
    error = error_of(answer)
    assert error["code"] == "usage"
    assert field in str(error["message"])
    assert service.calls == []


async def test_break_glass_without_a_reason_unknown_and_current_regions_are_refused(http: httpx.AsyncClient) -> None:
    base = {"kind": "failover", "to": "eu-central-1", "requester": "a"}
    for change in ({"break_glass": True, "reason": "  "}, {"to": "mars"}, {"to": "eu-west-1"}):
        answer = await http.post("/v1/plans", json={**base, **change})
        assert answer.status_code == 422
        assert error_of(answer)["code"] == "refused"


@pytest.mark.parametrize(
    "text",
    [
        '{"principal":"a","decision":"approve","expires_at":NaN,"signature":"s"}',
        '{"principal":"a","decision":"approve","expires_at":1e999,"signature":"s"}',
        '{"principal":"a","decision":"approve","expires_at":"tomorrow","signature":"s"}',
        '{"principal":"a","decision":"perhaps","expires_at":1,"signature":"s"}',
        '{"principal":"a","decision":"approve","expires_at":1,"signature":""}',
        '{"principal":"a","decision":"approve","expires_at":1,"signature":"s","digest":"../x"}',
        '{"principal":"","decision":"approve","expires_at":1,"signature":"s"}',
        '{"principal":"a","decision":"approve","expires_at":1,"signature":"' + "s" * 20_000 + '"}',
        "{",
        "",
        "[" * 100_000,
        '{"a":' * 100_000,
        "\x00",
    ],
)
async def test_malformed_approvals_never_reach_the_service(http: httpx.AsyncClient, service: FakeService, text: str) -> None:
    answer = await http.post("/v1/plans/p-0001/approvals", content=text, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    assert error_of(answer)["code"] == "usage"
    assert service.calls == []


async def test_deep_or_infinite_specs_are_refused(http: httpx.AsyncClient, service: FakeService) -> None:
    deep = '{"agent":"a","spec":{"x":' + "[" * 900 + "]" * 900 + "}}"
    for text in (deep, '{"agent":"a","spec":{"x":NaN}}', '{"agent":"a","spec":[1]}'):
        answer = await http.post("/v1/tasks", content=text, headers={"content-type": "application/json"})
        assert answer.status_code == 422, text[:60]
        assert error_of(answer)["code"] == "usage"
    assert service.calls == []


async def test_forms_and_plain_text_are_not_json(http: httpx.AsyncClient, service: FakeService) -> None:
    """A web page can make a browser send these without asking; it cannot make it send JSON."""
    text = json.dumps({"requester": "a"})
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = await http.post("/v1/plans/p-0001/abort", content=text, headers={"content-type": kind})
        assert answer.status_code == 422
    assert service.calls == []


async def test_bodies_over_the_limit_are_refused_declared_or_not(http: httpx.AsyncClient, service: FakeService) -> None:
    async def drip() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 65_536

    declared = await http.post("/v1/plans", content=b" " * (MAX_JSON_BYTES + 1), headers={"content-type": "application/json"})
    undeclared = await http.post("/v1/plans", content=drip(), headers={"content-type": "application/json"})
    for answer in (declared, undeclared):
        assert answer.status_code == 413
        assert error_of(answer)["code"] == "refused"
    for length in ("-1", "abc", "9" * 30):
        odd = await http.post(
            "/v1/plans", content=b"{}", headers={"content-length": length, "content-type": "application/json"}
        )
        assert odd.status_code == 413
    assert service.calls == []


@pytest.mark.parametrize("query", ["after=-1", "after=x", "limit=0", "limit=1001", "after=9223372036854775808"])
async def test_query_numbers_have_bounds(http: httpx.AsyncClient, query: str) -> None:
    assert (await http.get(f"/v1/audit?{query}")).status_code == 422


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Unavailable("etcd does not answer", hint="wait"), 503, "unavailable"),
        (OutcomeUnknown("the answer was lost", hint="look"), 503, "outcome_unknown"),
        (NotActive("standby", hint="ask", active=None), 503, "not_active"),
        (FenceLost("epoch 9"), 409, "fence_lost"),
        (Corrupt("segment 3", hint="repair"), 500, "corrupt"),
    ],
)
async def test_each_error_has_its_status_and_code(
    http: httpx.AsyncClient, service: FakeService, error: Exception, status: int, code: str
) -> None:
    service.fail_with = error
    answer = await http.get("/v1/status")
    assert answer.status_code == status
    assert error_of(answer)["code"] == code


async def test_an_unforeseen_error_shows_nothing_of_itself(http: httpx.AsyncClient, service: FakeService) -> None:
    service.fail_with = RuntimeError("password=hunter2")
    answer = await http.get("/v1/status")
    assert answer.status_code == 500
    assert error_of(answer)["code"] == "bug"
    assert "hunter2" not in answer.text
    assert "RuntimeError" not in answer.text


async def test_unknown_paths_and_methods_answer_in_the_same_form(http: httpx.AsyncClient) -> None:
    assert error_of(await http.get("/v1/nothing"))["code"] == "usage"
    assert (await http.delete("/v1/plans")).status_code == 405
    assert (await http.get("/v1/agents/a%2Fb%2Flatest")).status_code == 404


# ---------------------------------------------------------------------------------------------------------------- probes


async def test_active_is_only_the_holder_with_a_live_right(http: httpx.AsyncClient, service: FakeService) -> None:
    for role in Role:
        for right in (0.0, 5.0):
            service.role, service.right_seconds = role, right
            answer = await http.get("/active")
            assert (answer.status_code == 200) == (role is Role.ACTIVE and right > 0)
            assert answer.json()["role"] == role.value
            assert answer.json()["reason"]


async def test_liveness_does_not_depend_on_readiness(http: httpx.AsyncClient, service: FakeService) -> None:
    service.is_ready = (False, "follower is 90 s behind")
    assert (await http.get("/livez")).status_code == 200
    ready = await http.get("/readyz")
    assert ready.status_code == 503
    assert ready.json()["reason"] == "follower is 90 s behind"
    assert b"dr_epoch 7" in (await http.get("/metrics")).content


async def test_the_openapi_document_names_bodies_and_errors(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    paths = document["paths"]
    assert "application/octet-stream" in paths["/v1/records"]["post"]["requestBody"]["content"]
    for path, methods in paths.items():
        for method, route in methods.items():
            assert "default" in route["responses"], (path, method)
            assert route["summary"]
            wanted = {part[1:-1] for part in path.split("/") if part.startswith("{")}
            assert wanted == {p["name"] for p in route.get("parameters", []) if p["in"] == "path"}
    assert paths["/v1/plans"]["post"]["responses"]["201"]["content"]["application/json"]["schema"]["$ref"].endswith(
        "PlanDocument"
    )


# ------------------------------------------------------------------------------------------------------------ status page


async def test_the_page_says_what_is_wrong_what_to_type_and_what_is_unknown(
    http: httpx.AsyncClient, service: FakeService
) -> None:
    service.open_incidents.append(Incident("i1", "region-silent", "eu-west-1 <b>silent</b>", "d\u202ed", 1.8e9 - 60, "a"))
    await service.create_plan(PlanRequest("failover", "eu-central-1", "oncall", "x"))
    service.journals["p-0001"] = [JournalEntry("p-0001", "fence", 1.8e9 - 3, 0.0, "eu-central-1/a", 8, "2 of 3 stores fenced")]
    answer = await http.get("/")
    text = answer.text
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for expected in (
        "us-east-1 does not answer",
        "drctl plan failover",
        "unknown for 1 min 10 s",
        "41 records + unknown, at most 3.3 s",
        "running for 3.0 s",
        "2 of 3 stores fenced",
        "&lt;b&gt;silent&lt;/b&gt;",
        "d\\u202ed",
        'http-equiv="refresh"',
    ):
        assert expected in text, expected
    assert "<b>silent" not in text
    assert "\u202e" not in text
    for outside in ("http://", "https://", "<script", "src="):
        assert outside not in text


async def test_the_page_works_when_nothing_else_does(http: httpx.AsyncClient, service: FakeService) -> None:
    service.fail_with = Unavailable("etcd does not answer since 40 s", hint="look at etcd first")
    service.is_ready = (False, "etcd unreachable")
    answer = await http.get("/")
    assert answer.status_code == 200
    for expected in ("etcd does not answer since 40 s", "look at etcd first", "NOT READY", "standby"):
        assert expected in answer.text


async def test_the_page_shows_an_unknown_authority_and_no_holder(http: httpx.AsyncClient, service: FakeService) -> None:
    now = service.clock.now
    service.status_changes = {"authority": Unknown(now - 5, "etcd"), "holders": Unknown(now - 5, "etcd"), "traffic_epoch": 7}
    assert "unknown for 5.0 s (etcd)" in (await http.get("/")).text
    service.status_changes = {"holders": ()}
    assert "Nobody holds the lease" in (await http.get("/")).text
