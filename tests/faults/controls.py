"""The checkers' own test: mutants of a real history, each of which its checker has to notice.

Run on what a run has recorded, so that they also show that the recording carries what the checkers look at: a mutant that goes
unnoticed on a real history would mean that a real violation of that kind would, too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from controller.adapters.memory.traffic import ZoneVersion
from controller.domain.model import Head
from tests.faults import recorded as seen
from tests.faults.linear import linearizable
from tests.faults.recorded import STREAM, Recorded
from tests.simulation.checkers import CHECKERS, Violation
from tests.simulation.events import HeadMoved, Transaction


@dataclass(frozen=True, slots=True)
class Mutant:
    """``change`` returns False when the history has nothing of the kind (no promotion, for example)."""

    what: str
    checker: str
    change: Callable[[Recorded], bool]


def copied(record: Recorded) -> Recorded:
    """A history that may be changed."""
    other = copy.copy(record)
    other.history = copy.copy(record.history)
    for name in ("heads", "puts", "transactions", "acks"):
        setattr(other.history, name, list(getattr(record.history, name)))
    other.cluster = copy.copy(record.cluster)
    other.cluster._items = dict(record.cluster._items)
    other.servers = {region: server.copy() for region, server in record.servers.items()}
    other.zone = seen.RecordedZone(record.zone.name, list(record.zone.history))
    other.observed = list(record.observed)
    return other


MUTANTS: list[Mutant] = []


def mutant(what: str, checker: str) -> Callable[[Callable[[Recorded], bool]], None]:
    def add(change: Callable[[Recorded], bool]) -> None:
        MUTANTS.append(Mutant(what, checker, change))

    return add


@mutant("a record that two stores had is not in the live history", "nothing-lost")
def _(record: Recorded) -> bool:
    record.history.acks.append(replace(record.acks[-1], id="never-written", copies=2))
    return True


@mutant("a record has another body than was acknowledged", "nothing-lost")
def _(record: Recorded) -> bool:
    n = next(n for n, ack in enumerate(record.acks) if ack.copies == 2)
    record.history.acks[n] = replace(record.acks[n], body=b"something else")
    return True


@mutant("a record that one store had is gone, and nobody approved a loss", "promised-loss")
def _(record: Recorded) -> bool:
    record.history.acks.append(replace(record.acks[-1], id="never-written", copies=1))
    return True


@mutant("an acknowledgement comes after the holder's key had gone", "acks-within-right")
def _(record: Recorded) -> bool:
    record.history.acks[-1] = replace(record.acks[-1], late_by=0.2)
    return True


@mutant("an older epoch acknowledges after a newer one did", "acks-within-right")
def _(record: Recorded) -> bool:
    record.history.acks.append(replace(record.acks[-1], epoch=record.acks[-1].epoch - 1, new=True))
    return True


@mutant("a committed segment is missing in one store", "stores-whole")
def _(record: Recorded) -> bool:
    region, server = next(iter(record.servers.items()))
    head = server.head(STREAM)
    server.objects.pop(next(ref for ref in server.objects if ref.seq == head.seq // 2 and head.owner(ref.seq) == ref.epoch))
    return bool(region)


@mutant("a store's epoch goes back", "stores-fenced")
def _(record: Recorded) -> bool:
    last = record.history.heads[-1]
    record.history.heads.append(HeadMoved(10**9, last.at, last.region, last.after, Head(STREAM, epoch=last.after.epoch - 1)))
    return True


@mutant("a fenced writer changes a head", "stores-fenced")
def _(record: Recorded) -> bool:
    last = record.history.heads[-1]
    late = replace(last.after, seq=last.after.seq + 1, writer=f"{last.region}/a/{last.after.epoch - 1}")
    record.history.heads.append(HeadMoved(10**9, last.at, last.region, last.after, late))
    return True


@mutant("a segment object is overwritten", "objects-immutable")
def _(record: Recorded) -> bool:
    record.history.puts.append(replace(record.history.puts[-1], sha256="other"))
    return True


def _zone(record: Recorded, change: Callable[[dict[str, Any]], dict[str, Any]]) -> bool:
    last = record.zone.history[-1]
    records = tuple(change(dict(one)) for one in last.records)
    at = last.at if math.isfinite(last.at) else 0.0
    record.zone.history.append(ZoneVersion(at + 1.0, "", records, last.copy))
    return True


@mutant("the zone's epoch goes back", "dns-safe")
def _(record: Recorded) -> bool:
    zero = {"ResourceRecords": [{"Value": '"0"'}]}
    known = [dict(one) for one in record.zone.history[-1].records if one["Type"] == "TXT"]
    at_zero = known[0]["ResourceRecords"][0]["Value"] == '"0"'
    return not at_zero and _zone(record, lambda one: {**one, **zero} if one["Type"] == "TXT" else one)


@mutant("the name has weights of zero only", "dns-safe")
def _(record: Recorded) -> bool:
    return _zone(record, lambda one: {**one, "Weight": 0} if "Weight" in one else one)


def _transactions(record: Recorded, wanted: Callable[[Transaction], bool], **changes: Any) -> bool:
    for n, entry in enumerate(record.history.transactions):
        if wanted(entry):
            record.history.transactions[n] = replace(entry, **changes)
            return True
    return False


def _moved(entry: Transaction) -> bool:
    before, after = entry.authority or (None, None)
    return before is not None and after is not None and before.region != after.region


@mutant("the authority moves without approvals", "people-approved")
def _(record: Recorded) -> bool:
    return _transactions(record, _moved, approvals=())


@mutant("the authority moves without a line in the audit", "audit-whole")
def _(record: Recorded) -> bool:
    return _transactions(record, _moved, audits=0)


@mutant("an entry of the audit is missing", "audit-whole")
def _(record: Recorded) -> bool:
    audits = sorted(key for key in record.cluster._items if key.startswith(record.keys.audits))
    if len(audits) < 3:
        return False
    del record.cluster._items[audits[1]]
    return True


@mutant("an epoch is given out twice", "epochs-unique")
def _(record: Recorded) -> bool:
    acquired = next(entry for entry in record.history.transactions if entry.holder is not None)
    record.history.transactions.append(acquired)
    return True


@mutant("two agents have rights of two epochs at once", "one-active")
def _(record: Recorded) -> bool:
    line = next(line for line in reversed(record.observed) if line["what"] == "ack")
    record.observed.append({**line, "epoch": line["epoch"] + 1, "at": line["until"] - 0.1, "until": line["until"] + 1})
    return True


@mutant("an instance says that it may act while an agent has a right from another one", "one-active")
def _(record: Recorded) -> bool:
    line = next(line for line in reversed(record.observed) if line["what"] == "ack")
    middle = (line["at"] + line["until"]) / 2
    record.observed.append({"what": "active", "region": "nowhere", "instance": "z", "sent": middle, "at": middle + 0.01})
    return True


@mutant("an instance says that it may act after its key had gone", "one-active")
def _(record: Recorded) -> bool:
    record.ends = dict(record.ends)
    claim = next(line for line in reversed(record.observed) if line["what"] == "active")
    mine = [epoch for epoch, owner in record.owners.items() if owner[:2] == (claim["region"], claim["instance"])]
    record.ends[max(mine)] = claim["sent"] - 0.1 - record.lent_seconds
    return True


@mutant("an instance says that it may act after another one of a newer epoch did", "one-active")
def _(record: Recorded) -> bool:
    claim = next(line for line in reversed(record.observed) if line["what"] == "active")
    newest = max(record.owners)
    region, instance, acquired_at = record.owners[newest]
    if (region, instance) != (claim["region"], claim["instance"]):
        return False
    record.owners = {**record.owners, newest - 1: ("nowhere", "z", acquired_at - 60.0)}
    record.observed.append({**claim, "region": "nowhere", "instance": "z", "sent": claim["at"] + 0.1, "at": claim["at"] + 0.2})
    record.ends = {epoch: end for epoch, end in record.ends.items() if epoch != newest - 1}
    return True


@mutant("a name server tells an older epoch", "dns-answers")
def _(record: Recorded) -> bool:
    line = next(line for line in reversed(record.observed) if line["what"] == "dns" and line["type"] == "TXT")
    record.observed.append({**line, "at": line["at"] + 1, "values": [str(int(line["values"][0]) - 1)]})
    return True


@mutant("a name server has no address for the name", "dns-answers")
def _(record: Recorded) -> bool:
    line = next(line for line in record.observed if line["what"] == "dns" and line["type"] == "A")
    record.observed.append({**line, "values": [], "rcode": "NXDOMAIN"})
    return True


@mutant("an agent reads another body than it wrote", "reads-whole")
def _(record: Recorded) -> bool:
    line = next(line for line in record.observed if line["what"] == "read")
    record.observed.append({**line, "whole": False})
    return True


@mutant("a fresh read gives an older record", "linearizable")
def _(record: Recorded) -> bool:
    reads = [line for line in record.observed if line["what"] == "read" and line["agent"].endswith("-1") and line["id"]]
    first, last = reads[0], reads[-1]
    old = next(line for line in reads if line["agent"] == last["agent"])
    record.observed.append({**last, "id": old["id"], "began": last["ended"] + 100, "ended": last["ended"] + 101})
    return bool(first) and old["id"] != last["id"]


@mutant("a compare-and-set succeeds on a value that was gone", "linearizable")
def _(record: Recorded) -> bool:
    done = [line for line in record.observed if line["what"] == "register" and line["op"] == "cas" and line["ended"]]
    if not done:
        return False
    record.observed.append({**done[0], "value": "a second one"})
    return True


def objects(record: Recorded, checker: str) -> bool:
    """Whether that checker does."""
    special: dict[str, Callable[[], None]] = {
        "dns-answers": lambda: seen.dns_answers_safe(record.observed),
        "reads-whole": lambda: seen.reads_whole(record.observed),
    }
    if checker == "linearizable":
        return not all(linearizable(history) for history in seen.registers(record.observed).values())
    try:
        special.get(checker, lambda: CHECKERS[checker](record))()
    except Violation as violation:
        return violation.checker == checker
    return False


def unnoticed(record: Recorded) -> tuple[int, list[str]]:
    """(how many mutants there were something to change for, those that their checker passed over). The history must be good."""
    tried, missed = 0, []
    for one in MUTANTS:
        other = copied(record)
        if not one.change(other):
            continue
        tried += 1
        if not objects(other, one.checker):
            missed.append(f"{one.checker} did not notice that {one.what}")
    return tried, missed
