"""The peer: langgraph-checkpoint-aws writing each checkpoint to two regions. In an environment of its own (``peer_stand``).

A user who wants a second region has two savers, each with its region's table and bucket, and writes to both at the same time;
a checkpoint counts when both have it. Clients have as many pooled connections as threads. Speaks the JSON lines of ``load.py``.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

warnings.filterwarnings("ignore")

from botocore.config import Config  # noqa: E402
from langgraph_checkpoint_aws import DynamoDBSaver  # noqa: E402

from tests.benchmarks.states import Conversation  # noqa: E402


def saver(place: dict[str, str], connections: int, compression: bool) -> DynamoDBSaver:
    """One region's saver, with S3 for what is larger than 350 KB."""
    config = Config(max_pool_connections=connections, s3={"addressing_style": "path"})
    return DynamoDBSaver(
        table_name=place["table"],
        region_name=place["region"],
        endpoint_url=place["endpoint"],
        boto_config=config,
        enable_checkpoint_compression=compression,
        s3_offload_config={"bucket_name": place["bucket"], "endpoint_url": place["endpoint"]},
    )


class Peer:
    """Agents as threads; each writes its next state when both regions have the last one."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        threads = int(job["threads"])
        self.savers = [saver(place, 2 * threads, bool(job.get("compression"))) for place in job["places"]]
        self.second = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="second-region")
        self.lock = threading.Lock()
        self.acknowledged = 0
        self.latencies: list[float] = []
        self.failed: dict[str, int] = {}
        self.stop = threading.Event()
        self.turns: queue.SimpleQueue[tuple[str, Any, Any]] = queue.SimpleQueue()
        for number in range(int(job["first"]), int(job["first"]) + int(job["agents"])):
            name = f"agent-{number:06d}"
            self.turns.put(
                (name, iter(Conversation(name, int(job["size"]))), {"configurable": {"thread_id": name, "checkpoint_ns": ""}})
            )
        for place in job["places"]:  # what is loaded once must not count
            assert place["endpoint"].startswith("http://127.")
        self.threads = [threading.Thread(target=self.work, daemon=True) for _ in range(threads)]

    def work(self) -> None:
        """Takes the agent that has waited longest, so that more agents than threads are all served."""
        while not self.stop.is_set():
            name, talk, config = self.turns.get()
            config = self.put(next(talk), config)
            self.turns.put((name, talk, config))

    def put(self, checkpoint: dict[str, Any], config: Any) -> Any:
        began = time.monotonic()
        metadata = {"source": "loop", "step": 1, "parents": {}}
        versions = checkpoint["channel_versions"]
        try:
            others = [self.second.submit(other.put, config, checkpoint, metadata, versions) for other in self.savers[1:]]
            result = self.savers[0].put(config, checkpoint, metadata, versions)
            for other in others:
                other.result()
        except Exception as error:  # noqa: BLE001 - counted and shown
            with self.lock:
                key = f"{type(error).__name__}: {error}"[:120]
                self.failed[key] = self.failed.get(key, 0) + 1
            return config
        with self.lock:
            self.acknowledged += 1
            self.latencies.append(time.monotonic() - began)
        return result

    def report(self) -> dict[str, Any]:
        return {"at": time.monotonic(), "acknowledged": self.acknowledged}


def _say(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def main() -> None:
    peer = Peer(json.loads(sys.stdin.readline()))
    if peer.job.get("read"):
        _say({"ready": True})
        sys.stdin.readline()
        _say(read(peer, int(peer.job["read"])))
        return
    _say({"ready": True})
    sys.stdin.readline()
    cpu = time.process_time()
    if peer.job.get("count"):
        exactly(peer, int(peer.job["count"]))
        _say({"done": True, **peer.report(), "failed": peer.failed})
        return
    for thread in peer.threads:
        thread.start()
    for line in sys.stdin:
        if line.strip() == "report":
            _say(peer.report())
        elif line.strip() == "clear":
            peer.latencies.clear()
        elif line.strip() == "stop":
            break
    peer.stop.set()
    _say({
        **peer.report(), "failed": peer.failed, "latencies": [round(v, 6) for v in peer.latencies],
        "cpu_seconds": time.process_time() - cpu,
    })  # fmt: skip
    sys.stdout.flush()
    os._exit(0)


def exactly(peer: Peer, count: int) -> None:
    """So many checkpoints of every agent, one agent after the other: for counting bytes and requests."""
    while not peer.turns.empty():
        _, talk, config = peer.turns.get()
        for _ in range(count):
            config = peer.put(next(talk), config)


def read(peer: Peer, count: int) -> dict[str, Any]:
    """Writes one checkpoint of every agent, then reads their latest, ``count`` times in all."""
    configs = []
    while not peer.turns.empty():
        name, talk, config = peer.turns.get()
        peer.put(next(talk), config)
        configs.append({"configurable": {"thread_id": name, "checkpoint_ns": ""}})
    taken = []
    for number in range(count):
        began = time.monotonic()
        found = peer.savers[0].get_tuple(configs[number % len(configs)])
        taken.append(time.monotonic() - began)
        assert found is not None
    return {"latencies": taken, "failed": peer.failed}


if __name__ == "__main__":
    main()
