------------------------------- MODULE Lease -------------------------------
(* Who may act, and until when: the arithmetic of domain/lease.py and runtime/tenure.py, with time.

   Time is discrete. Every quantity is a countdown in ticks, so the state space is finite although time has no end. A tick may
   come between any two steps of anybody: that is the pause of a process, the delay of a message, the slow answer.

   etcd is one linearizable register with a lease, plus the three things that hurt: it may remove an expired key late; a leader
   that was deposed while its disk hung may go on answering keep-alives without effect; and one that wakes from a pause may take
   a lease away that was renewed a moment ago, through the new leader. *)

EXTENDS Integers, FiniteSets, TLC, Mutants

CONSTANTS
    Instances,      \* controllers that may become the holder, of whichever region
    NoOne,
    TTL,            \* ticks
    Margin,         \* the deadline is that much before the lease can end
    Drift,          \* ticks by which a holder's clock falls behind during one TTL; at most Margin
    DeposedAnswers, \* BOOLEAN: a deposed leader may answer keep-alives (etcd before 3.5.16)
    OtherMember,    \* BOOLEAN: ... also to a client that has already read in the new term, through another member
    RevokesEarly    \* BOOLEAN: etcd may take a lease away at any moment (3.5.16 does). Then nothing rests on its time, so elections
                    \* and barriers, which can only take something from a right, are left out

VARIABLES
    key,      \* whose `holder` key stands in etcd
    lease,    \* ticks until etcd may remove it
    barrier,  \* "none", "failover", "planned"
    waited,   \* ticks since the executor of a failover first saw the barrier, -1: not yet
    deposed,  \* BOOLEAN: a deposed leader is still answering
    gone,     \* ticks since a holder's key vanished, as far as a successor counts them
    lent,     \* BOOLEAN, beside the forks: rights of the holder that opened last may outlive its key
    phase,    \* instance -> "none"; "opening": not yet serving; "serving"; "stopping": its right is lost, not what it lent
    right,    \* instance -> ticks until its deadline has certainly passed
    beat,     \* instance -> its heartbeat under way
    agent     \* instance -> ticks for which an agent that it lent a right to believes that it may act

etcd == <<key, lease, barrier, waited, deposed, gone, lent>>
vars == <<key, lease, barrier, waited, deposed, gone, lent, phase, right, beat, agent>>

Idle == [step |-> "idle", sent |-> 0, moved |-> FALSE, old |-> FALSE, saw |-> FALSE]

Max(a, b) == IF a > b THEN a ELSE b
Less(n) == Max(0, n - 1)
More(n) == IF n > TTL THEN n ELSE n + 1

Holding(i) == phase[i] # "none"
MayAct(i) == phase[i] = "serving" /\ right[i] > 0

\* How long a lease lasts; one that may be taken away at any moment is one that is always over.
Full == IF RevokesEarly THEN 0 ELSE TTL

\* What a successor waits for, from when the key was gone: the longest right, on a clock that is as slow as it may be. Without
\* early revocations nobody has to.
Longest == TTL - Margin + Drift
Wait == IF ~RevokesEarly \/ Broken("no-wait-after-a-vanished-key") THEN 0
        ELSE IF Broken("wait-without-drift") THEN Longest - Drift ELSE Longest

TypeOK ==
    /\ key \in Instances \union {NoOne} /\ lease \in 0..TTL
    /\ barrier \in {"none", "failover", "planned"} /\ waited \in -1..(TTL + 1) /\ deposed \in BOOLEAN
    /\ gone \in 0..TTL + 1 /\ lent \in BOOLEAN
    /\ phase \in [Instances -> {"none", "opening", "serving", "stopping"}] /\ right \in [Instances -> 0..(TTL + Drift)]
    /\ beat \in [Instances -> [step: {"idle", "read", "sent", "answered"}, sent: 0..(TTL + 1),
                            moved: BOOLEAN, old: BOOLEAN, saw: BOOLEAN]]
    /\ agent \in [Instances -> 0..(TTL + Drift + 1)]

Init ==
    /\ key = NoOne /\ lease = 0 /\ barrier = "none" /\ waited = -1 /\ deposed = FALSE
    /\ gone = 0 /\ lent = FALSE
    /\ phase = [i \in Instances |-> "none"] /\ right = [i \in Instances |-> 0]
    /\ beat = [i \in Instances |-> Idle] /\ agent = [i \in Instances |-> 0]

-----------------------------------------------------------------------------
(* Time, and etcd *)

Tick ==
    /\ lease' = Less(lease)
    /\ waited' = IF waited < 0 THEN waited ELSE More(waited)
    /\ right' = [i \in Instances |-> Less(right[i])]
    /\ beat' = [i \in Instances |-> IF beat[i].step \in {"sent", "answered"} THEN [beat[i] EXCEPT !.sent = More(@)] ELSE beat[i]]
    /\ agent' = [i \in Instances |-> Less(agent[i])]
    /\ gone' = IF lent /\ gone < Wait /\ (key = NoOne \/ phase[key] = "opening") THEN gone + 1 ELSE gone
    /\ UNCHANGED <<key, barrier, deposed, lent, phase>>

Vanish == key' = NoOne /\ gone' = 0

Expire ==  \* not before the lease is over; later is always possible
    /\ key /= NoOne /\ lease = 0 /\ ~RevokesEarly /\ Vanish
    /\ UNCHANGED <<lease, barrier, waited, deposed, lent, phase, right, beat, agent>>

RevokeEarly ==
    /\ key /= NoOne /\ RevokesEarly /\ Vanish
    /\ UNCHANGED <<lease, barrier, waited, deposed, lent, phase, right, beat, agent>>

Elect ==  \* every lease gets its full TTL again; the old leader may not know
    /\ ~RevokesEarly /\ lease' = IF key = NoOne THEN lease ELSE TTL
    /\ deposed' = DeposedAnswers
    /\ beat' = [i \in Instances |-> IF beat[i].step = "idle" THEN beat[i] ELSE [beat[i] EXCEPT !.moved = TRUE]]
    /\ UNCHANGED <<key, barrier, waited, gone, lent, phase, right, agent>>

-----------------------------------------------------------------------------
(* A tenure *)

End(i) ==
    /\ phase' = [phase EXCEPT ![i] = "none"]
    /\ beat' = [beat EXCEPT ![i] = Idle]
    /\ right' = [right EXCEPT ![i] = 0]

Beats(i, next) == beat' = [beat EXCEPT ![i] = next] /\ UNCHANGED <<phase, right>>

\* Ticks left of a right that counts from `age` ticks ago, on a clock that is as slow as it may be: the longest there can be.
Deadline(age) == Max(0, (IF Broken("no-margin") THEN TTL ELSE TTL - Margin) + Drift - age)

Acquire(i) ==  \* tenure.acquire. asked, granted: how long ago the lease was asked for, and granted
    /\ key = NoOne /\ barrier = "none" /\ ~Holding(i)
    /\ \E asked \in 0..1 : \E granted \in 0..asked :
        /\ lease' = IF RevokesEarly THEN 0 ELSE TTL - granted
        /\ right' = [right EXCEPT ![i] = Deadline(asked)]
    /\ key' = i
    /\ phase' = [phase EXCEPT ![i] = IF RevokesEarly THEN "opening" ELSE "serving"]  \* where nobody waits, no step of its own
    /\ lent' = (lent /\ ~Broken("wait-forgotten-by-the-next"))
    /\ UNCHANGED <<barrier, waited, deposed, gone, beat, agent>>

Serve(i) ==  \* Opening._outwait and _fork, which is a transaction under the holder key
    /\ phase[i] = "opening" /\ key = i /\ right[i] > 0
    /\ lent => gone >= Wait
    /\ phase' = [phase EXCEPT ![i] = "serving"] /\ lent' = TRUE /\ gone' = 0
    /\ UNCHANGED <<key, lease, barrier, waited, deposed, right, beat, agent>>

BeatRead(i) ==  \* the first guarded read
    /\ phase[i] \in {"opening", "serving"} /\ beat[i].step = "idle"
    /\ IF key = i THEN Beats(i, [Idle EXCEPT !.step = "read", !.saw = (barrier = "failover")]) ELSE End(i)
    /\ UNCHANGED <<etcd, agent>>

BeatSend(i) ==
    /\ beat[i].step = "read" /\ Beats(i, [beat[i] EXCEPT !.step = "sent"])
    /\ UNCHANGED <<etcd, agent>>

BeatRenewed(i) ==  \* the leader renews the lease, or says that it is gone
    /\ beat[i].step = "sent"
    /\ IF key = i
       THEN lease' = Full /\ Beats(i, [beat[i] EXCEPT !.step = "answered"])
       ELSE UNCHANGED lease /\ End(i)
    /\ UNCHANGED <<key, barrier, waited, deposed, gone, lent, agent>>

BeatFooled(i) ==  \* a deposed leader answers, and nothing is renewed; `old`: in a term before that of the first read
    /\ beat[i].step = "sent" /\ deposed /\ (beat[i].moved \/ OtherMember)
    /\ Beats(i, [beat[i] EXCEPT !.step = "answered", !.old = ~beat[i].moved])
    /\ UNCHANGED <<etcd, agent>>

BeatFails(i) ==  \* no answer: proves nothing
    /\ beat[i].step /= "idle" /\ Beats(i, Idle)
    /\ UNCHANGED <<etcd, agent>>

BeatJudge(i) ==  \* the second guarded read, and lease.judge
    /\ beat[i].step = "answered"
    /\ IF Guard("lease-trusted-alone", key = i)
       THEN /\ beat' = [beat EXCEPT ![i] = Idle] /\ UNCHANGED phase
            /\ LET age == IF Broken("counted-from-answer") THEN 0 ELSE beat[i].sent
                   proves == /\ Mutant \in {"term-not-compared", "lease-trusted-alone"} \/ ~beat[i].moved
                             /\ Mutant \in {"keep-alive-term-not-compared", "lease-trusted-alone"} \/ ~beat[i].old
                             /\ Guard("barrier-extends", barrier /= "failover" /\ ~beat[i].saw)
               IN right' = [right EXCEPT ![i] = IF proves THEN Max(@, Deadline(age)) ELSE @]
       ELSE End(i)
    /\ UNCHANGED <<etcd, agent>>

StepDown(i) ==  \* for any reason; what it lent runs on, and the key stays until its lease ends
    /\ phase[i] \in {"opening", "serving"}
    /\ IF phase[i] = "serving"
       THEN phase' = [phase EXCEPT ![i] = "stopping"] /\ beat' = [beat EXCEPT ![i] = Idle] /\ UNCHANGED right
       ELSE End(i)
    /\ UNCHANGED <<etcd, agent>>

Stopped(i) ==  \* without giving the lease back
    /\ phase[i] = "stopping" /\ End(i)
    /\ UNCHANGED <<etcd, agent>>

\* Active.stop, by the clock: no right that was lent runs any more. A right that was lost says nothing about that.
AllOver(i) ==
    \/ agent[i] = 0 \/ right[i] = 0
    \/ Broken("released-too-early")
    \/ Broken("lost-taken-for-over") /\ phase[i] = "stopping"

Release(i) ==  \* gives the lease back early; the next one need not wait
    /\ phase[i] \in {"serving", "stopping"} /\ AllOver(i)
    /\ IF key = i
       THEN Vanish /\ lent' = FALSE
       ELSE /\ Broken("orderly-end-without-the-key") /\ lent' = FALSE
            /\ UNCHANGED <<key, gone>>
    /\ End(i)
    /\ UNCHANGED <<lease, barrier, waited, deposed, agent>>

Lend(i) ==  \* an agent's right counts from when it sent its request, 0 or 1 ticks ago; without that, from an answer that took a tick
    /\ MayAct(i)
    /\ \E age \in 0..1 :
        agent' = [agent EXCEPT ![i] = Max(@, IF Broken("agent-counts-from-answer") THEN right[i] + age ELSE right[i] - age)]
    /\ UNCHANGED <<etcd, phase, right, beat>>

-----------------------------------------------------------------------------
(* A promotion takes the authority away *)

SetBarrier ==
    /\ ~RevokesEarly /\ barrier = "none" /\ barrier' \in {"failover", "planned"}
    /\ UNCHANGED <<key, lease, waited, deposed, gone, lent, phase, right, beat, agent>>

SeeBarrier ==  \* the executor's wait counts from when it first saw the barrier
    /\ barrier = "failover" /\ waited = -1 /\ waited' = 0
    /\ UNCHANGED <<key, lease, barrier, deposed, gone, lent, phase, right, beat, agent>>

Revoke ==  \* takeover._quiesce: more than one TTL later a failover revokes what is left
    /\ barrier = "failover" /\ waited >= 0 /\ key /= NoOne
    /\ Guard("revoked-at-once", waited > TTL)
    /\ Vanish
    /\ UNCHANGED <<lease, barrier, waited, deposed, lent, phase, right, beat, agent>>

ClearBarrier ==  \* authorized, or called off
    /\ barrier /= "none" /\ barrier' = "none" /\ waited' = -1
    /\ UNCHANGED <<key, lease, deposed, gone, lent, phase, right, beat, agent>>

Next ==
    \/ Tick \/ Expire \/ RevokeEarly \/ Elect \/ SetBarrier \/ SeeBarrier \/ Revoke \/ ClearBarrier
    \/ \E i \in Instances :
        \/ Acquire(i) \/ Serve(i) \/ BeatRead(i) \/ BeatSend(i) \/ BeatRenewed(i) \/ BeatFooled(i) \/ BeatFails(i) \/ BeatJudge(i)
        \/ StepDown(i) \/ Stopped(i) \/ Release(i) \/ Lend(i)

Spec == Init /\ [][Next]_vars

Symmetry == Permutations(Instances)

-----------------------------------------------------------------------------
(* Invariants *)

OneRight == \A i, j \in Instances : MayAct(i) /\ MayAct(j) => i = j

\* Where etcd revokes nothing early, whoever finds no holder key knows that no right is left.
RightNeedsKey == \A i \in Instances : MayAct(i) => key = i

\* Where it does: a right is over when whoever comes next has waited. The base of the other modules: it has ended when the next
\* tenure records its fork.
RightEndsSoon == \A i \in Instances : MayAct(i) /\ key # i => right[i] <= Longest - gone

AgentsStopFirst == \A i, j \in Instances : i /= j /\ agent[i] > 0 => ~MayAct(j)

(* Witnesses: these must be violated, or the invariants say little *)

NeverSleeper == ~ \E i, j \in Instances : i /= j /\ Holding(i) /\ MayAct(j)
NeverRevoked == ~ \E i \in Instances : Holding(i) /\ key = NoOne /\ barrier = "failover" /\ beat[i].step = "answered"
NeverOrphan == ~ \E i \in Instances : agent[i] > 0 /\ ~MayAct(i)
NeverOutlived == ~ \E i, j \in Instances : i /= j /\ MayAct(i) /\ key = j
NeverAtOnce == ~ \E i, j \in Instances : i /= j /\ right[i] > 0 /\ MayAct(j)
=============================================================================
