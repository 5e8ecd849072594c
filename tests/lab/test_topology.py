"""The lab's addresses and files follow from one settings document."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from controller.errors import Misconfigured, Refused
from controller.lab.topology import Endpoint, build, controller_document, operator_document, to_toml

NAMES = ("eu-west-1", "eu-central-1", "us-east-1")


def document() -> dict[str, Any]:
    return {
        "group": "fleet",
        "environment": "lab",
        "etcd": {"endpoints": [f"http://127.0.{i}.10:2379" for i in (1, 2, 3)], "ttl_seconds": 5},
        "regions": {
            name: {
                "s3_endpoint": f"http://127.0.{i}.20:4566",
                "dynamodb_endpoint": f"http://127.0.{i}.20:4566",
                "bucket": "b",
                "addresses": [f"127.0.{i}.1"],
                "controllers": [f"http://127.0.{i}.1:8080", f"http://127.0.{i}.2:8080"],
            }
            for i, name in enumerate(NAMES, 1)
        },
        "traffic": {"zone_id": "Z1", "name": "agents.dr.example.", "endpoint": "http://127.0.0.30:4566"},
        "dns": {"servers": ["127.0.0.31:5353"]},
        "notify": {"webhook_url": "http://127.0.0.32:8099/page"},
    }


def test_a_controller_reaches_its_own_store_directly_and_the_others_through_the_wan() -> None:
    topology = build(document(), Path("/lab"))
    place = topology.region("eu-central-1").controllers[1]
    settings = controller_document(topology, place)
    assert settings["regions"]["eu-central-1"]["s3_endpoint"] == "http://127.0.2.20:4566"
    through = {link.target: link for link in topology.links if link.source == "eu-central-1"}
    for other in ("eu-west-1", "us-east-1"):
        link = through[other]
        assert settings["regions"][other]["s3_endpoint"] == f"http://{link.listen_host}:{link.listen_port}"
        assert settings["regions"][other]["dynamodb_endpoint"] == settings["regions"][other]["s3_endpoint"]
        assert link.to_host == topology.region(other).store.host
    assert settings["etcd"]["endpoints"][0] == "http://127.0.2.10:2379"
    assert (settings["instance"], settings["api"]["host"]) == ("b", "127.0.2.2")
    assert operator_document(topology)["regions"]["us-east-1"]["s3_endpoint"] == "http://127.0.3.20:4566"


def test_documents_of_different_controllers_share_nothing_that_one_could_change_for_the_other() -> None:
    topology = build(document(), Path("/lab"))
    first = controller_document(topology, topology.controllers[0])
    second = controller_document(topology, topology.controllers[2])
    assert first["regions"]["eu-west-1"]["s3_endpoint"] != second["regions"]["eu-west-1"]["s3_endpoint"]
    assert topology.document["regions"]["eu-west-1"]["s3_endpoint"] == "http://127.0.1.20:4566"


def test_six_links_have_six_different_listeners_and_an_offset_moves_every_port() -> None:
    plain, moved = build(document(), Path("/lab")), build(document(), Path("/lab"), offset=1000)
    assert len({(link.listen_host, link.listen_port) for link in plain.links}) == 6
    assert moved.dns.port == plain.dns.port + 1000
    assert moved.links[0].listen_port == plain.links[0].listen_port + 1000
    assert moved.webhook_url == "http://127.0.0.32:9099/page"
    assert moved.document["regions"]["eu-west-1"]["addresses"] == ["127.0.1.1"], "addresses in DNS have no port"


def test_what_is_wrong_with_the_document_is_named() -> None:
    broken = document()
    del broken["dns"]
    with pytest.raises(Misconfigured, match=r"no dns\.servers"):
        build(broken, Path("/lab"))
    broken = document()
    broken["etcd"]["endpoints"].pop()
    with pytest.raises(Misconfigured, match="3 regions and 2 etcd endpoints"):
        build(broken, Path("/lab"))
    with pytest.raises(Misconfigured, match="offset 65000"):
        build(document(), Path("/lab"), offset=65000)
    with pytest.raises(Misconfigured, match="not an address"):
        Endpoint.parse("http://host")
    with pytest.raises(Refused, match="unknown region 'mars'"):
        build(document(), Path("/lab")).region("mars")


def test_toml_that_we_write_reads_back_equal() -> None:
    value = {
        "a": 1,
        "b": 2.5,
        "c": True,
        "d": ["x", 'quote " and \\ and \n'],
        "t": {"eu-west-1": {"k": "v"}, "dotted.name": {"e": []}},
    }
    assert tomllib.loads(to_toml(value)) == value
    settings = controller_document(build(document(), Path("/lab")), build(document(), Path("/lab")).controllers[0])
    assert tomllib.loads(to_toml(settings)) == settings
