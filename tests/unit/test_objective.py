"""The RPO policy ``enforce``: what is acknowledged and only one store has never spans more than the objective.

The span is computed from the far sides at the moment of every acknowledgement, not from what the writer believes.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from controller.domain.lag import beyond_objective
from controller.domain.model import Unknown
from controller.errors import Unavailable
from controller.stream.objective import Objective
from controller.stream.segment import frame
from tests.unit.test_writer import FAR, HOME, LIMITS, NEAR, REGIONS, STREAM, Rig, story

RPO = 5.0
ENFORCED = replace(LIMITS, enforced_rpo_seconds=RPO)


@pytest.mark.parametrize(
    ("since", "held"),
    [(None, False), (100.0, False), (95.0, False), (94.9, True), (Unknown(99.0, "nobody answers"), True), (200.0, False)],
)
def test_nothing_more_is_acknowledged_once_one_store_alone_has_more_than_the_objective(
    since: float | Unknown | None, held: bool
) -> None:
    assert (beyond_objective(since, 100.0, RPO) is not None) is held


class Witness:
    """Puts records one by one and keeps what was acknowledged, and the longest span that one store alone ever had."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.acknowledged: dict[str, tuple[int, float]] = {}
        self.worst = 0.0

    async def put(self, record_id: str) -> bool:
        """Whether it was acknowledged."""
        rig = self.rig
        received_at = rig.writer.now()
        try:
            (ack,) = await rig.put(frame(f"agent-{record_id}", record_id, "checkpoint", b"state"))
        except Unavailable:
            return False
        if ack.status == "failed":
            assert ack.error is not None
            assert ack.error["code"] == "outcome_unknown"
            return False
        self.acknowledged.setdefault(record_id, (ack.seq, received_at))
        second = sorted((server.head(STREAM).seq for server in rig.servers.values()), reverse=True)[1]
        if ack.seq > second:
            oldest = min(at for seq, at in self.acknowledged.values() if seq > second)
            self.worst = max(self.worst, rig.writer.now() - oldest)
        return True


def test_acknowledgements_stop_at_the_objective_and_go_on_by_themselves() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        await rig.wait(0.1)
        witness = Witness(rig)
        assert await witness.put("before")
        await rig.wait(1.0)
        rig.gates[NEAR].cut = rig.gates[FAR].cut = True
        answers = []
        for number in range(12):
            answers.append(await witness.put(f"r{number}"))
            await rig.wait(1.0)
        assert answers == [True] * 6 + [False] * 6
        assert rig.writer.objective.since is not None
        assert witness.worst <= RPO
        rig.gates[NEAR].cut = False
        await rig.until(lambda: rig.seqs()[NEAR] == rig.writer.seq)
        assert await witness.put("after")
        assert rig.writer.objective.problem(rig.writer.seq) is None
        assert rig.writer.objective.since is None
        assert await witness.put("r11")  # refused before it was taken: a new record now

    story(steps, limits=ENFORCED)


def test_a_record_that_waits_for_the_objective_fails_with_a_reason_and_its_retry_is_recognised() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        await rig.wait(0.1)
        rig.gates[NEAR].cut = rig.gates[FAR].cut = True
        assert (await rig.one("first")).status == "acknowledged"
        await rig.wait(RPO - 0.5)
        rig.gates[HOME].delay_seconds = 0.4  # taken within the objective, committed at home beyond it
        held = await rig.one("held")
        assert held.error is not None
        assert (held.status, held.error["code"]) == ("failed", "outcome_unknown")
        assert "not acknowledging" in str(held.error["message"])
        assert rig.seqs()[HOME] == 2  # it is at home
        rig.gates[HOME].delay_seconds = 0.0
        rig.gates[FAR].cut = False
        await rig.until(lambda: rig.seqs()[FAR] == 2)
        again = await rig.one("held")
        assert (again.status, again.seq) == ("duplicate", 2)

    story(steps, limits=ENFORCED)


def test_what_waits_is_acknowledged_as_soon_as_another_store_has_it() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        await rig.wait(0.1)
        rig.gates[NEAR].cut = rig.gates[FAR].cut = True
        assert (await rig.one("first")).status == "acknowledged"
        await rig.wait(RPO - 0.5)
        rig.gates[HOME].delay_seconds = 0.4
        waits = asyncio.create_task(rig.one("held"))
        await rig.wait(1.8)
        assert rig.seqs()[HOME] == 2
        assert not waits.done()
        rig.gates[FAR].cut = False
        assert (await waits).status == "acknowledged"

    story(steps, limits=replace(ENFORCED, ack_timeout_seconds=30.0))


def test_records_in_two_stores_are_acknowledged_whatever_only_the_home_store_lacks() -> None:
    async def steps(rig: Rig) -> None:
        await rig.open()
        await rig.wait(0.1)
        rig.gates[HOME].cut = True
        for number in range(10):
            assert (await rig.one(f"r{number}")).copies == 2
            await rig.wait(1.0)

    story(steps, limits=ENFORCED)


def test_a_holder_that_knows_no_second_store_acknowledges_nothing_but_its_own_records() -> None:
    """Unknown counts as exceeded."""

    async def steps(rig: Rig) -> None:
        rig.gates[NEAR].cut = rig.gates[FAR].cut = True
        await rig.open()
        with pytest.raises(Unavailable, match="how much only one store has is unknown"):
            await rig.one("r1")
        (own,) = await rig.writer.submit([frame("opening", "1", "opening", b"epoch 1")], own=True)
        assert own.status == "acknowledged"
        rig.gates[FAR].cut = False
        await rig.until(lambda: rig.seqs()[FAR] == 1)
        assert (await rig.one("r1")).status == "acknowledged"

    story(steps, limits=ENFORCED)


def stalls(seed: int) -> float:
    """Stores that stall, crawl and come back while many write. Returns the worst span."""
    worst: list[float] = []

    async def steps(rig: Rig) -> None:
        dice = random.Random(seed)
        await rig.open()
        await rig.wait(0.1)
        witness = Witness(rig)
        tasks = []
        for number in range(150):
            if dice.random() < 0.08:
                rig.gates[dice.choice(REGIONS)].cut = dice.random() < 0.6
            if dice.random() < 0.08:
                rig.gates[dice.choice(REGIONS)].delay_seconds = dice.choice([0.0, 0.0, 0.2, 0.9])
            if dice.random() < 0.05:
                for gate in (rig.gates[NEAR], rig.gates[FAR]):
                    gate.cut = True
            tasks.append(asyncio.create_task(witness.put(f"r{number}")))
            await rig.wait(dice.choice([0.0, 0.02, 0.3, 1.0]))
        await asyncio.gather(*tasks)
        for gate in rig.gates.values():
            gate.cut, gate.delay_seconds = False, 0.0
        await rig.everywhere()
        assert await witness.put("at last")
        worst.append(witness.worst)

    story(steps, limits=ENFORCED)
    return worst[0]


@pytest.mark.parametrize("seed", range(10))
def test_the_span_of_what_one_store_alone_has_never_passes_the_objective(seed: int) -> None:
    assert stalls(seed) <= RPO + 1e-6


def test_a_writer_that_does_not_ask_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Objective, "problem", lambda self, last_seq: None)
    assert max(stalls(seed) for seed in range(10)) > RPO
