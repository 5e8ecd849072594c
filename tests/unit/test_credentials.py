"""What stands in the status about certificates: that they end soon, that they have ended, that somebody runs without."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from controller.adapters.memory.pager import MemoryPager
from controller.lab.certificates import Authority
from controller.lab.virtual_time import VirtualClock
from controller.runtime.credentials import OPEN_DOOR, Credentials, CredentialWatch
from controller.settings import Settings


def settings(**changes: Any) -> Settings:
    """A lab's; not checked by rules, as files come and go here."""
    base: dict[str, Any] = {
        "group": "fleet",
        "environment": "lab",
        "region": "one",
        "instance": "a",
        "state_dir": "state",
        "etcd": {"endpoints": ["https://127.0.0.1:2379"]},
        "regions": {
            name: {"bucket": f"b-{name}", "table": name, "addresses": ["127.0.0.1"], "controllers": [f"https://{name}:1"]}
            for name in ("one", "two")
        },
        "traffic": {"zone_id": "Z1", "name": "agents.dr.example."},
        "dns": {"servers": ["127.0.0.1:53"]},
        "approvals": {"allowed_signers": "allowed_signers"},
    }
    return Settings.model_validate({**base, **changes})


class Board:
    """What is warned of now."""

    def __init__(self) -> None:
        self.warnings: dict[str, str] = {}

    def warn(self, about: str, sentence: str) -> None:
        self.warnings[about] = sentence


async def test_a_certificate_that_ends_within_two_weeks_is_told_with_its_setting_and_day(tmp_path: Path) -> None:
    signer, now = Authority(tmp_path), datetime.now(UTC)
    etcd = signer.issue("etcd", ends=now + timedelta(days=13))
    api = signer.issue("api", ends=now + timedelta(days=15))
    board = Board()
    given = settings(
        etcd={"endpoints": ["https://127.0.0.1:2379"], "cert_file": etcd.cert_file, "key_file": etcd.key_file},
        api={"cert_file": api.cert_file, "key_file": api.key_file, "ca_file": signer.cert_file},
    )
    watch = CredentialWatch(given, Credentials(given), At(now), board.warn, MemoryPager())
    await watch.look()
    told = board.warnings["certificates"]
    assert "etcd.cert_file" in told
    assert f"{now + timedelta(days=13):%Y-%m-%d}" in told
    assert "api." not in told
    assert board.warnings["network"] == ""


async def test_a_certificate_that_has_ended_or_vanished_is_told_once_and_as_what_it_is(tmp_path: Path) -> None:
    signer, now = Authority(tmp_path), datetime.now(UTC)
    pair = signer.issue("etcd", ends=now + timedelta(days=1))
    board = Board()
    given = settings(
        etcd={"endpoints": ["https://127.0.0.1:2379"], "cert_file": pair.cert_file, "key_file": pair.key_file},
        environment="production",
        api={"insecure_private_network": True},
    )
    watch = CredentialWatch(given, Credentials(given), At(now + timedelta(days=2)), board.warn, MemoryPager())
    await watch.look()
    assert board.warnings["certificates"].count("etcd.cert_file") == 1
    assert "expired" in board.warnings["certificates"]
    assert board.warnings["network"] == OPEN_DOOR
    pair.cert_file.unlink()
    await CredentialWatch(given, Credentials(given), At(now), board.warn, MemoryPager()).look()
    assert "cannot be read" in board.warnings["certificates"]


class At(VirtualClock):
    """A clock that stands at a given moment."""

    def __init__(self, moment: datetime) -> None:
        self._moment = moment

    def monotonic(self) -> float:
        return 0.0

    def wall(self) -> float:
        return self._moment.timestamp()
