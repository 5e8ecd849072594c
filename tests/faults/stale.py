"""What a run leaves when it is killed, and how the next one finds it. Namespaces and mounts vanish by themselves."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from controller.errors import DrError
from controller.lab.ending import read_note
from controller.lab.layout import Layout
from controller.lab.processes import start_ticks, sweep

FOLDER = "dr-faults-"
JUST_MADE_SECONDS = 10.0


def new_folder() -> Path:
    """A folder that says whose it is."""
    folder = Path(tempfile.mkdtemp(prefix=FOLDER))
    (folder / "owner.json").write_text(json.dumps([os.getpid(), start_ticks(os.getpid())]))
    return folder


def clear_stale(say: Callable[[str], None]) -> None:
    """Ends and removes what a run has left whose process is gone: processes, frozen file systems, loop devices, files."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        owner = _owner(folder)
        if owner is not None and start_ticks(owner[0]) == owner[1]:
            continue
        if owner is None and folder.exists() and time.time() - folder.stat().st_mtime < JUST_MADE_SECONDS:
            continue  # somebody else begins at this moment
        layout = Layout(folder / "lab")
        with contextlib.suppress(DrError, OSError, ValueError):
            sweep(layout.root, str(read_note(layout).get("identity", "")))
        listed = subprocess.run(["losetup", "-l", "-n", "-O", "NAME,BACK-FILE"], capture_output=True, text=True, check=False)
        for line in listed.stdout.splitlines():
            device, _, file = line.partition(" ")
            if file.strip().startswith(str(folder)):
                _release(device)
        shutil.rmtree(folder, ignore_errors=True)
        say(f"removed what an earlier run had left in {folder.name}")


def _owner(folder: Path) -> tuple[int, int] | None:
    try:
        pid, ticks = json.loads((folder / "owner.json").read_text())
        return int(pid), int(ticks)
    except (OSError, ValueError, TypeError):
        return None


def _release(device: str) -> None:
    """A file system that was frozen when its last mount went away stays frozen, and its device busy: mount, thaw, unmount."""
    with tempfile.TemporaryDirectory() as point:
        subprocess.run(["mount", device, point], capture_output=True, check=False)
        subprocess.run(["fsfreeze", "-u", point], capture_output=True, check=False)
        subprocess.run(["umount", point], capture_output=True, check=False)
    subprocess.run(["losetup", "-d", device], capture_output=True, check=False)
