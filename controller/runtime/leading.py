"""What only the lead's holder does: it carries promotions on and runs the fleet.

The lead is the first stream (``domain.sharing``): the zone, the plan and the agents need one writer each. Nothing here opens an
epoch, or takes records; a holder of any other stream has no ``Leading``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from controller.domain.model import Authority, Head
from controller.domain.promotion import PlanRecord
from controller.errors import Conflict, DrError, FenceLost, Unavailable
from controller.ports import Page
from controller.runtime.documents import Seen, read
from controller.runtime.policies import promotion_policy
from controller.runtime.promotion import Promotion
from controller.runtime.shell import Shell
from controller.runtime.tenure import Tenure
from controller.runtime.together import BEFORE_OPEN, POLL_SECONDS, Together

RETRY_SECONDS = 0.5
LASTING_RETRY_SECONDS = 5.0
"""Pause after an error that waiting alone does not mend: somebody has to do something first."""


class Leading:
    """Of one tenure. ``over``: why it ends, "" while it does not."""

    def __init__(self, shell: Shell, tenure: Tenure, together: Together, over: Callable[[], str]) -> None:
        self._shell = shell
        self._tenure = tenure
        self._together = together
        self._over = over
        self._paged = ""

    # --------------------------------------------------------------------------------------------------- promotion

    async def promote(self) -> None:
        """Carries the plan that put this region in authority to its end, if it has not ended. Raises FenceLost."""
        shell, clock = self._shell, self._shell.ports.clock
        promotion, said = self._promotion(), ""
        while True:
            try:
                plan = await self._unfinished()
                if plan is None:
                    break
                if plan.value.state not in BEFORE_OPEN:
                    shell.tell("promotion", await promotion.step(plan))
                elif not await self._together.caught_up(plan):
                    await clock.sleep(POLL_SECONDS)
            except FenceLost:
                raise
            except DrError as error:
                # The region serves; what stops a later step (a foreign DNS record, say) is told and waited for.
                if error.message != said:
                    said = error.message
                    shell.tell("promotion", said, error=error.code)
                lasting = not isinstance(error, (Unavailable, Conflict))
                if lasting:
                    await promotion.page_once(said)
                await clock.sleep(LASTING_RETRY_SECONDS if lasting else RETRY_SECONDS)
        await self._tidy()

    def _promotion(self) -> Promotion:
        shell, ports = self._shell, self._shell.ports
        return Promotion(
            tenure=self._tenure,
            coordinator=ports.coordinator,
            keys=shell.keys,
            clock=ports.clock,
            book=shell.book,
            traffic=ports.traffic,
            resolver=ports.resolver,
            pager=ports.pager,
            view=shell.view,
            fleet=shell.fleet,
            home_head=self._home_head,
            streams=tuple(shell.followers),
            policy=promotion_policy(shell.settings),
            instance=shell.settings.instance,
            close_incidents=shell.watch.close_silent,
        )

    async def _unfinished(self) -> Seen[PlanRecord] | None:
        coordinator, keys = self._shell.ports.coordinator, self._shell.keys
        authority = await read(coordinator, keys.authority, Authority)
        if authority is None or authority.value.region != self._shell.settings.region:
            raise FenceLost("the authority is not with this region any more")
        if authority.value.plan is None:
            return None
        plan = await read(coordinator, keys.plan(authority.value.plan), PlanRecord)
        return None if plan is None or plan.value.ended else plan

    async def _tidy(self) -> None:
        """A holder that serves again makes an incident of silence untrue."""
        try:
            await self._shell.watch.close_silent()
        except DrError:
            pass  # closing it is for people's eyes only; the next holder tries again

    async def _home_head(self, stream: str) -> Head:
        return await self._shell.ports.stores[self._shell.settings.region].read_head(stream)

    # ------------------------------------------------------------------------------------------------------- fleet

    async def start_fleet(self) -> None:
        """Hands agents out, on what the view says; while a plan is unfinished nothing before its step `resume`, at the plan's
        pace. Raises FenceLost, Unavailable."""
        self._shell.fleet.activate(paused=await self._unfinished() is not None)

    async def start_fleet_behind(self, others: Sequence[str]) -> None:
        """With several streams the view must first have what was acknowledged in the others before this tenure: their
        assignments, and where their agents resume. Raises FenceLost."""
        shell, wanted = self._shell, dict[str, int]()
        while not self._over():
            try:
                for stream in others:
                    if stream not in wanted:
                        wanted[stream] = (await self._home_head(stream)).seq
                if all(shell.view.position(stream)[0] >= seq for stream, seq in wanted.items()):
                    paused = await self._unfinished() is not None
                    if not self._tenure.draining and not self._over():
                        shell.fleet.activate(paused=paused)
                    return
            except FenceLost:
                raise
            except DrError as error:
                shell.tell("fleet", error.message, error=error.code)
            await shell.ports.clock.sleep(POLL_SECONDS)

    async def tend(self) -> str | None:
        """One round of looking after the fleet. It writes assignments and waits for them, and for the pager: a loop of its
        own. Raises Unavailable."""
        if self._tenure.draining or not self._shell.fleet.active:
            return None
        ticked = await self._shell.fleet.tick()
        await self._page(ticked.page)
        return ticked.reason if ticked.moved or ticked.page else None

    async def _page(self, text: str) -> None:
        """Tells people about the fleet, once per text; nobody reached means that the next round tries again."""
        if not text or text == self._paged:
            self._paged = text
            return
        title = f"agents of {self._shell.settings.group} need people"
        try:
            await self._shell.ports.pager.page(
                Page(f"fleet-{self._tenure.fence.epoch}", "critical", title, text, "region-failover")
            )
            self._paged = text
        except Unavailable as error:
            self._shell.tell("page", error.message)
