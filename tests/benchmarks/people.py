"""What people type: plan, approve, promote; and the journal that a promotion leaves. For benchmarks of a running stand."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

import httpx

from controller.lab.parts import APPROVERS, REQUESTER
from tests.benchmarks.stand import ROOT, Stand

PATIENCE_SECONDS = 120.0


async def drctl(stand: Stand, *words: str) -> Any:
    """A command; its JSON. Raises RuntimeError with its output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "controller", "--output", "json", *words, cwd=ROOT,
        env={**os.environ, "DR_CONFIG": str(stand.topology.operator_config), "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    if process.returncode != 0:
        raise RuntimeError(
            f"drctl {' '.join(words)} ended with {process.returncode}: {out.decode()[-500:]} {err.decode()[-1500:]}"
        )
    return json.loads(out) if out.strip() else None


async def get(url: str) -> Any:
    """A JSON document, None when nobody answers."""
    try:
        async with httpx.AsyncClient(timeout=10.0, trust_env=False) as http:
            answer = await http.get(url)
    except httpx.HTTPError:
        return None
    return answer.json() if answer.status_code == 200 else None


async def until(condition: Any, what: str) -> Any:
    """Polls an async condition until it is true; returns its value. Raises TimeoutError naming it."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not (value := await condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {PATIENCE_SECONDS:.0f} s for {what}")
        await asyncio.sleep(0.1)
    return value


async def fail_over(stand: Stand, lost: str, target: str) -> dict[str, Any]:
    """Kills a region and moves its group. Returns seconds by step, from the journal, and what people waited."""
    url = stand.topology.region(target).controllers[0].api.url
    stand.lab.kill(lost)
    killed = time.monotonic()

    async def silent() -> bool:
        status = await get(f"{url}/v1/status")
        return status is not None and status["holders"] == []

    await until(silent, f"the lease of {lost} to end")
    noticed = time.monotonic()
    made = await drctl(stand, "plan", "failover", "--to", target, "--reason", "benchmark", "--requester", REQUESTER)
    plan = str(made["record"]["plan"]["id"])
    for name in APPROVERS:
        key = str(stand.lab.layout.key(name))
        await drctl(stand, "approve", plan, "--key", key, "--principal", name, "--confirm", target)
    ordered = time.time()
    await drctl(stand, "promote", plan, "--execute", "--confirm", target, "--wait", "--requester", REQUESTER)
    document = await get(f"{url}/v1/plans/{plan}")
    steps = {entry["step"]: (entry["started_at"], entry["finished_at"]) for entry in document["journal"]}
    return {
        "lease_ran_out_seconds": noticed - killed,
        "steps": {name: end - start for name, (start, end) in steps.items()},
        "fence_to_verified_seconds": steps["verify"][1] - steps["fence"][0],
        "fence_to_resumed_seconds": steps["resume"][1] - steps["fence"][0],
        "order_to_report_seconds": max(end for _, end in steps.values()) - ordered,
        "sentences": {entry["step"]: entry["sentence"] for entry in document["journal"]},
    }
