"""`drctl serve`: settings in, a running controller out.

Ends with exit code 0 after SIGTERM or SIGINT (an orderly end gives the lease back once no agent has a right left), and with the
error's own exit code when it cannot start. A bug in a loop ends the process with code 1: the lease expires and the other
instance of the region takes over.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Iterator
from typing import TextIO, cast

import structlog
import uvicorn
import uvloop

from controller.adapters.clock import SystemClock
from controller.adapters.etcd import is_trustworthy, parse_version
from controller.errors import DrError, Misconfigured, Unavailable
from controller.ports import Clock, Coordinator, CoordinatorStatus
from controller.runtime.api import create_app
from controller.runtime.api_server import server_config
from controller.runtime.controller import Controller
from controller.runtime.credentials import Credentials, CredentialWatch, entrance
from controller.runtime.key_watch import KeyWatch
from controller.runtime.log_sink import LogSink
from controller.runtime.logs import configure_logging
from controller.runtime.wiring import build_ports, check_aws_account
from controller.settings import Settings

START_SECONDS = 60.0
"""How long a controller waits for etcd to answer at its start before it gives up (its supervisor starts it again)."""
START_RETRY_SECONDS = 0.5
LOG_LOOK_SECONDS = 1.0
GC_THRESHOLDS = (50_000, 20, 50)
"""A segment makes thousands of objects that live for milliseconds: with Python's own 700 every request is looked through."""


def serve(settings: Settings) -> int:
    """Runs until it is told to stop. Returns the exit code."""
    # Also what goes past the log (a traceback of a thread) must not wait for a full disk or for a reader that has stopped.
    with LogSink(_stderr()) as sink, contextlib.redirect_stderr(sink):
        configure_logging(cast(TextIO, sink))
        log = structlog.get_logger("controller").bind(region=settings.region, instance=settings.instance)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_serve(settings, log, sink))
        except DrError as error:
            log.error("cannot run", reason=error.message, hint=error.hint, code=error.code)
            return error.exit_code
        return 0


def _stderr() -> int:
    """The descriptor that logs go to; of the null device where somebody closed it or put an object without one there."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError):
        return os.open(os.devnull, os.O_WRONLY)


async def check_coordinator(coordinator: Coordinator, clock: Clock, *, production: bool) -> str:
    """Waits for etcd, then looks at its versions. Returns a warning, "" when all is well.

    Raises Misconfigured in production for a version whose leases or data cannot be trusted, Unavailable when nobody answers.
    """
    deadline = clock.monotonic() + START_SECONDS
    while (status := await _status(coordinator, last=clock.monotonic() > deadline)) is None:
        await clock.sleep(START_RETRY_SECONDS)
    old = {endpoint: version for endpoint, version in status.versions.items() if not is_trustworthy(version)}
    if not old:
        return ""
    listed = ", ".join(f"{endpoint} runs {version}" for endpoint, version in sorted(old.items()))
    newest = max(old.values(), key=parse_version)
    if production:
        raise Misconfigured(
            f"etcd is too old: {listed}", hint="upgrade every member to 3.5.16 or newer: older ones revoke leases wrongly"
        )
    return f"etcd {newest} is good for a lab only: {listed}; production needs 3.5.16 or newer"


async def _status(coordinator: Coordinator, *, last: bool) -> CoordinatorStatus | None:
    try:
        return await coordinator.status()
    except Unavailable:
        if last:
            raise
        return None


async def _serve(settings: Settings, log: structlog.typing.FilteringBoundLogger, sink: LogSink) -> None:
    clock = SystemClock()
    async with contextlib.AsyncExitStack() as stack:
        credentials = Credentials(settings)
        await check_aws_account(settings, clock, seconds=START_SECONDS)
        ports = await build_ports(settings, clock, stack, credentials)
        warning = await check_coordinator(ports.coordinator, clock, production=settings.environment == "production")
        if warning:
            log.warning("etcd", reason=warning)
        settings.state_dir.mkdir(parents=True, exist_ok=True)

        def say(event: str, **more: object) -> None:
            log.info(event, **more)

        view = settings.state_dir / f"view-{settings.region}-{settings.instance}.sqlite"
        controller = Controller(settings, ports, view, say)
        app = create_app(
            controller,
            clock=clock,
            in_flight_max_bytes=settings.ingest.in_flight_max_bytes,
            entrance=entrance(settings, clock, credentials.access),
        )
        server = _Server(server_config(app, credentials.server, host=settings.api.host, port=settings.api.port))
        watch = CredentialWatch(settings, credentials, clock, controller.warn, ports.pager)
        telling = asyncio.create_task(_tell_of_log(sink, controller, clock), name="log")
        stack.callback(telling.cancel)
        await _until_told(controller, server, watch, KeyWatch(ports.seals, clock, ports.pager), log)


async def _tell_of_log(sink: LogSink, controller: Controller, clock: Clock) -> None:
    """A log that is not written is told of where people look: in the status."""
    while True:
        controller.warn("log", sink.trouble())
        await clock.sleep(LOG_LOOK_SECONDS)


async def _until_told(
    controller: Controller,
    server: uvicorn.Server,
    credentials: CredentialWatch,
    keys: KeyWatch,
    log: structlog.typing.FilteringBoundLogger,
) -> None:
    """Runs the controller beside its API until a signal comes or one of them ends by itself (a bug, or a port in use)."""
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    api = asyncio.create_task(server.serve(), name="api")
    work = asyncio.create_task(controller.run(), name="controller")
    waiting = asyncio.create_task(told.wait(), name="told")
    looking = asyncio.create_task(credentials.run(), name="credentials")
    asking = asyncio.create_task(keys.run(), name="kms")
    _calm_collector()
    log.info("serving", reason=f"listening on {server.config.host}:{server.config.port}")
    done, _ = await asyncio.wait({api, work, waiting, looking, asking}, return_when=asyncio.FIRST_COMPLETED)
    for one in (work, looking, asking):
        if one in done:
            one.result()  # a bug: say it and die at once; the lease expires
    looking.cancel()
    asking.cancel()
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    await controller.stop()
    server.should_exit = True
    await asyncio.gather(api, return_exceptions=True)
    waiting.cancel()
    if api in done:
        api.result()
        raise Misconfigured(
            f"the API could not listen on {server.config.host}:{server.config.port}",
            hint="is another controller running there? set api.host and api.port",
        )
    log.info("stopped", reason="told to stop")


def _calm_collector() -> None:
    """Modules, settings and models stay for ever: looking through them again and again stops the loop for tens of ms."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


class _Server(uvicorn.Server):
    """Leaves signals to us: the controller must step down before its API goes."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


__all__ = ["check_coordinator", "serve"]
