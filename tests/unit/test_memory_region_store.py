"""What only the reference store can show: a request that arrives after its sender gave up, in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from controller.adapters.memory.gate import OpenGate
from controller.adapters.memory.region_store import MemoryRegionStore, MemoryStore
from controller.domain.model import Fence, Head, SegmentRef
from controller.errors import FenceLost, OutcomeUnknown, Unavailable
from controller.lab.virtual_time import run_virtual

OLD, NEW = Fence("s0", 1, "r", "a"), Fence("s0", 2, "r", "b")


class SlowGate(OpenGate):
    """Each way takes a while; ``lost``: the answer does not come back."""

    def __init__(self, before: float = 0.0, *, lost: bool = False) -> None:
        self._before = before
        self._lost = lost

    async def before(self, op: str) -> None:
        await asyncio.sleep(self._before)

    async def after(self, op: str) -> None:
        if self._lost:
            raise Unavailable(f"{op}: lost", hint="a test lost it")


def test_a_request_that_outlasts_its_deadline_is_unknown_and_may_still_arrive() -> None:
    async def story() -> None:
        server = MemoryStore("r")
        late = MemoryRegionStore(server, SlowGate(before=5.0), call_timeout_seconds=2.0)
        with pytest.raises(OutcomeUnknown):
            await late.fence(OLD)
        assert server.head("s0") == Head("s0")
        await asyncio.sleep(4.0)
        assert server.head("s0").epoch == 1

    run_virtual(story())


def test_a_late_fence_of_an_older_epoch_changes_nothing() -> None:
    async def story() -> None:
        server = MemoryStore("r")
        with pytest.raises(OutcomeUnknown):
            await MemoryRegionStore(server, SlowGate(before=5.0)).fence(OLD)
        fenced = await MemoryRegionStore(server, OpenGate()).fence(NEW)
        await asyncio.sleep(10.0)
        assert server.head("s0") == fenced

    run_virtual(story())


def test_a_lost_answer_is_unknown_to_a_writer_whether_it_was_yes_or_no_and_unavailable_to_a_reader() -> None:
    async def story() -> None:
        server = MemoryStore("r")
        lossy, open_ = MemoryRegionStore(server, SlowGate(lost=True)), MemoryRegionStore(server, OpenGate())
        with pytest.raises(OutcomeUnknown):
            await lossy.fence(NEW)
        assert server.head("s0").epoch == 2
        with pytest.raises(FenceLost):
            await open_.fence(OLD)
        with pytest.raises(OutcomeUnknown):
            await lossy.fence(OLD)
        with pytest.raises(Unavailable) as caught:
            await lossy.read_head("s0")
        assert not isinstance(caught.value, OutcomeUnknown)

    run_virtual(story())


def test_a_copy_of_a_store_and_a_dropped_object_are_independent() -> None:
    async def story() -> None:
        server, ref = MemoryStore("r"), SegmentRef("s0", 1, 1)
        store = MemoryRegionStore(server, OpenGate())
        await store.put_segment(OLD, ref, b"x")
        kept = server.copy()
        server.drop(ref)
        assert await store.list_segments("s0", 1) == ()
        assert kept.refs("s0", 1, 10) == (ref,)
        assert kept.get(ref) == b"x"

    run_virtual(story())
