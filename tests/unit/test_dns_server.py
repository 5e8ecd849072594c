"""The lab's name server: what it answers to one message, without a socket."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.update
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.adapters.record_sets import RecordSet, ZoneCopy, choose, normal_name
from controller.errors import Refused
from controller.lab.dns_server import MAX_UDP_BYTES, PLAIN_UDP_BYTES, respond


def record(name: str, rtype: str, *values: str, ttl: int = 5, **rest: Any) -> RecordSet:
    return {"Name": name, "Type": rtype, "TTL": ttl, "ResourceRecords": [{"Value": value} for value in values], **rest}


def weighted(region: str, weight: int, *values: str, **rest: Any) -> RecordSet:
    return record("agents.dr.example.", "A", *values, SetIdentifier=region, Weight=weight, **rest)


BASE = (
    record("dr.example.", "SOA", "ns-1.example.net. host.example.net. 1 7200 900 1209600 60", ttl=900),
    record("dr.example.", "NS", "ns-1.example.net.", "ns-2.example.net.", ttl=172800),
    record("_dr-epoch.agents.dr.example.", "TXT", '"7"'),
    record("www.dr.example.", "CNAME", "agents.dr.example.", ttl=30),
    record("out.dr.example.", "CNAME", "elsewhere.example.org."),
    record("loop.dr.example.", "CNAME", "loop2.dr.example."),
    record("loop2.dr.example.", "CNAME", "loop.dr.example."),
    record("many.dr.example.", "A", *(f"192.0.2.{i}" for i in range(1, 200))),
)
THREE = (weighted("eu", 100, "127.0.1.1", "127.0.1.2"), weighted("de", 0, "127.0.2.1"), weighted("us", 0, "127.0.3.1"))
ZONE = ZoneCopy.of((*BASE, *THREE))


def ask(
    name: str, rtype: str = "A", *, zone: ZoneCopy | None = ZONE, udp: bool = True, **options: Any
) -> dns.message.Message:
    query = dns.message.make_query(name, rtype, **options)
    wire = respond(query.to_wire(), zone, random.Random(0), udp=udp)
    assert wire is not None
    response = dns.message.from_wire(wire)
    assert response.id == query.id
    assert query.is_response(response)
    return response


def values(response: dns.message.Message) -> list[str]:
    return sorted(rdata.to_text() for rrset in response.answer for rdata in rrset)


def test_the_record_set_of_the_only_weighted_region_is_the_answer_with_its_ttl_and_authority_bit() -> None:
    response = ask("agents.dr.example.")
    assert values(response) == ["127.0.1.1", "127.0.1.2"]
    assert response.answer[0].ttl == 5
    assert response.flags & dns.flags.AA
    assert not response.flags & dns.flags.RA
    assert response.flags & dns.flags.RD  # as it was asked


def test_case_does_not_matter_and_is_kept() -> None:
    response = ask("AgEnTs.Dr.eXaMpLe.")
    assert values(response) == ["127.0.1.1", "127.0.1.2"]
    assert response.answer[0].name.to_text() == "AgEnTs.Dr.eXaMpLe."


def test_txt_soa_and_ns_are_answered() -> None:
    assert values(ask("_dr-epoch.agents.dr.example.", "TXT")) == ['"7"']
    assert values(ask("dr.example.", "NS")) == ["ns-1.example.net.", "ns-2.example.net."]
    assert values(ask("dr.example.", "SOA"))[0].startswith("ns-1.example.net. host.example.net. 1 ")


def test_a_name_that_does_not_exist_is_nxdomain_with_the_soa_and_its_negative_ttl() -> None:
    response = ask("nobody.dr.example.")
    assert response.rcode() == dns.rcode.NXDOMAIN
    assert response.authority[0].rdtype == dns.rdatatype.SOA
    assert response.authority[0].ttl == 60
    assert response.flags & dns.flags.AA


@pytest.mark.parametrize(("name", "rtype"), [("agents.dr.example.", "AAAA"), ("dr.example.", "A")])
def test_a_name_without_that_type_is_no_data_and_not_nxdomain(name: str, rtype: str) -> None:
    response = ask(name, rtype)
    assert response.rcode() == dns.rcode.NOERROR
    assert response.answer == []
    assert response.authority[0].rdtype == dns.rdatatype.SOA


def test_a_name_that_exists_only_as_the_parent_of_another_is_no_data() -> None:
    zone = ZoneCopy.of((*BASE, record("a.b.dr.example.", "A", "192.0.2.1")))
    assert ask("b.dr.example.", zone=zone).rcode() == dns.rcode.NOERROR
    assert ask("c.dr.example.", zone=zone).rcode() == dns.rcode.NXDOMAIN


@pytest.mark.parametrize("name", ["example.", ".", "notdr.example.", "agents.dr.example.org."])
def test_names_outside_the_zone_are_refused_without_authority(name: str) -> None:
    response = ask(name)
    assert response.rcode() == dns.rcode.REFUSED
    assert not response.flags & dns.flags.AA


@pytest.mark.parametrize("rtype", ["ANY", "AXFR", "IXFR"])
def test_questions_for_everything_are_refused(rtype: str) -> None:
    query = dns.message.make_query("dr.example.", "A")
    query.question[0].rdtype = dns.rdatatype.from_text(rtype)
    wire = respond(query.to_wire(), ZONE, random.Random(0), udp=True)
    assert wire is not None
    assert dns.message.from_wire(wire).rcode() == dns.rcode.REFUSED


def test_other_classes_are_refused_and_other_operations_not_implemented() -> None:
    assert ask("agents.dr.example.", rdclass=dns.rdataclass.CH).rcode() == dns.rcode.REFUSED
    update = dns.update.UpdateMessage("dr.example.")
    update.replace("agents", 5, "A", "192.0.2.66")
    wire = respond(update.to_wire(), ZONE, random.Random(0), udp=True)
    assert wire is not None
    assert wire[:2] == update.to_wire()[:2]
    assert wire[3] & 0x0F == dns.rcode.NOTIMP


def test_before_the_zone_was_ever_read_the_answer_is_servfail() -> None:
    assert ask("agents.dr.example.", zone=None).rcode() == dns.rcode.SERVFAIL


def test_a_cname_is_followed_inside_the_zone_and_left_to_the_asker_outside_of_it() -> None:
    response = ask("www.dr.example.")
    assert [rrset.rdtype for rrset in response.answer] == [dns.rdatatype.CNAME, dns.rdatatype.A]
    assert response.answer[1].name.to_text() == "agents.dr.example."
    assert values(ask("out.dr.example.")) == ["elsewhere.example.org."]
    assert values(ask("www.dr.example.", "CNAME")) == ["agents.dr.example."]
    assert ask("loop.dr.example.").rcode() == dns.rcode.SERVFAIL


def test_an_answer_that_is_too_long_for_a_datagram_is_truncated_and_whole_over_tcp() -> None:
    assert ask("many.dr.example.", use_edns=False).flags & dns.flags.TC
    assert ask("many.dr.example.", use_edns=0, payload=4096).flags & dns.flags.TC
    whole = ask("many.dr.example.", udp=False)
    assert not whole.flags & dns.flags.TC
    assert len(values(whole)) == 199


@pytest.mark.parametrize(
    ("options", "limit"), [({"use_edns": False}, PLAIN_UDP_BYTES), ({"use_edns": 0, "payload": 4096}, MAX_UDP_BYTES)]
)
def test_no_datagram_is_longer_than_the_asker_takes(options: dict[str, Any], limit: int) -> None:
    query = dns.message.make_query("many.dr.example.", "A", **options)
    wire = respond(query.to_wire(), ZONE, random.Random(0), udp=True)
    assert wire is not None
    assert len(wire) <= limit


def test_an_unknown_edns_version_is_badvers() -> None:
    query = dns.message.make_query("agents.dr.example.", "A", use_edns=0)
    query.use_edns(1)
    wire = respond(query.to_wire(), ZONE, random.Random(0), udp=True)
    assert wire is not None
    assert dns.message.from_wire(wire).rcode() == dns.rcode.BADVERS


@given(st.binary(max_size=300))
def test_no_bytes_make_the_server_fail(data: bytes) -> None:
    answer = respond(data, ZONE, random.Random(0), udp=True)
    assert answer is None or (len(answer) >= 12 and answer[:2] == data[:2] and answer[2] & 0x80)


@given(st.binary(min_size=1, max_size=60))
def test_a_valid_header_with_garbage_behind_it_is_a_format_error_or_an_answer(data: bytes) -> None:
    header = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00"
    answer = respond(header + data, ZONE, random.Random(0), udp=True)
    assert answer is not None
    assert answer[:2] == b"\x12\x34"


def test_responses_are_never_answered() -> None:
    query = dns.message.make_query("agents.dr.example.", "A")
    assert respond(dns.message.make_response(query).to_wire(), ZONE, random.Random(0), udp=True) is None


def test_several_questions_in_one_message_are_a_format_error() -> None:
    one = dns.message.make_query("agents.dr.example.", "A").to_wire()
    two = one[:4] + b"\x00\x02" + one[6:12] + one[12:] * 2
    wire = respond(two, ZONE, random.Random(0), udp=True)
    assert wire is not None
    assert wire[3] & 0x0F == dns.rcode.FORMERR


# ------------------------------------------------------------------------------------------------ weighted choice


def shares(sets: tuple[RecordSet, ...], unhealthy: frozenset[str] = frozenset(), n: int = 6000) -> dict[str, float]:
    rng = random.Random(7)
    counts = Counter(str(choose(sets, rng.randrange, unhealthy)["SetIdentifier"]) for _ in range(n))
    return {region: count / n for region, count in counts.items()}


def test_record_sets_are_chosen_in_proportion_to_their_weights() -> None:
    found = shares((weighted("eu", 30, "1.1.1.1"), weighted("de", 10, "2.2.2.2"), weighted("us", 0, "3.3.3.3")))
    assert found["eu"] == pytest.approx(0.75, abs=0.03)
    assert found["de"] == pytest.approx(0.25, abs=0.03)
    assert "us" not in found


def test_all_zero_weights_are_all_served_alike() -> None:
    found = shares((weighted("eu", 0, "1.1.1.1"), weighted("de", 0, "2.2.2.2"), weighted("us", 0, "3.3.3.3")))
    assert set(found) == {"eu", "de", "us"}
    assert all(share == pytest.approx(1 / 3, abs=0.03) for share in found.values())


def test_weight_zero_is_not_off_when_every_other_record_is_unhealthy() -> None:
    sets = (
        weighted("eu", 100, "1.1.1.1", HealthCheckId="hc-eu"),
        weighted("de", 0, "2.2.2.2", HealthCheckId="hc-de"),
        weighted("us", 0, "3.3.3.3", HealthCheckId="hc-us"),
    )
    assert set(shares(sets)) == {"eu"}
    assert set(shares(sets, frozenset({"hc-eu"}))) == {"de", "us"}
    assert set(shares(sets, frozenset({"hc-eu", "hc-us"}))) == {"de"}
    assert set(shares(sets, frozenset({"hc-eu", "hc-de", "hc-us"}))) == {"eu"}, "none healthy: all count as healthy again"


def test_a_record_without_a_health_check_counts_as_healthy() -> None:
    assert set(shares((weighted("eu", 1, "1.1.1.1"), weighted("de", 0, "2.2.2.2")), frozenset({""}))) == {"eu"}


def test_a_zone_without_soa_is_not_a_zone() -> None:
    with pytest.raises(Refused, match="SOA"):
        ZoneCopy.of(THREE)


@pytest.mark.parametrize(
    ("spelled", "normal"),
    [
        ("Agents.DR.example", "agents.dr.example."),
        ("\\052.dr.example.", "*.dr.example."),
        ("a\\056b.example.", "a\\056b.example."),
        ("a\\134b.example.", "a\\134b.example."),
        ("\\100x.example.", "@x.example."),
    ],
)
def test_names_have_one_spelling_and_an_escaped_dot_is_no_dot(spelled: str, normal: str) -> None:
    assert normal_name(spelled) == normal
    assert normal_name(normal) == normal
