"""A clean clone builds, installs from a lock file with hashes, and names no machine."""

from __future__ import annotations

import json
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


# ---------------------------------------------------------------------------------------------- beside what agents have


def run(*words: str, stdin: str = "", seconds: float = 110) -> subprocess.CompletedProcess[str]:
    """In the checkout, with the package registry that the environment is configured for."""
    return subprocess.run(words, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=seconds, check=False)


def no_registry(done: subprocess.CompletedProcess[str]) -> bool:
    """Whether a resolver failed because it could not ask, not because the answer was no."""
    said = (done.stdout + done.stderr).lower()
    return done.returncode != 0 and any(
        word in said for word in ("connection", "network", "dns error", "timed out", "error sending request", "failed to fetch")
    )


def resolve(*wanted: str) -> dict[str, Version]:
    """What uv would install: nothing is. Where only pip knows the way to a registry, what pip would."""
    done = run(sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "-", stdin="\n".join(wanted))
    if no_registry(done):
        done = run(
            sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", *wanted
        )
        if no_registry(done):
            pytest.skip(f"no package registry can be reached: {done.stderr.strip().splitlines()[-1:]}")
        assert done.returncode == 0, done.stderr
        found = [entry["metadata"] for entry in json.loads(done.stdout)["install"]]
        return {canonicalize_name(one["name"]): Version(one["version"]) for one in found}
    assert done.returncode == 0, f"{wanted} do not resolve:\n{done.stderr}"
    pins = re.findall(r"^([A-Za-z0-9._-]+)==([^ ;\n]+)", done.stdout, re.MULTILINE)
    return {canonicalize_name(name): Version(version) for name, version in pins}


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["", "[langgraph]"])
def test_the_peers_checkpointer_resolves_beside_ours(extra: str) -> None:
    """It needs a newer boto3 than any aioboto3 allows: it is what the base must never bring."""
    found = resolve(f".{extra}", "langgraph-checkpoint-aws")
    assert found["langgraph-checkpoint-aws"] >= Version("1")
    assert found["boto3"] > Version("1.40.61"), "what aioboto3 15.5 pins: this test would prove nothing"
    assert {"httpx", "msgspec"} <= set(found)
    assert not {"aioboto3", "etcd3", "grpcio"} & set(found)
    conflict = run(
        sys.executable, "-m", "uv", "pip", "compile", "--quiet", "-", stdin=".[controller]\nlanggraph-checkpoint-aws>=1.2"
    )
    assert conflict.returncode != 0, "the two can be installed together now: drop the extra that keeps them apart"


@pytest.mark.slow
def test_the_base_alone_in_a_fresh_environment_is_light_and_imports(tmp_path: Path) -> None:
    build = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
    assert build.returncode == 0, build.stderr
    (wheel,) = tmp_path.glob("*.whl")
    fresh = tmp_path / "fresh"
    python = str(fresh / "bin" / "python")
    assert run(sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, str(fresh)).returncode == 0
    done = run(sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python, str(wheel))
    if no_registry(done):
        pytest.skip(f"no package registry can be reached: {done.stderr.strip().splitlines()[-1:]}")
    assert done.returncode == 0, done.stderr
    program = (
        "import controller.agent, controller.agent.state, controller.agent.sessions\n"
        "from importlib.metadata import distributions\n"
        "from importlib.util import find_spec\n"
        "print(controller.agent.__file__)\n"
        "print(*[name for name in ('aioboto3', 'boto3', 'botocore', 'etcd3', 'grpc', 'fastapi') if find_spec(name)])\n"
        "print(*sorted(one.metadata['Name'].lower() for one in distributions()))\n"
    )
    seen = subprocess.run([python, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert seen.returncode == 0, seen.stderr
    place, heavy, installed = seen.stdout.splitlines()
    assert Path(place).is_relative_to(fresh)
    assert heavy == ""
    assert len(installed.split()) <= 15, installed
