"""Child processes that can be stopped, continued, killed, and that cannot outlive their lab.

Three nets catch a child whose lab is gone, each for the case that the one before it misses:

1. the kernel kills it when its parent dies (``PR_SET_PDEATHSIG``), also when the parent was killed with SIGKILL;
2. every child is written to ``processes.jsonl`` with its start time, so that another process may kill it later without
   ever hitting an innocent process that got the same number;
3. every child carries the lab's random identity in its environment, which its own children inherit: a sweep of ``/proc``
   finds grandchildren and whatever was started between a fork and its line in the file.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from controller.errors import Misconfigured

IDENTITY = "DRLAB_IDENTITY"
"""Environment variable that marks every process of one lab."""

PR_SET_PDEATHSIG = 1

PrefixOf = Callable[[str], tuple[str, ...]]
"""Region -> what to put before a command so that it runs there ("" is the place of what belongs to no region)."""


def here(region: str) -> tuple[str, ...]:
    """All regions on this machine as it is."""
    return ()


LINE_CHARS = 400
"""Longest line of a log that is shown in an error."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What to start. ``region`` is "" for parts that belong to none; ``kind`` decides what ``kill`` does to it."""

    name: str
    kind: str
    region: str
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Started:
    """A process that was started. ``start_ticks`` (since boot) tells it from a later one with the same number."""

    name: str
    kind: str
    region: str
    pid: int
    start_ticks: int


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None when it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def is_stopped(pid: int) -> bool:
    """Whether the process is stopped by SIGSTOP."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat[stat.rindex(")") + 2] in ("T", "t")


def is_alive(process: Started) -> bool:
    """Whether this very process still runs (stopped counts as running)."""
    return start_ticks(process.pid) == process.start_ticks


def send(process: Started, number: signal.Signals) -> bool:
    """Signals this very process; False when it is gone. A ``pidfd`` closes the gap between the check and the signal."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:
        return False
    try:
        if start_ticks(process.pid) != process.start_ticks:
            return False
        signal.pidfd_send_signal(descriptor, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)


def _tie_to_parent(parent: int) -> Callable[[], None]:
    """What a child runs between fork and exec: die with its parent."""
    libc = ctypes.CDLL(None, use_errno=True)

    def tie() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return tie


def clean_environment() -> dict[str, str]:
    """Our environment without settings and credentials that the person who runs the lab may have for real systems."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DR_", "AWS_", "ETCD_", IDENTITY))}
    root = str(Path(__file__).resolve().parents[2])  # the children import this very package, installed or not
    path = os.pathsep.join(dict.fromkeys(part for part in (root, kept.get("PYTHONPATH", "")) if part))
    return {**kept, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


class Roster:
    """The file that lists every process of a lab, one JSON object a line, only ever added to."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, process: Started) -> None:
        """Writes one line at once."""
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(process)) + "\n")

    def read(self) -> tuple[Started, ...]:
        """Every process that was ever started; a line that a crash cut off is skipped (the sweep finds its process)."""
        try:
            lines = self._path.read_text().splitlines()
        except FileNotFoundError:
            return ()
        found = []
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):
                found.append(Started(**json.loads(line)))
        return tuple(found)


class Children:
    """The processes of one lab, as their parent sees them. For the main thread: a child dies with the *thread* that made it."""

    def __init__(self, state_dir: Path, identity: str) -> None:
        self._logs = state_dir / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._identity = identity
        self._roster = Roster(state_dir / "processes.jsonl")
        self._tie = _tie_to_parent(os.getpid())
        self._popens: dict[str, subprocess.Popen[bytes]] = {}
        self._started: dict[str, Started] = {}

    def start(self, spec: Spec) -> Started:
        """Starts it in a session of its own, output to its log. Raises Misconfigured when the program cannot be run."""
        environment = {**clean_environment(), **spec.environment, IDENTITY: self._identity}
        with (self._logs / f"{spec.name}.log").open("ab") as log:
            try:
                popen = subprocess.Popen(
                    spec.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=self._tie,  # noqa: PLW1509 - one system call; it takes no lock
                )
            except OSError as error:
                raise Misconfigured(f"cannot start {spec.name}: {error}", hint=f"is {spec.argv[0]} installed?") from error
        self._popens[spec.name] = popen
        return self._note(spec.name, spec.kind, spec.region, popen.pid)

    def adopt(self, name: str, kind: str, region: str, pid: int) -> Started:
        """Takes over a process that other code of this process started (and reaps)."""
        self._popens.pop(name, None)
        return self._note(name, kind, region, pid)

    def _note(self, name: str, kind: str, region: str, pid: int) -> Started:
        ticks = start_ticks(pid)
        started = Started(name, kind, region, pid, -1 if ticks is None else ticks)
        self._roster.add(started)
        self._started[name] = started
        return started

    def all(self) -> tuple[Started, ...]:
        """What was started last under each name."""
        return tuple(self._started.values())

    def exit_code(self, name: str) -> int | None:
        """None while it runs (or was never started). An adopted process that is gone has 1: its code is not ours to know."""
        popen = self._popens.get(name)
        if popen is not None:
            return popen.poll()
        started = self._started.get(name)
        return None if started is None or is_alive(started) else 1

    def state(self, process: Started) -> str:
        """``running``, ``stopped`` or ``exited N``."""
        code = self.exit_code(process.name)
        if code is not None:
            return f"exited {code}"
        return "stopped" if is_stopped(process.pid) else "running"

    def select(self, *, region: str | None = None, kinds: Iterable[str] | None = None) -> tuple[Started, ...]:
        """Living processes of a region and of some kinds; None = all."""
        wanted = None if kinds is None else set(kinds)
        return tuple(
            process
            for process in self._started.values()
            if (region is None or process.region == region)
            and (wanted is None or process.kind in wanted)
            and self.exit_code(process.name) is None
        )

    def signal(self, processes: Iterable[Started], number: signal.Signals) -> int:
        """Signals each; returns how many were there to be signalled."""
        return sum(send(process, number) for process in processes)

    def kill(self, processes: Iterable[Started]) -> int:
        """SIGKILL, also to what is stopped, and waits for the ends (milliseconds)."""
        victims = tuple(processes)
        count = self.signal(victims, signal.SIGKILL)
        until = time.monotonic() + 10.0
        for victim in victims:
            popen = self._popens.get(victim.name)
            if popen is not None and popen.pid == victim.pid:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    popen.wait(timeout=max(0.0, until - time.monotonic()))
            while is_alive(victim) and time.monotonic() < until:
                time.sleep(0.005)
        return count

    def log(self, name: str) -> Path:
        """Where the process writes."""
        return self._logs / f"{name}.log"


def tail(path: Path, lines: int = 12) -> str:
    """The last lines of a log, "" when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16384))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(line if len(line) <= LINE_CHARS else f"{line[:LINE_CHARS]}…" for line in text.splitlines()[-lines:])


def marked(identity: str) -> tuple[int, ...]:
    """Processes whose environment carries this lab's identity, but not the caller itself."""
    needle = f"{IDENTITY}={identity}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        if needle in environment.split(b"\0"):
            found.append(int(entry.name))
    return tuple(found)


def sweep(state_dir: Path, identity: str, *, keep: Sequence[int] = (), deadline_seconds: float = 10.0) -> tuple[str, ...]:
    """Kills every process of the lab that still runs, whoever its parent is now. Returns their names.

    ``keep``: processes to spare beside the caller. Repeats until a look finds
    none, because a process may fork while it is being killed.
    """
    names: list[str] = []
    spared = {os.getpid(), *keep}
    until = time.monotonic() + deadline_seconds
    while time.monotonic() < until:
        victims = [p for p in Roster(state_dir / "processes.jsonl").read() if is_alive(p) and p.pid not in spared]
        listed = {p.pid for p in victims} | spared
        for pid in marked(identity) if identity else ():
            ticks = start_ticks(pid)
            if pid not in listed and ticks is not None:
                victims.append(Started(f"pid {pid}", "unlisted", "", pid, ticks))
        if not victims:
            break
        names.extend(victim.name for victim in victims if send(victim, signal.SIGKILL))
        time.sleep(0.05)
    return tuple(dict.fromkeys(names))
