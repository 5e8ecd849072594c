"""What must stand nowhere, and the search for it: in every spelling in which a value gets into a text by accident."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

SHORTEST = 12
"""A mark of fewer characters could be there by chance."""


def spellings(secret: str | bytes) -> frozenset[str]:
    """As it is, in hex, in base64 at each of its three alignments, as Python and as JSON show it."""
    raw = secret.encode() if isinstance(secret, str) else secret
    text = raw.decode("latin-1")
    found = {text, raw.hex(), raw.hex().upper(), raw.hex(" "), repr(raw)[2:-1], json.dumps(text)[1:-1], str(list(raw))[1:-1]}
    for padding in range(3):
        # Of an unaligned value the first and the last characters depend on its neighbours.
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            found.add(encode(bytes(padding) + raw).decode().rstrip("=")[4 if padding else 0 : -2])
    return frozenset(one for one in found if len(one) >= SHORTEST)


def key_marks(pem: Path) -> list[str]:
    """The lines of a private key's file that nobody could write by chance."""
    lines = [line for line in pem.read_text().splitlines() if not line.startswith("-----") and len(line) >= SHORTEST]
    assert "PRIVATE KEY" in pem.read_text(), f"{pem} is not a private key"
    assert lines, f"{pem} has no line that can be searched for"
    return lines


class Marks:
    """What is searched for: what it is → the values."""

    def __init__(self, secrets: Mapping[str, Iterable[str | bytes]]) -> None:
        self._needles = {what: frozenset().union(*map(spellings, values)) for what, values in secrets.items()}
        empty = [what for what, needles in self._needles.items() if not needles]
        assert not empty, f"nothing would be searched for: {empty}"

    def found_in(self, texts: Mapping[str, str]) -> list[str]:
        """``what in place``, for everything that is where it must not be."""
        return [
            f"{what} in {place}"
            for place, text in texts.items()
            for what, needles in self._needles.items()
            if any(needle in text for needle in needles)
        ]
