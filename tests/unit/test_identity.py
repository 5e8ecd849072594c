"""Signatures: ours against ``ssh-keygen`` in both directions, and everything that must not be accepted."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controller.adapters import sshsig
from controller.adapters.identity import SshIdentity, generate_key, parse_allowed_signers, sign
from controller.domain.approval import NAMESPACE
from controller.errors import Misconfigured, Refused

MESSAGE = b'{"v":1,"plan":"p-0001"}'
NOW = 1_800_000_000.0
SSH_KEYGEN = shutil.which("ssh-keygen")
needs_ssh_keygen = pytest.mark.skipif(SSH_KEYGEN is None, reason="ssh-keygen is not on PATH")


def write_key(path: Path, private: sshsig.PrivateKey, passphrase: bytes | None = None) -> str:
    cipher = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    path.write_bytes(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, cipher))
    path.chmod(0o600)
    line = private.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    path.with_name(path.name + ".pub").write_text(line + "\n")
    return line


def identity(tmp_path: Path, *lines: str, wall: float = NOW) -> SshIdentity:
    path = tmp_path / "allowed_signers"
    path.write_text("# approvers\n\n" + "\n".join(lines) + "\n")
    return SshIdentity(path, wall=lambda: wall)


def make_key(kind: str) -> sshsig.PrivateKey:
    if kind == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    if kind == "rsa":
        return rsa.generate_private_key(65537, 2048)
    curves = {"p256": ec.SECP256R1(), "p384": ec.SECP384R1(), "p521": ec.SECP521R1()}
    return ec.generate_private_key(curves[kind])


@pytest.mark.parametrize("kind", ["ed25519", "p256", "p384", "p521", "rsa"])
def test_a_listed_key_of_each_type_signs_and_verifies(tmp_path: Path, kind: str) -> None:
    line = write_key(tmp_path / "key", make_key(kind))
    signer = identity(tmp_path, f"alice {line}").verify(MESSAGE, sign(MESSAGE, tmp_path / "key"), "alice")
    assert signer.principal == "alice"
    assert signer.fingerprint.startswith("SHA256:")


@needs_ssh_keygen
@pytest.mark.parametrize("kind", ["ed25519", "p256", "p384", "p521", "rsa"])
def test_ssh_keygen_accepts_our_signature_and_we_accept_its(tmp_path: Path, kind: str) -> None:
    line = write_key(tmp_path / "key", make_key(kind))
    here = identity(tmp_path, f'alice namespaces="{NAMESPACE}" {line}')
    (tmp_path / "sig").write_text(sign(MESSAGE, tmp_path / "key"))
    subprocess.run(
        [
            str(SSH_KEYGEN),
            "-Y",
            "verify",
            "-f",
            tmp_path / "allowed_signers",
            "-I",
            "alice",
            "-n",
            NAMESPACE,
            "-s",
            tmp_path / "sig",
        ],
        input=MESSAGE,
        check=True,
        capture_output=True,
    )
    for hash_name in ("sha256", "sha512"):
        done = subprocess.run(
            [str(SSH_KEYGEN), "-Y", "sign", "-n", NAMESPACE, "-O", f"hashalg={hash_name}", "-f", tmp_path / "key"],
            input=MESSAGE,
            check=True,
            capture_output=True,
        )
        signer = here.verify(MESSAGE, done.stdout.decode(), "alice")
        listed = subprocess.run([str(SSH_KEYGEN), "-lf", tmp_path / "key.pub"], check=True, capture_output=True).stdout
        assert signer.fingerprint in listed.decode()


@needs_ssh_keygen
def test_a_key_that_we_cannot_load_is_left_to_ssh_keygen(tmp_path: Path) -> None:
    """A public key means "its private half is elsewhere" (agent, hardware, beside it): ssh-keygen finds it."""
    line = write_key(tmp_path / "key", make_key("ed25519"))
    signature = sign(MESSAGE, tmp_path / "key.pub")
    assert identity(tmp_path, f"alice {line}").verify(MESSAGE, signature, "alice").principal == "alice"


@needs_ssh_keygen
def test_an_encrypted_key_without_its_passphrase_is_refused_without_hanging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(
        [str(SSH_KEYGEN), "-q", "-t", "ed25519", "-N", "secret", "-f", tmp_path / "key"], check=True, capture_output=True
    )
    monkeypatch.setenv("SSH_ASKPASS_REQUIRE", "force")
    monkeypatch.setenv("SSH_ASKPASS", "/bin/false")
    with pytest.raises(Refused, match="ssh-keygen could not sign"):
        sign(MESSAGE, tmp_path / "key")


def hardware_key() -> tuple[ed25519.Ed25519PrivateKey, bytes]:
    private = ed25519.Ed25519PrivateKey.generate()
    raw = private.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    kind = b"sk-ssh-ed25519@openssh.com"
    return private, sshsig._string(kind) + sshsig._string(raw) + sshsig._string(b"ssh:")


def hardware_signature(private: ed25519.Ed25519PrivateKey, key: bytes, flags: bytes) -> str:
    """What an authenticator answers, following PROTOCOL.u2f; there is no hardware here."""
    signed = sshsig._to_be_signed(NAMESPACE, "sha512", MESSAGE)
    counter = struct.pack(">I", 5)
    raw = private.sign(hashlib.sha256(b"ssh:").digest() + flags + counter + hashlib.sha256(signed).digest())
    blob = sshsig._string(b"sk-ssh-ed25519@openssh.com") + sshsig._string(raw) + flags + counter
    text = (
        b"SSHSIG"
        + struct.pack(">I", 1)
        + b"".join(sshsig._string(part) for part in (key, NAMESPACE.encode(), b"", b"sha512", blob))
    )
    return "\n".join([sshsig.BEGIN, base64.b64encode(text).decode(), sshsig.END])


def test_a_hardware_key_counts_only_when_somebody_touched_it(tmp_path: Path) -> None:
    private, key = hardware_key()
    here = identity(tmp_path, f"alice sk-ssh-ed25519@openssh.com {base64.b64encode(key).decode()}")
    assert here.verify(MESSAGE, hardware_signature(private, key, b"\x01"), "alice").principal == "alice"
    with pytest.raises(Refused, match="touched"):
        here.verify(MESSAGE, hardware_signature(private, key, b"\x00"), "alice")


@pytest.fixture
def alice(tmp_path: Path) -> str:
    return generate_key(tmp_path / "alice", "alice@example.com")


def test_generated_keys_are_private_and_are_never_overwritten(tmp_path: Path, alice: str) -> None:
    assert (tmp_path / "alice").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "alice.pub").read_text() == alice + "\n"
    with pytest.raises(Refused, match="exists already"):
        generate_key(tmp_path / "alice")


def test_what_must_not_be_accepted_is_refused_with_its_reason(tmp_path: Path, alice: str) -> None:
    bob = generate_key(tmp_path / "bob")
    here = identity(tmp_path, f"alice {alice}", f"bob {bob}", f'carol namespaces="git,file" {alice}')
    good = sign(MESSAGE, tmp_path / "alice")
    cases = [
        (MESSAGE + b" ", good, "alice", "does not match"),
        (MESSAGE, good, "mallory", "not listed"),
        (MESSAGE, good, "bob", "is not a listed key of bob"),
        (MESSAGE, sign(MESSAGE, tmp_path / "alice", "git"), "alice", "namespace 'git'"),
        (MESSAGE, good, "carol", "is not listed for namespace"),
        (MESSAGE, good[:60] + ("A" if good[60] != "A" else "B") + good[61:], "alice", "garbled|not a listed|acceptable"),
        (MESSAGE, good.replace("BEGIN", "BEGUN"), "alice", "garbled"),
        (MESSAGE, "", "alice", "garbled"),
        (MESSAGE, "A" * 20_000, "alice", "garbled"),
        (MESSAGE, good, "", "1 to 200"),
        (MESSAGE, good, "a" * 201, "1 to 200"),
        (MESSAGE, good, "al\x1bice", "control"),
        (MESSAGE, good, "ali\u202ece", "control"),
        (MESSAGE, good, "alice bob", "white space"),
    ]
    for message, signature, principal, reason in cases:
        with pytest.raises(Refused, match=reason) as caught:
            here.verify(message, signature, principal)
        assert caught.value.hint


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(at=st.integers(0, 300), bit=st.integers(0, 7))
def test_no_flipped_bit_is_accepted(tmp_path: Path, at: int, bit: int) -> None:
    key = tmp_path / "flip"
    line = key.with_name("flip.pub").read_text() if key.exists() else generate_key(key)
    here = identity(tmp_path, f"alice {line}")
    raw = bytearray(base64.b64decode("".join(sign(MESSAGE, key).splitlines()[1:-1])))
    raw[at % len(raw)] ^= 1 << bit
    flipped = "\n".join([sshsig.BEGIN, base64.b64encode(bytes(raw)).decode(), sshsig.END])
    with pytest.raises(Refused):
        here.verify(MESSAGE, flipped, "alice")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(raw=st.binary(max_size=300))
def test_rubbish_inside_the_armor_is_refused_and_never_crashes(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "allowed_signers").write_text("")
    here = SshIdentity(tmp_path / "allowed_signers", wall=lambda: NOW)
    for body in (raw, b"SSHSIG\x00\x00\x00\x01" + raw):
        with pytest.raises(Refused):
            here.verify(MESSAGE, "\n".join([sshsig.BEGIN, base64.b64encode(body).decode(), sshsig.END]), "alice")


def test_dates_limit_a_key(tmp_path: Path, alice: str) -> None:
    line = f'alice valid-after="20270101Z",valid-before="202701020000Z" {alice}'
    good = sign(MESSAGE, tmp_path / "alice")
    inside = 1_798_761_600.0 + 3600
    assert identity(tmp_path, line, wall=inside).verify(MESSAGE, good, "alice").principal == "alice"
    for outside in (inside - 7200, inside + 86_400):
        with pytest.raises(Refused, match="valid-after"):
            identity(tmp_path, line, wall=outside).verify(MESSAGE, good, "alice")


def test_patterns_and_lists_of_principals_follow_openssh(tmp_path: Path, alice: str) -> None:
    here = identity(tmp_path, f'"*@example.com,!eve@example.com,bo?" {alice}')
    good = sign(MESSAGE, tmp_path / "alice")
    for name in ("alice@example.com", "bob"):
        assert here.verify(MESSAGE, good, name).principal == name
    for name in ("eve@example.com", "bobby", "alice@example.org"):
        with pytest.raises(Refused, match="not listed"):
            here.verify(MESSAGE, good, name)


def test_a_changed_file_takes_effect_and_a_broken_one_allows_nobody(tmp_path: Path, alice: str) -> None:
    here = identity(tmp_path, f"alice {alice}")
    good = sign(MESSAGE, tmp_path / "alice")
    assert here.principals() == ("alice",)
    path = tmp_path / "allowed_signers"
    path.write_text(f"bob {alice}\n")
    os.utime(path, ns=(1, 1))
    with pytest.raises(Refused, match="not listed"):
        here.verify(MESSAGE, good, "alice")
    path.write_text(f"alice {alice}\nbob ssh-ed25519\n")
    for _ in range(2):
        with pytest.raises(Misconfigured, match="line 2"):
            here.verify(MESSAGE, good, "alice")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("alice cert-authority {key}", "cert-authority is not supported"),
        ('alice valid-before="20270101" {key}', "with the Z"),
        ('alice valid-before="20271301Z" {key}', "not a date"),
        ('alice namespaces="a",namespaces="b" {key}', "given once"),
        ('alice colour="red" {key}', "unknown"),
        ("alice", "needs principals"),
        ('"alice {key}', "quote is not closed"),
        ("alice,,bob {key}", "principal is empty"),
        ("alice ssh-dss AAAA", "key type"),
        ("alice ssh-ed25519 !!!!", "not base64"),
        ("alice ssh-rsa {blob}", "not of type ssh-rsa"),
        ("ali\u202ece {key}", "direction"),
    ],
)
def test_a_line_that_cannot_be_trusted_names_itself(alice: str, line: str, reason: str) -> None:
    text = line.format(key=alice, blob=alice.split()[1])
    with pytest.raises(Misconfigured, match="line 1") as caught:
        parse_allowed_signers(text, "signers")
    assert reason in caught.value.message


def test_a_missing_or_oversized_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="cannot be read"):
        SshIdentity(tmp_path / "nowhere")
    (tmp_path / "big").write_bytes(b"#" * (1024 * 1024 + 1))
    with pytest.raises(Misconfigured, match="longer"):
        SshIdentity(tmp_path / "big")


def test_files_that_are_not_keys_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    for path in (tmp_path / "text", tmp_path / "nowhere"):
        with pytest.raises(Refused) as caught:
            sign(MESSAGE, path)
        assert caught.value.hint


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_list_of_signers_that_others_may_write_allows_nobody(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "allowed_signers"
    path.write_text("")
    path.chmod(0o644)
    identity = SshIdentity(path, NAMESPACE)
    path.chmod(mode)
    for act in (identity.principals, lambda: SshIdentity(path, NAMESPACE)):
        with pytest.raises(Misconfigured, match="may be written by others") as caught:
            act()
        assert "chmod go-w" in caught.value.hint
    path.chmod(0o600)
    assert identity.principals() == ()
