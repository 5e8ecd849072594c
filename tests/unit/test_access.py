"""The access file and what its entries stand for: by hash, for one group, until a day, re-read, and fail closed in the end."""

from __future__ import annotations

import hashlib
import json
import ssl
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.adapters.access import (
    AccessDocument,
    AccessFile,
    AccessList,
    Revoked,
    new_token,
    read_document,
    with_entry,
    without_entry,
    write_document,
)
from controller.adapters.access_edit import change_document, fingerprint_of, with_revoked, without_revoked
from controller.domain.access import ALL, ANYBODY, PERMITS, Caller, CallerRole, Names, Permit
from controller.errors import Misconfigured, Refused, Unauthenticated, Unavailable
from controller.lab.certificates import Authority

NOW = 1_800_000_000.0


def made(group: str = "fleet", **entry: Any) -> tuple[str, AccessDocument]:
    """A token, and a file with its entry alone."""
    token, digest = new_token(group)
    given = {"name": "worker-1", "role": "agent", "sha256": digest, "agents": ("agent-*",), **entry}
    return token, with_entry(AccessDocument(group=group), given)


def bearer(token: str) -> bytes:
    return f"Bearer {token}".encode()


def refused(known: AccessList, header: bytes, now: float = NOW) -> str:
    with pytest.raises(Unauthenticated) as caught:
        known.by_header(header, now)
    assert caught.value.hint
    return caught.value.message


# ----------------------------------------------------------------------------------------------------------------- tokens


def test_a_token_stands_for_its_entry_and_the_file_does_not_hold_it(tmp_path: Path) -> None:
    token, document = made(hosts=("worker-1",))
    path = tmp_path / "access.json"
    write_document(path, document)
    assert token.split(".")[2] not in path.read_text()
    caller = AccessList(read_document(path)).by_header(bearer(token), NOW)
    assert (caller.name, caller.role) == ("worker-1", CallerRole.AGENT)
    assert caller.may_touch("agent-7")
    assert not caller.may_touch("agent")
    assert caller.hosts.holds("worker-1")
    assert not caller.hosts.holds("worker-11")


def test_a_token_that_is_forged_cut_lengthened_or_of_another_group_is_refused() -> None:
    token, document = made()
    known = AccessList(document)
    group, secret = token.split(".")[1:]
    other, _ = new_token("fleet")
    foreign, digest = new_token("staging")
    copied = with_entry(document, {"name": "copied", "role": "operator", "sha256": digest})
    assert known.by_header(bearer(token), NOW).name == "worker-1"
    assert "unknown" in refused(known, bearer(other))
    assert "unknown" in refused(known, bearer(token[:-1] + ("A" if token[-1] != "A" else "B")))
    for bad in (
        token[:-1],
        token + "A",
        token.upper(),
        secret,
        f"dr1.{group}",
        f"dr2.{group}.{secret}",
        f"{token} ",
        f"{token}\n",
    ):
        assert "form" in refused(known, bearer(bad)), bad
    assert "is of group staging, this is group fleet" in refused(known, bearer(foreign))
    assert "staging" in refused(AccessList(copied), bearer(foreign)), (
        "an entry that was copied from another group lets nobody in"
    )


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Basic Zm9vOmJhcg==",
        b"Bearer " + b"A" * 10_240,
        b"Bearer\tx",
        b"Bearer \xff\xfe",
        b"Token x",
    ],
)
def test_headers_that_are_no_bearer_token_are_refused_and_never_repeated(header: bytes) -> None:
    _, document = made()
    told = refused(AccessList(document), header)
    assert len(told) < 200
    assert "A" * 20 not in told


@given(st.binary(max_size=700))
def test_no_header_but_the_token_itself_lets_anybody_in(header: bytes) -> None:
    _, document = made()
    refused(AccessList(document), header)
    refused(AccessList(document), b"Bearer " + header)


def test_the_scheme_is_read_in_any_case_as_http_has_it() -> None:
    token, document = made()
    assert AccessList(document).by_header(f"bEaReR {token}".encode(), NOW).name == "worker-1"


def test_a_token_ends_at_its_moment_and_a_revoked_one_at_once() -> None:
    token, document = made(expires_at=NOW + 10)
    known = AccessList(document)
    assert known.by_header(bearer(token), NOW + 9.9).name == "worker-1"
    assert "worker-1 has expired" in refused(known, bearer(token), NOW + 10)
    assert "revoked" in refused(AccessList(without_entry(document, "worker-1")), bearer(token))
    with pytest.raises(Refused, match="no entry 'worker-2'"):
        without_entry(document, "worker-2")


def test_a_name_in_a_verified_certificate_stands_for_its_entry_too() -> None:
    document = with_entry(
        AccessDocument(group="fleet"),
        {"name": "grafana", "role": "viewer", "certificate": "grafana.example.com", "expires_at": NOW + 1},
    )
    known = AccessList(document)
    found = known.by_certificate({"grafana.example.com", "other"}, NOW)
    assert found is not None
    assert found.role is CallerRole.VIEWER
    assert known.by_certificate({"other"}, NOW) is None
    with pytest.raises(Unauthenticated, match="expired"):
        known.by_certificate({"grafana.example.com"}, NOW + 1)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"role": "root"}, "role"),
        ({"agents": ()}, "names its agents"),
        ({"role": "operator"}, "are for the role agent"),
        ({"sha256": None}, "either sha256 or certificate"),
        ({"certificate": "x"}, "either sha256 or certificate"),
        ({"sha256": "secret"}, "sha256"),
        ({"name": "a\x1b[31m"}, "name"),
        ({"name": ""}, "name"),
        ({"expires_at": float("nan")}, "expires_at"),
        ({"extra": 1}, "extra"),
    ],
)
def test_an_entry_that_says_too_little_or_too_much_is_refused(entry: dict[str, Any], says: str) -> None:
    _, digest = new_token("fleet")
    whole = {"name": "worker-1", "role": "agent", "sha256": digest, "agents": ("a",), **entry}
    with pytest.raises(Refused, match=says):
        with_entry(AccessDocument(group="fleet"), whole)


def test_two_entries_of_one_name_or_one_hash_are_refused() -> None:
    _, document = made()
    again = document.entries[0]
    for name in ("worker-1", "worker-2"):
        with pytest.raises(Refused, match="twice"):
            with_entry(document, {"name": name, "role": "agent", "sha256": again.sha256, "agents": ("a",)})


# ------------------------------------------------------------------------------------------------------------------- file


def test_a_changed_file_counts_at_the_next_look(tmp_path: Path) -> None:
    path = tmp_path / "access.json"
    token, document = made()
    write_document(path, document)
    access = AccessFile(path, "fleet", stale_seconds=60)
    assert access.list().by_header(bearer(token), NOW)
    write_document(path, without_entry(document, "worker-1"))
    assert access.look(0.0) == ""
    refused(access.list(), bearer(token))


@pytest.mark.parametrize("damage", ["gone", "cut", "empty", "binary", "foreign", "writable"])
def test_a_damaged_file_is_told_at_once_and_lets_nobody_in_after_a_while(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "access.json"
    token, document = made()
    write_document(path, document)
    good = path.read_bytes()
    access = AccessFile(path, "fleet", stale_seconds=60)
    match damage:
        case "gone":
            path.unlink()
        case "foreign":
            write_document(path, AccessDocument(group="other"))
        case "writable":
            path.chmod(0o666)
        case _:
            path.write_bytes({"cut": good[:-20], "empty": b"", "binary": b"\xff\x00"}[damage])
    told = access.look(100.0)
    assert "in force for 60 s more" in told
    assert str(path) in told
    assert access.list().by_header(bearer(token), NOW).name == "worker-1"
    assert "for 1 s more" in access.look(159.0)
    assert access.list()
    assert "nobody is let in" in access.look(160.0)
    with pytest.raises(Unavailable, match="cannot tell who may call"):
        access.list()
    path.unlink(missing_ok=True)
    write_document(path, document)
    assert access.look(200.0) == ""
    assert access.list().by_header(bearer(token), NOW)


def test_at_the_start_a_damaged_file_is_an_error_that_shows_nothing_of_it(tmp_path: Path) -> None:
    path = tmp_path / "access.json"
    with pytest.raises(Misconfigured, match="cannot be read") as caught:
        AccessFile(path, "fleet", 60)
    assert "drctl token create" in caught.value.hint
    path.write_text(json.dumps({"group": "fleet", "entries": [{"name": "x", "role": "agent", "token": "hunter2"}]}))
    path.chmod(0o600)
    with pytest.raises(Misconfigured) as caught:
        AccessFile(path, "fleet", 60)
    assert "hunter2" not in f"{caught.value} {caught.value.__cause__}"


# ------------------------------------------------------------------------------------------------------------------ rules


def test_each_role_has_its_permits_and_nobody_may_do_everything() -> None:
    given = {
        CallerRole.AGENT: {Permit.READ, Permit.WRITE, Permit.BEAT, Permit.TASK},
        CallerRole.OPERATOR: {Permit.STATUS, Permit.READ, Permit.TASK, Permit.OPERATE},
        CallerRole.VIEWER: {Permit.STATUS},
        CallerRole.PEER: {Permit.PEER},
    }
    assert given == PERMITS
    assert all(ANYBODY.may(permit) for permit in Permit)


def test_who_stands_in_plans_is_who_was_shown_and_what_is_said_only_where_nobody_is_asked() -> None:
    assert ANYBODY.acts_as("carol") == "carol"
    assert Caller("laptop", CallerRole.OPERATOR, "ada@example.com").acts_as("carol") == "ada@example.com"
    assert Caller("ada@example.com", CallerRole.OPERATOR).acts_as("carol") == "ada@example.com"


@given(st.lists(st.text(max_size=4), max_size=4), st.text(max_size=6), st.text(max_size=6))
def test_names_hold_what_is_listed_and_what_begins_so(patterns: list[str], prefix: str, rest: str) -> None:
    names = Names.of(patterns)
    name = prefix + rest
    assert names.holds(name) == any(
        name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern for pattern in patterns
    )
    if names.holds_all(prefix):
        assert names.holds(name)
    assert ALL.holds(name)


# ---------------------------------------------------------------------------------------------------- revoked certificates

PRINT = "ab" * 32


def test_a_certificate_is_revoked_by_its_fingerprint_or_by_a_name_and_is_well_again_when_that_is_lifted() -> None:
    _, document = made()
    one, name = Revoked(fingerprint=PRINT, reason="lost"), Revoked(certificate="drctl://fleet/eu-west-1/a")
    both = with_revoked(with_revoked(document, one), name)
    known = AccessList(both)
    assert known.is_revoked(PRINT, ())
    assert known.is_revoked("cd" * 32, ("x", "drctl://fleet/eu-west-1/a"))
    assert not known.is_revoked("cd" * 32, ("x", "drctl://fleet/eu-west-1/b"))
    assert not known.is_revoked("", ())
    assert with_entry(both, {"name": "n", "role": "viewer", "certificate": "n"}).revoked == both.revoked
    assert without_entry(both, "worker-1").revoked == both.revoked
    with pytest.raises(Refused, match="is revoked already"):
        with_revoked(both, Revoked(fingerprint=PRINT))
    assert not AccessList(without_revoked(both, PRINT, None)).is_revoked(PRINT, ())
    with pytest.raises(Refused, match="is not revoked"):
        without_revoked(document, PRINT, None)


def test_what_was_revoked_stays_so_while_the_file_cannot_be_read(tmp_path: Path) -> None:
    _, document = made()
    path = tmp_path / "access.json"
    write_document(path, with_revoked(document, Revoked(fingerprint=PRINT)))
    access = AccessFile(path, "fleet", stale_seconds=60)
    path.write_text("{")
    for now in (0.0, 100.0):
        assert access.look(now)
        assert access.is_revoked(PRINT, ())


def test_a_fingerprint_is_read_as_openssl_prints_it_and_from_a_certificates_file(tmp_path: Path) -> None:
    pair = Authority(tmp_path).issue("one", hosts=["127.0.0.1"])
    found = fingerprint_of(str(pair.cert_file))
    assert found == hashlib.sha256(ssl.PEM_cert_to_DER_cert(pair.cert_file.read_text())).hexdigest()
    colons = ":".join(found[at : at + 2] for at in range(0, 64, 2)).upper()
    assert fingerprint_of(colons) == found
    for bad in ("ab" * 31, str(pair.key_file), str(tmp_path / "nothing")):
        with pytest.raises(Refused, match="neither a SHA-256 fingerprint nor") as caught:
            fingerprint_of(bad)
        assert "PRIVATE" not in caught.value.message


# ------------------------------------------------------------------------------------------------------ one at a time


def test_a_file_that_changed_under_a_change_is_left_as_it_is(tmp_path: Path) -> None:
    _, document = made()
    path = tmp_path / "access.json"
    write_document(path, document)

    def beside(found: AccessDocument | None) -> AccessDocument:
        path.write_text(path.read_text() + "\n")  # somebody with an editor, who takes no lock
        assert found is not None
        return without_entry(found, "worker-1")

    with pytest.raises(Refused, match="changed by somebody else meanwhile"):
        change_document(path, beside)
    assert [entry.name for entry in read_document(path).entries] == ["worker-1"]


def test_a_change_waits_for_another_one_and_a_refused_one_gives_the_lock_back(tmp_path: Path) -> None:
    _, document = made()
    path = tmp_path / "access.json"
    write_document(path, document)

    def inner(_: AccessDocument | None) -> AccessDocument:
        change_document(path, lambda found: document, patience_seconds=0.0)
        raise AssertionError("two at a time")

    with pytest.raises(Refused, match="all the time"):
        change_document(path, inner)
    assert change_document(path, lambda found: document, patience_seconds=0.0) == document
    assert [one.name for one in tmp_path.iterdir()] == ["access.json"]
