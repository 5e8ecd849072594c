------------------------------- MODULE Stream -------------------------------
(* One stream in every region's store: epochs, fences, opening, acknowledgements, stand-ins, drains, and an etcd that comes back
   from a snapshot. No clocks: etcd may take a lease away early, and Lease.tla shows that a right has ended when the next tenure has
   waited, which it does before it records its fork. So here a tenure has the right to act while its key stands, and after that until
   another one records its fork, which is the longest that it can. A process that was paused, or that nobody told, goes on writing
   for ever after; one that crashed is one that takes no step any more.

   A segment is named by the tenure that wrote it; its place in a log is its sequence number. The first segment of a tenure is
   its opening record. Puts of objects and the move of the head are one step, except for the mutant that turns them around. *)

EXTENDS Integers, Sequences, FiniteSets, TLC, Mutants

CONSTANTS
    Regions,   \* each has a store, and may have the authority
    Tenures,   \* how many tenures there can be: 1 .. Tenures
    Length,    \* how many segments a history can have
    Restores,  \* how often etcd comes back from a snapshot
    Recovery,  \* when `drctl recover` says that every store may have acknowledged alone: "newer" forks were found, anything "changed", "always"
    StandIns,  \* BOOLEAN: another store may stand in for the home store
    Planned    \* BOOLEAN: planned moves happen

VARIABLES
    auth,      \* etcd: [region, epoch]
    holder,    \* etcd: the tenure whose key stands, 0: none
    forks,     \* etcd: sequence of [epoch, first]
    sole,      \* etcd: the stores that may have acknowledged alone
    plan,      \* etcd: the plan that moved the authority here and has not opened: "none", "exact", "lossy" (a loss is approved)
    drained,   \* etcd: BOOLEAN, the proof of the holder that it drained for a planned move
    snapshot,  \* a backup of etcd, and how many restores are left
    fence,     \* store -> the tenure that fenced it last, 0: none
    log,       \* store -> sequence of tenures: the segments that its head covers
    hole,      \* stores whose head covers an object that is not there
    born,      \* number of tenures so far
    ten,       \* tenure -> what the process knows
    ack1,      \* ghost: segments <<tenure, seq>> with a record that was acknowledged with copies = 1 ...
    ack2,      \* ... and with copies = 2
    promised,  \* ghost: segments whose loss people had approved when it became final
    live       \* ghost: the newest tenure that recorded its fork, 0: none

etcd == <<auth, holder, forks, sole, plan, drained>>
stores == <<fence, log, hole>>
ghosts == <<ack1, ack2, promised, live>>
vars == <<auth, holder, forks, sole, plan, drained, snapshot, fence, log, hole, born, ten, ack1, ack2, promised, live>>

T == 1..Tenures
Quorum == IF Broken("fence-quorum-too-small") THEN Cardinality(Regions) - 2 ELSE Cardinality(Regions) - 1

Unborn == [phase |-> "unborn", epoch |-> 0, home |-> "", fenced |-> {}, hist |-> <<>>, sole |-> {}, pump |-> [s \in Regions |-> -1]]
Opening(r, e) == [Unborn EXCEPT !.phase = "opening", !.epoch = e, !.home = r]

Right(t) == holder = t \/ live = t

Init ==
    /\ \E r \in Regions : auth = [region |-> r, epoch |-> 0]
    /\ holder = 0 /\ forks = <<>> /\ sole = {} /\ plan = "none" /\ drained = FALSE
    /\ snapshot = [left |-> Restores, taken |-> FALSE, unread |-> FALSE, auth |-> auth, forks |-> <<>>, sole |-> {}, plan |-> "none"]
    /\ fence = [s \in Regions |-> 0] /\ log = [s \in Regions |-> <<>>] /\ hole = {}
    /\ born = 0 /\ ten = [t \in T |-> Unborn]
    /\ ack1 = {} /\ ack2 = {} /\ promised = {} /\ live = 0

-----------------------------------------------------------------------------
(* domain/replication.py *)

Prefix(h, n) == SubSeq(h, 1, n)
IsPrefix(a, b) == Len(a) <= Len(b) /\ a = Prefix(b, Len(a))
Least(a, b) == IF a < b THEN a ELSE b
Greatest(S) == CHOOSE n \in S : \A m \in S : m <= n

Epoch(t) == IF t = 0 THEN 0 ELSE ten[t].epoch

Owner(fk, q) ==  \* the epoch that owns sequence number q
    LET starts == {i \in DOMAIN fk : fk[i].first <= q} IN IF starts = {} THEN 0 ELSE fk[Greatest(starts)].epoch

ValidLength(h, fk) ==
    IF Broken("forks-not-compared") THEN Len(h)
    ELSE Greatest({n \in 0..Len(h) : \A q \in 1..n : Epoch(h[q]) = Owner(fk, q)})

WithFork(fk, e, first) == Append(SelectSeq(fk, LAMBDA f : f.first < first), [epoch |-> e, first |-> first])

Chosen(S, fk) ==  \* the longest valid history among the stores S
    LET n == Greatest({ValidLength(log[s], fk) : s \in S})
        source == CHOOSE s \in S : ValidLength(log[s], fk) = n
    IN Prefix(log[source], n)

Forgot(S, fk) ==  \* opening.etcd_forgot: a store knows an epoch that etcd has no fork for
    \E s \in S : log[s] /= <<>> /\ \A i \in DOMAIN fk : Epoch(log[s][Len(log[s])]) > fk[i].epoch

-----------------------------------------------------------------------------
(* Tenures come and go *)

Acquire ==  \* tenure.acquire; the floor that it reads helps early, but nothing rests on it
    /\ holder = 0 /\ born < Tenures /\ ~snapshot.unread
    /\ born' = born + 1 /\ holder' = born + 1
    /\ auth' = [auth EXCEPT !.epoch = @ + 1]
    /\ ten' = [ten EXCEPT ![born + 1] = Opening(auth.region, auth.epoch + 1)]
    /\ UNCHANGED <<forks, sole, plan, drained, snapshot, stores, ghosts>>

KeyGone ==  \* the right ended, then the lease; nobody need notice
    /\ holder /= 0
    /\ holder' = 0
    /\ UNCHANGED <<auth, forks, sole, plan, drained, snapshot, stores, born, ten, ghosts>>

-----------------------------------------------------------------------------
(* Opening an epoch: runtime/opening.py, stream/history.py *)

MayFence(t, s) == fence[s] = t \/ Guard("fence-goes-back", Epoch(fence[s]) < ten[t].epoch)
                               \/ (Broken("writer-not-compared") /\ Epoch(fence[s]) = ten[t].epoch)

FenceStore(t, s) ==
    /\ ten[t].phase = "opening" /\ s \notin ten[t].fenced /\ MayFence(t, s)
    /\ fence' = [fence EXCEPT ![s] = t]
    /\ ten' = [ten EXCEPT ![t].fenced = @ \union {s}]
    /\ UNCHANGED <<etcd, snapshot, log, hole, born, ghosts>>

ReadyToChoose(t) ==
    /\ ten[t].phase = "opening" /\ Cardinality(ten[t].fenced) >= Quorum /\ ten[t].home \in ten[t].fenced
    /\ Guard("etcd-forgot-not-checked", ~Forgot(ten[t].fenced, forks))
    /\ Guard("no-hold", sole \subseteq ten[t].fenced \/ plan = "lossy")

CutHome(t) ==  \* what is no history any more goes to salvage
    LET h == ten[t].home  keep == Least(ValidLength(log[h], forks), Len(Chosen(ten[t].fenced, forks))) IN
    /\ ReadyToChoose(t) /\ fence[h] = t /\ keep < Len(log[h])
    /\ log' = [log EXCEPT ![h] = Prefix(@, keep)]
    /\ UNCHANGED <<etcd, snapshot, fence, hole, born, ten, ghosts>>

CopyHome(t) ==
    LET h == ten[t].home  goal == Chosen(ten[t].fenced, forks) IN
    /\ ReadyToChoose(t) /\ fence[h] = t /\ IsPrefix(log[h], goal) /\ Len(log[h]) < Len(goal)
    /\ log' = [log EXCEPT ![h] = Append(@, goal[Len(@) + 1])]
    /\ UNCHANGED <<etcd, snapshot, fence, hole, born, ten, ghosts>>

Lost(h) == {r \in ack1 \ ack2 : ~(r[2] <= Len(h) /\ h[r[2]] = r[1])}

Fork(t) ==  \* one transaction under the holder key; a plan that is under way ends its catch-up in it
    LET h == ten[t].home  goal == Chosen(ten[t].fenced, forks) IN
    /\ ReadyToChoose(t) /\ log[h] = goal
    /\ Guard("fork-without-holder-key", holder = t /\ \A i \in DOMAIN forks : forks[i].epoch < ten[t].epoch)
    /\ forks' = WithFork(forks, ten[t].epoch, Len(goal) + 1)
    /\ sole' = {h} /\ plan' = "none" /\ drained' = FALSE
    /\ promised' = IF plan = "lossy" THEN promised \union Lost(goal) ELSE promised
    /\ ten' = [ten EXCEPT ![t] = [@ EXCEPT !.phase = "open", !.hist = goal, !.sole = {h}, !.pump[h] = Len(goal),
                                           !.fenced = IF Restores = 0 THEN {} ELSE @]]
    /\ live' = t
    /\ UNCHANGED <<auth, holder, snapshot, stores, born, ack1, ack2>>

-----------------------------------------------------------------------------
(* Writing and acknowledging: stream/writer.py *)

Writes(t) == ten[t].phase \in {"open", "frozen"}

Committed(x, q) == {s \in Regions : x.pump[s] >= q}
Alone(x, q) == Committed(x, q) \cap x.sole /= {}
Twice(x, q) == Cardinality(Committed(x, q)) >= 2

(* The opening record is in as many stores as a safe write can be in before anything else is acknowledged. That matters only when
   etcd forgets; elsewhere the model does without it (every segment may carry records), which allows more and keeps histories short. *)
Serves(t, x) ==
    LET own == {q \in DOMAIN x.hist : x.hist[q] = t}
        opening == CHOOSE p \in own : \A o \in own : p <= o
    IN \/ Restores = 0
       \/ own /= {} /\ Cardinality(Committed(x, opening)) >= Least(2, Cardinality(x.fenced))

IsRecord(x, q) == Restores = 0 \/ (q > 1 /\ x.hist[q - 1] = x.hist[q])

(* Tenure t, now in state x, acknowledges whatever it may: for what must not be lost the earliest moment is the hardest. Segments
   of older tenures too: a repeated record whose first answer was never sent. *)
Acknowledge(t, x) ==
    LET may == IF Serves(t, x) /\ Guard("no-check-after-commit", Right(t)) THEN {q \in DOMAIN x.hist : IsRecord(x, q)} ELSE {}
        two == {<<x.hist[q], q>> : q \in {p \in may : Twice(x, p)}}
        one == {<<x.hist[q], q>> : q \in {p \in may : Alone(x, p)}}
    IN ack2' = ack2 \union two /\ ack1' = (ack1 \union one) \ (ack2 \union two)

Attach(t, s) ==  \* fence, cut back what diverged, compare the chain
    LET mine == ten[t].hist
        keep == Greatest({n \in 0..Least(Len(log[s]), Len(mine)) : \A q \in 1..n : Epoch(log[s][q]) = Epoch(mine[q])})
        x == [ten[t] EXCEPT !.pump[s] = keep]
    IN
    /\ Writes(t) /\ ten[t].pump[s] = -1 /\ MayFence(t, s)
    /\ IsPrefix(Prefix(log[s], keep), mine)
    /\ fence' = [fence EXCEPT ![s] = t]
    /\ log' = [log EXCEPT ![s] = Prefix(@, keep)]
    /\ ten' = [ten EXCEPT ![t] = x] /\ Acknowledge(t, x)
    /\ UNCHANGED <<etcd, snapshot, hole, born, promised, live>>

Advance(t, s) ==  \* objects first, then the head, IF epoch and writer are ours and the head is where we left it
    LET n == ten[t].pump[s]
        segment == IF n < Len(ten[t].hist) THEN ten[t].hist[n + 1] ELSE t  \* else it is a new one: who closed it is not asked for its right
        x == [ten[t] EXCEPT !.pump[s] = n + 1, !.hist = IF n < Len(@) THEN @ ELSE Append(@, t)]
    IN
    /\ n >= 0 /\ n < Length
    /\ IF n < Len(ten[t].hist) THEN Writes(t) ELSE ten[t].phase = "open"
    /\ Guard("head-unconditional", fence[s] = t \/ (Broken("writer-not-compared") /\ Epoch(fence[s]) = ten[t].epoch))
    /\ log[s] = Prefix(ten[t].hist, n)
    /\ log' = [log EXCEPT ![s] = Append(@, segment)]
    /\ hole' = IF Broken("pointer-before-payload") THEN hole \union {s} ELSE hole
    /\ ten' = [ten EXCEPT ![t] = x] /\ Acknowledge(t, x)
    /\ UNCHANGED <<etcd, snapshot, fence, born, promised, live>>

-----------------------------------------------------------------------------
(* A stand-in for the home store: runtime/reporter.py *)

StandIn(t, s) ==
    LET x == [ten[t] EXCEPT !.sole = @ \union {s}] IN
    /\ StandIns /\ ten[t].phase = "open" /\ s /= x.home /\ x.pump[s] >= 0 /\ ten[t].sole = {x.home} /\ holder = t
    /\ sole' = IF Broken("stand-in-recorded-late") THEN sole ELSE x.sole
    /\ ten' = [ten EXCEPT ![t] = x] /\ Acknowledge(t, x)
    /\ UNCHANGED <<auth, holder, forks, plan, drained, snapshot, stores, born, promised, live>>

HomeIsBack(t) ==  \* stops counting on the stand-in, in memory first
    LET x == ten[t]  may == {q \in DOMAIN x.hist : Alone(x, q) \/ Twice(x, q)} IN
    /\ Writes(t) /\ Cardinality(x.sole) > 1 /\ x.pump[x.home] >= 0
    /\ Guard("stand-in-dropped-early", \A q \in may : q <= x.pump[x.home])
    /\ ten' = [ten EXCEPT ![t].sole = {x.home}]
    /\ UNCHANGED <<etcd, snapshot, stores, born, ghosts>>

RecordSole(t) ==  \* what the writer's memory says, into etcd
    /\ StandIns /\ ten[t].phase = "open" /\ holder = t /\ sole /= ten[t].sole
    /\ sole' = ten[t].sole
    /\ UNCHANGED <<auth, holder, forks, plan, drained, snapshot, stores, born, ten, ghosts>>

-----------------------------------------------------------------------------
(* The authority moves: runtime/takeover.py, runtime/active.py. Approvals and the barrier are in Promotion.tla. *)

Freeze(t) ==
    /\ Planned /\ ten[t].phase = "open" /\ holder = t
    /\ ten' = [ten EXCEPT ![t].phase = "frozen"]
    /\ UNCHANGED <<etcd, snapshot, stores, born, ghosts>>

ProveDrained(t) ==
    LET all == Len(ten[t].hist)  done == {s \in Regions : ten[t].pump[s] = all} IN
    /\ ten[t].phase = "frozen" /\ holder = t /\ ~drained
    /\ Guard("proof-not-drained",
             /\ Cardinality(done) >= Quorum /\ \A s \in Regions : ten[t].pump[s] \in {-1, all}
             /\ Guard("proof-of-home-alone", Cardinality(done) > Cardinality(Regions) - Quorum))  \* every other quorum meets them
    /\ drained' = TRUE /\ sole' = {}
    /\ UNCHANGED <<auth, holder, forks, plan, snapshot, stores, born, ten, ghosts>>

CallOff(t) ==  \* before it serves again, the record says who may acknowledge alone
    /\ ten[t].phase = "frozen" /\ holder = t
    /\ sole' = IF Broken("unfrozen-before-recorded") THEN sole ELSE ten[t].sole
    /\ drained' = FALSE
    /\ ten' = [ten EXCEPT ![t].phase = "open"]
    /\ UNCHANGED <<auth, holder, forks, plan, snapshot, stores, born, ghosts>>

Move(r, loss) ==
    /\ holder = 0 /\ r /= auth.region /\ born < Tenures
    /\ auth' = [auth EXCEPT !.region = r] /\ plan' = loss /\ drained' = FALSE
    /\ UNCHANGED <<holder, forks, sole, snapshot, stores, born, ten, ghosts>>

FailOver(r) == Move(r, "exact") \/ Move(r, "lossy")

SwitchOver(r) == Planned /\ drained /\ Move(r, "exact")

ApproveGreaterLoss ==  \* the promotion holds, and people approve
    /\ plan = "exact" /\ holder /= 0 /\ ten[holder].phase = "opening"
    /\ plan' = "lossy"
    /\ UNCHANGED <<auth, holder, forks, sole, drained, snapshot, stores, born, ten, ghosts>>

-----------------------------------------------------------------------------
(* etcd comes back from a snapshot: runtime/recovery.py. By then every right has ended (nobody's heartbeat was answered),
   and, as the runbook says, a person lets the stores speak before controllers go on. *)

Back == [snapshot EXCEPT !.taken = TRUE, !.auth = auth, !.forks = forks, !.sole = sole, !.plan = plan]

Backup ==
    /\ snapshot.left > 0 /\ ~snapshot.taken /\ snapshot' = Back
    /\ UNCHANGED <<etcd, stores, born, ten, ghosts>>

Restore ==
    /\ snapshot.left > 0 /\ snapshot.taken /\ holder = 0
    /\ snapshot' = [snapshot EXCEPT !.left = @ - 1, !.unread = TRUE]
    /\ auth' = snapshot.auth /\ forks' = snapshot.forks /\ sole' = snapshot.sole /\ plan' = snapshot.plan
    /\ holder' = 0 /\ drained' = FALSE
    /\ UNCHANGED <<stores, born, ten, ghosts>>

Recover(S) ==  \* a person confirms what the stores S, which answer, know better than etcd
    LET last(s) == IF log[s] = <<>> THEN 0 ELSE Epoch(log[s][Len(log[s])])
        best == CHOOSE s \in S : \A o \in S : last(s) > last(o) \/ (last(s) = last(o) /\ Len(log[s]) >= Len(log[o]))
        h == log[best]
        begins == {q \in 1..Len(h) : q = 1 \/ Epoch(h[q]) /= Epoch(h[q - 1])}
        found == [i \in 1..Cardinality(begins) |->
                    LET q == CHOOSE b \in begins : Cardinality({c \in begins : c <= b}) = i IN [epoch |-> Epoch(h[q]), first |-> q]]
        floor == Greatest({Epoch(fence[s]) : s \in S})
        newer == found /= <<>> /\ \A i \in DOMAIN forks : found[Len(found)].epoch > forks[i].epoch
    IN
    /\ snapshot.unread /\ Cardinality(S) >= Quorum
    /\ snapshot' = [snapshot EXCEPT !.unread = FALSE]
    /\ auth' = [auth EXCEPT !.epoch = IF @ < floor THEN floor ELSE @]
    /\ forks' = IF newer THEN found ELSE forks
    /\ sole' = IF newer \/ (Recovery = "changed" /\ floor > auth.epoch) \/ Recovery = "always" THEN Regions ELSE sole
    /\ UNCHANGED <<holder, plan, drained, stores, born, ten, ghosts>>

Next ==
    \/ Acquire \/ KeyGone \/ ApproveGreaterLoss \/ Backup \/ Restore
    \/ \E r \in Regions : FailOver(r) \/ SwitchOver(r)
    \/ \E S \in SUBSET Regions : Recover(S)
    \/ \E t \in T :
        \/ CutHome(t) \/ CopyHome(t) \/ Fork(t) \/ HomeIsBack(t) \/ RecordSole(t)
        \/ Freeze(t) \/ ProveDrained(t) \/ CallOff(t)
        \/ \E s \in Regions : FenceStore(t, s) \/ Attach(t, s) \/ Advance(t, s) \/ StandIn(t, s)

Spec == Init /\ [][Next]_vars

Symmetry == Permutations(Regions)

(* For the runs with three epochs: states that differ only in what can never matter again are one. What a tenure without its key
   knows of a store that a newer one fenced moves nothing (every step there compares the fence), nor does it acknowledge; and one that
   all stores have passed can do nothing at all. Not for mutants, some of which do look at it. *)
Passed(t, s) == Epoch(fence[s]) > ten[t].epoch

Rest(t) ==
    IF holder = t \/ live = t \/ ten[t].phase = "unborn" THEN ten[t]
    ELSE IF \A s \in Regions : Passed(t, s) THEN [Unborn EXCEPT !.phase = "over", !.epoch = ten[t].epoch]
    ELSE [ten[t] EXCEPT !.pump = [s \in Regions |-> IF Passed(t, s) THEN -1 ELSE @[s]], !.sole = {}]

Essence == <<etcd, snapshot, stores, born, [t \in T |-> Rest(t)], ghosts>>

-----------------------------------------------------------------------------
(* Invariants *)

Has(h, r) == r[2] <= Len(h) /\ h[r[2]] = r[1]

LogMatching ==  \* the same epoch at the same place: the same history up to it
    \A a, b \in Regions : \A q \in 1..Least(Len(log[a]), Len(log[b])) :
        Epoch(log[a][q]) = Epoch(log[b][q]) => Prefix(log[a], q) = Prefix(log[b], q)

SurvivesAnyRegion ==  \* two copies: recovered from the other stores, whichever region is lost
    \A d \in Regions : LET rest == Regions \ {d} IN
        ~Forgot(rest, forks) => \A r \in ack2 : Has(Chosen(rest, forks), r)

NothingLostUnpromised ==  \* what was acknowledged is in the live history, or people had approved its loss before it was final
    live /= 0 => \A r \in ack1 \union ack2 : Has(ten[live].hist, r) \/ r \in promised

AttachedStoresFollow ==  \* a store that a writer fenced and attached holds a prefix of that writer's history, whoever else is alive
    \A t \in T : \A s \in Regions :
        ten[t].pump[s] >= 0 /\ fence[s] = t => log[s] = Prefix(ten[t].hist, ten[t].pump[s])

FencesRise ==  \* a store that an open epoch fenced is never given back to an older one
    \A t \in T : \A s \in ten[t].fenced : Epoch(fence[s]) >= ten[t].epoch

PayloadFirst == hole = {}

(* Witnesses *)

NeverMoved == ~ \E t \in T : live = t /\ t > 1 /\ Len(ten[t].hist) > 1 /\ ten[t].home /= ten[1].home /\ \E r \in ack2 : r[1] < t
NeverLost == promised = {}
NeverSwitched ==
    ~ \E t \in T : live = t /\ t > 1 /\ ten[t - 1].phase = "frozen" /\ ack1 \union ack2 /= {} /\ ten[t].home /= ten[t - 1].home
NeverStoodIn == ~ \E t \in T : \E r \in ack1 : r[1] = t /\ Len(log[ten[t].home]) < r[2] /\ t = live
NeverSalvaged == ~ \E t \in T : \E s \in Regions : live = t /\ t > 1 /\ Len(log[s]) >= Len(ten[t].hist) /\ ~IsPrefix(log[s], ten[t].hist)
NeverHeld == ~ \E t \in T : ten[t].phase = "opening" /\ Cardinality(ten[t].fenced) >= Quorum /\ ~(sole \subseteq ten[t].fenced) /\ plan = "exact"
=============================================================================
