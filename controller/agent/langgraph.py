"""LangGraph checkpoints on the stream: a ``BaseCheckpointSaver`` whose threads survive the loss of a region.

    with Checkpoints(endpoints) as client:
        graph = builder.compile(checkpointer=ReplicatedSaver(client))

A thread is an agent; each checkpoint is one record, and so is each ``put_writes``. All namespaces of a thread are in one
log, so a region that takes over has a prefix of the thread: never a subgraph's step without its parent's step before it.

**Deletions are records too.** The stream is append-only: ``delete_thread``, ``prune`` and ``delete_for_runs`` write records
that say what is not to be shown any more, in every region and in the same order for all. They free no space and erase no bytes;
retention does that. ``delete_for_runs`` writes one record per run beside the threads, so no thread has to be searched for.

**Restorable means complete.** Channels that store only their changes (``DeltaChannel``) are rebuilt along the chain of parents.
When a parent or some of its writes cannot be had, ``IncompleteHistory`` is raised; such state never reads as empty. ``prune``
hides ancestors and keeps them readable for this purpose.

**Fenced surfaces.** What the client raises is raised inside the graph, at the step that could not be made safe. With ``hold``
the right to act is checked before every write: a graph in a lost region also stops where it would only begin something new.

Here are LangGraph's own calls and its values; what is done to a thread's log is in ``thread_log``. Values are serialised by
``serde`` (LangGraph's ``JsonPlusSerializer`` when left out: no pickle) and are data only for everybody else. Needs the extra
``langgraph``.
"""

from __future__ import annotations

import builtins
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
from controller.agent.journal import MayAct, Writing
from controller.agent.sync import Checkpoints
from controller.agent.thread_log import Address, ThreadLog
from controller.agent.threads import CheckpointBody, IncompleteHistory, Key, Loaded, WritesBody
from controller.errors import Refused

if TYPE_CHECKING:  # newer than the oldest version that this module works with
    from langgraph.checkpoint.base import DeltaChannelHistory

__all__ = ["ATTEMPT", "COPIES", "IncompleteHistory", "ReplicatedSaver"]

COPIES = "dr_copies"
ATTEMPT = "dr_attempt"
"""Keys of ``config["configurable"]`` that override the saver's own for one call or one run."""

CHUNK = 16
"""Checkpoints that ``list`` reads at a time."""


class ReplicatedSaver(BaseCheckpointSaver[int]):
    """See the module. Every method exists blocking and as a coroutine; with a ``Checkpoints`` both can be called from anywhere,
    with an ``AsyncCheckpoints`` the blocking ones only from other threads than its event loop's.

    ``copies``: regions that must have a record before it counts as written. ``attempt``: number of the assignment under which
    this process runs the agents, 0 = none. ``hold``: checked before every write, and before a run reads where it stands.
    ``prefix``: stands before thread ids in agents' names. ``fence_sleepers``: raise ``Fenced`` in a run that went to sleep and
    whose thread somebody else has taken further in a later epoch; False = its checkpoints are taken all the same.
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
        fence_sleepers: bool = True,
    ) -> None:
        super().__init__(serde=serde)
        self._bridge = Bridge(client)
        self._writing = Writing(copies, attempt)
        by = uuid.uuid4().hex[:12] if fence_sleepers else ""
        self._log = ThreadLog(self._bridge.client, prefix=prefix, writing=self._writing, by=by)
        self._hold = hold

    def agent(self, thread_id: str) -> str:
        """The agent under whose name a thread is stored: what ``drctl`` shows, and what tasks are assigned by."""
        return self._log.agent(thread_id)

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
        body = CheckpointBody(self.serde.dumps_typed(checkpoint), self.serde.dumps_typed(known))
        return msgspec.msgpack.encode(body), known

    def _writes_body(self, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str) -> bytes:
        self._check_hold()
        typed = [
            (WRITES_IDX_MAP.get(name, at), name, *self.serde.dumps_typed(value)) for at, (name, value) in enumerate(writes)
        ]
        return msgspec.msgpack.encode(WritesBody(task_id, task_path, typed))

    def _check_hold(self) -> None:
        if self._hold is not None:
            self._hold.check()

    def _writing_of(self, config: RunnableConfig) -> Writing:
        asked = config.get("configurable", {})
        return Writing(int(asked.get(COPIES, self._writing.copies)), int(asked.get(ATTEMPT, self._writing.attempt)))

    async def _put(
        self, config: RunnableConfig, checkpoint: Checkpoint, content: tuple[bytes, CheckpointMetadata]
    ) -> RunnableConfig:
        body, metadata = content
        address = _address(config)
        known: Mapping[str, Any] = {**metadata}
        key = await self._log.put(address, checkpoint["id"], known, body, self._writing_of(config))
        return _config(address.thread_id, key)

    async def _put_writes(self, config: RunnableConfig, body: bytes, task_id: str) -> None:
        await self._log.put_writes(_address(config), task_id, body, self._writing_of(config))

    # -------------------------------------------------------------------------------------------------------- reading

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """A checkpoint with its pending writes; without an id the namespace's latest. Raises Unavailable, Corrupt, Fenced."""
        self._check_hold()
        found = await self._bridge.wait(self._get(config))
        return None if found is None else self._tuple(found)

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """See ``aget_tuple``."""
        self._check_hold()
        found = self._bridge.run(self._get(config))
        return None if found is None else self._tuple(found)

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002 - LangGraph's name
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """A thread's checkpoints, newest first. Raises Refused without a thread: agents are listed by ``drctl agents``."""
        left = limit
        for keys in _chunks(await self._bridge.wait(self._candidates(config, filter, before))):
            for found in await self._bridge.wait(self._load_all(config, keys)):
                if left is not None and left <= 0:
                    return
                one = self._tuple(found)
                if _matches(one.metadata, filter):
                    left = None if left is None else left - 1
                    yield one

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002 - LangGraph's name
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """See ``alist``."""
        left = limit
        for keys in _chunks(self._bridge.run(self._candidates(config, filter, before))):
            for found in self._bridge.run(self._load_all(config, keys)):
                if left is not None and left <= 0:
                    return
                one = self._tuple(found)
                if _matches(one.metadata, filter):
                    left = None if left is None else left - 1
                    yield one

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """What channels that store only changes are rebuilt from. Raises IncompleteHistory; LangGraph would begin empty."""
        return self._history(await self._bridge.wait(self._chain(config, channels)), channels)

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """See ``aget_delta_channel_history``."""
        return self._history(self._bridge.run(self._chain(config, channels)), channels)

    async def anewest_whole(self, config: RunnableConfig) -> RunnableConfig | None:
        """The newest checkpoint of a thread's namespace whose state can be rebuilt here: where to resume after an
        ``IncompleteHistory``. What came after it is lost with that. None when there is none."""
        return await self._bridge.wait(self._newest_whole(config))

    def newest_whole(self, config: RunnableConfig) -> RunnableConfig | None:
        """See ``anewest_whole``."""
        return self._bridge.run(self._newest_whole(config))

    async def _newest_whole(self, config: RunnableConfig) -> RunnableConfig | None:
        thread_id, ns, _ = _address(config)
        found = await self._log.newest_whole(thread_id, ns)
        return None if found is None else _config(thread_id, (ns, found))

    async def _get(self, config: RunnableConfig) -> Loaded | None:
        return await self._log.get(_address(config))

    async def _candidates(
        self,
        config: RunnableConfig | None,
        filter: Mapping[str, Any] | None,  # noqa: A002
        before: RunnableConfig | None,
    ) -> builtins.list[Key]:
        if config is None:
            raise Refused("checkpoints are listed by thread", hint='give config["configurable"]["thread_id"]')
        address, space = _address(config), config["configurable"].get("checkpoint_ns")
        older = get_checkpoint_id(before) if before else None
        return await self._log.candidates(address, space, older, filter)

    async def _load_all(self, config: RunnableConfig | None, keys: Sequence[Key]) -> builtins.list[Loaded]:
        assert config is not None
        return await self._log.load_all(_address(config).thread_id, keys)

    async def _chain(self, config: RunnableConfig, channels: Sequence[str]) -> builtins.list[Loaded]:
        return await self._log.chain(_address(config), channels, lambda loaded: self._checkpoint(loaded)["channel_values"])

    def _history(self, chain: Sequence[Loaded], channels: Sequence[str]) -> Mapping[str, DeltaChannelHistory]:
        """Writes oldest first, from the nearest stored value on; that checkpoint's own writes come after its value."""
        history: dict[str, DeltaChannelHistory] = {name: {"writes": []} for name in channels}
        open_channels = set(channels)
        for loaded in chain:
            values = self._checkpoint(loaded)["channel_values"]
            for write in reversed(self._pending(loaded)):
                if write[1] in open_channels:
                    history[write[1]]["writes"].append(write)
            for name in open_channels & set(values):
                history[name]["seed"] = values[name]
            open_channels -= set(values)
        for found in history.values():
            found["writes"].reverse()
        return history

    # ---------------------------------------------------------------------------------------------------- values

    def _tuple(self, loaded: Loaded) -> CheckpointTuple:
        key, parent = loaded.key, loaded.parent
        return CheckpointTuple(
            config=_config(loaded.thread_id, key),
            checkpoint=self._checkpoint(loaded),
            metadata=self.serde.loads_typed(loaded.body.metadata),
            parent_config=None if parent is None else _config(loaded.thread_id, (key[0], parent)),
            pending_writes=self._pending(loaded),
        )

    def _checkpoint(self, loaded: Loaded) -> Checkpoint:
        checkpoint: Checkpoint = self.serde.loads_typed(loaded.body.checkpoint)
        return checkpoint

    def _pending(self, loaded: Loaded) -> builtins.list[tuple[str, str, Any]]:
        """In the order in which LangGraph applies them. A task's plain write stands once written; an error, interrupt or resume
        value replaces the one before."""
        chosen: dict[tuple[str, str, int], tuple[str, str, Any]] = {}
        seen: dict[tuple[str, int], tuple[str, str, int]] = {}
        for body in loaded.writes:
            for at, channel, kind, data in body.writes:
                if at >= 0 and (body.task, at) in seen:
                    continue
                if (body.task, at) in seen:
                    del chosen[seen[body.task, at]]
                order = seen[body.task, at] = (body.path, body.task, at)
                chosen[order] = (body.task, channel, self.serde.loads_typed((kind, data)))
        return [chosen[order] for order in sorted(chosen)]

    # ------------------------------------------------------------------------------------------------------ deleting

    async def adelete_thread(self, thread_id: str) -> None:
        """Hides all checkpoints and writes of a thread that were written until now. Bytes stay until retention takes them."""
        self._check_hold()
        await self._bridge.wait(self._log.delete(thread_id, "delete"))

    def delete_thread(self, thread_id: str) -> None:
        """See ``adelete_thread``."""
        self._check_hold()
        self._bridge.run(self._log.delete(thread_id, "delete"))

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """``keep_latest``: hides all but the latest checkpoint of each namespace (ancestors stay readable for channels that
        need them). ``delete``: hides everything. Raises Refused for other strategies."""
        self._check_hold()
        for thread_id in thread_ids:
            await self._bridge.wait(self._log.delete(thread_id, strategy))

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """See ``aprune``."""
        self._check_hold()
        for thread_id in thread_ids:
            self._bridge.run(self._log.delete(thread_id, strategy))

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Hides every checkpoint of these runs, in all threads, also what such a run would still write."""
        self._check_hold()
        for run_id in run_ids:
            await self._bridge.wait(self._log.delete_run(str(run_id)))

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """See ``adelete_for_runs``."""
        self._check_hold()
        for run_id in run_ids:
            self._bridge.run(self._log.delete_run(str(run_id)))

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copies all that the source's log holds since it was last deleted, pruned ancestors too, so that every chain is
        complete. What the target has already stays. Interrupted, it can be repeated."""
        self._check_hold()
        await self._bridge.wait(self._log.copy(source_thread_id, target_thread_id))

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """See ``acopy_thread``."""
        self._check_hold()
        self._bridge.run(self._log.copy(source_thread_id, target_thread_id))


def _matches(metadata: CheckpointMetadata, wanted: Mapping[str, Any] | None) -> bool:
    known: Mapping[str, Any] = {**metadata}
    return all(name in known and known[name] == value for name, value in (wanted or {}).items())


def _chunks(keys: Sequence[Key]) -> Iterator[Sequence[Key]]:
    for at in range(0, len(keys), CHUNK):
        yield keys[at : at + CHUNK]


def _address(config: RunnableConfig) -> Address:
    """Raises Refused without a thread."""
    known = config.get("configurable", {})
    if "thread_id" not in known:
        raise Refused("a checkpoint belongs to a thread", hint='give config["configurable"]["thread_id"]')
    return Address(str(known["thread_id"]), str(known.get("checkpoint_ns") or ""), get_checkpoint_id(config))


def _config(thread_id: str, key: Key) -> RunnableConfig:
    return {"configurable": {"thread_id": thread_id, "checkpoint_ns": key[0], "checkpoint_id": key[1]}}
