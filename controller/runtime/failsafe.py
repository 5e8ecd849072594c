"""Carries one stream's right past its lease while etcd is unreachable for everybody. The rules are in ``domain.failsafe``.

Nothing here touches etcd. Leaving is automatic: a heartbeat that is complete again moves the lease's own deadline, and one
that says no ends the right at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from controller.domain import failsafe
from controller.domain.failsafe import Witness
from controller.domain.model import Head
from controller.errors import DrError
from controller.ports import Clock, Peers, RegionStore
from controller.runtime.tenure import Tenure


@dataclass(frozen=True, slots=True)
class FailsafePolicy:
    """``neighbours``: region → addresses of its controllers, without our own. ``answer_seconds``: how long one may take to
    answer; a round of questions takes no longer."""

    region: str
    neighbours: Mapping[str, Sequence[str]]
    ttl_seconds: float
    margin_seconds: float
    answer_seconds: float

    @property
    def silent_seconds(self) -> float:
        """Half of a right: so long etcd must have been silent, for us and for the others, before anything counts."""
        return (self.ttl_seconds - self.margin_seconds) / 2


class Failsafe:
    """Of one tenure. ``step`` is one bounded round."""

    def __init__(
        self, tenure: Tenure, stores: Mapping[str, RegionStore], peers: Peers, clock: Clock, policy: FailsafePolicy
    ) -> None:
        self._tenure = tenure
        self._stores = stores
        self._peers = peers
        self._clock = clock
        self._policy = policy
        self.since = 0.0
        """Wall time since which the right goes beyond the lease; 0: it does not."""
        self.problem = ""
        """Why it may not, or not any more."""

    async def step(self) -> str | None:
        """Asks stores and regions when the lease has not been proven for half of its time. Returns what changed."""
        tenure, policy = self._tenure, self._policy
        asked_at = self._clock.monotonic()
        if tenure.right.deadline - asked_at > policy.silent_seconds or not tenure.may_act():
            return self._note("")
        if self._moving():
            return self._note("a plan is taking over")
        heads, answers = await asyncio.gather(self._heads(), self._witnesses())
        fence = tenure.fence
        proven = failsafe.proof(heads, fence.epoch, fence.writer)
        if proven.newer:
            tenure.lose(f"a store knows epoch {proven.newer}, ours is {fence.epoch}")
            return None
        objection = failsafe.objection(
            answers,
            tuple(policy.neighbours),
            home=policy.region,
            stream=fence.stream,
            epoch=fence.epoch,
            silent_seconds=policy.silent_seconds,
        )
        problem = proven.problem or objection
        if problem is None and not self._moving():
            tenure.go_beyond(asked_at + policy.ttl_seconds - policy.margin_seconds)
        return self._note(problem or "")

    def _moving(self) -> bool:
        return self._tenure.barrier is not None or self._tenure.draining or self._tenure.drained

    def _note(self, problem: str) -> str | None:
        """Keeps ``since`` and ``problem`` true. Returns a sentence when one of them changed."""
        beyond = self._clock.monotonic() - self._tenure.right.deadline
        on = beyond >= 0 and self._tenure.may_act()
        was, before = bool(self.since), self.problem
        self.problem = problem
        if on and not was:
            self.since = self._clock.wall() - beyond
            return "failsafe is on: etcd is unreachable for every region; two stores must have what is acknowledged"
        if not on and was:
            self.since = 0.0
            return f"failsafe is over: {problem or 'etcd answers again'}"
        return f"failsafe would not go on: {problem}" if problem and problem != before else None

    async def _heads(self) -> dict[str, Head | None]:
        async def one(store: RegionStore) -> Head | None:
            try:
                async with asyncio.timeout(self._policy.answer_seconds):
                    return await store.read_head(self._tenure.fence.stream)
            except (TimeoutError, DrError):
                return None

        found = await asyncio.gather(*(one(store) for store in self._stores.values()))
        return dict(zip(self._stores, found, strict=True))

    async def _witnesses(self) -> dict[str, list[Witness]]:
        async def one(region: str, address: str) -> tuple[str, Witness | None]:
            try:
                async with asyncio.timeout(self._policy.answer_seconds):
                    witness = await self._peers.witness(address)
            except (TimeoutError, DrError):
                return region, None
            return region, witness if witness.region == region else None

        asked = [one(region, address) for region, addresses in self._policy.neighbours.items() for address in addresses]
        answers: dict[str, list[Witness]] = {}
        for region, witness in await asyncio.gather(*asked):
            if witness is not None:
                answers.setdefault(region, []).append(witness)
        return answers
