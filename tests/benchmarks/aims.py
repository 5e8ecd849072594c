"""The aims of the project's figures and what a run measured for each. A missed aim is shown as missed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.latency import SETTINGS
from tests.benchmarks.tables import ms, table

SMALL_BYTES = 2000
THRIFTY = 0.2
"""Seconds: a ``stream.flush_seconds`` that costs latency and saves requests."""
PRICES = (("2 KB", 500, None), ("2 KB", 500, THRIFTY), ("80 KB", 50, None), ("80 KB", 50, THRIFTY), ("80 KB", 500, None))


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    figure: str
    aim: str
    measured: str
    met: bool


def _case(results: dict[str, Any], name: str, **wanted: Any) -> dict[str, Any] | None:
    cases = results.get(name, {}).get("cases", [])
    return next((case for case in cases if all(case.get(key) == value for key, value in wanted.items())), None)


def _rates(results: dict[str, Any]) -> Iterator[Row]:
    for size, aim in (("2 KB", 25), ("80 KB", 15)):
        for agents in (50, 500):
            if case := _case(results, "rates", size=size, agents=agents):
                ratio = case["ratio"]["median"]
                yield Row(f"rate, {size}, {agents} agents, of the peer", f"{aim} ×", f"{ratio:.1f} ×", ratio >= aim)


def _wire(results: dict[str, Any]) -> Iterator[Row]:
    if case := _case(results, "wire", size="80 KB", agents=50, flush=None):
        mine = case["ours"]["remote_bytes"]
        for name, words, aim in (("plain", "", 60), ("gzip", ", peer with compression", 20)):
            less = case["peer"][name]["remote_bytes"] / mine
            yield Row(f"bytes between regions, 80 KB{words}", f"1/{aim} of the peer", f"1/{less:.0f}", less >= aim)
    if case := _case(results, "wire", size="2 KB", agents=500, offered=None, flush=None):
        requests = case["ours"]["requests"]
        yield Row("AWS requests per checkpoint, 2 KB, 500 agents", "0.02", f"{requests:.4f}", requests <= 0.02)
    for size, agents, flush in PRICES:
        if case := _case(results, "wire", size=size, agents=agents, offered=None, flush=flush):
            less = case["peer"]["plain"]["million"]["total"] / case["ours"]["million"]["total"]
            words = f", `flush_seconds = {flush:g}`" if flush else ""
            yield Row(f"price per million, {size}, {agents} agents{words}", "1/300 of the peer", f"1/{less:.0f}", less >= 300)


def _latency(results: dict[str, Any]) -> Iterator[Row]:
    for delay, flush, agents in SETTINGS:
        if case := _case(results, "latency", delay_ms=delay, copies=3, flush=flush, agents=agents):
            way = f", {delay:.0f} ms between regions, {agents:,} agents" if delay else ""
            way += f", `flush_seconds = {flush:g}`" if flush else ""
            yield Row(f"in every region, p99, half load{way}", "under 500 ms", f"{ms(case['p99'])} ms", case["p99"] < 0.5)


def _cpu(results: dict[str, Any]) -> Iterator[Row]:
    for row in results.get("cpu", {}).get("cases", []):
        if row["bytes"] == SMALL_BYTES:
            figure = f"CPU of the holder per small checkpoint, {row['batch']} a request"
            yield Row(figure, "200 µs or less", f"{row['us']:.0f} µs", row["us"] <= 200)


def _growth(results: dict[str, Any]) -> Iterator[Row]:
    case = _case(results, "growth", agents=10_000)
    if case and "move" in case:
        seconds = case["move"]["fence_to_verified_seconds"]
        yield Row("promotion, 10,000 agents, fence to all decoded", "under 5 s", f"{seconds:.1f} s", seconds < 5)


PARTS: tuple[Callable[[dict[str, Any]], Iterator[Row]], ...] = (_rates, _wire, _latency, _cpu, _growth)


def section(results: dict[str, Any]) -> str:
    """The table of aims; empty when nothing of it was measured."""
    rows = [row for part in PARTS for row in part(results)]
    if not rows:
        return ""
    lines = [(row.figure, row.aim, row.measured, "met" if row.met else "**missed**") for row in rows]
    return "### Aims\n\n" + table(("figure", "aim", "measured", ""), lines)
