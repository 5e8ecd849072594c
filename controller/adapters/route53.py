"""Traffic on Route 53: boto3 in threads of our own, every call with a deadline, every failure sorted by what is known.

What AWS promises and this file leans on: a change batch is atomic; a DELETE that does not repeat the record set exactly
makes the whole batch fail (``InvalidChangeBatch``); a listing shows accepted changes at once, also while they are PENDING.

SDK retries are off: a retry of a change whose answer was lost comes back as ``InvalidChangeBatch`` although it succeeded.
Only answers that say "not applied, later" (throttling, ``PriorRequestNotComplete``) are repeated, few times, with jitter.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

import boto3
import stamina
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)

from controller.adapters.aws_errors import EXPIRED, EXPIRED_HINT, NOT_RENEWED
from controller.adapters.record_sets import Change, RecordSet, epoch_name, normal_name
from controller.adapters.traffic import NO_CHANGE, BatchRejectedError, CompareAndSetTraffic
from controller.errors import Misconfigured, NotFound, OutcomeUnknown, Refused, Unavailable

if TYPE_CHECKING:
    from mypy_boto3_route53.client import Route53Client
    from mypy_boto3_route53.type_defs import ChangeTypeDef

T = TypeVar("T")

MAX_PAGES = 20
"""Pages of one name: Route 53 keeps at most 100 weighted record sets per name, so more than this is not our zone."""
ATTEMPTS = 5
RETRY_SECONDS = 10.0
"""Time for all attempts of one call. A changed zone is busy for one to a few seconds (``PriorRequestNotComplete``)."""

_LATER = frozenset(
    {"PriorRequestNotComplete", "RequestLimitExceeded", "Throttling", "ThrottlingException", "TooManyRequestsException"}
)
_CREDENTIALS = frozenset(
    {
        "AccessDenied",
        "AccessDeniedException",
        "InvalidClientTokenId",
        "InvalidSignatureException",
        "MissingAuthenticationToken",
        "NotAuthorizedException",
        "OptInRequired",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    }
)


class _LaterError(Exception):
    """Certainly not applied; the provider asks to come again."""


class _ExpiredError(_LaterError):
    """Certainly not applied; the provider of the credentials renews them."""


class _NoAnswerError(Exception):
    """Sent, and then nothing, or a 5xx: applied or not."""


class _NotSentError(Exception):
    """No connection: certainly not applied."""


class Route53Traffic(CompareAndSetTraffic):
    """``Traffic`` over one hosted zone. Needs ListResourceRecordSets, ChangeResourceRecordSets and GetChange, no more."""

    def __init__(
        self,
        zone_id: str,
        name: str,
        *,
        regions: Collection[str],
        ttl_seconds: int,
        endpoint: str | None = None,
        aws_region: str = "us-east-1",
        call_timeout_seconds: float = 2.0,
        page_size: int = 300,
    ) -> None:
        """``endpoint``: for a stand-in; None = AWS. ``page_size``: record sets per page, 1..300.

        Raises Misconfigured for a zone id that Route 53 would not take.
        """
        super().__init__(name, regions=regions, ttl_seconds=ttl_seconds)
        self._zone_id = checked_zone_id(zone_id)
        self._timeout = call_timeout_seconds
        self._page_size = str(page_size)
        self._client = route53_client(endpoint, aws_region=aws_region, call_timeout_seconds=call_timeout_seconds)
        # Threads of our own: calls that hang here must not starve the rest of the process of its default pool.
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="route53")

    async def close(self) -> None:
        """Ends the threads, without waiting for a call in flight (it ends by its own deadline)."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    # ------------------------------------------------------------------------------------------------------ operations

    async def _list(self) -> Sequence[RecordSet]:
        return [*await self._list_name(self.name), *await self._list_name(epoch_name(self.name))]

    async def _list_name(self, name: str) -> list[RecordSet]:
        """All record sets of exactly this name. Listings are ordered by name, so the first other name ends it."""
        found: list[RecordSet] = []
        start: dict[str, str] = {"StartRecordName": name}
        for _ in range(MAX_PAGES):
            page = await self._read_call(
                partial(
                    self._client.list_resource_record_sets,
                    HostedZoneId=self._zone_id,
                    MaxItems=self._page_size,
                    **cast(Any, start),
                )
            )
            for record in page["ResourceRecordSets"]:
                if normal_name(record["Name"]) != name:
                    return found
                found.append(cast(RecordSet, record))
            if not page["IsTruncated"] or normal_name(page["NextRecordName"]) != name:
                return found
            start = {"StartRecordName": page["NextRecordName"], "StartRecordType": page["NextRecordType"]}
            if page.get("NextRecordIdentifier"):
                start["StartRecordIdentifier"] = page["NextRecordIdentifier"]
        raise Refused(f"{name} has more than {MAX_PAGES} pages of records", hint="is this the right zone and name?")

    async def _submit(self, batch: Sequence[Change]) -> str:
        changes = cast(
            "list[ChangeTypeDef]", [{"Action": change.action, "ResourceRecordSet": dict(change.record)} for change in batch]
        )
        call = partial(
            self._client.change_resource_record_sets,
            HostedZoneId=self._zone_id,
            ChangeBatch={"Comment": f"disaster recovery: traffic of {self.name}", "Changes": changes},
        )
        try:
            answer = await self._with_retries(call, (_LaterError, _NotSentError))
        except _NoAnswerError as error:
            raise OutcomeUnknown(f"Route 53 did not answer a change: {error}", hint="read the zone again") from error
        return answer["ChangeInfo"]["Id"].removeprefix("/change/")

    async def in_sync(self, change_id: str) -> bool:
        """Whether all of Route 53's name servers have the change. Raises NotFound, Unavailable."""
        if change_id == NO_CHANGE:
            return True
        answer = await self._read_call(partial(self._client.get_change, Id=change_id))
        return answer["ChangeInfo"]["Status"] == "INSYNC"

    # ----------------------------------------------------------------------------------------------- deadlines, retries

    async def _read_call(self, call: Callable[[], T]) -> T:
        """Reads may be repeated whatever happened to them."""
        try:
            return await self._with_retries(call, (_LaterError, _NotSentError, _NoAnswerError))
        except _NoAnswerError as error:
            raise Unavailable(f"Route 53 did not answer: {error}", hint="wait; its control plane may be down") from error

    async def _with_retries(self, call: Callable[[], T], repeat: tuple[type[Exception], ...]) -> T:
        """Raises _NoAnswerError when that is the last word; other failures as errors of the port."""
        retries = stamina.retry_context(
            on=repeat, attempts=ATTEMPTS, timeout=RETRY_SECONDS, wait_initial=0.1, wait_max=3.0, wait_jitter=0.4
        )
        try:
            async for attempt in retries:
                with attempt:
                    return await self._once(call)
        except _ExpiredError as error:
            raise Unavailable(f"Route 53 does not let us yet: {error}", hint=EXPIRED_HINT) from error
        except _LaterError as error:
            hint = "wait; other tools may use up the account's 5 calls a second"
            raise Unavailable(f"Route 53 is busy: {error}", hint=hint) from error
        except _NotSentError as error:
            raise Unavailable(f"Route 53 cannot be reached: {error}", hint="check the network and the endpoint") from error
        raise AssertionError("a retry context ends with a result or an error")

    async def _once(self, call: Callable[[], T]) -> T:
        try:
            async with asyncio.timeout(self._timeout):
                return await _in_thread(self._threads, call)
        except TimeoutError:
            raise _NoAnswerError(f"nothing within {self._timeout:g} s") from None
        except ClientError as error:
            raise _sorted(error, self._zone_id) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise Misconfigured(f"no AWS credentials for Route 53: {error}", hint="give the process a role") from error
        except NOT_RENEWED as error:
            raise _ExpiredError(f"credentials could not be renewed: {error}") from error
        except (EndpointConnectionError, ConnectTimeoutError) as error:
            raise _NotSentError(str(error)) from error
        except ParamValidationError as error:
            raise Refused(f"Route 53's own client refused the call: {error}", hint="correct the records of the zone") from error
        except BotoCoreError as error:
            raise _NoAnswerError(str(error)) from error


def _in_thread(threads: ThreadPoolExecutor, call: Callable[[], T]) -> Awaitable[T]:
    return asyncio.get_running_loop().run_in_executor(threads, call)


def _sorted(error: ClientError, zone_id: str) -> Exception:
    """What an error answer means: later, unknown, a rejected batch, or an error of the port."""
    details: Mapping[str, Any] = error.response.get("Error", {})
    code, text = str(details.get("Code", "")), str(details.get("Message", error))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in _LATER or status == 429:
        return _LaterError(f"{code}: {text}")
    if code in EXPIRED:
        return _ExpiredError(f"{code}: {text}")
    if code == "InvalidChangeBatch":
        return BatchRejectedError(text)
    if code == "NoSuchHostedZone":
        hint = "check traffic.zone_id and the AWS account"
        return Misconfigured(f"there is no hosted zone {zone_id} in this account", hint=hint)
    if code == "NoSuchChange":
        return NotFound(f"Route 53 knows no such change: {text}", hint="confirm with DNS itself")
    if code in _CREDENTIALS:
        return Misconfigured(f"Route 53 does not let us: {code}: {text}", hint="check the role and its policy")
    if status >= 500 or not status:
        return _NoAnswerError(f"{status} {code}: {text}")
    return Refused(f"Route 53 refused the call: {code}: {text}", hint="read the message; the same call will be refused again")


# ------------------------------------------------------------------------------------------------------------- the client


def checked_zone_id(zone_id: str) -> str:
    """A bare hosted zone id (``Z`` and up to 31 capitals and digits). Raises Misconfigured otherwise."""
    if "/" in zone_id:
        bare = zone_id.rsplit("/", 1)[1]
        raise Misconfigured(f"zone id {zone_id!r} must not have a prefix", hint=f"set traffic.zone_id to {bare!r}")
    if not 1 <= len(zone_id) <= 32 or not zone_id.isascii() or not zone_id.isalnum():
        hint = "copy it from the Route 53 console; it looks like Z0123456789"
        raise Misconfigured(f"zone id {zone_id[:60]!r} is not a hosted zone id", hint=hint)
    return zone_id


def route53_client(endpoint: str | None, *, aws_region: str, call_timeout_seconds: float) -> Route53Client:
    """A boto3 client with one attempt per call, whose sockets give up before the call's deadline does.

    A stand-in on loopback gets made-up credentials, so that real ones never travel to it.
    """
    config = Config(
        connect_timeout=call_timeout_seconds / 2,
        read_timeout=call_timeout_seconds,
        retries={"total_max_attempts": 1, "mode": "standard"},
        max_pool_connections=4,
    )
    made_up = {"aws_access_key_id": "test", "aws_secret_access_key": "test"} if endpoint and _is_loopback(endpoint) else {}
    session = boto3.session.Session(region_name=aws_region, **cast(Any, made_up))
    return session.client("route53", endpoint_url=endpoint, config=config)


def _is_loopback(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
