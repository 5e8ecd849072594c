"""The agents' client over real HTTP on loopback, against controllers that misbehave, and an agent host as a real process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from controller.agent import AsyncCheckpoints, Checkpoints, Fenced, Letter, StaleEpoch
from controller.domain.model import Beat
from controller.errors import NotFound, OutcomeUnknown, Unavailable
from controller.lab import work
from tests.support.agent_wire import Store, WireController


class Server:
    """One ``WireController`` behind uvicorn on a free port of 127.0.0.1."""

    def __init__(self, store: Store) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.controller = WireController(self.url, store)
        self.drop = False

        async def answer(request: Request) -> Response:
            path = request.scope["raw_path"].decode()
            query = request.scope["query_string"].decode()
            status, headers, body = await self.controller.handle(
                request.method, f"{path}?{query}" if query else path, await request.body()
            )
            if self.drop:  # promise more than is sent: the client sees a connection that breaks in the middle of an answer
                headers = {**headers, "Content-Length": str(len(body) + 10)}
            return Response(body, status, headers)

        app = Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(10)


def runs(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def pair(store: Store) -> Iterator[tuple[Server, Server]]:
    servers = Server(store), Server(store)
    yield servers
    for server in servers:
        server.stop()


async def test_puts_reads_tasks_and_beats_over_http(pair: tuple[Server, Server]) -> None:
    first, second = pair
    second.controller.active = False
    async with AsyncCheckpoints([first.url, second.url], agent_host="h") as client:
        state = b"a line of a state\n" * 500
        for n in range(5):
            state += b"%d\n" % n
            assert (await client.put("team/agent ü", f"{n}", state, copies=2)).copies == 2
        record, body = await client.get("team/agent ü", "3")
        assert (record.copies, body) == (2, state[:-2])
        found = await client.latest("team/agent ü")
        assert found is not None
        assert found[1] == state
        assert [item.id for item in await client.list("team/agent ü")] == ["4", "3", "2", "1", "0"]
        assert await client.latest("nobody") is None
        with pytest.raises(NotFound):
            await client.get("nobody", "1")
        assert (await client.create_task("team/agent ü", {"x": 1})).status == "acknowledged"
        assert (await client.beat(Beat("h", 3))).active
        assert 0 < client.right.remaining() <= 5.0


async def test_a_standby_sends_the_client_to_the_active_controller(pair: tuple[Server, Server]) -> None:
    standby, active = pair
    standby.controller.active, standby.controller.active_address = False, active.url
    async with AsyncCheckpoints([standby.url]) as client:
        for n in range(3):
            await client.put("agent", str(n), b"body")
    assert len(standby.controller.calls) == 1
    assert active.controller.batches == [1, 1, 1]


async def test_an_answer_that_breaks_off_is_retried_elsewhere(pair: tuple[Server, Server]) -> None:
    first, second = pair
    first.drop = True
    async with AsyncCheckpoints([first.url, second.url]) as client:
        assert (await client.put("agent", "1", b"body", timeout_seconds=60.0)).status == "duplicate"


async def test_a_slow_controller_makes_the_outcome_unknown_and_no_right_out_of_nothing(pair: tuple[Server, Server]) -> None:
    async def slow(_: WireController, moment: str) -> None:
        if moment == "after":
            await asyncio.sleep(1.0)

    first, _ = pair
    first.controller.fault = slow
    async with AsyncCheckpoints([first.url], attempt_seconds=0.4) as client:
        with pytest.raises(OutcomeUnknown):
            await client.put("agent", "1", b"body", timeout_seconds=0.8)
        with pytest.raises(Fenced):
            client.right.check()
        first.controller.fault = None
        assert (await client.put("agent", "1", b"body")).status == "duplicate"


async def test_a_stale_epoch_is_no_acknowledgement(pair: tuple[Server, Server]) -> None:
    old, new = pair
    new.controller.epoch = 6
    async with AsyncCheckpoints([new.url]) as client:
        await client.put("agent", "1", b"body")
    async with AsyncCheckpoints([old.url]) as client:
        client.epoch = 6
        with pytest.raises(StaleEpoch):
            await client.put("agent", "2", b"body", timeout_seconds=0.5)


async def test_a_controller_that_is_gone_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    async with AsyncCheckpoints([url]) as client:
        with pytest.raises(Unavailable) as error:
            await client.put("agent", "1", b"body", timeout_seconds=0.5)
        assert not isinstance(error.value, OutcomeUnknown)


def test_the_blocking_client_does_the_same(pair: tuple[Server, Server]) -> None:
    first, second = pair
    with Checkpoints([first.url, second.url]) as client:
        with pytest.raises(Fenced):
            client.check()
        assert client.put("agent", "1", b"body").status == "acknowledged"
        acks = client.put_many([Letter(f"a{n}", "1", "checkpoint", b"x") for n in range(10)])
        assert len(acks) == 10
        assert client.get("agent", "1")[1] == b"body"
        with client.hold():
            client.check()
        hold = client.hold()
        first.controller.right_seconds = 0.0
        hold.check()


@pytest.mark.slow
def test_an_agent_host_process_runs_a_hundred_agents_and_leaves_no_orphan(
    pair: tuple[Server, Server], store: Store, tmp_path: Path
) -> None:
    first, second = pair
    second.controller.active = False
    names = [f"reader-{n:03d}" for n in range(100)]
    first.controller.assignments = [
        {"agent": name, "attempt": 1, "spec": {"copies": 1 + (n % 10 == 0)}, "resume_id": None, "held": False}
        for n, name in enumerate(names)
    ]
    host = [sys.executable, "-m", "controller.lab.agents", "--host", "h1", "--controllers", f"{first.url},{second.url}"]
    host += ["--ledger", str(tmp_path / "h1.jsonl"), "--state-file", str(tmp_path / "h1.state"), "--step-seconds", "0.5"]
    # a parent that starts the host and is then killed: the host must die with it
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import subprocess,time; p=subprocess.Popen({host!r}); print(p.pid, flush=True); time.sleep(600)",
        ],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        deadline = time.monotonic() + 60
        while len(store.records) < 500 and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert len(store.records) >= 500
    deadline = time.monotonic() + 20
    while runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(pid)
    acks = [json.loads(line) for line in (tmp_path / "h1.jsonl").read_text().splitlines() if '"ack"' in line]
    assert {ack["agent"] for ack in acks} == set(names)
    for ack in acks:  # everything that the ledger says is in the store
        assert store.records[ack["agent"], ack["id"]][0].sha256 == ack["sha256"]
    corpus = work.load_corpus()
    state = work.begin(names[0], {})
    for record_id in store.ids(names[0]):
        state = work.step(state, corpus)
        assert store.records[names[0], record_id][1] == work.encode(state)
