"""Adapters against real servers and stand-ins, with faults."""
