"""A controller that lacks a guard, for the control of a run of failovers: a checker must notice.

``python -m tests.faults.unguarded --without GUARD serve --config FILE`` is ``drctl serve`` but for that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from controller.adapters import head_item
from controller.cli.main import main
from controller.domain.lease import Right


def _deadline() -> None:
    """A holder does not count how long it may act: it goes on until etcd says that its lease is gone."""
    Right.allows = lambda self, now: not self.lost  # type: ignore[method-assign]
    Right.leased = lambda self, now: not self.lost  # type: ignore[method-assign]
    Right.remaining_seconds = lambda self, now: 0.0 if self.lost else max(2.0, self.ends_at - now)  # type: ignore[method-assign]


def _fence() -> None:
    """And stores do not compare whose epoch it is: whoever follows the chain may write."""
    _deadline()
    anybody = "#epoch >= :e AND (#writer = :w OR #writer <> :w)"
    head_item._HELD = f"{anybody} AND #seq = :was_seq AND #chain = :was_chain"


@dataclass(frozen=True, slots=True)
class Control:
    """``remove`` takes the guard away from this process. ``checker``: who must notice."""

    remove: Callable[[], None]
    checker: str


CONTROLS = {"deadline": Control(_deadline, "one-active"), "fence": Control(_fence, "stores-fenced")}


if __name__ == "__main__":
    if sys.argv[1:2] != ["--without"]:
        sys.exit(f"python -m tests.faults.unguarded --without {'|'.join(CONTROLS)} serve --config FILE")
    CONTROLS[sys.argv[2]].remove()
    del sys.argv[1:3]
    main()
