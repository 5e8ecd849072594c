"""What a real group did, in the form that the simulation's checkers read (``tests/simulation/observed.py``).

Where it comes from: etcd's own history (every revision, by watch), every change of a head and of the zone as the stand-ins made
it (``proxy.py``), the objects and heads that lie in the stores, and what agents and onlookers wrote down (``worker.py``).
Nothing is asked of the controllers.
"""

from __future__ import annotations

import hashlib
import heapq
import http.client
import json
import math
import threading
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from controller.adapters import etcdrpc
from controller.adapters.head_item import head_from_item, head_key
from controller.adapters.memory.region_store import MemoryStore
from controller.adapters.memory.traffic import ZoneVersion
from controller.adapters.record_sets import ZoneCopy
from controller.adapters.region_store import _parse
from controller.domain.model import Forks, Head, Holder, SegmentRef
from controller.lab.aws import _client
from controller.lab.topology import Endpoint, Topology
from controller.ports import Item
from controller.runtime.documents import Keys, decode
from controller.settings.model import EtcdSettings
from tests.faults.linear import Operation
from tests.faults.worker import REGISTER_SECONDS, body_of, now
from tests.simulation.checkers import Violation
from tests.simulation.events import AckSeen, HeadMoved, History, ObjectPut, RecordingCluster

etcdrpc.install()

STREAM = "s00"
SKIPPED = ("members/", "reports/")
"""Keys that say what controllers see, not what was decided; they change every second."""
MOMENT_SECONDS = 30.0
"""How long heads are read again because somebody took over meanwhile."""
READERS = 4
"""Connections on which a store's objects are read."""
SLACK_SECONDS = 1.0
"""Between a wall clock that was read and an event; only used where it makes a checker milder."""


@dataclass(frozen=True, slots=True)
class Change:
    """One key in one revision. ``value`` None: it was deleted."""

    key: str
    value: bytes | None
    create_revision: int
    lease: int


@dataclass(frozen=True, slots=True)
class Revision:
    """All changes of one transaction, and when the first watcher heard of it (boot time)."""

    changes: tuple[Change, ...]
    heard_at: float


class EtcdHistory:
    """Every revision below a prefix, from the first on. One watcher per member: who is cut off is overtaken by the others."""

    def __init__(self, endpoints: list[str], prefix: str) -> None:
        self._prefix = prefix.encode()
        self._lock = threading.Lock()
        self._revisions: dict[int, Revision] = {}
        self._newest: dict[str, tuple[int, bytes | None, float]] = {}
        self._last = 0
        self.holes: list[str] = []
        """Revisions that were compacted away before any watcher had them."""
        self._stop = threading.Event()
        self._calls: dict[str, Any] = {}
        self._threads = [threading.Thread(target=self._follow, args=(url,), daemon=True) for url in endpoints]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._stop.set()
        for call in list(self._calls.values()):
            call.cancel()
        for thread in self._threads:
            thread.join(5.0)

    @property
    def last(self) -> int:
        return self._last

    def after(self, revision: int) -> list[tuple[int, Revision]]:
        """What came after that revision, in order."""
        with self._lock:
            return sorted((number, found) for number, found in self._revisions.items() if number > revision)

    def newest(self, key: str) -> tuple[bytes | None, float]:
        """(its value, or None when it is not there; when the first watcher heard of it)."""
        with self._lock:
            return self._newest.get(key, (0, None, 0.0))[1:]

    def _follow(self, url: str) -> None:
        while not self._stop.is_set():
            try:
                self._watch(url)
            except grpc.RpcError:
                self._stop.wait(0.5)

    def _watch(self, url: str) -> None:
        options = [("grpc.keepalive_time_ms", 10_000), ("grpc.keepalive_timeout_ms", 3_000), ("grpc.enable_http_proxy", 0)]
        with grpc.insecure_channel(url.removeprefix("http://"), options) as channel:
            over = threading.Event()

            def requests() -> Iterator[Any]:
                end = self._prefix[:-1] + bytes([self._prefix[-1] + 1])
                create = etcdrpc.WatchCreateRequest(key=self._prefix, range_end=end, start_revision=self._last + 1)
                yield etcdrpc.WatchRequest(create_request=create)
                while not (over.is_set() or self._stop.is_set()):
                    self._stop.wait(0.5)

            try:
                stub = channel.stream_stream(
                    "/etcdserverpb.Watch/Watch",
                    request_serializer=etcdrpc.WatchRequest.SerializeToString,
                    response_deserializer=etcdrpc.WatchResponse.FromString,
                )
                self._calls[url] = stub(requests(), metadata=(("hasleader", "true"),))
                for answer in self._calls[url]:
                    if answer.compact_revision > self._last + 1:
                        with self._lock:
                            self.holes.append(f"{self._last + 1} to {answer.compact_revision - 1}")
                            self._last = max(self._last, answer.compact_revision - 1)
                    if answer.canceled:
                        return
                    self._take(answer.events)
            finally:
                over.set()

    def _take(self, events: Any) -> None:
        found: dict[int, list[Change]] = defaultdict(list)
        for event in events:
            kv, deleted = event.kv, event.type == 1
            value = None if deleted else bytes(kv.value)
            found[kv.mod_revision].append(Change(kv.key.decode(), value, kv.create_revision, kv.lease))
        at = now()
        with self._lock:
            for number, changes in sorted(found.items()):
                self._revisions.setdefault(number, Revision(tuple(changes), at))
                for change in changes:
                    if number > self._newest.get(change.key, (0,))[0]:
                        self._newest[change.key] = (number, change.value, at)
                self._last = max(self._last, number)


class ReplayClock:
    """The time of what is being replayed (wall)."""

    def __init__(self) -> None:
        self.at = time.time()

    def wall(self) -> float:
        return self.at

    def monotonic(self) -> float:
        return self.at


class RecordedCluster(RecordingCluster):
    """etcd's revisions, replayed into the recorder of the simulation."""

    def __init__(self, clock: ReplayClock, history: History) -> None:
        super().__init__(clock, history)  # type: ignore[arg-type]
        self.replayed = 0

    def replay(self, number: int, revision: Revision) -> None:
        self.replayed = number
        changes = [change for change in revision.changes if not any(f"/{name}" in change.key for name in SKIPPED)]
        if not changes:
            return
        before = dict(self._items)
        for change in changes:
            if change.value is None:
                self._items.pop(change.key, None)
            else:
                self._items[change.key] = Item(change.key, change.value, change.create_revision, number, change.lease)
        puts = {change.key: change.value for change in changes if change.value is not None}
        if puts:
            self._remember(before, puts)


@dataclass
class RecordedZone:
    name: str
    history: list[ZoneVersion] = field(default_factory=list)


class Lines:
    """JSON lines of files that are still being written; a line that a SIGKILL cut off is skipped."""

    def __init__(self) -> None:
        self._read: dict[Path, int] = {}

    def new(self, path: Path) -> list[dict[str, Any]]:
        """Whole lines since the last call."""
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(self._read.get(path, 0))
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        self._read[path] = self._read.get(path, 0) + len(data)
        found = []
        for line in data.splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found


class Recorded:
    """Implements ``Observed``. ``collect`` reads what is new; call it while nothing is broken."""

    def __init__(self, topology: Topology, records: Path, shift: int, watched: EtcdHistory) -> None:
        self.topology = topology
        self.keys = Keys(str(topology.document["etcd"].get("prefix", "/dr")), topology.group)
        self.keys_dir = topology.state_dir
        self.streams = (STREAM,)
        self.clock = ReplayClock()
        self.history = History(self.clock, self.keys)  # type: ignore[arg-type]
        self.cluster = RecordedCluster(self.clock, self.history)
        self.servers = {region.name: MemoryStore(region.name) for region in topology.regions}
        self.zone = RecordedZone(topology.dns_name)
        self.hops: tuple[tuple[str, ...], ...] = ()
        self.observed: list[dict[str, Any]] = []
        """What workers wrote down, as it is."""
        self.ends: dict[int, float] = {}
        """Boot time by which an epoch's holder key was certainly gone or another's."""
        self.paused: list[tuple[float, float]] = []
        """Spans of boot time in which a member of etcd may have slept through an election and woken up."""
        self.lent_seconds = _lent_seconds(topology.document)
        self.owners: dict[int, tuple[str, str, float]] = {}
        """Epoch -> (region, instance, wall time at which it says that it acquired)."""
        self._records = records
        self._shift = shift
        self._watched = watched
        self._lines = Lines()
        self._heads: dict[str, Head] = {}
        self._clients: dict[tuple[str, str], Any] = {}
        self._holding = 0

    @property
    def acks(self) -> list[AckSeen]:
        return self.history.acks

    # --------------------------------------------------------------------------------------------------------- collecting

    def collect(self) -> None:
        """Reads what was promised or done first, and then the stores, which must have all of it."""
        names = [region.name for region in self.topology.regions]
        for name in names:  # first of all: a client takes seconds to make on a busy machine, and the group goes on meanwhile
            self._service(name, "dynamodb")
            self._service(name, "s3")
        lines = [line for path in sorted(self._records.glob("worker-*.jsonl")) for line in self._lines.new(path)]
        with ThreadPoolExecutor(len(names)) as pool:
            self._collect_moment(names, pool)
            for name, found in zip(names, list(pool.map(self._objects, names)), strict=True):  # what heads point to is there
                self._collect_objects(name, *found)
        self._collect_zone()
        self.observed += lines
        acks = sorted((line for line in lines if line["what"] == "ack"), key=lambda line: line["at"])
        for line in acks:
            self._acknowledged(line)

    def _collect_moment(self, names: Sequence[str], pool: ThreadPoolExecutor) -> None:
        """Heads and forks that belong together. On a busy machine somebody may take over at any time: heads of an epoch whose
        fork we have not heard of, or of before a fork that we have, would say nothing. Looks again until they do."""
        until = time.monotonic() + MOMENT_SECONDS
        while True:
            self._replay()
            before = self._forks()
            for name in names:
                self._collect_heads(name)
            heads = dict(zip(names, list(pool.map(self._head, names)), strict=True))
            self._replay()
            newest = max((start.epoch for start in before.starts), default=0)
            together = before == self._forks() and all(head.last_epoch <= newest for head in heads.values())
            if together or time.monotonic() > until:
                for name, head in heads.items():
                    self.servers[name].heads[STREAM] = head
                return
            time.sleep(0.1)

    def _forks(self) -> Forks:
        item = self.cluster._items.get(self.keys.forks(STREAM))
        return decode(Forks, item.value) if item is not None else Forks()

    def _replay(self) -> None:
        boot_to_wall = time.time() - now()
        for number, revision in self._watched.after(self.cluster.replayed):
            self.clock.at = revision.heard_at + boot_to_wall
            for change in revision.changes:
                if change.key == self.keys.holder(STREAM):
                    holder = decode(Holder, change.value) if change.value is not None else None
                    if self._holding and (holder is None or holder.epoch != self._holding):
                        self.ends.setdefault(self._holding, revision.heard_at)
                    self._holding = holder.epoch if holder else 0
                    if holder:
                        self.owners[holder.epoch] = (holder.region, holder.instance, holder.acquired_at)
            self.cluster.replay(number, revision)
        self.clock.at = time.time()

    def _collect_heads(self, region: str) -> None:
        for line in self._lines.new(self._records / f"proxy-{region}.jsonl"):
            item = line.get("item") or {}
            if item.get("sk", {}).get("S") != "head":
                continue
            after = head_from_item(STREAM, item)
            before = self._heads.get(region, Head(STREAM))
            self._heads[region] = after
            self.history.heads.append(HeadMoved(self.history.next(), line["at"], region, before, after))

    def _collect_zone(self) -> None:
        for line in self._lines.new(self._records / "proxy-world.jsonl"):
            first = not self.zone.history
            records = tuple(line["records"])
            self.zone.history.append(ZoneVersion(-math.inf if first else line["at"], "", records, ZoneCopy.of(records)))

    def _service(self, region: str, service: str) -> tuple[Any, Mapping[str, Any], Endpoint]:
        """(client that goes past the proxy, the region's settings, the stand-in's address)."""
        settings, store = self.topology.document["regions"][region], self.topology.region(region).store
        place = Endpoint(store.host, store.port + self._shift)
        if (region, service) not in self._clients:
            self._clients[region, service] = _client(service, place.url, str(settings.get("aws_region") or region))
        return self._clients[region, service], settings, place

    def _head(self, region: str) -> Head:
        dynamodb, settings, _ = self._service(region, "dynamodb")
        key = head_key(self.topology.group, STREAM)
        return head_from_item(STREAM, dynamodb.get_item(TableName=settings["table"], Key=key, ConsistentRead=True).get("Item"))

    def _objects(self, name: str) -> tuple[dict[SegmentRef, set[str]], dict[SegmentRef, bytes]]:
        """(the ETags of all versions of every segment object, the bytes of those that are new). Changes nothing here."""
        s3, settings, place = self._service(name, "s3")
        folder = f"{self.topology.document['stream'].get('prefix', 'dr')}/{self.topology.group}/{STREAM}/"
        pages = s3.get_paginator("list_object_versions").paginate(Bucket=settings["bucket"], Prefix=folder)
        versions: dict[SegmentRef, set[str]] = defaultdict(set)
        paths: dict[SegmentRef, str] = {}
        for page in pages:
            for version in page.get("Versions", ()):
                ref = _parse(STREAM, version["Key"].removeprefix(folder))
                if ref is None:
                    continue
                versions[ref].add(version["ETag"])
                if ref not in self.servers[name].objects:
                    paths[ref] = f"/{settings['bucket']}/{version['Key']}"

        def read(refs: Sequence[SegmentRef]) -> dict[SegmentRef, bytes]:
            connection = http.client.HTTPConnection(place.host, place.port, timeout=60)
            found = {}
            for ref in refs:
                connection.request("GET", paths[ref])
                found[ref] = connection.getresponse().read()
            connection.close()
            return found

        missing = list(paths)
        with ThreadPoolExecutor(READERS) as pool:
            parts = pool.map(read, [missing[n::READERS] for n in range(READERS)])
            return versions, {ref: data for part in parts for ref, data in part.items()}

    def _collect_objects(self, name: str, versions: Mapping[SegmentRef, set[str]], new: Mapping[SegmentRef, bytes]) -> None:
        for ref, data in new.items():
            self.servers[name].put(ref, data)
            digest = hashlib.sha256(data).hexdigest()
            self.history.puts.append(ObjectPut(self.history.next(), time.time(), name, ref, digest))
        for ref, tags in versions.items():
            if len(tags) > 1:  # two contents have lain under this key
                self.history.puts.append(ObjectPut(self.history.next(), time.time(), name, ref, "another version"))

    def _acknowledged(self, line: Mapping[str, Any]) -> None:
        epoch, end = line["epoch"], self._right_ended(line["epoch"])
        self.history.acks.append(
            AckSeen(
                self.history.next(),
                line["wall"],
                line["by"],
                True,
                epoch,
                line["sent"] - end if end < math.inf else -1.0,
                line["agent"],
                line["id"],
                line["copies"],
                line["seq"],
                body_of(line["agent"], line["id"]),
                line["wall"] - (line["at"] - line["sent"]),
                line["new"],
            )
        )

    # ------------------------------------------------------------------------------------------- what onlookers can prove

    @property
    def beliefs(self) -> list[str]:
        """Moments at which two instances certainly believed that they may act."""
        return [*_overlapping_rights(self.observed), *self._claims_beside_rights(), *self._claims_too_late()]

    def _claims_beside_rights(self) -> list[str]:
        """An instance said "I may act" at some moment of a span throughout which an agent had a right from another one."""
        found, spans = [], _rights(self.observed)
        starts = {epoch: [start for start, _ in rights] for epoch, rights in spans.items()}
        for claim in (line for line in self.observed if line["what"] == "active"):
            for epoch, rights in spans.items():
                owner = self.owners.get(epoch)
                if owner is None or owner[:2] == (claim["region"], claim["instance"]):
                    continue
                n = bisect_right(starts[epoch], claim["sent"]) - 1
                if n >= 0 and claim["at"] < rights[n][1]:
                    found.append(
                        f"{claim['at']:.3f}: {claim['region']}/{claim['instance']} said that it may act; an agent had a right "
                        f"of epoch {epoch} from {owner[0]}/{owner[1]}"
                    )
        return found

    def _claims_too_late(self) -> list[str]:
        owners, boot_to_wall = self.owners.items(), time.time() - now()
        claims = []
        for line in (line for line in self.observed if line["what"] == "active"):
            mine = [
                epoch
                for epoch, (region, instance, acquired_at) in owners
                if (region, instance) == (line["region"], line["instance"])
                and acquired_at <= line["at"] + boot_to_wall + SLACK_SECONDS
            ]
            if mine:
                claims.append(Claim(line["sent"], line["at"], max(mine), f"{line['region']}/{line['instance']}"))
        return claims_too_late(claims, self._right_ended)

    def _right_ended(self, epoch: int) -> float:
        """Boot time by which the right to act of an epoch was certainly over.

        A key that vanishes by itself has outlived the right. etcd's leader that slept and wakes up takes leases away that were
        renewed meanwhile: then the right runs on, at most for what may have been lent, and the successor waits for that."""
        end = self.ends.get(epoch, math.inf)
        early = any(begin <= end <= until for begin, until in self.paused)
        return end + self.lent_seconds if early else end


@dataclass(frozen=True, slots=True)
class Claim:
    """An instance that was asked at ``sent`` said at ``at`` that it may act, in its newest epoch then."""

    sent: float
    at: float
    epoch: int
    who: str


def claims_too_late(claims: Iterable[Claim], right_ended: Callable[[int], float]) -> list[str]:
    """An instance said "I may act" although its right had ended, or a newer epoch had acted, before it was asked."""
    found, newest, heard = [], 0, list[tuple[float, int]]()
    for claim in sorted(claims, key=lambda claim: claim.sent):
        while heard and heard[0][0] < claim.sent:
            newest = max(newest, heapq.heappop(heard)[1])
        heapq.heappush(heard, (claim.at, claim.epoch))
        if right_ended(claim.epoch) < claim.sent:
            found.append(f"{claim.at:.3f}: {claim.who} said that it may act; epoch {claim.epoch} had ended")
        elif claim.epoch < newest:
            found.append(f"{claim.at:.3f}: {claim.who} said that it may act in epoch {claim.epoch}; so had epoch {newest}")
    return found


def _lent_seconds(document: Mapping[str, Any]) -> float:
    etcd = EtcdSettings.model_fields
    ttl, margin = (document["etcd"].get(name, etcd[name].default) for name in ("ttl_seconds", "margin_seconds"))
    return float(ttl - margin)


def _rights(observed: list[dict[str, Any]]) -> dict[int, list[tuple[float, float]]]:
    """By epoch, the spans during which some agent certainly had a right, merged and in order."""
    spans: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for line in sorted((line for line in observed if line["what"] == "ack"), key=lambda line: line["at"]):
        known = spans[line["epoch"]]
        if known and line["at"] <= known[-1][1]:
            known[-1] = (known[-1][0], max(known[-1][1], line["until"]))
        elif line["until"] > line["at"]:
            known.append((line["at"], line["until"]))
    return spans


def _overlapping_rights(observed: list[dict[str, Any]]) -> list[str]:
    """Two agents had rights of different epochs at once."""
    found, end, of = [], -math.inf, 0
    for epoch, spans in sorted(_rights(observed).items()):
        if spans and spans[0][0] < end:
            found.append(f"{spans[0][0]:.3f}: an agent had a right of epoch {epoch}, another one of {of} until {end:.3f}")
        for _, until in spans:
            if until > end:
                end, of = until, epoch
    return found


# ---------------------------------------------------------------------------------- checkers that only a real world needs


def dns_answers_safe(observed: list[dict[str, Any]]) -> None:
    """No name server's answer is empty, and the epoch that it tells never goes back."""
    epoch = 0
    for line in sorted((line for line in observed if line["what"] == "dns"), key=lambda line: line["at"]):
        if line["rcode"] == "SERVFAIL":
            continue  # says that it does not know
        if not line["values"]:
            raise Violation("dns-answers", f"{line['type']}: {line['rcode']} without a value")
        if line["type"] == "TXT":
            if int(line["values"][0]) < epoch:
                raise Violation("dns-answers", f"the epoch went from {epoch} to {line['values'][0]}")
            epoch = int(line["values"][0])


def still_open(observed: list[dict[str, Any]], histories: Mapping[str, list[Operation]]) -> set[str]:
    """Keys that workers share and that some of them may still use, or have used in lines that we have not read yet.

    Workers' files are read one after the other: an answer may be there before the line of the write that it saw."""
    heard: dict[str, float] = {}
    sharing = {line["by"] for line in observed if line["what"] == "register"}
    for line in observed:
        if line["by"] in sharing:
            heard[line["by"]] = max(heard.get(line["by"], 0.0), line.get("ended") or line.get("at") or 0.0)
    complete_until = min(heard.values(), default=0.0)
    shared = {line["key"] for line in observed if line["what"] == "register"}
    return {
        key for key in shared if max(operation.began for operation in histories[key]) + 2 * REGISTER_SECONDS > complete_until
    }


def registers(observed: list[dict[str, Any]]) -> dict[str, list[Operation]]:
    """Histories of etcd keys (by key) and of agents whose records need two copies (by agent)."""
    found: dict[str, list[Operation]] = defaultdict(list)
    for line in observed:
        if line["what"] == "register":
            ended = math.inf if line["ended"] is None else line["ended"]
            found[line["key"]].append(Operation(line["op"], line["value"], line["began"], ended, line.get("was", "")))
    for history in found.values():
        written = {operation.value for operation in history if operation.kind == "cas"}
        seen = {operation.value for operation in history if operation.kind == "read"} | {o.was for o in history}
        # Values of whoever was killed, or is being answered just now, before it could write its line.
        history += [Operation("write", value, -math.inf) for value in sorted(seen - written - {""})]
    puts: dict[tuple[str, str], tuple[float, float]] = {}
    for line in observed:
        if line["what"] in ("ack", "failed"):
            key = line["agent"], line["id"]
            began, ended = puts.get(key, (math.inf, math.inf))
            puts[key] = (min(began, line["began"]), line["at"] if line["what"] == "ack" else ended)
    for (agent, record), (began, ended) in puts.items():
        if agent.endswith("-1"):
            found[agent].append(Operation("write", record, began, ended))
    for line in observed:
        if line["what"] == "read" and line["agent"].endswith("-1"):
            found[line["agent"]].append(Operation("read", line["id"] or "", line["began"], line["ended"]))
    return found


def reads_whole(observed: list[dict[str, Any]]) -> None:
    """Nobody was given other bytes than were written."""
    for line in observed:
        if line["what"] == "read" and not line["whole"]:
            raise Violation("reads-whole", f"{line['agent']} read {line['id']} with another body")
