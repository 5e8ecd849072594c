"""Notices that one stream has had no holder for long while the others are served. People are told, nothing is proposed.

A region of which nobody holds anything is another matter (``watch.py``). Here the agents of one stream are not served, and
moving the whole group may not be what people want: whatever keeps the region's instances from this stream comes first.
"""

from __future__ import annotations

from dataclasses import replace

from controller.errors import DrError, Unavailable
from controller.ports import Compare, Page, Pager, Put
from controller.runtime.audit import Audit
from controller.runtime.documents import Seen, encode, read_readable
from controller.runtime.evidence import Coordination, Outside
from controller.runtime.service import Incident

UNHELD = "stream-unheld"
PATIENCE_TTLS = 4
"""So many lease TTLs a stream may be without a holder: its old lease, a neighbour's grace, and opening it."""
RETRY_SECONDS = 10.0


class StreamWatch:
    """One per controller; any of them may notice first."""

    def __init__(self, outside: Outside, audit: Audit, pager: Pager, who: str, ttl_seconds: float) -> None:
        self._outside = outside
        self._audit = audit
        self._pager = pager
        self._who = who
        self._patience = PATIENCE_TTLS * ttl_seconds
        self._since: dict[str, float] = {}
        self._page_after = float("-inf")

    async def look(self, seen: Coordination) -> str | None:
        """Called at every tick. Returns a sentence when it did something. Raises Unavailable."""
        if len(self._outside.streams) == 1:
            return None
        now = self._outside.clock.monotonic()
        held = {holder.stream for holder in seen.holders}
        partly = bool(held) and seen.authority.value.barrier is None
        for stream in self._outside.streams:
            if stream in held or not partly:
                self._since.pop(stream, None)
            else:
                self._since.setdefault(stream, now)
        long = [stream for stream, since in self._since.items() if now - since > self._patience]
        found = await read_readable(self._outside.coordinator, self._outside.keys.incident(UNHELD), Incident)
        still = {known.value.id.split(".")[1]: known for known in found.documents if not known.value.closed_at}
        said = [await self._close(known) for stream, known in still.items() if stream in held]
        said += [await self._open(stream, seen, len(found.documents)) for stream in long if stream not in still]
        said += [await self._tell(still[stream]) for stream in long if stream in still and not still[stream].value.paged_at]
        return "; ".join(sentence for sentence in said if sentence) or None

    async def _open(self, stream: str, seen: Coordination, number: int) -> str:
        keys, at = self._outside.keys, self._outside.clock.wall()
        region = seen.authority.value.region
        others = ", ".join(sorted({holder.instance for holder in seen.holders}))
        incident = Incident(
            id=f"{UNHELD}.{stream}.{number + 1}",
            kind=UNHELD,
            title=f"nobody holds stream {stream} of group {keys.group}; its agents are not served",
            detail=f"the other streams are served by {others} in {region}",
            opened_at=at,
            by=self._who,
            region=region,
        )
        key = keys.incident(incident.id)
        written = await self._audit.commit(
            [Compare.absent(key), Compare.absent(keys.holder(stream))],
            [Put(key, encode(incident))],
            at=at,
            actor=self._who,
            action="incident",
            subject=incident.id,
            detail={"title": incident.title},
        )
        return f"incident {incident.id} is open" if written.succeeded else ""

    async def _tell(self, known: Seen[Incident]) -> str:
        """Writes down first who tells people, so that one does; whoever reaches nobody takes it back."""
        clock, incident = self._outside.clock, known.value
        if clock.monotonic() < self._page_after:
            return ""
        told = replace(incident, paged_at=clock.wall(), paged_by=self._who)
        key = known.item.key
        taken = await self._outside.coordinator.txn([Compare.modified(key, known.revision)], [Put(key, encode(told))])
        if not taken.succeeded:
            return ""
        advice = f"{incident.detail}. Look: drctl status, and the log of that region's controllers"
        try:
            await self._pager.page(Page(incident.id, "critical", incident.title, advice, "region-failover"))
        except DrError as error:
            self._page_after = clock.monotonic() + RETRY_SECONDS
            await self._outside.coordinator.txn([], [Put(key, encode(incident))])
            raise Unavailable(f"people were not told of {incident.id}: {error.message}", hint="call them by hand") from error
        return f"people were told of incident {incident.id}"

    async def _close(self, known: Seen[Incident]) -> str:
        closed = replace(known.value, closed_at=self._outside.clock.wall())
        key = known.item.key
        written = await self._outside.coordinator.txn([Compare.modified(key, known.revision)], [Put(key, encode(closed))])
        return f"incident {closed.id} is over" if written.succeeded else ""
