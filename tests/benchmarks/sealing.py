"""CPU of sealing, beside what every segment costs anyway: ``python -m tests.benchmarks.sealing [--seconds N]``.

CPU seconds of this process (``time.process_time``), so other load disturbs less than with wall time; the best of the rounds.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Callable

from controller.adapters import sealing
from controller.adapters.sealing import DataKey, Place, Wrap
from controller.domain.model import SegmentRef

MIB = 1024**2
SIZES = (4 * 1024, 64 * 1024, MIB, 16 * MIB)
PLACE = Place.of("bench", SegmentRef("s00", 1, 1))
WRAPS = tuple(Wrap(region, os.urandom(184)) for region in ("eu-central-1", "eu-west-1", "us-east-1"))


def milliseconds(act: Callable[[], object], seconds: float) -> float:
    """CPU milliseconds of one call: the best of at least three rounds of a tenth of ``seconds`` each."""
    best, end = float("inf"), time.process_time() + seconds
    rounds = 0
    while time.process_time() < end or rounds < 3:
        calls, began = 0, time.process_time()
        while True:
            act()
            calls += 1
            took = time.process_time() - began
            if took >= seconds / 10:
                break
        best, rounds = min(best, took / calls), rounds + 1
    return best * 1000


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.sealing", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="CPU seconds for each figure (default: 1)")
    seconds = parser.parse_args(arguments).seconds
    key = DataKey.of(os.urandom(32))
    sys.stdout.write("CPU milliseconds per object; in brackets MiB of content per CPU second\n")
    sys.stdout.write(f"{'content':>12} {'sha256':>18} {'seal':>18} {'open':>18} {'longer by':>10}\n")
    for size in SIZES:
        data = os.urandom(size)
        envelope = sealing.envelope_for(key, WRAPS, PLACE, data)
        sealed = sealing.seal(key, envelope, data)
        acts: list[Callable[[], object]] = [
            lambda data=data: hashlib.sha256(data).digest(),  # type: ignore[misc]
            lambda data=data: sealing.seal(key, sealing.envelope_for(key, WRAPS, PLACE, data), data),  # type: ignore[misc]
            lambda sealed=sealed: _open(key, sealed),  # type: ignore[misc]
        ]
        told = [f"{size:>12,}"]
        for act in acts:
            took = milliseconds(act, seconds)
            told.append(f"{took:>9.3f} ({size / MIB / took * 1000:>6,.0f})")
        told.append(f"{(len(sealed) - size):>9,} B")
        sys.stdout.write(" ".join(told) + "\n")
    return 0


def _open(key: DataKey, sealed: bytes) -> bytes:
    found = sealing.read_envelope(sealed)
    assert found is not None
    return sealing.open_sealed(key, found[0], sealed, found[1])


if __name__ == "__main__":
    sys.exit(main())
