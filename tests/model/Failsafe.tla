------------------------------ MODULE Failsafe ------------------------------
(* A holder that goes on past its lease while etcd is unreachable: domain/failsafe.py, runtime/failsafe.py, Opening._outwait.

   Nothing here relies on who can reach etcd, nor on what other regions say when they are asked: a key may vanish at any moment
   (it may even be revoked), a holder may go past its lease at any moment, and any tenure may follow. What keeps two of them
   apart are the stores. Time is discrete and every quantity is a countdown in ticks, as in Lease.tla; a tick may come between any
   two steps. The lease itself is Lease.tla's: here a right by the lease may outlive its key by one right, as if it had been renewed just
   before etcd took the lease away (`RightEndsSoon` there).

   One record is written by the first tenure; whether it is found again stands for every record. *)

EXTENDS Integers, FiniteSets, TLC, Mutants

CONSTANTS
    Stores,
    Tenures,  \* 1 .. Tenures, in the order of their epochs
    Right,    \* ticks of one right past the lease: TTL - margin
    Wait,     \* ticks that a successor waits after it has its fence quorum: TTL
    Drift     \* ticks by which the holder's clock is slow in one right, or the successor's fast in one wait; Right + Drift <= Wait

VARIABLES
    holder,  \* whose key stands in etcd, 0: nobody's
    born,    \* tenures so far
    phase,   \* tenure -> "unborn", "fencing", "waiting", "serving", "over"
    fence,   \* store -> the tenure that fenced it last
    waited,  \* tenure -> ticks since it had its quorum
    beyond,  \* tenure -> ticks until its right past its key, or past the lease, has certainly ended
    asked,   \* tenure -> ticks since it sent its questions, -1: none are under way
    proven,  \* tenure -> the stores that answered them with its own epoch
    log,     \* stores whose head covers the record of the first tenure
    acked,   \* BOOLEAN: it was acknowledged past the lease
    found    \* tenure -> it chose a history with the record ("yes", "no"), or has not chosen ("")

vars == <<holder, born, phase, fence, waited, beyond, asked, proven, log, acked, found>>

T == 1..Tenures
Quorum == Cardinality(Stores) - 1
Max(a, b) == IF a > b THEN a ELSE b
Less(n) == Max(0, n - 1)
More(n, most) == IF n >= most THEN most ELSE n + 1

Leased(t) == holder = t
MayAct(t) == phase[t] # "over" /\ (Leased(t) \/ beyond[t] > 0)
Serves(t) == phase[t] = "serving" /\ MayAct(t)

\* `replication.every_quorum_meets`, and two stores at least
Enough(S) == IF Broken("one-store-proves") THEN S # {} ELSE Cardinality(S) >= 2 /\ Cardinality(S) > Cardinality(Stores) - Quorum

TypeOK ==
    /\ holder \in 0..Tenures /\ born \in 0..Tenures
    /\ phase \in [T -> {"unborn", "fencing", "waiting", "serving", "over"}] /\ fence \in [Stores -> 0..Tenures]
    /\ waited \in [T -> 0..Wait] /\ beyond \in [T -> 0..(Right + Drift)]
    /\ asked \in [T -> -1..(Right + 1)] /\ proven \in [T -> SUBSET Stores]
    /\ log \subseteq Stores /\ acked \in BOOLEAN /\ found \in [T -> {"", "yes", "no"}]

Init ==
    /\ holder = 0 /\ born = 0 /\ phase = [t \in T |-> "unborn"] /\ fence = [s \in Stores |-> 0]
    /\ waited = [t \in T |-> 0] /\ beyond = [t \in T |-> 0] /\ asked = [t \in T |-> -1] /\ proven = [t \in T |-> {}]
    /\ log = {} /\ acked = FALSE /\ found = [t \in T |-> ""]

Tick ==
    /\ waited' = [t \in T |-> IF phase[t] = "waiting" THEN More(waited[t], Wait) ELSE waited[t]]
    /\ beyond' = [t \in T |-> Less(beyond[t])]
    /\ asked' = [t \in T |-> IF asked[t] < 0 THEN -1 ELSE More(asked[t], Right + 1)]
    /\ UNCHANGED <<holder, born, phase, fence, proven, log, acked, found>>

Asks(t, age) == asked' = [asked EXCEPT ![t] = age] /\ proven' = [proven EXCEPT ![t] = {}]

-----------------------------------------------------------------------------
(* Tenures come and go *)

Acquire ==
    /\ holder = 0 /\ born < Tenures
    /\ born' = born + 1 /\ holder' = born + 1 /\ phase' = [phase EXCEPT ![born + 1] = "fencing"]
    /\ UNCHANGED <<fence, waited, beyond, asked, proven, log, acked, found>>

\* One that serves lent its right to agents a moment ago; one that does not serve yet lent nothing.
Lingers(t) == IF phase[t] = "serving" THEN [beyond EXCEPT ![t] = Right + Drift] ELSE beyond

KeyGone ==  \* the lease ended, or was taken away a moment after it was renewed; its holder need not know
    /\ holder # 0 /\ holder' = 0
    /\ beyond' = Lingers(holder)
    /\ UNCHANGED <<born, phase, fence, waited, asked, proven, log, acked, found>>

Ends(t) ==  \* it stepped down, for any reason
    /\ phase[t] \in {"fencing", "waiting", "serving"} /\ phase' = [phase EXCEPT ![t] = "over"]
    /\ beyond' = IF Leased(t) THEN Lingers(t) ELSE beyond
    /\ waited' = [waited EXCEPT ![t] = 0] /\ Asks(t, -1)
    /\ UNCHANGED <<holder, born, fence, log, acked, found>>

FenceStore(t, s) ==  \* late and repeated fences, too: a store never goes back
    /\ phase[t] # "unborn" /\ phase[t] # "over" /\ fence[s] < t
    /\ fence' = [fence EXCEPT ![s] = t]
    /\ UNCHANGED <<holder, born, phase, waited, beyond, asked, proven, log, acked, found>>

HasQuorum(t) ==  \* Opening: the history is chosen, and the wait begins
    /\ phase[t] = "fencing" /\ Leased(t)
    /\ \E S \in SUBSET Stores :
        /\ Cardinality(S) >= Quorum /\ \A s \in S : fence[s] = t
        /\ found' = [found EXCEPT ![t] = IF S \cap log # {} THEN "yes" ELSE "no"]
    /\ phase' = [phase EXCEPT ![t] = "waiting"] /\ waited' = [waited EXCEPT ![t] = 0]
    /\ UNCHANGED <<holder, born, fence, beyond, asked, proven, log, acked>>

Serve(t) ==
    /\ phase[t] = "waiting" /\ Leased(t)
    /\ Guard("no-wait", waited[t] >= Wait)
    /\ phase' = [phase EXCEPT ![t] = "serving"] /\ waited' = [waited EXCEPT ![t] = 0]
    /\ UNCHANGED <<holder, born, fence, beyond, asked, proven, log, acked, found>>

-----------------------------------------------------------------------------
(* Past the lease *)

Ask(t) ==  \* Failsafe.step: every store's head is read, with one clock reading before
    /\ phase[t] = "serving" /\ MayAct(t) /\ asked[t] < 0
    /\ Asks(t, 0)
    /\ UNCHANGED <<holder, born, phase, fence, waited, beyond, log, acked, found>>

Answer(t, s) ==  \* a consistent read
    /\ asked[t] >= 0 /\ fence[s] = t /\ s \notin proven[t]
    /\ proven' = [proven EXCEPT ![t] = @ \union {s}]
    /\ UNCHANGED <<holder, born, phase, fence, waited, beyond, asked, log, acked, found>>

GoOn(t) ==  \* Right.carried, on a clock that is as slow as it may be; not once the right is over
    /\ asked[t] >= 0 /\ MayAct(t) /\ Enough(proven[t])
    /\ LET age == IF Broken("counted-from-the-answers") THEN 0 ELSE asked[t]
       IN beyond' = [beyond EXCEPT ![t] = Max(@, Max(0, Right + Drift - age))]
    /\ Asks(t, -1)
    /\ UNCHANGED <<holder, born, phase, fence, waited, log, acked, found>>

GiveUp(t) ==
    /\ asked[t] >= 0 /\ Asks(t, -1)
    /\ UNCHANGED <<holder, born, phase, fence, waited, beyond, log, acked, found>>

Commit(s) ==  \* the first tenure's record, whether it may act or not: the head's condition alone decides
    /\ phase[1] \in {"serving", "over"} /\ fence[s] = 1 /\ log' = log \union {s}
    /\ UNCHANGED <<holder, born, phase, fence, waited, beyond, asked, proven, acked, found>>

Acknowledge ==  \* past the lease; what the lease covers is Stream.tla's
    /\ Serves(1) /\ ~acked
    /\ Cardinality(log) >= (IF Broken("one-copy-past-the-lease") THEN 1 ELSE 2)
    /\ acked' = TRUE
    /\ UNCHANGED <<holder, born, phase, fence, waited, beyond, asked, proven, log, found>>

Next ==
    \/ Tick \/ Acquire \/ KeyGone \/ Acknowledge \/ \E s \in Stores : Commit(s)
    \/ \E t \in T : Ends(t) \/ HasQuorum(t) \/ Serve(t) \/ Ask(t) \/ GoOn(t) \/ GiveUp(t)
        \/ \E s \in Stores : FenceStore(t, s) \/ Answer(t, s)

Spec == Init /\ [][Next]_vars

Symmetry == Permutations(Stores)

-----------------------------------------------------------------------------
(* Invariants *)

OneServes == \A t, u \in T : Serves(t) /\ Serves(u) => t = u

\* What is lent past the lease is never longer than the right itself (agents count from when they sent their request), also when
\* its holder steps down: it is over before anybody newer serves.
AgentsStopFirst == \A t, u \in T : t # u /\ beyond[t] > 0 => ~Serves(u)

\* What was acknowledged past the lease is in the history that every successor chose, whichever stores answered it.
KeptByAll == acked => \A t \in T : found[t] # "no" \/ t = 1

(* Witnesses *)

NeverBeyond == ~ \E t, u \in T : Serves(t) /\ holder = u /\ u > t
NeverFollowed == ~ \E t \in T : t > 1 /\ Serves(t) /\ acked /\ found[t] = "yes"
=============================================================================
