"""Commands around the daemon: serve, config check, version."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated

import typer

from controller import __version__
from controller.cli import render
from controller.cli.session import OutputOption, session

config_app = typer.Typer(help="Settings.", no_args_is_help=True)

FileOption = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="Settings file; default: DR_CONFIG.")]


def serve(ctx: typer.Context, config: FileOption = None) -> None:
    """Run a controller until it is told to stop."""
    # Imported here: no other command needs etcd, AWS or DNS libraries, and they take seconds to load.
    from controller.runtime.daemon import serve as run
    from controller.settings import load_settings

    code = run(load_settings(config or session(ctx).config))
    raise typer.Exit(code)


@config_app.command()
def check(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Settings file.")],
    output: OutputOption = None,
) -> None:
    """Check a settings file (with the DR_* environment) and say everything that is wrong with it at once."""
    from controller.settings import load_settings

    here = session(ctx).use(None, None, output)
    found = load_settings(file)
    if not here.emit(
        {"ok": True, "file": str(file), "group": found.group, "environment": found.environment, "regions": list(found.regions)}
    ):
        words = f"{file} is valid: group {found.group}, {found.environment}, regions {', '.join(found.regions)}"
        here.console.print(render.text(words, "green"), soft_wrap=True)


def version(ctx: typer.Context, output: OutputOption = None) -> None:
    """The version of this drctl. `drctl members` has those of the controllers."""
    here = session(ctx).use(None, None, output)
    if not here.emit({"version": __version__, "python": platform.python_version()}):
        here.console.print(f"drctl {__version__} (Python {platform.python_version()})")
