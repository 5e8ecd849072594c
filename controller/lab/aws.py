"""AWS on one machine: ministack processes that can be killed, frozen and thawed, and what Terraform would create in them.

One process per region and one for Route 53. ministack keeps DynamoDB tables apart by region but shares S3 between the
regions of a process (a bucket's name is global, as in AWS), and, above all, a region that cannot be killed alone is no
region. State is in memory: ``kill`` followed by ``start`` is a region that lost everything, ``freeze`` and ``thaw`` is an
outage. With a ``journal`` a killed stand-in comes back with all that it has acknowledged.

All functions here are synchronous (they prepare a lab; nothing of the controller imports them). Stand-ins do not verify
signatures: the credentials below are made up, and give nobody anything.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from controller.errors import Misconfigured, Unavailable

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient
    from mypy_boto3_route53 import Route53Client
    from mypy_boto3_s3 import S3Client

LAB_ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "lab", "AWS_SECRET_ACCESS_KEY": "lab", "AWS_EC2_METADATA_DISABLED": "true"}
"""Put into the environment of every process that talks to a stand-in."""

_POLL_SECONDS = 0.05


class AwsStandIn:
    """One ministack process. Start it from a thread that lives as long as it should (Linux ties it to the thread that
    started it).
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        aws_region: str = "us-east-1",
        log: Path | None = None,
        prefix: Sequence[str] = (),
        journal: Path | None = None,
    ) -> None:
        """``prefix``: a program that becomes the command, somewhere else (``nsenter``). ``journal``: see ``aws_journal``."""
        self._journal = journal
        self._prefix = prefix
        self.host = host
        self.port = port
        self.aws_region = aws_region
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def endpoint(self) -> str:
        """URL for all services. Known after the first ``start``; a restart keeps the port."""
        return f"http://{self.host}:{self.port}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, timeout_seconds: float = 60.0) -> None:
        """Starts with empty state, or that of its journal, and waits until it answers. Raises Unavailable (with the end of its
        log), Misconfigured."""
        if self.running():
            return
        if not self.host.startswith("127."):
            raise Misconfigured(f"stand-in host is {self.host!r}: loopback only", hint="use an address in 127.0.0.0/8")
        self._folder = tempfile.TemporaryDirectory(prefix="dr-lab-aws-")
        log_path = self._log or Path(self._folder.name) / "ministack.log"
        read_fd, write_fd = os.pipe()
        try:
            with log_path.open("ab") as log:
                self._process = subprocess.Popen(
                    [
                        *self._prefix,
                        sys.executable,
                        "-m",
                        "controller.lab.aws_serve",
                        self.host,
                        str(self.port),
                        str(write_fd),
                        str(os.getpid()),
                        *([str(self._journal)] if self._journal else []),
                    ],
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(write_fd,),
                    start_new_session=True,
                )
        finally:
            os.close(write_fd)
        try:
            self.port = self._announced_port(read_fd, timeout_seconds)
            self.wait_ready(timeout_seconds)
        except Unavailable as error:
            tail = log_path.read_bytes()[-2000:].decode(errors="replace")
            self.kill()
            raise Unavailable(f"{error.message}; its log ends with:\n{tail}", hint=error.hint) from error
        finally:
            os.close(read_fd)

    def wait_ready(self, timeout_seconds: float = 60.0) -> None:
        """Until it answers its health check. Raises Unavailable."""
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            if self._healthy():
                return
            if not self.running():
                raise Unavailable(f"ministack at {self.endpoint} has ended", hint="look at its log")
            time.sleep(_POLL_SECONDS)
        raise Unavailable(f"ministack at {self.endpoint} did not answer in {timeout_seconds} s", hint="look at its log")

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.endpoint}/_ministack/health", timeout=2.0) as answer:  # noqa: S310 - our own URL
                return bool(answer.status == 200)
        except OSError:  # of which URLError is one
            return False

    def kill(self) -> None:
        """SIGKILL to its process group. Without a journal its state is gone. Not running is fine."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait(timeout=30)
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def freeze(self) -> None:
        """SIGSTOP: connections are accepted by the kernel, nobody answers. The honest outage of a store."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT: it goes on with all its state, and with the requests that piled up."""
        self._signal(signal.SIGCONT)

    def __enter__(self) -> AwsStandIn:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _environment(self) -> dict[str, str]:
        assert self._folder is not None
        # The child imports this very package, also when it is not installed; nothing else of our AWS settings may reach it.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MINISTACK_", "DR_"))}
        root = str(Path(__file__).resolve().parents[2])
        return kept | LAB_ENVIRONMENT | {
            "PYTHONPATH": os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p),
            "MINISTACK_REGION": self.aws_region,
            "SERVICES": "s3,dynamodb,route53,sts,kms",
            "LOG_LEVEL": "WARNING",
            "PERSIST_STATE": "0",
            "S3_PERSIST": "0",
            "STATE_DIR": f"{self._folder.name}/state",
            "S3_DATA_DIR": f"{self._folder.name}/s3",
            "TMPDIR": self._folder.name,
            # These would listen on fixed ports and all interfaces.
            "SFTP_ENABLED": "0",
            "IOT_MTLS_ENABLED": "0",
            "DOCKER_HOST": f"unix://{self._folder.name}/no-docker.sock",
        }  # fmt: skip

    def _announced_port(self, read_fd: int, timeout_seconds: float) -> int:
        readable, _, _ = select.select([read_fd], [], [], timeout_seconds)
        text = os.read(read_fd, 16) if readable else b""
        if not text.strip().isdigit():
            raise Unavailable(f"ministack on {self.host} did not start", hint="is the lab extra installed, and the port free?")
        return int(text)


# ---------------------------------------------------------------------------------------------------------- provisioning


def provision_region(endpoint: str, *, aws_region: str, bucket: str, table: str) -> None:
    """Bucket and table of one region, as the Terraform module makes them. What exists already is left as it is."""
    create_bucket(endpoint, aws_region=aws_region, bucket=bucket)
    create_table(endpoint, aws_region=aws_region, table=table)


def create_bucket(endpoint: str, *, aws_region: str, bucket: str) -> None:
    """A private, versioned, encrypted bucket. Versioning keeps what a wrong DELETE would take; no lifecycle rule touches
    segments.
    """
    s3: S3Client = _client("s3", endpoint, aws_region)
    place: Any = {} if aws_region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": aws_region}}
    with _existing("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
        s3.create_bucket(Bucket=bucket, **place)
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    s3.put_bucket_encryption(
        Bucket=bucket,
        ServerSideEncryptionConfiguration={"Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}]},
    )
    s3.put_public_access_block(
        Bucket=bucket,
        PublicAccessBlockConfiguration={
            "BlockPublicAcls": True,
            "IgnorePublicAcls": True,
            "BlockPublicPolicy": True,
            "RestrictPublicBuckets": True,
        },
    )


def create_table(endpoint: str, *, aws_region: str, table: str) -> None:
    """Keys ``pk`` and ``sk`` (strings), paid per request, with point-in-time recovery."""
    dynamodb: DynamoDBClient = _client("dynamodb", endpoint, aws_region)
    with _existing("ResourceInUseException"):
        dynamodb.create_table(
            TableName=table,
            AttributeDefinitions=[
                {"AttributeName": "pk", "AttributeType": "S"},
                {"AttributeName": "sk", "AttributeType": "S"},
            ],
            KeySchema=[{"AttributeName": "pk", "KeyType": "HASH"}, {"AttributeName": "sk", "KeyType": "RANGE"}],
            BillingMode="PAY_PER_REQUEST",
        )
    dynamodb.get_waiter("table_exists").wait(TableName=table, WaiterConfig={"Delay": 1, "MaxAttempts": 30})
    dynamodb.update_continuous_backups(TableName=table, PointInTimeRecoverySpecification={"PointInTimeRecoveryEnabled": True})


def provision_zone(
    endpoint: str,
    zone_name: str,
    name: str,
    addresses: Mapping[str, Sequence[str]],
    weights: Mapping[str, int],
    epoch: int,
    ttl: int,
) -> str:
    """A hosted zone with one weighted A record set per region (``SetIdentifier`` = region) and the TXT fence record.

    ``ttl`` in seconds. Returns the zone's id without ``/hostedzone/``. Each call makes a zone of its own, as Route 53 does.
    Raises Misconfigured when the regions of ``addresses`` and ``weights`` differ, or no weight would be left.
    """
    if set(addresses) != set(weights) or not any(weights.values()) or not all(addresses.values()):
        raise Misconfigured(
            f"zone {zone_name}: addresses for {sorted(addresses)}, weights {dict(weights)}",
            hint="give every region addresses and a weight, at least one of them not zero",
        )
    zone, fqdn = zone_name.rstrip(".") + ".", name.rstrip(".") + "."
    route53: Route53Client = _client("route53", endpoint, "us-east-1")
    created = route53.create_hosted_zone(Name=zone, CallerReference=f"{zone}{time.time_ns()}")
    zone_id = created["HostedZone"]["Id"].removeprefix("/hostedzone/")
    records: list[Any] = [
        {
            "Name": fqdn,
            "Type": "A",
            "SetIdentifier": region,
            "Weight": weights[region],
            "TTL": ttl,
            "ResourceRecords": [{"Value": address} for address in addresses[region]],
        }
        for region in sorted(addresses)
    ]
    records.append({"Name": f"_dr-epoch.{fqdn}", "Type": "TXT", "TTL": ttl, "ResourceRecords": [{"Value": f'"{epoch}"'}]})
    route53.change_resource_record_sets(
        HostedZoneId=zone_id, ChangeBatch={"Changes": [{"Action": "CREATE", "ResourceRecordSet": record} for record in records]}
    )
    return zone_id


def _client(service: str, endpoint: str, aws_region: str) -> Any:
    # botocore's retries are fine here: provisioning is idempotent and nothing races with it.
    config = Config(
        connect_timeout=5,
        read_timeout=20,
        retries={"mode": "standard", "total_max_attempts": 3},
        s3={"addressing_style": "path"},
    )
    session: Any = boto3.session.Session()  # one per call: boto3's default session is not made for threads
    return session.client(
        service,
        endpoint_url=endpoint,
        region_name=aws_region,
        aws_access_key_id=LAB_ENVIRONMENT["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=LAB_ENVIRONMENT["AWS_SECRET_ACCESS_KEY"],
        config=config,
    )


class _existing(contextlib.AbstractContextManager[None]):  # noqa: N801 - reads as a statement: with _existing(code)
    """Passes over a ClientError whose code says that the thing is there already."""

    def __init__(self, *codes: str) -> None:
        self._codes = codes

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        return isinstance(error, ClientError) and str(dict(error.response.get("Error", {})).get("Code")) in self._codes
