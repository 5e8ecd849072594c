"""The Coordinator on etcd, through the ``etcd3`` package's channel and stubs.

- A client per endpoint: ``etcd3`` does not fail over, and gRPC's own round robin keeps choosing a frozen member. We stay with
  one endpoint while it works and go on to the next one when a call fails. The first endpoint should be the nearest.
- gRPC is called synchronously, in a few threads of our own. Every attempt has a deadline and a call as a whole a budget.
- Reads, renewals, grants and revocations are repeated elsewhere. A transaction that changes something is repeated only when
  the error proves that it was not applied; else ``OutcomeUnknown`` is raised.
- TLS files that are renewed are used without a restart: over a new connection, within seconds (``etcd_endpoint``).
- ``etcd3``'s watcher and lock are not used: the one can hang, the other is no fence.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from controller.adapters import etcdrpc
from controller.adapters.etcd_endpoint import Credentials, Endpoint, Verdict, alarms_of, details_of, final_error, judge
from controller.adapters.etcd_version import is_trustworthy, parse_version
from controller.adapters.transactions import MAX_OPERATIONS, check_key, check_transaction, check_ttl, is_mutating
from controller.errors import Misconfigured, NotFound, OutcomeUnknown, Unavailable
from controller.ports import Compare, CoordinatorStatus, Get, Item, Lease, Operation, Put, Renewal, TxnResult

__all__ = ["EtcdCoordinator", "is_trustworthy", "parse_version"]

T = TypeVar("T")

MAX_ROUNDS = 6
"""A call goes at most so many times around the endpoints, if its budget lasts."""
PAUSE_SECONDS = 0.05
"""Mean pause after the first round in which every endpoint failed; doubled each round, jittered by half. Members without a
leader refuse at once, and an election takes longer than that."""
HOME_AFTER_SECONDS = 30.0
"""How long we stay away from the first endpoint before a good ``status`` of it brings us back."""
PAGE_KEYS = 1000
"""Keys that one answer of ``list`` holds. Further pages are read at the revision of the first."""


@dataclass(frozen=True, slots=True)
class _Call:
    """One port call: what to do at an endpoint, and whether doing it twice is harmless."""

    what: str
    run: Callable[[Endpoint, Any, float], Any]
    """(endpoint, its client, deadline in seconds) -> answer."""
    repeatable: bool = True
    mutating: bool = False


class EtcdCoordinator:
    """Implements ``ports.Coordinator``.

    ``call_timeout_seconds`` bounds each attempt; a call as a whole takes at most as many times that as there are endpoints, but
    no more than three. All endpoints must be of one cluster: an answer from another one raises Misconfigured, also when etcd
    was made anew from a backup under a new cluster id (then start the controller again).

    Raises Misconfigured for endpoints and credentials that cannot work together.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        call_timeout_seconds: float = 0.5,
        ca_file: str | None = None,
        cert_file: str | None = None,
        key_file: str | None = None,
        username: str | None = None,
        password: str | None = None,
    ) -> None:
        credentials = Credentials(ca_file, cert_file, key_file, username, password)
        _check_credentials(endpoints, credentials, call_timeout_seconds)
        self._timeout = call_timeout_seconds
        self._endpoints = tuple(Endpoint(url, credentials, self._check_cluster) for url in endpoints)
        self._budget = call_timeout_seconds * min(len(self._endpoints), 3)
        self._current = 0
        self._left_home_at = 0.0
        self._cluster_id: int | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(4 + len(self._endpoints), thread_name_prefix="etcd")

    # ------------------------------------------------------------------------------------------------------------- port

    async def txn(
        self, compare: Sequence[Compare], then: Sequence[Operation], otherwise: Sequence[Operation] = ()
    ) -> TxnResult:
        """See ``ports.Coordinator``. Raises Refused, NotFound (a put under a lease that is gone), Unavailable,
        OutcomeUnknown."""
        check_transaction(compare, then, otherwise)
        request = _txn_request(compare, then, otherwise)
        mutating = is_mutating(then, otherwise)

        def run(endpoint: Endpoint, client: Any, seconds: float) -> Any:
            return client.kvstub.Txn(request, seconds, metadata=endpoint.metadata())

        answer = await self._call(_Call("txn", run, repeatable=not mutating, mutating=mutating))
        items = _items(answer, then if answer.succeeded else otherwise)
        header = answer.header
        return TxnResult(answer.succeeded, items, header.revision, header.raft_term, f"{header.cluster_id:x}")

    async def get(self, key: str) -> Item | None:
        """See ``ports.Coordinator``. Raises Unavailable."""
        check_key(key)
        request = etcdrpc.RangeRequest(key=key.encode())
        answer = await self._call(_Call(f"get {key}", _range(request)))
        return _item(answer.kvs[0]) if answer.kvs else None

    async def list(self, prefix: str) -> tuple[Item, ...]:
        """See ``ports.Coordinator``. One consistent picture, however many pages it takes. Raises Unavailable."""
        first, end = (prefix.encode(), _after_prefix(prefix.encode())) if prefix else (b"\0", b"\0")
        found: list[Item] = []
        revision = 0
        while True:
            request = etcdrpc.RangeRequest(key=first, range_end=end, limit=PAGE_KEYS, revision=revision)
            answer = await self._call(_Call(f"list {prefix}", _range(request)))
            found.extend(_item(entry) for entry in answer.kvs)
            if not answer.more:
                return tuple(found)
            revision = revision or answer.header.revision
            first = answer.kvs[-1].key + b"\0"

    async def grant(self, ttl_seconds: int) -> Lease:
        """See ``ports.Coordinator``. A repeated grant may leave a lease behind that has no keys; it ends by itself."""
        check_ttl(ttl_seconds)
        request = etcdrpc.LeaseGrantRequest(TTL=ttl_seconds)

        def run(endpoint: Endpoint, client: Any, seconds: float) -> Any:
            return client.leasestub.LeaseGrant(request, seconds, metadata=endpoint.metadata())

        answer = await self._call(_Call("grant", run, mutating=True))
        return Lease(answer.ID, answer.TTL)

    async def keep_alive(self, lease_id: int) -> Renewal:
        """See ``ports.Coordinator``. The caller counts from before the call: a repetition inside only makes that stricter."""
        request = etcdrpc.LeaseKeepAliveRequest(ID=lease_id)

        def run(endpoint: Endpoint, client: Any, seconds: float) -> Any:
            stream = client.leasestub.LeaseKeepAlive(iter((request,)), seconds, metadata=endpoint.metadata())
            try:
                return next(stream)
            except StopIteration:
                raise _SilentError(endpoint.url) from None
            finally:
                stream.cancel()

        answer = await self._call(_Call(f"keep_alive {lease_id}", run))
        return Renewal(max(0, int(answer.TTL)), answer.header.raft_term)

    async def revoke(self, lease_id: int) -> None:
        """See ``ports.Coordinator``. Raises Unavailable, OutcomeUnknown."""
        request = etcdrpc.LeaseRevokeRequest(ID=lease_id)

        def run(endpoint: Endpoint, client: Any, seconds: float) -> Any:
            return client.leasestub.LeaseRevoke(request, seconds, metadata=endpoint.metadata())

        try:
            await self._call(_Call(f"revoke {lease_id}", run, mutating=True))
        except NotFound:
            return

    async def status(self) -> CoordinatorStatus:
        """Asks every endpoint, each for itself. ``versions`` is keyed by endpoint and holds those that answered; there is a
        leader when one of them follows one. Raises Unavailable when none answers, Misconfigured when they are of two
        clusters."""
        self._require_open()
        loop = asyncio.get_running_loop()
        answers = await asyncio.gather(
            *(loop.run_in_executor(self._pool, self._status_of, endpoint) for endpoint in self._endpoints)
        )
        pairs = zip(self._endpoints, answers, strict=True)
        answered = {endpoint.url: status for endpoint, status in pairs if status is not None}
        if not answered:
            raise Unavailable(f"etcd: none of {self._names()} answered", hint="check that etcd runs: `etcdctl endpoint health`")
        self._return_home(answers[0])
        return CoordinatorStatus(
            cluster_id=f"{next(iter(answered.values())).header.cluster_id:x}",
            versions={url: str(status.version) for url, status in answered.items()},
            leader=any(status.leader for status in answered.values()),
            term=max(int(status.raftTerm) for status in answered.values()),
            alarms=tuple(sorted(set[str]().union(*(alarms_of(status) for status in answered.values())))),
        )

    async def close(self) -> None:
        """Ends calls under way (as Unavailable or OutcomeUnknown) and the connections."""
        if self._closed.is_set():
            return
        self._closed.set()
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(self._pool, endpoint.close) for endpoint in self._endpoints))
        self._pool.shutdown(wait=False, cancel_futures=True)

    # -------------------------------------------------------------------------------------------------- the road to a member

    async def _call(self, call: _Call) -> Any:
        self._require_open()
        # Counted from here: time spent in the queue for a thread is time that the caller waits.
        deadline = time.monotonic() + self._budget
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._run, call, deadline)

    def _run(self, call: _Call, deadline: float) -> Any:
        """In a thread: attempts until one succeeds, the answer is final, or nothing is left of the budget."""
        reasons: dict[str, str] = {}
        in_doubt = False
        for attempt in range(MAX_ROUNDS * len(self._endpoints)):
            finished_rounds, position = divmod(attempt, len(self._endpoints))
            if finished_rounds and position == 0:
                pause = PAUSE_SECONDS * 2 ** (finished_rounds - 1) * random.uniform(0.5, 1.5)
                self._closed.wait(max(0.0, min(pause, deadline - time.monotonic())))
            if self._closed.is_set() or deadline - time.monotonic() <= 0:
                break
            index = self._current
            endpoint = self._endpoints[index]
            sent = False
            try:
                client = endpoint.ready(time.monotonic() + min(self._timeout, deadline - time.monotonic()))
                left = min(self._timeout, deadline - time.monotonic())
                if left <= 0:
                    break
                sent = True
                answer = call.run(endpoint, client, left)
            except (grpc.RpcError, _SilentError, ValueError) as error:
                # ValueError: gRPC's "channel is closed", after close().
                reasons[endpoint.url] = self._handle(call, endpoint, index, error)
                if sent and _verdict(error) is Verdict.UNKNOWN:
                    in_doubt = True
                    if not call.repeatable:
                        break
            else:
                self._check_cluster(answer.header.cluster_id, endpoint.url)
                return answer
        tried = "; ".join(f"{url}: {reason}" for url, reason in reasons.items()) or "no time was left to send it"
        if in_doubt and call.mutating:
            raise OutcomeUnknown(f"etcd {call.what}: may have been applied ({tried})", hint="re-read before deciding")
        hint = "check that a quorum of etcd runs: `etcdctl endpoint health --cluster`"
        if any(word in tried for word in ("SSL", "ssl", "handshake", "tls")):
            hint = "etcd and this controller do not accept each other's certificates: check etcd.ca_file, cert_file, key_file"
        raise Unavailable(f"etcd {call.what}: {tried}", hint=hint)

    def _handle(self, call: _Call, endpoint: Endpoint, index: int, error: Exception) -> str:
        """Raises when the server's answer is final; else turns to the next endpoint and returns the reason in words."""
        if not isinstance(error, grpc.RpcError):
            self._leave(index)
            return str(error)
        if judge(error) is Verdict.FINAL and (final := final_error(error, f"etcd {call.what} at {endpoint.url}")):
            raise final from None
        endpoint.failed(error)
        self._leave(index)
        return f"{error.code().name} {details_of(error)}".strip()

    def _leave(self, index: int) -> None:
        with self._lock:
            if self._current == index and len(self._endpoints) > 1:
                if index == 0:
                    self._left_home_at = time.monotonic()
                self._current = (index + 1) % len(self._endpoints)

    def _return_home(self, home_status: Any) -> None:
        with self._lock:
            rested = time.monotonic() - self._left_home_at >= HOME_AFTER_SECONDS
            if self._current != 0 and rested and home_status is not None and home_status.leader:
                self._current = 0

    def _status_of(self, endpoint: Endpoint) -> Any:
        try:
            status = endpoint.status(self._timeout)
        except grpc.RpcError:
            return None
        if status is not None:
            self._check_cluster(status.header.cluster_id, endpoint.url)
        return status

    def _check_cluster(self, cluster_id: int, url: str) -> None:
        with self._lock:
            if self._cluster_id is None:
                self._cluster_id = cluster_id
            known = self._cluster_id
        if cluster_id != known:
            raise Misconfigured(
                f"etcd endpoint {url} belongs to cluster {cluster_id:x}, another one answered as {known:x}",
                hint="give endpoints of one cluster in etcd.endpoints; after a restore from a backup, restart the controller",
            )

    def _require_open(self) -> None:
        if self._closed.is_set():
            raise Unavailable("etcd: the coordinator is closed", hint="create a new coordinator")

    def _names(self) -> str:
        return ", ".join(endpoint.url for endpoint in self._endpoints)


class _SilentError(Exception):
    """A stream ended without an answer."""


def _verdict(error: Exception) -> Verdict:
    return judge(error) if isinstance(error, grpc.RpcError) else Verdict.UNKNOWN


def _check_credentials(endpoints: Sequence[str], credentials: Credentials, call_timeout_seconds: float) -> None:
    if not endpoints or len(set(endpoints)) != len(endpoints):
        raise Misconfigured(f"etcd.endpoints is {list(endpoints)}: empty, or an entry twice", hint="name each member once")
    if call_timeout_seconds <= 0:
        raise Misconfigured(f"etcd.call_timeout_seconds is {call_timeout_seconds}", hint="give seconds above 0, such as 0.5")
    schemes = {url.partition("://")[0] for url in endpoints}
    if len(schemes) > 1:
        raise Misconfigured(f"etcd.endpoints mixes {sorted(schemes)}", hint="use https for all")
    if schemes == {"https"} and credentials.ca_file is None:
        raise Misconfigured("etcd.ca_file is missing for https endpoints", hint="name the file with the CA certificate of etcd")
    if (credentials.cert_file is None) != (credentials.key_file is None):
        raise Misconfigured("etcd.cert_file and etcd.key_file go together", hint="set both, or none")
    if (credentials.username is None) != (credentials.password is None):
        raise Misconfigured("etcd.username and etcd.password go together", hint="set both, or none")


# ------------------------------------------------------------------------------------------------------- words of the wire


def _range(request: Any) -> Callable[[Endpoint, Any, float], Any]:
    def run(endpoint: Endpoint, client: Any, seconds: float) -> Any:
        return client.kvstub.Range(request, seconds, metadata=endpoint.metadata())

    return run


def _txn_request(compare: Sequence[Compare], then: Sequence[Operation], otherwise: Sequence[Operation]) -> Any:
    # The key of the added range has to be one that the user may read; any that the transaction names is.
    anchor = (*compare, *then, *otherwise)[0].key
    return etcdrpc.TxnRequest(
        compare=[_compare(condition) for condition in compare],
        success=_branch(then, anchor),
        failure=_branch(otherwise, anchor),
    )


def _compare(condition: Compare) -> Any:
    equal, key = etcdrpc.Compare.EQUAL, condition.key.encode()
    if condition.field == "create":
        return etcdrpc.Compare(result=equal, target=etcdrpc.Compare.CREATE, key=key, create_revision=condition.revision)
    return etcdrpc.Compare(result=equal, target=etcdrpc.Compare.MOD, key=key, mod_revision=condition.revision)


def _branch(operations: Sequence[Operation], anchor: str) -> list[Any]:
    """The branch on the wire, with a linearizable range at its end when it has none.

    A branch that is full without one consists of writes; these go through the log anyway, so it needs none.
    """
    wired = [_operation(operation) for operation in operations]
    if len(wired) < MAX_OPERATIONS and not any(isinstance(operation, Get) for operation in operations):
        wired.append(etcdrpc.RequestOp(request_range=etcdrpc.RangeRequest(key=anchor.encode(), count_only=True)))
    return wired


def _operation(operation: Operation) -> Any:
    key = operation.key.encode()
    if isinstance(operation, Get):
        return etcdrpc.RequestOp(request_range=etcdrpc.RangeRequest(key=key))
    if isinstance(operation, Put):
        return etcdrpc.RequestOp(request_put=etcdrpc.PutRequest(key=key, value=operation.value, lease=operation.lease))
    return etcdrpc.RequestOp(request_delete_range=etcdrpc.DeleteRangeRequest(key=key))


def _items(answer: Any, branch: Sequence[Operation]) -> tuple[Item | None, ...]:
    """Answers of the branch's own ``Get`` operations; the range that we added has no counterpart in it and falls off."""
    found = []
    for operation, response in zip(branch, answer.responses, strict=False):
        if isinstance(operation, Get):
            entries = response.response_range.kvs
            found.append(_item(entries[0]) if entries else None)
    return tuple(found)


def _item(entry: Any) -> Item:
    return Item(entry.key.decode(), entry.value, entry.create_revision, entry.mod_revision, entry.lease)


def _after_prefix(prefix: bytes) -> bytes:
    """The first key that is greater than every key with this prefix (``\\0`` = no end)."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes((stem[-1] + 1,)) if stem else b"\0"
