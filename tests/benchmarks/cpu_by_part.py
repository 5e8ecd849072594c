"""CPU of the holder per record, by part: one real controller behind real HTTP, three region stores, load from another process.

    python tests/benchmarks/cpu_by_part.py [--store ministack|memory] [--sizes 2000 80000] [--batches 1 10 100] [--large]

Each line is measured twice. The first run, without a profiler, gives the microseconds of CPU of the holder's whole process
per record (all threads, system calls included). The second, under cProfile, gives the *shares*: the time of each function goes
to the part that its file belongs to, that of a builtin or a library to whoever called it. Shares times the first run is the
table, because a profiler makes small functions look dearer than they are. Compare lines of one run only.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import multiprocessing
import os
import pstats
import random
import socket
import tempfile
import threading
import time
from collections import defaultdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

REGIONS = ("eu-west-1", "eu-central-1", "us-east-1")
GROUP = "cpu"
PARTS = (
    ("AWS client", ("aiobotocore", "botocore", "aiohttp", "adapters/region_store", "adapters/aws_", "adapters/head_", "stamina",
                    "yarl", "multidict", "urllib3", "adapters/memory")),
    ("HTTP", ("uvicorn", "fastapi", "starlette", "pydantic", "runtime/api", "anyio", "json/", "typing")),
    ("frame decode", ("stream/segment", "stream/limits")),
    ("delta, hash", ("stream/delta",)),
    ("view, index", ("stream/view", "stream/records", "stream/indexing", "stream/tables")),
    ("admission, acks", ("stream/", "domain/", "runtime/active", "runtime/intake", "runtime/fleet", "runtime/controller")),
    ("event loop", ("asyncio", "uvloop", "selectors", "contextvars")),
    ("other controller", ("controller/",)),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- the holder


async def _holder(stores: dict[str, str] | None, folder: Path, pipe: Connection) -> None:
    """A controller that holds, until the pipe says stop. ``stores``: region → endpoint, None: in memory."""
    import uvicorn

    from controller.adapters.clock import SystemClock
    from controller.adapters.identity import SshIdentity
    from controller.adapters.memory.coordinator import MemoryCluster, MemoryCoordinator
    from controller.adapters.memory.gate import OpenGate
    from controller.adapters.memory.pager import MemoryPager
    from controller.adapters.memory.region_store import MemoryRegionStore, MemoryStore
    from controller.adapters.memory.traffic import MemoryResolver, MemoryTraffic, MemoryZone
    from controller.adapters.region_store import AwsRegionStore
    from controller.domain.approval import NAMESPACE
    from controller.runtime.api import create_app
    from controller.runtime.bootstrap import bootstrap_group
    from controller.runtime.controller import Controller, Ports
    from controller.settings import Settings

    clock = SystemClock()
    cluster = MemoryCluster(clock)
    zone = MemoryZone("agents.dr.example.", clock=clock)
    zone.provision({r: [f"127.0.{n}.1"] for n, r in enumerate(REGIONS, 1)}, {r: 100 * (r == REGIONS[0]) for r in REGIONS})
    await bootstrap_group(
        MemoryCoordinator(cluster), clock, prefix="/dr", group=GROUP, region=REGIONS[0], stores=REGIONS, actor="bench"
    )
    opened: dict[str, Any] = {}
    for region in REGIONS:
        if stores is None:
            opened[region] = MemoryRegionStore(MemoryStore(region), OpenGate(), call_timeout_seconds=None)
        else:
            opened[region] = AwsRegionStore(
                region, group=GROUP, bucket=f"dr-{region}", table=f"dr-{region}", aws_region=region, s3_endpoint=stores[region],
                dynamodb_endpoint=stores[region], call_timeout_seconds=5.0, connect_timeout_seconds=1.0,
                max_pool_connections=64,
            )  # fmt: skip
            await opened[region].start()
    ports = Ports(
        coordinator=MemoryCoordinator(cluster), stores=opened, traffic=MemoryTraffic(zone, REGIONS, OpenGate()),
        resolver=MemoryResolver(zone), identity=SshIdentity(folder / "allowed_signers", NAMESPACE, clock.wall),
        pager=MemoryPager(), clock=clock, new_id=lambda: "plan",
    )  # fmt: skip
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    port = listening.getsockname()[1]
    settings = Settings.model_validate({
        "group": GROUP, "environment": "lab", "region": REGIONS[0], "instance": "a", "state_dir": folder,
        "etcd": {"endpoints": ["http://127.0.0.1:2379"]},
        "regions": {
            r: {"bucket": f"dr-{r}", "table": f"dr-{r}", "addresses": [f"127.0.{n}.1"],
                "controllers": [f"http://127.0.0.1:{port + n - 1}"]}
            for n, r in enumerate(REGIONS, 1)
        },
        "traffic": {"zone_id": "Z1CPU", "name": "agents.dr.example."}, "dns": {"servers": ["127.0.0.31:5353"]},
        "approvals": {"allowed_signers": folder / "allowed_signers"}, "api": {"address": f"http://127.0.0.1:{port}"},
    })  # fmt: skip
    controller = Controller(settings, ports, folder / "view.sqlite", None)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(controller, clock=clock), log_level="critical", access_log=False, loop="none", http="httptools",
            lifespan="off",
        )
    )  # fmt: skip
    tasks = [asyncio.create_task(controller.run()), asyncio.create_task(server.serve(sockets=[listening]))]
    while not controller.may_act() or not controller._lead or not controller._lead.serving:  # noqa: ASYNC110 - theirs
        await asyncio.sleep(0.05)
    pipe.send(port)
    await _obey(pipe)
    server.should_exit = True
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for store in opened.values():
        await store.close()


async def _obey(pipe: Connection) -> None:
    """``start`` and ``stop`` bracket a measurement; ``profile`` switches the profiler on for the next one; ``end``."""
    profiler: cProfile.Profile | None = None
    began = 0.0
    stall = _Stall()
    loop = asyncio.get_running_loop()
    while True:
        word = await loop.run_in_executor(None, pipe.recv)
        if word == "end":
            return
        if word in {"start", "profile"}:
            profiler = cProfile.Profile() if word == "profile" else None
            stall.worst_seconds = 0.0
            began = time.process_time()
            if profiler is not None:
                profiler.enable()
            pipe.send("ok")
        if word == "stop":
            if profiler is not None:
                profiler.disable()
            pipe.send((time.process_time() - began, _parts(profiler) if profiler else {}, stall.worst_seconds))


class _Stall:
    """How long the event loop did not come round, at worst."""

    def __init__(self) -> None:
        self.worst_seconds = 0.0
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            at = time.monotonic()
            await asyncio.sleep(0.005)
            self.worst_seconds = max(self.worst_seconds, time.monotonic() - at - 0.005)


def _part_of(file: str) -> str | None:
    return next((part for part, names in PARTS if any(name in file for name in names)), None)


def _parts(profiler: cProfile.Profile) -> dict[str, float]:
    """Seconds by part: a function's own time goes to its file's part, a library's and a builtin's to its callers' parts."""
    stats: Any = pstats.Stats(profiler)
    known: dict[Any, dict[str, float]] = {}

    def shares(function: Any, path: tuple[Any, ...]) -> dict[str, float]:
        part = _part_of(function[0])
        if part is not None:
            return {part: 1.0}
        if function in known:
            return known[function]
        callers = stats.stats[function][4] if function in stats.stats else {}
        found: dict[str, float] = defaultdict(float)
        total = sum(row[2] for row in callers.values()) or 1.0
        for caller, row in callers.items():
            if caller in path:
                continue
            for name, share in shares(caller, (*path, caller)).items():
                found[name] += share * row[2] / total
        if not found:
            found["event loop"] = 1.0
        known[function] = dict(found)
        return known[function]

    parts: dict[str, float] = defaultdict(float)
    for function, (_, _, own, _, _) in stats.stats.items():
        if "select" in function[2] or "recv" in function[2] or "acquire" in function[2]:
            continue  # waiting
        for name, share in shares(function, (function,)).items():
            parts[name] += own * share
    dump = os.environ.get("DR_PROFILE_DUMP")
    if dump:
        stats.dump_stats(dump)
    return dict(parts)


def _serve(stores: dict[str, str] | None, folder: str, pipe: Connection) -> None:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_holder(stores, Path(folder), pipe))


# --------------------------------------------------------------------------------------------------------------- the load


class Agents:
    """Conversations that grow by about 2 % a step, as deltas in chains of 16, encoded before the clock runs."""

    def __init__(self, size: int, count: int) -> None:
        self._random = random.Random(size)
        self._words = [self._random.randbytes(6).hex() for _ in range(3000)]
        self._size = size
        self._states: list[tuple[str, bytes, int]] = [("", b"", 0)] * count
        self._number = 0

    def _text(self, size: int) -> bytes:
        words = self._random.choices(self._words, k=size // 10 + 1)
        return " ".join(words).encode()[:size]

    def frame(self, agent: int) -> Any:
        from controller.stream.delta import frame

        record, body, depth = self._states[agent]
        body = (body + self._text(max(40, self._size // 50))) if body else self._text(self._size)
        if len(body) > self._size * 3 // 2:
            body = body[len(body) // 3 :]
        self._number += 1
        made = frame(
            f"agent-{agent:05}", f"r{self._number:08}", "checkpoint", body, parent=record or None, created_at=time.time(),
            previous=(record, self._states[agent][1]) if record and depth < 16 else None,
        )  # fmt: skip
        self._states[agent] = (made.record.id, body, depth + 1 if made.base else 0)
        return made


async def _post(port: int, batches: list[bytes], counts: list[int], done: list[int], waits: list[float]) -> None:
    """Sends one batch after the other on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for data, count in zip(batches, counts, strict=True):
        at = time.monotonic()
        fixed = "POST /v1/records HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\n"
        head = f"{fixed}Content-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        status = await reader.readline()
        length = 0
        while (line := await reader.readline()) != b"\r\n":
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        answer = json.loads(await reader.readexactly(length))
        if b" 200 " not in status or any(ack["status"] != "acknowledged" for ack in answer["acks"]):
            raise AssertionError(f"{status!r} {json.dumps(answer)[:500]}")
        done[0] += count
        waits.append(time.monotonic() - at)
    writer.close()


def _large(count: int) -> Lanes:
    """One connection's requests of one incompressible body of 64 MiB each."""
    from controller.stream.delta import frame
    from controller.stream.segment import encode_frames

    body = random.Random(64).randbytes(64 * 2**20)
    data = [encode_frames([frame(f"large-{n}", f"r{time.time_ns()}", "checkpoint", body)]) for n in range(count)]
    return [(data, [1] * count)]


Lanes = list[tuple[list[bytes], list[int]]]


def _encode(agents: Agents, batch: int, connections: int, records: int) -> Lanes:
    """Requests of about ``records`` records: for each connection its bodies and how many records each holds."""
    from controller.stream.segment import encode_frames

    lanes: Lanes = []
    each = max(1, records // connections // batch)
    width = len(agents._states) // connections
    for lane in range(connections):
        data, counts = [], []
        for number in range(each):
            frames = [agents.frame(lane * width + (number * batch + n) % width) for n in range(batch)]
            data.append(encode_frames(frames))
            counts.append(len(frames))
        lanes.append((data, counts))
    return lanes


def _send(port: int, lanes: Lanes, large: Lanes = []) -> tuple[int, list[float], float]:  # noqa: B006 - only read
    """How many records were acknowledged, how long each request waited, and the seconds that all took. ``large``: requests that
    are sent beside them and not counted."""
    done, waits = [0], list[float]()

    async def run() -> float:
        at = time.monotonic()
        beside = [asyncio.create_task(_post(port, data, counts, [0], [])) for data, counts in large]
        await asyncio.gather(*(_post(port, data, counts, done, waits) for data, counts in lanes))
        seconds = time.monotonic() - at
        await asyncio.gather(*beside)
        return seconds

    seconds = asyncio.run(run())
    return done[0], waits, seconds


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--store", choices=("ministack", "memory"), default="ministack")
    options.add_argument("--sizes", type=int, nargs="+", default=[2000, 80000])
    options.add_argument("--batches", type=int, nargs="+", default=[1, 10, 100])
    options.add_argument("--agents", type=int, default=512)
    options.add_argument("--connections", type=int, default=16)
    options.add_argument("--records", type=int, default=6000, help="records of one run of 2 KB; a quarter for larger ones")
    options.add_argument("--large", action="store_true", help="four bodies of 64 MiB are written beside the small ones")
    options.add_argument("--no-profile", action="store_true", help="no second run for the parts")
    options.add_argument("--json", type=Path, default=None)
    chosen = options.parse_args()
    rows = []
    print(f"{'bytes':>7} {'batch':>5} {'rec/s':>7} {'p50 ms':>7} {'p99 ms':>7} {'stall ms':>8} {'us/rec':>7}  by part")
    for size in chosen.sizes:
        for batch in chosen.batches:
            row = _measure(chosen, size, batch)
            rows.append(row)
            parts = "  ".join(f"{name} {us:.0f}" for name, us in sorted(row["parts"].items(), key=lambda item: -item[1]))
            print(
                f"{size:>7} {batch:>5} {row['rate']:>7.0f} {row['p50_ms']:>7.1f} {row['p99_ms']:>7.1f} {row['stall_ms']:>8.1f} "
                f"{row['us']:>7.0f}  {parts}",
                flush=True,
            )
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=1))


def _measure(chosen: argparse.Namespace, size: int, batch: int) -> dict[str, Any]:
    from controller.lab.aws import LAB_ENVIRONMENT, AwsStandIn, provision_region

    os.environ.update(LAB_ENVIRONMENT)
    stand_ins: list[Any] = []
    stores: dict[str, str] | None = None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "allowed_signers").write_text("")
        try:
            if chosen.store == "ministack":
                stores = {}
                for region in REGIONS:
                    server = AwsStandIn(aws_region=region)
                    server.start()
                    stand_ins.append(server)
                    provision_region(server.endpoint, aws_region=region, bucket=f"dr-{region}", table=f"dr-{region}")
                    stores[region] = server.endpoint
            ours, theirs = multiprocessing.get_context("spawn").Pipe()
            process = multiprocessing.get_context("spawn").Process(target=_serve, args=(stores, folder, theirs))
            process.start()
            port = ours.recv()
            return _both(ours, port, chosen, size, batch)
        finally:
            if "process" in locals():
                ours.send("end")
                process.join(10)
                process.kill()
            for server in stand_ins:
                server.kill()


def _both(pipe: Connection, port: int, chosen: argparse.Namespace, size: int, batch: int) -> dict[str, Any]:
    agents = Agents(size, chosen.agents)
    records = chosen.records if size <= 4000 else chosen.records // 4
    _send(port, _encode(agents, batch, chosen.connections, max(records // 4, chosen.connections * batch)))  # warm
    lanes = _encode(agents, batch, chosen.connections, records)
    pipe.send("start")
    pipe.recv()
    count, waits, seconds = _send(port, lanes, _large(4) if chosen.large else [])
    pipe.send("stop")
    cpu, _, stall = pipe.recv()
    parts: dict[str, float] = {}
    if not chosen.no_profile:
        lanes = _encode(agents, batch, chosen.connections, records)
        pipe.send("profile")
        pipe.recv()
        _send(port, lanes)
        pipe.send("stop")
        _, parts, _ = pipe.recv()
    total = sum(parts.values()) or 1.0
    us = cpu / count * 1e6
    waits.sort()
    return {
        "store": chosen.store, "bytes": size, "batch": batch, "records": count, "rate": count / seconds, "us": us,
        "p50_ms": waits[len(waits) // 2] * 1e3, "p99_ms": waits[int(len(waits) * 0.99)] * 1e3, "stall_ms": stall * 1e3,
        "parts": {name: us * spent / total for name, spent in parts.items()},
    }  # fmt: skip


if __name__ == "__main__":
    threading.current_thread().name = "load"
    main()
