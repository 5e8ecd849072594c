"""Any agent's state, as bytes or as JSON, in two lines: for programs without a framework that has an adapter.

await save_state(client, "billing/42", {"step": 7, "todo": [...]}, copies=2)
state = await load_state(client, "billing/42")
"""

from __future__ import annotations

import json
import uuid

from controller.agent.bridge import Bridge
from controller.agent.client import AsyncCheckpoints
from controller.agent.journal import Journal, MayAct, agent_name
from controller.agent.sync import Checkpoints
from controller.domain.model import Ack, Kind
from controller.errors import Corrupt, Refused

FORM = "form"
BYTES, JSON = "bytes", "json"


async def save_state(
    client: AsyncCheckpoints | Checkpoints,
    agent: str,
    state: object,
    *,
    copies: int = 1,
    attempt: int = 0,
    hold: MayAct | None = None,
) -> Ack:
    """The state is safe in ``copies`` regions when this returns. Bytes are kept as they are, all else as JSON.
    Raises like ``put`` (Unavailable, OutcomeUnknown: save again; Fenced: stop), and Refused for what is no JSON."""
    if hold is not None:
        hold.check()
    bridge = Bridge(client)
    form, body = (BYTES, state) if isinstance(state, bytes) else (JSON, encode_json(state))
    put = bridge.client.put(
        agent_name("", agent), f"state/{uuid.uuid4().hex}", body, copies=copies, attempt=attempt, meta={FORM: form}
    )
    return await bridge.wait(put)


async def load_state(client: AsyncCheckpoints | Checkpoints, agent: str) -> object | None:
    """The newest state that was saved, None when there is none. JSON comes back as dicts, lists, strings, numbers.
    Raises Unavailable, Corrupt."""
    bridge = Bridge(client)
    return await bridge.wait(_load(bridge.client, agent_name("", agent)))


def save_state_blocking(client: Checkpoints, agent: str, state: object, *, copies: int = 1, attempt: int = 0) -> Ack:
    """See ``save_state``."""
    bridge = Bridge(client)
    return bridge.run(save_state(bridge.client, agent, state, copies=copies, attempt=attempt))


def load_state_blocking(client: Checkpoints, agent: str) -> object | None:
    """See ``load_state``."""
    bridge = Bridge(client)
    return bridge.run(load_state(bridge.client, agent))


async def _load(client: AsyncCheckpoints, agent: str) -> object | None:
    journal = Journal(client, agent)
    for record in reversed(await journal.refresh()):
        if record.kind != Kind.CHECKPOINT or FORM not in record.meta:
            continue
        body = await journal.body(record)
        if record.meta[FORM] == BYTES:
            return body
        try:
            found: object = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Corrupt(f"state {record.id!a} of agent {agent!a} is no JSON: {error}", hint="who else writes it?") from error
        return found
    return None


def encode_json(value: object) -> bytes:
    """Raises Refused for what would not come back as it was: NaN, infinities, objects."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise Refused(f"this is no JSON: {error}", hint="give plain values, or bytes of your own making") from error
