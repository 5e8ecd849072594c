"""Text that strangers chose, made harmless: the one function for terminals, logs, pages, labels and error messages.

Names, reasons and error texts come from agents, servers and other people. On a terminal a control character acts, in a log a
newline forges a line, before an eye a direction mark turns a word around. All of them are shown as escapes instead.
"""

from __future__ import annotations

import unicodedata

MAX_TEXT_CHARS = 4000
MAX_LINE_CHARS = 200
"""Of what stands on one line of a page or in one label."""

CUT = "…"
"""Stands at the end of a text that was cut."""

_ESCAPED = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
"""Control, format (direction marks, zero width), half a character, private use, unassigned, line and paragraph separators."""


def visible(text: object, limit: int = MAX_TEXT_CHARS, *, keep: str = "") -> str:
    """``text`` with every character of those kinds shown as an escape, and cut at ``limit`` characters (before escaping).

    ``keep``: control characters that stay (a newline, where the layout allows one). Doing it twice changes nothing.
    """
    raw = str(text)
    cut = raw if len(raw) <= limit else raw[:limit] + CUT
    if cut.isascii() and cut.isprintable():
        return cut
    return "".join(char if char in keep or unicodedata.category(char) not in _ESCAPED else _escape(char) for char in cut)


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
