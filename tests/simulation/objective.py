"""The judge of the policy ``enforce``: how much acknowledged work one store alone ever had."""

from __future__ import annotations

import bisect
from typing import Any

from tests.simulation.checkers import CHECKERS, EPSILON, Violation, received_at
from tests.simulation.world import World

CLOCK_RATE = 1.0006
"""A holder counts by its own clock, which may be slow by so much (``chaos.py`` makes it 0.9995)."""


def rpo_enforced(world: World) -> None:
    """At the moment of every acknowledgement of a record that only one store has: from the receipt of the oldest acknowledged
    record that only one store has to that moment it is at most the objective."""
    rpo = world.changes.get("rpo", {})
    if rpo.get("policy") != "enforce" or world.history.restored:
        return
    for stream in world.streams:
        _enforced(world, stream, rpo["seconds"])


def _enforced(world: World, stream: str, seconds: float) -> None:
    moves: dict[str, list[Any]] = {region: [] for region in world.servers}
    for moved in world.history.heads:
        if moved.after.stream == stream:
            moves[moved.region].append(moved)
    numbers = {region: [moved.n for moved in found] for region, found in moves.items()}
    stamps: list[tuple[int, int, float]] = []
    for ack in (ack for ack in world.acks if ack.stream == stream):
        if ack.new:
            stamps.append((ack.epoch, ack.seq, received_at(world, ack)))
        seqs = []
        for region, found in moves.items():
            at = bisect.bisect_left(numbers[region], ack.n) - 1
            seqs.append(found[at].after.seq if at >= 0 else 0)
        second = sorted(seqs, reverse=True)[1]
        if ack.seq <= second or not ack.new:
            continue
        oldest = min(stamp for epoch, seq, stamp in stamps if epoch == ack.epoch and seq > second)
        if ack.at - oldest > seconds * CLOCK_RATE + EPSILON:
            raise Violation(
                "rpo-enforced",
                f"{ack.agent} {ack.id} was acknowledged while one store alone had the work of {ack.at - oldest:.2f} s; the "
                f"objective is {seconds} s",
            )


CHECKERS["rpo-enforced"] = rpo_enforced
