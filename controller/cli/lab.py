"""``drctl lab``: three regions on this machine, to play with and to break.

``up`` runs in the foreground and owns every process; the other commands talk to it through its state directory.
"""

from __future__ import annotations

import asyncio
import json
import signal
import tomllib
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from controller.errors import Misconfigured, Unavailable
from controller.lab import control
from controller.lab.layout import DEFAULT_STATE_DIR, Layout

T = TypeVar("T")

lab_app = typer.Typer(help="Three regions on one machine.", no_args_is_help=True)

StateDir = Annotated[Path, typer.Option("--state-dir", help="Where the lab keeps its files.", envvar="DRLAB_STATE_DIR")]
SettingsFile = Annotated[Path | None, typer.Option("--settings", help="The lab's settings; default: config/lab.toml.")]
PortOffset = Annotated[int, typer.Option("--port-offset", min=0, max=20000, help="Added to every port.")]
Agents = Annotated[int, typer.Option("--agents", min=1, max=5000, help="Agents in the fleet.")]
Corpus = Annotated[
    Path | None,
    typer.Option("--corpus", exists=True, file_okay=False, help="Directory of text files that the agents read."),
]
Region = Annotated[str, typer.Argument(help="Name of a region of the lab.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable.")]


def find_settings(given: Path | None) -> Path:
    """The lab's settings file: as given, in the current directory, or in the checkout. Raises Misconfigured."""
    checkout = Path(__file__).resolve().parents[2]
    candidates = [given] if given else [Path("config/lab.toml"), checkout / "config" / "lab.toml"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise Misconfigured(f"no settings at {candidates[0]}", hint="name the lab's settings file with --settings FILE")


def read_settings(given: Path | None) -> dict[str, Any]:
    """The settings document. Raises Misconfigured."""
    path = find_settings(given)
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Misconfigured(
            f"{path} is not readable TOML: {error}", hint="compare with config/lab.toml of the project"
        ) from error


def finish(work: Coroutine[Any, Any, T]) -> T:
    """Runs to the end. SIGINT, SIGTERM and SIGHUP cancel it, so that its ``async with`` blocks clean up; then exit code 130."""
    try:
        return asyncio.run(_until_signal(work))
    except asyncio.CancelledError:
        raise typer.Exit(130) from None


async def _until_signal(work: Coroutine[Any, Any, T]) -> T:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    return await task


def state_of(state_dir: Path) -> Layout:
    """The files of a state directory."""
    return Layout(state_dir.absolute())


@lab_app.command()
def up(
    state_dir: StateDir = DEFAULT_STATE_DIR,
    settings: SettingsFile = None,
    port_offset: PortOffset = 0,
    agents: Agents = 50,
    corpus: Corpus = None,
    tls: Annotated[
        bool, typer.Option("--tls", help="etcd and controllers over TLS, callers known by tokens, controllers by certificates.")
    ] = False,
) -> None:
    """Start three regions and stay until Ctrl-C."""
    finish(_up(state_dir, settings, port_offset, agents, corpus, tls))


async def _up(state_dir: Path, settings: Path | None, port_offset: int, agents: int, corpus: Path | None, tls: bool) -> None:
    # The lab pulls in every SDK; the other commands must answer at once.
    from controller.lab.supervisor import Lab
    from controller.lab.topology import build

    topology = build(read_settings(settings), state_dir.absolute(), offset=port_offset, tls=tls)  # noqa: ASYNC240 - no I/O
    async with Lab(topology, say=typer.echo, agents=agents, corpus=corpus) as lab:
        typer.echo(f"{len(await lab.give_tasks())} agents have tasks and go to work")
        typer.echo(commands_to_try(state_dir, topology.home, [region.name for region in topology.regions], tls=tls))
        told: set[str] = set()
        while not lab.stopping.is_set():
            for process in lab.status()["processes"]:
                if process["state"].startswith("exited") and process["name"] not in told and process["kind"] != "late-writer":
                    told.add(process["name"])
                    typer.echo(f"{process['name']} {process['state']} (log: {lab.log(process['name'])})")
                elif process["state"] == "running":
                    told.discard(process["name"])
            try:
                await asyncio.wait_for(lab.stopping.wait(), 1.0)
            except TimeoutError:
                continue
        typer.echo("ending every process")


def commands_to_try(state_dir: Path, home: str, regions: list[str], *, tls: bool = False) -> str:
    """What ``up`` prints. The commands are those of the runbook."""
    own = "" if state_dir == DEFAULT_STATE_DIR else f" --state-dir {state_dir}"
    target = regions[1]
    return "\n".join(
        (
            "The lab is up. Ctrl-C ends it. In another terminal:",
            f"  export DR_CONFIG={state_dir}/drctl.toml" + (f" DR_TOKEN_FILE={state_dir}/tokens/carol" if tls else ""),
            "  drctl status",
            "  drctl lag --watch",
            f"  drctl lab kill {home}{own}",
            f"  drctl plan failover --to {target} --reason 'the region is silent' --requester carol",
            f"  drctl approve PLAN --key {state_dir}/keys/alice",
            f"  drctl approve PLAN --key {state_dir}/keys/bob",
            f"  drctl promote PLAN --execute --confirm {target} --wait",
            f"  drctl lab thaw {home}{own}",
            f"  drctl lab late-write {home}{own}",
            f"  drctl lab down{own}",
        )
    )


@lab_app.command()
def status(state_dir: StateDir = DEFAULT_STATE_DIR, as_json: AsJson = False) -> None:
    """What runs."""
    document = finish(control.call(state_of(state_dir).socket, "status"))
    if as_json:
        typer.echo(json.dumps(document, indent=2))
        return
    for process in document["processes"]:
        typer.echo(f"{process['name']:<28} {process['region'] or '-':<14} {process['pid']:>8}  {process['state']}")
    for link in document["links"]:
        state = "cut" if link["cut"] else f"{link['delay_ms']:g} ms each way"
        typer.echo(f"{link['from']} -> {link['to']}: {state}, {link['bytes_passed']} bytes passed")


@lab_app.command()
def down(state_dir: StateDir = DEFAULT_STATE_DIR) -> None:
    """End every process of the lab, also when its own process is gone or hangs."""
    from controller.lab.ending import bring_down

    ended = finish(bring_down(state_of(state_dir)))
    typer.echo(f"ended by force: {', '.join(ended)}" if ended else "the lab is down")


def _ask(state_dir: Path, command: str, region: str) -> None:
    answer = finish(control.call(state_of(state_dir).socket, command, region=region, timeout_seconds=30.0))
    typer.echo(f"{command} {region}: " + ", ".join(f"{value} {key}" for key, value in answer.items()))


@lab_app.command()
def kill(region: Region, state_dir: StateDir = DEFAULT_STATE_DIR) -> None:
    """A region dies: its controllers and agents are killed, its stores and its etcd member stand still."""
    _ask(state_dir, "kill", region)


@lab_app.command()
def freeze(region: Region, state_dir: StateDir = DEFAULT_STATE_DIR) -> None:
    """Everything in a region stands still (SIGSTOP)."""
    _ask(state_dir, "freeze", region)


@lab_app.command()
def thaw(region: Region, state_dir: StateDir = DEFAULT_STATE_DIR) -> None:
    """A region comes back: what stood still goes on, what was killed starts anew."""
    _ask(state_dir, "thaw", region)


@lab_app.command()
def link(
    source: Annotated[str, typer.Argument(help="Region whose controllers call; * = every region.")],
    target: Annotated[str, typer.Argument(help="Region whose stores are called; * = every region.")],
    state_dir: StateDir = DEFAULT_STATE_DIR,
    cut: Annotated[bool | None, typer.Option("--cut/--heal", help="Black hole, or passing again.")] = None,
    delay_ms: Annotated[float | None, typer.Option("--delay-ms", min=0, max=60000, help="One way.")] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Break its connections now.")] = False,
) -> None:
    """Show, slow, cut, heal or reset the links between regions."""
    arguments = {"source": source, "target": target}
    changes = {name: value for name, value in (("cut", cut), ("delay_ms", delay_ms)) if value is not None}
    what = "reset" if reset else "set" if changes else "links"
    work = control.call(state_of(state_dir).socket, "wan", what=what, arguments={**arguments, **changes})
    for found in finish(work):
        typer.echo(json.dumps(found))


@lab_app.command("late-write")
def late_write(
    region: Region,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    epoch: Annotated[int | None, typer.Option("--epoch", min=1, help="An epoch that is over; default: the one before.")] = None,
) -> None:
    """Let a writer with an old epoch try to write and to move traffic, and show how it is refused.

    In the region that is active now, the writer is armed instead: it sleeps with the region (freeze or kill) and tries when
    the region is thawed. Its lines are in the log that is printed. Exit code 1: something was not refused.
    """
    arguments = [] if epoch is None else ["--epoch", str(epoch)]
    answer = finish(control.call(state_of(state_dir).socket, "late-write", region=region, arguments=arguments))
    typer.echo(f"late writer {answer['pid']}: {answer['log']}")
    if not finish(_follow(Path(answer["log"]), int(answer["pid"]))):
        raise typer.Exit(1)


async def _follow(log: Path, pid: int, seconds: float = 90.0) -> bool:
    """Prints the writer's lines until it is armed or has finished. Returns whether nothing was accepted. Raises Unavailable."""
    from controller.lab.late_writer import read_log

    loop, shown = asyncio.get_running_loop(), 0
    until = loop.time() + seconds
    while loop.time() < until:
        lines = read_log(log, pid)
        for line in lines[shown:]:
            typer.echo(json.dumps(line))
        shown = len(lines)
        last = lines[-1] if lines else {"event": ""}
        if last["event"] == "finished":
            return bool(last["refused"])
        if last["event"] == "armed":
            return True
        if last["event"] == "failed":
            raise Unavailable(str(last.get("message")), hint=str(last.get("hint", "")))
        await asyncio.sleep(0.1)
    raise Unavailable(f"the late writer did not finish in {seconds:.0f} s", hint=f"look at {log}")


@lab_app.command()
def demo(
    state_dir: StateDir = DEFAULT_STATE_DIR,
    settings: SettingsFile = None,
    port_offset: PortOffset = 0,
    agents: Agents = 50,
    corpus: Corpus = None,
    interactive: Annotated[bool, typer.Option("--interactive", help="You type the commands, in another terminal.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="Where the report goes; default: report.json of the lab.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the lab running at the end, until Ctrl-C.")] = False,
) -> None:
    """Play the whole story: a region dies, people approve, the fleet moves, nothing is lost silently."""
    from controller.lab.demo import Demo
    from controller.lab.demo_stage import Options
    from controller.lab.topology import build

    topology = build(read_settings(settings), state_dir.absolute(), offset=port_offset)
    options = Options(agents=agents, corpus=corpus, interactive=interactive, output=output, keep=keep, shown_dir=state_dir)
    if not finish(Demo(topology, options).play()):
        raise typer.Exit(1)
