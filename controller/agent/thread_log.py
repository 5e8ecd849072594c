"""The log of LangGraph threads, acted on: checkpoints and writes appended, found, loaded, hidden, copied.

``threads`` says what a log means; what the bytes of a body are, only ``langgraph`` knows. Nothing of LangGraph is needed here,
and nothing is overwritten or erased: what is deleted is a record that says so.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from controller.agent.client import AsyncCheckpoints
from controller.agent.journal import Draft, Journal, Journals, Writing, agent_name, escape, once
from controller.agent.threads import (
    DELETED,
    PART_CHARS,
    RUNS_DELETED,
    STRATEGIES,
    WRITES,
    Key,
    Loaded,
    Thread,
    enclosing,
    incomplete,
    kind_of,
    known_writes,
    load,
    newest_whole,
    parsed,
    record_id_of,
    stands_in,
)
from controller.errors import NotFound, Refused
from controller.stream.limits import RESERVED
from controller.stream.live import ATTACHED, CLEARS, NEEDS, PARENT, PARENT_WRITES, RANK, REPEAT, STAYS, SUBJECT, WITHIN, YES


class Address(NamedTuple):
    """What a call of LangGraph is about. ``checkpoint_id`` None: the newest one, or none yet."""

    thread_id: str
    ns: str
    checkpoint_id: str | None


class ThreadLog:
    """All threads of one client. ``prefix`` stands before thread ids in agents' names; ``by`` names this process in what it
    writes ("" = it is not compared with others); ``writing``: for records that belong to no run."""

    def __init__(self, client: AsyncCheckpoints, *, prefix: str, writing: Writing, by: str) -> None:
        self._journals = Journals(client)
        self._runs = Journal(client, prefix + RUNS_DELETED)
        self._prefix = prefix
        self._writing = writing
        self._by = by

    def agent(self, thread_id: str) -> str:
        """The agent under whose name a thread is stored."""
        return agent_name(self._prefix, str(thread_id))

    # -------------------------------------------------------------------------------------------------------- writing

    async def put(
        self, address: Address, checkpoint_id: str, metadata: Mapping[str, Any], body: bytes, writing: Writing
    ) -> Key:
        """One checkpoint, after the one that ``address`` names. Raises what ``Journal.append`` raises."""
        thread_id, ns, parent = address
        journal = self._journals.of(self.agent(thread_id))
        key = ns, checkpoint_id
        meta = {SUBJECT: ns, RANK: checkpoint_id, "source": str(metadata.get("source", ""))}
        meta["step"] = str(metadata.get("step", ""))
        run = metadata.get("run_id")
        if run is not None:
            meta["run"] = str(run)
        if parent is not None:
            meta["parent"] = parent
            meta[PARENT_WRITES] = str(known_writes(journal, (ns, parent)))
            if metadata.get("counters_since_delta_snapshot"):
                meta[NEEDS] = PARENT
        outer = enclosing(ns, metadata.get("parents") or {})
        if outer is not None:
            meta[WITHIN] = record_id_of(outer)
        above = None if parent is None else record_id_of((ns, parent))
        draft = Draft(record_id_of(key), kind_of(ns), body, above, meta)
        await journal.append(draft, replace(writing, by=self._by), stands_in(journal, key))
        return key

    async def put_writes(self, address: Address, task_id: str, body: bytes, writing: Writing) -> None:
        """All writes of one task to a checkpoint. Raises Refused without one, and what ``Journal.append`` raises."""
        thread_id, ns, checkpoint_id = address
        if checkpoint_id is None:
            raise Refused("writes belong to a checkpoint", hint='give config["configurable"]["checkpoint_id"]')
        journal = self._journals.of(self.agent(thread_id))
        key = ns, checkpoint_id
        digest = hashlib.sha256(body).hexdigest()[:16]
        record_id = f"{WRITES}/{record_id_of(key)}/{escape(task_id, PART_CHARS)}/{digest}"
        meta = {SUBJECT: ns, RANK: checkpoint_id, "task": task_id, ATTACHED: YES}
        draft = Draft(record_id, WRITES, body, record_id_of(key), meta)
        await journal.append(draft, replace(writing, by=self._by), stands_in(journal, (*key, task_id)))
        journal.notes.setdefault(key, set()).add(record_id)

    # -------------------------------------------------------------------------------------------------------- reading

    async def _thread(self, thread_id: str) -> tuple[Journal, Thread]:
        """As of now, without what was deleted."""
        journal = self._journals.of(self.agent(thread_id))
        await asyncio.gather(journal.refresh(), self._runs.refresh())
        thread = parsed(journal)
        runs = {record.meta.get("run") for record in self._runs.records}
        if runs:
            shown = {key for key in thread.shown if thread.entries[key].run not in runs}
            thread = replace(thread, shown=shown)
        return journal, thread

    async def newest_whole(self, thread_id: str, ns: str) -> str | None:
        """The newest checkpoint of a namespace whose state can be rebuilt here."""
        return newest_whole(*await self._thread(thread_id), ns)

    async def get(self, address: Address) -> Loaded | None:
        """A checkpoint with its writes; without an id the namespace's latest."""
        thread_id, ns, checkpoint_id = address
        journal, thread = await self._thread(thread_id)
        if not ns:  # a run begins; a subgraph's beginning in the middle of one does not count
            journal.opened()
        wanted = checkpoint_id or thread.latest(ns)
        if wanted is None or (ns, wanted) not in thread.shown:
            return None
        return await load(journal, thread, thread_id, (ns, wanted))

    async def candidates(
        self, address: Address, space: str | None, older: str | None, wanted: Mapping[str, Any] | None
    ) -> list[Key]:
        """Checkpoints that may match, newest first. ``space``: of this namespace only; ``older``: than this id."""
        thread_id, _, checkpoint_id = address
        _, thread = await self._thread(thread_id)
        keys = [
            key
            for key in thread.shown
            if (space is None or key[0] == space)
            and (not checkpoint_id or key[1] == checkpoint_id)
            and (not older or key[1] < older)
            and _may_match(thread.entries[key].record.meta, wanted)
        ]
        return sorted(keys, key=lambda key: (key[1], key[0]), reverse=True)

    async def load_all(self, thread_id: str, keys: Sequence[Key]) -> list[Loaded]:
        """Of what was listed just now; the index is not asked for anew."""
        journal = self._journals.of(self.agent(thread_id))
        thread = parsed(journal)
        return await asyncio.gather(*(load(journal, thread, thread_id, key) for key in keys if key in thread.entries))

    async def chain(
        self, address: Address, channels: Sequence[str], stored: Callable[[Loaded], Collection[str]]
    ) -> list[Loaded]:
        """The target's ancestors, nearest first, to the root or until every channel has a value that is ``stored`` whole.
        Raises IncompleteHistory."""
        thread_id, ns, checkpoint_id = address
        journal, thread = await self._thread(thread_id)
        if not ns:  # a run begins; a subgraph's beginning in the middle of one does not count
            journal.opened()
        wanted = checkpoint_id or thread.latest(ns)
        entry = thread.entries.get((ns, wanted)) if wanted else None
        remaining = set(channels)
        chain: list[Loaded] = []
        while entry is not None and entry.parent is not None and remaining:
            key = ns, entry.parent
            if key not in thread.entries:
                raise incomplete(entry, remaining, "it is not in this region's copy")
            if len(thread.writes.get(key, ())) < entry.parent_writes:
                raise incomplete(entry, remaining, f"{entry.parent_writes} records of writes to it are needed")
            try:
                loaded = await load(journal, thread, thread_id, key)
            except NotFound as error:
                raise incomplete(entry, remaining, error.message) from error
            chain.append(loaded)
            remaining -= set(stored(loaded))
            entry = thread.entries[key]
        return chain

    # ------------------------------------------------------------------------------------------------------- deleting

    async def delete(self, thread_id: str, strategy: str) -> None:
        """Hides checkpoints of a thread. Raises Refused for an unknown strategy."""
        if strategy not in STRATEGIES:
            raise Refused(f"strategy {strategy!r} is none of {', '.join(STRATEGIES)}", hint="choose one of them")
        journal, thread = await self._thread(thread_id)
        if not thread.shown:
            return
        meta = {"strategy": strategy, **({CLEARS: YES} if strategy == "delete" else {STAYS: YES})}
        draft = Draft(f"{DELETED}/{uuid.uuid4().hex}", DELETED, b"", meta=meta)
        await journal.append(draft, self._writing, once)

    async def delete_run(self, run_id: str) -> None:
        """Hides every checkpoint of a run, in all threads."""
        draft = Draft(f"{DELETED}/{escape(run_id, PART_CHARS)}", DELETED, b"", meta={"run": run_id, STAYS: YES})
        await self._runs.append(draft, Writing(self._writing.copies), once)

    async def copy(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copies all that the source's log holds since it was last deleted. What the target has already stays."""
        source, thread = await self._thread(source_thread_id)
        target, _ = await self._thread(target_thread_id)
        for place, record in source.log:
            if place < thread.begins:
                continue
            if record.kind != DELETED and RANK not in record.meta:
                continue
            subject = tuple(record.meta[name] for name in (SUBJECT, RANK, "task") if name in record.meta)
            body = await source.body(record)
            meta = {key: value for key, value in record.meta.items() if not key.startswith(RESERVED)}
            draft = Draft(record.id.split(REPEAT)[0], record.kind, body, record.parent, meta)
            await target.append(draft, self._writing, stands_in(target, subject))


def _may_match(meta: Mapping[str, str], wanted: Mapping[str, Any] | None) -> bool:
    """Decides what a record's own fields can decide, so that not every body has to be read."""
    return all(str(value) == meta.get(name, str(value)) for name, value in (wanted or {}).items() if name in ("source", "step"))
