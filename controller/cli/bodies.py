"""Bodies of records as people may look at them: JSON and MessagePack pretty-printed, text as text, all else as hex.

Bodies are data of unknown origin. Nothing here runs them (no pickle, no YAML), depth and length are bounded, and what is
printed passes ``visible``. MessagePack inside of MessagePack (LangGraph's checkpoints) is opened too.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from controller.domain.text import visible

MAX_DEPTH = 64
MAX_LINES = 200
MAX_LINE_CHARS = 400
HEX_BYTES = 256
MAX_CHANGES = 500
_LONG_TEXT = 200

Form = Literal["empty", "json", "msgpack", "text", "binary"]


@dataclass(frozen=True, slots=True)
class Opened:
    """A body and what it was understood as. ``value``: for JSON and MessagePack; ``text``: for text."""

    form: Form
    value: Any = None
    text: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """One difference. ``op``: ``added``, ``removed``, ``changed``; ``path`` is like ``$.messages[3].content``."""

    path: str
    op: str
    old: Any = None
    new: Any = None


def open_body(body: bytes) -> Opened:
    """What the bytes are, by trying. Never raises."""
    if not body:
        return Opened("empty")
    try:
        return Opened("json", _plain(msgspec.json.decode(body)))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        pass
    try:
        found = msgspec.msgpack.decode(body)
        if isinstance(found, (dict, list)):  # any single byte is some number
            return Opened("msgpack", _plain(found))
    except (msgspec.MsgspecError, ValueError, RecursionError, TypeError):
        pass
    try:
        text = body.decode("utf-8")
        odd = sum(1 for char in text if not char.isprintable() and char not in "\n\r\t")
        if "\0" not in text and odd <= max(8, len(text) // 20):  # terminal colours in a log are still text
            return Opened("text", text=text)
    except UnicodeDecodeError:
        pass
    return Opened("binary")


def _plain(value: Any, depth: int = 0) -> Any:
    """JSON-like values only. Bytes and extension types are opened where they are MessagePack or text, else summarised."""
    if depth > MAX_DEPTH:
        return "… (nested deeper)"
    if isinstance(value, dict):
        return {key if isinstance(key, str) else repr(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        if len(value) == 2 and value[0] in ("msgpack", "json") and isinstance(value[1], bytes):
            return {f"${value[0]}": _inner(value[1], depth + 1)}
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, msgspec.msgpack.Ext):
        return {"$ext": value.code, "value": _inner(bytes(value.data), depth + 1)}
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _summary(bytes(value))
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return repr(value)  # a MessagePack timestamp


def _inner(data: bytes, depth: int) -> Any:
    for decode in (msgspec.msgpack.decode, msgspec.json.decode):
        try:
            return _plain(decode(data), depth)
        except (msgspec.MsgspecError, ValueError, RecursionError, TypeError):
            continue
    return _summary(data)


def _summary(data: bytes) -> dict[str, Any]:
    return {"$bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "head": data[:32].hex()}


# --------------------------------------------------------------------------------------------------------------- showing


def pretty(opened: Opened) -> list[str]:
    """Canonical lines: equal values give equal lines."""
    if opened.form in ("json", "msgpack"):
        return json.dumps(opened.value, indent=2, sort_keys=True, ensure_ascii=False).splitlines()
    return opened.text.splitlines()


def hex_lines(body: bytes, limit: int = HEX_BYTES) -> list[str]:
    """Offset, bytes, and what of them is ASCII."""
    lines = []
    for at in range(0, min(len(body), limit), 16):
        part = body[at : at + 16]
        seen = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        lines.append(f"{at:08x}  {part.hex(' '):<47}  {seen}")
    if len(body) > limit:
        lines.append(f"… {len(body) - limit:,} bytes more")
    return lines


def shown(body: bytes, max_lines: int = MAX_LINES) -> tuple[Form, list[str]]:
    """The form, and lines that are safe to print and few."""
    opened = open_body(body)
    lines = hex_lines(body) if opened.form == "binary" else pretty(opened)
    more = len(lines) - max_lines
    lines = [visible(line, MAX_LINE_CHARS, keep="\t") for line in lines[:max_lines]]
    if more > 0:
        lines.append(f"… {more:,} lines more (--lines, or --raw into a file)")
    return opened.form, lines


# ------------------------------------------------------------------------------------------------------------- comparing


def changes(old: Any, new: Any) -> list[Change]:
    """Differences of two JSON-like values, at most ``MAX_CHANGES``. Lists are matched by what begins and ends alike."""
    found: list[Change] = []
    for change in _changes("$", old, new):
        found.append(change)
        if len(found) >= MAX_CHANGES:
            break
    return found


def _changes(path: str, old: Any, new: Any) -> Iterator[Change]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            here = f"{path}.{key}" if key.isidentifier() else f"{path}[{json.dumps(key)}]"
            if key not in new:
                yield Change(here, "removed", old=old[key])
            elif key not in old:
                yield Change(here, "added", new=new[key])
            else:
                yield from _changes(here, old[key], new[key])
    elif isinstance(old, list) and isinstance(new, list):
        yield from _list_changes(path, old, new)
    elif type(old) is not type(new) or not _same(old, new):
        yield Change(path, "changed", old, new)


def _list_changes(path: str, old: list[Any], new: list[Any]) -> Iterator[Change]:
    first = 0
    while first < min(len(old), len(new)) and _same(old[first], new[first]):
        first += 1
    last = 0
    while last < min(len(old), len(new)) - first and _same(old[-1 - last], new[-1 - last]):
        last += 1
    left, right = old[first : len(old) - last], new[first : len(new) - last]
    for at, (one, other) in enumerate(zip(left, right, strict=False), start=first):
        yield from _changes(f"{path}[{at}]", one, other)
    both = min(len(left), len(right))
    for at, one in enumerate(left[both:], start=first + both):
        yield Change(f"{path}[{at}]", "removed", old=one)
    for at, other in enumerate(right[both:], start=first + both):
        yield Change(f"{path}[{at}]", "added", new=other)


def _same(one: Any, other: Any) -> bool:
    """NaN equals NaN here: nothing changed."""
    return bool(one == other) or (one != one and other != other)  # noqa: PLR0124


def text_changes(old: str, new: str, names: tuple[str, str]) -> list[str]:
    """A unified diff of two texts."""
    return list(difflib.unified_diff(old.splitlines(), new.splitlines(), *names, lineterm="", n=2))


def change_lines(change: Change) -> list[str]:
    """A change as people read it; long texts that changed are compared line by line."""
    if isinstance(change.old, str) and isinstance(change.new, str) and max(len(change.old), len(change.new)) > _LONG_TEXT:
        inside = text_changes(change.old, change.new, ("old", "new"))[2:]
        return [f"~ {change.path}", *(f"    {line}" for line in inside)]
    lines = [f"{ {'added': '+', 'removed': '-', 'changed': '~'}[change.op] } {change.path}"]
    if change.op != "added":
        lines.append(f"    - {json.dumps(change.old, ensure_ascii=False, sort_keys=True)}")
    if change.op != "removed":
        lines.append(f"    + {json.dumps(change.new, ensure_ascii=False, sort_keys=True)}")
    return lines
