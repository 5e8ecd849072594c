"""``drctl token``: a secret is shown once, the access file has its hash, and nothing is lost when a command is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import sys
from pathlib import Path

import pytest

from controller.adapters.access import AccessList, read_document
from controller.cli import main
from controller.errors import Unauthenticated
from controller.lab.certificates import Authority
from tests.support.drctl import Drctl

NOW = 1_800_000_000.0


def bearer(token: str) -> bytes:
    return f"Bearer {token}".encode()


def test_the_command_shows_the_secret_once_and_keeps_its_hash(drctl: Drctl, tmp_path: Path) -> None:
    path = tmp_path / "access.json"
    done = drctl("token", "create", "ada@example.com", "--role", "operator", "--file", path, "--group", "fleet")
    assert done.code == 0, done.err
    token = done.out.strip()
    assert AccessList(read_document(path)).by_header(bearer(token), NOW).acts_as("x") == "ada@example.com"
    assert token.split(".")[2] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    out = tmp_path / "secret"
    done = drctl(
        "token", "create", "worker-1", "--role", "agent", "--agents", "agent-*", "--out", out, "--file", path, "-o", "json"
    )
    assert done.code == 0, done.err
    secret = out.read_text().strip()
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert secret not in done.out + done.err
    listed = drctl("token", "list", "--file", path, "-o", "json")
    rows = json.loads(listed.out)["entries"]
    assert [(row["name"], row["role"], row["agents"]) for row in rows] == [
        ("ada@example.com", "operator", []),
        ("worker-1", "agent", ["agent-*"]),
    ]
    assert drctl("token", "revoke", "worker-1", "--file", path).code == 0
    with pytest.raises(Unauthenticated):
        AccessList(read_document(path)).by_header(bearer(secret), NOW)
    again = drctl("token", "revoke", "worker-1", "--file", path)
    assert (again.code, "ada@example.com" in again.err) == (5, True)


def test_the_command_finds_the_file_by_the_settings_and_refuses_another_groups(drctl: Drctl, tmp_path: Path) -> None:
    config = tmp_path / "controller.toml"
    config.write_text('group = "fleet"\n[api]\naccess_file = "access.json"\n')
    assert drctl("token", "create", "grace", "--role", "viewer", "--config", config).code == 0
    assert read_document(tmp_path / "access.json").group == "fleet"
    other = drctl("token", "create", "x", "--role", "viewer", "--file", tmp_path / "access.json", "--group", "staging")
    assert (other.code, "that of group fleet" in other.err) == (5, True)
    none = drctl("token", "list")
    assert (none.code, "no access file is named" in none.err) == (2, True)
    incomplete = drctl("token", "create", "worker", "--role", "agent", "--config", config)
    assert (incomplete.code, "names its agents" in incomplete.err) == (5, True)
    assert [entry.name for entry in read_document(tmp_path / "access.json").entries] == ["grace"]
    assert not list(tmp_path.glob(".access*"))


EACH = 8


def operator(who: str, path: Path) -> None:
    """One of several people at work: makes tokens, and revokes every second one."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        sys.stdout = sys.stderr = nowhere
        for number in range(EACH):
            name = f"{who}-{number}"
            made = main.run(["token", "create", name, "--role", "viewer", "--file", str(path), "--group", "fleet"])
            revoked = main.run(["token", "revoke", name, "--file", str(path)]) if number % 2 else 0
            if made or revoked:
                os._exit(made or revoked)


@pytest.mark.timeout(300)
def test_commands_in_several_processes_at_once_lose_no_entry(tmp_path: Path) -> None:
    path, people = tmp_path / "access.json", ("ada", "grace", "carol")
    fork = multiprocessing.get_context("fork")
    running = [fork.Process(target=operator, args=(who, path)) for who in people]
    for process in running:
        process.start()
    for process in running:
        process.join(240)
    assert [process.exitcode for process in running] == [0, 0, 0]
    assert {entry.name for entry in read_document(path).entries} == {f"{who}-{n}" for who in people for n in range(0, EACH, 2)}
    assert [one.name for one in tmp_path.iterdir()] == ["access.json"]


def test_a_certificate_is_revoked_by_its_file_listed_and_taken_off_again(drctl: Drctl, tmp_path: Path) -> None:
    path = tmp_path / "access.json"
    pair = Authority(tmp_path / "tls").issue("worker", hosts=["worker.example.com"])
    words = ("token", "revoke-certificate", pair.cert_file, "--file", path)
    assert (drctl(*words).code, path.exists()) == (5, False)
    assert drctl("token", "create", "grace", "--role", "viewer", "--file", path, "--group", "fleet").code == 0
    done = drctl(*words, "--reason", "laptop lost", "-o", "json")
    assert done.code == 0, done.err
    fingerprint = json.loads(done.out)["fingerprint"]
    named = drctl("token", "revoke-certificate", "--name", "drctl://fleet/one/a", "--file", path)
    assert (named.code, "is revoked" in named.err) == (0, True)
    assert drctl(*words).code == 5, "twice"
    listed = json.loads(drctl("token", "list", "--file", path, "-o", "json").out)
    assert [(one["fingerprint"], one["certificate"], one["reason"]) for one in listed["revoked"]] == [
        (fingerprint, None, "laptop lost"),
        (None, "drctl://fleet/one/a", ""),
    ]
    assert f"{fingerprint} (laptop lost)" in drctl("token", "list", "--file", path).out
    assert [entry.name for entry in read_document(path).entries] == ["grace"]
    assert drctl("token", "revoke-certificate", fingerprint, "--lift", "--file", path).code == 0
    assert [one.certificate for one in read_document(path).revoked] == ["drctl://fleet/one/a"]
    for wrong in ((), (fingerprint, "--name", "x")):
        assert drctl("token", "revoke-certificate", *wrong, "--file", path).code == 2
