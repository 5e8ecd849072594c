"""Every port in memory: the reference semantics, for tests, simulation and drills. Time and failures are injected.

    gate            where a test delays a call, fails it, or loses its answer
    coordinator     MemoryCluster (the server, shared) and MemoryCoordinator (one client)
    region_store    MemoryStore (one region's S3 and DynamoDB) and MemoryRegionStore (one client)
    traffic         MemoryZone, MemoryTraffic; resolver: MemoryResolver; pager: MemoryPager

A client awaits ``gate.before(op)``, acts on the server in one step, and awaits ``gate.after(op)``. So whatever a gate does, the
server itself stays atomic, and an answer that is lost in ``after`` belongs to something that has happened.
"""
