"""Data keys: who wraps them, what an outage of a region's KMS stops and what it does not, and what is asked of KMS at all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from controller.adapters import sealing
from controller.adapters.keyring import ASK_AGAIN_SECONDS, MAX_KEYS, Keyring, WriterKey
from controller.adapters.memory.gate import FaultGate
from controller.adapters.memory.key_service import MemoryKeyService, MemoryKms
from controller.adapters.memory.pager import MemoryPager
from controller.adapters.sealing import Envelope, Place, Wrap
from controller.domain.model import Fence, SegmentRef, Unknown
from controller.domain.sealing import store_lacks
from controller.errors import Corrupt, Misconfigured, Unavailable
from controller.lab.virtual_time import VirtualClock, run_virtual
from controller.runtime.key_watch import LOOK_SECONDS, RUNBOOK, KeyWatch

A, B, C = "eu-west-1", "eu-central-1", "us-east-1"
DAY = 86_400.0


class Rig:
    """The KMS of some regions, and keyrings that stand in one of them."""

    def __init__(self, *regions: str) -> None:
        self.clock = VirtualClock()
        self.kms = {region: MemoryKms(region) for region in regions}
        self.gates = {region: FaultGate(self.clock.sleep) for region in regions}

    def keyring(self, home: str = A, **settings: float) -> Keyring:
        services = {region: MemoryKeyService(kms, self.gates[region]) for region, kms in self.kms.items()}
        return Keyring("g", services, home=home, clock=self.clock, **settings)  # type: ignore[arg-type]

    def cut(self, *regions: str) -> None:
        for region, gate in self.gates.items():
            gate.cut = region in regions

    def calls(self) -> int:
        return sum(gate.calls.total() for gate in self.gates.values())


def told(story: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await story()

    run_virtual(run(), limit_seconds=10 * DAY)


def envelope(writer: WriterKey, wraps: tuple[Wrap, ...] | None = None) -> Envelope:
    place = Place.of("g", SegmentRef("s00", 1, 1))
    return sealing.envelope_for(writer.key, writer.wraps if wraps is None else wraps, place, b"x")


@pytest.mark.parametrize(
    ("region", "wraps", "may"),
    [(A, (A,), True), (B, (A,), False), (A, (), False), (A, (B, C), True), (A, (A, B, C), True), (C, (A, B), True)],
)
def test_where_an_object_may_lie(region: str, wraps: tuple[str, ...], may: bool) -> None:
    assert (store_lacks(region, wraps) is None) is may


def test_whatever_region_is_lost_what_was_put_stays_readable_in_the_stores_that_are_left() -> None:
    """The rule itself, for every set of wraps and up to four regions."""
    for count in (2, 3, 4):
        regions = [f"r{n}" for n in range(count)]
        for bits in range(2**count):
            wraps = {region for n, region in enumerate(regions) if bits >> n & 1}
            stores = {region for region in regions if store_lacks(region, wraps) is None}
            for lost in regions:
                if stores - {lost}:
                    assert wraps - {lost}, f"in the stores of {stores - {lost}} nothing opens {wraps} without {lost}"


def test_a_tenures_key_is_made_once_and_wrapped_for_every_region_and_opens_in_each() -> None:
    async def story() -> None:
        rig = Rig(A, B, C)
        ring = rig.keyring()
        await ring.prepare(Fence("s00", 3, A, "a"))
        writers = await asyncio.gather(*(ring.writer("s00", 3) for _ in range(50)))
        assert len({writer.key.name for writer in writers}) == 1
        assert writers[0].wrapped_for == (B, A, C)
        assert rig.calls() == 3, "one request to each region for a tenure"
        assert ring.warnings() == ()
        for region in (A, B, C):
            rig.cut(*({A, B, C} - {region}))
            assert (await rig.keyring(region).unwrap("s00", envelope(writers[0]))).plain == writers[0].key.plain
        rig.cut()
        assert (await ring.writer("s00", 4)).key.name != writers[0].key.name, "a new tenure has a new key"
        assert (await ring.writer("s01", 4)).key.name != (await ring.writer("s00", 4)).key.name

    told(story)


def test_an_outage_of_every_kms_does_not_stop_a_holder_or_a_reader_that_has_its_keys() -> None:
    async def story() -> None:
        rig = Rig(A, B)
        holder, standby = rig.keyring(), rig.keyring(B)
        writer = await holder.writer("s00", 1)
        await standby.unwrap("s00", envelope(writer))
        rig.cut(A, B)
        for _ in range(10):
            await rig.clock.sleep(DAY / 5)
            assert (await holder.writer("s00", 1)).key is writer.key, "a rotation is put off"
            await asyncio.sleep(0.1)
        assert "due for rotation" in holder.warnings()[0]
        assert (await holder.unwrap("s00", envelope(writer))) is writer.key
        with pytest.raises(Unavailable, match=r"eu-central-1.*eu-west-1"):
            await standby.unwrap("s00", envelope(writer))  # its time is over: a key that was taken away must not work for ever
        rig.cut()
        await rig.clock.sleep(ASK_AGAIN_SECONDS)
        await holder.writer("s00", 1)
        await asyncio.sleep(0.1)
        assert (await holder.writer("s00", 1)).key is not writer.key
        assert holder.warnings() == ()

    told(story)


def test_a_rotation_is_put_off_while_one_region_could_not_open_the_new_key() -> None:
    async def story() -> None:
        rig = Rig(A, B, C)
        ring = rig.keyring(rotate_seconds=100.0)
        first = (await ring.writer("s00", 1)).key
        rig.cut(C)
        for _ in range(10):
            await rig.clock.sleep(50)
            await ring.writer("s00", 1)
            await asyncio.sleep(0.1)
        assert (await ring.writer("s00", 1)).key is first
        assert f"due for rotation ({C}:" in ring.warnings()[0]
        rig.cut()
        await rig.clock.sleep(50)
        await ring.writer("s00", 1)
        await asyncio.sleep(0.1)
        fresh = await ring.writer("s00", 1)
        assert fresh.key is not first
        assert fresh.wrapped_for == (B, A, C)

    told(story)


def test_a_reader_keeps_a_key_for_its_time_and_no_longer() -> None:
    async def story() -> None:
        rig = Rig(A, B)
        writer = await rig.keyring().writer("s00", 1)
        standby = rig.keyring(B, cache_seconds=100.0)
        for _ in range(5):
            await standby.unwrap("s00", envelope(writer))
        assert (rig.gates[A].calls["unwrap"], rig.gates[B].calls["unwrap"]) == (0, 1), "the own region's KMS is asked first"
        rig.cut(A, B)
        await rig.clock.sleep(99)
        await standby.unwrap("s00", envelope(writer))
        await rig.clock.sleep(2)
        with pytest.raises(Unavailable):
            await standby.unwrap("s00", envelope(writer))

    told(story)


def test_a_reader_whose_kms_is_gone_asks_another_region_and_many_readers_ask_once() -> None:
    async def story() -> None:
        rig = Rig(A, B, C)
        writers = [await rig.keyring().writer("s00", epoch) for epoch in (1, 2)]
        standby = rig.keyring(B)
        rig.cut(A, B)
        keys = await asyncio.gather(*(standby.unwrap("s00", envelope(writers[0])) for _ in range(20)))
        assert {key.plain for key in keys} == {writers[0].key.plain}
        assert rig.gates[C].calls["unwrap"] == 1
        await standby.unwrap("s00", envelope(writers[1]))
        assert rig.gates[B].calls["unwrap"] == 1, "who did not answer lately is asked last"

    told(story)


@pytest.mark.parametrize("lost", [A, B, C])
def test_with_three_regions_a_tenure_opens_while_any_one_kms_is_gone_and_is_made_whole_later(lost: str) -> None:
    async def story() -> None:
        rig = Rig(A, B, C)
        rig.cut(lost)
        ring = rig.keyring()
        await ring.prepare(Fence("s00", 1, A, "a"))
        writer = await ring.writer("s00", 1)
        assert set(writer.wrapped_for) == {A, B, C} - {lost}
        assert lost in ring.warnings()[0]
        rig.cut()
        await rig.clock.sleep(ASK_AGAIN_SECONDS)
        await ring.writer("s00", 1)
        await asyncio.sleep(0.1)
        assert (await ring.writer("s00", 1)).wrapped_for == (B, A, C)
        assert ring.warnings() == ()

    told(story)


def test_no_tenure_opens_under_a_key_that_one_other_region_alone_can_open() -> None:
    async def story() -> None:
        rig = Rig(A, B, C)
        rig.cut(A, C)
        ring = rig.keyring()
        with pytest.raises(Unavailable, match=r"nothing can be sealed safely in eu-west-1: .*eu-central-1 only.*us-east-1"):
            await ring.prepare(Fence("s00", 1, A, "a"))
        rig.cut(A, B, C)
        with pytest.raises(Unavailable, match="no region's KMS makes a data key"):
            await rig.keyring().prepare(Fence("s00", 1, A, "a"))
        rig.cut(A)
        await ring.prepare(Fence("s00", 1, A, "a"))
        assert set((await ring.writer("s00", 1)).wrapped_for) == {B, C}

    told(story)


def test_with_two_regions_and_one_gone_the_other_goes_on_alone_and_copies_wait_for_its_return() -> None:
    async def story() -> None:
        rig = Rig(A, B)
        rig.cut(A)
        ring = rig.keyring(B)
        await ring.prepare(Fence("s00", 1, B, "b"))
        writer = await ring.writer("s00", 1)
        assert writer.wrapped_for == (B,)
        assert store_lacks(A, writer.wrapped_for) is not None

    told(story)


def test_a_disabled_key_says_so_and_stops_what_only_it_can_open() -> None:
    async def story() -> None:
        rig = Rig(A, B)
        writer = await rig.keyring().writer("s00", 1)
        rig.kms[A].disabled = rig.kms[B].disabled = True
        with pytest.raises(Misconfigured, match="is disabled"):
            await rig.keyring().unwrap("s00", envelope(writer))
        with pytest.raises(Misconfigured, match="a key in none of them"):
            await Rig(C).keyring(C).unwrap("s00", envelope(writer))

    told(story)


def test_wraps_that_were_tampered_with_are_stepped_over_and_all_of_them_bad_is_corrupt() -> None:
    async def story() -> None:
        rig = Rig(A, B)
        ring = rig.keyring()
        writer, other = await ring.writer("s00", 1), await ring.writer("s01", 1)
        bad = Wrap(A, writer.wraps[1].data[:-1] + b"!")
        assert (await rig.keyring().unwrap("s00", envelope(writer, (writer.wraps[0], bad)))).plain == writer.key.plain
        with pytest.raises(Corrupt):
            await rig.keyring().unwrap("s00", envelope(writer, (bad,)))
        swapped = envelope(
            writer, (Wrap(A, rig.kms[A].wrap(other.key.plain, {"agent-dr:group": "g", "agent-dr:stream": "s00"})),)
        )
        with pytest.raises(Corrupt, match="another key than the object names"):
            await rig.keyring().unwrap("s00", swapped)
        with pytest.raises(Corrupt):  # the context is the stream's: nobody opens one stream with the other's right
            await rig.keyring().unwrap("s01", envelope(writer))
        rig.cut(B)
        with pytest.raises(Unavailable):  # B might open it: what is not known is not called corrupt
            await rig.keyring().unwrap("s00", envelope(writer, (writer.wraps[0], bad)))

    told(story)


def test_who_asks_again_and_again_for_what_cannot_be_opened_does_not_ask_kms_each_time() -> None:
    async def story() -> None:
        rig = Rig(A, B)
        writer = await rig.keyring().writer("s00", 1)
        rig.cut(A, B)
        ring, before = rig.keyring(), rig.calls()
        for _ in range(100):
            with pytest.raises(Unavailable):
                await ring.unwrap("s00", envelope(writer))
            await rig.clock.sleep(0.1)
        assert rig.calls() - before <= 2 * (1 + 10 * 3 / ASK_AGAIN_SECONDS)

    told(story)


def test_keys_in_memory_are_bounded() -> None:
    async def story() -> None:
        rig = Rig(A)
        writer, reader = rig.keyring(), rig.keyring()
        for epoch in range(1, MAX_KEYS + 20):
            await reader.unwrap("s00", envelope(await writer.writer("s00", epoch)))
        assert len(reader._known) == MAX_KEYS

    told(story)


def test_reach_says_of_each_region_whether_its_kms_wraps_and_asks_at_most_twice_a_minute() -> None:
    async def story() -> None:
        rig = Rig(A, B)
        rig.cut(B)
        ring = rig.keyring()
        for _ in range(3):
            reached = await ring.reach()
        assert reached[A] == ""
        assert "not sent" in reached[B]
        assert rig.calls() == 2

    told(story)


def test_no_key_is_shown_by_what_holds_them() -> None:
    async def story() -> None:
        rig = Rig(A)
        ring = rig.keyring()
        writer = await ring.writer("s00", 1)
        await ring.unwrap("s00", envelope(await rig.keyring().writer("s00", 1)))
        made = await MemoryKeyService(rig.kms[A], rig.gates[A]).make_data_key({})
        for shown in (repr(ring), repr(writer), repr(made), repr(ring._known), repr(ring._writers)):
            for key in (writer.key.plain, made.plain):
                assert key.hex() not in shown
                assert repr(key)[2:-1] not in shown

    told(story)


# --------------------------------------------------------------------------------------------------- what people are shown


def test_a_kms_that_nobody_asked_is_unknown_and_one_that_refuses_is_told_with_since_when() -> None:
    async def story() -> None:
        rig = Rig(A, B, C)
        ring = rig.keyring()
        assert {one.region: one.wraps.why for one in ring.seen() if isinstance(one.wraps, Unknown)} == dict.fromkeys(
            (A, B, C), "it was not asked yet"
        )
        await ring.writer("s00", 1)
        assert all(one.wraps is True and one.streams == {"s00": 0.0} for one in ring.seen())
        rig.kms[C].disabled = True
        await rig.clock.sleep(100)
        assert ring.warnings() == (), "the data key is wrapped for all, so nothing asked: that is what the watch is for"
        await ring.reach()
        began = rig.clock.wall()
        for _ in range(3):
            await rig.clock.sleep(60)
            await ring.reach()
        gone = next(one for one in ring.seen() if one.region == C)
        assert (gone.wraps, gone.since, gone.streams) == (False, began, {"s00": 0.0})
        assert "disabled" in gone.why
        assert f"the KMS of {C} has not wrapped data keys since " in ring.warnings()[0]
        await ring.writer("s00", 2)  # a tenure that begins now
        lacking = next(one for one in ring.seen() if one.region == C)
        assert lacking.streams == {"s00": rig.clock.wall()}
        assert any(f"is sealed for the KMS of {B}, {A} only ({C}:" in warning for warning in ring.warnings())
        await rig.clock.sleep(301)
        assert all(isinstance(one.wraps, Unknown) for one in ring.seen()), "an old answer says nothing about now"
        rig.kms[C].disabled = False
        await ring.reach()
        assert all(one.wraps is True for one in ring.seen())
        assert rig.keyring(enabled=False).seen() == ()

    told(story)


def test_the_watch_pages_once_for_a_kms_that_stays_away_and_not_for_a_moment() -> None:
    async def story() -> None:
        rig, pager = Rig(A, B), MemoryPager()
        watch = KeyWatch(rig.keyring(), rig.clock, pager)
        for cut, looks, pages in ((True, 3, 0), (False, 1, 0), (True, 3, 0), (True, 4, 1), (False, 1, 1), (True, 4, 2)):
            rig.cut(*([B] if cut else []))
            for _ in range(looks):
                await watch.look()
                await rig.clock.sleep(LOOK_SECONDS)
            assert len(pager.pages) == pages, (cut, looks)
        assert {(page.key, page.runbook) for page in pager.pages} == {(f"kms-{B}", RUNBOOK)}
        await KeyWatch(None, rig.clock, pager).look()  # nothing is sealed

    told(story)


def test_after_the_kms_keys_were_rotated_old_data_keys_open_and_new_ones_are_wrapped_by_the_new_material() -> None:
    async def story() -> None:
        rig = Rig(A, B)
        old = await rig.keyring().writer("s00", 1)
        for kms in rig.kms.values():
            kms.rotate()
        new = await rig.keyring().writer("s00", 2)
        for region in (A, B):
            rig.cut(*({A, B} - {region}))
            for writer in (old, new):
                assert (await rig.keyring(region).unwrap("s00", envelope(writer))).plain == writer.key.plain
        rig.cut()

    told(story)


def test_objects_that_one_kms_alone_opens_are_counted_as_they_are_read() -> None:
    async def story() -> None:
        rig = Rig(A, B)
        ring = rig.keyring()
        for number, wraps in enumerate(((A,), (A,), (A, B), (B,))):
            ring.note_object(A, f"object-{number}", wraps)
        assert {one.region: one.alone for one in ring.seen()} == {A: 2, B: 1}
        assert any(f"2 objects are sealed for the KMS of {A} alone" in warning for warning in ring.warnings())
        ring.note_object(A, "object-0", (A, B))  # replaced meanwhile
        assert {one.region: one.alone for one in ring.seen()} == {A: 1, B: 1}

    told(story)


def test_a_wrap_of_a_key_that_is_gone_does_not_count_and_a_copy_gets_a_new_one() -> None:
    async def story() -> None:
        rig = Rig(A, B)
        writer = await rig.keyring().writer("s00", 1)
        old = envelope(writer)
        rig.kms[A] = MemoryKms(A)  # its key was deleted, and another one took its place
        ring = rig.keyring()
        assert (await ring.unwrap("s00", old)).plain == writer.key.plain, "by the other region"
        assert {one.region: one.dead for one in ring.seen()} == {A: 1, B: 0}
        assert any(f"the KMS of {A} does not open 1 data keys" in warning for warning in ring.warnings())
        wraps = await ring.with_wrap("s00", writer.key, old, A)
        rig.cut(B)
        assert (await rig.keyring().unwrap("s00", envelope(writer, wraps))).plain == writer.key.plain, (
            "by its own new key alone"
        )
        rig.cut(A)
        assert await rig.keyring().with_wrap("s00", writer.key, old, A) == old.wraps, "who does not answer is not called gone"
        rig.cut()
        rig.kms[A].disabled = True
        assert await rig.keyring().with_wrap("s00", writer.key, old, A) == old.wraps, "nor who refuses everything"
        fine = envelope(writer)
        before = rig.calls()
        for _ in range(20):
            await ring.with_wrap("s00", writer.key, fine, B)
        assert rig.calls() - before == 1, "asked once"

    told(story)
