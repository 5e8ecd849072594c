"""The compare-and-set over weighted records, without a transport: what is asked, what is read back, what the outcome means.

``Route53Traffic`` and ``MemoryTraffic`` add only how a zone is listed and how a batch is submitted, so the simulation runs
the very code that decides in production whether a change of traffic succeeded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence

from controller.adapters.record_sets import Change, RecordSet, normal_name, plan_batch, understand
from controller.domain.model import Fence
from controller.errors import Conflict, FenceLost, OutcomeUnknown, Refused, Unavailable
from controller.ports import TrafficState

NO_CHANGE = "none"
"""Change id of "it was so already": there is nothing to wait for by id; DNS itself is asked anyway."""


class BatchRejectedError(Exception):
    """The provider said that it did not apply the batch (Route 53: ``InvalidChangeBatch``). Never leaves the adapter."""


class CompareAndSetTraffic(ABC):
    """``Traffic`` over any zone that has atomic batches with exact-match DELETE."""

    def __init__(self, name: str, *, regions: Collection[str], ttl_seconds: int) -> None:
        """``name``: the group's DNS name. ``regions``: set identifiers that may appear. ``ttl_seconds``: for a new TXT."""
        self.name = normal_name(name)
        self._regions = frozenset(regions)
        self._ttl_seconds = ttl_seconds

    @abstractmethod
    async def _list(self) -> Sequence[RecordSet]:
        """Record sets of the name, *then* those of its epoch TXT. Raises Unavailable.

        The order matters where the two are read one after the other: an epoch read last is not older than the weights
        read before it, so "these weights, and nobody newer" is true of one moment.
        """

    @abstractmethod
    async def _submit(self, batch: Sequence[Change]) -> str:
        """Applies atomically; returns the change id. Raises BatchRejectedError (certainly not applied), OutcomeUnknown (sent,
        no answer), Unavailable (certainly not sent or not applied)."""

    @abstractmethod
    async def in_sync(self, change_id: str) -> bool:
        """Whether all name servers have the change. True for ``"none"``."""

    async def read(self) -> TrafficState:
        """What the zone says now. Raises Refused for records that are not understood, Unavailable, Misconfigured."""
        return understand(await self._list(), self.name, self._regions)

    async def change(self, fence: Fence, expected: TrafficState, weights: Mapping[str, int]) -> str:
        """See ``ports.Traffic.change``. ``weights`` must name every region that has a record."""
        if fence.epoch < 1:
            raise Refused(f"epoch {fence.epoch} cannot fence traffic", hint="acquire the lease first")
        if expected.epoch > fence.epoch:
            raise _newer(self.name, expected.epoch, fence)
        batch = self._batch(fence, expected, weights)
        if expected.epoch == fence.epoch and dict(expected.weights) == dict(weights):
            # Nothing to change; but ``expected`` may be old, and "already so" has to be true now.
            return await self._settle(fence, expected, weights, BatchRejectedError("nothing was to be changed"))
        try:
            return await self._submit(batch)
        except (BatchRejectedError, OutcomeUnknown) as outcome:
            return await self._settle(fence, expected, weights, outcome)

    def _batch(self, fence: Fence, expected: TrafficState, weights: Mapping[str, int]) -> tuple[Change, ...]:
        return plan_batch(self.name, expected, weights, fence.epoch, self._ttl_seconds)

    async def _settle(
        self, fence: Fence, expected: TrafficState, weights: Mapping[str, int], outcome: BatchRejectedError | OutcomeUnknown
    ) -> str:
        """"Is it mine?" A rejection may be the echo of our own first try whose answer was lost; silence may be success."""
        try:
            seen = await self.read()
        except (Unavailable, Refused) as error:
            if isinstance(error, Refused) and isinstance(outcome, BatchRejectedError):
                raise
            raise OutcomeUnknown(
                f"a change of {self.name} was sent ({outcome}) and the zone cannot be read back: {error}",
                hint="read the zone again before deciding anything",
            ) from error
        if seen.epoch > fence.epoch:
            raise _newer(self.name, seen.epoch, fence)
        if seen.epoch == fence.epoch and dict(seen.weights) == dict(weights):
            return NO_CHANGE
        if seen.exact != expected.exact:
            raise Conflict(
                f"{self.name} was changed meanwhile: expected epoch {expected.epoch} and {_show(expected.weights)}, "
                f"found epoch {seen.epoch} and {_show(seen.weights)}",
                hint="read the zone again and decide anew",
            )
        if isinstance(outcome, OutcomeUnknown):
            # Not applied so far; but the request may still be on its way, so this is not a "no".
            raise OutcomeUnknown(
                f"no answer to a change of {self.name}, which is not in the zone yet: {outcome}",
                hint="read the zone again before deciding anything",
            )
        raise Refused(
            f"the change of {self.name} was rejected although the zone is as expected: {outcome}",
            hint="read what the provider says; the records or quotas of the zone need correcting",
        )


def _newer(name: str, epoch: int, fence: Fence) -> FenceLost:
    return FenceLost(f"{name} carries epoch {epoch}; ours is {fence.epoch} ({fence.writer})", epoch=epoch)


def _show(weights: Mapping[str, int]) -> str:
    return ", ".join(f"{region}={weight}" for region, weight in sorted(weights.items())) or "no records"
