"""Agents of one region, as a process in that region: they put, get, and ask who is active, and write every answer down.

``python -m tests.faults.worker --name NAME --controllers URL,… --watch URL,… --etcd URL,… --dns HOST:PORT --record FILE``

Times are of ``CLOCK_BOOTTIME``, which all processes of this machine share: what one of them saw before the other is a fact.
Every line is written at once. An answer counts from the moment in which the client accepted it, not later.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import dns.asyncquery
import dns.exception
import dns.message
import dns.rcode
import httpx

from controller.adapters.etcd import EtcdCoordinator
from controller.agent import AsyncCheckpoints
from controller.domain.model import Ack
from controller.errors import DrError, OutcomeUnknown
from controller.lab.agents import die_with_parent
from controller.lab.dns_server import until_stopped
from controller.lab.topology import Endpoint
from controller.ports import Compare, Get, Put

ACKNOWLEDGED = ("acknowledged", "duplicate")
REGISTER_SECONDS = 10
"""A register is used for so long: its history stays small enough for an exact check."""


def now() -> float:
    """Seconds since boot, suspend counted."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def body_of(agent: str, record: str) -> bytes:
    """What an agent writes: anybody can say later what it was."""
    return f"{agent} was at {record}. ".encode() * 20


class NotingClient(AsyncCheckpoints):
    """The agents' own client. ``accepted``: (sent, accepted) of the last answer that it took."""

    accepted: tuple[float, float] = (0.0, 0.0)

    def _accept(self, content: bytes, attempts: Sequence[int], sent_at: float) -> Sequence[Ack]:
        acks = super()._accept(content, attempts, sent_at)
        self.accepted = (sent_at, now())
        return acks


class Worker:
    """Everything that one process does, side by side."""

    def __init__(self, options: argparse.Namespace, record: TextIO) -> None:
        self._name: str = options.name
        self._life: str = options.life
        self._record = record
        self._pause: float = options.pause_seconds
        self._attempt: float = options.attempt_seconds
        self._register_pause: float = options.register_pause_seconds
        self._controllers = options.controllers.split(",")
        self._watch = [url for url in options.watch.split(",") if url]
        self._etcd = [url for url in options.etcd.split(",") if url]
        self._dns = options.dns
        self._dns_name: str = options.dns_name
        self._agents: int = options.agents

    def note(self, what: str, **fields: Any) -> None:
        """One line."""
        self._record.write(json.dumps({"what": what, "by": self._name, **fields}, separators=(",", ":")) + "\n")
        self._record.flush()

    async def serve(self) -> None:
        """Until SIGTERM or SIGKILL."""
        stopped = until_stopped()
        tasks = [asyncio.create_task(self.agent(number)) for number in range(self._agents)]
        tasks += [asyncio.create_task(self.who_is_active(url)) for url in self._watch]
        if self._etcd:
            tasks += [asyncio.create_task(self.registers(number)) for number in range(2)]
        if self._dns:
            tasks.append(asyncio.create_task(self.dns()))
        waiter = asyncio.create_task(stopped.wait())
        done, _ = await asyncio.wait([waiter, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in (waiter, *tasks):
            task.cancel()
        for task in done - {waiter}:
            task.result()  # a part that ended by itself ended by an error

    async def agent(self, number: int) -> None:
        """One agent: a new record each step, put again until it is acknowledged; every third step it reads the newest one."""
        agent = f"{self._name}-{number}"
        copies = 1 + number % 2
        async with NotingClient(self._controllers, timeout_seconds=6.0, attempt_seconds=self._attempt) as client:
            step = 0
            while True:
                step += 1
                record = f"{self._life}-{step:06d}"
                while not await self.put(client, agent, record, copies):  # noqa: ASYNC110 - no wait for an event: it tries again
                    await asyncio.sleep(self._pause)
                if step % 3 == 0:
                    await self.get(client, agent)
                await asyncio.sleep(self._pause * random.uniform(0.5, 1.5))

    async def put(self, client: NotingClient, agent: str, record: str, copies: int) -> bool:
        """Whether it was acknowledged."""
        began = now()
        try:
            ack = await client.put(agent, record, body_of(agent, record), copies=copies)
        except DrError as error:
            self.note("failed", agent=agent, id=record, began=began, ended=now(), code=error.code)
            return False
        sent, accepted = client.accepted
        until = now() + client.right.remaining()
        new = ack.status == "acknowledged"
        fields = {"copies": copies, "stores": ack.copies, "seq": ack.seq, "epoch": client.epoch, "new": new}
        self.note("ack", agent=agent, id=record, began=began, sent=sent, at=accepted, until=until, wall=time.time(), **fields)
        return True

    async def get(self, client: NotingClient, agent: str) -> None:
        """What a fresh read of the newest record says."""
        began = now()
        try:
            found = await client.latest(agent, timeout_seconds=3.0)
        except DrError as error:
            self.note("unread", agent=agent, began=began, ended=now(), code=error.code)
            return
        whole = found is None or found[1] == body_of(agent, found[0].id)
        self.note("read", agent=agent, id=found[0].id if found else None, whole=whole, began=began, ended=now())

    async def who_is_active(self, url: str) -> None:
        """A controller that says that it may act did so at some moment between question and answer."""
        async with httpx.AsyncClient(timeout=1.0, trust_env=False) as http:
            while True:
                sent = now()
                try:
                    answer = await http.get(f"{url}/active")
                except httpx.HTTPError:
                    await asyncio.sleep(0.5)
                    continue
                if answer.status_code == 200:
                    said = answer.json()
                    self.note("active", region=said["region"], instance=said["instance"], sent=sent, at=now())
                await asyncio.sleep(0.25)

    async def registers(self, number: int) -> None:
        """Compare-and-set and reads of one etcd key through the product's own adapter, for the linearizability check.

        Registers are shared by all regions and changed for a new one every few seconds."""
        client = EtcdCoordinator(self._etcd, call_timeout_seconds=0.5)
        mine = 0
        try:
            while True:
                mine += 1
                key = f"/dr-faults/register/{number}/{int(time.time() // REGISTER_SECONDS)}"
                await self.operate(client, key, f"{self._name}-{self._life}-{number}-{mine}")
                await asyncio.sleep(self._register_pause * random.uniform(0.4, 1.6))
        finally:
            await client.close()

    async def operate(self, client: EtcdCoordinator, key: str, value: str) -> None:
        """A read, and then one that compares what was read and sets."""
        began = now()
        try:
            item = await client.get(key)
        except DrError:
            return  # a read without an answer says nothing
        was = item.value.decode() if item else ""
        self.note("register", key=key, op="read", value=was, began=began, ended=now())
        began = now()
        compare = Compare.modified(key, item.mod_revision if item else 0)
        try:
            result = await client.txn([compare], [Put(key, value.encode())], [Get(key)])
        except OutcomeUnknown:
            self.note("register", key=key, op="cas", was=was, value=value, began=began, ended=None)
            return
        except DrError:
            return  # it proves that nothing was changed
        op = "cas" if result.succeeded else "refused"
        self.note("register", key=key, op=op, was=was, value=value, began=began, ended=now())

    async def dns(self) -> None:
        """Asks for the name and for the epoch as a client would."""
        server = Endpoint.parse(self._dns)
        while True:
            for name, rtype in ((self._dns_name, "A"), (f"_dr-epoch.{self._dns_name}", "TXT")):
                began = now()
                try:
                    query = dns.message.make_query(name, rtype)
                    answer = await dns.asyncquery.udp(query, server.host, timeout=0.5, port=server.port)
                except (dns.exception.DNSException, OSError):
                    continue  # no answer is no wrong answer
                values = [rdata.to_text().strip('"') for rrset in answer.answer for rdata in rrset]
                self.note("dns", type=rtype, rcode=dns.rcode.to_text(answer.rcode()), values=values, began=began, at=now())
            await asyncio.sleep(0.25)


def main() -> None:
    """Command line."""
    die_with_parent()
    parser = argparse.ArgumentParser(prog="python -m tests.faults.worker")
    parser.add_argument("--name", required=True)
    parser.add_argument("--life", default="1", help="part of every record's id: a worker that was killed begins anew")
    parser.add_argument("--controllers", required=True, help="whom the agents talk to, nearest first")
    parser.add_argument("--watch", default="", help="controllers that are asked whether they are active")
    parser.add_argument("--etcd", default="")
    parser.add_argument("--dns", default="")
    parser.add_argument("--dns-name", default="")
    parser.add_argument("--agents", type=int, default=2)
    parser.add_argument("--pause-seconds", type=float, default=0.8)
    parser.add_argument("--attempt-seconds", type=float, default=3.0, help="how long an agent waits for one answer")
    parser.add_argument("--register-pause-seconds", type=float, default=0.25)
    parser.add_argument("--record", type=Path, required=True)
    options = parser.parse_args()
    with options.record.open("a") as record:
        asyncio.run(Worker(options, record).serve())


if __name__ == "__main__":
    main()
