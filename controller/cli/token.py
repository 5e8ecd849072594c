"""``drctl token``: who may call this group's controllers. Works on the access file of the settings, which an operator brings to
every controller as other settings are brought there; controllers read it again by themselves, within seconds."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from controller.cli import render
from controller.cli.client import Usage
from controller.cli.session import OutputOption, Session, session
from controller.domain.access import CallerRole
from controller.domain.text import visible
from controller.errors import Refused

if TYPE_CHECKING:
    from controller.adapters.access import AccessDocument

token_app = typer.Typer(
    help="Who may call the controllers: tokens and client certificates, in the access file (api.access_file).",
    no_args_is_help=True,
)

FileOption = Annotated[
    Path | None,
    typer.Option("--file", metavar="FILE", help="The access file; default: api.access_file of the settings."),
]
GroupOption = Annotated[
    str, typer.Option("--group", help="The group, when the file does not exist yet; default: that of the settings.")
]
ConfigOption = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="Settings file; default: DR_CONFIG.")]
DAY_SECONDS = 86_400.0
SOON_DAYS = 14


@token_app.command(
    epilog="Examples: drctl token create worker-1 --role agent --agents 'team-a/*' --hosts worker-1 --days 90 ; "
    "drctl token create ada@example.com --role operator ; "
    "drctl token create grafana --role viewer --certificate grafana.example.com"
)
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="Of the token. An operator's is the name under which they approve.")],
    role: Annotated[CallerRole, typer.Option("--role", help="What the caller is.")],
    agents: Annotated[
        list[str] | None, typer.Option("--agents", help="Role agent: a name, or a beginning and '*'; repeat for more.")
    ] = None,
    hosts: Annotated[
        list[str] | None, typer.Option("--hosts", help="Role agent: hosts that it reports for; the same form.")
    ] = None,
    person: Annotated[
        str, typer.Option("--person", help="Whose it is, by the name in allowed_signers, when NAME is another one.")
    ] = "",
    days: Annotated[float, typer.Option("--days", min=0.0, max=3650.0, help="Valid for so long; 0: until it is revoked.")] = 90,
    certificate: Annotated[
        str,
        typer.Option("--certificate", metavar="SAN", help="No token: a name (DNS, URI) in the caller's client certificate."),
    ] = "",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the secret there (mode 600) instead of printing it.")
    ] = None,
    file: FileOption = None,
    group: GroupOption = "",
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """Add a caller. The secret is shown once and kept nowhere: the file has its hash."""
    from controller.adapters.access import AccessDocument, new_token, with_entry
    from controller.adapters.access_edit import change_document

    here = session(ctx).use(None, config, output)
    path, named = _place(here, file, group)
    now, secret = time.time(), ""
    entry: dict[str, Any] = {"name": name, "role": role.value, "person": person, "created_at": now}
    entry |= {
        "agents": tuple(agents or ()),
        "hosts": tuple(hosts or ()),
        "expires_at": now + days * DAY_SECONDS if days else None,
    }
    entry["certificate"] = certificate or None

    def add(found: AccessDocument | None) -> AccessDocument:
        nonlocal secret
        document = found or AccessDocument(group=_group(named))
        if named and named != document.group:
            raise Refused(f"{path} is that of group {document.group}, not of {named}", hint="name another file with --file")
        secret, entry["sha256"] = ("", None) if certificate else new_token(document.group)
        changed = with_entry(document, entry)
        if out is not None and secret:
            _keep(out, secret)
        return changed

    document = change_document(path, add)
    told = {"name": name, "role": role.value, "group": document.group, "file": str(path), "expires_at": entry["expires_at"]}
    if here.emit({**told, **({"token": secret} if secret and out is None else {"token_file": str(out)} if out else {})}):
        return
    if secret and out is None:
        here.console.print(secret, soft_wrap=True)
        here.notes.print("This is shown once. Put it into a file that only its user may read.", soft_wrap=True)
    here.notes.print(
        f"{visible(path)} has {visible(name)} now; bring the file to every controller: they read it by themselves.",
        soft_wrap=True,
    )


@token_app.command("list")
def list_(ctx: typer.Context, file: FileOption = None, config: ConfigOption = None, output: OutputOption = None) -> None:
    """Who may call, as what, for whose agents, and until when. No secret is in the file, so none is shown."""
    from controller.adapters import access_edit

    here = session(ctx).use(None, config, output)
    document = _read(here, file)[1]
    gone = [one.model_dump(exclude={"revoked_at"}) | {"revoked_at": one.revoked_at or None} for one in document.revoked]
    rows = [
        {
            "name": entry.name,
            "role": entry.role.value,
            "person": entry.person or entry.name,
            "by": "token" if entry.sha256 else f"certificate {entry.certificate}",
            "agents": list(entry.agents),
            "hosts": list(entry.hosts),
            "expires_at": entry.expires_at,
            "expired": entry.expires_at is not None and entry.expires_at <= time.time(),
        }
        for entry in document.entries
    ]
    if here.emit({"group": document.group, "entries": rows, "revoked": gone}):
        return
    table = Table("name", "role", "by", "agents", "hosts", "until", box=None, pad_edge=False)
    for row in rows:
        style = "red" if row["expired"] else ""
        cells = (
            row["name"],
            row["role"],
            row["by"],
            " ".join(_words(row["agents"])),
            " ".join(_words(row["hosts"])),
            _until(row),
        )
        table.add_row(*(render.text(cell, style) for cell in cells))
    here.console.print(table)
    for one in document.revoked:
        why = f" ({one.reason})" if one.reason else ""
        here.console.print(visible(f"revoked: {access_edit.told(one)}{why}"), style="red", soft_wrap=True)


@token_app.command(epilog="Example: drctl token revoke worker-1")
def revoke(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="As `drctl token list` shows it.")],
    file: FileOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """Strike a caller off. It counts when the file has reached every controller, within seconds of that."""
    from controller.adapters.access import without_entry
    from controller.adapters.access_edit import change_document

    here = session(ctx).use(None, config, output)
    path, _ = _place(here, file, "")
    change_document(path, lambda found: without_entry(_there(path, found), name))
    if not here.emit({"revoked": name, "file": str(path)}):
        here.notes.print(f"{visible(name)} is struck off {visible(path)}; bring the file to every controller.", soft_wrap=True)


@token_app.command(
    epilog="Examples: drctl token revoke-certificate worker-1.pem --reason 'laptop lost' ; "
    "drctl token revoke-certificate 9f:86:d0:…:0a:08 ; "
    "drctl token revoke-certificate --name drctl://fleet/eu-west-1/a ; "
    "drctl token revoke-certificate 9f86d0…0a08 --lift"
)
def revoke_certificate(
    ctx: typer.Context,
    certificate: Annotated[
        str, typer.Argument(metavar="[CERTIFICATE]", help="Its file (PEM), or its SHA-256 fingerprint in hex.")
    ] = "",
    name: Annotated[
        str, typer.Option("--name", metavar="SAN", help="Instead: every certificate that has this name, renewed ones too.")
    ] = "",
    reason: Annotated[str, typer.Option("--reason", help="For whoever reads the list.")] = "",
    lift: Annotated[bool, typer.Option("--lift", help="Take it off the list again.")] = False,
    file: FileOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
) -> None:
    """Refuse a client certificate that its authority still vouches for, a controller's too.

    It counts when the file has reached every controller, within seconds of that, also for connections that stand. etcd knows
    nothing of it: give its members a revocation list (--client-crl-file). `drctl token revoke` strikes off a caller instead.
    """
    from controller.adapters.access import Revoked
    from controller.adapters.access_edit import change_document, fingerprint_of, told, with_revoked, without_revoked

    here = session(ctx).use(None, config, output)
    if bool(certificate) == bool(name):
        raise Usage("which certificate?", hint="give its file or its fingerprint, or --name SAN")
    path, _ = _place(here, file, "")
    fingerprint = fingerprint_of(certificate) if certificate else None
    try:
        one = Revoked(fingerprint=fingerprint, certificate=name or None, reason=reason, revoked_at=time.time())
    except ValueError:
        raise Refused("a name has at most 255 characters and a reason 200", hint="say it shorter") from None

    def change(found: AccessDocument | None) -> AccessDocument:
        document = _there(path, found)
        return without_revoked(document, fingerprint, name or None) if lift else with_revoked(document, one)

    change_document(path, change)
    done = {"fingerprint": fingerprint, "certificate": name or None, "revoked": not lift, "file": str(path)}
    if not here.emit(done):
        what = "is not revoked any more" if lift else "is revoked"
        here.notes.print(visible(f"{told(one)} {what}; bring {path} to every controller."), soft_wrap=True)


def _there(path: Path, found: AccessDocument | None) -> AccessDocument:
    if found is None:
        raise Refused(f"there is no {path}", hint="make one: drctl token create")
    return found


def _read(here: Session, file: Path | None) -> tuple[Path, AccessDocument]:
    from controller.adapters.access import read_document

    path, _ = _place(here, file, "")
    return path, read_document(path)


def _place(here: Session, file: Path | None, group: str) -> tuple[Path, str]:
    """The access file, and the group's name where it is known. Raises Usage."""
    settings = here.settings_document()
    named = group or str(settings.get("group") or "")
    if file is not None:
        return file, group
    api = settings.get("api")
    found = api.get("access_file") if isinstance(api, dict) else None
    if not isinstance(found, str):
        raise Usage("no access file is named", hint="give --file FILE, or --config FILE whose [api] has access_file")
    folder = here.settings_folder()
    return folder / found, named


def _group(name: str) -> str:
    if not name:
        raise Usage("the file does not exist yet and no group is named", hint="add --group GROUP")
    return name


def _keep(path: Path, secret: str) -> None:
    """Raises Refused rather than to write over something."""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(secret + "\n")
    except FileExistsError:
        raise Refused(f"{path} exists; nothing was written", hint="name another file with --out") from None
    except OSError as error:
        raise Refused(f"{path} cannot be written: {error.strerror}", hint="name another file with --out") from error


def _words(values: object) -> list[str]:
    return [str(value) for value in values] if isinstance(values, list) else []


def _until(row: dict[str, Any]) -> str:
    if row["expires_at"] is None:
        return "it is revoked"
    at = datetime.fromtimestamp(row["expires_at"], UTC)
    left = (row["expires_at"] - time.time()) / DAY_SECONDS
    return f"{at:%Y-%m-%d %H:%M} UTC" + (" (expired)" if left <= 0 else f" (in {left:.0f} days)" if left < SOON_DAYS else "")


__all__ = ["create", "list_", "revoke", "revoke_certificate", "token_app"]
