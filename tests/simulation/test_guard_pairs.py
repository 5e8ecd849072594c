"""Guards that back each other: without either one nothing is broken, without both a checker notices.

That is defence in depth, and it is how a guard can rot unseen: somebody removes the one, and later somebody the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from controller.adapters import head_rules
from controller.domain.model import Fence, Head
from controller.errors import FenceLost
from controller.ports import Compare
from controller.runtime import tenure
from controller.runtime.tenure import Tenure
from tests.simulation.test_guards import (
    CarelessWriter,
    Case,
    Patch,
    Story,
    a_commit_arrives_after_the_fence,
    an_authorization_arrives_a_promotion_too_late,
    judge,
    patched,
    the_right_ends_while_commits_are_under_way,
)
from tests.simulation.world import World

Mutation = Callable[[Patch, World], None]


async def etcd_comes_back_old_while_every_store_answers(world: World) -> None:
    """Nobody has confirmed a recovery: nobody may act."""
    await world.found()
    world.start_all()
    await world.until(lambda: len(world.actives()) == 1, 20, "one active controller")
    snapshot = world.cluster.snapshot()
    world.fleet(4)
    for _ in range(2):
        await world.wait(3.0)
        active = world.actives()[0]
        await world.kill(active.region, active.name)
        await world.until(lambda: bool(world.actives()), 30, "the neighbour serving")
        world.start(active.region, active.name)
    await world.wait(3.0)
    for instance in list(world.instances.values()):
        await world.kill(instance.region, instance.name)
    world.cluster.restore(snapshot)
    world.history.restored = True
    world.start_all()
    await world.wait(20.0)


def without(*removed: str) -> Mutation:
    """A store that compares the epoch and the writer of its head, but for what is removed."""

    def ours(head: Head, fence: Fence) -> None:
        if "epoch" not in removed and head.epoch > fence.epoch:
            raise FenceLost("another epoch", epoch=head.epoch)
        if "writer" not in removed and head.writer != fence.writer:
            raise FenceLost("another writer", epoch=head.epoch)

    return patched((head_rules, "_ours", ours))


def late(kept: Callable[[Compare], bool]) -> Mutation:
    """The transaction that arrives late compares only this."""

    def mutate(patch: Patch, world: World) -> None:
        world.late_conditions = kept

    return mutate


def both(*mutations: Mutation) -> Mutation:
    def mutate(patch: Patch, world: World) -> None:
        for mutation in mutations:
            mutation(patch, world)

    return mutate


@dataclass(frozen=True)
class Pair:
    """Two guards: each removed alone, and together."""

    name: str
    story: Story
    first: Mutation
    second: Mutation
    together: Mutation
    checker: str


WRITER_LOOKS = patched(("controller.runtime.active.StreamWriter", "", CarelessWriter))
INGEST_LOOKS = patched((Tenure, "remaining_seconds", lambda self: 1.0))
FORGOT = patched(
    ("controller.runtime.opening.etcd_forgot", "", lambda *_: None),
    ("controller.runtime.duty.etcd_forgot", "", lambda *_: None),
)


def no_floor(patch: Patch, world: World) -> None:
    original = tenure.may_acquire
    patch.setattr(tenure, "may_acquire", lambda authority, holder, region, floor: original(authority, holder, region, 0))


PAIRS = (
    Pair(
        "the writer's look at the right, and ingest's",
        the_right_ends_while_commits_are_under_way,
        WRITER_LOOKS,
        INGEST_LOOKS,
        both(WRITER_LOOKS, INGEST_LOOKS),
        "acks-within-right",
    ),
    Pair(
        "a head's epoch, and its writer",
        a_commit_arrives_after_the_fence,
        without("epoch"),
        without("writer"),
        without("epoch", "writer"),
        "stores-fenced",
    ),
    Pair(
        "the guard key of the authorising transaction, and its pins on plan, authority and holder",
        an_authorization_arrives_a_promotion_too_late,
        late(lambda compare: "/guards/" not in compare.key),
        late(lambda compare: "/guards/" in compare.key or "/approvals/" in compare.key),
        late(lambda compare: "/approvals/" in compare.key),
        "people-approved",
    ),
    Pair(
        "the floor of epochs, and forks that etcd forgot",
        etcd_comes_back_old_while_every_store_answers,
        no_floor,
        FORGOT,
        both(no_floor, FORGOT),
        "nothing-lost",
    ),
)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_two_guards_back_each_other_and_both_are_needed(pair: Pair, keys_dir: Path) -> None:
    for alone in (pair.first, pair.second):
        with pytest.MonkeyPatch.context() as patch:
            found, _ = judge(keys_dir, Case(pair.name, pair.story, alone, pair.checker), patch)
        assert found == {}, "one of them alone was not enough: it is a case of its own"
    with pytest.MonkeyPatch.context() as patch:
        found, ended = judge(keys_dir, Case(pair.name, pair.story, pair.together, pair.checker), patch)
    assert pair.checker in found, f"without both nothing was noticed: {found or ended!r}"


def test_the_table_in_the_readme_lists_every_pair() -> None:
    text = (Path(__file__).parent / "README.md").read_text()
    for pair in PAIRS:
        assert pair.name in text, pair.name
