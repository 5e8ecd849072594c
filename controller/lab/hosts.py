"""The lab's agent hosts: how many, where, and the command line of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from controller.lab.layout import Layout
from controller.lab.topology import Topology


@dataclass(frozen=True, slots=True)
class AgentHostPlace:
    """One process that runs several agents."""

    region: str
    host: str
    capacity: int
    step_seconds: float
    beat_seconds: float
    ledger: Path
    state_file: Path

    @property
    def name(self) -> str:
        """Process name, unique in the lab."""
        return f"agents-{self.host}"


def step_seconds(agents: int) -> float:
    """Mean pause between the steps of an agent. A small fleet is lively; a large one must not be more work than two cores do
    (about 80 steps a second beside everything else)."""
    return max(0.6, agents / 80.0)


def places(topology: Topology, layout: Layout, *, per_region: int, agents: int) -> tuple[AgentHostPlace, ...]:
    """Hosts of every region. One host alone can run all agents: that is what a warm standby means."""
    beat = float(topology.document.get("fleet", {}).get("beat_seconds", 1.0))
    return tuple(
        AgentHostPlace(
            region=region.name,
            host=host,
            capacity=max(1, agents),
            step_seconds=step_seconds(agents),
            beat_seconds=beat,
            ledger=layout.ledgers / f"{host}.jsonl",
            state_file=layout.ledgers / f"{host}.state.json",
        )
        for region in topology.regions
        for host in (f"{region.name}-{number}" for number in range(1, per_region + 1))
    )


def host_argv(place: AgentHostPlace, topology: Topology, corpus: Path | None) -> tuple[str, ...]:
    """Module and arguments of a host's process. It knows its own region's controllers only."""
    urls = ",".join(controller.api.url for controller in topology.region(place.region).controllers)
    return (
        "controller.lab.agents",
        *("--host", place.host),
        *("--controllers", urls),
        *("--ledger", str(place.ledger)),
        *("--state-file", str(place.state_file)),
        *("--capacity", str(place.capacity)),
        *("--step-seconds", f"{place.step_seconds:g}"),
        *("--beat-seconds", f"{place.beat_seconds:g}"),
        *(("--corpus", str(corpus.absolute())) if corpus is not None else ()),
    )
