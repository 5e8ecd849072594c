"""The judge of the policy ``enforce``: how much acknowledged work one store alone ever had."""

from __future__ import annotations

import bisect
from typing import Any

from tests.simulation.checkers import CHECKERS, EPSILON, Violation, received_at
from tests.simulation.world import World


def rpo_enforced(world: World) -> None:
    """At the moment of every acknowledgement of a record that only one store has: from the receipt of the oldest acknowledged
    record that only one store has to that moment it is at most the objective."""
    rpo = world.changes.get("rpo", {})
    if rpo.get("policy") != "enforce" or world.history.restored:
        return
    moves: dict[str, list[Any]] = {region: [] for region in world.servers}
    for moved in world.history.heads:
        moves[moved.region].append(moved)
    numbers = {region: [moved.n for moved in found] for region, found in moves.items()}
    stamps: list[tuple[int, int, float]] = []
    for ack in world.acks:
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
        if ack.at - oldest > rpo["seconds"] + EPSILON:
            raise Violation(
                "rpo-enforced",
                f"{ack.agent} {ack.id} was acknowledged while one store alone had the work of {ack.at - oldest:.2f} s; the "
                f"objective is {rpo['seconds']} s",
            )


CHECKERS["rpo-enforced"] = rpo_enforced
