"""Head <-> DynamoDB item, and the four conditional updates of a head. Pure: builds requests, sends nothing.

The item (documented, because people may have to read it with plain AWS calls when no controller runs):

| attribute                                 | type                                                                            |
| ----------------------------------------- | ------------------------------------------------------------------------------- |
| `pk`, `sk`                                | S: `{group}#{stream}`, `head`                                                   |
| `seq`, `epoch`, `base`, `records`, `bytes`| N                                                                               |
| `chain`, `base_chain`, `writer`           | S                                                                               |
| `received_at`                             | N: seconds since 1970                                                           |
| `epochs`                                  | L of L: `[[epoch, first_seq], …]`                                               |
| `salvage`                                 | L of M: `first_seq`, `last_seq`, `epochs`, `last_chain`, `by_epoch`              |
| `snapshots`                               | S: JSON `[[seq, epoch, chain, sha256], …]`, oldest first; may be absent. A text, |
|                                           | so that a condition can compare all of it                                       |

Every attribute name goes through ``#``, since `bytes`, `records` and others collide, or may one day, with DynamoDB's
reserved words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from controller.domain.model import Baseline, Commit, EpochStart, Fence, Head, NamedSnapshot, Realignment, Salvage
from controller.errors import Corrupt

Attribute = dict[str, Any]
"""DynamoDB's own form of a value: ``{"N": "1"}``, ``{"S": "x"}``, ``{"L": [...]}``, ``{"M": {...}}``."""

SORT_KEY = "head"
ITEM_MAX_BYTES = 400 * 1024
"""DynamoDB's limit. Source: service quotas, "Item size"."""
ITEM_GUARD_BYTES = 380 * 1024
"""We refuse to grow an item past this, so that fencing and advancing still fit when people come to clean it up."""


def head_key(group: str, stream: str) -> dict[str, Attribute]:
    """Primary key of a stream's head."""
    return {"pk": {"S": f"{group}#{stream}"}, "sk": {"S": SORT_KEY}}


def _n(value: int | float) -> Attribute:
    # repr of a float has at most 17 digits, DynamoDB keeps 38: the value comes back exactly.
    return {"N": repr(value)}


def _s(value: str) -> Attribute:
    return {"S": value}


def _starts(epochs: tuple[EpochStart, ...]) -> Attribute:
    return {"L": [{"L": [_n(e.epoch), _n(e.first_seq)]} for e in epochs]}


def _salvage(salvage: Salvage) -> Attribute:
    fields = {
        "first_seq": _n(salvage.first_seq),
        "last_seq": _n(salvage.last_seq),
        "epochs": _starts(salvage.epochs),
        "last_chain": _s(salvage.last_chain),
        "by_epoch": _n(salvage.by_epoch),
    }
    return {"M": fields}


def _snapshots(snapshots: tuple[NamedSnapshot, ...]) -> Attribute:
    return _s(json.dumps([[found.seq, found.epoch, found.chain, found.sha256] for found in snapshots], separators=(",", ":")))


# --------------------------------------------------------------------------------------------------------------- reading


def head_to_item(group: str, head: Head) -> dict[str, Attribute]:
    """The whole item. Used for its size, and by tests and tools; the adapter itself only ever updates."""
    return {
        **head_key(group, head.stream),
        "seq": _n(head.seq),
        "epoch": _n(head.epoch),
        "chain": _s(head.chain),
        "epochs": _starts(head.epochs),
        "base": _n(head.base),
        "base_chain": _s(head.base_chain),
        "salvage": {"L": [_salvage(s) for s in head.salvage]},
        "received_at": _n(head.received_at),
        "records": _n(head.records),
        "bytes": _n(head.bytes),
        "writer": _s(head.writer),
        "snapshots": _snapshots(head.snapshots),
    }


def head_from_item(stream: str, item: Mapping[str, Attribute] | None) -> Head:
    """``Head(stream)`` when there is no item. Attributes that we do not know are ignored. Raises Corrupt naming the
    attribute that is wrong.
    """
    if not item:
        return Head(stream)
    read = _Reader(stream, item)
    return Head(
        stream,
        seq=read.integer("seq"),
        epoch=read.integer("epoch"),
        chain=read.text("chain"),
        epochs=read.starts("epochs"),
        base=read.integer("base"),
        base_chain=read.text("base_chain"),
        salvage=read.salvage(),
        received_at=read.real("received_at"),
        records=read.integer("records"),
        bytes=read.integer("bytes"),
        writer=read.text("writer"),
        snapshots=read.snapshots() if "snapshots" in item else (),
    )


class _Reader:
    """Takes typed attributes out of an item that may be anything."""

    __slots__ = ("_item", "_stream")

    def __init__(self, stream: str, item: Mapping[str, Attribute]) -> None:
        self._stream = stream
        self._item = item

    def _corrupt(self, name: str) -> Corrupt:
        return Corrupt(
            f"head item of stream {self._stream!r}: attribute {name!r} is {str(self._item.get(name))[:200]!r}",
            hint="the item was changed by something else; compare it with the other regions' heads before repairing it",
        )

    def integer(self, name: str) -> int:
        try:
            return int(self._item[name]["N"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._corrupt(name) from error

    def real(self, name: str) -> float:
        try:
            return float(self._item[name]["N"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._corrupt(name) from error

    def text(self, name: str) -> str:
        try:
            return str(self._item[name]["S"])
        except (KeyError, TypeError) as error:
            raise self._corrupt(name) from error

    def starts(self, name: str) -> tuple[EpochStart, ...]:
        try:
            return tuple(EpochStart(int(pair["L"][0]["N"]), int(pair["L"][1]["N"])) for pair in self._item[name]["L"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise self._corrupt(name) from error

    def salvage(self) -> tuple[Salvage, ...]:
        try:
            parts = [_Reader(self._stream, part["M"]) for part in self._item["salvage"]["L"]]
        except (KeyError, TypeError) as error:
            raise self._corrupt("salvage") from error
        return tuple(
            Salvage(
                p.integer("first_seq"), p.integer("last_seq"), p.starts("epochs"), p.text("last_chain"), p.integer("by_epoch")
            )
            for p in parts
        )

    def snapshots(self) -> tuple[NamedSnapshot, ...]:
        try:
            rows = json.loads(self.text("snapshots"))
            return tuple(NamedSnapshot(int(seq), int(epoch), str(chain), str(sha256)) for seq, epoch, chain, sha256 in rows)
        except (TypeError, ValueError) as error:
            raise self._corrupt("snapshots") from error


def item_bytes(item: Mapping[str, Attribute]) -> int:
    """Size as DynamoDB counts it, rounded up: names, values, 21 bytes for a number, 3 for a list or map and 1 for each
    element.
    """
    return sum(len(name.encode()) + _attribute_bytes(value) for name, value in item.items())


def _attribute_bytes(value: Attribute) -> int:
    if "S" in value:
        return len(value["S"].encode())
    if "L" in value:
        return 3 + sum(1 + _attribute_bytes(part) for part in value["L"])
    if "M" in value:
        return 3 + sum(1 + len(name.encode()) + _attribute_bytes(part) for name, part in value["M"].items())
    return 21


# --------------------------------------------------------------------------------------------------------------- updates


def fence_update(group: str, fence: Fence) -> dict[str, Any]:
    """``SET epoch IF`` there is no item, its epoch is smaller, or it is ours already. Creates all attributes of a new head.

    The condition asks for the item (`pk`), not for `epoch`: an item without an epoch is damage to look at, not a new stream.
    """
    fresh: dict[str, Attribute] = head_to_item(group, Head(fence.stream))
    defaults = ["seq", "chain", "epochs", "base", "base_chain", "salvage", "received_at", "records", "bytes", "snapshots"]
    sets = [f"#{name} = if_not_exists(#{name}, :{name})" for name in defaults]
    return _update(
        group,
        fence.stream,
        sets=["#epoch = :e", "#writer = :w", *sets],
        condition="attribute_not_exists(#pk) OR #epoch < :e OR (#epoch = :e AND #writer = :w)",
        names=["pk", "epoch", "writer", *defaults],
        values={":e": _n(fence.epoch), ":w": _s(fence.writer), **{f":{name}": fresh[name] for name in defaults}},
    )


_HELD = "#epoch = :e AND #writer = :w AND #seq = :was_seq AND #chain = :was_chain"


def advance_update(group: str, fence: Fence, commit: Commit) -> dict[str, Any]:
    """``SET seq, chain, … IF`` the epoch is ours and the head is where the commit starts."""
    sets = [
        "#seq = :seq, #chain = :chain, #received_at = :received_at, #writer = :w",
        "#records = #records + :records, #bytes = #bytes + :bytes",
    ]
    values = {
        **_held(fence, commit.prev_seq, commit.prev_chain),
        ":seq": _n(commit.seq),
        ":chain": _s(commit.chain),
        ":received_at": _n(commit.received_at),
        ":records": _n(commit.records),
        ":bytes": _n(commit.bytes),
    }
    names = ["epoch", "writer", "seq", "chain", "received_at", "records", "bytes"]
    if commit.starts:
        sets.append("#epochs = list_append(#epochs, :starts)")
        values[":starts"] = _starts(commit.starts)
        names.append("epochs")
    return _update(group, fence.stream, sets=sets, condition=_HELD, names=names, values=values)


def realign_update(group: str, fence: Fence, expected: Head, to: Realignment) -> dict[str, Any]:
    """Cuts to ``to`` and appends its salvage, ``IF`` the epoch is ours and the head is as ``expected``."""
    sets = [
        "#seq = :seq, #chain = :chain, #base = :base, #base_chain = :base_chain, #epochs = :epochs, #writer = :w",
        "#received_at = :received_at, #records = :records, #bytes = :bytes, #snapshots = :snapshots",
    ]
    values = {
        **_held(fence, expected.seq, expected.chain),
        ":seq": _n(to.seq),
        ":chain": _s(to.chain),
        ":base": _n(to.base),
        ":base_chain": _s(to.base_chain),
        ":epochs": _starts(to.epochs),
        ":received_at": _n(to.received_at),
        ":records": _n(to.records),
        ":bytes": _n(to.bytes),
        ":snapshots": _snapshots(within(expected.snapshots, to)),
    }
    names = ["epoch", "writer", "seq", "chain", "base", "base_chain", "epochs", "received_at", "records", "bytes", "snapshots"]
    if to.salvage is not None:
        sets.append("#salvage = list_append(#salvage, :salvage)")
        values[":salvage"] = {"L": [_salvage(to.salvage)]}
        names.append("salvage")
    return _update(group, fence.stream, sets=sets, condition=_HELD, names=names, values=values)


def within(snapshots: tuple[NamedSnapshot, ...], to: Realignment) -> tuple[NamedSnapshot, ...]:
    """The snapshots that still are of a history that was cut to ``to``."""
    return tuple(found for found in snapshots if to.base - 1 <= found.seq <= to.seq)


def base_update(group: str, fence: Fence, expected: Head, to: Baseline) -> dict[str, Any]:
    """Moves the base and names snapshots, ``IF`` the epoch is ours, both are as ``expected`` and the head reaches so far."""
    return _update(
        group,
        fence.stream,
        sets=["#base = :base, #base_chain = :base_chain, #snapshots = :snapshots"],
        condition="#epoch = :e AND #writer = :w AND #base = :was_base AND #snapshots = :was_snapshots AND #seq >= :least",
        names=["epoch", "writer", "seq", "base", "base_chain", "snapshots"],
        values={
            ":e": _n(fence.epoch),
            ":w": _s(fence.writer),
            ":was_base": _n(expected.base),
            ":was_snapshots": _snapshots(expected.snapshots),
            ":least": _n(reach(to)),
            ":base": _n(to.base),
            ":base_chain": _s(to.base_chain),
            ":snapshots": _snapshots(to.snapshots),
        },
    )


def forget_update(group: str, fence: Fence, start: EpochStart) -> dict[str, Any]:
    """Drops the first of the head's epochs, ``IF`` the epoch is ours, it is ``start`` and another one follows. Nothing is
    written that an ``advance`` on its way could append to: the list only gets shorter at its other end."""
    return {
        "Key": head_key(group, fence.stream),
        "UpdateExpression": "REMOVE #epochs[0]",
        "ConditionExpression": "#epoch = :e AND #writer = :w AND #epochs[0][0] = :gone AND #epochs[0][1] = :first "
        "AND attribute_exists(#epochs[1])",
        "ExpressionAttributeNames": {"#epoch": "epoch", "#writer": "writer", "#epochs": "epochs"},
        "ExpressionAttributeValues": {
            ":e": _n(fence.epoch),
            ":w": _s(fence.writer),
            ":gone": _n(start.epoch),
            ":first": _n(start.first_seq),
        },
        "ReturnValues": "ALL_NEW",
        "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
    }


def forget_salvage_update(group: str, fence: Fence, place: int, piece: Salvage) -> dict[str, Any]:
    """Drops the head's salvage number ``place``, ``IF`` the epoch is ours and it is ``piece``. A ``realign`` on its way appends
    at the end, so it moves no number."""
    return {
        "Key": head_key(group, fence.stream),
        "UpdateExpression": f"REMOVE #salvage[{place}]",
        "ConditionExpression": f"#epoch = :e AND #writer = :w AND #salvage[{place}] = :gone",
        "ExpressionAttributeNames": {"#epoch": "epoch", "#writer": "writer", "#salvage": "salvage"},
        "ExpressionAttributeValues": {":e": _n(fence.epoch), ":w": _s(fence.writer), ":gone": _salvage(piece)},
        "ReturnValues": "ALL_NEW",
        "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
    }


def reach(to: Baseline) -> int:
    """The last segment that a head must have for ``to`` to be true of it."""
    return max(to.base - 1, *(found.seq for found in to.snapshots), 0)


def _held(fence: Fence, seq: int, chain: str) -> dict[str, Attribute]:
    return {":e": _n(fence.epoch), ":w": _s(fence.writer), ":was_seq": _n(seq), ":was_chain": _s(chain)}


def _update(
    group: str, stream: str, *, sets: list[str], condition: str, names: list[str], values: dict[str, Attribute]
) -> dict[str, Any]:
    return {
        "Key": head_key(group, stream),
        "UpdateExpression": "SET " + ", ".join(sets),
        "ConditionExpression": condition,
        "ExpressionAttributeNames": {f"#{name}": name for name in names},
        "ExpressionAttributeValues": values,
        "ReturnValues": "ALL_NEW",
        "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
    }
