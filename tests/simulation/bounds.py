"""Judges of what holds at every moment and of what comes in the end: copies, queues, survival, progress."""

from __future__ import annotations

import bisect
from typing import Any

from controller.domain.model import Forks
from controller.stream.backlog import BACKLOG_MARKS
from controller.stream.log import LOG_SEGMENTS
from tests.simulation.checkers import CHECKERS, Violation, live_history, settle
from tests.simulation.world import World


def copies_committed(world: World) -> None:
    """At the moment of an acknowledgement its segment was committed in as many stores as were asked for; for one copy: in one
    that etcd had recorded as a sole acknowledger, or in two."""
    if world.history.restored:  # what etcd had recorded is forgotten
        return
    for stream in world.streams:
        _copies_committed(world, stream)


def _copies_committed(world: World, stream: str) -> None:
    moves: dict[str, list[Any]] = {region: [] for region in world.servers}
    for moved in world.history.heads:
        if moved.after.stream == stream:
            moves[moved.region].append(moved)
    numbers = {region: [moved.n for moved in found] for region, found in moves.items()}
    recorded: list[tuple[int, Forks]] = [
        (t.n, t.forks[1]) for t in world.history.transactions if t.forks is not None and t.stream == stream
    ]
    for ack in (ack for ack in world.acks if ack.stream == stream):
        there = []
        for region, found in moves.items():
            at = bisect.bisect_left(numbers[region], ack.n) - 1
            if at >= 0 and found[at].after.seq >= ack.seq:
                there.append(region)
        if len(there) >= max(2, ack.copies):
            continue
        sole = next((forks.sole_ackers for n, forks in reversed(recorded) if n < ack.n), ())
        if ack.copies >= 2 or not set(there) & set(sole):
            raise Violation(
                "copies-committed",
                f"{ack.agent} {ack.id} was acknowledged with {ack.copies} copies, segment {ack.seq} was committed in {there}, "
                f"sole acknowledgers were {sole}",
            )


def survives_one_region(world: World) -> None:
    """Whichever region were lost this moment: what was acknowledged with two copies is in the history that is left."""
    if world.history.restored:
        return
    for lost in world.servers:
        for live in [live_history(world, without=lost, stream=stream) for stream in world.streams]:
            for ack in (ack for ack in world.acks if ack.stream == live.stream):
                if ack.copies >= 2 and live.bodies.get((ack.agent, ack.id)) != ack.body:
                    raise Violation(
                        "survives-one-region",
                        f"without {lost} the history of {live.stream} ends at segment {live.length}; {ack.agent} {ack.id}, "
                        f"acknowledged with {ack.copies} copies, is in segment {ack.seq}",
                    )


def gauge_queues(world: World) -> None:
    """From now on: looks at every holder's queues whenever the story looks at the world."""
    world.watchers.append(lambda: _look(world))


def _look(world: World) -> None:
    for instance in world.instances.values():
        for active in instance.controller._actives.values() if instance.alive else ():
            writer: Any = active.writer
            if writer is None:
                continue
            limit = writer._limits.queue_max_bytes
            for name, value, bound in (
                ("queued bytes", writer._queue.bytes, limit),
                # A batch may be taken while the log is just below twice the limit, and what is queued then comes on top.
                ("logged bytes", writer.log.bytes, 4 * limit),
                ("logged segments", len(writer.log), 3 * LOG_SEGMENTS),
                ("lag marks", len(writer._marks), 2 * BACKLOG_MARKS + 1),
            ):
                if value > bound:
                    world.overruns.append(f"{instance.key}: {value} {name}, the bound is {bound}")


def queues_bounded(world: World) -> None:
    """No queue of a holder ever passed its bound. Judged where ``gauge_queues`` looks."""
    if world.overruns:
        raise Violation("queues-bounded", world.overruns[0])


async def progress(world: World, seconds: float) -> None:
    """Once faults have stopped, one instance serves, every store gets level, and records are acknowledged, within a bound."""
    before = len(world.acks)
    try:
        await settle(world, seconds)
    except Violation:
        raise
    except AssertionError as error:
        raise Violation("progress", str(error)) from error
    for _ in range(40):
        if len(world.acks) > before:
            return
        await world.wait(0.5)
    raise Violation("progress", f"the group is level again and acknowledges nothing\n{world.story()}")


CHECKERS.setdefault("copies-committed", copies_committed)
CHECKERS.setdefault("survives-one-region", survives_one_region)
CHECKERS.setdefault("queues-bounded", queues_bounded)
