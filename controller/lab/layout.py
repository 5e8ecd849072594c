"""Which file is where in a lab's state directory (``.lab`` by default)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEFAULT_STATE_DIR = Path(".lab")


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths below the state directory."""

    root: Path

    @property
    def lock(self) -> Path:
        """Held by the lab's process for as long as it lives."""
        return self.root / "lock"

    @property
    def note(self) -> Path:
        """Who the lab's process is."""
        return self.root / "lab.json"

    @property
    def socket(self) -> Path:
        return self.root / "lab.sock"

    @property
    def wan_socket(self) -> Path:
        return self.root / "wan.sock"

    @property
    def wan_config(self) -> Path:
        return self.root / "config" / "wan.json"

    @property
    def roster(self) -> Path:
        """Every process that was started."""
        return self.root / "processes.jsonl"

    @property
    def pages(self) -> Path:
        """What the webhook receiver got, one JSON object a line."""
        return self.root / "pages.jsonl"

    @property
    def etcd(self) -> Path:
        return self.root / "etcd"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def ledgers(self) -> Path:
        """What the agents say of themselves, one file per host."""
        return self.root / "ledgers"

    @property
    def report(self) -> Path:
        """The demo's report. It outlives the lab."""
        return self.root / "report.json"

    def key(self, name: str) -> Path:
        """Private key of one of the lab's people."""
        return self.root / "keys" / name

    @property
    def directories(self) -> tuple[Path, ...]:
        """What must exist before the start."""
        return tuple(self.root / name for name in ("config", "data", "etcd", "keys", "ledgers", "logs", "tls", "tokens"))

    @property
    def disposable(self) -> tuple[Path, ...]:
        """What a new lab clears away: nothing but what a lab wrote."""
        files = (self.roster, self.pages, self.socket, self.wan_socket, self.root / "drctl.toml", self.root / "allowed_signers")
        return (*self.directories, *files, self.root / "access.json")
