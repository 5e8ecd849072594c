"""The hash-chained record of decisions: appended under contention, and what tampering with it looks like."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import fields, replace
from typing import Any

import pytest

from controller.adapters.memory.coordinator import MemoryCluster, MemoryCoordinator
from controller.adapters.memory.gate import FaultGate
from controller.errors import OutcomeUnknown, Unavailable
from controller.lab.virtual_time import VirtualClock, run_virtual
from controller.ports import Compare, Coordinator, Get, Put
from controller.runtime.audit import GENESIS, Audit, broken_at, entry_hash
from controller.runtime.documents import Keys, read_all
from controller.runtime.service import AuditEntry

KEYS = Keys("/dr", "fleet")


class Rig:
    """One cluster and any number of instances that audit into it."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.cluster = MemoryCluster(self.clock)
        self.plain = MemoryCoordinator(self.cluster)

    def audit(self) -> tuple[Audit, FaultGate]:
        gate = FaultGate(self.clock.sleep)
        return Audit(MemoryCoordinator(self.cluster, gate), KEYS), gate

    async def entries(self) -> list[AuditEntry]:
        return [seen.value for seen in await read_all(self.plain, KEYS.audits, AuditEntry)]


def story(steps: Callable[[Rig], Awaitable[None]]) -> None:
    async def told() -> None:
        await steps(Rig())

    run_virtual(told(), limit_seconds=3600.0)


async def write(audit: Audit, number: int, **detail: Any) -> None:
    await audit.append(at=1_000.0 + number, actor="ada", action="plan", subject=f"p{number}", detail=detail or {"n": number})


def a_chain(length: int = 6) -> list[AuditEntry]:
    entries: list[AuditEntry] = []
    for n in range(1, length + 1):
        entry = AuditEntry(
            n, 10.0 * n, "ada", "plan", f"p{n}", {"to": "b", "n": n}, entries[-1].hash if entries else GENESIS, ""
        )
        entries.append(replace(entry, hash=entry_hash(entry)))
    return entries


# --------------------------------------------------------------------------------------------------------------- appending


def test_entries_are_numbered_and_chained() -> None:
    async def steps(rig: Rig) -> None:
        audit, _ = rig.audit()
        for number in range(5):
            await write(audit, number)
        entries = await rig.entries()
        assert [entry.n for entry in entries] == [1, 2, 3, 4, 5]
        assert entries[0].previous == GENESIS
        assert broken_at(entries) is None
        assert entries[2].detail == {"n": 2}

    story(steps)


@pytest.mark.parametrize("writers", [2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_instances_that_append_at_once_make_one_chain(writers: int, seed: int) -> None:
    async def steps(rig: Rig) -> None:
        dice = random.Random(seed)

        async def one(name: int) -> None:
            audit, gate = rig.audit()
            for number in range(8):
                gate.delay_seconds = dice.choice([0.0, 0.01, 0.05])
                await write(audit, 100 * name + number)

        await asyncio.gather(*(one(name) for name in range(writers)))
        entries = await rig.entries()
        assert broken_at(entries) is None
        assert sorted(entry.subject for entry in entries) == sorted(f"p{100 * w + n}" for w in range(writers) for n in range(8))
        for name in range(writers):  # each one's own entries in the order in which it wrote them
            mine = [int(entry.subject[1:]) for entry in entries if int(entry.subject[1:]) // 100 == name]
            assert mine == sorted(mine)

    story(steps)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 8, 9, 40])
def test_an_instance_that_starts_late_goes_on_from_the_newest_entry(length: int) -> None:
    async def steps(rig: Rig) -> None:
        first, _ = rig.audit()
        for number in range(length):
            await write(first, number)
        late, gate = rig.audit()
        await write(late, 99)
        assert gate.calls["get"] <= 2 + 2 * max(1, length).bit_length()  # it does not read the whole history
        entries = await rig.entries()
        assert len(entries) == length + 1
        assert broken_at(entries) is None

    story(steps)


def test_an_instance_that_others_overtook_walks_on_from_what_it_knows() -> None:
    async def steps(rig: Rig) -> None:
        mine, _ = rig.audit()
        theirs, _ = rig.audit()
        await write(mine, 1)
        for number in range(10):
            await write(theirs, number)
        await write(mine, 2)
        assert broken_at(await rig.entries()) is None

    story(steps)


def test_a_decision_and_its_entry_are_written_together_or_not_at_all() -> None:
    async def steps(rig: Rig) -> None:
        audit, _ = rig.audit()
        done = await audit.commit(
            [Compare.absent("/x")], [Put("/x", b"1"), Get("/x")], at=1.0, actor="ada", action="a", subject="s"
        )
        assert done.succeeded
        assert [item.value if item else None for item in done.items] == [b"1"]  # the entry's own read is not reported
        refused = await audit.commit([Compare.absent("/x")], [Put("/x", b"2")], at=2.0, actor="ada", action="a", subject="s")
        assert not refused.succeeded
        assert refused.items == ()
        item = await rig.plain.get("/x")
        assert item is not None
        assert item.value == b"1"
        assert len(await rig.entries()) == 1

    story(steps)


def test_a_condition_that_fails_while_the_number_is_contended_is_told_as_the_callers() -> None:
    async def steps(rig: Rig) -> None:
        mine, gate = rig.audit()
        theirs, _ = rig.audit()
        await write(mine, 0)
        gate.delay_seconds = 0.1
        racing = asyncio.create_task(
            mine.commit([Compare.absent("/x")], [Put("/x", b"mine")], at=1.0, actor="ada", action="a", subject="s")
        )
        await asyncio.sleep(0.25)  # it has read the newest entry and its transaction is on the way
        await theirs.commit([], [Put("/x", b"theirs")], at=1.0, actor="eve", action="a", subject="s")
        assert not (await racing).succeeded
        assert [entry.actor for entry in await rig.entries()] == ["ada", "eve"]

    story(steps)


def test_an_answer_that_is_lost_is_an_unknown_outcome_and_the_chain_goes_on_either_way() -> None:
    async def steps(rig: Rig) -> None:
        audit, gate = rig.audit()
        await write(audit, 1)
        gate.lose("txn")
        with pytest.raises(OutcomeUnknown):
            await write(audit, 2)
        gate.fail("txn")
        with pytest.raises(Unavailable):
            await write(audit, 3)
        await write(audit, 4)
        entries = await rig.entries()
        assert [entry.subject for entry in entries] == ["p1", "p2", "p4"]
        assert broken_at(entries) is None

    story(steps)


def test_endless_contention_ends_with_a_reason() -> None:
    async def steps(rig: Rig) -> None:
        rival, _ = rig.audit()

        class Contended(MemoryCoordinator):
            """Somebody else appends before every transaction of ours."""

            async def txn(self, *arguments: Any) -> Any:
                await write(rival, 0)
                return await super().txn(*arguments)

        coordinator: Coordinator = Contended(rig.cluster)
        with pytest.raises(Unavailable, match="contended 20 times in a row"):
            await write(Audit(coordinator, KEYS), 1)
        assert broken_at(await rig.entries()) is None

    story(steps)


# --------------------------------------------------------------------------------------------------------------- tampering


def test_a_chain_that_nobody_touched_holds() -> None:
    entries = a_chain()
    assert broken_at(entries) is None
    assert broken_at([]) is None
    assert broken_at(entries[3:], previous=entries[2].hash, first=4) is None


CHANGES: dict[str, Any] = {
    "at": 0.5,
    "actor": "eve",
    "action": "abort",
    "subject": "p0",
    "detail": {"to": "c", "n": 4},
    "hash": "0" * 64,
}


@pytest.mark.parametrize("field", CHANGES)
@pytest.mark.parametrize("n", [1, 3, 6])
def test_any_change_of_an_entry_is_found_at_that_entry(field: str, n: int) -> None:
    entries = a_chain()
    entries[n - 1] = replace(entries[n - 1], **{field: CHANGES[field]})
    assert broken_at(entries) == f"entry {n} was changed"


def test_every_field_of_an_entry_is_covered_by_a_test_and_by_the_hash() -> None:
    assert set(CHANGES) | {"n", "previous"} == {one.name for one in fields(AuditEntry)}


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_change_with_a_new_hash_is_found_at_the_next_entry(n: int) -> None:
    entries = a_chain()
    forged = replace(entries[n - 1], actor="eve")
    entries[n - 1] = replace(forged, hash=entry_hash(forged))
    assert broken_at(entries) == f"entry {n + 1} does not follow entry {n}"


def test_the_last_entry_can_only_be_vouched_for_by_whoever_remembers_its_hash() -> None:
    """Rewriting the end of the record is not found by the chain alone; hence its head is kept elsewhere too."""
    entries = a_chain()
    forged = replace(entries[-1], actor="eve")
    forged = replace(forged, hash=entry_hash(forged))
    assert broken_at([*entries[:-1], forged]) is None
    assert forged.hash != entries[-1].hash


@pytest.mark.parametrize("n", [1, 4])
def test_an_entry_that_was_taken_out_is_missed(n: int) -> None:
    entries = a_chain()
    del entries[n - 1]
    assert broken_at(entries) == f"entry {n} is missing (found {n + 1})"


def test_entries_that_changed_places_are_found() -> None:
    entries = a_chain()
    entries[2], entries[3] = entries[3], entries[2]
    assert broken_at(entries) == "entry 3 is missing (found 4)"


def test_an_entry_that_was_put_in_between_is_found() -> None:
    entries = a_chain()
    slipped = replace(entries[2], subject="extra")
    assert broken_at([*entries[:3], slipped, *entries[3:]]) == "entry 4 is missing (found 3)"
