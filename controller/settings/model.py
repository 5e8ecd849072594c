"""Every setting, with its meaning, unit and default. One class per table of the TOML file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from controller.settings import values
from controller.settings.values import Count, CountOrZero, LongSeconds, Rate, Seconds, SecondsOrZero, WholeSeconds

ENV_PREFIX = "DR_"
MIB = 1024 * 1024

LOCAL: dict[str, Any] = {"local": True}
"""Marks a setting that may differ between the controllers of a group: it is left out of the fingerprint."""


class Section(BaseModel):
    """A table of the settings. Unknown keys are refused; values never appear in an exception by themselves."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class EtcdSettings(Section):
    """The cluster that holds authority, leases, plans, approvals and the audit."""

    endpoints: Annotated[list[values.EtcdEndpoint], AfterValidator(values.no_duplicates)] = Field(
        min_length=1, description="client URLs of the members of one cluster; the nearest first", json_schema_extra=LOCAL
    )
    prefix: values.EtcdPrefix = Field("/dr", description="all keys of all groups lie below this path")
    ttl_seconds: WholeSeconds = Field(10, le=300, description="time to live of the holder's lease, in whole seconds")
    margin_seconds: Seconds = Field(1.0, description="the holder stops acting this long before its lease can end")
    tick_seconds: Seconds = Field(1.0, description="time between two rounds of the control loop, and so between heartbeats")
    call_timeout_seconds: Seconds = Field(0.5, description="deadline of each call to etcd", json_schema_extra=LOCAL)
    election_timeout_seconds: Seconds = Field(1.0, description="the cluster's --election-timeout; it bounds the TTL from below")
    failsafe: bool = Field(
        False,
        description="go on past the lease while etcd is unreachable for every region; then acknowledge what two stores have",
    )
    ca_file: values.FilePath | None = Field(None, description="PEM: authority that signed the members", json_schema_extra=LOCAL)
    cert_file: values.FilePath | None = Field(None, description="PEM: this controller's certificate", json_schema_extra=LOCAL)
    key_file: values.FilePath | None = Field(None, description="PEM: its private key, not encrypted", json_schema_extra=LOCAL)
    username: str | None = Field(None, description="etcd user, when the cluster wants one", json_schema_extra=LOCAL)
    password: SecretStr | None = Field(None, description="its password; better in DR_ETCD__PASSWORD", json_schema_extra=LOCAL)


class RegionSettings(Section):
    """One region: its passive store, its addresses, its controllers."""

    s3_endpoint: values.Url | None = Field(None, description="other endpoint than AWS's own", json_schema_extra=LOCAL)
    dynamodb_endpoint: values.Url | None = Field(None, description="other endpoint than AWS's own", json_schema_extra=LOCAL)
    kms_endpoint: values.Url | None = Field(None, description="other endpoint than AWS's own", json_schema_extra=LOCAL)
    bucket: values.Bucket = Field(description="S3 bucket of this region's copy")
    table: values.Table = Field(description="DynamoDB table of this region's heads and catalogue")
    aws_region: values.AwsRegionName = Field(
        "", validate_default=False, description="its region in AWS; NAME itself when left out"
    )
    addresses: Annotated[list[values.IPv4], AfterValidator(values.no_duplicates)] = Field(
        min_length=1, max_length=100, description="IPv4 addresses that DNS answers while this region is active"
    )
    controllers: Annotated[list[values.Url], AfterValidator(values.no_duplicates)] = Field(
        min_length=1, description="base URLs of this region's controllers, for agents and drctl"
    )
    priority: CountOrZero = Field(100, description="order in which regions are proposed as targets: the smallest first")
    kms_key: values.KmsKey | None = Field(
        None, description="symmetric KMS key of this region (ARN, id or alias); with one in each region sealed objects open"
    )
    former_kms_keys: Annotated[list[values.KmsKey], AfterValidator(values.no_duplicates)] = Field(
        default_factory=list, max_length=8, description="keys that kms_key came after, as long as objects are sealed for them"
    )


class StreamSettings(Section):
    """Segments and how they travel."""

    streams: Count = Field(
        1,
        le=64,
        description="streams that agents are spread over, shared out among a region's instances; fixed for the group's life",
    )
    prefix: values.ObjectPrefix = Field("dr", description="object keys of all groups begin with this path")
    copies: Count = Field(1, description="region stores that must hold a record before it is acknowledged")
    flush_seconds: Seconds = Field(
        0.02,
        le=10,
        description="time between two segments; none when idle, up to four times as long (to 0.1 s) when the store is busy",
    )
    segment_max_bytes: Count = Field(4 * MIB, le=512 * MIB, description="a segment closes at this size")
    segment_max_records: Count = Field(2000, le=100_000, description="a segment closes at this number of records")
    queue_max_bytes: Count = Field(64 * MIB, description="records that wait, in bytes; more are refused, explicitly")
    warm_max_bytes: CountOrZero = Field(
        128 * MIB,
        description="newest bodies that are held in memory, in bytes; the others lie in the view's file. 0 = all of them do",
        json_schema_extra=LOCAL,
    )
    body_max_bytes: Count = Field(64 * MIB, description="the largest body of one record, decoded")
    follow_seconds: Seconds = Field(0.2, description="a standby asks its region's store for news this often")
    canary_seconds: Seconds = Field(5.0, description="time between two canary records")
    pipeline_depth: Count = Field(32, le=1024, description="segments on their way to one region at a time")
    brownout_seconds: Seconds = Field(5.0, description="a home store that fails for this long counts as browned out")
    ack_timeout_seconds: Seconds = Field(10.0, description="a write that cannot reach its copies in this time fails")
    snapshot_seconds: Seconds = Field(
        300.0, description="time between two index snapshots; a standby that starts without its view reads the newest"
    )
    retention_seconds: LongSeconds = Field(
        7 * 86400, description="any point in time can be restored so far back; newest states are kept for ever"
    )


class IngestSettings(Section):
    """What agents may send to one holder, and how fast. Rates are per second and stream; 0 = no limit."""

    request_max_records: Count = Field(65_535, le=65_535, description="records of one request")
    in_flight_max_bytes: Count = Field(
        256 * MIB, description="request bodies that are being received or answered, in bytes; more wait outside"
    )
    records_per_second: values.RateOrZero = Field(0.0, description="records of all agents")
    bytes_per_second: values.RateOrZero = Field(0.0, description="payload bytes of all agents, as they travel")
    agent_records_per_second: values.RateOrZero = Field(0.0, description="records of one agent")
    agent_bytes_per_second: values.RateOrZero = Field(0.0, description="payload bytes of one agent, as they travel")
    burst_seconds: Seconds = Field(2.0, le=3600, description="so many seconds' worth of a rate may come at once")


class RpoSettings(Section):
    """How much may be lost."""

    seconds: Seconds = Field(5.0, description="recovery point objective: acknowledged work that the loss of a region may cost")
    policy: Literal["alert", "enforce"] = Field(
        "alert", description="at the objective: tell people, or also stop acknowledging until another region catches up"
    )
    settle_seconds: SecondsOrZero = Field(10.0, description="a region is protected after it kept the objective for this long")
    report_seconds: Seconds = Field(1.0, description="time between two reports of the holder to etcd")


class PromotionSettings(Section):
    """Plans, approvals, pace."""

    approvals_required: Count = Field(2, le=20, description="distinct people that must approve, the requester not counted")
    break_glass_approvals: Count = Field(1, description="the same for a break-glass plan")
    plan_ttl_seconds: Seconds = Field(1800, description="a plan that was not carried out by then expires")
    approval_ttl_seconds: Seconds = Field(900, description="lifetime that drctl proposes for an approval")
    tolerance_seconds: SecondsOrZero = Field(10.0, description="approvals die when the expected loss grew by more than this")
    tolerance_records: CountOrZero = Field(1000, description="the same in records")
    drain_timeout_seconds: Seconds = Field(30, description="a switchover that has not drained by then is called off")
    resume_agents_per_second: Rate = Field(200, description="pace at which agents are started in the target region")
    confirm_timeout_seconds: Seconds = Field(60, description="DNS must show the move within this time, or people are paged")
    auto_propose: bool = Field(True, description="write a plan (never carry it out) when the active region is lost")
    notice_seconds: SecondsOrZero = Field(2.0, description="it must be gone for this long before one is proposed")


class TrafficSettings(Section):
    """The group's name in Route 53."""

    zone_id: values.ZoneId = Field(description="hosted zone, without /hostedzone/")
    name: values.DnsName = Field(description="name that clients resolve, such as agents.dr.example.")
    ttl_seconds: WholeSeconds = Field(5, le=3600, description="time to live of the records; clients may keep them so long")
    endpoint: values.Url | None = Field(None, description="other Route 53 endpoint than AWS's own", json_schema_extra=LOCAL)
    active_weight: values.Weight = Field(100, description="weight of the active region's record; the others have 0")
    aws_region: values.AwsRegionName = Field("us-east-1", description="region that signs Route 53 calls")


class DnsSettings(Section):
    """The view from outside."""

    servers: Annotated[list[values.DnsServer], AfterValidator(values.no_duplicates)] = Field(
        min_length=1, description="address:port of the name servers that must show a move", json_schema_extra=LOCAL
    )
    timeout_seconds: Seconds = Field(1.0, description="deadline of each question", json_schema_extra=LOCAL)


class ApprovalSettings(Section):
    """Who may approve."""

    allowed_signers: values.FilePath = Field(
        description="OpenSSH allowed_signers file: one approver's key per line", json_schema_extra=LOCAL
    )


class NotifySettings(Section):
    """Who is told."""

    webhook_url: values.WebhookUrl | None = Field(
        None, repr=False, description="pages are posted here; often a secret, so it is never shown", json_schema_extra=LOCAL
    )
    timeout_seconds: Seconds = Field(2.0, description="deadline of one page", json_schema_extra=LOCAL)
    networks: Annotated[list[values.Network], AfterValidator(values.no_duplicates)] = Field(
        [], max_length=100, json_schema_extra=LOCAL,
        description="private networks (CIDR) that the receiver may stand in; public addresses need no permission",
    )  # fmt: skip


class ApiSettings(Section):
    """This instance's own HTTP server, who may call it, and how it calls other controllers."""

    host: values.Host = Field("127.0.0.1", description="address to listen on", json_schema_extra=LOCAL)
    port: values.Port = Field(8080, description="port to listen on", json_schema_extra=LOCAL)
    address: values.Url = Field(
        "", validate_default=False, description="URL at which others reach this instance; http(s)://host:port when left out",
        json_schema_extra=LOCAL,
    )  # fmt: skip
    cert_file: values.FilePath | None = Field(
        None, description="PEM: this controller's certificate, for callers and for other controllers", json_schema_extra=LOCAL
    )
    key_file: values.FilePath | None = Field(None, description="PEM: its private key, not encrypted", json_schema_extra=LOCAL)
    ca_file: values.FilePath | None = Field(
        None, description="PEM: authority that signed the other controllers' certificates", json_schema_extra=LOCAL
    )
    client_ca_file: values.FilePath | None = Field(
        None,
        description="PEM: authority of clients' certificates; with it peer routes take nothing but a controller's certificate",
        json_schema_extra=LOCAL,
    )
    peer_names: Annotated[list[values.CertificateName], AfterValidator(values.no_duplicates)] = Field(
        [], max_length=200, description="names in other controllers' certificates; default: drctl://GROUP/REGION/INSTANCE URIs"
    )
    peer_token_file: values.FilePath | None = Field(
        None, description="token (role peer) for other controllers, where client_ca_file is not used", json_schema_extra=LOCAL
    )
    access_file: values.FilePath | None = Field(
        None, description="who may call (drctl token); without it nobody is asked who they are", json_schema_extra=LOCAL
    )
    access_stale_seconds: Seconds = Field(
        900.0, description="an access file that cannot be read any more is remembered for this long", json_schema_extra=LOCAL
    )
    open_metrics: bool = Field(False, description="/metrics answers everybody, also with an access file")
    insecure_private_network: bool = Field(
        False, description="in production: run without TLS or without knowing callers, on a network that nobody else reaches"
    )

    @model_validator(mode="before")
    @classmethod
    def _address_from_host_and_port(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "address" in data:
            return data
        host, port = data.get("host", "127.0.0.1"), data.get("port", 8080)
        if not isinstance(host, str) or host in {"0.0.0.0", "::"}:  # noqa: S104 - compared, not bound
            return data
        scheme = "http" if data.get("cert_file") is None else "https"
        return {**data, "address": f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"}


class AwsSettings(Section):
    """The AWS clients of this process."""

    call_timeout_seconds: Seconds = Field(2.0, description="deadline of each call", json_schema_extra=LOCAL)
    connect_timeout_seconds: Seconds = Field(1.0, description="deadline of each connection", json_schema_extra=LOCAL)
    max_pool_connections: Count = Field(64, le=10_000, description="connections per client", json_schema_extra=LOCAL)
    account_id: values.AccountId | None = Field(
        None, description="account that the credentials must belong to; asked of STS before anything is done with them"
    )
    sts_endpoint: values.Url | None = Field(
        None, description="other endpoint than AWS's own in this region", json_schema_extra=LOCAL
    )


class EncryptionSettings(Section):
    """Sealing of what lies in S3, on top of the buckets' own encryption."""

    enabled: bool = Field(False, description="seal new segments and snapshots; needs regions.NAME.kms_key of every region")
    rotate_seconds: LongSeconds = Field(86_400, description="a tenure that lasts longer gets a new data key")
    cache_seconds: LongSeconds = Field(
        21_600, description="an unwrapped data key is used for so long before KMS is asked again", json_schema_extra=LOCAL
    )


class FleetSettings(Section):
    """Agents' hosts."""

    beat_seconds: Seconds = Field(1.0, description="a host reports this often; each report renews its agents' right to act")
    misses_degraded: Count = Field(2, description="reports missed until a host counts as degraded")
    misses_failed: Count = Field(4, description="reports missed until it counts as failed and its agents are moved")
    pool: CountOrZero = Field(1, description="healthy hosts that are kept without work")


class Settings(BaseSettings):
    """All settings of one controller. Frozen. Reads nothing by itself: use :func:`load_settings`."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
    )

    group: values.GroupName = Field(description="name of the fleet; one group has one active region")
    environment: Literal["lab", "production"] = Field(description="lab: loopback without TLS is allowed. production: it is not")
    region: values.RegionName = Field(description="the region that this controller stands in", json_schema_extra=LOCAL)
    instance: values.InstanceName = Field(description="name of this instance, unique in its region", json_schema_extra=LOCAL)
    state_dir: values.FilePath = Field(description="folder of the view; a cache, never the truth", json_schema_extra=LOCAL)
    etcd: EtcdSettings = Field(description="coordination")
    regions: dict[values.RegionName, RegionSettings] = Field(min_length=2, max_length=16, description="every region, by name")
    stream: StreamSettings = Field(default_factory=StreamSettings, description="replication")
    ingest: IngestSettings = Field(default_factory=IngestSettings, description="what agents may send")
    rpo: RpoSettings = Field(default_factory=RpoSettings, description="loss")
    promotion: PromotionSettings = Field(default_factory=PromotionSettings, description="moving")
    traffic: TrafficSettings = Field(description="Route 53")
    dns: DnsSettings = Field(description="confirmation from outside")
    approvals: ApprovalSettings = Field(description="people")
    notify: NotifySettings = Field(default_factory=NotifySettings, description="paging")
    api: ApiSettings = Field(default_factory=lambda: ApiSettings.model_validate({}), description="this instance's HTTP server")
    aws: AwsSettings = Field(default_factory=AwsSettings, description="AWS clients")
    fleet: FleetSettings = Field(default_factory=FleetSettings, description="agents' hosts")
    encryption: EncryptionSettings = Field(default_factory=EncryptionSettings, description="sealed objects")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the names are pydantic-settings' own
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments only, so that building a value never depends on the machine."""
        return (init_settings,)

    @model_validator(mode="before")
    @classmethod
    def _aws_region_from_name(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("regions"), dict):
            return data
        named = {k: {"aws_region": k, **v} if isinstance(v, dict) else v for k, v in data["regions"].items()}
        return {**data, "regions": named}

    @property
    def fence_quorum(self) -> int:
        """Stores that must be fenced before an epoch opens: all but one, so that they meet every set of two that may have
        acknowledged (DESIGN section 4). With two regions or more it is at least 1, and ``n - 1 + copies > n`` for every
        ``copies >= 2``; what was acknowledged with one copy is guarded by the hold on the home store and the sole ackers."""
        return len(self.regions) - 1
