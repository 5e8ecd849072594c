"""etcd's gRPC messages and client stubs, generated anew so that ``etcd3`` works with today's protobuf.

``install()`` puts this package in the place of ``etcd3.etcdrpc`` and has to run before the first ``import etcd3``.

    install         makes ``import etcd3`` work; no environment variable needed
    regenerate      the script that made the files below, and why they look as they do
    kv_pb2, auth_pb2, rpc_pb2, rpc_pb2_grpc   generated: never edited, not linted
"""

from __future__ import annotations

import sys

from controller.adapters.etcdrpc import auth_pb2, kv_pb2, rpc_pb2, rpc_pb2_grpc
from controller.adapters.etcdrpc.rpc_pb2 import *  # noqa: F403  (etcd3 uses the names as etcdrpc.TxnRequest, …)
from controller.adapters.etcdrpc.rpc_pb2_grpc import *  # noqa: F403

_NAME = "etcd3.etcdrpc"


def install() -> None:
    """Registers this package as ``etcd3.etcdrpc``. Does nothing when it is registered already.

    Raises RuntimeError when the stale stubs were imported before: two copies of one protobuf file cannot live in a process.
    """
    this = sys.modules[__name__]
    if sys.modules.setdefault(_NAME, this) is not this:
        raise RuntimeError(f"{_NAME} was imported before {__name__}.install(); import controller.adapters.etcd first")
    for module in (kv_pb2, auth_pb2, rpc_pb2, rpc_pb2_grpc):
        sys.modules[f"{_NAME}.{module.__name__.rpartition('.')[2]}"] = module
