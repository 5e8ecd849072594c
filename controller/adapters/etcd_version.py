"""Which etcd servers may be trusted with authority. Pure: the caller decides what follows from the answer."""

from __future__ import annotations

import re

from controller.errors import Misconfigured

OLDEST_TRUSTWORTHY = (3, 5, 16)
"""Sources. 3.5.0 to 3.5.2: inconsistent data after a crash under load (etcd, "v3.5 data inconsistency", issue 13766).
Before 3.4.31 and 3.5.13: an old leader whose disk hangs revokes leases that are kept alive elsewhere (etcd issue 15247,
pull 17425 in CHANGELOG-3.5). 3.5.16 is the oldest release on which the disk-hang case was measured and showed neither false
keep-alives nor wrong revocations; 3.4 is out of support. No final release after it is known to break what we lean on."""

_VERSION = re.compile(r"v?(\d+)\.(\d+)\.(\d+)(?:[-+~].*)?")
_FINAL = re.compile(r"v?\d+\.\d+\.\d+(?:\+.*)?")


def parse_version(version: str) -> tuple[int, int, int]:
    """``"3.5.16"`` (also ``"v3.5.16"``, ``"3.6.0-rc.1"``) as numbers. Raises Misconfigured for anything else."""
    match = _VERSION.fullmatch(version.strip())
    if match is None:
        raise Misconfigured(
            f"etcd version {version!r} is not of the form major.minor.patch",
            hint="check that every coordinator endpoint is an etcd server: `etcdctl endpoint status`",
        )
    major, minor, patch = match.groups()
    return int(major), int(minor), int(patch)


def is_trustworthy(version: str) -> bool:
    """Whether production may use this server: a final release, ``OLDEST_TRUSTWORTHY`` or newer. Raises Misconfigured."""
    return parse_version(version) >= OLDEST_TRUSTWORTHY and _FINAL.fullmatch(version.strip()) is not None
