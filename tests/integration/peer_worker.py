"""A worker that offers a model, in a process of its own: ``python peer_worker.py URL MIB``.

It says its process's number once the server has it as ready, and serves until it is ended. Each tensor holds other
random bytes, which the reader makes too, with the same seed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping

import torch

import modelexpress_core as mx
from modelexpress_core.contracts.identity import SourceIdentity

TENSORS = 40


def tensors_of(mib: int) -> Mapping[str, torch.Tensor]:
    """Tensors of ``mib`` MiB together, and a few bytes more."""
    generator = torch.Generator().manual_seed(mib)
    return {
        f"layers.{number}.weight": torch.randint(
            0, 256, ((mib << 20) // TENSORS + number,), dtype=torch.uint8, generator=generator
        )
        for number in range(TENSORS)
    }


def identity_of(tensors: Mapping[str, torch.Tensor]) -> SourceIdentity:
    """Their identity, for both sides."""
    return mx.own_identity("acme/model", tensors, content_version="1")


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
