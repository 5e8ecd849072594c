"""An acknowledgement that comes when its giver's right has passed is none: the record is put again, wherever it was going."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from controller.agent import AsyncCheckpoints, NotAllAcknowledged, Spool
from controller.agent.client import SPOOLED
from controller.agent.spool import Letter
from controller.errors import DrError, OutcomeUnknown, Refused
from controller.lab.virtual_time import VirtualClock, run_virtual
from tests.support.agent_wire import Store, WireController, WireTransport

URL = "http://a:1"


class World:
    """One controller and a client of it."""

    def __init__(self, **options: Any) -> None:
        self.controller = WireController(URL, Store())
        self.client = AsyncCheckpoints(
            [URL],
            clock=VirtualClock(),
            transport=WireTransport(self.controller),
            timeout_seconds=5.0,
            attempt_seconds=4.0,
            **options,
        )


def answers_slowly(seconds: float, times: int) -> Any:
    left = [times]

    async def fault(_: WireController, moment: str) -> None:
        if moment == "after" and left[0] > 0:
            left[0] -= 1
            await asyncio.sleep(seconds)

    return fault


def rights(*seconds: float) -> Any:
    """The controller's right at each answer; the last one stays."""
    left = list(seconds)

    def fault(controller: WireController, moment: str) -> None:
        if moment == "before":
            controller.right_seconds = left.pop(0) if len(left) > 1 else left[0]

    return fault


@pytest.mark.parametrize("fault", [rights(0.0, 5.0), rights(float("-1"), 5.0), answers_slowly(3.0, 1)])
def test_a_late_acknowledgement_is_settled_by_putting_the_same_record_again(fault: Any) -> None:
    async def story() -> None:
        world = World()
        world.controller.right_seconds = 2.0
        world.controller.fault = fault
        async with world.client as client:
            assert (await client.put("agent", "1", b"body")).status == "duplicate"
            assert client.right.remaining() > 0
        assert world.controller.batches == [1, 1]

    run_virtual(story())


def test_a_holder_without_a_right_acknowledges_nothing_and_extends_nothing() -> None:
    async def story() -> None:
        world = World()
        world.controller.right_seconds = 0.0
        async with world.client as client:
            with pytest.raises(OutcomeUnknown, match="right ended"):
                await client.put("agent", "1", b"body")
            with pytest.raises(OutcomeUnknown):
                await client.create_task("agent", {})
            assert client.right.remaining() == 0
            assert client.right.term == 0

    run_virtual(story())


def test_a_late_answer_still_says_no() -> None:
    async def story() -> None:
        world = World()
        world.controller.right_seconds = 0.0
        world.controller.store.attempts["moved"] = 2
        async with world.client as client:
            letters = [Letter("moved", "1", "checkpoint", b"x", attempt=1), Letter("agent", "1", "checkpoint", b"x")]
            with pytest.raises(NotAllAcknowledged) as caught:
                await client.put_many(letters)
        moved, agent = caught.value.results
        assert getattr(moved, "code", "") == "fenced"
        assert isinstance(agent, OutcomeUnknown)
        assert not isinstance(agent, Refused)

    run_virtual(story())


def test_a_spooled_record_stays_spooled_until_somebody_with_a_right_has_it(tmp_path: Path) -> None:
    async def story() -> None:
        spool = Spool(tmp_path / "spool.db")
        world = World(spool=spool)
        world.controller.right_seconds = 0.0
        async with world.client as client:
            assert (await client.put("agent", "1", b"body", timeout_seconds=1.0)).status == SPOOLED
            with pytest.raises(OutcomeUnknown):
                await client.drain(timeout_seconds=1.0)
            assert spool.waiting("agent") == 1
            world.controller.right_seconds = 5.0
            await client.drain()
            assert spool.waiting("agent") == 0
            assert spool.rejected() == ()
        spool.close()

    run_virtual(story())


def test_a_drain_that_is_asked_for_goes_before_the_one_in_the_background_which_goes_on_after_it(tmp_path: Path) -> None:
    async def story() -> None:
        spool = Spool(tmp_path / "spool.db")
        world = World(spool=spool)
        world.controller.right_seconds = 0.0
        async with world.client as client:
            assert (await client.put("agent", "1", b"body", timeout_seconds=1.0)).status == SPOOLED
            await VirtualClock().sleep(0.5)  # the one in the background has the turn
            with pytest.raises(DrError) as caught:
                await client.drain(timeout_seconds=1.0)
            assert "still being sent" not in str(caught.value)
            assert spool.waiting("agent") == 1
            world.controller.right_seconds = 5.0
            await VirtualClock().sleep(60.0)
            assert spool.waiting("agent") == 0
            assert spool.rejected() == ()
        spool.close()

    run_virtual(story())
