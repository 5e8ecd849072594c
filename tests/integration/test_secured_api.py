"""Everything switched on, over real sockets: TLS, tokens, certificates of controllers. Records go in, people move the fleet
by drctl, and whoever has no business there is refused at every door."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import controller.agent
from controller.agent import AsyncCheckpoints, Checkpoints
from controller.agent.spool import Letter, Spool
from controller.domain.sharing import stream_of
from controller.errors import Forbidden, Misconfigured, NotFound, Unauthenticated, Unavailable
from controller.lab.certificates import Authority, Pair
from tests.support.drctl import Drctl
from tests.support.served import GROUP, PEOPLE, REGIONS, TWIN, ServedController

STREAMS = 2
AGENTS = [f"agent-{number}" for number in range(8)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedController]:
    with ServedController(tmp_path_factory.mktemp("secured"), twin=True, secured=True, stream={"streams": STREAMS}) as made:
        yield made


@pytest.fixture(scope="module")
def token(served: ServedController) -> str:
    """Of a host that runs the agents whose names begin with agent-."""
    return served.token("host", "agent", agents=("agent-*",), hosts=("worker-1",))


def peer_context(ca: Path, pair: Pair | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca)
    if pair is not None:
        context.load_cert_chain(pair.cert_file, pair.key_file)
    return context


def test_records_travel_by_either_instance_to_the_holder_of_their_stream_and_are_read_again(
    served: ServedController, token: str
) -> None:
    """Which takes the way between controllers: TLS, and each other's certificates."""
    assert {stream_of(agent, STREAMS) for agent in AGENTS} == {"s00", "s01"}

    async def story() -> None:
        for name in (REGIONS[0], TWIN):
            url = served.places[name].url
            async with AsyncCheckpoints([url], follow_hints=False, token=token, ca_file=served.ca_file) as client:
                letters = [Letter(agent, name, "checkpoint", agent.encode(), None, 0.0, 1, 0, {}) for agent in AGENTS]
                assert len(await client.put_many(letters, timeout_seconds=30)) == len(AGENTS)
                for agent in AGENTS:
                    found = await client.latest(agent, timeout_seconds=30)
                    assert found is not None
                    assert found[1] == agent.encode()

    held = {name: served.places[name].controller for name in (REGIONS[0], TWIN)}
    served.until(lambda: all(one is not None and one.may_act() for one in held.values()), "a stream on each instance")
    asyncio.run(story())


def test_a_client_is_let_in_by_its_token_and_reaches_its_own_agents(served: ServedController, token: str) -> None:
    options = {"ca_file": served.ca_file, "timeout_seconds": 20.0}
    with Checkpoints(served.urls, token=token, **options) as client:
        client.put("agent-0", "own", b"state")
        for act in (lambda: client.put("billing", "1", b""), lambda: client.latest("billing"), client.agents):
            with pytest.raises(Forbidden):
                act()
    with Checkpoints(served.urls, **options) as client, pytest.raises(Unauthenticated):
        client.put("agent-0", "none", b"state")
    other = served.token("other", "agent", agents=("billing",))
    with Checkpoints(served.urls, token=other, **options) as client, pytest.raises(Forbidden):
        client.get("agent-0", "own")


def test_what_the_page_for_agents_owners_says_of_credentials_works(served: ServedController, tmp_path: Path) -> None:
    page = (Path(controller.agent.__file__).parent / "README.md").read_text()
    block = re.search(r"^```python credentials\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert block is not None
    token_file = tmp_path / "worker-1.token"
    token_file.write_text(served.token("worker-1", "agent", agents=("team-a/*",)))
    names = {"Checkpoints": Checkpoints, "endpoints": served.urls, "token_file": token_file, "ca_file": served.ca_file}
    exec(compile(block[1], "README.md: credentials", "exec"), names)
    client = names["client"]
    assert isinstance(client, Checkpoints)
    assert client.get("team-a/42", "step-0001")[1] == b"state"
    client.close()


def test_a_token_that_is_over_leaves_spooled_records_where_they_are_and_a_renewed_one_sends_them(
    served: ServedController, tmp_path: Path
) -> None:
    path, dead = tmp_path / "token", "dr1.served." + "A" * 43
    path.write_text(dead)
    spool = Spool(tmp_path / "spool.db")
    spool.add(Letter("agent-9", "late", "checkpoint", b"state", None, 0.0, 1, 0, {}))
    with Checkpoints(served.urls, token_file=path, ca_file=served.ca_file, spool=spool, timeout_seconds=20.0) as client:
        with pytest.raises(Unauthenticated):
            client.put("agent-8", "now", b"state")
        assert (spool.waiting("agent-9"), spool.rejected()) == (1, ())
        path.write_text(served.token("renewed", "agent", agents=("agent-*",)))
        served.until(lambda: not spool.waiting("agent-9"), "the spool to be empty")
        assert client.get("agent-9", "late")[1] == b"state"
        assert spool.rejected() == ()


def test_neither_side_speaks_in_the_clear_or_to_somebody_that_nobody_vouches_for(
    served: ServedController, token: str, tmp_path: Path
) -> None:
    plain = served.urls[0].replace("https://", "http://")
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{plain}/livez", timeout=5)
    with Checkpoints([plain], token=token, timeout_seconds=1.0) as client, pytest.raises(Unavailable):
        client.put("agent-0", "plain", b"")
    with pytest.raises(Misconfigured, match="plain text"):
        Checkpoints(["http://10.0.0.1:8080"], token=token)
    strange = Authority(tmp_path, "strange")
    with (
        Checkpoints(served.urls[:1], token=token, ca_file=strange.cert_file, timeout_seconds=1.0) as client,
        pytest.raises(Unavailable, match="certificate"),
    ):
        client.put("agent-0", "deceived", b"")
    with httpx.Client(verify=ssl.create_default_context(cafile=served.ca_file), trust_env=False) as http:
        named = served.urls[0].replace("127.0.0.1", "localhost")
        with pytest.raises(httpx.ConnectError, match="certificate"):
            http.get(f"{named}/livez")  # another name than the certificate's
        assert http.get(f"{served.urls[0]}/livez").status_code == 200


def test_peer_routes_open_to_certificates_of_the_groups_controllers_alone(
    served: ServedController, token: str, tmp_path: Path
) -> None:
    assert served.signer is not None
    url = f"{served.places[TWIN].url}/v1/peers/positions"
    operator = served.token("op", "operator")

    def status(pair: Pair | None, bearer: str = "") -> int:
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        with httpx.Client(verify=peer_context(served.ca_file, pair), trust_env=False) as http:
            return http.get(url, headers=headers, timeout=10).status_code

    assert status(served.signer.issue("good", uris=[f"drctl://{GROUP}/{REGIONS[0]}/x"])) == 200
    assert status(served.signer.issue("other", uris=[f"drctl://staging/{REGIONS[0]}/x"])) == 401
    assert status(served.signer.issue("agent", hosts=["agent.example.com"])) == 401
    assert [status(None), status(None, operator), status(None, token)] == [401, 401, 401]
    strange = Authority(tmp_path).issue("strange", uris=[f"drctl://{GROUP}/{REGIONS[0]}/x"])
    with pytest.raises(httpx.HTTPError):
        status(strange)


def test_a_revoked_certificate_is_refused_also_on_a_connection_that_stands(served: ServedController, drctl: Drctl) -> None:
    assert served.signer is not None
    place = served.places[TWIN]
    assert place.credentials is not None
    peer = served.signer.issue("gone", uris=[f"drctl://{GROUP}/{REGIONS[0]}/gone"])
    wall = served.signer.issue("wall", hosts=["wall.example.com"])
    entry = ("token", "create", "wall", "--role", "viewer", "--certificate", "wall.example.com", "--file", served.access_file)
    assert drctl(*entry).code == 0
    place.credentials.look(0.0)
    for pair, path in ((peer, "/v1/peers/positions"), (wall, "/v1/status")):
        with (
            httpx.Client(verify=peer_context(served.ca_file, pair), trust_env=False, base_url=place.url, timeout=10) as http,
            httpx.Client(verify=peer_context(served.ca_file, pair), trust_env=False, base_url=place.url, timeout=10) as anew,
        ):
            with http.stream("GET", path) as answer:
                connection = answer.extensions["network_stream"].get_extra_info("client_addr")
                assert answer.status_code == 200
                answer.read()
            assert drctl("token", "revoke-certificate", pair.cert_file, "--file", served.access_file).code == 0
            assert place.credentials.look(0.0)["access"] == ""
            with http.stream("GET", path) as answer:
                assert answer.extensions["network_stream"].get_extra_info("client_addr") == connection, "another connection"
                assert answer.status_code == 401
                assert "revoked" in answer.read().decode()
            assert anew.get(path).status_code == 401
    other = served.signer.issue("stays", uris=[f"drctl://{GROUP}/{REGIONS[0]}/stays"])
    with httpx.Client(verify=peer_context(served.ca_file, other), trust_env=False, base_url=place.url, timeout=10) as http:
        assert http.get("/v1/peers/positions").status_code == 200


def test_a_renewed_certificate_is_shown_to_new_connections_without_a_restart(served: ServedController) -> None:
    assert served.signer is not None
    place = served.places[REGIONS[2]]
    assert place.credentials is not None
    instance = f"{REGIONS[2]}-a"
    before = _serial(place.url, served.ca_file)
    served.signer.issue(instance, hosts=["127.0.0.1"], uris=[f"drctl://{GROUP}/{REGIONS[2]}/{instance}"])
    assert place.credentials.look(0.0) == {"tls": "", "access": "", "peer-token": ""}
    after = _serial(place.url, served.ca_file)
    assert before != after
    pair = served.signer.issue("half", hosts=["127.0.0.1"])
    (pair.cert_file.parent / f"{instance}.pem").write_bytes(pair.cert_file.read_bytes())  # and the old key
    assert instance in place.credentials.look(0.0)["tls"]
    assert _serial(place.url, served.ca_file) == after


def _serial(url: str, ca_file: Path) -> str:
    with (
        httpx.Client(verify=ssl.create_default_context(cafile=ca_file), trust_env=False) as http,
        http.stream("GET", f"{url}/livez", timeout=10) as answer,
    ):
        found = answer.extensions["network_stream"].get_extra_info("ssl_object").getpeercert()
        return str(found["serialNumber"])


def test_the_audit_names_who_was_shown_and_never_what_a_request_says_of_itself(served: ServedController, token: str) -> None:
    """Plans, orders to stop, and restores, on real controllers; every other route: ``tests/unit/test_audited_actor.py``."""
    carol = served.token("carol-desk", "operator", person="carol@example.org")
    headers = {"Authorization": f"Bearer {carol}", "From": "mallory@example.org"}
    with Checkpoints(served.urls, token=token, ca_file=served.ca_file, timeout_seconds=20.0) as client:
        client.put("agent-7", "first", b"1", copies=2)
        at = time.time()
        time.sleep(0.05)  # a point in time between two records
        client.put("agent-7", "second", b"2", copies=2)
    url = next(place.url for place in served.places.values() if place.controller and place.controller.may_act())
    with httpx.Client(verify=ssl.create_default_context(cafile=served.ca_file), trust_env=False, timeout=20) as http:

        def post(path: str, **body: object) -> Any:
            for base in (url, *served.urls):  # a restore is for whoever holds the agent's stream
                answer = http.post(f"{base}{path}", json={**body, "requester": "mallory@example.org"}, headers=headers)
                if answer.status_code < 300:
                    return answer.json()
            raise AssertionError(answer.text)

        before = http.get(f"{url}/v1/audit?limit=1000", headers=headers).json()[-1]["n"]
        made = post("/v1/plans", kind="switchover", to=REGIONS[2], reason="a test")
        plan = made["record"]["plan"]["id"]
        post(f"/v1/plans/{plan}/abort", reason="not now")
        item = {"agent": "agent-7", "record": "first", "newest": "second"}
        post("/v1/restores", at=at, kind="checkpoint", items=[item], confirm=GROUP, force=True)
        entries = http.get(f"{url}/v1/audit?limit=1000&after={before}", headers=headers).json()
    ours = {entry["action"]: entry for entry in entries if entry["action"] in {"plan", "aborted", "restore"}}
    assert {action: entry["actor"] for action, entry in ours.items()} == dict.fromkeys(
        ("plan", "aborted", "restore"), "carol@example.org"
    )
    assert "mallory" not in json.dumps(entries)


@pytest.mark.timeout(180)
def test_people_move_the_fleet_by_tokens_and_signatures_and_the_audit_says_who(
    served: ServedController, token: str, drctl: Drctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Last in this file: afterwards another region is active."""
    target = REGIONS[1]
    secret = tmp_path / "carol"
    secret.write_text(served.token("carol-laptop", "operator", person="carol@example.org"))
    viewer = tmp_path / "viewer"
    viewer.write_text(served.token("wallboard", "viewer"))
    monkeypatch.setenv("DR_CA_FILE", str(served.ca_file))
    ends = [word for url in served.urls for word in ("--endpoint", url)]

    def run(*words: object, show: Path | None = secret, code: int = 0) -> str:
        monkeypatch.setenv("DR_TOKEN_FILE", str(show or ""))
        done = drctl(*ends, *[str(word) for word in words])
        assert done.code == code, (words, done.out, done.err)
        for path in (secret, viewer):
            assert path.read_text() not in done.out + done.err
        return done.out + done.err

    with Checkpoints(served.urls, token=token, ca_file=served.ca_file, timeout_seconds=20.0) as client:
        client.put("agent-0", "before", b"state", copies=2)
    assert "nobody said who calls" in run("status", show=None, code=9)
    assert "is active" in run("status", show=viewer)
    move = ("plan", "switchover", "--to", target, "--reason", "a test", "--requester", "somebody-else", "-o", "json")
    assert "viewer" in run(*move, show=viewer, code=5)
    made = json.loads(run(*move))
    plan = made["record"]["plan"]["id"]
    assert made["record"]["plan"]["requester"] == "carol@example.org"
    for who in PEOPLE:
        key = served.access_file.parent / who.split("@", maxsplit=1)[0]
        run("approve", plan, "--key", key, "--principal", who, "--confirm", target)
    run("promote", plan, "--execute", "--confirm", target)
    served.wait_until_active(target)
    with Checkpoints(served.urls, token=token, ca_file=served.ca_file, timeout_seconds=30.0) as client:
        assert client.get("agent-0", "before")[1] == b"state"
        client.put("agent-0", "after", b"state")
        with pytest.raises(NotFound):
            client.get("agent-0", "never")
    entries = json.loads(run("audit", "-o", "json"))
    by_action = {entry["action"]: entry for entry in entries if entry["subject"] == plan}
    assert by_action["plan"]["actor"] == by_action["execute"]["actor"] == "carol@example.org"
    assert by_action["approve"]["detail"]["sent_by"] == "carol-laptop"
    assert by_action["approve"]["actor"] in PEOPLE
