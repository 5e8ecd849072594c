"""The daemon: everything that runs in a controller, built from decisions (domain), the stream and the ports.

    controller    one instance: its parts, its loops, its role; desk: what it answers to agents, people and probes
    duty          which streams it holds: acquire, share out, step down; sight: what it has seen, and since when
    active        one tenure's life; intake: what it takes; leading: what only the lead does; leaving: drain and orderly end
    tenure        the lease in this instance's hands: acquire, heartbeat, release
    opening       fence, hold, choose, bring home, fork: how an epoch opens; together: for all streams of a promotion
    shares        which streams this instance should hold; routing: records to their holders; peers: the way there
    plans         plans, approvals, journal in etcd; planning: proposes and runs them; takeover: check, quiesce, authorize;
                  promotion: verify … report
    evidence      what a plan is decided on; watch: incidents and proposals; reporter: lag, canary, stand-in
    retention     keeps a held stream bounded: carries forward, moves bases, deletes
    documents     every etcd key and its document; audit: the hash chain; bootstrap: founds a group
    api           HTTP; service: what the API needs of a controller; status, metrics: what is shown
    wiring        settings to adapters; policies: settings to plain values; shell: what a controller is made of;
                  daemon: `drctl serve`; recovery: etcd's records read back from the stores
"""
