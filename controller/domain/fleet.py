"""Which host runs which agent. Pure: what was seen goes in, one decision with its reason comes out.

Two rules carry everything:

- *Never two hosts for one agent.* An agent is moved only when its host certainly may not run it any more: the last right that
  the host was granted has passed, or the host itself said that it does not run the agent and was not told to since.
- *Attempts only rise.* Every move takes a number greater than any that may ever have been written for the agent, also when
  the outcome of that write is unknown. Records that come with a smaller number are refused (``check_attempt``).

Within these rules: failed-over agents before new ones, the least loaded healthy host first, a reserve of empty hosts for the
next failure, at most ``pace`` moves per decision. Times are seconds on one monotonic clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from controller.domain.model import Kind, Record
from controller.errors import FenceLost, Refused

INTENT = "intent"
"""``meta`` key of a ``done`` record that names the ``intended`` record which it closes, when ``parent`` names another."""


class StaleAttempt(FenceLost):
    """A record came under an attempt number that is not the agent's present one: another host runs this agent."""

    code = "stale_attempt"


class Health(StrEnum):
    """A host as its beats show it. Degraded hosts keep their agents and get no new ones."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class FleetPolicy:
    """``pool``: empty healthy hosts that new tasks leave free. ``pace``: most moves in one decision."""

    beat_seconds: float = 1.0
    misses_degraded: int = 2
    misses_failed: int = 4
    pool: int = 1
    pace: int = 200


@dataclass(frozen=True, slots=True)
class HostSeen:
    """A host: how many agents it takes, and when it was last heard of."""

    host: str
    capacity: int
    heard_at: float


@dataclass(frozen=True, slots=True)
class Task:
    """An unfinished task. ``last_attempt``: greatest number that may ever have been written for it, 0 = never assigned."""

    agent: str
    last_attempt: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """``host`` may run ``agent`` until ``right_until``. ``released``: it said that it does not and was not told to since."""

    agent: str
    host: str
    attempt: int
    right_until: float = -math.inf
    released: bool = False


@dataclass(frozen=True, slots=True)
class Move:
    """``agent`` shall run on ``host`` under the number ``attempt``."""

    agent: str
    host: str
    attempt: int
    previous: str | None = None


@dataclass(frozen=True, slots=True)
class Waiting:
    """A task that no host runs, and why."""

    agent: str
    why: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now. ``page``: what to wake people with, "" = nothing. ``pool_missing``: hosts that the reserve lacks."""

    moves: tuple[Move, ...]
    waiting: tuple[Waiting, ...]
    pool: tuple[str, ...]
    pool_missing: int
    page: str
    reason: str


def health(age_seconds: float, policy: FleetPolicy) -> Health:
    """From the age of the last beat. An age that is not a number is a failure."""
    if not age_seconds < policy.misses_failed * policy.beat_seconds:
        return Health.FAILED
    if age_seconds >= policy.misses_degraded * policy.beat_seconds:
        return Health.DEGRADED
    return Health.HEALTHY


def open_intents(records: Iterable[Record]) -> tuple[str, ...]:
    """Ids of effects of unknown outcome: ``intended`` without a ``done`` that names it (as parent, or in meta), sorted."""
    intended: set[str] = set()
    done: set[str] = set()
    for record in records:
        if record.kind == Kind.INTENDED:
            intended.add(record.id)
        elif record.kind == Kind.DONE:
            done.add(record.meta.get(INTENT) or record.parent or "")
    return tuple(sorted(intended - done))


def check_attempt(agent: str, attempt: int, present: int) -> None:
    """``present``: the greatest number given out for this agent, 0 = none (an agent that nobody assigned writes with 0).
    Raises StaleAttempt (the writer must stop) or Refused (a number that was never given out)."""
    if attempt == present:
        return
    if attempt < present:
        raise StaleAttempt(
            f"agent {agent!a} wrote under attempt {attempt}; attempt {present} is the present one",
            hint="stop this copy of the agent: it was given to another host",
        )
    raise Refused(
        f"agent {agent!a} wrote under attempt {attempt}; the greatest given out is {present}",
        hint="write with the attempt of the assignment, or with 0 when there is none",
    )


def check_overtaken(agent: str, by: str, seen_epoch: int, newest_by: str, newest_epoch: int) -> None:
    """For a writer that says who it is (``by``) and which epoch it knew when it wrote last. It may have slept since. If another
    one went on with the agent in a later epoch (``newest_*``: of the agent's newest record), this one is behind and must stop.
    Where nobody did, it goes on, in whatever epoch. Raises StaleAttempt."""
    if newest_epoch > seen_epoch and newest_by != by:
        raise StaleAttempt(
            f"agent {agent!a} went on without this process: somebody else wrote in epoch {newest_epoch}, it knew {seen_epoch}",
            hint="stop this run; read the newest state, and begin again from there",
        )


# -------------------------------------------------------------------------------------------------------------- assigning


class _Room:
    """Loads of the healthy hosts, while a decision is being made."""

    def __init__(self, hosts: Iterable[HostSeen], loads: Mapping[str, int], pool: int) -> None:
        self._capacity = {host.host: host.capacity for host in hosts}
        self._load = {host: loads.get(host, 0) for host in self._capacity}
        empty = sorted(host for host, load in self._load.items() if load == 0 and self._capacity[host] > 0)
        self._reserve = set(empty[-pool:]) if pool > 0 else set()

    def take(self, *, urgent: bool) -> str | None:
        """The least loaded host with room. New tasks use the reserve only when nothing else has room: work before reserve."""
        free = [host for host, load in self._load.items() if load < self._capacity[host]]
        if not urgent:
            free = [host for host in free if host not in self._reserve] or free
        if not free:
            return None
        host = min(free, key=lambda name: (self._load[name] / self._capacity[name], -self._capacity[name], name))
        self._load[host] += 1
        return host

    def empty(self) -> tuple[str, ...]:
        return tuple(sorted(host for host, load in self._load.items() if load == 0 and self._capacity[host] > 0))


def _newest(placements: Iterable[Placement]) -> dict[str, Placement]:
    """One placement per agent: the one with the greatest attempt; among equals (which never should be) the longest right."""
    chosen: dict[str, Placement] = {}
    for placement in placements:
        other = chosen.get(placement.agent)
        key = (placement.attempt, not placement.released, placement.right_until, placement.host)
        if other is None or key > (other.attempt, not other.released, other.right_until, other.host):
            chosen[placement.agent] = placement
    return chosen


def _stays(placement: Placement | None, healths: Mapping[str, Health], now: float) -> str | None:
    """None: the agent may be given to a host. "": it stays where it is. Else: why it has to wait."""
    if placement is None or placement.released:
        return None
    if healths.get(placement.host, Health.FAILED) is not Health.FAILED:
        return ""
    if now >= placement.right_until:
        return None
    return f"host {placement.host} is silent and may act for up to {placement.right_until - now:.1f} s more"


def assign(
    tasks: Iterable[Task],
    hosts: Iterable[HostSeen],
    current: Iterable[Placement],
    policy: FleetPolicy,
    now: float,
) -> Decision:
    """Gives every unfinished task that no host may run to a host. Does not depend on the order of its arguments' elements.

    Hosts that are not in ``hosts`` count as failed. Raises nothing."""
    seen = {host.host: host for host in hosts}
    healths = {name: health(now - host.heard_at, policy) for name, host in seen.items()}
    placed = _newest(current)
    todo: list[Task] = []
    waiting: list[Waiting] = []
    loads: dict[str, int] = {}
    for task in tasks:
        placement = placed.get(task.agent)
        stays = _stays(placement, healths, now)
        if stays is None:
            todo.append(task)
        elif stays:
            waiting.append(Waiting(task.agent, stays))
        elif placement is not None:
            loads[placement.host] = loads.get(placement.host, 0) + 1
    room = _Room((host for name, host in seen.items() if healths[name] is Health.HEALTHY), loads, policy.pool)
    healthy = sum(1 for value in healths.values() if value is Health.HEALTHY)
    moves, left = _fill(todo, placed, room, policy.pace, healthy)
    waiting.extend(left)
    pool = room.empty()[-policy.pool :] if policy.pool > 0 else ()
    starved = [item for item in left if item.why != _PACED]
    return Decision(
        moves=tuple(moves),
        waiting=tuple(sorted(waiting, key=lambda item: item.agent)),
        pool=pool,
        pool_missing=max(0, policy.pool - len(pool)),
        page=f"{len(starved)} agents wait: {starved[0].why}" if starved else "",
        reason=_sentence(len(moves), waiting, healths),
    )


_PACED = "its turn comes with the next tick"


def _fill(
    todo: Iterable[Task], placed: Mapping[str, Placement], room: _Room, pace: int, healthy: int
) -> tuple[list[Move], list[Waiting]]:
    """Failed-over agents first: they had work going on."""
    moves: list[Move] = []
    left: list[Waiting] = []
    last = {task.agent: max(task.last_attempt, placed[task.agent].attempt if task.agent in placed else 0) for task in todo}
    for agent in sorted(last, key=lambda name: (last[name] == 0, name)):
        if len(moves) >= pace:
            left.append(Waiting(agent, _PACED))
            continue
        host = room.take(urgent=last[agent] > 0)
        if host is None:
            why = "every healthy host is full" if healthy else "no host is healthy"
            left.append(Waiting(agent, why))
            continue
        previous = placed[agent].host if agent in placed else None
        moves.append(Move(agent, host, last[agent] + 1, previous))
    return moves, left


def _sentence(moves: int, waiting: Iterable[Waiting], healths: Mapping[str, Health]) -> str:
    failed = sorted(name for name, value in healths.items() if value is Health.FAILED)
    count = len(list(waiting))
    text = f"{moves} agents assigned, {count} wait, {len(healths) - len(failed)} of {len(healths)} hosts answer"
    return f"{text}; silent: {', '.join(failed[:5])}" if failed else text
