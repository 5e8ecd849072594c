"""What was newest at a point in time, from the view alone: also in a copy that begins late, and after a restore."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.domain.model import Frame
from controller.errors import NotFound, Refused
from controller.runtime.archive import Archive
from controller.stream.limits import ORIGIN, RESTORED, UPTO
from controller.stream.past import Past
from controller.stream.segment import frame
from controller.stream.view import View
from tests.support.fake_service import FakeService
from tests.support.segments import History


def record(agent: str, record_id: str, at: float, kind: str = "checkpoint", **meta: str) -> Frame:
    return frame(agent, record_id, kind, f"{agent}/{record_id}".encode() * 20, received_at=at, created_at=at, meta=meta)


def view_of(history: History) -> View:
    view = View(None)
    history.apply_to(view)
    return view


def archive_of(view: View) -> Archive:
    return Archive("g", "eu-west-1", view, lambda: ("0",), FakeService().archive._fleet)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["checkpoint", "memory", "task"]), st.integers(0, 9)), max_size=40
    )
)
def test_the_newest_at_a_time_is_what_a_reader_of_the_whole_stream_would_say(steps: list[tuple[str, str, int]]) -> None:
    history, log, now = History(), [], 100.0
    for number, (agent, kind, pause) in enumerate(steps):
        now += pause
        made = record(agent, f"r{number}", now, kind)
        history.add([made])
        log.append(made.record)
    past = Past(view_of(history))
    for at in (99.0, 100.0, (100.0 + now) / 2, now, now + 1):
        for agent in "abc":
            own = [one for one in log if one.agent == agent]
            wanted = [one for one in own if one.kind == "checkpoint"]
            if not wanted:
                with pytest.raises(NotFound):
                    past.then(agent, "checkpoint", at)
                continue
            state = [one for one in own if one.kind != "task"]
            then = past.then(agent, "checkpoint", at)
            before = [one for one in wanted if one.received_at <= at]
            assert (None if then.found is None else then.found.record) == (before[-1] if before else None)
            assert then.newest.record == state[-1]
            upto = [one for one in state if one.received_at <= at] if before else []
            assert then.upto == (upto[-1].id if upto else "")
            assert then.newer == len(state) - (state.index(upto[-1]) + 1 if upto else 0)


def test_places_depths_and_hashes_are_those_of_the_stream() -> None:
    history = History().grow(5, agents=2)
    past = Past(view_of(history))
    found = past.records("agent-1", limit=10)
    assert [one.seq for one in found] == [5, 4, 3, 2, 1]
    assert [one.ordinal for one in found] == [1] * 5
    assert [one.depth for one in found] == [4, 3, 2, 1, 0]
    assert all(one.verified and one.ref == history.segments[one.seq - 1].ref for one in found)
    assert past.placed("agent-1", "e1s3") == found[2]
    assert past.placed("agent-1", "nothing") is None
    assert [one.record.id for one in past.records("agent-1", before="e1s4", limit=2)] == ["e1s3", "e1s2"]
    received = [one.record.received_at for one in found]
    assert past.records("agent-1", since=received[3], until=received[1]) == found[1:4]
    assert [one.record.agent for one in past.newest("checkpoint", "", 10)] == ["agent-0", "agent-1"]
    assert [one.record.agent for one in past.newest("checkpoint", "agent-0", 10)] == ["agent-1"]
    for call in (lambda: past.records("nobody"), lambda: past.records("agent-1", before="nothing")):
        with pytest.raises(NotFound):
            call()


def test_a_copy_that_begins_late_names_the_earliest_time_and_never_invents_a_state() -> None:
    history = History()
    history.add([record("a", "a1", 100.0), record("b", "b1", 101.0)])
    history.add([record("a", "a2", 110.0)])
    carried = record("b", "b1", 101.0)
    carried = replace(carried, record=replace(carried.record, meta={ORIGIN: "1.1"}))
    history.add([carried, record("a", "a3", 120.0)])
    view = View(None)
    view.reset("0", 1, history.segments[0].chain)
    for built in history.segments[1:]:
        view.apply(built.segment, built.chain, built.ref, len(built.data))
    archive = archive_of(view)
    with pytest.raises(Refused) as caught:
        archive.as_of(105.0, "checkpoint", (), "", 10)
    assert "begins at 1970-01-01T00:01:50Z" in caught.value.message
    seen = archive.as_of(110.0, "checkpoint", (), "", 10)
    assert [(one.agent, one.state, one.found and one.found.id) for one in seen.agents] == [
        ("a", "found", "a2"),
        ("b", "unchanged", "b1"),
    ]
    (gone,) = archive.as_of(105.0, "checkpoint", ("a",), "", 10).agents
    assert (gone.state, gone.earliest_at, gone.found) == ("gone", 110.0, None)
    (carried_one,) = archive.as_of(105.0, "checkpoint", ("b",), "", 10).agents
    assert carried_one.found is not None
    assert carried_one.found.id == "b1"


def test_pages_of_a_point_in_time_cover_every_agent_once() -> None:
    history = History()
    for number in range(7):
        history.add([record(f"agent-{number}", "r", 100.0 + number)])
    archive = archive_of(view_of(history))
    names: list[str] = []
    after = ""
    while True:
        page = archive.as_of(103.0, "checkpoint", (), after, 3)
        names += [one.agent for one in page.agents]
        assert [one.state for one in page.agents] == ["unchanged" if int(one.agent[-1]) <= 3 else "none" for one in page.agents]
        after = page.after
        if not after:
            break
    assert names == [f"agent-{number}" for number in range(7)]


def test_a_point_that_was_restored_is_recognised_and_a_later_record_makes_it_another_matter() -> None:
    history = History()
    history.add([record("a", "a1", 100.0), record("a", "w1", 101.0, "writes")])
    history.add([record("a", "a2", 110.0)])
    view = view_of(history)
    archive = archive_of(view)
    (found,) = archive.as_of(105.0, "checkpoint", ("a",), "", 10).agents
    assert (found.state, found.upto, found.newest_id, found.newer) == ("found", "w1", "a2", 1)
    history.add([record("a", "back", 120.0, **{RESTORED: "a1", UPTO: "w1"})])
    history.apply_to(view)
    (again,) = archive.as_of(105.0, "checkpoint", ("a",), "", 10).agents
    assert again.state == "restored"
    history.add([record("a", "a3", 130.0)])
    history.apply_to(view)
    (other,) = archive.as_of(105.0, "checkpoint", ("a",), "", 10).agents
    assert (other.state, other.newer) == ("found", 3)
