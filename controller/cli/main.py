"""``drctl``: mounts the commands, and turns every error into one sentence, a hint and a stable exit code.

Exit codes are those of ``controller.errors``; 130: ended by Ctrl-C at a prompt, nothing was sent.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Sequence

import typer

from controller.cli import group, history, look, ops, plans, restore, salvage, token, verify
from controller.cli.client import Usage
from controller.cli.session import (
    CaFileOption,
    CertFileOption,
    ConfigOption,
    EndpointOption,
    Interrupted,
    KeyFileOption,
    Output,
    OutputOption,
    Session,
    TokenFileOption,
    session,
)
from controller.domain.text import MAX_TEXT_CHARS, visible
from controller.errors import DrError

UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""The command-line parser's own error; its module differs between versions of typer."""

INTERRUPTED = 130

EPILOG = """At 3 a.m.: `drctl status`, then `drctl plan failover --to REGION --reason WHY`, then two people
`drctl approve PLAN --key ~/.ssh/id_ed25519`, then `drctl promote PLAN --execute --confirm REGION --wait`.

Controllers are found by --endpoint, --config FILE, DRCTL_ENDPOINTS (separated by spaces or commas) or DR_CONFIG, in this order.

Where controllers ask who calls: --token-file (or DR_TOKEN_FILE), and --ca-file for their authority, before the command.

Exit codes: 0 done, 2 wrong command line, 3 nobody answers, 4 fenced, 5 refused by a rule, 6 approvals missing, 7 wrong
settings, 8 damaged data, 9 not let in, 130 interrupted, 1 a bug."""

app = typer.Typer(
    name="drctl",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(epilog=EPILOG)
def options(
    ctx: typer.Context,
    endpoint: EndpointOption = None,
    config: ConfigOption = None,
    output: OutputOption = None,
    token_file: TokenFileOption = None,
    ca_file: CaFileOption = None,
    cert_file: CertFileOption = None,
    key_file: KeyFileOption = None,
) -> None:
    """Disaster recovery for fleets of AI agents: see how far regions are behind, plan a move, approve it, run it."""
    here = session(ctx).use(endpoint, config, output)
    here.token_file, here.ca_file, here.cert_file, here.key_file = token_file, ca_file, cert_file, key_file


app.command(epilog="Example: drctl status --watch --config config/lab.toml")(look.status)
app.command(epilog="Example: drctl lag --output json")(look.lag)
app.command()(look.agents)
app.command()(look.members)
app.command()(look.incidents)
app.add_typer(plans.plan_app, name="plan")
app.command(epilog="Example: drctl approve PLAN --key ~/.ssh/id_ed25519 --principal alice@example.com")(plans.approve)
app.command(epilog="Example: drctl promote PLAN --execute --confirm eu-central-1 --wait")(plans.promote)
app.command()(look.journal)
app.add_typer(look.audit_app, name="audit")
app.add_typer(history.checkpoints_app, name="checkpoints")
app.command(epilog="Example: drctl restore --as-of 2h --agent agent-007")(restore.restore)
app.add_typer(salvage.salvage_app, name="salvage")
app.command(epilog="Example: drctl verify eu-central-1")(verify.verify)
app.command(epilog="Example: drctl repair eu-central-1 --execute --confirm eu-central-1")(verify.repair)
app.command(epilog="Example: drctl serve --config /etc/dr/controller.toml")(ops.serve)
app.add_typer(ops.config_app, name="config")
app.add_typer(token.token_app, name="token")
app.command(epilog="Example: drctl bootstrap --config /etc/dr/controller.toml --region eu-west-1")(group.bootstrap)
app.command(epilog="Example: drctl recover --config /etc/dr/controller.toml")(group.recover)
app.command()(ops.version)


def _mount_lab() -> None:
    """``drctl lab`` exists where its extra is installed; everything else works without it."""
    try:
        lab = importlib.import_module("controller.cli.lab")
    except ImportError as error:
        missing = error.name or "a package"

        def absent() -> None:
            raise Usage(f"the lab needs {missing}, which is not installed", hint="pip install 'agent-dr[controller,lab]'")

        app.command("lab", help="Three regions on one machine (needs the extra `lab`).")(absent)
    else:
        app.add_typer(lab.lab_app, name="lab")


_mount_lab()


def _wants_json(here: Session, argv: Sequence[str]) -> bool:
    """Also when the command line could not be read to its end."""
    joined = " ".join(argv)
    return here.output is Output.JSON or any(
        f"{option}{sep}json" in joined for option in ("--output", "-o") for sep in (" ", "=")
    )


def _tell(error: DrError, as_json: bool) -> int:
    if as_json:
        found = error.to_dict()
        sys.stderr.write(json.dumps({"error": {**found, "message": _cut(error.message)}}, ensure_ascii=True) + "\n")
    else:
        sys.stderr.write(f"error: {visible(error.message, keep=chr(10))}\n")
        if error.hint:
            sys.stderr.write(f"hint: {visible(error.hint, keep=chr(10))}\n")
    return error.exit_code


def _cut(text: str) -> str:
    """As long as it is shown to people: some messages repeat what was typed."""
    return text if len(text) <= MAX_TEXT_CHARS else text[:MAX_TEXT_CHARS] + "…"


def _check_text(argv: Sequence[str]) -> None:
    """Raises Usage for bytes that are no text: names, ids and paths all go into requests and documents."""
    for word in argv:
        if any("\ud800" <= char <= "\udfff" for char in word):
            raise Usage(
                f"{ascii(word)[:200]} is not UTF-8", hint="type it anew; a name may have been pasted in another encoding"
            )


def _interrupted(what: str, here: Session, argv: Sequence[str]) -> int:
    if _wants_json(here, argv):
        found = {"code": "interrupted", "message": f"interrupted; {what}", "hint": "", "exit_code": INTERRUPTED}
        sys.stderr.write(json.dumps({"error": found}) + "\n")
    else:
        sys.stderr.write(f"\ninterrupted; {what}\n")
    return INTERRUPTED


def run(argv: Sequence[str]) -> int:
    """One command. Returns its exit code; never raises but for bugs in the interpreter."""
    here = Session()
    try:
        _check_text(argv)
        result = app(args=list(argv), prog_name="drctl", standalone_mode=False, obj=here)
        return result if isinstance(result, int) else 0
    except DrError as error:
        return _tell(error, _wants_json(here, argv))
    except UsageError as error:
        words = getattr(error, "format_message", None)
        message = words() if words is not None else str(error)
        path = getattr(getattr(error, "ctx", None), "command_path", "drctl")
        if not message:  # the group was called without a command: its help has been printed
            return Usage.exit_code
        return _tell(Usage(message, hint=f"{path} --help"), _wants_json(here, argv))
    except typer.Exit as done:
        return done.exit_code
    except Interrupted:
        return _interrupted("nothing was sent", here, argv)
    except (typer.Abort, KeyboardInterrupt):
        return _interrupted("a change that was on its way may have been done: drctl plan list", here, argv)
    except BrokenPipeError:
        # The reader (head, less) went away. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 - the last resort: a person must never see a traceback in place of a sentence
        if os.environ.get("DRCTL_DEBUG"):
            traceback.print_exc()
        found = DrError(
            f"drctl met an error that it did not foresee: {type(error).__name__}: {error}",
            hint="report it; DRCTL_DEBUG=1 shows where",
        )
        return _tell(found, _wants_json(here, argv))
    finally:
        here.close()


def main() -> None:
    """Entry point of ``drctl``."""
    sys.exit(run(sys.argv[1:]))
