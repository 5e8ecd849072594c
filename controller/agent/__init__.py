"""What agents import: light (httpx, msgspec, zstd), typed, with no knowledge of AWS, etcd or the daemon.

client      AsyncCheckpoints: put, get, list, agents, tasks, beats
delivery    from a record to its acknowledgement: turns, deltas, batches, and the spool behind them
credentials what a client shows: token, certificate; and whom it believes
caller      one call to whichever controller is to be asked; retries, pauses that controllers ask for
sync        Checkpoints: the same for programs without an event loop
rights      Right, Hold, guard: may this copy of the agent still act?
errors      what callers can act on, beside ``controller.errors``
spool       store and forward when no controller answers (off unless asked for)
endpoints   which controller to ask next; circuit breakers
lanes       many agents' records in one request, without a timer
memory      previous bodies, bounded; one agent's batch as a chain of deltas
wire        the HTTP documents

state       save_state and load_state; langgraph, sessions (OpenAI Agents SDK), strands: adapters, imported on their own
threads     a conversation thread as records; thread_log: what langgraph does with them; journal: its incremental index;
            bridge: any client from any loop or thread

A process with many agents makes many short-lived objects: ``gc.freeze()`` after its imports and a higher ``gc.set_threshold``
save it pauses. That is the program's own decision; nothing here touches its collector.
"""

from controller.agent.client import AsyncCheckpoints
from controller.agent.errors import Fenced, NotAllAcknowledged, SpoolFull, StaleEpoch
from controller.agent.rights import BootClock, Clock, Hold, Right
from controller.agent.spool import Letter, Spool
from controller.agent.sync import Checkpoints

__all__ = [
    "AsyncCheckpoints",
    "BootClock",
    "Checkpoints",
    "Clock",
    "Fenced",
    "Hold",
    "Letter",
    "NotAllAcknowledged",
    "Right",
    "Spool",
    "SpoolFull",
    "StaleEpoch",
]
