"""Failovers one after the other: the random layer of ``runs.py`` finds what is strange, this one plays what is rare, often.

Each world moves its group ``moves`` times. Each move has a cause (a region dies, its controllers die, its links go first, its
holder freezes and wakes at some time, etcd cannot be reached from it, or people simply want to move), and most of them a
strike on top, drawn from all calls of a promotion: death before, death after, a lost answer, a store that goes during `fence`.
Then everything is healed and the next move comes. All checkers judge the whole world at its end.

Worlds are small (few records, slow ticks), because what a failover costs here decides how many can be played.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from controller.domain.promotion import PlanRecord, State
from controller.errors import DrError
from controller.lab.virtual_time import run_virtual
from tests.simulation import bounds
from tests.simulation.checkers import Violation, check_all
from tests.simulation.roads import Call
from tests.simulation.runs import Outcome
from tests.simulation.test_crashes import FAULTS, Fate, Strike, insist
from tests.simulation.world import ETCD, HOME, PEOPLE, Instance, World

MOVES = 10
"""Of one world: its checkers read all of its history, so long worlds cost more for each move."""
CALLS = 70
"""Calls with an effect of a promotion that are struck: a switchover has about as many."""
LIMIT_SECONDS = 3000.0
TRIES = 8
"""People plan again when a plan was called off; after so many it is no progress."""
STREAM = {"follow_seconds": 1.0, "canary_seconds": 30.0, "ack_timeout_seconds": 3.0}
TICKS_SECONDS = (0.5, 1.0)
"""A TTL of 5 s allows no slower ones."""
REPORTS_SECONDS = (1.0, 2.0)
LOOK_SECONDS = 0.1


def run(keys_dir: Path, seed: int, prepare: Callable[[World], None] = lambda world: None, *, moves: int = MOVES) -> Outcome:
    """Plays one world. ``prepare``: what a mutant changes in it before anything starts."""
    try:
        return run_virtual(_Marathon(keys_dir, seed).play(prepare, moves), limit_seconds=LIMIT_SECONDS)
    except TimeoutError:
        return Outcome(seed, "progress", f"seed {seed}: not over after {LIMIT_SECONDS:g} virtual seconds")


@dataclass
class _Marathon:
    keys_dir: Path
    seed: int
    told: list[str] = field(default_factory=list)

    async def play(self, prepare: Callable[[World], None], moves: int) -> Outcome:
        self.rng = random.Random(f"marathon {self.seed}")
        streams = self.rng.choice([1, 1, 1, 2])
        latency = self.rng.choice([None, None, (0.001, 0.05)])
        stream, rpo = {**STREAM, "streams": streams}, {"report_seconds": self.rng.choice(REPORTS_SECONDS)}
        etcd = {"tick_seconds": self.rng.choice(TICKS_SECONDS)}
        self.world = world = World(self.keys_dir, seed=self.seed, latency=latency, stream=stream, rpo=rpo, etcd=etcd)
        world.look_seconds = LOOK_SECONDS
        prepare(world)
        bounds.gauge_queues(world)
        checker, violation = "", ""
        try:
            await self._begin()
            for number in range(moves):
                await self._move(number)
            async with world.opened():
                check_all(world)
            await bounds.progress(world, 150.0)
        except Violation as error:
            checker, violation = error.checker, str(error)
        except (AssertionError, DrError, TimeoutError) as error:
            checker, violation = "one-active" if "two active" in str(error) else "crash", str(error) or repr(error)
        if violation:
            violation = "\n".join([f"seed {self.seed}: {violation}", "moves:", *self.told[-80:]])
        plans = [entry.plan[1] for entry in world.history.transactions if entry.plan is not None]
        # With the zone confirmed the group has moved; the next move may strike before the report is written.
        done = {record.plan.id for record in plans if record.state in (State.REPORTING, State.DONE)}
        return Outcome(self.seed, checker, violation, len(done), len(world.acks), world.clock.monotonic())

    def _say(self, what: str) -> None:
        self.told.append(f"{self.world.clock.monotonic():8.2f} {what}")

    async def _begin(self) -> None:
        world = self.world
        await world.found()
        for region in self.world.regions:
            world.start(region, "a")
        if len(world.streams) > 1 or self.rng.random() < 0.3:
            world.start(HOME, "b")
        await world.until(world.active_somewhere, 30, "one active region")
        world.fleet(2, pause_seconds=0.5)
        await world.wait(2.0)

    # -------------------------------------------------------------------------------------------------------- one move

    async def _move(self, number: int) -> None:
        world, rng = self.world, self.rng
        source = (await world.authority()).region
        target = rng.choice([region for region in self.world.regions if region != source])
        cause = rng.choice([self._die, self._links_first, self._controllers, self._freeze, self._etcd, self._wish])
        fate = Fate(world, self._strikes())
        cuts = [True] * (rng.random() < 0.2)
        self._say(
            f"move {number}: {source} to {target}, {cause.__name__[1:]}, "
            f"{[f'{s.fault} at {s.number}' for s in fate.strikes]}{', third store' if cuts else ''}"
        )
        kind = await cause(source)

        async def before(call: Call) -> None:
            if cuts and call.op == "fence" and call.instance.region == target:
                cuts.clear()
                self._cut_for_a_while(rng.choice([region for region in self.world.regions if region != call.target]))
            await fate.before(call)

        with world.effects(before, fate.after):
            await self._carried(kind, source, target)
        await self._mended()

    def _strikes(self) -> list[Strike]:
        number = self.rng.choice([0, 0, 1, 1, 2])
        return [Strike(self.rng.randrange(1, CALLS), self.rng.choice(FAULTS)) for _ in range(number)]

    def _cut_for_a_while(self, region: str) -> None:
        world = self.world
        if ("*", region) not in world.cuts:
            self._say(f"{region} is cut while stores are fenced")
            world.cut(region)
            world.loop.call_later(self.rng.uniform(0.5, 15.0), lambda: world.heal(region))

    async def _carried(self, kind: str, source: str, target: str) -> None:
        """People ask until the group is somewhere else and serves there, or everything is healed and it serves where it is."""
        world, rng = self.world, self.rng
        for attempt in range(TRIES):
            if attempt:  # what was called off is planned anew, with the roads open
                await self._mended()
            if attempt and world.active_somewhere() and world.actives()[0].region == target:
                return
            if kind == "failover":
                await world.until(self._nobody_holds_or_all_is_well, 60, f"the end of {source}'s right")
                kind = "failover" if await self._nobody_holds() else "switchover"
            try:
                self._revive(target)
                document = await world.propose(kind, target)
                await insist(world, document)
                ended = await self._ended(document.record.plan.id, target)
            except DrError as error:
                self._say(f"{kind} to {target}: {error.code}: {error.message}")
                continue
            except AssertionError as error:
                if "nobody listened" not in str(error) and "nobody alive" not in str(error):
                    raise
                self._say(str(error))
                continue
            self._say(f"{ended.plan.id} {kind} to {target}: {ended.state.value}")
            if ended.state is State.DONE:
                return
            if rng.random() < 0.2 and await self._nobody_holds():
                kind = "failover"
        raise Violation("progress", f"no plan to {target} was carried to its end in {TRIES} tries\n{world.story()}")

    async def _ended(self, plan: str, target: str) -> PlanRecord:
        """Whoever died is started again; a hold is lifted by the store's return, or by people."""
        world = self.world
        end = world.clock.monotonic() + 240.0
        held = 0
        while world.clock.monotonic() < end:
            record = await world.plan(plan)
            if record.ended:
                return record
            self._revive(target)
            if record.state is State.HOLDING:
                held += 1
                if held == 6:
                    self._say(f"{plan} holds")
                    await self._lifted(plan, target)
                elif held > 12:
                    world.heal_all()
            await world.wait(0.5)
        raise Violation("progress", f"plan {plan} is {(await world.plan(plan)).state.value} after 240 s\n{world.story()}")

    async def _lifted(self, plan: str, target: str) -> None:
        world = self.world
        if self.rng.random() < 0.5:
            world.heal_all()
            return
        for who in PEOPLE[:2]:
            try:
                instance = world.someone(target)
                document = await world.ask(instance, instance.controller.plan(plan))
                await world.ask(instance, world.approve(instance.controller, document, who))
            except (DrError, AssertionError) as error:
                self._say(f"{who} and the greater loss of {plan}: {error}"[:200])

    def _revive(self, region: str) -> None:
        alive = [instance for instance in self.world.instances.values() if instance.region == region and instance.alive]
        if not alive:
            self.world.start(region, "a")
        for instance in alive:
            self.world.thaw(instance)

    async def _mended(self) -> None:
        """Everybody runs, every road is open, and one region serves."""
        world = self.world
        world.heal_all()

        def serving() -> bool:
            for instance in list(world.instances.values()):
                if not instance.alive:  # a strike that was still to come may kill again
                    world.start(instance.region, instance.name)
            return world.active_somewhere()

        await world.until(serving, 150, "one region serving after everything was healed")
        await world.wait(self.rng.choice([0.5, 2.0]))

    async def _nobody_holds_or_all_is_well(self) -> bool:
        """A cause may pass before its holder's lease does: then people move what works."""
        return self.world.active_somewhere() or await self._nobody_holds()

    async def _nobody_holds(self) -> bool:
        return not await self.world.holders()

    # --------------------------------------------------------------------------------------------------------- causes

    async def _die(self, source: str) -> str:
        await self.world.lose_region(source)
        return "failover"

    async def _links_first(self, source: str) -> str:
        """What only the dying region has is lost."""
        self.world.isolate_stores_of(source)
        await self.world.wait(self.rng.uniform(0.1, 3.0))
        await self.world.lose_region(source)
        return "failover"

    async def _controllers(self, source: str) -> str:
        for instance in self._of(source):
            await self.world.kill(instance.region, instance.name)
        return "failover"

    async def _freeze(self, source: str) -> str:
        """It wakes in the middle of the promotion, or after it."""
        world = self.world
        for instance in self._of(source):
            world.freeze(instance.region, instance.name)
            world.loop.call_later(self.rng.uniform(7.0, 25.0), world.thaw, instance)
        return "failover"

    async def _etcd(self, source: str) -> str:
        world = self.world
        world.cut(ETCD, source)
        world.loop.call_later(self.rng.uniform(9.0, 30.0), lambda: world.heal(ETCD, source))
        return "failover"

    async def _wish(self, source: str) -> str:
        return self.rng.choice(["switchover", "failback"])

    def _of(self, region: str) -> list[Instance]:
        return [instance for instance in self.world.instances.values() if instance.region == region and instance.alive]
