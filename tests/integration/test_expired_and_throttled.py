"""Every adapter of AWS when credentials have expired and when the service throttles: waited for, and certainly unchanged.

One rule for all of them, over the HTTP proxy in front of real stand-ins, in the form in which each service says it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aioboto3
import boto3
import pytest
import stamina

from controller.adapters.aws_account import check_account
from controller.adapters.kms import AwsKeyService
from controller.adapters.region_store import AwsRegionStore
from controller.adapters.route53 import Route53Traffic
from controller.domain.model import Fence, SegmentRef
from controller.errors import OutcomeUnknown, Unavailable
from controller.lab.aws import AwsStandIn, provision_zone
from tests.support.http_fault_proxy import Fault, HttpFaultProxy, Rule
from tests.support.stores import REGION, AwsWorld, next_commit, stand_in, token

pytestmark = [pytest.mark.aws, pytest.mark.slow]

BUDGET_SECONDS = 10.0
"""Refusals use up the attempts of a call long before that, also on a machine that is busy."""
S = "s0"
REF = SegmentRef(S, 1, 1)
HOME, AWAY = {"eu-west-1": 100, "eu-central-1": 0}, {"eu-west-1": 0, "eu-central-1": 100}
CONTEXT = {"agent-dr:group": "fleet", "agent-dr:stream": S}
REFUSALS = [Fault.EXPIRED, Fault.THROTTLED]

Call = Callable[[], Awaitable[Any]]


@pytest.fixture(scope="module")
def aws() -> Iterator[AwsStandIn]:
    with stand_in() as server:
        yield server


@asynccontextmanager
async def broken(proxy: HttpFaultProxy, fault: Fault) -> AsyncIterator[None]:
    """Everybody is refused; afterwards nobody is."""
    proxy.rules.append(Rule(fault, lambda _: True))
    before = sum(seen.forwarded for seen in proxy.seen)
    try:
        yield
    finally:
        proxy.rules.clear()
    assert sum(seen.forwarded for seen in proxy.seen) == before, "the proxy let something through"


async def refused(proxy: HttpFaultProxy, fault: Fault, call: Call) -> Unavailable:
    """The call waits as long as it has time, then says that nothing was applied."""
    before = len(proxy.seen)
    async with broken(proxy, fault):
        with pytest.raises(Unavailable) as caught:
            await call()
    assert not isinstance(caught.value, OutcomeUnknown)
    assert len(proxy.seen) > before + 1, "it was not asked again"
    if fault is Fault.EXPIRED:
        assert "renewed by their provider" in caught.value.hint
    return caught.value


@pytest.mark.parametrize("fault", REFUSALS)
async def test_a_store_that_refuses_everything_is_waited_for_and_goes_on(aws: AwsStandIn, fault: Fault) -> None:
    world = AwsWorld(aws.endpoint)
    async with HttpFaultProxy(aws.host, aws.port) as proxy:
        through = {"s3_endpoint": proxy.endpoint, "dynamodb_endpoint": proxy.endpoint}
        store = await world.client(**through, call_timeout_seconds=BUDGET_SECONDS)
        try:
            await store.fence(token(1))
            await _refused_everywhere(store, proxy, fault)
            await store.put_segment(token(1), REF, b"payload")
            head = await store.advance(token(1), next_commit(await store.read_head(S), token(1)))
            assert (await store.get_segment(REF), head.seq) == (b"payload", 1)
        finally:
            await world.close()


async def _refused_everywhere(store: AwsRegionStore, proxy: HttpFaultProxy, fault: Fault) -> None:
    head = await store.read_head(S)
    calls: list[Call] = [
        lambda: store.put_segment(token(1), REF, b"payload"),
        lambda: store.get_segment(REF),
        lambda: store.read_head(S),
        lambda: store.fence(token(2)),
        lambda: store.advance(token(1), next_commit(head, token(1))),
    ]
    for call in calls:
        await refused(proxy, fault, call)
    assert await store.read_head(S) == head


async def test_credentials_that_expire_between_a_lost_answer_and_its_read_back_leave_it_unknown(aws: AwsStandIn) -> None:
    """The read-back asks S3 by HEAD, whose refusals have no body: 400 and nothing else."""
    world = AwsWorld(aws.endpoint)
    async with HttpFaultProxy(aws.host, aws.port) as proxy:
        store = await world.client(s3_endpoint=proxy.endpoint, call_timeout_seconds=BUDGET_SECONDS)
        try:
            await store.fence(token(1))
            proxy.add(Fault.RESET_AFTER, "PutObject", times=1)
            proxy.add(Fault.EXPIRED, "HeadObject")
            with pytest.raises(OutcomeUnknown, match="400"):
                await store.put_segment(token(1), REF, b"payload")
            assert proxy.count("HeadObject") > 1, "it was not asked again"
            proxy.rules.clear()
            await store.put_segment(token(1), REF, b"payload")
            assert await store.get_segment(REF) == b"payload"
        finally:
            await world.close()


@pytest.mark.parametrize("fault", REFUSALS)
async def test_route_53_that_refuses_everything_is_waited_for_and_goes_on(aws: AwsStandIn, fault: Fault) -> None:
    addresses = {"eu-west-1": ["192.0.2.1"], "eu-central-1": ["192.0.2.2"]}
    zone_id = await asyncio.to_thread(
        provision_zone, aws.endpoint, "example.org", "api.example.org", addresses, HOME, epoch=1, ttl=5
    )
    async with HttpFaultProxy(aws.host, aws.port) as proxy:
        traffic = Route53Traffic(zone_id, "api.example.org", regions=list(HOME), ttl_seconds=5, endpoint=proxy.endpoint)
        try:
            before = await traffic.read()
            fence = Fence(S, 2, "eu-central-1", "a")
            with stamina.set_testing(True, attempts=5):  # retries without their pauses
                await refused(proxy, fault, lambda: traffic.change(fence, before, AWAY))
                await refused(proxy, fault, traffic.read)
            assert await traffic.read() == before
            await traffic.change(fence, before, AWAY)
            assert (await traffic.read()).weights == AWAY
        finally:
            await traffic.close()


async def test_credentials_for_keys_and_for_the_account_itself_are_waited_for_too(aws: AwsStandIn) -> None:
    session: Any = boto3.session.Session()
    key = session.client("kms", endpoint_url=aws.endpoint, region_name=REGION).create_key()["KeyMetadata"]["Arn"]
    async with HttpFaultProxy(aws.host, aws.port) as proxy:
        seconds = {"call_timeout_seconds": BUDGET_SECONDS, "connect_timeout_seconds": 1.0}
        kms = AwsKeyService(REGION, key=key, aws_region=REGION, endpoint=proxy.endpoint, **seconds)
        await kms.start()
        try:
            made = await kms.make_data_key(CONTEXT)
            await refused(proxy, Fault.EXPIRED, lambda: kms.make_data_key(CONTEXT))
            await refused(proxy, Fault.EXPIRED, lambda: kms.wrap(made.plain, CONTEXT))
            await refused(proxy, Fault.EXPIRED, lambda: kms.unwrap(made.wrapped, CONTEXT))
            assert await kms.unwrap(made.wrapped, CONTEXT) == made.plain
        finally:
            await kms.close()
        check = lambda: check_account(  # noqa: E731 - one call, made twice
            "000000000000",
            aws_region=REGION,
            endpoint=proxy.endpoint,
            call_timeout_seconds=BUDGET_SECONDS,
            session=aioboto3.Session(aws_access_key_id="lab", aws_secret_access_key="lab"),
        )
        await refused(proxy, Fault.EXPIRED, check)
        await check()
