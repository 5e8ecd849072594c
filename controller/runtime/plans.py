"""Plans, approvals and the journal as they lie in etcd: made, shown, approved, moved on by compare-and-set, audited.

Every change of a plan is one transaction that compares the plan's revision and writes the audit entry with it. What a plan
may become is in ``domain.promotion``; who may let it run is in ``domain.approval``; nothing here moves authority or traffic.
"""

from __future__ import annotations

import functools
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from controller.domain import plan as planning
from controller.domain.approval import APPROVE, Approval, Gate, gate, statement
from controller.domain.plan import Evidence, Loss, Plan, PlanKind, digest
from controller.domain.promotion import BEFORE_AUTHORIZE, Event, PlanRecord, State, move
from controller.errors import ApprovalRequired, Conflict, Corrupt, Misconfigured, NotFound, OutcomeUnknown, Refused
from controller.ports import Clock, Compare, Coordinator, Identity, Operation, Put
from controller.runtime.audit import Audit
from controller.runtime.documents import Keys, Seen, decode, encode, read, read_all
from controller.runtime.evidence import require
from controller.runtime.service import ApprovalRequest, ApprovalSeen, JournalEntry, PlanDocument, PlanRequest

REASON_CHARS = 500


@dataclass(frozen=True, slots=True)
class PlanPolicy:
    """The settings that plans are made under."""

    approvals_required: int
    break_glass_approvals: int
    plan_ttl_seconds: float
    approval_ttl_seconds: float
    tolerance_seconds: float
    tolerance_records: int
    active_weight: int


class PlanBook:
    """Keeps the plans of one group."""

    def __init__(
        self,
        coordinator: Coordinator,
        keys: Keys,
        audit: Audit,
        clock: Clock,
        identity: Identity,
        policy: PlanPolicy,
        regions: Sequence[str],
        instance: str,
        new_id: Callable[[], str],
    ) -> None:
        self._coordinator = coordinator
        self._keys = keys
        self._audit = audit
        self._clock = clock
        self._identity = identity
        self._policy = policy
        self._regions = tuple(regions)
        self._instance = instance
        self._new_id = new_id
        self._decoded: dict[str, Seen[PlanRecord]] = {}
        self.unreadable: Mapping[str, str] = {}
        """Keys of plans that could not be decoded at the last look, with the reasons."""

    @property
    def audit(self) -> Audit:
        """Where decisions about plans are recorded, for others who decide in the same transactions."""
        return self._audit

    @property
    def plan_ttl_seconds(self) -> float:
        """How long a plan may wait for its approvals."""
        return self._policy.plan_ttl_seconds

    # ----------------------------------------------------------------------------------------------------- making

    def kind_of(self, request: PlanRequest) -> PlanKind:
        """The kind that was asked for. Raises Refused for bad input, naming the field."""
        try:
            kind = PlanKind(request.kind)
        except ValueError:
            raise Refused(f"kind = {request.kind!r}: unknown", hint="use failover, switchover or failback") from None
        if kind is PlanKind.DRILL:
            raise Refused("kind = 'drill': drills are started by the drill runner", hint="use failover, switchover or failback")
        if request.to not in self._regions:
            raise Refused(f"to = {request.to!r}: unknown region", hint=f"regions are {', '.join(self._regions)}")
        if not request.requester.strip():
            raise Refused("requester is empty", hint="say who asks: --requester NAME")
        if len(request.reason) > REASON_CHARS:
            raise Refused(f"reason has {len(request.reason)} characters, {REASON_CHARS} are allowed", hint="shorten it")
        if request.break_glass and not request.reason.strip():
            raise Refused("a break-glass plan needs a reason", hint="say why: --reason TEXT")
        return kind

    def propose(self, request: PlanRequest, evidence: Evidence) -> PlanRecord:
        """The plan for ``request`` on ``evidence``, not stored yet. Raises Refused naming every failing check."""
        kind = self.kind_of(request)
        if request.to == evidence.authority_region:
            raise Refused(
                f"to = {request.to!r}: that region has the authority already (epoch {evidence.authority_epoch})",
                hint="name another region; `drctl status` shows which are protected",
            )
        require(evidence)
        now = self._clock.wall()
        policy = self._policy
        plan = Plan(
            id=self._new_id(),
            group=self._keys.group,
            kind=kind,
            source=evidence.authority_region,
            target=request.to,
            requester=request.requester.strip(),
            reason=request.reason.strip(),
            created_at=now,
            expires_at=now + policy.plan_ttl_seconds,
            approvals_required=policy.break_glass_approvals if request.break_glass else policy.approvals_required,
            break_glass=request.break_glass,
            weights={region: policy.active_weight if region == request.to else 0 for region in self._regions},
            tolerance_seconds=policy.tolerance_seconds,
            tolerance_records=policy.tolerance_records,
            evidence=evidence,
        )
        return PlanRecord(plan, digest(plan), State.AWAITING_APPROVAL, now, "waiting for approvals")

    async def create(self, request: PlanRequest, evidence: Evidence, compare: Sequence[Compare] = ()) -> Seen[PlanRecord]:
        """Stores a new plan. Raises Refused, Conflict when one of ``compare`` does not hold, Unavailable."""
        record = self.propose(request, evidence)
        key = self._keys.plan(record.plan.id)
        detail = {
            "kind": record.plan.kind.value,
            "to": record.plan.target,
            "digest": record.digest,
            "reason": record.plan.reason,
        }
        result = await self._audit.commit(
            [Compare.absent(key), *compare],
            [Put(key, encode(record))],
            at=record.updated_at,
            actor=record.plan.requester,
            action="plan-break-glass" if record.plan.break_glass else "plan",
            subject=record.plan.id,
            detail=detail,
        )
        if not result.succeeded:
            raise Conflict(f"plan {record.plan.id} could not be stored: something changed meanwhile", hint="plan again")
        return await self.get(record.plan.id)

    # ---------------------------------------------------------------------------------------------------- looking

    async def get(self, plan_id: str) -> Seen[PlanRecord]:
        """Raises NotFound."""
        if not plan_id or len(plan_id) > 80 or not plan_id.isascii() or not plan_id.replace("-", "").isalnum():
            raise NotFound("plan ids are letters, digits and dashes, at most 80", hint="`drctl plan list` shows the plans")
        found = await read(self._coordinator, self._keys.plan(plan_id), PlanRecord)
        if found is None:
            raise NotFound(f"there is no plan {plan_id}", hint="`drctl plan list` shows the plans")
        return _intact(found)

    async def all(self) -> tuple[Seen[PlanRecord], ...]:
        """All plans, oldest first. Decodes only what changed since the last look: loops call this at every tick."""
        found: dict[str, Seen[PlanRecord]] = {}
        unreadable: dict[str, str] = {}
        for item in await self._coordinator.list(self._keys.plans):
            known = self._decoded.get(item.key)
            fresh = known is not None and known.revision == item.mod_revision
            try:
                found[item.key] = (
                    known if known and fresh else _intact(Seen(decode(PlanRecord, item.value, where=item.key), item))
                )
            except Corrupt as error:  # another version's, or edited by hand: it must not stop the other plans
                unreadable[item.key] = error.message
        self._decoded, self.unreadable = found, unreadable
        return tuple(sorted(found.values(), key=lambda seen: seen.value.plan.created_at))

    async def approvals(self, plan_id: str) -> tuple[Seen[Approval], ...]:
        """Everything that was signed for a plan."""
        return await read_all(self._coordinator, self._keys.approvals(plan_id), Approval)

    async def journal(self, plan_id: str) -> tuple[JournalEntry, ...]:
        """The steps so far, in their order."""
        entries = [seen.value for seen in await read_all(self._coordinator, self._keys.journals(plan_id), JournalEntry)]
        order = {step: number for number, step in enumerate(planning.STEPS)}
        return tuple(sorted(entries, key=lambda entry: order.get(entry.step, len(order))))

    async def document(self, plan_id: str) -> PlanDocument:
        """A plan as people see it: approvals judged now, journal, and what to type next."""
        record = (await self.get(plan_id)).value
        shown = approvable(record, self._policy.plan_ttl_seconds)
        approvals = await self.approvals(plan_id)
        judged = self.judge(shown, [seen.value for seen in approvals])
        why = dict(judged.rejected)
        rows = tuple(
            ApprovalSeen(
                seen.value.principal,
                seen.value.fingerprint,
                seen.value.decision,
                seen.value.expires_at,
                seen.value.at,
                seen.value.principal in judged.valid and not self._unsigned(seen.value),
                self._unsigned(seen.value) or why.get(seen.value.principal, ""),
            )
            for seen in approvals
        )
        return PlanDocument(shown, rows, await self.journal(plan_id), judged.missing, _next(shown, judged))

    def judge(self, record: PlanRecord, approvals: Sequence[Approval], *, minimum_left_seconds: float = 0.0) -> Gate:
        """The gate on what was signed. Signatures are verified each time: somebody may have put into etcd what lies there, and
        a key may have been taken off the list since. Raises Misconfigured when the list cannot be read."""
        unsigned = {id(approval): why for approval in approvals if (why := self._unsigned(approval))}
        signed = [approval for approval in approvals if id(approval) not in unsigned]
        judged = gate(record, signed, self._clock.wall(), minimum_left_seconds=minimum_left_seconds)
        if not unsigned:
            return judged
        bad = tuple((approval.principal, unsigned[id(approval)]) for approval in approvals if id(approval) in unsigned)
        return replace(judged, rejected=(*judged.rejected, *bad))

    def _unsigned(self, approval: Approval) -> str:
        """Why the signature beside an approval does not make it; "" when it does."""
        try:
            message = statement(
                self._keys.group, approval.plan, approval.digest, approval.decision, approval.principal, approval.expires_at
            )
            signer = self._identity.verify(message, approval.signature, approval.principal)
        except (Refused, ValueError) as error:
            return f"is not signed as it stands: {error}"
        return "" if signer.fingerprint == approval.fingerprint else "names another key than the one that signed it"

    # -------------------------------------------------------------------------------------------------- approving

    async def approve(self, plan_id: str, request: ApprovalRequest) -> None:
        """Stores one signed decision; a refusal ends the plan. Raises Refused with the rule that said no."""
        seen = await self.get(plan_id)
        record = approvable(seen.value, self._policy.plan_ttl_seconds)
        approval = self._verified(record, request)
        key = self._keys.approval(plan_id, urllib.parse.quote(approval.principal, safe="@.-_"))
        before = await self.approvals(plan_id)
        mine = next((found for found in before if found.item.key == key), None)
        self._admissible(record, [found.value for found in before if found.item.key != key], mine, approval)
        compare = Compare.modified(key, mine.revision) if mine else Compare.absent(key)
        changes: list[Operation] = [Put(key, encode(approval))]
        if approval.decision != APPROVE and seen.value.state in BEFORE_AUTHORIZE:
            refused = move(seen.value, Event.REFUSED, at=approval.at, reason=f"refused by {approval.principal}")
            changes.append(Put(seen.item.key, encode(refused)))
        result = await self._audit.commit(
            [Compare.modified(seen.item.key, seen.revision), compare],
            changes,
            at=approval.at,
            actor=approval.principal,
            action=approval.decision,
            subject=plan_id,
            detail={
                "digest": approval.digest,
                "key": approval.fingerprint,
                "signature": approval.signature,
                **({"sent_by": request.by} if request.by else {}),
            },
        )
        if not result.succeeded:
            raise Conflict(f"plan {plan_id} changed while you signed", hint=f"look again: drctl plan show {plan_id}")

    def _verified(self, record: PlanRecord, request: ApprovalRequest) -> Approval:
        plan, now = record.plan, self._clock.wall()
        if request.digest != record.digest:
            raise Refused(
                f"the digest {request.digest[:16]}… is not that of plan {plan.id} ({record.digest[:16]}…)",
                hint=f"look again and sign what you see: drctl plan show {plan.id}",
            )
        ttl = self._policy.approval_ttl_seconds
        if not now < request.expires_at <= now + ttl:
            raise Refused(
                f"expires_at is {request.expires_at - now:.0f} s away; it must be within {ttl:.0f} s",
                hint="sign again; check this machine's clock",
            )
        try:
            message = statement(plan.group, plan.id, record.digest, request.decision, request.principal, request.expires_at)
        except ValueError as error:
            raise Refused(str(error), hint="decide approve or refuse") from error
        signer = self._identity.verify(message, request.signature, request.principal)
        return Approval(
            plan.id,
            record.digest,
            signer.principal,
            signer.fingerprint,
            request.decision,
            request.expires_at,
            now,
            request.signature,
        )

    def _admissible(self, record: PlanRecord, others: Sequence[Approval], mine: Seen[Approval] | None, new: Approval) -> None:
        """Says no at once to what would not count: people should not believe that they approved something."""
        if record.state not in BEFORE_AUTHORIZE:
            raise Refused(
                f"plan {record.plan.id} is {record.state.value}: {record.reason}", hint="`drctl plan list` shows live plans"
            )
        same = mine is not None and mine.value.decision == new.decision and mine.value.digest == new.digest
        if same and mine is not None and mine.value.expires_at > new.at:
            raise Refused(f"{new.principal} has decided {new.decision} already", hint="another person must approve")
        judged = self.judge(record, [*others, new])
        for principal, why in judged.rejected:
            if principal == new.principal:
                raise Refused(f"the approval of {principal} {why}", hint="somebody else on the list of signers must approve")
        if new.decision == APPROVE and not judged.open and not judged.missing:
            raise Refused(judged.sentence, hint=f"look at it: drctl plan show {record.plan.id}")

    async def request_execution(self, plan_id: str, requester: str, confirm: str) -> None:
        """Marks an approved plan to be run. Raises ApprovalRequired when the gate is closed."""
        seen = await self.get(plan_id)
        record = seen.value
        if confirm != record.plan.target:
            raise Refused(
                f"confirm = {confirm!r}: it must be the name of the target region, {record.plan.target!r}",
                hint="type the region's name to say that you know where the fleet goes",
            )
        if record.ended:
            raise Refused(f"plan {plan_id} is {record.state.value}: {record.reason}", hint="make a new plan")
        if record.execute_requested_by:
            return
        judged = self.judge(record, [found.value for found in await self.approvals(plan_id)])
        if not judged.open:
            raise ApprovalRequired(judged.sentence, hint=f"drctl approve {plan_id} --key FILE --principal NAME")
        wanted = replace(
            record, execute_requested_by=requester or "unknown", updated_at=self._clock.wall(), reason="about to start"
        )
        await self._store(seen, wanted, "execute", requester or "unknown", {"confirm": confirm})

    async def abort(self, plan_id: str, requester: str, reason: str) -> None:
        """Ends a plan that has not moved the authority yet. Raises Refused after that."""
        seen = await self.get(plan_id)
        if seen.value.state not in BEFORE_AUTHORIZE:
            raise Refused(
                f"plan {plan_id} is {seen.value.state.value}: it can be aborted only before the authority moves",
                hint="after that the way is forward, or a new plan" if not seen.value.ended else "nothing to do",
            )
        text = f"aborted by {requester}" + (f": {reason}" if reason else "")
        await self.transition(seen, Event.ABORTED, text[:REASON_CHARS], actor=requester)

    # ----------------------------------------------------------------------------------------------------- moving

    async def transition(
        self,
        seen: Seen[PlanRecord],
        event: Event,
        reason: str,
        *,
        actor: str = "",
        compare: Sequence[Compare] = (),
        also: Sequence[Operation] = (),
        detail: dict[str, object] | None = None,
        change: Callable[[PlanRecord], PlanRecord] = lambda record: record,
    ) -> Seen[PlanRecord]:
        """Moves a plan on by one event, with ``also`` in the same transaction. Raises Conflict when it or ``compare`` changed.

        An unknown outcome is settled by reading the plan back: it is ours when the stored record is the one we wrote.
        """
        record = change(replace(move(seen.value, event, at=self._clock.wall(), reason=reason), executor=self._instance))
        return await self._store(seen, record, event.value, actor or self._instance, detail or {}, compare, also)

    async def _store(
        self,
        seen: Seen[PlanRecord],
        record: PlanRecord,
        action: str,
        actor: str,
        detail: dict[str, object],
        compare: Sequence[Compare] = (),
        also: Sequence[Operation] = (),
    ) -> Seen[PlanRecord]:
        key = seen.item.key
        try:
            result = await self._audit.commit(
                [Compare.modified(key, seen.revision), *compare],
                [Put(key, encode(record)), *also],
                at=record.updated_at,
                actor=actor,
                action=action,
                subject=record.plan.id,
                detail={"state": record.state.value, "reason": record.reason, **detail},
            )
            applied = result.succeeded
        except OutcomeUnknown:
            applied = False
        found = await read(self._coordinator, key, PlanRecord)
        if found is None:
            raise Misconfigured(
                f"plan {record.plan.id} vanished from etcd", hint="somebody deleted keys by hand; check the audit"
            )
        if applied or found.value == record:
            return found
        raise Conflict(f"plan {record.plan.id} was changed by somebody else", hint=f"drctl plan show {record.plan.id}")

    async def note(self, plan_id: str, entry: JournalEntry, compare: Sequence[Compare] = ()) -> None:
        """Writes one journal entry. Raises Conflict when ``compare`` does not hold."""
        result = await self._coordinator.txn(list(compare), [Put(self._keys.journal(plan_id, entry.step), encode(entry))])
        if not result.succeeded:
            raise Conflict(f"the journal of plan {plan_id} is not ours to write", hint="another instance runs this plan")


@functools.lru_cache(maxsize=256)
def _own_digest(document: bytes) -> str:
    """The digest that the plan in a document has. Loops ask at every tick, for the same few documents."""
    return digest(decode(PlanRecord, document).plan)


def _intact(found: Seen[PlanRecord]) -> Seen[PlanRecord]:
    """The same, unless the plan is not the one whose digest people sign. Raises Corrupt."""
    if _own_digest(found.item.value) != found.value.digest:
        raise Corrupt(
            f"{found.item.key}: the plan's content does not give its digest {found.value.digest[:16]}…",
            hint="it was edited by hand, or a controller of another version wrote it; make a new plan",
        )
    return found


def approvable(record: PlanRecord, plan_ttl_seconds: float) -> PlanRecord:
    """The form of a plan that people approve now.

    Normally the plan itself. While it *holds* because the loss is worse than what was approved: the same plan with the loss
    as it is known now, which has another digest, so that the old approvals do not count for it.
    """
    if record.state is not State.HOLDING or record.final_loss is None:
        return record
    plan = replace(
        record.plan,
        evidence=replace(record.plan.evidence, loss=record.final_loss),
        expires_at=max(record.plan.expires_at, record.updated_at + plan_ttl_seconds),
    )
    return replace(record, plan=plan, digest=digest(plan), state=State.AWAITING_APPROVAL)


def loss_is_approved(record: PlanRecord, loss: Loss) -> str | None:
    """Why ``loss`` is more than what was approved with the plan, or None."""
    plan = record.plan
    return loss.exceeds(plan.evidence.loss, tolerance_seconds=plan.tolerance_seconds, tolerance_records=plan.tolerance_records)


def _next(record: PlanRecord, judged: Gate) -> str:
    plan = record.plan
    if record.ended:
        return "nothing: the plan has ended"
    if record.state is State.AWAITING_APPROVAL and judged.missing:
        return f"drctl approve {plan.id} --key FILE --principal NAME"
    if record.state is State.AWAITING_APPROVAL and not record.execute_requested_by:
        return f"drctl promote {plan.id} --execute --confirm {plan.target} --wait"
    return f"wait: drctl plan show {plan.id}"
