"""Reads the TOML file and the environment, and tells everything that is wrong with them at once."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import EnvSettingsSource, SettingsError

from controller.errors import Misconfigured
from controller.settings import rules
from controller.settings.model import ENV_PREFIX, Settings
from controller.settings.reference import section_of
from controller.settings.values import Problem, nearest, shown

CONFIG_VARIABLE = "DR_CONFIG"


def load_settings(path: Path | None = None, **overrides: Any) -> Settings:
    """Reads the file, the environment and ``overrides`` (nested dicts; a None is no override) and checks all of it.

    Raises Misconfigured, whose message has one line ``field = value: rule; hint`` for every broken rule. Secrets are not shown.
    """
    file = path if path is not None else (Path(name) if (name := os.environ.get(CONFIG_VARIABLE)) else None)
    data: dict[str, Any] = {}
    problems: list[Problem] = []
    if file is not None:
        data = _read_toml(file)
    environment, wrong = _read_environment()
    problems.extend(wrong)
    data = _merged(_merged(data, environment), {key: value for key, value in overrides.items() if value is not None})
    settings, broken = _validated(data)
    problems.extend(broken)
    if settings is None or problems:
        source = f"{file} and the environment" if file is not None else "the environment (no file is named)"
        noun = "setting is" if len(problems) == 1 else "settings are"
        raise Misconfigured(
            "\n".join([f"{len(problems)} {noun} wrong in {source}:", *(f"  {problem.line()}" for problem in problems)]),
            hint=f"correct them in the file that {CONFIG_VARIABLE} names or in DR_SECTION__KEY variables, and start again",
        )
    return settings


def _read_toml(file: Path) -> dict[str, Any]:
    hint = "name a TOML file in DR_CONFIG; config/lab.toml and config/production.example.toml are examples"
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as why:
        raise Misconfigured(f"{CONFIG_VARIABLE} = {shown(file)}: cannot be read: {why.strerror}", hint=hint) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as why:
        # "Cannot declare ('regions', 'eu-west-1') twice" comes from here too.
        raise Misconfigured(f"{CONFIG_VARIABLE} = {shown(file)}: is not TOML: {why}", hint="see https://toml.io") from None
    return _paths_from(data, Settings, file.resolve().parent)


def _paths_from(data: dict[str, Any], model: type[BaseModel], folder: Path) -> dict[str, Any]:
    """``data`` with its relative paths made relative to ``folder``."""
    result = dict(data)
    for name, field in model.model_fields.items():
        value = result.get(name)
        if isinstance(value, str) and value.strip() and "\0" not in value and field.annotation in {Path, Path | None}:
            result[name] = str(folder / value)
        elif isinstance(value, dict) and (section := section_of(field)) is not None and name != "regions":
            result[name] = _paths_from(value, section, folder)
    return result


def _read_environment() -> tuple[dict[str, Any], list[Problem]]:
    """The DR_* variables as nested values, and those that look like settings but are none."""
    problems = []
    sections = {name for name, field in Settings.model_fields.items() if section_of(field) is not None}
    for variable in sorted(os.environ):
        if not variable.upper().startswith(ENV_PREFIX) or variable.upper() == CONFIG_VARIABLE:
            continue
        first, nested, _ = variable[len(ENV_PREFIX) :].lower().partition("__")
        # Without "__" it may belong to somebody else (agents' own DR_… variables), unless it is nearly one of ours.
        known = sections if nested else set(Settings.model_fields)
        if first not in known and (nested or nearest(first, known)):
            problems.append(Problem((variable,), "(set)", "is not a setting", nearest(first, known) or "unset it"))
    try:
        return dict(EnvSettingsSource(Settings)()), problems
    except SettingsError as why:
        name = str(why).partition('field "')[2].partition('"')[0]
        rule = 'must be JSON where a list or table is meant: ["a", "b"]'
        return {}, [*problems, Problem((f"{ENV_PREFIX}{name.upper()}…",), "(set)", rule, "mind the quotes of the shell")]


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` laid over it, table by table. Shares no table with either."""
    result = {key: _merged(value, {}) if isinstance(value, Mapping) else value for key, value in base.items()}
    for key, value in over.items():
        old = result.get(key)
        result[key] = _merged(old if isinstance(old, Mapping) else {}, value) if isinstance(value, Mapping) else value
    return result


def _validated(data: dict[str, Any]) -> tuple[Settings | None, list[Problem]]:
    """Checks all. Values that are wrong by themselves are then replaced by stand-ins, and the rules between values are tried
    on that, so that one start tells everything; a rule that looks at a replaced value has nothing to say."""
    now = datetime.now(UTC)
    try:
        settings = Settings(**data)
    except ValidationError as error:
        found = error.errors(include_url=False)
    else:
        return settings, list(rules.problems(settings, now))
    problems = [_explained(detail) for detail in found]
    replaced = [_place(detail) for detail in found]
    try:
        rest = Settings(**_with_stand_ins(data, replaced))
    except ValidationError:
        return None, problems
    aside = [".".join(place) for place in replaced]
    told = rules.problems(rest, now)
    problems.extend(p for p in told if not any(_overlap(field, other) for field in p.fields for other in aside))
    return None, problems


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(other + ".") or other.startswith(one + ".")


def _place(detail: ErrorDetails) -> tuple[str, ...]:
    """Where the wrong value is; an element of a list stands for the whole list."""
    return tuple(part for part in detail["loc"] if isinstance(part, str) and part != "[key]")


_REGION_STAND_IN = {"bucket": "bucket", "table": "table", "addresses": ["10.0.0.1"], "controllers": ["http://127.0.0.1"]}
_STAND_IN: dict[str, Any] = {
    "group": "group",
    "environment": "lab",
    "region": "region",
    "instance": "instance",
    "state_dir": "state",
    "etcd": {"endpoints": ["http://127.0.0.1:2379"]},
    "traffic": {"zone_id": "Z", "name": "name.example."},
    "dns": {"servers": ["127.0.0.1:53"]},
    "approvals": {"allowed_signers": "allowed_signers"},
}
"""Values that have no default, in a form that passes by itself. Never used but to find further problems."""


def _with_stand_ins(data: dict[str, Any], places: list[tuple[str, ...]]) -> dict[str, Any]:
    rest = _merged(data, {})
    for *above, last in places:
        node: Any = rest
        for name in above:
            node = node.get(name) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.pop(last, None)
    rest = _merged(_STAND_IN, rest)
    named: dict[str, Any] = rest.get("regions", {})
    while len(named) < 2:
        named = {**named, f"stand-in-{len(named)}": {}}
    return {**rest, "regions": {name: _merged(_REGION_STAND_IN, region) for name, region in named.items()}}


def _explained(detail: ErrorDetails) -> Problem:
    """Pydantic's error as the line that an operator reads."""
    location = detail["loc"]
    field = ".".join(str(part) for part in location if part != "[key]")
    if detail["type"] == "missing":
        hint = f"set it in the file or as {ENV_PREFIX}{field.upper().replace('.', '__')}"
        return Problem((field,), "(missing)", "is required", hint)
    if detail["type"] == "extra_forbidden":
        known = _names_at(location[:-1])
        hint = nearest(str(location[-1]), known) or f"known here: {', '.join(sorted(known))}"
        # The value is not shown: a misspelt `pasword` would be.
        return Problem((field,), "(set)", "is not a setting", hint)
    value = _told(field, detail["input"])
    if detail["type"] == "rule":
        context = detail["ctx"]
        return Problem((field,), value, str(context["rule"]), str(context["hint"]))
    if field == "regions" and detail["type"] == "too_short":
        rule = "must hold at least two: with one there is nowhere to go, and the fence quorum (all but one) would be 0"
        return Problem((field,), f"({len(detail['input'])} given)", rule, "add a [regions.NAME] table")
    return Problem((field,), value, detail["msg"].replace("Input should be", "must be").replace("Input should", "must"))


def _told(field: str, value: object) -> str:
    hidden = field.endswith(("password", "webhook_url")) or (isinstance(value, str) and "@" in value and "://" in value)
    return "(hidden)" if hidden else shown(value)


def _names_at(location: tuple[int | str, ...]) -> set[str]:
    if not location:
        return set(Settings.model_fields)
    section = section_of(Settings.model_fields[str(location[0])])
    return set(section.model_fields) if section is not None else set()
