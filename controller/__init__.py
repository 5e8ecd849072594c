"""Multi-region disaster recovery for fleets of AI agents.

Rooms: ``domain`` decides (pure), ``ports`` names what is needed from outside, ``adapters`` bring it (etcd, S3 + DynamoDB,
Route 53, DNS, people), ``stream`` replicates, ``runtime`` is the daemon, ``drills`` rehearse, ``lab`` puts three regions on
one machine, ``cli`` is ``drctl``. ``agent`` is what agents import; it needs only the base dependencies. ``settings`` and
``errors`` serve all of them.
"""

__version__ = "0.1.0"
