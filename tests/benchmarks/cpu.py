"""CPU per checkpoint in the holder, by part: runs ``cpu_by_part.py`` and takes its lines over."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from tests.benchmarks.run import Run
from tests.benchmarks.stand import ROOT


async def cpu(run: Run) -> dict[str, Any]:
    out = run.folder / "cpu.json"
    out.unlink(missing_ok=True)
    sizes, batches = (("2000",), ("100",)) if run.quick else (("2000", "80000"), ("10", "100", "500"))
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "tests/benchmarks/cpu_by_part.py"), "--sizes", *sizes, "--batches", *batches,
        "--json", str(out),
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=sys.stderr.fileno(),
    )  # fmt: skip
    if await process.wait() != 0:
        raise RuntimeError(f"cpu_by_part.py ended with {process.returncode}")
    return {"cases": json.loads(out.read_text())}
