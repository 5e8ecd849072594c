"""``make audit``: asks for known vulnerabilities of every locked package, where a source of advisories can be reached.

``--advisories FOLDER`` asks nobody: it reads a copy of an advisory database (see ``offline``), and says how old that is.

Exit code 1 for a vulnerability with a fix (see ``judging``), 2 for a folder without advisories. Where no source answers, or
pip-audit cannot be installed, it says so in capital letters and ends with 0: a machine without a way out must be able to run
the tests, and nobody may take that for a result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
import venv
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from tests.audit.judging import Ignored, judge, parse_ignored
from tests.audit.offline import Advisories, locked, read_folder
from tests.audit.offline import look_up as offline_look_up

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TOOL = ROOT / ".venv" / "audit"
SOURCES = {"pypi": "https://pypi.org/pypi/pip/25.0/json", "osv": "https://api.osv.dev/v1/query"}
"""Of pip-audit; and what answers with advisories when the source can be used from here."""
ASK_SECONDS = 10.0
AUDIT_SECONDS = 600.0
OLD_DAYS = 7
"""A copy of advisories that is older says nothing about the days since."""


def answers(url: str) -> str:
    """Why a source cannot be used from here, or ""."""
    body = b'{"package": {"name": "pip", "ecosystem": "PyPI"}, "version": "25.0"}' if "osv" in url else None
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=ASK_SECONDS) as answer:
            found = json.loads(answer.read(4 * 1024 * 1024))
    except urllib.error.HTTPError as error:
        return f"it answers {error.code}"
    except (OSError, ValueError) as error:
        return f"it does not answer ({type(error).__name__})"
    return (
        "" if isinstance(found, dict) and ("vulnerabilities" in found or "vulns" in found) else "its answer has no advisories"
    )


def install() -> str:
    """Makes pip-audit's own environment. Returns why that was not possible, or ""."""
    if not (TOOL / "bin" / "pip-audit").exists():
        venv.create(TOOL, with_pip=True, clear=True)
        wanted = ("install", "--quiet", "--disable-pip-version-check", "--require-hashes", "-r", str(HERE / "requirements.txt"))
        done = subprocess.run([str(TOOL / "bin" / "python"), "-m", "pip", *wanted], capture_output=True, text=True, check=False)
        if done.returncode:
            return "pip-audit cannot be installed here: " + (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return ""


def look_up(source: str) -> list[dict[str, Any]]:
    """pip-audit's list of dependencies. Raises ValueError when it does not give one."""
    words = ("-r", str(ROOT / "requirements.lock"), "--require-hashes", "--disable-pip", "-s", source, "-f", "json")
    done = subprocess.run(
        [str(TOOL / "bin" / "pip-audit"), *words, "--progress-spinner", "off"],
        capture_output=True,
        text=True,
        timeout=AUDIT_SECONDS,
        check=False,
    )
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        raise ValueError((done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1]) from None
    return found


def audit_folder(folder: Path, ignored: Sequence[Ignored], today: date, say: Callable[[str], object]) -> int:
    """Judges the lock by a copy of an advisory database."""
    advisories = read_folder(folder, today)
    if not advisories.count or advisories.newest is None:
        say(f"NOT AUDITED: {folder.name or folder} holds no advisory for PyPI; give a folder with OSV files (.yaml or .json)")
        return 2
    verdict = judge(look_up_in(advisories, (ROOT / "requirements.lock").read_text(encoding="utf-8")), ignored, today)
    for line in (*verdict.told, *verdict.failed):
        say(line)
    if advisories.unreadable:
        say(f"NOT AUDITED: {len(advisories.unreadable)} files cannot be read: {', '.join(advisories.unreadable[:10])}")
    if (today - advisories.newest).days > OLD_DAYS:
        say(f"NOT AUDITED SINCE {advisories.newest}: what was published later is not in this copy")
    say(
        f"{verdict.audited} packages audited by {advisories.count:,} advisories, the newest of {advisories.newest}; "
        f"{len(verdict.failed)} problems"
    )
    return 1 if verdict.failed else 0


def look_up_in(advisories: Advisories, lock: str) -> list[dict[str, Any]]:
    """What the copy knows of each package of the lock."""
    return offline_look_up(locked(lock), advisories)


def main(say: Callable[[str], object] = print, argv: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.audit", description="Known vulnerabilities of requirements.lock.")
    parser.add_argument("--advisories", type=Path, metavar="FOLDER", help="a copy of an advisory database, OSV's format")
    folder = parser.parse_args(argv).advisories
    ignored = parse_ignored(tomllib.loads((HERE / "ignored.toml").read_text(encoding="utf-8")))
    today = datetime.now(UTC).date()
    if folder is not None:
        return audit_folder(folder, ignored, today, say)
    why = {source: answers(url) for source, url in SOURCES.items()}
    source = next((name for name, reason in why.items() if not reason), None)
    problem = "; ".join(f"{name}: {reason}" for name, reason in why.items()) if source is None else install()
    found: list[dict[str, Any]] = []
    if source is not None and not problem:
        try:
            found = look_up(source)
        except (ValueError, subprocess.TimeoutExpired) as error:
            problem = f"{source}: {error}"
    verdict = judge(found, ignored, today)
    for line in (*verdict.told, *verdict.failed):
        say(line)
    if problem or not verdict.audited:
        say(f"NOT AUDITED: no package of requirements.lock was looked up: {problem or 'the source knows none of them'}")
    else:
        say(f"{verdict.audited} packages audited by {source}; {len(verdict.failed)} problems")
    return 1 if verdict.failed else 0


if __name__ == "__main__":
    sys.exit(main(argv=sys.argv[1:]))
