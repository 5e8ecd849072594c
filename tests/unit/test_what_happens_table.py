"""README.md's table "what happens when": every line names the tests that show it, and those exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def rows(text: str) -> dict[str, list[str]]:
    """What happens → the tests that are named beside it."""
    table = text[text.index("| what happens when | then |") :].split("\n\n", maxsplit=1)[0]
    found = {}
    for line in table.splitlines()[2:]:
        cells = line.strip("| ").split(" | ")
        named = re.findall(r"<!--(.*?)-->", line)
        found[cells[0]] = named[0].split() if named else []
    return found


def problem(name: str) -> str | None:
    """Why that is no test (or story of one) of ours; None: it is."""
    place, _, function = name.partition("::")
    path = ROOT / "tests" / place
    if not path.is_file():
        return f"tests/{place} does not exist"
    if not re.search(rf"^(async )?def {re.escape(function)}\(", path.read_text(encoding="utf-8"), re.MULTILINE):
        return f"tests/{place} has no {function}"
    return None


ROWS = rows((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("line", list(ROWS))
def test_every_line_of_the_table_has_tests_that_exist(line: str) -> None:
    assert ROWS[line], f"{line}: names no test"
    assert [why for why in map(problem, ROWS[line]) if why is not None] == []


def test_a_line_without_a_test_and_a_test_that_does_not_exist_would_be_noticed() -> None:
    text = "| what happens when | then |\n| --- | --- |\n| fire | it burns |\n| flood | it swims <!-- unit/x.py::test_y --> |"
    assert rows(text) == {"fire": [], "flood": ["unit/x.py::test_y"]}
    assert problem("unit/x.py::test_y") == "tests/unit/x.py does not exist"
    assert (
        problem("unit/test_what_happens_table.py::test_nothing") == "tests/unit/test_what_happens_table.py has no test_nothing"
    )
