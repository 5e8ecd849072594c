"""Pieces of the run of many failovers: a machine's cuts on this kernel, what counts, which guards the control takes away."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from controller.adapters import etcdrpc
from controller.cli.lab import read_settings
from controller.domain.model import EpochStart, Forks, Head
from controller.lab.topology import build
from controller.runtime.documents import encode
from tests.faults.machines import machines_of, on_machines
from tests.faults.network import why_not
from tests.faults.partitions import BETWEEN, INSIDE, PARTITIONS, chosen
from tests.faults.recorded import STREAM, EtcdHistory, Recorded
from tests.faults.tally import Journal, Tally, lines_of, percentile

ROOT = Path(__file__).parents[2]
WHY_NOT = why_not()

CUTS = """
import json
from tests.faults.machines import MachineNetwork, machines_of
from tests.faults.network import enter
enter()
network = MachineNetwork(["a", "b"], machines=machines_of(["a", "b"], 1))
network.build()
WAYS = (("a-a", "127.0.1.1"), ("a-a", "127.0.2.1"), ("a-a", "127.0.101.1"), ("b", "127.0.100.1"), ("world", "127.0.100.1"))
import subprocess
def reaches(source, to, port=9):
    argv = (*network.prefix(source), "timeout", "1", "bash", "-c", f"exec 3<>/dev/tcp/{to}/{port}")
    return "refused" in subprocess.run(argv, capture_output=True, text=True).stderr
seen = {}
def look(when):
    seen[when] = [reaches(*way) for way in WAYS]
look("whole")
network.unplug("a-a"); look("unplugged"); network.heal()
network.deafen("a-a"); look("deaf"); network.heal()
network.silence("a-a"); look("mute"); network.heal()
network.isolate("a"); look("region"); network.heal()
network.link_down("a", "b"); look("link"); network.heal()
network.part_from_etcd("a-a", 2379); look("from etcd")
seen["etcd"] = [reaches("a-a", "127.0.2.1", 2379), reaches("a", "127.0.2.1", 2379)]
network.heal(); look("healed")
network.remove()
network.build(); look("built again")
print(json.dumps(seen))
"""


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "possible")
@pytest.mark.slow
def test_a_single_machine_is_cut_off_from_its_neighbours_too_and_from_etcd_alone() -> None:
    ran = subprocess.run([sys.executable, "-c", CUTS], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert ran.stdout, ran.stderr
    assert json.loads(ran.stdout) == {
        "whole": [True] * 5,
        "unplugged": [False] * 5,
        "deaf": [False] * 5,
        "mute": [False] * 5,
        "region": [True, False, False, False, False],
        "link": [True, False, False, False, True],
        "from etcd": [True] * 5,
        "etcd": [False, True],
        "healed": [True] * 5,
        "built again": [True] * 5,
    }


def test_every_controller_is_on_a_machine_of_its_own() -> None:
    settings = read_settings(None)
    machines = machines_of(list(settings["regions"]), 2)
    document = on_machines(settings, machines, {"ttl_seconds": 3})
    urls = [url for region in document["regions"].values() for url in region["controllers"]]
    assert len(set(urls)) == len(machines) == 6
    assert document["etcd"]["ttl_seconds"] == 3
    assert settings["etcd"]["ttl_seconds"] == 5


def test_partitions_are_chosen_by_kind_or_by_the_beginning_of_their_names() -> None:
    assert {one.kind for one in chosen("inside")} == {INSIDE}
    assert [one.name for one in chosen("region-deaf,holder")] == ["holder-stopped", "region-deaf"]
    assert chosen("") == PARTITIONS
    with pytest.raises(ValueError, match="region-deaf"):
        chosen("no-such")


def _failover(kind: str, took: float, group: str = "1") -> dict[str, Any]:
    return {"group": group, "kind": kind, "partition": f"{kind}-x", "took": took, "phases": {"lease": took / 2}}


def _verdict(failovers: int, *violations: str, group: str = "1") -> dict[str, Any]:
    counts = dict.fromkeys(("operations", "acknowledgements", "transactions", "segments"), 10 * failovers)
    return {"group": group, "failovers": failovers, "violations": list(violations), "holes": [], "rss_mb": 1.0, **counts}


def test_a_run_is_good_only_when_every_failover_was_judged_and_nothing_was_found(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with path.open("w") as file:
        journal = Journal(file, "1")
        journal.note("failover", **_failover(INSIDE, 5.0))
        journal.note("verdict", **_verdict(1))
        journal.note("failover", **_failover(BETWEEN, 9.0))
        assert not Tally(lines_of([path])).good
        journal.note("verdict", **_verdict(2))
        journal.note("mutants", group="1", tried=23, unnoticed=[])
    with path.open("a") as file:
        file.write('{"what": "fail')  # a run that was killed in the middle of a line
    tally = Tally(lines_of([path]))
    assert tally.good
    assert tally.document()["failovers"] == {INSIDE: 1, BETWEEN: 1}
    assert tally.document()["operations"] == 20
    assert tally.document()["took"]["all"]["longest"] == 9.0


@pytest.mark.parametrize(
    ("what", "fields"),
    [
        ("verdict", _verdict(1, "one-active: two of them")),
        ("problem", {"group": "1", "text": "nobody took over"}),
        ("mutants", {"group": "1", "tried": 23, "unnoticed": ["one-active did not notice"]}),
    ],
)
def test_a_violation_a_standstill_and_an_unnoticed_mutant_each_fail_a_run(what: str, fields: dict[str, Any]) -> None:
    journal = Journal(StringIO(), "1")
    journal.note("failover", **_failover(INSIDE, 5.0))
    journal.note(what, **fields)
    journal.note("verdict", **_verdict(1))
    assert not Tally(journal.lines).good


def test_what_several_groups_wrote_down_adds_up() -> None:
    journals = [Journal(StringIO(), str(run)) for run in range(2)]
    for number, journal in enumerate(journals):
        journal.note("failover", **_failover(INSIDE, 5.0 + number, group=str(number)))
        journal.note("verdict", **_verdict(1, group=str(number)))
    tally = Tally([line for journal in journals for line in journal.lines])
    assert tally.good
    assert tally.judged == 2
    assert tally.groups == 2
    assert tally.counts["operations"] == 20


def test_the_longest_of_a_hundred_is_no_percentile_of_ninety_nine() -> None:
    assert percentile([float(n) for n in range(1, 101)], 0.99) == 99.0
    assert percentile([], 0.5) == 0.0


class TwoMoments(Recorded):
    """Stores whose first answers are of an epoch whose fork the watchers tell only afterwards."""

    reads = 0

    def _head(self, region: str) -> Head:
        self.reads += 1
        if self.reads == len(self.servers):
            self._watched._take(_fork(self, 3, EpochStart(1, 1), EpochStart(2, 5)))
        return Head(STREAM, seq=self.reads, epoch=2, epochs=(EpochStart(1, 1), EpochStart(2, 5)))


def _fork(record: Recorded, revision: int, *starts: EpochStart) -> Any:
    answer = etcdrpc.WatchResponse()
    event = answer.events.add()
    event.kv.key, event.kv.value = record.keys.forks(STREAM).encode(), encode(Forks(starts))
    event.kv.mod_revision = event.kv.create_revision = revision
    return answer.events


def test_heads_of_an_epoch_whose_fork_was_not_heard_of_are_read_again(tmp_path: Path) -> None:
    topology = build(read_settings(None), tmp_path, wan=False)
    record = TwoMoments(topology, tmp_path, 0, EtcdHistory([], "/dr/"))
    record._watched._take(_fork(record, 2, EpochStart(1, 1)))
    with ThreadPoolExecutor(1) as pool:
        record._collect_moment(list(record.servers), pool)
    assert record._forks().starts == (EpochStart(1, 1), EpochStart(2, 5))
    assert sorted(server.head(STREAM).seq for server in record.servers.values()) == [4, 5, 6]


UNGUARDED = """
from controller.domain.lease import Right
from tests.faults.unguarded import CONTROLS
over = Right(epoch=1, deadline=5.0)
assert not over.allows(6.0) and over.remaining_seconds(6.0) == 0.0
CONTROLS["deadline"].remove()
assert over.allows(6.0) and over.leased(6.0) and over.remaining_seconds(6.0) > 0.0
assert not Right(epoch=1, deadline=5.0, lost="key gone").allows(1.0)
from controller.adapters.head_item import advance_update
from controller.domain.model import GENESIS, Commit, Fence
def condition():
    commit = Commit(prev_seq=0, prev_chain=GENESIS, seq=1, chain=GENESIS, starts=(), received_at=0.0, records=1, bytes=1)
    return advance_update("fleet", Fence("s00", 1, "a", "a"), commit)["ConditionExpression"]
assert "#epoch = :e" in condition()
CONTROLS["fence"].remove()
assert "#epoch = :e" not in condition() and "#chain = :was_chain" in condition()
"""


def test_the_control_takes_a_guard_away_from_the_running_product() -> None:
    """In a process of its own: it stays taken away."""
    subprocess.run([sys.executable, "-c", UNGUARDED], cwd=ROOT, timeout=100, check=True)
