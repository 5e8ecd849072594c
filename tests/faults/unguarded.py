"""A controller that lacks one guard, for the control of a run of failovers: its checkers must notice two believers.

``python -m tests.faults.unguarded --without GUARD serve --config FILE`` is ``drctl serve`` but for that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from controller.cli.main import main
from controller.domain.lease import Right
from controller.runtime.opening import Opening


def _deadline() -> None:
    """A holder does not count how long it may act: it goes on until etcd says that its lease is gone."""
    Right.allows = lambda self, now: not self.lost  # type: ignore[method-assign]
    Right.leased = lambda self, now: not self.lost  # type: ignore[method-assign]
    Right.remaining_seconds = lambda self, now: 0.0 if self.lost else max(2.0, self.ends_at - now)  # type: ignore[method-assign]


def _outwait() -> None:
    """Who comes next does not wait until everything that was lent has run out, and margins are forgotten."""

    async def at_once(self: Opening, last: object) -> None:
        self._still_ours()

    Opening._outwait = at_once  # type: ignore[method-assign]


GUARDS: dict[str, Callable[[], None]] = {"deadline": _deadline, "outwait": _outwait}


if __name__ == "__main__":
    if sys.argv[1:2] != ["--without"]:
        sys.exit(f"python -m tests.faults.unguarded --without {'|'.join(GUARDS)} serve --config FILE")
    GUARDS[sys.argv[2]]()
    del sys.argv[1:3]
    main()
