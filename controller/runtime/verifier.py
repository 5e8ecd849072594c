"""Verifications that a controller runs for people: one region's store after the other, each stream from base to head.

Beside the controller's own work and slower than it could (``stream/verify.py``). Where it stands lies in a file of its own in
``state_dir``, so that it goes on after Ctrl-C, a restart of the controller or a silence of the store.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from controller.domain.model import Head, SegmentRef, SnapshotRef
from controller.errors import Conflict, Corrupt, DrError, NotFound
from controller.ports import Clock, RegionStore
from controller.runtime.archive_documents import StreamWalk, Verification
from controller.stream.cataloguecheck import Doubt, catalogue_doubts
from controller.stream.headproof import Examined, differing, examine, judge, real_end
from controller.stream.proof import Problem, ProofView
from controller.stream.salvage import Harm, salvage_harm
from controller.stream.verify import Walk
from controller.stream.view import View
from controller.stream.viewcheck import view_differences

SHOWN = 1000
"""Problems in one answer."""
MAX_VIEW_PROBLEMS = 200
LISTED = 5
"""Records that a problem names in its detail."""


class Verifier:
    """The verifications of one controller instance, one per region at a time."""

    def __init__(
        self,
        *,
        group: str,
        region: str,
        instance: str,
        stores: Mapping[str, RegionStore],
        view: View,
        streams: Callable[[], Sequence[str]],
        clock: Clock,
        state_dir: Path,
    ) -> None:
        self.group = group
        self._region = region
        self._instance = instance
        self.stores = stores
        self.view = view
        self.streams = streams
        self._clock = clock
        self._state_dir = state_dir
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._seen: dict[str, Verification] = {}
        self.busy: set[str] = set()
        """Regions that are being repaired: their file is in use."""

    def _check(self, region: str) -> None:
        if region not in self.stores:
            raise NotFound(f"there is no region {region!a}", hint=f"use one of {', '.join(self.stores)}")

    def running(self, region: str) -> bool:
        job = self._jobs.get(region)
        return job is not None and not job.done()

    async def open(self, region: str) -> ProofView:
        """The file of a region. Close it; only one may have it open."""
        self._check(region)
        path = self._state_dir / f"verify-{self._instance}-{region}.sqlite"
        return await asyncio.to_thread(ProofView, path)

    async def start(self, region: str, *, restart: bool) -> Verification:
        """Begins, or goes on where the last one was interrupted; one that ended begins anew. Raises NotFound, Conflict."""
        self._check(region)
        if self.running(region):
            if restart:
                raise Conflict(f"{region} is being verified", hint="let it end, or interrupt it first")
            return self._seen[region]
        if region in self.busy:
            raise Conflict(f"{region} is being repaired", hint="wait until that has ended")
        now = self._clock.wall()
        proof = await self.open(region)
        try:
            before = _load(proof)
            resumed = not restart and before is not None and before.state != "done"
            if not resumed:
                for stream in {*self.streams(), *(() if before is None else (walk.stream for walk in before.streams))}:
                    proof.reset(stream, 0, "0" * 64)
                    proof.forget_problems(stream, 0)
                proof.put("more", 0)
            self._seen[region] = Verification(
                region=region,
                by=f"{self._region}/{self._instance}",
                state="running",
                reason="goes on where it was interrupted" if resumed else "begins",
                started_at=before.started_at if resumed and before is not None else now,
                updated_at=now,
                resumed=resumed,
                streams=tuple(StreamWalk(stream) for stream in self.streams()),
            )
            self._save(proof, region)
        except BaseException:
            proof.close()
            raise
        self._jobs[region] = asyncio.create_task(self._run(region, proof), name=f"verify-{region}")
        return self._seen[region]

    async def stop(self, region: str) -> Verification:
        """Interrupts it. ``start`` goes on."""
        self._check(region)
        job = self._jobs.get(region)
        if job is not None and not job.done():
            job.cancel()
            await asyncio.gather(job, return_exceptions=True)
        return await self.state(region)

    async def close(self) -> None:
        """At the controller's end."""
        for region in list(self._jobs):
            await self.stop(region)

    async def state(self, region: str) -> Verification:
        """How far it is, or how it ended. Raises NotFound when there was none."""
        self._check(region)
        if region not in self._seen:
            path = self._state_dir / f"verify-{self._instance}-{region}.sqlite"
            if not path.exists():
                raise NotFound(
                    f"{region} was not verified by {self._region}/{self._instance}", hint=f"begin: drctl verify {region}"
                )
            proof = await self.open(region)
            try:
                found = _load(proof)
                if found is not None:
                    self._seen[region] = _with_problems(
                        replace(found, state="interrupted" if found.state == "running" else found.state), proof
                    )
            finally:
                proof.close()
        if region not in self._seen:
            raise NotFound(f"{region} was not verified here", hint=f"begin: drctl verify {region}")
        return self._seen[region]

    def forget(self, region: str) -> None:
        """What was kept in memory of a region's verification: its file changed."""
        self._seen.pop(region, None)

    # ------------------------------------------------------------------------------------------------------------- a job

    def _save(self, proof: ProofView, region: str) -> None:
        self._seen[region] = _with_problems(replace(self._seen[region], updated_at=self._clock.wall()), proof)
        _store(proof, self._seen[region])

    def _ended(self, proof: ProofView, region: str, state: str, reason: str) -> None:
        self._seen[region] = replace(self._seen[region], state=state, reason=reason)
        self._save(proof, region)

    async def _run(self, region: str, proof: ProofView) -> None:
        try:
            for stream in self.streams():
                await self.walk(region, proof, stream)
            count = proof.count_problems()
            words = (
                f"problems: {count:,}" if count else "whole: every object, chain, body and catalogue item is as it was written"
            )
            self._ended(proof, region, "done", words)
        except DrError as error:
            self._ended(proof, region, "interrupted", f"{error.message}; go on: drctl verify {region}")
        except asyncio.CancelledError:
            self._ended(proof, region, "interrupted", f"interrupted; go on: drctl verify {region}")
            raise
        except Exception as error:
            self._ended(proof, region, "failed", f"a bug: {error!r}")
            raise
        finally:
            proof.close()

    async def catch_up(self, region: str, proof: ProofView, stream: str) -> Examined:
        """Walks on to where the head is now, and looks at nothing else. Raises Unavailable, Corrupt, Conflict."""
        store = self.stores[region]
        others = {name: one for name, one in self.stores.items() if name != region}
        seen = await examine(store, stream, await self.heads(stream, others))

        async def ask() -> Head:
            nonlocal seen
            seen = await examine(store, stream, await self.heads(stream, others))
            if seen.sane is None:
                raise Conflict(f"the head of {stream} in {region} is unreadable", hint=f"drctl verify {region}")
            return seen.sane

        await Walk(store, others, proof, stream, self.group, self._clock, self._names(stream)).run(ask, further=True)
        return seen

    async def walk(self, region: str, proof: ProofView, stream: str) -> Examined:
        """One stream of one region, from where its file says. Raises Unavailable, Corrupt."""
        store = self.stores[region]
        others = {name: one for name, one in self.stores.items() if name != region}
        heads = await self.heads(stream, others)
        seen = await examine(store, stream, heads)
        if seen.sane is None:
            self._head_problems(region, proof, stream, seen.faults, None)
            return seen
        first = True

        async def ask() -> Head:
            nonlocal first, seen, heads
            if not first:
                heads = await self.heads(stream, others)
                seen = await examine(store, stream, heads)
            first = False
            if seen.sane is None:
                raise Conflict(f"the head of {stream} in {region} became unreadable", hint=f"drctl verify {region}")
            return seen.sane

        def tell(seq: int, goal: int) -> None:
            self._progress(proof, region, seen.sane, seq, goal)

        names = self._names(stream)
        head = await Walk(store, others, proof, stream, self.group, self._clock, names).run(ask, tell)
        longer = await real_end(store, seen, proof, heads)
        if longer is not None:
            seen.faults.append(f"it ends at segment {head.seq:,}, and its history goes on to {longer.seq:,}")
            seen.sane = longer

            async def further() -> Head:
                return longer

            head = await Walk(store, others, proof, stream, self.group, self._clock, names).run(further, tell)
        self._progress(proof, region, seen.sane, head.seq, head.seq)
        await self._finish(region, proof, stream, seen, heads)
        return seen

    async def heads(self, stream: str, stores: Mapping[str, RegionStore]) -> dict[str, Head]:
        """Heads that can be read; what is wrong with them is found when their regions are verified."""

        async def one(store: RegionStore) -> Head | None:
            try:
                return await store.read_head(stream)
            except DrError:
                return None

        found = await asyncio.gather(*(one(store) for store in stores.values()))
        return {region: head for region, head in zip(stores, found, strict=True) if head is not None}

    def _names(self, stream: str) -> Callable[[SegmentRef], Sequence[tuple[str, str]]]:
        def names(ref: SegmentRef) -> Sequence[tuple[str, str]]:
            try:
                if self.view.epoch_at(stream, ref.seq) != ref.epoch:
                    return ()
                rows = self.view.tables.all(
                    "SELECT a.name, r.id FROM records r JOIN agents a ON a.no = r.agent JOIN streams s ON s.no = r.stream "
                    "WHERE s.name=? AND r.seq=? ORDER BY r.ordinal",
                    (stream, ref.seq),
                )
            except DrError:
                return ()  # a damaged view is a matter of its own
            return [(row[0], row[1]) for row in rows]

        return names

    def _progress(self, proof: ProofView, region: str, head: Head | None, seq: int, goal: int) -> None:
        if region not in self._seen or head is None:
            return
        seen = self._seen[region]
        segments, records, size = proof.counts(head.stream)
        walk = StreamWalk(head.stream, head.base, seq, goal, segments, records, size, proof.conflicts(head.stream))
        streams = tuple(walk if one.stream == walk.stream else one for one in seen.streams)
        self._seen[region] = replace(seen, streams=streams, updated_at=self._clock.wall(), count=proof.count_problems())

    async def _finish(self, region: str, proof: ProofView, stream: str, seen: Examined, heads: Mapping[str, Head]) -> None:
        """What can be judged only at the end: the head, what it names besides, the other regions, the view."""
        head, store = seen.sane, self.stores[region]
        assert head is not None
        self._head_problems(region, proof, stream, [*seen.faults, *judge(seen, proof)], head)
        others = {name: one for name, one in self.stores.items() if name != region}
        async for harm in salvage_harm(store, others, head, self.group, self._clock):
            proof.note(_salvage_problem(region, harm))
            proof.put(salvage_name(harm.ref), harm.after)
        for named in (await _newest(store, head)).snapshots:
            snapshot = SnapshotRef(stream, named.seq, named.epoch)
            why = await self._snapshot_problem(store, snapshot, named.sha256)
            if why and named in (await _newest(store, head)).snapshots:  # the holder replaces them every few minutes
                fix = f"drctl repair {region} --execute"
                proof.note(_problem(region, stream, named.seq, named.epoch, snapshot.key, "snapshot", why, fix))
        if seen.diverged:
            fix = "nothing: the holder cuts it back by itself; what is cut off is kept as salvage"
            proof.note(_problem(region, stream, 0, 0, "head", "diverged", seen.diverged, fix))
        else:
            for other, theirs in heads.items():
                why = await differing(self.stores[other], theirs, proof, stream)
                if why:
                    fix = f"drctl verify {other}; what both say then tells which of them is wrong"
                    proof.note(_problem(region, stream, 0, 0, f"head of {other}", "diverged", why, fix))
        await self._check_catalogue(region, proof, seen)
        if region == self._region:
            await self._check_view(region, proof, stream)

    async def _check_catalogue(self, region: str, proof: ProofView, seen: Examined) -> None:
        """Against the history as it is now: items are written while this goes on."""
        now = seen

        async def catch_up() -> None:
            nonlocal now
            now = await self.catch_up(region, proof, stream)

        def head() -> tuple[Head, bool]:
            return now.sane or start, not now.faults and not seen.faults

        assert seen.sane is not None
        start, stream = seen.sane, seen.sane.stream
        async for doubt in catalogue_doubts(self.stores[region], proof, head, catch_up, self._clock):
            proof.note(_catalogue_problem(region, stream, doubt))

    async def _snapshot_problem(self, store: RegionStore, ref: SnapshotRef, digest: str) -> str:
        try:
            data = await store.get_snapshot(ref)
        except (NotFound, Corrupt) as error:
            return error.message
        found = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
        return "" if found == digest else f"its sha256 is {found[:12]}…, the head says {digest[:12]}…"

    def _head_problems(self, region: str, proof: ProofView, stream: str, faults: Sequence[str], head: Head | None) -> None:
        if faults:
            epoch = head.epoch if head is not None else 0
            fix = f"drctl repair {region} --execute, at the active controller: it needs its fence"
            proof.note(_problem(region, stream, 0, epoch, "head", "head", "; ".join(faults), fix))

    async def _check_view(self, region: str, proof: ProofView, stream: str) -> None:
        found = 0
        async for agent, record, why in view_differences(self.view, proof, stream, self._clock):
            found += 1
            fix = f"drctl repair {region} --execute --endpoint (the one of {self._instance}): the view is rebuilt"
            problem = _problem(region, stream, 0, 0, f"view of {self._instance}", "view", why, fix)
            proof.note(replace(problem, agent=agent, record=record, records=1 if record else 0))
            if found >= MAX_VIEW_PROBLEMS:
                return


async def _newest(store: RegionStore, head: Head) -> Head:
    """The store's head as it is now; ``head`` when it cannot be read."""
    try:
        return await store.read_head(head.stream)
    except Corrupt:
        return head


def salvage_name(ref: SegmentRef) -> str:
    """Under which name a verification keeps the chain hash that the right bytes of an object of a salvage give."""
    return f"salvage {ref.key}"


def _salvage_problem(region: str, harm: Harm) -> Problem:
    ref, hurt = harm.ref, harm.damage.records
    names = ", ".join(f"{agent}/{record}" for agent, record in hurt[:LISTED])
    more = f" and {len(hurt) - LISTED:,} more" if len(hurt) > LISTED else ""
    whose = f"records: {names}{more}" if names else "which records were in it is not known"
    if harm.damage.what == "head":
        fix = "nothing proves what it was; it is no part of the history"
    elif harm.source:
        fix = f"drctl repair {region} --execute"
    else:
        fix = "it is lost: no region has bytes that the chain proves; it is no part of the history"
    problem = _problem(region, ref.stream, ref.seq, ref.epoch, ref.key, "salvage", f"{harm.why}; {whose}", fix)
    agent, record = hurt[0] if hurt else ("", "")
    return replace(problem, agent=agent, record=record, records=len(hurt), source=harm.source)


def _catalogue_problem(region: str, stream: str, doubt: Doubt) -> Problem:
    fix = f"drctl repair {region} --execute, at the active controller: it needs its fence"
    problem = _problem(region, stream, 0, 0, f"agent#{doubt.agent}", "catalogue", doubt.why, fix)
    return replace(problem, agent=doubt.agent, record=doubt.record, records=1 if doubt.record else 0)


def _problem(region: str, stream: str, seq: int, epoch: int, key: str, what: str, detail: str, fix: str) -> Problem:
    return Problem(
        region=region,
        stream=stream,
        seq=seq,
        epoch=epoch,
        key=key,
        what=what,
        agent="",
        record="",
        records=0,
        detail=detail,
        source="",
        fix=fix,
    )


def _with_problems(seen: Verification, proof: ProofView) -> Verification:
    return replace(seen, problems=proof.problems()[:SHOWN], count=proof.count_problems())


def _store(proof: ProofView, seen: Verification) -> None:
    walks = [[getattr(walk, name) for name in StreamWalk.__dataclass_fields__] for walk in seen.streams]
    plain = {name: getattr(seen, name) for name in ("region", "by", "state", "reason", "started_at", "updated_at", "resumed")}
    proof.put("state", {**plain, "streams": walks})


def _load(proof: ProofView) -> Verification | None:
    known = proof.value("state")
    if known is None:
        return None
    return Verification(**{**known, "streams": tuple(StreamWalk(*walk) for walk in known["streams"])})
