"""One file per outside system; each implements one Protocol of ``controller.ports`` and passes its contract suite.

    etcd            Coordinator: leases, transactions (etcdrpc, etcd_endpoint, etcd_version belong to it)
    transactions    what every Coordinator refuses before it sends anything
    region_store    RegionStore: S3 and DynamoDB of one region
    sealed_store    RegionStore around another one: seals and opens (sealing: the bytes; keyring: data keys); kms: KeyService
    route53         Traffic: weighted records and the fencing TXT, changed by compare-and-set
    dns             Resolver: what clients see
    identity        Identity: OpenSSH signatures of approvals; notify: Pager; clock: Clock
    memory          the reference implementations, for tests, simulation and drills
"""
