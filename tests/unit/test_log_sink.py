"""A log that cannot be written stops nobody: lines wait, are counted when there are too many, and go on when they can."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from controller.runtime.log_sink import LogSink

AGAIN_SECONDS = 0.01


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 4096)
    try:
        yield ends
    finally:
        for end in ends:
            with contextlib.suppress(OSError):
                os.close(end)


def until(true: Callable[[], object]) -> None:
    """Threads do the work: it takes as long as they need. Bounded by the test's own time limit."""
    while not true():
        time.sleep(0.001)


def test_lines_arrive_in_order_and_whole_and_the_end_waits_for_them(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file, LogSink(file.fileno()) as sink:
        for number in range(2000):
            print(f"line {number} ü", file=sink)
        assert sink.trouble() == ""
    assert path.read_text().splitlines() == [f"line {number} ü" for number in range(2000)]


def test_a_full_disk_raises_nothing_is_told_of_and_costs_only_what_waited_for_too_long() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with LogSink(full, waiting_max_bytes=100, again_seconds=AGAIN_SECONDS) as sink:
            for _ in range(50):
                sink.write("0123456789\n")
            until(sink.trouble)
            assert "No space left on device" in sink.trouble()
            assert not sink.drain(0.0)
    finally:
        os.close(full)


def test_what_waits_is_written_once_there_is_room_and_what_was_lost_is_counted(tmp_path: Path) -> None:
    """A descriptor that is exchanged under the thread: first the full device, then a file."""
    path, fd = tmp_path / "log", os.open("/dev/full", os.O_WRONLY)
    try:
        with LogSink(fd, waiting_max_bytes=100, again_seconds=AGAIN_SECONDS) as sink:
            for number in range(20):
                sink.write(f"line {number:04d}\n")
            until(sink.trouble)
            room = os.open(path, os.O_WRONLY | os.O_CREAT)
            os.dup2(room, fd)
            os.close(room)
            until(lambda: sink.drain(0.1))
            assert sink.trouble() == ""
            sink.write("and on\n")
    finally:
        os.close(fd)
    lines = path.read_text().splitlines()
    assert lines[:10] == [f"line {number:04d}" for number in range(10)]
    told = json.loads(lines[10])
    assert (told["event"], told["lines"]) == ("log lines were lost", 10)
    assert lines[11:] == ["and on"]


def test_a_reader_that_has_stopped_holds_nobody_up_and_one_that_comes_back_gets_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("controller.runtime.log_sink.SLOW_SECONDS", 0.0)
    with pipe() as (reader, writer), LogSink(writer) as sink:
        wanted = "".join(f"line {number}\n" for number in range(5000))
        for line in wanted.splitlines(keepends=True):
            sink.write(line)  # the pipe takes a tenth of them
        until(sink.trouble)
        assert "nobody reads the other end" in sink.trouble()
        got = bytearray()
        while len(got) < len(wanted):
            got += os.read(reader, 65536)
        assert got.decode() == wanted
        until(lambda: not sink.trouble())


def test_a_reader_that_has_gone_raises_nothing_and_the_end_does_not_wait_for_it() -> None:
    with pipe() as (reader, writer):
        os.close(reader)
        with LogSink(writer, again_seconds=AGAIN_SECONDS) as sink:
            sink.write("to nobody\n")
            until(sink.trouble)
            assert "Broken pipe" in sink.trouble()
        threads = [thread for thread in threading.enumerate() if thread is sink._thread]
        until(lambda: not any(thread.is_alive() for thread in threads))
