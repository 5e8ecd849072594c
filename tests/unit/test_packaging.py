"""A clean clone builds, installs from a lock file with hashes, and names no machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()


def direct() -> list[Requirement]:
    project = PROJECT["project"]
    extras = (line for lines in project["optional-dependencies"].values() for line in lines)
    return [Requirement(line) for line in (*project["dependencies"], *extras)]


def locked() -> dict[str, list[Version]]:
    """Locked versions by name; a name may have several, for different interpreters or platforms."""
    versions: dict[str, list[Version]] = {}
    for match in re.finditer(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^ ;\\]+)", LOCK, re.MULTILINE):
        versions.setdefault(canonicalize_name(match[1]), []).append(Version(match[2]))
    return versions


def test_what_agents_import_is_three_packages() -> None:
    assert {Requirement(line).name for line in PROJECT["project"]["dependencies"]} == {"httpx", "msgspec", "backports.zstd"}


def test_every_dependency_has_a_floor() -> None:
    """Without one a resolver may go back years."""
    assert [str(needed) for needed in direct() if not any(spec.operator == ">=" for spec in needed.specifier)] == []


@pytest.mark.parametrize("needed", direct(), ids=str)
def test_every_dependency_is_in_the_lock_file_at_a_version_that_it_allows(needed: Requirement) -> None:
    versions = locked().get(canonicalize_name(needed.name), [])
    assert versions, "run `make lock`"
    assert all(version in needed.specifier for version in versions), "run `make lock`"


def test_every_locked_package_has_hashes() -> None:
    entries = re.split(r"^(?=[A-Za-z0-9])", LOCK, flags=re.MULTILINE)[1:]
    assert len(entries) > 60
    assert [entry.splitlines()[0] for entry in entries if "--hash=sha256:" not in entry] == []


def test_the_lock_file_names_no_host_and_no_path_of_a_machine() -> None:
    assert (
        re.findall(r"https?://\S+|file:\S+|index-url|find-links|trusted-host|/(?:home|root|tmp|opt|work|usr)/\S*", LOCK) == []
    )


def test_the_hook_of_the_build_machine_runs_the_tests_and_stops_at_the_first_failure() -> None:
    hook = ROOT / ".ci" / "run"
    assert os.access(hook, os.X_OK)
    assert "set -euo pipefail" in hook.read_text()
    assert "make test" in hook.read_text()


def test_make_without_a_target_lists_the_targets() -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    listed = subprocess.run([make, "-s", "-C", str(ROOT)], capture_output=True, text=True, timeout=30, check=True).stdout
    for target in ("setup", "demo", "test", "test-fast", "lint", "lock", "clean"):
        assert re.search(rf"^\s*make {target}\b", listed, re.MULTILINE), target


def test_the_license_is_apache_2_in_full() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_types_and_its_license_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        timeout=100,
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "controller/py.typed" in names
    assert "controller/settings/model.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"controller"}
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "drctl = controller.cli.main:main" in zipfile.ZipFile(wheel).read(entry_points).decode()
