"""How many examples a loop without Hypothesis plays."""

from __future__ import annotations

import os


def examples(few: int) -> int:
    """``few`` in `make test`, thirty times as many in `make fuzz`."""
    return few * 30 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else few
