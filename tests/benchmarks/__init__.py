"""Measurements of the whole path against a peer: ``make bench``. Nothing here is collected by pytest; README.md has the tables.

states   agents' states: growing conversations with real text          (standard library only: the peer uses it too)
stand    three regions of the lab, as a benchmark needs them             load     a process of agents that write
peer     langgraph-checkpoint-aws in an environment of its own           measure  CPU, percentiles, medians
prices   what the same requests and bytes cost at AWS                    figures  one file per row of the table
render   results to README.md
"""
