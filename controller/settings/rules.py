"""Rules between values of the settings, and on the files that they name. Each broken one is a ``Problem``.

What only the outside world can tell (a bucket in another region, an old etcd, endpoints of two clusters) is checked by the
adapters and by the promotion's ``check`` step, not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from datetime import datetime
from ipaddress import ip_address, ip_network
from pathlib import Path
from urllib.parse import urlsplit

from controller.domain.outward import address_problem
from controller.settings import tls
from controller.settings.model import Settings
from controller.settings.tls import TlsFiles
from controller.settings.values import Problem, is_loopback, nearest, shown

LEAST_RETENTION_SECONDS = 300.0
RETENTION_RPOS = 20
SNAPSHOTS_IN_RETENTION = 4


def problems(settings: Settings, now: datetime) -> Iterator[Problem]:
    """Every broken rule that concerns more than one value, or a file. ``now``: for certificates."""
    checks: list[Callable[[Settings], Iterator[Problem]]] = [
        _lease_rules, _endpoint_rules, _api_rules, _region_rules, _encryption_rules, _stream_rules, _promotion_rules,
        _fleet_rules, _notify_rules, _file_rules,
    ]  # fmt: skip
    checks.append(_production_rules if settings.environment == "production" else _lab_rules)
    for check in checks:
        yield from check(settings)
    for files in tls_files(settings):
        yield from tls.problems(files, now)


def tls_files(settings: Settings) -> tuple[TlsFiles, ...]:
    """The TLS files of every section."""
    etcd, api = settings.etcd, settings.api
    return (
        TlsFiles("etcd", etcd.ca_file, etcd.cert_file, etcd.key_file),
        TlsFiles("api", api.ca_file, api.cert_file, api.key_file, api.client_ca_file),
    )


def controller_name(group: str, region: str, instance: str) -> str:
    """The URI in a controller's certificate that says which one it is."""
    return f"drctl://{group}/{region}/{instance}"


def _lease_rules(settings: Settings) -> Iterator[Problem]:
    """RELIABILITY finding 7: the smallest TTL that etcd grants is 1.5 times the election timeout."""
    etcd = settings.etcd
    ttl, margin, tick, call = etcd.ttl_seconds, etcd.margin_seconds, etcd.tick_seconds, etcd.call_timeout_seconds
    least = 1.5 * etcd.election_timeout_seconds
    if ttl < least:
        rule = f"must be at least 1.5 times etcd.election_timeout_seconds ({least:g}): etcd grants no shorter lease"
        yield Problem(("etcd.ttl_seconds", "etcd.election_timeout_seconds"), str(ttl), rule, f"set {math.ceil(least)} or more")
    if margin >= ttl / 2:
        rule = f"must be less than half of etcd.ttl_seconds ({ttl / 2:g}): the holder would hardly ever have the right to act"
        yield Problem(("etcd.margin_seconds", "etcd.ttl_seconds"), f"{margin:g}", rule, "1 is usual")
        return
    if 2 * tick + margin >= ttl:
        rule = f"two ticks and etcd.margin_seconds must be less than etcd.ttl_seconds ({2 * tick:g} + {margin:g} < {ttl})"
        hint = "else one missed heartbeat costs the lease; tick faster or raise the TTL"
        yield Problem(("etcd.tick_seconds", "etcd.margin_seconds", "etcd.ttl_seconds"), f"{tick:g}", rule, hint)
    if 3 * call + margin >= ttl:
        rule = f"three calls (a heartbeat) and etcd.margin_seconds must fit into the TTL ({3 * call:g} + {margin:g} < {ttl})"
        names = ("etcd.call_timeout_seconds", "etcd.margin_seconds", "etcd.ttl_seconds")
        yield Problem(names, f"{call:g}", rule, "shorten the deadline or raise the TTL")


def _endpoint_rules(settings: Settings) -> Iterator[Problem]:
    etcd = settings.etcd
    if len({urlsplit(url).scheme for url in etcd.endpoints}) > 1:
        yield Problem(("etcd.endpoints",), shown(etcd.endpoints), "must be all http or all https: they are one cluster")
    if (etcd.cert_file is None) != (etcd.key_file is None):
        missing = "etcd.key_file" if etcd.key_file is None else "etcd.cert_file"
        yield Problem((missing, "etcd.cert_file", "etcd.key_file"), "(missing)", "certificate and key belong together")
    if (etcd.username is None) != (etcd.password is None):
        missing = "etcd.password" if etcd.password is None else "etcd.username"
        yield Problem((missing, "etcd.username", "etcd.password"), "(missing)", "user name and password belong together")
    if not settings.api.address:
        rule = "is required when api.host stands for every address of this machine"
        yield Problem(("api.address", "api.host"), "(missing)", rule, "give the URL at which the others reach this instance")


def _api_rules(settings: Settings) -> Iterator[Problem]:
    api = settings.api
    if (api.cert_file is None) != (api.key_file is None):
        missing = "api.key_file" if api.key_file is None else "api.cert_file"
        yield Problem((missing, "api.cert_file", "api.key_file"), "(missing)", "certificate and key belong together")
        return
    if api.access_file is not None and api.address.startswith("http://") and not is_loopback(urlsplit(api.address).hostname):
        rule = "must be https when callers show tokens (api.access_file): whoever reads one on its way has it"
        yield Problem(("api.address", "api.access_file"), shown(api.address), rule)
    if api.access_file is not None and api.client_ca_file is None and api.peer_token_file is None:
        rule = "needs api.client_ca_file (or api.peer_token_file): else this group's own controllers would be refused"
        yield Problem(("api.access_file", "api.client_ca_file", "api.peer_token_file"), shown(api.access_file), rule)
    if api.cert_file is None:
        if api.client_ca_file is not None:
            rule = "needs api.cert_file and api.key_file: client certificates travel in TLS only"
            yield Problem(("api.client_ca_file", "api.cert_file"), shown(api.client_ca_file), rule)
        return
    if api.address.startswith("http://"):
        rule = "must be https: this API speaks TLS (api.cert_file)"
        yield Problem(("api.address", "api.cert_file"), shown(api.address), rule)
    if api.ca_file is None:
        rule = "is required with api.cert_file: this instance calls other controllers too"
        yield Problem(("api.ca_file", "api.cert_file"), "(missing)", rule, "name the authority of the group's certificates")
    names = tls.names_in(api.cert_file)
    host = urlsplit(api.address).hostname
    if names is None:
        return
    if host and not tls.covers(names, host):
        rule = f"does not name {host} (api.address): nobody would connect"
        yield Problem(("api.cert_file", "api.address"), shown(api.cert_file), rule, "put it among the alternative names")
    own = controller_name(settings.group, settings.region, settings.instance)
    if api.client_ca_file is not None and not names & {own, *api.peer_names}:
        rule = f"names neither {own} nor one of api.peer_names: no other controller would let this one in"
        yield Problem(("api.cert_file", "api.client_ca_file", "api.peer_names"), shown(api.cert_file), rule,
                      "put that URI among the alternative names")  # fmt: skip


def _region_rules(settings: Settings) -> Iterator[Problem]:
    if settings.region not in settings.regions:
        known = sorted(settings.regions)
        hint = nearest(settings.region, known) or f"known: {', '.join(known)}"
        yield Problem(("region", "regions"), shown(settings.region), "is not one of [regions]", hint)
    seen: dict[tuple[str, ...], str] = {}
    for name, region in settings.regions.items():
        at = f"regions.{name}"
        things: list[tuple[str, str, tuple[str, ...]]] = [
            ("bucket", region.bucket, ()),
            # The same table name in different AWS regions is two tables.
            ("table", region.table, (region.aws_region, region.dynamodb_endpoint or "")),
            *(("addresses", address, ()) for address in region.addresses),
            *(("controllers", url, ()) for url in region.controllers),
        ]
        for field, value, scope in things:
            other = seen.setdefault((field, value, *scope), name)
            if other != name:
                rule = f"is that of region {other} too: two copies in one place are one copy"
                if field in {"addresses", "controllers"}:
                    rule = f"is that of region {other} too: nobody could tell which of the two answered"
                yield Problem((f"{at}.{field}", f"regions.{other}.{field}"), shown(value), rule, "give each region its own")


def _encryption_rules(settings: Settings) -> Iterator[Problem]:
    with_key = [name for name, region in settings.regions.items() if region.kms_key is not None]
    for name, region in settings.regions.items():
        field, key = f"regions.{name}.kms_key", region.kms_key
        if key is None and (with_key or settings.encryption.enabled):
            rule = "is required in every region as soon as encryption is on or one region has a key"
            hint = "create a symmetric key there; a copy must open without any other region's KMS"
            yield Problem((field, "encryption.enabled", "regions"), "(missing)", rule, hint)
        for one in (key, *region.former_kms_keys):
            if one is not None and one.startswith("arn:") and one.split(":")[3] != region.aws_region:
                rule = (
                    f"lies in {one.split(':')[3]} and must lie in {region.aws_region}: two regions with one KMS fail together"
                )
                yield Problem((field, f"regions.{name}.aws_region"), shown(one), rule, "create a key, or a replica, there")


def _stream_rules(settings: Settings) -> Iterator[Problem]:
    stream, rpo = settings.stream, settings.rpo
    if stream.copies > len(settings.regions):
        rule = f"must be at most the number of regions ({len(settings.regions)})"
        yield Problem(("stream.copies", "regions"), str(stream.copies), rule, "2 survives the loss of any one region")
    if rpo.seconds <= stream.flush_seconds:
        rule = (
            f"must be more than stream.flush_seconds ({stream.flush_seconds:g}): a record may wait that long before it leaves"
        )
        yield Problem(("rpo.seconds", "stream.flush_seconds"), f"{rpo.seconds:g}", rule)
    if stream.ack_timeout_seconds <= stream.flush_seconds:
        rule = f"must be more than stream.flush_seconds ({stream.flush_seconds:g})"
        yield Problem(("stream.ack_timeout_seconds", "stream.flush_seconds"), f"{stream.ack_timeout_seconds:g}", rule)
    least = max(LEAST_RETENTION_SECONDS, RETENTION_RPOS * rpo.seconds)
    if stream.retention_seconds < least:
        rule = (
            f"must be at least {least:g}: a store that is away for so long is seeded anew, and a poisoned checkpoint has to be "
            f"noticed within it (at least {LEAST_RETENTION_SECONDS:g} s and {RETENTION_RPOS} times rpo.seconds)"
        )
        yield Problem(("stream.retention_seconds", "rpo.seconds"), f"{stream.retention_seconds:g}", rule, "7 days is usual")
    if stream.snapshot_seconds * SNAPSHOTS_IN_RETENTION > stream.retention_seconds:
        most = stream.retention_seconds / SNAPSHOTS_IN_RETENTION
        rule = f"must be at most a quarter of stream.retention_seconds ({most:g}): bases overtake older snapshots"
        names = ("stream.snapshot_seconds", "stream.retention_seconds")
        yield Problem(names, f"{stream.snapshot_seconds:g}", rule, "300 is usual")
    for field, size in (("segment_max_bytes", stream.segment_max_bytes), ("body_max_bytes", stream.body_max_bytes)):
        if size > stream.queue_max_bytes:
            rule = f"must be at most stream.queue_max_bytes ({stream.queue_max_bytes}): it could never wait there"
            yield Problem((f"stream.{field}", "stream.queue_max_bytes"), str(size), rule)


def _promotion_rules(settings: Settings) -> Iterator[Problem]:
    promotion, ttl = settings.promotion, settings.etcd.ttl_seconds
    if promotion.break_glass_approvals > promotion.approvals_required:
        rule = f"must be at most promotion.approvals_required ({promotion.approvals_required})"
        names = ("promotion.break_glass_approvals", "promotion.approvals_required")
        yield Problem(names, str(promotion.break_glass_approvals), rule)
    if promotion.approval_ttl_seconds > promotion.plan_ttl_seconds:
        rule = f"must be at most promotion.plan_ttl_seconds ({promotion.plan_ttl_seconds:g}): an approval dies with its plan"
        names = ("promotion.approval_ttl_seconds", "promotion.plan_ttl_seconds")
        yield Problem(names, f"{promotion.approval_ttl_seconds:g}", rule)
    if promotion.approval_ttl_seconds <= 2 * ttl:
        rule = f"must be more than two lease TTLs ({2 * ttl}): that much must be left when authority moves"
        yield Problem(("promotion.approval_ttl_seconds", "etcd.ttl_seconds"), f"{promotion.approval_ttl_seconds:g}", rule)
    if promotion.confirm_timeout_seconds <= settings.traffic.ttl_seconds:
        rule = f"must be more than traffic.ttl_seconds ({settings.traffic.ttl_seconds}): the old answer lives that long"
        names = ("promotion.confirm_timeout_seconds", "traffic.ttl_seconds")
        yield Problem(names, f"{promotion.confirm_timeout_seconds:g}", rule)


def _fleet_rules(settings: Settings) -> Iterator[Problem]:
    fleet, etcd = settings.fleet, settings.etcd
    if fleet.misses_failed <= fleet.misses_degraded:
        rule = f"must be more than fleet.misses_degraded ({fleet.misses_degraded}): a host degrades before it fails"
        yield Problem(("fleet.misses_failed", "fleet.misses_degraded"), str(fleet.misses_failed), rule)
    if fleet.beat_seconds + etcd.margin_seconds >= etcd.ttl_seconds:
        rule = f"with etcd.margin_seconds it must be less than etcd.ttl_seconds ({etcd.ttl_seconds}): rights end between beats"
        yield Problem(("fleet.beat_seconds", "etcd.margin_seconds", "etcd.ttl_seconds"), f"{fleet.beat_seconds:g}", rule)
    if settings.aws.connect_timeout_seconds > settings.aws.call_timeout_seconds:
        rule = f"must be at most aws.call_timeout_seconds ({settings.aws.call_timeout_seconds:g}): it is part of the call"
        names = ("aws.connect_timeout_seconds", "aws.call_timeout_seconds")
        yield Problem(names, f"{settings.aws.connect_timeout_seconds:g}", rule)


def _notify_rules(settings: Settings) -> Iterator[Problem]:
    """A name's addresses are judged when it is connected to; a literal one can be judged now."""
    notify = settings.notify
    allowed = [ip_network(text) for text in notify.networks]
    try:
        address = ip_address(urlsplit(notify.webhook_url or "").hostname or "")
    except ValueError:
        return
    if problem := address_problem(address, allowed):
        names = ("notify.webhook_url", "notify.networks")
        yield Problem(names, "(hidden)", f"leads inside: {problem}", "put its network into notify.networks if that is meant")


def _file_rules(settings: Settings) -> Iterator[Problem]:
    if settings.state_dir.exists() and not settings.state_dir.is_dir():
        yield Problem(("state_dir",), shown(settings.state_dir), "is a file", "name a folder; it is made when it is missing")


def _own_urls(settings: Settings) -> Iterator[tuple[str, str]]:
    """Every URL that is ours to call or to be called at, with its field."""
    yield from (("etcd.endpoints", url) for url in settings.etcd.endpoints)
    for name, region in settings.regions.items():
        yield from ((f"regions.{name}.controllers", url) for url in region.controllers)
    yield "api.address", settings.api.address
    yield from _aws_urls(settings)


def _aws_urls(settings: Settings) -> Iterator[tuple[str, str]]:
    for name, region in settings.regions.items():
        endpoints = (region.s3_endpoint, region.dynamodb_endpoint, region.kms_endpoint)
        for field, url in zip(("s3_endpoint", "dynamodb_endpoint", "kms_endpoint"), endpoints, strict=True):
            if url is not None:
                yield f"regions.{name}.{field}", url
    if settings.traffic.endpoint is not None:
        yield "traffic.endpoint", settings.traffic.endpoint
    if settings.aws.sts_endpoint is not None:
        yield "aws.sts_endpoint", settings.aws.sts_endpoint


def _lab_rules(settings: Settings) -> Iterator[Problem]:
    """Without TLS only what cannot leave this machine."""
    for field, url in _own_urls(settings):
        if url.startswith("http://") and not is_loopback(urlsplit(url).hostname):
            rule = "must be https or a literal address in 127.0.0.0/8: the lab speaks in clear text only to itself"
            yield Problem((field, "environment"), shown(url), rule)
    webhook = settings.notify.webhook_url
    if webhook is not None and webhook.startswith("http://") and not is_loopback(urlsplit(webhook).hostname):
        yield Problem(("notify.webhook_url", "environment"), "(hidden)", "must be https or a literal address in 127.0.0.0/8")
    if not is_loopback(settings.api.host):
        rule = "must be a literal address in 127.0.0.0/8: the lab's API has no protection"
        yield Problem(("api.host", "environment"), shown(settings.api.host), rule)


def _production_rules(settings: Settings) -> Iterator[Problem]:
    etcd = settings.etcd
    if not all(url.startswith("https://") for url in etcd.endpoints):
        rule = "must be https in production: whoever can write to etcd can move the fleet"
        yield Problem(("etcd.endpoints", "environment"), shown(etcd.endpoints), rule)
    if len(etcd.endpoints) < 3:
        rule = "must be at least 3 in production: a quorum has to outlive the loss of any one failure domain"
        yield Problem(("etcd.endpoints", "environment"), shown(etcd.endpoints), rule, "a witness in a third place is enough")
    for field, path in (("ca_file", etcd.ca_file), ("cert_file", etcd.cert_file), ("key_file", etcd.key_file)):
        if path is None and not (field != "ca_file" and (etcd.cert_file is None) != (etcd.key_file is None)):
            yield Problem((f"etcd.{field}", "environment"), "(missing)", "is required in production", "name a PEM file")
    for field, url in _aws_urls(settings):
        if url.startswith("http://"):
            yield Problem((field, "environment"), shown(url), "must be https in production", "leave it out to use AWS's own")
    if settings.notify.webhook_url is not None and settings.notify.webhook_url.startswith("http://"):
        yield Problem(("notify.webhook_url", "environment"), "(hidden)", "must be https in production")
    if any(is_loopback(text.partition("/")[0]) or text.startswith("::1") for text in settings.notify.networks):
        rule = "must not hold loopback in production: what listens there does not expect the controller's pages"
        yield Problem(("notify.networks", "environment"), shown(settings.notify.networks), rule)
    if settings.promotion.approvals_required < 2:
        rule = "must be at least 2 in production: nobody moves a fleet alone"
        yield Problem(("promotion.approvals_required", "environment"), str(settings.promotion.approvals_required), rule)
    if settings.group in {"drill", "lab", "shadow", "test"} or settings.group.endswith(("-drill", "-shadow")):
        rule = "is a name for drills: one of them could touch what is real"
        yield Problem(("group", "environment"), shown(settings.group), rule, "name production after what it serves")
    if not settings.state_dir.is_absolute():
        yield Problem(("state_dir", "environment"), shown(settings.state_dir), "must be an absolute path in production")
    yield from _production_region_rules(settings)
    yield from _production_api_rules(settings)
    yield from _signers_rules(settings.approvals.allowed_signers)


def _production_region_rules(settings: Settings) -> Iterator[Problem]:
    seen: dict[str, str] = {}
    for name, region in settings.regions.items():
        other = seen.setdefault(region.aws_region, name)
        if other != name:
            rule = f"is that of {other} too: two regions in one would fail together"
            yield Problem((f"regions.{name}.aws_region", f"regions.{other}.aws_region"), shown(region.aws_region), rule)
        for address in region.addresses:
            if is_loopback(address):
                rule = "must be an address that clients can reach"
                yield Problem((f"regions.{name}.addresses", "environment"), shown(address), rule)


def _production_api_rules(settings: Settings) -> Iterator[Problem]:
    """Who may not be asked who they are, and what may not be read on its way, unless somebody says so on purpose."""
    api = settings.api
    if api.insecure_private_network:
        return
    otherwise = "or say api.insecure_private_network = true, when really nobody else reaches this network"
    needed = (
        ("cert_file", api.cert_file, "the API speaks TLS"),
        ("key_file", api.key_file, "the API speaks TLS"),
        ("ca_file", api.ca_file, "other controllers are verified"),
        ("client_ca_file", api.client_ca_file, "peer routes are for controllers only"),
        ("access_file", api.access_file, "every caller is known"),
    )
    paired = (api.cert_file is None) == (api.key_file is None)
    for field, path, why in needed:
        if path is None and (paired or field not in {"cert_file", "key_file"}):
            yield Problem((f"api.{field}", "environment"), "(missing)", f"is required in production: {why}", otherwise)
    for name, region in settings.regions.items():
        for url in region.controllers:
            if url.startswith("http://"):
                yield Problem(
                    (f"regions.{name}.controllers", "environment"), shown(url), "must be https in production", otherwise
                )
    if api.address.startswith("http://") and api.cert_file is None:
        yield Problem(("api.address", "environment"), shown(api.address), "must be https in production", otherwise)


def _signers_rules(path: Path) -> Iterator[Problem]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as why:
        reason = why.strerror if isinstance(why, OSError) else "it is not UTF-8"
        hint = "see `man ssh-keygen`, ALLOWED SIGNERS"
        yield Problem(("approvals.allowed_signers", "environment"), shown(path), f"cannot be read: {reason}", hint)
        return
    if not any(line.strip() and not line.lstrip().startswith("#") for line in lines):
        yield Problem(("approvals.allowed_signers", "environment"), shown(path), "lists nobody: no plan could be approved")
