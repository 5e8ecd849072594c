"""Starts the lab's AWS stand-ins and puts into them what Terraform would: bucket, table, hosted zone. Blocking; for threads."""

from __future__ import annotations

from pathlib import Path

from controller.lab.aws import AwsStandIn, provision_region, provision_zone
from controller.lab.processes import PrefixOf, here
from controller.lab.topology import Topology


def start_region(
    topology: Topology,
    name: str,
    log: Path,
    timeout_seconds: float,
    *,
    prefix_of: PrefixOf = here,
    port_shift: int = 0,
    journals: Path | None = None,
) -> AwsStandIn:
    """S3 and DynamoDB of one region. ``port_shift``: it listens so many ports further, behind a proxy. ``journals``: folder of
    what makes it survive SIGKILL.

    Raises Unavailable with the end of its log."""
    place, settings = topology.region(name), topology.document["regions"][name]
    aws_region = str(settings.get("aws_region") or name)
    stand_in = AwsStandIn(
        host=place.store.host,
        port=place.store.port + port_shift,
        aws_region=aws_region,
        log=log,
        prefix=prefix_of(name),
        journal=journals / f"{name}.journal" if journals is not None else None,
    )
    stand_in.start(timeout_seconds)
    provision_region(stand_in.endpoint, aws_region=aws_region, bucket=settings["bucket"], table=settings["table"])
    return stand_in


def start_route53(topology: Topology, log: Path, timeout_seconds: float, *, port_shift: int = 0) -> tuple[AwsStandIn, str]:
    """Route 53 with the group's zone: all weight at home, epoch 0. Returns it with the zone's id. Raises Unavailable."""
    regions, traffic = topology.document["regions"], topology.document["traffic"]
    stand_in = AwsStandIn(host=topology.route53.host, port=topology.route53.port + port_shift, log=log)
    stand_in.start(timeout_seconds)
    active = int(traffic.get("active_weight", 100))
    zone_id = provision_zone(
        stand_in.endpoint,
        topology.dns_name.split(".", 1)[1],
        topology.dns_name,
        addresses={name: settings["addresses"] for name, settings in regions.items()},
        weights={name: active if name == topology.home else 0 for name in regions},
        epoch=0,
        ttl=int(traffic.get("ttl_seconds", 5)),
    )
    return stand_in, zone_id
