"""CPU per checkpoint in the holder by part, and small records beside large ones: takes the lines of ``cpu_by_part.py`` over."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from tests.benchmarks.run import Run
from tests.benchmarks.stand import ROOT

PARTS = (("2000", "1"), ("2000", "10"), ("2000", "100"), ("80000", "1"), ("80000", "10"), ("80000", "100"))
"""Bytes of a state, records of a request."""
QUICK_PARTS = (("2000", "1"), ("2000", "100"))


async def cpu(run: Run) -> dict[str, Any]:
    async def measure(case: tuple[str, str]) -> dict[str, Any]:
        return await _row(run, "--sizes", case[0], "--batches", case[1])

    return await run.each(QUICK_PARTS if run.quick else PARTS, measure)


async def large(run: Run) -> dict[str, Any]:
    """2 KB a request, beside four bodies of 64 MiB that are sent one after the other, and alone."""

    async def measure(option: str) -> dict[str, Any]:
        more = [option] if option else []
        row = await _row(run, "--sizes", "2000", "--batches", "1", "--records", "8000", "--no-profile", *more)
        run.say(f"{option or 'alone'}: p50 {row['p50_ms']:.0f} ms, p99 {row['p99_ms']:.0f} ms, loop {row['stall_ms']:.0f} ms")
        return {"large": bool(option), **row}

    return await run.each(["", "--large"], measure)


async def _row(run: Run, *options: str) -> dict[str, Any]:
    """Raises RuntimeError when it fails or takes more than two minutes."""
    out = run.folder / "cpu.json"
    out.unlink(missing_ok=True)
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "tests/benchmarks/cpu_by_part.py"), *options, "--json", str(out),
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=sys.stderr.fileno(), stdin=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(120):
            status = await process.wait()
    except TimeoutError:
        process.terminate()
        await process.wait()
        raise RuntimeError("cpu_by_part.py took more than two minutes") from None
    if status != 0:
        raise RuntimeError(f"cpu_by_part.py ended with {status}")
    row: dict[str, Any] = json.loads(out.read_text())[0]
    return row
