"""A writer that slept through a promotion: holds the old epoch, knows nothing, wakes up and tries to go on.

It reads, while its region is active, what the holder knows: its fence (epoch, instance), every store's head, the state of
the traffic. Then it waits to be stopped (SIGSTOP, with its region) and continued (SIGCONT). Awake, it does with the real
adapters what a holder does: appends the next segment at every region store, moves the traffic home. First as it remembers
the world, then, which is harder to refuse, after having looked again. Each try is one JSON line on standard output:

    {"event": "try", "target": "store:us-east-1", "attempt": "remembered|re-read", "outcome": "refused|ACCEPTED|unavailable", …}

One store cannot refuse yet: the one that slept, too, as long as the new holder has not fenced it. What is written there in
the meantime is acknowledged by nobody (the right of an old holder ends by its own clock) and becomes salvage. The writer
waits for the fence there before its second try.

``python -m controller.lab.late_writer --config FILE`` (settings of a controller of its region). Where the region is not
active (any more), it takes the epoch before the present one, or ``--epoch N``, and tries at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from controller.adapters.region_store import AwsRegionStore
from controller.adapters.route53 import Route53Traffic
from controller.agent.credentials import Bearer, Credentials
from controller.domain.model import Commit, EpochStart, Fence, Head, SegmentRef
from controller.errors import Conflict, DrError, FenceLost, Refused, Unavailable
from controller.ports import TrafficState
from controller.settings import Settings, load_settings
from controller.stream.delta import frame
from controller.stream.segment import SegmentHeader, encode_segment, next_chain

FENCE_WAIT_SECONDS = 60.0
POLL_SECONDS = 0.25
TRIES = 5
"""Answers that say nothing (a store that is still waking up) are asked for again."""


@dataclass(frozen=True, slots=True)
class Belief:
    """The world as the old holder knew it."""

    fence: Fence
    heads: dict[str, Head]
    traffic: TrafficState


def say(event: str, **fields: Any) -> None:
    """One JSON line, at once."""
    print(json.dumps({"event": event, "at": time.time(), "pid": os.getpid(), **fields}), flush=True)


def next_segment(group: str, fence: Fence, head: Head) -> tuple[SegmentRef, bytes, Commit]:
    """What a holder would put and commit after ``head``: a true segment with one record, under its own epoch."""
    now = time.time()
    record = frame("late-writer", f"late-{uuid.uuid4().hex}", "late", b"written after its right had ended", created_at=now)
    header = SegmentHeader(group, fence.stream, head.seq + 1, fence.epoch, head.chain, now)
    data = encode_segment(header, (record,))
    starts = () if head.last_epoch == fence.epoch else (EpochStart(fence.epoch, head.seq + 1),)
    chain = next_chain(head.chain, data)
    commit = Commit(head.seq, head.chain, head.seq + 1, chain, starts, received_at=now, records=1, bytes=len(data))
    return SegmentRef(fence.stream, head.seq + 1, fence.epoch), data, commit


class LateWriter:
    """The old holder's hands, without its clock."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stores = {
            name: AwsRegionStore(
                name,
                group=settings.group,
                bucket=region.bucket,
                table=region.table,
                prefix=settings.stream.prefix,
                aws_region=region.aws_region or name,
                s3_endpoint=region.s3_endpoint,
                dynamodb_endpoint=region.dynamodb_endpoint,
                call_timeout_seconds=settings.aws.call_timeout_seconds,
                connect_timeout_seconds=settings.aws.connect_timeout_seconds,
                max_pool_connections=4,
            )
            for name, region in settings.regions.items()
        }
        self._traffic = Route53Traffic(
            settings.traffic.zone_id,
            settings.traffic.name,
            regions=tuple(settings.regions),
            ttl_seconds=settings.traffic.ttl_seconds,
            endpoint=settings.traffic.endpoint,
            aws_region=settings.traffic.aws_region,
            call_timeout_seconds=settings.aws.call_timeout_seconds,
        )

    async def start(self) -> None:
        """Opens the clients."""
        await asyncio.gather(*(store.start() for store in self._stores.values()))

    async def close(self) -> None:
        """Closes the clients."""
        await asyncio.gather(*(store.close() for store in self._stores.values()))
        await self._traffic.close()

    async def holder(self) -> Fence:
        """The fence of the first stream's holder, as a controller of this region tells it. Raises Unavailable."""
        shown = Credentials.of()
        patience = self._settings.aws.call_timeout_seconds
        async with httpx.AsyncClient(
            timeout=patience, verify=shown.tls(), headers=Bearer(shown).headers(), trust_env=False
        ) as client:
            for url in self._settings.regions[self._settings.region].controllers:
                try:
                    holders = (await client.get(f"{url}/v1/status")).json()["holders"]
                except (httpx.HTTPError, ValueError, KeyError):
                    continue
                for holder in holders if isinstance(holders, list) else ():
                    return Fence(holder["stream"], int(holder["epoch"]), holder["region"], holder["instance"])
        raise Unavailable(f"no controller of {self._settings.region} tells who the holder is", hint="look at `drctl status`")

    async def believe(self, fence: Fence) -> Belief:
        """Reads the world. Raises Unavailable."""
        heads = await asyncio.gather(*(store.read_head(fence.stream) for store in self._stores.values()))
        return Belief(fence, dict(zip(self._stores, heads, strict=True)), await self._traffic.read())

    async def attempt(self, belief: Belief) -> bool:
        """Every try, at every store and at the traffic. Returns whether all second tries were refused."""
        await asyncio.gather(*(self._advance(name, belief.fence, head, "remembered") for name, head in belief.heads.items()))
        weights = {name: int(name == belief.fence.region) * 100 for name in belief.traffic.weights}
        await self._change(belief.fence, belief.traffic, weights, "remembered")
        again = await asyncio.gather(*(self._again(name, belief.fence) for name in belief.heads))
        try:
            seen = await self._traffic.read()
        except DrError as error:
            say("try", target="traffic", attempt="re-read", outcome="unavailable", **_told(error))
            return False
        return all([*again, await self._change(belief.fence, seen, weights, "re-read")])

    async def _again(self, name: str, fence: Fence) -> bool:
        until = asyncio.get_running_loop().time() + FENCE_WAIT_SECONDS
        while True:
            try:
                head = await self._stores[name].read_head(fence.stream)
                if head.epoch > fence.epoch:
                    return await self._advance(name, fence, head, "re-read")
                waiting = f"the head's epoch is still {head.epoch}"
            except DrError as error:
                waiting = error.message
            if asyncio.get_running_loop().time() > until:
                say("try", target=f"store:{name}", attempt="re-read", outcome="unavailable", message=waiting)
                return False
            await asyncio.sleep(POLL_SECONDS)

    async def _advance(self, name: str, fence: Fence, head: Head, attempt: str) -> bool:
        """Object, then head, as the writer does. The object under an old epoch's key harms nobody; the head decides. Where an
        object of the old holder is there already, the remembered try ends with that: a head must never point at bytes that
        are not the ones that it hashes. The second try goes on, because there the fence was seen to stand."""
        store, (ref, data, commit) = self._stores[name], next_segment(self._settings.group, fence, head)

        async def go() -> str:
            try:
                await store.put_segment(fence, ref, data)
            except Conflict:
                if attempt == "remembered":
                    raise
            return f"head moved to {(await store.advance(fence, commit)).seq}"

        return await _try(f"store:{name}", attempt, fence, go)

    async def _change(self, fence: Fence, expected: TrafficState, weights: dict[str, int], attempt: str) -> bool:
        async def go() -> str:
            return f"change {await self._traffic.change(fence, expected, weights)}"

        return await _try("traffic", attempt, fence, go)


async def _try(target: str, attempt: str, fence: Fence, go: Callable[[], Awaitable[str]]) -> bool:
    """One try with its line. True when it was refused for good."""
    outcome, detail = "unavailable", {}
    for _ in range(TRIES):
        try:
            outcome, detail = "ACCEPTED", {"message": await go()}
        except (FenceLost, Conflict, Refused) as error:
            outcome, detail = "refused", _told(error)
        except DrError as error:
            outcome, detail = "unavailable", _told(error)
            await asyncio.sleep(POLL_SECONDS)
            continue
        break
    say("try", target=target, attempt=attempt, epoch=fence.epoch, writer=fence.writer, outcome=outcome, **detail)
    return outcome == "refused"


def _told(error: DrError) -> dict[str, str]:
    return {"error": type(error).__name__, "code": error.code, "message": error.message}


def read_log(log: Path, pid: int) -> list[dict[str, Any]]:
    """The lines that the writer with this process number has printed so far; others' and garbled ones are passed over."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for text in log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and line.get("pid") == pid and "event" in line:
                    lines.append(line)
    return lines


async def run(settings: Settings, epoch: int | None) -> int:
    """0: every second try was refused. 1: one was not, which is a violation of the design's second promise."""
    awake = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGCONT, awake.set)
    writer = LateWriter(settings)
    await writer.start()
    try:
        fence = await writer.holder()
        active = fence.region == settings.region and epoch is None
        if not active:
            late = epoch if epoch is not None else max(1, fence.epoch - 1)
            fence = Fence(fence.stream, late, settings.region, settings.instance)
        belief = await writer.believe(fence)
        heads = {name: head.seq for name, head in belief.heads.items()}
        weights = dict(belief.traffic.weights)
        say("armed" if active else "believes", epoch=fence.epoch, writer=fence.writer, heads=heads, weights=weights)
        if active:
            awake.clear()
            await awake.wait()
        say("awake")
        refused = await writer.attempt(belief)
        say("finished", refused=refused)
        return 0 if refused else 1
    finally:
        await writer.close()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m controller.lab.late_writer")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--epoch", type=int, help="an epoch that is over; default: the one before the present")
    arguments = parser.parse_args()
    try:
        return asyncio.run(run(load_settings(arguments.config), arguments.epoch))
    except DrError as error:
        say("failed", **error.to_dict())
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
