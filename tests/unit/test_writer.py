"""The holder's side of a stream, on memory stores in virtual time: what is acknowledged, when, and what never is.

Stores are far sides that outlive their clients; a gate in front of each is shut, slowed or made to lose answers. Every
acknowledgement is checked against the far sides at the moment at which it is given.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from controller.adapters.memory.gate import FaultGate
from controller.adapters.memory.region_store import MemoryRegionStore, MemoryStore
from controller.domain.lag import Backlog
from controller.domain.model import GENESIS, Ack, Commit, EpochStart, Fence, Frame, Head, SegmentRef
from controller.errors import Refused, Unavailable
from controller.lab.virtual_time import VirtualClock, run_virtual
from controller.stream import backlog as backlog_module
from controller.stream import log as log_module
from controller.stream.batcher import RECORD_BYTES, weight
from controller.stream.history import Tail
from controller.stream.limits import MAX_CHAIN
from controller.stream.pump import RETRY_SECONDS
from controller.stream.segment import SegmentHeader, decode_segment, encode_segment, frame, next_chain
from controller.stream.view import View
from controller.stream.writer import StreamWriter, WriterLimits
from tests.support.segments import GROUP, History

STREAM = "0"
HOME, NEAR, FAR = "eu-west-1", "eu-central-1", "us-east-1"
REGIONS = (HOME, NEAR, FAR)
LIMITS = WriterLimits(flush_seconds=0.02, ack_timeout_seconds=3.0, queue_max_bytes=2**20, segment_max_bytes=2**16)
FROZEN = 10.0**6


class Rig:
    """Stores with gates, and one writer on them. Create it inside a running loop."""

    def __init__(
        self, *, regions: Sequence[str] = REGIONS, limits: WriterLimits = LIMITS, kind: type[StreamWriter] = StreamWriter
    ) -> None:
        self.clock = VirtualClock()
        self.limits = limits
        self.kind = kind
        self.servers = {region: MemoryStore(region) for region in regions}
        self.gates = {region: FaultGate(self.clock.sleep) for region in regions}
        self.stores = {region: MemoryRegionStore(self.servers[region], self.gates[region]) for region in regions}
        self.view = View(None)
        self.right_ends = float("inf")
        self.lost: list[str] = []
        self.asked: dict[tuple[str, str], int] = {}
        self.acks: list[tuple[float, Ack]] = []
        self.writer: StreamWriter

    async def open(self, epoch: int = 1, history: History | None = None, start: bool = True) -> StreamWriter:
        """A writer for ``epoch`` that goes on after ``history``, which the home store and the view have."""
        fence = Fence(STREAM, epoch, HOME, "a")
        if history is not None:
            self.install(history, HOME)
            history.apply_to(self.view)
        head = await self.stores[HOME].fence(fence)
        self.writer = self.kind(
            group=GROUP,
            fence=fence,
            stores=self.stores,
            home=HOME,
            home_head=head,
            tail=Tail(head.seq, head.chain, head.epochs),
            view=self.view,
            clock=self.clock,
            may_act=lambda: self.clock.monotonic() < self.right_ends,
            on_lost=self.lost.append,
            limits=self.limits,
        )
        if start:
            self.writer.start()
            await self.wait(0.01)
        return self.writer

    def install(self, history: History, region: str, seq: int | None = None) -> None:
        """The store holds the first ``seq`` segments of the history, with the counters that a writer would have left."""
        history.install(self.servers[region], seq=seq)
        built = history.segments[:seq]
        self.servers[region].heads[STREAM] = replace(
            self.servers[region].heads[STREAM],
            records=sum(len(one.segment.frames) for one in built),
            bytes=sum(len(one.data) for one in built),
            received_at=max(made.record.received_at for made in built[-1].segment.frames),
        )

    async def wait(self, seconds: float) -> None:
        await self.clock.sleep(seconds)

    async def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await self.clock.sleep(0.05)

    async def put(self, *frames: Frame) -> list[Ack]:
        """Submits, and checks every promise against the far sides at the moment at which it is made."""
        acks = await self.writer.submit(frames)
        for made, ack in zip(frames, acks, strict=True):
            if ack.status == "failed":
                assert ack.error is not None
                continue
            have = [r for r, server in self.servers.items() if server.head(STREAM).seq >= ack.seq]
            assert len(have) >= max(made.record.copies, ack.copies), f"{ack} is in {have}"
            assert made.record.copies > 1 or HOME in have or len(have) > 1 or set(have) & set(self.writer.sole_ackers)
            self.acks.append((self.clock.monotonic(), ack))
        return acks

    async def one(self, record_id: str, *, copies: int = 1, agent: str = "x", body: bytes = b"state") -> Ack:
        (ack,) = await self.put(frame(agent, record_id, "checkpoint", body, copies=copies))
        return ack

    def seqs(self) -> dict[str, int]:
        return {region: server.head(STREAM).seq for region, server in self.servers.items()}

    async def everywhere(self, *regions: str) -> None:
        """Waits until these stores (all by default) have everything that was closed, and compares what they have."""
        names = regions or tuple(self.servers)
        await self.until(lambda: all(self.servers[region].head(STREAM).seq == self.writer.seq for region in names))
        chains = {self.servers[region].head(STREAM).chain for region in names}
        assert len(chains) == 1
        for region in names:
            check_store(self.servers[region])

    def freeze(self, *regions: str) -> None:
        for region in regions:
            self.gates[region].delay_seconds = FROZEN

    def thaw(self, *regions: str) -> None:
        for region in regions:
            self.gates[region].delay_seconds = 0.0


def check_store(server: MemoryStore) -> None:
    """What a head says is what its objects are: gap-free, chained, owned and counted as it says."""
    head = server.head(STREAM)
    chain, records, size = GENESIS, 0, 0
    for seq in range(1, head.seq + 1):
        data = server.get(SegmentRef(STREAM, seq, head.owner(seq)))
        segment = decode_segment(data)
        assert segment.header.prev_chain == chain
        chain = next_chain(chain, data)
        records += len(segment.frames)
        size += len(data)
    assert (head.chain, head.records, head.bytes) == (chain, records, size)


def story(steps: Callable[[Rig], Awaitable[None]], *, limit_seconds: float = 3600.0, **options: Any) -> None:
    """Runs a story in virtual time."""

    async def told() -> None:
        rig = Rig(**options)
        try:
            await steps(rig)
        finally:
            if hasattr(rig, "writer"):
                await rig.writer.stop("the story is over")

    run_virtual(told(), limit_seconds=limit_seconds)


# ------------------------------------------------------------------------------------------------------- acknowledgement


@pytest.mark.parametrize(("copies", "seconds"), [(1, 0.4), (2, 1.2), (3, 3.6)])
def test_a_write_is_acknowledged_as_soon_as_its_copies_are_committed_and_not_before(copies: int, seconds: float) -> None:
    """A put and an advance, each there and back, at 0.1, 0.3 and 0.9 s each way."""

    async def steps(rig: Rig) -> None:
        await rig.open()
        for region, delay in zip(REGIONS, (0.1, 0.3, 0.9), strict=True):
            rig.gates[region].delay_seconds = delay
        started = rig.clock.monotonic()
        ack = await rig.one("r1", copies=copies)
        assert (ack.status, ack.seq, ack.copies) == ("acknowledged", 1, copies)
        assert rig.clock.monotonic() - started == pytest.approx(seconds, abs=0.05)

    story(steps, limits=replace(LIMITS, ack_timeout_seconds=30.0))


def test_a_store_that_is_frozen_delays_nobody() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        for region in (HOME, NEAR):
            rig.gates[region].delay_seconds = 0.01
        quick: list[float] = []
        for far in ("well", "frozen"):
            if far == "frozen":
                rig.freeze(FAR)
            for number in range(20):
                started = rig.clock.monotonic()
                ack = await rig.one(f"{far}{number}", copies=2)
                assert ack.status == "acknowledged"
                quick.append(rig.clock.monotonic() - started)
        assert max(quick[20:]) <= max(quick[:20]) + 0.001

    story(steps)


def test_copies_that_cannot_be_reached_fail_with_an_unknown_outcome_and_are_not_downgraded() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        rig.gates[FAR].cut = True
        ack = await rig.one("r1", copies=3)
        assert ack.status == "failed"
        assert ack.error is not None
        assert ack.error["code"] == "outcome_unknown"
        assert "not committed in 3 region stores within 3 s" in str(ack.error["message"])
        assert rig.seqs() == {HOME: 1, NEAR: 1, FAR: 0}
        again = await rig.one("r1", copies=3)  # still not
        assert again.status == "failed"
        fewer = await rig.one("r1", copies=2)  # a promise that can be kept
        assert (fewer.status, fewer.copies) == ("duplicate", 2)
        rig.gates[FAR].cut = False
        await rig.everywhere()
        later = await rig.one("r1", copies=3)
        assert (later.status, later.seq, later.copies) == ("duplicate", 1, 3)
        assert rig.writer.seq == 1  # nothing was written twice

    story(steps)


def test_more_copies_than_there_are_stores_are_refused() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        ack = await rig.one("r1", copies=4)
        assert ack.error is not None
        assert (ack.status, ack.error["code"]) == ("failed", "refused")
        assert rig.writer.seq == 0

    story(steps)


def test_records_of_one_batch_fail_alone() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        torn = replace(frame("x", "torn", "checkpoint", b"a" * 100), payload=b"b" * 100)
        good, bad, fine = await rig.put(
            frame("x", "r1", "checkpoint", b"1"), torn, frame("y", "r1", "checkpoint", b"2", copies=3)
        )
        assert (good.status, fine.status) == ("acknowledged", "acknowledged")
        assert bad.error is not None
        assert (bad.status, bad.error["code"]) == ("failed", "corrupt")
        assert rig.view.has("x", "torn") is None

    story(steps)


def test_a_retry_is_idempotent_and_another_body_under_the_same_id_is_refused() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        first = await rig.one("r1", copies=2)
        again = await rig.one("r1", copies=2)
        assert (again.status, again.seq) == ("duplicate", first.seq)
        other = await rig.one("r1", body=b"another")
        assert other.error is not None
        assert (other.status, other.error["code"]) == ("failed", "conflict")
        assert rig.writer.seq == 1
        await rig.one("r2")
        assert rig.view.read("x", "r1") is not None

    story(steps)


def test_a_retry_while_the_first_attempt_is_in_flight_joins_it() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        for gate in rig.gates.values():
            gate.delay_seconds = 0.5
        first = asyncio.create_task(rig.one("r1"))
        await rig.wait(0.1)
        twins = [asyncio.create_task(rig.one("r1", copies=copies)) for copies in (1, 2)]
        wrong = await rig.one("r1", body=b"another")
        assert wrong.error is not None
        assert wrong.error["code"] == "conflict"
        acks = [await first, *[await twin for twin in twins]]
        assert [ack.status for ack in acks] == ["acknowledged", "duplicate", "duplicate"]
        assert {ack.seq for ack in acks} == {1}
        assert rig.writer.seq == 1

    story(steps)


def test_the_same_record_twice_in_one_batch_is_written_once() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        twice = frame("x", "r1", "checkpoint", b"1")
        acks = await rig.put(twice, twice, frame("x", "r1", "checkpoint", b"2"))
        assert [ack.status for ack in acks] == ["acknowledged", "duplicate", "failed"]
        assert rig.servers[HOME].head(STREAM).records == 1

    story(steps)


def test_a_caller_that_goes_away_does_not_take_its_record_with_it() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        rig.gates[HOME].delay_seconds = 0.5
        impatient = asyncio.create_task(rig.one("r1"))
        await rig.wait(0.1)
        impatient.cancel()
        await asyncio.gather(impatient, return_exceptions=True)
        ack = await rig.one("r1")
        assert (ack.status, ack.seq) == ("duplicate", 1)

    story(steps)


# --------------------------------------------------------------------------------------------------------- right to act


class ForgetsItsRight(StreamWriter):
    """The mutant: it asks before it takes a record, and never again."""

    def __init__(self, *, may_act: Callable[[], bool], **arguments: Any) -> None:
        super().__init__(may_act=lambda: True, **arguments)
        self._asked_first = may_act

    def _check_open(self, size: int) -> None:
        if not self._asked_first():
            raise Unavailable("not accepting records")
        super()._check_open(size)


def acknowledged_too_late(kind: type[StreamWriter], woken_by: str) -> list[Ack]:
    """Acknowledgements after the right ran out. The commits themselves are in time, what wakes the writer is not."""
    late: list[Ack] = []

    async def steps(rig: Rig) -> None:
        await rig.open()
        if woken_by == "a commit":
            rig.freeze(NEAR, FAR)
            rig.gates[HOME].delay_seconds = 0.4  # put 0.8 s, advance arrives at 1.2 s, its answer at 1.6 s
            rig.right_ends = rig.clock.monotonic() + 1.4
            late.append(await rig.one("r1"))
            assert rig.servers[HOME].head(STREAM).seq == 1  # it did commit
        elif woken_by == "a repetition":
            await rig.one("r1")
            find = rig.view.find

            def find_and_pause(agent: str, record_id: str) -> tuple[str, int] | None:
                rig.right_ends = rig.clock.monotonic()  # the process was stopped while it looked the record up
                return find(agent, record_id)

            rig.view.find = find_and_pause  # type: ignore[method-assign]
            late.append(await rig.one("r1"))
        elif woken_by == "a pause":
            settle = rig.writer._settle

            def settle_and_pause(seq: int) -> None:
                settle(seq)
                rig.right_ends = rig.clock.monotonic()  # the process was stopped here and goes on much later

            rig.writer._settle = settle_and_pause  # type: ignore[method-assign]
            late.append(await rig.one("r1"))
        else:
            rig.gates[HOME].cut = True
            rig.gates[FAR].cut = True
            waits = asyncio.create_task(rig.one("r1"))
            await rig.until(lambda: rig.seqs()[NEAR] == 1)
            rig.right_ends = rig.clock.monotonic()  # ran out while the stand-in was recorded in etcd
            rig.writer.sole_ackers = (HOME, NEAR)
            rig.writer.wait_settled()
            late.append(await waits)
        if kind is StreamWriter and woken_by != "a pause":
            assert rig.lost == ["the right to act ran out between commit and acknowledgement"]

    story(steps, kind=kind)
    return [ack for ack in late if ack.status != "failed"]


WAKERS = ["a commit", "a repetition", "a change of the sole ackers", "a pause"]


@pytest.mark.parametrize("woken_by", WAKERS)
def test_nothing_is_acknowledged_once_the_right_to_act_has_run_out(woken_by: str) -> None:
    assert acknowledged_too_late(StreamWriter, woken_by) == []


@pytest.mark.parametrize("woken_by", WAKERS)
def test_a_writer_that_does_not_ask_again_after_the_commit_is_caught(woken_by: str) -> None:
    assert len(acknowledged_too_late(ForgetsItsRight, woken_by)) == 1


def test_nothing_is_taken_without_a_right() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        rig.right_ends = rig.clock.monotonic()
        with pytest.raises(Unavailable, match="the right to act has run out"):
            await rig.one("r1")
        assert rig.writer.seq == 0

    story(steps)


@pytest.mark.parametrize("region", REGIONS)
def test_a_greater_epoch_in_any_store_ends_the_writer(region: str) -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        await rig.one("r1", copies=3)
        rig.freeze(*(other for other in REGIONS if other != region))
        await MemoryRegionStore(rig.servers[region], FaultGate(rig.clock.sleep)).fence(Fence(STREAM, 2, NEAR, "b"))
        ack = await rig.one("r2", copies=2)
        assert ack.error is not None
        assert (ack.status, ack.error["code"]) == ("failed", "outcome_unknown")
        assert len(rig.lost) == 1
        assert f"store {region}" in rig.lost[0]
        assert "epoch 2" in rig.lost[0]
        with pytest.raises(Unavailable, match="not accepting records"):
            await rig.one("r3")
        rig.thaw(*REGIONS)
        await rig.wait(30.0)
        assert rig.servers[region].head(STREAM).seq == 1

    story(steps, limits=replace(LIMITS, ack_timeout_seconds=60.0))


@pytest.mark.parametrize("regions", [(HOME, NEAR), REGIONS])
def test_a_writer_has_not_drained_while_only_the_home_store_has_everything(regions: tuple[str, ...]) -> None:
    async def steps(rig: Rig) -> None:
        await rig.open(start=False)
        rig.freeze(*(region for region in regions if region != HOME))
        rig.writer.start()
        await rig.one("r1")
        rig.writer.freeze("a planned move")
        await rig.wait(1.0)
        assert rig.seqs()[HOME] == 1
        assert not rig.writer.drained(), "another quorum may be fenced, and it has nothing"
        rig.thaw(*regions)
        await rig.everywhere()
        await rig.until(rig.writer.drained)

    story(steps, regions=regions)


def test_stopping_fails_what_waits_with_an_unknown_outcome_and_acknowledges_nothing_afterwards() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        for gate in rig.gates.values():
            gate.delay_seconds = 0.5
        sent = [asyncio.create_task(rig.one(f"r{n}")) for n in range(3)]
        await rig.wait(0.01)
        late = asyncio.create_task(rig.one("queued"))
        await rig.wait(0)
        await rig.writer.stop("stepping down")
        for ack in [*[await one for one in sent], await late]:
            assert ack.error is not None
            assert (ack.status, ack.error["code"]) == ("failed", "outcome_unknown")
            assert "stepping down" in str(ack.error["message"])
        assert rig.lost == []  # we stopped it: nobody has to be told

    story(steps)


# --------------------------------------------------------------------------------------------------------- back-pressure


@pytest.mark.parametrize("shape", ["payload", "meta"])
def test_a_full_queue_refuses_and_drops_nothing_that_it_took(shape: str) -> None:
    """Records without a payload and with a large ``meta`` weigh too."""

    def heavy(number: int) -> Frame:
        if shape == "payload":
            return frame("x", f"r{number}", "checkpoint", random.Random(number).randbytes(20_000))
        return frame("x", f"r{number}", "checkpoint", b"", meta={f"k{n}": "v" * 1_000 for n in range(20)})

    async def steps(rig: Rig) -> None:
        await rig.open()
        for gate in rig.gates.values():
            gate.cut = True
        taken: list[asyncio.Task[list[Ack]]] = []
        for number in range(400):
            asked = asyncio.create_task(rig.put(heavy(number)))
            await rig.wait(0.03)
            if asked.done():
                with pytest.raises(Unavailable, match="bytes wait to be written and the bound is 524288"):
                    await asked
                break
            taken.append(asked)
        assert 20 <= len(taken) < 60
        for asked in taken:
            (ack,) = await asked
            assert ack.status == "failed"  # its time ran out: outcome unknown
        for gate in rig.gates.values():
            gate.cut = False
        await rig.everywhere()
        for number in range(len(taken)):
            (ack,) = await rig.put(replace(heavy(number), record=replace(heavy(number).record, copies=3)))
            assert ack.status == "duplicate"

    story(steps, limits=replace(LIMITS, queue_max_bytes=2**18))


def test_a_batch_that_does_not_fit_is_refused_as_a_whole() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        frames = [frame("x", f"r{n}", "checkpoint", random.Random(n).randbytes(30_000)) for n in range(50)]
        with pytest.raises(Refused, match="may wait at most"):  # it never will fit: "slow down" would be no answer
            await rig.put(*frames)
        assert rig.writer.seq == 0
        assert (await rig.one("r0", body=b"still free")).status == "acknowledged"

    story(steps)


@pytest.mark.parametrize("agents", ["agent", "агент", "代理"])
def test_the_weight_of_a_record_is_never_below_what_it_takes_in_a_segment(agents: str) -> None:
    made = [
        frame(f"{agents}-{n}" * 8, f"{agents}{n}" * 20, "checkpoint", b"\x00" * n, parent=agents * 9, meta=meta)
        for n, meta in enumerate(
            [{}, {agents: agents * 900}, {f"{agents}{n}": "" for n in range(64)}, {"a": "\U0001f600" * 99}]
        )
    ]
    for frames in ([one] for one in made):
        with_it = len(encode_segment(SegmentHeader(GROUP, STREAM, 1, 1, GENESIS, 0.0), frames))
        without = len(encode_segment(SegmentHeader(GROUP, STREAM, 1, 1, GENESIS, 0.0), []))
        assert with_it - without <= weight(frames[0]) <= 5 * (with_it - without) + RECORD_BYTES


def test_segments_close_on_size_and_on_number_and_keep_the_order() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        small = [frame("x", f"s{n:02}", "checkpoint", b"") for n in range(25)]
        large = [frame("x", f"t{n:02}", "checkpoint", random.Random(n).randbytes(30_000)) for n in range(8)]
        acks = await rig.put(*small, *large)
        assert [ack.status for ack in acks] == ["acknowledged"] * 33
        assert [ack.seq for ack in acks] == sorted(ack.seq for ack in acks)
        await rig.everywhere()
        sizes = []
        for seq in range(1, rig.writer.seq + 1):
            data = rig.servers[FAR].get(SegmentRef(STREAM, seq, 1))
            sizes.append((len(decode_segment(data).frames), len(data)))
        assert all(count <= 10 and size < 2**16 + 4_096 for count, size in sizes)
        assert sum(count for count, _ in sizes) == 33

    story(steps, limits=replace(LIMITS, segment_max_records=10))


def test_an_idle_stream_writes_at_once_and_a_busy_one_once_per_flush_interval() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        await rig.wait(1.0)
        started = rig.clock.monotonic()
        await rig.one("first")
        assert rig.clock.monotonic() - started < 0.001
        waiting = []
        for number in range(100):
            waiting.append(asyncio.create_task(rig.one(f"r{number}")))
            await rig.wait(0.005)
        await asyncio.gather(*waiting)
        assert rig.writer.seq == pytest.approx(1 + 0.5 / 0.02, abs=3)

    story(steps)


# ---------------------------------------------------------------------------------------------------------- lost answers


@pytest.mark.parametrize("seed", range(12))
def test_answers_that_are_lost_break_nothing(seed: int) -> None:
    """Calls fail and answers get lost at random while records are written; in the end every store has one history."""

    async def steps(rig: Rig) -> None:
        dice = random.Random(seed)
        await rig.open()
        waiting: list[asyncio.Task[Ack]] = []
        for number in range(60):
            region = dice.choice(REGIONS)
            op = dice.choice(["advance", "advance", "put_segment", "fence", "*"])
            (rig.gates[region].lose if dice.random() < 0.7 else rig.gates[region].fail)(op, dice.randint(1, 2))
            if dice.random() < 0.1:
                rig.gates[region].delay_seconds = dice.choice([0.0, 0.3, 3.0])  # 3 s: past the client's own deadline
            waiting.append(asyncio.create_task(rig.one(f"r{number}", copies=dice.randint(1, 3), agent=f"a{number % 3}")))
            await rig.wait(dice.choice([0.0, 0.01, 0.3]))
        for gate in rig.gates.values():
            gate.delay_seconds = 0.0
        acks = [await one for one in waiting]
        assert rig.lost == []
        await rig.everywhere()
        for number, ack in enumerate(acks):
            again = await rig.one(f"r{number}", copies=3, agent=f"a{number % 3}")
            assert again.status == "duplicate"
            assert ack.status == "failed" or ack.seq == again.seq
        assert rig.view.count(STREAM) == 60

    story(steps, limits=replace(LIMITS, ack_timeout_seconds=30.0))


@pytest.mark.parametrize("op", ["advance", "put_segment"])
@pytest.mark.parametrize("region", [HOME, FAR])
def test_one_lost_answer_costs_one_reattachment(op: str, region: str) -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        rig.gates[region].lose(op)
        started = rig.clock.monotonic()
        ack = await rig.one("r1", copies=3)
        assert (ack.status, ack.seq) == ("acknowledged", 1)
        assert rig.clock.monotonic() - started == pytest.approx(RETRY_SECONDS, abs=0.1)
        assert rig.writer.seq == 1

    story(steps)


# -------------------------------------------------------------------------------------------------------- other regions


def test_a_store_that_was_away_catches_up_from_the_home_store() -> None:
    """What it lacks is no longer in memory: the log sheds what the home store has."""

    async def steps(rig: Rig) -> None:
        await rig.open()
        rig.gates[FAR].cut = True
        for number in range(120):
            assert (await rig.one(f"r{number}", copies=2, body=random.Random(number).randbytes(5_000))).status == "acknowledged"
        assert rig.writer.log.bytes <= rig.limits.queue_max_bytes + 6_000
        rig.gates[FAR].cut = False
        rig.gates[HOME].calls.clear()
        await rig.everywhere()
        assert rig.gates[HOME].calls["get_segment"] > 50
        assert rig.writer.log.bytes == 0

    story(steps, limits=replace(LIMITS, queue_max_bytes=2**17))


def test_a_store_that_is_behind_from_earlier_epochs_is_brought_along() -> None:
    async def steps(rig: Rig) -> None:
        history = History().grow(5, epoch=1).grow(60, epoch=2)
        rig.install(history, NEAR, seq=7)
        await rig.open(epoch=3, history=history)
        await rig.everywhere()
        assert rig.seqs() == dict.fromkeys(REGIONS, 65)
        assert (await rig.one("r1", copies=3)).seq == 66
        assert rig.servers[FAR].head(STREAM).epochs == (EpochStart(1, 1), EpochStart(2, 6), EpochStart(3, 66))

    story(steps)


def test_a_store_whose_tail_is_no_history_any_more_is_cut_back_and_its_tail_becomes_salvage() -> None:
    async def steps(rig: Rig) -> None:
        history = History().grow(10, epoch=1)
        stale = history.fork(8).grow(5, epoch=1)  # the old holder went on here alone
        rig.install(stale, FAR)
        await rig.open(epoch=2, history=history.fork(8))
        await rig.one("r1", copies=3)
        await rig.everywhere()
        head = rig.servers[FAR].head(STREAM)
        assert head.epochs == (EpochStart(1, 1), EpochStart(2, 9))
        (salvage,) = head.salvage
        assert (salvage.first_seq, salvage.last_seq, salvage.epochs) == (9, 13, (EpochStart(1, 9),))
        assert (salvage.last_chain, salvage.by_epoch) == (stale.chain, 2)
        assert rig.servers[FAR].get(SegmentRef(STREAM, 13, 1)) == stale.segments[12].data  # cut off, not deleted

    story(steps)


def test_a_store_with_another_history_under_the_same_epoch_never_counts_as_a_copy() -> None:
    """It cannot be, unless an epoch was given out twice. It is told and left alone, and the others go on."""

    async def steps(rig: Rig) -> None:
        history = History().grow(6, epoch=1)
        other = history.fork(4)
        other.add([other.step("agent-9", f"other{n}", n) for n in range(3)])
        rig.install(other.grow(1), FAR)
        before = rig.servers[FAR].head(STREAM)
        await rig.open(epoch=2, history=history)
        await rig.everywhere(HOME, NEAR)
        body = history.bodies["agent-0", "e1s6"]
        assert (await rig.one("e1s6", copies=2, agent="agent-0", body=body)).status == "duplicate"
        assert (await rig.one("e1s6", copies=3, agent="agent-0", body=body)).status == "failed"
        assert (await rig.one("r1", copies=2)).status == "acknowledged"
        assert "another history than ours at segment 6" in rig.writer.pumps[FAR].why
        assert rig.writer.committed_in(6) == (HOME, NEAR)
        assert (await rig.one("r1", copies=3)).status == "failed"
        after = rig.servers[FAR].head(STREAM)
        assert (after.seq, after.chain) == (before.seq, before.chain)

    story(steps)


def test_a_commit_that_arrives_long_after_it_was_given_up_does_no_harm() -> None:
    """The network holds a request back; meanwhile the store is attached anew and everything goes on."""

    async def steps(rig: Rig) -> None:
        await rig.open()
        rig.freeze(NEAR)
        slow = asyncio.create_task(rig.one("r1", copies=3))
        await rig.wait(0.5)  # its put is on the way and will arrive in 11 days
        rig.thaw(NEAR)
        assert (await slow).status == "acknowledged"
        for number in range(5):
            await rig.one(f"s{number}", copies=3)
        await rig.wait(2 * FROZEN)
        await rig.everywhere()
        assert (await rig.one("t", copies=3)).status == "acknowledged"

    story(steps, limits=replace(LIMITS, ack_timeout_seconds=30.0), limit_seconds=10 * FROZEN)


def test_the_memory_stays_bounded_while_a_region_is_dead_for_ten_thousand_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "LOG_SEGMENTS", 512)
    monkeypatch.setattr(backlog_module, "BACKLOG_MARKS", 512)

    async def steps(rig: Rig) -> None:
        writer = await rig.open()
        rig.gates[FAR].cut = True
        first_at = 0.0
        for number in range(40):
            frames = [frame("x", f"{number}-{n}", "note", b"") for n in range(250)]
            acks = await rig.put(*frames)
            first_at = first_at or writer.now()
            assert {ack.status for ack in acks} == {"acknowledged"}
            assert len(writer.log) <= 512 + 250
            assert len(writer._marks) <= 1024 + 1
            assert not writer._waiting
            assert not len(writer._admission)
        assert writer.seq == 10_000
        lag = writer.backlog(FAR)
        assert lag is not None
        assert (lag.segments, lag.records, lag.oldest_received_at) == (10_000, 10_000, pytest.approx(first_at, abs=0.1))

    story(steps, regions=(HOME, FAR), limits=replace(LIMITS, segment_max_records=1, pipeline_depth=64))


def test_a_pump_that_fails_in_a_way_that_nobody_foresaw_ends_the_writer() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()

        async def broken(fence: Fence, commit: Commit) -> Head:
            raise KeyError("bug")

        rig.stores[NEAR].advance = broken  # type: ignore[method-assign]
        await rig.one("r1")
        await rig.wait(0.1)
        assert rig.lost == [f"pump-{NEAR} failed: KeyError('bug')"]

    story(steps)


def test_a_view_that_cannot_be_written_ends_the_writer_and_acknowledges_nothing() -> None:
    """Whoever cannot index what it acknowledges could not answer for it."""

    async def steps(rig: Rig) -> None:
        await rig.open()
        await rig.one("r1")

        def full(*_: Any) -> None:
            raise Unavailable("database or disk is full")

        rig.view.apply = full  # type: ignore[method-assign, assignment]
        ack = await rig.one("r2")
        assert ack.error is not None
        assert (ack.status, ack.error["code"]) == ("failed", "outcome_unknown")
        assert rig.lost == ["the view cannot be written: database or disk is full"]

    story(steps)


# ---------------------------------------------------------------------------------------------------------------- deltas


def a_state(number: int) -> bytes:
    return random.Random("seed").randbytes(2_000) + b"".join(b"step %d. " % n for n in range(number + 1))


def a_delta(number: int, base: int | None, *, agent: str = "x") -> Frame:
    previous = None if base is None else (f"r{base}", a_state(base))
    made = frame(agent, f"r{number}", "checkpoint", a_state(number), previous=previous)
    assert (made.base is None) is (base is None)
    return made


def test_deltas_stand_on_what_is_in_flight_or_in_the_view() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        assert [ack.status for ack in await rig.put(a_delta(0, None), a_delta(1, 0))] == ["acknowledged"] * 2
        assert [ack.status for ack in await rig.put(a_delta(2, 1))] == ["acknowledged"]
        rig.gates[HOME].delay_seconds = 0.3
        flying = asyncio.create_task(rig.put(a_delta(3, 2)))
        await rig.wait(0.1)
        assert [ack.status for ack in await rig.put(a_delta(4, 3))] == ["acknowledged"]
        await flying
        found = rig.view.latest("x")
        assert found is not None
        assert found[1] == a_state(4)

    story(steps)


def test_a_delta_on_an_unknown_base_is_sent_back_for_the_whole_body() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        (ack,) = await rig.put(a_delta(1, 0))
        assert ack.error is not None
        assert (ack.status, ack.error["code"], ack.error["hint"]) == ("failed", "unknown_base", "send the whole body")
        await rig.put(a_delta(0, None))
        (of_another_agent,) = await rig.put(a_delta(1, 0, agent="y"))
        assert of_another_agent.error is not None
        assert of_another_agent.error["code"] == "unknown_base"
        (ack,) = await rig.put(a_delta(1, None))
        assert ack.status == "acknowledged"

    story(steps)


def test_a_delta_that_does_not_open_is_corrupt_and_not_written() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        await rig.put(a_delta(0, None))
        await rig.put(a_delta(5, None))
        (ack,) = await rig.put(replace(a_delta(6, 5), base="r0"))
        assert ack.error is not None
        assert ack.error["code"] == "corrupt"
        assert rig.view.has("x", "r6") is None

    story(steps)


@pytest.mark.parametrize("batch", [1, 7, 200])
def test_a_chain_of_deltas_is_bounded(batch: int) -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        frames = [a_delta(0, None), *(a_delta(n, n - 1) for n in range(1, MAX_CHAIN + 2))]
        acks = [ack for at in range(0, len(frames), batch) for ack in await rig.put(*frames[at : at + batch])]
        assert [ack.status for ack in acks[:-1]] == ["acknowledged"] * (MAX_CHAIN + 1)
        assert acks[-1].error is not None
        assert acks[-1].error["code"] == "unknown_base"
        assert f"{MAX_CHAIN} are allowed" in str(acks[-1].error["message"])
        await rig.put(a_delta(MAX_CHAIN + 1, None))
        assert (await rig.put(a_delta(MAX_CHAIN + 2, MAX_CHAIN + 1)))[0].status == "acknowledged"

    story(steps)


def test_a_delta_survives_its_base_growing_cold_while_it_is_in_flight() -> None:
    """The view keeps the two newest bodies warm; five newer ones overtake the base before the delta is committed."""

    async def steps(rig: Rig) -> None:
        await rig.open()
        await rig.put(a_delta(0, None))
        rig.gates[HOME].delay_seconds = 0.2
        whole = [a_delta(n, None) for n in range(1, 6)]
        acks = await rig.put(*whole, replace(a_delta(6, 0)))
        assert [ack.status for ack in acks] == ["acknowledged"] * 6
        found = rig.view.latest("x")
        assert found is not None
        assert found[1] == a_state(6)

    story(steps, limits=replace(LIMITS, segment_max_records=1, pipeline_depth=1))


# -------------------------------------------------------------------------------------------------------------- draining


def test_a_frozen_writer_takes_nothing_finishes_what_it_has_and_can_go_on() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        for gate in rig.gates.values():
            gate.delay_seconds = 0.2
        flying = asyncio.create_task(rig.one("r1", copies=3))
        await rig.wait(0.05)
        rig.writer.freeze("plan p1 drains")
        with pytest.raises(Unavailable, match="plan p1 drains"):
            await rig.one("r2")
        assert not rig.writer.drained()
        assert (await flying).status == "acknowledged"
        assert rig.writer.drained()
        rig.writer.unfreeze()
        assert (await rig.one("r2")).status == "acknowledged"

    story(steps)


@pytest.mark.parametrize(
    ("away", "drains"), [((), True), ((FAR,), True), ((HOME,), True), ((NEAR, FAR), False), ((HOME, NEAR, FAR), False)]
)
def test_a_drain_is_complete_with_a_fence_quorum_and_everybody_who_answers(away: tuple[str, ...], drains: bool) -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        for region in away:
            rig.gates[region].cut = True
        await rig.one("r1", copies=2)
        rig.writer.freeze("plan p1 drains")
        await rig.wait(5.0)
        assert rig.writer.drained() is drains
        for region in away:
            rig.gates[region].cut = False
        await rig.everywhere()
        await rig.wait(1.0)
        assert rig.writer.drained()

    story(steps)


def test_what_still_waits_for_its_segment_holds_up_the_drain() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        await rig.one("r1", copies=3)
        waiting = asyncio.create_task(rig.one("r2", copies=3))
        await rig.wait(0.001)
        rig.writer.freeze("plan p1 drains")
        assert rig.writer.seq == 1  # the flush interval has not passed, and every store has segment 1
        assert not rig.writer.drained()
        assert (await waiting).status == "acknowledged"
        assert rig.writer.drained()

    story(steps)


def test_a_store_that_answers_and_is_behind_holds_up_the_drain() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        rig.gates[FAR].delay_seconds = 0.9
        await rig.one("r1", copies=2)
        rig.writer.freeze("plan p1 drains")
        await rig.wait(1.0)
        assert not rig.writer.drained()
        await rig.wait(3.0)
        assert rig.writer.drained()

    story(steps)


# ------------------------------------------------------------------------------------------------------------------- lag


def test_backlogs_count_what_was_acknowledged_and_is_missing_there() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        rig.gates[FAR].cut = True
        stamps = []
        for number in range(12):
            await rig.put(*(frame("x", f"r{number}-{n}", "checkpoint", b"b" * 10) for n in range(number % 3 + 1)))
            stamps.append(rig.writer.now())
            await rig.wait(1.0)
        await rig.until(lambda: rig.seqs()[NEAR] == 12)
        head = rig.servers[HOME].head(STREAM)
        assert rig.writer.backlog(NEAR) == Backlog(NEAR, 12, 0, 0, 0, None)
        assert rig.writer.backlog(FAR) == Backlog(FAR, 0, 12, head.records, head.bytes, pytest.approx(stamps[0]))
        assert rig.writer.age_beyond(0) == pytest.approx(rig.writer.now() - stamps[0])
        assert rig.writer.age_beyond(7) == pytest.approx(rig.writer.now() - stamps[7])
        assert rig.writer.age_beyond(12) == 0.0
        acknowledged = rig.writer.acknowledged
        assert (acknowledged.seq, acknowledged.records, acknowledged.bytes) == (12, head.records, head.bytes)

    story(steps)


def test_the_age_of_the_oldest_record_that_waits_is_known() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        assert rig.writer.oldest_waiting_seconds() == 0.0
        rig.gates[FAR].cut = True
        await rig.one("fine", copies=2)
        assert rig.writer.oldest_waiting_seconds() == 0.0
        waiting = [asyncio.create_task(rig.one("first", copies=3))]
        await rig.wait(1.0)
        waiting.append(asyncio.create_task(rig.one("second", copies=3)))
        await rig.wait(1.0)
        assert rig.writer.oldest_waiting_seconds() == pytest.approx(2.0, abs=0.05)
        rig.gates[FAR].cut = False
        assert [(await one).status for one in waiting] == ["acknowledged"] * 2
        assert rig.writer.oldest_waiting_seconds() == 0.0

    story(steps)


def test_the_backlog_of_a_store_that_was_never_reached_in_this_epoch_is_not_known() -> None:
    async def steps(rig: Rig) -> None:
        rig.gates[FAR].cut = True
        await rig.open()
        await rig.one("r1")
        assert rig.writer.backlog(FAR) is None

    story(steps)


def test_lag_reaches_back_into_earlier_epochs() -> None:
    async def steps(rig: Rig) -> None:
        history = History().grow(8, epoch=1)
        rig.install(history, FAR, seq=3)
        rig.gates[HOME].fail("get_segment", 10**6)  # nothing can be copied to the far store, but it answers
        await rig.open(epoch=2, history=history)
        await rig.one("r1")
        backlog = rig.writer.backlog(FAR)
        assert backlog is not None
        assert (backlog.committed_seq, backlog.segments, backlog.records) == (3, 6, 16)
        assert backlog.oldest_received_at == history.segments[3].segment.frames[0].record.received_at

    story(steps)


@pytest.mark.parametrize("seed", range(6))
def test_lag_is_never_reported_smaller_than_it_is(seed: int) -> None:
    """Against the truth in the far sides, at random moments, with stores that come and go."""

    async def steps(rig: Rig) -> None:
        dice = random.Random(seed)
        await rig.open()
        await rig.wait(0.1)
        received: dict[int, float] = {}
        tasks = []
        for number in range(80):
            if dice.random() < 0.15:
                rig.gates[dice.choice((NEAR, FAR))].cut = dice.random() < 0.5
            tasks.append(asyncio.create_task(rig.one(f"r{number}")))
            await rig.wait(dice.choice([0.0, 0.03, 0.7]))
            for seq in range(len(received) + 1, rig.seqs()[HOME] + 1):
                segment = decode_segment(rig.servers[HOME].get(SegmentRef(STREAM, seq, 1)))
                received[seq] = segment.frames[0].record.received_at
            for region in (NEAR, FAR):
                backlog = rig.writer.backlog(region)
                there, promised = rig.servers[region].head(STREAM).seq, rig.writer.acknowledged.seq
                assert backlog is not None
                assert backlog.committed_seq <= there
                assert backlog.segments >= promised - there
                if there < promised:
                    assert backlog.oldest_received_at is not None
                    assert backlog.oldest_received_at <= received[there + 1]
        await asyncio.gather(*tasks)

    story(steps, limits=replace(LIMITS, ack_timeout_seconds=30.0))


def test_marks_that_are_merged_keep_the_older_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog_module, "BACKLOG_MARKS", 4)

    async def steps(rig: Rig) -> None:
        await rig.open()
        stamps = {}
        for number in range(1, 30):
            await rig.one(f"r{number}")
            stamps[number] = rig.writer.now()
            await rig.wait(1.0)
        assert len(rig.writer._marks) <= 9
        for number in range(29):
            assert rig.writer._marks.received_after(number) <= stamps[number + 1]

    story(steps)


def test_agents_whose_records_are_in_one_store_only_are_named_the_worst_first() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        await rig.one("safe", agent="x", copies=3)
        rig.gates[NEAR].cut = rig.gates[FAR].cut = True
        await rig.put(frame("canary", "c1", "canary", b"1"), frame("opening", "o1", "opening", b"1"))
        for number in range(3):
            await rig.one(f"r{number}", agent="y")
        await rig.one("r9", agent="x")
        tails = rig.writer.unreplicated()
        assert [(tail.agent, tail.records, tail.last_id) for tail in tails] == [("y", 3, "r2"), ("x", 1, "r9")]
        assert rig.writer.unreplicated(limit=1) == tails[:1]
        rig.gates[NEAR].cut = False
        await rig.everywhere(HOME, NEAR)
        await rig.wait(1.0)
        assert rig.writer.unreplicated() == ()

    story(steps)


# ------------------------------------------------------------------------------------------------------------- stand-ins


def test_while_the_home_store_is_silent_single_copies_wait_until_another_store_may_stand_in() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        rig.gates[HOME].cut = True
        rig.gates[FAR].cut = True
        waits = asyncio.create_task(rig.one("r1"))
        await rig.until(lambda: rig.seqs()[NEAR] == 1)
        await rig.wait(1.0)
        assert not waits.done()  # the copy is in a store of which nobody knows that it has to be fenced
        assert rig.writer.acknowledged.seq == 0
        rig.writer.home_silent_seconds()
        await rig.wait(1.0)
        assert rig.writer.home_silent_seconds() == pytest.approx(1.0, abs=0.01)
        rig.writer.sole_ackers = (HOME, NEAR)  # recorded in etcd
        rig.writer.wait_settled()
        assert (await waits).copies == 1
        assert rig.writer.acknowledged.seq == 1
        rig.gates[HOME].cut = False
        await rig.everywhere(HOME, NEAR)
        assert rig.writer.home_silent_seconds() == 0.0

    story(steps, limits=replace(LIMITS, ack_timeout_seconds=30.0))


def test_two_stores_acknowledge_without_the_home_store() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        rig.gates[HOME].cut = True
        assert (await rig.one("r1", copies=2)).copies == 2
        assert (await rig.one("r2", copies=1)).copies == 2  # a fence quorum meets every two

    story(steps)
