"""One agent host of the lab: it beats, runs the agents that it is given, and keeps a ledger of what was acknowledged.

``python -m controller.lab.agents --host h1 --controllers http://127.0.1.1:8080,http://127.0.1.2:8080 --ledger h1.jsonl``

Every acknowledged checkpoint is written to the ledger *after* its acknowledgement, with its hash, so that a demonstration can
compare the ledgers of all hosts with what a new region resumed from: the real loss, found without asking the controllers.

An agent begins only from the record that its assignment names (hash checked), works under a ``Hold`` of the present right, and
is cancelled in the moment in which the right passes. It never works under an attempt that its host is not assigned now.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import hashlib
import json
import os
import random
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from controller.agent import AsyncCheckpoints, BootClock, Clock, Fenced, Hold
from controller.domain.model import Assignment, Beat, Kind, Running
from controller.errors import DrError, Unavailable
from controller.lab import work

PR_SET_PDEATHSIG = 1
RETRY_SECONDS = 1.0


class Ledger:
    """JSON lines, flushed each: what this host knows to be acknowledged, refused, resumed."""

    def __init__(self, path: Path | None, host: str, clock: Clock) -> None:
        self._host = host
        self._clock = clock
        self._file: TextIO | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")

    def note(self, event: str, agent: str, **fields: object) -> None:
        if self._file is not None:
            line = {"event": event, "host": self._host, "agent": agent, "at": self._clock.wall(), **fields}
            self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@dataclass(slots=True)
class Run:
    """One agent under one attempt."""

    assignment: Assignment
    hold: Hold
    task: asyncio.Task[None]
    step: int = 0


class AgentHost:
    """Runs assigned agents. ``client`` carries the right that all of them act under."""

    def __init__(
        self,
        host: str,
        client: AsyncCheckpoints,
        corpus: work.Corpus,
        ledger: Ledger,
        *,
        capacity: int = 100,
        step_seconds: float = 1.0,
        beat_seconds: float = 1.0,
        put_seconds: float = 15.0,
        state_file: Path | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._host = host
        self._client = client
        self._corpus = corpus
        self._ledger = ledger
        self._capacity = capacity
        self._step_seconds = step_seconds
        self._beat_seconds = beat_seconds
        self._put_seconds = put_seconds
        self._state_file = state_file
        self._clock: Clock = clock or BootClock()
        self._random = rng or random.Random()
        self._runs: dict[str, Run] = {}
        self._held: dict[str, int] = {}
        self._active = False
        self._stopping = False

    async def serve(self) -> None:
        """Until cancelled. What runs is stopped, and the controllers are told."""
        watch = asyncio.get_running_loop().create_task(self._watch_right())
        try:
            while True:
                await self.beat()
                await self._clock.sleep(self._beat_seconds * self._random.uniform(0.9, 1.1))
        finally:
            watch.cancel()
            self._stopping = True
            await self._stop_all("the host stops")
            with contextlib.suppress(DrError):
                await self._client.beat(Beat(self._host, 0), timeout_seconds=1.0)

    async def beat(self) -> None:
        """One heartbeat, and what its answer asks for. No answer is no reason to stop: the right ends by itself."""
        running = tuple(
            Running(name, run.assignment.attempt) for name, run in sorted(self._runs.items()) if not run.hold.over()
        )
        try:
            answer = await self._client.beat(
                Beat(self._host, self._capacity, running), timeout_seconds=max(2.0, self._beat_seconds)
            )
        except DrError as error:
            self._active = False
            self._write_state(str(error))
            return
        self._active = answer.active
        if answer.active:
            await self._apply(answer.assignments)
        self._write_state("")

    async def _apply(self, assignments: Sequence[Assignment]) -> None:
        wanted = {item.agent: item for item in assignments}
        for name, run in list(self._runs.items()):
            new = wanted.get(name)
            if new is None or new.attempt != run.assignment.attempt:
                await self._stop(name, "the assignment was withdrawn")
            elif run.hold.over():
                await self._stop(name, "the right had passed")
        for name, item in wanted.items():
            if item.held:
                if self._held.get(name) != item.attempt:
                    self._held[name] = item.attempt
                    self._ledger.note("held", name, attempt=item.attempt, id=item.resume_id)
            elif name not in self._runs:
                self._held.pop(name, None)
                self._begin(item)
        for name in set(self._held) - set(wanted):
            del self._held[name]

    def _begin(self, assignment: Assignment) -> None:
        try:
            hold = self._client.right.hold()
        except Fenced:
            return
        task = asyncio.get_running_loop().create_task(self._live(assignment, hold), name=assignment.agent)
        self._runs[assignment.agent] = Run(assignment, hold, task)

    async def _stop(self, name: str, why: str) -> None:
        run = self._runs.pop(name, None)
        if run is not None:
            run.hold.revoke(why)
            run.task.cancel()
            await asyncio.gather(run.task, return_exceptions=True)
            self._ledger.note("stopped", name, why=why, step=run.step, attempt=run.assignment.attempt)

    async def _stop_all(self, why: str) -> None:
        for name in list(self._runs):
            await self._stop(name, why)

    async def _watch_right(self) -> None:
        """Stops everything in the moment in which the right passes, also in the middle of a step."""
        while True:
            left = self._client.right.remaining()
            if left > 0:
                await self._clock.sleep(min(left, 0.5))
                continue
            if self._runs:
                await self._stop_all("the right to act has passed")
            await self._clock.sleep(0.05)

    # ------------------------------------------------------------------------------------------------------- an agent

    async def _live(self, assignment: Assignment, hold: Hold) -> None:
        name = assignment.agent
        try:
            state = await self._resume(assignment)
            await self._clock.sleep(self._random.uniform(0.0, self._step_seconds))
            await self._work(assignment, hold, state)
        except Fenced as error:
            self._ledger.note("fenced", name, attempt=assignment.attempt, why=error.message)
        except DrError as error:
            self._ledger.note("failed", name, attempt=assignment.attempt, code=error.code, why=error.message)
            await self._clock.sleep(RETRY_SECONDS)  # begins again with a later beat, from what the stream has
        finally:
            run = self._runs.get(name)
            if run is not None and run.hold is hold and not self._stopping:
                del self._runs[name]

    async def _resume(self, assignment: Assignment) -> work.State:
        """The state of exactly the record that the assignment names; its hash was checked by the client."""
        name = assignment.agent
        if assignment.resume_id is None:
            self._ledger.note("begin", name, attempt=assignment.attempt)
            return work.begin(name, assignment.spec)
        record, body = await self._client.get(name, assignment.resume_id, timeout_seconds=self._put_seconds)
        state = work.decode(body, name)
        self._ledger.note(
            "resume",
            name,
            id=record.id,
            step=state["step"],
            sha256=hashlib.sha256(body).hexdigest(),
            attempt=assignment.attempt,
            epoch=self._client.epoch,
        )
        return state

    async def _work(self, assignment: Assignment, hold: Hold, state: work.State) -> None:
        name, spec = assignment.agent, assignment.spec
        copies = _number(spec, "copies", 1)
        last = _number(spec, "steps", 0)
        parent = assignment.resume_id
        while True:
            hold.check()
            state = work.step(state, self._corpus)
            body = work.encode(state)
            record_id = f"{state['step']:08d}"
            await self._put(assignment, hold, record_id, body, parent=parent, copies=copies)
            run = self._runs.get(name)
            if run is not None:
                run.step = state["step"]
            parent = record_id
            if last and state["step"] >= last:
                done = json.dumps({**spec, "done": True}, sort_keys=True).encode()
                task_id = f"task-done-{assignment.attempt}-{record_id}"
                await self._put(assignment, hold, task_id, done, kind=Kind.TASK, parent=None, copies=copies)
                self._ledger.note("finished", name, step=state["step"], attempt=assignment.attempt)
                return
            await self._clock.sleep(self._step_seconds * self._random.uniform(0.8, 1.2))

    async def _put(
        self,
        assignment: Assignment,
        hold: Hold,
        record_id: str,
        body: bytes,
        *,
        parent: str | None,
        copies: int,
        kind: str = Kind.CHECKPOINT,
    ) -> None:
        """Until it is acknowledged or the right is over. A put that is not acknowledged is noted and tried again: same id, same
        body. Raises Fenced, Conflict and whatever else is final."""
        while True:
            hold.check()
            try:
                ack = await self._client.put(
                    assignment.agent,
                    record_id,
                    body,
                    kind=kind,
                    parent=parent,
                    copies=copies,
                    attempt=assignment.attempt,
                    timeout_seconds=self._put_seconds,
                )
            except Unavailable as error:
                self._ledger.note("unacknowledged", assignment.agent, id=record_id, code=error.code, copies=copies)
                await self._clock.sleep(self._random.uniform(0.0, RETRY_SECONDS))
                continue
            self._ledger.note(
                "ack",
                assignment.agent,
                id=record_id,
                kind=kind,
                step=int(record_id) if kind == Kind.CHECKPOINT else None,
                copies=copies,
                stores=ack.copies,
                sha256=hashlib.sha256(body).hexdigest(),
                acked_at=self._clock.wall(),
                epoch=self._client.epoch,
                attempt=assignment.attempt,
                status=ack.status,
            )
            return

    def _write_state(self, problem: str) -> None:
        """What a person, or the lab, may look at. Written beside and renamed, so that it is never half."""
        if self._state_file is None:
            return
        document: dict[str, Any] = {
            "host": self._host,
            "at": self._clock.wall(),
            "active": self._active,
            "epoch": self._client.epoch,
            "right_seconds": round(self._client.right.remaining(), 3),
            "agents": {name: {"attempt": run.assignment.attempt, "step": run.step} for name, run in sorted(self._runs.items())},
            "held": sorted(self._held),
            "problem": problem,
        }
        partial = self._state_file.with_suffix(".partial")
        partial.write_text(json.dumps(document))
        partial.replace(self._state_file)


def _number(spec: Mapping[str, object], name: str, default: int) -> int:
    value = spec.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default


# ---------------------------------------------------------------------------------------------------------------- process


def die_with_parent() -> None:
    """The kernel kills this process when its parent dies, so that no orphan works on. Linux only; elsewhere nothing happens."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="controller.lab.agents", description="One agent host of the lab.")
    parser.add_argument("--host", required=True, help="name of this host, unique in its region")
    parser.add_argument("--controllers", required=True, help="URLs of the region's controllers, separated by commas")
    parser.add_argument(
        "--corpus", type=Path, default=None, help="directory of text files; default: Python's own documentation"
    )
    parser.add_argument("--capacity", type=int, default=100, help="agents that this host takes")
    parser.add_argument("--ledger", type=Path, default=None, help="JSON-lines file of everything that was acknowledged")
    parser.add_argument("--state-file", type=Path, default=None, help="JSON file that says what runs now")
    parser.add_argument("--step-seconds", type=float, default=1.0, help="mean pause between steps of one agent")
    parser.add_argument("--beat-seconds", type=float, default=1.0, help="pause between heartbeats")
    return parser.parse_args(argv)


async def run(options: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT."""
    clock = BootClock()
    ledger = Ledger(options.ledger, options.host, clock)
    corpus = work.load_corpus(options.corpus)
    urls = [url for url in options.controllers.split(",") if url]
    # Hints are not followed to another region: its hosts run its agents.
    client = AsyncCheckpoints(urls, agent_host=options.host, clock=clock, follow_hints=False, attempt_seconds=12.0)
    async with client:
        host = AgentHost(
            options.host,
            client,
            corpus,
            ledger,
            capacity=options.capacity,
            step_seconds=options.step_seconds,
            beat_seconds=options.beat_seconds,
            state_file=options.state_file,
            clock=clock,
        )
        loop = asyncio.get_running_loop()
        serving = loop.create_task(host.serve())
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, serving.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await serving
    ledger.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of ``controller.errors``."""
    options = arguments(argv)
    die_with_parent()
    try:
        asyncio.run(run(options))
    except DrError as error:
        print(json.dumps({"error": error.to_dict()}), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
