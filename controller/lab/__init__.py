"""Three regions on one machine: real servers on loopback addresses, fake agents, faults. Nothing here runs in production.

    virtual_time    an asyncio loop without waiting, for simulations and unit tests
    etcd            a real etcd cluster as child processes: start, kill, freeze, thaw
    topology        addresses and settings of the regions; processes: what runs there; control: how tests steer it
    wan             delay and cuts between regions; dns_server, webhook: stand-ins for what the world sees
"""
