"""Whether a record may be taken: repetitions recognised, deltas resolved, bodies decoded and hashed.

Every body is proven here, once, against the hash that its agent gave it; the view takes it from here (``Entry.proven``) and
does not decode it again. Large ones are proven in a thread (``proving``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from controller.domain.model import Encoding, Frame, Record
from controller.errors import Conflict, Refused
from controller.stream.batcher import Entry
from controller.stream.limits import MAX_CHAIN
from controller.stream.proving import Proven, prove
from controller.stream.segment import open_frame
from controller.stream.tables import WARM_MAX_BYTES
from controller.stream.view import View

RECENT_BYTES = 64 * 2**20
"""Newest bodies of agents, kept so that the next delta of each finds its base without asking the view."""
RECENT_MAX_BODY_BYTES = 4 * 2**20


class Admission:
    """Records on their way from the agent into the view. ``bytes``: decoded bodies that are held for them."""

    def __init__(self, view: View, stores: int, now: Callable[[], float]) -> None:
        self._view = view
        self._stores = stores
        self._now = now
        self._entries: dict[tuple[str, str], Entry] = {}
        self._recent: OrderedDict[tuple[str, str], tuple[str, bytes, int, int]] = OrderedDict()
        """(agent, kind) → id, body, depth and segment of the newest."""
        self._recent_bytes = 0
        self._base = 0
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    # ------------------------------------------------------------------------------------------------------- looking

    def repeats(self, record: Record) -> Entry | int | None:
        """The record that this one repeats: on its way, or the segment it is in; None: it is new. Raises Conflict."""
        entry = self._entries.get((record.agent, record.id))
        if entry is not None:
            if entry.frame.record.sha256 != record.sha256:
                raise _other_body(record.agent, record.id)
            return entry
        known = self._view.find(record.agent, record.id)
        if known is None:
            return None
        if known[0] != record.sha256:
            raise _other_body(record.agent, record.id)
        return known[1]

    def keep_from(self, base: int) -> tuple[Entry, ...]:
        """From now on no delta is taken that stands on what lies before ``base`` only: retention is about to let go of that.
        Returns what was taken before and is on its way: it may still stand there."""
        self._base = base
        return tuple(self._entries.values())

    def check_copies(self, record: Record) -> None:
        """Raises Refused."""
        if record.copies > self._stores:
            raise Refused(f"copies = {record.copies} and there are {self._stores} region stores", hint="ask for fewer copies")

    def _base_of(self, frame: Frame) -> tuple[bytes | None, int]:
        """Body of the delta's base and the depth of the chain with this record. Raises Refused: send the whole body."""
        if frame.encoding is not Encoding.DELTA or frame.base is None:
            return None, 0
        agent = frame.record.agent
        entry = self._entries.get((agent, frame.base))
        recent = self._recent.get((agent, frame.record.kind))
        if entry is not None and entry.proven is not None:
            body, depth = entry.proven.body, entry.depth + 1
        elif recent is not None and recent[0] == frame.base:
            body, depth = recent[1], recent[2] + 1
            self._check_base(agent, frame.base, recent[3])
        else:
            found = self._view.read(agent, frame.base)
            if found is None:
                raise _unknown_base(f"the base {frame.base!r} of the delta is not at hand")
            body, depth = found[1], (self._view.chain_depth(agent, frame.base) or 0) + 1
            self._check_base(agent, frame.base, 0)
        if len(body) > WARM_MAX_BYTES:
            raise _unknown_base(f"the base {frame.base!r} has {len(body)} bytes and is not kept at hand")
        if depth > MAX_CHAIN:
            raise _unknown_base(f"{depth} deltas would stand on each other, {MAX_CHAIN} are allowed")
        return body, depth

    def _check_base(self, agent: str, base: str, seq: int) -> None:
        if seq < self._base and not self._view.reaches(agent, base, self._base):
            raise _unknown_base(f"the base {base!r} of the delta is older than what this stream keeps")

    # -------------------------------------------------------------------------------------------------------- taking

    async def open_ahead(self, frames: Sequence[Frame]) -> Mapping[int, Proven]:
        """Bodies of a call that is too large to be decoded on the event loop, by the number of their frame. What is not in it
        is looked at by ``take``."""
        size = sum(frame.record.size for frame in frames)
        self.bytes += size
        try:
            return await prove(frames, lambda frame: self._base_of(frame)[0])
        finally:
            self.bytes -= size

    def take(self, frame: Frame, weight: int, proven: Proven | None = None) -> Entry:
        """A new record: stamped, decoded (unless ``open_ahead`` did it), remembered until the view has it. Raises DrError."""
        base, depth = self._base_of(frame)
        proven = Proven(open_frame(frame, base) if proven is None else proven.body, new=True)
        entry = Entry(_stamped(frame, self._now()), weight, proven, depth)
        self._entries[frame.record.agent, frame.record.id] = entry
        self.bytes += _held(entry)
        return entry

    def applied(self, entry: Entry) -> None:
        """The view has it: repetitions are recognised there, and its body is the base of the agent's next delta."""
        record = entry.frame.record
        self._entries.pop((record.agent, record.id), None)
        if entry.proven is None:
            return
        body = entry.proven.body
        self.bytes -= _held(entry)
        key = record.agent, record.kind
        before = self._recent.pop(key, None)
        if before is not None:
            self._recent_bytes -= len(before[1])
        if len(body) > RECENT_MAX_BODY_BYTES:
            return
        self._recent[key] = record.id, body, entry.depth, entry.seq
        self._recent_bytes += len(body)
        while self._recent_bytes > RECENT_BYTES:
            _, (_, dropped, _, _) = self._recent.popitem(last=False)
            self._recent_bytes -= len(dropped)


def _held(entry: Entry) -> int:
    """Bytes that an entry holds besides its payload."""
    if entry.proven is None:
        return 0
    body = entry.proven.body
    return 0 if body is entry.frame.payload else len(body)


def _stamped(frame: Frame, received_at: float) -> Frame:
    """The frame with its receipt. Spelled out: ``dataclasses.replace`` takes four times as long, for every record."""
    r = frame.record
    record = Record(r.agent, r.id, r.kind, r.sha256, r.size, r.parent, r.created_at, received_at, r.copies, r.attempt, r.meta)
    return Frame(record, frame.encoding, frame.payload, frame.base)


def _unknown_base(message: str) -> Refused:
    error = Refused(message, hint="send the whole body")
    error.code = "unknown_base"
    return error


def _other_body(agent: str, record_id: str) -> Refused:
    return Conflict(
        f"record {record_id!r} of agent {agent!r} exists with another body",
        hint="record ids name one body for ever; use a new id",
    )
