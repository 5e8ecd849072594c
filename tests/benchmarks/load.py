"""One process of agents that write checkpoints through the real client. JSON lines: a job in, "ready", "go", a result.

Jobs: ``put`` (each agent puts its next state when the last is acknowledged; the client shares requests between agents),
``offer`` (the same at a fixed rate in all, whatever the answers take: for latencies), ``batch`` (frames made beforehand, one
request with one record of each agent: the controller without the agents' work).
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import random
import resource
import sys
import time
from http import HTTPStatus
from typing import Any

import httpx
import msgspec
import uvloop

from controller.agent import AsyncCheckpoints
from controller.agent.memory import chain_limit
from controller.domain.model import Frame, Kind
from controller.stream.delta import frame
from controller.stream.segment import encode_frames
from tests.benchmarks.states import Conversation

PACK = msgspec.msgpack.Encoder()


class Agents:
    """The writers of one process and what they counted."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.size = int(job["size"])
        self.copies = int(job.get("copies", 1))
        self.names = [
            f"{job.get('prefix', 'agent')}-{number:06d}" for number in range(job["first"], job["first"] + job["agents"])
        ]
        self.acknowledged = 0
        self.bytes = 0
        self.failed: dict[str, int] = {}
        self.latencies: list[float] = []
        self.late = 0
        self.stop = asyncio.Event()

    def fail(self, error: BaseException) -> None:
        key = f"{type(error).__name__}: {error}"[:120]
        self.failed[key] = self.failed.get(key, 0) + 1

    def report(self) -> dict[str, Any]:
        return {"at": time.monotonic(), "acknowledged": self.acknowledged, "bytes": self.bytes}

    async def put_loop(self, client: AsyncCheckpoints, name: str) -> None:
        conversation = Conversation(name, self.size)
        run, steps = f"{self.job.get('run', 'r')}-", self.job.get("steps")
        for number, state in enumerate(conversation):
            if self.stop.is_set() or number == steps:
                return
            await self.put(client, name, f"{run}{number}", state)

    async def put(self, client: AsyncCheckpoints, name: str, record: str, state: dict[str, Any]) -> None:
        began = time.monotonic()
        body = PACK.encode(state)
        try:
            await client.put(name, record, body, copies=self.copies)
        except Exception as error:  # noqa: BLE001 - counted and shown
            self.fail(error)
            await asyncio.sleep(0.1)
            return
        self.latencies.append(time.monotonic() - began)
        self.acknowledged += 1
        self.bytes += len(body)

    async def offer(self, client: AsyncCheckpoints) -> None:
        """Open loop: arrivals are random (exponential) and do not wait for answers; latencies count from the arrival."""
        rate, rng = float(self.job["rate"]), random.Random("arrivals")
        talks = [iter(Conversation(name, self.size)) for name in self.names]
        counts = [itertools.count() for _ in talks]
        running: set[asyncio.Task[None]] = set()
        due = time.monotonic()
        while not self.stop.is_set():
            due += rng.expovariate(rate)
            pause = due - time.monotonic()
            if pause > 0:
                await asyncio.sleep(pause)
            elif pause < -0.05:
                self.late += 1
            who = rng.randrange(len(talks))
            record = f"{self.job.get('run', 'r')}-{next(counts[who])}"
            task = asyncio.create_task(self.put(client, self.names[who], record, next(talks[who])))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)

    def batches(self) -> list[tuple[bytes, int, int]]:
        """Requests, in order, with their records and bytes of state: for each step the next record of each agent, as the client
        would encode it, so many agents (``batch``) in a request. ``skip``: first steps that are in the stream already."""
        talks = [iter(Conversation(name, self.size)) for name in self.names]
        previous: list[tuple[str, bytes] | None] = [None] * len(talks)
        chain = chain_limit(self.size)
        width, skip = int(self.job.get("batch", len(talks))), int(self.job.get("skip", 0))
        made = []
        for step in range(int(self.job["steps"])):
            for low in range(0, len(talks), width):
                frames: list[Frame] = []
                for who in range(low, min(low + width, len(talks))):
                    body, record = PACK.encode(next(talks[who])), f"{self.job.get('run', 'r')}-{step}"
                    base = previous[who] if step % (chain + 1) else None
                    previous[who] = (record, body)
                    if step >= skip:
                        one = frame(self.names[who], record, Kind.CHECKPOINT, body, previous=base, created_at=time.time())
                        frames.append(one)
                if frames:
                    made.append((encode_frames(frames), len(frames), sum(one.record.size for one in frames)))
        return made


async def _reader() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


def _say(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


async def _listen(reader: asyncio.StreamReader, agents: Agents) -> None:
    """``report``: counts so far. ``stop``: finish what is in flight."""
    while line := await reader.readline():
        if line.strip() == b"report":
            _say(agents.report())
        elif line.strip() == b"clear":
            agents.latencies.clear()
        elif line.strip() == b"stop":
            break
    agents.stop.set()


async def _post_all(agents: Agents, batches: list[tuple[bytes, int, int]]) -> None:
    """In order, one at a time: deltas stand on each other. Several processes make the concurrency."""
    url = agents.job["endpoints"][0] + "/v1/records"
    async with httpx.AsyncClient(timeout=60.0, trust_env=False) as http:
        for content, count, size in batches:
            if agents.stop.is_set():
                return
            began = time.monotonic()
            answer = await http.post(url, content=content, headers={"Content-Type": "application/octet-stream"})
            while answer.status_code in {429, 503}:  # told to slow down
                await asyncio.sleep(0.05)
                answer = await http.post(url, content=content, headers={"Content-Type": "application/octet-stream"})
            if answer.status_code != HTTPStatus.OK:
                agents.fail(RuntimeError(answer.text[:100]))
                continue
            bad = [ack for ack in answer.json()["acks"] if ack["status"] not in {"acknowledged", "duplicate"}]
            for ack in bad:
                agents.fail(RuntimeError(str(ack["error"])[:100]))
            agents.latencies.append(time.monotonic() - began)
            agents.acknowledged += count - len(bad)
            agents.bytes += size


async def main() -> None:
    reader = await _reader()
    agents = Agents(json.loads(await reader.readline()))
    mode = agents.job["mode"]
    batches = agents.batches() if mode == "batch" else []
    for name in agents.names[:1]:
        next(iter(Conversation(name, agents.size)))  # reads the corpus
    gc.collect()
    gc.freeze()
    _say({"ready": True})
    await reader.readline()
    listening = asyncio.create_task(_listen(reader, agents))
    cpu = time.process_time()
    # The memory for deltas is a setting of the client's; a host with many large states raises it, and so does this.
    async with AsyncCheckpoints(
        agents.job["endpoints"], timeout_seconds=30.0, attempt_seconds=15.0, delta_bytes=2**31
    ) as client:
        if mode == "batch":
            await _post_all(agents, batches)
            _say({"done": True, **agents.report()})
            await agents.stop.wait()
        elif mode == "offer":
            await agents.offer(client)
        else:
            await asyncio.gather(*(agents.put_loop(client, name) for name in agents.names))
            if agents.job.get("steps"):
                _say({"done": True, **agents.report()})
                await agents.stop.wait()
    listening.cancel()
    _say({
        **agents.report(), "failed": agents.failed, "late": agents.late, "latencies": [round(v, 6) for v in agents.latencies],
        "cpu_seconds": time.process_time() - cpu, "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    })  # fmt: skip


if __name__ == "__main__":
    uvloop.run(main())
