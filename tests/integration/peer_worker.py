"""A worker that offers a model, in a process of its own: ``python peer_worker.py URL MIB``.

It says its id and its address once the server has it as ready, and serves until it is ended. The reader makes the same
tensors.
"""

from __future__ import annotations

import sys
import threading

import modelexpress_core as mx
from tests.support.peers import identity_of, tensors_of


def main() -> None:
    url, mib = sys.argv[1], int(sys.argv[2])
    tensors = tensors_of(mib)
    environ = {
        "MODEL_EXPRESS_URL": url,
        "MX_WORKER_GRPC_PORT": "0",
        "MX_WORKER_HOST": "127.0.0.1",
        "MX_HEARTBEAT_INTERVAL_SECS": "1",
    }
    with mx.publish(tensors, identity=identity_of(tensors), environ=environ) as offer:
        while offer.state.status != "ready":
            threading.Event().wait(0.02)
        sys.stdout.write(f"{offer.worker_id} {offer.endpoint}\n")
        sys.stdout.flush()
        threading.Event().wait()


if __name__ == "__main__":
    main()
