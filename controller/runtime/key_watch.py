"""Asks each region's KMS now and then whether it wraps. A holder needs none of them while its data key is good, for a day: so a
key that was disabled, or is going to be deleted, would show at the next rotation, or in the next disaster."""

from __future__ import annotations

from collections.abc import Sequence

from controller.domain.sealing import KmsSeen
from controller.errors import DrError
from controller.ports import Clock, Page, Pager, Seals

LOOK_SECONDS = 60.0
PAGE_AFTER_SECONDS = 180.0
"""A KMS that does not answer for a moment costs nothing and wakes nobody."""
RUNBOOK = "kms-unusable"


class KeyWatch:
    """One per process. ``seals`` None: nothing is sealed, and nothing is asked."""

    def __init__(self, seals: Seals | None, clock: Clock, pager: Pager) -> None:
        self._seals = seals
        self._clock = clock
        self._pager = pager
        self._paged: set[str] = set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self.look()
            await self._clock.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Once. Never raises for what a KMS says: see ``Seals.seen``."""
        if self._seals is None:
            return
        await self._seals.reach()
        seen = self._seals.seen()
        late = overdue(seen, self._clock.wall())
        self._paged &= {one.region for one in late}
        for one in late:
            if one.region in self._paged:
                continue
            title = f"the KMS of {one.region} does not wrap data keys"
            try:
                await self._pager.page(Page(f"kms-{one.region}", "warning", title, one.why, RUNBOOK))
                self._paged.add(one.region)
            except DrError:
                pass  # tried again at the next look


def overdue(seen: Sequence[KmsSeen], now: float) -> list[KmsSeen]:
    """Of which people are told. What is unknown is shown as that, and wakes nobody: it is asked every minute."""
    return [one for one in seen if one.wraps is False and now - one.since >= PAGE_AFTER_SECONDS]
