"""Text that strangers chose, at every way out: log lines, terminals, pages, metrics, the API. And how much of it is taken.

What reaches terminals by ``drctl`` is in ``test_cli.py`` too, what reaches pagers in ``test_notify.py``.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from controller.domain.model import AgentSeen, RegionLag, Role, StreamReport
from controller.domain.text import CUT, visible
from controller.runtime.api import create_app
from controller.runtime.api_server import server_config
from controller.runtime.http_head import MAX_HEAD_BYTES, BoundedHttp
from controller.runtime.metrics import Metrics
from controller.runtime.service import Incident, JournalEntry, PlanRequest
from tests.support.fake_service import FakeService

ROOT = Path(__file__).resolve().parents[2]
ACTING = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
EVIL = (
    "\x1b[2J\x1b]0;owned\x07\x1b]8;;http://evil.example\x1b\\\x9b31m\r\n\x00\x7f"
    '\u202egnp.exe\u2066\u200b\u2028\ufeff\ud800[red]x[/red] </td><script>alert(1)</script> "} {"event":"forged"} \\'
)


def acting(text: str, allowed: str = "\n") -> list[str]:
    return [char for char in text if char not in allowed and unicodedata.category(char) in ACTING]


# ------------------------------------------------------------------------------------------------------------ the function


@given(st.text(), st.integers(1, 300))
def test_nothing_that_acts_comes_out_nothing_grows_without_bound_and_twice_is_once(text: str, limit: int) -> None:
    once = visible(text * 50, limit)
    assert acting(once, "") == []
    assert len(once) <= 10 * limit + len(CUT)
    assert visible(once, len(once)) == once


def test_ten_megabytes_are_cut_before_they_are_looked_at() -> None:
    assert visible("\x1b" * 10_000_000, 100) == "\\x1b" * 100 + CUT


def test_letters_of_people_stay_and_a_newline_only_where_it_is_asked_for() -> None:
    assert visible("Zürich, 東京, naïve – …") == "Zürich, 東京, naïve – …"
    assert visible("one\ntwo") == "one\\x0atwo"
    assert visible("one\ntwo\r", keep="\n") == "one\ntwo\\x0d"


# ------------------------------------------------------------------------------------------------------------------- logs

LOGGING = """
import asyncio, gc, json, logging, sys, warnings
import structlog
from controller.runtime.logs import configure_logging

evil = json.loads(sys.stdin.read())
configure_logging()
log = structlog.get_logger("controller")
log.info("tick", agent=evil, table={evil: [evil, {"deep": (evil,)}]}, count=3, other=Exception(evil))
log.info("large", body="x" * 10_000_000)
logging.getLogger("uvicorn.error").warning("Invalid request for %s", evil)
logging.getLogger("botocore").error(evil)
try:
    raise RuntimeError(evil)
except RuntimeError:
    log.exception("bug")
    logging.getLogger("asyncio").exception("Exception in callback")
warnings.warn(evil)

async def forgotten():
    async def fails():
        raise RuntimeError(evil)
    task = asyncio.create_task(fails())
    await asyncio.sleep(0)
    del task
    gc.collect()

asyncio.run(forgotten())
"""


def test_every_log_line_is_one_json_object_without_anything_that_acts_also_those_of_libraries() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOGGING],
        input=json.dumps(EVIL).encode(),
        capture_output=True,
        timeout=60,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    text = done.stderr.decode("ascii")
    lines = [json.loads(line) for line in text.splitlines()]
    begins = ["tick", "large", "Invalid", visible(EVIL), "bug"]
    assert all(line["event"].startswith(begin) for line, begin in zip(lines, begins, strict=False))
    assert len(lines) == 8, [line["event"][:60] for line in lines]
    assert acting(text) == []
    assert all(len(line) < 100_000 for line in text.splitlines())

    def look(value: object, at: str) -> None:
        """What a reader sees who has undone JSON."""
        if isinstance(value, str):
            assert acting(value, "\n" if at == "exception" else "") == [], at
        elif isinstance(value, dict):
            for key, item in value.items():
                look(key, "key")
                look(item, str(key))
        elif isinstance(value, list):
            for item in value:
                look(item, at)

    for line in lines:
        look(line, "")
    assert lines[0]["count"] == 3
    assert "RuntimeError" in lines[4]["exception"]
    assert "Traceback" in lines[4]["exception"]
    assert lines[2]["logger"] == "uvicorn.error"


# ---------------------------------------------------------------------------------------------------------------- the page


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[str, ...]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, tuple(name for name, _ in attrs)))


async def page_of(name: str) -> str:
    service = FakeService()
    service.open_incidents.append(Incident(name, name, name, name, 1.8e9 - 60, "a", plan=name))
    document = await service.create_plan(PlanRequest("failover", "eu-central-1", name, name))
    plan = document.record.plan.id
    service.journals[plan] = [JournalEntry(plan, name, 1.8e9 - 3, 0.0, name, 8, name)]
    service.status_changes = {"sentence": name, "next": name, "warnings": (name,), "group": name}
    service.is_ready = (False, name)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=create_app(service, clock=service.clock)), base_url="http://controller"
    ) as client:
        return (await client.get("/")).text


async def test_a_name_changes_neither_the_tags_nor_the_attributes_of_the_status_page() -> None:
    harmless, hostile = _Tags(), _Tags()
    harmless.feed(await page_of("oncall"))
    text = await page_of(EVIL)
    hostile.feed(text)
    assert hostile.seen == harmless.seen
    assert acting(text) == []
    assert "&lt;script&gt;" in text
    large = await page_of("n" * 1_000_000)
    assert len(large) < 200_000


# --------------------------------------------------------------------------------------------------------- API and metrics


async def test_json_of_the_api_is_ascii() -> None:
    """``curl`` prints it as it comes."""
    service = FakeService()
    service.seen_agents = (AgentSeen("東京\u202e\x9b", 1, "r\x1b", 1, 1.7e9, 0, "h"),)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=create_app(service, clock=service.clock)), base_url="http://controller"
    ) as client:
        answer = await client.get("/v1/agents")
    assert answer.content.isascii()
    assert acting(answer.text) == []
    assert answer.json()[0]["agent"] == "東京\u202e\x9b"


def test_labels_of_metrics_forge_no_line_and_carry_nothing_that_acts() -> None:
    name = EVIL.replace("\ud800", "")
    report = StreamReport(
        name, "eu-west-1", "a", 4, 999.0, 11, 11, 40, (RegionLag(name, 10, 1, 2, 200, 0.5, 10),), 0.5, 2
    )  # fmt: skip
    text = Metrics("g", "r", "i").render(Role.ACTIVE, 1.0, {"0": 4}, 3, {"0": 9}, [report], {}, {}).decode()
    assert acting(text) == []
    assert all(line.startswith(("#", "dr_")) for line in text.splitlines())
    assert "forged" in text


# ------------------------------------------------------------------------------------------------------------ the terminal


def printed_as_they_are(source: str) -> Iterator[str]:
    """Calls that print an f-string with a text in it that passed nothing: numbers and what went through ``visible`` may stand
    there."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
            continue
        name = ast.unparse(node.func)
        if name not in ("console.print", "here.console.print", "here.notes.print", "self.console.print", "sys.stdout.write"):
            continue
        if isinstance(node.args[0], ast.JoinedStr):
            for part in node.args[0].values:
                if isinstance(part, ast.FormattedValue) and not _harmless(part):
                    yield f"line {node.lineno}: {ast.unparse(part.value)}"


def _harmless(part: ast.FormattedValue) -> bool:
    number = part.format_spec is not None and ast.unparse(part.format_spec)[2:-1].endswith((",", "d", "f", "g"))
    words = ast.unparse(part.value)
    return number or words.startswith(("visible(", "self._clock(", "len(")) or words in KNOWN


KNOWN = {"settings.group", "command", "region", "__version__", "platform.python_version()", "bodies.MAX_CHANGES", "words"}
"""Validated settings, what the person typed (checked by the server first), our own constants; ``words`` passed ``visible``."""


@pytest.mark.parametrize("path", sorted((ROOT / "controller" / "cli").glob("*.py")), ids=lambda path: path.stem)
def test_no_command_prints_a_text_past_the_escaping(path: Path) -> None:
    assert list(printed_as_they_are(path.read_text(encoding="utf-8"))) == []


def test_a_text_that_is_printed_as_it_is_would_be_found() -> None:
    assert list(printed_as_they_are('console.print(f"agent {agent.name}")')) == ["line 1: agent.name"]
    assert list(printed_as_they_are('console.print(f"{count:,} of {visible(name)}")')) == []


# ------------------------------------------------------------------------------------------------------------- the request


@pytest.fixture
def listening() -> Iterator[int]:
    """A controller's API behind a real socket, with the daemon's own protocol class."""
    service = FakeService()
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(service, clock=service.clock), http=BoundedHttp, log_level="critical", lifespan="off", ws="none"
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join(10)


def spoken(port: int, parts: Iterator[bytes]) -> tuple[bytes, int]:
    """What the server answers, and how many bytes it took before it hung up."""
    sent, answer = 0, b""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
                sent += len(part)
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(65_536):
                answer += chunk
                if b"\r\n\r\n" in answer and b"431" not in answer[:20]:
                    break
    return answer, sent


@pytest.mark.parametrize("begin", [b"GET /", b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: "])
def test_an_endless_path_or_header_ends_the_connection_and_takes_bounded_memory(listening: int, begin: bytes) -> None:
    def endless() -> Iterator[bytes]:
        yield begin
        for _ in range(200):
            yield b"a" * 500_000

    answer, sent = spoken(listening, endless())
    assert sent < 50_000_000, "100 MB of a head were taken"
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431")


def test_a_long_head_within_the_bound_and_large_bodies_are_still_served(listening: int) -> None:
    base = f"http://127.0.0.1:{listening}"
    with httpx.Client(trust_env=False) as client:
        assert client.get(f"{base}/livez", headers={"X-Long": "a" * (MAX_HEAD_BYTES // 2)}).status_code == 200
        for _ in range(3):
            assert client.post(f"{base}/v1/plans", content=b"x" * 900_000).status_code == 422
        assert client.get(f"{base}/livez").status_code == 200


def test_who_connects_and_says_nothing_is_not_waited_for(listening: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controller.runtime.http_head.HEAD_SECONDS", 0.05)
    assert spoken(listening, iter(())) == (b"", 0)
    assert spoken(listening, iter([b"GET /liv"])) == (b"", 8)


def half_sent(port: int, parts: Iterator[bytes], patience_seconds: float = 20.0) -> bytes:
    """What comes back when a body's end never comes."""
    with socket.create_connection(("127.0.0.1", port), timeout=patience_seconds) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"POST /v1/plans HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
            for part in parts:
                connection.sendall(part)
            return connection.recv(65_536)
        return b""


def test_a_body_that_stands_still_is_not_waited_for(listening: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client may have lost its power: nothing would ever come to say so, and the room that it holds would be lost."""
    monkeypatch.setattr("controller.runtime.http_head.BODY_SECONDS", 0.05)
    assert half_sent(listening, iter([b"x" * 10])) == b""
    assert half_sent(listening, iter([])) == b""
    with httpx.Client(trust_env=False) as client:
        assert client.post(f"http://127.0.0.1:{listening}/v1/plans", content=b"x" * 900_000).status_code == 422
        assert client.get(f"http://127.0.0.1:{listening}/livez").status_code == 200


def test_a_body_that_is_kept_slow_on_purpose_ends_too(listening: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controller.runtime.http_head.SLOW_SECONDS", 0.0)
    monkeypatch.setattr("controller.runtime.http_head.SLOW_BYTES_PER_SECOND", 10**12)

    def trickle() -> Iterator[bytes]:
        for _ in range(100_000):
            yield b"x"

    assert half_sent(listening, trickle()) == b""


def test_every_server_of_the_daemon_has_these_bounds_and_the_one_way_of_logging() -> None:
    config = server_config(None, None, host="127.0.0.1", port=0)
    assert issubclass(config.http_protocol_class, BoundedHttp)
    assert config.log_config is None
    assert config.proxy_headers is False
    made = [path.name for path in (ROOT / "controller" / "runtime").glob("*.py") if "uvicorn.Config(" in path.read_text()]
    assert made == ["api_server.py"], "servers are made in one place"
