"""Hours of random faults on one group at work: do memory, descriptors and queues stay flat, do the checkers stay quiet?

flat        samples of processes and what can be said about their growth; pure
__main__    ``make soak``: plays faults (``tests/faults``), samples, reports
"""
