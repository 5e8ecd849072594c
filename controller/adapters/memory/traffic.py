"""A hosted zone in memory with Route 53's rules, and ``Traffic`` and ``Resolver`` over it: the reference for the real ones.

``MemoryZone`` is the provider: atomic batches, exact-match DELETE, weighted answers, changes that take time to reach the
name servers. ``MemoryTraffic`` is one controller's way to it, through a gate that tests use to delay, fail or lose
messages. A request that was sent stays under way when its sender gives up: it may arrive late, which is the failure that
the compare-and-set exists for.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from controller.adapters.memory.gate import Gate, OpenGate
from controller.adapters.record_sets import (
    Change,
    Lookup,
    RecordSet,
    Status,
    ZoneCopy,
    epoch_name,
    identity,
    normal_name,
    same_content,
)
from controller.adapters.traffic import NO_CHANGE, BatchRejectedError, CompareAndSetTraffic
from controller.errors import NotFound, OutcomeUnknown, Unavailable
from controller.ports import Answer, Clock

HISTORY = 4096
"""Versions of a zone that are kept, for late name servers and for the checkers of tests."""


@dataclass(frozen=True, slots=True)
class ZoneVersion:
    """What the zone held from ``at`` on (seconds of the zone's clock)."""

    at: float
    change_id: str
    records: tuple[RecordSet, ...]
    copy: ZoneCopy


class MemoryZone:
    """One hosted zone at the provider, shared by all controllers and name servers of a test."""

    def __init__(
        self,
        name: str = "agents.dr.example.",
        *,
        apex: str = "dr.example.",
        clock: Clock | None = None,
        propagation_seconds: float = 0.0,
    ) -> None:
        """``name``: the group's name, the default of everything that uses the zone. ``clock`` None: the event loop's time."""
        self.name = normal_name(name)
        self.apex = normal_name(apex)
        self.propagation_seconds = propagation_seconds
        self.unhealthy: set[str] = set()
        """Ids of health checks that fail now."""
        self.in_flight: set[asyncio.Task[str]] = set()
        """Requests that were sent and have not arrived; a test may cancel them at its end."""
        self._clock = clock
        ns = "ns-1.example.net."
        soa = _simple(self.apex, "SOA", 900, (f"{ns} hostmaster.example.net. 1 7200 900 1209600 60",))
        first = (soa, _simple(self.apex, "NS", 172800, (ns,)))
        self._records: dict[tuple[str, str, str], RecordSet] = {identity(record): record for record in first}
        self._count = 0
        self.history = deque([ZoneVersion(float("-inf"), NO_CHANGE, first, ZoneCopy.of(first))], maxlen=HISTORY)

    def now(self) -> float:
        """Seconds of the zone's clock."""
        return self._clock.monotonic() if self._clock is not None else asyncio.get_running_loop().time()

    def records(self, name: str) -> list[RecordSet]:
        """Record sets of exactly this name, in the provider's order, as they are now."""
        owner = normal_name(name)
        return [record for key, record in sorted(self._records.items()) if key[0] == owner]

    def provision(
        self,
        addresses: Mapping[str, Sequence[str]],
        weights: Mapping[str, int],
        *,
        name: str | None = None,
        ttl_seconds: int = 5,
        health_checks: Mapping[str, str] | None = None,
    ) -> None:
        """What Terraform did before the test began: one weighted A record set per region, no TXT."""
        checks = health_checks or {}
        for region, values in addresses.items():
            record = dict(_simple(name or self.name, "A", ttl_seconds, values))
            record |= {"SetIdentifier": region, "Weight": weights[region]}
            if region in checks:
                record["HealthCheckId"] = checks[region]
            self.apply([Change("CREATE", record)], at=float("-inf"))

    def apply(self, batch: Sequence[Change], *, at: float | None = None) -> str:
        """All of the batch or nothing. Returns the change id. Raises BatchRejectedError with Route 53's wording.

        ``at``: when it happened, by the zone's clock; None = now."""
        after = dict(self._records)
        for change in batch:
            key = identity(change.record)
            what = f"resource record set [name='{key[0]}', type='{key[1]}', set identifier='{key[2]}']"
            old = after.get(key)
            if change.action == "CREATE":
                if old is not None:
                    raise BatchRejectedError(f"Tried to create {what} but it already exists")
                after[key] = {**change.record, "Name": key[0]}
            elif change.action == "DELETE":
                if old is None:
                    raise BatchRejectedError(f"Tried to delete {what} but it was not found")
                if not same_content(old, change.record):
                    raise BatchRejectedError(f"Tried to delete {what} but the values provided do not match the current values")
                del after[key]
            elif change.action == "UPSERT":
                after[key] = {**change.record, "Name": key[0]}
            else:
                raise ValueError(f"action {change.action!r} is none of CREATE, DELETE, UPSERT")
        self._records = after
        self._count += 1
        change_id = f"C{self._count:06d}"
        records = tuple(after.values())
        self.history.append(ZoneVersion(self.now() if at is None else at, change_id, records, ZoneCopy.of(records)))
        return change_id

    def in_sync(self, change_id: str) -> bool:
        """Whether the change has reached the name servers. Raises NotFound."""
        for version in self.history:
            if version.change_id == change_id:
                return self.now() >= version.at + self.propagation_seconds
        raise NotFound(f"no change {change_id}", hint="confirm with DNS itself")

    def seen_by_servers(self, staleness_seconds: float = 0.0) -> ZoneCopy:
        """The zone as a name server has it that is ``staleness_seconds`` behind the others."""
        seen = self.now() - self.propagation_seconds - staleness_seconds
        newest = next((version for version in reversed(self.history) if version.at <= seen), self.history[0])
        return newest.copy


class MemoryTraffic(CompareAndSetTraffic):
    """``Traffic`` of one controller over a ``MemoryZone``. Gate operations: ``read``, ``change``, ``in_sync``."""

    def __init__(
        self,
        zone: MemoryZone,
        regions: Collection[str],
        gate: Gate | None = None,
        *,
        name: str | None = None,
        ttl_seconds: int = 5,
        call_timeout_seconds: float = 2.0,
    ) -> None:
        super().__init__(name or zone.name, regions=regions, ttl_seconds=ttl_seconds)
        self._zone = zone
        self._gate: Gate = gate if gate is not None else OpenGate()
        self._timeout = call_timeout_seconds

    async def _list(self) -> Sequence[RecordSet]:
        async with _deadline("listing the zone", self._timeout):
            await self._gate.before("read")
            found = [*self._zone.records(self.name), *self._zone.records(epoch_name(self.name))]
            await self._gate.after("read")
        return found

    async def _submit(self, batch: Sequence[Change]) -> str:
        request = asyncio.create_task(self._deliver(batch))
        self._zone.in_flight.add(request)
        request.add_done_callback(self._forget)
        done, _ = await asyncio.wait({request}, timeout=self._timeout)
        if not done:
            raise OutcomeUnknown(f"the zone did not answer within {self._timeout:g} s", hint="read the zone again")
        return request.result()

    async def _deliver(self, batch: Sequence[Change]) -> str:
        await self._gate.before("change")
        change_id, rejected = "", None
        try:
            change_id = self._zone.apply(batch)
        except BatchRejectedError as error:
            rejected = error
        try:
            await self._gate.after("change")
        except Unavailable as error:
            raise OutcomeUnknown(f"the zone's answer was lost: {error}", hint="read the zone again") from error
        if rejected is not None:
            raise rejected
        return change_id

    def _forget(self, request: asyncio.Task[str]) -> None:
        self._zone.in_flight.discard(request)
        if not request.cancelled():
            request.exception()  # Retrieved: the sender may have given up long ago, and then nobody else looks at it.

    async def in_sync(self, change_id: str) -> bool:
        """Whether all name servers have the change. Raises NotFound, Unavailable."""
        if change_id == NO_CHANGE:
            return True
        async with _deadline("asking for a change", self._timeout):
            await self._gate.before("in_sync")
            answer = self._zone.in_sync(change_id)
            await self._gate.after("in_sync")
        return answer


class MemoryResolver:
    """``Resolver`` that asks name servers of a ``MemoryZone``: weighted answers, late copies. Gate operation: ``ask``."""

    def __init__(
        self,
        zone: MemoryZone,
        *servers: str,
        gate: Gate | None = None,
        rng: random.Random | None = None,
        staleness_seconds: Mapping[str, float] | None = None,
        timeout_seconds: float = 1.0,
    ) -> None:
        """``servers``: their names in the answers. ``staleness_seconds``: how far a server is behind the others."""
        self._zone = zone
        self._servers = servers or ("memory-1:53", "memory-2:53")
        self._gate: Gate = gate if gate is not None else OpenGate()
        self._rng = rng or random.Random(0)
        self._staleness = dict(staleness_seconds or {})
        self._timeout = timeout_seconds

    async def ask(self, name: str, rdtype: str) -> tuple[Answer, ...]:
        """See ``ports.Resolver.ask``. A gate that raises Unavailable or outlasts the deadline gives ``timeout``."""
        return tuple(await asyncio.gather(*(self._ask_one(server, name, rdtype) for server in self._servers)))

    async def _ask_one(self, server: str, name: str, rdtype: str) -> Answer:
        try:
            async with _deadline("asking a name server", self._timeout):
                await self._gate.before("ask")
                copy = self._zone.seen_by_servers(self._staleness.get(server, 0.0))
                found = copy.lookup(name, rdtype.upper(), self._rng.randrange, self._zone.unhealthy)
                await self._gate.after("ask")
        except Unavailable:
            return Answer(server, (), 0, "timeout")
        return _answer(server, rdtype.upper(), found)


def _answer(server: str, rdtype: str, found: Lookup) -> Answer:
    if found.status is not Status.ANSWER:
        return Answer(server, (), 0, str(found.status))
    last = found.chain[-1]
    if last.rtype != rdtype:
        return Answer(server, (), 0, f"the CNAME chain ends at {last.values[0]}, for which there is no {rdtype}")
    values = [text.strip('"').replace('" "', "") for text in last.values] if rdtype == "TXT" else list(last.values)
    return Answer(server, tuple(sorted(values)), min(step.ttl_seconds for step in found.chain))


@asynccontextmanager
async def _deadline(what: str, seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as late:
        raise Unavailable(f"{what}: no answer within {seconds:g} s", hint="wait or try again") from late


def _simple(name: str, rtype: str, ttl_seconds: int, values: Sequence[str]) -> RecordSet:
    return {"Name": normal_name(name), "Type": rtype, "TTL": ttl_seconds, "ResourceRecords": [{"Value": v} for v in values]}
