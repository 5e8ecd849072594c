"""The fault proxy as a process of its own in front of one stand-in, which also writes down what the stand-in really did.

``python -m tests.faults.proxy --listen 127.0.1.20:4566 --upstream 127.0.1.20:4666 --control SOCKET --record FILE [--zone ID]``

Requests that change a head or the zone pass one at a time, so that the order of the record is the order of the changes. It
notes what the *server* answered, also when the client is told something else, or nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from controller.adapters.route53 import route53_client
from controller.errors import Refused
from controller.lab import control
from controller.lab.agents import die_with_parent
from controller.lab.dns_server import until_stopped
from controller.lab.topology import Endpoint
from tests.support.http_fault_proxy import Fault, HttpFaultProxy, Request, Rule, operation

ANY = "*"
SEEN_KEPT = 1000


class RecordingProxy(HttpFaultProxy):
    """Adds the record, and bounds what it remembers."""

    def __init__(self, host: str, port: int, upstream: Endpoint, record: TextIO, zone_id: str) -> None:
        super().__init__(upstream.host, upstream.port, port=port, host=host)
        self.seen = deque(maxlen=SEEN_KEPT)  # type: ignore[assignment]
        self.injected: Counter[str] = Counter()
        self._record = record
        self._zone_id = zone_id
        self._turn = asyncio.Lock()
        self._zone = route53_client(f"http://{upstream}", aws_region="us-east-1", call_timeout_seconds=5.0) if zone_id else None

    def _decide(self, request: Request) -> Rule | None:
        rule = super()._decide(request)
        if rule is not None:
            self.injected[rule.fault.value] += 1
        return rule

    async def _forward(self, request: Request) -> bytes:
        changes_zone = request.method == "POST" and request.path.rstrip("/").endswith("rrset")
        if not (changes_zone or request.target.endswith(".UpdateItem")):
            return await super()._forward(request)
        async with self._turn:
            answer = await super()._forward(request)
            if answer.split(b" ", 2)[1] == b"200":
                if changes_zone:
                    await self.note_zone()
                else:
                    self._note("head", item=json.loads(answer.partition(b"\r\n\r\n")[2]).get("Attributes"))
            return answer

    async def note_zone(self) -> None:
        """The zone as it is now."""
        if self._zone is not None:
            listed = await asyncio.to_thread(self._zone.list_resource_record_sets, HostedZoneId=self._zone_id)
            self._note("zone", records=listed["ResourceRecordSets"])

    def _note(self, what: str, **fields: Any) -> None:
        self._record.write(json.dumps({"what": what, "at": time.time(), **fields}) + "\n")
        self._record.flush()

    async def handle(self, command: str, arguments: Mapping[str, Any]) -> Any:
        """``break`` with a rule; ``clear``; ``counts``. Raises Refused."""
        if command == "break":
            self.rules.append(_rule(arguments))
        elif command == "clear":
            self.rules.clear()
        elif command != "counts":
            raise Refused(f"unknown command {command!r}", hint="commands: break, clear, counts")
        return dict(self.injected)


def _rule(arguments: Mapping[str, Any]) -> Rule:
    """``fault``, ``operation`` (``*`` = all), ``chance`` of each request, and what the fault needs."""
    chance = float(arguments.get("chance", 1.0))
    name = str(arguments.get("operation", ANY))
    wanted: Callable[[Request], bool] = (lambda _: True) if name == ANY else operation(name)
    return Rule(
        Fault(arguments["fault"]),
        lambda request: wanted(request) and random.random() < chance,
        arguments.get("times"),
        seconds=float(arguments.get("seconds", 0.0)),
        status=int(arguments.get("status", 503)),
        code=str(arguments.get("code", "ServiceUnavailable")),
    )


async def serve(options: argparse.Namespace) -> None:
    """Until SIGTERM."""
    stopped = until_stopped()
    listen = Endpoint.parse(options.listen)
    with Path(options.record).open("a") as record:  # noqa: ASYNC230 - once
        proxy = RecordingProxy(listen.host, listen.port, Endpoint.parse(options.upstream), record, options.zone)
        await proxy.note_zone()
        async with proxy:
            server = await control.serve(Path(options.control), proxy.handle)
            await stopped.wait()
            server.close()


def main() -> None:
    """Command line."""
    die_with_parent()
    parser = argparse.ArgumentParser(prog="python -m tests.faults.proxy")
    for name in ("--listen", "--upstream", "--control", "--record"):
        parser.add_argument(name, required=True)
    parser.add_argument("--zone", default="", help="id of the hosted zone, for the proxy of Route 53")
    random.seed(os.getpid())
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
