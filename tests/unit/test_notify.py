"""Pages to people: what leaves the process, what counts as delivered, which URLs are used at all."""

from __future__ import annotations

import asyncio
import json
import unicodedata
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from controller.adapters.memory.gate import FaultGate
from controller.adapters.memory.pager import MemoryPager
from controller.adapters.notify import MAX_BODY, LogPager, MultiPager, WebhookPager, as_fields
from controller.domain.outward import LOOPBACK
from controller.domain.text import CUT, MAX_LINE_CHARS
from controller.errors import Misconfigured, Unavailable
from controller.lab.webhook import application
from controller.ports import Page

PAGE = Page(key="lag/eu-west-1", severity="critical", title="Lag", body="first line\nsecond line", runbook="runbooks/lag.md")


def answering(status: int, **headers: str) -> tuple[httpx.MockTransport, list[httpx.Request]]:
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(status, headers=headers, content=b"x" * 10)

    return httpx.MockTransport(handle), seen


async def test_a_page_arrives_as_json_with_its_five_fields() -> None:
    transport, seen = answering(204)
    await WebhookPager("http://127.0.0.1:8099/hook?secret=s", 1.0, allowed=LOOPBACK, transport=transport).page(PAGE)
    assert json.loads(seen[0].content) == {
        "key": "lag/eu-west-1",
        "severity": "critical",
        "title": "Lag",
        "body": "first line\nsecond line",
        "runbook": "runbooks/lag.md",
    }
    assert seen[0].url.raw_path == b"/hook?secret=s"


@pytest.mark.parametrize("status", [301, 302, 307, 400, 404, 429, 500, 503])
async def test_every_answer_but_2xx_means_that_nobody_was_reached(status: int) -> None:
    transport, seen = answering(status, location="http://127.0.0.1:1/elsewhere")
    with pytest.raises(Unavailable, match=str(status)) as caught:
        await WebhookPager("http://127.0.0.1/secret-path", 1.0, allowed=LOOPBACK, transport=transport).page(PAGE)
    assert len(seen) == 1, "a redirect was followed"
    assert "secret-path" not in str(caught.value)


async def test_a_receiver_that_never_answers_costs_the_timeout_and_no_more() -> None:
    class Silent(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await asyncio.Event().wait()
            raise AssertionError

    with pytest.raises(Unavailable, match=r"within 0\.01 s"):
        await WebhookPager("http://127.0.0.1/", 0.01, allowed=LOOPBACK, transport=Silent()).page(PAGE)


async def test_a_connection_that_breaks_is_unavailable_and_not_a_crash() -> None:
    def broken(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(Unavailable, match="ConnectError"):
        await WebhookPager("http://127.0.0.1/", 1.0, allowed=LOOPBACK, transport=httpx.MockTransport(broken)).page(PAGE)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hooks.example.com/x",
        "ftp://hooks.example.com/",
        "file:///etc/passwd",
        "gopher://127.0.0.1/",
        "http://",
        "http://host:99999/",
        "http://host:0/",
        "https://user:password@hooks.example.com/",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::ffff:169.254.169.254]/",
        "http://[fe80::1]/",
        "http://[fd00:ec2::254]/",
        "http://0.0.0.0/",
        "http://224.0.0.1/",
        "http://2852039166/",
        "http://0x7f.1/",
        "http://0177.0.0.1/",
        "http://127.1/",
        "http://１２７.0.0.1/",
        "http://127.0.0.1/",
        "http://10.0.0.1/",
        "https://hooks.example.com:6379/",
        "http://hooks.example.com\\@169.254.169.254/",
        "http://[::ffff:a9fe:a9fe]/",
        "http://[64:ff9b::a9fe:a9fe]/",
        "http://[fe80::1%25eth0]/",
    ],
)
def test_a_url_that_is_not_a_plain_http_address_of_a_receiver_is_refused_at_start(url: str) -> None:
    with pytest.raises(Misconfigured):
        WebhookPager(url, 1.0)


@pytest.mark.parametrize("timeout", [0, -1])
def test_a_timeout_has_to_be_positive(timeout: float) -> None:
    with pytest.raises(Misconfigured):
        WebhookPager("http://127.0.0.1/", timeout, allowed=LOOPBACK)


@given(st.text(), st.text(max_size=300))
def test_no_page_carries_control_or_bidi_characters_or_grows_without_bound(body: str, title: str) -> None:
    fields = as_fields(Page("k", "critical", title, body * 50))
    encoded = json.dumps(fields, ensure_ascii=False).encode()  # also: no lone surrogates, which UTF-8 cannot hold
    assert len(encoded) < 64 * 1024
    for char in fields["title"] + fields["body"].replace("\n", ""):
        assert unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"), repr(char)
        assert not "\u202a" <= char <= "\u202e"
        assert not "\u2066" <= char <= "\u2069"


def test_a_long_page_is_cut_and_says_so() -> None:
    fields = as_fields(Page("k" * 1000, "critical", "t" * 1000, "b" * 10_000))
    assert fields["key"] == "k" * MAX_LINE_CHARS + CUT
    assert fields["title"] == "t" * MAX_LINE_CHARS + CUT
    assert fields["body"] == "b" * MAX_BODY + CUT


async def test_the_log_gets_the_page_with_its_severity() -> None:
    with structlog.testing.capture_logs() as logs:
        await LogPager().page(PAGE)
        await LogPager().page(Page("k", "odd severity", "t\x1b", "b"))
    assert logs[0]["event"] == "page"
    assert (logs[0]["log_level"], logs[0]["key"]) == ("critical", "lag/eu-west-1")
    assert (logs[1]["log_level"], logs[1]["title"]) == ("warning", "t\\x1b")


async def no_sleep(seconds: float) -> None:
    """Virtual: no time passes."""


async def test_one_way_to_people_that_works_is_enough_and_all_get_the_page() -> None:
    gate = FaultGate(no_sleep)
    gate.cut = True
    broken, working = MemoryPager(gate), MemoryPager()
    await MultiPager([broken, LogPager(), working]).page(PAGE)
    assert working.pages == [PAGE]
    assert broken.pages == []


async def test_the_log_alone_is_not_reaching_people_when_a_pager_is_configured() -> None:
    gate = FaultGate(no_sleep)
    gate.cut = True
    with pytest.raises(Unavailable, match="nobody was paged for lag/eu-west-1"):
        await MultiPager([MemoryPager(gate), LogPager()]).page(PAGE)
    await MultiPager([LogPager()]).page(PAGE)
    with pytest.raises(Misconfigured):
        MultiPager([])


async def test_a_page_whose_answer_was_lost_was_delivered_all_the_same() -> None:
    gate = FaultGate(no_sleep)
    gate.lose("page")
    pager = MemoryPager(gate)
    with pytest.raises(Unavailable):
        await pager.page(PAGE)
    assert pager.keys() == ("lag/eu-west-1",)


@asynccontextmanager
async def receiver(file: Path) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=application(file, echo=False))
    async with httpx.AsyncClient(transport=transport, base_url="http://receiver") as client:
        yield client


async def test_the_labs_receiver_keeps_each_page_as_a_line_of_plain_ascii(tmp_path: Path) -> None:
    file = tmp_path / "pages.jsonl"
    pager = WebhookPager(
        "http://127.0.0.1/", 5.0, allowed=LOOPBACK, transport=httpx.ASGITransport(app=application(file, echo=False))
    )
    await pager.page(PAGE)
    await pager.page(Page("k2", "info", "東京", "b"))
    lines = file.read_text(encoding="ascii").splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["lag/eu-west-1", "k2"]
    assert json.loads(lines[1])["title"] == "東京"


Send = Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]


@pytest.mark.parametrize(
    ("send", "status"),
    [
        (lambda client: client.post("/", content=b"x" * 70_000), 413),
        (lambda client: client.post("/", content=b"not json"), 400),
        (lambda client: client.post("/", content=b"[" * 60_000), 400),
        (lambda client: client.post("/", json=["a list"]), 400),
        (lambda client: client.post("/any/path", json={"key": "k"}), 204),
        (lambda client: client.put("/", json={"key": "k"}), 405),
    ],
)
async def test_the_labs_receiver_takes_objects_of_a_bounded_size_only(tmp_path: Path, send: Send, status: int) -> None:
    async with receiver(tmp_path / "pages.jsonl") as client:
        assert (await send(client)).status_code == status
        assert len((await client.get("/")).json()) == (1 if status == 204 else 0)
