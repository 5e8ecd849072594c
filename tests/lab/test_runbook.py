"""What the runbook tells people to type is what the demo ran and what the command line understands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from controller.cli.main import app
from controller.domain.promotion import diagram
from controller.lab.demo_commands import TEMPLATES, command, line

RUNBOOK = Path(__file__).resolve().parents[2] / "runbooks" / "region-failover.md"
TEXT = RUNBOOK.read_text()


def commands() -> Iterator[str]:
    """Lines of code blocks and code in sentences that call ``drctl``."""
    yield from re.findall(r"^ {4,}(drctl .+)$", TEXT, re.MULTILINE)
    yield from re.findall(r"`(drctl [^`]+)`", TEXT)


@pytest.mark.parametrize("text", sorted(set(commands())))
def test_every_command_of_the_runbook_is_understood_by_the_command_line(text: str) -> None:
    words: list[str] = shlex.split(text)[1:]
    parser: Any = typer.main.get_command(app)
    while hasattr(parser, "commands") and words and words[0] in parser.commands:
        parser, words = parser.commands[words[0]], words[1:]
    if hasattr(parser, "commands"):
        assert parser.invoke_without_command, f"{text}: names no command"
        assert not words, f"{text}: no command {words}"
        return
    parser.make_context("drctl", words)  # raises for an unknown option, a missing or a superfluous argument


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_every_command_that_the_demo_runs_is_in_the_runbook_letter_for_letter(name: str) -> None:
    assert re.search(rf"^ {{4,}}{re.escape(line(name))}$", TEXT, re.MULTILINE), f"the runbook lacks: {line(name)}"


def test_a_value_with_spaces_or_braces_stays_one_word() -> None:
    words = command("plan", region="us-east-1", reason="it's {silent} since 3 a.m.", name="carol")
    assert words == ("plan", "failover", "--to", "us-east-1", "--reason", "it's {silent} since 3 a.m.", "--requester", "carol")


def test_the_picture_of_the_states_is_made_from_the_table() -> None:
    assert diagram() in TEXT


def test_the_runbook_has_the_four_parts_that_every_runbook_has() -> None:
    headings = re.findall(r"^## (.+)$", TEXT, re.MULTILINE)
    assert headings[:4] == ["Meaning", "Impact", "Diagnosis", "Mitigation"]
