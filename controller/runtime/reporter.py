"""What the holder says of its stream, at a steady pace: lag, exposure, canaries, stand-ins for a home store that is down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from controller.domain import lag, replication
from controller.domain.model import EpochStart, Forks, Kind, Member, Position, RegionLag, StreamReport, Unknown
from controller.domain.sharing import LEAD
from controller.errors import Conflict
from controller.ports import Clock, Compare, Coordinator, Put
from controller.runtime.documents import Keys, encode, read
from controller.runtime.tenure import Tenure
from controller.stream.segment import frame
from controller.stream.writer import StreamWriter

CANARY_AGENT = "canary"


def own_agent(name: str, stream: str) -> str:
    """The name under which a stream's holder writes records of its own: an agent belongs to one stream, these too."""
    return name if stream == LEAD else f"{name}-{stream}"


@dataclass(frozen=True, slots=True)
class ReportPolicy:
    """Pace of reports and canaries, and when another store stands in for the home store."""

    rpo_seconds: float
    settle_seconds: float
    report_seconds: float
    canary_seconds: float
    brownout_seconds: float
    follow_seconds: float
    """How often a standby asks its region's store for news."""

    @property
    def verified_seconds(self) -> float:
        """How old a follower's last successful step may be: several of its rounds, and never less than a slow one takes."""
        return max(5.0, 10 * self.follow_seconds)


class Reporter:
    """Reports one stream while this instance holds it."""

    def __init__(
        self,
        coordinator: Coordinator,
        keys: Keys,
        clock: Clock,
        tenure: Tenure,
        writer: StreamWriter,
        policy: ReportPolicy,
        home: str,
    ) -> None:
        self._coordinator = coordinator
        self._keys = keys
        self._clock = clock
        self._tenure = tenure
        self._writer = writer
        self._policy = policy
        self._home = home
        self._began = clock.wall()
        self._verified_at: dict[str, float] = {}
        self._within_since: dict[str, float] = {}
        self._next_canary = 0.0

    def build(self, members: Sequence[Member]) -> StreamReport:
        """The report as of now. ``members``: live controllers, whose followers' positions tell what was verified."""
        writer, now = self._writer, self._writer.now()
        stream = writer.fence.stream
        verified = self._verified(members, stream)
        backlogs = {region: writer.backlog(region) for region in writer.pumps}
        regions = []
        for region, backlog in backlogs.items():
            if region == self._home:
                continue
            checked = lag.verified_by_region(verified, region, self._verified_at.get(region, self._began))
            if backlog is None:
                gone = Unknown(self._began, f"the store of {region} was never reached in epoch {writer.fence.epoch}")
                regions.append(RegionLag(region, gone, gone, gone, gone, gone, checked))
            else:
                regions.append(lag.region_lag(backlog, checked, now))
        known = [backlog for backlog in backlogs.values() if backlog is not None]
        seconds, records = lag.exposure(known, now)
        acknowledged = writer.acknowledged
        enforcing = writer.objective.problem(writer.seq)
        return self._with_protection(StreamReport(
            stream=stream,
            region=self._home,
            instance=writer.fence.instance,
            epoch=writer.fence.epoch,
            at=self._clock.wall(),
            seq=writer.pumps[self._home].seq,
            acknowledged_seq=acknowledged.seq,
            acknowledged_records=acknowledged.records,
            regions=tuple(regions),
            exposure_seconds=seconds,
            exposure_records=records,
            unreplicated=writer.unreplicated(),
            enforcing_since=writer.objective.since or 0.0,
            enforcing=enforcing or "",
        ))  # fmt: skip

    def _verified(self, members: Sequence[Member], stream: str) -> dict[str, int]:
        """How far the followers of each region have read back *our* history, as of a moment ago.

        A follower that has not been able to read for a while says what it once verified, and one that stands on another
        history verified something else: neither proves that this region could take over now. The age of a position is
        measured between two stamps of the member's own clock, since clocks of machines differ.
        """
        found: dict[str, int] = {}
        for member in members:
            position = member.positions.get(stream)
            if position is None or member.at - position.at > self._policy.verified_seconds:
                continue
            seq = common_seq(self._writer.starts, self._writer.seq, position)
            if seq is not None:
                found[member.region] = max(seq, found.get(member.region, 0))
        self._verified_at.update(dict.fromkeys(found, self._clock.wall()))
        return found

    def _with_protection(self, report: StreamReport) -> StreamReport:
        """Adds which regions could take over within the RPO, and have been able to for the settling time."""
        now = self._clock.monotonic()
        result: list[str] = []
        for region in report.regions:
            within = (
                not isinstance(region.seconds, Unknown)
                and not isinstance(region.verified_seq, Unknown)
                and region.seconds <= self._policy.rpo_seconds
                and self._writer.age_beyond(region.verified_seq) <= self._policy.rpo_seconds
            )
            since = self._within_since.setdefault(region.region, now) if within else self._within_since.pop(region.region, None)
            verdict = lag.protected(
                region,
                rpo_seconds=self._policy.rpo_seconds,
                within_since=since if within else None,
                now=now,
                settle_seconds=self._policy.settle_seconds,
            )
            if verdict is True:
                result.append(region.region)
        return replace(report, protected=tuple(result))

    async def publish(self, report: StreamReport) -> None:
        """Writes the report, guarded by the holder key. Raises Unavailable, Conflict when we hold no more."""
        result = await self._coordinator.txn([self._tenure.guard], [Put(self._keys.report(report.stream), encode(report))])
        if not result.succeeded:
            raise Conflict("the holder key is not ours any more", hint="step down")

    async def canary(self) -> None:
        """A record through the whole path, so that a silent fleet does not look like a silent replication."""
        now = self._clock.monotonic()
        if now < self._next_canary or not self._tenure.may_act():
            return
        self._next_canary = now + self._policy.canary_seconds
        at = self._writer.now()
        record_id = f"{self._writer.fence.epoch}-{at:.3f}"
        agent = own_agent(CANARY_AGENT, self._writer.fence.stream)
        await self._writer.submit([frame(agent, record_id, Kind.CANARY, f"{at:.6f}".encode(), created_at=at)])

    async def stand_in(self) -> str | None:
        """While the home store is browned out, lets the best other store acknowledge alone, *after* recording that in etcd."""
        writer = self._writer
        silent = writer.home_silent_seconds()
        others = [pump for pump in writer.pumps.values() if pump.attached and pump.region != self._home]
        if silent >= self._policy.brownout_seconds and others and writer.sole_ackers == (self._home,):
            best = max(others, key=lambda pump: (pump.seq, pump.region)).region
            await self._record((self._home, best))
            return f"the home store is silent for {silent:.0f} s: {best} may acknowledge alone"
        caught_up = writer.pumps[self._home].attached and writer.pumps[self._home].seq >= writer.acknowledged.seq
        if silent == 0 and caught_up and len(writer.sole_ackers) > 1:
            await self._record((self._home,))
            return "the home store is back and has everything: it alone acknowledges single copies again"
        return None

    async def _record(self, sole_ackers: tuple[str, ...]) -> None:
        if set(sole_ackers) < set(self._writer.sole_ackers):
            # Stop counting on the stand-in before anything is awaited, and so before the record says so: what it acknowledged
            # alone was checked to be at home by now, and nothing is added to it.
            self._writer.sole_ackers = sole_ackers
        key = self._keys.forks(self._writer.fence.stream)
        forks = await read(self._coordinator, key, Forks)
        if forks is None:
            raise Conflict("the forks of this stream are gone from etcd", hint="drctl status")
        changed = encode(replace(forks.value, sole_ackers=sole_ackers))
        result = await self._coordinator.txn([self._tenure.guard, Compare.modified(key, forks.revision)], [Put(key, changed)])
        if not result.succeeded:
            raise Conflict("the holder key is not ours any more", hint="step down")
        self._writer.sole_ackers = sole_ackers
        self._writer.wait_settled()


def common_seq(starts: tuple[EpochStart, ...], last: int, position: Position) -> int | None:
    """The last segment that a follower at ``position`` certainly has in common with the history of ``starts``, which has
    ``last`` segments; None: nothing is certain.

    Equal epochs at a seq mean an equal history up to it (log matching). A copy that goes on in an epoch after our history
    left it has in common with us what that epoch owns in ours.
    """
    if replication.owner(starts, position.seq) == position.epoch:
        return position.seq if position.seq <= last else None
    for start, following in pairwise(starts):
        if start.epoch == position.epoch and following.first_seq <= position.seq:
            return following.first_seq - 1
    return None
