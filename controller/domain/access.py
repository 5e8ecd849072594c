"""Who calls, and what a caller may do. Pure: a caller and a wish in, yes or no out.

Four roles, each with what it needs and nothing else. Moving the fleet is none of them: that takes signed approvals
(``domain/approval.py``), which no token and no certificate replaces.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class CallerRole(StrEnum):
    """What a caller is to the group."""

    AGENT = "agent"
    """An agent, or a host that runs some: its own agents' records, its own beats."""
    OPERATOR = "operator"
    """Plans, promotions, restores, repairs, and looking at everything."""
    VIEWER = "viewer"
    """Status, plans, audit. No agent's state."""
    PEER = "peer"
    """Another controller of the group."""


class Permit(StrEnum):
    """What a route asks for."""

    STATUS = "look at the status"
    READ = "read agents' records"
    WRITE = "write agents' records"
    BEAT = "report for a host"
    TASK = "give agents tasks"
    OPERATE = "plan, promote, restore and repair"
    PEER = "speak as a controller"


PERMITS: dict[CallerRole, frozenset[Permit]] = {
    CallerRole.AGENT: frozenset({Permit.READ, Permit.WRITE, Permit.BEAT, Permit.TASK}),
    CallerRole.OPERATOR: frozenset({Permit.STATUS, Permit.READ, Permit.TASK, Permit.OPERATE}),
    CallerRole.VIEWER: frozenset({Permit.STATUS}),
    CallerRole.PEER: frozenset({Permit.PEER}),
}


@dataclass(frozen=True, slots=True)
class Names:
    """Some names: each as it is, or a beginning followed by ``*``. Compared letter by letter, as names are stored."""

    exact: frozenset[str] = frozenset()
    prefixes: tuple[str, ...] = ()

    @classmethod
    def of(cls, patterns: Iterable[str]) -> Names:
        """``("agent-1", "team-a/*")``; ``*`` alone is every name."""
        given = tuple(patterns)
        prefixes = tuple(sorted({pattern[:-1] for pattern in given if pattern.endswith("*")}))
        return cls(frozenset(pattern for pattern in given if not pattern.endswith("*")), prefixes)

    def holds(self, name: str) -> bool:
        """Whether ``name`` is one of them."""
        return name in self.exact or name.startswith(self.prefixes)

    def holds_all(self, prefix: str) -> bool:
        """Whether every name that begins with ``prefix`` is one of them."""
        return prefix.startswith(self.prefixes)


ALL = Names(prefixes=("",))


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who has shown who they are. ``person``: under which name they would approve; it stands in plans and audit.

    ``role`` None: nobody is asked who they are here (a lab, or a network that is said to be private); every permit is given.
    """

    name: str
    role: CallerRole | None
    person: str = ""
    agents: Names = ALL
    hosts: Names = ALL

    def may(self, permit: Permit) -> bool:
        """Whether the role has it."""
        return self.role is None or permit in PERMITS[self.role]

    def may_touch(self, agent: str) -> bool:
        """Whether the agent's records are the caller's to read or write. Operators read all; who may what else: ``may``."""
        return self.role is not CallerRole.AGENT or self.agents.holds(agent)

    def acts_as(self, declared: str) -> str:
        """Who stands in plans and audit: the one that was shown; what callers say of themselves only where nobody is asked."""
        return declared if self.role is None else self.person or self.name


ANYBODY = Caller("", None)
"""Every caller, where nobody is asked."""
