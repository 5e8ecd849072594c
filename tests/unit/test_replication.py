"""Which history is the history: every rule by itself, and all of them together in a small model of the whole protocol.

The model has two to five stores, any number of instances that still believe in their epochs, lost answers and stores that
come and go. The real decisions run in it; the invariants are checked after every step. Its mutants take one guard away each
and must be caught by the same checker: a checker that nothing can offend proves nothing.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.domain import replication
from controller.domain.model import EpochStart, Forks, Head, Salvage
from controller.errors import Refused

REGIONS = ("a", "b", "c", "d", "e")
SEEDS = 300
MUTANT_SEEDS = 1_000
STEPS = 250

Entry = tuple[int, int]
"""(epoch that wrote it, its own number): two entries are the same segment exactly when both are equal."""

real_valid_length = replication.valid_length


class Violation(AssertionError):
    """An invariant does not hold."""


def start(epoch: int, first_seq: int) -> EpochStart:
    return EpochStart(epoch, first_seq)


def head_of(entries: list[Entry], epoch: int = 0) -> Head:
    """The head of a store that holds these entries."""
    starts: list[EpochStart] = []
    for seq, (owner, _) in enumerate(entries, start=1):
        if not starts or starts[-1].epoch != owner:
            starts.append(EpochStart(owner, seq))
    return Head("0", seq=len(entries), epoch=epoch, chain=f"after {len(entries)}", epochs=tuple(starts))


def common_length(a: list[Entry], b: list[Entry]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# -------------------------------------------------------------------------------------------------------------- the model


@dataclass
class Store:
    entries: list[Entry] = field(default_factory=list)
    epoch: int = 0
    reachable: bool = True


@dataclass(eq=False)
class Instance:
    """Somebody who acquired an epoch. It goes on until it *sees* that it is over, however stale it is."""

    epoch: int
    home: str
    fenced: dict[str, list[Entry]] = field(default_factory=dict)
    history: list[Entry] | None = None
    starts: tuple[EpochStart, ...] = ()
    sole_ackers: tuple[str, ...] = ()
    known: dict[str, int] = field(default_factory=dict)
    """store → how much of our history it is known to have committed."""
    loss_approved: bool = False
    over: bool = False


@dataclass(frozen=True)
class Promise:
    entry: Entry
    seq: int
    committed: frozenset[str]


class Model:
    """``stores_check_epochs`` and ``stand_in_is_recorded`` are guards outside of the pure rules, which mutants take away."""

    def __init__(self, seed: int, *, stores_check_epochs: bool = True, stand_in_is_recorded: bool = True) -> None:
        self.random = random.Random(seed)
        self.stores = {region: Store() for region in REGIONS[: self.random.choice((2, 3, 3, 3, 4, 5))]}
        self.forks = Forks()
        self.epoch = 0
        self.instances: list[Instance] = []
        self.canonical: list[Entry] = []
        self.promises: list[Promise] = []
        self.numbers = 0
        self.isolated: str | None = None
        """This region reaches its own store and nothing else, and nobody else reaches that store."""
        self.seen: Counter[str] = Counter()
        self._stores_check_epochs = stores_check_epochs
        self._stand_in_is_recorded = stand_in_is_recorded

    def run(self, steps: int = STEPS) -> None:
        actions: list[tuple[int, Callable[[], None]]] = [
            (4, self.acquire),
            (10, self.fence),
            (2, self.prepare_partly),
            (10, self.open),
            (8, self.append),
            (24, self.ship),
            (20, self.acknowledge),
            (3, self.stand_in),
            (5, self.toggle),
            (3, self.isolate),
            (2, self.approve_loss),
        ]
        weights = [weight for weight, _ in actions]
        self.acquire()
        for _ in range(steps):
            (action,) = self.random.choices([action for _, action in actions], weights)
            action()
            self.check()

    # ------------------------------------------------------------------------------------------------------- invariants

    def check(self) -> None:
        for region, store in self.stores.items():
            problem = replication.head_problem(head_of(store.entries, store.epoch))
            if problem is not None:
                raise Violation(f"{region}: {problem}")
        for promise in self.promises:
            if len(self.canonical) < promise.seq or self.canonical[promise.seq - 1] != promise.entry:
                raise Violation(f"acknowledged {promise} is not in the history of {len(self.canonical)} segments")
        for fork, following in pairwise(self.forks.starts):
            if not (fork.epoch < following.epoch and fork.first_seq < following.first_seq):
                raise Violation(f"forks do not ascend: {self.forks.starts}")
        valid = {
            region: store.entries[: real_valid_length(head_of(store.entries), self.forks.starts)]
            for region, store in self.stores.items()
        }
        for (one, a), (other, b) in combinations(valid.items(), 2):
            if a[: len(b)] != b[: len(a)]:
                raise Violation(f"{one} and {other} both count as valid and differ: {a} / {b}")

    # ------------------------------------------------------------------------------------------------------ transitions

    def _some(self, *, opened: bool) -> Instance | None:
        """Any instance that is not over, most often the newest."""
        fit = [one for one in self.instances if not one.over and (one.history is not None) is opened]
        if not fit:
            return None
        return fit[-1] if self.random.random() < 0.75 else self.random.choice(fit)

    def _newest(self, instance: Instance) -> bool:
        """Whether the holder key is its own: what guards every transaction of it in etcd, and its lease."""
        return instance.epoch == self.epoch

    def acquire(self) -> None:
        """Mostly only when the last one got somewhere: people do not fail over for the sake of it."""
        newest = self.instances[-1] if self.instances else None
        opening = newest is not None and newest.history is None and not newest.over and self.stores[newest.home].reachable
        if opening and self.random.random() < 0.8:
            return
        homes = [region for region, store in self.stores.items() if region != self.isolated and store.reachable]
        self.epoch += 1
        self.instances.append(Instance(self.epoch, self.random.choice(homes or list(self.stores))))

    def _reach(self, instance: Instance, region: str) -> Store | None:
        """Fences the store under the instance's epoch. None: no answer, or the instance saw a greater epoch and is over."""
        store = self.stores[region]
        cut_off = region != instance.home and self.isolated in (region, instance.home)
        if cut_off or not store.reachable:
            return None
        if store.epoch > instance.epoch and self._stores_check_epochs:
            instance.over = True
            return None
        store.epoch = max(store.epoch, instance.epoch)
        return store

    def fence(self) -> None:
        instance = self._some(opened=False)
        if instance is None:
            return
        for region in self.random.sample(list(self.stores), len(self.stores)):
            if self.random.random() < 0.9 and not instance.over:
                store = self._reach(instance, region)
                if store is not None:
                    instance.fenced[region] = list(store.entries)

    def _choose(self, instance: Instance) -> replication.Choice | None:
        heads = {region: head_of(entries, instance.epoch) for region, entries in instance.fenced.items()}
        if instance.home not in heads or replication.quorum_lacks(tuple(self.stores), heads) is not None:
            return None
        if replication.unfenced_sole_ackers(self.forks.sole_ackers, heads):
            self.seen["held"] += 1
            if not instance.loss_approved:
                return None
        choice = replication.choose(heads, self.forks.starts, home=instance.home, epoch=instance.epoch)
        chosen = instance.fenced[choice.source][: choice.length]
        for region, entries in instance.fenced.items():
            self._check_alignment(choice.alignment(region), entries, chosen)
        return choice

    def _check_alignment(self, alignment: replication.Alignment, entries: list[Entry], chosen: list[Entry]) -> None:
        """What is shared with the chosen history stays, all else is cut, and the salvage says exactly what was cut."""
        if alignment.keep != common_length(entries, chosen):
            raise Violation(f"{alignment.region} keeps {alignment.keep} of {entries}, chosen is {chosen}")
        salvage = alignment.salvage
        if (salvage is None) != (alignment.keep == len(entries)):
            raise Violation(f"{alignment}: {len(entries)} entries")
        if salvage is not None:
            self.seen["salvaged"] += 1
            owners = [replication.owner(salvage.epochs, seq) for seq in range(salvage.first_seq, salvage.last_seq + 1)]
            if owners != [epoch for epoch, _ in entries[alignment.keep :]]:
                raise Violation(f"{salvage} does not describe {entries[alignment.keep :]}")

    def _bring_home(self, instance: Instance, choice: replication.Choice, limit: int) -> bool:
        """Cuts the home store back and copies at most ``limit`` entries into it. Whether it holds the choice now."""
        home = self._reach(instance, instance.home)
        if home is None:
            return False
        chosen = instance.fenced[choice.source][: choice.length]
        keep = choice.alignment(instance.home).keep
        home.entries = home.entries[:keep] + chosen[keep : keep + limit]
        instance.fenced[instance.home] = list(home.entries)
        return home.entries == chosen

    def prepare_partly(self) -> None:
        """An opening that is interrupted in the middle of copying."""
        instance = self._some(opened=False)
        choice = self._choose(instance) if instance is not None else None
        if instance is not None and choice is not None:
            self._bring_home(instance, choice, self.random.randrange(3))

    def open(self) -> None:
        instance = self._some(opened=False)
        choice = self._choose(instance) if instance is not None else None
        if instance is None or choice is None or not self._bring_home(instance, choice, 10**6):
            return
        if not self._newest(instance) or instance.home == self.isolated:
            return  # the transaction that records the fork compares the holder key
        history = list(self.stores[instance.home].entries)
        self._forgive(instance, history)
        fork = EpochStart(instance.epoch, len(history) + 1)
        self.forks = Forks(replication.with_fork(self.forks.starts, fork), (instance.home,))
        instance.starts = (*choice.starts, fork)
        instance.sole_ackers = (instance.home,)
        instance.history = history
        instance.known = {instance.home: len(history)}
        self.canonical = instance.history
        self.seen["opened"] += 1

    def _forgive(self, instance: Instance, history: list[Entry]) -> None:
        """An approved loss covers what lies in stores that were not fenced alone, and nothing else."""
        if not instance.loss_approved:
            return
        for promise in list(self.promises):
            if promise.seq > len(history) or history[promise.seq - 1] != promise.entry:
                if promise.committed & set(instance.fenced) or len(promise.committed) > 1:
                    raise Violation(f"{promise} is lost although {sorted(instance.fenced)} were fenced")
                self.promises.remove(promise)
                self.seen["lost with approval"] += 1

    def append(self) -> None:
        instance = self._some(opened=True)
        if instance is None or instance.history is None:
            return
        for _ in range(self.random.randint(1, 3)):
            self.numbers += 1
            instance.history.append((instance.epoch, self.numbers))

    def ship(self) -> None:
        """A pump attaches to one store and commits a few segments there; its answer may be lost."""
        instance = self._some(opened=True)
        if instance is None or instance.history is None:
            return
        if self.random.random() < 0.3:
            self.append()
        region = self.random.choice([instance.home, *self.stores])
        if self._newest(instance) and self.random.random() < 0.2:
            self._ship_to(instance, instance.home)
        self._ship_to(instance, region)

    def _ship_to(self, instance: Instance, region: str) -> None:
        assert instance.history is not None
        store = self._reach(instance, region)
        if store is None:
            return
        head = head_of(store.entries, instance.epoch)
        alignment = replication.align(region, head, instance.starts, len(instance.history), instance.epoch)
        keep = alignment.keep
        self.seen["salvaged"] += alignment.salvage is not None
        if store.entries[:keep] != instance.history[:keep] and self._newest(instance):
            raise Violation(f"{region} keeps {store.entries[:keep]} that are not ours: {instance.history[:keep]}")
        count = self.random.randint(0, 4)
        store.entries = store.entries[:keep] + instance.history[keep : keep + count]
        if self.random.random() < 0.9:
            instance.known[region] = len(store.entries)

    def acknowledge(self) -> None:
        """Also by an instance whose lease is gone: then only what it knows to be in two stores (``failsafe``)."""
        instance = self._some(opened=True)
        if instance is None or not instance.history:
            return
        newest = max(instance.known.values(), default=0) or len(instance.history)
        seq = self.random.randint(max(1, newest - 2), newest)
        committed = {region for region, known in instance.known.items() if known >= seq}
        copies = self.random.choice((1, 1, 2, 2, len(self.stores)))
        if not self._newest(instance):
            copies = max(2, copies)
        if replication.acknowledged(copies, committed, instance.sole_ackers):
            self.promises.append(Promise(instance.history[seq - 1], seq, frozenset(committed)))
            self.seen["acknowledged" if len(committed) > 1 else "acknowledged by one store"] += 1
            self.seen["acknowledged by a stale instance"] += not self._newest(instance)

    def stand_in(self) -> None:
        """Another store may acknowledge alone, once that is recorded; and no more when the home store has everything."""
        instance = self._some(opened=True)
        if instance is None or instance.history is None or not self._newest(instance) or instance.home == self.isolated:
            return
        promised = max((promise.seq for promise in self.promises), default=0)
        if instance.sole_ackers == (instance.home,):
            if self.stores[instance.home].reachable and self.random.random() < 0.8:
                return
            others = [region for region in self.stores if region != instance.home]
            other = max(others, key=lambda region: (self.stores[region].reachable, instance.known.get(region, 0)))
            instance.sole_ackers = (instance.home, other)
            self.seen["stand-in"] += 1
        elif instance.known.get(instance.home, 0) >= promised and self.random.random() < 0.3:
            instance.sole_ackers = (instance.home,)
        if self._stand_in_is_recorded:
            self.forks = Forks(self.forks.starts, instance.sole_ackers)

    def toggle(self) -> None:
        """Mostly at most one store is away, often the one that has most; one that returns is often relieved by the next."""
        stores = list(self.stores.values())
        away = [store for store in stores if not store.reachable]
        if away:
            self.random.choice(away).reachable = True
            if len(away) > 1 or self.random.random() < 0.5:
                return
        longest = max(stores, key=lambda store: len(store.entries))
        (longest if self.random.random() < 0.6 else self.random.choice(stores)).reachable = False

    def isolate(self) -> None:
        """Mostly the region that is active: the old instance goes on with its own store while the next one opens."""
        if self.isolated is not None:
            self.isolated = None
            return
        opened = [one.home for one in self.instances if one.history is not None and not one.over]
        self.isolated = opened[-1] if opened and self.random.random() < 0.8 else self.random.choice(list(self.stores))

    def approve_loss(self) -> None:
        instance = self._some(opened=False)
        if instance is not None and self._newest(instance):
            instance.loss_approved = True


def test_no_history_of_the_model_breaks_a_promise_and_every_situation_occurs_in_it() -> None:
    seen: Counter[str] = Counter()
    for seed in range(SEEDS):
        model = Model(seed)
        try:
            model.run()
        except Violation as violation:
            raise AssertionError(f"seed {seed}: {violation}") from violation
        seen += model.seen
    rare = {
        "opened", "salvaged", "held", "lost with approval", "stand-in", "acknowledged", "acknowledged by one store",
        "acknowledged by a stale instance",
    }  # fmt: skip
    assert {name for name in rare if seen[name] < 30} == set(), seen


def ignores_forks(head: Head, forks: tuple[EpochStart, ...]) -> int:
    return head.seq


def keeps_everything(region: str, head: Head, forks: tuple[EpochStart, ...], length: int, epoch: int) -> replication.Alignment:
    return replication.Alignment(region, head.seq, None)


def any_copy_will_do(copies: int, committed: set[str], sole_ackers: tuple[str, ...]) -> bool:
    return len(committed) >= 1


def one_copy_anywhere(copies: int, committed: set[str], sole_ackers: tuple[str, ...]) -> bool:
    return len(committed) >= copies


def forks_are_only_added(starts: tuple[EpochStart, ...], new: EpochStart) -> tuple[EpochStart, ...]:
    return (*starts, new)


def takes_the_home_stores(heads: dict[str, Head], forks: tuple[EpochStart, ...], *, home: str, epoch: int) -> Any:
    length = real_valid_length(heads[home], forks)
    alignments = tuple(replication.align(region, head, forks, length, epoch) for region, head in heads.items())
    return replication.Choice(home, length, replication.cut(heads[home].epochs, length), alignments)


RULES_WITHOUT_A_GUARD: dict[str, dict[str, Any]] = {
    "a quorum of n − 2": {"fence_quorum": lambda stores: max(1, len(stores) - 2)},
    "forks are ignored": {"valid_length": ignores_forks},
    "two copies are acknowledged with one": {"acknowledged": any_copy_will_do},
    "one copy counts in any store": {"acknowledged": one_copy_anywhere},
    "stores that acknowledged alone need not be fenced": {"unfenced_sole_ackers": lambda sole_ackers, fenced: ()},
    "a fork drops none of the older ones": {"with_fork": forks_are_only_added},
    "a diverged tail is kept": {"align": keeps_everything},
    "the home store's history wins": {"choose": takes_the_home_stores},
}


def first_violation(seeds: int, **guards: bool) -> int | None:
    for seed in range(seeds):
        try:
            Model(seed, **guards).run()
        except Violation:
            return seed
    return None


@pytest.mark.parametrize("mutant", RULES_WITHOUT_A_GUARD)
def test_the_model_catches_a_rule_without_its_guard(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, rule in RULES_WITHOUT_A_GUARD[mutant].items():
        monkeypatch.setattr(replication, name, rule)
    assert first_violation(MUTANT_SEEDS) is not None


@pytest.mark.parametrize("guard", ["stores_check_epochs", "stand_in_is_recorded"])
def test_the_model_catches_a_shell_without_its_guard(guard: str) -> None:
    assert first_violation(MUTANT_SEEDS, **{guard: False}) is not None


# ---------------------------------------------------------------------------------------------------------- rule by rule


@pytest.mark.parametrize(("stores", "quorum"), [(1, 1), (2, 1), (3, 2), (4, 3), (5, 4)])
def test_the_fence_quorum_leaves_out_one_store_and_never_all(stores: int, quorum: int) -> None:
    assert replication.fence_quorum(REGIONS[:stores]) == quorum


@pytest.mark.parametrize("stores", [1, 2, 3, 4, 5])
def test_enough_stores_to_be_met_by_every_quorum_are_exactly_those_that_each_quorum_meets(stores: int) -> None:
    names = REGIONS[:stores]
    quorums = [set(quorum) for quorum in combinations(names, replication.fence_quorum(names))]
    for size in range(stores + 1):
        for having in combinations(names, size):
            assert replication.every_quorum_meets(names, having) == all(quorum & set(having) for quorum in quorums)


@given(st.integers(2, 5), st.data())
def test_a_fence_quorum_meets_every_two_stores(stores: int, data: st.DataObject) -> None:
    names = REGIONS[:stores]
    fenced = data.draw(st.sets(st.sampled_from(names)))
    if replication.quorum_lacks(names, fenced) is None:
        assert all(set(pair) & fenced for pair in combinations(names, 2))


def test_stores_outside_of_the_set_do_not_count_towards_the_quorum() -> None:
    lacks = replication.quorum_lacks(("a", "b", "c"), ("a", "x", "y"))
    assert lacks is not None
    assert "missing: b, c" in lacks
    assert replication.quorum_lacks(("a", "b", "c"), ("a", "c", "x")) is None


def test_stores_that_may_have_acknowledged_alone_are_named_when_not_fenced() -> None:
    assert replication.unfenced_sole_ackers(("b", "a"), {"c": 1}) == ("a", "b")
    assert replication.unfenced_sole_ackers(("b", "a"), ("a", "b", "c")) == ()


def test_every_seq_belongs_to_the_last_epoch_that_began_at_or_before_it() -> None:
    starts = (start(1, 1), start(4, 10), start(9, 11))
    assert [replication.owner(starts, seq) for seq in (0, 1, 9, 10, 11, 500)] == [0, 1, 1, 4, 9, 9]
    assert replication.owner((), 3) == 0


def test_a_new_fork_takes_away_what_began_there_or_later() -> None:
    recorded = (start(1, 1), start(2, 10), start(3, 20))
    assert replication.with_fork(recorded, start(4, 30)) == (*recorded, start(4, 30))
    assert replication.with_fork(recorded, start(4, 20)) == (start(1, 1), start(2, 10), start(4, 20))
    assert replication.with_fork(recorded, start(4, 5)) == (start(1, 1), start(4, 5))
    assert replication.with_fork(recorded, start(4, 1)) == (start(4, 1),)


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_an_epoch_that_is_not_new_cannot_be_recorded(epoch: int) -> None:
    with pytest.raises(ValueError, match="not greater than the recorded 3"):
        replication.with_fork((start(1, 1), start(3, 7)), start(epoch, 9))


@pytest.mark.parametrize(
    ("epochs", "seq", "forks", "valid"),
    [
        ((), 0, (), 0),
        ((), 0, ((1, 1),), 0),
        (((1, 1),), 9, ((1, 1),), 9),
        (((1, 1),), 12, ((1, 1), (2, 10)), 9),  # epoch 2 opened at 10: the tail of epoch 1 is no history
        (((1, 1),), 9, ((1, 1), (2, 10)), 9),  # it ends just before: nothing is contradicted
        (((1, 1), (2, 10)), 15, ((1, 1), (2, 10)), 15),
        (((1, 1), (2, 10)), 15, ((1, 1), (3, 10)), 9),  # epoch 3 opened where epoch 2 had
        (((1, 1), (2, 10)), 15, ((1, 1), (3, 6)), 5),
        (((1, 1), (2, 10)), 15, ((3, 1),), 0),
        (((2, 1),), 4, ((1, 1), (2, 3)), 0),  # says that epoch 2 owned from the start: another history altogether
        (((1, 1), (2, 5)), 8, ((1, 1),), 4),  # an epoch that etcd never recorded
        (((1, 1),), 5, (), 0),
    ],
)  # fmt: skip
def test_a_history_is_valid_as_far_as_it_contradicts_no_fork(
    epochs: tuple[tuple[int, int], ...], seq: int, forks: tuple[tuple[int, int], ...], valid: int
) -> None:
    head = Head("0", seq=seq, epochs=tuple(start(*one) for one in epochs))
    assert replication.valid_length(head, tuple(start(*one) for one in forks)) == valid


@pytest.mark.parametrize(
    ("bases", "gone"),
    [((1, 1), 0), ((10, 10), 0), ((11, 11), 1), ((11, 10), 0), ((30, 21), 2), ((99, 99), 2), ((), 0)],
)
def test_an_epoch_is_passed_when_no_store_keeps_or_follows_a_segment_of_it(bases: tuple[int, ...], gone: int) -> None:
    starts = (start(1, 1), start(3, 10), start(4, 20))
    assert replication.passed(starts, bases) == starts[:gone]


@given(data=st.data())
def test_what_was_passed_and_dropped_changes_no_judgement_of_a_store_that_is_past_it(data: st.DataObject) -> None:
    firsts = sorted(data.draw(st.sets(st.integers(2, 40), min_size=1, max_size=6)) | {1})
    forks = tuple(start(number, first) for number, first in enumerate(firsts, start=1))
    seq = data.draw(st.integers(firsts[-1], 60))
    base = data.draw(st.integers(1, seq + 1))
    at = data.draw(st.integers(base, seq + 1))  # where the store turns away, if it does: after its base
    mine = tuple(one for one in forks if one.first_seq < at)
    mine = (*mine, start(99, at)) if data.draw(st.booleans()) and at <= seq else mine
    head = Head("0", seq=seq, epochs=mine, base=base)
    expected = replication.valid_length(head, forks)
    for others in (1, 2):
        shorter = forks[len(replication.passed(forks, [base] * others)) :]
        for epochs in (mine, mine[len(replication.passed(mine, [base])) :]):
            assert replication.valid_length(replace(head, epochs=epochs), shorter) == expected
            assert replication.valid_length(replace(head, epochs=epochs), forks) == expected


def test_a_store_that_comes_back_with_segments_from_before_everything_that_is_recorded_keeps_nothing() -> None:
    forks = (start(7, 1000), start(9, 1200))
    for head in (
        Head("0", seq=1500, epochs=(start(3, 1),)),
        Head("0", seq=500, epochs=(start(3, 1),), base=200),
        Head("0", seq=1500, epochs=(start(3, 1), start(7, 1000)), base=900),
    ):
        assert replication.valid_length(head, forks) == head.base - 1
        tail = replication.align("x", head, forks, 2000, 9).salvage
        assert tail is not None
        assert (tail.first_seq, tail.last_seq, tail.epochs[0].first_seq) == (head.base, head.seq, head.base)
    assert replication.valid_length(Head("0"), forks) == 0


def test_too_many_forks_are_refused_in_one_sentence_and_half_of_them_warn() -> None:
    starts = tuple(start(number, number) for number in range(1, replication.FORKS_MAX + 1))
    with pytest.raises(Refused, match=r"5,000 forks are recorded.*epoch 6000 does not open"):
        replication.with_fork(starts, start(6000, 9000))
    assert len(replication.with_fork(starts[:-1], start(6000, 9000))) == replication.FORKS_MAX
    assert replication.crowded(replication.FORKS_MAX // 2)
    assert not replication.crowded(replication.FORKS_MAX // 2 - 1)


def test_a_dead_forks_longer_history_loses_against_a_shorter_valid_one() -> None:
    forks = (start(6, 1), start(7, 1_042))
    stale = Head("0", seq=5_000, chain="x", epochs=(start(6, 1),))
    young = Head("0", seq=1_045, chain="y", epochs=(start(6, 1), start(7, 1_042)))
    choice = replication.choose({"a": stale, "b": young}, forks, home="a", epoch=8)
    assert (choice.source, choice.length, choice.starts) == ("b", 1_045, young.epochs)
    assert choice.alignment("a") == replication.Alignment(
        "a", 1_041, Salvage(1_042, 5_000, (start(6, 1_042),), "x", by_epoch=8)
    )
    assert choice.alignment("b").salvage is None


def test_the_fork_rules_also_when_the_store_that_opened_the_epoch_is_gone() -> None:
    forks = (start(6, 1), start(7, 1_042))
    stale = Head("0", seq=5_000, epochs=(start(6, 1),))
    behind = Head("0", seq=1_000, epochs=(start(6, 1),))
    choice = replication.choose({"b": stale, "c": behind}, forks, home="c", epoch=8)
    assert (choice.source, choice.length) == ("b", 1_041)
    assert choice.alignment("b").keep == 1_041


def test_on_a_tie_the_home_store_is_the_source_and_otherwise_the_first_by_name() -> None:
    same = Head("0", seq=3, epochs=(start(1, 1),))
    heads = {"c": same, "a": same, "b": same}
    assert replication.choose(heads, (start(1, 1),), home="b", epoch=2).source == "b"
    assert replication.choose(heads, (start(1, 1),), home="z", epoch=2).source == "a"


def test_what_was_recovered_is_told_by_a_head_that_ends_exactly_there() -> None:
    forks = (start(6, 1), start(7, 11))
    stale = Head("0", seq=20, epochs=(start(6, 1),), received_at=90.0, records=200)
    exact = Head("0", seq=10, epochs=(start(6, 1),), received_at=50.0, records=100)
    heads = {"a": stale, "b": exact, "c": replace(exact, received_at=49.0)}
    choice = replication.choose(heads, forks, home="a", epoch=8)
    assert (choice.source, choice.length) == ("a", 10)
    assert replication.recovered(heads, choice, forks) == replace(exact, received_at=49.0)  # on a doubt the greater loss
    alone = {"a": stale}
    assert replication.recovered(alone, replication.choose(alone, forks, home="a", epoch=8), forks) == replace(
        stale, seq=10, received_at=0.0, records=0
    )


@pytest.mark.parametrize(
    ("head", "problem"),
    [
        (Head("0"), None),
        (Head("0", epoch=4), None),
        (Head("0", seq=9, epoch=4, epochs=(start(1, 1), start(4, 9))), None),
        (Head("0", seq=9, epoch=4), "names no epoch"),
        (Head("0", seq=9, epoch=4, epochs=(start(2, 5), start(1, 7))), "do not ascend"),
        (Head("0", seq=9, epoch=4, epochs=(start(1, 5), start(2, 5))), "do not ascend"),
        (Head("0", seq=9, epoch=4, epochs=(start(1, 7), start(2, 5))), "do not ascend"),
        (Head("0", seq=9, epoch=4, epochs=(start(1, 0),)), "begin at 0..0"),
        (Head("0", seq=9, epoch=4, epochs=(start(1, 1), start(2, 10))), "begin at 1..10"),
        (Head("0", seq=9, epoch=4, epochs=(start(1, 1), start(5, 9))), "epoch 5 wrote to it and it is fenced at 4"),
    ],
)
def test_a_head_that_no_writer_of_ours_can_have_written_is_told(head: Head, problem: str | None) -> None:
    found = replication.head_problem(head)
    assert (found is None) is (problem is None)
    assert problem is None or (found is not None and problem in found)


def test_a_choice_needs_a_store_and_knows_only_fenced_ones() -> None:
    with pytest.raises(ValueError, match="no store is fenced"):
        replication.choose({}, (), home="a", epoch=1)
    choice = replication.choose({"a": Head("0")}, (), home="a", epoch=1)
    assert (choice.length, choice.starts) == (0, ())
    with pytest.raises(LookupError, match="store b was not fenced"):
        choice.alignment("b")


def test_salvage_of_several_epochs_begins_where_the_cut_is() -> None:
    head = Head("0", seq=9, chain="z", epochs=(start(1, 1), start(2, 4), start(3, 8)))
    alignment = replication.align("a", head, (start(1, 1), start(4, 6)), 40, epoch=5)
    # epoch 2 was never recorded, so nothing of it is history
    assert alignment == replication.Alignment("a", 3, Salvage(4, 9, (start(2, 4), start(3, 8)), "z", 5))
    alignment = replication.align("a", head, (start(1, 1), start(2, 4), start(5, 6)), 40, epoch=5)
    assert alignment == replication.Alignment("a", 5, Salvage(6, 9, (start(2, 6), start(3, 8)), "z", 5))


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 2)), max_size=12), st.integers(0, 14))
def test_salvage_names_the_owner_of_every_segment_that_was_cut(entries: list[Entry], length: int) -> None:
    entries = sorted(entries)
    head = head_of(entries)
    alignment = replication.align("a", head, head.epochs, length, epoch=9)
    assert alignment.keep == min(length, len(entries))
    if alignment.salvage is None:
        assert alignment.keep == len(entries)
    else:
        seqs = range(alignment.salvage.first_seq, alignment.salvage.last_seq + 1)
        assert [replication.owner(alignment.salvage.epochs, seq) for seq in seqs] == [head.owner(seq) for seq in seqs]
        assert [*range(1, alignment.keep + 1), *seqs] == list(range(1, len(entries) + 1))


@pytest.mark.parametrize(
    ("copies", "committed", "sole_ackers", "expected"),
    [
        (1, "", "a", False),
        (1, "a", "a", True),
        (1, "b", "a", False),  # nobody would know that b has to be fenced
        (1, "b", "ab", True),
        (1, "bc", "a", True),  # a fence quorum meets every two
        (2, "a", "a", False),
        (2, "b", "b", False),
        (2, "bc", "a", True),
        (2, "ab", "a", True),
        (3, "ab", "ab", False),
        (3, "abc", "a", True),
    ],
)
def test_a_write_is_acknowledged_with_its_copies_and_never_with_fewer(
    copies: int, committed: str, sole_ackers: str, expected: bool
) -> None:
    assert replication.acknowledged(copies, list(committed), tuple(sole_ackers)) is expected
    assert replication.acknowledged(copies, list(committed * 2), tuple(sole_ackers)) is expected
