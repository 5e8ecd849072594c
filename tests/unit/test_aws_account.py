"""Credentials of another account stop everything before it begins."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from controller.adapters.aws_account import check_account
from controller.adapters.clock import SystemClock
from controller.cli.main import run
from controller.errors import Misconfigured, Unavailable
from controller.lab.aws import LAB_ENVIRONMENT, AwsStandIn
from controller.runtime.wiring import check_aws_account
from controller.settings import Settings, load_settings

OURS, THEIRS = "123456789012", "210987654321"
ROOT = Path(__file__).resolve().parents[2]
ANSWER = """<GetCallerIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><GetCallerIdentityResult>
<Arn>arn:aws:iam::{0}:user/u</Arn><UserId>U</UserId><Account>{0}</Account></GetCallerIdentityResult>
<ResponseMetadata><RequestId>r</RequestId></ResponseMetadata></GetCallerIdentityResponse>"""
DENIED = """<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type>
<Code>InvalidClientTokenId</Code><Message>The security token is invalid</Message></Error></ErrorResponse>"""


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAB_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@asynccontextmanager
async def sts(*answers: tuple[int, str]) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that gives the answers one after the other, the last one again and again."""
    left, asked = list(answers), []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
            asked.append(await reader.readexactly(length))
            status, text = left.pop(0) if len(left) > 1 else left[0]
            writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(text)}\r\nConnection: close\r\n\r\n{text}".encode())
            await writer.drain()
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked
    finally:
        server.close()


async def check(endpoint: str, expected: str = OURS, seconds: float = 10.0) -> None:
    await check_account(expected, aws_region="eu-west-1", endpoint=endpoint, call_timeout_seconds=seconds)


async def test_the_right_account_passes_and_a_wrong_one_is_named() -> None:
    async with sts((200, ANSWER.format(OURS))) as (url, asked):
        await check(url)
        assert b"Action=GetCallerIdentity" in asked[0]
    async with sts((200, ANSWER.format(THEIRS))) as (url, _):
        with pytest.raises(Misconfigured, match=f"belong to AWS account {THEIRS}, aws.account_id is {OURS}"):
            await check(url)


async def test_credentials_that_are_refused_are_misconfigured_and_an_answer_without_an_account_is_no_yes() -> None:
    async with sts((403, DENIED)) as (url, _):
        with pytest.raises(Misconfigured, match="InvalidClientTokenId"):
            await check(url)
    async with sts((200, ANSWER.format(""))) as (url, _):
        with pytest.raises(Misconfigured, match="account unknown"):
            await check(url)


async def test_an_sts_that_does_not_answer_is_unknown_and_a_busy_one_is_asked_again() -> None:
    with pytest.raises(Unavailable):
        await check("http://127.0.0.1:1", seconds=1.0)
    async with sts((500, ""), (200, ANSWER.format(OURS))) as (url, asked):
        await check(url)
        assert len(asked) == 2


async def test_a_controller_waits_for_the_answer_and_asks_nothing_where_no_account_is_set() -> None:
    def settings(**aws: str) -> Settings:
        place = {"region": "eu-west-1", "instance": "a", "state_dir": "state"}
        return load_settings(ROOT / "config" / "lab.toml", **place, aws=aws)

    await check_aws_account(settings(), SystemClock(), seconds=0.0)
    with pytest.raises(Unavailable):
        await check_aws_account(settings(account_id=OURS, sts_endpoint="http://127.0.0.1:1"), SystemClock(), seconds=0.0)
    async with sts((200, ANSWER.format(OURS))) as (url, _):
        await check_aws_account(settings(account_id=OURS, sts_endpoint=url), SystemClock(), seconds=0.0)


@pytest.fixture
def stand_in() -> Iterator[AwsStandIn]:
    pytest.importorskip("ministack")
    with AwsStandIn(aws_region="eu-west-1") as server:
        yield server


@pytest.mark.aws
@pytest.mark.parametrize("command", ["serve", "bootstrap"])
def test_commands_that_would_act_end_with_misconfigured_in_another_account(
    command: str, stand_in: AwsStandIn, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing is listening on the endpoints of etcd, so whoever asked it first would wait."""
    for name, value in {"REGION": "eu-west-1", "INSTANCE": "a", "STATE_DIR": "state"}.items():
        monkeypatch.setenv(f"DR_{name}", value)
    monkeypatch.setenv("DR_AWS__ACCOUNT_ID", THEIRS)
    monkeypatch.setenv("DR_AWS__STS_ENDPOINT", stand_in.endpoint)
    monkeypatch.setattr("controller.runtime.daemon.configure_logging", lambda *_: None)
    more = ["--region", "eu-west-1"] if command == "bootstrap" else []
    assert run([command, "--config", str(ROOT / "config" / "lab.toml"), *more]) == Misconfigured.exit_code
    said = capfd.readouterr()
    assert f"aws.account_id is {THEIRS}" in said.err + said.out
