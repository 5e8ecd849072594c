"""Salvage for people: what the tails that were cut off hold, their bodies, and letting go of them.

Reading needs no holder: every controller reads every region's store, and compares with its own region's copy of the live
history. Discarding is the holder's alone, under its fence, in an order that a crash at any point leaves sound: the audit says
what goes, then the head stops naming the tail (one conditional write), and only then its objects are deleted. What a crash
leaves behind is proven by the hash in the tail's name when the command is repeated; and retention deletes it once the base has
passed it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from controller.domain.model import Fence, Head, Kind, Salvage, SegmentRef
from controller.domain.retention import is_diverged, is_salvage
from controller.errors import Conflict, DrError, NotActive, NotFound, Refused
from controller.ports import Clock, RegionStore
from controller.runtime.audit import Audit
from controller.runtime.salvage_documents import (
    LOST_STATES,
    Discarded,
    RegionSalvage,
    SalvageDamage,
    SalvagePage,
    SalvagePiece,
    SalvageRecord,
    receipt,
    receipt_line,
)
from controller.stream.past import Past
from controller.stream.tail import SIDE_BY_SIDE, Lying, Tail, Tails, Unreadable, leftovers, name_of
from controller.stream.view import View

OWN = frozenset({Kind.CANARY, Kind.OPENING, Kind.ASSIGNMENT})
"""Kinds that controllers write for themselves."""
DISCARD = "discard salvage"
"""What the audit calls it."""
PAGE_RECORDS = 1_000
PAGE_SEGMENTS = 256
DELETED_AT_ONCE = 500
DELETED_PER_REQUEST = 5_000
YIELD_EVERY = 50
"""Records that are compared with the live history before the loop may do something else: it keeps the lease, too."""
_NAME = re.compile(r"(.+)\.(\d{1,16})-(\d{1,16})\.([0-9a-f]{16})")


class Salvager:
    """``fence_of``: our fence of a stream while we hold it and may act, else None. ``holder``: where its holder listens, when
    that is another instance and known."""

    def __init__(
        self,
        *,
        group: str,
        region: str,
        instance: str,
        stores: Mapping[str, RegionStore],
        view: View,
        streams: Callable[[], Sequence[str]],
        fence_of: Callable[[str], Fence | None],
        holder: Callable[[str], str | None],
        audit: Audit,
        clock: Clock,
    ) -> None:
        self._group = group
        self._me = f"{region}/{instance}"
        self._stores = stores
        self._past = Past(view)
        self._tails = Tails(view, stores[region])
        self._streams = streams
        self._fence_of = fence_of
        self._holder = holder
        self._audit = audit
        self._clock = clock

    # ------------------------------------------------------------------------------------------------------------ reading

    async def list(self, region: str | None) -> tuple[RegionSalvage, ...]:
        """What the heads name. Raises NotFound for an unknown region."""
        names = sorted(self._stores) if region is None else [region]
        found = []
        for name in names:
            store = self._store(name)
            try:
                heads = [await store.read_head(stream) for stream in sorted(self._streams())]
            except DrError as error:
                found.append(RegionSalvage(name, (), error.message))
                continue
            pieces = tuple(_piece(name, head.stream, piece) for head in heads for piece in head.salvage)
            found.append(RegionSalvage(name, pieces))
        return tuple(found)

    async def page(self, region: str, name: str, after: int, agent: str | None) -> SalvagePage:
        """See ``SalvageService``. ``after``: the last segment that was seen, 0 = from the first."""
        tail = await self._find(region, name)
        piece = tail.piece
        records: list[SalvageRecord] = []
        damaged: list[SalvageDamage] = []
        begins = seq = max(piece.first_seq, after + 1)
        latest: dict[tuple[str, str], tuple[str, float]] = {}
        read = 0
        while seq <= piece.last_seq and read < PAGE_RECORDS and seq - begins < PAGE_SEGMENTS:
            some = range(seq, min(seq + SIDE_BY_SIDE, piece.last_seq + 1))
            for one in await self._tails.look(tail, some):
                if isinstance(one, Unreadable):
                    damaged.append(SalvageDamage(one.ref.seq, one.ref.epoch, one.ref.key, one.why))
                    continue
                for lying in one:
                    read += 1
                    if agent is None or lying.record.agent == agent:
                        records.append(self._record(tail, lying, latest))
                    if read % YIELD_EVERY == 0:
                        await self._clock.sleep(0)
            seq = some[-1] + 1
        more = seq - 1 if seq <= piece.last_seq else 0
        return SalvagePage(_piece(region, tail.stream, piece), max(0, seq - begins), tuple(records), tuple(damaged), more)

    async def body(self, region: str, name: str, seq: int, ordinal: int) -> bytes:
        """See ``SalvageService``."""
        tail = await self._find(region, name)
        if not tail.piece.first_seq <= seq <= tail.piece.last_seq:
            raise NotFound(f"salvage {name!a} has no segment {seq}", hint=f"drctl salvage show {region} {name}")
        return (await self._tails.body(tail, seq, ordinal))[1]

    def _record(self, tail: Tail, lying: Lying, latest: dict[tuple[str, str], tuple[str, float]]) -> SalvageRecord:
        record = lying.record
        key = (record.agent, record.kind)
        if key not in latest:
            latest[key] = self._latest(*key)
        return SalvageRecord(
            agent=record.agent,
            id=record.id,
            kind=record.kind,
            sha256=record.sha256,
            size=record.size,
            parent=record.parent,
            created_at=record.created_at,
            received_at=record.received_at,
            copies=record.copies,
            attempt=record.attempt,
            stream=tail.stream,
            seq=lying.ref.seq,
            epoch=lying.ref.epoch,
            ordinal=lying.ordinal,
            key=lying.ref.key,
            encoding=lying.encoding,
            state=self._state(tail, lying),
            latest=latest[key][0],
            latest_at=latest[key][1],
            meta=record.meta,
        )

    def _latest(self, agent: str, kind: str) -> tuple[str, float]:
        try:
            newest = self._past.records(agent, kind=kind, limit=1)
        except NotFound:
            return "", 0.0
        return (newest[0].record.id, newest[0].record.received_at) if newest else ("", 0.0)

    def _state(self, tail: Tail, lying: Lying) -> str:
        if lying.record.kind in OWN:
            return "own"
        placed = self._past.placed(lying.record.agent, lying.record.id)
        if placed is None:
            return "only"
        if placed.ref is not None and tail.holds(placed.ref):  # our copy has not been cut yet: that is the tail itself
            return "only"
        return "live" if placed.record.sha256 == lying.record.sha256 else "other"

    # --------------------------------------------------------------------------------------------------------- discarding

    async def discard(
        self, region: str, name: str, *, execute: bool, confirm: str, requester: str, digest: str, even_unexported: str
    ) -> Discarded:
        """See ``SalvageService``. Repeated it goes on where it was interrupted."""
        store = self._store(region)
        stream, first, last, chain = self._parsed(name)
        fence = self._fence_of(stream)
        if execute and confirm != region:
            raise Refused(f"confirm says {confirm!a}, the store is that of {region}", hint=f"--confirm {region}")
        if execute and fence is None:
            raise NotActive(
                f"{self._me} does not hold stream {stream}, and its holder alone discards",
                hint="ask the active controller",
                active=self._holder(stream),
            )
        head = await store.read_head(stream)
        piece = next((piece for piece in head.salvage if name_of(stream, piece) == name), None)
        if piece is not None:
            tail = Tail(store, stream, piece, self._group).checked()
            would = await self._would(region, tail)
            if fence is None or not execute:
                return would
            self._check(head, fence, tail, would, digest, even_unexported)
            await self._tell(region, requester, _told(piece, would, even_unexported))
            await store.forget_salvage(fence, piece)
            return await self._delete(store, fence, would, tail.refs())
        left = await leftovers(store, stream, (first, last, chain), self._group)
        if not left:
            return Discarded(region, name, "gone", "the head does not name it, and none of its objects is left")
        known = Discarded(region, name, "would", f"the head does not name it any more; {len(left):,} of its objects are left")
        if fence is None or not execute:
            return known
        await self._tell(region, requester, {"salvage": name, "left over": len(left)})
        return await self._delete(store, fence, known, left)

    async def _would(self, region: str, tail: Tail) -> Discarded:
        lines, states, losing = [], Counter[str](), set()
        damaged = 0
        piece = tail.piece
        for at in range(piece.first_seq, piece.last_seq + 1, SIDE_BY_SIDE):
            for found in await self._tails.look(tail, range(at, min(at + SIDE_BY_SIDE, piece.last_seq + 1))):
                if isinstance(found, Unreadable):
                    damaged += 1
                    continue
                for one in found:
                    record, state = one.record, self._state(tail, one)
                    lines.append(receipt_line(one.ref.seq, one.ordinal, record.agent, record.id, record.sha256, record.size))
                    states[state] += 1
                    if state in LOST_STATES:
                        losing.add(record.agent)
            await self._clock.sleep(0)
        lost = sum(states[state] for state in LOST_STATES)
        words = f"{lost:,} records of {len(losing):,} agents lie nowhere else" if lost else "no record lies only here"
        if damaged:
            words += f"; {damaged:,} segments cannot be read, so what is in them is not known"
        digest = receipt(tail.name, piece.last_chain, lines)
        return Discarded(region, tail.name, "would", words, len(lines), lost, len(losing), damaged, digest)

    def _check(self, head: Head, fence: Fence, tail: Tail, would: Discarded, digest: str, even_unexported: str) -> None:
        """Raises Refused, Conflict."""
        where = f"drctl salvage export {would.region} {would.name} --to DIR"
        if not even_unexported:
            if would.damaged:
                raise Refused(
                    f"{would.damaged:,} segments of salvage {would.name} cannot be read, so nobody can have exported them",
                    hint=f"drctl verify {would.region} and drctl repair {would.region}; or --even-unexported REASON",
                )
            if digest and digest != would.digest:
                raise Refused(f"what was exported is not what salvage {would.name} holds now", hint=f"export it again: {where}")
            if would.lost and not digest:
                raise Refused(
                    f"{would.sentence}, and no export was shown",
                    hint=f"{where}, then --exported DIR/manifest.json; or --even-unexported REASON",
                )
        if (head.epoch, head.writer) != (fence.epoch, fence.writer):
            raise Conflict(
                f"the store of {would.region} does not follow epoch {fence.epoch} yet: its head is at epoch {head.epoch}",
                hint="wait until it has come back (drctl lag), then repeat",
            )
        after = [ref for ref in tail.refs() if too_early(head, tail.piece, ref)]
        if after:
            raise Conflict(
                f"the store of {would.region} is at segment {head.seq}, too early to tell whether {after[0].key} is needed",
                hint="wait until it has caught up (drctl lag), then repeat",
            )

    async def _tell(self, region: str, requester: str, detail: dict[str, object]) -> None:
        await self._audit.append(
            at=self._clock.wall(),
            actor=requester or "unknown",
            action=DISCARD,
            subject=region,
            detail={**detail, "by": self._me},
        )

    async def _delete(self, store: RegionStore, fence: Fence, known: Discarded, refs: Sequence[SegmentRef]) -> Discarded:
        """From the first on: what is left can be proven by the chain, which is known at the end. Those that another salvage
        names stay."""
        head = await store.read_head(fence.stream)
        gone = [ref for ref in refs if not is_salvage(head, ref)]
        done = 0
        while done < min(len(gone), DELETED_PER_REQUEST):
            if self._fence_of(fence.stream) != fence:
                raise NotActive(f"{self._me} does not hold stream {fence.stream} any more", hint="repeat: it goes on")
            await store.delete_diverged(fence, gone[done : done + DELETED_AT_ONCE])
            done += len(gone[done : done + DELETED_AT_ONCE])
        left = len(gone) - done
        words = f"{done:,} objects deleted" + (f", {left:,} are left" if left else ", none is left")
        return replace(known, state="left" if left else "done", sentence=words, deleted=done)

    # ------------------------------------------------------------------------------------------------------------ helpers

    def _store(self, region: str) -> RegionStore:
        if region not in self._stores:
            raise NotFound(f"there is no region {region!a}", hint=f"one of {', '.join(sorted(self._stores))}")
        return self._stores[region]

    def _parsed(self, name: str) -> tuple[str, int, int, str]:
        """Stream, first and last segment, beginning of the last chain hash. Raises NotFound."""
        match = _NAME.fullmatch(name)
        if match is None or match[1] not in self._streams():
            raise NotFound(f"{name[:300]!a} is no name of a salvage", hint="drctl salvage list shows them")
        return match[1], int(match[2]), int(match[3]), match[4]

    async def _find(self, region: str, name: str) -> Tail:
        store = self._store(region)
        stream = self._parsed(name)[0]
        for piece in (await store.read_head(stream)).salvage:
            if name_of(stream, piece) == name:
                return Tail(store, stream, piece, self._group).checked()
        raise NotFound(f"the head of {stream} in {region} names no salvage {name}", hint=f"drctl salvage list {region}")


def _told(piece: Salvage, would: Discarded, even_unexported: str) -> dict[str, object]:
    """What the audit says of a discard."""
    return {
        "salvage": would.name,
        "chain": piece.last_chain,
        "epochs": [[start.epoch, start.first_seq] for start in piece.epochs],
        "records": would.records,
        "lost": would.lost,
        "damaged": would.damaged,
        "digest": would.digest,
        "even_unexported": even_unexported,
    }


def too_early(head: Head, piece: Salvage, ref: SegmentRef) -> bool:
    """Whether an object of ``piece`` could not be deleted once the head names the piece no more: the store is too short to tell
    that no history needs it. One that another salvage names stays anyway."""
    after = replace(head, salvage=tuple(other for other in head.salvage if other != piece))
    return not is_salvage(after, ref) and not is_diverged(after, ref)


def _piece(region: str, stream: str, piece: Salvage) -> SalvagePiece:
    return SalvagePiece(
        region=region,
        name=name_of(stream, piece),
        stream=stream,
        first_seq=piece.first_seq,
        last_seq=piece.last_seq,
        epochs=piece.epochs,
        chain=piece.last_chain,
        by_epoch=piece.by_epoch,
    )
