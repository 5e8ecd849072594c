"""People of one run: those who do it right, and those who sign late, twice, another plan, or what is not theirs to sign."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from controller.errors import ApprovalRequired, Conflict, DrError, Refused
from controller.runtime.archive_documents import RestoreItem
from controller.runtime.service import PlanDocument
from tests.simulation.chaos import Act, Chaos, recover_etcd
from tests.simulation.world import OTHER_NAME, PEOPLE, Instance

SLIPS = ("called away", "requester", "two names", "refused", "expires soon", "comes back", "called off")
"""What goes wrong when people give an order; the guards are there for it, and chance alone hardly ever puts it together."""


class Operators:
    """On-call people and approvers, random. What they are told no to is written down and otherwise no matter."""

    def __init__(self, chaos: Chaos) -> None:
        self.chaos = chaos
        self.world = chaos.world
        self.rng = chaos.rng
        self.carelessness = self.rng.choice([0.0, 0.1, 0.4])

    def acts(self) -> list[tuple[int, Act]]:
        return [
            (18, self.order),
            (3, self.plan),
            (3, self.sign),
            (2, self.sign_badly),
            (2, self.execute),
            (1, self.race),
            (1, self.abort),
            (1, self.verify),
            (1, self.repair),
            (1, self.restore),
            (2, self.discard),
            (1, self.recover),
        ]

    async def order(self) -> None:
        """What on-call people really do: look, plan, sign, execute, and mostly let it run for a while."""
        world, rng = self.world, self.rng
        away = [region for region in world.regions if region != (await world.authority()).region]
        target = rng.choice(away)
        kind = "failover" if not await world.holders() else rng.choice(["failover", "switchover", "failback"])
        slip = rng.choice(SLIPS) if rng.random() < self.carelessness else ""

        async def give() -> None:
            source = (await world.authority()).region
            document = await world.propose(kind, target, PEOPLE[0] if slip == "requester" else "oncall")
            if slip == "called away":
                await world.wait(rng.choice([5.0, 20.0]))
            if slip == "comes back":  # after it was signed: what was seen is over
                await self._signatures(document, slip)
                await self._comes_back(source)
            plan = await self._let_run(document, slip)
            if slip == "called off":
                await world.wait(rng.choice([0.2, 1.0, 3.0]))
                instance = self._someone()
                await world.ask(instance, instance.controller.abort(plan, "oncall", "on second thoughts"), 4.0)
            if rng.random() < 0.7:
                end = world.clock.monotonic() + 25.0
                while world.clock.monotonic() < end and not (await world.plan(plan)).ended:
                    await world.wait(0.25)

        await self._ask(f"order: {kind} to {target}{f' ({slip})' * bool(slip)}", give)

    async def _let_run(self, document: PlanDocument, slip: str) -> str:
        """Signs and executes, whatever is answered to single signatures."""
        await self._signatures(document, slip)
        plan = document.record.plan
        instance = self._at(plan.target)
        await self.world.ask(instance, instance.controller.execute(plan.id, plan.requester, plan.target), 4.0)
        return plan.id

    async def _signatures(self, document: PlanDocument, slip: str) -> None:
        """Of two people who may sign; or what people get wrong: two are really one, one of them asked for it, one refuses, or
        they expire soon."""
        who = [(person, "approve") for person in self.rng.sample(PEOPLE, 2)]
        if slip in ("requester", "two names"):
            who = [(PEOPLE[0], "approve"), (OTHER_NAME if slip == "two names" else PEOPLE[1], "approve")]
        if slip == "refused":
            who.insert(self.rng.randrange(3), (next(p for p in PEOPLE if (p, "approve") not in who), "refuse"))
        seconds = 22.0 if slip == "expires soon" and self.chaos.bad_clocks == "none" else 600.0
        for person, decision in who:
            key = PEOPLE[0].split("@", maxsplit=1)[0] if person == OTHER_NAME else ""
            signed = self.world.signed(document.record, person, decision, seconds, key=key)
            instance = self._at(document.record.plan.target)
            try:
                await self.world.ask(instance, instance.controller.approve(document.record.plan.id, signed), 4.0)
            except (ApprovalRequired, Conflict, Refused) as error:
                self.chaos.say(f"{person}: {error.code}")

    async def _comes_back(self, region: str) -> None:
        """The region that was to be left serves again by itself."""
        world = self.world
        world.heal_all()
        for name in ("a", "b"):
            before = world.instances.get(f"{region}/{name}")
            if before is not None and not before.alive:
                world.start(region, name)
        await world.wait(12.0)

    def _at(self, region: str) -> Instance:
        return self.world.someone(region)

    async def plan(self) -> None:
        kind = self.rng.choice(["failover", "failover", "switchover", "failback"])
        target, requester = self.rng.choice(self.world.regions), self.rng.choice(["oncall", PEOPLE[0]])
        await self._ask(
            f"{kind} to {target} by {requester}",
            lambda: self.world.propose(kind, target, requester, via=self.rng.choice(self.world.regions)),
        )

    async def sign(self) -> None:
        for document in await self._open_plans():
            for who in self.rng.sample(PEOPLE, 2):
                decision = "refuse" if self.rng.random() < 0.03 else "approve"
                plan = document.record.plan.id
                await self._ask(f"{who} {decision}s {plan}", partial(self._approve, document, who, decision))

    async def sign_badly(self) -> None:
        """Twice; with a signature that is about to expire; for another plan; with a key that nobody listed."""
        for document in await self._open_plans():
            who, way = self.rng.choice(PEOPLE), self.rng.choice(["twice", "late", "another plan", "unlisted key", "not mine"])
            # Wrong wall clocks and short-lived signatures together only show that expiries are judged by wall clocks.
            seconds = 12.0 if way == "late" and self.chaos.bad_clocks == "none" else 600.0
            signed = self.world.signed(
                document.record,
                who,
                seconds=seconds,
                key={"unlisted key": "mallory", "not mine": PEOPLE[1].split("@", maxsplit=1)[0]}.get(way, ""),
                plan="plan-1" if way == "another plan" else "",
            )

            async def send(signed: object = signed, plan: str = document.record.plan.id) -> None:
                instance = self._someone()
                await self.world.ask(instance, instance.controller.approve(plan, signed), 4.0)  # type: ignore[arg-type]

            for _ in range(2 if way == "twice" else 1):
                await self._ask(f"{who} signs {document.record.plan.id} ({way})", send)

    async def _approve(self, document: PlanDocument, who: str, decision: str) -> None:
        instance = self._someone()
        await self.world.ask(instance, self.world.approve(instance.controller, document, who, decision), 4.0)

    async def execute(self) -> None:
        for document in await self._open_plans():
            plan = document.record.plan
            confirm = self.rng.choice([plan.target, plan.target, plan.source])
            await self._ask(f"execute {plan.id}", partial(self._execute, plan.id, confirm))

    async def _execute(self, plan: str, confirm: str) -> None:
        instance = self._someone()
        await self.world.ask(instance, instance.controller.execute(plan, "oncall", confirm), 4.0)

    async def race(self) -> None:
        """Two people at once, each at a controller of their own: everything that is open is signed and executed together."""
        work: list[Awaitable[None]] = []
        for document in await self._open_plans():
            plan = document.record.plan
            for who in PEOPLE[:2]:
                work.append(self._ask(f"{who} in a race: {plan.id}", partial(self._approve, document, who, "approve")))
                work.append(self._ask(f"execute {plan.id} in a race", partial(self._execute, plan.id, plan.target)))
        await asyncio.gather(*work)

    async def abort(self) -> None:
        for document in await self._open_plans():
            plan = document.record.plan.id

            async def abort(plan: str = plan) -> None:
                instance = self._someone()
                await self.world.ask(instance, instance.controller.abort(plan, "oncall", "chaos"), 4.0)

            await self._ask(f"abort {plan}", abort)

    # ------------------------------------------------------------------------------------------------------ upkeep

    async def verify(self) -> None:
        """``drctl verify``: at any controller, for any region's copy; now and then it is interrupted."""
        region, stop = self.rng.choice(self.world.regions), self.rng.random() < 0.2

        async def ask() -> None:
            instance = self._someone()
            verifier = instance.controller.verifier
            await self.world.ask(instance, verifier.stop(region) if stop else verifier.start(region, restart=False), 4.0)

        await self._ask(f"verify {region}{', interrupted' * stop}", ask)

    async def repair(self) -> None:
        """``drctl repair``, of what that controller has found in a region."""
        region = self.rng.choice(self.world.regions)

        async def ask() -> None:
            instance = self._someone()
            mender = instance.controller.mender
            await self.world.ask(instance, mender.repair(region, execute=True, requester="ada", confirm=region), 20.0)

        await self._ask(f"repair {region}", ask)

    async def restore(self) -> None:
        """``drctl restore``: some agents get back what they had a while ago, as a new record."""
        ago, force = self.rng.choice([2.0, 10.0, 30.0]), self.rng.random() < 0.3

        async def ask() -> None:
            instance = self._server() or self._someone()
            at = self.world.clock.wall() - ago
            then = instance.controller.archive.as_of(at, "checkpoint", (), "", 3)
            items = [
                RestoreItem(one.agent, one.found.id, one.newest_id) for one in then.agents if one.found and one.state == "found"
            ]
            if items:
                restorer = instance.controller.restorer
                restoring = restorer.restore(at, "checkpoint", items, requester="ada", confirm="sim", force=force)
                await self.world.ask(instance, restoring, 8.0)

        await self._ask(f"restore agents as they were {ago:g} s ago", ask)

    async def discard(self) -> None:
        """``drctl salvage discard``: with the digest of what is there (an export was shown), or without one."""
        region, careless = self.rng.choice(self.world.regions), self.rng.random() < 0.3

        async def ask() -> None:
            instance = self._server() or self._someone()
            salvager = instance.controller.salvager
            found = await self.world.ask(instance, salvager.list(region), 4.0)
            names = [piece.name for one in found for piece in one.pieces]
            if not names:
                return
            name = self.rng.choice(names)
            given = {"confirm": region, "requester": "ada", "even_unexported": "not needed" if careless else ""}
            would = await self.world.ask(instance, salvager.discard(region, name, execute=False, digest="", **given), 8.0)
            await self.world.ask(instance, salvager.discard(region, name, execute=True, digest=would.digest, **given), 20.0)
            self.chaos.say(f"discarded {name}")

        await self._ask(f"discard salvage of {region}", ask)

    async def recover(self) -> None:
        """``drctl recover``, also where nothing was lost."""
        if self.rng.random() < 0.3:
            await recover_etcd(self.world, self.chaos.say)

    def _server(self) -> Instance | None:
        actives = self.world.actives()
        return self.rng.choice(actives) if actives else None

    def _someone(self) -> Instance:
        return self.world.someone(self.rng.choice(self.world.regions))

    async def _open_plans(self) -> Sequence[PlanDocument]:
        async def look() -> list[PlanDocument]:
            instance = self._someone()
            plans = await self.world.ask(instance, instance.controller.plans(), 4.0)
            live = [record.plan.id for record in plans if not record.ended]
            chosen = self.rng.sample(live, min(2, len(live)))
            return [await self.world.ask(instance, instance.controller.plan(plan), 4.0) for plan in chosen]

        try:
            return await look()
        except (DrError, AssertionError):
            return []

    async def _ask(self, what: str, ask: Callable[[], Awaitable[object]]) -> None:
        try:
            await ask()
            self.chaos.say(what)
        except DrError as error:
            self.chaos.say(f"{what}: {error.code}")
        except AssertionError as error:
            if "nobody alive" not in str(error):
                raise
