"""``drctl salvage``: the tails that were cut off a region that came back. Looking, taking out, and letting go of them."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from controller.cli import render
from controller.cli.client import Usage
from controller.cli.export import MANIFEST, Folder
from controller.cli.history import part
from controller.cli.progress import Meter
from controller.cli.session import (
    ConfigOption,
    ConfirmRegionOption,
    EndpointOption,
    OutputOption,
    RequesterOption,
    Session,
    default_person,
    session,
)
from controller.domain.text import visible
from controller.errors import Corrupt, NotActive, Refused, Unavailable
from controller.runtime.salvage_documents import (
    LOST_STATES,
    Discarded,
    RegionSalvage,
    SalvageDamage,
    SalvagePage,
    SalvagePiece,
    SalvageRecord,
    receipt,
    receipt_line,
)
from controller.runtime.wording import size

SHOWN = 200
_STATES = {
    "only": ("only here", "yellow"),
    "other": ("only here: live has another body", "yellow"),
    "live": ("also in live history", ""),
    "own": ("controllers' own note", "dim"),
}

salvage_app = typer.Typer(
    help="Salvage: what a region had acknowledged alone when the fleet moved away from it. When the region comes back, this "
    "tail is cut off its store and kept. Any controller lists, shows and exports it; the active one discards it. Nothing is "
    "merged: what somebody still wants is exported, and given to its agent as new work.",
    no_args_is_help=True,
)

RegionArgument = Annotated[str, typer.Argument(metavar="REGION", help="Region whose store holds it.")]
SalvageArgument = Annotated[str, typer.Argument(metavar="SALVAGE", help="Its name, as `drctl salvage list` shows it.")]
AgentOption = Annotated[str | None, typer.Option("--agent", metavar="AGENT", help="Only this agent's records.")]


def _path(region: str, name: str = "", *rest: str) -> str:
    if not region:
        raise Usage("the region's name is empty", hint="drctl salvage list")
    return "/".join(("/v1/salvage", part(region), *([part(name)] if name else []), *(part(item) for item in rest)))


@salvage_app.command("list", epilog="Example: drctl salvage list eu-west-1")
def list_salvage(
    ctx: typer.Context,
    region: Annotated[str | None, typer.Argument(metavar="[REGION]", help="Default: every region.")] = None,
    agent: AgentOption = None,
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """Every tail that was cut off: where it lies, whose records are in it, and how many of them lie nowhere else.

    A record counts as also live when the live history has the same id with the very same body, as the answering region's copy
    knows it: an agent may have written it again elsewhere. When a tail was cut stands nowhere; it was after its last record.
    """
    here = session(ctx).use(endpoint, config, output)
    if region is None:
        found: tuple[RegionSalvage, ...] = here.client.get(tuple[RegionSalvage, ...], "/v1/salvage").value
    else:
        found = (here.client.get(RegionSalvage, _path(region)).value,)
    rows: list[dict[str, Any]] = []
    for one in found:
        for piece in one.pieces:
            pages = _pages(here, piece.region, piece.name, agent)
            records = [record for page in pages for record in page.records]
            if agent is None or records:
                rows.append(_summary(piece, pages, records))
    unknown = [{"region": one.region, "why": one.unknown} for one in found if one.unknown]
    if not here.emit({"salvage": rows, "unknown": unknown}):
        _print_list(here.console, rows)
    if unknown:
        raise Unavailable(
            f"the store of {', '.join(visible(one['region']) for one in unknown)} does not answer, and what salvage it "
            f"holds is not known: {unknown[0]['why']}",
            hint="drctl status; a region that is away has its salvage once it is back",
        )


def _pages(here: Session, region: str, name: str, agent: str | None) -> list[SalvagePage]:
    pages: list[SalvagePage] = []
    after = 0
    with Meter(here, f"reading {region}") as meter:
        while True:
            params: dict[str, str | int] = {"after": after} | ({} if agent is None else {"agent": agent})
            page: SalvagePage = here.client.get(SalvagePage, _path(region, name), params).value
            pages.append(page)
            total = page.piece.last_seq - page.piece.first_seq + 1
            meter.at(sum(one.segments for one in pages), total, name)
            if not page.after:
                return pages
            if page.after <= after:
                raise Corrupt("the controller's pages go back", hint="compare `drctl version` with the controllers'")
            after = page.after


def _summary(piece: SalvagePiece, pages: Sequence[SalvagePage], records: Sequence[SalvageRecord]) -> dict[str, Any]:
    states = Counter(record.state for record in records)
    lost = [record for record in records if record.state in LOST_STATES]
    return {
        **asdict(piece),
        "segments": piece.last_seq - piece.first_seq + 1,
        "records": len(records),
        "agents": len({record.agent for record in records if record.state != "own"}),
        "bytes": sum(record.size for record in records),
        "first_received_at": min((record.received_at for record in records), default=0.0),
        "last_received_at": max((record.received_at for record in records), default=0.0),
        "also_live": states["live"],
        "own": states["own"],
        "only_here": len(lost),
        "agents_only_here": len({record.agent for record in lost}),
        "damaged_segments": sum(len(page.damaged) for page in pages),
    }


def _print_list(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        console.print("There is none.")
        return
    table = render.table(
        "region", "salvage", "segments", "epochs", "cut by epoch", "last record", "records", "agents", "bytes", "also live",
        "only here", "damaged", right=("segments", "records", "agents", "bytes", "also live", "only here", "damaged"),
    )  # fmt: skip
    for row in rows:
        table.add_row(
            render.text(row["region"]),
            render.text(row["name"], "cyan", 300),
            f"{row['segments']:,}",
            render.text(", ".join(str(start["epoch"]) for start in row["epochs"])),
            str(row["by_epoch"]),
            render.stamp(row["last_received_at"]),
            f"{row['records']:,}",
            f"{row['agents']:,}",
            size(row["bytes"]),
            f"{row['also_live']:,}",
            render.text(f"{row['only_here']:,}", "yellow" if row["only_here"] else "green"),
            render.text(f"{row['damaged_segments']:,}", "red" if row["damaged_segments"] else ""),
        )
    console.print(table)
    first = rows[0]
    console.print(render.text(f"next: drctl salvage show {first['region']} {first['name']}", "bold", 1000), soft_wrap=True)


# ------------------------------------------------------------------------------------------------------------------ show


@salvage_app.command(epilog="Example: drctl salvage show eu-west-1 s00.5-8.0123456789abcdef --agent agent-007")
def show(
    ctx: typer.Context,
    region: RegionArgument,
    salvage: SalvageArgument,
    agent: AgentOption = None,
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """The records of one salvage, agent by agent: which lie nowhere else, and what is newest in the live history."""
    here = session(ctx).use(endpoint, config, output)
    pages = _pages(here, region, salvage, agent)
    records = sorted((one for page in pages for one in page.records), key=lambda one: (one.agent, one.seq, one.ordinal))
    damaged = [one for page in pages for one in page.damaged]
    summary = _summary(pages[0].piece, pages, records)
    if here.emit({**summary, "found": [asdict(one) for one in records], "damaged": [asdict(one) for one in damaged]}):
        return
    console = here.console
    if records:
        _print_records(console, records)
    else:
        console.print("There are no such records in it.")
    _print_damage(console, damaged)
    words = f"{len(records):,} records: {summary['only_here']:,} only here, {summary['also_live']:,} also in the live history"
    console.print(render.text(words, "bold"), soft_wrap=True)
    console.print(render.text(f"next: drctl salvage export {region} {salvage} --to DIR", "bold", 1000), soft_wrap=True)


def _print_records(console: Console, records: Sequence[SalvageRecord]) -> None:
    table = render.table("agent", "id", "kind", "received", "size", "place", "", "live latest of the kind", right=("size",))
    for one in records[:SHOWN]:
        word, style = _STATES.get(one.state, (one.state, ""))
        live = f"{one.latest} ({render.stamp(one.latest_at)})" if one.latest else "none"
        table.add_row(
            render.text(one.agent, limit=100),
            render.text(one.id, "cyan", 120),
            render.text(one.kind),
            render.stamp(one.received_at),
            size(one.size),
            f"{visible(one.stream)} {one.seq:,}.{one.ordinal}",
            render.text(word, style),
            render.text(live, limit=160),
        )
    console.print(table)
    if len(records) > SHOWN:
        console.print(f"… and {len(records) - SHOWN:,} more; --agent AGENT shows one agent's, --output json has all")


def _print_damage(console: Console, damaged: Sequence[SalvageDamage]) -> None:
    for one in damaged[:20]:
        console.print(render.text(f"damaged: {one.key}: {one.why}", "red", 600), soft_wrap=True)
    if damaged:
        console.print("What was in it is not known here: drctl verify REGION, then drctl repair REGION.", soft_wrap=True)


# ---------------------------------------------------------------------------------------------------------------- export


@salvage_app.command(epilog="Example: drctl salvage export eu-west-1 s00.5-8.0123456789abcdef --to salvage-of-monday")
def export(
    ctx: typer.Context,
    region: RegionArgument,
    salvage: SalvageArgument,
    agent: AgentOption = None,
    to: Annotated[Path | None, typer.Option("--to", metavar="DIR", help="Folder that is made or filled.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is in the folder.")] = False,
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """Write every body to a file, with a manifest.json that has each one's hash and place: as `drctl checkpoints export` does.

    Each body is proven by its hash. The manifest of a whole export (without --agent) is the receipt that `drctl salvage discard
    --exported DIR/manifest.json` asks for. An export that was interrupted can be repeated. Exit code 8: some could not be read;
    the manifest says which.
    """
    here = session(ctx).use(endpoint, config, output)
    if to is None:
        raise Usage("--to is missing", hint="name the folder: --to DIR")
    pages = _pages(here, region, salvage, agent)
    piece = pages[0].piece
    records = [one for page in pages for one in page.records]
    missing: list[dict[str, Any]] = [asdict(one) for page in pages for one in page.damaged]
    if not records and not missing:
        raise Refused(f"salvage {visible(salvage, 300)} has no such records", hint=f"drctl salvage show {region} {salvage}")
    folder = Folder(to, force=force)
    with Meter(here, "exporting") as meter:
        for done, one in enumerate(records):
            meter.at(done, len(records), one.agent)
            try:
                folder.add(one, here.client.body(_path(region, salvage, "bodies", str(one.seq), str(one.ordinal))))
            except Corrupt as error:
                missing.append({**asdict(one), "why": error.message})
    lines = [receipt_line(one.seq, one.ordinal, one.agent, one.id, one.sha256, one.size) for one in records]
    whole = agent is None and not missing
    digest = receipt(piece.name, piece.chain, lines) if whole else ""
    about = {"salvage": asdict(piece), "digest": digest, "exported_at": time.time()}
    manifest = folder.finish(about, missing)
    if not here.emit({**manifest, "folder": str(to)}):
        words = f"{len(manifest['records']):,} bodies with {size(folder.bytes)} are in {to}, listed in {to / MANIFEST}"
        here.console.print(render.text(words, "green", 2000), soft_wrap=True)
        if whole:
            words = (
                f"next, when nobody needs it in {region}: drctl salvage discard {region} {salvage} --exported {to / MANIFEST}"
            )
            here.console.print(render.text(words, "bold", 2000), soft_wrap=True)
    if missing:
        raise Corrupt(
            f"{len(missing):,} segments or records of {visible(salvage, 300)} could not be read: see `missing` in the manifest",
            hint=f"drctl verify {region}, then drctl repair {region}: another region may have them; then export again",
        )


# --------------------------------------------------------------------------------------------------------------- discard


@salvage_app.command(epilog="Example: drctl salvage discard eu-west-1 s00.5-8.0123456789abcdef --exported monday/manifest.json")
def discard(
    ctx: typer.Context,
    region: RegionArgument,
    salvage: SalvageArgument,
    exported: Annotated[
        Path | None, typer.Option("--exported", metavar="FILE", help="The manifest.json of its export, as a receipt.")
    ] = None,
    even_unexported: Annotated[
        str | None, typer.Option("--even-unexported", metavar="REASON", help="Lose what lies only here; stands in the audit.")
    ] = None,
    execute: Annotated[bool, typer.Option("--execute", help="Do it. Without this only what would be lost is shown.")] = False,
    confirm: ConfirmRegionOption = None,
    requester: RequesterOption = None,
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """Let go of a salvage for good. Dry run unless --execute is given.

    Says first what would be lost: records whose bodies lie nowhere else. While there are any it is refused without a receipt
    (the manifest of a whole export, whose files are all still there and are what this salvage holds now), unless a reason is
    stated (--even-unexported). Only the active controller does it. Repeat it after an interruption: it goes on.
    """
    here = session(ctx).use(endpoint, config, output)
    if exported is not None and even_unexported is not None:
        raise Usage("give --exported or --even-unexported, not both", hint="drctl salvage discard --help")
    if even_unexported is not None and not even_unexported.strip():
        raise Usage("--even-unexported needs a reason", hint='--even-unexported "nobody wants it: ticket 123"')
    digest = "" if exported is None else read_receipt(exported, salvage)
    body: dict[str, object] = {"digest": digest, "even_unexported": even_unexported or ""}
    found, raw = _ask(here, region, salvage, body)
    if digest and found.state == "would" and found.digest and digest != found.digest:
        raise Refused(
            f"what {exported} lists is not what salvage {visible(salvage, 300)} holds now",
            hint=f"export it again: drctl salvage export {region} {salvage} --to DIR",
        )
    if execute and found.state == "would":
        here.notes.print(render.text(found.sentence, "yellow", 1000), soft_wrap=True)
        _confirm(here, region, confirm)
        body |= {"execute": True, "confirm": region, "requester": requester or default_person()}
        with Meter(here, "discarding") as meter:
            deleted = 0
            while found.state in ("would", "left"):
                found, raw = _ask(here, region, salvage, body)
                deleted += found.deleted
                meter.at(deleted, None)
    if here.emit({**raw, "executed": execute}):
        return
    style = "green" if found.state in ("done", "gone") else "yellow"
    here.console.print(render.text(f"{region} {salvage}: {found.sentence}", style, 1000), soft_wrap=True)
    if found.state == "would":
        proof = f"--exported {exported}" if exported else "--exported DIR/manifest.json" if found.lost else ""
        command = " ".join(f"drctl salvage discard {region} {salvage} {proof} --execute --confirm {region}".split())
        here.console.print(render.text(f"Dry run: nothing was done. To do it: {command}", "bold", 2000), soft_wrap=True)


def _ask(here: Session, region: str, salvage: str, body: dict[str, object]) -> tuple[Discarded, Any]:
    try:
        answer = here.client.post(Discarded, _path(region, salvage, "discard"), body)
    except NotActive as error:
        raise Unavailable(
            f"no controller is active, and only the active one can discard: {error.message}", hint="drctl status"
        ) from error
    return answer.value, answer.raw


def _confirm(here: Session, region: str, given: str | None) -> None:
    if given is None:
        if not sys.stdin.isatty():
            raise Usage("a discard needs a confirmation, and there is no terminal to ask on", hint=f"add --confirm {region}")
        given = here.ask("What lies only there is gone for good. Type the name of the region to do it:")
    if given != region:
        raise Usage(f"{visible(given, 64)!r} is not {visible(region, 64)}; nothing was sent", hint="look again first")


def read_receipt(path: Path, salvage: str) -> str:
    """The digest of what a manifest lists, made anew from its entries after every file was read and compared with its hash.
    Raises Refused, Corrupt, Unavailable."""
    try:
        manifest = json.loads(path.read_bytes())
        piece, records = manifest["salvage"], manifest["records"]
        name, chain, said, missing = str(piece["name"]), str(piece["chain"]), str(manifest["digest"]), manifest["missing"]
        lines = [
            receipt_line(int(one["seq"]), int(one["ordinal"]), one["agent"], one["id"], one["sha256"], int(one["size"]))
            for one in records
        ]
        files = [(path.parent / str(one["file"]), str(one["sha256"])) for one in records]
    except OSError as error:
        raise Unavailable(f"{path}: {error.strerror or error}", hint="name the manifest.json of the export") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(f"{path} is no manifest of a salvage's export", hint="drctl salvage export writes one") from error
    if name != salvage:
        raise Refused(f"{path} is of salvage {visible(name, 300)}, not of {visible(salvage, 300)}", hint="name the right one")
    if missing or not said:
        raise Refused(
            f"{path} is not of a whole export: {len(missing):,} parts are missing, or it is of one agent only",
            hint="export all of it: drctl salvage export REGION SALVAGE --to DIR",
        )
    for file, digest in files:
        try:
            found = hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError as error:
            raise Refused(
                f"{file}: {error.strerror or error}", hint="the export is not whole any more: export again"
            ) from error
        if found != digest:
            raise Corrupt(f"{file} does not hold what was exported", hint="export again, into another folder")
    made = receipt(name, chain, lines)
    if made != said:
        raise Corrupt(f"{path} was changed: its digest is not that of what it lists", hint="export again, into another folder")
    return made
