"""etcd takes a lease away that was renewed a moment ago. It does: a leader that was paused, or whose disk hung, wakes up, finds
the lease ended by its own clock, and its revocation is forwarded to the new leader (etcd issue 15247; 3.5.16 narrows the window
and leaves one). So whoever comes next waits until all that may have been lent has run out (``Opening._outwait``). Found by
``make faults``: ``etcd-disk-frozen`` on etcd 3.5.1, ``stop-etcd-leader`` on 3.5.16.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from controller.lab.virtual_time import run_virtual
from tests.simulation.checkers import settle, violations
from tests.simulation.test_guards import NO_WAIT
from tests.simulation.world import STREAM, World


def _story(keys_dir: Path) -> tuple[World, float]:
    """(the world, seconds by which the last right that the old holder lent outlives its successor's first acknowledgement)."""

    async def play() -> tuple[World, float]:
        world = World(keys_dir)
        active = (await world.served(agents=4)).controller._actives[STREAM]
        await world.until(lambda: active.tenure.remaining_seconds() > 3.5, 5, "a heartbeat")
        await world.wait(0.3)  # agents are lent what is left of it
        lent_until = active.intake.rights_end() + world.clock.wall() - world.clock.monotonic()
        world.cluster.revoke(world.cluster._items[world.keys.holder(STREAM)].lease)
        await world.until(lambda: world.acks[-1].epoch > active.tenure.fence.epoch, 30, "a successor that acknowledges")
        first = next(ack.at for ack in world.acks if ack.epoch > active.tenure.fence.epoch)
        await settle(world)
        return world, lent_until - first

    return run_virtual(play(), limit_seconds=300)


def test_a_lease_that_etcd_revokes_early_loses_nothing_and_makes_no_second_active_instance(keys_dir: Path) -> None:
    """Stores and zone trust no lease, and the holder hears of it with its next heartbeat."""
    assert violations(_story(keys_dir)[0]) == {}


def test_nobody_serves_before_the_rights_have_ended_that_were_lent_under_a_lease_which_etcd_revoked_early(
    keys_dir: Path,
) -> None:
    assert _story(keys_dir)[1] <= 0


def test_without_the_successors_wait_they_would(keys_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*NO_WAIT)
    assert _story(keys_dir)[1] > 1


def _stops_with_a_lost_right(keys_dir: Path) -> tuple[World, float]:
    """A holder loses its right to a full disk, and is told to stop before it has stepped down. Returns the world, and the
    seconds by which the last right that it lent outlives its successor's first acknowledgement."""

    async def play() -> tuple[World, float]:
        world = World(keys_dir)
        instance = await world.served(agents=4)
        active = instance.controller._actives[STREAM]
        await world.until(lambda: active.tenure.remaining_seconds() > 3.5, 5, "a heartbeat")
        await world.wait(0.3)
        lent_until = active.intake.rights_end() + world.clock.wall() - world.clock.monotonic()
        active._lost("the view cannot be written: database or disk is full")
        assert instance.main is not None
        instance.main.cancel()
        await world.spawn(instance.controller.stop())
        world.die(instance)
        await world.until(lambda: world.acks[-1].epoch > active.tenure.fence.epoch, 30, "a successor that acknowledges")
        first = next(ack.at for ack in world.acks if ack.epoch > active.tenure.fence.epoch)
        await settle(world)
        return world, lent_until - first

    return run_virtual(play(), limit_seconds=300)


def test_a_holder_that_lost_its_right_and_stops_keeps_its_lease_until_what_it_lent_has_run_out(keys_dir: Path) -> None:
    world, too_long = _stops_with_a_lost_right(keys_dir)
    assert violations(world) == {}
    assert too_long <= 0
