"""The fleet, seen from one controller: who beats, who runs what, what to hand out. Decisions are made in ``domain/fleet.py``.

Tasks and assignments are records in the stream, so a standby has them all. An assignment is handed out only *after* its record
is acknowledged; an attempt number whose write has an unknown outcome is never used again. So attempts rise across crashes,
restarts and promotions, and a record under an older one is refused (``check_attempt``).

Rights that an earlier holder granted are over before a new one may act (an agent's right never outlasts its holder's), so each
tenure begins with none outstanding: call ``activate`` when an epoch is opened and ``deactivate`` when the right is lost.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Protocol

from controller.domain import fleet
from controller.domain.fleet import Decision, FleetPolicy, HostSeen, Placement, Task
from controller.domain.model import (
    Ack,
    Assignment,
    Beat,
    BeatAnswer,
    Frame,
    IngestAnswer,
    Kind,
    Record,
)
from controller.errors import DrError, NotActive, Refused, Unavailable
from controller.ports import Clock
from controller.stream.delta import frame

RIGHT_MARGIN_SECONDS = 0.25
"""Added to every right that is granted, for clocks that do not run equally fast."""
RESUMED_LISTED = 200
"""Agents that the summary of a resumption names; all are in the stream."""
RESCAN_SECONDS = 30.0
"""How often all tasks and assignments are read anew: notes are hints, the view is the truth."""
FORGET_SECONDS = 900.0
"""A host that was silent for so long and has no agent is no longer listed."""
SETTLED = ("acknowledged", "duplicate")


class FleetView(Protocol):
    """What is needed of ``stream/view.py``."""

    def kinds(self, kind: str) -> Iterator[tuple[Record, bytes]]: ...
    def latest(self, agent: str, kind: str) -> tuple[Record, bytes] | None: ...
    def latest_record(self, agent: str, kind: str) -> Record | None: ...
    def restorable(self, agent: str) -> Record | None: ...
    def records(self, agent: str, limit: int, before: str | None) -> tuple[Record, ...]: ...


Submit = Callable[[Sequence[Frame]], Awaitable[IngestAnswer]]


@dataclass(slots=True)
class _Host:
    capacity: int
    heard_at: float
    right_until: float = -math.inf
    running: Mapping[str, int] = field(default_factory=dict)
    """What its last beat listed: agent → attempt."""


@dataclass(slots=True)
class _Agent:
    """An unfinished task and where it is."""

    spec: Mapping[str, object]
    floor: int = 0
    """Greatest attempt that may ever have been written."""
    attempt: int = 0
    host: str = ""
    """"" = no host has it."""
    right_until: float = -math.inf
    released: bool = False
    moving: bool = False
    resume_id: str | None = None
    held: bool = False


@dataclass(frozen=True, slots=True)
class TickReport:
    """What a tick did. ``page``: what people have to know, "" = nothing."""

    reason: str
    page: str
    moved: int
    waiting: int
    pool: tuple[str, ...]
    pool_missing: int


class FleetManager:
    """One per controller. ``submit`` writes records of the controller itself to the stream; ``right_seconds`` is how long this
    instance may still act, ``epoch`` and ``active_address`` are what beats are answered with. One event loop owns it."""

    def __init__(
        self,
        view: FleetView,
        submit: Submit,
        right_seconds: Callable[[], float],
        clock: Clock,
        *,
        epoch: Callable[[], int],
        active_address: Callable[[], str | None] = lambda: None,
        policy: FleetPolicy = FleetPolicy(),  # noqa: B008 - frozen
        hold_open_intents: bool = True,
        is_current: Callable[[str], bool] = lambda _agent: True,
    ) -> None:
        """``is_current``: whether the view has all that was acknowledged of an agent. One of which it does not is not handed
        out now: it would resume from something older."""
        self._view = view
        self._submit = submit
        self._right_seconds = right_seconds
        self._clock = clock
        self._epoch = epoch
        self._active_address = active_address
        self._policy = policy
        self._hold = hold_open_intents
        self._is_current = is_current
        self._hosts: dict[str, _Host] = {}
        self._agents: dict[str, _Agent] = {}
        self._attempts: dict[str, int] = {}
        self._dirty: set[str] = set()
        self._active_since: float | None = None
        self._tenure = -1
        self._paused = False
        self._scan_at = -math.inf
        self._rights_end = -math.inf
        self._assigning = asyncio.Lock()

    # ------------------------------------------------------------------------------------------------------- lifetime

    def activate(self, *, paused: bool = False) -> None:
        """An epoch was opened here, or goes on after a drain that was aborted. Reads tasks and assignments from the view.
        ``paused``: ticks move nobody before ``resume_all`` (a promotion is under way). Raises Unavailable, Corrupt."""
        if self._epoch() != self._tenure:
            self._agents.clear()
            self._attempts.clear()
            self._tenure = self._epoch()
        self._dirty.clear()
        self._scan()
        self._paused = paused
        self._active_since = self._clock.monotonic()

    def deactivate(self) -> None:
        """The right to act is lost or given up. Hosts stay known: they are the warm pool."""
        self._active_since = None

    @property
    def active(self) -> bool:
        """Whether assignments are handed out now."""
        return self._active_since is not None and self._right_seconds() > 0

    def rights_end(self) -> float:
        """Monotonic time at which the last right that was granted to any agent has certainly run out (-inf: none was)."""
        return self._rights_end

    def _require_active(self) -> float:
        """When this tenure began. Raises NotActive."""
        if self._active_since is None or self._right_seconds() <= 0:
            raise NotActive(
                "this controller does not assign agents now", hint="ask the active one", active=self._active_address()
            )
        return self._active_since

    # ---------------------------------------------------------------------------------------------------------- beats

    async def beat(self, beat: Beat) -> BeatAnswer:
        """A host's heartbeat. There is no await between hearing it and answering, so beats of one host are in order.
        Raises nothing."""
        now = self._clock.monotonic()
        host = self._hosts.setdefault(beat.host, _Host(beat.capacity, now))
        host.capacity, host.heard_at = beat.capacity, now
        host.running = {item.agent: item.attempt for item in beat.agents}
        if not self.active:
            return BeatAnswer(False, self._epoch(), 0.0, (), self._active_address())
        mine = sorted(name for name, agent in self._agents.items() if agent.host == beat.host and not agent.moving)
        running = [name for name in mine if host.running.get(name) == self._agents[name].attempt]
        others = [name for name in mine if host.running.get(name) != self._agents[name].attempt]
        room = max(0, beat.capacity - len(running))
        for name in others[room:]:
            self._agents[name].released = True
        told = [*running, *(name for name in others[:room] if self._is_current(name))]
        for name in told:
            agent = self._agents[name]
            agent.released = False
            if (agent.held or host.running.get(name) != agent.attempt) and self._is_current(name):
                self._prepare(name, agent)
        right = self._grant(host)
        for name in told:
            self._agents[name].right_until = host.right_until
        assignments = tuple(self._assignment(name) for name in sorted(told))
        return BeatAnswer(True, self._epoch(), right, assignments, self._active_address())

    def _assignment(self, name: str) -> Assignment:
        agent = self._agents[name]
        return Assignment(name, agent.attempt, agent.spec, agent.resume_id, agent.held)

    def _grant(self, host: _Host) -> float:
        right = max(0.0, self._right_seconds())
        if right > 0:
            host.right_until = max(host.right_until, self._clock.monotonic() + right + RIGHT_MARGIN_SECONDS)
            self._rights_end = max(self._rights_end, host.right_until)
        return right

    def granted(self, agents: Iterable[str], right_seconds: float) -> None:
        """An ingest answer gave ``right_seconds`` to whoever sent records of these agents: call it before the answer leaves,
        with the agents whose records passed ``check_attempt`` (a host's right is extended by those only).
        It counts as a sign of life of their hosts, and their agents are not moved before that right has passed."""
        now = self._clock.monotonic()
        until = now + max(0.0, right_seconds) + RIGHT_MARGIN_SECONDS
        self._rights_end = max(self._rights_end, until)
        for name in {self._agents[name].host for name in agents if name in self._agents}:
            host = self._hosts.get(name)
            if host is not None:
                host.heard_at = now
                host.right_until = max(host.right_until, until)

    def check_attempt(self, agent: str, attempt: int, kind: str = "") -> None:
        """For every record that comes from outside. Raises StaleAttempt (a FenceLost: the writer must stop) when another host
        was given the agent since, Refused for an attempt that was never given out and for kinds that only controllers write."""
        check_kind(kind)
        fleet.check_attempt(agent, attempt, self._attempts.get(agent, 0))

    # ---------------------------------------------------------------------------------------------------------- tasks

    async def create_task(self, agent: str, spec: Mapping[str, object]) -> IngestAnswer:
        """Writes the task's record; the next tick assigns it. The spec that is already there is a duplicate: a retry is safe.
        Raises NotActive, and what ``submit`` raises."""
        self._require_active()
        body = _json(spec)
        known = self._view.latest(agent, Kind.TASK)
        previous = "" if known is None else known[0].id
        if known is not None and known[1] == body:
            record_id, parent = known[0].id, known[0].parent
        else:
            record_id, parent = f"task-{sha256(previous.encode() + b'/' + body).hexdigest()[:32]}", previous or None
        answer = await self._submit([frame(agent, record_id, Kind.TASK, body, parent=parent, created_at=self._clock.wall())])
        self._dirty.add(agent)
        return answer

    def observe(self, records: Iterable[Record]) -> None:
        """Records that were committed: a hint which agents to read anew."""
        for record in records:
            if record.kind in (Kind.TASK, Kind.ASSIGNMENT):
                self._dirty.add(record.agent)

    def _scan(self) -> None:
        specs = {record.agent: _document(body) for record, body in self._view.kinds(Kind.TASK)}
        given = {record.agent: (record, _document(body)) for record, body in self._view.kinds(Kind.ASSIGNMENT)}
        for name in set(specs) | set(given) | set(self._agents):
            self._learn(name, specs.get(name), given.get(name))
        self._scan_at = self._clock.monotonic() + RESCAN_SECONDS

    def _refresh(self) -> None:
        """Agents of which something was noted since, and now and then all."""
        if self._clock.monotonic() >= self._scan_at:
            self._dirty.clear()
            self._scan()
            return
        while self._dirty:
            name = next(iter(self._dirty))
            task, given = self._view.latest(name, Kind.TASK), self._view.latest(name, Kind.ASSIGNMENT)
            spec = None if task is None else _document(task[1])
            self._learn(name, spec, None if given is None else (given[0], _document(given[1])))
            self._dirty.discard(name)

    def _learn(
        self,
        name: str,
        spec: Mapping[str, object] | None,
        given: tuple[Record, Mapping[str, object]] | None,
    ) -> None:
        """Brings what the view says together with what is known here. Attempts only rise."""
        if given is not None:
            self._attempts[name] = max(self._attempts.get(name, 0), given[0].attempt)
        if spec is None or spec.get("done") is True:
            self._agents.pop(name, None)
            return
        agent = self._agents.setdefault(name, _Agent(spec))
        agent.spec = spec
        agent.floor = max(agent.floor, self._attempts.get(name, 0))
        if given is not None and given[0].attempt > agent.attempt and not agent.moving and given[0].attempt == agent.floor:
            agent.attempt, agent.host = given[0].attempt, str(given[1].get("host", ""))
            agent.released = False

    # ----------------------------------------------------------------------------------------------------- assigning

    async def tick(self) -> TickReport:
        """Moves agents of failed hosts and gives new tasks to hosts, at most ``pace`` of them. Raises NotActive; Unavailable
        when the view or the stream cannot be used (nothing is handed out then)."""
        since = self._require_active()
        if self._paused:
            return TickReport("agents wait for the step `resume` of a promotion", "", 0, 0, (), 0)
        async with self._assigning:
            self._refresh()
            decision = self._decide(self._policy, unknown_heard_at=since)
            moved = await self._carry_out(decision)
        self._forget()
        return TickReport(
            decision.reason, decision.page, len(moved), len(decision.waiting), decision.pool, decision.pool_missing
        )

    async def resume_all(self, pace_per_second: float) -> Mapping[str, object]:
        """Step ``resume`` of a promotion: every unfinished task to a host that beats here, at most so many a second; hosts that
        never beat here count as failed. Returns counts and, for the first agents, what they resume from; tasks without a host
        wait for ``tick``. Idempotent. Raises NotActive, Unavailable (call again)."""
        pace = max(1, math.ceil(pace_per_second / 4))
        resumed: dict[str, Mapping[str, object]] = {}
        held = assigned = 0
        self._require_active()
        self._paused = False
        async with self._assigning:
            self._scan()
            while True:
                self._require_active()
                decision = self._decide(replace(self._policy, pace=pace), unknown_heard_at=-math.inf)
                if not decision.moves:
                    break
                began = self._clock.monotonic()
                moved = await self._carry_out(decision)
                if not moved:
                    raise Unavailable("no assignment could be written to the stream", hint="it is tried again")
                for name in moved:
                    agent = self._agents[name]
                    assigned += 1
                    held += agent.held
                    if len(resumed) < RESUMED_LISTED or agent.held:
                        resumed[name] = {
                            "host": agent.host,
                            "attempt": agent.attempt,
                            "resume_id": agent.resume_id,
                            "held": agent.held,
                        }
                await self._clock.sleep(max(0.0, len(decision.moves) / pace_per_second - (self._clock.monotonic() - began)))
        waiting = len(decision.waiting)
        listed = sorted(resumed, key=lambda name: (not resumed[name]["held"], name))[:RESUMED_LISTED]
        return {
            "assigned": assigned,
            "held": held,
            "waiting": waiting,
            "unfinished": len(self._agents),
            "page": decision.page,
            "agents": {name: resumed[name] for name in listed},
        }

    def _decide(self, policy: FleetPolicy, *, unknown_heard_at: float) -> Decision:
        """Hosts that have agents and were not heard of in this tenure are given the time that a beat may take."""
        now = self._clock.monotonic()
        hosts = {name: HostSeen(name, host.capacity, host.heard_at) for name, host in self._hosts.items()}
        placements: list[Placement] = []
        for name, agent in self._agents.items():
            if not agent.host:
                continue
            known = self._hosts.get(agent.host)
            if (known is None or known.heard_at < unknown_heard_at) and unknown_heard_at > -math.inf:
                hosts[agent.host] = HostSeen(agent.host, 0, unknown_heard_at)  # keeps what it has, gets nothing new
            right = max(agent.right_until, known.right_until if known else -math.inf)
            placements.append(Placement(name, agent.host, agent.attempt, right, agent.released))
        tasks = (Task(name, agent.floor) for name, agent in self._agents.items())
        return fleet.assign(tasks, hosts.values(), placements, policy, now)

    async def _carry_out(self, decision: Decision) -> list[str]:
        """Writes the assignments, then adopts those that were acknowledged. Whatever else happens, the old host is not told to
        run them again and the numbers are used up."""
        if not decision.moves:
            return []
        now = self._clock.wall()
        frames = []
        for move in decision.moves:
            agent = self._agents[move.agent]
            agent.moving, agent.host, agent.floor = True, "", move.attempt
            self._attempts[move.agent] = move.attempt
            body = _json({"host": move.host, "attempt": move.attempt, "assigned_at": now})
            record_id = f"assignment-{move.attempt:012d}"
            frames.append(frame(move.agent, record_id, Kind.ASSIGNMENT, body, created_at=now, attempt=move.attempt))
        acks: Sequence[Ack] = ()
        try:
            acks = (await self._submit(frames)).acks
        finally:
            settled = {ack.agent for ack in acks if ack.status in SETTLED}
            adopted = []
            for move in decision.moves:
                current = self._agents.get(move.agent)
                if current is None:
                    continue
                current.moving = False
                if move.agent in settled:
                    current.host, current.attempt = move.host, move.attempt
                    current.right_until, current.released = -math.inf, False
                    adopted.append(move.agent)
        for name in adopted:
            self._prepare(name, self._agents[name])
        return adopted

    def _prepare(self, name: str, agent: _Agent) -> None:
        """Where the agent resumes, and whether it has to wait for a decision about effects of unknown outcome. An agent that
        has a state which cannot be restored is held too: it never begins again from nothing."""
        try:
            resume = self._view.restorable(name)
            newest = self._view.latest_record(name, Kind.CHECKPOINT)
            agent.resume_id = None if resume is None else resume.id
            lost = resume is None and newest is not None
            agent.held = lost or (self._hold and bool(self.open_intents(name)))
        except DrError:
            agent.resume_id, agent.held = None, True  # unknown is not "no": look again at the next beat

    def open_intents(self, agent: str) -> tuple[str, ...]:
        """Ids of the agent's effects of unknown outcome. Raises Unavailable, Corrupt."""
        if self._view.latest_record(agent, Kind.INTENDED) is None:
            return ()
        seen: list[Record] = []
        before: str | None = None
        while True:
            page = self._view.records(agent, 1000, before)
            seen.extend(record for record in page if record.kind in (Kind.INTENDED, Kind.DONE))
            if len(page) < 1000:
                return fleet.open_intents(seen)
            before = page[-1].id

    # -------------------------------------------------------------------------------------------------------- showing

    def host_of(self, agent: str) -> tuple[str, int]:
        """(host, attempt) for the status page; ("", 0) when nobody has it."""
        known = self._agents.get(agent)
        return ("", self._attempts.get(agent, 0)) if known is None else (known.host, known.attempt)

    def hosts(self) -> Mapping[str, fleet.Health]:
        """Health of every host that beats here."""
        now = self._clock.monotonic()
        return {name: fleet.health(now - host.heard_at, self._policy) for name, host in sorted(self._hosts.items())}

    def held(self) -> tuple[str, ...]:
        """Agents that wait for a decision about their open effects."""
        return tuple(sorted(name for name, agent in self._agents.items() if agent.held))

    def _forget(self) -> None:
        used = {agent.host for agent in self._agents.values()}
        limit = self._clock.monotonic() - FORGET_SECONDS
        for name in [name for name, host in self._hosts.items() if host.heard_at < limit and name not in used]:
            del self._hosts[name]


def check_kind(kind: str) -> None:
    """Raises Refused for kinds that only controllers write."""
    if kind in (Kind.ASSIGNMENT, Kind.OPENING, Kind.CANARY):
        raise Refused(f"records of kind {kind!r} are written by controllers only", hint="use another kind")


def _json(document: Mapping[str, object]) -> bytes:
    """Equal documents give equal bytes. Raises Refused for what is no JSON."""
    try:
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, UnicodeEncodeError) as error:
        raise Refused(f"the document is not JSON: {error}", hint="use strings, finite numbers, lists and objects") from error


def _document(body: bytes) -> Mapping[str, object]:
    """A body that is no JSON object reads as an empty one: it came from an agent and must not stop the fleet."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
