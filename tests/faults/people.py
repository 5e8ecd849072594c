"""The people of a group under test: they plan, sign with real keys, give the order, and wait for its end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import httpx

from controller.adapters.etcd import EtcdCoordinator
from controller.adapters.identity import sign
from controller.domain.approval import NAMESPACE, statement
from controller.domain.model import Authority, Holder
from controller.domain.promotion import PlanRecord, State
from controller.errors import DrError, Unavailable
from controller.lab.parts import APPROVERS, REQUESTER
from controller.lab.supervisor import Lab
from controller.runtime.documents import Keys, read, read_all

ORDER = tuple(State)
"""States in the order in which a promotion passes them."""


class GaveUp(Exception):
    """Something did not happen within its time."""


class People:
    """They stand in the world outside of the regions, and ask whoever answers."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.keys = Keys(str(lab.topology.document["etcd"].get("prefix", "/dr")), lab.topology.group)
        self.coordinator = EtcdCoordinator(lab.etcd_endpoints, call_timeout_seconds=1.0)
        self.http = httpx.AsyncClient(timeout=httpx.Timeout(5.0, connect=1.0), trust_env=False)

    async def close(self) -> None:
        await self.http.aclose()
        await self.coordinator.close()

    def urls(self, region: str | None = None) -> list[str]:
        """Controllers of a region, or all."""
        return [place.api.url for place in self.lab.topology.controllers if region in (None, place.region)]

    async def ask(self, method: str, path: str, region: str, seconds: float = 60.0, **more: Any) -> Any:
        """The first good answer of a region's controllers, which may be busy or restarting. Raises GaveUp with the last
        refusal."""
        until, last = time.monotonic() + seconds, "nobody answered"
        while time.monotonic() < until:
            for url in self.urls(region):
                try:
                    answer = await self.http.request(method, f"{url}{path}", **more)
                except httpx.HTTPError:
                    continue
                if answer.is_success:
                    return answer.json()
                last = answer.text
            await asyncio.sleep(0.3)
        raise GaveUp(f"{method} {path} in {region}: {last[:500]}")

    async def active(self) -> list[tuple[str, str]]:
        """(region, URL) of controllers that say now that they may act."""

        async def asked(region: str, url: str) -> tuple[str, str] | None:
            with contextlib.suppress(httpx.HTTPError):
                if (await self.http.get(f"{url}/active", timeout=1.0)).status_code == 200:
                    return region, url
            return None

        found = await asyncio.gather(*(asked(place.region, place.api.url) for place in self.lab.topology.controllers))
        return [one for one in found if one is not None]

    async def home(self) -> str:
        """The region in authority. Raises Unavailable."""
        found = await read(self.coordinator, self.keys.authority, Authority)
        if found is None:
            raise Unavailable("no authority", hint="found the group")
        return found.value.region

    async def holder(self) -> Holder | None:
        """Who holds the lease, by etcd. Raises Unavailable."""
        found = await read_all(self.coordinator, self.keys.holders, Holder)
        return found[0].value if found else None

    async def order(self, kind: str, target: str, seconds: float = 60.0) -> str:
        """Plans when every check passes, gets two signatures, asks for it to run. Returns the plan's id. Raises GaveUp."""
        body = {"kind": kind, "to": target, "requester": REQUESTER, "reason": "a fault", "break_glass": False}
        document = await self.ask("POST", "/v1/plans", target, seconds, json=body)
        plan, digest = str(document["record"]["plan"]["id"]), document["record"]["digest"]
        await self.approve(plan, digest, target)
        await self.ask("POST", f"/v1/plans/{plan}/execute", target, 20.0, json={"requester": REQUESTER, "confirm": target})
        return plan

    async def approve(self, plan: str, digest: str, target: str) -> None:
        """Two people sign this digest. Raises GaveUp."""
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
            await self.ask("POST", f"/v1/plans/{plan}/approvals", target, 20.0, json=signed)

    async def plan(self, plan: str) -> PlanRecord | None:
        """The plan as etcd has it; None while nobody knows."""
        with contextlib.suppress(DrError):
            found = await read(self.coordinator, self.keys.plan(plan), PlanRecord)
            return found.value if found else None
        return None

    async def reaches(self, plan: str, state: State, seconds: float = 60.0) -> PlanRecord:
        """Waits until the plan has come so far, or has ended. Raises GaveUp."""
        until, record = time.monotonic() + seconds, None
        while time.monotonic() < until:
            record = await self.plan(plan)
            if record is not None and (record.ended or ORDER.index(record.state) >= ORDER.index(state)):
                return record
            await asyncio.sleep(0.005)
        raise GaveUp(f"plan {plan} never became {state.value}: {record and (record.state.value, record.reason)}")

    async def ended(self, plan: str, seconds: float = 90.0) -> PlanRecord:
        """The plan once it has ended. A greater loss than approved is approved again, as people would. Raises GaveUp."""
        until, record, digest = time.monotonic() + seconds, None, ""
        while time.monotonic() < until:
            record = await self.plan(plan)
            if record is not None and record.ended:
                return record
            if record is not None and record.state is State.HOLDING and record.digest != digest:
                digest = record.digest
                await self.approve(plan, digest, record.plan.target)
            await asyncio.sleep(0.2)
        raise GaveUp(f"plan {plan} did not end: {record and (record.state.value, record.reason)}")
