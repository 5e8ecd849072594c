"""Bytes to another region, AWS requests, the price of a million checkpoints: ours beside the peer, without and with its gzip.

Equal states on both sides: so many steps of each agent, from its first (whole) state on: whole chains of deltas, so that the
whole states that bound them have their share. Everything between a writer and a store passes a counting proxy.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import asdict, dataclass
from typing import Any

import boto3

from controller.agent.memory import chain_limit
from tests.benchmarks.peer_stand import REGIONS, PeerStand, peer_stand
from tests.benchmarks.prices import Use
from tests.benchmarks.proxy import DYNAMODB_UNIT_BYTES, Proxy, item_bytes
from tests.benchmarks.run import Run, split
from tests.benchmarks.stand import Stand, settings, stand
from tests.benchmarks.states import SIZES


@dataclass(frozen=True, slots=True)
class Case:
    """``offered``: records a second of all agents together, None: as fast as they can. ``flush``: ``stream.flush_seconds``,
    None: the default. ``chains``: steps of each agent, in whole chains of deltas."""

    size: str
    agents: int
    offered: float | None = None
    flush: float | None = None
    chains: int = 1

    def __str__(self) -> str:
        rate = f", {self.offered:.0f}/s" if self.offered else ""
        return f"{self.size}, {self.agents} agents{rate}" + (f", flush {self.flush:g} s" if self.flush else "")

    @property
    def steps(self) -> int:
        return self.chains * (chain_limit(SIZES[self.size]) + 1)


THRIFTY = 0.2
CASES = (
    Case("2 KB", 500, chains=2), Case("2 KB", 500, flush=THRIFTY), Case("2 KB", 50), Case("2 KB", 500, 100.0),
    Case("2 KB", 500, 100.0, THRIFTY), Case("80 KB", 50), Case("80 KB", 50, flush=THRIFTY), Case("80 KB", 500),
    Case("720 KB", 20), Case("2 MB", 8),
)  # fmt: skip
QUICK_CASES = (Case("2 KB", 500), Case("80 KB", 50))
RATED_SECONDS = 12.0
PEER_AGENTS = 4


async def wire(run: Run) -> dict[str, Any]:
    peers = dict[str, Any]()

    async def measure(case: Case) -> dict[str, Any]:
        if case.size not in peers:
            both = {kind: await _peer(run, case, zipped) for kind, zipped in (("plain", False), ("gzip", True))}
            peers[case.size] = both
        peer = peers[case.size]
        found = await _ours(run, case)
        run.say(
            f"{case}: {found['remote_bytes']:.0f} bytes to a region (peer {peer['plain']['remote_bytes']:.0f}, gzip "
            f"{peer['gzip']['remote_bytes']:.0f}), {found['requests']:.4f} requests (peer {peer['plain']['requests']:.1f}), "
            f"${found['million']['total']:.3f} a million (peer ${peer['plain']['million']['total']:.2f})"
        )
        return {**asdict(case), "steps": case.steps, "ours": found, "peer": peer}

    return await run.each(QUICK_CASES if run.quick else CASES, measure)


async def _ours(run: Run, case: Case) -> dict[str, Any]:
    size, agents, rate = case.size, case.agents, case.offered
    document = settings(stream={"flush_seconds": case.flush}) if case.flush else None
    async with stand(run.folder / "stand", counted=True, document=document) as counted:
        before, records = _snapshot(counted), (await counted.records())[counted.topology.home]
        if rate is None:
            jobs = split(agents, 2, mode="put", size=SIZES[size], steps=case.steps)
        else:
            jobs = split(agents, 2, mode="offer", size=SIZES[size], rate=rate / 2)
        async with counted.load(jobs) as loaders:
            for loader in loaders:
                loader.tell("go")
            if rate is None:
                done = [await loader.answer() for loader in loaders]
            else:
                await asyncio.sleep(run.seconds(RATED_SECONDS))
                done = [await loader.ask("stop") for loader in loaders]
        await counted.drained()
        heads = {region: (await counted.heads(region))[0] for region in counted.stores}
        after, count = _snapshot(counted), (await counted.records())[counted.topology.home] - records
        await _check_head_size(counted)
    home, remote = counted.topology.home, counted.topology.regions[1].name
    return {
        **_figures({region: _minus(after[region], before[region]) for region in (home, remote)}, remote, count, segments=True),
        "records": count, "segments": heads[home].seq, "records_per_segment": heads[home].records / heads[home].seq,
        "state_bytes": sum(a["bytes"] for a in done) / max(1, sum(a["acknowledged"] for a in done)),
    }  # fmt: skip


async def _peer(run: Run, case: Case, compression: bool) -> dict[str, Any]:
    assert run.peer_python is not None
    with peer_stand(run.peer_python) as peer:
        return await _peer_counted(peer, case.size, case.steps, compression)


async def _peer_counted(peer: PeerStand, size: str, steps: int, compression: bool) -> dict[str, Any]:
    async with contextlib.AsyncExitStack() as stack:
        proxies = {
            region: await stack.enter_async_context(Proxy("127.0.0.1", 0, stand_in.host, stand_in.port))
            for region, stand_in in peer.stand_ins.items()
        }
        job = {"size": SIZES[size], "agents": PEER_AGENTS, "first": 0, "threads": 1, "count": steps, "compression": compression}
        endpoints = {region: proxy.url for region, proxy in proxies.items()}
        async with peer.load([job], endpoints) as loaders:
            done = await loaders[0].ask("go")
        assert not done["failed"], done["failed"]
        counts = {region: proxy.count.document() for region, proxy in proxies.items()}
    return {**_figures(counts, REGIONS[1], done["acknowledged"], segments=False), "records": done["acknowledged"]}


def _snapshot(counted: Stand) -> dict[str, dict[str, Any]]:
    return {region: count.document() for region, count in counted.counts.items()}


def _minus(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {key: number - before[name].get(key, 0) for key, number in value.items()}
        if name == "requests"
        else value - before[name]
        for name, value in after.items()
    }


def _figures(counts: dict[str, dict[str, Any]], remote: str, records: int, *, segments: bool) -> dict[str, Any]:
    """Per checkpoint, and dollars per million, of two regions. ``segments``: a standby in the second reads each object once."""
    requests: dict[str, float] = {}
    for count in counts.values():
        for name, number in count["requests"].items():
            requests[name] = requests.get(name, 0.0) + number / records
    puts = requests.get("s3 PUT", 0.0) + requests.get("s3 LIST", 0.0)
    gets = requests.get("s3 GET", 0.0) + requests.get("s3 HEAD", 0.0)
    reads = sum(n for name, n in requests.items() if name in {"dynamodb GetItem", "dynamodb Query"})
    units = sum(count["write_units"] for count in counts.values()) / records
    use = Use(
        s3_puts=puts,
        s3_gets=gets + (puts / 2 if segments else 0.0),
        write_units=units,
        read_units=reads,
        transfer_bytes=counts[remote]["up"] / records,
        s3_bytes=sum(count["object_bytes"] for count in counts.values()) / records,
        dynamodb_bytes=sum(count["item_bytes"] for count in counts.values()) / records,
    )
    return {
        "remote_bytes": (counts[remote]["up"] + counts[remote]["down"]) / records, "remote_up": counts[remote]["up"] / records,
        "requests": sum(requests.values()), "by_kind": requests, "write_units": units,
        "million": {name: 1e6 * dollars for name, dollars in use.dollars().items()},
    }  # fmt: skip


async def _check_head_size(counted: Stand) -> None:
    """The proxy bills an update of a head as one write unit: true while the item is no larger than 1 KB."""
    home = counted.topology.region(counted.topology.home)
    table = counted.topology.document["regions"][home.name]["table"]
    client: Any = boto3.client("dynamodb", endpoint_url=home.store.url, region_name=home.name)
    items = await asyncio.to_thread(lambda: client.scan(TableName=table)["Items"])
    for item in items:
        if item["sk"]["S"] == "head" and item_bytes(item) > DYNAMODB_UNIT_BYTES:
            raise RuntimeError(f"a head of {item_bytes(item)} bytes costs more than the one write unit that is counted")
