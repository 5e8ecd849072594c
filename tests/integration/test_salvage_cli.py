"""``drctl salvage`` against real controllers over HTTP: a store comes back with a tail, which is exported and discarded."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.agent.sync import Checkpoints
from tests.support.drctl import Drctl
from tests.support.served import REGIONS, ServedController

HOME, TARGET = REGIONS[:2]
ODD = "../../etc/passwd"
LOST = {("agent-1", "s2"): b'{"step": 2}', ("agent-2", ODD): b"\x1b[2J only here"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedController]:
    with ServedController(tmp_path_factory.mktemp("served")) as running:
        with Checkpoints(running.urls) as client:
            client.put("agent-1", "s1", b'{"step": 1}', copies=3)
            running.delay_replication(60.0)
            for (agent, name), body in LOST.items():
                client.put(agent, name, body, copies=1)
            client.put("agent-3", "again", b"written to both", copies=1)
            running.fail_over(TARGET)
            client.put("agent-3", "again", b"written to both", copies=1)
            running.bring_store_back(HOME)
            running.until(lambda: bool(running.places[HOME].store.heads["s00"].salvage), "the store to be cut back")
            position = running.places[TARGET].store.heads["s00"].seq
            running.until(lambda: running.places[HOME].store.heads["s00"].seq >= position, "the store to catch up")
        yield running


def at(served: ServedController, *regions: str) -> list[str]:
    return [option for region in regions for option in ("--endpoint", served.places[region].url)]


def test_salvage_is_listed_shown_exported_and_discarded(served: ServedController, drctl: Drctl, tmp_path: Path) -> None:
    standby, everybody = at(served, REGIONS[2]), at(served, REGIONS[2], TARGET)
    end = time.monotonic() + 30  # the standby's copy of what was written again may be behind
    while (listed := drctl("salvage", "list", HOME, "-o", "json", *standby).json)["salvage"][0]["also_live"] != 1:
        assert time.monotonic() < end, listed
        time.sleep(0.05)
    (found,) = listed["salvage"]
    assert (found["region"], found["only_here"], found["agents_only_here"], found["damaged_segments"]) == (HOME, 2, 2, 0)
    name = found["name"]
    assert drctl("salvage", "list", "--agent", "agent-2", "-o", "json", *standby).json["salvage"][0]["records"] == 1
    for words in (("list",), ("show", HOME, name), ("show", HOME, name, "--agent", "agent-2")):
        for form in ("table", "json", "yaml"):
            told = drctl("salvage", *words, "-o", form, *standby)
            assert told.code == 0, told.err
            assert not set(told.out) & set("\x1b\u202e"), (words, form)
    shown = drctl("salvage", "show", HOME, name, "-o", "json", *standby).json
    states = {(one["agent"], one["id"]): one["state"] for one in shown["found"] if one["state"] != "own"}
    assert states == dict.fromkeys(LOST, "only") | {("agent-3", "again"): "live"}
    assert {one["latest"] for one in shown["found"] if one["agent"] == "agent-1"} == {"s1"}

    out, some = tmp_path / "out", tmp_path / "some"
    exported = drctl("salvage", "export", HOME, name, "--to", out, "-o", "json", *standby)
    assert exported.code == 0, exported.err
    for one in exported.json["records"]:
        data = (out / one["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == one["sha256"]
        if one["state"] == "only":
            assert LOST[one["agent"], one["id"]] == data
    assert drctl("salvage", "export", HOME, name, "--agent", "agent-1", "--to", some, *standby).code == 0

    discard = ("salvage", "discard", HOME, name)
    dry = drctl(*discard, *everybody)
    assert dry.code == 0, dry.err
    assert "Dry run" in dry.out
    assert "2 records of 2 agents lie nowhere else" in dry.out
    sure = ("--execute", "--confirm", HOME)
    for words, code, why in (
        (sure, 5, "no export was shown"),
        ((*sure, "--exported", some / "manifest.json"), 5, "not of a whole export"),
        (("--execute", "--exported", out / "manifest.json"), 2, "--confirm"),
        ((*sure, "--even-unexported", " "), 2, "needs a reason"),
        ((*sure, "--exported", tmp_path / "nothing"), 3, "No such file"),
    ):
        refused = drctl(*discard, *words, *everybody)
        assert (refused.code, why in refused.err) == (code, True), refused
    manifest = (out / "manifest.json").read_text()
    changed = json.loads(manifest)
    changed["records"] = changed["records"][1:]
    (out / "manifest.json").write_text(json.dumps(changed))
    assert drctl(*discard, *sure, "--exported", out / "manifest.json", *everybody).code == 8
    (out / "manifest.json").write_text(manifest)
    body = out / json.loads(manifest)["records"][-1]["file"]
    kept = body.read_bytes()
    body.write_bytes(b"something else")
    assert drctl(*discard, *sure, "--exported", out / "manifest.json", *everybody).code == 8
    body.write_bytes(kept)
    assert served.places[HOME].store.heads["s00"].salvage

    done = drctl(*discard, *sure, "--exported", out / "manifest.json", "-o", "json", *everybody)  # a standby is asked first
    assert done.code == 0, done.err
    assert (done.json["state"], done.json["lost"]) == ("done", 2)
    assert served.places[HOME].store.heads["s00"].salvage == ()
    assert drctl("salvage", "list", "-o", "json", *standby).json["salvage"] == []
    assert drctl(*discard, *sure, *everybody).code == 0
    assert drctl("salvage", "show", HOME, name, *standby).code == 5
    entries = drctl("audit", "-o", "json", *everybody).json
    assert [(one["subject"], one["detail"]["lost"]) for one in entries if one["action"] == "discard salvage"] == [(HOME, 2)]
    verified = drctl("verify", HOME, "-o", "json", *at(served, TARGET))
    assert (verified.code, verified.json["count"]) == (0, 0), verified
