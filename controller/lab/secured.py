"""A lab with everything switched on: certificates for etcd and the controllers, tokens for people and hosts. Made anew with
each lab, and worth nothing outside of it."""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from controller.adapters.access import AccessDocument, new_token, with_entry, write_document
from controller.adapters.access_edit import change_document
from controller.lab.certificates import Authority
from controller.lab.etcd import EtcdTls
from controller.lab.topology import ControllerPlace, Topology
from controller.settings import controller_name

LAB = "lab"
"""The lab's own token: it gives the agents their tasks, and looks."""


class Secured:
    """Files of one lab, below ``tls`` and ``tokens`` of its state directory."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._tls = topology.state_dir / "tls"
        self._tokens = topology.state_dir / "tokens"
        self.ca_file = self._tls / "ca.pem"
        self.access_file = topology.state_dir / "access.json"

    def make(self, people: Iterable[str], hosts: Iterable[str]) -> None:
        """Writes all of them. ``people`` are operators; each host may report for itself and write for every agent."""
        topology, signer = self._topology, Authority(self._tls)
        # Members look at the address that a peer comes from too, and on one machine that is 127.0.0.1.
        signer.issue("etcd", hosts=["127.0.0.1", *(region.etcd.host for region in topology.regions)])
        for place in topology.controllers:
            uri = controller_name(topology.group, place.region, place.instance)
            signer.issue(place.name, hosts=[place.api.host], uris=[uri])
        document = AccessDocument(group=topology.group)
        for name in (LAB, *people):
            document = self._add(document, name, {"role": "operator"})
        write_document(self.access_file, document)
        for host in hosts:
            self.make_host(host)

    def make_host(self, host: str) -> None:
        """A token for one more host. Controllers that run learn of it by themselves."""
        entry = {"role": "agent", "agents": ("*",), "hosts": (host,)}
        empty = AccessDocument(group=self._topology.group)
        change_document(self.access_file, lambda found: self._add(found or empty, host, entry))

    def _add(self, document: AccessDocument, name: str, entry: Mapping[str, object]) -> AccessDocument:
        token, digest = new_token(self._topology.group)
        path = self.token_file(name)
        path.parent.mkdir(exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(token + "\n")
        return with_entry(document, {"name": name, "sha256": digest, **entry})

    def token_file(self, name: str) -> Path:
        """Of a person, a host, or the lab."""
        return self._tokens / name

    def environment(self, name: str) -> dict[str, str]:
        """With which a process of this lab is let in."""
        return {"DR_TOKEN_FILE": str(self.token_file(name)), "DR_CA_FILE": str(self.ca_file)}

    def etcd(self) -> EtcdTls:
        """What the members show, and the lab itself."""
        return EtcdTls(self.ca_file, self._tls / "etcd.pem", self._tls / "etcd-key.pem")

    def context(self) -> ssl.SSLContext:
        """Verifies this lab's controllers."""
        return ssl.create_default_context(cafile=self.ca_file)

    def settings_of(self, place: ControllerPlace) -> dict[str, dict[str, Any]]:
        """What a controller's settings say of all this."""
        pair = {"cert_file": str(self._tls / f"{place.name}.pem"), "key_file": str(self._tls / f"{place.name}-key.pem")}
        ours = str(self.ca_file)
        api = {**pair, "ca_file": ours, "client_ca_file": ours, "access_file": str(self.access_file)}
        return {"etcd": {**pair, "ca_file": ours}, "api": api}

    def settings_of_operators(self) -> dict[str, dict[str, Any]]:
        """The same for ``drctl``: whom to believe, and a way to etcd for `drctl recover`."""
        tls = self.etcd()
        files = {"ca_file": str(tls.ca_file), "cert_file": str(tls.cert_file), "key_file": str(tls.key_file)}
        return {"etcd": files, "api": {"ca_file": str(self.ca_file)}}
