------------------------------ MODULE Mutants ------------------------------
(* Every guard that tests/model/check.py removes, one at a time, is written with Guard and named there. *)

CONSTANT Mutant  \* "none", or the name of the guard that is missing

Guard(name, condition) == Mutant = name \/ condition

Broken(name) == Mutant = name
=============================================================================
