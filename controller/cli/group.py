"""Founding a group, and bringing its records in etcd back in line with its stores. Both speak to etcd and the stores directly,
with a controller's settings file: they are for the times when no controller can act."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from controller.cli import render
from controller.cli.session import OutputOption, session

T = TypeVar("T")

FileOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="A controller's settings; default: DR_CONFIG.")
]
RequesterOption = Annotated[str, typer.Option("--requester", help="Who does this; default: your login name.")]


def bootstrap(
    ctx: typer.Context,
    region: Annotated[str, typer.Option("--region", help="The region that shall be active first.")],
    config: FileOption = None,
    requester: RequesterOption = "",
    output: OutputOption = None,
) -> None:
    """Found the group: give one region the authority, once. Repeating it changes nothing."""
    from controller.runtime.bootstrap import bootstrap_group
    from controller.runtime.evidence import Outside
    from controller.settings import load_settings

    here = session(ctx).use(None, None, output)
    settings = load_settings(config or here.config)

    async def found(outside: Outside) -> object:
        return await bootstrap_group(
            outside.coordinator,
            outside.clock,
            prefix=settings.etcd.prefix,
            group=settings.group,
            region=region,
            stores=tuple(settings.regions),
            actor=requester or getpass.getuser(),
            streams=settings.stream.streams,
        )

    authority = _with_outside(config or here.config, found)
    if not here.emit(authority):
        here.console.print(f"group {settings.group} is founded; look: drctl status", soft_wrap=True)


def recover(
    ctx: typer.Context,
    config: FileOption = None,
    region: Annotated[
        str | None, typer.Option("--region", help="Who shall be active; only when etcd has lost the group altogether.")
    ] = None,
    restored: Annotated[
        bool, typer.Option("--restored", help="etcd's data was put back from a copy, whatever its cluster id says.")
    ] = False,
    confirm: Annotated[str, typer.Option("--confirm", metavar="GROUP", help="The group's name: really write.")] = "",
    requester: RequesterOption = "",
    output: OutputOption = None,
) -> None:
    """After etcd was lost or restored: raise its epoch to the floor that the stores know, and read the forks back from them.

    Without --confirm it only shows what it would write. Compare the stores first: afterwards every store counts as one that
    may have acknowledged alone, so the next epoch opens only when all of them are fenced, or when people approve the loss.
    """
    from controller.runtime.audit import Audit
    from controller.runtime.evidence import Outside
    from controller.runtime.recovery import Recovery, examine
    from controller.runtime.recovery import recover as write
    from controller.settings import load_settings

    here = session(ctx).use(None, None, output)
    settings = load_settings(config or here.config)

    async def run(outside: Outside) -> Recovery:
        found = await examine(outside, tuple(settings.regions), region, restored=restored)
        if confirm and found.changes:
            audit = Audit(outside.coordinator, outside.keys)
            await write(outside, audit, found, actor=requester or getpass.getuser(), confirm=confirm)
        return found

    found = _with_outside(config or here.config, run)
    if here.emit(found):
        return
    for change in found.changes or ("nothing: etcd knows everything that the stores know",):
        words = "wrote" if confirm and found.changes else "would write"
        here.console.print(render.text(f"{words}  {change}", limit=1000), soft_wrap=True)
    if found.changes and not confirm:
        command = f"drctl recover{' --restored' if restored else ''} --confirm {settings.group}"
        here.console.print(f"when you have compared the stores: {command}", soft_wrap=True)


def _with_outside(config: Path | None, act: Callable[..., Awaitable[T]]) -> T:
    """Opens the adapters of a settings file, acts, closes them."""
    from controller.adapters.clock import SystemClock
    from controller.runtime.wiring import build_ports, check_aws_account, outside_of
    from controller.settings import load_settings

    async def run() -> T:
        settings = load_settings(config)
        async with contextlib.AsyncExitStack() as stack:
            await check_aws_account(settings, SystemClock(), seconds=0.0)
            ports = await build_ports(settings, SystemClock(), stack)
            return await act(outside_of(settings, ports))

    return asyncio.run(run())
