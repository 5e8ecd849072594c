------------------------------ MODULE Together ------------------------------
(* A promotion of several streams, from the move of the authority to where all are open: runtime/together.py and the part of
   runtime/opening.py that calls it. Each stream has a holder of its own, which fences, writes down what its stream would lose,
   looks at what all of them wrote, and opens in a transaction that compares the plan and its own document, and nobody else's.
   A loss is 0 or 1 for each stream; people approve a number for all of them. *)

EXTENDS Integers, FiniteSets, TLC, Mutants

CONSTANTS
    Streams, Lead,
    Tenures  \* how many tenures each stream can have

VARIABLES
    plan,     \* [state, approved, asked]
    doc,      \* stream -> [noted, loss, open]: progress/{plan}/{stream}
    holder,   \* stream -> its tenure, 0: nobody holds it
    born,     \* stream -> tenures so far
    judged,   \* stream -> its tenure that found plan and documents good to open under, and whose transaction may still come; 0: none.
              \* It is forgotten when what the transaction compares changes: the same as that transaction failing
    fenced,   \* ghost: streams whose stores were fenced under this plan
    lost,     \* ghost: what the recorded forks made final
    told      \* what the plan says was lost, -1: nothing yet

vars == <<plan, doc, holder, born, judged, fenced, lost, told>>

Moving == plan.state \in {"fencing", "catching-up", "holding"}
Total == Cardinality({s \in Streams : doc[s].loss = 1})
AllNoted == \A s \in Streams : doc[s].noted

Init ==
    /\ \E n \in 0..1 : plan = [state |-> "fencing", approved |-> n, asked |-> n]
    /\ doc = [s \in Streams |-> [noted |-> FALSE, loss |-> 0, open |-> FALSE]]
    /\ holder = [s \in Streams |-> 0] /\ born = [s \in Streams |-> 0] /\ judged = [s \in Streams |-> 0]
    /\ fenced = {} /\ lost = 0 /\ told = -1

Acquire(s) ==
    /\ holder[s] = 0 /\ born[s] < Tenures
    /\ born' = [born EXCEPT ![s] = @ + 1] /\ holder' = [holder EXCEPT ![s] = born[s] + 1]
    /\ UNCHANGED <<plan, doc, judged, fenced, lost, told>>

Gone(s) ==  \* what it judged may still be on its way
    /\ holder[s] /= 0 /\ holder' = [holder EXCEPT ![s] = 0]
    /\ UNCHANGED <<plan, doc, born, judged, fenced, lost, told>>

Note(s) ==  \* fences, again and again; which stores answer, and so what would be lost, may differ each time
    /\ holder[s] /= 0 /\ Moving
    /\ ~doc[s].open \/ Broken("reopened-counts-anew")
    /\ \E loss \in 0..1 :
        /\ <<loss, TRUE>> /= <<doc[s].loss, doc[s].noted>> /\ (doc[s].open => loss = 0)
        /\ doc' = [doc EXCEPT ![s] = [@ EXCEPT !.noted = TRUE, !.loss = loss]]
    /\ fenced' = fenced \union {s}
    /\ judged' = IF Broken("own-progress-not-compared") THEN judged ELSE [judged EXCEPT ![s] = 0]
    /\ UNCHANGED <<plan, holder, born, lost, told>>

To(state, approved, asked) ==
    /\ plan' = [state |-> state, approved |-> approved, asked |-> asked]
    /\ judged' = [s \in Streams |-> 0]

AllFenced ==  \* by the lead's holder
    /\ plan.state = "fencing" /\ holder[Lead] /= 0 /\ AllNoted
    /\ To("catching-up", plan.approved, plan.asked)
    /\ UNCHANGED <<doc, holder, born, fenced, lost, told>>

Judge(s) ==  \* Opening._may_lose: after its own document stands
    /\ holder[s] /= 0 /\ Moving /\ doc[s].noted /\ ~doc[s].open
    /\ Guard("one-opens-before-all-are-fenced", plan.state /= "fencing")
    /\ IF Broken("own-loss-alone") THEN doc[s].loss <= plan.approved ELSE Total <= plan.approved
    /\ judged' = [judged EXCEPT ![s] = holder[s]]
    /\ UNCHANGED <<plan, doc, holder, born, fenced, lost, told>>

Hold ==  \* the lead's holder asks people
    /\ plan.state \in {"catching-up", "holding"} /\ holder[Lead] /= 0 /\ AllNoted /\ Total > plan.approved
    /\ plan.state = "holding" => Total > plan.asked
    /\ To("holding", plan.approved, Total)
    /\ UNCHANGED <<doc, holder, born, fenced, lost, told>>

Approve ==
    /\ plan.state = "holding" /\ holder[Lead] /= 0
    /\ To("catching-up", plan.asked, plan.asked)
    /\ UNCHANGED <<doc, holder, born, fenced, lost, told>>

Fork(s) ==  \* one transaction
    /\ judged[s] /= 0 /\ judged[s] = holder[s]
    /\ doc' = [doc EXCEPT ![s].open = TRUE] /\ lost' = lost + doc[s].loss
    /\ judged' = [judged EXCEPT ![s] = 0]
    /\ UNCHANGED <<plan, holder, born, fenced, told>>

CaughtUp ==  \* by the lead's holder
    /\ plan.state \in {"catching-up", "holding"} /\ holder[Lead] /= 0 /\ \A s \in Streams : doc[s].open
    /\ To("opened", plan.approved, plan.asked) /\ told' = Total
    /\ UNCHANGED <<doc, holder, born, fenced, lost>>

Next ==
    \/ AllFenced \/ Hold \/ Approve \/ CaughtUp
    \/ \E s \in Streams : Acquire(s) \/ Gone(s) \/ Note(s) \/ Judge(s) \/ Fork(s)

Spec == Init /\ [][Next]_vars

-----------------------------------------------------------------------------

\* Else a region that goes on past its lease with one stream would serve beside the one that opened another.
AllFencedFirst == (\E s \in Streams : doc[s].open) => fenced = Streams

WithinApproval == lost <= plan.approved

ToldAsItIs == told >= 0 => told = lost

NeverReopened == ~ \E s \in Streams : doc[s].open /\ holder[s] > 1 /\ told = 1
NeverGrew == ~ (plan.state = "opened" /\ plan.approved = 2 /\ lost = 2)
=============================================================================
