"""``drctl verify`` against real controllers over real HTTP: damage is named on the terminal and in the exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from controller.agent.sync import Checkpoints
from controller.domain.model import SegmentRef
from controller.stream.segment import frame_offsets
from tests.support.drctl import Drctl
from tests.support.served import REGIONS, ServedController


@pytest.fixture(autouse=True)
def asks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controller.cli.verify.POLL_SECONDS", 0.02)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedController]:
    with ServedController(tmp_path) as running:
        with Checkpoints(running.urls) as client:
            for step in range(6):
                client.put("agent-1", f"s{step}", json.dumps({"step": step, "text": "x" * 500}).encode(), copies=3)
        yield running


def damage(served: ServedController, region: str, record: str) -> SegmentRef:
    """Flips a bit in the frame of a record of agent-1. Returns its segment."""
    store = served.places[region].store
    for ref, stored in list(store.objects.items()):
        for place in frame_offsets(stored.data):
            if (place.agent, place.id) == ("agent-1", record):
                store.corrupt(ref, 8 * (place.offset + place.length - 1))
                return ref
    raise AssertionError(f"{region} does not have {record}")


def test_a_whole_store_is_exit_code_0_and_damage_is_8_with_whose_it_is_and_what_to_type(
    served: ServedController, drctl: Drctl
) -> None:
    at = ["--endpoint", served.urls[1]]
    for region in (*REGIONS, None):
        found = drctl("verify", *([region] if region else []), *at)
        assert found.code == 0, found.out + found.err
        assert f"{region or REGIONS[1]}: done: whole" in found.out
    ref = damage(served, REGIONS[2], "s3")
    found = drctl("verify", REGIONS[2], *at)
    assert found.code == 8
    for words in (
        ref.key,
        "record s3 of agent agent-1",
        "proves itself",
        f"drctl repair {REGIONS[2]}",
    ):
        assert words in found.out + found.err, words
    shown = drctl("verify", REGIONS[2], "--show", "-o", "json", *at)
    assert shown.code == 8
    (problem,) = shown.json["problems"]
    assert (problem["agent"], problem["record"], problem["source"]) == ("agent-1", "s3", REGIONS[0])
    assert drctl("verify", "mars", *at).code == 5
    never = drctl("verify", REGIONS[0], "--show", "--endpoint", served.urls[2])
    assert never.code == 5
    assert f"drctl verify {REGIONS[0]}" in never.err


def test_a_standby_verifies_while_the_active_region_is_dead(served: ServedController, drctl: Drctl) -> None:
    served.lose_region(REGIONS[0])
    at = ["--endpoint", served.urls[1]]
    assert drctl("verify", REGIONS[1], *at).code == 0
    gone = drctl("verify", REGIONS[0], *at)
    assert gone.code == 3
    assert "interrupted" in gone.err


def test_ctrl_c_interrupts_and_the_same_command_goes_on(
    served: ServedController, drctl: Drctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(_seconds: float) -> None:
        raise KeyboardInterrupt

    at = ["--endpoint", served.urls[1]]
    with monkeypatch.context() as patched:
        patched.setattr("controller.cli.verify.time.sleep", pressed)
        stopped = drctl("verify", REGIONS[0], *at)
    assert stopped.code == 130
    assert f"go on: drctl verify {REGIONS[0]}" in stopped.err
    state = drctl("verify", REGIONS[0], "--show", "-o", "json", *at).json
    again = drctl("verify", REGIONS[0], "-o", "json", *at)
    assert again.code == 0
    assert again.json["resumed"] is (state["state"] == "interrupted")
    assert drctl("verify", REGIONS[0], "--restart", *at).code == 0


def test_a_repair_is_a_dry_run_first_then_done_by_a_standby_and_the_store_is_whole(
    served: ServedController, drctl: Drctl
) -> None:
    at = ["--endpoint", served.urls[1]]
    region = REGIONS[2]
    assert drctl("repair", region, *at).code == 5  # never verified here
    ref = damage(served, region, "s2")
    before = served.places[region].store.objects[ref]
    assert drctl("verify", region, *at).code == 8
    dry = drctl("repair", region, *at)
    assert dry.code == 0
    assert "would be replaced" in dry.out
    assert f"--execute --confirm {region}" in dry.out
    assert served.places[region].store.objects[ref] == before
    assert drctl("repair", region, "--execute", *at).code == 2
    assert drctl("repair", region, "--execute", "--confirm", REGIONS[0], *at).code == 2
    done = drctl("repair", region, "--execute", "--confirm", region, "--requester", "ada", "-o", "json", *at)
    assert done.code == 0, done.err
    assert [action["state"] for action in done.json["actions"]] == ["done"]
    assert drctl("verify", region, *at).code == 0
    entries = drctl("audit", "-o", "json", *at).json
    assert [(entry["actor"], entry["subject"]) for entry in entries if entry["action"] == "repair"] == [("ada", region)]


def test_a_damaged_head_is_put_right_by_the_active_controller(served: ServedController, drctl: Drctl) -> None:
    region = REGIONS[2]
    store = served.places[region].store
    store.heads["s00"] = replace(store.heads["s00"], records=1)
    standby, active = ["--endpoint", served.urls[1]], ["--endpoint", served.urls[0]]
    assert drctl("verify", region, *standby).code == 8
    refused = drctl("repair", region, "--execute", "--confirm", region, *standby)
    assert refused.code == 8
    assert "active controller" in refused.err
    assert drctl("verify", region, *active).code == 8
    done = drctl("repair", region, "--execute", "--confirm", region, *active)
    assert done.code == 0, done.out + done.err
    assert drctl("verify", region, *active).code == 0
    with Checkpoints(served.urls) as client:
        assert client.put("agent-1", "after", b"the stream goes on", copies=3).status == "acknowledged"
