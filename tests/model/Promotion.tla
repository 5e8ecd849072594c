----------------------------- MODULE Promotion -----------------------------
(* Plans, approvals and the authority: domain/promotion.py, domain/approval.py, runtime/takeover.py, and the part of
   runtime/opening.py that asks whether the loss was approved. Losses are 0 (none) and 1 (some); a digest is a plan's version.

   A transaction that compares all that it was judged by is one step. What no transaction can compare, the time that is left of an
   approval, is judged in a step of its own, and anything may happen between that and the transaction. *)

EXTENDS Integers, FiniteSets, Mutants

CONSTANTS
    Plans, Executors, Nobody,
    TTL,       \* ticks; two TTLs of an approval must be left when it is judged
    Life,      \* ticks that an approval lasts
    Faults,    \* how often a holder dies for no reason, or the loss changes
    Elections, \* how often a guard key's lease is armed anew because etcd elected a leader
    Swept      \* BOOLEAN: some controller, be it the executor, reaches etcd and deletes a guard that outlives its TTL

VARIABLES
    auth,    \* [region, barrier, plan]
    holder,  \* the region of the instance whose holder key stands, or Nobody
    plan,    \* plan -> its record
    signed,  \* approvals: [plan, version, left]
    guard,   \* the guard key: [plan, by, left, age] or Nobody; its age counts where guards are swept
    drained, \* plans for which the old holder proved that it drained
    judged,  \* executor -> the authority and plan that it judged, or Nobody
    loss,    \* what a failover would lose now
    faults, elections,
    wrong    \* ghost: what should never happen, and did

vars == <<auth, holder, plan, signed, guard, drained, judged, loss, faults, elections, wrong>>

Before == {"awaiting", "quiescing", "authorizing"}
After == {"fencing", "holding", "opened"}
Ended == {"done", "void", "aborted", "superseded"}
NoPlan == [state |-> "none", kind |-> "", to |-> "", from |-> "", over |-> FALSE, loss |-> 0, version |-> 0, ordered |-> FALSE]
Other(r) == IF r = "a" THEN "b" ELSE "a"

Init ==
    /\ auth = [region |-> "a", barrier |-> Nobody, plan |-> Nobody] /\ holder = "a"
    /\ plan = [p \in Plans |-> NoPlan] /\ signed = {} /\ guard = Nobody /\ drained = {}
    /\ judged = [x \in Executors |-> Nobody] /\ loss = 0 /\ faults = Faults /\ elections = Elections /\ wrong = {}

To(p, state) == plan' = [plan EXCEPT ![p].state = state]

\* approval.gate, of the version of the plan that people are asked to approve now
Open(p, version, left) ==
    \E s \in signed : s.plan = p /\ s.left >= left /\ Guard("approval-not-bound-to-digest", s.version = version)

Drifted(p) ==
    LET then == plan[p] IN
    \/ auth.region /= then.from
    \/ then.kind = "planned" /\ then.over
    \/ then.kind = "failover" /\ loss > then.loss

-----------------------------------------------------------------------------
(* Time and faults *)

\* Whoever sweeps saw it a tick late, and deletes it more than a TTL later.
Overdue == Swept /\ ~Broken("guard-not-swept") /\ guard /= Nobody /\ guard.age > TTL

Tick ==
    /\ (signed /= {} \/ guard /= Nobody) /\ ~Overdue
    /\ signed' = {t \in {[s EXCEPT !.left = @ - 1] : s \in signed} : t.left > 0}
    /\ guard' = IF guard = Nobody \/ guard.left = 1 THEN Nobody ELSE [guard EXCEPT !.left = @ - 1, !.age = IF Swept THEN @ + 1 ELSE @]
    /\ UNCHANGED <<auth, holder, plan, drained, judged, loss, faults, elections, wrong>>

Elect ==
    /\ guard /= Nobody /\ elections > 0 /\ elections' = elections - 1
    /\ guard' = [guard EXCEPT !.left = TTL]
    /\ UNCHANGED <<auth, holder, plan, signed, drained, judged, loss, faults, wrong>>

SweepGuard ==
    /\ Overdue /\ guard' = Nobody
    /\ UNCHANGED <<auth, holder, plan, signed, drained, judged, loss, faults, elections, wrong>>

HolderDies ==
    /\ holder /= Nobody /\ faults > 0 /\ faults' = faults - 1 /\ holder' = Nobody
    /\ UNCHANGED <<auth, plan, signed, guard, drained, judged, loss, elections, wrong>>

LossChanges ==
    /\ faults > 0 /\ faults' = faults - 1 /\ loss' = 1 - loss
    /\ UNCHANGED <<auth, holder, plan, signed, guard, drained, judged, elections, wrong>>

-----------------------------------------------------------------------------
(* People *)

Propose(p, kind) ==
    /\ plan[p].state = "none"
    /\ kind = "planned" => holder /= Nobody
    /\ plan' = [plan EXCEPT ![p] = [state |-> "awaiting", kind |-> kind, to |-> Other(auth.region), from |-> auth.region, over |-> FALSE,
                                    loss |-> IF kind = "planned" THEN 0 ELSE loss, version |-> 1, ordered |-> FALSE]]
    /\ UNCHANGED <<auth, holder, signed, guard, drained, judged, loss, faults, elections, wrong>>

Sign(p) ==  \* what is shown: the plan, or while it holds the same plan with the greater loss
    /\ plan[p].state \in Before \union {"holding"}
    /\ LET s == [plan |-> p, version |-> plan[p].version, left |-> Life]
       IN signed' = {t \in signed : t.plan /= p \/ t.version /= s.version} \union {s} /\ s \notin signed
    /\ UNCHANGED <<auth, holder, plan, guard, drained, judged, loss, faults, elections, wrong>>

Order(p) ==
    /\ plan[p].state = "awaiting" /\ ~plan[p].ordered /\ Open(p, plan[p].version, 1)
    /\ plan' = [plan EXCEPT ![p].ordered = TRUE]
    /\ UNCHANGED <<auth, holder, signed, guard, drained, judged, loss, faults, elections, wrong>>

Abort(p) ==  \* by a person, or expired
    /\ plan[p].state \in Before /\ To(p, "aborted")
    /\ UNCHANGED <<auth, holder, signed, guard, drained, judged, loss, faults, elections, wrong>>

-----------------------------------------------------------------------------
(* Up to `authorize`: runtime/takeover.py *)

Start(p) ==
    /\ plan[p].state = "awaiting" /\ plan[p].ordered /\ auth.barrier = Nobody
    /\ IF Drifted(p) THEN To(p, "void") /\ UNCHANGED auth
       ELSE /\ Open(p, plan[p].version, 2 * TTL)
            /\ auth' = [auth EXCEPT !.barrier = p] /\ To(p, "quiescing")
    /\ UNCHANGED <<holder, signed, guard, drained, judged, loss, faults, elections, wrong>>

Drain(p) ==  \* the old holder proves it under its own key
    /\ auth.barrier = p /\ plan[p].kind = "planned" /\ plan[p].state = "quiescing" /\ holder /= Nobody
    /\ drained' = drained \union {p}
    /\ UNCHANGED <<auth, holder, plan, signed, guard, judged, loss, faults, elections, wrong>>

HolderLeaves(p) ==  \* the right runs out (failover), or is given back (drained); Lease.tla has the arithmetic
    /\ auth.barrier = p /\ holder /= Nobody /\ plan[p].state = "quiescing" /\ (plan[p].kind = "failover" \/ p \in drained)
    /\ holder' = Nobody
    /\ UNCHANGED <<auth, plan, signed, guard, drained, judged, loss, faults, elections, wrong>>

Quiesced(p) ==
    /\ plan[p].state = "quiescing" /\ auth.barrier = p /\ Guard("holder-may-stand", holder = Nobody)
    /\ To(p, IF Guard("drained-proof-missing", plan[p].kind = "failover" \/ p \in drained) THEN "authorizing" ELSE "aborted")
    /\ UNCHANGED <<auth, holder, signed, guard, drained, judged, loss, faults, elections, wrong>>

TakeGuard(x, p) ==  \* before the expiries are read
    /\ plan[p].state = "authorizing" /\ judged[x] = Nobody /\ guard = Nobody
    /\ guard' = [plan |-> p, by |-> x, left |-> TTL, age |-> 0]
    /\ UNCHANGED <<auth, holder, plan, signed, drained, judged, loss, faults, elections, wrong>>

Judge(x, p) ==
    /\ plan[p].state = "authorizing" /\ judged[x] = Nobody
    /\ guard /= Nobody /\ guard.plan = p /\ guard.by = x
    /\ IF Drifted(p) THEN To(p, "void") /\ UNCHANGED judged
       ELSE /\ auth.barrier = p /\ Guard("holder-may-stand", holder = Nobody)
            /\ Open(p, plan[p].version, IF Broken("no-time-left") THEN 1 ELSE 2 * TTL)
            /\ judged' = [judged EXCEPT ![x] = [plan |-> p, auth |-> auth, record |-> plan[p]]] /\ UNCHANGED plan
    /\ UNCHANGED <<auth, holder, signed, guard, drained, loss, faults, elections, wrong>>

Wrongs(p) ==
    (IF \E s \in signed : s.plan = p /\ s.version = plan[p].version THEN {} ELSE {"moved without valid approvals"})
    \union (IF plan[p].state \in Before THEN {} ELSE {"approvals used twice"})
    \union (IF plan[p].kind = "failover" \/ p \in drained THEN {} ELSE {"planned move that did not drain"})

Authorize(x) ==  \* the one transaction that moves the authority
    LET saw == judged[x]  p == saw.plan IN
    /\ saw /= Nobody
    /\ Mutant \in {"no-guard-key", "approvals-used-twice"} \/ (guard /= Nobody /\ guard.by = x /\ guard.plan = p)
    /\ Guard("approvals-used-twice", plan[p] = saw.record /\ auth = saw.auth)
    /\ Guard("holder-may-stand", holder = Nobody)
    /\ wrong' = wrong \union Wrongs(p)
    /\ auth' = [auth EXCEPT !.region = plan[p].to, !.plan = p, !.barrier = Nobody]
    /\ plan' = [q \in Plans |-> IF q = p THEN [plan[p] EXCEPT !.state = "fencing"]
                                ELSE IF q = auth.plan /\ plan[q].state \in After THEN [plan[q] EXCEPT !.state = "superseded"] ELSE plan[q]]
    /\ judged' = [judged EXCEPT ![x] = Nobody] /\ guard' = Nobody
    /\ UNCHANGED <<holder, signed, drained, loss, faults, elections>>

GiveUp(x) ==  \* the transaction fails, or the executor dies
    /\ judged[x] /= Nobody
    /\ judged' = [judged EXCEPT ![x] = Nobody]
    /\ guard' = IF guard /= Nobody /\ guard.by = x THEN Nobody ELSE guard
    /\ UNCHANGED <<auth, holder, plan, signed, drained, loss, faults, elections, wrong>>

SweepBarrier ==
    /\ auth.barrier /= Nobody /\ plan[auth.barrier].state \in Ended
    /\ auth' = [auth EXCEPT !.barrier = Nobody]
    /\ UNCHANGED <<holder, plan, signed, guard, drained, judged, loss, faults, elections, wrong>>

-----------------------------------------------------------------------------
(* After it: whoever holds the new epoch carries the plan on *)

Acquire ==
    /\ holder = Nobody /\ auth.barrier = Nobody
    /\ holder' = auth.region
    /\ plan' = [p \in Plans |-> IF plan[p].state \in Before THEN [plan[p] EXCEPT !.over = TRUE] ELSE plan[p]]  \* the epoch that it names
    /\ UNCHANGED <<auth, signed, guard, drained, judged, loss, faults, elections, wrong>>

Mine(p) == auth.plan = p /\ holder = auth.region

Lost(p) == IF plan[p].kind = "planned" THEN 0 ELSE loss  \* a drained store has everything

CatchUp(p) ==
    /\ Mine(p) /\ plan[p].state \in {"fencing", "holding"}
    /\ IF Guard("greater-loss-not-held", Lost(p) <= plan[p].loss)
       THEN /\ To(p, "opened")
            /\ wrong' = wrong \union (IF Lost(p) > plan[p].loss THEN {"lost more than was approved"} ELSE {})
       ELSE plan[p].state = "fencing" /\ plan' = [plan EXCEPT ![p].state = "holding", ![p].version = 2] /\ UNCHANGED wrong
    /\ UNCHANGED <<auth, holder, signed, guard, drained, judged, loss, faults, elections>>

LossApproved(p) ==
    /\ Mine(p) /\ plan[p].state = "holding" /\ Open(p, 2, 2 * TTL)
    /\ plan' = [plan EXCEPT ![p].loss = 1]
    /\ plan[p].loss = 0
    /\ wrong' = wrong \union (IF \E s \in signed : s.plan = p /\ s.version = 2 THEN {} ELSE {"greater loss without approvals for it"})
    /\ UNCHANGED <<auth, holder, signed, guard, drained, judged, loss, faults, elections>>

Finish(p) ==  \* verify, resume, route (Traffic.tla), confirm, report
    /\ Mine(p) /\ plan[p].state = "opened" /\ To(p, "done")
    /\ UNCHANGED <<auth, holder, signed, guard, drained, judged, loss, faults, elections, wrong>>

Controllers ==
    \/ SweepBarrier \/ SweepGuard \/ Acquire
    \/ \E p \in Plans : Start(p) \/ Drain(p) \/ HolderLeaves(p) \/ Quiesced(p) \/ CatchUp(p) \/ LossApproved(p) \/ Finish(p)
    \/ \E x \in Executors : Authorize(x) \/ GiveUp(x) \/ \E p \in Plans : TakeGuard(x, p) \/ Judge(x, p)

People == \E p \in Plans : Propose(p, "failover") \/ Propose(p, "planned") \/ Sign(p) \/ Order(p) \/ Abort(p)

Next == Tick \/ Elect \/ HolderDies \/ LossChanges \/ People \/ Controllers

(* Faults are bounded, controllers go on, and people sign a plan that holds. A plan that does not get on expires. *)
Fair ==
    /\ WF_vars(SweepBarrier) /\ WF_vars(Acquire)
    /\ \A p \in Plans :
        /\ WF_vars(Abort(p)) /\ WF_vars(CatchUp(p)) /\ WF_vars(Finish(p))
        /\ SF_vars(LossApproved(p)) /\ WF_vars(plan[p].state = "holding" /\ Sign(p))

Spec == Init /\ [][Next]_vars /\ Fair

-----------------------------------------------------------------------------
(* Invariants *)

NothingWrong == wrong = {}

OneActive == holder \in {Nobody, auth.region}

BarrierIsOfAPlan == auth.barrier /= Nobody => plan[auth.barrier].state \in Before \union Ended

OneCarriedOn == \A p \in Plans : plan[p].state \in After => auth.plan = p

(* Progress: an ordered plan ends, and in the end some region serves *)

OrderedEnds == \A p \in Plans : plan[p].ordered ~> plan[p].state \in Ended
SomebodyServes == <>[](holder /= Nobody)

NeverRearmed == ~ \E x \in Executors : judged[x] /= Nobody /\ guard /= Nobody /\ guard.age > TTL
NeverDone == ~ \E p \in Plans : plan[p].state = "done" /\ plan[p].kind = "failover" /\ plan[p].version = 2
NeverThereAndBack == ~ \A p \in Plans : plan[p].state = "done" /\ plan[p].kind = "planned"
NeverSuperseded == ~ \E p \in Plans : plan[p].state = "superseded"
=============================================================================
