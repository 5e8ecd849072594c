"""Gives agents an earlier state back: a new record that repeats an old one, at the end of a history that only grows.

Held to what people saw: the request names for each agent the record that it had then and the newest one that it has now; an
agent that wrote since is left alone. The new record's id follows from these, so a repeated request is a repetition and not a
second restore. Its meta says what it repeats and which record was the last of that time (``stream/live.py``: what stands
between is stepped over by the adapters, whose newest record is decided by other things than its place).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

from controller.domain.model import Ack, Frame
from controller.errors import Conflict, DrError, Refused
from controller.ports import Clock, RegionStore
from controller.runtime.active import Active
from controller.runtime.archive import Archive
from controller.runtime.archive_documents import AgentThen, Restored, RestoreItem, RestoreOutcome
from controller.runtime.audit import Audit
from controller.runtime.fleet import FleetManager
from controller.stream.limits import RESERVED, RESTORED, UPTO
from controller.stream.live import ATTACHED, CLEARS, NEEDS, RANK, STAYS, SUBJECT, WITHIN
from controller.stream.reader import read_record
from controller.stream.segment import frame
from controller.stream.view import View

COPIES = 2
BATCH_BYTES = 8 * 2**20
BATCH_FRAMES = 64
LISTED = 20
_RULES = frozenset({SUBJECT, RANK, STAYS, CLEARS, NEEDS, ATTACHED, WITHIN})
"""Say how a record stands to others. The repetition stands for itself."""


class Restorer:
    """``serving``: the epoch of a stream that this instance may write now; raises NotActive."""

    def __init__(
        self,
        *,
        group: str,
        archive: Archive,
        view: View,
        store: RegionStore,
        stores: int,
        fleet: FleetManager,
        serving: Callable[[str], Active],
        audit: Audit,
        clock: Clock,
    ) -> None:
        self._group = group
        self._archive = archive
        self._view = view
        self._store = store
        self._copies = min(COPIES, stores)
        self._fleet = fleet
        self._serving = serving
        self._audit = audit
        self._clock = clock

    async def restore(
        self, at: float, kind: str, items: Sequence[RestoreItem], *, requester: str, confirm: str, force: bool
    ) -> Restored:
        """One outcome for each item, in their order. Raises NotActive (no record is written anywhere else), Refused (not
        confirmed), Unavailable (the audit cannot be written: nothing was done)."""
        if confirm != self._group:
            raise Refused(f"confirm says {confirm!a}, the group is {self._group!a}", hint=f"--confirm {self._group}")
        outcomes: dict[int, RestoreOutcome] = {}
        ready: list[tuple[int, AgentThen]] = []
        for number, item in enumerate(items):
            try:
                then = self._judge(at, kind, item, force)
            except DrError as error:
                outcomes[number] = RestoreOutcome(item.agent, "failed", "", 0, error.message, error.hint)
                continue
            if then.state == "found":
                self._serving(_stream(then))
                ready.append((number, then))
            else:
                outcomes[number] = RestoreOutcome(item.agent, then.state, then.newest_id, 0, then.why)
        if ready:
            await self._tell(at, kind, [then for _, then in ready], requester, force)
        batch: list[tuple[int, AgentThen, Frame]] = []
        for number, then in ready:
            try:
                batch.append((number, then, await self._frame(then)))
            except DrError as error:
                outcomes[number] = RestoreOutcome(then.agent, "failed", "", 0, error.message, error.hint)
            if len(batch) >= BATCH_FRAMES or sum(len(one.payload) for _, _, one in batch) >= BATCH_BYTES:
                outcomes |= await self._write(batch)
                batch = []
        outcomes |= await self._write(batch)
        return Restored(self._group, at, kind, tuple(outcomes[number] for number in range(len(items))))

    def _judge(self, at: float, kind: str, item: RestoreItem, force: bool) -> AgentThen:
        (then,) = self._archive.as_of(at, kind, (item.agent,), "", 1).agents
        if then.state != "found" or then.found is None:
            return then
        if (then.found.id, then.newest_id) != (item.record, item.newest):
            raise Conflict(
                f"agent {item.agent!a} had {then.found.id!a} then and has {then.newest_id!a} now; asked for was "
                f"{item.record!a} instead of {item.newest!a}",
                hint="it wrote meanwhile: look again without --execute",
            )
        if then.running and not force:
            raise Refused(
                f"agent {item.agent!a} runs on {then.host!a} and would write over it",
                hint="stop it first, or restore it all the same with --force",
            )
        return then

    async def _tell(self, at: float, kind: str, thens: Sequence[AgentThen], requester: str, force: bool) -> None:
        first = [f"{then.agent}: {then.found.id if then.found else ''} instead of {then.newest_id}" for then in thens[:LISTED]]
        await self._audit.append(
            at=self._clock.wall(),
            actor=requester or "unknown",
            action="restore",
            subject=self._group,
            detail={"as_of": at, "kind": kind, "agents": len(thens), "first": first, "force": force},
        )

    async def _frame(self, then: AgentThen) -> Frame:
        assert then.found is not None
        old, body = await read_record(self._view, self._store, then.agent, then.found.id)
        kept = {key: value for key, value in old.meta.items() if key not in _RULES and not key.startswith(RESERVED)}
        return frame(
            then.agent,
            restored_id(then.agent, old.id, then.upto, then.newest_id),
            old.kind,
            body,
            parent=old.id,
            created_at=self._clock.wall(),
            copies=self._copies,
            attempt=self._fleet.host_of(then.agent)[1],
            meta={**kept, RESTORED: old.id, UPTO: then.upto},
        )

    async def _write(self, batch: Sequence[tuple[int, AgentThen, Frame]]) -> dict[int, RestoreOutcome]:
        found: dict[int, RestoreOutcome] = {}
        for stream in {_stream(then) for _, then, _ in batch}:
            mine = [one for one in batch if _stream(one[1]) == stream]
            try:
                acks: Sequence[Ack] = await self._serving(stream).intake.submit([made for _, _, made in mine])
            except DrError as error:
                for number, then, _ in mine:
                    found[number] = RestoreOutcome(then.agent, "failed", "", 0, error.message, error.hint)
                continue
            for (number, then, made), ack in zip(mine, acks, strict=True):
                error_seen = ack.error or {}
                state = "failed" if ack.status == "failed" else "restored"
                why, hint = str(error_seen.get("message", "")), str(error_seen.get("hint", ""))
                found[number] = RestoreOutcome(then.agent, state, made.record.id, ack.copies, why, hint)
        return found


def restored_id(agent: str, record: str, upto: str, newest: str) -> str:
    """The id of the repetition: the same for the same request."""
    return f"restored/{hashlib.sha256(json.dumps([agent, record, upto, newest]).encode()).hexdigest()[:32]}"


def _stream(then: AgentThen) -> str:
    assert then.found is not None
    return then.found.stream
