"""The parts of the benchmarks that decide what a figure says: sizes, prices, percentiles, and that a missed aim is shown."""

from __future__ import annotations

import asyncio
import base64
import json
from itertools import islice, pairwise
from pathlib import Path
from statistics import mean

import pytest

from tests.benchmarks import aims
from tests.benchmarks.measure import percentile, summary
from tests.benchmarks.prices import Use
from tests.benchmarks.proxy import Count, Proxy, item_bytes
from tests.benchmarks.run import Run
from tests.benchmarks.states import SIZES, Conversation


@pytest.mark.parametrize("size", [2_000, 80_000])
def test_a_conversation_has_its_nominal_size_on_average_and_grows_by_steps(size: int) -> None:
    sizes = [len(json.dumps(state)) for state in islice(Conversation("agent-1", size), 200)]
    assert mean(sizes) == pytest.approx(size, rel=0.25)
    assert max(sizes) < 1.6 * size
    grown = [after - before for before, after in pairwise(sizes) if after > before]
    assert len(grown) > 100


def test_both_sides_of_a_comparison_get_equal_states() -> None:
    ours, peers = (list(islice(Conversation("agent-7", SIZES["6 KB"]), 5)) for _ in range(2))
    assert ours == peers
    assert list(islice(Conversation("agent-8", SIZES["6 KB"]), 5)) != ours


def test_an_item_is_as_large_as_dynamodb_says() -> None:
    # Names count; a binary value counts decoded; a number has a byte for every two digits and one more.
    assert item_bytes({"PK": {"S": "abc"}}) == 5
    assert item_bytes({"p": {"B": base64.b64encode(b"x" * 100).decode()}}) == 101
    assert item_bytes({"n": {"N": "1234"}}) == 1 + 3


def test_a_million_checkpoints_of_the_peer_cost_what_its_units_and_bytes_cost() -> None:
    use = Use(write_units=1e6, transfer_bytes=1e9, dynamodb_bytes=4e9, s3_puts=1000)
    assert use.dollars() == pytest.approx({"requests": 0.63, "transfer": 0.02, "storage": 1.0, "total": 1.65})


def test_percentiles_and_medians_of_few_values() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(n) for n in range(1, 101)], 0.99) == 99.0
    assert summary([4.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 4.0, "spread_percent": 150.0, "rounds": 3}


@pytest.mark.parametrize(("ratio", "word"), [(24.9, "**missed**"), (25.0, "met")])
def test_an_aim_that_is_missed_is_shown_as_missed(ratio: float, word: str) -> None:
    results = {"rates": {"cases": [{"size": "2 KB", "agents": 500, "ratio": {"median": ratio}}]}}
    assert f"| 25 × | {ratio:.1f} × | {word} |" in aims.section(results)


def test_a_figure_that_failed_makes_no_row_and_no_table() -> None:
    assert not aims.section({"rates": {"error": "boom"}})


async def test_the_proxy_passes_everything_on_and_counts_what_passes() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"

    async def store(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            writer.write(answer)
        await writer.drain()

    server = await asyncio.start_server(store, "127.0.0.1", 0)
    async with Proxy("127.0.0.1", 0, "127.0.0.1", server.sockets[0].getsockname()[1]) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.url.rpartition(":")[2]))
        item = json.dumps({"Item": {"PK": {"S": "x" * 1500}}}).encode()
        put = b"POST / HTTP/1.1\r\nX-Amz-Target: DynamoDB_20120810.PutItem\r\nContent-Length: %d\r\n\r\n" % len(item) + item
        segment = b"PUT /bucket/key HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello"
        writer.write(put + segment)
        assert await reader.readexactly(2 * len(answer)) == 2 * answer
        writer.close()
    server.close()
    assert proxy.count == Count(
        up=len(put + segment),
        down=2 * len(answer),
        requests=proxy.count.requests,
        write_units=2,
        item_bytes=1502,
        object_bytes=5,
    )
    assert proxy.count.requests == {"dynamodb PutItem": 1, "s3 PUT": 1}


async def test_a_case_that_fails_costs_no_other_and_is_named(tmp_path: Path) -> None:
    async def measure(case: str) -> dict[str, str]:
        if case == "bad":
            raise ValueError("it broke")
        return {"case": case}

    run = Run(tmp_path, quick=True)
    found = await run.each(["first", "bad", "last"], measure)
    assert found["cases"] == [{"case": "first"}, {"case": "last"}]
    assert found["failed"] == ["bad: ValueError('it broke')"]
    with pytest.raises(RuntimeError, match="it broke"):
        await run.each(["bad"], measure)


async def test_what_there_is_no_time_for_is_left_out_and_named(tmp_path: Path) -> None:
    async def measure(case: str) -> dict[str, str]:
        run.ends = 0.0
        return {"case": case}

    run = Run(tmp_path, quick=True)
    found = await run.each(["first", "second"], measure)
    assert found == {"cases": [{"case": "first"}], "failed": ["second: no time was left (--minutes)"]}
