"""The WAN proxy over real loopback sockets: delay, black hole, healing, reset."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from controller.errors import Refused, Unavailable
from controller.lab import control
from controller.lab.wan import LinkSpec, Wan

pytestmark = pytest.mark.lab


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def network(delay_ms: float = 1.0) -> AsyncIterator[tuple[Wan, int]]:
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = free_port()
    wan = Wan([LinkSpec("a", "b", "127.0.0.1", port, "127.0.0.1", server.sockets[0].getsockname()[1])], delay_ms)
    await wan.start()
    try:
        yield wan, port
    finally:
        await wan.close()
        server.close()


async def test_bytes_pass_in_order_and_unchanged_however_many() -> None:
    async with network(delay_ms=2.0) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        sent = b"".join(number.to_bytes(4, "big") for number in range(500_000))
        writer.write(sent)
        writer.write_eof()
        async with asyncio.timeout(30):
            assert await reader.read(-1) == sent
        writer.close()


async def test_a_round_trip_takes_the_delay_of_both_ways() -> None:
    async with network(delay_ms=50.0) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        loop = asyncio.get_running_loop()
        began = loop.time()
        writer.write(b"x")
        async with asyncio.timeout(10):
            assert await reader.read(1) == b"x"
        assert loop.time() - began >= 0.1
        writer.close()


async def test_a_cut_link_takes_connections_and_answers_nothing_until_it_heals() -> None:
    async with network() as (wan, port):
        old_reader, old_writer = await asyncio.open_connection("127.0.0.1", port)
        old_writer.write(b"1")
        assert await asyncio.wait_for(old_reader.read(1), 10) == b"1"
        await wan.handle("set", {"source": "a", "target": "b", "cut": True})
        new_reader, new_writer = await asyncio.open_connection("127.0.0.1", port)
        for writer in (old_writer, new_writer):
            writer.write(b"2")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.wait({asyncio.create_task(old_reader.read(1))}), 0.3)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(new_reader.read(1), 0.3)
        await wan.handle("set", {"cut": False})
        assert await asyncio.wait_for(new_reader.read(1), 10) == b"2"
        for writer in (old_writer, new_writer):
            writer.close()


async def test_a_reset_breaks_the_connections_of_the_link() -> None:
    async with network() as (wan, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"1")
        assert await asyncio.wait_for(reader.read(1), 10) == b"1"
        await wan.handle("reset", {})
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(1), 10)
        writer.close()


async def test_a_server_that_hangs_up_is_seen_by_the_client() -> None:
    async def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"bye")
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = free_port()
    wan = Wan([LinkSpec("a", "b", "127.0.0.1", port, "127.0.0.1", server.sockets[0].getsockname()[1])], 5.0)
    await wan.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    assert await asyncio.wait_for(reader.read(-1), 10) == b"bye"
    writer.close()
    await wan.close()
    server.close()


async def test_links_are_steered_over_the_control_socket_also_in_a_deep_directory(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 90) / ("e" * 90)
    deep.mkdir(parents=True)
    wan = Wan([LinkSpec("a", "b", "127.0.0.1", free_port(), "127.0.0.1", 1)])
    server = await control.serve(deep / "wan.sock", wan.handle)
    answer = await control.call(deep / "wan.sock", "set", source="a", delay_ms=7, cut=True)
    assert (answer[0]["delay_ms"], answer[0]["cut"]) == (7.0, True)
    with pytest.raises(Refused, match="no link from b"):
        await control.call(deep / "wan.sock", "set", source="b")
    with pytest.raises(Refused, match="unknown command"):
        await control.call(deep / "wan.sock", "explode")
    with pytest.raises(Refused, match="delay_ms -1"):
        await control.call(deep / "wan.sock", "set", delay_ms=-1)
    server.close()
    with pytest.raises(Unavailable, match="nobody listens"):
        await control.call(deep / "other.sock", "links")
