"""Record sets as Route 53 understands them: names, exact copies, the compare-and-set batch, and what a name server answers.

Pure: no I/O, no clock; the choice among weighted records is an argument. ``traffic.py`` (the flow), ``memory/traffic.py``
(the reference zone) and ``lab/dns_server.py`` share it, so that all of them mean the same by a record set.

A record set here is the mapping that the Route 53 API itself uses (``Name``, ``Type``, ``SetIdentifier``, ``Weight``,
``TTL``, ``ResourceRecords``, ``HealthCheckId``), because the next DELETE has to repeat it exactly. Sources: Route 53 API
reference (ChangeResourceRecordSets, ListResourceRecordSets, quotas) and developer guide ("DNS domain name format",
"Values specific for weighted records", "How Route 53 chooses records when health checking is configured").
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from controller.errors import Conflict, Refused
from controller.ports import TrafficState

RecordSet = Mapping[str, Any]

EPOCH_LABEL = "_dr-epoch"
MAX_WEIGHT = 255
MAX_BATCH_RECORDS = 1000
"""ResourceRecord elements in one batch, deletions counted too (Route 53 quota)."""
MAX_BATCH_CHARACTERS = 32_000
"""Characters of all Value elements in one batch (Route 53 quota)."""
MAX_CNAMES = 8

_WEIGHTED_FIELDS = frozenset({"Name", "Type", "SetIdentifier", "Weight", "TTL", "ResourceRecords", "HealthCheckId"})
_TXT_FIELDS = frozenset({"Name", "Type", "TTL", "ResourceRecords"})
_EPOCH_TEXT = re.compile(r'"(0|[1-9][0-9]{0,18})"')
_OCTAL = re.compile(r"\\([0-7]{3})")
_FOREIGN_HINT = "look at the zone; remove the foreign record, or give the group another name, then try again"


# ----------------------------------------------------------------------------------------------------------------- names


def normal_name(name: str) -> str:
    """One spelling per name: lower case, final dot, octal escapes resolved.

    Route 53 shows characters outside ``a-z 0-9 - _ .`` as ``\\ooo`` (``*`` is ``\\052``). An escaped dot or backslash stays
    escaped: resolved, it would make two different names equal.
    """

    def resolve(match: re.Match[str]) -> str:
        char = chr(int(match.group(1), 8))
        return match.group(0) if char in ".\\" or not "!" <= char <= "~" else char

    plain = _OCTAL.sub(resolve, name).lower()
    return plain if plain.endswith(".") else plain + "."


def epoch_name(name: str) -> str:
    """Name of the TXT record that fences ``name``."""
    return f"{EPOCH_LABEL}.{normal_name(name)}"


def identity(record: RecordSet) -> tuple[str, str, str]:
    """What makes a record set the same one: name, type, set identifier."""
    return normal_name(str(record["Name"])), str(record["Type"]), str(record.get("SetIdentifier", ""))


def values_of(record: RecordSet) -> tuple[str, ...]:
    """Values in the order in which the zone holds them."""
    return tuple(str(item["Value"]) for item in record.get("ResourceRecords", ()))


def canonical(record: RecordSet) -> str:
    """The exact copy that ``TrafficState.exact`` keeps: printable, comparable, and parsed back without loss."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"))


def same_content(one: RecordSet, other: RecordSet) -> bool:
    """Whether a DELETE of ``other`` matches ``one``. The order of the values does not matter to Route 53; all else does."""

    def form(record: RecordSet) -> str:
        rest = {key: value for key, value in record.items() if key not in ("Name", "ResourceRecords")}
        return canonical({**rest, "Name": normal_name(str(record["Name"])), "ResourceRecords": sorted(values_of(record))})

    return form(one) == form(other)


# ------------------------------------------------------------------------------------------------------- reading a state


def understand(records: Iterable[RecordSet], name: str, regions: Collection[str]) -> TrafficState:
    """The state of ``name`` from the record sets of ``name`` and of its epoch TXT; others are not looked at.

    Raises Refused, naming the record, when there is anything under these two names that this controller did not put there
    or does not understand: changing traffic around it could take clients where nobody looks.
    """
    ours, fence = normal_name(name), epoch_name(name)
    weights: dict[str, int] = {}
    epoch: int | None = None
    exact: list[str] = []
    for record in records:
        owner, _, identifier = identity(record)
        if owner == ours:
            weights[identifier] = _weight_of(record, regions)
        elif owner == fence:
            if epoch is not None:
                raise Refused(f"{fence} has more than one record set", hint=_FOREIGN_HINT)
            epoch = _epoch_of(record)
        else:
            continue
        exact.append(canonical(record))
    return TrafficState(weights=weights, epoch=epoch or 0, exact=tuple(sorted(exact)))


def _weight_of(record: RecordSet, regions: Collection[str]) -> int:
    name, rtype, identifier = identity(record)
    what = f"{name} {rtype} {identifier!r}" if identifier else f"{name} {rtype}"
    if "AliasTarget" in record:
        raise Refused(f"{what} is an alias; only weighted A records with addresses are understood", hint=_FOREIGN_HINT)
    if rtype != "A":
        raise Refused(f"{what} has type {rtype}; only weighted A records are understood", hint=_FOREIGN_HINT)
    foreign = sorted(set(record) - _WEIGHTED_FIELDS)
    if foreign:
        raise Refused(f"{what} has {', '.join(foreign)}: another routing policy than weighted", hint=_FOREIGN_HINT)
    if not identifier or "Weight" not in record:
        raise Refused(f"{what} is not weighted: it has no set identifier or no weight", hint=_FOREIGN_HINT)
    if identifier not in regions:
        known = ", ".join(sorted(regions))
        raise Refused(f"{what} belongs to no region of this group (known: {known})", hint=_FOREIGN_HINT)
    if not values_of(record) or "TTL" not in record:
        raise Refused(f"{what} has no address or no TTL", hint=_FOREIGN_HINT)
    weight = int(record["Weight"])
    if not 0 <= weight <= MAX_WEIGHT:
        raise Refused(f"{what} has weight {weight}, outside 0..{MAX_WEIGHT}", hint=_FOREIGN_HINT)
    return weight


def _epoch_of(record: RecordSet) -> int:
    name, rtype, _ = identity(record)
    foreign = sorted(set(record) - _TXT_FIELDS)
    if rtype != "TXT" or foreign:
        raise Refused(f"{name} {rtype} {', '.join(foreign)} is not the plain TXT that fences this group", hint=_FOREIGN_HINT)
    values = values_of(record)
    if len(values) != 1:
        raise Refused(f"{name} TXT has {len(values)} values; exactly one epoch is expected", hint=_FOREIGN_HINT)
    match = _EPOCH_TEXT.fullmatch(values[0])
    if match is None:
        raise Refused(f"{name} TXT has the value {values[0][:60]!r}, which is not an epoch like '\"7\"'", hint=_FOREIGN_HINT)
    return int(match.group(1))


# ------------------------------------------------------------------------------------------------------ planning a batch


@dataclass(frozen=True, slots=True)
class Change:
    """One element of a change batch."""

    action: str
    record: RecordSet


def plan_batch(
    name: str, expected: TrafficState, weights: Mapping[str, int], epoch: int, ttl_seconds: int
) -> tuple[Change, ...]:
    """The batch that takes the zone from ``expected`` to (``weights``, ``epoch``), and applies to nothing else.

    Every old record is deleted by its exact content, which is the "compare"; also where only the TXT moves, or where the
    TXT already holds our epoch. Fields other than the weight and the epoch (TTL, health check, order of values) are kept.
    ``ttl_seconds`` is for a TXT that does not exist yet. Raises Refused (rules for weights, quotas), Conflict (``expected``
    is not something that ``read()`` returned for this name).
    """
    check_weights(expected, weights)
    records = _exact_records(name, expected)
    changes: list[Change] = []
    fence: RecordSet = {"Name": epoch_name(name), "Type": "TXT", "TTL": ttl_seconds}
    for record in records:
        if record["Type"] == "TXT":
            fence = record
            changes.append(Change("DELETE", record))
    changes.append(Change("CREATE", {**fence, "ResourceRecords": [{"Value": f'"{epoch}"'}]}))
    if dict(weights) != dict(expected.weights):
        for record in records:
            if record["Type"] == "A":
                changes.append(Change("DELETE", record))
                changes.append(Change("CREATE", {**record, "Weight": weights[record["SetIdentifier"]]}))
    check_quotas(changes)
    return tuple(changes)


def _exact_records(name: str, expected: TrafficState) -> list[RecordSet]:
    try:
        records = [json.loads(text) for text in expected.exact]
        if understand(records, name, expected.weights.keys()) == expected:
            return records
    except (ValueError, TypeError, KeyError, Refused):
        pass  # Said below, in one sentence: whatever is wrong with it, it did not come from read().
    raise Conflict("the expected traffic state does not agree with its own exact records", hint="read the zone again")


def check_weights(expected: TrafficState, weights: Mapping[str, int]) -> None:
    """Raises Refused unless ``weights`` names exactly the regions in the zone, each 0..255, at least one above 0."""
    for region, weight in weights.items():
        # ``type`` and not ``isinstance``: True is an int, and 50.0 would reach the API as text that it does not take.
        if type(weight) is not int or not 0 <= weight <= MAX_WEIGHT:
            raise Refused(f"weight {weight!r} of {region} is not a whole number in 0..{MAX_WEIGHT}", hint="correct the weight")
    unknown = sorted(set(weights) - set(expected.weights))
    if unknown:
        raise Refused(
            f"no weighted record for {', '.join(unknown)} in the zone", hint="create it (Terraform), or leave the region out"
        )
    missing = sorted(set(expected.weights) - set(weights))
    if missing:
        raise Refused(f"no weight given for {', '.join(missing)}", hint="give a weight for every region that has a record")
    if not any(weights.values()):
        raise Refused(
            "the change would leave the name without a record of non-zero weight (Route 53 would then serve all of them)",
            hint="give at least one region a weight of 1..255",
        )


def check_quotas(changes: Sequence[Change]) -> None:
    """Raises Refused when a batch is over what Route 53 takes in one call."""
    values = [value for change in changes for value in values_of(change.record)]
    characters = sum(len(value) for value in values)
    if len(values) > MAX_BATCH_RECORDS or characters > MAX_BATCH_CHARACTERS:
        raise Refused(
            f"a batch of {len(values)} records and {characters} characters is over Route 53's "
            f"{MAX_BATCH_RECORDS} records or {MAX_BATCH_CHARACTERS} characters",
            hint="use fewer addresses per region",
        )


# ------------------------------------------------------------------------------------------- what a name server answers


class Status(StrEnum):
    """Outcome of a look-up in one zone."""

    ANSWER = "ANSWER"
    NODATA = "NODATA"
    NXDOMAIN = "NXDOMAIN"
    REFUSED = "REFUSED"
    SERVFAIL = "SERVFAIL"


@dataclass(frozen=True, slots=True)
class Found:
    """One record set of an answer."""

    name: str
    rtype: str
    ttl_seconds: int
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lookup:
    """``chain``: CNAMEs first, then the record set asked for. ``authority``: the SOA, for negative answers."""

    status: Status
    chain: tuple[Found, ...] = ()
    authority: Found | None = None


@dataclass(frozen=True, slots=True)
class ZoneCopy:
    """A hosted zone as a name server sees it, indexed once."""

    apex: str
    index: Mapping[tuple[str, str], tuple[RecordSet, ...]]
    names: frozenset[str] = field(repr=False)

    @classmethod
    def of(cls, records: Iterable[RecordSet]) -> ZoneCopy:
        """Raises Refused when there is no SOA, which every hosted zone has."""
        index: dict[tuple[str, str], list[RecordSet]] = {}
        names: set[str] = set()
        apex = ""
        for record in records:
            name, rtype, _ = identity(record)
            index.setdefault((name, rtype), []).append(record)
            labels = name.split(".")
            names.update(".".join(labels[i:]) for i in range(len(labels) - 1))
            apex = name if rtype == "SOA" else apex
        if not apex:
            raise Refused("the zone has no SOA record", hint="is this a hosted zone?")
        return cls(apex, {key: tuple(sets) for key, sets in index.items()}, frozenset(names))

    def lookup(
        self, name: str, rtype: str, pick: Callable[[int], int], unhealthy: Collection[str] = frozenset()
    ) -> Lookup:
        """What Route 53 answers. ``pick(n)`` returns a number in ``0 … n − 1``; ``unhealthy``: ids of failing health checks."""
        owner = normal_name(name)
        if not _within(owner, self.apex):
            return Lookup(Status.REFUSED)
        chain: list[Found] = []
        for _ in range(MAX_CNAMES):
            sets = self.index.get((owner, rtype)) or self.index.get((owner, "CNAME"))
            if not sets:
                return self._negative(owner, tuple(chain))
            chosen = choose(sets, pick, unhealthy)
            if "AliasTarget" in chosen:
                return Lookup(Status.SERVFAIL)
            found = Found(owner, str(chosen["Type"]), int(chosen["TTL"]), values_of(chosen))
            chain.append(found)
            if found.rtype == rtype:
                return Lookup(Status.ANSWER, tuple(chain))
            owner = normal_name(found.values[0])
            if not _within(owner, self.apex):
                return Lookup(Status.ANSWER, tuple(chain))
        return Lookup(Status.SERVFAIL)

    def _negative(self, owner: str, chain: tuple[Found, ...]) -> Lookup:
        soa = self.index[self.apex, "SOA"][0]
        values = values_of(soa)
        # RFC 2308: a negative answer lives for the smaller of the SOA's own TTL and its last field.
        ttl = min(int(soa["TTL"]), int(values[0].split()[-1]))
        status = Status.NODATA if owner in self.names and _within(owner, self.apex) else Status.NXDOMAIN
        return Lookup(status, chain, Found(self.apex, "SOA", ttl, values))


def choose(sets: Sequence[RecordSet], pick: Callable[[int], int], unhealthy: Collection[str] = frozenset()) -> RecordSet:
    """One of the record sets of a name and type, as Route 53's weighted routing chooses.

    Healthy ones of non-zero weight in proportion to their weights; when there is none, the healthy ones of weight 0, each
    as likely as the others; when none is healthy, all count as healthy again.
    """
    healthy = [record for record in sets if record.get("HealthCheckId") not in unhealthy or not record.get("HealthCheckId")]
    candidates = healthy or list(sets)
    total = sum(int(record.get("Weight", 0)) for record in candidates)
    if total == 0:
        return candidates[pick(len(candidates))]
    point = pick(total)
    for record in candidates:
        point -= int(record.get("Weight", 0))
        if point < 0:
            return record
    raise ValueError(f"pick({total}) returned a number outside 0..{total - 1}")


def _within(name: str, apex: str) -> bool:
    return name == apex or name.endswith("." + apex)
