"""What lets a holder go on past its lease: what stores prove, who may object, how long a successor waits."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from controller.domain import replication
from controller.domain.failsafe import NOT_KNOWN, Witness, objection, proof, wait_seconds
from controller.domain.lease import Beat, Right, Verdict
from controller.domain.model import Head

ROOT = Path(__file__).resolve().parents[2]
WRITER = "home/a/7"
OURS, OLDER, NEWER = Head("s00", 9, 7, writer=WRITER), Head("s00", 9, 6, writer="home/b/6"), Head("s00", 9, 8, writer="x/a/8")
CLONE = Head("s00", 9, 7, writer="home/b/7")


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_stores_that_prove_it_have_one_in_every_fence_quorum(count: int) -> None:
    stores = [f"r{number}" for number in range(count)]
    quorums = list(itertools.combinations(stores, replication.fence_quorum(stores)))
    for size in range(count + 1):
        for ours in itertools.combinations(stores, size):
            heads = {store: OURS if store in ours else None for store in stores}
            proven = proof(heads, 7, WRITER).problem is None
            assert proven is (size >= 2 and all(set(ours) & set(quorum) for quorum in quorums))


def test_one_store_alone_proves_nothing_however_many_there_are() -> None:
    assert "1 of 1 stores" in str(proof({"a": OURS}, 7, WRITER).problem)
    assert "1 of 2 stores" in str(proof({"a": OURS, "b": None}, 7, WRITER).problem)


@pytest.mark.parametrize("other", [OLDER, CLONE, None])
def test_a_store_that_was_not_fenced_by_us_does_not_count(other: Head | None) -> None:
    assert proof({"a": OURS, "b": other, "c": None}, 7, WRITER).problem is not None
    assert proof({"a": OURS, "b": other, "c": OURS}, 7, WRITER).problem is None


def test_a_greater_epoch_anywhere_is_the_end_whatever_the_others_say() -> None:
    found = proof({"a": OURS, "b": OURS, "c": NEWER}, 7, WRITER)
    assert (found.newer, found.problem) == (8, "a store knows epoch 8")


def witness(
    region: str, unreachable: float | None = 9.0, authority: str = "home", barrier: str = "", epoch: int = 7
) -> dict[str, list[Witness]]:
    return {region: [Witness(region, "a", unreachable, authority, barrier, {"s00": epoch})]}


def asked(answers: dict[str, list[Witness]]) -> str | None:
    return objection(answers, ("home", "east", "south"), home="home", stream="s00", epoch=7, silent_seconds=4.0)


def test_nobody_objects_when_every_other_region_says_the_same() -> None:
    assert asked(witness("east") | witness("south")) is None
    assert asked(witness("east") | witness("south", authority="", epoch=0)) is None
    assert asked(witness("east") | witness("south") | witness("home")) is None


@pytest.mark.parametrize(
    ("south", "why"),
    [
        ({}, "no controller of south answers"),
        (witness("south", unreachable=None), "south/a reaches etcd"),
        (witness("south", unreachable=1.0), "south/a reached etcd 1.0 s ago"),
        (witness("south", authority="east"), "the authority is with east"),
        (witness("south", barrier="plan-1"), "plan plan-1 is taking over"),
        (witness("south", epoch=8), "knows epoch 8 of s00"),
        (witness("south") | witness("home", unreachable=None), "home/a reaches etcd"),
    ],
)
def test_whoever_knows_better_or_does_not_answer_ends_it(south: dict[str, list[Witness]], why: str) -> None:
    assert why in str(asked(witness("east") | south))


def test_one_that_objects_outweighs_others_of_its_region() -> None:
    east = [*witness("east")["east"], Witness("east", "b", None, "home", "", {})]
    assert "east/b reaches etcd" in str(asked({"east": east} | witness("south")))


def test_a_successor_waits_for_what_the_last_holder_wrote_down_and_for_a_whole_ttl_when_that_is_not_known() -> None:
    assert wait_seconds(0.0, 10.0) == 0.0
    assert wait_seconds(30.0, 10.0) == 30.0
    assert wait_seconds(NOT_KNOWN, 10.0) == 10.0


def test_a_right_goes_beyond_its_lease_but_one_copy_counts_only_inside_it() -> None:
    right = Right(7, 10.0).carried(14.0, 9.0)
    assert (right.allows(12.0), right.leased(12.0), right.remaining_seconds(12.0)) == (True, False, 2.0)
    assert (right.allows(14.0), right.ends_at) == (False, 14.0)
    assert right.carried(13.0, 11.0).ends_at == 14.0


def test_a_right_that_is_over_or_lost_is_not_given_back() -> None:
    assert Right(7, 10.0).carried(14.0, 10.0).ends_at == 10.0
    assert not Right(7, 10.0, "lost").carried(14.0, 9.0).allows(9.5)
    lost = Right(7, 10.0).carried(14.0, 9.0).after(Verdict(Beat.LOST, "the lease is gone"))
    assert not lost.allows(11.0)
    assert lost.ends_at == 14.0, "what was lent still binds those who have it"


def test_a_heartbeat_that_is_complete_again_brings_the_lease_back() -> None:
    right = Right(7, 10.0).carried(14.0, 9.0).after(Verdict(Beat.EXTENDS, "complete", 16.0))
    assert right.leased(15.0)


def test_whoever_changes_one_part_of_the_record_of_forks_keeps_the_others() -> None:
    """The record says how long a successor must wait. Written anew from some of its parts it would say that it need not; so
    only who opens an epoch, and who recovers a lost etcd, makes one."""
    makers = {
        path.name
        for path in (ROOT / "controller").rglob("*.py")
        if re.search(r"\bForks\([^)]", path.read_text(encoding="utf-8"))
    }
    assert makers == {"opening.py", "recovery.py"}
