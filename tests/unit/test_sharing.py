"""Streams are shared out evenly, whatever the order in which instances look, and then stay where they are."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from controller.domain.sharing import LEAD, Shares, quotas, stream_names, stream_of, to_acquire, to_give_up

counts = st.integers(1, 24)
instances = st.integers(1, 6)


@given(st.text(min_size=1, max_size=40), st.integers(1, 64))
def test_an_agent_belongs_to_exactly_one_stream_of_the_group(agent: str, count: int) -> None:
    assert stream_of(agent, count) in stream_names(count)
    assert stream_of(agent, count) == stream_of(agent, count)


def test_where_agents_go_never_changes() -> None:
    """Written down: another hash would send the agents of every running group to other streams."""
    assert [stream_of(name, 8) for name in ("agent-000", "agent-001", "ünïcode/agent", "a")] == ["s01", "s00", "s05", "s02"]
    assert stream_of("anybody", 1) == LEAD


def test_agents_are_spread_evenly() -> None:
    counted = dict.fromkeys(stream_names(8), 0)
    for number in range(8000):
        counted[stream_of(f"agent-{number}", 8)] += 1
    assert max(counted.values()) < 1.2 * min(counted.values())


class _Region:
    """Instances that look and act in any order, on what they saw at their last look."""

    def __init__(self, streams: int, live: list[str], holders: dict[str, str], seed: int) -> None:
        self.streams, self.live, self.holders = stream_names(streams), live, holders
        self.looks = {name: dict(holders) for name in live}
        self.rng = random.Random(seed)
        self.moves = 0

    def view(self, name: str) -> Shares:
        return Shares(self.streams, self.looks[name], self.live, name)

    def look(self, name: str) -> None:
        self.looks[name] = dict(self.holders)

    def acquire(self, name: str) -> None:
        for stream in to_acquire(self.view(name)):
            if self.holders.setdefault(stream, name) == name:
                self.moves += 1

    def give_up(self, name: str) -> None:
        stream = to_give_up(self.view(name))
        if stream is not None and self.holders.get(stream) == name:
            del self.holders[stream]
            self.moves += 1

    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            for name in self.rng.sample(self.live, len(self.live)):
                if self.rng.random() < 0.7:
                    self.look(name)
                self.acquire(name)
                if self.rng.random() < 0.5:
                    self.look(name)
                    self.give_up(name)

    def calm(self) -> None:
        """Everybody looks before it acts."""
        for _ in range(4 * len(self.streams) + 4):
            for name in self.live:
                self.look(name)
                self.acquire(name)
                self.look(name)
                self.give_up(name)


@given(counts, instances, st.integers(0, 10**6), st.data())
def test_sharing_converges_to_an_even_division_and_then_never_moves(
    count: int, live: int, seed: int, data: st.DataObject
) -> None:
    names = [f"r/{letter}" for letter in "abcdef"[:live]]
    start = data.draw(st.dictionaries(st.sampled_from(stream_names(count)), st.sampled_from(names)))
    region = _Region(count, names, start, seed)
    region.run(10)
    region.calm()
    assert set(region.holders) == set(region.streams)
    held = [list(region.holders.values()).count(name) for name in names]
    assert max(held) - min(held) <= 1
    before = dict(region.holders)
    region.moves = 0
    region.run(10)
    assert region.holders == before
    assert region.moves == 0


@given(counts, instances)
def test_shares_add_up_and_differ_by_at_most_one(count: int, live: int) -> None:
    names = [f"r/{number}" for number in range(live)]
    found = quotas(Shares(stream_names(count), {}, names, names[0]))
    assert sum(found.values()) == count
    assert max(found.values()) - min(found.values()) <= 1


@given(counts, instances)
def test_a_stream_that_nobody_takes_is_taken_by_anybody_after_the_grace(count: int, live: int) -> None:
    names = [f"r/{number}" for number in range(live)]
    seen = Shares(stream_names(count), {}, names, names[-1])
    assert set(to_acquire(replace(seen, overdue=stream_names(count)))) == set(stream_names(count))
    at_once = to_acquire(seen)
    assert len(at_once) <= max(1, quotas(seen)[names[-1]])


def test_the_only_stream_is_never_given_up_and_anybody_may_take_it() -> None:
    free = Shares((LEAD,), {}, ("r/a", "r/b"), "r/b")
    assert to_acquire(free) == (LEAD,)
    assert to_give_up(replace(free, holders={LEAD: "r/b"})) is None


def test_an_instance_that_starts_alone_leaves_room_for_those_that_are_expected() -> None:
    seen = Shares(stream_names(3), {}, ("r/a",), "r/a")
    assert to_acquire(seen) == ("s00", "s01", "s02")
    assert to_acquire(replace(seen, expected=2)) == ("s00", "s01")


def test_nothing_is_given_up_while_a_stream_is_free() -> None:
    seen = Shares(stream_names(4), dict.fromkeys(("s00", "s01", "s02"), "r/a"), ("r/a", "r/b"), "r/a")
    assert to_give_up(seen) is None
    assert to_give_up(replace(seen, holders=dict.fromkeys(stream_names(4), "r/a"))) == "s03"
