"""LangGraph checkpoints on the stream: a ``BaseCheckpointSaver`` whose threads survive the loss of a region.

    with Checkpoints(endpoints) as client:
        graph = builder.compile(checkpointer=ReplicatedSaver(client))

A thread is an agent; each checkpoint is one record, and each ``put_writes`` is one. All namespaces of a thread are in one log, so
a region that takes over has a prefix of the thread: never a subgraph's step without the step of its parent that it belongs to.

**Deletions are records too.** The stream is append-only: ``delete_thread``, ``prune`` and ``delete_for_runs`` write records that
say what is not to be shown any more, in every region and in the same order for all. They free no space and erase no bytes;
retention does that. ``delete_for_runs`` writes one record per run beside the threads, so no thread has to be searched for.

**Restorable means complete.** Channels that store only their changes (``DeltaChannel``) are rebuilt along the chain of parents.
When a parent or some of its writes cannot be had, ``IncompleteHistory`` is raised; such state never reads as empty. ``prune`` hides
ancestors and keeps them readable for this purpose.

**Fenced surfaces.** What the client raises is raised inside the graph, at the step that could not be made safe. With ``hold`` the
right to act is checked before every write, so a graph in a lost region also stops where it would only begin something new.

Values are serialised by ``serde`` (LangGraph's ``JsonPlusSerializer`` when left out: no pickle) and are data only for everybody
else. Needs the extra ``langgraph``.
"""

from __future__ import annotations

import builtins
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    get_checkpoint_id,
    get_checkpoint_metadata,
)
from langgraph.checkpoint.serde.base import SerializerProtocol

from controller.agent.bridge import Bridge
from controller.agent.client import AsyncCheckpoints
from controller.agent.journal import Draft, Journal, Journals, MayAct, Writing, agent_name, escape
from controller.agent.sync import Checkpoints
from controller.domain.model import Kind, Record
from controller.errors import Corrupt, NotFound, Refused

COPIES = "dr_copies"
ATTEMPT = "dr_attempt"
"""Keys of ``config["configurable"]`` that override the saver's own for one call or one run."""

WRITES = "writes"
DELETED = "deleted"
"""Kinds of record, beside ``checkpoint`` (of the root namespace) and ``checkpoint:…`` (of a subgraph's)."""
RUNS_DELETED = "%runs-deleted"
"""Agent that holds the runs that were deleted. No thread has this name: ``escape`` gives ``%`` only before hex digits and ``~``."""
CHUNK = 16
"""Checkpoints that ``list`` reads at a time."""
PART_CHARS = 90
"""A record's id is made of at most three parts of this length."""


class IncompleteHistory(Corrupt):
    """State that is stored as changes cannot be rebuilt: a parent checkpoint or some of its writes cannot be had."""

    code = "incomplete_history"


class _CheckpointBody(msgspec.Struct, frozen=True, array_like=True):
    checkpoint: tuple[str, bytes]
    metadata: tuple[str, bytes]


class _WritesBody(msgspec.Struct, frozen=True, array_like=True):
    task: str
    path: str
    writes: list[tuple[int, str, str, bytes]]
    """Index as LangGraph counts it, channel, type, data."""


class _PrunedBody(msgspec.Struct, frozen=True, array_like=True):
    checkpoints: list[tuple[str, str]]
    """Namespace and checkpoint id."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A checkpoint as the log has it."""

    ns: str
    id: str
    parent: str | None
    run: str
    parent_writes: int
    """Records of writes to the parent that were acknowledged before this checkpoint was written."""
    record: Record


@dataclass(slots=True)
class _Thread:
    """What a log says. ``shown`` is without what was pruned; chains of parents are followed in ``entries``."""

    entries: dict[tuple[str, str], _Entry] = field(default_factory=dict)
    shown: set[tuple[str, str]] = field(default_factory=set)
    writes: dict[tuple[str, str], list[Record]] = field(default_factory=dict)
    live_from: int = 0
    """Place after the last deletion of the whole thread."""
    newest: dict[tuple[str, ...], int] = field(default_factory=dict)
    """Last place at which something was said about a checkpoint, or about a task's writes to one."""


class ReplicatedSaver(BaseCheckpointSaver[int]):
    """See the module. Every method exists blocking and as a coroutine; with a ``Checkpoints`` both can be called from anywhere, with
    an ``AsyncCheckpoints`` the blocking ones only from other threads than its event loop's.

    ``copies``: regions that must have a record before it counts as written. ``attempt``: number of the assignment under which this
    process runs the agents, 0 = none. ``hold``: checked before every write. ``prefix``: put before thread ids in agents' names.
    """

    def __init__(
        self,
        client: AsyncCheckpoints | Checkpoints,
        *,
        serde: SerializerProtocol | None = None,
        copies: int = 1,
        attempt: int = 0,
        hold: MayAct | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(serde=serde)
        self._bridge = Bridge(client)
        self._journals = Journals(self._bridge.client)
        self._threads: dict[str, tuple[Journal, int, _Thread]] = {}
        self._writing = Writing(copies, attempt)
        self._hold = hold
        self._prefix = prefix

    def agent(self, thread_id: str) -> str:
        """The agent under whose name a thread is stored: what ``drctl`` shows, and what tasks are assigned by."""
        return agent_name(self._prefix, str(thread_id))

    # -------------------------------------------------------------------------------------------------------- writing

    async def aput(
        self, config: RunnableConfig, checkpoint: Checkpoint, metadata: CheckpointMetadata, new_versions: ChannelVersions
    ) -> RunnableConfig:
        """One record. Raises Unavailable, OutcomeUnknown, Fenced, Refused: the step is not safe then."""
        return await self._bridge.wait(self._put(config, checkpoint, self._checkpoint_body(config, checkpoint, metadata)))

    def put(
        self, config: RunnableConfig, checkpoint: Checkpoint, metadata: CheckpointMetadata, new_versions: ChannelVersions
    ) -> RunnableConfig:
        """See ``aput``."""
        return self._bridge.run(self._put(config, checkpoint, self._checkpoint_body(config, checkpoint, metadata)))

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """One record for all of a task's writes. Raises like ``aput``."""
        await self._bridge.wait(self._put_writes(config, self._writes_body(writes, task_id, task_path), task_id))

    def put_writes(self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = "") -> None:
        """See ``aput_writes``."""
        self._bridge.run(self._put_writes(config, self._writes_body(writes, task_id, task_path), task_id))

    def _checkpoint_body(
        self, config: RunnableConfig, checkpoint: Checkpoint, metadata: CheckpointMetadata
    ) -> tuple[bytes, CheckpointMetadata]:
        self._check_hold()
        known: Any = {
            key: value for key, value in get_checkpoint_metadata(config, metadata).items() if key not in (COPIES, ATTEMPT)
        }
        body = _CheckpointBody(self.serde.dumps_typed(checkpoint), self.serde.dumps_typed(known))
        return msgspec.msgpack.encode(body), known

    def _writes_body(self, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str) -> bytes:
        self._check_hold()
        typed = [(WRITES_IDX_MAP.get(name, at), name, *self.serde.dumps_typed(value)) for at, (name, value) in enumerate(writes)]
        return msgspec.msgpack.encode(_WritesBody(task_id, task_path, typed))

    def _check_hold(self) -> None:
        if self._hold is not None:
            self._hold.check()

    def _writing_of(self, config: RunnableConfig) -> Writing:
        asked = config.get("configurable", {})
        return Writing(int(asked.get(COPIES, self._writing.copies)), int(asked.get(ATTEMPT, self._writing.attempt)))

    async def _put(
        self, config: RunnableConfig, checkpoint: Checkpoint, content: tuple[bytes, CheckpointMetadata]
    ) -> RunnableConfig:
        thread_id, ns, parent = _address(config)
        journal = self._journals.of(self.agent(thread_id))
        body, metadata = content
        key = ns, checkpoint["id"]
        meta = {"ns": ns, "checkpoint": checkpoint["id"], "source": str(metadata.get("source", ""))}
        meta["step"] = str(metadata.get("step", ""))
        run = metadata.get("run_id")
        if run is not None:
            meta["run"] = str(run)
        if parent is not None:
            meta["parent"] = parent
            meta["parent_writes"] = str(self._known_writes(journal, (ns, parent)))
        draft = Draft(
            _record_id(key), _kind(ns), body, parent=None if parent is None else _record_id((ns, parent)), meta=meta
        )
        await journal.append(draft, self._writing_of(config), self._stands(journal, key))
        return _config(thread_id, *key)

    async def _put_writes(self, config: RunnableConfig, body: bytes, task_id: str) -> None:
        thread_id, ns, checkpoint_id = _address(config)
        if checkpoint_id is None:
            raise Refused("writes belong to a checkpoint", hint='give config["configurable"]["checkpoint_id"]')
        journal = self._journals.of(self.agent(thread_id))
        key = ns, checkpoint_id
        record_id = f"{WRITES}/{_record_id(key)}/{escape(task_id, PART_CHARS // 2)}/{hashlib.sha256(body).hexdigest()[:16]}"
        draft = Draft(record_id, WRITES, body, meta={"ns": ns, "checkpoint": checkpoint_id, "task": task_id})
        await journal.append(draft, self._writing_of(config), self._stands(journal, (*key, task_id)))
        journal.note(WRITES, _record_id(key), record_id)

    def _stands(self, journal: Journal, subject: tuple[str, ...]) -> Callable[[int], bool]:
        """Whether a record that was written before still is the last word about its subject."""

        def stands(place: int) -> bool:
            thread = _parse(journal, {})
            hidden = len(subject) == 2 and (subject[0], subject[1]) not in thread.shown
            return thread.newest.get(subject) == place and not hidden

        return stands

    @staticmethod
    def _known_writes(journal: Journal, parent: tuple[str, str]) -> int:
        """Records of writes to the parent that certainly are in the log, to be found again by who rebuilds state from them."""
        listed = {
            record.id
            for record in journal.records
            if record.kind == WRITES and (record.meta.get("ns"), record.meta.get("checkpoint")) == parent
        }
        return len(listed | journal.noted(WRITES, _record_id(parent)))
