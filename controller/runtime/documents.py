"""What lies under which key in etcd, and its JSON form. Nothing else in the project knows a key or encodes a document.

| key (below ``{prefix}/{group}/``) | leased | document |
| --- | --- | --- |
| ``authority``                 | no  | ``Authority``: which region may be active, the greatest epoch ever issued, the barrier |
| ``forks/{stream}``            | no  | ``Forks``: which epoch owns which sequence numbers; who may acknowledge alone |
| ``holder/{stream}``           | yes | ``Holder``: the active instance; vanishes with its lease |
| ``reports/{stream}``          | no  | ``StreamReport``: what the holder last knew; outlives it |
| ``members/{region}/{instance}`` | yes | ``Member``: a live controller and what it sees |
| ``plans/{id}``                | no  | ``PlanRecord`` |
| ``approvals/{plan}/{who}``    | no  | ``Approval`` |
| ``journal/{plan}/{step}``     | no  | ``JournalEntry`` |
| ``guards/{plan}``             | yes | instance that is about to authorise; the authorising transaction compares it |
| ``drained/{plan}/{stream}``    | no  | proof of the old holder that it drained for a planned move: the last segment |
| ``progress/{plan}/{stream}``   | no  | ``Progress``: how far the target's holder of one stream is |
| ``executors/{plan}``          | yes | instance that runs the plan up to ``authorize`` |
| ``incidents/{id}``            | no  | ``Incident`` |
| ``callers/{incident}``        | yes | instance that is telling people about an incident now |
| ``audit/{n}``                 | no  | ``AuditEntry``, hash-chained |
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from controller.errors import Corrupt
from controller.ports import Coordinator, Item

T = TypeVar("T")


_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}


def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    """Building an adapter costs milliseconds, so each is built once."""
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def encode(document: Any) -> bytes:
    """JSON of a frozen dataclass."""
    return _adapter(type(document)).dump_json(document)


def decode(kind: type[T], data: bytes, *, where: str = "document") -> T:
    """The document of type ``kind`` in ``data``. Raises Corrupt naming ``where``."""
    try:
        plain: Any = kind
        result: T = (_remembered if len(data) <= REMEMBERED_BYTES else _parsed)(plain, data)
    except ValidationError as error:
        raise Corrupt(
            f"{where} is not a {kind.__name__}: {error.errors()[0]['msg']}",
            hint="a controller of another version wrote it, or it was edited by hand; compare `drctl version` in all regions",
        ) from error
    return result


def _parsed(kind: type[Any], data: bytes) -> Any:
    return _adapter(kind).validate_json(data)


REMEMBERED_BYTES = 16 * 1024
_remembered = functools.lru_cache(maxsize=1024)(_parsed)
"""Every loop looks at the same few documents at every tick, and documents are frozen: the same bytes are the same document."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Every key of one group."""

    prefix: str
    group: str

    def _at(self, *parts: str) -> str:
        return "/".join((self.prefix.rstrip("/"), self.group, *parts))

    @property
    def authority(self) -> str:
        return self._at("authority")

    def forks(self, stream: str) -> str:
        return self._at("forks", stream)

    def holder(self, stream: str) -> str:
        return self._at("holder", stream)

    @property
    def holders(self) -> str:
        return self._at("holder", "")

    def report(self, stream: str) -> str:
        return self._at("reports", stream)

    @property
    def reports(self) -> str:
        return self._at("reports", "")

    def member(self, region: str, instance: str) -> str:
        return self._at("members", region, instance)

    @property
    def members(self) -> str:
        return self._at("members", "")

    def plan(self, plan: str) -> str:
        return self._at("plans", plan)

    @property
    def plans(self) -> str:
        return self._at("plans", "")

    def approval(self, plan: str, who: str) -> str:
        return self._at("approvals", plan, who)

    def approvals(self, plan: str) -> str:
        return self._at("approvals", plan, "")

    def journal(self, plan: str, step: str) -> str:
        return self._at("journal", plan, step)

    def journals(self, plan: str) -> str:
        return self._at("journal", plan, "")

    def guard(self, plan: str) -> str:
        return self._at("guards", plan)

    def drained(self, plan: str, stream: str) -> str:
        return self._at("drained", plan, stream)

    def progress(self, plan: str, stream: str) -> str:
        return self._at("progress", plan, stream)

    def executor(self, plan: str) -> str:
        return self._at("executors", plan)

    def incident(self, incident: str) -> str:
        return self._at("incidents", incident)

    @property
    def incidents(self) -> str:
        return self._at("incidents", "")

    def caller(self, incident: str) -> str:
        return self._at("callers", incident)

    def audit(self, n: int) -> str:
        return self._at("audit", f"{n:012d}")

    @property
    def audits(self) -> str:
        return self._at("audit", "")


@dataclass(frozen=True, slots=True)
class Seen(Generic[T]):
    """A document with the revisions that a transaction may compare, and the lease that it hangs on."""

    value: T
    item: Item

    @property
    def revision(self) -> int:
        return self.item.mod_revision


async def read(coordinator: Coordinator, key: str, kind: type[T]) -> Seen[T] | None:
    """One document, or None. Raises Unavailable, Corrupt."""
    return seen(await coordinator.get(key), kind)


async def read_all(coordinator: Coordinator, prefix: str, kind: type[T]) -> tuple[Seen[T], ...]:
    """All documents below a prefix, ascending by key. Raises Unavailable, Corrupt."""
    return tuple(Seen(decode(kind, item.value, where=item.key), item) for item in await coordinator.list(prefix))


@dataclass(frozen=True, slots=True)
class Readable(Generic[T]):
    """The documents below a prefix that could be decoded, and of the others their keys with the reasons."""

    documents: tuple[Seen[T], ...]
    unreadable: Mapping[str, str]


async def read_readable(coordinator: Coordinator, prefix: str, kind: type[T]) -> Readable[T]:
    """Like ``read_all``, but one document that cannot be decoded (another version's, or edited by hand) hides no other one.

    For what controllers tell each other and people: members, reports, plans, incidents. Never for what decides who may act
    (authority, holder, forks): there an unreadable document must stop everybody. Raises Unavailable.
    """
    documents: list[Seen[T]] = []
    unreadable: dict[str, str] = {}
    for item in await coordinator.list(prefix):
        try:
            documents.append(Seen(decode(kind, item.value, where=item.key), item))
        except Corrupt as error:
            unreadable[item.key] = error.message
    return Readable(tuple(documents), unreadable)


def seen(item: Item | None, kind: type[T]) -> Seen[T] | None:
    """The document of an item that was read already."""
    return None if item is None else Seen(decode(kind, item.value, where=item.key), item)
