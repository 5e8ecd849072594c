"""Repairs of one region's store, from what its last verification found. Nothing is believed that does not prove itself again.

An object is replaced by another region's bytes only when these lead from the proven chain hash before it to the proven one
after it, and only while it still is what was looked at (``If-Match``). A head is put right by the holder alone, under its
fence, to what the objects prove, and only as it was read. A view is begun anew and followed from the store. A good object is
never written over: what turns out to be whole is left alone. What is going to be replaced is written into the audit first.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence

from controller.domain.model import Fence, SegmentRef, SnapshotRef
from controller.domain.retention import is_salvage
from controller.errors import Conflict, Corrupt, DrError, Refused
from controller.ports import Clock, RegionStore
from controller.runtime.archive_documents import Repair, RepairAction
from controller.runtime.audit import Audit
from controller.runtime.verifier import Verifier, salvage_name
from controller.stream.cataloguecheck import Judge
from controller.stream.headproof import Examined, judge, right_head
from controller.stream.proof import Problem, ProofView
from controller.stream.salvage import proven_copy
from controller.stream.segment import decode_segment, next_chain

BATCH = 50
"""Problems that one request works on; ``drctl`` asks again until nothing is left that can be done."""
SHOWN = 500
OBJECTS = frozenset({"missing", "header", "frame", "index", "trailer", "content"})
ATTEMPTS = 3
LISTED = 20


class Mender:
    """``fence_of``: our fence of a stream while we hold it and may act, else None. ``held``: whether this instance holds it.
    ``holder``: where its holder listens, when that is another instance and known."""

    def __init__(
        self,
        verifier: Verifier,
        audit: Audit,
        clock: Clock,
        *,
        region: str,
        instance: str,
        fence_of: Callable[[str], Fence | None],
        held: Callable[[str], bool],
        holder: Callable[[str], str | None] = lambda _stream: None,
    ) -> None:
        self._verifier = verifier
        self._audit = audit
        self._clock = clock
        self._region = region
        self._instance = instance
        self._fence_of = fence_of
        self._held = held
        self._holder = holder
        self._seen: dict[str, Examined | DrError] = {}
        """Streams whose history was walked on for this batch."""

    async def repair(self, region: str, *, execute: bool, requester: str = "", confirm: str = "") -> Repair:
        """One batch. Raises NotFound (unknown, or never verified here), Refused (not confirmed), Conflict (a verification or
        another repair is under way), Unavailable (the audit cannot be written: nothing was done)."""
        seen = await self._verifier.state(region)
        if execute and confirm != region:
            raise Refused(f"confirm says {confirm!a}, the store is that of {region}", hint=f"--confirm {region}")
        if self._verifier.running(region) or region in self._verifier.busy:
            raise Conflict(f"{region} is being verified or repaired", hint="wait until that has ended")
        self._verifier.busy.add(region)
        try:
            proof = await self._verifier.open(region)
            try:
                await self._walk_on(region, proof)
                problems = sorted(proof.problems(), key=_urgency)
                some = problems[: BATCH if execute else SHOWN]
                if execute and some:
                    await self._tell(region, some, requester)
                actions = [await self._one(region, proof, problem, execute) for problem in some]
                left = proof.count_problems()
            finally:
                proof.close()
                self._verifier.forget(region)
        finally:
            self._verifier.busy.discard(region)
        return Repair(region, execute, tuple(actions), left, seen.updated_at, f"drctl verify {region}")

    async def _walk_on(self, region: str, proof: ProofView) -> None:
        """What a catalogue item should say is told by the history as it is now."""
        self._seen = {}
        for stream in sorted({one.stream for one in proof.problems() if one.what == "catalogue"}):
            try:
                self._seen[stream] = await self._verifier.catch_up(region, proof, stream)
            except DrError as error:  # other problems can be put right all the same
                self._seen[stream] = error

    async def _tell(self, region: str, problems: Sequence[Problem], requester: str) -> None:
        listed = [f"{one.what} {one.stream} {one.key} from {one.source or 'here'}" for one in problems[:LISTED]]
        await self._audit.append(
            at=self._clock.wall(),
            actor=requester or f"{self._region}/{self._instance}",
            action="repair",
            subject=region,
            detail={"problems": len(problems), "first": listed, "by": f"{self._region}/{self._instance}"},
        )

    async def _one(self, region: str, proof: ProofView, problem: Problem, execute: bool) -> RepairAction:
        try:
            if problem.what in OBJECTS:
                state, sentence, source = await self._object(region, proof, problem, execute)
            elif problem.what == "salvage":
                state, sentence, source = await self._salvage(region, proof, problem, execute)
            elif problem.what == "catalogue":
                state, sentence, source = await self._catalogue(region, proof, problem, execute)
            elif problem.what == "snapshot":
                state, sentence, source = await self._snapshot(region, problem, execute)
            elif problem.what == "head":
                state, sentence, source = await self._head(region, proof, problem, execute)
            elif problem.what == "view":
                state, sentence, source = await self._view(region, problem, execute)
            else:
                state, sentence, source = "cannot", problem.fix, ""
        except DrError as error:
            state, sentence, source = "failed", error.message + (f" ({error.hint})" if error.hint else ""), ""
        if state in ("done", "whole") and execute:
            proof.resolve(problem)
        return RepairAction(
            problem.what,
            problem.stream,
            problem.seq,
            problem.key,
            problem.agent,
            problem.record,
            problem.records,
            source,
            state,
            sentence,
        )

    # ----------------------------------------------------------------------------------------------------------- objects

    async def _object(self, region: str, proof: ProofView, problem: Problem, execute: bool) -> tuple[str, str, str]:
        store = self._verifier.stores[region]
        ref = SegmentRef(problem.stream, problem.seq, problem.epoch)
        before, after = proof.chain_at(ref.stream, ref.seq - 1), proof.chain_at(ref.stream, ref.seq)
        if not before or not after:
            return "cannot", problem.fix, ""
        found = await store.inspect_object(ref)
        if await _fits(store, ref, before, after) is not None:
            return "whole", "it is whole by now", ""
        for name, other in self._verifier.stores.items():
            data = None if name == region else await _fits(other, ref, before, after)
            if data is None:
                continue
            if not execute:
                return "would", f"would be replaced by the copy of {name}, whose bytes the chain proves", name
            await store.mend_object(ref, found, data)
            if await _fits(store, ref, before, after) is None:
                raise Corrupt(f"{ref.key} in {region} is still damaged after it was replaced", hint="look at the bucket")
            return "done", f"replaced by the copy of {name}, and read back", name
        return "cannot", f"no other region has bytes that the chain proves; {problem.fix}", ""

    async def _salvage(self, region: str, proof: ProofView, problem: Problem, execute: bool) -> tuple[str, str, str]:
        store = self._verifier.stores[region]
        ref = SegmentRef(problem.stream, problem.seq, problem.epoch)
        after = proof.value(salvage_name(ref))
        if not after:
            return "cannot", problem.fix, ""
        if not is_salvage(await store.read_head(problem.stream), ref):
            return "whole", "the head does not name it as salvage any more", ""
        found = await store.inspect_object(ref)
        if await proven_copy(store, ref, after, self._verifier.group) is not None:
            return "whole", "it is whole by now", ""
        for name, other in self._verifier.stores.items():
            data = None if name == region else await proven_copy(other, ref, after, self._verifier.group)
            if data is None:
                continue
            if not execute:
                return "would", f"would be replaced by the copy of {name}, which gives the hash that the salvage names", name
            await store.mend_object(ref, found, data)
            return "done", f"replaced by the copy of {name}", name
        return "cannot", problem.fix, ""

    async def _catalogue(self, region: str, proof: ProofView, problem: Problem, execute: bool) -> tuple[str, str, str]:
        store, stream = self._verifier.stores[region], problem.stream
        seen = self._seen[stream]
        if isinstance(seen, DrError):
            raise seen
        if seen.sane is None:
            return "cannot", "the head is unreadable; repair it first, then verify again", ""
        judge = Judge(proof, seen.sane, trusted=not seen.faults)
        found = await store.inspect_catalogue(stream, problem.agent)
        if not judge.wrong(found):
            return "whole", "it is right by now", ""
        right = judge.right(problem.agent)
        if right is None and proof.has_gaps():
            return "cannot", "what its agent has lies in damaged segments; repair them first, then verify again", ""
        if right is not None and any(place.seq < seen.sane.base for place in right.chain):
            return "cannot", "retention is under way; verify again", ""
        words = f"record {right.id!a} in segment {right.chain[0].seq:,}" if right is not None else ""
        fence = self._fence_of(stream)
        if not execute:
            who = "" if fence is not None else "; only the active controller can do it"
            return "would", (f"would name {words}, as the chain proves" if words else "would be deleted: nobody's") + who, ""
        if fence is None:
            return "cannot", self._not_ours(region, stream), ""
        await store.mend_catalogue(fence, found, right)
        return "done", f"names {words}" if words else "deleted: the history has no checkpoint of this agent", ""

    async def _snapshot(self, region: str, problem: Problem, execute: bool) -> tuple[str, str, str]:
        store = self._verifier.stores[region]
        ref = SnapshotRef(problem.stream, problem.seq, problem.epoch)
        head = await store.read_head(problem.stream)
        named = next((one for one in head.snapshots if (one.seq, one.epoch) == (ref.seq, ref.epoch)), None)
        if named is None:
            return "whole", "the head does not name it any more", ""
        found = await store.inspect_object(ref)
        if await _hashes_to(store, ref, named.sha256) is not None:
            return "whole", "it is whole by now", ""
        for name, other in self._verifier.stores.items():
            data = None if name == region else await _hashes_to(other, ref, named.sha256)
            if data is None:
                continue
            if not execute:
                return "would", f"would be replaced by the copy of {name}, whose hash the head names", name
            await store.mend_object(ref, found, data)
            return "done", f"replaced by the copy of {name}", name
        return "cannot", "no other region has it; the holder's next snapshot takes its place", ""

    def _not_ours(self, region: str, stream: str) -> str:
        address = self._holder(stream)
        where = f"drctl verify {region} --endpoint {address}, then repair there" if address else "ask the active controller"
        me = f"{self._region}/{self._instance}"
        return f"only the active controller can do it, and {me} does not hold stream {stream}: {where}"

    # -------------------------------------------------------------------------------------------------------------- head

    async def _head(self, region: str, proof: ProofView, problem: Problem, execute: bool) -> tuple[str, str, str]:
        stream, store = problem.stream, self._verifier.stores[region]
        for _ in range(ATTEMPTS):
            seen = await self._verifier.walk(region, proof, stream)
            faults = [*seen.faults, *judge(seen, proof)]
            if not faults:
                return "whole", "it is right by now", ""
            others = {name: one for name, one in self._verifier.stores.items() if name != region}
            right = right_head(seen, proof, await self._verifier.heads(stream, others))
            if right is None:
                return "cannot", "its objects do not prove what it should say; repair them first, then verify again", ""
            words = f"segment {right.seq:,}, chain {right.chain[:12]}…, base {right.base:,}, {right.records:,} records"
            fence = self._fence_of(stream)
            if not execute:
                who = "" if fence is not None else "; only the active controller can do it"
                return "would", f"would be set to {words}, as its objects prove{who}", ""
            if fence is None:
                return "cannot", self._not_ours(region, stream), ""
            try:
                await store.mend_head(fence, seen.found, right)
            except Conflict:
                continue  # the stream goes on meanwhile: look again
            return "done", f"set to {words}", ""
        return "failed", "it changes too fast; try again when the stream is quieter", ""

    # -------------------------------------------------------------------------------------------------------------- view

    async def _view(self, region: str, problem: Problem, execute: bool) -> tuple[str, str, str]:
        if problem.key != f"view of {self._instance}":
            return "cannot", f"ask the controller whose view it is: {problem.key}", ""
        if self._held(problem.stream):
            return (
                "cannot",
                f"{self._instance} writes stream {problem.stream} and its view with it: stop it, delete its view, start it",
                "",
            )
        if not execute:
            return "would", "would be emptied, and built again from the store", ""
        head = await self._verifier.stores[region].read_head(problem.stream)
        self._verifier.view.reset(problem.stream, head.base - 1, head.base_chain)
        return "done", "emptied; it is being built again from the store", ""


def _urgency(problem: Problem) -> int:
    """Objects come first: a head is put right by what they prove. What cannot be put right comes last."""
    if problem.what in OBJECTS:
        return 0 if problem.source else 2
    if problem.what == "salvage":
        return 1 if problem.source else 2
    return 1 if problem.what in ("head", "snapshot", "view", "catalogue") else 2


async def _fits(store: RegionStore, ref: SegmentRef, before: str, after: str) -> bytes | None:
    """The object's bytes, if they lead from ``before`` to ``after``; None when they do not, or cannot be had."""
    try:
        data = await store.get_segment(ref)
        segment = await asyncio.to_thread(decode_segment, data)
    except DrError:  # damaged, absent or out of reach: it proves nothing
        return None
    if segment.header.prev_chain != before or next_chain(before, data) != after:
        return None
    return data


async def _hashes_to(store: RegionStore, ref: SnapshotRef, digest: str) -> bytes | None:
    try:
        data = await store.get_snapshot(ref)
    except DrError:
        return None
    return data if hashlib.sha256(data).hexdigest() == digest else None
