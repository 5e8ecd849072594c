"""Decisions only. No I/O, no clock, no randomness, no logging, no ``async``; standard library only.

    model         the values that everything else speaks in
    lease         how long a holder may act, and what a heartbeat proves
    replication   fences, forks, choice of the history, realignment
    retention     how far a base may move and what may be deleted then
    sharing       which stream an agent belongs to; which instance holds which stream
    lag           lag, exposure, loss, protection
    promotion     the state machine of a plan, as one table
    plan          the frozen document that people approve, its canonical form and digest
    approval      which signatures open the gate
    fleet         which host runs which agent
    outward       which hosts, ports and addresses a URL may lead to
    text          text that strangers chose, made harmless
"""
