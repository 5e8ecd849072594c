"""Advisories from a folder: a copy of the PyPA advisory database, or an OSV export for PyPI, unpacked. No network.

Every file that is OSV's format counts (``.yaml``, ``.yml``, ``.json``), in whatever folders. What comes out has the form of
pip-audit's list, so that the same judgement (``judging``) is made of it. A copy knows nothing that was published after it:
``Advisories.newest`` is the last day on which anybody wrote something into it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import yaml
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

_LOCKED = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)", re.MULTILINE)
SUFFIXES = {".yaml", ".yml", ".json"}


@dataclass(frozen=True, slots=True)
class Advisories:
    """All that a folder has, by package. ``count``: advisories for PyPI; ``newest``: the last day on which one was published or
    changed."""

    by_package: Mapping[str, tuple[Mapping[str, Any], ...]]
    count: int
    newest: date | None
    unreadable: tuple[str, ...]
    """Files that are no advisory and should be one."""


def locked(text: str) -> tuple[tuple[str, str], ...]:
    """Name and version of every package of a lock file; a name may stand in it twice, for different Pythons."""
    return tuple(dict.fromkeys((str(canonicalize_name(name)), version) for name, version in _LOCKED.findall(text)))


def read_folder(folder: Path, today: date) -> Advisories:
    """Withdrawn advisories do not count; days after ``today`` tell nothing of a copy's age (some advisories have one)."""
    by_package: dict[str, list[Mapping[str, Any]]] = {}
    unreadable: list[str] = []
    ids: set[str] = set()
    newest: date | None = None
    for path in sorted(one for one in folder.rglob("*") if one.suffix in SUFFIXES and one.is_file()):
        try:
            found = _read(path)
        except (ValueError, yaml.YAMLError, RecursionError):
            unreadable.append(path.name)
            continue
        if not isinstance(found, dict) or not isinstance(found.get("id"), str) or not isinstance(found.get("affected"), list):
            continue  # settings of the database itself, or an advisory about nothing
        names = {
            str(canonicalize_name(str(one["package"].get("name"))))
            for one in found["affected"]
            if isinstance(one, dict) and isinstance(one.get("package"), dict) and one["package"].get("ecosystem") == "PyPI"
        }
        days = (_day(found.get("modified")), _day(found.get("published")))
        newest = max((one for one in (newest, *days) if one is not None and one <= today), default=None)
        if found.get("withdrawn") or not names:
            continue
        ids.add(found["id"])
        for name in names:
            by_package.setdefault(name, []).append(found)
    return Advisories({name: tuple(found) for name, found in by_package.items()}, len(ids), newest, tuple(unreadable))


def _read(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    # The C loader reads thousands of files in seconds; with neither are times made into objects that JSON has not.
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _day(value: object) -> date | None:
    if isinstance(value, datetime):
        return value.date()
    try:
        return datetime.fromisoformat(str(value)).astimezone(UTC).date()
    except ValueError:
        return None


def look_up(packages: Iterable[tuple[str, str]], advisories: Advisories) -> list[dict[str, Any]]:
    """As pip-audit's list of dependencies. What has no version that can be compared is skipped, and said to be."""
    found: list[dict[str, Any]] = []
    for name, version in packages:
        try:
            mine = Version(version)
        except InvalidVersion:
            found.append({"name": name, "skip_reason": f"{version} is no version"})
            continue
        known = [one for advisory in advisories.by_package.get(name, ()) if (one := _known(advisory, name, mine)) is not None]
        found.append({"name": name, "version": version, "vulns": _merged(known)})
    return found


def _known(advisory: Mapping[str, Any], name: str, version: Version) -> dict[str, Any] | None:
    """What the advisory says of this version; None: nothing."""
    parts = [
        one
        for one in advisory["affected"]
        if one.get("package", {}).get("ecosystem") == "PyPI" and canonicalize_name(str(one["package"].get("name"))) == name
    ]
    if not any(_affects(one, version) for one in parts):
        return None
    fixes = sorted({fix for one in parts for fix in _fixes(one) if fix > version})
    return {
        "id": advisory["id"],
        "aliases": [str(alias) for alias in advisory.get("aliases") or ()],
        "fix_versions": [str(fix) for fix in fixes],
    }


def _affects(part: Mapping[str, Any], version: Version) -> bool:
    """By OSV's rule: the version is listed, or lies in one of the ranges."""
    listed = any(_version(one) == version for one in part.get("versions") or ())
    return listed or any(_in_range(events, version) for events in _ranges(part))


def _ranges(part: Mapping[str, Any]) -> Iterator[list[Mapping[str, Any]]]:
    for one in part.get("ranges") or ():
        if one.get("type") in {"ECOSYSTEM", "SEMVER"}:  # GIT: commits, of which a lock file knows nothing
            yield list(one.get("events") or ())


def _in_range(events: list[Mapping[str, Any]], version: Version) -> bool:
    """``introduced`` begins, ``fixed`` ends before itself, ``last_affected`` after itself; in the order of their versions."""
    marks = sorted(
        (at, kind)
        for event in events
        for kind, text in event.items()
        if (at := Version("0.dev0") if text == "0" else _version(text)) is not None
    )
    inside = False
    for at, kind in marks:
        if kind == "introduced" and version >= at:
            inside = True
        elif (kind == "fixed" and version >= at) or (kind == "last_affected" and version > at):
            inside = False
    return inside


def _fixes(part: Mapping[str, Any]) -> Iterator[Version]:
    for events in _ranges(part):
        for event in events:
            if "fixed" in event and (fix := _version(event["fixed"])) is not None:
                yield fix


def _version(text: object) -> Version | None:
    try:
        return Version(str(text))
    except InvalidVersion:
        return None


def _merged(known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One for each vulnerability: the same one often stands in a database under several ids, which name each other."""
    merged: list[dict[str, Any]] = []
    for one in sorted(known, key=lambda found: str(found["id"])):
        names = {one["id"], *one["aliases"]}
        same = next((other for other in merged if names & {other["id"], *other["aliases"]}), None)
        if same is None:
            merged.append(dict(one))
            continue
        same["aliases"] = sorted((names | set(same["aliases"])) - {same["id"]})
        same["fix_versions"] = same["fix_versions"] or one["fix_versions"]
    return merged
