"""What an HTTP request to AWS is to IAM (operation, action, resources, condition keys), and whether a policy allows it.

Sources of the table: Service Authorization Reference, "Actions, resources, and condition keys for" S3, DynamoDB, KMS, Route 53
(https://docs.aws.amazon.com/service-authorization/latest/reference/); S3 user guide, "Required permissions for Amazon S3 API
operations" and "Enforce conditional writes"; Route 53 developer guide, "Using IAM policy conditions for fine-grained access
control". The evaluation is that of the IAM user guide, "Policy evaluation logic", for identity policies of one account.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from defusedxml.ElementTree import fromstring

FOLDER = Path(__file__).resolve().parents[2] / "terraform" / "modules" / "iam" / "policies"
ACCOUNT = "123456789012"

ACTION_OF = {
    # Reading the metadata of an object is reading it.
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    # "To perform a multipart upload … you must have s3:PutObject", for every step but the abort.
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    # One for each key of the request.
    "DeleteObjects": "s3:DeleteObject",
    "ListObjectsV2": "s3:ListBucket",
    "GetItem": "dynamodb:GetItem",
    "PutItem": "dynamodb:PutItem",
    "UpdateItem": "dynamodb:UpdateItem",
    "DeleteItem": "dynamodb:DeleteItem",
    "Query": "dynamodb:Query",
    "BatchWriteItem": "dynamodb:BatchWriteItem",
    "GenerateDataKey": "kms:GenerateDataKey",
    "Encrypt": "kms:Encrypt",
    "Decrypt": "kms:Decrypt",
    "ListResourceRecordSets": "route53:ListResourceRecordSets",
    "ChangeResourceRecordSets": "route53:ChangeResourceRecordSets",
    "GetChange": "route53:GetChange",
}


@dataclass(frozen=True)
class Call:
    """One request as IAM sees it. ``context``: condition keys that the request carries, each with all of its values."""

    operation: str
    resources: tuple[str, ...]
    context: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def action(self) -> str:
        return ACTION_OF[self.operation]


# ------------------------------------------------------------------------------------------------------------ from the wire


def call_of(raw: bytes, aws_region: str) -> Call:
    """The IAM view of a recorded HTTP request: path-style S3, DynamoDB's JSON, Route 53's XML."""
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    method, target, _ = first.split(" ")
    if "chunked" in headers.get("transfer-encoding", ""):
        body = _unchunked(body)
    url = urlsplit(target)
    if headers.get("x-amz-target", "").startswith("TrentService."):
        return _kms(headers["x-amz-target"].partition(".")[2], json.loads(body))
    if "x-amz-target" in headers:
        return _dynamodb(headers["x-amz-target"].partition(".")[2], json.loads(body), aws_region)
    if url.path.startswith("/2013-04-01/"):
        return _route53(method, url.path, body)
    return _s3(method, unquote(url.path), parse_qs(url.query, keep_blank_values=True), headers, body)


def _unchunked(body: bytes) -> bytes:
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size.split(b";")[0], 16)
        parts.append(body[:length])
        body = body[length + 2 :]
        if length == 0:
            break
    return b"".join(parts)


def _dynamodb(operation: str, document: Mapping[str, Any], aws_region: str) -> Call:
    if operation == "BatchWriteItem":
        tables = document["RequestItems"]
        requests = [request for batch in tables.values() for request in batch]
        keys = [
            request["PutRequest"]["Item"] if "PutRequest" in request else request["DeleteRequest"]["Key"]
            for request in requests
        ]
    else:
        tables, keys = [document["TableName"]], [document.get("Key") or document.get("Item") or _queried(document)]
    return Call(
        operation,
        tuple(f"arn:aws:dynamodb:{aws_region}:{ACCOUNT}:table/{table}" for table in tables),
        {"dynamodb:LeadingKeys": tuple(key["pk"]["S"] for key in keys)},
    )


def _kms(operation: str, document: Mapping[str, Any]) -> Call:
    context = {f"kms:EncryptionContext:{key}": (value,) for key, value in document.get("EncryptionContext", {}).items()}
    return Call(operation, (document["KeyId"],), context)


def _queried(document: Mapping[str, Any]) -> dict[str, Any]:
    """The partition that a query reads."""
    assert "#pk = :pk" in document["KeyConditionExpression"]
    return {"pk": document["ExpressionAttributeValues"][":pk"]}


def _route53(method: str, path: str, body: bytes) -> Call:
    parts = path.removeprefix("/2013-04-01/").rstrip("/").split("/")
    if parts[0] == "change":
        return Call("GetChange", (f"arn:aws:route53:::change/{parts[1]}",))
    zone = f"arn:aws:route53:::hostedzone/{parts[1]}"
    assert parts[0] == "hostedzone"
    assert parts[2] == "rrset"
    if method == "GET":
        return Call("ListResourceRecordSets", (zone,))
    texts: dict[str, list[str]] = {"Name": [], "Type": [], "Action": []}
    for element in fromstring(body).iter():
        tag = element.tag.rpartition("}")[2]
        if tag in texts:
            texts[tag].append(element.text or "")
    prefix = "route53:ChangeResourceRecordSets"
    return Call(
        "ChangeResourceRecordSets",
        (zone,),
        {
            f"{prefix}NormalizedRecordNames": tuple(name.lower().removesuffix(".") for name in texts["Name"]),
            f"{prefix}RecordTypes": tuple(texts["Type"]),
            f"{prefix}Actions": tuple(texts["Action"]),
        },
    )


def _s3(method: str, path: str, query: Mapping[str, list[str]], headers: Mapping[str, str], body: bytes) -> Call:
    bucket, _, key = path.lstrip("/").partition("/")
    arn = f"arn:aws:s3:::{bucket}"
    if not key:
        if method == "GET":
            prefix = query.get("prefix")
            return Call("ListObjectsV2", (arn,), {"s3:prefix": tuple(prefix)} if prefix else {})
        assert method == "POST"
        assert "delete" in query
        keys = [element.text or "" for element in fromstring(body).iter() if element.tag.rpartition("}")[2] == "Key"]
        return Call("DeleteObjects", tuple(f"{arn}/{name}" for name in keys))
    operation = _object_operation(method, query)
    context = {}
    if ACTION_OF[operation] == "s3:PutObject":
        made = operation in ("PutObject", "CompleteMultipartUpload")
        context["s3:ObjectCreationOperation"] = ("true" if made else "false",)
        for header in ("if-match", "if-none-match"):
            if header in headers:
                context[f"s3:{header}"] = (headers[header],)
    return Call(operation, (f"{arn}/{key}",), context)


def _object_operation(method: str, query: Mapping[str, list[str]]) -> str:
    if method == "POST":
        return "CreateMultipartUpload" if "uploads" in query else "CompleteMultipartUpload"
    if method == "PUT":
        return "UploadPart" if "partNumber" in query else "PutObject"
    return {"GET": "GetObject", "HEAD": "HeadObject", "DELETE": "AbortMultipartUpload"}[method]


# ---------------------------------------------------------------------------------------------------------------- policies


def rendered(name: str, **values: object) -> dict[str, Any]:
    """A template as Terraform's ``templatefile`` renders it, as far as ours go: ``${name}`` and ``${jsonencode(name)}``."""
    text = (FOLDER / f"{name}.json.tftpl").read_text(encoding="utf-8")
    text = re.sub(r"\$\{jsonencode\((\w+)\)\}", lambda found: json.dumps(values[found[1]]), text)
    text = re.sub(r"\$\{(\w+)\}", lambda found: str(values[found[1]]), text)
    assert "${" not in text
    document: dict[str, Any] = json.loads(text)
    return document


def listed(value: object) -> list[str]:
    return [value] if isinstance(value, str) else list(value)  # type: ignore[call-overload]


def allowed(policies: Sequence[Mapping[str, Any]], call: Call, tags: Mapping[str, str] | None = None) -> bool:
    """Whether every resource of the call is allowed by some statement and denied by none. ``tags``: of the resources."""
    context = {**call.context, **{f"aws:ResourceTag/{key}": (value,) for key, value in (tags or {}).items()}}
    return bool(call.resources) and all(_decided(policies, call.action, resource, context) for resource in call.resources)


def _decided(policies: Sequence[Mapping[str, Any]], action: str, resource: str, context: Mapping[str, Sequence[str]]) -> bool:
    effects = {
        statement["Effect"]
        for policy in policies
        for statement in policy["Statement"]
        if _applies(statement, action, resource, context)
    }
    return effects == {"Allow"}


def _applies(statement: Mapping[str, Any], action: str, resource: str, context: Mapping[str, Sequence[str]]) -> bool:
    named = {"Sid", "Effect", "Action", "NotAction", "Resource", "Condition"}
    assert set(statement) <= named, "an element that this evaluation does not know"
    if "NotAction" in statement:
        if _matches(statement["NotAction"], action.lower(), lower=True):
            return False
    elif not _matches(statement["Action"], action.lower(), lower=True):
        return False
    if not _matches(statement["Resource"], resource):
        return False
    conditions = statement.get("Condition", {})
    return all(
        _holds(operator, context.get(key), listed(wanted))
        for operator, keys in conditions.items()
        for key, wanted in keys.items()
    )


def _matches(patterns: object, value: str, *, lower: bool = False) -> bool:
    return any(_like(pattern.lower() if lower else pattern, value) for pattern in listed(patterns))


def _like(pattern: str, value: str) -> bool:
    """``*`` and ``?`` and nothing else are special in IAM."""
    return fnmatchcase(value, pattern.replace("[", "[[]"))


def _holds(operator: str, values: Sequence[str] | None, wanted: Sequence[str]) -> bool:
    if operator == "Null":
        return (values is None) == (wanted == ["true"])
    if operator in ("ForAllValues:StringLike", "ForAllValues:StringEquals"):
        same = _like if operator.endswith("Like") else str.__eq__
        return all(any(same(pattern, value) for pattern in wanted) for value in values or ())
    if operator.endswith("IfExists"):
        return values is None or _holds(operator.removesuffix("IfExists"), values, wanted)
    if values is None:
        return False
    assert len(values) == 1, f"{operator} of a key with several values"
    if operator == "StringLike":
        return any(_like(pattern, values[0]) for pattern in wanted)
    assert operator in ("StringEquals", "Bool"), f"{operator} is not known here"
    return values[0] in wanted


def granted(policy: Mapping[str, Any]) -> set[str]:
    """Every action that some statement allows. No wildcards are expanded: ours have none."""
    actions = [
        action for statement in policy["Statement"] if statement["Effect"] == "Allow" for action in listed(statement["Action"])
    ]
    assert not any("*" in action for action in actions)
    return set(actions)


def documents(
    *,
    group: str,
    buckets: Iterable[str],
    tables: Iterable[str],
    zone: str,
    name: str,
    keys: Sequence[str] = (),
    prefix: str = "dr",
    tag: str = "agent-dr-environment",
) -> dict[str, dict[str, Any]]:
    """The policies with the values that ``main.tf`` gives their templates. ``tables``: ARNs."""
    bucket_arns = [f"arn:aws:s3:::{bucket}" for bucket in buckets]
    object_arns = [f"{arn}/{prefix}/{group}/*" for arn in bucket_arns]
    plain = name.lower().removesuffix(".")
    copies = {
        "bucket_arns": bucket_arns,
        "object_arns": object_arns,
        "table_arns": list(tables),
        "list_prefixes": [f"{prefix}/{group}/*"],
        "leading_keys": [f"{group}#*"],
        "all_arns": [*bucket_arns, *object_arns, *tables],
        "environment_tag": tag,
    }
    zone_values = {
        "zone_arn": f"arn:aws:route53:::hostedzone/{zone}",
        "change_arn": "arn:aws:route53:::change/*",
        "record_names": [plain, f"_dr-epoch.{plain}"],
    }
    return {
        "streaming": rendered("streaming", **copies),
        "promotion": rendered("promotion", **zone_values),
        "drills": rendered("drills", **copies),
        **({name: rendered(name, key_arns=list(keys), group=group) for name in ("sealing", "unsealing")} if keys else {}),
    }
