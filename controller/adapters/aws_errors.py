"""What an error of the AWS SDK means to a caller: wait, correct a setting, or look again because it may have been applied.

The question that decides: *can the request have been applied?* Only what is known not to have been applied becomes plain
``Unavailable``; everything else becomes ``OutcomeUnknown`` (which is an ``Unavailable`` too), and whoever made a mutating
call reads back.

Sources: the "Common errors" pages of S3 and DynamoDB, "Error retries" of the SDK reference guide, aiobotocore's
``httpsession`` (which turns a reset in the middle of a request into ``EndpointConnectionError``, the same class as a
refused connection: hence ``_never_sent``).
"""

from __future__ import annotations

from typing import Any

import aiohttp
from botocore import exceptions as sdk

from controller.domain.text import visible
from controller.errors import Corrupt, DrError, Misconfigured, NotFound, OutcomeUnknown, Refused, Unavailable

SDK_ERRORS: tuple[type[BaseException], ...] = (sdk.ClientError, sdk.BotoCoreError, aiohttp.ClientError, TimeoutError, OSError)
"""Everything that a call may raise about the outside world. Anything else is a bug and passes through."""

CONDITION_FAILED = frozenset({"ConditionalCheckFailedException", "PreconditionFailed", "412"})
MISSING = frozenset({"NoSuchKey", "404", "NotFound"})

_NOT_APPLIED = frozenset({
    # Throttled: turned away at the door.
    "ThrottlingException", "Throttling", "ThrottledException", "RequestThrottled", "RequestThrottledException",
    "ProvisionedThroughputExceededException", "RequestLimitExceeded", "LimitExceededException", "TooManyRequestsException",
    "SlowDown", "PriorRequestNotComplete",
    # Lost a race against another writer; nothing was written.
    "ConditionalRequestConflict", "OperationAborted", "TransactionConflictException", "TransactionInProgressException",
    # Damaged or late on the way there.
    "BadDigest", "IncompleteBody", "RequestTimeout", "RequestTimeoutException", "XAmzContentSHA256Mismatch",
})  # fmt: skip

# Expired credentials are "wait", not "correct a setting": the provider (instance role, web identity) renews them by itself,
# the next call signs with the new ones, and a controller that gave up on them in the middle of a promotion would have to be
# restarted by hand. One rule for every service: stores, KMS and STS get it from ``translate``, Route 53 from these names.
EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"})
EXPIRED_HINT = "credentials have expired: they are renewed by their provider; look at it if this stays"
NOT_RENEWED = (sdk.CredentialRetrievalError, sdk.TokenRetrievalError, sdk.MetadataRetrievalError)
"""The provider of the credentials did not answer: nothing was sent."""
NOT_RENEWED_HINT = "look at the provider of the credentials"

_MISCONFIGURED = {
    "NoSuchBucket": "create the bucket or correct `bucket`",
    "InvalidBucketName": "correct `bucket`",
    "ResourceNotFoundException": "create the table or correct `table` and `aws_region`",
    "AccessDenied": "let this role read and write the bucket and the table, and use their KMS key",
    "AccessDeniedException": "let this role read and write the table, and use its KMS key",
    "AllAccessDisabled": "the account or the bucket is closed: ask AWS support",
    "403": "let this role read and write the bucket; a HEAD request does not say more",
    "PermanentRedirect": "the bucket is in another region: correct `aws_region` or `s3_endpoint`",
    "301": "the bucket is in another region: correct `aws_region` or `s3_endpoint`",
    "AuthorizationHeaderMalformed": "the bucket is in another region: correct `aws_region`",
    "IllegalLocationConstraintException": "the bucket is in another region: correct `aws_region`",
    "InvalidAccessKeyId": "correct the credentials",
    "InvalidClientTokenId": "correct the credentials",
    "UnrecognizedClientException": "correct the credentials",
    "SignatureDoesNotMatch": "correct the credentials; also compare this machine's clock",
    "InvalidSignatureException": "correct the credentials; also compare this machine's clock",
    "MissingAuthenticationToken": "give this process credentials",
    "RequestTimeTooSkewed": "correct this machine's clock (NTP)",
    "OptInRequired": "enable the region in the AWS account",
    "KMS.DisabledException": "enable the KMS key of the bucket",
    "KMSAccessDeniedException": "let this role use the KMS key",
}


def error_code(error: sdk.ClientError) -> str:
    """AWS' own code for the error, or the HTTP status where there is no body (HEAD)."""
    details: dict[str, Any] = dict(error.response.get("Error", {}))
    return str(details.get("Code", ""))


def translate(error: BaseException, *, doing: str) -> DrError:
    """The error of ours that says what to do next. ``doing`` names call and object, for example ``PutObject dr/g/s/1.seg in
    eu-west-1``.
    """
    if isinstance(error, sdk.ClientError):
        return _answered(error, doing)
    if isinstance(error, sdk.NoCredentialsError | sdk.PartialCredentialsError):
        return Misconfigured(
            f"{doing}: no AWS credentials were found", hint="give this process a role, or set AWS_ACCESS_KEY_ID and its secret"
        )
    if isinstance(error, NOT_RENEWED):
        return Unavailable(f"{doing}: credentials could not be renewed: {_short(error)}", hint=NOT_RENEWED_HINT)
    if isinstance(
        error,
        sdk.NoRegionError | sdk.InvalidRegionError | sdk.InvalidConfigError | sdk.ProfileNotFound | sdk.UnknownEndpointError,
    ):
        return Misconfigured(f"{doing}: {_short(error)}", hint="correct `aws_region` or the endpoints")
    if isinstance(error, sdk.ParamValidationError):
        return Refused(f"{doing}: {_short(error)}", hint="this is an error of the caller")
    if isinstance(error, sdk.SSLError):
        return Unavailable(
            f"{doing}: TLS failed: {_short(error)}", hint="compare the endpoint's certificate and this machine's CA bundle"
        )
    if _never_sent(error):
        return Unavailable(f"{doing}: no connection: {_short(error)}", hint="look at the network between here and the endpoint")
    # Resets, time-outs, cut or garbled answers: the request may be on its way, or applied.
    return OutcomeUnknown(f"{doing}: no answer: {_short(error)}", hint="it may have been applied: read before repeating")


def _answered(error: sdk.ClientError, doing: str) -> DrError:
    code = error_code(error)
    metadata: dict[str, Any] = dict(error.response.get("ResponseMetadata", {}))
    status = int(metadata.get("HTTPStatusCode", 0))
    message = f"{doing}: {code or status}: {_short(str(dict(error.response.get('Error', {})).get('Message', '')))}"
    if code in _NOT_APPLIED or status == 429:
        return Unavailable(message, hint="turned away: wait, or raise the limit that is named")
    if code in EXPIRED:
        return Unavailable(message, hint=EXPIRED_HINT)
    if code == "400":  # a HEAD request says no more, and expired credentials are what nearly always is behind it
        return Unavailable(message, hint=f"probably {EXPIRED_HINT}, and at `aws_region`")
    if code in _MISCONFIGURED:
        return Misconfigured(message, hint=_MISCONFIGURED[code])
    if code in MISSING:
        return NotFound(message, hint="list what exists: it may lie under another epoch")
    if code == "InvalidObjectState":
        return Corrupt(message, hint="the object was archived: restore it in S3; no lifecycle rule may touch segments")
    if status >= 500:
        return OutcomeUnknown(message, hint="the service has trouble; it may have been applied: read before repeating")
    return Refused(message, hint="the service does not accept this request as it is")


def _never_sent(error: BaseException) -> bool:
    if isinstance(error, sdk.ConnectTimeoutError | sdk.ProxyConnectionError):
        return True
    cause: object = getattr(error, "kwargs", {}).get("error", error)
    # A connector error arises before a byte of the request is written; every other aiohttp error may arise after.
    return isinstance(cause, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)


def _short(text: object) -> str:
    """One printable line: error texts come from outside and end in logs and terminals."""
    return visible(text, 300)
