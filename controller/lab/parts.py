"""The parts of the lab: how each is started, where it listens, and the files that it reads.

One method a part, in no order: what needs what, and what a disaster does to them, is in ``supervisor``. Every process is
started as a child of this one or adopted by it, so that none is left behind (``processes``).
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from controller.adapters.clock import SystemClock
from controller.adapters.etcd import EtcdCoordinator
from controller.adapters.identity import generate_key
from controller.errors import Unavailable
from controller.lab.aws import LAB_ENVIRONMENT, AwsStandIn
from controller.lab.etcd import EtcdAddress, EtcdCluster, EtcdMember, find_etcd
from controller.lab.hosts import AgentHostPlace, host_argv, places
from controller.lab.layout import Layout
from controller.lab.processes import Children, PrefixOf, Spec, Started
from controller.lab.secured import Secured
from controller.lab.stand_ins import start_region, start_route53
from controller.lab.topology import (
    ETCD_PEER_SHIFT,
    ControllerPlace,
    Topology,
    controller_document,
    merged,
    operator_document,
    to_toml,
)
from controller.runtime.bootstrap import bootstrap_group

READY_SECONDS = 90.0
"""Far above what a start takes (about 10 s on two cores): only a part that will never be ready runs into it."""

APPROVERS = ("alice", "bob")
REQUESTER = "carol"

Say = Callable[[str], None]


class Parts:
    """What a ``Lab`` is made of."""

    def __init__(
        self,
        topology: Topology,
        *,
        say: Say,
        hosts_per_region: int,
        agents: int,
        corpus: Path | None,
        prefix_of: PrefixOf,
        stand_in_shift: int,
        etcd_options: Sequence[str],
        journals: Path | None,
    ) -> None:
        self.topology = topology
        self._prefix_of = prefix_of
        self._shift = stand_in_shift
        self._etcd_options = tuple(etcd_options)
        self._journals = journals
        self.layout = Layout(topology.state_dir)
        self.secured = Secured(topology) if topology.secure else None
        self._say = say
        self._hosts = places(topology, self.layout, per_region=hosts_per_region, agents=agents)
        self._corpus = corpus
        self._children: Children | None = None
        self._stand_ins: dict[str, AwsStandIn] = {}
        self._threads = ThreadPoolExecutor(max_workers=len(topology.regions) + 1, thread_name_prefix="lab")
        """Stand-ins are started from these, and a child dies with the thread that made it: they stay until ``down``."""
        self._cluster: EtcdCluster | None = None

    def _process(self) -> Children:
        if self._children is None:
            raise Unavailable("the lab does not run", hint="start it with `drctl lab up`")
        return self._children

    # ---------------------------------------------------------------------------------------------------------- files

    def _write_keys(self) -> None:
        """Keys of the lab's people. They are made for this lab and are worth nothing outside of it."""
        lines = [
            f'{name} namespaces="dr-approval" {generate_key(self.layout.key(name), name).strip()}'
            for name in (*APPROVERS, REQUESTER)
        ]
        self.topology.allowed_signers.write_text("\n".join(lines) + "\n")
        self.topology.allowed_signers.chmod(0o644)  # whatever this user's umask is

    def _write_settings(self) -> None:
        secured = self.secured
        operators = merged(operator_document(self.topology), secured.settings_of_operators() if secured is not None else {})
        self.topology.operator_config.write_text(to_toml(operators))
        for place in self.topology.controllers:
            place.config.parent.mkdir(parents=True, exist_ok=True)
            place.state_dir.mkdir(parents=True, exist_ok=True)
            document = merged(
                controller_document(self.topology, place), secured.settings_of(place) if secured is not None else {}
            )
            place.config.write_text(to_toml(document))

    # ------------------------------------------------------------------------------------------------------ processes

    def _module(self, name: str, kind: str, region: str, *arguments: str, caller: str = "") -> Started:
        """``caller``: whose token the process shows, where callers are known."""
        argv = (*self._prefix_of(region), sys.executable, "-m", *arguments)
        shown = self.secured.environment(caller) if caller and self.secured is not None else {}
        return self._process().start(Spec(name, kind, region, argv, {**LAB_ENVIRONMENT, **shown}))

    def _start_wan(self) -> None:
        links = [
            {
                "source": link.source,
                "target": link.target,
                "listen_host": link.listen_host,
                "listen_port": link.listen_port,
                "to_host": link.to_host,
                "to_port": link.to_port,
            }
            for link in self.topology.links
        ]
        document = {"links": links, "delay_ms": 20.0, "control": str(self.layout.wan_socket)}
        self.layout.wan_config.write_text(json.dumps(document))
        self._module("wan", "wan", "", "controller.lab.wan", "--config", str(self.layout.wan_config))

    def _start_webhook(self) -> None:
        place = self.topology.webhook
        where = ("--host", place.host, "--port", str(place.port), "--file", str(self.layout.pages))
        self._module("webhook", "webhook", "", "controller.lab.webhook", *where)

    def _start_dns(self) -> None:
        place = self.topology.dns
        where = ("--host", place.host, "--port", str(place.port), "--zone-id", self.topology.zone_id)
        self._module("dns", "dns", "", "controller.lab.dns_server", "--endpoint", self.topology.route53.url, *where)

    def _start_etcd(self) -> None:
        binary = find_etcd()
        self._say(binary.warning or f"etcd {binary.version}")
        addresses = [
            EtcdAddress(region.name, region.etcd.host, region.etcd.port, region.etcd.port + ETCD_PEER_SHIFT, region.etcd.secure)
            for region in self.topology.regions
        ]
        self._cluster = EtcdCluster(
            binary,
            addresses,
            self.layout.etcd,
            extra=self._etcd_options,
            prefix_of=self._prefix_of,
            tls=self.secured.etcd() if self.secured is not None else None,
        )
        for member in self._cluster.members:
            self._start_member(member)

    def _start_member(self, member: EtcdMember) -> None:
        member.start()
        if member.pid is not None:
            self._process().adopt(f"etcd-{member.address.name}", "etcd", member.address.name, member.pid)

    def _start_controller(self, place: ControllerPlace) -> None:
        self._module(place.name, "controller", place.region, "controller", "serve", "--config", str(place.config))

    def _start_host(self, host: AgentHostPlace) -> None:
        self._module(host.name, "agents", host.region, *host_argv(host, self.topology, self._corpus), caller=host.host)

    async def _start_stand_ins(self) -> str:
        """S3 and DynamoDB of every region, and Route 53. Returns the id of the hosted zone."""
        loop, log = asyncio.get_running_loop(), self._process().log
        shift, prefix_of = self._shift, self._prefix_of
        route53 = partial(start_route53, self.topology, log("route53"), READY_SECONDS, port_shift=shift)
        global_part = loop.run_in_executor(self._threads, route53)
        store = partial(
            start_region,
            self.topology,
            prefix_of=prefix_of,
            port_shift=shift,
            timeout_seconds=READY_SECONDS,
            journals=self._journals,
        )
        parts = {
            name: loop.run_in_executor(self._threads, partial(store, name, log(f"store-{name}")))
            for name in (region.name for region in self.topology.regions)
        }
        # All of them are waited for, so that none is forgotten when one fails.
        await asyncio.wait(parts.values())
        await asyncio.wait([global_part])
        for name, part in parts.items():
            if part.exception() is None:
                self._adopt(f"store-{name}", "store", name, part.result())
        errors = [*(part.exception() for part in parts.values()), global_part.exception()]
        for error in errors:
            if error is not None:
                raise error
        stand_in, zone_id = global_part.result()
        self._adopt("route53", "route53", "", stand_in)
        return zone_id

    def _adopt(self, name: str, kind: str, region: str, stand_in: AwsStandIn) -> None:
        self._stand_ins[name] = stand_in
        if stand_in.pid is not None:
            self._process().adopt(name, kind, region, stand_in.pid)

    async def _found_group(self) -> None:
        assert self._cluster is not None
        await asyncio.to_thread(self._cluster.wait_ready, READY_SECONDS)
        tls = self.secured.etcd() if self.secured is not None else None
        coordinator = EtcdCoordinator(
            self._cluster.endpoints,
            call_timeout_seconds=2.0,
            ca_file=str(tls.ca_file) if tls else None,
            cert_file=str(tls.cert_file) if tls else None,
            key_file=str(tls.key_file) if tls else None,
        )
        try:
            await bootstrap_group(
                coordinator,
                SystemClock(),
                prefix=str(self.topology.document["etcd"].get("prefix", "/dr")),
                group=self.topology.group,
                region=self.topology.home,
                stores=[region.name for region in self.topology.regions],
                actor="lab",
                streams=int(str(self.topology.document.get("stream", {}).get("streams", 1))),
            )
        finally:
            await coordinator.close()
