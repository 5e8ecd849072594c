"""The controller that runs a promotion is killed (SIGKILL, real processes) at each of its steps; the plan ends the same.

One lab, one promotion after another between two regions, and a fleet at work all the time. At every state of the plan the
instance that carries it is killed as soon as that state is seen in etcd; the region's other instance has to finish it. In the
end every checkpoint that any agent was told to be safe is there: nothing is lost in planned moves, however often the one in
charge dies. (Every single *effect* as a crash point is enumerated in ``tests/simulation/test_crashes.py``.)
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import time
from pathlib import Path

import httpx
import pytest

from controller.adapters.etcd import EtcdCoordinator
from controller.adapters.identity import sign
from controller.cli.lab import read_settings
from controller.domain.approval import NAMESPACE, statement
from controller.domain.model import Authority, Holder
from controller.domain.promotion import PlanRecord, State
from controller.lab.demo_ledger import Ledgers
from controller.lab.parts import APPROVERS
from controller.lab.supervisor import Lab
from controller.lab.topology import build
from controller.runtime.documents import Keys, read, read_all

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(600)]

OFFSET = 10000 + random.Random(os.getpid() + 1).randrange(0, 9000)
HOME, OTHER = "eu-west-1", "eu-central-1"
ORDER = tuple(State)
"""States in the order in which a promotion passes them."""
KILL_AT = (
    State.QUIESCING,
    State.AUTHORIZING,
    State.FENCING,
    State.CATCHING_UP,
    State.VERIFYING,
    State.RESUMING,
    State.ROUTING,
    State.CONFIRMING,
    State.REPORTING,
)
AGENTS = 12


async def test_whoever_runs_a_promotion_may_be_killed_at_any_step(tmp_path: Path) -> None:
    topology = build(read_settings(None), tmp_path, offset=OFFSET)
    async with Lab(topology, say=lambda _: None, agents=AGENTS) as lab:
        coordinator = EtcdCoordinator(lab.etcd_endpoints, call_timeout_seconds=5.0)
        people = Operators(lab, coordinator, Keys(str(topology.document["etcd"].get("prefix", "/dr")), topology.group))
        async with httpx.AsyncClient(timeout=30) as http:
            people.http = http
            await people.employ()
            seen: list[str] = []
            source, target = HOME, OTHER
            for state in KILL_AT:
                plan = await people.order("switchover", target)
                victim, at = await people.kill_at(plan, state, target)
                seen.append(f"{state.value}: killed {victim} when it was {at.value}")
                await asyncio.sleep(0.5)
                lab.start_controller(target, victim)
                record = await people.ended(plan, target)
                assert record.state is State.DONE, (seen[-1], record.reason)
                authority = await read(coordinator, people.keys.authority, Authority)
                assert authority is not None
                assert (authority.value.region, authority.value.barrier) == (target, None)
                holders = await read_all(coordinator, people.keys.holders, Holder)
                assert [holder.value.region for holder in holders] == [target]
                assert len(await people.active()) == 1
                source, target = target, source
            await people.nothing_is_lost(source)
        await coordinator.close()
    assert len(seen) == len(KILL_AT), seen


class Operators:
    """The people of this test: they plan, approve with real keys, kill and look."""

    http: httpx.AsyncClient

    def __init__(self, lab: Lab, coordinator: EtcdCoordinator, keys: Keys) -> None:
        self.lab = lab
        self.coordinator = coordinator
        self.keys = keys

    def urls(self, region: str | None = None) -> list[str]:
        return [place.api.url for place in self.lab.topology.controllers if region in (None, place.region)]

    async def first(self, method: str, path: str, region: str, seconds: float = 60, **more: object) -> httpx.Response:
        """The first good answer of a region's controllers, which may be restarting."""
        until = time.monotonic() + seconds
        last = ""
        while time.monotonic() < until:
            for url in self.urls(region):
                with contextlib.suppress(httpx.HTTPError):
                    answer = await self.http.request(method, f"{url}{path}", **more)  # type: ignore[arg-type]
                    if answer.is_success:
                        return answer
                    last = answer.text
            await asyncio.sleep(0.1)
        raise AssertionError(f"{method} {path} in {region}: {last}")

    async def employ(self) -> None:
        """Gives the fleet its tasks and waits until all agents have checkpointed."""
        for number in range(AGENTS):
            spec = {"agent": number, "seed": number, "copies": 1 + number % 2}
            await self.first("POST", "/v1/tasks", HOME, json={"agent": f"reader-{number:04d}", "spec": spec})
        until = time.monotonic() + 120
        while len({written.agent for written in Ledgers(self.lab.hosts).acknowledged()}) < AGENTS:
            assert time.monotonic() < until, "the fleet does not work"
            await asyncio.sleep(0.2)

    async def order(self, kind: str, target: str) -> str:
        """Plans when every check passes, gets two signatures, asks for it to run."""
        body = {"kind": kind, "to": target, "requester": "carol", "reason": "crash test", "break_glass": False}
        document = (await self.first("POST", "/v1/plans", target, json=body)).json()
        plan = document["record"]["plan"]["id"]
        digest = document["record"]["digest"]
        for who in APPROVERS:
            expires_at = time.time() + 600
            message = statement(self.lab.topology.group, plan, digest, "approve", who, expires_at)
            signed = {
                "principal": who,
                "decision": "approve",
                "expires_at": expires_at,
                "digest": digest,
                "signature": sign(message, self.lab.layout.key(who), NAMESPACE),
            }
            await self.first("POST", f"/v1/plans/{plan}/approvals", target, json=signed)
        await self.first("POST", f"/v1/plans/{plan}/execute", target, json={"requester": "carol", "confirm": target})
        return str(plan)

    async def kill_at(self, plan: str, state: State, target: str) -> tuple[str, State]:
        """SIGKILLs whoever carries the plan as soon as it has reached ``state``. Returns the instance and the state seen."""
        until = time.monotonic() + 120
        while time.monotonic() < until:
            record = await read(self.coordinator, self.keys.plan(plan), PlanRecord)
            assert record is not None
            at = record.value.state
            if ORDER.index(at) >= ORDER.index(state):
                holders = await read_all(self.coordinator, self.keys.holders, Holder)
                holding = [holder.value.instance for holder in holders if holder.value.region == target]
                victim = holding[0] if holding else record.value.executor
                self.lab.kill_controller(target, victim)
                return victim, at
            await asyncio.sleep(0.002)
        raise AssertionError(f"plan {plan} never became {state.value}")

    async def ended(self, plan: str, target: str) -> PlanRecord:
        """The plan once it has ended."""
        until = time.monotonic() + 90
        while time.monotonic() < until:
            record = await read(self.coordinator, self.keys.plan(plan), PlanRecord)
            assert record is not None
            if record.value.ended:
                return record.value
            await asyncio.sleep(0.1)
        raise AssertionError(f"plan {plan} did not end: {record.value.state} {record.value.reason}")

    async def active(self) -> list[str]:
        """Controllers that say that they serve."""
        found = []
        for url in self.urls():
            with contextlib.suppress(httpx.HTTPError):
                if (await self.http.get(f"{url}/active")).status_code == 200:
                    found.append(url)
        return found

    async def nothing_is_lost(self, region: str) -> None:
        """Every acknowledgement in every ledger is in the live history, with the same content."""
        written = Ledgers(self.lab.hosts).acknowledged()
        assert len(written) > AGENTS * len(KILL_AT)
        for entry in written:
            answer = await self.first("GET", f"/v1/agents/{entry.agent}/records/{entry.id}", region, seconds=20)
            assert hashlib.sha256(answer.content).hexdigest() == entry.sha256, entry
