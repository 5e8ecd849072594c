"""Known vulnerabilities of what is locked: what fails the build, what is only told; and silence is never taken for a yes."""

from __future__ import annotations

import json
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

from tests.audit.__main__ import answers, main
from tests.audit.judging import Ignored, judge, parse_ignored
from tests.audit.offline import locked, look_up, read_folder

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


OSV = """
id: PYSEC-2026-1
modified: "2026-07-01T10:00:00Z"
aliases: [CVE-2026-1, GHSA-1]
affected:
- package: {ecosystem: PyPI, name: My.Lib}
  ranges:
  - type: GIT
    events: [{introduced: "0"}, {fixed: 0123abc}]
  - type: ECOSYSTEM
    events: [{introduced: "0"}, {fixed: 1.2.0}, {introduced: 2.0.0rc1}, {last_affected: 2.1.0}]
  versions: ["3.0.post1"]
"""


def advised(folder: Path, *versions: str) -> dict[str, list[dict[str, Any]]]:
    """Version → what the folder's advisories know of my-lib in it."""
    found = look_up([("my-lib", version) for version in versions], read_folder(folder, TODAY))
    return {one["version"]: one["vulns"] for one in found}


def test_a_copy_of_advisories_is_matched_by_osvs_rule(tmp_path: Path) -> None:
    (tmp_path / "vulns" / "my-lib").mkdir(parents=True)
    (tmp_path / "vulns" / "my-lib" / "PYSEC-2026-1.yaml").write_text(OSV)
    affected = ("0.1", "1.2.0rc1", "1.2.0.dev3", "2.0.0rc1", "2.0", "2.1", "3.0.post1")
    fine = ("1.2.0", "1.2", "1.9", "2.0.0b9", "2.1.0.post1", "2.2", "3.0", "3.1")
    found = advised(tmp_path, *affected, *fine)
    assert [version for version, vulns in found.items() if vulns] == list(affected)
    assert found["0.1"] == [{"id": "PYSEC-2026-1", "aliases": ["CVE-2026-1", "GHSA-1"], "fix_versions": ["1.2.0"]}]
    assert found["2.0"][0]["fix_versions"] == [], "the only known fix is of an older line"
    assert read_folder(tmp_path, TODAY).newest == date(2026, 7, 1)


def test_json_counts_too_one_vulnerability_under_two_ids_is_one_and_withdrawn_ones_are_none(tmp_path: Path) -> None:
    range_ = {"type": "ECOSYSTEM", "events": [{"introduced": "1.0"}, {"fixed": "1.5"}]}
    base = {
        "modified": "2027-01-01T00:00:00Z",
        "published": "2026-06-01T00:00:00Z",
        "affected": [{"package": {"ecosystem": "PyPI", "name": "my_lib"}, "ranges": [range_]}],
    }
    for name, more in {
        "GHSA-1": {"aliases": ["CVE-2026-1"]},
        "PYSEC-2026-1": {"aliases": ["CVE-2026-1"]},
        "GHSA-2": {"withdrawn": "2026-06-02T00:00:00Z"},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"id": name, **base, **more}))
    npm = {**base, "id": "GHSA-3", "affected": [{"package": {"ecosystem": "npm", "name": "my-lib"}, "versions": ["1.2"]}]}
    (tmp_path / "GHSA-3.json").write_text(json.dumps(npm))
    (tmp_path / "broken.json").write_text("{")
    found = advised(tmp_path, "1.2", "1.5", "0.9")
    assert [(one["id"], one["fix_versions"]) for one in found["1.2"]] == [("GHSA-1", ["1.5"])]
    assert "PYSEC-2026-1" in found["1.2"][0]["aliases"]
    assert (found["1.5"], found["0.9"]) == ([], [])
    advisories = read_folder(tmp_path, TODAY)
    assert (advisories.count, advisories.newest, advisories.unreadable) == (2, date(2026, 6, 1), ("broken.json",))


def test_an_audit_by_a_copy_fails_for_what_has_a_fix_and_says_how_old_the_copy_is(tmp_path: Path) -> None:
    said: list[str] = []
    assert main(said.append, ["--advisories", str(tmp_path)]) == 2
    assert said[-1].startswith("NOT AUDITED")
    name, version = next(one for one in locked((ROOT / "requirements.lock").read_text()) if one[0] == "httpx")
    (tmp_path / "one.yaml").write_text(OSV.replace("My.Lib", "httpx").replace("1.2.0}", f"{version}}}"))
    assert main(said.append, ["--advisories", str(tmp_path)]) == 0
    assert "advisories, the newest of 2026-07-01; 0 problems" in said[-1]
    assert any(line.startswith("NOT AUDITED SINCE 2026-07-01") for line in said)
    (tmp_path / "one.yaml").write_text(OSV.replace("My.Lib", "httpx").replace("1.2.0}", f"{version}.post1}}"))
    assert main(said.append, ["--advisories", str(tmp_path)]) == 1
    assert any(line.startswith(f"{name} {version}: PYSEC-2026-1, fixed in") for line in said)


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
