"""The log of the daemon: one JSON object per line on standard error, whoever writes it.

Also what libraries log (uvicorn, asyncio, botocore) and warnings go through here: their messages hold names, paths and whole
exceptions, in plain text of several lines. Every value passes ``visible`` *before* JSON escapes it: people read logs through
tools that undo JSON.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, TextIO

import stamina.instrumentation
import structlog
from structlog.typing import Processor

from controller.domain.text import MAX_TEXT_CHARS, visible

MAX_TRACEBACK_CHARS = 16_000
MAX_ITEMS = 50
"""Entries of one list or table in a log line."""
MAX_DEPTH = 4


def harmless(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Last step before JSON: every text escaped and capped, everything that JSON does not know as text."""
    # A traceback is several lines; JSON keeps them in one.
    trace = event.pop("exception", None)
    found: MutableMapping[str, Any] = {visible(key, 100): _value(value, 0) for key, value in event.items()}
    if trace is not None:
        found["exception"] = visible(trace, MAX_TRACEBACK_CHARS, keep="\n")
    return found


def _value(value: object, depth: int) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping) and depth < MAX_DEPTH:
        return {visible(key, 100): _value(value[key], depth + 1) for key in list(value)[:MAX_ITEMS]}
    if isinstance(value, list | tuple | set | frozenset) and depth < MAX_DEPTH:
        return [_value(item, depth + 1) for item in list(value)[:MAX_ITEMS]]
    return visible(value, MAX_TEXT_CHARS)


def configure_logging(stream: TextIO | None = None) -> None:
    """Sets both ways of logging up, this package's and the standard library's. ``stream``: standard error when left out."""
    stream = stream or sys.stderr
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            *_common(),
            structlog.processors.format_exc_info,
            harmless,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *_common()],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                harmless,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    # A retry inside an adapter is not news; what it could not mend arrives as an error and is said once, with its reason.
    stamina.instrumentation.set_on_retry_hooks([])


def _common() -> list[Processor]:
    return [structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso", utc=True)]
