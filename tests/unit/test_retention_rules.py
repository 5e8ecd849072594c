"""How far a base may move: the rules, with whatever stores and positions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from controller.domain import retention
from controller.domain.model import EpochStart, Head, NamedSnapshot, Salvage, SegmentRef
from controller.domain.replication import fence_quorum
from controller.domain.retention import StorePlace


@st.composite
def stores(draw: st.DrawFn) -> list[StorePlace]:
    """One to four stores, each somewhere in a history of forty segments."""
    found = []
    for number in range(draw(st.integers(1, 4))):
        seq = draw(st.integers(0, 40))
        found.append(StorePlace(f"r{number}", draw(st.booleans()), seq, draw(st.integers(1, seq + 1))))
    return found


@given(st.integers(1, 45), stores())
def test_a_base_leaves_nothing_young_and_no_attached_store_behind(young: int, places: list[StorePlace]) -> None:
    base = retention.next_base(young, places)
    if base is None:
        return
    assert base <= young
    attached = [place for place in places if place.attached]
    assert all(place.seq >= base - 1 for place in attached)
    assert any(place.base < base for place in attached)


@given(st.integers(1, 45), st.integers(0, 45), stores())
def test_a_base_moves_only_when_every_fence_quorum_meets_a_store_that_reaches_it(
    base: int, sealed: int, places: list[StorePlace]
) -> None:
    sealed = max(sealed, base - 1)
    moved = retention.may_move(base, sealed, places)
    if not moved:
        return
    having = {place.region for place in places if place.seq >= base - 1}
    assert len(places) - len(having) < fence_quorum(places)
    for place in places:
        if place.region in moved:
            assert place.attached
            assert place.seq >= sealed
            assert place.base < base


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 3)), unique=True), st.integers(1, 31), st.integers(1, 30))
def test_what_is_deleted_lies_before_the_base_and_is_no_salvage(objects: list[tuple[int, int]], base: int, cut: int) -> None:
    salvage = Salvage(cut, 30, (EpochStart(1, cut), EpochStart(2, cut + 2)), "0" * 64, 3)
    head = Head("s", 40, 3, "0" * 64, (EpochStart(1, 1), EpochStart(3, cut)), base, "0" * 64, (salvage,))
    refs = [SegmentRef("s", *found) for found in objects]
    gone = set(retention.deletable(head, refs))
    for ref in refs:
        salvaged = cut <= ref.seq <= 30 and ref.epoch == (1 if ref.seq < cut + 2 else 2)
        assert (ref in gone) == (ref.seq < base and not salvaged)


@given(st.lists(st.integers(1, 40), unique=True).map(sorted), st.integers(1, 41), st.integers(1, 5))
def test_heads_name_the_newest_snapshots_of_what_is_kept(seqs: list[int], base: int, keep: int) -> None:
    known = [NamedSnapshot(seq, 1, "0" * 64, "1" * 64) for seq in seqs]
    new = NamedSnapshot(41, 2, "0" * 64, "2" * 64)
    named = retention.named_snapshots(known, new, base, keep)
    assert named[-1] == new
    assert len(named) <= keep
    assert [found.seq for found in named] == sorted({found.seq for found in named})
    assert all(found.seq >= base - 1 for found in named)
