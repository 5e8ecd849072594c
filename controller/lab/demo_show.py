"""The report as a person reads it: a few short tables."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from controller.lab.demo_report import Report
from controller.lab.telling import Teller

WORST = 5
_NAMES = {
    "incident": "incident opened (detection)",
    "page": "people paged",
    "plan": "plan made",
    "approved": "two approvals",
    "execute": "order to go",
    "served": "target active and found through DNS from outside (RTO)",
    "resumed": "every agent resumed",
    "working": "every agent has a new acknowledged checkpoint",
}


def show_report(teller: Teller, made: Report, path: Path) -> None:
    """Prints it."""
    times = Table(
        "after the kill", "seconds", title=f"{made.source} -> {made.target}, {made.agents} agents", title_justify="left"
    )
    for name, words in _NAMES.items():
        if name in made.rto:
            times.add_row(words, f"{made.rto[name]:.1f}")
    times.add_row("  of this after the order to go", f"{made.rto['served_after_execute']:.1f}")
    for step, seconds in made.phases.items():
        times.add_row(f"  step {step}", f"{seconds:.2f}")
    times.add_row("after the thaw: old region protected standby", f"{made.rto['reprotected_after_thaw']:.1f}")
    teller.table(times)

    loss = Table("loss", "records", "seconds", title="Promised beside real", title_justify="left")
    unknown = " plus unknown" if made.promised["records_unknown"] else ""
    kind = "exact" if made.promised["exact"] else "upper bound"
    loss.add_row(
        f"promised before the approvals ({kind})", f"{made.promised['records']}{unknown}", f"{made.promised['seconds']:.2f}"
    )
    loss.add_row("real, from the agents' ledgers", str(made.real["records"]), f"{made.real['seconds']:.2f}")
    loss.add_row("real, acknowledged with copies >= 2", str(made.real["durable_lost"]), "")
    loss.add_row("salvaged in the old region", str(made.salvage["records"]), "")
    teller.table(loss)

    worst = sorted(made.outcomes, key=lambda outcome: -outcome["lost_records"])[:WORST]
    agents = Table("agent", "last acknowledged", "resumed from", "lost", title="Agents that lost most", title_justify="left")
    for outcome in worst:
        agents.add_row(outcome["agent"], outcome["last_acknowledged"], outcome["resumed"], str(outcome["lost_records"]))
    teller.table(agents)

    checks = Table("check", "", "measured", title="What must hold", title_justify="left")
    for check in made.checks:
        checks.add_row(check["name"], "yes" if check["ok"] else "NO", check["detail"], style="" if check["ok"] else "bold red")
    teller.table(checks)
    teller.say(f"report: {path}")
    teller.say("every check holds" if made.held else "NOT every check holds", "bold green" if made.held else "bold red")
