"""DNS answers that are almost right, over real UDP and TCP: whatever comes is a value, and the truth is still heard."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Callable

import dns.flags
import dns.message
import dns.rrset
import pytest

from controller.adapters.dns import DnsResolver
from controller.ports import Answer
from tests.fuzz.examples import examples

NAME = "agents.dr.example."
TRUE_ADDRESS = "127.0.1.1"

RECORDS = [
    [(NAME, 5, "A", TRUE_ADDRESS)],
    [(NAME, 0, "A", TRUE_ADDRESS), (NAME, 2**31 - 1, "A", "127.0.2.1")],
    [(NAME, 5, "CNAME", "b.example."), ("b.example.", 5, "CNAME", "c.example."), ("c.example.", 5, "A", TRUE_ADDRESS)],
    [(NAME, 5, "TXT", '"7" "8"'), (NAME, 5, "TXT", '"9"')],
    [("other.example.", 5, "A", "6.6.6.6")],
    [],
]


def truth(query: dns.message.Message, records: list[tuple[str, int, str, str]] | None = None) -> dns.message.Message:
    response = dns.message.make_response(query)
    for owner, ttl, rdtype, value in RECORDS[0] if records is None else records:
        response.answer.append(dns.rrset.from_text(owner, ttl, "IN", rdtype, value))
    return response


def bent(wire: bytes, rng: random.Random) -> bytes:
    """The message with its id and question kept, and something wrong behind them: counts, pointers, lengths, types."""
    data = bytearray(wire)
    for _ in range(rng.randrange(1, 4)):
        at = rng.choice([3, 7, 9, 11, rng.randrange(12, len(data)), len(data) - 1])
        data[at] = rng.choice([0, 0xFF, 0xC0, 0x0C, data[at] ^ (1 << rng.randrange(8))])
    cut = rng.choice([0, 0, 0, rng.randrange(len(data))])
    return bytes(data[: len(data) - cut]) + rng.choice([b"", b"", b"\x00" * 9, rng.randbytes(20)])


class Liar(asyncio.DatagramProtocol):
    """Answers every datagram with what ``reply`` makes of it."""

    reply: Callable[[dns.message.Message], list[bytes]] = staticmethod(lambda query: [])

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        for datagram in self.reply(dns.message.from_wire(data)):
            self.transport.sendto(datagram, addr)  # type: ignore[attr-defined]


def is_answer(answer: Answer) -> bool:
    """A well-formed value: either values with a TTL, or a reason."""
    return bool(answer.values) != bool(answer.error) and 0 <= answer.ttl_seconds < 2**31


@pytest.mark.parametrize("rdtype", ["A", "TXT"])
async def test_a_bent_datagram_is_a_value_and_the_true_one_behind_it_is_heard(rdtype: str) -> None:
    loop, rng = asyncio.get_running_loop(), random.Random(1)
    transport, liar = await loop.create_datagram_endpoint(Liar, local_addr=("127.0.0.1", 0))
    resolver = DnsResolver([f"127.0.0.1:{transport.get_extra_info('sockname')[1]}"], 10.0)
    heard = 0
    for _ in range(examples(150)):
        wrong = rng.choice(RECORDS)
        liar.reply = lambda query, wrong=wrong: [bent(truth(query, wrong).to_wire(), rng), truth(query).to_wire()]
        (answer,) = await resolver.ask(NAME, rdtype)
        assert is_answer(answer), answer
        heard += bool(answer.values)
    assert rdtype != "A" or heard > 10
    transport.close()


async def test_a_bent_answer_over_tcp_is_a_value() -> None:
    loop, rng = asyncio.get_running_loop(), random.Random(2)

    async def answer_tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (length,) = struct.unpack(">H", await reader.readexactly(2))
        query = dns.message.from_wire(await reader.readexactly(length))
        wire = bent(truth(query, rng.choice(RECORDS)).to_wire(), rng)
        writer.write(struct.pack(">H", rng.choice([len(wire), len(wire), 0, 3, 65535])) + wire)
        writer.close()

    server = await asyncio.start_server(answer_tcp, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    transport, liar = await loop.create_datagram_endpoint(Liar, local_addr=("127.0.0.1", port))

    def cut(query: dns.message.Message) -> list[bytes]:
        response = truth(query)
        response.flags |= dns.flags.TC
        return [response.to_wire()]

    liar.reply = cut
    for _ in range(examples(100)):
        (answer,) = await DnsResolver([f"127.0.0.1:{port}"], 10.0).ask(NAME, "A")
        assert is_answer(answer), answer
    transport.close()
    server.close()
