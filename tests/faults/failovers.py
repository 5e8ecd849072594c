"""Very many real partition failovers, as fast as the protocol allows: ``make faults ARGS="--failovers 1000"``.

A failover counts when a holder was cut off, somebody else took over, and an agent was acknowledged in the new epoch. The next
partition hits the new holder as soon as there is somebody who could take over from it. A group lives for ``per_group`` of
them; its whole history is judged every ``judge_every`` of them and at its end, by all checkers, and no history is cut in
pieces: a new group begins with an empty one. So memory and the time of a judgement have a bound, however long a run is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controller.cli.lab import read_settings
from controller.domain.model import Holder, Member
from controller.errors import DrError
from controller.lab.supervisor import Lab
from controller.lab.topology import Topology
from controller.runtime.documents import decode, read_all
from tests.faults.controls import unnoticed
from tests.faults.machines import START_SECONDS, MachineLab, MachineNetwork, machines_of, on_machines
from tests.faults.network import Network
from tests.faults.partitions import BETWEEN, INSIDE, PARTITIONS, Partition
from tests.faults.people import GaveUp
from tests.faults.recorded import STREAM
from tests.faults.runner import Judge
from tests.faults.stage import Stage
from tests.faults.tally import Journal
from tests.faults.worker import now

TTL_SECONDS = 3
"""The smallest that the lab's other settings allow: 3 calls of 0.5 s, and a margin of 1 s, have to fit in."""
AWS = {"call_timeout_seconds": 1.5, "connect_timeout_seconds": 0.5}
"""A promotion asks the lost region's store three times, and each time waits so long for an answer."""
STANDSTILL_SECONDS = 300.0
"""Nobody serves for so long: that is a problem of its own. A machine that starves every process looks like this, too."""
FOLLOW_SECONDS = 0.5
"""Of standbys; a promotion reads what is missing by itself."""
POLL_SECONDS = 0.05
WORK_SECONDS = 1.0
"""At most so long a group is left at work between two cuts, so that they come at any moment."""
MOST_FAILED_STARTS = 3
"""One after the other; then the run ends."""
OFTEN = {INSIDE: 2, BETWEEN: 1}
"""In one round through the list: people take twice as long."""
HEAL_AT = ("taken", "served")
"""When a cut is mended: as soon as there is a new holder, which then opens its epoch; or once it serves."""


@dataclass
class FailoverStage(Stage):
    """Every controller on a machine of its own, and a short lease. ``program``: what runs instead of ``controller``."""

    instances: int = 2
    program: Sequence[str] = ("controller",)
    network: MachineNetwork = field(init=False)

    def _settings(self) -> Mapping[str, Any]:
        found = read_settings(None)
        self._machines = machines_of(list(found["regions"]), self.instances)
        document = on_machines(found, self._machines, {"ttl_seconds": TTL_SECONDS})
        document["stream"]["follow_seconds"] = FOLLOW_SECONDS
        document["aws"].update(AWS)
        return document

    def _network(self) -> Network:
        return MachineNetwork(self.regions, machines=self._machines)

    def _lab(self, topology: Topology) -> Lab:
        lab = MachineLab(topology, **self._lab_options())
        lab.network, lab.program = self.network, self.program
        return lab


@dataclass
class Moments:
    """Of one failover, boot time; 0: not yet."""

    began: float = field(default_factory=now)
    ready: float = 0.0
    cut: float = 0.0
    gone: float = 0.0
    taken: float = 0.0
    served: float = 0.0
    finished: float = 0.0
    healed: float = 0.0

    def phases(self, struck: float) -> dict[str, float]:
        """Seconds of each part of the cycle; see ``tally.PHASES``. Nobody has to see the key gone before there is a new one."""
        gone = min(self.gone or self.taken, self.taken)
        found = {
            "ready": self.ready - self.began,
            "strike": self.cut - struck,
            "lease": max(0.0, gone - self.cut),
            "acquire": self.taken - gone,
            "serve": self.served - self.taken,
            "heal": self.healed,
        }
        if self.finished:
            found["finish"] = max(0.0, self.finished - self.served)
        return {name: round(seconds, 3) for name, seconds in found.items()}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a run is asked for."""

    failovers: int
    partitions: Sequence[Partition] = tuple(PARTITIONS)
    per_group: int = 100
    judge_every: int = 25
    instances: int = 2
    program: Sequence[str] = ("controller",)
    keep: Path | None = None
    stop_at_violation: bool = False


def _moved(partition: Partition, before: Holder, after: Holder) -> bool:
    """Whether somebody else holds the lease: another region, where people had to move it."""
    if partition.kind == BETWEEN:
        return after.region != before.region
    return (after.region, after.instance) != (before.region, before.instance)


class Player:
    """Plays partitions on one group."""

    def __init__(
        self,
        stage: FailoverStage,
        name: str,
        journal: Journal,
        rng: random.Random,
        say: Callable[[str], None],
        keep: Path | None = None,
    ) -> None:
        self._stage = stage
        self.name = name
        self._journal = journal
        self._rng = rng
        self._say = say
        self._keep = keep
        self._judge: Judge | None = None
        self._judging = threading.Lock()
        self._healed_at = 0.0
        """Wall time of the last mending."""
        self.done = 0
        self.violated = False
        """By a checker, or because nobody served."""
        self._spoiled = False
        """By a checker: mutants can only be made of a good history."""

    async def play_all(self, wanted: Wanted, goal: int) -> None:
        """So many failovers, and the verdict. When it is cancelled, the verdict on what was done until then."""
        try:
            await self._play_all(wanted, goal)
        except asyncio.CancelledError:
            self._stage.mend()
            task = asyncio.current_task()
            if task is not None and self.done:
                task.uncancel()  # once: the verdict on what was done is part of the report
                await self.judge(last=True)
            raise

    async def _play_all(self, wanted: Wanted, goal: int) -> None:
        queue: list[Partition] = []
        judged = 0
        try:
            while self.done < goal and not (self.violated and wanted.stop_at_violation):
                if not queue:
                    queue = [one for one in wanted.partitions for _ in range(OFTEN[one.kind])]
                    self._rng.shuffle(queue)
                await self.play(queue.pop())
                if self.done - judged >= wanted.judge_every and self.done < goal:
                    judged = self.done
                    await self.judge()
        except (GaveUp, DrError, OSError) as error:
            self.problem(str(error))
            self._stage.mend()
        await self.judge(last=True)

    # ------------------------------------------------------------------------------------------------------ one failover

    async def play(self, partition: Partition) -> None:
        """From the wait for a group that can be struck to the mended cut. Raises GaveUp when nobody took over in time."""
        stage, moments = self._stage, Moments()
        while True:
            before = await self._ready(partition.kind)
            await asyncio.sleep(self._rng.uniform(0.0, WORK_SECONDS))
            held = self._holder()[0]
            if held is not None and held.epoch == before.epoch:
                break
        moments.ready = now()
        heal_at = self._rng.choice(HEAL_AT)
        try:
            await partition.strike(stage, before, self._rng)
            moments.cut = now()
            people = asyncio.create_task(self._people(partition, before, moments))
            try:
                after = await self._taken(partition, before, moments)
                if heal_at == "taken":
                    self._heal(moments)
                await self._served(after, moments)
                if heal_at == "served":
                    self._heal(moments)
                await people
            finally:
                people.cancel()
                await asyncio.gather(people, return_exceptions=True)
        finally:
            self._heal(moments)
        self._note(partition, before, after, moments)

    async def _ready(self, kind: str) -> Holder:
        """Waits until agents are acknowledged by the present holder and somebody could take over from it. Raises GaveUp."""
        until = time.monotonic() + STANDSTILL_SECONDS
        while time.monotonic() < until:
            with contextlib.suppress(DrError):
                holder = await self._stage.people.holder()
                self._stage.last_acks()
                if holder is not None and holder.epoch in self._stage.first_acks and await self._heirs(holder, kind):
                    return holder
            await asyncio.sleep(POLL_SECONDS)
        raise GaveUp(f"after {STANDSTILL_SECONDS:.0f} s nobody was ready to take over {kind}")

    async def _heirs(self, holder: Holder, kind: str) -> list[Member]:
        """Living instances that may take over: they have said so in etcd since everything was mended."""
        people = self._stage.people
        members = [seen.value for seen in await read_all(people.coordinator, people.keys.members, Member)]
        alive = [member for member in members if member.at > self._healed_at]
        if kind == INSIDE:
            return [member for member in alive if member.region == holder.region and member.instance != holder.instance]
        return [member for member in alive if member.region != holder.region]

    async def _taken(self, partition: Partition, before: Holder, moments: Moments) -> Holder:
        """Waits for a holder that is another instance, or in another region. Raises GaveUp."""
        until = time.monotonic() + STANDSTILL_SECONDS
        while time.monotonic() < until:
            holder, heard_at = self._holder()
            if holder is None or holder.epoch > before.epoch:
                moments.gone = moments.gone or heard_at
            if holder is not None and _moved(partition, before, holder):
                moments.taken = heard_at
                return holder
            await asyncio.sleep(POLL_SECONDS)
        raise GaveUp(f"nobody took over from {before.region}/{before.instance} within {STANDSTILL_SECONDS:.0f} s")

    def _holder(self) -> tuple[Holder | None, float]:
        """Who holds the lease, as the watchers have heard, and since when (boot time)."""
        value, heard_at = self._stage.recorded._watched.newest(self._stage.people.keys.holder(STREAM))
        return decode(Holder, value) if value is not None else None, heard_at

    async def _served(self, after: Holder, moments: Moments) -> None:
        """Waits for the first acknowledgement of its epoch, or of a later one. Raises GaveUp."""
        until = time.monotonic() + STANDSTILL_SECONDS
        while time.monotonic() < until:
            self._stage.last_acks()
            served = [at for epoch, at in self._stage.first_acks.items() if epoch >= after.epoch]
            if served:
                moments.served = min(served)
                return
            await asyncio.sleep(POLL_SECONDS)
        raise GaveUp(f"no agent was acknowledged in epoch {after.epoch} within {STANDSTILL_SECONDS:.0f} s")

    async def _people(self, partition: Partition, before: Holder, moments: Moments) -> None:
        """Between regions people plan, sign and give the order as soon as nobody holds the lease. Raises GaveUp."""
        if partition.kind == INSIDE:
            return
        while not moments.gone:  # noqa: ASYNC110 - no event: whoever looks sees it
            await asyncio.sleep(POLL_SECONDS)
        heirs = sorted({member.region for member in await self._heirs(before, BETWEEN)} or self._others(before.region))
        target = self._rng.choice(heirs)
        for _ in range(3):
            plan = await self._stage.people.order("failover", target, STANDSTILL_SECONDS)
            record = await self._stage.people.ended(plan, STANDSTILL_SECONDS)
            if record.state.value == "done":
                moments.finished = now()
                return
            self._say(f"  plan {plan} ended {record.state.value}: {record.reason}")
        raise GaveUp(f"no failover to {target} was done: {record.state.value} {record.reason}")

    def _others(self, region: str) -> set[str]:
        return set(self._stage.regions) - {region}

    def _heal(self, moments: Moments) -> None:
        """Everything reaches everybody again, and what was stopped goes on. Once."""
        if moments.healed:
            return
        began = now()
        self._stage.mend()
        self._healed_at = time.time()
        moments.healed = now() - began

    def _note(self, partition: Partition, before: Holder, after: Holder, moments: Moments) -> None:
        if moments.gone and moments.gone < moments.ready:  # it had lost its lease by itself a moment before
            self._journal.note("void", group=self.name, kind=partition.kind, partition=partition.name)
            return
        early = moments.gone and moments.gone < moments.cut  # while it still flapped
        took = moments.served - (moments.ready if early else moments.cut)
        names = [f"{holder.region}/{holder.instance}" for holder in (before, after)]
        self._journal.note(
            "failover",
            group=self.name,
            kind=partition.kind,
            partition=partition.name,
            took=round(took, 3),
            source=names[0],
            target=names[1],
            epoch=after.epoch,
            phases=moments.phases(moments.ready),
        )
        self.done += 1
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in moments.phases(moments.ready).items())
        self._say(f"{partition.name}: {names[0]} -> {names[1]}, epoch {after.epoch}, {took:.1f} s ({phases})")

    # ----------------------------------------------------------------------------------------------------------- verdicts

    async def judge(self, *, last: bool = False) -> None:
        """All checkers on the whole history of this group, when it is whole again. ``last``: and mutants of it."""
        try:
            await self._stage.settled(STANDSTILL_SECONDS)
        except (GaveUp, DrError, OSError) as error:
            self.problem(str(error))
        began, used = time.monotonic(), time.process_time()
        judge = self._judge = self._judge or Judge(self._stage)
        found = await asyncio.to_thread(self._judged, judge)
        record = self._stage.recorded
        self._spoiled = self._spoiled or bool(found)
        self.violated = self.violated or bool(found)
        self._journal.note(
            "verdict",
            group=self.name,
            failovers=self.done,
            violations=found,
            operations=judge.operations,
            acknowledgements=len(record.acks),
            transactions=len(record.history.transactions),
            segments=sum(len(server.objects) for server in record.servers.values()),
            holes=record._watched.holes,
            rss_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            judging_seconds=[round(time.monotonic() - began, 2), round(time.process_time() - used, 2)],
            cpu_seconds=self._cpu_seconds(),
        )
        self._say(f"judged {self.done} failovers of group {self.name}: {'; '.join(found) or 'ok'}")
        if self.violated:
            self._keep_records()
        if last and not self._spoiled:
            tried, missed = await asyncio.to_thread(unnoticed, record)
            self._journal.note("mutants", group=self.name, tried=tried, unnoticed=missed)

    def _judged(self, judge: Judge) -> list[str]:
        with self._judging:  # a judgement whose waiter was cancelled goes on to its end
            return judge.judge()

    def _cpu_seconds(self) -> dict[str, float]:
        """What living processes have used since they began, by kind."""
        used: dict[str, float] = {}
        for process in self._stage.lab.processes():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
                used[process.kind] = used.get(process.kind, 0.0) + sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
        return {kind: round(seconds, 1) for kind, seconds in used.items()}

    def _keep_records(self) -> None:
        if self._keep is not None:
            with contextlib.suppress(OSError):
                self._stage.keep_records(self._keep / self.name)

    def problem(self, text: str) -> None:
        """Something did not happen within its time."""
        self._journal.note("problem", group=self.name, text=text)
        self._say(f"  {text}")
        self.violated = True
        self._keep_records()


async def play_many(wanted: Wanted, journal: Journal, seed: int, say: Callable[[str], None]) -> None:
    """Group after group until as many failovers were made. When it is cancelled, what was done until then is judged first.

    Whatever goes wrong with a group is written down as a problem, which fails the run, and the next group begins. One that did
    not come up at all says nothing about failovers: it is written down, and another one is tried."""
    rng = random.Random(seed)
    done = number = failed = 0
    while done < wanted.failovers and failed < MOST_FAILED_STARTS:
        number += 1
        stage = FailoverStage(
            say,
            pause_seconds=0.4,
            attempt_seconds=1.0,
            register_pause_seconds=0.5,
            start_seconds=START_SECONDS,
            disks=False,
            instances=wanted.instances,
            program=wanted.program,
        )
        player = Player(stage, f"{seed}-{number}", journal, rng, say, wanted.keep)
        up = False
        try:
            async with stage:
                up = True
                say(f"group {player.name} is up")
                await player.play_all(wanted, min(wanted.per_group, wanted.failovers - done))
        except Exception as error:  # noqa: BLE001 - hours of other groups' results must not go with it
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            if up:
                player.problem(text)
            else:
                journal.note("unstarted", group=player.name, text=text)
                say(f"  {text}")
        done += player.done
        failed = 0 if player.done else failed + 1
        if player.violated and wanted.stop_at_violation:
            return
