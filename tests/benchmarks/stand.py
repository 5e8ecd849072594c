"""Our side of a comparison: real etcd, a store for each of three regions, controllers as processes; all from the lab's parts.

Differences to ``drctl lab up``, all in ``settings``: no agent hosts; one controller per region, or only the holder
(``standbys=False``); stores are reached directly unless ``wan`` asks for the lab's proxy (which counts bytes and delays them);
a lease of 10 s and patient deadlines, because everything shares a few cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import random
import shutil
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from controller.adapters.region_store import AwsRegionStore
from controller.cli.lab import read_settings
from controller.domain.model import Head
from controller.domain.sharing import stream_names
from controller.lab.aws import LAB_ENVIRONMENT
from controller.lab.supervisor import Lab
from controller.lab.topology import Topology, build
from controller.lab.wan import LinkSpec
from tests.benchmarks.measure import Cpu
from tests.benchmarks.proxy import Count, Proxy

ROOT = Path(__file__).resolve().parents[2]


def settings(**overrides: Any) -> dict[str, Any]:
    """The lab's settings with a benchmark's deadlines. ``overrides``: tables by name."""
    document = copy.deepcopy(read_settings(ROOT / "config" / "lab.toml"))
    document["etcd"].update(ttl_seconds=10, margin_seconds=1.0, tick_seconds=1.0, call_timeout_seconds=2.0)
    document["aws"].update(call_timeout_seconds=10.0, connect_timeout_seconds=3.0)
    document["stream"].update(canary_seconds=5.0)
    for table, values in overrides.items():
        document[table].update(values)
    return document


@dataclass(frozen=True, slots=True)
class Loader:
    """A process that writes (``load.py`` or the peer's)."""

    process: asyncio.subprocess.Process

    async def ask(self, word: str) -> dict[str, Any]:
        """Sends a line and returns the next answer."""
        self.tell(word)
        return await self.answer()

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n".encode())

    async def answer(self) -> dict[str, Any]:
        """The next JSON line. Raises RuntimeError when the process ended."""
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a load process ended with {await self.process.wait()}")
        document: dict[str, Any] = json.loads(line)
        return document

    @property
    def pid(self) -> int:
        return self.process.pid


@contextlib.asynccontextmanager
async def loaders(argv: list[str], jobs: list[dict[str, Any]], environment: Mapping[str, str]) -> AsyncIterator[list[Loader]]:
    """One process per job, ready to go; killed at the end."""
    processes = [
        await asyncio.create_subprocess_exec(
            *argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=dict(environment), limit=2**28
        )
        for _ in jobs
    ]
    made = [Loader(process) for process in processes]
    try:
        for loader, job in zip(made, jobs, strict=True):
            loader.tell(json.dumps(job))
        for loader in made:
            await loader.answer()
        yield made
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


class Stand:
    """A running lab with its stores open for looking."""

    def __init__(self, lab: Lab, stores: dict[str, AwsRegionStore], streams: tuple[str, ...], counts: dict[str, Count]) -> None:
        self.lab = lab
        self.stores = stores
        self.streams = streams
        self.counts = counts

    @property
    def topology(self) -> Topology:
        return self.lab.topology

    @property
    def endpoints(self) -> list[str]:
        return [place.api.url for place in self.topology.region(self.topology.home).controllers]

    def pids(self) -> dict[str, list[int]]:
        """Process numbers by part: ``controller`` is the holder's region, ``standbys`` the others'."""
        home, found = self.topology.home, {}
        for process in self.lab.processes():
            name = {"store": "stores", "controller": "controller" if process.region == home else "standbys"}.get(
                process.kind, process.kind
            )
            found.setdefault(name if name in {"stores", "controller", "standbys", "etcd", "wan"} else "other", []).append(
                process.pid
            )
        return found

    def pid(self, name: str) -> int:
        """Of one process, by the lab's name for it."""
        return next(process.pid for process in self.lab.processes() if process.name == name)

    async def heads(self, region: str) -> list[Head]:
        return [await self.stores[region].read_head(stream) for stream in self.streams]

    async def records(self) -> dict[str, int]:
        """Committed records by region, canaries included."""
        return {region: sum(head.records for head in await self.heads(region)) for region in self.stores}

    async def drained(self, timeout_seconds: float = 60.0) -> float:
        """Waits until every store has equal heads that no longer move. Returns the seconds. Raises TimeoutError."""
        began = time.monotonic()
        async with asyncio.timeout(timeout_seconds):
            while True:
                before = [[(head.seq, head.chain) for head in await self.heads(region)] for region in self.stores]
                if all(seen == before[0] for seen in before):
                    return time.monotonic() - began
                await asyncio.sleep(0.02)

    async def positions(self, region: str) -> dict[str, int]:
        """How far the first controller of a region has verified its store, by stream. Raises httpx.HTTPError."""
        place = self.topology.region(region).controllers[0]
        async with httpx.AsyncClient(timeout=10.0, trust_env=False) as http:
            answer = (await http.get(f"{place.api.url}/v1/status")).raise_for_status().json()
        return {stream: int(position["seq"]) for stream, position in answer["positions"].items()}

    async def standbys_level(self) -> bool:
        """Whether every standby has verified all that its store has."""
        for region in self.topology.regions:
            if region.name != self.topology.home and region.controllers:
                positions = await self.positions(region.name)
                if any(positions.get(head.stream, 0) < head.seq for head in await self.heads(region.name)):
                    return False
        return True

    async def level(self, timeout_seconds: float) -> float:
        """Waits until every standby is level; returns the seconds. Raises TimeoutError."""
        began = time.monotonic()
        async with asyncio.timeout(timeout_seconds):
            while not await self.standbys_level():  # noqa: ASYNC110 - another process's state
                await asyncio.sleep(0.05)
        return time.monotonic() - began

    def cpu(self, **more: list[int]) -> Cpu:
        """CPU of every part from now on. ``more``: other processes, such as the load's."""
        return Cpu({**self.pids(), **more})

    def load(self, jobs: list[dict[str, Any]]) -> contextlib.AbstractAsyncContextManager[list[Loader]]:
        """Load processes against the home region's controllers."""
        full = [{"endpoints": self.endpoints, **job} for job in jobs]
        return loaders([sys.executable, "-m", "tests.benchmarks.load"], full, {**os.environ, "PYTHONPATH": str(ROOT)})


class BenchLab(Lab):
    """The lab without what a benchmark does not use: no WAN process unless there are links to delay."""

    def _start_wan(self) -> None:
        if self.topology.links and not self.counted:
            super()._start_wan()

    counted = False


def counted_links(built: Topology) -> tuple[LinkSpec, ...]:
    """From the home region to every store, its own too, at free ports for a counting proxy."""
    home = built.region(built.home)
    port = home.store.port + 1000
    return tuple(
        LinkSpec(home.name, region.name, home.store.host, port + number, region.store.host, region.store.port)
        for number, region in enumerate(built.regions)
    )


def topology(folder: Path, document: Mapping[str, Any], *, standbys: bool, wan: bool, counted: bool) -> Topology:
    """One controller per region at most, on ports of its own."""
    built = build(document, folder.absolute(), offset=random.randrange(10_000, 19_000))
    regions = tuple(
        replace(region, controllers=region.controllers[:1] if standbys or region.name == built.home else ())
        for region in built.regions
    )
    return replace(built, regions=regions, links=counted_links(built) if counted else built.links if wan else ())


@contextlib.asynccontextmanager
async def stand(
    folder: Path,
    *,
    standbys: bool = False,
    delay_ms: float | None = None,
    counted: bool = False,
    document: Mapping[str, Any] | None = None,
) -> AsyncIterator[Stand]:
    """Starts all of it in ``folder`` (emptied), and ends all of it. ``delay_ms``: one way between regions, None = no proxy;
    ``counted``: the holder reaches every store through a counting proxy (``Stand.counts``)."""
    shutil.rmtree(folder, ignore_errors=True)
    document = document or settings()
    wan = delay_ms is not None
    lab = BenchLab(
        topology(folder, document, standbys=standbys, wan=wan, counted=counted),
        say=lambda _: None,
        hosts_per_region=0,
    )
    lab.counted = counted
    async with contextlib.AsyncExitStack() as stack:
        counts = {}
        for link in lab.topology.links if counted else ():
            proxy = await stack.enter_async_context(Proxy(link.listen_host, link.listen_port, link.to_host, link.to_port))
            counts[link.target] = proxy.count
        await stack.enter_async_context(lab)
        if wan:
            await lab.wan("set", delay_ms=delay_ms)
        stores = {}
        for region in lab.topology.regions:
            place = lab.topology.document["regions"][region.name]
            stores[region.name] = await stack.enter_async_context(
                AwsRegionStore(
                    region.name,
                    group=lab.topology.group,
                    bucket=place["bucket"],
                    table=place["table"],
                    prefix=document["stream"]["prefix"],
                    aws_region=region.name,
                    s3_endpoint=region.store.url,
                    dynamodb_endpoint=region.store.url,
                    call_timeout_seconds=10.0,
                    connect_timeout_seconds=3.0,
                    max_pool_connections=8,
                )
            )
        yield Stand(lab, stores, stream_names(int(document["stream"].get("streams", 1))), counts)


def use_lab_credentials() -> None:
    """The stand-ins' made-up credentials for this process."""
    os.environ.update(LAB_ENVIRONMENT)
