------------------------------ MODULE Traffic ------------------------------
(* The zone: weighted records and the epoch TXT beside them (adapters/traffic.py). Route 53 applies a batch as a whole, and only when
   every DELETE matches exactly; so a batch is a compare-and-set. Controllers are slow: what was read may be old when the batch
   arrives, and a holder whose right has passed does not know it. *)

EXTENDS Integers, FiniteSets, Mutants

CONSTANTS Regions, Epochs

VARIABLES
    region,  \* epoch -> the region that was given it, in the order in which epochs are given out; "" before
    zone,    \* [epoch, weight]: the TXT, and the region whose record has weight
    seen,    \* epoch -> what its controller read last, or NotRead
    newest   \* ghost: the greatest epoch that the zone ever had

vars == <<region, zone, seen, newest>>

E == 1..Epochs
NotRead == [epoch |-> -1, weight |-> ""]
Given == {e \in E : region[e] /= ""}

Init ==
    /\ region = [e \in E |-> ""] /\ seen = [e \in E |-> NotRead] /\ newest = 0
    /\ \E r \in Regions : zone = [epoch |-> 0, weight |-> r]

GiveOut(e, r) ==  \* Lease.tla and Stream.tla: epochs rise
    /\ region[e] = "" /\ \A f \in 1..(e - 1) : region[f] /= ""
    /\ region' = [region EXCEPT ![e] = r] /\ UNCHANGED <<zone, seen, newest>>

Read(e) ==  \* whoever reads a greater epoch is stale and stops
    /\ e \in Given /\ Guard("zone-epoch-not-compared", zone.epoch <= e)
    /\ seen' = [seen EXCEPT ![e] = zone] /\ UNCHANGED <<region, zone, newest>>

Change(e, weight) ==
    /\ seen[e] /= NotRead /\ Guard("zone-by-upsert", zone = seen[e])
    /\ zone' = [epoch |-> e, weight |-> weight]
    /\ newest' = IF e > newest THEN e ELSE newest
    /\ seen' = [seen EXCEPT ![e] = NotRead] /\ UNCHANGED region

Raise(e) == Change(e, seen[e].weight)  \* step `fence`: the TXT alone
Route(e) == Change(e, region[e])       \* step `route`

Next == \E e \in E : Read(e) \/ Raise(e) \/ Route(e) \/ \E r \in Regions : GiveOut(e, r)

\* Faults end: every controller goes on reading and routing; the last one is never stale.
Spec == Init /\ [][Next]_vars /\ \A e \in E : WF_vars(Read(e)) /\ SF_vars(Route(e)) /\ WF_vars(\E r \in Regions : GiveOut(e, r))

-----------------------------------------------------------------------------

NeverBack == zone.epoch = newest

\* Whoever moved the weights last moved them to its own region, unless nobody routed since: then they are as an older epoch left them.
WeightIsSomebodys == zone.weight \in Regions

StaleNeverRoutes == [][zone' /= zone => zone'.epoch >= zone.epoch]_vars

LastWins == <>[](zone = [epoch |-> Epochs, weight |-> region[Epochs]])

NeverStale == ~ \E e, f \in E : e < f /\ zone.epoch = f /\ seen[e] /= NotRead
NeverRaised == ~ \E e \in E : zone.epoch = e /\ zone.weight /= region[e]
=============================================================================
