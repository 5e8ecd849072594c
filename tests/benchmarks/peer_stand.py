"""The peer's side: its environment, a stand-in for each of two regions, and what would be created there at AWS."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3

from controller.lab.aws import LAB_ENVIRONMENT, AwsStandIn, create_bucket
from tests.benchmarks.stand import ROOT, loaders

REQUIREMENTS = Path(__file__).with_name("peer-requirements.txt")
REGIONS = ("eu-west-1", "eu-central-1")
TABLE = "checkpoints"


def environment(folder: Path) -> Path:
    """The peer's Python, made once from the pinned list (uv, else pip). Raises CalledProcessError."""
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    home, stamp = folder / "venv", folder / "installed"
    python = home / "bin" / "python"
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    folder.mkdir(parents=True, exist_ok=True)
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
    by_uv = [uv, "pip", "install", "--quiet", "--python", python, "-r", REQUIREMENTS]
    if not uv.exists() or subprocess.run(by_uv, check=False).returncode != 0:  # uv does not read pip's configuration
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", REQUIREMENTS], check=True)
    stamp.write_text(wanted)
    return python


@dataclass(frozen=True, slots=True)
class PeerStand:
    """Two regions' stand-ins, ready for savers."""

    python: Path
    stand_ins: dict[str, AwsStandIn]

    def places(self, endpoints: dict[str, str] | None = None) -> list[dict[str, str]]:
        """What each saver is told. ``endpoints``: other addresses by region (a counting proxy)."""
        return [
            {
                "region": region,
                "table": TABLE,
                "bucket": f"peer-{region}",
                "endpoint": (endpoints or {}).get(region, stand_in.endpoint),
            }
            for region, stand_in in self.stand_ins.items()
        ]

    def pids(self) -> dict[str, list[int]]:
        return {"stores": [s.pid for s in self.stand_ins.values() if s.pid is not None]}

    def load(self, jobs: list[dict[str, Any]], endpoints: dict[str, str] | None = None) -> Any:
        """Processes of the peer's agents."""
        full = [{"places": self.places(endpoints), **job} for job in jobs]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "DR_"))}
        return loaders(
            [str(self.python), "-m", "tests.benchmarks.peer"], full, {**kept, **LAB_ENVIRONMENT, "PYTHONPATH": str(ROOT)}
        )


@contextlib.contextmanager
def peer_stand(python: Path) -> Iterator[PeerStand]:
    """Starts both stand-ins with empty state; ends them. From a thread that lives as long as they should."""
    with contextlib.ExitStack() as stack:
        found = {}
        for region in REGIONS:
            stand_in = stack.enter_context(AwsStandIn(aws_region=region))
            create_bucket(stand_in.endpoint, aws_region=region, bucket=f"peer-{region}")
            _create_table(stand_in.endpoint, region)
            found[region] = stand_in
        yield PeerStand(python, found)


def _create_table(endpoint: str, region: str) -> None:
    """Keys PK and SK, as the package's README says. Paid per request."""
    client: Any = boto3.client(
        "dynamodb", endpoint_url=endpoint, region_name=region, aws_access_key_id="lab", aws_secret_access_key="lab"
    )
    client.create_table(
        TableName=TABLE,
        AttributeDefinitions=[{"AttributeName": name, "AttributeType": "S"} for name in ("PK", "SK")],
        KeySchema=[{"AttributeName": "PK", "KeyType": "HASH"}, {"AttributeName": "SK", "KeyType": "RANGE"}],
        BillingMode="PAY_PER_REQUEST",
    )
