"""The child process of ``controller.lab.aws``: one ministack, on loopback, until its parent is gone.

``python -m controller.lab.aws_serve HOST PORT READY_FD PARENT [JOURNAL]``: PORT 0 = any free one; the port in use is written
to READY_FD, as
text, once requests can be made. The socket is bound before ministack is imported, so there is no moment in which somebody
else can take the port. JOURNAL: a file that makes it survive SIGKILL (``aws_journal``).
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from pathlib import Path

from controller.lab.aws_journal import Journaled, drawn_id

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Asks Linux to kill this process when its parent ends, however that happens. ``parent``: who started us (it may be
    gone by now).
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def main(host: str, port: int, ready_fd: int, parent: int, journal: str = "") -> None:
    die_with_parent(parent)
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    port = listener.getsockname()[1]
    os.environ["GATEWAY_PORT"] = str(port)  # read by ministack when it is imported
    os.environ["MINISTACK_HOST"] = host

    import ministack.core.responses
    import uvicorn

    if journal:  # before anything else of it is imported
        ministack.core.responses.new_uuid = drawn_id
    from ministack.app import app

    if journal:
        app = Journaled(app, Path(journal))

    listener.listen(1024)
    with os.fdopen(ready_fd, "w") as ready:
        ready.write(f"{port}\n")
    # Longer than clients keep an idle connection (aiohttp: 15 s): else closing one here races with the next request on it.
    config = uvicorn.Config(app, loop="uvloop", http="httptools", log_level="warning", access_log=False, timeout_keep_alive=75)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
