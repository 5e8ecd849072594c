"""Every page in ``runbooks`` has the four parts, and names only commands that the command line understands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from controller.cli.main import app

PAGES = sorted((Path(__file__).resolve().parents[2] / "runbooks").glob("*.md"))


def commands(text: str) -> set[str]:
    """Lines of code blocks, and code in sentences, that call ``drctl``."""
    return {*re.findall(r"^ {4,}(drctl .+)$", text, re.MULTILINE), *re.findall(r"`(drctl [^`]+)`", text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_the_four_parts_and_its_title_is_its_name(page: Path) -> None:
    text = page.read_text()
    assert text.startswith(f"# {page.stem}\n")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE)[:4] == ["Meaning", "Impact", "Diagnosis", "Mitigation"]


@pytest.mark.parametrize(
    ("page", "command"), [(page.stem, command) for page in PAGES for command in sorted(commands(page.read_text()))]
)
def test_every_command_is_understood_by_the_command_line(page: str, command: str) -> None:
    words: list[str] = shlex.split(command)[1:]
    parser: Any = typer.main.get_command(app)
    while hasattr(parser, "commands") and words and words[0] in parser.commands:
        parser, words = parser.commands[words[0]], words[1:]
    if hasattr(parser, "commands"):
        assert parser.invoke_without_command, f"{command}: names no command"
        assert not words, f"{command}: no command {words}"
        return
    parser.make_context("drctl", words)  # raises for an unknown option, a missing or a superfluous argument
