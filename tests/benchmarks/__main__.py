"""``python -m tests.benchmarks``: measures, writes build/bench/results.json and the tables of README.md."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from controller.lab.etcd import find_etcd
from tests.benchmarks.cpu import cpu, large
from tests.benchmarks.distance import distance
from tests.benchmarks.growth import growth
from tests.benchmarks.latency import latency
from tests.benchmarks.peer_stand import REQUIREMENTS, environment
from tests.benchmarks.rates import rates
from tests.benchmarks.reading import reading
from tests.benchmarks.render import write_readme
from tests.benchmarks.run import Run
from tests.benchmarks.stand import ROOT, use_lab_credentials
from tests.benchmarks.wire import wire

FIGURES: dict[str, Callable[[Run], Awaitable[dict[str, Any]]]] = {
    "rates": rates, "wire": wire, "latency": latency, "distance": distance, "cpu": cpu, "large": large, "reading": reading,
    "growth": growth,
}  # fmt: skip
GRACE_SECONDS = 30.0
"""For ending what was cut off."""
NEED_PEER = {"rates", "wire", "reading"}


def conditions(argv: list[str], quick: bool) -> dict[str, Any]:
    """What the tables must say about the run."""
    ran = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    peer = dict(line.split("==") for line in REQUIREMENTS.read_text().split() if "==" in line)
    return {
        "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": "make bench" + (f' ARGS="{" ".join(argv)}"' if argv else ""),
        "quick": quick,
        "commit": ran.stdout.strip(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "etcd": find_etcd().version,
        "versions": {name: version(name) for name in ("ministack", "aioboto3", "httpx", "uvicorn")},
        "peer": {name: peer[name] for name in ("langgraph-checkpoint-aws", "langgraph-checkpoint", "boto3")},
        "load_before": round(os.getloadavg()[0], 2),
    }


async def measure(run: Run, names: list[str], *, readme: bool) -> None:
    """One figure after the other. One that fails is noted, and the next goes on."""
    results = run.folder / "results.json"
    for name in names:
        began, load = time.monotonic(), os.getloadavg()[0]
        run.say(f"--- {name}")
        try:
            if name in NEED_PEER and run.peer_python is None:
                run.peer_python = await asyncio.to_thread(environment, ROOT / "build" / "peer")
            async with asyncio.timeout(max(0.0, run.ends - time.monotonic()) + GRACE_SECONDS):
                found = await FIGURES[name](run)
        except Exception as error:  # noqa: BLE001 - a figure that fails must not cost the others
            traceback.print_exc()
            run.say(f"{name} failed: {error!r}")
            found = {"error": repr(error)[:500]}
        run.results[name] = {**found, "seconds": time.monotonic() - began, "load_before": round(load, 2)}
        results.write_text(json.dumps(run.results, indent=1))
        if readme:
            write_readme(run.results)  # after each: a run that is cut off has written what it found


def main() -> int:
    options = argparse.ArgumentParser(prog="make bench", description="Measures against a peer, and writes README.md.")
    options.add_argument("figures", nargs="*", choices=[[], *FIGURES], help=f"which of {', '.join(FIGURES)}; all when left out")
    options.add_argument("--quick", action="store_true", help="about five minutes: one round, fewer sizes and agents")
    options.add_argument("--minutes", type=float, default=25.0, help="what is not done by then is left out, and said so")
    options.add_argument("--out", type=Path, default=ROOT / "build" / "bench", help="folder of results.json")
    options.add_argument("--keep", action="store_true", help="keep an earlier run's other figures")
    options.add_argument("--no-readme", action="store_true", help="leave README.md as it is")
    chosen = options.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    use_lab_credentials()
    run = Run(chosen.out, chosen.quick)
    run.ends = run.began + 60 * chosen.minutes
    earlier = chosen.out / "results.json"
    if chosen.keep and earlier.exists():
        run.results.update(json.loads(earlier.read_text()))
    run.results["conditions"] = conditions(sys.argv[1:], chosen.quick)
    asyncio.run(measure(run, chosen.figures or list(FIGURES), readme=not chosen.no_readme))
    run.results["conditions"]["minutes"] = round((time.monotonic() - run.began) / 60, 1)
    earlier.write_text(json.dumps(run.results, indent=1))
    if not chosen.no_readme:
        write_readme(run.results)
    failed = [name for name, found in run.results.items() if found.get("error") or found.get("failed")]
    run.say(f"done in {run.results['conditions']['minutes']} minutes" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
