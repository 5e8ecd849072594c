"""Files and signatures that decide who may approve, and settings, made by somebody who knows their form."""

from __future__ import annotations

import base64
import contextlib
import os
import string
import struct
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controller.adapters import sshsig
from controller.adapters.identity import SshIdentity, generate_key, parse_allowed_signers, sign
from controller.domain.approval import NAMESPACE
from controller.errors import DrError, Misconfigured, Refused
from controller.settings import load_settings

LAB = Path(__file__).parents[2] / "config" / "lab.toml"
MESSAGE = b"statement"
NOW = 1_790_000_000.0

# ---------------------------------------------------------------------------------------------------------- allowed_signers

KEY = "ssh-ed25519 " + base64.b64encode(struct.pack(">I11sI32s", 11, b"ssh-ed25519", 32, bytes(range(32)))).decode()
WORDS = st.sampled_from(
    [
        "alice",
        '"alice,bob"',
        "*",
        "!alice",
        "alice,",
        'namespaces="dr"',
        'valid-before="20270101Z"',
        'valid-after="99999999Z"',
        "cert-authority",
        "zos-key-permit",
        '"',
        "#",
        "ssh-ed25519",
        "sk-ssh-ed25519@openssh.com",
        "ecdsa-sha2-nistp256",
        "ssh-rsa",
        KEY,
        KEY[:-7],
        KEY.replace("A", "B", 3),
        "AAAA",
        "\x00",
        "\u202e",
        "é" * 50,
        "x" * 5000,
    ]
)


@given(st.lists(st.lists(WORDS | st.text(max_size=12), max_size=6).map(" ".join), max_size=6).map("\n".join))
def test_a_file_of_signers_lists_them_or_is_refused_with_the_line(text: str) -> None:
    try:
        listed = parse_allowed_signers(text, "signers")
    except Misconfigured as error:
        named = "line" in error.message or "signers" in error.message
        assert named, "which line is wrong must be said"
    else:
        assert all(entry.principals for entry in listed)


@pytest.fixture(scope="module")
def alice(tmp_path_factory: pytest.TempPathFactory) -> tuple[SshIdentity, str]:
    folder = tmp_path_factory.mktemp("trust")
    (folder / "signers").write_text(f"alice {generate_key(folder / 'alice')}\n")
    return SshIdentity(folder / "signers", NAMESPACE, lambda: NOW), sign(MESSAGE, folder / "alice", NAMESPACE)


def fields_of(armored: str) -> list[bytes]:
    """Public key, namespace, reserved, hash, signature."""
    raw = base64.b64decode("".join(armored.splitlines()[1:-1]))[10:]
    fields = []
    while raw:
        (length,) = struct.unpack_from(">I", raw)
        fields.append(raw[4 : 4 + length])
        raw = raw[4 + length :]
    return fields


def armored(fields: list[bytes], version: int, tail: bytes) -> str:
    raw = b"SSHSIG" + struct.pack(">I", version) + b"".join(struct.pack(">I", len(one)) + one for one in fields) + tail
    return "\n".join([sshsig.BEGIN, base64.b64encode(raw).decode(), sshsig.END])


@given(
    number=st.integers(0, 5),
    value=st.binary(max_size=80),
    version=st.sampled_from([0, 1, 1, 1, 2, 2**32 - 1]),
    tail=st.sampled_from([b"", b"", b"\x00", b"\x00\x00\x00\x00"]),
)
def test_a_signature_with_any_field_replaced_is_refused(
    alice: tuple[SshIdentity, str], number: int, value: bytes, version: int, tail: bytes
) -> None:
    identity, right = alice
    fields = fields_of(right)
    if number < len(fields):
        fields[number] = value
    forged = armored(fields, version, tail)
    if base64.b64decode("".join(forged.splitlines()[1:-1])) == base64.b64decode("".join(right.splitlines()[1:-1])):
        assert identity.verify(MESSAGE, forged, "alice").principal == "alice"
        return
    with pytest.raises(Refused):
        identity.verify(MESSAGE, forged, "alice")


@given(st.text(alphabet=string.printable, max_size=400), st.text(max_size=30))
def test_a_signature_or_a_name_that_is_any_text_is_refused(alice: tuple[SshIdentity, str], text: str, who: str) -> None:
    identity, right = alice
    with pytest.raises(Refused):
        identity.verify(MESSAGE, text, "alice")
    if who != "alice":
        with pytest.raises(Refused):
            identity.verify(MESSAGE, right, who)


# ------------------------------------------------------------------------------------------------------------------ settings

HOSTILE: list[Any] = [
    "", "\x00", "../..", "a" * 5000, "\u202e", "null", "nan", "1e999", -1, 0, 2**63, 2**70, -0.0, 1e308, True, [], {}, [[]],
    {"": ""}, ["http://127.0.0.1:1", 7], "http://[::1", "http://a:b@c:1/d?e#f", "127.0.0.1:53:53", "{}", "[",
    float("inf"), float("nan"),
]  # fmt: skip
with LAB.open("rb") as _file:
    _LAB = tomllib.load(_file)


def leaves(node: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(node, dict):
        return [path]
    return [path, *(found for key, value in node.items() for found in leaves(value, (*path, key)))]


PATHS = [path for path in leaves(_LAB) if path]


def replaced(node: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    first, *rest = path
    if not rest:
        return {**node, first: value}
    inner = node.get(first)
    return {**node, first: replaced(inner if isinstance(inner, dict) else {}, tuple(rest), value)}


@given(st.lists(st.tuples(st.sampled_from(PATHS), st.sampled_from(HOSTILE)), min_size=1, max_size=3))
def test_settings_with_anything_anywhere_load_or_are_refused_in_lines_that_people_can_read(
    changes: list[tuple[tuple[str, ...], Any]],
) -> None:
    data = _LAB | {"region": "eu-west-1", "instance": "a", "state_dir": "state"}
    for path, value in changes:
        data = replaced(data, path, value)
    said = ""
    try:
        load_settings(**data)
    except Misconfigured as error:
        said = str(error)
    assert all(len(line) < 1500 for line in said.splitlines()), "a line must not repeat all of a long value"
    assert not {"\x00", "\u202e"} & set(said)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(PATHS).map(lambda path: "DR_" + "__".join(path).upper().replace("-", "_"))
        | st.text(alphabet=string.ascii_uppercase + "_", max_size=12).map("DR_{}".format),
        st.sampled_from([str(value) for value in HOSTILE]).map(lambda text: text.replace("\x00", "?")),
        max_size=4,
    )
)
def test_an_environment_with_anything_in_it_loads_or_is_refused(monkeypatch: pytest.MonkeyPatch, extra: dict[str, str]) -> None:
    with monkeypatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("DR_")]:
            patch.delenv(name)
        for name, value in extra.items():
            patch.setenv(name, value)
        with contextlib.suppress(Misconfigured):
            load_settings(LAB, region="eu-west-1", instance="a", state_dir="state")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80), st.integers(0, 5000), st.integers(0, 60))
def test_a_damaged_settings_file_loads_or_is_refused(tmp_path: Path, noise: bytes, at: int, cut: int) -> None:
    right = LAB.read_bytes()
    at %= len(right)
    file = tmp_path / "dr.toml"
    file.write_bytes(right[:at] + noise + right[at + cut :])
    with contextlib.suppress(DrError):
        load_settings(file, region="eu-west-1", instance="a", state_dir=tmp_path)
