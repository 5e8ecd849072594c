"""The threat model names what is there: every line has a place in the code and a test, and both exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "controller" / "THREATS.md"
COLUMNS = ["attack", "answer", "where", "shown by"]


def lines(page: str) -> list[list[str]]:
    """The cells of every line of every table of threats."""
    found: list[list[str]] = []
    inside = False
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            inside = False
        elif cells == COLUMNS:
            inside = True
        elif inside and not set(line) <= set("|- "):
            found.append(cells)
    return found


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@cache
def names_in(file: str) -> frozenset[str]:
    """Names of the tests in a file; none when there is no such file."""
    path = ROOT / file
    if not path.is_file():
        return frozenset()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    )


def problems(page: str) -> list[str]:
    """What is wrong with the page, in words."""
    found = []
    for cells in lines(page):
        if len(cells) != len(COLUMNS) or not all(cells):
            found.append(f"{cells[0]!r} has an empty or a missing cell")
            continue
        attack, _, where, shown = cells
        named = [name.partition("::") for name in quoted(shown) if "::" in name]
        if not named:
            found.append(f"{attack!r} names no test")
        found += [f"{attack!r}: there is no {file}::{test}" for file, _, test in named if test not in names_in(file)]
        places = quoted(where)
        if not places:
            found.append(f"{attack!r} names no place in the code")
        found += [f"{attack!r}: there is no {place}" for place in places if not (ROOT / place).exists()]
    return found


def test_every_line_of_the_threat_model_names_a_place_and_a_test_that_exist() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert len(lines(page)) > 20
    assert problems(page) == []


def test_a_section_that_says_what_is_not_defended_is_there() -> None:
    assert "\n## Not defended\n" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("| a | b | `controller/errors.py` | none yet |", "names no test"),
        ("| a | b | `controller/errors.py` | `tests/unit/test_threats.py::test_that_nobody_wrote` |", "there is no tests"),
        ("| a | b | `controller/errors.py` | `tests/unit/test_gone.py::test_x` |", "there is no tests"),
        (
            "| a | b | `controller/gone.py` | `tests/unit/test_threats.py::test_a_bad_line_is_found` |",
            "there is no controller/gone",
        ),
        ("| a | b | somewhere | `tests/unit/test_threats.py::test_a_bad_line_is_found` |", "names no place"),
        ("| a |  | `controller/errors.py` | `tests/unit/test_threats.py::test_a_bad_line_is_found` |", "empty"),
    ],
)
def test_a_bad_line_is_found(line: str, problem: str) -> None:
    page = "\n".join(["| " + " | ".join(COLUMNS) + " |", "| --- | --- | --- | --- |", line])
    (found,) = problems(page)
    assert problem in found
