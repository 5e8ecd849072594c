"""Moves region stores towards the chosen history: fence them, cut what diverged, copy what is missing.

Works on ports only. What to do is decided in ``domain.replication``; every step here is idempotent and guarded by the fence,
so it may be repeated after any error, also by another instance with a newer epoch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from controller.domain import replication, retention
from controller.domain.model import GENESIS, Commit, EpochStart, Fence, Head, Realignment, SegmentRef
from controller.errors import Corrupt, DrError, FenceLost, NotFound, Unavailable
from controller.ports import RegionStore
from controller.stream.limits import ORIGIN
from controller.stream.patience import GRACE_SECONDS, ask_all
from controller.stream.segment import Segment, decode_segment, next_chain

COPY_BATCH = 32
"""Segments that are read and put concurrently, and then committed with one write, while copying."""


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of a history: where the next segment goes, and what came before it."""

    seq: int
    chain: str
    starts: tuple[EpochStart, ...]


async def fence_stores(
    stores: Mapping[str, RegionStore], fence: Fence, timeout_seconds: float, essential: Collection[str] = ()
) -> tuple[dict[str, Head], dict[str, str]]:
    """Fences every store that answers in time. Returns the heads, and why each other store is not fenced.

    Once the fence quorum is reached the others get a short grace, but for ``essential`` ones, which get all the time: those
    may hold what no other store has. Raises FenceLost as soon as one store has a greater epoch: then we are the stale one.
    """

    async def one(store: RegionStore) -> Head | str:
        try:
            async with asyncio.timeout(timeout_seconds):
                head = await store.fence(fence)
            problem = replication.head_problem(head)
            return head if problem is None else f"its head is damaged: {problem}"
        except FenceLost:
            raise
        except TimeoutError:
            return f"no answer in {timeout_seconds:g} s"
        except DrError as error:
            return error.message

    questions = {region: one(store) for region, store in stores.items()}
    answers = await ask_all(
        questions, enough=replication.fence_quorum(stores), good=lambda found: isinstance(found, Head), essential=essential
    )
    heads = {region: found for region, found in answers.items() if isinstance(found, Head)}
    slow = f"no answer within {GRACE_SECONDS:g} s after the others"
    return heads, {region: found or slow for region, found in answers.items() if not isinstance(found, Head)}


async def read_segment(store: RegionStore, ref: SegmentRef) -> tuple[Segment, bytes]:
    """One segment, checked against its name. Raises NotFound, Unavailable, Corrupt."""
    data = await store.get_segment(ref)
    try:
        segment = decode_segment(data)
    except Corrupt as error:
        raise Corrupt(f"object {ref.key} in {store.region}: {error.message}", hint=f"drctl verify {store.region}") from error
    header = segment.header
    if (header.stream, header.seq, header.epoch) != (ref.stream, ref.seq, ref.epoch):
        raise Corrupt(
            f"object {ref.key} in {store.region} contains segment {header.seq} of epoch {header.epoch} of {header.stream}",
            hint=f"drctl verify {store.region}",
        )
    return segment, data


async def chain_at(store: RegionStore, stream: str, starts: Sequence[EpochStart], seq: int) -> str:
    """Chain hash after segment ``seq`` of the history ``starts``, from that one segment."""
    if seq == 0:
        return GENESIS
    segment, data = await read_segment(store, SegmentRef(stream, seq, replication.owner(starts, seq)))
    return next_chain(segment.header.prev_chain, data)


async def cut_back(store: RegionStore, fence: Fence, head: Head, keep: int, forks: tuple[EpochStart, ...]) -> Head:
    """Cuts ``head`` back to the part of its history that is valid by ``forks`` and at most ``keep`` long.

    The tail becomes salvage. Returns the head after it; a head that needs no cut is returned as it is. The store's own
    last kept segment tells the chain there (log matching: the same epoch at a seq means the same history up to it).
    """
    alignment = replication.align(store.region, head, forks, keep, fence.epoch)
    if alignment.salvage is None:
        return head
    kept = replication.cut(head.epochs, alignment.keep)
    chain, received_at = GENESIS, 0.0
    if alignment.keep == head.base - 1:
        chain = head.base_chain
    elif alignment.keep:
        ref = SegmentRef(fence.stream, alignment.keep, replication.owner(kept, alignment.keep))
        last, data = await read_segment(store, ref)
        chain = next_chain(last.header.prev_chain, data)
        received_at = max(received([last]), default=last.header.created_at)
    records, size = await _count(store, head, alignment.keep)
    return await store.realign(
        fence,
        head,
        Realignment(
            seq=alignment.keep,
            chain=chain,
            base=head.base,
            base_chain=head.base_chain,
            epochs=kept,
            salvage=alignment.salvage,
            received_at=received_at,
            records=max(0, head.records - records),
            bytes=max(0, head.bytes - size),
        ),
    )


def received(segments: Iterable[Segment]) -> list[float]:
    """When the records came in. One that retention carried forward says when it came first, which tells nothing here."""
    return [frame.record.received_at for segment in segments for frame in segment.frames if ORIGIN not in frame.record.meta]


async def reseed(
    store: RegionStore, fence: Fence, head: Head, source: Head, starts: Sequence[EpochStart], after_base: tuple[int, int]
) -> Head:
    """Lets a store that is behind everything that is still kept begin anew where ``source`` begins. What it held becomes
    salvage. ``after_base``: frames and bytes of the source from its base on; so the counters stay those of the history."""
    chain, seq = source.base_chain, source.base - 1
    salvage = replication.tail_of(head, head.base - 1, fence.epoch)
    return await store.realign(
        fence,
        head,
        Realignment(
            seq=seq,
            chain=chain,
            base=source.base,
            base_chain=chain,
            epochs=replication.cut(tuple(starts), seq),
            salvage=salvage,
            received_at=head.received_at,
            records=max(0, source.records - after_base[0]),
            bytes=max(0, source.bytes - after_base[1]),
        ),
    )


async def _count(store: RegionStore, head: Head, keep: int) -> tuple[int, int]:
    """Records and bytes in the segments of ``head`` above ``keep``. A damaged one counts nothing: it must not stop the cut."""

    async def one(seq: int) -> tuple[int, int]:
        try:
            segment, data = await read_segment(store, SegmentRef(head.stream, seq, head.owner(seq)))
        except (NotFound, Corrupt):
            return 0, 0
        return len(segment.frames), len(data)

    records = size = 0
    for first in range(keep + 1, head.seq + 1, COPY_BATCH):
        counts = await asyncio.gather(*(one(seq) for seq in range(first, min(first + COPY_BATCH, head.seq + 1))))
        records += sum(count for count, _ in counts)
        size += sum(count for _, count in counts)
    return records, size


async def copy_missing(
    source: RegionStore, target: RegionStore, fence: Fence, head: Head, tail: Tail, *, limit: int = COPY_BATCH
) -> Head:
    """Brings at most ``limit`` segments of the history that ends at ``tail`` into ``target`` and commits them with one write.

    ``head`` must be a prefix of that history. Returns the head after it. Raises Corrupt when the source's chain does not hold.
    """
    first, last = head.seq + 1, min(head.seq + limit, tail.seq)
    if first > last:
        return head
    refs = [SegmentRef(fence.stream, seq, replication.owner(tail.starts, seq)) for seq in range(first, last + 1)]
    parts = await asyncio.gather(*(read_segment(source, ref) for ref in refs))
    chain = head.chain
    for ref, (segment, data) in zip(refs, parts, strict=True):
        if segment.header.prev_chain != chain:
            raise Corrupt(
                f"{ref.key} in {source.region} does not follow segment {ref.seq - 1} of {target.region}",
                hint=f"drctl verify {source.region}; drctl verify {target.region}",
            )
        chain = next_chain(chain, data)
    await asyncio.gather(*(target.put_segment(fence, ref, data) for ref, (_, data) in zip(refs, parts, strict=True)))
    stamps = received(segment for segment, _ in parts)
    commit = Commit(
        prev_seq=head.seq,
        prev_chain=head.chain,
        seq=last,
        chain=chain,
        starts=tuple(start for start in tail.starts if first <= start.first_seq <= last),
        received_at=max(stamps, default=head.received_at),
        records=sum(len(segment.frames) for segment, _ in parts),
        bytes=sum(len(data) for _, data in parts),
    )
    return await target.advance(fence, commit)


async def bring_home(
    stores: Mapping[str, RegionStore],
    heads: Mapping[str, Head],
    fence: Fence,
    home: str,
    forks: tuple[EpochStart, ...],
    choice: replication.Choice,
) -> tuple[Head, Tail]:
    """Makes the home store hold exactly the chosen history. Returns its head, and the tail that the new epoch continues.

    Raises Unavailable when the home store was not fenced: an epoch opens on its own region's store.
    """
    if home not in heads:
        raise Unavailable(
            f"the store of {home} is not fenced and an epoch opens on its own region's store",
            hint=f"look at the store of {home}, or plan a failover to a region whose store answers",
        )
    head = await cut_back(stores[home], fence, heads[home], choice.length, forks)
    sources = sorted((a for a in choice.alignments if a.keep == choice.length), key=lambda a: a.region != choice.source)
    chain = await _chain_of(stores, heads, fence, choice, [found.region for found in sources])
    goal = Tail(choice.length, chain, choice.starts)
    having = [heads[found.region] for found in sources if found.region != home]
    if having and all(retention.is_behind(head, found.base) for found in having):
        seed = min(having, key=lambda found: (found.base, found.stream))
        region = next(found.region for found in sources if heads[found.region] is seed)
        head = await reseed(stores[home], fence, head, seed, choice.starts, await _count(stores[region], seed, seed.base - 1))
    while head.seq < goal.seq:
        head = await _from_any([stores[found.region] for found in sources], stores[home], fence, head, goal)
    if head.chain != goal.chain:
        raise Corrupt(
            f"the stores of {home} and {choice.source} hold different histories under the same epochs at segment {goal.seq}",
            hint=f"drctl verify {home}; drctl verify {choice.source}",
        )
    return head, goal


async def _chain_of(
    stores: Mapping[str, RegionStore],
    heads: Mapping[str, Head],
    fence: Fence,
    choice: replication.Choice,
    having: Sequence[str],
) -> str:
    """Chain at the end of the chosen history: from a head that ends there, else from the last segment in any store."""
    for region in having:
        if heads[region].seq == choice.length:
            return heads[region].chain
        if heads[region].base - 1 == choice.length:
            return heads[region].base_chain
    failed: DrError | None = None
    for region in having:
        try:
            return await chain_at(stores[region], fence.stream, choice.starts, choice.length)
        except DrError as error:
            failed = failed or error
    raise failed or Unavailable("no fenced store has the chosen history")


async def _from_any(sources: Sequence[RegionStore], target: RegionStore, fence: Fence, head: Head, goal: Tail) -> Head:
    """Copies from the first source that can give what is missing: one damaged copy must not stop a promotion. A whole batch
    first, then one segment: two damaged copies may together hold everything."""
    failed: DrError | None = None
    others = [source for source in sources if source.region != target.region]
    for limit in (COPY_BATCH, 1):
        for source in others:
            try:
                return await copy_missing(source, target, fence, head, goal, limit=limit)
            except FenceLost:
                raise
            except (NotFound, Corrupt, Unavailable) as error:
                failed = failed or error
    raise failed or Unavailable(f"no other store has segment {head.seq + 1}", hint="bring another region's store back")
