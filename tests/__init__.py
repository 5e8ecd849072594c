"""Unit, contract, simulation, integration and fault tests. `make test-fast` leaves out what needs servers or time."""
