"""Moving stores towards the chosen history: fence, cut back, copy, bring home; and what damage in a store does to that."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from controller.adapters.memory.gate import FaultGate
from controller.adapters.memory.region_store import MemoryRegionStore, MemoryStore, StoredObject
from controller.domain import replication
from controller.domain.model import GENESIS, EpochStart, Fence, Head, Salvage, SegmentRef
from controller.errors import Conflict, Corrupt, DrError, FenceLost, NotFound, Unavailable
from controller.lab.virtual_time import VirtualClock, run_virtual
from controller.stream.history import (
    COPY_BATCH,
    Tail,
    bring_home,
    chain_at,
    copy_missing,
    cut_back,
    fence_stores,
    read_segment,
)
from tests.support.segments import History

STREAM = "0"
HOME, NEAR, FAR = "eu-west-1", "eu-central-1", "us-east-1"
REGIONS = (HOME, NEAR, FAR)
FENCE = Fence(STREAM, 9, HOME, "a")


class Rig:
    """Three stores behind gates. Made inside the loop."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.servers = {region: MemoryStore(region) for region in REGIONS}
        self.gates = {region: FaultGate(self.clock.sleep) for region in REGIONS}
        self.stores = {region: MemoryRegionStore(self.servers[region], self.gates[region]) for region in REGIONS}

    def install(self, region: str, history: History, *, seq: int | None = None) -> None:
        """The store holds the history, with the counters that its writer left."""
        history.install(self.servers[region], seq=seq)
        kept = history.segments[:seq]
        frames = [frame for built in kept for frame in built.segment.frames]
        self.servers[region].heads[STREAM] = replace(
            self.servers[region].heads[STREAM],
            records=len(frames),
            bytes=sum(len(built.data) for built in kept),
            received_at=max((frame.record.received_at for frame in frames), default=0.0),
        )

    async def fence(self, *regions: str) -> dict[str, Head]:
        heads, _ = await fence_stores({region: self.stores[region] for region in regions or REGIONS}, FENCE, 2.0)
        return heads

    def head(self, region: str) -> Head:
        return self.servers[region].head(STREAM)


def tail_of(history: History) -> Tail:
    return Tail(history.seq, history.chain, history.head().epochs)


def garbage(server: MemoryStore, ref: SegmentRef, data: bytes) -> None:
    """An object whose bytes were wrong when they were written: the store itself finds nothing to complain about."""
    server.drop(ref)
    server.put(ref, data)


# ---------------------------------------------------------------------------------------------------------------- fencing


def test_fencing_returns_every_head_that_answers_and_why_the_others_are_not_fenced() -> None:
    async def story() -> None:
        rig = Rig()
        rig.install(HOME, History().grow(3))
        rig.gates[NEAR].cut = True
        rig.gates[FAR].delay_seconds = 60.0
        heads, unfenced = await fence_stores(rig.stores, FENCE, 1.0)
        assert set(heads) == {HOME}
        assert (heads[HOME].seq, heads[HOME].epoch) == (3, 9)
        assert unfenced[FAR] == "no answer in 1 s"
        assert "not sent" in unfenced[NEAR]

    run_virtual(story())


def test_fencing_meets_a_greater_epoch_and_stops_at_once_even_if_others_are_silent() -> None:
    async def story() -> None:
        rig = Rig()
        await rig.stores[NEAR].fence(Fence(STREAM, 12, NEAR, "b"))
        rig.gates[FAR].cut = True
        with pytest.raises(FenceLost) as caught:
            await fence_stores(rig.stores, FENCE, 1.0)
        assert caught.value.epoch == 12

    run_virtual(story())


def test_fencing_again_after_a_lost_answer_returns_the_same_heads() -> None:
    async def story() -> None:
        rig = Rig()
        rig.install(HOME, History().grow(2))
        rig.gates[HOME].lose("fence")
        heads, unfenced = await fence_stores(rig.stores, FENCE, 1.0)
        assert HOME in unfenced
        assert rig.head(HOME).epoch == 9  # it was applied all the same
        assert (await fence_stores(rig.stores, FENCE, 1.0))[0][HOME] == rig.head(HOME)
        assert HOME not in heads

    run_virtual(story())


def test_after_the_fence_the_old_writer_commits_nothing_more() -> None:
    async def story() -> None:
        rig = Rig()
        history = History().grow(4)
        rig.install(HOME, history, seq=3)
        rig.install(NEAR, history)
        old = Fence(STREAM, 1, NEAR, "b")
        head = rig.head(HOME)
        await rig.fence()
        with pytest.raises(FenceLost):
            await copy_missing(rig.stores[NEAR], rig.stores[HOME], old, head, tail_of(history))
        assert rig.head(HOME).seq == 3

    run_virtual(story())


# ----------------------------------------------------------------------------------------------------------- bringing home


@pytest.mark.parametrize("length", [1, COPY_BATCH, COPY_BATCH + 1, 3 * COPY_BATCH + 5])
def test_an_empty_home_store_gets_the_whole_history_of_another_one(length: int) -> None:
    async def story() -> None:
        rig = Rig()
        history = History().grow(1, epoch=3).grow(length, epoch=5)
        rig.install(NEAR, history)
        forks = (EpochStart(3, 1), EpochStart(5, 2))
        heads = await rig.fence(HOME, NEAR)
        choice = replication.choose(heads, forks, home=HOME, epoch=9)
        head, tail = await bring_home(rig.stores, heads, FENCE, HOME, forks, choice)
        assert tail == tail_of(history)
        assert head == rig.head(HOME)
        source = rig.head(NEAR)
        assert (head.seq, head.chain, head.epochs) == (source.seq, source.chain, source.epochs)
        assert (head.records, head.bytes, head.received_at) == (source.records, source.bytes, source.received_at)
        for built in history.segments:
            assert rig.servers[HOME].get(built.ref) == built.data

    run_virtual(story())


def test_a_home_store_that_is_the_source_is_left_as_it_is() -> None:
    async def story() -> None:
        rig = Rig()
        history = History().grow(5)
        rig.install(HOME, history)
        rig.install(NEAR, history, seq=2)
        heads = await rig.fence()
        choice = replication.choose(heads, (EpochStart(1, 1),), home=HOME, epoch=9)
        rig.gates[HOME].calls.clear()
        head, _ = await bring_home(rig.stores, heads, FENCE, HOME, (EpochStart(1, 1),), choice)
        assert head == heads[HOME]
        assert rig.gates[HOME].calls["advance"] == rig.gates[HOME].calls["put_segment"] == 0

    run_virtual(story())


def test_a_diverged_home_store_is_cut_back_before_it_is_brought_up_and_keeps_its_tail_as_salvage() -> None:
    async def story() -> None:
        rig = Rig()
        shared = History().grow(6, epoch=1)
        theirs = shared.fork(6).grow(4, epoch=4)
        mine = shared.fork(6).grow(9, epoch=1)
        rig.install(HOME, mine)
        rig.install(NEAR, theirs)
        forks = (EpochStart(1, 1), EpochStart(4, 7))
        heads = await rig.fence(HOME, NEAR)
        choice = replication.choose(heads, forks, home=HOME, epoch=9)
        head, tail = await bring_home(rig.stores, heads, FENCE, HOME, forks, choice)
        assert tail == tail_of(theirs)
        assert (head.seq, head.chain, head.epochs) == (10, theirs.chain, forks)
        assert head.salvage == (Salvage(7, 15, (EpochStart(1, 7),), mine.chain, by_epoch=9),)
        assert (head.records, head.bytes) == (30, sum(len(built.data) for built in theirs.segments))
        assert rig.servers[HOME].get(SegmentRef(STREAM, 12, 1)) == mine.segments[11].data

    run_virtual(story())


def test_an_epoch_opens_on_its_own_regions_store_or_not_at_all() -> None:
    async def story() -> None:
        rig = Rig()
        rig.install(NEAR, History().grow(2))
        heads = await rig.fence(NEAR, FAR)
        choice = replication.choose(heads, (EpochStart(1, 1),), home=HOME, epoch=9)
        with pytest.raises(Unavailable, match=f"the store of {HOME} is not fenced"):
            await bring_home(rig.stores, heads, FENCE, HOME, (EpochStart(1, 1),), choice)

    run_virtual(story())


@pytest.mark.parametrize("seed", range(10))
def test_bringing_home_can_fail_anywhere_and_be_repeated(seed: int) -> None:
    """As ``Opening`` does it: every attempt fences anew, chooses anew and goes on from what the stores say."""

    async def story() -> None:
        rig, dice = Rig(), random.Random(seed)
        shared = History().grow(4, epoch=1)
        chosen = shared.fork(4).grow(70, epoch=2)
        rig.install(HOME, shared.fork(4).grow(3, epoch=1))
        rig.install(NEAR, chosen)
        forks = (EpochStart(1, 1), EpochStart(2, 5))
        for _ in range(200):
            for region in (HOME, NEAR):
                op = dice.choice(["advance", "put_segment", "realign", "get_segment", "fence"])
                (rig.gates[region].lose if dice.random() < 0.6 else rig.gates[region].fail)(op, dice.randint(0, 2))
            try:
                heads = await rig.fence(HOME, NEAR)
                if replication.quorum_lacks(REGIONS, heads):
                    continue
                choice = replication.choose(heads, forks, home=HOME, epoch=9)
                head, _ = await bring_home(rig.stores, heads, FENCE, HOME, forks, choice)
                if head.seq == chosen.seq:
                    break
            except (Unavailable, Conflict):
                continue
        assert (rig.head(HOME).seq, rig.head(HOME).chain) == (chosen.seq, chosen.chain)
        assert rig.head(HOME).records == 3 * chosen.seq
        assert len(rig.head(HOME).salvage) == 1

    run_virtual(story())


# ------------------------------------------------------------------------------------------------------------ cutting back


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone", "garbage"])
def test_an_unreadable_tail_does_not_stop_the_cut(damage: str) -> None:
    async def story() -> None:
        rig = Rig()
        history = History().grow(8, epoch=1)
        rig.install(FAR, history)
        ref = SegmentRef(STREAM, 7, 1)
        if damage == "flipped":
            rig.servers[FAR].corrupt(ref, bit=800)
        elif damage == "truncated":
            rig.servers[FAR].truncate(ref, 40)
        elif damage == "gone":
            rig.servers[FAR].drop(ref)
        else:
            garbage(rig.servers[FAR], ref, b"not a segment")
        heads = await rig.fence(FAR)
        head = await cut_back(rig.stores[FAR], FENCE, heads[FAR], 40, (EpochStart(1, 1), EpochStart(4, 6)))
        assert (head.seq, head.chain) == (5, history.segments[4].chain)
        assert head.salvage == (Salvage(6, 8, (EpochStart(1, 6),), history.chain, by_epoch=9),)
        assert head.records == 15 + 3  # what could not be read is not subtracted
        assert head.received_at == max(made.record.received_at for made in history.segments[4].segment.frames)

    run_virtual(story())


def test_a_store_is_cut_to_nothing_when_nothing_of_it_is_history() -> None:
    async def story() -> None:
        rig = Rig()
        rig.install(FAR, History().grow(3, epoch=2))
        heads = await rig.fence(FAR)
        head = await cut_back(rig.stores[FAR], FENCE, heads[FAR], 40, (EpochStart(4, 1),))
        assert (head.seq, head.chain, head.epochs, head.records, head.bytes) == (0, GENESIS, (), 0, 0)
        assert head.salvage[0].first_seq == 1

    run_virtual(story())


def test_a_history_that_contradicts_nothing_is_not_touched() -> None:
    async def story() -> None:
        rig = Rig()
        rig.install(FAR, History().grow(3))
        heads = await rig.fence(FAR)
        rig.gates[FAR].calls.clear()
        assert await cut_back(rig.stores[FAR], FENCE, heads[FAR], 3, (EpochStart(1, 1), EpochStart(4, 4))) == heads[FAR]
        assert not rig.gates[FAR].calls

    run_virtual(story())


def test_a_store_that_does_not_answer_while_the_tail_is_counted_is_not_cut() -> None:
    async def story() -> None:
        rig = Rig()
        rig.install(FAR, History().grow(5))
        heads = await rig.fence(FAR)
        rig.gates[FAR].fail("get_segment", times=1)
        with pytest.raises(Unavailable):
            await cut_back(rig.stores[FAR], FENCE, heads[FAR], 2, (EpochStart(1, 1),))
        assert rig.head(FAR) == heads[FAR]

    run_virtual(story())


def test_a_cut_whose_answer_was_lost_is_repeated_without_a_second_salvage() -> None:
    async def story() -> None:
        rig = Rig()
        rig.install(FAR, History().grow(5))
        forks = (EpochStart(1, 1), EpochStart(4, 3))
        heads = await rig.fence(FAR)
        rig.gates[FAR].lose("realign")
        with pytest.raises(Unavailable):
            await cut_back(rig.stores[FAR], FENCE, heads[FAR], 40, forks)
        again = await cut_back(rig.stores[FAR], FENCE, heads[FAR], 40, forks)  # with the head as it was read first
        assert again == rig.head(FAR)
        assert again.seq == 2
        assert len(again.salvage) == 1

    run_virtual(story())


# ---------------------------------------------------------------------------------------------------------------- copying


@pytest.mark.parametrize("damage", ["flipped", "truncated", "garbage", "of another place"])
def test_a_damaged_source_names_the_object_and_leaves_the_target_as_it_was(damage: str) -> None:
    async def story() -> None:
        rig = Rig()
        history = History().grow(6)
        rig.install(NEAR, history)
        ref = SegmentRef(STREAM, 4, 1)
        if damage == "flipped":
            rig.servers[NEAR].corrupt(ref, bit=900)
        elif damage == "truncated":
            rig.servers[NEAR].truncate(ref, 100)  # half written, as a server that died would leave it
        elif damage == "garbage":
            garbage(rig.servers[NEAR], ref, history.segments[3].data[:-1] + b"?")
        else:
            garbage(rig.servers[NEAR], ref, history.segments[4].data)
        heads = await rig.fence()
        before = rig.head(FAR)
        with pytest.raises(Corrupt) as caught:
            await copy_missing(rig.stores[NEAR], rig.stores[FAR], FENCE, heads[FAR], tail_of(history))
        assert ref.key in caught.value.message
        assert NEAR in caught.value.message
        assert caught.value.hint
        assert rig.head(FAR) == before
        assert rig.servers[FAR].refs(STREAM, 1, 10) == ()  # nothing of the batch was put either

    run_virtual(story())


def test_a_segment_that_is_missing_in_the_source_is_not_found_and_nothing_is_committed() -> None:
    async def story() -> None:
        rig = Rig()
        history = History().grow(6)
        rig.install(NEAR, history)
        rig.servers[NEAR].drop(SegmentRef(STREAM, 4, 1))
        heads = await rig.fence()
        with pytest.raises(NotFound, match="0000000000000004-0000000000000001"):
            await copy_missing(rig.stores[NEAR], rig.stores[FAR], FENCE, heads[FAR], tail_of(history))
        assert rig.head(FAR).seq == 0

    run_virtual(story())


def test_a_source_that_does_not_continue_the_targets_history_is_corrupt() -> None:
    """The same epochs, another history: an epoch was given out twice. Nothing is written over anything."""

    async def story() -> None:
        rig = Rig()
        history = History().grow(3)
        other = History()
        other.add([other.step("someone", "else", 1)])
        other.grow(2)
        rig.install(NEAR, history)
        rig.install(FAR, other, seq=1)
        heads = await rig.fence()
        with pytest.raises(Corrupt, match=f"does not follow segment 1 of {FAR}|does not follow segment 2 of {FAR}"):
            await copy_missing(rig.stores[NEAR], rig.stores[FAR], FENCE, heads[FAR], tail_of(history))
        assert rig.head(FAR).seq == 1

    run_virtual(story())


def test_a_home_store_with_another_history_under_the_same_epochs_is_not_opened() -> None:
    async def story() -> None:
        rig = Rig()
        history = History().grow(3)
        other = History()
        other.add([other.step("someone", "else", 1)])
        other.grow(2)
        rig.install(NEAR, history)
        rig.install(HOME, other)
        heads = await rig.fence(HOME, NEAR)
        choice = replace(replication.choose(heads, (EpochStart(1, 1),), home=HOME, epoch=9), source=NEAR)
        with pytest.raises(Corrupt, match="different histories under the same epochs at segment 3"):
            await bring_home(rig.stores, heads, FENCE, HOME, (EpochStart(1, 1),), choice)

    run_virtual(story())


def test_a_half_written_object_in_the_target_is_never_committed_over() -> None:
    async def story() -> None:
        rig = Rig()
        history = History().grow(4)
        rig.install(NEAR, history)
        half = history.segments[2].data[:50]
        rig.servers[FAR].put(history.segments[2].ref, half)
        heads = await rig.fence()
        with pytest.raises(Conflict, match="exists with other content"):
            await copy_missing(rig.stores[NEAR], rig.stores[FAR], FENCE, heads[FAR], tail_of(history))
        assert rig.head(FAR).seq == 0
        assert rig.servers[FAR].get(history.segments[2].ref) == half

    run_virtual(story())


def test_objects_that_are_there_already_are_ours_when_their_content_is_equal() -> None:
    async def story() -> None:
        rig = Rig()
        history = History().grow(4)
        rig.install(NEAR, history)
        rig.servers[FAR].put(history.segments[1].ref, history.segments[1].data)
        heads = await rig.fence()
        head = await copy_missing(rig.stores[NEAR], rig.stores[FAR], FENCE, heads[FAR], tail_of(history), limit=3)
        assert (head.seq, head.chain) == (3, history.segments[2].chain)
        head = await copy_missing(rig.stores[NEAR], rig.stores[FAR], FENCE, head, tail_of(history), limit=3)
        assert head.seq == 4
        assert await copy_missing(rig.stores[NEAR], rig.stores[FAR], FENCE, head, tail_of(history)) == head

    run_virtual(story())


@pytest.mark.parametrize("op", ["put_segment", "advance", "get_segment"])
@pytest.mark.parametrize("lost", [False, True])
def test_a_copy_that_was_interrupted_can_be_repeated(op: str, lost: bool) -> None:
    async def story() -> None:
        rig = Rig()
        history = History().grow(5)
        rig.install(NEAR, history)
        heads = await rig.fence()
        for region in (NEAR, FAR):
            (rig.gates[region].lose if lost else rig.gates[region].fail)(op)
        head = heads[FAR]
        for _ in range(4):
            try:
                head = await copy_missing(rig.stores[NEAR], rig.stores[FAR], FENCE, heads[FAR], tail_of(history))
                break
            except DrError as error:
                assert isinstance(error, Unavailable)  # noqa: PT017 - it may or may not be raised
        assert (head.seq, head.chain, head.records) == (5, history.chain, 15)
        assert rig.head(FAR) == head

    run_virtual(story())


# ---------------------------------------------------------------------------------------------------------------- reading


def test_a_segment_is_checked_against_its_name() -> None:
    async def story() -> None:
        rig = Rig()
        history = History().grow(2)
        rig.install(NEAR, history)
        segment, data = await read_segment(rig.stores[NEAR], history.segments[1].ref)
        assert (segment.header.seq, data) == (2, history.segments[1].data)
        imposter = SegmentRef(STREAM, 2, 7)
        rig.servers[NEAR].objects[imposter] = StoredObject(data, rig.servers[NEAR].objects[history.segments[1].ref].sha256)
        with pytest.raises(Corrupt, match="contains segment 2 of epoch 1"):
            await read_segment(rig.stores[NEAR], imposter)

    run_virtual(story())


def test_the_chain_at_any_place_is_told_by_the_one_segment_there() -> None:
    async def story() -> None:
        rig = Rig()
        history = History().grow(3, epoch=1).grow(3, epoch=2)
        rig.install(NEAR, history)
        starts = history.head().epochs
        assert await chain_at(rig.stores[NEAR], STREAM, starts, 0) == GENESIS
        for seq in range(1, 7):
            assert await chain_at(rig.stores[NEAR], STREAM, starts, seq) == history.segments[seq - 1].chain

    run_virtual(story())


# ---------------------------------------------------------------------------------------------------- one of several sources


def test_one_damaged_copy_does_not_stop_an_opening_when_another_store_has_a_good_one() -> None:
    async def story() -> None:
        rig = Rig()
        history = History().grow(6)
        for region in (NEAR, FAR):
            rig.install(region, history)
        rig.servers[NEAR].corrupt(SegmentRef(STREAM, 3, 1), bit=900)
        rig.servers[NEAR].corrupt(SegmentRef(STREAM, 6, 1), bit=900)
        rig.servers[FAR].corrupt(SegmentRef(STREAM, 5, 1), bit=900)
        heads = await rig.fence()
        choice = replication.choose(heads, (EpochStart(1, 1),), home=HOME, epoch=9)
        # Segment 5 is good in one, 3 and 6 in the other: together they have everything.
        head, tail = await bring_home(rig.stores, heads, FENCE, HOME, (EpochStart(1, 1),), choice)
        assert tail == tail_of(history)
        assert (head.seq, head.chain) == (6, history.chain)

    run_virtual(story())


@pytest.mark.parametrize("silent", [NEAR, FAR])
def test_one_silent_source_does_not_stop_an_opening(silent: str) -> None:
    async def story() -> None:
        rig = Rig()
        history = History().grow(40)
        for region in (NEAR, FAR):
            rig.install(region, history)
        heads = await rig.fence()
        choice = replication.choose(heads, (EpochStart(1, 1),), home=HOME, epoch=9)
        rig.gates[silent].cut = True  # after it was fenced
        head, _ = await bring_home(rig.stores, heads, FENCE, HOME, (EpochStart(1, 1),), choice)
        assert head.chain == history.chain

    run_virtual(story())


def test_a_store_whose_head_was_damaged_does_not_count_as_fenced() -> None:
    async def story() -> None:
        rig = Rig()
        rig.install(NEAR, History().grow(3))
        rig.servers[NEAR].heads[STREAM] = replace(rig.head(NEAR), epochs=())
        heads, unfenced = await fence_stores(rig.stores, FENCE, 1.0)
        assert NEAR not in heads
        assert "its head is damaged" in unfenced[NEAR]

    run_virtual(story())
