"""The view: what it lists, keeps warm, refuses, forgets and survives."""

from __future__ import annotations

import gc
import random
import sqlite3
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.domain.model import GENESIS, Encoding, Frame, Kind
from controller.errors import Conflict, Corrupt, Misconfigured, NotFound, Refused, Unavailable
from controller.stream import indexing, tables, warmth
from controller.stream.indexing import ColdBase
from controller.stream.limits import MAX_CHAIN, ORIGIN
from controller.stream.segment import frame
from controller.stream.view import View
from tests.support.segments import History

LITTLE = 700


@pytest.fixture(params=[0, LITTLE, warmth.DEFAULT_MAX_BYTES], ids=["written at once", "little memory", "memory"], autouse=True)
def warm_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Where newest bodies are kept makes no difference to anybody."""
    monkeypatch.setattr(warmth, "DEFAULT_MAX_BYTES", request.param)
    return int(request.param)


def warm_numbers(view: View) -> set[int]:
    """Records whose bodies are in the file or in memory."""
    return {no for (no,) in view.tables.all("SELECT record FROM warm")} | set(view.held())


def viewed(history: History, path: Path | None = None) -> View:
    view = View(path)
    history.apply_to(view)
    return view


def dump(view: View, history: History) -> object:
    """Everything that a caller can see, for comparing two views."""
    agents = view.agents()
    return (
        view.position(history.stream),
        agents,
        view.count(history.stream),
        view.conflicts(history.stream),
        list(view.tail(history.stream, 0)),
        [view.records(agent.agent) for agent in agents],
        [view.restorable(agent.agent) for agent in agents],
        [view.chain_depth(agent.agent, record.id) for agent in agents for record in view.records(agent.agent)],
    )


# ---------------------------------------------------------------------------------------------------------------- content


def test_an_empty_view_knows_nothing_and_says_so() -> None:
    view = View(None)
    assert view.position("0") == (0, GENESIS)
    assert view.chain_at("0", 0) == GENESIS
    assert view.chain_at("0", 1) is None
    assert view.agents() == ()
    assert view.agents("0") == ()
    assert view.latest("nobody") is None
    assert view.read("nobody", "r") is None
    assert view.has("nobody", "r") is None
    assert view.records("nobody") == ()
    assert view.count("0") == 0
    assert list(view.tail("0", 0)) == []
    assert list(view.kinds("task")) == []
    assert view.restorable("nobody") is None
    assert view.chain_depth("nobody", "r") is None


def test_the_newest_state_of_every_agent_is_warm_and_right() -> None:
    history = History().grow(40, agents=5)
    view = viewed(history)
    assert view.position("0") == (40, history.chain)
    assert view.count("0") == 200
    for summary in view.agents("0"):
        record, body = view.latest(summary.agent) or pytest.fail("no latest")
        assert (record.id, body) == history.states[summary.agent]
        assert (summary.latest_id, summary.latest_seq, summary.records) == ("e1s40", 40, 40)
        assert view.restorable(summary.agent) == record == view.latest_record(summary.agent)
        assert record.meta == {"step": "4001"}
        assert view.read(summary.agent, "e1s39") is not None
        assert view.read(summary.agent, "e1s38") is None  # known, not warm
        assert view.record(summary.agent, "e1s38") is not None
        assert view.find(summary.agent, "e1s38") == (view.has(summary.agent, "e1s38"), 38)


def test_chains_are_counted_from_the_whole_body() -> None:
    view = viewed(History().grow(20, agents=1))
    assert [view.chain_depth("agent-0", f"e1s{seq}") for seq in (1, 2, 17, 18, 19)] == [0, 1, 16, 0, 1]


def test_records_are_listed_newest_first_in_pages() -> None:
    view = viewed(History().grow(10, agents=2))
    first = view.records("agent-1", limit=4)
    assert [record.id for record in first] == ["e1s10", "e1s9", "e1s8", "e1s7"]
    assert [record.id for record in view.records("agent-1", limit=2, before="e1s7")] == ["e1s6", "e1s5"]
    with pytest.raises(NotFound):
        view.records("agent-1", before="nothing")


def test_the_tail_comes_in_stream_order_across_pages() -> None:
    history = History()
    for seq in range(1, 4):
        history.add([frame(f"a{n}", f"r{seq}-{n}", "note", b"x") for n in range(400)])
    view = viewed(history)
    tail = list(view.tail("0", 1))
    assert [seq for seq, _ in tail] == [2] * 400 + [3] * 400
    assert [record.id for _, record in tail[:3]] == ["r2-0", "r2-1", "r2-2"]
    assert list(view.tail("0", 3)) == []


def test_tasks_and_assignments_are_listed_by_their_newest_record() -> None:
    history = History()
    history.add([frame("a", "t1", "task", b"old"), frame("b", "t1", "task", b"b"), frame("a", "c1", "checkpoint", b"state")])
    history.add([frame("a", "t2", "task", b"new"), frame("c", "c1", "checkpoint", b"state")])
    view = viewed(history)
    assert [(record.agent, record.id, body) for record, body in view.kinds("task")] == [("a", "t2", b"new"), ("b", "t1", b"b")]
    assert list(view.kinds("assignment")) == []


def test_a_delta_may_stand_on_any_earlier_record_of_its_segment() -> None:
    base = random.Random(1).randbytes(2_000)
    frames = [frame("a", "r0", "checkpoint", base)]
    frames += [frame("a", f"r{n}", "checkpoint", base + bytes([n]) * 9, previous=("r0", base)) for n in range(1, 9)]
    view = viewed_frames(frames)
    assert view.latest("a")[1] == base + b"\x08" * 9  # type: ignore[index]
    assert view.chain_depth("a", "r8") == 1


def viewed_frames(*segments: list[Frame]) -> View:
    history = History()
    for frames in segments:
        history.add(frames)
    return viewed(history)


def test_many_large_states_in_one_segment_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch, warm_bytes: int) -> None:
    monkeypatch.setattr(indexing, "_WINDOW_BYTES", 10_000)
    history = History()
    history.add([history.step(f"agent-{n % 7}", f"r{n}", n) for n in range(100)])
    history.add([history.step(f"agent-{n % 7}", f"s{n}", n) for n in range(100)])
    view = viewed(history)
    for agent, (record_id, body) in history.states.items():
        record, found = view.latest(agent)  # type: ignore[misc]
        assert (record.id, found) == (record_id, body)
    assert len(warm_numbers(view)) in (range(7, 15) if warm_bytes == LITTLE else {14})


def test_warm_bodies_stay_two_for_each_agent_and_kind_as_far_as_there_is_room(warm_bytes: int) -> None:
    view = viewed(History().grow(30, agents=4))
    assert len(warm_numbers(view)) in (range(4, 9) if warm_bytes == LITTLE else {8})
    for _ in range(warmth.SETTLED_ROUNDS):
        view.settle()
    assert view.tables.one("SELECT count(*) FROM warm JOIN heads USING (record)")[0] == 4
    assert not view.cold()


def test_an_agent_with_endless_kinds_does_not_fill_the_disk() -> None:
    view = viewed_frames([frame("a", f"r{n}", f"kind-{n}", b"x" * 100) for n in range(100)], [frame("a", "t", "task", b"spec")])
    assert len(warm_numbers(view)) == indexing.WARM_KINDS + 1
    assert view.latest("a", "task") is not None
    with pytest.raises(Unavailable, match="not loaded"):
        view.latest("a", "kind-99")
    assert view.cold() == ()


# ---------------------------------------------------------------------------------------------------------------- refusals


def test_only_the_next_segment_of_the_same_chain_is_applied() -> None:
    history = History().grow(3)
    view = viewed(history)
    third = history.segments[2]
    with pytest.raises(Conflict, match="does not follow position 3"):
        view.apply(third.segment, third.chain, third.ref, len(third.data))
    other = history.fork(2).grow(2, epoch=2).segments[3]
    with pytest.raises(Corrupt, match="follows chain"):
        view.apply(other.segment, other.chain, other.ref, len(other.data))
    fourth = history.grow(1).segments[3]
    with pytest.raises(Corrupt, match="says that it is"):
        view.apply(fourth.segment, fourth.chain, replace(fourth.ref, epoch=9), len(fourth.data))
    assert view.position("0") == (3, third.chain)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: replace(f, record=replace(f.record, sha256="0" * 64)), "sha256"),
        (lambda f: replace(f, payload=f.payload[:-3]), "ends early|compress"),
        (lambda f: replace(f, encoding=Encoding.DELTA, base="unknown"), "does not have"),
    ],
)
def test_a_body_that_does_not_verify_leaves_the_view_as_it_was(damage, says) -> None:  # type: ignore[no-untyped-def]
    history = History().grow(2)
    view = viewed(history)
    before = dump(view, history)
    bad = history.add(
        [frame("agent-9", "fine", "checkpoint", b"fine"), damage(frame("agent-0", "bad", "checkpoint", b"text " * 99))]
    )
    with pytest.raises(Corrupt, match=says) as caught:
        view.apply(bad.segment, bad.chain, bad.ref, len(bad.data))
    assert "'agent-0'" in caught.value.message
    assert "'bad'" in caught.value.message
    assert dump(view, history) == before


def test_a_chain_of_deltas_past_the_limit_is_refused() -> None:
    history = History()
    for n in range(MAX_CHAIN + 2):
        history.add([history.step("a", f"r{n}", n, cut=1_000)])
    view = View(None)
    with pytest.raises(Corrupt, match="longer than 64"):
        history.apply_to(view)
    assert view.chain_depth("a", f"r{MAX_CHAIN}") == MAX_CHAIN


def test_the_same_record_again_is_ignored_and_another_body_under_its_id_is_counted() -> None:
    history = History()
    history.add([frame("a", "r1", "checkpoint", b"one")])
    history.add(
        [frame("a", "r1", "checkpoint", b"one"), frame("a", "r1", "checkpoint", b"two"), frame("a", "r2", "checkpoint", b"x")]
    )
    view = viewed(history)
    assert view.count("0") == 2
    assert view.conflicts("0") == 1
    assert view.read("a", "r1")[1] == b"one"  # type: ignore[index]
    assert view.find("a", "r1")[1] == 1  # type: ignore[index]
    view.rewind("0", 1)
    assert (view.count("0"), view.conflicts("0")) == (1, 0)


# ------------------------------------------------------------------------------------------------------ rewind and reset


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 12), st.integers(0, 3), st.integers(0, 2**32))
def test_a_rewound_view_is_the_view_that_never_went_further(at: int, agents: int, seed: int) -> None:
    rng = random.Random(seed)
    history = History()
    for seq in range(1, 13):
        frames = []
        for n in range(agents):
            if rng.random() < 0.7:
                frames.append(history.step(f"agent-{n}", f"r{seq}", seq, kind=rng.choice(["checkpoint", "note"])))
            if rng.random() < 0.2 and history.bodies:
                (agent, record_id), body = rng.choice(sorted(history.bodies.items()))
                frames.append(frame(agent, record_id, "checkpoint", body if rng.random() < 0.5 else b"other"))
        history.add(frames)
    view = viewed(history)
    view.rewind("0", at)
    fresh = View(None)
    history.apply_to(fresh, at)
    assert dump(view, history) == dump(fresh, history)
    for agent, record_id, _ in view.cold():
        view.admit(agent, record_id, history.bodies[agent, record_id])
    for summary in view.agents():
        for kind in ("checkpoint", "note"):
            assert view.latest(summary.agent, kind) == fresh.latest(summary.agent, kind)


def test_a_rewind_outside_of_the_copy_is_refused() -> None:
    view = viewed(History().grow(3))
    for seq in (-1, 4):
        with pytest.raises(Refused, match=r"the copy has 0\.\.3"):
            view.rewind("0", seq)


def test_after_a_rewind_a_cold_state_is_never_taken_for_no_state() -> None:
    view = viewed(History().grow(6, agents=1))
    view.rewind("0", 2)
    assert view.latest_record("agent-0").id == "e1s2"  # type: ignore[union-attr]
    with pytest.raises(Unavailable, match="not loaded yet"):
        view.latest("agent-0")
    assert [found[:2] for found in view.cold()] == [("agent-0", "e1s2")]


def test_a_delta_on_a_cold_base_asks_for_it_and_goes_in_once_it_is_lent() -> None:
    history = History().grow(8, agents=1)
    view = viewed(history)
    body = history.bodies["agent-0", "e1s2"]
    late = history.add([frame("agent-0", "late", "checkpoint", body + b"!", previous=("e1s2", body))])
    with pytest.raises(ColdBase, match="'e1s2'"):
        view.apply(late.segment, late.chain, late.ref, len(late.data))
    assert view.missing(late.segment) == (("agent-0", "e1s2"),)
    with pytest.raises(Corrupt):
        view.admit("agent-0", "e1s2", body + b"?")
    view.admit("agent-0", "e1s2", body)
    view.apply(late.segment, late.chain, late.ref, len(late.data))
    assert view.latest("agent-0")[1] == body + b"!"  # type: ignore[index]
    assert view.read("agent-0", "e1s2") is None  # it was only lent


def test_a_copy_that_begins_late_lists_what_it_cannot_decode_and_never_serves_it() -> None:
    history = History().grow(6, agents=1)
    view = View(None)
    view.reset("0", 3, history.segments[2].chain)
    history.apply_to(view)
    assert view.position("0") == (6, history.chain)
    assert view.floor("0") == (3, history.segments[2].chain)
    assert view.restorable("agent-0") is None
    assert view.chain_depth("agent-0", "e1s6") == MAX_CHAIN
    with pytest.raises(Unavailable, match="no longer has"):
        view.latest("agent-0")
    body = history.bodies["agent-0", "e1s6"]
    carried = history.add([frame("agent-0", "e1s6", "checkpoint", body, meta={ORIGIN: "6.0"})])
    view.apply(carried.segment, carried.chain, carried.ref, len(carried.data))
    assert view.latest("agent-0")[1] == body  # type: ignore[index]
    assert view.restorable("agent-0").id == "e1s6"  # type: ignore[union-attr]
    assert view.chain_depth("agent-0", "e1s6") == 0
    view.rewind("0", 6)
    assert view.restorable("agent-0") is None


def test_a_carried_forward_record_keeps_its_place_among_the_agents_records() -> None:
    view = viewed_frames(
        [frame("a", "new", "checkpoint", b"new")],
        [frame("a", "old", "checkpoint", b"old", meta={ORIGIN: "0.5"}), frame("a", "odd", "note", b"", meta={ORIGIN: "99.x"})],
    )
    assert view.latest("a")[0].id == "new"  # type: ignore[index]
    assert [record.id for record in view.records("a")] == ["odd", "new", "old"]


def test_retention_forgets_what_lies_in_no_kept_segment() -> None:
    history = History().grow(5, agents=2)
    history.add([frame("idle", "r1", "checkpoint", b"idle state")])
    history.grow(4, agents=2)
    history.add([frame("idle", "r1", "checkpoint", b"idle state", meta={ORIGIN: "6.0"})])
    view = viewed(history)
    view.forget("0", 9, history.segments[7].chain)
    assert view.floor("0") == (8, history.segments[7].chain)
    assert [record.id for record in view.records("agent-0")] == ["e1s10", "e1s9"]
    assert view.latest("idle")[1] == b"idle state"  # type: ignore[index]
    assert view.link("idle", "r1").ref.seq == 11  # type: ignore[union-attr]
    assert view.count("0") == 5
    view.rewind("0", 10)
    assert view.record("idle", "r1") is None
    with pytest.raises(Refused):
        view.rewind("0", 7)


def test_streams_do_not_touch_each_other() -> None:
    one, two = History("0").grow(4, agents=1), History("1")
    two.add([frame("other", "r1", "checkpoint", b"x")])
    view = viewed(one)
    two.apply_to(view)
    view.rewind("0", 0)
    assert [summary.agent for summary in view.agents()] == ["other"]
    assert view.agents("0") == ()
    assert view.position("1") == (1, two.chain)
    view.reset("1", 0, GENESIS)
    assert view.agents() == ()


# ------------------------------------------------------------------------------------------------------------------- file


def test_a_view_survives_a_restart(tmp_path: Path) -> None:
    history = History().grow(5)
    path = tmp_path / "state" / "view.sqlite"
    view = viewed(history, path)
    before = dump(view, history)
    view.close()
    again = View(path)
    assert dump(again, history) == before
    assert again.latest("agent-1")[1] == history.states["agent-1"][1]  # type: ignore[index]


@pytest.mark.parametrize("damage", ["header", "middle", "garbage", "truncated"])
def test_a_damaged_file_is_set_aside_and_begun_anew(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "view.sqlite"
    viewed(History().grow(30, agents=20), path).close()
    data = bytearray(path.read_bytes())
    if damage == "header":
        data[:16] = b"not SQLite at all"[:16]
    elif damage == "middle":
        for at in range(4096, len(data), 4096):
            data[at : at + 64] = b"\xff" * 64
    elif damage == "garbage":
        data = bytearray(random.Random(1).randbytes(9_000))
    else:
        del data[len(data) // 2 :]
    path.write_bytes(data)
    view = View(path)
    assert view.position("0") == (0, GENESIS)
    assert (tmp_path / "view.sqlite.damaged").exists()
    History().grow(2).apply_to(view)


def test_a_file_of_another_schema_is_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "view.sqlite"
    viewed(History().grow(2), path).close()
    monkeypatch.setattr(tables, "SCHEMA_VERSION", 99)
    assert View(path).position("0") == (0, GENESIS)


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "view.sqlite"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE precious (x)")
    other.commit()
    other.close()
    before = path.read_bytes()
    with pytest.raises(Misconfigured, match="another program"):
        View(path)
    assert path.read_bytes() == before


def test_a_second_process_is_told_that_the_view_is_in_use(tmp_path: Path) -> None:
    path = tmp_path / "view.sqlite"
    first = viewed(History().grow(1), path)
    with pytest.raises(Unavailable, match="locked"):
        View(path)
    assert first.position("0")[0] == 1


def test_a_damaged_warm_body_is_never_served(tmp_path: Path) -> None:
    path = tmp_path / "view.sqlite"
    viewed(History().grow(2, agents=1), path).close()
    view = View(path)
    view._tables.run("UPDATE warm SET body=X'00', packed=0")
    with pytest.raises(Corrupt, match="damaged"):
        view.latest("agent-0")
    view._tables.run("UPDATE warm SET packed=1")
    with pytest.raises(Corrupt, match="damaged"):
        view.read("agent-0", "e1s2")


def test_a_killed_process_loses_newest_bodies_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "view.sqlite"
    history = History().grow(20, agents=3)
    view = viewed(history, path)
    said = dump(view, history)
    view.tables.close()  # as a kill: nothing more is written
    again = View(path)
    assert dump(again, history) == said
    lost = {(agent, record) for agent, record, _ in again.cold()}
    for agent, (record_id, body) in history.states.items():
        if (agent, record_id) in lost:
            with pytest.raises(Unavailable, match="not loaded"):
                again.latest(agent)
            again.admit(agent, record_id, body)
        found = again.latest(agent) or pytest.fail("no latest")
        assert found[1] == body
    assert not again.cold()


def test_what_is_not_the_newest_for_long_is_never_written(tmp_path: Path) -> None:
    """The reason why bodies are held: of a thousand states of a busy agent only what it ends with reaches the file."""
    view, history = View(tmp_path / "view.sqlite", warm_max_bytes=2**20), History()
    for _ in range(10):
        history.grow(20, agents=3).apply_to(view)
        view.settle()
        assert view.tables.one("SELECT count(*) FROM warm")[0] == 0
    for _ in range(warmth.SETTLED_ROUNDS):
        view.settle()
    assert view.tables.one("SELECT count(*) FROM warm")[0] == 3


def test_five_hundred_records_are_indexed_in_a_fraction_of_a_second(tmp_path: Path) -> None:
    history = History()
    for seq in range(4):
        history.add([history.step(f"agent-{n}", f"r{seq}", n) for n in range(500)])
    view = View(tmp_path / "view.sqlite")
    history.apply_to(view, 3)
    last = history.segments[3]
    segment = last.segment
    began = time.process_time()  # of this process alone: the machine may be busy
    view.apply(segment, last.chain, last.ref, len(last.data))
    assert time.process_time() - began < 0.3  # 17 ms on an idle core


def test_agents_are_listed_page_by_page_without_the_controllers_own() -> None:
    names = [f"agent-{n:02d}" for n in range(25)] + ["zoo", "ärger"]
    history = History()
    for n, name in enumerate(reversed(names)):
        history.add([history.step(name, f"r{n}", n)])
    history.add([history.step("a-canary", "1", 98, kind=Kind.CANARY), history.step("an-epoch", "1", 99, kind=Kind.OPENING)])
    view = viewed(history)
    assert view.agent_count() == len(names) == len(view.agents()) - 2
    found: list[str] = []
    while page := view.agent_page(after=found[-1] if found else "", limit=10):
        assert len(page) <= 10
        found += [one.agent for one in page]
    assert found == names
    assert [one.agent for one in view.agent_page(newest=True, limit=3)] == names[:3]
    assert [one.agent for one in view.agent_page(prefix="agent-1", limit=100)] == [f"agent-1{n}" for n in range(10)]
    assert [one.agent for one in view.agent_page(prefix="agent-1", after="agent-17", limit=100)] == ["agent-18", "agent-19"]


@pytest.mark.parametrize(
    ("missing", "restorable"),
    [("", "3"), ("1", None), ("w1", "1"), ("2", "1"), ("w2", "2")],
    ids=lambda value: value or "nothing",
)
def test_a_state_whose_chain_is_not_whole_is_not_restorable(missing: str, restorable: str | None) -> None:
    """It is stored as changes: the newest state that has all its parents and their writes counts, and no empty one."""
    chain = [
        ("1", Kind.CHECKPOINT, None, {}),
        ("w1", "writes", "1", {"attached": "1"}),
        ("2", Kind.CHECKPOINT, "1", {"needs": "parent", "parent_writes": "1"}),
        ("w2", "writes", "2", {"attached": "1"}),
        ("3", Kind.CHECKPOINT, "2", {"needs": "parent", "parent_writes": "1"}),
    ]
    history = History()
    for record_id, kind, parent, meta in chain:
        if record_id != missing:
            history.add([frame("agent", record_id, kind, b"changes", parent=parent, meta=meta)])
    found = viewed(history).restorable("agent")
    assert (None if found is None else found.id) == restorable


def test_a_views_files_are_for_their_owner_alone_also_one_that_was_open_to_others(tmp_path: Path) -> None:
    path = tmp_path / "view.sqlite"
    path.touch(mode=0o644)
    view = View(path)
    History().grow(2).apply_to(view)
    assert {found.name: oct(found.stat().st_mode & 0o777) for found in tmp_path.iterdir()} == {
        found.name: "0o600" for found in tmp_path.iterdir()
    }
    view.close()


def test_a_view_that_nobody_has_any_more_is_gone_with_its_connection() -> None:
    view = View(None)
    seen = weakref.ref(view), weakref.ref(view._warmth)
    del view
    gc.collect()
    assert [ref() for ref in seen] == [None, None]
