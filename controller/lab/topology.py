"""Who is where in the lab: names, addresses, ports, files. Pure: a settings document goes in, documents come out.

``config/lab.toml`` is the one source of addresses. What it does not need to know (the WAN proxy's listeners, etcd's peer
ports, files) is derived here. A *port offset* is added to every loopback port, so that a second lab can run beside the
first one on the same machine.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from controller.errors import Misconfigured, Refused
from controller.lab.wan import LinkSpec

WAN_HOST = "127.0.0.33"
WAN_FIRST_PORT = 7000
ETCD_PEER_SHIFT = 1
"""An etcd member's peer port is its client port plus this, as is custom (2379, 2380)."""

INSTANCES = "abcdefgh"
"""Names of a region's controllers, in the order of ``regions.NAME.controllers``."""

_LOOPBACK = re.compile(r"\b(127\.\d{1,3}\.\d{1,3}\.\d{1,3}):(\d{1,5})\b")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address to listen on or to call."""

    host: str
    port: int
    secure: bool = False

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """From ``http://host:port`` or ``host:port``. Raises Misconfigured."""
        parts = urlsplit(text if "//" in text else f"//{text}")
        try:
            port = parts.port
        except ValueError:
            port = None
        if not parts.hostname or port is None:
            raise Misconfigured(f"{text!r} is not an address with a port", hint="write it as http://127.0.1.1:8080")
        return cls(parts.hostname, port, parts.scheme == "https")

    @property
    def url(self) -> str:
        return f"http{'s' if self.secure else ''}://{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ControllerPlace:
    """Where one controller instance runs."""

    region: str
    instance: str
    api: Endpoint
    config: Path
    state_dir: Path

    @property
    def name(self) -> str:
        """Process name, unique in the lab."""
        return f"controller-{self.region}-{self.instance}"


@dataclass(frozen=True, slots=True)
class RegionPlace:
    """One region's parts."""

    name: str
    etcd: Endpoint
    store: Endpoint
    """S3 and DynamoDB stand-in."""
    controllers: tuple[ControllerPlace, ...]


@dataclass(frozen=True, slots=True)
class Topology:
    """The whole lab."""

    group: str
    dns_name: str
    zone_id: str
    regions: tuple[RegionPlace, ...]
    links: tuple[LinkSpec, ...]
    route53: Endpoint
    dns: Endpoint
    webhook: Endpoint
    webhook_url: str
    state_dir: Path
    document: Mapping[str, Any]
    """The settings document, ports shifted, without what differs between processes."""

    @property
    def secure(self) -> bool:
        """Whether etcd and the controllers speak TLS."""
        return self.regions[0].etcd.secure

    @property
    def home(self) -> str:
        """The region that the group starts in: the first one."""
        return self.regions[0].name

    @property
    def controllers(self) -> tuple[ControllerPlace, ...]:
        return tuple(place for region in self.regions for place in region.controllers)

    @property
    def operator_config(self) -> Path:
        """Settings file for ``drctl`` on this machine."""
        return self.state_dir / "drctl.toml"

    @property
    def allowed_signers(self) -> Path:
        return self.state_dir / "allowed_signers"

    def region(self, name: str) -> RegionPlace:
        """Raises Refused for a region that the lab does not have."""
        for region in self.regions:
            if region.name == name:
                return region
        raise Refused(f"unknown region {name!r}", hint=f"regions of this lab: {', '.join(r.name for r in self.regions)}")

    def others(self, name: str) -> tuple[RegionPlace, ...]:
        """The regions beside this one."""
        return tuple(region for region in self.regions if region.name != name)


def with_zone(topology: Topology, zone_id: str) -> Topology:
    """The same lab with the hosted zone that was made for it."""
    document = dict(topology.document)
    document["traffic"] = {**document["traffic"], "zone_id": zone_id}
    return replace(topology, zone_id=zone_id, document=document)


def shifted(value: Any, offset: int) -> Any:
    """``value`` with ``offset`` added to the port of every loopback address in it. Raises Misconfigured outside 1..65535."""

    def move(match: re.Match[str]) -> str:
        port = int(match.group(2)) + offset
        if not 1 <= port <= 65535:
            raise Misconfigured(f"port {match.group(2)} plus offset {offset} is {port}", hint="choose an offset of 0..20000")
        return f"{match.group(1)}:{port}"

    if isinstance(value, str):
        return _LOOPBACK.sub(move, value)
    if isinstance(value, Mapping):
        return {key: shifted(item, offset) for key, item in value.items()}
    if isinstance(value, list):
        return [shifted(item, offset) for item in value]
    return value


def _need(document: Mapping[str, Any], path: str) -> Any:
    value: Any = document
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise Misconfigured(f"the lab's settings have no {path}", hint="compare with config/lab.toml of the project")
        value = value[key]
    return value


def build(
    settings: Mapping[str, Any],
    state_dir: Path,
    *,
    offset: int = 0,
    wan_port: int = WAN_FIRST_PORT,
    wan: bool = True,
    tls: bool = False,
) -> Topology:
    """The lab that a settings document describes. Regions stand in the order of the document; the first is home.
    ``wan`` False: regions reach each other's stores directly, over a network that somebody else made. ``tls``: etcd and the
    controllers speak TLS, and ask who calls (``controller.lab.secured``).

    Raises Misconfigured, naming the field, when an address is missing or malformed.
    """
    document = shifted(settings, offset)
    if tls:
        document = _over_tls(document)
    names = list(_need(document, "regions"))
    endpoints = [Endpoint.parse(text) for text in _need(document, "etcd.endpoints")]
    if len(names) < 2 or len(endpoints) != len(names):
        raise Misconfigured(
            f"the lab has {len(names)} regions and {len(endpoints)} etcd endpoints",
            hint="give two regions or more, and one etcd endpoint for each, in the same order",
        )
    regions = tuple(_region(document, name, etcd, state_dir) for name, etcd in zip(names, endpoints, strict=True))
    webhook_url = str(_need(document, "notify.webhook_url"))
    return Topology(
        group=str(_need(document, "group")),
        dns_name=str(_need(document, "traffic.name")),
        zone_id=str(_need(document, "traffic.zone_id")),
        regions=regions,
        links=tuple(_links(regions, wan_port + offset)) if wan else (),
        route53=Endpoint.parse(str(_need(document, "traffic.endpoint"))),
        dns=Endpoint.parse(str(_need(document, "dns.servers")[0])),
        webhook=Endpoint.parse(webhook_url),
        webhook_url=webhook_url,
        state_dir=state_dir,
        document=document,
    )


def _over_tls(document: Mapping[str, Any]) -> Any:
    """The same addresses behind https, where they are ours; stand-ins for other people's services stay as they are."""
    changed: dict[str, Any] = copy.deepcopy(dict(document))
    changed["etcd"]["endpoints"] = [_https(url) for url in _need(document, "etcd.endpoints")]
    for region in changed["regions"].values():
        region["controllers"] = [_https(url) for url in region["controllers"]]
    return changed


def _https(url: str) -> str:
    return url.replace("http://", "https://", 1)


def _region(document: Mapping[str, Any], name: str, etcd: Endpoint, state_dir: Path) -> RegionPlace:
    urls: Sequence[str] = _need(document, f"regions.{name}.controllers")
    controllers = tuple(
        ControllerPlace(
            region=name,
            instance=instance,
            api=Endpoint.parse(url),
            config=state_dir / "config" / f"{name}-{instance}.toml",
            state_dir=state_dir / "data" / f"{name}-{instance}",
        )
        for instance, url in zip(INSTANCES, urls, strict=False)
    )
    return RegionPlace(name, etcd, Endpoint.parse(str(_need(document, f"regions.{name}.s3_endpoint"))), controllers)


def _links(regions: Sequence[RegionPlace], first_port: int) -> Iterator[LinkSpec]:
    port = first_port
    for source in regions:
        for target in regions:
            if source is not target:
                yield LinkSpec(source.name, target.name, WAN_HOST, port, target.store.host, target.store.port)
                port += 1


def controller_document(topology: Topology, place: ControllerPlace) -> dict[str, Any]:
    """Settings of one controller: its own store directly, the others through the WAN, its own etcd member first."""
    document = _common(topology)
    document["region"] = place.region
    document["instance"] = place.instance
    document["state_dir"] = str(place.state_dir)
    document["api"] = {**document.get("api", {}), "host": place.api.host, "port": place.api.port, "address": place.api.url}
    for link in topology.links:
        if link.source == place.region:
            through = f"http://{link.listen_host}:{link.listen_port}"
            document["regions"][link.target].update(s3_endpoint=through, dynamodb_endpoint=through)
    own = topology.region(place.region).etcd.url
    document["etcd"]["endpoints"] = sorted(document["etcd"]["endpoints"], key=lambda url: url != own)
    return document


def operator_document(topology: Topology) -> dict[str, Any]:
    """Settings for ``drctl`` and for the agents: every part directly, at home in the first region."""
    document = _common(topology)
    first = topology.regions[0].controllers[0]
    document["region"] = first.region
    document["instance"] = "operator"
    document["state_dir"] = str(topology.state_dir / "data" / "operator")
    document["api"] = {**document.get("api", {}), "host": first.api.host, "port": first.api.port, "address": first.api.url}
    return document


def _common(topology: Topology) -> dict[str, Any]:
    document: dict[str, Any] = copy.deepcopy(dict(topology.document))
    document["approvals"] = {**document.get("approvals", {}), "allowed_signers": str(topology.allowed_signers)}
    return document


def merged(document: Mapping[str, Any], more: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The document with further settings in some of its tables."""
    return {**document, **{table: {**document.get(table, {}), **values} for table, values in more.items()}}


def to_toml(document: Mapping[str, Any]) -> str:
    """TOML text of plain values, lists of them, and nested tables. Raises TypeError for anything else."""
    lines: list[str] = []
    _table(document, (), lines)
    return "\n".join(lines).strip() + "\n"


def _table(table: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    plain = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    if path and (plain or not table):
        lines.extend(("", f"[{'.'.join(_text(part) for part in path)}]"))
    lines.extend(f"{_text(key)} = {_value(value)}" for key, value in plain.items() if value is not None)
    for key, value in table.items():
        if isinstance(value, Mapping):
            _table(value, (*path, key), lines)


def _text(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    escaped = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped)
    return f'"{escaped}"'


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(item) for item in value)}]"
    raise TypeError(f"{value!r} has no TOML form here")
