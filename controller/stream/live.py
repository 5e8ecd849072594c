"""Which records of an agent its newest state stands on. Retention keeps these, however old; bodies are not looked into.

An agent's log may hold several things side by side: the checkpoints of a graph and of its subgraphs, what their tasks wrote,
keys of a storage, the turns of a conversation. Whoever writes a record says in its ``meta`` how it stands to the others:

| key          | meaning |
| ------------ | ------- |
| ``subject``  | what the record is about: it supersedes earlier records of its kind *and subject*. Absent: of its kind |
| ``rank``     | the greatest rank of a subject counts, then the newest. Absent: the newest |
| ``stays``    | ``1``: superseded by nothing but a record that clears |
| ``needs``    | ``parent``: useless without the record that its ``parent`` names, and so on up the chain |
| ``parent_writes`` | beside ``needs``: so many records were attached to the parent when this one was written; all are needed |
| ``attached`` | ``1``: belongs to the record that its ``parent`` names; live exactly as long as that one |
| ``within``   | id of a record: of interest only while that one is live (a subgraph's step, inside the step of its graph) |
| ``clears``   | ``1``: the agent's log begins anew: earlier records are dead, but for those of the controllers' own kinds |

A record that says nothing is live while it is the newest of its kind; an intent is live while its outcome is unknown. Too much
kept costs space; too little is found out when the state is read (``IncompleteHistory``), never read as empty. Pure.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from controller.domain.fleet import open_intents
from controller.domain.model import Kind, Record
from controller.stream.limits import RESTORED, UPTO

SUBJECT, RANK, STAYS, CLEARS = "subject", "rank", "stays", "clears"
NEEDS, ATTACHED, WITHIN = "needs", "attached", "within"
PARENT_WRITES = "parent_writes"
BY, SEEN = "by", "seen_epoch"
"""Who appends, and the newest epoch that it knew when it wrote or opened the log last: ``domain.fleet.check_overtaken``."""
YES = "1"
PARENT = "parent"
"""The one thing that ``needs`` may name."""
REPEAT = "~"
"""Between an id and the number of its repetition: ``a`` and ``a~1`` are one thing that was said twice."""

_NEVER_CLEARED = frozenset({Kind.TASK, Kind.ASSIGNMENT, Kind.CANARY, Kind.OPENING, Kind.INTENDED, Kind.DONE})
"""An agent's task and its open intents are not part of the conversation that somebody clears."""
_EFFECTS = frozenset({Kind.INTENDED, Kind.DONE})
_RULES = frozenset({SUBJECT, RANK, STAYS, CLEARS, NEEDS, ATTACHED, WITHIN, RESTORED})
_REPETITION = re.compile(rf"{REPEAT}[0-9]+\Z")


def plain(record_id: str) -> str:
    """An id without the number of its repetition."""
    return _REPETITION.sub("", record_id)


def is_ruled(kind: str, meta: Mapping[str, str]) -> bool:
    """Whether it takes more than the newest of each kind to know what is live beside such a record."""
    return kind in _EFFECTS or (bool(meta) and not _RULES.isdisjoint(meta))


def in_force(records: Sequence[Record]) -> list[tuple[int, Record]]:
    """The records that count, with their places, of one agent's records given oldest first.

    A record that gives an earlier state back (``dr.restored_from``) takes the place of everything after ``dr.restored_upto``:
    that is stepped over, and so is the record itself, which only repeats one that counts again. Tasks, assignments and effects
    are no state and always count. Where the last record of that time is not known, the repetition stands for the whole past.
    """
    if not any(RESTORED in record.meta for record in records):
        return list(enumerate(records))
    return [(place, records[place]) for place in _unfold(records)[0]]


def _unfold(records: Sequence[Record]) -> tuple[list[int], set[int]]:
    """Places of the records that count, and of those that say so: the repetitions, and the ends of what they gave back."""
    places = {record.id: place for place, record in enumerate(records)}
    marks = [place for place, record in enumerate(records) if RESTORED in record.meta]
    counted = {place for place, record in enumerate(records) if record.kind in _NEVER_CLEARED}
    pins: set[int] = set()
    end = len(records) - 1
    while end >= 0:
        before = [mark for mark in marks if mark <= end]
        mark = before[-1] if before else -1
        counted.update(range(mark + 1, end + 1))
        if mark < 0:
            break
        upto = places.get(records[mark].meta.get(UPTO, ""), -1)
        pins.add(mark)
        if not 0 <= upto < mark:
            counted.add(mark)
            break
        pins |= {upto, places.get(records[mark].meta[RESTORED], upto)}
        end = upto
    return sorted(counted), pins


def live(records: Sequence[Record]) -> frozenset[str]:
    """Ids to keep, of one agent's records given oldest first."""
    pinned: frozenset[str] = frozenset()
    if any(RESTORED in record.meta for record in records):
        counted, pins = _unfold(records)
        cleared = max((place for place in counted if records[place].meta.get(CLEARS) == YES), default=-1)
        if max(pins) > cleared:
            pinned = frozenset(records[place].id for place in pins)
        records = [records[place] for place in counted]
    return _live(records) | pinned


def _live(records: Sequence[Record]) -> frozenset[str]:
    begins = max((place for place, record in enumerate(records) if record.meta.get(CLEARS) == YES), default=0)
    records = [record for place, record in enumerate(records) if place >= begins or record.kind in _NEVER_CLEARED]
    open_ones = set(open_intents(records))
    by_name: dict[str, list[Record]] = {}
    attached: dict[str, list[Record]] = {}
    for record in records:
        by_name.setdefault(plain(record.id), []).append(record)
        if _is_attached(record):
            attached.setdefault(plain(record.parent or ""), []).append(record)
    todo = [record for record in records if _stands_alone(record) or record.id in open_ones]
    for record in _newest(record for record in records if not _is_attached(record) and record.kind != Kind.INTENDED):
        outer = record.meta.get(WITHIN)
        (todo if outer is None else attached.setdefault(plain(outer), [])).append(record)
    kept: set[str] = set()
    while todo:
        record = todo.pop()
        if record.id in kept:
            continue
        kept.add(record.id)
        todo.extend(attached.get(plain(record.id), ()))
        if record.parent is not None and record.meta.get(NEEDS) == PARENT:
            todo.extend(by_name.get(plain(record.parent), ()))
    return frozenset(kept)


def whole(record: Record, older: Iterable[Record]) -> bool:
    """Whether everything that a record needs is among the agent's ``older`` records, in any order: its parents down to one
    that needs none, and what was attached to each (which may have come before it). A state without a part of its chain is not
    restorable."""
    if record.meta.get(NEEDS) != PARENT:
        return True
    attached: Counter[str] = Counter()
    by_name: dict[str, Record] = {}
    for found in older:
        if _is_attached(found):
            attached[plain(found.parent or "")] += 1
        else:
            by_name.setdefault(plain(found.id), found)
    child = record
    seen: set[str] = set()
    while child.meta.get(NEEDS) == PARENT:
        name = plain(child.parent or "")
        parent = by_name.get(name)
        if parent is None or name in seen or attached[name] < parent_writes(child):
            return False
        seen.add(name)
        child = parent
    return True


def parent_writes(record: Record) -> int:
    """Records attached to the parent that are needed; what is no number is none."""
    count = record.meta.get(PARENT_WRITES, "")
    return int(count) if count.isascii() and count.isdigit() else 0


def _is_attached(record: Record) -> bool:
    return record.meta.get(ATTACHED) == YES and record.parent is not None


def _stands_alone(record: Record) -> bool:
    return record.meta.get(STAYS) == YES or record.meta.get(CLEARS) == YES


def _newest(records: Iterable[Record]) -> list[Record]:
    """One of each kind and subject."""
    found: dict[tuple[str, str], Record] = {}
    for record in records:
        thing = record.kind, record.meta.get(SUBJECT, "")
        before = found.get(thing)
        if before is None or record.meta.get(RANK, "") >= before.meta.get(RANK, ""):
            found[thing] = record
    return list(found.values())
