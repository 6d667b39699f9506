"""Reads from a worker, stops it amid a read, and ends with memory in quarantine: ``python kept_memory.py URI PID``.

It prints how many bytes are kept.
"""

from __future__ import annotations

import os
import signal
import sys

import torch

from modelexpress_core.contracts.candidates import Peer
from modelexpress_core.contracts.transport import PeerAccess, TensorRead
from modelexpress_core.errors import DeadlineError
from modelexpress_core.sources.worker_client import WorkerClient
from modelexpress_core.uri import ModelURI
from mx_nixl._quarantine import QUARANTINE
from mx_nixl._transport import open_nixl
from tests.support.peers import identity_of, tensors_of


def main() -> None:
    uri, pid, mib = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    source = identity_of(tensors_of(mib)).source_id
    reads = [TensorRead(name, 0, torch.zeros_like(tensor)) for name, tensor in tensors_of(mib).items()]
    transport = open_nixl(ModelURI.parse(uri), {"MX_NIXL_READ_TIMEOUT_SECONDS": "1"})
    client = WorkerClient(uri.replace("nixl://", "http://"), deadline_seconds=1)
    leasing = client.lease(source)  # its end is not confirmed: the worker is stopped
    lease = leasing.__enter__()
    session = transport.connect(PeerAccess(Peer(source, "w"), lease.lease_id, client.access(lease.lease_id, "nixl")))
    arriving = session.read(reads)
    next(arriving)
    os.kill(pid, signal.SIGSTOP)
    try:
        list(arriving)
    except DeadlineError:
        session.close()
        sys.stdout.write(f"{QUARANTINE.nbytes}\n")


if __name__ == "__main__":
    main()
