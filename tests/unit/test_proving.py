"""Bodies that are proven off the event loop: the same verdicts, and nothing is proven that is not."""

from __future__ import annotations

import random
from dataclasses import replace

from controller.adapters.memory.gate import OpenGate
from controller.adapters.memory.region_store import MemoryRegionStore, MemoryStore
from controller.domain.model import Frame
from controller.errors import Unavailable
from controller.lab.virtual_time import VirtualClock
from controller.stream import proving
from controller.stream.follower import Follower
from controller.stream.proving import INLINE_BYTES, prove
from controller.stream.segment import frame
from controller.stream.tables import WARM_MAX_BYTES
from controller.stream.view import View
from tests.support.segments import GROUP, History

BODY = random.Random(3).randbytes(INLINE_BYTES)


def no_base(_: Frame) -> bytes | None:
    raise Unavailable("not at hand")


async def test_small_bodies_stay_on_the_loop() -> None:
    assert await prove([frame("a", "r1", "checkpoint", b"x" * 1000)], no_base) == {}


async def test_a_chain_within_one_call_is_proven() -> None:
    second, third = BODY + b"more", BODY + b"more and more"
    frames = [
        frame("a", "r1", "checkpoint", BODY),
        frame("a", "r2", "checkpoint", second, previous=("r1", BODY)),
        frame("b", "r2", "checkpoint", b"of another agent"),
        frame("a", "r3", "checkpoint", third, previous=("r2", second)),
    ]
    assert [one.base for one in frames] == [None, "r1", None, "r2"]
    found = await prove(frames, no_base)
    assert [found[number].body for number in range(4)] == [BODY, second, b"of another agent", third]


async def test_what_does_not_verify_or_lacks_its_base_is_left_out() -> None:
    torn = replace(frame("a", "r1", "checkpoint", BODY), payload=b"!" + BODY[1:])
    orphan = frame("b", "r2", "checkpoint", BODY + b"x", previous=("r1", BODY))
    on_torn = frame("a", "r2", "checkpoint", BODY + b"x", previous=("r1", BODY))
    good = frame("c", "r1", "checkpoint", b"fine")
    assert list(await prove([torn, orphan, on_torn, good], no_base)) == [3]
    assert (await prove([orphan], lambda _: BODY))[0].body == BODY + b"x"
    assert await prove([orphan], lambda _: b"another base, long enough") == {}


async def test_a_standby_indexes_large_segments_as_it_does_small_ones() -> None:
    """Twice the same history, once proven in a thread and once not: the same view."""
    history = History()
    for number in range(3):
        state = random.Random(number).randbytes(300_000)
        frames = [frame(f"agent-{n}", f"s{number}", "checkpoint", state + bytes([n])) for n in range(5)]
        history.add(frames)
    history.add([frame("huge", "r1", "checkpoint", b"z" * (WARM_MAX_BYTES + 7))])
    server = MemoryStore("eu-west-1")
    history.install(server)
    views = []
    limit = proving.INLINE_BYTES
    for inline in (limit, 2**30):
        proving.INLINE_BYTES = inline
        try:
            view = View(None)
            follower = Follower(MemoryRegionStore(server, OpenGate()), view, "0", VirtualClock(), GROUP)
            assert (await follower.step()).seq == 4
            views.append(view)
        finally:
            proving.INLINE_BYTES = limit
    for n in range(5):
        assert views[0].latest(f"agent-{n}") == views[1].latest(f"agent-{n}")
    assert [view.count("0") for view in views] == [16, 16]
    for view in views:
        assert view.restorable("huge") is not None  # proven, and read from the store when it is wanted
        assert view.read("huge", "r1") is None
        assert view.cold() == ()
