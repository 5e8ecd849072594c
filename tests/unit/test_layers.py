"""Arrows point one way, and what decides is pure. Import-linter holds the layers (contracts in pyproject.toml); this page adds
what it cannot express: allow-lists, purity of the code itself, and the proof that the checkers would catch a violation."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "controller"

DOMAIN_MAY_IMPORT = {
    "__future__", "abc", "base64", "binascii", "bisect", "collections", "copy", "dataclasses", "decimal", "enum", "fractions",
    "functools", "hashlib", "heapq", "hmac", "ipaddress", "itertools", "json", "math", "operator", "re", "statistics", "string",
    "struct", "textwrap", "types", "typing", "unicodedata",
    "controller.domain", "controller.errors",
}  # fmt: skip
"""Of the standard library what computes and nothing else: no clock, no randomness, no input or output, no concurrency."""

PURE_STREAM = {"controller.stream.delta", "controller.stream.limits", "controller.stream.live", "controller.stream.segment"}
AGENT_MAY_IMPORT = {"controller.agent", "controller.domain", "controller.errors", *PURE_STREAM}

IMPURE_CALLS = {"open", "print", "input", "exec", "eval", "__import__", "breakpoint", "id", "hash"}
"""``id`` and ``hash`` differ from run to run: a decision that uses them cannot be replayed."""


def modules(folder: str) -> list[Path]:
    return sorted((PACKAGE / folder).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of what a module imports. ``from a import b`` gives ``a.b``: only so can a module be told from a name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "no relative imports"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def outside(source: str, allowed: set[str]) -> list[str]:
    """What ``source`` imports that ``allowed`` (modules, with everything below them) does not cover."""
    names = imported(ast.parse(source))
    return [name for name in names if not any(name == module or name.startswith(module + ".") for module in allowed)]


def impurities(source: str) -> list[str]:
    """What a decision must not contain."""
    found = [f"imports {name}" for name in outside(source, DOMAIN_MAY_IMPORT)]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith):
            found.append(f"line {node.lineno}: async")
        elif isinstance(node, ast.Global | ast.Nonlocal):
            found.append(f"line {node.lineno}: state outside of the function")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in IMPURE_CALLS:
            found.append(f"line {node.lineno}: calls {node.func.id}")
        elif (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in {"now", "utcnow", "today"}
        ):
            found.append(f"line {node.lineno}: asks a clock")
    return found


@pytest.mark.parametrize("module", modules("domain"), ids=lambda path: path.name)
def test_a_decision_is_pure(module: Path) -> None:
    assert impurities(module.read_text()) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import time", "imports time"),
        ("from time import monotonic", "imports time.monotonic"),
        ("from datetime import datetime", "imports datetime.datetime"),
        ("import random", "imports random"),
        ("def f():\n    import os", "imports os"),
        ("from controller.adapters.etcd import EtcdCoordinator", "imports controller.adapters.etcd.EtcdCoordinator"),
        ("from controller import ports", "imports controller.ports"),
        ("import controller.domainish", "imports controller.domainish"),
        ("async def decide(): ...", "line 1: async"),
        ("def f(clock):\n    return clock.now()", "line 2: asks a clock"),
        ("def f():\n    print(1)", "line 2: calls print"),
        ("def f():\n    open('x')", "line 2: calls open"),
        ("def f():\n    global x\n    x = 1", "line 2: state outside of the function"),
    ],
)
def test_an_impure_decision_would_be_caught(source: str, found: str) -> None:
    assert found in impurities(source)


def test_what_decisions_are_made_of_is_not_taken_for_impure() -> None:
    assert (
        impurities("from dataclasses import dataclass\nfrom controller.domain.model import Head\ndef f(now): return now + 1")
        == []
    )


@pytest.mark.parametrize("module", modules("agent"), ids=lambda path: path.name)
def test_agents_import_only_pure_parts_of_ours(module: Path) -> None:
    ours = [name for name in outside(module.read_text(), AGENT_MAY_IMPORT) if name.split(".")[0] == "controller"]
    assert [name for name in ours if name != "controller.__version__"] == []


@pytest.mark.parametrize("name", sorted(PURE_STREAM))
def test_the_parts_of_the_stream_that_agents_share_need_nothing_heavy(name: str) -> None:
    """Also the package's ``__init__``, which is run on the way to them."""
    allowed = {"controller.domain", "controller.errors", *PURE_STREAM}
    init = PACKAGE / "stream" / "__init__.py"
    for module in (PACKAGE / "stream" / f"{name.rsplit('.', 1)[1]}.py", init):
        ours = [found for found in outside(module.read_text(), allowed) if found.split(".")[0] == "controller"]
        assert ours == [], module.name


def test_an_import_that_agents_may_not_have_would_be_caught() -> None:
    assert outside("from controller.stream.view import View", AGENT_MAY_IMPORT) == ["controller.stream.view.View"]
    assert outside("from controller.stream import view", AGENT_MAY_IMPORT) == ["controller.stream.view"]
    assert outside("from controller.stream.segment import encode_segment", AGENT_MAY_IMPORT) == []


def test_an_agent_that_imports_us_loads_none_of_the_daemons_packages() -> None:
    heavy = [
        "boto3",
        "botocore",
        "aiobotocore",
        "cryptography",
        "dns",
        "etcd3",
        "fastapi",
        "grpc",
        "pydantic",
        "typer",
        "uvicorn",
    ]
    program = f"import sys, controller.agent; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# -------------------------------------------------------------------------------------------------------- import-linter


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    program = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache"],
        cwd=folder,
        env={"PATH": "", "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


needs_import_linter = pytest.mark.skipif(
    importlib.util.find_spec("importlinter") is None, reason="import-linter is not installed"
)


@needs_import_linter
def test_arrows_point_one_way() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_import_linter
@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("domain/model.py", "import time", "domain decides"),
        ("domain/model.py", "import controller.ports", "arrows point one way"),
        ("ports.py", "import boto3", "ports name"),
        ("settings/model.py", "import controller.adapters.clock", "arrows point one way"),
        ("runtime/wrong.py", "import controller.agent", "arrows point one way"),
        ("agent/wrong.py", "import pydantic", "agents import the domain"),
        ("stream/segment.py", "import sqlite3", "segments and deltas"),
        ("new_room.py", "", "arrows point one way"),
    ],
)
def test_import_linter_would_catch_a_wrong_arrow(tmp_path: Path, module: str, line: str, contract: str) -> None:
    """A copy of the package with one wrong line in it."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(PACKAGE, tmp_path / "controller", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "controller" / module).open("a") as file:
        file.write(f"\n{line}\n")
    after = lint_imports(tmp_path)
    assert after.returncode != 0
    assert contract in " ".join(after.stdout.split())
