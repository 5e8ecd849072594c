"""Three streams shared by two controllers: the past, verification and repair through either of them, over real HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from controller.agent.sync import Checkpoints
from controller.cli.render import exact_time
from controller.domain.sharing import stream_of
from controller.stream.segment import frame_offsets
from tests.support.drctl import Drctl
from tests.support.served import GROUP, REGIONS, TWIN, ServedController

STREAMS = 3
AGENTS = [f"agent-{number}" for number in range(9)]
STANDBY = REGIONS[2]


def held(served: ServedController, name: str) -> set[str]:
    """Streams that one controller serves, by its own word."""
    return set(httpx.get(f"{served.places[name].url}/v1/peers/positions", timeout=15).json())


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedController]:
    with ServedController(tmp_path, twin=True, stream={"streams": STREAMS}) as running:
        running.until(
            lambda: len(held(running, REGIONS[0])) + len(held(running, TWIN)) == STREAMS and bool(held(running, TWIN)),
            "both controllers holding streams",
        )
        yield running


def at(served: ServedController, *names: str) -> list[str]:
    return [word for name in names for word in ("--endpoint", served.places[name].url)]


def write(client: Checkpoints, step: int) -> None:
    for agent in AGENTS:
        assert client.put(agent, f"s{step}", json.dumps({"agent": agent, "step": step}).encode(), copies=3).copies >= 2


def steps(client: Checkpoints) -> dict[str, int]:
    found = {agent: client.latest(agent, timeout_seconds=30) for agent in AGENTS}
    return {agent: json.loads(seen[1])["step"] for agent, seen in found.items() if seen is not None}


@pytest.mark.timeout(300)
def test_the_past_of_a_group_of_three_streams_is_seen_and_given_back_through_either_of_two_controllers(
    served: ServedController, drctl: Drctl, tmp_path: Path
) -> None:
    assert {stream_of(agent, STREAMS) for agent in AGENTS} == held(served, REGIONS[0]) | held(served, TWIN)
    with Checkpoints(served.urls) as client:
        write(client, 1)
        time.sleep(0.05)
        then = exact_time(time.time())
        time.sleep(0.05)
        write(client, 2)
        # checkpoints: from either, and from a standby
        for name in (REGIONS[0], TWIN, STANDBY):
            where = at(served, name)
            served.until(
                lambda where=where: {one["id"] for one in drctl("checkpoints", "list", "-o", "json", *where).json} == {"s2"},
                f"{name} to know everything",
            )
            listed = drctl("checkpoints", "list", "-o", "json", *where).json
            assert [one["agent"] for one in listed] == AGENTS
            assert {one["stream"] for one in listed} == {f"s{number:02d}" for number in range(STREAMS)}
            for agent in AGENTS[:3]:
                assert '"step": 1' in drctl("checkpoints", "show", agent, "s1", *where).out
                assert "$.step" in drctl("checkpoints", "diff", agent, "s1", "s2", *where).out
            folder = tmp_path / name.replace("/", "-")
            done = drctl("checkpoints", "export", "--all", "--as-of", then, "--to", folder, "-o", "json", *where)
            assert done.code == 0, done.err
            assert {one["agent"]: one["id"] for one in done.json["records"]} == dict.fromkeys(AGENTS, "s1")
        # one agent, through each of the two, whoever holds its stream
        for name, agent in ((REGIONS[0], AGENTS[0]), (TWIN, AGENTS[1]), (REGIONS[0], AGENTS[2])):
            words = ["restore", "--as-of", then, "--agent", agent]
            dry = drctl(*words, *at(served, name))
            assert dry.code == 0, dry.err
            assert "Dry run" in dry.out
            done = drctl(*words, "--execute", "--confirm", GROUP, "-o", "json", *at(served, name))
            assert done.code == 0, done.out + done.err
            assert [one["state"] for one in done.json["outcomes"]] == ["restored"]
        assert steps(client) == {agent: 1 if agent in AGENTS[:3] else 2 for agent in AGENTS}
        # everybody, through one of them, and again through the other
        done = drctl("restore", "--as-of", then, "--execute", "--confirm", GROUP, "-o", "json", *at(served, TWIN))
        assert done.code == 0, done.out + done.err
        assert {one["state"] for one in done.json["outcomes"]} == {"restored"}
        assert steps(client) == dict.fromkeys(AGENTS, 1)
        served.until(
            lambda: {
                one["state"] for one in drctl("restore", "--as-of", then, "-o", "json", *at(served, REGIONS[0])).json["agents"]
            } <= {"restored", "unchanged"},
            "the other controller to see it",
        )  # fmt: skip
        write(client, 3)
        assert steps(client) == dict.fromkeys(AGENTS, 3)


@pytest.mark.timeout(300)
def test_damage_of_any_of_three_streams_is_found_and_put_right_by_the_controller_that_holds_it(
    served: ServedController, drctl: Drctl
) -> None:
    with Checkpoints(served.urls) as client:
        write(client, 1)
        write(client, 2)
    store = served.places[STANDBY].store
    whole = drctl("verify", STANDBY, "-o", "json", *at(served, TWIN))
    assert whole.code == 0, whole.out + whole.err
    assert len(whole.json["streams"]) == STREAMS
    damaged = set()
    for ref, stored in list(store.objects.items()):
        for place in frame_offsets(stored.data):
            if place.id == "s1" and ref.stream not in damaged:
                store.corrupt(ref, 8 * (place.offset + place.length - 1))
                damaged.add(ref.stream)
    assert len(damaged) == STREAMS
    for stream, head in list(store.heads.items()):
        store.heads[stream] = head.__class__(**{**{name: getattr(head, name) for name in head.__slots__}, "records": 1})
    found = drctl("verify", STANDBY, "-o", "json", *at(served, TWIN))
    assert found.code == 8
    assert sorted((one["what"], one["stream"]) for one in found.json["problems"]) == sorted(
        (what, stream) for what in ("frame", "head") for stream in damaged
    )
    mine = held(served, TWIN)
    done = drctl("repair", STANDBY, "--execute", "--confirm", STANDBY, "-o", "json", *at(served, TWIN))
    assert done.code == 8
    states = {(one["what"], one["stream"]): one for one in done.json["actions"]}
    assert {key: one["state"] for key, one in states.items()} == {
        (what, stream): "done" if what == "frame" or stream in mine else "cannot"
        for what in ("frame", "head") for stream in damaged
    }  # fmt: skip
    other = served.places[REGIONS[0]].url
    assert all(other in one["sentence"] for one in states.values() if one["state"] == "cannot")
    assert drctl("verify", STANDBY, *at(served, REGIONS[0])).code == 8
    assert drctl("repair", STANDBY, "--execute", "--confirm", STANDBY, *at(served, REGIONS[0])).code == 0
    for name in (REGIONS[0], TWIN, STANDBY):
        assert drctl("verify", STANDBY, *at(served, name)).code == 0
