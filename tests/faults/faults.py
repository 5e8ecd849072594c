"""The list of faults. Each is struck on a group at work, held for a while, healed; ``runner.py`` plays and judges them.

A fault says which regions it takes away (``lost``) and whether people have to move the group while it lasts (``move``): they
do when the lease has ended, as they would.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from controller.adapters.etcd_version import is_trustworthy
from controller.domain.promotion import State
from controller.lab.etcd import EtcdBinary
from tests.faults.network import WORLD, why_no_disks
from tests.faults.people import GaveUp
from tests.faults.relay import why_no_relay
from tests.faults.stage import QUOTA_MB, Stage

TTL_SECONDS = 5.0
HOLD_SECONDS = 7.0
"""Longer than the TTL and an election."""


@dataclass(frozen=True, slots=True)
class Struck:
    """What was done. ``injected``: faults in the sense of the table, 1 unless it is many."""

    lost: Sequence[str] = ()
    move: bool = False
    injected: int = 1
    undo: Callable[[Stage], Awaitable[None]] | None = None
    """What healing needs beside links, rules, proxies and processes."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of the table."""

    name: str
    what: str
    strike: Callable[[Stage, random.Random], Awaitable[Struck]]
    hold_seconds: float = HOLD_SECONDS
    disks: bool = False
    """Needs a file system that can be frozen."""
    relay: bool = False
    """Needs packets that can be held on their way."""
    trustworthy: bool = False
    """Needs an etcd that production could use: older ones break the promise, see the page."""
    wakes_etcd: bool = False
    """A member of etcd sleeps and wakes up: it may then take away leases that were renewed elsewhere, see the page."""


FAULTS: list[Fault] = []


def fault(name: str, what: str, **more: float | bool) -> Callable[[Callable[[Stage, random.Random], Awaitable[Struck]]], None]:
    """Puts a function on the list."""

    def add(strike: Callable[[Stage, random.Random], Awaitable[Struck]]) -> None:
        FAULTS.append(Fault(name, what, strike, **more))  # type: ignore[arg-type]

    return add


async def home_and_others(stage: Stage) -> tuple[str, list[str]]:
    home = await stage.home()
    return home, [region for region in stage.regions if region != home]


def playable(chosen: Sequence[Fault], etcd: EtcdBinary) -> tuple[list[Fault], list[str]]:
    """Those that this machine can play, and a sentence on each that it cannot."""
    kept, skipped = [], []
    no_disks, no_relay = why_no_disks(), why_no_relay()
    for one in chosen:
        if one.disks and no_disks:
            skipped.append(f"{one.name} skipped: {no_disks}; stop-etcd-leader stands still, too")
        elif one.relay and no_relay:
            skipped.append(f"{one.name} skipped: {no_relay}")
        elif one.trustworthy and not is_trustworthy(etcd.version):
            skipped.append(f"{one.name} skipped: etcd {etcd.version} revokes leases that were kept alive, use 3.5.16 or newer")
        else:
            kept.append(one)
    return kept, skipped


# ------------------------------------------------------------------------------------------------------------- partitions


@fault("pair-link", "the link between the active region and another one is unplugged")
async def _(stage: Stage, rng: random.Random) -> Struck:
    home, others = await home_and_others(stage)
    stage.network.link_down(home, rng.choice(others))
    return Struck()


@fault("pair-rules", "firewall rules drop all between two regions")
async def _(stage: Stage, rng: random.Random) -> Struck:
    stage.network.cut(*rng.sample(stage.regions, 2))
    return Struck()


@fault("standbys-apart", "the two standby regions do not reach each other")
async def _(stage: Stage, rng: random.Random) -> Struck:
    _, others = await home_and_others(stage)
    stage.network.cut(*others)
    return Struck()


@fault("isolate-standby", "a standby region reaches nobody")
async def _(stage: Stage, rng: random.Random) -> Struck:
    _, others = await home_and_others(stage)
    stage.network.isolate(rng.choice(others))
    return Struck()


@fault("isolate-home-rules", "firewall rules cut the active region off; people move the group")
async def _(stage: Stage, rng: random.Random) -> Struck:
    home, _ = await home_and_others(stage)
    stage.network.isolate(home)
    return Struck([home], move=True)


@fault("isolate-home-links", "all links of the active region are unplugged; people move the group")
async def _(stage: Stage, rng: random.Random) -> Struck:
    home, _ = await home_and_others(stage)
    for place in stage.network.places:
        if place != home:
            stage.network.link_down(home, place)
    return Struck([home], move=True)


@fault("isolate-etcd-leader", "the region of etcd's leader is cut off; people move the group if it was the active one")
async def _(stage: Stage, rng: random.Random) -> Struck:
    leader, home = stage.etcd_leader(), await stage.home()
    stage.network.isolate(leader)
    return Struck([leader], move=leader == home)


@fault("one-way-out", "what the active region sends to others is lost; what they send arrives")
async def _(stage: Stage, rng: random.Random) -> Struck:
    home, others = await home_and_others(stage)
    for other in others:
        stage.network.drop(home, other)
    return Struck([home], move=True)


@fault("one-way-in", "what others send to the active region is lost; what it sends arrives")
async def _(stage: Stage, rng: random.Random) -> Struck:
    home, others = await home_and_others(stage)
    for other in others:
        stage.network.drop(other, home)
    return Struck([home], move=True)


@fault("one-way-pair", "one direction between two regions is lost")
async def _(stage: Stage, rng: random.Random) -> Struck:
    stage.network.drop(*rng.sample(stage.regions, 2))
    return Struck()


@fault("flapping", "the links of the active region go down and up every 1.5 s", hold_seconds=1.0)
async def _(stage: Stage, rng: random.Random) -> Struck:
    home, others = await home_and_others(stage)
    for _ in range(4):
        for other in others:
            stage.network.link_down(home, other)
        await asyncio.sleep(1.5)
        stage.network.heal()
        await asyncio.sleep(1.5)
    return Struck(injected=4)


# -------------------------------------------------------------------------------------------------- processes that stand still


@fault("stop-holder", "SIGSTOP to the holder for longer than the TTL, then SIGCONT")
async def _(stage: Stage, rng: random.Random) -> Struck:
    holder = await stage.holder()
    name = f"controller-{holder.region}-{holder.instance}"
    _signal(stage, name, signal.SIGSTOP)
    return Struck()


@fault("stop-region", "SIGSTOP to all of the active region; people move the group; then all of it wakes up", wakes_etcd=True)
async def _(stage: Stage, rng: random.Random) -> Struck:
    home, _ = await home_and_others(stage)
    stage.lab.signal(signal.SIGSTOP, region=home)
    return Struck([home], move=True)


@fault("stop-store", "SIGSTOP to the active region's store")
async def _(stage: Stage, rng: random.Random) -> Struck:
    home, _ = await home_and_others(stage)
    stage.lab.signal(signal.SIGSTOP, region=home, kinds=("store",))
    return Struck()


@fault("stop-etcd-leader", "SIGSTOP to etcd's leader", wakes_etcd=True)
async def _(stage: Stage, rng: random.Random) -> Struck:
    stage.lab.signal(signal.SIGSTOP, region=stage.etcd_leader(), kinds=("etcd",))
    return Struck()


def _signal(stage: Stage, name: str, number: signal.Signals) -> None:
    for process in stage.lab.processes():
        if process.name == name:
            stage.lab._process().signal([process], number)


# ----------------------------------------------------------------------------------------------------------------- kill -9


@fault("kill-holder", "kill -9 of the holder; its neighbour takes over", hold_seconds=4.0)
async def _(stage: Stage, rng: random.Random) -> Struck:
    holder = await stage.holder()
    stage.lab.kill_controller(holder.region, holder.instance)
    return Struck()


@fault("kill-home", "kill -9 of all controllers of the active region; people move the group")
async def _(stage: Stage, rng: random.Random) -> Struck:
    home, _ = await home_and_others(stage)
    for place in stage.lab.topology.region(home).controllers:
        stage.lab.kill_controller(home, place.instance)
    return Struck([home], move=True)


@fault("kill-all-controllers", "kill -9 of every controller at once, all start again", hold_seconds=1.0)
async def _(stage: Stage, rng: random.Random) -> Struck:
    for place in stage.lab.topology.controllers:
        stage.lab.kill_controller(place.region, place.instance)
    return Struck(injected=len(stage.lab.topology.controllers))


@fault("kill-etcd-leader", "kill -9 of etcd's leader", hold_seconds=4.0)
async def _(stage: Stage, rng: random.Random) -> Struck:
    stage.lab.kill_member(stage.etcd_leader())
    return Struck()


@fault("kill-etcd", "kill -9 of every etcd member, one after the other, the next when the last is up again", hold_seconds=0.0)
async def _(stage: Stage, rng: random.Random) -> Struck:
    for region in rng.sample(stage.regions, 3):
        stage.lab.kill_member(region)
        await asyncio.sleep(1.0)
        stage.lab.start_member(region)
        await asyncio.sleep(3.0)
    return Struck(injected=3)


@fault("kill-the-rest", "kill -9 of every proxy, agent and name server", hold_seconds=1.0)
async def _(stage: Stage, rng: random.Random) -> Struck:
    names = [name for kind in ("proxy", "worker", "dns") for name in stage.running(kind)]
    return Struck(injected=sum(stage.kill(name) for name in names))


def _killed_store(where: str) -> Callable[[Stage, random.Random], Awaitable[Struck]]:
    async def strike(stage: Stage, rng: random.Random) -> Struck:
        home, others = await home_and_others(stage)
        region = home if where == "home" else rng.choice(others)
        await stage.lab.kill_store(region)

        async def undo(stage: Stage) -> None:
            await stage.lab.start_store(region)

        return Struck(undo=undo)

    return strike


FAULTS.extend(
    Fault(
        f"kill-store-{where}",
        f"kill -9 of {'the active' if where == 'home' else 'a standby'} region's store; it comes back with all it acknowledged",
        _killed_store(where),
    )
    for where in ("home", "remote")
)


KILL_AT = (
    State.QUIESCING,
    State.AUTHORIZING,
    State.FENCING,
    State.CATCHING_UP,
    State.VERIFYING,
    State.RESUMING,
    State.ROUTING,
    State.CONFIRMING,
    State.REPORTING,
)


def _kill_at(state: State) -> Callable[[Stage, random.Random], Awaitable[Struck]]:
    async def strike(stage: Stage, rng: random.Random) -> Struck:
        _, others = await home_and_others(stage)
        target = rng.choice(others)
        plan = await stage.people.order("switchover", target)
        record = await stage.people.reaches(plan, state)
        holder = await stage.people.holder()
        victim = holder.instance if holder is not None and holder.region == target else record.executor
        stage.lab.kill_controller(target, victim.rsplit("/", 1)[-1])
        await asyncio.sleep(0.5)
        stage.start_all()
        record = await stage.people.ended(plan)
        if record.state is not State.DONE:
            stage.say(f"  plan {plan} ended {record.state.value}: {record.reason}")
        return Struck()

    return strike


FAULTS.extend(
    Fault(
        f"kill-at-{state.value}",
        f"kill -9 of whoever carries a switchover when it is {state.value}",
        _kill_at(state),
        hold_seconds=0.0,
    )
    for state in KILL_AT
)


@fault("cut-during-switchover", "the target is cut off in the middle of a switchover, for 4 s", hold_seconds=0.0)
async def _(stage: Stage, rng: random.Random) -> Struck:
    _, others = await home_and_others(stage)
    target = rng.choice(others)
    plan = await stage.people.order("switchover", target)
    await stage.people.reaches(plan, rng.choice([State.QUIESCING, State.FENCING, State.ROUTING]))
    stage.network.isolate(target)
    await asyncio.sleep(4.0)
    stage.network.heal()
    record = await stage.people.ended(plan)
    stage.say(f"  plan {plan} ended {record.state.value}: {record.reason}")
    return Struck()


# ------------------------------------------------------------------------------------------------------------------- etcd


@fault("etcd-disk-frozen", "the disk of etcd's leader hangs (fsfreeze)", disks=True, trustworthy=True, wakes_etcd=True)
async def _(stage: Stage, rng: random.Random) -> Struck:
    stage.freeze_disk(stage.etcd_leader(), HOLD_SECONDS + 1)
    return Struck(undo=_thawed)


@fault("etcd-disk-frozen-follower", "the disk of an etcd follower hangs (fsfreeze)", disks=True)
async def _(stage: Stage, rng: random.Random) -> Struck:
    leader = stage.etcd_leader()
    stage.freeze_disk(rng.choice([region for region in stage.regions if region != leader]), HOLD_SECONDS + 1)
    return Struck(undo=_thawed)


async def _thawed(stage: Stage) -> None:
    await asyncio.sleep(2.0)  # the freezer thaws by itself


@fault("etcd-disk-full", "the disk of etcd's leader is full; the member dies of it or stalls", disks=True)
async def _(stage: Stage, rng: random.Random) -> Struck:
    region = stage.etcd_leader()
    filler = stage.disk(region) / "filler"
    with filler.open("wb") as file:
        try:
            while True:
                file.write(bytes(2**20))
        except OSError:
            pass
    # etcd writes into log pieces that it has reserved: fill them up, so that it needs a new one.
    for number in range(40):
        try:
            stage.etcdctl(region, "put", f"/dr-faults/filler/{number % 4}", text="x" * 2**20)
        except OSError:
            break

    async def undo(stage: Stage) -> None:
        filler.unlink()
        for member in stage.regions:
            stage.lab.start_member(member)

    return Struck(undo=undo)


@fault("etcd-nospace", "etcd's NOSPACE alarm; people compact, defragment and disarm", hold_seconds=6.0)
async def _(stage: Stage, rng: random.Random) -> Struck:
    region = stage.regions[0]
    for number in range(2 * QUOTA_MB):
        try:
            stage.etcdctl(region, "put", f"/dr-faults/junk/{number % 4}", text="x" * (2**20 - 1000))
        except OSError as error:
            if "space exceeded" in str(error):
                break
            raise
    else:
        raise GaveUp("etcd raised no alarm")

    async def undo(stage: Stage) -> None:
        _compact(stage)
        for member in stage.regions:
            stage.etcdctl(member, "defrag")
        stage.etcdctl(region, "alarm", "disarm")

    return Struck(undo=undo)


@fault(
    "etcd-compaction", "everything but the present revision is compacted away, and each member defragmented", hold_seconds=1.0
)
async def _(stage: Stage, rng: random.Random) -> Struck:
    _compact(stage)
    for member in stage.regions:
        stage.etcdctl(member, "defrag")
    return Struck()


def _compact(stage: Stage) -> None:
    found = stage.etcdctl(stage.regions[0], "get", "/none", "-w", "json")
    revision = int(found.partition('"revision":')[2].partition(",")[0])
    stage.etcdctl(stage.regions[0], "compact", str(revision))


# ------------------------------------------------------------------------------------------------------------------- stores

HTTP: list[tuple[str, str, dict[str, object]]] = [
    ("delay", "answers come 1.5 s late", {"fault": "delay", "seconds": 1.5}),
    ("reset", "connections are reset before the request arrives", {"fault": "reset before"}),
    ("lost-answer", "the write happened, the connection is reset", {"fault": "reset after"}),
    ("silent-write", "the write happened, nobody answers", {"fault": "blackhole after"}),
    ("failed-write", "the write happened, the answer is 500", {"fault": "fail after", "status": 500, "code": "InternalError"}),
    ("twice", "requests arrive twice", {"fault": "twice"}),
    ("truncate", "answers are cut in half", {"fault": "truncate"}),
    ("500", "500 InternalError", {"fault": "answer", "status": 500, "code": "InternalError"}),
    ("503", "503 SlowDown", {"fault": "answer", "status": 503, "code": "SlowDown"}),
    (
        "throttling",
        "400 ProvisionedThroughputExceededException",
        {"fault": "answer", "status": 400, "code": "ProvisionedThroughputExceededException", "operation": "UpdateItem"},
    ),
]


async def injected(stage: Stage, *places: str) -> int:
    """Requests that these proxies have broken so far."""
    counts = [await stage.proxy(place, "counts") for place in places]
    return sum(sum(count.values()) for count in counts)


def _http(rule: dict[str, object], where: str) -> Callable[[Stage, random.Random], Awaitable[Struck]]:
    async def strike(stage: Stage, rng: random.Random) -> Struck:
        home, others = await home_and_others(stage)
        place = home if where == "home" else rng.choice(others)
        before = await injected(stage, place)
        await stage.proxy(place, "break", **{"chance": 0.3, **rule})
        await asyncio.sleep(HOLD_SECONDS)
        return Struck(injected=await injected(stage, place) - before)

    return strike


FAULTS.extend(
    Fault(
        f"http-{name}-{where}",
        f"3 of 10 requests to {'the active' if where == 'home' else 'a standby'} region's store: {what}",
        _http(rule, where),
        hold_seconds=0.0,
    )
    for name, what, rule in HTTP
    for where in ("home", "remote")
)


@fault(
    "http-during-switchover",
    "half of all changes to Route 53 and stores lose their answers during a switchover",
    hold_seconds=0.0,
)
async def _(stage: Stage, rng: random.Random) -> Struck:
    _, others = await home_and_others(stage)
    before = await injected(stage, *stage.network.places)
    for place in (*stage.regions, WORLD):
        await stage.proxy(place, "break", fault="reset after", chance=0.5 if place == WORLD else 0.2)
    plan = await stage.people.order("switchover", rng.choice(others))
    record = await stage.people.ended(plan)
    stage.say(f"  plan {plan} ended {record.state.value}: {record.reason}")
    return Struck(injected=await injected(stage, *stage.network.places) - before)
