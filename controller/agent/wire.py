"""The HTTP documents that agents exchange with a controller. Pure: bytes to values and back.

What an answer *proves* is decided here, once, by the class of the error: ``Unavailable`` and ``NotActive`` say that nothing was
taken; ``OutcomeUnknown`` says that nobody knows; everything that cannot be understood is of the second kind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import msgspec

from controller.agent.errors import Fenced
from controller.domain.model import AgentSeen, Beat, BeatAnswer, IngestAnswer, Record
from controller.errors import (
    ApprovalRequired,
    Conflict,
    Corrupt,
    DrError,
    FenceLost,
    Forbidden,
    Misconfigured,
    NotActive,
    NotFound,
    OutcomeUnknown,
    Refused,
    Throttled,
    Unauthenticated,
    Unavailable,
)

STALE_ATTEMPT = "stale_attempt"
UNKNOWN_BASE = "unknown_base"
RETRY_AFTER_MAX_SECONDS = 60.0
FOREIGN_NO = (401, 403, 407, 413)
"""What a proxy in between means as its last word; 413: a smaller request may pass."""

_CLASSES: dict[str, type[DrError]] = {
    kind.code: kind
    for kind in (
        Unavailable,
        Throttled,
        OutcomeUnknown,
        FenceLost,
        Refused,
        NotFound,
        Conflict,
        Misconfigured,
        Corrupt,
        Forbidden,
        Unauthenticated,
    )
} | {"approval_required": ApprovalRequired, STALE_ATTEMPT: Fenced, Fenced.code: Fenced, UNKNOWN_BASE: Refused}

_INGEST = msgspec.json.Decoder(IngestAnswer)
_BEAT = msgspec.json.Decoder(BeatAnswer)
_RECORD = msgspec.json.Decoder(Record)
_RECORDS = msgspec.json.Decoder(tuple[Record, ...])
_AGENTS = msgspec.json.Decoder(tuple[AgentSeen, ...])


def error_from(document: object, status: int = 0) -> DrError:
    """The error that a controller described. An unknown or missing code is judged by the HTTP status."""
    known: Mapping[str, Any] = document if isinstance(document, Mapping) else {}
    code = known.get("code")
    message = str(known.get("message") or f"the controller answered {status}")[:2000]
    hint = str(known.get("hint") or "")[:2000]
    if code == NotActive.code:
        active = known.get("active")
        return NotActive(message, hint=hint, active=active if isinstance(active, str) else None)
    kind = _CLASSES.get(code) if isinstance(code, str) else None
    if kind is None:
        no = 400 <= status < 500 or known.get("exit_code") == Refused.exit_code
        kind = Unavailable if status == 429 else Refused if no else OutcomeUnknown
    error = kind(message, hint=hint)
    if isinstance(error, Unavailable):
        error.retry_after_seconds = _seconds(known.get("retry_after_seconds"))
    if isinstance(error, FenceLost):
        epoch = known.get("epoch")
        error.epoch = epoch if isinstance(epoch, int) else None
    if kind is Refused and isinstance(code, str):
        error.code = code
    return error


def _seconds(value: object) -> float:
    """What a controller asked us to wait. Nonsense is no wait; nobody makes us wait for longer than a minute."""
    try:
        found = float(value) if isinstance(value, (int, float, str)) else 0.0
    except ValueError:  # an HTTP date: nobody of ours sends it
        return 0.0
    return min(found, RETRY_AFTER_MAX_SECONDS) if found > 0 else 0.0


def error_answer(status: int, body: bytes, retry_after: str = "", url: str = "the controller") -> DrError:
    """From an HTTP answer that is not 200; ``retry_after``: its header. An answer that is none of a controller's (of a proxy in
    between, of another server) is judged by the status: a 4xx took nothing, anything else may have."""
    try:
        document = msgspec.json.decode(body)
    except msgspec.DecodeError:
        document = None
    found = document.get("error") if isinstance(document, dict) else None
    error: DrError
    if isinstance(found, dict) and isinstance(found.get("code"), str):
        error = error_from(found, status)
    else:
        kind = Refused if status in FOREIGN_NO else Unavailable if 400 <= status < 500 else OutcomeUnknown
        error = kind(
            f"{url} answered HTTP {status}, and not as a controller does",
            hint="check that the address is a controller's, and no proxy or other server",
        )
    if isinstance(error, Unavailable) and status in (429, 503):
        error.retry_after_seconds = error.retry_after_seconds or _seconds(retry_after)
    return error


def _garbled(what: str, error: Exception) -> OutcomeUnknown:
    return OutcomeUnknown(f"the controller's {what} is not readable: {error}", hint="compare versions; a retry is safe")


def ingest_answer(body: bytes, expected: int) -> IngestAnswer:
    """Raises OutcomeUnknown when it is not readable or does not answer every record."""
    try:
        answer = _INGEST.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _garbled("acknowledgement", error) from error
    if len(answer.acks) != expected:
        raise OutcomeUnknown(f"{len(answer.acks)} answers for {expected} records", hint="a retry is safe")
    return answer


def beat_body(beat: Beat) -> bytes:
    """The host's name is in the path."""
    return msgspec.json.encode({"capacity": beat.capacity, "agents": beat.agents})


def beat_answer(body: bytes) -> BeatAnswer:
    """Raises OutcomeUnknown when it is not readable."""
    try:
        return _BEAT.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _garbled("answer to a beat", error) from error


def record_and_body(header: str, body: bytes) -> tuple[Record, bytes]:
    """Raises Corrupt when the body is not the one that its record describes."""
    try:
        record = _RECORD.decode(header)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Corrupt(f"header X-DR-Record is not readable: {error}", hint="compare versions") from error
    if len(body) != record.size or hashlib.sha256(body).hexdigest() != record.sha256:
        raise Corrupt(
            f"record {record.id!a} of agent {record.agent!a}: these {len(body)} bytes are not its body",
            hint="read it again, from another controller",
        )
    return record, body


def records(body: bytes) -> tuple[Record, ...]:
    """A list of records, newest first. Raises Corrupt."""
    try:
        return _RECORDS.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Corrupt(f"the list of records is not readable: {error}", hint="compare versions") from error


def agents(body: bytes) -> tuple[AgentSeen, ...]:
    """A page of agents, by name. Raises Corrupt."""
    try:
        return _AGENTS.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Corrupt(f"the list of agents is not readable: {error}", hint="compare versions") from error


def segment(text: str) -> str:
    """A name inside a path: percent-encoded, slashes too, and the dots of ``.`` and ``..``, which mean something there."""
    return quote(text, safe="") if text.strip(".") else "%2E" * len(text)


def agent_path(agent: str, *rest: str) -> str:
    """Path below ``/v1/agents``; ``rest`` is names and words of ours."""
    return "/".join(["/v1/agents", *(segment(part) for part in (agent, *rest))])
