"""Bad input: what people, programs, networks and damaged disks may send. Wrong input gets an error of ours, never another one.

Examples are few in `make test`; `make fuzz` runs thousands of each (HYPOTHESIS_PROFILE=thorough).
"""
