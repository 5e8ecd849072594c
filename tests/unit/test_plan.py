"""The frozen document that people approve: its canonical form, its digest, and how far evidence may drift."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.domain.model import EpochStart, Holder, RegionLag, Unknown
from controller.domain.plan import (
    NO_LOSS,
    STEPS,
    AgentLoss,
    Check,
    Evidence,
    HeadSeen,
    Loss,
    Plan,
    PlanKind,
    StoreUnknown,
    canonical,
    canonical_bytes,
    digest,
    drift,
)
from controller.domain.promotion import PlanRecord, State
from controller.runtime.documents import decode, encode

GOLDEN_DIGEST = "147deacdc64b4668f5a4f4eb6da4d3961f82c0139062d2bbae5f56a40a49c8e4"
"""Of ``a_plan()``, computed once. If it changes, signatures over stored plans stop verifying: raise ``PLAN_FORMAT`` then."""


def a_plan(**changes: Any) -> Plan:
    """A failover with something in every field, and every number different from every other where it matters."""
    evidence = Evidence(
        at=1_767_225_600.25,
        authority_region="eu-west-1",
        authority_epoch=41,
        authority_revision=1_234,
        holders=(Holder("0", "eu-west-1", "a", 41, "http://127.0.1.1:8080", 1_767_220_000.5),),
        heads=(
            HeadSeen("eu-central-1", "0", 1_041, 41, 41, "c" * 64, 1_767_225_590.0),
            HeadSeen("us-east-1", "0", 1_040, 41, 40, "d" * 64, 1_767_225_589.0),
        ),
        unreachable=(StoreUnknown("eu-west-1", "0", 1_767_225_580.0, "no answer in 2 s"),),
        forks={"0": (EpochStart(40, 1), EpochStart(41, 900))},
        lag=(
            RegionLag("eu-central-1", 1_041, 1, 3, 4_096, 0.75, 1_040),
            RegionLag("us-east-1", *(Unknown(1_767_225_000.0, "no report"),) * 6),
        ),
        loss=Loss(False, 3, True, 9.5, "store eu-west-1 was not read", (AgentLoss("payments/7", 2, "r-19"),)),
        agents=120,
        weights={"eu-west-1": 100, "eu-central-1": 0, "us-east-1": 0},
        traffic_epoch=41,
        checks=(Check("fence-quorum", True, "2 of 3 stores answer"), Check("holder", False, "no holder")),
        right_ended_by=1_767_225_599.5,
    )
    plan = Plan(
        id="p-0001",
        group="fleet",
        kind=PlanKind.FAILOVER,
        source="eu-west-1",
        target="eu-central-1",
        requester="ada@example.org",
        reason="Region ist still – 東京",
        created_at=1_767_225_601.0,
        expires_at=1_767_227_401.0,
        approvals_required=2,
        break_glass=False,
        weights={"eu-west-1": 0, "eu-central-1": 100, "us-east-1": 0},
        tolerance_seconds=10.0,
        tolerance_records=1_000,
        evidence=evidence,
    )
    return replace(plan, **changes)


def with_evidence(**changes: Any) -> Plan:
    plan = a_plan()
    return replace(plan, evidence=replace(plan.evidence, **changes))


# --------------------------------------------------------------------------------------------------------- canonical form


def test_the_canonical_form_is_sorted_without_white_space_and_in_ascii() -> None:
    value = {"b": (1, 2.5, None, True), "a": Check("näme", False, "\u202e"), "c": PlanKind.DRILL}
    assert canonical_bytes(value) == (
        b'{"a":{"detail":"\\u202e","name":"n\\u00e4me","ok":false},"b":[1,2.5,null,true],"c":"drill"}'
    )


def test_the_digest_of_a_known_plan_is_the_known_digest() -> None:
    assert digest(a_plan()) == GOLDEN_DIGEST


def test_the_order_in_which_a_mapping_was_built_does_not_matter() -> None:
    turned = dict(reversed(list(a_plan().weights.items())))
    assert digest(a_plan(weights=turned)) == digest(a_plan())


def test_the_canonical_form_is_plain_json_that_contains_all_that_is_shown() -> None:
    parsed = json.loads(canonical_bytes(a_plan()))
    assert parsed["evidence"]["loss"]["worst"] == [{"agent": "payments/7", "last_id": "r-19", "records": 2}]
    assert parsed["steps"] == list(STEPS)
    assert parsed["format"] == 1


def variants(value: Any) -> Iterator[tuple[str, Any]]:  # noqa: C901 - one branch per kind of value
    """Every value that differs from ``value`` in exactly one leaf, with the leaf's path: found by looking, not by a list."""
    if is_dataclass(value) and not isinstance(value, type):
        for one in fields(value):
            for path, changed in variants(getattr(value, one.name)):
                yield f".{one.name}{path}", replace(value, **{one.name: changed})
    elif isinstance(value, Mapping):
        for key, item in value.items():
            for path, changed in variants(item):
                yield f"[{key}]{path}", {**value, key: changed}
            yield f"[{key}] renamed", {(f"{k}'" if k == key else k): v for k, v in value.items()}
        yield " one more", {**value, "another": next(iter(value.values()), 1)}
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            for path, changed in variants(item):
                yield f"[{number}]{path}", (*value[:number], changed, *value[number + 1 :])
            yield f"[{number}] left out", (*value[:number], *value[number + 1 :])
        yield " turned", tuple(reversed(value)) if len(value) > 1 else (*value, *value)
    elif isinstance(value, StrEnum):
        yield "", next(member for member in type(value) if member is not value)
    elif isinstance(value, bool):
        yield "", not value
    elif isinstance(value, int):
        yield "", value + 1
        yield " unknown", Unknown(float(value), "")
    elif isinstance(value, float):
        yield "", math.nextafter(value, math.inf)
    elif isinstance(value, str):
        yield "", f"{value} "
    else:
        raise TypeError(f"no variant of {value!r}")


def test_the_digest_changes_with_every_field_however_deep() -> None:
    plan = a_plan()
    seen = {digest(plan): "the plan itself"}
    for path, changed in variants(plan):
        found = digest(changed)
        assert found not in seen, f"plan{path} has the digest of plan{seen[found]}"
        seen[found] = path
    assert len(seen) > 150


def leaves(value: Any, kind: type) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Where there is a leaf of ``kind``, and how to make the same value with another leaf there."""
    if is_dataclass(value) and not isinstance(value, type):
        for one in fields(value):
            for path, put in leaves(getattr(value, one.name), kind):
                yield f".{one.name}{path}", lambda leaf, put=put, name=one.name: replace(value, **{name: put(leaf)})
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            for path, put in leaves(item, kind):
                yield (
                    f"[{number}]{path}",
                    lambda leaf, put=put, number=number: (*value[:number], put(leaf), *value[number + 1 :]),
                )
    elif type(value) is kind:
        yield "", lambda leaf: leaf


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_plan_with_a_number_that_json_does_not_have_has_no_digest(number: float) -> None:
    places = list(leaves(a_plan(), float))
    assert len(places) > 12
    for path, put in places:
        with pytest.raises(ValueError, match="has no canonical form"):
            pytest.fail(f"plan{path} has the digest {digest(put(number))}")


def test_a_value_that_is_not_a_document_is_refused() -> None:
    with pytest.raises(TypeError):
        canonical_bytes({"when": object()})


TEXT = st.text(max_size=8)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4).map(tuple) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@given(JSON_VALUES)
def test_canonical_bytes_read_back_are_the_same_canonical_bytes(value: Any) -> None:
    data = canonical_bytes(value)
    data.decode("ascii")
    assert canonical_bytes(json.loads(data)) == data


def test_canonical_leaves_nothing_frozen_behind() -> None:
    assert canonical(Check("a", True, "b")) == {"name": "a", "ok": True, "detail": "b"}
    assert canonical((PlanKind.FAILOVER, {1: 2})) == ["failover", {"1": 2}]


@given(st.data())
def test_a_plan_that_was_stored_in_etcd_still_has_the_digest_that_people_approved(data: st.DataObject) -> None:
    number = st.floats(0, 2e9)
    plan = with_evidence(
        at=data.draw(number),
        right_ended_by=data.draw(number),
        traffic_epoch=data.draw(st.integers(0, 2**53) | st.builds(Unknown, number, TEXT)),
        loss=Loss(data.draw(st.booleans()), data.draw(st.integers(0, 2**40)), True, data.draw(number), data.draw(TEXT)),
        lag=(RegionLag("r", 1, Unknown(1.0, ""), 0, 0, data.draw(number | st.builds(Unknown, number, TEXT)), 1),),
    )
    plan = replace(plan, reason=data.draw(TEXT), tolerance_seconds=data.draw(number), kind=data.draw(st.sampled_from(PlanKind)))
    record = PlanRecord(plan, digest(plan), State.AWAITING_APPROVAL, 1.0)
    stored = decode(PlanRecord, encode(record))
    assert stored == record
    assert digest(stored.plan) == record.digest


# ------------------------------------------------------------------------------------------------------------------ drift


@dataclass(frozen=True)
class Drift:
    """A change of the evidence since the plan was made, and what a failover and a planned move say to it (None: go on)."""

    name: str
    changes: Mapping[str, Any]
    failover: str | None
    planned: str | None


def both(name: str, changes: Mapping[str, Any], says: str | None) -> Drift:
    return Drift(name, changes, says, says)


SEEN = a_plan().evidence
APPROVED = SEEN.loss
OPENED = {"0": (EpochStart(40, 1), EpochStart(42, 950))}
DRIFTS = [
    both("nothing", {}, None),
    both("later", {"at": SEEN.at + 900}, None),
    both("another revision alone", {"authority_revision": 9_999}, None),
    both("another region", {"authority_region": "us-east-1"}, "the authority moved from eu-west-1 to us-east-1"),
    # a region that acquires again and again without opening an epoch acknowledges nothing: it must not void every failover
    Drift("another epoch", {"authority_epoch": 42}, None, "the epoch moved from 41 to 42"),
    Drift("an older epoch: etcd was restored", {"authority_epoch": 40}, None, "the epoch moved from 41 to 40"),
    # somebody restarted: the loss that people approved is compared all the same
    both("a region that was alive opened an epoch", {"forks": OPENED}, None),
    both("forks of the epoch that was seen", {"forks": {"0": (EpochStart(41, 900),), "1": ()}}, None),
    both("the holder vanished", {"holders": ()}, None),
    both("a loss just within the tolerance", {"loss": replace(APPROVED, seconds=APPROVED.seconds + 10.0)}, None),
    both("a greater loss", {"loss": replace(APPROVED, seconds=APPROVED.seconds + 10.1)}, "loss of 19.6 s against 9.5 s"),
    both("a smaller loss", {"loss": NO_LOSS}, None),
    both("a loss that is not a number", {"loss": replace(APPROVED, seconds=math.nan)}, "loss of nan s"),
    both("records within the tolerance", {"loss": replace(APPROVED, records=1_003)}, None),
    both("more records", {"loss": replace(APPROVED, records=1_004)}, "loss of 1004 records against 3 approved"),
    both("a check that failed then too", {"checks": (Check("holder", False, "x"),)}, None),
    both("a new failing check", {"checks": (Check("epoch-floor", False, "x"),)}, "checks that passed .* epoch-floor"),
    both("other weights", {"weights": {"eu-west-1": 50}}, None),
    both("fewer agents", {"agents": 1}, None),
]


@pytest.mark.parametrize("kind", [PlanKind.FAILOVER, PlanKind.SWITCHOVER, PlanKind.FAILBACK])
@pytest.mark.parametrize("case", DRIFTS, ids=lambda case: case.name)
def test_what_voids_a_plan_and_what_it_tolerates(case: Drift, kind: PlanKind) -> None:
    plan = a_plan(kind=kind)
    says = case.planned if kind.planned else case.failover
    found = drift(plan, replace(plan.evidence, **case.changes))
    assert (found is None) is (says is None), found
    assert found is None or (says is not None and re.search(says, found)), found


@pytest.mark.parametrize("kind", [PlanKind.FAILOVER, PlanKind.SWITCHOVER])
@pytest.mark.parametrize("forks", [OPENED, {**SEEN.forks, "7": OPENED["0"]}], ids=["its stream", "one of several streams"])
def test_a_silent_region_that_opened_an_epoch_again_voids_the_plan(
    forks: Mapping[str, tuple[EpochStart, ...]], kind: PlanKind
) -> None:
    silent = replace(with_evidence(holders=()), kind=kind)
    found = drift(silent, replace(silent.evidence, forks=forks))
    assert found is not None
    assert "epoch 42 opened after the plan was made: eu-west-1" in found
    assert drift(silent, silent.evidence) is None
    assert drift(silent, replace(silent.evidence, holders=SEEN.holders)) is None  # it has the lease and opened nothing yet


# ------------------------------------------------------------------------------------------------------------------- loss


def test_a_bound_is_worse_than_exactly_nothing_however_small_it_is() -> None:
    """A store became unreachable since: people approved that nothing is lost, and now nobody knows."""
    bound = Loss(False, 0, True, 0.1, "store eu-west-1 was not read")
    exact = Loss(True, 0, False, 0.0, "every store that may have acknowledged alone was read")
    assert bound.exceeds(exact, tolerance_seconds=10, tolerance_records=10)
    assert exact.exceeds(bound, tolerance_seconds=0, tolerance_records=0) is None


def test_only_a_failover_moves_without_asking_the_old_holder() -> None:
    assert [kind.planned for kind in (PlanKind.FAILOVER, PlanKind.SWITCHOVER, PlanKind.FAILBACK, PlanKind.DRILL)] == [
        False, True, True, True,
    ]  # fmt: skip


def test_failing_checks_are_told_apart() -> None:
    assert [check.name for check in a_plan().evidence.failing] == ["holder"]


@given(st.floats(0, 1e6), st.integers(0, 10**6), st.floats(0, 1e3), st.integers(0, 10**4))
def test_no_loss_exceeds_itself_and_no_tolerance_makes_a_smaller_loss_worse(
    seconds: float, records: int, tolerance_seconds: float, tolerance_records: int
) -> None:
    loss = Loss(False, records, True, seconds, "x")
    smaller = replace(loss, seconds=seconds / 2, records=records // 2, records_unknown=False)
    for one in (loss, smaller, NO_LOSS):
        assert one.exceeds(loss, tolerance_seconds=tolerance_seconds, tolerance_records=tolerance_records) is None
