"""Bodies proven off the event loop: decoded and hashed in a thread.

The loop also keeps the lease. Small bodies are proven where they are needed; from ``INLINE_BYTES`` on it is done here,
beforehand.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from controller.domain.model import Encoding, Frame
from controller.errors import DrError
from controller.stream.delta import open_frame

INLINE_BYTES = 2**20
"""Bodies of one call or segment up to this are decoded at once (about 2 ms); more in a thread."""

PROVEN_MAX_BYTES = 256 * 2**20
"""Of one call or segment no more than this is decoded beforehand: all of it is held at once, and a few MiB on the wire may be
gigabytes. What comes after it is decoded where it is needed, one body at a time."""


@dataclass(frozen=True, slots=True)
class Proven:
    """A body that this process decoded from its frame and hashed. ``new``: the writer, which alone adds to its stream, has made
    sure that nobody knows the record yet."""

    body: bytes
    new: bool = False


async def prove(frames: Sequence[Frame], base_of: Callable[[Frame], bytes | None]) -> Mapping[int, Proven]:
    """Bodies by the number of their frame; empty when they are small enough for the loop. What is missing (a delta whose base
    is not at hand, a body that does not verify) is for the caller to look at again, which then says what is wrong.

    ``base_of``: the base's body of a delta whose base is not among the frames before it; may raise DrError."""
    if sum(frame.record.size for frame in frames) <= INLINE_BYTES:
        return {}
    jobs: list[tuple[Frame, bytes | int | None]] = []
    numbers: dict[tuple[str, str], int] = {}
    for number, frame in enumerate(frames):
        record = frame.record
        base: bytes | int | None = None
        if frame.base is not None:
            base = numbers.get((record.agent, frame.base))
            if base is None:
                try:
                    base = base_of(frame)
                except DrError:
                    base = None
        jobs.append((frame, base))
        numbers[record.agent, record.id] = number
    return await asyncio.to_thread(_prove_all, jobs)


def _prove_all(jobs: Sequence[tuple[Frame, bytes | int | None]]) -> dict[int, Proven]:
    """Works on its arguments only. A base that is a number is the body of that frame."""
    found: dict[int, Proven] = {}
    left = PROVEN_MAX_BYTES
    for number, (frame, base) in enumerate(jobs):
        left -= frame.record.size
        if left < 0:
            break
        earlier = found.get(base) if isinstance(base, int) else None
        body = earlier.body if earlier is not None else None if isinstance(base, int) else base
        if frame.encoding is Encoding.DELTA and body is None:
            continue
        try:
            opened = open_frame(frame, body)
        except DrError:
            continue
        found[number] = Proven(opened)
    return found
