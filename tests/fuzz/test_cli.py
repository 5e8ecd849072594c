"""Every command of ``drctl`` with hostile names and sizes, without a terminal: an exit code of the table and a sentence, never
a bug, never a control character."""

from __future__ import annotations

import io
import random
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import typer
import uvicorn

from controller.cli import main
from controller.runtime.api import create_app
from tests.fuzz.examples import examples
from tests.support.fake_service import FakeService

LASTING = {("serve",), ("status", "--watch"), ("lab",)}
"""Commands that go on until somebody stops them, or that start processes."""
HOSTILE = [
    "", " ", "-", "--", "-1", "0", "1e999", "nan", "9" * 400, "x" * 100_000, "\x1b[31m", "\u202egnp.exe", "\udcff", "/", "a b",
    "../../etc/passwd", "/dev/null", "a,b", "é" * 300, "%2e%2e%2f", "'; rm -rf /", "{}", "[]", "null", "\n", "\t", "5m", "-5s",
    "http://[::1", "eu-west-1", "eu-central-1", "p-0001", "2026-02-30",
]  # fmt: skip


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(words, command) of everything below a command."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, below in command.commands.items():
        yield from commands(below, (*path, name))


COMMANDS = {" ".join(path): command for path, command in commands(typer.main.get_command(main.app)) if path[:1] not in LASTING}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    service = FakeService()
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(service, clock=service.clock), log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def arguments(command: Any, rng: random.Random) -> list[str]:
    """Its positional arguments and some of its options, each with something hostile."""
    made: list[str] = []
    for parameter in command.params:
        value = rng.choice(HOSTILE)
        if parameter.param_type_name == "argument":
            made += [value] if rng.random() < 0.9 else []
        elif parameter.name not in {"watch", "wait", "help"} and rng.random() < 0.4:
            made += [parameter.opts[0]] if getattr(parameter, "is_flag", False) else [parameter.opts[0], value]
    return made


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_with_anything_behind_it_ends_with_a_code_and_a_sentence(
    words: str, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DRCTL_ENDPOINTS", url)
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("DR_CONFIG", "DRCTL_PRINCIPAL", "DRCTL_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    rng = random.Random(words)
    for _ in range(examples(6)):
        given = [*words.split(), *arguments(COMMANDS[words], rng), *rng.choice([[], ["-o", "json"]])]
        monkeypatch.setattr(sys, "stdin", io.StringIO(rng.choice(["", "y\n", "eu-central-1\n"])))
        code = main.run(given)
        seen = capsys.readouterr()
        shown = [word[:60] for word in given]
        assert code in {0, 2, 3, 4, 5, 6, 7, 8, 130}, f"{shown}: {code} {seen.err[:500]}"
        assert code == 0 or seen.err.strip(), f"{shown}: exit code {code} and not a word"
        assert "Traceback" not in seen.err, shown
        assert not {"\x1b", "\u202e", "\x00"} & set(seen.out + seen.err), f"{shown}: control characters on the terminal"
        assert len(seen.err) < 20_000, f"{shown}: what was typed is repeated in full"
