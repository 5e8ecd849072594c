"""What grows with every epoch warns at half of its bound."""

from __future__ import annotations

from controller.adapters.head_item import ITEM_GUARD_BYTES
from controller.adapters.head_rules import head_bytes
from controller.domain.model import EpochStart, Head, Salvage, Unknown
from controller.domain.replication import FORKS_MAX
from controller.runtime.shortening import crowding


def head(epochs: int, salvages: int = 0) -> Head:
    starts = tuple(EpochStart(number, number) for number in range(1, epochs + 1))
    cut = Salvage(1, 1, (EpochStart(1, 1),), "0" * 64, 2)
    return Head("s00", seq=epochs, epoch=epochs, epochs=starts, salvage=(cut,) * salvages)


def test_a_head_warns_at_half_of_what_its_item_may_hold_and_names_its_region() -> None:
    few, many = head(100), head(4_200)
    assert head_bytes(few) == 0
    assert 2 * head_bytes(many) >= ITEM_GUARD_BYTES > head_bytes(many)
    heads = {"eu": few, "us": many, "ap": Unknown(0.0, "away")}
    (warning,) = crowding("s00", heads, 0)
    assert "the head of s00 in us" in warning
    assert "4,200 epochs" in warning
    assert len(crowding("s00", {"eu": head(10, 1_200)}, 0)) == 1
    assert crowding("s00", {"eu": few}, 0) == []


def test_forks_warn_at_half_of_what_may_be_recorded() -> None:
    assert crowding("s00", {}, FORKS_MAX // 2 - 1) == []
    (warning,) = crowding("s00", {}, FORKS_MAX // 2)
    assert "2,500 of 5,000 forks of s00" in warning
