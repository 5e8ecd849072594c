"""What a controller is made of, as values: ``Ports`` is everything outside of it, ``Shell`` what it hands to each tenure.

Values only. Nothing is built, called or decided here, so that every part of the daemon may import it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from controller.domain.model import Role
from controller.ports import Clock, Coordinator, Identity, Pager, Peers, RegionStore, Resolver, Seals, Traffic
from controller.runtime.documents import Keys
from controller.runtime.fleet import FleetManager
from controller.runtime.plans import PlanBook
from controller.runtime.watch import Watch
from controller.settings import Settings
from controller.stream.follower import Follower
from controller.stream.view import View


@dataclass(frozen=True, slots=True)
class Ports:
    """Everything outside of one controller."""

    coordinator: Coordinator
    stores: Mapping[str, RegionStore]
    traffic: Traffic
    resolver: Resolver
    identity: Identity
    pager: Pager
    clock: Clock
    new_id: Callable[[], str]
    peers: Peers | None = None
    """The way to other instances of this region; a group of one stream needs none."""
    seals: Seals | None = None
    """None: no KMS keys are set, nothing is sealed."""


@dataclass(frozen=True, slots=True)
class Shell:
    """What the tenure of one stream needs of its controller."""

    settings: Settings
    ports: Ports
    keys: Keys
    book: PlanBook
    view: View
    followers: Mapping[str, Follower]
    fleet: FleetManager
    watch: Watch
    say: Callable[[Role, str], None]
    """The stream's role, and why."""
    tell: Callable[..., None]
    """A line of the log."""

    @property
    def failsafe_seconds(self) -> float:
        """How long this holder may go on past what its stores proved, once etcd is unreachable for everybody; 0: never."""
        enabled = self.settings.etcd.failsafe and self.ports.peers is not None
        return float(self.settings.etcd.ttl_seconds) if enabled else 0.0

    @property
    def lent_seconds(self) -> float:
        """How long rights under this holder may outlive its key: the TTL less the margin."""
        return self.settings.etcd.ttl_seconds - self.settings.etcd.margin_seconds
