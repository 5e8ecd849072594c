"""Real processes, real network faults: each region in a network namespace of its own.

network     namespaces, links between every pair, cuts by link and by firewall rule
proxy       the HTTP proxy in front of a stand-in, as a process: breaks answers and records what was really written
worker      agents of a region: put, get, ask who is active; writes down every answer with its times
stale       what a killed run leaves, and its removal
recorded    turns all that into the history that the simulation's checkers read
linear      is there an order of all operations that explains every answer? (Wing and Gong)
faults      the list of faults; runner, report: plays them and says what was found
"""
