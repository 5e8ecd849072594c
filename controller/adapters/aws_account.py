"""Whose AWS account this process's credentials belong to: asked of STS before anything is done with them.

The right names in the wrong account are the classic of copied settings and exported profiles: buckets, tables and zones of a
rehearsal have the names of production. ``GetCallerIdentity`` needs no permission and cannot be denied.
"""

from __future__ import annotations

import aioboto3
from aiobotocore.config import AioConfig

from controller.adapters.aws_call import Call
from controller.domain.text import visible
from controller.errors import Misconfigured


async def check_account(
    expected: str,
    *,
    aws_region: str,
    endpoint: str | None = None,
    call_timeout_seconds: float,
    session: aioboto3.Session | None = None,
) -> None:
    """Returns when the credentials belong to account ``expected``, twelve digits.

    Raises Misconfigured for another account and for credentials that are refused, Unavailable while STS does not answer: then
    nobody knows, and nothing may be done.
    """
    config = AioConfig(
        connect_timeout=call_timeout_seconds, read_timeout=call_timeout_seconds, retries={"total_max_attempts": 1}
    )
    async with (session or aioboto3.Session()).client(
        "sts", region_name=aws_region, endpoint_url=endpoint, config=config
    ) as client:
        call = Call("GetCallerIdentity", call_timeout_seconds)  # its time begins once the client has been made
        answer: dict[str, object] = {}
        async for attempt in call.retries():
            with attempt:
                answer = await call.attempt(client.get_caller_identity())
    found = str(answer.get("Account", ""))
    if found != expected:
        raise Misconfigured(
            f"these credentials belong to AWS account {visible(found, 20) or 'unknown'}, aws.account_id is {expected}",
            hint="correct the role, profile or keys of this process, or aws.account_id; nothing was done with them",
        )
