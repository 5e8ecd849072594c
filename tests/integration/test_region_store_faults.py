"""The region store's adapter when its store fails: every loss ends as success by read-back, or as an error that claims
nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from controller.adapters.region_store import AwsRegionStore
from controller.domain.model import Commit, EpochStart, Head, Realignment, Salvage, SegmentRef
from controller.errors import Conflict, Corrupt, FenceLost, Misconfigured, OutcomeUnknown, Refused, Unavailable
from controller.lab.aws import AwsStandIn
from tests.support.http_fault_proxy import Fault, HttpFaultProxy
from tests.support.stores import TABLE, AwsWorld, link, next_commit, stand_in, token

pytestmark = [pytest.mark.aws, pytest.mark.slow]

S = "s0"
BUDGET_SECONDS = 3.0
PATIENT_SECONDS = 10.0
"""For calls that must end well: a lost first attempt takes 60 % of it, and the rest has to do for the read-back and one more
attempt, also on a machine that is busy."""
LATE_SECONDS = BUDGET_SECONDS + 8.0
"""By then a call is over that keeps its budget: a bound for a busy machine, not a measurement."""


@pytest.fixture(scope="session")
def aws() -> Iterator[AwsStandIn]:
    with stand_in() as server:
        yield server


@dataclass
class Rig:
    """A store behind the proxy (with little and with more time for a call), and the same store seen directly."""

    proxy: HttpFaultProxy
    world: AwsWorld
    store: AwsRegionStore
    patient: AwsRegionStore
    direct: AwsRegionStore


@asynccontextmanager
async def rigged(aws: AwsStandIn) -> AsyncIterator[Rig]:
    world = AwsWorld(aws.endpoint)
    async with HttpFaultProxy(aws.host, aws.port) as proxy:
        through = {"s3_endpoint": proxy.endpoint, "dynamodb_endpoint": proxy.endpoint}
        store = await world.client(**through, call_timeout_seconds=BUDGET_SECONDS)
        patient = await world.client(**through, call_timeout_seconds=PATIENT_SECONDS)
        try:
            yield Rig(proxy, world, store, patient, await world.client())
        finally:
            await world.close()


@pytest.fixture
async def rig(aws: AwsStandIn) -> AsyncIterator[Rig]:
    async with rigged(aws) as made:
        yield made


async def together(aws: AwsStandIn, names: Sequence[str], play: Callable[[Rig, str], Coroutine[Any, Any, None]]) -> None:
    """Plays one story for each of these operations, each behind a proxy of its own, all at once: stories that mostly wait.

    Raises what the first one that failed raised; its note names the operation.
    """

    async def one(name: str) -> None:
        async with rigged(aws) as rig:
            try:
                await play(rig, name)
            except BaseException as error:
                error.add_note(f"the operation was {name}")
                raise

    for outcome in await asyncio.gather(*(one(name) for name in names), return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


@dataclass(frozen=True)
class Mutation:
    """A mutating call, ready to be made once, and what its one effect looks like."""

    operation: str
    call: Callable[[], Coroutine[Any, Any, object]]
    applied: Callable[[], Coroutine[Any, Any, bool]]


FENCE = token(2, instance="new")
REF = SegmentRef(S, 4, 2)


async def prepare(rig: Rig, name: str, store: AwsRegionStore | None = None) -> Mutation:
    """A stream of three segments of epoch 1, fenced by epoch 2 where the call needs it. ``store``: who makes the call."""
    store = store or rig.store
    head = await rig.direct.fence(token(1))
    for _ in range(3):
        head = await rig.direct.advance(token(1), next_commit(head, token(1)))
    if name == "put_segment":
        return Mutation("PutObject", lambda: store.put_segment(FENCE, REF, b"payload"), lambda: _exists(rig))
    if name == "fence":
        return Mutation("UpdateItem", lambda: store.fence(FENCE), lambda: _head_is(rig, lambda h: h.epoch == 2))
    head = await rig.direct.fence(FENCE)
    if name != "open":  # the commit that opens an epoch looks at the head first, the others do not
        head = await rig.direct.advance(FENCE, next_commit(head, FENCE))
    if name in ("open", "advance"):
        commit, records = next_commit(head, FENCE), head.records + 10
        return Mutation(
            "UpdateItem", lambda: store.advance(FENCE, commit), lambda: _head_is(rig, lambda h: h.records == records)
        )
    to = Realignment(
        1, link("0" * 64, 1, 1), 1, "0" * 64, (EpochStart(1, 1),), Salvage(2, head.seq, head.epochs, head.chain, 2)
    )
    return Mutation(
        "UpdateItem", lambda: store.realign(FENCE, head, to), lambda: _head_is(rig, lambda h: h.salvage == (to.salvage,))
    )


async def _exists(rig: Rig) -> bool:
    return REF in await rig.direct.list_segments(S, 1) and await rig.direct.get_segment(REF) == b"payload"


async def _suffered(rig: Rig, fault: Fault) -> None:
    """Until the proxy is done with a request that met the fault; a delayed one has reached the store then."""
    async with asyncio.timeout(60.0):
        while not any(entry.fault is fault for entry in rig.proxy.seen):  # noqa: ASYNC110 - the proxy has no event
            await asyncio.sleep(0.02)


async def _head_is(rig: Rig, wanted: Callable[[Head], bool]) -> bool:
    return wanted(await rig.direct.read_head(S))


MUTATIONS = ["put_segment", "open", "advance", "fence", "realign"]


# ----------------------------------------------------------------------------------------------- one fault, then all well


@pytest.mark.parametrize(
    "fault",
    [
        Fault.RESET_BEFORE,
        Fault.RESET_AFTER,
        Fault.BLACKHOLE,
        Fault.BLACKHOLE_AFTER,
        Fault.ANSWER,
        Fault.FAIL_AFTER,
        Fault.TWICE,
        Fault.TRUNCATE,
        Fault.DELAY,
    ],
)
async def test_one_lost_request_or_answer_still_ends_as_success_with_one_effect(aws: AwsStandIn, fault: Fault) -> None:
    async def play(rig: Rig, name: str) -> None:
        mutation = await prepare(rig, name, rig.patient)
        rig.proxy.add(fault, mutation.operation, times=1, seconds=PATIENT_SECONDS * 0.75)
        await mutation.call()
        assert await mutation.applied()
        await _suffered(rig, fault)
        assert await mutation.applied()  # also when a delayed first request arrives after all: it must not count

    await together(aws, MUTATIONS, play)


@pytest.mark.parametrize("fault", [Fault.RESET_AFTER, Fault.BLACKHOLE_AFTER, Fault.FAIL_AFTER])
async def test_an_applied_update_whose_answer_was_lost_is_read_back_and_not_sent_again(aws: AwsStandIn, fault: Fault) -> None:
    async def play(rig: Rig, name: str) -> None:
        mutation = await prepare(rig, name, rig.patient)
        rig.proxy.add(fault, "UpdateItem", times=1)
        await mutation.call()
        assert rig.proxy.count("UpdateItem") == 1
        assert rig.proxy.count("GetItem") >= 1

    await together(aws, ["open", "advance", "fence", "realign"], play)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("ProvisionedThroughputExceededException", 400),
        ("ThrottlingException", 400),
        ("RequestLimitExceeded", 400),
        ("InternalServerError", 500),
    ],
)
@pytest.mark.parametrize("name", ["advance", "fence", "realign"])
async def test_a_throttled_or_failing_table_is_asked_again(rig: Rig, name: str, code: str, status: int) -> None:
    mutation = await prepare(rig, name)
    rig.proxy.add(Fault.ANSWER, "UpdateItem", times=2, code=code, status=status)
    await mutation.call()
    assert await mutation.applied()
    assert rig.proxy.forwarded("UpdateItem") == 1


@pytest.mark.parametrize(("code", "status"), [("SlowDown", 503), ("InternalError", 500), ("ConditionalRequestConflict", 409)])
async def test_a_throttled_failing_or_racing_bucket_is_asked_again(rig: Rig, code: str, status: int) -> None:
    mutation = await prepare(rig, "put_segment")
    rig.proxy.add(Fault.ANSWER, "PutObject", times=2, code=code, status=status)
    await mutation.call()
    assert rig.proxy.forwarded("PutObject") == 1
    assert await mutation.applied()


# -------------------------------------------------------------------------------------------------------- faults that stay


@pytest.mark.parametrize("fault", [Fault.BLACKHOLE, Fault.RESET_BEFORE])
async def test_a_store_that_stays_silent_ends_as_unknown_within_the_calls_deadline(aws: AwsStandIn, fault: Fault) -> None:
    async def play(rig: Rig, name: str) -> None:
        mutation = await prepare(rig, name)
        rig.proxy.add(fault, mutation.operation)
        started = time.monotonic()
        with pytest.raises(OutcomeUnknown) as caught:
            await mutation.call()
        assert time.monotonic() - started < LATE_SECONDS
        assert caught.value.hint
        assert not await mutation.applied()

    await together(aws, MUTATIONS, play)


async def test_an_applied_update_that_cannot_be_read_back_is_unknown_and_a_later_repeat_settles_it(aws: AwsStandIn) -> None:
    async def play(rig: Rig, name: str) -> None:
        mutation = await prepare(rig, name)
        rig.proxy.add(Fault.RESET_AFTER, "UpdateItem")
        rig.proxy.add(Fault.ANSWER, "GetItem", code="ThrottlingException", status=400)
        with pytest.raises(OutcomeUnknown):
            await mutation.call()
        assert await mutation.applied()
        rig.proxy.rules.clear()
        await mutation.call()
        assert await mutation.applied()

    await together(aws, ["advance", "fence", "realign"], play)


async def test_an_unknown_update_stays_unknown_when_the_read_back_is_forbidden(rig: Rig) -> None:
    mutation = await prepare(rig, "advance")
    rig.proxy.add(Fault.RESET_AFTER, "UpdateItem")
    rig.proxy.add(Fault.ANSWER, "GetItem", code="AccessDeniedException", status=400)
    with pytest.raises(OutcomeUnknown, match="AccessDenied"):
        await mutation.call()


async def test_a_store_that_only_throttles_is_unavailable_and_certainly_unchanged(aws: AwsStandIn) -> None:
    async def play(rig: Rig, name: str) -> None:
        mutation = await prepare(rig, name)
        code, status = ("SlowDown", 503) if name == "put_segment" else ("ThrottlingException", 400)
        rig.proxy.add(Fault.ANSWER, mutation.operation, code=code, status=status)
        with pytest.raises(Unavailable) as caught:
            await mutation.call()
        assert not isinstance(caught.value, OutcomeUnknown)
        assert not await mutation.applied()

    await together(aws, MUTATIONS, play)


async def test_a_refused_connection_is_unavailable_and_certainly_unchanged(aws: AwsStandIn) -> None:
    async def play(rig: Rig, name: str) -> None:
        mutation = await prepare(rig, name)
        await rig.proxy.refuse()
        with pytest.raises(Unavailable, match="no connection") as caught:
            await mutation.call()
        assert not isinstance(caught.value, OutcomeUnknown)
        assert not await mutation.applied()
        await rig.proxy.listen()
        await mutation.call()
        assert await mutation.applied()

    await together(aws, MUTATIONS, play)


async def test_a_frozen_stand_in_is_unavailable_and_serves_again_after_the_thaw(rig: Rig, aws: AwsStandIn) -> None:
    mutation = await prepare(rig, "advance")
    aws.freeze()
    try:
        with pytest.raises(OutcomeUnknown):
            await mutation.call()
        with pytest.raises(Unavailable):
            await rig.store.read_head(S)
    finally:
        aws.thaw()
    await mutation.call()
    assert await mutation.applied()


# ------------------------------------------------------------------------------------------------ answers that are not ours


async def test_an_advance_that_was_lost_and_then_fenced_away_is_fence_lost(rig: Rig) -> None:
    mutation = await prepare(rig, "advance")
    rig.proxy.add(Fault.RESET_BEFORE, "UpdateItem", times=1)

    async def overtake() -> None:
        while not rig.proxy.seen:  # noqa: ASYNC110 - the proxy has no event, and needs none
            await asyncio.sleep(0.001)
        await rig.direct.fence(token(3, instance="newer"))

    overtaking = asyncio.create_task(overtake())
    rig.proxy.add(Fault.DELAY, "GetItem", times=1, seconds=0.3)
    with pytest.raises(FenceLost) as caught:
        await mutation.call()
    await overtaking
    assert caught.value.epoch == 3
    assert not await mutation.applied()


async def test_a_late_advance_of_a_fenced_writer_changes_nothing(rig: Rig) -> None:
    """The request leaves before the fence, its sender gives up, a successor fences and commits, then it arrives."""
    mutation = await prepare(rig, "advance")
    rig.proxy.add(Fault.DELAY, "UpdateItem", times=1, seconds=BUDGET_SECONDS)
    rig.proxy.add(Fault.BLACKHOLE, "UpdateItem")
    rig.proxy.add(Fault.BLACKHOLE, "GetItem")
    with pytest.raises(OutcomeUnknown):
        await mutation.call()
    new = token(3, instance="newer")
    head = await rig.direct.fence(new)
    head = await rig.direct.advance(new, next_commit(head, new))
    await asyncio.sleep(1.0)
    assert rig.proxy.forwarded("UpdateItem") == 1
    assert await rig.direct.read_head(S) == head


async def test_other_content_behind_a_lost_put_is_a_conflict(rig: Rig) -> None:
    await rig.direct.put_segment(FENCE, REF, b"somebody else's")
    rig.proxy.add(Fault.RESET_AFTER, "PutObject", times=1)
    with pytest.raises(Conflict):
        await rig.store.put_segment(FENCE, REF, b"payload")


async def test_an_object_that_was_written_without_our_metadata_is_compared_by_its_content(rig: Rig) -> None:
    rig.world.litter(REF.key)
    with pytest.raises(Conflict):
        await rig.store.put_segment(FENCE, REF, b"payload")
    await rig.store.put_segment(FENCE, REF, b"left here by somebody")
    assert await rig.store.get_segment(REF) == b"left here by somebody"


# ------------------------------------------------------------------------------------------------------------------ reads


@pytest.mark.parametrize("fault", [Fault.TRUNCATE, Fault.RESET_BEFORE, Fault.RESET_AFTER, Fault.ANSWER])
async def test_one_broken_read_is_repeated(rig: Rig, fault: Fault) -> None:
    await rig.direct.put_segment(FENCE, REF, b"payload" * 10_000)
    rig.proxy.add(fault, "GetObject", times=1)
    assert await rig.store.get_segment(REF) == b"payload" * 10_000
    rig.proxy.add(fault, "GetItem", times=1)
    assert await rig.store.read_head(S) == Head(S)
    rig.proxy.rules.clear()
    rig.proxy.add(fault, "GetObject", times=1)  # ListObjectsV2 is a GET too
    assert await rig.store.list_segments(S, 1) == (REF,)


async def test_a_segment_that_is_always_cut_short_is_never_returned(rig: Rig) -> None:
    await rig.direct.put_segment(FENCE, REF, b"payload" * 10_000)
    rig.proxy.add(Fault.TRUNCATE, "GetObject")
    with pytest.raises(Unavailable) as caught:
        await rig.store.get_segment(REF)
    assert not isinstance(caught.value, OutcomeUnknown)  # a read changes nothing, so nothing is unknown


async def test_a_silent_store_ends_a_read_within_its_deadline(rig: Rig) -> None:
    rig.proxy.add(Fault.BLACKHOLE, "GetItem")
    started = time.monotonic()
    with pytest.raises(Unavailable):
        await rig.store.read_head(S)
    assert time.monotonic() - started < LATE_SECONDS


async def test_a_read_that_is_cancelled_ends_at_once(rig: Rig) -> None:
    rig.proxy.add(Fault.BLACKHOLE, "GetItem")
    reading = asyncio.create_task(rig.store.read_head(S))
    await asyncio.sleep(0.1)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


# ------------------------------------------------------------------------------------------------------- settings, rights


@pytest.mark.parametrize(
    ("operation", "code", "status", "kind"),
    [
        ("UpdateItem", "AccessDeniedException", 400, Misconfigured),
        ("UpdateItem", "ResourceNotFoundException", 400, Misconfigured),
        ("UpdateItem", "UnrecognizedClientException", 400, Misconfigured),
        ("UpdateItem", "ExpiredTokenException", 400, Unavailable),
        ("UpdateItem", "ValidationException", 400, Refused),
        ("PutObject", "AccessDenied", 403, Misconfigured),
        ("PutObject", "NoSuchBucket", 404, Misconfigured),
        ("PutObject", "AuthorizationHeaderMalformed", 400, Misconfigured),
        ("PutObject", "RequestTimeTooSkewed", 403, Misconfigured),
        ("PutObject", "ExpiredToken", 400, Unavailable),
        ("PutObject", "EntityTooLarge", 400, Refused),
    ],
)
async def test_what_the_service_says_becomes_what_the_reader_does_next(
    rig: Rig, operation: str, code: str, status: int, kind: type[Exception]
) -> None:
    mutation = await prepare(rig, "put_segment" if operation == "PutObject" else "advance")
    rig.proxy.add(Fault.ANSWER, operation, code=code, status=status)
    with pytest.raises(kind) as caught:
        await mutation.call()
    assert not isinstance(caught.value, OutcomeUnknown)
    assert code in str(caught.value)
    assert getattr(caught.value, "hint", "")
    assert not await mutation.applied()


async def test_credentials_that_expire_for_a_moment_are_waited_for(rig: Rig) -> None:
    mutation = await prepare(rig, "advance")
    rig.proxy.add(Fault.ANSWER, "UpdateItem", times=2, code="ExpiredTokenException", status=400)
    await mutation.call()
    assert await mutation.applied()


async def test_a_missing_bucket_or_table_is_named(rig: Rig) -> None:
    store = await rig.world.client(bucket="no-such-bucket", table="no-such-table")
    with pytest.raises(Misconfigured, match="NoSuchBucket"):
        await store.put_segment(FENCE, REF, b"x")
    with pytest.raises(Misconfigured, match="ResourceNotFound"):
        await store.fence(FENCE)
    with pytest.raises(Misconfigured, match="ResourceNotFound"):
        await store.read_head(S)


async def test_a_body_that_was_damaged_on_its_way_is_not_stored(rig: Rig) -> None:
    """The sha256 that goes with the request makes S3 refuse it."""
    store = rig.store
    assert store._wire is not None
    put = store._wire.put_object

    async def damaged(key: str, data: bytes, digest: str, metadata: Any) -> None:
        await put(key, b"pAyload", digest, metadata)

    store._wire.put_object = damaged  # type: ignore[method-assign]
    with pytest.raises(Unavailable):
        await store.put_segment(FENCE, REF, b"payload")
    assert await rig.direct.list_segments(S, 1) == ()


async def test_a_body_over_the_limit_is_refused_before_anything_is_sent(rig: Rig) -> None:
    store = await rig.world.client(s3_endpoint=rig.proxy.endpoint, object_max_bytes=10)
    with pytest.raises(Refused, match="11 bytes") as caught:
        await store.put_segment(FENCE, REF, b"x" * 11)
    assert "segment_max_bytes" in caught.value.hint
    assert rig.proxy.seen == []


async def test_the_adapter_costs_one_request_per_put_and_one_per_advance(rig: Rig) -> None:
    head = await rig.store.fence(FENCE)
    head = await rig.store.advance(FENCE, next_commit(head, FENCE))
    rig.proxy.seen.clear()
    for _ in range(5):
        ref = SegmentRef(S, head.seq + 1, FENCE.epoch)
        await rig.store.put_segment(FENCE, ref, b"payload")
        head = await rig.store.advance(FENCE, next_commit(head, FENCE))
    assert [entry.request.method for entry in rig.proxy.seen] == ["PUT", "POST"] * 5
    assert not any(b"100-continue" in entry.request.raw.lower() for entry in rig.proxy.seen)  # nor a round trip more per body


async def test_a_damaged_head_item_is_corrupt_and_not_overwritten(rig: Rig) -> None:
    await rig.direct.fence(token(1))
    key = {"pk": {"S": f"{rig.world.group}#{S}"}, "sk": {"S": "head"}}
    rig.world.dynamodb().put_item(TableName=TABLE, Item={**key, "seq": {"S": "nonsense"}})
    for call in (rig.store.read_head(S), rig.store.fence(FENCE), rig.store.advance(FENCE, Commit(0, "0" * 64, 1, "a" * 64))):
        with pytest.raises(Corrupt, match="attribute 'seq'"):
            await call
