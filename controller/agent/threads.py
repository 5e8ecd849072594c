"""What the log of a LangGraph thread says: checkpoints, writes, and what was deleted. Nothing of LangGraph is needed here.

Ids (``rank``), namespaces (``subject``) and parents of checkpoints are in the records' ``meta``, so a thread is understood from
a list of records alone, and retention knows what its newest state stands on (``controller.stream.live``); bodies are read
where values are wanted. A record's own id is made from the same, so that it is written once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from controller.agent.journal import Journal, escape
from controller.domain.model import Kind, Record
from controller.errors import Corrupt
from controller.stream.live import RANK, SUBJECT, parent_writes, whole

Key = tuple[str, str]
"""Namespace and checkpoint id."""
WRITES = "writes"
DELETED = "deleted"
"""Kinds of record, beside ``checkpoint`` (of the root namespace) and ``checkpoint:…`` (of a subgraph's)."""
RUNS_DELETED = "%runs-deleted"
"""Agent that holds the runs that were deleted. No thread has this name: ``escape`` writes ``%`` before hex digits or ``~``."""
STRATEGIES = ("keep_latest", "delete")
PART_CHARS = 90
"""A record's id is made of at most three parts of this length."""


class IncompleteHistory(Corrupt):
    """State that is stored as changes cannot be rebuilt: a parent checkpoint or some of its writes cannot be had."""

    code = "incomplete_history"


class CheckpointBody(msgspec.Struct, frozen=True, array_like=True):
    checkpoint: tuple[str, bytes]
    metadata: tuple[str, bytes]


class WritesBody(msgspec.Struct, frozen=True, array_like=True):
    task: str
    path: str
    writes: list[tuple[int, str, str, bytes]]
    """Index as LangGraph counts it, channel, type, data."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A checkpoint as the log has it."""

    ns: str
    id: str
    parent: str | None
    run: str
    parent_writes: int
    """Records of writes to the parent that were acknowledged before this checkpoint was written."""
    record: Record


@dataclass(slots=True)
class Thread:
    """What a log says. ``shown`` is without what was pruned; chains of parents are followed in ``entries``."""

    entries: dict[Key, Entry] = field(default_factory=dict)
    shown: set[Key] = field(default_factory=set)
    writes: dict[Key, list[Record]] = field(default_factory=dict)
    places: dict[tuple[str, ...], int] = field(default_factory=dict)
    """Last place at which something was said about a checkpoint, or about one task's writes to it."""
    begins: int = 0
    """Place after the last deletion of the whole thread."""

    def latest(self, ns: str) -> str | None:
        """The greatest id of a namespace: LangGraph's ids grow with time."""
        return max((checkpoint_id for space, checkpoint_id in self.shown if space == ns), default=None)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A checkpoint as bytes: values are made of it in the caller's thread."""

    thread_id: str
    key: Key
    parent: str | None
    body: CheckpointBody
    writes: tuple[WritesBody, ...]


async def load(journal: Journal, thread: Thread, thread_id: str, key: Key) -> Loaded:
    entry = thread.entries[key]
    records = [entry.record, *thread.writes.get(key, ())]
    body, *writes = await asyncio.gather(*(journal.body(record) for record in records))
    try:
        return Loaded(
            thread_id,
            key,
            entry.parent,
            msgspec.msgpack.decode(body, type=CheckpointBody),
            tuple(msgspec.msgpack.decode(one, type=WritesBody) for one in writes),
        )
    except msgspec.DecodeError as error:
        raise Corrupt(
            f"checkpoint {key[1]!a} of agent {journal.agent!a} is none of this saver's: {error}",
            hint="is the agent's name used by another program? set a prefix",
        ) from error


def incomplete(entry: Entry, channels: set[str], why: str) -> IncompleteHistory:
    return IncompleteHistory(
        f"channels {', '.join(sorted(channels))} of checkpoint {entry.id!a} stand on its parent {entry.parent!a}: {why}",
        hint="resume from a checkpoint that is complete (the saver's newest_whole), or restore the records from another region",
    )


def newest_whole(journal: Journal, thread: Thread, ns: str) -> str | None:
    """The greatest checkpoint id of a namespace that has all that it stands on in this copy."""
    older = list(reversed(journal.records))
    for checkpoint_id in sorted((key[1] for key in thread.shown if key[0] == ns), reverse=True):
        record = thread.entries[ns, checkpoint_id].record
        if whole(record, older[len(older) - (journal.place(record.id) or 0) :]):
            return checkpoint_id
    return None


def parsed(journal: Journal) -> Thread:
    """Cached with the journal while it does not change."""
    if journal.parsed is None or journal.parsed[0] != journal.version:
        journal.parsed = journal.version, parse(journal.log)
    thread: Thread = journal.parsed[1]
    return thread


def parse(log: Sequence[tuple[int, Record]]) -> Thread:
    """``log``: the records that count, oldest first, with their places."""
    thread = Thread()
    for place, record in log:
        meta = record.meta
        if record.kind == DELETED:
            if meta.get("strategy") == "keep_latest":
                thread.shown = {(ns, found) for ns in {key[0] for key in thread.shown} if (found := thread.latest(ns))}
            else:
                thread = Thread(begins=place + 1)
            continue
        if SUBJECT not in meta or RANK not in meta:
            continue  # another program's record, or a mark
        key = meta[SUBJECT], meta[RANK]
        if record.kind == WRITES:
            thread.writes.setdefault(key, []).append(record)
            thread.places[*key, meta.get("task", "")] = place
        else:
            thread.entries[key] = Entry(*key, meta.get("parent"), meta.get("run", ""), parent_writes(record), record)
            thread.shown.add(key)
            thread.places[key] = place
    return thread


def stands_in(journal: Journal, subject: tuple[str, ...]) -> Callable[[int], bool]:
    """Whether a record that was written before still is the last word about its subject, and shown."""

    def stands(place: int) -> bool:
        thread = parsed(journal)
        if len(subject) == 2 and subject not in thread.shown:
            return False
        return place >= thread.begins and (not subject or thread.places.get(subject) == place)

    return stands


def known_writes(journal: Journal, parent: Key) -> int:
    """Records of writes to the parent that certainly are in the log before its child: they are asked for when the child's state
    is rebuilt. A lower bound suffices; LangGraph waits for the writes that matter before it puts the child."""
    listed = {record.id for record in parsed(journal).writes.get(parent, ())}
    return len(listed | journal.notes.pop(parent, set()))


def record_id_of(key: Key) -> str:
    """The checkpoint's own id in the root namespace; a subgraph's follows behind ``@``."""
    ns, checkpoint_id = key
    name = escape(checkpoint_id, PART_CHARS)
    return f"{name}@{escape(ns, PART_CHARS)}" if ns else name


def enclosing(ns: str, parents: Mapping[str, str]) -> Key | None:
    """The step of the outer graph during which a subgraph's task runs: once that is past, the subgraph's state is not asked for
    any more. None for the root, and for subgraphs that keep a state of their own (no task id in their namespace)."""
    outer = ns.rpartition("|")[0]
    return (outer, str(parents[outer])) if ":" in ns and outer in parents else None


def kind_of(ns: str) -> str:
    """One kind per place in the graph, so that each is a delta of its own past. Task ids in a namespace (behind ``:``) do not
    make a new place: there would be a kind for each run."""
    if not ns:
        return Kind.CHECKPOINT
    place = "|".join(part.split(":", 1)[0] for part in ns.split("|"))
    return f"{Kind.CHECKPOINT}:{escape(place, 50)}"
