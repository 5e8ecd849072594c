"""``drctl checkpoints`` against real controllers over real HTTP: what it shows, compares and takes out, and from whom."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from controller.agent.sync import Checkpoints
from controller.cli import bodies, main
from controller.cli.export import safe_path
from controller.cli.session import parse_time
from tests.support.served import REGIONS, ServedController

EVIL = "\x1b[2J\x1b]0;owned\x07\u202e\u2066\r\x9b"
ODD = "team/../α b"


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


Drctl = Callable[..., Result]


@pytest.fixture
def drctl(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Drctl:
    for name in ("DRCTL_PRINCIPAL", "DR_CONFIG", "DRCTL_DEBUG", "DRCTL_ENDPOINTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))

    def call(*argv: str | Path) -> Result:
        capfdbinary.readouterr()
        code = main.run([str(arg) for arg in argv])
        sys.stdout.flush()
        sys.stderr.flush()
        out, err = capfdbinary.readouterr()
        return Result(code, out.decode("utf-8", "surrogateescape"), err.decode())

    return call


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedController]:
    with ServedController(tmp_path_factory.mktemp("served")) as running:
        with Checkpoints(running.urls) as client:
            for step in range(5):
                body = json.dumps({"step": step, "messages": [f"m{n}" for n in range(step + 1)], "evil": EVIL}).encode()
                client.put("agent-1", f"s{step}", body, parent=f"s{step - 1}" if step else None)
            client.put("agent-1", "note", b"a memory", kind="memory")
            client.put(
                ODD,
                "../../etc/passwd",
                msgspec.msgpack.encode({"a": [1, b"\x00\x01"], "b": msgspec.msgpack.Ext(5, b"\x81\xa1x\x01")}),
            )
            client.put("texts", "t1", b"one\ntwo\nthree\n")
            client.put("texts", "t2", b"one\n2\nthree\n\x1b[2J")
            client.put("binary", "b1", bytes(range(256)) * 4)
            client.put("binary", "b2", bytes(range(255, -1, -1)) * 4)
            client.put("binary", "b3", b"")
        yield running


def at(served: ServedController, number: int = 0) -> list[str]:
    return ["--endpoint", served.urls[number]]


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


# ---------------------------------------------------------------------------------------------------------------- listing


def test_an_agents_records_are_listed_newest_first_with_place_depth_and_proof(served: ServedController, drctl: Drctl) -> None:
    found = drctl("checkpoints", "list", "agent-1", "-o", "json", *at(served)).json
    assert [one["id"] for one in found] == ["note", "s4", "s3", "s2", "s1", "s0"]
    assert all(one["verified"] and one["key"].startswith("s00/") for one in found)
    assert drctl("checkpoints", "list", "agent-1", "--kind", "memory", "-o", "json", *at(served)).json[0]["id"] == "note"
    older = drctl("checkpoints", "list", "agent-1", "--before", "s3", "--limit", "2", "-o", "json", *at(served)).json
    assert [one["id"] for one in older] == ["s2", "s1"]
    times = {one["id"]: one["received_at"] for one in found}
    between = drctl(
        "checkpoints",
        "list",
        "agent-1",
        "--since",
        stamp(times["s1"] - 1e-4),
        "--until",
        stamp(times["s3"] + 1e-4),
        "-o",
        "json",
        *at(served),
    ).json
    assert {"s2", "s1"} <= {one["id"] for one in between} <= {"s3", "s2", "s1", "s0", "s4", "note"}
    table = drctl("checkpoints", "list", "agent-1", *at(served))
    assert "verified" in table.out
    assert "--before s3" in drctl("checkpoints", "list", "agent-1", "--limit", "3", *at(served)).out


def test_without_an_agent_each_agents_newest_is_listed(served: ServedController, drctl: Drctl) -> None:
    found = drctl("checkpoints", "list", "-o", "json", *at(served)).json
    assert {one["agent"]: one["id"] for one in found} == {
        "agent-1": "s4",
        "binary": "b3",
        ODD: "../../etc/passwd",
        "texts": "t2",
    }
    page = drctl("checkpoints", "list", "--after", "agent-1", "--limit", "1", "-o", "json", *at(served)).json
    assert [one["agent"] for one in page] == ["binary"]
    assert drctl("checkpoints", "list", "--since", "2h", *at(served)).code == 2
    assert drctl("checkpoints", "list", "nobody", *at(served)).code == 5
    assert drctl("checkpoints", "list", "agent-1", "--before", "nothing", *at(served)).code == 5
    assert drctl("checkpoints", "list", "agent-1", "--since", "yesterday", *at(served)).code == 2


# ---------------------------------------------------------------------------------------------------------------- showing


def test_a_body_is_shown_readably_and_cannot_act_on_the_terminal(served: ServedController, drctl: Drctl) -> None:
    seen = drctl("checkpoints", "show", "agent-1", *at(served))
    assert '"step": 4' in seen.out
    assert "s4" in seen.out
    for agent, record in (("agent-1", "s4"), ("texts", "t2"), (ODD, "../../etc/passwd"), ("binary", "b1"), ("binary", "b3")):
        for output in ("table", "json", "yaml"):
            text = drctl("checkpoints", "show", agent, record, "-o", output, *at(served))
            assert text.code == 0, text.err
            assert not set(text.out) & set("\x1b\x07\r\x9b\u202e\u2066"), (agent, output)
    assert drctl("checkpoints", "show", "binary", "b1", "-o", "json", *at(served)).json["form"] == "binary"
    assert drctl("checkpoints", "show", "binary", "b3", "-o", "json", *at(served)).json["form"] == "empty"
    nested = drctl("checkpoints", "show", ODD, "-o", "json", *at(served)).json
    assert nested["form"] == "msgpack"
    assert '"$ext": 5,' in "".join(nested["body"])
    assert "more" in drctl("checkpoints", "show", "agent-1", "--lines", "2", *at(served)).out
    missing = drctl("checkpoints", "show", "agent-1", "nothing", *at(served))
    assert missing.code == 5
    assert "hint:" in missing.err


def test_raw_writes_the_bytes_as_they_are_but_not_to_a_terminal(
    served: ServedController, drctl: Drctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = drctl("checkpoints", "show", "texts", "t2", "--raw", *at(served))
    assert raw.out == "one\n2\nthree\n\x1b[2J"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    refused = drctl("checkpoints", "show", "texts", "t2", "--raw", *at(served))
    assert refused.code == 2
    assert refused.out == ""


def test_what_changed_is_told_by_path_by_line_or_by_hash(served: ServedController, drctl: Drctl) -> None:
    found = drctl("checkpoints", "diff", "agent-1", "s2", "s3", "-o", "json", *at(served)).json
    assert found["changes"] == [
        {"path": "$.messages[3]", "op": "added", "old": None, "new": "m3"},
        {"path": "$.step", "op": "changed", "old": 2, "new": 3},
    ]
    text = drctl("checkpoints", "diff", "texts", "t1", "t2", *at(served))
    assert "-two" in text.out
    assert "+2" in text.out
    assert "\x1b[2J" not in text.out
    other = drctl("checkpoints", "diff", "binary", "b1", "b2", *at(served))
    assert "cannot be compared further" not in other.out
    assert "they are not of a kind" in other.out
    assert "equal" in drctl("checkpoints", "diff", "binary", "b1", "b1", *at(served)).out


# --------------------------------------------------------------------------------------------------------------- exporting


def test_an_export_proves_itself_and_never_overwrites(served: ServedController, drctl: Drctl, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    done = drctl("checkpoints", "export", "--all", "--to", folder, "-o", "json", *at(served)).json
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {**manifest, "folder": str(folder)} == done
    assert len(manifest["records"]) == 4
    for entry in manifest["records"]:
        data = (folder / entry["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        assert entry["key"]
        assert entry["seq"] > 0
    assert all(folder in path.resolve().parents for path in folder.rglob("*"))
    again = drctl("checkpoints", "export", "--all", "--to", folder, *at(served))
    assert again.code == 5
    assert "--force" in again.err
    (folder / "manifest.json").unlink()  # interrupted: what is there is kept, what is missing comes
    victim = folder / manifest["records"][0]["file"]
    victim.unlink()
    assert drctl("checkpoints", "export", "--all", "--to", folder, *at(served)).code == 0
    (folder / "manifest.json").unlink()
    victim.write_bytes(b"somebody's own")
    blocked = drctl("checkpoints", "export", "--all", "--to", folder, *at(served))
    assert blocked.code == 5
    assert victim.read_bytes() == b"somebody's own"
    assert drctl("checkpoints", "export", "--all", "--to", folder, "--force", *at(served)).code == 0
    assert hashlib.sha256(victim.read_bytes()).hexdigest() == manifest["records"][0]["sha256"]


def test_an_export_does_not_follow_a_link_out_of_its_folder(served: ServedController, drctl: Drctl, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (folder / "bodies").mkdir(parents=True)
    elsewhere.mkdir()
    (folder / "bodies" / "binary").symlink_to(elsewhere)
    refused = drctl("checkpoints", "export", "binary", "b1", "--to", folder, *at(served))
    assert refused.code == 5
    assert list(elsewhere.iterdir()) == []


def test_an_export_takes_what_was_newest_at_a_time(served: ServedController, drctl: Drctl, tmp_path: Path) -> None:
    listed = drctl("checkpoints", "list", "agent-1", "-o", "json", *at(served)).json
    times = {one["id"]: one["received_at"] for one in listed}
    when = stamp(times["s2"] + 1e-5)
    done = drctl("checkpoints", "export", "agent-1", "--as-of", when, "--to", tmp_path / "a", "-o", "json", *at(served)).json
    assert done["records"][0]["id"] in ("s2", "s3", "s4")
    assert done["records"][0]["received_at"] <= times["s2"] + 2e-5
    everybody = drctl("checkpoints", "export", "--all", "--as-of", when, "--to", tmp_path / "b", "-o", "json", *at(served)).json
    assert [one["agent"] for one in everybody["records"]] == ["agent-1"]
    assert {one["agent"]: one["state"] for one in everybody["missing"]} == {"binary": "none", ODD: "none", "texts": "none"}
    early = drctl("checkpoints", "export", "agent-1", "--as-of", "2h", "--to", tmp_path / "c", *at(served))
    assert early.code == 5
    assert "its first record came at" in early.err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--all"],
        ["a", "--all", "--to", "x"],
        ["--to", "x"],
        ["a", "b", "--as-of", "1h", "--to", "x"],
        ["a", "--as-of", "soon", "--to", "x"],
    ],
)
def test_an_export_that_is_not_clear_is_a_usage_error(drctl: Drctl, words: list[str]) -> None:
    assert drctl("checkpoints", "export", *words, "--endpoint", "http://127.0.0.1:9").code == 2


def test_a_standby_answers_for_the_past_while_its_active_region_is_dead(tmp_path: Path, drctl: Drctl) -> None:
    with ServedController(tmp_path) as served:
        with Checkpoints(served.urls) as client:
            for step in range(3):
                client.put("agent-1", f"s{step}", json.dumps({"step": step}).encode(), copies=3)
        standby = ["--endpoint", served.urls[1]]
        served.until(
            lambda: "s2" in drctl("checkpoints", "list", "agent-1", "-o", "json", *standby).out,
            "the standby to have everything",
        )
        served.lose_region(REGIONS[0])
        assert [one["id"] for one in drctl("checkpoints", "list", "agent-1", "-o", "json", *standby).json] == ["s2", "s1", "s0"]
        assert '"step": 1' in drctl("checkpoints", "show", "agent-1", "s1", *standby).out
        assert "$.step" in drctl("checkpoints", "diff", "agent-1", "s0", "s2", *standby).out
        done = drctl("checkpoints", "export", "--all", "--as-of", "now", "--to", tmp_path / "out", "-o", "json", *standby).json
        assert [one["id"] for one in done["records"]] == ["s2"]
        assert done["region"] == REGIONS[1]
        everybody = [option for url in served.urls for option in ("--endpoint", url)]
        assert drctl("checkpoints", "show", "agent-1", *everybody).code == 0


# ------------------------------------------------------------------------------------------------------------ small parts


def test_times_are_understood_in_the_ways_that_the_help_names() -> None:
    now = time.time()
    assert parse_time("2h", now) == now - 7200
    assert parse_time("15m ago", now) == now - 900
    assert parse_time("3d", now) == now - 259_200
    assert parse_time("now", now) == now
    assert parse_time("2026-11-21T14:05:00Z", now) == parse_time("2026-11-21T15:05:00+01:00", now)
    assert parse_time("2026-11-21T14:05:00", now) == parse_time("2026-11-21T14:05:00Z", now)


def test_names_become_paths_that_stay_where_they_belong() -> None:
    names = ["..", ".", "../x", "/etc/passwd", "a/b", "a%2Fb", ".hidden", "ü", "x" * 300, "x" * 299 + "y", "a\\b", "C:"]
    paths = {safe_path(name, name, ".json") for name in names}
    assert len(paths) == len(names)
    for path in paths:
        assert len(path.parts) == 3
        assert not any(part.startswith(".") or "/" in part for part in path.parts)
        assert all(len(part) <= 140 for part in path.parts)


def test_bodies_that_are_made_to_hurt_are_only_shown() -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    packed = b"\x91" * 100_000 + b"\x90"
    for body in (deep, packed, b"\xc1", b"\xdd\xff\xff\xff\xff", b"\xff" * 1000, b'{"a": NaN}', b"\x00", "ü".encode() * 50):
        form, lines = bodies.shown(body)
        assert form in ("json", "msgpack", "text", "binary")
        assert all(line.isprintable() or "\t" in line for line in lines)
    many = bodies.changes(list(range(2000)), [n + 1 for n in range(0, 4000, 2)])
    assert len(many) == bodies.MAX_CHANGES
