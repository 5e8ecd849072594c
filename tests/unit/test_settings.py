"""Settings are right together or refused together, each broken rule on a line of its own that says what to write."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from controller.errors import Misconfigured
from controller.lab.certificates import Authority
from controller.settings import Settings, describe, fingerprint, load_settings, tls_files
from controller.settings.tls import endings

CONFIG = Path(__file__).parents[2] / "config"
NOW = datetime.now(UTC)
PROCESS = {"region": "eu-west-1", "instance": "a", "state_dir": "state", "api": {"host": "127.0.1.1"}}


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("DR_"):
            monkeypatch.delenv(name)


def lab() -> dict[str, Any]:
    """A small lab that is right."""
    return {
        "group": "fleet",
        "environment": "lab",
        "region": "one",
        "instance": "a",
        "state_dir": "state",
        "etcd": {"endpoints": ["http://127.0.1.10:2379"]},
        "regions": {name: region(i) for i, name in enumerate(("one", "two", "three"), 1)},
        "traffic": {"zone_id": "Z1", "name": "agents.dr.example."},
        "dns": {"servers": ["127.0.0.31:5353"]},
        "approvals": {"allowed_signers": "allowed_signers"},
    }


def region(i: int) -> dict[str, Any]:
    return {
        "bucket": f"bucket-{i}",
        "table": f"table-{i}",
        "addresses": [f"127.0.{i}.1"],
        "controllers": [f"http://127.0.{i}.1:8080"],
    }


def with_(path: str, value: Any, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """The lab (or ``base``) with one setting changed; ``...`` removes it."""
    data = copy.deepcopy(lab() if base is None else base)
    *above, last = path.split("/")
    node = data
    for name in above:
        node = node.setdefault(name, {})
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return data


def refused(data: dict[str, Any]) -> list[str]:
    """The lines of the message with which ``data`` is refused."""
    with pytest.raises(Misconfigured) as caught:
        load_settings(**data)
    assert caught.value.hint
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


# ------------------------------------------------------------------------------------------------------- one bad value

BAD: list[tuple[str, Any, str, str]] = [
    # path, value, how its line begins, what the line says
    ("regions", {"one": region(1)}, "regions = (1 given)", "at least two"),
    ("regions", {}, "regions = (0 given)", "at least two"),
    ("region", "onee", "region = 'onee'", "did you mean 'one'?"),
    ("region", "One", "region = 'One'", "lower-case"),
    ("region", "../one", "region = '../one'", "lower-case"),
    ("instance", "a/b", "instance = 'a/b'", "becomes part of keys"),
    ("instance", "", "instance = ''", "1 to 128"),
    ("group", "fleet one", "group = 'fleet one'", "lower-case"),
    ("group", "fleet\u202etxt", "group = 'fleet\\u202etxt'", "lower-case"),
    ("group", "x" * 10_000, "group = 'xxx", "(10002 characters)"),
    ("environment", "prod", "environment = 'prod'", "'lab' or 'production'"),
    ("state_dir", "", "state_dir = ''", "must be a path"),
    ("state_dir", __file__, "state_dir = ", "is a file"),
    # etcd
    ("etcd/ttl_seconds", 1, "etcd.ttl_seconds = 1", "1.5 times etcd.election_timeout_seconds"),
    ("etcd/ttl_seconds", 2.5, "etcd.ttl_seconds = 2.5", "integer"),
    ("etcd/ttl_seconds", 0, "etcd.ttl_seconds = 0", "greater than or equal to 1"),
    ("etcd/ttl_seconds", True, "etcd.ttl_seconds = True", "not a boolean"),
    ("etcd/ttl_seconds", "10s", "etcd.ttl_seconds = '10s'", "write 10"),
    ("etcd/ttl_seconds", 10_000, "etcd.ttl_seconds = 10000", "less than or equal to"),
    ("etcd/election_timeout_seconds", 7, "etcd.ttl_seconds = 10", "(10.5)"),
    ("etcd/margin_seconds", 10, "etcd.margin_seconds = 10", "less than half of etcd.ttl_seconds (5)"),
    ("etcd/margin_seconds", 12, "etcd.margin_seconds = 12", "less than half"),
    ("etcd/margin_seconds", 5, "etcd.margin_seconds = 5", "less than half"),
    ("etcd/margin_seconds", 0, "etcd.margin_seconds = 0", "greater than 0"),
    ("etcd/margin_seconds", -1, "etcd.margin_seconds = -1", "greater than 0"),
    ("etcd/tick_seconds", 4.5, "etcd.tick_seconds = 4.5", "9 + 1 < 10"),
    ("etcd/call_timeout_seconds", 3, "etcd.call_timeout_seconds = 3", "9 + 1 < 10"),
    ("etcd/endpoints", [], "etcd.endpoints = []", "at least 1"),
    ("etcd/endpoints", ["127.0.1.10:2379"], "etcd.endpoints.0 = '127.0.1.10:2379'", "write 'https://127.0.1.10:2379'"),
    ("etcd/endpoints", ["http://127.0.1.10"], "etcd.endpoints.0 =", "write 'http://127.0.1.10:2379'"),
    ("etcd/endpoints", ["http://127.0.1.10:0"], "etcd.endpoints.0 =", "1 to 65535"),
    ("etcd/endpoints", ["http://127.0.1.10:99999"], "etcd.endpoints.0 =", "1 to 65535"),
    ("etcd/endpoints", ["http://127.0.1.10:2379/v3"], "etcd.endpoints.0 =", "end after host and port"),
    ("etcd/endpoints", ["ftp://127.0.1.10:2379"], "etcd.endpoints.0 =", "http:// or https://"),
    ("etcd/endpoints", ["http://127.0.1.10:2379", "HTTP://127.0.1.10:2379/"], "etcd.endpoints =", "twice"),
    ("etcd/endpoints", ["http://127.0.1.10:2379", "https://127.0.1.11:2379"], "etcd.endpoints =", "one cluster"),
    ("etcd/endpoints", ["http://10.0.0.1:2379"], "etcd.endpoints = 'http://10.0.0.1:2379'", "127.0.0.0/8"),
    ("etcd/endpoints", ["http://localhost:2379"], "etcd.endpoints = 'http://localhost:2379'", "127.0.0.0/8"),
    ("etcd/endpoints", ["http://127.0.0.1.evil.example:2379"], "etcd.endpoints =", "127.0.0.0/8"),
    ("etcd/endpoints", "http://127.0.1.10:2379", "etcd.endpoints =", "list"),
    ("etcd/prefix", "dr", "etcd.prefix = 'dr'", "begins with '/'"),
    ("etcd/prefix", "/dr/", "etcd.prefix = '/dr/'", "does not end with one"),
    ("etcd/prefix", "/dr/../auth", "etcd.prefix = '/dr/../auth'", "no '.' or '..'"),
    ("etcd/cert_file", "cert.pem", "etcd.key_file = (missing)", "belong together"),
    ("etcd/ca_file", "nowhere/ca.pem", "etcd.ca_file = 'nowhere/ca.pem'", "No such file"),
    ("etcd/username", "dr", "etcd.password = (missing)", "belong together"),
    ("etcd", "http://127.0.1.10:2379", "etcd = 'http://127.0.1.10:2379'", "dictionary"),
    # regions
    ("regions/one/bucket", "B", "regions.one.bucket = 'B'", "3 to 63"),
    ("regions/one/bucket", "bucket/../other", "regions.one.bucket =", "3 to 63"),
    ("regions/one/bucket", "192.168.0.1", "regions.one.bucket =", "IP address"),
    ("regions/one/bucket", "a..b", "regions.one.bucket =", "two dots"),
    ("regions/one/bucket", "s3://bucket", "regions.one.bucket =", "name alone"),
    ("regions/one/bucket", "xn--bucket", "regions.one.bucket =", "keeps for itself"),
    ("regions/one/bucket", "bucket-2", "regions.two.bucket = 'bucket-2'", "is that of region one too"),
    ("regions/one/table", "ab", "regions.one.table = 'ab'", "3 to 255"),
    ("regions/one/addresses", [], "regions.one.addresses = []", "at least 1"),
    ("regions/one/addresses", ["::1"], "regions.one.addresses.0 = '::1'", "IPv4"),
    ("regions/one/addresses", ["0.0.0.0"], "regions.one.addresses.0 = '0.0.0.0'", "can reach"),
    ("regions/one/addresses", ["127.0.2.1"], "regions.two.addresses = '127.0.2.1'", "is that of region one too"),
    ("regions/one/controllers", ["http://127.0.2.1:8080"], "regions.two.controllers =", "is that of region one too"),
    ("regions/one/controllers", ["http://10.0.0.1:8080"], "regions.one.controllers =", "127.0.0.0/8"),
    ("regions/one/s3_endpoint", "http://10.0.0.1", "regions.one.s3_endpoint =", "127.0.0.0/8"),
    ("regions/one/kms_endpoint", "http://10.0.0.1", "regions.one.kms_endpoint =", "127.0.0.0/8"),
    ("regions/one/kms_key", "my key", "regions.one.kms_key = 'my key'", "ARN, the id or the alias"),
    ("regions/one/kms_key", "alias/agent-dr", "regions.two.kms_key = (missing)", "required in every region"),
    ("encryption/enabled", True, "regions.one.kms_key = (missing)", "required in every region"),
    ("regions/one/kms_key", "arn:aws:kms:xx-west-9:111122223333:key/1", "regions.one.kms_key =", "fail together"),
    ("regions/one/former_kms_keys", ["x"], "regions.one.former_kms_keys.0 = 'x'", "ARN, the id or the alias"),
    ("encryption/rotate_seconds", 0, "encryption.rotate_seconds = 0", "greater than 0"),
    ("regions/one/priority", -1, "regions.one.priority = -1", "greater than or equal to 0"),
    ("regions/One", region(9), "regions.One = 'One'", "lower-case"),
    ("regions/one/aws_region", "eu west", "regions.one.aws_region =", "AWS region"),
    # stream, rpo
    ("stream/copies", 0, "stream.copies = 0", "greater than or equal to 1"),
    ("stream/copies", 4, "stream.copies = 4", "at most the number of regions (3)"),
    ("stream/prefix", "../other", "stream.prefix = '../other'", "no '.' or '..'"),
    ("stream/prefix", "/dr", "stream.prefix = '/dr'", "no '/' at its ends"),
    ("stream/prefix", "a/./b", "stream.prefix = 'a/./b'", "no '.' or '..'"),
    ("stream/prefix", "a//b", "stream.prefix = 'a//b'", "must be a path"),
    ("stream/segment_max_bytes", 100_000_000, "stream.segment_max_bytes =", "stream.queue_max_bytes"),
    ("stream/ack_timeout_seconds", 0.01, "stream.ack_timeout_seconds = 0.01", "stream.flush_seconds (0.02)"),
    ("rpo/seconds", 0, "rpo.seconds = 0", "greater than 0"),
    ("rpo/seconds", -5, "rpo.seconds = -5", "greater than 0"),
    ("rpo/seconds", float("nan"), "rpo.seconds = nan", "finite"),
    ("rpo/seconds", float("inf"), "rpo.seconds = inf", "finite"),
    ("rpo/seconds", "nan", "rpo.seconds = 'nan'", "finite"),
    ("rpo/seconds", "5m", "rpo.seconds = '5m'", "write 300"),
    ("rpo/seconds", "1.5h", "rpo.seconds = '1.5h'", "write 5400"),
    ("rpo/seconds", "soon", "rpo.seconds = 'soon'", "valid number"),
    ("stream/retention_seconds", 1000, "stream.snapshot_seconds = 300", "a quarter of stream.retention_seconds (250)"),
    ("stream/retention_seconds", 200, "stream.retention_seconds = 200", "at least 300"),
    ("rpo/seconds", 0.02, "rpo.seconds = 0.02", "stream.flush_seconds"),
    ("rpo/policy", "hope", "rpo.policy = 'hope'", "'alert' or 'enforce'"),
    ("stream/streams", 65, "stream.streams = 65", "less than or equal to 64"),
    ("stream/streams", 0, "stream.streams = 0", "greater than or equal to 1"),
    # promotion, fleet
    ("promotion/approvals_required", 0, "promotion.approvals_required = 0", "greater than or equal to 1"),
    ("promotion/break_glass_approvals", 3, "promotion.break_glass_approvals = 3", "at most promotion.approvals_required"),
    ("promotion/approval_ttl_seconds", 20, "promotion.approval_ttl_seconds = 20", "two lease TTLs (20)"),
    ("promotion/approval_ttl_seconds", 3600, "promotion.approval_ttl_seconds = 3600", "at most promotion.plan_ttl_seconds"),
    ("promotion/confirm_timeout_seconds", 5, "promotion.confirm_timeout_seconds = 5", "traffic.ttl_seconds (5)"),
    ("promotion/tolerance_seconds", float("nan"), "promotion.tolerance_seconds = nan", "finite"),
    ("promotion/tolerance_records", -1, "promotion.tolerance_records = -1", "greater than or equal to 0"),
    ("fleet/misses_failed", 2, "fleet.misses_failed = 2", "degrades before it fails"),
    ("fleet/beat_seconds", 9, "fleet.beat_seconds = 9", "rights end between beats"),
    # traffic, dns, others
    ("traffic/active_weight", 0, "traffic.active_weight = 0", "1 to 255"),
    ("traffic/active_weight", -1, "traffic.active_weight = -1", "1 to 255"),
    ("traffic/active_weight", 256, "traffic.active_weight = 256", "1 to 255"),
    ("traffic/zone_id", "/hostedzone/Z123", "traffic.zone_id = '/hostedzone/Z123'", "write 'Z123'"),
    ("traffic/zone_id", "z-123", "traffic.zone_id = 'z-123'", "capital letters and digits"),
    ("traffic/name", "agents", "traffic.name = 'agents'", "full DNS name"),
    ("traffic/name", "*.dr.example", "traffic.name = '*.dr.example'", "full DNS name"),
    ("traffic/name", "a..example", "traffic.name = 'a..example'", "full DNS name"),
    ("traffic/endpoint", "http://10.0.0.1:4570", "traffic.endpoint =", "127.0.0.0/8"),
    ("dns/servers", [], "dns.servers = []", "at least 1"),
    ("dns/servers", ["resolver.example:53"], "dns.servers.0 =", "literal IP address"),
    ("dns/servers", ["127.0.0.31"], "dns.servers.0 =", "literal IP address"),
    ("dns/servers", ["127.0.0.31:0"], "dns.servers.0 =", "1 to 65535"),
    ("dns/servers", ["127.0.0.31:53", "127.0.0.31:53"], "dns.servers =", "twice"),
    ("dns/servers", ["fd00::2:53"], "dns.servers.0 =", "write '[fd00::2]:53'"),
    ("notify/webhook_url", "http://169.254.169.254/latest", "notify.webhook_url = (hidden)", "link-local"),
    ("notify/webhook_url", "file:///etc/passwd", "notify.webhook_url = (hidden)", "http:// or https://"),
    ("notify/webhook_url", "http://example.com/page", "notify.webhook_url = (hidden)", "https"),
    ("notify/webhook_url", "https://0251.0376.0251.0376/", "notify.webhook_url = (hidden)", "four decimal numbers"),
    ("notify/webhook_url", "https://hooks.example\\@10.0.0.1/", "notify.webhook_url = (hidden)", "backslashes"),
    ("notify/webhook_url", "https://hooks.example:25/", "notify.webhook_url = (hidden)", "another protocol"),
    ("notify/webhook_url", "https://10.0.0.1/", "notify.webhook_url = (hidden)", "in no network that is allowed"),
    ("notify/networks", ["169.254.0.0/16"], "notify.networks.0 = '169.254.0.0/16'", "private or loopback range"),
    ("notify/networks", ["0.0.0.0/0"], "notify.networks.0 = '0.0.0.0/0'", "private or loopback range"),
    ("notify/networks", ["10.0.0.1/8"], "notify.networks.0 = '10.0.0.1/8'", "without host bits"),
    ("etcd/endpoints", ["http://2130706433:2379"], "etcd.endpoints.0 =", "four decimal numbers"),
    ("api/host", "0.0.0.0", "api.address = (missing)", "required when api.host"),
    ("api/host", "10.0.0.1", "api.host = '10.0.0.1'", "127.0.0.0/8"),
    ("api/port", 65536, "api.port = 65536", "65535"),
    ("aws/connect_timeout_seconds", 3, "aws.connect_timeout_seconds = 3", "aws.call_timeout_seconds (2)"),
    ("aws/account_id", "1234-5678-9012", "aws.account_id = '1234-5678-9012'", "twelve digits"),
    ("aws/account_id", 12345678901, "aws.account_id = 12345678901", 'write "012345678901"'),
    ("aws/sts_endpoint", "http://10.0.0.1", "aws.sts_endpoint =", "127.0.0.0/8"),
    ("aws/max_pool_connections", 0, "aws.max_pool_connections = 0", "greater than or equal to 1"),
    # unknown and missing
    ("etcd/tll_seconds", 5, "etcd.tll_seconds = (set)", "did you mean 'ttl_seconds'?"),
    ("trafic", {}, "trafic = (set)", "did you mean 'traffic'?"),
    ("regions/one/buckett", "x", "regions.one.buckett = (set)", "did you mean 'bucket'?"),
    ("rpo/zzz", 1, "rpo.zzz = (set)", "known here: policy, report_seconds"),
    ("etcd/endpoints", ..., "etcd.endpoints = (missing)", "DR_ETCD__ENDPOINTS"),
    ("group", ..., "group = (missing)", "DR_GROUP"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "begins", "says"), BAD, ids=[f"{p}={str(v)[:30]!r}" for p, v, _, _ in BAD])
def test_a_bad_setting_is_named_with_its_value_and_its_rule(path: str, value: Any, begins: str, says: str) -> None:
    lines = refused(with_(path, value))
    assert any(line.startswith(begins) and says in line for line in lines), lines


def test_the_settings_that_the_bad_ones_are_made_of_are_right() -> None:
    settings = load_settings(**lab())
    assert settings.region == "one"
    assert settings.regions["two"].aws_region == "two"
    assert settings.api.address == "http://127.0.0.1:8080"
    assert settings.fence_quorum == 2


def test_all_broken_rules_are_told_at_once_also_those_between_values() -> None:
    data = with_("rpo/seconds", "5m", with_("stream/copies", 9, with_("etcd/margin_seconds", 5, with_("dns/servers", ...))))
    begins = {line.split(" = ")[0] for line in refused(data)}
    assert begins == {"rpo.seconds", "stream.copies", "etcd.margin_seconds", "dns.servers"}


def test_a_rule_that_looks_at_a_wrong_value_has_nothing_to_say() -> None:
    """The TTL's default would not do with this margin, but nobody asked for the default."""
    lines = refused(with_("etcd/margin_seconds", 6, with_("etcd/ttl_seconds", "20s")))
    assert [line.split(" = ")[0] for line in lines] == ["etcd.ttl_seconds"]


def test_nothing_at_all_says_everything_that_is_needed() -> None:
    begins = {line.split(" = ")[0] for line in refused({})}
    required = {"group", "environment", "region", "instance", "state_dir", "etcd", "regions", "traffic", "dns", "approvals"}
    assert begins == required


@given(
    st.dictionaries(
        st.sampled_from([*Settings.model_fields, "x"]), st.one_of(st.none(), st.text(), st.floats(), st.lists(st.text()))
    )
)
def test_no_input_does_anything_but_load_or_be_refused(data: dict[str, Any]) -> None:
    with contextlib.suppress(Misconfigured):
        assert load_settings(**{**lab(), **data}).group


# ------------------------------------------------------------------------------------------------------ rules explained


@given(st.integers(2, 6))
def test_every_fence_quorum_meets_every_set_of_stores_that_acknowledged_two_copies_or_more(regions: int) -> None:
    """Why ``regions >= 2`` and ``copies <= regions`` are all that has to be asked of the numbers."""
    for copies in range(2, regions + 1):
        for fenced in itertools.combinations(range(regions), regions - 1):
            for acknowledged in itertools.combinations(range(regions), copies):
                assert set(fenced) & set(acknowledged)


def test_equal_table_names_are_two_tables_in_two_aws_regions_and_one_in_one() -> None:
    data = with_("regions/two/table", "table-1")
    assert load_settings(**data)
    data["regions"]["two"]["aws_region"] = "one"
    assert any("regions.two.table" in line and "two copies in one place" in line for line in refused(data))


# ----------------------------------------------------------------------------------------------------------- where from


def test_the_lab_file_is_right_and_complete(tmp_path: Path) -> None:
    settings = load_settings(CONFIG / "lab.toml", **{**PROCESS, "state_dir": tmp_path})
    assert list(settings.regions) == ["eu-west-1", "eu-central-1", "us-east-1"]
    assert [r.s3_endpoint for r in settings.regions.values()] == [f"http://127.0.{i}.20:4566" for i in (1, 2, 3)]
    assert settings.etcd.ttl_seconds == 5
    assert settings.api.address == "http://127.0.1.1:8080"
    assert settings.approvals.allowed_signers == CONFIG / "allowed_signers"


def test_the_environment_wins_over_the_file_and_the_caller_over_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DR_CONFIG", str(CONFIG / "lab.toml"))
    monkeypatch.setenv("DR_ETCD__TTL_SECONDS", "7")
    monkeypatch.setenv("DR_ETCD__TICK_SECONDS", "0.25")
    monkeypatch.setenv("DR_ETCD__ENDPOINTS", '["http://127.0.9.9:2379"]')
    monkeypatch.setenv("DR_REGIONS__us-east-1__BUCKET", "from-environment")
    monkeypatch.setenv("DR_REGION", "us-east-1")
    settings = load_settings(**{**PROCESS, "region": None, "etcd": {"ttl_seconds": 9}, "state_dir": tmp_path})
    assert (settings.etcd.ttl_seconds, settings.etcd.tick_seconds, settings.etcd.margin_seconds) == (9, 0.25, 1.0)
    assert settings.etcd.endpoints == ["http://127.0.9.9:2379"]
    assert settings.regions["us-east-1"].bucket == "from-environment"
    assert settings.regions["us-east-1"].table == "dr-lab-us-east-1"
    assert settings.region == "us-east-1"


def test_misspelt_variables_are_refused_and_those_of_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DR_ECTD__TTL_SECONDS", "7")
    monkeypatch.setenv("DR_RPO__SECOND", "7")
    monkeypatch.setenv("DR_GROUPE", "fleet")
    monkeypatch.setenv("DR_URL", "http://127.0.0.1")
    lines = refused(lab())
    assert len(lines) == 3
    assert any(line.startswith("DR_ECTD__TTL_SECONDS") and "'etcd'" in line for line in lines)
    assert any(line.startswith("DR_GROUPE") and "'group'" in line for line in lines)
    assert any(line.startswith("rpo.second = ") and "'seconds'" in line for line in lines)


def test_a_list_in_the_environment_that_is_not_json_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DR_DNS", "127.0.0.1:53")
    assert any(line.startswith("DR_DNS") and "JSON" in line for line in refused(lab()))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("group = ", "is not TOML"),
        ("[regions.one]\n[regions.one]\n", "is not TOML"),  # the same region twice
        ("\udcff", "is not TOML"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, text: str | None, says: str) -> None:
    file = tmp_path / "dr.toml"
    if text is not None:
        file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(Misconfigured, match=says) as caught:
        load_settings(file)
    assert str(file) in str(caught.value)


def test_relative_paths_in_a_file_are_relative_to_the_file(tmp_path: Path) -> None:
    text = (CONFIG / "lab.toml").read_text().replace('environment = "lab"', 'environment = "lab"\nstate_dir = "data"')
    (tmp_path / "lab.toml").write_text(text)
    settings = load_settings(tmp_path / "lab.toml", **{**PROCESS, "state_dir": None})
    assert settings.state_dir == tmp_path / "data"
    assert settings.approvals.allowed_signers == tmp_path / "allowed_signers"


# ------------------------------------------------------------------------------------------------------------- secrets


def test_no_secret_is_shown_by_a_refusal_or_by_the_settings_themselves() -> None:
    data = with_("etcd/password", "hunter2", with_("etcd/username", "dr"))
    data["notify"] = {"webhook_url": "https://example.com/hunter2"}
    settings = load_settings(**data)
    assert settings.etcd.password is not None
    assert settings.etcd.password.get_secret_value() == "hunter2"
    assert "hunter2" not in repr(settings) + str(settings)
    for bad in (
        with_("etcd/pasword", "hunter2"),
        with_("etcd/password", ["hunter2"]),
        with_("etcd/password", "hunter2", with_("etcd/endpoints", ...)),
        with_("etcd/endpoints", ["http://dr:hunter2@127.0.0.1:2379"]),
        with_("notify/webhook_url", "ftp://example.com/hunter2"),
        with_("etcd", [{"password": "hunter2"}]),
    ):
        assert "hunter2" not in "\n".join(refused(bad))


# ---------------------------------------------------------------------------------------------------------- production


def certificate(folder: Path, name: str, begins: datetime, ends: datetime) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number(), begins, ends)
    (folder / f"{name}.pem").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    (folder / f"{name}-key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return key


@pytest.fixture
def production(tmp_path: Path) -> dict[str, Any]:
    """config/production.example.toml with files that exist."""
    certificate(tmp_path, "ca", NOW - timedelta(days=1), NOW + timedelta(days=1))
    certificate(tmp_path, "dr", NOW - timedelta(days=1), NOW + timedelta(days=1))
    (tmp_path / "allowed_signers").write_text("# on call\nada@example.com ssh-ed25519 AAAA\n")
    data = tomllib.loads((CONFIG / "production.example.toml").read_text())
    data["etcd"].update(
        ca_file=str(tmp_path / "ca.pem"), cert_file=str(tmp_path / "dr.pem"), key_file=str(tmp_path / "dr-key.pem")
    )
    data["approvals"]["allowed_signers"] = str(tmp_path / "allowed_signers")
    authority = Authority(tmp_path, "api-ca")
    pair = authority.issue("api", hosts=["a.eu-west-1.dr.example.com"], uris=["drctl://support-agents/eu-west-1/a"])
    ours = str(authority.cert_file)
    data["api"].update(cert_file=str(pair.cert_file), key_file=str(pair.key_file), ca_file=ours, client_ca_file=ours)
    data["api"]["access_file"] = str(tmp_path / "access.json")
    return data


def test_the_production_example_is_right_once_its_files_exist(production: dict[str, Any]) -> None:
    settings = load_settings(**production)
    assert settings.environment == "production"
    assert settings.api.address == "https://a.eu-west-1.dr.example.com:8080"


def test_the_production_example_says_which_of_its_files_are_missing() -> None:
    with pytest.raises(Misconfigured) as caught:
        load_settings(CONFIG / "production.example.toml")
    told = str(caught.value)
    for field in (
        "etcd.ca_file",
        "etcd.cert_file",
        "etcd.key_file",
        "approvals.allowed_signers",
        "api.cert_file",
        "api.ca_file",
    ):
        assert field in told


def test_the_production_example_names_every_setting_or_shows_it_in_a_comment() -> None:
    text = (CONFIG / "production.example.toml").read_text()
    names = {doc.name.rsplit(".", 1)[-1] for doc in describe()}
    assert sorted(name for name in names if name not in text and name not in {"password", "endpoint"}) == []


@pytest.mark.parametrize(
    ("path", "value", "begins", "says"),
    [
        ("etcd/endpoints", [f"http://127.0.{i}.10:2379" for i in (1, 2, 3)], "etcd.endpoints", "must be https in production"),
        ("etcd/endpoints", ["https://a.example:2379", "https://b.example:2379"], "etcd.endpoints", "at least 3"),
        ("etcd/ca_file", ..., "etcd.ca_file = (missing)", "required in production"),
        ("api/cert_file", ..., "api.cert_file = (missing)", "belong together"),
        ("api/ca_file", ..., "api.ca_file = (missing)", "insecure_private_network"),
        ("api/client_ca_file", ..., "api.client_ca_file = (missing)", "for controllers only"),
        ("api/access_file", ..., "api.access_file = (missing)", "every caller is known"),
        ("api/address", "http://a.eu-west-1.dr.example.com:8080", "api.address", "must be https"),
        ("api/address", "https://b.eu-west-1.dr.example.com:8080", "api.cert_file", "does not name b.eu-west-1"),
        ("api/key_file", "/nowhere/key.pem", "api.key_file = '/nowhere/key.pem'", "cannot be read"),
        ("api/peer_names", ["*.example.com"], "api.peer_names.0", "without wildcards"),
        ("regions/us-east-1/controllers", ["http://10.0.0.9:8080"], "regions.us-east-1.controllers", "must be https"),
        ("instance", "b", "api.cert_file", "drctl://support-agents/eu-west-1/b"),
        ("etcd/cert_file", ..., "etcd.cert_file = (missing)", "belong together"),
        ("regions/eu-west-1/s3_endpoint", "http://10.0.0.1:9000", "regions.eu-west-1.s3_endpoint", "must be https"),
        ("traffic/endpoint", "http://127.0.0.30:4570", "traffic.endpoint", "must be https"),
        ("aws/sts_endpoint", "http://127.0.0.30:4570", "aws.sts_endpoint", "must be https"),
        ("regions/eu-west-1/aws_region", "us-east-1", "regions.us-east-1.aws_region", "would fail together"),
        ("regions/eu-west-1/addresses", ["127.0.0.1"], "regions.eu-west-1.addresses", "clients can reach"),
        ("promotion/approvals_required", 1, "promotion.approvals_required = 1", "at least 2 in production"),
        ("approvals/allowed_signers", "nowhere", "approvals.allowed_signers", "No such file"),
        ("approvals/allowed_signers", "/dev/null", "approvals.allowed_signers", "lists nobody"),
        ("group", "support-drill", "group = 'support-drill'", "name for drills"),
        ("group", "test", "group = 'test'", "name for drills"),
        ("state_dir", "state", "state_dir = 'state'", "absolute"),
        ("notify/webhook_url", "http://example.com/page", "notify.webhook_url = (hidden)", "must be https"),
        ("notify/networks", ["127.0.0.0/8"], "notify.networks = ['127.0.0.0/8']", "must not hold loopback"),
        ("api/address", ..., "api.address = (missing)", "required when api.host"),
    ],
)
def test_production_refuses_what_a_lab_may_do(
    production: dict[str, Any], path: str, value: Any, begins: str, says: str
) -> None:
    lines = refused(with_(path, value, production))
    assert any(line.startswith(begins) and says in line for line in lines), lines


def test_an_expired_certificate_a_future_one_and_a_foreign_key_are_refused(production: dict[str, Any], tmp_path: Path) -> None:
    certificate(tmp_path, "old", NOW - timedelta(days=3), NOW - timedelta(days=2))
    certificate(tmp_path, "new", NOW + timedelta(days=2), NOW + timedelta(days=3))

    def line(field: str, name: str) -> str:
        lines = refused(with_(f"etcd/{field}", str(tmp_path / name), production))
        return next(line for line in lines if line.startswith(f"etcd.{field}"))

    assert "expired at" in line("cert_file", "old.pem")
    assert "expired at" in line("ca_file", "old.pem")
    assert "not valid before" in line("cert_file", "new.pem")
    assert "does not belong to the certificate" in line("key_file", "ca-key.pem")
    assert "no PEM certificate" in line("cert_file", "dr-key.pem")
    assert "no PEM private key" in line("key_file", "dr.pem")
    assert "cannot be read" in line("key_file", "absent.pem")


def test_a_key_with_a_password_is_refused_because_a_daemon_has_nobody_to_ask(
    production: dict[str, Any], tmp_path: Path
) -> None:
    key = certificate(tmp_path, "dr", NOW - timedelta(days=1), NOW + timedelta(days=1))
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
    (tmp_path / "dr-key.pem").write_bytes(locked)
    assert any(line.startswith("etcd.key_file") and "encrypted" in line for line in refused(production))


def test_production_runs_without_tls_only_when_somebody_says_so(production: dict[str, Any]) -> None:
    for name in ("cert_file", "key_file", "ca_file", "client_ca_file", "access_file"):
        del production["api"][name]
    production["api"]["address"] = "http://10.0.0.5:8080"
    lines = refused(production)
    assert {line.partition(" ")[0] for line in lines} >= {
        "api.cert_file", "api.key_file", "api.ca_file", "api.client_ca_file", "api.access_file", "api.address",
    }  # fmt: skip
    production["api"]["insecure_private_network"] = True
    assert load_settings(**production).api.insecure_private_network


def test_a_certificate_of_the_api_that_ends_soon_is_told_by_name(production: dict[str, Any]) -> None:
    settings = load_settings(**production)
    etcd, api = tls_files(settings)
    soon = [sentence.partition(":")[0] for sentence in endings(etcd, NOW + timedelta(days=14))]
    assert soon == ["etcd.ca_file", "etcd.cert_file"]
    assert list(endings(api, NOW + timedelta(hours=1))) == []


def test_a_bundle_of_authorities_may_carry_an_expired_one(production: dict[str, Any], tmp_path: Path) -> None:
    certificate(tmp_path, "old", NOW - timedelta(days=3), NOW - timedelta(days=2))
    (tmp_path / "ca.pem").write_bytes((tmp_path / "old.pem").read_bytes() + (tmp_path / "ca.pem").read_bytes())
    assert load_settings(**production)


# --------------------------------------------------------------------------------------------- reference and fingerprint


def test_every_setting_is_described_with_its_variable() -> None:
    docs = describe()
    assert len(docs) > 70
    for doc in docs:
        assert doc.description, doc.name
        assert doc.type, doc.name
        assert doc.variable == "DR_" + doc.name.upper().replace(".", "__")
    by_name = {doc.name: doc for doc in docs}
    assert by_name["etcd.endpoints"].type == "list[str]"
    assert by_name["etcd.ca_file"].type == "Path | None"
    assert by_name["rpo.policy"].type == "alert | enforce"
    assert by_name["regions.NAME.bucket"].shared


def test_controllers_of_one_group_have_one_fingerprint() -> None:
    first = load_settings(**lab())
    data = lab()
    data.update(region="two", instance="b", state_dir="other", api={"host": "127.0.2.1", "port": 9000})
    data["etcd"] = {"endpoints": ["http://127.0.2.10:2379", "http://127.0.1.10:2379"]}
    data["regions"]["one"]["s3_endpoint"] = "http://127.0.0.33:7001"
    data["regions"] = dict(reversed(data["regions"].items()))
    data["dns"] = {"servers": ["127.0.0.99:53"]}
    data["notify"] = {"webhook_url": "https://example.com/x"}
    assert fingerprint(load_settings(**data)) == fingerprint(first)
    assert len(fingerprint(first)) == 64


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("etcd/ttl_seconds", 11),
        ("regions/two/bucket", "other"),
        ("stream/copies", 2),
        ("rpo/seconds", 6),
        ("group", "x"),
    ],
)
def test_a_shared_setting_that_differs_gives_another_fingerprint(path: str, value: Any) -> None:
    assert fingerprint(load_settings(**with_(path, value))) != fingerprint(load_settings(**lab()))


def test_settings_do_not_change_once_they_are_loaded() -> None:
    settings = load_settings(**lab())
    with pytest.raises(ValueError, match="frozen"):
        settings.group = "other"
    with pytest.raises(ValueError, match="frozen"):
        settings.etcd.ttl_seconds = 1
