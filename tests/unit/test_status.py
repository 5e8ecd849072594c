"""One answer for the on-call engineer: what is going on, what to type next, and nothing that is not known."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from controller.cli.render import print_status
from controller.domain.model import (
    Authority,
    EpochStart,
    Head,
    Holder,
    Member,
    RegionLag,
    Role,
    Salvage,
    StreamReport,
    Unknown,
)
from controller.domain.promotion import ENDED, PlanRecord, State
from controller.domain.sealing import KmsSeen
from controller.ports import TrafficState
from controller.runtime.metrics import Metrics
from controller.runtime.service import Incident, RegionStatus, Status
from controller.runtime.status import Observation, compose
from tests.unit.test_plan import a_plan

NOW = 1_000.0
HOME, NEAR, FAR = "eu-west-1", "eu-central-1", "us-east-1"
REGIONS = (HOME, NEAR, FAR)
DEAD = Unknown(900.0, "no answer in 2 s")
SALVAGE = Salvage(9, 12, (EpochStart(3, 9),), "a" * 64, 4)


def a_lag(region: str, seconds: float | Unknown = 0.5) -> RegionLag:
    return RegionLag(region, 10, 1, 2, 200, seconds, 10)


def a_report(stream: str = "0", **changes: Any) -> StreamReport:
    base = StreamReport(
        stream, HOME, "a", 4, 999.0, 11, 11, 40, (a_lag(NEAR), a_lag(FAR, 0.75)), 0.5, 2, protected=(NEAR, FAR)
    )  # fmt: skip
    return replace(base, **changes)


def a_member(region: str, instance: str) -> Member:
    return Member(region, instance, f"http://{instance}", Role.STANDBY, 1.0, NOW, "1", "f")


def seen(**changes: Any) -> Observation:
    base = Observation(
        group="fleet",
        region=NEAR,
        instance="b",
        role=Role.STANDBY,
        now=NOW,
        authority=Authority(HOME, 4, REGIONS),
        holders=(Holder("0", HOME, "a", 4, "http://a", 1.0),),
        members=(a_member(HOME, "a"), a_member(NEAR, "b"), a_member(NEAR, "c")),
        reports={"0": a_report()},
        heads={"0": {HOME: Head("0", 11), NEAR: Head("0", 10, salvage=(SALVAGE,)), FAR: DEAD}},
        traffic=TrafficState({HOME: 100, NEAR: 0}, 4),
        plans=(),
        incidents=(),
        agents=7,
        right_seconds=0.0,
        rpo_seconds=5.0,
        rpo_policy="alert",
        fresh_seconds=3.0,
        positions={},
        warnings=(),
        regions=REGIONS,
    )
    return replace(base, **changes)


def a_record(state: State = State.AWAITING_APPROVAL, plan: str = "p1") -> PlanRecord:
    return PlanRecord(a_plan(id=plan), "d", state, 1.0, "because")


def region(status: Status, name: str) -> RegionStatus:
    return next(found for found in status.regions if found.region == name)


# ------------------------------------------------------------------------------------------------------------- in one sentence


@pytest.mark.parametrize(
    ("changes", "sentence", "command"),
    [
        ({}, f"{HOME} is active in epoch 4 (a); exposure 0.5 s within the RPO of 5 s", "nothing to do"),
        ({"reports": {"0": a_report(exposure_seconds=7.25)}}, "exposure 7.2 s is over the RPO of 5 s", "drctl lag --watch"),
        ({"reports": {"0": a_report(exposure_seconds=DEAD)}}, "exposure is unknown: no answer in 2 s", "drctl lag --watch"),
        ({"reports": {}}, "exposure is unknown: no holder has reported yet", "drctl lag --watch"),
        ({"reports": {"0": a_report(at=900.0)}}, "exposure is unknown: the holder", "drctl lag --watch"),
        ({"incidents": (Incident("i", "k", "t", "d", 1.0, "b"),) * 2}, "2 open incidents", "drctl incidents"),
        ({"holders": ()}, f"{HOME} has the authority and nobody holds it", "drctl plan failover"),
        ({"holders": DEAD}, f"{HOME} has the authority and nobody holds it", "drctl plan failover"),
        ({"authority": DEAD}, f"etcd does not answer {NEAR}: no answer in 2 s", "another region"),
        ({"holders": (), "plans": (a_record(),)}, "plan p1 to eu-central-1 waits for approval", "drctl plan show p1"),
        (
            {"plans": (a_record(State.CATCHING_UP),)},
            "plan p1 moves the fleet to eu-central-1: catching-up (because)",
            "show p1",
        ),
    ],
)
def test_the_sentence_says_what_is_going_on_and_the_command_what_to_do(
    changes: dict[str, Any], sentence: str, command: str
) -> None:
    status = compose(seen(**changes))
    assert sentence in status.sentence
    assert command in status.next


@pytest.mark.parametrize("state", sorted(set(State) - ENDED - {State.AWAITING_APPROVAL}))
def test_a_plan_that_runs_is_what_people_want_to_know_first(state: State) -> None:
    status = compose(seen(plans=(a_record(plan="waits"), a_record(state, "runs")), holders=(), reports={}))
    assert f"plan runs moves the fleet to eu-central-1: {state}" in status.sentence
    assert status.next == "drctl plan show runs"


def test_a_plan_that_waits_says_nothing_while_its_region_is_active() -> None:
    assert "is active in epoch 4" in compose(seen(plans=(a_record(),))).sentence


# ---------------------------------------------------------------------------------------------------------------- exposure


def test_the_groups_exposure_is_the_worst_stream_in_seconds_and_the_sum_in_records() -> None:
    status = compose(seen(reports={"0": a_report(), "1": a_report("1", exposure_seconds=2.5, exposure_records=9)}))
    assert (status.exposure_seconds, status.exposure_records) == (2.5, 11)


@pytest.mark.parametrize("order", [("0", "1"), ("1", "0")])
def test_one_stream_that_is_unknown_makes_the_group_unknown(order: tuple[str, str]) -> None:
    reports = {"0": a_report(exposure_seconds=99.0), "1": a_report("1", at=990.0)}
    status = compose(seen(reports={stream: reports[stream] for stream in order}))
    assert isinstance(status.exposure_seconds, Unknown)
    assert isinstance(status.exposure_records, Unknown)
    assert status.exposure_seconds.since == 990.0


def test_without_a_report_nothing_is_said_to_be_zero() -> None:
    status = compose(seen(reports={}))
    assert isinstance(status.exposure_seconds, Unknown)
    assert isinstance(status.exposure_records, Unknown)
    assert region(status, NEAR).lag is None
    assert isinstance(region(status, NEAR).protected, Unknown)


def test_a_stream_that_nobody_has_reported_makes_the_group_unknown() -> None:
    heads = {"0": seen().heads["0"], "1": {NEAR: Head("1", 5)}}
    status = compose(seen(heads=heads))
    assert isinstance(status.exposure_seconds, Unknown)
    assert isinstance(status.exposure_records, Unknown)
    assert region(status, NEAR).protected is not True


# ----------------------------------------------------------------------------------------------------------------- regions


def test_the_active_region_is_the_one_that_has_the_authority_and_holds_it() -> None:
    assert [found.active for found in compose(seen()).regions] == [True, False, False]
    assert not any(found.active for found in compose(seen(holders=())).regions)
    assert not any(found.active for found in compose(seen(holders=DEAD)).regions)
    assert not any(found.active for found in compose(seen(authority=DEAD)).regions)
    elsewhere = compose(seen(holders=(Holder("0", NEAR, "b", 5, "http://b", 1.0),)))
    assert not any(found.active for found in elsewhere.regions)  # a stale holder in another region makes none active


def test_each_region_is_shown_with_its_lag_weight_members_and_salvage() -> None:
    status = compose(seen())
    near, far, home = region(status, NEAR), region(status, FAR), region(status, HOME)
    assert (near.lag, near.weight, near.members, near.salvage) == (a_lag(NEAR), 0, 2, (SALVAGE,))
    assert (far.lag, far.weight, far.members, far.heads) == (a_lag(FAR, 0.75), 0, 0, {"0": DEAD})
    assert (home.lag, home.weight, home.members) == (None, 100, 1)


def test_the_worst_streams_lag_is_shown_and_unknown_is_worse_than_any_number() -> None:
    slow = a_report("1", regions=(a_lag(NEAR, 9.0), a_lag(FAR, DEAD)))
    for reports in ({"0": a_report(), "1": slow}, {"1": slow, "0": a_report()}):
        status = compose(seen(reports=reports))
        near, far = region(status, NEAR).lag, region(status, FAR).lag
        assert near is not None
        assert far is not None
        assert near.seconds == 9.0
        assert far.seconds == DEAD


def test_a_report_that_is_too_old_says_only_since_when_nothing_is_known() -> None:
    status = compose(seen(reports={"0": a_report(at=900.0)}))
    found = region(status, NEAR)
    assert found.lag is not None
    for value in (found.lag.seconds, found.lag.seq, found.lag.records, found.lag.verified_seq, found.protected):
        assert isinstance(value, Unknown)
        assert value.since == 900.0
    assert region(status, HOME).protected is True


def test_a_region_is_protected_when_every_stream_says_so() -> None:
    both = {"0": a_report(), "1": a_report("1", protected=(NEAR,))}
    status = compose(seen(reports=both, heads={"0": {}, "1": {}}))
    assert (region(status, NEAR).protected, region(status, FAR).protected) == (True, False)


def test_a_zone_that_does_not_answer_makes_weights_unknown_not_zero() -> None:
    status = compose(seen(traffic=DEAD))
    assert all(found.weight == DEAD for found in status.regions)
    assert status.traffic_epoch == DEAD
    assert compose(seen()).traffic_epoch == 4


def test_what_was_seen_is_passed_on() -> None:
    plan, incident = a_record(), Incident("i", "k", "t", "d", 1.0, "b")
    status = compose(seen(plans=(plan,), incidents=(incident,), warnings=("w",), right_seconds=2.5, agents=9))
    assert (status.plans, status.incidents, status.warnings) == ((plan,), (incident,), ("w",))
    assert (status.right_seconds, status.agents, status.role, status.at) == (2.5, 9, Role.STANDBY, NOW)
    assert (status.region, status.instance, status.group) == (NEAR, "b", "fleet")
    assert status.reports == (a_report(),)


# ------------------------------------------------------------------------------------------------------------------- KMS

KMS = (
    KmsSeen(HOME, True, 0.0, "", {"0": 0.0}),
    KmsSeen(NEAR, False, NOW - 90.0, "DisabledException", {"0": NOW - 60.0}, alone=3),
    KmsSeen(FAR, Unknown(0.0, "it was not asked yet"), 0.0, "", {}),
)


def test_each_regions_kms_is_shown_with_what_lacks_it_and_unknown_is_no_yes() -> None:
    (line,) = (line for line in _printed(compose(seen(kms=KMS))).splitlines() if line.startswith("KMS"))
    assert f"{HOME} wraps; {NEAR} HAS NOT WRAPPED for 1 min 30 s (missing for 0); {FAR} never known (it was not" in line
    assert "KMS" not in _printed(compose(seen()))


def _printed(status: Status) -> str:
    written = io.StringIO()
    print_status(Console(file=written, width=200), status)
    return written.getvalue()


def test_metrics_of_kms_say_since_when_and_nothing_where_nobody_knows() -> None:
    metrics = Metrics("g", "r", "i")
    text = metrics.render(Role.ACTIVE, 1.0, {}, 0, {}, (), {}, {}, KMS, now=NOW).decode()
    values = {
        (line.split("{")[0], tuple(re.findall(r'(?:kms|stream)="([^"]*)"', line))): float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith(("dr_kms", "dr_wrap", "dr_objects"))
    }
    assert values == {
        ("dr_kms_unusable_seconds", (HOME,)): 0.0,
        ("dr_kms_unusable_seconds", (NEAR,)): 90.0,
        ("dr_wrap_missing_seconds", (HOME, "0")): 0.0,
        ("dr_wrap_missing_seconds", (NEAR, "0")): 60.0,
        ("dr_objects_of_one_kms", (HOME,)): 0.0,
        ("dr_objects_of_one_kms", (NEAR,)): 3.0,
        ("dr_objects_of_one_kms", (FAR,)): 0.0,
    }
    off = metrics.render(Role.ACTIVE, 1.0, {}, 0, {}, (), {}, {}).decode()
    assert [line for line in off.splitlines() if line.startswith(("dr_kms", "dr_wrap", "dr_objects"))] == []
