"""Prometheus metrics of one controller. What is unknown is absent: a frozen number would be a lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from controller.domain.model import Role, StreamReport, Unknown
from controller.domain.sealing import KmsSeen
from controller.domain.text import MAX_LINE_CHARS, visible


@dataclass(frozen=True, slots=True)
class Kept:
    """What this region's store keeps of one stream. None: not known now."""

    base: int
    snapshot_age_seconds: float | None
    bytes: int | None
    epochs: int = 0
    """That the head names."""
    salvage: int = 0
    forks: int | None = None
    """That are recorded in etcd."""


class Metrics:
    """Gauges that are filled at every scrape from what the controller knows now."""

    def __init__(self, group: str, region: str, instance: str) -> None:
        self._registry = CollectorRegistry()
        self._labels = (group, region, instance)  # validated settings
        base = ("group", "region", "instance")
        self._role = Gauge("dr_role", "1 for the role of this controller", (*base, "role"), registry=self._registry)
        self._right = Gauge("dr_right_seconds", "Seconds left of the right to act", base, registry=self._registry)
        self._epoch = Gauge("dr_epoch", "Greatest epoch that this controller holds, 0 for none", base, registry=self._registry)
        self._stream_epoch = Gauge(
            "dr_stream_epoch", "Epoch in which this controller holds the stream", (*base, "stream"), registry=self._registry
        )
        self._failsafe = Gauge(
            "dr_failsafe_seconds",
            "How long a held stream has gone on past its lease, because etcd is unreachable for every region; 0: it does not",
            (*base, "stream"),
            registry=self._registry,
        )
        self._agents = Gauge("dr_agents", "Agents in this region's view", base, registry=self._registry)
        self._followed = Gauge(
            "dr_follower_seq", "Last segment verified and indexed", (*base, "stream"), registry=self._registry
        )
        lag = (*base, "stream", "to")
        self._lag_seconds = Gauge(
            "dr_lag_seconds", "Age of the oldest acknowledged record that `to` lacks", lag, registry=self._registry
        )
        self._lag_records = Gauge("dr_lag_records", "Acknowledged records that `to` lacks", lag, registry=self._registry)
        streams = (*base, "stream")
        self._base = Gauge("dr_base_seq", "First segment that this region's store keeps", streams, registry=self._registry)
        self._snapshot_age = Gauge(
            "dr_snapshot_age_seconds", "Age of the newest snapshot in this region's store", streams, registry=self._registry
        )
        self._kept_bytes = Gauge(
            "dr_kept_bytes", "Bytes of the segments from the base on, as of the last snapshot", streams, registry=self._registry
        )
        self._head_entries = Gauge(
            "dr_head_entries",
            "Epochs and salvages that the head in this region's store names; its item has a bound",
            (*streams, "what"),
            registry=self._registry,
        )
        self._forks = Gauge("dr_forks", "Forks that are recorded in etcd, of at most 5000", streams, registry=self._registry)
        self._exposure = Gauge(
            "dr_exposure_seconds",
            "What would be lost if any one region vanished now",
            (*base, "stream"),
            registry=self._registry,
        )

        self._kms = Gauge(
            "dr_kms_unusable_seconds",
            "How long the KMS of region `kms` has not wrapped data keys; 0: it does",
            (*base, "kms"),
            registry=self._registry,
        )
        self._alone = Gauge(
            "dr_objects_of_one_kms",
            "Objects that this controller has read and that the KMS of region `kms` alone opens",
            (*base, "kms"),
            registry=self._registry,
        )
        self._wraps = Gauge(
            "dr_wrap_missing_seconds",
            "How long the data key of a stream that is held here has lacked the wrap of region `kms`; 0: it has it",
            (*base, "stream", "kms"),
            registry=self._registry,
        )

    def render(
        self,
        role: Role,
        right_seconds: float,
        epochs: Mapping[str, int],
        agents: int,
        positions: Mapping[str, int],
        reports: Sequence[StreamReport],
        kept: Mapping[str, Kept],
        failsafe: Mapping[str, float],
        kms: Sequence[KmsSeen] = (),
        *,
        now: float = 0.0,
    ) -> bytes:
        """The text exposition. ``epochs``: of the streams that this instance holds; ``reports``: its own newest ones; ``kept``:
        of every stream whose head was read; ``failsafe``: seconds for which held streams have gone on past their lease;
        ``kms``: see ``Seals.seen``, at the wall time ``now``."""
        for known in Role:
            self._role.labels(*self._labels, known.value).set(1 if known is role else 0)
        self._right.labels(*self._labels).set(right_seconds)
        self._epoch.labels(*self._labels).set(max(epochs.values(), default=0))
        self._agents.labels(*self._labels).set(agents)
        for stream, seq in positions.items():
            self._followed.labels(*self._labels, stream).set(seq)
        for gauge in (self._stream_epoch, self._lag_seconds, self._lag_records, self._exposure, self._failsafe):
            gauge.clear()
        self._set_kept(kept)
        self._set_kms(kms, now)
        for stream, epoch in epochs.items():
            self._stream_epoch.labels(*self._labels, stream).set(epoch)
            self._failsafe.labels(*self._labels, stream).set(failsafe.get(stream, 0.0))
        for report in reports:
            if not isinstance(report.exposure_seconds, Unknown):
                self._exposure.labels(*self._labels, _label(report.stream)).set(report.exposure_seconds)
            for region in report.regions:
                if not isinstance(region.seconds, Unknown):
                    self._lag_seconds.labels(*self._labels, _label(report.stream), _label(region.region)).set(region.seconds)
                if not isinstance(region.records, Unknown):
                    self._lag_records.labels(*self._labels, _label(report.stream), _label(region.region)).set(region.records)
        return generate_latest(self._registry)

    def _set_kms(self, kms: Sequence[KmsSeen], now: float) -> None:
        for gauge in (self._kms, self._wraps, self._alone):
            gauge.clear()
        for one in kms:
            if not isinstance(one.wraps, Unknown):
                self._kms.labels(*self._labels, one.region).set(0.0 if one.wraps else now - one.since)
            self._alone.labels(*self._labels, one.region).set(one.alone)
            for stream, since in one.streams.items():
                self._wraps.labels(*self._labels, stream, one.region).set(now - since if since else 0.0)

    def _set_kept(self, kept: Mapping[str, Kept]) -> None:
        for gauge in (self._base, self._snapshot_age, self._kept_bytes, self._head_entries, self._forks):
            gauge.clear()
        for stream, found in kept.items():
            self._base.labels(*self._labels, stream).set(found.base)
            self._head_entries.labels(*self._labels, stream, "epochs").set(found.epochs)
            self._head_entries.labels(*self._labels, stream, "salvages").set(found.salvage)
            if found.forks is not None:
                self._forks.labels(*self._labels, stream).set(found.forks)
            if found.snapshot_age_seconds is not None:
                self._snapshot_age.labels(*self._labels, stream).set(found.snapshot_age_seconds)
            if found.bytes is not None:
                self._kept_bytes.labels(*self._labels, stream).set(found.bytes)


def _label(text: str) -> str:
    """A label's value: also what came through etcd cannot act on whoever reads the metrics, nor grow."""
    return visible(text, MAX_LINE_CHARS)
