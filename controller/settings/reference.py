"""What is said about settings as a whole: their reference, and the fingerprint of those that a group shares."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from controller.settings.model import ENV_PREFIX, RegionSettings, Settings


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The table that a field holds; for ``regions`` that of each of its values."""
    annotation = field.annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return RegionSettings if field is Settings.model_fields["regions"] else None


@dataclass(frozen=True, slots=True)
class SettingDoc:
    """One setting as the reference shows it."""

    name: str
    type: str
    default: str
    variable: str
    shared: bool
    """Must be equal in all controllers of a group."""
    description: str


def describe() -> tuple[SettingDoc, ...]:
    """Every setting, in the order of this page. A region's are named ``regions.NAME.…``."""
    return tuple(_described(Settings, ""))


def _described(model: type[BaseModel], prefix: str) -> Iterator[SettingDoc]:
    for name, field in model.model_fields.items():
        section = section_of(field)
        if section is not None:
            yield from _described(section, f"{prefix}{name}." + ("NAME." if name == "regions" else ""))
            continue
        path = f"{prefix}{name}"
        default = "" if field.is_required() else json.dumps(field.get_default(), default=str)
        variable = f"{ENV_PREFIX}{path.upper().replace('.', '__')}"
        yield SettingDoc(path, _type_name(field.annotation), default, variable, not _is_local(field), field.description or "")


def _type_name(annotation: Any) -> str:
    """How people write the type: ``list[str]``, ``Path | None``, ``alert | enforce``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin is list:
        return f"list[{_type_name(arguments[0])}]"
    if arguments:
        return " | ".join(_type_name(argument) for argument in arguments)
    return "None" if annotation is type(None) else str(annotation.__name__)


def _is_local(field: FieldInfo) -> bool:
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("local"))


def fingerprint(settings: Settings) -> str:
    """SHA-256 (hex) over the settings that must be equal in all controllers of a group.

    A new setting counts unless it is marked LOCAL: a false alarm is better than two controllers that silently disagree."""
    canonical = json.dumps(_shared(settings), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _shared(model: BaseModel) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, field in type(model).model_fields.items():
        if _is_local(field):
            continue
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            result[name] = _shared(value)
        elif name == "regions":
            result[name] = {key: _shared(region) for key, region in value.items()}
        else:
            result[name] = value
    return result
