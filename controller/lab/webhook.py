"""A receiver for pages: prints each one and appends it to a file as a JSON line, so that tests and people see what was paged.

Run as ``python -m controller.lab.webhook --host 127.0.0.32 --port 8090 --file pages.jsonl``. ``POST /`` (any path) takes a
JSON object; ``GET /`` returns the pages received since the start. When it listens it prints one JSON line,
``{"event": "ready", "host": …, "port": …}``. It ends with its parent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import sys
import time
from collections import deque
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from controller.lab.dns_server import end_with_parent

MAX_BYTES = 64 * 1024
MAX_PAGES = 1000
"""Pages kept in memory for ``GET``; the file has all of them."""


def application(file: Path, *, echo: bool = True) -> Starlette:
    """The receiver as an ASGI application. A page is in the file, whole, before it is answered."""
    pages: deque[dict[str, object]] = deque(maxlen=MAX_PAGES)

    async def take(request: Request) -> Response:
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_BYTES:
                return JSONResponse({"error": f"a page has at most {MAX_BYTES} bytes"}, status_code=413)
        try:
            page = json.loads(data)
        except (ValueError, RecursionError):
            page = None
        if not isinstance(page, dict):
            return JSONResponse({"error": "a page is a JSON object"}, status_code=400)
        page["received_at"] = time.time()
        line = json.dumps(page)  # ASCII only: what a stranger wrote cannot steer the terminal.
        with file.open("a", encoding="ascii") as out:
            out.write(line + "\n")
        if echo:
            print(line, flush=True)
        pages.append(page)
        return Response(status_code=204)

    async def show(_: Request) -> Response:
        return Response(json.dumps(list(pages)), media_type="application/json")

    return Starlette(routes=[Route("/{path:path}", take, methods=["POST"]), Route("/{path:path}", show, methods=["GET"])])


async def serve(host: str, port: int, file: Path) -> None:
    """Serves until SIGTERM or SIGINT (uvicorn handles both)."""
    listening = socket.create_server((host, port))
    print(json.dumps({"event": "ready", "host": host, "port": listening.getsockname()[1]}), flush=True)
    config = uvicorn.Config(application(file), log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    await uvicorn.Server(config).serve(sockets=[listening])


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m controller.lab.webhook", description="The lab's receiver of pages.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8090, help="0 takes a free one")
    parser.add_argument("--file", type=Path, required=True, help="JSON lines, appended")
    arguments = parser.parse_args()
    end_with_parent()
    # uvicorn ends gracefully and then raises the signal again for whoever was in charge before: being stopped is success.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    asyncio.run(serve(arguments.host, arguments.port, arguments.file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
