"""``drctl`` as people use it: the real command line against a real HTTP server in front of an in-memory controller."""

from __future__ import annotations

import importlib
import io
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import uvicorn
import yaml

from controller.adapters.identity import SshIdentity, generate_key
from controller.cli import main, render
from controller.cli.client import Client
from controller.cli.session import parse_duration
from controller.domain.model import AgentSeen, Unknown
from controller.domain.plan import NO_LOSS
from controller.domain.promotion import Event, State
from controller.domain.text import visible
from controller.errors import OutcomeUnknown, Unavailable
from controller.runtime import wording
from controller.runtime.api import create_app
from controller.runtime.service import Incident
from controller.runtime.wording import duration, loss_seconds
from tests.support.fake_service import FakeClock, FakeService, make_loss


@dataclass
class Site:
    """A controller that listens on loopback."""

    service: FakeService
    url: str
    keys: Path


def serve(service: FakeService) -> tuple[uvicorn.Server, threading.Thread, str]:
    listener = socket.create_server(("127.0.0.1", 0))  # listens at once: who calls before the thread runs waits for it
    app = create_app(service, clock=service.clock)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    return server, thread, f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    lines = [f"{name} {generate_key(tmp_path / name, name)}" for name in ("alice", "bob", "oncall")]
    signers = tmp_path / "allowed_signers"
    signers.write_text("\n".join(lines) + "\n")
    generate_key(tmp_path / "mallory", "mallory")
    service = FakeService(FakeClock(time.time()), SshIdentity(signers))
    server, thread, url = serve(service)
    for name in ("DRCTL_PRINCIPAL", "DR_CONFIG", "DRCTL_DEBUG", "DR_TOKEN_FILE", "DR_CA_FILE", "DR_CERT_FILE", "DR_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DRCTL_ENDPOINTS", url)
    monkeypatch.setattr("controller.cli.plans.POLL_SECONDS", 0.01)
    monkeypatch.setattr("controller.cli.client.READ_SECONDS", 120.0)  # how busy this machine is, is not what is tested here
    yield Site(service, url, tmp_path)
    server.should_exit = True
    thread.join(10)


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def drctl(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    def call(*argv: str | Path, typed: str | None = None) -> Result:
        """``typed``: what stands on the terminal; None = there is no terminal."""
        stdin = Terminal(typed) if typed is not None else io.StringIO("")
        monkeypatch.setattr(sys, "stdin", stdin)
        capsys.readouterr()
        code = main.run([str(arg) for arg in argv])
        seen = capsys.readouterr()
        return Result(code, seen.out, seen.err)

    return call


class Terminal:
    """A terminal on which something was typed; ``^C`` as the text is Ctrl-C."""

    def __init__(self, typed: str) -> None:
        self._lines = io.StringIO(typed)

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        line = self._lines.readline()
        if line == "^C":
            raise KeyboardInterrupt
        return line


Drctl = Callable[..., Result]


def planned(drctl: Drctl) -> str:
    made = drctl("plan", "failover", "--to", "eu-central-1", "--reason", "silent", "--requester", "oncall", "-o", "json")
    assert made.code == 0, made.err
    return str(json.loads(made.out)["record"]["plan"]["id"])


def approve(drctl: Drctl, site: Site, plan: str, who: str, *more: str | Path) -> Result:
    return drctl("approve", plan, "--key", site.keys / who, "--confirm", "eu-central-1", *more)


# --------------------------------------------------------------------------------------------------------------- looking


def test_status_says_what_is_going_on_what_to_type_and_what_is_unknown(site: Site, drctl: Drctl) -> None:
    site.service.open_incidents.append(
        Incident("i1", "region-silent", "us-east-1 is silent", "no answer", site.service.clock.now - 61, "a")
    )
    seen = drctl("status")
    assert seen.code == 0
    for expected in (
        "us-east-1 does not answer",
        "drctl plan failover",
        "unknown for 1 min 10 s",
        "1 min 01 s",
        "RPO 5.0 s",
        "epoch 7",
    ):
        assert expected in seen.out, expected
    assert drctl("lag").out.count("eu-central-1") == 1


@pytest.mark.parametrize("place", ["before", "after"])
def test_output_and_endpoint_may_stand_before_or_after_the_command(site: Site, drctl: Drctl, place: str) -> None:
    more = ["--endpoint", site.url, "--output", "json"]
    seen = drctl(*more, "lag") if place == "before" else drctl("lag", *more)
    document = json.loads(seen.out)
    assert document["rpo_seconds"] == 5.0
    assert document["exposure_seconds"]["why"] == "us-east-1 is silent"
    assert drctl("lag", "-o", "yaml").out.isascii()
    assert yaml.safe_load(drctl("lag", "-o", "yaml").out) == document


def test_watch_prints_a_json_document_a_line_and_survives_an_outage(site: Site, drctl: Drctl) -> None:
    seen = drctl("status", "--watch", "--times", "2", "--interval", "0.1", "-o", "json")
    assert [json.loads(line)["group"] for line in seen.out.splitlines()] == ["lab", "lab"]
    site.service.fail_with = Unavailable("etcd does not answer", hint="wait")
    seen = drctl("lag", "--watch", "--times", "2", "--interval", "0.1", "-o", "json")
    assert [json.loads(line)["error"]["code"] for line in seen.out.splitlines()] == ["unavailable"] * 2
    assert "etcd does not answer" in drctl("lag", "--watch", "--times", "1").out
    site.service.fail_with = None
    assert drctl("lag", "--watch", "--times", "2", "--interval", "0.1").out.count("exposure") == 2


def test_a_narrow_terminal_gets_a_table_that_is_not_torn(site: Site, drctl: Drctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controller.cli.session.PIPE_WIDTH", 80)
    seen = drctl("status").out
    assert "us-east-1     silent   unknown for 1 min 10 s" in seen
    assert "segments" not in seen


def test_lists_are_printed(site: Site, drctl: Drctl) -> None:
    site.service.seen_agents = tuple(AgentSeen(f"agent-{n}", n, f"r{n}", n, 1.7e9 + n, 0) for n in range(60))
    agents = drctl("agents", "--limit", "2")
    assert "agent-59" in agents.out
    assert "agent-57" not in agents.out
    assert "2 agents; there may be more: --limit, --prefix, or --all" in agents.out
    assert [one["agent"] for one in json.loads(drctl("agents", "--limit", "2", "-o", "json").out)] == ["agent-59", "agent-58"]
    assert "no open incidents" in drctl("incidents").out
    site.service.open_incidents.append(Incident("i1", "k", "gone", "d", 1.7e9, "a", closed_at=1.7e9 + 1))
    assert "gone" not in drctl("incidents").out
    assert "gone" in drctl("incidents", "--all").out
    assert "eu-central-1" in drctl("members").out
    assert "There are no plans" in drctl("plan", "list").out
    plan = planned(drctl)
    assert plan in drctl("plan", "list").out
    assert "No step" in drctl("journal", plan).out
    assert drctl("version").out.startswith("drctl ")


def test_a_hundred_thousand_agents_are_listed_page_by_page(site: Site, drctl: Drctl) -> None:
    site.service.seen_agents = tuple(AgentSeen(f"agent-{n:06d}", 1, "r", 1, 1.7e9, 0) for n in range(100_000))
    assert len(json.loads(drctl("agents", "--limit", "1000", "-o", "json").out)) == 1000
    assert drctl("agents", "--limit", "1001").code == 2
    some = drctl("agents", "--after", "agent-001234", "--limit", "2")
    assert "agent-001235" in some.out
    assert "--after agent-001236, or --all" in some.out
    site.service.calls.clear()
    found = json.loads(drctl("agents", "--all", "--prefix", "agent-00", "-o", "json").out)
    assert [one["agent"] for one in found] == [f"agent-{n:06d}" for n in range(10_000)]
    pages = [call for call in site.service.calls if call.startswith("agents")]
    assert len(pages) == 11
    assert all(call.startswith("agents 1000 ") for call in pages)


def test_text_from_a_server_cannot_act_on_the_terminal(site: Site, drctl: Drctl) -> None:
    evil = "\x1b[2J\x1b]0;owned\x07\u202e[red]\u2066\r\x9b"
    site.service.seen_agents = (AgentSeen(f"a{evil}", 1, f"r{evil}", 1, 1.7e9, 0, evil),)
    site.service.status_changes = {"sentence": evil, "next": evil, "warnings": (evil,)}
    site.service.open_incidents.append(Incident(f"i{evil}", evil, evil, evil, 1.7e9, "a", plan=evil))
    site.service.record(evil, evil, evil, {evil: evil})
    plan = planned(drctl)
    record = site.service.plan_records[plan]
    site.service.plan_records[plan] = replace(record, reason=evil)
    for command in (["status"], ["agents"], ["incidents"], ["audit"], ["plan", "show", plan], ["plan", "list"], ["lag"]):
        for output in ("table", "json", "yaml"):
            seen = drctl(*command, "-o", output)
            assert seen.code == 0, seen.err
            for char in "\x1b\x07\u202e\u2066\r\x9b":
                assert char not in seen.out + seen.err, (command, output, char)
    assert "\\x1b" in drctl("status").out
    assert "[red]" in drctl("status").out
    site.service.fail_with = Unavailable(evil, hint=evil)
    assert "\x1b" not in drctl("status").err


# --------------------------------------------------------------------------------------------------------- whom to ask


def test_no_controller_names_what_was_tried_and_exits_with_3(site: Site, drctl: Drctl) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # held and never listened on: nobody else of this machine can take it meanwhile
        dead = [f"http://127.0.0.1:{free.getsockname()[1]}", "http://127.0.0.1:1"]
        seen = drctl("status", "--endpoint", dead[0], "--endpoint", dead[1])
        again = drctl("status", "--endpoint", dead[0], "-o", "json")
    assert seen.code == 3
    assert dead[0] in seen.err
    assert dead[1] in seen.err
    assert "hint: " in seen.err
    error = json.loads(again.err)["error"]
    assert error["code"] == "unavailable"
    assert error["exit_code"] == 3


def test_endpoints_are_tried_until_one_answers_also_past_a_frozen_one(
    site: Site, drctl: Drctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process accepts connections and says nothing."""
    monkeypatch.setattr("controller.cli.client.CONNECT_SECONDS", 1.0)
    with socket.socket() as frozen:
        frozen.bind(("127.0.0.1", 0))
        frozen.listen(5)
        url = f"http://127.0.0.1:{frozen.getsockname()[1]}"
        assert drctl("status", "--endpoint", url, "--endpoint", site.url).code == 0
        made = drctl("plan", "failover", "--to", "eu-central-1", "--endpoint", url, "--endpoint", site.url)
        assert made.code == 0
        assert len(site.service.plan_records) == 1


def test_a_controller_that_is_busy_is_asked_after_all_when_nobody_else_answers() -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(f"{request.url.host}{request.url.path}")
        if request.url.host == "frozen" or (request.url.path == "/livez" and seen.count("busy/livez") == 1):
            raise httpx.ReadTimeout("no answer")
        return httpx.Response(200, json=[])

    client = Client(["http://frozen", "http://busy"], httpx.MockTransport(answer))
    assert client.get(list[str], "/v1/members").endpoint == "http://busy"
    assert seen == ["frozen/livez", "busy/livez", "frozen/livez", "busy/livez", "busy/v1/members"]
    with pytest.raises(Unavailable, match=r"frozen \(no answer in time\), http://still \(no answer in time\)"):
        Client(["http://frozen", "http://still"], httpx.MockTransport(_never)).get(list[str], "/v1/members")


def _never(request: httpx.Request) -> httpx.Response:
    raise httpx.ReadTimeout("no answer", request=request)


def test_a_change_whose_answer_is_lost_is_not_sent_again(site: Site, drctl: Drctl) -> None:
    site.service.fail_with = OutcomeUnknown("the transaction may have been applied", hint="drctl plan list")
    seen = drctl("plan", "failover", "--to", "eu-central-1", "--endpoint", site.url, "--endpoint", site.url + "/")
    assert seen.code == 3
    assert "may have been applied" in seen.err
    assert site.service.calls == ["create_plan"]


def test_a_connection_that_breaks_in_the_middle_of_a_change_is_an_unknown_outcome(drctl: Drctl, site: Site) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(5)
        listener.settimeout(10)

        def hang_up() -> None:
            connection, _ = listener.accept()
            connection.recv(65536)
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        seen = drctl(
            "plan", "failover", "--to", "x", "--endpoint", f"http://127.0.0.1:{listener.getsockname()[1]}", "-o", "json"
        )
        thread.join()
    assert seen.code == 3
    assert json.loads(seen.err)["error"]["code"] == "outcome_unknown"


def test_controllers_are_read_from_a_settings_file(
    site: Site, drctl: Drctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DRCTL_ENDPOINTS")
    file = tmp_path / "operators.toml"
    file.write_text(f'[regions.a]\ncontrollers = ["http://127.0.0.1:1"]\n[regions.b]\ncontrollers = ["{site.url}"]\n')
    assert drctl("status", "--config", file).code == 0
    monkeypatch.setenv("DR_CONFIG", str(file))
    assert drctl("status").code == 0
    for text in ("regions = 3", "[regions.a]\n", "not toml", "\x00"):
        file.write_text(text)
        seen = drctl("status", "--config", file)
        assert seen.code == 2, text
        assert "hint: " in seen.err
    assert drctl("status", "--config", tmp_path / "nowhere.toml").code == 2


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8080", "ftp://x", "http://", "http://h:port", "http://u@h", "http://h/?x=1", "file:///x"]
)
def test_an_endpoint_that_is_no_url_is_a_usage_error(drctl: Drctl, site: Site, url: str) -> None:
    assert drctl("status", "--endpoint", url).code == 2


def test_something_that_is_not_a_controller_is_named(drctl: Drctl, site: Site) -> None:
    seen = drctl("status", "--endpoint", site.url + "/v1/agents")
    assert seen.code == 2


@pytest.mark.parametrize(
    "argv",
    [
        ["bogus"],
        ["status", "--bogus"],
        ["status", "-o", "xml"],
        ["plan", "failover"],
        ["approve", "p"],
        ["plan", "show", ""],
        ["audit", "--limit", "0"],
    ],
)
def test_a_wrong_command_line_exits_with_2_one_sentence_and_a_hint(site: Site, drctl: Drctl, argv: list[str]) -> None:
    seen = drctl(*argv)
    assert seen.code == 2
    assert seen.err.startswith("error: ")
    assert "hint: " in seen.err
    assert "Traceback" not in seen.err
    assert json.loads(drctl("-o", "json", *argv).err)["error"]["code"] == "usage"


@pytest.mark.parametrize(
    "argv", [["--help"], ["plan", "--help"], ["approve", "--help"], ["promote", "--help"], ["audit", "--help"]]
)
def test_help_needs_nobody(drctl: Drctl, argv: list[str]) -> None:
    assert drctl(*argv).code == 0


# ------------------------------------------------------------------------------------------------------- plan and approve


def test_the_whole_way_from_a_plan_to_done(site: Site, drctl: Drctl) -> None:
    plan = planned(drctl)
    shown = drctl("plan", "show", plan)
    digest = site.service.plan_records[plan].digest
    for expected in (
        "from eu-west-1 to eu-central-1",
        "41 records + unknown",
        "at most 3.3 s",
        "agent-007: 3 records",
        "writer/α",
        digest,
        "0 of 2, 2 missing",
        "FAILED: home-store",
        "does not count as an approver",
        "catch-up",
    ):
        assert expected in shown.out, expected
    dry = drctl("promote", plan)
    assert "Dry run. It cannot run yet: 2 more people" in dry.out
    early = drctl("promote", plan, "--execute", "--confirm", "eu-central-1")
    assert early.code == 6
    assert "execute" in site.service.calls
    assert approve(drctl, site, plan, "alice").code == 0
    second = approve(drctl, site, plan, "bob")
    assert "0 more needed" in second.out
    assert f"drctl promote {plan} --execute" in second.out
    assert "To run it: drctl promote" in drctl("promote", plan).out
    assert site.service.plan_records[plan].state is State.AWAITING_APPROVAL
    site.service.steps_per_look = 1
    done = drctl("promote", plan, "--execute", "--confirm", "eu-central-1", "--wait", "--requester", "oncall")
    assert done.code == 0, done.err
    assert "✓ fence" in done.out
    assert "eu-central-1 is active" in done.out
    assert site.service.plan_records[plan].execute_requested_by == "oncall"
    again = drctl("promote", plan, "--execute", "--confirm", "eu-central-1")
    assert again.code == 5
    assert json.loads(drctl("promote", plan, "--wait", "-o", "json").out)["record"]["state"] == "done"


def test_a_plan_that_ends_otherwise_is_an_exit_code_too(site: Site, drctl: Drctl) -> None:
    plan = planned(drctl)
    for who in ("alice", "bob"):
        assert approve(drctl, site, plan, who).code == 0
    site.service.steps_per_look = 1
    site.service.step_events = (Event.ABORTED,)
    ended = drctl("promote", plan, "--execute", "--confirm", "eu-central-1", "--wait")
    assert ended.code == 5
    assert "ended as aborted" in ended.err


def test_wait_goes_on_through_silence_and_ends_when_its_time_is_up(site: Site, drctl: Drctl) -> None:
    plan = planned(drctl)
    seen = drctl("promote", plan, "--wait", "--timeout", "0.05s")
    assert seen.code == 3
    assert "goes on without this command" in seen.err
    site.service.fail_with = Unavailable("etcd is electing", hint="wait")
    assert drctl("promote", plan).code == 3


@pytest.mark.parametrize(
    ("who", "more", "code", "words"),
    [
        ("oncall", [], 0, "2 more needed"),
        ("mallory", [], 5, "not listed"),
        ("mallory", ["--principal", "alice"], 5, "is not a listed key of alice"),
        ("alice", ["--principal", "al\u202eice"], 5, "control or direction"),
        ("nobody", [], 5, "cannot be read"),
        ("allowed_signers", [], 5, "not an OpenSSH private key"),
        ("alice", ["--expires", "soon"], 2, "is not a duration"),
        ("alice", ["--expires", "-5m"], 2, "is not a duration"),
        ("alice", ["--confirm", "eu-west-1"], 2, "not the target region"),
        ("alice", ["--confirm", ""], 2, "not the target region"),
    ],
)
def test_approvals_that_do_not_count_say_why(
    site: Site, drctl: Drctl, who: str, more: list[str], code: int, words: str
) -> None:
    plan = planned(drctl)
    seen = approve(drctl, site, plan, who, *more)
    assert seen.code == code, seen.err
    assert words in seen.out + seen.err
    assert site.service._gate(plan).valid == ()


def test_the_same_person_twice_is_still_one(site: Site, drctl: Drctl) -> None:
    plan = planned(drctl)
    for _ in range(2):
        approve(drctl, site, plan, "alice")
    assert "1 of 2, 1 missing" in drctl("plan", "show", plan).out


def test_a_refusal_ends_the_plan_without_further_questions(site: Site, drctl: Drctl) -> None:
    plan = planned(drctl)
    seen = drctl("approve", plan, "--key", site.keys / "bob", "--refuse")
    assert seen.code == 0, seen.err
    assert site.service.plan_records[plan].state is State.REFUSED
    late = approve(drctl, site, plan, "alice")
    assert late.code == 5
    assert "has ended" in late.err


def test_an_approval_goes_with_the_plan_and_digest_it_was_signed_for(site: Site, drctl: Drctl) -> None:
    first, second = planned(drctl), planned(drctl)
    assert approve(drctl, site, first, "alice").code == 0
    moved = replace(site.service.approvals[first][0], plan=second)
    site.service.approvals[second] = [moved]
    assert "DOES NOT COUNT" in drctl("plan", "show", second).out


def test_on_a_terminal_the_target_regions_name_is_asked_for(site: Site, drctl: Drctl) -> None:
    plan = planned(drctl)
    command = ("approve", plan, "--key", site.keys / "alice")
    wrong = drctl(*command, typed="eu-west-1\n")
    assert wrong.code == 2
    assert "nothing was sent" in wrong.err
    asked = drctl(*command, typed="eu-central-1\n")
    assert asked.code == 0
    for expected in (
        "APPROVE as alice",
        "from eu-west-1 to eu-central-1",
        "epoch 7",
        "41 records + unknown",
        site.service.plan_records[plan].digest,
    ):
        assert expected in asked.err, expected


@pytest.mark.parametrize("typed", ["^C", ""])
def test_ending_a_prompt_sends_nothing_and_exits_with_130(site: Site, drctl: Drctl, typed: str) -> None:
    plan = planned(drctl)
    for command in (["approve", plan, "--key", str(site.keys / "alice")], ["promote", plan, "--execute"]):
        seen = drctl(*command, typed=typed)
        assert seen.code == 130
        assert "nothing was sent" in seen.err
    assert not {"approve", "execute"} & set(site.service.calls)


def test_without_a_terminal_a_confirmation_is_needed(site: Site, drctl: Drctl) -> None:
    plan = planned(drctl)
    for command in (["approve", plan, "--key", str(site.keys / "alice")], ["promote", plan, "--execute"]):
        seen = drctl(*command)
        assert seen.code == 2
        assert "--confirm eu-central-1" in seen.err
    assert not {"approve", "execute"} & set(site.service.calls)


def test_a_controller_that_shows_one_plan_and_reports_the_digest_of_another_is_caught(site: Site, drctl: Drctl) -> None:
    plan = planned(drctl)
    record = site.service.plan_records[plan]
    nicer = replace(record.plan, evidence=replace(record.plan.evidence, loss=NO_LOSS))
    site.service.plan_records[plan] = replace(record, plan=nicer)
    for command in (
        ["approve", plan, "--key", str(site.keys / "alice"), "--confirm", "eu-central-1"],
        ["plan", "show", plan],
        ["promote", plan],
    ):
        seen = drctl(*command)
        assert seen.code == 8
        assert "do not approve" in seen.err
    other = planned(drctl)
    site.service.plan_records[plan] = site.service.plan_records[other]
    assert drctl("plan", "show", plan).code == 8
    assert "approve" not in site.service.calls


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["plan", "failover", "--to", "mars"], 5),
        (["plan", "failover", "--to", "eu-west-1"], 5),
        (["plan", "failover", "--to", "eu\u202e"], 2),
        (["plan", "failover", "--to", "x" * 10_000_000], 5),
        (["plan", "failover", "--to", "eu-central-1", "--break-glass"], 2),
        (["plan", "failover", "--to", "eu-central-1", "--reason", "\x1b[2J"], 2),
        (["plan", "show", "p-9999"], 5),
        (["plan", "show", "../../v1/status"], 5),
        (["plan", "show", "p\u202e"], 2),
        (["plan", "abort", "p-9999"], 5),
        (["promote", "p-9999", "--execute", "--confirm", "eu-central-1"], 5),
        (["journal", "p-9999"], 5),
    ],
)
def test_bad_input_is_refused_by_the_controller_with_a_sentence(site: Site, drctl: Drctl, argv: list[str], code: int) -> None:
    seen = drctl(*argv)
    assert seen.code == code, seen.err[:500]
    assert seen.err.startswith("error: ")
    assert "hint: " in seen.err
    assert len(seen.err) < 10_000
    assert site.service.plan_records == {}


def test_break_glass_is_shouted(site: Site, drctl: Drctl) -> None:
    made = drctl("plan", "failover", "--to", "eu-central-1", "--break-glass", "--reason", "everybody else is asleep")
    assert made.code == 0
    assert "BREAK-GLASS" in made.out
    assert "0 of 1, 1 missing" in made.out


def test_a_plan_can_be_aborted_once(site: Site, drctl: Drctl) -> None:
    plan = planned(drctl)
    assert drctl("plan", "abort", plan, "--reason", "it is back").code == 0
    assert drctl("plan", "abort", plan).code == 5


# ----------------------------------------------------------------------------------------------------- audit, config, lab


def test_the_audit_chain_is_recomputed_page_by_page(site: Site, drctl: Drctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controller.cli.look.AUDIT_PAGE", 3)
    for n in range(8):
        site.service.record("alice", "approve", f"p-{n}", {"n": n, "deep": {"x": [1.5, None, "ü"]}})
    good = json.loads(drctl("audit", "verify", "-o", "json").out)
    assert good == {"ok": True, "entries": 8, "head": site.service.entries[-1].hash}
    head = f"8:{good['head']}"
    assert drctl("audit", "verify", "--expect", head).code == 0
    assert drctl("audit", "verify", "--expect", "x").code == 2
    assert "approve" in drctl("audit", "--after", "6").out
    whole = list(site.service.entries)
    site.service.entries = whole[:7]
    assert "cut off" in drctl("audit", "verify", "--expect", head).err
    tampered: list[Callable[[], list[object]]] = [
        lambda: [*whole[:4], replace(whole[4], actor="mallory"), *whole[5:]],
        lambda: [*whole[:4], *whole[5:]],
        lambda: [*whole[:3], whole[4], whole[3], *whole[5:]],
        lambda: [*whole[:7], replace(whole[7], detail={"n": 8})],
    ]
    for change in tampered:
        site.service.entries = change()  # type: ignore[assignment]
        seen = drctl("audit", "verify")
        assert seen.code == 8
        assert "broken" in seen.err


def test_a_settings_file_that_is_wrong_names_what_is(drctl: Drctl, site: Site, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text('group = "x"\ncolour = "red"\n')
    seen = drctl("config", "check", file)
    assert seen.code == 7
    assert "colour" in seen.err
    assert json.loads(drctl("config", "check", file, "-o", "json").err)["error"]["code"] == "misconfigured"


def test_the_command_line_works_without_the_labs_packages(monkeypatch: pytest.MonkeyPatch, drctl: Drctl) -> None:
    monkeypatch.setitem(sys.modules, "controller.cli.lab", None)
    try:
        again = importlib.reload(main)
        assert again.run(["version"]) == 0
        seen = drctl("lab")
        assert seen.code == 2
        assert "is not installed" in seen.err
    finally:
        monkeypatch.undo()
        importlib.reload(main)


def test_an_error_that_nobody_foresaw_is_a_sentence(monkeypatch: pytest.MonkeyPatch, drctl: Drctl, site: Site) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(render, "print_status", broken)
    seen = drctl("status")
    assert seen.code == 1
    assert "Traceback" not in seen.err
    assert "DRCTL_DEBUG" in seen.err


# ----------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (3599.7, "1 h 00 min"),
        (90_000, "1 d 1 h"),
        (-2, "-2.0 s"),
        (float("inf"), "unknown"),
        (float("nan"), "unknown"),
    ],
)
def test_durations_are_short(value: float, words: str) -> None:
    assert duration(value) == words


def test_a_bound_is_never_rounded_down() -> None:
    assert loss_seconds(replace(make_loss(), seconds=3.21)) == "at most 3.3 s"
    assert loss_seconds(replace(make_loss(), seconds=10.2)) == "at most 11 s"
    assert loss_seconds(replace(make_loss(exact=True), seconds=3.21)) == "3.2 s"


def test_what_is_visible_keeps_letters_and_escapes_the_rest() -> None:
    assert visible("naïve – 東京") == "naïve – 東京"
    assert visible("a\nb\u2028c\U000e0001") == "a\\x0ab\\u2028c\\U000e0001"
    assert len(visible("x" * 10_000)) == 4001


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("15m", 900), ("1.5h", 5400)])
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


def test_unknown_is_never_shown_as_a_number() -> None:
    assert wording.count(Unknown(0.0), 10.0) == "never known"
    assert wording.seconds(Unknown(4.0), 10.0) == "unknown for 6.0 s"


def test_an_answer_that_is_not_understood_is_not_believed(site: Site, drctl: Drctl, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (b"{}", b"[", b'{"group": 3}', b"[" * 100_000, b"\xff"):
        monkeypatch.setattr("controller.cli.client.Client._once", lambda *_, content=content: (200, content))
        seen = drctl("lag")
        assert seen.code == 8
        assert "drctl members" in seen.err
    monkeypatch.setattr("controller.cli.client.Client._once", lambda *_: (502, b"<html>bad gateway</html>"))
    seen = drctl("lag")
    assert seen.code == 3
    assert "HTTP 502" in seen.err
