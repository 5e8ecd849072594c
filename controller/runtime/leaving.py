"""How a holder leaves its stream: the drain of a planned move, an orderly end, and what it writes down for whoever comes next.

A successor waits for every right that may still run, by what stands beside the holder's fork. So nothing here may say that less
is lent than is, and the record says who may acknowledge alone *before* anybody does: what was written for a move that is
called off is put right before the holder serves again. When to leave is decided by ``active`` and its duty loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from controller.domain.model import Forks, Role
from controller.domain.sharing import LEAD
from controller.errors import Unavailable
from controller.ports import Compare, Put
from controller.runtime.documents import encode, read
from controller.runtime.intake import Intake
from controller.runtime.shell import Shell
from controller.runtime.tenure import Tenure

DRAIN_POLL_SECONDS = 0.1
RETRY_SECONDS = 0.5


class Leaving:
    """Of one tenure. ``over``: why it ends, "" while it does not."""

    def __init__(self, shell: Shell, tenure: Tenure, intake: Intake, over: Callable[[], str]) -> None:
        self._shell = shell
        self._tenure = tenure
        self._intake = intake
        self._over = over
        self._lead = tenure.fence.stream == LEAD
        self.retired = False
        """Whether ``retire`` is through: nothing that was lent runs any more."""

    async def retire(self) -> None:
        """Before an orderly end: takes nothing new and waits until every right that agents were granted has passed (at most
        our own), so that the lease may go back at once and the next instance need not wait for it to expire."""
        clock = self._shell.ports.clock
        if self._lead:
            self._shell.fleet.deactivate()
        if self._intake.writer is not None:
            self._intake.writer.freeze("this instance is stopping")
        # By the clock: a right that was lost (to a full disk, say) still binds those whom we lent parts of it, until its time.
        while clock.monotonic() < min(self._intake.rights_end(), self._tenure.right.ends_at):
            await clock.sleep(DRAIN_POLL_SECONDS)
        self.retired = True

    async def drain(self, plan: str) -> str:
        """Takes nothing new, waits until every store has everything and every agent's right has passed, then gives the right
        up and says so. "": the move was called off, and the stream is served again."""
        writer, clock, fleet, tenure = self._intake.writer, self._shell.ports.clock, self._shell.fleet, self._tenure
        assert writer is not None
        writer.freeze(f"plan {plan} moves the fleet")
        self._shell.say(Role.DRAINING, f"draining for plan {plan}")
        if self._lead:
            fleet.deactivate()
        proved = False
        while tenure.barrier is not None:
            if writer.drained() and not proved:
                proved = await self._prove_drained(plan)
            if proved:
                tenure.drained = True
                if clock.monotonic() >= min(self._intake.rights_end(), tenure.right.ends_at):
                    why = f"drained for plan {plan}"
                    tenure.lose(why)
                    return why
            await clock.sleep(DRAIN_POLL_SECONDS)
        await self._count_on_home_again()  # also when no proof is known: one may have been applied whose answer was lost
        tenure.drained = tenure.draining = False
        writer.unfreeze()
        if self._lead:
            fleet.activate()
        self._shell.say(Role.ACTIVE, f"plan {plan} was aborted; serving again in epoch {tenure.fence.epoch}")
        return ""

    async def nothing_lent(self) -> None:
        """Before the lease goes back, with every right that hung on it over: a successor need not wait. Raises Unavailable."""
        coordinator, key = self._shell.ports.coordinator, self._shell.keys.forks(self._tenure.fence.stream)
        forks = await read(coordinator, key, Forks)
        if forks is not None:
            over = Put(key, encode(replace(forks.value, failsafe_seconds=0.0, lent_seconds=0.0)))
            await coordinator.txn([self._tenure.guard, Compare.modified(key, forks.revision)], [over])

    async def _prove_drained(self, plan: str) -> bool:
        """Records, under our guard, that every store of a fence quorum has everything: so nobody may have acknowledged alone
        any more, and the target may open without our store. Without this proof a planned move is called off."""
        assert self._intake.writer is not None
        coordinator, keys, stream = self._shell.ports.coordinator, self._shell.keys, self._tenure.fence.stream
        key = keys.forks(stream)
        try:
            forks = await read(coordinator, key, Forks)
            if forks is None or not self._intake.writer.drained():
                return False
            proof = [
                Put(keys.drained(plan, stream), str(self._intake.writer.seq).encode()),
                Put(key, encode(replace(forks.value, sole_ackers=(), failsafe_seconds=self._still_lent(forks.value)))),
            ]
            result = await coordinator.txn([self._tenure.guard, Compare.modified(key, forks.revision)], proof)
        except Unavailable as error:
            self._shell.tell("drain", error.message, error=error.code)
            return False
        return result.succeeded

    def _still_lent(self, forks: Forks) -> float:
        """What a successor must wait for after a drain: nothing, unless a right past the lease is still running."""
        right = self._tenure.right
        return 0.0 if right.beyond <= right.deadline else forks.failsafe_seconds

    async def _count_on_home_again(self) -> None:
        """The move was called off, maybe after the proof: the record must say who may acknowledge alone before anybody does."""
        assert self._intake.writer is not None
        coordinator, keys, stream = self._shell.ports.coordinator, self._shell.keys, self._tenure.fence.stream
        key = keys.forks(stream)
        while not self._over():
            try:
                forks = await read(coordinator, key, Forks)
                if forks is not None:
                    again = replace(
                        forks.value,
                        sole_ackers=self._intake.writer.sole_ackers,
                        failsafe_seconds=self._shell.failsafe_seconds,
                        lent_seconds=self._shell.lent_seconds,
                    )
                    home = Put(key, encode(again))
                    result = await coordinator.txn([self._tenure.guard, Compare.modified(key, forks.revision)], [home])
                    if result.succeeded:
                        return
            except Unavailable as error:
                self._shell.tell("drain", error.message, error=error.code)
            await self._shell.ports.clock.sleep(RETRY_SECONDS)
