"""Documents in etcd that somebody edited by hand, or that another version wrote: read, or Corrupt; and nobody acts on them.

What decides who may act (authority, forks, holder) stops everybody while it cannot be read; everything else must not.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.domain.approval import Approval
from controller.domain.model import Authority, Forks, Holder, Member, StreamReport
from controller.domain.promotion import PlanRecord
from controller.errors import ApprovalRequired, Corrupt, DrError
from controller.lab.virtual_time import run_virtual
from controller.runtime.documents import decode
from controller.runtime.service import AuditEntry, Incident, JournalEntry, PlanRequest
from tests.fuzz.examples import examples
from tests.simulation.bounds import progress
from tests.simulation.checkers import check_all
from tests.simulation.world import HOME, PEOPLE, TARGET, THIRD, World, make_keys

KINDS = [Authority, Forks, Holder, Member, StreamReport, PlanRecord, Approval, JournalEntry, AuditEntry, Incident]
HOSTILE: list[Any] = [None, "", "x", -1, 0, 2**70, 1e308, True, [], {}, [[[]]], {"a": {"b": []}}, "\x00\u202e", "a" * 5000]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(KINDS), JSON)
def test_any_json_is_a_document_or_corrupt(kind: type[Any], value: Any) -> None:
    said = "somewhere"
    try:
        decode(kind, json.dumps(value).encode(), where="somewhere")
    except Corrupt as error:
        said = error.message
    assert "somewhere" in said, "it must be said which document"


@given(st.sampled_from(KINDS), st.binary(max_size=60), st.integers(0, 5000))
def test_any_bytes_and_any_depth_are_corrupt(kind: type[Any], noise: bytes, depth: int) -> None:
    for data in (b"[" + noise, b"[" * depth, b'{"a":' * depth):
        with pytest.raises(Corrupt):
            decode(kind, data)
    with contextlib.suppress(Corrupt):  # `{}` is a document of some kinds
        decode(kind, b"{" + noise + b"}")


def bent(document: bytes, rng: random.Random) -> bytes:
    """One leaf, or one whole branch, replaced, renamed or removed; sometimes the document is no JSON at all."""
    if rng.random() < 0.15:
        return rng.choice([b"", b"{", b"null", b"\xff\xfe", document[: len(document) // 2], document + document])
    value = json.loads(document)
    node, keys = value, []
    while isinstance(node, dict | list) and node:
        keys = [node, rng.choice(list(node) if isinstance(node, dict) else range(len(node)))]
        node = keys[0][keys[1]]
        if rng.random() < 0.3:
            break
    if not keys:
        return b"[]"
    parent, key = keys
    if isinstance(parent, dict) and rng.random() < 0.3:
        parent["renamed"] = parent.pop(key)
    else:
        parent[key] = rng.choice([*HOSTILE, node + 1 if isinstance(node, int) else "other"])
    return json.dumps(value).encode()


@pytest.fixture(scope="module")
def keys_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_keys(tmp_path_factory.mktemp("keys"))


def edit(world: World, key: str, value: bytes) -> None:
    """As ``etcdctl put`` does, lease kept; nobody's compare-and-set survives it."""
    item = world.cluster._items[key]
    world.cluster.revision += 1
    world.cluster._items[key] = replace(item, value=value, mod_revision=world.cluster.revision)


def prefixes(world: World) -> tuple[str, ...]:
    keys = world.keys
    return (keys.members, keys.reports, keys.plans, keys.approvals(""), keys.incidents)


@pytest.mark.parametrize("seed", range(examples(5)))
def test_documents_edited_by_hand_end_no_controller_and_let_nobody_act_who_may_not(keys_dir: Path, seed: int) -> None:
    """Members, reports, plans, approvals, incidents. Put right again, the group serves as before."""

    async def story() -> None:
        rng = random.Random(seed)
        world = World(keys_dir, seed=seed)
        await world.served(agents=2, seconds=1.0)
        document = await world.propose("switchover", TARGET)
        for who in PEOPLE[:2]:
            await world.approve(world.standby(TARGET), document, who)
        before = dict(world.cluster._items)
        editable = sorted(key for key in before if key.startswith(prefixes(world)) and before[key].value[:1] == b"{")
        for key in rng.sample(editable, 3):
            edit(world, key, bent(before[key].value, rng))
        acts: list[Callable[[Any], Coroutine[Any, Any, object]]] = [
            lambda one: one.execute(document.record.plan.id, "oncall", TARGET),
            lambda one: one.status(),
            lambda one: one.plans(),
            lambda one: one.plan(document.record.plan.id),
            lambda one: one.incidents(True),
            lambda one: one.members(),
            lambda one: one.create_plan(PlanRequest("failover", TARGET, "oncall", "because")),
        ]
        for act in acts:
            instance = world.someone(rng.choice([HOME, TARGET]))
            with contextlib.suppress(DrError):
                await world.ask(instance, act(instance.controller))
        await world.wait(10.0)  # fails when a controller ended, or when two could act
        for key in editable:
            if key in world.cluster._items and world.cluster._items[key].mod_revision > before[key].mod_revision:
                edit(world, key, before[key].value)
        await progress(world, 60.0)
        check_all(world)

    run_virtual(story(), limit_seconds=600)


async def approved(world: World) -> str:
    """A switchover that two people have approved and nobody has ordered."""
    await world.served(agents=2, seconds=1.0)
    document = await world.propose("switchover", TARGET)
    for who in PEOPLE[:2]:
        await world.approve(world.standby(TARGET), document, who)
    return document.record.plan.id


@pytest.mark.parametrize(
    ("path", "value"),
    [("target", THIRD), ("approvals_required", 0), ("requester", "somebody"), ("expires_at", 9e9), ("break_glass", True)],
)
def test_a_plan_that_was_edited_after_people_signed_never_runs(keys_dir: Path, path: str, value: object) -> None:
    async def story() -> None:
        world = World(keys_dir)
        plan = await approved(world)
        key = world.keys.plan(plan)
        document = json.loads(world.cluster._items[key].value)
        assert document["plan"][path] != value
        document["plan"][path] = value
        document["execute_requested_by"] = "oncall"
        edit(world, key, json.dumps(document).encode())
        with pytest.raises(Corrupt, match="does not give its digest"):
            await world.standby(TARGET).execute(plan, "oncall", TARGET)
        await world.wait(15.0)
        assert world.active_in(HOME)
        assert (await world.authority()).barrier is None

    run_virtual(story(), limit_seconds=300)


@pytest.mark.parametrize("forgery", ["another name", "a later expiry", "another decision", "another key", "no signature"])
def test_an_approval_that_somebody_put_into_etcd_does_not_count(keys_dir: Path, forgery: str) -> None:
    async def story() -> None:
        world = World(keys_dir)
        plan = await approved(world)
        prefix = world.keys.approvals(plan)
        first, second = sorted(key for key in world.cluster._items if key.startswith(prefix))
        approval = json.loads(world.cluster._items[first].value)
        approval |= {
            "another name": {"principal": PEOPLE[2]},
            "a later expiry": {"expires_at": approval["expires_at"] + 60},
            "another decision": {"decision": "refuse"},
            "another key": {"fingerprint": "SHA256:" + "A" * 43},
            "no signature": {"signature": ""},
        }[forgery]
        edit(world, second, json.dumps(approval).encode())
        with pytest.raises(ApprovalRequired):
            await world.standby(TARGET).execute(plan, "oncall", TARGET)
        seen = await world.standby(TARGET).plan(plan)
        assert seen.missing_approvals == 1
        assert [row.valid for row in seen.approvals] == [True, False]
        assert seen.approvals[1].why
        await world.wait(6.0)
        assert world.active_in(HOME)

    run_virtual(story(), limit_seconds=300)
