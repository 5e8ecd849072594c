"""Catalogue entry <-> DynamoDB item: one for each agent, so that people can restore it with plain AWS calls. Pure.

| attribute                                       | type                                                                      |
| ----------------------------------------------- | ------------------------------------------------------------------------- |
| `pk`, `sk`                                      | S: `{group}#{stream}`, `agent#{agent}`                                    |
| `kind`, `id`, `sha256`, `encoding`              | S: of the agent's latest restorable checkpoint                            |
| `size`, `received_at`                           | N: bytes of the body; seconds since 1970                                  |
| `seq`, `epoch`, `ordinal`, `offset`, `length`   | N: where its frame lies                                                   |
| `chain`                                         | L of L of N: `[seq, epoch, ordinal, offset, length]` of that frame, then  |
|                                                 | of the one that it is a delta against, down to a whole one                |
| `by_epoch`                                      | N: epoch of the holder that wrote the item                                |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from controller.domain.model import CatalogueEntry, Fence, FramePlace
from controller.errors import Corrupt
from controller.ports import FoundEntry

T = TypeVar("T")

BATCH_ITEMS = 25
"""Items that one BatchWriteItem takes. Source: DynamoDB API reference."""
SORT_PREFIX = "agent#"
MAX_PLACES = 1000
"""More places than any chain of deltas has: an item that claims more is not read further."""


def catalogue_key(group: str, stream: str, agent: str) -> dict[str, dict[str, Any]]:
    """Primary key of an agent's item."""
    return {"pk": {"S": f"{group}#{stream}"}, "sk": {"S": f"{SORT_PREFIX}{agent}"}}


def catalogue_to_item(group: str, fence: Fence, entry: CatalogueEntry) -> dict[str, dict[str, Any]]:
    """The whole item. ``entry.chain`` has at least one place."""
    first = entry.chain[0]
    return {
        **catalogue_key(group, fence.stream, entry.agent),
        "kind": {"S": entry.kind},
        "id": {"S": entry.id},
        "sha256": {"S": entry.sha256},
        "encoding": {"S": entry.encoding},
        "size": {"N": repr(entry.size)},
        "received_at": {"N": repr(entry.received_at)},
        **{name: {"N": repr(value)} for name, value in zip(_PLACE, _numbers(first), strict=True)},
        "chain": {"L": [{"L": [{"N": repr(value)} for value in _numbers(place)]} for place in entry.chain]},
        "by_epoch": {"N": repr(fence.epoch)},
    }


def agent_of(item: Mapping[str, Any]) -> str:
    """Whose item it is, by its key."""
    return str(item["sk"]["S"]).removeprefix(SORT_PREFIX)


def found_entry(agent: str, item: Mapping[str, Any] | None) -> FoundEntry:
    """An item as ``ports.FoundEntry``: read if it can be read."""
    if not item:
        return FoundEntry(agent, None, "", {})
    try:
        return FoundEntry(agent, catalogue_from_item(agent, item), "", dict(item))
    except Corrupt as error:
        return FoundEntry(agent, None, error.message, dict(item))


def catalogue_from_item(agent: str, item: Mapping[str, Any]) -> CatalogueEntry:
    """Attributes that we do not know are ignored. Raises Corrupt naming the attribute that is wrong."""
    chain = _read(item, "chain", _places)
    first = tuple(_read(item, name, _number) for name in _PLACE)
    if not chain or first != _numbers(chain[0]):
        begins = _numbers(chain[0]) if chain else ()
        raise Corrupt(f"its {', '.join(_PLACE)} are {first!a} and its chain begins with {begins!a}", hint="")
    return CatalogueEntry(
        agent=agent,
        kind=_read(item, "kind", _text),
        id=_read(item, "id", _text),
        sha256=_read(item, "sha256", _text),
        size=_read(item, "size", _number),
        encoding=_read(item, "encoding", _text),
        received_at=_read(item, "received_at", lambda value: float(value["N"])),
        chain=chain,
        by_epoch=_read(item, "by_epoch", _number),
    )


def _read(item: Mapping[str, Any], name: str, how: Callable[[Any], T]) -> T:
    try:
        return how(item[name])
    except (KeyError, TypeError, ValueError) as error:
        raise Corrupt(f"its attribute {name!r} is {str(item.get(name))[:200]!a}", hint="") from error


def _text(value: Any) -> str:
    return str(value["S"])


def _number(value: Any) -> int:
    return int(value["N"])


def _places(value: Any) -> tuple[FramePlace, ...]:
    found = tuple(FramePlace(*(_number(number) for number in place["L"])) for place in value["L"])
    if len(found) > MAX_PLACES:
        raise ValueError("too many places")
    return found


_PLACE = ("seq", "epoch", "ordinal", "offset", "length")


def _numbers(place: FramePlace) -> tuple[int, ...]:
    return place.seq, place.epoch, place.ordinal, place.offset, place.length
