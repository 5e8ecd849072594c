"""The IAM policies of ``terraform/modules/iam``: what they must deny, and that Terraform renders them as the tests do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.iam import ACCOUNT, Call, allowed, documents, granted

ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "terraform" / "modules" / "iam"
TABLE = f"arn:aws:dynamodb:eu-west-1:{ACCOUNT}:table/agent-dr"
ZONE = "arn:aws:route53:::hostedzone/Z0AGENTS"
KEY = f"arn:aws:kms:eu-west-1:{ACCOUNT}:key/aaaa-1"
VALUES: dict[str, Any] = {
    "group": "fleet",
    "buckets": ["dr-eu", "dr-us"],
    "tables": [TABLE],
    "zone": "Z0AGENTS",
    "name": "Agents.DR.example.",
    "keys": [KEY],
}
ALL = documents(**VALUES)
R53 = "route53:ChangeResourceRecordSets"


def put(key: str, **headers: str) -> Call:
    context = {f"s3:{name.replace('_', '-')}": (value,) for name, value in headers.items()}
    return Call("PutObject", (f"arn:aws:s3:::{key}",), {"s3:ObjectCreationOperation": ("true",), **context})


def item(operation: str, *keys: str, table: str = TABLE) -> Call:
    return Call(operation, (table,), {"dynamodb:LeadingKeys": keys} if keys else {})


def change(
    *names: str, types: tuple[str, ...] = ("A", "TXT"), actions: tuple[str, ...] = ("DELETE", "CREATE"), zone: str = ZONE
) -> Call:
    keys = {f"{R53}NormalizedRecordNames": names, f"{R53}RecordTypes": types, f"{R53}Actions": actions}
    return Call("ChangeResourceRecordSets", (zone,), keys)


def key(operation: str, group: str = "fleet", arn: str = KEY) -> Call:
    return Call(operation, (arn,), {"kms:EncryptionContext:agent-dr:group": (group,)} if group else {})


GOOD = [
    ("sealing", key("GenerateDataKey")),
    ("unsealing", key("Decrypt")),
    ("streaming", put("dr-eu/dr/fleet/s00/1.seg", if_none_match="*")),
    ("streaming", put("dr-us/dr/fleet/s00/1.seg", if_match='"etag"')),
    ("streaming", item("UpdateItem", "fleet#s00")),
    ("streaming", item("BatchWriteItem", "fleet#s00", "fleet#s01")),
    ("streaming", Call("ListObjectsV2", ("arn:aws:s3:::dr-eu",), {"s3:prefix": ("dr/fleet/s00/",)})),
    ("streaming", Call("ListObjectsV2", ("arn:aws:s3:::dr-eu",))),  # how S3 asks whether a missing object may read as 404
    ("promotion", change("agents.dr.example", "_dr-epoch.agents.dr.example")),
    ("drills", Call("GetObject", ("arn:aws:s3:::dr-eu/dr/fleet/s00/1.seg",))),
]

BAD = [
    ("a data key for another group", "sealing", key("GenerateDataKey", "other")),
    ("a data key without a context", "sealing", key("Encrypt", "")),
    ("another key", "sealing", key("Decrypt", arn=KEY + "2")),
    ("a drill that seals", "unsealing", key("GenerateDataKey")),
    ("opening while streaming without sealing", "streaming", key("Decrypt")),
    ("an overwrite", "streaming", put("dr-eu/dr/fleet/s00/1.seg")),
    ("another group's objects", "streaming", put("dr-eu/dr/fleet2/s00/1.seg", if_none_match="*")),
    ("another group's objects by a longer name", "streaming", put("dr-eu/dr/fleet-2/s00/1.seg", if_none_match="*")),
    ("another prefix", "streaming", put("dr-eu/other/fleet/s00/1.seg", if_none_match="*")),
    ("another bucket", "streaming", put("dr-asia/dr/fleet/s00/1.seg", if_none_match="*")),
    ("another group's listing", "streaming", Call("ListObjectsV2", ("arn:aws:s3:::dr-eu",), {"s3:prefix": ("dr/other/",)})),
    ("another group's items", "streaming", item("UpdateItem", "other#s00")),
    ("a batch with one item of another group", "streaming", item("BatchWriteItem", "fleet#s00", "other#s00")),
    ("items without a key", "streaming", item("GetItem")),
    ("another table", "streaming", item("GetItem", "fleet#s00", table=TABLE + "2")),
    ("another account's table", "streaming", item("GetItem", "fleet#s00", table=TABLE.replace(ACCOUNT, "9" * 12))),
    ("DNS while streaming", "streaming", change("agents.dr.example")),
    ("another zone", "promotion", change("agents.dr.example", zone="arn:aws:route53:::hostedzone/Z0OTHER")),
    ("another name", "promotion", change("agents.dr.example", "www.dr.example")),
    ("a name below ours", "promotion", change("x.agents.dr.example")),
    ("another type", "promotion", change("agents.dr.example", types=("A", "MX"))),
    ("an upsert, which compares nothing", "promotion", change("agents.dr.example", actions=("UPSERT",))),
    ("a change that names nothing", "promotion", Call("ChangeResourceRecordSets", (ZONE,))),
    ("objects while promoting", "promotion", put("dr-eu/dr/fleet/s00/1.seg", if_none_match="*")),
    ("a drill that writes", "drills", put("dr-eu/dr/fleet/s00/1.seg", if_none_match="*")),
    ("a drill that moves a head", "drills", item("UpdateItem", "fleet#s00")),
]


@pytest.mark.parametrize(("policy", "call"), GOOD, ids=[f"{p}-{c.operation}-{i}" for i, (p, c) in enumerate(GOOD)])
def test_what_has_to_work_is_allowed(policy: str, call: Call) -> None:
    assert allowed([ALL[policy]], call)


@pytest.mark.parametrize(("policy", "call"), [(p, c) for _, p, c in BAD], ids=[what for what, _, _ in BAD])
def test_what_must_not_be_done_is_denied(policy: str, call: Call) -> None:
    assert not allowed([ALL[policy]], call)


def test_drills_do_not_change_production_whatever_else_they_are_given() -> None:
    everything = {"Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
    elsewhere = put("shadow/dr/fleet-drill/s00/1.seg", if_none_match="*")
    production = {"agent-dr-environment": "production"}
    assert allowed([everything, ALL["drills"]], elsewhere)
    assert allowed([everything, ALL["drills"]], elsewhere, {"agent-dr-environment": "drill"})
    assert not allowed([everything, ALL["drills"]], elsewhere, production), "a tag of production does not stop a drill"
    for write in (put("dr-eu/dr/fleet/s00/1.seg", if_none_match="*"), item("UpdateItem", "fleet#s00")):
        assert allowed([everything], write)
        assert not allowed([everything, ALL["drills"]], write), "untagged copies are not kept from drills"
    read = Call("GetObject", ("arn:aws:s3:::dr-eu/dr/fleet/s00/1.seg",))
    assert allowed([everything, ALL["drills"]], read, production)
    context = {"kms:EncryptionContext:agent-dr:group": ("fleet",)}
    for operation, may in (("Decrypt", True), ("Encrypt", False)):
        assert allowed([ALL["unsealing"], ALL["drills"]], Call(operation, (KEY,), context), production) is may


def test_no_policy_has_a_wildcard_in_an_action_or_a_whole_service() -> None:
    for policy in ALL.values():
        assert granted(policy)
        for statement in policy["Statement"]:
            assert statement["Effect"] == "Deny" or statement["Resource"] != "*"


# --------------------------------------------------------------------------------------------------------------- terraform


def blocks(file: str, kind: str) -> dict[str, str]:
    text = (MODULE / file).read_text(encoding="utf-8")
    return {found[1]: found[2] for found in re.finditer(rf'^{kind} "(\w+)" \{{\n(.*?)^\}}', text, re.MULTILINE | re.DOTALL)}


def test_every_variable_is_typed_described_and_validated_and_every_output_described() -> None:
    variables = blocks("variables.tf", "variable")
    assert len(variables) > 8
    for name, body in variables.items():
        assert re.search(r"^  description = \".{10,}\"", body, re.MULTILINE), name
        assert re.search(r"^  type +=", body, re.MULTILINE), name
        assert "validation {" in body, name
    for name, body in blocks("outputs.tf", "output").items():
        assert re.search(r"^  description = \".{10,}\"", body, re.MULTILINE), name
    used = (MODULE / "main.tf").read_text(encoding="utf-8") + (MODULE / "variables.tf").read_text(encoding="utf-8")
    assert [name for name in variables if f"var.{name}" not in used] == []


def terraform(folder: Path, *words: str, said: str = "") -> str:
    found = shutil.which("terraform")
    if found is None:
        pytest.skip("terraform is not installed")
    done = subprocess.run(
        [found, f"-chdir={folder}", *words], input=said, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_module_is_formatted_as_terraform_wants_it() -> None:
    terraform(MODULE, "fmt", "-check", "-diff", "-recursive")


def test_terraform_renders_the_same_documents(tmp_path: Path) -> None:
    """The module's own expressions, without its resources: so no provider has to be downloaded."""
    text = (MODULE / "main.tf").read_text(encoding="utf-8")
    own_locals = text[: text.index('resource "')].replace("${path.module}/policies", str(MODULE / "policies"))
    (tmp_path / "main.tf").write_text(own_locals + 'output "policies" {\n  value = local.policies\n}\n')
    shutil.copy(MODULE / "variables.tf", tmp_path)
    regions = {
        name: {"aws_region": "eu-west-1", "bucket": bucket, "table": "agent-dr"}
        for name, bucket in zip(("a", "b"), VALUES["buckets"], strict=True)
    }
    variables = {"name": "n", "account_id": ACCOUNT, "group": "fleet", "regions": regions, "zone_id": "Z0AGENTS"}
    variables["kms_key_arns"] = [KEY]
    variables["dns_name"] = VALUES["name"]
    (tmp_path / "terraform.tfvars.json").write_text(json.dumps(variables))
    terraform(tmp_path, "init", "-backend=false", "-input=false")
    terraform(tmp_path, "apply", "-auto-approve", "-input=false")
    said = json.loads(terraform(tmp_path, "output", "-json", "policies"))
    expected = documents(**{**VALUES, "tables": [TABLE, TABLE]})
    assert {name: json.loads(document) for name, document in said.items()} == expected
