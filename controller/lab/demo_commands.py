"""The commands of ``runbooks/region-failover.md``, once: the demo runs them, a test compares the runbook with them."""

from __future__ import annotations

import shlex

TEMPLATES = {
    "status": "status",
    "lag": "lag",
    "incidents": "incidents",
    "plan": "plan failover --to {region} --reason {reason} --requester {name}",
    "approve": "approve {plan} --key {key} --principal {name} --confirm {region}",
    "promote": "promote {plan} --execute --confirm {region} --wait --requester {name}",
    "kill": "lab kill {region}",
    "thaw": "lab thaw {region}",
}


def command(which: str, /, **values: str) -> tuple[str, ...]:
    """The words of a command. A value stays one word whatever is in it. Raises KeyError for a value that is missing."""
    return tuple(word.format(**values) for word in shlex.split(TEMPLATES[which]))


def line(name: str) -> str:
    """The command as the runbook has it: what is to be filled in stands in capitals."""
    return f"drctl {TEMPLATES[name].format(region='REGION', reason='WHY', name='NAME', plan='PLAN', key='KEY')}"
