"""What pip-audit found, judged. Pure.

It fails for a known vulnerability that has a fix and is not on the list of ignored ones, and for an entry of that list whose
day has passed. It never says that something is fine which nobody could look up: that is *not audited*, in so many words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any


@dataclass(frozen=True, slots=True)
class Ignored:
    """A vulnerability that somebody has looked at. ``until``: the last day on which that counts."""

    id: str
    package: str
    reason: str
    until: date


@dataclass(frozen=True, slots=True)
class Verdict:
    """``failed``: why the audit is red; ``told``: what people should read although it is green; ``audited``: packages that were
    looked up."""

    failed: tuple[str, ...]
    told: tuple[str, ...]
    audited: int


def parse_ignored(document: Mapping[str, Any]) -> tuple[Ignored, ...]:
    """The list. Raises ValueError for an entry without id, package, reason or day."""
    found = []
    for entry in document.get("ignored", ()):
        values = [entry.get(name) for name in ("id", "package", "reason")]
        if set(entry) != {"id", "package", "reason", "until"} or not all(isinstance(v, str) and v.strip() for v in values):
            raise ValueError(f"{entry}: id, package, reason and until are needed, and nothing else")
        if not isinstance(entry["until"], date):
            raise ValueError(f"{entry['id']}: until must be a day like 2027-01-31, without quotes")
        found.append(Ignored(entry["id"], entry["package"], entry["reason"], entry["until"]))
    return tuple(found)


def judge(dependencies: Iterable[Mapping[str, Any]], ignored: Sequence[Ignored], today: date) -> Verdict:
    """``dependencies``: the list of that name in pip-audit's JSON."""
    failed: list[str] = []
    told: list[str] = []
    used: set[Ignored] = set()
    skipped: list[str] = []
    audited = 0
    for one in dependencies:
        if "skip_reason" in one:
            skipped.append(str(one["name"]))
            continue
        audited += 1
        for known in one["vulns"]:
            names = {str(known["id"]), *(str(alias) for alias in known.get("aliases", ()))}
            fixes = ", ".join(known.get("fix_versions", ()))
            line = f"{one['name']} {one['version']}: {known['id']}" + (
                f", fixed in {fixes}" if fixes else ", no fix is known yet"
            )
            entry = next((i for i in ignored if i.id in names and i.package == one["name"] and i.until >= today), None)
            if entry is not None:
                used.add(entry)
                told.append(f"ignored until {entry.until}: {line} ({entry.reason})")
            else:
                (failed if fixes else told).append(line)
    failed += [
        f"tests/audit/ignored.toml: {i.id} ({i.package}) was to be looked at by {i.until}" for i in ignored if i.until < today
    ]
    if audited and not skipped:
        told += [
            f"tests/audit/ignored.toml: {i.id} is not found any more" for i in ignored if i not in used and i.until >= today
        ]
    if skipped:
        told.append(f"NOT AUDITED: {len(skipped)} packages, which the source does not know: {', '.join(skipped[:10])} …")
    return Verdict(tuple(failed), tuple(told), audited)
