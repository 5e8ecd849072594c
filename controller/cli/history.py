"""Commands about the past: ``checkpoints list|show|diff|export``. They only read, from whichever controller answers first."""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console

from controller.cli import bodies, render
from controller.cli.client import Usage
from controller.cli.export import Folder
from controller.cli.progress import Meter
from controller.cli.session import ConfigOption, EndpointOption, OutputOption, Session, parse_time, session
from controller.domain.model import Kind
from controller.domain.text import visible
from controller.errors import Corrupt, NotFound, Refused
from controller.runtime.archive_documents import AsOf, CheckpointSeen
from controller.runtime.wording import size

PAGE = 500

checkpoints_app = typer.Typer(
    help="Look into the past: what agents wrote, what is in it, what changed, and how to take it out. Answered by any "
    "controller from its own region's copy, also while no region is active. To ask a certain region, name its controller with "
    "`--endpoint`.",
    no_args_is_help=True,
)

AgentArgument = Annotated[str, typer.Argument(metavar="AGENT", help="Name of the agent.")]
KindOption = Annotated[str, typer.Option("--kind", metavar="KIND", help="Kind of record.")]
AsOfOption = Annotated[
    str | None,
    typer.Option("--as-of", metavar="TIME", help="A point in time: ISO 8601 (UTC without an offset), or 15m, 2h, 3d ago."),
]


def part(text: str) -> str:
    """One segment of a path. ``.`` and ``..`` mean something there."""
    found = quote(text, safe="")
    return found if text.strip(".") else found.replace(".", "%2E")


def path_of(agent: str, *rest: str) -> str:
    if not agent:
        raise Usage("the agent's name is empty", hint="drctl checkpoints list shows all agents")
    return "/".join(("/v1/agents", part(agent), *(part(item) for item in rest)))


@checkpoints_app.command("list", epilog="Example: drctl checkpoints list agent-007 --since 2h --kind checkpoint")
def list_checkpoints(
    ctx: typer.Context,
    agent: Annotated[str | None, typer.Argument(metavar="AGENT", help="Without it: the newest of each agent.")] = None,
    kind: Annotated[str | None, typer.Option("--kind", metavar="KIND", help="Only this kind; all kinds of an agent.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="At most so many.")] = 50,
    before: Annotated[str | None, typer.Option("--before", metavar="ID", help="Only records older than this one.")] = None,
    after: Annotated[str, typer.Option("--after", metavar="AGENT", help="Without AGENT: go on after this name.")] = "",
    since: Annotated[str | None, typer.Option("--since", metavar="TIME", help="Received at this time or later.")] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="TIME", help="Received at this time or earlier.")] = None,
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """What an agent wrote, newest first; without AGENT the newest record of each agent, by name."""
    here = session(ctx).use(endpoint, config, output)
    params: dict[str, str | int | float] = {}
    if agent is None:
        if before or since or until:
            raise Usage("--before, --since and --until need an AGENT", hint="drctl checkpoints list AGENT --since 2h")
        path = "/v1/checkpoints"
        params = {"kind": kind or Kind.CHECKPOINT, "after": after, "limit": limit}
    else:
        now = time.time()
        path = path_of(agent, "checkpoints")
        params["limit"] = limit
        for name, value in (("kind", kind), ("before", before)):
            if value is not None:
                params[name] = value
        for name, value in (("since", since), ("until", until)):
            if value is not None:
                params[name] = parse_time(value, now)
    answer = here.client.get(tuple[CheckpointSeen, ...], path, params)
    if not here.emit(answer.raw):
        print_checkpoints(here.console, answer.value, named=agent is None, full=len(answer.value) == limit)


def print_checkpoints(console: Console, found: tuple[CheckpointSeen, ...], *, named: bool, full: bool) -> None:
    """A table of records; ``named`` when they are of different agents."""
    if not found:
        console.print("There are none.")
        return
    columns = ("agent",) if named else ()
    table = render.table(
        *columns, "id", "kind", "received", "created", "size", "place", "deltas", "verified", "parent", right=("size", "deltas")
    )
    for one in found:
        cells = [render.text(one.agent, limit=100)] if named else []
        table.add_row(
            *cells,
            render.text(one.id, "cyan", 120),
            render.text(one.kind),
            render.stamp(one.received_at),
            render.stamp(one.created_at),
            size(one.size),
            f"{visible(one.stream)} {one.seq:,}.{one.ordinal}",
            f"{one.depth}",
            render.text("yes" if one.verified else "no", "" if one.verified else "red"),
            render.text(one.parent or "–", limit=60),
        )
    console.print(table)
    if full:
        last = found[-1]
        more = f"drctl checkpoints list --after {last.agent}" if named else f"--before {last.id}"
        console.print(render.text(f"There may be more: {more}"), soft_wrap=True)


def seen(here: Session, agent: str, record_id: str) -> tuple[CheckpointSeen, Any]:
    """One record's metadata, and as JSON."""
    answer = here.client.get(CheckpointSeen, path_of(agent, "checkpoints", record_id))
    return answer.value, answer.raw


def newest(here: Session, agent: str, kind: str) -> str:
    """Id of the agent's newest record of the kind. Raises NotFound."""
    found = here.client.get(tuple[CheckpointSeen, ...], path_of(agent, "checkpoints"), {"kind": kind, "limit": 1}).value
    if not found:
        raise NotFound(
            f"agent {visible(agent, 200)} has no record of kind {visible(kind, 64)}", hint=f"drctl checkpoints list {agent!r}"
        )
    return str(found[0].id)


def body_of(here: Session, record: CheckpointSeen) -> bytes:
    """The body, its hash compared on this machine. Raises Corrupt."""
    data = here.client.body(path_of(record.agent, "records", record.id))
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise Corrupt(
            f"the body of record {visible(record.id)} of agent {visible(record.agent)} is not what its hash says",
            hint="ask a controller of another region: --endpoint URL; then drctl verify",
        )
    return data


@checkpoints_app.command(epilog="Example: drctl checkpoints show agent-007; with --raw > FILE the bytes as they are")
def show(
    ctx: typer.Context,
    agent: AgentArgument,
    record: Annotated[str | None, typer.Argument(metavar="[ID]", help="Default: the newest of the kind.")] = None,
    kind: KindOption = Kind.CHECKPOINT,
    lines: Annotated[int, typer.Option("--lines", min=1, max=1_000_000, help="Lines of the body to show.")] = bodies.MAX_LINES,
    raw: Annotated[bool, typer.Option("--raw", help="Only the body, byte for byte. Not to a terminal.")] = False,
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """One record: where it lies, and its body (JSON, MessagePack and text readable, all else as hex)."""
    here = session(ctx).use(endpoint, config, output)
    if raw and sys.stdout.isatty():
        raise Usage("--raw does not write to a terminal: the bytes might act on it", hint="redirect it: --raw > FILE")
    found, document = seen(here, agent, record or newest(here, agent, kind))
    data = body_of(here, found)
    if raw:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    form, text = bodies.shown(data, lines)
    if here.emit({**document, "form": form, "body": text}):
        return
    console = here.console
    for name, value in _facts(found, form):
        render.fact(console, name, value)
    console.print()
    for line in text:
        console.print(render.text(line, limit=bodies.MAX_LINE_CHARS + 1), soft_wrap=True)


def _facts(found: CheckpointSeen, form: str) -> list[tuple[str, Any]]:
    facts = [
        ("agent", found.agent),
        ("record", found.id),
        ("kind", found.kind),
        ("parent", found.parent or "–"),
        ("received", f"{render.stamp(found.received_at)} (created {render.stamp(found.created_at)} by the agent's clock)"),
        ("place", f"stream {found.stream}, segment {found.seq:,}, frame {found.ordinal}: {found.key or 'carried forward'}"),
        ("stored", f"{found.encoding}, {found.depth} deltas to read, {'verified' if found.verified else 'NOT verified'} here"),
        ("asked for", f"{found.copies} copies, attempt {found.attempt}"),
        ("sha256", found.sha256),
        ("body", f"{form}, {size(found.size)}"),
    ]
    facts += [("meta", f"{key} = {value}") for key, value in sorted(found.meta.items())]
    return [(name, render.text(value, limit=1000)) for name, value in facts]


@checkpoints_app.command(epilog="Example: drctl checkpoints diff agent-007 step-40 step-41")
def diff(
    ctx: typer.Context,
    agent: AgentArgument,
    old: Annotated[str, typer.Argument(metavar="ID1", help="The older record.")],
    new: Annotated[str, typer.Argument(metavar="ID2", help="The newer record.")],
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """What changed between two records: by path for JSON and MessagePack, by line for text, sizes and hashes for all else."""
    here = session(ctx).use(endpoint, config, output)
    pairs = [seen(here, agent, name)[0] for name in (old, new)]
    opened = [bodies.open_body(body_of(here, found)) for found in pairs]
    forms = [one.form for one in opened]
    same = pairs[0].sha256 == pairs[1].sha256
    found: list[bodies.Change] = []
    text: list[str] = []
    if same:
        pass
    elif all(form in ("json", "msgpack") for form in forms):
        found = bodies.changes(opened[0].value, opened[1].value)
        text = [line for change in found for line in bodies.change_lines(change)]
    elif forms == ["text", "text"]:
        text = bodies.text_changes(opened[0].text, opened[1].text, (old, new))
    document = {
        "agent": agent,
        "old": {"id": old, "form": forms[0], "size": pairs[0].size, "sha256": pairs[0].sha256},
        "new": {"id": new, "form": forms[1], "size": pairs[1].size, "sha256": pairs[1].sha256},
        "same": same,
        "changes": [{"path": change.path, "op": change.op, "old": change.old, "new": change.new} for change in found],
        "diff": text,
        "cut": len(found) >= bodies.MAX_CHANGES,
    }
    if here.emit(document):
        return
    console = here.console
    for one, form in zip(pairs, forms, strict=True):
        words = f"{one.id}: {form}, {size(one.size)}, sha256 {one.sha256[:16]}…, received {render.stamp(one.received_at)}"
        console.print(render.text(words, limit=600), soft_wrap=True)
    if same:
        console.print("The bodies are equal.")
    for line in text:
        style = {"+": "green", "-": "red"}.get(line.lstrip()[:1], "")
        console.print(render.text(line, style, bodies.MAX_LINE_CHARS), soft_wrap=True)
    if not same and not text:
        console.print("The bodies differ; they are not of a kind that can be compared further.")
    if document["cut"]:
        console.print(f"Only the first {bodies.MAX_CHANGES} differences are shown.")


# ---------------------------------------------------------------------------------------------------------------- export


@checkpoints_app.command(epilog="Example: drctl checkpoints export --all --as-of 2h --to before-the-incident")
def export(
    ctx: typer.Context,
    agent: Annotated[str | None, typer.Argument(metavar="[AGENT]", help="Name of the agent; or --all.")] = None,
    record: Annotated[str | None, typer.Argument(metavar="[ID]", help="Default: the newest of the kind.")] = None,
    to: Annotated[Path | None, typer.Option("--to", metavar="DIR", help="Folder that is made or filled.")] = None,
    as_of: AsOfOption = None,
    all_agents: Annotated[bool, typer.Option("--all", help="Every agent that has a record of the kind.")] = False,
    kind: KindOption = Kind.CHECKPOINT,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is in the folder.")] = False,
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """Write bodies to files, with a manifest.json that has each one's hash and place in the stream.

    Works from any region and needs no active controller: this is how state is taken out of a group that cannot run. An
    export that was interrupted can be repeated; what is there already is kept.
    """
    here = session(ctx).use(endpoint, config, output)
    if to is None:
        raise Usage("--to is missing", hint="name the folder: --to DIR")
    if all_agents == (agent is not None):
        raise Usage("name one AGENT, or --all", hint="drctl checkpoints export AGENT --to DIR")
    if record is not None and as_of is not None:
        raise Usage("give an ID or --as-of, not both", hint="drctl checkpoints export AGENT --as-of 2h --to DIR")
    now = time.time()
    at = None if as_of is None else parse_time(as_of, now)
    about: dict[str, Any] = {"as_of": at, "kind": kind, "exported_at": now}
    wanted: list[CheckpointSeen] = []
    missing: list[dict[str, Any]] = []
    if agent is not None and at is None:
        wanted.append(seen(here, agent, record or newest(here, agent, kind))[0])
    else:
        for page in pages_as_of(here, now if at is None else at, kind, () if agent is None else (agent,)):
            about.update(group=page.group, region=page.region, begins_at=page.begins_at)
            for then in page.agents:
                if then.found is None:
                    missing.append({"agent": then.agent, "state": then.state, "why": then.why})
                else:
                    wanted.append(then.found)
    if agent is not None and missing:
        raise Refused(
            f"agent {visible(agent, 200)} has no {visible(kind, 64)} of that time: {missing[0]['why']}",
            hint=f"drctl checkpoints list {agent!r}",
        )
    folder = Folder(to, force=force)
    with Meter(here, "exporting") as meter:
        for done, one in enumerate(wanted):
            meter.at(done, len(wanted), one.agent)
            folder.add(one, body_of(here, one))
    manifest = folder.finish(about, missing)
    if here.emit({**manifest, "folder": str(to)}):
        return
    words = f"{len(wanted):,} bodies with {size(folder.bytes)} are in {to}, listed in {to / 'manifest.json'}"
    here.console.print(render.text(words, "green", 2000), soft_wrap=True)
    if missing:
        text = f"{len(missing):,} agents had nothing then, or it is not held any more: see `missing` in the manifest"
        here.console.print(render.text(text, "yellow"), soft_wrap=True)


def pages_as_of(here: Session, at: float, kind: str, agents: tuple[str, ...]) -> list[AsOf]:
    """All pages. Raises what the controller says of a time that it does not reach."""
    found: list[AsOf] = []
    after = ""
    with Meter(here, "looking") as meter:
        while True:
            params: dict[str, Any] = {"at": at, "kind": kind, "after": after, "limit": PAGE}
            if agents:
                params["agent"] = list(agents)
            page: AsOf = here.client.get(AsOf, "/v1/as-of", params).value
            found.append(page)
            meter.at(sum(len(one.agents) for one in found), None)
            after = page.after
            if not after:
                return found
