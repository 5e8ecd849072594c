"""Known vulnerabilities of what is locked: what fails the build, what is only told; and silence is never taken for a yes."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from datetime import date
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.audit.__main__ import answers
from tests.audit.judging import Ignored, judge, parse_ignored

ROOT = Path(__file__).resolve().parents[2]
TODAY = date(2026, 11, 21)
FIXED = {"id": "PYSEC-2026-1", "fix_versions": ["2.0"], "aliases": ["CVE-2026-1", "GHSA-1"], "description": "…"}
OPEN = {**FIXED, "id": "PYSEC-2026-2", "fix_versions": [], "aliases": []}


def package(*vulns: dict[str, Any], name: str = "lib") -> dict[str, Any]:
    return {"name": name, "version": "1.0", "vulns": list(vulns)}


def entry(until: date = TODAY, id: str = "CVE-2026-1", package: str = "lib") -> Ignored:  # noqa: A002
    return Ignored(id, package, "never called", until)


def test_a_vulnerability_with_a_fix_fails_and_one_without_is_told() -> None:
    verdict = judge([package(FIXED, OPEN), package(name="fine")], (), TODAY)
    assert verdict.failed == ("lib 1.0: PYSEC-2026-1, fixed in 2.0",)
    assert verdict.told == ("lib 1.0: PYSEC-2026-2, no fix is known yet",)
    assert verdict.audited == 2


def test_an_ignored_one_counts_again_after_its_day_and_only_for_its_package() -> None:
    assert judge([package(FIXED)], [entry()], TODAY).failed == ()
    assert "never called" in judge([package(FIXED)], [entry()], TODAY).told[0]
    late = judge([package(FIXED)], [entry(date(2026, 11, 20))], TODAY).failed
    assert [line.split(" ")[0] for line in late] == ["lib", "tests/audit/ignored.toml:"]
    assert judge([package(FIXED)], [entry(package="other")], TODAY).failed
    assert judge([package()], [entry()], TODAY).told == ("tests/audit/ignored.toml: CVE-2026-1 is not found any more",)


def test_what_nobody_could_look_up_is_never_fine() -> None:
    skipped = {"name": "h11", "skip_reason": "Dependency not found on PyPI and could not be audited: h11 (0.16.0)"}
    verdict = judge([skipped], [entry()], TODAY)
    assert verdict.audited == 0
    assert verdict.told == ("NOT AUDITED: 1 packages, which the source does not know: h11 …",)


@pytest.mark.parametrize(
    "text",
    [
        'id = "x"\npackage = "p"\nuntil = 2027-01-01',
        'id = "x"\npackage = "p"\nreason = " "\nuntil = 2027-01-01',
        'id = "x"\npackage = "p"\nreason = "r"\nuntil = "2027-01-01"',
        'id = "x"\npackage = "p"\nreason = "r"\nuntil = 2027-01-01\nwho = "me"',
    ],
)
def test_an_entry_needs_a_reason_and_a_day(text: str) -> None:
    with pytest.raises(ValueError, match="x"):
        parse_ignored(tomllib.loads(f"[[ignored]]\n{text}"))


def test_the_list_of_ignored_ones_can_be_read_and_nothing_on_it_has_passed_its_day() -> None:
    found = parse_ignored(tomllib.loads((ROOT / "tests" / "audit" / "ignored.toml").read_text()))
    assert judge([], found, TODAY).failed == ()


def test_a_source_that_cannot_be_reached_says_so() -> None:
    assert answers("http://127.0.0.1:1/pypi/pip/25.0/json") == "it does not answer (URLError)"


def test_make_audit_ends_well_and_in_words_where_there_is_no_way_out() -> None:
    program = (
        "import sys, tests.audit.__main__ as audit\n"
        "audit.SOURCES = {'pypi': 'http://127.0.0.1:1/', 'osv': 'http://127.0.0.1:1/osv'}\n"
        "sys.exit(audit.main())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("NOT AUDITED: no package of requirements.lock was looked up: pypi: it does not answer")


def test_the_auditor_itself_is_locked_with_hashes() -> None:
    text = (ROOT / "tests" / "audit" / "requirements.txt").read_text()
    entries = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]
    assert any(entry.startswith("pip-audit==") for entry in entries)
    assert [entry.splitlines()[0] for entry in entries if "--hash=sha256:" not in entry] == []


BUDGET = {
    "anyio", "backports-zstd", "certifi", "h11", "httpcore", "httpx", "idna", "msgspec", "sniffio", "typing-extensions",
}  # fmt: skip
"""All that ``pip install agent-dr`` may bring into somebody else's process, on any Python."""


def test_the_base_brings_its_budget_and_nothing_else() -> None:
    left = [Requirement(line) for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]]
    seen: set[str] = set()
    while left:
        name = canonicalize_name(left.pop().name)
        if name in seen:
            continue
        seen.add(name)
        try:
            more = [Requirement(line) for line in requires(name) or ()]
        except PackageNotFoundError:
            continue  # of another Python
        left += [one for one in more if one.marker is None or one.marker.evaluate({"extra": ""})]
    assert seen <= BUDGET, f"over the budget: {sorted(seen - BUDGET)}"
    assert {"httpx", "msgspec", "httpcore"} <= seen
