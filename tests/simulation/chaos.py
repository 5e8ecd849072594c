"""Random faults of one run: at calls, at steps, and from outside. Everything is drawn from the seed.

Rates differ from seed to seed, so that some runs are quiet in one respect and wild in another. Plain chance is blind in places
(a seeded bug died in 1 of 5,000 runs), so it is biased to where protocols break: the third store goes while an epoch is
being fenced, requests to the zone and to stores arrive twice or too late, an executor pauses between its check and its act.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

from controller.adapters.memory.region_store import StoredObject
from controller.domain.model import SegmentRef
from controller.errors import DrError, OutcomeUnknown, Unavailable
from controller.runtime.audit import Audit
from controller.runtime.recovery import examine, recover
from controller.runtime.wiring import outside_of
from controller.stream.segment import frame
from tests.simulation.roads import Call
from tests.simulation.sealed import SealedWorld
from tests.simulation.world import ETCD, ZONE, Instance, World

Act = Callable[[], Awaitable[None]]

BOTTLENECKS = frozenset({"fence", "change", "realign"})
"""Calls that are rare and decide much: what rates cannot find often enough happens here more often."""


def is_authorization(call: Call) -> bool:
    """The one transaction that moves the authority to another region: it writes a plan and the authority, and pins a guard."""
    writes = {key.split("/")[3] for key in call.keys}
    return call.op == "txn" and {"plans", "authority"} <= writes and any("/guards/" in c.key for c in call.what[0])


class Chaos:
    """Everything random in one run. ``acts`` are drawn by ``run``; ``before`` and ``after`` see every call with an effect."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.rng = rng = random.Random(f"chaos {seed}")
        self.fail_rate = rng.choice([0.0, 0.0, 0.01, 0.05])
        self.lose_rate = rng.choice([0.0, 0.01, 0.03])
        self.kill_rate = rng.choice([0.0, 0.0, 0.002, 0.01])
        self.late_rate = rng.choice([0.0, 0.0, 0.01, 0.03])
        self.twice_rate = rng.choice([0.0, 0.0, 0.02, 0.1])
        self.pause_rate = rng.choice([0.0, 0.0, 0.003, 0.01])
        self.throttle_rate = rng.choice([0.0, 0.0, 0.3, 0.9])
        self.slow_put_rate = rng.choice([0.0, 0.0, 0.05, 0.3])
        self.bias = rng.choice([1.0, 3.0, 10.0])
        """How much more often it strikes at bottlenecks."""
        self.bad_clocks = rng.choice(["none", "none", "small", "large"])
        self.may_restore_etcd = rng.random() < 0.15
        self.throttled: dict[str, float] = {}
        """Region → until when its table and bucket answer "slow down"."""
        self.damaged: list[tuple[str, Any, StoredObject]] = []
        self.done: list[str] = []
        self.ended = False
        world.zone.propagation_seconds = rng.choice([0.0, 0.0, 1.0, 5.0])

    def say(self, what: str) -> None:
        self.done.append(f"{self.world.clock.monotonic():8.2f} {what}")

    # ------------------------------------------------------------------------------------------------ at every call

    def _strikes(self, rate: float, call: Call) -> bool:
        if not rate:
            return False
        bottleneck = call.op in BOTTLENECKS or any("/authority" in key for key in call.keys)
        return self.rng.random() < min(0.5, rate * self.bias if bottleneck else rate)

    async def before(self, call: Call) -> None:
        """What happens to a request on its way."""
        rng = self.rng
        if self._strikes(self.fail_rate, call):
            raise Unavailable(f"{call}: not sent", hint="chaos")
        if self._strikes(self.kill_rate, call):
            self.kill(call)
        throttled = self.world.clock.monotonic() < self.throttled.get(call.target, 0.0)
        if throttled and rng.random() < self.throttle_rate:
            raise Unavailable(f"{call}: 503, slow down", hint="chaos")
        if call.op == "put_segment" and rng.random() < self.slow_put_rate:
            await self.world.clock.sleep(rng.uniform(0.1, 2.0))
        if self._strikes(self.pause_rate, call) or (is_authorization(call) and rng.random() < 0.02 * self.bias):
            await self.pause(call)
        if call.op == "fence" and rng.random() < 0.03 * self.bias:
            self.cut_third(call)
        if self._strikes(self.late_rate, call):
            self.say(f"{call} will arrive late")
            self._deliver(call, rng.uniform(0.1, 25.0))
            raise OutcomeUnknown(f"{call}: no answer", hint="chaos")

    async def after(self, call: Call) -> None:
        """What happens to an answer on its way, and to a request that the network carries twice."""
        if self._strikes(self.twice_rate, call) and call.target != ETCD:
            self._deliver(call, self.rng.choice([0.0, 0.5, 5.0, 20.0]))
        if self._strikes(self.kill_rate, call):
            self.kill(call)
        if self._strikes(self.lose_rate, call):
            raise OutcomeUnknown(f"{call}: answer lost", hint="chaos")

    def kill(self, call: Call) -> None:
        self.say(f"{call.instance.key} dies at {call}")
        self.world.die(call.instance)
        raise asyncio.CancelledError

    async def pause(self, call: Call) -> None:
        """Nothing of the instance runs for longer than its right may last: it wakes in the middle of what it did."""
        seconds = self.rng.choice([1.0, 4.0, 6.0, 15.0, 30.0])
        self.say(f"{call.instance.key} is paused for {seconds:g} s at {call}")
        self._freeze(call.instance, seconds)
        await asyncio.sleep(0)

    def cut_third(self, call: Call) -> None:
        """An epoch is being fenced: one of the other stores goes away for a while."""
        other = self.rng.choice([region for region in self.world.regions if region != call.target])
        self.say(f"{other} is cut while {call.instance.key} fences {call.target}")
        self.world.cut(other)
        self._later(self.rng.uniform(0.5, 15.0), lambda: self.world.heal(other))

    def _deliver(self, call: Call, seconds: float) -> None:
        """The same request arrives (again) ``seconds`` later, from a sender that waits for no answer."""
        world = self.world

        async def arrive() -> None:
            await world.clock.sleep(seconds)
            try:
                if call.target == ETCD and call.op == "txn":
                    compare, then, otherwise = call.what
                    world.cluster.txn([one for one in compare if world.late_conditions(one)], then, otherwise)
                elif call.target == ZONE:
                    await world.traffic_class(world.zone, world.regions).change(*call.what)
                elif call.target in world.servers:
                    client = world.store_class(world.servers[call.target], world.client(call.target)._gate)
                    await getattr(client, call.op)(*call.what)
            except DrError:
                return  # refused, as it should be

        world.spawn(arrive())

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        self.world.loop.call_later(seconds, act)

    # ------------------------------------------------------------------------------------------------- from outside

    def acts(self) -> list[tuple[int, Act]]:
        """(weight, what may happen)."""
        return [
            (3, self.kill_one),
            (2, self.crash_somewhere),
            (8, self.restart),
            (2, self.cut_store),
            (2, self.cut_link),
            (2, self.cut_etcd),
            (1, self.cut_active_from_etcd),
            (2, self.cut_one_way),
            (1, self.cut_zone),
            (8, self.heal),
            (3, self.repair),
            (2, self.freeze),
            (3, self.thaw),
            (1, self.new_leader),
            (2, self.lose_region),
            (1, self.slow),
            (2, self.throttle),
            (2, self.fail_reads),
            (1, self.damage),
            (1, self.step_clock),
            (1, self.restore_etcd),
            (1, self.revoke_early),
            (1, self.slow_etcd),
            (1, self.lose_keys),
            (1, self.hang_leader),
            (1, self.clone),
            (3, self.ask_anybody),
            (2, self.burst),
        ]

    async def run(self, seconds: float, people: list[tuple[int, Act]]) -> None:
        """Draws acts, of faults and of people, for this long."""
        world, rng = self.world, self.rng
        acts = [*self.acts(), *people]
        weights = [weight for weight, _ in acts]
        end = world.clock.monotonic() + seconds
        while world.clock.monotonic() < end:
            (act,) = rng.choices([act for _, act in acts], weights)
            await act()
            await world.wait(rng.choice([0.0, 0.1, 0.5, 1.0, 3.0, 7.0]))

    def end(self) -> None:
        """What no healing of roads mends: objects get their bytes back, and nothing that was put off is done any more."""
        self.ended = True
        for region, ref, right in self.damaged:
            self.world.servers[region].objects[ref] = right
        self.damaged.clear()
        self.throttled.clear()
        if isinstance(self.world, SealedWorld):
            self.world.kms_down.clear()

    def _alive(self) -> list[Instance]:
        return [instance for instance in self.world.instances.values() if instance.alive]

    async def kill_one(self) -> None:
        if alive := self._alive():
            instance = self.rng.choice(alive)
            self.say(f"kill {instance.key}")
            await self.world.kill(instance.region, instance.name)

    async def crash_somewhere(self) -> None:
        """Death at any await: after so many steps of any of its tasks."""
        if alive := self._alive():
            key = self.rng.choice([*self.world.actives(), *alive]).key
            self.world.crash_after_steps[key] = steps = self.rng.randrange(1, 2000)
            self.say(f"{key} will die after {steps} steps")

    async def restart(self) -> None:
        dead = [instance for instance in self.world.instances.values() if not instance.alive]
        if dead:
            instance, rng = self.rng.choice(dead), self.rng
            wrong = {"none": 0.0, "small": rng.uniform(-2, 2), "large": rng.choice([-3600.0, 3600.0, -2.0, 0.0])}
            rate = 1.0 if self.bad_clocks == "none" else rng.choice([0.9995, 1.0, 1.0005])
            self.say(f"start {instance.key}, its clock wrong by {wrong[self.bad_clocks]:g} s, rate {rate}")
            self.world.start(instance.region, instance.name, wall_error=wrong[self.bad_clocks], rate=rate)

    async def cut_store(self) -> None:
        self._cut(self.rng.choice(self.world.regions), "*")

    async def cut_link(self) -> None:
        self._cut(self.rng.choice(self.world.regions), self.rng.choice(self.world.regions))

    async def cut_etcd(self) -> None:
        self._cut(ETCD, self.rng.choice([*self.world.regions, *self.world.instances]))

    async def cut_active_from_etcd(self) -> None:
        """The holder's lease runs out while the holder lives."""
        for active in self.world.actives():
            self._cut(ETCD, active.key)

    async def cut_one_way(self) -> None:
        who = self.rng.choice([*self.world.regions, *self.world.instances])
        what, way = self.rng.choice([*self.world.regions, ETCD, ETCD, ZONE]), self.rng.choice(["requests", "answers"])
        self.say(f"cut one way: {way} between {who} and {what}")
        self.world.one_way.add((who, what, way))

    async def cut_zone(self) -> None:
        self._cut(ZONE, "*")

    def _cut(self, what: str, who: str) -> None:
        self.say(f"cut {who} from {what}")
        self.world.cut(what, who)

    async def heal(self) -> None:
        if self.world.cuts:
            who, what = self.rng.choice(sorted(self.world.cuts))
            self.say(f"heal {who} and {what}")
            self.world.heal(what, who)
        if self.world.one_way:
            self.world.one_way.discard(self.rng.choice(sorted(self.world.one_way)))
        self.world.slow.clear()

    async def repair(self) -> None:
        """Everything is put right for a moment: without it few promotions would be carried to their end."""
        self.say("repair")
        self.throttled.clear()
        self.world.heal_all()
        self.world.start_all()

    async def freeze(self) -> None:
        if awake := [instance for instance in self._alive() if not instance.stopped]:
            instance = self.rng.choice([*self.world.actives(), *awake])
            self.say(f"freeze {instance.key}")
            self._freeze(instance, self.rng.choice([0.0, 3.0, 8.0]))

    def _freeze(self, instance: Instance, seconds: float) -> None:
        """0 seconds: until somebody thaws it."""
        self.world.freeze(instance.region, instance.name)
        if seconds:
            self._later(seconds, lambda: self.world.thaw(instance))

    async def thaw(self) -> None:
        for instance in self.world.instances.values():
            if instance.stopped and self.rng.random() < 0.5:
                self.say(f"thaw {instance.key}")
                self.world.thaw(instance)

    async def new_leader(self) -> None:
        self.say("etcd elects a leader")
        self.world.cluster.lose_leader()
        await self.world.wait(self.rng.choice([0.5, 2.0, 8.0]))
        self.world.cluster.elect_leader()

    async def lose_region(self) -> None:
        region = (await self.world.authority()).region
        self.say(f"lose {region}")
        await self.world.lose_region(region)

    async def slow(self) -> None:
        who, what = self.rng.choice([*self.world.regions, "*"]), self.rng.choice([*self.world.regions, ETCD, ZONE])
        self.say(f"slow {who} to {what}")
        self.world.slow[who, what] = self.rng.choice([0.1, 0.5, 1.0, 4.0])

    async def throttle(self) -> None:
        region = self.rng.choice(self.world.regions)
        self.say(f"{region} throttles")
        self.throttled[region] = self.world.clock.monotonic() + self.rng.choice([2.0, 8.0, 20.0])

    async def fail_reads(self) -> None:
        """Some GETs and lists of one instance fail."""
        if alive := self._alive():
            instance, region = self.rng.choice(alive), self.rng.choice(self.world.regions)
            for op in ("get_segment", "list_segments", "read_head"):
                instance.roads[region].fail(op, self.rng.randrange(4))

    async def damage(self) -> None:
        """Some bytes of a committed object are others for a while."""
        region = self.rng.choice(self.world.regions)
        server = self.world.servers[region]
        if refs := sorted(server.objects, key=lambda ref: (ref.seq, ref.epoch))[-20:]:
            ref = self.rng.choice(refs)
            right = server.objects[ref]
            at = self.rng.randrange(len(right.data))
            wrong = right.data[:at] + bytes([right.data[at] ^ 0xFF]) + right.data[at + 1 :]
            if any(known[:2] == (region, ref) for known in self.damaged):
                return
            self.say(f"damage {ref.key} in {region}")
            self.damaged.append((region, ref, right))
            server.objects[ref] = StoredObject(wrong, right.sha256)
            self._later(self.rng.choice([2.0, 10.0, 30.0]), lambda: self._mend(region, ref, right))

    def _mend(self, region: str, ref: Any, right: StoredObject) -> None:
        self.world.servers[region].objects[ref] = right
        self.damaged = [known for known in self.damaged if known[:2] != (region, ref)]

    async def step_clock(self) -> None:
        """Somebody sets a wall clock, or NTP does."""
        steps = {"none": [0.0], "small": [-2.0, 2.0], "large": [-3600.0, 3600.0, -2.0, 2.0]}
        if self.bad_clocks != "none" and (alive := self._alive()):
            instance, seconds = self.rng.choice(alive), self.rng.choice(steps[self.bad_clocks])
            self.say(f"the wall clock of {instance.key} steps by {seconds:g} s")
            instance.clock.jump(seconds)

    async def revoke_early(self) -> None:
        """etcd takes a lease away that was renewed a moment ago: a leader that was paused wakes up (see
        ``test_early_revocation.py``)."""
        world = self.world
        holders = [item for key, item in sorted(world.cluster._items.items()) if key.startswith(world.keys.holders)]
        if not holders:
            return
        item = self.rng.choice(holders)
        try:
            world.cluster.revoke(item.lease)
            self.say(f"etcd revokes the lease of {item.key}")
        except DrError:
            return  # no leader

    async def slow_etcd(self) -> None:
        """Heartbeats that take about as long as the lease that they renew."""
        who = self.rng.choice(["*", *self.world.regions, *(active.key for active in self.world.actives())])
        seconds = self.rng.choice([0.4, 0.6, 0.7, 0.74])
        self.say(f"etcd takes {2 * seconds:g} s for {who}")
        self.world.slow[who, ETCD] = seconds

        gone = self.rng.random() < 0.5

        def over() -> None:
            self.world.slow.pop((who, ETCD), None)
            if gone and not self.ended:  # first slow, then gone: what was counted from a late answer ends too late
                self._cut(ETCD, who)

        self._later(self.rng.choice([3.0, 8.0, 20.0]), over)

    async def lose_keys(self) -> None:
        """A region's KMS does not answer for a while, where objects are sealed."""
        world = self.world
        if isinstance(world, SealedWorld):
            region = self.rng.choice(world.regions)
            self.say(f"the KMS of {region} is away")
            world.kms_down.add(region)
            self._later(self.rng.choice([5.0, 20.0, 40.0]), lambda: world.kms_down.discard(region))

    async def hang_leader(self) -> None:
        """etcd 3.4's leader with a frozen disk goes on answering the keep-alives of one instance, and nothing else."""
        if actives := self.world.actives():
            key = self.rng.choice(actives).key
            self.say(f"{key} is behind a leader that hangs")
            self.world.behind_hanging_leader.add(key)
            self._later(self.rng.choice([5.0, 15.0, 30.0]), lambda: self.world.behind_hanging_leader.discard(key))

    async def clone(self) -> None:
        """A machine was cloned while it held: its copy offers another content for a segment that exists."""
        world = self.world
        if actives := world.actives():
            instance, region = self.rng.choice(actives), self.rng.choice(world.regions)
            for stream, active in sorted(instance.controller._actives.items()):
                fence, seq = active.tenure.fence, world.servers[region].head(stream).seq
                ref = SegmentRef(stream, seq, fence.epoch)
                if ref not in world.servers[region].objects or any(known[:2] == (region, ref) for known in self.damaged):
                    continue
                self.say(f"a clone of {instance.key} writes {ref.key} in {region}")
                client = world.store_class(world.servers[region], world.client(region)._gate)
                try:
                    await client.put_segment(fence, ref, b"another content")
                except DrError:
                    continue

    async def ask_anybody(self) -> None:
        """An agent with an old address asks whoever it knows."""
        if awake := [instance for instance in self._alive() if not instance.stopped]:
            instance, number = self.rng.choice(awake), self.rng.randrange(100)
            body, record = b"stray", f"{len(self.done):08d}"
            try:
                frames = [frame(f"stray-{number:03d}", record, "checkpoint", body, copies=self.rng.choice([1, 2]))]
                await self.world.put_to(instance, frames, [body])
            except DrError:
                return

    async def burst(self) -> None:
        """Agents write more than usual: where queues are small they have to say no."""
        self.say("a burst")
        for number in range(30):
            self.world.spawn(self.world.put(f"burst-{number:02d}", f"{len(self.done):08d}", self.rng.randbytes(2048), 1))

    async def restore_etcd(self) -> None:
        """etcd is lost and comes back from a backup; a person looks at the stores and confirms. It takes longer than any
        right lasts, as a restore does."""
        if not self.may_restore_etcd or self.world.history.restored:
            return
        world = self.world
        snapshot = world.cluster.snapshot()
        await world.wait(self.rng.choice([1.0, 5.0, 15.0]))
        self.say("etcd is lost")
        world.history.restored = True
        world.cluster.lose_leader()
        await world.wait(8.0)
        world.cluster.restore(snapshot)
        world.cluster.elect_leader()
        self.say("etcd is restored from a backup")
        if self.rng.random() < 0.5:
            await self.confirm_recovery()

    async def confirm_recovery(self) -> None:
        """``drctl recover``: a person compares and confirms, from any controller whose roads are open."""
        await recover_etcd(self.world, self.say)


async def recover_etcd(world: World, say: Callable[[str], None]) -> None:
    """What ``drctl recover`` does. Says what came of it."""
    alive = [instance for instance in world.instances.values() if instance.alive and not instance.stopped]
    if not alive:
        return
    controller = alive[0].controller
    outside = outside_of(controller._settings, controller._ports)
    try:
        found = await world.ask(alive[0], examine(outside, world.regions, None))
        if found.changes:
            audit = Audit(outside.coordinator, outside.keys)
            await world.ask(alive[0], recover(outside, audit, found, actor="ada", confirm="sim"))
            say(f"recovered: {'; '.join(found.changes)}")
    except DrError as error:
        say(f"recover: {error.code}")


def newest_epoch(world: World) -> int:
    """The greatest epoch that any store knows."""
    return max(server.head(stream).epoch for server in world.servers.values() for stream in world.streams)
