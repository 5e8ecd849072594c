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

from typing import Any

from controller.domain.model import CatalogueEntry, Fence, FramePlace

BATCH_ITEMS = 25
"""Items that one BatchWriteItem takes. Source: DynamoDB API reference."""
SORT_PREFIX = "agent#"


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


_PLACE = ("seq", "epoch", "ordinal", "offset", "length")


def _numbers(place: FramePlace) -> tuple[int, ...]:
    return place.seq, place.epoch, place.ordinal, place.offset, place.length
