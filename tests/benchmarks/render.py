"""Results to the tables of README.md, between its markers. Every aim is shown with what was measured, met or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from controller.agent.memory import CHAIN, LONG_CHAIN_BYTES
from controller.stream.limits import MAX_CHAIN
from controller.stream.reader import CHAIN_CONCURRENCY
from tests.benchmarks.aims import section
from tests.benchmarks.tables import ms, number, spread, table

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- figures: written by `make bench`, do not edit -->", "<!-- end of figures -->"
MIB = 2**20


def write_readme(results: dict[str, Any], path: Path = README) -> None:
    """Replaces what stands between the markers. Raises ValueError when they are not there."""
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise ValueError(f"{path} has lost its markers")
    path.write_text(f"{before}{BEGIN}\n\n{render(results)}\n{END}{after}")


def render(results: dict[str, Any]) -> str:
    """All sections, in a fixed order; one that failed says so, one that was not measured is left out."""
    parts = [_conditions(results["conditions"]), section(results)]
    for name, write in SECTIONS.items():
        found = results.get(name)
        if found is None:
            continue
        if "error" in found:
            parts.append(f"### {name}\n\nNot measured: `{found['error']}`\n")
        else:
            lacks = "; ".join(found.get("failed", ()))
            parts.append(write(found) + (f"\n**Not measured**: `{lacks}`\n" if lacks else ""))
    return "\n".join(parts)


def _conditions(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    peer = ", ".join(f"{name} {version}" for name, version in found["peer"].items())
    return (
        "### Conditions\n\n"
        f"`{found['command']}`, {found['at']}, commit `{found['commit']}`"
        f"{', **quick run: one round, good for a look only**' if found['quick'] else ''}; "
        f"{found.get('minutes', '?')} minutes.\n"
        f"{found['cores']} cores, {found['memory_gib']} GiB, {found['system']}, Python {found['python']}, etcd "
        f"{found['etcd']}, "
        f"{versions}. Peer: {peer}. Load average before the run: {found['load_before']}. Everything runs on these "
        "cores at the same "
        "time: load, holder, three stores, three etcd members (standbys only where a table says so).\n"
    )


# --------------------------------------------------------------------------------------------------------------- sections


def _rates(found: dict[str, Any]) -> str:
    rows = [
        (
            f"{case['size']}, {case['agents']} agents",
            spread(case["ours"]),
            spread(case["peer"]),
            spread(case["ratio"], 1) + " ×",
            number(case["peer_compressed"]),
            f"{ms(case['p50'])} / {ms(case['p99'])}",
            number(case["batched"]["rate"] if case["batched"] else None),
        )
        for case in found["cases"]
    ]
    text = "### Checkpoints per second\n\n" + table(
        (
            "states",
            "ours, to three regions",
            "peer, to two regions",
            "ratio",
            "peer, gzip",
            "p50 / p99 at full load, ms",
            "holder alone",
        ),
        rows,
    )
    tuned = ", ".join(f"{size}: {threads} threads × {processes}" for size, (threads, processes) in found["tuned"].items())
    text += (
        "\nMedians of alternating rounds (lowest to highest). *Ours*: every agent puts its next state when the "
        "last is acknowledged "
        "by one copy; counted is what all three stores have committed in the window. *Holder alone*: the same "
        "records, their frames "
        f"made beforehand. Fastest setting of the peer ({tuned} processes).\n\n"
    )
    foreign = [share for case in found["cases"] for share in case["foreign_shares"]]
    text += (
        f"Noise: other programs of the machine used {100 * median(foreign):.0f} % of a core during the windows "
        "(median; at most "
        f"{100 * max(foreign):.0f} %).\n\n"
    )
    parts = ("load", "controller", "stores", "etcd")
    rows = []
    for case in found["cases"]:
        mine, peer = case["detail"]["cpu_us"], case["peer_detail"]["cpu_us"]
        all_mine, all_peer = sum(mine.get(part, 0.0) for part in parts), sum(peer.values())
        known = min(peer.values()) >= 0  # below: a process of the peer ended inside its window, and its time went with it
        rows.append((
            f"{case['size']}, {case['agents']} agents",
            *(number(mine.get(part, 0.0)) for part in parts),
            number(all_mine),
            number(100 * case["detail"]["cpu_share"]["controller"]),
            f"{number(peer['peer'])} + {number(peer['stores'])}" if known else "not known",
            f"{all_peer / all_mine:.1f} ×" if known else "–",
        ))  # fmt: skip
    head = ("states", *parts, "together", "holder's share of a core, %", "peer + its stores", "peer / ours")
    text += "CPU per checkpoint by process, µs (less noisy than rates, when others use the machine):\n\n" + table(head, rows)
    standbys = found.get("standbys")
    if standbys:
        text += (
            f"\nWith a standby in each of the two other regions on the same cores ({standbys['size']}, "
            f"{standbys['agents']} agents): "
            f"{number(standbys['rate'])} a second; both had read back and verified everything "
            f"{standbys['level_seconds']:.1f} s after the "
            f"load ended (CPU per checkpoint of both standbys together: "
            f"{number(standbys['cpu_us'].get('standbys', 0.0))} µs).\n"
        )
    return text


def _wire(found: dict[str, Any]) -> str:
    rows = []
    for case in found["cases"]:
        mine, plain, gzip = case["ours"], case["peer"]["plain"], case["peer"]["gzip"]
        rows.append((
            f"{case['size']}, {case['agents']} agents" + (f", {case['offered']:.0f}/s" if case["offered"] else ""),
            number(case["flush"], 2) if case["flush"] else "default", number(mine["records_per_segment"]),
            number(mine["remote_bytes"]), f"1/{plain['remote_bytes'] / mine['remote_bytes']:.0f}",
            f"1/{gzip['remote_bytes'] / mine['remote_bytes']:.0f}", number(mine["requests"], 4), number(plain["requests"], 1),
            f"${number(mine['million']['total'], 3)}", f"${number(plain['million']['total'], 2)}",
            f"${number(gzip['million']['total'], 2)}",
            f"1/{plain['million']['total'] / mine['million']['total']:.0f}",
        ))  # fmt: skip
    head = (
        "states", "flush, s", "records per segment",
        "bytes to a region", "of the peer", "of the peer, gzip", "requests", "peer", "$ per million",
        "peer", "peer, gzip",
        "of the peer",
    )  # fmt: skip
    text = "### Bytes between regions, AWS requests, price\n\n" + table(head, rows)
    case = found["cases"][0]
    parts = "; ".join(
        f"{name}: requests ${one['million']['requests']:.3f}, transfer ${one['million']['transfer']:.3f}, storage "
        f"${one['million']['storage']:.3f}"
        for name, one in (("ours", case["ours"]), ("peer", case["peer"]["plain"]))
    )
    return text + (
        "\nPer checkpoint, in two regions; each agent takes as many steps as a whole chain of deltas has "
        f"({', '.join(sorted({case['size'] + ': ' + str(case['steps']) for case in found['cases']}))}), the whole state "
        "that begins it included. *Flush*: `stream.flush_seconds`; its default is 0.02. "
        "Bytes are what passed a counting proxy to one further region, answers and headers included. Prices: `prices.py` "
        f"(what is written is kept for a month). First line by kind: {parts}. A rate in the first column: offered "
        "by all agents "
        "together, for a group that is not busy.\n"
    )


def _latency(found: dict[str, Any]) -> str:
    words = {1: "acknowledged, 1 copy", 2: "acknowledged, 2 copies", 3: "in every region (3 copies)"}
    rows = [
        (words[case["copies"]], number(case["agents"]), f"{case['delay_ms']:.0f} ms",
         f"{case['flush']:g} s" if case["flush"] else "default",
         number(case["offered"]), number(case["rate"]),
         *(ms(case[name]) for name in ("p50", "p90", "p99", "p999")), number(case["values"]))
        for case in found["cases"]
    ]  # fmt: skip
    head = (
        "until", "agents", "one way to another region", "flush", "offered/s", "done/s", "p50, ms", "p90", "p99", "p99.9",
        "records",
    )  # fmt: skip
    return "### Latency at half load\n\n" + table(head, rows) + (
        f"\n{found['size']}, random arrivals that do not wait for answers; counted from "
        "the arrival, the "
        "agent's own compression included.\n"
    )  # fmt: skip


def _distance(found: dict[str, Any]) -> str:
    rows = [
        (f"{case['delay_ms']:.0f} ms", number(case["closed"]), number(case["carried"]), number(case["most"]),
         ms(case["lag"]), ms(case["p50"]), ms(case["p99"]))
        for case in found["cases"]
    ]  # fmt: skip
    head = (
        "one way", "segments closed/s", "committed there/s", "most that can be", "lag, ms", "2 copies, p50, ms", "p99",
    )  # fmt: skip
    text = "### What a stream carries by distance\n\n" + table(head, rows)
    rows = [
        (number(case["agents"]), f"{case['delay_ms']:.0f} ms", number(case["offered"]), number(case["rate"]), ms(case["p50"]),
         ms(case["p99"]))
        for case in found["agents"]
    ]  # fmt: skip
    head = ("agents", "one way", "offered/s", "acknowledged/s, 2 copies", "p50, ms", "p99")
    text += (
        f"\nVirtual time: no machine has a part in it. Every store takes {found['store_ms']:.0f} ms for a call beside the way. "
        f"*Most that can be*: {found['depth']} segments (`stream.pipeline_depth`) in each answer of a store. *Lag*: age of the "
        "oldest acknowledged record that the region lacked at the end.\n\n"
        "The same with the agents' client, two processes of it: a tenth of the agents and of the rate of the table above. "
        "Records of an agent go in their order, so an agent alone gets no more than one through in each acknowledgement.\n\n"
    )
    return text + table(head, rows)


def _cpu(found: dict[str, Any]) -> str:
    names = sorted({name for row in found["cases"] for name in row["parts"]})
    total = {name: sum(row["parts"].get(name, 0.0) for row in found["cases"]) for name in names}
    names.sort(key=lambda name: -total[name])
    rows = [
        (
            f"{row['bytes'] // 1000} KB, {row['batch']} a request",
            number(row["us"]),
            *(number(row["parts"].get(name, 0.0)) for name in names),
        )
        for row in found["cases"]
    ]
    return "### CPU of the holder per checkpoint, by part (µs)\n\n" + table(("records", "all", *names), rows) + (
        "\n`cpu_by_part.py`: one controller behind real HTTP, three stores, frames made beforehand, 16 connections.\n"
    )  # fmt: skip


def _large(found: dict[str, Any]) -> str:
    rows = [
        (
            "beside bodies of 64 MiB" if row["large"] else "alone", number(row["rate"]), number(row["p50_ms"]),
            number(row["p99_ms"]), number(row["stall_ms"]),
        )
        for row in found["cases"]
    ]  # fmt: skip
    head = ("small checkpoints", "a second", "p50, ms", "p99, ms", "event loop away for at most, ms")
    return "### Small checkpoints while large bodies are sent\n\n" + table(head, rows) + (
        "\n2 KB, one a request, 16 connections; beside them four incompressible bodies of 64 MiB, one after the other, from "
        "the same process. *Event loop away*: of the holder, which also renews the lease from it.\n"
    )  # fmt: skip


def _growth(found: dict[str, Any]) -> str:
    rows = []
    for case in found["cases"]:
        move = case["move"]
        rows.append((
            number(case["agents"]), number(case["first_rate"]), number(case["rate"]), number(case["cpu_us"]["controller"]),
            number(case["rss"] / MIB),
            number(case["standby_rss"] / MIB), number(case["view_bytes"] / MIB, 1),
            number(move["fence_to_verified_seconds"], 2),
            number(move["fence_to_resumed_seconds"], 2), f"{number(case['cold_seconds'], 1)} ({number(case['cold_records'])})",
        ))  # fmt: skip
    head = (
        "agents", "first states/s", "next states/s", "holder, µs each", "holder, MiB", "standby, MiB", "view, MiB",
        "fence to verified, s", "fence to resumed, s", "cold start, s (records)",
    )  # fmt: skip
    text = "### Growth: rate, memory, promotion, cold start\n\n" + table(head, rows)
    if len(found["cases"]) > 1:
        few, many = found["cases"][0], found["cases"][-1]
        more = many["agents"] - few["agents"]
        text += (
            f"\nFrom {number(few['agents'])} to {number(many['agents'])} agents: "
            f"{(many['rss'] - few['rss']) / more / 1024:.1f} KiB of memory "
            f"of the holder and {(many['view_bytes'] - few['view_bytes']) / more / 1024:.1f} KiB of view for each "
            "further agent.\n"
        )
    return text + (
        f"\n{found['size']} states, made beforehand. One standby in each other region, all on the same cores. "
        "*Fence to verified*: the "
        "home region is killed, people have approved; from the fencing of the stores until every agent's state "
        "in the target was "
        "decoded and hashed. *Cold start*: a standby's process starts without its view, until it has verified "
        "all that its store has; "
        "the start of the process is part of it.\n"
    )


def _reading(found: dict[str, Any]) -> str:
    rows = []
    for case in found["cases"]:
        for name, words in (("warm", "latest, holder"), ("standby", "latest, standby"), ("peer", "latest, peer")):
            one = case[name]
            rows.append((case["size"], words, ms(one["p50"]), ms(one["p99"]), "0" if name != "peer" else "–"))
        rows += [
            (case["size"], f"from S3, {one['deltas']} deltas", ms(one["p50"]), ms(one["p99"]), number(one["gets"], 1))
            for one in case["cold"]
        ]
    return "### Reading one agent's state\n\n" + table(("state", "read", "p50, ms", "p99, ms", "S3 GETs"), rows) + (
        f"\nThrough the client over HTTP, the hash checked. A read from S3 takes no more than {found['max_gets']} "
        "GETs (bound of the "
        f"stream), {CHAIN_CONCURRENCY} at a time; clients send a whole state after at most {CHAIN} deltas, from "
        f"{LONG_CHAIN_BYTES // 1024} KB on after {MAX_CHAIN}.\n"
    )  # fmt: skip


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "rates": _rates, "wire": _wire, "latency": _latency, "distance": _distance, "cpu": _cpu, "large": _large,
    "growth": _growth, "reading": _reading,
}  # fmt: skip
