"""Bodies that are not warm: fetched from the region's store along their chain of deltas, every hash checked.

One record costs at most ``MAX_CHAIN + 1`` GETs, one for each different segment. The index knows all of them beforehand, so
they are fetched side by side.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from controller.domain.model import Frame, Record, SegmentRef
from controller.errors import Corrupt, DrError, NotFound
from controller.ports import RegionStore
from controller.stream.limits import MAX_CHAIN
from controller.stream.records import Link
from controller.stream.segment import Segment, frame_at, open_frame
from controller.stream.view import View

CONCURRENCY = 4
"""GETs at a time. Also bounds memory: this many segments are held at once."""
CHAIN_CONCURRENCY = 16
"""The same while somebody waits for one record: the segments of a chain of deltas are no larger than others."""
WARM_BYTES = 64 * 2**20
"""Bodies that are decoded together while warming."""


async def read_record(view: View, store: RegionStore, agent: str, id: str) -> tuple[Record, bytes]:  # noqa: A002 - Record's word
    """Record and body, from the warm bodies or from the store. Raises NotFound (unknown, or its chain of deltas begins before
    this copy does), Unavailable, Corrupt naming the segment."""
    warm = view.read(agent, id)
    if warm is not None:
        return warm
    links, body = _chain(view, agent, id)
    for frame in reversed(await _frames(store, links)):
        body = open_frame(frame, body)
    assert body is not None
    return links[0].record, body


def _chain(view: View, agent: str, record_id: str) -> tuple[list[Link], bytes | None]:
    """From the record down to a whole frame, or to a record whose body is warm (returned beside the links)."""
    links: list[Link] = []
    wanted: str | None = record_id
    while wanted is not None:
        if links:
            warm = view.read(agent, wanted)
            if warm is not None:
                return links, warm[1]
        link = view.link(agent, wanted)
        if link is None:
            if links:
                raise NotFound(
                    f"record {record_id!a} of agent {agent!a} stands on {wanted!a}, which this region's copy no longer has",
                    hint="choose a newer record, or look in another region or in an older backup",
                )
            raise NotFound(
                f"agent {agent!a} has no record {record_id!a} in this region's copy", hint="list the agent's records"
            )
        links.append(link)
        if len(links) > MAX_CHAIN + 1:
            raise Corrupt(f"record {record_id!a} of agent {agent!a}: its chain of deltas is longer than {MAX_CHAIN}", hint="")
        wanted = link.base
    return links, None


async def _frames(store: RegionStore, links: Sequence[Link]) -> list[Frame]:
    """The frames of the links, in their order. Each segment is fetched once and dropped again."""
    found: list[Frame | None] = [None] * len(links)
    wanted: dict[SegmentRef, list[int]] = {}
    for number, link in enumerate(links):
        wanted.setdefault(link.ref, []).append(number)
    slots = asyncio.Semaphore(CHAIN_CONCURRENCY)

    async def fetch(ref: SegmentRef, numbers: list[int]) -> None:
        async with slots:
            data = await store.get_segment(ref)
            try:
                for number in numbers:
                    found[number] = _frame(data, links[number])
            except Corrupt as error:
                raise Corrupt(f"{ref.key} in {store.region}: {error.message}", hint=error.hint) from error

    results = await asyncio.gather(*(fetch(ref, numbers) for ref, numbers in wanted.items()), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [frame for frame in found if frame is not None]


def _frame(data: bytes, link: Link) -> Frame:
    frame = frame_at(data, link.ordinal)
    here, there = frame.record, link.record
    if (here.agent, here.id, here.sha256, frame.base) != (there.agent, there.id, there.sha256, link.base):
        raise Corrupt(
            f"frame {link.ordinal} is record {here.id!a} of agent {here.agent!a}, indexed as {there.id!a} of {there.agent!a}",
            hint="delete the view and let it be rebuilt; if that does not help, repair the store from another region",
        )
    return frame


async def warm_bases(view: View, store: RegionStore, segment: Segment) -> int:
    """Loads what ``View.apply`` needs for this segment and does not have (it raised ``ColdBase``). Returns how many bodies.
    A base that this copy can no longer give back is marked, so that what stands on it counts as unverified."""
    missing = view.missing(segment)
    for key, answer in (await read_many(view, store, missing)).items():
        if isinstance(answer, DrError):
            _lost_or_raise(view, *key, answer)
        else:
            view.admit(*key, answer[1])
    return len(missing)


async def read_many(
    view: View, store: RegionStore, keys: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], tuple[Record, bytes] | DrError]:
    """Records and bodies of many (agent, id). Each segment is fetched once, whatever number of them it serves; only the frames
    that are wanted are kept. One that cannot be had has its error as its answer: see ``read_record``."""
    found: dict[tuple[str, str], tuple[Record, bytes] | DrError] = {}
    chains: dict[tuple[str, str], tuple[list[Link], bytes | None]] = {}
    wanted: dict[SegmentRef, dict[int, Link]] = {}
    for key in keys:
        try:
            warm_one = view.read(*key)
            if warm_one is not None:
                found[key] = warm_one
                continue
            chains[key] = _chain(view, *key)
        except DrError as error:
            found[key] = error
            continue
        for link in chains[key][0]:
            wanted.setdefault(link.ref, {})[link.ordinal] = link
    frames = await _fetch_all(store, wanted)
    for key, (links, body) in chains.items():
        try:
            found[key] = links[0].record, _open_chain([frames[link.ref, link.ordinal] for link in links], body)
        except DrError as error:
            found[key] = error
    return found


def _open_chain(frames: Sequence[Frame | DrError], body: bytes | None) -> bytes:
    """From the last frame, which is whole or stands on ``body``, up to the first."""
    for frame in reversed(frames):
        if isinstance(frame, DrError):
            raise frame
        body = open_frame(frame, body)
    assert body is not None
    return body


async def _fetch_all(
    store: RegionStore, wanted: Mapping[SegmentRef, Mapping[int, Link]]
) -> dict[tuple[SegmentRef, int], Frame | DrError]:
    slots = asyncio.Semaphore(CONCURRENCY)
    frames: dict[tuple[SegmentRef, int], Frame | DrError] = {}

    async def fetch(ref: SegmentRef, links: Mapping[int, Link]) -> None:
        async with slots:
            try:
                data = await store.get_segment(ref)
            except DrError as error:
                frames.update(dict.fromkeys(((ref, ordinal) for ordinal in links), error))
                return
            for ordinal, link in links.items():
                try:
                    frames[ref, ordinal] = _frame(data, link)
                except Corrupt as error:
                    frames[ref, ordinal] = Corrupt(f"{ref.key} in {store.region}: {error.message}", hint=error.hint)

    await asyncio.gather(*(fetch(ref, links) for ref, links in wanted.items()))
    return frames


async def warm(view: View, store: RegionStore, limit: int) -> bool:
    """Loads at most ``limit`` newest bodies that a rewind or a snapshot left cold, those of one segment together. Returns
    whether more may be left. One that cannot be had does not stop the others: the first error is raised at the end."""
    first_error: DrError | None = None
    cold = view.cold()
    loaded = at = 0
    while at < len(cold) and loaded < limit:
        batch: list[tuple[str, str]] = []
        size = 0
        for agent, record_id, bytes_ in cold[at : at + limit - loaded]:
            size += bytes_
            if batch and size > WARM_BYTES:
                break
            batch.append((agent, record_id))
        at += len(batch)
        for (agent, record_id), answer in (await read_many(view, store, batch)).items():
            try:
                if isinstance(answer, DrError):
                    _lost_or_raise(view, agent, record_id, answer)
                else:
                    view.admit(agent, record_id, answer[1])
                loaded += 1
            except DrError as error:
                first_error = first_error or error
    if at < len(cold):
        return True
    if first_error is not None:
        raise first_error
    return False


def _lost_or_raise(view: View, agent: str, record_id: str, error: DrError) -> None:
    """In a copy that begins late, what a record stands on may rightly be absent: the record is marked then."""
    if isinstance(error, NotFound) and view.begins_late(agent, record_id):
        view.doubt(agent, record_id)
        return
    raise error
