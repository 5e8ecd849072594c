"""Settings to the plain values that the daemon's parts take: one function for each part, and nothing else.

Parts know no settings (``wiring`` is the same for adapters), so tests build them with the numbers that matter there. Pure:
nothing is checked here, ``settings`` has done that.
"""

from __future__ import annotations

from controller.domain.fleet import FleetPolicy
from controller.runtime.failsafe import FailsafePolicy
from controller.runtime.ingest_gate import IngestLimits
from controller.runtime.plans import PlanPolicy
from controller.runtime.promotion import PromotionPolicy
from controller.runtime.reporter import ReportPolicy
from controller.runtime.retention import RetentionPolicy
from controller.runtime.takeover import TakeoverPolicy
from controller.runtime.watch import WatchPolicy
from controller.settings import Settings
from controller.stream.writer import WriterLimits


def ingest_limits(settings: Settings) -> IngestLimits:
    ingest = settings.ingest
    return IngestLimits(
        ingest.request_max_records,
        settings.stream.body_max_bytes,
        ingest.burst_seconds,
        ingest.records_per_second,
        ingest.bytes_per_second,
        ingest.agent_records_per_second,
        ingest.agent_bytes_per_second,
    )


def writer_limits(settings: Settings) -> WriterLimits:
    stream = settings.stream
    return WriterLimits(
        flush_seconds=stream.flush_seconds,
        segment_max_bytes=stream.segment_max_bytes,
        segment_max_records=stream.segment_max_records,
        queue_max_bytes=stream.queue_max_bytes,
        pipeline_depth=stream.pipeline_depth,
        ack_timeout_seconds=stream.ack_timeout_seconds,
        enforced_rpo_seconds=settings.rpo.seconds if settings.rpo.policy == "enforce" else None,
    )


def report_policy(settings: Settings) -> ReportPolicy:
    rpo, stream = settings.rpo, settings.stream
    return ReportPolicy(
        rpo.seconds,
        rpo.settle_seconds,
        rpo.report_seconds,
        stream.canary_seconds,
        stream.brownout_seconds,
        stream.follow_seconds,
    )


def retention_policy(settings: Settings) -> RetentionPolicy:
    return RetentionPolicy(settings.stream.retention_seconds, settings.stream.snapshot_seconds)


def promotion_policy(settings: Settings) -> PromotionPolicy:
    return PromotionPolicy(
        settings.promotion.resume_agents_per_second,
        settings.promotion.confirm_timeout_seconds,
        settings.traffic.name,
        {region: tuple(found.addresses) for region, found in settings.regions.items()},
    )


def failsafe_policy(settings: Settings) -> FailsafePolicy:
    """Everybody who is configured is asked: a list in etcd would be the one that cannot be read any more."""
    etcd = settings.etcd
    return FailsafePolicy(
        settings.region,
        {
            region: [address for address in found.controllers if address != settings.api.address]
            for region, found in settings.regions.items()
        },
        etcd.ttl_seconds,
        etcd.margin_seconds,
        min(settings.aws.call_timeout_seconds, (etcd.ttl_seconds - etcd.margin_seconds) / 4),
    )


def plan_policy(settings: Settings) -> PlanPolicy:
    promotion = settings.promotion
    return PlanPolicy(
        approvals_required=promotion.approvals_required,
        break_glass_approvals=promotion.break_glass_approvals,
        plan_ttl_seconds=promotion.plan_ttl_seconds,
        approval_ttl_seconds=promotion.approval_ttl_seconds,
        tolerance_seconds=promotion.tolerance_seconds,
        tolerance_records=promotion.tolerance_records,
        active_weight=settings.traffic.active_weight,
    )


def takeover_policy(settings: Settings) -> TakeoverPolicy:
    return TakeoverPolicy(settings.etcd.ttl_seconds, settings.promotion.drain_timeout_seconds)


def watch_policy(settings: Settings) -> WatchPolicy:
    return WatchPolicy(
        settings.promotion.notice_seconds,
        settings.promotion.auto_propose,
        {region: found.priority for region, found in settings.regions.items()},
    )


def fleet_policy(settings: Settings) -> FleetPolicy:
    return FleetPolicy(
        settings.fleet.beat_seconds, settings.fleet.misses_degraded, settings.fleet.misses_failed, settings.fleet.pool
    )
