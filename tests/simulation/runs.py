"""One random run from one seed, and what came of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from controller.domain.promotion import State
from controller.errors import DrError
from controller.lab.virtual_time import run_virtual
from tests.simulation import bounds, objective  # noqa: F401  (both add checkers to the list)
from tests.simulation.chaos import Chaos, recover_etcd
from tests.simulation.checkers import Violation, check_all
from tests.simulation.operators import Operators
from tests.simulation.sealed import SealedWorld
from tests.simulation.world import ALL_REGIONS, PEOPLE, World

LIMIT_SECONDS = 3000.0
"""Of virtual time: a run that takes longer has made no progress."""
RECOVERY_SECONDS = 150.0
"""Once faults have stopped and people have decided what is theirs to decide, the group serves within this."""


@dataclass(frozen=True)
class Outcome:
    """``violation``: empty when every promise held. ``checker``: who noticed."""

    seed: int
    checker: str = ""
    violation: str = ""
    promotions: int = 0
    acknowledged: int = 0
    virtual_seconds: float = 0.0
    core_seconds: float = 0.0
    """Of processor time; 0 when nobody measured it."""


@dataclass(frozen=True)
class Shape:
    """What kind of group a seed plays with."""

    regions: int
    streams: int
    failsafe: bool
    sealed: bool
    enforce: float
    """The objective in seconds when it is enforced; 0: people are only told."""
    copies: str
    agents: int
    small: bool
    """Whether queues are small, so that a burst fills them."""

    def world(self, keys_dir: Path, seed: int, latency: tuple[float, float] | None) -> World:
        """Greater groups have one controller in each region that is added."""
        names = ALL_REGIONS[: self.regions]
        changes: dict[str, Any] = {"stream": {"streams": self.streams}, "etcd": {"failsafe": self.failsafe}}
        if self.small:
            changes["stream"] |= {"queue_max_bytes": 64 * 1024, "segment_max_bytes": 16 * 1024}
        if self.enforce:
            changes["rpo"] = {"policy": "enforce", "seconds": self.enforce, "settle_seconds": 1.0}
        kind = SealedWorld if self.sealed else World
        return kind(keys_dir, seed=seed, latency=latency, regions=names, single=names[3:], **changes)

    def copies_of(self, agent: int) -> int:
        """How many copies that agent asks for."""
        return {"one or two": 1 + agent % 2, "one": 1, "two": 2, "up to three": 1 + agent % min(3, self.regions)}[self.copies]


def shape_of(seed: int) -> Shape:
    """Drawn per seed; half of the groups have three regions and one stream."""
    rng = random.Random(f"shape {seed}")
    return Shape(
        regions=rng.choice([3, 3, 3, 3, 3, 3, 2, 2, 4, 5]),
        streams=rng.choice([1, 1, 1, 1, 2, 3]),
        failsafe=rng.random() < 0.4,
        sealed=rng.random() < 0.2,
        enforce=rng.choice([0.0, 0.0, 0.0, 0.0, 3.0]),
        copies=rng.choice(["one or two", "one or two", "one", "two", "up to three"]),
        agents=rng.choice([2, 3, 5]),
        small=rng.random() < 0.2,
    )


def run(
    keys_dir: Path, seed: int, prepare: Callable[[World], None] = lambda world: None, *, streams: int | None = None
) -> Outcome:
    """Plays a seed. ``prepare``: what a mutant changes in the world before anything starts. ``streams``: as many, whatever the
    seed says."""
    try:
        return run_virtual(_play(keys_dir, seed, prepare, streams), limit_seconds=LIMIT_SECONDS)
    except TimeoutError:
        return Outcome(seed, "progress", f"seed {seed}: not over after {LIMIT_SECONDS:g} virtual seconds")


async def _play(keys_dir: Path, seed: int, prepare: Callable[[World], None], streams: int | None) -> Outcome:
    rng = random.Random(seed)
    latency = rng.choice([None, (0.001, 0.02), (0.01, 0.15)])
    shape = shape_of(seed)
    shape = replace(shape, streams=streams) if streams else shape
    world = shape.world(keys_dir, seed, latency)
    prepare(world)
    bounds.gauge_queues(world)
    chaos = Chaos(world, seed)
    people = Operators(chaos)
    checker, violation = "", ""
    try:
        await world.served(agents=shape.agents, seconds=rng.choice([0.5, 2.0, 5.0]), copies=shape.copies_of)
        with world.effects(chaos.before, chaos.after):
            await chaos.run(rng.choice([20.0, 45.0, 90.0]), people.acts())
        chaos.end()
        async with world.opened():
            check_all(world)
        await _recover(world, chaos)
    except Violation as error:
        checker, violation = error.checker, str(error)
    except (AssertionError, DrError, TimeoutError) as error:
        checker, violation = "one-active" if "two active" in str(error) else "crash", str(error) or repr(error)
    if violation:
        violation = "\n".join([f"seed {seed}: {violation}", f"{shape}", "chaos:", *chaos.done[-80:]])
    done = [entry.plan[1].state for entry in world.history.transactions if entry.plan is not None].count(State.DONE)
    return Outcome(seed, checker, violation, done, len(world.acks), world.clock.monotonic())


async def _recover(world: World, chaos: Chaos) -> None:
    """Everything is healed. Plans under way end; what only people can decide (a greater loss, a restored etcd) they do."""
    world.heal_all()
    world.before_effect = world.after_effect = None
    world.start_all()
    for _ in range(8):
        await world.wait(12.0)
        if world.active_somewhere():
            break
        if world.history.restored:
            await recover_etcd(world, chaos.say)
        region = (await world.authority()).region
        for record in await world.someone(region).controller.plans():
            if record.state is State.HOLDING:
                document = await world.someone(region).controller.plan(record.plan.id)
                for who in PEOPLE:
                    try:
                        await world.approve(world.someone(region).controller, document, who)
                    except DrError:
                        continue
    await bounds.progress(world, RECOVERY_SECONDS)
