"""What judges real runs, judged: no root, no servers, no time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from controller.lab.etcd import EtcdBinary
from tests.faults import recorded
from tests.faults.faults import playable
from tests.faults.linear import Operation, linearizable
from tests.faults.network import Network, why_no_disks
from tests.faults.recorded import (
    Claim,
    _overlapping_rights,
    claims_too_late,
    dns_answers_safe,
    reads_whole,
    registers,
    still_open,
)
from tests.faults.runner import named
from tests.simulation.checkers import Violation

NEVER = math.inf


@pytest.mark.parametrize(
    ("history", "good"),
    [
        ([Operation("write", "a", 0, 1), Operation("read", "a", 2, 3)], True),
        ([Operation("read", "", 0, 5), Operation("write", "a", 1, 2), Operation("read", "a", 3, 4)], True),
        ([Operation("write", "a", 0, 1), Operation("write", "b", 2, 3), Operation("read", "a", 4, 5)], False),
        # an unknown outcome: it may come late, or never, but it cannot be taken back
        ([Operation("write", "a", 0, 1), Operation("write", "b", 2, NEVER), Operation("read", "a", 9, 10)], True),
        (
            [
                Operation("write", "a", 0, 1),
                Operation("write", "b", 2, NEVER),
                Operation("read", "a", 4, 5),
                Operation("read", "b", 6, 7),
            ],
            True,
        ),
        (
            [
                Operation("write", "a", 0, 1),
                Operation("write", "b", 2, NEVER),
                Operation("read", "b", 4, 5),
                Operation("read", "a", 6, 7),
            ],
            False,
        ),
        # two compare-and-sets from one value: only one of them can have succeeded
        ([Operation("cas", "a", 0, 9, ""), Operation("cas", "b", 0, 9, "")], False),
        ([Operation("cas", "a", 0, 9, ""), Operation("refused", "b", 0, 9, "")], True),
        ([Operation("refused", "b", 0, 1, ""), Operation("cas", "a", 2, 3, "")], False),
        ([Operation("cas", "b", 4, 5, "a"), Operation("cas", "a", 0, NEVER, ""), Operation("read", "b", 6, 7)], True),
    ],
)
def test_an_order_is_found_exactly_when_there_is_one(history: list[Operation], good: bool) -> None:
    assert linearizable(history) is good


def test_a_hundred_concurrent_operations_are_judged_at_once() -> None:
    history = [Operation("cas", str(n + 1), n, n + 3.5, str(n) if n else "") for n in range(100)]
    assert linearizable(history)
    assert not linearizable([*history, Operation("read", "50", 90, 91)])


def _ack(epoch: int, at: float, until: float) -> dict[str, object]:
    return {"what": "ack", "epoch": epoch, "at": at, "until": until}


def test_rights_of_two_epochs_at_once_are_noticed_and_rights_one_after_the_other_are_not() -> None:
    apart = [_ack(1, 0.0, 4.0), _ack(1, 3.0, 7.0), _ack(2, 7.5, 11.0)]
    assert _overlapping_rights(apart) == []
    assert len(_overlapping_rights([*apart, _ack(2, 6.9, 10.0)])) == 1


def _dns(rtype: str, at: float, *values: str, rcode: str = "NOERROR") -> dict[str, object]:
    return {"what": "dns", "type": rtype, "values": list(values), "rcode": rcode, "at": at}


def test_answers_of_name_servers_may_be_missing_but_never_empty_and_never_older() -> None:
    good = [_dns("A", 1, "127.0.1.1"), _dns("TXT", 2, "1"), _dns("A", 3, rcode="SERVFAIL"), _dns("TXT", 4, "3")]
    dns_answers_safe(good)
    with pytest.raises(Violation, match="from 3 to 2"):
        dns_answers_safe([*good, _dns("TXT", 5, "2")])
    with pytest.raises(Violation, match="NXDOMAIN without"):
        dns_answers_safe([*good, _dns("A", 5, rcode="NXDOMAIN")])


def test_a_body_that_nobody_wrote_is_noticed() -> None:
    line = {"what": "read", "agent": "x-0", "id": "1", "whole": True}
    reads_whole([line])
    with pytest.raises(Violation):
        reads_whole([line, {**line, "whole": False}])


def test_a_put_that_was_repeated_is_one_operation_from_its_first_try_on() -> None:
    lines = [
        {"what": "failed", "agent": "x-1", "id": "1", "began": 1.0, "ended": 2.0},
        {"what": "ack", "agent": "x-1", "id": "1", "began": 3.0, "at": 4.0},
        {"what": "failed", "agent": "x-1", "id": "2", "began": 5.0, "ended": 6.0},
        {"what": "ack", "agent": "x-0", "id": "1", "began": 3.0, "at": 4.0},
    ]
    assert registers(lines) == {"x-1": [Operation("write", "1", 1.0, 4.0), Operation("write", "2", 5.0, NEVER)]}


def test_who_says_that_it_may_act_after_its_right_or_after_a_newer_epoch_did_is_noticed() -> None:
    old, new = Claim(1.0, 1.1, 1, "x/a"), Claim(5.0, 5.1, 2, "x/b")
    ends = {1: 4.0}
    assert claims_too_late([old, new], lambda epoch: ends.get(epoch, NEVER)) == []
    late = Claim(4.2, 4.3, 1, "x/a")  # its key had gone
    assert "epoch 1 had ended" in claims_too_late([old, late, new], lambda epoch: ends.get(epoch, NEVER))[0]
    beside = Claim(5.05, 5.2, 1, "x/a")  # may have been answered before the other one
    assert claims_too_late([old, new, beside], lambda epoch: NEVER) == []
    after = Claim(5.2, 5.3, 1, "x/a")
    assert "so had epoch 2" in claims_too_late([old, new, after], lambda epoch: NEVER)[0]


def test_a_register_is_judged_once_every_worker_has_gone_past_it() -> None:
    refused = {"what": "register", "by": "a", "key": "k", "op": "refused", "value": "y", "was": "", "began": 1.0, "ended": 2.0}
    later = {"what": "register", "key": "l", "op": "read", "value": "", "was": "", "began": 50.0, "ended": 51.0}
    unread = {**refused, "by": "b", "op": "cas", "value": "x", "ended": 1.5}
    early = [refused, {**unread, "key": "before", "began": 0.1, "ended": 0.2}]
    for lines in (early, [*early, {**later, "by": "a"}]):  # b's line may still lie in its file
        assert not linearizable(registers(lines)["k"])
        assert "k" in still_open(lines, registers(lines))
    whole = [*early, unread, {**later, "by": "a"}, {**later, "by": "b"}]
    assert still_open(whole, registers(whole)) == {"l"}
    assert linearizable(registers(whole)["k"])


def test_a_line_that_was_cut_off_is_read_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    lines = recorded.Lines()
    path.write_text('{"n": 1}\n{"n"')
    assert lines.new(path) == [{"n": 1}]
    with path.open("a") as file:
        file.write(": 2}\n")
    assert lines.new(path) == [{"n": 2}]


def test_every_two_places_have_a_link_of_their_own() -> None:
    network = Network(["a", "b", "c"])
    assert len(network.pairs) == 6
    assert len({network._hop(*pair) for pair in network.pairs}) == 6
    assert network.prefix("a") == ("nsenter", "--net=/run/netns/a", "--")
    assert network.prefix("") == network.prefix("world") == ()


def test_a_fault_that_does_not_exist_is_refused_with_the_list() -> None:
    assert [fault.name for fault in named(["kill-holder"])] == ["kill-holder"]
    with pytest.raises(ValueError, match="isolate-home-rules"):
        named(["no-such"])


def test_a_fault_that_an_old_etcd_does_not_survive_is_left_out_with_the_reason() -> None:
    old, new = (EtcdBinary(Path("/etcd"), version) for version in ("3.5.1", "3.5.16"))
    frozen = [fault for fault in named(["etcd-disk-frozen"]) if fault.trustworthy]
    assert len(frozen) == 1
    kept, why = playable(frozen, old)
    assert not kept
    assert "3.5.1 revokes leases" in why[0] or "missing" in why[0]
    if not why_no_disks():
        assert playable(frozen, new) == (frozen, [])


def test_a_value_whose_writer_was_killed_before_its_line_explains_what_others_read() -> None:
    read = {"what": "register", "key": "k", "op": "read", "value": "lost", "was": "", "began": 1.0, "ended": 2.0}
    after = {"what": "register", "key": "k", "op": "cas", "value": "next", "was": "lost", "began": 3.0, "ended": 4.0}
    back = {**read, "began": 5.0, "ended": 6.0}
    assert linearizable(registers([read, after])["k"])
    assert not linearizable(registers([read, after, back])["k"])
