"""What really happened, read where it cannot be embellished: agents' ledgers, segments in the stores, probes from outside."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aioboto3
import httpx

from controller.adapters.dns import DnsResolver
from controller.adapters.region_store import AwsRegionStore
from controller.domain.model import EpochStart, Head, Kind, SegmentRef
from controller.errors import DrError
from controller.lab.aws import LAB_ENVIRONMENT
from controller.lab.demo_report import Stored
from controller.lab.topology import ControllerPlace, Topology
from controller.stream.segment import decode_segment

READERS = 8
"""Segments that are fetched at once."""
PROBE_SECONDS = 0.1


def open_store(topology: Topology, region: str) -> AwsRegionStore:
    """A reader's own client to a region's store, past the WAN. Call ``start()`` before use and ``close()`` after it."""
    settings = topology.document["regions"][region]
    return AwsRegionStore(
        region,
        group=topology.group,
        bucket=settings["bucket"],
        table=settings["table"],
        prefix=str(topology.document.get("stream", {}).get("prefix", "dr")),
        aws_region=str(settings.get("aws_region") or region),
        s3_endpoint=settings["s3_endpoint"],
        dynamodb_endpoint=settings["dynamodb_endpoint"],
        call_timeout_seconds=5.0,
        connect_timeout_seconds=2.0,
        max_pool_connections=READERS * 2,
        session=aioboto3.Session(
            # Made up, as all of the lab's: whoever runs this may have real ones in the environment.
            aws_access_key_id=LAB_ENVIRONMENT["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=LAB_ENVIRONMENT["AWS_SECRET_ACCESS_KEY"],
        ),
    )


async def read_refs(store: AwsRegionStore, refs: Sequence[SegmentRef]) -> tuple[Stored, ...]:
    """The checkpoints in these segments, in order. Raises NotFound, Corrupt, Unavailable: evidence is never skipped over."""
    gate = asyncio.Semaphore(READERS)

    async def one(ref: SegmentRef) -> list[Stored]:
        async with gate:
            segment = decode_segment(await store.get_segment(ref))
        return [
            Stored(frame.record.agent, frame.record.id, frame.record.sha256, ref.seq)
            for frame in segment.frames
            if frame.record.kind == Kind.CHECKPOINT
        ]

    return tuple(stored for part in await asyncio.gather(*(one(ref) for ref in refs)) for stored in part)


async def read_history(store: AwsRegionStore, stream: str, *, last_epoch: int) -> tuple[Stored, ...]:
    """Checkpoints of the store's committed history that were written under ``last_epoch`` or an earlier one."""
    head = await store.read_head(stream)
    refs = [SegmentRef(stream, seq, head.owner(seq)) for seq in range(head.base, head.seq + 1) if head.owner(seq) <= last_epoch]
    return await read_refs(store, refs)


def salvage_refs(head: Head) -> list[SegmentRef]:
    """The segments that realignments cut off this store."""
    return [
        SegmentRef(head.stream, seq, _owner(tail.epochs, seq))
        for tail in head.salvage
        for seq in range(tail.first_seq, tail.last_seq + 1)
    ]


def _owner(starts: Sequence[EpochStart], seq: int) -> int:
    owners = [start.epoch for start in starts if start.first_seq <= seq]
    return owners[-1] if owners else (starts[0].epoch if starts else 0)


@dataclass(slots=True)
class ActiveWatch:
    """Asks every controller all the time whether it is active, and remembers the most that said so in one round."""

    places: Sequence[ControllerPlace]
    most: int = 0
    rounds: int = 0
    active: tuple[str, ...] = ()
    """``region/instance`` in the last round."""
    since: dict[str, float] = field(default_factory=dict)
    """When each was first seen active, wall clock."""
    _task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to ask, in the background."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Ends asking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        async with httpx.AsyncClient(timeout=0.5, trust_env=False) as client:
            while True:
                await self.look(client)
                await asyncio.sleep(PROBE_SECONDS)

    async def look(self, client: httpx.AsyncClient) -> tuple[str, ...]:
        """One round."""

        async def ask(place: ControllerPlace) -> str | None:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(f"{place.api.url}/active")).status_code == 200:
                    return f"{place.region}/{place.instance}"
            return None

        self.active = tuple(name for name in await asyncio.gather(*(ask(place) for place in self.places)) if name)
        self.most = max(self.most, len(self.active))
        self.rounds += 1
        now = time.time()
        for name in self.active:
            self.since.setdefault(name, now)
        return self.active


@dataclass(frozen=True, slots=True)
class OutsideView:
    """What a client sees that knows nothing but the group's name."""

    addresses: tuple[str, ...]
    region: str
    active: str
    """``region/instance`` of the active controller in the region that the name leads to, "" when there is none."""


async def look_from_outside(topology: Topology, client: httpx.AsyncClient) -> OutsideView:
    """Resolves the name at the lab's DNS server and asks the controllers where it leads to. Never raises for a failure."""
    try:
        answers = await DnsResolver([str(topology.dns)], 0.5).ask(topology.dns_name, "A")
    except DrError:
        return OutsideView((), "", "")
    values = tuple(value for answer in answers for value in answer.values)
    regions = topology.document["regions"]
    led_to = {name for name, settings in regions.items() if set(values) & set(settings["addresses"])}
    if len(led_to) != 1:
        return OutsideView(values, "", "")
    region = led_to.pop()
    active = await ActiveWatch(topology.region(region).controllers).look(client)
    return OutsideView(values, region, active[0] if active else "")


def measured(value: Any) -> float | None:
    """A number from a status document; None where it is unknown (``{"since": …, "why": …}``)."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
