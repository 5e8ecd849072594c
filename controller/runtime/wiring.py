"""Settings to adapters: the only place where the outside systems of a running controller are chosen."""

from __future__ import annotations

import contextlib
import secrets
import time
from ipaddress import ip_network

from controller.adapters.aws_account import check_account
from controller.adapters.dns import DnsResolver
from controller.adapters.etcd import EtcdCoordinator
from controller.adapters.identity import SshIdentity
from controller.adapters.keyring import Keyring
from controller.adapters.kms import AwsKeyService
from controller.adapters.notify import LogPager, MultiPager, WebhookPager
from controller.adapters.region_store import AwsRegionStore
from controller.adapters.route53 import Route53Traffic
from controller.adapters.sealed_store import SealedStore, Sealer
from controller.domain.approval import NAMESPACE
from controller.domain.sharing import stream_names
from controller.errors import Unavailable
from controller.ports import Clock, KeyService, Pager, RegionStore
from controller.runtime.credentials import Credentials
from controller.runtime.documents import Keys
from controller.runtime.evidence import Outside
from controller.runtime.peers import HttpPeers
from controller.runtime.shell import Ports
from controller.settings import Settings

ACCOUNT_RETRY_SECONDS = 1.0


async def build_ports(
    settings: Settings, clock: Clock, stack: contextlib.AsyncExitStack, credentials: Credentials | None = None
) -> Ports:
    """Adapters for ``settings``, closed by ``stack``. Nothing is called yet but what opens sessions. ``credentials``: for other
    controllers; commands that speak to none need none. Raises Misconfigured."""
    etcd, aws = settings.etcd, settings.aws
    coordinator = EtcdCoordinator(
        etcd.endpoints,
        call_timeout_seconds=etcd.call_timeout_seconds,
        ca_file=_text(etcd.ca_file),
        cert_file=_text(etcd.cert_file),
        key_file=_text(etcd.key_file),
        username=etcd.username,
        password=etcd.password.get_secret_value() if etcd.password else None,
    )
    stack.push_async_callback(coordinator.close)
    seals = await _keyring(settings, clock, stack)
    sealer = Sealer(settings.group, seals)
    stores: dict[str, RegionStore] = {}
    for region, place in settings.regions.items():
        store = AwsRegionStore(
            region,
            group=settings.group,
            bucket=place.bucket,
            table=place.table,
            prefix=settings.stream.prefix,
            aws_region=place.aws_region,
            s3_endpoint=place.s3_endpoint,
            dynamodb_endpoint=place.dynamodb_endpoint,
            call_timeout_seconds=aws.call_timeout_seconds,
            connect_timeout_seconds=aws.connect_timeout_seconds,
            max_pool_connections=aws.max_pool_connections,
        )
        await store.start()
        stack.push_async_callback(store.close)
        stores[region] = SealedStore(store, sealer)
    traffic = settings.traffic
    peers = peers_of(settings, credentials)
    stack.push_async_callback(peers.close)
    return Ports(
        coordinator=coordinator,
        stores=stores,
        traffic=Route53Traffic(
            traffic.zone_id,
            traffic.name,
            regions=tuple(settings.regions),
            ttl_seconds=traffic.ttl_seconds,
            endpoint=traffic.endpoint,
            aws_region=traffic.aws_region,
            call_timeout_seconds=aws.call_timeout_seconds,
        ),
        resolver=DnsResolver(settings.dns.servers, settings.dns.timeout_seconds),
        identity=SshIdentity(settings.approvals.allowed_signers, NAMESPACE, clock.wall),
        pager=_pager(settings),
        clock=clock,
        new_id=_new_plan_id,
        peers=peers,
        seals=seals,
    )


async def _keyring(settings: Settings, clock: Clock, stack: contextlib.AsyncExitStack) -> Keyring | None:
    """With a key in every region sealed objects can be opened; ``encryption.enabled`` says whether new ones are sealed."""
    aws, encryption = settings.aws, settings.encryption
    services: dict[str, KeyService] = {}
    for region, place in settings.regions.items():
        if place.kms_key is None:
            return None
        services[region] = service = AwsKeyService(
            region,
            key=place.kms_key,
            former=place.former_kms_keys,
            aws_region=place.aws_region,
            endpoint=place.kms_endpoint,
            call_timeout_seconds=aws.call_timeout_seconds,
            connect_timeout_seconds=aws.connect_timeout_seconds,
        )
        await service.start()
        stack.push_async_callback(service.close)
    keyring = Keyring(
        settings.group,
        services,
        home=settings.region,
        clock=clock,
        enabled=encryption.enabled,
        rotate_seconds=encryption.rotate_seconds,
        cache_seconds=encryption.cache_seconds,
    )
    stack.push_async_callback(keyring.close)
    return keyring


async def check_aws_account(settings: Settings, clock: Clock, *, seconds: float) -> None:
    """Where ``aws.account_id`` is set: waits up to ``seconds`` for STS to say that the credentials belong to it.

    Raises Misconfigured for another account; Unavailable when STS did not answer: nobody acts on credentials that nobody knows.
    """
    aws = settings.aws
    if aws.account_id is None:
        return
    deadline = clock.monotonic() + seconds
    while True:
        try:
            await check_account(
                aws.account_id,
                aws_region=settings.regions[settings.region].aws_region,
                endpoint=aws.sts_endpoint,
                call_timeout_seconds=aws.call_timeout_seconds,
            )
        except Unavailable:
            if clock.monotonic() >= deadline:
                raise
            await clock.sleep(ACCOUNT_RETRY_SECONDS)
        else:
            return


def peers_of(settings: Settings, credentials: Credentials | None) -> HttpPeers:
    """The way to other controllers."""
    patience = settings.stream.ack_timeout_seconds + 2 * settings.aws.call_timeout_seconds
    if credentials is None:
        return HttpPeers(patience)
    tls = credentials.client.context if credentials.client is not None else None
    return HttpPeers(patience, tls=tls, token=credentials.peer_token)


def _pager(settings: Settings) -> Pager:
    pagers: list[Pager] = [LogPager()]
    notify = settings.notify
    if notify.webhook_url is not None:
        allowed = [ip_network(text) for text in notify.networks]
        pagers.append(WebhookPager(notify.webhook_url, notify.timeout_seconds, allowed=allowed))
    return MultiPager(pagers)


def _new_plan_id() -> str:
    """Sorts by day and is short enough to be read out on a call."""
    return f"{time.strftime('%m%d-%H%M', time.gmtime())}-{secrets.token_hex(2)}"


def outside_of(settings: Settings, ports: Ports) -> Outside:
    """The ports as the readers of evidence want them."""
    return Outside(
        ports.coordinator,
        Keys(settings.etcd.prefix, settings.group),
        ports.stores,
        ports.traffic,
        ports.resolver,
        ports.clock,
        stream_names(settings.stream.streams),
        settings.aws.call_timeout_seconds,
        ports.seals,
    )


def _text(path: object) -> str | None:
    return None if path is None else str(path)
