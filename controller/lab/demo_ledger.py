"""Reads what the agent hosts wrote down: one JSON line for each acknowledgement, resumption and failure."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from controller.domain.model import Kind
from controller.lab.demo_report import Resumed, Written
from controller.lab.hosts import AgentHostPlace


@dataclass(frozen=True, slots=True)
class Unacknowledged:
    """A write that nobody acknowledged in time. No promise was made, and the agent knows."""

    agent: str
    id: str
    copies: int
    code: str
    at: float


class Ledgers:
    """The ledgers of all hosts of a lab. A line that a SIGKILL cut off is a promise that the agent never saw: it is skipped."""

    def __init__(self, hosts: Sequence[AgentHostPlace]) -> None:
        self._hosts = tuple(hosts)

    def _events(self, *names: str, region: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        for host in self._hosts:
            if region is not None and host.region != region:
                continue
            with contextlib.suppress(FileNotFoundError):
                for line in host.ledger.read_text(errors="replace").splitlines():
                    with contextlib.suppress(ValueError):
                        event = json.loads(line)
                        if isinstance(event, dict) and event.get("event") in names:
                            yield host.region, event

    def acknowledged(self, region: str | None = None) -> list[Written]:
        """Checkpoints that agents (of a region) got an acknowledgement for, in the order of their answers."""
        found = [
            Written(
                event["agent"], event["id"], event["sha256"], int(event["copies"]), float(event.get("acked_at", event["at"]))
            )
            for _, event in self._events("ack", region=region)
            if event.get("kind") == Kind.CHECKPOINT
        ]
        return sorted(found, key=lambda written: written.at)

    def resumptions(self, region: str | None = None) -> list[Resumed]:
        """Every start of an agent's work (in a region), from a checkpoint or from the beginning."""
        return [
            Resumed(event["agent"], where, event.get("id"), event.get("sha256", ""), float(event["at"]))
            for where, event in self._events("resume", "begin", region=region)
        ]

    def unacknowledged(self, region: str | None = None) -> list[Unacknowledged]:
        """Writes that failed explicitly."""
        return [
            Unacknowledged(event["agent"], event["id"], int(event["copies"]), event["code"], float(event["at"]))
            for _, event in self._events("unacknowledged", region=region)
        ]
