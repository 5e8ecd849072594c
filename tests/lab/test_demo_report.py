"""The report tells loss, exactness and salvage right, and says no where something is wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from controller.domain.model import EpochStart, Head, Salvage
from controller.lab.demo_evidence import measured, salvage_refs
from controller.lab.demo_ledger import Ledgers
from controller.lab.demo_report import (
    AgentOutcome,
    Promise,
    RealLoss,
    Resumed,
    Stored,
    Written,
    checks,
    outcomes,
    phases,
    real_loss,
    unsalvaged,
)
from controller.lab.hosts import AgentHostPlace


def written(agent: str, number: int, copies: int = 1) -> Written:
    return Written(agent, f"{number:08d}", f"hash-{agent}-{number}", copies, 100.0 + number)


def stored(agent: str, number: int) -> Stored:
    return Stored(agent, f"{number:08d}", f"hash-{agent}-{number}", number)


def resumed(agent: str, number: int) -> Resumed:
    return Resumed(agent, "us", f"{number:08d}", f"hash-{agent}-{number}", 200.0)


def test_real_loss_is_what_was_acknowledged_and_did_not_survive() -> None:
    acknowledged = [written("a", n) for n in range(1, 6)] + [written("b", n, copies=2) for n in range(1, 4)]
    survived = [stored("a", n) for n in range(1, 4)] + [stored("b", n) for n in range(1, 4)]
    loss = real_loss(acknowledged, survived)
    assert (loss.records, loss.durable_lost, loss.seconds) == (2, 0, 1.0)
    assert [w.id for w in loss.lost] == ["00000004", "00000005"]


def test_a_record_that_survived_with_another_content_is_lost() -> None:
    assert real_loss([written("a", 1)], [Stored("a", "00000001", "other", 1)]).records == 1


def test_a_lost_checkpoint_with_two_copies_is_counted() -> None:
    assert real_loss([written("a", 1, copies=2)], []).durable_lost == 1


def test_an_agent_must_resume_from_the_very_last_checkpoint_in_the_target_hash_for_hash() -> None:
    acknowledged = [written(agent, n) for agent in "abcd" for n in range(1, 4)]
    survived = [stored(agent, n) for agent in "abcd" for n in range(1, 3)]
    wrong = Resumed("c", "us", "00000002", "other", 200.0)
    elsewhere = Resumed("d", "eu", "00000002", "hash-d-2", 200.0)
    found = outcomes(
        ["a", "b", "c", "d", "e"], acknowledged, [resumed("a", 2), resumed("b", 1), wrong, elsewhere], survived, "us"
    )
    assert [outcome.exact for outcome in found] == [True, False, False, False, False]
    assert (found[0].last_acknowledged, found[0].resumed, found[0].lost_records) == ("00000003", "00000002", 1)


def test_a_checkpoint_that_survived_without_its_acknowledgement_is_the_one_to_resume_from() -> None:
    found = outcomes(["a"], [written("a", 1)], [resumed("a", 2)], [stored("a", 1), stored("a", 2)], "us")
    assert (found[0].exact, found[0].lost_records) == (True, 0)


def test_the_first_start_in_the_target_counts_and_not_a_later_one() -> None:
    late = Resumed("a", "us", "00000002", "hash-a-2", 300.0)
    assert not outcomes(["a"], [], [late, resumed("a", 1)], [stored("a", 1), stored("a", 2)], "us")[0].exact


def test_phases_span_all_instances_that_worked_on_a_step_and_leave_out_what_did_not_end() -> None:
    journal = [
        {"step": "fence", "started_at": 10.0, "finished_at": 0.0},
        {"step": "fence", "started_at": 14.0, "finished_at": 15.5},
        {"step": "report", "started_at": 16.0, "finished_at": 0.0},
    ]
    assert phases(journal) == {"fence": 5.5}


STORES = ("eu", "us")
GOOD: dict[str, Any] = {
    "promised": Promise(3, False, 5.0, False),
    "real": RealLoss(2, 1.0, (), 0),
    "agents": [AgentOutcome("a", "2", "2", 0, 0.0, True)],
    "missing_salvage": (),
    "salvaged_records": 2,
    "refusals": [
        {"target": name, "attempt": attempt, "outcome": "refused"}
        for name in ("store:eu", "store:us", "traffic")
        for attempt in ("remembered", "re-read")
    ],
    "stores": STORES,
    "active": ["us/a"],
    "target": "us",
    "most_active": 1,
    "lag_seconds": {"eu": 0.3},
    "rpo_seconds": 5.0,
    "resolved_region": "us",
}


def failing(**changed: Any) -> Sequence[str]:
    return [check.name for check in checks(**{**GOOD, **changed}) if not check.ok]


def test_a_good_run_holds_every_check() -> None:
    assert failing() == []


def test_each_violation_fails_the_check_that_names_it() -> None:
    assert failing(promised=Promise(1, False, 5.0, False)) == ["promised records >= real"]
    assert failing(promised=Promise(1, True, 5.0, False)) == [], "an unknown number was promised as such"
    assert failing(promised=Promise(3, False, 0.5, False)) == ["promised seconds >= real"]
    assert failing(real=RealLoss(2, 1.0, (), 1)) == ["no checkpoint with copies >= 2 lost"]
    assert failing(agents=[]) == ["every agent resumed from the last checkpoint in the target"]
    assert failing(active=["us/a", "eu/b"]) == ["exactly one active controller"]
    assert failing(active=[]) == ["exactly one active controller"]
    assert failing(active=["eu/a"]) == ["exactly one active controller"]
    assert failing(most_active=2) == ["never two active at once"]
    assert failing(resolved_region="eu") == ["the name leads to the target"]
    assert failing(lag_seconds={"eu": None}) == ["lag of every other region within the RPO"]
    assert failing(lag_seconds={"eu": 5.1}) == ["lag of every other region within the RPO"]
    assert failing(lag_seconds={}) == ["lag of every other region within the RPO"]
    assert failing(missing_salvage=[written("a", 1)]) == ["everything lost is in the salvage"]


def test_a_late_writer_that_was_not_refused_everywhere_fails() -> None:
    name = "late writers refused at every store and at Route 53"
    refusals = list(GOOD["refusals"])
    assert failing(refusals=[]) == [name]
    assert failing(refusals=[r for r in refusals if r["target"] != "traffic"]) == [name]
    assert failing(refusals=[*refusals, {"target": "store:us", "attempt": "remembered", "outcome": "ACCEPTED"}]) == [name]
    assert failing(refusals=[{**r, "outcome": "unavailable"} if r["target"] == "store:eu" else r for r in refusals]) == [name]


def test_salvage_is_read_under_the_epochs_that_owned_it_and_must_hold_what_was_lost() -> None:
    tail = Salvage(5, 7, (EpochStart(1, 1), EpochStart(2, 7)), "c" * 64, 3)
    refs = salvage_refs(Head("s", seq=4, salvage=(tail,)))
    assert [(ref.seq, ref.epoch) for ref in refs] == [(5, 1), (6, 1), (7, 2)]
    assert unsalvaged([written("a", 1), written("a", 2)], [stored("a", 1)]) == (written("a", 2),)


def test_unknown_is_not_zero() -> None:
    assert measured({"since": 0.0, "why": "x"}) is None
    assert measured(0) == 0.0


def test_ledgers_are_read_by_region_and_a_line_that_was_cut_off_is_no_promise(tmp_path: Path) -> None:
    hosts = [AgentHostPlace(r, f"{r}-1", 1, 1.0, 1.0, tmp_path / f"{r}.jsonl", tmp_path / f"{r}.json") for r in ("eu", "us")]
    ack = {
        "event": "ack",
        "agent": "a",
        "kind": "checkpoint",
        "id": "1",
        "sha256": "h",
        "copies": 2,
        "at": 2.0,
        "acked_at": 2.0,
    }
    task = {**ack, "kind": "task", "id": "t"}
    hosts[0].ledger.write_text("\n".join(json.dumps(line) for line in (ack, task)) + '\n{"event": "ack", "agent": "a", "ki')
    hosts[1].ledger.write_text(
        json.dumps({"event": "resume", "agent": "a", "id": "1", "sha256": "h", "at": 3.0})
        + "\n"
        + json.dumps({"event": "unacknowledged", "agent": "a", "id": "2", "code": "unavailable", "copies": 2, "at": 4.0})
    )
    ledgers = Ledgers(hosts)
    assert ledgers.acknowledged() == [Written("a", "1", "h", 2, 2.0)]
    assert ledgers.acknowledged("us") == []
    assert ledgers.resumptions() == [Resumed("a", "us", "1", "h", 3.0)]
    assert [u.id for u in ledgers.unacknowledged("us")] == ["2"]
